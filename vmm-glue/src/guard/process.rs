//! The side of whoever starts a guard; and proof of death.

use super::page::LifePage;
use super::watcher::{DISMISSED, HAND_OVER_BYTES, MOST_CONNECTIONS, REFUSED};
use super::{Arms, GuardError, Secrets, io_error};
use belay_transport::Deadline;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType};
use rustix::process::{Signal, pidfd_send_signal};
use std::ffi::OsString;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use zeroize::Zeroizing;

/// How the guard process is started: a command that ends up in [`super::guard_main`].
#[derive(Debug, Clone)]
pub struct GuardCommand {
    pub program: PathBuf,
    pub args: Vec<OsString>,
    pub envs: Vec<(OsString, OsString)>,
}

impl GuardCommand {
    /// This very program with `args` (`belay guard`).
    pub fn this_program(args: &[&str]) -> Result<Self, GuardError> {
        let program = std::env::current_exe().map_err(io_error("find this program"))?;
        Ok(Self { program, args: args.iter().map(OsString::from).collect(), envs: vec![] })
    }
}

/// Whether the process `pid` is on its way out, or has gone: seen at once, where its sockets close and its pidfd speaks only after its address
/// space has been torn down. A sign like a guard's, and no proof: threads of it may still run. For processes that give no sign of their own.
pub fn is_ending(pid: i32) -> bool {
    /// PF_EXITING of the kernel's `sched.h`, in the flags of proc_pid_stat(5).
    const EXITING: u64 = 4;
    let stat = match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => stat,
        Err(error) => return error.kind() == std::io::ErrorKind::NotFound,
    };
    // State, ppid, pgrp, session, tty, tpgid and flags follow the name, which ends at the last bracket.
    let flags = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(6)?.parse::<u64>().ok());
    flags.is_some_and(|flags| flags & EXITING != 0)
}

/// A running guard. Dropping it leaves the process to its work; [`Guard::wait`] reaps it.
#[derive(Debug)]
pub struct Guard {
    child: Child,
    hand_over: OwnedFd,
}

impl Guard {
    /// Starts a guard over `page` that will speak on `connections` (connected sockets to the source; they may be closed here
    /// after). It watches nothing until [`Guard::watch`].
    ///
    /// To be called before guest memory is mapped: the process is started without copying this one's page tables, but its
    /// descriptors are handed over one by one.
    pub fn spawn(
        command: &GuardCommand,
        page: &LifePage,
        secrets: &Secrets,
        arms: Arms,
        connections: &[BorrowedFd<'_>],
    ) -> Result<Self, GuardError> {
        if connections.is_empty() || connections.len() > MOST_CONNECTIONS {
            return Err(GuardError::Connections { count: connections.len(), most: MOST_CONNECTIONS });
        }
        for connection in connections {
            // A sign must not wait for a fuller segment. Sockets that are not TCP say that they know no such thing.
            let _ = rustix::net::sockopt::set_tcp_nodelay(connection, true);
        }
        let (ours, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
                .map_err(io_error("make the hand-over socket"))?;
        let child = Command::new(&command.program)
            .args(&command.args)
            .envs(command.envs.iter().map(|(name, value)| (name, value)))
            .stdin(theirs)
            .stdout(Stdio::null())
            // Its own group: a SIGINT from the terminal is for whoever is watched.
            .process_group(0)
            .spawn()
            .map_err(io_error("start the guard process"))?;
        let guard = Self { child, hand_over: ours };
        let mut fds = vec![page.fd()];
        fds.extend_from_slice(connections);
        let bytes = hand_over(secrets, arms);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_CONNECTIONS + 1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)), "the space is made for this many");
        rustix::net::sendmsg(&guard.hand_over, &[IoSlice::new(&bytes[..])], &mut control, SendFlags::NOSIGNAL)
            .map_err(io_error("hand over to the guard process"))?;
        Ok(guard)
    }

    /// Has it watch the process that holds `slot`. When this returns the watch is on.
    pub fn watch(&mut self, slot: usize, deadline: Deadline) -> Result<(), GuardError> {
        let begun = Instant::now();
        let number = u8::try_from(slot).ok().filter(|&slot| slot != REFUSED);
        let number = number.ok_or(GuardError::NoSuchSlot { slot, slots: usize::from(REFUSED) })?;
        if rustix::net::send(&self.hand_over, &[number], SendFlags::NOSIGNAL).is_err() {
            return Err(self.ended());
        }
        if !wait_readable(&self.hand_over, deadline).map_err(io_error("wait for the guard process"))? {
            return Err(GuardError::NoAnswer { bound_ms: begun.elapsed().as_millis() });
        }
        let mut answer = [0];
        match rustix::io::read(&self.hand_over, &mut answer) {
            Ok(1) if answer == [number] => Ok(()),
            Ok(1) => Err(GuardError::NotHeld { slot }),
            Ok(_) | Err(_) => Err(self.ended()),
        }
    }

    /// The socket by which it is told what to watch: whoever has it can [`dismiss`] it, also after the death of this process.
    pub fn hand_over(&self) -> BorrowedFd<'_> {
        self.hand_over.as_fd()
    }

    fn ended(&mut self) -> GuardError {
        let status = match self.child.try_wait() {
            Ok(Some(status)) => status.to_string(),
            Ok(None) => "its hand-over socket is closed".into(),
            Err(error) => error.to_string(),
        };
        GuardError::Ended { status }
    }

    /// Its process id, for reports.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits for it to end by itself, which it does once everything it watched has stood down or died; whether it did by `deadline`.
    pub fn wait(&mut self, deadline: Deadline) -> Result<bool, GuardError> {
        let pid = rustix::process::Pid::from_child(&self.child);
        match rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()) {
            Ok(pidfd) => {
                if !proof_of_death(&pidfd, deadline).map_err(io_error("wait for the guard process"))? {
                    return Ok(false);
                }
            }
            Err(Errno::SRCH) => {}
            Err(errno) => return Err(io_error("pidfd_open of the guard process")(errno)),
        }
        self.child.wait().map_err(io_error("reap the guard process"))?;
        Ok(true)
    }
}

