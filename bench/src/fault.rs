//! `fault`: what a demand fault costs, beside the leanest loop that serves one: by stage, with many threads that fault, with the background at
//! work, for both sizes of a page and both landings.

use crate::carrier::{Carrier, Device};
use crate::cores::{self, Cores};
use crate::error::BenchError;
use crate::report::{Axis, Better, Case, Goal, Latency, Measure, Output, Plot, Point, Reference, Report, Role, Series};
use crate::rig::{Rig, Shape, Source, soon};
use crate::{Fabric, floor, table, wire};
use belay_transport::PageSize;
use belay_transport::fabric::FabricKind;
use belay_transport::pull::Engine;
use belay_transport::region::Mapping;
use clap::Args;
use hdrhistogram::Histogram;
use indicatif::ProgressBar;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// A touch that took less met a page that was there already.
pub const NO_FAULT_NS: u64 = 1_500;
/// Goals: engine time over the floor's; 99% under pull over the median without; faults a second with more threads than processors over
/// those with one.
const ENGINE_GOAL: f64 = 1.3;
const LOADED_GOAL: f64 = 3.0;
const THREADS_GOAL: f64 = 1.0;
/// How many threads fault at once.
const THREADS: [usize; 7] = [1, 2, 4, 8, 16, 32, 64];

/// Latency of a demand fault: by stage, unloaded and under background pull, from 1 to 64 faulting threads
#[derive(Debug, Args)]
pub struct FaultArgs {
    /// What carries the pages; verbs goes through the RDMA device, out and in again
    #[arg(long, value_enum, value_delimiter = ',', default_value = "local")]
    fabric: Vec<Fabric>,
    #[command(flatten)]
    device: Device,
    #[command(flatten)]
    output: Output,
}

/// How much is done.
#[derive(Clone, Copy)]
struct Amount {
    rounds: usize,
    touches: usize,
    bytes: usize,
}

/// Runs the suite.
pub fn run(args: &FaultArgs) -> Result<ExitCode, BenchError> {
    let (rounds, touches, bytes) = if args.output.quick { (5, 1_000, 32 << 20) } else { (15, 4_000, 128 << 20) };
    let amount = Amount { rounds, touches, bytes };
    let mut report = Report::new("fault", &args.output);
    let bar = args.output.progress((args.fabric.len() * (3 + THREADS.len()) * rounds) as u64);
    for fabric in &args.fabric {
        let Some(wire) = fabric.floor() else {
            wire::through_device(wire::Test::Fault, &args.device, &args.output, &mut report)?;
            continue;
        };
        let sources = Sources::new(bytes)?;
        for (page_size, bounce) in [(PageSize::Small, false), (PageSize::Small, true), (PageSize::Huge, false)] {
            let shape = Shape { page_size, bounce, cores: Cores::first_two(), ..Shape::default() };
            match one_thread(wire, &sources, &shape, amount, &bar) {
                Ok((case, goals)) => {
                    bar.suspend(|| case.print());
                    report.cases.push(case);
                    report.goals.extend(goals);
                }
                // Nobody is made to reserve memory for good: a machine without such pages is said to have none.
                Err(BenchError::Region(why)) if page_size == PageSize::Huge => {
                    bar.suspend(|| report.note(format!("{fabric}, pages of 2 MiB: not measured: {why}")));
                }
                Err(error) => return Err(error),
            }
        }
        let (case, goals) = many_threads(wire, &sources, amount, &bar)?;
        bar.suspend(|| case.print());
        report.cases.push(case);
        report.goals.extend(goals);
    }
    bar.finish_and_clear();
    args.output.finish(&report)
}

/// What is faulted in, ours and the floor's.
struct Sources {
    ours: Source,
    floor: floor::Source,
}

impl Sources {
    fn new(bytes: usize) -> Result<Self, BenchError> {
        let floor = floor::Source::new(bytes).map_err(BenchError::io("the floor's source"))?;
        Ok(Self { ours: Source::new(bytes)?, floor })
    }
}

