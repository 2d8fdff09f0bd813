//! Tables in perftest's columns, and the same as JSON.

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// One row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    pub name: String,
    pub bytes: usize,
    pub iterations: u64,
    pub t_min_us: f64,
    pub t_max_us: f64,
    pub t_typical_us: f64,
    pub t_avg_us: f64,
    pub t_stdev_us: f64,
    pub p99_us: f64,
    pub p999_us: f64,
}

impl Row {
    pub fn of_histogram(name: &str, bytes: usize, ns: &Histogram<u64>) -> Self {
        let us = |ns: u64| ns as f64 / 1e3;
        Self {
            name: name.into(),
            bytes,
            iterations: ns.len(),
            t_min_us: us(ns.min()),
            t_max_us: us(ns.max()),
            t_typical_us: us(ns.value_at_quantile(0.5)),
            t_avg_us: ns.mean() / 1e3,
            t_stdev_us: ns.stdev() / 1e3,
            p99_us: us(ns.value_at_quantile(0.99)),
            p999_us: us(ns.value_at_quantile(0.999)),
        }
    }

    pub fn of_samples(name: &str, bytes: usize, ns: &[u64]) -> Self {
        let mut histogram = Histogram::<u64>::new_with_bounds(1, 1 << 40, 3).expect("valid bounds");
        ns.iter().for_each(|ns| histogram.saturating_record(*ns));
        Self::of_histogram(name, bytes, &histogram)
    }
}

/// One row of a bandwidth table.
#[derive(Debug, Serialize)]
pub struct Bandwidth {
    pub name: String,
    /// Of one operation.
    pub bytes: usize,
    pub iterations: u64,
    pub peak_bytes_per_s: f64,
    pub average_bytes_per_s: f64,
    pub messages_per_s: f64,
}

/// In perftest's columns and its units: MiB/s, or Gb/s (10^9) where `gbits`; millions of messages a second. Names come last,
/// so that what reads perftest's lines reads these.
pub fn print_bandwidth(rows: &[Bandwidth], gbits: bool) {
    let (unit, scale) = if gbits { ("Gb/sec", 8e-9) } else { ("MiB/sec", 1.0 / f64::from(1 << 20)) };
    let (peak, average) = (format!("BW peak[{unit}]"), format!("BW average[{unit}]"));
    println!(" {:<10} {:<13} {peak:<18} {average:<20} {:<15}", "#bytes", "#iterations", "MsgRate[Mpps]");
    for row in rows {
        println!(
            " {:<10} {:<13} {:<18.2} {:<20.2} {:<15.6} {}",
            row.bytes,
            row.iterations,
            row.peak_bytes_per_s * scale,
            row.average_bytes_per_s * scale,
            row.messages_per_s / 1e6,
            row.name
        );
    }
}

/// The middle value; 0 of nothing.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(0.0)
}

/// In perftest's columns, behind the rows' names.
pub fn print(rows: &[Row]) {
    println!(
        " {:<34} {:>7} {:>11} {:>11} {:>11} {:>15} {:>11} {:>13} {:>9} {:>9}",
        "",
        "#bytes",
        "#iterations",
        "t_min[us]",
        "t_max[us]",
        "t_typical[us]",
        "t_avg[us]",
        "t_stdev[us]",
        "99%[us]",
        "99.9%[us]"
    );
    for row in rows {
        println!(
            " {:<34} {:>7} {:>11} {:>11.2} {:>11.2} {:>15.2} {:>11.2} {:>13.2} {:>9.2} {:>9.2}",
            row.name,
            row.bytes,
            row.iterations,
            row.t_min_us,
            row.t_max_us,
            row.t_typical_us,
            row.t_avg_us,
            row.t_stdev_us,
            row.p99_us,
            row.p999_us
        );
    }
}

/// As perftest prints them, a line a size, nothing before and nothing behind.
pub fn print_latency(rows: &[Row]) {
    println!(
        " {:<8} {:<12} {:<13} {:<13} {:<15} {:<11} {:<14} {:<20} {:<20}",
        "#bytes",
        "#iterations",
        "t_min[usec]",
        "t_max[usec]",
        "t_typical[usec]",
        "t_avg[usec]",
        "t_stdev[usec]",
        "99% percentile[usec]",
        "99.9% percentile[usec]"
    );
    for row in rows {
        println!(
            " {:<8} {:<12} {:<13.2} {:<13.2} {:<15.2} {:<11.2} {:<14.2} {:<20.2} {:<20.2}",
            row.bytes,
            row.iterations,
            row.t_min_us,
            row.t_max_us,
            row.t_typical_us,
            row.t_avg_us,
            row.t_stdev_us,
            row.p99_us,
            row.p999_us
        );
    }
}
