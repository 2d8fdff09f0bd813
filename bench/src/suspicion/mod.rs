//! `belay-bench suspicion`: how often a destination that lives is taken for dead, by lease and by what is done to it.
//!
//! Nothing dies in it: every catch that begins was begun for nothing. (It loses nothing either: the guest goes on at its source, from its last commit.)

mod stress;

use crate::belay::{ANSWER, Belay};
use crate::error::BenchError;
use crate::folder::Folder;
use crate::quantity;
use crate::report::{Better, Case, Measure, Output, Report};
use crate::table::median;
use belay_transport::fabric::FabricKind;
use belay_vmm_glue::migrate::observation::Kind;
use clap::{Args, ValueEnum};
use std::fmt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use stress::Stress;

/// How often a living destination is taken for dead: by lease, without processors, under SIGSTOP, without memory
#[derive(Debug, Args)]
#[command(after_help = "\
A guest of 256 MiB that writes 20,000 pages a second is moved over loopback and tethered; once its last page has come the stress begins, and goes on for
--time or until the source says that the destination is lost.

Stress: none; processors, --busy threads for every one of them; stops, source or destination stopped again and again, each time for up to --stop percent
of the lease; memory, all but a GiB taken, given back and taken again.

Columns: suspected, in how many of the trials, after what time (median), and by what; fenced, how often the destination had shut its own gate because its
lease had run out.")]
pub struct SuspicionArgs {
    /// Leases
    #[arg(long, value_name = "TIME", value_delimiter = ',', default_value = "100ms,300ms,1s", value_parser = quantity::time)]
    lease: Vec<Duration>,
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = StressKind::ALL)]
    stress: Vec<StressKind>,
    /// Busy threads for each processor
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..=1000))]
    busy: u64,
    /// Longest stop, in percent of the lease
    #[arg(long, value_name = "PERCENT", default_value_t = 80, value_parser = clap::value_parser!(u64).range(1..=1000))]
    stop: u64,
    /// How long a trial lasts
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = quantity::time)]
    time: Duration,
    /// Trials of each
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// The belay to measure [default: the one beside this program]
    #[arg(long, value_name = "PROGRAM")]
    belay: Option<PathBuf>,
    #[command(flatten)]
    output: Output,
}

/// What is done to them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum StressKind {
    None,
    Processors,
    Stops,
    Memory,
}

impl StressKind {
    const ALL: [Self; 4] = [Self::None, Self::Processors, Self::Stops, Self::Memory];
}

impl fmt::Display for StressKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.to_possible_value().expect("none is hidden").get_name())
    }
}

/// All trials of one lease under one stress.
#[derive(Debug)]
struct Row {
    lease_ms: f64,
    stress: String,
    trials: u32,
    suspected: usize,
    after_ms: Option<f64>,
    by: Vec<String>,
    fenced: usize,
}

/// One trial.
struct Trial {
    /// When, since the stress began, and by what.
    suspected: Option<(Duration, String)>,
    fenced: bool,
}

/// How long a trial lasts at most with --quick.
const QUICK: Duration = Duration::from_secs(3);
/// For a guest to be moved.
const MOVED: Duration = Duration::from_secs(120);

/// Runs the suite.
pub fn run(args: &SuspicionArgs) -> Result<ExitCode, BenchError> {
    // One trial of each, and a short one.
    let (rounds, time) = if args.output.quick { (1, args.time.min(QUICK)) } else { (args.rounds, args.time) };
    let folder = Folder::make(&std::env::temp_dir(), "suspicion")?;
    let belay = Belay::find(args.belay.as_deref(), folder.path())?;
    let bar = args.output.progress((args.lease.len() * args.stress.len()) as u64 * u64::from(rounds));
    println!(
        " {:<12}{:>10}{:>8}{:>11}{:>11}{:>8}  by",
        "stress", "lease[ms]", "trials", "suspected", "after[ms]", "fenced"
    );
    let mut report = Report::new("suspicion", &args.output);
    for &stress in &args.stress {
        for &lease in &args.lease {
            let mut trials = Vec::new();
            for round in 0..rounds {
                bar.set_message(format!("{stress}, lease {lease:?}"));
                trials.push(trial(args, &belay, stress, lease, time, args.seed.wrapping_add(u64::from(round)))?);
                bar.inc(1);
            }
            let row = row(stress, lease, &trials);
            bar.suspend(|| print(&row));
            let case =
                Case::new(stress.to_string()).with("lease", format!("{lease:?}")).with("time", format!("{time:?}"));
            report.notes.extend(row.by.iter().map(|by| format!("{}: suspected by {by}", case.title())));
            report.cases.push(measures(case, &row, &trials));
        }
    }
    bar.finish_and_clear();
    args.output.finish(&report)
}

