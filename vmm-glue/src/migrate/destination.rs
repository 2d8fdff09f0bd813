//! The destination's role: prepare, load, pull and tether; then own the guest, or be fenced from it.
//!
//! Mirror image of [`super::source`]. What may happen is decided by [`ownership::destination`](belay_checkpoint::ownership); this
//! file carries the actions out, turns what happens into events, and keeps every wait bounded.

use super::observation::{Kind, ObservationId, Observer, named_state, us};
use super::peer::{Inbox, Listened, listen_to};
use super::protocol::{self, PROTOCOL_VERSION, ProtocolError, RingOffer, ToDestination, ToSource};
use super::settings::{Bounds, Proposal, ReleasePolicy, VmmSpec};
use super::source::lanes;
use super::switch_map::{PageClass, RegionClasses, SwitchMapError};
use super::tethering::{self, Tethering, TetheringError};
use crate::guard::{Guard, GuardCommand, GuardError, LifePage, Secrets, SignOfLife};
use belay_checkpoint::guest::{Guest, GuestError, PacketSink, TrackerKind};
use belay_checkpoint::outbox::{Emitter, Outbox};
use belay_checkpoint::ownership::Fate;
use belay_checkpoint::ownership::destination::{Action, Event, State, step};
use belay_transport::fabric::{self, FabricError, LaneId, LaneKind, LocalKey, ReadKey, RingKeys};
use belay_transport::pages::{PageStates, PagesError, RegionGeometry as Frames};
use belay_transport::pull::{
    self, ClassRun, Engine, Install, LandingPlan, PlanError, PullPlan, RegionPlan, ShardParts, ShardRange, Tuning,
};
use belay_transport::region::{Mapping, RamFile, RegionError};
use belay_transport::session::{Control, DestinationSession, Incoming, Listener, RegionGeometry, SessionError};
use belay_transport::uffd::{Uffd, UffdError};
use belay_transport::{Deadline, PageSize, RegionId};
use crossbeam_channel::{Receiver, Sender, bounded, select};
use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What a destination needs to know before any guest comes.
#[derive(Debug, Clone)]
pub struct DestinationConfig {
    /// Where output goes, if elsewhere than the source proposes.
    pub output_to: Option<String>,
    /// Where page states are kept.
    pub state_dir: PathBuf,
    /// Cores of the engine's threads, given out in turn; anywhere without any.
    pub engine_cores: Vec<usize>,
    /// Hold the background pull once this share of frames has landed.
    pub hold_pull_at: Option<f64>,
    pub bounds: Bounds,
}

/// One region of guest RAM on this host, allocated.
#[derive(Debug, Clone)]
pub struct Ram {
    pub id: RegionId,
    pub file: Arc<RamFile>,
    /// Where pages land: a mapping the vCPUs do not use.
    pub alias: Arc<Mapping>,
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
}

/// The page server's slot in the page of signs of life.
const SERVER_SLOT: usize = 0;
/// The VMM's, where it is a process of its own.
pub const VMM_SLOT: usize = 1;

/// The guard beside this process, and what it watches.
struct Warden {
    guard: Guard,
    page: Arc<LifePage>,
    life: SignOfLife,
    secrets: Secrets,
}

impl Warden {
    /// Starts the guard. Before guest RAM is mapped, so that starting a process costs nothing.
    fn start(command: &GuardCommand, connection: OwnedFd, deadline: Deadline) -> Result<Self, GuardError> {
        let page = Arc::new(LifePage::new(2)?);
        let secrets = Secrets::random()?;
        let mut guard = Guard::spawn(command, &page, &secrets, &[connection.as_fd()])?;
        let life = SignOfLife::hold(Arc::clone(&page), SERVER_SLOT)?;
        guard.watch(SERVER_SLOT, deadline)?;
        Ok(Self { guard, page, life, secrets })
    }

    /// An orderly end: the guard goes without a word.
    fn stand_down(mut self, deadline: Deadline) {
        self.life.stand_down();
        // A guard that watches a VMM too ends when that has ended; it holds nothing but itself.
        let _ = self.guard.wait(deadline);
    }
}

/// Builds what the destination cannot know how to build: the VMM, the way out for its output, and the guard's process.
pub trait Host {
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

