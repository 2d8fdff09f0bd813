//! Written pages, by PAGEMAP_SCAN ([`belay_transport::pagemap`]).
//!
//! What counts as *written* is a page whose write protection is not there. The kernel lifts it at the first write (WP_ASYNC), so after
//! a scan that protected a page again, written means written since. A page that is in nobody's page table counts as written unless
//! a marker stands in its place: protecting a range leaves markers there, a zap of a protected page leaves one, and a zap of a
//! written page leaves none. So **the category asked for is "written" and nothing else**. Asking for "present" too would hide
//! the pages that the kernel reports for never having seen them, but also those that the guest wrote and that were zapped
//! after, whose bytes live on in the file.

use belay_transport::pagemap::{self, NO_REGION, PAGE_IS_WPALLOWED, PAGE_IS_WRITTEN, Query};
use belay_transport::pagemap::{PM_SCAN_CHECK_WPASYNC, PM_SCAN_WP_MATCHING};
use rustix::fd::AsFd;
use rustix::io::Errno;

/// A run of written pages: addresses `start..end` in the scanned address space.
pub(super) type PageRegion = pagemap::PageRegion;

/// Protect what matches again, and refuse ranges that are not registered for asynchronous write protection (EPERM): on those
/// nothing would ever be reported.
const WRITTEN: Query =
    Query { flags: PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC, categories: PAGE_IS_WRITTEN, inverted: false };
const WRITTEN_LEFT: Query = Query { flags: PM_SCAN_CHECK_WPASYNC, ..WRITTEN };

/// What becomes of written pages that a scan reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Written {
    /// They stay writable, and the next scan reports them too.
    Left,
    /// They are protected. The kernel tells KVM of *everything* between start and end for that (an mmu notifier), and the guest pays with a
    /// fault of its second-level page tables for each page there that it touches next: so this is for ranges that were looked through before.
    Protected,
}

/// Whether the page at `start` is mapped. EPERM when it is, but not registered for asynchronous write protection; ENOTTY when the
/// kernel has no PAGEMAP_SCAN. Changes nothing.
///
/// An address space without a mapping is scanned with success and without a page, and a process that is being killed loses its
/// mappings before it can be seen to be dead. So a scan's answer counts only if its range is still mapped *after* it: the
/// kernel takes the mappings away last.
pub(super) fn is_mapped(pagemap: impl AsFd, start: u64, page_bytes: u64) -> Result<bool, Errno> {
    let query = Query { flags: PM_SCAN_CHECK_WPASYNC, categories: PAGE_IS_WPALLOWED, inverted: false };
    let (runs, _) = pagemap::scan(pagemap, query, start, start + page_bytes, &mut [NO_REGION])?;
    Ok(runs > 0)
}

/// Protects every page of `start..end`, also those in no page table, so that the next scan reports what was written since.
pub(super) fn protect(pagemap: impl AsFd, start: u64, end: u64) -> Result<(), Errno> {
    let mut at = start;
    while at < end {
        at = pagemap::scan(&pagemap, WRITTEN, at, end, &mut [])?.1;
    }
    Ok(())
}

/// Reports written pages of `start..end` into `found`. How many runs it found, and how far it came: short
/// of `end` when `found` is full or the kernel broke off.
pub(super) fn scan(
    pagemap: impl AsFd,
    written: Written,
    start: u64,
    end: u64,
    found: &mut [PageRegion],
) -> Result<(usize, u64), Errno> {
    assert!(!found.is_empty(), "a scan needs room for what it finds");
    let query = match written {
        Written::Left => WRITTEN_LEFT,
        Written::Protected => WRITTEN,
    };
    pagemap::scan(pagemap, query, start, end, found)
}
