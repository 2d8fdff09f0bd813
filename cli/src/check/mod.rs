//! `belay check`: what this host can do, and for each thing missing the command that mends it.
//!
//! Looking ([`facts`]) and judging ([`judge`]) are apart, so that a host that lacks everything can be judged on one that lacks nothing.

mod facts;
mod judge;
mod rdma;

pub use facts::Facts;
pub use judge::{Finding, Verdict, judge};

use crate::exit::Exit;
use clap::Args;
use std::io::{self, Write};

/// Looks at this host; changes nothing.
#[derive(Debug, Args)]
#[command(after_help = "\
Ends with 0 when a guest can be moved to and from this host, with 3 when something needed is missing.

Examples:
  belay check
  belay check --json | jq '.findings[] | select(.verdict != \"ok\") | .mend'")]
pub struct CheckArgs {
    /// One JSON object on stdout instead of the table
    #[arg(long)]
    pub json: bool,
}

/// Runs it on this host and prints what was found.
pub fn run(args: CheckArgs) -> Exit {
    let findings = judge(&Facts::of_this_host());
    let mut out = io::stdout().lock();
    let printed = if args.json { print_json(&mut out, &findings) } else { print_table(&mut out, &findings) };
    match printed {
        Ok(()) if missing(&findings) > 0 => Exit::Missing,
        Ok(()) => Exit::Done,
        Err(error) => {
            crate::complain(&error, "");
            Exit::Failed
        }
    }
}

fn missing(findings: &[Finding]) -> usize {
    findings.iter().filter(|finding| finding.verdict == Verdict::Missing).count()
}

fn print_json(out: &mut dyn Write, findings: &[Finding]) -> io::Result<()> {
    let report = serde_json::json!({ "missing": missing(findings), "findings": findings });
    writeln!(out, "{report:#}")
}

fn print_table(out: &mut dyn Write, findings: &[Finding]) -> io::Result<()> {
    let width = findings.iter().map(|finding| finding.name.len()).max().unwrap_or(0);
    for finding in findings {
        let verdict = match finding.verdict {
            Verdict::Ok => "ok",
            Verdict::Degraded => "degraded",
            Verdict::Missing => "MISSING",
        };
        writeln!(out, "{verdict:8}  {:width$}  {}", finding.name, finding.detail)?;
        for mend in &finding.mend {
            writeln!(out, "{:8}  {:width$}    mend: {mend}", "", "")?;
        }
    }
    let (missing, degraded) = (missing(findings), findings.iter().filter(|f| f.verdict == Verdict::Degraded).count());
    match (missing, degraded) {
        (0, 0) => writeln!(out, "\nEverything belay can use is here."),
        (0, _) => writeln!(out, "\nGuests can be moved to and from this host; {degraded} thing(s) could be better."),
        _ => writeln!(out, "\n{missing} thing(s) needed are missing: guests cannot be moved to or from this host."),
    }
}

#[cfg(test)]
mod tests;
