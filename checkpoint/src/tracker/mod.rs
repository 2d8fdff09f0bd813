//! Dirty trackers that work for every VMM. Those of one VMM live beside it.

mod pagemap;
mod scanners;
mod uffd_wp;

pub use uffd_wp::{REQUIRED_FEATURES, UffdWpTracker, WhoseMemory};
