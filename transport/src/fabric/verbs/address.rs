//! Which device, port and address carry a session, found from what the operator says and what the host has.
//!
//! rdma_cm knows devices by IP address. So a device, port and GID index (perftest's `-d -i -x`) are turned into the address to
//! bind: a RoCE v2 GID is an IP address (IPv4 mapped into IPv6), and where it is not one (InfiniBand, iWARP) the address is that
//! of the network interface on the port (IPoIB's). Without a word from the operator it is the session's own address, if an RDMA
//! port stands behind it; else that of the only active port there is.
//!
//! Everything is read from sysfs, so it can be told (and tested) without a device.

use super::VerbsSettings;
use super::error::VerbsError;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

/// Most entries of a GID table that are looked at.
const MAX_GIDS: u16 = 1024;

/// What a port's GID table says of one entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Gid {
    pub index: u16,
    pub gid: Ipv6Addr,
    /// As the kernel says: "RoCE v2", "IB/RoCE v1".
    pub kind: String,
    /// The network interface it belongs to, where there is one.
    pub interface: Option<String>,
}

/// A port that is up.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Port {
    device: String,
    port: u8,
    is_ethernet: bool,
    is_iwarp: bool,
    gids: Vec<Gid>,
}

/// Where a session's RDMA begins on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Local {
    pub device: String,
    pub port: u8,
    /// The address that rdma_cm binds; its port is 0.
    pub address: SocketAddr,
    /// The GID index that was asked for.
    pub gid_index: Option<u16>,
}

/// The host as sysfs and the interfaces show it.
pub(super) struct Host {
    devices: PathBuf,
    /// Name, address and interface index of every interface address.
    interfaces: Vec<(String, IpAddr, u32)>,
}

impl Host {
    pub(super) fn this() -> Result<Self, VerbsError> {
        let interfaces = interface_addresses().map_err(|source| VerbsError::Call {
            call: "getifaddrs",
            doing: "looking at the host's addresses".to_owned(),
            source,
        })?;
        Ok(Self { devices: PathBuf::from("/sys/class/infiniband"), interfaces })
    }

    fn read(&self, path: impl AsRef<Path>) -> Option<String> {
        Some(std::fs::read_to_string(self.devices.join(path)).ok()?.trim().to_owned())
    }

    fn names(&self, path: impl AsRef<Path>) -> Vec<String> {
        let entries = std::fs::read_dir(self.devices.join(path)).into_iter().flatten().flatten();
        let mut names: Vec<_> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort_unstable();
        names
    }

    fn ports(&self, device: &str) -> Vec<u8> {
        let mut ports: Vec<u8> =
            self.names(format!("{device}/ports")).iter().filter_map(|name| name.parse().ok()).collect();
        ports.sort_unstable();
        ports
    }

    /// "ACTIVE", "DOWN", … of a port.
    fn state(&self, device: &str, port: u8) -> String {
        let state = self.read(format!("{device}/ports/{port}/state")).unwrap_or_default();
        // "4: ACTIVE"
        state.rsplit(": ").next().unwrap_or_default().to_owned()
    }

    /// One entry of a GID table, if it is in use.
    pub(super) fn gid(&self, device: &str, port: u8, index: u16) -> Option<Gid> {
        let base = format!("{device}/ports/{port}");
        let gid: Ipv6Addr = self.read(format!("{base}/gids/{index}"))?.parse().ok()?;
        if gid.is_unspecified() {
            return None;
        }
        // Reading these of an unused entry is an error; InfiniBand has no interface there.
        let kind = self.read(format!("{base}/gid_attrs/types/{index}")).unwrap_or_default();
        let interface = self.read(format!("{base}/gid_attrs/ndevs/{index}")).filter(|name| !name.is_empty());
        Some(Gid { index, gid, kind, interface })
    }

    /// What carries the bytes of a port, with the GID that is used: "InfiniBand", "RoCE v2", "iWARP".
    pub(super) fn link(&self, device: &str, port: u8, gid: Option<&Gid>) -> String {
        let port = self.port(device, port);
        match gid {
            _ if port.is_iwarp => "iWARP".to_owned(),
            _ if !port.is_ethernet => "InfiniBand".to_owned(),
            // The kernel says "IB/RoCE v1" for both.
            Some(gid) if gid.kind == "IB/RoCE v1" => "RoCE v1".to_owned(),
            Some(gid) => gid.kind.clone(),
            None => "RoCE".to_owned(),
        }
    }

