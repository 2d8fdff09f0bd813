//! The control stream: frames in both directions at once, from two threads, each wait with a deadline.
//!
//! A frame is its length (u32, little endian) and its bytes. Memory follows what has *arrived*, never what a length promises.

use super::SessionError;
use super::socket::wait_for;
use super::stream::{LaneStream, Raw, pull_tls, push_tls};
use crate::deadline::Deadline;
use crate::words::explain;
use rustix::event::PollFlags;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// How much a receive asks for at once.
const CHUNK_BYTES: usize = 64 << 10;

/// A session's control stream. Shared by reference; one thread may send while another receives.
#[derive(Debug)]
pub struct Control {
    fd: OwnedFd,
    /// Held only for one non-blocking step, so that neither direction waits for the other.
    tls: Option<Mutex<Box<rustls::Connection>>>,
    /// Serialises senders; a frame is sent whole.
    sending: Mutex<()>,
    receiving: Mutex<Receiving>,
    /// What ended it first.
    ended: OnceLock<String>,
    max_frame_bytes: usize,
}

#[derive(Debug, Default)]
struct Receiving {
    header: [u8; 4],
    header_bytes: usize,
    body: Vec<u8>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic elsewhere does not make these states invalid: every step leaves them whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Control {
    pub(super) fn new(stream: LaneStream, max_frame_bytes: usize) -> Self {
        let (fd, tls) = stream.into_parts();
        Self {
            fd,
            tls: tls.map(Mutex::new),
            sending: Mutex::new(()),
            receiving: Mutex::default(),
            ended: OnceLock::new(),
            max_frame_bytes: max_frame_bytes.min(u32::MAX as usize),
        }
    }

    /// Sends one frame. Any failure, a passed deadline too, breaks the stream: a part of the frame may have left.
    pub fn send(&self, frame: &[u8], deadline: Deadline) -> Result<(), SessionError> {
        if frame.len() > self.max_frame_bytes {
            return Err(SessionError::FrameTooLarge { bytes: frame.len() as u64, limit: self.max_frame_bytes });
        }
        let length = u32::try_from(frame.len()).expect("the limit fits a u32").to_le_bytes();
        let _sending = lock(&self.sending);
        self.usable()?;
        let sent = if frame.len() <= CHUNK_BYTES {
            self.send_all(&[&length, frame].concat(), deadline)
        } else {
            self.send_all(&length, deadline).and_then(|()| self.send_all(frame, deadline))
        };
        self.remember(sent)
    }

    /// Receives one frame. A deadline that passes ([`SessionError::TimedOut`]) loses nothing; any other failure breaks the
    /// stream. The peer's closing is [`SessionError::PeerClosed`], wherever it comes.
    pub fn recv(&self, deadline: Deadline) -> Result<Vec<u8>, SessionError> {
        let mut receiving = lock(&self.receiving);
        self.usable()?;
        let received = self.recv_frame(&mut receiving, deadline);
        self.remember(received)
    }

    /// Ends the stream in both directions. A thread that waits in [`Control::recv`] returns, and so does the peer's.
    pub fn shutdown(&self) {
        let _ = self.ended.set("this side has closed it".to_owned());
        if let Some(tls) = &self.tls {
            let mut tls = lock(tls);
            tls.send_close_notify();
            let _ = push_tls(self.fd.as_fd(), &mut tls);
        }
        let _ = rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Both);
    }

    fn usable(&self) -> Result<(), SessionError> {
        self.ended.get().map_or(Ok(()), |first| Err(SessionError::Broken { first: first.clone() }))
    }

    fn remember<T>(&self, result: Result<T, SessionError>) -> Result<T, SessionError> {
        match &result {
            Ok(_) | Err(SessionError::TimedOut { doing: "receiving a frame", .. }) => {}
            Err(SessionError::Broken { .. }) => {}
            Err(error) => drop(self.ended.set(explain(error))),
        }
        result
    }

    fn wait(&self, doing: &'static str, flags: PollFlags, deadline: Deadline) -> Result<(), SessionError> {
        let bound = deadline.left();
        match wait_for(self.fd.as_fd(), flags, deadline) {
            Ok(true) => Ok(()),
            Ok(false) => Err(SessionError::TimedOut { doing, bound }),
            Err(error) => Err(SessionError::from_io(doing, error)),
        }
    }

    fn send_all(&self, bytes: &[u8], deadline: Deadline) -> Result<(), SessionError> {
        const DOING: &str = "sending a frame";
        let mut taken = 0;
        loop {
            match self.send_some(&bytes[taken..]) {
                Ok((more, flushed)) => {
                    taken += more;
                    if taken == bytes.len() && flushed {
                        return Ok(());
                    }
                    if flushed {
                        continue;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(SessionError::from_io(DOING, error)),
            }
            self.wait(DOING, PollFlags::OUT, deadline)?;
        }
    }

    /// One non-blocking step: bytes taken, and whether everything taken so far has left.
    fn send_some(&self, bytes: &[u8]) -> io::Result<(usize, bool)> {
        match &self.tls {
            None => Raw(self.fd.as_fd()).write(bytes).map(|sent| (sent, true)),
            Some(tls) => {
                let mut tls = lock(tls);
                let taken = tls.writer().write(bytes)?;
                match push_tls(self.fd.as_fd(), &mut tls) {
                    Ok(()) => Ok((taken, true)),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok((taken, false)),
                    Err(error) => Err(error),
                }
            }
        }
    }

    fn recv_frame(&self, state: &mut Receiving, deadline: Deadline) -> Result<Vec<u8>, SessionError> {
        while state.header_bytes < 4 {
            let from = state.header_bytes;
            state.header_bytes += self.recv_some(&mut state.header[from..], deadline)?;
        }
        let length = u32::from_le_bytes(state.header) as usize;
        if length > self.max_frame_bytes {
            return Err(SessionError::FrameTooLarge { bytes: length as u64, limit: self.max_frame_bytes });
        }
        while state.body.len() < length {
            let have = state.body.len();
            let chunk = CHUNK_BYTES.min(length - have);
            state.body.resize(have + chunk, 0);
            let got = self.recv_some(&mut state.body[have..], deadline);
            state.body.truncate(have + got.as_ref().map_or(0, |got| *got));
            got?;
        }
        state.header_bytes = 0;
        Ok(std::mem::take(&mut state.body))
    }

    /// Waits for at least one byte.
    fn recv_some(&self, into: &mut [u8], deadline: Deadline) -> Result<usize, SessionError> {
        const DOING: &str = "receiving a frame";
        loop {
            match self.try_recv(into) {
                Ok(0) => return Err(SessionError::PeerClosed { doing: DOING }),
                Ok(got) => return Ok(got),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(SessionError::from_io(DOING, error)),
            }
            self.wait(DOING, PollFlags::IN, deadline)?;
        }
    }

    fn try_recv(&self, into: &mut [u8]) -> io::Result<usize> {
        let Some(tls) = &self.tls else {
            return Raw(self.fd.as_fd()).read(into);
        };
        let mut tls = lock(tls);
        loop {
            match tls.reader().read(into) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
                done => return done,
            }
            if !pull_tls(self.fd.as_fd(), &mut tls)? {
                return Ok(0);
            }
        }
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
