//! The fabric contract: what a session offers for moving bytes, whatever carries them.
//!
//! ```text
//!   owner (source)                                    initiator (destination)
//!   exports guest RAM read-only  ── fault lanes ──>   demand reads
//!                                ── bulk lanes ───>   background reads
//!   exports the ring for writing <─ checkpoint lanes  writes, and the commit
//! ```
//! One-sided: the owner's code does not take part in a read or a write (`verbs`, `local`); `tcp` emulates it by a thread
//! at the owner. The *owner* dials every lane, because the destination is the side that listens; requests still flow from
//! initiator to owner. Control is not here: it is the session's own stream, so that no kind of traffic waits behind another.
//!
//! Rules every fabric keeps (and `conformance` tests):
//! * Operations of one lane complete in the order in which they were posted. After the first failure the lane is broken:
//!   every later call fails.
//! * A batch is posted whole or not at all, and never beyond the lane's window (P7).
//! * Keys carry rights: a read through a [`WriteKey`] or a write through a [`ReadKey`] does not type-check, and a key forged
//!   by a peer is refused by the owner.
//! * One operation moves 1 to [`MAX_OPERATION_BYTES`] bytes.
//! * [`Lane::commit`] returns only when the fabric's commit rule (below) holds.
//! * After [`Owner::revoke`] has returned, nothing the old initiator does can commit, and where the ring was handed over as a [`StillRing`]
//!   nothing it does can change it.

mod details;
mod exports;
pub mod local;
mod revoked;
pub mod tcp;
pub mod verbs;

pub use details::FabricDetails;
pub use revoked::{RevokedRing, StillRing};

use crate::deadline::Deadline;
use crate::region::{Extent, Mapping, RamFile};
use crate::session::{DestinationSession, SourceSession, own_ip};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

/// Which fabric.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FabricKind {
    /// Shared memory on one host, descriptors passed over a Unix socket.
    Local,
    /// TCP, with or without TLS; a thread at the owner answers.
    Tcp,
    /// RDMA through libibverbs: InfiniBand, RoCE v2, iWARP.
    Verbs,
}

impl FabricKind {
    /// How it is named on the wire.
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::Local => 1,
            Self::Tcp => 2,
            Self::Verbs => 3,
        }
    }

    /// The fabric of a code; a later version may have more.
    pub(crate) fn from_code(code: u8) -> Option<Self> {
        [Self::Local, Self::Tcp, Self::Verbs].into_iter().find(|fabric| fabric.code() == code)
    }
}

impl fmt::Display for FabricKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Local => "local",
            Self::Tcp => "tcp",
            Self::Verbs => "verbs",
        })
    }
}

/// What a lane is for. One lane of each kind a shard; two of `Checkpoint` (records; heartbeat and lease).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum LaneKind {
    /// Demand reads. Nothing else is ever posted here.
    Fault,
    /// Background reads.
    Bulk,
    /// Checkpoint writes, reads of the source-written region, and commits.
    Checkpoint,
}

/// Names one lane of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LaneId {
    pub kind: LaneKind,
    /// 0-based among lanes of its kind.
    pub index: u16,
}

/// Right to read one exported mapping of the owner. Valid for one session.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ReadKey(pub u64);

/// Right to write one exported mapping of the owner. Valid for one session, until revoked.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct WriteKey(pub u64);

/// A key is a right for whoever knows it, so what is shown is its place among the exports.
impl fmt::Debug for ReadKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ReadKey({}, ..)", self.0 & 0xff)
    }
}

/// As of a [`ReadKey`].
impl fmt::Debug for WriteKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WriteKey({}, ..)", self.0 & 0xff)
    }
}

/// Longest read or write.
pub const MAX_OPERATION_BYTES: u32 = 16 << 20;
/// Widest window a lane can have; who asks for more gets this.
pub const MAX_WINDOW: usize = 1024;

/// Where in the owner-written region the owner epoch lies.
pub const OWNER_EPOCH_OFFSET: usize = 0;

/// Keys of the two regions of a checkpoint ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingKeys {
    pub ring: WriteKey,
    pub owner_region: ReadKey,
}

/// A mapping of the initiator made known to its fabric (an lkey, in verbs' words).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LocalKey(pub u32);

/// How far the registration of one mapping with a device is. Told from several threads, in order; only `verbs` registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Registering {
    pub done_bytes: u64,
    pub total_bytes: u64,
    /// Memory regions made of this mapping so far.
    pub regions: u64,
    /// Bytes the session has pinned so far, of every mapping.
    pub pinned_bytes: u64,
    /// Of the total, bytes registered anew because the guest had given their frames up since.
    pub stale_bytes: u64,
}

