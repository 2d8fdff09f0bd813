//! What whoever moved a guest says of it.

use std::time::{Duration, Instant};

/// See the module.
#[derive(Debug, Clone, Copy)]
pub struct Moved {
    /// When it was told to.
    pub ordered: Instant,
    /// From the order until the source has nothing of the guest's any more.
    pub total: Duration,
    /// That the guest ran nowhere, as the one who stopped it says.
    pub blackout: Option<Duration>,
    /// Over the network.
    pub bytes: Option<u64>,
    /// Processor time of processes beside QEMU, at the source and at the destination.
    pub helpers: [Duration; 2],
}
