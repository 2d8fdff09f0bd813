//! `pull`: how fast the background pulls and what processors it takes at both ends, beside a floor that copies or receives and shows the same
//! bytes; by window, by chunk and by shards, with TLS and without, for both sizes of a page.

use crate::carrier::{Carrier, Device};
use crate::error::BenchError;
use crate::folder::Folder;
use crate::report::{Axis, Better, Case, Goal, Measure, Output, Plot, Point, Rate, Reference, Report, Role, Series};
use crate::rig::{Rig, Shape, Source, soon};
use crate::wire::usage::Usage;
use crate::{Fabric, floor, table, wire};
use belay_transport::PageSize;
use belay_transport::pull::Tuning;
use belay_transport::session::{Credentials, Security, keygen};
use clap::Args;
use indicatif::ProgressBar;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Goals: of the floor's bandwidth over memory and over TCP; of plain memcpy's with pages of 2 MiB.
const LOCAL_GOAL: f64 = 0.90;
const TCP_GOAL: f64 = 0.95;
const HUGE_GOAL: f64 = 0.90;
/// Kernel names of the engine's threads begin so.
const ENGINE_THREADS: &str = "pull-";
/// Chunks in flight, bytes of a chunk, shards.
const WINDOWS: [usize; 6] = [1, 2, 4, 8, 16, 32];
const CHUNKS: [u64; 5] = [16 << 10, 64 << 10, 128 << 10, 256 << 10, 1 << 20];
const SHARDS: [u16; 3] = [1, 2, 4];

/// Bandwidth of the background pull, and what it takes of both hosts' processors: by window, chunk and shards, with TLS and without
#[derive(Debug, Args)]
pub struct PullArgs {
    /// What carries the pages; verbs goes through the RDMA device, out and in again
    #[arg(long, value_enum, value_delimiter = ',', default_value = "local")]
    fabric: Vec<Fabric>,
    #[command(flatten)]
    device: Device,
    #[command(flatten)]
    output: Output,
}

/// What is pulled over one wire, and how often.
struct Bench {
    wire: floor::Wire,
    carrier: Carrier,
    ours: Source,
    floor: floor::Source,
    bytes: usize,
    rounds: usize,
    bar: ProgressBar,
}

/// Runs the suite.
pub fn run(args: &PullArgs) -> Result<ExitCode, BenchError> {
    let (rounds, bytes) = if args.output.quick { (7, 64 << 20) } else { (15, 256 << 20) };
    let mut report = Report::new("pull", &args.output);
    let cases = args.fabric.len() * (3 + WINDOWS.len() + CHUNKS.len() + SHARDS.len()) * rounds;
    let bar = args.output.progress(cases as u64);
    for fabric in &args.fabric {
        let Some(wire) = fabric.floor() else {
            wire::through_device(wire::Test::Pull, &args.device, &args.output, &mut report)?;
            continue;
        };
        let floor = floor::Source::new(bytes).map_err(BenchError::io("the floor's source"))?;
        let carrier = Carrier::beside(wire);
        Bench { wire, carrier, ours: Source::new(bytes)?, floor, bytes, rounds, bar: bar.clone() }.run(&mut report)?;
    }
    bar.finish_and_clear();
    args.output.finish(&report)
}

/// One round of ours.
struct Pulled {
    bytes_per_s: f64,
    source_processors: f64,
    destination_processors: f64,
}

