//! Where a run happens: namespaces of its own, in which every process and every file of the run ends with its conductor.
//!
//! ```text
//! belay soak            the manager: plans, starts conductors, sums up
//!  └ outer              asks for a PID and a mount namespace, dies with the manager
//!     └ conductor       process 1 of the first, dies with the outer one, and everything in there with it
//!        ├ belay observe, receive, send
//!        └ whatever they leave behind: the VMM of a page server that was killed, a guard
//! ```
//! The kernel ends a PID namespace with its process 1, and a tmpfs with the last process that sees it. So nothing of a run outlives the
//! soak, however that ends: no VMM that waits for a dead page server with a guest's memory, no file.

use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::process::{Resource, Rlimit, Signal, set_parent_process_death_signal, setrlimit};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use std::ffi::CStr;
use std::io;
use std::path::Path;
use std::process::Command;

/// Where a run's sockets, records and logs are: a tmpfs that nobody else sees.
pub const PLACE: &str = "/dev/shm";
/// Most that they may take: with guest memory that has names, RAM, a ring or two, overflow memory and 81 MiB of state.
const PLACE_OPTIONS: &CStr = c"size=384m,mode=0700";
/// Largest file of any process of a run, guest RAM (a memfd) included.
const MOST_FILE_BYTES: u64 = 1 << 30;
/// What the kernel adds to a process's badness: should memory run out, a run goes before anything else on the host.
const OOM_SCORE: &str = "800";

/// The outer process: makes the namespaces and runs the conductor in them; its exit code.
pub fn outer(arguments: &[String]) -> io::Result<i32> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // SAFETY: no flag shares or unshares a descriptor table, and this process has one thread.
    unsafe { unshare_unsafe(UnshareFlags::NEWPID | UnshareFlags::NEWNS) }?;
    let status = Command::new(std::env::current_exe()?).args(arguments).status()?;
    Ok(status.code().unwrap_or(1))
}

/// What the conductor does first.
pub fn inner() -> io::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    if std::process::id() != 1 {
        return Err(io::Error::other("a conductor is started by `belay soak`, as process 1 of a namespace"));
    }
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    let plain = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("proc", "/proc", "proc", plain, None)?;
    mount("belay-soak", PLACE, "tmpfs", plain, Some(PLACE_OPTIONS))?;
    std::fs::write("/proc/self/oom_score_adj", OOM_SCORE)?;
    let limit = |bytes| Rlimit { current: Some(bytes), maximum: Some(bytes) };
    setrlimit(Resource::Fsize, limit(MOST_FILE_BYTES))?;
    setrlimit(Resource::Core, limit(0))?;
    Ok(())
}

/// Processes of the run beside the conductor, that have not ended: number and command line.
pub fn running() -> Vec<(i32, String)> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let others = pids.filter(|&pid| pid != 1 && state(pid).is_some_and(|state| !matches!(state, 'Z' | 'X')));
    let line = |pid| std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    others.map(|pid| (pid, String::from_utf8_lossy(&line(pid)).replace('\0', " "))).collect()
}

/// How a process stands, by proc(5)'s letter; nothing if there is none.
fn state(pid: i32) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit(") ").next()?.chars().next()
}

/// Files of the run that are there now.
pub fn files() -> Vec<String> {
    let mut found = Vec::new();
    let mut directories = vec![Path::new(PLACE).to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => directories.push(entry.path()),
                _ => found.push(entry.path().display().to_string()),
            }
        }
    }
    found.sort();
    found
}
