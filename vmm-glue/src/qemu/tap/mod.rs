//! A gate before what a guest sends through a tap, for guests whose network cannot go through a [relay](super::relay).
//!
//! ```text
//!   QEMU ──write──► tap ──ingress: matchall, mirred──► belay-N (ifb) ──► plug ──► tap, as if it had come just now ──► bridge
//! ```
//! The kernel holds the frames: no frame comes here. What does go through the outbox is a *mark* in each epoch, an empty packet behind all that the
//! guest sent in it; when the outbox lets the mark go, the plug lets that epoch's frames go. So whatever holds a packet back holds frames back:
//! the commit, the disks' images, a fence.
//!
//! Rules of this room:
//! * The plug is shut from before the guest runs, and is opened by nothing but [`Gate::release`] and [`Gate::open`]. Dropped, or its process
//!   killed, it stays shut (P4): the devices are the kernel's, and stay.
//! * The kernel counts two epochs at a time: one that is closed and one that is open. While one is closed and has not committed, what the guest
//!   sends is of one epoch with what it sent before (it leaves later, never earlier).
//! * Frames that were let go may be lost with the host, and are not sent again: no record holds them. That is a lost frame, as on any wire.

mod messages;
mod netlink;
#[cfg(test)]
mod tests;

pub use messages::AnswerError;
pub use netlink::NetlinkError;

use belay_transport::Deadline;
use messages::Order;
use netlink::Netlink;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::PathBuf;
use std::time::Duration;

/// Most that a plug holds, in bytes of frames. Behind it the kernel drops frames.
const MOST_BYTES: u32 = 64 << 20;
/// From here on the guest is stopped for its next checkpoint, whatever the policy says (P7).
const FULL_BYTES: u32 = MOST_BYTES / 4;
/// Between two looks at a plug that empties itself.
const LOOK: Duration = Duration::from_millis(1);
/// Longest name of a device, without the zero at its end (IFNAMSIZ).
const MOST_NAME_BYTES: usize = 15;

/// Why there is no gate before a tap.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    #[error("`{0}` is no name of a network device: 1 to {MOST_NAME_BYTES} bytes without space, slash or colon")]
    Name(String),
    #[error("there is no device {0} in this network namespace; make it (`ip tuntap add {0} mode tap`) and set it up")]
    NoDevice(String),
    #[error("{name} is {what}, and a gate can only be put before a tap")]
    NoTap { name: String, what: String },
    #[error("the QEMU of process {pid} does not have the tap {name} open; it has {}", list(.open))]
    NotTheGuests { name: String, pid: u32, open: Vec<String> },
    #[error(
        "{name} has filters on what comes in that are not belay's (`tc qdisc show dev {name}`): take them away, or use a relay"
    )]
    Filtered { name: String },
    #[error("another belay has the gate before {name}")]
    Taken {
        name: String,
        #[source]
        source: io::Error,
    },
    #[error("cannot read which taps process {pid} has open")]
    Process {
        pid: u32,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    #[error("the plug before {name} still lets out the epoch before; this one waits")]
    Busy { name: String },
    #[error("the plug before {name} holds {held} bytes after {waited_ms} ms, and may let all of them go")]
    Stuck { name: String, held: u32, waited_ms: u128 },
}

fn list(names: &[String]) -> String {
    if names.is_empty() { "no tap".to_owned() } else { names.join(", ") }
}

/// Whether this may be the name of a network device.
pub fn check_name(name: &str) -> Result<(), TapError> {
    let good = (1..=MOST_NAME_BYTES).contains(&name.len())
        && name != "."
        && name != ".."
        && !name
            .contains(|letter: char| letter == '/' || letter == ':' || letter.is_whitespace() || letter.is_control());
    if good { Ok(()) } else { Err(TapError::Name(name.to_owned())) }
}

