//! Reads a whole record out of private memory and checks everything in it before anybody acts on any of it.

use super::*;
use crate::guest::{Epoch, Packet};
use belay_transport::region::Mapping;
use belay_transport::{PAGE_SHIFT, PageIndex};
use crc_fast::Digest;

/// A checked record. It says where page bytes lie in the image it was parsed from, and has none.
#[derive(Debug)]
pub struct RecordView {
    pub epoch: Epoch,
    /// CLOCK_BOOTTIME of the writer when it was taken, in ns.
    pub taken_at_ns: u64,
    /// Runs that read as zero. Apply before [`RecordView::pages`].
    pub discards: Vec<(RegionId, Range<u64>)>,
    /// Runs of pages and where their bytes lie.
    pub pages: Vec<PageRun>,
    /// State of vCPUs and devices as [`crate::guest::Guest::save`] gave it.
    pub device_state: Vec<u8>,
    /// What the guest emitted in this epoch, ascending.
    pub outputs: Vec<Packet>,
    /// Highest packet sequence that had left for the world by then, if any had.
    pub released_up_to: Option<u64>,
    /// What the guest did to each of its disks; empty where it did nothing.
    pub disk_writes: Vec<Vec<u8>>,
}

/// Consecutive pages, and where in the record their bytes lie: within one segment's body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRun {
    pub region: RegionId,
    pub first: PageIndex,
    /// From the record's beginning, in bytes.
    pub at: usize,
    /// In bytes: a multiple of 4096, and not 0.
    pub len: usize,
}

impl PageRun {
    /// Which pages these are.
    pub fn pages(&self) -> Range<u64> {
        self.first.0..self.first.0 + (self.len / PAGE_SIZE) as u64
    }

    /// The bytes, in a record that lies in private memory.
    pub fn bytes_in<'i>(&self, image: &'i [u8]) -> &'i [u8] {
        &image[self.at..self.at + self.len]
    }
}

/// Where the page bytes of a checked record are copied from.
pub(crate) trait PageSource: Sync {
    /// Copies the `len` bytes that lie at `at` in the record to `offset` of `ram`.
    fn copy_to(&self, at: usize, len: usize, ram: &Mapping, offset: usize);
}

/// A record in private memory.
impl PageSource for &[u8] {
    fn copy_to(&self, at: usize, len: usize, ram: &Mapping, offset: usize) {
        ram.write(offset, &self[at..at + len]);
    }
}

impl RecordView {
    /// Bytes of page data in the record.
    pub fn page_bytes(&self) -> usize {
        self.pages.iter().map(|run| run.len).sum()
    }

    /// Pages of data in the record.
    pub fn page_count(&self) -> u64 {
        (self.page_bytes() / PAGE_SIZE) as u64
    }
}

/// A region's index while its data is being matched to it.
struct Matching {
    id: u16,
    runs: Vec<Range<u64>>,
    index_end: u64,
    discards_end: u64,
    index_pages: u64,
    data_pages: u64,
    /// The run the next data page belongs to, and how many of its pages have their data.
    at: (usize, u64),
}

/// Parses `image`, a record from its first segment to its trailer. Bodies' checksums are verified when `verify` is set (the
/// ring's reader has done that already); no byte of page data is looked at when it is not.
pub fn parse(image: &[u8], limits: &Limits, verify: bool) -> Result<RecordView, RecordError> {
    let mut parser = Parser::new(limits);
    let mut at = 0;
    loop {
        let (header, body) = segment_at(image, at)?;
        if verify && crc(body) != header.section.checksum.get() {
            return Err(RecordError::BadChecksum { kind: header.section.kind.get(), at });
        }
        if header.section.kind.get() == kind::TRAILER {
            let after = at + header.stride();
            if after != image.len() {
                return Err(RecordError::Cut { at: after, needed: 0, have: image.len() - after.min(image.len()) });
            }
            return parser.finish(header, body, at);
        }
        parser.section(header, body, at)?;
        at += header.stride();
    }
}

/// The segment at `at` and its body.
fn segment_at(image: &[u8], at: usize) -> Result<(&SegmentHeader, &[u8]), RecordError> {
    let rest = image.get(at..).unwrap_or_default();
    let cut = |needed| RecordError::Cut { at, needed, have: rest.len() };
    let (header, _) = SegmentHeader::ref_from_prefix(rest).map_err(|_| cut(HEADER))?;
    if header.version.get() != VERSION {
        return Err(RecordError::Version { found: header.version.get(), known: VERSION });
    }
    let body = rest.get(HEADER..HEADER + header.section.len.get() as usize).ok_or_else(|| cut(header.stride()))?;
    if rest.len() < header.stride() {
        return Err(cut(header.stride()));
    }
    Ok((header, body))
}

