//! Samples of a thread by perf_event_open(2): a ring that the kernel writes and we read.
//!
//! Rules of this room: the ring is the kernel's; only its control page's tail is ours to write. Records are whole multiples of eight bytes, so
//! no word of one ever wraps.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

/// struct perf_event_attr as it was in its fifth version; every later kernel takes it.
#[repr(C)]
#[derive(Default)]
struct PerfEventAttr {
    kind: u32,
    size: u32,
    config: u64,
    sample_freq: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup_events: u32,
    bp_type: u32,
    config1: u64,
    config2: u64,
    branch_sample_type: u64,
    sample_regs_user: u64,
    sample_stack_user: u32,
    clockid: i32,
    sample_regs_intr: u64,
    aux_watermark: u32,
    sample_max_stack: u16,
    reserved: u16,
}

const _: () = assert!(size_of::<PerfEventAttr>() == 112);

const PERF_TYPE_SOFTWARE: u32 = 1;
/// A timer, so that it works without a PMU: in virtual and in emulated machines.
const PERF_COUNT_SW_CPU_CLOCK: u64 = 0;
const SAMPLE_IP: u64 = 1 << 0;
const SAMPLE_CALLCHAIN: u64 = 1 << 5;
const FLAG_FREQ: u64 = 1 << 10;
const FLAG_EXCLUDE_CALLCHAIN_USER: u64 = 1 << 22;
const FLAG_FD_CLOEXEC: libc::c_ulong = 1 << 3;
const RECORD_LOST: u32 = 2;
const RECORD_SAMPLE: u32 = 9;
/// Of a record's `misc`: where the processor was.
const CPUMODE_MASK: u16 = 7;
const CPUMODE_KERNEL: u16 = 1;
/// In a chain of calls, numbers from here on say what comes next instead of being addresses (PERF_CONTEXT_MAX).
const FIRST_CONTEXT: u64 = (-4095_i64) as u64;
/// Frames of one sample at most.
const MOST_FRAMES: u16 = 48;
const RING_BYTES: usize = 256 << 10;
const PAGE: usize = 4096;
// Places in the control page (struct perf_event_mmap_page).
const DATA_HEAD: usize = 0x400;
const DATA_TAIL: usize = 0x408;

/// Where a thread was.
#[derive(Debug, Clone)]
pub struct Sample {
    pub kernel: bool,
    pub address: u64,
    /// Callers within the kernel, from the inside out.
    pub chain: Vec<u64>,
}

/// Samples one thread of this process while it lives.
pub struct Sampler {
    ring: NonNull<u8>,
    /// The event ends with its descriptor.
    _event: OwnedFd,
}

// SAFETY: the mapping belongs to this value alone, and no thread's identity is in it.
unsafe impl Send for Sampler {}

impl Sampler {
    /// `thread` is as gettid(2) says it, `frequency` in samples a second of its CPU time.
    pub fn open(thread: u32, frequency: u64) -> io::Result<Self> {
        let attributes = PerfEventAttr {
            kind: PERF_TYPE_SOFTWARE,
            size: size_of::<PerfEventAttr>() as u32,
            config: PERF_COUNT_SW_CPU_CLOCK,
            sample_freq: frequency,
            sample_type: SAMPLE_IP | SAMPLE_CALLCHAIN,
            flags: FLAG_FREQ | FLAG_EXCLUDE_CALLCHAIN_USER,
            sample_max_stack: MOST_FRAMES,
            ..PerfEventAttr::default()
        };
        let (any_cpu, no_group) = (-1, -1);
        // SAFETY: the attributes are a whole structure of the size they say; the call keeps nothing of it.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_perf_event_open,
                &raw const attributes,
                thread as libc::pid_t,
                any_cpu,
                no_group,
                FLAG_FD_CLOEXEC,
            )
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a descriptor that was just made and that nobody else has.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        let (access, len) = (libc::PROT_READ | libc::PROT_WRITE, PAGE + RING_BYTES);
        // SAFETY: a new mapping at a place of the kernel's choice.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), len, access, libc::MAP_SHARED, fd.as_raw_fd(), 0) };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { ring: NonNull::new(at.cast()).expect("a mapping is never at zero"), _event: fd })
    }

    /// Takes what has come, sample by sample; how many the kernel had no room for.
    pub fn drain(&mut self, to: &mut dyn FnMut(Sample)) -> u64 {
        let (head, mut at) =
            (self.control(DATA_HEAD).load(Ordering::Acquire), self.control(DATA_TAIL).load(Ordering::Relaxed));
        let mut lost = 0;
        while at < head {
            let header = self.word(at);
            let (kind, misc, size) = (header as u32, (header >> 32) as u16, header >> 48);
            if size < 8 {
                // Not a record: what follows cannot be read.
                break;
            }
            match kind {
                RECORD_SAMPLE => {
                    let frames = self.word(at + 16).min(u64::from(MOST_FRAMES) + 8);
                    let chain = (0..frames).map(|frame| self.word(at + 24 + 8 * frame));
                    to(Sample {
                        kernel: misc & CPUMODE_MASK == CPUMODE_KERNEL,
                        address: self.word(at + 8),
                        chain: chain.filter(|address| *address < FIRST_CONTEXT).collect(),
                    });
                }
                RECORD_LOST => lost += self.word(at + 16),
                _ => {}
            }
            at += size;
        }
        self.control(DATA_TAIL).store(head, Ordering::Release);
        lost
    }

    fn control(&self, place: usize) -> &AtomicU64 {
        let at = self.ring.as_ptr().wrapping_add(place).cast();
        // SAFETY: within the control page, aligned; the kernel and we use it atomically, as perf_event_open(2) has it.
        unsafe { AtomicU64::from_ptr(at) }
    }

    /// A word of the data, whose place counts on without end.
    fn word(&self, place: u64) -> u64 {
        let offset = PAGE + place as usize % RING_BYTES;
        // SAFETY: within the mapping; records and so their words are aligned to eight bytes.
        unsafe { self.ring.as_ptr().wrapping_add(offset).cast::<u64>().read_volatile() }
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        // SAFETY: mapped by `open` with this length; nothing refers to it any more.
        unsafe { libc::munmap(self.ring.as_ptr().cast(), PAGE + RING_BYTES) };
    }
}
