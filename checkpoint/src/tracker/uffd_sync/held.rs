//! Copy-on-write staging: pages that stay what they were while their epoch is put together, with the guest running.
//!
//! They are write-protected already when they are harvested, so that holding them takes no more than a bit a page. A page that
//! the guest writes before it was taken is copied into the *pool* by whoever answers the fault ([`WriteFaults::answer`]), before its
//! protection is lifted. Rules of this room:
//! * One epoch at a time, and every page of it is taken before the next harvest: the tether's thread does both.
//! * A page that is not protected when it is held (its write fault was answered late, with the guest stopped already) goes into the
//!   pool at once; so does one in a chunk of which a page was ever given up, and one of a huge frame, whose parts the kernel does not protect.
//!   An epoch with more of those than the pool has room for is not held at all.
//! * A page that is given up while it is held is gone, and nothing may stand in for it: [`StageError::GivenUp`], before the record's trailer.
//!   Every hole is told of before it is filled ([`WriteFaults::given_up`]), and taking a page reads it through the alias, where the pull
//!   engine's guard meets a hole as anybody's fault would.
//! * Whoever lets go, for whatever reason, wakes all who wait. Locks: a chunk's, then the pool's; both only for copying a few pages.

use super::faults::{BOUND, Region, WriteFaults};
use super::groups::CHUNK;
use crate::dirty::DirtySet;
use crate::guest::GuestError;
use crate::staging::{HeldPages, StageError};
use belay_transport::region::{Mapping, RamFile};
use belay_transport::{Deadline, PAGE_SHIFT, PAGE_SIZE, PageIndex, PageSize, RegionId};
use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Room for pages of an epoch that the guest wrote before they were taken.
#[derive(Debug)]
pub(super) struct Pool {
    memory: Mapping,
    state: Mutex<PoolState>,
}

#[derive(Debug)]
struct PoolState {
    /// Places for a page each.
    free: Vec<u32>,
    /// Where a region's 4 KiB page is.
    at: HashMap<(usize, u64), u32>,
    /// Copied because the guest was about to write them.
    on_write: u64,
    lost: Option<(RegionId, PageIndex)>,
}

impl Pool {
    /// Of `pages` pages, allocated and touched.
    pub(super) fn new(pages: u32) -> Result<Self, GuestError> {
        let bytes = pages as usize * PAGE_SIZE;
        let failed = |source: std::io::Error| GuestError::Io {
            doing: format!("reserve {bytes} bytes for pages that are held"),
            source,
        };
        let file = RamFile::memfd("belay-held", bytes, PageSize::Small)
            .map_err(|error| failed(std::io::Error::other(error)))?;
        let memory = file.map().map_err(failed)?;
        file.preallocate_through(&memory, 1, &|_| ()).map_err(|error| failed(std::io::Error::other(error)))?;
        let state = PoolState {
            free: (0..pages).rev().collect(),
            at: HashMap::with_capacity(pages as usize),
            on_write: 0,
            lost: None,
        };
        Ok(Self { memory, state: Mutex::new(state) })
    }

    fn lock(&self) -> MutexGuard<'_, PoolState> {
        // Every change is an assignment or two: a panic elsewhere leaves nothing half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Copies the units `pending` of a chunk, or where there is no room for all of them unit `bit` alone; which were copied. The chunk
    /// is locked.
    pub(super) fn put_aside(&self, (index, region): (usize, &Region), chunk: u64, pending: u64, bit: u32) -> u64 {
        let mut copied = pending;
        let room = self.lock().free.len();
        if (pending.count_ones() as usize) > room {
            copied = pending & (1 << bit);
        }
        let mut rest = copied;
        while rest != 0 {
            let unit = rest.trailing_zeros();
            rest &= rest - 1;
            if !self.copy((index, region), chunk * CHUNK + u64::from(unit)) {
                copied &= !(1 << unit);
            }
        }
        self.lock().on_write += u64::from(copied.count_ones());
        copied
    }

    /// Copies one 4 KiB page; whether there was room.
    fn copy(&self, (index, region): (usize, &Region), page: u64) -> bool {
        let Some(place) = self.lock().free.pop() else { return false };
        self.memory.copy_from(place as usize * PAGE_SIZE, &region.alias, PageIndex(page).offset(), PAGE_SIZE);
        self.lock().at.insert((index, page), place);
        true
    }

    /// A page that was held where it is has become a hole.
    pub(super) fn lost(&self, region: RegionId, page: PageIndex) {
        self.lock().lost.get_or_insert((region, page));
    }

    fn clear(&self) {
        let mut state = self.lock();
        let PoolState { free, at, on_write, lost } = &mut *state;
        free.extend(at.drain().map(|(_, place)| place));
        (*on_write, *lost) = (0, None);
    }
}

/// The pages of one epoch.
pub(super) struct Held {
    faults: Arc<WriteFaults>,
    /// Where pages are held in place.
    chunks: Vec<(usize, u64)>,
    /// Not yet taken.
    left: u64,
}

