//! The outside observer: receives what guests emit from whoever holds them, and judges it as the world would.
//!
//! ```text
//! client → server   "BELAYOBS", version u16, label length u16, label       once a connection; a label has graphic ASCII characters only
//! client → server   length u32 (of what follows), sequence u64, bytes      a packet
//! server → client   sequence u64                                            once the packet is written down
//! ```
//! Numbers are little-endian. A packet that was not acknowledged has not been seen as far as its sender knows, and is sent
//! again: the judge allows repeats, but only byte for byte the same.
mod address;
mod client;
mod judge;
pub mod log;
mod server;

pub use address::{AddressError, ObserverAddress};
pub use client::ObserverClient;
pub use judge::{OutputFault, Seen, SenderSummary, Verdict, distinct, judge};
pub use server::ObserverServer;

use std::fmt;
use std::io;
use std::time::Duration;

const MAGIC: &[u8; 8] = b"BELAYOBS";
const VERSION: u16 = 1;
/// Longest packet taken.
const MAX_PACKET_BYTES: usize = 64 << 10;
/// Longest label of a sender.
const MAX_LABEL_BYTES: usize = 256;
/// Connections served at a time.
const MAX_CONNECTIONS: usize = 16;
/// Arrivals written down; at the bound the observer takes no more and says so.
const MAX_ARRIVALS: usize = 4 << 20;
/// How long a client waits for a connection or an acknowledgement.
const CLIENT_BOUND: Duration = Duration::from_millis(1000);
/// How long the server lets a client take over the middle of a message.
const SERVER_BOUND: Duration = Duration::from_secs(10);

/// Whether a sender may be called so: what it says of itself is shown to an operator and stands in a line of the log, so it has no
/// spaces and nothing that steers a terminal.
fn is_label(text: &str) -> bool {
    (1..=MAX_LABEL_BYTES).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic())
}

fn invalid(what: impl fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_string())
}

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
#[cfg(test)]
pub(crate) mod golden;

#[cfg(test)]
mod tests {
    use super::*;
    use belay_checkpoint::guest::Packet;
    use belay_transport::Deadline;
    use std::io::{Read, Write};
    use std::net::TcpStream;

    fn packet(sequence: u64) -> Packet {
        Packet { sequence, bytes: vec![sequence as u8; 40] }
    }

    fn soon() -> Deadline {
        Deadline::after(Duration::from_secs(10))
    }

    #[test]
    fn what_a_client_sent_has_been_seen_when_it_returns_over_both_kinds_of_socket() {
        let directory = tempfile::tempdir().unwrap();
        let unix = ObserverAddress::Unix(directory.path().join("observer"));
        for address in ["127.0.0.1:0".parse().unwrap(), unix] {
            let server = ObserverServer::bind(&address).unwrap();
            let mut source = ObserverClient::new(server.address().clone(), "source");
            let mut destination = ObserverClient::new(server.address().clone(), "destination");
            for sequence in 0..10 {
                let client = if sequence < 5 { &mut source } else { &mut destination };
                client.send(&packet(sequence)).unwrap();
                assert_eq!(server.seen().len() as u64, sequence + 1);
            }
            let verdict = server.verdict();
            assert!(verdict.is_good() && verdict.senders.len() == 2, "{verdict}");
            assert!(distinct(&server.seen()).map(|(sequence, _)| sequence).eq(0..10));
            assert!(server.wait_until(soon(), |seen| seen.len() == 10));
            let gone = server.address().clone();
            drop(server);
            assert!(source.send(&packet(10)).is_err(), "sent to an observer that is gone");
            assert!(ObserverClient::new(gone, "late").send(&packet(0)).is_err());
        }
    }

    #[test]
    fn a_client_connects_again_after_its_observer_came_back() {
        let directory = tempfile::tempdir().unwrap();
        let address = ObserverAddress::Unix(directory.path().join("observer"));
        let server = ObserverServer::bind(&address).unwrap();
        let mut client = ObserverClient::new(address.clone(), "source");
        client.send(&packet(0)).unwrap();
        drop(server);
        assert!(client.send(&packet(1)).is_err());
        let server = ObserverServer::bind(&address).unwrap();
        client.send(&packet(1)).unwrap();
        assert_eq!(server.seen().len(), 1);
    }

    #[test]
    fn a_peer_that_speaks_nonsense_is_cut_off_and_harms_nobody() {
        let server = ObserverServer::bind(&"127.0.0.1:0".parse().unwrap()).unwrap();
        let ObserverAddress::Tcp(address) = server.address().clone() else { panic!() };
        let hello = |label_len: u16| [MAGIC.as_slice(), &VERSION.to_le_bytes(), &label_len.to_le_bytes()].concat();
        let giant = [hello(1), b"x".to_vec(), u32::MAX.to_le_bytes().to_vec()].concat();
        let short = [hello(1), b"x".to_vec(), 3u32.to_le_bytes().to_vec()].concat();
        let body = [10u32.to_le_bytes().as_slice(), &[0; 10]].concat();
        let named = |name: &[u8]| [&hello(name.len() as u16)[..], name, &body].concat();
        let names = [named(b""), named(b"source 7 00\n9"), named(b"\x1b[2J"), named("höst".as_bytes())];
        let nonsense = [b"GET / HTTP/1.1\r\n\r\n".to_vec(), hello(u16::MAX), giant, short];
        for nonsense in nonsense.into_iter().chain(names) {
            let mut stream = TcpStream::connect(&address).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            stream.write_all(&nonsense).unwrap();
            let mut answer = Vec::new();
            // The observer closes: an end or a reset, but no answer.
            let _ = stream.read_to_end(&mut answer);
            assert!(answer.is_empty());
        }
        let mut client = ObserverClient::new(server.address().clone(), "good");
        client.send(&packet(0)).unwrap();
        assert_eq!(server.seen().len(), 1);
    }

    #[test]
    fn addresses_are_read_as_they_are_written() {
        for text in ["127.0.0.1:80", "[::1]:9", "unix:/tmp/x"] {
            assert_eq!(text.parse::<ObserverAddress>().unwrap().to_string(), text);
        }
        for text in ["", "unix:", "host", "host:", ":80", "host:99999"] {
            assert!(text.parse::<ObserverAddress>().is_err(), "{text}");
        }
    }
}
