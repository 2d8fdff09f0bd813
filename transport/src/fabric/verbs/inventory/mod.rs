//! What this host has for RDMA, and what it lacks: libraries, device files, devices, ports, GIDs and limits.
//!
//! Looking changes nothing. Most of it is read from sysfs, which also works where the libraries are missing or this user may
//! not open a device; limits and the active MTU come from the device itself. What is wrong is a [`Trouble`], each kind with
//! its mend.

mod ask;
mod choose;
mod sysfs;
mod trouble;

pub use choose::Choice;
pub use trouble::Trouble;

use super::registration::LockedMemory;
pub use belay_verbs_sys::LoadError;
use std::fmt;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};

/// What carries a device's packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    InfiniBand,
    /// RDMA over Converged Ethernet; version 1 or 2 is a matter of the GID.
    Roce,
    /// RDMA over TCP.
    Iwarp,
    /// Something that has no reliable connections that belay could use.
    Other,
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::InfiniBand => "InfiniBand",
            Self::Roce => "RoCE",
            Self::Iwarp => "iWARP",
            Self::Other => "another transport",
        })
    }
}

/// A port's logical state (ibv_query_port(3)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PortState {
    Down,
    /// The link is up and waits for a subnet manager.
    Init,
    Armed,
    Active,
    /// A number that none of these has.
    Unknown(u32),
}

impl fmt::Display for PortState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Down => f.write_str("DOWN"),
            Self::Init => f.write_str("INIT"),
            Self::Armed => f.write_str("ARMED"),
            Self::Active => f.write_str("ACTIVE"),
            Self::Unknown(number) => write!(f, "in state {number}"),
        }
    }
}

/// Which packets a GID stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GidKind {
    InfiniBand,
    /// Ethernet frames; does not cross routers.
    RoceV1,
    /// UDP, port 4791.
    RoceV2,
    Iwarp,
}

impl fmt::Display for GidKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::InfiniBand => "InfiniBand",
            Self::RoceV1 => "RoCE v1",
            Self::RoceV2 => "RoCE v2",
            Self::Iwarp => "iWARP",
        })
    }
}

/// One valid entry of a port's GID table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gid {
    /// perftest's `-x`.
    pub index: u32,
    pub gid: Ipv6Addr,
    pub kind: GidKind,
    /// The network interface it belongs to; none on InfiniBand.
    pub netdev: Option<String>,
}

impl fmt::Display for Gid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // An IPv4 address in its IPv6 form is what a person looks for.
        match self.gid.to_ipv4_mapped() {
            Some(v4) => write!(f, "{}: {v4} {}", self.index, self.kind)?,
            None => write!(f, "{}: {} {}", self.index, self.gid, self.kind)?,
        }
        match &self.netdev {
            Some(netdev) => write!(f, " on {netdev}"),
            None => Ok(()),
        }
    }
}

/// One port of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    /// From 1; perftest's `-i`.
    pub number: u8,
    pub state: PortState,
    pub transport: Transport,
    /// Local identifier on an InfiniBand subnet; 0 elsewhere.
    pub lid: u16,
    /// As the kernel prints it: "100 Gb/sec (4X EDR)".
    pub rate: Option<String>,
    /// Path MTU now, bytes. None where the device could not be asked.
    pub active_mtu_bytes: Option<u32>,
    /// Valid entries only, by index.
    pub gids: Vec<Gid>,
}

/// What a device can do at most (ibv_query_device_ex(3)).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    pub firmware: String,
    /// Memory regions.
    pub max_mr: u32,
    /// Bytes of one memory region.
    pub max_mr_size: u64,
    /// READs that a queue pair can answer at a time.
    pub max_qp_rd_atom: u32,
    /// READs that a queue pair can have outstanding.
    pub max_qp_init_rd_atom: u32,
    /// Work requests of one queue.
    pub max_qp_wr: u32,
    /// Entries of one completion queue.
    pub max_cqe: u32,
    /// Pieces of one work request.
    pub max_sge: u32,
    pub on_demand: OnDemand,
}

/// Paging on demand on reliable connections: memory that is registered without being pinned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnDemand {
    /// This build cannot ask ([`belay_verbs_sys::extended_available`]).
    Unknown,
    None,
    Some {
        /// A peer's READs may find pages absent.
        read: bool,
        /// A peer's WRITEs may.
        write: bool,
    },
}

/// What became of asking a device itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Asked {
    Answered(Limits),
    /// The libraries are not there to ask through.
    NotAsked,
    /// libibverbs does not list what the kernel has: it has no driver for it.
    NoDriver,
    /// It did not open, or did not answer; an errno.
    Failed {
        doing: &'static str,
        errno: i32,
    },
}