    /// The way out for output.
    fn output(&mut self, address: Option<&str>) -> std::io::Result<Box<dyn Emitter>>;

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
    words: &Receiver<i32>,
) -> Result<Ended, DestinationError> {
    let Some((session, proposal)) = await_source(listener, config.bounds, observer, words)? else {
        return Ok(Ended {
            outcome: Outcome::Interrupted,
            why: "ended by a signal while it waited for a guest".to_owned(),
            guest: None,
            faults: Vec::new(),
            output: None,
            nonces: Vec::new(),
            spec: None,
        });
    };
    let control = Arc::clone(&session.control);
    // Kept until the reason of a failure has been told: dropped, it hangs up.
    let inbox = Arc::new(listen_to::<ToDestination>(Arc::clone(&control)).map_err(io("start the control thread"))?);
    let tell = |error: DestinationError| {
        let reason = protocol::explain(&error);
        let state = "aborted".to_owned();
        let because = observer.note(observer.latest().as_ref(), Kind::State { state, why: reason.clone() });
        // The source may be the one that failed; it has nothing to lose by not hearing this.
        let failed = protocol::encode(&ToSource::Failed { reason, because });
        let _ = control.send(&failed, Deadline::after(Duration::from_secs(1)));
        error
    };
    let prepared = Destination::prepare(config, session, Arc::clone(&inbox), proposal, host, observer, words);
    let mut destination = prepared.map_err(tell)?;
    // Told while its lanes are still open, so that the source does not take their end for the reason.
    destination.await_switch().map_err(tell)?;
    Ok(destination.run())
}

/// Waits for a source that may come in, and says whom it turned away. Nobody who only knows the address can end the wait.
fn await_source(
    listener: &Listener,
    bounds: Bounds,
    observer: &Observer,
    words: &Receiver<i32>,
) -> Result<Option<(DestinationSession, Proposal)>, DestinationError> {
    let turned_away = |why: String| observer.note(None, Kind::State { state: "turned-away".to_owned(), why });
    loop {
        if words.try_recv().is_ok() {
            return Ok(None);
        }
        let incoming = listener.accept(Deadline::after(Duration::from_millis(200)));
        for rejection in listener.take_rejections() {
            turned_away(protocol::explain(&rejection.error));
        }
        match incoming {
            Ok(incoming) => match agree(incoming, bounds) {
                Ok(agreed) => return Ok(Some(agreed)),
                Err(error) => drop(turned_away(protocol::explain(&error))),
            },
            Err(SessionError::TimedOut { .. }) => {}
            Err(error) => return Err(DestinationError::Connect(error)),
        }
    }
}

/// Largest guest this version takes: a limit on what a peer can make this host allocate by a word.
const MOST_RAM: u64 = 1 << 40;

fn agree(incoming: Incoming, bounds: Bounds) -> Result<(DestinationSession, Proposal), DestinationError> {
    let deadline = Deadline::after(bounds.handshake);
    let hello = incoming.hello();
    let ram: u64 = hello.geometry.iter().map(|region| region.bytes).fold(0, u64::saturating_add);
    let refusal = match protocol::decode::<Proposal>(&hello.blob) {
        Err(error) => Some(protocol::explain(&error)),
        Ok(proposal) if proposal.protocol != PROTOCOL_VERSION => {
            Some(format!("migration protocol {} is proposed, {PROTOCOL_VERSION} is spoken here", proposal.protocol))
        }
        Ok(_) if ram == 0 || ram > MOST_RAM => Some(format!("a guest of {ram} bytes of RAM")),
        Ok(_) if available().is_some_and(|available| ram > available) => {
            Some(format!("a guest of {ram} bytes of RAM; {} are available here", available().unwrap_or(0)))
        }
        Ok(proposal) if proposal.check().is_err() => proposal.check().err(),
        Ok(proposal) => {
            let session = incoming.accept(&[], deadline)?;
            return Ok((session, proposal));
        }
    };
    let reason = refusal.unwrap_or_default();
    incoming.refuse(&reason, deadline)?;
    Err(DestinationError::Refused(reason))
}

