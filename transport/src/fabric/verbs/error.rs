//! What can go wrong with RDMA, each with what to do next.

use crate::fabric::LaneId;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Why RDMA cannot be used, or has failed.
#[derive(Debug, thiserror::Error)]
pub enum VerbsError {
    #[error(transparent)]
    Library(#[from] belay_verbs_sys::LoadError),
    #[error(
        "RDMA carries guest memory in clear: say --trusted-fabric if nobody else reads or forges packets on its network, or use --fabric tcp"
    )]
    NotTrusted,
    #[error(
        "without TLS nothing proves beyond this host who connects a queue pair: give both sides certificates (belay keygen), or use --fabric tcp"
    )]
    Unbound,
    #[error("there is no RDMA device on this host (nothing in {}): load its driver, or use --fabric tcp", looked_in.display())]
    NoDevice { looked_in: PathBuf },
    #[error("there is no RDMA device {device}; this host has {have:?}: choose one with --ib-dev")]
    NoSuchDevice { device: String, have: Vec<String> },
    #[error("the RDMA device {device} has no port {port}; it has {have:?}: choose one with --ib-port")]
    NoSuchPort { device: String, port: u8, have: Vec<u8> },
    #[error("port {port} of the RDMA device {device} is {state}: look at the cable, the switch and `rdma link`")]
    PortNotActive { device: String, port: u8, state: String },
    #[error("several RDMA devices have an active port ({have:?}): choose one with --ib-dev")]
    SeveralDevices { have: Vec<String> },
    #[error(
        "GID index {index} of port {port} of {device} is empty: choose one that `ibv_devinfo -v` shows, or leave --gid-index away"
    )]
    NoSuchGid { device: String, port: u8, index: u16 },
    #[error(
        "port {port} of the RDMA device {device} has no IP address: give its network interface one (rdma_cm finds a device by address)"
    )]
    NoAddress { device: String, port: u8 },
    #[error(
        "{address} was to be an address of {asked}, but rdma_cm finds {got} behind it: look at the interface's addresses"
    )]
    OtherDevice { address: IpAddr, asked: String, got: String },
    #[error(
        "the connection got GID index {got} ({got_type}) where {asked} was asked for: rdma_cm takes the port's default RoCE version (cma_roce_mode, or configfs rdma_cm/*/default_roce_mode); change that or --gid-index"
    )]
    OtherGid { asked: u16, got: u16, got_type: String },
    #[error("{call} failed while {doing}{}", advice(call, source))]
    Call {
        call: &'static str,
        doing: String,
        #[source]
        source: io::Error,
    },
    #[error(
        "lane {lane:?}: the peer answered nothing to rdma_cm's {step} within {bound:?}: is its RDMA address reachable from here (rping), on UDP port 4791 for RoCE?"
    )]
    NoAnswer { lane: LaneId, step: &'static str, bound: Duration },
    #[error(
        "lane {lane:?}: rdma_cm's {step} ended in {event} (status {status}): look at both hosts' addresses, routes and `rdma link`"
    )]
    NotConnected { lane: LaneId, step: &'static str, event: String, status: i32 },
    #[error("lane {lane:?}: the owner refused the connection: {reason}")]
    LaneRefused { lane: LaneId, reason: RefusedLane },
    #[error(
        "lane {lane:?}: who accepted the connection does not know this session's key: somebody else listens at that address"
    )]
    WrongProof { lane: LaneId },
    #[error("lane {lane:?} was asked for twice: a lane's queue pair connects once a session")]
    LaneTwice { lane: LaneId },
    #[error(
        "the peer's table of exports is not valid: {what}: the peer is faulty or another version, end the migration"
    )]
    BadTable { what: String },
    #[error(
        "the peer has not acknowledged the new table of exports within {bound:?}: it hangs, or the control network is too slow"
    )]
    NotAcknowledged { bound: Duration },
    #[error(
        "lane {lane:?}: nothing came back from the peer in any of {tries} tries of {each:?} each (about {bound:?}; a device may take up to four times that): it is off, or the network between is cut or drops RDMA"
    )]
    Unreachable { lane: LaneId, tries: u32, each: Duration, bound: Duration },
    #[error("lane {lane:?}: the peer's queue pair was not ready in any of its tries: it is overloaded or faulty")]
    ReceiverNotReady { lane: LaneId },
    #[error(
        "lane {lane:?}: this host's device refused local memory for operation {id} (vendor error {vendor:#x}): a defect of belay, please report it"
    )]
    LocalProtection { lane: LaneId, id: u64, vendor: u32 },
    #[error(
        "lane {lane:?}: this host's device could not send operation {id} (vendor error {vendor:#x}): has it still an address and a route to the peer (`ip route get`)? If so this is a defect of belay or of the driver, please report it"
    )]
    NotSent { lane: LaneId, id: u64, vendor: u32 },
    #[error(
        "lane {lane:?}: operation {id} failed with status {status} ({name}, vendor error {vendor:#x}): see the driver's log (dmesg)"
    )]
    Completion { lane: LaneId, id: u64, status: u32, name: &'static str, vendor: u32 },
    #[error("lane {lane:?}: its queue pair was flushed for a reason that nobody told: see the driver's log (dmesg)")]
    Flushed { lane: LaneId },
    #[error("lane {lane:?}: its completion queue overran: a defect of belay or of the driver, please report it")]
    CompletionQueue { lane: LaneId },
    #[error("lane {lane:?}: its queue pair failed in the device: see the driver's log (dmesg)")]
    QueuePair { lane: LaneId },
    #[error("the RDMA device {device} was removed or has failed: see the driver's log (dmesg)")]
    DeviceLost { device: String },
    #[error(
        "port {port} of the RDMA device {device} went down, and lane {lane:?} with it: look at the cable, the switch and `ip link`"
    )]
    PortDown { lane: LaneId, device: String, port: u8 },
    #[error("port {port} of the RDMA device {device} is down: look at the cable, the switch and `ip link`")]
    OwnPortDown { device: String, port: u8 },
    #[error(
        "lane {lane:?}: its queue pair neither went to its error state nor was destroyed within {bound:?}, so the peer may still use it: see the driver's log (dmesg), reset the device"
    )]
    NotStopped { lane: LaneId, bound: Duration },
    #[error(
        "the ring is still registered after {bound:?}, so the peer may still write to it: see the driver's log (dmesg), reset the device"
    )]
    StillRegistered { bound: Duration },
    #[error("a request to connect a queue pair was refused: {reason}")]
    RefusedRequest { reason: RefusedLane },
    #[error(transparent)]
    Registration(#[from] super::registration::RegistrationError),
}

