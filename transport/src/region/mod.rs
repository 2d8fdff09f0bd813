//! Guest-RAM regions: the file behind them, their mappings, and which parts hold data.
//!
//! Only files whose pages can be shared with a userfaultfd in MINOR mode will do: memfd, tmpfs, hugetlbfs. Occupancy is
//! asked of the file (SEEK_DATA), never found by reading: reading a hole allocates it, and so does pinning it.

mod arena;
mod error;
mod huge;
mod mapping;
mod occupancy;
mod prealloc;
mod room;

pub use arena::Arena;
pub use error::RegionError;
pub use mapping::Mapping;
pub use room::expect_room;

use crate::units::PageSize;
use rustix::fs::{FallocateFlags, MemfdFlags, Mode, OFlags, fallocate, fstat, fstatfs, ftruncate};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

/// statfs(2) magic of the two file systems that will do.
const TMPFS_MAGIC: u64 = 0x0102_1994;
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

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
    /// A new anonymous file of `len` bytes (a multiple of the page size), all holes.
    pub fn memfd(name: &str, len: usize, page_size: PageSize) -> Result<Self, RegionError> {
        check_len(len as u64, page_size)?;
        let mut flags = MemfdFlags::CLOEXEC;
        if page_size == PageSize::Huge {
            huge::check((len >> page_size.shift()) as u64)?;
            flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        }
        let fd = rustix::fs::memfd_create(name, flags).map_err(RegionError::io(format!("memfd_create {name}")))?;
        ftruncate(&fd, len as u64).map_err(RegionError::io(format!("setting the size of memfd {name} to {len}")))?;
        Ok(Self { fd, len, page_size })
    }

    /// Creates `path` (which must not exist) with `len` bytes, all holes. The file system decides the page size and must
    /// agree with `page_size`.
    pub fn create_in(path: &Path, len: usize, page_size: PageSize) -> Result<Self, RegionError> {
        check_len(len as u64, page_size)?;
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)
            .map_err(RegionError::io(format!("creating {}", path.display())))?;
        let made = Self::size_new(fd, path, len, page_size);
        if made.is_err() {
            // Best effort: the first error is the one to report.
            let _ = rustix::fs::unlink(path);
        }
        made
    }

    fn size_new(fd: OwnedFd, path: &Path, len: usize, page_size: PageSize) -> Result<Self, RegionError> {
        let backing = backing(&fd, path)?;
        if backing != page_size {
            return Err(RegionError::WrongPageSize {
                path: path.to_owned(),
                backing: backing.to_string(),
                asked: page_size,
            });
        }
        if page_size == PageSize::Huge {
            huge::check((len >> page_size.shift()) as u64)?;
        }
        ftruncate(&fd, len as u64).map_err(RegionError::io(format!("setting the size of {}", path.display())))?;
        Ok(Self { fd, len, page_size })
    }

    /// Opens an existing file; its length and page size are the file's own.
    pub fn open(path: &Path) -> Result<Self, RegionError> {
        let fd = rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
            .map_err(RegionError::io(format!("opening {}", path.display())))?;
        Self::checked(fd, path)
    }

    /// Takes a descriptor received from another process, after the same checks as [`RamFile::open`].
    pub fn from_fd(fd: OwnedFd) -> Result<Self, RegionError> {
        let path = PathBuf::from(format!("(descriptor {})", fd.as_raw_fd()));
        Self::checked(fd, &path)
    }

    fn checked(fd: OwnedFd, path: &Path) -> Result<Self, RegionError> {
        let page_size = backing(&fd, path)?;
        let stat = fstat(&fd).map_err(RegionError::io(format!("fstat {}", path.display())))?;
        let len = u64::try_from(stat.st_size).unwrap_or(0);
        check_len(len, page_size)?;
        Ok(Self { fd, len: len as usize, page_size })
    }

    /// Another descriptor of the same file.
    pub fn try_clone(&self) -> Result<Self, RegionError> {
        let fd = self.fd.try_clone().map_err(|source| RegionError::Io { doing: "dup of a RAM file".into(), source })?;
        Ok(Self { fd, len: self.len, page_size: self.page_size })
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

    /// Maps all of it, readable and writable. On hugetlbfs mapping reserves every page; a pool that is too small is
    /// [`RegionError::NoHugePages`] inside the io error.
    pub fn map(&self) -> io::Result<Mapping> {
        Mapping::read_write(&self.fd, self.len).map_err(|error| match (error.raw_os_error(), self.page_size) {
            (Some(libc::ENOMEM), PageSize::Huge) => huge::shortage((self.len >> self.page_size.shift()) as u64).into(),
            _ => error,
        })
    }

    /// The extents that hold data, in order and not touching. Must be taken before the file is read through a mapping or
    /// pinned for a device, both of which fill holes.
    pub fn occupancy(&self) -> Result<Vec<Extent>, RegionError> {
        occupancy::data_extents(&self.fd, self.len as u64)
    }

    /// As [`RamFile::occupancy`], where that has answered `before`. It costs by what was a hole then, where nothing was given up since
    /// and nothing is reserved: a full file of 1 GiB takes 20 ms to be looked at, and no time to be looked at again. What was given up
    /// and reserved again may be told as data; it reads as zeros.
    pub fn occupancy_since(&self, before: &[Extent]) -> Result<Vec<Extent>, RegionError> {
        let grown = occupancy::grown_extents(&self.fd, before, self.len as u64, self.allocated_bytes()?)?;
        grown.map_or_else(|| self.occupancy(), Ok)
    }

    /// Allocates (and zeroes, where they were holes) all frames through a mapping of its own. `progress` is told the bytes
    /// done so far, from several threads. A full file system or pool is an error, never a signal.
    pub fn preallocate(&self, threads: usize, progress: &(dyn Fn(u64) + Sync)) -> Result<(), RegionError> {
        let mapping = self
            .map()
            .map_err(|source| RegionError::Io { doing: "mapping guest RAM to allocate it".into(), source })?;
        self.preallocate_through(&mapping, threads, progress)
    }

    /// As [`RamFile::preallocate`], through `alias`, whose page table is then filled too: READs that land there meet no
    /// page fault.
    pub fn preallocate_through(
        &self,
        alias: &Mapping,
        threads: usize,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<(), RegionError> {
        prealloc::populate(alias, self.page_size, threads, progress)
    }

    /// Makes sure that a range can be written without taking more memory: a full file system is an error here and never a signal
    /// later. What is a hole stays one to [`RamFile::occupancy`].
    pub fn reserve(&self, extent: Extent) -> Result<(), RegionError> {
        let reserve = || fallocate(&self.fd, FallocateFlags::empty(), extent.offset, extent.len);
        rustix::io::retry_on_intr(reserve)
            .map_err(RegionError::io(format!("reserving {} bytes at {}", extent.len, extent.offset)))
    }

    /// Whether its file system holds every page of it, so that nobody who touches one needs room (or finds none, which is SIGBUS).
    pub fn is_whole(&self) -> Result<bool, RegionError> {
        Ok(self.allocated_bytes()? >= self.len as u64)
    }

    fn allocated_bytes(&self) -> Result<u64, RegionError> {
        /// What st_blocks counts in, whatever the file system (inode(7)).
        const BLOCK: u64 = 512;
        let stat = fstat(&self.fd).map_err(RegionError::io("asking how much of guest RAM is allocated"))?;
        Ok(stat.st_blocks as u64 * BLOCK)
    }

    /// Gives the frames of a range back (FALLOC_FL_PUNCH_HOLE): every mapping then finds a hole there.
    pub fn punch(&self, extent: Extent) -> Result<(), RegionError> {
        fallocate(&self.fd, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, extent.offset, extent.len)
            .map_err(RegionError::io(format!("punching {} bytes at {}", extent.len, extent.offset)))
    }
}

impl AsFd for RamFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Fills the page table of `mapping` wherever `file` has data, so that reads through it meet no page fault. Holes stay holes
/// (touching one would allocate it). Advice: what the kernel does not do now, the first touch does.
pub(crate) fn map_data_ahead(mapping: &Mapping, file: impl AsFd) -> Result<(), RegionError> {
    for extent in occupancy::data_extents(file, mapping.len() as u64)? {
        let at = mapping.as_ptr().wrapping_add(extent.offset as usize);
        // SAFETY: the extent lies inside the mapping (data_extents stops at its length); populating changes no content.
        let _ = unsafe { rustix::mm::madvise(at.cast(), extent.len as usize, rustix::mm::Advice::LinuxPopulateRead) };
    }
    Ok(())
}

fn check_len(len: u64, page_size: PageSize) -> Result<(), RegionError> {
    if len == 0 || !len.is_multiple_of(page_size.bytes() as u64) || usize::try_from(len).is_err() {
        return Err(RegionError::BadLength { len, page_size });
    }
    Ok(())
}

/// Page size of files made in `directory`, if it lies on a file system that will do.
pub fn backing_of(directory: &Path) -> Result<PageSize, RegionError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let fd = rustix::fs::open(directory, flags, Mode::empty())
        .map_err(RegionError::io(format!("opening {}", directory.display())))?;
    backing(&fd, directory)
}

