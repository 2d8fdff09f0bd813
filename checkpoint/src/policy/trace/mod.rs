//! What a guest writes and sends over time: recorded from a run ([`file`]), or made from a seed for a named workload ([`workload`]).

pub mod file;
mod workload;

pub(super) use workload::Random;
pub use workload::Workload;

use std::time::Duration;

/// A stretch of the guest's own time.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stretch {
    pub lasts: Duration,
    /// Packets sent at its end.
    pub outputs: u32,
    /// Pages written in it, each once, as first and count, in any order. Runs and not pages: a few bytes of a file then never take gigabytes here.
    pub runs: Vec<(u32, u32)>,
}

impl Stretch {
    /// Adds a page; pages that come in order make runs.
    pub fn wrote(&mut self, page: u32) {
        match self.runs.last_mut() {
            Some((first, count)) if first.checked_add(*count) == Some(page) => *count += 1,
            _ => self.runs.push((page, 1)),
        }
    }

    /// The pages written.
    pub fn pages(&self) -> impl Iterator<Item = u32> {
        self.runs.iter().flat_map(|&(first, count)| first..first + count)
    }
}

/// A guest's writes and output. Time is the guest's: a stopped guest does nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace {
    /// How many pages it has. All regions are counted through.
    pub pages: u32,
    pub stretches: Vec<Stretch>,
}
