//! A record that is believed where it lies, in a ring that stands still.
//!
//! While a session lives a segment is copied into private memory before it is judged, because the destination may change the ring between the
//! check and the use of a byte ([`super::reader`]). After a revocation that proves that nobody writes any more that copy buys nothing, and it is
//! most of what a catch costs: so only what is *parsed* is copied, and page data stays in the ring, is checked there and is copied once, to
//! guest RAM.
//!
//! ```text
//!              spooled while the session lived │ in the ring
//! record    =  segment … segment               │ index  data …… data  index  data … trailer
//! spool     =  all of it                       │ all    header ░░░░░  all    header all          ░ not there: PAGE_DATA bodies
//! ```
//! Rules of this room:
//! * The proof is in the type: [`Still`] is made of a [`StillRing`], which only a revocation hands out, or of a borrowed slice.
//! * Only a whole and right record is taken so. Whatever else is there, torn, wrong or hostile, is left to [`RingReader::step`], whose
//!   answers are the same for every ring. The same headers are held against the same limits, in the same order.
//! * The place in the ring moves on only when the record is in guest RAM and kept ([`RingReader::pass`]): until then it lies in the ring, and
//!   whoever takes over from a process that dies finds it there.

use super::RingBytes;
use super::reader::RingReader;
use super::spool::Place;
use crate::guest::Epoch;
use crate::record::{HEADER, PageSource, crc, kind};
use crate::share::{self, share};
use belay_transport::PAGE_SIZE;
use belay_transport::fabric::StillRing;
use belay_transport::region::Mapping;
use std::sync::atomic::{AtomicBool, Ordering};
use zerocopy::IntoBytes;

/// The bytes of a ring that nobody changes for as long as they are borrowed.
#[derive(Debug, Clone, Copy)]
pub enum Still<'r> {
    /// As a revocation proves it.
    Ring(StillRing<'r>),
    /// A private copy.
    Private(&'r [u8]),
}

impl RingBytes for Still<'_> {
    fn len(&self) -> usize {
        match self {
            Self::Ring(ring) => ring.len(),
            Self::Private(bytes) => bytes.len(),
        }
    }

    fn read(&self, offset: usize, into: &mut [u8]) {
        match self {
            Self::Ring(ring) => ring.read(offset, into),
            Self::Private(bytes) => RingBytes::read(*bytes, offset, into),
        }
    }
}

/// Page data that was left in the ring.
#[derive(Debug)]
struct Body {
    /// In the record, in bytes.
    at: usize,
    len: usize,
    /// In the ring.
    offset: usize,
    checksum: u64,
}

/// A whole record, checked, whose page data lies in the ring.
#[derive(Debug)]
pub struct InPlace<'r> {
    /// The record without that data: where it would be, these bytes mean nothing.
    image: &'r [u8],
    ring: Still<'r>,
    /// In the order of the record.
    bodies: Vec<Body>,
    after: Place,
}

impl InPlace<'_> {
    /// The record for [`crate::record::parse`], which reads no page data where checksums are not to be verified again.
    pub(crate) fn image(&self) -> &[u8] {
        self.image
    }

    /// Which epoch it is.
    pub fn epoch(&self) -> Epoch {
        self.after.epoch
    }

    /// Where the ring is read to once this record is given up.
    pub(crate) fn after(&self) -> Place {
        self.after
    }

    /// The record as the other way of reading it puts it together.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn whole(&self) -> Vec<u8> {
        let mut whole = self.image.to_vec();
        for body in &self.bodies {
            self.ring.read(body.offset, &mut whole[body.at..body.at + body.len]);
        }
        whole
    }

    /// By way of `private` memory, because no reference to a ring's bytes is ever made; it stays in a second-level cache, and is used again.
    fn is_right(&self, body: &Body, private: &mut Vec<u8>) -> bool {
        private.resize(body.len.max(private.len()), 0);
        let private = &mut private[..body.len];
        self.ring.read(body.offset, private);
        crc(private) == body.checksum
    }
}

impl PageSource for InPlace<'_> {
    fn copy_to(&self, at: usize, len: usize, ram: &Mapping, offset: usize) {
        // The last that begins there or before. Page bytes never reach over a segment's end.
        let before = self.bodies.partition_point(|body| body.at <= at);
        match before.checked_sub(1).map(|last| &self.bodies[last]).filter(|body| at < body.at + body.len) {
            None => ram.write(offset, &self.image[at..at + len]),
            Some(body) => {
                assert!(at + len <= body.at + body.len, "page bytes {at}+{len} lie in one segment");
                match self.ring {
                    Still::Ring(ring) => ring.copy_to(body.offset + at - body.at, len, ram, offset),
                    Still::Private(bytes) => ram.write(offset, &bytes[body.offset + at - body.at..][..len]),
                }
            }
        }
    }
}

impl RingReader {
    /// The next record, if all of it is in `ring` (or was spooled from there before) and right. `None` leaves everything as it was: what is
    /// there is for [`RingReader::step`] to say.
    pub fn in_place<'r>(&'r mut self, ring: Still<'r>) -> Option<InPlace<'r>> {
        let mut at = *self.place();
        if at.complete {
            return None;
        }
        let mut bodies = Vec::new();
        while !at.complete {
            let (offset, header) = self.next_header(&at, &ring).ok()??;
            let len = header.section.len.get() as usize;
            if header.section.kind.get() == kind::PAD {
                at = at.after_pad(header.sequence.get(), self.shape().room(at.consumed));
                continue;
            }
            let place = self.spool_mut().get_mut(at.used..at.used + header.stride())?;
            let (place_header, rest) = place.split_at_mut(HEADER);
            let (body, padding) = rest.split_at_mut(len);
            place_header.copy_from_slice(header.as_bytes());
            padding.fill(0);
            let checksum = header.section.checksum.get();
            // What holds no page is not worth an entry; so there are no more of these than pages in the ring.
            if header.section.kind.get() == kind::PAGE_DATA && len >= PAGE_SIZE {
                bodies.push(Body { at: at.used + HEADER, len, offset: offset + HEADER, checksum });
            } else {
                ring.read(offset + HEADER, body);
                if crc(body) != checksum {
                    return None;
                }
            }
            at = at.after(&header);
        }
        let record = InPlace { image: &self.spool()[..at.used], ring, bodies, after: at.given_up() };
        let wrong = AtomicBool::new(false);
        let check = |private: &mut Vec<u8>, body: usize| {
            if !wrong.load(Ordering::Relaxed) && !record.is_right(&record.bodies[body], private) {
                wrong.store(true, Ordering::Relaxed);
            }
        };
        let bytes: usize = record.bodies.iter().map(|body| body.len).sum();
        share(share::threads_for(bytes), record.bodies.len(), Vec::new, check, |_| ());
        (!wrong.into_inner()).then_some(record)
    }

    /// Gives up the record of [`RingReader::in_place`] that `after` is of.
    pub(crate) fn pass(&mut self, after: Place) {
        let now = self.place();
        assert!(!now.complete && now.nonce == after.nonce && now.epoch.next() == after.epoch, "{now:?} to {after:?}");
        self.set_place(after);
    }
}
