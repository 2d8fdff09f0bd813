//! The board on which a role shows how it stands, for whoever asks: `belay status` and `--metrics`.
//!
//! Most of it is made of the observations that the role notes anyway ([`Board::heard`]), so it cannot say other things than the
//! story does. The rest are a few stores a turn of the role's loop; the fault path knows nothing of it. What changes all the time
//! (pages, faults, held output) is read from where it is counted, by whoever asks and when they ask.

use super::observation::{Kind, Observation, ObservationId, monotonic_us};
use belay_checkpoint::outbox::Outbox;
use belay_transport::pull::{Engine, Progress};
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// Version of [`Status`] as it is sent; a field may be added under the same one, none is taken away or changes its meaning.
pub const STATUS_VERSION: u16 = 1;

/// Buckets of a [`Distribution`].
pub const BUCKETS: usize = 24;
/// Observations remembered, so that an error can be told with what led to it.
const REMEMBERED: usize = 128;
/// Longest story.
const STORY: usize = 16;
/// Rates are means over this time, in microseconds.
const RATE_WINDOW_US: u64 = 1_000_000;
/// Between two samples of a rate.
const SAMPLE_US: u64 = 50_000;
/// Longest pause, age or delay that is told from a longer one: an hour.
const LONGEST_NS: u64 = 3_600_000_000_000;

/// How one role of one migration stands. Times are of the host it was made on.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    pub version: u16,
    /// What commands call it by.
    pub id: String,
    /// `source` or `destination`.
    pub role: String,
    pub pid: u32,
    /// The same on both hosts: the session's nonce, as the release record names it. None before there is a session.
    pub migration: Option<String>,
    /// The state of `ownership`, or what goes on before and after there is one.
    pub state: String,
    pub why: String,
    pub in_state_us: u64,
    pub owner_epoch: Option<u64>,
    pub up_us: u64,
    /// Since the role's loop last turned. Large: it waits in a step, or stands still.
    pub loop_turned_us: Option<u64>,
    pub peer: Option<String>,
    pub fabric: Option<String>,
    pub tls: Option<bool>,
    pub memory_bytes: Option<u64>,
    /// At the destination, once the guest has come.
    pub pages: Option<Pages>,
    /// Where there is a tether.
    pub checkpoints: Option<Checkpoints>,
    pub output: Option<Output>,
    /// How long the lease last granted still lasts: at the destination by its own clock, at the source at the longest.
    pub lease_left_us: Option<u64>,
    /// Event read from the userfaultfd to page shown, at the destination.
    pub fault_latency: Option<Distribution>,
    /// What the guest went without at the switch, seen by the source.
    pub blackout_us: Option<u64>,
    pub last_error: Option<Failure>,
}

/// How far the pull is. A page here is a frame of guest RAM, of 4 KiB or 2 MiB.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Pages {
    pub total: u64,
    /// Neither landed nor given up by the guest.
    pub left: u64,
    pub zero: u64,
    pub bytes_pulled: u64,
    pub bytes_per_second: f64,
    pub faults: u64,
    /// Faults that needed a read from the source.
    pub demand_reads: u64,
}

/// How the tether goes.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Checkpoints {
    /// Newest that has committed; 0 is the state at the switch.
    pub committed_epoch: u64,
    /// How old the instant is that it shows. At the source, since it was heard of.
    pub commit_age_us: Option<u64>,
    /// Newest that is in the source's RAM.
    pub folded_epoch: Option<u64>,
    pub commits: u64,
    pub pages: u64,
    pub bytes: u64,
    /// For how long the guest was held back, all in all, because it wrote more than the link carried. At the destination.
    pub held_back_us: u64,
    /// Pages that checkpoints found written, over the last second.
    pub dirty_pages_per_second: Option<f64>,
    pub pause: Option<Distribution>,
    /// Of each checkpoint when it committed.
    pub age_at_commit: Option<Distribution>,
}

/// The guest's output on its way to the world.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Output {
    pub held_packets: u64,
    pub held_bytes: u64,
    pub sent_packets: u64,
    pub failed_emissions: u64,
    /// Emitted by the guest to taken by the world.
    pub delay: Option<Distribution>,
}

/// Durations in nanoseconds, and their counts in buckets as QEMU has them: the Nth counts what took 2^N µs or more and less than
/// 2^(N+1) µs; the first what took less too, the last what took more too.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Distribution {
    pub count: u64,
    pub sum_ns: u64,
    pub p50_ns: u64,
    pub p99_ns: u64,
    pub max_ns: u64,
    pub buckets: Vec<u64>,
}

