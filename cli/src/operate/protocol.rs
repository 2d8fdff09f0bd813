//! What is said over a role's socket: one request a connection, one answer or two, each a length and JSON.
//!
//! ```text
//! command                                    running belay
//!   length, {"belay":1,"ask":"status"} ──────────►
//!   ◄────────── length, {"belay":1,"said":{"status":{…}}}         and it hangs up
//!
//!   length, {"belay":1,"ask":{"order":{…}}} ─────►
//!   ◄───────── length, {"belay":1,"said":{"order":{"answer":"accepted",…}}}
//!   ◄───────── length, {"belay":1,"said":{"order":{"answer":"came-to-pass",…}}}   later, if waited for
//! ```
//! A length is four bytes, the most significant first. Whoever says another version is told which one is spoken here.

use belay_vmm_glue::migrate::operator::{Answer, Ask};
use belay_vmm_glue::migrate::status::Status;
use serde::{Deserialize, Serialize};

/// Version of the requests and answers below.
pub const VERSION: u16 = 1;
/// Longest request, in bytes of JSON.
pub const LONGEST_REQUEST: usize = 4096;
/// Longest answer: a status with its story is some tens of KiB.
pub const LONGEST_ANSWER: usize = 1 << 20;
/// Longest that an order may be waited for here: a day.
pub const LONGEST_WAIT_MS: u64 = 24 * 3600 * 1000;

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    pub belay: u16,
    pub ask: Wanted,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Wanted {
    Status,
    Order {
        order: Ask,
        /// How long to wait for it to come to pass; 0: until it is accepted.
        wait_ms: u64,
    },
}

/// What is answered.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Response {
    pub belay: u16,
    pub said: Said,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Said {
    Status(Box<Status>),
    Order(Answer),
    /// The role has not answered in time, or the order has not come to pass in the time given.
    NotInTime {
        waiting_for: String,
    },
    /// The request was none.
    Bad {
        why: String,
    },
}

/// Why bytes are no message.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("a message of {0} bytes; {1} are possible")]
    Length(usize, usize),
    #[error("{0}")]
    Malformed(String),
    #[error("version {theirs} of the operator's protocol is spoken, {VERSION} is spoken here")]
    Version { theirs: u16 },
}

/// A message as it goes over the socket.
pub fn frame<T: Serialize>(message: &T) -> Vec<u8> {
    let body = serde_json::to_vec(message).expect("messages are plain data");
    let length = u32::try_from(body.len()).expect("shorter than the longest answer");
    [&length.to_be_bytes()[..], &body].concat()
}

/// The first whole body in `received`, or nothing yet. An error as soon as it is clear that there will be none.
pub fn body(received: &[u8], longest: usize) -> Result<Option<&[u8]>, FrameError> {
    let Some((length, rest)) = received.split_first_chunk::<4>() else { return Ok(None) };
    let length = u32::from_be_bytes(*length) as usize;
    if length == 0 || length > longest {
        return Err(FrameError::Length(length, longest));
    }
    Ok(rest.get(..length))
}

/// A body as a message of this version.
pub fn parse<T: for<'a> Deserialize<'a>>(body: &[u8]) -> Result<T, FrameError> {
    #[derive(Deserialize)]
    struct Spoken {
        belay: u16,
    }
    let malformed = |error: serde_json::Error| FrameError::Malformed(format!("no message of belay's: {error}"));
    let Spoken { belay } = serde_json::from_slice(body).map_err(malformed)?;
    if belay != VERSION {
        return Err(FrameError::Version { theirs: belay });
    }
    serde_json::from_slice(body).map_err(malformed)
}

/// `said` as an answer that goes over the socket.
pub fn answer(said: Said) -> Vec<u8> {
    frame(&Response { belay: VERSION, said })
}

#[cfg(test)]
mod golden;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn request() -> Request {
        let order = Ask::Promote { source_is_gone: true, by_force: true };
        Request { belay: VERSION, ask: Wanted::Order { order, wait_ms: 5 } }
    }

    #[test]
    fn a_request_reads_back_from_every_way_in_which_its_bytes_may_come() {
        let bytes = frame(&request());
        for end in 0..bytes.len() {
            assert_eq!(body(&bytes[..end], LONGEST_REQUEST), Ok(None), "{end} bytes of {}", bytes.len());
        }
        let whole = body(&bytes, LONGEST_REQUEST).expect("short enough").expect("whole");
        assert_eq!(parse::<Request>(whole), Ok(request()));
    }

    #[test]
    fn another_version_is_named_whatever_else_it_says() {
        let later = br#"{"belay":7,"ask":{"dance":{}},"more":[]}"#;
        assert_eq!(parse::<Request>(later), Err(FrameError::Version { theirs: 7 }));
        assert!(matches!(parse::<Request>(br#"{"belay":1,"ask":"dance"}"#), Err(FrameError::Malformed(_))));
        assert!(matches!(parse::<Request>(br#"{"belay":1,"ask":"status","and":1}"#), Err(FrameError::Malformed(_))));
    }

    proptest! {
        #[test]
        fn no_bytes_are_taken_for_more_than_they_are(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(Some(found)) = body(&bytes, LONGEST_REQUEST) {
                prop_assert!(!found.is_empty() && found.len() + 4 <= bytes.len());
                let _ = parse::<Request>(found);
            }
        }

        #[test]
        fn p7_a_length_beyond_the_bound_is_refused_before_anything_of_it_has_come(length in LONGEST_REQUEST as u32 + 1..) {
            prop_assert!(body(&length.to_be_bytes(), LONGEST_REQUEST).is_err());
        }
    }
}
