//! The destination's tether as the role uses it: reserved while preparing, armed while the guest stands still, started once it
//! runs, stopped when ownership says so.

use super::destination::Happening;
use super::observation::{Kind, ObservationId, Observer, us};
use super::protocol::RingOffer;
use super::recording::Recording;
use super::settings::{LeaseSettings, TetherSettings};
use belay_checkpoint::dirty::{DirtySet, Harvested};
use belay_checkpoint::epoch::{
    Arrivals, EpochObserver, EpochStats, Heartbeat, HeartbeatConfig, Tether, TetherConfig, TetherEnd, TetherError,
    TetherParts,
};
use belay_checkpoint::guest::{DirtyTracker, Epoch, Guest, GuestError, RamBlock, TrackerKind};
use belay_checkpoint::outbox::{Bounds, Emitter, LeaseClock, Outbox, OutputMode};
use belay_checkpoint::record::largest_record;
use belay_checkpoint::ring::{Mailbox, RingShape, RingTooSmall, RingWriter, ShipError};
use belay_checkpoint::staging::{Slot, StageError, Staging};
use belay_checkpoint::tracker::{Groups, HELD_PAGES, UffdSyncTracker, UffdWpTracker, WhoseMemory, WriteFaults};
use belay_transport::explain;
use belay_transport::fabric::{FabricError, Initiator, Lane, RingKeys};
use belay_transport::pull::{Discard, Engine, ShardRange};
use belay_transport::uffd::Uffd;
use belay_transport::{Deadline, PAGE_SIZE, PageIndex, RegionId};
use crossbeam_channel::Sender;
use std::sync::Arc;
use std::time::Duration;

/// Output that may be held before vCPUs park (P7). Below what a record may carry.
pub(super) const OUTBOX: Bounds = Bounds { bytes: 16 << 20, packets: 65_536 };

