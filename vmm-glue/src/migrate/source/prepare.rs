//! Everything before the downtime: session, regions, ring, lanes, guard.

use super::keep::Keep;
use super::{Happened, Happening, Live, SourceConfig, SourceError, fresh_nonce, io};
use crate::guard::{DeathWatch, GuardError, Notice, Secrets};
use crate::migrate::lane_watch::LaneWatch;
use crate::migrate::observation::{Kind, ObservationId, Observer, connected, us};
use crate::migrate::operator::{Ask, Words};
use crate::migrate::peer::{Inbox, Listened, listen_to};
use crate::migrate::protocol;
use crate::migrate::protocol::{ProtocolError, RingOffer, ToDestination, ToSource};
use crate::migrate::registering::{Registrations, place, prefer};
use crate::migrate::settings::Proposal;
use belay_checkpoint::fold::FoldTarget;
use belay_checkpoint::guest::Guest;
use belay_checkpoint::ring::{OwnerRegion, RingReader, RingShape};
use belay_transport::fabric::{LaneId, LaneKind, Owner, ReadKey, RingKeys};
use belay_transport::numa::Placement;
use belay_transport::region::Mapping;
use belay_transport::session::{Offer, RegionGeometry, SourceSession};
use belay_transport::stop_point::reached;
use belay_transport::{Deadline, PAGE_SIZE, RegionId, fabric, session};
use crossbeam_channel::select;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What the downtime begins with.
pub(super) struct Prepared {
    pub live: Live,
    /// Reserved now, so that missing memory is found before the guest leaves and nothing of it is downtime.
    pub reserved: Option<(RingReader, FoldTarget)>,
    pub last: ObservationId,
}

/// What a session of this guest offers the destination.
fn offer(guest: &dyn Guest, proposal: &Proposal) -> Offer {
    let geometry = guest.memory().iter().map(|block| RegionGeometry {
        id: block.id,
        bytes: block.file.len() as u64,
        page_size: block.page_size,
    });
    Offer { geometry: geometry.collect(), blob: protocol::encode(proposal) }
}

/// Everything before the downtime: session, regions, ring, lanes, guard.
pub(super) fn prepare(
    config: &SourceConfig,
    keep: &mut Keep,
    guest: &mut dyn Guest,
    observer: &Observer,
    happened: &Happened,
    words: &Words,
) -> Result<Prepared, SourceError> {
    let bounds = config.bounds;
    config.proposal.check().map_err(SourceError::Proposal)?;
    let offer = offer(guest, &config.proposal);
    let session = session::connect(&config.address, config.session.clone(), &offer, Deadline::after(bounds.handshake))
        .map_err(|source| SourceError::Connect { address: config.address.to_string(), source })?;
    // On disk before anything of the guest can leave.
    let to = config.address.to_string();
    keep.agree(to, config.proposal.clone(), guest.memory(), config.extra.clone())?;
    let connected = connected(config.address.to_string(), &session.agreed, session.lanes.is_encrypted());
    let connected = observer.note(None, connected);
    reached("source-connected");
    let begun = Instant::now();
    let inbox = listen_to::<ToSource>(Arc::clone(&session.control)).map_err(io("start the control thread"))?;
    keep.reserve_ram(guest.memory())?;
    let exported = Exported::new(config, keep, guest, &session, observer, &connected)?;
    words.board.session(config.proposal.identity.migration.number());
    let reserved = match config.proposal.tether {
        Some(_) => {
            let reader = keep.reader(exported.ring.len(), exported.nonce, config.overflow_bytes as usize)?;
            Some((reader, FoldTarget::new(guest.memory())?))
        }
        None => None,
    };
    let (ram, ring) = (exported.ram.clone(), exported.keys);
    let ring_geometry = exported.ring_offer(config);
    let prepare = ToDestination::Prepare { ram, ring, ring_geometry, because: connected };
    session.control.send(&protocol::encode(&prepare), Deadline::after(bounds.handshake))?;
    let mut live = exported.into_live(session, inbox);
    let prepared = live.open(config, happened, words)?;
    if let Some(details) = live.owner.details() {
        observer.note(Some(&prepared), Kind::Fabric(details));
    }
    // What the guest has populated or given up meanwhile, while it still runs: the same at the switch then finds little to do.
    let again = Instant::now();
    for (block, &(_, key)) in guest.memory().iter().zip(&live.ram) {
        let extents = block.file.occupancy()?;
        live.owner.extend_read(key, &extents)?;
        live.occupied.push(extents);
    }
    if let Some(registered) = live.registrations.take(again.elapsed()) {
        observer.note(Some(&prepared), registered);
    }
    reached("source-prepared");
    let last = observer.note(Some(&prepared), Kind::Prepared { took_us: us(begun.elapsed()) });
    Ok(Prepared { live, reserved, last })
}