/// Page size of the file system a descriptor lies on, if it is one that will do.
fn backing(fd: &OwnedFd, path: &Path) -> Result<PageSize, RegionError> {
    let stat = fstatfs(fd).map_err(RegionError::io(format!("fstatfs {}", path.display())))?;
    let refused = |filesystem: String| RegionError::WrongFileSystem { path: path.to_owned(), filesystem };
    match stat.f_type as u64 {
        TMPFS_MAGIC => Ok(PageSize::Small),
        HUGETLBFS_MAGIC if stat.f_bsize as usize == PageSize::Huge.bytes() => Ok(PageSize::Huge),
        HUGETLBFS_MAGIC => Err(refused(format!("hugetlbfs with pages of {} bytes", stat.f_bsize))),
        other => Err(refused(filesystem_name(other))),
    }
}

/// A name for the file systems people try by mistake; the magic number for the rest.
fn filesystem_name(magic: u64) -> String {
    match magic {
        0xef53 => "ext4".into(),
        0x5846_5342 => "xfs".into(),
        0x9123_683e => "btrfs".into(),
        0x794c_7630 => "overlayfs".into(),
        0x6969 => "nfs".into(),
        0x8584_58f6 => "ramfs".into(),
        0x2fc1_2fc1 => "zfs".into(),
        0x0102_1997 => "9p".into(),
        0x6573_5546 => "fuse".into(),
        other => format!("a file system with magic {other:#x}"),
    }
}

#[cfg(test)]
mod tests;
