//! One accepted connection on its way to a session: a state machine that never waits.
//!
//! ```text
//!   Preamble ──> (Tls) ──> Hello ──> Arrived::Control
//!                    └───> Token ──> Arrived::Lane
//!   Preamble ──────────────────────> Arrived::Guard
//! ```

use super::hello::{Hello, MAX_HELLO_BYTES, decode_hello, encode_no_common_fabric, encode_refusal};
use super::listen::Shared;
use super::preamble::{
    Answer, BadPreamble, Kind, LANE_REFUSED, PREAMBLE_BYTES, PREAMBLE_VERSION, Preamble, Protection, SessionId, Token,
    same,
};
use super::stream::LaneStream;
use super::{Address, Security, SessionError};
use crate::deadline::Deadline;
use crate::fabric::LaneId;
use rustix::event::PollFlags;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use zeroize::Zeroize;

/// A connection that has come through.
pub(super) enum Arrived {
    Control { stream: LaneStream, hello: Hello, token: Token },
    Lane { stream: LaneStream, session: SessionId, lane: LaneId },
    Guard { stream: LaneStream, session: SessionId },
}

enum Phase {
    Preamble,
    Tls(Kind),
    HelloLength,
    Hello(usize),
    Token(LaneId),
}

/// A connection in its handshake.
pub(super) struct Pending {
    stream: LaneStream,
    session: SessionId,
    phase: Phase,
    buffer: Vec<u8>,
    pub(super) deadline: Deadline,
}

/// Result of a step.
pub(super) enum Step {
    /// Waiting for the peer.
    Later(Pending),
    Arrived(Arrived),
}

impl Pending {
    pub(super) fn new(fd: OwnedFd, deadline: Deadline) -> Self {
        Self {
            stream: LaneStream::plain(fd),
            session: SessionId([0; 16]),
            phase: Phase::Preamble,
            buffer: Vec::new(),
            deadline,
        }
    }

    /// Whether nothing is known of the peer yet, so that it is the first to go when there is no room.
    pub(super) fn is_silent(&self) -> bool {
        matches!(self.phase, Phase::Preamble)
    }

    pub(super) fn interest(&self) -> PollFlags {
        self.stream.interest()
    }

