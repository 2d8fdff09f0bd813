//! The destination's role: prepare, load, pull and tether; then own the guest, or be fenced from it.
//!
//! Mirror image of [`super::source`]. What may happen is decided by [`ownership::destination`](belay_checkpoint::ownership); this
//! folder carries the actions out, turns what happens into events, and keeps every wait bounded.

mod act;
mod claim;
mod hear;
mod heard;
mod load;
mod order;
mod prepare;
mod ram;
mod resume;
mod takeover;
mod warden;
pub(crate) mod will;

use super::faults::recording::FaultRecording;
use super::observation::{Kind, ObservationId, Observer};
use super::operator::{Pending, Words};
use super::peer::{Inbox, listen_to};
use super::protocol;
use super::protocol::{ProtocolError, ToDestination, ToSource};
use super::recording::Recording;
use super::settings::{Bounds, Proposal, VmmSpec};
use super::switch_map::{RegionClasses, SwitchMapError};
use super::tethering::{Leftover, Tethering, TetheringError};
use crate::guard::{Arms, GuardCommand, GuardError, LifePage};
use crate::kvm::apart::{Keeper, LedgerError};
use belay_checkpoint::guest::{Guest, GuestError, PacketSink, TrackerKind};
use belay_checkpoint::outbox::{Emitter, Outbox};
use belay_checkpoint::ownership::OwnerEpoch;
use belay_checkpoint::ownership::destination::{Event, State, step};
use belay_checkpoint::staging::Staging;
use belay_checkpoint::storage::Storage;
use belay_checkpoint::tracker::WriteFaults;
use belay_transport::fabric::{FabricError, LocalKey, ReadKey};
use belay_transport::numa::{NumaChoice, NumaError, Placement};
use belay_transport::pages::{PageStates, PagesError};
use belay_transport::pull::{Engine, PlanError, ShardParts, ShardRange};
use belay_transport::region::RegionError;
use belay_transport::session::{Control, Listener, RegionGeometry, SessionError};
use belay_transport::uffd::{Uffd, UffdError};
use belay_transport::{Deadline, explain};
use claim::Claiming;
pub use claim::DestinationArbiter;
use crossbeam_channel::{Receiver, Sender};
use prepare::await_source;
pub use ram::{HostRam, Ram, shard_ranges};
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
pub use takeover::{Found, Inherited, take_over};
use warden::Warden;
pub use will::{Will, WillError};

/// What a destination needs to know before any guest comes.
#[derive(Debug, Clone)]
pub struct DestinationConfig {
    /// Where output goes, if elsewhere than the source proposes.
    pub output_to: Option<String>,
    /// Where page states are kept.
    pub state_dir: PathBuf,
    /// Cores of the engine's threads, given out in turn; anywhere without any.
    pub engine_cores: Vec<usize>,
    /// Where this host's threads and buffers go, guest RAM among them. Cores named for the engine's threads go before it.
    pub numa: NumaChoice,
    /// Hold the background pull once this share of frames has landed.
    pub hold_pull_at: Option<f64>,
    /// Where what a tethered guest writes and sends is recorded, if anywhere.
    pub recording: Option<Arc<Recording>>,
    /// Where the faults of a guest that has moved are recorded, if anywhere.
    pub fault_recording: Option<Arc<FaultRecording>>,
    pub bounds: Bounds,
    /// When a checkpoint's pages are copied.
    pub staging: Staging,
    /// Who says whose the guest is once the source is lost, where somebody does.
    pub arbiter: Option<DestinationArbiter>,
}

/// A VMM that has been started with no state, its RAM registered with userfaultfd.
pub struct Built {
    pub guest: Box<dyn Guest>,
    /// A userfaultfd a shard, and the frames it reports faults of. The VMM keeps duplicates for as long as it lives (P1).
    pub shards: Vec<(Uffd, Vec<ShardRange>)>,
    /// The process whose address space the userfaultfds belong to.
    pub pid: u32,
    /// Whether it gives a sign of life of its own.
    pub gives_sign: bool,
    /// By which things are laid down for the page server after this one, where the VMM is a process of its own.
    pub keeper: Option<Keeper>,
}

/// The VMM's, where it is a process of its own.
pub const VMM_SLOT: usize = 1;

