//! The sum of a soak.

use super::case::{Phase, Strike};
use super::verdict::{Compared, Home, Outcome, RunReport, Succession};
use crate::options::FabricChoice;
use crate::report::time;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write;

/// Latencies of one fabric, in microseconds.
#[derive(Debug, Clone, Serialize)]
pub struct Latency {
    pub runs: usize,
    pub median_us: u64,
    pub p99_us: u64,
    pub max_us: u64,
}

/// What was counted.
#[derive(Debug, Default)]
pub struct Tally {
    held: u64,
    broken: u64,
    void: u64,
    by_phase: BTreeMap<(String, Phase), u64>,
    by_strike: BTreeMap<(String, Strike), u64>,
    by_home: BTreeMap<Home, u64>,
    /// Runs that a second migration followed, by where the first guest was in the end.
    second_after: BTreeMap<Home, u64>,
    /// Kills of the destination while the source stood in a fold, by fabric.
    after_folding: BTreeMap<String, u64>,
    /// Fenced guests whose memory was compared, how many of them had all of it, and guests of which there was nothing to compare.
    fenced: u64,
    fenced_whole: u64,
    not_compared: u64,
    silences: BTreeMap<String, Vec<u64>>,
    /// What takeovers came to, and how often whoever took over was killed too.
    by_succession: BTreeMap<(Strike, Succession), u64>,
    killed_again: u64,
    succession_silences: BTreeMap<String, Vec<u64>>,
    /// Lines of a run's processes that were not kept.
    dropped: u64,
    slowest_ms: u64,
}

/// Memory of the host over a soak, in bytes.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Memory {
    pub available_at_start: u64,
    pub available_least: u64,
    pub available_at_end: u64,
    pub shared_at_start: u64,
    pub shared_most: u64,
    pub shared_at_end: u64,
}

/// What `--json` ends with.
#[derive(Debug, Serialize)]
pub struct Sum<'a> {
    event: &'static str,
    passed: bool,
    held: u64,
    broken: u64,
    void: u64,
    /// Runs that held, by fabric and phase, and by fabric and strike.
    by_phase: BTreeMap<String, u64>,
    by_strike: BTreeMap<String, u64>,
    by_home: &'a BTreeMap<Home, u64>,
    /// Runs that a second migration followed, by the first guest's end.
    second_after: &'a BTreeMap<Home, u64>,
    /// Kills of the destination while the source stood in a fold: of all, and by fabric.
    kills_after_folding: u64,
    kills_after_folding_over: &'a BTreeMap<String, u64>,
    /// Fenced guests whose memory was compared as far as they had it, those of them that had all of it, and guests of which there was nothing
    /// to compare.
    fenced_compared: u64,
    fenced_compared_whole: u64,
    not_compared: u64,
    /// Last packet of the killed destination to the first new one of the source.
    death_to_running: BTreeMap<&'a str, Latency>,
    /// What takeovers came to, by strike, and how many of them were taken over from once more.
    by_succession: BTreeMap<String, u64>,
    taken_over_twice: u64,
    /// Longest silence around a takeover after which the guest went on at the destination.
    takeover_silence: BTreeMap<&'a str, Latency>,
    dropped_lines: u64,
    slowest_ms: u64,
    memory: Memory,
}

/// By fabric.
fn latencies(silences: &BTreeMap<String, Vec<u64>>) -> BTreeMap<&str, Latency> {
    let mut all = BTreeMap::new();
    for (fabric, silences) in silences {
        let mut sorted = silences.clone();
        sorted.sort_unstable();
        let at = |share: f64| sorted[((sorted.len() - 1) as f64 * share).round() as usize];
        let latency = Latency { runs: sorted.len(), median_us: at(0.5), p99_us: at(0.99), max_us: at(1.0) };
        all.insert(fabric.as_str(), latency);
    }
    all
}

