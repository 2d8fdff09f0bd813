//! The memory that outlives a process: named files on tmpfs or hugetlbfs.

use super::{Cell, Damaged, MigrationId};
use belay_transport::PageSize;
use belay_transport::region::{Extent, Mapping, RamFile, RegionError, backing_of, expect_room};
use std::fs::{self, DirBuilder};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The files of one migration. They stay when it is dropped: a process that dies leaves them, one that ends in order removes them
/// ([`MemoryFolder::remove`]).
#[derive(Debug, Clone)]
pub struct MemoryFolder {
    path: PathBuf,
    page_size: PageSize,
}

fn io_error(doing: String) -> impl FnOnce(std::io::Error) -> RegionError {
    move |source| RegionError::Io { doing, source }
}

impl MemoryFolder {
    /// Where the folder of migration `id` in `directory` is.
    pub fn path_in(directory: &Path, id: MigrationId) -> PathBuf {
        directory.join(format!("belay-{id}"))
    }

    /// Makes the folder of migration `id` in `directory`, which must lie on tmpfs or hugetlbfs.
    pub fn create(directory: &Path, id: MigrationId) -> Result<Self, RegionError> {
        let page_size = backing_of(directory)?;
        let path = Self::path_in(directory, id);
        let made = DirBuilder::new().mode(0o700).create(&path);
        made.map_err(io_error(format!("making {}", path.display())))?;
        Ok(Self { path, page_size })
    }

    /// The folder that an earlier process made. Somebody else's is refused.
    pub fn open(path: &Path) -> Result<Self, RegionError> {
        let page_size = backing_of(path)?;
        let metadata = fs::symlink_metadata(path).map_err(io_error(format!("looking at {}", path.display())))?;
        if metadata.uid() != rustix::process::geteuid().as_raw() || !metadata.is_dir() {
            let source = std::io::Error::from(std::io::ErrorKind::PermissionDenied);
            return Err(RegionError::Io { doing: format!("taking {}, which is not ours", path.display()), source });
        }
        Ok(Self { path: path.to_owned(), page_size })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Page size of its files.
    pub fn page_size(&self) -> PageSize {
        self.page_size
    }

    /// Makes `name` with at least `bytes` bytes, all holes and, with `reserved`, none that could fail to be filled.
    pub fn make(&self, name: &str, bytes: usize, reserved: bool) -> Result<RamFile, RegionError> {
        let len = bytes.next_multiple_of(self.page_size.bytes());
        let path = self.path.join(name);
        let file = RamFile::create_in(&path, len, self.page_size)?;
        if reserved {
            let reserve = file.reserve(Extent { offset: 0, len: len as u64 });
            reserve.map_err(|error| {
                let _ = fs::remove_file(&path);
                expect_room(&self.path, &path, len as u64).err().unwrap_or(error)
            })?;
        }
        Ok(file)
    }

    /// Bytes that `bytes` take here: whole pages.
    pub fn rounded(&self, bytes: u64) -> u64 {
        bytes.next_multiple_of(self.page_size.bytes() as u64)
    }

    /// Fails where fewer than `bytes` are free now. What is made is reserved all the same: this tells of a directory that is too small
    /// before anything is started.
    pub fn expect_room(&self, bytes: u64) -> Result<(), RegionError> {
        expect_room(&self.path, &self.path, bytes)
    }

    /// Opens `name`.
    pub fn file(&self, name: &str) -> Result<RamFile, RegionError> {
        RamFile::open(&self.path.join(name))
    }

    /// Removes one file, if it is there. Who has it mapped keeps it until they end.
    pub fn forget(&self, name: &str) {
        let _ = fs::remove_file(self.path.join(name));
    }

    /// Removes everything: nobody can take over from it any more.
    pub fn remove(&self) -> std::io::Result<()> {
        match fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }
}

/// Bytes of an ownership mark.
const MARK_BYTES: usize = 16 << 10;
/// Bytes of a position in the ring.
const POSITION_BYTES: usize = 128;
/// Most bytes of device state and unreleased output together, where they are kept.
pub const IMAGE_BYTES: usize = 40 << 20;

const MAGIC: u64 = u64::from_le_bytes(*b"BELAYKPT");
pub(super) const VERSION: u64 = 1;
const MARK_AT: usize = 4096;
const POSITION_AT: usize = MARK_AT + Cell::stride(MARK_BYTES);
const IMAGE_AT: usize = (POSITION_AT + Cell::stride(POSITION_BYTES)).next_multiple_of(4096);
const BYTES: usize = IMAGE_AT + Cell::stride(IMAGE_BYTES);

/// The file `state`: three values that move while a migration goes on.
#[derive(Debug)]
pub struct KeptState {
    file: Arc<RamFile>,
    mapping: Arc<Mapping>,
}

impl KeptState {
    /// A new one, with nothing in it.
    pub fn create(folder: &MemoryFolder) -> Result<Self, RegionError> {
        // All of it now: an epoch that has committed must never find that there is no room to keep its state.
        let file = folder.make("state", BYTES, true)?;
        let mapping = file.map().map_err(io_error("mapping the kept state".to_owned()))?;
        mapping.store_u64(8, VERSION, std::sync::atomic::Ordering::Release);
        mapping.store_u64(0, MAGIC, std::sync::atomic::Ordering::Release);
        Ok(Self { file: Arc::new(file), mapping: Arc::new(mapping) })
    }