impl Distribution {
    /// What `histogram` (of nanoseconds) holds; none if it is empty.
    pub fn of(histogram: &Histogram<u64>) -> Option<Self> {
        if histogram.is_empty() {
            return None;
        }
        let mut buckets = vec![0; BUCKETS];
        let mut sum_ns: u64 = 0;
        for recorded in histogram.iter_recorded() {
            // The middle of its own bucket stands for a value.
            let (value_ns, count) =
                (histogram.median_equivalent(recorded.value_iterated_to()), recorded.count_at_value());
            buckets[bucket_of(value_ns)] += count;
            sum_ns = sum_ns.saturating_add(value_ns.saturating_mul(count));
        }
        Some(Self {
            count: histogram.len(),
            sum_ns,
            p50_ns: histogram.value_at_quantile(0.5),
            p99_ns: histogram.value_at_quantile(0.99),
            max_ns: histogram.max(),
            buckets,
        })
    }
}

/// The bucket of a time.
fn bucket_of(ns: u64) -> usize {
    let power = (ns / 1000).max(1).ilog2() as usize;
    power.min(BUCKETS - 1)
}

/// Something that went wrong, with what led to it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Failure {
    pub what: String,
    pub advice: String,
    pub ago_us: u64,
    /// From the first cause known here to the failure itself. A parent that is not among them was noted by the other host.
    pub story: Vec<Observation>,
}

impl PartialEq for Failure {
    fn eq(&self, other: &Self) -> bool {
        let ids = |failure: &Self| failure.story.iter().map(|seen| seen.id.clone()).collect::<Vec<_>>();
        (&self.what, &self.advice, ids(self)) == (&other.what, &other.advice, ids(other))
    }
}

/// Where a role shows how it stands.
pub struct Board {
    id: String,
    role: &'static str,
    started_us: u64,
    facts: Mutex<Facts>,
    /// Of its own: whoever reads it may take a moment over the histograms.
    pull: Mutex<Pull>,
    output: Mutex<Weak<Outbox>>,
    /// CLOCK_BOOTTIME in ns; 0: no lease.
    lease_ends_at_ns: AtomicU64,
    /// CLOCK_MONOTONIC in µs; 0: it has not begun.
    turned_at_us: AtomicU64,
}

#[derive(Default)]
enum Pull {
    #[default]
    NotYet,
    Live(Weak<Engine>),
    Over(Progress, Option<Distribution>),
}

struct Facts {
    migration: Option<u64>,
    state: String,
    why: String,
    since_us: u64,
    owner_epoch: Option<u64>,
    peer: Option<(String, String, bool)>,
    memory_bytes: Option<u64>,
    blackout_us: Option<u64>,
    checkpoints: Option<Checkpoints>,
    /// When the instant that the newest checkpoint shows was, or when its commit was heard of.
    shown_at_us: Option<u64>,
    pause_ns: Histogram<u64>,
    age_ns: Histogram<u64>,
    pulled: Rate,
    dirtied: Rate,
    error: Option<(u64, String, String, Vec<Observation>)>,
    remembered: VecDeque<Observation>,
}

impl Default for Facts {
    fn default() -> Self {
        let histogram = || Histogram::new_with_max(LONGEST_NS, 2).expect("bounds that hdrhistogram takes");
        Self {
            migration: None,
            state: "starting".to_owned(),
            why: String::new(),
            since_us: monotonic_us(),
            owner_epoch: None,
            peer: None,
            memory_bytes: None,
            blackout_us: None,
            checkpoints: None,
            shown_at_us: None,
            pause_ns: histogram(),
            age_ns: histogram(),
            pulled: Rate::default(),
            dirtied: Rate::default(),
            error: None,
            remembered: VecDeque::with_capacity(REMEMBERED),
        }
    }
}

/// The growth of a counter over the last second.
#[derive(Debug, Default)]
struct Rate(VecDeque<(u64, u64)>);

impl Rate {
    fn sample(&mut self, at_us: u64, counter: u64) {
        let too_soon = self.0.back().is_some_and(|&(last, _)| at_us < last + SAMPLE_US);
        if too_soon && self.0.len() > 1 {
            // The newest stands for now until the one before it is old enough.
            let before = self.0[self.0.len() - 2].0;
            if at_us < before + 2 * SAMPLE_US {
                *self.0.back_mut().expect("there is more than one") = (at_us, counter);
                return;
            }
        }
        self.0.push_back((at_us, counter));
        while self.0.len() > 2 && self.0[1].0 + RATE_WINDOW_US <= at_us {
            self.0.pop_front();
        }
    }

    /// A second; none when there are no two samples yet, zero when the last is longer ago than the window.
    fn at(&self, now_us: u64) -> Option<f64> {
        let (&(from, before), &(to, after)) = (self.0.front()?, self.0.back()?);
        if now_us > to + RATE_WINDOW_US {
            return Some(0.0);
        }
        (to > from).then(|| after.saturating_sub(before) as f64 * 1e6 / (to - from) as f64)
    }
}

