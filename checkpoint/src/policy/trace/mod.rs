//! What a guest writes and sends over time: recorded from a run ([`file`]), or made from a seed for a named workload ([`workload`]).

pub mod file;
mod workload;

pub(super) use workload::Random;
pub use workload::Workload;

use std::time::Duration;

/// A stretch of the guest's own time.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Slot {
    pub lasts: Duration,
    /// Pages written in it, each once.
    pub pages: Vec<u32>,
    /// Packets sent at its end.
    pub outputs: u32,
}

/// A guest's writes and output. Time is the guest's: a stopped guest does nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace {
    /// How many pages it has. All regions are counted through.
    pub pages: u32,
    pub slots: Vec<Slot>,
}
