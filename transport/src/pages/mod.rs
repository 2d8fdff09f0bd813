//! The state of every frame of a guest, one byte each, in a file that outlives the page server.
//!
//! PTE presence is never the truth: after a zap it says absent while the page cache holds newer bytes. These bytes are. The
//! file is a memfd, or lies on tmpfs in the state directory, where a new page server finds it again beside the userfaultfd.
//!
//! ```text
//!   0      magic "BELAYPGS" · version u32 · regions u32
//!   16     one entry a region: id u64 · log2 of the frame size u64 · frames u64 · offset of its bytes u64
//!   4096   the bytes of the first region, each region from a multiple of 64
//! ```

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
#[cfg(test)]
mod golden;
pub mod state;

pub use state::{Discard, Landing, State};

use crate::region::{Mapping, RamFile, RegionError};
use crate::units::{FrameIndex, PageSize, RegionId};
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicI64, AtomicU8, Ordering};

const MAGIC: u64 = u64::from_le_bytes(*b"BELAYPGS");
const VERSION: u64 = 1;
const HEADER: usize = 4096;
const ENTRY: usize = 32;
/// Regions that fit the header.
pub const MAX_REGIONS: usize = (HEADER - 16) / ENTRY;

/// One region's shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionGeometry {
    pub id: RegionId,
    pub page_size: PageSize,
    pub frames: u64,
}

/// Why a state file could not be made or opened.
#[derive(Debug, thiserror::Error)]
pub enum PagesError {
    #[error("{count} regions, where 1 to {MAX_REGIONS} are possible")]
    RegionCount { count: u64 },
    #[error("region {id} has {frames} frames of 2^{shift} bytes, which no guest has")]
    Geometry { id: u64, frames: u64, shift: u64 },
    #[error("two regions have the id {id}")]
    DuplicateId { id: u64 },
    #[error("not a page-state file (magic {magic:#x})")]
    Magic { magic: u64 },
    #[error("page-state file of version {version}, this program knows {VERSION}")]
    Version { version: u64 },
    #[error("the page-state file ends at {len} bytes, its header needs {needed}")]
    Truncated { len: u64, needed: u64 },
    #[error("frame {frame} of region {id} has the impossible state {byte}")]
    BadState { id: u64, frame: u64, byte: u8 },
    #[error("page states")]
    Region(#[from] RegionError),
    #[error("mapping the page states")]
    Map(#[source] io::Error),
}

/// How many frames are in each state. In sum always the number of frames, except for the instant of a transition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    pub absent: u64,
    pub in_flight: u64,
    pub landed: u64,
    pub discarded: u64,
    pub failed: u64,
}

#[derive(Debug)]
struct Region {
    geometry: RegionGeometry,
    /// Of its first byte in the file.
    offset: usize,
}

/// Everybody's view of the states. Transitions are methods; none can be made that the diagram in [`state`] does not have.
#[derive(Debug)]
pub struct PageStates {
    regions: Vec<Region>,
    mapping: Mapping,
    file: RamFile,
    /// Indexed by [`slot`]. Signed, because two transitions of one frame may be counted in either order.
    counts: [AtomicI64; 5],
}

impl PageStates {
    /// All frames absent, in a memfd.
    pub fn in_memory(regions: &[RegionGeometry]) -> Result<Self, PagesError> {
        let len = file_len(&layout(regions)?);
        Self::create(RamFile::memfd("belay-page-states", len, PageSize::Small)?, regions)
    }

    /// All frames absent, in a new file (on tmpfs).
    pub fn create_in(path: &Path, regions: &[RegionGeometry]) -> Result<Self, PagesError> {
        let len = file_len(&layout(regions)?);
        Self::create(RamFile::create_in(path, len, PageSize::Small)?, regions)
    }

    fn create(file: RamFile, regions: &[RegionGeometry]) -> Result<Self, PagesError> {
        let regions = layout(regions)?;
        file.preallocate(1, &|_| ())?;
        let mapping = file.map().map_err(PagesError::Map)?;
        for (index, region) in regions.iter().enumerate() {
            let entry = 16 + index * ENTRY;
            let words = [
                u64::from(region.geometry.id.0),
                u64::from(region.geometry.page_size.shift()),
                region.geometry.frames,
                region.offset as u64,
            ];
            for (word, value) in words.into_iter().enumerate() {
                mapping.store_u64(entry + word * 8, value, Ordering::Relaxed);
            }
        }
        mapping.store_u64(8, VERSION | (regions.len() as u64) << 32, Ordering::Relaxed);
        // The magic last: a file whose making was cut short is no state file.
        mapping.store_u64(0, MAGIC, Ordering::Release);
        Ok(Self::counted(regions, mapping, file))
    }

