//! `scale`: several guests that move at once, and the engine alone under many faulting threads.

mod engine;
mod guests;
mod memory;

use crate::belay::Belay;
use crate::error::BenchError;
use crate::folder::Folder;
use crate::quantity;
use crate::report::{Axis, Case, Output, Plot, Point, Report, Role, Series};
use belay_transport::fabric::FabricKind;
use clap::{Args, ValueEnum};
use std::path::PathBuf;
use std::process::ExitCode;

/// Several guests that move at once: throughput, fairness, memory; and the engine alone under up to 256 faulting threads
#[derive(Debug, Args)]
#[command(after_help = "\
Guests are belay's own, each moved from one `belay send` to one `belay receive`, all over this host's loopback or shared memory and with the same
processors. In every round a single guest moves too, and the others' figures stand beside its. Every guest's memory is checked to the last byte where it
has moved to.

The engine alone serves threads of this process that touch scattered pages, all at once; every page is checked. It needs userfaultfd.")]
pub struct ScaleArgs {
    /// Guests that move at once [default: 1,2,4,8]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = clap::value_parser!(u64).range(1..=64))]
    guests: Vec<u64>,
    /// What carries their pages
    #[arg(long, value_enum, value_name = "LIST", value_delimiter = ',', default_values_t = [Carrier::Tcp, Carrier::Local])]
    fabric: Vec<Carrier>,
    /// RAM of a guest [default: 256M]
    #[arg(long, value_name = "BYTES", value_parser = quantity::bytes)]
    memory: Option<u64>,
    /// As --policy of `belay send`
    #[arg(long, value_name = "POLICY", default_value = "adaptive:50ms")]
    policy: String,
    /// Threads that fault at once [default: 1,16,64,256]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = clap::value_parser!(u64).range(1..=1024))]
    threads: Vec<u64>,
    /// Shards of the engine, each with a thread and a userfaultfd [default: 1,4,16]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = clap::value_parser!(u64).range(1..=64))]
    shards: Vec<u64>,
    /// Rounds of each [default: 3]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1000))]
    rounds: Option<u64>,
    /// Which half, or both
    #[arg(long, value_enum, value_name = "LIST", value_delimiter = ',', default_values_t = [Half::Guests, Half::Engine])]
    only: Vec<Half>,
    /// The belay to measure [default: the one beside this program]
    #[arg(long, value_name = "PROGRAM")]
    belay: Option<PathBuf>,
    #[command(flatten)]
    output: Output,
}

/// What carries the pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Carrier {
    Tcp,
    Local,
}

impl From<Carrier> for FabricKind {
    fn from(carrier: Carrier) -> Self {
        match carrier {
            Carrier::Tcp => Self::Tcp,
            Carrier::Local => Self::Local,
        }
    }
}

impl std::fmt::Display for Carrier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.to_possible_value().expect("none is hidden").get_name())
    }
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Half {
    /// Guests that move
    Guests,
    /// The engine alone
    Engine,
}

impl std::fmt::Display for Half {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.to_possible_value().expect("none is hidden").get_name())
    }
}

/// Unless it is asked for otherwise: full, quick.
fn or_default(asked: &[u64], quick: bool, full: &[u64], short: &[u64]) -> Vec<u64> {
    match asked {
        [] if quick => short.to_vec(),
        [] => full.to_vec(),
        asked => asked.to_vec(),
    }
}

pub fn run(args: &ScaleArgs) -> Result<ExitCode, BenchError> {
    let quick = args.output.quick;
    let rounds = args.rounds.unwrap_or(if quick { 1 } else { 3 });
    let guests = or_default(&args.guests, quick, &[1, 2, 4, 8], &[1, 4]);
    let threads = or_default(&args.threads, quick, &[1, 16, 64, 256], &[1, 64]);
    let shards = or_default(&args.shards, quick, &[1, 4, 16], &[1, 4]);
    let memory = args.memory.unwrap_or(if quick { 64 << 20 } else { 256 << 20 });
    let mut report = Report::new("scale", &args.output);
    let half = |half, cases: usize| if args.only.contains(&half) { cases as u64 * rounds } else { 0 };
    let steps = half(Half::Guests, guests.len() * args.fabric.len()) + half(Half::Engine, threads.len() * shards.len());
    let bar = args.output.progress(steps);
    if args.only.contains(&Half::Guests) {
        let folder = Folder::make(&std::env::temp_dir(), "scale")?;
        let belay = Belay::find(args.belay.as_deref(), folder.path())?;
        for &fabric in &args.fabric {
            let mut single = Vec::new();
            for &count in &guests {
                let mut all = Vec::new();
                for round in 0..rounds {
                    bar.set_message(format!("{count} guests over {fabric}"));
                    let move_all = |count| guests::move_at_once(&belay, fabric.into(), memory, &args.policy, count);
                    // Each round has a single guest of its own, so that the two are neighbours in time.
                    let alone = move_all(1)?;
                    all.push(if count == 1 { alone.clone() } else { move_all(count)? });
                    single.push((count, round, alone));
                    bar.inc(1);
                }
                let alone: Vec<_> = single.iter().filter(|(of, ..)| *of == count).map(|(.., alone)| alone).collect();
                let case = guests::case(fabric.into(), memory, &args.policy, count, &all, &alone);
                bar.suspend(|| case.print());
                report.cases.push(case);
            }
        }
    }
    if args.only.contains(&Half::Engine) {
        for &shards in &shards {
            for &threads in &threads {
                bar.set_message(format!("{threads} threads, {shards} shards"));
                let mut all = Vec::new();
                for _ in 0..rounds {
                    let alone = engine::serve(1, 1, quick)?;
                    all.push((engine::serve(threads as usize, shards as usize, quick)?, alone));
                    bar.inc(1);
                }
                let case = engine::case(threads, shards, &all);
                bar.suspend(|| case.print());
                report.cases.push(case);
            }
        }
    }
    bar.finish_and_clear();
    let plots = [
        plot(&report, ("guests that move at once", "guests", "fabric"), guests::AGGREGATE, "MB/s"),
        plot(&report, ("the engine alone", "threads", "shards"), engine::RATE, "faults/s"),
    ];
    let mut case = Case::new("how it scales");
    case.plots.extend(plots.into_iter().flatten());
    if !case.plots.is_empty() {
        report.cases.push(case);
    }
    args.output.finish(&report)
}

/// A measure of the cases called `name` over parameter `x`, a line for each value of `by`.
fn plot(report: &Report, (name, x, by): (&str, &str, &str), measure: &str, unit: &str) -> Option<Plot> {
    let mut series: Vec<Series> = Vec::new();
    for case in report.cases.iter().filter(|case| case.name == name) {
        let parameter = |name: &str| case.parameters.iter().find(|(known, _)| known == name).map(|(_, value)| value);
        let at = parameter(x).and_then(|value| value.parse::<f64>().ok());
        let (Some(at), Some(line), Some(values)) = (at, parameter(by), case.measure(measure)) else { continue };
        let (line, point) = (format!("{by} {line}"), Point::of_rounds(at, &values.rounds));
        match series.iter_mut().find(|series| series.name == line) {
            Some(series) => series.points.push(point),
            None => series.push(Series { name: line, role: Role::Ours, points: vec![point] }),
        }
    }
    series.iter().any(|series| series.points.len() > 1).then(|| Plot::Sweep {
        title: format!("{name}: {measure}"),
        x: Axis::log(x, ""),
        y: Axis::linear(measure, unit),
        series,
        references: Vec::new(),
    })
}
