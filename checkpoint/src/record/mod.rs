//! The checkpoint record: its sections as bytes, the same in a staging slot, in the ring and at rest.
//!
//! ```text
//! record  = segment … segment trailer                every segment starts on a multiple of 64 bytes
//! segment = SegmentHeader (64) | body (len) | padding to 64
//! ```
//! A segment carries one *section*: a kind, whether it is critical, the region or device it belongs to, how its units are
//! encoded, its length and the CRC-64/NVME of its body. The header has a CRC of its own, so that lengths are believed only
//! when they are whole. Nonce and sequence number place the segment in its session and make a segment of an older lap of
//! the ring impossible to mistake for a new one. The trailer closes the record: it says how many segments came before and
//! carries a CRC over all their headers (and through them over every body). **A record without a valid trailer does not exist.**
//!
//! Large content is split over several sections of one kind: device state and held output are streams, cut anywhere; a page
//! index lists runs of pages, and the page data of a region follows in the order of its index.
//!
//! Readers refuse unknown critical sections and encodings and skip other unknown sections. The peer is trusted for what pages
//! hold and never for a length, an index or an address: everything else is checked against [`Limits`].

mod view;

pub(crate) use view::PageSource;
pub use view::{PageRun, RecordView, parse};

use belay_transport::{PAGE_SIZE, RegionId};
use crc_fast::{CrcAlgorithm, checksum};
use std::ops::Range;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// `BLYr`, the first four bytes of every segment.
pub const MAGIC: u32 = u32::from_le_bytes(*b"BLYr");
/// Version of the format. A reader takes its own version and no other; new kinds of sections do not change it.
pub const VERSION: u16 = 1;
/// Segments start on multiples of this.
pub const ALIGN: usize = 64;
/// Bytes of a [`SegmentHeader`].
pub const HEADER: usize = size_of::<SegmentHeader>();
/// Bytes a trailer segment takes.
pub const TRAILER: usize = HEADER + ALIGN;

/// What a section is. Numbers are never used again for something else.
pub mod kind {
    /// The record's beginning: [`super::Head`].
    pub const HEAD: u16 = 1;
    /// Runs of pages whose bytes follow in `PAGE_DATA`: [`super::Run`]s in ascending order, `id` is the region.
    pub const PAGE_INDEX: u16 = 2;
    /// Pages of region `id`, in the order of its index.
    pub const PAGE_DATA: u16 = 3;
    /// Runs of pages that were discarded and read as zero: [`super::Run`]s in ascending order, `id` is the region.
    pub const DISCARDS: u16 = 4;
    /// vCPU and device state, a stream; `id` is the device ([`super::DEVICE_VMM`] for what a VMM saves as one).
    pub const DEVICE_STATE: u16 = 5;
    /// Packets the guest emitted in this epoch, a stream of [`super::PacketHeader`] and bytes.
    pub const HELD_OUTPUT: u16 = 6;
    /// The highest packet sequence known to have left for the world when the epoch was closed: a u64.
    pub const RELEASED_UP_TO: u16 = 7;
    /// What the guest did to a writable disk, a stream; `id` is the disk, its encoding that of whoever keeps the disk ([`crate::storage`]).
    pub const DISK_WRITES: u16 = 8;
    /// Fills a ring up to its end. Belongs to no record.
    pub const PAD: u16 = 0xfffe;
    /// Ends a record: [`super::Trailer`].
    pub const TRAILER: u16 = 0xffff;
}

/// How the units of a section are encoded.
pub mod encoding {
    /// A section that has no units.
    pub const NONE: u16 = 0;
    /// [`super::Run`]s.
    pub const RUNS: u16 = 1;
    /// Pages of 4096 bytes as they are. Other numbers are for compressed pages one day.
    pub const RAW_4K: u16 = 2;
}

/// Section flag: a reader that does not know the kind must refuse the record.
pub const CRITICAL: u16 = 1;
/// Segment flag: first of its record.
pub const FIRST: u16 = 1;
/// The device id under which a VMM's own saved state travels.
pub const DEVICE_VMM: u16 = 0;

