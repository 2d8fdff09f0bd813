//! A latency as HdrHistogram's tools print and plot it: `.hgrm`, values in microseconds.

use super::{Case, Report};
use crate::error::BenchError;
use hdrhistogram::Histogram;
use std::fmt::Write;
use std::path::Path;

/// Lines until half of what is left is gone: as HdrHistogram's own printer has it.
const TICKS: u32 = 5;

/// HdrHistogram's percentile distribution: its columns, and its footers.
pub fn text(ns: &Histogram<u64>) -> String {
    let us = |ns: u64| ns as f64 / 1e3;
    let mut text = format!("{:>12} {:>14} {:>10} {:>14}\n\n", "Value", "Percentile", "TotalCount", "1/(1-Percentile)");
    let mut total = 0;
    for value in ns.iter_quantiles(TICKS) {
        total += value.count_since_last_iteration();
        // The share up to and with this value: the last line says 1 and has no fourth column.
        let (at, share) = (us(value.value_iterated_to()), value.quantile_iterated_to());
        let _ = write!(text, "{at:12.3} {share:2.12} {total:10}");
        let _ = match share < 1.0 {
            true => writeln!(text, " {:14.2}", 1.0 / (1.0 - share)),
            false => writeln!(text),
        };
    }
    let (mean, deviation, max) = (ns.mean() / 1e3, ns.stdev() / 1e3, us(ns.max()));
    let _ = writeln!(text, "#[Mean    = {mean:12.3}, StdDeviation   = {deviation:12.3}]");
    let _ = writeln!(text, "#[Max     = {max:12.3}, Total count    = {:12}]", ns.len());
    let _ = writeln!(text, "#[Buckets = {:12}, SubBuckets     = {:12}]", ns.buckets(), 2048);
    text
}

/// A file of `folder` for each latency of the report; made, if it is not there.
pub fn write(report: &Report, folder: &Path) -> Result<(), BenchError> {
    std::fs::create_dir_all(folder).map_err(BenchError::io("make the folder for the .hgrm files"))?;
    for case in &report.cases {
        for latency in case.latencies.iter().filter(|latency| !latency.distribution.0.is_empty()) {
            let name = file_name(&report.suite, case, &latency.row.name);
            std::fs::write(folder.join(name), text(&latency.distribution.histogram()))
                .map_err(BenchError::io("write a .hgrm file"))?;
        }
    }
    Ok(())
}

/// Suite, case with its parameters' values, latency: no letter that a shell would trip over.
fn file_name(suite: &str, case: &Case, latency: &str) -> String {
    let values = case.parameters.iter().map(|(name, value)| format!("{name}-{value}"));
    let words: Vec<String> =
        [suite.to_owned(), case.name.clone()].into_iter().chain(values).chain([latency.trim().to_owned()]).collect();
    let plain = |c: char| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' };
    let parts: Vec<String> = words
        .iter()
        .map(|word| {
            word.chars()
                .map(plain)
                .collect::<String>()
                .split('-')
                .filter(|part| !part.is_empty())
                .collect::<Vec<_>>()
                .join("-")
        })
        .collect();
    format!("{}.hgrm", parts.join("_"))
}

#[cfg(test)]
mod tests {
    use super::super::distribution::empty;
    use super::*;

    #[test]
    fn a_histogram_is_printed_as_hdrhistograms_own_printer_does() {
        let mut histogram = empty();
        (1..=1000).for_each(|us| histogram.record(us * 1000).unwrap());
        let text = text(&histogram);
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[0], ["Value", "Percentile", "TotalCount", "1/(1-Percentile)"]);
        let middle = lines.iter().find(|line| line.get(1) == Some(&"0.500000000000")).expect("the median has a line");
        assert_eq!((middle[2], middle[3]), ("500", "2.00"));
        assert!((middle[0].parse::<f64>().unwrap() - 500.0).abs() < 0.5, "{middle:?}");
        let last = lines.iter().rev().find(|line| line.len() == 3).expect("the last line has no fourth column");
        assert_eq!((last[1], last[2]), ("1.000000000000", "1000"));
        assert!(text.contains("Total count    =         1000]"), "{text}");
    }

    #[test]
    fn every_latency_of_a_report_has_a_file_of_its_own_with_a_plain_name() {
        let folder = tempfile::tempdir().unwrap();
        let mut report = super::super::tests::report("fault", &[1.0]);
        let latency = |name: &str| super::super::Latency::of_samples(name, super::super::Role::Ours, 4096, &[7_000]);
        report.cases[0].latencies = vec![latency("engine, serving thread"), latency("  wire (posted to completed)")];
        write(&report, &folder.path().join("deep")).unwrap();
        let mut names: Vec<String> = std::fs::read_dir(folder.path().join("deep"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(
            names,
            [
                "fault_unloaded_fabric-tcp_engine-serving-thread.hgrm",
                "fault_unloaded_fabric-tcp_wire-posted-to-completed.hgrm"
            ]
        );
    }
}
