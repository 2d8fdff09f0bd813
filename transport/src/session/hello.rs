//! The first two frames of a control connection: who speaks, which versions and fabrics, what guest, and the upper layer's blob.
//!
//! Magic and version range have a fixed place and meaning for ever; the rest is read only once a common version is found, so
//! that two sides which share none can still say so to each other with both ranges.

use super::SessionError;
use super::fabrics::{NoVerbs, Offered, WithoutVerbs};
use super::preamble::{SessionId, Token};
use crate::fabric::FabricKind;
use crate::units::{PageSize, RegionId};
use serde::{Deserialize, Serialize};
use std::fmt;
use zeroize::Zeroize;

/// Protocol versions this build speaks.
pub const PROTOCOL: VersionRange = VersionRange { min: 1, max: 1 };
/// Longest blob of the layer above, in either direction.
pub const MAX_BLOB_BYTES: usize = 64 << 10;
/// Longest hello or reply frame.
pub(super) const MAX_HELLO_BYTES: usize = 128 << 10;
pub(super) const MAX_REGIONS: usize = 1024;
pub(super) const MAX_TEXT_BYTES: usize = 4096;
/// Most fabrics a side names: there are three, and an error names each.
pub(super) const MAX_FABRICS: usize = 16;
const HELLO_MAGIC: u32 = u32::from_le_bytes(*b"BLYh");
const REPLY_MAGIC: u32 = u32::from_le_bytes(*b"BLYr");
const BELAY_VERSION: &str = env!("CARGO_PKG_VERSION");

/// Versions a side speaks, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VersionRange {
    pub min: u16,
    pub max: u16,
}

impl VersionRange {
    /// The highest version both speak.
    pub fn common(self, other: Self) -> Option<u16> {
        let highest = self.max.min(other.max);
        (highest >= self.min.max(other.min)).then_some(highest)
    }
}

impl fmt::Display for VersionRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} to {}", self.min, self.max)
    }
}

/// Which side of the migration a process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    Source,
    Destination,
}

/// One block of the guest's RAM, as the source has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionGeometry {
    pub id: RegionId,
    pub bytes: u64,
    pub page_size: PageSize,
}

/// What the source offers.
#[derive(Debug, Clone, Default)]
pub struct Offer {
    pub geometry: Vec<RegionGeometry>,
    /// For the layer above, at most [`MAX_BLOB_BYTES`].
    pub blob: Vec<u8>,
}

/// What the destination learns of the source before it decides.
#[derive(Debug, Clone)]
pub struct Hello {
    pub session: SessionId,
    /// The peer's own version, for people.
    pub belay_version: String,
    /// Protocol version both will speak if the session is accepted.
    pub protocol: u16,
    pub fabric: FabricKind,
    /// Where `verbs` was possible by address and was not chosen: why.
    pub without_verbs: Option<WithoutVerbs>,
    pub geometry: Vec<RegionGeometry>,
    pub blob: Vec<u8>,
}

/// What both sides have agreed on.
#[derive(Debug, Clone)]
pub struct Agreed {
    pub session: SessionId,
    pub protocol: u16,
    pub fabric: FabricKind,
    /// Where `verbs` was possible by address and was not chosen: why.
    pub without_verbs: Option<WithoutVerbs>,
    /// The peer's own version, for people.
    pub peer_belay_version: String,
}

#[derive(Serialize, Deserialize)]
pub(super) struct HelloBody {
    role: Role,
    belay_version: String,
    session: [u8; 16],
    token: [u8; 32],
    /// Codes, best first; codes this side does not know are passed over.
    fabrics: Vec<u8>,
    no_verbs: Option<NoVerbs>,
    geometry: Vec<RegionGeometry>,
    blob: Vec<u8>,
}

#[derive(Serialize, Deserialize)]
pub(super) enum ReplyBody {
    Accepted { role: Role, belay_version: String, protocol: u16, fabric: u8, no_verbs: Option<NoVerbs>, blob: Vec<u8> },
    Refused { reason: String },
    NoCommonFabric { fabrics: Vec<u8>, no_verbs: Option<NoVerbs> },
}

fn codes(fabrics: &[FabricKind]) -> Vec<u8> {
    fabrics.iter().map(|fabric| fabric.code()).collect()
}

/// Checks what the peer says of `verbs`.
fn bounded(no_verbs: Option<NoVerbs>) -> Result<Option<NoVerbs>, SessionError> {
    if let Some(NoVerbs::Unusable { why }) = no_verbs {
        limit("the reason", why.len(), MAX_TEXT_BYTES)?;
        return Ok(Some(NoVerbs::Unusable { why: printable(&why) }));
    }
    Ok(no_verbs)
}

