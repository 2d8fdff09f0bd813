//! The disk relay: stands between a QEMU guest's disk and its image, and keeps what a tethered guest writes out of the image until its
//! checkpoint has committed (P3, P4). A process of its own, because it outlives the page server that it serves.
//!
//! ```text
//!           NBD, Unix socket (-blockdev nbd)             pwrite, fdatasync: whoever writes it has locked it
//!   QEMU ◄───────────────────────────────────► relay ◄───────────────────────────────────────────────► image
//!                                                ▲
//!                      hand: one page server ────┘ Unix socket, 0600
//! ```
//! | the relay is | and then |
//! |---|---|
//! | waiting: started with `--incoming`, or its guest is another host's for good | the image is not locked; nothing writes |
//! | open: its guest runs here and is nobody else's | the image is locked; the guest reads and writes it |
//! | away: its guest left, and may come back | the image is locked; **only what has committed is written**, as the page server says |
//! | covered: a guest came, and may be caught elsewhere | the image is not locked; what the guest writes lies over it and goes into its checkpoints |
//!
//! Rules of this room:
//! * At any time at most one host writes the image: who writes it holds its lock, and a host gives it up before the release is written down.
//! * The guest is answered at once. What it flushed is not on the storage then; so output of an epoch in which it flushed waits until the
//!   source has the epoch in the image ([`belay_checkpoint::outbox`]).
//! * A covered relay reads the storage itself (O_DIRECT) wherever nothing lies over it, and gives up what lies over it only when the source has said
//!   that the image has it.
//! * Bounded: a guest that has written much waits until its checkpoint has taken it, or the source has; a stop lets in what it has under way.
//! * A page server that dies leaves the relay as it is: away stays away, and a covered guest waits.

mod client;
mod hand;
mod image;
mod lock;
pub(crate) mod log;
pub(crate) mod messages;
pub(crate) mod nbd;
mod overlay;
mod server;

#[cfg(test)]
mod tests;

pub use hand::{Hand, HandError, Known, look};
pub use image::ImageError;
pub use log::{LogError, MOST_NAME_BYTES};
pub use messages::{Role, VERSION};
pub use server::{DiskRelay, MOST_LOG_BYTES, Place, Told};
