//! The `tcp` fabric: one connection a lane, with or without TLS; a thread at the owner answers for its memory.
//!
//! ```text
//!   initiator                                   owner, one thread a lane, asleep in recv
//!   request (32 bytes) ... ────────────────────> checked against the exports
//!   request + data     ... ────────────────────> placed in the ring, then acknowledged
//!   <─────────── response (16 bytes) [+ data] ─  straight from guest memory, several requests an answer
//! ```
//! Responses come in the order of requests. A request that may not be done is answered with a reason, and with that the lane
//! ends. Bytes go from guest memory to the socket and from the socket to their final frame without a copy between (TLS
//! needs its own buffers, which are bounded).
//!
//! *Commit*: the owner's acknowledgement of the trailer, given after placing it. *Revocation*: sockets shut down and the threads
//! joined; what had been acknowledged is in the ring then, and nothing is placed any more. The initiator sees its
//! connections end.

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
#[cfg(test)]
mod golden;
mod lane;
mod owner;
mod pipe;
mod wire;

pub use lane::TcpInitiator;
pub use owner::TcpOwner;
