//! `verbs`: one-sided RDMA over reliable connections (InfiniBand, RoCE v2, iWARP), set up by rdma_cm.
//!
//! ```text
//!   owner (source)                                                   initiator (destination)
//!   exports registered, chunk by chunk                               local memory registered
//!   ── exports connection (TLS): address, challenge, table ───────>  kept; a new table is acknowledged
//!   listens  <───────── rdma_cm request: lane, proof ──────────────  one queue pair a lane
//!            ────────── acceptance: proof of its own ─────────────>  checked before anything is posted
//!   its device answers by itself  <═════ READ, WRITE ══════════════  posts and polls in the lane's own thread
//! ```
//! The initiator connects, so that on iWARP the side that connects also sends first, as MPA demands (RFC 5044). A thread at each side (the
//! *steward*) sleeps in epoll on the exports connection, rdma_cm's events and the device's own; it has no part in any operation.
//!
//! *Commit* (see [`lane`]): the trailer's WRITE has completed; on iWARP a READ-back behind it too.
//! *Revocation* (see [`owner`]): queue pairs stopped and destroyed, the ring deregistered, its last read; guest RAM given back in the
//! background, as is a queue pair that the kernel does not let go (see [`burial`]).
//! *Bounds*: [`UNREACHABLE_AFTER`] for a peer or a network that is gone while something is outstanding; the end of the exports connection
//! tells of a process that died; every step of a set-up has its caller's deadline.

mod address;
mod admission;
mod burial;
mod cm;
mod device;
mod endpoint;
mod error;
mod exports_stream;
#[cfg(test)]
mod fake_device;
mod fate;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
#[cfg(test)]
mod golden;
mod initiator;
pub mod inventory;
mod lane;
#[cfg(test)]
mod lane_tests;
mod memory_region;
mod owner;
mod proof;
mod queue;
mod queue_pair;
#[cfg(test)]
mod rdma_tests;
mod registration;
mod settings;
mod table;

pub(crate) use address::undecided;
pub use error::{RefusedLane, VerbsError};
pub use initiator::VerbsInitiator;
pub use owner::VerbsOwner;
pub use registration::{LockedMemory, MemlockTooLow, RegistrationError, RegistrationReport, TooManyRegions};
pub use settings::VerbsSettings;

use super::{LaneId, LaneKind};
use std::time::Duration;

/// Most lanes of one kind.
pub(super) const MAX_LANES_OF_A_KIND: u16 = 256;

/// The session's connection that carries exports: what may be read or written and where, and how to reach it. An id that no
/// lane of operations can have.
pub(super) const EXPORTS: LaneId = LaneId { kind: LaneKind::Checkpoint, index: u16::MAX };

/// Times a queue pair tries again when nothing comes back. Seven, the most that fits, is without end on SoftRoCE.
const RETRY_COUNT: u8 = 6;
/// Times it tries again when the peer is not ready to receive. Seven is without end by the specification; nothing here needs even one,
/// since no operation consumes a receive.
const RNR_RETRY_COUNT: u8 = 6;
/// A queue pair waits for an acknowledgement 4.096 µs times two to this power (InfiniBand specification, 9.7.6.1.3).
const ACKNOWLEDGEMENT_TIMEOUT: u8 = 16;

/// How long one try waits.
const fn acknowledgement_timeout() -> Duration {
    Duration::from_nanos(4096 << ACKNOWLEDGEMENT_TIMEOUT)
}

/// After about this long (up to four times it, the specification lets a device take) an operation whose peer says nothing has failed.
pub const UNREACHABLE_AFTER: Duration =
    Duration::from_nanos((4096 << ACKNOWLEDGEMENT_TIMEOUT) * (RETRY_COUNT as u64 + 1));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_that_is_silent_is_given_up_within_two_seconds() {
        assert!(UNREACHABLE_AFTER < Duration::from_secs(2), "{UNREACHABLE_AFTER:?}");
        assert!(UNREACHABLE_AFTER > Duration::from_secs(1), "a switch may take that long to come back");
        const { assert!(RETRY_COUNT < 7 && RNR_RETRY_COUNT < 7) };
    }
}
