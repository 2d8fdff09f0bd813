//! `belay observe`: stands outside, takes a guest's output from whoever holds the guest, and judges it.

use crate::exit::Exit;
use crate::{report, signals};
use belay_vmm_glue::migrate::observation::Kind;
use belay_vmm_glue::witness::observer::{ObserverAddress, ObserverServer, Seen};
use clap::Args;
use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

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

/// One packet a line: microseconds, sender, sequence number, bytes in hexadecimal.
fn write_log(path: &Path, seen: &[Seen]) -> io::Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    for packet in seen {
        write!(file, "{} {} {} ", packet.at_us, packet.sender, packet.sequence)?;
        for byte in &packet.bytes {
            write!(file, "{byte:02x}")?;
        }
        writeln!(file)?;
    }
    file.flush()
}

/// Reads such a log back.
pub fn read_log(path: &Path) -> io::Result<Vec<Seen>> {
    let line = |line: io::Result<String>| {
        let line = line?;
        let bad = || io::Error::new(io::ErrorKind::InvalidData, format!("not a packet: {line:?}"));
        let mut fields = line.split(' ');
        let mut number = || fields.next().and_then(|field| field.parse().ok());
        let at_us = number().ok_or_else(bad)?;
        let sender: Arc<str> = fields.next().ok_or_else(bad)?.into();
        let sequence = fields.next().and_then(|field| field.parse().ok()).ok_or_else(bad)?;
        let hex = fields.next().unwrap_or_default();
        let byte = |at| u8::from_str_radix(hex.get(at..at + 2)?, 16).ok();
        let bytes = (0..hex.len()).step_by(2).map(|at| byte(at).ok_or_else(bad)).collect::<io::Result<_>>()?;
        Ok(Seen { at_us, sender, sequence, bytes })
    };
    BufReader::new(File::open(path)?).lines().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_reads_back_as_it_was_written() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("packets");
        let packet =
            |sequence, bytes: &[u8]| Seen { at_us: 7, sender: "source".into(), sequence, bytes: bytes.to_vec() };
        let seen = [packet(0, &[]), packet(1, &[0, 255, 16])];
        write_log(&path, &seen).unwrap();
        let read = read_log(&path).unwrap();
        assert_eq!(read.len(), 2);
        assert!(
            read.iter().zip(&seen).all(|(a, b)| (a.sequence, &a.bytes, &a.sender) == (b.sequence, &b.bytes, &b.sender))
        );
        std::fs::write(&path, "7 source 1 0g\n").unwrap();
        assert!(read_log(&path).is_err());
    }
}
