//! The catch: shut the old destination out, fold, load, let the guest run.

use super::{Outcome, Source, fresh_nonce};
use crate::migrate::observation::{Kind, us};
use crate::migrate::protocol;
use crate::migrate::protocol::ToDestination;
use belay_checkpoint::fold::CatchError;
use belay_checkpoint::ownership::Fate;
use belay_checkpoint::ownership::source::{Event, State};
use belay_transport::fabric::{OWNER_EPOCH_OFFSET, RevokedRing};
use belay_transport::stop_point::reached;
use belay_transport::{Deadline, explain};
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

/// Between two looks whether there is room on the images or in memory, while a catch waits for it.
const ROOM_AGAIN: Duration = Duration::from_millis(500);

impl Source<'_> {
    /// Shuts the old destination out; at the instant from which nothing can commit, the ring is read and folded for the last time.
    pub(super) fn revoke(&mut self) -> Option<Event> {
        reached("catch-begun");
        self.room_due = None;
        let begun = Instant::now();
        // While nothing is revoked nothing is lost: the destination has the guest, its disks too.
        if let Some(why) = self.short_of_room() {
            return self.waits_for_room(why);
        }
        // Nothing that comes back from here on is listened to but to be told so.
        self.herald = None;
        // The folder first: revoking `local` takes the ring's file away under whoever still reads it.
        if let Some(folder) = self.folder.take() {
            self.catch = Some(folder.stop());
        }
        reached("catch-unrevoked");
        let (catch, recovered) = (&mut self.catch, &mut self.last_read);
        let mut folding = Duration::ZERO;
        let mut last_read = |ring: RevokedRing<'_>| {
            let begun = Instant::now();
            *recovered = catch.take().map(|catch| catch.finish(&ring));
            folding = begun.elapsed();
        };
        let revoked = match (&mut self.live, &self.left) {
            (Some(live), _) => live.owner.revoke(&mut last_read, Deadline::after(self.config.bounds.revoke)),
            // The session ended with the process that had it: its sockets, or its registrations, are gone. Only over shared memory can
            // anybody still write, and whoever does finds the owner epoch changed before it may call anything committed.
            (None, Some(left)) => {
                left.owner_region.atomic_u64(OWNER_EPOCH_OFFSET).fetch_add(1, Ordering::SeqCst);
                fence(Ordering::SeqCst);
                last_read(RevokedRing::Shared(&left.ring));
                Ok(())
            }
            (None, None) => Ok(()),
        };
        match revoked {
            Ok(()) => {
                reached("catch-revoked");
                self.note(Kind::Revoked { took_us: us(begun.elapsed() - folding) });
                Some(Event::Revoked)
            }
            Err(error) => {
                self.why = format!("cannot revoke: {}", explain(&error));
                Some(Event::CatchFailed { can_retry: true })
            }
        }
    }

    /// Why what has committed cannot be in the guest's memory and images for the moment, if it cannot.
    fn short_of_room(&self) -> Option<String> {
        match self.folder.as_ref().and_then(|folder| folder.status().stuck) {
            Some(stuck) => Some(explain(&stuck)),
            None => self.guest.storage()?.check().err().map(|error| explain(&error)),
        }
    }

    /// What is to be said where a committed checkpoint cannot be taken, however much room there were, and the operator has not said that it may be undone.
    pub(super) fn untakable(&self) -> Option<String> {
        if self.take_older {
            return None;
        }
        let (epoch, why) = match (&self.folder, &self.last_read) {
            (Some(folder), _) => {
                let status = folder.status();
                (status.folded, explain(&status.failed?))
            }
            (None, Some(Err(CatchError::Unreadable { source, older }))) => (older.epoch, explain(source)),
            _ => return None,
        };
        Some(format!("no checkpoint after {epoch} can be taken: {why}"))
    }

    /// A newer checkpoint may have been promised to the world than can be had here, so neither is the destination shut out nor the guest resumed
    /// before the operator says so.
    pub(super) fn waits_for_the_word(&mut self) -> Option<Event> {
        self.why = self.untakable()?;
        Some(Event::CatchFailed { can_retry: true })
    }

    fn waits_for_room(&mut self, why: String) -> Option<Event> {
        self.why = why;
        self.room_due = Some(Deadline::after(ROOM_AGAIN));
        Some(Event::CatchFailed { can_retry: true })
    }

    /// The operator's word stands in for checkpoints that cannot be taken: on what that stands is noted for whoever looks into it afterwards.
    pub(super) fn caught_from_older(&mut self) -> Event {
        self.take_older = true;
        let why = format!("{}; by the operator's word the guest goes on from there", self.why);
        self.note(Kind::State { state: "caught-from-older".to_owned(), why });
        Event::OperatorCatch
    }

    /// A catch that only the images hold up begins again by itself where they may be written again.
    pub(super) fn room_again(&mut self) -> Option<Event> {
        self.room_due.take_if(|due| due.expired())?;
        let State::Revoking { stuck: true, .. } = self.state else { return None };
        let still = match &mut self.last_read {
            Some(Ok(recovered)) => recovered.unwritten.write().err().map(|error| explain(&error)),
            _ => self.short_of_room(),
        };
        if still.is_some() {
            self.room_due = Some(Deadline::after(ROOM_AGAIN));
            return None;
        }
        Some(Event::OperatorCatch)
    }

    pub(super) fn fold_and_load(&mut self) -> Option<Event> {
        self.room_due = None;
        let begun = Instant::now();
        let recovered = match self.last_read.take() {
            Some(Ok(mut recovered)) => match recovered.unwritten.write() {
                Ok(()) => recovered,
                // Nobody else has it any more: it stays here until the image takes it.
                Err(error) => {
                    self.last_read = Some(Ok(recovered));
                    return self.waits_for_room(explain(&error));
                }
            },
            Some(Err(CatchError::Unreadable { older, .. })) if self.take_older => *older,
            Some(Err(error)) => {
                self.last_read = Some(Err(error));
                return self.waits_for_the_word();
            }
            None => {
                self.why =
                    format!("{}; it moved without a tether, so there is no checkpoint to catch it with", self.why);
                return Some(Event::CatchFailed { can_retry: false });
            }
        };
        let load = Instant::now();
        if let Err(error) = self.guest.load(&recovered.device_state) {
            self.why = format!("cannot load {}: {}", recovered.epoch, explain(&error));
            // It is all here still, for a second try.
            self.last_read = Some(Ok(recovered));
            return Some(Event::CatchFailed { can_retry: true });
        }
        reached("catch-loaded");
        self.note(Kind::Recovered {
            epoch: recovered.epoch.0,
            pages: recovered.timings.pages,
            total_pages: recovered.folded_pages,
            took_us: us(recovered.timings.last_read + begun.elapsed()),
            load_us: us(load.elapsed()),
            resent_packets: recovered.outputs_to_resend.len() as u64,
        });
        self.recovered = Some(recovered);
        Some(Event::Folded)
    }

    pub(super) fn resume(&mut self) -> Option<Event> {
        // A guest that never left keeps its nonce: it is still the same incarnation.
        let nonce = match &self.recovered {
            Some(_) => match fresh_nonce().map_err(|error| error.to_string()) {
                Ok(nonce) => nonce,
                Err(why) => return self.cannot_resume(why),
            },
            None => 0,
        };
        if self.recovered.is_some()
            && let Err(error) = self.guest.set_incarnation(nonce)
        {
            return self.cannot_resume(explain(&error));
        }
        let steps = (self.steps)();
        reached("catch-resume");
        // Kept before it is so: a guest that has run here is never caught from a checkpoint again.
        let home = State::Running { owner_epoch: self.state.owner_epoch() };
        let since = self.config.proposal.nonces.len().min(self.nonces.len());
        if let Err(error) = self.keep.mark(home, &self.nonces[since..])
            && let Err(error) = self.keep.give_up_memory().map_err(|_| error)
        {
            return self.cannot_resume(explain(&error));
        }
        if let Err(error) = self.guest.resume() {
            return self.cannot_resume(explain(&error));
        }
        if let Some(recovered) = &self.recovered {
            let epoch = recovered.epoch.0;
            reached("catch-resumed");
            let noticed_to_running_us = self.noticed_at.map_or(0, |at| us(at.elapsed()));
            self.nonces.push(nonce);
            self.note(Kind::Caught { epoch, nonce, noticed_to_running_us, steps });
            let fate = ToDestination::Fate { fate: Fate::Revoked, because: self.last.clone() };
            // If it can still hear, it should know; whether it does makes no difference to us.
            if let Some(live) = &self.live {
                let _ = live.control.send(&protocol::encode(&fate), Deadline::after(Duration::from_millis(100)));
            }
        }
        Some(Event::GuestResumed)
    }

    pub(super) fn cannot_resume(&mut self, why: String) -> Option<Event> {
        self.why = format!("cannot resume: {why}");
        if matches!(self.state, State::Revoking { .. }) {
            return Some(Event::CatchFailed { can_retry: true });
        }
        self.outcome = Some(Outcome::Lost { why: self.why.clone() });
        None
    }
}
