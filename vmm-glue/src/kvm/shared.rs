//! A bare guest with several hands on it: the role or its tether pauses and saves it, the witness stands it still.

use super::bare::BareGuest;
use belay_checkpoint::dirty::DirtySet;
use belay_checkpoint::guest::{DirtyTracker, Guest, GuestError, RamBlock, TrackerKind};
use belay_transport::Deadline;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Cheap to clone; each call takes the guest for as long as it lasts.
#[derive(Clone)]
pub struct SharedGuest {
    guest: Arc<Mutex<Box<dyn BareGuest>>>,
    /// The same for the guest's whole life, so that they can be lent out without the lock.
    blocks: Arc<[RamBlock]>,
}

impl SharedGuest {
    /// Shares `guest`.
    pub fn new(guest: Box<dyn BareGuest>) -> Self {
        let blocks = guest.memory().into();
        Self { guest: Arc::new(Mutex::new(guest)), blocks }
    }

    /// The guest itself. A panic of another thread that held it has stopped that thread and not the guest.
    pub fn lock(&self) -> MutexGuard<'_, Box<dyn BareGuest>> {
        self.guest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Steps each vCPU had done at its last PACE read; none if that cannot be told.
    pub fn steps(&self) -> Vec<u64> {
        self.lock().steps().unwrap_or_default()
    }
}

impl Guest for SharedGuest {
    fn pause(&mut self, deadline: Deadline) -> Result<(), GuestError> {
        self.lock().pause(deadline)
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.lock().resume()
    }

    fn save(&mut self, out: &mut Vec<u8>) -> Result<(), GuestError> {
        self.lock().save(out)
    }

    fn load(&mut self, state: &[u8]) -> Result<(), GuestError> {
        self.lock().load(state)
    }

    fn set_incarnation(&mut self, nonce: u64) -> Result<(), GuestError> {
        self.lock().set_incarnation(nonce)
    }

    fn memory(&self) -> &[RamBlock] {
        &self.blocks
    }

    fn tracker(&mut self, kind: TrackerKind) -> Result<Box<dyn DirtyTracker>, GuestError> {
        self.lock().tracker(kind)
    }

    fn device_writes(&mut self, into: &mut DirtySet) -> Result<(), GuestError> {
        self.lock().device_writes(into)
    }
}
