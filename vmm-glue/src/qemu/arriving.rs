//! A QEMU that takes a guest, and the guest once it is in there.

use super::disks::Disks;
use super::machine::Machine;
use super::state::{State, begin_devices};
use super::wire::Wire;
use belay_checkpoint::dirty::DirtySet;
use belay_checkpoint::guest::{DirtyTracker, Guest, GuestError, RamBlock, TrackerKind};
use belay_checkpoint::storage::Storage;
use belay_transport::Deadline;
use std::sync::Arc;
use std::time::Duration;

/// For an untethered guest's disks to become this host's.
const OWN: Duration = Duration::from_secs(10);

/// A guest of this host, or one that is to come.
pub struct ArrivingGuest {
    machine: Machine,
    blocks: Vec<RamBlock>,
    wire: Wire,
    disks: Disks,
    /// What the guest does to its disks goes into checkpoints; otherwise they are this host's as soon as it runs.
    tethered: bool,
    paused: bool,
}

impl ArrivingGuest {
    /// Around a QEMU that waits for a guest, over these blocks.
    pub fn new(machine: Machine, blocks: Vec<RamBlock>, wire: Wire, disks: Disks, tethered: bool) -> Self {
        Self { machine, blocks, wire, disks, tethered, paused: true }
    }
}

impl Guest for ArrivingGuest {
    fn pause(&mut self, deadline: Deadline) -> Result<(), GuestError> {
        if !self.paused {
            // A guest whose disk relay has gone must stand all the same; that it has gone is said where its epoch is closed.
            let _ = self.disks.prepare();
            if let Err(error) = self.machine.stop(deadline) {
                let _ = self.disks.go();
                return Err(error);
            }
            self.paused = true;
            self.wire.settle()?;
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        if self.paused {
            if !self.tethered {
                self.disks.own(Deadline::after(OWN))?;
            }
            self.disks.wait_for_room()?;
            self.machine.go_on()?;
            self.paused = false;
            self.wire.go()?;
            self.disks.go()?;
        }
        Ok(())
    }

    fn save(&mut self, out: &mut Vec<u8>) -> Result<(), GuestError> {
        begin_devices(out, self.wire.next_output());
        self.machine.save_devices(out)
    }

    fn load(&mut self, state: &[u8]) -> Result<(), GuestError> {
        match State::read(state)? {
            (State::Stream(stream), next_output) => {
                self.wire.count_from(next_output);
                self.machine.stream_in(&[stream])
            }
            (State::Devices(_), _) => {
                Err(GuestError::BadState("a checkpoint, where a guest's first state is due".to_owned()))
            }
        }
    }

    fn set_incarnation(&mut self, _nonce: u64) -> Result<(), GuestError> {
        // Nothing of QEMU's machine tells a guest.
        Ok(())
    }

    fn memory(&self) -> &[RamBlock] {
        &self.blocks
    }

    fn tracker(&mut self, kind: TrackerKind) -> Result<Box<dyn DirtyTracker>, GuestError> {
        Err(GuestError::NoTracker { kind, reason: "QEMU's own dirty log is not ours to read; use uffd-wp".to_owned() })
    }

    fn parks_itself(&self) -> bool {
        // QEMU's devices know nothing of the outbox.
        false
    }

    fn output_is_full(&self) -> bool {
        self.wire.is_full()
    }

    fn storage(&self) -> Option<Arc<dyn Storage>> {
        self.disks.storage()
    }

    fn device_writes(&mut self, _into: &mut DirtySet) -> Result<(), GuestError> {
        // What QEMU's threads write goes through the mapping that is tracked.
        Ok(())
    }
}