/// One thread that touches one page after the other: by stage, unloaded and under pull.
fn one_thread(
    wire: floor::Wire,
    sources: &Sources,
    shape: &Shape,
    amount: Amount,
    bar: &ProgressBar,
) -> Result<(Case, Vec<Goal>), BenchError> {
    let page = shape.page_size.bytes();
    let landing = if shape.bounce { "bounce and COPY" } else { "in place" };
    let carrier = Carrier::beside(wire);
    let case = Case::new("one thread").with("fabric", kind(&carrier)).with("pages", shape.page_size);
    let placed = if shape.cores.is_some() { "on a processor each" } else { "anywhere" };
    let mut case = case.with("landing", landing).with("threads", placed);
    bar.set_message(case.title());
    let order = scattered(amount.bytes / page, amount.touches.min(amount.bytes / page));
    let fault = floor::Fault { page, copy: shape.bounce, cores: shape.cores };
    let (mut floors, mut ours, mut loaded) = (floor::Faults::default(), Side::new(), Side::new());
    let [mut engine, mut beside, mut toucher, mut beside_toucher, mut under_pull] = [(); 5].map(|()| Vec::new());
    let mut asked = Vec::new();
    for _ in 0..amount.rounds {
        let unloaded = engine_round(&carrier, sources, shape, &[&order], true)?.0;
        let floor = floor::faults_of(wire, &sources.floor, fault, &[&order], Duration::ZERO);
        let (floor, _) = floor.map_err(BenchError::io("the floor's fault loop"))?;
        let pulled = engine_round(&carrier, sources, shape, &[&order], false)?.0;
        if wire == floor::Wire::Tcp {
            let ask = floor::ask(&sources.floor, &order, page).map_err(BenchError::io("asking over TCP"))?;
            asked.extend(ask);
        }
        engine.push(us_at(&unloaded.server, 0.5));
        beside.push(mid(&floor.server) / 1e3);
        toucher.push(mid(&unloaded.toucher) / 1e3);
        beside_toucher.push(mid(&floor.toucher) / 1e3);
        under_pull.push(us_at(&pulled.server, 0.99) / us_at(&unloaded.server, 0.5));
        ours.add(unloaded);
        loaded.add(pulled);
        floors.toucher.extend(floor.toucher);
        floors.server.extend(floor.server);
        bar.inc(1);
    }
    let of = |name: &str, role, histogram: &Histogram<u64>| Latency::of_histogram(name, role, page, histogram);
    let samples = |name: &str, role, samples: &[u64]| Latency::of_samples(name, role, page, samples);
    case.latencies = vec![
        samples("floor, serving thread", Role::Floor, &floors.server),
        of("engine, serving thread", Role::Ours, &ours.server),
        of("  queue (event read to posted)", Role::Ours, &ours.queue),
        of("  wire (posted to completed)", Role::Ours, &ours.wire),
        of("  install (completed to shown)", Role::Ours, &ours.install),
        samples("floor, touching thread", Role::Floor, &floors.toucher),
        samples("engine, touching thread", Role::Ours, &ours.toucher),
        of("engine under pull, serving thread", Role::Ours, &loaded.server),
        samples("engine under pull, touching thread", Role::Ours, &loaded.toucher),
    ];
    if !asked.is_empty() {
        case.latencies.push(samples("plain TCP request and response", Role::Peer, &asked));
    }
    case.measures = vec![
        Measure::new("engine time, median", "us", Better::Lower, engine).beside("the floor's serving thread", beside),
        Measure::new("touching thread, median", "us", Better::Lower, toucher)
            .beside("the floor's touching thread", beside_toucher),
        Measure::new("engine time, 99% under pull over unloaded median", "", Better::Lower, under_pull),
    ];
    let shown = ["floor, serving thread", "engine, serving thread", "engine under pull, serving thread"];
    let also = if asked.is_empty() { None } else { Some("plain TCP request and response") };
    let title = "A demand fault, event read to page shown, by percentile";
    case.plots.push(Plot::percentiles(title, &shown.into_iter().chain(also).collect::<Vec<_>>()));
    // The goals are of the small page and the landing that belay is made for; the others are stated.
    let goals = match (shape.page_size, shape.bounce, case.measures[0].ratio()) {
        (PageSize::Small, false, Some(ratio)) => {
            let p99 = us_at(&loaded.server, 0.99) / us_at(&ours.server, 0.5);
            vec![
                Goal::at_most(&case, "engine time over the floor's", "", ratio, ENGINE_GOAL),
                Goal::at_most(&case, "99% under pull over the unloaded median", "", p99, LOADED_GOAL),
            ]
        }
        _ => Vec::new(),
    };
    Ok((case, goals))
}