impl Default for Board {
    fn default() -> Self {
        Self::new("unnamed", "source")
    }
}

impl std::fmt::Debug for Board {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Board").field("id", &self.id).field("role", &self.role).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change is a few assignments: a panic elsewhere leaves nothing half done.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Board {
    /// An empty board of the role (`source` or `destination`) that commands call `id`.
    pub fn new(id: impl Into<String>, role: &'static str) -> Self {
        Self {
            id: id.into(),
            role,
            started_us: monotonic_us(),
            facts: Mutex::default(),
            pull: Mutex::default(),
            output: Mutex::new(Weak::new()),
            lease_ends_at_ns: AtomicU64::new(0),
            turned_at_us: AtomicU64::new(0),
        }
    }

    /// What commands call this process.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// What goes on while there is no state of `ownership`: `listening`, say.
    pub fn phase(&self, name: &str, why: impl Into<String>) {
        let mut facts = lock(&self.facts);
        (facts.state, facts.why, facts.since_us) = (name.to_owned(), why.into(), monotonic_us());
    }

    /// A state of `ownership` was entered.
    pub fn entered(&self, state: &str, owner_epoch: Option<u64>, why: &str) {
        let mut facts = lock(&self.facts);
        (facts.state, facts.why, facts.since_us) = (state.to_lowercase(), why.to_owned(), monotonic_us());
        facts.owner_epoch = owner_epoch.or(facts.owner_epoch);
        // Told anew at the next turn, where there is one.
        self.lease_ends_at_ns.store(0, Ordering::Relaxed);
    }

    /// Which migration this is about.
    pub fn session(&self, migration: u64) {
        lock(&self.facts).migration = Some(migration);
    }

    /// The role's loop has turned; and when the lease ends, by CLOCK_BOOTTIME.
    pub fn turned(&self, lease_ends_at_ns: Option<u64>) {
        self.turned_at_us.store(monotonic_us(), Ordering::Relaxed);
        self.lease_ends_at_ns.store(lease_ends_at_ns.unwrap_or(0), Ordering::Relaxed);
    }

    /// Pages come by `engine`.
    pub fn pulls_with(&self, engine: &Arc<Engine>) {
        *lock(&self.pull) = Pull::Live(Arc::downgrade(engine));
    }

    /// The engine is about to end: nobody reads it through this board after this.
    pub fn pull_over(&self, engine: &Engine) {
        let over = Pull::Over(engine.progress(), Distribution::of(&engine.fault_latency()));
        *lock(&self.pull) = over;
    }

    /// Output goes through `outbox`.
    pub fn emits_through(&self, outbox: &Arc<Outbox>) {
        *lock(&self.output) = Arc::downgrade(outbox);
    }

    /// Where folding stands at the source.
    pub fn folded(&self, committed: u64, folded: u64, folded_pages: u64) {
        let mut facts = lock(&self.facts);
        let news = facts.checkpoints.as_ref().is_none_or(|known| known.committed_epoch != committed);
        if news {
            let now = monotonic_us();
            facts.shown_at_us = (committed > 0).then_some(now);
            facts.dirtied.sample(now, folded_pages);
        }
        let known = facts.checkpoints.get_or_insert_default();
        (known.committed_epoch, known.folded_epoch) = (committed, Some(folded));
        (known.commits, known.pages) = (committed, folded_pages);
    }

    /// Takes in what was noted.
    pub fn heard(&self, seen: &Observation) {
        let mut facts = lock(&self.facts);
        let facts = &mut *facts;
        match &seen.kind {
            Kind::Committed { epoch, pages, bytes, pause_us, held_back_us, age_us, .. } => {
                facts.pause_ns.saturating_record(pause_us.saturating_mul(1000));
                facts.age_ns.saturating_record(age_us.saturating_mul(1000));
                facts.shown_at_us = Some(seen.at_us.saturating_sub(*age_us));
                let known = facts.checkpoints.get_or_insert_default();
                known.committed_epoch = *epoch;
                known.commits += 1;
                known.pages += pages;
                known.bytes += bytes;
                known.held_back_us += held_back_us;
                let pages = known.pages;
                facts.dirtied.sample(seen.at_us, pages);
                return;
            }
            Kind::Pull { bytes, .. } => return facts.pulled.sample(seen.at_us, *bytes),
            Kind::Latency { .. }
            | Kind::Allocating { .. }
            | Kind::Registering { .. }
            | Kind::Folded { .. }
            | Kind::CpuTime { .. }
            | Kind::Checked { .. } => return,
            Kind::GuestStarted { spec, .. } => facts.memory_bytes = Some(spec.memory_bytes),
            Kind::Allocated { bytes, .. } => facts.memory_bytes = Some(*bytes),
            Kind::Connected { peer, fabric, tls, .. } => facts.peer = Some((peer.clone(), fabric.clone(), *tls)),
            Kind::Blackout { took_us } => facts.blackout_us = Some(*took_us),
            _ => {}
        }
        if facts.remembered.len() == REMEMBERED {
            facts.remembered.pop_front();
        }
        facts.remembered.push_back(seen.clone());
        let (what, advice) = match &seen.kind {
            Kind::Failed { what, advice } => (what.clone(), advice.clone()),
            Kind::Noticed { by } if by != super::source::BY_ORDER => {
                (format!("the destination is lost: {by}"), "The source takes the guest back.".to_owned())
            }
            _ => return,
        };
        let story = story(&facts.remembered, &seen.id);
        facts.error = Some((seen.at_us, what, advice, story));
    }