/// Whether process `pid` has the tap `name` open. Changes nothing.
pub fn is_of(pid: u32, name: &str) -> Result<(), TapError> {
    check_name(name)?;
    let process = |source| TapError::Process { pid, source };
    let mut open = Vec::new();
    for entry in std::fs::read_dir(PathBuf::from(format!("/proc/{pid}/fdinfo"))).map_err(process)? {
        // One that was closed meanwhile is no tap of its guest.
        let Ok(text) = std::fs::read_to_string(entry.map_err(process)?.path()) else { continue };
        open.extend(text.lines().filter_map(|line| line.strip_prefix("iff:")).map(|name| name.trim().to_owned()));
    }
    if open.iter().any(|one| one == name) {
        return Ok(());
    }
    Err(TapError::NotTheGuests { name: name.to_owned(), pid, open })
}

/// The mark that waits to be let go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mark {
    sequence: u64,
    /// What the plug will have let out, in bytes since it is there, once this epoch has left.
    boundary: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Gate {
    netlink: Netlink,
    tap: Device,
    ifb: Device,
    mark: Option<Mark>,
    /// The same, of what was let go last.
    released: u64,
    /// Nobody else's while this is bound.
    _alone: UnixListener,
}

#[derive(Debug)]
struct Device {
    name: String,
    index: u32,
}

/// Before a tap, where a gate may be.
struct Place {
    netlink: Netlink,
    tap: Device,
    /// The name of the ifb.
    ours: String,
    alone: UnixListener,
}

impl Place {
    /// With nothing of belay's there.
    fn cleared(name: &str) -> Result<Self, TapError> {
        check_name(name)?;
        let mut netlink = Netlink::open()?;
        let link = netlink.link(name)?.ok_or_else(|| TapError::NoDevice(name.to_owned()))?;
        if link.kind != "tun" || !link.ethernet {
            let what = match link.kind.as_str() {
                "tun" => "a tun (layer 3)".to_owned(),
                "" => "a device of its own".to_owned(),
                kind => format!("a device of the kind {kind}"),
            };
            return Err(TapError::NoTap { name: name.to_owned(), what });
        }
        let tap = Device { name: name.to_owned(), index: link.index };
        // An index is one device's as long as its namespace lives.
        let ours = format!("belay-{}", tap.index);
        let alone = SocketAddr::from_abstract_name(format!("belay-tap-{}", tap.index))
            .and_then(|address| UnixListener::bind_addr(&address))
            .map_err(|source| TapError::Taken { name: name.to_owned(), source })?;
        if let Some(left) = netlink.link(&ours)? {
            if left.kind != "ifb" {
                return Err(TapError::NoTap { name: ours, what: "not belay's".to_owned() });
            }
            // In this order: without its ifb the filter drops what comes.
            netlink.delete_link(&ours, left.index)?;
            netlink.delete_ingress(name, tap.index)?;
        }
        Ok(Self { netlink, tap, ours, alone })
    }
}

/// Takes away the gate that a dead belay left before the tap `name`, with the frames it held, if there is one.
pub fn clear(name: &str) -> Result<(), TapError> {
    Place::cleared(name).map(|_| ())
}

impl Gate {
    /// Puts a shut gate before the tap `name`, which is there. What a dead belay left there is taken away first, with the frames it held: their guest
    /// is no more.
    pub fn shut_before(name: &str) -> Result<Self, TapError> {
        let Place { mut netlink, tap, ours, alone } = Place::cleared(name)?;
        let mut made = false;
        let ifb = Self::set_up(&mut netlink, &tap, &ours, &mut made);
        match ifb {
            Ok(ifb) => Ok(Self { netlink, tap, ifb, mark: None, released: 0, _alone: alone }),
            Err(error) => {
                // Nothing of it may stay: it would be taken for a dead belay's.
                if let Ok(Some(left)) = netlink.link(&ours) {
                    let _ = netlink.delete_link(&ours, left.index);
                }
                if made {
                    let _ = netlink.delete_ingress(name, tap.index);
                }
                Err(error)
            }
        }
    }