/// Faults a second, a value a round.
#[derive(Default)]
struct FaultRates {
    ours: Vec<f64>,
    floor: Vec<f64>,
}

/// More and more threads that fault at once, one shard.
fn many_threads(
    wire: floor::Wire,
    sources: &Sources,
    amount: Amount,
    bar: &ProgressBar,
) -> Result<(Case, Vec<Goal>), BenchError> {
    let carrier = Carrier::beside(wire);
    let mut case = Case::new("threads").with("fabric", kind(&carrier)).with("pages", PageSize::Small);
    let page = floor::PAGE;
    let order = scattered(amount.bytes / page, amount.touches);
    let mut rates = THREADS.map(|_| FaultRates::default());
    let mut sides = THREADS.map(|_| Side::new());
    for _ in 0..amount.rounds {
        for ((threads, rates), side) in THREADS.into_iter().zip(&mut rates).zip(&mut sides) {
            bar.set_message(format!("{}, {threads} threads", case.title()));
            let orders: Vec<&[usize]> = order.chunks(order.len().div_ceil(threads)).collect();
            let (one, took) = engine_round(&carrier, sources, &Shape::default(), &orders, true)?;
            let floor = floor::faults_of(wire, &sources.floor, floor::SMALL, &orders, Duration::ZERO);
            let (_, floor_took) = floor.map_err(BenchError::io("the floor's fault loop"))?;
            rates.ours.push(order.len() as f64 / took.as_secs_f64());
            rates.floor.push(order.len() as f64 / floor_took.as_secs_f64());
            side.add(one);
            bar.inc(1);
        }
    }
    for (threads, side) in THREADS.into_iter().zip(&sides) {
        let name = format!("{}, serving thread", of(threads));
        case.latencies.push(Latency::of_histogram(&name, Role::Ours, page, &side.server));
        case.latencies.push(Latency::of_samples(&touched_by(threads), Role::Ours, page, &side.toucher));
    }
    for (threads, rates) in THREADS.into_iter().zip(&rates) {
        let name = format!("faults a second, {}", of(threads));
        let measure = Measure::new(&name, "1/s", Better::Higher, rates.ours.clone());
        case.measures.push(measure.beside("the floor", rates.floor.clone()));
    }
    let points = |side: fn(&FaultRates) -> &[f64]| {
        THREADS.into_iter().zip(&rates).map(|(threads, rates)| Point::of_rounds(threads as f64, side(rates))).collect()
    };
    let one = table::median(&rates[0].ours);
    case.plots.push(Plot::Sweep {
        title: format!(
            "Faults a second by threads that fault at once, {}; bars: quartiles of the rounds",
            case.title()
        ),
        x: Axis::log("faulting threads", ""),
        y: Axis::linear("faults", "1/s"),
        series: vec![
            Series { name: "engine".into(), role: Role::Ours, points: points(|rates| &rates.ours) },
            Series { name: "floor".into(), role: Role::Floor, points: points(|rates| &rates.floor) },
        ],
        references: vec![Reference { name: "engine, one thread".into(), y: one }],
    });
    // All seven would hide each other.
    let names: Vec<String> = THREADS.into_iter().step_by(2).map(touched_by).collect();
    let title = "A touch by percentile, by threads that fault at once";
    case.plots.push(Plot::percentiles(title, &names.iter().map(String::as_str).collect::<Vec<_>>()));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let beyond = THREADS.into_iter().zip(&rates).filter(|(threads, _)| *threads > cores);
    let over_one = |many: &FaultRates| {
        let rounds = many.ours.iter().zip(&rates[0].ours);
        table::median(&rounds.map(|(many, one)| many / one).collect::<Vec<_>>())
    };
    let least = beyond.map(|(_, many)| over_one(many)).fold(f64::INFINITY, f64::min);
    let what = "least faults a second with more threads than processors, over those with one";
    let goals = least.is_finite().then(|| Goal::at_least(&case, what, "", least, THREADS_GOAL));
    Ok((case, goals.into_iter().collect()))
}

