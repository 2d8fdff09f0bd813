//! What a disk relay and the page server that has its hand say to each other: four bytes of length, most significant first, then a message whose
//! first byte says what it is.

use std::io::{self, Read, Write};

/// Version of these messages. Both sides must have the same: relay and page server are of one host.
pub const VERSION: u16 = 1;
/// Most bytes of a log in one message.
pub const CHUNK_BYTES: usize = 1 << 20;
/// Longest message.
const MOST_BYTES: usize = CHUNK_BYTES + 64;

/// Why a page server takes a relay in hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Its guest is here and is to leave.
    Leaving,
    /// A guest is to come.
    Arriving,
}

/// From the page server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FromHand<'a> {
    /// The first: gives the relay into its hand, for the guest of this process.
    Attach { version: u16, role: Role, guest: u32 },
    /// Instead of that: what is this relay? Answered as an attachment is, which it is not.
    Look { version: u16 },
    /// The guest stands and leaves: nothing of it writes from here on.
    Away,
    /// Part of a log that [`FromHand::Apply`] ends.
    Chunk(&'a [u8]),
    /// Do to the image what the log says.
    Apply,
    /// The guest goes on here, in this process.
    Back { guest: u32 },
    /// The guest is another host's: give the image up.
    Gone,
    /// The guest is about to be stopped: take what it has sent, whatever is held. Not answered.
    Prepare,
    /// The guest stands: close the epoch and give its log.
    Settle { epoch: u64 },
    /// The guest goes on. Not answered.
    Go,
    /// The source has written everything up to this epoch to the image. Not answered.
    Applied { epoch: u64 },
    /// Is there room for another epoch?
    Room,
    /// The guest is this host's own: write what the image lacks, and from then on write the image.
    Own,
    /// Let go.
    LetGo,
}

/// From the relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FromRelay<'a> {
    /// What it is. `guests`: processes that are connected, four bytes each.
    Attached { version: u16, disk_bytes: u64, name: &'a str, socket: &'a str, guests: &'a [u8] },
    /// The hand is somebody else's, or cannot be taken for that.
    Refused(&'a str),
    /// Part of the log that [`FromRelay::Settled`] ends.
    Chunk(&'a [u8]),
    /// The log is complete; whether the guest flushed.
    Settled { flushed: bool },
    /// What was asked for is done.
    Done,
    /// It is not.
    Failed(&'a str),
}

/// What is no message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a message of type {kind:#04x} and {bytes} bytes, which is none of version {VERSION}")]
pub struct MessageError {
    pub kind: u8,
    pub bytes: usize,
}

/// Takes fields off the front of a message.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (field, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*field)
    }

    /// With its length in two bytes before it.
    fn text(&mut self) -> Option<&'a str> {
        let len = u16::from_be_bytes(self.array()?);
        let (text, rest) = self.0.split_at_checked(usize::from(len))?;
        self.0 = rest;
        std::str::from_utf8(text).ok()
    }

    fn end(&self) -> Option<()> {
        self.0.is_empty().then_some(())
    }
}

fn text(into: &mut Vec<u8>, text: &str) {
    // Names are bounded, paths of sockets more so.
    let bytes = &text.as_bytes()[..text.len().min(usize::from(u16::MAX))];
    into.extend((bytes.len() as u16).to_be_bytes());
    into.extend_from_slice(bytes);
}

impl<'a> FromHand<'a> {
    pub(super) fn encode(&self) -> Vec<u8> {
        let with = |kind: u8, fields: &[u8]| [&[kind], fields].concat();
        match *self {
            Self::Attach { version, role, guest } => {
                let role = if role == Role::Leaving { b'l' } else { b'a' };
                with(b'A', &[&version.to_be_bytes()[..], &[role], &guest.to_be_bytes()].concat())
            }
            Self::Look { version } => with(b'?', &version.to_be_bytes()),
            Self::Away => with(b'W', &[]),
            Self::Chunk(log) => with(b'C', log),
            Self::Apply => with(b'D', &[]),
            Self::Back { guest } => with(b'B', &guest.to_be_bytes()),
            Self::Gone => with(b'N', &[]),
            Self::Prepare => with(b'P', &[]),
            Self::Settle { epoch } => with(b'S', &epoch.to_be_bytes()),
            Self::Go => with(b'G', &[]),
            Self::Applied { epoch } => with(b'U', &epoch.to_be_bytes()),
            Self::Room => with(b'R', &[]),
            Self::Own => with(b'O', &[]),
            Self::LetGo => with(b'L', &[]),
        }
    }

