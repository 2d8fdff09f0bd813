//! `fault`, `pull`, `cpu`, `profile`: the pull engine over the wire, beside what bounds it, by turns in the same run.

use super::client::{Client, Met};
use super::lean;
use super::loops::{self, Amount, Waiting};
use super::protocol::{BULK, FAULT, Wanted};
use super::raw::{Reads, bandwidth, bare_reads};
use super::report::{Outcome, Ratio, SourceUse, Test};
use super::usage::Usage;
use super::{LEAST_RING, Options};
use crate::error::BenchError;
use crate::fault::{Side, mid, scattered, touch};
use crate::floor::{self, PAGE};
use crate::profile::{Profiler, copying_share, threads_named};
use crate::rig::{self, Landing, Shape, soon};
use crate::table::{self, Row};
use belay_transport::fabric::{FabricKind, Lane};
use belay_transport::pull::Engine;
use belay_transport::region::Mapping;
use std::time::{Duration, Instant};

/// Goals of the lab, where perftest measures the wire; here our own bare READs stand for it.
pub const FAULT_GOAL: f64 = 1.3;
pub const PULL_GOAL: f64 = 0.9;
/// Part of the engine's samples that may be in functions that copy: an operation's own few words.
const COPYING_GOAL: f64 = 0.01;
/// Kernel names of the engine's threads begin so.
const ENGINE_THREADS: &str = "pull-";
/// None, less what a timer of some library's may take.
const SOURCE_GOAL_NS: f64 = 10.0;
/// Bare READs of a fault round, over its touches.
const BARE_PART: usize = 2;
/// Window of the engine's lanes, as a migration opens them.
const LANE_WINDOW: usize = 64;

/// A session, memory that faults, and the two lanes its engine will have.
struct Round {
    met: Met,
    guest: Mapping,
    landing: Landing,
    reads: Reads,
    fault: Box<dyn Lane>,
    bulk: Box<dyn Lane>,
}

impl Round {
    fn new(client: &mut Client, bytes: usize, bare_bytes: usize) -> Result<Self, BenchError> {
        let wanted = Wanted { ram_bytes: bytes as u64, ring_bytes: LEAST_RING, lanes: vec![FAULT, BULK] };
        let mut met = client.meet(&wanted)?;
        let (guest, landing) = Landing::new(met.initiator.as_mut(), bytes)?;
        let reads = Reads::new(&mut met, bare_bytes)?;
        let (fault, bulk) = (met.lane(FAULT, LANE_WINDOW)?, met.lane(BULK, LANE_WINDOW)?);
        Ok(Self { met, guest, landing, reads, fault, bulk })
    }

    fn engine(self, options: &Options) -> Result<(Engine, Mapping, Met), BenchError> {
        let engine = rig::engine((self.fault, self.bulk), self.met.ram, self.landing, options.tuning)?;
        Ok((engine, self.guest, self.met))
    }
}

