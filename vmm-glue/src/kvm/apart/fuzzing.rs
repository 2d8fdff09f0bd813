//! Frames between page server and VMM under any bytes.

use super::{FromClient, FromVmm, frame};
use crate::fuzzing::{heard, says_the_same_again};
use serde::{Serialize, de::DeserializeOwned};
use std::os::unix::net::UnixStream;

pub(crate) fn frames(side: u8, bytes: &[u8]) {
    let (ours, _theirs) = heard(bytes);
    match side {
        0 => all::<FromClient>(&ours, bytes),
        _ => all::<FromVmm>(&ours, bytes),
    }
}

/// Frames come out as they went in, up to the end or the first that is none.
fn all<T: Serialize + DeserializeOwned>(stream: &UnixStream, mut rest: &[u8]) {
    loop {
        let model = rest.split_first_chunk::<4>().map(|(length, after)| (u32::from_le_bytes(*length) as usize, after));
        match (frame::receive::<T>(stream), model) {
            (Ok(Some((message, None))), Some((length, after))) => {
                says_the_same_again(&message, length + 64);
                rest = &after[length..];
            }
            (Ok(None), None) => return assert!(rest.is_empty()),
            (Err(error), _) => return assert!(error.to_string().len() < 1000),
            (_, model) => panic!("{:?} of {} bytes", model.map(|(length, _)| length), rest.len()),
        }
    }
}

/// Inputs of our own encoders, for the corpus.
#[cfg(test)]
pub(crate) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    use super::golden::{from_client, from_vmm};
    let framed = |body: &[u8]| [&(body.len() as u32).to_le_bytes(), body].concat();
    let client: Vec<u8> = from_client().iter().flat_map(|(_, bytes)| framed(bytes)).collect();
    let vmm: Vec<u8> = from_vmm().iter().flat_map(|(_, bytes)| framed(bytes)).collect();
    vec![("from-client", [vec![0], client].concat()), ("from-vmm", [vec![1], vmm].concat())]
}