/// Is told how far a registration is. Must return quickly.
pub type RegistrationObserver = Arc<dyn Fn(Registering) + Send + Sync>;

/// Read `len` bytes of the owner's `remote` at `remote_offset` into the initiator's `local` at `local_offset`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Read {
    /// Chosen by the caller, handed back by [`Lane::poll`].
    pub id: u64,
    pub remote: ReadKey,
    pub remote_offset: u64,
    pub local: LocalKey,
    pub local_offset: u64,
    pub len: u32,
}

/// Write `len` bytes of the initiator's `local` at `local_offset` to the owner's `remote` at `remote_offset`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Write {
    /// Chosen by the caller, handed back by [`Lane::poll`].
    pub id: u64,
    pub remote: WriteKey,
    pub remote_offset: u64,
    pub local: LocalKey,
    pub local_offset: u64,
    pub len: u32,
}

/// The initiator's end of one lane. Used by one thread at a time; no call allocates or takes a lock that another lane holds
/// (TLS, where it is on, manages its own bounded buffers).
pub trait Lane: Send {
    /// Which lane this is.
    fn id(&self) -> LaneId;

    /// Most operations that may be outstanding; may be less than was asked for ([`MAX_WINDOW`], a device's limit).
    fn window(&self) -> usize;

    /// Operations posted and not yet handed back by [`Lane::poll`].
    fn outstanding(&self) -> usize;

    /// Posts a batch of reads, whole or not at all ([`FabricError::WindowFull`]).
    fn post_reads(&mut self, batch: &[Read]) -> Result<(), FabricError>;

    /// Posts a batch of writes, whole or not at all ([`FabricError::WindowFull`]).
    fn post_writes(&mut self, batch: &[Write]) -> Result<(), FabricError>;

    /// Takes what has completed, without waiting: ids in posting order into `done`, their number returned. A read's bytes are
    /// in place when its id comes back.
    fn poll(&mut self, done: &mut [u64]) -> Result<usize, FabricError>;

    /// To be called before sleeping on [`Lane::readiness`]: asks for a wake-up at the next completion. `true`: something has
    /// completed meanwhile, so poll instead of sleeping. Only `verbs` needs it, where a completion makes the descriptor
    /// readable only if it was asked to (ibv_req_notify_cq(3)).
    fn arm(&mut self) -> Result<bool, FabricError> {
        Ok(false)
    }

    /// A descriptor that polls readable when [`Lane::poll`] may have something, for a thread that waits on several things.
    /// `None`: operations complete while they are posted, there is never anything to wait for.
    fn readiness(&self) -> Option<BorrowedFd<'_>>;

    /// Waits until [`Lane::poll`] has something or `deadline` has passed ([`FabricError::TimedOut`]; the lane stays usable).
    /// With nothing outstanding it waits for the lane to break. (A `local` operation completes as it is posted, so a dead
    /// owner shows here and as the end of the control stream, never in a read: the memory outlives its process.)
    fn wait(&mut self, deadline: Deadline) -> Result<(), FabricError>;

    /// Writes `trailer` after everything posted before it and returns once it is a *commit*:
    /// `local`: trailer stored, sequentially consistent fence, owner epoch read again and unchanged;
    /// `tcp`: the owner's thread has acknowledged it after placing it;
    /// `verbs`: the trailer's WRITE has completed, on iWARP a READ of it behind it too.
    /// Completions that were not polled yet are consumed and dropped, those of reads too (their bytes are in place).
    /// [`FabricError::Revoked`] when the owner has taken the session back and the fabric lets the initiator see that (on
    /// `tcp` it sees the connection end); a deadline that passes breaks the lane, because whether the trailer was placed
    /// is then unknown. Any error means: not known to be committed.
    fn commit(&mut self, trailer: &Write, deadline: Deadline) -> Result<(), FabricError>;
}

/// Destination side of a session's data path.
pub trait Initiator: Send {
    /// Which fabric this is.
    fn kind(&self) -> FabricKind;

    /// The device, port and address that the set-up obtained, once the lanes are open; `None` where there are none to tell.
    fn details(&self) -> Option<FabricDetails> {
        None
    }

    /// The NUMA node of the device that carries the session, for who places threads and buffers; `None` where there is no device or
    /// the system does not say.
    fn numa_node(&self) -> Option<u32> {
        None
    }

    /// Tells `observer` how far registrations are, from now on.
    fn observe_registration(&mut self, _observer: RegistrationObserver) {}

