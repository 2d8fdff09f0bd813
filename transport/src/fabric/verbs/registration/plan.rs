//! Which memory regions to make for a list of populated extents: pure arithmetic, no device.
//!
//! The file is divided into *cells* of one size; a memory region never crosses a cell's border, so cells register in parallel
//! and a region is never longer than the device takes. Within a cell there is one region for each populated run: pinning a
//! hole would fill it. Only where that makes more regions than the budget are gaps between runs of one cell closed, the smallest
//! first, because every byte of a closed gap is a byte of memory the guest never asked for. (A gap across a border saves no
//! region, so it is never closed.) Where even one region a cell is too many, cells grow.

use super::extents::{aligned, between, end, normal, total};
use crate::region::Extent;

/// Smallest and largest cell, unless limits ask for another.
pub(super) const SMALLEST_CELL: u64 = 64 << 20;
pub(super) const LARGEST_CELL: u64 = 1 << 30;

/// What a plan must keep to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Length of the mapping.
    pub len: u64,
    /// Page size of the backing, in bytes.
    pub alignment: u64,
    /// Regions at most.
    pub max_regions: usize,
    /// Longest region the device takes.
    pub max_region_bytes: u64,
    /// Threads that will register: each should have several cells to take.
    pub threads: usize,
}

/// More memory than the device's regions can hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{needed} memory regions of at most {max_region_bytes} bytes are needed and {max_regions} can be had")]
pub struct TooManyRegions {
    pub needed: usize,
    pub max_regions: usize,
    pub max_region_bytes: u64,
}

/// The regions to make: in order, disjoint, each within one cell.
pub(super) fn plan(extents: &[Extent], limits: &Limits) -> Result<Vec<Extent>, TooManyRegions> {
    let extents = aligned(&normal(extents.to_vec()), limits.alignment, limits.len);
    // A cell holds whole pages of the backing; a device that takes less than one page takes nothing.
    let most = (limits.max_region_bytes - limits.max_region_bytes % limits.alignment).max(limits.alignment);
    let share = total(&extents) / (limits.threads.max(1) as u64 * 4);
    let mut cell =
        share.next_power_of_two().clamp(SMALLEST_CELL, LARGEST_CELL).next_multiple_of(limits.alignment).min(most);
    loop {
        let mut pieces = cut(&extents, cell);
        let excess = pieces.len().saturating_sub(limits.max_regions);
        if excess == 0 || close_gaps(&mut pieces, cell, excess) {
            return Ok(pieces);
        }
        if cell >= most || cell >= limits.len {
            let needed = cells(&pieces, cell);
            let (max_regions, max_region_bytes) = (limits.max_regions, limits.max_region_bytes);
            return Err(TooManyRegions { needed, max_regions, max_region_bytes });
        }
        cell = cell.saturating_mul(2).min(most);
    }
}

/// Extents cut at cell borders.
fn cut(extents: &[Extent], cell: u64) -> Vec<Extent> {
    let mut pieces = Vec::with_capacity(extents.len());
    for extent in extents {
        let mut at = extent.offset;
        while at < end(extent) {
            let border = (at / cell + 1).saturating_mul(cell).min(end(extent));
            pieces.push(between(at, border));
            at = border;
        }
    }
    pieces
}

/// Cells that hold anything: the fewest regions there can be.
fn cells(pieces: &[Extent], cell: u64) -> usize {
    let mut last = None;
    pieces.iter().filter(|piece| last.replace(piece.offset / cell) != Some(piece.offset / cell)).count()
}

/// Joins pieces of one cell across the `excess` smallest gaps. Whether there were as many.
fn close_gaps(pieces: &mut Vec<Extent>, cell: u64, excess: usize) -> bool {
    let mut gaps: Vec<(u64, usize)> = pieces
        .windows(2)
        .enumerate()
        .filter(|(_, pair)| pair[0].offset / cell == pair[1].offset / cell)
        .map(|(index, pair)| (pair[1].offset - end(&pair[0]), index + 1))
        .collect();
    if gaps.len() < excess {
        return false;
    }
    if excess < gaps.len() {
        gaps.select_nth_unstable(excess);
        gaps.truncate(excess);
    }
    let mut closed = vec![false; pieces.len()];
    for (_, index) in gaps {
        closed[index] = true;
    }
    let mut joined: Vec<Extent> = Vec::with_capacity(pieces.len() - excess);
    for (piece, closed) in pieces.iter().zip(closed) {
        match joined.last_mut().filter(|_| closed) {
            Some(last) => last.len = end(piece) - last.offset,
            None => joined.push(*piece),
        }
    }
    *pieces = joined;
    true
}

