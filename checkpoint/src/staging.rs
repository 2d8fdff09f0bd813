//! Staging slots: where an epoch is put together, with the guest stopped, exactly as it will lie in the ring.
//!
//! The pause pays for copying page bytes and nothing else: a slot's memory is taken and touched when it is made, and checksums,
//! sequence numbers and the trailer are left to the thread that ships.
//!
//! An epoch larger than a slot leaves in several *parts*: when a slot is full it is exchanged for an empty one
//! ([`Exchange`]) and the guest stays stopped meanwhile.
//!
//! Copy-on-write staging ([`Staging`]) takes the copying out of the pause, the waiting for slots too: the pages are *held*
//! ([`HeldPages`]) as they are when the guest stands still, it goes on, and they are copied into the slots afterwards. A page that
//! the guest writes before its turn is copied first, by whoever answers its write fault, to be found there. They are copied
//! and not sent from where they are: a segment's checksum must be of the very bytes that are sent, so they are read once in any
//! case, and what is read is nearly written.

use crate::dirty::DirtySet;
use crate::guest::{Epoch, GuestError, RamBlock};
use crate::record::{CRITICAL, HEADER, Head, Run, SectionHeader, TRAILER, Trailer, encoding, kind, stride};
use crate::ring::RingShape;
use belay_transport::fabric::{FabricError, Initiator, LocalKey};
use belay_transport::region::{Mapping, RamFile, RegionError};
use belay_transport::{PAGE_SHIFT, PAGE_SIZE, PageIndex, PageSize, RegionId};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use zerocopy::IntoBytes;

/// A segment staged and not yet sealed: its header's bytes are still to be written.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Staged {
    /// Where in the slot it starts.
    pub offset: usize,
    /// All but the checksum.
    pub section: SectionHeader,
}

/// When an epoch's pages are copied.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Staging {
    /// On write, where the tracker can hold pages and so many are dirty that it shortens the pause; else in the pause.
    #[default]
    Auto,
    /// In the pause.
    Copy,
    /// When the guest has gone on, or right before it writes one.
    Cow,
}

impl Staging {
    /// From so many pages on copying on write pays: of the pause it saves 13 µs at 64 pages, 80 at 256 and 310 at 1,024 (`belay-bench staging
    /// --pages N`), where stopping a guest and letting it go takes some 100, and a page that is written before its turn costs a fault more.
    pub const AUTO_PAGES: u64 = 256;

    /// Whether an epoch of `pages` pages is to be held, by a tracker that can.
    pub fn holds(self, pages: u64) -> bool {
        match self {
            Self::Auto => pages >= Self::AUTO_PAGES,
            Self::Copy => false,
            Self::Cow => pages > 0,
        }
    }
}

/// Pages that stay what they were when they were held, until they are taken. Dropped, it lets go of all of them, and of every writer that waits.
pub trait HeldPages: Send {
    /// Copies `count` held pages into `slot`, at `at`. Each is taken once.
    fn take(
        &mut self,
        region: RegionId,
        first: PageIndex,
        count: u64,
        slot: &Mapping,
        at: usize,
    ) -> Result<(), StageError>;

    /// Ends the holding once all are taken. How many had been copied aside, because the guest was about to write them;
    /// [`StageError::GivenUp`] when one of them was lost before its turn, and what was taken is not what was held;
    /// [`StageError::NotTaken`] when not all are.
    fn end(self: Box<Self>) -> Result<u64, StageError>;
}

/// Memory for one part of a record.
#[derive(Debug)]
pub struct Slot {
    mapping: Arc<Mapping>,
    key: LocalKey,
    body_max: usize,
    used: usize,
    segments: Vec<Staged>,
    /// Page data that has a place and is not there yet.
    copies: Vec<CopyRun>,
    epoch: Epoch,
    last: bool,
}

/// Bytes to be copied from guest memory into a slot.
#[derive(Debug, Clone, Copy)]
struct CopyRun {
    to: usize,
    from: usize,
    len: usize,
}

/// From so many pages on a second thread copies half of them: scattered pages are cold, one core waits for memory most of the
/// time, and the vCPUs' cores are idle in a pause. Below, starting the thread costs as much as it saves.
const PARALLEL_PAGES: usize = 256;