/// A peer's text as an operator's terminal may have it: nothing in it moves the cursor or changes what stands there already.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

/// Whose doing it is that a session does not run over `verbs`. This side's own reason first: its operator can act on it.
fn without_verbs(ours: &Option<NoVerbs>, theirs: Option<NoVerbs>) -> Option<WithoutVerbs> {
    ours.clone().map(WithoutVerbs::Ours).or(theirs.map(WithoutVerbs::Theirs))
}

fn frame(magic: u32, versions: VersionRange, body: &impl Serialize) -> Result<Vec<u8>, SessionError> {
    let mut out = Vec::with_capacity(512);
    out.extend_from_slice(&magic.to_le_bytes());
    out.extend_from_slice(&versions.min.to_le_bytes());
    out.extend_from_slice(&versions.max.to_le_bytes());
    let out = postcard::to_extend(body, out)
        .map_err(|error| SessionError::Protocol { what: format!("a hello cannot be written: {error}") })?;
    limit("the hello", out.len(), MAX_HELLO_BYTES)?;
    Ok(out)
}

fn split(magic: u32, bytes: &[u8]) -> Result<(VersionRange, &[u8]), SessionError> {
    let bad = |what: &str| SessionError::Protocol { what: what.to_owned() };
    let (head, body) = bytes.split_first_chunk::<8>().ok_or_else(|| bad("a hello shorter than 8 bytes"))?;
    if u32::from_le_bytes([head[0], head[1], head[2], head[3]]) != magic {
        return Err(bad("a hello without its magic"));
    }
    let theirs =
        VersionRange { min: u16::from_le_bytes([head[4], head[5]]), max: u16::from_le_bytes([head[6], head[7]]) };
    if theirs.min > theirs.max {
        return Err(bad("a version range that ends before it begins"));
    }
    Ok((theirs, body))
}

fn limit(what: &'static str, bytes: usize, limit: usize) -> Result<(), SessionError> {
    if bytes > limit { Err(SessionError::TooLong { what, bytes, limit }) } else { Ok(()) }
}

pub(super) fn encode_hello(
    session: SessionId,
    token: &Token,
    versions: VersionRange,
    offered: &Offered,
    offer: &Offer,
) -> Result<Vec<u8>, SessionError> {
    limit("the blob", offer.blob.len(), MAX_BLOB_BYTES)?;
    limit("the list of regions", offer.geometry.len(), MAX_REGIONS)?;
    let body = HelloBody {
        role: Role::Source,
        belay_version: BELAY_VERSION.to_owned(),
        session: session.0,
        token: token.0,
        fabrics: codes(&offered.fabrics),
        no_verbs: bounded(offered.no_verbs.clone())?,
        geometry: offer.geometry.clone(),
        blob: offer.blob.clone(),
    };
    frame(HELLO_MAGIC, versions, &body)
}

/// Reads a hello at the destination. `session` is what the preamble said, `ours` what this listener has for such a connection.
pub(super) fn decode_hello(
    bytes: &[u8],
    session: SessionId,
    versions: VersionRange,
    ours: &Offered,
) -> Result<(Hello, Token), SessionError> {
    let (theirs, body) = split(HELLO_MAGIC, bytes)?;
    let protocol = versions.common(theirs).ok_or(SessionError::Versions { ours: versions, theirs })?;
    let mut body: HelloBody = postcard::from_bytes(body)
        .map_err(|error| SessionError::Protocol { what: format!("a hello that does not parse: {error}") })?;
    let token = Token(body.token);
    body.token.zeroize();
    limit("the blob", body.blob.len(), MAX_BLOB_BYTES)?;
    limit("the list of regions", body.geometry.len(), MAX_REGIONS)?;
    limit("the version", body.belay_version.len(), MAX_TEXT_BYTES)?;
    limit("the list of fabrics", body.fabrics.len(), MAX_FABRICS)?;
    if body.role != Role::Source {
        return Err(SessionError::Protocol { what: "a destination dialled a destination".to_owned() });
    }
    if body.session != session.0 {
        return Err(SessionError::Protocol { what: "hello and preamble name different sessions".to_owned() });
    }
    let without_verbs = without_verbs(&ours.no_verbs, bounded(body.no_verbs)?);
    let have = |offered: &u8| ours.fabrics.iter().copied().find(|have| have.code() == *offered);
    let Some(fabric) = body.fabrics.iter().find_map(have) else {
        let (ours, theirs) = (codes(&ours.fabrics), body.fabrics);
        return Err(SessionError::NoCommonFabric { ours, theirs, why: without_verbs });
    };
    let hello = Hello {
        session,
        belay_version: printable(&body.belay_version),
        protocol,
        fabric,
        without_verbs: without_verbs.filter(|_| fabric != FabricKind::Verbs),
        geometry: body.geometry,
        blob: body.blob,
    };
    Ok((hello, token))
}

