//! The session's parsers under any bytes: the promises of `fuzzing::session`.

use super::control::Control;
use super::fabrics::Offered;
use super::hello::{
    HelloBody, MAX_BLOB_BYTES, MAX_FABRICS, MAX_REGIONS, MAX_TEXT_BYTES, PROTOCOL, ReplyBody, decode_hello,
    decode_reply, encode_accept,
};
use super::listen::Shared;
use super::pending::{Arrived, Pending, Step};
use super::preamble::{ANSWER_BYTES, Answer, PREAMBLE_BYTES, Preamble, SessionId, Token};
use super::stream::LaneStream;
use super::{Address, SessionError};
use crate::deadline::Deadline;
use crate::fabric::FabricKind;
use crate::fuzzing::heard;
use serde::{Serialize, de::DeserializeOwned};
use std::time::Duration;

/// The session that inputs may name.
pub(crate) const SESSION: SessionId = SessionId([3; 16]);
/// Its token.
pub(crate) const TOKEN: [u8; 32] = [7; 32];
/// Longest control frame here.
const MAX_FRAME_BYTES: usize = 4096;
/// Longest an error may be for the operator, whatever the peer put into it.
const MAX_ERROR_BYTES: usize = 4 * MAX_TEXT_BYTES;

pub(crate) fn session(data: &[u8]) {
    let Some((mode, bytes)) = data.split_first() else { return };
    match mode % 6 {
        0 => preamble(bytes),
        1 => hello(bytes),
        2 => reply(bytes),
        3 => frames(bytes),
        4 => door(bytes),
        _ => address(bytes),
    }
}

fn ours() -> Offered {
    Offered { fabrics: vec![FabricKind::Verbs, FabricKind::Tcp], no_verbs: None }
}

/// What the operator is shown of a peer's doing is short and moves no cursor.
fn is_fit_to_print(error: &SessionError) {
    let text = error.to_string();
    assert!(text.len() <= MAX_ERROR_BYTES, "an error of {} bytes", text.len());
    assert!(!text.chars().any(char::is_control), "{text:?}");
}

/// What was read says the same when it is written and read again. (postcard's integers have longer forms than they need, so the
/// bytes may differ the first time.)
fn says_the_same_again<T: Serialize + DeserializeOwned>(bytes: &[u8]) {
    if let Ok(read) = postcard::from_bytes::<T>(bytes) {
        let written = postcard::to_stdvec(&read).expect("plain data");
        let again: T = postcard::from_bytes(&written).expect("what was written is read");
        assert_eq!(postcard::to_stdvec(&again).expect("plain data"), written);
    }
}

fn preamble(bytes: &[u8]) {
    if let Some(bytes) = bytes.first_chunk::<PREAMBLE_BYTES>()
        && let Ok(parsed) = Preamble::decode(bytes)
    {
        assert_eq!(parsed.encode(), *bytes);
    }
    if let Some(bytes) = bytes.first_chunk::<ANSWER_BYTES>()
        && let Some((answer, version)) = Answer::decode(bytes)
    {
        assert_eq!((answer.encode()[10], version), (bytes[10], u16::from_le_bytes([bytes[8], bytes[9]])));
    }
}

fn hello(bytes: &[u8]) {
    if let Some((_, body)) = bytes.split_first_chunk::<8>() {
        says_the_same_again::<HelloBody>(body);
    }
    let (hello, _) = match decode_hello(bytes, SESSION, PROTOCOL, &ours()) {
        Ok(read) => read,
        Err(error) => return is_fit_to_print(&error),
    };
    assert!(hello.blob.len() <= MAX_BLOB_BYTES && hello.geometry.len() <= MAX_REGIONS);
    assert!(hello.belay_version.len() <= MAX_TEXT_BYTES && !hello.belay_version.chars().any(char::is_control));
    assert!(ours().fabrics.contains(&hello.fabric));
    // What this side answers, the other takes.
    let reply = encode_accept(&hello, PROTOCOL, None, b"above").expect("within every limit");
    let (agreed, blob) = decode_reply(&reply, SESSION, PROTOCOL, &ours()).expect("what was offered was chosen");
    assert_eq!((agreed.fabric, agreed.protocol, &blob[..]), (hello.fabric, hello.protocol, &b"above"[..]));
}

fn reply(bytes: &[u8]) {
    if let Some((_, body)) = bytes.split_first_chunk::<8>() {
        says_the_same_again::<ReplyBody>(body);
    }
    match decode_reply(bytes, SESSION, PROTOCOL, &ours()) {
        Ok((agreed, blob)) => {
            assert!(ours().fabrics.contains(&agreed.fabric) && blob.len() <= MAX_BLOB_BYTES);
            assert!(agreed.peer_belay_version.len() <= MAX_TEXT_BYTES);
        }
        Err(error) => {
            assert!(!matches!(&error, SessionError::NoCommonFabric { theirs, .. } if theirs.len() > MAX_FABRICS));
            is_fit_to_print(&error);
        }
    }
}

