//! A guest that can be stood still where its memory is an exact function of its steps, and the check of all its memory there.

use super::model::{Comparison, Model, ModelError, NonceSeen};
use crate::kvm::guests::GuestSpec;
use belay_checkpoint::guest::GuestError;
use belay_transport::Deadline;
use belay_transport::region::Mapping;

/// A hand on a guest that stays while others pause, save and resume it: lets the witness stand it still at a point where its memory
/// is an exact function of its steps.
pub trait Standstill: Send {
    /// Has every vCPU wait at its first PACE read at or behind `step`; `None` lets them on.
    fn park_at_step(&self, step: Option<u64>) -> Result<(), GuestError>;

    /// Waits until every vCPU is parked; gives the steps each has done.
    fn wait_parked(&self, deadline: Deadline) -> Result<Vec<u64>, GuestError>;

    /// Steps each vCPU had done at its last PACE read.
    fn steps(&self) -> Result<Vec<u64>, GuestError>;
}

/// What a check of all memory found.
#[derive(Debug, Clone)]
pub struct Checked {
    pub steps: Vec<u64>,
    pub comparison: Comparison,
    /// The nonces each vCPU saw, and when: what a check of its packets needs beside the spec.
    pub nonces: Vec<Vec<NonceSeen>>,
}

/// Why no check could be made.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    #[error("the guest could not be stood still")]
    Guest(#[from] GuestError),
    #[error("the guest's own account of its past cannot be true")]
    Model(#[from] ModelError),
}

/// Differences listed at most.
const LISTED: usize = 8;

/// Stands the guest still and compares every byte of its RAM, seen through `memory`, with what it must be; leaves it parked.
/// `issued` are the nonces it was given, in order.
pub fn check(
    guest: &dyn Standstill,
    memory: &Mapping,
    spec: &GuestSpec,
    issued: &[u64],
    deadline: Deadline,
) -> Result<Checked, CheckError> {
    guest.park_at_step(Some(0))?;
    let steps = guest.wait_parked(deadline)?;
    let model = Model::new(spec, &steps, memory, issued)?;
    Ok(Checked { comparison: model.compare(memory, LISTED), nonces: model.nonces_seen().to_vec(), steps })
}
