//! Peers that lie, stall or flood: at the listener's door, and on the lanes of a session.
//!
//! The bytes are made here by hand, from the documented layouts, so that these tests also pin the formats.

mod common;

use belay_transport::Deadline;
use belay_transport::fabric::{self, FabricError};
use belay_transport::session::{Address, Listener, Offer, Security, SessionConfig, SessionError, SessionId, connect};
use common::*;
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const CONTROL: u8 = 1;
const LANE: u8 = 2;
const GUARD: u8 = 3;
const PLAIN: u8 = 1;
const TLS: u8 = 2;
const UNIX: u8 = 3;

macro_rules! at_every_door {
    ($($name:ident)*) => {
        mod tcp { $(#[test] fn $name() { super::$name(super::Door::TCP) })* }
        mod unix { $(#[test] fn $name() { super::$name(super::Door::UNIX) })* }
    };
}

at_every_door! {
    bytes_that_are_not_ours_are_closed_without_a_word
    another_preamble_version_is_answered_as_such
    another_protection_is_answered_as_such
    a_connection_for_a_session_that_does_not_exist_is_refused
    a_lane_with_a_wrong_token_and_a_guard_with_a_wrong_proof_do_not_enter
    an_oversized_hello_is_not_even_read
    a_preamble_that_drips_is_cut_off_and_keeps_nobody_waiting
    a_thousand_idle_connections_do_not_keep_a_source_out
    a_crowd_that_never_stops_dialling_does_not_keep_a_source_out
    sources_beyond_those_that_wait_are_told_that_it_is_busy
}

/// A kind of listener, and what is said at it.
#[derive(Clone, Copy)]
struct Door {
    over: Over,
    protection: u8,
}

impl Door {
    const TCP: Self = Self { over: Over::Tcp, protection: PLAIN };
    const UNIX: Self = Self { over: Over::Local, protection: UNIX };

    /// A listener of this kind that lasts as long as its directory.
    fn listen(self, config: SessionConfig) -> (Listener, tempfile::TempDir) {
        let dir = tempfile::tempdir().expect("temporary directory");
        let address = match self.over {
            Over::Local => Address::Unix(dir.path().join("belay.sock")),
            _ => Address::Tcp("127.0.0.1:0".to_owned()),
        };
        (Listener::bind(&address, config).expect("bind"), dir)
    }

    fn preamble(self, kind: u8, session: SessionId) -> [u8; 64] {
        preamble(kind, self.protection, session)
    }
}

fn plain() -> SessionConfig {
    SessionConfig::new(Security::LoopbackOnly)
}

/// A connection of our own. What is done with it (read, write, a bound on reading) is the same call on either kind of socket.
fn raw(listener: &Listener) -> TcpStream {
    let stream = match listener.address() {
        Address::Tcp(address) => TcpStream::connect(address).expect("connect"),
        Address::Unix(path) => OwnedFd::from(UnixStream::connect(path).expect("connect")).into(),
    };
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream
}

fn preamble(kind: u8, protection: u8, session: SessionId) -> [u8; 64] {
    let mut out = [0; 64];
    out[..8].copy_from_slice(b"BELAY\0\r\n");
    (out[8], out[10], out[11]) = (1, kind, protection);
    out[12..28].copy_from_slice(&session.0);
    if kind == LANE {
        out[28] = 1;
    }
    out
}

/// The answer's code, or `None` if the connection was closed without one.
fn answer(stream: &mut TcpStream) -> Option<u8> {
    let mut bytes = [0; 16];
    stream.read_exact(&mut bytes).ok()?;
    assert_eq!(&bytes[..8], b"BELAY\0\r\n");
    Some(bytes[10])
}

fn assert_closed(stream: &mut TcpStream) {
    let mut rest = Vec::new();
    match stream.read_to_end(&mut rest) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}"),
    }
}

/// An honest source still gets its session.
fn assert_serves(listener: &Listener) {
    std::thread::scope(|scope| {
        let source = scope.spawn(|| connect(listener.address(), plain(), &Offer::default(), soon()));
        listener.accept(soon()).expect("accept").accept(b"", soon()).expect("reply");
        source.join().unwrap().expect("connect");
    });
}

fn rejected(listener: &Listener, wanted: impl Fn(&SessionError) -> bool) {
    let deadline = soon();
    let mut seen = Vec::new();
    while !deadline.expired() {
        seen.extend(listener.take_rejections().into_iter().map(|rejection| rejection.error));
        if seen.iter().any(&wanted) {
            return;
        }
        std::thread::yield_now();
    }
    panic!("not among {seen:?}");
}

fn bytes_that_are_not_ours_are_closed_without_a_word(door: Door) {
    let (listener, _dir) = door.listen(plain());
    let mut stream = raw(&listener);
    stream.write_all(&[b"GET / HTTP/1.1\r\nHost: example\r\n\r\n", &[b' '; 64][..]].concat()).unwrap();
    assert_eq!(answer(&mut stream), None);
    rejected(&listener, |error| matches!(error, SessionError::Protocol { .. }));
    for (at, value) in [(10, 0), (10, 9), (11, 0), (29, 1), (63, 1)] {
        let mut bytes = door.preamble(CONTROL, SessionId([1; 16]));
        bytes[at] = value;
        let mut stream = raw(&listener);
        stream.write_all(&bytes).unwrap();
        assert_eq!(answer(&mut stream), None, "byte {at} = {value}");
    }
    assert_serves(&listener);
}

fn another_preamble_version_is_answered_as_such(door: Door) {
    let (listener, _dir) = door.listen(plain());
    let mut bytes = door.preamble(CONTROL, SessionId([1; 16]));
    bytes[8] = 2;
    let mut stream = raw(&listener);
    stream.write_all(&bytes).unwrap();
    assert_eq!(answer(&mut stream), Some(2));
    rejected(&listener, |error| matches!(error, SessionError::PreambleVersion { ours: 1, theirs: 2 }));
}

fn another_protection_is_answered_as_such(door: Door) {
    let (listener, _dir) = door.listen(plain());
    for protection in [PLAIN, TLS, UNIX].into_iter().filter(|&protection| protection != door.protection) {
        let mut stream = raw(&listener);
        stream.write_all(&preamble(CONTROL, protection, SessionId([1; 16]))).unwrap();
        assert_eq!(answer(&mut stream), Some(3), "protection {protection}");
        assert_closed(&mut stream);
        rejected(&listener, |error| matches!(error, SessionError::SecurityMismatch { .. }));
    }
    assert_serves(&listener);
}

fn a_connection_for_a_session_that_does_not_exist_is_refused(door: Door) {
    let (listener, _dir) = door.listen(plain());
    for kind in [LANE, GUARD] {
        let mut stream = raw(&listener);
        stream.write_all(&door.preamble(kind, SessionId([7; 16]))).unwrap();
        assert_eq!(answer(&mut stream), Some(4));
        assert_closed(&mut stream);
    }
}

fn a_lane_with_a_wrong_token_and_a_guard_with_a_wrong_proof_do_not_enter(door: Door) {
    let session = meet(door.over);
    let id = session.source.agreed.session;
    let mut stream = raw(&session.listener);
    stream.write_all(&door.preamble(LANE, id)).unwrap();
    assert_eq!(answer(&mut stream), Some(1));
    stream.write_all(&[0x55; 32]).unwrap();
    let mut verdict = [0];
    stream.read_exact(&mut verdict).unwrap();
    assert_eq!(verdict, [2]);
    assert_closed(&mut stream);
    let mut stream = raw(&session.listener);
    stream.write_all(&door.preamble(GUARD, id)).unwrap();
    assert_eq!(answer(&mut stream), Some(5));
    let shortly = || Deadline::after(Duration::from_millis(5));
    assert!(session.destination.lanes.take(FAULT, shortly()).is_err());
    assert!(session.destination.lanes.take_guard(shortly()).is_err());
    // Nor did it take the right ones' places.
    session.source.lanes.dial_lane(FAULT, soon()).unwrap();
    session.source.lanes.dial_guard(soon()).unwrap();
}

#[test]
fn a_client_without_a_certificate_is_refused() {
    #[derive(Debug)]
    struct Anything(rustls::crypto::CryptoProvider);
    impl rustls::client::danger::ServerCertVerifier for Anything {
        fn verify_server_cert(
            &self,
            _: &rustls::pki_types::CertificateDer<'_>,
            _: &[rustls::pki_types::CertificateDer<'_>],
            _: &rustls::pki_types::ServerName<'_>,
            _: &[u8],
            _: rustls::pki_types::UnixTime,
        ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
            Ok(rustls::client::danger::ServerCertVerified::assertion())
        }
        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &rustls::pki_types::CertificateDer<'_>,
            _: &rustls::DigitallySignedStruct,
        ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
            Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
        }
        fn verify_tls13_signature(
            &self,
            _: &[u8],
            _: &rustls::pki_types::CertificateDer<'_>,
            _: &rustls::DigitallySignedStruct,
        ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
            Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
        }
        fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
            self.0.signature_verification_algorithms.supported_schemes()
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let (_, destination) = tls_configs(dir.path());
    let (listener, _dir) = Door::TCP.listen(destination);
    let provider = rustls::crypto::ring::default_provider();
    let config = rustls::ClientConfig::builder_with_provider(std::sync::Arc::new(provider.clone()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(std::sync::Arc::new(Anything(provider)))
        .with_no_client_auth();
    let mut tls = rustls::ClientConnection::new(std::sync::Arc::new(config), "belay".try_into().unwrap()).unwrap();
    let mut stream = raw(&listener);
    stream.write_all(&preamble(CONTROL, TLS, SessionId([1; 16]))).unwrap();
    assert_eq!(answer(&mut stream), Some(1));
    let mut secured = rustls::Stream::new(&mut tls, &mut stream);
    // The client may think that it is through; the next thing it hears is the refusal.
    let _ = secured.write_all(&[4, 0, 0, 0, 1, 2, 3, 4]);
    assert!(secured.read_exact(&mut [0]).is_err());
    rejected(&listener, |error| matches!(error, SessionError::Tls { .. }));
    assert!(listener.accept(Deadline::after(Duration::from_millis(1))).is_err());
}

fn an_oversized_hello_is_not_even_read(door: Door) {
    let (listener, _dir) = door.listen(plain());
    let mut stream = raw(&listener);
    stream.write_all(&door.preamble(CONTROL, SessionId([1; 16]))).unwrap();
    assert_eq!(answer(&mut stream), Some(1));
    stream.write_all(&u32::MAX.to_le_bytes()).unwrap();
    assert_closed(&mut stream);
    rejected(&listener, |error| matches!(error, SessionError::FrameTooLarge { .. }));
}

fn a_preamble_that_drips_is_cut_off_and_keeps_nobody_waiting(door: Door) {
    let bound = Duration::from_millis(300);
    let (listener, _dir) = door.listen(SessionConfig { handshake_bound: bound, ..plain() });
    let mut dripping = raw(&listener);
    let begun = Instant::now();
    let bytes = door.preamble(CONTROL, SessionId([1; 16]));
    dripping.write_all(&bytes[..1]).unwrap();
    assert_serves(&listener);
    assert!(begun.elapsed() < bound, "the honest source waited for the dripping one");
    // A byte every 20 ms would take more than a second; what is waited for is the cut.
    dripping.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    let mut at = 1;
    loop {
        match dripping.read(&mut [0]) {
            Ok(0) => break,
            Ok(_) => panic!("an answer to half a preamble"),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => break,
            Err(_) => assert!(at < 60, "never cut off"),
        }
        if dripping.write_all(&bytes[at..=at]).is_err() {
            break;
        }
        at += 1;
    }
    assert!(begun.elapsed() >= bound);
    rejected(&listener, |error| matches!(error, SessionError::TimedOut { .. }));
}

fn a_thousand_idle_connections_do_not_keep_a_source_out(door: Door) {
    let mut limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    limit.current = limit.maximum;
    rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).expect("up to the hard limit");
    let (listener, _dir) = door.listen(plain());
    let idle: Vec<_> = (0..1000).map(|_| raw(&listener)).collect();
    let begun = Instant::now();
    assert_serves(&listener);
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    drop(idle);
}

fn a_crowd_that_never_stops_dialling_does_not_keep_a_source_out(door: Door) {
    const STRANGERS: u64 = 4;
    let (listener, _dir) = door.listen(plain());
    let (over, dialled) = (AtomicBool::new(false), AtomicU64::new(0));
    // What every second of them says: a control connection's beginning, and nothing after it.
    let words = door.preamble(CONTROL, SessionId([1; 16]));
    std::thread::scope(|scope| {
        for stranger in 0..STRANGERS {
            let (listener, over, dialled) = (&listener, &over, &dialled);
            scope.spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    let mut stream = raw(listener);
                    if stranger % 2 == 0 {
                        let _ = stream.write_all(&words);
                    }
                    dialled.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let ends = End(&over);
        let deadline = soon();
        while dialled.load(Ordering::Relaxed) < 2000 {
            assert!(!deadline.expired(), "the crowd does not come");
            std::thread::yield_now();
        }
        let mut slowest = Duration::ZERO;
        for _ in 0..5 {
            let begun = Instant::now();
            assert_serves(&listener);
            slowest = slowest.max(begun.elapsed());
        }
        eprintln!("the slowest source was served in {slowest:?}, among {} strangers", dialled.load(Ordering::Relaxed));
        // Over tcp a full backlog may cost a SYN, which the kernel sends again after a second.
        assert!(slowest < Duration::from_secs(5), "{slowest:?}");
        drop(ends);
    });
}

/// Ends a crowd, whether its test has passed or not.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn sources_beyond_those_that_wait_are_told_that_it_is_busy(door: Door) {
    let (listener, _dir) = door.listen(plain());
    std::thread::scope(|scope| {
        let sources: Vec<_> =
            (0..5).map(|_| scope.spawn(|| connect(listener.address(), plain(), &Offer::default(), soon()))).collect();
        // Four wait, the fifth is turned away.
        rejected(&listener, |error| matches!(error, SessionError::Busy));
        for _ in 0..4 {
            listener.accept(soon()).unwrap().accept(b"", soon()).unwrap();
        }
        let refused: Vec<_> = sources.into_iter().filter_map(|source| source.join().unwrap().err()).collect();
        assert!(matches!(&refused[..], [SessionError::Refused { reason }] if reason.contains("busy")), "{refused:?}");
    });
}

// On the lanes. The hand-made side uses a lane's bare socket.

fn bare(fd: OwnedFd) -> TcpStream {
    let stream = TcpStream::from(fd);
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream
}

fn request(operation: u8, len: u32, key: u64, offset: u64, sequence: u64) -> Vec<u8> {
    [&[operation, 0, 0, 0][..], &len.to_le_bytes(), &key.to_le_bytes(), &offset.to_le_bytes(), &sequence.to_le_bytes()]
        .concat()
}

fn response(status: u8, len: u32, sequence: u64) -> Vec<u8> {
    [&[status, 0, 0, 0][..], &len.to_le_bytes(), &sequence.to_le_bytes()].concat()
}

#[test]
fn a_tcp_owner_refuses_whatever_an_initiator_should_not_ask() {
    const UNKNOWN_KEY: u8 = 2;
    const OUT_OF_RANGE: u8 = 4;
    const BAD_LENGTH: u8 = 5;
    let mut world = world(Over::Tcp);
    let (ram, ring) = (world.ram.0, world.ring_keys.ring.0);
    let cases = [
        (request(1, 4096, 0, 0, 0), Some(UNKNOWN_KEY)),
        (request(1, 0, ram, 0, 0), Some(BAD_LENGTH)),
        (request(1, u32::MAX, ram, 0, 0), Some(BAD_LENGTH)),
        (request(2, u32::MAX, ring, 0, 0), Some(BAD_LENGTH)),
        (request(1, 4096, ram, u64::MAX, 0), Some(OUT_OF_RANGE)),
        (request(1, 4096, ram, u64::MAX - 4095, 0), Some(OUT_OF_RANGE)),
        (request(2, 4096, ring, RING_BYTES as u64 - 4095, 0), Some(OUT_OF_RANGE)),
        // No request at all, or one out of its turn: the lane just ends.
        (request(0, 4096, ram, 0, 0), None),
        (request(3, 4096, ram, 0, 0), None),
        (request(1, 4096, ram, 0, 1), None),
    ];
    for (index, (bytes, status)) in (0..).zip(cases) {
        let id = fabric::LaneId { index, ..BULK };
        world.owner.serve_lane(id, soon()).unwrap();
        let mut stream = bare(world.session.destination.lanes.take(id, soon()).unwrap().into_parts().0);
        stream.write_all(&bytes).unwrap();
        let mut got = Vec::new();
        // It ends by itself: after a refusal nothing else is served.
        let _ = stream.read_to_end(&mut got);
        match status {
            Some(status) => assert_eq!(got, response(status, 0, 0), "case {index}"),
            None => assert!(got.is_empty(), "case {index}: {got:?}"),
        }
    }
    assert_eq!(bytes(&world.ring, 0, RING_BYTES), vec![0; RING_BYTES]);
    // The operator is told of each.
    let mut failures = Vec::new();
    let deadline = soon();
    while failures.len() < 10 && !deadline.expired() {
        failures.extend(world.owner.take_failures());
    }
    let refused = failures.iter().filter(|failure| matches!(failure, FabricError::Refused { .. })).count();
    let wrong = failures.iter().filter(|failure| matches!(failure, FabricError::Protocol { .. })).count();
    assert_eq!((refused, wrong), (7, 3), "{failures:?}");
}

#[test]
fn a_tcp_write_is_placed_before_it_is_acknowledged_however_it_is_cut() {
    let mut world = world(Over::Tcp);
    world.owner.serve_lane(BULK, soon()).unwrap();
    let mut stream = bare(world.session.destination.lanes.take(BULK, soon()).unwrap().into_parts().0);
    stream.set_nodelay(true).unwrap();
    let ring = world.ring_keys.ring.0;
    let data: Vec<u8> = (0..5000).map(expected).collect();
    let whole = [request(2, 5000, ring, 300, 0), data.clone(), request(2, 1, ring, 0, 1), vec![9]].concat();
    for piece in whole.chunks(97) {
        stream.write_all(piece).unwrap();
        std::thread::yield_now();
    }
    let mut acknowledged = [0; 32];
    stream.read_exact(&mut acknowledged).unwrap();
    assert_eq!(acknowledged[..], [response(1, 0, 0), response(1, 0, 1)].concat());
    assert_eq!(bytes(&world.ring, 300, 5000), data);
    assert_eq!(bytes(&world.ring, 0, 1), [9]);
}

#[test]
fn revocation_does_not_wait_for_an_initiator_that_stalls() {
    let mut world = world(Over::Tcp);
    // One stops in the middle of a write, one asks for much and never reads, one is silent.
    for id in [FAULT, BULK, CHECKPOINT] {
        world.owner.serve_lane(id, soon()).unwrap();
    }
    let take = |id| bare(world.session.destination.lanes.take(id, soon()).unwrap().into_parts().0);
    let (mut half, mut deaf, _silent) = (take(FAULT), take(BULK), take(CHECKPOINT));
    half.write_all(&[request(2, 5000, world.ring_keys.ring.0, 0, 0), vec![1; 100]].concat()).unwrap();
    for sequence in 0..200 {
        deaf.write_all(&request(1, 1 << 20, world.ram.0, 0, sequence)).unwrap();
    }
    // Until its thread is stuck in a send: some data has come and no more fits.
    deaf.read_exact(&mut [0; 16]).unwrap();
    let begun = Instant::now();
    let revoked = revoke(&mut *world.owner);
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    half.write_all(&[1; 4900]).ok();
    half.shutdown(Shutdown::Write).ok();
    assert_eq!(bytes(&world.ring, 0, RING_BYTES), revoked.bytes);
}

#[test]
fn a_tcp_initiator_believes_no_response_that_it_did_not_ask_for() {
    let cases = [
        // (what the owner sends, whether before anything was asked)
        (response(9, 0, 0), false),
        (response(0, 0, 0), false),
        (response(1, 4096, 1), false),
        (response(1, 4095, 0), false),
        (response(1, u32::MAX, 0), false),
        (response(2, 5, 0), false),
        (vec![1], true),
    ];
    let mut world = world(Over::Tcp);
    for (index, (sent, unasked)) in (0..).zip(cases) {
        let id = fabric::LaneId { index, ..FAULT };
        let mut owner = bare(world.session.source.lanes.dial_lane(id, soon()).unwrap().into_parts().0);
        let mut lane = world.initiator.open_lane(id, 4, soon()).unwrap();
        if !unasked {
            lane.post_reads(&[world.read(1, 8192, 4096)]).unwrap();
        }
        owner.write_all(&sent).unwrap();
        let error = lane.wait(soon()).unwrap_err();
        assert!(matches!(error, FabricError::Protocol { .. }), "case {index}: {error:?}");
        assert!(matches!(lane.wait(soon()), Err(FabricError::Broken { .. })));
    }
    // Whatever came, only the place that was asked for can have changed.
    assert_eq!(bytes(&world.local, 0, 8192), [0; 8192]);
    assert_eq!(bytes(&world.local, 12_288, 8192), [0; 8192]);
}

#[test]
fn a_response_cut_into_single_bytes_is_put_together() {
    let mut world = world(Over::Tcp);
    let mut owner = bare(world.session.source.lanes.dial_lane(FAULT, soon()).unwrap().into_parts().0);
    owner.set_nodelay(true).unwrap();
    let mut lane = world.initiator.open_lane(FAULT, 4, soon()).unwrap();
    lane.post_reads(&[world.read(1, 0, 10), world.read(2, 10, 20), world.read(3, 30, 5)]).unwrap();
    let data: Vec<u8> = (0..35).map(expected).collect();
    let all = [
        response(1, 10, 0),
        data[..10].to_vec(),
        response(1, 20, 1),
        data[10..30].to_vec(),
        response(1, 5, 2),
        data[30..].to_vec(),
    ];
    let mut ids = Vec::new();
    for byte in all.concat() {
        owner.write_all(&[byte]).unwrap();
        // Wait for that very byte, so that it is received alone.
        let mut done = [0; 4];
        let readable = {
            let mut fds =
                [rustix::event::PollFd::from_borrowed_fd(lane.readiness().unwrap(), rustix::event::PollFlags::IN)];
            rustix::event::poll(&mut fds, Some(&rustix::event::Timespec { tv_sec: 20, tv_nsec: 0 })).unwrap()
        };
        assert_eq!(readable, 1);
        let got = lane.poll(&mut done).unwrap();
        ids.extend_from_slice(&done[..got]);
    }
    assert_eq!(ids, [1, 2, 3]);
    world.assert_local(0, 35);
}

#[test]
fn a_commit_that_is_not_acknowledged_in_time_breaks_the_lane() {
    let mut world = world(Over::Tcp);
    let mut owner = bare(world.session.source.lanes.dial_lane(CHECKPOINT, soon()).unwrap().into_parts().0);
    let mut lane = world.initiator.open_lane(CHECKPOINT, 4, soon()).unwrap();
    lane.post_writes(&[world.write(1, 0, 0, 100)]).unwrap();
    // The write is acknowledged, the trailer is not.
    owner.write_all(&response(1, 0, 0)).unwrap();
    let error = lane.commit(&world.write(2, 0, 0, 8), Deadline::after(Duration::from_millis(20))).unwrap_err();
    assert!(matches!(error, FabricError::TimedOut { .. }), "{error:?}");
    // An acknowledgement that comes too late changes nothing.
    let _ = owner.write_all(&response(1, 0, 1));
    assert!(matches!(lane.poll(&mut [0]), Err(FabricError::Broken { .. })));
    assert!(matches!(lane.commit(&world.write(3, 0, 0, 8), soon()), Err(FabricError::Broken { .. })));
}

/// What a `local` owner sends first, with descriptors of `sizes` bytes each.
fn send_exports(lane: &impl AsFd, message: &[u8], sizes: &[u64]) {
    let files: Vec<OwnedFd> = sizes
        .iter()
        .map(|size| {
            let fd = rustix::fs::memfd_create("hostile", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
            rustix::fs::ftruncate(&fd, *size).unwrap();
            fd
        })
        .collect();
    let descriptors: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
    assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(&descriptors)));
    rustix::net::sendmsg(lane, &[IoSlice::new(message)], &mut control, rustix::net::SendFlags::NOSIGNAL).unwrap();
}

fn exports(count: u64, region: u64, entries: &[(u64, u64, u64)]) -> Vec<u8> {
    let head = [u64::from_le_bytes(*b"BLYlocal"), count, 0, region];
    let words = head.into_iter().chain(entries.iter().flat_map(|(key, len, right)| [*key, *len, *right]));
    words.flat_map(u64::to_le_bytes).collect()
}

#[test]
fn a_local_initiator_maps_nothing_that_is_not_as_it_was_said_to_be() {
    let cases: [(Vec<u8>, &[u64]); 8] = [
        (b"what is this".to_vec(), &[4096]),
        (exports(1, 0, &[(1, 4096, 0)])[..40].to_vec(), &[4096]),
        (exports(2, 0, &[(1, 4096, 0), (2, 4096, 0)]), &[4096]),
        (exports(u64::MAX, 0, &[(1, 4096, 0)]), &[4096]),
        // A file shorter than it is said to be would be SIGBUS later.
        (exports(1, 0, &[(1, 8192, 0)]), &[4096]),
        (exports(1, 0, &[(1, u64::MAX, 0)]), &[4096]),
        (exports(1, 0, &[(1, 4096, 7)]), &[4096]),
        // An owner region that is not among them.
        (exports(1, 99, &[(1, 4096, 0)]), &[4096]),
    ];
    for (case, (message, sizes)) in cases.iter().enumerate() {
        let session = meet(Over::Local);
        let mut initiator = fabric::initiator(&session.destination).expect("a data path");
        let lane = session.source.lanes.dial_lane(FAULT, soon()).unwrap();
        send_exports(&lane, message, sizes);
        let error = initiator.open_lane(FAULT, 4, soon()).err().unwrap_or_else(|| panic!("case {case} was believed"));
        assert!(matches!(error, FabricError::Protocol { .. }), "case {case}: {error:?}");
    }
}