/// What a segment carries.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SectionHeader {
    /// See [`kind`].
    pub kind: U16,
    /// [`CRITICAL`].
    pub flags: U16,
    /// Region or device.
    pub id: U16,
    /// See [`encoding`].
    pub encoding: U16,
    /// Runs or pages; 0 where the body is a stream.
    pub items: U32,
    /// Bytes of the body.
    pub len: U32,
    /// CRC-64/NVME of the body.
    pub checksum: U64,
}
const _: () = assert!(size_of::<SectionHeader>() == 24);

/// First bytes of a segment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SegmentHeader {
    /// [`MAGIC`].
    pub magic: U32,
    /// [`VERSION`].
    pub version: U16,
    /// [`FIRST`].
    pub flags: U16,
    /// Of the session, chosen at random by the source.
    pub nonce: U64,
    /// Counted from 1 over all segments of a session, pads included.
    pub sequence: U64,
    /// The record this segment belongs to.
    pub epoch: U64,
    /// What it carries.
    pub section: SectionHeader,
    /// CRC-64/NVME of the bytes before this field.
    pub check: U64,
}
const _: () = assert!(size_of::<SegmentHeader>() == 64);

impl SegmentHeader {
    /// The header with its check filled in.
    pub fn sealed(mut self) -> Self {
        self.check = U64::new(self.sum());
        self
    }

    /// Whether magic and check are right: the header is whole, and everything in it is as its writer meant it.
    pub fn is_whole(&self) -> bool {
        self.magic.get() == MAGIC && self.check.get() == self.sum()
    }

    fn sum(&self) -> u64 {
        let bytes = self.as_bytes();
        crc(&bytes[..HEADER - size_of::<U64>()])
    }

    /// Bytes the segment takes, header and padding included.
    pub fn stride(&self) -> usize {
        stride(self.section.len.get() as usize)
    }
}

/// Bytes a segment with a body of `len` bytes takes.
pub const fn stride(len: usize) -> usize {
    (HEADER + len).next_multiple_of(ALIGN)
}

/// CRC-64/NVME.
pub fn crc(bytes: &[u8]) -> u64 {
    checksum(CrcAlgorithm::Crc64Nvme, bytes)
}

/// Most bytes that one page takes in a record: its data, a run and a header of its own, and its share of what index segments
/// need.
pub const RECORD_PAGE_BYTES: u64 = (PAGE_SIZE + size_of::<Run>() + HEADER + 8) as u64;
/// Bytes kept for everything else: device state, held output, the segments that are always there.
pub const RECORD_OVERHEAD_BYTES: u64 = 1 << 20;

/// Bytes to reserve (`--overflow`) so that a record of all of a guest's `pages` fits, with device state and output of a megabyte
/// less a little.
pub const fn largest_record(pages: u64) -> u64 {
    pages * RECORD_PAGE_BYTES + RECORD_OVERHEAD_BYTES
}

/// Body of [`kind::HEAD`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Head {
    /// log2 of the page size that indexes count in.
    pub page_shift: U32,
    /// Number of regions of the guest.
    pub regions: U32,
    /// CLOCK_BOOTTIME of the writer at the instant the record shows, in ns. For reports; clocks are never compared.
    pub taken_at_ns: U64,
}
const _: () = assert!(size_of::<Head>() == 16);

/// A run of 4 KiB pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Run {
    pub first: U64,
    pub count: U64,
}
const _: () = assert!(size_of::<Run>() == 16);

/// What precedes each packet's bytes in held output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct PacketHeader {
    pub sequence: U64,
    pub len: U32,
}
const _: () = assert!(size_of::<PacketHeader>() == 12);

/// Body of [`kind::TRAILER`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Trailer {
    /// Segments before this one.
    pub segments: U64,
    /// Bytes they take, headers and padding included.
    pub bytes: U64,
    /// CRC-64/NVME over their headers' `section` fields, in order.
    pub chain: U64,
    pub reserved: U64,
}
const _: () = assert!(size_of::<Trailer>() == 32);