    pub(super) fn decode(bytes: &'a [u8]) -> Result<Self, MessageError> {
        Self::read(bytes).ok_or(unknown(bytes))
    }

    fn read(bytes: &'a [u8]) -> Option<Self> {
        let (kind, rest) = bytes.split_first()?;
        let mut fields = Fields(rest);
        let message = match kind {
            b'A' => {
                let version = u16::from_be_bytes(fields.array()?);
                let role = match fields.array()? {
                    [b'l'] => Role::Leaving,
                    [b'a'] => Role::Arriving,
                    _ => return None,
                };
                Self::Attach { version, role, guest: u32::from_be_bytes(fields.array()?) }
            }
            b'?' => Self::Look { version: u16::from_be_bytes(fields.array()?) },
            b'W' => Self::Away,
            b'C' if rest.len() <= CHUNK_BYTES => return Some(Self::Chunk(rest)),
            b'D' => Self::Apply,
            b'B' => Self::Back { guest: u32::from_be_bytes(fields.array()?) },
            b'N' => Self::Gone,
            b'P' => Self::Prepare,
            b'S' => Self::Settle { epoch: u64::from_be_bytes(fields.array()?) },
            b'G' => Self::Go,
            b'U' => Self::Applied { epoch: u64::from_be_bytes(fields.array()?) },
            b'R' => Self::Room,
            b'O' => Self::Own,
            b'L' => Self::LetGo,
            _ => return None,
        };
        fields.end().map(|()| message)
    }
}

impl<'a> FromRelay<'a> {
    pub(super) fn encode(&self) -> Vec<u8> {
        match *self {
            Self::Attached { version, disk_bytes, name, socket, guests } => {
                let mut bytes = [&b"a"[..], &version.to_be_bytes()[..], &disk_bytes.to_be_bytes()].concat();
                text(&mut bytes, name);
                text(&mut bytes, socket);
                bytes.extend_from_slice(guests);
                bytes
            }
            Self::Refused(why) => [&b"x"[..], why.as_bytes()].concat(),
            Self::Chunk(log) => [&b"c"[..], log].concat(),
            Self::Settled { flushed } => vec![b's', u8::from(flushed)],
            Self::Done => vec![b'd'],
            Self::Failed(why) => [&b"f"[..], why.as_bytes()].concat(),
        }
    }

    pub(super) fn decode(bytes: &'a [u8]) -> Result<Self, MessageError> {
        Self::read(bytes).ok_or(unknown(bytes))
    }

    fn read(bytes: &'a [u8]) -> Option<Self> {
        let (kind, rest) = bytes.split_first()?;
        Some(match (*kind, rest) {
            (b'a', rest) => {
                let mut fields = Fields(rest);
                let (version, disk_bytes) = (u16::from_be_bytes(fields.array()?), u64::from_be_bytes(fields.array()?));
                let (name, socket) = (fields.text()?, fields.text()?);
                let guests = (fields.0.len() % 4 == 0).then_some(fields.0)?;
                Self::Attached { version, disk_bytes, name, socket, guests }
            }
            (b'x', why) => Self::Refused(std::str::from_utf8(why).ok()?),
            (b'c', log) if log.len() <= CHUNK_BYTES => Self::Chunk(log),
            (b's', [flushed @ (0 | 1)]) => Self::Settled { flushed: *flushed == 1 },
            (b'd', []) => Self::Done,
            (b'f', why) => Self::Failed(std::str::from_utf8(why).ok()?),
            _ => return None,
        })
    }
}

