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
mod rig;
mod staging;
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
    /// Latency of a demand fault, unloaded and under background pull
    Fault(Options),
    /// Bandwidth of the background pull
    Pull(Options),
    /// The pause of a checkpoint at 1,000 scattered dirty pages, as the guest's own clock sees it
    Checkpoint(Options),
    Migrate(Box<migrate::MigrateArgs>),
    Sweep(Box<sweep::SweepArgs>),
    Suspicion(Box<suspicion::SuspicionArgs>),
    Policy(Box<policies::PolicyArgs>),
    Tracking(tracking::TrackingArgs),
    Staging(staging::StagingArgs),
    Wire(Box<wire::WireArgs>),
    Envelope(Box<envelope::Envelope>),
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

#[derive(Clone, Copy, ValueEnum)]
enum Fabric {
    Local,
    Tcp,
    Verbs,
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
    let outcome =
        match Cli::parse().command {
            Command::Fault(options) => match options.fabric.floor() {
                Some(wire) => fault::run(wire, options.quick).and_then(|report| options.save(&report)),
                None => options.through_device(wire::Test::Fault),
            },
            Command::Pull(options) => match options.fabric.floor() {
                Some(wire) => pull::run(wire, options.quick).and_then(|report| options.save(&report)),
                None => options.through_device(wire::Test::Pull),
            },
            Command::Checkpoint(options) => {
                let (fabric, device) = (options.fabric.into(), options.device.clone());
                checkpoint::run(fabric, device, options.quick).and_then(|report| options.save(&report))
            }
            Command::Migrate(args) => migrate::run(&args)
                .and_then(|report| args.out_json.as_deref().map_or(Ok(()), |path| save(path, &report))),
            Command::Sweep(args) => {
                sweep::run(&args).and_then(|report| args.out_json.as_deref().map_or(Ok(()), |path| save(path, &report)))
            }
            Command::Suspicion(args) => suspicion::run(&args)
                .and_then(|report| args.out_json.as_deref().map_or(Ok(()), |path| save(path, &report))),
            Command::Policy(args) => policies::run(&args)
                .and_then(|report| args.out_json.as_deref().map_or(Ok(()), |path| save(path, &report))),
            Command::Tracking(args) => tracking::run(&args)
                .and_then(|report| args.out_json.as_deref().map_or(Ok(()), |path| save(path, &report))),
            Command::Staging(args) => staging::run(&args)
                .and_then(|report| args.out_json.as_deref().map_or(Ok(()), |path| save(path, &report))),
            Command::Wire(args) => wire::run(&args).and_then(|report| match (report, &args.out_json) {
                (Some(report), Some(path)) => save(path, &report),
                _ => Ok(()),
            }),
            Command::Envelope(envelope) => {
                println!("{}", envelope.text());
                envelope.out_json.as_deref().map_or(Ok(()), |path| save(path, &envelope.report()))
            }
        };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("belay-bench: {}", error.with_causes());
            ExitCode::FAILURE
        }
    }
}

impl Options {
    fn through_device(&self, test: wire::Test) -> Result<(), BenchError> {
        let carrier = carrier::Carrier::within_this_host(FabricKind::Verbs, self.device.clone());
        wire::within_this_host(test, &carrier, self.quick).and_then(|report| self.save(&report))
    }

    fn save(&self, report: &impl serde::Serialize) -> Result<(), BenchError> {
        self.out_json.as_deref().map_or(Ok(()), |path| save(path, report))
    }
}

/// Into `path`, or onto stdout for `-`.
fn save(path: &Path, report: &impl serde::Serialize) -> Result<(), BenchError> {
    let write = || -> std::io::Result<()> {
        let mut json = serde_json::to_vec_pretty(report)?;
        json.push(b'\n');
        match path.as_os_str() == "-" {
            true => std::io::stdout().write_all(&json),
            false => std::fs::write(path, json),
        }
    };
    write().map_err(BenchError::io("writing the JSON report"))
}
