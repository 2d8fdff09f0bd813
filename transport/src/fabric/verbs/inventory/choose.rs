//! Which device, port and GID a session is carried by, and every reason why one cannot be.

use super::super::VerbsSettings;
use super::{Access, Asked, Device, Gid, GidKind, Inventory, Port, PortState, Transport, Trouble};

/// A device, a port of it and a GID of that, which together can carry a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Choice<'a> {
    pub device: &'a Device,
    pub port: &'a Port,
    pub gid: &'a Gid,
}

impl Inventory {
    /// What the whole host lacks, whichever device is used. Empty when nothing stands in the way of using one.
    pub fn troubles(&self) -> Vec<Trouble> {
        let mut troubles: Vec<Trouble> =
            self.libraries.as_ref().err().cloned().map(Trouble::Library).into_iter().collect();
        if !self.kernel {
            troubles.push(Trouble::NoKernelModule);
        } else if self.devices.is_empty() {
            troubles.push(Trouble::NoDevice);
        } else {
            // Without a device nobody needs it.
            troubles.extend(self.connection_manager());
        }
        troubles
    }

    /// What is wrong with the file through which connections are made.
    fn connection_manager(&self) -> Option<Trouble> {
        let path = self.rdma_cm.path.clone();
        match self.rdma_cm.access {
            Access::Usable => None,
            Access::Absent => Some(Trouble::NoConnectionManager { path }),
            Access::Denied => Some(Trouble::ConnectionManagerDenied { path }),
        }
    }

    /// What the operator's settings come to on this host, with `locked_bytes` to be pinned; or the first thing that is wrong,
    /// from the libraries on to the GID. What was not said is chosen: the first device and port that are up, and of their
    /// GIDs RoCE v2 over IPv4 first. (A session goes by addresses: see [`can_be_had`](super::super::can_be_had).)
    pub fn choose(&self, settings: &VerbsSettings, locked_bytes: u64) -> Result<Choice<'_>, Trouble> {
        if let Some(trouble) = self.troubles().into_iter().next() {
            return Err(trouble);
        }
        self.memory.check(locked_bytes)?;
        let Some(asked) = &settings.device else {
            // Of several devices without one that will do, the first one's trouble is told.
            let mut first = None;
            for device in &self.devices {
                match device.choose(settings) {
                    Ok(choice) => return Ok(choice),
                    Err(trouble) => first = first.or(Some(trouble)),
                }
            }
            return Err(first.unwrap_or(Trouble::NoDevice));
        };
        let have = || self.devices.iter().map(|device| device.name.clone()).collect();
        let device = self.devices.iter().find(|device| device.name == *asked);
        device.ok_or_else(|| Trouble::NoSuchDevice { asked: asked.clone(), have: have() })?.choose(settings)
    }
}

impl Device {
    /// What is wrong with the device itself, its ports left aside.
    pub fn trouble(&self) -> Option<Trouble> {
        let device = self.name.clone();
        let Some(uverbs) = &self.uverbs else { return Some(Trouble::NoUverbs { device }) };
        match (uverbs.access, &self.asked) {
            (Access::Absent, _) => Some(Trouble::NoUverbs { device }),
            (Access::Denied, _) => Some(Trouble::UverbsDenied { device, path: uverbs.path.clone() }),
            (Access::Usable, Asked::NoDriver) => Some(Trouble::NoDriver { device }),
            (Access::Usable, Asked::Failed { doing, errno }) => {
                Some(Trouble::NoAnswer { device, doing, errno: *errno })
            }
            (Access::Usable, Asked::Answered(_) | Asked::NotAsked) => None,
        }
    }

    /// What is wrong with one of its ports.
    pub fn port_trouble(&self, port: &Port) -> Option<Trouble> {
        let (device, number) = (self.name.clone(), port.number);
        if port.transport == Transport::Other {
            return Some(Trouble::OtherTransport { device });
        }
        match port.state {
            PortState::Active if port.gids.is_empty() => Some(Trouble::NoGid { device, port: number }),
            PortState::Active => None,
            PortState::Init if port.transport == Transport::InfiniBand => {
                Some(Trouble::NoSubnetManager { device, port: number })
            }
            state => {
                let netdev = port.gids.iter().find_map(|gid| gid.netdev.clone());
                Some(Trouble::PortDown { device, port: number, state, netdev })
            }
        }
    }

    fn choose(&self, settings: &VerbsSettings) -> Result<Choice<'_>, Trouble> {
        if let Some(trouble) = self.trouble() {
            return Err(trouble);
        }
        let no_such = |asked| Trouble::NoSuchPort { device: self.name.clone(), asked, ports: self.ports.len() };
        let candidates: Vec<&Port> = match settings.port {
            Some(asked) => vec![self.ports.iter().find(|port| port.number == asked).ok_or(no_such(asked))?],
            None => self.ports.iter().collect(),
        };
        let mut first = None;
        for port in candidates {
            match self.port_trouble(port) {
                None => return self.gid(port, settings.gid_index).map(|gid| Choice { device: self, port, gid }),
                Some(trouble) => first = first.or(Some(trouble)),
            }
        }
        Err(first.unwrap_or(no_such(1)))
    }

    /// A GID of a port: the one with an index, or the one of most use.
    fn gid<'a>(&self, port: &'a Port, index: Option<u8>) -> Result<&'a Gid, Trouble> {
        match index.map(u32::from) {
            Some(asked) => port.gids.iter().find(|gid| gid.index == asked).ok_or_else(|| Trouble::NoSuchGid {
                device: self.name.clone(),
                port: port.number,
                asked,
                have: port.gids.iter().map(Gid::to_string).collect(),
            }),
            None => {
                let best = port.gids.iter().min_by_key(|gid| (gid.rank(), gid.index));
                best.ok_or_else(|| Trouble::NoGid { device: self.name.clone(), port: port.number })
            }
        }
    }

    /// Whether the GID that was obtained is of the kind that was asked for.
    pub fn check_kind(&self, port: &Port, obtained: &Gid, asked: GidKind) -> Result<(), Trouble> {
        if obtained.kind == asked {
            return Ok(());
        }
        Err(Trouble::OtherGidKind {
            device: self.name.clone(),
            port: port.number,
            index: obtained.index,
            is: obtained.kind,
            asked,
            have: port.gids.iter().filter(|gid| gid.kind == asked).map(Gid::to_string).collect(),
        })
    }
}

impl Gid {
    /// Lower is of more use: what crosses routers and has an address people know, before link-local ones, before RoCE v1.
    fn rank(&self) -> u8 {
        let link_local = self.gid.segments()[0] & 0xffc0 == 0xfe80;
        match self.kind {
            GidKind::RoceV2 if self.gid.to_ipv4_mapped().is_some() => 0,
            GidKind::RoceV2 if !link_local => 1,
            GidKind::RoceV2 => 2,
            GidKind::InfiniBand | GidKind::Iwarp => 0,
            GidKind::RoceV1 => 3,
        }
    }
}
