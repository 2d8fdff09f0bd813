//! The ring on the source that the destination writes records into, and the region beside it that only the source writes.
//!
//! ```text
//! ring region (destination writes)            owner region (source writes, destination reads)
//!    0  heartbeat counter                        0  owner epoch (transport's, bumped by revocation)
//! 4096  segments, round and round               64  consumed: ring bytes the source has taken, since the session began
//!                                              128  folded-up-to epoch
//!                                              192  applied-up-to epoch (disk writes durable in the image)
//!                                              256  granted heartbeat counter      320  lease length in ns
//!                                              384  refused: the source found a segment or record it will not take
//! ```
//! Rules of this room:
//! * A segment never splits over the ring's end: the writer fills what is left with one pad segment that reaches exactly to it.
//! * The reader takes only the segment with this session's nonce and the last sequence number + 1, at the one position where it
//!   must be. A header or body whose checksum is wrong is *not there yet*. A header that is whole and says something a writer
//!   of ours would not say is an error, and nothing after it is read.
//! * Everything is judged from a private copy; the ring may change under the reader at any time. Only where a revocation has proven that it
//!   stands still is page data checked and taken where it lies ([`InPlace`]).
//! * The writer writes only where the source has said it has taken the bytes (`consumed`). It never overwrites.
//! * Words that steer the other side stand beside their complement, so that one read in the middle of a store is noticed.

mod in_place;
mod reader;
pub(crate) mod spool;
mod writer;

pub use in_place::{InPlace, Still};
pub use reader::{RingBytes, RingError, RingReader, Step};
pub use spool::{Place, Spool, SpoolError};
pub use writer::{Mailbox, OwnerWords, RingWriter, ShipError, Shipped};
pub(crate) use writer::{PULSE_OFFSET, fetch_words, make_room};

use crate::guest::Epoch;
use crate::record::{ALIGN, HEADER, stride};
use belay_transport::PAGE_SIZE;
use belay_transport::fabric::OWNER_EPOCH_OFFSET;
use belay_transport::region::Mapping;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Where the heartbeat counter lies in the ring region.
pub const HEARTBEAT_OFFSET: usize = 0;
/// Where segments begin in the ring region.
pub const SEGMENTS_OFFSET: usize = 4096;
/// Bytes of the owner region.
pub const OWNER_REGION_BYTES: usize = 4096;
/// Bytes of it that are read at once by the destination.
pub(crate) const OWNER_WORDS_BYTES: usize = 512;

const CONSUMED: usize = 64;
const FOLDED: usize = 128;
const APPLIED: usize = 192;
const GRANTED: usize = 256;
const LEASE_NS: usize = 320;
const REFUSED: usize = 384;
const _: () = assert!(OWNER_EPOCH_OFFSET + 8 <= CONSUMED && REFUSED + 16 <= OWNER_WORDS_BYTES);

/// Largest body of a segment: it stays in a second-level cache between copy and checksum.
const BODY_MAX: usize = 63 * PAGE_SIZE;

/// Sizes that both sides derive from the length of the ring region alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingShape {
    /// Bytes for segments.
    pub bytes: u64,
    /// Most bytes in the body of one segment: a whole number of pages.
    pub body_max: usize,
}

/// The ring region is too small to work with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a ring region of {len} bytes is too small; it takes at least {least}")]
pub struct RingTooSmall {
    pub len: usize,
    pub least: usize,
}

impl RingShape {
    /// Least length of a ring region: room for four segments of one page each.
    pub const LEAST: usize = SEGMENTS_OFFSET + 4 * stride(PAGE_SIZE);

    /// The shape of a ring region of `len` bytes.
    pub fn of(len: usize) -> Result<Self, RingTooSmall> {
        let bytes = len.saturating_sub(SEGMENTS_OFFSET) / ALIGN * ALIGN;
        // A quarter, so that little is lost to pads and the writer can be ahead of the reader.
        let body_max = (bytes / 4).saturating_sub(HEADER).min(BODY_MAX) / PAGE_SIZE * PAGE_SIZE;
        if body_max == 0 {
            return Err(RingTooSmall { len, least: Self::LEAST });
        }
        Ok(Self { bytes: bytes as u64, body_max })
    }

    /// Where absolute position `at` lies in the ring region, and how many bytes follow before the ring's end.
    fn place(&self, at: u64) -> (usize, usize) {
        let offset = at % self.bytes;
        (SEGMENTS_OFFSET + offset as usize, (self.bytes - offset) as usize)
    }

    /// Bytes from absolute position `at` to the ring's end.
    fn room(&self, at: u64) -> usize {
        self.place(at).1
    }
}

/// The source's pen for the owner region.
#[derive(Debug, Clone)]
pub struct OwnerRegion {
    mapping: Arc<Mapping>,
}

impl OwnerRegion {
    /// Writes to `mapping`, of at least [`OWNER_REGION_BYTES`]. Epoch 0 counts as folded: it is what RAM holds.
    pub fn new(mapping: Arc<Mapping>) -> Self {
        assert!(mapping.len() >= OWNER_REGION_BYTES, "an owner region of {} bytes", mapping.len());
        let region = Self { mapping };
        for word in [CONSUMED, FOLDED, APPLIED, GRANTED, LEASE_NS, REFUSED] {
            region.put(word, 0);
        }
        region
    }

    fn put(&self, offset: usize, value: u64) {
        self.mapping.store_u64(offset, value, Ordering::Release);
        self.mapping.store_u64(offset + 8, !value, Ordering::Release);
    }

    /// Tells the destination how many ring bytes may be used again, counted from the start of the session.
    pub fn set_consumed(&self, bytes: u64) {
        self.put(CONSUMED, bytes);
    }

    /// Tells the destination which epochs are in guest RAM.
    pub fn set_folded(&self, epoch: Epoch) {
        self.put(FOLDED, epoch.0);
    }

    /// Tells the destination up to which epoch disk writes are durable in the image.
    pub fn set_applied(&self, epoch: Epoch) {
        self.put(APPLIED, epoch.0);
    }

    /// Grants the lease for the heartbeat `counter`.
    pub fn grant(&self, counter: u64, lease: std::time::Duration) {
        self.put(LEASE_NS, u64::try_from(lease.as_nanos()).unwrap_or(u64::MAX));
        self.put(GRANTED, counter);
    }

    /// Tells the destination that nothing more will be taken.
    pub fn set_refused(&self) {
        self.put(REFUSED, 1);
    }
}

#[cfg(test)]
pub(crate) mod golden;
#[cfg(test)]
mod tests;
