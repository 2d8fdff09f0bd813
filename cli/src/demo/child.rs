//! One process of the demo: started, listened to, and never left behind.

use crate::report;
use belay_vmm_glue::migrate::observation::{Kind, Observation};
use crossbeam_channel::Sender;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Which process something came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    Source,
    Destination,
    Observer,
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Source => "source",
            Self::Destination => "destination",
            Self::Observer => "observer",
        })
    }
}

/// What a child said, or that it has nothing more to say.
#[derive(Debug)]
pub enum Said {
    Observation(Role, Box<Observation>),
    /// A line of stderr, or of stdout that is no observation.
    Line(Role, String),
    Closed(Role),
}

/// A running child. Killed by pid and reaped when dropped.
pub struct Proc {
    role: Role,
    child: Child,
    /// The VMM it started beside itself, which would outlive it.
    vmm: Arc<Mutex<Option<OwnedFd>>>,
}

impl Proc {
    /// Starts `command`, whose stdout carries observations, and passes on what it says.
    pub fn start(role: Role, mut command: Command, said: Sender<Said>) -> std::io::Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn()?;
        let stdout = child.stdout.take().expect("stdout was asked to be a pipe");
        let stderr = child.stderr.take().expect("stderr was asked to be a pipe");
        let vmm = Arc::new(Mutex::new(None));
        let its_vmm = Arc::clone(&vmm);
        let lines = said.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                if lines.send(Said::Line(role, line)).is_err() {
                    return;
                }
            }
        });
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let parsed = report::parse(&line);
                if let Some(Observation { kind: Kind::VmmStarted { pid }, .. }) = parsed {
                    // A pidfd, so that nobody else who may have got its number later is meant.
                    let pid = Pid::from_raw(pid as i32);
                    let pidfd = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
                    *its_vmm.lock().unwrap_or_else(PoisonError::into_inner) = pidfd;
                }
                let what = match parsed {
                    Some(observation) => Said::Observation(role, Box::new(observation)),
                    None => Said::Line(role, line),
                };
                if said.send(what).is_err() {
                    return;
                }
            }
            let _ = said.send(Said::Closed(role));
        });
        Ok(Self { role, child, vmm })
    }

    /// Which it is.
    pub fn role(&self) -> Role {
        self.role
    }

    /// SIGKILL, as a crash of the host would end it, its VMM included. Does not wait.
    pub fn kill(&mut self) -> std::io::Result<()> {
        self.child.kill()?;
        self.kill_vmm();
        Ok(())
    }

    fn kill_vmm(&self) {
        if let Some(vmm) = &*self.vmm.lock().unwrap_or_else(PoisonError::into_inner) {
            // One that has ended already needs no more.
            let _ = pidfd_send_signal(vmm, Signal::KILL);
        }
    }

    /// Asks it to end (SIGTERM).
    pub fn terminate(&self) {
        if let Some(pid) = Pid::from_raw(self.child.id() as i32) {
            let _ = rustix::process::kill_process(pid, Signal::TERM);
        }
    }

    /// Waits until it has ended, at most `bound`.
    pub fn wait(&mut self, bound: Duration) -> std::io::Result<Option<ExitStatus>> {
        let end = Instant::now() + bound;
        let pid = Pid::from_raw(self.child.id() as i32);
        if let Some(fd) = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()) {
            let left = end.saturating_duration_since(Instant::now());
            let timeout = rustix::time::Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            let mut fds = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
            let _ = rustix::event::poll(&mut fds, Some(&timeout));
        }
        self.child.try_wait()
    }
}

impl Drop for Proc {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
        }
        self.kill_vmm();
        let _ = self.child.wait();
    }
}
