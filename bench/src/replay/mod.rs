//! `replay`: the faults of a guest that was moved once, met again by the pull engine alone under one way of prefetching after the other, beside
//! the leanest loop that serves them and prefetches nothing.
//!
//! A thread for each of the trace's touches what that one waited for, in its order, with the time between that it took then. No VM, so that two ways
//! can be told apart that differ by less than two runs of a guest do.

mod course;
mod policy;

use crate::carrier::Carrier;
use crate::error::BenchError;
use crate::fault::NO_FAULT_NS;
use crate::floor::Step;
use crate::report::{Better, Case, Latency, Measure, Output, Plot, Report, Role};
use crate::rig::{Rig, Shape, Source, soon};
use crate::table::median;
use crate::{Fabric, checkpoint, floor};
use belay_checkpoint::json_lines::LinesError;
use belay_transport::PageSize;
use belay_transport::pull::{Engine, Observer, WaitError};
use belay_transport::region::Mapping;
use belay_vmm_glue::migrate::faults::file;
use clap::Args;
use course::{Course, Speed};
use indicatif::ProgressBar;
use policy::Policy;
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// Between two looks at whether the engine still serves.
const LOOK: Duration = Duration::from_millis(100);
const QUICK_ROUNDS: u32 = 2;

/// Replay recorded faults against the pull engine alone, under one way of prefetching after the other
#[derive(Debug, Args)]
#[command(after_help = "\
FILE is what `belay receive --record-faults FILE` has written. With --hold-pull-at 0 beside it nothing comes in the background, so that every page the
guest touches is in the trace; without, only those that came too late then.

Policies: `default`; `demand` (nothing but faults); or what differs from the default, with commas between: bubble=BYTES around a fault first (0: none),
window=N chunks in flight, chunk=BYTES of one, busy=BYTES of one while faults arrive, reads=N for faults in flight.

Columns: time that all threads waited, touches that waited (more than 1.5 us), the median and 99% of those, pages that came before the last touch and
were touched by nobody, when the last touch was over, and when everything had come.")]
pub struct ReplayArgs {
    #[arg(value_name = "FILE", required = true)]
    traces: Vec<PathBuf>,
    /// What carries the pages
    #[arg(long, value_enum, value_delimiter = ',', default_value = "local,tcp")]
    fabric: Vec<Fabric>,
    /// Ways of prefetching
    #[arg(
        long,
        value_name = "POLICY",
        value_delimiter = ';',
        default_value = "default;demand;bubble=0;bubble=16M;window=1;busy=16K"
    )]
    policy: Vec<Policy>,
    /// So many times as fast as it was recorded, or `max`: the next touch as soon as there is a page
    #[arg(long, value_name = "N", default_value = "1")]
    speed: Speed,
    /// Threads that serve, each a part of memory [default: as many as when it was recorded]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    shards: Option<u16>,
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    #[command(flatten)]
    output: Output,
}

/// One replay.
struct Replayed {
    /// Of every touch, in nanoseconds.
    touches: Vec<u64>,
    last_touch: Duration,
    /// Pages that came before the last touch and that nobody touched.
    needless: u64,
    /// Until everything was there, where that is wanted.
    all: Option<Duration>,
}

/// Of one policy, or of the floor: a value a round.
#[derive(Default)]
struct Rounds {
    stalled_ms: Vec<f64>,
    waits: Vec<f64>,
    p50_us: Vec<f64>,
    p99_us: Vec<f64>,
    needless: Vec<f64>,
    last_touch_ms: Vec<f64>,
    all_ms: Vec<f64>,
    /// Every touch that waited, of all rounds.
    waited: Vec<u64>,
}

