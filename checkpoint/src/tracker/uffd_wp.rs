//! Learns of writes through asynchronous userfaultfd write protection and PAGEMAP_SCAN: works for any VMM, in this process or another.
//!
//! It sees every write made through the VMM's own mapping, whoever made it: vCPUs, KVM, device threads. Writes through another
//! mapping of the same file (the page server's alias, vhost-user processes) it does not see.
//!
//! What it may report beside what was written: pages of which the kernel lost the mark (a page made present without being
//! protected, a hole that was punched). The epoch takes only what has landed, and a page too many costs bandwidth and no truth. What it
//! must not do is miss one; `pagemap.rs` says why it asks for "written" alone.
//!
//! A huge page is protected, and reported, as a whole. Which of its 4 KiB pages were written is told by a hash of what each held when it was last
//! put into a record ([`super::hashes`]): 16 bytes a page of huge blocks, and all of a huge page the first time.
//!
//! A harvest looks through all of the guest first, and then protects what was written, span by span: protecting a range makes KVM forget what it
//! knows of all of it, written or not. Right before the pause the same is done with the guest running ([`DirtyTracker::prepare`]), so that the pause looks
//! through the guest and finds little to protect.
//!
//! Cost: [`DirtyTracker::start`] puts a marker in place of every page that is in no page table (a page table entry each), after
//! which such pages are clean to every scan and cost what present ones do.

use super::back_off::BackOff;
use super::hashes::{Content, Hashes};
use super::pagemap::{self, PageRegion, Written};
use super::scanners::Scanners;
use crate::dirty::DirtySet;
use crate::guest::{DirtyTracker, GuestError, RamBlock, TrackerKind};
use belay_transport::region::Mapping;
use belay_transport::uffd::Features;
use belay_transport::{PAGE_SHIFT, PAGE_SIZE, PageIndex, PageSize, RegionId};
use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::Pid;
use std::ops::Range;
use std::sync::Arc;

/// What the VMM's userfaultfd must have been opened with, beside registering guest RAM for write-protect faults.
pub const REQUIRED_FEATURES: Features = Features::WP_ASYNC.union(Features::WP_UNPOPULATED).union(Features::WP_SHMEM);

/// Clean bytes between two written pages that are protected along with them: a system call more costs as much as some thousand pages do.
const GAP: u64 = 2 << 20;
/// Where fewer pages than this are expected none is made ready: that takes a look through all of the guest. As many are expected as were found last,
/// and a quarter less each time after.
const WORTH_A_LOOK: u64 = 256;

/// Whose address space guest RAM is mapped and registered in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhoseMemory {
    /// This process'.
    Own,
    /// That of another, which this one may ptrace(2).
    Process(Pid),
}

/// See the module.
pub struct UffdWpTracker {
    whose: WhoseMemory,
    pagemap: Arc<OwnedFd>,
    blocks: Vec<Block>,
    scanners: Scanners,
    /// Where something was written, by the last look.
    spans: Vec<Range<u64>>,
    /// Protected again and not yet harvested; of those, how many were written again.
    ahead: DirtySet,
    again: u64,
    back_off: BackOff,
    /// Pages that the next harvest is likely to find.
    expected: u64,
    /// Of the blocks of huge pages: the alias of each, and what its pages held last.
    huge: Vec<(RegionId, Arc<Mapping>, Hashes)>,
    /// A scan failed half way, so that some written pages are protected again and were never reported.
    lost_track: bool,
}

#[derive(Debug, Clone, Copy)]
struct Block {
    id: RegionId,
    start: u64,
    end: u64,
    page_bytes: u64,
}

impl Block {
    fn range(&self) -> Range<u64> {
        self.start..self.end
    }
}