pub(super) fn encode_accept(
    hello: &Hello,
    versions: VersionRange,
    no_verbs: Option<NoVerbs>,
    blob: &[u8],
) -> Result<Vec<u8>, SessionError> {
    limit("the blob", blob.len(), MAX_BLOB_BYTES)?;
    let body = ReplyBody::Accepted {
        role: Role::Destination,
        belay_version: BELAY_VERSION.to_owned(),
        protocol: hello.protocol,
        fabric: hello.fabric.code(),
        no_verbs: bounded(no_verbs)?,
        blob: blob.to_vec(),
    };
    frame(REPLY_MAGIC, versions, &body)
}

/// What a source is told that this listener shares no fabric with.
pub(super) fn encode_no_common_fabric(ours: &Offered, versions: VersionRange) -> Result<Vec<u8>, SessionError> {
    let (fabrics, no_verbs) = (codes(&ours.fabrics), bounded(ours.no_verbs.clone())?);
    frame(REPLY_MAGIC, versions, &ReplyBody::NoCommonFabric { fabrics, no_verbs })
}

pub(super) fn encode_refusal(reason: &str, versions: VersionRange) -> Result<Vec<u8>, SessionError> {
    let mut end = reason.len().min(MAX_TEXT_BYTES);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    frame(REPLY_MAGIC, versions, &ReplyBody::Refused { reason: reason[..end].to_owned() })
}

/// Reads the reply at the source: what was agreed, and the destination's blob.
pub(super) fn decode_reply(
    bytes: &[u8],
    session: SessionId,
    versions: VersionRange,
    ours: &Offered,
) -> Result<(Agreed, Vec<u8>), SessionError> {
    let (theirs, body) = split(REPLY_MAGIC, bytes)?;
    if versions.common(theirs).is_none() {
        return Err(SessionError::Versions { ours: versions, theirs });
    }
    let bad = |what: String| SessionError::Protocol { what };
    let body = postcard::from_bytes(body).map_err(|error| bad(format!("a reply that does not parse: {error}")))?;
    match body {
        ReplyBody::Refused { reason } => {
            limit("the reason", reason.len(), MAX_TEXT_BYTES)?;
            Err(SessionError::Refused { reason: printable(&reason) })
        }
        ReplyBody::NoCommonFabric { fabrics, no_verbs } => {
            limit("the list of fabrics", fabrics.len(), MAX_FABRICS)?;
            let why = without_verbs(&ours.no_verbs, bounded(no_verbs)?);
            Err(SessionError::NoCommonFabric { ours: codes(&ours.fabrics), theirs: fabrics, why })
        }
        ReplyBody::Accepted { role, belay_version, protocol, fabric, no_verbs, blob } => {
            limit("the blob", blob.len(), MAX_BLOB_BYTES)?;
            limit("the version", belay_version.len(), MAX_TEXT_BYTES)?;
            if role != Role::Destination {
                return Err(bad("a source answered as if it were the destination".to_owned()));
            }
            if Some(protocol) != versions.common(theirs) {
                return Err(bad(format!("version {protocol} chosen, which is not the highest common one")));
            }
            let fabric = FabricKind::from_code(fabric)
                .filter(|fabric| ours.fabrics.contains(fabric))
                .ok_or_else(|| bad(format!("fabric {fabric} chosen, which was not offered")))?;
            let without_verbs = without_verbs(&ours.no_verbs, bounded(no_verbs)?);
            let without_verbs = without_verbs.filter(|_| fabric != FabricKind::Verbs);
            Ok((
                Agreed { session, protocol, fabric, without_verbs, peer_belay_version: printable(&belay_version) },
                blob,
            ))
        }
    }
}

#[cfg(test)]
mod golden;

#[cfg(test)]
mod tests {
    use super::*;

    const SESSION: SessionId = SessionId([3; 16]);

    fn only(fabric: FabricKind) -> Offered {
        Offered { fabrics: vec![fabric], no_verbs: None }
    }

