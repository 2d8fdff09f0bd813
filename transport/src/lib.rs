//! `belay-transport` moves pages between hosts. It knows regions, pages, fabrics and lanes; it knows no VM.
//!
//! Arrows go one way: everything above (checkpoints, VMM glue, the command) uses this crate and is not known to it.

pub mod deadline;
pub mod fabric;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
#[cfg(test)]
mod golden;
pub mod numa;
pub mod pagemap;
pub mod pages;
pub mod pull;
pub mod region;
pub mod session;
pub mod stop_point;
#[cfg(test)]
mod testing;
pub mod uffd;
pub mod units;
mod words;

pub use deadline::Deadline;
pub use units::{FrameIndex, PAGE_SHIFT, PAGE_SIZE, PageIndex, PageSize, RegionId};
pub use words::{explain, harmless};