/// Bytes that could be allocated without swapping, if this host says: more than that asked for by a word must not end in the
/// kernel's choosing a victim.
fn available() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let kib = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    kib.trim().trim_end_matches("kB").trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// A destination with a guest on its way.
struct Destination<'a> {
    config: &'a DestinationConfig,
    proposal: Proposal,
    observer: &'a Observer,
    words: &'a Receiver<i32>,
    control: Arc<Control>,
    inbox: Arc<Inbox<ToDestination>>,
    happenings: Receiver<Happening>,
    happened: Sender<Happening>,
    state: State,
    last: ObservationId,
    /// The tether has it while it takes epochs.
    guest: Option<Box<dyn Guest>>,
    output: Arc<Outbox>,
    warden: Option<Warden>,
    ram: Vec<(Ram, LocalKey, ReadKey, u64)>,
    vmm_pid: u32,
    /// Taken when the engine starts.
    parts: Vec<ShardParts>,
    uffds: Vec<(Uffd, Vec<ShardRange>)>,
    engine: Option<Arc<Engine>>,
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
    ticked_at: Instant,
    reported_at: Instant,
    latencies_at: Instant,
    why: String,
    outcome: Option<Outcome>,
}

impl<'a> Destination<'a> {
    /// Everything before the downtime: RAM, VMM, userfaultfd, lanes, guard.
    fn prepare(
        config: &'a DestinationConfig,
        session: DestinationSession,
        inbox: Arc<Inbox<ToDestination>>,
        proposal: Proposal,
        host: &mut dyn Host,
        observer: &'a Observer,
        words: &'a Receiver<i32>,
    ) -> Result<Self, DestinationError> {
        let bounds = config.bounds;
        observer.note(
            None,
            Kind::Connected {
                peer: "the source".to_owned(),
                fabric: format!("{:?}", session.agreed.fabric).to_lowercase(),
                tls: session.lanes.is_encrypted(),
                protocol: session.agreed.protocol,
            },
        );
        let control = Arc::clone(&session.control);
        let (keys, ring, offer, mut last) = await_prepare(&inbox, bounds.handshake, words)?;
        let begun = Instant::now();
        let deadline = Deadline::after(bounds.prepare);
        let mut warden = match proposal.tether {
            Some(_) => Some(Warden::start(&host.guard_command()?, session.lanes.take_guard(deadline)?, deadline)?),
            None => None,
        };
        let ram = allocate(&session.hello.geometry, observer, &last)?;
        let mut initiator = fabric::initiator(&session);
        let tracker = proposal.tether.as_ref().map(|tether| tether.tracker);
        let mut landing = Vec::new();
        for ram in &ram {
            landing.push(initiator.register_local(&ram.alias)?);
        }
        let reserved = match &proposal.tether {
            Some(tether) => Some(tethering::reserve(&mut *initiator, tether, ring, offer)?),
            None => None,
        };
        let mut open = |id: LaneId, window| initiator.open_lane(id, window, deadline);
        let mut lane_pairs = Vec::new();
        let mut checkpoint_lanes = Vec::new();
        for id in lanes(&proposal) {
            let lane = open(id, LANE_WINDOW)?;
            match id.kind {
                LaneKind::Fault => lane_pairs.push((lane, None)),
                LaneKind::Bulk => {
                    lane_pairs.last_mut().expect("a fault lane comes before its bulk lane").1 = Some(lane)
                }
                LaneKind::Checkpoint => checkpoint_lanes.push(lane),
            }
        }
        let (happened, happenings) = bounded(64);
        let tethering = match (reserved, <[_; 2]>::try_from(checkpoint_lanes)) {
            (Some(reserved), Ok(lanes)) => Some(reserved.open(lanes, TETHER_STOP, happened.clone(), deadline)?),
            _ => None,
        };
        let address = config.output_to.as_deref().or(proposal.output_to.as_deref());
        let emitter = host.output(address).map_err(io("reach the observer of the guest's output"))?;
        let output = tethering::outbox(tethering.as_ref(), emitter).map_err(io("start the outbox"))?;
        // Shut until ownership says otherwise: a destination that is not tethered yet shows nothing.
        output.shut();
        let output = Arc::new(output);
        let life = warden.as_ref().map(|warden| Arc::clone(&warden.page));
        let built = host.build(&proposal.vmm, &ram, proposal.shards, tracker, output.sink(), life.as_deref())?;
        if built.pid != std::process::id() {
            observer.note(Some(&last), Kind::VmmStarted { pid: built.pid });
        }
        let regions = built.guest.memory().iter().map(|block| block.vmm_address).collect::<Vec<_>>();
        let ram = ram
            .into_iter()
            .zip(landing)
            .zip(regions)
            .map(|((ram, local), address)| {
                let remote = keys.iter().find(|(id, _)| *id == ram.id).map(|&(_, key)| key);
                let remote = remote.ok_or_else(|| DestinationError::Refused(format!("no key for {}", ram.id)))?;
                Ok((ram, local, remote, address))
            })
            .collect::<Result<Vec<_>, DestinationError>>()?;
        if let (Some(warden), true) = (&mut warden, built.gives_sign) {
            warden.guard.watch(VMM_SLOT, deadline)?;
        }
        let cores = config.engine_cores.iter().copied().cycle();
        let cores = cores.map(Some).chain(std::iter::repeat(None));
        let parts = lane_pairs.into_iter().zip(&built.shards).zip(cores);
        let parts = parts
            .map(|(((fault, bulk), (uffd, ranges)), core)| {
                let bulk = bulk.expect("lanes come in pairs");
                Ok(ShardParts { uffd: uffd.try_clone()?, fault, bulk, ranges: ranges.clone(), core })
            })
            .collect::<Result<Vec<_>, UffdError>>()?;
        last = observer.note(Some(&last), Kind::Prepared { took_us: us(begun.elapsed()) });
        let secrets = warden.as_ref().map(|warden| warden.secrets.clone());
        let prepared = ToSource::Prepared { secrets, because: last.clone() };
        control.send(&protocol::encode(&prepared), Deadline::after(bounds.handshake))?;
        Ok(Self {
            config,
            nonces: proposal.nonces.clone(),
            proposal,
            observer,
            words,
            control,
            inbox,
            happenings,
            happened,
            state: State::new(),
            last,
            guest: Some(built.guest),
            output,
            warden,
            ram,
            vmm_pid: built.pid,
            parts,
            uffds: built.shards,
            engine: None,
            tethering,
            resumed_at: None,
            all_landed_at: None,
            release_asked_at: None,
            go_due: None,
            leaving: None,
            warned: false,
            ticked_at: Instant::now(),
            reported_at: Instant::now(),
            latencies_at: Instant::now(),
            why: String::new(),
            outcome: None,
        })
    }
}

