//! The destination's writer: seals staged segments and ships them through a checkpoint lane, never past what the source has taken.

use super::{APPLIED, CONSUMED, FOLDED, GRANTED, LEASE_NS, OWNER_WORDS_BYTES, REFUSED, RingShape, RingTooSmall};
use crate::guest::Epoch;
use crate::record::{
    ALIGN, CRITICAL, FIRST, HEADER, MAGIC, SectionHeader, SegmentHeader, Trailer, VERSION, crc, kind, stride,
};
use crate::staging::{Slot, Staged};
use belay_transport::fabric::{FabricError, Initiator, Lane, LocalKey, OWNER_EPOCH_OFFSET, Read, RingKeys, Write};
use belay_transport::region::{Mapping, RamFile, RegionError};
use belay_transport::stop_point::reached;
use belay_transport::{Deadline, PAGE_SIZE, PageSize};
use crc_fast::{CrcAlgorithm, Digest};
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use zerocopy::IntoBytes;

/// How long to leave the source alone before looking again whether it has taken something.
const LOOK_AGAIN: Duration = Duration::from_micros(200);
/// Id of reads of the owner region; segments use their sequence number.
const READ_ID: u64 = u64::MAX;
/// Where pads are written from, in the mailbox.
const PAD_OFFSET: usize = 2048;
/// Where the heartbeat is written from, in the mailbox.
pub(crate) const PULSE_OFFSET: usize = 3072;

/// A page of the destination's memory known to the fabric: the owner region is read into it, small things are written from it.
#[derive(Debug)]
pub struct Mailbox {
    pub(crate) mapping: Arc<Mapping>,
    pub(crate) key: LocalKey,
}

impl Mailbox {
    /// Makes and registers one. Each lane that is used by a thread of its own needs its own.
    pub fn new(initiator: &mut dyn Initiator) -> Result<Self, ShipError> {
        let file = RamFile::memfd("belay-mailbox", PAGE_SIZE, PageSize::Small)?;
        let mapping = Arc::new(file.map().map_err(ShipError::Mailbox)?);
        mapping.zero(0, PAGE_SIZE);
        let key = initiator.register_local(&mapping)?;
        Ok(Self { mapping, key })
    }

    /// The read that fetches the owner's words.
    pub(crate) fn read_of(&self, keys: &RingKeys) -> Read {
        Read {
            id: READ_ID,
            remote: keys.owner_region,
            remote_offset: 0,
            local: self.key,
            local_offset: 0,
            len: OWNER_WORDS_BYTES as u32,
        }
    }

    /// What the last completed read brought.
    pub(crate) fn words(&self) -> OwnerWords {
        let word = |offset| {
            let value = self.mapping.load_u64(offset, Ordering::Acquire);
            (self.mapping.load_u64(offset + 8, Ordering::Acquire) == !value).then_some(value)
        };
        OwnerWords {
            owner_epoch: self.mapping.load_u64(OWNER_EPOCH_OFFSET, Ordering::Acquire),
            consumed: word(CONSUMED),
            folded: word(FOLDED).map(Epoch),
            applied: word(APPLIED).map(Epoch),
            granted: word(GRANTED),
            lease: word(LEASE_NS).map(Duration::from_nanos),
            refused: word(REFUSED).is_some_and(|value| value != 0),
        }
    }
}

/// The words the source writes for the destination. `None`: read in the middle of a store; read again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OwnerWords {
    /// Bumped when the session is revoked.
    pub owner_epoch: u64,
    pub consumed: Option<u64>,
    pub folded: Option<Epoch>,
    /// Disk writes of epochs up to this are in their images.
    pub applied: Option<Epoch>,
    pub granted: Option<u64>,
    pub lease: Option<Duration>,
    pub refused: bool,
}

/// Posts a read of the owner's words and waits for it, dropping completions of writes before it.
pub(crate) fn fetch_words(
    lane: &mut dyn Lane,
    mailbox: &Mailbox,
    keys: &RingKeys,
    deadline: Deadline,
) -> Result<OwnerWords, FabricError> {
    make_room(lane, deadline)?;
    lane.post_reads(&[mailbox.read_of(keys)])?;
    drain(lane, deadline)?;
    Ok(mailbox.words())
}

/// Waits until the lane's window has room for one more operation.
pub(crate) fn make_room(lane: &mut dyn Lane, deadline: Deadline) -> Result<(), FabricError> {
    while lane.outstanding() >= lane.window() {
        if lane.poll(&mut [0; 16])? == 0 {
            lane.wait(deadline)?;
        }
    }
    Ok(())
}

/// Waits until everything posted has completed.
pub(crate) fn drain(lane: &mut dyn Lane, deadline: Deadline) -> Result<(), FabricError> {
    while lane.outstanding() > 0 {
        if lane.poll(&mut [0; 16])? == 0 {
            lane.wait(deadline)?;
        }
    }
    Ok(())
}

