//! A dirty tracker that the bench may ask beside the tether.

use super::REGION;
use belay_checkpoint::dirty::DirtySet;
use belay_checkpoint::guest::{DirtyTracker, GuestError, TrackerKind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A tracker with two hands on it: what the bench harvests for itself is in the next epoch all the same.
#[derive(Clone)]
pub struct LentTracker(Arc<Mutex<Lent>>);

struct Lent {
    tracker: Box<dyn DirtyTracker>,
    taken: DirtySet,
}

impl LentTracker {
    pub fn new(tracker: Box<dyn DirtyTracker>, pages: u64) -> Self {
        Self(Arc::new(Mutex::new(Lent { tracker, taken: DirtySet::new([(REGION, pages)]) })))
    }

    fn lock(&self) -> MutexGuard<'_, Lent> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One harvest that is in the next epoch all the same: how long it took and what it found. Guest paused.
    pub fn scan(&self) -> Result<(Duration, u64), GuestError> {
        let Lent { tracker, taken } = &mut *self.lock();
        let began = Instant::now();
        tracker.harvest(taken)?;
        Ok((began.elapsed(), taken.len()))
    }
}

impl DirtyTracker for LentTracker {
    fn kind(&self) -> TrackerKind {
        self.lock().tracker.kind()
    }
    fn sees_device_writes(&self) -> bool {
        self.lock().tracker.sees_device_writes()
    }
    fn start(&mut self) -> Result<(), GuestError> {
        self.lock().tracker.start()
    }
    fn prepare(&mut self) -> Result<(), GuestError> {
        self.lock().tracker.prepare()
    }
    fn harvest(&mut self, into: &mut DirtySet) -> Result<(), GuestError> {
        let Lent { tracker, taken } = &mut *self.lock();
        if !taken.is_empty() {
            into.merge(taken);
            taken.clear();
        }
        tracker.harvest(into)
    }
    fn sift(&mut self, dirty: &mut DirtySet, discards: &DirtySet) -> Result<(), GuestError> {
        self.lock().tracker.sift(dirty, discards)
    }
    fn dirty_so_far(&mut self) -> Option<u64> {
        self.lock().tracker.dirty_so_far()
    }
}
