//! An arbiter that may answer anything.

use super::http::{Answer, HttpError, LONGEST, parse};
use super::{Endpoint, Etcd, gateway};
use crate::arbiter::{ArbiterError, GuestName};

/// An answer of HTTP, however its bytes come; and what the gateway's bodies are taken for.
pub(crate) fn arbiter(data: &[u8]) {
    let Some((mode, bytes)) = data.split_first() else { return };
    match mode % 2 {
        0 => answer(bytes),
        _ => body(bytes),
    }
}

/// What is an answer stays one whatever follows, unless it lasts until the end; what is none stays none.
fn answer(heard: &[u8]) {
    let (open, whole) = (parse(heard, false), parse(heard, true));
    for taken in [&open, &whole].into_iter().flatten().flatten() {
        assert!((200..600).contains(&taken.status) && taken.body.len() <= heard.len());
    }
    let at_end = |verdict: &Result<Option<Answer>, HttpError>| verdict.as_ref().ok().cloned().flatten();
    if let Some(taken) = at_end(&open) {
        assert_eq!(at_end(&whole), Some(taken), "the end changes nothing of what is whole");
    }
    for end in [heard.len() / 4, heard.len() / 2, heard.len().saturating_sub(1)] {
        match parse(&heard[..end], false) {
            Ok(Some(taken)) => {
                let more = heard.len() <= LONGEST;
                assert!(!more || at_end(&open) == Some(taken), "what is whole stays as it is");
            }
            // Refused before its end: nothing that follows makes it right.
            Err(_) => assert!(open.is_err()),
            Ok(None) => {}
        }
    }
}

/// A record that is believed is of the key that was asked for, has a version, and a claim that can be written down.
fn body(bytes: &[u8]) {
    let refusal = gateway::refusal(bytes);
    assert!(refusal.chars().count() <= 301 && !refusal.contains(char::is_control));
    let etcd = Etcd::new("http://127.0.0.1:2379".parse::<Endpoint>().expect("an endpoint"));
    let guest: GuestName = "vm1".parse().expect("a name");
    if let Ok(found) = gateway::read::<gateway::Ranged>(bytes) {
        match etcd.record(&guest, "look", &found) {
            Ok(Some(held)) => assert!(held.version.0 > 0 && held.claim.fits()),
            Ok(None) => assert!(found.kvs.is_empty()),
            Err(error) => {
                assert!(matches!(error, ArbiterError::Misunderstood { .. } | ArbiterError::ForeignRecord { .. }));
                // Who may write into the arbiter writes no operator's terminal.
                let said = error.to_string();
                assert!(said.chars().count() <= 600 && !said.contains(char::is_control), "{said:?}");
            }
        }
    }
    let _ = gateway::read::<gateway::Transacted>(bytes);
    let _ = gateway::read::<gateway::Granted>(bytes);
    let _ = gateway::read::<gateway::KeptAlive>(bytes);
}

/// Inputs of our own making, for the corpus.
#[cfg(test)]
pub(crate) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let record = r#"{"header":{"revision":"6"},"kvs":[{"key":"YmVsYXkvZ3Vlc3Qvdm0x","create_revision":"2","mod_revision":"6","version":"4",
        "value":"eyJvd25lciI6Imhvc3QtYSIsIm93bmVyLWVwb2NoIjozLCJtaWdyYXRpb24iOiIwMGZmIiwic3RhbmRpbmciOiJsZW50In0=","lease":"7587861231285799685"}],"count":"1"}"#;
    let of = |mode: u8, parts: &[&str]| [&[mode][..], parts.concat().as_bytes()].concat();
    let length =
        format!("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n", record.len());
    let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10\r\n{\"result\":{\"ID\":\r\n5;x=y\r\n\"7\"}}\r\n0\r\n\r\n";
    vec![
        ("length", of(0, &[&length, record])),
        ("chunked", of(0, &[chunked])),
        ("until-the-end", of(0, &["HTTP/1.0 503 Service Unavailable\r\n\r\n", r#"{"error":"no leader","code":14}"#])),
        ("record", of(1, &[record])),
        ("transaction", of(1, &[r#"{"header":{"revision":"7"},"responses":[{"response_range":"#, record, "}]}"])),
        ("lease", of(1, &[r#"{"header":{},"ID":"7587861231285799685","TTL":"10"}"#])),
        ("refusal", of(1, &[r#"{"error":"etcdserver: requested lease not found","code":5}"#])),
    ]
}