/// Why no tether could be made.
#[derive(Debug, thiserror::Error)]
pub enum TetheringError {
    #[error("the ring of {offered} bytes that the source offers is no use")]
    Ring {
        offered: u64,
        #[source]
        source: RingTooSmall,
    },
    #[error(transparent)]
    Ship(#[from] ShipError),
    #[error(transparent)]
    Stage(#[from] StageError),
    #[error(transparent)]
    Tether(#[from] TetherError),
    #[error(transparent)]
    Guest(#[from] GuestError),
    #[error(
        "checkpoints cannot be copied on write (--staging cow) when the source reserves {reserved} bytes for one (--overflow): this guest's \
         can have {needed}, and it would have to be watched while they leave"
    )]
    CowWatched { reserved: u64, needed: u64 },
    #[error("cannot start the heartbeat")]
    Heartbeat(#[source] std::io::Error),
}

/// What has to be registered with the fabric before its lanes open.
pub struct Reserved {
    settings: TetherSettings,
    staging: Staging,
    keys: RingKeys,
    offer: RingOffer,
    slots: [Slot; 2],
    mailboxes: [Mailbox; 2],
}

/// Takes staging memory and mailboxes, for a guest of so many bytes whose checkpoints are staged so.
pub fn reserve(
    initiator: &mut dyn Initiator,
    settings: &TetherSettings,
    (staging, guest_bytes): (Staging, u64),
    keys: RingKeys,
    offer: RingOffer,
) -> Result<Reserved, TetheringError> {
    let (reserved, needed) = (offer.overflow_bytes, largest_record(guest_bytes / PAGE_SIZE as u64));
    if staging == Staging::Cow && reserved < needed {
        return Err(TetheringError::CowWatched { reserved, needed });
    }
    let offered = offer.bytes;
    let shape = RingShape::of(offered as usize).map_err(|source| TetheringError::Ring { offered, source })?;
    let slot_bytes = (offered as usize).min(MOST_STAGING);
    let mut slot = || Slot::new(initiator, slot_bytes, shape);
    let slots = [slot()?, slot()?];
    let mailboxes = [Mailbox::new(initiator)?, Mailbox::new(initiator)?];
    Ok(Reserved { settings: settings.clone(), staging, keys, offer, slots, mailboxes })
}

/// Larger slots than this only make a pause longer; what does not fit is shipped in parts.
const MOST_STAGING: usize = 64 << 20;

/// A tether whose lanes are open and whose heart beats. The guest does not run yet.
pub struct Tethering {
    settings: TetherSettings,
    staging: Staging,
    overflow_bytes: u64,
    stop_bound: Duration,
    heartbeat: Heartbeat,
    happened: Sender<Happening>,
    ready: Option<Ready>,
    /// Of an earlier session's tether: what its records never brought to the source.
    carried: Option<Harvested>,
    tether: Option<Tether>,
    /// Of the guest, once the tether has begun.
    outbox: Option<Arc<Outbox>>,
}

/// What a tether leaves for the next one.
pub struct Leftover {
    /// Still tracking.
    pub tracker: Box<dyn DirtyTracker>,
    /// Harvested, and not known to be at the source.
    pub carried: Harvested,
}

struct Ready {
    writer: RingWriter,
    slots: [Slot; 2],
    tracker: Option<Box<dyn DirtyTracker>>,
    arrivals: Option<Box<dyn Arrivals>>,
}

impl Reserved {
    /// Takes the two checkpoint lanes: records, and heartbeat. `committed` is the newest epoch that the source has.
    pub(super) fn open(
        self,
        committed: Epoch,
        [records, beats]: [Box<dyn Lane>; 2],
        stop_bound: Duration,
        happened: Sender<Happening>,
        deadline: Deadline,
    ) -> Result<Tethering, TetheringError> {
        let Self { settings, staging, keys, offer, slots, mailboxes: [for_records, for_beats] } = self;
        let LeaseSettings { length, heartbeat, .. } = settings.lease;
        let writer = RingWriter::new(records, keys, offer.bytes as usize, offer.nonce, for_records, deadline)?;
        let writer = writer.going_on_from(committed);
        let config = HeartbeatConfig { interval: heartbeat, lease: length, bound: length };
        let heartbeat = Heartbeat::start(beats, keys, for_beats, config).map_err(TetheringError::Heartbeat)?;
        Ok(Tethering {
            settings,
            staging,
            overflow_bytes: offer.overflow_bytes,
            stop_bound,
            heartbeat,
            happened,
            ready: Some(Ready { writer, slots, tracker: None, arrivals: None }),
            carried: None,
            tether: None,
            outbox: None,
        })
    }
}

/// The outbox of a guest with this tether, or with none.
pub fn outbox(tethering: Option<&Tethering>, emitter: Box<dyn Emitter>) -> std::io::Result<Outbox> {
    match tethering {
        None => Outbox::open(OUTBOX, emitter),
        Some(tethering) => match tethering.settings.output {
            OutputMode::Commit => Outbox::commit(OUTBOX, emitter),
            OutputMode::Lease => Outbox::lease(OUTBOX, tethering.heartbeat.lease(), emitter),
        },
    }
}

impl Tethering {
    /// Begins to track before there is a guest, where that takes long and needs none: write protection marks every page of RAM, a
    /// millisecond for 60 MiB. [`Tethering::arm`] does it where this has not.
    pub(super) fn track_ahead(&mut self, guest: &dyn Guest, of: Tracked<'_>) -> Result<(), TetheringError> {
        let how = (self.settings.tracker, self.staging);
        if let Some(mut tracker) = protecting(how, guest.memory(), of)? {
            tracker.start()?;
            self.ready.as_mut().expect("not started yet").tracker = Some(tracker);
        }
        Ok(())
    }

    /// Starts to track, while the guest stands still: from here on every write is in some epoch.
    pub(super) fn arm(
        &mut self,
        guest: &mut dyn Guest,
        engine: Arc<Engine>,
        of: Tracked<'_>,
    ) -> Result<(), TetheringError> {
        let ready = self.ready.as_mut().expect("armed once, before it starts");
        if ready.tracker.is_none() {
            let kind = self.settings.tracker;
            let mut tracker = match protecting((kind, self.staging), guest.memory(), of)? {
                Some(tracker) => tracker,
                None => guest.tracker(kind)?,
            };
            tracker.start()?;
            ready.tracker = Some(tracker);
        }
        ready.arrivals = Some(Box::new(Pulled(engine)));
        Ok(())
    }

    /// As [`Tethering::arm`], with the tracker of the tether before this one, which has tracked all along.
    pub(super) fn arm_again(&mut self, left: Leftover, engine: Arc<Engine>) {
        let ready = self.ready.as_mut().expect("armed once, before it starts");
        ready.tracker = Some(left.tracker);
        ready.arrivals = Some(Box::new(Pulled(engine)));
        self.carried = Some(left.carried);
    }

    /// As [`Tethering::arm`], where the tether before this one was another process's: what it had harvested is not known, so the first
    /// epoch carries every page that has landed.
    pub(super) fn arm_anew(
        &mut self,
        guest: &mut dyn Guest,
        engine: Arc<Engine>,
        of: Tracked<'_>,
    ) -> Result<(), TetheringError> {
        self.arm(guest, engine, of)?;
        let pages = |block: &RamBlock| (block.id, (block.alias.len() / PAGE_SIZE) as u64);
        let sizes: Vec<_> = guest.memory().iter().map(pages).collect();
        self.carried = Some(Harvested::everything(sizes));
        Ok(())
    }

    /// The lease that this tether's heartbeat brings.
    pub(super) fn lease(&self) -> Arc<dyn LeaseClock> {
        self.heartbeat.lease()
    }

    /// Takes epochs of the running guest from now on.
    pub fn start(
        &mut self,
        guest: Box<dyn Guest>,
        outbox: Arc<Outbox>,
        observer: Observer,
        because: ObservationId,
        recording: Option<Arc<Recording>>,
    ) -> Result<(), TetheringError> {
        let Ready { writer, slots, tracker, arrivals } = self.ready.take().expect("started once");
        if let Some(storage) = guest.storage() {
            let outbox = Arc::clone(&outbox);
            self.heartbeat.on_applied(move |epoch| {
                storage.applied(epoch);
                outbox.applied(epoch);
            });
        }
        if let Some(recording) = &recording {
            recording.begins(guest.memory());
        }
        self.outbox = Some(Arc::clone(&outbox));
        let parts = TetherParts {
            guest,
            tracker: tracker.expect("armed before it is started"),
            arrivals: arrivals.expect("armed before it is started"),
            policy: self.settings.policy.build(),
            outbox,
            writer,
            slots,
            observer: Arc::new(Ears { observer, because, happened: self.happened.clone(), recording }),
            carried: self.carried.take(),
        };
        let config = TetherConfig {
            stop_bound: self.stop_bound,
            overflow_bytes: self.overflow_bytes,
            staging: self.staging,
            ..TetherConfig::default()
        };
        self.tether = Some(Tether::start(config, parts)?);
        Ok(())
    }

    /// What the heartbeat has to report, if anything: asked at every tick.
    pub(super) fn heart_failure(&self) -> Option<Happening> {
        let failed = self.heartbeat.status().failed?;
        let why = explain(&*failed);
        Some(match &*failed {
            error if is_revoked(error) => Happening::SourceRevoked(why),
            _ => Happening::LaneBroken(why),
        })
    }

    /// When the lease ends, in ns of CLOCK_BOOTTIME; 0 before the first grant.
    pub fn lease_ends_at_ns(&self) -> u64 {
        self.heartbeat.lease_ends_at_ns()
    }

    /// Whether the lease has run out, by the destination's own clock.
    pub fn lease_has_ended(&self) -> bool {
        self.tether.is_some() && self.heartbeat.status().granted > 0 && !self.heartbeat.lease().valid()
    }

    /// Ends the tether: what is on its way is finished, and the guest handed back with a summary of how it went.
    pub fn stop(self) -> (Option<TetherEnd>, Option<Kind>) {
        let Some(tether) = self.tether else { return (None, None) };
        let Ok(end) = tether.stop() else { return (None, None) };
        let stats = &end.stats;
        let delays = self.outbox.map(|outbox| outbox.delays()).filter(|delays| !delays.is_empty());
        let at =
            |histogram: &hdrhistogram::Histogram<u64>, quantile| histogram.value_at_quantile(quantile) as f64 / 1e3;
        let summary = Kind::TetherSummary {
            epochs: stats.committed,
            pages: stats.pages,
            bytes: stats.bytes,
            pause_p50_us: at(&stats.pause_ns, 0.5),
            pause_p99_us: at(&stats.pause_ns, 0.99),
            commit_p50_us: at(&stats.commit_ns, 0.5),
            age_p50_us: at(&stats.age_ns, 0.5),
            age_p99_us: at(&stats.age_ns, 0.99),
            pause_total_us: us(stats.paused),
            held_back_us: us(stats.held_back),
            output_delay_p50_us: delays.as_ref().map(|delays| at(delays, 0.5)),
            output_delay_p99_us: delays.as_ref().map(|delays| at(delays, 0.99)),
        };
        (Some(end), Some(summary))
    }
}

/// The process whose memory is tracked, and who answers its write faults where that is done synchronously.
pub(super) type Tracked<'a> = (u32, Option<&'a Arc<WriteFaults>>);

/// The trackers that belong to whoever serves the guest's pages, and not to its VMM.
fn protecting(
    (kind, staging): (TrackerKind, Staging),
    blocks: &[RamBlock],
    (vmm_pid, faults): Tracked<'_>,
) -> Result<Option<Box<dyn DirtyTracker>>, GuestError> {
    Ok(match (kind, faults) {
        (TrackerKind::UffdWp, _) => Some(Box::new(UffdWpTracker::new(whose(vmm_pid), blocks)?)),
        (TrackerKind::UffdSync, Some(faults)) => {
            let tracker = UffdSyncTracker::new(blocks, Arc::clone(faults))?;
            Some(Box::new(if staging == Staging::Copy { tracker } else { tracker.holding(HELD_PAGES)? }))
        }
        _ => None,
    })
}

/// Who will answer write faults on guest RAM `blocks`, if `tether` needs anybody to. `uffds`: what serves its other faults.
pub(super) fn write_faults(
    tether: &TetherSettings,
    blocks: &[RamBlock],
    uffds: &[(Uffd, Vec<ShardRange>)],
) -> Result<Option<Arc<WriteFaults>>, GuestError> {
    match tether.tracker {
        TrackerKind::UffdSync => WriteFaults::new(blocks, uffds, Groups::Adaptive).map(|faults| Some(Arc::new(faults))),
        TrackerKind::KvmLog | TrackerKind::KvmRing | TrackerKind::UffdWp => Ok(None),
    }
}

fn whose(vmm_pid: u32) -> WhoseMemory {
    match rustix::process::Pid::from_raw(vmm_pid as i32) {
        Some(pid) if vmm_pid != std::process::id() => WhoseMemory::Process(pid),
        _ => WhoseMemory::Own,
    }
}

/// Whether somewhere in its causes an error says that the source has taken the session back.
fn is_revoked(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut causes = std::iter::successors(Some(error), |error| error.source());
    causes.any(|error| {
        // A transparent error passes its source's sources on, and its source itself is skipped.
        let fabric = match error.downcast_ref::<ShipError>() {
            Some(ShipError::Fabric(error)) => Some(error),
            _ => error.downcast_ref::<FabricError>(),
        };
        matches!(fabric, Some(FabricError::Revoked { .. }))
    })
}

/// Whether somewhere in its causes an error says that the VMM has ended.
fn is_vmm_gone(error: &(dyn std::error::Error + 'static)) -> bool {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.filter_map(|error| error.downcast_ref::<GuestError>()).any(|error| matches!(error, GuestError::VmmGone(_)))
}

/// The pull engine, as a harvest needs it.
struct Pulled(Arc<Engine>);

impl Arrivals for Pulled {
    fn landed(&self, region: RegionId, page: PageIndex) -> bool {
        self.0.landed(region, page)
    }

    fn take_discards(&mut self, discards: &mut DirtySet, perhaps: &mut DirtySet) {
        self.0.take_discards(&mut |Discard { region, page, certain }| {
            if certain { &mut *discards } else { &mut *perhaps }.insert(region, page);
        });
    }
}

/// Tells what happens to epochs.
struct Ears {
    observer: Observer,
    because: ObservationId,
    happened: Sender<Happening>,
    recording: Option<Arc<Recording>>,
}

impl EpochObserver for Ears {
    fn closed(&self, ran: Duration, packets: usize, dirty: &DirtySet) {
        if let Some(recording) = &self.recording {
            recording.closed(ran, packets, dirty);
        }
    }

    fn committed(&self, stats: &EpochStats) {
        self.observer.note(
            Some(&self.because),
            Kind::Committed {
                epoch: stats.epoch,
                pages: stats.pages,
                bytes: stats.bytes,
                pause_us: us(stats.pause.total()),
                held_back_us: us(stats.held_back),
                commit_us: us(stats.commit),
                age_us: us(stats.age),
                copied_on_write: stats.copied_on_write,
            },
        );
    }

    fn stop_timed_out(&self, tries: u32, error: &GuestError) {
        let state = "stop-timed-out".to_owned();
        self.observer.note(Some(&self.because), Kind::State { state, why: format!("{error}; {tries} times in a row") });
    }

    fn failed(&self, error: &Arc<TetherError>) {
        let why = explain(&**error);
        // Told here, while it is known which epoch it was that could not commit.
        let state = "tether-failed".to_owned();
        self.observer.note(Some(&self.because), Kind::State { state, why: why.clone() });
        // A full channel has told the main loop already that something is wrong.
        let _ = self.happened.try_send(match &**error {
            error if is_revoked(error) => Happening::SourceRevoked(why),
            error if is_vmm_gone(error) => Happening::VmmGone(why),
            _ => Happening::CommitFailed(why),
        });
    }
}
