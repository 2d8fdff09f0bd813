//! The source's role: prepare, switch, serve; then release, or catch the guest.
//!
//! Mirror image of [`super::destination`]. What may happen is decided by [`ownership::source`]; this file carries the actions
//! out, turns what happens into events, and keeps every wait bounded.

use super::lane_watch::LaneWatch;
use super::lease::{Silence, boot_time};
use super::observation::{Kind, ObservationId, Observer, named_state, us};
use super::peer::{Inbox, Listened, listen_to};
use super::protocol::{self, ProtocolError, RingOffer, ToDestination, ToSource};
use super::release::{ReleaseError, ReleaseRecord};
use super::settings::{Bounds, Proposal};
use super::switch_map::{PageClass, RegionClasses};
use crate::guard::{DeathWatch, GuardError, Notice, Secrets};
use belay_checkpoint::fold::{Catch, CatchError, FoldConfig, FoldState, FoldTarget, Folder, Recovered};
use belay_checkpoint::guest::{Epoch, Guest, GuestError};
use belay_checkpoint::outbox::{Outbox, OutputMode};
use belay_checkpoint::ownership::source::{Action, Event, State, step};
use belay_checkpoint::ownership::{Fate, Illegal, Named};
use belay_checkpoint::record::Limits;
use belay_checkpoint::ring::{OWNER_REGION_BYTES, OwnerRegion, RingError, RingReader};
use belay_transport::fabric::{self, FabricError, LaneId, LaneKind, Owner, ReadKey};
use belay_transport::region::{Mapping, RamFile, RegionError};
use belay_transport::session::{self, Address, Control, Offer, RegionGeometry, SessionConfig, SessionError};
use belay_transport::{Deadline, PAGE_SIZE, PageSize, RegionId};
use crossbeam_channel::{Receiver, Sender, bounded, select};
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
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
    #[error("the operator cancelled")]
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
    owner: Box<dyn Owner>,
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
    words: &'a Receiver<i32>,
    state: State,
    live: Live,
    last: ObservationId,
    paused_at: Instant,
    noticed_at: Option<Instant>,
    switch_due: Option<Deadline>,
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

