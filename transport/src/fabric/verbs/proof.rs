//! The proof that a queue pair belongs to a session: a challenge of the owner's, answered with an HMAC keyed by the session.
//!
//! rdma_cm's connect request travels in clear and from anywhere, and TLS does not cover it. So the owner sends a random challenge
//! over the session's own connection; the request carries an HMAC-SHA256 (RFC 2104) over it, the lane, a nonce and the number
//! of the queue pair that is to be connected, keyed by the session's [`BindingKey`]; the acceptance carries one over the same
//! and the owner's queue pair. Each lane is accepted once, so a request that is recorded and sent again fails twice over:
//! its lane is taken and its queue pair another.
//!
//! ```text
//!   request     version u8 | kind u8 | index u16 | nonce 16 | HMAC 32     = 52 of the 56 bytes that RDMA_PS_TCP leaves
//!   acceptance  version u8 | zero 3 | HMAC 32                             = 36
//!   refusal     version u8 | reason u8                                    = 2
//! ```

use super::error::RefusedLane;
use crate::fabric::{LaneId, LaneKind};
use crate::session::BindingKey;
use hmac::{Hmac, Mac};
use sha2::Sha256;

const VERSION: u8 = 1;
pub(super) const REQUEST_BYTES: usize = 52;
pub(super) const ACCEPTANCE_BYTES: usize = 36;
pub(super) const REFUSAL_BYTES: usize = 2;
const ASKING: &[u8] = b"belay verbs lane request 1";
const ANSWERING: &[u8] = b"belay verbs lane acceptance 1";

/// The owner's challenge of one session.
pub(super) type Challenge = [u8; 32];
/// The initiator's part in what makes a request unlike every other.
pub(super) type Nonce = [u8; 16];

/// Which connection a proof is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Subject {
    pub challenge: Challenge,
    pub lane: LaneId,
    pub nonce: Nonce,
    /// The initiator's queue pair; zero where rdma_cm does not tell it to the peer (iWARP).
    pub queue_pair: u32,
}

fn code(kind: LaneKind) -> u8 {
    match kind {
        LaneKind::Fault => 1,
        LaneKind::Bulk => 2,
        LaneKind::Checkpoint => 3,
    }
}

fn kind(code: u8) -> Option<LaneKind> {
    [LaneKind::Fault, LaneKind::Bulk, LaneKind::Checkpoint].into_iter().find(|kind| self::code(*kind) == code)
}

impl Subject {
    fn mac(&self, key: &BindingKey, label: &[u8], owners_queue_pair: u32) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new_from_slice(key.bytes()).expect("an HMAC takes a key of any length");
        mac.update(label);
        mac.update(&self.challenge);
        mac.update(&[code(self.lane.kind)]);
        mac.update(&self.lane.index.to_le_bytes());
        mac.update(&self.nonce);
        mac.update(&self.queue_pair.to_le_bytes());
        mac.update(&owners_queue_pair.to_le_bytes());
        mac
    }

    /// The initiator's request.
    pub(super) fn request(&self, key: &BindingKey) -> [u8; REQUEST_BYTES] {
        let mut bytes = [0; REQUEST_BYTES];
        bytes[0] = VERSION;
        bytes[1] = code(self.lane.kind);
        bytes[2..4].copy_from_slice(&self.lane.index.to_le_bytes());
        bytes[4..20].copy_from_slice(&self.nonce);
        bytes[20..].copy_from_slice(&self.mac(key, ASKING, 0).finalize().into_bytes());
        bytes
    }

    /// The owner's acceptance, for its own queue pair (zero on iWARP).
    pub(super) fn acceptance(&self, key: &BindingKey, owners_queue_pair: u32) -> [u8; ACCEPTANCE_BYTES] {
        let mut bytes = [0; ACCEPTANCE_BYTES];
        bytes[0] = VERSION;
        bytes[4..].copy_from_slice(&self.mac(key, ANSWERING, owners_queue_pair).finalize().into_bytes());
        bytes
    }

    /// Whether what came back with an acceptance (padded by the wire) is the owner's.
    pub(super) fn is_accepted_by(&self, key: &BindingKey, owners_queue_pair: u32, bytes: &[u8]) -> bool {
        bytes.len() >= ACCEPTANCE_BYTES
            && bytes[0] == VERSION
            && self.mac(key, ANSWERING, owners_queue_pair).verify_slice(&bytes[4..ACCEPTANCE_BYTES]).is_ok()
    }
}