struct Parser<'l> {
    limits: &'l Limits,
    chain: Digest,
    segments: u64,
    head: Option<Head>,
    heads: usize,
    regions: Vec<Matching>,
    output: Vec<u8>,
    view: RecordView,
}

impl<'l> Parser<'l> {
    fn new(limits: &'l Limits) -> Self {
        let view = RecordView {
            epoch: Epoch(0),
            taken_at_ns: 0,
            discards: Vec::new(),
            pages: Vec::new(),
            device_state: Vec::new(),
            outputs: Vec::new(),
            released_up_to: None,
            disk_writes: vec![Vec::new(); usize::from(limits.disks)],
        };
        Self {
            limits,
            chain: Digest::new(CrcAlgorithm::Crc64Nvme),
            segments: 0,
            head: None,
            heads: 0,
            regions: Vec::new(),
            output: Vec::new(),
            view,
        }
    }

    fn section(&mut self, header: &SegmentHeader, body: &[u8], at: usize) -> Result<(), RecordError> {
        let section = &header.section;
        self.chain.update(section.as_bytes());
        self.segments += 1;
        let (kind, id) = (section.kind.get(), section.id.get());
        match kind {
            kind::HEAD => {
                self.heads += 1;
                self.head = Some(exactly(kind, at, body)?);
                Ok(())
            }
            kind::PAGE_INDEX => self.index(section, body, at),
            kind::PAGE_DATA => self.data(section, body, at),
            kind::DISCARDS => self.discards(section, body, at),
            kind::DEVICE_STATE if id != DEVICE_VMM => Err(RecordError::UnknownDevice { id }),
            kind::DEVICE_STATE => {
                append("device state", &mut self.view.device_state, body, self.limits.device_state_bytes)
            }
            kind::HELD_OUTPUT => append("held output", &mut self.output, body, self.limits.output_bytes),
            kind::RELEASED_UP_TO => {
                self.view.released_up_to = Some(exactly::<U64>(kind, at, body)?.get());
                Ok(())
            }
            kind::DISK_WRITES => match self.view.disk_writes.get_mut(usize::from(id)) {
                Some(writes) => append("disk writes", writes, body, Limits::DISK_BYTES),
                None => Err(RecordError::UnknownDevice { id }),
            },
            _ if section.flags.get() & CRITICAL != 0 => Err(RecordError::UnknownCritical { kind, at }),
            _ => Ok(()),
        }
    }

    fn matching(&mut self, id: u16) -> Result<&mut Matching, RecordError> {
        self.limits.pages_of(id)?;
        let at = match self.regions.iter().position(|region| region.id == id) {
            Some(at) => at,
            None => {
                let (runs, at) = (Vec::new(), (0, 0));
                let fresh = Matching { id, runs, index_end: 0, discards_end: 0, index_pages: 0, data_pages: 0, at };
                self.regions.push(fresh);
                self.regions.len() - 1
            }
        };
        Ok(&mut self.regions[at])
    }

    fn index(&mut self, section: &SectionHeader, body: &[u8], at: usize) -> Result<(), RecordError> {
        let (id, limits) = (section.id.get(), self.limits);
        let matching = self.matching(id)?;
        for run in runs(section, body, at)? {
            let run = limits.check_run(id, run, matching.index_end)?;
            matching.index_end = run.end;
            matching.index_pages += run.end - run.start;
            matching.runs.push(run);
        }
        Ok(())
    }

    fn discards(&mut self, section: &SectionHeader, body: &[u8], at: usize) -> Result<(), RecordError> {
        let (id, limits) = (section.id.get(), self.limits);
        for run in runs(section, body, at)? {
            let matching = self.matching(id)?;
            let run = limits.check_run(id, run, matching.discards_end)?;
            matching.discards_end = run.end;
            self.view.discards.push((RegionId(id), run));
        }
        Ok(())
    }

    fn data(&mut self, section: &SectionHeader, body: &[u8], at: usize) -> Result<(), RecordError> {
        let (id, items) = (section.id.get(), section.items.get() as usize);
        known_encoding(section, encoding::RAW_4K)?;
        expect_len(section, at, body, items.saturating_mul(PAGE_SIZE))?;
        let region = RegionId(id);
        self.matching(id)?.data_pages += items as u64;
        let (mut at, end) = (at + HEADER, at + HEADER + body.len());
        while at < end {
            let matching = self.matching(id)?;
            let (run, done) = matching.at;
            let Some(range) = matching.runs.get(run) else {
                let (index, data) = (matching.index_pages, matching.data_pages);
                return Err(RecordError::DataWithoutIndex { region, index, data });
            };
            let left = range.end - range.start - done;
            let take = left.min(((end - at) / PAGE_SIZE) as u64);
            let first = PageIndex(range.start + done);
            matching.at = if take == left { (run + 1, 0) } else { (run, done + take) };
            let len = take as usize * PAGE_SIZE;
            self.view.pages.push(PageRun { region, first, at, len });
            at += len;
        }
        Ok(())
    }

