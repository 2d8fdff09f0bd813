//! The source's role: prepare, switch, serve; then release, or catch the guest.
//!
//! Mirror image of [`super::destination`]. What may happen is decided by [`ownership::source`]; this folder carries the actions
//! out, turns what happens into events, and keeps every wait bounded.

mod act;
mod catch;
mod claim;
mod fence;
mod hear;
mod herald;
pub mod keep;
mod order;
mod prepare;
mod resume;
mod zeros;

use super::arbitration::{Arbitration, Claims};
use super::lane_watch::LaneWatch;
use super::lease::Silence;
use super::observation::{Kind, ObservationId, Observer};
use super::operator::{Pending, Words};
use super::peer::Inbox;
use super::protocol;
use super::protocol::{ProtocolError, ToDestination, ToSource};
use super::registering::Registrations;
use super::settings::{Bounds, Proposal};
use crate::fence_hook::{FenceHook, Report};
use crate::guard::{DeathWatch, GuardError};
use belay_checkpoint::arbiter::LendError;
use belay_checkpoint::fold::{Catch, CatchError, FoldError, FoldTarget, Folder, Recovered};
use belay_checkpoint::guest::{Epoch, Guest, GuestError};
use belay_checkpoint::outbox::{Outbox, OutputMode};
use belay_checkpoint::ownership::Illegal;
use belay_checkpoint::ownership::source::{Action, CatchStep, Event, State, restart, step};
use belay_checkpoint::ring::{RingError, RingReader, SpoolError};
use belay_transport::fabric::{FabricError, FabricKind, Owner, ReadKey};
use belay_transport::numa::{NumaChoice, NumaError, Placement};
use belay_transport::region::{Extent, Mapping, RegionError};
use belay_transport::session::{Address, Control, LaneDialer, SessionConfig, SessionError, SourceSession};
use belay_transport::{Deadline, RegionId, explain};
use crossbeam_channel::{Receiver, Sender, bounded};
use fence::Fence;
use herald::Herald;
use keep::{Keep, KeepError, LeftBehind};
pub(super) use prepare::lanes;
use prepare::{Prepared, prepare};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};
use zeros::ZeroLook;

/// What a source needs to know beside its guest.
#[derive(Debug, Clone)]
pub struct SourceConfig {
    pub address: Address,
    pub session: SessionConfig,
    pub proposal: Proposal,
    pub ring_bytes: usize,
    pub overflow_bytes: u64,
    /// Goes into the journal for whoever starts this source again.
    pub extra: Vec<u8>,
    /// How long a source that takes over looks for the destination before it catches the guest.
    pub grace: Duration,
    pub bounds: Bounds,
    /// Where this host's threads and buffers go.
    pub numa: NumaChoice,
    /// The operator's standing word for `--output lease`: order the catch as soon as the destination is lost.
    pub catch_on_loss: bool,
    /// What makes sure that a lost destination is off.
    pub fence: Option<FenceHook>,
    /// Who says whose the guest is, where somebody does.
    pub arbiter: Option<Arbitration>,
}

