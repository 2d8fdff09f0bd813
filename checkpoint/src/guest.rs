//! What a VMM must give so that its guest can be moved, tethered and caught.

use crate::dirty::DirtySet;
use crate::staging::{HeldPages, StageError};
use crate::storage::Storage;
use belay_transport::region::{Mapping, RamFile};
use belay_transport::{Deadline, PageSize, RegionId};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// A checkpoint's number. 0 is the state at the switch; each harvested epoch has the next one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The one after this.
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl std::fmt::Display for Epoch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "epoch {}", self.0)
    }
}

/// One block of guest RAM as seen by belay's process: the file and an alias mapping of it (never the mapping the vCPUs use).
#[derive(Debug, Clone)]
pub struct RamBlock {
    pub id: RegionId,
    pub page_size: PageSize,
    pub file: Arc<RamFile>,
    pub alias: Arc<Mapping>,
    /// Address of the block in the VMM's own address space, where its userfaultfd is registered.
    pub vmm_address: u64,
}

/// A guest, through its VMM. Calls come from one thread at a time.
pub trait Guest: Send {
    /// Stops the guest for good or for a harvest (P8): when this returns, every vCPU is outside KVM_RUN, completions of its
    /// pending I/O have been played in, device I/O is drained and every packet it emitted has reached its [`PacketSink`].
    /// Idempotent. A vCPU that waits for a page ends by `deadline` in [`GuestError::StopTimedOut`], with the guest still going.
    fn pause(&mut self, deadline: Deadline) -> Result<(), GuestError>;

    /// Lets the guest run. Idempotent.
    fn resume(&mut self) -> Result<(), GuestError>;

    /// Appends vCPU and device state to `out`. Only while paused.
    fn save(&mut self, out: &mut Vec<u8>) -> Result<(), GuestError>;

    /// Takes state that [`Guest::save`] gave. Only while paused. May touch guest memory, so faults must be served by then.
    fn load(&mut self, state: &[u8]) -> Result<(), GuestError>;

    /// Announces the incarnation the guest will see from its next resume on (first start, after the switch, after a catch).
    fn set_incarnation(&mut self, nonce: u64) -> Result<(), GuestError>;

    /// Guest RAM.
    fn memory(&self) -> &[RamBlock];

    /// The tracker of this VMM's choice or the operator's (see [`TrackerKind`]).
    fn tracker(&mut self, kind: TrackerKind) -> Result<Box<dyn DirtyTracker>, GuestError>;

    /// Whether the guest stops emitting by itself while its [`PacketSink`] has no room. One that does not is stopped by the tether.
    fn parks_itself(&self) -> bool {
        true
    }

    /// Whether output that is held elsewhere than in the outbox is as much as may be (P7): the tether then ends the epoch. Asked while the guest
    /// runs, every few milliseconds.
    fn output_is_full(&self) -> bool {
        false
    }

    /// At a source whose guest is away: sees to what a catch will need, and gives what there is to tell of it. Called every few milliseconds.
    fn tend(&mut self) -> Option<Result<String, GuestError>> {
        None
    }

    /// Its writable disks, where their images are kept apart from what it writes ([`crate::storage`]).
    fn storage(&self) -> Option<Arc<dyn Storage>> {
        None
    }

    /// Pages that user-space devices wrote since the last call, where the tracker does not see them. Only while paused.
    fn device_writes(&mut self, into: &mut DirtySet) -> Result<(), GuestError>;
}

/// Ways to learn which pages a guest wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TrackerKind {
    /// KVM_GET_DIRTY_LOG with KVM_CLEAR_DIRTY_LOG (manual protect): a bit a page, cost grows with guest size.
    KvmLog,
    /// KVM dirty ring: cost follows what was dirtied.
    KvmRing,
    /// userfaultfd async write-protect + PAGEMAP_SCAN: sees writes by every thread of the VMM, needs Linux 6.7.
    UffdWp,
    /// userfaultfd sync write-protect: the first write to a group of pages waits for whoever serves the guest's faults. Sees writes by
    /// every thread of the VMM; cost follows what was dirtied.
    UffdSync,
}

