//! The harvest rule: which pages an epoch holds.

use super::Arrivals;
use crate::dirty::DirtySet;
use crate::guest::{DirtyTracker, Guest, GuestError};
use crate::mutation::{Mutation, mutated};

/// Fills `dirty` and `discards` (both emptied first) with what changed since the last harvest: pages the tracker saw written *and*
/// that have landed, pages that user-space devices wrote, and pages that were discarded and not written since. Guest paused (P8).
///
/// A tracker may report pages that have not landed (a first read counts as a write to some); nobody can have written those,
/// and what lies behind them is not the guest's.
pub fn harvest(
    guest: &mut dyn Guest,
    tracker: &mut dyn DirtyTracker,
    arrivals: &mut dyn Arrivals,
    dirty: &mut DirtySet,
    discards: &mut DirtySet,
) -> Result<(), GuestError> {
    dirty.clear();
    discards.clear();
    tracker.harvest(dirty)?;
    dirty.retain(|region, page| arrivals.landed(region, page) || mutated(Mutation::InFlightIsLanded));
    if !tracker.sees_device_writes() {
        guest.device_writes(dirty)?;
    }
    arrivals.take_discards(discards, dirty);
    if mutated(Mutation::DiscardSkipped) {
        discards.clear();
    }
    discards.retain(|region, page| !dirty.contains(region, page));
    // After this a page can be in neither: it was given up or opened, and holds what the source has.
    tracker.sift(dirty, discards)
}
