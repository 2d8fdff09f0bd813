//! The far side of a relay: a tap device, or a Unix socket with the framing of QEMU's own.

use super::RelayError;
use super::frames::{Came, Frames, Queue};
use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, Instant};

/// Bytes on their way to a socket, at most.
const MOST_QUEUED_BYTES: usize = 4 << 20;
/// Between two tries to reach a socket that nobody listens at.
const RETRY: Duration = Duration::from_millis(100);
/// Frames taken from a tap device before others have their turn.
const FRAMES_A_TURN: usize = 64;
/// Longest that a frame of a tap device can be: the largest MTU, and the Ethernet header with a VLAN's tag.
const MOST_TAP_BYTES: usize = 65_535 + 18;

/// Which far side: `tap:NAME`, or `unix:PATH` of a socket that is connected to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WorldAddress {
    Tap(String),
    Unix(PathBuf),
}

impl FromStr for WorldAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            // IFNAMSIZ with its end.
            Some(("tap", name))
                if (1..libc::IFNAMSIZ).contains(&name.len()) && !name.contains(['/', '%', ' ', '\0']) =>
            {
                Ok(Self::Tap(name.to_owned()))
            }
            Some(("tap", name)) => {
                Err(format!("{name:?} is no name of a network device: 1 to 15 characters, no slash, space or percent"))
            }
            Some(("unix", path)) if !path.is_empty() => Ok(Self::Unix(path.into())),
            _ => Err("write tap:NAME or unix:PATH".to_owned()),
        }
    }
}

impl fmt::Display for WorldAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tap(name) => write!(f, "tap:{name}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// An open far side.
#[derive(Debug)]
pub struct World {
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Tap { device: File, buffer: Vec<u8> },
    Unix { path: PathBuf, link: Option<(UnixStream, Frames, Queue)>, tried: Option<Instant> },
}

impl World {
    /// Opens a tap device, which is made if there is none of that name, or begins to connect to a socket.
    pub fn open(address: &WorldAddress) -> Result<Self, RelayError> {
        let kind = match address {
            WorldAddress::Tap(name) => {
                let device = tap(name).map_err(|source| RelayError::Tap { name: name.clone(), source })?;
                Kind::Tap { device, buffer: vec![0; MOST_TAP_BYTES] }
            }
            WorldAddress::Unix(path) => Kind::Unix { path: path.clone(), link: None, tried: None },
        };
        Ok(Self { kind })
    }

    /// What to wait for, whether for room to write too; `None` while it is not there.
    pub(super) fn interest(&self) -> Option<(BorrowedFd<'_>, bool)> {
        match &self.kind {
            Kind::Tap { device, .. } => Some((device.as_fd(), false)),
            Kind::Unix { link, .. } => link.as_ref().map(|(stream, _, queue)| (stream.as_fd(), !queue.is_empty())),
        }
    }

    /// Connects where that is due; until when it is to be tried again, at most.
    pub(super) fn reconnect(&mut self) -> Option<Duration> {
        let Kind::Unix { path, link: link @ None, tried } = &mut self.kind else { return None };
        if let Some(left) = tried.and_then(|tried| RETRY.checked_sub(tried.elapsed())) {
            return Some(left);
        }
        *tried = Some(Instant::now());
        let connected = UnixStream::connect(path).and_then(|stream| stream.set_nonblocking(true).map(|()| stream));
        match connected {
            Ok(stream) => {
                *link = Some((stream, Frames::default(), Queue::new(MOST_QUEUED_BYTES)));
                None
            }
            Err(_) => Some(RETRY),
        }
    }

    /// Passes a frame on; whether it was taken.
    pub(super) fn send(&mut self, frame: &[u8]) -> bool {
        match &mut self.kind {
            Kind::Tap { device, .. } => loop {
                match device.write(frame) {
                    Ok(written) => break written == frame.len(),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    // Full, down (EIO), or too long for it: a frame lost, as on any wire.
                    Err(_) => break false,
                }
            },
            Kind::Unix { link, .. } => link.as_mut().is_some_and(|(_, _, queue)| queue.push(&[frame])),
        }
    }

    /// Writes what waits.
    pub(super) fn flush(&mut self) {
        if let Kind::Unix { link: link @ Some(_), .. } = &mut self.kind
            && let Some((stream, _, queue)) = link
            && queue.flush(stream).is_err()
        {
            *link = None;
        }
    }

    /// Gives `each` frame that has come, up to a turn's worth.
    pub(super) fn receive(&mut self, mut each: impl FnMut(&[u8])) {
        match &mut self.kind {
            Kind::Tap { device, buffer } => {
                for _ in 0..FRAMES_A_TURN {
                    match device.read(buffer) {
                        Ok(bytes) if bytes > 0 => each(&buffer[..bytes]),
                        Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                        _ => break,
                    }
                }
            }
            Kind::Unix { link, .. } => {
                let Some((stream, frames, _)) = link else { return };
                let came = frames.fill(stream);
                let understood = loop {
                    match frames.next() {
                        Ok(Some(frame)) => each(frame),
                        Ok(None) => break true,
                        Err(_) => break false,
                    }
                };
                if !understood || !matches!(came, Ok(Came::Bytes(_) | Came::Nothing)) {
                    *link = None;
                }
            }
        }
    }
}

/// Attaches to the tap device `name` without packet information, as QEMU's `-netdev tap` does (kernel documentation, networking/tuntap).
fn tap(name: &str) -> io::Result<File> {
    /// `_IOW('T', 202, int)` of linux/if_tun.h.
    const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
    let device = File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
    // SAFETY: an all-zero ifreq is a valid one: characters, integers and a pointer that TUNSETIFF does not look at.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: the descriptor is open, and the argument points to an ifreq that lives through the call, with a name that ends within it.
    let done = unsafe { libc::ioctl(device.as_raw_fd(), TUNSETIFF, &raw const request) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(device) }
}
