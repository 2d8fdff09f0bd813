//! The network relay: stands between a QEMU guest's network card and the world, and holds what a tethered guest sends until its
//! checkpoint has committed (P4). A process of its own, because it outlives the page server that it serves.
//!
//! ```text
//!                 frames, Unix socket (-netdev stream)             frames, tap device or Unix socket
//!   QEMU ◄──────────────────────────────────────► relay ◄──────────────────────────────────────► world
//!                                                   ▲
//!                         hand: one page server ────┘ Unix socket, 0600
//! ```
//! The gate, by who has the hand:
//!
//! | gate | guest to world | world to guest |
//! |---|---|---|
//! | open: nobody has attached, or the last one has let go | passes | passes |
//! | held: a page server is attached | goes to the page server; the world gets what *it* gives | passes, except while the guest stands still |
//! | shut: a page server has gone without letting go | nothing passes | nothing passes |
//!
//! Rules of this room:
//! * **The guest's socket is always read.** A QEMU whose socket is full when it is stopped loses a frame and lets the stopped guest
//!   send on, which changes guest RAM and device state during a checkpoint. What cannot be passed on is dropped and counted, as any switch does;
//!   nothing the guest sends is ever left in its socket for want of room.
//! * A network may lose frames and may not invent them. So every queue here is bounded and what is beyond it is dropped; and nothing is
//!   emitted that is not the world's due: a shut gate stays shut until a page server comes back and lets go.
//! * A checkpoint's border is exact: [`Hand::settle`] comes back once every byte that QEMU had sent before it was stopped is with
//!   the page server, and no frame goes to the guest until [`Hand::go`].
//! * The relay knows no numbers, epochs or leases. Those are the page server's ([`belay_checkpoint::outbox`]).
//!
//! Envelope: a frame of 1,514 bytes costs two system calls and two copies at each of two hops (about 5 µs on a host of 2 GHz), 200,000
//! frames a second a core; held output beyond that is bounded by the outbox. A settle is one round trip over a Unix socket, 20 to 40 µs,
//! and the drain of what QEMU sent since the last look: at most its socket's buffer (208 KiB).

mod board;
mod frames;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
#[cfg(test)]
pub(crate) mod golden;
mod hand;
mod messages;
mod world;

#[cfg(test)]
mod tests;

pub(in crate::qemu) use board::Listener;
pub use board::{Gate, Relay, RelayCounts};
pub use frames::{Frames, FramesError, MAX_FRAME_BYTES};
pub use hand::{Hand, HandError, Settled, look};
pub use messages::VERSION;
pub use world::{World, WorldAddress};

use std::io;
use std::path::PathBuf;

/// Why a relay could not begin, or go on.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    #[error("cannot listen on {}", .path.display())]
    Listen {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("another relay serves {}", .path.display())]
    Served { path: PathBuf },
    #[error("cannot use the tap device {name}")]
    Tap {
        name: String,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Image(Box<super::disk::ImageError>),
    #[error("cannot {doing}")]
    Io {
        doing: &'static str,
        #[source]
        source: io::Error,
    },
}

pub(in crate::qemu) fn failed(doing: &'static str) -> impl FnOnce(io::Error) -> RelayError {
    move |source| RelayError::Io { doing, source }
}
