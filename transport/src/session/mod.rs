//! Sessions: how two hosts meet, prove who they are, agree on a version and a fabric, and open the connections that carry it.
//!
//! The *destination* listens on one address and the *source* dials everything:
//! ```text
//!   source                                               destination (one listening socket, one acceptor thread)
//!   ── control ─ preamble ─────────────────────────────>  plaintext, 64 bytes: magic, kind, session id
//!   <───────────────────────── answer ──────────────────  plaintext, 16 bytes: go on, or why not
//!   <═══════════ TLS 1.3, pinned certificates ══════════>  (TCP unless `Insecure`; a Unix socket checks uids instead)
//!   ── Hello: versions, fabrics, geometry, token, blob ─>  handed up as `Incoming`; the layer above judges it
//!   <───────── Reply: version, fabric, blob | refused ──
//!   ── lane ──── preamble, answer, TLS, token ─────────>  waits in the session until `LaneAcceptor::take`
//!   ── guard ─── preamble with proof, answer ──────────>  stays plain: its descriptor goes to another process
//! ```
//! Whatever an unauthenticated peer does costs a bounded number of connections for a bounded time and never keeps the
//! acceptor from others. A closed connection is a failure ([`SessionError::PeerClosed`]), never an end that was meant (P6).

mod address;
mod binding;
mod control;
mod dial;
mod fabrics;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
#[cfg(test)]
mod golden;
mod hello;
mod listen;
mod pending;
mod preamble;
mod socket;
mod stream;
mod tls;

pub use address::Address;
pub use binding::BindingKey;
pub use control::Control;
pub use dial::{LaneDialer, SourceSession, connect};
pub use fabrics::{NoVerbs, WithoutVerbs};
pub use hello::{Agreed, Hello, MAX_BLOB_BYTES, Offer, PROTOCOL, RegionGeometry, Role, VersionRange};
pub use listen::{DestinationSession, Incoming, LaneAcceptor, Listener, Rejection};
pub use preamble::SessionId;
pub use stream::LaneStream;
pub use tls::{Credentials, KeyPair, keygen, keygen_valid};

pub(crate) use dial::random;
pub(crate) use socket::{own_ip, timespec, wait_for};
pub(crate) use stream::{Raw, pull_tls, push_tls};

use crate::fabric::verbs::VerbsSettings;
use crate::fabric::{FabricKind, LaneId};
use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Who may be on the other end of a TCP connection.
#[derive(Debug, Clone)]
pub enum Security {
    /// TLS 1.3; each side knows the other's certificate and accepts no other.
    Tls(Credentials),
    /// Plaintext to anywhere, because the operator said so.
    Insecure,
    /// Plaintext, and only loopback addresses.
    LoopbackOnly,
}

impl Security {
    /// `error` with the certificate named that it is about, where it is about a validity period.
    fn naming(&self, error: SessionError) -> SessionError {
        match self {
            Self::Tls(credentials) => credentials.naming(error),
            Self::Insecure | Self::LoopbackOnly => error,
        }
    }
}

/// What a session is allowed to use and how long it waits.
#[derive(Debug, Clone)]
pub struct SessionConfig {
    /// For TCP; a Unix socket checks the peer's uid instead.
    pub security: Security,
    /// Longest control frame, sent or received.
    pub max_frame_bytes: usize,
    /// Kernel pacing (SO_MAX_PACING_RATE) of what this side sends, for each connection by itself.
    pub pace_bytes_per_s: Option<u64>,
    /// A TCP peer that is silent (no acknowledgement, no keepalive answer) for this long is taken to be gone; 2 s or more.
    /// So is one that leaves what it was sent unread in a full socket buffer for as long.
    pub peer_silence: Duration,
    /// Bound of one connection's way from accept to its hello or token.
    pub handshake_bound: Duration,
    /// Connections that may be in their handshake at once; when there are more, the oldest unauthenticated one goes.
    pub max_pending: usize,
    /// Protocol versions this side speaks.
    pub versions: VersionRange,
    /// RDMA, if this host has a device for it: without it, TCP addresses have the fabric `tcp` alone. Offered only where the
    /// operator trusts the network and the session has a [`BindingKey`].
    pub verbs: Option<VerbsSettings>,
    /// Why `verbs` is `None`, where it would have been wanted: told to both operators.
    pub no_verbs: Option<NoVerbs>,
    /// The only fabric to be used; any that the address allows, best first, without one.
    pub only: Option<FabricKind>,
}

