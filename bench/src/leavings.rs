//! What a run would leave behind if it were ended from outside: processes it has started, folders and sockets it has made. A run that ends by
//! itself takes them with it, as each is dropped by its owner; SIGINT, SIGTERM and SIGHUP drop nothing, so they are answered here.
//!
//! Nothing answers SIGKILL: processes end with the one that started them even then, paths stay.

use crate::error::BenchError;
use belay_transport::Deadline;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// What a process that was killed may need to be gone: the kernel takes a large guest's memory apart first.
const GONE: Duration = Duration::from_secs(10);

static LEAVINGS: Mutex<Leavings> = Mutex::new(Leavings { next: 0, all: BTreeMap::new() });

struct Leavings {
    next: u64,
    all: BTreeMap<u64, Leaving>,
}

enum Leaving {
    /// By a descriptor, which never comes to mean another process (pidfd_open(2)).
    Process(OwnedFd),
    Path(PathBuf),
}

/// Something is remembered for as long as this is kept.
#[derive(Debug)]
#[must_use = "what is not kept is forgotten at once"]
pub struct Remembered(u64);

impl Drop for Remembered {
    fn drop(&mut self) {
        lock().all.remove(&self.0);
    }
}

/// Remembers a child, until it has been waited for. One that cannot be watched is ended.
pub fn process(child: &mut Child) -> Result<Remembered, BenchError> {
    pidfd_open(Pid::from_child(child), PidfdFlags::empty()).map(|fd| remember(Leaving::Process(fd))).map_err(|errno| {
        let _ = child.kill();
        let _ = child.wait();
        BenchError::io("watch a process")(errno.into())
    })
}

/// Remembers a file, a socket or a folder with all that is in it. It need not be there yet.
pub fn path(path: &Path) -> Remembered {
    remember(Leaving::Path(path.to_owned()))
}

fn remember(leaving: Leaving) -> Remembered {
    let mut leavings = lock();
    let id = leavings.next;
    leavings.next += 1;
    leavings.all.insert(id, leaving);
    Remembered(id)
}

fn lock() -> MutexGuard<'static, Leavings> {
    // Whoever panicked held it over one insertion or removal: the map is whole.
    LEAVINGS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// From now on a signal that ends this process takes along what is remembered then, and the exit code is the one a shell gives it. What
/// whoever started it wants ignored (nohup(1)) stays so.
pub fn go_with_this_process() -> Result<(), BenchError> {
    let ignored = ignored().map_err(BenchError::io("read /proc/self/status"))?;
    let answered = [SIGHUP, SIGINT, SIGTERM].into_iter().filter(|signal| ignored >> (signal - 1) & 1 == 0);
    let mut signals = Signals::new(answered).map_err(BenchError::io("listen for signals"))?;
    let answer = move || {
        if let Some(signal) = signals.forever().next() {
            // Kept to the end: nobody else remembers anything now, or ends this process in the middle of it.
            let leavings = lock();
            leavings.take_along();
            std::process::exit(128 + signal);
        }
    };
    let thread = std::thread::Builder::new().name("signals".into()).spawn(answer);
    thread.map(drop).map_err(BenchError::io("start a thread"))
}

/// Signals that are ignored, the first in the lowest bit (SigIgn in proc_pid_status(5)).
fn ignored() -> io::Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.ok_or_else(|| io::Error::other("it has no SigIgn"))
}

impl Leavings {
    /// Kills, waits until nobody is there to write any more, and removes. What fails here fails for good; the rest is done all the same.
    fn take_along(&self) {
        let processes = self.all.values().filter_map(|leaving| match leaving {
            Leaving::Process(process) => Some(process),
            Leaving::Path(_) => None,
        });
        for process in processes.clone() {
            let _ = pidfd_send_signal(process, Signal::KILL);
        }
        let deadline = Deadline::after(GONE);
        for process in processes {
            let left = deadline.left();
            let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
            let _ = poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&left));
        }
        for leaving in self.all.values() {
            if let Leaving::Path(path) = leaving {
                let _ = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
            }
        }
    }
}
