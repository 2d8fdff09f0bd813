//! What is done with reports that were written earlier: `belay-bench html` and `belay-bench compare`.

use super::json;
use super::output::{Tolerance, write_page};
use crate::error::BenchError;
use clap::Args;
use std::path::PathBuf;
use std::process::ExitCode;

/// Draw reports that --out-json wrote onto one page
#[derive(Debug, Args)]
pub struct HtmlArgs {
    #[arg(value_name = "REPORT.json", required = true)]
    reports: Vec<PathBuf>,
    /// The page; - is stdout
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

impl HtmlArgs {
    pub fn run(&self) -> Result<ExitCode, BenchError> {
        let reports = self.reports.iter().map(|path| json::read(path)).collect::<Result<Vec<_>, _>>()?;
        write_page(&self.out, &reports).map(|()| ExitCode::SUCCESS)
    }
}

/// Say what got slower or faster between two reports of a suite; exit code 3 if something got slower
#[derive(Debug, Args)]
pub struct CompareArgs {
    #[arg(value_name = "OLD.json")]
    old: PathBuf,
    #[arg(value_name = "NEW.json")]
    new: PathBuf,
    #[command(flatten)]
    tolerance: Tolerance,
}

impl CompareArgs {
    pub fn run(&self) -> Result<ExitCode, BenchError> {
        Ok(self.tolerance.judge(&json::read(&self.old)?, &json::read(&self.new)?))
    }
}
