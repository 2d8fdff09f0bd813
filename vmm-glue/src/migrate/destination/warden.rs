//! The guard beside a destination, and what it watches.

use crate::guard::{Arms, Guard, GuardCommand, GuardError, LifePage, Secrets, SignOfLife, dismiss};
use crate::migrate::settings::TetherSettings;
use belay_checkpoint::outbox::OutputMode;
use belay_transport::Deadline;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

/// The page server's slot in the page of signs of life.
pub(super) const SERVER_SLOT: usize = 0;

/// Under `--output lease` a VMM of its own can be fenced; under `commit` a catch needs no proof, and the guest may wait to be taken over.
pub(super) fn arms(tether: &TetherSettings, vmm_is_apart: bool) -> Arms {
    match tether.output {
        OutputMode::Lease if vmm_is_apart => Arms::Fence { gate_bound: tether.lease.length },
        OutputMode::Lease | OutputMode::Commit => Arms::None,
    }
}

/// The guard beside this process, and what it watches.
pub(super) struct Warden {
    pub(super) guard: Guard,
    pub(super) page: Arc<LifePage>,
    life: SignOfLife,
    pub(super) secrets: Secrets,
}

impl Warden {
    /// Starts the guard. Before guest RAM is mapped, so that starting a process costs nothing.
    pub(super) fn start(
        command: &GuardCommand,
        connection: OwnedFd,
        arms: Arms,
        deadline: Deadline,
    ) -> Result<Self, GuardError> {
        let page = Arc::new(LifePage::new(2)?);
        let secrets = Secrets::random()?;
        let mut guard = Guard::spawn(command, &page, &secrets, arms, &[connection.as_fd()])?;
        let life = SignOfLife::hold(Arc::clone(&page), SERVER_SLOT)?;
        guard.watch(SERVER_SLOT, deadline)?;
        Ok(Self { guard, page, life, secrets })
    }

    /// An orderly end: the guard goes without a word.
    pub(super) fn stand_down(mut self, deadline: Deadline) {
        dismiss(self.guard.hand_over());
        self.life.stand_down();
        let _ = self.guard.wait(deadline);
    }
}
