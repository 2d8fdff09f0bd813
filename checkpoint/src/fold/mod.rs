//! Folds committed records into the source's guest RAM, and recovers the guest from what was folded.
//!
//! Rules of this room:
//! * A record is checked whole before the first byte of it is written anywhere ([`crate::record::parse`]), and memory for
//!   every page it fills is allocated before the first byte as well: missing memory is an error and not a SIGBUS, and
//!   guest RAM is never left with part of an epoch.
//! * Records are folded in the order in which they committed. Folding one twice gives the same bytes.
//! * Device state and output that may have to be sent again move forward with the epoch, in the same step.

mod catch;
mod folder;
mod target;

pub use catch::{Catch, CatchError, CatchTimings, Recovered};
pub(crate) use folder::boottime_ns;
pub use folder::{FoldConfig, FoldStatus, Folder, Heard};
pub use target::FoldTarget;

use crate::guest::{Epoch, Packet};
use crate::outbox::{Resend, ResendError};
use crate::record::{Limits, RecordError, parse};
use crate::ring::RingError;
use std::io;

/// Why folding stopped.
#[derive(Debug, Clone, thiserror::Error)]
pub enum FoldError {
    #[error(transparent)]
    Ring(#[from] RingError),
    #[error("the committed record of {epoch} was refused")]
    Refused {
        epoch: Epoch,
        #[source]
        source: RecordError,
    },
    #[error("{found} follows {folded}: a record is missing")]
    Gap { folded: Epoch, found: Epoch },
    #[error("the output of {epoch} cannot be")]
    Contradiction {
        epoch: Epoch,
        #[source]
        source: ResendError,
    },
    #[error("{bytes} bytes of output are committed and not released; the limit is {limit}")]
    TooMuchOutput { bytes: usize, limit: usize },
    #[error("no memory for {bytes} bytes of {region} at {offset}: {reason}")]
    NoMemory { region: belay_transport::RegionId, offset: u64, bytes: u64, reason: io::ErrorKind },
    #[error("device state of {bytes} bytes has no section of its own in {epoch}")]
    NoDeviceState { epoch: Epoch, bytes: usize },
}

/// Guest RAM and what belongs to it, as of one epoch.
#[derive(Debug)]
pub struct FoldState {
    target: FoldTarget,
    limits: Limits,
    epoch: Epoch,
    device_state: Vec<u8>,
    /// Committed and not known to have left.
    resend: Resend,
    pages: u64,
}

impl FoldState {
    /// The state at the switch: RAM as it is, `device_state` as it was sent to the destination.
    pub fn new(target: FoldTarget, limits: Limits, device_state: Vec<u8>) -> Self {
        Self { target, limits, epoch: Epoch(0), device_state, resend: Resend::new(), pages: 0 }
    }

    /// The epoch that RAM shows.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Pages written since the beginning.
    pub fn folded_pages(&self) -> u64 {
        self.pages
    }

    /// Folds one committed record; how many pages it held. `between` is called now and then while pages are copied.
    pub fn fold(&mut self, image: &[u8], mut between: impl FnMut()) -> Result<u64, FoldError> {
        let next = self.epoch.next();
        let record = parse(image, &self.limits, false).map_err(|source| FoldError::Refused { epoch: next, source })?;
        if record.epoch != next {
            return Err(FoldError::Gap { folded: self.epoch, found: record.epoch });
        }
        if record.device_state.is_empty() && !self.device_state.is_empty() {
            return Err(FoldError::NoDeviceState { epoch: next, bytes: self.device_state.len() });
        }
        let mut resend = self.resend.clone();
        if let Some(up_to) = record.released_up_to {
            resend.released(up_to);
        }
        for packet in &record.outputs {
            resend.add(packet.clone()).map_err(|source| FoldError::Contradiction { epoch: next, source })?;
        }
        let (bytes, limit) = (resend.bytes(), self.limits.output_bytes);
        if bytes > limit {
            return Err(FoldError::TooMuchOutput { bytes, limit });
        }
        self.target.reserve(&record)?;
        // From here on nothing can fail.
        self.target.apply(&record, &mut between);
        let pages = record.page_count();
        self.resend = resend;
        self.device_state = record.device_state;
        self.epoch = next;
        self.pages += pages;
        Ok(pages)
    }

    fn into_parts(self) -> (Epoch, Vec<u8>, Result<Vec<Packet>, ResendError>, u64) {
        (self.epoch, self.device_state, self.resend.finish(), self.pages)
    }
}

#[cfg(test)]
mod tests;
