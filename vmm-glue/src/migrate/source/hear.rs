//! What happens to a source: messages, the guard, lanes, the heartbeat and the operator, turned into events.

use super::herald::NO_SESSION;
use super::{BY_ORDER, Happening, Outcome, Source, TICK};
use crate::migrate::lease::boot_time;
use crate::migrate::observation::{Kind, us};
use crate::migrate::peer::Listened;
use crate::migrate::protocol::ToSource;
use belay_checkpoint::fold::FoldError;
use belay_checkpoint::ownership::source::{Event, State};
use belay_transport::fabric::FabricError;
use belay_transport::{explain, harmless};
use crossbeam_channel::{never, select};
use std::time::{Duration, Instant};

impl Source<'_> {
    /// Waits at most a tick for something to happen.
    pub(super) fn next_event(&mut self) -> Option<Event> {
        // A peer that never stops talking must not keep this host from hearing that its heart has stopped.
        if self.ticked_at.elapsed() > TICK
            && let Some(event) = self.tick()
        {
            return Some(event);
        }
        let messages = self.live.as_ref().map_or_else(never, |live| live.inbox.messages().clone());
        let asking = self.asking.as_ref().map_or_else(never, |asking| asking.inbox.messages().clone());
        let claims = self.claims.as_ref().map_or_else(never, |claims| claims.answers().clone());
        select! {
            recv(claims) -> answer => match answer {
                Ok(answer) => self.arbiter_said(answer),
                Err(_) => self.tick(),
            },
            recv(self.happenings) -> happening => {
                let (session, what) = happening.ok()?;
                self.happening(session, what)
            }
            recv(asking) -> heard => self.asked(heard.ok()),
            recv(messages) -> heard => match heard {
                Ok(Listened::Message(message)) => self.message(message),
                Ok(Listened::Closed(why)) => {
                    if matches!(self.state, State::Released { .. }) {
                        // The record is on disk, and nobody is left to say farewell; whether the release was heard is the destination's story.
                        self.outcome = Some(Outcome::Released { heard: false });
                    }
                    let by = self.with_what_the_fabric_says(&why);
                    Some(self.lost(Event::ConnectionClosed, &by))
                }
                Err(_) => {
                    // Told once already; what remains is to wait for ticks and words.
                    std::thread::park_timeout(TICK);
                    self.tick()
                }
            },
            // A signal takes back a switch that has not happened, and a guest that has left.
            recv(self.words.signals) -> signal => match signal {
                Ok(_) => self.ordered(),
                Err(_) => self.tick(),
            },
            recv(self.words.orders) -> order => match order {
                Ok(order) => self.order(order),
                Err(_) => self.tick(),
            },
            default(TICK) => self.tick(),
        }
    }

    fn happening(&mut self, session: u64, what: Happening) -> Option<Event> {
        let current = self.live.as_ref().map_or(NO_SESSION, |live| live.nonce);
        if session != NO_SESSION && session != current {
            return None;
        }
        match what {
            Happening::DeathSign => Some(self.lost(Event::DeathSign, "the guard beside it says that it is dying")),
            Happening::DeathProven => self.death_proven("the guard beside it says that it has ended"),
            Happening::LaneBroken => {
                let by = self.with_what_the_fabric_says("a data lane closed");
                Some(self.lost(Event::ConnectionClosed, &by))
            }
            Happening::GuardGone(why) => {
                // Only the fastest of several ways to notice is gone; the connection and the lease remain.
                let why =
                    format!("the guard there is gone: {why}; a death there is noticed by connection and lease alone");
                self.note(Kind::State { state: "guard-gone".to_owned(), why });
                None
            }
            Happening::NotBack(why) => {
                self.note(Kind::State { state: "seeking".to_owned(), why });
                None
            }
            Happening::GraceOver(why) => Some(self.grace_is_over(&why)),
            Happening::CameBack(session) => self.came_back(*session),
            Happening::Fence(number, report) => self.fence_said(number, report),
        }
    }

    /// A sign of loss, and what the fabric knows of it beyond lanes that have closed: a device that was removed, a port that is down.
    fn with_what_the_fabric_says(&mut self, sign: &str) -> String {
        let told = self.live.as_mut().map(|live| live.owner.take_failures()).unwrap_or_default();
        let more = told.iter().filter(|failure| !matches!(failure, FabricError::PeerClosed { .. }));
        let told = more.take(2).map(|failure| format!(": {}", harmless(&explain(failure))));
        std::iter::once(sign.to_owned()).chain(told).collect()
    }

    /// A signal: the operator's word.
    pub(super) fn ordered(&mut self) -> Option<Event> {
        match self.state {
            State::Switching { handed_over: false, .. } => Some(Event::Cancelled),
            // Nobody knows whether the release is on disk, so nothing here may resume the guest.
            State::Serving(serving) if serving.recording_release => {
                self.outcome = Some(Outcome::AwaitsOperator { why: std::mem::take(&mut self.why) });
                None
            }
            // Without a tether there is nothing to catch the guest with: the first signal only says so.
            State::Switching { .. } | State::Serving(_)
                if self.config.proposal.tether.is_none() && !std::mem::replace(&mut self.warned, true) =>
            {
                let what =
                    "a signal asked for the guest, but it moved without a tether: taking it back now would lose it";
                let advice = "It goes on at the destination. Signal again to lose it.".to_owned();
                self.note(Kind::Failed { what: what.to_owned(), advice });
                None
            }
            State::Switching { .. } => Some(Event::Cancelled),
            // It is the destination's already; what is left is to tell it.
            State::Released { .. } => {
                self.outcome = Some(Outcome::Released { heard: false });
                None
            }
            State::Revoking { stuck, .. } => {
                self.hurry_the_fence();
                self.hurry_the_arbiter();
                self.ordered_again = stuck;
                Some(Event::OperatorCatch)
            }
            _ => Some(self.lost(Event::OperatorCatch, BY_ORDER)),
        }
    }

    pub(super) fn lost(&mut self, event: Event, by: &str) -> Event {
        if self.noticed_at.is_none()
            && matches!(self.state, State::Serving(_) | State::Switching { .. } | State::Resuming(_))
        {
            self.noticed_at = Some(Instant::now());
            self.note(Kind::Noticed { by: by.to_owned() });
        }
        self.why = by.to_owned();
        event
    }

    pub(super) fn message(&mut self, message: ToSource) -> Option<Event> {
        match message {
            ToSource::Loaded { because } => {
                self.last = because;
                Some(Event::StateSent)
            }
            ToSource::Resumed { because } => {
                self.last = because;
                if matches!(self.state, State::Switching { .. }) {
                    self.note(Kind::Blackout { took_us: us(self.paused_at.elapsed()) });
                    self.look_for_zeros();
                }
                Some(Event::DestinationResumed)
            }
            ToSource::AllLanded { because } => {
                self.last = because;
                None
            }
            ToSource::ReleaseAsked { all_landed, because } => {
                self.last = because;
                Some(Event::ReleaseAsked { all_landed })
            }
            ToSource::FateAsked { owner_epoch } => Some(Event::FateAsked { owner_epoch }),
            ToSource::GuestGone { because } => {
                self.last = because;
                self.death_proven("the destination says that its VMM has ended")
            }
            ToSource::Failed { reason, because } => {
                self.last = because;
                // Before the guest went this takes the switch back; after it, the destination has fenced itself.
                let switching = matches!(self.state, State::Switching { .. });
                let event = if switching { Event::SwitchFailed } else { Event::ConnectionClosed };
                Some(self.lost(event, &format!("the destination failed: {}", harmless(&reason))))
            }
            ToSource::Farewell => {
                let over = matches!(self.state, State::Released { .. });
                self.outcome = over.then_some(Outcome::Released { heard: true });
                None
            }
            ToSource::Prepared { .. } => {
                Some(self.lost(Event::ConnectionClosed, "the destination broke the protocol: Prepared twice"))
            }
        }
    }

    /// What has no channel of its own.
    pub(super) fn tick(&mut self) -> Option<Event> {
        self.ticked_at = Instant::now();
        self.show();
        if self.answer_due.is_some_and(|due| due.expired())
            && matches!(self.state, State::Switching { .. } | State::Released { .. })
        {
            self.answer_due = None;
            if matches!(self.state, State::Released { .. }) {
                // The record is on disk and was acknowledged as well as can be; whether it was heard is the destination's story.
                self.outcome = Some(Outcome::Released { heard: false });
                return None;
            }
            let bound = self.config.bounds.switch;
            return Some(self.lost(Event::SwitchFailed, &format!("no answer to the switch within {bound:?}")));
        }
        // After the withdrawal time alone decides, whatever the heartbeat does.
        if matches!(self.state, State::Serving(_) | State::Resuming(_))
            && self.lease_ends.take_if(|ends| boot_time() > *ends).is_some()
        {
            return Some(self.lost(Event::LeaseRanOut, "its lease has run out"));
        }
        self.tell_of_what_is_stuck();
        self.tend();
        if let Some(event) = self.room_again() {
            return Some(event);
        }
        if let State::Serving(_) = self.state
            && let (Some(folder), Some(silence)) = (&self.folder, &mut self.silence)
        {
            if let Some(failed) = folder.status().failed {
                let why = format!("its checkpoints cannot be taken: {}", explain(&failed));
                return Some(self.lost(Event::ConnectionClosed, &why));
            }
            if silence.has_lasted(&folder.heard(), boot_time()) {
                let bound =
                    self.config.proposal.tether.as_ref().map_or(Duration::ZERO, |tether| tether.lease.silence_bound());
                let by = self.with_what_the_fabric_says(&format!("silent for {bound:?}"));
                return Some(self.lost(Event::LeaseRanOut, &by));
            }
        }
        None
    }

    /// What a catch will need is seen to while the guest is away.
    fn tend(&mut self) {
        if !matches!(self.state, State::Serving(_) | State::Resuming(_) | State::Revoking { stuck: true, .. }) {
            return;
        }
        match self.guest.tend() {
            Some(Ok(why)) => drop(self.note(Kind::State { state: "standby-replaced".to_owned(), why })),
            Some(Err(error)) => {
                let advice = "The guest goes on at the destination; until there is one a catch waits. Another is started every few seconds. Its log says why it cannot."
                    .to_owned();
                self.note(Kind::Failed { what: explain(&error), advice });
            }
            None => {}
        }
    }

    /// What there is no room for is told once, and that there is again.
    fn tell_of_what_is_stuck(&mut self) {
        let Some(folder) = &self.folder else { return };
        match folder.status().stuck {
            Some(stuck) if !std::mem::replace(&mut self.stuck_told, true) => {
                let (make_room, and_if) = match stuck {
                    FoldError::Disk { .. } => (
                        "make room on the storage, or mend it",
                        " If this host's disk relay has gone, end belay here and promote the guest at the destination.",
                    ),
                    _ => ("give this host memory, or room where --memory-dir is", ""),
                };
                let advice = format!(
                    "It is tried again and again: {make_room}. What the guest sends is held meanwhile, and it stops when no more can be; a catch waits too, \
                     and goes on by itself. Nothing is lost.{and_if}"
                );
                self.note(Kind::Failed { what: explain(&stuck), advice });
            }
            None if std::mem::take(&mut self.stuck_told) => {
                let why = "what has committed is taken again".to_owned();
                self.note(Kind::State { state: "disk-written".to_owned(), why });
            }
            _ => {}
        }
    }
}
