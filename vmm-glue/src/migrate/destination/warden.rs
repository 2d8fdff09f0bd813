//! The guard beside a destination, and what it watches.

use crate::guard::{Guard, GuardCommand, GuardError, LifePage, Secrets, SignOfLife};
use belay_transport::Deadline;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

/// The page server's slot in the page of signs of life.
pub(super) const SERVER_SLOT: usize = 0;

/// The guard beside this process, and what it watches.
pub(super) struct Warden {
    pub(super) guard: Guard,
    pub(super) page: Arc<LifePage>,
    life: SignOfLife,
    pub(super) secrets: Secrets,
}

impl Warden {
    /// Starts the guard. Before guest RAM is mapped, so that starting a process costs nothing.
    pub(super) fn start(command: &GuardCommand, connection: OwnedFd, deadline: Deadline) -> Result<Self, GuardError> {
        let page = Arc::new(LifePage::new(2)?);
        let secrets = Secrets::random()?;
        let mut guard = Guard::spawn(command, &page, &secrets, &[connection.as_fd()])?;
        let life = SignOfLife::hold(Arc::clone(&page), SERVER_SLOT)?;
        guard.watch(SERVER_SLOT, deadline)?;
        Ok(Self { guard, page, life, secrets })
    }

    /// An orderly end: the guard goes without a word.
    pub(super) fn stand_down(mut self, deadline: Deadline) {
        self.life.stand_down();
        // A guard that watches a VMM too ends when that has ended; it holds nothing but itself.
        let _ = self.guard.wait(deadline);
    }
}