fn unknown(bytes: &[u8]) -> MessageError {
    MessageError { kind: bytes.first().copied().unwrap_or(0), bytes: bytes.len() }
}

/// Writes one message.
pub(super) fn put(stream: &mut impl Write, message: &[u8]) -> io::Result<()> {
    assert!(!message.is_empty() && message.len() <= MOST_BYTES, "a message of {} bytes", message.len());
    stream.write_all(&[&(message.len() as u32).to_be_bytes(), message].concat())
}

/// Reads one message.
pub(super) fn get(stream: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut len = [0; 4];
    stream.read_exact(&mut len)?;
    let len = u32::from_be_bytes(len) as usize;
    if len == 0 || len > MOST_BYTES {
        let why = format!("a message of {len} bytes was announced; messages have 1 to {MOST_BYTES}");
        return Err(io::Error::new(io::ErrorKind::InvalidData, why));
    }
    let mut message = vec![0; len];
    stream.read_exact(&mut message)?;
    Ok(message)
}

/// A message that is understood is written as it came.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz(bytes: &[u8]) {
    let mut rest = bytes;
    while let Ok(message) = get(&mut rest) {
        if let Ok(understood) = FromHand::decode(&message) {
            assert_eq!(understood.encode(), message);
        }
        if let Ok(understood) = FromRelay::decode(&message) {
            assert_eq!(understood.encode(), message);
        }
    }
}

/// Every message, encoded: what golden files and the fuzzers' corpus are made of.
#[cfg(test)]
pub(crate) mod golden {
    use super::*;
    use crate::golden::compare;

    pub(crate) fn from_hand() -> Vec<(&'static str, Vec<u8>)> {
        let number = 0x0102_0304_0506_0708;
        let messages = [
            ("attach-leaving", FromHand::Attach { version: 0x0102, role: Role::Leaving, guest: 0x0304_0506 }),
            ("attach-arriving", FromHand::Attach { version: 0x0102, role: Role::Arriving, guest: 0x0304_0506 }),
            ("look", FromHand::Look { version: 0x0102 }),
            ("away", FromHand::Away),
            ("chunk", FromHand::Chunk(&[0xd5; 9])),
            ("apply", FromHand::Apply),
            ("back", FromHand::Back { guest: 0x0304_0506 }),
            ("gone", FromHand::Gone),
            ("prepare", FromHand::Prepare),
            ("settle", FromHand::Settle { epoch: number }),
            ("go", FromHand::Go),
            ("applied", FromHand::Applied { epoch: number }),
            ("room", FromHand::Room),
            ("own", FromHand::Own),
            ("let-go", FromHand::LetGo),
        ];
        messages.map(|(name, message)| (name, message.encode())).to_vec()
    }

    pub(crate) fn from_relay() -> Vec<(&'static str, Vec<u8>)> {
        let guests = &[0, 0, 0, 7, 0, 0, 0, 9];
        let attached = FromRelay::Attached {
            version: 0x0102,
            disk_bytes: 0x0102_0304_0506_0708,
            name: "vda",
            socket: "/run/vm1.nbd",
            guests,
        };
        let messages = [
            ("attached", attached),
            ("refused", FromRelay::Refused("process 7 has the hand")),
            ("chunk", FromRelay::Chunk(&[0xd5; 9])),
            ("settled", FromRelay::Settled { flushed: true }),
            ("done", FromRelay::Done),
            ("failed", FromRelay::Failed("No space left on device")),
        ];
        messages.map(|(name, message)| (name, message.encode())).to_vec()
    }

    #[test]
    fn messages_are_what_they_were_when_their_version_came_out() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");
        for (name, bytes) in compare(folder, VERSION, "disk-from-hand", &from_hand()) {
            assert_eq!(FromHand::decode(&bytes).expect(&name).encode(), bytes, "{name}");
        }
        for (name, bytes) in compare(folder, VERSION, "disk-from-relay", &from_relay()) {
            assert_eq!(FromRelay::decode(&bytes).expect(&name).encode(), bytes, "{name}");
        }
    }
}