/// What to do about the errors that people meet most.
fn advice(call: &str, source: &io::Error) -> &'static str {
    match (call, source.raw_os_error()) {
        ("ibv_reg_mr", Some(libc::ENOMEM | libc::EAGAIN)) => {
            " (locked memory: raise RLIMIT_MEMLOCK with `ulimit -l unlimited` or LimitMEMLOCK=infinity)"
        }
        (_, Some(libc::ENOMEM)) => {
            " (the device or the locked-memory limit is exhausted: `ulimit -l`, `rdma resource`)"
        }
        ("rdma_create_event_channel", Some(libc::ENODEV | libc::ENOENT)) => " (load the module rdma_ucm)",
        (_, Some(libc::EACCES | libc::EPERM)) => " (give this user access to /dev/infiniband)",
        ("rdma_bind_addr", Some(libc::ENODEV | libc::EADDRNOTAVAIL)) => {
            " (no RDMA device stands behind that address: see `rdma link` and `ip address`)"
        }
        _ => "",
    }
}

impl VerbsError {
    /// For the failure that errno tells.
    pub(super) fn last(call: &'static str, doing: impl Into<String>) -> Self {
        Self::Call { call, doing: doing.into(), source: io::Error::last_os_error() }
    }

    /// For a function that returns its errno.
    pub(super) fn returned(call: &'static str, doing: impl Into<String>, errno: i32) -> Self {
        Self::Call { call, doing: doing.into(), source: io::Error::from_raw_os_error(errno) }
    }
}

/// Why an owner does not accept a lane's connection. One byte on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[repr(u8)]
pub enum RefusedLane {
    #[error("the request is not one of this protocol's: both sides must be the same belay version")]
    Malformed = 1,
    #[error("it does not prove that it belongs to this session")]
    WrongProof = 2,
    #[error("that lane was connected before")]
    Twice = 3,
    #[error("the owner serves no such lane")]
    NotServed = 4,
    #[error("the session was revoked")]
    Revoked = 5,
    #[error("too many requests wait")]
    Busy = 6,
}

impl RefusedLane {
    const ALL: [Self; 6] = [Self::Malformed, Self::WrongProof, Self::Twice, Self::NotServed, Self::Revoked, Self::Busy];

    /// What a peer's byte says.
    pub(super) fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| *reason as u8 == byte)
    }
}
