//! Registration of memory with an RDMA device: guest RAM in many regions, so that only what is populated is pinned; the rest in one.
//!
//! ```text
//!  prepare   extents ── plan ──> regions ── register (threads) ──> table: offset → address, key
//!  switch    extents again ─┐
//!            page table ────┴─ new and stale ── plan ── register ──> laid over the table; the peer is told
//!  end       queue pairs destroyed, then regions given back in the background (release)
//! ```
//! Rules of this room:
//! * The mapping given to [`register`] for an export is made for that and touched by nobody else: its page table is how holes
//!   punched under a registration are found (`stale`). It is writable, though the peer may only read: kernels up to 6.1 pin by
//!   writing (ib_umem_get), and a shared read-only mapping cannot be pinned there at all.
//! * A region once made stays until the end. What is found stale is registered anew and laid over it in the table.
//! * Occupancy is taken before anything here is called: pinning fills holes.

mod error;
mod extents;
mod memlock;
mod odp;
mod plan;
mod register;
mod release;
mod rights;
mod stale;
mod table;

pub use error::RegistrationError;
pub use memlock::{LockedMemory, MemlockTooLow};
pub(super) use odp::OnDemand;
pub use plan::TooManyRegions;
#[cfg(test)]
use register::populate;
pub(super) use release::Releasing;
pub(super) use rights::Access;
pub(super) use table::Chunk;
use table::Table;

use super::super::{Registering, RegistrationObserver};
use crate::region::{Extent, Mapping};
use crate::units::PageSize;
use extents::{aligned, difference, intersection, normal, total, union, widened};
use plan::Limits;
use register::register_each;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Memory regions of one mapping at most, whatever the device has: a table of them goes over the wire.
pub(super) const MAX_REGIONS: usize = 8192;
/// Of those, kept for what turns out at the switch to be new or stale.
const KEPT_FOR_LATER: usize = 8;
/// Regions made by one extension at most: each takes a device some 20 to 100 µs, and at the switch the guest waits.
const MAX_MORE: usize = 1024;
/// Chunks of a table at most. Beyond it, extents that the guest has given up are no longer cut out of it (the switch map has them as
/// zero pages, so nobody reads them).
const MAX_CHUNKS: usize = 4 * MAX_REGIONS;
/// What is new or stale is registered with its populated neighbours in the same block of so many bytes.
const BLOCK: u64 = 2 << 20;
/// Threads that register, unless there are fewer processors.
const MOST_THREADS: usize = 8;

/// One memory region. Deregistered when dropped.
pub(super) struct Region {
    pub lkey: u32,
    pub rkey: u32,
    /// Owns the `ibv_mr`, and keeps its protection domain and mapping.
    #[expect(dead_code, reason = "it is there to be dropped")]
    pub handle: Box<dyn Send>,
}

/// Whoever makes memory regions: a protection domain, or in tests a pretence of one.
pub(super) trait Registrar: Send + Sync {
    /// Registers `len` bytes at `offset` of `mapping`. From several threads at once.
    fn register(&self, mapping: &Arc<Mapping>, offset: u64, len: u64, access: Access) -> io::Result<Region>;

    /// Has the device learn `extents` of an on-demand `region` before they are read. Advice: an error costs speed only.
    fn announce(&self, region: &Region, mapping: &Mapping, extents: &[Extent]) -> io::Result<()>;
}

/// How memory is registered.
#[derive(Clone)]
pub(super) struct RegistrationOptions {
    /// Of the file behind the mapping.
    pub page_size: PageSize,
    /// Memory regions for this mapping at most.
    pub max_regions: usize,
    /// Longest region the device takes (`max_mr_size`).
    pub max_region_bytes: u64,
    pub threads: usize,
    /// Whether to pin nothing and let the device follow the page table.
    pub on_demand: OnDemand,
    /// Bytes this session has pinned before, for the progress that is told.
    pub pinned_before: u64,
    pub progress: Option<RegistrationObserver>,
}

impl RegistrationOptions {
    /// What a device with these limits (`struct ibv_device_attr`) allows. Half of its regions are left to others.
    pub(super) fn for_device(max_mr: u32, max_mr_size: u64, page_size: PageSize) -> Self {
        let threads = std::thread::available_parallelism().map_or(1, |count| count.get());
        Self {
            page_size,
            max_regions: (max_mr as usize / 2).clamp(1, MAX_REGIONS),
            max_region_bytes: max_mr_size,
            threads: threads.min(MOST_THREADS),
            on_demand: OnDemand::NONE,
            pinned_before: 0,
            progress: None,
        }
    }

    /// Tells who listens.
    fn tell(&self, progress: Registering) {
        if let Some(told) = &self.progress {
            told(progress);
        }
    }