/// Operations outstanding on one lane. Generous for reads of whole chunks, and small against what a socket buffers.
const LANE_WINDOW: usize = 64;
/// Longest that one stop for a checkpoint may take; a vCPU that waits for a page makes it try again.
const TETHER_STOP: Duration = Duration::from_millis(500);
/// Threads that allocate RAM.
const ALLOCATORS: usize = 2;
/// Bytes between two reports of how far it is.
const ALLOCATION_REPORT: u64 = 64 << 20;
/// Why a role that a signal ended has ended.
const ENDED_BY_SIGNAL: &str = "ended by a signal";
/// How often what has no channel is looked at.
const TICK: Duration = Duration::from_millis(2);
/// How often the pull is reported while it goes on, and after.
const PULL_REPORT: Duration = Duration::from_millis(4);
const IDLE_REPORT: Duration = Duration::from_millis(100);
/// How often fault latencies are reported.
const LATENCY_REPORT: Duration = Duration::from_millis(50);
/// A release that was refused is asked for again after this.
const RELEASE_AGAIN: Duration = Duration::from_secs(1);

type Prepare = (Vec<(RegionId, ReadKey)>, RingKeys, RingOffer, ObservationId);

fn await_prepare(
    inbox: &Inbox<ToDestination>,
    bound: Duration,
    words: &Receiver<i32>,
) -> Result<Prepare, DestinationError> {
    select! {
        recv(inbox.messages()) -> heard => match heard {
            Ok(Listened::Message(ToDestination::Prepare { ram, ring, ring_geometry, because })) => {
                Ok((ram, ring, ring_geometry, because))
            }
            Ok(Listened::Message(ToDestination::Failed { reason, .. })) => Err(DestinationError::PeerFailed(reason)),
            Ok(Listened::Message(other)) => {
                Err(ProtocolError::Unexpected { got: format!("{other:?}"), wanted: "Prepare" }.into())
            }
            Ok(Listened::Closed(why)) => Err(DestinationError::PeerClosed(why)),
            Err(_) => Err(DestinationError::PeerClosed("the control thread ended".to_owned())),
        },
        recv(words) -> _ => Err(DestinationError::Interrupted),
        default(bound) => Err(DestinationError::TimedOut { waiting_for: "Prepare", bound }),
    }
}

