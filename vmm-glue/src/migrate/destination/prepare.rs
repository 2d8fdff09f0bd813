//! Everything before the downtime: a source, RAM, lanes, VMM, guard.

use super::order::NO_GUEST_YET;
use super::ram::allocate;
use super::warden::{self, Warden};
use super::{Destination, DestinationConfig, DestinationError, Happening, Host, Link, Ram, VMM_SLOT, heard, io};
use crate::guard::GuardError;
use crate::kvm::apart::{Kept, Ledger};
use crate::migrate::observation::{Kind, ObservationId, Observer, connected, us};
use crate::migrate::operator::{Ask, Ended, Pending, Words};
use crate::migrate::peer::Inbox;
use crate::migrate::protocol::{RingOffer, ToDestination, ToSource};
use crate::migrate::reattach::decode_proposal;
use crate::migrate::registering::{Registrations, place};
use crate::migrate::settings::{Bounds, Proposal};
use crate::migrate::source::lanes;
use crate::migrate::tethering::Tethering;
use crate::migrate::{protocol, tethering};
use belay_checkpoint::guest::{Epoch, TrackerKind};
use belay_checkpoint::ownership::OwnerEpoch;
use belay_checkpoint::ownership::destination::State;
use belay_checkpoint::staging::Staging;
use belay_transport::fabric::{Initiator, Lane, LaneId, LaneKind, LocalKey, ReadKey, RingKeys};
use belay_transport::numa::Placement;
use belay_transport::pull::{ShardParts, ShardRange};
use belay_transport::session::{DestinationSession, Incoming, Listener, SessionError};
use belay_transport::stop_point::reached;
use belay_transport::uffd::{Uffd, UffdError};
use belay_transport::{Deadline, RegionId, explain, fabric};
use crossbeam_channel::{Sender, bounded};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Waits for a source that may come in, and says whom it turned away. Nobody who only knows the address can end the wait.
pub(super) fn await_source(
    listener: &Listener,
    (bounds, staging): (Bounds, Staging),
    observer: &Observer,
    words: &Words,
) -> Result<Option<(DestinationSession, Proposal)>, DestinationError> {
    let turned_away = |why: String| drop(observer.note_provoked(None, "turned-away", why));
    loop {
        match words.wait(Some(Duration::ZERO), |ask| match ask {
            Ask::Cancel => Ok("it listens no more".to_owned()),
            _ => Err(NO_GUEST_YET.to_owned()),
        }) {
            Ended::Time => {}
            Ended::Signal => return Ok(None),
            Ended::Order => return Err(DestinationError::Cancelled),
        }
        let incoming = listener.accept(Deadline::after(Duration::from_millis(200)));
        for rejection in listener.take_rejections() {
            turned_away(explain(&rejection.error));
        }
        match incoming {
            Ok(incoming) => match agree(incoming, bounds, staging) {
                Ok(agreed) => return Ok(Some(agreed)),
                Err(error) => turned_away(explain(&error)),
            },
            Err(SessionError::TimedOut { .. }) => {}
            Err(error) => return Err(DestinationError::Connect(error)),
        }
    }
}

/// Largest guest this version takes: a limit on what a peer can make this host allocate by a word.
pub(super) const MOST_RAM: u64 = 1 << 40;

