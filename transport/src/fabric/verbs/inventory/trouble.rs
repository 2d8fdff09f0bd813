//! What can stand between a host and RDMA, and what mends it.

use super::super::MemlockTooLow;
use super::{GidKind, PortState};
use belay_verbs_sys::LoadError;
use std::io;
use std::path::PathBuf;

fn listed(names: &[String]) -> String {
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

/// One thing that is wrong. Its text says what and what to do; [`Trouble::mend`] has the commands.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Trouble {
    /// No library, or one that lacks symbols.
    #[error(transparent)]
    Library(#[from] LoadError),
    #[error(
        "the kernel has no RDMA core (there is no /sys/class/infiniband): load ib_uverbs, rdma_ucm and the device's driver"
    )]
    NoKernelModule,
    #[error("there is no RDMA device: load the driver of this host's NIC, or lay SoftRoCE over an Ethernet interface")]
    NoDevice,
    #[error("there is no RDMA device {asked} (there are: {})", listed(.have))]
    NoSuchDevice { asked: String, have: Vec<String> },
    #[error("{device} has no port {asked} (it has {ports} of them, from 1)")]
    NoSuchPort { device: String, asked: u8, ports: usize },
    #[error(
        "{device} has reliable connections of no kind belay knows (InfiniBand, RoCE, iWARP); use another device or --fabric tcp"
    )]
    OtherTransport { device: String },
    #[error("{device} has no file /dev/infiniband/uverbsN: load ib_uverbs, or give the file to this container")]
    NoUverbs { device: String },
    #[error("this user may not read and write {path}, which {device} needs")]
    UverbsDenied { device: String, path: PathBuf },
    #[error(
        "libibverbs has no driver for {device}: install rdma-core's provider libraries (Debian and Ubuntu: ibverbs-providers)"
    )]
    NoDriver { device: String },
    #[error("{device}: {doing} failed: {}", io::Error::from_raw_os_error(*.errno))]
    NoAnswer { device: String, doing: &'static str, errno: i32 },
    #[error("there is no {path}: load rdma_ucm, or give the file to this container; connections are made through it")]
    NoConnectionManager { path: PathBuf },
    #[error("this user may not read and write {path}, through which connections are made")]
    ConnectionManagerDenied { path: PathBuf },
    /// Less memory may be pinned than must be.
    #[error(transparent)]
    Memlock(#[from] MemlockTooLow),
    #[error(
        "port {port} of {device} is INIT: its link is up and waits for the subnet manager of this InfiniBand network"
    )]
    NoSubnetManager { device: String, port: u8 },
    #[error("port {port} of {device} is {state}: bring its link up")]
    PortDown { device: String, port: u8, state: PortState, netdev: Option<String> },
    #[error("port {port} of {device} has no GID: give its network interface an address")]
    NoGid { device: String, port: u8 },
    #[error("port {port} of {device} has no GID with index {asked} (it has: {})", listed(.have))]
    NoSuchGid { device: String, port: u8, asked: u32, have: Vec<String> },
    #[error(
        "GID {index} of port {port} of {device} is {is}, and {asked} was asked for; of that kind are: {}", listed(.have)
    )]
    OtherGidKind { device: String, port: u8, index: u32, is: GidKind, asked: GidKind, have: Vec<String> },
}

impl Trouble {
    /// Commands that mend it, alternatives one an entry; none where no command can.
    pub fn mend(&self) -> Vec<String> {
        let commands: &[&str] = match self {
            Self::Library(_) => {
                &["sudo apt install libibverbs1 librdmacm1 ibverbs-providers", "sudo dnf install libibverbs librdmacm"]
            }
            Self::NoKernelModule => &["sudo modprobe -a ib_uverbs rdma_ucm"],
            Self::NoDevice => &[
                "sudo modprobe mlx5_ib   # or bnxt_re, irdma, qedr, iw_cxgb4: lspci -k names the NIC",
                "sudo rdma link add rxe0 type rxe netdev DEV   # SoftRoCE, in software",
            ],
            Self::NoUverbs { .. } => &["sudo modprobe ib_uverbs"],
            Self::NoDriver { .. } => &["sudo apt install ibverbs-providers"],
            Self::NoConnectionManager { .. } => &["sudo modprobe rdma_ucm"],
            Self::Memlock(_) => &[
                "ulimit -l unlimited",
                "echo \"$USER - memlock unlimited\" | sudo tee /etc/security/limits.d/belay.conf   # then log in again",
            ],
            Self::NoSubnetManager { .. } => &["sudo systemctl start opensm   # on one host of the network"],
            Self::PortDown { netdev, .. } => {
                return vec![format!("sudo ip link set {} up", netdev.as_deref().unwrap_or("DEV"))];
            }
            Self::NoGid { .. } => &["sudo ip address add ADDRESS/24 dev DEV"],
            Self::UverbsDenied { path, .. } | Self::ConnectionManagerDenied { path } => {
                // rdma-core's udev rules open these files to everyone; without the package they are root's.
                return vec![
                    "sudo apt install rdma-core   # its udev rules; then load the driver again".to_owned(),
                    format!("sudo setfacl -m u:$USER:rw {}", path.display()),
                ];
            }
            Self::NoSuchDevice { .. }
            | Self::NoSuchPort { .. }
            | Self::OtherTransport { .. }
            | Self::NoAnswer { .. }
            | Self::NoSuchGid { .. }
            | Self::OtherGidKind { .. } => &[],
        };
        commands.iter().map(|command| (*command).to_owned()).collect()
    }
}
