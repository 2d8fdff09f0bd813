//! As much of HTTP/1.1 (RFC 9112) as a scrape needs, and strictly: GET or HEAD, no body, one request a connection.

/// Longest request line and header fields, in bytes.
pub const LONGEST_HEAD: usize = 8192;
/// What is no metrics.
pub const PLAIN: &str = "text/plain; charset=utf-8";

/// A request that may be answered.
#[derive(Debug, PartialEq, Eq)]
pub struct Request<'a> {
    /// Without its query.
    pub path: &'a str,
    pub head_only: bool,
}

/// Why one may not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    Malformed,
    Method,
    Version,
    TooLong,
    Busy,
}

impl Refusal {
    /// What to tell the client.
    pub fn answer(self) -> Vec<u8> {
        let (status, text) = match self {
            Self::Malformed => ("400 Bad Request", "no request of HTTP/1.1 without a body\n"),
            Self::Method => ("405 Method Not Allowed\r\nAllow: GET, HEAD", "metrics can be read, no more\n"),
            Self::Version => ("505 HTTP Version Not Supported", "HTTP/1.1 and HTTP/1.0 are spoken here\n"),
            Self::TooLong => ("431 Request Header Fields Too Large", "too long\n"),
            Self::Busy => ("503 Service Unavailable", "too many clients\n"),
        };
        answer(status, PLAIN, text, false)
    }
}

/// An answer after which the connection is closed.
pub fn answer(status: &str, content_type: &str, body: &str, head_only: bool) -> Vec<u8> {
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    );
    let body = if head_only { "" } else { body };
    [head.as_bytes(), body.as_bytes()].concat()
}

/// The request in `received`, or nothing while its head is not whole.
pub fn parse(received: &[u8]) -> Result<Option<Request<'_>>, Refusal> {
    let end = received.windows(4).position(|four| four == b"\r\n\r\n");
    // What can be no head is not waited for.
    let seen = &received[..end.unwrap_or(received.len())];
    if seen.iter().any(|&byte| byte != b'\r' && byte != b'\n' && byte != b'\t' && !(0x20..0x7f).contains(&byte)) {
        return Err(Refusal::Malformed);
    }
    let Some(end) = end else { return if received.len() > LONGEST_HEAD { Err(Refusal::TooLong) } else { Ok(None) } };
    if end > LONGEST_HEAD {
        return Err(Refusal::TooLong);
    }
    let head = std::str::from_utf8(&received[..end]).map_err(|_| Refusal::Malformed)?;
    let mut lines = head.split("\r\n");
    let line = lines.next().unwrap_or_default();
    let mut words = line.split(' ');
    let (Some(method), Some(target), Some(version), None) = (words.next(), words.next(), words.next(), words.next())
    else {
        return Err(Refusal::Malformed);
    };
    let old = match version {
        "HTTP/1.1" => false,
        "HTTP/1.0" => true,
        other if other.starts_with("HTTP/") => return Err(Refusal::Version),
        _ => return Err(Refusal::Malformed),
    };
    let mut hosts = 0;
    for line in lines {
        let (name, value) = line.split_once(':').ok_or(Refusal::Malformed)?;
        if name.is_empty() || !name.bytes().all(is_token) || value.contains(['\r', '\n']) {
            return Err(Refusal::Malformed);
        }
        hosts += usize::from(name.eq_ignore_ascii_case("host"));
        let body = (name.eq_ignore_ascii_case("content-length") && value.trim() != "0")
            || name.eq_ignore_ascii_case("transfer-encoding");
        if body {
            return Err(Refusal::Malformed);
        }
    }
    if hosts > 1 || (hosts == 0 && !old) || !target.starts_with('/') || line.contains(['\r', '\n', '\t']) {
        return Err(Refusal::Malformed);
    }
    let head_only = match method {
        "GET" => false,
        "HEAD" => true,
        other if !other.is_empty() && other.bytes().all(is_token) => return Err(Refusal::Method),
        _ => return Err(Refusal::Malformed),
    };
    let path = target.split_once('?').map_or(target, |(path, _)| path);
    Ok(Some(Request { path, head_only }))
}

/// RFC 9110 §5.6.2.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SCRAPE: &str = "GET /metrics HTTP/1.1\r\nHost: host-b:9100\r\nAccept: text/plain;version=0.0.4\r\nUser-Agent: Prometheus\r\n\r\n";

    #[test]
    fn a_scrape_is_understood_once_it_is_whole_and_not_before() {
        for end in 0..SCRAPE.len() {
            assert_eq!(parse(&SCRAPE.as_bytes()[..end]), Ok(None), "{end}");
        }
        let asked = Request { path: "/metrics", head_only: false };
        assert_eq!(parse(SCRAPE.as_bytes()), Ok(Some(asked)));
        assert_eq!(
            parse(b"HEAD /metrics?x=1 HTTP/1.0\r\n\r\n"),
            Ok(Some(Request { path: "/metrics", head_only: true }))
        );
    }

    #[test]
    fn what_is_not_a_plain_get_is_refused_by_its_own_code() {
        let refused = |text: &str| parse(text.as_bytes()).expect_err(text);
        for malformed in [
            "GET /metrics HTTP/1.1\r\n\r\n",
            "GET  /metrics HTTP/1.1\r\nHost: x\r\n\r\n",
            "GET /metrics HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
            "GET /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n",
            "GET /metrics HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n",
            "GET /metrics HTTP/1.1\r\nHost : x\r\n\r\n",
            "GET /metrics HTTP/1.1\r\n folded: x\r\nHost: x\r\n\r\n",
            "GET http://x/metrics HTTP/1.1\r\nHost: x\r\n\r\n",
            "GET /metrics\r\nHost: x\r\n\r\n",
            "\u{16}\u{3}\u{1}hello over TLS",
        ] {
            assert_eq!(refused(malformed), Refusal::Malformed, "{malformed:?}");
        }
        assert_eq!(refused("DELETE / HTTP/1.1\r\nHost: x\r\n\r\n"), Refusal::Method);
        assert_eq!(refused("GET / HTTP/2.0\r\nHost: x\r\n\r\n"), Refusal::Version);
        assert_eq!(parse(&[b'a'; LONGEST_HEAD + 1]), Err(Refusal::TooLong));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_do_anything_but_answer(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&bytes);
        }

        #[test]
        fn a_scrape_with_any_one_byte_changed_is_a_scrape_or_refused(at in 0..SCRAPE.len(), byte: u8) {
            let mut bytes = SCRAPE.as_bytes().to_vec();
            bytes[at] = byte;
            match parse(&bytes) {
                Ok(Some(request)) => prop_assert!(request.path.starts_with('/')),
                Ok(None) => prop_assert!(!bytes.windows(4).any(|four| four == b"\r\n\r\n")),
                Err(refusal) => prop_assert!(refusal.answer().starts_with(b"HTTP/1.1 ")),
            }
        }

        #[test]
        fn whatever_comes_after_the_head_changes_nothing(more in proptest::collection::vec(any::<u8>(), 0..100)) {
            let bytes = [SCRAPE.as_bytes(), &more].concat();
            prop_assert_eq!(parse(&bytes), parse(SCRAPE.as_bytes()));
        }
    }
}
