//! KVM's dirty rings as a tracker: each vCPU lists the pages it dirtied, so that the cost follows what was dirtied.
//!
//! A ring that is nearly full makes its vCPU leave KVM_RUN; the vCPU's thread then moves the entries into the set of the
//! running epoch and goes on. The tracker does the same right before the stop, so that the pause finds only what was written since: a page that
//! is written again is listed again. Content is read only at the stop (P8). See "KVM_CAP_DIRTY_LOG_RING" in virt/kvm/api.rst.

use super::ioctl;
use super::machine::{Machine, Slot};
use belay_checkpoint::dirty::DirtySet;
use belay_checkpoint::guest::{DirtyTracker, GuestError, TrackerKind};
use belay_checkpoint::tracker::BackOff;
use belay_transport::{PageIndex, RegionId};
use kvm_bindings::{KVM_DIRTY_LOG_PAGE_OFFSET, kvm_dirty_gfn};
use rustix::mm::{MapFlags, ProtFlags};
use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

const DIRTY: u32 = 1;
const RESET: u32 = 2;

/// Pages collected of the running epoch, shared by all rings of a VM.
pub(super) struct Collected {
    set: Mutex<DirtySet>,
    region: RegionId,
    slots: Vec<Slot>,
}

impl Collected {
    pub fn new(region: RegionId, pages: u64, slots: Vec<Slot>) -> Self {
        Self { set: Mutex::new(DirtySet::new([(region, pages)])), region, slots }
    }

    fn lock(&self) -> MutexGuard<'_, DirtySet> {
        self.set.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The ring of one vCPU.
pub(super) struct Ring {
    entries: NonNull<kvm_dirty_gfn>,
    count: u32,
    collected: Arc<Collected>,
    /// Index of the next entry to be read; whoever holds it is the ring's one reader.
    next: Mutex<u32>,
}

// SAFETY: the entries are shared with the kernel only and read under `next`; flags go through atomics.
unsafe impl Send for Ring {}
// SAFETY: as above.
unsafe impl Sync for Ring {}

/// What was in a ring, or in several.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Taken {
    entries: u64,
    /// Of pages that were collected already in this epoch.
    again: u64,
}

/// A ring held something that the kernel does not put there.
#[derive(Debug, thiserror::Error)]
pub(super) enum RingError {
    #[error("a dirty ring entry names page {offset} of memslot {slot}, which does not exist")]
    NoSuchPage { slot: u32, offset: u64 },
}

impl Ring {
    /// Maps the ring of `count` entries of a vCPU.
    pub fn map(vcpu: BorrowedFd<'_>, count: u32, collected: Arc<Collected>) -> io::Result<Self> {
        let len = count as usize * size_of::<kvm_dirty_gfn>();
        let offset = u64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * belay_transport::PAGE_SIZE as u64;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a null hint lets the kernel choose a free range, so no existing mapping is replaced.
        let at = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, protection, MapFlags::SHARED, vcpu, offset) }?;
        let entries = NonNull::new(at.cast()).ok_or_else(|| io::Error::other("mmap returned a null address"))?;
        Ok(Self { entries, count, collected, next: Mutex::new(0) })
    }

    fn entry(&self, index: u32) -> NonNull<kvm_dirty_gfn> {
        // SAFETY: the remainder keeps the index inside the mapping.
        unsafe { self.entries.add((index % self.count) as usize) }
    }

    fn flags(&self, index: u32) -> &AtomicU32 {
        let entry = self.entry(index);
        // SAFETY: `entry` points to a whole entry of the mapping (see `entry`).
        let flags = unsafe { &raw mut (*entry.as_ptr()).flags };
        // SAFETY: mapped for as long as `self`, aligned as part of the kernel's structure, written by the kernel as a
        // word.
        unsafe { AtomicU32::from_ptr(flags) }
    }

    /// Moves all entries into the running epoch's set and marks them for the kernel to take back (KVM_RESET_DIRTY_RINGS).
    pub fn collect(&self) -> Result<Taken, RingError> {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let mut set = self.collected.lock();
        let mut taken = Taken::default();
        while taken.entries < u64::from(self.count) && self.flags(*next).load(Ordering::Acquire) & DIRTY != 0 {
            // SAFETY: the flag says that the kernel has written this entry and will not touch it until it is reset.
            let kvm_dirty_gfn { slot, offset, .. } = unsafe { self.entry(*next).read_volatile() };
            let known = self.collected.slots.iter().find(|known| known.number == slot && offset < known.pages);
            let known = known.ok_or(RingError::NoSuchPage { slot, offset })?;
            taken.again += u64::from(!set.insert(self.collected.region, PageIndex(known.first_page + offset)));
            self.flags(*next).store(RESET, Ordering::Release);
            *next = next.wrapping_add(1);
            taken.entries += 1;
        }
        Ok(taken)
    }

    /// Entries the kernel has written and nobody has collected yet.
    fn pending(&self) -> u64 {
        let next = *self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let dirty = |&index: &u32| self.flags(next.wrapping_add(index)).load(Ordering::Acquire) & DIRTY != 0;
        (0..self.count).take_while(dirty).count() as u64
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let len = self.count as usize * size_of::<kvm_dirty_gfn>();
        // SAFETY: start and length are those mmap gave; nothing refers to the range once the last owner is gone.
        let _ = unsafe { rustix::mm::munmap(self.entries.as_ptr().cast(), len) };
    }
}

