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
//! Cost: [`DirtyTracker::start`] puts a marker in place of every page that is in no page table (a page table entry each), after
//! which such pages are clean to every scan and cost what present ones do.

use super::hashes::{Content, Hashes};
use super::pagemap;
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
        let tracker = Self { whose, pagemap, blocks, scanners, huge, lost_track: false };
        tracker.check_mapped()?;
        Ok(tracker)
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
        self.lost_track = false;
        Ok(())
    }

    fn harvest(&mut self, into: &mut DirtySet) -> Result<(), GuestError> {
        if self.lost_track {
            let reason =
                "an earlier harvest failed half way, so pages written since may be unknown; start tracking anew";
            return Err(GuestError::NoTracker { kind: TrackerKind::UffdWp, reason: reason.into() });
        }
        let blocks = &self.blocks;
        let scanned = self.scanners.scan(blocks.iter().map(Block::range), |run| {
            let block = blocks.iter().find(|block| block.range().contains(&run.start));
            let block = block.expect("the kernel reports nothing outside the range it was given");
            let first = PageIndex((run.start - block.start) >> PAGE_SHIFT);
            into.insert_run(block.id, first, (run.end - run.start) >> PAGE_SHIFT);
        });
        let id = blocks.first().map_or(RegionId(0), |block| block.id);
        let outcome = scanned.map_err(|errno| refusal(self.whose, errno, id)).and_then(|()| self.check_mapped());
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
