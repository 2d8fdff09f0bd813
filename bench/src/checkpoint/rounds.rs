//! The rounds of one case: ours and its floors by turns.

use super::{MIB, Tracker};
use crate::carrier::Carrier;
use crate::error::BenchError;
use crate::floor::{PAGE, Scan, Scattered};
use crate::profile::threads_named;
use crate::report::{Better, Case, Latency, Measure, Role};
use crate::rig::soon;
use crate::table::median;
use crate::tethered::{Moved, Shape, Tethered};
use belay_checkpoint::epoch::EpochStats;
use belay_checkpoint::guest::Guest;
use std::os::fd::AsFd;
use std::time::Duration;

/// Rounds in which caches, page tables and the tether settle.
const WARM_UP: u64 = 2;
/// What the guest must have dirtied of what it was to: otherwise it was still at work when it was stopped.
const LEAST: f64 = 0.9;

/// Rounds that may be dropped for each that is kept, before nothing can be said.
const MOST_DROPPED: u64 = 5;

pub const COPY: &str = "floor: memcpy of scattered pages";
pub const STOP: &str = "floor: stop, resume, guest's clock";
pub const SCAN: &str = "floor: the tracker alone";
const LOOK: &str = "floor: PAGEMAP_SCAN, one thread";
pub const PAUSE: &str = "pause, guest's clock";
pub const SLOWED: &str = "batch of writes, over untethered";
pub const A_GIB: &str = "the tracker alone, a GiB";

/// One round.
struct Round {
    copy: Duration,
    bare_stop: Duration,
    scan: Duration,
    /// Where PAGEMAP_SCAN is what the tracker asks.
    look: Option<Duration>,
    pause: Duration,
    batch: Duration,
    epoch: EpochStats,
}

/// Time of a batch of the same guest with nobody tracking it, a round each, in nanoseconds.
pub fn untethered(carrier: &Carrier, shape: &Shape, rounds: u64) -> Result<f64, BenchError> {
    let (moved, ()) = Moved::new(carrier, shape, None, |_| Ok(()))?;
    let mut times = Vec::new();
    for at in 0..rounds + WARM_UP {
        let took = moved.batch()?;
        moved.parked()?;
        if at >= WARM_UP {
            times.push(took.as_nanos() as f64);
        }
    }
    Ok(median(&times))
}

/// All rounds of one case. `alone`: time of a batch untethered, in nanoseconds.
pub fn measure(
    carrier: &Carrier,
    tracker: Tracker,
    shape: &Shape,
    rounds: u64,
    alone: f64,
) -> Result<Case, BenchError> {
    let rig = Tethered::new(carrier, tracker.kind(), shape)?;
    let scattered = Scattered::over(rig.moved.source.file.as_fd(), shape.memory_bytes as usize, shape.pages as usize);
    let mut scattered = scattered.map_err(BenchError::io("the floor's memory"))?;
    let mut look = match tracker {
        Tracker::UffdWp => Some(Scan::new().map_err(BenchError::io("open /proc/self/pagemap"))?),
        Tracker::KvmRing | Tracker::KvmLog | Tracker::UffdSync => None,
    };
    let threads = threads_named("belay-scan-").map_err(BenchError::io("list threads"))?.len().max(1);
    let (mut all, mut dropped) = (Vec::new(), 0_u64);
    for _ in 0..WARM_UP {
        round(&rig, shape, &mut scattered, look.as_mut())?;
    }
    while (all.len() as u64) < rounds {
        match round(&rig, shape, &mut scattered, look.as_mut())? {
            Some(round) => all.push(round),
            None => dropped += 1,
        }
        if dropped > MOST_DROPPED * rounds {
            return Err(BenchError::TooNoisy { dropped: dropped as usize, rounds: rounds as usize + dropped as usize });
        }
    }
    rig.finish()?;
    let case = Case::new("checkpoint")
        .with("tracker", tracker)
        .with("memory", format!("{} MiB", shape.memory_bytes / MIB))
        .with("pages", shape.pages)
        .with("staging", "copy")
        .with("fabric", carrier.only.map_or_else(|| "any".to_owned(), |kind| kind.to_string()));
    let mut case = filled(case, shape, &all, alone, threads);
    case.measures.push(Measure::new("rounds dropped", "", Better::Lower, vec![dropped as f64]));
    Ok(case)
}

