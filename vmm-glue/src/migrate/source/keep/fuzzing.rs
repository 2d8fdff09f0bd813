//! What a source keeps for whoever takes over from it, under any bytes.

use super::*;
use crate::fuzzing::{says_the_same_again, told};
use serde::de::DeserializeOwned;

/// The journal's body.
pub(crate) fn journal(bytes: &[u8]) {
    read_back::<Written>(bytes);
}

/// Who owned the guest.
pub(crate) fn mark(bytes: &[u8]) {
    read_back::<Marked>(bytes);
}

/// What is understood is written as something that says the same, and what is wrong is told.
fn read_back<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(bytes: &[u8]) {
    match protocol::decode::<T>(bytes) {
        Ok(kept) => {
            says_the_same_again(&kept, bytes.len());
            assert_eq!(protocol::decode::<T>(&protocol::encode(&kept)).expect("our own"), kept);
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
