//! Where things lie in a guest's memory: page tables, code, parameters, logs, data.
//!
//! ```text
//! page  0            a hole for ever
//!       1            PML4: [0] → RAM, [1] → the device
//!       2            PDPT of RAM          3  PDPT of the device      4  page directory of the device
//!       5            program text
//!       6            the metronome's log (its content depends on time: not checked)
//!       7            counters shared by all vCPUs
//!       8 …          parameters, 256 bytes a vCPU
//!       …            nonce logs, 4 pages a vCPU
//!       …            page directories of RAM, one a GiB
//!       data_first … filled by hash; the first of them are the working set, split between the vCPUs
//! ```
//!
//! Guest-virtual address = byte offset in RAM, so a program knows nothing of the hole that the device lies in. Guest-physical
//! RAM below 3 GiB is at its offset, the rest starts at 4 GiB.

use super::{Filler, GuestSpec, Program, rules};
use belay_transport::{PAGE_SIZE, PageIndex};
use std::ops::Range;

/// Where guest-physical RAM stops and the device's hole begins.
pub const MEMORY_HOLE_START: u64 = 3 << 30;
/// Where guest-physical RAM goes on.
pub const SECOND_MEMORY_START: u64 = 4 << 30;
/// Guest-physical address of the packet port.
pub const DEVICE_GPA: u64 = MEMORY_HOLE_START;
/// Guest-virtual address of the packet port.
pub const DEVICE_VA: u64 = 512 << 30;
/// Bytes of the port's window for each vCPU.
pub const DEVICE_STRIDE: u64 = 4096;
/// Bytes of a vCPU's parameters.
pub const PARAMETER_BYTES: u64 = 256;
/// Pages of a vCPU's nonce log.
pub const NONCE_LOG_PAGES: u64 = 4;
/// Entries a nonce log holds (two words each, after a two-word head); what comes after is neither written nor digested.
pub const NONCE_LOG_CAPACITY: u64 = (NONCE_LOG_PAGES * PAGE_SIZE as u64 - 16) / 16;

/// Entries of the metronome's log before it starts over.
pub const METRONOME_LOG_ENTRIES: u64 = 128;
/// Gaps in the guest's clock shorter than this are not logged.
pub const METRONOME_GAP_TICKS: u64 = 20_000;

const PARAMETERS: usize = 19;

/// Present, writable, user, accessed: set beforehand so that the CPU never has to.
const TABLE_ENTRY: u64 = 0x27;
/// The same, dirty, 2 MiB.
const LARGE_ENTRY: u64 = 0xe7;

/// The index of a word in a vCPU's parameters. The program text uses the same numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Parameter {
    Device = 0,
    StepSeed = 1,
    FillSeed = 2,
    FilledOf256 = 3,
    OwnFirstPage = 4,
    OwnPages = 5,
    RestFirstPage = 6,
    RestPages = 7,
    BatchSteps = 8,
    PacketBatches = 9,
    NonceLog = 10,
    NonceLogCapacity = 11,
    SharedCounters = 12,
    GuestFills = 13,
    Vcpu = 14,
    MetronomeLog = 15,
    MetronomeSpinTicks = 16,
    MetronomeGapTicks = 17,
    Pattern = 18,
}

/// Guest-physical address of a byte of RAM.
pub fn gpa_of(offset: u64) -> u64 {
    if offset < MEMORY_HOLE_START { offset } else { offset - MEMORY_HOLE_START + SECOND_MEMORY_START }
}

/// The page of RAM at a guest-physical address that is not in the hole.
pub fn page_of_gpa(gpa: u64) -> PageIndex {
    let offset = if gpa < MEMORY_HOLE_START { gpa } else { gpa - SECOND_MEMORY_START + MEMORY_HOLE_START };
    PageIndex(offset / PAGE_SIZE as u64)
}

/// The memory map that follows from a [`GuestSpec`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    pages: u64,
    working_set_pages: u64,
    vcpus: u16,
}

/// A run of low pages and what the VMM writes there before the guest starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LowMapping {
    pub page: PageIndex,
    pub bytes: Vec<u8>,
}

impl Layout {
    /// The least memory a guest can have.
    pub const MIN_MEMORY_BYTES: u64 = 2 << 20;

    pub(super) fn new(pages: u64, working_set_pages: u64, vcpus: u16) -> Self {
        Self { pages, working_set_pages, vcpus }
    }

    /// Pages of guest RAM.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The page of the PML4: what CR3 points at.
    pub fn page_tables(&self) -> PageIndex {
        PageIndex(1)
    }

    /// The page the program lies in.
    pub fn text(&self) -> PageIndex {
        PageIndex(5)
    }

    /// The metronome's log. Its content is a matter of time, so no checker looks at it.
    pub fn metronome_log(&self) -> PageIndex {
        PageIndex(6)
    }

    /// Counters that all vCPUs add to.
    pub fn shared_counters(&self) -> PageIndex {
        PageIndex(7)
    }

    /// Byte offset of a vCPU's parameters.
    pub fn parameters(&self, vcpu: u16) -> u64 {
        8 * PAGE_SIZE as u64 + u64::from(vcpu) * PARAMETER_BYTES
    }

    /// First page of a vCPU's nonce log.
    pub fn nonce_log(&self, vcpu: u16) -> PageIndex {
        let parameter_pages = (u64::from(self.vcpus) * PARAMETER_BYTES).div_ceil(PAGE_SIZE as u64);
        PageIndex(8 + parameter_pages + u64::from(vcpu) * NONCE_LOG_PAGES)
    }