/// Builds what the destination cannot know how to build: the VMM, the way out for its output, and the guard's process.
pub trait Host {
    /// Guest RAM that the VMM makes itself, in the order of the proposal's regions; the VMM is started for that. `None`: RAM is
    /// made by the destination. Whatever is in it is thrown away, so that it is all holes to the VMM.
    fn ram(&mut self, spec: &VmmSpec, tethered: bool) -> Result<Option<Vec<HostRam>>, GuestError> {
        let _ = (spec, tethered);
        Ok(None)
    }

    /// Starts a VMM over `ram` for a guest that will be loaded. `tracker` is the one that will be asked for; a VMM in a process
    /// of its own gives its sign of life in [`VMM_SLOT`] of `life`.
    fn build(
        &mut self,
        spec: &VmmSpec,
        ram: &[Ram],
        shards: u16,
        tracker: Option<TrackerKind>,
        sink: Arc<dyn PacketSink>,
        life: Option<&LifePage>,
    ) -> Result<Built, GuestError>;

    /// Goes on with the VMM that a dead page server left, whose RAM is `ram`. What had not left is in `sink` when this returns.
    fn adopt(&mut self, ram: &[Ram], sink: Arc<dyn PacketSink>) -> Result<(Box<dyn Guest>, Keeper), GuestError>;

    /// The way out for output.
    fn output(&mut self, address: Option<&str>) -> std::io::Result<Box<dyn Emitter>>;

    /// Whether [`Host::build`] starts the VMM in a process of its own.
    fn vmm_is_apart(&self) -> bool;

    /// How the guard process is started.
    fn guard_command(&self) -> Result<GuardCommand, GuardError>;
}

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The guest is this host's own and runs.
    Owner,
    /// The guest never ran here.
    Aborted,
    /// The source has the guest.
    Retired,
    /// Stopped, memory kept until now; ended by a signal.
    Fenced,
    /// Neither host can run it.
    Lost,
    /// Ended by a signal before any guest came.
    Interrupted,
}

/// What is left when a destination's role is over.
pub struct Ended {
    pub outcome: Outcome,
    pub why: String,
    /// The guest, where one is left to run or to look at.
    pub guest: Option<Box<dyn Guest>>,
    /// What holds back a guest that waits for a page, for as long as there is one (P1). Declared after it, so dropped after it.
    pub faults: Vec<Uffd>,
    /// Which of its pages are here, where any were pulled.
    pub states: Option<Arc<PageStates>>,
    pub output: Option<Arc<Outbox>>,
    /// Every nonce the guest was given, in order.
    pub nonces: Vec<u64>,
    pub spec: Option<VmmSpec>,
}

