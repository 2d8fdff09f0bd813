//! Allocates every frame of a region before it is used, in parallel and with progress.
//!
//! MADV_POPULATE_WRITE on a mapping rather than fallocate(2): fallocate holds the inode's lock, so threads do not help it,
//! and it leaves the zeroing of each page to the first touch, which is somebody's page fault. Populating zeroes now,
//! reports a full file system as an error (never SIGBUS), and leaves the mapping's page table filled, which is what an
//! alias that READs land in wants.

use super::{Mapping, RegionError, huge};
use crate::units::PageSize;
use rustix::io::Errno;
use rustix::mm::{Advice, madvise};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes populated by one system call: large enough to cost nothing, small enough for a smooth progress bar.
const STEP: usize = 16 << 20;

/// Populates all of `mapping` with `threads` threads; `progress` is told the bytes done so far, from any of them.
pub(super) fn populate(
    mapping: &Mapping,
    page_size: PageSize,
    threads: usize,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<(), RegionError> {
    let len = mapping.len();
    let (next, done) = (AtomicU64::new(0), AtomicU64::new(0));
    let failure: Mutex<Option<Errno>> = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..threads.clamp(1, len.div_ceil(STEP)) {
            scope.spawn(|| {
                loop {
                    let start = next.fetch_add(STEP as u64, Ordering::Relaxed) as usize;
                    if start >= len {
                        return;
                    }
                    let step = STEP.min(len - start);
                    match populate_step(mapping, start, step) {
                        Ok(()) => progress(done.fetch_add(step as u64, Ordering::Relaxed) + step as u64),
                        Err(errno) => {
                            next.store(len as u64, Ordering::Relaxed);
                            failure.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).get_or_insert(errno);
                            return;
                        }
                    }
                }
            });
        }
    });
    let failure = failure.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    let Some(errno) = failure else { return Ok(()) };
    let (done, len) = (done.into_inner(), len as u64);
    // The kernel answers EFAULT where a touch would have raised SIGBUS: the file system is full.
    match (errno, page_size) {
        (Errno::NOMEM | Errno::FAULT | Errno::NOSPC, PageSize::Huge) => {
            Err(huge::shortage((len - done) >> PageSize::Huge.shift()))
        }
        (Errno::NOMEM | Errno::FAULT | Errno::NOSPC, PageSize::Small) => {
            Err(RegionError::NoSpace { done, len, source: errno.into() })
        }
        _ => Err(RegionError::Io { doing: "populating guest RAM".into(), source: errno.into() }),
    }
}

fn populate_step(mapping: &Mapping, start: usize, len: usize) -> Result<(), Errno> {
    loop {
        let at = mapping.as_ptr().wrapping_add(start);
        // SAFETY: the range lies inside the mapping (start + len <= mapping.len()); populating changes no content.
        match unsafe { madvise(at.cast(), len, Advice::LinuxPopulateWrite) } {
            Err(Errno::INTR | Errno::AGAIN) => {}
            other => return other,
        }
    }
}
