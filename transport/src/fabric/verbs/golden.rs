//! The exports stream, and what rdma_cm carries for us, as they are on the wire.

use super::RefusedLane;
use super::exports_stream::{FromInitiator, FromOwner, Offer};
use super::proof::{Subject, check_request, read_refusal, refusal};
use super::table::{ExportTable, Span};
use crate::fabric::{LaneId, LaneKind};
use crate::golden::compare;
use crate::session::BindingKey;

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");

fn exports() -> Vec<ExportTable> {
    let span = |at: u64| Span { offset: at << 20, len: 4096, address: 0x7f00_0000_0000 + at, key: 0x1122 };
    vec![
        ExportTable { key: 0x1817_1615_1413_1200, writable: false, spans: vec![span(0), span(1)] },
        ExportTable { key: 0x1817_1615_1413_1201, writable: true, spans: vec![span(3)] },
    ]
}

#[test]
fn the_exports_stream_is_as_it_was_when_the_version_came_out() {
    let offer = |ip| Offer { ip, port: 18515, challenge: [0xc4; 32], version: 1, exports: exports() };
    let owner = [
        ("offer-ipv4", FromOwner::Offer(offer([192, 0, 2, 1].into()))),
        ("offer-ipv6", FromOwner::Offer(offer([0x2001, 0xdb8, 0, 0, 0, 0, 0, 1].into()))),
        ("table", FromOwner::Table { version: 300, exports: exports() }),
    ];
    let acknowledged = FromInitiator::Acknowledged { version: 300 };
    let mut messages: Vec<_> = owner.iter().map(|(name, frame)| (*name, postcard::to_stdvec(frame).unwrap())).collect();
    messages.push(("acknowledged", postcard::to_stdvec(&acknowledged).unwrap()));
    let files = compare(FOLDER, 1, "verbs-exports", &messages);
    let file = |name: &str| files.iter().find(|(there, _)| there == name).expect("compared").1.clone();
    for (name, frame) in owner {
        assert_eq!(postcard::from_bytes::<FromOwner>(&file(name)).unwrap(), frame);
    }
    assert_eq!(postcard::from_bytes::<FromInitiator>(&file("acknowledged")).unwrap(), acknowledged);
}

#[test]
fn what_a_queue_pair_proves_itself_with_is_as_it_was_when_the_version_came_out() {
    let key = BindingKey::for_test([9; 32]);
    let lane = LaneId { kind: LaneKind::Checkpoint, index: 0x0102 };
    let subject = Subject { challenge: [7; 32], lane, nonce: [5; 16], queue_pair: 0x1234 };
    use RefusedLane::{Busy, Malformed, Twice, WrongProof};
    let reasons = [("malformed", Malformed), ("wrong-proof", WrongProof), ("twice", Twice), ("busy", Busy)];
    let mut messages =
        vec![("request", subject.request(&key).to_vec()), ("acceptance", subject.acceptance(&key, 0x4321).to_vec())];
    messages.extend(reasons.iter().map(|(name, reason)| (*name, refusal(*reason).to_vec())));
    let files = compare(FOLDER, 1, "verbs-proof", &messages);
    let file = |name: &str| files.iter().find(|(there, _)| there == name).expect("compared").1.clone();
    assert_eq!(check_request(&key, &[7; 32], 0x1234, &file("request")), Ok(subject));
    assert!(subject.is_accepted_by(&key, 0x4321, &file("acceptance")));
    for (name, reason) in reasons {
        assert_eq!(read_refusal(&file(name)), Some(reason));
    }
}
