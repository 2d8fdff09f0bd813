//! The outside observer: receives what guests emit from whoever holds them, and judges it as the world would.
//!
//! ```text
//! client → server   "BELAYOBS", version u16, label length u16, label       once a connection
//! client → server   length u32 (of what follows), sequence u64, bytes      a packet
//! server → client   sequence u64                                            once the packet is written down
//! ```
//! Numbers are little-endian. A packet that was not acknowledged has not been seen as far as its sender knows, and is sent
//! again: the judge allows repeats, but only byte for byte the same.

use belay_checkpoint::guest::Packet;
use belay_checkpoint::outbox::Emitter;
use belay_transport::Deadline;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

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

/// Where an observer listens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ObserverAddress {
    /// HOST:PORT.
    Tcp(String),
    /// `unix:PATH`.
    Unix(PathBuf),
}

impl fmt::Display for ObserverAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => f.write_str(address),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// A text that is no address of an observer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not an observer's address; write HOST:PORT or unix:PATH")]
pub struct AddressError(String);

impl FromStr for ObserverAddress {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.strip_prefix("unix:") {
            Some(path) if !path.is_empty() => Ok(Self::Unix(path.into())),
            None if text
                .rsplit_once(':')
                .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok()) =>
            {
                Ok(Self::Tcp(text.to_owned()))
            }
            _ => Err(AddressError(text.to_owned())),
        }
    }
}

#[derive(Debug)]
enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    fn connect(address: &ObserverAddress) -> io::Result<Self> {
        match address {
            ObserverAddress::Tcp(address) => {
                use std::net::ToSocketAddrs;
                let mut last = io::Error::new(io::ErrorKind::NotFound, format!("{address} has no address"));
                for address in address.to_socket_addrs()? {
                    match TcpStream::connect_timeout(&address, CLIENT_BOUND) {
                        Ok(stream) => return stream.set_nodelay(true).map(|()| Self::Tcp(stream)),
                        Err(error) => last = error,
                    }
                }
                Err(last)
            }
            ObserverAddress::Unix(path) => UnixStream::connect(path).map(Self::Unix),
        }
    }

    fn set_bounds(&self, bound: Duration) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.set_read_timeout(Some(bound)).and(stream.set_write_timeout(Some(bound))),
            Self::Unix(stream) => stream.set_read_timeout(Some(bound)).and(stream.set_write_timeout(Some(bound))),
        }
    }

    fn try_clone(&self) -> io::Result<Self> {
        match self {
            Self::Tcp(stream) => stream.try_clone().map(Self::Tcp),
            Self::Unix(stream) => stream.try_clone().map(Self::Unix),
        }
    }

    fn shut(&self) {
        // It may be closed already; either way nobody waits on it afterwards.
        let _ = match self {
            Self::Tcp(stream) => stream.shutdown(Shutdown::Both),
            Self::Unix(stream) => stream.shutdown(Shutdown::Both),
        };
    }
}

impl Read for Stream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(into),
            Self::Unix(stream) => stream.read(into),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.write(bytes),
            Self::Unix(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// One arrival at the observer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// When, in microseconds since the observer began.
    pub at_us: u64,
    /// The sender's label: which host and which incarnation.
    pub sender: Arc<str>,
    pub sequence: u64,
    pub bytes: Vec<u8>,
}

/// What is wrong with what was seen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "kebab-case")]
pub enum OutputFault {
    #[error("packets {first} to {last} never arrived though later ones did")]
    Gap { first: u64, last: u64 },
    #[error("{second} sent packet {sequence} with other bytes than {first} had")]
    Contradiction { sequence: u64, first: Arc<str>, second: Arc<str> },
    #[error("{sender} showed packet {sequence} when the next new one was {expected}")]
    OutOfOrder { sequence: u64, expected: u64, sender: Arc<str> },
    #[error("the observer was full after {arrivals} arrivals and turned senders away")]
    Full { arrivals: usize },
}

/// A sender's part in what was seen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SenderSummary {
    pub sender: Arc<str>,
    /// Packets it was the first to show: how many, the first, the last.
    pub new: u64,
    pub first_new: Option<u64>,
    pub last_new: Option<u64>,
    /// Packets that somebody (perhaps itself) had shown before.
    pub repeats: u64,
}

