//! The engine alone: threads of this process that touch scattered pages, all at once, over one shard or several.

use crate::carrier::{Carrier, Device};
use crate::error::BenchError;
use crate::fault::scattered;
use crate::floor::PAGE;
use crate::report::{Better, Case, Latency, Measure, Role};
use crate::rig::{Ends, Source, soon};
use belay_transport::fabric::{FabricKind, LaneKind};
use belay_transport::pages::{PageStates, RegionGeometry};
use belay_transport::pull::{
    ClassRun, Engine, Install, LandingPlan, NoObserver, PageClass, PullPlan, RegionPlan, ShardParts, ShardRange, Tuning,
};
use belay_transport::region::{Extent, Mapping, RamFile};
use belay_transport::uffd::{Faults, Features, OpenMode, RegisterModes, Uffd};
use belay_transport::{PageSize, RegionId};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

const REGION: RegionId = RegionId(0);

pub const RATE: &str = "faults served";

/// What the threads of one round saw.
pub struct Served {
    took: Duration,
    /// Of every touch, in nanoseconds.
    touches: Vec<u64>,
}

impl Served {
    fn rate(&self) -> f64 {
        self.touches.len() as f64 / self.took.as_secs_f64()
    }

    fn p99_us(&self) -> f64 {
        let latency = Latency::of_samples("", Role::Ours, PAGE, &self.touches);
        latency.row.p99_us
    }
}

/// So many threads touch pages that nobody else touches, each the next as soon as it has one, until all are touched.
pub fn serve(threads: usize, shards: usize, quick: bool) -> Result<Served, BenchError> {
    let (len, touches) = if quick { (64 << 20, 4_096) } else { (256 << 20, 16_384) };
    let carrier = Carrier::within_this_host(FabricKind::Local, Device::default());
    let source = Source::new(len)?;
    let mut ends = Ends::new(&carrier)?;
    let (guest, engine) = start(&mut ends, &source, shards)?;
    let order = scattered(len / PAGE, touches);
    let shares: Vec<&[usize]> = order.chunks(order.len().div_ceil(threads)).collect();
    let ready = Barrier::new(shares.len() + 1);
    let touch = |pages: &[usize]| -> Result<Vec<u64>, BenchError> {
        let mut times = Vec::with_capacity(pages.len());
        ready.wait();
        for page in pages {
            let mut word = [0; 8];
            let began = Instant::now();
            guest.read(page * PAGE, &mut word);
            times.push(began.elapsed().as_nanos() as u64);
            let (found, expected) = (u64::from_ne_bytes(word), *page as u64 + 1);
            if found != expected {
                return Err(BenchError::Wrong { page: *page, found, expected });
            }
        }
        Ok(times)
    };
    let served = std::thread::scope(|scope| {
        let touchers: Vec<_> = shares.iter().map(|share| scope.spawn(|| touch(share))).collect();
        ready.wait();
        let began = Instant::now();
        let mut touches = Vec::with_capacity(order.len());
        for toucher in touchers {
            touches.extend(toucher.join().map_err(|_| BenchError::Thread("touching pages"))??);
        }
        Ok::<_, BenchError>(Served { took: began.elapsed(), touches })
    })?;
    engine.stop(soon())?;
    Ok(served)
}

/// An engine of so many shards, each with its part of memory, with its background paused.
fn start(ends: &mut Ends, source: &Source, shards: usize) -> Result<(Mapping, Engine), BenchError> {
    let len = source.mapping.len();
    let file = RamFile::memfd("bench-guest", len, PageSize::Small)?;
    let map = || file.map().map_err(BenchError::io("mapping the guest"));
    let (alias, guest) = (Arc::new(map()?), map()?);
    file.preallocate_through(&alias, 2, &|_| ())?;
    let extent = Extent { offset: 0, len: len as u64 };
    let remote = ends.owner.export_read(&source.file, &source.mapping, &[extent])?;
    let key = ends.initiator.register_local(&alias)?;
    let (frames, mut parts) = ((len / PAGE) as u64, Vec::new());
    for shard in 0..shards as u64 {
        let range = frames * shard / shards as u64..frames * (shard + 1) / shards as u64;
        let uffd = Uffd::open(OpenMode::All, Features::MINOR_SHMEM.union(Features::MISSING_SHMEM))?;
        let modes = RegisterModes { faults: Faults::MissingAndMinor, write_protect: false };
        let page = PAGE as u64;
        uffd.register(guest.address() + range.start * page, (range.end - range.start) * page, modes)?;
        let lane = shard as u16;
        let (fault, bulk) = (ends.lane(LaneKind::Fault, lane)?, ends.lane(LaneKind::Bulk, lane)?);
        let ranges = vec![ShardRange { region: REGION, frames: range }];
        parts.push(ShardParts { uffd, fault, bulk, ranges, core: None });
    }
    let region = RegionPlan {
        id: REGION,
        page_size: PageSize::Small,
        vmm_address: guest.address(),
        bytes: len as u64,
        landing: LandingPlan::InPlace { alias, key, whole: false },
        remote,
        classes: vec![ClassRun { class: PageClass::Peer, frames }],
    };
    let (install, tuning) = (Install::Clean, Tuning::default());
    let plan = PullPlan { regions: vec![region], install, tuning, start_paused: true, log: None };
    let geometry = RegionGeometry { id: REGION, page_size: PageSize::Small, frames };
    let states = Arc::new(PageStates::in_memory(&[geometry])?);
    Ok((guest, Engine::start(plan, parts, states, Arc::new(NoObserver))?))
}

/// All rounds of so many threads and shards, each beside one thread and one shard.
pub fn case(threads: u64, shards: u64, all: &[(Served, Served)]) -> Case {
    let mut case = Case::new("the engine alone").with("threads", threads).with("shards", shards);
    let touches = |of: fn(&(Served, Served)) -> &Served| -> Vec<u64> {
        all.iter().flat_map(|round| of(round).touches.iter().copied()).collect()
    };
    case.latencies.push(Latency::of_samples("touch, all threads", Role::Ours, PAGE, &touches(|round| &round.0)));
    case.latencies.push(Latency::of_samples(
        "touch, one thread, one shard",
        Role::Peer,
        PAGE,
        &touches(|round| &round.1),
    ));
    let rounds = |of: &dyn Fn(&(Served, Served)) -> f64| all.iter().map(of).collect::<Vec<f64>>();
    let rate = Measure::new(RATE, "1/s", Better::Higher, rounds(&|(ours, _)| ours.rate()));
    let one = "one thread, one shard";
    case.measures.push(rate.beside(one, rounds(&|(_, alone)| alone.rate())));
    let p99 = Measure::new("touch 99%", "us", Better::Lower, rounds(&|(ours, _)| ours.p99_us()));
    case.measures.push(p99.beside(one, rounds(&|(_, alone)| alone.p99_us())));
    case
}
