//! What verbs reads from the other side, under any bytes: tables of exports, connect requests and refusals.

use super::exports_stream::{Ended, ExportsStream, FromInitiator, FromOwner, Offer};
use super::proof::{self, REQUEST_BYTES};
use super::table::{self, ExportTable, RemoteTable};
use crate::fabric::exports::Right;
use crate::fuzzing::heard;
use crate::session::{BindingKey, LaneStream};

const CHALLENGE: proof::Challenge = [7; 32];
const QUEUE_PAIR: u32 = 0x1234;

fn key() -> BindingKey {
    BindingKey::for_test([9; 32])
}

pub(crate) fn tables(data: &[u8]) {
    let Some((mode, bytes)) = data.split_first() else { return };
    match mode % 3 {
        0 => from_owner(bytes),
        1 => from_initiator(bytes),
        _ => connect_request(bytes),
    }
}

fn from_owner(bytes: &[u8]) {
    let (end, _peer) = heard(bytes);
    let mut stream = ExportsStream::new(LaneStream::for_test(end));
    loop {
        match stream.receive::<FromOwner>() {
            Ok(Some(frame)) => {
                let written = postcard::to_stdvec(&frame).expect("plain data");
                assert_eq!(postcard::from_bytes::<FromOwner>(&written).expect("our own"), frame);
                match frame {
                    FromOwner::Offer(Offer { exports, .. }) | FromOwner::Table { exports, .. } => believed(exports),
                }
            }
            Ok(None) => panic!("the peer has said all it had to say"),
            Err(Ended::PeerClosed | Ended::Faulty(_)) => return,
            Err(Ended::Io(error)) => panic!("{error}"),
        }
    }
}

/// A table that is believed leads to no byte that it does not name.
fn believed(exports: Vec<ExportTable>) {
    let Ok(table) = RemoteTable::checked(exports.clone()) else { return };
    for (place, export) in exports.iter().enumerate() {
        let (with, without) = if export.writable { (Right::Write, Right::Read) } else { (Right::Read, Right::Write) };
        assert_eq!((table.find(export.key, with), table.find(export.key, without)), (Some(place), None));
        for span in &export.spans {
            for (offset, len) in [(span.offset, 1), (span.offset, u32::MAX), (span.offset + (span.len - 1), 2)] {
                let part = table::part(table.spans(place), offset, len, u32::MAX).expect("it begins in a chunk");
                let skip = offset - span.offset;
                assert!(part.key == span.key && part.address == span.address + skip && part.len >= 1);
                assert!(u64::from(part.len) <= span.len - skip && part.len <= len);
            }
            let past = span.offset + span.len;
            let next = export.spans.iter().find(|other| other.offset == past);
            let covered = table::covers(table.spans(place), span.offset, span.len.saturating_add(1));
            assert_eq!(covered, next.is_some(), "one byte more than the chunk at {}+{}", span.offset, span.len);
        }
    }
}

fn from_initiator(bytes: &[u8]) {
    let (end, _peer) = heard(bytes);
    let mut stream = ExportsStream::new(LaneStream::for_test(end));
    let ended = loop {
        match stream.receive::<FromInitiator>() {
            Ok(Some(_)) => {}
            Ok(None) => panic!("the peer has said all it had to say"),
            Err(ended) => break ended,
        }
    };
    assert!(matches!(ended, Ended::PeerClosed | Ended::Faulty(_)));
}

/// A request is taken only if it is, byte for byte, what the session's key makes of what it says.
fn connect_request(bytes: &[u8]) {
    if let Ok(subject) = proof::check_request(&key(), &CHALLENGE, QUEUE_PAIR, bytes) {
        assert_eq!(subject.request(&key()), bytes[..REQUEST_BYTES]);
    }
    if let Some(reason) = proof::read_refusal(bytes) {
        assert_eq!(proof::refusal(reason), bytes[..2]);
    }
}

/// Inputs of our own encoders, for the corpus.
#[cfg(test)]
pub(crate) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    use super::table::Span;
    use crate::fabric::{LaneId, LaneKind};
    let span = |at: u64| Span { offset: at << 12, len: 4096, address: 0x7000_0000 + (at << 12), key: 17 };
    let exports = vec![
        ExportTable { key: 0x100, writable: false, spans: vec![span(0), span(1), span(9)] },
        ExportTable { key: 0x101, writable: true, spans: vec![span(0)] },
    ];
    let offer =
        Offer { ip: [192, 0, 2, 1].into(), port: 18515, challenge: CHALLENGE, version: 1, exports: exports.clone() };
    let framed = |body: Vec<u8>| [&(body.len() as u32).to_le_bytes(), &body[..]].concat();
    let owner = [
        framed(postcard::to_stdvec(&FromOwner::Offer(offer)).expect("plain data")),
        framed(postcard::to_stdvec(&FromOwner::Table { version: 2, exports }).expect("plain data")),
    ];
    let lane = LaneId { kind: LaneKind::Checkpoint, index: 1 };
    let subject = proof::Subject { challenge: CHALLENGE, lane, nonce: [5; 16], queue_pair: QUEUE_PAIR };
    let acknowledged = postcard::to_stdvec(&FromInitiator::Acknowledged { version: 2 }).expect("plain data");
    vec![
        ("verbs-from-owner", [vec![0, 0], owner.concat()].concat()),
        ("verbs-from-initiator", [vec![0, 1], framed(acknowledged)].concat()),
        ("verbs-request", [vec![0, 2], subject.request(&key()).to_vec()].concat()),
        ("verbs-refusal", [vec![0, 2], proof::refusal(super::RefusedLane::WrongProof).to_vec()].concat()),
    ]
}
