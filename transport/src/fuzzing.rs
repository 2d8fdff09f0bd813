//! What the fuzz targets of `transport/fuzz` call, and CI over their corpora: each function takes any bytes, and panics when a
//! parser breaks a promise. See docs/fuzzing.md.

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use std::os::fd::OwnedFd;

/// Longest input that is looked at: what a socket takes without anybody reading.
const MOST_BYTES: usize = 16 << 10;

/// The preamble and its answer, hello and reply, control frames, and the door that they come to.
pub fn session(data: &[u8]) {
    crate::session::fuzzing::session(bounded(data));
}

/// A tcp lane: requests at the owner, answers at the initiator, each against a model of the protocol.
pub fn lanes(data: &[u8]) {
    crate::fabric::tcp::fuzzing::lanes(bounded(data));
}

/// Tables that are believed once they are checked: the exports stream and connect requests of verbs, a local lane's exports, the
/// page-state file.
pub fn tables(data: &[u8]) {
    let Some((mode, bytes)) = bounded(data).split_first() else { return };
    match mode % 3 {
        0 => crate::fabric::verbs::fuzzing::tables(bytes),
        1 => crate::fabric::local::fuzzing::exports(bytes),
        _ => crate::pages::fuzzing::state_file(bytes),
    }
}

fn bounded(data: &[u8]) -> &[u8] {
    &data[..data.len().min(MOST_BYTES)]
}

/// The end of a connection, non-blocking, on which the peer has said `bytes` and no more; and the peer's end, to read answers from.
pub(crate) fn heard(bytes: &[u8]) -> (OwnedFd, OwnedFd) {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).expect("a socket pair");
    say(&theirs, bytes);
    (ours, theirs)
}

/// Says `bytes`, and no more after them.
pub(crate) fn say(end: &OwnedFd, bytes: &[u8]) {
    let sent = if bytes.is_empty() { 0 } else { rustix::io::write(end, bytes).expect("a socket's buffer is larger") };
    assert_eq!(sent, bytes.len());
    rustix::net::shutdown(end, rustix::net::Shutdown::Write).expect("connected");
}

/// Everything that has come on `end` by now.
pub(crate) fn answers(end: &OwnedFd) -> Vec<u8> {
    let (mut all, mut chunk) = (Vec::new(), [0; 16 << 10]);
    while let Ok(got @ 1..) = rustix::io::read(end, &mut chunk) {
        all.extend_from_slice(&chunk[..got]);
    }
    all
}

#[cfg(test)]
mod tests;
