//! The PAGEMAP_SCAN ioctl on /proc/PID/pagemap (Linux 6.7; Documentation/admin-guide/mm/pagemap.rst): the one place that makes it.

use linux_raw_sys::general as raw;
use rustix::fd::AsFd;
use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};
use std::ffi::c_void;

pub use raw::{
    PAGE_IS_PRESENT, PAGE_IS_SWAPPED, PAGE_IS_WPALLOWED, PAGE_IS_WRITTEN, PM_SCAN_CHECK_WPASYNC, PM_SCAN_WP_MATCHING,
};

/// A run of pages that matched: addresses `start..end` in the scanned address space.
pub type PageRegion = raw::page_region;

/// None yet.
pub const NO_REGION: PageRegion = PageRegion { start: 0, end: 0, categories: 0 };

const _: () = assert!(size_of::<raw::pm_scan_arg>() == 96);
const _: () = assert!(size_of::<raw::page_region>() == 24);

const SCAN: Opcode = opcode::read_write::<raw::pm_scan_arg>(b'f', 16);

/// Which pages are asked for: those that have all of `categories`, or with `inverted` none of them.
#[derive(Debug, Clone, Copy)]
pub struct Query {
    /// `PM_SCAN_*`.
    pub flags: u32,
    /// `PAGE_IS_*`. Mask and return mask of one category take the kernel's short path through each page table.
    pub categories: u32,
    pub inverted: bool,
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

/// Looks for what `query` asks in the addresses `start..end`, and puts it into `found` (empty where only the scan's own work is wanted).
/// Gives how many runs there are, and how far the kernel came: short of `end` when `found` is full or it broke off, never no further than
/// `start`, because whoever goes on from there would do so for ever (EIO).
pub fn scan(
    pagemap: impl AsFd,
    query: Query,
    start: u64,
    end: u64,
    found: &mut [PageRegion],
) -> Result<(usize, u64), Errno> {
    let categories = u64::from(query.categories);
    let mut argument = raw::pm_scan_arg {
        size: size_of::<raw::pm_scan_arg>() as u64,
        flags: u64::from(query.flags),
        start,
        end,
        walk_end: 0,
        vec: if found.is_empty() { 0 } else { found.as_mut_ptr() as u64 },
        vec_len: found.len() as u64,
        max_pages: 0,
        category_inverted: if query.inverted { categories } else { 0 },
        category_mask: categories,
        category_anyof_mask: 0,
        return_mask: categories,
    };
    loop {
        // SAFETY: the kernel writes the argument and at most `vec_len` regions at `vec`, which `found` has room for and is
        // borrowed mutably for the call; `start..end` is only an address range to it.
        match unsafe { ioctl(&pagemap, Scan(&mut argument)) } {
            Ok(runs) if argument.walk_end > start && argument.walk_end <= end => return Ok((runs, argument.walk_end)),
            Ok(_) => return Err(Errno::IO),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}