/// Why an epoch could not be staged.
#[derive(Debug, thiserror::Error)]
pub enum StageError {
    #[error("a staging slot of {bytes} bytes is too small for this ring; it takes at least {least}")]
    SlotTooSmall { bytes: usize, least: usize },
    #[error("a staging slot of {bytes} bytes cannot be mapped")]
    Map {
        bytes: usize,
        #[source]
        source: std::io::Error,
    },
    #[error(transparent)]
    Region(#[from] RegionError),
    #[error(transparent)]
    Fabric(#[from] FabricError),
    #[error("{epoch} takes more than the {limit} bytes its record may have (--overflow at the source)")]
    EpochTooLarge { epoch: Epoch, limit: u64 },
    #[error("no staging slot came free within {bound:?}: the source takes nothing in")]
    NoSlot { bound: std::time::Duration },
    #[error("shipping has ended")]
    ShippingEnded,
    #[error(transparent)]
    Guest(#[from] GuestError),
    #[error(
        "page {} of {region} was given up (a hole was punched) before it was in its checkpoint; --staging copy leaves no time for that", .page.0
    )]
    GivenUp { region: RegionId, page: PageIndex },
    #[error(
        "{left} pages of an epoch that was held are not in its record: this is a mistake of belay's, and the record is not sent"
    )]
    NotTaken { left: u64 },
    #[error("page {} of {region} is not held", .page.0)]
    NotHeld { region: RegionId, page: PageIndex },
}

impl Slot {
    /// A slot of `bytes` bytes, allocated, touched and registered, for a ring of `shape`.
    pub fn new(initiator: &mut dyn Initiator, bytes: usize, shape: RingShape) -> Result<Self, StageError> {
        let bytes = bytes.next_multiple_of(PAGE_SIZE);
        let least = stride(shape.body_max) + TRAILER;
        if bytes < least {
            return Err(StageError::SlotTooSmall { bytes, least });
        }
        let file = RamFile::memfd("belay-staging", bytes, PageSize::Small)?;
        let mapping = Arc::new(file.map().map_err(|source| StageError::Map { bytes, source })?);
        file.preallocate_through(&mapping, 1, &|_| ())?;
        let key = initiator.register_local(&mapping)?;
        // Streams and indexes fill whole segments; only each region's last index and data segment may be short.
        let segments = Vec::with_capacity(bytes / stride(PAGE_SIZE) + 64);
        let copies = Vec::with_capacity(bytes / PAGE_SIZE);
        Ok(Self { mapping, key, body_max: shape.body_max, used: 0, segments, copies, epoch: Epoch(0), last: false })
    }

    /// Bytes staged in it.
    pub fn staged_bytes(&self) -> usize {
        self.used
    }

    /// The epoch it holds a part of.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Whether it holds the record's last part.
    pub fn is_last(&self) -> bool {
        self.last
    }

    pub(crate) fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    pub(crate) fn key(&self) -> LocalKey {
        self.key
    }

    pub(crate) fn segments(&self) -> &[Staged] {
        &self.segments
    }

    fn begin(&mut self, epoch: Epoch) {
        self.used = 0;
        self.segments.clear();
        self.copies.clear();
        self.epoch = epoch;
        self.last = false;
    }

    /// Most bytes a next segment's body can have; the trailer's room is kept.
    fn room(&self) -> usize {
        let full = self.segments.len() + 2 > self.segments.capacity();
        let left = self.mapping.len().saturating_sub(self.used + TRAILER + HEADER);
        if full { 0 } else { left.min(self.body_max) }
    }

    /// Lists a segment whose body of `len` bytes lies behind its header's place.
    fn push(&mut self, mut section: SectionHeader, len: usize) {
        section.len = (len as u32).into();
        self.segments.push(Staged { offset: self.used, section });
        self.used += stride(len);
    }
}

impl Slot {
    /// Brings everything listed from where it is.
    fn bring_listed(&mut self, block: &RamBlock, held: &mut Held<'_>) -> Result<(), StageError> {
        match held {
            None => self.copy_listed(&block.alias),
            Some(held) => {
                for run in self.copies.drain(..) {
                    let count = (run.len / PAGE_SIZE) as u64;
                    held.take(block.id, PageIndex::containing(run.from), count, &self.mapping, run.to)?;
                }
            }
        }
        Ok(())
    }

    /// Copies everything listed out of `guest`.
    fn copy_listed(&mut self, guest: &Mapping) {
        let pages = self.copies.iter().map(|run| run.len).sum::<usize>() / PAGE_SIZE;
        let copies = &self.copies[..];
        if pages < PARALLEL_PAGES {
            copy(&self.mapping, guest, copies);
        } else {
            let mut half = 0;
            let middle = copies.iter().position(|run| {
                half += run.len;
                half * 2 > pages * PAGE_SIZE
            });
            let (mine, other) = copies.split_at(middle.unwrap_or(0));
            std::thread::scope(|scope| {
                scope.spawn(|| copy(&self.mapping, guest, mine));
                copy(&self.mapping, guest, other);
            });
        }
        self.copies.clear();
    }
}