/// How a migration ended, seen from the source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The destination owns the guest; this host never resumes it. `heard`: the destination has said that it knows.
    Released { heard: bool },
    /// The guest runs here again, from this checkpoint; with every nonce it was ever given, in order.
    Caught { epoch: Epoch, nonces: Vec<u64> },
    /// The guest never left.
    NotMoved { why: String },
    /// A catch that stuck twice, or a release of which nobody knows whether it is on disk: only a person can say what is right.
    AwaitsOperator { why: String },
    /// The guest cannot be resumed here.
    Lost { why: String },
    /// The arbiter says that the destination has made the guest its own; it is never resumed here.
    Ceded { why: String },
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
    #[error(transparent)]
    Keep(#[from] KeepError),
    #[error("the overflow memory cannot be kept")]
    Spool(#[source] SpoolError),
    #[error(transparent)]
    Fold(FoldError),
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
    #[error("the guest cannot be lent to the destination")]
    Lend(#[from] LendError),
}

/// What can happen beside messages.
enum Happening {
    DeathSign,
    DeathProven,
    GuardGone(String),
    LaneBroken,
    /// A destination that was looked for is there again, and is this migration's.
    CameBack(Box<SourceSession>),
    /// It is not, yet: why the last try failed.
    NotBack(String),
    /// It was looked for as long as it was to be.
    GraceOver(String),
    /// What the fence hook's runs, by their number, have come to.
    Fence(u64, Report),
}

/// Takes what happens, with the nonce of the session it happened in: what is left of an earlier session means nothing.
type Happened = Sender<(u64, Happening)>;

/// Everything of one session.
struct Live {
    control: Arc<Control>,
    lanes: LaneDialer,
    inbox: Inbox<ToSource>,
    owner: Box<dyn Owner>,
    registrations: Registrations,
    placement: Placement,
    fabric: FabricKind,
    ram: Vec<(RegionId, ReadKey)>,
    /// What of each region held data when that was last asked.
    occupied: Vec<Vec<Extent>>,
    ring: Arc<Mapping>,
    owner_region: Arc<Mapping>,
    nonce: u64,
    /// By which the destination's guard is heard, and told to fence.
    death_watch: Option<DeathWatch>,
    // Kept going until the session ends.
    _lane_watch: Option<LaneWatch>,
    zeros: Option<ZeroLook>,
}

/// A ring that is left of a session which ended with its process.
struct Left {
    ring: Arc<Mapping>,
    owner_region: Arc<Mapping>,
}

/// A session in which a destination that came back asks what became of its guest.
struct Asking {
    session: SourceSession,
    inbox: Inbox<ToSource>,
}

/// The source of one migration.
pub struct Source<'a> {
    config: &'a SourceConfig,
    keep: &'a mut Keep,
    guest: &'a mut dyn Guest,
    output: &'a Outbox,
    /// How far each vCPU's program has run, for reports.
    steps: &'a dyn Fn() -> Vec<u64>,
    observer: &'a Observer,
    words: &'a Words,
    pending: Pending,
    state: State,
    /// `None` where a process has taken over and the destination has not come back.
    live: Option<Live>,
    left: Option<Left>,
    herald: Option<Herald>,
    fence: Fence,
    /// Under way at the arbiter.
    claims: Option<Claims>,
    /// Why the arbiter was away when that was told last.
    arbiter_away: String,
    /// Until when the herald is to look.
    grace_until: Option<Instant>,
    asking: Option<Asking>,
    happened: Happened,
    happenings: Receiver<(u64, Happening)>,
    /// Reserved while preparing; goes into the folder at the switch.
    reserved: Option<(RingReader, FoldTarget)>,
    folder: Option<Folder>,
    /// The folder once it was stopped: for the catch, or for a next session.
    catch: Option<Catch>,
    silence: Option<Silence>,
    /// When the last lease that may have been granted has run out, by CLOCK_BOOTTIME; once no more are granted.
    lease_ends: Option<Duration>,
    /// What the last read of the ring gave.
    last_read: Option<Result<Recovered, CatchError>>,
    last: ObservationId,
    paused_at: Instant,
    noticed_at: Option<Instant>,
    answer_due: Option<Deadline>,
    recovered: Option<Recovered>,
    /// Of every incarnation since, in order.
    nonces: Vec<u64>,
    /// The last failure, for reports.
    why: String,
    /// Its status says so in the place of the state, until that changes.
    waits_for_a_person: bool,
    ticked_at: Instant,
    /// The signal that said that a catch would lose the guest.
    warned: bool,
    /// That what has committed cannot be taken, for want of room, was told.
    stuck_told: bool,
    /// A catch waits for room on a disk's image or in memory, which is looked at again then.
    room_due: Option<Deadline>,
    /// The operator's word: the guest comes back from an older checkpoint where the newest cannot be taken.
    take_older: bool,
    /// A catch that had stuck was ordered again.
    ordered_again: bool,
    outcome: Option<Outcome>,
}

/// What a role of the source is given.
pub struct Given<'a> {
    pub config: &'a SourceConfig,
    pub keep: &'a mut Keep,
    pub guest: &'a mut dyn Guest,
    /// Where the running guest's output goes through.
    pub output: &'a Outbox,
    /// How far each vCPU's program has run, for reports.
    pub steps: &'a dyn Fn() -> Vec<u64>,
    pub observer: &'a Observer,
    /// A signal takes the guest back; orders are answered.
    pub words: &'a Words,
}