impl UffdWpTracker {
    /// A tracker of `blocks`, which must be registered by then ([`RamBlock::vmm_address`], [`REQUIRED_FEATURES`]).
    pub fn new(whose: WhoseMemory, blocks: &[RamBlock]) -> Result<Self, GuestError> {
        let path = match whose {
            WhoseMemory::Own => "/proc/self/pagemap".to_owned(),
            WhoseMemory::Process(pid) => format!("/proc/{}/pagemap", pid.as_raw_nonzero()),
        };
        let pagemap =
            rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(|errno| {
                match (whose, errno) {
                    (WhoseMemory::Process(pid), Errno::NOENT | Errno::SRCH) => {
                        GuestError::VmmGone(format!("there is no process {} any more", pid.as_raw_nonzero()))
                    }
                    _ => GuestError::Io { doing: format!("open {path}"), source: errno.into() },
                }
            })?;
        let huge = blocks.iter().filter(|block| block.page_size == PageSize::Huge).map(|block| {
            let hashes = Hashes::new((block.alias.len() / PAGE_SIZE) as u64);
            let hashes = hashes.map_err(|source| GuestError::Io { doing: "draw a seed".into(), source })?;
            Ok((block.id, Arc::clone(&block.alias), hashes))
        });
        let huge = huge.collect::<Result<_, GuestError>>()?;
        let blocks: Vec<Block> = blocks.iter().map(Block::of).collect();
        let pagemap = Arc::new(pagemap);
        let bytes = blocks.iter().map(|block| block.end - block.start).sum();
        let scanners = Scanners::new(Arc::clone(&pagemap), bytes)
            .map_err(|source| GuestError::Io { doing: "start scanning threads".into(), source })?;
        let pages = |block: &Block| (block.id, (block.end - block.start) >> PAGE_SHIFT);
        let ahead = DirtySet::new(blocks.iter().map(pages));
        let (spans, back_off) = (Vec::new(), BackOff::default());
        let (again, expected, lost_track) = (0, 0, false);
        let tracker =
            Self { whose, pagemap, blocks, scanners, spans, ahead, again, back_off, expected, huge, lost_track };
        tracker.check_mapped()?;
        Ok(tracker)
    }

    /// Looks for written pages and forms spans of them; how many pages.
    fn look(&mut self) -> Result<u64, GuestError> {
        let Self { scanners, spans, blocks, .. } = self;
        let ranges: Vec<_> = blocks.iter().map(Block::range).collect();
        spans.clear();
        let mut bytes = 0;
        let looked = scanners.scan(Written::Left, &ranges, |run| {
            bytes += run.end - run.start;
            // Pieces of memory come in no order, and the runs of one piece in theirs. What lies between two blocks is nobody's.
            let block = blocks.iter().find(|block| block.range().contains(&run.start));
            match spans.last_mut() {
                Some(last)
                    if (last.end..=last.end + GAP).contains(&run.start)
                        && block.is_some_and(|block| block.range().contains(&last.start)) =>
                {
                    last.end = run.end;
                }
                _ => spans.push(run.start..run.end),
            }
        });
        looked.map_err(|errno| self.refused(errno))?;
        Ok(bytes >> PAGE_SHIFT)
    }

    /// Protects what is written in the spans and adds it to a set; how many of its pages were there already.
    fn protect(&mut self, into: &mut DirtySet) -> Result<u64, GuestError> {
        let Self { scanners, spans, blocks, .. } = self;
        let (before, mut pages) = (into.len(), 0);
        let scanned = scanners.scan(Written::Protected, spans, |run| pages += insert(blocks, run, into));
        scanned.map_err(|errno| self.refused(errno))?;
        Ok(pages - (into.len() - before))
    }

    fn refused(&self, errno: Errno) -> GuestError {
        refusal(self.whose, errno, self.blocks.first().map_or(RegionId(0), |block| block.id))
    }

    fn try_prepare(&mut self) -> Result<(), GuestError> {
        let mut passes = self.back_off.passes();
        // One: another look is as long as the pause would be without it.
        if passes.are_left() && passes.another(self.look()?) {
            let mut ahead = std::mem::replace(&mut self.ahead, DirtySet::new([]));
            let again = self.protect(&mut ahead);
            self.ahead = ahead;
            self.again += again?;
        }
        Ok(())
    }

    fn try_harvest(&mut self, into: &mut DirtySet) -> Result<(), GuestError> {
        let before = into.len();
        into.merge(&self.ahead);
        self.look()?;
        let again = self.again + self.protect(into)?;
        self.back_off.harvested(self.ahead.len(), again);
        self.ahead.clear();
        self.again = 0;
        self.expected = (into.len() - before).max(self.expected / 4 * 3);
        self.check_mapped()
    }