impl Rounds {
    fn add(&mut self, one: &Replayed) {
        let mut waited: Vec<u64> = one.touches.iter().copied().filter(|ns| *ns > NO_FAULT_NS).collect();
        waited.sort_unstable();
        let at = |share: f64| waited.get((waited.len() as f64 * share) as usize).map_or(0.0, |ns| *ns as f64 / 1e3);
        self.stalled_ms.push(waited.iter().sum::<u64>() as f64 / 1e6);
        self.waits.push(waited.len() as f64);
        self.p50_us.push(at(0.5));
        self.p99_us.push(at(0.99));
        self.needless.push(one.needless as f64);
        self.last_touch_ms.push(one.last_touch.as_secs_f64() * 1e3);
        self.all_ms.extend(one.all.map(|all| all.as_secs_f64() * 1e3));
        self.waited.extend(waited);
    }

    fn print(&self, name: &str) {
        let all = if self.all_ms.is_empty() { "-".to_owned() } else { format!("{:.1}", median(&self.all_ms)) };
        println!(
            " {name:<26} {:>11.2} {:>8.0} {:>9.1} {:>9.1} {:>10.0} {:>15.1} {all:>9}",
            median(&self.stalled_ms),
            median(&self.waits),
            median(&self.p50_us),
            median(&self.p99_us),
            median(&self.needless),
            median(&self.last_touch_ms)
        );
    }
}