impl Held {
    /// Holds the pages of `dirty`, with the guest stopped. `None`: there is no room for those that cannot stay where they are.
    pub(super) fn hold(faults: &Arc<WriteFaults>, dirty: &DirtySet) -> Result<Option<Self>, StageError> {
        let Some(pool) = faults.pool.get() else { return Ok(None) };
        // From here on its drop lets go of what is held.
        let mut held = Self { faults: Arc::clone(faults), chunks: Vec::new(), left: dirty.len() };
        for (index, region) in faults.regions.iter().enumerate() {
            let in_place = region.unit_shift == PAGE_SHIFT;
            for (chunk, bits) in dirty.words(region.id) {
                let mut aside = bits;
                if in_place && !region.given_up.is_set(chunk) {
                    let state = faults.state(index, chunk)?;
                    aside &= state.open;
                    let at = &region.chunks[chunk as usize];
                    debug_assert_eq!(at.pending.load(Ordering::Acquire), 0, "one epoch at a time");
                    at.pending.store(bits & !aside, Ordering::Release);
                    held.chunks.push((index, chunk));
                }
                while aside != 0 {
                    if !pool.copy((index, region), chunk * CHUNK + u64::from(aside.trailing_zeros())) {
                        return Ok(None);
                    }
                    aside &= aside - 1;
                }
            }
        }
        Ok(Some(held))
    }

    /// Takes pages of one chunk of a region whose frames are 4 KiB pages.
    fn take_in_chunk(
        &self,
        (index, chunk): (usize, u64),
        wanted: u64,
        slot: &Mapping,
        at: usize,
    ) -> Result<(), StageError> {
        let region = &self.faults.regions[index];
        let pending = &region.chunks[chunk as usize].pending;
        let first = wanted.trailing_zeros();
        let state = self.faults.state(index, chunk)?;
        let here = pending.load(Ordering::Acquire) & wanted;
        let (mut bit, end) = (first, first + wanted.count_ones());
        while bit < end {
            let run = (here >> bit).trailing_ones().min(end - bit);
            let to = at + (bit - first) as usize * PAGE_SIZE;
            let page = PageIndex(chunk * CHUNK + u64::from(bit));
            if run > 0 {
                slot.copy_from(to, &region.alias, page.offset(), run as usize * PAGE_SIZE);
            } else {
                self.take_from_pool((index, region.id), page, slot, to)?;
            }
            bit += run.max(1);
        }
        pending.fetch_and(!wanted, Ordering::AcqRel);
        drop(state);
        if region.waited_for.take(chunk) {
            self.faults.wake(index, chunk)?;
        }
        Ok(())
    }

    fn take_from_pool(
        &self,
        (index, region): (usize, RegionId),
        page: PageIndex,
        slot: &Mapping,
        to: usize,
    ) -> Result<(), StageError> {
        let pool = self.faults.pool.get().ok_or(StageError::NotHeld { region, page })?;
        let place = pool.lock().at.remove(&(index, page.0)).ok_or(StageError::NotHeld { region, page })?;
        slot.copy_from(to, &pool.memory, place as usize * PAGE_SIZE, PAGE_SIZE);
        pool.lock().free.push(place);
        Ok(())
    }
}

impl HeldPages for Held {
    fn take(
        &mut self,
        region: RegionId,
        first: PageIndex,
        count: u64,
        slot: &Mapping,
        at: usize,
    ) -> Result<(), StageError> {
        let (index, _) = self.faults.place(region, first).ok_or(StageError::NotHeld { region, page: first })?;
        let in_place = self.faults.regions[index].unit_shift == PAGE_SHIFT;
        let (mut page, end) = (first.0, first.0 + count);
        while page < end {
            let to = at + (page - first.0) as usize * PAGE_SIZE;
            if in_place {
                let (chunk, bit) = (page / CHUNK, page % CHUNK);
                let run = (CHUNK - bit).min(end - page);
                self.take_in_chunk((index, chunk), (u64::MAX >> (64 - run)) << bit, slot, to)?;
                page += run;
            } else {
                self.take_from_pool((index, region), PageIndex(page), slot, to)?;
                page += 1;
            }
        }
        self.left = self.left.saturating_sub(count);
        Ok(())
    }

    fn end(self: Box<Self>) -> Result<u64, StageError> {
        if self.left > 0 {
            return Err(StageError::NotTaken { left: self.left });
        }
        let Some(pool) = self.faults.pool.get() else { return Ok(0) };
        let state = pool.lock();
        match state.lost {
            Some((region, page)) => Err(StageError::GivenUp { region, page }),
            None => Ok(state.on_write),
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        for &(index, chunk) in &self.chunks {
            let region = &self.faults.regions[index];
            // Whoever answers a fault has it for a few copies at most. Without the lock too nobody may be left waiting.
            let state = region.lock(chunk, Deadline::after(BOUND));
            region.chunks[chunk as usize].pending.store(0, Ordering::Release);
            drop(state);
            if region.waited_for.take(chunk) {
                // A VMM that is gone has nobody who waits.
                let _ = self.faults.wake(index, chunk);
            }
        }
        if let Some(pool) = self.faults.pool.get() {
            pool.clear();
        }
    }
}
