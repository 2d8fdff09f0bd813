//! Where a suite's report goes: the same options for every suite.

use super::{Report, hgrm, json, text};
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
}

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
        Ok(ExitCode::SUCCESS)
    }
}

/// Into `path`, or onto stdout for `-`.
fn put(path: &Path, text: &[u8]) -> std::io::Result<()> {
    match path.as_os_str() == "-" {
        true => std::io::stdout().write_all(text),
        false => std::fs::write(path, text),
    }
}
