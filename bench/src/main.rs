//! `belay-bench`: measures belay side by side with floors that use nothing of it, in the same run, interleaved.

mod belay;
mod carrier;
mod catch;
mod checkpoint;
mod cores;
mod envelope;
mod error;
mod fault;
mod floor;
mod folder;
mod leavings;
mod migrate;
mod policies;
mod profile;
mod pull;
mod quantity;
mod replay;
mod report;
mod rig;
mod scale;
mod staging;
mod suspicion;
mod sweep;
mod table;
mod tethered;
mod tracking;
mod wire;

use belay_transport::fabric::FabricKind;
use clap::{Parser, Subcommand, ValueEnum};
use error::BenchError;
use std::io::Write;
use std::path::Path;
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
    Checkpoint(Box<checkpoint::CheckpointArgs>),
    Catch(Box<catch::CatchArgs>),
    Scale(Box<scale::ScaleArgs>),
    Migrate(Box<migrate::MigrateArgs>),
    Sweep(Box<sweep::SweepArgs>),
    Suspicion(Box<suspicion::SuspicionArgs>),
    Policy(Box<policies::PolicyArgs>),
    Replay(Box<replay::ReplayArgs>),
    Tracking(tracking::TrackingArgs),
    Staging(staging::StagingArgs),
    Wire(Box<wire::WireArgs>),
    Envelope(Box<envelope::Envelope>),
    Html(report::HtmlArgs),
    Results(report::ResultsArgs),
    Compare(report::CompareArgs),
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
    let command = Cli::parse().command;
    match leavings::go_with_this_process().and_then(|()| run(command)) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("belay-bench: {}", error.with_causes());
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<ExitCode, BenchError> {
    match command {
        Command::Fault(args) => fault::run(&args),
        Command::Pull(args) => pull::run(&args),
        Command::Checkpoint(args) => checkpoint::run(&args),
        Command::Catch(args) => catch::run(&args),
        Command::Scale(args) => scale::run(&args),
        Command::Migrate(args) => migrate::run(&args),
        Command::Sweep(args) => sweep::run(&args),
        Command::Suspicion(args) => suspicion::run(&args),
        Command::Policy(args) => policies::run(&args),
        Command::Replay(args) => replay::run(&args),
        Command::Tracking(args) => tracking::run(&args),
        Command::Staging(args) => staging::run(&args),
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
