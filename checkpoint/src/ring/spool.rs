//! Where the source puts a record together: memory reserved for the largest one, and how far the ring has been read.
//!
//! In kept memory ([`crate::journal`]) both outlive the process. The place in the ring is noted *before* the room of what was taken is given
//! back to the destination, so a segment is always in one of the two: in the ring, or in the overflow memory with its place noted.

use super::RingError;
use crate::guest::Epoch;
use crate::journal::{Cell, Damaged, KeptState, MemoryFolder};
use crate::record::{SegmentHeader, kind};
use belay_transport::region::{Arena, RamFile, RegionError};
use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// How far one session's ring has been read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The session's.
    pub nonce: u64,
    /// Of the last segment taken.
    pub sequence: u64,
    /// Ring bytes taken since the session began.
    pub consumed: u64,
    /// Last committed epoch.
    pub epoch: Epoch,
    /// Bytes of the record being put together.
    pub used: usize,
    /// Whether that record is complete.
    pub complete: bool,
}

impl Place {
    /// Behind the pad with this sequence number, which fills the `room` that is left in this lap.
    pub(super) fn after_pad(self, sequence: u64, room: usize) -> Self {
        Self { sequence, consumed: self.consumed + room as u64, ..self }
    }

    /// Behind a segment of the record.
    pub(super) fn after(self, header: &SegmentHeader) -> Self {
        let complete = header.section.kind.get() == kind::TRAILER;
        Self {
            sequence: self.sequence + 1,
            consumed: self.consumed + header.stride() as u64,
            epoch: if complete { self.epoch.next() } else { self.epoch },
            used: self.used + header.stride(),
            complete,
            ..self
        }
    }

    /// With room for the next record.
    pub(super) fn given_up(self) -> Self {
        Self { used: 0, complete: false, ..self }
    }

    fn encode(&self) -> KeptPlace {
        KeptPlace {
            nonce: self.nonce.into(),
            sequence: self.sequence.into(),
            consumed: self.consumed.into(),
            epoch: self.epoch.0.into(),
            used: (self.used as u64).into(),
            complete: u64::from(self.complete).into(),
        }
    }

    /// `None` for what is no place in overflow memory of `overflow_bytes`.
    fn decode(bytes: &[u8], overflow_bytes: usize) -> Option<Self> {
        let kept = KeptPlace::read_from_bytes(bytes).ok()?;
        Some(Self {
            nonce: kept.nonce.get(),
            sequence: kept.sequence.get(),
            consumed: kept.consumed.get(),
            epoch: Epoch(kept.epoch.get()),
            used: usize::try_from(kept.used.get()).ok().filter(|&used| used <= overflow_bytes)?,
            complete: match kept.complete.get() {
                0 => false,
                1 => true,
                _ => return None,
            },
        })
    }
}

/// A place as it is kept.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct KeptPlace {
    nonce: U64,
    sequence: U64,
    consumed: U64,
    epoch: U64,
    used: U64,
    complete: U64,
}

#[derive(Debug)]
enum Memory {
    Own(Vec<u8>),
    Kept(Arena, Cell),
}

/// Overflow memory, with the place in the ring beside it where it is kept.
#[derive(Debug)]
pub struct Spool(Memory);

/// Why a spool that another process left cannot be gone on with.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    #[error(transparent)]
    Region(#[from] RegionError),
    #[error(transparent)]
    Damaged(#[from] Damaged),
    #[error("overflow memory cannot be taken")]
    Arena(#[source] std::io::Error),
}

const OVERFLOW: &str = "overflow";

impl Spool {
    /// Memory of this process's own. Takes the time to touch every byte reserved.
    pub fn private(bytes: usize) -> Result<Self, RingError> {
        let available = super::reader::available_memory();
        let none = RingError::NoMemory { asked: bytes, available };
        if bytes as u64 > available {
            return Err(none);
        }
        let mut memory = Vec::new();
        memory.try_reserve_exact(bytes).map_err(|_| none)?;
        memory.resize(bytes, 0);
        Ok(Self(Memory::Own(memory)))
    }

    /// New memory in `folder`, which outlives this process.
    pub fn create(folder: &MemoryFolder, state: &KeptState, bytes: usize) -> Result<Self, SpoolError> {
        // Reserved first: where there is no room that is said, before a part of it is touched.
        let file = folder.make(OVERFLOW, bytes, true)?;
        file.preallocate(1, &|_| ())?;
        Ok(Self::over(file, state)?.0)
    }

    /// What an earlier process left, and where it was.
    pub fn open(folder: &MemoryFolder, state: &KeptState) -> Result<(Self, Option<Place>), SpoolError> {
        Self::over(folder.file(OVERFLOW)?, state)
    }

    /// Memory in `file`, and the place that is kept in `state`.
    pub(crate) fn over(file: RamFile, state: &KeptState) -> Result<(Self, Option<Place>), SpoolError> {
        let arena = Arena::new(file).map_err(SpoolError::Arena)?;
        let (cell, place) = state.position()?;
        let damaged = Damaged { what: "the place in the ring", offset: 0 };
        let place = place.map(|bytes| Place::decode(&bytes, arena.len()).ok_or(damaged)).transpose()?;
        Ok((Self(Memory::Kept(arena, cell)), place))
    }

    /// The memory.
    pub fn bytes(&self) -> &[u8] {
        match &self.0 {
            Memory::Own(memory) => memory,
            Memory::Kept(arena, _) => arena.bytes(),
        }
    }

    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn copied(&self) -> Self {
        Self(Memory::Own(self.bytes().to_vec()))
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        match &mut self.0 {
            Memory::Own(memory) => memory,
            Memory::Kept(arena, _) => arena.bytes_mut(),
        }
    }

    /// Notes the place, where it is kept. Its room was reserved with the file.
    pub(super) fn note(&mut self, place: &Place) {
        let Memory::Kept(_, cell) = &mut self.0 else { return };
        cell.reserve(size_of::<KeptPlace>()).expect("a place's room is part of the kept state");
        cell.write(place.encode().as_bytes());
    }
}

/// What a fuzz target asks of a kept place: one that is understood lies within the overflow memory, and is kept again byte for byte.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz(bytes: &[u8]) {
    const OVERFLOW_BYTES: usize = 1 << 20;
    if let Some(place) = Place::decode(bytes, OVERFLOW_BYTES) {
        assert!(place.used <= OVERFLOW_BYTES);
        assert_eq!(place.encode().as_bytes(), bytes);
    }
}

/// A place as it is kept, for the corpus.
#[cfg(test)]
pub(crate) fn seed() -> Vec<u8> {
    let place = Place { nonce: 7, sequence: 300, consumed: 1 << 20, epoch: Epoch(41), used: 4096, complete: true };
    place.encode().as_bytes().to_vec()
}