/// Demand faults served from the server, beside a bare READ and a bare userfaultfd.
pub fn fault(client: &mut Client, options: &Options) -> Result<Outcome, BenchError> {
    let pages = options.memory / PAGE;
    let touches = options.iterations.map_or(1_000, |n| n as usize).min(pages);
    let order = scattered(pages, touches);
    let floor_source = floor::Source::new(options.memory).map_err(BenchError::io("the floor's source"))?;
    let mut outcome = None;
    let [mut floors, mut waits, mut leans] = [(); 3].map(|()| floor::Faults::default());
    let mut bare = Vec::new();
    let (mut ours, mut loaded) = (Side::new(), Side::new());
    let (mut as_toucher, mut as_server, mut over_lean) = (Vec::new(), Vec::new(), Vec::new());
    let mut used = Usage::default();
    for _ in 0..options.rounds {
        let floor = floor::faults(floor::Wire::Memory, &floor_source, &order, Duration::ZERO);
        let floor = floor.map_err(BenchError::io("the floor's fault loop"))?;

        let mut round = Round::new(client, options.memory, PAGE.max(options.memory.min(16 << 20)))?;
        outcome.get_or_insert_with(|| Outcome::new(Test::Fault, &round.met));
        let one_bare = bare_reads(round.fault.as_mut(), &round.reads, (touches / BARE_PART).max(1) as u64)?;
        let wait = Duration::from_nanos(mid(&one_bare) as u64);
        let waiting = floor::faults(floor::Wire::Memory, &floor_source, &order, wait);
        let waiting = waiting.map_err(BenchError::io("the floor that waits"))?;
        let before = round.met.usage()?;
        let (engine, guest, met) = round.engine(options)?;
        let unloaded = touch(engine, &guest, &[&order], &Shape::default(), true)?.0;
        used.add(met.usage()?.since(&before));
        met.done()?;

        let Round { met, guest, landing, fault, bulk, .. } = Round::new(client, options.memory, PAGE)?;
        let one_lean = lean::faults(fault, met.ram, &landing, &guest, &order)?;
        drop((bulk, landing));
        met.done()?;

        let round = Round::new(client, options.memory, PAGE)?;
        let (engine, guest, met) = round.engine(options)?;
        loaded.add(touch(engine, &guest, &[&order], &Shape::default(), false)?.0);
        met.done()?;

        let p50 = unloaded.server.value_at_quantile(0.5) as f64;
        as_server.push(p50 / (mid(&one_bare) + mid(&floor.server)));
        over_lean.push(mid(&unloaded.toucher) / mid(&one_lean.toucher));
        as_toucher.push(mid(&unloaded.toucher) / (mid(&one_bare) + mid(&floor.toucher)));
        ours.add(unloaded);
        bare.extend(one_bare);
        floors.toucher.extend(floor.toucher);
        floors.server.extend(floor.server);
        leans.toucher.extend(one_lean.toucher);
        leans.server.extend(one_lean.server);
        waits.toucher.extend(waiting.toucher);
    }
    let mut outcome = outcome.ok_or_else(no_rounds)?;
    outcome.latency = vec![
        Row::of_samples("bare READ, polling", PAGE, &bare),
        Row::of_samples("uffd floor, serving thread", PAGE, &floors.server),
        Row::of_samples("uffd floor, touching thread", PAGE, &floors.toucher),
        Row::of_samples("uffd floor that waits like a READ", PAGE, &waits.toucher),
        Row::of_samples("lean loop, serving thread", PAGE, &leans.server),
        Row::of_samples("lean loop, touching thread", PAGE, &leans.toucher),
        Row::of_histogram("engine, serving thread", PAGE, &ours.server),
        Row::of_histogram("  queue (event read to posted)", PAGE, &ours.queue),
        Row::of_histogram("  wire (posted to completed)", PAGE, &ours.wire),
        Row::of_histogram("  install (completed to shown)", PAGE, &ours.install),
        Row::of_samples("engine, touching thread", PAGE, &ours.toucher),
        Row::of_histogram("engine under pull, serving thread", PAGE, &loaded.server),
        Row::of_samples("engine under pull, touching thread", PAGE, &loaded.toucher),
    ];
    let over_pull = loaded.server.value_at_quantile(0.99) as f64 / ours.server.value_at_quantile(0.5) as f64;
    outcome.ratios = vec![
        Ratio::at_most(
            "fault_over_read_and_uffd",
            "touching thread over bare READ + uffd floor",
            &as_toucher,
            FAULT_GOAL,
        ),
        Ratio::plain("engine_over_read_and_uffd", "serving thread over bare READ + uffd floor", &as_server),
        Ratio::plain("fault_over_lean_loop", "touching thread over the lean loop's", &over_lean),
        Ratio::plain("p99_loaded_over_unloaded_p50", "99% under pull over the median without", &[over_pull]),
    ];
    outcome.source.push(SourceUse::new(PAGE, (touches * options.rounds) as u64, used));
    Ok(outcome)
}

