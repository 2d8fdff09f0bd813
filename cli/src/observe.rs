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
    // Opened now, so that what is seen in hours is not lost to a path that never could be written.
    let log = match args.log.as_deref().map(LogFile::create).transpose() {
        Ok(log) => log,
        Err(what) => {
            report::failed_text(&observer, &what, "Nothing was listened for; choose another --log.");
            return report::ended(&observer, Exit::Usage);
        }
    };
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
    let written = log.map_or(Ok(()), |log| log.write(&server.seen()));
    if let Err(what) = &written {
        report::failed_text(&observer, what, "The verdict stands; the packets were not written.");
    }
    let exit = match (verdict.is_good(), written) {
        (false, _) => Exit::CheckFailed,
        (true, Err(_)) => Exit::Failed,
        (true, Ok(())) => Exit::Done,
    };
    observer.note(observer.latest().as_ref(), Kind::Ended { outcome: verdict.to_string(), exit_code: exit.code() });
    exit
}

/// Where the packets are written down at the end. Its errors name the file.
struct LogFile {
    path: PathBuf,
    file: File,
}

impl LogFile {
    fn create(path: &Path) -> Result<Self, String> {
        let file = File::create(path).map_err(|error| format!("cannot make {}: {error}", path.display()))?;
        Ok(Self { path: path.to_owned(), file })
    }

    fn write(self, seen: &[Seen]) -> Result<(), String> {
        let written = log::write(&mut BufWriter::new(self.file), seen);
        written.map_err(|error| format!("cannot write {} packets to {}: {error}", seen.len(), self.path.display()))
    }
}

/// What an observer wrote down.
pub fn read_log(path: &Path) -> io::Result<Vec<Seen>> {
    log::read(BufReader::new(File::open(path)?)).map_err(io::Error::other)
}