fn measures(mut case: Case, row: &Row, trials: &[Trial]) -> Case {
    let percent = |count: usize| vec![100.0 * count as f64 / f64::from(row.trials)];
    let after = trials.iter().filter_map(|trial| Some(trial.suspected.as_ref()?.0.as_secs_f64() * 1e3)).collect();
    let measures = [
        ("trials in which it was suspected", "%", Better::Lower, percent(row.suspected)),
        ("trials in which it fenced itself", "%", Better::Lower, percent(row.fenced)),
        ("suspected after", "ms", Better::Higher, after),
    ];
    let measures = measures.into_iter().filter(|(.., rounds)| !rounds.is_empty());
    case.measures.extend(measures.map(|(name, unit, better, rounds)| Measure::new(name, unit, better, rounds)));
    case
}

fn row(stress: StressKind, lease: Duration, trials: &[Trial]) -> Row {
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let suspected: Vec<_> = trials.iter().filter_map(|trial| trial.suspected.as_ref()).collect();
    let after: Vec<f64> = suspected.iter().map(|(after, _)| ms(*after)).collect();
    let mut by: Vec<String> = suspected.iter().map(|(_, by)| by.clone()).collect();
    by.sort();
    by.dedup();
    Row {
        lease_ms: ms(lease),
        stress: stress.to_string(),
        trials: trials.len() as u32,
        suspected: suspected.len(),
        after_ms: (!after.is_empty()).then(|| median(&after)),
        by,
        fenced: trials.iter().filter(|trial| trial.fenced).count(),
    }
}

fn print(row: &Row) {
    println!(
        " {:<12}{:>10.0}{:>8}{:>11}{:>11}{:>8}  {}",
        row.stress,
        row.lease_ms,
        row.trials,
        row.suspected,
        row.after_ms.map_or("-".to_owned(), |ms| format!("{ms:.0}")),
        row.fenced,
        row.by.join("; ")
    );
}

fn trial(
    args: &SuspicionArgs,
    belay: &Belay,
    kind: StressKind,
    lease: Duration,
    time: Duration,
    seed: u64,
) -> Result<Trial, BenchError> {
    let (listen, there, here) = (belay.address(FabricKind::Tcp, ""), belay.path("there"), belay.path("here"));
    let words = ["receive", "--fabric", "tcp", "--listen", &listen, "--state-dir", &there];
    let (mut receiver, to) = belay.start(&words)?.listening()?;
    let lasts = format!("{}us", lease.as_micros());
    let words = ["send", "--fabric", "tcp", "--to", &to, "--state-dir", &here, "--lease", &lasts, "--release", "never"];
    let guest = ["--memory", "256M", "--dirty-rate", "20k", "--run-before", "100ms"];
    let mut sender = belay.start(&[&words[..], &guest].concat())?;
    let noticed = |kind: &Kind| match kind {
        Kind::Noticed { by } => Some(by.clone()),
        _ => None,
    };
    if let Err(error) = receiver.wait("pull the guest", MOVED, |kind| matches!(kind, Kind::AllLanded { .. })) {
        // What else this machine does was enough for it.
        let Ok(Some((_, by))) = sender.wait_if(ANSWER, noticed) else { return Err(error) };
        sender.ask_to_end(ANSWER);
        return Ok(Trial { suspected: Some((Duration::ZERO, format!("{by} (in the pull)"))), fenced: true });
    }
    let stress = match kind {
        StressKind::None => Stress::none(),
        StressKind::Processors => {
            let processors = std::thread::available_parallelism().map_or(1, usize::from);
            Stress::processors(processors * args.busy as usize)?
        }
        StressKind::Stops => {
            Stress::stops([sender.pid(), receiver.pid()], lease.mul_f64(args.stop as f64 / 100.0), seed)?
        }
        StressKind::Memory => Stress::memory()?,
    };
    let began = Instant::now();
    let suspected = sender.wait_if(time, noticed)?;
    let suspected = suspected.map(|(at, by)| (at.saturating_duration_since(began), by));
    drop(stress);
    // Before it is asked to end: that shuts the gate too.
    receiver.catch_up();
    let fenced = receiver.find(|kind| match kind {
        Kind::State { state, .. } => state.eq_ignore_ascii_case("fenced").then_some(()),
        _ => None,
    });
    receiver.ask_to_end(ANSWER);
    sender.ask_to_end(ANSWER);
    Ok(Trial { suspected, fenced: fenced.is_some() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_counts_the_suspected_and_says_by_what_once() {
        let suspected =
            |ms, by: &str| Trial { suspected: Some((Duration::from_millis(ms), by.to_owned())), fenced: true };
        let trials =
            [suspected(30, "b"), Trial { suspected: None, fenced: false }, suspected(10, "a"), suspected(20, "b")];
        let row = row(StressKind::Stops, Duration::from_millis(100), &trials);
        assert_eq!((row.trials, row.suspected, row.fenced, row.after_ms), (4, 3, 3, Some(20.0)));
        assert_eq!(row.by, ["a", "b"]);
    }
}