#[cfg(test)]
mod tests {
    use super::super::extents::tests::{PAGE, PAGES, any_extents, flags};
    use super::*;
    use proptest::prelude::*;

    fn limits(max_regions: usize, max_region_pages: u64) -> Limits {
        let (len, max_region_bytes) = (PAGES * PAGE, max_region_pages * PAGE);
        Limits { len, alignment: PAGE, max_regions, max_region_bytes, threads: 2 }
    }

    proptest! {
        #[test]
        fn a_plan_covers_every_extent_within_the_file_and_the_budget(
            extents in any_extents(),
            max_regions in 1..40_usize,
            max_region_pages in 1..120_u64,
            huge in any::<bool>(),
        ) {
            let mut limits = limits(max_regions, max_region_pages);
            if huge {
                limits.alignment = 8 * PAGE;
            }
            let most = (limits.max_region_bytes / limits.alignment).max(1) * limits.alignment;
            let runs = aligned(&normal(extents), limits.alignment, limits.len);
            match plan(&runs, &limits) {
                Err(error) => {
                    // True only if even one region for each cell in use is too many.
                    let mut used: Vec<u64> = cut(&runs, most).iter().map(|piece| piece.offset / most).collect();
                    used.dedup();
                    prop_assert!(used.len() > max_regions);
                    prop_assert_eq!(error.needed, used.len());
                }
                Ok(pieces) => {
                    prop_assert!(pieces.len() <= max_regions);
                    prop_assert!(pieces.iter().all(|piece| piece.len > 0 && piece.len <= most && end(piece) <= limits.len));
                    prop_assert!(pieces.iter().all(|piece| piece.offset % limits.alignment == 0));
                    prop_assert!(pieces.windows(2).all(|pair| end(&pair[0]) <= pair[1].offset), "sorted and disjoint");
                    let (covered, wanted) = (flags(&pieces), flags(&runs));
                    prop_assert!(covered.iter().zip(&wanted).all(|(covered, wanted)| *covered || !wanted));
                    if cut(&runs, most).len() <= max_regions {
                        prop_assert_eq!(covered, wanted, "no hole is touched while the budget lasts");
                    }
                }
            }
        }

        #[test]
        fn no_choice_of_gaps_fills_fewer_holes(extents in any_extents(), max_regions in 1..12_usize) {
            let limits = limits(max_regions, PAGES);
            let runs = normal(extents);
            // One cell holds it all here, so the least that can be filled is the sum of the smallest gaps.
            let mut gaps: Vec<u64> = runs.windows(2).map(|pair| pair[1].offset - end(&pair[0])).collect();
            gaps.sort_unstable();
            let least: u64 = gaps[..runs.len().saturating_sub(max_regions)].iter().sum();
            let pieces = plan(&runs, &limits).unwrap();
            prop_assert_eq!(total(&pieces) - total(&runs), least);
        }
    }

    #[test]
    fn a_large_guest_is_cut_into_cells_that_threads_share() {
        let gib = 1_u64 << 30;
        let whole = [Extent { offset: 0, len: 64 * gib }];
        let limits =
            Limits { len: 64 * gib, alignment: 4096, max_regions: 8192, max_region_bytes: u64::MAX, threads: 4 };
        let pieces = plan(&whole, &limits).unwrap();
        assert_eq!(pieces.len(), 64);
        assert!(pieces.iter().all(|piece| piece.len == gib && piece.offset % gib == 0));
        let small = plan(&[Extent { offset: 0, len: gib }], &Limits { len: gib, ..limits }).unwrap();
        assert_eq!((small.len(), small[0].len), (16, SMALLEST_CELL));
    }

    #[test]
    fn cells_grow_when_one_region_a_cell_is_too_many() {
        let gib = 1_u64 << 30;
        let limits =
            Limits { len: 64 * gib, alignment: 2 << 20, max_regions: 10, max_region_bytes: u64::MAX, threads: 4 };
        let pieces = plan(&[Extent { offset: 0, len: 64 * gib }], &limits).unwrap();
        assert_eq!((pieces.len(), pieces[0].len), (8, 8 * gib));
    }
}
