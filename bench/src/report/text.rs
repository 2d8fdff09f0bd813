//! A report on a terminal: perftest's columns, a unit in every heading.

use super::{Better, Case, Goal, Measure, Rate, Report};
use crate::table::{self, Row};

impl Case {
    /// Its title, then a table for each kind of thing that was measured.
    pub fn print(&self) {
        println!("\n {}", self.title());
        if !self.latencies.is_empty() {
            println!();
            table::print(&self.latencies.iter().map(|latency| latency.row.clone()).collect::<Vec<Row>>());
        }
        if !self.rates.is_empty() {
            print_rates(&self.rates);
        }
        if !self.measures.is_empty() {
            print_measures(&self.measures);
        }
    }
}

fn print_rates(rates: &[Rate]) {
    println!(
        "\n {:<34} {:>9} {:>11} {:>14} {:>16} {:>13} {:>12} {:>17}",
        "",
        "#bytes",
        "#iterations",
        "BW peak[MB/s]",
        "BW average[MB/s]",
        "page[ns/4KiB]",
        "source[CPUs]",
        "destination[CPUs]"
    );
    let processors = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.2}"));
    for rate in rates {
        println!(
            " {:<34} {:>9} {:>11} {:>14.0} {:>16.0} {:>13.0} {:>12} {:>17}",
            rate.name,
            rate.bytes,
            rate.iterations,
            rate.rounds.iter().copied().fold(0.0, f64::max) / 1e6,
            rate.bytes_per_s() / 1e6,
            4096.0 * 1e9 / rate.bytes_per_s(),
            processors(rate.source_processors),
            processors(rate.destination_processors)
        );
    }
}

fn print_measures(measures: &[Measure]) {
    println!("\n {:<48} {:>12} {:<6} {:>12}  {:<34}", "", "median", "unit", "ratio", "over, in the same round");
    for measure in measures {
        let (ratio, beside) = match (measure.ratio(), &measure.beside) {
            (Some(ratio), Some(beside)) => (format!("{ratio:.3}"), &*beside.name),
            _ => ("-".to_owned(), ""),
        };
        let (value, unit) = (figure(measure.value()), if measure.unit.is_empty() { "-" } else { &measure.unit });
        println!(" {:<48} {value:>12} {unit:<6} {ratio:>12}  {beside}", measure.name);
    }
}

/// Of all cases, once they have all been printed.
pub fn print_goals(report: &Report) {
    if report.goals.is_empty() {
        return;
    }
    println!();
    report.goals.iter().for_each(|goal| println!(" {}", line(goal)));
}

/// `met     engine time over the floor's 1.21, at most 1.30 (unloaded, fabric tcp)`.
pub fn line(goal: &Goal) -> String {
    let Goal { case, measure, unit, value, bound, better, met } = goal;
    let (verdict, side) =
        (if *met { "met   " } else { "missed" }, if *better == Better::Lower { "at most" } else { "at least" });
    let unit = if unit.is_empty() { String::new() } else { format!(" {unit}") };
    format!("{verdict}  {measure}: {}{unit}, {side} {}{unit}  ({case})", figure(*value), figure(*bound))
}

/// Three significant digits of what is small, no fraction of what is large.
pub fn figure(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 0.1 || size == 0.0 => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    }
}