/// The observer's judgement.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// Different packets, arrivals, and arrivals of packets seen before.
    pub packets: u64,
    pub arrivals: u64,
    pub repeats: u64,
    /// In the order in which they first sent anything.
    pub senders: Vec<SenderSummary>,
    /// Longest time between two new packets, and the packet that ended it.
    pub largest_silence_us: u64,
    pub silence_ended_by: Option<u64>,
    pub faults: Vec<OutputFault>,
}

impl Verdict {
    /// Whether the output could be that of one machine that never failed.
    pub fn is_good(&self) -> bool {
        self.faults.is_empty()
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { packets, repeats, largest_silence_us, .. } = self;
        write!(f, "{packets} packets, {repeats} repeats, longest silence {} ms", largest_silence_us / 1000)?;
        self.faults.iter().try_for_each(|fault| write!(f, "; {fault}"))
    }
}

/// Judges arrivals in their order. At most 100 faults are listed.
pub fn judge(seen: &[Seen]) -> Verdict {
    const MAX_FAULTS: usize = 100;
    let mut first: BTreeMap<u64, &Seen> = BTreeMap::new();
    let mut senders: Vec<SenderSummary> = Vec::new();
    let (mut faults, mut repeats, mut expected) = (Vec::new(), 0, 0);
    let (mut last_new_us, mut largest_silence_us, mut silence_ended_by) = (None, 0, None);
    for arrival in seen {
        let index = senders.iter().position(|summary| summary.sender == arrival.sender).unwrap_or_else(|| {
            let sender = arrival.sender.clone();
            senders.push(SenderSummary { sender, new: 0, first_new: None, last_new: None, repeats: 0 });
            senders.len() - 1
        });
        let sender = &mut senders[index];
        let Seen { sequence, at_us, .. } = *arrival;
        if let Some(before) = first.get(&sequence) {
            repeats += 1;
            sender.repeats += 1;
            if before.bytes != arrival.bytes {
                let (first, second) = (before.sender.clone(), arrival.sender.clone());
                faults.push(OutputFault::Contradiction { sequence, first, second });
            }
            continue;
        }
        if sequence != expected {
            faults.push(OutputFault::OutOfOrder { sequence, expected, sender: arrival.sender.clone() });
        }
        expected = expected.max(sequence.saturating_add(1));
        first.insert(sequence, arrival);
        sender.new += 1;
        sender.first_new.get_or_insert(sequence);
        sender.last_new = Some(sequence);
        let silence_us = last_new_us.map_or(0, |last| at_us.saturating_sub(last));
        last_new_us = Some(at_us);
        if silence_us > largest_silence_us {
            (largest_silence_us, silence_ended_by) = (silence_us, Some(sequence));
        }
    }
    let mut next = 0;
    for &sequence in first.keys() {
        if sequence > next {
            faults.push(OutputFault::Gap { first: next, last: sequence - 1 });
        }
        next = sequence.saturating_add(1);
    }
    faults.truncate(MAX_FAULTS);
    let (packets, arrivals) = (first.len() as u64, seen.len() as u64);
    Verdict { packets, arrivals, repeats, senders, largest_silence_us, silence_ended_by, faults }
}

/// Each packet once, in the order of their numbers, as a model wants them.
pub fn distinct(seen: &[Seen]) -> impl Iterator<Item = (u64, &[u8])> {
    let mut first: BTreeMap<u64, &[u8]> = BTreeMap::new();
    for arrival in seen {
        first.entry(arrival.sequence).or_insert(&arrival.bytes);
    }
    first.into_iter()
}

#[derive(Debug, Default)]
struct Log {
    seen: Vec<Seen>,
    full: bool,
    ending: bool,
    connections: Vec<(u64, Stream)>,
}

