//! A metronome guest that has moved, all of its pages with it, and is tethered: both hosts in one process, with the pieces the
//! two roles are made of, and without the roles.

use crate::carrier::Carrier;
use crate::error::BenchError;
use crate::rig::{self, Ends, Landing, Source, soon};
use belay_checkpoint::dirty::DirtySet;
use belay_checkpoint::epoch::{Arrivals, EpochObserver, EpochStats, Tether, TetherConfig, TetherParts};
use belay_checkpoint::fold::{FoldConfig, FoldState, FoldTarget, Folder};
use belay_checkpoint::guest::{DirtyTracker, Epoch, Guest, GuestError, Packet, RamBlock, TrackerKind};
use belay_checkpoint::outbox::{Bounds, Emitter, Outbox};
use belay_checkpoint::policy::FixedPeriod;
use belay_checkpoint::record::{Limits, largest_record};
use belay_checkpoint::ring::{Mailbox, OWNER_REGION_BYTES, OwnerRegion, RingReader, RingShape, RingWriter};
use belay_checkpoint::staging::Slot;
use belay_checkpoint::tracker::{UffdWpTracker, WhoseMemory, write_protection};
use belay_transport::fabric::LaneKind;
use belay_transport::pull::{Discard, Engine, Install};
use belay_transport::region::{Mapping, RamFile};
use belay_transport::uffd::OpenMode;
use belay_transport::{Deadline, PAGE_SIZE, PageIndex, PageSize, RegionId};
use belay_vmm_glue::kvm::guests::{Filler, GuestSpec, METRONOME_LOG_ENTRIES, Program};
use belay_vmm_glue::kvm::{BareGuest, DEFAULT_RING_ENTRIES, KvmGuest, KvmOptions, SharedGuest, Tracking, registration};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

const REGION: RegionId = RegionId(0);
const RING_BYTES: usize = 64 << 20;
const NONCE: u64 = 0xbe1a_7be1_a7be_1a71;
/// What a missed look at the guest's log may take before a round is given up.
const LOG_BOUND: Duration = Duration::from_millis(5);

/// See the module. The tether is idle unless a checkpoint is asked for.
pub struct Tethered {
    tether: Tether,
    folder: Folder,
    pub guest: SharedGuest,
    /// The tracker, for harvests that no epoch takes.
    pub tracker: LentTracker,
    pub clock: GuestClock,
    epochs: Arc<Epochs>,
    source: Source,
    alias: Arc<Mapping>,
    // Dropped last: until then every fault is served.
    _engine: Arc<Engine>,
    _ends: Ends,
}

/// A guest that dirties `steps` scattered pages, watches its clock, and begins again.
fn metronome(memory_bytes: u64, steps: u64) -> GuestSpec {
    GuestSpec {
        program: Program::Metronome,
        memory_bytes,
        working_set_bytes: memory_bytes / 2,
        rate_pages_per_s: 0,
        batch_steps: steps,
        packet_interval_steps: steps,
        filled_of_256: 256,
        filler: Filler::Host,
        ..GuestSpec::default()
    }
}

