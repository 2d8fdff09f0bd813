//! `catch`: what it takes to have the guest back at its source, split into its steps, by how much is left to fold; and the whole as the
//! world sees it, from the last output of the destination to the first new one of the source.

mod ring;
mod world;

use crate::Fabric;
use crate::belay::Belay;
use crate::carrier::{Carrier, Device};
use crate::error::BenchError;
use crate::folder::Folder;
use crate::quantity;
use crate::report::{Axis, Case, Goal, Output, Plot, Point, Reference, Report, Role, Series};
use clap::Args;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use world::Loss;

/// A catch: noticed, revoked, folded, loaded, running; and how long the world waits for output
#[derive(Debug, Args)]
#[command(after_help = "\
First, both hosts in one process: so many pages have committed and wait in the ring when the destination goes away, in one epoch or spread over several.
Then belay itself: `belay receive` is killed, or stopped with SIGSTOP so that only the lease tells, and an observer notes when output came. Every catch is
checked to the last byte. Needs /dev/kvm, userfaultfd, and memory for four guests of the size.")]
pub struct CatchArgs {
    /// What carries the checkpoints; verbs goes through the RDMA device, out and in again
    #[arg(long, value_enum, default_value = "tcp")]
    fabric: Fabric,
    #[command(flatten)]
    device: Device,
    /// Pages that have committed and are not folded when the destination is lost [default: 100,1000,10000,20000,100000,200000]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    pages: Vec<u64>,
    /// Epochs that they are spread over
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "1,10", value_parser = clap::value_parser!(u64).range(1..=1000))]
    epochs: Vec<u64>,
    /// Rounds of each [default: 5]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1000))]
    rounds: Option<u64>,
    /// How belay's destination is lost
    #[arg(long, value_enum, value_name = "LIST", value_delimiter = ',', default_values_t = Loss::ALL)]
    loss: Vec<Loss>,
    /// How long it is tethered before
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = quantity::time)]
    tethered: Duration,
    /// How often it is lost in each way; 0 leaves belay itself out [default: 5]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(0..=1000))]
    trials: Option<u64>,
    /// The belay to lose [default: the one beside this program]
    #[arg(long, value_name = "PROGRAM")]
    belay: Option<PathBuf>,
    #[command(flatten)]
    output: Output,
}

/// Goals: to fold 20,000 pages, and to have the guest run beside what there is to fold, in milliseconds.
const FOLD: (u64, f64) = (20_000, 20.0);
const BESIDE_FOLDING_MS: f64 = 10.0;
/// What PostCopyFT reports for recovery with 20,000 checkpointed pages (INFOCOM 2019): theirs, on their machines, over 1 Gb/s.
const PAPER_MS: f64 = 200.0;

pub fn run(args: &CatchArgs) -> Result<ExitCode, BenchError> {
    let quick = args.output.quick;
    let rounds = args.rounds.unwrap_or(if quick { 2 } else { 5 });
    let trials = args.trials.unwrap_or(if quick { 1 } else { 5 });
    let (pages, epochs) = match (&args.pages[..], quick) {
        ([], true) => (vec![100, FOLD.0], vec![1]),
        ([], false) => (vec![100, 1_000, 10_000, FOLD.0, 100_000, 200_000], args.epochs.clone()),
        (asked, _) => (asked.to_vec(), args.epochs.clone()),
    };
    let carrier = Carrier::within_this_host(args.fabric.into(), args.device.clone());
    let mut report = Report::new("catch", &args.output);
    let steps = (pages.len() * epochs.len()) as u64 * rounds + args.loss.len() as u64 * trials;
    let bar = args.output.progress(steps);
    for &pages in &pages {
        for &epochs in epochs.iter().filter(|&&epochs| epochs <= pages) {
            let mut caught = Vec::new();
            for _ in 0..rounds {
                bar.set_message(format!("{pages} pages in {epochs} epochs"));
                caught.push(ring::catch(&carrier, pages, epochs)?);
                bar.inc(1);
            }
            let case = ring::case(&carrier, pages, epochs, &caught);
            bar.suspend(|| case.print());
            if (pages, epochs) == (FOLD.0, 1) {
                report.goals.push(Goal::at_most(&case, ring::FOLDED, "ms", of(&case, ring::FOLDED), FOLD.1));
            }
            let beside = of(&case, ring::BESIDE);
            report.goals.push(Goal::at_most(&case, ring::BESIDE, "ms", beside, BESIDE_FOLDING_MS));
            report.cases.push(case);
        }
    }
    if trials > 0 {
        let folder = Folder::make(&std::env::temp_dir(), "catch")?;
        let belay = Belay::find(args.belay.as_deref(), folder.path())?;
        for &loss in &args.loss {
            let mut seen = Vec::new();
            for trial in 0..trials {
                bar.set_message(format!("belay receive, {loss}"));
                seen.push(world::lose(&belay, args.fabric.into(), loss, args.tethered, trial)?);
                bar.inc(1);
            }
            let case = world::case(args.fabric.into(), loss, args.tethered, &seen);
            bar.suspend(|| case.print());
            let beside = of(&case, world::BESIDE);
            report.goals.push(Goal::at_most(&case, world::BESIDE, "ms", beside, BESIDE_FOLDING_MS));
            report.cases.push(case);
        }
    }
    bar.finish_and_clear();
    report.note(format!(
        "the paper's recovery, theirs and not measured here: about {PAPER_MS:.0} ms for {} checkpointed pages (PostCopyFT, INFOCOM 2019, 1 Gb/s)",
        FOLD.0
    ));
    let plot = plot(&report);
    if let Some(plot) = plot {
        let mut case = Case::new("how a catch grows");
        case.plots.push(plot);
        report.cases.push(case);
    }
    args.output.finish(&report)
}

/// A measure's median.
fn of(case: &Case, measure: &str) -> f64 {
    case.measure(measure).map_or(f64::NAN, |measure| measure.value())
}

/// Folding by pages, one epoch, beside memcpy of as many and the paper's figure.
fn plot(report: &Report) -> Option<Plot> {
    let (mut ours, mut floor) = (Vec::new(), Vec::new());
    for case in &report.cases {
        let parameter = |name: &str| case.parameters.iter().find(|(known, _)| known == name).map(|(_, value)| value);
        let pages = parameter("pages").and_then(|pages| pages.parse::<f64>().ok());
        let folded = case.measure(ring::FOLDED).filter(|_| parameter("epochs").is_some_and(|epochs| epochs == "1"));
        if let (Some(pages), Some(folded)) = (pages, folded)
            && let Some(beside) = &folded.beside
        {
            ours.push(Point::of_rounds(pages, &folded.rounds));
            floor.push(Point::of_rounds(pages, &beside.rounds));
        }
    }
    let series = |name: &str, role, points| Series { name: name.to_owned(), role, points };
    (ours.len() > 1).then(|| Plot::Sweep {
        title: "Folding what is left in the ring, by pages".to_owned(),
        x: Axis::log("pages left to fold", ""),
        y: Axis::log("time", "ms"),
        series: vec![series("folded", Role::Ours, ours), series("memcpy, one thread", Role::Floor, floor)],
        references: vec![Reference { name: "PostCopyFT, 20,000 pages (theirs)".to_owned(), y: PAPER_MS }],
    })
}