/// Moves the guest and sees the migration to its end. An error means that the guest was not touched and runs on; whatever happens after
/// the switch has begun is an [`Outcome`].
pub fn run(given: Given<'_>) -> Result<Outcome, SourceError> {
    let (happened, happenings) = bounded(64);
    let Given { config, keep, guest, observer, words, .. } = given;
    // Long before the destination can run it, so that this is no part of the blackout.
    if let Some(arbiter) = &config.arbiter {
        let lent = arbiter.lend(config.proposal.identity.migration, State::new().owner_epoch())?;
        observer.note(None, Kind::State { state: "lent".to_owned(), why: lent.claim.to_string() });
    }
    let Prepared { live, reserved, last } = prepare(config, keep, guest, observer, &happened, words)?;
    let given = Given { config, keep, guest, ..given };
    let mut source = Source::new(given, State::new(), (happened, happenings), last);
    source.live = Some(live);
    source.reserved = reserved;
    let mode = config.proposal.tether.as_ref().map_or(OutputMode::Commit, |tether| tether.output);
    source.drive(Event::SwitchStarted { mode })?;
    source.see_to_the_end()
}

/// Goes on with a migration whose process died: `keep` was taken over, `guest` is a VMM with no state over its memory. An error means that
/// nothing was changed, and it can be taken over again.
pub fn take_over(given: Given<'_>) -> Result<Outcome, SourceError> {
    let channel = bounded(64);
    let (state, since) = given.keep.left();
    let released = matches!(state, State::Released { .. });
    let left = if released { None } else { given.keep.left_behind(given.guest.memory())? };
    if left.is_none() && !released {
        let why = "its process died in the switch, before the guest's state was saved".to_owned();
        // So that what is left of its memory is found to be of no use, and given back.
        let _ = given.keep.mark(State::Running { owner_epoch: state.owner_epoch() }, &since);
        return Err(KeepError::NothingLeft { id: given.keep.identity().migration, why }.into());
    }
    given.words.board.session(given.keep.identity().migration.number());
    let (was, kept) = (state.name().to_lowercase(), state);
    let migration = given.keep.identity().migration.to_string();
    let last = given.observer.note(None, Kind::TakenOver { migration, was });
    let (state, actions) = restart(&state);
    let mut source = Source::new(given, state, channel, last);
    source.nonces.extend(since);
    source.take_over_proof(&kept);
    if let Some(LeftBehind { ring, owner_region, catch }) = left {
        source.left = Some(Left { ring, owner_region });
        source.catch = Some(catch);
    }
    source.begin(state, actions)?;
    source.see_to_the_end()
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

impl<'a> Source<'a> {
    fn new(
        given: Given<'a>,
        state: State,
        (happened, happenings): (Happened, Receiver<(u64, Happening)>),
        last: ObservationId,
    ) -> Self {
        let Given { config, keep, guest, output, steps, observer, words } = given;
        Self {
            config,
            keep,
            guest,
            output,
            steps,
            observer,
            words,
            pending: Pending::default(),
            state,
            live: None,
            left: None,
            herald: None,
            fence: Fence::default(),
            claims: None,
            arbiter_away: String::new(),
            grace_until: None,
            asking: None,
            happened,
            happenings,
            reserved: None,
            folder: None,
            catch: None,
            silence: None,
            lease_ends: None,
            last_read: None,
            last,
            paused_at: Instant::now(),
            noticed_at: None,
            answer_due: None,
            recovered: None,
            nonces: config.proposal.nonces.clone(),
            why: String::new(),
            waits_for_a_person: false,
            ticked_at: Instant::now(),
            warned: false,
            stuck_told: false,
            room_due: None,
            take_older: false,
            ordered_again: false,
            outcome: None,
        }
    }

    fn see_to_the_end(mut self) -> Result<Outcome, SourceError> {
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
        let Some(live) = &self.live else { return Err(SessionError::NoSession) };
        live.control.send(&protocol::encode(message), Deadline::after(self.config.bounds.handshake))
    }

    /// Keeps who owns the guest, before anything is done that this allows. That the guest runs here is kept where it is let run.
    fn keep_state(&mut self, state: State) {
        if matches!(state, State::Running { .. }) {
            return;
        }
        let since = self.config.proposal.nonces.len().min(self.nonces.len());
        if let Err(error) = self.keep.mark(state, &self.nonces[since..]) {
            self.nobody_takes_over(&error);
        }
    }

    /// What cannot be kept must not be found as it was before either.
    fn nobody_takes_over(&mut self, error: &dyn std::error::Error) {
        let what = explain(error);
        let advice = match self.keep.give_up_memory() {
            Ok(()) => "The migration goes on; from here on nobody can take over from this process.".to_owned(),
            Err(error) => {
                format!("Do not take over from this process: its memory could not be given up either ({error}).")
            }
        };
        self.note(Kind::Failed { what, advice });
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
            events.extend(self.enter(next, event.name(), actions));
        }
        Ok(())
    }

    /// Begins where a process that died has left off.
    fn begin(&mut self, state: State, actions: Vec<Action>) -> Result<(), SourceError> {
        let events = self.enter(state, "taken over", actions);
        events.into_iter().try_for_each(|event| self.drive(event))
    }

    /// Keeps the state, tells of it, and carries its actions out; what came of them.
    fn enter(&mut self, next: State, why: &str, actions: Vec<Action>) -> Vec<Event> {
        let (entered, changed) = (next.name() != self.state.name(), next != self.state);
        if changed {
            self.keep_state(next);
        }
        self.state = next;
        if entered {
            self.note(Kind::State { state: next.name().to_lowercase(), why: why.to_owned() });
        }
        if entered || (self.waits_for_a_person && !self.needs_a_person()) {
            self.waits_for_a_person = false;
            let why = if self.why.is_empty() { why } else { &self.why };
            self.words.board.entered(next.name(), Some(next.owner_epoch().0), why);
        }
        let mut events = Vec::new();
        for action in actions {
            let came_of_it = self.carry_out(action);
            // A guest that would not stop must not be sent; a session that was not made is granted no lease.
            let over = came_of_it == Some(Event::SwitchFailed)
                || (came_of_it.is_some() && matches!(action, Action::AnswerFate(_)));
            events.extend(came_of_it);
            if over {
                break;
            }
        }
        self.settle();
        self.see_to_the_fence();
        self.settle_orders(None);
        events
    }

    /// Whether what a person was asked for is still to be done: a lease that runs out meanwhile, say, changes nothing about it.
    fn needs_a_person(&self) -> bool {
        match self.state {
            State::Serving(now) => now.failed && !now.catch_ordered,
            State::Revoking { stuck, .. } => stuck || self.awaits_fence(),
            _ => false,
        }
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
            State::Ceded { .. } if self.outcome.is_none() => {
                self.outcome = Some(Outcome::Ceded { why: std::mem::take(&mut self.why) });
            }
            // It is in this process and nowhere else: only writing its disks is left, which is tried for as long as it takes.
            State::Revoking { stuck: true, step: CatchStep::Fold, .. } if self.room_due.is_some() => {}
            // Nothing is lost by a catch that has stuck: it waits for the operator's word, once.
            State::Revoking { stuck: true, .. } if self.ordered_again && self.outcome.is_none() => {
                self.outcome = Some(Outcome::AwaitsOperator { why: std::mem::take(&mut self.why) });
            }
            _ => {}
        }
    }
}
