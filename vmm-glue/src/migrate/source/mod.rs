//! The source's role: prepare, switch, serve; then release, or catch the guest.
//!
//! Mirror image of [`super::destination`]. What may happen is decided by [`ownership::source`]; this folder carries the actions
//! out, turns what happens into events, and keeps every wait bounded.

mod act;
mod catch;
mod hear;
mod order;
mod prepare;

use super::lane_watch::LaneWatch;
use super::lease::Silence;
use super::observation::{Kind, ObservationId, Observer};
use super::operator::{Pending, Words};
use super::peer::Inbox;
use super::protocol;
use super::protocol::{ProtocolError, ToDestination, ToSource};
use super::registering::Registrations;
use super::settings::{Bounds, Proposal};
use crate::guard::{DeathWatch, GuardError};
use belay_checkpoint::fold::{Catch, CatchError, FoldTarget, Folder, Recovered};
use belay_checkpoint::guest::{Epoch, Guest, GuestError};
use belay_checkpoint::outbox::{Outbox, OutputMode};
use belay_checkpoint::ownership::Illegal;
use belay_checkpoint::ownership::source::{Event, State, step};
use belay_checkpoint::ring::{RingError, RingReader};
use belay_transport::fabric::{FabricError, Owner, ReadKey};
use belay_transport::numa::{NumaChoice, NumaError, Placement};
use belay_transport::region::{Mapping, RegionError};
use belay_transport::session::{Address, Control, SessionConfig, SessionError};
use belay_transport::{Deadline, RegionId};
use crossbeam_channel::{Receiver, Sender};
pub(super) use prepare::lanes;
use prepare::prepare;
use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What a source needs to know beside its guest.
#[derive(Debug, Clone)]
pub struct SourceConfig {
    pub address: Address,
    pub session: SessionConfig,
    pub proposal: Proposal,
    pub ring_bytes: usize,
    pub overflow_bytes: u64,
    /// Where the release record is written.
    pub state_dir: PathBuf,
    pub bounds: Bounds,
    /// Where this host's threads and buffers go.
    pub numa: NumaChoice,
    /// The operator's standing word for `--output lease`: order the catch as soon as the destination is lost.
    pub catch_on_loss: bool,
}

/// How a migration ended, seen from the source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The destination owns the guest; this host never resumes it.
    Released,
    /// The guest runs here again, from this checkpoint; with every nonce it was ever given, in order.
    Caught { epoch: Epoch, nonces: Vec<u64> },
    /// The guest never left.
    NotMoved { why: String },
    /// A catch that stuck twice, or a release of which nobody knows whether it is on disk: only a person can say what is right.
    AwaitsOperator { why: String },
    /// The guest cannot be resumed here.
    Lost { why: String },
}

