//! What a policy would have made of a trace: the tether loop's course in simulated time, with the same two slots, over a link of a given speed.
//!
//! Costs are straight lines in pages, with noise from a seed. What is simulated is when epochs close and what that costs, not how they are
//! made: the loop itself is `crate::epoch`.

use super::trace::{Random, Trace};
use super::{Committed, Decision, EpochFacts, OnItsWay, Open, Policy};
use belay_transport::PAGE_SIZE;
use hdrhistogram::Histogram;
use std::collections::VecDeque;
use std::time::Duration;

/// How finely time passes.
const STEP: Duration = Duration::from_micros(100);
/// Epochs on their way at most: the staging slots.
const SLOTS: usize = 2;
/// A record's bytes beside its pages: device state, headers.
const RECORD_BYTES: u64 = 80 << 10;
/// Longest that output can be delayed and still be told from other delays.
const LONGEST_DELAY_US: u64 = 3_600_000_000;

/// What things take.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Costs {
    /// The pause of an epoch without pages, and what a page adds.
    pub pause: Duration,
    pub pause_a_page: Duration,
    /// From the resume to the commit of a record that takes no time on the link.
    pub commit: Duration,
    pub link_bytes_per_s: u64,
    /// Up to this share more, at random.
    pub noise: f64,
    /// One in so many takes ten times as long.
    pub hiccup_in: u32,
    /// Whether the tracker tells how many pages are dirty.
    pub counts: bool,
}

/// What came of it.
#[derive(Debug, Clone)]
pub struct Outcome {
    pub epochs: u64,
    /// Bytes on the link.
    pub bytes: u64,
    /// From the first step to the last, how much of it the guest was stopped, and how much of that it was held back.
    pub took: Duration,
    pub paused: Duration,
    pub held_back: Duration,
    /// How long each packet was held, in µs.
    pub delays_us: Histogram<u64>,
}

impl Outcome {
    /// The share of its time that the guest was stopped.
    pub fn pause_share(&self) -> f64 {
        self.paused.as_secs_f64() / self.took.as_secs_f64()
    }

    /// What so many percent of all packets were held for at most.
    pub fn delay_at(&self, percent: f64) -> Duration {
        Duration::from_micros(self.delays_us.value_at_percentile(percent))
    }
}

struct Shipped {
    /// When the link was free for it.
    begun: Duration,
    commits: Duration,
    pages: u64,
    emitted: Vec<Duration>,
}

struct Run<'a> {
    trace: &'a Trace,
    costs: &'a Costs,
    random: Random,
    now: Duration,
    closed_at: Duration,
    resumed_at: Duration,
    link_free: Duration,
    /// Pages of the open epoch, a bit each, and how many.
    dirty: Vec<u64>,
    dirty_pages: u64,
    emitted: Vec<Duration>,
    on_their_way: VecDeque<Shipped>,
    facts: EpochFacts,
    outcome: Outcome,
}

/// Runs `policy` over `trace`. The same seed gives the same outcome.
pub fn simulate(trace: &Trace, costs: &Costs, policy: &mut dyn Policy, seed: u64) -> Outcome {
    let delays_us = Histogram::new_with_max(LONGEST_DELAY_US, 3).expect("bounds that hdrhistogram takes");
    let none = Duration::ZERO;
    let outcome = Outcome { epochs: 0, bytes: 0, took: none, paused: none, held_back: none, delays_us };
    let mut run = Run {
        trace,
        costs,
        random: Random(seed),
        now: Duration::ZERO,
        closed_at: Duration::ZERO,
        resumed_at: Duration::ZERO,
        link_free: Duration::ZERO,
        dirty: vec![0; trace.pages.div_ceil(64) as usize],
        dirty_pages: 0,
        emitted: Vec::new(),
        on_their_way: VecDeque::new(),
        facts: EpochFacts::default(),
        outcome,
    };
    run.all(policy);
    run.outcome
}

