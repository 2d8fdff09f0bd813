//! Guest-RAM regions: the file behind them, their mappings, and which parts hold data.

mod mapping;

pub use mapping::Mapping;

use crate::units::PageSize;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// A run of bytes that holds data; both ends on page boundaries of the backing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Extent {
    pub offset: u64,
    pub len: u64,
}

/// A file that can be guest RAM or a ring: a memfd, or a file on tmpfs or hugetlbfs.
#[derive(Debug)]
pub struct RamFile {
    fd: OwnedFd,
    len: usize,
    page_size: PageSize,
}

impl RamFile {
    /// A new anonymous file of `len` bytes (a multiple of the page size).
    pub fn memfd(name: &str, len: usize, page_size: PageSize) -> io::Result<Self> {
        use rustix::fs::MemfdFlags;
        let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&fd, len as u64)?;
        Ok(Self { fd, len, page_size })
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Page size of the backing.
    pub fn page_size(&self) -> PageSize {
        self.page_size
    }

    /// Maps all of it, readable and writable.
    pub fn map(&self) -> io::Result<Mapping> {
        Mapping::read_write(&self.fd, self.len)
    }
}

impl AsFd for RamFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
