//! Sockets: making, dialling and waiting for them, and who is at their other end.

use super::{Address, SessionConfig, SessionError};
use crate::deadline::Deadline;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::time::Duration;

/// Socket buffers asked for where the process may (CAP_NET_ADMIN); elsewhere the kernel's own tuning stays on.
const SOCKET_BUFFER_BYTES: usize = 4 << 20;
/// Connections the kernel holds for the acceptor; with fewer, a burst of strangers costs an honest source a lost SYN.
const BACKLOG: i32 = 1024;
/// Pause before a Unix socket whose backlog is full is tried again.
const BACKLOG_RETRY: Duration = Duration::from_millis(2);

/// Waits until `fd` shows one of `flags` (or an error or hang-up), `false` once `deadline` has passed.
pub(crate) fn wait_for(fd: BorrowedFd<'_>, flags: PollFlags, deadline: Deadline) -> io::Result<bool> {
    loop {
        let timeout = timespec(deadline.left());
        let mut fds = [PollFd::from_borrowed_fd(fd, flags)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(0) if deadline.expired() => return Ok(false),
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => return Ok(true),
            Err(error) => return Err(error.into()),
        }
    }
}

/// A duration as poll(2) takes it.
pub(crate) fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(duration.subsec_nanos()),
    }
}

pub(super) fn is_loopback(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => v4.is_loopback(),
        IpAddr::V6(v6) => v6.is_loopback() || v6.to_ipv4_mapped().is_some_and(|v4| v4.is_loopback()),
    }
}

/// The address that this end of a connection has, where it has one.
pub(crate) fn own_ip(connection: impl AsFd) -> Option<IpAddr> {
    let own = rustix::net::getsockname(connection).ok()?;
    SocketAddr::try_from(own).ok().map(|own| own.ip().to_canonical())
}

/// Refuses plaintext beyond this host unless it was asked for.
pub(super) fn check_reach(address: &SocketAddr, config: &SessionConfig) -> Result<(), SessionError> {
    match config.security {
        super::Security::LoopbackOnly if !is_loopback(address.ip()) => {
            Err(SessionError::NotLoopback { address: address.to_string() })
        }
        super::Security::LoopbackOnly | super::Security::Insecure | super::Security::Tls(_) => Ok(()),
    }
}

/// Sets what every TCP connection of a session has: no Nagle delay, large buffers, an end to silence, pacing.
pub(super) fn tune_tcp(fd: BorrowedFd<'_>, config: &SessionConfig) -> io::Result<()> {
    sockopt::set_tcp_nodelay(fd, true)?;
    // Without the privilege the plain options would only switch the kernel's auto-tuning off, at less than it reaches.
    let _ = sockopt::set_socket_recv_buffer_size_force(fd, SOCKET_BUFFER_BYTES);
    let _ = sockopt::set_socket_send_buffer_size_force(fd, SOCKET_BUFFER_BYTES);
    let silence = config.peer_silence.max(Duration::from_secs(2));
    sockopt::set_socket_keepalive(fd, true)?;
    sockopt::set_tcp_keepidle(fd, Duration::from_secs(1))?;
    sockopt::set_tcp_keepintvl(fd, Duration::from_secs(1))?;
    sockopt::set_tcp_keepcnt(fd, u32::try_from(silence.as_secs() - 1).unwrap_or(u32::MAX).clamp(1, 127))?;
    sockopt::set_tcp_user_timeout(fd, u32::try_from(silence.as_millis()).unwrap_or(u32::MAX))?;
    if let Some(rate) = config.pace_bytes_per_s {
        pace(fd, rate)?;
    }
    Ok(())
}

/// SO_MAX_PACING_RATE (socket(7)); TCP paces by itself where no `fq` queue does it.
fn pace(fd: BorrowedFd<'_>, bytes_per_s: u64) -> io::Result<()> {
    // SAFETY: the option's value is a u64 in bytes per second; pointer and length describe `bytes_per_s`.
    let done = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MAX_PACING_RATE,
            (&raw const bytes_per_s).cast(),
            size_of::<u64>() as libc::socklen_t,
        )
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Connects to `address`, non-blocking from then on.
pub(super) fn dial(address: &Address, config: &SessionConfig, deadline: Deadline) -> Result<OwnedFd, SessionError> {
    match address {
        Address::Tcp(host_and_port) => dial_tcp(host_and_port, config, deadline),
        Address::Unix(path) => dial_unix(address, path, deadline),
    }
}

