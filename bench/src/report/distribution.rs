//! A latency: perftest's columns, and all that was recorded.

use super::Role;
use crate::table::Row;
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// Longest that is told apart, in nanoseconds: 18 minutes.
const LONGEST_NS: u64 = 1 << 40;

/// One latency of a case.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    #[serde(flatten)]
    pub row: Row,
    pub role: Role,
    pub distribution: Distribution,
}

impl Latency {
    /// `bytes` of one operation, and nanoseconds.
    pub fn of_samples(name: &str, role: Role, bytes: usize, ns: &[u64]) -> Self {
        let mut histogram = empty();
        ns.iter().for_each(|ns| histogram.saturating_record(*ns));
        Self::of_histogram(name, role, bytes, &histogram)
    }

    /// Of which only the columns are known.
    pub fn of_row(row: Row, role: Role) -> Self {
        Self { row, role, distribution: Distribution::default() }
    }

    /// As [`Self::of_samples`].
    pub fn of_histogram(name: &str, role: Role, bytes: usize, ns: &Histogram<u64>) -> Self {
        Self { row: Row::of_histogram(name, bytes, ns), role, distribution: Distribution::of(ns) }
    }
}

/// How often what was recorded: nanoseconds (the middle of a bucket of three digits, or of fewer where the recorder had fewer) and a count,
/// ascending.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Distribution(pub Vec<(u64, u64)>);

impl Distribution {
    pub fn of(ns: &Histogram<u64>) -> Self {
        let recorded = ns.iter_recorded();
        Self(recorded.map(|value| (ns.median_equivalent(value.value_iterated_to()), value.count_at_value())).collect())
    }

    /// As it was.
    pub fn histogram(&self) -> Histogram<u64> {
        let mut histogram = empty();
        for (ns, count) in &self.0 {
            // Within the bounds, because it came out of such a histogram; from a file it may not have.
            histogram.saturating_record_n(*ns, *count);
        }
        histogram
    }
}

/// Up to [`LONGEST_NS`], three digits.
pub fn empty() -> Histogram<u64> {
    Histogram::new_with_bounds(1, LONGEST_NS, 3).expect("valid bounds")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_distribution_comes_out_of_a_report_as_it_went_in() {
        let samples: Vec<u64> = (0..50_000).map(|at| 900 + at * at % 777_777).collect();
        let latency = Latency::of_samples("fault", Role::Ours, 4096, &samples);
        let text = serde_json::to_string(&latency).unwrap();
        let read: Latency = serde_json::from_str(&text).unwrap();
        assert_eq!((&read.distribution, read.row.iterations), (&latency.distribution, 50_000));
        let (before, after) = (
            Row::of_samples("fault", 4096, &samples),
            Row::of_histogram("fault", 4096, &read.distribution.histogram()),
        );
        for (before, after) in
            [(before.t_typical_us, after.t_typical_us), (before.p99_us, after.p99_us), (before.p999_us, after.p999_us)]
        {
            assert!((before - after).abs() <= before * 0.001, "{before} {after}");
        }
        assert_eq!(before.iterations, after.iterations);
    }
}
