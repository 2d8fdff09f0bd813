//! The kvm VMM in a process of its own, so that the page server's death is not the guest's (P1).
//!
//! One Unix stream socket joins them. The client (the page server's process) asks, the VMM answers; the guest's packets travel
//! on the same socket in order, so that whatever was emitted before "paused" has arrived before it.
//!
//! ```text
//! frame     length u32, body (postcard); a descriptor, where one belongs to it, rides on the length
//! client →  Request { id, ask }   ·   Room (so many packets were taken and there is room for more)
//! VMM    →  Answer { id, result } ·   Packet
//! ```
//!
//! The VMM makes the userfaultfds of its memory, keeps each for as long as it lives and hands out duplicates: when the page
//! server dies, a vCPU that needs a page waits for it; it never reads zeroes. When the socket closes, the VMM shuts the gate, stops
//! the guest and keeps its memory until it is told to end (SIGTERM) or its time to linger is over. Until then the next page server
//! can come in by its [`door`](Estate) and goes on with what the one before it had laid down ([`Kept`]).

pub(crate) mod door;
mod estate;
pub(crate) mod frame;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
#[cfg(test)]
pub(crate) mod golden;
mod keeper;
mod ledger;
mod orphan;
mod outlet;
mod remote;
mod server;

pub use estate::{DoorError, Estate, Waiting, waiting};
pub(crate) use estate::{take_keepers_seat, waiting_of};
pub use keeper::{Keeper, Keeps};
pub use ledger::{Ledger, LedgerError};
pub use remote::{FaultSource, RemoteGuest, VmmFaults};
pub use server::{ServeError, serve};

use super::guests::GuestSpec;
use super::{KvmOptions, Tracking};
use belay_checkpoint::guest::{GuestError, TrackerKind};
use serde::{Deserialize, Serialize};
use std::io;

/// Version of this protocol; both ends come from one build, this catches a mix-up.
const VERSION: u16 = 3;

/// Packets on their way to the client before the guest is held back.
const PACKET_WINDOW: u64 = 64;

#[derive(Debug, Serialize, Deserialize)]
enum FromClient {
    Request {
        id: u64,
        ask: Ask,
    },
    /// This many packets were taken in, and there is room.
    Room {
        packets: u64,
    },
}

#[derive(Debug, Serialize, Deserialize)]
enum FromVmm {
    Answer { id: u64, result: Result<Answer, WireError> },
    Packet { sequence: u64, bytes: Vec<u8> },
}

#[derive(Debug, Serialize, Deserialize)]
enum Ask {
    /// First of all. The RAM file comes with it.
    Setup {
        version: u16,
        spec: GuestSpec,
        options: KvmOptions,
    },
    Boot,
    Pause {
        bound_us: u64,
    },
    Resume,
    Save,
    Load(Vec<u8>),
    SetIncarnation(u64),
    Track(TrackerKind),
    StartTracking,
    /// Make the next harvest ready; the guest runs.
    PrepareHarvest,
    Harvest,
    DirtySoFar,
    DeviceWrites,
    Park(Option<u64>),
    WaitParked {
        bound_us: u64,
    },
    Steps,
    Failure,
    /// A userfaultfd over a part of guest memory; it comes with the answer.
    Userfaultfd {
        features: u64,
        offset: u64,
        len: u64,
        faults: VmmFaults,
        write_protect: bool,
    },
    /// Keep the file that comes with this for whoever is page server next; an earlier one of its kind is forgotten.
    Keep(Kept),
    /// Hold this slot of the page of signs of life that comes with this, until told to exit.
    GiveSign {
        slot: u64,
    },
    /// Let this page server have the seat. First of all, by the door.
    TakeOver {
        version: u16,
    },
    /// The file behind guest memory; it comes with the answer.
    GuestRam,
    /// The userfaultfd that was made as the so-manieth; it comes with the answer.
    UserfaultfdAgain(u64),
    /// What was laid down; it comes with the answer.
    Kept(Kept),
    /// Send all output that has not left, and then what comes.
    Replay,
    /// End the process.
    Exit,
}

/// What a page server lays down with the VMM for its successor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kept {
    /// The state of every page ([`belay_transport::pages`]).
    PageStates,
    /// What else it alone knew; the VMM does not look into it.
    Will,
    /// How far output has left.
    Ledger,
    /// The hand-over socket of the guard process.
    Guard,
}

