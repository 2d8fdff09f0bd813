//! The tether thread's record: what of an epoch is put together in the pause, and what after it.

use super::taking::TetherLoop;
use crate::clock::boottime_ns;
use crate::dirty::Harvested;
use crate::epoch::{EpochStats, TetherError};
use crate::guest::{Epoch, Packet};
use crate::record::{DEVICE_VMM, Limits, PacketHeader, kind};
use crate::staging::{HeldPages, Slot, StageError, Stager, Unfinished};
use crate::storage::DiskWrites;
use zerocopy::IntoBytes;

/// A record that has begun.
pub(super) struct Begun {
    epoch: Epoch,
    record: Option<Unfinished>,
    /// Who has its pages, where they are added after the pause. Dropped, it lets them go, and whoever waits to write one.
    pub held: Option<Box<dyn HeldPages>>,
    /// What is known of it so far: pages and discards, not its bytes.
    pub stats: EpochStats,
}

impl TetherLoop {
    /// Begins the epoch's record with everything but its pages, and holds these where they are to be added after the pause. Guest stopped.
    pub(super) fn begin_record(&mut self, slot: Slot, epoch: Epoch) -> Result<Begun, TetherError> {
        let flushed = self.disk_writes.iter().any(|writes| writes.flushed);
        let packets = self.outbox.close_epoch(epoch, flushed);
        output_stream(&packets, &mut self.output);
        let released = self.outbox.released_up_to();
        let too_large = |what, bytes, limit| Err(TetherError::TooLarge { what, epoch, bytes, limit });
        if self.device_state.len() > Limits::DEVICE_STATE_BYTES {
            return too_large("device state", self.device_state.len(), Limits::DEVICE_STATE_BYTES);
        }
        if self.output.len() > Limits::OUTPUT_BYTES {
            return too_large("held output", self.output.len(), Limits::OUTPUT_BYTES);
        }
        for writes in &self.disk_writes {
            if writes.bytes.len() > Limits::DISK_BYTES {
                return too_large("writes to a disk", writes.bytes.len(), Limits::DISK_BYTES);
            }
        }
        let memory = self.guest.memory();
        let Harvested { dirty, discards } = &mut self.pages;
        let limit = self.config.overflow_bytes;
        let holds = self.may_hold && self.config.staging.holds(dirty.len());
        let stats = EpochStats {
            epoch: epoch.0,
            pages: dirty.len(),
            discards: discards.len(),
            packets: packets.len(),
            ..EpochStats::default()
        };
        let begin = || -> Result<Begun, StageError> {
            let mut stager = Stager::begin(slot, &mut self.slots, epoch, memory.len(), boottime_ns(), limit)?;
            stager.stream(kind::DEVICE_STATE, DEVICE_VMM, &self.device_state)?;
            stager.stream(kind::HELD_OUTPUT, 0, &self.output)?;
            if let Some(released) = released {
                stager.stream(kind::RELEASED_UP_TO, 0, &released.to_le_bytes())?;
            }
            for DiskWrites { device, bytes, .. } in &self.disk_writes {
                stager.stream(kind::DISK_WRITES, *device, bytes)?;
            }
            stager.discards(discards, memory)?;
            let record = Some(stager.suspend());
            let held = if holds { self.tracker.hold(dirty)? } else { None };
            Ok(Begun { epoch, record, held, stats })
        };
        begin().map_err(|source| TetherError::Stage { epoch, source })
    }

    /// Adds the pages of the epoch that is being taken, as they are. Guest stopped.
    pub(super) fn add_pages(&mut self, begun: &mut Begun) -> Result<(), TetherError> {
        let record = begun.record.take().expect("taken out by whoever goes on with it, and put back");
        let mut stager = Stager::go_on(record, &mut self.slots);
        stager
            .pages(&mut self.pages.dirty, self.guest.memory())
            .map_err(|source| TetherError::Stage { epoch: begun.epoch, source })?;
        begun.record = Some(stager.suspend());
        Ok(())
    }

    /// Adds the pages of the epoch that was taken last, if they are held, as they were then. The guest may run.
    pub(super) fn add_held_pages(&mut self, begun: &mut Begun) -> Result<(), TetherError> {
        let Some(mut held) = begun.held.take() else { return Ok(()) };
        let record = begun.record.take().expect("as above");
        let (_, pages) = self.outstanding.back_mut().expect("an epoch that was taken is outstanding");
        let mut stager = Stager::go_on(record, &mut self.slots);
        let add = || {
            stager.held_pages(&mut pages.dirty, self.guest.memory(), held.as_mut())?;
            held.end()
        };
        let copied_on_write = add().map_err(|source| TetherError::Stage { epoch: begun.epoch, source })?;
        begun.stats.copied_on_write = Some(copied_on_write);
        begun.record = Some(stager.suspend());
        Ok(())
    }

    /// Ends the record; its last part.
    pub(super) fn end_record(&mut self, begun: Begun) -> Result<(Slot, EpochStats), TetherError> {
        let Begun { epoch, record, stats, .. } = begun;
        let stager = Stager::go_on(record.expect("as above"), &mut self.slots);
        debug_assert_eq!(stager.page_count(), stats.pages, "what was harvested is what is staged");
        let (slot, bytes) = stager.finish().map_err(|source| TetherError::Stage { epoch, source })?;
        Ok((slot, EpochStats { bytes, ..stats }))
    }
}

/// Writes packets as the held-output stream.
fn output_stream(packets: &[Packet], into: &mut Vec<u8>) {
    into.clear();
    for packet in packets {
        let len = u32::try_from(packet.bytes.len()).expect("an outbox is bounded far below 4 GiB");
        let header = PacketHeader { sequence: packet.sequence.into(), len: len.into() };
        into.extend_from_slice(header.as_bytes());
        into.extend_from_slice(&packet.bytes);
    }
}
