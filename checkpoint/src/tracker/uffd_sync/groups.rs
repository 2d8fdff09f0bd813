//! How many pages a write opens. Pure arithmetic on words of 64 units, a unit being a frame of guest RAM.
//!
//! A write fault costs the guest about 10 µs; a page that was opened and not written costs a hash in the next pause (well below a
//! microsecond) and, the first time, its bytes on the link. So a group pays where its pages are written together.

/// Units in a chunk: what one word of bits stands for.
pub(super) const CHUNK: u64 = 64;
/// log2 of the largest group.
const LARGEST: u8 = 6;

/// How large groups are. A group is aligned to its size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Groups {
    /// All of one size.
    Fixed(GroupSize),
    /// Each chunk of 64 pages finds its own, by how much of its groups turned out to be written in its last epochs.
    Adaptive,
}

/// Pages in a group: a power of two from 1 to 64.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupSize {
    order: u8,
}

impl GroupSize {
    /// `None` for what is no power of two, or beyond 64.
    pub fn new(pages: u64) -> Option<Self> {
        let order = u8::try_from(pages.checked_ilog2()?).ok()?;
        (pages.is_power_of_two() && order <= LARGEST).then_some(Self { order })
    }

    pub(super) fn order(self) -> u8 {
        self.order
    }
}

/// The aligned group of 2^`order` units that holds unit `unit` of a chunk.
pub(super) fn group(order: u8, unit: u32) -> u64 {
    let size = 1_u32 << order;
    let ones = if size == 64 { u64::MAX } else { (1 << size) - 1 };
    ones << (unit & !(size - 1))
}

/// The order to open `unit` with, where the chunk's own is `order` and `open` are writable already: a writer that comes up from below
/// is met with groups that double, so that its first pass over a chunk costs seven faults and not 64.
pub(super) fn widened(order: u8, unit: u32, open: u64) -> u8 {
    let wider = |&by: &u8| {
        let size = 1_u32 << by;
        let below = group(by, unit ^ size);
        unit & size != 0 && open & below == below
    };
    (order..LARGEST).rev().find(wider).unwrap_or(order)
}

/// The order for a chunk's next epoch. `written` and `before`: what was written of it in the last two epochs that wrote there;
/// `hashed`: whose content is known by its hash, so that it is not sent unless it was written.
///
/// The fewest faults win, and among equals the smallest group. Of what is opened and was not written, pages whose hash is not known
/// may be a quarter of those written, or any number where the writer comes back to the same pages: then they are sent just once. And
/// with hash or without, at most three quarters of what is opened may be for nothing.
pub(super) fn order_for(written: u64, before: u64, hashed: u64) -> u8 {
    let total = written.count_ones() + before.count_ones();
    let same = (written & before).count_ones();
    let comes_back = before != 0 && same * 4 >= 3 * written.count_ones().max(before.count_ones());
    let mut best = (u32::MAX, 0);
    for order in 0..=LARGEST {
        let (now, then) = (opened(order, written), opened(order, before));
        let wasted = (now & !written).count_ones() + (then & !before).count_ones();
        let unknown = ((now | then) & !(written | before | hashed)).count_ones();
        let faults = (now.count_ones() + then.count_ones()) >> order;
        if wasted <= 3 * total && (comes_back || unknown * 4 <= total) && faults < best.0 {
            best = (faults, order);
        }
    }
    best.1
}

/// Everything that groups of this order open for these writes.
fn opened(order: u8, written: u64) -> u64 {
    let mut all = 0;
    let mut rest = written;
    while rest != 0 {
        let one = group(order, rest.trailing_zeros());
        all |= one;
        rest &= !one;
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ALL: u64 = u64::MAX;

    #[test]
    fn a_group_is_aligned_and_holds_its_unit() {
        assert_eq!(group(0, 63), 1 << 63);
        assert_eq!(group(2, 7), 0xf0);
        assert_eq!(group(6, 40), ALL);
        assert!([0, 3, 12, 65, 128].into_iter().all(|pages| GroupSize::new(pages).is_none()));
        assert_eq!(GroupSize::new(64).map(GroupSize::order), Some(6));
    }

    #[test]
    fn a_first_pass_over_a_chunk_takes_seven_faults() {
        let (mut open, mut faults) = (0, 0);
        for unit in 0..64 {
            if open >> unit & 1 == 0 {
                open |= group(widened(0, unit, open), unit);
                faults += 1;
            }
        }
        assert_eq!((open, faults), (ALL, 7));
    }

    #[test]
    fn what_is_written_whole_is_opened_whole_and_what_is_written_alone_alone() {
        assert_eq!(order_for(ALL, 0, 0), 6);
        assert_eq!(order_for(ALL, ALL, ALL), 6);
        for page in [1, 1 << 17, 1 << 63] {
            for hashed in [0, ALL] {
                assert_eq!(order_for(page, 0, hashed), 0);
                assert_eq!(order_for(page, page, hashed), 0, "a larger group saves no fault");
            }
        }
        assert_eq!(order_for(0xff00, 0xff00, 0), 3);
    }

    #[test]
    fn a_group_of_pages_without_a_hash_opens_few_that_are_not_written_unless_the_writer_comes_back() {
        let strided = 0x1111_1111_1111_1111;
        assert_eq!(order_for(strided, 0, 0), 0);
        assert_eq!(order_for(strided, strided, 0), 6, "the same again: the others are sent once and then known");
        assert_eq!(order_for(strided, strided << 1, 0), 0, "never the same: all of them would be sent");
        assert_eq!(order_for(strided, 0, ALL), 6);
        assert_eq!(order_for(0x0001_0001_0001_0001, 0, ALL), 0, "one in sixteen is too few even if all are known");
    }

    proptest! {
        #[test]
        fn no_group_is_chosen_that_faults_more_or_wastes_more_than_it_may(
            written in 1_u64.., before: u64, hashed: u64,
        ) {
            let order = order_for(written, before, hashed);
            prop_assert!(order <= LARGEST);
            let faults = |order| (opened(order, written).count_ones() + opened(order, before).count_ones()) >> order;
            prop_assert!(faults(order) <= faults(0));
            let wasted = (opened(order, written) & !written).count_ones() + (opened(order, before) & !before).count_ones();
            prop_assert!(wasted <= 3 * (written.count_ones() + before.count_ones()));
        }

        #[test]
        fn widening_opens_the_unit_and_nothing_below_it_that_was_shut(order in 0_u8..=6, unit in 0_u32..64, open: u64) {
            let wide = widened(order, unit, open);
            prop_assert!(wide >= order && group(wide, unit) >> unit & 1 == 1);
            let own = group(order, unit);
            let lower = (1_u64 << unit) - 1;
            prop_assert!(wide == order || group(wide, unit) & lower & !open & !own == 0 || unit & ((1 << wide) - 1) != 0);
        }
    }
}