/// Runs the suite.
pub fn run(args: &ReplayArgs) -> Result<ExitCode, BenchError> {
    let wires = args.fabric.iter().map(|fabric| {
        fabric.floor().ok_or_else(|| BenchError::Options {
            what: "a fabric",
            why: format!("{fabric} has no floor here; replay is for local and tcp"),
        })
    });
    let wires = wires.collect::<Result<Vec<_>, _>>()?;
    let mut courses = Vec::new();
    for path in &args.traces {
        courses.push((name(path), course(path, args)?));
    }
    let rounds = if args.output.quick { args.rounds.min(QUICK_ROUNDS) } else { args.rounds };
    let mut report = Report::new("replay", &args.output);
    let steps = courses.len() * wires.len() * (args.policy.len() + 1) * rounds as usize;
    let bar = args.output.progress(steps as u64);
    for (trace, course) in &courses {
        let sources = Sources::new(course)?;
        for wire in &wires {
            let cases = compare(&sources, *wire, course, (args, trace, rounds), &bar)?;
            report.cases.extend(cases);
        }
    }
    bar.finish_and_clear();
    args.output.finish(&report)
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// Reads a trace, and whether there is memory for it: a source of ours, one of the floor's, and a guest.
fn course(path: &Path, args: &ReplayArgs) -> Result<Course, BenchError> {
    let bad =
        |why: String| BenchError::Options { what: "a trace of faults", why: format!("{}: {why}", path.display()) };
    let trace = File::open(path).map_err(LinesError::from).and_then(|file| file::read(BufReader::new(file)));
    let trace = trace.map_err(|error| bad(error.to_string()))?;
    let bytes = trace.regions.iter().map(|region| region.frames << region.page_size.shift()).sum::<u64>();
    let (needed, available) = (bytes.saturating_mul(3), checkpoint::available()?);
    if needed > available {
        return Err(bad(format!("its guest of {bytes} bytes takes {needed} to replay; {available} can be had")));
    }
    let mut course = Course::of(&trace, args.speed)?;
    course.shards = args.shards.unwrap_or(course.shards).min(u16::try_from(course.frames).unwrap_or(u16::MAX));
    Ok(course)
}

/// What is pulled, ours and the floor's.
struct Sources {
    ours: Source,
    floor: floor::Source,
    zero: Vec<bool>,
}

impl Sources {
    fn new(course: &Course) -> Result<Self, BenchError> {
        let bytes = course.bytes() as usize;
        let floor = floor::Source::new(bytes).map_err(BenchError::io("the floor's source"))?;
        Ok(Self { ours: Source::new(bytes)?, floor, zero: course.zero() })
    }
}

/// The floor and all policies, by turns; another begins each round. A case for each policy.
fn compare(
    sources: &Sources,
    wire: floor::Wire,
    course: &Course,
    (args, trace, rounds): (&ReplayArgs, &str, u32),
    bar: &ProgressBar,
) -> Result<Vec<Case>, BenchError> {
    let carrier = Carrier::beside(wire);
    let (mut floor, mut ours) = (Rounds::default(), args.policy.iter().map(|_| Rounds::default()).collect::<Vec<_>>());
    let turns = args.policy.len() + 1;
    for round in 0..rounds as usize {
        for turn in 0..turns {
            match (turn + round) % turns {
                0 => floor.add(&by_floor(wire, &sources.floor, course)?),
                which => {
                    let policy = &args.policy[which - 1];
                    bar.set_message(format!("{trace}, {policy}"));
                    ours[which - 1].add(&by_engine(&carrier, sources, course, policy)?);
                }
            }
            bar.inc(1);
        }
    }
    let fabric = carrier.only.map_or(String::new(), |kind| kind.to_string());
    bar.suspend(|| {
        let (threads, touches) = (course.threads.len(), course.threads.iter().map(Vec::len).sum::<usize>());
        println!(
            "\n {trace}, fabric {fabric}, speed {}: {touches} touches of {} pages by {threads} threads, guest of {} MiB; medians",
            args.speed,
            course.touched,
            course.bytes() >> 20
        );
        println!(
            " {:<26} {:>11} {:>8} {:>9} {:>9} {:>10} {:>15} {:>9}",
            "", "stalled[ms]", "#waits", "p50[us]", "p99[us]", "#needless", "last touch[ms]", "all[ms]"
        );
        floor.print("floor, demand alone");
        args.policy.iter().zip(&ours).for_each(|(policy, rounds)| rounds.print(&policy.to_string()));
    });
    let case = |(policy, rounds): (&Policy, &Rounds)| {
        let case = Case::new(policy.to_string()).with("trace", trace).with("fabric", &fabric);
        of_policy(case.with("speed", args.speed), rounds, &floor, course.page_size.bytes())
    };
    Ok(args.policy.iter().zip(&ours).map(case).collect())
}

fn of_policy(mut case: Case, ours: &Rounds, floor: &Rounds, page: usize) -> Case {
    const NAMES: [&str; 2] = ["floor, touches that waited", "engine, touches that waited"];
    case.latencies = vec![
        Latency::of_samples(NAMES[0], Role::Floor, page, &floor.waited),
        Latency::of_samples(NAMES[1], Role::Ours, page, &ours.waited),
    ];
    case.plots.push(Plot::percentiles("A touch that waited, by percentile", &NAMES));
    let measure = |name: &str, unit: &str, rounds: &[f64]| Measure::new(name, unit, Better::Lower, rounds.to_vec());
    let beside = |name: &str, unit: &str, of: fn(&Rounds) -> &Vec<f64>| {
        measure(name, unit, of(ours)).beside("the floor, demand alone", of(floor).clone())
    };
    case.measures = vec![
        beside("stalled, all threads", "ms", |rounds| &rounds.stalled_ms),
        beside("touches that waited", "", |rounds| &rounds.waits),
        beside("a touch that waited, median", "us", |rounds| &rounds.p50_us),
        beside("a touch that waited, 99%", "us", |rounds| &rounds.p99_us),
        beside("until the last touch", "ms", |rounds| &rounds.last_touch_ms),
        measure("pages pulled needlessly before the last touch", "", &ours.needless),
    ];
    if !ours.all_ms.is_empty() {
        case.measures.push(measure("until everything had come", "ms", &ours.all_ms));
    }
    case
}

fn by_floor(wire: floor::Wire, source: &floor::Source, course: &Course) -> Result<Replayed, BenchError> {
    let fault = floor::Fault { page: course.page_size.bytes(), ..floor::SMALL };
    let replayed = floor::replay(wire, source, fault, &course.threads);
    let (touches, last_touch) = replayed.map_err(BenchError::io("the floor's replay"))?;
    Ok(Replayed { touches, last_touch, needless: 0, all: None })
}

/// When everything had come.
struct Landed(OnceLock<Instant>);

impl Observer for Landed {
    fn all_landed(&self) {
        self.0.get_or_init(Instant::now);
    }
}

/// With an engine of its own.
fn by_engine(carrier: &Carrier, sources: &Sources, course: &Course, policy: &Policy) -> Result<Replayed, BenchError> {
    let landed = Arc::new(Landed(OnceLock::new()));
    let shape = Shape {
        page_size: course.page_size,
        shards: course.shards,
        tuning: policy.tuning,
        classes: Some(course.classes.clone()),
        observer: landed.clone(),
        ..Shape::default()
    };
    let rig = Rig::new(carrier, &sources.ours, &shape)?;
    let start = Instant::now();
    rig.engine.resume_background();
    let (engine, touches) = touched(rig.engine, &rig.guest, &sources.zero, course)?;
    let last_touch = start.elapsed();
    let progress = engine.progress();
    // Of what has landed, what nobody touched; zero frames are not pulled.
    let touched_zero = course.touched - course.touched_peer;
    let untouched_zero = progress.zero_frames.saturating_sub(touched_zero);
    let needless = progress.landed.saturating_sub(course.touched + untouched_zero);
    if policy.pulls() {
        engine.wait_all_landed(soon())?;
    }
    engine.stop(soon())?;
    let all = landed.0.get().map(|landed| landed.saturating_duration_since(start));
    Ok(Replayed { touches, last_touch, needless, all })
}

/// A thread for each of the course's. The engine is given back; where it fails, whoever waits for it is let go first.
fn touched(engine: Engine, guest: &Mapping, zero: &[bool], course: &Course) -> Result<(Engine, Vec<u64>), BenchError> {
    std::thread::scope(|scope| {
        let (tell, heard) = channel();
        for steps in &course.threads {
            let tell = tell.clone();
            // Whoever hears it hears it from all.
            scope.spawn(move || drop(tell.send(touch(guest, steps, zero, course.page_size))));
        }
        drop(tell);
        let (mut engine, mut outcome, mut all) = (Some(engine), Ok(()), Vec::new());
        loop {
            match heard.recv_timeout(LOOK) {
                Ok(Ok(touches)) => all.extend(touches),
                Ok(Err(wrong)) => outcome = outcome.and(Err(wrong)),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    if let Some(failure) = engine.as_ref().and_then(Engine::failure) {
                        outcome = Err(WaitError::Failed(failure).into());
                        // Its userfaultfds are closed with it, and nobody waits at what is closed.
                        engine.take().map(|engine| engine.stop(soon())).transpose()?;
                    }
                }
            }
        }
        outcome?;
        engine.map(|engine| (engine, all)).ok_or(BenchError::Thread("the engine"))
    })
}

/// What each touch took, in nanoseconds. What was found is checked.
fn touch(guest: &Mapping, steps: &[Step], zero: &[bool], page_size: PageSize) -> Result<Vec<u64>, BenchError> {
    let mut touches = Vec::with_capacity(steps.len());
    for step in steps {
        step.think();
        let at = step.page << page_size.shift();
        let start = Instant::now();
        let read = match step.write {
            // Behind the word that is checked.
            true => {
                guest.store_u64(at + 8, 1, Ordering::Relaxed);
                None
            }
            false => Some(guest.load_u64(at, Ordering::Relaxed)),
        };
        touches.push(start.elapsed().as_nanos() as u64);
        let found = read.unwrap_or_else(|| guest.load_u64(at, Ordering::Relaxed));
        let page = at / floor::PAGE;
        let expected = if zero[step.page] { 0 } else { page as u64 + 1 };
        if found != expected {
            return Err(BenchError::Wrong { page, found, expected });
        }
    }
    Ok(touches)
}
