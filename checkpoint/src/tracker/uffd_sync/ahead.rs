//! What a harvest need not do in the pause: pages that were opened are protected again while the guest still runs, right before it is stopped.
//!
//! A page that the guest does not write any more before the pause is what it will be in the pause, and protected. One that it does write
//! again is opened again, and found by the harvest itself. So a pause pays for what was written in the last moment, not for the epoch.
//!
//! What it costs is a write fault for each page that is written again: five to ten times what protecting it in the pause would have. Where too
//! many are, as with a guest that goes round in the same pages, it is left alone for one harvest, then for two, and so on.

use super::faults::{Found, Meanwhile, WriteFaults};
use crate::dirty::DirtySet;
use crate::guest::GuestError;

/// Below so many pages the pause is too short to be made shorter: a tenth of a millisecond.
const LEAST_PAGES: u64 = 256;
/// Passes over what was opened during the one before.
const PASSES: u32 = 3;
/// One page in so many may be written again, or it costs the guest more than it saves.
const WRITTEN_AGAIN: u64 = 8;
/// Most harvests that are left alone between two trials.
const MOST_SKIPPED: u32 = 32;

/// Protected again and not yet harvested.
pub(super) struct Ahead {
    pages: DirtySet,
    /// Of those, how many were opened again.
    again: u64,
    /// Harvests that are still to be left alone, and how many after the next trial that fails.
    pub(super) skip: u32,
    next_skip: u32,
    pub(super) least_pages: u64,
}

impl Ahead {
    /// Nothing yet, in a set like `empty`.
    pub(super) fn new(empty: DirtySet) -> Self {
        Self { pages: empty, again: 0, skip: 0, next_skip: 1, least_pages: LEAST_PAGES }
    }

    /// Pages it has.
    pub(super) fn len(&self) -> u64 {
        self.pages.len()
    }

    /// Protects what is open and adds it to `found`. The guest runs.
    pub(super) fn shut(&mut self, faults: &WriteFaults, found: &mut Vec<Found>) -> Result<(), GuestError> {
        if self.skip > 0 {
            return Ok(());
        }
        let mut before = u64::MAX;
        for _ in 0..PASSES {
            // It must become less each time, or the guest writes as fast as this protects.
            let opened = faults.opened();
            if opened < self.least_pages || opened > before / 2 {
                break;
            }
            before = opened;
            let outcome = faults.shut(Meanwhile::Runs, |one| {
                one.add_to(faults, &mut self.pages);
                found.push(one);
            });
            self.again += unite(faults, found);
            outcome?;
        }
        Ok(())
    }

    /// Gives what it has to the harvest, which has found `again` of its pages open once more, and learns whether to go on like this.
    pub(super) fn give(&mut self, into: &mut DirtySet, again: u64) {
        into.merge(&self.pages);
        self.again += again;
        if self.skip > 0 {
            self.skip -= 1;
        } else if self.again * WRITTEN_AGAIN > self.pages.len() {
            self.skip = self.next_skip;
            self.next_skip = (self.next_skip * 2).min(MOST_SKIPPED);
        } else if !self.pages.is_empty() {
            self.next_skip = 1;
        }
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