    /// How it stands now.
    pub fn status(&self) -> Status {
        let now = monotonic_us();
        let (progress, fault_latency) = match &*lock(&self.pull) {
            Pull::NotYet => (None, None),
            Pull::Live(engine) => match engine.upgrade() {
                // Given back before the lock is: who ends the engine has it alone.
                Some(engine) => (Some(engine.progress()), Distribution::of(&engine.fault_latency())),
                None => (None, None),
            },
            Pull::Over(progress, latency) => (Some(*progress), latency.clone()),
        };
        let outbox = lock(&self.output).upgrade();
        let output = outbox.map(|outbox| {
            let facts = outbox.facts();
            Output {
                held_packets: facts.held_packets as u64,
                held_bytes: facts.held_bytes,
                sent_packets: facts.sent_packets,
                failed_emissions: facts.failed_emissions,
                delay: Distribution::of(&outbox.delays()),
            }
        });
        let lease_left_us = match self.lease_ends_at_ns.load(Ordering::Relaxed) {
            0 => None,
            ends => Some(ends.saturating_sub(super::lease::boot_time().as_nanos() as u64) / 1000),
        };
        let turned = self.turned_at_us.load(Ordering::Relaxed);
        let facts = lock(&self.facts);
        let pages = progress.map(|progress| Pages {
            total: progress.frames,
            left: progress.absent + progress.in_flight + progress.failed,
            zero: progress.zero_frames,
            bytes_pulled: progress.bytes_pulled,
            bytes_per_second: facts.pulled.at(now).unwrap_or(0.0),
            faults: progress.faults,
            demand_reads: progress.demand_reads,
        });
        let checkpoints = facts.checkpoints.clone().map(|known| Checkpoints {
            commit_age_us: facts.shown_at_us.map(|at| now.saturating_sub(at)),
            dirty_pages_per_second: facts.dirtied.at(now),
            pause: Distribution::of(&facts.pause_ns),
            age_at_commit: Distribution::of(&facts.age_ns),
            ..known
        });
        let (peer, fabric, tls) =
            facts.peer.clone().map_or((None, None, None), |(peer, fabric, tls)| (Some(peer), Some(fabric), Some(tls)));
        Status {
            version: STATUS_VERSION,
            id: self.id.clone(),
            role: self.role.to_owned(),
            pid: std::process::id(),
            migration: facts.migration.map(|nonce| format!("{nonce:016x}")),
            state: facts.state.clone(),
            why: facts.why.clone(),
            in_state_us: now.saturating_sub(facts.since_us),
            owner_epoch: facts.owner_epoch,
            up_us: now.saturating_sub(self.started_us),
            loop_turned_us: (turned > 0).then(|| now.saturating_sub(turned)),
            peer,
            fabric,
            tls,
            memory_bytes: facts.memory_bytes,
            pages,
            checkpoints,
            output,
            lease_left_us,
            fault_latency,
            blackout_us: facts.blackout_us,
            last_error: facts.error.as_ref().map(|(at, what, advice, story)| Failure {
                what: what.clone(),
                advice: advice.clone(),
                ago_us: now.saturating_sub(*at),
                story: story.clone(),
            }),
        }
    }
}

/// The observations that led to `end`, oldest first.
fn story(remembered: &VecDeque<Observation>, end: &ObservationId) -> Vec<Observation> {
    let mut told = Vec::new();
    let mut wanted = Some(end.clone());
    while let Some(id) = wanted.take()
        && told.len() < STORY
        && let Some(seen) = remembered.iter().rev().find(|seen| seen.id == id)
    {
        wanted = seen.parent.clone();
        told.push(seen.clone());
    }
    told.reverse();
    told
}

#[cfg(test)]
mod tests;
