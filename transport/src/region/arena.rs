//! Memory in a file that one process at a time has for itself, so that it may be read as a slice.
//!
//! Unlike guest RAM and rings, nobody else ever writes it while it is open: it is locked (flock(2)) for as long as it is mapped,
//! its file is the user's own (mode 0600), and it is exported to no peer. It outlives the process that had it.

use super::{Mapping, RamFile};
use rustix::fs::{FlockOperation, flock};
use std::io;

/// A locked file and its mapping.
#[derive(Debug)]
pub struct Arena {
    mapping: Mapping,
    _file: RamFile,
}

impl Arena {
    /// Takes `file` for this process alone. Fails with `WouldBlock` while another one has it.
    pub fn new(file: RamFile) -> io::Result<Self> {
        flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        Ok(Self { mapping: file.map()?, _file: file })
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.mapping.len()
    }

    /// Whether it has no bytes (never true: no file of that length can be made).
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the mapping has `len` bytes and lives as long as `self`; it is private to this type, and the file is locked, so
        // nothing writes them while the borrow lasts.
        unsafe { std::slice::from_raw_parts(self.mapping.as_ptr(), self.mapping.len()) }
    }

    /// Its bytes, to be written.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and the exclusive borrow of `self` makes this the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.mapping.as_ptr(), self.mapping.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::PageSize;

    #[test]
    fn what_is_written_is_there_for_the_next_process_and_for_one_at_a_time() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = directory.path().join("arena");
        let mut arena = Arena::new(RamFile::create_in(&path, 8192, PageSize::Small).unwrap()).unwrap();
        arena.bytes_mut()[5000..5003].copy_from_slice(b"abc");
        let error = Arena::new(RamFile::open(&path).unwrap()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        drop(arena);
        let arena = Arena::new(RamFile::open(&path).unwrap()).unwrap();
        assert_eq!((arena.len(), &arena.bytes()[4999..5004]), (8192, &b"\0abc\0"[..]));
    }
}