    fn port(&self, device: &str, port: u8) -> Port {
        let mut indexes: Vec<u16> = self
            .names(format!("{device}/ports/{port}/gids"))
            .iter()
            .filter_map(|name| name.parse().ok())
            .filter(|index| *index < MAX_GIDS)
            .collect();
        indexes.sort_unstable();
        Port {
            device: device.to_owned(),
            port,
            is_ethernet: self.read(format!("{device}/ports/{port}/link_layer")).is_some_and(|l| l == "Ethernet"),
            is_iwarp: self.read(format!("{device}/node_type")).is_some_and(|kind| kind.contains("RNIC")),
            gids: indexes.into_iter().filter_map(|index| self.gid(device, port, index)).collect(),
        }
    }

    /// Every port that is up.
    fn active(&self) -> Vec<Port> {
        let mut active = Vec::new();
        for device in self.names("") {
            for port in self.ports(&device) {
                if self.state(&device, port) == "ACTIVE" {
                    active.push(self.port(&device, port));
                }
            }
        }
        active
    }

    /// The device's own network interfaces: IPoIB's, or the card's.
    fn interfaces_of(&self, port: &Port) -> Vec<String> {
        let mut interfaces: Vec<String> = port.gids.iter().filter_map(|gid| gid.interface.clone()).collect();
        for name in self.names(format!("{}/device/net", port.device)) {
            let number = self.read(format!("{}/device/net/{name}/dev_port", port.device));
            // Numbered from 0 where RDMA counts from 1; an interface that does not say belongs to a device with one port.
            let number = number.and_then(|number| number.parse::<u8>().ok());
            if number.is_none_or(|number| number + 1 == port.port) {
                interfaces.push(name);
            }
        }
        interfaces
    }

    fn has_address(&self, interfaces: &[String], ip: IpAddr) -> bool {
        self.interfaces.iter().any(|(name, address, _)| *address == ip && interfaces.contains(name))
    }

    /// An address with the index of the interface it is on, which link-local ones need.
    fn socket_address(&self, ip: IpAddr, interface: Option<&str>) -> SocketAddr {
        let on = |(name, address, _): &&(String, IpAddr, u32)| {
            *address == ip && interface.is_none_or(|interface| interface == name)
        };
        let scope = self.interfaces.iter().find(on).map_or(0, |(_, _, index)| *index);
        super::cm::socket_address(ip, 0, scope)
    }

    /// The address that leads rdma_cm to one GID of a port, or to the port.
    fn address_of(&self, port: &Port, gid: Option<&Gid>) -> Option<SocketAddr> {
        if port.is_ethernet && !port.is_iwarp {
            let as_ip = |gid: &Gid| gid.gid.to_ipv4_mapped().map_or(IpAddr::V6(gid.gid), IpAddr::V4);
            // IPv4 first, then global addresses: a link-local one leads only to the same wire.
            let rank = |gid: &&Gid| match as_ip(gid) {
                IpAddr::V4(_) => 0,
                IpAddr::V6(v6) if !v6.is_unicast_link_local() => 1,
                IpAddr::V6(_) => 2,
            };
            // Only what an interface still has; a GID's name on RoCE v1 is the same address.
            let known = |gid: &&Gid| self.interfaces.iter().any(|(_, address, _)| *address == as_ip(gid));
            let chosen = gid.or_else(|| port.gids.iter().filter(known).min_by_key(rank))?;
            return Some(self.socket_address(as_ip(chosen), chosen.interface.as_deref()));
        }
        let interfaces = self.interfaces_of(port);
        let mut of_port: Vec<_> = self.interfaces.iter().filter(|(name, _, _)| interfaces.contains(name)).collect();
        of_port.sort_by_key(|(_, address, _)| match address {
            IpAddr::V4(_) => 0,
            IpAddr::V6(v6) if !v6.is_unicast_link_local() => 1,
            IpAddr::V6(_) => 2,
        });
        let (name, ip, _) = of_port.first()?;
        Some(self.socket_address(*ip, Some(name)))
    }