#[derive(Debug)]
struct Shared {
    log: Mutex<Log>,
    arrived: Condvar,
    began: Instant,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    fn accept(&self) -> io::Result<Stream> {
        match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nodelay(true)?;
                stream.set_nonblocking(false)?;
                Ok(Stream::Tcp(stream))
            }
            Self::Unix(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(false)?;
                Ok(Stream::Unix(stream))
            }
        }
    }

    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(listener) => listener.as_fd(),
            Self::Unix(listener) => listener.as_fd(),
        }
    }
}

/// An observer that listens. Dropping it ends it.
#[derive(Debug)]
pub struct ObserverServer {
    shared: Arc<Shared>,
    address: ObserverAddress,
    acceptor: Option<JoinHandle<()>>,
    /// Its other end tells the acceptor to end when it closes.
    alive: Option<UnixStream>,
}

impl ObserverServer {
    /// Listens at `address`; port 0 takes any free port (see [`Self::address`]).
    pub fn bind(address: &ObserverAddress) -> io::Result<Self> {
        let (listener, address) = match address {
            ObserverAddress::Tcp(wanted) => {
                let listener = TcpListener::bind(wanted)?;
                listener.set_nonblocking(true)?;
                let address = ObserverAddress::Tcp(listener.local_addr()?.to_string());
                (Listener::Tcp(listener), address)
            }
            ObserverAddress::Unix(path) => {
                let listener = UnixListener::bind(path)?;
                listener.set_nonblocking(true)?;
                (Listener::Unix(listener), address.clone())
            }
        };
        let shared = Arc::new(Shared { log: Mutex::default(), arrived: Condvar::new(), began: Instant::now() });
        let (alive, end) = UnixStream::pair()?;
        let accepting = shared.clone();
        let acceptor = std::thread::Builder::new()
            .name("observer".into())
            .spawn(move || accept_until_closed(&listener, &end, &accepting))?;
        Ok(Self { shared, address, acceptor: Some(acceptor), alive: Some(alive) })
    }

    /// Where it listens.
    pub fn address(&self) -> &ObserverAddress {
        &self.address
    }

