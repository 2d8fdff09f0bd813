//! What epochs cost.

use crate::guest::Epoch;
use crate::policy::Committed;
use hdrhistogram::Histogram;
use std::time::Duration;

/// Where the time of one pause went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PauseParts {
    /// Until the guest had stopped.
    pub stop: Duration,
    /// Saving vCPU and device state.
    pub save: Duration,
    /// Asking the tracker and applying the harvest rule.
    pub harvest: Duration,
    /// Copying into slots, waits for slots included; or holding what is copied later.
    pub stage: Duration,
    /// Letting it go again.
    pub resume: Duration,
}

impl PauseParts {
    /// The whole pause.
    pub fn total(&self) -> Duration {
        self.stop + self.save + self.harvest + self.stage + self.resume
    }
}

/// One committed epoch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EpochStats {
    /// Its number.
    pub epoch: u64,
    /// Pages of data, and pages that were discarded.
    pub pages: u64,
    pub discards: u64,
    /// Where it was copied on write: how many pages were copied because the guest was about to write them.
    pub copied_on_write: Option<u64>,
    /// Bytes of its record.
    pub bytes: u64,
    /// Packets it covers.
    pub packets: usize,
    /// Parts it was shipped in; more than one when it was larger than a slot.
    pub parts: u32,
    /// What was spent on making its harvest ready, before the guest was stopped.
    pub ahead: Duration,
    pub pause: PauseParts,
    /// From the close of the epoch before to the close of this one.
    pub lasted: Duration,
    /// From the guest's resume until the commit was reported.
    pub commit: Duration,
    /// From the instant the record shows until the commit was reported: how old the newest checkpoint is when it counts.
    pub age: Duration,
    /// Of which waiting for the source to take in earlier segments.
    pub waited_for_room: Duration,
    /// What of `commit` it had the link for: since the resume, or since the commit before it if that came later.
    pub on_link: Duration,
    /// How long the guest was held back before it ran in it, because it wrote more than the link carried.
    pub held_back: Duration,
    /// How long the oldest packet that it covers was held until the commit was reported. `None`: it covers none, or nothing is held.
    pub held_output: Option<Duration>,
}

impl EpochStats {
    /// Its number as an epoch.
    pub fn number(&self) -> Epoch {
        Epoch(self.epoch)
    }
}

/// All epochs of a tether. Histograms are in nanoseconds, up to an hour, three digits.
#[derive(Debug, Clone)]
pub struct TetherStats {
    pub committed: u64,
    pub pages: u64,
    pub discards: u64,
    pub bytes: u64,
    pub stop_timeouts: u64,
    /// For how long the guest was stopped, all in all.
    pub paused: Duration,
    /// For how long it was held back beside that.
    pub held_back: Duration,
    pub pause_ns: Histogram<u64>,
    pub commit_ns: Histogram<u64>,
    pub age_ns: Histogram<u64>,
    pub last: EpochStats,
}

const LONGEST_NS: u64 = 3_600_000_000_000;

impl Default for TetherStats {
    fn default() -> Self {
        let histogram = || Histogram::new_with_max(LONGEST_NS, 3).expect("bounds that hdrhistogram takes");
        Self {
            committed: 0,
            pages: 0,
            discards: 0,
            bytes: 0,
            stop_timeouts: 0,
            paused: Duration::ZERO,
            held_back: Duration::ZERO,
            pause_ns: histogram(),
            commit_ns: histogram(),
            age_ns: histogram(),
            last: EpochStats::default(),
        }
    }
}

impl TetherStats {
    /// The newest one, as a policy sees it.
    pub(super) fn newest(&self) -> Committed {
        let EpochStats { pages, on_link, held_output, .. } = self.last;
        Committed { epochs: self.committed, pages, took: on_link, held_output }
    }

    pub(super) fn record(&mut self, stats: &EpochStats) {
        self.committed += 1;
        self.pages += stats.pages;
        self.discards += stats.discards;
        self.bytes += stats.bytes;
        self.paused += stats.pause.total();
        self.held_back += stats.held_back;
        let ns = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.pause_ns.saturating_record(ns(stats.pause.total()));
        self.commit_ns.saturating_record(ns(stats.commit));
        self.age_ns.saturating_record(ns(stats.age));
        self.last = *stats;
    }
}