impl Bench {
    fn run(&self, report: &mut Report) -> Result<(), BenchError> {
        let plain = self.background(&Shape::default(), false)?;
        let goal = if self.wire == floor::Wire::Memory { LOCAL_GOAL } else { TCP_GOAL };
        let ratio = plain.measures[0].ratio().unwrap_or_default();
        report.goals.push(Goal::at_least(&plain, "of the floor's bandwidth", "", ratio, goal));
        self.done(report, plain);
        if self.wire == floor::Wire::Tcp {
            let keys = Keys::make()?;
            let shape = Shape { security: keys.security()?, ..Shape::default() };
            let case = self.background(&shape, true)?;
            self.done(report, case);
        }
        let huge = Shape { page_size: PageSize::Huge, ..Shape::default() };
        match self.background(&huge, false) {
            Ok(case) => {
                if self.wire == floor::Wire::Memory {
                    let ratio = case.measures[1].ratio().unwrap_or_default();
                    report.goals.push(Goal::at_least(&case, "of plain memcpy's bandwidth", "", ratio, HUGE_GOAL));
                }
                self.done(report, case);
            }
            Err(BenchError::Region(why)) => {
                let kind = self.kind();
                self.bar.suspend(|| report.note(format!("{kind}, pages of 2 MiB: not measured: {why}")));
            }
            Err(error) => return Err(error),
        }
        let tuned = |tuning| Shape { tuning, ..Shape::default() };
        let windows =
            WINDOWS.map(|bulk_chunks| (bulk_chunks as f64, tuned(Tuning { bulk_chunks, ..Tuning::default() })));
        let chunk = |bytes: u64| {
            let busy_chunk_bytes = Tuning::default().busy_chunk_bytes.min(bytes);
            let tuning = Tuning { chunk_bytes: bytes, busy_chunk_bytes, ..Tuning::default() };
            (bytes as f64 / 1024.0, tuned(tuning))
        };
        let shards = SHARDS.map(|shards| (f64::from(shards), Shape { shards, ..Shape::default() }));
        let case = self.sweep("by window", "chunks in flight", "", &windows)?;
        self.done(report, case);
        let case = self.sweep("by chunk", "chunk", "KiB", &CHUNKS.map(chunk))?;
        self.done(report, case);
        let case = self.sweep("by shards", "shards", "", &shards)?;
        self.done(report, case);
        Ok(())
    }

    fn kind(&self) -> String {
        self.carrier.only.map_or("any".to_owned(), |kind| kind.to_string())
    }

    fn done(&self, report: &mut Report, case: Case) {
        self.bar.suspend(|| case.print());
        report.cases.push(case);
    }

    /// As configured by default, beside the floor, and beside the bytes alone.
    fn background(&self, shape: &Shape, tls: bool) -> Result<Case, BenchError> {
        let (page, chunk) = (shape.page_size.bytes(), (shape.tuning.chunk_bytes as usize).max(shape.page_size.bytes()));
        let case = Case::new("background").with("fabric", self.kind()).with("pages", shape.page_size);
        let mut case = case.with("TLS", if tls { "yes" } else { "no" });
        self.bar.set_message(case.title());
        let rate = |took: Duration| self.bytes as f64 / took.as_secs_f64();
        let (mut plain, mut floors, mut ours) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..self.rounds {
            let took = floor::plain(self.wire, &self.floor, chunk).map_err(BenchError::io("the plain copy"))?;
            plain.push(rate(took));
            ours.push(self.pull(shape)?);
            let took =
                floor::sweep(self.wire, &self.floor, chunk, page).map_err(BenchError::io("the floor's sweep"))?;
            floors.push(rate(took));
            self.bar.inc(1);
        }
        let [alone, shown] = match self.wire {
            floor::Wire::Memory => ["plain memcpy", "floor: memcpy + CONTINUE"],
            floor::Wire::Tcp => ["plain recv", "floor: recv + CONTINUE"],
        };
        let middle = |of: fn(&Pulled) -> f64| Some(table::median(&ours.iter().map(of).collect::<Vec<_>>()));
        let row = |name: &str, role, rounds: &[f64]| Rate {
            name: name.to_owned(),
            role,
            bytes: chunk,
            iterations: (self.bytes / chunk) as u64,
            rounds: rounds.to_vec(),
            source_processors: None,
            destination_processors: None,
        };
        let rates: Vec<f64> = ours.iter().map(|pulled| pulled.bytes_per_s).collect();
        let engine = Rate {
            bytes: shape.tuning.chunk_bytes as usize,
            iterations: self.bytes as u64 / shape.tuning.chunk_bytes,
            source_processors: middle(|pulled| pulled.source_processors),
            destination_processors: middle(|pulled| pulled.destination_processors),
            ..row("engine", Role::Ours, &rates)
        };
        case.rates = vec![row(alone, Role::Peer, &plain), row(shown, Role::Floor, &floors), engine];
        let mb = |rates: &[f64]| rates.iter().map(|rate| rate / 1e6).collect::<Vec<_>>();
        let measure = |name: &str| Measure::new(name, "MB/s", Better::Higher, mb(&rates));
        case.measures = vec![
            measure("bandwidth").beside(shown, mb(&floors)),
            measure("bandwidth over the bytes alone").beside(alone, mb(&plain)),
        ];
        Ok(case)
    }

