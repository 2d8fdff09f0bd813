//! The side of synchronous write protection that answers faults, and its state: which groups are open.
//!
//! Rules of this room:
//! * A group is *marked open before its protection is lifted*, and *protected before it is marked shut*; a chunk's lock keeps the two
//!   apart. So no page is ever writable without being marked.
//! * Whoever answers a fault never waits for the lock. A chunk that is being harvested is let be, and the writer woken: it
//!   faults again. The thread that harvests waits for a fault to be answered, with a bound: one system call.
//! * A page is shown protected, always (`Install::Protected`). One that is shown *again* may have lost what told it from a clean one,
//!   and counts as written.
//! * A page that is held ([`super::held`]) is copied aside before its protection is lifted.

use super::groups::{CHUNK, Groups, group, widened};
use super::held::Pool;
use crate::dirty::DirtySet;
use crate::guest::{GuestError, RamBlock};
use belay_transport::pull::ShardRange;
use belay_transport::region::Mapping;
use belay_transport::uffd::{Stop, Uffd, UffdError};
use belay_transport::{Deadline, PAGE_SHIFT, PAGE_SIZE, PageIndex, RegionId};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};
use std::time::Duration;

/// Longest that a harvest waits for one fault to be answered, or for an address space that is changing.
pub(super) const BOUND: Duration = Duration::from_secs(5);
/// Chunks that are locked at once while a run of them is protected: with the guest stopped, and while it runs, when whoever writes in one of
/// them has to come again until the run is done.
const RUN_CHUNKS: usize = 64;
const RUN_CHUNKS_MEANWHILE: usize = 4;
/// Shut units between two open ones that are protected along with them: a system call more costs as much as some dozens of them, because
/// every CPU that runs one of the VMM's threads then has to forget what it knew.
const GAP: u64 = 32;
/// From so many touched chunks on, other threads protect a share of them: the guest's own are idle in a pause, and the kernel walks page tables
/// for each as long as for the first. Below, starting a thread costs as much as it saves.
const PARALLEL_CHUNKS: u64 = 256;
const MOST_THREADS: usize = 8;

/// What is known of 64 units. The size of all of them is accounted for: a byte a page.
#[derive(Debug)]
pub(super) struct Chunk {
    state: Mutex<State>,
    /// Shown again since the last harvest.
    shown: AtomicU64,
    /// Held where they are: what they hold is still to be taken. Changed under the lock.
    pub(super) pending: AtomicU64,
}

const _: () = assert!(size_of::<Chunk>() <= CHUNK as usize);

/// Bits are units of the chunk.
#[derive(Debug, Clone, Copy)]
pub(super) struct State {
    /// Writable, and to be taken for written.
    pub(super) open: u64,
    /// Of those, the ones that were opened by themselves: written for certain.
    alone: u64,
    /// What was written in the last epoch that wrote here.
    pub(super) before: u64,
    /// Whose content is known.
    pub(super) hashed: u64,
    /// log2 of the group.
    pub(super) order: u8,
}

#[derive(Debug)]
pub(super) struct Region {
    pub(super) id: RegionId,
    pub(super) alias: Arc<Mapping>,
    /// Address in the VMM.
    start: u64,
    pub(super) unit_shift: u32,
    units: u64,
    pub(super) chunks: Box<[Chunk]>,
    /// A bit a chunk: something is open in it, or was shown again.
    touched: ChunkBits,
    /// A page of it was given up since tracking began.
    pub(super) given_up: ChunkBits,
    /// Somebody waits there until a page that is held has been taken. Set under its lock.
    pub(super) waited_for: ChunkBits,
}

/// A bit a chunk.
#[derive(Debug)]
pub(super) struct ChunkBits(Box<[AtomicU64]>);

impl ChunkBits {
    fn new(chunks: u64) -> Self {
        Self(std::iter::repeat_with(AtomicU64::default).take(chunks.div_ceil(64) as usize).collect())
    }

    pub(super) fn set(&self, chunk: u64) {
        self.0[(chunk / 64) as usize].fetch_or(1 << (chunk % 64), Ordering::AcqRel);
    }

    pub(super) fn is_set(&self, chunk: u64) -> bool {
        self.0[(chunk / 64) as usize].load(Ordering::Acquire) >> (chunk % 64) & 1 == 1
    }

