//! NUMA: threads and buffers near the device that carries a session.
//!
//! A device reaches memory of its own node by the shortest way, and so does a thread that polls its completions. What is *near* is
//! decided once a session: the operator's word, else the device's node in sysfs. Where there is one node, or nothing is known, nothing
//! is done, and said. (Documentation/admin-guide/mm/numa_memory_policy.rst, sched_setaffinity(2), mbind(2))

use crate::region::Mapping;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io;
use std::path::Path;
use std::str::FromStr;

/// What the operator says about placement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum NumaChoice {
    /// The node of the device that carries the session, if there is one and the process was not given a memory policy of its own.
    #[default]
    Auto,
    /// This node.
    Node(u32),
    /// Nothing is placed.
    Off,
}

impl FromStr for NumaChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "off" => Ok(Self::Off),
            number => match number.parse() {
                Ok(node) => Ok(Self::Node(node)),
                Err(_) => {
                    Err(format!("{text:?} is neither auto, off nor the number of a NUMA node (see `numactl -H`)"))
                }
            },
        }
    }
}

impl fmt::Display for NumaChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Node(node) => node.fmt(f),
            Self::Off => f.write_str("off"),
        }
    }
}

/// A node that the operator named and that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NumaError {
    #[error("this machine has no NUMA node {node}; it has {have:?}: choose one with --numa-node, or auto")]
    NoSuchNode { node: u32, have: Vec<u32> },
}

/// Where a session's threads and buffers go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Placement {
    /// Near one node.
    Near(Node),
    /// Wherever the kernel likes, and why.
    Anywhere { why: String },
}

/// A node to be near to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    pub number: u32,
    /// Its processors that this process may use; none on a node of memory only.
    pub cpus: Vec<usize>,
}

/// Nodes that a mask given to the kernel has room for.
const MOST_NODES: usize = 1024;
/// linux/mempolicy.h
const MPOL_DEFAULT: i32 = 0;
const MPOL_PREFERRED: i32 = 1;

impl Placement {
    /// Decides for a session whose device is attached to `device_node`.
    pub fn decide(choice: NumaChoice, device_node: Option<u32>) -> Result<Self, NumaError> {
        let allowed = sched_getaffinity(None).ok();
        let may_use = |cpu: usize| allowed.as_ref().is_none_or(|allowed| cpu < CpuSet::MAX_CPU && allowed.is_set(cpu));
        Self::decide_in(Path::new("/sys/devices/system/node"), choice, device_node, has_policy(), &may_use)
    }

    /// As [`Placement::decide`] on a machine whose nodes are described under `nodes`.
    fn decide_in(
        nodes: &Path,
        choice: NumaChoice,
        device_node: Option<u32>,
        has_policy: bool,
        may_use: &dyn Fn(usize) -> bool,
    ) -> Result<Self, NumaError> {
        let anywhere = |why: &str| Ok(Self::Anywhere { why: why.to_owned() });
        let read = |path: &str| std::fs::read_to_string(nodes.join(path)).ok().and_then(|text| list(&text));
        // A kernel that knows no nodes has one.
        let have: Vec<u32> = read("online").unwrap_or_else(|| vec![0]).into_iter().map(|node| node as u32).collect();
        let number = match choice {
            NumaChoice::Off => return anywhere("switched off"),
            NumaChoice::Node(node) if !have.contains(&node) => return Err(NumaError::NoSuchNode { node, have }),
            _ if have.len() < 2 => return anywhere("this machine has one NUMA node"),
            NumaChoice::Node(node) => node,
            NumaChoice::Auto if has_policy => {
                return anywhere("this process was started with a memory policy of its own (numactl)");
            }
            NumaChoice::Auto => match device_node.filter(|node| have.contains(node)) {
                Some(node) => node,
                None => return anywhere("no device of this session is attached to a known node"),
            },
        };
        let cpus = read(&format!("node{number}/cpulist")).unwrap_or_default();
        Ok(Self::Near(Node { number, cpus: cpus.into_iter().filter(|cpu| may_use(*cpu)).collect() }))
    }

