//! `belay-bench sweep`: what a tether costs, by when its checkpoints are taken: the experiment of the PostCopyFT paper, with belay's own guest.
//!
//! Every way in turns in every round, `none` among them: the same guest, moved and released with no checkpoint. What is measured is what `belay send`
//! and `belay receive` say themselves; they are run as a user would run them.

mod report;

use crate::belay::{Belay, Told};
use crate::error::BenchError;
use crate::folder::Folder;
use crate::quantity::{self, LinkRate};
use crate::report::{Output, Report};
use belay_checkpoint::policy::PolicySpec;
use belay_transport::fabric::FabricKind;
use belay_vmm_glue::migrate::observation::Kind;
use clap::{Args, ValueEnum};
use report::{Case, Sample, Setting};
use std::fmt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use std::time::Duration;

/// What a tether costs, by policy: total time of a migration, downtime, checkpoints, delay of output
#[derive(Debug, Args)]
#[command(after_help = "\
Everything goes over this host's loopback interface, or its shared memory. Needs what `belay send` needs; nothing is left behind.

Columns: total, from the guest's pause at the source to its release, and how much of what the same round took without checkpoints; down, that the
guest stood still in that time: at the switch, for checkpoints, held back; checkpoints, how many committed a second, pages and bytes of them; age, how
old a checkpoint was when it had committed; output delay, how long packets waited for theirs; host a and host b, processor time of source and
destination, guest included.

Workloads: idle writes 100 pages a second, random 20,000 anywhere in 64 MiB, sequential as many from its one end to the other, zipf as many of which
56 % go to a hundredth of it, phases each of these in turns for 1.6 s, write-heavy 200,000 in 32 MiB. A packet leaves every 256 pages written.")]
pub struct SweepArgs {
    /// Which policies, as --policy of `belay send` has them, and none
    #[arg(long, value_name = "POLICY", value_delimiter = ';', default_values = ["none", "fixed:0.1ms", "fixed:1ms", "fixed:10ms", "fixed:50ms", "fixed:100ms", "adaptive:50ms"])]
    policy: Vec<Way>,
    /// Which guests
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Workload::USUAL)]
    workload: Vec<Workload>,
    /// Guest RAM
    #[arg(long, value_name = "BYTES", value_delimiter = ',', default_value = "1G", value_parser = quantity::bytes)]
    memory: Vec<u64>,
    /// What carries the pages
    #[arg(long, value_enum, default_value = "tcp")]
    fabric: Carrier,
    /// Hold TCP to a link rate, as --pace of `belay send`
    #[arg(long, value_name = "RATE", value_parser = quantity::link_rate)]
    pace: Option<LinkRate>,
    /// Keep the guest tethered so long after its last page has come; total and down are of that time too
    #[arg(long, value_name = "TIME", value_parser = quantity::time)]
    hold: Option<Duration>,
    /// Rounds, each policy once in every one
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// The belay to measure [default: the one beside this program]
    #[arg(long, value_name = "PROGRAM")]
    belay: Option<PathBuf>,
    #[command(flatten)]
    output: Output,
}

/// A policy, or no tether.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    None,
    Tethered(PolicySpec),
}

impl FromStr for Way {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "none" => Ok(Self::None),
            text => text
                .parse()
                .map(Self::Tethered)
                .map_err(|error: belay_checkpoint::policy::PolicyParseError| error.to_string()),
        }
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.pad("none"),
            Self::Tethered(policy) => f.pad(&policy.to_string()),
        }
    }
}

/// What the guest does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Workload {
    Idle,
    Random,
    Sequential,
    Zipf,
    Phases,
    WriteHeavy,
}

impl Workload {
    /// Where nobody says which.
    const USUAL: [Self; 3] = [Self::Idle, Self::Random, Self::WriteHeavy];

    /// The program, pages a second, and the memory they are spread over.
    fn words(self) -> [&'static str; 6] {
        let (program, rate, pages) = match self {
            Self::Idle => ("ledger", "100", "64M"),
            Self::Random => ("ledger", "20k", "64M"),
            Self::Sequential => ("sequential", "20k", "64M"),
            Self::Zipf => ("zipf", "20k", "64M"),
            Self::Phases => ("phases", "20k", "64M"),
            Self::WriteHeavy => ("ledger", "200k", "32M"),
        };
        ["--guest", program, "--dirty-rate", rate, "--working-set", pages]
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.to_possible_value().expect("none is hidden").get_name())
    }
}

/// What carries the pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Carrier {
    Local,
    Tcp,
}