    fn limits(&self, mapping: &Mapping, max_regions: usize) -> Limits {
        Limits {
            len: mapping.len() as u64,
            alignment: self.page_size.bytes() as u64,
            max_regions,
            max_region_bytes: self.max_region_bytes,
            threads: self.threads,
        }
    }
}

/// What registering cost, for the operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RegistrationReport {
    /// Bytes pinned; none where the device pages on demand.
    pub pinned_bytes: u64,
    pub regions: u64,
    pub took: Duration,
}

/// What an extension did; the peer needs the chunks anew if it changed any.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Extension {
    /// Whether any byte is to be had elsewhere now, or no more.
    pub changed: bool,
    /// Memory regions made.
    pub regions: u64,
    /// Bytes that had not been registered.
    pub new_bytes: u64,
    /// Bytes whose registration held a frame that is the file's no more.
    pub stale_bytes: u64,
    pub took: Duration,
}

/// A mapping's memory regions. Dropping it deregisters them and can take seconds: see [`Releasing`].
pub(super) struct Registered {
    table: Table,
    // Dropped before the mapping they pin.
    regions: Vec<Region>,
    /// Of an on-demand registration: the regions themselves, which cover all of the mapping.
    unpinned: Option<Table>,
    mapping: Arc<Mapping>,
    access: Access,
    report: RegistrationReport,
}

/// Registers `extents` of `mapping`, and no other byte unless the number of regions demands it.
pub(super) fn register(
    registrar: &dyn Registrar,
    mapping: &Arc<Mapping>,
    extents: &[Extent],
    access: Access,
    options: &RegistrationOptions,
) -> Result<Registered, RegistrationError> {
    let begun = Instant::now();
    let extents = checked(extents, mapping, options.page_size)?;
    let mut registered = Registered {
        table: Table::default(),
        regions: Vec::new(),
        unpinned: None,
        mapping: Arc::clone(mapping),
        access,
        report: RegistrationReport::default(),
    };
    let limits = options.limits(mapping, (options.max_regions - options.max_regions / KEPT_FOR_LATER).max(1));
    let pieces = plan::plan(&extents, &limits)?;
    if options.on_demand.is_wanted() && registered.unpin(registrar, options).is_ok() {
        registered.offer_unpinned(registrar, &pieces);
        options.tell(Registering {
            done_bytes: total(&pieces),
            total_bytes: total(&pieces),
            regions: registered.report.regions,
            pinned_bytes: options.pinned_before,
            stale_bytes: 0,
        });
    } else {
        registered.pin(registrar, &pieces, 0, options)?;
    }
    registered.report.took = begun.elapsed();
    Ok(registered)
}

/// Registers all of `mapping`.
pub(super) fn register_whole(
    registrar: &dyn Registrar,
    mapping: &Arc<Mapping>,
    access: Access,
    options: &RegistrationOptions,
) -> Result<Registered, RegistrationError> {
    let whole = Extent { offset: 0, len: mapping.len() as u64 };
    register(registrar, mapping, &[whole], access, options)
}

impl Registered {
    /// Where each byte is to be had, in order and disjoint.
    pub(super) fn chunks(&self) -> &[Chunk] {
        self.table.chunks()
    }

    /// What it has cost so far, extensions included.
    pub(super) fn report(&self) -> RegistrationReport {
        self.report
    }

    /// Makes the registration true again for `extents`, which hold data now: registers what is new among them, and anew what is
    /// pinned in frames that are the file's no more. With the guest stopped nothing can become stale after this.
    pub(super) fn extend(
        &mut self,
        registrar: &dyn Registrar,
        extents: &[Extent],
        options: &RegistrationOptions,
    ) -> Result<Extension, RegistrationError> {
        let begun = Instant::now();
        let extents = checked(extents, &self.mapping, options.page_size)?;
        let covered = self.table.extents();
        let mut extension = match &self.unpinned {
            Some(_) => self.extend_unpinned(registrar, &extents, &covered, options)?,
            None => self.extend_pinned(registrar, &extents, &covered, options)?,
        };
        extension.took = begun.elapsed();
        self.report.took += extension.took;
        Ok(extension)
    }

    fn extend_pinned(
        &mut self,
        registrar: &dyn Registrar,
        extents: &[Extent],
        covered: &[Extent],
        options: &RegistrationOptions,
    ) -> Result<Extension, RegistrationError> {
        let missing = stale::missing(&self.mapping, covered, options.threads);
        let missing = aligned(
            &missing.map_err(RegistrationError::PageTable)?,
            options.page_size.bytes() as u64,
            self.mapping.len() as u64,
        );
        let (stale, new) = (intersection(&missing, extents), difference(extents, covered));
        let mut gone = difference(&missing, extents);
        let wanted = widened(&union(&stale, &new), extents, BLOCK);
        let room = options.max_regions.saturating_sub(self.regions.len()).min(MAX_MORE);
        let pieces = plan::plan(&wanted, &options.limits(&self.mapping, room))?;
        if self.table.chunks().len() + gone.len() + 2 * pieces.len() > MAX_CHUNKS {
            gone.clear();
        }
        self.table.remove(&gone);
        self.pin(registrar, &pieces, total(&stale), options)?;
        let (changed, regions) = (!gone.is_empty() || !pieces.is_empty(), pieces.len() as u64);
        Ok(Extension { changed, regions, new_bytes: total(&new), stale_bytes: total(&stale), took: Duration::ZERO })
    }

