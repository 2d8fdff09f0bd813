//! Units of guest memory. A bare `u64` crosses no module boundary.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Bytes of the smallest page, and of the unit in which checkpoints count.
pub const PAGE_SIZE: usize = 4096;
/// log2 of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;

/// One block of guest RAM (one file, one mapping). A guest has one or more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RegionId(pub u16);

impl fmt::Display for RegionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "region {}", self.0)
    }
}

/// A 4 KiB page of a region, counted from the region's start, whatever the page size of its backing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PageIndex(pub u64);

impl PageIndex {
    /// Byte offset of the page in its region.
    pub fn offset(self) -> usize {
        (self.0 as usize) << PAGE_SHIFT
    }

    /// The page that holds byte `offset` of the region.
    pub fn containing(offset: usize) -> Self {
        Self((offset >> PAGE_SHIFT) as u64)
    }

    /// The frame (backing page) this page lies in.
    pub fn frame(self, size: PageSize) -> FrameIndex {
        FrameIndex(self.0 >> (size.shift() - PAGE_SHIFT))
    }
}

/// A backing page (4 KiB or 2 MiB) of a region: the unit in which memory is pulled, faulted in and has a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct FrameIndex(pub u64);

impl FrameIndex {
    /// Byte offset of the frame in its region.
    pub fn offset(self, size: PageSize) -> usize {
        (self.0 as usize) << size.shift()
    }

    /// The frame that holds byte `offset` of the region.
    pub fn containing(offset: usize, size: PageSize) -> Self {
        Self((offset >> size.shift()) as u64)
    }
}

/// Page size of a region's backing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum PageSize {
    /// 4 KiB: memfd or tmpfs.
    Small,
    /// 2 MiB: hugetlbfs, or a memfd made with MFD_HUGETLB.
    Huge,
}

impl PageSize {
    /// log2 of the size in bytes.
    pub const fn shift(self) -> u32 {
        match self {
            Self::Small => 12,
            Self::Huge => 21,
        }
    }

    /// Size in bytes.
    pub const fn bytes(self) -> usize {
        1 << self.shift()
    }
}

impl fmt::Display for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Small => "4 KiB",
            Self::Huge => "2 MiB",
        })
    }
}
