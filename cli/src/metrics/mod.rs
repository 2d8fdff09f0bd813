//! `--metrics ADDR`: how a role stands, in Prometheus' text format over HTTP, within the same bounds as the operator's socket.

pub(crate) mod http;
mod render;

use crate::operate::serve::{Dialect, Door, Heard, Looked, Server, Stream};
use belay_vmm_glue::migrate::status::Board;
use http::{Refusal, Request};
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::str::FromStr;
use std::sync::Arc;

/// Where metrics are served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MetricsAddress(SocketAddr);

impl FromStr for MetricsAddress {
    type Err = String;

    /// `9100` is loopback; other interfaces must be named, because whoever reaches the port may read.
    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(port) = text.parse() {
            return Ok(Self(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port)));
        }
        text.parse()
            .map(Self)
            .map_err(|_| "a port (9100, on loopback), or an IP address and a port (10.0.0.1:9100, [::1]:9100)".into())
    }
}

impl std::fmt::Display for MetricsAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// Starts serving `board`; where.
pub fn serve(address: MetricsAddress, board: Arc<Board>) -> io::Result<(Server, SocketAddr)> {
    let listener = TcpListener::bind(address.0)
        .map_err(|error| io::Error::new(error.kind(), format!("cannot serve metrics at {address}: {error}")))?;
    let bound = listener.local_addr()?;
    Ok((Server::start("metrics", Door::Tcp(listener), Scrapers(board))?, bound))
}

struct Scrapers(Arc<Board>);

/// HTTP keeps nobody waiting.
enum Never {}

impl Dialect for Scrapers {
    type Waiting = Never;
    const LONGEST: usize = http::LONGEST_HEAD;

    fn admit(&mut self, _client: &Stream) -> Result<(), String> {
        Ok(())
    }

    fn hear(&mut self, received: &[u8]) -> Heard<Never> {
        match http::parse(received) {
            Ok(None) => Heard::More,
            Ok(Some(Request { path: "/metrics", head_only })) => {
                let body = render::text(&self.0.status());
                Heard::Say(http::answer("200 OK", render::CONTENT_TYPE, &body, head_only))
            }
            Ok(Some(Request { head_only, .. })) => {
                Heard::Say(http::answer("404 Not Found", http::PLAIN, "metrics are at /metrics\n", head_only))
            }
            Err(refusal) => Heard::Say(refusal.answer()),
        }
    }

    fn too_long(&mut self) -> Vec<u8> {
        Refusal::TooLong.answer()
    }

    fn look(&mut self, waiting: &mut Never) -> Looked {
        match *waiting {}
    }

    fn busy(&mut self) -> Vec<u8> {
        Refusal::Busy.answer()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::TcpStream;
    use std::time::{Duration, Instant};

    fn served() -> (Server, SocketAddr) {
        serve("0".parse().expect("a port"), Arc::new(Board::new("vm", "source"))).expect("a free port")
    }

    fn connect(address: SocketAddr) -> TcpStream {
        let stream = TcpStream::connect(address).expect("it listens");
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
        stream
    }

    fn rest(stream: &mut TcpStream) -> String {
        let mut text = String::new();
        // A reset is an end too, where the other side hung up on bytes it had not read.
        let _ = stream.read_to_string(&mut text);
        text
    }

    fn get(address: SocketAddr, path: &str) -> String {
        let mut stream = connect(address);
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").expect("it reads");
        rest(&mut stream)
    }

    #[test]
    fn a_port_alone_is_loopback_and_nothing_else_is_guessed() {
        let parse = |text: &str| text.parse::<MetricsAddress>().map(|address| address.to_string());
        assert_eq!(parse("9100").as_deref(), Ok("127.0.0.1:9100"));
        assert_eq!(parse("[::]:9100").as_deref(), Ok("[::]:9100"));
        for bad in ["", ":9100", "host:9100", "70000", "0.0.0.0"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn metrics_are_at_one_path_and_by_one_method() {
        let (_server, address) = served();
        let answer = get(address, "/metrics");
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.contains("\nbelay_info{"), "{answer}");
        assert!(get(address, "/").starts_with("HTTP/1.1 404 "));
        let mut stream = connect(address);
        stream.write_all(b"POST /metrics HTTP/1.1\r\nHost: x\r\n\r\n").expect("it reads");
        assert!(rest(&mut stream).starts_with("HTTP/1.1 405 "));
    }

    #[test]
    fn p7_a_thousand_silent_clients_keep_nobody_out() {
        let (_server, address) = served();
        let silent: Vec<TcpStream> = (0..1000).map(|_| connect(address)).collect();
        let begun = Instant::now();
        assert!(get(address, "/metrics").starts_with("HTTP/1.1 200 OK"));
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
        drop(silent);
    }

    #[test]
    fn p7_a_client_that_sends_a_byte_now_and_then_is_hung_up_on() {
        let (_server, address) = served();
        let mut slow = connect(address);
        let begun = Instant::now();
        slow.set_read_timeout(Some(Duration::from_millis(200))).expect("a timeout");
        let mut request = b"GET /metrics HTTP/1.1\r\nX: ".iter().chain(std::iter::repeat(&b'a'));
        let hung_up = loop {
            let _ = slow.write_all(&[*request.next().expect("endless")]);
            match slow.read(&mut [0; 1]) {
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
                _ => break begun.elapsed(),
            }
            assert!(begun.elapsed() < Duration::from_secs(15), "it is still listened to");
        };
        assert!(hung_up > Duration::from_secs(1), "{hung_up:?}");
    }

    #[test]
    fn a_head_without_end_is_refused_at_its_bound() {
        let (_server, address) = served();
        let mut endless = connect(address);
        let _ = endless.write_all(&[b'a'; http::LONGEST_HEAD + 4096]);
        let said = rest(&mut endless);
        assert!(said.is_empty() || said.starts_with("HTTP/1.1 4"), "{said}");
        assert!(get(address, "/metrics").contains(" 200 OK"));
    }
}
