//! Who may run the guest: two pure functions, one a role, from a state and an event to the next state and what to do now.
//!
//! Nothing here does I/O, reads a clock or waits. Time enters as events (`LeaseRanOut`, `LeaseExpired`), and what a role decides
//! leaves as a list of actions, to be carried out **in the order given, one after the other**; an action that can finish or fail
//! answers with an event. What a clock raises counts from what was carried out, not from what was decided. The same functions are
//! driven by the real roles, by the exhaustive tests of `diagram.rs` and, through every history within bounds, by the model of two hosts and a
//! bad network in `model/`.
//!
//! What they guarantee, whatever the order of events:
//! * **P2** the source never folds, loads or resumes before the destination's session is revoked, and under `lease` not before
//!   the destination's death is proven, or the operator has given their word *and* the lease has run out.
//! * **P6** only a release that was asked for with every page landed, written down, fsynced and acknowledged ends a migration;
//!   from the moment it is written down nothing here can resume the guest on the source.
//! * A destination never resumes a guest it was fenced from, unless the source said that it had not revoked, or had released, or the arbiter
//!   said that the guest is this host's.
//! * Where there is an **arbiter**, its record of who has the guest begins as *lent to the destination* and changes once, by compare-and-swap:
//!   to the source's before it revokes, or to the destination's before that goes on alone. An answer that is lost is asked for again; while
//!   none is known nobody takes what is not theirs. Without an arbiter a claim is granted at once, and only an operator makes a destination claim.
//!
//! Beside the states of the design there is one edge the design does not draw: *Switching → Revoking*. Once the message on which the
//! destination may resume is on its way, a failed switch cannot simply be taken back: the destination may have run, committed and
//! shown output. It is revoked and caught like any other; only before that message the guest just goes on (*Switching → Running*).
//!
//! A source that died is started again by [`source::restart`], which says where it goes on from the state that was kept before each
//! act it allowed: *Resuming*, where it waits for the destination to come back, or where it died in a catch or a release.
//!
//! # Source
//!
//! ```text
//! stateDiagram-v2
//!     [*] --> Running
//!     [*] --> Resuming
//!     Running --> Switching : SwitchStarted
//!     Switching --> Serving : DestinationResumed
//!     Switching --> Running : SwitchFailed, Cancelled, DeathSign, ConnectionClosed, DeathProven
//!     Switching --> Revoking : SwitchFailed, Cancelled, DeathSign, ConnectionClosed, DeathProven
//!     Serving --> Revoking : DeathSign, ConnectionClosed, LeaseRanOut, OperatorCatch, DeathProven, ReleaseFailed
//!     Serving --> Released : ReleaseRecorded
//!     Resuming --> Serving : FateAsked, OperatorCatch, GraceRanOut
//!     Resuming --> Revoking : OperatorCatch, GraceRanOut, DeathProven
//!     Revoking --> Running : GuestResumed
//!     Revoking --> Lost : CatchFailed
//!     Revoking --> Ceded : ArbiterRefused
//! ```
//!
//! # Destination
//!
//! ```text
//! stateDiagram-v2
//!     [*] --> Preparing
//!     Preparing --> Tethered : GuestResumed
//!     Preparing --> Aborted : PrepareFailed, Cancelled, ConnectionClosed, SourceRevoked, GuestDied, SourceDead
//!     Tethered --> Owner : ReleaseAcknowledged
//!     Tethered --> Fenced : ConnectionClosed, LeaseExpired, CommitFailed, SourceRevoked, GuestDied, SourceDead
//!     Fenced --> Tethered : FateAnswered
//!     Fenced --> Owner : FateAnswered, ReleaseAcknowledged, ArbiterGranted, PromotedByForce
//!     Fenced --> Retired : FateAnswered, SourceRevoked, GuestStopped, StopTimedOut, ArbiterRefused, ArbiterAway
//!     Fenced --> Lost : FateAnswered, ReleaseAcknowledged, ArbiterGranted, SourceDead, GuestDied, GuestStopped, StopTimedOut
//! ```

