//! Latency histograms that the fault path can record into: no lock, no allocation, read while they grow.
//!
//! One writer (the shard's thread), any reader. Buckets are HDR's: 128 linear ones a power of two, so that a value is kept to
//! within 0.8 %. A reader makes an [`Histogram`] of them, which merges and prints like any other.

use hdrhistogram::Histogram;
use std::sync::atomic::{AtomicU64, Ordering};

/// log2 of the linear buckets in a power of two.
const LINEAR: u32 = 7;
/// Values from 2^40 ns (18 minutes) on are kept as that.
const MAX_NS: u64 = 1 << 40;
const BUCKETS: usize = ((40 - LINEAR + 2) << LINEAR) as usize;

/// One stage's latencies in nanoseconds.
#[derive(Debug)]
pub(super) struct AtomicHistogram {
    buckets: Box<[AtomicU64]>,
}

impl AtomicHistogram {
    pub(super) fn new() -> Self {
        Self { buckets: (0..BUCKETS).map(|_| AtomicU64::new(0)).collect() }
    }

    /// Counts one value. Only the shard's own thread calls it.
    #[inline]
    pub(super) fn record(&self, nanoseconds: u64) {
        let bucket = &self.buckets[index(nanoseconds.min(MAX_NS))];
        // A single writer: no read-modify-write is needed for nothing to get lost.
        bucket.store(bucket.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    /// Adds what has been counted so far to `into`.
    pub(super) fn add_to(&self, into: &mut Histogram<u64>) {
        for (index, bucket) in self.buckets.iter().enumerate() {
            let count = bucket.load(Ordering::Relaxed);
            if count > 0 {
                into.saturating_record_n(value(index), count);
            }
        }
    }
}

/// The bucket of a value: exact below 2^(LINEAR + 1), then 2^LINEAR buckets a power of two.
#[inline]
fn index(value: u64) -> usize {
    let power = 63 - (value | 1).leading_zeros();
    let shift = power.saturating_sub(LINEAR);
    ((u64::from(shift) << LINEAR) + (value >> shift)) as usize
}

/// The lowest value of a bucket.
fn value(index: usize) -> u64 {
    let (shift, low) = ((index >> LINEAR) as u64, (index & ((1 << LINEAR) - 1)) as u64);
    if shift < 2 { index as u64 } else { (low + (1 << LINEAR)) << (shift - 1) }
}

/// The four stages of one shard.
#[derive(Debug)]
pub(super) struct Stages {
    pub queue: AtomicHistogram,
    pub wire: AtomicHistogram,
    pub install: AtomicHistogram,
    pub total: AtomicHistogram,
}

impl Stages {
    pub(super) fn new() -> Self {
        let [queue, wire, install, total] = std::array::from_fn(|_| AtomicHistogram::new());
        Self { queue, wire, install, total }
    }
}

/// Demand-fault latencies in nanoseconds, merged over all shards.
#[derive(Debug, Clone)]
pub struct Latencies {
    /// Event read from the userfaultfd → READ posted.
    pub queue: Histogram<u64>,
    /// READ posted → completion seen.
    pub wire: Histogram<u64>,
    /// Completion seen → page shown and its readers woken.
    pub install: Histogram<u64>,
    /// Event read → page shown.
    pub total: Histogram<u64>,
}

impl Latencies {
    pub(super) fn merged<'a>(shards: impl Iterator<Item = &'a Stages>) -> Self {
        let empty =
            || Histogram::new_with_bounds(1, MAX_NS, 3).expect("1 to 2^40 ns with three digits are valid bounds");
        let mut all = Self { queue: empty(), wire: empty(), install: empty(), total: empty() };
        for stages in shards {
            stages.queue.add_to(&mut all.queue);
            stages.wire.add_to(&mut all.wire);
            stages.install.add_to(&mut all.install);
            stages.total.add_to(&mut all.total);
        }
        all
    }

    /// The whole of each fault alone, for whoever asks often.
    pub(super) fn total_of<'a>(shards: impl Iterator<Item = &'a Stages>) -> Histogram<u64> {
        let mut total =
            Histogram::new_with_bounds(1, MAX_NS, 2).expect("1 to 2^40 ns with two digits are valid bounds");
        shards.for_each(|stages| stages.total.add_to(&mut total));
        total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_is_kept_to_within_a_percent() {
        for exponent in 0..=40_u32 {
            for value_ns in [1_u64 << exponent, (1 << exponent) + (1 << exponent) / 3, (2 << exponent) - 1] {
                let value_ns = value_ns.min(MAX_NS);
                let low = value(index(value_ns));
                assert!(low <= value_ns && value_ns - low <= value_ns / 100, "{value_ns} is kept as {low}");
            }
        }
        assert!((1..BUCKETS).all(|i| value(i) > value(i - 1) && index(value(i)) == i));
    }

    #[test]
    fn what_is_recorded_is_what_is_read() {
        let histogram = AtomicHistogram::new();
        (1..=1000).for_each(|value| histogram.record(value * 1000));
        let mut merged = Histogram::new_with_bounds(1, MAX_NS, 3).unwrap();
        histogram.add_to(&mut merged);
        assert_eq!(merged.len(), 1000);
        let median = merged.value_at_quantile(0.5) as f64;
        assert!((median - 500_000.0).abs() < 10_000.0, "{median}");
    }
}