pub(super) fn agree(
    incoming: Incoming,
    bounds: Bounds,
    staging: Staging,
) -> Result<(DestinationSession, Proposal), DestinationError> {
    let deadline = Deadline::after(bounds.handshake);
    let hello = incoming.hello();
    let ram: u64 = hello.geometry.iter().map(|region| region.bytes).fold(0, u64::saturating_add);
    let refusal = match decode_proposal(&hello.blob) {
        Err(why) => Some(why),
        Ok(Proposal { reattach: Some(call), .. }) => Some(format!("no guest of migration {} is here", call.migration)),
        Ok(_) if ram == 0 || ram > MOST_RAM => Some(format!("a guest of {ram} bytes of RAM")),
        Ok(_) if available().is_some_and(|available| ram > available) => {
            Some(format!("a guest of {ram} bytes of RAM; {} are available here", available().unwrap_or(0)))
        }
        Ok(proposal) if proposal.check().is_err() => proposal.check().err(),
        Ok(proposal) if !stages(staging, &proposal) => Some(COW_NEEDS.to_owned()),
        Ok(proposal) => {
            let session = incoming.accept(&[], deadline)?;
            return Ok((session, proposal));
        }
    };
    let reason = refusal.unwrap_or_default();
    incoming.refuse(&reason, deadline)?;
    Err(DestinationError::Refused(reason))
}

/// What is wrong with a proposal that [`stages`] says no to.
const COW_NEEDS: &str = "a tracker that cannot hold pages; checkpoints are copied on write here (--staging cow), which takes uffd-sync (--tracker at the source)";

/// Whether checkpoints of such a guest can be staged as this host's operator wants it.
fn stages(staging: Staging, proposal: &Proposal) -> bool {
    let tracker = proposal.tether.as_ref().map(|tether| tether.tracker);
    staging != Staging::Cow || tracker.is_none_or(|tracker| tracker == TrackerKind::UffdSync)
}

/// Bytes that could be allocated without swapping, if this host says: more than that asked for by a word must not end in the
/// kernel's choosing a victim.
pub(super) fn available() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let kib = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    kib.trim().trim_end_matches("kB").trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// Operations outstanding on one lane. Generous for reads of whole chunks, and small against what a socket buffers.
pub(super) const LANE_WINDOW: usize = 64;

/// Longest that one stop for a checkpoint may take; a vCPU that waits for a page makes it try again.
pub(super) const TETHER_STOP: Duration = Duration::from_millis(500);

pub(super) type Prepare = (Vec<(RegionId, ReadKey)>, RingKeys, RingOffer, ObservationId);

pub(super) fn await_prepare(
    inbox: &Inbox<ToDestination>,
    bound: Duration,
    words: &Words,
) -> Result<Prepare, DestinationError> {
    match heard::next(inbox, "Prepare", Some(bound), words)? {
        ToDestination::Prepare { ram, ring, ring_geometry, because } => Ok((ram, ring, ring_geometry, because)),
        other => Err(heard::unexpected(&other, "Prepare")),
    }
}

/// What a session's source offers beside guest RAM.
pub(super) struct Joined {
    pub ring: RingKeys,
    pub offer: RingOffer,
    /// Newest epoch that the source has.
    pub committed: Epoch,
    pub staging: Staging,
    /// Longest wait for one lane.
    pub bound: Duration,
    pub deadline: Deadline,
}

/// A session's lanes, and what they land in.
pub(super) struct Opened {
    pub landing: Vec<LocalKey>,
    pub lane_pairs: Vec<LanePair>,
    pub tethering: Option<Tethering>,
}

/// The fault lane of a shard, and its bulk lane.
type LanePair = (Box<dyn Lane>, Option<Box<dyn Lane>>);

