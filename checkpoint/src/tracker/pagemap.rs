//! The PAGEMAP_SCAN ioctl on /proc/PID/pagemap (Linux 6.7; Documentation/admin-guide/mm/pagemap.rst).
//!
//! What counts as *written* is a page whose write protection is not there. The kernel lifts it at the first write (WP_ASYNC), so after
//! a scan that protected a page again, written means written since. A page that is in nobody's page table counts as written unless
//! a marker stands in its place: protecting a range leaves markers there, a zap of a protected page leaves one, and a zap of a
//! written page leaves none. So **the category asked for is "written" and nothing else**. Asking for "present" too would hide
//! the pages that the kernel reports for never having seen them, but also those that the guest wrote and that were zapped
//! after, whose bytes live on in the file.

use linux_raw_sys::general as raw;
use rustix::fd::AsFd;
use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};
use std::ffi::c_void;

/// A run of written pages: addresses `start..end` in the scanned address space.
pub(super) type PageRegion = raw::page_region;

const _: () = assert!(size_of::<raw::pm_scan_arg>() == 96);
const _: () = assert!(size_of::<raw::page_region>() == 24);

const SCAN: Opcode = opcode::read_write::<raw::pm_scan_arg>(b'f', 16);
/// Protect what matches again, and refuse ranges that are not registered for asynchronous write protection (EPERM): on those
/// nothing would ever be reported.
const PROTECT: u64 = (raw::PM_SCAN_WP_MATCHING | raw::PM_SCAN_CHECK_WPASYNC) as u64;

/// Whether the page at `start` is mapped. EPERM when it is, but not registered for asynchronous write protection; ENOTTY when the
/// kernel has no PAGEMAP_SCAN. Changes nothing.
///
/// An address space without a mapping is scanned with success and without a page, and a process that is being killed loses its
/// mappings before it can be seen to be dead. So a scan's answer counts only if its range is still mapped *after* it: the
/// kernel takes the mappings away last.
pub(super) fn is_mapped(pagemap: impl AsFd, start: u64, page_bytes: u64) -> Result<bool, Errno> {
    let mut found = [PageRegion { start: 0, end: 0, categories: 0 }];
    let flags = u64::from(raw::PM_SCAN_CHECK_WPASYNC);
    let (runs, _) = call(&pagemap, flags, raw::PAGE_IS_WPALLOWED, start, start + page_bytes, &mut found)?;
    Ok(runs > 0)
}

/// Protects every page of `start..end`, also those in no page table, so that the next scan reports what was written since.
pub(super) fn protect(pagemap: impl AsFd, start: u64, end: u64) -> Result<(), Errno> {
    let mut at = start;
    while at < end {
        let walked = call(&pagemap, PROTECT, raw::PAGE_IS_WRITTEN, at, end, &mut [])?.1;
        at = advance(at, walked, end)?;
    }
    Ok(())
}

/// Reports written pages of `start..end` into `found` and protects them again. How many runs it found, and how far it came: short
/// of `end` when `found` is full or the kernel broke off.
pub(super) fn scan(pagemap: impl AsFd, start: u64, end: u64, found: &mut [PageRegion]) -> Result<(usize, u64), Errno> {
    assert!(!found.is_empty(), "a scan needs room for what it finds");
    let (runs, walked) = call(&pagemap, PROTECT, raw::PAGE_IS_WRITTEN, start, end, found)?;
    Ok((runs, advance(start, walked, end)?))
}

/// A call that did not move would be made for ever.
fn advance(at: u64, walked: u64, end: u64) -> Result<u64, Errno> {
    if walked > at && walked <= end { Ok(walked) } else { Err(Errno::IO) }
}

/// One PAGEMAP_SCAN; gives the number of runs found.
struct Scan<'a>(&'a mut raw::pm_scan_arg);

// SAFETY: SCAN is the number made from pm_scan_arg, which is what as_ptr points at; it is mutating; the kernel's answer is a plain
// count.
unsafe impl Ioctl for Scan<'_> {
    type Output = usize;

    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        SCAN
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::from_mut(self.0).cast()
    }

    // SAFETY: the pointer is not used; the result is the ioctl's own return value.
    unsafe fn output_from_ptr(out: IoctlOutput, _: *mut c_void) -> rustix::io::Result<usize> {
        usize::try_from(out).map_err(|_| Errno::IO)
    }
}

fn call(
    pagemap: &impl AsFd,
    flags: u64,
    category: u32,
    start: u64,
    end: u64,
    found: &mut [PageRegion],
) -> Result<(usize, u64), Errno> {
    // Mask and return mask of exactly "written" take the kernel's short path through each page table.
    let mut argument = raw::pm_scan_arg {
        size: size_of::<raw::pm_scan_arg>() as u64,
        flags,
        start,
        end,
        walk_end: 0,
        vec: if found.is_empty() { 0 } else { found.as_mut_ptr() as u64 },
        vec_len: found.len() as u64,
        max_pages: 0,
        category_inverted: 0,
        category_mask: u64::from(category),
        category_anyof_mask: 0,
        return_mask: u64::from(category),
    };
    loop {
        // SAFETY: the kernel writes the argument and at most `vec_len` regions at `vec`, which `found` has room for and is
        // borrowed mutably for the call; `start..end` is only an address range to it.
        match unsafe { ioctl(pagemap, Scan(&mut argument)) } {
            Ok(runs) => return Ok((runs, argument.walk_end)),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}