/// Learns which pages were written. Honest about what it sees.
pub trait DirtyTracker: Send {
    /// Which it is.
    fn kind(&self) -> TrackerKind;

    /// Whether writes by the VMM's own threads (device models) are seen, or only those of vCPUs and KVM.
    fn sees_device_writes(&self) -> bool;

    /// Starts tracking: what is written from now on is reported by the next harvest. Guest paused.
    fn start(&mut self) -> Result<(), GuestError>;

    /// Does what can be done of the next harvest while the guest still runs, so that the pause is shorter: called right before the guest is
    /// to be stopped, and perhaps again when it would not stop. What it finds is in the next harvest, whenever that comes.
    fn prepare(&mut self) -> Result<(), GuestError> {
        Ok(())
    }

    /// Adds every page written since [`DirtyTracker::start`] or the last harvest to `into`, and tracks anew. Guest paused (P8). May
    /// report a page that was not written or not landed; never misses one that was.
    fn harvest(&mut self, into: &mut DirtySet) -> Result<(), GuestError>;

    /// Takes those pages out of `dirty` whose content is what it was when they were last left in by this call, where the tracker can
    /// tell. Right after a harvest, in the same pause; by then `dirty` holds only pages that go into the record (or are carried
    /// to a later one), and `discards` those that will read as zero.
    fn sift(&mut self, _dirty: &mut DirtySet, _discards: &DirtySet) -> Result<(), GuestError> {
        Ok(())
    }

    /// Whether [`DirtyTracker::hold`] can.
    fn can_hold(&self) -> bool {
        false
    }

    /// Keeps the pages of `dirty` as they are now until they have been taken, whatever the guest writes meanwhile: for an epoch that is put
    /// together while the guest runs again. Called after the sifting, in the same pause, and never while something is held. `None` where
    /// this tracker, or this set, is not for it: then they are to be copied before the guest goes on.
    fn hold(&mut self, _dirty: &DirtySet) -> Result<Option<Box<dyn HeldPages>>, StageError> {
        Ok(None)
    }

    /// Pages known to be dirty so far, without stopping the guest, for budget policies: a lower bound, but that pages which were written again
    /// after [`DirtyTracker::prepare`] count twice. `None` where the tracker cannot tell cheaply.
    fn dirty_so_far(&mut self) -> Option<u64>;
}

/// One unit of output of a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    /// Position in the guest's whole output, counted by its device and part of its state: after a catch the guest emits the
    /// same numbers again.
    pub sequence: u64,
    pub bytes: Vec<u8>,
}

/// Where a VMM puts what its guest emits. Called on vCPU threads; must not wait for the other host.
pub trait PacketSink: Send + Sync {
    /// Takes one packet. Never blocks for long: a full sink says so by [`PacketSink::has_room`] afterwards.
    fn emit(&self, packet: Packet);

    /// Whether the guest may emit more; a vCPU for which this is false parks (and stays stoppable) until it is true again (P7).
    fn has_room(&self) -> bool;
}

/// Why a VMM could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    #[error(
        "the guest did not stop within {bound_ms} ms ({running} of {vcpus} vCPUs still inside KVM_RUN, most likely waiting for a page)"
    )]
    StopTimedOut { bound_ms: u64, running: usize, vcpus: usize },
    #[error("{call} while the guest is {state}; it must be {wanted}")]
    WrongState { call: &'static str, state: &'static str, wanted: &'static str },
    #[error("{doing}")]
    Io {
        doing: String,
        #[source]
        source: std::io::Error,
    },
    #[error("device state is not of this VMM: {0}")]
    BadState(String),
    #[error("this VMM cannot run such a guest: {0}")]
    Unsupported(String),
    #[error("tracker {kind:?} is not available: {reason}")]
    NoTracker { kind: TrackerKind, reason: String },
    #[error("the VMM process ended: {0}")]
    VmmGone(String),
    #[error("the guest itself failed: {0}")]
    Crashed(String),
}