    /// Chooses for `settings`; `session` is the address that the session's control connection has on this host.
    pub(super) fn choose(&self, settings: &VerbsSettings, session: Option<IpAddr>) -> Result<Local, VerbsError> {
        let devices = self.names("");
        if devices.is_empty() {
            return Err(VerbsError::NoDevice { looked_in: self.devices.clone() });
        }
        let (port, address) = match &settings.device {
            Some(device) => (self.named(device, settings.port, devices)?, None),
            None => self.unnamed(settings.port, session)?,
        };
        let gid_index = settings.gid_index.map(u16::from);
        let gid = match gid_index {
            None => None,
            Some(index) => {
                let of_port = || VerbsError::NoSuchGid { device: port.device.clone(), port: port.port, index };
                Some(port.gids.iter().find(|gid| gid.index == index).ok_or_else(of_port)?)
            }
        };
        // A GID that was asked for decides; else the session's own address, where the device stands behind it.
        let address = match (gid, address) {
            (None, Some(address)) => Some(address),
            _ => self.address_of(&port, gid),
        };
        let address = address.ok_or_else(|| VerbsError::NoAddress { device: port.device.clone(), port: port.port })?;
        Ok(Local { device: port.device, port: port.port, address, gid_index })
    }

    /// Why nothing but the operator's word can tell which port carries a session with this address here, where that is so.
    fn undecided(&self, settings: &VerbsSettings, session: Option<IpAddr>) -> Option<VerbsError> {
        self.choose(settings, session).err().filter(|error| matches!(error, VerbsError::SeveralDevices { .. }))
    }

    /// The port that was named, or the first active one of the device that was.
    fn named(&self, device: &str, port: Option<u8>, have: Vec<String>) -> Result<Port, VerbsError> {
        if !have.iter().any(|name| name == device) {
            return Err(VerbsError::NoSuchDevice { device: device.to_owned(), have });
        }
        let ports = self.ports(device);
        let is_active = |port: &u8| self.state(device, *port) == "ACTIVE";
        let chosen = port.or_else(|| ports.iter().copied().find(is_active)).or_else(|| ports.first().copied());
        let chosen = chosen.unwrap_or(1);
        if !ports.contains(&chosen) {
            return Err(VerbsError::NoSuchPort { device: device.to_owned(), port: chosen, have: ports });
        }
        if !is_active(&chosen) {
            let state = self.state(device, chosen);
            return Err(VerbsError::PortNotActive { device: device.to_owned(), port: chosen, state });
        }
        Ok(self.port(device, chosen))
    }

    /// The port behind the session's address, with that address; or the only active one.
    fn unnamed(&self, port: Option<u8>, session: Option<IpAddr>) -> Result<(Port, Option<SocketAddr>), VerbsError> {
        let mut active = self.active();
        active.retain(|one| port.is_none_or(|port| port == one.port));
        if let Some(ip) = session {
            let behind = |port: &&Port| self.has_address(&self.interfaces_of(port), ip);
            if let Some(found) = active.iter().find(behind) {
                return Ok((found.clone(), Some(self.socket_address(ip, None))));
            }
        }
        match &active[..] {
            [] => {
                let device = self.names("").into_iter().next().unwrap_or_default();
                let port = port.unwrap_or(1);
                let state = self.state(&device, port);
                Err(VerbsError::PortNotActive { device, port, state })
            }
            [only] => Ok((only.clone(), None)),
            several => {
                let have = several.iter().map(|port| format!("{} port {}", port.device, port.port)).collect();
                Err(VerbsError::SeveralDevices { have })
            }
        }
    }
}

/// Why `verbs` cannot be offered for a session whose control connection has the address `session` on this host, though the host has
/// RDMA: several ports would do and nobody has named one. `None` where the choice is clear; what else a host lacks the
/// [inventory](super::inventory) says.
pub(crate) fn undecided(settings: &VerbsSettings, session: Option<IpAddr>) -> Option<VerbsError> {
    Host::this().ok()?.undecided(settings, session)
}