/// Moves the guest and sees the migration to its end. A word (the number of a signal) takes the guest back. `output` is where the running guest's output goes through. An error means
/// that the guest was not touched and runs on; whatever happens after the switch has begun is an [`Outcome`].
pub fn run(
    config: &SourceConfig,
    guest: &mut dyn Guest,
    output: &Outbox,
    steps: &dyn Fn() -> Vec<u64>,
    observer: &Observer,
    words: &Receiver<i32>,
) -> Result<Outcome, SourceError> {
    let (live, last) = prepare(config, guest, observer, words)?;
    let source = Source {
        config,
        guest,
        output,
        steps,
        observer,
        words,
        state: State::new(),
        live,
        last,
        paused_at: Instant::now(),
        noticed_at: None,
        switch_due: None,
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

/// Everything before the downtime: session, regions, ring, lanes, guard.
fn prepare(
    config: &SourceConfig,
    guest: &mut dyn Guest,
    observer: &Observer,
    words: &Receiver<i32>,
) -> Result<(Live, ObservationId), SourceError> {
    let bounds = config.bounds;
    config.proposal.check().map_err(SourceError::Proposal)?;
    let geometry = guest.memory().iter().map(|block| RegionGeometry {
        id: block.id,
        bytes: block.file.len() as u64,
        page_size: block.page_size,
    });
    let offer = Offer { geometry: geometry.collect(), blob: protocol::encode(&config.proposal) };
    let session = session::connect(&config.address, config.session.clone(), &offer, Deadline::after(bounds.handshake))
        .map_err(|source| SourceError::Connect { address: config.address.to_string(), source })?;
    let connected = observer.note(
        None,
        Kind::Connected {
            peer: config.address.to_string(),
            fabric: format!("{:?}", session.agreed.fabric).to_lowercase(),
            tls: session.lanes.is_encrypted(),
            protocol: session.agreed.protocol,
        },
    );
    let begun = Instant::now();
    let control = Arc::clone(&session.control);
    let mut owner = fabric::owner(&session)?;
    // Occupancy first: whatever maps or registers RAM may fill its holes.
    let mut ram = Vec::new();
    for block in guest.memory() {
        let extents = block.file.occupancy()?;
        ram.push((block.id, owner.export_read(&block.file, &block.alias, &extents)?));
    }
    let ring_file = RamFile::memfd("belay-ring", config.ring_bytes, PageSize::Small)?;
    ring_file.preallocate(1, &|_| {})?;
    let owner_file = RamFile::memfd("belay-owner", OWNER_REGION_BYTES, PageSize::Small)?;
    let (ring, owner_region) =
        (ring_file.map().map_err(io("map the ring"))?, owner_file.map().map_err(io("map the owner region"))?);
    let (ring, owner_region) = (Arc::new(ring), Arc::new(owner_region));
    OwnerRegion::new(Arc::clone(&owner_region));
    let keys = owner.export_ring((&ring_file, &ring), (&owner_file, &owner_region))?;
    let nonce = fresh_nonce()?;
    // Reserved now, so that missing memory is found before the guest leaves and nothing of it is downtime.
    let reserved = match config.proposal.tether {
        Some(_) => {
            let reader = RingReader::new(ring.len(), nonce, config.overflow_bytes as usize)?;
            Some((reader, FoldTarget::new(guest.memory())?))
        }
        None => None,
    };
    let offer = RingOffer { bytes: ring.len() as u64, nonce, overflow_bytes: config.overflow_bytes };
    let inbox = listen_to::<ToSource>(Arc::clone(&control)).map_err(io("start the control thread"))?;
    let prepare = ToDestination::Prepare { ram: ram.clone(), ring: keys, ring_geometry: offer, because: connected };
    control.send(&protocol::encode(&prepare), Deadline::after(bounds.handshake))?;
    let deadline = Deadline::after(bounds.prepare);
    let mut dial = || {
        for lane in lanes(&config.proposal) {
            owner.serve_lane(lane, deadline)?;
        }
        let tethered = config.proposal.tether.as_ref();
        Ok(tethered.map(|_| session.lanes.dial_guard(deadline)).transpose()?)
    };
    // A destination that has failed closes its lanes too; why it did is on the control stream.
    let guard = dial().map_err(|error: SourceError| match inbox.messages().recv_timeout(LAST_WORDS) {
        Ok(Listened::Message(ToSource::Failed { reason, .. })) => SourceError::PeerFailed(reason),
        _ => error,
    })?;
    let (happened, happenings) = bounded(64);
    let (secrets, prepared) = await_prepared(&inbox, bounds.prepare, words)?;
    let death_watch = match (guard, secrets) {
        (Some(connection), Some(secrets)) => Some(watch_guard(connection, secrets, happened.clone())?),
        _ => None,
    };
    let lane_watch = match owner.broken() {
        Some(fd) => {
            let watch = LaneWatch::start(fd, move || drop(happened.try_send(Happening::LaneBroken)));
            Some(watch.map_err(io("start the lane watch"))?)
        }
        None => None,
    };
    let last = observer.note(Some(&prepared), Kind::Prepared { took_us: us(begun.elapsed()) });
    let live = Live {
        control,
        inbox,
        happenings,
        owner,
        ram,
        ring,
        owner_region,
        nonce,
        reserved,
        folder: None,
        catch: None,
        silence: None,
        lease_ends: None,
        recovered: None,
        _death_watch: death_watch,
        _lane_watch: lane_watch,
    };
    Ok((live, last))
}

fn watch_guard(connection: OwnedFd, secrets: Secrets, happened: Sender<Happening>) -> Result<DeathWatch, GuardError> {
    DeathWatch::spawn(connection, secrets, move |notice| {
        // A full channel has told the main loop already that something is wrong.
        let _ = happened.try_send(match notice {
            Notice::DeathSign => Happening::DeathSign,
            Notice::DeathProven => Happening::DeathProven,
            Notice::GuardGone { why } => Happening::GuardGone(why),
        });
    })
}

fn await_prepared(
    inbox: &Inbox<ToSource>,
    bound: Duration,
    words: &Receiver<i32>,
) -> Result<(Option<Secrets>, ObservationId), SourceError> {
    select! {
        recv(inbox.messages()) -> heard => match heard {
            Ok(Listened::Message(ToSource::Prepared { secrets, because })) => Ok((secrets, because)),
            Ok(Listened::Message(ToSource::Failed { reason, .. })) => Err(SourceError::PeerFailed(reason)),
            Ok(Listened::Message(other)) => {
                Err(ProtocolError::Unexpected { got: format!("{other:?}"), wanted: "Prepared" }.into())
            }
            Ok(Listened::Closed(why)) => Err(SourceError::PeerClosed(why)),
            Err(_) => Err(SourceError::PeerClosed("the control thread ended".to_owned())),
        },
        recv(words) -> _ => Err(SourceError::Cancelled),
        default(bound) => Err(SourceError::TimedOut { waiting_for: "Prepare", bound }),
    }
}

/// Every lane of a session, in the order in which the source dials and the destination takes them. None that nobody would hold: a
/// lane that is closed says that the other host is lost.
pub(super) fn lanes(proposal: &Proposal) -> impl Iterator<Item = LaneId> + use<> {
    let a_shard = |index| [LaneKind::Fault, LaneKind::Bulk].map(|kind| LaneId { kind, index });
    let of_the_tether = if proposal.tether.is_some() { 0..2 } else { 0..0 };
    let checkpoint = of_the_tether.map(|index| LaneId { kind: LaneKind::Checkpoint, index });
    (0..proposal.shards).flat_map(a_shard).chain(checkpoint)
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

/// How long a destination that has broken off is listened to for its reason.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// How often the main loop looks at what has no channel: the heartbeat and the folder.
const TICK: Duration = Duration::from_millis(10);

impl Source<'_> {
    fn run(mut self) -> Result<Outcome, SourceError> {
        let mode = self.config.proposal.tether.as_ref().map_or(OutputMode::Commit, |tether| tether.output);
        self.drive(Event::SwitchStarted { mode })?;
        loop {
            if let Some(outcome) = self.outcome.take() {
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

    // ---- what happens --------------------------------------------------------------------------------------------------------

    /// Waits at most a tick for something to happen.
    fn next_event(&mut self) -> Option<Event> {
        // A peer that never stops talking must not keep this host from hearing that its heart has stopped.
        if self.ticked_at.elapsed() > TICK
            && let Some(event) = self.tick()
        {
            return Some(event);
        }
        let messages = self.live.inbox.messages().clone();
        select! {
            recv(self.live.happenings) -> happening => match happening.ok()? {
                Happening::DeathSign => Some(self.lost(Event::DeathSign, "the guard beside it says that it is dying")),
                Happening::DeathProven => Some(self.lost(Event::DeathProven, "the guard beside it says that it has ended")),
                Happening::LaneBroken => Some(self.lost(Event::ConnectionClosed, "a data lane closed")),
                Happening::GuardGone(why) => {
                    // Only the fastest of several ways to notice is gone; the connection and the lease remain.
                    self.note(Kind::State { state: "guard-gone".to_owned(), why });
                    None
                }
            },
            recv(messages) -> heard => match heard {
                Ok(Listened::Message(message)) => self.message(message),
                Ok(Listened::Closed(why)) => {
                    if matches!(self.state, State::Released { .. }) {
                        // The record is on disk, and nobody is left to say farewell; whether the release was heard is the destination's story.
                        self.outcome = Some(Outcome::Released);
                    }
                    Some(self.lost(Event::ConnectionClosed, &why))
                }
                Err(_) => {
                    // Told once already; what remains is to wait for ticks and words.
                    std::thread::park_timeout(TICK);
                    self.tick()
                }
            },
            // A signal takes back a switch that has not happened, and a guest that has left.
            recv(self.words) -> word => match word {
                Ok(_) => self.ordered(),
                Err(_) => self.tick(),
            },
            default(TICK) => self.tick(),
        }
    }

    /// A signal: the operator's word.
    fn ordered(&mut self) -> Option<Event> {
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
            State::Revoking { stuck, .. } => {
                self.ordered_again = stuck;
                Some(Event::OperatorCatch)
            }
            _ => Some(self.lost(Event::OperatorCatch, "the operator ordered the catch")),
        }
    }

    fn lost(&mut self, event: Event, by: &str) -> Event {
        if self.noticed_at.is_none() && matches!(self.state, State::Serving(_) | State::Switching { .. }) {
            self.noticed_at = Some(Instant::now());
            self.note(Kind::Noticed { by: by.to_owned() });
        }
        self.why = by.to_owned();
        event
    }

    fn message(&mut self, message: ToSource) -> Option<Event> {
        match message {
            ToSource::Loaded { because } => {
                self.last = because;
                Some(Event::StateSent)
            }
            ToSource::Resumed { because } => {
                self.last = because;
                if matches!(self.state, State::Switching { .. }) {
                    self.note(Kind::Blackout { took_us: us(self.paused_at.elapsed()) });
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
                Some(self.lost(Event::DeathProven, "the destination says that its VMM has ended"))
            }
            ToSource::Failed { reason, because } => {
                self.last = because;
                // Before the guest went this takes the switch back; after it, the destination has fenced itself.
                let switching = matches!(self.state, State::Switching { .. });
                let event = if switching { Event::SwitchFailed } else { Event::ConnectionClosed };
                Some(self.lost(event, &format!("the destination failed: {reason}")))
            }
            ToSource::Farewell => {
                self.outcome = matches!(self.state, State::Released { .. }).then_some(Outcome::Released);
                None
            }
            ToSource::Prepared { .. } => {
                Some(self.lost(Event::ConnectionClosed, "the destination broke the protocol: Prepared twice"))
            }
        }
    }

    /// What has no channel of its own.
    fn tick(&mut self) -> Option<Event> {
        self.ticked_at = Instant::now();
        if self.switch_due.is_some_and(|due| due.expired())
            && matches!(self.state, State::Switching { .. } | State::Released { .. })
        {
            self.switch_due = None;
            if matches!(self.state, State::Released { .. }) {
                // The record is on disk and was acknowledged as well as can be; whether it was heard is the destination's story.
                self.outcome = Some(Outcome::Released);
                return None;
            }
            let bound = self.config.bounds.switch;
            return Some(self.lost(Event::SwitchFailed, &format!("no answer to the switch within {bound:?}")));
        }
        if let State::Serving(_) = self.state
            && let (Some(folder), Some(silence)) = (&self.live.folder, &mut self.live.silence)
        {
            if let Some(failed) = folder.status().failed {
                return Some(self.lost(Event::ConnectionClosed, &format!("its checkpoints cannot be taken: {failed}")));
            }
            // After the withdrawal time alone decides, whatever the heartbeat does.
            if self.live.lease_ends.take_if(|ends| boot_time() > *ends).is_some() {
                return Some(self.lost(Event::LeaseRanOut, "its lease has run out"));
            }
            if silence.has_lasted(&folder.heard(), boot_time()) {
                let bound =
                    self.config.proposal.tether.as_ref().map_or(Duration::ZERO, |tether| tether.lease.silence_bound());
                return Some(self.lost(Event::LeaseRanOut, &format!("silent for {bound:?}")));
            }
        }
        None
    }

    // ---- what is done --------------------------------------------------------------------------------------------------------

    /// Takes the step that `event` asks for, and those that its actions' answers ask for.
    fn drive(&mut self, event: Event) -> Result<(), SourceError> {
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
                let came_of_it = self.carry_out(action);
                let failed = came_of_it == Some(Event::SwitchFailed);
                events.extend(came_of_it);
                if failed {
                    // A guest that would not stop must not be sent.
                    break;
                }
            }
            self.settle();
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

    /// Does one thing; what came of it, if that is an event.
    fn carry_out(&mut self, action: Action) -> Option<Event> {
        let bounds = self.config.bounds;
        match action {
            Action::PauseGuest => match self.guest.pause(Deadline::after(bounds.stop)) {
                Ok(()) => {
                    self.paused_at = Instant::now();
                    let steps = (self.steps)();
                    self.note(Kind::Paused { steps });
                    None
                }
                Err(error) => Some(self.failed_switch(&error)),
            },
            Action::SendSwitch => match self.send_switch() {
                Ok(()) => None,
                Err(error) => Some(self.failed_switch(&error)),
            },
            Action::SendGo { owner_epoch } => {
                let go = ToDestination::Go { owner_epoch, because: self.last.clone() };
                match self.tell(&go) {
                    Ok(()) => None,
                    Err(error) => Some(self.lost(Event::ConnectionClosed, &error.to_string())),
                }
            }
            Action::SendAbort => {
                let failed = ToDestination::Failed { reason: self.why.clone(), because: self.last.clone() };
                let _ = self.tell(&failed);
                None
            }
            Action::GrantLease => {
                self.switch_due = None;
                if let (Some(folder), Some(tether)) = (&self.live.folder, &self.config.proposal.tether) {
                    folder.set_granting(true);
                    self.live.lease_ends = None;
                    self.live.silence = Some(Silence::new(tether.lease.silence_bound(), boot_time()));
                }
                None
            }
            Action::WithdrawLease => {
                if let Some(folder) = &self.live.folder {
                    folder.set_granting(false);
                }
                let lasts =
                    self.config.proposal.tether.as_ref().map_or(Duration::ZERO, |tether| tether.lease.silence_bound());
                self.live.lease_ends = Some(boot_time() + lasts);
                None
            }
            Action::Revoke { .. } => self.revoke(),
            Action::FoldAndLoad => self.fold_and_load(),
            Action::ResendOutput => {
                if let Some(recovered) = &mut self.recovered {
                    self.output.resend(std::mem::take(&mut recovered.outputs_to_resend));
                }
                None
            }
            Action::ResumeGuest => self.resume(),
            Action::RecordRelease => self.record_release(),
            Action::AcknowledgeRelease => {
                let released = ToDestination::Released { because: self.last.clone() };
                let _ = self.tell(&released);
                self.switch_due = Some(Deadline::after(bounds.release));
                None
            }
            Action::RefuseRelease => {
                let _ = self.tell(&ToDestination::ReleaseRefused { because: self.last.clone() });
                None
            }
            Action::AnswerFate(fate) => {
                let _ = self.tell(&ToDestination::Fate { fate, because: self.last.clone() });
                None
            }
            // Guest RAM and ring live as long as this process does.
            Action::KeepMemory => None,
            Action::Report(named) => self.report(named),
        }
    }

    fn report(&mut self, named: Named) -> Option<Event> {
        self.note(Kind::State { state: named_state(named), why: named.to_string() });
        let advice = match named {
            Named::AwaitingOperator if self.config.catch_on_loss => return Some(Event::OperatorCatch),
            Named::AwaitingOperator => {
                "The guest's memory is kept here. Make sure that the destination shows no more output, then send SIGINT: that is your \
                 word for the catch. --catch-on-loss gives it beforehand."
            }
            Named::CannotRevoke | Named::CatchStuck => {
                "The guest's memory is kept here. Mend what failed, then send SIGINT to try again, once."
            }
            _ => return None,
        };
        let what = format!("{named}: {}", self.why);
        self.note(Kind::Failed { what, advice: advice.to_owned() });
        None
    }

    fn failed_switch(&mut self, error: &dyn std::error::Error) -> Event {
        self.why = protocol::explain(error);
        Event::SwitchFailed
    }

    fn send_switch(&mut self) -> Result<(), SourceError> {
        let bounds = self.config.bounds;
        // What the guest showed before the switch has left before anything it shows after it.
        if !self.output.wait_sent(Deadline::after(bounds.stop)) {
            return Err(SourceError::TimedOut {
                waiting_for: "output from before the switch to leave",
                bound: bounds.stop,
            });
        }
        let mut device_state = Vec::new();
        self.guest.save(&mut device_state)?;
        let mut map = Vec::new();
        let (mut peer_frames, mut zero_frames) = (0, 0);
        for (block, &(_, key)) in self.guest.memory().iter().zip(&self.live.ram) {
            // Again, now that the guest stands still: what was populated since is offered too.
            let extents = block.file.occupancy()?;
            self.live.owner.extend_read(key, &extents)?;
            let classes = RegionClasses::from_occupancy(block.id, block.file.len() as u64, block.page_size, &extents);
            peer_frames += classes.frames(PageClass::Peer);
            zero_frames += classes.frames(PageClass::Zero);
            map.push(classes);
        }
        if let (Some(reserved), Some(tether)) = (self.live.reserved.take(), &self.config.proposal.tether) {
            self.live.folder = Some(self.start_folder(reserved, device_state.clone(), tether.lease.length)?);
        }
        let nonce = fresh_nonce()?;
        self.nonces.push(nonce);
        let device_state_bytes = device_state.len() as u64;
        let because = self.note(Kind::SwitchSent { peer_frames, zero_frames, device_state_bytes });
        self.switch_due = Some(Deadline::after(bounds.switch));
        self.tell(&ToDestination::Switch { map, device_state, nonce, because })?;
        Ok(())
    }

    fn start_folder(
        &self,
        (reader, target): (RingReader, FoldTarget),
        device_state: Vec<u8>,
        lease: Duration,
    ) -> Result<Folder, SourceError> {
        let blocks = self.guest.memory();
        let pages = |bytes: usize| (bytes / PAGE_SIZE) as u64;
        let limits = Limits::for_regions(blocks.iter().map(|block| (block.id, pages(block.file.len()))));
        let state = FoldState::new(target, limits, device_state);
        let config = FoldConfig { lease, ..FoldConfig::default() };
        let owner = OwnerRegion::new(Arc::clone(&self.live.owner_region));
        Folder::start(config, Arc::clone(&self.live.ring), owner, reader, state).map_err(io("start folding"))
    }

    // ---- the catch -----------------------------------------------------------------------------------------------------------

    /// Shuts the old destination out; at the instant from which nothing can commit, the ring is read and folded for the last time.
    fn revoke(&mut self) -> Option<Event> {
        let begun = Instant::now();
        // The folder first: revoking `local` takes the ring's file away under whoever still reads it.
        if let Some(folder) = self.live.folder.take() {
            self.live.catch = Some(folder.stop());
        }
        let (catch, recovered) = (&mut self.live.catch, &mut self.live.recovered);
        let mut folding = Duration::ZERO;
        let mut last_read = |ring: &Mapping| {
            let begun = Instant::now();
            *recovered = catch.take().map(|catch| catch.finish(ring));
            folding = begun.elapsed();
        };
        match self.live.owner.revoke(&mut last_read, Deadline::after(self.config.bounds.revoke)) {
            Ok(()) => {
                self.note(Kind::Revoked { took_us: us(begun.elapsed() - folding) });
                Some(Event::Revoked)
            }
            Err(error) => {
                self.why = format!("cannot revoke: {}", protocol::explain(&error));
                Some(Event::CatchFailed { can_retry: true })
            }
        }
    }

    fn fold_and_load(&mut self) -> Option<Event> {
        let begun = Instant::now();
        let recovered = match self.live.recovered.take() {
            Some(Ok(recovered)) => recovered,
            Some(Err(CatchError::Unreadable { source, older })) => {
                self.why = format!("the ring cannot be read past {}: {}", older.epoch, protocol::explain(&source));
                return Some(Event::CatchFailed { can_retry: false });
            }
            None => {
                self.why =
                    format!("{}; it moved without a tether, so there is no checkpoint to catch it with", self.why);
                return Some(Event::CatchFailed { can_retry: false });
            }
        };
        if let Err(error) = self.guest.load(&recovered.device_state) {
            self.why = format!("cannot load {}: {}", recovered.epoch, protocol::explain(&error));
            return Some(Event::CatchFailed { can_retry: false });
        }
        self.note(Kind::Recovered {
            epoch: recovered.epoch.0,
            pages: recovered.timings.pages,
            total_pages: recovered.folded_pages,
            took_us: us(recovered.timings.last_read + begun.elapsed()),
            resent_packets: recovered.outputs_to_resend.len() as u64,
        });
        self.recovered = Some(recovered);
        Some(Event::Folded)
    }

    fn resume(&mut self) -> Option<Event> {
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
            return self.cannot_resume(protocol::explain(&error));
        }
        let steps = (self.steps)();
        if let Err(error) = self.guest.resume() {
            return self.cannot_resume(protocol::explain(&error));
        }
        if let Some(recovered) = &self.recovered {
            let epoch = recovered.epoch.0;
            let noticed_to_running_us = self.noticed_at.map_or(0, |at| us(at.elapsed()));
            self.nonces.push(nonce);
            self.note(Kind::Caught { epoch, nonce, noticed_to_running_us, steps });
            let fate = ToDestination::Fate { fate: Fate::Revoked, because: self.last.clone() };
            // If it can still hear, it should know; whether it does makes no difference to us.
            let _ = self.live.control.send(&protocol::encode(&fate), Deadline::after(Duration::from_millis(100)));
        }
        Some(Event::GuestResumed)
    }

    fn cannot_resume(&mut self, why: String) -> Option<Event> {
        self.why = format!("cannot resume: {why}");
        if matches!(self.state, State::Revoking { .. }) {
            return Some(Event::CatchFailed { can_retry: true });
        }
        self.outcome = Some(Outcome::Lost { why: self.why.clone() });
        None
    }

    // ---- the release ---------------------------------------------------------------------------------------------------------

    fn record_release(&mut self) -> Option<Event> {
        let owner_epoch = self.state.owner_epoch().0;
        let record = ReleaseRecord::new(self.live.nonce, owner_epoch, self.config.address.to_string());
        match record.write(&self.config.state_dir) {
            Ok(path) => {
                self.note(Kind::ReleaseRecorded { path: path.display().to_string() });
                self.note(Kind::Released { total_us: us(self.paused_at.elapsed()) });
                Some(Event::ReleaseRecorded)
            }
            Err(error @ ReleaseError::NotWritten { .. }) => {
                self.note(Kind::Failed {
                    what: protocol::explain(&error),
                    advice: "The tether is kept; make room or mend the directory, and the destination asks again."
                        .to_owned(),
                });
                Some(Event::ReleaseFailed)
            }
            Err(error @ ReleaseError::Unknown { .. }) => {
                let what = protocol::explain(&error);
                self.why = what.clone();
                let advice = "This host will not resume the guest; it runs on at the destination, tethered. Look at the file and mend the disk. \
                              SIGINT ends this host's part, and the guest is then the destination's to promote.";
                self.note(Kind::Failed { what, advice: advice.to_owned() });
                None
            }
        }
    }
}
