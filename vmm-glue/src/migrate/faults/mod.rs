//! A trace of the faults of a guest that has moved: which page, when, by whom, and how long that thread waited. Recorded by a destination
//! ([`recording`]) into a file ([`file`]), and replayed against the pull engine alone by `belay-bench replay`.

pub mod file;
pub mod recording;

use belay_transport::{FrameIndex, PageSize, RegionId};

/// A block of guest RAM that pages are pulled into.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Region {
    pub id: RegionId,
    pub page_size: PageSize,
    pub frames: u64,
    /// Frames that were zero at the switch, and so never read from the source: first and count, in order.
    pub zero: Vec<(u64, u64)>,
}

/// A thread of the guest's VMM touched a frame that was not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// When it was read, in nanoseconds since the engine began to serve, which it does at the switch.
    pub ns: u64,
    /// How long the thread waited from then on; none if it was never answered.
    pub waited_ns: Option<u64>,
    pub shard: u16,
    /// As the VMM's process counts its threads; 0 where the kernel did not say.
    pub thread: u32,
    pub region: RegionId,
    pub frame: FrameIndex,
    pub write: bool,
}

/// A whole trace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FaultTrace {
    pub shards: u16,
    pub regions: Vec<Region>,
    /// By time.
    pub faults: Vec<Fault>,
}
