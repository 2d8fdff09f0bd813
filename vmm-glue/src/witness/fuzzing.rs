//! The observer under any bytes.

use super::observer::fuzzing::served;
use super::packet::{PacketError, parse};

pub(crate) fn observer(data: &[u8]) {
    let Some((mode, bytes)) = data.split_first() else { return };
    match mode % 2 {
        0 => served(bytes),
        _ => packet(bytes),
    }
}

/// A packet is taken for what a guest says only if it has that shape, whole.
fn packet(bytes: &[u8]) {
    match parse(7, bytes) {
        Ok(parsed) => {
            assert!(bytes.len() == 40 && u64::from(parsed.vcpu) << 8 | parsed.kind == words(bytes)[0]);
            assert_eq!([parsed.step, parsed.digest, parsed.nonces, parsed.last_nonce], words(bytes)[1..]);
        }
        Err(PacketError::Mismatch { sequence, .. }) => assert!(bytes.len() == 32 && sequence == 7),
        Err(PacketError::Shape { len, .. }) => assert_eq!(len, bytes.len()),
        Err(error) => panic!("{error}"),
    }
}

fn words(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes"))).collect()
}

/// Inputs as clients and guests write them, for the corpus.
#[cfg(test)]
pub(crate) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    use super::observer::golden::said;
    use crate::kvm::guests::rules::kind;
    let word = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    vec![
        ("client", [vec![0], said()].concat()),
        ("progress", [vec![1], word(&[kind::PROGRESS | 1 << 8, 64, 9, 1, 5])].concat()),
        ("mismatch", [vec![1], word(&[kind::MISMATCH, 4096, 1, 2])].concat()),
    ]
}
