//! Requests and responses of a `tcp` lane, byte for byte (little endian).

use crate::fabric::RefusedReason;

pub(super) const REQUEST_BYTES: usize = 32;
pub(super) const RESPONSE_BYTES: usize = 16;

/// What is asked for. Zero is not an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    Read = 1,
    /// Followed by `len` bytes.
    Write = 2,
}

/// ```text
/// 0 operation u8 · 1..4 zero · 4 len u32 · 8 key u64 · 16 offset u64 · 24 sequence u64
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Request {
    pub operation: Operation,
    pub len: u32,
    pub key: u64,
    pub offset: u64,
    /// Counts the requests of a lane from 0.
    pub sequence: u64,
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

impl Request {
    pub(super) fn encode(&self) -> [u8; REQUEST_BYTES] {
        let mut out = [0; REQUEST_BYTES];
        out[0] = self.operation as u8;
        out[4..8].copy_from_slice(&self.len.to_le_bytes());
        out[8..16].copy_from_slice(&self.key.to_le_bytes());
        out[16..24].copy_from_slice(&self.offset.to_le_bytes());
        out[24..32].copy_from_slice(&self.sequence.to_le_bytes());
        out
    }

    /// `None` if these bytes are no request.
    pub(super) fn decode(bytes: &[u8; REQUEST_BYTES]) -> Option<Self> {
        let operation = match bytes[..4] {
            [1, 0, 0, 0] => Operation::Read,
            [2, 0, 0, 0] => Operation::Write,
            _ => return None,
        };
        Some(Self {
            operation,
            len: u32_at(bytes, 4),
            key: u64_at(bytes, 8),
            offset: u64_at(bytes, 16),
            sequence: u64_at(bytes, 24),
        })
    }
}

/// ```text
/// 0 status u8 · 1..4 zero · 4 len u32 · 8 sequence u64
/// ```
/// `Ok(len)` is followed by `len` bytes: a read's, or none for a write. After a refusal nothing follows any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Response {
    pub result: Result<u32, RefusedReason>,
    pub sequence: u64,
}

impl Response {
    pub(super) fn encode(&self) -> [u8; RESPONSE_BYTES] {
        let mut out = [0; RESPONSE_BYTES];
        let (status, len) = match self.result {
            Ok(len) => (1, len),
            Err(RefusedReason::UnknownKey) => (2, 0),
            Err(RefusedReason::NoRight) => (3, 0),
            Err(RefusedReason::OutOfRange) => (4, 0),
            Err(RefusedReason::BadLength) => (5, 0),
            Err(RefusedReason::Revoked) => (6, 0),
            Err(RefusedReason::ByDevice) => unreachable!("no device answers on tcp"),
        };
        out[0] = status;
        out[4..8].copy_from_slice(&len.to_le_bytes());
        out[8..16].copy_from_slice(&self.sequence.to_le_bytes());
        out
    }

    /// `None` if these bytes are no response.
    pub(super) fn decode(bytes: &[u8; RESPONSE_BYTES]) -> Option<Self> {
        let len = u32_at(bytes, 4);
        let result = match (bytes[0], len) {
            (1, len) => Ok(len),
            (2, 0) => Err(RefusedReason::UnknownKey),
            (3, 0) => Err(RefusedReason::NoRight),
            (4, 0) => Err(RefusedReason::OutOfRange),
            (5, 0) => Err(RefusedReason::BadLength),
            (6, 0) => Err(RefusedReason::Revoked),
            _ => return None,
        };
        (bytes[1..4] == [0; 3]).then_some(Self { result, sequence: u64_at(bytes, 8) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_request_reads_back_as_it_was_written(write in any::<bool>(), len in any::<u32>(), key in any::<u64>(), offset in any::<u64>(), sequence in any::<u64>()) {
            let operation = if write { Operation::Write } else { Operation::Read };
            let request = Request { operation, len, key, offset, sequence };
            prop_assert_eq!(Request::decode(&request.encode()), Some(request));
        }

        #[test]
        fn bytes_mean_one_request_and_one_response_or_none(bytes in any::<[u8; REQUEST_BYTES]>()) {
            if let Some(request) = Request::decode(&bytes) {
                prop_assert_eq!(request.encode(), bytes);
            }
            let bytes: [u8; RESPONSE_BYTES] = bytes[..RESPONSE_BYTES].try_into().unwrap();
            if let Some(response) = Response::decode(&bytes) {
                prop_assert_eq!(response.encode(), bytes);
            }
        }
    }

    #[test]
    fn every_refusal_arrives_as_itself() {
        use RefusedReason::{BadLength, NoRight, OutOfRange, Revoked, UnknownKey};
        for reason in [UnknownKey, NoRight, OutOfRange, BadLength, Revoked] {
            let response = Response { result: Err(reason), sequence: 9 };
            assert_eq!(Response::decode(&response.encode()), Some(response));
        }
        assert_eq!(Response::decode(&[0; RESPONSE_BYTES]), None);
        assert_eq!(Request::decode(&[0; REQUEST_BYTES]), None);
    }
}