/// Guest RAM and a ring as a session offers them, before its lanes are open.
pub(super) struct Exported {
    owner: Box<dyn Owner>,
    registrations: Registrations,
    placement: Placement,
    pub ram: Vec<(RegionId, ReadKey)>,
    pub keys: RingKeys,
    pub ring: Arc<Mapping>,
    pub owner_region: Arc<Mapping>,
    pub nonce: u64,
}

impl Exported {
    /// Registers everything with the fabric of `session`.
    pub(super) fn new(
        config: &SourceConfig,
        keep: &Keep,
        guest: &dyn Guest,
        session: &SourceSession,
        observer: &Observer,
        because: &ObservationId,
    ) -> Result<Self, SourceError> {
        let begun = Instant::now();
        let mut owner = fabric::owner(session)?;
        let placement = place(config.numa, session.agreed.fabric, owner.numa_node(), observer, because)?;
        let registrations = Registrations::new(observer, because);
        owner.observe_registration(registrations.ears());
        // Occupancy first: whatever maps or registers RAM may fill its holes.
        let mut ram = Vec::new();
        for block in guest.memory() {
            let extents = block.file.occupancy()?;
            ram.push((block.id, owner.export_read(&block.file, &block.alias, &extents)?));
        }
        let nonce = fresh_nonce()?;
        // Without a tether nothing is ever written there, and 64 MiB take some 50 ms to allocate.
        let least = RingShape::LEAST.next_multiple_of(PAGE_SIZE);
        let ring_bytes = if config.proposal.tether.is_some() { config.ring_bytes } else { least };
        let files = keep.make_ring(nonce, ring_bytes)?;
        let ring = Arc::new(files.ring.map().map_err(io("map the ring"))?);
        let owner_region = Arc::new(files.owner.map().map_err(io("map the owner region"))?);
        prefer(&placement, &ring, observer, because);
        files.ring.preallocate_through(&ring, 1, &|_| {})?;
        OwnerRegion::new(Arc::clone(&owner_region));
        let keys = owner.export_ring((&files.ring, &ring), (&files.owner, &owner_region))?;
        if let Some(registered) = registrations.take(begun.elapsed()) {
            observer.note(Some(because), registered);
        }
        Ok(Self { owner, registrations, placement, ram, keys, ring, owner_region, nonce })
    }

    /// The ring as the destination is told of it.
    pub(super) fn ring_offer(&self, config: &SourceConfig) -> RingOffer {
        RingOffer { bytes: self.ring.len() as u64, nonce: self.nonce, overflow_bytes: config.overflow_bytes }
    }

    /// The session they are offered in, with no lane open yet.
    pub(super) fn into_live(self, session: SourceSession, inbox: Inbox<ToSource>) -> Live {
        let Self { owner, registrations, placement, ram, ring, owner_region, nonce, .. } = self;
        Live {
            control: session.control,
            lanes: session.lanes,
            inbox,
            owner,
            registrations,
            placement,
            fabric: session.agreed.fabric,
            ram,
            occupied: Vec::new(),
            ring,
            owner_region,
            nonce,
            death_watch: None,
            _lane_watch: None,
            zeros: None,
        }
    }
}

