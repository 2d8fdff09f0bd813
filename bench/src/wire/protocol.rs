//! What the two hosts of a wire measurement say to each other.
//!
//! The *server* owns the memory, so in a session of belay it is the side that dials; and it is the side that waits, as
//! perftest's server does. A bell joins the two: the client connects to the server and asks, a line of text each, to be dialled
//! back at a port of its own, once a measurement. All that matters goes over the session that results, which proves both sides
//! to each other; through the bell a stranger can only have the server dial the stranger, and be refused.
//! ```text
//!   server (owner)                              client (initiator)
//!   <───── bell: "belay-bench 1 dial PORT" ─────
//!   ═════ session, to the client's PORT ═══════>   control and lanes, TLS or loopback
//!   ── Ready: keys ────────────────────────────>   the accept's blob said what is wanted
//!   <──────────────────────── Usage, Written ───   … measured …
//!   <──────────────────────────────── Done ─────
//!   <───── bell: "belay-bench 1 bye" ───────────
//! ```

use super::usage::Usage;
use crate::error::BenchError;
use belay_transport::fabric::{LaneId, LaneKind, MAX_OPERATION_BYTES, ReadKey, RingKeys};
use serde::{Deserialize, Serialize};
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, TcpStream};
use std::time::Duration;

/// Most RAM one client may have the server allocate, and most ring.
pub const MAX_RAM_BYTES: u64 = 8 << 30;
pub const MAX_RING_BYTES: u64 = 256 << 20;
const MAX_LANES: usize = 8;
/// Behind what is written in bulk, room for the trailer that commits it.
pub const TRAILER_ROOM: u64 = 4096;
const LONGEST_LINE: usize = 512;
const HEAD: &str = "belay-bench 1 ";

/// What one measurement needs of the server; the blob of the session's accept.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Wanted {
    pub ram_bytes: u64,
    pub ring_bytes: u64,
    pub lanes: Vec<LaneId>,
}

impl Wanted {
    /// Whether the server will do it: its memory is not a stranger's to fill.
    pub fn check(&self) -> Result<(), String> {
        let ram = (4096..=MAX_RAM_BYTES).contains(&self.ram_bytes) && self.ram_bytes.is_multiple_of(4096);
        let ring =
            (2 * TRAILER_ROOM..=MAX_RING_BYTES).contains(&self.ring_bytes) && self.ring_bytes.is_multiple_of(4096);
        let lanes = (1..=MAX_LANES).contains(&self.lanes.len());
        let distinct = self.lanes.iter().enumerate().all(|(at, lane)| !self.lanes[..at].contains(lane));
        if ram && ring && lanes && distinct {
            return Ok(());
        }
        Err(format!(
            "{} bytes of RAM (whole pages, at most {MAX_RAM_BYTES}), {} of ring (at most {MAX_RING_BYTES}) and {} different \
             lanes (at most {MAX_LANES}) are not to be had",
            self.ram_bytes,
            self.ring_bytes,
            self.lanes.len()
        ))
    }
}

/// The client's words on the control stream.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub enum Ask {
    /// What the server's process has used of its CPU.
    Usage,
    /// Whether the first `bytes` of the ring are the pages that [`written_word`] of `salt` begin.
    Written { salt: u64, bytes: u64 },
    /// This measurement is over.
    Done,
}

/// The server's words.
#[derive(Debug, Serialize, Deserialize)]
pub enum Answer {
    Ready {
        ram: ReadKey,
        ring: RingKeys,
    },
    Refused {
        why: String,
    },
    Usage(Usage),
    /// The first page that is not as it must be, and the word it begins with.
    Written {
        wrong: Option<(u64, u64)>,
    },
}

/// The word with which page `page` of the server's RAM begins.
pub fn source_word(page: u64) -> u64 {
    page + 1
}

