//! What happens to a destination: messages, the engine, the tether, the lease and signals, turned into events; and what it reports.

use super::warden::Warden;
use super::{Destination, ENDED_BY_SIGNAL, Happening, IDLE_TICK, Outcome, TICK};
use crate::guard::is_ending;
use crate::migrate::observation::{Kind, us};
use crate::migrate::peer::Listened;
use crate::migrate::protocol::{ToDestination, ToSource};
use crate::migrate::settings::ReleasePolicy;
use belay_checkpoint::ownership::Fate;
use belay_checkpoint::ownership::destination::{Event, State};
use belay_transport::pull::Engine;
use belay_transport::stop_point::reached;
use belay_transport::{FrameIndex, explain, harmless};
use crossbeam_channel::{never, select};
use std::time::{Duration, Instant};

/// How often the pull is reported while it goes on, and after.
pub(super) const PULL_REPORT: Duration = Duration::from_millis(4);

pub(super) const IDLE_REPORT: Duration = Duration::from_millis(100);

/// How often fault latencies are reported.
pub(super) const LATENCY_REPORT: Duration = Duration::from_millis(50);

/// A release that was refused is asked for again after this.
pub(super) const RELEASE_AGAIN: Duration = Duration::from_secs(1);

impl Destination<'_> {
    /// Waits at most a tick for something to happen.
    pub(super) fn next_event(&mut self) -> Option<Event> {
        // A peer that never stops talking must not keep this host from looking at its lease.
        let tick = if self.signless.is_none() && self.all_landed_at.is_some() { IDLE_TICK } else { TICK };
        if self.ticked_at.elapsed() > tick
            && let Some(event) = self.tick()
        {
            return Some(event);
        }
        let messages = self.link.as_ref().map_or_else(never, |link| link.inbox.messages().clone());
        let answers = self.claiming.answers().unwrap_or_else(never);
        select! {
            recv(answers) -> answer => match answer {
                Ok(answer) => self.arbiter_said(answer),
                Err(_) => self.tick(),
            },
            recv(self.happenings) -> happening => self.happening(happening.ok()?),
            recv(messages) -> heard => match heard {
                Ok(Listened::Message(message)) => self.message(message),
                Ok(Listened::Closed(_)) if self.leaving.is_some() => {
                    // It never said that it has the guest.
                    self.outcome = Some(Outcome::Fenced);
                    None
                }
                Ok(Listened::Closed(why)) => {
                    self.why = format!("the source is out of reach: {why}");
                    Some(Event::ConnectionClosed)
                }
                Err(_) => {
                    // Told once already; what remains is to wait for ticks and words.
                    std::thread::park_timeout(tick);
                    self.tick()
                }
            },
            recv(self.words.signals) -> _ => self.interrupted(),
            recv(self.words.orders) -> order => self.order(order.ok()?),
            default(tick) => self.tick(),
        }
    }

    pub(super) fn happening(&mut self, happening: Happening) -> Option<Event> {
        match happening {
            Happening::AllLanded => {
                self.all_landed_at = Some(Instant::now());
                let progress = self.engine.as_ref().map(|engine| engine.progress()).unwrap_or_default();
                let took_us = self.resumed_at.map_or(0, |at| us(at.elapsed()));
                let because =
                    self.note(Kind::AllLanded { took_us, bytes: progress.bytes_pulled, faults: progress.faults });
                let _ = self.tell(&ToSource::AllLanded { because });
                Some(Event::AllLanded)
            }
            Happening::PullFailed => {
                let failure = self.engine.as_ref().and_then(|engine| engine.failure());
                self.why = failure.map_or("the pull failed".to_owned(), |failure| explain(&*failure));
                Some(Event::ConnectionClosed)
            }
            Happening::LaneBroken(why) => {
                self.why = why;
                Some(Event::ConnectionClosed)
            }
            Happening::SourceRevoked(why) => {
                self.why = why;
                Some(Event::SourceRevoked)
            }
            Happening::CommitFailed(why) => {
                self.why = why;
                Some(Event::CommitFailed)
            }
            Happening::VmmGone(why) => {
                self.why = why;
                Some(Event::GuestDied)
            }
            Happening::LeaseExpired => {
                self.why = "the source has granted no lease in time".to_owned();
                Some(Event::LeaseExpired)
            }
        }
    }

    pub(super) fn message(&mut self, message: ToDestination) -> Option<Event> {
        match message {
            ToDestination::Go { owner_epoch, because } => {
                self.go_due = None;
                self.last = because;
                // Before the guest runs here: from then on a page server that dies leaves something.
                self.owner_epoch = owner_epoch;
                self.lay_down_will(false);
                Some(Event::HandedOver { owner_epoch })
            }
            ToDestination::Released { because } => {
                reached("release-heard");
                self.last = because;
                Some(Event::ReleaseAcknowledged)
            }
            ToDestination::ReleaseRefused { because } => {
                self.last = because;
                self.release_refused();
                Some(Event::ReleaseRefused)
            }
            ToDestination::Fate { fate, because } => {
                self.last = because;
                self.why = format!("the source says: {fate:?}");
                Some(if fate == Fate::Revoked { Event::SourceRevoked } else { Event::FateAnswered(fate) })
            }
            ToDestination::Zeros { region, first, bitmap } => {
                // Without an engine nothing is pulled: the next one reads what it lacks.
                let Some(engine) = &self.engine else { return None };
                if engine.are_zero(region, FrameIndex(first), &bitmap).is_none() {
                    let frames = bitmap.len() * 8;
                    self.why = format!(
                        "the source broke the protocol: zeros at {frames} frames from {first} on of {region}, which are not there"
                    );
                    return Some(Event::ConnectionClosed);
                }
                None
            }
            ToDestination::Failed { reason, because } => {
                self.last = because;
                self.why = format!("the source failed: {}", harmless(&reason));
                Some(match self.state {
                    State::Preparing { .. } => Event::PrepareFailed,
                    _ => Event::ConnectionClosed,
                })
            }
            ToDestination::Prepare { .. }
            | ToDestination::Switch { .. }
            | ToDestination::Reattach { .. }
            | ToDestination::PrepareAgain { .. } => {
                self.why = "the source broke the protocol: prepared or switched twice".to_owned();
                Some(Event::ConnectionClosed)
            }
        }
    }

    /// A signal. A tethered guest is given back: it is stopped here for good, and the source told so, which then catches it.
    pub(super) fn interrupted(&mut self) -> Option<Event> {
        // Without a tether there is nothing the source could catch the guest with: the first signal only says so.
        let untethered = self.proposal.tether.is_none() && matches!(self.state, State::Tethered { .. });
        if untethered && !std::mem::replace(&mut self.warned, true) {
            let what =
                "a signal asked to end, but this guest moved without a tether: ending now would lose it".to_owned();
            let advice = "It goes on until the source has released it. Signal again to lose the guest.".to_owned();
            self.note(Kind::Failed { what, advice });
            return None;
        }
        self.why = ENDED_BY_SIGNAL.to_owned();
        match self.state {
            State::Preparing { .. } => Some(Event::Cancelled),
            State::Tethered { .. } => {
                self.output.shut();
                self.stop_tether();
                self.stop_guest();
                Some(Event::GuestDied)
            }
            State::Fenced(now) if now.claiming && !std::mem::replace(&mut self.warned, true) => {
                let what = "a signal asked to end, but the arbiter was asked for this guest and has not answered: if it has said yes, ending now \
                            loses the guest";
                let advice = "It stays stopped here, its memory kept. Signal again to give it up.".to_owned();
                self.note(Kind::Failed { what: what.to_owned(), advice });
                None
            }
            State::Fenced(_) => {
                self.outcome = Some(Outcome::Fenced);
                None
            }
            _ => None,
        }
    }

    /// What has no channel of its own.
    pub(super) fn tick(&mut self) -> Option<Event> {
        self.ticked_at = Instant::now();
        let lease_ends = self.tethering.as_ref().map(|tethering| tethering.lease_ends_at_ns());
        self.words.board.turned(lease_ends.filter(|&ends| ends > 0));
        if self.leaving.is_some_and(|due| due.expired()) {
            self.outcome = Some(Outcome::Fenced);
            return None;
        }
        if self.go_due.take_if(|due| due.expired()).is_some() && matches!(self.state, State::Preparing { .. }) {
            self.why = format!("the source has not said go within {:?}", self.config.bounds.switch);
            return Some(Event::PrepareFailed);
        }
        self.look_at_vmm();
        if let (State::Tethered { .. }, Some(tethering)) = (&self.state, &self.tethering) {
            if let Some(failure) = tethering.heart_failure() {
                return self.happening(failure);
            }
            if tethering.lease_has_ended() {
                return self.happening(Happening::LeaseExpired);
            }
        }
        if let State::Tethered { .. } = self.state
            && self.warden.as_mut().is_some_and(Warden::has_gone)
        {
            let why = "the guard has ended; a death here is noticed by connection and lease alone".to_owned();
            self.note(Kind::State { state: "guard-gone".to_owned(), why });
        }
        if let Some(event) = self.hear_dialler().or_else(|| self.wants_to_go_on()) {
            return Some(event);
        }
        let asked_long_ago = self.release_asked_at.is_none_or(|at| at.elapsed() > RELEASE_AGAIN);
        let due = match (self.proposal.release, self.all_landed_at) {
            (ReleasePolicy::WhenLanded, Some(_)) => true,
            (ReleasePolicy::After(kept), Some(at)) => at.elapsed() >= kept,
            (ReleasePolicy::Never, _) | (_, None) => false,
        };
        if due && asked_long_ago && matches!(self.state, State::Tethered { .. }) {
            self.release_asked_at = Some(Instant::now());
            return Some(Event::ReleaseWanted);
        }
        None
    }

    /// Tells the source of a VMM that has begun to die, if it gives no sign of its own: what is known of it otherwise comes when its address space
    /// is gone. A sign and no proof; that follows when its socket closes.
    fn look_at_vmm(&mut self) {
        let tethered = matches!(self.state, State::Tethered { .. }) && self.tethering.is_some();
        let Some(pid) = self.signless.take_if(|pid| tethered && is_ending(*pid as i32)) else { return };
        let reason = format!("its VMM, process {pid}, is dying");
        let because = self.note(Kind::State { state: "vmm-dying".to_owned(), why: reason.clone() });
        let _ = self.tell(&ToSource::Failed { reason, because });
    }

    /// Tells how far the pull is.
    pub(super) fn report(&mut self) {
        let Some(engine) = self.engine.clone() else { return };
        // A fenced guest may wait for its operator for days: nothing is pulled for it meanwhile.
        let pulling = self.all_landed_at.is_none() && !matches!(self.state, State::Fenced(_));
        let every = if pulling { PULL_REPORT } else { IDLE_REPORT };
        if self.reported_at.elapsed() >= every && self.resumed_at.is_some() {
            self.reported_at = Instant::now();
            let (facts, progress) = (self.output.facts(), engine.progress());
            // What is here, and not what is left of the rest: frames that go back from in flight to absent are for a moment counted in neither.
            let here = progress.landed + progress.discarded;
            self.observer.note(
                Some(&self.last),
                Kind::Pull {
                    landed_frames: here,
                    absent_frames: progress.frames.saturating_sub(here),
                    faults: progress.faults,
                    bytes: progress.bytes_pulled,
                    held_packets: facts.held_packets as u64,
                    released_packets: facts.sent_packets,
                },
            );
        }
        if self.latencies_at.elapsed() >= LATENCY_REPORT && self.resumed_at.is_some() && self.all_landed_at.is_none() {
            self.latencies_at = Instant::now();
            self.report_latencies(&engine);
        }
    }

    pub(super) fn report_latencies(&self, engine: &Engine) {
        let latencies = engine.latencies();
        let stages = [
            ("queue", &latencies.queue),
            ("wire", &latencies.wire),
            ("install", &latencies.install),
            ("total", &latencies.total),
        ];
        for (what, histogram) in stages {
            if let Some(kind) = crate::migrate::observation::latency(what, histogram) {
                self.observer.note(Some(&self.last), kind);
            }
        }
    }
}