    /// Everything seen so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.shared.lock().seen.clone()
    }

    /// Judges what was seen so far.
    pub fn verdict(&self) -> Verdict {
        let log = self.shared.lock();
        let mut verdict = judge(&log.seen);
        if log.full {
            verdict.faults.push(OutputFault::Full { arrivals: log.seen.len() });
        }
        verdict
    }

    /// Waits until `enough` says so of all arrivals; whether it did before the deadline.
    pub fn wait_until(&self, deadline: Deadline, mut enough: impl FnMut(&[Seen]) -> bool) -> bool {
        let mut log = self.shared.lock();
        loop {
            if enough(&log.seen) {
                return true;
            }
            let left = deadline.left();
            if left.is_zero() {
                return false;
            }
            log = self.shared.arrived.wait_timeout(log, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for ObserverServer {
    fn drop(&mut self) {
        {
            let mut log = self.shared.lock();
            log.ending = true;
            log.connections.iter().for_each(|(_, stream)| stream.shut());
        }
        self.alive = None;
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
        if let ObserverAddress::Unix(path) = &self.address {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Accepts until the other end of `end` closes, then waits for the connections' threads.
fn accept_until_closed(listener: &Listener, end: &UnixStream, shared: &Arc<Shared>) {
    use rustix::event::{PollFd, PollFlags, poll};
    let mut serving: Vec<JoinHandle<()>> = Vec::new();
    for id in 0.. {
        let mut fds = [PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN), PollFd::new(end, PollFlags::IN)];
        let polled = poll(&mut fds, None);
        if !fds[1].revents().is_empty() || polled.is_err_and(|errno| errno != rustix::io::Errno::INTR) {
            break;
        }
        serving.retain(|thread| !thread.is_finished());
        // A connection that breaks before it is accepted, or one too many, is its sender's to try again.
        let Ok(stream) = listener.accept() else { continue };
        if serving.len() >= MAX_CONNECTIONS || stream.set_bounds(SERVER_BOUND).is_err() {
            continue;
        }
        let Ok(handle) = stream.try_clone() else { continue };
        {
            let mut log = shared.lock();
            if log.ending {
                break;
            }
            log.connections.push((id, handle));
        }
        let serving_shared = shared.clone();
        let spawned = std::thread::Builder::new().name("observer-conn".into()).spawn(move || {
            // However a connection ends, what arrived whole is written down; the rest is sent again by its sender.
            let _ = serve(stream, &serving_shared);
            serving_shared.lock().connections.retain(|(other, _)| *other != id);
        });
        serving.extend(spawned.ok());
    }
    for thread in serving {
        let _ = thread.join();
    }
}

/// Reads the whole of `into`; a quiet connection may stay quiet for ever, one that stalls within a message may not.
fn read_whole(stream: &mut Stream, into: &mut [u8], may_be_quiet: bool, shared: &Shared) -> io::Result<()> {
    let mut filled = 0;
    while filled < into.len() {
        match stream.read(&mut into[filled..]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && may_be_quiet && filled == 0 => {
                if shared.lock().ending {
                    return Err(error);
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn invalid(what: impl fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_string())
}

fn serve(mut stream: Stream, shared: &Shared) -> io::Result<()> {
    let mut head = [0; 12];
    read_whole(&mut stream, &mut head, true, shared)?;
    let (version, label_len) = (u16::from_le_bytes([head[8], head[9]]), u16::from_le_bytes([head[10], head[11]]));
    if &head[..8] != MAGIC || version != VERSION || usize::from(label_len) > MAX_LABEL_BYTES {
        return Err(invalid("not an emitter of this version"));
    }
    let mut label = vec![0; usize::from(label_len)];
    read_whole(&mut stream, &mut label, false, shared)?;
    let sender: Arc<str> = String::from_utf8(label).map_err(invalid)?.into();
    loop {
        let mut len = [0; 4];
        read_whole(&mut stream, &mut len, true, shared)?;
        let len = u32::from_le_bytes(len) as usize;
        if !(8..=8 + MAX_PACKET_BYTES).contains(&len) {
            return Err(invalid(format!("a packet of {len} bytes")));
        }
        let mut body = vec![0; len];
        read_whole(&mut stream, &mut body, false, shared)?;
        let bytes = body.split_off(8);
        let sequence = u64::from_le_bytes(body.try_into().expect("split at 8 bytes"));
        {
            let mut log = shared.lock();
            if log.seen.len() >= MAX_ARRIVALS {
                log.full = true;
                return Err(invalid("the observer is full"));
            }
            let at_us = shared.began.elapsed().as_micros() as u64;
            log.seen.push(Seen { at_us, sender: sender.clone(), sequence, bytes });
            shared.arrived.notify_all();
        }
        stream.write_all(&sequence.to_le_bytes())?;
    }
}

/// A sender's way to the observer. Connects when it must, and again after a failure.
#[derive(Debug)]
pub struct ObserverClient {
    address: ObserverAddress,
    label: String,
    stream: Option<Stream>,
}

impl ObserverClient {
    /// A client that will name itself `label` (which host, which incarnation; at most 256 bytes).
    pub fn new(address: ObserverAddress, label: impl Into<String>) -> Self {
        Self { address, label: label.into(), stream: None }
    }

    /// Shows a packet; it has been seen when this returns. Takes at most a few seconds.
    pub fn send(&mut self, packet: &Packet) -> io::Result<()> {
        let mut stream = match self.stream.take() {
            Some(stream) => stream,
            None => self.connect()?,
        };
        let len = u32::try_from(8 + packet.bytes.len()).map_err(invalid)?;
        let mut message = Vec::with_capacity(12 + packet.bytes.len());
        message.extend(len.to_le_bytes());
        message.extend(packet.sequence.to_le_bytes());
        message.extend(&packet.bytes);
        stream.write_all(&message)?;
        let mut acknowledged = [0; 8];
        stream.read_exact(&mut acknowledged)?;
        let acknowledged = u64::from_le_bytes(acknowledged);
        if acknowledged != packet.sequence {
            return Err(invalid(format!("packet {} was answered with {acknowledged}", packet.sequence)));
        }
        self.stream = Some(stream);
        Ok(())
    }

    fn connect(&self) -> io::Result<Stream> {
        let mut stream = Stream::connect(&self.address)?;
        stream.set_bounds(CLIENT_BOUND)?;
        let label_len = u16::try_from(self.label.len()).map_err(invalid)?;
        let mut hello = MAGIC.to_vec();
        hello.extend(VERSION.to_le_bytes());
        hello.extend(label_len.to_le_bytes());
        hello.extend(self.label.as_bytes());
        stream.write_all(&hello)?;
        Ok(stream)
    }
}

impl Emitter for ObserverClient {
    fn send(&mut self, packet: &Packet) -> io::Result<()> {
        Self::send(self, packet)
    }
}

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
#[cfg(test)]
pub(crate) mod golden;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn seen(arrivals: &[(&str, u64, u8)]) -> Vec<Seen> {
        let arrival = |(at_us, &(sender, sequence, byte)): (u64, &(&str, u64, u8))| Seen {
            at_us: at_us * 10,
            sender: sender.into(),
            sequence,
            bytes: vec![byte],
        };
        (0..).zip(arrivals).map(arrival).collect()
    }

    #[test]
    fn repeats_of_the_same_bytes_are_allowed_and_counted() {
        let verdict = judge(&seen(&[("a", 0, 1), ("a", 1, 2), ("b", 0, 1), ("b", 1, 2), ("b", 2, 3)]));
        assert!(verdict.is_good(), "{verdict}");
        assert_eq!((verdict.packets, verdict.arrivals, verdict.repeats), (3, 5, 2));
        let b = &verdict.senders[1];
        assert_eq!((b.new, b.first_new, b.last_new, b.repeats), (1, Some(2), Some(2), 2));
        assert_eq!((verdict.largest_silence_us, verdict.silence_ended_by), (30, Some(2)));
    }

    #[test]
    fn a_gap_is_found_with_its_ends() {
        let verdict = judge(&seen(&[("a", 0, 1), ("a", 3, 2)]));
        let sender: Arc<str> = "a".into();
        let expected =
            [OutputFault::OutOfOrder { sequence: 3, expected: 1, sender }, OutputFault::Gap { first: 1, last: 2 }];
        assert_eq!(verdict.faults, expected);
    }

    #[test]
    fn a_gap_that_is_filled_late_is_still_out_of_order() {
        let verdict = judge(&seen(&[("a", 0, 1), ("a", 2, 2), ("b", 1, 9)]));
        assert!(
            verdict.faults.iter().all(|fault| matches!(fault, OutputFault::OutOfOrder { .. })) && !verdict.is_good()
        );
    }

    #[test]
    fn a_repeat_with_other_bytes_is_a_contradiction() {
        let verdict = judge(&seen(&[("destination", 0, 1), ("source", 0, 2)]));
        let (first, second): (Arc<str>, Arc<str>) = ("destination".into(), "source".into());
        assert_eq!(verdict.faults, [OutputFault::Contradiction { sequence: 0, first, second }]);
    }

    proptest! {
        #[test]
        fn whatever_is_repeated_in_order_is_good_and_whatever_is_left_out_is_not(
            count in 2u64..40, catches in prop::collection::vec((0u64..40, 0u64..40), 0..6), drop in 0u64..40,
        ) {
            // The guest moves on and is caught back again and again: each owner repeats a tail of what was shown, then goes on.
            let (mut arrivals, mut shown) = (Vec::new(), 0);
            for (owner, (forward, back)) in catches.into_iter().chain([(count, 0)]).enumerate() {
                let sender: Arc<str> = owner.to_string().into();
                let (from, to) = (shown - back.min(shown), (shown + forward).min(count));
                for sequence in from..to {
                    arrivals.push(Seen { at_us: 0, sender: sender.clone(), sequence, bytes: vec![sequence as u8] });
                }
                shown = shown.max(to);
            }
            let verdict = judge(&arrivals);
            prop_assert!(verdict.is_good() && verdict.packets == count, "{}", verdict);
            let hole = drop % (count - 1);
            arrivals.retain(|arrival| arrival.sequence != hole);
            prop_assert!(!judge(&arrivals).is_good());
        }
    }

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
        for nonsense in [b"GET / HTTP/1.1\r\n\r\n".to_vec(), hello(u16::MAX), giant, short] {
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