impl Tally {
    /// Takes a run in.
    pub fn add(&mut self, run: &RunReport) {
        self.dropped += run.dropped;
        self.slowest_ms = self.slowest_ms.max(run.took_ms);
        match run.outcome {
            Outcome::Void => return self.void += 1,
            Outcome::Broken => return self.broken += 1,
            Outcome::Held => self.held += 1,
        }
        let fabric = run.case.fabric.to_string();
        *self.by_phase.entry((fabric.clone(), run.case.phase)).or_default() += 1;
        *self.by_strike.entry((fabric.clone(), run.case.strike)).or_default() += 1;
        if let Some(home) = run.home {
            *self.by_home.entry(home).or_default() += 1;
            *self.second_after.entry(home).or_default() += u64::from(run.second);
        }
        match run.fenced {
            Some(Compared::Pages { not_there, .. }) => {
                self.fenced += 1;
                self.fenced_whole += u64::from(not_there == 0);
            }
            Some(Compared::Not { .. }) => self.not_compared += 1,
            None => {}
        }
        if run.folding {
            *self.after_folding.entry(fabric.clone()).or_default() += 1;
        }
        if let Some(silence) = run.silence_us {
            self.silences.entry(fabric.clone()).or_default().push(silence);
        }
        if let Some(succession) = run.succession {
            *self.by_succession.entry((run.case.strike, succession)).or_default() += 1;
            self.killed_again += u64::from(run.killed_again);
        }
        if let Some(silence) = run.succession_silence_us {
            self.succession_silences.entry(fabric).or_default().push(silence);
        }
    }

    /// Runs that held, and that did not.
    pub fn counts(&self) -> (u64, u64, u64) {
        (self.held, self.broken, self.void)
    }