    /// The states an earlier page server left. It must be gone: its READs then are too, so frames it had in flight, and those
    /// its fabric failed, are absent again. Those with a discard wanted stay so; the engine zeroes them first.
    pub fn open(file: RamFile) -> Result<Self, PagesError> {
        let mapping = file.map().map_err(PagesError::Map)?;
        let regions = read_header(&mapping)?;
        for region in &regions {
            for frame in 0..region.geometry.frames {
                let byte = mapping.atomic_u8(region.offset + frame as usize);
                let found = byte.load(Ordering::Acquire);
                match State::from_byte(found) {
                    Some(State::InFlight | State::Failed) => byte.store(State::Absent as u8, Ordering::Release),
                    Some(_) => {}
                    None => {
                        let id = u64::from(region.geometry.id.0);
                        return Err(PagesError::BadState { id, frame, byte: found });
                    }
                }
            }
        }
        Ok(Self::counted(regions, mapping, file))
    }

    fn counted(regions: Vec<Region>, mapping: Mapping, file: RamFile) -> Self {
        let states = Self { regions, mapping, file, counts: Default::default() };
        for (index, region) in states.regions.iter().enumerate() {
            for frame in 0..region.geometry.frames {
                let found = states.state_at(index, FrameIndex(frame));
                states.counts[slot(found)].fetch_add(1, Ordering::Relaxed);
            }
        }
        states
    }

    /// The file, for handing to a new page server.
    pub fn file(&self) -> &RamFile {
        &self.file
    }

    /// The regions' shapes, in the order of their indexes.
    pub fn geometry(&self) -> impl ExactSizeIterator<Item = RegionGeometry> + '_ {
        self.regions.iter().map(|region| region.geometry)
    }

    /// Index of a region for the `_at` methods.
    pub fn index_of(&self, id: RegionId) -> Option<usize> {
        self.regions.iter().position(|region| region.geometry.id == id)
    }

    /// How many frames are in each state.
    pub fn counts(&self) -> Counts {
        let count = |state| u64::try_from(self.counts[slot(state)].load(Ordering::Acquire)).unwrap_or(0);
        Counts {
            absent: count(State::Absent),
            in_flight: count(State::InFlight),
            landed: count(State::Landed),
            discarded: count(State::Discarded),
            failed: count(State::Failed),
        }
    }

    /// The state of a frame. Panics when there is no such frame, as all methods do.
    #[inline]
    pub fn state_at(&self, region: usize, frame: FrameIndex) -> State {
        state::load(self.byte(region, frame))
    }

    /// Absent → InFlight; whether this caller won.
    #[inline]
    pub fn claim(&self, region: usize, frame: FrameIndex) -> bool {
        let won = state::claim(self.byte(region, frame));
        if won {
            self.moved(State::Absent, State::InFlight, 1);
        }
        won
    }

    /// Claims frames from `first` upwards until one is not absent or `most` are claimed; how many. Counted once.
    #[inline]
    pub fn claim_run(&self, region: usize, first: FrameIndex, most: u64) -> u64 {
        let mut run = 0;
        while run < most && state::claim(self.byte(region, FrameIndex(first.0 + run))) {
            run += 1;
        }
        if run > 0 {
            self.moved(State::Absent, State::InFlight, run);
        }
        run
    }

    /// Lands `count` claimed frames. `wanted` is called for each the guest gave up meanwhile: it must zero the frame, which
    /// is then settled as Discarded.
    #[inline]
    pub fn land_run(&self, region: usize, first: FrameIndex, count: u64, wanted: &mut dyn FnMut(FrameIndex)) {
        let mut landed = 0;
        for frame in (first.0..first.0 + count).map(FrameIndex) {
            let byte = self.byte(region, frame);
            match state::land(byte) {
                Landing::Landed => landed += 1,
                Landing::DiscardWanted => {
                    wanted(frame);
                    state::settle_discard(byte);
                    self.moved(State::InFlight, State::Discarded, 1);
                }
            }
        }
        if landed > 0 {
            self.moved(State::InFlight, State::Landed, landed);
        }
    }

    /// Gives `count` claims back that were never posted. `wanted` as in [`PageStates::land_run`].
    pub fn release_run(&self, region: usize, first: FrameIndex, count: u64, wanted: &mut dyn FnMut(FrameIndex)) {
        for frame in (first.0..first.0 + count).map(FrameIndex) {
            let byte = self.byte(region, frame);
            if state::release(byte) {
                wanted(frame);
                state::settle_discard(byte);
                self.moved(State::InFlight, State::Discarded, 1);
            } else {
                self.moved(State::InFlight, State::Absent, 1);
            }
        }
    }

