//! A destination that was cut off comes back, over another session: to this process, or to one that took over from another.

use super::herald::{Errand, Herald};
use super::prepare::Exported;
use super::{Asking, Outcome, Source, SourceError, io};
use crate::migrate::observation::{Kind, connected};
use crate::migrate::peer::{Listened, listen_to};
use crate::migrate::protocol::{self, ToDestination, ToSource};
use belay_checkpoint::ownership::Fate;
use belay_checkpoint::ownership::source::{Event, State};
use belay_transport::fabric::RevokedRing;
use belay_transport::session::{SessionError, SourceSession};
use belay_transport::{Deadline, explain};
use std::sync::Arc;
use std::time::{Duration, Instant};

impl Source<'_> {
    /// Sends a herald, unless one is out. A source that takes over looks for as long as it was told to; one that has lived all along
    /// looks until something else decides.
    pub(super) fn seek(&mut self) {
        if self.herald.is_some() || self.asking.is_some() {
            return;
        }
        let bounded = matches!(self.state, State::Resuming(_) | State::Released { .. });
        let grace = bounded.then(|| {
            let until = *self.grace_until.get_or_insert_with(|| Instant::now() + self.config.grace);
            until.saturating_duration_since(Instant::now())
        });
        let errand = Errand {
            address: self.config.address.clone(),
            config: self.config.session.clone(),
            proposal: self.config.proposal.clone(),
            geometry: self.keep.geometry(),
            grace,
        };
        match Herald::send(errand, self.happened.clone()) {
            Ok(herald) => self.herald = Some(herald),
            Err(error) => {
                let advice = "The destination cannot be looked for; SIGINT orders the catch.".to_owned();
                self.note(Kind::Failed { what: format!("cannot start a thread: {error}"), advice });
            }
        }
    }

    pub(super) fn grace_is_over(&mut self, why: &str) -> Event {
        self.herald = None;
        if matches!(self.state, State::Released { .. }) {
            let advice = "It is released, and nothing here will resume it. The destination has not been told: start this again when it can \
                          be reached, or promote the guest there.";
            self.note(Kind::Failed { what: why.to_owned(), advice: advice.to_owned() });
            self.outcome = Some(Outcome::Released { heard: false });
        }
        let waited = self.config.grace;
        self.lost(Event::GraceRanOut, &format!("the destination has not come back within {waited:?}: {why}"))
    }

    /// A session with a destination that has proved itself. It says next what it wants to know.
    pub(super) fn came_back(&mut self, session: SourceSession) -> Option<Event> {
        self.herald = None;
        let kind = connected(self.config.address.to_string(), &session.agreed, session.lanes.is_encrypted());
        self.note(kind);
        match listen_to::<ToSource>(Arc::clone(&session.control)) {
            Ok(inbox) => {
                self.asking = Some(Asking { session, inbox });
                None
            }
            Err(error) => {
                self.why = format!("cannot start the control thread: {error}");
                Some(Event::ConnectionClosed)
            }
        }
    }

    /// What came over the session of a destination that came back.
    pub(super) fn asked(&mut self, heard: Option<Listened<ToSource>>) -> Option<Event> {
        match heard {
            Some(Listened::Message(ToSource::FateAsked { owner_epoch })) => Some(Event::FateAsked { owner_epoch }),
            Some(Listened::Message(ToSource::Farewell)) if matches!(self.state, State::Released { .. }) => {
                self.outcome = Some(Outcome::Released { heard: true });
                None
            }
            other => {
                let why = match other {
                    Some(Listened::Message(message)) => format!("it broke the protocol: {message:?} before it asked"),
                    Some(Listened::Closed(why)) => why,
                    None => "the control thread ended".to_owned(),
                };
                self.asking = None;
                self.note(Kind::State { state: "seeking".to_owned(), why });
                if matches!(self.state, State::Resuming(_) | State::Released { .. } | State::Serving(_)) {
                    self.seek();
                }
                None
            }
        }
    }

    /// Tells the destination what became of its guest; that it is still tethered, by tethering it again.
    pub(super) fn answer_fate(&mut self, fate: Fate) -> Option<Event> {
        let message = ToDestination::Fate { fate, because: self.last.clone() };
        let Some(asking) = self.asking.take() else {
            // Over the session it has.
            let _ = self.tell(&message);
            return None;
        };
        if fate == Fate::StillTethered {
            return match self.tether_again(asking) {
                Ok(()) => None,
                Err(SourceError::Cancelled) => Some(self.lost(Event::OperatorCatch, "the operator ordered the catch")),
                Err(error) => {
                    let why = format!("it came back and could not be tethered again: {}", explain(&error));
                    Some(self.lost(Event::ConnectionClosed, &why))
                }
            };
        }
        let _ = asking.session.control.send(&protocol::encode(&message), Deadline::after(Duration::from_secs(1)));
        if fate == Fate::Released {
            // It says farewell over this session.
            self.asking = Some(asking);
        }
        None
    }

    /// Ends the old session, reads what it has committed, and serves over the one that asked.
    fn tether_again(&mut self, Asking { session, inbox }: Asking) -> Result<(), SourceError> {
        let tether = self.config.proposal.tether.clone();
        let tether = tether.ok_or(SourceError::Proposal("it moved without a tether".to_owned()))?;
        let bounds = self.config.bounds;
        self.drain()?;
        let because = self.last.clone();
        let exported = Exported::new(self.config, self.keep, self.guest, &session, self.observer, &because)?;
        let catch = self.catch.take().ok_or(SourceError::Proposal("no checkpoint was kept of it".to_owned()))?;
        let (committed, before) = (catch.epoch(), catch.nonce());
        let again = ToDestination::PrepareAgain {
            ram: exported.ram.clone(),
            ring: exported.keys,
            ring_geometry: exported.ring_offer(self.config),
            committed,
            because,
        };
        // From here on the new ring is the one that is read, by this process or by one that takes over: before anybody can write it.
        let (reader, state) = catch.next_session(exported.ring.len(), exported.nonce)?;
        let live = exported.into_live(session, inbox);
        self.left = None;
        let live = self.live.insert(live);
        let control = Arc::clone(&live.control);
        self.keep.forget_ring(before);
        self.start_folder(reader, state, tether.lease.length)?;
        let fate = ToDestination::Fate { fate: Fate::StillTethered, because: self.last.clone() };
        for message in [fate, again] {
            control.send(&protocol::encode(&message), Deadline::after(bounds.handshake))?;
        }
        let live = self.live.as_mut().ok_or(SessionError::NoSession)?;
        self.last = live.open(self.config, &self.happened, self.words)?;
        self.noticed_at = None;
        self.note(Kind::TetheredAgain { committed: committed.0 });
        Ok(())
    }

    /// Everything that has committed over the old session goes into RAM. The destination has ended its tether before it asked, so there is
    /// nothing more to come.
    fn drain(&mut self) -> Result<(), SourceError> {
        if let Some(folder) = self.folder.take() {
            self.catch = Some(folder.stop());
        }
        let Some(catch) = &mut self.catch else { return Ok(()) };
        let mut drained = Ok(());
        let mut last_read = |ring: RevokedRing<'_>| drained = catch.drain(&ring).map(|_| ());
        match (&mut self.live, &self.left) {
            (Some(live), _) => live.owner.revoke(&mut last_read, Deadline::after(self.config.bounds.revoke))?,
            (None, Some(left)) => last_read(RevokedRing::Shared(&left.ring)),
            (None, None) => {}
        }
        // Its ring is read, and with `local` gone: what a catch needs is in RAM and in the fold state now.
        let Some(old) = self.live.take() else { return Ok(drained?) };
        let empty = io("keep the drained ring");
        let nothing =
            belay_transport::region::RamFile::memfd("belay-ring", old.ring.len(), belay_transport::PageSize::Small)?;
        let ring = Arc::new(nothing.map().map_err(empty)?);
        self.left = Some(super::Left { ring, owner_region: Arc::clone(&old.owner_region) });
        Ok(drained?)
    }
}
