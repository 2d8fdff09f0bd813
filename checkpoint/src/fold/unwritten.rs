//! What a catch could not write to the images: kept, in the order of the epochs, until they take it. By then the old destination is shut out, so
//! nobody else has it.

use super::{FoldError, apply};
use crate::guest::Epoch;
use crate::storage::Storage;
use std::collections::VecDeque;
use std::sync::Arc;

/// See the module. No longer than a ring is.
#[derive(Debug, Default)]
pub struct Unwritten {
    storage: Option<Arc<dyn Storage>>,
    kept: VecDeque<Kept>,
}

#[derive(Debug)]
struct Kept {
    epoch: Epoch,
    disk: usize,
    writes: Vec<u8>,
}

impl Unwritten {
    pub(super) fn of(storage: Option<Arc<dyn Storage>>) -> Self {
        Self { storage, kept: VecDeque::new() }
    }

    /// Writes what the images take; keeps what they do not, and all that follows it.
    pub(super) fn take(
        &mut self,
        storage: &dyn Storage,
        epoch: Epoch,
        disk: usize,
        writes: &[u8],
        between: &mut dyn FnMut(),
    ) {
        if !self.kept.is_empty() || apply(storage, epoch, disk, writes, between).is_err() {
            self.kept.push_back(Kept { epoch, disk, writes: writes.to_vec() });
        }
    }

    /// Whether the images have everything.
    pub fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    /// Writes what is kept. Before this has succeeded the guest must not run: its memory is ahead of its disks. It may be tried again as often as
    /// one likes; what the images have taken is not written again.
    pub fn write(&mut self) -> Result<(), FoldError> {
        let Some(storage) = &self.storage else { return Ok(()) };
        while let Some(Kept { epoch, disk, writes }) = self.kept.front() {
            apply(&**storage, *epoch, *disk, writes, &mut || ())?;
            self.kept.pop_front();
        }
        Ok(())
    }
}