    /// Words with about the same number of bits set each, in order: one share where there are few, one a thread where there are many, none of
    /// nothing.
    fn shares(&self, threads: usize) -> Vec<Range<usize>> {
        let set = |word: &AtomicU64| u64::from(word.load(Ordering::Acquire).count_ones());
        let all: u64 = self.0.iter().map(set).sum();
        let share = if all < PARALLEL_CHUNKS { all } else { all.div_ceil(threads as u64) };
        let (mut shares, mut first, mut taken) = (Vec::with_capacity(threads), 0, 0);
        for (at, word) in self.0.iter().enumerate() {
            taken += set(word);
            if taken >= share && taken > 0 {
                shares.push(first..at + 1);
                (first, taken) = (at + 1, 0);
            }
        }
        match shares.last_mut() {
            Some(last) if taken == 0 => last.end = self.0.len(),
            _ if taken > 0 => shares.push(first..self.0.len()),
            _ => {}
        }
        shares
    }

    /// Clears it; whether it was set.
    pub(super) fn take(&self, chunk: u64) -> bool {
        // Seldom set: most who ask need not write.
        self.is_set(chunk)
            && self.0[(chunk / 64) as usize].fetch_and(!(1 << (chunk % 64)), Ordering::AcqRel) >> (chunk % 64) & 1 == 1
    }
}

/// Units of a region that one userfaultfd watches.
#[derive(Debug)]
struct Area {
    uffd: Uffd,
    region: usize,
    units: Range<u64>,
}

/// What the guest does while pages are protected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Meanwhile {
    /// Its processors are idle: other threads may have them.
    Stands,
    Runs,
}

impl Meanwhile {
    fn run_chunks(self) -> usize {
        match self {
            Self::Stands => RUN_CHUNKS,
            Self::Runs => RUN_CHUNKS_MEANWHILE,
        }
    }
}

/// What a harvest found in one chunk.
#[derive(Debug, Clone, Copy)]
pub(super) struct Found {
    pub region: usize,
    pub chunk: u64,
    pub open: u64,
    /// Of those, what was certainly written, or has to be taken for it.
    pub certain: u64,
}

impl Found {
    /// Adds its pages to a set.
    pub(super) fn add_to(&self, faults: &WriteFaults, set: &mut DirtySet) {
        let mut open = self.open;
        while open != 0 {
            let first = open.trailing_zeros();
            let count = (open >> first).trailing_ones();
            open &= !(ones(count) << first);
            let (id, pages) = faults.pages(self.region, self.chunk * CHUNK + u64::from(first));
            set.insert_run(id, PageIndex(pages.start), u64::from(count) * (pages.end - pages.start));
        }
    }
}

/// Answers write faults on guest RAM. Shared between the threads that serve its other faults and the tracker.
#[derive(Debug)]
pub struct WriteFaults {
    groups: Groups,
    pub(super) regions: Vec<Region>,
    areas: Vec<Area>,
    /// Where pages that are held go when they are about to be written.
    pub(super) pool: OnceLock<Pool>,
    answered: AtomicU64,
    /// Pages opened since the last harvest.
    opened: AtomicU64,
    /// That a large harvest is shared out to.
    pub(super) threads: usize,
}

impl WriteFaults {
    /// For guest RAM `blocks`, whose frames are watched by the userfaultfds in `watched` (each opened with [`super::SYNC_FEATURES`]
    /// and registered for write-protect faults).
    pub fn new(blocks: &[RamBlock], watched: &[(Uffd, Vec<ShardRange>)], groups: Groups) -> Result<Self, GuestError> {
        let order = match groups {
            Groups::Fixed(size) => size.order(),
            Groups::Adaptive => 0,
        };
        let regions: Vec<Region> = blocks.iter().map(|block| Region::new(block, order)).collect();
        let mut areas = Vec::new();
        for (uffd, ranges) in watched {
            for range in ranges {
                let region = regions.iter().position(|region| region.id == range.region);
                let region = region.filter(|&at| range.frames.end <= regions[at].units);
                let region = region.ok_or_else(|| {
                    GuestError::BadState(format!("frames {:?} of {} are none of guest RAM", range.frames, range.region))
                })?;
                let uffd = uffd.try_clone().map_err(io("duplicate the userfaultfd"))?;
                areas.push(Area { uffd, region, units: range.frames.clone() });
            }
        }
        let (pool, answered, opened) = (OnceLock::new(), AtomicU64::new(0), AtomicU64::new(0));
        let threads = std::thread::available_parallelism().map_or(1, |cores| cores.get().min(MOST_THREADS));
        Ok(Self { groups, regions, areas, pool, answered, opened, threads })
    }