/// Reads a connect request's private data (padded by the wire) at the owner. `queue_pair` is what rdma_cm says is asking.
pub(super) fn check_request(
    key: &BindingKey,
    challenge: &Challenge,
    queue_pair: u32,
    bytes: &[u8],
) -> Result<Subject, RefusedLane> {
    let bytes: &[u8; REQUEST_BYTES] = bytes.first_chunk().ok_or(RefusedLane::Malformed)?;
    if bytes[0] != VERSION {
        return Err(RefusedLane::Malformed);
    }
    let kind = kind(bytes[1]).ok_or(RefusedLane::Malformed)?;
    let lane = LaneId { kind, index: u16::from_le_bytes([bytes[2], bytes[3]]) };
    let nonce = bytes[4..20].try_into().expect("sixteen bytes");
    let subject = Subject { challenge: *challenge, lane, nonce, queue_pair };
    // verify_slice compares in constant time.
    subject.mac(key, ASKING, 0).verify_slice(&bytes[20..]).map_err(|_| RefusedLane::WrongProof)?;
    Ok(subject)
}

/// A refusal's private data.
pub(super) fn refusal(reason: RefusedLane) -> [u8; REFUSAL_BYTES] {
    [VERSION, reason as u8]
}

/// What a refusal says; `None`: it is not one of ours (rdma_cm's own, for a port that nobody listens on).
pub(super) fn read_refusal(bytes: &[u8]) -> Option<RefusedLane> {
    match bytes {
        [VERSION, reason, ..] => RefusedLane::from_byte(*reason),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn subject() -> Subject {
        let lane = LaneId { kind: LaneKind::Checkpoint, index: 513 };
        Subject { challenge: [7; 32], lane, nonce: [9; 16], queue_pair: 0x1234 }
    }

    fn key(byte: u8) -> BindingKey {
        BindingKey::for_test([byte; 32])
    }

    #[test]
    fn a_proof_is_taken_by_the_session_it_was_made_for() {
        let mut padded = subject().request(&key(1)).to_vec();
        // InfiniBand pads private data with zeroes.
        padded.resize(56, 0);
        assert_eq!(check_request(&key(1), &[7; 32], 0x1234, &padded), Ok(subject()));
        let mut accepted = subject().acceptance(&key(1), 77).to_vec();
        accepted.resize(196, 0);
        assert!(subject().is_accepted_by(&key(1), 77, &accepted));
        assert!(!subject().is_accepted_by(&key(1), 78, &accepted), "another queue pair of the owner's");
        assert!(!subject().is_accepted_by(&key(2), 77, &accepted), "another session's key");
    }

    #[test]
    fn a_proof_is_worth_nothing_anywhere_else() {
        let request = subject().request(&key(1));
        let wrong = Err(RefusedLane::WrongProof);
        assert_eq!(check_request(&key(2), &[7; 32], 0x1234, &request), wrong, "another session");
        assert_eq!(check_request(&key(1), &[8; 32], 0x1234, &request), wrong, "another challenge");
        assert_eq!(check_request(&key(1), &[7; 32], 0x1235, &request), wrong, "another queue pair");
        // An acceptance sent back as a request, and the other way round.
        let mut reflected = request;
        reflected[20..].copy_from_slice(&subject().acceptance(&key(1), 0)[4..]);
        assert_eq!(check_request(&key(1), &[7; 32], 0x1234, &reflected), wrong);
        let mut reflected = subject().acceptance(&key(1), 0);
        reflected[4..].copy_from_slice(&request[20..]);
        assert!(!subject().is_accepted_by(&key(1), 0, &reflected));
    }

    proptest! {
        #[test]
        fn no_byte_of_a_request_may_change(at in 0..REQUEST_BYTES, flip in 1..=255_u8) {
            let mut request = subject().request(&key(1));
            request[at] ^= flip;
            prop_assert!(check_request(&key(1), &[7; 32], 0x1234, &request).is_err());
        }

        #[test]
        fn whatever_is_sent_is_refused_and_not_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
            prop_assert!(check_request(&key(1), &[7; 32], 1, &bytes).is_err());
            prop_assert!(!subject().is_accepted_by(&key(1), 1, &bytes));
            let _ = read_refusal(&bytes);
        }
    }

    #[test]
    fn a_refusal_says_its_reason() {
        for reason in [RefusedLane::Malformed, RefusedLane::Twice, RefusedLane::Busy] {
            assert_eq!(read_refusal(&refusal(reason)), Some(reason));
        }
        assert_eq!(read_refusal(&[]), None);
        assert_eq!(read_refusal(&[1, 200]), None);
    }
}
