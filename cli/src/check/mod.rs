//! `belay check`: what this host can do, and for each thing missing the command that mends it.
//!
//! Looking ([`facts`]) and judging ([`judge`]) are apart, so that a host that lacks everything can be judged on one that lacks nothing.

mod facts;
mod guest;
mod judge;
mod rdma;

pub use facts::Facts;
pub use judge::{Finding, Verdict, judge};

use crate::exit::Exit;
use crate::report::{counted, printable};
use belay_transport::harmless;
use clap::Args;
use std::io::{self, Write};
use std::path::PathBuf;

/// Looks at this host, or at a guest; changes nothing.
#[derive(Debug, Args)]
#[command(after_help = "\
Ends with 0 when a guest can be moved to and from this host, with 3 when something needed is missing. With --qmp: 0 when that guest
is prepared for being moved; its QEMU serves one client at a time, so not while another holds the socket. `belay send … qemu` moves it.

Examples:
  belay check
  belay check --qmp /run/vm1.qmp
  belay check --json | jq '.findings[] | select(.verdict != \"ok\") | .mend'")]
pub struct CheckArgs {
    /// Look at the QEMU guest behind this QMP socket: what stands against moving it, what against tethering it, what to change
    #[arg(long, value_name = "SOCKET")]
    pub qmp: Option<PathBuf>,
    /// With --qmp: the process, if its socket was handed down by another (libvirt)
    #[arg(long, value_name = "PID", requires = "qmp")]
    pub pid: Option<u32>,
    /// One JSON object on stdout instead of the table
    #[arg(long)]
    pub json: bool,
}

/// Runs it on this host and prints what was found.
pub fn run(args: CheckArgs) -> Exit {
    let facts = Facts::of_this_host();
    let (findings, words) = match &args.qmp {
        None => (judge(&facts), &OF_A_HOST),
        Some(socket) => {
            let tracker = facts.uffd_wp_tracker.as_ref().copied().map_err(String::as_str);
            match guest::look(socket, args.pid, tracker) {
                Ok(findings) => (findings, &OF_A_GUEST),
                Err(error) => {
                    crate::complain(
                        &error,
                        "Nothing was changed. `-qmp unix:PATH,server=on,wait=off` gives QEMU such a socket.",
                    );
                    return Exit::Failed;
                }
            }
        }
    };
    let mut out = io::stdout().lock();
    let printed = if args.json { print_json(&mut out, &findings) } else { print_table(&mut out, &findings, words) };
    match printed {
        Ok(()) if missing(&findings) > 0 => Exit::Missing,
        Ok(()) => Exit::Done,
        Err(error) => {
            crate::complain(&error, "");
            Exit::Failed
        }
    }
}

/// What a table ends with: nothing to mend, something that could be better, something that must be mended.
struct Words(&'static str, fn(usize) -> String, fn(usize) -> String);

const OF_A_HOST: Words = Words(
    "Everything belay can use is here.",
    |degraded| format!("Guests can be moved to and from this host; {} could be better.", things(degraded)),
    |missing| {
        let are = if missing == 1 { "is" } else { "are" };
        format!("{} needed {are} missing: guests cannot be moved to or from this host.", things(missing))
    },
);
const OF_A_GUEST: Words = Words(
    "Nothing stands against moving and tethering this guest.",
    |degraded| {
        format!(
            "Nothing stands against moving this guest; {} {} against tethering it.",
            things(degraded),
            stand(degraded)
        )
    },
    |missing| format!("{} {} against moving this guest.", things(missing), stand(missing)),
);

fn things(count: usize) -> String {
    counted(count as u64, "thing", "things")
}

fn stand(count: usize) -> &'static str {
    if count == 1 { "stands" } else { "stand" }
}

fn missing(findings: &[Finding]) -> usize {
    findings.iter().filter(|finding| finding.verdict == Verdict::Missing).count()
}

fn print_json(out: &mut dyn Write, findings: &[Finding]) -> io::Result<()> {
    let report = serde_json::json!({ "missing": missing(findings), "findings": findings });
    writeln!(out, "{report:#}")
}

fn print_table(out: &mut dyn Write, findings: &[Finding], words: &Words) -> io::Result<()> {
    // Names of a guest's parts are a QEMU's words, and a QEMU may be its guest's by now.
    let names: Vec<String> = findings.iter().map(|finding| harmless(&finding.name)).collect();
    let line = |text: &str| printable(&text.replace('\n', " "));
    let width = names.iter().map(String::len).max().unwrap_or(0);
    for (finding, name) in findings.iter().zip(&names) {
        let verdict = match finding.verdict {
            Verdict::Ok => "ok",
            Verdict::Degraded => "degraded",
            Verdict::Missing => "MISSING",
        };
        writeln!(out, "{verdict:8}  {name:width$}  {}", line(&finding.detail))?;
        for mend in &finding.mend {
            writeln!(out, "{:8}  {:width$}    mend: {}", "", "", line(mend))?;
        }
    }
    let (missing, degraded) = (missing(findings), findings.iter().filter(|f| f.verdict == Verdict::Degraded).count());
    let Words(good, better, bad) = words;
    match (missing, degraded) {
        (0, 0) => writeln!(out, "\n{good}"),
        (0, _) => writeln!(out, "\n{}", better(degraded)),
        _ => writeln!(out, "\n{}", bad(missing)),
    }
}

#[cfg(test)]
mod tests;
