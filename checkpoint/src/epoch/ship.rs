//! The shipping thread: seals, writes and commits what was staged, then lets the epoch's output go.

use super::tether::Shared;
use super::{EpochObserver, EpochStats, TetherError};
use crate::guest::Epoch;
use crate::outbox::Outbox;
use crate::ring::RingWriter;
use crate::staging::Slot;
use belay_transport::Deadline;
use crossbeam_channel::{Receiver, Sender};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A slot on its way.
pub(super) struct Part {
    pub slot: Slot,
    /// With the last part: when the record's instant was, when the guest went on, and what is known of the epoch so far.
    pub taken: Option<Taken>,
}

pub(super) struct Taken {
    pub instant: Instant,
    pub resumed: Instant,
    /// Since when the oldest of its output was held.
    pub output_since: Option<Instant>,
    pub stats: EpochStats,
}

pub(super) struct Shipping {
    pub writer: RingWriter,
    pub parts: Receiver<Part>,
    pub free: Sender<Slot>,
    pub outbox: Arc<Outbox>,
    pub observer: Arc<dyn EpochObserver>,
    pub shared: Arc<Shared>,
    /// Longest that one part may take.
    pub bound: Duration,
    pub last_commit: Option<Instant>,
}

impl Shipping {
    /// Ships until the tether hangs up or the ring fails.
    pub fn run(mut self) {
        let (mut parts, mut waited) = (0, Duration::ZERO);
        while let Ok(part) = self.parts.recv() {
            let shipped = match self.writer.ship(&part.slot, Deadline::after(self.bound)) {
                Ok(shipped) => shipped,
                Err(source) => {
                    self.shared.fail(TetherError::Ship { epoch: part.slot.epoch(), source });
                    // Hanging up is what the tether thread notices if it waits for a slot.
                    return;
                }
            };
            parts += 1;
            waited += shipped.waited;
            if let (Some(epoch), Some(taken)) = (shipped.committed, part.taken) {
                self.committed(epoch, taken, parts, waited);
                (parts, waited) = (0, Duration::ZERO);
            }
            if self.free.send(part.slot).is_err() {
                return;
            }
        }
    }

    fn committed(&mut self, epoch: Epoch, taken: Taken, parts: u32, waited_for_room: Duration) {
        self.outbox.committed(epoch);
        let begun = self.last_commit.map_or(taken.resumed, |last| last.max(taken.resumed));
        self.last_commit = Some(Instant::now());
        let stats = EpochStats {
            parts,
            waited_for_room,
            commit: taken.resumed.elapsed(),
            on_link: begun.elapsed(),
            age: taken.instant.elapsed(),
            held_output: taken.output_since.map(|since| since.elapsed()),
            ..taken.stats
        };
        self.shared.committed(epoch, &stats);
        self.observer.committed(&stats);
    }
}
