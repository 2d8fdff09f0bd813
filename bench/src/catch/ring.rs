//! A catch of what is left in the ring, both hosts in one process: the fold and the revocation are the source's own.

use crate::carrier::Carrier;
use crate::error::BenchError;
use crate::floor::{PAGE, Scattered};
use crate::report::{Better, Case, Latency, Measure, Role};
use crate::rig::soon;
use crate::tethered::{Moved, Shape, Tethered, compare};
use belay_checkpoint::guest::{Guest, TrackerKind};
use belay_checkpoint::record::largest_record;
use belay_transport::fabric::RevokedRing;
use belay_vmm_glue::kvm::BareGuest;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// Incarnation of the guest that was caught.
const NONCE: u64 = 0xca06_4700_0000_0001;
/// For what a destination leaves behind to be gone.
const SETTLED: Duration = Duration::from_millis(100);
const LEAST_RING: u64 = 64 << 20;
const LEAST_MEMORY: u64 = 256 << 20;

pub const FOLDED: &str = "folded";
pub const BESIDE: &str = "noticed to running, without the fold";
const FLOOR: &str = "floor: memcpy of the pages, one thread";

/// One catch.
pub struct Caught {
    /// That were left to fold.
    pages: u64,
    revoked: Duration,
    /// Of that, until the folding thread had stopped.
    stopping: Duration,
    folded: Duration,
    loaded: Duration,
    running: Duration,
    copy: Duration,
}

/// Has a guest commit `pages` pages in so many epochs, of which none is folded, takes its destination away, and catches it.
pub fn catch(carrier: &Carrier, pages: u64, epochs: u64) -> Result<Caught, BenchError> {
    let an_epoch = pages.div_ceil(epochs);
    // Scattered over half of it, and so few that most lie alone.
    let memory_bytes = (pages * PAGE as u64 * 5 / 2).next_power_of_two().max(LEAST_MEMORY);
    let records = largest_record(an_epoch * 5 / 4 + 64) * epochs;
    let ring_bytes = (records + records / 16).next_multiple_of(LEAST_RING) as usize;
    let overflow_bytes = largest_record((an_epoch * 5 / 2).max(1 << 14).min(memory_bytes / PAGE as u64));
    let shape = Shape { memory_bytes, pages: an_epoch, ring_bytes, overflow_bytes };
    let rig = Tethered::new(carrier, TrackerKind::KvmRing, &shape)?;
    // The first batch met pages for the first time: it is no part of this.
    let settled = rig.checkpoint()?.number();
    rig.wait_folded(settled)?;
    rig.hold();
    let (before, mut newest) = (rig.pages_committed(), settled);
    for _ in 0..epochs {
        rig.moved.batch()?;
        rig.moved.parked()?;
        newest = rig.checkpoint()?.number();
    }
    let committed = rig.pages_committed() - before;
    let mut home = rig.moved.at_home()?;
    let (moved, folder) = rig.silence()?;
    let Moved { engine, ends, source, alias, spec, guest: _lost, .. } = moved;
    drop(engine);
    let (mut owner, _session) = ends.lose_destination();
    // In one process its end would be counted as the source's time.
    std::thread::sleep(SETTLED);

    let began = Instant::now();
    let (mut catch, mut recovered, mut folded) = (Some(folder.stop()), None, Duration::ZERO);
    let mut last_read = |ring: RevokedRing<'_>| {
        let began = Instant::now();
        recovered = catch.take().map(|catch| catch.finish(&ring));
        folded = began.elapsed();
    };
    owner.revoke(&mut last_read, soon())?;
    let revoked = began.elapsed() - folded;
    let refused = |why: String| BenchError::Refused { why };
    let recovered = recovered.ok_or_else(|| refused("the ring was not read".to_owned()))?;
    let recovered = recovered.map_err(|error| refused(format!("the catch failed: {error}")))?;
    let began = Instant::now();
    home.load(&recovered.device_state)?;
    let loaded = began.elapsed();
    // As it is where it is to go on: every byte, of the newest epoch.
    if recovered.epoch != newest || recovered.timings.pages != committed {
        return Err(refused(format!(
            "{} with {} pages was caught, {newest} with {committed} had committed",
            recovered.epoch, recovered.timings.pages
        )));
    }
    compare(&source, &alias, recovered.epoch)?;
    let done = home.steps()?.first().copied().unwrap_or_default();
    home.park_at_step(done + spec.batch_steps)?;
    let began = Instant::now();
    home.set_incarnation(NONCE)?;
    home.resume()?;
    let running = began.elapsed();
    home.wait_parked(soon())?;
    let now = home.steps()?.first().copied().unwrap_or_default();
    if now <= done {
        return Err(refused(format!("the guest that was caught stands at step {now}")));
    }
    let scattered = Scattered::over(source.file.as_fd(), memory_bytes as usize, pages as usize);
    let mut scattered = scattered.map_err(BenchError::io("the floor's memory"))?;
    scattered.copy();
    let copy = scattered.put_back();
    let stopping = recovered.timings.stopping;
    Ok(Caught { pages: committed, revoked, stopping, folded, loaded, running, copy })
}

/// What all catches of one kind took.
pub fn case(carrier: &Carrier, pages: u64, epochs: u64, all: &[Caught]) -> Case {
    let fabric = carrier.only.map_or_else(|| "any".to_owned(), |kind| kind.to_string());
    let mut case =
        Case::new("catch with pages in the ring").with("pages", pages).with("epochs", epochs).with("fabric", fabric);
    let bytes = pages as usize * PAGE;
    let mut latency = |name: &str, role, of: &dyn Fn(&Caught) -> Duration| {
        let samples: Vec<u64> = all.iter().map(|one| of(one).as_nanos() as u64).collect();
        case.latencies.push(Latency::of_samples(name, role, bytes, &samples));
    };
    latency(FLOOR, Role::Floor, &|one| one.copy);
    latency("revoked", Role::Ours, &|one| one.revoked);
    latency("  of that, the folder's stop", Role::Ours, &|one| one.stopping);
    latency("folded", Role::Ours, &|one| one.folded);
    latency("loaded", Role::Ours, &|one| one.loaded);
    latency("running", Role::Ours, &|one| one.running);
    latency("noticed to running", Role::Ours, &|one| one.revoked + one.folded + one.loaded + one.running);
    let rounds = |of: &dyn Fn(&Caught) -> Duration| all.iter().map(|one| of(one).as_secs_f64() * 1e3).collect();
    let lower = |name: &str, unit: &str, rounds| Measure::new(name, unit, Better::Lower, rounds);
    case.measures.push(lower(FOLDED, "ms", rounds(&|one| one.folded)).beside(FLOOR, rounds(&|one| one.copy)));
    case.measures.push(lower(BESIDE, "ms", rounds(&|one| one.revoked + one.loaded + one.running)));
    let whole = rounds(&|one| one.revoked + one.folded + one.loaded + one.running);
    case.measures.push(lower("noticed to running", "ms", whole));
    case.measures.push(lower("pages folded", "", all.iter().map(|one| one.pages as f64).collect()));
    case
}