    /// Pins `pieces`, of which so many bytes are stale, and lays them over the table.
    fn pin(
        &mut self,
        registrar: &dyn Registrar,
        pieces: &[Extent],
        stale_bytes: u64,
        options: &RegistrationOptions,
    ) -> Result<(), RegistrationError> {
        LockedMemory::now().check(total(pieces))?;
        let total_bytes = total(pieces);
        let before = options.pinned_before + self.report.pinned_bytes;
        let tell = |done_bytes, regions| {
            let pinned_bytes = before + done_bytes;
            options.tell(Registering { done_bytes, total_bytes, regions, pinned_bytes, stale_bytes });
        };
        let made = register_each(registrar, &self.mapping, pieces, self.access, (options.threads, &tell))?;
        let (chunks, regions): (Vec<_>, Vec<_>) = made.into_iter().unzip();
        self.table.overlay(&chunks);
        self.report.regions += regions.len() as u64;
        self.report.pinned_bytes += total(pieces);
        self.regions.extend(regions);
        Ok(())
    }

    /// Makes regions over all of the mapping that pin nothing.
    fn unpin(&mut self, registrar: &dyn Registrar, options: &RegistrationOptions) -> io::Result<()> {
        let (size, page) = (self.mapping.len() as u64, options.page_size.bytes() as u64);
        let step = (options.max_region_bytes.min(size) / page).max(1) * page;
        let (mut chunks, mut regions) = (Vec::new(), Vec::new());
        for offset in (0..size).step_by(step as usize) {
            let len = step.min(size - offset);
            let region = registrar.register(&self.mapping, offset, len, self.access.on_demand())?;
            let addr = self.mapping.address() + offset;
            chunks.push(Chunk { offset, len, addr, lkey: region.lkey, rkey: region.rkey });
            regions.push(region);
        }
        let mut table = Table::default();
        table.overlay(&chunks);
        (self.regions, self.unpinned) = (regions, Some(table));
        self.report.regions = self.regions.len() as u64;
        Ok(())
    }

    /// Puts `pieces` of the on-demand regions into the table, after telling the device of them.
    fn offer_unpinned(&mut self, registrar: &dyn Registrar, pieces: &[Extent]) {
        let Some(whole) = &self.unpinned else { return };
        let mut newer = Vec::new();
        for (chunk, region) in whole.chunks().iter().zip(&self.regions) {
            let bounds = [Extent { offset: chunk.offset, len: chunk.len }];
            let parts: Vec<Extent> = pieces.iter().flat_map(|piece| intersection(&[*piece], &bounds)).collect();
            if !parts.is_empty() {
                // Without it the device asks at the first READ of each page.
                let _ = registrar.announce(region, &self.mapping, &parts);
            }
            let part = |part: &Extent| Chunk {
                offset: part.offset,
                len: part.len,
                addr: chunk.addr + (part.offset - chunk.offset),
                ..*chunk
            };
            newer.extend(parts.iter().map(part));
        }
        self.table.overlay(&newer);
    }

    fn extend_unpinned(
        &mut self,
        registrar: &dyn Registrar,
        extents: &[Extent],
        covered: &[Extent],
        options: &RegistrationOptions,
    ) -> Result<Extension, RegistrationError> {
        let new = difference(extents, covered);
        let mut gone = difference(covered, extents);
        let pieces = plan::plan(&new, &options.limits(&self.mapping, MAX_MORE))?;
        if self.table.chunks().len() + gone.len() + 2 * pieces.len() > MAX_CHUNKS {
            gone.clear();
        }
        self.table.remove(&gone);
        self.offer_unpinned(registrar, &pieces);
        let changed = !gone.is_empty() || !pieces.is_empty();
        Ok(Extension { changed, regions: 0, new_bytes: total(&new), stale_bytes: 0, took: Duration::ZERO })
    }
}

/// Extents made normal and aligned, if they lie within the mapping.
fn checked(extents: &[Extent], mapping: &Mapping, page_size: PageSize) -> Result<Vec<Extent>, RegistrationError> {
    let size = mapping.len() as u64;
    for &Extent { offset, len } in extents {
        if offset.checked_add(len).is_none_or(|end| end > size) {
            return Err(RegistrationError::OutOfRange { offset, len, size });
        }
    }
    Ok(aligned(&normal(extents.to_vec()), page_size.bytes() as u64, size))
}

#[cfg(test)]
mod tests;
