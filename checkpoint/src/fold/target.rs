//! The guest RAM that records are folded into, and which of its pages are allocated.

use super::FoldError;
use crate::guest::RamBlock;
use crate::record::{PageRun, PageSource, RecordView};
use crate::share::{self, share};
use belay_transport::region::RegionError;
use belay_transport::{PAGE_SIZE, PageSize, RegionId};
use rustix::fs::{FallocateFlags, fallocate};
use std::io;
use std::ops::Range;

/// Pages copied between two calls of `between`: about half a millisecond.
const BREATH: usize = 1024;
/// Runs that a thread takes at once.
const PIECE: usize = 32;

/// Guest RAM as a place to fold into.
#[derive(Debug)]
pub struct FoldTarget {
    blocks: Vec<Block>,
}

#[derive(Debug)]
struct Block {
    ram: RamBlock,
    /// A bit a page: the file holds it, so writing it takes no new memory.
    allocated: Vec<u64>,
}

impl FoldTarget {
    /// Guest RAM of the source. Looks up which parts of the files hold data.
    pub fn new(memory: &[RamBlock]) -> Result<Self, RegionError> {
        let blocks = memory.iter().map(|ram| Block::new(ram.clone())).collect::<Result<_, _>>()?;
        Ok(Self { blocks })
    }

    /// Regions and their sizes in pages.
    pub fn regions(&self) -> impl Iterator<Item = (RegionId, u64)> + '_ {
        self.blocks.iter().map(|block| (block.ram.id, (block.ram.alias.len() / PAGE_SIZE) as u64))
    }

    fn block(&mut self, id: RegionId) -> &mut Block {
        let found = self.blocks.iter_mut().find(|block| block.ram.id == id);
        found.expect("the record was checked against these regions")
    }

    /// Allocates every page the record will fill.
    pub(super) fn reserve(&mut self, record: &RecordView) -> Result<(), FoldError> {
        for run in &record.pages {
            self.block(run.region).allocate(run.pages())?;
        }
        Ok(())
    }

    /// Writes the record, whose page bytes are in `from`. Everything it needs was reserved. `begun` is called once its first run is in RAM.
    pub(super) fn apply(
        &mut self,
        record: &RecordView,
        from: &impl PageSource,
        begun: fn(),
        between: &mut impl FnMut(),
    ) {
        for (region, pages) in &record.discards {
            self.block(*region).zero(pages.clone());
            between();
        }
        let (blocks, pieces): (_, Vec<_>) = (&self.blocks, record.pages.chunks(PIECE).collect());
        let mut pages = 0;
        let breathe = |piece: usize| {
            pages += pieces[piece].iter().map(|run| run.len / PAGE_SIZE).sum::<usize>();
            if pages >= BREATH {
                pages = 0;
                between();
            }
        };
        let threads = share::threads_for(record.page_bytes());
        share(
            threads,
            pieces.len(),
            || (),
            |(), piece| copy(blocks, from, pieces[piece], (piece == 0).then_some(begun)),
            breathe,
        );
    }
}

/// Copies runs that were checked and whose pages are allocated.
fn copy(blocks: &[Block], from: &impl PageSource, runs: &[PageRun], begun: Option<fn()>) {
    for (at, run) in runs.iter().enumerate() {
        let block = blocks.iter().find(|block| block.ram.id == run.region);
        let block = block.expect("the record was checked against these regions");
        from.copy_to(run.at, run.len, &block.ram.alias, run.first.offset());
        if let Some(begun) = begun.filter(|_| at == 0) {
            begun();
        }
    }
}

impl Block {
    fn new(ram: RamBlock) -> Result<Self, RegionError> {
        let pages = ram.alias.len() / PAGE_SIZE;
        let mut block = Self { allocated: vec![0; pages.div_ceil(64)], ram };
        if block.ram.page_size == PageSize::Huge {
            // A shared mapping of huge pages has reserved them all when it was made; hugetlbfs cannot tell holes anyway.
            block.allocated.fill(u64::MAX);
            return Ok(block);
        }
        for extent in block.ram.file.occupancy()? {
            let page = PAGE_SIZE as u64;
            block.mark(extent.offset / page..(extent.offset + extent.len).min(block.ram.alias.len() as u64) / page);
        }
        Ok(block)
    }

    fn is_allocated(&self, page: u64) -> bool {
        self.allocated[(page / 64) as usize] >> (page % 64) & 1 == 1
    }

    fn mark(&mut self, pages: Range<u64>) {
        for page in pages {
            self.allocated[(page / 64) as usize] |= 1 << (page % 64);
        }
    }

    /// Makes the file hold all of `pages`.
    fn allocate(&mut self, pages: Range<u64>) -> Result<(), FoldError> {
        if pages.clone().all(|page| self.is_allocated(page)) {
            return Ok(());
        }
        let (offset, bytes) = (pages.start * PAGE_SIZE as u64, (pages.end - pages.start) * PAGE_SIZE as u64);
        let done = rustix::io::retry_on_intr(|| fallocate(&*self.ram.file, FallocateFlags::empty(), offset, bytes));
        done.map_err(|errno| {
            let reason = io::Error::from(errno).kind();
            FoldError::NoMemory { region: self.ram.id, offset, bytes, reason }
        })?;
        self.mark(pages);
        Ok(())
    }

    /// Makes pages read as zero. Holes do already. Others are overwritten and not punched out: they may be registered with a
    /// device, whose pin would keep the old page.
    fn zero(&mut self, pages: Range<u64>) {
        let mut at = pages.start;
        while at < pages.end {
            let end = (at..pages.end).find(|&page| !self.is_allocated(page)).unwrap_or(pages.end);
            if end == at {
                at += 1;
                continue;
            }
            self.ram.alias.zero(at as usize * PAGE_SIZE, (end - at) as usize * PAGE_SIZE);
            at = end;
        }
    }
}
