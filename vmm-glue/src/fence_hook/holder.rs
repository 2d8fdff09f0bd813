//! The process that holds a fence hook: it starts the command, and ends it with all that it started when belay does not want it any more
//! or has died.

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open, set_parent_process_death_signal};
use std::ffi::OsStr;
use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};

/// Why a command was not held to its end.
#[derive(Debug, thiserror::Error)]
pub enum HoldError {
    #[error("cannot {doing}")]
    Io {
        doing: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("belay let go of it; it was killed with all that it had started")]
    LetGo,
}

fn io_error<E: Into<io::Error>>(doing: &'static str) -> impl FnOnce(E) -> HoldError {
    move |source| HoldError::Io { doing, source: source.into() }
}

/// Runs `command` by the shell until it ends; its exit status, a signal as 128 and its number. Kills it, and what is left in its process
/// group, when the standard input of this process ends. To be called by a process that has one thread.
pub fn hold(command: &OsStr) -> Result<u8, HoldError> {
    let stderr = io::stderr().as_fd().try_clone_to_owned().map_err(io_error("share stderr"))?;
    let mut shell = Command::new("/bin/sh");
    shell.arg("-c").arg(command).stdin(Stdio::null()).stdout(stderr).process_group(0);
    // SAFETY: prctl(2) allocates nothing and touches no memory of this process: it may be called between fork and exec.
    unsafe { shell.pre_exec(|| set_parent_process_death_signal(Some(Signal::KILL)).map_err(Into::into)) };
    let mut shell = Group(shell.spawn().map_err(io_error("start the shell"))?);
    let pidfd = pidfd_open(shell.id(), PidfdFlags::empty()).map_err(io_error("watch the shell"))?;
    if !ends_before_belay_lets_go(&pidfd).map_err(io_error("wait for the shell"))? {
        return Err(HoldError::LetGo);
    }
    let status = shell.reap().map_err(io_error("reap the shell"))?;
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    Ok(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(u8::MAX))
}

fn ends_before_belay_lets_go(pidfd: &OwnedFd) -> io::Result<bool> {
    let stdin = io::stdin();
    loop {
        let mut polled = [PollFd::new(pidfd, PollFlags::IN), PollFd::new(&stdin, PollFlags::IN)];
        match poll(&mut polled, None) {
            // An end by itself counts, if both came at once.
            Ok(_) => return Ok(!polled[0].revents().is_empty()),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// A process with the group that it leads. Dropped, all of it is killed.
struct Group(Child);

impl Group {
    fn id(&self) -> Pid {
        Pid::from_child(&self.0)
    }

    /// Before the leader is reaped its number, and so its group's, cannot be another's.
    fn reap(&mut self) -> io::Result<std::process::ExitStatus> {
        let _ = kill_process_group(self.id(), Signal::KILL);
        self.0.wait()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if self.0.try_wait().is_ok_and(|ended| ended.is_none()) {
            let _ = self.reap();
        }
    }
}
