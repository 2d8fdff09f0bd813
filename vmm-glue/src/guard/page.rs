//! The page of shared memory in which watched processes give their signs of life: a robust mutex and a few words a slot.

use super::{GuardError, io_error};
use belay_transport::region::Mapping;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{MemfdFlags, fstat, ftruncate, memfd_create};
use std::mem::MaybeUninit;
use std::sync::atomic::Ordering;

const LEN: usize = 4096;
const MAGIC: u64 = u64::from_le_bytes(*b"belaylif");
const MAGIC_AT: usize = 0;
const SLOTS_AT: usize = 8;
const FIRST_SLOT: usize = 64;
/// A slot: the mutex, then pid and orderly word.
const SLOT_LEN: usize = 128;
const PID_AT: usize = 64;
const ORDERLY_AT: usize = 72;
const QUIET_AT: usize = 80;
/// Slots that fit.
pub(super) const MOST_SLOTS: usize = (LEN - FIRST_SLOT) / SLOT_LEN;

const _: () = assert!(size_of::<libc::pthread_mutex_t>() <= PID_AT);

/// How a mutex was got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Got {
    /// From nobody, or from a thread that gave it back.
    Free,
    /// From a thread that died holding it.
    OwnerDied,
    /// Not at all: a thread that lives holds it.
    Busy,
}

/// The shared page.
#[derive(Debug)]
pub struct LifePage {
    fd: OwnedFd,
    memory: Mapping,
    slots: usize,
}

impl LifePage {
    /// A new page with one slot a process that is to be watched.
    pub fn new(slots: usize) -> Result<Self, GuardError> {
        if slots == 0 || slots > MOST_SLOTS {
            return Err(GuardError::NoSuchSlot { slot: slots, slots: MOST_SLOTS });
        }
        let fd = memfd_create("belay-life", MemfdFlags::CLOEXEC).map_err(io_error("memfd_create"))?;
        ftruncate(&fd, LEN as u64).map_err(io_error("ftruncate"))?;
        let memory = Mapping::read_write(&fd, LEN).map_err(io_error("map the page of signs of life"))?;
        let page = Self { fd, memory, slots };
        for slot in 0..slots {
            page.init_mutex(slot).map_err(io_error("make a robust mutex"))?;
        }
        page.memory.store_u64(SLOTS_AT, slots as u64, Ordering::SeqCst);
        page.memory.store_u64(MAGIC_AT, MAGIC, Ordering::SeqCst);
        Ok(page)
    }