/// One round; none when the guest was not watching its clock at some stop.
fn round(
    rig: &Tethered,
    shape: &Shape,
    scattered: &mut Scattered,
    look: Option<&mut Scan>,
) -> Result<Option<Round>, BenchError> {
    let moved = &rig.moved;
    let copy = scattered.copy();
    let batch = moved.batch()?;
    let epoch = rig.checkpoint()?;
    moved.parked()?;
    let pause = moved.clock.last_pause();
    rig.wait_folded(epoch.number())?;

    // The tracker alone, with as many dirty pages; the epoch that holds them is not measured.
    moved.batch()?;
    moved.stop_and_resume()?;
    moved.parked()?;
    let bare_stop = moved.clock.last_pause();
    moved.guest.clone().pause(soon())?;
    let looked = look.map(|look| look.look(moved.vmm_address, shape.memory_bytes)).transpose();
    let scanned = rig.tracker.scan();
    moved.guest.clone().resume()?;
    let look = looked.map_err(BenchError::io("PAGEMAP_SCAN"))?;
    let (scan, found) = scanned?;
    let between = rig.checkpoint()?.number();
    rig.wait_folded(between)?;

    let least = (shape.pages as f64 * LEAST) as u64;
    let whole = epoch.pages >= least && found >= least;
    let times = pause.zip(bare_stop).filter(|_| whole);
    Ok(times.map(|(pause, bare_stop)| Round { copy, bare_stop, scan, look, pause, batch, epoch }))
}

fn filled(mut case: Case, shape: &Shape, all: &[Round], alone: f64, threads: usize) -> Case {
    let bytes = shape.pages as usize * PAGE;
    let ns = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    let us = |time: Duration| time.as_secs_f64() * 1e6;
    let mut latency = |name: &str, role, of: &dyn Fn(&Round) -> Option<Duration>| {
        let samples: Vec<u64> = all.iter().filter_map(of).map(ns).collect();
        if !samples.is_empty() {
            case.latencies.push(Latency::of_samples(name, role, bytes, &samples));
        }
    };
    latency(COPY, Role::Floor, &|round| Some(round.copy));
    latency(STOP, Role::Floor, &|round| Some(round.bare_stop));
    latency(SCAN, Role::Floor, &|round| Some(round.scan));
    latency(LOOK, Role::Floor, &|round| round.look);
    latency(PAUSE, Role::Ours, &|round| Some(round.pause));
    latency("pause, tether's clock", Role::Ours, &|round| Some(round.epoch.pause.total()));
    latency("  stop", Role::Ours, &|round| Some(round.epoch.pause.stop));
    latency("  save", Role::Ours, &|round| Some(round.epoch.pause.save));
    latency("  harvest", Role::Ours, &|round| Some(round.epoch.pause.harvest));
    latency("  stage", Role::Ours, &|round| Some(round.epoch.pause.stage));
    latency("  resume", Role::Ours, &|round| Some(round.epoch.pause.resume));
    latency("made ready before it", Role::Ours, &|round| Some(round.epoch.ahead));
    latency("commit, after the resume", Role::Ours, &|round| Some(round.epoch.commit));
    latency("age at commit", Role::Ours, &|round| Some(round.epoch.age));

    let rounds = |of: &dyn Fn(&Round) -> f64| all.iter().map(of).collect::<Vec<f64>>();
    let lower = |name: &str, unit: &str, rounds| Measure::new(name, unit, Better::Lower, rounds);
    let floors = rounds(&|round| us(round.copy + round.bare_stop + round.scan));
    case.measures
        .push(lower(PAUSE, "us", rounds(&|round| us(round.pause))).beside("the three floors together", floors));
    let copies = rounds(&|round| us(round.copy));
    case.measures.push(lower("age at commit", "us", rounds(&|round| us(round.epoch.age))).beside(COPY, copies));
    case.measures.push(lower("dirty pages sent", "", rounds(&|round| round.epoch.pages as f64)));
    let bytes = |round: &Round| round.epoch.bytes as f64 / round.epoch.pages.max(1) as f64;
    case.measures.push(lower("bytes sent a page", "B", rounds(&bytes)));
    case.measures.push(lower(SLOWED, "", rounds(&|round| round.batch.as_nanos() as f64 / alone)));
    let gib = shape.memory_bytes as f64 / (1 << 30) as f64;
    if all.iter().any(|round| round.look.is_some()) {
        case.measures.push(lower("scanning threads", "", vec![threads as f64; all.len()]));
        let looks = rounds(&|round| us(round.look.unwrap_or_default()) / gib);
        case.measures.push(lower(A_GIB, "us", rounds(&|round| us(round.scan) / gib)).beside(LOOK, looks));
    }
    case
}
