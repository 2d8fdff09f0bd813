//! Devices, ports and GIDs as the kernel lists them (Documentation/ABI/stable/sysfs-class-infiniband).

use super::{Asked, Device, Gid, GidKind, Port, PortState, Transport};
use std::fs;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};

/// Where the devices are listed.
pub(super) fn class(sys: &Path) -> PathBuf {
    sys.join("class/infiniband")
}

fn read(path: impl AsRef<Path>) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

/// Names in a directory, sorted.
fn names(path: &Path) -> Vec<String> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// The number at the beginning of "4: ACTIVE".
fn leading_number(text: &str) -> Option<u32> {
    text.split(':').next()?.trim().parse().ok()
}

/// Every device, its device file and its own answers left open.
pub(super) fn devices(sys: &Path) -> Vec<Device> {
    let class = class(sys);
    names(&class).into_iter().map(|name| device(sys, &class.join(&name), name)).collect()
}

fn device(sys: &Path, at: &Path, name: String) -> Device {
    // "4: RNIC" is iWARP's; with all others the link layer of the port tells.
    let is_rnic = read(at.join("node_type")).and_then(|text| leading_number(&text)) == Some(4);
    let is_ca = read(at.join("node_type")).and_then(|text| leading_number(&text)) == Some(1);
    let mut ports: Vec<Port> = names(&at.join("ports"))
        .into_iter()
        .filter_map(|number| {
            let number: u8 = number.parse().ok()?;
            let at = at.join("ports").join(number.to_string());
            let transport = match read(at.join("link_layer")).as_deref() {
                _ if is_rnic => Transport::Iwarp,
                Some("Ethernet") if is_ca => Transport::Roce,
                Some("InfiniBand") if is_ca => Transport::InfiniBand,
                _ => Transport::Other,
            };
            Some(port(&at, number, transport))
        })
        .collect();
    ports.sort_by_key(|port| port.number);
    let numa_node = numa_node(sys, at, &ports);
    Device { name, numa_node, uverbs: None, ports, asked: Asked::NotAsked }
}

/// A software device has no bus of its own: its interface's counts.
fn numa_node(sys: &Path, at: &Path, ports: &[Port]) -> Option<u32> {
    let node = |path: PathBuf| -> Option<u32> { read(path)?.parse().ok() };
    let of_netdev = || {
        let netdev = ports.iter().flat_map(|port| &port.gids).find_map(|gid| gid.netdev.as_ref())?;
        node(sys.join("class/net").join(netdev).join("device/numa_node"))
    };
    node(at.join("device/numa_node")).or_else(of_netdev)
}

fn port(at: &Path, number: u8, transport: Transport) -> Port {
    let state = match read(at.join("state")).and_then(|text| leading_number(&text)) {
        Some(1) => PortState::Down,
        Some(2) => PortState::Init,
        Some(3) => PortState::Armed,
        Some(4) => PortState::Active,
        Some(number) => PortState::Unknown(number),
        None => PortState::Unknown(0),
    };
    let lid = read(at.join("lid")).and_then(|text| u16::from_str_radix(text.strip_prefix("0x")?, 16).ok());
    Port {
        number,
        state,
        transport,
        lid: lid.unwrap_or(0),
        rate: read(at.join("rate")),
        active_mtu_bytes: None,
        gids: gids(at, transport),
    }
}

/// Entries that hold a GID. An empty one reads as zeroes, and its type cannot be read.
fn gids(at: &Path, transport: Transport) -> Vec<Gid> {
    let mut gids: Vec<Gid> = names(&at.join("gids"))
        .into_iter()
        .filter_map(|index| {
            let gid: Ipv6Addr = read(at.join("gids").join(&index))?.parse().ok()?;
            // A subnet's prefix alone is no GID either; iWARP has a MAC address at the front and nothing behind.
            if gid.is_unspecified() || transport != Transport::Iwarp && gid.segments()[4..] == [0; 4] {
                return None;
            }
            let of_type = read(at.join("gid_attrs/types").join(&index));
            let kind = match (transport, of_type.as_deref()) {
                (Transport::Iwarp, _) => GidKind::Iwarp,
                (Transport::Roce, Some("RoCE v2")) => GidKind::RoceV2,
                (Transport::Roce, Some("IB/RoCE v1")) => GidKind::RoceV1,
                (Transport::Roce, _) => return None,
                _ => GidKind::InfiniBand,
            };
            let netdev = read(at.join("gid_attrs/ndevs").join(&index)).filter(|name| !name.is_empty());
            Some(Gid { index: index.parse().ok()?, gid, kind, netdev })
        })
        .collect();
    gids.sort_by_key(|gid| gid.index);
    gids
}

/// The name of a device's file below /dev/infiniband.
pub(super) fn uverbs(sys: &Path, device: &str) -> Option<String> {
    let class = sys.join("class/infiniband_verbs");
    names(&class).into_iter().find(|name| read(class.join(name).join("ibdev")).as_deref() == Some(device))
}