pub mod destination;
pub mod source;

#[cfg(test)]
mod diagram;
#[cfg(test)]
mod model;

use serde::{Deserialize, Serialize};
use std::fmt;

/// Counts the owners a guest has had: bumped by each revocation, so that whatever an earlier destination still sends is known as
/// an earlier one's. The word at [`belay_transport::fabric::OWNER_EPOCH_OFFSET`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct OwnerEpoch(pub u64);

impl OwnerEpoch {
    /// The one after this.
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }

    /// The one before this; of the first, itself.
    pub fn before(self) -> Self {
        Self(self.0.saturating_sub(1))
    }
}

impl fmt::Display for OwnerEpoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "owner epoch {}", self.0)
    }
}

/// What became of a guest, as the source tells a destination that has lost its tether and asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Fate {
    /// Not revoked: the destination may tether again and go on.
    StillTethered,
    /// Taken back, or about to be: the destination never runs this guest again.
    Revoked,
    /// Given away for good: the destination owns the guest.
    Released,
}

/// An event that has no meaning in a state: a step reported done that was not under way, or a peer that breaks the protocol.
/// The state stands as it was.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the {role} is {state}, where the event {event} has no meaning")]
pub struct Illegal {
    /// `source` or `destination`.
    pub role: &'static str,
    /// Name of the state.
    pub state: &'static str,
    /// The event with its values.
    pub event: String,
}

/// A situation that the operator must hear about by name (P9). The text says what happened and what to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "kebab-case")]
pub enum Named {
    #[error("the switch did not happen; the guest goes on here")]
    SwitchTakenBack,
    #[error(
        "the destination is out of reach and its output was not held back, so it may still be showing output: make sure that it is \
         off, then order the catch"
    )]
    AwaitingOperator,
    #[error("the catch was ordered; it begins when the destination's lease has run out or its death is proven")]
    AwaitingLease,
    #[error("the destination is being revoked")]
    Catching,
    #[error(
        "the destination could not be revoked, so the guest stays stopped here; order the catch again once its session is cut"
    )]
    CannotRevoke,
    #[error(
        "the catch has stopped half way, nothing is lost; mend what the message before this names and order the catch again"
    )]
    CatchStuck,
    #[error("taken over: waiting for the destination to come back")]
    Resuming,
    #[error("the guest is back and runs here")]
    Caught,
    #[error("a release was asked for and refused: pages are missing there, or its connection has failed")]
    ReleaseRefused,
    #[error("released: the guest is the destination's, and can never be resumed here")]
    Released,
    #[error("the guest was not taken over; it goes on at the source")]
    Aborted,
    #[error(
        "cut off from the source: the guest is stopped and its memory kept until the source answers or someone promotes it"
    )]
    Fenced,
    #[error("the source took the guest back; what is here is of no more use")]
    Retired,
    #[error("tethered again")]
    TetheredAgain,
    #[error("the guest is this host's own")]
    Owner,
    #[error("not every page has landed here, so this host cannot have the guest for its own")]
    PagesMissing,
    #[error("the guest would not stop in time, most likely because it waits for a page; its output is shut")]
    StopTimedOut,
    #[error(
        "every page is here but the source is gone: unless it had taken the guest back before, promote it to let it run on"
    )]
    AwaitingPromotion,
    #[error("the guest is lost: neither host can run it; its memory is kept for whoever wants to look")]
    Lost,
    #[error(
        "the arbiter has not said whose the guest is, so nobody takes it: it stands still here or goes on where it was, its memory is kept, and \
         the arbiter is asked again and again"
    )]
    AwaitingArbiter,
    #[error("the arbiter says that the destination has made the guest its own: it is never resumed here")]
    Ceded,
    #[error(
        "the arbiter says that the source has taken the guest back: it stays stopped here and its memory kept until the source is heard, or \
         somebody who knows that it never ran there promotes it by force"
    )]
    TakenBack,
}
