//! When a harvest is made ready ahead of its pause ([`crate::guest::DirtyTracker::prepare`]), and when that costs the guest more than it saves.
//!
//! What is protected again while the guest runs need not be in the pause. But each page that it writes again before the pause costs it another
//! fault: five to ten times what protecting the page in the pause would have. Where too many are, as with a guest that goes round in the
//! same pages, the next harvest is left alone, then the next two, and so on, until a trial shows that it has changed.

/// Below so many pages the pause is too short to be made shorter: a tenth of a millisecond.
const LEAST_PAGES: u64 = 256;
/// Passes over what was written during the one before.
const PASSES: u32 = 3;
/// One page in so many may be written again.
const WRITTEN_AGAIN: u64 = 8;
/// Most harvests that are left alone between two trials.
const MOST_SKIPPED: u32 = 32;

/// See the module.
#[derive(Debug, Clone)]
pub struct BackOff {
    /// Harvests that are still to be left alone, and how many after the next trial that fails.
    pub(super) skip: u32,
    next_skip: u32,
    pub(super) least_pages: u64,
}

impl Default for BackOff {
    fn default() -> Self {
        Self { skip: 0, next_skip: 1, least_pages: LEAST_PAGES }
    }
}

/// The passes ahead of one pause.
#[derive(Debug)]
pub struct Passes {
    left: u32,
    before: u64,
    least_pages: u64,
}

impl BackOff {
    /// Begins; none, while harvests are left alone.
    pub fn passes(&self) -> Passes {
        let left = if self.skip > 0 { 0 } else { PASSES };
        Passes { left, before: u64::MAX, least_pages: self.least_pages }
    }

    /// The harvest is done. Of `ahead` pages that were ready, `again` had been written again.
    pub fn harvested(&mut self, ahead: u64, again: u64) {
        if self.skip > 0 {
            self.skip -= 1;
        } else if again * WRITTEN_AGAIN > ahead {
            self.skip = self.next_skip;
            self.next_skip = (self.next_skip * 2).min(MOST_SKIPPED);
        } else if ahead > 0 {
            self.next_skip = 1;
        }
    }
}

impl Passes {
    /// Whether there may be another; where counting what was written is not for nothing.
    pub fn are_left(&self) -> bool {
        self.left > 0
    }

    /// Whether to make another pass, over `written` pages. They must become fewer each time, or the guest writes as fast as they are protected.
    pub fn another(&mut self, written: u64) -> bool {
        if self.left == 0 || written < self.least_pages || written > self.before / 2 {
            return false;
        }
        self.left -= 1;
        self.before = written;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passes(back_off: &BackOff, written: &[u64]) -> usize {
        let mut passes = back_off.passes();
        written.iter().take_while(|&&written| passes.another(written)).count()
    }

    #[test]
    fn passes_go_on_while_each_finds_half_of_the_one_before_and_no_more_than_three_times() {
        let back_off = BackOff::default();
        assert_eq!(passes(&back_off, &[100]), 0, "not worth it");
        assert_eq!(passes(&back_off, &[100_000, 60_000]), 1, "the guest writes as fast");
        assert_eq!(passes(&back_off, &[100_000, 20_000, 200]), 2);
        assert_eq!(passes(&back_off, &[100_000, 40_000, 10_000, 3_000]), 3);
    }

    #[test]
    fn a_guest_that_goes_round_in_the_same_pages_is_left_alone_for_longer_each_time_and_never_for_good() {
        let mut back_off = BackOff::default();
        let mut tried = Vec::new();
        for harvest in 0..200 {
            let ahead = if passes(&back_off, &[1000]) > 0 { 1000 } else { 0 };
            if ahead > 0 {
                tried.push(harvest);
            }
            back_off.harvested(ahead, ahead / 2);
        }
        assert_eq!(tried, [0, 2, 5, 10, 19, 36, 69, 102, 135, 168]);
        while passes(&back_off, &[1000]) == 0 {
            back_off.harvested(0, 0);
        }
        back_off.harvested(1000, 125);
        assert_eq!(passes(&back_off, &[1000]), 1);
        back_off.harvested(1000, 126);
        back_off.harvested(0, 0);
        assert_eq!(passes(&back_off, &[1000]), 1, "it was forgotten what had been");
    }
}