/// What shipping one part of a record took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shipped {
    /// Bytes written to the ring, pads included.
    pub bytes: u64,
    /// The epoch, when this part held the trailer and it has committed.
    pub committed: Option<Epoch>,
    /// Time spent waiting for the source to take in earlier segments.
    pub waited: Duration,
}

/// Why a part could not be shipped. The session's ring is of no more use afterwards.
#[derive(Debug, thiserror::Error)]
pub enum ShipError {
    #[error(transparent)]
    TooSmall(#[from] RingTooSmall),
    #[error("a mailbox cannot be mapped")]
    Mailbox(#[source] io::Error),
    #[error(transparent)]
    Region(#[from] RegionError),
    #[error(transparent)]
    Fabric(#[from] FabricError),
    #[error(
        "the source has taken {consumed} of {written} ring bytes and nothing more for {waited:?}; {needed} more are needed"
    )]
    NoRoom { consumed: u64, written: u64, needed: u64, waited: Duration },
    #[error("the source says it has taken {said} ring bytes; it had taken {before} and {written} are written")]
    BadConsumed { said: u64, before: u64, written: u64 },
    #[error("the source refused what was shipped; its own report says why")]
    Refused,
    #[error("{found} was handed to a writer that has committed {committed}")]
    WrongEpoch { found: Epoch, committed: Epoch },
}

/// Writes one session's ring.
pub struct RingWriter {
    lane: Box<dyn Lane>,
    keys: RingKeys,
    shape: RingShape,
    nonce: u64,
    mailbox: Mailbox,
    /// As it was when this writer began: another one means that the source has taken the session back.
    owner_epoch: u64,
    /// Of the last segment written.
    sequence: u64,
    /// Ring bytes written and known taken since the session began.
    written: u64,
    consumed: u64,
    /// Last committed epoch.
    epoch: Epoch,
    /// Of the record being shipped.
    segments: u64,
    bytes: u64,
    chain: Digest,
    /// A body's private copy while its checksum is computed: staging memory is a mapping and never a slice.
    scratch: Vec<u8>,
}

impl RingWriter {
    /// A writer for a ring region of `region_len` bytes in the session `nonce`. Reads the owner's words once.
    pub fn new(
        mut lane: Box<dyn Lane>,
        keys: RingKeys,
        region_len: usize,
        nonce: u64,
        mailbox: Mailbox,
        deadline: Deadline,
    ) -> Result<Self, ShipError> {
        let shape = RingShape::of(region_len)?;
        let owner_epoch = fetch_words(lane.as_mut(), &mailbox, &keys, deadline)?.owner_epoch;
        Ok(Self {
            lane,
            keys,
            shape,
            nonce,
            mailbox,
            owner_epoch,
            sequence: 0,
            written: 0,
            consumed: 0,
            epoch: Epoch(0),
            segments: 0,
            bytes: 0,
            chain: Digest::new(CrcAlgorithm::Crc64Nvme),
            scratch: vec![0; shape.body_max],
        })
    }

    /// For a session that is not the guest's first: `committed` is in the source's RAM, the next epoch is the one after it.
    pub fn going_on_from(mut self, committed: Epoch) -> Self {
        assert_eq!(self.written, 0, "decided before anything is written");
        self.epoch = committed;
        self
    }

    /// The newest epoch that has committed.
    pub fn committed(&self) -> Epoch {
        self.epoch
    }

    /// Ships what `slot` holds, and commits if that ends a record. `Ok` with `committed` set is the promise that a catch will
    /// recover at least this epoch (P4, P5). The slot may be used again afterwards.
    pub fn ship(&mut self, slot: &Slot, deadline: Deadline) -> Result<Shipped, ShipError> {
        if slot.epoch() != self.epoch.next() {
            return Err(ShipError::WrongEpoch { found: slot.epoch(), committed: self.epoch });
        }
        let from = self.written;
        let mut waited = Duration::ZERO;
        for staged in slot.segments() {
            if staged.section.kind.get() == kind::TRAILER {
                self.write_trailer_body(slot, staged);
            }
            waited += self.place(slot, staged, deadline)?;
        }
        let mut committed = None;
        if slot.is_last() {
            self.epoch = self.epoch.next();
            self.segments = 0;
            self.bytes = 0;
            self.chain.reset();
            committed = Some(self.epoch);
        } else {
            drain(self.lane.as_mut(), deadline)?;
        }
        Ok(Shipped { bytes: self.written - from, committed, waited })
    }

    fn write_trailer_body(&mut self, slot: &Slot, staged: &Staged) {
        let trailer = Trailer {
            segments: self.segments.into(),
            bytes: self.bytes.into(),
            chain: self.chain.finalize().into(),
            reserved: 0.into(),
        };
        slot.mapping().write(staged.offset + HEADER, trailer.as_bytes());
    }

    /// Seals one segment and writes it at the ring's next place; commits if it is a trailer.
    fn place(&mut self, slot: &Slot, staged: &Staged, deadline: Deadline) -> Result<Duration, ShipError> {
        let len = staged.section.len.get() as usize;
        let stride = stride(len);
        let mut waited = Duration::ZERO;
        let room = self.shape.place(self.written).1;
        if stride > room {
            waited += self.wait_for_room(room as u64, deadline)?;
            self.pad(room, slot.epoch(), deadline)?;
        }
        waited += self.wait_for_room(stride as u64, deadline)?;
        slot.mapping().read(staged.offset + HEADER, &mut self.scratch[..len]);
        let section = SectionHeader { checksum: crc(&self.scratch[..len]).into(), ..staged.section };
        let flags = if self.segments == 0 { FIRST } else { 0 };
        let header = self.header(section, slot.epoch(), flags);
        slot.mapping().write(staged.offset, header.as_bytes());
        let write = Write {
            id: self.sequence,
            remote: self.keys.ring,
            remote_offset: self.shape.place(self.written).0 as u64,
            local: slot.key(),
            local_offset: staged.offset as u64,
            len: stride as u32,
        };
        if section.kind.get() == kind::TRAILER {
            reached("commit-due");
            self.lane.commit(&write, deadline)?;
            reached("committed");
        } else {
            if self.segments > 0 {
                reached("mid-record");
            }
            make_room(self.lane.as_mut(), deadline)?;
            self.lane.post_writes(&[write])?;
        }
        self.written += stride as u64;
        self.segments += 1;
        self.bytes += stride as u64;
        self.chain.update(section.as_bytes());
        Ok(waited)
    }

    /// The next segment's header, sealed.
    fn header(&mut self, section: SectionHeader, epoch: Epoch, flags: u16) -> SegmentHeader {
        self.sequence += 1;
        let header = SegmentHeader {
            magic: MAGIC.into(),
            version: VERSION.into(),
            flags: flags.into(),
            nonce: self.nonce.into(),
            sequence: self.sequence.into(),
            epoch: epoch.0.into(),
            section,
            check: 0.into(),
        };
        header.sealed()
    }

    /// Fills the ring up to its end. Once a lap, so waiting for the write costs nothing worth saving and frees the mailbox.
    fn pad(&mut self, room: usize, epoch: Epoch, deadline: Deadline) -> Result<(), ShipError> {
        let section = SectionHeader {
            kind: kind::PAD.into(),
            flags: CRITICAL.into(),
            len: ((room - HEADER) as u32).into(),
            ..Default::default()
        };
        let header = self.header(section, epoch, 0);
        self.mailbox.mapping.write(PAD_OFFSET, header.as_bytes());
        let write = Write {
            id: self.sequence,
            remote: self.keys.ring,
            remote_offset: self.shape.place(self.written).0 as u64,
            local: self.mailbox.key,
            local_offset: PAD_OFFSET as u64,
            len: HEADER as u32,
        };
        make_room(self.lane.as_mut(), deadline)?;
        self.lane.post_writes(&[write])?;
        drain(self.lane.as_mut(), deadline)?;
        self.written += room as u64;
        Ok(())
    }

    /// Waits until the source has taken so much that `needed` bytes can be written without overwriting anything.
    fn wait_for_room(&mut self, needed: u64, deadline: Deadline) -> Result<Duration, ShipError> {
        debug_assert!(
            needed <= self.shape.bytes && needed.is_multiple_of(ALIGN as u64),
            "no wait can end for {needed}"
        );
        if self.has_room(needed) {
            return Ok(Duration::ZERO);
        }
        let began = Instant::now();
        loop {
            let words = fetch_words(self.lane.as_mut(), &self.mailbox, &self.keys, deadline)?;
            if words.owner_epoch != self.owner_epoch {
                return Err(FabricError::Revoked { was: self.owner_epoch, is: words.owner_epoch }.into());
            }
            if words.refused {
                return Err(ShipError::Refused);
            }
            if let Some(said) = words.consumed {
                let (before, written) = (self.consumed, self.written);
                if said < before || said > written {
                    return Err(ShipError::BadConsumed { said, before, written });
                }
                self.consumed = said;
            }
            if self.has_room(needed) {
                return Ok(began.elapsed());
            }
            if deadline.expired() {
                let (consumed, written, waited) = (self.consumed, self.written, began.elapsed());
                return Err(ShipError::NoRoom { consumed, written, needed, waited });
            }
            // A one-sided peer sends no wake-up: looking again is all there is.
            std::thread::sleep(LOOK_AGAIN.min(deadline.left()));
        }
    }

    fn has_room(&self, needed: u64) -> bool {
        self.written + needed <= self.consumed + self.shape.bytes
    }
}

impl std::fmt::Debug for RingWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut out = f.debug_struct("RingWriter");
        out.field("written", &self.written).field("consumed", &self.consumed).field("epoch", &self.epoch).finish()
    }
}
