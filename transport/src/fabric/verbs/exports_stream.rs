//! The exports connection: a session's own connection (with its TLS) that says how to reach the owner's memory, and lives as
//! long as both sides do.
//!
//! ```text
//!   owner                                                initiator
//!   Offer: address, challenge, table version 1  ───────>
//!   <──────────────────────────────  Acknowledged: 1
//!   Table: version n (extents added)            ───────>  taken before it is acknowledged
//!   <──────────────────────────────  Acknowledged: n
//!   ... its end, in either direction: the peer is gone
//! ```
//! Frames are a length (u32, little endian) and postcard. Memory follows what has arrived, never what a length promises.

use super::error::VerbsError;
use super::proof::Challenge;
use super::table::ExportTable;
use crate::fabric::FabricError;
use crate::session::LaneStream;
use rustix::event::PollFlags;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};

/// Longest frame: a table of [`super::table::MAX_CHUNKS`] chunks, each at most 35 bytes.
const MAX_FRAME_BYTES: usize = 5 << 20;
/// Frames that wait to be sent.
const MAX_OUTGOING_BYTES: usize = 4 * MAX_FRAME_BYTES;
const CHUNK_BYTES: usize = 64 << 10;

/// What an owner says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum FromOwner {
    Offer(Offer),
    Table { version: u64, exports: Vec<ExportTable> },
}

/// How to reach the owner's memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Offer {
    /// Where it listens for queue pairs.
    pub ip: IpAddr,
    pub port: u16,
    pub challenge: Challenge,
    pub version: u64,
    pub exports: Vec<ExportTable>,
}

/// What an initiator says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum FromInitiator {
    Acknowledged { version: u64 },
}

/// Frames over a connection, none of whose steps waits.
pub(super) struct ExportsStream {
    stream: LaneStream,
    outgoing: Vec<u8>,
    sent: usize,
    incoming: Vec<u8>,
}

fn gone(error: &io::Error) -> bool {
    use io::ErrorKind as Kind;
    matches!(
        error.kind(),
        Kind::ConnectionReset | Kind::BrokenPipe | Kind::UnexpectedEof | Kind::ConnectionAborted | Kind::TimedOut
    )
}

impl ExportsStream {
    pub(super) fn new(stream: LaneStream) -> Self {
        Self { stream, outgoing: Vec::new(), sent: 0, incoming: Vec::new() }
    }

    /// Adds a frame to what is to be sent.
    pub(super) fn queue<T: Serialize>(&mut self, frame: &T) -> Result<(), FabricError> {
        let body = postcard::to_stdvec(frame).expect("plain data serializes");
        if body.len() > MAX_FRAME_BYTES || self.outgoing.len() - self.sent + body.len() + 4 > MAX_OUTGOING_BYTES {
            let what = format!("a table of {} bytes, where frames have at most {MAX_FRAME_BYTES}", body.len());
            return Err(VerbsError::BadTable { what }.into());
        }
        self.outgoing.drain(..self.sent);
        self.sent = 0;
        self.outgoing.extend_from_slice(&u32::try_from(body.len()).expect("below the limit").to_le_bytes());
        self.outgoing.extend_from_slice(&body);
        Ok(())
    }

    /// Sends what goes without waiting.
    pub(super) fn flush(&mut self) -> Result<(), Ended> {
        loop {
            let step = if self.sent < self.outgoing.len() {
                let rest = &self.outgoing[self.sent..];
                self.stream.write(&rest[..rest.len().min(CHUNK_BYTES)])
            } else {
                self.stream.flush().map(|()| 0)
            };
            match step {
                Ok(0) if self.sent == self.outgoing.len() => {
                    self.outgoing.clear();
                    self.sent = 0;
                    return Ok(());
                }
                Ok(taken) => self.sent += taken,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(Ended::from(error)),
            }
        }
    }

    /// The next whole frame, if it has arrived.
    pub(super) fn receive<T: DeserializeOwned>(&mut self) -> Result<Option<T>, Ended> {
        loop {
            if let Some(frame) = self.whole()? {
                let parsed = postcard::from_bytes(&self.incoming[4..4 + frame])
                    .map_err(|error| Ended::Faulty(format!("a frame that does not parse: {error}")))?;
                self.incoming.drain(..4 + frame);
                return Ok(Some(parsed));
            }
            let mut chunk = [0; 4096];
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(Ended::PeerClosed),
                Ok(got) => self.incoming.extend_from_slice(&chunk[..got]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(Ended::from(error)),
            }
        }
    }