/// With an engine of its own, which is gone with its memory before anybody else is measured: huge pages come out of one pool.
fn engine_round(
    carrier: &Carrier,
    sources: &Sources,
    shape: &Shape,
    orders: &[&[usize]],
    unloaded: bool,
) -> Result<(Side, Duration), BenchError> {
    let rig = Rig::new(carrier, &sources.ours, shape)?;
    touch(rig.engine, &rig.guest, orders, shape, unloaded)
}

/// `1 thread`, `2 threads`.
fn of(threads: usize) -> String {
    format!("{threads} thread{}", if threads == 1 { "" } else { "s" })
}

fn touched_by(threads: usize) -> String {
    format!("{}, touching thread", of(threads))
}

/// As a parameter says it.
fn kind(carrier: &Carrier) -> String {
    carrier.only.map_or("any".to_owned(), |kind: FabricKind| kind.to_string())
}

fn us_at(ns: &Histogram<u64>, quantile: f64) -> f64 {
    ns.value_at_quantile(quantile) as f64 / 1e3
}

/// What one side of the comparison gathered.
pub struct Side {
    pub toucher: Vec<u64>,
    pub server: Histogram<u64>,
    pub queue: Histogram<u64>,
    pub wire: Histogram<u64>,
    pub install: Histogram<u64>,
}

impl Side {
    pub fn new() -> Self {
        let [server, queue, wire, install] =
            std::array::from_fn(|_| Histogram::new_with_bounds(1, 1 << 40, 3).expect("valid bounds"));
        Self { toucher: Vec::new(), server, queue, wire, install }
    }

    pub fn add(&mut self, other: Self) {
        self.toucher.extend(other.toucher);
        // Same bounds on both sides: adding cannot fail.
        self.server += other.server;
        self.queue += other.queue;
        self.wire += other.wire;
        self.install += other.install;
    }
}

/// Touches pages of `guest`, a thread for each of `orders`, one page of that shape after the other while `engine` serves them, with or without its
/// background pull; ends the engine. Also how long all touches took together.
pub fn touch(
    engine: Engine,
    guest: &Mapping,
    orders: &[&[usize]],
    shape: &Shape,
    unloaded: bool,
) -> Result<(Side, Duration), BenchError> {
    if !unloaded {
        engine.resume_background();
    }
    let start = Instant::now();
    let in_turn = |order| {
        shape.cores.inspect(|cores| cores::keep_on(cores.toucher));
        touch_in_turn(guest, order, shape.page_size.bytes(), unloaded)
    };
    let touched: Result<Vec<Vec<u64>>, BenchError> = std::thread::scope(|scope| {
        let threads: Vec<_> = orders.iter().map(|order| scope.spawn(move || in_turn(order))).collect();
        threads.into_iter().map(|thread| thread.join().map_err(|_| BenchError::Thread("a touching thread"))?).collect()
    });
    let took = start.elapsed();
    let latencies = engine.stop(soon())?.latencies;
    let (server, queue) = (latencies.total, latencies.queue);
    let (wire, install) = (latencies.wire, latencies.install);
    Ok((Side { toucher: touched?.concat(), server, queue, wire, install }, took))
}

/// What each touch took, in nanoseconds; where the background pulls too, of those that met no page.
fn touch_in_turn(guest: &Mapping, order: &[usize], page_bytes: usize, all: bool) -> Result<Vec<u64>, BenchError> {
    let mut touches = Vec::with_capacity(order.len());
    for page in order {
        let (mut word, at) = ([0; 8], page * page_bytes);
        let start = Instant::now();
        guest.read(at, &mut word);
        let took = start.elapsed().as_nanos() as u64;
        if all || took > NO_FAULT_NS {
            touches.push(took);
        }
        let (found, expected) = (u64::from_ne_bytes(word), (at / floor::PAGE) as u64 + 1);
        if found != expected {
            return Err(BenchError::Wrong { page: at / floor::PAGE, found, expected });
        }
    }
    Ok(touches)
}

/// `count` different pages of `pages`, in an order no prefetcher knows but every run repeats.
pub fn scattered(pages: usize, count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..pages).collect();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for at in (1..pages).rev() {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        order.swap(at, (state >> 33) as usize % (at + 1));
    }
    order.truncate(count);
    order
}

/// The median.
pub fn mid(ns: &[u64]) -> f64 {
    table::median(&ns.iter().map(|ns| *ns as f64).collect::<Vec<_>>())
}