    /// One of this process's own that takes room as it is written, for the simulation.
    #[cfg(test)]
    pub(crate) fn in_private_memory() -> Self {
        let file =
            RamFile::memfd("belay-kept-simulated", BYTES.next_multiple_of(4096), PageSize::Small).expect("memory");
        let mapping = Arc::new(file.map().expect("memory"));
        Self { file: Arc::new(file), mapping }
    }

    /// As new.
    #[cfg(test)]
    pub(crate) fn forget(&self) {
        for (at, bytes) in [(MARK_AT, MARK_BYTES), (POSITION_AT, POSITION_BYTES), (IMAGE_AT, IMAGE_BYTES)] {
            for slot in 0..2 {
                self.mapping.zero(at + slot * Cell::stride(bytes) / 2, 64);
            }
        }
    }

    /// What an earlier process left. `Ok(Err(…))`: it is there, and not as it was written.
    pub fn open(folder: &MemoryFolder) -> Result<Result<Self, Damaged>, RegionError> {
        let file = folder.file("state")?;
        let mapping = file.map().map_err(io_error("mapping the kept state".to_owned()))?;
        let word = |offset| mapping.load_u64(offset, std::sync::atomic::Ordering::Acquire);
        if mapping.len() < BYTES || word(0) != MAGIC || word(8) != VERSION {
            return Ok(Err(Damaged { what: "its header", offset: 0 }));
        }
        Ok(Ok(Self { file: Arc::new(file), mapping: Arc::new(mapping) }))
    }

    fn cell(&self, what: &'static str, at: usize, bytes: usize) -> Result<(Cell, Option<Vec<u8>>), Damaged> {
        Cell::open(what, (&self.file, &self.mapping), at, bytes)
    }

    /// Who owns the guest, and what was last written there.
    pub fn mark(&self) -> Result<(Mark, Option<Vec<u8>>), Damaged> {
        let (cell, value) = self.cell("the ownership state", MARK_AT, MARK_BYTES)?;
        Ok((Mark(cell), value))
    }

    pub(crate) fn position(&self) -> Result<(Cell, Option<Vec<u8>>), Damaged> {
        self.cell("the place in the ring", POSITION_AT, POSITION_BYTES)
    }

    pub(crate) fn image(&self) -> Result<(Cell, Option<Vec<u8>>), Damaged> {
        self.cell("the newest epoch's device state and output", IMAGE_AT, IMAGE_BYTES)
    }
}

/// The one place that says who may run the guest, but for a release, which is in the [`super::Journal`].
#[derive(Debug)]
pub struct Mark(Cell);

impl Mark {
    /// Replaces it. Memory for it is there, so only a value that is too long is an error.
    pub fn write(&mut self, value: &[u8]) -> Result<(), RegionError> {
        self.0.reserve(value.len())?;
        self.0.write(value);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_outlives_who_made_it_until_it_is_removed() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let folder = MemoryFolder::create(directory.path(), MigrationId([3; 8])).unwrap();
        assert_eq!(fs::metadata(folder.path()).unwrap().mode() & 0o777, 0o700);
        folder.make("ram-0", 5000, true).unwrap().map().unwrap().write(4999, b"x");
        let (mut mark, nothing) = KeptState::create(&folder).unwrap().mark().unwrap();
        assert!(nothing.is_none());
        mark.write(b"serving").unwrap();
        let folder = MemoryFolder::open(folder.path()).unwrap();
        let file = folder.file("ram-0").unwrap();
        let mut byte = [0];
        file.map().unwrap().read(4999, &mut byte);
        assert_eq!((file.len(), byte), (8192, *b"x"));
        assert_eq!(file.occupancy().unwrap(), [Extent { offset: 4096, len: 4096 }], "what is reserved is a hole still");
        let (_, value) = KeptState::open(&folder).unwrap().unwrap().mark().unwrap();
        assert_eq!(value.as_deref(), Some(&b"serving"[..]));
        folder.remove().unwrap();
        assert!(KeptState::open(&folder).is_err());
    }

    #[test]
    fn the_whole_of_the_kept_state_has_its_room_from_the_start() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let folder = MemoryFolder::create(directory.path(), MigrationId([3; 8])).unwrap();
        let state = KeptState::create(&folder).unwrap();
        let taken = || fs::metadata(folder.path().join("state")).unwrap().blocks() * 512;
        assert!(taken() >= BYTES as u64);
        let before = taken();
        let (mut image, _) = state.image().unwrap();
        for _ in 0..2 {
            image.reserve(IMAGE_BYTES).unwrap();
            image.write(&vec![7; IMAGE_BYTES]);
        }
        assert_eq!(taken(), before);
    }

    #[test]
    fn only_memory_file_systems_will_do() {
        let directory = tempfile::tempdir().unwrap();
        if backing_of(directory.path()).is_ok() {
            eprintln!("skipped: the temporary directory lies on tmpfs here");
            return;
        }
        let error = MemoryFolder::create(directory.path(), MigrationId([3; 8])).unwrap_err();
        assert!(matches!(error, RegionError::WrongFileSystem { .. }), "{error}");
    }
}