    /// The length of the frame at the front, if all of it is here.
    fn whole(&self) -> Result<Option<usize>, Ended> {
        let Some(length) = self.incoming.first_chunk() else { return Ok(None) };
        let length = u32::from_le_bytes(*length) as usize;
        if length > MAX_FRAME_BYTES {
            return Err(Ended::Faulty(format!("a frame of {length} bytes, where {MAX_FRAME_BYTES} are the limit")));
        }
        Ok((self.incoming.len() >= 4 + length).then_some(length))
    }

    /// What to poll for.
    pub(super) fn interest(&self) -> PollFlags {
        let mut interest = self.stream.interest() | PollFlags::IN;
        if self.sent < self.outgoing.len() {
            interest |= PollFlags::OUT;
        }
        interest
    }
}

impl AsFd for ExportsStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// Why the connection is over.
#[derive(Debug)]
pub(super) enum Ended {
    PeerClosed,
    Faulty(String),
    Io(io::Error),
}

impl From<io::Error> for Ended {
    fn from(error: io::Error) -> Self {
        if gone(&error) { Self::PeerClosed } else { Self::Io(error) }
    }
}

impl Ended {
    /// As an error of one lane.
    pub(super) fn error(&self, lane: crate::fabric::LaneId) -> FabricError {
        match self {
            Self::PeerClosed => FabricError::PeerClosed { lane },
            Self::Faulty(what) => FabricError::Protocol { lane, what: what.clone() },
            Self::Io(error) => FabricError::Io {
                doing: "keeping up the exports connection".to_owned(),
                source: io::Error::new(error.kind(), error.to_string()),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::table::Span;
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    fn pair() -> (ExportsStream, ExportsStream) {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let (a, b) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
        (ExportsStream::new(LaneStream::for_test(a)), ExportsStream::new(LaneStream::for_test(b)))
    }

    fn table(chunks: u64) -> Vec<ExportTable> {
        let span = |at| Span { offset: at << 12, len: 4096, address: u64::MAX - (at << 13), key: u32::MAX };
        vec![ExportTable { key: 1 << 60, writable: false, spans: (0..chunks).map(span).collect() }]
    }

    #[test]
    fn the_largest_table_comes_across_in_order_however_small_the_helpings() {
        let (mut owner, mut initiator) = pair();
        let large = FromOwner::Table { version: 2, exports: table(super::super::table::MAX_CHUNKS as u64) };
        let small = FromOwner::Table { version: 3, exports: vec![] };
        owner.queue(&large).unwrap();
        owner.queue(&small).unwrap();
        let mut came = Vec::new();
        while came.len() < 2 {
            owner.flush().unwrap();
            while let Some(frame) = initiator.receive::<FromOwner>().unwrap() {
                came.push(frame);
            }
        }
        assert!(came[0] == large && came[1] == small);
        drop(owner);
        assert!(matches!(initiator.receive::<FromOwner>(), Err(Ended::PeerClosed)));
    }

    #[test]
    fn a_length_beyond_the_limit_ends_it_before_memory_is_taken() {
        let (raw, mut initiator) = pair();
        rustix::io::write(raw.as_fd(), &u32::MAX.to_le_bytes()).unwrap();
        assert!(matches!(initiator.receive::<FromOwner>(), Err(Ended::Faulty(_))));
        let (raw, mut initiator) = pair();
        rustix::io::write(raw.as_fd(), &[3, 0, 0, 0, 0xff, 0xff, 0xff]).unwrap();
        assert!(matches!(initiator.receive::<FromOwner>(), Err(Ended::Faulty(_))));
    }

    #[test]
    fn what_nobody_reads_is_bounded() {
        let (mut owner, _initiator) = pair();
        let large = FromOwner::Table { version: 2, exports: table(super::super::table::MAX_CHUNKS as u64) };
        let queued = (0..100).take_while(|_| owner.queue(&large).is_ok()).count();
        assert!((3..100).contains(&queued), "{queued} tables were taken");
        assert!(owner.outgoing.len() <= MAX_OUTGOING_BYTES);
    }
}