    fn directories(&self) -> Range<u64> {
        let first = self.nonce_log(self.vcpus).0;
        first..first + (self.pages * PAGE_SIZE as u64).div_ceil(1 << 30)
    }

    /// First page of data; from there to the end everything is filled by hash.
    pub fn data_first(&self) -> u64 {
        self.directories().end
    }

    /// A vCPU's own part of the working set.
    pub fn own_pages(&self, vcpu: u16) -> Range<u64> {
        share(self.data_first()..self.data_first() + self.working_set_pages, vcpu, self.vcpus)
    }

    /// A vCPU's part of the data beyond the working set: what it fills (or scans) but does not step on.
    pub fn rest_pages(&self, vcpu: u16) -> Range<u64> {
        share(self.data_first() + self.working_set_pages..self.pages, vcpu, self.vcpus)
    }
}

/// The `index`th of `of` nearly equal parts of a range.
fn share(range: Range<u64>, index: u16, of: u16) -> Range<u64> {
    let len = range.end - range.start;
    let cut = |at: u64| range.start + len * at / u64::from(of);
    cut(u64::from(index))..cut(u64::from(index) + 1)
}

fn table_page(page: u64, entries: impl IntoIterator<Item = (usize, u64)>) -> LowMapping {
    let mut bytes = vec![0; PAGE_SIZE];
    for (index, entry) in entries {
        bytes[index * 8..index * 8 + 8].copy_from_slice(&entry.to_le_bytes());
    }
    LowMapping { page: PageIndex(page), bytes }
}

/// Everything the VMM writes before the guest starts, apart from the fill: tables, text and parameters.
pub fn low_pages(layout: &Layout, spec: &GuestSpec, text: &[u8]) -> Vec<LowMapping> {
    assert!(text.len() <= PAGE_SIZE, "the programs are {} bytes and must fit a page", text.len());
    let at = |page: u64| (page * PAGE_SIZE as u64) | TABLE_ENTRY;
    let directories = layout.directories();
    let mut low = vec![
        table_page(1, [(0, at(2)), (1, at(3))]),
        table_page(2, directories.clone().enumerate().map(|(index, page)| (index, at(page)))),
        table_page(3, [(0, at(4))]),
        table_page(4, [(0, DEVICE_GPA | LARGE_ENTRY)]),
    ];
    for (gib, page) in directories.enumerate() {
        let entries = (0..512).filter_map(|index| {
            let offset = ((gib as u64) << 30) + ((index as u64) << 21);
            (offset < layout.pages * PAGE_SIZE as u64).then(|| (index, gpa_of(offset) | LARGE_ENTRY))
        });
        low.push(table_page(page, entries));
    }
    low.push(LowMapping { page: layout.text(), bytes: text.to_vec() });
    for vcpu in 0..layout.vcpus {
        let words = parameters(layout, spec, vcpu);
        let offset = layout.parameters(vcpu) as usize;
        let page = PageIndex::containing(offset);
        if offset.is_multiple_of(PAGE_SIZE) {
            low.push(LowMapping { page, bytes: vec![0; PAGE_SIZE] });
        }
        let bytes = &mut low.last_mut().expect("a page was pushed for the first vCPU").bytes;
        for (index, word) in words.into_iter().enumerate() {
            let at = offset % PAGE_SIZE + index * 8;
            bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
        }
    }
    low
}

fn parameters(layout: &Layout, spec: &GuestSpec, vcpu: u16) -> [u64; PARAMETERS] {
    let (own, rest) = (layout.own_pages(vcpu), layout.rest_pages(vcpu));
    let address = |page: PageIndex| page.offset() as u64;
    let mut words = [0; PARAMETERS];
    let mut set = |parameter: Parameter, value: u64| words[parameter as usize] = value;
    set(Parameter::Device, DEVICE_VA + u64::from(vcpu) * DEVICE_STRIDE);
    set(Parameter::StepSeed, rules::step_seed(spec.seed, vcpu));
    set(Parameter::FillSeed, spec.seed);
    set(Parameter::FilledOf256, u64::from(spec.filled_of_256));
    set(Parameter::OwnFirstPage, own.start);
    set(Parameter::OwnPages, own.end - own.start);
    set(Parameter::RestFirstPage, rest.start);
    set(Parameter::RestPages, rest.end - rest.start);
    set(Parameter::BatchSteps, spec.batch_steps);
    set(Parameter::PacketBatches, spec.packet_interval_steps / spec.batch_steps);
    set(Parameter::NonceLog, address(layout.nonce_log(vcpu)));
    set(Parameter::NonceLogCapacity, NONCE_LOG_CAPACITY);
    set(Parameter::SharedCounters, if spec.vcpus > 1 { address(layout.shared_counters()) } else { 0 });
    set(Parameter::GuestFills, u64::from(spec.filler == Filler::Guest));
    set(Parameter::Vcpu, u64::from(vcpu));
    let metronome = spec.program == Program::Metronome && vcpu == 0;
    set(Parameter::MetronomeLog, if metronome { address(layout.metronome_log()) } else { 0 });
    set(Parameter::MetronomeSpinTicks, spec.metronome_spin_ticks);
    set(Parameter::MetronomeGapTicks, METRONOME_GAP_TICKS);
    // A scanner makes no steps.
    set(Parameter::Pattern, spec.program.pattern().map_or(0, |pattern| pattern as u64));
    words
}