    /// A page made by another process of this user.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, GuardError> {
        let len = fstat(&fd).map_err(io_error("fstat"))?.st_size as u64;
        if len != LEN as u64 {
            return Err(GuardError::NotAPage { len, magic: 0 });
        }
        let memory = Mapping::read_write(&fd, LEN).map_err(io_error("map the page of signs of life"))?;
        let magic = memory.load_u64(MAGIC_AT, Ordering::SeqCst);
        let slots = memory.load_u64(SLOTS_AT, Ordering::SeqCst) as usize;
        if magic != MAGIC || slots == 0 || slots > MOST_SLOTS {
            return Err(GuardError::NotAPage { len, magic });
        }
        Ok(Self { fd, memory, slots })
    }

    /// The descriptor, to be given to another process that is to be watched.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Number of slots.
    pub fn slots(&self) -> usize {
        self.slots
    }

    pub(super) fn check_slot(&self, slot: usize) -> Result<(), GuardError> {
        if slot < self.slots { Ok(()) } else { Err(GuardError::NoSuchSlot { slot, slots: self.slots }) }
    }

    fn at(&self, slot: usize) -> usize {
        assert!(slot < MOST_SLOTS, "slot {slot}");
        FIRST_SLOT + slot * SLOT_LEN
    }

    /// Process that holds (or held) the slot; 0 when none ever did.
    pub(super) fn pid(&self, slot: usize) -> u64 {
        self.memory.load_u64(self.at(slot) + PID_AT, Ordering::SeqCst)
    }

    pub(super) fn set_pid(&self, slot: usize, pid: u64) {
        self.memory.store_u64(self.at(slot) + PID_AT, pid, Ordering::SeqCst);
    }

    /// Whether the process of the slot has said that its end is no death.
    pub(super) fn orderly(&self, slot: usize) -> bool {
        self.memory.load_u64(self.at(slot) + ORDERLY_AT, Ordering::SeqCst) != 0
    }

    pub(super) fn set_orderly(&self, slot: usize, orderly: bool) {
        self.memory.store_u64(self.at(slot) + ORDERLY_AT, u64::from(orderly), Ordering::SeqCst);
    }

    /// Whether the process of the slot has shut its guest's gate and ordered the guest to stop, because its page server had gone.
    pub(super) fn quiet(&self, slot: usize) -> bool {
        self.memory.load_u64(self.at(slot) + QUIET_AT, Ordering::SeqCst) != 0
    }

    pub(super) fn set_quiet(&self, slot: usize, quiet: bool) {
        self.memory.store_u64(self.at(slot) + QUIET_AT, u64::from(quiet), Ordering::SeqCst);
    }

    fn mutex(&self, slot: usize) -> *mut libc::pthread_mutex_t {
        self.memory.as_ptr().wrapping_add(self.at(slot)).cast()
    }

    fn init_mutex(&self, slot: usize) -> std::io::Result<()> {
        let mut attributes = MaybeUninit::<libc::pthread_mutexattr_t>::uninit();
        let attributes = attributes.as_mut_ptr();
        // SAFETY: `attributes` points at room for one.
        check(unsafe { libc::pthread_mutexattr_init(attributes) })?;
        // SAFETY: initialised above.
        let robust = check(unsafe { libc::pthread_mutexattr_setrobust(attributes, libc::PTHREAD_MUTEX_ROBUST) });
        // SAFETY: initialised above.
        let shared = check(unsafe { libc::pthread_mutexattr_setpshared(attributes, libc::PTHREAD_PROCESS_SHARED) });
        // SAFETY: the slot has room for a mutex (asserted above), is aligned to 64, and nobody uses it yet.
        let made = check(unsafe { libc::pthread_mutex_init(self.mutex(slot), attributes) });
        // SAFETY: initialised above, used no more after this.
        let destroyed = check(unsafe { libc::pthread_mutexattr_destroy(attributes) });
        robust.and(shared).and(made).and(destroyed)
    }

    /// Waits for the slot's mutex for as long as somebody who lives holds it.
    pub(super) fn lock(&self, slot: usize) -> std::io::Result<Got> {
        // SAFETY: the mutex was initialised when the page was made, and the page is mapped as long as `self`.
        self.got(slot, unsafe { libc::pthread_mutex_lock(self.mutex(slot)) })
    }

    /// Takes the slot's mutex if nobody holds it.
    pub(super) fn try_lock(&self, slot: usize) -> std::io::Result<Got> {
        // SAFETY: as in `lock`.
        self.got(slot, unsafe { libc::pthread_mutex_trylock(self.mutex(slot)) })
    }

    fn got(&self, slot: usize, outcome: i32) -> std::io::Result<Got> {
        match outcome {
            0 => Ok(Got::Free),
            libc::EBUSY => Ok(Got::Busy),
            libc::EOWNERDEAD => {
                // SAFETY: as in `lock`; EOWNERDEAD made this thread the owner, and the mutex guards no data that could be torn.
                check(unsafe { libc::pthread_mutex_consistent(self.mutex(slot)) })?;
                Ok(Got::OwnerDied)
            }
            errno => Err(std::io::Error::from_raw_os_error(errno)),
        }
    }

    /// Gives the mutex back; by the thread that got it.
    pub(super) fn unlock(&self, slot: usize) -> std::io::Result<()> {
        // SAFETY: as in `lock`; an owner that is not this thread is EPERM for a robust mutex.
        check(unsafe { libc::pthread_mutex_unlock(self.mutex(slot)) })
    }
}

fn check(errno: i32) -> std::io::Result<()> {
    if errno == 0 { Ok(()) } else { Err(std::io::Error::from_raw_os_error(errno)) }
}