/// Why a destination could not take a guest. The guest runs on at the source.
#[derive(Debug, thiserror::Error)]
pub enum DestinationError {
    #[error("no session with a source")]
    Connect(#[source] SessionError),
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error(transparent)]
    Fabric(#[from] FabricError),
    #[error(transparent)]
    Guest(#[from] GuestError),
    #[error(transparent)]
    Region(#[from] RegionError),
    #[error(transparent)]
    Numa(#[from] NumaError),
    #[error(transparent)]
    Uffd(#[from] UffdError),
    #[error(transparent)]
    Pages(#[from] PagesError),
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error(transparent)]
    Map(#[from] SwitchMapError),
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
    #[error(transparent)]
    Guard(#[from] GuardError),
    #[error(transparent)]
    Tethering(#[from] TetheringError),
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    #[error(transparent)]
    Will(#[from] WillError),
    #[error("cannot {doing}")]
    Io {
        doing: &'static str,
        #[source]
        source: std::io::Error,
    },
    #[error("the source said: {0}")]
    PeerFailed(String),
    #[error("the source closed the session: {0}")]
    PeerClosed(String),
    #[error("this host refused: {0}")]
    Refused(String),
    #[error("the source did not say {waiting_for} within {bound:?}")]
    TimedOut { waiting_for: &'static str, bound: Duration },
    #[error("ended by a signal")]
    Interrupted,
    #[error("the operator cancelled the migration")]
    Cancelled,
}

fn io(doing: &'static str) -> impl FnOnce(std::io::Error) -> DestinationError {
    move |source| DestinationError::Io { doing, source }
}

/// What can happen beside messages.
#[derive(Debug)]
pub(super) enum Happening {
    AllLanded,
    PullFailed,
    LaneBroken(String),
    SourceRevoked(String),
    CommitFailed(String),
    VmmGone(String),
    LeaseExpired,
}

/// Waits for a source, takes its guest, and sees the migration to its end. An error means that the guest never ran here.
pub fn run(
    config: &DestinationConfig,
    listener: &Listener,
    host: &mut dyn Host,
    observer: &Observer,
    words: &Words,
) -> Result<Ended, DestinationError> {
    let Some((session, proposal)) = await_source(listener, (config.bounds, config.staging), observer, words)? else {
        return Ok(Ended {
            outcome: Outcome::Interrupted,
            why: "ended by a signal while it waited for a guest".to_owned(),
            guest: None,
            faults: Vec::new(),
            states: None,
            output: None,
            nonces: Vec::new(),
            spec: None,
        });
    };
    let control = Arc::clone(&session.control);
    // Kept until the reason of a failure has been told: dropped, it hangs up.
    let inbox = Arc::new(listen_to::<ToDestination>(Arc::clone(&control)).map_err(io("start the control thread"))?);
    let tell = |error: DestinationError| {
        // What could not be let in may be why: a lane that found no descriptor left, say.
        for rejection in listener.take_rejections() {
            let (state, why) = ("turned-away".to_owned(), explain(&rejection.error));
            observer.note(observer.latest().as_ref(), Kind::State { state, why });
        }
        let reason = explain(&error);
        let state = "aborted".to_owned();
        let because = observer.note(observer.latest().as_ref(), Kind::State { state, why: reason.clone() });
        // The source may be the one that failed; it has nothing to lose by not hearing this.
        let failed = protocol::encode(&ToSource::Failed { reason, because });
        let _ = control.send(&failed, Deadline::after(Duration::from_secs(1)));
        error
    };
    let prepared =
        Destination::prepare((config, listener), session, Arc::clone(&inbox), proposal, host, observer, words);
    let mut destination = prepared.map_err(tell)?;
    // Told while its lanes are still open, so that the source does not take their end for the reason.
    destination.await_switch().map_err(tell)?;
    Ok(destination.run())
}

/// A session's control stream, and the thread that listens to it.
struct Link {
    control: Arc<Control>,
    inbox: Arc<Inbox<ToDestination>>,
}

/// A destination with a guest on its way.
struct Destination<'a> {
    config: &'a DestinationConfig,
    /// Where the source dials again.
    listener: &'a Listener,
    /// How the guard beside a session is started, and what it may do.
    guard: Option<(GuardCommand, Arms)>,
    placement: Placement,
    proposal: Proposal,
    geometry: Vec<RegionGeometry>,
    observer: &'a Observer,
    words: &'a Words,
    pending: Pending,
    /// The session; `None` where this page server took over and the source has not come back.
    link: Option<Link>,
    happenings: Receiver<Happening>,
    happened: Sender<Happening>,
    state: State,
    last: ObservationId,
    /// The tether has it while it takes epochs.
    guest: Option<Box<dyn Guest>>,
    /// The guest's writable disks, whoever has the guest.
    storage: Option<Arc<dyn Storage>>,
    output: Arc<Outbox>,
    warden: Option<Warden>,
    /// By which things are laid down for the next page server, where the VMM is a process of its own.
    keeper: Option<Keeper>,
    ram: Vec<(Ram, LocalKey, ReadKey, u64)>,
    vmm_pid: u32,
    /// A VMM in a process of its own that gives no sign of its death at once: whether it is dying is looked at, until it has been told.
    signless: Option<u32>,
    /// Taken when the engine starts.
    parts: Vec<ShardParts>,
    uffds: Vec<(Uffd, Vec<ShardRange>)>,
    /// Who answers writes to protected pages, where they are tracked that way; outlives an engine.
    write_faults: Option<Arc<WriteFaults>>,
    engine: Option<Arc<Engine>>,
    /// What its frames have come to; outlives an engine.
    states: Option<Arc<PageStates>>,
    /// As the switch sent it: where a page that has not landed comes from.
    map: Vec<RegionClasses>,
    /// Of the tether that was stopped.
    leftover: Option<Leftover>,
    /// The tether was another process's: what it had harvested is not known, so everything that is here counts as dirty.
    inherited: bool,
    /// The dead page server's guard, by its hand-over socket: sent home when there is another.
    old_guard: Option<OwnedFd>,
    /// Under which the guest came here.
    owner_epoch: OwnerEpoch,
    /// Built while preparing, running once the guest does.
    tethering: Option<Tethering>,
    nonces: Vec<u64>,
    resumed_at: Option<Instant>,
    all_landed_at: Option<Instant>,
    release_asked_at: Option<Instant>,
    /// By when the source must have said go, once it was told that everything is loaded.
    go_due: Option<Deadline>,
    /// A signal ends this role: by when the source must have said that it has the guest.
    leaving: Option<Deadline>,
    /// The signal that said that ending here would lose the guest.
    warned: bool,
    claiming: Claiming,
    ticked_at: Instant,
    dialled_at: Instant,
    reported_at: Instant,
    latencies_at: Instant,
    why: String,
    outcome: Option<Outcome>,
}

/// Why a role that a signal ended has ended.
const ENDED_BY_SIGNAL: &str = "ended by a signal";

/// How often what has no channel is looked at.
const TICK: Duration = Duration::from_millis(2);
/// The same once every page has landed, unless the VMM has to be watched for its death.
const IDLE_TICK: Duration = Duration::from_millis(50);

impl Destination<'_> {
    fn run(mut self) -> Ended {
        while self.outcome.is_none() {
            if let Some(event) = self.next_event() {
                self.drive(event);
            }
            self.report();
        }
        self.end()
    }

    fn note(&mut self, kind: Kind) -> ObservationId {
        let id = self.observer.note(Some(&self.last), kind);
        self.last = id.clone();
        id
    }

    fn tell(&self, message: &ToSource) -> Result<(), SessionError> {
        let Some(link) = &self.link else { return Err(SessionError::NoSession) };
        link.control.send(&protocol::encode(message), Deadline::after(self.config.bounds.handshake))
    }

    /// Takes the step that `event` asks for, and those that its actions' answers ask for.
    fn drive(&mut self, event: Event) {
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
                let named = self.named(&event);
                self.note(Kind::State { state: next.name().to_lowercase(), why: named.to_owned() });
                let why = if self.why.is_empty() { named } else { &self.why };
                self.words.board.entered(next.name(), self.owner_epoch().map(|epoch| epoch.0), why);
            }
            for action in actions {
                events.extend(self.carry_out(action));
            }
        }
        if self.outcome.is_none() {
            self.outcome = match self.state {
                State::Owner => Some(Outcome::Owner),
                State::Aborted => Some(Outcome::Aborted),
                State::Retired => Some(Outcome::Retired),
                State::Lost => Some(Outcome::Lost),
                State::Preparing { .. } | State::Tethered { .. } | State::Fenced(_) => None,
            };
        }
        self.settle_orders();
    }

    /// The role is over: what was started is ended, what is left is handed on.
    fn end(mut self) -> Ended {
        self.settle_orders();
        let outcome = self.outcome.take().unwrap_or(Outcome::Aborted);
        if outcome == Outcome::Owner {
            let _ = self.tell(&ToSource::Farewell);
            self.keep_the_record();
        }
        self.stop_tether();
        if let Some(warden) = self.warden.take() {
            warden.stand_down(Deadline::after(Duration::from_millis(200)));
        }
        if let Some(engine) = self.engine.take() {
            self.report_latencies(&engine);
            self.words.board.pull_over(&engine);
            if let Ok(engine) = Arc::try_unwrap(engine).map_err(|_| ()) {
                // Threads that do not end in time end on their own; their lanes are closed by the session's end.
                let _ = engine.stop(Deadline::after(self.config.bounds.stop));
            }
        }
        if outcome == Outcome::Owner {
            // Every frame is in place: the kernel's own fault path does the rest from here on.
            for (uffd, ranges) in &self.uffds {
                for range in ranges {
                    if let Some((ram, _, _, address)) = self.ram.iter().find(|(ram, ..)| ram.id == range.region) {
                        let shift = ram.file.page_size().shift();
                        let (start, frames) =
                            (address + (range.frames.start << shift), range.frames.end - range.frames.start);
                        let _ = uffd.unregister(start, frames << shift);
                    }
                }
            }
        }
        Ended {
            outcome,
            why: self.why,
            guest: self.guest,
            faults: self.uffds.into_iter().map(|(uffd, _)| uffd).collect(),
            states: self.states,
            output: Some(self.output),
            nonces: self.nonces,
            spec: Some(self.proposal.vmm),
        }
    }
}
