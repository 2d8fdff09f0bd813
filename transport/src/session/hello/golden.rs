//! Hello and replies as they are on the wire.

use super::*;
use crate::golden::compare;

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");
const SESSION: SessionId = SessionId([0xa5; 16]);
/// The program's version, which is text for people.
const PROGRAM: &str = "0.1.0";

fn ours() -> Offered {
    Offered { fabrics: vec![FabricKind::Verbs, FabricKind::Tcp], no_verbs: None }
}

fn body() -> HelloBody {
    let geometry = vec![
        RegionGeometry { id: RegionId(0), bytes: 3 << 30, page_size: PageSize::Small },
        RegionGeometry { id: RegionId(7), bytes: 1 << 30, page_size: PageSize::Huge },
    ];
    let no_verbs = Some(NoVerbs::Unusable { why: "mlx5_0 port 1 is DOWN".to_owned() });
    let (session, token, fabrics) = (SESSION.0, [0x70; 32], vec![3, 2, 9]);
    let (role, belay_version, blob) = (Role::Source, PROGRAM.to_owned(), b"of the layer above".to_vec());
    HelloBody { role, belay_version, session, token, fabrics, no_verbs, geometry, blob }
}

#[test]
fn a_hello_and_its_replies_are_on_the_wire_as_they_were_when_the_version_came_out() {
    let accepted = ReplyBody::Accepted {
        role: Role::Destination,
        belay_version: PROGRAM.to_owned(),
        protocol: 1,
        fabric: 2,
        no_verbs: Some(NoVerbs::NotTrusted),
        blob: b"back".to_vec(),
    };
    let none = ReplyBody::NoCommonFabric { fabrics: vec![2], no_verbs: Some(NoVerbs::NoDevice) };
    let range = VersionRange { min: 1, max: 1 };
    let messages = [
        ("hello", frame(HELLO_MAGIC, range, &body()).unwrap()),
        ("accepted", frame(REPLY_MAGIC, range, &accepted).unwrap()),
        ("no-common-fabric", frame(REPLY_MAGIC, range, &none).unwrap()),
        ("refused", encode_refusal("the guest does not fit", range).unwrap()),
    ];
    // The ranges change with every version; what they enclose is read with the version both speak.
    for (name, bytes) in compare(FOLDER, 1, "hello", &messages) {
        match &*name {
            "hello" => {
                let (hello, token) = decode_hello(&bytes, SESSION, PROTOCOL, &ours()).expect("read");
                assert!(token.matches(&[0x70; 32]) && hello.fabric == FabricKind::Verbs);
                assert_eq!((hello.protocol, &hello.belay_version[..], &hello.geometry), (1, PROGRAM, &body().geometry));
                assert_eq!(hello.blob, body().blob);
            }
            "accepted" => {
                let (agreed, blob) = decode_reply(&bytes, SESSION, PROTOCOL, &ours()).expect("read");
                assert_eq!((agreed.fabric, agreed.protocol, &blob[..]), (FabricKind::Tcp, 1, &b"back"[..]));
                assert_eq!(agreed.without_verbs, Some(WithoutVerbs::Theirs(NoVerbs::NotTrusted)));
            }
            "no-common-fabric" => {
                let error = decode_reply(&bytes, SESSION, PROTOCOL, &ours()).unwrap_err();
                assert!(matches!(error, SessionError::NoCommonFabric { theirs, .. } if theirs == [2]));
            }
            _ => {
                let error = decode_reply(&bytes, SESSION, PROTOCOL, &ours()).unwrap_err();
                assert!(matches!(error, SessionError::Refused { reason } if reason == "the guest does not fit"));
            }
        }
    }
}

#[test]
fn every_reason_for_no_verbs_keeps_its_number() {
    let unusable = NoVerbs::Unusable { why: "w".to_owned() };
    let reasons = [NoVerbs::NotWanted, NoVerbs::NoDevice, unusable, NoVerbs::NotTrusted, NoVerbs::NoKey];
    let bytes: Vec<_> = reasons.iter().map(|reason| postcard::to_stdvec(reason).unwrap()).collect();
    assert_eq!(bytes, [vec![0], vec![1], vec![2, 1, b'w'], vec![3], vec![4]]);
    // What the encoder writes is the body compared above.
    let offer = Offer { geometry: body().geometry, blob: body().blob };
    let offered = Offered { fabrics: vec![FabricKind::Verbs, FabricKind::Tcp], no_verbs: body().no_verbs };
    let written = encode_hello(SESSION, &Token([0x70; 32]), PROTOCOL, &offered, &offer).unwrap();
    let same = HelloBody { belay_version: BELAY_VERSION.to_owned(), fabrics: vec![3, 2], ..body() };
    assert_eq!(written, frame(HELLO_MAGIC, PROTOCOL, &same).unwrap());
}