/// Frames come out as they went in, up to the end or the first length beyond the limit.
fn frames(bytes: &[u8]) {
    let (end, _peer) = heard(bytes);
    let control = Control::new(LaneStream::for_test(end), MAX_FRAME_BYTES);
    let mut rest = bytes;
    loop {
        let model = rest.split_first_chunk::<4>().map(|(length, after)| (u32::from_le_bytes(*length) as usize, after));
        match (control.recv(Deadline::after(Duration::from_secs(5))), model) {
            (Ok(frame), Some((length, after))) => {
                assert_eq!(frame, after[..length]);
                rest = &after[length..];
            }
            (Err(SessionError::FrameTooLarge { .. }), Some((length, _))) => {
                assert!(length > MAX_FRAME_BYTES);
                break;
            }
            (Err(SessionError::PeerClosed { .. }), model) => {
                assert!(model.is_none_or(|(length, after)| length > after.len()));
                break;
            }
            (heard, model) => panic!("{heard:?} where {:?} was due", model.map(|(length, _)| length)),
        }
    }
    assert!(matches!(control.recv(Deadline::after(Duration::ZERO)), Err(SessionError::Broken { .. })));
}

/// Nobody enters a session without knowing its token, and a control connection enters with a whole hello only.
fn door(bytes: &[u8]) {
    let (shared, _session) = Shared::for_fuzzing(SESSION, Token(TOKEN));
    let (end, _peer) = heard(bytes);
    let pending = Pending::new(end, Deadline::after(Duration::from_secs(5)));
    let after = bytes.get(PREAMBLE_BYTES..).unwrap_or_default();
    match pending.advance(&shared) {
        Ok(Step::Later(_)) => panic!("the peer has said all it had to say"),
        Ok(Step::Arrived(Arrived::Lane { session, .. })) => {
            assert!(session == SESSION && after.starts_with(&TOKEN));
        }
        Ok(Step::Arrived(Arrived::Guard { session, .. })) => {
            assert!(session == SESSION && bytes[32..64] == Token(TOKEN).guard_proof(SESSION));
        }
        Ok(Step::Arrived(Arrived::Control { hello, .. })) => {
            let length = u32::from_le_bytes(*after.first_chunk().expect("a length came")) as usize;
            let offered = Offered { fabrics: vec![FabricKind::Tcp], no_verbs: None };
            decode_hello(&after[4..4 + length], hello.session, PROTOCOL, &offered).expect("it was taken");
        }
        Err(error) => is_fit_to_print(&error),
    }
}

fn address(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes)
        && let Ok(address) = text.parse::<Address>()
    {
        assert_eq!(address.to_string(), text);
    }
}

/// Inputs of our own encoders, for the corpus.
#[cfg(test)]
pub(crate) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    use super::fabrics::NoVerbs;
    use super::hello::{Offer, RegionGeometry, encode_hello, encode_no_common_fabric, encode_refusal};
    use super::preamble::{Kind, Protection};
    use crate::fabric::{LaneId, LaneKind};
    use crate::units::{PageSize, RegionId};
    let of = |mode: u8, bytes: &[u8]| [&[mode], bytes].concat();
    let begin = |kind| Preamble { kind, protection: Protection::Plain, session: SESSION }.encode();
    let lane = begin(Kind::Lane(LaneId { kind: LaneKind::Checkpoint, index: 1 }));
    let guard = begin(Kind::Guard(Token(TOKEN).guard_proof(SESSION)));
    let geometry = vec![RegionGeometry { id: RegionId(0), bytes: 1 << 20, page_size: PageSize::Small }];
    let offer = Offer { geometry, blob: b"blob".to_vec() };
    let hello = encode_hello(SESSION, &Token(TOKEN), PROTOCOL, &ours(), &offer).expect("a hello");
    let (read, _) = decode_hello(&hello, SESSION, PROTOCOL, &ours()).expect("our own");
    let framed = |frame: &[u8]| [&(frame.len() as u32).to_le_bytes(), frame].concat();
    let less = Offered { fabrics: vec![FabricKind::Tcp], no_verbs: Some(NoVerbs::NotTrusted) };
    vec![
        ("preamble-lane", of(0, &lane)),
        ("preamble-guard", of(0, &guard)),
        ("answer", of(0, &Answer::WrongProtection.encode())),
        ("hello", of(1, &hello)),
        ("reply-accepted", of(2, &encode_accept(&read, PROTOCOL, None, b"blob").expect("a reply"))),
        ("reply-refused", of(2, &encode_refusal("no room", PROTOCOL).expect("a reply"))),
        ("reply-no-fabric", of(2, &encode_no_common_fabric(&less, PROTOCOL).expect("a reply"))),
        ("frames", of(3, &[framed(b"one"), framed(b""), framed(&[9; 300])].concat())),
        ("door-lane", of(4, &[&lane[..], &TOKEN].concat())),
        ("door-guard", of(4, &guard)),
        ("door-control", of(4, &[&begin(Kind::Control)[..], &framed(&hello)].concat())),
        ("address", of(5, b"[::1]:7700")),
        ("address-unix", of(5, b"unix:/run/belay/a.sock")),
    ]
}