    /// Asks for the frames of `mapping`, and of its file behind it, to be taken from the node while it has any (MPOL_PREFERRED): to be
    /// called before they are allocated. A kernel that does not place memory takes it for done.
    pub fn prefer(&self, mapping: &Mapping) -> io::Result<()> {
        let Self::Near(node) = self else { return Ok(()) };
        let mut mask = [0_u64; MOST_NODES / 64];
        let number = node.number as usize;
        let Some(word) = mask.get_mut(number / 64) else { return Err(io::Error::from_raw_os_error(libc::EINVAL)) };
        *word |= 1 << (number % 64);
        // SAFETY: the range is one mapping; the mask is readable for as many bits (the kernel counts one more than it reads); the
        // policy decides where frames come from and changes no content.
        let done = unsafe {
            libc::syscall(
                libc::SYS_mbind,
                mapping.as_ptr(),
                mapping.len(),
                MPOL_PREFERRED,
                mask.as_ptr(),
                MOST_NODES + 1,
                0,
            )
        };
        match done {
            0 => Ok(()),
            _ => match io::Error::last_os_error() {
                error if error.raw_os_error() == Some(libc::ENOSYS) => Ok(()),
                error => Err(error),
            },
        }
    }

    /// Runs `work` with this thread on the node's processors: threads it starts inherit them for good (sched_setaffinity(2)), and
    /// memory it touches first comes from the node. The thread itself is as free as before afterwards.
    pub fn run_near<T>(&self, work: impl FnOnce() -> T) -> T {
        let before = match self {
            Self::Near(node) if !node.cpus.is_empty() => sched_getaffinity(None).ok().filter(|_| {
                let mut near = CpuSet::new();
                node.cpus.iter().filter(|cpu| **cpu < CpuSet::MAX_CPU).for_each(|cpu| near.set(*cpu));
                // Processors taken away since cost speed and nothing else.
                sched_setaffinity(None, &near).is_ok()
            }),
            _ => None,
        };
        let _back = Back(before);
        work()
    }
}

/// Gives a thread its processors back.
struct Back(Option<CpuSet>);

impl Drop for Back {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = sched_setaffinity(None, before);
        }
    }
}

impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Near(Node { number, cpus }) if cpus.is_empty() => {
                write!(f, "buffers on NUMA node {number}, threads anywhere (it has no processors for this process)")
            }
            Self::Near(Node { number, .. }) => write!(f, "threads and buffers on NUMA node {number}"),
            Self::Anywhere { why } => write!(f, "threads and buffers anywhere: {why}"),
        }
    }
}

/// Whether this thread has a memory policy other than the kernel's own.
fn has_policy() -> bool {
    let mut mode: libc::c_int = MPOL_DEFAULT;
    // SAFETY: the mode may be written; no mask and no address are asked about.
    let asked = unsafe {
        libc::syscall(libc::SYS_get_mempolicy, &raw mut mode, std::ptr::null_mut::<u64>(), 0, std::ptr::null::<u8>(), 0)
    };
    asked == 0 && mode != MPOL_DEFAULT
}