/// Registers guest RAM and staging memory with the session's fabric, and takes every lane.
pub(super) fn open_lanes(
    initiator: &mut dyn Initiator,
    proposal: &Proposal,
    ram: &[Ram],
    joined: Joined,
    (placement, happened): (&Placement, &Sender<Happening>),
    (observer, because): (&Observer, &ObservationId),
) -> Result<Opened, DestinationError> {
    let Joined { ring, offer, committed, staging, bound, deadline } = joined;
    let registrations = Registrations::new(observer, because);
    initiator.observe_registration(registrations.ears());
    let registering = Instant::now();
    let mut landing = Vec::new();
    for ram in ram {
        landing.push(initiator.register_local(&ram.alias)?);
    }
    let reserved = match &proposal.tether {
        Some(tether) => {
            let bytes = ram.iter().map(|ram| ram.alias.len() as u64).sum();
            Some(placement.run_near(|| tethering::reserve(initiator, tether, (staging, bytes), ring, offer))?)
        }
        None => None,
    };
    if let Some(registered) = registrations.take(registering.elapsed()) {
        observer.note(Some(because), registered);
    }
    let mut open = |id: LaneId, window| initiator.open_lane(id, window, Deadline::after(bound));
    let mut lane_pairs: Vec<LanePair> = Vec::new();
    let mut checkpoint_lanes = Vec::new();
    for id in lanes(proposal) {
        let lane = open(id, LANE_WINDOW)?;
        match id.kind {
            LaneKind::Fault => lane_pairs.push((lane, None)),
            LaneKind::Bulk => lane_pairs.last_mut().expect("a fault lane comes before its bulk lane").1 = Some(lane),
            LaneKind::Checkpoint => checkpoint_lanes.push(lane),
        }
    }
    let tethering = match (reserved, <[_; 2]>::try_from(checkpoint_lanes)) {
        (Some(reserved), Ok(lanes)) => {
            Some(reserved.open(committed, lanes, TETHER_STOP, happened.clone(), deadline)?)
        }
        _ => None,
    };
    Ok(Opened { landing, lane_pairs, tethering })
}

/// A shard's lanes beside its userfaultfd.
pub(super) fn shard_parts(
    config: &DestinationConfig,
    lane_pairs: Vec<LanePair>,
    uffds: &[(Uffd, Vec<ShardRange>)],
) -> Result<Vec<ShardParts>, DestinationError> {
    let cores = config.engine_cores.iter().copied().cycle();
    let cores = cores.map(Some).chain(std::iter::repeat(None));
    let parts = lane_pairs.into_iter().zip(uffds).zip(cores);
    let parts = parts.map(|(((fault, bulk), (uffd, ranges)), core)| {
        let bulk = bulk.expect("lanes come in pairs");
        Ok(ShardParts { uffd: uffd.try_clone()?, fault, bulk, ranges: ranges.clone(), core })
    });
    Ok(parts.collect::<Result<Vec<_>, UffdError>>()?)
}