    pub(super) fn groups(&self) -> Groups {
        self.groups
    }

    /// Write faults answered so far.
    pub fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    /// 4 KiB pages opened since the last harvest.
    pub fn opened(&self) -> u64 {
        self.opened.load(Ordering::Relaxed)
    }

    /// Answers a write to protected `page`: its group is open from now on, and whoever waits goes on. False when the page is none
    /// of ours, or its VMM is gone, or the kernel refuses: then the writer still waits.
    pub fn answer(&self, region: RegionId, page: PageIndex) -> bool {
        let Some((region_at, region)) = self.find(region) else { return false };
        let unit = page.0 >> (region.unit_shift - PAGE_SHIFT);
        let area = self.areas.iter().find(|area| area.region == region_at && area.units.contains(&unit));
        let Some(area) = area else { return false };
        let (chunk, bit) = (unit / CHUNK, (unit % CHUNK) as u32);
        let held = &region.chunks[chunk as usize].pending;
        let mut state = match region.chunks[chunk as usize].state.try_lock() {
            Ok(state) => state,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => {
                return area.uffd.wake(region.address(unit), 1 << region.unit_shift).is_ok();
            }
        };
        let order = match self.groups {
            Groups::Adaptive if region.unit_shift == PAGE_SHIFT => widened(state.order, bit, state.open),
            _ => state.order,
        };
        let mut units = group(order, bit) & within(&area.units, chunk);
        let pending = units & held.load(Ordering::Acquire);
        if pending != 0 {
            let room = self.pool.get().map_or(0, |pool| pool.put_aside((region_at, region), chunk, pending, bit));
            let left = held.fetch_and(!room, Ordering::AcqRel) & pending & !room;
            if left >> bit & 1 == 1 {
                // No room (P7): it goes on when the page has been taken, which does not wait for anything the guest does.
                region.waited_for.set(chunk);
                return true;
            }
            if left != 0 {
                units = 1 << bit;
            }
        }
        let new = units & !state.open;
        if units.count_ones() == 1 {
            state.alone |= units;
        }
        state.open |= units;
        region.touch(chunk);
        let first = chunk * CHUNK + u64::from(units.trailing_zeros());
        let len = u64::from(units.count_ones()) << region.unit_shift;
        self.answered.fetch_add(1, Ordering::Relaxed);
        self.opened.fetch_add(u64::from(new.count_ones()) << (region.unit_shift - PAGE_SHIFT), Ordering::Relaxed);
        let lifted = area.uffd.writeprotect(region.address(first), len, false);
        drop(state);
        match lifted {
            Ok(Stop::Done) => true,
            // It comes again, when the events that hold this up have been read.
            Ok(Stop::EventsPending) => area.uffd.wake(region.address(unit), 1 << region.unit_shift).is_ok(),
            Ok(Stop::Gone | Stop::NoFrame) | Err(_) => false,
        }
    }

    /// A page that had been shown is about to be shown again, protected.
    pub fn shown_again(&self, region: RegionId, page: PageIndex) {
        let Some((_, region)) = self.find(region) else { return };
        let unit = page.0 >> (region.unit_shift - PAGE_SHIFT);
        region.chunks[(unit / CHUNK) as usize].shown.fetch_or(1 << (unit % CHUNK), Ordering::AcqRel);
        region.touch(unit / CHUNK);
    }

    /// A page that had landed is a hole, and is about to be filled with zeroes. If it is held, what it held is lost; and from now on
    /// nothing near it is held where it is. Waits for nothing: whoever takes a page may be waiting for this very hole to be filled.
    pub fn given_up(&self, region: RegionId, page: PageIndex) {
        let Some((_, region)) = self.find(region) else { return };
        let unit = page.0 >> (region.unit_shift - PAGE_SHIFT);
        let chunk = unit / CHUNK;
        region.given_up.set(chunk);
        let pending = region.chunks[chunk as usize].pending.load(Ordering::Acquire);
        if let Some(pool) = self.pool.get().filter(|_| pending >> (unit % CHUNK) & 1 == 1) {
            pool.lost(region.id, page);
        }
    }

