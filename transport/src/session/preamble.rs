//! The plaintext bytes with which every connection begins, and the listener's answer to them.
//!
//! Nothing here is trusted: the preamble only says where a connection wants to go. A control or lane connection over TLS
//! repeats the session id and proves its right inside; a guard connection carries a proof that does not give the token away.

use crate::fabric::{LaneId, LaneKind};
use sha2::{Digest, Sha256};
use std::fmt;
use zeroize::Zeroize;

pub(super) const MAGIC: [u8; 8] = *b"BELAY\0\r\n";
/// Changes only if these 64 and 16 bytes change; the protocol's own versions are negotiated in the hello.
pub(super) const PREAMBLE_VERSION: u16 = 1;
pub(super) const PREAMBLE_BYTES: usize = 64;
pub(super) const ANSWER_BYTES: usize = 16;

/// Names a session. Random, chosen by the source, not secret.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SessionId(pub [u8; 16]);

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Proves that a connection belongs to a session. Random, chosen by the source, told inside the control connection. Wiped when dropped.
#[derive(Clone)]
pub(super) struct Token(pub [u8; 32]);

impl Drop for Token {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

impl Token {
    /// Whether `offered` is this token, in a time that does not depend on where they differ.
    pub(super) fn matches(&self, offered: &[u8; 32]) -> bool {
        same(&self.0, offered)
    }

    /// What a guard connection shows: knowledge of the token without the token, since that connection is plaintext.
    pub(super) fn guard_proof(&self, session: SessionId) -> [u8; 32] {
        let mut hash = Sha256::new();
        hash.update(b"belay guard connection");
        hash.update(self.0);
        hash.update(session.0);
        hash.finalize().into()
    }
}

pub(super) fn same(a: &[u8; 32], b: &[u8; 32]) -> bool {
    std::hint::black_box(a.iter().zip(b).fold(0, |differs, (a, b)| differs | (a ^ b))) == 0
}

/// What a connection is for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Control,
    Lane(LaneId),
    /// With the proof of [`Token::guard_proof`].
    Guard([u8; 32]),
}

/// Without the proof, which opens a connection for whoever shows it first.
impl fmt::Debug for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Control => f.write_str("Control"),
            Self::Lane(lane) => f.debug_tuple("Lane").field(lane).finish(),
            Self::Guard(_) => f.write_str("Guard(..)"),
        }
    }
}

/// How the bytes after the preamble are protected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Protection {
    Plain,
    Tls,
    Unix,
}

impl Protection {
    fn code(self) -> u8 {
        match self {
            Self::Plain => 1,
            Self::Tls => 2,
            Self::Unix => 3,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Plain => "plaintext (--insecure, or loopback without certificates)",
            Self::Tls => "TLS with certificates",
            Self::Unix => "a Unix socket",
        }
    }
}

/// The first 64 bytes of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Preamble {
    pub kind: Kind,
    pub protection: Protection,
    pub session: SessionId,
}

/// Why 64 bytes are not a preamble.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BadPreamble {
    Magic,
    Version(u16),
    Field,
}

fn lane_code(kind: LaneKind) -> u8 {
    match kind {
        LaneKind::Fault => 1,
        LaneKind::Bulk => 2,
        LaneKind::Checkpoint => 3,
    }
}

impl Preamble {
    pub(super) fn encode(&self) -> [u8; PREAMBLE_BYTES] {
        let mut out = [0; PREAMBLE_BYTES];
        out[..8].copy_from_slice(&MAGIC);
        out[8..10].copy_from_slice(&PREAMBLE_VERSION.to_le_bytes());
        out[11] = self.protection.code();
        out[12..28].copy_from_slice(&self.session.0);
        out[10] = match self.kind {
            Kind::Control => 1,
            Kind::Lane(lane) => {
                out[28] = lane_code(lane.kind);
                out[30..32].copy_from_slice(&lane.index.to_le_bytes());
                2
            }
            Kind::Guard(proof) => {
                out[32..64].copy_from_slice(&proof);
                3
            }
        };
        out
    }

    pub(super) fn decode(bytes: &[u8; PREAMBLE_BYTES]) -> Result<Self, BadPreamble> {
        if bytes[..8] != MAGIC {
            return Err(BadPreamble::Magic);
        }
        let version = u16::from_le_bytes([bytes[8], bytes[9]]);
        if version != PREAMBLE_VERSION {
            return Err(BadPreamble::Version(version));
        }
        let protection = match bytes[11] {
            1 => Protection::Plain,
            2 => Protection::Tls,
            3 => Protection::Unix,
            _ => return Err(BadPreamble::Field),
        };
        let mut session = SessionId([0; 16]);
        session.0.copy_from_slice(&bytes[12..28]);
        let mut proof = [0; 32];
        proof.copy_from_slice(&bytes[32..64]);
        let kind = match (bytes[10], bytes[28]) {
            (1, 0) => Kind::Control,
            (2, lane) => {
                let kind = match lane {
                    1 => LaneKind::Fault,
                    2 => LaneKind::Bulk,
                    3 => LaneKind::Checkpoint,
                    _ => return Err(BadPreamble::Field),
                };
                Kind::Lane(LaneId { kind, index: u16::from_le_bytes([bytes[30], bytes[31]]) })
            }
            (3, 0) => Kind::Guard(proof),
            _ => return Err(BadPreamble::Field),
        };
        let parsed = Self { kind, protection, session };
        // Unused bytes must be zero, so that a later version can give them a meaning.
        if parsed.encode() == *bytes { Ok(parsed) } else { Err(BadPreamble::Field) }
    }
}