    /// Goes as far as the bytes that have arrived allow.
    pub(super) fn advance(mut self, shared: &Shared) -> Result<Step, SessionError> {
        loop {
            let wanted = match self.phase {
                Phase::Preamble => PREAMBLE_BYTES,
                Phase::Tls(_) => 0,
                Phase::HelloLength => 4,
                Phase::Hello(bytes) => bytes,
                Phase::Token(_) => 32,
            };
            match self.gather(wanted) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Step::Later(self)),
                Err(error) => return Err(shared.config.security.naming(SessionError::from_io("shaking hands", error))),
            }
            if let Some(arrived) = self.complete(shared)? {
                return Ok(Step::Arrived(arrived.with(self.stream)));
            }
        }
    }

    /// Reads until `wanted` bytes are there and not one more; with none wanted, does the TLS handshake.
    fn gather(&mut self, wanted: usize) -> io::Result<()> {
        if matches!(self.phase, Phase::Tls(_)) {
            self.stream.handshake()?;
            return Ok(());
        }
        let mut chunk = [0; 4096];
        while self.buffer.len() < wanted {
            let room = chunk.len().min(wanted - self.buffer.len());
            match self.stream.read(&mut chunk[..room])? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                got => self.buffer.extend_from_slice(&chunk[..got]),
            }
        }
        Ok(())
    }

    /// Acts on a phase whose bytes are complete: goes to the next, or says what has arrived.
    fn complete(&mut self, shared: &Shared) -> Result<Option<What>, SessionError> {
        match self.phase {
            Phase::Preamble => return self.preamble(shared),
            Phase::Tls(kind) => self.phase = Self::after_protection(kind),
            Phase::HelloLength => {
                let bytes: [u8; 4] = self.buffer[..].try_into().expect("gathered four bytes");
                let length = u32::from_le_bytes(bytes) as usize;
                if length > MAX_HELLO_BYTES {
                    return Err(SessionError::FrameTooLarge { bytes: length as u64, limit: MAX_HELLO_BYTES });
                }
                self.phase = Phase::Hello(length);
            }
            Phase::Hello(_) => {
                let versions = shared.config.versions;
                let ours = shared.config.offers_over(&shared.address, &self.stream);
                let read = decode_hello(&self.buffer, self.session, versions, &ours);
                // The token is in it.
                self.buffer.zeroize();
                return match read {
                    Ok((hello, token)) => Ok(Some(What::Control { hello, token })),
                    Err(error) => {
                        self.reply(match &error {
                            SessionError::NoCommonFabric { .. } => encode_no_common_fabric(&ours, versions),
                            error => encode_refusal(&error.to_string(), versions),
                        });
                        Err(error)
                    }
                };
            }
            Phase::Token(lane) => {
                let mut shown: [u8; 32] = self.buffer[..].try_into().expect("gathered 32 bytes");
                self.buffer.zeroize();
                let is_right = shared.token_of(self.session).is_some_and(|token| token.matches(&shown));
                shown.zeroize();
                if is_right {
                    return Ok(Some(What::Lane { session: self.session, lane }));
                }
                let _ = self.stream.write(&[LANE_REFUSED]);
                return Err(SessionError::Protocol { what: format!("lane {lane:?} came with a wrong token") });
            }
        }
        self.buffer.clear();
        Ok(None)
    }

    fn preamble(&mut self, shared: &Shared) -> Result<Option<What>, SessionError> {
        let bytes: [u8; PREAMBLE_BYTES] = self.buffer[..].try_into().expect("gathered 64 bytes");
        self.buffer.clear();
        let preamble = match Preamble::decode(&bytes) {
            Ok(preamble) => preamble,
            Err(BadPreamble::Version(theirs)) => {
                self.answer(Answer::WrongVersion);
                return Err(SessionError::PreambleVersion { ours: PREAMBLE_VERSION, theirs });
            }
            // Whoever speaks something else is told nothing.
            Err(BadPreamble::Magic) => return Err(protocol("the connection does not begin like belay's")),
            Err(BadPreamble::Field) => return Err(protocol("a preamble with an unknown field")),
        };
        let (ours, tls) = match (&shared.address, &shared.config.security) {
            (Address::Unix(_), _) => (Protection::Unix, None),
            (Address::Tcp(_), Security::Tls(credentials)) => (Protection::Tls, Some(credentials)),
            (Address::Tcp(_), Security::Insecure | Security::LoopbackOnly) => (Protection::Plain, None),
        };
        if preamble.protection != ours {
            self.answer(Answer::WrongProtection);
            return Err(SessionError::SecurityMismatch { ours: ours.name() });
        }
        self.session = preamble.session;
        if !matches!(preamble.kind, Kind::Control) && shared.token_of(preamble.session).is_none() {
            self.answer(Answer::NoSuchSession);
            return Err(SessionError::NoSuchSession { session: preamble.session });
        }
        if let Kind::Guard(proof) = preamble.kind {
            let expected = shared.token_of(preamble.session).map(|token| token.guard_proof(preamble.session));
            if !expected.is_some_and(|expected| same(&expected, &proof)) {
                self.answer(Answer::Refused);
                return Err(protocol("a guard connection with a wrong proof"));
            }
            return Ok(Some(What::Guard { session: preamble.session }));
        }
        self.answer(Answer::GoOn);
        self.phase = match tls {
            Some(credentials) => {
                self.stream.start_tls(credentials.listening()?);
                Phase::Tls(preamble.kind)
            }
            None => Self::after_protection(preamble.kind),
        };
        Ok(None)
    }

    fn after_protection(kind: Kind) -> Phase {
        match kind {
            Kind::Lane(lane) => Phase::Token(lane),
            Kind::Control | Kind::Guard(_) => Phase::HelloLength,
        }
    }

    /// Best effort: sixteen bytes fit into the buffer of a fresh socket, and a peer that does not read them loses only them.
    fn answer(&mut self, answer: Answer) {
        let _ = self.stream.write(&answer.encode());
    }

    /// Best effort, as [`Self::answer`].
    fn reply(&mut self, frame: Result<Vec<u8>, SessionError>) {
        if let Ok(frame) = frame {
            let length = u32::try_from(frame.len()).expect("a reply is at most 128 KiB").to_le_bytes();
            let _ = self.stream.write(&[&length, &frame[..]].concat());
        }
    }
}

impl AsFd for Pending {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

fn protocol(what: &str) -> SessionError {
    SessionError::Protocol { what: what.to_owned() }
}

/// [`Arrived`] without its stream.
enum What {
    Control { hello: Hello, token: Token },
    Lane { session: SessionId, lane: LaneId },
    Guard { session: SessionId },
}

impl What {
    fn with(self, stream: LaneStream) -> Arrived {
        match self {
            Self::Control { hello, token } => Arrived::Control { stream, hello, token },
            Self::Lane { session, lane } => Arrived::Lane { stream, session, lane },
            Self::Guard { session } => Arrived::Guard { stream, session },
        }
    }
}