#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    Done,
    Ready {
        vmm_address: u64,
        tracking: Tracking,
    },
    State(Vec<u8>),
    /// Words of the dirty bitmap that are not zero, by index.
    Dirty(Vec<(u32, u64)>),
    Count(Option<u64>),
    Steps(Vec<u64>),
    Failure(Option<String>),
    Estate {
        pid: u32,
        spec: GuestSpec,
        vmm_address: u64,
        /// Offset and length in guest memory of each userfaultfd, in the order in which they were made.
        uffds: Vec<(u64, u64)>,
        kept: Vec<Kept>,
    },
}

impl Answer {
    /// Its kind, for messages: what an answer holds is the guest's.
    fn kind(&self) -> &'static str {
        match self {
            Self::Done => "Done",
            Self::Ready { .. } => "Ready",
            Self::State(_) => "State",
            Self::Dirty(_) => "Dirty",
            Self::Count(_) => "Count",
            Self::Steps(_) => "Steps",
            Self::Failure(_) => "Failure",
            Self::Estate { .. } => "Estate",
        }
    }
}

/// A [`GuestError`] on its way.
#[derive(Debug, Serialize, Deserialize)]
enum WireError {
    StopTimedOut {
        bound_ms: u64,
        running: u64,
        vcpus: u64,
    },
    WrongState {
        call: String,
        state: String,
        wanted: String,
    },
    Io {
        doing: String,
        errno: Option<i32>,
        text: String,
    },
    BadState(String),
    NoTracker {
        kind: TrackerKind,
        reason: String,
    },
    VmmGone(String),
    Crashed(String),
    Unsupported(String),
    /// The seat is another page server's; `left`: which is on its way out.
    Taken {
        pid: i32,
        left: bool,
    },
}

impl From<GuestError> for WireError {
    fn from(error: GuestError) -> Self {
        match error {
            GuestError::StopTimedOut { bound_ms, running, vcpus } => {
                Self::StopTimedOut { bound_ms, running: running as u64, vcpus: vcpus as u64 }
            }
            GuestError::WrongState { call, state, wanted } => {
                Self::WrongState { call: call.into(), state: state.into(), wanted: wanted.into() }
            }
            GuestError::Io { doing, source } => {
                Self::Io { doing, errno: source.raw_os_error(), text: source.to_string() }
            }
            GuestError::BadState(what) => Self::BadState(what),
            GuestError::Unsupported(what) => Self::Unsupported(what),
            GuestError::NoTracker { kind, reason } => Self::NoTracker { kind, reason },
            GuestError::VmmGone(what) => Self::VmmGone(what),
            GuestError::Crashed(what) => Self::Crashed(what),
        }
    }
}

impl From<WireError> for GuestError {
    fn from(error: WireError) -> Self {
        match error {
            WireError::StopTimedOut { bound_ms, running, vcpus } => {
                Self::StopTimedOut { bound_ms, running: running as usize, vcpus: vcpus as usize }
            }
            WireError::WrongState { call, state, wanted } => {
                Self::WrongState { call: word(&call), state: word(&state), wanted: word(&wanted) }
            }
            WireError::Io { doing, errno, text } => {
                let source = errno.map_or_else(|| io::Error::other(text), io::Error::from_raw_os_error);
                Self::Io { doing: format!("{doing} (in the VMM process)"), source }
            }
            WireError::BadState(what) => Self::BadState(what),
            WireError::Unsupported(what) => Self::Unsupported(what),
            WireError::NoTracker { kind, reason } => Self::NoTracker { kind, reason },
            WireError::VmmGone(what) => Self::VmmGone(what),
            WireError::Crashed(what) => Self::Crashed(what),
            WireError::Taken { pid, .. } => Self::VmmGone(format!("its page server is process {pid}")),
        }
    }
}

/// The words [`GuestError::WrongState`] is made of in this crate, which it holds as constants.
fn word(text: &str) -> &'static str {
    const WORDS: [&str; 11] = [
        "save",
        "load",
        "boot",
        "harvest",
        "start tracking",
        "asking for device writes",
        "wait_parked",
        "running",
        "paused",
        "paused or not told where to park",
        "running and told where to park",
    ];
    WORDS.into_iter().find(|&word| word == text).unwrap_or("(see the VMM)")
}