    /// Bandwidth by one of the engine's settings, beside the floor with chunks of its default size.
    fn sweep(&self, name: &str, what: &str, unit: &str, shapes: &[(f64, Shape)]) -> Result<Case, BenchError> {
        let mut case = Case::new(name).with("fabric", self.kind()).with("pages", PageSize::Small);
        let chunk = Tuning::default().chunk_bytes as usize;
        let mut rounds: Vec<Vec<f64>> = vec![Vec::new(); shapes.len()];
        let mut floors = Vec::new();
        for _ in 0..self.rounds {
            let took = floor::sweep(self.wire, &self.floor, chunk, floor::PAGE);
            let took = took.map_err(BenchError::io("the floor's sweep"))?;
            floors.push(self.bytes as f64 / took.as_secs_f64() / 1e6);
            for ((at, shape), rounds) in shapes.iter().zip(&mut rounds) {
                self.bar.set_message(format!("{}, {what} {at} {unit}", case.title()));
                rounds.push(self.pull(shape)?.bytes_per_s / 1e6);
                self.bar.inc(1);
            }
        }
        let points = shapes.iter().zip(&rounds).map(|((at, _), rounds)| Point::of_rounds(*at, rounds)).collect();
        case.plots.push(Plot::Sweep {
            title: format!("Bandwidth {}; bars: quartiles of the rounds", case.title()),
            x: Axis::log(what, unit),
            y: Axis::linear("bandwidth", "MB/s"),
            series: vec![Series { name: "engine".into(), role: Role::Ours, points }],
            references: vec![Reference { name: "floor".into(), y: table::median(&floors) }],
        });
        for ((at, _), rounds) in shapes.iter().zip(rounds) {
            let unit = if unit.is_empty() { String::new() } else { format!(" {unit}") };
            let measure = Measure::new(&format!("{what} {at}{unit}"), "MB/s", Better::Higher, rounds);
            case.measures.push(measure.beside("the floor", floors.clone()));
        }
        Ok(case)
    }

    fn pull(&self, shape: &Shape) -> Result<Pulled, BenchError> {
        let looking = BenchError::io("looking at the threads' processor time");
        let rig = Rig::new(&self.carrier, &self.ours, shape)?;
        let before = Usage::now().map_err(looking)?;
        let start = Instant::now();
        rig.engine.resume_background();
        rig.engine.wait_all_landed(soon())?;
        let took = start.elapsed();
        // Before the engine ends: the time of a thread that has gone is nobody's any more.
        let used = Usage::now().map_err(BenchError::io("looking at the threads' processor time"))?.since(&before);
        rig.engine.stop(soon())?;
        check(&rig.guest)?;
        let destination: u64 = used
            .threads
            .iter()
            .filter(|thread| thread.name.starts_with(ENGINE_THREADS))
            .map(|thread| thread.used.cpu_ns)
            .sum();
        let processors = |ns: u64| ns as f64 / took.as_nanos() as f64;
        Ok(Pulled {
            bytes_per_s: self.bytes as f64 / took.as_secs_f64(),
            source_processors: processors(used.others.cpu_ns.saturating_sub(destination)),
            destination_processors: processors(destination),
        })
    }
}

/// Pages here and there.
fn check(guest: &belay_transport::region::Mapping) -> Result<(), BenchError> {
    for page in (0..guest.len() / floor::PAGE).step_by(997) {
        let mut word = [0; 8];
        guest.read(page * floor::PAGE, &mut word);
        let (found, expected) = (u64::from_ne_bytes(word), page as u64 + 1);
        if found != expected {
            return Err(BenchError::Wrong { page, found, expected });
        }
    }
    Ok(())
}

/// Keys of two hosts, gone when dropped.
struct Keys(Folder);

impl Keys {
    fn make() -> Result<Self, BenchError> {
        let folder = Folder::make(&std::env::temp_dir(), "pull")?;
        for name in ["source", "destination"] {
            keygen(folder.path(), name)?;
        }
        Ok(Self(folder))
    }

    /// Of the source and of the destination.
    fn security(&self) -> Result<[Security; 2], BenchError> {
        let path = |name: &str| self.0.path().join(name);
        let load = |own: &str, peer: &str| {
            Credentials::load(&path(&format!("{own}.crt")), &path(&format!("{own}.key")), &path(&format!("{peer}.crt")))
        };
        Ok([Security::Tls(load("source", "destination")?), Security::Tls(load("destination", "source")?)])
    }
}