impl Tethered {
    /// The guest dirties `steps` scattered pages and then watches its clock for `watch`, again and again.
    pub fn new(
        carrier: &Carrier,
        kind: TrackerKind,
        memory_bytes: u64,
        steps: u64,
        watch: Duration,
    ) -> Result<Self, BenchError> {
        let mut spec = metronome(memory_bytes, steps);
        let tracking = match kind {
            TrackerKind::KvmLog => Tracking::Log,
            TrackerKind::KvmRing => Tracking::Ring { entries: DEFAULT_RING_ENTRIES },
            TrackerKind::UffdWp | TrackerKind::UffdSync => Tracking::None,
        };
        let options = KvmOptions { tracking, irqchip: false };
        let outbox = Outbox::commit(Bounds { bytes: 1 << 20, packets: 4096 }, Box::new(Nowhere));
        let outbox = Arc::new(outbox.map_err(BenchError::io("starting the outbox"))?);

        // The source: where the guest starts, and is saved at the switch.
        let source = Source::zeroed(memory_bytes as usize)?;
        let vm = |spec: &GuestSpec, file: &Arc<RamFile>, alias: &Arc<Mapping>| {
            KvmGuest::new(spec, &options, file.clone(), alias.clone(), outbox.sink())
        };
        let mut state = Vec::new();
        let khz = {
            let khz = vm(&spec, &source.file, &source.mapping)?.tsc_khz()?;
            spec.metronome_spin_ticks = watch.as_micros() as u64 * u64::from(khz) / 1000;
            let mut guest = vm(&spec, &source.file, &source.mapping)?;
            guest.boot()?;
            guest.save(&mut state)?;
            khz
        };

        // The destination: RAM, VMM, userfaultfd.
        let mut ends = Ends::new(carrier)?;
        let file = Arc::new(RamFile::memfd("bench-guest", memory_bytes as usize, PageSize::Small)?);
        file.preallocate(2, &|_| ())?;
        let alias = Arc::new(file.map().map_err(BenchError::io("mapping the guest"))?);
        let mut guest = vm(&spec, &file, &alias)?;
        let address = guest.vmm_memory().address();
        let protect = kind == TrackerKind::UffdWp;
        let whole = 0..memory_bytes;
        let mut uffds =
            registration::register(address, PageSize::Small, &[whole], write_protection(kind), OpenMode::All)?;
        let uffd = uffds.pop().expect("one shard was asked for");

        // The tether's memory is registered before the first lane opens.
        let ring = Ring::new()?;
        let keys = ends.owner.export_ring((&ring.file, &ring.mapping), (&ring.owner_file, &ring.owner))?;
        let shape = RingShape::of(RING_BYTES)?;
        let initiator = ends.initiator.as_mut();
        let slots = [Slot::new(initiator, RING_BYTES, shape)?, Slot::new(initiator, RING_BYTES, shape)?];
        let (mailbox, key) = (Mailbox::new(initiator)?, initiator.register_local(&alias)?);
        let install = if protect { Install::Tracked } else { Install::Clean };
        let landing = Landing { alias: alias.clone(), key, guest_address: address, uffd, install };
        let engine = Arc::new(rig::pull(&mut ends, &source, landing)?);
        let lane = ends.lane(LaneKind::Checkpoint, 0)?;
        let writer = RingWriter::new(lane, keys, RING_BYTES, NONCE, mailbox, soon())?;

        // The switch, and everything pulled.
        guest.load(&state)?;
        guest.set_incarnation(NONCE)?;
        let tracker = match kind {
            TrackerKind::UffdWp => Box::new(UffdWpTracker::new(WhoseMemory::Own, guest.memory())?),
            kind => guest.tracker(kind)?,
        };
        let pages = memory_bytes / PAGE_SIZE as u64;
        let mut tracker = LentTracker::new(tracker, pages);
        tracker.start()?;
        let log = guest_log(&spec, &alias, khz)?;
        let guest = SharedGuest::new(Box::new(guest));
        guest.clone().resume()?;
        engine.resume_background();
        engine.wait_all_landed(soon())?;

        let overflow = largest_record(pages);
        let home = RamBlock {
            id: REGION,
            page_size: PageSize::Small,
            file: source.file.clone(),
            alias: source.mapping.clone(),
            vmm_address: 0,
        };
        let limits = Limits::for_regions([(REGION, pages)]);
        let state = FoldState::new(FoldTarget::new(&[home])?, limits, state);
        let owner = OwnerRegion::new(ring.owner.clone());
        let reader = RingReader::new(RING_BYTES, NONCE, overflow as usize)?;
        let folder = Folder::start(FoldConfig::default(), ring.mapping.clone(), owner, reader, state)
            .map_err(BenchError::io("starting to fold"))?;
        let epochs = Arc::new(Epochs::default());
        let parts = TetherParts {
            guest: Box::new(Watched { guest: guest.clone(), clock: log.clone() }),
            tracker: Box::new(tracker.clone()),
            arrivals: Box::new(Pulled(engine.clone())),
            policy: Box::new(FixedPeriod(belay_checkpoint::policy::LONGEST_PERIOD)),
            outbox,
            writer,
            slots,
            observer: epochs.clone(),
            carried: None,
        };
        let config = TetherConfig { overflow_bytes: overflow, ..TetherConfig::default() };
        let tether = Tether::start(config, parts)?;
        Ok(Self { tether, folder, guest, tracker, clock: log, epochs, source, alias, _engine: engine, _ends: ends })
    }

    /// Waits until the guest begins a batch.
    pub fn wait_for_batch(&self) -> Result<(), BenchError> {
        const BOUND: Duration = Duration::from_secs(10);
        let (steps, deadline) = (self.guest.steps(), Deadline::after(BOUND));
        while self.guest.steps() == steps {
            if deadline.expired() {
                return Err(BenchError::NoSteps(BOUND));
            }
            std::thread::sleep(Duration::from_micros(500));
        }
        Ok(())
    }

