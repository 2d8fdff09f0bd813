//! What a source keeps for whoever takes over from it, under any bytes.

use super::*;
use crate::fuzzing::{says_the_same_again, told};

/// The journal's body: what is understood says the same again, and a proposal in it is within its limits or refused.
pub(crate) fn journal(bytes: &[u8]) {
    match protocol::decode::<Written>(bytes) {
        Ok(written) => {
            says_the_same_again(&written, bytes.len());
            assert_eq!(protocol::decode::<Written>(&protocol::encode(&written)).expect("our own"), written);
        }
        Err(error) => told(&error),
    }
}

/// Who owned the guest.
pub(crate) fn mark(bytes: &[u8]) {
    match protocol::decode::<Marked>(bytes) {
        Ok(marked) => {
            says_the_same_again(&marked, bytes.len());
            assert_eq!(protocol::decode::<Marked>(&protocol::encode(&marked)).expect("our own"), marked);
        }
        Err(error) => told(&error),
    }
}

/// Inputs of our own encoders, for the corpus.
#[cfg(test)]
pub(crate) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let of = |mode: u8, bytes: Vec<u8>| [vec![mode], bytes].concat();
    let written = golden::written().into_iter().map(|(name, written)| (name, of(0, protocol::encode(&written))));
    let marks = golden::marks().into_iter().map(|(name, marked)| (name, of(1, protocol::encode(&marked))));
    written.chain(marks).collect()
}
