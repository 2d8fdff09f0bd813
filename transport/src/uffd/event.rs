//! What a userfaultfd tells its reader.

use super::UffdError;
use super::abi::Message;
use linux_raw_sys::general as raw;

/// Why a thread waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultKind {
    /// No frame: anonymous memory never touched, or a hole in the file.
    Missing,
    /// The file has the frame, the page table does not: the page has not been shown yet (or was zapped).
    Minor,
    /// A write to a write-protected page.
    WriteProtect,
}

/// One message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A thread touched `address` and waits.
    Fault {
        address: u64,
        kind: FaultKind,
        write: bool,
        /// 0 unless [`super::Features::THREAD_ID`] was asked for.
        thread_id: u32,
    },
    /// madvise(2) is about to drop `start..end`; it goes on once this has been read.
    Remove { start: u64, end: u64 },
    /// munmap(2) of `start..end`.
    Unmap { start: u64, end: u64 },
    /// mremap(2) moved `len` bytes.
    Remap { from: u64, to: u64, len: u64 },
}

impl Event {
    pub(super) fn parse(message: &Message) -> Result<Self, UffdError> {
        let [head, a, b, c] = *message;
        match u32::from(head.to_ne_bytes()[0]) {
            raw::UFFD_EVENT_PAGEFAULT => {
                let kind = match a {
                    flags if flags & u64::from(raw::UFFD_PAGEFAULT_FLAG_WP) != 0 => FaultKind::WriteProtect,
                    flags if flags & u64::from(raw::UFFD_PAGEFAULT_FLAG_MINOR) != 0 => FaultKind::Minor,
                    _ => FaultKind::Missing,
                };
                let write = a & u64::from(raw::UFFD_PAGEFAULT_FLAG_WRITE) != 0;
                Ok(Self::Fault { address: b, kind, write, thread_id: c as u32 })
            }
            raw::UFFD_EVENT_REMOVE => Ok(Self::Remove { start: a, end: b }),
            raw::UFFD_EVENT_UNMAP => Ok(Self::Unmap { start: a, end: b }),
            raw::UFFD_EVENT_REMAP => Ok(Self::Remap { from: a, to: b, len: c }),
            raw::UFFD_EVENT_FORK => Err(UffdError::Forked),
            other => Err(UffdError::UnknownEvent { event: other }),
        }
    }
}
