//! What the guests' packets say.

use crate::kvm::guests::rules::kind;

/// A packet of a ledger, metronome or scanner, taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parsed {
    /// One of [`kind`]'s.
    pub kind: u64,
    pub vcpu: u16,
    pub step: u64,
    pub digest: u64,
    /// Nonces the vCPU has seen so far, and the newest of them.
    pub nonces: u64,
    pub last_nonce: u64,
}

impl Parsed {
    /// Whether two packets of a scanner say the same of what was scanned (its nonces are its own matter).
    pub fn same_pass(&self, other: &Self) -> bool {
        Self { nonces: 0, last_nonce: 0, ..*self } == Self { nonces: 0, last_nonce: 0, ..*other }
    }
}

/// Why a packet cannot be true.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PacketError {
    #[error("packet {sequence} of {len} bytes has not the shape of a guest's packet")]
    Shape { sequence: u64, len: usize },
    #[error(
        "packet {sequence}: the scanner of vCPU {vcpu} read {value:#x} at {address:#x} where {expected:#x} must be"
    )]
    Mismatch { sequence: u64, vcpu: u16, address: u64, value: u64, expected: u64 },
    #[error("packet {sequence} is of vCPU {vcpu}, which the guest does not have")]
    NoSuchVcpu { sequence: u64, vcpu: u16 },
    #[error("packet {sequence} says {actual:?}, which the guest has not reached")]
    FromTheFuture { sequence: u64, actual: Parsed },
    #[error("packet {sequence} says {actual:?}; it must be {expected:?}")]
    Wrong { sequence: u64, actual: Parsed, expected: Parsed },
    #[error("packet {sequence} speaks of {nonces} nonces, the last {last:#x}: these were not issued in this order")]
    Nonce { sequence: u64, nonces: u64, last: u64 },
}

/// Takes a packet apart. A scanner's report of a wrong word is an error of its own.
pub fn parse(sequence: u64, bytes: &[u8]) -> Result<Parsed, PacketError> {
    let shape = PacketError::Shape { sequence, len: bytes.len() };
    if !bytes.len().is_multiple_of(8) {
        return Err(shape);
    }
    let words: Vec<u64> =
        bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("chunks of 8"))).collect();
    let kind_of = |word: u64| (word & 0xff, (word >> 8) as u16);
    match words[..] {
        [first, address, value, expected] if kind_of(first).0 == kind::MISMATCH => {
            let vcpu = kind_of(first).1;
            Err(PacketError::Mismatch { sequence, vcpu, address, value, expected })
        }
        [first, step, digest, nonces, last_nonce]
            if first >> 24 == 0 && matches!(kind_of(first).0, kind::FILLED | kind::PROGRESS | kind::PASS) =>
        {
            let (kind, vcpu) = kind_of(first);
            Ok(Parsed { kind, vcpu, step, digest, nonces, last_nonce })
        }
        _ => Err(shape),
    }
}
