//! The catch: what is still in the ring after revocation is folded, and the guest's newest committed state handed out.
//!
//! ```text
//! Folder::stop ─> Catch ── Owner::revoke ──> last read of the ring: Catch::finish ─> Recovered
//! ```
//! The order is in the types: a [`Catch`] has no thread that looks at the ring any more, and finishing takes the ring's bytes
//! as they were when the old destination was shut out (P5).

use super::{FoldError, FoldState, Parts, Unwritten};
use crate::guest::{Epoch, Packet};
use crate::mutation::{Mutation, mutated};
use crate::ring::{RingBytes, RingReader, Step, Still};
use std::time::{Duration, Instant};

/// Longest that a last read waits for memory.
const SHORTAGE_BOUND: Duration = Duration::from_secs(2);
/// Between two looks whether there is some.
const SHORTAGE_AGAIN: Duration = Duration::from_millis(20);

/// A stopped folder, waiting for the revoked ring.
#[derive(Debug)]
pub struct Catch {
    reader: RingReader,
    state: FoldState,
    failed: Option<FoldError>,
    stopping: Duration,
}

/// The guest as of its newest committed epoch. Its RAM is already in the blocks that were folded into.
#[derive(Debug)]
pub struct Recovered {
    /// Which epoch; 0 is the state at the switch.
    pub epoch: Epoch,
    /// For [`crate::guest::Guest::load`].
    pub device_state: Vec<u8>,
    /// Committed output not known to have left, ascending: to be sent again, byte for byte, before the guest emits anything.
    pub outputs_to_resend: Vec<Packet>,
    /// Pages folded over the whole migration.
    pub folded_pages: u64,
    /// Where the time went.
    pub timings: CatchTimings,
    /// What the images still lack. To be written before the guest runs.
    pub unwritten: Unwritten,
    /// To be dropped once the guest runs.
    pub spent: Spent,
}

/// Memory that was reserved for the largest record. Giving it back takes tens of milliseconds, which a guest need not wait for.
#[derive(Debug)]
pub struct Spent {
    _reader: RingReader,
}

/// What a catch took, on this side.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CatchTimings {
    /// Until the background thread had stopped.
    pub stopping: Duration,
    /// Reading the revoked ring for the last time and folding what was in it.
    pub last_read: Duration,
    /// Epochs and pages folded in that last read.
    pub epochs: u64,
    pub pages: u64,
}

/// The catch cannot give the newest committed epoch.
#[derive(Debug, thiserror::Error)]
pub enum CatchError {
    /// The ring holds something this source will not take: a newer epoch may have been promised to the world than the one that
    /// can be recovered. Going on with `older` is a decision for an operator, never for a program.
    #[error("the ring cannot be read past {}", older.epoch)]
    Unreadable {
        #[source]
        source: FoldError,
        older: Box<Recovered>,
    },
}

impl Catch {
    pub(super) fn new(reader: RingReader, state: FoldState, failed: Option<FoldError>, stopping: Duration) -> Self {
        Self { reader, state, failed, stopping }
    }

    /// For a process that takes over from one that died: `reader` and `state` as it left them.
    pub fn resume(mut reader: RingReader, state: FoldState) -> Result<Self, FoldError> {
        state.settle(&mut reader)?;
        Ok(Self::new(reader, state, None, Duration::ZERO))
    }

    /// Folds what has committed so far, for a session that is not the last: the destination has stopped its tether and means to go on over
    /// another one. The newest epoch in RAM.
    pub fn drain<R: RingBytes + ?Sized>(&mut self, ring: &R) -> Result<Epoch, FoldError> {
        if let Some(failed) = &self.failed {
            return Err(failed.clone());
        }
        // Nobody waits for this one.
        self.last_read(ring, None)?;
        Ok(self.state.epoch())
    }

    /// The newest epoch in RAM.
    pub fn epoch(&self) -> Epoch {
        self.state.epoch()
    }

    /// Session whose ring was read.
    pub fn nonce(&self) -> u64 {
        self.reader.nonce()
    }

    /// Reader and state for the next session.
    pub fn next_session(self, ring_len: usize, nonce: u64) -> Result<(RingReader, FoldState), FoldError> {
        Ok((self.reader.next_session(ring_len, nonce)?, self.state))
    }

    /// Reads the revoked ring for the last time, folds every committed record in it, in order, and gives the newest state. An image that cannot be
    /// written does not end this: nobody else has those records any more ([`Recovered::unwritten`]).
    pub fn finish<R: RingBytes + ?Sized>(mut self, ring: &R) -> Result<Recovered, CatchError> {
        let began = Instant::now();
        let (epoch, pages) = (self.state.epoch(), self.state.folded_pages());
        self.state.keep_unwritten();
        let mut failed = match self.failed.take() {
            Some(failed) => Some(failed),
            None => self.last_read(ring, ring.still()).err(),
        };
        // Nobody else has these records any more, and a host that was short of memory for a moment has it the next.
        while failed.as_ref().is_some_and(FoldError::is_shortage) && began.elapsed() < SHORTAGE_BOUND {
            std::thread::sleep(SHORTAGE_AGAIN);
            failed = self.last_read(ring, ring.still()).err();
        }
        let timings = CatchTimings {
            stopping: self.stopping,
            last_read: began.elapsed(),
            epochs: self.state.epoch().0 - epoch.0,
            pages: self.state.folded_pages() - pages,
        };
        let Parts { epoch, device_state, mut outputs, pages: folded_pages, unwritten } = self.state.into_parts();
        if mutated(Mutation::OutboxLost) {
            outputs = Ok(Vec::new());
        }
        let (outputs_to_resend, failed) = match (outputs, failed) {
            (Ok(outputs), failed) => (outputs, failed),
            (Err(_), Some(failed)) => (Vec::new(), Some(failed)),
            (Err(source), None) => (Vec::new(), Some(FoldError::Contradiction { epoch, source })),
        };
        let recovered = Recovered {
            epoch,
            device_state,
            outputs_to_resend,
            folded_pages,
            timings,
            unwritten,
            spent: Spent { _reader: self.reader },
        };
        match failed {
            None => Ok(recovered),
            Some(source) => Err(CatchError::Unreadable { source, older: Box::new(recovered) }),
        }
    }

    /// Where the ring stands `still`, whole records are folded from where they lie; what is not one is taken as ever, with the same outcome. Reads
    /// no more than a ring's bytes: nothing more can have been written before the revocation, and who still writes may not keep this busy (P7).
    fn last_read<R: RingBytes + ?Sized>(&mut self, ring: &R, still: Option<Still<'_>>) -> Result<(), FoldError> {
        let end = self.reader.consumed() + self.reader.shape().bytes;
        while self.reader.consumed() < end {
            // One that a process which died in a catch has folded and not given up.
            let folded = |epoch: Epoch, state: &FoldState| epoch == state.epoch();
            if let Some(record) = still.and_then(|ring| self.reader.in_place(ring)) {
                if !folded(record.epoch(), &self.state) {
                    self.state.fold_in_place(&record)?;
                }
                let after = record.after();
                self.reader.pass(after);
                continue;
            }
            match self.reader.step(ring)? {
                Step::NotYet => break,
                Step::Spooled => {}
                Step::Committed(epoch) => {
                    if !folded(epoch, &self.state) {
                        let image = self.reader.record().expect("a committed record is there");
                        self.state.fold(image, || ())?;
                    }
                    self.reader.clear();
                }
            }
        }
        let (read, folded) = (self.reader.committed(), self.state.epoch());
        if read == folded { Ok(()) } else { Err(FoldError::Inconsistent { read, folded }) }
    }
}
