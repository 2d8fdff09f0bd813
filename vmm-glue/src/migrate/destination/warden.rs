//! The guard beside a destination, and what it watches.

use crate::guard::{Arms, Guard, GuardCommand, GuardError, LifePage, Secrets, SignOfLife, dismiss};
use crate::migrate::settings::TetherSettings;
use belay_checkpoint::outbox::OutputMode;
use belay_transport::Deadline;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

/// The page server's slot in the page of signs of life.
pub(super) const SERVER_SLOT: usize = 0;

/// Under `--output lease` a VMM of its own can be fenced; under `commit` a catch needs no proof, and the guest may wait to be taken over.
pub(super) fn arms(tether: &TetherSettings, vmm_is_apart: bool) -> Arms {
    match tether.output {
        OutputMode::Lease if vmm_is_apart => Arms::Fence { gate_bound: tether.lease.length },
        OutputMode::Lease | OutputMode::Commit => Arms::None,
    }
}

/// How long a guard that was told to go may take.
const GOING_BOUND: Duration = Duration::from_millis(200);

/// The guard beside this process, and what it watches.
pub(super) struct Warden {
    pub(super) guard: Guard,
    pub(super) page: Arc<LifePage>,
    /// Until it has stood down.
    life: Option<SignOfLife>,
    pub(super) secrets: Secrets,
    /// Its loss has been told.
    told: bool,
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
        Ok(Self { guard, page, life: Some(life), secrets, told: false })
    }

    /// Whether the guard has gone, once: what it would have told is then told by slower ways, until the next session brings another.
    pub(super) fn has_gone(&mut self) -> bool {
        let gone = !self.told && !self.guard.is_running();
        self.told |= gone;
        gone
    }

    /// An orderly end: the guard goes without a word.
    pub(super) fn stand_down(mut self, deadline: Deadline) {
        self.end(deadline);
    }

    fn end(&mut self, deadline: Deadline) {
        let Some(life) = self.life.take() else { return };
        dismiss(self.guard.hand_over());
        life.stand_down();
        let _ = self.guard.wait(deadline);
    }
}

impl Drop for Warden {
    /// A guest that never came leaves no thread, page or guard behind. A panic is a death, and is told as one.
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.end(Deadline::after(GOING_BOUND));
        }
    }
}