    /// Takes a checkpoint and waits for its commit. What it cost, by the tether's clock.
    pub fn checkpoint(&self) -> Result<EpochStats, BenchError> {
        match self.tether.checkpoint_now(soon()) {
            Some(epoch) => Ok(self.epochs.of(epoch.0)),
            None => Err(BenchError::NoCommit { why: self.tether.failed() }),
        }
    }

    /// Waits until the source has folded it: until nobody works for it any more.
    pub fn wait_folded(&self, epoch: Epoch) -> Result<(), BenchError> {
        let folded = self.folder.wait_folded(epoch, soon()).folded;
        if folded < epoch { Err(BenchError::NoCommit { why: self.tether.failed() }) } else { Ok(()) }
    }

    /// Stops the guest and lets it go at once.
    pub fn stop_and_resume(&self) -> Result<(), BenchError> {
        let mut guest = Watched { guest: self.guest.clone(), clock: self.clock.clone() };
        guest.pause(soon())?;
        Ok(guest.resume()?)
    }

    /// Has the guest stand at its next batch, takes a last checkpoint, and compares all of the source's RAM with the guest's.
    pub fn finish(self) -> Result<(), BenchError> {
        let next = self.guest.steps().into_iter().max().unwrap_or(0) + 1;
        self.guest.lock().park_at_step(next)?;
        self.guest.lock().wait_parked(soon())?;
        let epoch = self.checkpoint()?.number();
        self.wait_folded(epoch)?;
        let (mut here, mut home) = (vec![0; PAGE_SIZE], vec![0; PAGE_SIZE]);
        for page in 0..self.alias.len() / PAGE_SIZE {
            self.alias.read(page * PAGE_SIZE, &mut here);
            self.source.mapping.read(page * PAGE_SIZE, &mut home);
            if here != home {
                return Err(BenchError::Stale { page, epoch });
            }
        }
        self.tether.stop()?;
        Ok(())
    }
}

/// Memory of the ring and of the owner's words.
struct Ring {
    file: RamFile,
    mapping: Arc<Mapping>,
    owner_file: RamFile,
    owner: Arc<Mapping>,
}

impl Ring {
    fn new() -> Result<Self, BenchError> {
        let file = RamFile::memfd("bench-ring", RING_BYTES, PageSize::Small)?;
        file.preallocate(2, &|_| ())?;
        let owner_file = RamFile::memfd("bench-owner", OWNER_REGION_BYTES, PageSize::Small)?;
        let map = |file: &RamFile| file.map().map_err(BenchError::io("mapping the ring")).map(Arc::new);
        let (mapping, owner) = (map(&file)?, map(&owner_file)?);
        OwnerRegion::new(owner.clone());
        Ok(Self { file, mapping, owner_file, owner })
    }
}

/// The metronome's log of gaps in the guest's own clock.
#[derive(Clone)]
pub struct GuestClock {
    memory: Arc<Mapping>,
    at: usize,
    khz: u32,
    last: Arc<Stop>,
}

/// The last stop, by the host's clock.
#[derive(Default)]
struct Stop {
    since: Mutex<Option<Instant>>,
    /// Gaps logged before the resume, and for how long the guest had certainly stood still by then, in ns: the first gap after
    /// those that is no shorter is this stop. (A gap may come between: the guest was just about to log it.)
    mark: AtomicU64,
    still_ns: AtomicU64,
}

fn guest_log(spec: &GuestSpec, alias: &Arc<Mapping>, khz: u32) -> Result<GuestClock, BenchError> {
    let layout = spec.layout().map_err(|error| GuestError::BadState(error.to_string()))?;
    let at = layout.metronome_log().offset();
    Ok(GuestClock { memory: alias.clone(), at, khz, last: Arc::default() })
}

impl GuestClock {
    fn logged(&self) -> u64 {
        self.memory.load_u64(self.at, Ordering::Acquire)
    }

    fn gap(&self, index: u64) -> Duration {
        let entry = self.at + 128 + (index % METRONOME_LOG_ENTRIES) as usize * 16;
        let ticks = self.memory.load_u64(entry + 8, Ordering::Acquire);
        Duration::from_nanos(ticks.saturating_mul(1_000_000) / u64::from(self.khz))
    }

