//! Epochs: the tether that takes, ships and commits reverse checkpoints for as long as the guest runs away from home.
//!
//! ```text
//! tether thread    policy … prepare | pause  save  harvest  stage  close output  resume | policy …
//!                                   | pause  save  harvest  hold   close output  resume | stage | policy …    (copy-on-write staging)
//!                                                              └─ slot ─┐
//! shipping thread                          checksum, write, commit ─> outbox.committed ─> slot back
//! heartbeat thread   counter ─> ring … owner's words ─> lease
//! ```
//! Rules of this room:
//! * Content is read only while the guest is stopped (P8), or as it was then ([`crate::staging::HeldPages`]), and a record holds exactly one
//!   such instant (P3). Everything held has been taken before the next epoch is begun.
//! * Output of an epoch is let go by `Outbox::committed`, which is called after the commit has been reported and nowhere else (P4).
//! * There are two slots and two places in each queue between the threads; when both slots are on their way no new epoch is
//!   taken, and the guest feels that through its outbox (P7). Every wait has a bound and a failure with a name.
//! * What has been harvested has been forgotten by its tracker. From a harvest on, everything that fails ends the tether,
//!   with the guest stopped and its memory kept: who runs it then is decided above (`ownership`).

mod harvest;
mod heartbeat;
mod ship;
mod stats;
mod tether;

pub use harvest::harvest;
#[cfg(test)]
pub(crate) use heartbeat::Beats;
pub use heartbeat::{Heartbeat, HeartbeatConfig, HeartbeatError, HeartbeatStatus};
pub use stats::{EpochStats, PauseParts, TetherStats};
pub use tether::{Tether, TetherConfig, TetherEnd, TetherParts, overflow_is_enough};

use crate::dirty::DirtySet;
use crate::guest::{Epoch, GuestError, TrackerKind};
use crate::ring::ShipError;
use crate::staging::StageError;
use belay_transport::{PageIndex, RegionId};
use std::sync::Arc;
use std::time::Duration;

/// What the pull engine knows that a harvest needs.
pub trait Arrivals: Send {
    /// Whether the bytes behind the alias are the guest's: the page has landed, or was discarded and is the guest's own since.
    fn landed(&self, region: RegionId, page: PageIndex) -> bool;

    /// Adds every page that was discarded since the last call to `discards`, and to `perhaps` those that may have been: what they hold has to be
    /// looked at. Guest paused.
    fn take_discards(&mut self, discards: &mut DirtySet, perhaps: &mut DirtySet);
}

/// Hears of epochs. Called on the tether's threads; must not block.
pub trait EpochObserver: Send + Sync {
    /// An epoch has been closed and is on its way: the guest `ran` in it for so long, sent `packets` and wrote `dirty`. Called while the next one runs.
    fn closed(&self, _ran: Duration, _packets: usize, _dirty: &DirtySet) {}
    /// An epoch has committed.
    fn committed(&self, _stats: &EpochStats) {}
    /// The guest would not stop in time and goes on; tried again soon. `tries` in a row so far.
    fn stop_timed_out(&self, _tries: u32, _error: &GuestError) {}
    /// The tether has failed. [`Tether::stop`] says how the guest is.
    fn failed(&self, _error: &Arc<TetherError>) {}
}

/// Why a tether ended.
#[derive(Debug, thiserror::Error)]
pub enum TetherError {
    #[error("the guest would not stop for a checkpoint, {tries} times in a row")]
    StopTimedOut {
        tries: u32,
        #[source]
        source: GuestError,
    },
    #[error("{doing} of {epoch} failed")]
    Guest {
        doing: &'static str,
        epoch: Epoch,
        #[source]
        source: GuestError,
    },
    #[error("{epoch} could not be staged")]
    Stage {
        epoch: Epoch,
        #[source]
        source: StageError,
    },
    #[error("{epoch} could not be shipped")]
    Ship {
        epoch: Epoch,
        #[source]
        source: ShipError,
    },
    #[error("{what} of {epoch} has {bytes} bytes; a record may have {limit}")]
    TooLarge { what: &'static str, epoch: Epoch, bytes: usize, limit: usize },
    #[error(
        "a record of this guest can have {needed} bytes, the source has reserved {reserved} (--overflow), and the tracker cannot \
         tell before a stop how much is dirty"
    )]
    OverflowUnwatched { needed: u64, reserved: u64 },
    #[error(
        "the source has reserved {reserved} bytes for a record (--overflow); {least} is the least that can be worked with"
    )]
    OverflowTooSmall { reserved: u64, least: u64 },
    #[error(
        "epochs cannot be copied on write (--staging cow) {}", if *watched {
            "while the guest must be watched: the source has reserved less than all of it (--overflow)".to_owned()
        } else {
            format!("with the tracker {tracker:?} here; with uffd-sync and the kvm VMM they can")
        }
    )]
    CannotHold { tracker: TrackerKind, watched: bool },
    #[error("no slot came free within {bound:?}: {shipping} is being shipped and does not commit")]
    NoSlot { shipping: Epoch, bound: Duration },
    #[error("thread for {what} could not be started")]
    Thread {
        what: &'static str,
        #[source]
        source: std::io::Error,
    },
    #[error("the thread for {what} panicked")]
    Panicked { what: &'static str },
}

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
