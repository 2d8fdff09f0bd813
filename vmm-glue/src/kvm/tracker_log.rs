//! The KVM dirty log as a tracker: a bit a page, read and cleared while the guest stands still.
//!
//! With KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 reading does not protect; KVM_CLEAR_DIRTY_LOG protects just the pages that were
//! dirty. Where many are, they are read and cleared once before that, with the guest running: in the pause there is only what it wrote since. See "KVM_CLEAR_DIRTY_LOG" in the kernel's virt/kvm/api.rst.

use super::ioctl;
use super::machine::{Machine, Slot};
use belay_checkpoint::dirty::DirtySet;
use belay_checkpoint::guest::{DirtyTracker, GuestError, TrackerKind};
use belay_checkpoint::tracker::BackOff;
use std::io;
use std::sync::Arc;

/// The log itself.
struct Log {
    machine: Arc<Machine>,
    /// A bitmap a memslot, taken once.
    bitmaps: Vec<Vec<u64>>,
}

impl Log {
    /// Reads it; how many pages are in it.
    fn read(&mut self) -> Result<u64, GuestError> {
        let mut pages = 0;
        for (slot, bitmap) in self.machine.slots().iter().zip(&mut self.bitmaps) {
            ioctl::get_dirty_log(self.machine.vm(), slot.number, slot.pages, bitmap)
                .map_err(|source| failed("KVM_GET_DIRTY_LOG", slot, source))?;
            pages += bitmap.iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
        }
        Ok(pages)
    }

    /// Clears what was read, and adds it to a set; how many of its pages were there already.
    fn take(&self, into: &mut DirtySet) -> Result<u64, GuestError> {
        let (region, before) = (self.machine.region(), into.len());
        let mut pages = 0;
        for (slot, bitmap) in self.machine.slots().iter().zip(&self.bitmaps) {
            if bitmap.iter().all(|&word| word == 0) {
                continue;
            }
            ioctl::clear_dirty_log(self.machine.vm(), slot.number, slot.pages, bitmap)
                .map_err(|source| failed("KVM_CLEAR_DIRTY_LOG", slot, source))?;
            for (word, &bits) in (slot.first_page as usize / 64..).zip(bitmap) {
                into.insert_word(region, word, bits);
                pages += u64::from(bits.count_ones());
            }
        }
        Ok(pages - (into.len() - before))
    }
}

fn failed(call: &str, slot: &Slot, source: io::Error) -> GuestError {
    GuestError::Io { doing: format!("{call} of memslot {}", slot.number), source }
}

/// See the module. Writes by the VMM's own threads are not seen.
pub(super) struct LogTracker {
    log: Log,
    /// Read and cleared, and not yet harvested; how many of them were written again.
    ahead: DirtySet,
    again: u64,
    back_off: BackOff,
}

impl LogTracker {
    pub fn new(machine: Arc<Machine>) -> Self {
        let bitmaps = machine.slots().iter().map(|slot| vec![0; slot.pages.div_ceil(64) as usize]).collect();
        let pages = machine.slots().iter().map(|slot| slot.first_page + slot.pages).max().unwrap_or(0);
        let ahead = DirtySet::new([(machine.region(), pages)]);
        Self { log: Log { machine, bitmaps }, ahead, again: 0, back_off: BackOff::default() }
    }

    fn forget(&mut self) {
        self.ahead.clear();
        self.again = 0;
    }
}

impl DirtyTracker for LogTracker {
    fn kind(&self) -> TrackerKind {
        TrackerKind::KvmLog
    }

    fn sees_device_writes(&self) -> bool {
        false
    }

    fn start(&mut self) -> Result<(), GuestError> {
        let machine = &self.log.machine;
        machine.control().check_paused("start tracking")?;
        machine.log_dirty_pages()?;
        self.log.read()?;
        self.log.take(&mut self.ahead)?;
        self.forget();
        Ok(())
    }

    fn prepare(&mut self) -> Result<(), GuestError> {
        let mut passes = self.back_off.passes();
        while passes.are_left() && passes.another(self.log.read()?) {
            self.again += self.log.take(&mut self.ahead)?;
        }
        Ok(())
    }

    fn harvest(&mut self, into: &mut DirtySet) -> Result<(), GuestError> {
        self.log.machine.control().check_paused("harvest")?;
        self.log.read()?;
        into.merge(&self.ahead);
        let again = self.log.take(into)?;
        self.back_off.harvested(self.ahead.len(), self.again + again);
        self.forget();
        Ok(())
    }

    fn dirty_so_far(&mut self) -> Option<u64> {
        None
    }
}
