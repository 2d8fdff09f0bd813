//! Which frames the guest gave up since the last harvest: a bit a frame, so bounded by the guest's size and never full.

use super::plan::Region;
use crate::units::{FrameIndex, PAGE_SHIFT, PageIndex, RegionId};
use std::sync::atomic::{AtomicU64, Ordering};

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

impl DiscardSet {
    pub(super) fn new(regions: &[Region]) -> Self {
        let bits = |region: &Region| Bits {
            id: region.plan.id,
            pages_shift: region.shift() - PAGE_SHIFT,
            words: (0..region.frames.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
        };
        Self { regions: regions.iter().map(bits).collect() }
    }

    #[inline]
    pub(super) fn record(&self, region: usize, frame: FrameIndex) {
        self.regions[region].words[(frame.0 / 64) as usize].fetch_or(1 << (frame.0 % 64), Ordering::AcqRel);
    }

    /// Takes all out, as 4 KiB pages.
    pub(super) fn take(&self, f: &mut dyn FnMut(RegionId, PageIndex)) {
        for region in &self.regions {
            for (index, word) in region.words.iter().enumerate() {
                if word.load(Ordering::Acquire) == 0 {
                    continue;
                }
                let mut bits = word.swap(0, Ordering::AcqRel);
                while bits != 0 {
                    let frame = index as u64 * 64 + u64::from(bits.trailing_zeros());
                    bits &= bits - 1;
                    let first = frame << region.pages_shift;
                    (first..first + (1 << region.pages_shift)).for_each(|page| f(region.id, PageIndex(page)));
                }
            }
        }
    }
}