    /// From the far end, so that nothing passes before all of it stands.
    fn set_up(netlink: &mut Netlink, tap: &Device, ours: &str, ingress: &mut bool) -> Result<Device, TapError> {
        netlink.make_ifb(ours)?;
        let ifb = netlink.link(ours)?.ok_or_else(|| TapError::NoDevice(ours.to_owned()))?;
        netlink.make_plug(ours, ifb.index, MOST_BYTES)?;
        // The host has nothing to say there itself. If it speaks all the same (IPv6 of a container that cannot be told), its packets take part in epochs
        // as the guest's do, and the ifb throws them away.
        let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{ours}/disable_ipv6"), "1");
        netlink.set_up(ours, ifb.index)?;
        match netlink.make_ingress(&tap.name, tap.index) {
            Err(NetlinkError::Refused { errno: rustix::io::Errno::EXIST, .. }) => {
                return Err(TapError::Filtered { name: tap.name.clone() });
            }
            done => done?,
        }
        *ingress = true;
        netlink.redirect(&tap.name, tap.index, ifb.index)?;
        Ok(Device { name: ours.to_owned(), index: ifb.index })
    }

    /// The device that holds the frames.
    pub fn device(&self) -> &str {
        &self.ifb.name
    }

    /// The guest stands, and all that it had sent is behind the tap: an epoch ends here. Whether a mark with this number belongs behind it; if not,
    /// one is still on its way, and what came since then is of the next.
    pub fn close_epoch(&mut self, sequence: u64) -> Result<bool, TapError> {
        if self.mark.is_some() {
            return Ok(false);
        }
        let queue = self.netlink.queue(&self.ifb.name, self.ifb.index)?;
        self.netlink.order(&self.ifb.name, self.ifb.index, Order::Buffer)?;
        self.mark = Some(Mark { sequence, boundary: queue.left.wrapping_add(u64::from(queue.held)) });
        Ok(true)
    }

    /// The mark with this number may leave: so may its epoch's frames. A mark of another guest's life lets nothing go.
    pub fn release(&mut self, sequence: u64) -> Result<(), TapError> {
        let Some(mark) = self.mark.filter(|mark| mark.sequence == sequence) else { return Ok(()) };
        // The kernel adds to what may leave without a lock against what leaves just then: it must have stopped.
        let queue = self.netlink.queue(&self.ifb.name, self.ifb.index)?;
        if queue.left < self.released {
            return Err(TapError::Busy { name: self.ifb.name.clone() });
        }
        self.netlink.order(&self.ifb.name, self.ifb.index, Order::ReleaseOne)?;
        self.released = mark.boundary;
        self.mark = None;
        Ok(())
    }

    /// Whether it holds as much as it should.
    pub fn is_full(&mut self) -> Result<bool, TapError> {
        Ok(self.netlink.queue(&self.ifb.name, self.ifb.index)?.held >= FULL_BYTES)
    }

    /// Frames that the kernel dropped because the plug was full.
    pub fn dropped(&mut self) -> Result<u32, TapError> {
        Ok(self.netlink.queue(&self.ifb.name, self.ifb.index)?.dropped)
    }

    /// The guest is this host's own: everything leaves, and nothing stays of the gate. What comes meanwhile passes.
    pub fn open(mut self, deadline: Deadline) -> Result<(), TapError> {
        let (name, index) = (&self.ifb.name, self.ifb.index);
        self.netlink.order(name, index, Order::ReleaseForGood)?;
        Self::wait_until_empty(&mut self.netlink, &self.ifb, deadline)?;
        self.netlink.delete_ingress(&self.tap.name, self.tap.index)?;
        // What had come in before that and after the look.
        Self::wait_until_empty(&mut self.netlink, &self.ifb, deadline)?;
        Ok(self.netlink.delete_link(&self.ifb.name, self.ifb.index)?)
    }

    fn wait_until_empty(netlink: &mut Netlink, ifb: &Device, deadline: Deadline) -> Result<(), TapError> {
        let bound = deadline.left();
        loop {
            match netlink.queue(&ifb.name, ifb.index)?.held {
                0 => return Ok(()),
                held if deadline.expired() => {
                    return Err(TapError::Stuck { name: ifb.name.clone(), held, waited_ms: bound.as_millis() });
                }
                _ => std::thread::sleep(LOOK.min(deadline.left())),
            }
        }
    }
}
