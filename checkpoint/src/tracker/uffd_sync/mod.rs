//! Learns of writes through *synchronous* userfaultfd write protection: the first write to a group of pages waits until whoever
//! serves the guest's faults has opened the group, and from then to the next harvest the group costs nothing more.
//!
//! Beside [`super::UffdWpTracker`] (asynchronous: the kernel lifts the protection by itself, page by page, and is asked with
//! PAGEMAP_SCAN):
//! * a fault costs the guest about ten times as much, but one is enough for up to 64 pages;
//! * a harvest costs what was written, not what the guest is large, and what is dirty is known while the guest runs;
//! * it needs Linux 6.4 (CONTINUE with write protection); asynchronous tracking needs 6.7.
//!
//! Like that one it sees every write through the VMM's own mapping, whoever made it.
//!
//! Pages of a group that were not written are told from those that were by a hash of what they held last ([`super::hashes`]). A page that was
//! opened by itself was written for certain, and is not hashed.
//!
//! Most of a large harvest is done before the pause, with the guest running ([`ahead`]).
//!
//! What it protects it can also hold while an epoch leaves, the guest running ([`held`]: copy-on-write staging).
//!
//! Memory: a byte a page of state (`faults`), 16 bytes for each page that has ever been hashed, and where pages may be held room for
//! [`HELD_PAGES`] of them.

mod ahead;
mod faults;
mod groups;
mod held;

pub use faults::WriteFaults;
pub use groups::{GroupSize, Groups};

use super::hashes::{Content, Hashes};
use crate::dirty::DirtySet;
use crate::guest::{DirtyTracker, GuestError, RamBlock, TrackerKind};
use crate::staging::{HeldPages, StageError};
use ahead::Ahead;
use belay_transport::PageIndex;
use belay_transport::region::Mapping;
use belay_transport::uffd::Features;
use faults::{Found, Meanwhile};
use groups::{CHUNK, order_for};
use held::{Held, Pool};
use std::sync::Arc;

/// What the VMM's userfaultfd must have been opened with, beside registering guest RAM for write-protect faults. WP_UNPOPULATED is of
/// the same kernel as CONTINUE with write protection, which has no feature of its own. WP_ASYNC must not be among its features: the
/// kernel would answer by itself.
pub const SYNC_FEATURES: Features = Features::WP_SHMEM.union(Features::WP_UNPOPULATED);

/// Pages that the guest may write before they are taken, in one epoch; a writer of one more waits until its page has been.
pub const HELD_PAGES: u32 = 8192;

/// See the module.
pub struct UffdSyncTracker {
    faults: Arc<WriteFaults>,
    /// The alias of each region, and what its pages held last.
    memory: Vec<(Arc<Mapping>, Hashes)>,
    /// Harvested, or found ahead of that, and not yet sifted: each chunk once.
    found: Vec<Found>,
    ahead: Ahead,
    same: DirtySet,
}

impl UffdSyncTracker {
    /// A tracker of `blocks`, whose write faults `faults` answers: the same blocks, in the same order.
    pub fn new(blocks: &[RamBlock], faults: Arc<WriteFaults>) -> Result<Self, GuestError> {
        let pages = |block: &RamBlock| (block.alias.len() / belay_transport::PAGE_SIZE) as u64;
        let memory = |block: &RamBlock| {
            let hashes = Hashes::new(pages(block));
            let hashes = hashes.map_err(|source| GuestError::Io { doing: "draw a seed".into(), source })?;
            Ok((Arc::clone(&block.alias), hashes))
        };
        let none = DirtySet::new(blocks.iter().map(|block| (block.id, pages(block))));
        Ok(Self {
            faults,
            memory: blocks.iter().map(memory).collect::<Result<_, GuestError>>()?,
            found: Vec::new(),
            ahead: Ahead::new(none.clone()),
            same: none,
        })
    }

