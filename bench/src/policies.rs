//! Checkpoint policies on the same traces, in simulated time: what output is delayed by, what is sent, and for how long the guest is stopped.

use crate::error::BenchError;
use crate::quantity;
use crate::report::{Better, Case, Measure, Output, Report};
use belay_checkpoint::json_lines::LinesError;
use belay_checkpoint::policy::PolicySpec;
use belay_checkpoint::policy::simulator::{Costs, Outcome, simulate};
use belay_checkpoint::policy::trace::file;
use belay_checkpoint::policy::trace::{Trace, Workload};
use clap::Args;
use std::fs::File;
use std::io::BufReader;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Compare checkpoint policies on the same traces, in a simulator
#[derive(Debug, Args)]
#[command(after_help = "\
Nothing runs and nothing is sent: the tether loop's course is simulated over what a guest of each workload writes and sends (made from the seed, or
recorded by `belay receive --record-trace`), a link of the given speed, and costs that are straight lines in pages with noise from the seed. The same seed gives the same table.

Columns: the delay of output (how long packets were held for their checkpoint); what went over the link; epochs; the share of its time that the
guest was stopped, and how much of that because it wrote more than the link carried.")]
pub struct PolicyArgs {
    /// Which policies, as --policy of `belay send` has them
    #[arg(long, value_name = "POLICY", default_values = ["fixed:5ms", "fixed:10ms", "fixed:25ms", "fixed:40ms", "dirty:2048,max=40ms", "event:2048,max=40ms", "adaptive:50ms"])]
    policy: Vec<PolicySpec>,
    /// The link, in 10^9 bits a second
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=1000))]
    gbits: u64,
    /// What `belay receive --record-trace` has recorded, in place of made workloads; may be said several times
    #[arg(long, value_name = "FILE")]
    trace: Vec<PathBuf>,
    /// Guest RAM of a made workload
    #[arg(long, value_name = "BYTES", default_value = "256M", value_parser = quantity::bytes)]
    memory: u64,
    /// Seconds of the guest's time in a made workload
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=3600))]
    seconds: u64,
    /// A pause without pages, in µs, and what a page adds, in ns
    #[arg(long, value_name = "US", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pause_us: u64,
    #[arg(long, value_name = "NS", default_value_t = 500, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    page_ns: u64,
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    output: Output,
}

/// Seconds of a made workload at most with --quick.
const QUICK_S: u64 = 5;

/// One policy on one workload.
#[derive(Debug)]
struct Row {
    policy: String,
    delay_p50_ms: f64,
    delay_p99_ms: f64,
    delay_max_ms: f64,
    sent_bytes: u64,
    epochs: u64,
    paused_percent: f64,
    /// Of which held back, because the guest wrote more than the link carried.
    held_back_percent: f64,
}

fn row(policy: PolicySpec, outcome: &Outcome) -> Row {
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    Row {
        policy: policy.to_string(),
        delay_p50_ms: ms(outcome.delay_at(50.0)),
        delay_p99_ms: ms(outcome.delay_at(99.0)),
        delay_max_ms: ms(outcome.delay_at(100.0)),
        sent_bytes: outcome.bytes,
        epochs: outcome.epochs,
        paused_percent: 100.0 * outcome.pause_share(),
        held_back_percent: 100.0 * outcome.held_back.as_secs_f64() / outcome.took.as_secs_f64(),
    }
}

/// What the policies are compared on, each with its name.
fn traces(args: &PolicyArgs) -> Result<Vec<(String, Trace)>, BenchError> {
    let bad = |what, why| BenchError::Options { what, why };
    if args.trace.is_empty() {
        let pages = u32::try_from(args.memory >> 12).ok().filter(|pages| *pages > 0).ok_or_else(|| {
            bad(
                "a guest that cannot be simulated",
                format!("--memory {} is not between a page and 16 TiB", args.memory),
            )
        })?;
        println!(
            "{} s of a guest of {} MiB over {} Gb/s, seed {}",
            args.seconds(),
            args.memory >> 20,
            args.gbits,
            args.seed
        );
        let made = |workload: Workload| {
            (workload.to_string(), workload.trace(args.seed, pages, Duration::from_secs(args.seconds())))
        };
        return Ok(Workload::ALL.into_iter().map(made).collect());
    }
    println!("recorded traces over {} Gb/s, seed {}", args.gbits, args.seed);
    let recorded = |path: &PathBuf| {
        let file = File::open(path).map_err(LinesError::from).and_then(|file| file::read(BufReader::new(file)));
        let trace = file.map_err(|error| bad("a trace", format!("{}: {error}", path.display())))?;
        Ok((path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned(), trace))
    };
    args.trace.iter().map(recorded).collect()
}

/// Prints the table.
pub fn run(args: &PolicyArgs) -> Result<ExitCode, BenchError> {
    let costs = Costs {
        pause: Duration::from_micros(args.pause_us),
        pause_a_page: Duration::from_nanos(args.page_ns),
        commit: Duration::from_micros(150),
        link_bytes_per_s: args.gbits * 125_000_000,
        noise: 0.3,
        hiccup_in: 500,
        counts: true,
    };
    let titles = ["p50[ms]", "p99[ms]", "max[ms]", "sent[MiB]", "epochs", "paused[%]", "held[%]"];
    let titles = titles.map(|title| format!("{title:>10}")).concat();
    let mut report = Report::new("policy", &args.output);
    for (workload, trace) in traces(args)? {
        println!("{workload:<12} {:<24}{titles}", "output delay");
        for policy in &args.policy {
            let row = row(*policy, &simulate(&trace, &costs, &mut *policy.build(), args.seed));
            println!(
                "{:<12} {:<24}{:>10.2}{:>10.2}{:>10.2}{:>10.1}{:>10}{:>10.2}{:>10.2}",
                "",
                row.policy,
                row.delay_p50_ms,
                row.delay_p99_ms,
                row.delay_max_ms,
                row.sent_bytes as f64 / f64::from(1 << 20),
                row.epochs,
                row.paused_percent,
                row.held_back_percent
            );
            report.cases.push(case(&row, &workload, args));
        }
    }
    args.output.finish(&report)
}

/// The same seed gives the same values: each measure has one.
fn case(row: &Row, workload: &str, args: &PolicyArgs) -> Case {
    let mut case = Case::new(&row.policy).with("workload", workload).with("link", format!("{} Gb/s", args.gbits));
    case = case.with("seed", args.seed);
    if args.trace.is_empty() {
        case = case.with("memory", format!("{} MiB", args.memory >> 20)).with("seconds", args.seconds());
    }
    let measures = [
        ("output delay, median", "ms", row.delay_p50_ms),
        ("output delay, 99%", "ms", row.delay_p99_ms),
        ("output delay, most", "ms", row.delay_max_ms),
        ("sent", "MiB", row.sent_bytes as f64 / f64::from(1 << 20)),
        ("epochs", "", row.epochs as f64),
        ("guest stopped", "%", row.paused_percent),
        ("guest held back", "%", row.held_back_percent),
    ];
    let measure = |(name, unit, value): (&str, &str, f64)| Measure::new(name, unit, Better::Lower, vec![value]);
    case.measures = measures.into_iter().map(measure).collect();
    case
}

impl PolicyArgs {
    /// Of the guest's time in a made workload.
    fn seconds(&self) -> u64 {
        if self.output.quick { self.seconds.min(QUICK_S) } else { self.seconds }
    }
}