/// Allocates all of guest RAM, so that no frame is a hole when it is registered (P1).
fn allocate(
    geometry: &[RegionGeometry],
    observer: &Observer,
    because: &ObservationId,
) -> Result<Vec<Ram>, DestinationError> {
    let begun = Instant::now();
    let mut ram = Vec::new();
    for region in geometry {
        let bytes = region.bytes as usize;
        let file = Arc::new(RamFile::memfd("belay-guest-ram", bytes, region.page_size)?);
        let alias = Arc::new(file.map().map_err(io("map guest RAM"))?);
        let told = AtomicU64::new(0);
        let progress = |done_bytes: u64| {
            // Told now and then; which of several threads tells does not matter.
            if done_bytes >= told.load(Ordering::Relaxed) + ALLOCATION_REPORT {
                told.store(done_bytes, Ordering::Relaxed);
                observer.note(Some(because), Kind::Allocating { done_bytes, total_bytes: region.bytes });
            }
        };
        file.preallocate_through(&alias, ALLOCATORS, &progress)?;
        ram.push(Ram { id: region.id, file, alias });
    }
    let bytes = geometry.iter().map(|region| region.bytes).sum();
    observer.note(Some(because), Kind::Allocated { bytes, took_us: us(begun.elapsed()) });
    Ok(ram)
}

/// Splits every region's frames among the shards, each part a multiple of 2 MiB where there is enough, so that no huge frame and
/// no background chunk is split.
pub fn shard_ranges(ram: &[Ram], shards: u16) -> Vec<Vec<ShardRange>> {
    let mut parts = vec![Vec::new(); usize::from(shards)];
    for region in ram {
        let frames = region.file.len() as u64 >> region.file.page_size().shift();
        let grain = if region.file.page_size() == PageSize::Small { 512 } else { 1 };
        let share = frames.div_ceil(u64::from(shards)).next_multiple_of(grain);
        for (index, part) in parts.iter_mut().enumerate() {
            let (start, end) = ((index as u64 * share).min(frames), ((index as u64 + 1) * share).min(frames));
            if start < end {
                part.push(ShardRange { region: region.id, frames: start..end });
            }
        }
    }
    parts
}

/// Hears of the engine's end on its own threads.
struct EngineEars(Sender<Happening>);

impl pull::Observer for EngineEars {
    fn all_landed(&self) {
        let _ = self.0.try_send(Happening::AllLanded);
    }

