//! How much memory this process may pin, and how much it has.
//!
//! The kernel counts the pages of every registration (also twice the same page in two of them) in the process's *pinned* memory,
//! and refuses with ENOMEM where that would pass RLIMIT_MEMLOCK, unless the process has CAP_IPC_LOCK (ib_umem_get in
//! drivers/infiniband/core/umem.c). Asked beforehand, because the refusal says neither what was needed nor what there was.

use rustix::process::{Resource, getrlimit};
use std::fmt;

/// Bit of CAP_IPC_LOCK (capabilities(7)).
const CAP_IPC_LOCK: u32 = 14;

/// What this process may pin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LockedMemory {
    /// RLIMIT_MEMLOCK in bytes; `None`: no limit.
    pub limit: Option<u64>,
    /// Bytes pinned by registrations (VmPin in /proc/self/status).
    pub pinned: u64,
    /// CAP_IPC_LOCK: the limit does not count.
    pub privileged: bool,
}

/// More has to be pinned than may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "{} of memory must be pinned for the device and this process may pin {} more ({}); raise it: `ulimit -l unlimited` in the shell \
     that starts it, LimitMEMLOCK=infinity in its systemd unit, or give it CAP_IPC_LOCK",
    Bytes(*.need), Bytes(*.have), .memory
)]
pub struct MemlockTooLow {
    pub need: u64,
    pub have: u64,
    pub memory: LockedMemory,
}

impl LockedMemory {
    /// As it is now.
    pub fn now() -> Self {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let told = Self::parse(&status, getrlimit(Resource::Memlock).current);
        Self { privileged: told.privileged && in_initial_user_namespace(), ..told }
    }

    /// A status that does not say counts as nothing pinned and no privilege.
    fn parse(status: &str, limit: Option<u64>) -> Self {
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.map(|value| value.trim().trim_end_matches(" kB").to_owned())
        };
        let pinned = field("VmPin").and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) * 1024;
        let capabilities = field("CapEff").and_then(|mask| u64::from_str_radix(&mask, 16).ok()).unwrap_or(0);
        Self { limit, pinned, privileged: capabilities >> CAP_IPC_LOCK & 1 == 1 }
    }

    /// Bytes that may still be pinned; `None`: as many as there are.
    pub fn left(&self) -> Option<u64> {
        if self.privileged { None } else { self.limit.map(|limit| limit.saturating_sub(self.pinned)) }
    }

    /// Fails when `need` more bytes may not be pinned.
    pub fn check(self, need: u64) -> Result<(), MemlockTooLow> {
        match self.left() {
            Some(have) if have < need => Err(MemlockTooLow { need, have, memory: self }),
            _ => Ok(()),
        }
    }
}

/// The kernel asks for the capability in the initial namespace: a rootless container's own is none there (user_namespaces(7)).
fn in_initial_user_namespace() -> bool {
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    map.split_whitespace().eq(["0", "0", "4294967295"])
}

impl fmt::Display for LockedMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.limit {
            None => write!(f, "no RLIMIT_MEMLOCK")?,
            Some(limit) => write!(f, "RLIMIT_MEMLOCK {}", Bytes(limit))?,
        }
        write!(f, ", {} pinned already", Bytes(self.pinned))?;
        if self.privileged { write!(f, ", CAP_IPC_LOCK held") } else { write!(f, ", no CAP_IPC_LOCK") }
    }
}

/// Bytes for people.
struct Bytes(u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            n if n >= 1 << 30 => write!(f, "{:.2} GiB", n as f64 / f64::from(1 << 30)),
            n if n >= 1 << 20 => write!(f, "{:.1} MiB", n as f64 / f64::from(1 << 20)),
            n => write!(f, "{} KiB", n.div_ceil(1024)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: &str = "Name:\tbelay\nVmLck:\t       8 kB\nVmPin:\t    2048 kB\nCapInh:\t0000000000000000\nCapEff:\t0000000000003000\n";

    #[test]
    fn a_limit_that_is_too_low_says_what_is_needed_what_there_is_and_what_to_do() {
        let memory = LockedMemory::parse(STATUS, Some(8 << 20));
        assert_eq!(memory, LockedMemory { limit: Some(8 << 20), pinned: 2 << 20, privileged: false });
        assert_eq!(memory.left(), Some(6 << 20));
        assert_eq!(memory.check(6 << 20), Ok(()));
        let text = memory.check(4 << 30).unwrap_err().to_string();
        for part in
            ["4.00 GiB", "6.0 MiB more", "RLIMIT_MEMLOCK 8.0 MiB", "2.0 MiB pinned", "ulimit -l", "CAP_IPC_LOCK"]
        {
            assert!(text.contains(part), "{part} is not in: {text}");
        }
    }

    #[test]
    fn the_limit_does_not_count_for_who_is_privileged_or_has_none() {
        let privileged = STATUS.replace("3000", "4000");
        assert_eq!(LockedMemory::parse(&privileged, Some(0)).check(1 << 40), Ok(()));
        assert_eq!(LockedMemory::parse(STATUS, None).check(1 << 40), Ok(()));
        assert!(LockedMemory::parse("", Some(4096)).check(8192).is_err(), "a status that says nothing grants nothing");
    }

    #[test]
    fn this_process_knows_its_own() {
        let memory = LockedMemory::now();
        assert_eq!(memory.limit, getrlimit(Resource::Memlock).current);
        // Nothing here has a device to pin for.
        assert_eq!(memory.pinned, 0);
    }
}
