//! What a relay and the page server that has its hand say to each other: [frames](super::frames) whose first byte says what they are.

use super::frames::FramesError;

/// Version of these messages. Both sides must have the same: relay and page server are of one host.
pub const VERSION: u16 = 1;

/// From the page server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FromHand<'a> {
    /// The first: gives the relay into its hand.
    Attach { version: u16 },
    /// Instead of that: who is connected? Answered as an attachment is, which it is not.
    Look { version: u16 },
    /// To the world.
    Emit(&'a [u8]),
    /// The guest has been stopped: give all that it had sent, hold what is for it, and say so.
    Settle { number: u64 },
    /// The guest goes on.
    Go,
    /// Whatever the guest sends may leave from here on: let go.
    LetGo,
}

/// From the relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FromRelay<'a> {
    /// The page server has the hand, or sees how it would be. `guest`: process of the QEMU that is connected, 0 for none.
    Attached { version: u16, guest: u32 },
    /// It does not get it.
    Refused(&'a str),
    /// From the guest.
    Frame(&'a [u8]),
    /// All that the guest had sent before [`FromHand::Settle`] went out before this. `torn`: part of a frame has come, and the rest has
    /// not; `dropped`: frames of the guest's that found no room since the last time.
    Settled { number: u64, torn: bool, dropped: u64 },
    /// The relay has let go: what was emitted before has been passed on.
    Free,
}

/// What is no message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    #[error(transparent)]
    Frames(#[from] FramesError),
    #[error("a message of type {kind:#04x} and {bytes} bytes, which is none of version {VERSION}")]
    Unknown { kind: u8, bytes: usize },
}

const ATTACH: u8 = b'A';
const LOOK: u8 = b'?';
const EMIT: u8 = b'E';
const SETTLE: u8 = b'S';
const GO: u8 = b'G';
const LET_GO: u8 = b'L';
const ATTACHED: u8 = b'a';
const REFUSED: u8 = b'x';
const FRAME: u8 = b'f';
const SETTLED: u8 = b's';
const FREE: u8 = b'l';

/// A message's parts in the order of their bytes.
pub(super) struct Encoded<'a> {
    head: [u8; 18],
    head_bytes: usize,
    tail: &'a [u8],
}

impl<'a> Encoded<'a> {
    fn new(kind: u8, fixed: &[&[u8]], tail: &'a [u8]) -> Self {
        let (mut head, mut at) = ([kind; 18], 1);
        for part in fixed {
            head[at..at + part.len()].copy_from_slice(part);
            at += part.len();
        }
        Self { head, head_bytes: at, tail }
    }

    pub(super) fn parts(&self) -> [&[u8]; 2] {
        [&self.head[..self.head_bytes], self.tail]
    }
}

impl<'a> FromHand<'a> {
    pub(super) fn encode(&self) -> Encoded<'a> {
        match *self {
            Self::Attach { version } => Encoded::new(ATTACH, &[&version.to_be_bytes()], &[]),
            Self::Look { version } => Encoded::new(LOOK, &[&version.to_be_bytes()], &[]),
            Self::Emit(frame) => Encoded::new(EMIT, &[], frame),
            Self::Settle { number } => Encoded::new(SETTLE, &[&number.to_be_bytes()], &[]),
            Self::Go => Encoded::new(GO, &[], &[]),
            Self::LetGo => Encoded::new(LET_GO, &[], &[]),
        }
    }

    pub(super) fn decode(bytes: &'a [u8]) -> Result<Self, MessageError> {
        let unknown = || MessageError::Unknown { kind: bytes.first().copied().unwrap_or(0), bytes: bytes.len() };
        let (kind, rest) = bytes.split_first().ok_or_else(unknown)?;
        Ok(match (*kind, rest) {
            (ATTACH, rest) => Self::Attach { version: u16::from_be_bytes(rest.try_into().map_err(|_| unknown())?) },
            (LOOK, rest) => Self::Look { version: u16::from_be_bytes(rest.try_into().map_err(|_| unknown())?) },
            (EMIT, [_, ..]) => Self::Emit(rest),
            (SETTLE, rest) => Self::Settle { number: u64::from_be_bytes(rest.try_into().map_err(|_| unknown())?) },
            (GO, []) => Self::Go,
            (LET_GO, []) => Self::LetGo,
            _ => return Err(unknown()),
        })
    }
}

impl<'a> FromRelay<'a> {
    pub(super) fn encode(&self) -> Encoded<'a> {
        match *self {
            Self::Attached { version, guest } => {
                Encoded::new(ATTACHED, &[&version.to_be_bytes(), &guest.to_be_bytes()], &[])
            }
            Self::Refused(why) => Encoded::new(REFUSED, &[], why.as_bytes()),
            Self::Frame(frame) => Encoded::new(FRAME, &[], frame),
            Self::Settled { number, torn, dropped } => {
                Encoded::new(SETTLED, &[&number.to_be_bytes(), &[u8::from(torn)], &dropped.to_be_bytes()], &[])
            }
            Self::Free => Encoded::new(FREE, &[], &[]),
        }
    }

    pub(super) fn decode(bytes: &'a [u8]) -> Result<Self, MessageError> {
        let unknown = || MessageError::Unknown { kind: bytes.first().copied().unwrap_or(0), bytes: bytes.len() };
        let (kind, rest) = bytes.split_first().ok_or_else(unknown)?;
        Ok(match (*kind, rest) {
            (ATTACHED, &[high, low, a, b, c, d]) => {
                Self::Attached { version: u16::from_be_bytes([high, low]), guest: u32::from_be_bytes([a, b, c, d]) }
            }
            (REFUSED, why) => Self::Refused(std::str::from_utf8(why).map_err(|_| unknown())?),
            (FRAME, [_, ..]) => Self::Frame(rest),
            (SETTLED, rest) => {
                let (number, rest) = rest.split_first_chunk().ok_or_else(unknown)?;
                let ([torn @ (0 | 1)], dropped) = rest.split_first_chunk().ok_or_else(unknown)? else {
                    return Err(unknown());
                };
                Self::Settled {
                    number: u64::from_be_bytes(*number),
                    torn: *torn == 1,
                    dropped: u64::from_be_bytes(dropped.try_into().map_err(|_| unknown())?),
                }
            }
            (FREE, []) => Self::Free,
            _ => return Err(unknown()),
        })
    }
}
