//! Where a suite's report goes: the same options for every suite.

use super::compare::Comparison;
use super::{Report, hgrm, html, json, text};
use crate::error::BenchError;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// What to make of a report.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Report")]
pub struct Output {
    /// Fewer rounds and less memory: good for a look, not for a figure
    #[arg(long)]
    pub quick: bool,
    /// Also write the report as JSON; - is stdout
    #[arg(long, value_name = "FILE")]
    pub out_json: Option<PathBuf>,
    /// Also write every latency as HdrHistogram's percentile text, a .hgrm file each
    #[arg(long, value_name = "DIR")]
    pub hgrm: Option<PathBuf>,
    /// Also draw the report as a page that needs nothing else
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Say what got slower or faster since this report, which --out-json wrote; exit code 3 if something got slower
    #[arg(long, value_name = "OLD.json")]
    pub compare: Option<PathBuf>,
    #[command(flatten)]
    pub tolerance: Tolerance,
}

/// How much slower is too much.
#[derive(Debug, Clone, Copy, Args)]
pub struct Tolerance {
    /// With a comparison: how much slower, in percent, is not worth exit code 3
    #[arg(long, value_name = "PERCENT", default_value_t = 5, value_parser = clap::value_parser!(u16).range(0..=1000))]
    tolerance: u16,
}

impl Tolerance {
    /// Prints the comparison; its exit code.
    pub fn judge(self, old: &Report, new: &Report) -> ExitCode {
        let comparison = Comparison::of(old, new);
        comparison.print();
        let worse = comparison.worse(f64::from(self.tolerance) / 100.0).count();
        if worse == 0 {
            return ExitCode::SUCCESS;
        }
        eprintln!("belay-bench: {worse} measures got worse by more than {} %", self.tolerance);
        ExitCode::from(WORSE)
    }
}

/// Exit code of a comparison that found something slower.
const WORSE: u8 = 3;

impl Output {
    /// A bar of so many steps, on stderr if that is a terminal.
    pub fn progress(&self, steps: u64) -> ProgressBar {
        let bar = ProgressBar::new(steps);
        let style = ProgressStyle::with_template("[{elapsed}] {bar:30} {pos}/{len} {msg}").expect("a valid template");
        bar.set_style(style);
        bar
    }

    /// Says which goals are met, and writes what was asked for. The cases have been printed as they came.
    pub fn finish(&self, report: &Report) -> Result<ExitCode, BenchError> {
        text::print_goals(report);
        if let Some(path) = &self.out_json {
            let text = json::text(report).map_err(std::io::Error::from);
            text.and_then(|text| put(path, &text)).map_err(BenchError::io("write the JSON report"))?;
        }
        if let Some(folder) = &self.hgrm {
            hgrm::write(report, folder)?;
        }
        if let Some(path) = &self.html {
            write_page(path, std::slice::from_ref(report))?;
        }
        match &self.compare {
            Some(old) => Ok(self.tolerance.judge(&json::read(old)?, report)),
            None => Ok(ExitCode::SUCCESS),
        }
    }
}

/// Draws `reports` onto one page.
pub fn write_page(path: &Path, reports: &[Report]) -> Result<(), BenchError> {
    put(path, html::page(reports).as_bytes()).map_err(BenchError::io("write the page"))
}

/// Into `path`, or onto stdout for `-`.
pub fn put(path: &Path, text: &[u8]) -> std::io::Result<()> {
    match path.as_os_str() == "-" {
        true => std::io::stdout().write_all(text),
        false => std::fs::write(path, text),
    }
}