/// A list as sysfs has them: `0-3,8,10-11`.
fn list(text: &str) -> Option<Vec<usize>> {
    let mut numbers = Vec::new();
    for part in text.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.parse::<usize>().ok()?, last.parse::<usize>().ok()?);
        // No machine has more, and a list that says so is none.
        if last >= 1 << 16 {
            return None;
        }
        numbers.extend(first..=last);
    }
    Some(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::region::RamFile;
    use crate::units::PageSize;

    /// The nodes of a machine that is not there.
    fn machine(nodes: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in nodes {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, format!("{text}\n")).unwrap();
        }
        root
    }

    fn two_sockets() -> tempfile::TempDir {
        machine(&[
            ("online", "0-2"),
            ("node0/cpulist", "0-3,8-11"),
            ("node1/cpulist", "4-7,12-15"),
            ("node2/cpulist", ""),
        ])
    }

    fn decide(machine: &tempfile::TempDir, choice: NumaChoice, device: Option<u32>) -> Result<Placement, NumaError> {
        Placement::decide_in(machine.path(), choice, device, false, &|_| true)
    }

    #[test]
    fn by_itself_a_session_goes_near_its_device() {
        let near = decide(&two_sockets(), NumaChoice::Auto, Some(1)).unwrap();
        assert_eq!(near, Placement::Near(Node { number: 1, cpus: vec![4, 5, 6, 7, 12, 13, 14, 15] }));
        assert_eq!(near.to_string(), "threads and buffers on NUMA node 1");
    }

    #[test]
    fn the_operators_word_goes_before_the_device() {
        let machine = two_sockets();
        let at = |choice| decide(&machine, choice, Some(1)).unwrap();
        assert!(matches!(at(NumaChoice::Node(0)), Placement::Near(Node { number: 0, .. })));
        assert_eq!(at(NumaChoice::Off), Placement::Anywhere { why: "switched off".to_owned() });
        let refused = decide(&machine, NumaChoice::Node(7), Some(1)).unwrap_err();
        assert!(refused.to_string().contains("no NUMA node 7; it has [0, 1, 2]"), "{refused}");
    }

    #[test]
    fn where_nothing_can_be_placed_nothing_is_and_the_reason_is_said() {
        let one = machine(&[("online", "0"), ("node0/cpulist", "0-1")]);
        for machine in [&one, &machine(&[])] {
            let said = decide(machine, NumaChoice::Auto, Some(0)).unwrap().to_string();
            assert_eq!(said, "threads and buffers anywhere: this machine has one NUMA node");
        }
        assert!(decide(&one, NumaChoice::Node(1), None).is_err(), "a wrong word is wrong on a small machine too");
        let machine = two_sockets();
        for device in [None, Some(9)] {
            let placement = decide(&machine, NumaChoice::Auto, device).unwrap();
            assert!(matches!(placement, Placement::Anywhere { .. }), "{placement}");
        }
        let placed = Placement::decide_in(machine.path(), NumaChoice::Auto, Some(1), true, &|_| true).unwrap();
        assert!(placed.to_string().contains("memory policy of its own"), "{placed}");
    }

    #[test]
    fn processors_that_this_process_may_not_use_are_left_out() {
        let machine = two_sockets();
        let near = |node, may_use: &dyn Fn(usize) -> bool| {
            Placement::decide_in(machine.path(), NumaChoice::Node(node), None, true, may_use).unwrap()
        };
        assert_eq!(near(1, &|cpu| cpu < 6), Placement::Near(Node { number: 1, cpus: vec![4, 5] }));
        let memory_only = near(2, &|_| true);
        assert_eq!(
            memory_only.to_string(),
            "buffers on NUMA node 2, threads anywhere (it has no processors for this process)"
        );
        assert_eq!(memory_only.run_near(|| 7), 7);
    }

    #[test]
    fn threads_started_near_stay_there_and_their_starter_comes_back() {
        let before = sched_getaffinity(None).unwrap();
        let Some(cpu) = (0..CpuSet::MAX_CPU).find(|cpu| before.is_set(*cpu)) else { return };
        let near = Placement::Near(Node { number: 0, cpus: vec![cpu] });
        let started = near.run_near(|| std::thread::spawn(|| sched_getaffinity(None).unwrap()));
        let inherited = started.join().unwrap();
        assert_eq!((inherited.count(), inherited.is_set(cpu)), (1, true));
        assert_eq!(sched_getaffinity(None).unwrap(), before);
        let panicked = std::panic::catch_unwind(|| near.run_near(|| panic!("as an engine that cannot start")));
        assert!(panicked.is_err());
        assert_eq!(sched_getaffinity(None).unwrap(), before, "given back whatever happens");
    }

    #[test]
    fn a_buffer_is_asked_for_on_its_node_and_the_kernel_remembers() {
        let file = RamFile::memfd("numa", 1 << 20, PageSize::Small).unwrap();
        let mapping = file.map().unwrap();
        let first = Placement::Near(Node { number: 0, cpus: Vec::new() });
        if let Err(error) = first.prefer(&mapping) {
            eprintln!("skipped: this process may not set a memory policy: {error}");
            return;
        }
        file.preallocate_through(&mapping, 1, &|_| ()).unwrap();
        let maps = std::fs::read_to_string("/proc/self/numa_maps").unwrap_or_default();
        let line = maps.lines().find(|line| line.starts_with(&format!("{:x} ", mapping.address())));
        match line {
            Some(line) => assert!(line.contains("prefer:0"), "{line}"),
            None => eprintln!("skipped: this kernel does not say where memory lies"),
        }
        let none = Placement::Near(Node { number: 1023, cpus: Vec::new() });
        assert!(none.prefer(&mapping).is_err(), "a node that is not there is told");
        assert!(Placement::Anywhere { why: String::new() }.prefer(&mapping).is_ok());
    }

    #[test]
    fn choices_are_read_as_they_are_written() {
        for choice in [NumaChoice::Auto, NumaChoice::Node(3), NumaChoice::Off] {
            assert_eq!(choice.to_string().parse(), Ok(choice));
        }
        assert!("near".parse::<NumaChoice>().unwrap_err().contains("numactl -H"));
    }
}
