//! Kernel numbers and message layout of userfaultfd (include/uapi/linux/userfaultfd.h), where linux-raw-sys lacks them.

use linux_raw_sys::general as raw;
use std::fmt;

pub(super) use linux_raw_sys::ioctl::{
    UFFDIO_API, UFFDIO_CONTINUE, UFFDIO_COPY, UFFDIO_REGISTER, UFFDIO_UNREGISTER, UFFDIO_WAKE, UFFDIO_WRITEPROTECT,
    UFFDIO_ZEROPAGE,
};

/// `_IO(USERFAULTFD_IOC, 0)`: a new userfaultfd from /dev/userfaultfd.
pub(super) const USERFAULTFD_IOC_NEW: u32 = raw::USERFAULTFD_IOC << 8;
/// Map the frame write-protected, so that it arrives clean.
pub(super) const UFFDIO_CONTINUE_MODE_WP: u64 = 1 << 1;
/// Protect (absent: lift the protection).
pub(super) const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1 << 0;

const _: () = assert!(size_of::<raw::uffdio_api>() == 24);
const _: () = assert!(size_of::<raw::uffdio_register>() == 32);
const _: () = assert!(size_of::<raw::uffdio_copy>() == 40);
const _: () = assert!(size_of::<raw::uffdio_zeropage>() == 32);
const _: () = assert!(size_of::<raw::uffdio_continue>() == 32);
const _: () = assert!(size_of::<raw::uffdio_writeprotect>() == 24);
const _: () = assert!(size_of::<raw::uffdio_range>() == 16);
const _: () = assert!(size_of::<raw::uffd_msg>() == size_of::<Message>());

/// One message as the kernel writes it: event number in the first byte, then three words that depend on it.
pub(super) type Message = [u64; 4];

/// A set of userfaultfd features.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Features(pub u64);

impl Features {
    /// Nothing beyond the first kernel that had userfaultfd.
    pub const NONE: Self = Self(0);
    /// MISSING faults on tmpfs and memfd.
    pub const MISSING_SHMEM: Self = Self(raw::UFFD_FEATURE_MISSING_SHMEM as u64);
    /// MISSING faults on hugetlbfs.
    pub const MISSING_HUGETLBFS: Self = Self(raw::UFFD_FEATURE_MISSING_HUGETLBFS as u64);
    /// MINOR faults and CONTINUE on tmpfs and memfd (Linux 5.14).
    pub const MINOR_SHMEM: Self = Self(raw::UFFD_FEATURE_MINOR_SHMEM as u64);
    /// MINOR faults and CONTINUE on hugetlbfs (Linux 5.13).
    pub const MINOR_HUGETLBFS: Self = Self(raw::UFFD_FEATURE_MINOR_HUGETLBFS as u64);
    /// Discards by madvise(2) are told as events.
    pub const EVENT_REMOVE: Self = Self(raw::UFFD_FEATURE_EVENT_REMOVE as u64);
    /// munmap(2) of a registered range is told as an event.
    pub const EVENT_UNMAP: Self = Self(raw::UFFD_FEATURE_EVENT_UNMAP as u64);
    /// Faults carry the thread's id.
    pub const THREAD_ID: Self = Self(raw::UFFD_FEATURE_THREAD_ID as u64);
    /// Write-protect faults on tmpfs, memfd and hugetlbfs (Linux 5.19).
    pub const WP_SHMEM: Self = Self(raw::UFFD_FEATURE_WP_HUGETLBFS_SHMEM as u64);
    /// Never-populated pages can be write-protected (Linux 6.4).
    pub const WP_UNPOPULATED: Self = Self(raw::UFFD_FEATURE_WP_UNPOPULATED as u64);
    /// The kernel lifts write protection by itself and remembers; read back with PAGEMAP_SCAN (Linux 6.7).
    pub const WP_ASYNC: Self = Self(raw::UFFD_FEATURE_WP_ASYNC as u64);

    /// Both sets together.
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all of `other` is in this set.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// What of this set is not in `other`.
    pub const fn missing_from(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
}

/// Names in the order of their bits, as the kernel's header has them.
const NAMES: [&str; 17] = [
    "PAGEFAULT_FLAG_WP",
    "EVENT_FORK",
    "EVENT_REMAP",
    "EVENT_REMOVE",
    "MISSING_HUGETLBFS",
    "MISSING_SHMEM",
    "EVENT_UNMAP",
    "SIGBUS",
    "THREAD_ID",
    "MINOR_HUGETLBFS",
    "MINOR_SHMEM",
    "EXACT_ADDRESS",
    "WP_HUGETLBFS_SHMEM",
    "WP_UNPOPULATED",
    "POISON",
    "WP_ASYNC",
    "MOVE",
];

impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for bit in (0..64).filter(|bit| self.0 >> bit & 1 == 1) {
            match NAMES.get(bit) {
                Some(name) => write!(f, "{separator}{name}")?,
                None => write!(f, "{separator}bit {bit}")?,
            }
            separator = ", ";
        }
        if separator.is_empty() { f.write_str("none") } else { Ok(()) }
    }
}

impl fmt::Debug for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Features({self})")
    }
}
