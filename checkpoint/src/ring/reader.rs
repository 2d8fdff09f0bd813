//! The source's reader: takes segments out of the ring into reserved private memory, one record at a time.

use super::in_place::Still;
use super::spool::{Place, Spool};
use super::{RingShape, RingTooSmall, SEGMENTS_OFFSET};
use crate::guest::Epoch;
use crate::mutation::{Mutation, mutated};
use crate::record::{ALIGN, FIRST, HEADER, SegmentHeader, TRAILER, Trailer, VERSION, crc, kind};
use belay_transport::fabric::RevokedRing;
use belay_transport::region::Mapping;
use zerocopy::{FromZeros, IntoBytes};

/// Bytes of a ring region: the live mapping, or what revocation handed back.
pub trait RingBytes {
    /// Length in bytes.
    fn len(&self) -> usize;
    /// Whether it has none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Copies bytes out.
    fn read(&self, offset: usize, into: &mut [u8]);
    /// The same bytes, where nobody can change them for as long as they are borrowed.
    fn still(&self) -> Option<Still<'_>> {
        None
    }
}

impl RingBytes for Mapping {
    fn len(&self) -> usize {
        Mapping::len(self)
    }
    fn read(&self, offset: usize, into: &mut [u8]) {
        Mapping::read(self, offset, into);
    }
}

impl RingBytes for [u8] {
    fn len(&self) -> usize {
        <[u8]>::len(self)
    }
    fn read(&self, offset: usize, into: &mut [u8]) {
        into.copy_from_slice(&self[offset..offset + into.len()]);
    }
    fn still(&self) -> Option<Still<'_>> {
        Some(Still::Private(self))
    }
}

impl RingBytes for RevokedRing<'_> {
    fn len(&self) -> usize {
        RevokedRing::len(self)
    }
    fn read(&self, offset: usize, into: &mut [u8]) {
        RevokedRing::read(self, offset, into);
    }
    fn still(&self) -> Option<Still<'_>> {
        match self {
            Self::Still(ring) => Some(Still::Ring(*ring)),
            Self::Shared(_) => None,
        }
    }
}

/// What one look at the ring found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Nothing that is whole.
    NotYet,
    /// A segment was taken; its room in the ring is free.
    Spooled,
    /// The record of this epoch is complete: [`RingReader::record`] has it.
    Committed(Epoch),
}

/// A whole header said what no writer of ours says, or memory could not be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    #[error(transparent)]
    TooSmall(#[from] RingTooSmall),
    #[error("the ring has {found} bytes; it had {wanted} when the session began")]
    Resized { found: usize, wanted: usize },
    #[error("segment {sequence} has format version {found}; this belay reads {known}")]
    Version { sequence: u64, found: u16, known: u16 },
    #[error("segment {found} where {wanted} must be")]
    Ahead { found: u64, wanted: u64 },
    #[error("segment {sequence} has a body of {len} bytes; the limit here is {limit}")]
    BadLength { sequence: u64, len: usize, limit: usize },
    #[error("segment {sequence} belongs to {found}; {wanted} is the next")]
    WrongEpoch { sequence: u64, found: Epoch, wanted: Epoch },
    #[error("segment {sequence} says it is {said} of its record and it is not")]
    OutOfPlace { sequence: u64, said: &'static str },
    #[error("{epoch} does not fit into the {reserved} bytes reserved for a record (--overflow)")]
    RecordTooLarge { epoch: Epoch, reserved: usize },
    #[error(
        "{asked} bytes of memory for records in the making (--overflow) cannot be reserved; {available} are available"
    )]
    NoMemory { asked: usize, available: u64 },
}

/// Reads one session's ring.
#[derive(Debug)]
pub struct RingReader {
    shape: RingShape,
    at: Place,
    /// The record being put together. Reserved and touched at start, so that memory is found missing before the guest leaves.
    spool: Spool,
}

impl RingReader {
    /// A reader for a ring region of `region_len` bytes in the session `nonce`, with `overflow_bytes` reserved for the largest
    /// record. Takes the time to touch every byte reserved.
    pub fn new(region_len: usize, nonce: u64, overflow_bytes: usize) -> Result<Self, RingError> {
        Self::with(Spool::private(overflow_bytes)?, region_len, nonce)
    }

    /// A reader for the first session of a guest, which puts records together in `spool`.
    pub fn with(mut spool: Spool, region_len: usize, nonce: u64) -> Result<Self, RingError> {
        let shape = RingShape::of(region_len)?;
        let at = Place { nonce, sequence: 0, consumed: 0, epoch: Epoch(0), used: 0, complete: false };
        spool.note(&at);
        Ok(Self { shape, at, spool })
    }

    /// Goes on where an earlier process had come to.
    pub fn resume(spool: Spool, at: Place, region_len: usize) -> Result<Self, RingError> {
        Ok(Self { shape: RingShape::of(region_len)?, at, spool })
    }

    /// The reader of a next session's ring, once nothing more is to be read of this one: a record that was begun and not completed
    /// never committed, and is begun anew there. Epochs go on.
    pub fn next_session(mut self, region_len: usize, nonce: u64) -> Result<Self, RingError> {
        assert!(!self.at.complete, "a complete record is folded first");
        self.shape = RingShape::of(region_len)?;
        self.at = Place { nonce, sequence: 0, consumed: 0, used: 0, ..self.at };
        self.spool.note(&self.at);
        Ok(self)
    }

    /// The session's nonce.
    pub fn nonce(&self) -> u64 {
        self.at.nonce
    }

    /// Ring bytes taken since the session began: what the destination may use again.
    pub fn consumed(&self) -> u64 {
        self.at.consumed
    }

