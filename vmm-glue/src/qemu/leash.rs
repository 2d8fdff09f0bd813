//! A small process that ends a QEMU when belay dies while the guest is not its own to leave: a destination's while its source may still catch
//! it, a standby that nothing was loaded into.
//!
//! It waits for the end of a pipe that only belay holds. A word before that lets the QEMU go; without one it is killed through a pidfd, so no
//! other process can be meant. It is told nothing else, and knows no secret.

use super::process::Process;
use crate::guard::GuardCommand;
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Signal, pidfd_send_signal, test_kill_process};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

/// Lets the QEMU go.
const GO: [u8; 1] = *b"g";

/// Held by belay. Dropped, the QEMU is ended.
#[derive(Debug)]
pub struct Leash {
    child: Child,
    end: Option<OwnedFd>,
}

impl Leash {
    /// Starts the process (a command that ends up in [`leash_main`]).
    ///
    /// A process of another user's that this one may not end is refused: a leash that does not hold is none.
    pub fn tie(command: &GuardCommand, process: &Process) -> io::Result<Self> {
        if test_kill_process(process.pid()) == Err(Errno::PERM) {
            let why = format!("process {} is another user's, and could not be ended if belay died", process.number());
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
        }
        let (theirs, ours) = pipe_with(PipeFlags::CLOEXEC)?;
        let child = Command::new(&command.program)
            .args(&command.args)
            .envs(command.envs.iter().map(|(name, value)| (name, value)))
            .stdin(process.pidfd().try_clone()?)
            .stdout(theirs)
            .stderr(Stdio::null())
            // Its own group: a SIGINT from the terminal is for belay, which then decides.
            .process_group(0)
            .spawn()?;
        Ok(Self { child, end: Some(ours) })
    }

    /// The QEMU goes on whatever becomes of belay.
    pub fn let_go(mut self) {
        if let Some(end) = self.end.take() {
            // A leash that has gone holds nobody.
            let _ = rustix::io::write(&end, &GO);
        }
    }
}

impl Drop for Leash {
    fn drop(&mut self) {
        self.end = None;
        // It ends at once, whatever it was told.
        let _ = self.child.wait();
    }
}

/// The leash: a pidfd for standard input, the pipe for standard output.
pub fn leash_main() -> io::Result<()> {
    hold(io::stdin().as_fd(), io::stdout().as_fd())
}

fn hold(pidfd: BorrowedFd<'_>, pipe: BorrowedFd<'_>) -> io::Result<()> {
    let mut word = [0; 1];
    loop {
        match rustix::io::read(pipe, &mut word) {
            Err(Errno::INTR) => {}
            Ok(1) if word == GO => return Ok(()),
            _ => break,
        }
    }
    match pidfd_send_signal(pidfd, Signal::KILL) {
        Ok(()) | Err(Errno::SRCH) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{Pid, PidfdFlags, pidfd_open};

    fn sleeper() -> (Child, OwnedFd) {
        let child = Command::new("sleep").arg("600").spawn().expect("a process");
        let pid = Pid::from_raw(child.id() as i32).expect("a pid");
        (child, pidfd_open(pid, PidfdFlags::empty()).expect("a pidfd"))
    }

    #[test]
    fn what_is_on_a_leash_ends_with_its_holder_and_lives_on_when_it_is_let_go() {
        use std::os::unix::process::ExitStatusExt;
        let (mut child, pidfd) = sleeper();
        let (theirs, ours) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        rustix::io::write(&ours, &GO).unwrap();
        hold(pidfd.as_fd(), theirs.as_fd()).unwrap();
        assert!(child.try_wait().unwrap().is_none(), "it was let go");
        let (theirs, ours) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        drop(ours);
        hold(pidfd.as_fd(), theirs.as_fd()).unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
        // One that has ended is no error.
        hold(pidfd.as_fd(), theirs.as_fd()).unwrap();
    }
}
