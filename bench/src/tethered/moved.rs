//! A metronome guest that has moved, all of its pages with it, and does one batch of work at a time.

use super::clock::{GuestClock, Watched};
use super::lent::LentTracker;
use super::{NONCE, REGION, Shape};
use crate::carrier::Carrier;
use crate::error::BenchError;
use crate::rig::{self, Ends, Landing, Source, soon};
use belay_checkpoint::guest::{DirtyTracker, Epoch, Guest, GuestError, Packet, RamBlock, TrackerKind};
use belay_checkpoint::outbox::{Bounds, Emitter, Outbox};
use belay_checkpoint::tracker::{Groups, UffdSyncTracker, UffdWpTracker, WhoseMemory, WriteFaults, write_protection};
use belay_transport::fabric::LaneKind;
use belay_transport::pull::{Engine, Install, NoObserver, Observer, ShardRange, Tuning};
use belay_transport::region::{Extent, Mapping, RamFile};
use belay_transport::uffd::{OpenMode, Uffd};
use belay_transport::{Deadline, PAGE_SIZE, PageIndex, PageSize, RegionId};
use belay_vmm_glue::kvm::guests::rules::{self, Pattern};
use belay_vmm_glue::kvm::guests::{Filler, GuestSpec, Layout, Program};
use belay_vmm_glue::kvm::{BareGuest, DEFAULT_RING_ENTRIES, KvmGuest, KvmOptions, SharedGuest, Tracking, registration};
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How long the guest watches its clock after a batch.
const WATCH: Duration = Duration::from_millis(30);
/// Into the watch: stopped here, the guest is certainly watching, and goes on to for long enough to see that it was.
const INTO: Duration = Duration::from_millis(4);
/// A batch that takes no longer is waited for awake, so that its time is its own and not a sleep's.
const AWAKE: Duration = Duration::from_millis(2);

/// See the module. It stands, parked, between two batches.
pub struct Moved {
    pub guest: SharedGuest,
    pub clock: GuestClock,
    pub outbox: Arc<Outbox>,
    pub tracker: Option<LentTracker>,
    /// Where it came from, and its device state of then.
    pub source: Source,
    pub state: Vec<u8>,
    pub alias: Arc<Mapping>,
    /// Of its memory, where its vCPUs have it mapped.
    pub vmm_address: u64,
    pub spec: GuestSpec,
    layout: Layout,
    // Dropped last: until then every fault is served.
    pub engine: Arc<Engine>,
    pub ends: Ends,
}

