//! The guard's three ways in under any bytes.

use super::death_watch::{Notice, listen};
use super::page::{LifePage, MOST_SLOTS};
use super::watcher::{HAND_OVER_BYTES, take_over};
use super::{Arms, GuardError, Secrets};
use crate::fuzzing::heard;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

const SECRETS: ([u8; 32], [u8; 32]) = ([0x51; 32], [0x90; 32]);

pub(crate) fn guard(data: &[u8]) {
    let Some((mode, bytes)) = data.split_first() else { return };
    match mode % 3 {
        0 => connection(bytes),
        1 => page(bytes),
        _ => hand_over(bytes),
    }
}

/// Only the secrets are signs: the sign first, then the proof.
fn connection(bytes: &[u8]) {
    let (ours, _theirs) = heard(bytes);
    let secrets = Secrets { sign: SECRETS.0, proof: SECRETS.1, fence: [0xfe; 32] };
    let mut said = Vec::new();
    let ended = listen(&ours, &secrets, &AtomicBool::new(false), &mut |notice| said.push(notice));
    ended.expect("a connection that ends is no error");
    let mut due = Vec::new();
    if bytes.starts_with(&SECRETS.0) {
        due.push(Notice::DeathSign);
        if bytes[32..].starts_with(&SECRETS.1) {
            due.push(Notice::DeathProven);
        }
    }
    assert_eq!(said, due);
}

fn file(bytes: &[u8]) -> OwnedFd {
    let fd = memfd_create("belay-fuzzing", MemfdFlags::CLOEXEC).expect("a memfd");
    assert_eq!(rustix::io::write(&fd, bytes).expect("memory"), bytes.len());
    fd
}

/// A page that is taken for one has slots that lie within it.
fn page(bytes: &[u8]) {
    match LifePage::from_fd(file(bytes)) {
        Ok(page) => {
            assert!((1..=MOST_SLOTS).contains(&page.slots()) && bytes.len() == 4096);
            for slot in 0..page.slots() {
                page.check_slot(slot).expect("one of its slots");
                let _ = (page.pid(slot), page.orderly(slot));
            }
            assert!(page.check_slot(page.slots()).is_err());
        }
        Err(error) => assert!(matches!(error, GuardError::NotAPage { .. }), "{error}"),
    }
}

/// The first message of a hand-over: all of its bytes and a page are needed, whatever comes beside them.
fn hand_over(bytes: &[u8]) {
    let cut = bytes.len().min(HAND_OVER_BYTES);
    let (secrets, rest) = bytes.split_at(cut);
    if secrets.is_empty() {
        return;
    }
    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
    let page = file(rest);
    let fds = [page.as_fd(), theirs.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    rustix::net::sendmsg(&theirs, &[IoSlice::new(secrets)], &mut control, SendFlags::NOSIGNAL).expect("sent");
    match take_over(&ours) {
        Ok(taken) => {
            let got = &taken.secrets;
            assert!(secrets.len() == HAND_OVER_BYTES && got.sign == secrets[..32]);
            assert!(got.proof == secrets[32..64] && got.fence == secrets[64..96]);
            let bound_ms = u64::from_le_bytes(*secrets.last_chunk().expect("as long as it must be"));
            let armed = (bound_ms > 0).then(|| Arms::Fence { gate_bound: Duration::from_millis(bound_ms) });
            assert!(taken.arms == armed.unwrap_or(Arms::None) && taken.connections.len() == 1);
        }
        Err(GuardError::BadHandOver { .. }) => assert!(secrets.len() < HAND_OVER_BYTES),
        Err(error) => assert!(matches!(error, GuardError::NotAPage { .. }), "{error}"),
    }
}

/// Inputs of our own making, for the corpus.
#[cfg(test)]
pub(crate) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let mut page = vec![0; 4096];
    page[..8].copy_from_slice(b"belaylif");
    page[8] = 2;
    let words = [SECRETS.0, SECRETS.1].concat();
    vec![
        ("sign-and-proof", [vec![0], words.clone()].concat()),
        ("page", [vec![1], page.clone()].concat()),
        ("hand-over", [vec![2], words, vec![0xfe; 32], 500u64.to_le_bytes().to_vec(), page].concat()),
    ]
}
