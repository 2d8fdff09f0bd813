//! `verbs`: one-sided RDMA over reliable connections (InfiniBand, RoCE v2, iWARP), set up by rdma_cm.

pub mod inventory;
#[allow(dead_code, unused_imports)]
mod registration;
mod settings;

pub use registration::{LockedMemory, MemlockTooLow, RegistrationError, RegistrationReport, TooManyRegions};
pub use settings::VerbsSettings;

use super::{LaneId, LaneKind};

/// Most lanes of one kind.
pub(super) const MAX_LANES_OF_A_KIND: u16 = 256;

/// The session's connection that carries exports: what may be read or written and where, and how to reach it. An id that no
/// lane of operations can have.
pub(super) const EXPORTS: LaneId = LaneId { kind: LaneKind::Checkpoint, index: u16::MAX };
