//! What the tether's two threads and its owner know together.

use crate::epoch::{EpochObserver, EpochStats, TetherError, TetherStats};
use crate::guest::Epoch;
use belay_transport::Deadline;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

pub(in crate::epoch) struct Shared {
    pub(super) state: Mutex<State>,
    pub(super) changed: Condvar,
    pub(super) observer: Arc<dyn EpochObserver>,
}

pub(super) struct State {
    /// The epoch that is being taken, or the one below it when none is.
    pub begun: Epoch,
    /// Newest epoch whose guest has gone on, and newest that has committed.
    pub taken: Epoch,
    pub committed: Epoch,
    /// When that was reported.
    pub committed_at: Option<Instant>,
    /// This epoch is wanted at once, whatever the policy says.
    pub wanted: Epoch,
    pub stop: bool,
    pub ended: bool,
    pub failed: Option<Arc<TetherError>>,
    pub stats: TetherStats,
}

impl State {
    pub fn at(epoch: Epoch) -> Self {
        Self {
            begun: epoch,
            taken: epoch,
            committed: epoch,
            committed_at: None,
            wanted: epoch,
            stop: false,
            ended: false,
            failed: None,
            stats: TetherStats::default(),
        }
    }

    pub fn is_over(&self) -> bool {
        self.stop || self.failed.is_some()
    }
}

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        // Every change is a few assignments: a panic elsewhere leaves nothing half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes the first failure and wakes everybody.
    pub fn fail(&self, error: TetherError) {
        let error = Arc::new(error);
        let mut state = self.lock();
        let first = state.failed.is_none();
        if first {
            state.failed = Some(error.clone());
        }
        drop(state);
        self.changed.notify_all();
        if first {
            self.observer.failed(&error);
        }
    }

    pub fn committed(&self, epoch: Epoch, stats: &EpochStats) {
        let mut state = self.lock();
        state.committed = epoch;
        state.committed_at = Some(Instant::now());
        state.stats.record(stats);
        drop(state);
        self.changed.notify_all();
    }

    /// Waits until `until` says so, the tether has failed or ended, or `deadline` has passed; what `until` says then.
    pub(super) fn wait(&self, deadline: Deadline, until: impl Fn(&State) -> bool) -> bool {
        let over = |state: &mut State| until(state) || state.failed.is_some() || state.ended;
        let waited = self.changed.wait_timeout_while(self.lock(), deadline.left(), |state| !over(state));
        until(&waited.unwrap_or_else(PoisonError::into_inner).0)
    }
}