    fn finish(mut self, header: &SegmentHeader, body: &[u8], at: usize) -> Result<RecordView, RecordError> {
        let trailer: Trailer = exactly(kind::TRAILER, at, body)?;
        let (said_segments, said_bytes) = (trailer.segments.get(), trailer.bytes.get());
        if said_segments != self.segments || said_bytes != at as u64 {
            let (segments, bytes) = (self.segments, at as u64);
            return Err(RecordError::TrailerMismatch { said_segments, said_bytes, segments, bytes });
        }
        if trailer.chain.get() != self.chain.finalize() {
            return Err(RecordError::ChainMismatch);
        }
        let head = match (self.head, self.heads) {
            (Some(head), 1) => head,
            (_, found) => return Err(RecordError::Count { what: "head", found }),
        };
        let (shift, regions) = (head.page_shift.get(), head.regions.get());
        let wanted = self.limits.regions.len() as u32;
        if shift != PAGE_SHIFT || regions != wanted {
            return Err(RecordError::Geometry { shift, regions, wanted });
        }
        if let Some(odd) = self.regions.iter().find(|region| region.index_pages != region.data_pages) {
            let (index, data) = (odd.index_pages, odd.data_pages);
            return Err(RecordError::DataWithoutIndex { region: RegionId(odd.id), index, data });
        }
        self.view.epoch = Epoch(header.epoch.get());
        self.view.taken_at_ns = head.taken_at_ns.get();
        self.view.outputs = packets(&self.output)?;
        Ok(self.view)
    }
}

fn append(what: &'static str, stream: &mut Vec<u8>, body: &[u8], limit: usize) -> Result<(), RecordError> {
    let found = stream.len() + body.len();
    if found > limit {
        return Err(RecordError::TooLarge { what, found, limit });
    }
    stream.extend_from_slice(body);
    Ok(())
}

fn known_encoding(section: &SectionHeader, wanted: u16) -> Result<(), RecordError> {
    let (kind, encoding) = (section.kind.get(), section.encoding.get());
    if encoding == wanted { Ok(()) } else { Err(RecordError::UnknownEncoding { kind, encoding }) }
}

fn expect_len(section: &SectionHeader, at: usize, body: &[u8], wanted: usize) -> Result<(), RecordError> {
    let (kind, found) = (section.kind.get(), body.len());
    if found == wanted { Ok(()) } else { Err(RecordError::BadLength { kind, at, found, wanted }) }
}

fn exactly<T: FromBytes>(kind: u16, at: usize, body: &[u8]) -> Result<T, RecordError> {
    let bad = |_| RecordError::BadLength { kind, at, found: body.len(), wanted: size_of::<T>() };
    T::read_from_bytes(body).map_err(bad)
}

fn runs<'b>(section: &SectionHeader, body: &'b [u8], at: usize) -> Result<&'b [Run], RecordError> {
    known_encoding(section, encoding::RUNS)?;
    let items = section.items.get() as usize;
    let wanted = items.saturating_mul(size_of::<Run>());
    expect_len(section, at, body, wanted)?;
    let bad = |_| RecordError::BadLength { kind: section.kind.get(), at, found: body.len(), wanted };
    <[Run]>::ref_from_bytes_with_elems(body, items).map_err(bad)
}

/// Cuts the held-output stream into packets, which must ascend.
fn packets(mut stream: &[u8]) -> Result<Vec<Packet>, RecordError> {
    let mut out: Vec<Packet> = Vec::new();
    while !stream.is_empty() {
        let (header, rest) = PacketHeader::read_from_prefix(stream).map_err(|_| RecordError::CutPacket)?;
        let (bytes, rest) = rest.split_at_checked(header.len.get() as usize).ok_or(RecordError::CutPacket)?;
        let sequence = header.sequence.get();
        if let Some(before) = out.last().map(|packet| packet.sequence).filter(|&before| before >= sequence) {
            return Err(RecordError::PacketOrder { before, found: sequence });
        }
        out.push(Packet { sequence, bytes: bytes.to_vec() });
        stream = rest;
    }
    Ok(out)
}