/// Every address of every interface: name, address, interface index (getifaddrs(3)).
fn interface_addresses() -> std::io::Result<Vec<(String, IpAddr, u32)>> {
    let mut list = std::ptr::null_mut();
    // SAFETY: `list` may be written; it is freed below.
    if unsafe { libc::getifaddrs(&raw mut list) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    let mut all = Vec::new();
    let mut next = list;
    while !next.is_null() {
        // SAFETY: an element of the list that getifaddrs gave.
        let entry = unsafe { next.read() };
        next = entry.ifa_next;
        if entry.ifa_addr.is_null() {
            continue;
        }
        // SAFETY: not null, so it is an address, which begins with its family.
        let family = unsafe { (*entry.ifa_addr).sa_family };
        let ip: IpAddr = match i32::from(family) {
            libc::AF_INET => {
                // SAFETY: its family says that it is an IPv4 address.
                let v4 = unsafe { entry.ifa_addr.cast::<libc::sockaddr_in>().read_unaligned() };
                std::net::Ipv4Addr::from(u32::from_be(v4.sin_addr.s_addr)).into()
            }
            libc::AF_INET6 => {
                // SAFETY: its family says that it is an IPv6 address.
                let v6 = unsafe { entry.ifa_addr.cast::<libc::sockaddr_in6>().read_unaligned() };
                Ipv6Addr::from(v6.sin6_addr.s6_addr).into()
            }
            _ => continue,
        };
        // SAFETY: every entry has a zero-terminated name.
        let name = unsafe { std::ffi::CStr::from_ptr(entry.ifa_name) };
        // SAFETY: as above.
        let index = unsafe { libc::if_nametoindex(entry.ifa_name) };
        all.push((name.to_string_lossy().into_owned(), ip, index));
    }
    // SAFETY: given by getifaddrs, freed once; everything has been copied.
    unsafe { libc::freeifaddrs(list) };
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fake {
        dir: tempfile::TempDir,
        host: Host,
    }

    impl Fake {
        fn new(interfaces: &[(&str, &str, u32)]) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let interfaces =
                interfaces.iter().map(|(name, ip, index)| ((*name).to_owned(), ip.parse().unwrap(), *index)).collect();
            let host = Host { devices: dir.path().to_owned(), interfaces };
            Self { dir, host }
        }

        fn write(&self, path: &str, text: &str) {
            let path = self.dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, format!("{text}\n")).unwrap();
        }

        fn port(&self, device: &str, port: u8, state: &str, link_layer: &str, gids: &[(&str, &str, &str)]) {
            self.write(&format!("{device}/node_type"), "1: CA");
            let base = format!("{device}/ports/{port}");
            self.write(&format!("{base}/state"), state);
            self.write(&format!("{base}/link_layer"), link_layer);
            for (index, (gid, kind, interface)) in gids.iter().enumerate() {
                self.write(&format!("{base}/gids/{index}"), gid);
                self.write(&format!("{base}/gid_attrs/types/{index}"), kind);
                self.write(&format!("{base}/gid_attrs/ndevs/{index}"), interface);
            }
        }

        fn choose(&self, settings: &VerbsSettings, session: &str) -> Result<(String, u8, String), String> {
            let session = session.parse().ok();
            self.host
                .choose(settings, session)
                .map(|local| (local.device, local.port, local.address.to_string()))
                .map_err(|error| error.to_string())
        }
    }

    const ZERO: &str = "0000:0000:0000:0000:0000:0000:0000:0000";
    const MAPPED: &str = "0000:0000:0000:0000:0000:ffff:0a09:0001";

    fn roce() -> Fake {
        let fake = Fake::new(&[
            ("lo", "127.0.0.1", 1),
            ("eth0", "10.9.0.1", 2),
            ("eth0", "fe80::5054:ff:febe:1a01", 2),
            ("eth1", "10.0.2.15", 3),
        ]);
        let link_local = ("fe80:0000:0000:0000:5054:00ff:febe:1a01", "RoCE v2", "eth0");
        fake.port("rxe0", 1, "4: ACTIVE", "Ethernet", &[link_local, (MAPPED, "RoCE v2", "eth0"), (ZERO, "", "")]);
        fake
    }

    fn named(device: &str) -> VerbsSettings {
        VerbsSettings { device: Some(device.to_owned()), ..VerbsSettings::default() }
    }

    fn ok(device: &str, port: u8, address: &str) -> Result<(String, u8, String), String> {
        Ok((device.to_owned(), port, address.to_owned()))
    }

    #[test]
    fn the_sessions_own_address_is_taken_where_a_device_stands_behind_it() {
        let fake = roce();
        fake.port("mlx5_0", 1, "4: ACTIVE", "Ethernet", &[]);
        assert_eq!(fake.choose(&VerbsSettings::default(), "10.9.0.1"), ok("rxe0", 1, "10.9.0.1:0"));
        let error = fake.choose(&VerbsSettings::default(), "10.0.2.15").unwrap_err();
        assert!(error.contains("mlx5_0 port 1") && error.contains("rxe0 port 1"), "{error}");
    }

    #[test]
    fn several_ports_none_of_them_named_or_behind_the_session_leave_it_undecided_and_nothing_else_does() {
        let fake = roce();
        fake.port("mlx5_0", 1, "4: ACTIVE", "Ethernet", &[]);
        let undecided = |settings: &VerbsSettings, session: &str| {
            fake.host.undecided(settings, session.parse().ok()).map(|error| error.to_string())
        };
        let said = undecided(&VerbsSettings::default(), "10.0.2.15").expect("two would do");
        assert!(said.contains("choose one with --ib-dev"), "{said}");
        assert_eq!(undecided(&VerbsSettings::default(), "10.9.0.1"), None);
        assert_eq!(undecided(&named("rxe0"), "10.0.2.15"), None);
        // What is wrong otherwise is the inventory's to tell.
        assert_eq!(undecided(&named("mlx4_0"), "10.0.2.15"), None);
    }

    #[test]
    fn the_only_active_port_serves_a_session_on_loopback() {
        let fake = roce();
        fake.port("mlx5_0", 1, "1: DOWN", "Ethernet", &[]);
        assert_eq!(fake.choose(&VerbsSettings::default(), "127.0.0.1"), ok("rxe0", 1, "10.9.0.1:0"));
    }

    #[test]
    fn a_gid_index_is_turned_into_its_address() {
        let fake = roce();
        let at = |index| VerbsSettings { gid_index: Some(index), ..named("rxe0") };
        assert_eq!(fake.choose(&at(1), "127.0.0.1"), ok("rxe0", 1, "10.9.0.1:0"));
        // With the interface it is on, without which a link-local address leads nowhere.
        assert_eq!(fake.choose(&at(0), "10.9.0.1"), ok("rxe0", 1, "[fe80::5054:ff:febe:1a01%2]:0"));
        for empty in [2, 200] {
            assert!(fake.choose(&at(empty), "10.9.0.1").unwrap_err().contains("is empty"));
        }
    }

    #[test]
    fn what_is_not_there_is_said_with_what_is() {
        let fake = roce();
        fake.port("mlx5_0", 2, "1: DOWN", "Ethernet", &[]);
        let error = fake.choose(&named("mlx4_0"), "10.9.0.1").unwrap_err();
        assert!(error.contains("mlx4_0") && error.contains("rxe0"), "{error}");
        let port = |device, port| VerbsSettings { port: Some(port), ..named(device) };
        assert!(fake.choose(&port("rxe0", 2), "").unwrap_err().contains("no port 2"));
        assert!(fake.choose(&port("mlx5_0", 2), "").unwrap_err().contains("is DOWN"));
        let empty = Fake::new(&[]);
        assert!(empty.choose(&VerbsSettings::default(), "").unwrap_err().contains("no RDMA device"));
        let nameless = Fake::new(&[]);
        nameless.port("rxe0", 1, "4: ACTIVE", "Ethernet", &[]);
        assert!(nameless.choose(&named("rxe0"), "").unwrap_err().contains("no IP address"));
    }

    #[test]
    fn infiniband_and_iwarp_are_reached_by_their_interfaces_address() {
        let fake = Fake::new(&[("ib0", "192.168.7.1", 4), ("ib1", "192.168.8.1", 5), ("eth2", "10.1.1.1", 6)]);
        for port in [1, 2] {
            let gid = ("fe80:0000:0000:0000:0002:c903:0000:1491", "IB/RoCE v1", "");
            fake.port("mlx5_0", port, "4: ACTIVE", "InfiniBand", &[gid]);
        }
        fake.write("mlx5_0/device/net/ib0/dev_port", "0");
        fake.write("mlx5_0/device/net/ib1/dev_port", "1");
        let port = |port| VerbsSettings { port: Some(port), ..named("mlx5_0") };
        assert_eq!(fake.choose(&port(1), ""), ok("mlx5_0", 1, "192.168.7.1:0"));
        assert_eq!(fake.choose(&port(2), ""), ok("mlx5_0", 2, "192.168.8.1:0"));
        assert_eq!(fake.choose(&VerbsSettings::default(), "192.168.8.1"), ok("mlx5_0", 2, "192.168.8.1:0"));
        fake.port(
            "cxgb4_0",
            1,
            "4: ACTIVE",
            "Ethernet",
            &[("0007:4300:0000:0000:0000:0000:0000:0000", "IB/RoCE v1", "")],
        );
        fake.write("cxgb4_0/node_type", "4: RNIC");
        fake.write("cxgb4_0/device/net/eth2/dev_port", "0");
        assert_eq!(fake.choose(&named("cxgb4_0"), ""), ok("cxgb4_0", 1, "10.1.1.1:0"));
    }

    #[test]
    fn this_hosts_loopback_address_is_found() {
        let all = interface_addresses().unwrap();
        assert!(all.iter().any(|(_, ip, index)| ip.is_loopback() && *index > 0), "{all:?}");
    }
}
