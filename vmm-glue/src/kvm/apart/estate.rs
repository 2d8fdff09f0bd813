//! The new page server's side of a VMM's door: what a dead page server has left behind.

use super::{Answer, Ask, FromClient, FromVmm, Kept, VERSION, WireError, door, frame};
use crate::kvm::guests::GuestSpec;
use belay_checkpoint::guest::GuestError;
use belay_transport::Deadline;
use belay_transport::region::{RamFile, RegionError};
use belay_transport::uffd::{Uffd, UffdError};
use rustix::net::sockopt::socket_peercred;
use rustix::process::{PidfdFlags, pidfd_open};
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How often a seat whose last holder is still being torn down is asked for again.
const LOOK: Duration = Duration::from_millis(20);

/// Why nothing could be taken over.
#[derive(Debug, thiserror::Error)]
pub enum DoorError {
    #[error("no VMM answers at {path}")]
    Closed {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the VMM at {path} belongs to uid {uid}, this process to uid {own}")]
    Foreign { path: PathBuf, uid: u32, own: u32 },
    #[error("the VMM's page server is process {pid}, which has not ended")]
    Taken { pid: i32 },
    #[error("the VMM's page server was process {pid}; it closed its socket but had not ended within {bound:?}")]
    NotEnded { pid: i32, bound: Duration },
    #[error("the VMM at {path} refused")]
    Refused {
        path: PathBuf,
        #[source]
        source: GuestError,
    },
    #[error("the VMM answered {got} where {wanted} was due")]
    Unexpected { got: &'static str, wanted: &'static str },
    #[error("the socket to the VMM")]
    Socket(#[source] io::Error),
    #[error("the file behind guest memory")]
    Ram(#[source] RegionError),
    #[error("a userfaultfd of the VMM")]
    Uffd(#[source] UffdError),
}

/// A door, and the process behind it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    pub path: PathBuf,
    pub pid: i32,
}

/// The doors of VMMs in `directory`, by process number. Those of VMMs that have ended are removed.
pub fn waiting(directory: &Path) -> io::Result<Vec<Waiting>> {
    waiting_of(directory, door::VMM)
}

/// As [`waiting`], of another kind's.
pub(crate) fn waiting_of(directory: &Path, kind: &str) -> io::Result<Vec<Waiting>> {
    let mut all = Vec::new();
    let entries = match std::fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(all),
        entries => entries?,
    };
    for path in entries.flatten().map(|entry| entry.path()) {
        let Some(pid) = door::process_of(&path, kind) else { continue };
        match rustix::process::test_kill_process(pid) {
            Err(rustix::io::Errno::SRCH) => drop(std::fs::remove_file(&path)),
            // One of another user's is told of when it is asked for.
            _ => all.push(Waiting { path, pid: pid.as_raw_nonzero().get() }),
        }
    }
    all.sort_by_key(|waiting| waiting.pid);
    Ok(all)
}

/// What there is to be taken over. Dropping it gives the seat back once this process has ended.
pub struct Estate {
    pub(super) stream: UnixStream,
    pub(super) last_id: u64,
    /// The VMM's process, and proof of its end.
    pub pid: u32,
    pub(super) pidfd: OwnedFd,
    pub spec: GuestSpec,
    /// Of guest memory, in the VMM's address space.
    pub vmm_address: u64,
    pub ram: RamFile,
    /// The userfaultfds, with the bytes of guest memory each reports faults of.
    pub uffds: Vec<(Uffd, Range<u64>)>,
    kept: Vec<(Kept, OwnedFd)>,
}

impl Estate {
    /// Takes the seat of the VMM behind `door`, waiting until `deadline` for a predecessor that is still being torn down, and fetches
    /// everything it left.
    pub fn enter(door: &Path, deadline: Deadline) -> Result<Self, DoorError> {
        let (stream, pidfd, answer) = take_seat(door, deadline)?;
        let Answer::Estate { pid, spec, vmm_address, uffds, kept } = answer else {
            return Err(DoorError::Unexpected { got: answer.kind(), wanted: "Estate" });
        };
        let mut asking = Asking { stream, last_id: FIRST, deadline };
        let ram = RamFile::from_fd(asking.descriptor(door, Ask::GuestRam)?).map_err(DoorError::Ram)?;
        let mut parts = Vec::new();
        for (index, (offset, len)) in uffds.into_iter().enumerate() {
            let fd = asking.descriptor(door, Ask::UserfaultfdAgain(index as u64))?;
            parts.push((Uffd::from_fd(fd).map_err(DoorError::Uffd)?, offset..offset + len));
        }
        let mut files = Vec::new();
        for what in kept {
            files.push((what, asking.descriptor(door, Ask::Kept(what))?));
        }
        let Asking { stream, last_id, .. } = asking;
        stream.set_read_timeout(None).map_err(DoorError::Socket)?;
        Ok(Self { stream, last_id, pid, pidfd, spec, vmm_address, ram, uffds: parts, kept: files })
    }

    /// What was laid down of this kind, once.
    pub fn take(&mut self, what: Kept) -> Option<OwnedFd> {
        let at = self.kept.iter().position(|(kept, _)| *kept == what)?;
        Some(self.kept.swap_remove(at).1)
    }
}

/// The number of the request for a seat.
const FIRST: u64 = 1;

/// Takes the seat of somebody who keeps a VMM that knows nothing of belay (see [`Caller::welcome`](door::Caller)).
pub(crate) fn take_keepers_seat(door: &Path, deadline: Deadline) -> Result<UnixStream, DoorError> {
    match take_seat(door, deadline)? {
        (stream, _, Answer::Done) => Ok(stream),
        (_, _, other) => Err(DoorError::Unexpected { got: other.kind(), wanted: "Done" }),
    }
}

/// Takes the seat behind `door`, waiting until `deadline` for a predecessor that is still being torn down: the socket, whoever has the door,
/// and what it answered.
fn take_seat(door: &Path, deadline: Deadline) -> Result<(UnixStream, OwnedFd, Answer), DoorError> {
    let bound = deadline.left();
    loop {
        match knock(door, deadline) {
            Err(DoorError::NotEnded { .. }) if deadline.left() > LOOK => std::thread::sleep(LOOK),
            Err(DoorError::NotEnded { pid, .. }) => return Err(DoorError::NotEnded { pid, bound }),
            entered => return entered,
        }
    }
}

fn knock(door: &Path, deadline: Deadline) -> Result<(UnixStream, OwnedFd, Answer), DoorError> {
    let closed = |source| DoorError::Closed { path: door.to_owned(), source };
    let stream = UnixStream::connect(door).map_err(closed)?;
    let (peer, own) = (socket_peercred(&stream).map_err(|errno| closed(errno.into()))?, rustix::process::geteuid());
    if peer.uid != own && !peer.uid.is_root() {
        return Err(DoorError::Foreign { path: door.to_owned(), uid: peer.uid.as_raw(), own: own.as_raw() });
    }
    let pidfd = pidfd_open(peer.pid, PidfdFlags::empty()).map_err(|errno| closed(errno.into()))?;
    stream.set_write_timeout(Some(deadline.left().max(LOOK))).map_err(DoorError::Socket)?;
    let mut asking = Asking { stream, last_id: FIRST - 1, deadline };
    match asking.ask(Ask::TakeOver { version: VERSION })? {
        (Ok(answer), _) => Ok((asking.stream, pidfd, answer)),
        (Err(WireError::Taken { pid, left: false }), _) => Err(DoorError::Taken { pid }),
        (Err(WireError::Taken { pid, left: true }), _) => Err(DoorError::NotEnded { pid, bound: Duration::ZERO }),
        (Err(error), _) => Err(DoorError::Refused { path: door.to_owned(), source: error.into() }),
    }
}

/// Asks one thing after the other; nobody else speaks on the socket yet.
struct Asking {
    stream: UnixStream,
    last_id: u64,
    deadline: Deadline,
}

impl Asking {
    fn ask(&mut self, ask: Ask) -> Result<(Result<Answer, WireError>, Option<OwnedFd>), DoorError> {
        self.last_id += 1;
        let request = FromClient::Request { id: self.last_id, ask };
        frame::send(&self.stream, &request, None).map_err(DoorError::Socket)?;
        match frame::receive_within(&self.stream, 1 << 20, Some(self.deadline)).map_err(DoorError::Socket)? {
            Some((FromVmm::Answer { id, result }, fd)) if id == self.last_id => Ok((result, fd)),
            Some(_) => Err(DoorError::Unexpected { got: "something else", wanted: "an answer" }),
            None => Err(DoorError::Socket(io::ErrorKind::UnexpectedEof.into())),
        }
    }

    fn descriptor(&mut self, door: &Path, ask: Ask) -> Result<OwnedFd, DoorError> {
        match self.ask(ask)? {
            (Ok(Answer::Done), Some(fd)) => Ok(fd),
            (Ok(other), _) => Err(DoorError::Unexpected { got: other.kind(), wanted: "a descriptor" }),
            (Err(error), _) => Err(DoorError::Refused { path: door.to_owned(), source: error.into() }),
        }
    }
}
