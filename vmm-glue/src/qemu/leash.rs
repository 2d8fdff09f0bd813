//! A small process beside a QEMU whose guest is not its own: a destination's while its source may still catch it, a standby that nothing was
//! loaded into. It ends the QEMU when belay dies; or keeps it for the next page server, where it was told what that one needs.
//!
//! ```text
//! page server                     leash (a pidfd, one end of a socket pair)
//!   Keep(what) + descriptor ───▶  keeps it; with the will a door is opened beside it
//!   LetGo                   ───▶  the QEMU is its own: the leash goes
//!   End                     ───▶  SIGKILL through the pidfd
//!   GiveSign(slot) + page   ───▶  gives the sign of life that QEMU cannot: it ends after QEMU has, so its end is proof of QEMU's
//!   ✗ (the socket closes)         nothing to go on with: SIGKILL. Else SIGSTOP, so that nothing of the guest runs that nobody answers for; whoever comes
//!                                 by the door has the seat, and everything that was kept; nobody within the time: SIGKILL
//! ```
//! Rules of this room:
//! * What is killed or stopped is meant by a pidfd: no other process can be.
//! * Both ends are of one build: the door's version stands for this protocol too.
//! * The leash looks into nothing that it keeps, knows no secret of its own, and answers one page server at a time
//!   ([`door`](crate::kvm::apart)).

use super::process::Process;
use crate::guard::GuardCommand;
use crate::kvm::apart::{Keeper, Keeps, Kept, frame};
use belay_checkpoint::guest::GuestError;
use belay_transport::Deadline;
use rustix::io::Errno;
use rustix::process::test_kill_process;
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Longest that a leash may take to answer. It does nothing but keep.
const ANSWER: Duration = Duration::from_secs(5);
/// Longest answer.
const ANSWER_BYTES: usize = 64 << 10;

/// A descriptor that is kept for the next page server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum What {
    /// As a VMM apart keeps it.
    Kept(Kept),
    /// A pidfd of the QEMU.
    Process,
    /// A file of its RAM, in the order of the proposal's regions.
    Ram(u16),
    /// One of its userfaultfds, in the order of the shards.
    Userfaultfd(u16),
}

/// What else the next page server must know of the QEMU.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Holding {
    pub pid: u32,
    pub monitor: PathBuf,
    /// Its monitor and log lie there; removed when it is ended, because belay has made it.
    pub made: Option<PathBuf>,
    /// Of each region of RAM in it.
    pub addresses: Vec<u64>,
    /// Where the door is.
    pub doors: PathBuf,
    /// How long it is kept without a page server.
    pub linger: Duration,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Ask {
    Hold(Holding),
    Keep(What),
    Describe,
    Give(What),
    /// Hold this slot of the page of signs of life that comes with this.
    GiveSign(u64),
    LetGo,
    End,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Answer {
    Done,
    Described { holding: Holding, kept: Vec<What> },
    Refused(String),
}

/// The way to a leash.
#[derive(Debug)]
pub(super) struct Line(Mutex<UnixStream>);

impl Line {
    pub(super) fn over(stream: UnixStream) -> io::Result<Arc<Self>> {
        stream.set_write_timeout(Some(ANSWER))?;
        Ok(Arc::new(Self(Mutex::new(stream))))
    }

    /// Asks one thing, and has the answer.
    pub(super) fn ask(&self, ask: &Ask, fd: Option<BorrowedFd<'_>>) -> io::Result<(Answer, Option<OwnedFd>)> {
        let stream = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        frame::send(&stream, ask, fd)?;
        match frame::receive_within(&stream, ANSWER_BYTES, Some(Deadline::after(ANSWER)))? {
            Some((Answer::Refused(why), _)) => Err(io::Error::other(why)),
            Some(answered) => Ok(answered),
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    fn done(&self, ask: &Ask, fd: Option<BorrowedFd<'_>>) -> Result<(), GuestError> {
        let asked = self.ask(ask, fd).map(drop);
        asked.map_err(|source| GuestError::Io { doing: "lay something down with QEMU's leash".to_owned(), source })
    }
}

impl Keeps for Arc<Line> {
    fn keep(&self, what: Kept, file: BorrowedFd<'_>) -> Result<(), GuestError> {
        self.done(&Ask::Keep(What::Kept(what)), Some(file))
    }

    fn give_sign(&self, page: BorrowedFd<'_>, slot: usize) -> Result<bool, GuestError> {
        self.done(&Ask::GiveSign(slot as u64), Some(page)).map(|()| true)
    }
}

/// Held by belay. Dropped, the QEMU is ended.
#[derive(Debug)]
pub struct Leash {
    /// `None`: another page server has started it.
    child: Option<Child>,
    line: Arc<Line>,
    over: bool,
}

impl Leash {
    /// Starts the process (a command that ends up in [`leash_main`](super::keeping::leash_main)).
    ///
    /// A process of another user's that this one may not end is refused: a leash that does not hold is none.
    pub fn tie(command: &GuardCommand, process: &Process) -> io::Result<Self> {
        if test_kill_process(process.pid()) == Err(Errno::PERM) {
            let why = format!("process {} is another user's, and could not be ended if belay died", process.number());
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
        }
        let (ours, theirs) = UnixStream::pair()?;
        let child = Command::new(&command.program)
            .args(&command.args)
            .envs(command.envs.iter().map(|(name, value)| (name, value)))
            .stdin(process.pidfd().try_clone()?)
            .stdout(OwnedFd::from(theirs))
            .stderr(Stdio::null())
            // Its own group: a SIGINT from the terminal is for belay, which then decides.
            .process_group(0)
            .spawn()?;
        Ok(Self { child: Some(child), line: Line::over(ours)?, over: false })
    }

    /// The leash of a QEMU that was taken over.
    pub(super) fn taken(line: Arc<Line>) -> Self {
        Self { child: None, line, over: false }
    }

    /// From here on the QEMU is kept for the next page server should this one die, as soon as the will and the pages' states are laid down too.
    pub fn hold<'a>(
        &self,
        holding: Holding,
        process: &'a Process,
        ram: impl Iterator<Item = BorrowedFd<'a>>,
        userfaultfds: impl Iterator<Item = BorrowedFd<'a>>,
    ) -> Result<(), GuestError> {
        self.line.done(&Ask::Hold(holding), None)?;
        self.line.done(&Ask::Keep(What::Process), Some(process.pidfd().as_fd()))?;
        for (file, index) in ram.zip(0..) {
            self.line.done(&Ask::Keep(What::Ram(index)), Some(file))?;
        }
        for (fd, index) in userfaultfds.zip(0..) {
            self.line.done(&Ask::Keep(What::Userfaultfd(index)), Some(fd))?;
        }
        Ok(())
    }

    /// By which the rest is laid down for the next page server, and the sign of life is asked for.
    pub fn keeper(&self) -> Keeper {
        Keeper::with(Arc::clone(&self.line))
    }

    /// The QEMU goes on whatever becomes of belay.
    pub fn let_go(mut self) {
        self.over = true;
        // A leash that has gone holds nobody.
        let _ = self.line.ask(&Ask::LetGo, None);
    }
}

impl Drop for Leash {
    fn drop(&mut self) {
        if !self.over {
            let _ = self.line.ask(&Ask::End, None);
        }
        if let Some(mut child) = self.child.take() {
            // It ends at once, whatever it was told.
            let _ = rustix::net::shutdown(
                &*self.line.0.lock().unwrap_or_else(PoisonError::into_inner),
                rustix::net::Shutdown::Both,
            );
            let _ = child.wait();
        }
    }
}