    /// Shuts all of guest RAM and forgets what was open. Guest paused.
    pub(super) fn shut_all(&self) -> Result<(), GuestError> {
        for (index, region) in self.regions.iter().enumerate() {
            let mut chunk = 0;
            while chunk < region.chunks.len() as u64 {
                let end = (chunk + RUN_CHUNKS as u64).min(region.chunks.len() as u64);
                let deadline = Deadline::after(BOUND);
                let locked: Result<Vec<_>, _> = (chunk..end).map(|chunk| region.lock(chunk, deadline)).collect();
                let mut locked = locked?;
                self.protect(index, chunk * CHUNK..(end * CHUNK).min(region.units), deadline)?;
                for (state, at) in locked.iter_mut().zip(chunk..) {
                    (state.open, state.alone, state.before, state.hashed) = (0, 0, 0, 0);
                    region.chunks[at as usize].shown.store(0, Ordering::Release);
                    region.given_up.take(at);
                }
                chunk = end;
            }
        }
        self.opened.store(0, Ordering::Relaxed);
        Ok(())
    }

    /// Gives what is open to `each`, in order, and shuts it again. After an error what was not shut is still open,
    /// and found by the next one. Where the guest runs, what it opens meanwhile is found by this one or the next.
    pub(super) fn shut(&self, meanwhile: Meanwhile, mut each: impl FnMut(Found)) -> Result<(), GuestError> {
        self.opened.store(0, Ordering::Relaxed);
        for index in 0..self.regions.len() {
            if let Err(error) = self.shut_region(index, meanwhile, &mut each) {
                // Which of them were not reached is not worth knowing: the next harvest looks at all.
                self.regions.iter().for_each(Region::touch_all);
                return Err(error);
            }
        }
        Ok(())
    }

    fn shut_region(&self, index: usize, meanwhile: Meanwhile, each: &mut impl FnMut(Found)) -> Result<(), GuestError> {
        let region = &self.regions[index];
        let threads = if meanwhile == Meanwhile::Stands { self.threads } else { 1 };
        let shares = region.touched.shares(threads);
        let Some((own, others)) = shares.split_first() else { return Ok(()) };
        if others.is_empty() {
            return self.shut_words((index, own.clone()), meanwhile, each);
        }
        let shut = |words: &Range<usize>| {
            let mut found = Vec::with_capacity(words.len() * 64);
            let outcome = self.shut_words((index, words.clone()), meanwhile, &mut |one| found.push(one));
            (found, outcome)
        };
        std::thread::scope(|scope| {
            let others: Vec<_> = others.iter().map(|words| scope.spawn(|| shut(words))).collect();
            let mut outcome = self.shut_words((index, own.clone()), meanwhile, each);
            for other in others {
                let (found, ended) = other.join().expect("protecting pages does not panic");
                // What was shut is told of, whatever became of the rest.
                found.into_iter().for_each(&mut *each);
                outcome = outcome.and(ended);
            }
            outcome
        })
    }

    /// Shuts what is open in these words of touched chunks.
    fn shut_words(
        &self,
        (index, words): (usize, Range<usize>),
        meanwhile: Meanwhile,
        each: &mut impl FnMut(Found),
    ) -> Result<(), GuestError> {
        let region = &self.regions[index];
        let run_chunks = meanwhile.run_chunks();
        let mut run = Run { locked: Vec::with_capacity(run_chunks), units: 0..0 };
        for word in words {
            let mut bits = region.touched.0[word].swap(0, Ordering::AcqRel);
            while bits != 0 {
                let chunk = word as u64 * 64 + u64::from(bits.trailing_zeros());
                bits &= bits - 1;
                if run.locked.len() == run_chunks || run.units.end + GAP < chunk * CHUNK {
                    self.end_run(index, &mut run, each)?;
                }
                let state = region.lock(chunk, Deadline::after(BOUND))?;
                let mut open = state.open;
                run.locked.push((chunk, state));
                while open != 0 {
                    let first = open.trailing_zeros();
                    let count = (open >> first).trailing_ones();
                    open &= !(ones(count) << first);
                    let first = chunk * CHUNK + u64::from(first);
                    if run.units.is_empty() {
                        run.units = first..first;
                    } else if run.units.end + GAP < first {
                        self.protect(index, run.units.clone(), Deadline::after(BOUND))?;
                        run.units.start = first;
                    }
                    run.units.end = first + u64::from(count);
                }
            }
        }
        self.end_run(index, &mut run, each)
    }