impl Run<'_> {
    fn all(&mut self, policy: &mut dyn Policy) {
        let mut ask_at = Duration::ZERO;
        for stretch in &self.trace.stretches {
            let steps = (stretch.lasts.as_nanos() / STEP.as_nanos()).max(1);
            for page in stretch.pages() {
                let (word, bit) = (&mut self.dirty[page as usize / 64], 1 << (page % 64));
                self.dirty_pages += u64::from(*word & bit == 0);
                *word |= bit;
            }
            for step in 0..steps {
                if step + 1 == steps {
                    self.emitted.extend((0..stretch.outputs).map(|_| self.now));
                }
                // A commit wakes the loop, as the time that it was told to wait does.
                if (self.commits_due() || self.now >= ask_at) && self.on_their_way.len() < SLOTS {
                    match policy.next(&self.open(), &self.facts) {
                        Decision::CloseNow => self.close(policy),
                        Decision::WaitAtMost(wait) => ask_at = self.now + wait,
                    }
                }
                self.now += STEP;
            }
        }
        self.close(policy);
        self.now = self.link_free.max(self.now);
        self.commits_due();
        self.outcome.took = self.now;
    }

    fn open(&self) -> Open {
        Open {
            lasted: self.now - self.closed_at,
            dirty_pages: self.costs.counts.then_some(self.dirty_pages),
            output_waits: self.emitted.first().map(|at| self.now - *at),
            on_its_way: self.on_its_way(),
        }
    }

    fn noisy(&mut self, time: Duration) -> Duration {
        let hiccup = self.costs.hiccup_in > 0 && self.random.unit() < 1.0 / f64::from(self.costs.hiccup_in);
        time.mul_f64((1.0 + self.costs.noise * self.random.unit()) * if hiccup { 10.0 } else { 1.0 })
    }

    fn on_its_way(&self) -> OnItsWay {
        let pages = self.on_their_way.iter().map(|shipped| shipped.pages).sum();
        let since = self.on_their_way.front().map_or(Duration::ZERO, |first| self.now.saturating_sub(first.begun));
        OnItsWay { pages, since }
    }

    fn close(&mut self, policy: &mut dyn Policy) {
        let pages = self.dirty_pages;
        let pause = self.noisy(self.costs.pause + self.costs.pause_a_page.saturating_mul(pages as u32));
        let bytes = RECORD_BYTES + pages * PAGE_SIZE as u64;
        let wire = Duration::from_secs_f64(bytes as f64 / self.costs.link_bytes_per_s as f64);
        let commit = self.noisy(self.costs.commit) + wire;
        self.facts.closed += 1;
        self.facts.lasted = self.now - self.closed_at;
        self.facts.ran = self.now - self.resumed_at;
        self.facts.dirty_pages = pages;
        self.facts.pause = pause;
        self.closed_at = self.now;
        self.now += pause;
        let held_back = policy.hold_back(&self.facts, self.on_its_way());
        let begun = self.now.max(self.link_free);
        let commits = begun + commit;
        self.link_free = commits;
        let emitted = std::mem::take(&mut self.emitted);
        self.on_their_way.push_back(Shipped { begun, commits, pages, emitted });
        self.now += held_back;
        self.resumed_at = self.now;
        self.dirty.fill(0);
        self.dirty_pages = 0;
        self.outcome.epochs += 1;
        self.outcome.bytes += bytes;
        self.outcome.paused += pause + held_back;
        self.outcome.held_back += held_back;
    }

    /// Whether something has committed by now.
    fn commits_due(&mut self) -> bool {
        let mut any = false;
        while self.on_their_way.front().is_some_and(|first| first.commits <= self.now) {
            let Some(Shipped { begun, commits, pages, emitted }) = self.on_their_way.pop_front() else { break };
            for at in &emitted {
                self.outcome.delays_us.saturating_record((commits - *at).as_micros() as u64);
            }
            self.facts.committed = Committed {
                epochs: self.facts.committed.epochs + 1,
                pages,
                took: commits - begun,
                held_output: emitted.first().map(|at| commits - *at),
            };
            any = true;
        }
        any
    }
}

#[cfg(test)]
mod tests {
    use super::super::trace::Workload;
    use super::super::{Adaptive, FixedPeriod, PolicySpec};
    use super::*;

