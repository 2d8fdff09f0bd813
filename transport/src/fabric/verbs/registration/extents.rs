//! Arithmetic on sorted lists of extents: what was populated, what is pinned, what is left to do.
//!
//! Every list here is *normal*: sorted by offset, no extent empty, none touching or overlapping the next.

use crate::region::Extent;

/// One past the last byte.
pub(super) fn end(extent: &Extent) -> u64 {
    extent.offset + extent.len
}

/// The extent between two offsets.
pub(super) fn between(start: u64, end: u64) -> Extent {
    Extent { offset: start, len: end - start }
}

/// Bytes in all of them.
pub(super) fn total(extents: &[Extent]) -> u64 {
    extents.iter().map(|extent| extent.len).sum()
}

/// Any list, made normal.
pub(super) fn normal(mut extents: Vec<Extent>) -> Vec<Extent> {
    extents.retain(|extent| extent.len > 0);
    extents.sort_unstable_by_key(|extent| extent.offset);
    let mut joined: Vec<Extent> = Vec::with_capacity(extents.len());
    for extent in extents {
        match joined.last_mut() {
            Some(last) if extent.offset <= end(last) => last.len = last.len.max(end(&extent) - last.offset),
            _ => joined.push(extent),
        }
    }
    joined
}

/// Both ends moved outward to multiples of `alignment`, but not beyond `len`.
pub(super) fn aligned(extents: &[Extent], alignment: u64, len: u64) -> Vec<Extent> {
    let outward = |extent: &Extent| {
        let start = extent.offset - extent.offset % alignment;
        between(start, end(extent).next_multiple_of(alignment).min(len))
    };
    normal(extents.iter().map(outward).collect())
}

/// Bytes of either.
pub(super) fn union(a: &[Extent], b: &[Extent]) -> Vec<Extent> {
    normal([a, b].concat())
}

/// Bytes of both.
pub(super) fn intersection(a: &[Extent], b: &[Extent]) -> Vec<Extent> {
    let (mut a, mut b) = (a.iter().peekable(), b.iter().peekable());
    let mut both = Vec::new();
    while let (Some(one), Some(other)) = (a.peek(), b.peek()) {
        let (start, stop) = (one.offset.max(other.offset), end(one).min(end(other)));
        if start < stop {
            both.push(between(start, stop));
        }
        if end(one) <= end(other) {
            a.next()
        } else {
            b.next()
        };
    }
    both
}

/// Bytes of `a` that are not in `b`.
pub(super) fn difference(a: &[Extent], b: &[Extent]) -> Vec<Extent> {
    let mut left = Vec::new();
    let mut first = 0;
    for extent in a {
        let mut at = extent.offset;
        while b.get(first).is_some_and(|taken| end(taken) <= at) {
            first += 1;
        }
        for taken in b[first..].iter().take_while(|taken| taken.offset < end(extent)) {
            if taken.offset > at {
                left.push(between(at, taken.offset));
            }
            at = end(taken);
        }
        if at < end(extent) {
            left.push(between(at, end(extent)));
        }
    }
    left
}

/// For each extent of `needed`, the part of `whole` that holds it and lies in the same blocks of `block` bytes. `needed` lies
/// within `whole`.
pub(super) fn widened(needed: &[Extent], whole: &[Extent], block: u64) -> Vec<Extent> {
    let len = whole.last().map_or(0, end).next_multiple_of(block);
    let mut wide = Vec::with_capacity(needed.len());
    for extent in needed {
        let blocks = aligned(std::slice::from_ref(extent), block, len);
        let from = whole.partition_point(|one| end(one) <= extent.offset);
        if let (Some(holder), Some(blocks)) = (whole.get(from), blocks.first()) {
            wide.push(between(holder.offset.max(blocks.offset), end(holder).min(end(blocks))));
        }
    }
    normal(wide)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(in super::super) const PAGE: u64 = 4096;
    pub(in super::super) const PAGES: u64 = 96;

    /// One flag a page: the plainest model of a list of extents.
    pub(in super::super) fn flags(extents: &[Extent]) -> Vec<bool> {
        let mut flags = vec![false; PAGES as usize];
        for extent in extents {
            flags[(extent.offset / PAGE) as usize..(end(extent) / PAGE) as usize].fill(true);
        }
        flags
    }

    pub(in super::super) fn is_normal(extents: &[Extent]) -> bool {
        extents.iter().all(|extent| extent.len > 0) && extents.windows(2).all(|pair| end(&pair[0]) < pair[1].offset)
    }

    prop_compose! {
        /// Whole pages of a file of [`PAGES`], in any order, overlapping as they like.
        pub(in super::super) fn any_extents()(runs in prop::collection::vec((0..PAGES, 0..12_u64), 0..24)) -> Vec<Extent> {
            let extent = |(at, pages): (u64, u64)| Extent { offset: at * PAGE, len: pages.min(PAGES - at) * PAGE };
            runs.into_iter().map(extent).collect()
        }
    }

    proptest! {
        #[test]
        fn lists_of_extents_behave_as_sets_of_pages(a in any_extents(), b in any_extents()) {
            let (a, b) = (normal(a), normal(b));
            let page = |list: &[Extent], both: fn(bool, bool) -> bool| -> (Vec<bool>, Vec<bool>) {
                let model = flags(&a).into_iter().zip(flags(&b)).map(|(a, b)| both(a, b)).collect();
                (flags(list), model)
            };
            for (list, both) in [
                (union(&a, &b), (|a, b| a || b) as fn(bool, bool) -> bool),
                (intersection(&a, &b), |a, b| a && b),
                (difference(&a, &b), |a, b| a && !b),
            ] {
                let (seen, model) = page(&list, both);
                prop_assert_eq!(seen, model);
                prop_assert!(is_normal(&list));
            }
            prop_assert_eq!(total(&a), flags(&a).iter().filter(|flag| **flag).count() as u64 * PAGE);
        }

        #[test]
        fn widening_stays_within_the_populated_run_and_its_blocks(a in any_extents(), b in any_extents()) {
            let block = 8 * PAGE;
            let whole = normal(a);
            let needed = intersection(&whole, &normal(b));
            let wide = widened(&needed, &whole, block);
            prop_assert!(is_normal(&wide));
            let (whole_flags, needed_flags) = (flags(&whole), flags(&needed));
            // A page is taken along exactly if a needed page can be reached from it through populated pages of its own block.
            let reaches = |page: usize| {
                let in_block = |other: &usize| other / 8 == page / 8 && whole_flags[*other];
                let up = (page..PAGES as usize).take_while(in_block);
                let down = (0..=page).rev().take_while(in_block);
                up.chain(down).any(|other| needed_flags[other])
            };
            let model: Vec<bool> = (0..PAGES as usize).map(reaches).collect();
            prop_assert_eq!(flags(&wide), model);
        }
    }
}