/// What a reader holds a record against.
#[derive(Debug, Clone)]
pub struct Limits {
    /// The guest's regions and their sizes in 4 KiB pages.
    pub regions: Vec<(RegionId, u64)>,
    /// Most bytes of device state.
    pub device_state_bytes: usize,
    /// Most bytes of held output in one record, and in all records whose output is not released yet.
    pub output_bytes: usize,
    /// The guest's writable disks.
    pub disks: u16,
}

impl Limits {
    /// Default bound for device state: a QEMU guest saves 78 kB, large GPUs are not for this format.
    pub const DEVICE_STATE_BYTES: usize = 64 << 20;
    /// Default bound for held output.
    pub const OUTPUT_BYTES: usize = 64 << 20;
    /// Bound for what one record does to one disk.
    pub const DISK_BYTES: usize = 128 << 20;

    /// Default limits for a guest of these regions.
    pub fn for_regions(regions: impl IntoIterator<Item = (RegionId, u64)>) -> Self {
        Self {
            regions: regions.into_iter().collect(),
            device_state_bytes: Self::DEVICE_STATE_BYTES,
            output_bytes: Self::OUTPUT_BYTES,
            disks: 0,
        }
    }

    fn pages_of(&self, id: u16) -> Result<(RegionId, u64), RecordError> {
        let found = self.regions.iter().find(|(region, _)| region.0 == id);
        found.copied().ok_or(RecordError::UnknownRegion { id })
    }

    fn check_run(&self, id: u16, run: &Run, after: u64) -> Result<Range<u64>, RecordError> {
        let (region, pages) = self.pages_of(id)?;
        let (first, count) = (run.first.get(), run.count.get());
        match first.checked_add(count) {
            Some(end) if end <= pages && count > 0 && first >= after => Ok(first..end),
            _ => Err(RecordError::BadRun { region, first, count, after, pages }),
        }
    }
}

/// Why a record was refused. Its checksums were right, so the writer meant it: it is of another version, buggy or hostile.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    #[error("the record is cut off: {needed} bytes needed at {at}, {have} there")]
    Cut { at: usize, needed: usize, have: usize },
    #[error("format version {found}; this belay reads {known}")]
    Version { found: u16, known: u16 },
    #[error("section kind {kind} at byte {at} is critical and not known to this belay")]
    UnknownCritical { kind: u16, at: usize },
    #[error("section kind {kind} has unit encoding {encoding}, which is not known to this belay")]
    UnknownEncoding { kind: u16, encoding: u16 },
    #[error("the body of section kind {kind} at byte {at} has {found} bytes; {wanted} were expected")]
    BadLength { kind: u16, at: usize, found: usize, wanted: usize },
    #[error("the checksum of section kind {kind} at byte {at} is wrong")]
    BadChecksum { kind: u16, at: usize },
    #[error("region {id} is not one of this guest's")]
    UnknownRegion { id: u16 },
    #[error("device {id} is not known to this belay")]
    UnknownDevice { id: u16 },
    #[error(
        "pages {first}+{count} of {region}, which has {pages}, are out of range or out of order (the run before ended at {after})"
    )]
    BadRun { region: RegionId, first: u64, count: u64, after: u64, pages: u64 },
    #[error("{region} has {data} pages of data for {index} pages in its index")]
    DataWithoutIndex { region: RegionId, index: u64, data: u64 },
    #[error("{what} of {found} bytes; the limit is {limit}")]
    TooLarge { what: &'static str, found: usize, limit: usize },
    #[error("held output ends in the middle of a packet")]
    CutPacket,
    #[error("packet {found} follows packet {before}")]
    PacketOrder { before: u64, found: u64 },
    #[error("the record counts in pages of 2^{shift} bytes and has {regions} regions; the guest has {wanted} of 2^12")]
    Geometry { shift: u32, regions: u32, wanted: u32 },
    #[error("the record has {found} of its one {what}")]
    Count { what: &'static str, found: usize },
    #[error("the trailer tells of {said_segments} segments in {said_bytes} bytes; there are {segments} in {bytes}")]
    TrailerMismatch { said_segments: u64, said_bytes: u64, segments: u64, bytes: u64 },
    #[error("the trailer's checksum over the section headers is wrong")]
    ChainMismatch,
}

#[cfg(test)]
pub(crate) mod build;
