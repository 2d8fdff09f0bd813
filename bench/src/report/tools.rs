//! What is done with reports that were written earlier: `belay-bench html`, `results` and `compare`.

use super::json;
use super::markdown::{self, Reason};
use super::output::{Tolerance, put, write_page};
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

/// Write reports that --out-json wrote as a document with their goals first: bench/RESULTS.md
#[derive(Debug, Args)]
pub struct ResultsArgs {
    #[arg(value_name = "REPORT.json", required = true)]
    reports: Vec<PathBuf>,
    /// Why goals are missed: a JSON list of {"suite", "measure", "case", "why"}
    #[arg(long, value_name = "FILE")]
    reasons: Option<PathBuf>,
    /// The document; - is stdout
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

impl ResultsArgs {
    pub fn run(&self) -> Result<ExitCode, BenchError> {
        let reports = self.reports.iter().map(|path| json::read(path)).collect::<Result<Vec<_>, _>>()?;
        let reasons: Vec<Reason> = match &self.reasons {
            Some(path) => {
                let text = std::fs::read(path).map_err(BenchError::io("read the reasons"))?;
                serde_json::from_slice(&text).map_err(|error| BenchError::io("read the reasons")(error.into()))?
            }
            None => Vec::new(),
        };
        put(&self.out, markdown::document(&reports, &reasons).as_bytes())
            .map_err(BenchError::io("write the document"))?;
        Ok(ExitCode::SUCCESS)
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
