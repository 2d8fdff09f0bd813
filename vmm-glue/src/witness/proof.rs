//! The check of a guest's memory: of all of it, where the guest stands still at a point at which that is an exact function of its steps; or of
//! what a fenced guest has, where it was stopped.

use super::model::{Comparison, Model, ModelError, NonceSeen};
use crate::kvm::SharedGuest;
use belay_checkpoint::guest::{Guest, GuestError};
use belay_transport::pages::{PageStates, State};
use belay_transport::{Deadline, FrameIndex, PageIndex};

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
    #[error("its page states are of another guest's memory")]
    OtherStates,
    #[error("the guest ran, or pages came, while it was looked at")]
    NotStill,
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

/// Compares what a guest that was stopped has of its memory with what it must be: every page that `states` calls landed, at whatever step each vCPU stands. The guest stays as it is, and nobody may be pulling for it any more.
pub fn check_stopped(
    guest: &SharedGuest,
    issued: &[u64],
    states: &PageStates,
    deadline: Deadline,
) -> Result<Checked, CheckError> {
    let block = &guest.memory()[0];
    let memory = block.alias.clone();
    let (region, shift) = match states.index_of(block.id) {
        Some(region) => (region, block.page_size.shift()),
        None => return Err(CheckError::OtherStates),
    };
    let geometry = states.geometry().nth(region).filter(|of| of.frames << shift == memory.len() as u64);
    if geometry.is_none_or(|geometry| geometry.page_size.shift() != shift) {
        return Err(CheckError::OtherStates);
    }
    let mut guest = guest.lock();
    match guest.pause(deadline) {
        Ok(()) => {}
        // Its one vCPU waits for a page that nobody brings, and stands as still as in any stop.
        Err(GuestError::StopTimedOut { vcpus: 1, .. }) => {}
        Err(error) => return Err(error.into()),
    }
    let (steps, landed) = (guest.steps()?, states.counts().landed);
    let is_there =
        |page: PageIndex| states.state_at(region, FrameIndex(page.offset() as u64 >> shift)) == State::Landed;
    let model = Model::of_stopped(guest.spec(), &steps, &memory, issued, &is_there)?;
    let comparison = model.compare_those(&memory, LISTED, &is_there);
    if guest.steps()? != steps || states.counts().landed != landed {
        return Err(CheckError::NotStill);
    }
    Ok(Checked { comparison, nonces: model.nonces_seen().to_vec(), steps })
}
