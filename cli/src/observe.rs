//! `belay observe`: stands outside, takes a guest's output from whoever holds the guest, and judges it.

use crate::exit::Exit;
use crate::{report, signals};
use belay_vmm_glue::migrate::observation::Kind;
use belay_vmm_glue::witness::observer::{ObserverAddress, ObserverServer, Seen, log};
use clap::Args;
use std::fs::File;
use std::io::{self, BufReader, BufWriter};
use std::path::{Path, PathBuf};

/// Watch a guest's output from outside and judge it
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Example:
  belay observe --listen unix:/tmp/observer.sock       then `belay send … --output-to unix:/tmp/observer.sock`

Ends at SIGINT or SIGTERM with its verdict: no gap, no contradiction, repeats only byte for byte the same.")]
pub struct ObserveArgs {
    /// Where to listen: HOST:PORT, or unix:/path
    #[arg(long, value_name = "ADDR")]
    listen: ObserverAddress,
    /// At the end write every packet seen to this file
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// Events as JSON lines on stdout
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: ObserveArgs) -> Exit {
    let observer = report::reporter("observer", args.json);
    let server = match signals::termination().and_then(|words| Ok((words, ObserverServer::bind(&args.listen)?))) {
        Ok(server) => server,
        Err(error) => {
            let what = format!("cannot listen on {}: {error}", args.listen);
            report::failed_text(&observer, &what, "Choose another --listen address.");
            return report::ended(&observer, Exit::NoSession);
        }
    };
    let (words, server) = server;
    observer.note(None, Kind::Listening { address: server.address().to_string() });
    // Ends with the first signal, or with the thread that hears them.
    let _ = words.recv();
    let verdict = server.verdict();
    if let Some(path) = &args.log
        && let Err(error) = write_log(path, &server.seen())
    {
        report::failed(&observer, &error, "The verdict stands; the packets were not written.");
        return report::ended(&observer, Exit::Failed);
    }
    let exit = if verdict.is_good() { Exit::Done } else { Exit::CheckFailed };
    observer.note(observer.latest().as_ref(), Kind::Ended { outcome: verdict.to_string(), exit_code: exit.code() });
    exit
}

fn write_log(path: &Path, seen: &[Seen]) -> io::Result<()> {
    log::write(&mut BufWriter::new(File::create(path)?), seen)
}

/// What an observer wrote down.
pub fn read_log(path: &Path) -> io::Result<Vec<Seen>> {
    log::read(BufReader::new(File::open(path)?)).map_err(io::Error::other)
}