    fn offered(versions: VersionRange) -> Vec<u8> {
        let offer = Offer {
            geometry: vec![RegionGeometry { id: RegionId(0), bytes: 1 << 30, page_size: PageSize::Small }],
            blob: b"above".to_vec(),
        };
        encode_hello(SESSION, &Token([7; 32]), versions, &only(FabricKind::Tcp), &offer).unwrap()
    }

    #[test]
    fn the_highest_common_version_is_chosen() {
        let range = |min, max| VersionRange { min, max };
        assert_eq!(range(1, 4).common(range(2, 9)), Some(4));
        assert_eq!(range(3, 3).common(range(1, 3)), Some(3));
        assert_eq!(range(1, 2).common(range(3, 4)), None);
        let (hello, token) =
            decode_hello(&offered(range(1, 5)), SESSION, range(2, 3), &only(FabricKind::Tcp)).expect("common version");
        assert_eq!((hello.protocol, hello.geometry[0].bytes, &hello.blob[..]), (3, 1 << 30, &b"above"[..]));
        assert!(token.matches(&[7; 32]) && !token.matches(&[8; 32]));
    }

    #[test]
    fn versions_without_overlap_are_refused_with_both_ranges() {
        let error = decode_hello(
            &offered(VersionRange { min: 1, max: 2 }),
            SESSION,
            VersionRange { min: 5, max: 6 },
            &only(FabricKind::Tcp),
        )
        .unwrap_err();
        let text = error.to_string();
        assert!(text.contains("5 to 6") && text.contains("1 to 2"), "{text}");
    }

    #[test]
    fn a_hello_for_another_session_or_fabric_is_refused() {
        let bytes = offered(PROTOCOL);
        assert!(decode_hello(&bytes, SessionId([4; 16]), PROTOCOL, &only(FabricKind::Tcp)).is_err());
        assert!(matches!(
            decode_hello(&bytes, SESSION, PROTOCOL, &only(FabricKind::Local)),
            Err(SessionError::NoCommonFabric { .. })
        ));
    }

    #[test]
    fn a_reply_may_only_choose_what_was_offered_and_says_why_it_is_not_verbs() {
        let tcp = Offered { fabrics: vec![FabricKind::Tcp], no_verbs: Some(NoVerbs::NotTrusted) };
        let (hello, _) = decode_hello(&offered(PROTOCOL), SESSION, PROTOCOL, &tcp).expect("tcp is common");
        assert_eq!(hello.without_verbs, Some(WithoutVerbs::Ours(NoVerbs::NotTrusted)));
        let chosen = |fabric| {
            let hello = Hello { fabric, ..hello.clone() };
            let reply = encode_accept(&hello, PROTOCOL, Some(NoVerbs::NotTrusted), b"").unwrap();
            decode_reply(&reply, SESSION, PROTOCOL, &only(FabricKind::Tcp))
        };
        let (agreed, _) = chosen(FabricKind::Tcp).expect("as offered");
        assert_eq!(agreed.without_verbs, Some(WithoutVerbs::Theirs(NoVerbs::NotTrusted)));
        for fabric in [FabricKind::Verbs, FabricKind::Local] {
            assert!(matches!(chosen(fabric), Err(SessionError::Protocol { .. })), "{fabric} was not offered");
        }
    }

    #[test]
    fn a_reason_longer_than_the_limit_is_refused_on_either_side() {
        let long = Offered {
            fabrics: vec![FabricKind::Tcp],
            no_verbs: Some(NoVerbs::Unusable { why: "x".repeat(MAX_TEXT_BYTES + 1) }),
        };
        assert!(matches!(encode_no_common_fabric(&long, PROTOCOL), Err(SessionError::TooLong { .. })));
        let reply = ReplyBody::NoCommonFabric { fabrics: vec![3], no_verbs: long.no_verbs };
        let reply = frame(REPLY_MAGIC, PROTOCOL, &reply).unwrap();
        let error = decode_reply(&reply, SESSION, PROTOCOL, &only(FabricKind::Tcp)).unwrap_err();
        assert!(matches!(error, SessionError::TooLong { .. }), "{error}");
    }

    #[test]
    fn cut_or_changed_hellos_never_panic() {
        let bytes = offered(PROTOCOL);
        for end in 0..bytes.len() {
            assert!(decode_hello(&bytes[..end], SESSION, PROTOCOL, &only(FabricKind::Tcp)).is_err(), "cut at {end}");
        }
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 0xff;
            let _ = decode_hello(&changed, SESSION, PROTOCOL, &only(FabricKind::Tcp));
        }
    }
}
