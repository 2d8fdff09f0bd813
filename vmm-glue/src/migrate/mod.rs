//! One migration: the two roles and the protocol between them.
//!
//! [`source`] and [`destination`] read as mirror images: prepare, switch, serve (or pull and tether), then release or catch.
//! Who may run the guest is decided by `belay_checkpoint::ownership` alone; the roles carry its actions out.

pub mod arbitration;
pub mod destination;
pub mod faults;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
#[cfg(test)]
pub(crate) mod golden;
pub mod lane_watch;
pub mod lease;
pub mod observation;
pub mod operator;
pub mod peer;
pub mod protocol;
pub mod reattach;
mod recorded;
pub mod recording;
mod registering;
pub mod release;
pub mod settings;
pub mod source;
pub mod status;
pub mod switch_map;
pub mod tethering;