/// The word with which page `page` of what a client writes begins.
pub fn written_word(salt: u64, page: u64) -> u64 {
    salt ^ (page + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

pub const FAULT: LaneId = LaneId { kind: LaneKind::Fault, index: 0 };
pub const BULK: LaneId = LaneId { kind: LaneKind::Bulk, index: 0 };
pub const CHECKPOINT: LaneId = LaneId { kind: LaneKind::Checkpoint, index: 0 };

const _: () = assert!(MAX_OPERATION_BYTES as u64 <= MAX_RING_BYTES);

/// A client's request, or what the server has to say to it.
#[derive(Debug, PartialEq, Eq)]
pub enum Call {
    /// "Dial me at this port of mine."
    Dial(u16),
    /// "That was all."
    Bye,
    /// "I could not": from the server.
    Failed(String),
}

/// The connection by which a client calls the server, whole lines at a time.
pub struct Bell {
    stream: TcpStream,
    read: Vec<u8>,
}

impl Bell {
    pub fn new(stream: TcpStream) -> Result<Self, BenchError> {
        stream.set_nodelay(true).map_err(BenchError::io("the bell's socket"))?;
        Ok(Self { stream, read: Vec::new() })
    }

    pub fn peer(&self) -> Result<IpAddr, BenchError> {
        self.stream.peer_addr().map(|address| address.ip()).map_err(BenchError::io("the bell's peer"))
    }

    pub fn local(&self) -> Result<IpAddr, BenchError> {
        self.stream.local_addr().map(|address| address.ip()).map_err(BenchError::io("the bell's address"))
    }

    pub fn ring(&mut self, call: &Call) -> Result<(), BenchError> {
        let mut line = match call {
            Call::Dial(port) => format!("{HEAD}dial {port}"),
            Call::Bye => format!("{HEAD}bye"),
            Call::Failed(why) => format!("{HEAD}failed {}", why.replace('\n', "; ")),
        };
        let mut end = line.len().min(LONGEST_LINE - 1);
        while !line.is_char_boundary(end) {
            end -= 1;
        }
        line.truncate(end);
        line.push('\n');
        self.stream.set_write_timeout(Some(crate::rig::BOUND)).map_err(BenchError::io("the bell's socket"))?;
        self.stream.write_all(line.as_bytes()).map_err(BenchError::io("ringing the bell"))
    }

    /// The next line, waited for no longer than `bound`; `None` when it has not come by then.
    pub fn heard(&mut self, bound: Duration) -> Result<Option<Call>, BenchError> {
        let bound = bound.max(Duration::from_millis(1));
        self.stream.set_read_timeout(Some(bound)).map_err(BenchError::io("the bell's socket"))?;
        loop {
            if let Some(end) = self.read.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.read.drain(..=end).collect();
                return parse(&line[..end]).map(Some);
            }
            if self.read.len() >= LONGEST_LINE {
                return Err(BenchError::NotABench);
            }
            let mut some = [0; LONGEST_LINE];
            match self.stream.read(&mut some) {
                Ok(0) => return Err(BenchError::BellClosed),
                Ok(got) => self.read.extend_from_slice(&some[..got]),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => return Ok(None),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(BenchError::io("listening to the bell")(error)),
            }
        }
    }
}

fn parse(line: &[u8]) -> Result<Call, BenchError> {
    let text = std::str::from_utf8(line).ok().and_then(|text| text.strip_prefix(HEAD)).ok_or(BenchError::NotABench)?;
    match text.split_once(' ') {
        None if text == "bye" => Ok(Call::Bye),
        Some(("dial", port)) => port.parse().map(Call::Dial).map_err(|_| BenchError::NotABench),
        Some(("failed", why)) => Ok(Call::Failed(why.to_owned())),
        _ => Err(BenchError::NotABench),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    fn pair() -> (Bell, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (Bell::new(ours).unwrap(), listener.accept().unwrap().0)
    }

    #[test]
    fn what_is_rung_is_heard_line_by_line_and_silence_is_no_error() {
        let (mut client, server) = pair();
        let mut server = Bell::new(server).unwrap();
        let short = Duration::from_millis(1);
        assert!(server.heard(short).unwrap().is_none());
        client.ring(&Call::Dial(7001)).unwrap();
        client.ring(&Call::Bye).unwrap();
        let bound = Duration::from_secs(10);
        assert_eq!(server.heard(bound).unwrap(), Some(Call::Dial(7001)));
        assert_eq!(server.heard(bound).unwrap(), Some(Call::Bye));
        server.ring(&Call::Failed("no\nroom".into())).unwrap();
        assert_eq!(client.heard(bound).unwrap(), Some(Call::Failed("no; room".into())));
        drop(client);
        assert!(matches!(server.heard(bound), Err(BenchError::BellClosed)));
    }

    #[test]
    fn a_stranger_on_the_bell_is_refused_and_costs_a_bounded_buffer() {
        let bound = Duration::from_secs(10);
        for words in ["GET / HTTP/1.1\n", "belay-bench 1 dial 99999\n", "belay-bench 2 bye\n", &"x".repeat(4096)] {
            let (mut bell, mut stranger) = pair();
            stranger.write_all(words.as_bytes()).unwrap();
            assert!(matches!(bell.heard(bound), Err(BenchError::NotABench)), "{words:?}");
            assert!(bell.read.len() <= 2 * LONGEST_LINE);
        }
    }

    #[test]
    fn a_server_gives_only_what_it_can_afford() {
        let fair = Wanted { ram_bytes: 1 << 20, ring_bytes: 1 << 20, lanes: vec![FAULT, BULK] };
        assert!(fair.check().is_ok());
        let lanes = vec![FAULT; 2];
        for wrong in [
            Wanted { ram_bytes: 0, ..fair.clone() },
            Wanted { ram_bytes: 4095, ..fair.clone() },
            Wanted { ram_bytes: u64::MAX - 4095, ..fair.clone() },
            Wanted { ring_bytes: 0, ..fair.clone() },
            Wanted { ring_bytes: MAX_RING_BYTES + 4096, ..fair.clone() },
            Wanted { lanes: vec![], ..fair.clone() },
            Wanted { lanes, ..fair.clone() },
        ] {
            assert!(wrong.check().is_err(), "{wrong:?}");
        }
    }
}
