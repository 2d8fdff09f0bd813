//! The two loops everything on the wire is measured with: one operation at a time, and a full window.
//!
//! perftest's loops, over a lane instead of a queue pair. An operation costs here, beside what it measures: one or two readings
//! of the clock (25 ns each through the vDSO), a store of 8 bytes, and a batch's share of one post and one poll.

use crate::error::BenchError;
use crate::rig::{BOUND, soon};
use belay_transport::fabric::{FabricError, Lane, Write};
use std::time::{Duration, Instant};

/// Operations before the clock counts.
const WARM_UP: u64 = 16;
/// Operations whose times are kept, at most; a run by time ends with them.
const MOST: u64 = 4 << 20;
/// Polls that find nothing, between two looks at whether all of it hangs.
const PATIENCE: u32 = 1 << 14;
/// Completions taken by one poll, and operations posted by one post.
pub const BATCH: usize = 64;
/// Of a run, the part whose best stretch is called the peak.
const PEAK_PART: usize = 8;

/// How long to measure.
#[derive(Debug, Clone, Copy)]
pub enum Amount {
    Iterations(u64),
    Time(Duration),
}

impl Amount {
    fn most(self) -> u64 {
        match self {
            Self::Iterations(iterations) => iterations.min(MOST),
            Self::Time(_) => MOST,
        }
    }

    fn over(self, since: Instant) -> bool {
        match self {
            Self::Iterations(_) => false,
            Self::Time(time) => since.elapsed() >= time,
        }
    }
}

/// How to wait for a completion: perftest polls unless it was told `-e`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waiting {
    Polling,
    Events,
}

/// Posts operations `first..first + count` of a run.
pub type Post<'a> = dyn FnMut(&mut dyn Lane, u64, u64) -> Result<(), FabricError> + 'a;

/// Takes completions once there are any.
fn completed(lane: &mut dyn Lane, waiting: Waiting, done: &mut [u64]) -> Result<usize, BenchError> {
    let (mut empty, mut since) = (0_u32, None);
    loop {
        let got = lane.poll(done)?;
        if got > 0 {
            return Ok(got);
        }
        if waiting == Waiting::Events {
            lane.wait(soon())?;
            continue;
        }
        std::hint::spin_loop();
        empty += 1;
        if empty.is_multiple_of(PATIENCE) && since.get_or_insert_with(Instant::now).elapsed() > BOUND {
            return Err(BenchError::Stuck(BOUND));
        }
    }
}

/// One operation at a time: nanoseconds from before the post to after the poll that has it.
pub fn latency(
    lane: &mut dyn Lane,
    waiting: Waiting,
    amount: Amount,
    post: &mut Post<'_>,
) -> Result<Vec<u64>, BenchError> {
    let mut took = Vec::with_capacity(amount.most().min(1 << 20) as usize);
    let mut done = [0; 1];
    let mut begun = Instant::now();
    for at in 0..WARM_UP + amount.most() {
        let start = Instant::now();
        if at == WARM_UP {
            begun = start;
        }
        post(lane, at, 1)?;
        completed(lane, waiting, &mut done)?;
        if at >= WARM_UP {
            took.push(start.elapsed().as_nanos() as u64);
            if amount.over(begun) {
                break;
            }
        }
    }
    Ok(took)
}

/// One commit at a time: nanoseconds until the fabric's commit rule held. (A commit waits as the lane thinks best.)
pub fn commits(
    lane: &mut dyn Lane,
    amount: Amount,
    mut trailer: impl FnMut(u64) -> Write,
) -> Result<Vec<u64>, BenchError> {
    let mut took = Vec::with_capacity(amount.most().min(1 << 20) as usize);
    (0..WARM_UP).try_for_each(|at| lane.commit(&trailer(at), soon()))?;
    let begun = Instant::now();
    for at in 0..amount.most() {
        let start = Instant::now();
        lane.commit(&trailer(at), soon())?;
        took.push(start.elapsed().as_nanos() as u64);
        if amount.over(begun) {
            break;
        }
    }
    Ok(took)
}

/// What a full window moved.
#[derive(Debug, Clone, Copy)]
pub struct Streamed {
    pub operations: u64,
    /// Operations a second, from the first post to the last completion.
    pub average_per_s: f64,
    /// The same over the best stretch of an eighth of the run.
    pub peak_per_s: f64,
}

/// As many operations in flight as the lane and `window` allow.
pub fn stream(
    lane: &mut dyn Lane,
    window: usize,
    waiting: Waiting,
    amount: Amount,
    post: &mut Post<'_>,
) -> Result<Streamed, BenchError> {
    let window = window.min(lane.window());
    let mut times = Vec::with_capacity(amount.most().min(1 << 20) as usize);
    let mut done = [0; BATCH];
    let (mut posted, mut over) = (0, false);
    let start = Instant::now();
    while times.len() < posted as usize || !over {
        over = over || posted == amount.most() || amount.over(start);
        let room = window - lane.outstanding();
        // Half a window at a time: a doorbell for each completion would be one too many, and none before all are done too few.
        if !over && (room >= window.div_ceil(2) || room >= BATCH) {
            let count = (room.min(BATCH) as u64).min(amount.most() - posted);
            post(lane, posted, count)?;
            posted += count;
        }
        if lane.outstanding() > 0 {
            let got = completed(lane, waiting, &mut done)?;
            let now = start.elapsed().as_nanos() as u64;
            times.extend(std::iter::repeat_n(now, got));
        }
    }
    Ok(rates(&times, window))
}

/// The rates of completions at `times` (ns since the start, ascending). Completions come in clumps of up to a window, so a
/// stretch shorter than two has no rate of its own: the peak is then the average.
fn rates(times: &[u64], window: usize) -> Streamed {
    let all = times.len();
    let per_s = |operations: usize, ns: u64| if ns == 0 { 0.0 } else { operations as f64 * 1e9 / ns as f64 };
    let average_per_s = per_s(all, times.last().copied().unwrap_or(0));
    let part = all / PEAK_PART;
    let stretch = |end: usize| per_s(part, times[end] - end.checked_sub(part).map_or(0, |begin| times[begin]));
    let peak = if part < 2 * window { 0.0 } else { (part..all).map(stretch).fold(0.0, f64::max) };
    Streamed { operations: all as u64, average_per_s, peak_per_s: peak.max(average_per_s) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_those_of_the_completions_and_the_peak_is_their_best_eighth() {
        // A thousand a second, and 100 of 800 at twice that.
        let mut now = 0;
        let times: Vec<u64> = (0..800)
            .map(|at| {
                now += if (300..400).contains(&at) { 500_000 } else { 1_000_000 };
                now
            })
            .collect();
        let rates = rates(&times, 16);
        assert_eq!(rates.operations, 800);
        assert!((rates.average_per_s - 800.0 / 0.75).abs() < 1.0, "{rates:?}");
        assert!((rates.peak_per_s - 2000.0).abs() < 1.0, "{rates:?}");
        let clumped = super::rates(&times, 64);
        assert_eq!(clumped.peak_per_s, clumped.average_per_s);
    }

    #[test]
    fn no_completions_are_no_rate_and_no_panic() {
        for times in [&[][..], &[0], &[5, 5]] {
            let rates = rates(times, 1);
            assert_eq!(rates.operations as usize, times.len());
            assert!(rates.peak_per_s.is_finite() && rates.average_per_s.is_finite());
        }
    }
}