/// Whether this process may read and write a device file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    Usable,
    Denied,
    Absent,
}

/// A device file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceFile {
    pub path: PathBuf,
    pub access: Access,
}

/// One RDMA device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// perftest's `-d`.
    pub name: String,
    /// The NUMA node it is attached to; none where the host has but one or it is not a device of a bus.
    pub numa_node: Option<u32>,
    /// `/dev/infiniband/uverbsN`; none when the kernel made none (ib_uverbs is not loaded).
    pub uverbs: Option<DeviceFile>,
    pub ports: Vec<Port>,
    pub asked: Asked,
}

impl Device {
    /// What carries its packets: what its ports say.
    pub fn transport(&self) -> Transport {
        self.ports.first().map_or(Transport::Other, |port| port.transport)
    }
}

/// The two libraries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Libraries {
    pub ibverbs: PathBuf,
    pub rdmacm: PathBuf,
}

impl Libraries {
    /// Their versions, as far as their files' names say them: "libibverbs 1.14.44.0, librdmacm 1.3.44.0".
    pub fn versions(&self) -> String {
        let version = |path: &Path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            match name.split_once(".so.") {
                Some((library, version)) => format!("{library} {version}"),
                None => name,
            }
        };
        format!("{}, {}", version(&self.ibverbs), version(&self.rdmacm))
    }
}

/// What this host has for RDMA.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inventory {
    pub libraries: Result<Libraries, LoadError>,
    /// Whether the kernel's RDMA core is there at all.
    pub kernel: bool,
    /// In the order of their names.
    pub devices: Vec<Device>,
    /// `/dev/infiniband/rdma_cm`.
    pub rdma_cm: DeviceFile,
    pub memory: LockedMemory,
}

/// Where to look.
#[derive(Debug, Clone)]
struct Roots {
    /// `/sys`.
    sys: PathBuf,
    /// `/dev/infiniband`.
    dev: PathBuf,
}

/// What a device says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Answer {
    limits: Limits,
    /// Port number and path MTU in bytes.
    mtus: Vec<(u8, u32)>,
}

/// What libibverbs lists: each device by name, with its answer or with what failed.
type Answers = Vec<(String, Result<Answer, (&'static str, i32)>)>;

impl Inventory {
    /// Looks at this host. Opens each device once to ask for its limits.
    pub fn of_this_host() -> Self {
        let roots = Roots { sys: "/sys".into(), dev: "/dev/infiniband".into() };
        Self::at(&roots, &access, LockedMemory::now(), &ask::all)
    }

    /// Looks at a tree like this host's, with given answers to what a file cannot tell.
    fn at(
        roots: &Roots,
        access: &dyn Fn(&Path) -> Access,
        memory: LockedMemory,
        ask: &dyn Fn() -> Result<(Libraries, Answers), LoadError>,
    ) -> Self {
        let file = |path: PathBuf| DeviceFile { access: access(&path), path };
        let (libraries, answers) = match ask() {
            Ok((libraries, answers)) => (Ok(libraries), Some(answers)),
            Err(error) => (Err(error), None),
        };
        let mut devices = sysfs::devices(&roots.sys);
        for device in &mut devices {
            device.uverbs = sysfs::uverbs(&roots.sys, &device.name).map(|name| file(roots.dev.join(name)));
            let Some(answers) = &answers else { continue };
            match answers.iter().find(|(name, _)| *name == device.name) {
                None => device.asked = Asked::NoDriver,
                Some((_, Err((doing, errno)))) => device.asked = Asked::Failed { doing, errno: *errno },
                Some((_, Ok(answer))) => {
                    for port in &mut device.ports {
                        port.active_mtu_bytes =
                            answer.mtus.iter().find(|(number, _)| *number == port.number).map(|(_, mtu)| *mtu);
                    }
                    device.asked = Asked::Answered(answer.limits.clone());
                }
            }
        }
        let kernel = sysfs::class(&roots.sys).is_dir();
        Self { libraries, kernel, devices, rdma_cm: file(roots.dev.join("rdma_cm")), memory }
    }
}

/// What this process may do with a device file.
fn access(path: &Path) -> Access {
    use rustix::fs::{Access as Right, AtFlags, CWD, accessat};
    match accessat(CWD, path, Right::READ_OK | Right::WRITE_OK, AtFlags::EACCESS) {
        Ok(()) => Access::Usable,
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => Access::Absent,
        Err(_) => Access::Denied,
    }
}

#[cfg(test)]
mod tests;