    /// Protects what is left of a run and tells of its chunks.
    fn end_run(&self, index: usize, run: &mut Run<'_>, each: &mut impl FnMut(Found)) -> Result<(), GuestError> {
        let region = &self.regions[index];
        if !run.units.is_empty() {
            self.protect(index, run.units.clone(), Deadline::after(BOUND))?;
        }
        for (chunk, mut state) in run.locked.drain(..) {
            let shown = region.chunks[chunk as usize].shown.swap(0, Ordering::AcqRel);
            let (open, certain) = (state.open | shown, state.alone | shown);
            (state.open, state.alone) = (0, 0);
            if open != 0 {
                each(Found { region: index, chunk, open, certain });
            }
        }
        run.units = 0..0;
        Ok(())
    }

    /// Write-protects units, whichever userfaultfds watch them.
    fn protect(&self, region: usize, units: Range<u64>, deadline: Deadline) -> Result<(), GuestError> {
        for area in self.areas.iter().filter(|area| area.region == region) {
            let (start, end) = (units.start.max(area.units.start), units.end.min(area.units.end));
            if start >= end {
                continue;
            }
            let region = &self.regions[region];
            let (at, len) = (region.address(start), (end - start) << region.unit_shift);
            loop {
                match area.uffd.writeprotect(at, len, true).map_err(io("write-protect guest RAM"))? {
                    Stop::Done => break,
                    Stop::Gone | Stop::NoFrame => {
                        return Err(GuestError::VmmGone(format!("{} is not mapped any more", region.id)));
                    }
                    Stop::EventsPending if deadline.expired() => {
                        return Err(GuestError::BadState(format!(
                            "{}'s address space has been changing for {BOUND:?}, so it cannot be write-protected",
                            region.id
                        )));
                    }
                    Stop::EventsPending => std::thread::yield_now(),
                }
            }
        }
        Ok(())
    }

    /// Has whoever waits in a chunk come again.
    pub(super) fn wake(&self, region: usize, chunk: u64) -> Result<(), GuestError> {
        for area in self.areas.iter().filter(|area| area.region == region) {
            let (start, end) = (area.units.start.max(chunk * CHUNK), area.units.end.min((chunk + 1) * CHUNK));
            if start < end {
                let region = &self.regions[region];
                let (at, len) = (region.address(start), (end - start) << region.unit_shift);
                area.uffd.wake(at, len).map_err(io("wake who waits in guest RAM"))?;
            }
        }
        Ok(())
    }

    /// What is known of a chunk, for whoever compares contents.
    pub(super) fn state(&self, region: usize, chunk: u64) -> Result<MutexGuard<'_, State>, GuestError> {
        self.regions[region].lock(chunk, Deadline::after(BOUND))
    }

    /// 4 KiB pages of a unit of a region.
    pub(super) fn pages_a_unit(&self, region: usize) -> u64 {
        1 << (self.regions[region].unit_shift - PAGE_SHIFT)
    }

    /// The 4 KiB pages of a unit of a region, and the region.
    pub(super) fn pages(&self, region: usize, unit: u64) -> (RegionId, Range<u64>) {
        let region = &self.regions[region];
        let shift = region.unit_shift - PAGE_SHIFT;
        (region.id, unit << shift..(unit + 1) << shift)
    }

    /// The region of a page and its unit there.
    pub(super) fn place(&self, id: RegionId, page: PageIndex) -> Option<(usize, u64)> {
        let (index, region) = self.find(id)?;
        Some((index, page.0 >> (region.unit_shift - PAGE_SHIFT)))
    }

    fn find(&self, id: RegionId) -> Option<(usize, &Region)> {
        self.regions.iter().enumerate().find(|(_, region)| region.id == id)
    }
}

/// Chunks that are locked, and the units among them that are still to be protected.
struct Run<'a> {
    locked: Vec<(u64, MutexGuard<'a, State>)>,
    units: Range<u64>,
}

