//! Messages of the control stream between source and destination.
//!
//! ```text
//! source                                         destination
//!   Hello (geometry, Proposal) ─────────────────────►           session; not downtime
//!   ◄───────────────────────── Hello (accepted or why not)
//!   Prepare (keys, ring) ───────────────────────────►
//!   dials every lane, and the guard ────────────────►            RAM allocated, VMM started, lanes open
//!   ◄──────────────────────────────── Prepared (the guard's secrets)
//!   pauses the guest
//!   Switch (map, device state, nonce) ──────────────►            blackout begins at the pause
//!   ◄───────────────────────────────── Loaded                    faults are served, state is loaded, guest still stopped
//!   Go (owner epoch) ────────────────────────────────►            until this was sent the source may simply resume
//!   ◄──────────────────────────────── Resumed                    blackout ends
//!   Zeros (frames) ──────────────────────────────────►           as many as there are, over tcp; pages that need not be read
//!          pages by one-sided reads, checkpoints by one-sided writes
//!   ◄──────────────────────────────── AllLanded
//!   ◄──────────────────────────────── ReleaseAsked
//!   writes the release record, fsync
//!   Released ────────────────────────────────────────►           only this ends a migration (P6)
//!   ◄──────────────────────────────── Farewell                   the acknowledgement is acknowledged
//! ```
//! How the two meet again after a cut or a death is told in [`super::reattach`].
//! Either side may say `Failed` at any time and closes then. A closed stream without `Released` is a failure.
//!
//! Version 2: the proposal carries the migration's identity, and two messages let a destination that was cut off tether again.
//! Version 3: a source tells, over tcp, which pages it has found to be zero (`Zeros`).
//!
//! Encoding: postcard, one message a frame. A message's number is its position in the enum; new ones are added at the end, and
//! a change of meaning raises [`PROTOCOL_VERSION`].

use super::observation::ObservationId;
use super::switch_map::RegionClasses;
use crate::guard::Secrets;
use belay_checkpoint::guest::Epoch;
use belay_checkpoint::ownership::{Fate, OwnerEpoch};
use belay_transport::RegionId;
use belay_transport::fabric::{ReadKey, RingKeys};
use serde::{Deserialize, Deserializer, Serialize, de::DeserializeOwned};

/// Version of the messages below, beside the session's own.
pub const PROTOCOL_VERSION: u16 = 3;

/// From source to destination.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum ToDestination {
    Prepare {
        ram: Vec<(RegionId, ReadKey)>,
        ring: RingKeys,
        ring_geometry: RingOffer,
        because: ObservationId,
    },
    Switch {
        map: Vec<RegionClasses>,
        device_state: Vec<u8>,
        nonce: u64,
        because: ObservationId,
    },
    Go {
        owner_epoch: OwnerEpoch,
        because: ObservationId,
    },
    Released {
        because: ObservationId,
    },
    ReleaseRefused {
        because: ObservationId,
    },
    Fate {
        fate: Fate,
        because: ObservationId,
    },
    Failed {
        #[serde(deserialize_with = "told")]
        reason: String,
        because: ObservationId,
    },
    /// Of a source that comes back: the proof that it is this migration's.
    Reattach {
        proof: [u8; 32],
    },
    /// After [`Fate::StillTethered`] over another session: as `Prepare`, and the newest epoch that is in the source's RAM.
    PrepareAgain {
        ram: Vec<(RegionId, ReadKey)>,
        ring: RingKeys,
        ring_geometry: RingOffer,
        committed: Epoch,
        because: ObservationId,
    },
    /// Since the switch: frames that the map has for the source's content and that are zero. From `first` on those whose bit is set, lowest
    /// first.
    Zeros {
        region: RegionId,
        first: u64,
        bitmap: Vec<u8>,
    },
}

/// From destination to source.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum ToSource {
    Prepared {
        secrets: Option<Secrets>,
        because: ObservationId,
    },
    Loaded {
        because: ObservationId,
    },
    Resumed {
        because: ObservationId,
    },
    AllLanded {
        because: ObservationId,
    },
    ReleaseAsked {
        all_landed: bool,
        because: ObservationId,
    },
    Farewell,
    FateAsked {
        owner_epoch: OwnerEpoch,
    },
    GuestGone {
        because: ObservationId,
    },
    Failed {
        #[serde(deserialize_with = "told")]
        reason: String,
        because: ObservationId,
    },
}

/// Longest reason of a peer's that is kept.
pub(super) const MAX_REASON_BYTES: usize = 4096;

/// A peer's text as an operator's terminal may have it: not endless, and nothing in it moves the cursor.
fn told<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    let mut text = String::deserialize(from)?;
    let mut end = text.len().min(MAX_REASON_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    Ok(text.replace(char::is_control, "?"))
}

impl ToDestination {
    /// Its kind, for messages: what it carries is the guest's, or a key.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Prepare { .. } => "Prepare",
            Self::Reattach { .. } => "Reattach",
            Self::PrepareAgain { .. } => "PrepareAgain",
            Self::Switch { .. } => "Switch",
            Self::Go { .. } => "Go",
            Self::Released { .. } => "Released",
            Self::ReleaseRefused { .. } => "ReleaseRefused",
            Self::Fate { .. } => "Fate",
            Self::Failed { .. } => "Failed",
            Self::Zeros { .. } => "Zeros",
        }
    }
}

impl ToSource {
    /// Its kind, for messages: what it carries may be a secret.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Prepared { .. } => "Prepared",
            Self::Loaded { .. } => "Loaded",
            Self::Resumed { .. } => "Resumed",
            Self::AllLanded { .. } => "AllLanded",
            Self::ReleaseAsked { .. } => "ReleaseAsked",
            Self::Farewell => "Farewell",
            Self::FateAsked { .. } => "FateAsked",
            Self::GuestGone { .. } => "GuestGone",
            Self::Failed { .. } => "Failed",
        }
    }
}

/// The source's checkpoint ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingOffer {
    /// Bytes of the region the destination writes.
    pub bytes: u64,
    /// Nonce of this session, in every segment.
    pub nonce: u64,
    /// Memory at the source for an epoch larger than the ring.
    pub overflow_bytes: u64,
}

/// A message as bytes.
pub fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    postcard::to_stdvec(message).expect("a message of plain data always encodes")
}

/// Bytes as a message; bytes left over are an error too.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ProtocolError> {
    match postcard::take_from_bytes(bytes) {
        Ok((message, [])) => Ok(message),
        Ok((_, rest)) => Err(ProtocolError::Trailing { bytes: bytes.len(), rest: rest.len() }),
        Err(source) => Err(ProtocolError::Malformed { bytes: bytes.len(), source }),
    }
}

/// Why a message was refused.
#[derive(Debug, thiserror::Error)]
pub enum ProtocolError {
    #[error("a control message of {bytes} bytes is malformed")]
    Malformed {
        bytes: usize,
        #[source]
        source: postcard::Error,
    },
    #[error("a control message of {bytes} bytes has {rest} bytes too many")]
    Trailing { bytes: usize, rest: usize },
    #[error("the peer sent {got} where {wanted} was due")]
    Unexpected { got: String, wanted: &'static str },
}
