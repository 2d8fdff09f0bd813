//! `belay-bench`: measures belay side by side with floors that use nothing of it, in the same run, interleaved.

mod belay;
mod carrier;
mod checkpoint;
mod envelope;
mod error;
mod fault;
mod floor;
mod folder;
mod migrate;
mod policies;
mod profile;
mod pull;
mod quantity;
mod report;
mod rig;
mod suspicion;
mod sweep;
mod table;
mod tethered;
mod tracking;
mod wire;

use belay_transport::fabric::FabricKind;
use clap::{Args, Parser, Subcommand, ValueEnum};
use error::BenchError;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Measures belay beside floors that use nothing of it.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Fault(fault::FaultArgs),
    Pull(pull::PullArgs),
    /// The pause of a checkpoint at 1,000 scattered dirty pages, as the guest's own clock sees it
    Checkpoint(Options),
    Migrate(Box<migrate::MigrateArgs>),
    Sweep(Box<sweep::SweepArgs>),
    Suspicion(Box<suspicion::SuspicionArgs>),
    Policy(Box<policies::PolicyArgs>),
    Tracking(tracking::TrackingArgs),
    Wire(Box<wire::WireArgs>),
    Envelope(Box<envelope::Envelope>),
    Html(report::HtmlArgs),
    Results(report::ResultsArgs),
    Compare(report::CompareArgs),
}

#[derive(Args)]
struct Options {
    /// What carries the pages; verbs goes through the RDMA device, out and in again
    #[arg(long, value_enum, default_value = "local")]
    fabric: Fabric,
    #[command(flatten)]
    device: carrier::Device,
    /// Fewer rounds and less memory
    #[arg(long)]
    quick: bool,
    /// Also write the report as JSON
    #[arg(long, value_name = "FILE")]
    out_json: Option<PathBuf>,
}

/// What carries the pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Fabric {
    Local,
    Tcp,
    Verbs,
}

impl std::fmt::Display for Fabric {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        FabricKind::from(*self).fmt(f)
    }
}

impl From<Fabric> for FabricKind {
    fn from(fabric: Fabric) -> Self {
        match fabric {
            Fabric::Local => Self::Local,
            Fabric::Tcp => Self::Tcp,
            Fabric::Verbs => Self::Verbs,
        }
    }
}

impl Fabric {
    /// The wire of a floor that uses nothing of ours. None of ours could post to a device without becoming a second fabric:
    /// there the bare lanes of `wire` stand for the floor, and perftest beside them.
    fn floor(self) -> Option<floor::Wire> {
        match self {
            Self::Local => Some(floor::Wire::Memory),
            Self::Tcp => Some(floor::Wire::Tcp),
            Self::Verbs => None,
        }
    }
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Fault(args) => fault::run(&args),
        Command::Pull(args) => pull::run(&args),
        Command::Checkpoint(options) => {
            let (fabric, device) = (options.fabric.into(), options.device.clone());
            checkpoint::run(fabric, device, options.quick).and_then(|report| options.save(&report))
        }
        Command::Migrate(args) => migrate::run(&args),
        Command::Sweep(args) => sweep::run(&args),
        Command::Suspicion(args) => suspicion::run(&args),
        Command::Policy(args) => policies::run(&args),
        Command::Tracking(args) => tracking::run(&args),
        Command::Wire(args) => wire::run(&args).and_then(|report| match report {
            Some(report) => save(args.out_json.as_deref(), &report),
            None => Ok(ExitCode::SUCCESS),
        }),
        Command::Envelope(envelope) => {
            println!("{}", envelope.text());
            save(envelope.out_json.as_deref(), &envelope.report())
        }
        Command::Html(args) => args.run(),
        Command::Results(args) => args.run(),
        Command::Compare(args) => args.run(),
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("belay-bench: {}", error.with_causes());
            ExitCode::FAILURE
        }
    }
}

impl Options {
    fn save(&self, report: &impl serde::Serialize) -> Result<ExitCode, BenchError> {
        save(self.out_json.as_deref(), report)
    }
}

/// Into `path`, or onto stdout for `-`, if anywhere.
fn save(path: Option<&Path>, report: &impl serde::Serialize) -> Result<ExitCode, BenchError> {
    let write = |path: &Path| -> std::io::Result<()> {
        let mut json = serde_json::to_vec_pretty(report)?;
        json.push(b'\n');
        match path.as_os_str() == "-" {
            true => std::io::stdout().write_all(&json),
            false => std::fs::write(path, json),
        }
    };
    path.map_or(Ok(()), write).map_err(BenchError::io("writing the JSON report"))?;
    Ok(ExitCode::SUCCESS)
}