    /// Whether every block is mapped and registered, to its last page.
    fn check_mapped(&self) -> Result<(), GuestError> {
        for block in &self.blocks {
            let mapped = pagemap::is_mapped(&self.pagemap, block.end - block.page_bytes, block.page_bytes);
            if !mapped.map_err(|errno| refusal(self.whose, errno, block.id))? {
                return Err(GuestError::VmmGone(format!("{} is not mapped any more, {:?}", block.id, self.whose)));
            }
        }
        Ok(())
    }
}

impl Block {
    fn of(block: &RamBlock) -> Self {
        let (len, page_bytes) = (block.alias.len() as u64, block.page_size.bytes() as u64);
        assert!(len > 0 && len.is_multiple_of(page_bytes), "{} has {len} bytes, not whole pages", block.id);
        Self { id: block.id, start: block.vmm_address, end: block.vmm_address + len, page_bytes }
    }
}

impl DirtyTracker for UffdWpTracker {
    fn kind(&self) -> TrackerKind {
        TrackerKind::UffdWp
    }

    fn sees_device_writes(&self) -> bool {
        true
    }

    fn start(&mut self) -> Result<(), GuestError> {
        self.huge.iter_mut().for_each(|(.., hashes)| hashes.forget_all());
        for block in &self.blocks {
            pagemap::protect(&self.pagemap, block.start, block.end)
                .map_err(|errno| refusal(self.whose, errno, block.id))?;
        }
        self.check_mapped()?;
        self.ahead.clear();
        (self.again, self.expected, self.lost_track) = (0, 0, false);
        Ok(())
    }

    fn prepare(&mut self) -> Result<(), GuestError> {
        if self.lost_track || self.expected < WORTH_A_LOOK {
            return Ok(());
        }
        let outcome = self.try_prepare();
        self.lost_track |= outcome.is_err();
        outcome
    }

    fn harvest(&mut self, into: &mut DirtySet) -> Result<(), GuestError> {
        if self.lost_track {
            let reason =
                "an earlier harvest failed half way, so pages written since may be unknown; start tracking anew";
            return Err(GuestError::NoTracker { kind: TrackerKind::UffdWp, reason: reason.into() });
        }
        let outcome = self.try_harvest(into);
        self.lost_track = outcome.is_err();
        outcome
    }

    fn sift(&mut self, dirty: &mut DirtySet, discards: &DirtySet) -> Result<(), GuestError> {
        let huge = &mut self.huge;
        if huge.is_empty() {
            return Ok(());
        }
        dirty.retain(|id, page| {
            let block = huge.iter_mut().find(|(huge, ..)| *huge == id);
            block.is_none_or(|(_, alias, hashes)| hashes.renew(alias, page) != Content::Same)
        });
        for (id, page) in discards.iter() {
            if let Some((.., hashes)) = huge.iter_mut().find(|(huge, ..)| *huge == id) {
                hashes.forget(page);
            }
        }
        Ok(())
    }

    /// A scan that only looks costs as much as a harvest: not cheap.
    fn dirty_so_far(&mut self) -> Option<u64> {
        None
    }
}

/// Adds a run to a set; its pages.
fn insert(blocks: &[Block], run: &PageRegion, into: &mut DirtySet) -> u64 {
    let block = blocks.iter().find(|block| block.range().contains(&run.start));
    let block = block.expect("the kernel reports nothing outside the range it was given");
    let pages = (run.end - run.start) >> PAGE_SHIFT;
    into.insert_run(block.id, PageIndex((run.start - block.start) >> PAGE_SHIFT), pages);
    pages
}

/// What an errno of PAGEMAP_SCAN means to whoever wanted to track.
fn refusal(whose: WhoseMemory, errno: Errno, id: RegionId) -> GuestError {
    let no_tracker = |reason| GuestError::NoTracker { kind: TrackerKind::UffdWp, reason };
    match errno {
        Errno::NOTTY => {
            let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_else(|_| "unknown".into());
            no_tracker(format!("PAGEMAP_SCAN needs Linux 6.7 or newer, this is {}", release.trim()))
        }
        Errno::PERM => no_tracker(format!(
            "{id} is not (or not wholly) registered for write-protect faults with a userfaultfd that has {REQUIRED_FEATURES}"
        )),
        Errno::SRCH => GuestError::VmmGone(format!("{whose:?} has no address space any more")),
        errno => GuestError::Io { doing: format!("PAGEMAP_SCAN of {id}, {whose:?}"), source: errno.into() },
    }
}

#[cfg(test)]
mod tests;
