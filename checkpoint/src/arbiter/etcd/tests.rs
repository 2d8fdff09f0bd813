//! The client against a server that answers by script, and against a real etcd, killed and started again.

use super::*;
use crate::arbiter::Standing;
use crate::ownership::OwnerEpoch;
use rustix::net::{AddressFamily, SocketType};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::Instant;

/// Only a broken test waits so long.
fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(20))
}

fn vm1() -> GuestName {
    "vm1".parse().expect("a name")
}

fn claim_of(owner: &str, owner_epoch: u64) -> Claim {
    let (owner, owner_epoch) = (owner.to_owned(), OwnerEpoch(owner_epoch));
    Claim { owner, owner_epoch, migration: "00ff".to_owned(), standing: Standing::Kept }
}

/// What a server does once it was asked.
type Script = Box<dyn FnOnce(&mut TcpStream) + Send>;

/// Answers one connection after the other by what the script makes of them; what was asked comes over the channel.
struct Scripted {
    etcd: Etcd,
    asked: Receiver<String>,
    serving: Option<JoinHandle<()>>,
}

impl Scripted {
    fn new(connections: Vec<Script>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
        let endpoint = format!("http://{}", listener.local_addr().expect("bound"));
        let (say, asked) = channel();
        let serving = std::thread::spawn(move || {
            for answer in connections {
                let (mut stream, _) = listener.accept().expect("a connection");
                say.send(request(&mut stream)).expect("heard");
                answer(&mut stream);
            }
        });
        Self { etcd: Etcd::new(endpoint.parse().expect("an endpoint")), asked, serving: Some(serving) }
    }

    fn saying(bytes: impl Into<Vec<u8>>) -> Self {
        let bytes = bytes.into();
        // Whoever has heard enough may have gone.
        Self::new(vec![Box::new(move |stream| drop(stream.write_all(&bytes)))])
    }

    fn ok(body: &str) -> Self {
        Self::saying(http_ok(body))
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        if let Some(serving) = self.serving.take()
            && !std::thread::panicking()
        {
            serving.join().expect("the script was played to its end");
        }
    }
}

fn http_ok(body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

/// One whole request.
fn request(stream: &mut TcpStream) -> String {
    let (mut heard, mut room) = (Vec::new(), [0; 4096]);
    loop {
        let text = String::from_utf8_lossy(&heard);
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: ")).expect("a length");
            if body.len() >= length.parse().expect("a number") {
                return text.into_owned();
            }
        }
        match stream.read(&mut room).expect("a request") {
            0 => panic!("the client went after {heard:?}"),
            count => heard.extend_from_slice(&room[..count]),
        }
    }
}

fn record(claim: &Claim, revision: u64) -> String {
    let value = base64::encode(&serde_json::to_vec(claim).expect("plain data"));
    let key = base64::encode(b"belay/guest/vm1");
    format!(
        r#"{{"header":{{"revision":"{revision}"}},"kvs":[{{"key":"{key}","value":"{value}","mod_revision":"{revision}"}}],"count":"1"}}"#
    )
}

#[test]
fn an_endpoint_is_a_host_and_a_port_in_clear() {
    for right in ["http://127.0.0.1:2379", "http://[::1]:2379", "http://etcd-0.example:80"] {
        assert_eq!(right.parse::<Endpoint>().expect(right).to_string(), right);
    }
    let wrong = [
        "",
        "127.0.0.1:2379",
        "https://a:2379",
        "http://a",
        "http://a:0",
        "http://:1",
        "http://a:2379/v3",
        "http://a\r\nb:1",
    ];
    for wrong in wrong {
        assert!(wrong.parse::<Endpoint>().is_err(), "{wrong}");
    }
}