    /// Makes a mapping of ours usable as target or origin of operations. Kept until the initiator is dropped.
    fn register_local(&mut self, mapping: &Arc<Mapping>) -> Result<LocalKey, FabricError>;

    /// Opens lane `id` (the owner dials it; this waits for it). All local mappings must be registered before.
    fn open_lane(&mut self, id: LaneId, window: usize, deadline: Deadline) -> Result<Box<dyn Lane>, FabricError>;
}

/// Source side of a session's data path.
pub trait Owner: Send {
    /// Which fabric this is.
    fn kind(&self) -> FabricKind;

    /// As [`Initiator::details`]; known once the initiator has opened its lanes.
    fn details(&self) -> Option<FabricDetails> {
        None
    }

    /// As [`Initiator::numa_node`].
    fn numa_node(&self) -> Option<u32> {
        None
    }

    /// Tells `observer` how far registrations are, from now on.
    fn observe_registration(&mut self, _observer: RegistrationObserver) {}

    /// Exports the extents of `file` that hold data, for reading. Reads elsewhere in the file are refused where the fabric can
    /// tell (`tcp`, `verbs`); `local` maps the file read-only as a whole.
    fn export_read(
        &mut self,
        file: &RamFile,
        mapping: &Arc<Mapping>,
        extents: &[Extent],
    ) -> Result<ReadKey, FabricError>;

    /// Replaces the extents that may be read by `key`: what the guest has populated since is found again at the switch and
    /// offered too. Unlike an export, at any time.
    fn extend_read(&mut self, key: ReadKey, extents: &[Extent]) -> Result<(), FabricError>;

    /// Exports the checkpoint ring for writing, and beside it the region that only the owner writes (folded-up-to, lease
    /// grant, …) for reading. The aligned u64 at [`OWNER_EPOCH_OFFSET`] of `owner_region` is the owner epoch, which revocation
    /// bumps first. Once a session; every export comes before the first [`Owner::serve_lane`].
    fn export_ring(
        &mut self,
        ring: (&RamFile, &Arc<Mapping>),
        owner_region: (&RamFile, &Arc<Mapping>),
    ) -> Result<RingKeys, FabricError>;

    /// Dials and serves lane `id`.
    fn serve_lane(&mut self, id: LaneId, deadline: Deadline) -> Result<(), FabricError>;

