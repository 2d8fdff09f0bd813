//! Dirty trackers that work for every VMM. Those of one VMM live beside it.

mod back_off;
mod hashes;
mod pagemap;
mod scanners;
mod uffd_sync;
mod uffd_wp;

pub use back_off::{BackOff, Passes};
pub use uffd_sync::{GroupSize, Groups, HELD_PAGES, SYNC_FEATURES, UffdSyncTracker, WriteFaults};
pub use uffd_wp::{REQUIRED_FEATURES, UffdWpTracker, WhoseMemory};

use crate::guest::TrackerKind;
use belay_transport::uffd::Features;

/// What a tracker needs the VMM's userfaultfd to have been opened with, beside registering guest RAM for write-protect faults;
/// `None` where it needs neither.
pub fn write_protection(kind: TrackerKind) -> Option<Features> {
    match kind {
        TrackerKind::KvmLog | TrackerKind::KvmRing => None,
        TrackerKind::UffdWp => Some(REQUIRED_FEATURES),
        TrackerKind::UffdSync => Some(SYNC_FEATURES),
    }
}
