//! One connection after its preamble: a non-blocking socket, with or without TLS on it.

use super::SessionError;
use super::socket::{is_loopback, wait_for};
use crate::deadline::Deadline;
use rustix::event::PollFlags;
use rustix::net::{RecvFlags, SendFlags};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Most plaintext and most ciphertext that TLS holds for sending, each.
const TLS_BUFFER_BYTES: usize = 256 << 10;

/// A connection that belongs to a session. Lanes are handed to the fabric as this.
#[derive(Debug)]
pub struct LaneStream {
    fd: OwnedFd,
    tls: Option<Box<rustls::Connection>>,
}

/// The socket as rustls wants it.
pub(crate) struct Raw<'a>(pub BorrowedFd<'a>);

impl Read for Raw<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            match rustix::net::recv(self.0, &mut *into, RecvFlags::empty()) {
                Ok((got, _)) => return Ok(got),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Write for Raw<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match rustix::net::send(self.0, bytes, SendFlags::NOSIGNAL) {
                Ok(sent) => return Ok(sent),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Hands TLS one helping of received bytes; `Ok(false)` at the end of the stream.
pub(crate) fn pull_tls(fd: BorrowedFd<'_>, tls: &mut rustls::Connection) -> io::Result<bool> {
    let got = tls.read_tls(&mut Raw(fd))?;
    if let Err(error) = tls.process_new_packets() {
        // The alert that says why; the error itself is what counts.
        let _ = tls.write_tls(&mut Raw(fd));
        return Err(io::Error::new(io::ErrorKind::InvalidData, error));
    }
    if tls.wants_write() {
        match tls.write_tls(&mut Raw(fd)) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
            Ok(_) | Err(_) => {}
        }
    }
    Ok(got > 0)
}

/// Sends what TLS holds ready; `WouldBlock` if the socket will not take all of it.
pub(crate) fn push_tls(fd: BorrowedFd<'_>, tls: &mut rustls::Connection) -> io::Result<()> {
    while tls.wants_write() {
        if tls.write_tls(&mut Raw(fd))? == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
    }
    Ok(())
}

impl LaneStream {
    pub(super) fn plain(fd: OwnedFd) -> Self {
        Self { fd, tls: None }
    }

    /// One that no session has opened.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn for_test(fd: OwnedFd) -> Self {
        Self::plain(fd)
    }

    pub(super) fn start_tls(&mut self, mut connection: rustls::Connection) {
        connection.set_buffer_limit(Some(TLS_BUFFER_BYTES));
        self.tls = Some(Box::new(connection));
    }

    pub(super) fn tls(&self) -> Option<&rustls::Connection> {
        self.tls.as_deref()
    }

    /// Whether the other end is on this host for certain: a Unix socket, or a loopback address.
    pub(super) fn stays_on_this_host(&self) -> bool {
        match rustix::net::getpeername(&self.fd) {
            Ok(Some(peer)) if peer.address_family() == rustix::net::AddressFamily::UNIX => true,
            Ok(Some(peer)) => std::net::SocketAddr::try_from(peer).is_ok_and(|peer| is_loopback(peer.ip())),
            Ok(None) | Err(_) => false,
        }
    }

    /// The socket and, if there is one, the TLS state on it.
    pub fn into_parts(self) -> (OwnedFd, Option<Box<rustls::Connection>>) {
        (self.fd, self.tls)
    }

    /// Reads what there is. `Ok(0)`: the peer has closed. `WouldBlock`: nothing yet.
    pub(crate) fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let Some(tls) = self.tls.as_deref_mut() else {
            return Raw(self.fd.as_fd()).read(into);
        };
        loop {
            match tls.reader().read(into) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
                done => return done,
            }
            if !pull_tls(self.fd.as_fd(), tls)? {
                return Ok(0);
            }
        }
    }

    /// Takes as much of `bytes` as fits for sending. What TLS has taken leaves with [`LaneStream::flush`].
    pub(crate) fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.tls.as_deref_mut() {
            None => Raw(self.fd.as_fd()).write(bytes),
            Some(tls) => {
                let taken = tls.writer().write(bytes)?;
                match push_tls(self.fd.as_fd(), tls) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock && taken > 0 => Ok(taken),
                    Err(error) => Err(error),
                    Ok(()) => Ok(taken),
                }
            }
        }
    }

    /// Sends what TLS holds; `WouldBlock` if the socket will not take all of it now.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        match self.tls.as_deref_mut() {
            None => Ok(()),
            Some(tls) => push_tls(self.fd.as_fd(), tls),
        }
    }

    /// One step of the TLS handshake: `Ok(true)` once it is done, `WouldBlock` while the peer's turn is awaited.
    pub(super) fn handshake(&mut self) -> io::Result<bool> {
        let Some(tls) = self.tls.as_deref_mut() else {
            return Ok(true);
        };
        loop {
            push_tls(self.fd.as_fd(), tls)?;
            if !tls.is_handshaking() {
                return Ok(true);
            }
            if !pull_tls(self.fd.as_fd(), tls)? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    /// What to poll for when an operation would block.
    pub(crate) fn interest(&self) -> PollFlags {
        match &self.tls {
            Some(tls) if tls.wants_write() => PollFlags::IN | PollFlags::OUT,
            _ => PollFlags::IN,
        }
    }

    /// Repeats a non-blocking step until it is done.
    fn until<T>(
        &mut self,
        doing: &'static str,
        flags: PollFlags,
        deadline: Deadline,
        mut step: impl FnMut(&mut Self) -> io::Result<T>,
    ) -> Result<T, SessionError> {
        let bound = deadline.left();
        loop {
            match step(self) {
                Ok(done) => return Ok(done),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(SessionError::from_io(doing, error)),
            }
            let ready = wait_for(self.fd.as_fd(), flags | self.interest_for(flags), deadline);
            match ready {
                Ok(true) => {}
                Ok(false) => return Err(SessionError::TimedOut { doing, bound }),
                Err(error) => return Err(SessionError::from_io(doing, error)),
            }
        }
    }

    fn interest_for(&self, flags: PollFlags) -> PollFlags {
        if flags.contains(PollFlags::IN) { self.interest() } else { PollFlags::empty() }
    }

    /// Completes the TLS handshake, if there is one.
    pub(super) fn finish_handshake(&mut self, deadline: Deadline) -> Result<(), SessionError> {
        self.until("shaking hands", PollFlags::IN, deadline, |stream| stream.handshake().map(|_| ()))
    }

    /// Fills `into`.
    pub(super) fn read_exact(
        &mut self,
        doing: &'static str,
        into: &mut [u8],
        deadline: Deadline,
    ) -> Result<(), SessionError> {
        let mut filled = 0;
        while filled < into.len() {
            let rest = &mut into[filled..];
            match self.until(doing, PollFlags::IN, deadline, |stream| stream.read(rest))? {
                0 => return Err(SessionError::PeerClosed { doing }),
                got => filled += got,
            }
        }
        Ok(())
    }

    /// Sends all of `bytes`.
    pub(super) fn write_all(
        &mut self,
        doing: &'static str,
        bytes: &[u8],
        deadline: Deadline,
    ) -> Result<(), SessionError> {
        let mut sent = 0;
        while sent < bytes.len() {
            sent += self.until(doing, PollFlags::OUT, deadline, |stream| stream.write(&bytes[sent..]))?;
        }
        self.until(doing, PollFlags::OUT, deadline, Self::flush)
    }
}

impl AsFd for LaneStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
