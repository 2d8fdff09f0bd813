//! Why memory could not be registered with the device.

use super::memlock::{LockedMemory, MemlockTooLow};
use super::plan::TooManyRegions;
use crate::region::Extent;
use std::io;

/// Why memory could not be registered with the device. The texts reach operators.
#[derive(Debug, thiserror::Error)]
pub enum RegistrationError {
    #[error(transparent)]
    TooManyRegions(#[from] TooManyRegions),
    #[error(transparent)]
    Memlock(#[from] MemlockTooLow),
    #[error("bytes {offset}+{len} are outside a mapping of {size} bytes")]
    OutOfRange { offset: u64, len: u64, size: u64 },
    #[error(
        "allocating bytes {offset}+{len} of guest RAM before they are pinned (is there memory left, and room on its tmpfs?)"
    )]
    Populate {
        offset: u64,
        len: u64,
        #[source]
        source: io::Error,
    },
    #[error("the device did not take bytes {offset}+{len} ({memory})")]
    Register {
        offset: u64,
        len: u64,
        /// What this process may pin: the usual reason.
        memory: LockedMemory,
        #[source]
        source: io::Error,
    },
    #[error("looking for holes punched under registered memory in /proc/self/pagemap")]
    PageTable(#[source] io::Error),
}

impl RegistrationError {
    /// What ibv_reg_mr said. It says ENOMEM for a limit, for a device that is full, and for memory that is short.
    pub(super) fn register(extent: &Extent, source: io::Error) -> Self {
        let memory = LockedMemory::now();
        if source.raw_os_error() == Some(libc::ENOMEM)
            && let Err(too_low) = memory.check(extent.len)
        {
            return Self::Memlock(too_low);
        }
        Self::Register { offset: extent.offset, len: extent.len, memory, source }
    }
}
