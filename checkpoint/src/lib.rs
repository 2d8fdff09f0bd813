//! `belay-checkpoint` takes, ships, keeps and restores reverse incremental checkpoints, and decides who may run the guest.
//!
//! It knows guests only through the traits of [`guest`], and the other host only through `belay-transport`.

pub mod arbiter;
mod clock;
pub mod dirty;
pub mod epoch;
pub mod fold;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
#[cfg(test)]
#[path = "../../transport/src/golden.rs"]
mod golden;
pub mod guest;
pub mod journal;
pub mod json_lines;
mod mutation;
pub mod outbox;
pub mod ownership;
pub mod policy;
pub mod record;
pub mod ring;
mod share;
#[cfg(test)]
mod simulation;
pub mod staging;
pub mod storage;
#[cfg(test)]
mod testing;
pub mod tracker;
