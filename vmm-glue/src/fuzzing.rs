//! What the fuzz targets of `vmm-glue/fuzz` call, and CI over their corpora: each function takes any bytes, and panics when a
//! parser breaks a promise. See docs/fuzzing.md.

use serde::{Serialize, de::DeserializeOwned};
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

/// Longest input that is looked at: what a socket takes without anybody reading.
const MOST_BYTES: usize = 16 << 10;

/// The control protocol in both directions, the proposal, and the switch map.
pub fn control(data: &[u8]) {
    crate::migrate::fuzzing::control(bounded(data));
}

/// What comes over a guard's connection, its hand-over, and the page of signs of life.
pub fn guard(data: &[u8]) {
    crate::guard::fuzzing::guard(bounded(data));
}

/// The protocol of a VMM in a process of its own, both ways, and the state that it, or a guest of host threads, saves.
pub fn apart(data: &[u8]) {
    let Some((mode, bytes)) = bounded(data).split_first() else { return };
    match mode % 4 {
        2 => crate::kvm::state::fuzzing::state(bytes),
        3 => crate::kvm::host_threads::fuzzing::state(bytes),
        side => crate::kvm::apart::fuzzing::frames(side, bytes),
    }
}

/// What a QEMU says over QMP, frames of its network, what its relays are told and tell, and the device state of a QEMU guest.
pub fn qemu(data: &[u8]) {
    crate::qemu::fuzzing::qemu(bounded(data));
}

/// What was recorded of a guest: its faults, what it wrote and sent, and what an observer saw of it.
pub fn traces(data: &[u8]) {
    crate::migrate::fuzzing::traces(bounded(data));
}

/// What a source keeps for whoever takes over from it: on disk the journal's body and the release record, in memory who owned the guest.
pub fn kept(data: &[u8]) {
    let Some((mode, bytes)) = bounded(data).split_first() else { return };
    match mode % 3 {
        0 => crate::migrate::source::keep::fuzzing::journal(bytes),
        1 => crate::migrate::source::keep::fuzzing::mark(bytes),
        _ => crate::migrate::release::fuzz(bytes),
    }
}

/// What a dead page server left for the next.
pub fn will(data: &[u8]) {
    crate::migrate::destination::will::fuzz(bounded(data));
}

/// The observer's protocol, and the packets that guests emit.
pub fn observer(data: &[u8]) {
    crate::witness::fuzzing::observer(bounded(data));
}

fn bounded(data: &[u8]) -> &[u8] {
    &data[..data.len().min(MOST_BYTES)]
}

/// The end of a connection on which the peer has said `bytes` and no more, and the peer's end.
pub(crate) fn heard(bytes: &[u8]) -> (UnixStream, UnixStream) {
    let (ours, mut theirs) = UnixStream::pair().expect("a socket pair");
    theirs.write_all(bytes).expect("a socket's buffer is larger");
    theirs.shutdown(Shutdown::Write).expect("connected");
    (ours, theirs)
}

/// What is wrong with something from outside is told in a line that moves no cursor, whatever words are in it.
pub(crate) fn told(error: &dyn std::error::Error) {
    let said = belay_transport::explain(error);
    assert!(said.chars().count() <= 400 && !said.contains(char::is_control), "{said:?}");
}

/// A message that was read says the same when it is written and read again, and takes no more bytes than it came in.
pub(crate) fn says_the_same_again<T: Serialize + DeserializeOwned>(message: &T, bytes: usize) {
    let written = postcard::to_stdvec(message).expect("plain data");
    assert!(written.len() <= bytes, "{bytes} bytes became {}", written.len());
    let again: T = postcard::from_bytes(&written).expect("what was written is read");
    assert_eq!(postcard::to_stdvec(&again).expect("plain data"), written);
}

#[cfg(test)]
mod tests;