#[test]
fn a_claim_compares_the_version_that_was_read_and_writes_owner_and_owner_epoch() {
    let mut server = Scripted::ok(r#"{"header":{"revision":"8"},"succeeded":true,"responses":[{"response_put":{}}]}"#);
    let mine = claim_of("host-b", 3);
    let verdict = server.etcd.claim(&vm1(), &mine, Some(Version(6)), None, soon()).expect("an answer");
    assert_eq!(verdict, Verdict::Ours(Held { claim: mine, version: Version(8), lease: None }));
    let asked = server.asked.recv().expect("asked");
    let (head, body) = asked.split_once("\r\n\r\n").expect("a request");
    assert!(head.starts_with("POST /v3/kv/txn HTTP/1.1\r\n"), "{head}");
    let body: Value = serde_json::from_str(body).expect("JSON");
    let compared = &body["compare"][0];
    assert_eq!((&compared["target"], &compared["mod_revision"]), (&"MOD".into(), &"6".into()));
    let put = body["success"][0]["request_put"]["value"].as_str().and_then(base64::decode).expect("a value");
    assert_eq!(
        String::from_utf8(put).expect("text"),
        r#"{"owner":"host-b","owner-epoch":3,"migration":"00ff","standing":"kept"}"#
    );
    // Without a record seen it claims only where there is none.
    let mut server = Scripted::ok(r#"{"header":{"revision":"2"},"succeeded":true}"#);
    server.etcd.claim(&vm1(), &claim_of("host-b", 3), None, None, soon()).expect("an answer");
    assert!(server.asked.recv().expect("asked").contains(r#""create_revision":"0""#));
}

#[test]
fn a_claim_that_lost_says_who_has_it_and_one_that_is_found_there_word_for_word_has_won() {
    let (mine, other) = (claim_of("host-b", 3), claim_of("host-a", 4));
    let found = |claim: &Claim| {
        format!(r#"{{"header":{{"revision":"9"}},"responses":[{{"response_range":{}}}]}}"#, record(claim, 7))
    };
    let mut server = Scripted::ok(&found(&other));
    let lost = server.etcd.claim(&vm1(), &mine, Some(Version(6)), None, soon()).expect("an answer");
    assert_eq!(lost, Verdict::Not(Some(Held { claim: other, version: Version(7), lease: None })));
    let mut server = Scripted::ok(&found(&mine));
    let won = server.etcd.claim(&vm1(), &mine, Some(Version(6)), None, soon()).expect("an answer");
    assert_eq!(won, Verdict::Ours(Held { claim: mine, version: Version(7), lease: None }));
}

#[test]
fn whatever_an_arbiter_answers_that_is_no_answer_is_an_error_with_what_it_was() {
    let absurd_length = "HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n{}".to_owned();
    let endless = format!("HTTP/1.1 200 OK\r\n\r\n{}", "x".repeat(LONGEST + 1));
    let many_headers = format!("HTTP/1.1 200 OK\r\n{}\r\n", "a: b\r\n".repeat(200));
    let foreign = record(&claim_of("host-a", 1), 4).replace("eyJ", "ey1");
    let other_key =
        record(&claim_of("host-a", 1), 4).replace(&base64::encode(b"belay/guest/vm1"), &base64::encode(b"x"));
    for (answer, what) in [
        ("".to_owned(), "ended after 0 bytes"),
        ("HTTP/1.1 200 OK\r\nContent-Le".to_owned(), "ended after 27 bytes"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 40\r\n\r\n{}".to_owned(), "before the answer did"),
        (absurd_length, "more than 65536 bytes"),
        (endless, "more than 65536 bytes"),
        (many_headers, "too many headers"),
        ("HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n".to_owned(), "no number"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}".to_owned(), "two lengths"),
        ("SSH-2.0-OpenSSH_9.2\r\n\r\n".to_owned(), "none of HTTP/1"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n".to_owned(), "size is no number"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffff\r\n".to_owned(), "more than 65536 bytes"),
        (http_ok("[]"), "answered something else"),
        (http_ok("{\"header\":"), "answered something else"),
        (http_ok("{}"), "header"),
        (http_ok(&"[".repeat(5000)), "answered something else"),
        (http_ok(&foreign), "not belay's"),
        (http_ok(&other_key), "another key"),
        (
            "HTTP/1.1 503 Unavailable\r\nContent-Length: 99\r\n\r\n{\"error\":\"no\\u0007leader\"}".to_owned(),
            "ended after",
        ),
        (
            "HTTP/1.0 503 Unavailable\r\n\r\n{\"error\":\"no\\u0007leader\",\"code\":14}".to_owned(),
            "(HTTP status 503): no leader",
        ),
    ] {
        let mut server = Scripted::saying(answer.clone());
        let error = server.etcd.who(&vm1(), soon()).expect_err(&answer);
        let mut told = error.to_string();
        let mut source = std::error::Error::source(&error);
        while let Some(cause) = source {
            told += &format!(": {cause}");
            source = cause.source();
        }
        assert!(told.contains(what), "{told}\nfor {answer:.200}");
    }
}

#[test]
fn p7_an_arbiter_that_says_a_byte_now_and_then_is_given_up_at_the_deadline() {
    let bound = Duration::from_millis(300);
    let mut server = Scripted::new(vec![Box::new(|stream| {
        // Until the client has had enough.
        let slow = format!("HTTP/1.1 200 OK\r\nContent-Length: 60000\r\n\r\n{}", " ".repeat(60000));
        for byte in slow.bytes() {
            if stream.write_all(&[byte]).is_err() {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("it was listened to for five minutes");
    })]);
    let begun = Instant::now();
    let error = server.etcd.who(&vm1(), Deadline::after(bound)).expect_err("no answer in time");
    assert!(matches!(error, ArbiterError::NotAsked { source: HttpError::TimedOut, .. }), "{error}");
    assert!(begun.elapsed() >= bound);
}

#[test]
fn a_claim_that_was_heard_and_not_answered_may_have_happened_and_one_that_was_not_heard_has_not() {
    let mut server = Scripted::saying("");
    let error = server.etcd.claim(&vm1(), &claim_of("host-b", 1), None, None, soon()).expect_err("no answer");
    assert!(matches!(error, ArbiterError::MayHaveHappened { .. }) && error.may_have_happened(), "{error}");
    // A port that nobody listens on.
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).expect("a socket");
    rustix::net::bind(&socket, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0)).expect("loopback");
    let taken = SocketAddr::try_from(rustix::net::getsockname(&socket).expect("bound")).expect("of IPv4");
    let mut nobody = Etcd::new(format!("http://{taken}").parse().expect("an endpoint"));
    let error = nobody.claim(&vm1(), &claim_of("host-b", 1), None, None, soon()).expect_err("nobody there");
    assert!(matches!(error, ArbiterError::NotAsked { .. }) && !error.may_have_happened(), "{error}");
    let error = nobody.claim(&vm1(), &claim_of("", 1), None, None, soon()).expect_err("nobody's");
    assert!(matches!(error, ArbiterError::TooLong));
}

mod real;