impl Region {
    fn new(block: &RamBlock, order: u8) -> Self {
        let (len, unit_shift) = (block.alias.len() as u64, block.page_size.shift());
        assert!(len > 0 && len.is_multiple_of(1 << unit_shift), "{} has {len} bytes, not whole pages", block.id);
        let units = len >> unit_shift;
        let chunks = units.div_ceil(CHUNK);
        // A huge page is a group by itself: the kernel does not protect parts of one.
        let order = if unit_shift == PAGE_SHIFT { order } else { 0 };
        let state = State { open: 0, alone: 0, before: 0, hashed: 0, order };
        let chunk = || Chunk { state: Mutex::new(state), shown: AtomicU64::new(0), pending: AtomicU64::new(0) };
        Self {
            id: block.id,
            alias: Arc::clone(&block.alias),
            start: block.vmm_address,
            unit_shift,
            units,
            chunks: std::iter::repeat_with(chunk).take(chunks as usize).collect(),
            touched: ChunkBits::new(chunks),
            given_up: ChunkBits::new(chunks),
            waited_for: ChunkBits::new(chunks),
        }
    }

    fn address(&self, unit: u64) -> u64 {
        self.start + (unit << self.unit_shift)
    }

    fn touch(&self, chunk: u64) {
        self.touched.set(chunk);
    }

    fn touch_all(&self) {
        for (word, touched) in self.touched.0.iter().enumerate() {
            touched.fetch_or(within(&(0..self.chunks.len() as u64), word as u64), Ordering::AcqRel);
        }
    }

    /// A thread that died with the lock left nothing half done that a harvest could not take.
    pub(super) fn lock(&self, chunk: u64, deadline: Deadline) -> Result<MutexGuard<'_, State>, GuestError> {
        loop {
            match self.chunks[chunk as usize].state.try_lock() {
                Ok(state) => return Ok(state),
                Err(TryLockError::Poisoned(poisoned)) => return Ok(PoisonError::into_inner(poisoned)),
                Err(TryLockError::WouldBlock) if deadline.expired() => {
                    return Err(GuestError::BadState(format!(
                        "a write fault in pages {}+{} of {} has been being answered for {BOUND:?}",
                        (chunk * CHUNK) << (self.unit_shift - PAGE_SHIFT),
                        (CHUNK << self.unit_shift) / PAGE_SIZE as u64,
                        self.id
                    )));
                }
                Err(TryLockError::WouldBlock) => std::thread::yield_now(),
            }
        }
    }
}

fn ones(count: u32) -> u64 {
    if count >= 64 { u64::MAX } else { (1 << count) - 1 }
}

/// The units of `range` that are in a chunk.
fn within(range: &Range<u64>, chunk: u64) -> u64 {
    let bits = |units: u64| ones(units.saturating_sub(chunk * CHUNK).min(CHUNK) as u32);
    bits(range.end) & !bits(range.start)
}

fn io(doing: &'static str) -> impl FnOnce(UffdError) -> GuestError {
    move |error| GuestError::Io { doing: doing.into(), source: std::io::Error::other(error) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn touched_chunks_are_shared_out_whole_and_evenly_and_few_of_them_not_at_all() {
        let bits = ChunkBits::new(10_000);
        assert_eq!(bits.shares(4), []);
        (0..PARALLEL_CHUNKS - 1).for_each(|chunk| bits.set(chunk * 39));
        let few = bits.shares(4);
        assert_eq!((few.len(), few[0].clone()), (1, 0..10_000_usize.div_ceil(64)));
        (0..10_000).step_by(7).for_each(|chunk| bits.set(chunk));
        for threads in [1, 2, 3, 8] {
            let shares = bits.shares(threads);
            assert!(shares.len() <= threads && shares[0].start == 0, "{shares:?}");
            assert_eq!(shares.last().map(|last| last.end), Some(10_000_usize.div_ceil(64)));
            assert!(shares.windows(2).all(|pair| pair[0].end == pair[1].start), "{shares:?}");
            let sizes = shares.iter().map(|words| {
                (words.start as u64 * 64..words.end as u64 * 64)
                    .filter(|&chunk| chunk < 10_000 && bits.is_set(chunk))
                    .count()
            });
            let sizes: Vec<usize> = sizes.collect();
            let all: usize = sizes.iter().sum();
            assert!(sizes.iter().all(|&size| size <= all.div_ceil(threads) + 64), "{sizes:?}");
        }
    }
}
