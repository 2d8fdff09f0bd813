//! The check of all of a guest's memory, where it stands still at a point at which that is an exact function of its steps.

use super::model::{Comparison, Model, ModelError, NonceSeen};
use crate::kvm::SharedGuest;
use belay_checkpoint::guest::{Guest, GuestError};
use belay_transport::Deadline;

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

/// Stands the guest still and compares every byte of its RAM with what it must be; leaves it parked. `issued` are the nonces it was
/// given, in order.
pub fn check(guest: &SharedGuest, issued: &[u64], deadline: Deadline) -> Result<Checked, CheckError> {
    let memory = guest.memory()[0].alias.clone();
    let mut guest = guest.lock();
    guest.park_at_step(0)?;
    let steps = guest.wait_parked(deadline)?;
    let model = Model::new(guest.spec(), &steps, &memory, issued)?;
    Ok(Checked { comparison: model.compare(&memory, LISTED), nonces: model.nonces_seen().to_vec(), steps })
}