/// Why the source could not go on. The guest is where the last reported state says.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error("no session with {address}")]
    Connect {
        address: String,
        #[source]
        source: SessionError,
    },
    #[error(transparent)]
    Guest(#[from] GuestError),
    #[error(transparent)]
    Fabric(#[from] FabricError),
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error(transparent)]
    Region(#[from] RegionError),
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
    #[error(transparent)]
    Ring(#[from] RingError),
    #[error(transparent)]
    Guard(#[from] GuardError),
    #[error("cannot {doing}")]
    Io {
        doing: &'static str,
        #[source]
        source: std::io::Error,
    },
    #[error("the destination said: {0}")]
    PeerFailed(String),
    #[error("the destination did not answer {waiting_for} within {bound:?}")]
    TimedOut { waiting_for: &'static str, bound: Duration },
    #[error("the destination closed the session: {0}")]
    PeerClosed(String),
    #[error(transparent)]
    Illegal(#[from] Illegal),
    #[error(transparent)]
    Numa(#[from] NumaError),
    #[error("ended by a signal")]
    Interrupted,
    #[error("the operator cancelled the migration")]
    Cancelled,
    #[error("this migration makes no sense: {0}")]
    Proposal(String),
}

/// What can happen while a session is up, beside messages.
#[derive(Debug)]
enum Happening {
    DeathSign,
    DeathProven,
    GuardGone(String),
    LaneBroken,
}

/// Everything of one session.
struct Live {
    control: Arc<Control>,
    inbox: Inbox<ToSource>,
    happenings: Receiver<Happening>,
    /// Kept so that waiting for happenings goes on waiting when everybody who could tell of one has gone.
    _happened: Sender<Happening>,
    owner: Box<dyn Owner>,
    registrations: Registrations,
    placement: Placement,
    ram: Vec<(RegionId, ReadKey)>,
    ring: Arc<Mapping>,
    owner_region: Arc<Mapping>,
    nonce: u64,
    /// Reserved while preparing; goes into the folder at the switch.
    reserved: Option<(RingReader, FoldTarget)>,
    folder: Option<Folder>,
    /// The folder once it was stopped for the catch.
    catch: Option<Catch>,
    silence: Option<Silence>,
    /// When the last lease that may have been granted has run out, by CLOCK_BOOTTIME; once no more are granted.
    lease_ends: Option<Duration>,
    /// What the last read of the ring gave.
    recovered: Option<Result<Recovered, CatchError>>,
    // Kept going until the session ends.
    _death_watch: Option<DeathWatch>,
    _lane_watch: Option<LaneWatch>,
}

/// The source of one migration.
pub struct Source<'a> {
    config: &'a SourceConfig,
    guest: &'a mut dyn Guest,
    output: &'a Outbox,
    /// How far each vCPU's program has run, for reports.
    steps: &'a dyn Fn() -> Vec<u64>,
    observer: &'a Observer,
    words: &'a Words,
    pending: Pending,
    state: State,
    live: Live,
    last: ObservationId,
    paused_at: Instant,
    noticed_at: Option<Instant>,
    answer_due: Option<Deadline>,
    recovered: Option<Recovered>,
    /// Of every incarnation since, in order.
    nonces: Vec<u64>,
    /// The last failure, for reports.
    why: String,
    ticked_at: Instant,
    /// The signal that said that a catch would lose the guest.
    warned: bool,
    /// A catch that had stuck was ordered again.
    ordered_again: bool,
    outcome: Option<Outcome>,
}

/// Moves the guest and sees the migration to its end. A signal takes the guest back; orders are answered. `output` is where the running guest's output goes through. An error means
/// that the guest was not touched and runs on; whatever happens after the switch has begun is an [`Outcome`].
pub fn run(
    config: &SourceConfig,
    guest: &mut dyn Guest,
    output: &Outbox,
    steps: &dyn Fn() -> Vec<u64>,
    observer: &Observer,
    words: &Words,
) -> Result<Outcome, SourceError> {
    let (live, last) = prepare(config, guest, observer, words)?;
    let source = Source {
        config,
        guest,
        output,
        steps,
        observer,
        words,
        pending: Pending::default(),
        state: State::new(),
        live,
        last,
        paused_at: Instant::now(),
        noticed_at: None,
        answer_due: None,
        recovered: None,
        nonces: config.proposal.nonces.clone(),
        why: String::new(),
        ticked_at: Instant::now(),
        warned: false,
        ordered_again: false,
        outcome: None,
    };
    source.run()
}

/// A nonce for a session or an incarnation.
pub fn fresh_nonce() -> Result<u64, SourceError> {
    let mut bytes = [0; 8];
    let io_error = |error: getrandom::Error| std::io::Error::other(error.to_string());
    getrandom::fill(&mut bytes).map_err(io_error).map_err(io("draw a nonce"))?;
    Ok(u64::from_le_bytes(bytes))
}

fn io(doing: &'static str) -> impl FnOnce(std::io::Error) -> SourceError {
    move |source| SourceError::Io { doing, source }
}

/// What noticed a loss that is none: somebody wants the guest back.
pub(super) const BY_ORDER: &str = "the operator ordered the catch";

/// How often the main loop looks at what has no channel: the heartbeat and the folder.
const TICK: Duration = Duration::from_millis(10);

impl Source<'_> {
    fn run(mut self) -> Result<Outcome, SourceError> {
        let mode = self.config.proposal.tether.as_ref().map_or(OutputMode::Commit, |tether| tether.output);
        self.drive(Event::SwitchStarted { mode })?;
        loop {
            if let Some(outcome) = self.outcome.take() {
                self.settle_orders(Some(&outcome));
                return Ok(outcome);
            }
            if let Some(event) = self.next_event() {
                self.drive(event)?;
            }
        }
    }

    fn note(&mut self, kind: Kind) -> ObservationId {
        let id = self.observer.note(Some(&self.last), kind);
        self.last = id.clone();
        id
    }

    fn tell(&self, message: &ToDestination) -> Result<(), SessionError> {
        self.live.control.send(&protocol::encode(message), Deadline::after(self.config.bounds.handshake))
    }

    /// Takes the step that `event` asks for, and those that its actions' answers ask for.
    fn drive(&mut self, event: Event) -> Result<(), SourceError> {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let (next, actions) = match step(&self.state, &event) {
                Ok(step) => step,
                // A peer that breaks the protocol changes nothing; the state stands.
                Err(illegal) => {
                    let state = self.state.name().to_lowercase();
                    self.observer.note_provoked(Some(&self.last), &state, illegal.to_string());
                    continue;
                }
            };
            let entered = next.name() != self.state.name();
            self.state = next;
            if entered {
                self.note(Kind::State { state: next.name().to_lowercase(), why: event.name().to_owned() });
                let why = if self.why.is_empty() { event.name() } else { &self.why };
                self.words.board.entered(next.name(), Some(next.owner_epoch().0), why);
            }
            for action in actions {
                let came_of_it = self.carry_out(action);
                let failed = came_of_it == Some(Event::SwitchFailed);
                events.extend(came_of_it);
                if failed {
                    // A guest that would not stop must not be sent.
                    break;
                }
            }
            self.settle();
            self.settle_orders(None);
        }
        Ok(())
    }

    /// Without a tether there is nothing to catch the guest with; and under a lease nothing but the operator's word may.
    fn settle(&mut self) {
        match self.state {
            State::Running { .. } if self.outcome.is_none() => {
                self.outcome = Some(match &self.recovered {
                    Some(recovered) => {
                        Outcome::Caught { epoch: recovered.epoch, nonces: std::mem::take(&mut self.nonces) }
                    }
                    None => Outcome::NotMoved { why: std::mem::take(&mut self.why) },
                });
            }
            State::Lost { .. } if self.outcome.is_none() => {
                self.outcome = Some(Outcome::Lost { why: std::mem::take(&mut self.why) });
            }
            // Nothing is lost by a catch that has stuck: it waits for the operator's word, once.
            State::Revoking { stuck: true, .. } if self.ordered_again && self.outcome.is_none() => {
                self.outcome = Some(Outcome::AwaitsOperator { why: std::mem::take(&mut self.why) });
            }
            _ => {}
        }
    }
}
