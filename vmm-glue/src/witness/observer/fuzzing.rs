//! A connection to the observer on which anything is said.

use super::address::Stream;
use super::server::{Shared, serve};
use super::*;
use crate::fuzzing::heard;
use std::io::Read;
use std::sync::{Condvar, Mutex};
use std::time::Instant;

/// Whoever has more of them coming reads them meanwhile.
const ACKNOWLEDGEMENTS_A_SOCKET_HOLDS: usize = 64;

/// The packets that are whole, of a connection on which `bytes` are said.
fn due(bytes: &[u8]) -> Vec<(u64, &[u8])> {
    let mut due = Vec::new();
    if bytes.len() >= 12 && &bytes[..8] == MAGIC && bytes[8..10] == VERSION.to_le_bytes() {
        let label = usize::from(u16::from_le_bytes([bytes[10], bytes[11]]));
        let mut rest = bytes.get(12 + label..).unwrap_or_default();
        let named = (1..=MAX_LABEL_BYTES).contains(&label)
            && bytes.get(12..12 + label).is_some_and(|name| name.iter().all(u8::is_ascii_graphic));
        while named && let Some((length, after)) = rest.split_first_chunk::<4>() {
            let length = u32::from_le_bytes(*length) as usize;
            if !(8..=8 + MAX_PACKET_BYTES).contains(&length) || after.len() < length {
                break;
            }
            let (sequence, packet) = after[..length].split_first_chunk::<8>().expect("eight bytes or more");
            due.push((u64::from_le_bytes(*sequence), packet));
            rest = &after[length..];
        }
    }
    due
}

/// What is written down is exactly the packets that came whole, and each was acknowledged.
pub(crate) fn served(bytes: &[u8]) {
    let due = due(bytes);
    let (ours, mut theirs) = heard(bytes);
    let shared = Shared { log: Mutex::default(), arrived: Condvar::new(), began: Instant::now() };
    let acknowledged = std::thread::scope(|scope| {
        let mut hear = move || {
            let mut acknowledged = Vec::new();
            match theirs.read_to_end(&mut acknowledged) {
                Ok(_) => {}
                // What it would not read: its end is closed over it, after what it said.
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{error}"),
            }
            acknowledged
        };
        let serve = || serve(Stream::Unix(ours), &shared).expect_err("a connection ends at its end, if not before");
        if due.len() < ACKNOWLEDGEMENTS_A_SOCKET_HOLDS {
            serve();
            hear()
        } else {
            let hearing = scope.spawn(hear);
            serve();
            hearing.join().expect("whoever hears")
        }
    });
    let seen = std::mem::take(&mut shared.lock().seen);
    assert!(seen.iter().map(|seen| (seen.sequence, &seen.bytes[..])).eq(due.iter().copied()));
    assert!(acknowledged.chunks(8).eq(due.iter().map(|(sequence, _)| sequence.to_le_bytes())));
    // The judge comes to a verdict about anything.
    assert_eq!(judge(&seen).arrivals, seen.len() as u64);
}
