//! What the processes of one role said, one after the other, and how they ended.

use crate::soak::actor::Log;
use belay_vmm_glue::migrate::observation::{Kind, Observation};
use serde::{Deserialize, Serialize};

/// A commit that failed: of which epoch, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    pub epoch: u64,
    pub why: String,
}

/// What one role said, and how it ended.
#[derive(Debug, Clone, Default)]
pub struct Said {
    /// Of all its processes, in turn.
    pub events: Vec<Observation>,
    /// Of the last one: exit code, or minus a signal; nothing if it had to be killed for not ending.
    pub exit: Option<i32>,
    /// How those before it ended.
    pub before: Vec<Option<i32>>,
    /// The number of the last one, which its events name.
    last_pid: u32,
    /// What else they said, for reports.
    pub text: String,
    pub dropped: u64,
}

impl Said {
    /// From what was heard of each.
    pub fn of(logs: &[Log]) -> Self {
        let mut said = Self::default();
        for (turn, log) in logs.iter().enumerate() {
            if turn > 0 {
                said.before.push(said.exit);
            }
            said.events.extend(log.events.iter().cloned());
            said.text.push_str(&log.text);
            said.dropped += log.dropped;
            (said.exit, said.last_pid) = (log.ended, log.pid);
        }
        said
    }

    /// The newest of what `pick` takes.
    pub fn last<'a, T>(&'a self, pick: impl Fn(&'a Kind) -> Option<T>) -> Option<T> {
        self.events.iter().rev().find_map(|event| pick(&event.kind))
    }

    /// The newest of what `pick` takes, of the last process alone.
    pub fn last_of_the_last<'a, T>(&'a self, pick: impl Fn(&'a Kind) -> Option<T>) -> Option<T> {
        let named = format!("-{}-", self.last_pid);
        let own = self.events.iter().rev().filter(|event| event.id.0.contains(&named));
        own.filter_map(|event| pick(&event.kind)).next()
    }

    pub fn said(&self, which: impl Fn(&Kind) -> bool) -> bool {
        self.events.iter().any(|event| which(&event.kind))
    }

    /// Whether a process of it said that it entered `state`.
    pub fn was(&self, state: &str) -> bool {
        self.said(|kind| matches!(kind, Kind::State { state: name, .. } if name == state))
    }

    /// When it last said so up to then, by CLOCK_MONOTONIC in microseconds.
    pub fn when_last(&self, state: &str, at_us: u64) -> Option<u64> {
        let entered = |event: &&Observation| matches!(&event.kind, Kind::State { state: name, .. } if name == state);
        self.events.iter().filter(entered).map(|event| event.at_us).filter(|&at| at <= at_us).max()
    }

    pub fn caught(&self) -> Option<u64> {
        self.last(|kind| match kind {
            Kind::Caught { epoch, .. } => Some(*epoch),
            _ => None,
        })
    }

    pub fn newest_commit(&self) -> u64 {
        self.newest_commit_until(u64::MAX)
    }

    /// The newest checkpoint that it said had committed up to then, by CLOCK_MONOTONIC in microseconds.
    pub fn newest_commit_until(&self, at_us: u64) -> u64 {
        let epoch = |event: &Observation| match event.kind {
            Kind::Committed { epoch, .. } if event.at_us <= at_us => Some(epoch),
            _ => None,
        };
        self.events.iter().filter_map(epoch).max().unwrap_or(0)
    }

    /// The newest checkpoint that it said could not be shipped. Not every end of a tether is one: a guest that would not stop ends it too.
    pub fn refused(&self) -> Option<Refused> {
        self.last(|kind| match kind {
            Kind::State { state, why } if state == "tether-failed" => {
                let (epoch, why) = why.strip_prefix("epoch ")?.split_once(" could not be shipped: ")?;
                Some(Refused { epoch: epoch.parse().ok()?, why: why.to_owned() })
            }
            _ => None,
        })
    }

    /// The lines that tell the story, at most so many.
    pub fn story(&self, most: usize) -> Vec<String> {
        let rare = |kind: &Kind| {
            !matches!(kind, Kind::Pull { .. } | Kind::Committed { .. } | Kind::Latency { .. } | Kind::Checked { .. })
        };
        let told = self.events.iter().filter(|event| rare(&event.kind));
        let lines: Vec<_> = told.filter_map(|event| serde_json::to_string(event).ok()).collect();
        lines.into_iter().rev().take(most).rev().collect()
    }
}
