//! Makes memory regions: several at a time, with progress, all or none.

use super::error::RegistrationError;
use super::rights::Access;
use super::table::Chunk;
use super::{Region, Registrar};
use crate::region::{Extent, Mapping};
use rustix::io::Errno;
use rustix::mm::{Advice, madvise};
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// One memory region for each of `regions` (disjoint, in order), and the chunk it is. `tell` hears the bytes and regions done.
pub(super) fn register_each(
    registrar: &dyn Registrar,
    mapping: &Arc<Mapping>,
    regions: &[Extent],
    access: Access,
    (threads, tell): (usize, &(dyn Fn(u64, u64) + Sync)),
) -> Result<Vec<(Chunk, Region)>, RegistrationError> {
    let next = AtomicUsize::new(0);
    let made = Mutex::new(Made { regions: regions.iter().map(|_| None).collect(), bytes: 0, count: 0, failure: None });
    let work = || {
        while let Some((index, extent)) = take(&next, regions) {
            let outcome = register_one(registrar, mapping, extent, access);
            let mut made = made.lock().unwrap_or_else(PoisonError::into_inner);
            match outcome {
                Ok(one) => {
                    made.regions[index] = Some(one);
                    made.bytes += extent.len;
                    made.count += 1;
                    // Under the lock, so that it is told in order.
                    tell(made.bytes, made.count);
                }
                Err(error) => {
                    made.failure.get_or_insert(error);
                    // Nobody begins another.
                    next.store(regions.len(), Ordering::Relaxed);
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for index in 1..threads.min(regions.len()) {
            let thread = std::thread::Builder::new().name(format!("belay-pin-{index}"));
            if thread.spawn_scoped(scope, work).is_err() {
                // Those there are do it all.
                break;
            }
        }
        work();
    });
    let made = made.into_inner().unwrap_or_else(PoisonError::into_inner);
    match made.failure {
        // What was made is undone with `made`.
        Some(failure) => Err(failure),
        None => Ok(made.regions.into_iter().flatten().collect()),
    }
}

/// What the threads have made so far; regions in the order of their extents.
struct Made {
    regions: Vec<Option<(Chunk, Region)>>,
    bytes: u64,
    count: u64,
    failure: Option<RegistrationError>,
}

fn take<'a>(next: &AtomicUsize, regions: &'a [Extent]) -> Option<(usize, &'a Extent)> {
    let index = next.fetch_add(1, Ordering::Relaxed);
    regions.get(index).map(|extent| (index, extent))
}

fn register_one(
    registrar: &dyn Registrar,
    mapping: &Arc<Mapping>,
    extent: &Extent,
    access: Access,
) -> Result<(Chunk, Region), RegistrationError> {
    let Extent { offset, len } = *extent;
    populate(mapping, extent).map_err(|source| RegistrationError::Populate { offset, len, source })?;
    let region = registrar
        .register(mapping, offset, len, access)
        .map_err(|source| RegistrationError::register(extent, source))?;
    let addr = mapping.address() + offset;
    Ok((Chunk { offset, len, addr, lkey: region.lkey, rkey: region.rkey }, region))
}

/// Fills the page table of a part of `mapping` by *writing* faults, which map no neighbour along (see [`super::stale`]). Pinning would
/// fill it too, page by page, by faults of its own choice. Content does not change; holes become zero pages.
pub(super) fn populate(mapping: &Mapping, extent: &Extent) -> io::Result<()> {
    if !mapping.is_writable() {
        return Ok(());
    }
    let at = mapping.as_ptr().wrapping_add(extent.offset as usize);
    loop {
        // SAFETY: the range lies inside the mapping (the caller has checked its extents); populating changes no content.
        match unsafe { madvise(at.cast(), extent.len as usize, Advice::LinuxPopulateWrite) } {
            Err(Errno::INTR | Errno::AGAIN) => {}
            // Linux before 5.14 does not know it. There pinning always faults by writing.
            Err(Errno::INVAL) => return Ok(()),
            other => return Ok(other?),
        }
    }
}