impl<'a> Destination<'a> {
    /// Everything before the downtime: RAM, VMM, userfaultfd, lanes, guard.
    pub(super) fn prepare(
        (config, listener): (&'a DestinationConfig, &'a Listener),
        session: DestinationSession,
        inbox: Arc<Inbox<ToDestination>>,
        proposal: Proposal,
        host: &mut dyn Host,
        observer: &'a Observer,
        words: &'a Words,
    ) -> Result<Self, DestinationError> {
        let bounds = config.bounds;
        observer.note(None, connected("the source".to_owned(), &session.agreed, session.lanes.is_encrypted()));
        let control = Arc::clone(&session.control);
        // The source registers all its RAM before it says so, which takes as long as pinning a large guest does.
        let (keys, ring, offer, mut last) = await_prepare(&inbox, bounds.prepare, words)?;
        reached("prepare-heard");
        words.board.session(proposal.identity.migration.number());
        words.board.entered(State::new().name(), None, "a source has come");
        let begun = Instant::now();
        let deadline = Deadline::after(bounds.prepare);
        let guard = proposal.tether.as_ref();
        let guard = guard.map(|tether| Ok((host.guard_command()?, warden::arms(tether, host.vmm_is_apart()))));
        let guard = guard.transpose().map_err(|error: GuardError| DestinationError::from(error))?;
        let mut warden = match &guard {
            Some((command, arms)) => {
                // The source dials all of these right after Prepare: one that has died must not be waited for as long as RAM is.
                let connection = session.lanes.take_guard(Deadline::after(bounds.handshake))?;
                Some(Warden::start(command, connection, *arms, deadline)?)
            }
            None => None,
        };
        let mut initiator = fabric::initiator(&session)?;
        let placement = place(config.numa, session.agreed.fabric, initiator.numa_node(), observer, &last)?;
        let files = host.ram(&proposal.vmm, proposal.tether.is_some())?;
        let ram = allocate(&session.hello.geometry, files, &placement, observer, &last)?;
        let tracker = proposal.tether.as_ref().map(|tether| tether.tracker);
        let (happened, happenings) = bounded(64);
        let (committed, staging, bound) = (Epoch(0), config.staging, bounds.handshake);
        let joined = Joined { ring, offer, committed, staging, bound, deadline };
        let opened = open_lanes(&mut *initiator, &proposal, &ram, joined, (&placement, &happened), (observer, &last))?;
        let Opened { landing, lane_pairs, mut tethering } = opened;
        let address = config.output_to.as_deref().or(proposal.output_to.as_deref());
        let emitter = host.output(address).map_err(io("reach the observer of the guest's output"))?;
        let ledger = Ledger::new()?;
        let output = tethering::outbox(tethering.as_ref(), ledger.keep(emitter)).map_err(io("start the outbox"))?;
        // Shut until ownership says otherwise: a destination that is not tethered yet shows nothing.
        output.shut();
        let output = Arc::new(output);
        words.board.emits_through(&output);
        let life = warden.as_ref().map(|warden| Arc::clone(&warden.page));
        let built = host.build(&proposal.vmm, &ram, proposal.shards, tracker, output.sink(), life.as_deref())?;
        if let Some(keeper) = &built.keeper {
            keeper.keep(Kept::Ledger, ledger.fd())?;
            if let Some(warden) = &warden {
                keeper.keep(Kept::Guard, warden.guard.hand_over())?;
            }
        }
        if built.pid != std::process::id() {
            observer.note(Some(&last), Kind::VmmStarted { pid: built.pid });
        }
        let write_faults = match &proposal.tether {
            Some(tether) => tethering::write_faults(tether, built.guest.memory(), &built.shards)?,
            None => None,
        };
        if let Some(tethering) = &mut tethering {
            tethering.track_ahead(built.guest.as_ref(), (built.pid, write_faults.as_ref()))?;
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
        let parts = shard_parts(config, lane_pairs, &built.shards)?;
        if let Some(details) = initiator.details() {
            observer.note(Some(&last), Kind::Fabric(details));
        }
        reached("prepared");
        last = observer.note(Some(&last), Kind::Prepared { took_us: us(begun.elapsed()) });
        let secrets = warden.as_ref().map(|warden| warden.secrets.clone());
        let prepared = ToSource::Prepared { secrets, because: last.clone() };
        control.send(&protocol::encode(&prepared), Deadline::after(bounds.handshake))?;
        Ok(Self {
            config,
            listener,
            guard,
            placement,
            nonces: proposal.nonces.clone(),
            proposal,
            geometry: session.hello.geometry.clone(),
            observer,
            words,
            pending: Pending::default(),
            link: Some(Link { control, inbox }),
            happenings,
            happened,
            state: State::new(),
            last,
            storage: built.guest.storage(),
            guest: Some(built.guest),
            output,
            warden,
            keeper: built.keeper,
            ram,
            vmm_pid: built.pid,
            signless: (built.pid != std::process::id() && !host.vmm_is_apart()).then_some(built.pid),
            parts,
            uffds: built.shards,
            write_faults,
            engine: None,
            states: None,
            map: Vec::new(),
            leftover: None,
            inherited: false,
            old_guard: None,
            owner_epoch: OwnerEpoch(0),
            tethering,
            resumed_at: None,
            all_landed_at: None,
            release_asked_at: None,
            go_due: None,
            leaving: None,
            warned: false,
            ticked_at: Instant::now(),
            claiming: super::claim::Claiming::default(),
            dialled_at: Instant::now(),
            reported_at: Instant::now(),
            latencies_at: Instant::now(),
            why: String::new(),
            outcome: None,
        })
    }
}