    /// The newest epoch whose record was complete; 0 before the first.
    pub fn committed(&self) -> Epoch {
        self.at.epoch
    }

    /// The sequence number of the last segment taken.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn sequence(&self) -> u64 {
        self.at.sequence
    }

    /// The complete record, from [`Step::Committed`] to [`RingReader::clear`].
    pub fn record(&self) -> Option<&[u8]> {
        self.at.complete.then(|| &self.spool.bytes()[..self.at.used])
    }

    /// The ring's sizes.
    pub fn shape(&self) -> RingShape {
        self.shape
    }

    /// Makes room for the next record.
    pub fn clear(&mut self) {
        assert!(self.at.complete, "only a complete record is cleared");
        self.set_place(self.at.given_up());
    }

    /// How far the ring has been read.
    pub(super) fn place(&self) -> &Place {
        &self.at
    }

    /// Moves on to `at`, and notes it where it is kept.
    pub(super) fn set_place(&mut self, at: Place) {
        self.at = at;
        self.spool.note(&self.at);
    }

    pub(super) fn spool(&self) -> &[u8] {
        self.spool.bytes()
    }

    pub(super) fn spool_mut(&mut self) -> &mut [u8] {
        self.spool.bytes_mut()
    }

    /// Looks for the next segment in `ring` and takes it if it is whole.
    pub fn step<R: RingBytes + ?Sized>(&mut self, ring: &R) -> Result<Step, RingError> {
        if self.at.complete {
            return Ok(Step::Committed(self.at.epoch));
        }
        let Some((offset, header)) = self.next_header(&self.at, ring)? else { return Ok(Step::NotYet) };
        if header.section.kind.get() == kind::PAD {
            self.set_place(self.at.after_pad(header.sequence.get(), self.shape.room(self.at.consumed)));
            return Ok(Step::Spooled);
        }
        self.take(ring, offset, &header)
    }

    /// The header of the segment that comes at `at`, if it is there, whole and believed; and where in `ring` it lies.
    pub(super) fn next_header<R: RingBytes + ?Sized>(
        &self,
        at: &Place,
        ring: &R,
    ) -> Result<Option<(usize, SegmentHeader)>, RingError> {
        let wanted = SEGMENTS_OFFSET + self.shape.bytes as usize;
        if ring.len() < wanted {
            return Err(RingError::Resized { found: ring.len(), wanted });
        }
        let (offset, room) = self.shape.place(at.consumed);
        let mut header = SegmentHeader::new_zeroed();
        ring.read(offset, header.as_mut_bytes());
        if !header.is_whole() || header.nonce.get() != at.nonce || header.sequence.get() <= at.sequence {
            return Ok(None);
        }
        self.check(at, &header, room)?;
        Ok(Some((offset, header)))
    }

    /// Checks what a whole header says before any of it is used.
    fn check(&self, at: &Place, header: &SegmentHeader, room: usize) -> Result<(), RingError> {
        let (sequence, wanted) = (header.sequence.get(), at.sequence + 1);
        if sequence != wanted {
            return Err(RingError::Ahead { found: sequence, wanted });
        }
        let found = header.version.get();
        if found != VERSION {
            return Err(RingError::Version { sequence, found, known: VERSION });
        }
        let len = header.section.len.get() as usize;
        if header.section.kind.get() == kind::PAD {
            let limit = room - HEADER;
            return if len == limit { Ok(()) } else { Err(RingError::BadLength { sequence, len, limit }) };
        }
        let limit = self.shape.body_max.min(room - HEADER);
        if len > limit {
            return Err(RingError::BadLength { sequence, len, limit });
        }
        let (found, wanted) = (Epoch(header.epoch.get()), at.epoch.next());
        if found != wanted {
            return Err(RingError::WrongEpoch { sequence, found, wanted });
        }
        let first = header.flags.get() & FIRST != 0;
        if first != (at.used == 0) {
            let said = if first { "the first" } else { "a later one" };
            return Err(RingError::OutOfPlace { sequence, said });
        }
        Ok(())
    }

    /// Copies a segment whose header is believed, and keeps it if its body's checksum is right.
    fn take<R: RingBytes + ?Sized>(
        &mut self,
        ring: &R,
        offset: usize,
        header: &SegmentHeader,
    ) -> Result<Step, RingError> {
        let (stride, len) = (header.stride(), header.section.len.get() as usize);
        let Place { used, epoch, .. } = self.at;
        let reserved = self.spool.bytes().len();
        let Some(place) = self.spool.bytes_mut().get_mut(used..used + stride) else {
            return Err(RingError::RecordTooLarge { epoch: epoch.next(), reserved });
        };
        let (place_header, rest) = place.split_at_mut(HEADER);
        let (body, padding) = rest.split_at_mut(len);
        ring.read(offset + HEADER, body);
        if crc(body) != header.section.checksum.get() && !mutated(Mutation::FoldWithoutChecksum) {
            return Ok(Step::NotYet);
        }
        place_header.copy_from_slice(header.as_bytes());
        padding.fill(0);
        self.set_place(self.at.after(header));
        Ok(if self.at.complete { Step::Committed(self.at.epoch) } else { Step::Spooled })
    }
}

#[cfg(any(test, feature = "fuzzing"))]
impl Clone for RingReader {
    /// Over memory of its own, whatever the original's is.
    fn clone(&self) -> Self {
        Self { shape: self.shape, at: self.at, spool: self.spool.copied() }
    }
}

const _: () = assert!(TRAILER == HEADER + (size_of::<Trailer>()).next_multiple_of(ALIGN));

/// MemAvailable in bytes; everything where /proc does not say.
pub(super) fn available_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.map_or(u64::MAX, |kib| kib.saturating_mul(1024))
}
