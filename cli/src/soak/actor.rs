//! The processes of one run: started, listened to within bounds, and watched until they have ended.

use crate::report;
use belay_transport::stop_point::ANNOUNCED;
use belay_vmm_glue::migrate::observation::{Kind, Observation};
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid};
use std::io::{BufRead, BufReader, Read};
use std::ops::Index;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Events kept of one process; later ones are counted.
const MOST_EVENTS: usize = 4096;
/// Bytes kept of what a process says otherwise; the rest is counted.
const MOST_TEXT: usize = 64 << 10;
/// Longest line that is read whole. A longer one comes in pieces, which are no events.
const LONGEST_LINE: u64 = 128 << 10;

/// Which process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Source,
    Destination,
    Observer,
}

/// What is known of a process.
#[derive(Debug, Default)]
pub struct Log {
    /// In order; of the reports that come all the time only the newest.
    pub events: Vec<Observation>,
    pub text: String,
    /// Lines beyond those bounds.
    pub dropped: u64,
    /// The stop point at which it stands or stood.
    pub stopped_at: Option<String>,
    /// The kernel says that it stands still.
    pub is_stopped: bool,
    /// Exit code, or minus the signal that ended it.
    pub ended: Option<i32>,
    /// The process; 0 before there is one.
    pub pid: u32,
    /// Streams at whose end a reader still waits.
    open: u32,
}

impl Log {
    fn hear(&mut self, line: &str) {
        if let Some(name) = line.strip_prefix(ANNOUNCED) {
            self.stopped_at = Some(name.to_owned());
            return;
        }
        match report::parse(line) {
            Some(event) => self.take(event),
            None if self.text.len() + line.len() < MOST_TEXT => {
                self.text.push_str(line);
                self.text.push('\n');
            }
            None => self.dropped += 1,
        }
    }

    fn take(&mut self, event: Observation) {
        let newest_only = |kind: &Kind| matches!(kind, Kind::Pull { .. } | Kind::Latency { .. });
        if newest_only(&event.kind)
            && let Some(last) = self.events.last_mut()
            && std::mem::discriminant(&last.kind) == std::mem::discriminant(&event.kind)
        {
            *last = event;
        } else if self.events.len() < MOST_EVENTS || matches!(event.kind, Kind::Ended { .. }) {
            self.events.push(event);
        } else {
            self.dropped += 1;
        }
    }

    /// The first event that `pick` takes.
    pub fn find<'a, T>(&'a self, pick: impl Fn(&'a Kind) -> Option<T>) -> Option<T> {
        self.events.iter().find_map(|event| pick(&event.kind))
    }

    /// Whether it said that it entered `state`.
    pub fn was(&self, state: &str) -> bool {
        self.find(|kind| matches!(kind, Kind::State { state: name, .. } if name == state).then_some(())).is_some()
    }
}

/// The logs of a run's processes: of each role those that had it, one after the other. Indexed by role it is the newest.
#[derive(Debug)]
pub struct Told([Vec<Log>; 3]);

impl Default for Told {
    fn default() -> Self {
        Self(std::array::from_fn(|_| vec![Log::default()]))
    }
}

impl Told {
    /// Of every process that has had `role`, in turn.
    pub fn in_turn(&self, role: Role) -> &[Log] {
        &self.0[role as usize]
    }

    /// The log of a new process; which of its role's it is.
    fn begin(&mut self, role: Role, pid: u32) -> usize {
        let logs = &mut self.0[role as usize];
        if logs.last().is_none_or(|last| last.pid != 0) {
            logs.push(Log::default());
        }
        let turn = logs.len() - 1;
        (logs[turn].pid, logs[turn].open) = (pid, 2);
        turn
    }
}

impl Index<Role> for Told {
    type Output = Log;

    fn index(&self, role: Role) -> &Log {
        self.0[role as usize].last().expect("there is one from the beginning")
    }
}

/// What is known of a run's processes, and whoever waits for something in it.
#[derive(Debug, Default)]
pub struct Logs {
    told: Mutex<Told>,
    changed: Condvar,
}

