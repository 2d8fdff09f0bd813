//! PAGEMAP_SCAN and nothing else.

use super::check;
use linux_raw_sys::general as raw;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

/// PAGEMAP_SCAN by one thread, which looks for written pages of its own address space and protects nothing.
pub struct Scan {
    pagemap: File,
    found: Vec<raw::page_region>,
}

impl Scan {
    pub fn new() -> io::Result<Self> {
        let found = vec![raw::page_region { start: 0, end: 0, categories: 0 }; 1 << 16];
        Ok(Self { pagemap: File::open("/proc/self/pagemap")?, found })
    }

    /// Looks through the `len` bytes at `address`: how long that took.
    pub fn look(&mut self, address: u64, len: u64) -> io::Result<Duration> {
        // _IOWR('f', 16, struct pm_scan_arg)
        const PAGEMAP_SCAN: u64 = 3 << 30 | (size_of::<raw::pm_scan_arg>() as u64) << 16 | (b'f' as u64) << 8 | 16;
        let (mut at, end) = (address, address + len);
        let start = Instant::now();
        while at < end {
            let written = u64::from(raw::PAGE_IS_WRITTEN);
            let mut argument = raw::pm_scan_arg {
                size: size_of::<raw::pm_scan_arg>() as u64,
                flags: 0,
                start: at,
                end,
                walk_end: 0,
                vec: self.found.as_mut_ptr() as u64,
                vec_len: self.found.len() as u64,
                max_pages: 0,
                category_inverted: 0,
                category_mask: written,
                category_anyof_mask: 0,
                return_mask: written,
            };
            let fd = self.pagemap.as_raw_fd();
            // SAFETY: the argument is the kernel's struct for this request, and `vec` has room for `vec_len` regions.
            check(unsafe { libc::ioctl(fd, PAGEMAP_SCAN, std::ptr::from_mut(&mut argument)) })?;
            if argument.walk_end <= at {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            at = argument.walk_end;
        }
        Ok(start.elapsed())
    }
}