/// Two runs ahead are fetched while one is copied.
fn copy(slot: &Mapping, guest: &Mapping, runs: &[CopyRun]) {
    for (at, run) in runs.iter().enumerate() {
        if let Some(ahead) = runs.get(at + 2) {
            guest.prefetch(ahead.from);
        }
        slot.copy_from(run.to, guest, run.from, run.len);
    }
}

/// Takes a full slot away and gives an empty one.
pub trait Exchange {
    /// Hands `full` to shipping; waits for another.
    fn exchange(&mut self, full: Slot) -> Result<Slot, StageError>;
}

/// Who has the pages; the guest's own memory where it stands still.
type Held<'h> = Option<&'h mut dyn HeldPages>;

/// A record that is put together up to some point.
pub struct Unfinished {
    slot: Slot,
    epoch: Epoch,
    limit: u64,
    sent: u64,
    pages: u64,
}

/// Puts one epoch's record together.
pub struct Stager<'a> {
    slot: Option<Slot>,
    exchange: &'a mut dyn Exchange,
    epoch: Epoch,
    limit: u64,
    sent: u64,
    pages: u64,
}

impl<'a> Stager<'a> {
    /// Begins `epoch` in `slot`. The whole record may have `limit` bytes: what the source has reserved.
    pub fn begin(
        mut slot: Slot,
        exchange: &'a mut dyn Exchange,
        epoch: Epoch,
        regions: usize,
        taken_at_ns: u64,
        limit: u64,
    ) -> Result<Self, StageError> {
        slot.begin(epoch);
        let mut stager = Self { slot: Some(slot), exchange, epoch, limit, sent: 0, pages: 0 };
        let head =
            Head { page_shift: PAGE_SHIFT.into(), regions: (regions as u32).into(), taken_at_ns: taken_at_ns.into() };
        stager.stream(kind::HEAD, 0, head.as_bytes())?;
        Ok(stager)
    }

    /// Leaves it where it is.
    pub fn suspend(self) -> Unfinished {
        let Self { slot, epoch, limit, sent, pages, .. } = self;
        Unfinished { slot: slot.expect("held but while it is exchanged"), epoch, limit, sent, pages }
    }

    /// Goes on where [`Stager::suspend`] left it.
    pub fn go_on(unfinished: Unfinished, exchange: &'a mut dyn Exchange) -> Self {
        let Unfinished { slot, epoch, limit, sent, pages } = unfinished;
        Self { slot: Some(slot), exchange, epoch, limit, sent, pages }
    }

    fn slot(&mut self) -> &mut Slot {
        self.slot.as_mut().expect("a slot is always held but while it is exchanged")
    }

    /// Room for at least `least` bytes of body in the current slot, exchanging it when it is full.
    fn room(&mut self, least: usize) -> Result<usize, StageError> {
        let room = self.slot().room();
        if room >= least {
            return Ok(room);
        }
        let full = self.slot.take().expect("held, as above");
        self.sent += full.used as u64;
        let mut fresh = self.exchange.exchange(full)?;
        fresh.begin(self.epoch);
        let room = fresh.room();
        self.slot = Some(fresh);
        Ok(room)
    }

    fn push(&mut self, section: SectionHeader, len: usize) -> Result<(), StageError> {
        let (epoch, limit, sent) = (self.epoch, self.limit, self.sent);
        let slot = self.slot();
        slot.push(section, len);
        if sent + (slot.used + TRAILER) as u64 > limit {
            return Err(StageError::EpochTooLarge { epoch, limit });
        }
        Ok(())
    }

    /// Adds a stream's bytes, in as many sections as it takes.
    pub fn stream(&mut self, kind: u16, id: u16, bytes: &[u8]) -> Result<(), StageError> {
        let section = SectionHeader {
            kind: kind.into(),
            flags: CRITICAL.into(),
            id: id.into(),
            encoding: encoding::NONE.into(),
            ..Default::default()
        };
        let mut rest = bytes;
        while !rest.is_empty() {
            // A stream may be cut anywhere, but a fixed-size section may not: those are all shorter than this.
            let room = self.room(rest.len().min(64))?;
            let (now, later) = rest.split_at(rest.len().min(room));
            let slot = self.slot();
            slot.mapping.write(slot.used + HEADER, now);
            self.push(section, now.len())?;
            rest = later;
        }
        Ok(())
    }