/// See the module. Writes by the VMM's own threads are not seen.
pub(super) struct RingTracker {
    machine: Arc<Machine>,
    collected: Arc<Collected>,
    back_off: BackOff,
    /// Pages that were ready for the next harvest, and how many of them were written again since.
    ahead: u64,
    again: u64,
}

impl RingTracker {
    pub fn new(machine: Arc<Machine>, collected: Arc<Collected>) -> Self {
        Self { machine, collected, back_off: BackOff::default(), ahead: 0, again: 0 }
    }

    fn rings(&self) -> impl Iterator<Item = &Ring> {
        self.machine.vcpus().iter().filter_map(|vcpu| vcpu.ring.as_ref())
    }

    /// Entries that nobody has collected yet.
    fn pending(&self) -> u64 {
        self.rings().map(Ring::pending).sum()
    }

    /// Empties all rings; how many of the pages had been collected already.
    fn collect_all(&self) -> Result<u64, GuestError> {
        let mut all = Taken::default();
        for ring in self.rings() {
            let taken = ring.collect().map_err(|error| GuestError::Io {
                doing: "emptying a dirty ring".into(),
                source: io::Error::other(error),
            })?;
            all = Taken { entries: all.entries + taken.entries, again: all.again + taken.again };
        }
        if all.entries > 0 {
            let doing = "KVM_RESET_DIRTY_RINGS".to_owned();
            ioctl::reset_dirty_rings(self.machine.vm()).map_err(|source| GuestError::Io { doing, source })?;
        }
        Ok(all.again)
    }
}

impl DirtyTracker for RingTracker {
    fn kind(&self) -> TrackerKind {
        TrackerKind::KvmRing
    }

    fn sees_device_writes(&self) -> bool {
        false
    }

    fn start(&mut self) -> Result<(), GuestError> {
        self.machine.control().check_paused("start tracking")?;
        self.machine.log_dirty_pages()?;
        self.collect_all()?;
        self.collected.lock().clear();
        (self.ahead, self.again) = (0, 0);
        Ok(())
    }

    fn prepare(&mut self) -> Result<(), GuestError> {
        let mut passes = self.back_off.passes();
        while passes.another(self.pending()) {
            // What its own thread collected before, because a ring was full, is no page that this made the guest write again.
            let again = self.collect_all()?;
            self.again += if self.ahead > 0 { again } else { 0 };
            self.ahead = self.collected.lock().len();
        }
        Ok(())
    }

    fn harvest(&mut self, into: &mut DirtySet) -> Result<(), GuestError> {
        self.machine.control().check_paused("harvest")?;
        let again = self.collect_all()?;
        if self.ahead > 0 {
            self.again += again;
        }
        self.back_off.harvested(self.ahead, self.again);
        (self.ahead, self.again) = (0, 0);
        let mut set = self.collected.lock();
        into.merge(&set);
        set.clear();
        Ok(())
    }

    fn dirty_so_far(&mut self) -> Option<u64> {
        let pending = self.pending();
        Some(self.collected.lock().len() + pending)
    }
}
