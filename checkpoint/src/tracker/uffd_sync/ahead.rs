//! What a harvest need not do in the pause: pages that were opened are protected again while the guest still runs, right before it is stopped.
//!
//! A page that the guest does not write any more before the pause is what it will be in the pause, and protected. One that it does write
//! again is opened again, and found by the harvest itself. So a pause pays for what was written in the last moment, not for the epoch.

use super::faults::{Found, Meanwhile, WriteFaults};
use crate::dirty::DirtySet;
use crate::guest::GuestError;
use crate::tracker::back_off::BackOff;

/// Protected again and not yet harvested.
pub(super) struct Ahead {
    pages: DirtySet,
    /// Of those, how many were opened again.
    again: u64,
    pub(super) back_off: BackOff,
}

impl Ahead {
    /// Nothing yet, in a set like `empty`.
    pub(super) fn new(empty: DirtySet) -> Self {
        Self { pages: empty, again: 0, back_off: BackOff::default() }
    }

    /// Pages it has.
    pub(super) fn len(&self) -> u64 {
        self.pages.len()
    }

    /// Protects what is open and adds it to `found`. The guest runs.
    pub(super) fn shut(&mut self, faults: &WriteFaults, found: &mut Vec<Found>) -> Result<(), GuestError> {
        let mut passes = self.back_off.passes();
        while passes.another(faults.opened()) {
            let outcome = faults.shut(Meanwhile::Runs, |one| {
                one.add_to(faults, &mut self.pages);
                found.push(one);
            });
            self.again += unite(faults, found);
            outcome?;
        }
        Ok(())
    }

    /// Gives what it has to the harvest, which has found `again` of its pages open once more.
    pub(super) fn give(&mut self, into: &mut DirtySet, again: u64) {
        into.merge(&self.pages);
        self.back_off.harvested(self.pages.len(), self.again + again);
        self.forget();
    }

    /// Has nothing any more.
    pub(super) fn forget(&mut self) {
        self.pages.clear();
        self.again = 0;
    }
}

/// Lists every chunk once, in order. Pages that were found more than once.
pub(super) fn unite(faults: &WriteFaults, found: &mut Vec<Found>) -> u64 {
    // What was found by one pass is in order already, which this sort makes use of.
    found.sort_by_key(|one| (one.region, one.chunk));
    let mut again = 0;
    found.dedup_by(|later, first| {
        let same = (later.region, later.chunk) == (first.region, first.chunk);
        if same {
            again += u64::from((later.open & first.open).count_ones()) * faults.pages_a_unit(first.region);
            first.open |= later.open;
            first.certain |= later.certain;
        }
        same
    });
    again
}