/// Sends the guard at the other end of `hand_over` home: it ends without a word, whatever it watches. True when it took the order.
pub fn dismiss(hand_over: impl AsFd) -> bool {
    rustix::net::send(hand_over, &[DISMISSED], SendFlags::NOSIGNAL | SendFlags::DONTWAIT).is_ok()
}

/// The first message to a guard: its secrets, and the bound of its fence in milliseconds (none: not armed).
fn hand_over(secrets: &Secrets, arms: Arms) -> Zeroizing<[u8; HAND_OVER_BYTES]> {
    let mut bytes = Zeroizing::new([0; HAND_OVER_BYTES]);
    bytes[..32].copy_from_slice(&secrets.sign);
    bytes[32..64].copy_from_slice(&secrets.proof);
    bytes[64..96].copy_from_slice(&secrets.fence);
    let bound_ms = match arms {
        Arms::None => 0,
        Arms::Fence { gate_bound } => u64::try_from(gate_bound.as_millis()).unwrap_or(u64::MAX).max(1),
    };
    bytes[96..].copy_from_slice(&bound_ms.to_le_bytes());
    bytes
}

/// Whether the process of `pidfd` has ended, all of it, by `deadline`. This is proof: none of its threads runs any more.
pub fn proof_of_death(pidfd: impl AsFd, deadline: Deadline) -> std::io::Result<bool> {
    wait_readable(&pidfd, deadline)
}

/// Fences a VMM in another process: SIGKILL, then proof. A process that is gone already is proven at once.
pub fn kill_and_prove(pidfd: impl AsFd, deadline: Deadline) -> std::io::Result<bool> {
    match pidfd_send_signal(&pidfd, Signal::KILL) {
        Ok(()) | Err(Errno::SRCH) => proof_of_death(&pidfd, deadline),
        Err(errno) => Err(errno.into()),
    }
}

/// Whether `fd` polls readable by `deadline`.
pub(super) fn wait_readable(fd: &impl AsFd, deadline: Deadline) -> std::io::Result<bool> {
    loop {
        let left = deadline.left();
        let timeout = rustix::event::Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        let mut polled = [PollFd::new(fd, PollFlags::IN)];
        match poll(&mut polled, Some(&timeout)) {
            Ok(0) if deadline.left() == Duration::ZERO => return Ok(false),
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => return Ok(true),
            Err(errno) => return Err(errno.into()),
        }
    }
}
