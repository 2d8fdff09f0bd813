//! Which frames the guest gave up since the last harvest: two bits a frame, so bounded by the guest's size and never full.
//!
//! A fault on a frame that was shown before may be an old one, read late: another thread's fault on the same hole has been answered since, and the guest
//! may have written there. Before the kernel is asked, the two cannot be told apart; after it, the guest may already have seen the zeroes. So such a
//! frame is *suspected* first, which a harvest answers by looking at what it holds, and settled when the kernel has said whether there was a hole.

use super::plan::Region;
use crate::units::{FrameIndex, PAGE_SHIFT, PageIndex, RegionId};
use std::sync::atomic::{AtomicU64, Ordering};

/// A frame's two bits.
const SUSPECTED: u64 = 1;
const GIVEN_UP: u64 = 2;
const FRAMES_A_WORD: u64 = 32;
/// The lower bit of every frame of a word.
const EACH: u64 = u64::MAX / 3;

/// A page that was given up, or may have been.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Discard {
    pub region: RegionId,
    pub page: PageIndex,
    /// It reads as zero unless it was written since. Otherwise what it holds has to be looked at, with the guest stopped.
    pub certain: bool,
}

#[derive(Debug)]
pub(super) struct DiscardSet {
    regions: Vec<Bits>,
}

#[derive(Debug)]
struct Bits {
    id: RegionId,
    /// log2 of the 4 KiB pages in a frame.
    pages_shift: u32,
    words: Vec<AtomicU64>,
}

impl Bits {
    fn new(id: RegionId, pages_shift: u32, frames: u64) -> Self {
        Self { id, pages_shift, words: (0..frames.div_ceil(FRAMES_A_WORD)).map(|_| AtomicU64::new(0)).collect() }
    }

    fn word(&self, frame: FrameIndex) -> (&AtomicU64, u64) {
        (&self.words[(frame.0 / FRAMES_A_WORD) as usize], frame.0 % FRAMES_A_WORD * 2)
    }
}

impl DiscardSet {
    pub(super) fn new(regions: &[Region]) -> Self {
        let bits = |region: &Region| Bits::new(region.plan.id, region.shift() - PAGE_SHIFT, region.frames);
        Self { regions: regions.iter().map(bits).collect() }
    }

    /// The frame was a hole, and nobody has been shown another one since.
    #[inline]
    pub(super) fn record(&self, region: usize, frame: FrameIndex) {
        let (word, at) = self.regions[region].word(frame);
        word.fetch_or(GIVEN_UP << at, Ordering::AcqRel);
    }

    /// The frame may be a hole, and is about to be filled if it is one.
    #[inline]
    pub(super) fn suspect(&self, region: usize, frame: FrameIndex) {
        let (word, at) = self.regions[region].word(frame);
        word.fetch_or(SUSPECTED << at, Ordering::AcqRel);
    }

    /// Whether a frame that was suspected `was_hole` is known. A harvest that came between the two has looked at what it held, and nothing is left to say.
    pub(super) fn settle(&self, region: usize, frame: FrameIndex, was_hole: bool) {
        let (word, at) = self.regions[region].word(frame);
        let _ = word.fetch_update(Ordering::AcqRel, Ordering::Acquire, |bits| {
            let suspected = bits & (SUSPECTED << at) != 0;
            let settled = bits & !(SUSPECTED << at) | if was_hole { GIVEN_UP << at } else { 0 };
            suspected.then_some(settled)
        });
    }

    /// Takes all out, as 4 KiB pages.
    pub(super) fn take(&self, f: &mut dyn FnMut(Discard)) {
        for region in &self.regions {
            for (index, word) in region.words.iter().enumerate() {
                if word.load(Ordering::Acquire) == 0 {
                    continue;
                }
                let bits = word.swap(0, Ordering::AcqRel);
                let mut any = (bits | bits >> 1) & EACH;
                while any != 0 {
                    let at = any.trailing_zeros();
                    any &= any - 1;
                    let certain = bits >> at & SUSPECTED == 0;
                    let first = (index as u64 * FRAMES_A_WORD + u64::from(at / 2)) << region.pages_shift;
                    let pages = first..first + (1 << region.pages_shift);
                    pages.for_each(|page| f(Discard { region: region.id, page: PageIndex(page), certain }));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REGION: RegionId = RegionId(3);

    fn set() -> DiscardSet {
        DiscardSet { regions: vec![Bits::new(REGION, 0, 100)] }
    }

    fn taken(set: &DiscardSet) -> Vec<(u64, bool)> {
        let mut all = Vec::new();
        set.take(&mut |discard| {
            assert_eq!(discard.region, REGION);
            all.push((discard.page.0, discard.certain));
        });
        all
    }

    #[test]
    fn every_frame_has_bits_of_its_own_and_is_taken_once() {
        let set = set();
        for frame in [0, 31, 32, 63, 99] {
            set.record(0, FrameIndex(frame));
        }
        set.suspect(0, FrameIndex(1));
        set.suspect(0, FrameIndex(31));
        let all = [(0, true), (1, false), (31, false), (32, true), (63, true), (99, true)];
        assert_eq!(taken(&set), all);
        assert_eq!(taken(&set), []);
    }

    #[test]
    fn a_suspicion_is_certain_once_it_is_settled_and_nothing_when_there_was_no_hole() {
        let set = set();
        for (frame, was_hole) in [(4, true), (5, false)] {
            set.suspect(0, FrameIndex(frame));
            set.settle(0, FrameIndex(frame), was_hole);
        }
        set.record(0, FrameIndex(6));
        set.suspect(0, FrameIndex(6));
        set.settle(0, FrameIndex(6), false);
        assert_eq!(taken(&set), [(4, true), (6, true)]);
    }

    #[test]
    fn what_a_harvest_has_looked_at_is_not_told_of_again_when_it_is_settled() {
        let set = set();
        set.suspect(0, FrameIndex(7));
        assert_eq!(taken(&set), [(7, false)]);
        // Since then the guest may have written there, in an epoch that has been harvested too.
        set.settle(0, FrameIndex(7), true);
        assert_eq!(taken(&set), []);
    }

    #[test]
    fn a_huge_frame_is_all_of_its_pages() {
        let set = DiscardSet { regions: vec![Bits::new(REGION, 9, 4)] };
        set.suspect(0, FrameIndex(2));
        let all = taken(&set);
        assert_eq!((all.len(), all[0], all[511]), (512, (1024, false), (1535, false)));
    }
}