fn dial_tcp(host_and_port: &str, config: &SessionConfig, deadline: Deadline) -> Result<OwnedFd, SessionError> {
    let mut last = None;
    for candidate in Address::resolve(host_and_port)? {
        check_reach(&candidate, config)?;
        let left = deadline.left();
        if left.is_zero() {
            return Err(SessionError::TimedOut { doing: "connecting", bound: left });
        }
        match TcpStream::connect_timeout(&candidate, left) {
            Ok(stream) => {
                let io =
                    |source| SessionError::Io { doing: format!("setting up the connection to {candidate}"), source };
                stream.set_nonblocking(true).map_err(io)?;
                tune_tcp(stream.as_fd(), config).map_err(io)?;
                return Ok(stream.into());
            }
            Err(error) => last = Some(SessionError::Io { doing: format!("connecting to {candidate}"), source: error }),
        }
    }
    Err(last.expect("resolve never gives an empty list"))
}

fn unix_socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?)
}

fn dial_unix(address: &Address, path: &Path, deadline: Deadline) -> Result<OwnedFd, SessionError> {
    let io = |source: io::Error| SessionError::Io { doing: format!("connecting to {address}"), source };
    let target = SocketAddrUnix::new(path).map_err(|error| io(error.into()))?;
    let bound = deadline.left();
    loop {
        let fd = unix_socket().map_err(io)?;
        match rustix::net::connect(&fd, &target) {
            Ok(()) => {
                check_uid(fd.as_fd(), address)?;
                return Ok(fd);
            }
            // The listener's backlog is full; there is nothing to poll for.
            Err(Errno::AGAIN) if !deadline.expired() => std::thread::sleep(BACKLOG_RETRY.min(deadline.left())),
            Err(Errno::AGAIN) => return Err(SessionError::TimedOut { doing: "connecting", bound }),
            Err(error) => return Err(io(error.into())),
        }
    }
}

/// Accepts only our own uid or root at the other end of a Unix socket (SO_PEERCRED, unix(7)).
pub(super) fn check_uid(fd: BorrowedFd<'_>, address: &Address) -> Result<(), SessionError> {
    let peer = sockopt::socket_peercred(fd)
        .map_err(|error| SessionError::Io { doing: format!("asking who is at {address}"), source: error.into() })?
        .uid;
    let own = rustix::process::geteuid();
    if peer == own || peer.is_root() {
        return Ok(());
    }
    Err(SessionError::ForeignUid { address: address.to_string(), peer: peer.as_raw(), own: own.as_raw() })
}

/// Listens on `address`; gives the socket and the address it has got (a port of 0 is filled in).
pub(super) fn listen(address: &Address, config: &SessionConfig) -> Result<(OwnedFd, Address), SessionError> {
    let io = |source: io::Error| SessionError::Io { doing: format!("listening on {address}"), source };
    match address {
        Address::Tcp(host_and_port) => {
            let candidates = Address::resolve(host_and_port)?;
            for candidate in &candidates {
                check_reach(candidate, config)?;
            }
            let listener = TcpListener::bind(&candidates[..]).map_err(io)?;
            listener.set_nonblocking(true).map_err(io)?;
            // std listens with a backlog of 128; listening again only changes that.
            rustix::net::listen(&listener, BACKLOG).map_err(|error| io(error.into()))?;
            let bound = listener.local_addr().map_err(io)?.to_string();
            Ok((listener.into(), Address::Tcp(bound)))
        }
        Address::Unix(path) => {
            let target = SocketAddrUnix::new(path).map_err(|error| io(error.into()))?;
            remove_stale(path, &target).map_err(io)?;
            let fd = unix_socket().map_err(io)?;
            // Set on the unbound socket, so that there is no moment at which the path has wider rights (bind keeps the mode).
            rustix::fs::fchmod(&fd, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR).map_err(|e| io(e.into()))?;
            rustix::net::bind(&fd, &target).map_err(|error| io(error.into()))?;
            rustix::net::listen(&fd, BACKLOG).map_err(|error| io(error.into()))?;
            Ok((fd, address.clone()))
        }
    }
}

/// Removes a socket that a dead process has left behind; one that still answers is not touched.
fn remove_stale(path: &Path, target: &SocketAddrUnix) -> io::Result<()> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => match rustix::net::connect(&unix_socket()?, target) {
            Err(Errno::CONNREFUSED) => std::fs::remove_file(path),
            _ => Err(io::Error::new(io::ErrorKind::AddrInUse, "another process listens there")),
        },
        Ok(_) => Err(io::Error::new(io::ErrorKind::AlreadyExists, "the path exists and is not a socket")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}