    /// The READ of `count` claimed frames failed and can no longer write them. `wanted` as in [`PageStates::land_run`].
    pub fn fail_run(&self, region: usize, first: FrameIndex, count: u64, wanted: &mut dyn FnMut(FrameIndex)) {
        for frame in (first.0..first.0 + count).map(FrameIndex) {
            let byte = self.byte(region, frame);
            if state::fail(byte) {
                wanted(frame);
                state::settle_discard(byte);
                self.moved(State::InFlight, State::Discarded, 1);
            } else {
                self.moved(State::InFlight, State::Failed, 1);
            }
        }
    }

    /// Settles a discard an earlier page server left wanted, once the frame is zero.
    pub fn settle_discard(&self, region: usize, frame: FrameIndex) {
        state::settle_discard(self.byte(region, frame));
        self.moved(State::InFlight, State::Discarded, 1);
    }

    /// The guest gave the frame up.
    pub fn discard(&self, region: usize, frame: FrameIndex) -> Discard {
        let outcome = state::discard(self.byte(region, frame));
        if let Discard::Settled { was } = outcome
            && was != State::Discarded
        {
            self.moved(was, State::Discarded, 1);
        }
        outcome
    }

    #[inline]
    fn byte(&self, region: usize, frame: FrameIndex) -> &AtomicU8 {
        let region = &self.regions[region];
        assert!(frame.0 < region.geometry.frames, "{frame:?} in a region of {} frames", region.geometry.frames);
        self.mapping.atomic_u8(region.offset + frame.0 as usize)
    }

    #[inline]
    fn moved(&self, from: State, to: State, count: u64) {
        self.counts[slot(to)].fetch_add(count as i64, Ordering::AcqRel);
        self.counts[slot(from)].fetch_sub(count as i64, Ordering::AcqRel);
    }
}

/// DiscardWanted counts as in flight.
const fn slot(state: State) -> usize {
    match state {
        State::Absent => 0,
        State::InFlight | State::DiscardWanted => 1,
        State::Landed => 2,
        State::Discarded => 3,
        State::Failed => 4,
    }
}

/// Places regions behind the header, after checking that they are possible.
fn layout(regions: &[RegionGeometry]) -> Result<Vec<Region>, PagesError> {
    if regions.is_empty() || regions.len() > MAX_REGIONS {
        return Err(PagesError::RegionCount { count: regions.len() as u64 });
    }
    let mut offset = HEADER;
    let mut placed: Vec<Region> = Vec::with_capacity(regions.len());
    for geometry in regions.iter().copied() {
        let id = u64::from(geometry.id.0);
        if placed.iter().any(|other| other.geometry.id == geometry.id) {
            return Err(PagesError::DuplicateId { id });
        }
        let shift = geometry.page_size.shift();
        if geometry.frames == 0 || geometry.frames > 1 << (56 - shift) {
            return Err(PagesError::Geometry { id, frames: geometry.frames, shift: u64::from(shift) });
        }
        placed.push(Region { geometry, offset });
        offset += (geometry.frames as usize).next_multiple_of(64);
    }
    Ok(placed)
}

fn file_len(regions: &[Region]) -> usize {
    let end = regions.last().map_or(HEADER, |last| last.offset + last.geometry.frames as usize);
    end.next_multiple_of(PageSize::Small.bytes())
}

fn read_header(mapping: &Mapping) -> Result<Vec<Region>, PagesError> {
    let word = |offset| mapping.load_u64(offset, Ordering::Acquire);
    let magic = word(0);
    if magic != MAGIC {
        return Err(PagesError::Magic { magic });
    }
    let (version, count) = (word(8) & 0xffff_ffff, word(8) >> 32);
    if version != VERSION {
        return Err(PagesError::Version { version });
    }
    if count == 0 || count > MAX_REGIONS as u64 {
        return Err(PagesError::RegionCount { count });
    }
    let mut regions = Vec::with_capacity(count as usize);
    for entry in (0..count as usize).map(|index| 16 + index * ENTRY) {
        let (id, shift, frames) = (word(entry), word(entry + 8), word(entry + 16));
        let page_size = [PageSize::Small, PageSize::Huge].into_iter().find(|size| u64::from(size.shift()) == shift);
        let (Some(page_size), Ok(small_id)) = (page_size, u16::try_from(id)) else {
            return Err(PagesError::Geometry { id, frames, shift });
        };
        regions.push(RegionGeometry { id: RegionId(small_id), page_size, frames });
    }
    let regions = layout(&regions)?;
    let (len, needed) = (mapping.len() as u64, file_len(&regions) as u64);
    if len < needed {
        return Err(PagesError::Truncated { len, needed });
    }
    Ok(regions)
}

#[cfg(test)]
mod tests;