    /// Adds runs of pages as `kind` ([`kind::PAGE_INDEX`] or [`kind::DISCARDS`]), region by region.
    fn runs_of(&mut self, kind: u16, set: &mut DirtySet, region: RegionId) -> Result<(), StageError> {
        let mut section = SectionHeader {
            kind: kind.into(),
            flags: CRITICAL.into(),
            id: region.0.into(),
            encoding: encoding::RUNS.into(),
            ..Default::default()
        };
        let (mut len, mut room) = (0, 0);
        for (first, count) in set.runs(region) {
            let run = Run { first: first.0.into(), count: count.into() };
            let bytes = run.as_bytes();
            if len + bytes.len() > room {
                if len > 0 {
                    section.items = ((len / size_of::<Run>()) as u32).into();
                    self.push(section, len)?;
                }
                room = self.room(bytes.len())?;
                len = 0;
            }
            let slot = self.slot();
            slot.mapping.write(slot.used + HEADER + len, bytes);
            len += bytes.len();
        }
        if len > 0 {
            section.items = ((len / size_of::<Run>()) as u32).into();
            self.push(section, len)?;
        }
        Ok(())
    }

    /// Adds discarded pages, which will read as zero.
    pub fn discards(&mut self, set: &mut DirtySet, memory: &[RamBlock]) -> Result<(), StageError> {
        for block in memory {
            self.runs_of(kind::DISCARDS, set, block.id)?;
        }
        Ok(())
    }

    /// Adds the pages of `set` with their bytes as they are now in the guest's memory.
    pub fn pages(&mut self, set: &mut DirtySet, memory: &[RamBlock]) -> Result<(), StageError> {
        self.pages_of(set, memory, None)
    }

    /// Adds the pages of `set` with their bytes as `held` has them.
    pub fn held_pages(
        &mut self,
        set: &mut DirtySet,
        memory: &[RamBlock],
        held: &mut dyn HeldPages,
    ) -> Result<(), StageError> {
        self.pages_of(set, memory, Some(held))
    }

    fn pages_of(&mut self, set: &mut DirtySet, memory: &[RamBlock], mut held: Held<'_>) -> Result<(), StageError> {
        for block in memory {
            self.runs_of(kind::PAGE_INDEX, set, block.id)?;
            self.page_data(set, block, &mut held)?;
        }
        Ok(())
    }

    fn page_data(&mut self, set: &mut DirtySet, block: &RamBlock, held: &mut Held<'_>) -> Result<(), StageError> {
        let mut section = SectionHeader {
            kind: kind::PAGE_DATA.into(),
            flags: CRITICAL.into(),
            id: block.id.0.into(),
            encoding: encoding::RAW_4K.into(),
            ..Default::default()
        };
        let (mut len, mut room) = (0, 0);
        for (first, count) in set.runs(block.id) {
            let (mut from, mut left) = (first.offset(), count as usize * PAGE_SIZE);
            while left > 0 {
                if room - len < PAGE_SIZE {
                    if len > 0 {
                        section.items = ((len / PAGE_SIZE) as u32).into();
                        self.push(section, len)?;
                    }
                    if self.slot().room() < PAGE_SIZE {
                        // It is about to be exchanged, and must be whole by then.
                        self.slot().bring_listed(block, held)?;
                    }
                    room = self.room(PAGE_SIZE)?;
                    len = 0;
                }
                let take = left.min((room - len) / PAGE_SIZE * PAGE_SIZE);
                let slot = self.slot();
                slot.copies.push(CopyRun { to: slot.used + HEADER + len, from, len: take });
                len += take;
                from += take;
                left -= take;
            }
            self.pages += count;
        }
        if len > 0 {
            section.items = ((len / PAGE_SIZE) as u32).into();
            self.push(section, len)?;
        }
        self.slot().bring_listed(block, held)
    }

    /// Pages of data added so far.
    pub fn page_count(&self) -> u64 {
        self.pages
    }

    /// Ends the record with its trailer (filled in when it is shipped) and gives the last part, and the bytes of all parts.
    pub fn finish(mut self) -> Result<(Slot, u64), StageError> {
        let section = SectionHeader { kind: kind::TRAILER.into(), flags: CRITICAL.into(), ..Default::default() };
        self.slot().push(section, size_of::<Trailer>());
        let mut slot = self.slot.take().expect("held, as above");
        slot.last = true;
        let bytes = self.sent + slot.used as u64;
        Ok((slot, bytes))
    }
}