    /// Shuts the old initiator out and gives the ring to `last_read`, once, from the instant on
    /// at which nothing can commit any more: whatever has committed is in it. Idempotent: a second call reads nothing.
    /// `tcp`: sockets shut and their threads joined; the ring then stands still. `local`: owner epoch bumped, fence; a stale writer
    /// may still scribble while `last_read` runs, so it judges from private copies; then the file is truncated to nothing, and the
    /// owner's own mapping of it raises SIGBUS too. `verbs`: queue pairs stopped and the ring deregistered before it is read, so it stands
    /// still; guest RAM is deregistered afterwards, in the background. Without a ring nothing is read.
    fn revoke(&mut self, last_read: &mut dyn FnMut(RevokedRing<'_>), deadline: Deadline) -> Result<(), FabricError>;

    /// A descriptor that polls readable once any lane is known to be broken (peer closed or died), or `None` if this fabric
    /// cannot tell.
    fn broken(&self) -> Option<BorrowedFd<'_>>;

    /// What ended the lanes that have ended by themselves, each told once, for the operator (P9); and, for as long as it is so, that this
    /// host's own port is down.
    fn take_failures(&mut self) -> Vec<FabricError>;
}

/// The source's data path of a session, over the fabric that was agreed on.
pub fn owner(session: &SourceSession) -> Result<Box<dyn Owner>, FabricError> {
    let lanes = session.lanes.clone();
    Ok(match session.agreed.fabric {
        FabricKind::Local => Box::new(local::LocalOwner::new(lanes)?),
        FabricKind::Tcp => Box::new(tcp::TcpOwner::new(lanes)?),
        FabricKind::Verbs => Box::new(verbs::VerbsOwner::new(lanes, own_ip(&*session.control))?),
    })
}

/// The destination's data path of a session, over the fabric that was agreed on.
pub fn initiator(session: &DestinationSession) -> Result<Box<dyn Initiator>, FabricError> {
    let lanes = session.lanes.clone();
    Ok(match session.agreed.fabric {
        FabricKind::Local => Box::new(local::LocalInitiator::new(lanes)),
        FabricKind::Tcp => Box::new(tcp::TcpInitiator::new(lanes)),
        FabricKind::Verbs => Box::new(verbs::VerbsInitiator::new(lanes, own_ip(&*session.control))?),
    })
}

/// Why a fabric operation failed.
#[derive(Debug, thiserror::Error)]
pub enum FabricError {
    #[error("{asked} operations posted with {outstanding} outstanding on a lane whose window is {window}")]
    WindowFull { asked: usize, outstanding: usize, window: usize },
    #[error("the owner has revoked this session (its owner epoch went from {was} to {is})")]
    Revoked { was: u64, is: u64 },
    #[error("the peer closed lane {lane:?}")]
    PeerClosed { lane: LaneId },
    #[error("the owner refused operation {id} on lane {lane:?}: {reason}")]
    Refused { lane: LaneId, id: u64, reason: RefusedReason },
    #[error("nothing completed on lane {lane:?} within {bound:?}")]
    TimedOut { lane: LaneId, bound: Duration },
    #[error("lane {lane:?} is broken by an earlier failure")]
    Broken { lane: LaneId },
    #[error("bytes {offset}+{len} are outside a registered mapping of {size} bytes")]
    OutOfRange { offset: u64, len: u64, size: u64 },
    #[error("an operation of {len} bytes; it must be 1 to {limit}")]
    BadLength { len: u32, limit: u32 },
    #[error("{what} after the first lane was opened")]
    TooLate { what: &'static str },
    #[error("local memory {key:?} is mapped read-only, nothing can be read into it")]
    ReadOnly { key: LocalKey },
    #[error("more than {limit} exports in one session")]
    TooManyExports { limit: usize },
    #[error("{what}: key {key:#x} is not registered in this session")]
    UnknownKey { what: &'static str, key: u64 },
    #[error("lane {lane:?}: the peer broke the protocol: {what}")]
    Protocol { lane: LaneId, what: String },
    #[error("the fabric {fabric} cannot be used: {why}")]
    Unavailable { fabric: FabricKind, why: String },
    #[error("{doing}")]
    Io {
        doing: String,
        #[source]
        source: std::io::Error,
    },
    #[error(transparent)]
    Session(#[from] crate::session::SessionError),
    #[error(transparent)]
    Verbs(#[from] verbs::VerbsError),
}

/// Why an owner would not do what an initiator asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum RefusedReason {
    #[error("no such key in this session")]
    UnknownKey,
    #[error("the key does not carry that right")]
    NoRight,
    #[error("the range is outside what was exported")]
    OutOfRange,
    #[error("the length is zero or above the limit")]
    BadLength,
    #[error("the session has been revoked")]
    Revoked,
    /// A device refuses without saying why.
    #[error(
        "its device refused the access (the key was revoked or its process has ended; else key, right or range are wrong)"
    )]
    ByDevice,
}

/// Adds a mapping to an initiator's table.
fn register(locals: &mut Vec<Arc<Mapping>>, too_late: bool, mapping: &Arc<Mapping>) -> Result<LocalKey, FabricError> {
    if too_late {
        return Err(FabricError::TooLate { what: "local memory registered" });
    }
    let key =
        LocalKey(u32::try_from(locals.len()).map_err(|_| FabricError::TooManyExports { limit: u32::MAX as usize })?);
    locals.push(Arc::clone(mapping));
    Ok(key)
}

/// Checks an operation's length, and that it lies within `mapping`.
fn check_range(mapping: &Mapping, offset: u64, len: u32) -> Result<(), FabricError> {
    if len == 0 || len > MAX_OPERATION_BYTES {
        return Err(FabricError::BadLength { len, limit: MAX_OPERATION_BYTES });
    }
    let size = mapping.len() as u64;
    match offset.checked_add(u64::from(len)) {
        Some(end) if end <= size => Ok(()),
        _ => Err(FabricError::OutOfRange { offset, len: u64::from(len), size }),
    }
}

/// The local side of an operation, checked.
fn local(locals: &[Arc<Mapping>], key: LocalKey, offset: u64, len: u32) -> Result<&Mapping, FabricError> {
    let mapping = locals.get(key.0 as usize);
    let mapping = mapping.ok_or(FabricError::UnknownKey { what: "local memory", key: u64::from(key.0) })?;
    check_range(mapping, offset, len)?;
    Ok(mapping)
}

/// As [`local`], for an operation that writes there.
fn local_writable(locals: &[Arc<Mapping>], key: LocalKey, offset: u64, len: u32) -> Result<&Mapping, FabricError> {
    let mapping = local(locals, key, offset, len)?;
    if mapping.is_writable() { Ok(mapping) } else { Err(FabricError::ReadOnly { key }) }
}