impl From<Carrier> for FabricKind {
    fn from(carrier: Carrier) -> Self {
        match carrier {
            Carrier::Local => Self::Local,
            Carrier::Tcp => Self::Tcp,
        }
    }
}

/// Figures of others, for whoever reads ours.
const PAPER: &str = "The paper's (PostCopyFT, INFOCOM 2019; 1 Gb/s, guests of one vCPU; theirs, not measured here): periods from 0.1 to 100 ms, the migration time \
    unchanged, 1.1 to 2.2 s of downtime in total at 0.1 ms.";

/// Longest that a migration may take beyond what it is held for.
const MOVED: Duration = Duration::from_secs(600);

/// Runs the suite.
pub fn run(args: &SweepArgs) -> Result<ExitCode, BenchError> {
    // One round, and a small guest.
    let (memory, rounds) = match args.output.quick {
        true => (vec![128 << 20], 1),
        false => (args.memory.clone(), args.rounds),
    };
    let folder = Folder::make(&std::env::temp_dir(), "sweep")?;
    let belay = Belay::find(args.belay.as_deref(), folder.path())?;
    let fabric = FabricKind::from(args.fabric);
    let setting = Setting { fabric, pace: args.pace.clone(), hold: args.hold, rounds };
    let mut report = Report::new("sweep", &args.output);
    let migrations = memory.len() * args.workload.len() * args.policy.len() * rounds as usize;
    let bar = args.output.progress(migrations as u64);
    for &memory in &memory {
        for &workload in &args.workload {
            let mut case = Case::new(workload, memory);
            for round in 0..rounds as usize {
                for turn in 0..args.policy.len() {
                    // Another one first in every round.
                    let way = args.policy[(turn + round) % args.policy.len()];
                    bar.set_message(format!("{} MiB, {workload}, {way}", memory >> 20));
                    case.add(round, way, migrate(args, &belay, fabric, memory, workload, way)?);
                    bar.inc(1);
                }
            }
            bar.suspend(|| case.print(&setting, &args.policy));
            report.goals.extend(case.goals(&setting, &args.policy));
            report.cases.extend(case.cases(&setting, &args.policy));
        }
    }
    bar.finish_and_clear();
    report.note(PAPER);
    args.output.finish(&report)
}

/// Moves one guest.
fn migrate(
    args: &SweepArgs,
    belay: &Belay,
    fabric: FabricKind,
    memory: u64,
    workload: Workload,
    way: Way,
) -> Result<Sample, BenchError> {
    let (listen, carrier) = (belay.address(fabric, "listen"), fabric.to_string());
    let words =
        ["receive", "--fabric", &carrier, "--listen", &listen, "--state-dir", &belay.path("there"), "--run-on", "1ms"];
    let (mut receiver, to) = belay.start(&words)?.listening()?;
    let (memory, policy) = (memory.to_string(), way.to_string());
    let here = belay.path("here");
    let words =
        ["send", "--fabric", &carrier, "--to", &to, "--state-dir", &here, "--memory", &memory, "--policy", &policy];
    let mut words = [&words[..], &workload.words(), &["--run-before", "200ms"]].concat();
    let hold = args.hold.filter(|_| way != Way::None).map(|hold| format!("{}us", hold.as_micros()));
    if let Some(hold) = &hold {
        words.extend(["--release", hold]);
    }
    if let Some(pace) = &args.pace {
        words.extend(["--pace", &pace.text]);
    }
    let mut sender = belay.start(&words)?;
    let bound = MOVED + args.hold.unwrap_or_default();
    let released = |kind: &Kind| matches!(kind, Kind::Released { .. });
    sender.wait("move the guest", bound, released)?;
    sender.end()?;
    receiver.end()?;
    sample(&sender, &receiver)
}

/// What both have said of it.
fn sample(sender: &Told, receiver: &Told) -> Result<Sample, BenchError> {
    let missing = || BenchError::Refused { why: "belay did not say what the migration took".to_owned() };
    let total = sender.find(|kind| match kind {
        Kind::Released { total_us } => Some(Duration::from_micros(*total_us)),
        _ => None,
    });
    let (total, blackout) = (total.ok_or_else(missing)?, sender.blackout().ok_or_else(missing)?);
    let tether = receiver.find(|kind| match kind {
        Kind::TetherSummary { .. } => Some(kind.clone()),
        _ => None,
    });
    Ok(Sample::new(total, blackout, tether.as_ref(), [sender.cpu(), receiver.cpu()]))
}
