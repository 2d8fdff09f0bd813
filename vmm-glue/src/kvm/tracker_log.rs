//! The KVM dirty log as a tracker: a bit a page, read and cleared while the guest stands still.
//!
//! With KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 reading does not protect; KVM_CLEAR_DIRTY_LOG protects just the pages that were
//! dirty. See "KVM_CLEAR_DIRTY_LOG" in the kernel's virt/kvm/api.rst.

use super::ioctl;
use super::machine::Machine;
use belay_checkpoint::dirty::DirtySet;
use belay_checkpoint::guest::{DirtyTracker, GuestError, TrackerKind};
use std::sync::Arc;

/// See the module. Writes by the VMM's own threads are not seen.
pub(super) struct LogTracker {
    machine: Arc<Machine>,
    /// A bitmap a memslot, taken once.
    bitmaps: Vec<Vec<u64>>,
}

impl LogTracker {
    pub fn new(machine: Arc<Machine>) -> Self {
        let bitmaps = machine.slots().iter().map(|slot| vec![0; slot.pages.div_ceil(64) as usize]).collect();
        Self { machine, bitmaps }
    }

    fn take(&mut self, mut each: impl FnMut(u64, u64)) -> Result<(), GuestError> {
        for (slot, bitmap) in self.machine.slots().iter().zip(&mut self.bitmaps) {
            let failed =
                |call: &str, source| GuestError::Io { doing: format!("{call} of memslot {}", slot.number), source };
            ioctl::get_dirty_log(self.machine.vm(), slot.number, slot.pages, bitmap)
                .map_err(|source| failed("KVM_GET_DIRTY_LOG", source))?;
            if bitmap.iter().all(|&word| word == 0) {
                continue;
            }
            ioctl::clear_dirty_log(self.machine.vm(), slot.number, slot.pages, bitmap)
                .map_err(|source| failed("KVM_CLEAR_DIRTY_LOG", source))?;
            let first_word = slot.first_page / 64;
            bitmap.iter().enumerate().for_each(|(index, &bits)| each(first_word + index as u64, bits));
        }
        Ok(())
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
        self.machine.control().check_paused("start tracking")?;
        self.machine.log_dirty_pages()?;
        self.take(|_, _| {})
    }

    fn harvest(&mut self, into: &mut DirtySet) -> Result<(), GuestError> {
        self.machine.control().check_paused("harvest")?;
        let id = self.machine.region();
        self.take(|word, bits| into.insert_word(id, word as usize, bits))
    }

    fn dirty_so_far(&mut self) -> Option<u64> {
        None
    }
}