    /// For `--json`.
    pub fn sum(&self, memory: Memory) -> Sum<'_> {
        Sum {
            event: "soak",
            passed: self.broken == 0,
            held: self.held,
            broken: self.broken,
            void: self.void,
            by_phase: self.by_phase.iter().map(|((fabric, phase), n)| (format!("{fabric}/{phase}"), *n)).collect(),
            by_strike: self.by_strike.iter().map(|((fabric, strike), n)| (format!("{fabric}/{strike}"), *n)).collect(),
            by_home: &self.by_home,
            second_after: &self.second_after,
            kills_after_folding: self.after_folding.values().sum(),
            kills_after_folding_over: &self.after_folding,
            fenced_compared: self.fenced,
            fenced_compared_whole: self.fenced_whole,
            not_compared: self.not_compared,
            death_to_running: latencies(&self.silences),
            by_succession: self
                .by_succession
                .iter()
                .map(|((strike, came), n)| (format!("{strike}/{came}"), *n))
                .collect(),
            taken_over_twice: self.killed_again,
            takeover_silence: latencies(&self.succession_silences),
            dropped_lines: self.dropped,
            slowest_ms: self.slowest_ms,
            memory,
        }
    }

    /// For a person.
    pub fn text(&self, memory: &Memory) -> String {
        let mut out = String::new();
        let fabrics: Vec<_> = [FabricChoice::Local, FabricChoice::Tcp, FabricChoice::Verbs]
            .iter()
            .map(ToString::to_string)
            .filter(|fabric| self.by_phase.keys().any(|(seen, _)| seen == fabric))
            .collect();
        let heading = fabrics.iter().map(|fabric| format!("{fabric:>8}")).collect::<String>();
        let _ = writeln!(out, "{:<18}{heading}", "runs that held");
        let mut row = |name: String, count: &dyn Fn(&str) -> u64| {
            let counts = fabrics.iter().map(|fabric| format!("{:>8}", count(fabric))).collect::<String>();
            let _ = writeln!(out, "{name:<18}{counts}");
        };
        for &phase in Phase::ALL {
            row(phase.to_string(), &|fabric| self.by_phase.get(&(fabric.to_owned(), phase)).copied().unwrap_or(0));
        }
        for &strike in Strike::ALL {
            row(strike.to_string(), &|fabric| self.by_strike.get(&(fabric.to_owned(), strike)).copied().unwrap_or(0));
        }
        let homes: Vec<_> = self.by_home.iter().map(|(home, count)| format!("{home:?} {count}")).collect();
        let _ = writeln!(
            out,
            "\nthe guest's end: {}; kills while the source stood in a fold: {}; second migrations in the same directories: {}",
            homes.join(", "),
            self.after_folding.values().sum::<u64>(),
            self.second_after.values().sum::<u64>()
        );
        let _ = writeln!(
            out,
            "memory of fenced guests compared: {}, {} of them whole; guests of which there was nothing to compare: {}",
            self.fenced, self.fenced_whole, self.not_compared
        );
        for (fabric, Latency { runs, median_us, p99_us, max_us }) in latencies(&self.silences) {
            let _ = writeln!(
                out,
                "{fabric}: destination's death to guest running, as the observer sees it: median {}, p99 {}, max {} ({runs} runs)",
                time(median_us),
                time(p99_us),
                time(max_us)
            );
        }
        for (fabric, Latency { runs, median_us, p99_us, max_us }) in latencies(&self.succession_silences) {
            let _ = writeln!(
                out,
                "{fabric}: longest silence around a takeover after which the guest went on: median {}, p99 {}, max {} ({runs} runs)",
                time(median_us),
                time(p99_us),
                time(max_us)
            );
        }
        if !self.by_succession.is_empty() {
            let came: Vec<_> =
                self.by_succession.iter().map(|((strike, came), n)| format!("{strike} {came} {n}")).collect();
            let _ = writeln!(
                out,
                "takeovers: {}; {} of them taken over from once more",
                came.join(", "),
                self.killed_again
            );
        }
        let mib = |bytes: u64| bytes >> 20;
        let _ = writeln!(
            out,
            "memory available: {} MiB at start, {} at least, {} at end; shared memory: {} MiB, {} at most, {}",
            mib(memory.available_at_start),
            mib(memory.available_least),
            mib(memory.available_at_end),
            mib(memory.shared_at_start),
            mib(memory.shared_most),
            mib(memory.shared_at_end)
        );
        let _ = writeln!(
            out,
            "{} held, {} broken, {} made again because a short lease had run out by itself",
            self.held, self.broken, self.void
        );
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::soak::case::Case;

    fn held(case: &str, folding: bool) -> RunReport {
        let case: Case = case.parse().unwrap();
        let caught_epoch = Some(7);
        RunReport {
            case,
            outcome: Outcome::Held,
            wrong: vec![],
            landed: String::new(),
            home: Some(Home::Caught),
            silence_us: None,
            succession: None,
            killed_again: false,
            succession_silence_us: None,
            caught_epoch,
            recovered_pages: None,
            fenced: None,
            commits_told: 7,
            refused: None,
            folding,
            second: false,
            took_ms: 1,
            dropped: 0,
            story: vec![],
        }
    }

    #[test]
    fn a_kill_counts_as_one_in_a_fold_where_the_source_stood_in_one_whatever_was_caught() {
        let memory = Memory {
            available_at_start: 0,
            available_least: 0,
            available_at_end: 0,
            shared_at_start: 0,
            shared_most: 0,
            shared_at_end: 0,
        };
        let mut tally = Tally::default();
        tally.add(&held("local/pull/destination-kill/1", false));
        tally.add(&RunReport { outcome: Outcome::Void, ..held("tcp/fold/host-kill/1", true) });
        assert_eq!(tally.sum(memory).kills_after_folding, 0);
        tally.add(&held("tcp/fold/host-kill/1", true));
        tally.add(&held("tcp/fold/server-kill/1", true));
        let sum = tally.sum(memory);
        assert_eq!(sum.kills_after_folding, 2);
        assert_eq!(sum.kills_after_folding_over, &BTreeMap::from([("tcp".to_owned(), 2)]));
    }
}