    fn failed(&self, _failure: &pull::PullFailure) {
        let _ = self.0.try_send(Happening::PullFailed);
    }
}

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
        self.control.send(&protocol::encode(message), Deadline::after(self.config.bounds.handshake))
    }

    // ---- the switch ----------------------------------------------------------------------------------------------------------

    /// Waits for the switch, as long as the source likes: the guest runs there. Then loads, with faults served already.
    fn await_switch(&mut self) -> Result<(), DestinationError> {
        let messages = self.inbox.messages().clone();
        let (map, device_state, nonce, because) = select! {
            recv(messages) -> heard => match heard {
                Ok(Listened::Message(ToDestination::Switch { map, device_state, nonce, because })) => {
                    (map, device_state, nonce, because)
                }
                Ok(Listened::Message(ToDestination::Failed { reason, .. })) => return Err(DestinationError::PeerFailed(reason)),
                Ok(Listened::Message(other)) => {
                    return Err(ProtocolError::Unexpected { got: format!("{other:?}"), wanted: "Switch" }.into());
                }
                Ok(Listened::Closed(why)) => return Err(DestinationError::PeerClosed(why)),
                Err(_) => return Err(DestinationError::PeerClosed("the control thread ended".to_owned())),
            },
            recv(self.words) -> _ => return Err(DestinationError::Interrupted),
        };
        self.last = because;
        let begun = Instant::now();
        let engine = Arc::new(self.start_engine(&map)?);
        self.engine = Some(Arc::clone(&engine));
        let guest = self.guest.as_mut().expect("the tether has not been started");
        // Tracked from before the load: what loading writes (a clock page, say) is in the first epoch, the source does not have it.
        if let Some(tethering) = &mut self.tethering {
            tethering.arm(guest.as_mut(), engine, self.vmm_pid)?;
        }
        guest.load(&device_state)?;
        guest.set_incarnation(nonce)?;
        self.nonces.push(nonce);
        let because = self.note(Kind::Loaded { took_us: us(begun.elapsed()) });
        self.tell(&ToSource::Loaded { because })?;
        self.go_due = Some(Deadline::after(self.config.bounds.switch));
        Ok(())
    }

    fn start_engine(&mut self, map: &[RegionClasses]) -> Result<Engine, DestinationError> {
        let mut regions = Vec::new();
        let mut frames = Vec::new();
        for (ram, local, remote, vmm_address) in &self.ram {
            let page_size = ram.file.page_size();
            let count = ram.file.len() as u64 >> page_size.shift();
            let classes = map.iter().find(|classes| classes.id == ram.id);
            let classes =
                classes.ok_or_else(|| DestinationError::Refused(format!("the switch map lacks {}", ram.id)))?;
            let classes = classes.decode(count)?.into_iter().map(|(class, frames)| ClassRun {
                class: match class {
                    PageClass::Peer => pull::PageClass::Peer,
                    PageClass::Zero => pull::PageClass::Zero,
                },
                frames,
            });
            frames.push(Frames { id: ram.id, page_size, frames: count });
            regions.push(RegionPlan {
                id: ram.id,
                page_size,
                vmm_address: *vmm_address,
                bytes: ram.file.len() as u64,
                landing: LandingPlan::InPlace { alias: Arc::clone(&ram.alias), key: *local },
                remote: *remote,
                classes: classes.collect(),
            });
        }
        let tracked = self.proposal.tether.as_ref().is_some_and(|tether| tether.tracker == TrackerKind::UffdWp);
        let install = if tracked { Install::Tracked } else { Install::Clean };
        let total: u64 = frames.iter().map(|region| region.frames).sum();
        let hold_at_landed = self.config.hold_pull_at.map(|share| (share * total as f64) as u64);
        let tuning = Tuning { demand_timeout: self.config.bounds.demand, hold_at_landed, ..Tuning::default() };
        let states = Arc::new(PageStates::in_memory(&frames)?);
        let ears = Arc::new(EngineEars(self.happened.clone()));
        let parts = std::mem::take(&mut self.parts);
        Ok(Engine::start(PullPlan { regions, install, tuning, start_paused: true }, parts, states, ears)?)
    }

    // ---- what happens --------------------------------------------------------------------------------------------------------

    /// Waits at most a tick for something to happen.
    fn next_event(&mut self) -> Option<Event> {
        // A peer that never stops talking must not keep this host from looking at its lease.
        if self.ticked_at.elapsed() > TICK
            && let Some(event) = self.tick()
        {
            return Some(event);
        }
        let messages = self.inbox.messages().clone();
        select! {
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
                    std::thread::park_timeout(TICK);
                    self.tick()
                }
            },
            recv(self.words) -> _ => self.interrupted(),
            default(TICK) => self.tick(),
        }
    }

    fn happening(&mut self, happening: Happening) -> Option<Event> {
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
                self.why = failure.map_or("the pull failed".to_owned(), |failure| protocol::explain(&*failure));
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

    fn message(&mut self, message: ToDestination) -> Option<Event> {
        match message {
            ToDestination::Go { owner_epoch, because } => {
                self.go_due = None;
                self.last = because;
                Some(Event::HandedOver { owner_epoch })
            }
            ToDestination::Released { because } => {
                self.last = because;
                Some(Event::ReleaseAcknowledged)
            }
            ToDestination::ReleaseRefused { because } => {
                self.last = because;
                Some(Event::ReleaseRefused)
            }
            ToDestination::Fate { fate, because } => {
                self.last = because;
                self.why = format!("the source says: {fate:?}");
                Some(if fate == Fate::Revoked { Event::SourceRevoked } else { Event::FateAnswered(fate) })
            }
            ToDestination::Failed { reason, because } => {
                self.last = because;
                self.why = format!("the source failed: {reason}");
                Some(match self.state {
                    State::Preparing { .. } => Event::PrepareFailed,
                    _ => Event::ConnectionClosed,
                })
            }
            ToDestination::Prepare { .. } | ToDestination::Switch { .. } => {
                self.why = "the source broke the protocol: prepared or switched twice".to_owned();
                Some(Event::ConnectionClosed)
            }
        }
    }

    /// A signal. A tethered guest is given back: it is stopped here for good, and the source told so, which then catches it.
    fn interrupted(&mut self) -> Option<Event> {
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
            State::Fenced(_) => {
                self.outcome = Some(Outcome::Fenced);
                None
            }
            _ => None,
        }
    }

    /// What has no channel of its own.
    fn tick(&mut self) -> Option<Event> {
        self.ticked_at = Instant::now();
        if self.leaving.is_some_and(|due| due.expired()) {
            self.outcome = Some(Outcome::Fenced);
            return None;
        }
        if self.go_due.take_if(|due| due.expired()).is_some() && matches!(self.state, State::Preparing { .. }) {
            self.why = format!("the source has not said go within {:?}", self.config.bounds.switch);
            return Some(Event::PrepareFailed);
        }
        if let (State::Tethered { .. }, Some(tethering)) = (&self.state, &self.tethering) {
            if let Some(failure) = tethering.heart_failure() {
                return self.happening(failure);
            }
            if tethering.lease_has_ended() {
                return self.happening(Happening::LeaseExpired);
            }
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

    /// Tells how far the pull is.
    fn report(&mut self) {
        let Some(engine) = self.engine.clone() else { return };
        let progress = engine.progress();
        let every = if self.all_landed_at.is_none() { PULL_REPORT } else { IDLE_REPORT };
        if self.reported_at.elapsed() >= every && self.resumed_at.is_some() {
            self.reported_at = Instant::now();
            let facts = self.output.facts();
            self.observer.note(
                Some(&self.last),
                Kind::Pull {
                    landed_frames: progress.frames - progress.absent - progress.in_flight,
                    absent_frames: progress.absent + progress.in_flight,
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

    fn report_latencies(&self, engine: &Engine) {
        let latencies = engine.latencies();
        let stages = [
            ("queue", &latencies.queue),
            ("wire", &latencies.wire),
            ("install", &latencies.install),
            ("total", &latencies.total),
        ];
        for (what, histogram) in stages {
            if let Some(kind) = super::observation::latency(what, histogram) {
                self.observer.note(Some(&self.last), kind);
            }
        }
    }

    // ---- what is done --------------------------------------------------------------------------------------------------------

    /// Takes the step that `event` asks for, and those that its actions' answers ask for.
    fn drive(&mut self, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let (next, actions) = match step(&self.state, &event) {
                Ok(step) => step,
                // A peer that breaks the protocol changes nothing; the state stands.
                Err(illegal) => {
                    self.note(Kind::State { state: self.state.name().to_lowercase(), why: illegal.to_string() });
                    continue;
                }
            };
            let entered = next.name() != self.state.name();
            self.state = next;
            if entered {
                self.note(Kind::State { state: next.name().to_lowercase(), why: event.name().to_owned() });
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
    }

    /// Does one thing; what came of it, if that is an event.
    fn carry_out(&mut self, action: Action) -> Option<Event> {
        match action {
            Action::ResumeGuest => self.resume_guest(),
            Action::SendResumed => self.send(&ToSource::Resumed { because: self.last.clone() }),
            Action::SendSwitchFailed => {
                let _ = self.tell(&ToSource::Failed { reason: self.why.clone(), because: self.last.clone() });
                None
            }
            Action::StartTether { .. } => {
                let Some(tethering) = &mut self.tethering else {
                    // Without one by agreement there is nothing to start; one that was stopped cannot start again over this session.
                    return self.proposal.tether.is_some().then_some(Event::CommitFailed);
                };
                let guest = self.guest.take()?;
                let (output, observer) = (Arc::clone(&self.output), self.observer.clone());
                match tethering.start(guest, output, observer, self.last.clone()) {
                    Ok(()) => None,
                    Err(error) => {
                        self.why = protocol::explain(&error);
                        Some(Event::CommitFailed)
                    }
                }
            }
            Action::StopTether => {
                self.stop_tether();
                None
            }
            Action::ShutGate => {
                self.output.shut();
                None
            }
            Action::OpenGate => {
                match self.proposal.tether {
                    Some(_) => self.output.reopen(),
                    // Nothing can catch this guest, so nothing is held for it.
                    None => self.output.open_for_good(),
                }
                None
            }
            Action::OpenGateForGood => {
                self.output.open_for_good();
                None
            }
            Action::StopGuest => Some(match self.stop_guest() {
                true => Event::GuestStopped,
                false => Event::StopTimedOut,
            }),
            // Guest RAM lives as long as this process does.
            Action::KeepMemory => None,
            Action::AskFate { .. } => {
                // A tether is made once a session, so over this one there is no way back to Tethered, and the answer that there is must
                // not be asked for. The source is told instead, so that it need not wait for silence; what it does with the guest
                // comes as its fate. With the control stream gone nobody answers, and the guest stays fenced.
                let _ = self.tell(&ToSource::Failed { reason: self.why.clone(), because: self.last.clone() });
                None
            }
            Action::SendGuestGone => {
                // Where the stopped tether was noticed sooner the source has hung up; its last words, if any, are still to be read.
                let _ = self.tell(&ToSource::GuestGone { because: self.last.clone() });
                if self.why == ENDED_BY_SIGNAL {
                    self.leaving = Some(Deadline::after(self.config.bounds.handshake));
                }
                None
            }
            Action::AskRelease => {
                let because =
                    self.note(Kind::State { state: "release-asked".to_owned(), why: "every page is here".to_owned() });
                self.send(&ToSource::ReleaseAsked { all_landed: true, because })
            }
            Action::DiscardGuest => {
                self.stop_guest();
                None
            }
            Action::Report(named) => {
                self.note(Kind::State { state: named_state(named), why: named.to_string() });
                None
            }
        }
    }

    fn send(&mut self, message: &ToSource) -> Option<Event> {
        match self.tell(message) {
            Ok(()) => None,
            Err(error) => {
                self.why = protocol::explain(&error);
                Some(Event::ConnectionClosed)
            }
        }
    }

    fn resume_guest(&mut self) -> Option<Event> {
        let Some(guest) = &mut self.guest else { return None };
        match guest.resume() {
            Ok(()) => {
                let nonce = self.nonces.last().copied().unwrap_or(0);
                if self.resumed_at.is_none() {
                    self.resumed_at = Some(Instant::now());
                }
                if let Some(engine) = &self.engine {
                    engine.resume_background();
                }
                self.note(Kind::Resumed { nonce });
                Some(Event::GuestResumed)
            }
            Err(error) => {
                self.why = protocol::explain(&error);
                Some(Event::PrepareFailed)
            }
        }
    }

    /// Whether the guest stands still.
    fn stop_guest(&mut self) -> bool {
        let Some(guest) = &mut self.guest else { return false };
        match guest.pause(Deadline::after(self.config.bounds.stop)) {
            Ok(()) => true,
            Err(error) => {
                self.note(Kind::Failed {
                    what: protocol::explain(&error),
                    advice: "Its output is shut; it waits for a page that will not come.".to_owned(),
                });
                false
            }
        }
    }

    fn stop_tether(&mut self) {
        let Some(tethering) = self.tethering.take() else { return };
        let (end, summary) = tethering.stop();
        if let Some(summary) = summary {
            self.note(summary);
        }
        if let Some(end) = end {
            self.guest = Some(end.guest);
        }
    }

    /// The role is over: what was started is ended, what is left is handed on.
    fn end(mut self) -> Ended {
        let outcome = self.outcome.take().unwrap_or(Outcome::Aborted);
        if outcome == Outcome::Owner {
            let _ = self.tell(&ToSource::Farewell);
        }
        self.stop_tether();
        if let Some(warden) = self.warden.take() {
            warden.stand_down(Deadline::after(Duration::from_millis(200)));
        }
        if let Some(engine) = self.engine.take() {
            self.report_latencies(&engine);
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
            output: Some(self.output),
            nonces: self.nonces,
            spec: Some(self.proposal.vmm),
        }
    }
}
