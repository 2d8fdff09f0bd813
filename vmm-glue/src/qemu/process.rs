//! The process behind a QMP socket: proven by the socket, held by a pidfd, looked at through /proc (proc(5)).

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// Why there is nothing to look at.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    #[error("the system does not say which process listens at the QMP socket; give its number with --pid")]
    NoPeer,
    #[error("cannot {doing} of process {pid}")]
    Io {
        doing: &'static str,
        pid: i32,
        #[source]
        source: io::Error,
    },
}

/// One mapping of a file that is shared with whoever else maps it; neighbours that continue each other are one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    /// Addresses in that process.
    pub start: u64,
    pub end: u64,
    /// Bytes into the file.
    pub offset: u64,
    /// Major and minor number, and inode: what the file is, whatever it is called.
    pub file: (u32, u32, u64),
    /// As it was called when it was mapped, " (deleted)" after it if it is gone.
    pub path: String,
}

/// A process that cannot be taken for another: its number is not used again while the pidfd is held and it has not been reaped.
#[derive(Debug)]
pub struct Process {
    pid: Pid,
    pidfd: OwnedFd,
}

impl Process {
    /// The process that made the socket listen (SO_PEERCRED, unix(7)). A supervisor that hands a listening socket down is told
    /// instead of its QEMU: then `pid` must be given.
    pub fn behind(socket: impl AsFd, pid: Option<u32>) -> Result<Self, ProcessError> {
        let pid = match pid {
            Some(pid) => i32::try_from(pid).ok().and_then(Pid::from_raw),
            None => rustix::net::sockopt::socket_peercred(socket).ok().map(|peer| peer.pid),
        };
        Self::held(pid.ok_or(ProcessError::NoPeer)?)
    }

    /// The process of this number, whose pidfd another has kept.
    pub fn of(pid: u32, pidfd: OwnedFd) -> Option<Self> {
        Some(Self { pid: i32::try_from(pid).ok().and_then(Pid::from_raw)?, pidfd })
    }

