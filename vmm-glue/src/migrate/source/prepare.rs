//! Everything before the downtime: session, regions, ring, lanes, guard.

use super::{Happening, Live, SourceConfig, SourceError, fresh_nonce, io};
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
use belay_checkpoint::ring::{OWNER_REGION_BYTES, OwnerRegion, RingReader};
use belay_transport::fabric::{LaneId, LaneKind};
use belay_transport::region::RamFile;
use belay_transport::session::{Offer, RegionGeometry};
use belay_transport::stop_point::reached;
use belay_transport::{Deadline, PageSize, fabric, session};
use crossbeam_channel::{Sender, bounded, select};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Everything before the downtime: session, regions, ring, lanes, guard.
pub(super) fn prepare(
    config: &SourceConfig,
    guest: &mut dyn Guest,
    observer: &Observer,
    words: &Words,
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
    let connected = connected(config.address.to_string(), &session.agreed, session.lanes.is_encrypted());
    let connected = observer.note(None, connected);
    reached("source-connected");
    let begun = Instant::now();
    let control = Arc::clone(&session.control);
    let mut owner = fabric::owner(&session)?;
    let placement = place(config.numa, session.agreed.fabric, owner.numa_node(), observer, &connected)?;
    let registrations = Registrations::new(observer, &connected);
    owner.observe_registration(registrations.ears());
    // Occupancy first: whatever maps or registers RAM may fill its holes.
    let mut ram = Vec::new();
    for block in guest.memory() {
        let extents = block.file.occupancy()?;
        ram.push((block.id, owner.export_read(&block.file, &block.alias, &extents)?));
    }
    let ring_file = RamFile::memfd("belay-ring", config.ring_bytes, PageSize::Small)?;
    let owner_file = RamFile::memfd("belay-owner", OWNER_REGION_BYTES, PageSize::Small)?;
    let (ring, owner_region) =
        (ring_file.map().map_err(io("map the ring"))?, owner_file.map().map_err(io("map the owner region"))?);
    let (ring, owner_region) = (Arc::new(ring), Arc::new(owner_region));
    prefer(&placement, &ring, observer, &connected);
    ring_file.preallocate_through(&ring, 1, &|_| {})?;
    OwnerRegion::new(Arc::clone(&owner_region));
    let keys = owner.export_ring((&ring_file, &ring), (&owner_file, &owner_region))?;
    if let Some(registered) = registrations.take(begun.elapsed()) {
        observer.note(Some(&connected), registered);
    }
    let nonce = fresh_nonce()?;
    words.board.session(nonce);
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
    let guard = placement.run_near(&mut dial).map_err(|error: SourceError| {
        match inbox.messages().recv_timeout(LAST_WORDS) {
            Ok(Listened::Message(ToSource::Failed { reason, .. })) => SourceError::PeerFailed(reason),
            _ => error,
        }
    })?;
    let (happened, happenings) = bounded(64);
    let (secrets, prepared) = await_prepared(&inbox, bounds.prepare, words)?;
    let death_watch = match (guard, secrets) {
        (Some(connection), Some(secrets)) => Some(watch_guard(connection, secrets, happened.clone())?),
        _ => None,
    };
    let lane_watch = match owner.broken() {
        Some(fd) => {
            let happened = happened.clone();
            let watch = LaneWatch::start(fd, move || drop(happened.try_send(Happening::LaneBroken)));
            Some(watch.map_err(io("start the lane watch"))?)
        }
        None => None,
    };
    if let Some(details) = owner.details() {
        observer.note(Some(&prepared), Kind::Fabric(details));
    }
    // What the guest has populated or given up meanwhile, while it still runs: the same at the switch then finds little to do.
    let again = Instant::now();
    for (block, &(_, key)) in guest.memory().iter().zip(&ram) {
        owner.extend_read(key, &block.file.occupancy()?)?;
    }
    if let Some(registered) = registrations.take(again.elapsed()) {
        observer.note(Some(&prepared), registered);
    }
    reached("source-prepared");
    let last = observer.note(Some(&prepared), Kind::Prepared { took_us: us(begun.elapsed()) });
    let live = Live {
        control,
        inbox,
        happenings,
        _happened: happened,
        owner,
        registrations,
        placement,
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

pub(super) fn watch_guard(
    connection: OwnedFd,
    secrets: Secrets,
    happened: Sender<Happening>,
) -> Result<DeathWatch, GuardError> {
    DeathWatch::spawn(connection, secrets, move |notice| {
        // A full channel has told the main loop already that something is wrong.
        let _ = happened.try_send(match notice {
            Notice::DeathSign => Happening::DeathSign,
            Notice::DeathProven => Happening::DeathProven,
            Notice::GuardGone { why } => Happening::GuardGone(why),
        });
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