impl Live {
    /// Dials every lane and the guard, and waits until the destination says that it is prepared.
    pub(super) fn open(
        &mut self,
        config: &SourceConfig,
        happened: &Happened,
        words: &Words,
    ) -> Result<ObservationId, SourceError> {
        let bounds = config.bounds;
        let deadline = Deadline::after(bounds.prepare);
        let Self { owner, inbox, lanes: dialer, nonce, .. } = self;
        let session = *nonce;
        let mut dial = || {
            for lane in lanes(&config.proposal) {
                owner.serve_lane(lane, deadline)?;
            }
            let tethered = config.proposal.tether.as_ref();
            Ok(tethered.map(|_| dialer.dial_guard(deadline)).transpose()?)
        };
        // A destination that has failed closes its lanes too; why it did is on the control stream.
        let guard = self.placement.run_near(&mut dial).map_err(|error: SourceError| {
            match inbox.messages().recv_timeout(LAST_WORDS) {
                Ok(Listened::Message(ToSource::Failed { reason, .. })) => SourceError::PeerFailed(reason),
                _ => error,
            }
        })?;
        let (secrets, prepared) = await_prepared(inbox, bounds.prepare, words)?;
        self.death_watch = match (guard, secrets) {
            (Some(connection), Some(secrets)) => Some(watch_guard(connection, secrets, happened.clone(), session)?),
            _ => None,
        };
        self._lane_watch = match self.owner.broken() {
            Some(fd) => {
                let happened = happened.clone();
                let watch = LaneWatch::start(fd, move || drop(happened.try_send((session, Happening::LaneBroken))));
                Some(watch.map_err(io("start the lane watch"))?)
            }
            None => None,
        };
        Ok(prepared)
    }
}

pub(super) fn watch_guard(
    connection: OwnedFd,
    secrets: Secrets,
    happened: Happened,
    session: u64,
) -> Result<DeathWatch, GuardError> {
    DeathWatch::spawn(connection, secrets, move |notice| {
        // A full channel has told the main loop already that something is wrong.
        let what = match notice {
            Notice::DeathSign => Happening::DeathSign,
            Notice::DeathProven => Happening::DeathProven,
            Notice::GuardGone { why } => Happening::GuardGone(why),
        };
        let _ = happened.try_send((session, what));
    })
}

pub(super) fn await_prepared(
    inbox: &Inbox<ToSource>,
    bound: Duration,
    words: &Words,
) -> Result<(Option<Secrets>, ObservationId), SourceError> {
    let deadline = Deadline::after(bound);
    loop {
        select! {
            recv(inbox.messages()) -> heard => return match heard {
                Ok(Listened::Message(ToSource::Prepared { secrets, because })) => Ok((secrets, because)),
                Ok(Listened::Message(ToSource::Failed { reason, .. })) => Err(SourceError::PeerFailed(reason)),
                Ok(Listened::Message(other)) => {
                    Err(ProtocolError::Unexpected { got: other.kind().to_owned(), wanted: "Prepared" }.into())
                }
                Ok(Listened::Closed(why)) => Err(SourceError::PeerClosed(why)),
                Err(_) => Err(SourceError::PeerClosed("the control thread ended".to_owned())),
            },
            recv(words.signals) -> _ => return Err(SourceError::Interrupted),
            recv(words.orders) -> order => match order {
                Ok(order) if order.ask == Ask::Cancel => {
                    order.done("the guest was not touched and runs on here");
                    return Err(SourceError::Cancelled);
                }
                Ok(order) => order.refuse(NOT_LEFT_YET),
                Err(_) => return Err(SourceError::Interrupted),
            },
            default(deadline.left()) => return Err(SourceError::TimedOut { waiting_for: "Prepare", bound }),
        }
    }
}

/// Why most orders mean nothing yet.
pub(super) const NOT_LEFT_YET: &str = "the guest has not left this host; `belay cancel` calls the migration off";

/// Every lane of a session, in the order in which the source dials and the destination takes them. None that nobody would hold: a
/// lane that is closed says that the other host is lost.
pub(in crate::migrate) fn lanes(proposal: &Proposal) -> impl Iterator<Item = LaneId> + use<> {
    let a_shard = |index| [LaneKind::Fault, LaneKind::Bulk].map(|kind| LaneId { kind, index });
    let of_the_tether = if proposal.tether.is_some() { 0..2 } else { 0..0 };
    let checkpoint = of_the_tether.map(|index| LaneId { kind: LaneKind::Checkpoint, index });
    (0..proposal.shards).flat_map(a_shard).chain(checkpoint)
}

/// How long a destination that has broken off is listened to for its reason.
pub(super) const LAST_WORDS: Duration = Duration::from_millis(500);