/// The listener's answer to a preamble.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    GoOn = 1,
    WrongVersion = 2,
    WrongProtection = 3,
    NoSuchSession = 4,
    Refused = 5,
}

impl Answer {
    pub(super) fn encode(self) -> [u8; ANSWER_BYTES] {
        let mut out = [0; ANSWER_BYTES];
        out[..8].copy_from_slice(&MAGIC);
        out[8..10].copy_from_slice(&PREAMBLE_VERSION.to_le_bytes());
        out[10] = self as u8;
        out
    }

    /// The answer and the preamble version of who gave it; `None` if these are not an answer's bytes.
    pub(super) fn decode(bytes: &[u8; ANSWER_BYTES]) -> Option<(Self, u16)> {
        if bytes[..8] != MAGIC {
            return None;
        }
        let answer = match bytes[10] {
            1 => Self::GoOn,
            2 => Self::WrongVersion,
            3 => Self::WrongProtection,
            4 => Self::NoSuchSession,
            5 => Self::Refused,
            _ => return None,
        };
        Some((answer, u16::from_le_bytes([bytes[8], bytes[9]])))
    }
}

/// What the listener says, inside the protected connection, to a lane that has shown its token.
pub(super) const LANE_TAKEN: u8 = 1;
pub(super) const LANE_REFUSED: u8 = 2;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_preamble() -> impl Strategy<Value = Preamble> {
        let kind = prop_oneof![
            Just(Kind::Control),
            (0..3usize, any::<u16>()).prop_map(|(kind, index)| Kind::Lane(LaneId {
                kind: [LaneKind::Fault, LaneKind::Bulk, LaneKind::Checkpoint][kind],
                index
            })),
            any::<[u8; 32]>().prop_map(Kind::Guard),
        ];
        let protection = prop_oneof![Just(Protection::Plain), Just(Protection::Tls), Just(Protection::Unix)];
        (kind, protection, any::<[u8; 16]>()).prop_map(|(kind, protection, session)| Preamble {
            kind,
            protection,
            session: SessionId(session),
        })
    }

    proptest! {
        #[test]
        fn a_preamble_reads_back_as_it_was_written(preamble in any_preamble()) {
            prop_assert_eq!(Preamble::decode(&preamble.encode()), Ok(preamble));
        }

        #[test]
        fn no_other_bytes_are_read_as_a_preamble(preamble in any_preamble(), at in 0..64usize, change in 1..=255u8) {
            let mut bytes = preamble.encode();
            bytes[at] ^= change;
            // Whatever still parses must be exactly what these bytes say.
            if let Ok(parsed) = Preamble::decode(&bytes) {
                prop_assert_eq!(parsed.encode(), bytes);
                prop_assert_ne!(parsed, preamble);
            }
        }
    }

    #[test]
    fn no_secret_of_a_session_is_formatted() {
        use crate::fabric::{ReadKey, RingKeys, WriteKey};
        use crate::session::{BindingKey, Credentials, Security, SessionConfig, keygen};
        let directory = tempfile::tempdir().unwrap();
        let (a, b) = (keygen(directory.path(), "a").unwrap(), keygen(directory.path(), "b").unwrap());
        let credentials = Credentials::load(&a.cert, &a.key, &b.cert).unwrap();
        let preamble = |kind| Preamble { kind, protection: Protection::Plain, session: SessionId([1; 16]) };
        let key = 0xa7a7_a7a7_a7a7_a702;
        let formatted = [
            format!("{:?}", Token([0xa7; 32])),
            format!("{:?}", BindingKey::for_test([0xa7; 32])),
            format!("{:?} {:#?}", preamble(Kind::Guard([0xa7; 32])), preamble(Kind::Guard([0xa7; 32]))),
            format!("{:?}", SessionConfig::new(Security::Tls(credentials))),
            format!("{:?}", RingKeys { ring: WriteKey(key), owner_region: ReadKey(key) }),
        ];
        // 0xa7 as numbers are written: 167 in a list of bytes, and the key in either base.
        for text in &formatted {
            let shows = ["167", "a7a7", "A7A7", &key.to_string()].iter().any(|part| text.contains(part));
            assert!(!shows && text.contains(".."), "{text}");
        }
        let pem = std::fs::read_to_string(&a.key).unwrap();
        let line = pem.lines().nth(1).expect("base64");
        assert!(formatted.iter().all(|text| !text.contains(line)));
    }

    #[test]
    fn a_foreign_version_is_told_from_foreign_bytes() {
        let preamble = Preamble { kind: Kind::Control, protection: Protection::Plain, session: SessionId([1; 16]) };
        let mut bytes = preamble.encode();
        bytes[8] = 9;
        assert_eq!(Preamble::decode(&bytes), Err(BadPreamble::Version(9)));
        assert_eq!(Preamble::decode(&[b'G'; 64]), Err(BadPreamble::Magic));
    }
}