    const BOUND: Duration = Duration::from_millis(50);
    const LENGTH: Duration = Duration::from_secs(20);
    const PAGES: u32 = 65_536;

    fn costs(gigabits: u64, counts: bool) -> Costs {
        Costs {
            pause: Duration::from_micros(300),
            pause_a_page: Duration::from_nanos(500),
            commit: Duration::from_micros(150),
            link_bytes_per_s: gigabits * 125_000_000,
            noise: 0.3,
            hiccup_in: 500,
            counts,
        }
    }

    #[test]
    fn a_run_is_the_same_each_time_and_holds_every_packet_until_its_commit() {
        let trace = Workload::Phases.trace(7, PAGES, LENGTH);
        let run = || simulate(&trace, &costs(10, true), &mut FixedPeriod(Duration::from_millis(10)), 1);
        let (one, other) = (run(), run());
        assert_eq!((one.epochs, one.bytes, one.delays_us.len()), (other.epochs, other.bytes, other.delays_us.len()));
        let sent: u32 = trace.stretches.iter().map(|stretch| stretch.outputs).sum();
        assert_eq!(one.delays_us.len(), u64::from(sent));
        assert!(one.delays_us.max() >= 10_000 && one.delay_at(50.0) > Duration::from_millis(4));
        assert!((0.02..0.2).contains(&one.pause_share()), "{}", one.pause_share());
    }

    #[test]
    fn adaptive_keeps_its_bound_on_every_workload_and_sends_no_more_than_the_best_fixed_period_that_does() {
        let periods: Vec<Duration> = [1, 2, 5, 10, 15, 20, 25, 30, 35, 40, 45].map(Duration::from_millis).to_vec();
        for workload in Workload::ALL {
            for (gigabits, counts) in [(1, true), (10, true), (10, false)] {
                let trace = workload.trace(11, PAGES, LENGTH);
                let costs = costs(gigabits, counts);
                let fixed =
                    periods.iter().map(|&period| (period, simulate(&trace, &costs, &mut FixedPeriod(period), 3)));
                let keeps = fixed.filter(|(_, outcome)| outcome.delay_at(99.0) <= BOUND);
                let best = keeps.min_by_key(|(_, outcome)| outcome.bytes);
                let adaptive = simulate(&trace, &costs, &mut Adaptive::new(BOUND), 3);
                let told = format!(
                    "{workload} at {gigabits} Gb/s, counted {counts}: p50 {:?}, p99 {:?}, {} MiB in {} epochs, {:.2} % stopped; best fixed {:?}",
                    adaptive.delay_at(50.0),
                    adaptive.delay_at(99.0),
                    adaptive.bytes >> 20,
                    adaptive.epochs,
                    100.0 * adaptive.pause_share(),
                    best.as_ref().map(|(period, outcome)| (period, outcome.bytes >> 20, outcome.delay_at(99.0))),
                );
                println!("{told}");
                assert!(adaptive.delay_at(99.0) <= BOUND, "{told}");
                // Where its epochs are as long, what is sent differs by the records' own bytes.
                let Some((_, best)) = best else { continue };
                assert!(adaptive.bytes <= best.bytes + best.bytes / 200, "{told}");
            }
        }
    }

    #[test]
    fn every_policy_ends_and_loses_no_packet_whatever_the_link() {
        for text in ["fixed:1ms", "dirty:512,max=20ms", "event:512,max=20ms", "adaptive:5ms", "adaptive"] {
            let spec: PolicySpec = text.parse().unwrap();
            for gigabits_tenth in [1, 100] {
                let trace = Workload::Phases.trace(5, PAGES, Duration::from_secs(3));
                let costs = Costs { link_bytes_per_s: gigabits_tenth * 12_500_000, ..costs(1, true) };
                let outcome = simulate(&trace, &costs, &mut *spec.build(), 2);
                let sent: u32 = trace.stretches.iter().map(|stretch| stretch.outputs).sum();
                assert_eq!(outcome.delays_us.len(), u64::from(sent), "{text}");
                assert!(outcome.pause_share() < 0.9, "{text}: {}", outcome.pause_share());
            }
        }
    }
}