    /// How long the last pause was for the guest. `None` when it was not watching then.
    pub fn last_pause(&self) -> Option<Duration> {
        let mut index = self.last.mark.load(Ordering::Acquire);
        let still = Duration::from_nanos(self.last.still_ns.load(Ordering::Acquire));
        let deadline = Deadline::after(LOG_BOUND);
        loop {
            while index < self.logged() {
                let gap = self.gap(index);
                if gap >= still {
                    return Some(gap);
                }
                index += 1;
            }
            if deadline.expired() {
                return None;
            }
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    fn stopped(&self) {
        *self.last.since.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    fn resuming(&self) {
        let since = self.last.since.lock().unwrap_or_else(PoisonError::into_inner).take();
        let still = since.map_or(Duration::ZERO, |since| since.elapsed());
        self.last.mark.store(self.logged(), Ordering::Release);
        self.last.still_ns.store(u64::try_from(still.as_nanos()).unwrap_or(u64::MAX), Ordering::Release);
    }
}

/// The guest as the tether sees it: notes when it stands still, and how many gaps it had logged by then.
struct Watched {
    guest: SharedGuest,
    clock: GuestClock,
}

impl Guest for Watched {
    fn pause(&mut self, deadline: Deadline) -> Result<(), GuestError> {
        self.guest.pause(deadline)?;
        self.clock.stopped();
        Ok(())
    }
    fn resume(&mut self) -> Result<(), GuestError> {
        self.clock.resuming();
        self.guest.resume()
    }
    fn save(&mut self, out: &mut Vec<u8>) -> Result<(), GuestError> {
        self.guest.save(out)
    }
    fn load(&mut self, state: &[u8]) -> Result<(), GuestError> {
        self.guest.load(state)
    }
    fn set_incarnation(&mut self, nonce: u64) -> Result<(), GuestError> {
        self.guest.set_incarnation(nonce)
    }
    fn memory(&self) -> &[RamBlock] {
        self.guest.memory()
    }
    fn tracker(&mut self, kind: TrackerKind) -> Result<Box<dyn DirtyTracker>, GuestError> {
        self.guest.tracker(kind)
    }
    fn device_writes(&mut self, into: &mut DirtySet) -> Result<(), GuestError> {
        self.guest.device_writes(into)
    }
}

/// A tracker with two hands on it: what the bench harvests for itself is in the next epoch all the same.
#[derive(Clone)]
pub struct LentTracker(Arc<Mutex<Lent>>);

struct Lent {
    tracker: Box<dyn DirtyTracker>,
    taken: DirtySet,
}

impl LentTracker {
    fn new(tracker: Box<dyn DirtyTracker>, pages: u64) -> Self {
        Self(Arc::new(Mutex::new(Lent { tracker, taken: DirtySet::new([(REGION, pages)]) })))
    }

    fn lock(&self) -> MutexGuard<'_, Lent> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One harvest that no epoch takes: how long it took and what it found. Guest paused.
    pub fn scan(&self) -> Result<(Duration, u64), GuestError> {
        let Lent { tracker, taken } = &mut *self.lock();
        let began = Instant::now();
        tracker.harvest(taken)?;
        Ok((began.elapsed(), taken.len()))
    }
}

impl DirtyTracker for LentTracker {
    fn kind(&self) -> TrackerKind {
        self.lock().tracker.kind()
    }
    fn sees_device_writes(&self) -> bool {
        self.lock().tracker.sees_device_writes()
    }
    fn start(&mut self) -> Result<(), GuestError> {
        self.lock().tracker.start()
    }
    fn harvest(&mut self, into: &mut DirtySet) -> Result<(), GuestError> {
        let Lent { tracker, taken } = &mut *self.lock();
        if !taken.is_empty() {
            into.merge(taken);
            taken.clear();
        }
        tracker.harvest(into)
    }
    fn sift(&mut self, dirty: &mut DirtySet, discards: &DirtySet) -> Result<(), GuestError> {
        self.lock().tracker.sift(dirty, discards)
    }
    fn dirty_so_far(&mut self) -> Option<u64> {
        self.lock().tracker.dirty_so_far()
    }
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

/// The last epoch that committed.
#[derive(Default)]
struct Epochs(Mutex<EpochStats>);

impl Epochs {
    fn of(&self, epoch: u64) -> EpochStats {
        // Told of right after the waiter is woken.
        loop {
            let last = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if last.epoch >= epoch {
                return last;
            }
            std::thread::yield_now();
        }
    }
}

impl EpochObserver for Epochs {
    fn committed(&self, stats: &EpochStats) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = *stats;
    }
}

/// Output goes nowhere, at once.
struct Nowhere;

impl Emitter for Nowhere {
    fn send(&mut self, _: &Packet) -> io::Result<()> {
        Ok(())
    }
}