impl Moved {
    /// Moves it. `prepare` registers what else is to be registered before the first lane opens.
    pub fn new<T>(
        carrier: &Carrier,
        shape: &Shape,
        kind: Option<TrackerKind>,
        prepare: impl FnOnce(&mut Ends) -> Result<T, BenchError>,
    ) -> Result<(Self, T), BenchError> {
        let memory_bytes = shape.memory_bytes;
        let mut spec = metronome(shape);
        let tracking = match kind {
            Some(TrackerKind::KvmLog) => Tracking::Log,
            Some(TrackerKind::KvmRing) => Tracking::Ring { entries: DEFAULT_RING_ENTRIES },
            Some(TrackerKind::UffdWp | TrackerKind::UffdSync) | None => Tracking::None,
        };
        let options = KvmOptions { tracking, irqchip: false };
        let outbox = outbox()?;

        // The source: where the guest starts, and is saved at the switch.
        let source = Source::zeroed(memory_bytes as usize)?;
        let vm = |spec: &GuestSpec, file: &Arc<RamFile>, alias: &Arc<Mapping>| {
            KvmGuest::new(spec, &options, file.clone(), alias.clone(), outbox.sink())
        };
        let mut state = Vec::new();
        let khz = {
            let khz = vm(&spec, &source.file, &source.mapping)?.tsc_khz()?;
            spec.metronome_spin_ticks = WATCH.as_micros() as u64 * u64::from(khz) / 1000;
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
        let whole = 0..memory_bytes;
        let protection = kind.and_then(write_protection);
        let mut uffds = registration::register(address, PageSize::Small, &[whole], protection, OpenMode::All)?;
        let uffd = uffds.pop().expect("one shard was asked for");
        let prepared = prepare(&mut ends)?;
        let key = ends.initiator.register_local(&alias)?;

        let pages = memory_bytes / PAGE_SIZE as u64;
        let writes = match kind {
            Some(TrackerKind::UffdSync) => {
                let frames = ShardRange { region: REGION, frames: 0..pages };
                let watched = uffd.try_clone()?;
                Some(Arc::new(WriteFaults::new(guest.memory(), &[(watched, vec![frames])], Groups::Adaptive)?))
            }
            _ => None,
        };
        let install = match kind {
            Some(TrackerKind::UffdWp) => Install::Tracked,
            Some(TrackerKind::UffdSync) => Install::Protected,
            _ => Install::Clean,
        };
        let landing = Landing { alias: alias.clone(), key, guest_address: address, uffd, install };
        let extent = Extent { offset: 0, len: memory_bytes };
        let remote = ends.owner.export_read(&source.file, &source.mapping, &[extent])?;
        let lanes = (ends.lane(LaneKind::Fault, 0)?, ends.lane(LaneKind::Bulk, 0)?);
        let observer: Arc<dyn Observer> = match &writes {
            Some(writes) => Arc::new(Answers(writes.clone())),
            None => Arc::new(NoObserver),
        };
        let engine = Arc::new(rig::engine_told(lanes, remote, landing, Tuning::default(), observer)?);

        // The switch, and everything pulled.
        guest.load(&state)?;
        guest.set_incarnation(NONCE)?;
        let tracker = match kind {
            None => None,
            Some(kind) => {
                let tracker: Box<dyn DirtyTracker> = match (kind, writes) {
                    (TrackerKind::UffdWp, _) => Box::new(UffdWpTracker::new(WhoseMemory::Own, guest.memory())?),
                    (TrackerKind::UffdSync, Some(writes)) => Box::new(UffdSyncTracker::new(guest.memory(), writes)?),
                    (kind, _) => guest.tracker(kind)?,
                };
                let mut tracker = LentTracker::new(tracker, pages);
                tracker.start()?;
                Some(tracker)
            }
        };
        let clock = GuestClock::new(&spec, &alias, khz)?;
        let layout = spec.layout().map_err(|error| GuestError::BadState(error.to_string()))?;
        let mut guest = SharedGuest::new(Box::new(guest));
        guest.lock().park_at_step(0)?;
        guest.resume()?;
        engine.resume_background();
        engine.wait_all_landed(soon())?;
        guest.lock().wait_parked(soon())?;
        let vmm_address = address;
        let moved =
            Self { guest, clock, outbox, tracker, source, state, alias, vmm_address, spec, layout, engine, ends };
        Ok((moved, prepared))
    }

    /// The guest dirties its pages; how long that took. It watches its clock when this returns, and then parks.
    pub fn batch(&self) -> Result<Duration, BenchError> {
        const BOUND: Duration = Duration::from_secs(30);
        let done = self.guest.steps().first().copied().unwrap_or_default();
        let next = done + self.spec.batch_steps;
        // The word that is written last tells when all are.
        let own = self.layout.own_pages(0);
        let (page, word, _) =
            rules::step(Pattern::Random, rules::step_seed(self.spec.seed, 0), next - 1, own.end - own.start);
        let at = PageIndex(own.start + page).offset() + word * 8;
        let look = || self.alias.load_u64(at, Ordering::Acquire);
        let (before, deadline, began) = (look(), Deadline::after(BOUND), Instant::now());
        self.guest.lock().park_at_step(next)?;
        while look() == before {
            if deadline.expired() {
                return Err(BenchError::NoSteps(BOUND));
            }
            if began.elapsed() > AWAKE {
                std::thread::sleep(Duration::from_micros(50));
            } else {
                std::thread::yield_now();
            }
        }
        let took = began.elapsed();
        std::thread::sleep(INTO);
        Ok(took)
    }

    /// Waits until it stands between two batches.
    pub fn parked(&self) -> Result<(), BenchError> {
        self.guest.lock().wait_parked(soon())?;
        Ok(())
    }

    /// Stops the guest and lets it go at once.
    pub fn stop_and_resume(&self) -> Result<(), BenchError> {
        let mut guest = Watched { guest: self.guest.clone(), clock: self.clock.clone() };
        guest.pause(soon())?;
        Ok(guest.resume()?)
    }

    /// A guest over the source's memory, to be loaded into.
    pub fn at_home(&self) -> Result<KvmGuest, BenchError> {
        let options = KvmOptions { tracking: Tracking::None, irqchip: false };
        let (file, alias) = (self.source.file.clone(), self.source.mapping.clone());
        Ok(KvmGuest::new(&self.spec, &options, file, alias, outbox()?.sink())?)
    }

    /// Guest RAM at the source.
    pub fn home(&self) -> RamBlock {
        RamBlock {
            id: REGION,
            page_size: PageSize::Small,
            file: self.source.file.clone(),
            alias: self.source.mapping.clone(),
            vmm_address: 0,
        }
    }
}

/// Whether all of the source's RAM, as of `epoch`, is what the guest's is: `alias` maps it, and it stands still.
pub fn compare(source: &Source, alias: &Mapping, epoch: Epoch) -> Result<(), BenchError> {
    let (mut here, mut home) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    for at in (0..alias.len()).step_by(here.len()) {
        let len = here.len().min(alias.len() - at);
        alias.read(at, &mut here[..len]);
        source.mapping.read(at, &mut home[..len]);
        if here[..len] != home[..len] {
            let byte = (0..len).find(|&byte| here[byte] != home[byte]).unwrap_or_default();
            return Err(BenchError::Stale { page: (at + byte) / PAGE_SIZE, epoch });
        }
    }
    Ok(())
}

/// A guest that dirties scattered pages, watches its clock, and begins again.
fn metronome(shape: &Shape) -> GuestSpec {
    let working_set_bytes = shape.memory_bytes / 2;
    let steps = steps_for(shape.pages, working_set_bytes / PAGE_SIZE as u64);
    GuestSpec {
        program: Program::Metronome,
        memory_bytes: shape.memory_bytes,
        working_set_bytes,
        rate_pages_per_s: 0,
        batch_steps: steps,
        packet_interval_steps: steps,
        filled_of_256: 256,
        filler: Filler::Host,
        ..GuestSpec::default()
    }
}

/// Scattered steps that meet `pages` different ones of `of`, on average.
pub fn steps_for(pages: u64, of: u64) -> u64 {
    let share = (pages as f64 / of as f64).min(0.999);
    (-(of as f64) * (1.0 - share).ln()).round().max(1.0) as u64
}

fn outbox() -> Result<Arc<Outbox>, BenchError> {
    let outbox = Outbox::commit(Bounds { bytes: 1 << 20, packets: 4096 }, Box::new(Nowhere));
    Ok(Arc::new(outbox.map_err(BenchError::io("starting the outbox"))?))
}

/// The pull engine's ears, for synchronous tracking.
struct Answers(Arc<WriteFaults>);

impl Observer for Answers {
    fn shown_again(&self, region: RegionId, page: PageIndex) {
        self.0.shown_again(region, page);
    }

    fn write_fault(&self, _: &Uffd, region: RegionId, page: PageIndex) -> bool {
        self.0.answer(region, page)
    }
}

/// Output goes nowhere, at once.
struct Nowhere;

impl Emitter for Nowhere {
    fn send(&mut self, _: &Packet) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn so_many_steps_dirty_as_many_pages_as_were_asked_for() {
        for (pages, of) in [(10, 32_768), (1_000, 32_768), (20_000, 32_768), (100_000, 131_072)] {
            let seed = rules::step_seed(1, 0);
            let mut met = vec![false; of as usize];
            (0..steps_for(pages, of))
                .for_each(|step| met[rules::step(Pattern::Random, seed, step, of).0 as usize] = true);
            let met = met.iter().filter(|met| **met).count() as f64;
            assert!((0.97..1.03).contains(&(met / pages as f64)), "{met} of {pages}");
        }
    }
}
