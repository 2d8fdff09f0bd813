//! The preamble, its answers and control frames as they are on the wire.

use super::control::Control;
use super::preamble::*;
use super::stream::LaneStream;
use crate::deadline::Deadline;
use crate::fabric::{LaneId, LaneKind};
use crate::fuzzing::{answers, heard};
use crate::golden::compare;
use std::time::Duration;

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");

fn preamble(kind: Kind, protection: Protection) -> Preamble {
    Preamble { kind, protection, session: SessionId([0xa5; 16]) }
}

#[test]
fn a_connection_begins_as_it_did_when_the_version_came_out() {
    let lane = |kind| Kind::Lane(LaneId { kind, index: 0x0102 });
    let preambles = [
        ("control-plain", preamble(Kind::Control, Protection::Plain)),
        ("control-tls", preamble(Kind::Control, Protection::Tls)),
        ("control-unix", preamble(Kind::Control, Protection::Unix)),
        ("lane-fault", preamble(lane(LaneKind::Fault), Protection::Tls)),
        ("lane-bulk", preamble(lane(LaneKind::Bulk), Protection::Tls)),
        ("lane-checkpoint", preamble(lane(LaneKind::Checkpoint), Protection::Tls)),
        ("guard", preamble(Kind::Guard([0x5a; 32]), Protection::Tls)),
    ];
    use Answer::{GoOn, NoSuchSession, Refused, WrongProtection, WrongVersion};
    let said = [
        ("answer-go-on", GoOn),
        ("answer-wrong-version", WrongVersion),
        ("answer-wrong-protection", WrongProtection),
        ("answer-no-such-session", NoSuchSession),
        ("answer-refused", Refused),
    ];
    let mut messages: Vec<_> = preambles.iter().map(|(name, preamble)| (*name, preamble.encode().to_vec())).collect();
    messages.extend(said.iter().map(|(name, answer)| (*name, answer.encode().to_vec())));
    messages.push(("lane-verdicts", vec![LANE_TAKEN, LANE_REFUSED]));
    messages.push(("guard-proof", Token([0x70; 32]).guard_proof(SessionId([0xa5; 16])).to_vec()));
    let files = compare(FOLDER, PREAMBLE_VERSION, "preamble", &messages);
    let file = |name: &str| files.iter().find(|(there, _)| there == name).expect("compared").1.clone();
    for (name, preamble) in preambles {
        assert_eq!(Preamble::decode(&file(name).try_into().unwrap()), Ok(preamble), "{name}");
    }
    for (name, answer) in said {
        assert_eq!(Answer::decode(&file(name).try_into().unwrap()), Some((answer, 1)), "{name}");
    }
}

#[test]
fn a_control_frame_is_on_the_wire_as_it_was_when_the_version_came_out() {
    let soon = || Deadline::after(Duration::from_secs(20));
    let (end, peer) = heard(b"");
    let control = Control::new(LaneStream::for_test(end), 1 << 20);
    let (short, long) = (b"a frame".to_vec(), vec![7; 300]);
    control.send(&short, soon()).unwrap();
    control.send(&long, soon()).unwrap();
    for (_, bytes) in compare(FOLDER, 1, "frames", &[("two-frames", answers(&peer))]) {
        let (end, _peer) = heard(&bytes);
        let control = Control::new(LaneStream::for_test(end), 1 << 20);
        assert_eq!((control.recv(soon()).unwrap(), control.recv(soon()).unwrap()), (short.clone(), long.clone()));
    }
}
