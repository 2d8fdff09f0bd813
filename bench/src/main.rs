//! `belay-bench`: measures belay side by side with floors that use nothing of it, in the same run, interleaved.

mod checkpoint;
mod error;
mod fault;
mod floor;
mod pull;
mod rig;
mod table;
mod tethered;

use belay_transport::fabric::FabricKind;
use clap::{Args, Parser, Subcommand, ValueEnum};
use error::BenchError;
use std::error::Error;
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
}

#[derive(Args)]
struct Options {
    /// What carries the pages
    #[arg(long, value_enum, default_value = "local")]
    fabric: Fabric,
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
}

impl From<Fabric> for FabricKind {
    fn from(fabric: Fabric) -> Self {
        match fabric {
            Fabric::Local => Self::Local,
            Fabric::Tcp => Self::Tcp,
        }
    }
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Fault(options) => {
            fault::run(options.fabric.into(), options.quick).and_then(|report| save(&options, &report))
        }
        Command::Pull(options) => {
            pull::run(options.fabric.into(), options.quick).and_then(|report| save(&options, &report))
        }
        Command::Checkpoint(options) => {
            checkpoint::run(options.fabric.into(), options.quick).and_then(|report| save(&options, &report))
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprint!("belay-bench: {error}");
            let mut cause = error.source();
            while let Some(inner) = cause {
                eprint!(": {inner}");
                cause = inner.source();
            }
            eprintln!();
            ExitCode::FAILURE
        }
    }
}

fn save(options: &Options, report: &impl serde::Serialize) -> Result<(), BenchError> {
    let write = |path: &Path| std::fs::write(path, serde_json::to_vec_pretty(report)?);
    options.out_json.as_deref().map_or(Ok(()), write).map_err(BenchError::io("writing the JSON report"))
}
