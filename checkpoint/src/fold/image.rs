//! All of a folded epoch but its RAM, as bytes for kept memory.
//!
//! ```text
//! epoch · pages folded · bytes of device state · 1 if output has left · highest that has · packets        u64, little-endian
//! device state · then each packet: sequence, length, bytes
//! ```

use crate::guest::{Epoch, Packet};
use crate::outbox::Resend;

pub(super) fn encode(epoch: Epoch, pages: u64, device_state: &[u8], resend: &Resend) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(48 + device_state.len() + resend.bytes() + resend.len() * 16);
    let released = resend.released_up_to();
    let head = [
        epoch.0,
        pages,
        device_state.len() as u64,
        u64::from(released.is_some()),
        released.unwrap_or(0),
        resend.len() as u64,
    ];
    bytes.extend(head.into_iter().flat_map(u64::to_le_bytes));
    bytes.extend_from_slice(device_state);
    for (sequence, packet) in resend.packets() {
        bytes.extend_from_slice(&sequence.to_le_bytes());
        bytes.extend_from_slice(&(packet.len() as u64).to_le_bytes());
        bytes.extend_from_slice(packet);
    }
    bytes
}

pub(super) fn decode(bytes: &[u8]) -> Option<(Epoch, u64, Vec<u8>, Resend)> {
    let mut rest = bytes;
    let word = |rest: &mut &[u8]| -> Option<u64> {
        let (word, after) = rest.split_at_checked(8)?;
        *rest = after;
        Some(u64::from_le_bytes(word.try_into().ok()?))
    };
    let (epoch, pages, device_bytes) = (word(&mut rest)?, word(&mut rest)?, word(&mut rest)?);
    let (has_left, released, packets) = (word(&mut rest)?, word(&mut rest)?, word(&mut rest)?);
    let (device_state, after) = rest.split_at_checked(usize::try_from(device_bytes).ok()?)?;
    rest = after;
    let mut resend = Resend::new();
    match (has_left, released) {
        (0, 0) => {}
        (1, released) => resend.released(released),
        _ => return None,
    }
    let mut last = resend.released_up_to();
    for _ in 0..packets {
        let (sequence, len) = (word(&mut rest)?, word(&mut rest)?);
        let (packet, after) = rest.split_at_checked(usize::try_from(len).ok()?)?;
        rest = after;
        // As they are written: ascending, and none that has left.
        if last.is_some_and(|last| sequence <= last) {
            return None;
        }
        last = Some(sequence);
        resend.add(Packet { sequence, bytes: packet.to_vec() }).ok()?;
    }
    rest.is_empty().then(|| (Epoch(epoch), pages, device_state.to_vec(), resend))
}

/// What a fuzz target asks of an image: one that is understood is written again byte for byte.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz(bytes: &[u8]) {
    if let Some((epoch, pages, device_state, resend)) = decode(bytes) {
        assert!(encode(epoch, pages, &device_state, &resend) == bytes);
    }
}

/// An image as it is written, for the corpus.
#[cfg(test)]
pub(crate) fn seed() -> Vec<u8> {
    let mut resend = Resend::new();
    resend.released(6);
    for sequence in 7..9 {
        resend.add(Packet { sequence, bytes: vec![sequence as u8; 40] }).expect("in order");
    }
    encode(Epoch(41), 1234, b"device state", &resend)
}