impl SessionConfig {
    /// Defaults: frames of 64 MiB, no pacing, 5 s of silence, 5 s and 64 connections of handshakes.
    pub fn new(security: Security) -> Self {
        Self {
            security,
            max_frame_bytes: 64 << 20,
            pace_bytes_per_s: None,
            peer_silence: Duration::from_secs(5),
            handshake_bound: Duration::from_secs(5),
            max_pending: 64,
            versions: PROTOCOL,
            verbs: None,
            no_verbs: None,
            only: None,
        }
    }
}

/// Why a session could not be made or has ended.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    #[error("{address:?} is not an address ({why}); write HOST:PORT or unix:/path")]
    BadAddress { address: String, why: &'static str },
    #[error("{address} does not resolve to an IP address")]
    Resolve {
        address: String,
        #[source]
        source: io::Error,
    },
    #[error("{address} is not a loopback address, so it needs certificates on both sides or an explicit --insecure")]
    NotLoopback { address: String },
    #[error("the process at the other end of {address} runs as uid {peer}; only uid {own} or root may be there")]
    ForeignUid { address: String, peer: u32, own: u32 },
    #[error("the peer closed the connection while {doing}")]
    PeerClosed { doing: &'static str },
    #[error("{doing}: not done within {bound:?}")]
    TimedOut { doing: &'static str, bound: Duration },
    #[error("the control stream has ended before: {first}")]
    Broken { first: String },
    #[error("there is no session with the peer any more")]
    NoSession,
    #[error("a frame of {bytes} bytes is longer than the limit of {limit}")]
    FrameTooLarge { bytes: u64, limit: usize },
    #[error("the peer does not keep the protocol: {what}")]
    Protocol { what: String },
    #[error("the peer speaks preamble version {theirs}, this side {ours}")]
    PreambleVersion { ours: u16, theirs: u16 },
    #[error("this side was started for {ours}, the other side for something else; both must be the same")]
    SecurityMismatch { ours: &'static str },
    #[error("no common protocol version: this side speaks {ours}, the peer {theirs}")]
    Versions { ours: VersionRange, theirs: VersionRange },
    /// The codes are those of the hello; some of the peer's may be of a later version.
    #[error(
        "no common fabric: this host would use {}, the peer {}{}",
        fabrics::named(ours),
        fabrics::named(theirs),
        because(why)
    )]
    NoCommonFabric { ours: Vec<u8>, theirs: Vec<u8>, why: Option<WithoutVerbs> },
    #[error("the fabric {fabric} does not run over {address}: local takes unix:/path, tcp and verbs take HOST:PORT")]
    FabricOverAddress { fabric: FabricKind, address: String },
    #[error("the fabric verbs cannot be used: {why}")]
    NoVerbs { why: NoVerbs },
    #[error("the peer refused the session: {reason}")]
    Refused { reason: String },
    #[error("the listener has too many connections waiting")]
    Busy,
    #[error("the peer knows no session {session}")]
    NoSuchSession { session: SessionId },
    #[error("the peer refused lane {lane:?}: {why}")]
    LaneRefused { lane: LaneId, why: &'static str },
    #[error("{what} is {bytes} bytes (or entries) long, the limit is {limit}")]
    TooLong { what: &'static str, bytes: usize, limit: usize },
    #[error("TLS: {doing}")]
    Tls {
        doing: &'static str,
        #[source]
        source: rustls::Error,
    },
    #[error("{}: {what}", path.display())]
    Credentials { path: PathBuf, what: String },
    /// A certificate, outside its validity period.
    #[error("{}: {what}", path.display())]
    NotValidNow { path: PathBuf, what: String },
    #[error("{doing}")]
    Io {
        doing: String,
        #[source]
        source: io::Error,
    },
}

fn because(why: &Option<WithoutVerbs>) -> String {
    why.as_ref().map_or_else(String::new, |why| format!("; {why}"))
}

impl SessionError {
    /// Sorts an I/O error: what means that the peer is gone, what TLS said, and the rest.
    pub(crate) fn from_io(doing: &'static str, error: io::Error) -> Self {
        use io::ErrorKind as Kind;
        match error.kind() {
            Kind::ConnectionReset | Kind::BrokenPipe | Kind::UnexpectedEof | Kind::ConnectionAborted => {
                Self::PeerClosed { doing }
            }
            _ => match error.downcast::<rustls::Error>() {
                Ok(source) => Self::Tls { doing, source },
                Err(source) => Self::Io { doing: doing.to_owned(), source },
            },
        }
    }
}