impl Logs {
    /// All logs.
    pub fn lock(&self) -> MutexGuard<'_, Told> {
        // A panic elsewhere leaves lines unheard, nothing worse.
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, (role, turn): (Role, usize), change: impl FnOnce(&mut Log)) {
        change(&mut self.lock().0[role as usize][turn]);
        self.changed.notify_all();
    }

    /// Waits until `until` gives something, at most up to `end`.
    pub fn wait<T>(&self, end: Instant, mut until: impl FnMut(&Told) -> Option<T>) -> Option<T> {
        let mut told = self.lock();
        loop {
            if let Some(found) = until(&told) {
                return Some(found);
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            told = self.changed.wait_timeout(told, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// One process.
pub struct Actor {
    role: Role,
    turn: usize,
    pub pid: i32,
    pidfd: Arc<OwnedFd>,
    logs: Arc<Logs>,
}

impl Actor {
    /// Starts `command` as the newest process of `role`.
    pub fn start(role: Role, mut command: Command, logs: &Arc<Logs>) -> std::io::Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn()?;
        let pid = child.id() as i32;
        let pidfd = Pid::from_raw(pid).ok_or(std::io::ErrorKind::NotFound)?;
        let pidfd = Arc::new(pidfd_open(pidfd, PidfdFlags::empty())?);
        let turn = logs.lock().begin(role, child.id());
        let streams: [Option<Box<dyn Read + Send>>; 2] =
            [child.stdout.take().map(|out| Box::new(out) as _), child.stderr.take().map(|err| Box::new(err) as _)];
        for stream in streams.into_iter().flatten() {
            let logs = Arc::clone(logs);
            std::thread::spawn(move || {
                listen(stream, &logs, (role, turn));
                logs.change((role, turn), |log| log.open -= 1);
            });
        }
        let (watched, told) = (Arc::clone(&pidfd), Arc::clone(logs));
        std::thread::spawn(move || watch(&watched, &told, (role, turn)));
        Ok(Self { role, turn, pid, pidfd, logs: Arc::clone(logs) })
    }

    /// Sends a signal; whether there was a process to send it to.
    pub fn signal(&self, signal: Signal) -> bool {
        pidfd_send_signal(&*self.pidfd, signal).is_ok()
    }

    /// Its descriptor, for pidfd_getfd(2).
    pub fn pidfd(&self) -> &OwnedFd {
        &self.pidfd
    }

    /// Waits until it has ended and all it said was heard; its exit code, or minus the signal.
    pub fn wait(&self, end: Instant) -> Option<i32> {
        let (role, turn) = (self.role, self.turn);
        let ended = self.logs.wait(end, |logs| logs.in_turn(role)[turn].ended)?;
        // A process it left behind may hold the other end of its pipes: what that says is not waited for.
        let soon = Instant::now() + Duration::from_millis(300);
        self.logs.wait(soon.min(end), |logs| (logs.in_turn(role)[turn].open == 0).then_some(()));
        Some(ended)
    }
}

/// Reads lines until the stream ends, whatever they are.
fn listen(stream: impl Read, logs: &Logs, whose: (Role, usize)) {
    let mut stream = BufReader::new(stream);
    let mut line = Vec::new();
    loop {
        line.clear();
        match stream.by_ref().take(LONGEST_LINE).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => logs.change(whose, |log| log.hear(String::from_utf8_lossy(&line).trim_end_matches('\n'))),
        }
    }
}

/// Follows a child until it has ended.
fn watch(pidfd: &OwnedFd, logs: &Logs, whose: (Role, usize)) {
    loop {
        let wanted = WaitIdOptions::EXITED | WaitIdOptions::STOPPED | WaitIdOptions::CONTINUED;
        match waitid(WaitId::PidFd(pidfd.as_fd()), wanted) {
            Err(rustix::io::Errno::INTR) | Ok(None) => {}
            Err(_) => return,
            Ok(Some(status)) if status.stopped() => logs.change(whose, |log| log.is_stopped = true),
            Ok(Some(status)) if status.continued() => logs.change(whose, |log| log.is_stopped = false),
            Ok(Some(status)) => {
                let code = status.exit_status().or(status.terminating_signal().map(|signal| -signal));
                return logs.change(whose, |log| log.ended = code.or(Some(-1)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_never_stops_talking_fills_no_memory() {
        let mut log = Log::default();
        for _ in 0..10_000 {
            log.hear(&"x".repeat(100));
            log.hear(r#"{"id":"a-1-1","at_us":5,"event":"all-landed","took_us":1,"bytes":2,"faults":3}"#);
        }
        assert!(log.text.len() <= MOST_TEXT && log.events.len() == MOST_EVENTS);
        assert_eq!(log.dropped as usize, 20_000 - MOST_EVENTS - log.text.lines().count());
    }
}
