//! Folds committed records into the source's guest RAM, and recovers the guest from what was folded.
//!
//! Rules of this room:
//! * A record is checked whole before the first byte of it is written anywhere ([`crate::record::parse`]), and memory for
//!   every page it fills is allocated before the first byte as well: missing memory is an error and not a SIGBUS, and
//!   guest RAM is never left with part of an epoch.
//! * What a record does to disks is in their images, durably, before its pages are in RAM ([`crate::storage`]). In a catch, when nobody else has the
//!   records any more, it is before the guest runs: what an image does not take is kept until it does ([`Unwritten`]).
//! * Records are folded in the order in which they committed. Folding one twice gives the same bytes.
//! * Device state and output that may have to be sent again move forward with the epoch, in the same step.
//! * Where memory is kept ([`crate::journal`]) folding is redo: RAM is written, then the state that comes of it is kept, then the record
//!   is given up. A death before the second leaves a record that is folded again, over the same state before it; one between second and
//!   third leaves a record whose epoch is kept already, and it is only given up ([`FoldState::settle`]). That holds for a record in overflow
//!   memory and for one that is folded where it lies in the ring.

mod catch;
mod folder;
pub(crate) mod image;
mod target;
mod unwritten;

pub use catch::{Catch, CatchError, CatchTimings, Recovered};
#[cfg(test)]
pub(crate) use folder::Looking;
pub use folder::{FoldConfig, FoldStatus, Folder, Heard};
pub use target::FoldTarget;
pub use unwritten::Unwritten;

use crate::guest::{Epoch, Packet};
use crate::journal::{Cell, Damaged, KeptState};
use crate::outbox::{Resend, ResendError};
use crate::record::{Limits, PageSource, RecordError, RecordView, parse};
use crate::ring::{InPlace, RingError, RingReader};
use crate::storage::Storage;
use belay_transport::region::RegionError;
use belay_transport::stop_point::reached;
use std::io;
use std::sync::Arc;

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
    #[error("the state of {epoch} cannot be kept")]
    NotKept {
        epoch: Epoch,
        #[source]
        source: Arc<RegionError>,
    },
    #[error("what the guest did to its disk {disk} in {epoch} cannot be done to the image: {why}")]
    Disk { epoch: Epoch, disk: u16, why: String },
    #[error(transparent)]
    Damaged(#[from] Damaged),
    #[error("the ring was read up to {read}, RAM shows {folded}: what was kept contradicts itself")]
    Inconsistent { read: Epoch, folded: Epoch },
}

impl FoldError {
    /// Whether it is this host that lacks something: over once there is room again, and until then nothing is lost, because the record is complete
    /// and is taken whole by the next try.
    pub fn is_shortage(&self) -> bool {
        matches!(self, Self::Disk { .. } | Self::NoMemory { .. } | Self::NotKept { .. })
    }
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
    /// Where device state and output are kept beside RAM.
    kept: Option<Cell>,
    /// The guest's writable disks.
    storage: Option<Arc<dyn Storage>>,
    /// In a catch: what its images would not take.
    unwritten: Option<Unwritten>,
}

impl FoldState {
    /// The state at the switch: RAM as it is, `device_state` as it was sent to the destination.
    pub fn new(target: FoldTarget, limits: Limits, device_state: Vec<u8>) -> Self {
        Self {
            target,
            limits,
            epoch: Epoch(0),
            device_state,
            resend: Resend::new(),
            pages: 0,
            kept: None,
            storage: None,
            unwritten: None,
        }
    }

    /// What is folded is done to these disks too.
    pub fn with_storage(mut self, storage: Option<Arc<dyn Storage>>) -> Self {
        self.limits.disks = storage.as_ref().map_or(0, |storage| storage.disks());
        self.storage = storage;
        self
    }

    /// As [`FoldState::new`], with all but RAM kept in `state`: from here on another process can go on with it.
    pub fn kept(
        target: FoldTarget,
        limits: Limits,
        device_state: Vec<u8>,
        state: &KeptState,
    ) -> Result<Self, FoldError> {
        let mut new = Self::new(target, limits, device_state);
        let mut cell = state.image()?.0;
        let image = image::encode(new.epoch, new.pages, &new.device_state, &new.resend);
        keep(&mut cell, new.epoch, &image)?;
        new.kept = Some(cell);
        Ok(new)
    }

    /// What an earlier process left; `None` where it had not come to a switch.
    pub fn resume(target: FoldTarget, limits: Limits, state: &KeptState) -> Result<Option<Self>, FoldError> {
        let (cell, value) = state.image()?;
        let Some(value) = value else { return Ok(None) };
        let damaged = || Damaged { what: "the newest epoch's device state and output", offset: 0 };
        let (epoch, pages, device_state, resend) = image::decode(&value).ok_or_else(damaged)?;
        Ok(Some(Self {
            target,
            limits,
            epoch,
            device_state,
            resend,
            pages,
            kept: Some(cell),
            storage: None,
            unwritten: None,
        }))
    }