/// The engine's background pull, beside a bare stream of READs of its chunk's size and window.
pub fn pull(client: &mut Client, options: &Options) -> Result<Outcome, BenchError> {
    let chunk = options.tuning.chunk_bytes as usize;
    let (mut ours, mut bare, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    let mut outcome = None;
    let mut used = Usage::default();
    for _ in 0..options.rounds {
        let mut round = Round::new(client, options.memory, options.memory)?;
        outcome.get_or_insert_with(|| Outcome::new(Test::Pull, &round.met));
        round.reads.shape(chunk, false)?;
        let amount = Amount::Iterations((options.memory / chunk).max(1) as u64);
        let Round { reads, bulk, .. } = &mut round;
        let window = options.tuning.bulk_chunks;
        let streamed = loops::stream(bulk.as_mut(), window, Waiting::Polling, amount, &mut |lane, first, count| {
            reads.post(lane, first, count)
        })?;
        let before = round.met.usage()?;
        let (engine, guest, met) = round.engine(options)?;
        let start = Instant::now();
        engine.resume_background();
        engine.wait_all_landed(soon())?;
        let rate = options.memory as f64 / start.elapsed().as_secs_f64();
        engine.stop(soon())?;
        used.add(met.usage()?.since(&before));
        check(&guest)?;
        met.done()?;
        ratios.push(rate / (streamed.average_per_s * chunk as f64));
        ours.push(rate);
        bare.push(streamed);
    }
    let mut outcome = outcome.ok_or_else(no_rounds)?;
    let average: Vec<f64> = bare.iter().map(|streamed| streamed.average_per_s).collect();
    let peak = bare.iter().map(|streamed| streamed.peak_per_s).fold(0.0, f64::max);
    let operations = bare.iter().map(|streamed| streamed.operations).sum();
    let bare = loops::Streamed { operations, average_per_s: table::median(&average), peak_per_s: peak };
    let per_s = |rate: f64| rate / chunk as f64;
    let engine = loops::Streamed {
        operations,
        average_per_s: per_s(table::median(&ours)),
        peak_per_s: per_s(ours.iter().copied().fold(0.0, f64::max)),
    };
    outcome.bandwidth =
        vec![bandwidth("bare READs, chunk and window alike", chunk, bare), bandwidth("engine", chunk, engine)];
    outcome.ratios = vec![Ratio::at_least("pull_over_reads", "engine over bare READs", &ratios, PULL_GOAL)];
    outcome.source.push(SourceUse::new(PAGE, (options.memory / PAGE * options.rounds) as u64, used));
    Ok(outcome)
}

/// What the server's process spends on no pages, N pages and 4N pages, a part of them by demand.
pub fn cpu(client: &mut Client, options: &Options) -> Result<Outcome, BenchError> {
    let least = (options.memory / 4).next_multiple_of(PAGE);
    let mut outcome = None;
    // By number of pages: 0, N, 4N; every round measures all three.
    let mut uses = [0, least / PAGE, 4 * least / PAGE].map(|pages| (pages, Vec::new()));
    for _ in 0..options.rounds {
        for (pages, samples) in &mut uses {
            let round = Round::new(client, (*pages * PAGE).max(least), PAGE)?;
            outcome.get_or_insert_with(|| Outcome::new(Test::Cpu, &round.met));
            let demand = scattered((*pages).max(1), *pages / 16);
            let before = round.met.usage()?;
            let (engine, guest, met) = round.engine(options)?;
            for page in &demand {
                let mut word = [0; 8];
                guest.read(page * PAGE, &mut word);
            }
            if *pages > 0 {
                engine.resume_background();
                engine.wait_all_landed(soon())?;
            }
            engine.stop(soon())?;
            samples.push(met.usage()?.since(&before));
            if *pages > 0 {
                check(&guest)?;
            }
            met.done()?;
        }
    }
    let mut outcome = outcome.ok_or_else(no_rounds)?;
    let mid = |at: usize, of: fn(&Usage) -> u64| {
        table::median(&uses[at].1.iter().map(|usage: &Usage| of(usage) as f64).collect::<Vec<_>>())
    };
    let more = (uses[2].0 - uses[1].0) as f64;
    let slope = |of: fn(&Usage) -> u64| (mid(2, of) - mid(1, of)) / more;
    outcome.ratios = vec![
        cpu_a_page(outcome.fabric, slope(|u| u.others.cpu_ns)),
        Ratio::plain(
            "source_switches_per_page",
            "source context switches a page, from N to 4N",
            &[slope(|u| u.others.voluntary_switches + u.others.involuntary_switches)],
        ),
    ];
    for (pages, samples) in uses {
        let middle = middle(samples);
        outcome.source.push(SourceUse::new(PAGE, pages as u64, middle));
    }
    Ok(outcome)
}

/// Where the engine's threads are while they pull all of RAM, some of it by demand.
pub fn profile(client: &mut Client, options: &Options) -> Result<Outcome, BenchError> {
    let mut outcome = None;
    let doing = "sampling the engine's threads (it needs perf events and /proc/kallsyms: root)";
    let sampling = |source| BenchError::Io { doing, source };
    for _ in 0..options.rounds {
        let round = Round::new(client, options.memory, PAGE)?;
        let outcome = outcome.get_or_insert_with(|| Outcome::new(Test::Profile, &round.met));
        let demand = scattered(options.memory / PAGE, options.memory / PAGE / 16);
        let (engine, guest, met) = round.engine(options)?;
        let threads = threads_named(ENGINE_THREADS).map_err(sampling)?;
        let profiler = Profiler::start(&threads).map_err(sampling)?;
        for page in &demand {
            let mut word = [0; 8];
            guest.read(page * PAGE, &mut word);
        }
        engine.resume_background();
        engine.wait_all_landed(soon())?;
        let profile = profiler.stop().map_err(sampling)?;
        engine.stop(soon())?;
        check(&guest)?;
        met.done()?;
        outcome.profiles.push(profile);
    }
    let mut outcome = outcome.ok_or_else(no_rounds)?;
    let sum = |of: fn(&crate::profile::Profile) -> u64| outcome.profiles.iter().map(of).sum::<u64>() as f64;
    let (samples, copying, apart, lost) = (sum(|p| p.samples), sum(|p| p.copying), sum(|p| p.apart), sum(|p| p.lost));
    let share = [copying_share(&outcome.profiles)];
    let (name, what) = ("copying_share", "part of the engine's samples that is copying memory");
    outcome.ratios = vec![
        match outcome.fabric {
            FabricKind::Verbs => Ratio::at_most(name, what, &share, COPYING_GOAL),
            FabricKind::Tcp | FabricKind::Local => Ratio::plain(name, what, &share),
        },
        Ratio::plain("profile_samples", "samples of the engine's threads, all rounds", &[samples]),
        Ratio::plain("profile_copying", "of these in functions that copy", &[copying]),
        Ratio::plain("profile_apart", "samples in a software device's or an interrupt's work", &[apart]),
        Ratio::plain("profile_lost", "samples that were lost", &[lost]),
    ];
    Ok(outcome)
}

/// The threads that answer questions are not in it: what is left must be nothing where the fabric is one-sided.
fn cpu_a_page(fabric: FabricKind, ns: f64) -> Ratio {
    let (name, what) = ("source_cpu_ns_per_page", "CPU of the source's threads a page [ns], from N to 4N");
    match fabric {
        FabricKind::Verbs => Ratio::at_most(name, what, &[ns], SOURCE_GOAL_NS),
        FabricKind::Tcp | FabricKind::Local => Ratio::plain(name, what, &[ns]),
    }
}

/// The sample with the median CPU time.
fn middle(mut samples: Vec<Usage>) -> Usage {
    samples.sort_by_key(|usage| usage.process.cpu_ns);
    let at = samples.len() / 2;
    samples.swap_remove(at)
}

fn no_rounds() -> BenchError {
    BenchError::Options { what: "--rounds", why: "there must be one at least".into() }
}

/// Every page, when all have landed.
fn check(guest: &Mapping) -> Result<(), BenchError> {
    for page in 0..guest.len() / PAGE {
        let mut word = [0; 8];
        guest.read(page * PAGE, &mut word);
        let (found, expected) = (u64::from_ne_bytes(word), page as u64 + 1);
        if found != expected {
            return Err(BenchError::Wrong { page, found, expected });
        }
    }
    Ok(())
}