    fn held(pid: Pid) -> Result<Self, ProcessError> {
        let pidfd = pidfd_open(pid, PidfdFlags::empty());
        let pidfd = pidfd.map_err(|error| ProcessError::Io {
            doing: "take hold",
            pid: pid.as_raw_nonzero().get(),
            source: error.into(),
        })?;
        Ok(Self { pid, pidfd })
    }

    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Its number, for showing.
    pub fn number(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Whether it has ended (its pidfd is readable then: pidfd_open(2)).
    pub fn has_ended(&self) -> bool {
        let mut look = [PollFd::new(&self.pidfd, PollFlags::IN)];
        matches!(poll(&mut look, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(1..))
    }

    pub fn pidfd(&self) -> &OwnedFd {
        &self.pidfd
    }

    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{name}", self.pid.as_raw_nonzero()))
    }

    fn failed(&self, doing: &'static str) -> impl FnOnce(io::Error) -> ProcessError {
        let pid = self.pid.as_raw_nonzero().get();
        move |source| ProcessError::Io { doing, pid, source }
    }

    /// The program it runs.
    pub fn executable(&self) -> Result<PathBuf, ProcessError> {
        fs::read_link(self.path("exe")).map_err(self.failed("read the program"))
    }

    /// Program and arguments as it was started with. Not UTF-8 is not taken: whoever needs it as text would take another for it.
    pub fn command_line(&self) -> Result<Vec<String>, ProcessError> {
        let line = fs::read(self.path("cmdline")).map_err(self.failed("read the command line"))?;
        let words = line.strip_suffix(&[0]).unwrap_or(&line).split(|&byte| byte == 0);
        let words: Result<_, _> = words.map(|word| String::from_utf8(word.to_vec())).collect();
        words.map_err(|error| self.failed("understand the command line")(io::Error::other(error)))
    }

    /// Where its relative paths begin.
    pub fn working_directory(&self) -> Result<PathBuf, ProcessError> {
        fs::read_link(self.path("cwd")).map_err(self.failed("find the working directory"))
    }

    /// Its shared mappings of files, by address.
    pub fn shared_mappings(&self) -> Result<Vec<Mapping>, ProcessError> {
        let maps = fs::read(self.path("maps")).map_err(self.failed("read the mappings"))?;
        Ok(shared(&String::from_utf8_lossy(&maps)))
    }

    /// What of /dev it has open, without what every process has (null, zero, random, terminals).
    pub fn devices(&self) -> Result<Vec<PathBuf>, ProcessError> {
        let mut found = Vec::new();
        for entry in fs::read_dir(self.path("fd")).map_err(self.failed("list the descriptors"))? {
            // One that was closed meanwhile is not open.
            let Some(target) = entry.ok().and_then(|entry| fs::read_link(entry.path()).ok()) else { continue };
            let text = String::from_utf8_lossy(&target.clone().into_os_string().into_vec()).into_owned();
            let plain = [
                "/dev/null",
                "/dev/zero",
                "/dev/random",
                "/dev/urandom",
                "/dev/tty",
                "/dev/pts",
                "/dev/shm",
                "/dev/hugepages",
            ];
            if text.starts_with("/dev/")
                && !plain.iter().any(|plain| text.starts_with(plain))
                && !found.contains(&target)
            {
                found.push(target);
            }
        }
        found.sort();
        Ok(found)
    }
}

/// The shared file mappings in the text of /proc/PID/maps.
fn shared(maps: &str) -> Vec<Mapping> {
    let mut found: Vec<Mapping> = Vec::new();
    for mapping in maps.lines().filter_map(one_shared) {
        match found.last_mut() {
            Some(last)
                if last.file == mapping.file
                    && last.end == mapping.start
                    && last.offset + (last.end - last.start) == mapping.offset =>
            {
                last.end = mapping.end;
            }
            _ => found.push(mapping),
        }
    }
    found
}

/// `start-end perms offset major:minor inode path`, if it is shared and of a file.
fn one_shared(line: &str) -> Option<Mapping> {
    let mut words = line.splitn(6, ' ');
    let (start, end) = words.next()?.split_once('-')?;
    let hex = |text| u64::from_str_radix(text, 16).ok();
    if !words.next()?.ends_with('s') {
        return None;
    }
    let offset = hex(words.next()?)?;
    let (major, minor) = words.next()?.split_once(':')?;
    let inode: u64 = words.next()?.parse().ok()?;
    let path = words.next().unwrap_or_default().trim_start_matches(' ').to_owned();
    let number = |text| u32::from_str_radix(text, 16).ok();
    let mapping =
        Mapping { start: hex(start)?, end: hex(end)?, offset, file: (number(major)?, number(minor)?, inode), path };
    (inode != 0 && mapping.start < mapping.end).then_some(mapping)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn shared_mappings_are_read_and_neighbours_joined() {
        let maps = "\
7f00-8f00 rw-s 00000000 00:1b 4079                       /dev/shm/guest ram
8f00-9f00 rw-s 00001000 00:1b 4079                       /dev/shm/guest ram
9f00-af00 rw-s 00000000 00:1b 4079                       /dev/shm/guest ram
b000-c000 rw-p 00000000 00:1b 4079                       /dev/shm/guest ram
c000-d000 rw-s 00000000 00:00 0
d000-e000 rw-s 00000000 00:1c 7                          /memfd:x (deleted)
nonsense
e000-d000 rw-s 00000000 00:1c 7                          /backwards
";
        let found = shared(maps);
        let spans: Vec<_> = found.iter().map(|one| (one.start, one.end, one.offset, one.path.as_str())).collect();
        assert_eq!(
            spans,
            [
                (0x7f00, 0x9f00, 0, "/dev/shm/guest ram"),
                (0x9f00, 0xaf00, 0, "/dev/shm/guest ram"),
                (0xd000, 0xe000, 0, "/memfd:x (deleted)")
            ]
        );
        assert_eq!(found[0].file, (0, 0x1b, 4079));
    }

    #[test]
    fn no_bytes_make_reading_mappings_panic() {
        proptest::proptest!(|(text in "([0-9a-f -:sp/]{0,80}\n){0,5}")| {
            shared(&text);
        });
    }

    #[test]
    fn the_process_behind_a_socket_is_the_one_that_listens_and_its_mappings_are_found() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let _listener = UnixListener::bind(&path).unwrap();
        let stream = std::os::unix::net::UnixStream::connect(&path).unwrap();
        let process = Process::behind(&stream, None).unwrap();
        assert_eq!(process.pid().as_raw_nonzero().get() as u32, std::process::id());
        assert_eq!(process.executable().unwrap(), std::env::current_exe().unwrap());
        let file =
            belay_transport::region::RamFile::memfd("found-again", 1 << 20, belay_transport::PageSize::Small).unwrap();
        let mapping = file.map().unwrap();
        let found = process.shared_mappings().unwrap();
        let ours: Vec<_> = found.iter().filter(|one| one.path.contains("found-again")).collect();
        assert_eq!(ours.len(), 1, "{found:?}");
        assert_eq!((ours[0].start, ours[0].end), (mapping.address(), mapping.address() + (1 << 20)));
        process.devices().unwrap();
    }
}