    /// Brings a reader that an earlier process left to where RAM is: a record that is folded already is given up. One that is complete and
    /// not folded, or folded half, is folded next.
    pub fn settle(&self, reader: &mut RingReader) -> Result<(), FoldError> {
        let (read, folded) = (reader.committed(), self.epoch);
        match reader.record().is_some() {
            true if read == folded => reader.clear(),
            true if read == folded.next() => {}
            false if read == folded => {}
            // Folded where it lay in the ring, and not given up: there it is still, and the last read passes over it.
            false if read.next() == folded => {}
            _ => return Err(FoldError::Inconsistent { read, folded }),
        }
        Ok(())
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
    pub fn fold(&mut self, image: &[u8], between: impl FnMut()) -> Result<u64, FoldError> {
        self.fold_from(image, &image, between)
    }

    /// As [`FoldState::fold`], with page bytes from the ring.
    pub fn fold_in_place(&mut self, record: &InPlace<'_>) -> Result<u64, FoldError> {
        self.fold_from(record.image(), record, || ())
    }

    fn fold_from(
        &mut self,
        image: &[u8],
        source: &impl PageSource,
        mut between: impl FnMut(),
    ) -> Result<u64, FoldError> {
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
        let pages = record.page_count();
        let image = match &mut self.kept {
            None => None,
            Some(cell) => {
                let image = image::encode(next, self.pages + pages, &record.device_state, &resend);
                reserve(cell, next, &image)?;
                Some(image)
            }
        };
        self.apply(&record, &mut between)?;
        // From here on nothing can fail.
        let begun: fn() = match self.unwritten {
            Some(_) => || reached("catch-folding"),
            None => || reached("fold-mid"),
        };
        self.target.apply(&record, source, begun, &mut between);
        if let (Some(cell), Some(image)) = (&mut self.kept, image) {
            cell.write(&image);
        }
        self.resend = resend;
        self.device_state = record.device_state;
        self.epoch = next;
        self.pages += pages;
        Ok(pages)
    }

    /// Before RAM: an image that cannot be written leaves RAM as it was. What was done of it is done again with the epoch, which has committed.
    /// In a catch what an image does not take is kept instead, and so is all that follows it.
    fn apply(&mut self, record: &RecordView, between: &mut impl FnMut()) -> Result<(), FoldError> {
        for (disk, writes) in record.disk_writes.iter().enumerate().filter(|(_, writes)| !writes.is_empty()) {
            let storage = self.storage.as_ref().expect("the limits have as many disks as there are");
            match &mut self.unwritten {
                None => apply(&**storage, record.epoch, disk, writes, between)?,
                Some(kept) => kept.take(&**storage, record.epoch, disk, writes, between),
            }
        }
        Ok(())
    }

    /// As [`FoldState::fold`], where the process dies with so many of the record's runs in RAM.
    #[cfg(test)]
    pub(crate) fn fold_partly(&mut self, image: &[u8], source: &impl PageSource, runs: usize) {
        let mut record = parse(image, &self.limits, false).expect("a committed record");
        self.target.reserve(&record).expect("memory");
        record.pages.truncate(runs);
        self.target.apply(&record, source, || (), &mut || ());
    }

    /// Whether what the guest does to disks comes with its epochs.
    fn has_disks(&self) -> bool {
        self.storage.is_some()
    }

    /// From here on an image that cannot be written ends no fold.
    fn keep_unwritten(&mut self) {
        self.unwritten = Some(Unwritten::of(self.storage.clone()));
    }

    fn into_parts(self) -> Parts {
        Parts {
            epoch: self.epoch,
            device_state: self.device_state,
            outputs: self.resend.finish(),
            pages: self.pages,
            unwritten: self.unwritten.unwrap_or_default(),
        }
    }
}

/// What is left of a state that folds no more.
struct Parts {
    epoch: Epoch,
    device_state: Vec<u8>,
    outputs: Result<Vec<Packet>, ResendError>,
    pages: u64,
    unwritten: Unwritten,
}

/// Does to an image what an epoch says.
fn apply(
    storage: &dyn Storage,
    epoch: Epoch,
    disk: usize,
    writes: &[u8],
    between: &mut dyn FnMut(),
) -> Result<(), FoldError> {
    storage.apply(writes, between).map_err(|error| {
        let causes = std::iter::successors(std::error::Error::source(&error), |error| error.source());
        let why = causes.fold(error.to_string(), |told, cause| format!("{told}: {cause}"));
        FoldError::Disk { epoch, disk: disk as u16, why }
    })
}

fn reserve(cell: &mut Cell, epoch: Epoch, image: &[u8]) -> Result<(), FoldError> {
    cell.reserve(image.len()).map_err(|source| FoldError::NotKept { epoch, source: Arc::new(source) })
}

fn keep(cell: &mut Cell, epoch: Epoch, image: &[u8]) -> Result<(), FoldError> {
    reserve(cell, epoch, image)?;
    cell.write(image);
    Ok(())
}

#[cfg(test)]
mod both_ways;
#[cfg(test)]
mod redo;
#[cfg(test)]
mod shortage;
#[cfg(test)]
mod tests;