    /// As this, and able to hold pages ([`DirtyTracker::hold`]), of which `pages` may be written before they are taken. Takes the memory for them,
    /// unless a tracker before this one has.
    pub fn holding(self, pages: u32) -> Result<Self, GuestError> {
        if self.faults.pool.get().is_none() {
            // Should another have been faster, that one is as good.
            let _ = self.faults.pool.set(Pool::new(pages)?);
        }
        Ok(self)
    }

    /// Compares the pages of one chunk with what they were; those that are the same go into `same`. Then the chunk learns.
    fn sift_chunk(&mut self, found: Found, dirty: &DirtySet) -> Result<(), GuestError> {
        let Found { region, chunk, open, certain } = found;
        let (alias, hashes) = &mut self.memory[region];
        let (mut written, mut hashed, mut forgotten, mut unknown) = (certain & open, 0_u64, 0_u64, 0_u64);
        let mut rest = open;
        while rest != 0 {
            let unit = rest.trailing_zeros();
            rest &= rest - 1;
            let bit = 1_u64 << unit;
            let (id, pages) = self.faults.pages(region, chunk * CHUNK + u64::from(unit));
            // A huge page is a group of 4 KiB pages.
            let alone = certain & bit != 0 && pages.end - pages.start == 1;
            for page in pages.map(PageIndex) {
                if alone || !dirty.contains(id, page) {
                    hashes.forget(page);
                    forgotten |= bit;
                    continue;
                }
                hashed |= bit;
                match hashes.renew(alias, page) {
                    Content::Same => self.same.insert_run(id, page, 1),
                    Content::Changed => written |= bit,
                    Content::Unknown => unknown |= bit,
                }
            }
        }
        let mut state = self.faults.state(region, chunk)?;
        state.hashed = (state.hashed | hashed) & !forgotten;
        // Whether a page was written that nothing was known of is not known either: the group stays as it is this time.
        if self.faults.groups() == Groups::Adaptive && unknown & !written == 0 && written != 0 {
            state.order = order_for(written, state.before, state.hashed);
            state.before = written;
        }
        Ok(())
    }
}

impl DirtyTracker for UffdSyncTracker {
    fn kind(&self) -> TrackerKind {
        TrackerKind::UffdSync
    }

    fn sees_device_writes(&self) -> bool {
        true
    }

    fn start(&mut self) -> Result<(), GuestError> {
        self.found.clear();
        self.ahead.forget();
        self.memory.iter_mut().for_each(|(_, hashes)| hashes.forget_all());
        self.faults.shut_all()
    }

    fn prepare(&mut self) -> Result<(), GuestError> {
        self.ahead.shut(&self.faults, &mut self.found)
    }

    fn harvest(&mut self, into: &mut DirtySet) -> Result<(), GuestError> {
        let Self { faults, found, ahead, .. } = self;
        let outcome = faults.shut(Meanwhile::Stands, |one| {
            one.add_to(faults, into);
            found.push(one);
        });
        ahead.give(into, ahead::unite(faults, found));
        outcome
    }

    fn sift(&mut self, dirty: &mut DirtySet, discards: &DirtySet) -> Result<(), GuestError> {
        self.same.clear();
        let found = std::mem::take(&mut self.found);
        for &one in &found {
            self.sift_chunk(one, dirty)?;
        }
        self.found = found;
        self.found.clear();
        dirty.subtract(&self.same);
        for (id, page) in discards.iter() {
            if let Some((region, unit)) = self.faults.place(id, page) {
                self.memory[region].1.forget(page);
                self.faults.state(region, unit / CHUNK)?.hashed &= !(1 << (unit % CHUNK));
            }
        }
        Ok(())
    }

    fn can_hold(&self) -> bool {
        self.faults.pool.get().is_some()
    }

    fn hold(&mut self, dirty: &DirtySet) -> Result<Option<Box<dyn HeldPages>>, StageError> {
        Ok(Held::hold(&self.faults, dirty)?.map(|held| Box::new(held) as Box<dyn HeldPages>))
    }

    fn dirty_so_far(&mut self) -> Option<u64> {
        Some(self.ahead.len() + self.faults.opened())
    }
}

#[cfg(test)]
mod tests;
