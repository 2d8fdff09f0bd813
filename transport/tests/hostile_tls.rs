//! Peers that lie, stall, flood, record or change what passes, where TLS is on: at the door, on the lanes, and in between.
//!
//! `tests/hostile.rs` has the same without TLS; `tests/session.rs` has wrong, expired and missing certificates.

mod common;

use belay_transport::Deadline;
use belay_transport::fabric::{FabricError, LaneId};
use belay_transport::session::{Address, LaneStream, Listener, Offer, SessionConfig, SessionError, SessionId, connect};
use common::*;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// A control connection's preamble, for TLS.
fn preamble() -> [u8; 64] {
    let mut out = [0; 64];
    out[..8].copy_from_slice(b"BELAY\0\r\n");
    (out[8], out[10], out[11]) = (1, 1, 2);
    out[12..28].copy_from_slice(&SessionId([1; 16]).0);
    out
}

/// A listener that wants certificates, and what an honest source is configured with.
fn listener(change: impl Fn(&mut SessionConfig)) -> (Listener, SessionConfig, tempfile::TempDir) {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (source, mut destination) = tls_configs(dir.path());
    change(&mut destination);
    let listener = Listener::bind(&Address::Tcp("127.0.0.1:0".to_owned()), destination).expect("bind");
    (listener, source, dir)
}

/// A connection that has sent its preamble and was told to go on.
fn begun(listener: &Listener) -> TcpStream {
    let mut stream = TcpStream::connect(listener.address().to_string()).expect("connect");
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream.write_all(&preamble()).unwrap();
    let mut answer = [0; 16];
    stream.read_exact(&mut answer).expect("an answer");
    assert_eq!(answer[10], 1, "go on");
    stream
}

fn assert_serves(listener: &Listener, source: SessionConfig) {
    std::thread::scope(|scope| {
        let source = scope.spawn(|| connect(listener.address(), source, &Offer::default(), soon()));
        listener.accept(soon()).expect("accept").accept(b"", soon()).expect("reply");
        source.join().unwrap().expect("connect");
    });
}

fn rejected(listener: &Listener, wanted: impl Fn(&SessionError) -> bool) {
    let (deadline, mut seen) = (soon(), Vec::new());
    while !deadline.expired() {
        seen.extend(listener.take_rejections().into_iter().map(|rejection| rejection.error));
        if seen.iter().any(&wanted) {
            return;
        }
        std::thread::yield_now();
    }
    panic!("not among {seen:?}");
}

#[test]
fn a_client_that_speaks_tls_1_2_alone_is_refused_with_the_alert_for_it() {
    let (listener, source, _dir) = listener(|_| {});
    // RFC 5246: a ClientHello of TLS 1.2 without the extension by which 1.3 is asked for.
    let suites = [0xc0, 0x2b, 0xc0, 0x2f];
    let signatures = [0, 8, 0, 13, 0, 4, 0, 2, 4, 3];
    let body = [&[3, 3][..], &[7; 32], &[0], &[0, suites.len() as u8], &suites, &[1, 0], &signatures].concat();
    let hello = [&[1, 0, 0, body.len() as u8][..], &body].concat();
    let record = [&[22, 3, 1, 0, hello.len() as u8][..], &hello].concat();
    let mut stream = begun(&listener);
    stream.write_all(&record).unwrap();
    let mut said = Vec::new();
    // It may be a reset after the alert.
    let _ = stream.read_to_end(&mut said);
    assert!(said.len() >= 7 && said[0] == 21, "an alert: {said:?}");
    assert_eq!(said[5..7], [2, 70], "fatal, protocol_version");
    rejected(&listener, |error| matches!(error, SessionError::Tls { .. }));
    assert_serves(&listener, source);
}

#[test]
fn a_source_is_not_talked_out_of_tls_by_whoever_stands_between() {
    let dir = tempfile::tempdir().unwrap();
    let (source, _) = tls_configs(dir.path());
    // Whoever answers speaks plaintext from the answer on: what the source sends next is a ClientHello and no hello.
    let between = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = Address::Tcp(between.local_addr().unwrap().to_string());
    std::thread::scope(|scope| {
        let heard = scope.spawn(|| {
            let (mut stream, _) = between.accept().unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            let mut bytes = [0; 64];
            stream.read_exact(&mut bytes).unwrap();
            assert_eq!(bytes[11], 2, "TLS is what it asks for");
            let mut answer = [0; 16];
            answer[..8].copy_from_slice(&bytes[..8]);
            (answer[8], answer[10]) = (1, 1);
            // A hello's reply in clear at once behind the answer.
            stream.write_all(&[&answer[..], &[14, 0, 0, 0], b"BLYr\x01\0\x01\0\x01\x03no!"].concat()).unwrap();
            let mut sent = Vec::new();
            let _ = stream.read_to_end(&mut sent);
            sent
        });
        let error = connect(&address, source, &Offer::default(), soon()).unwrap_err();
        assert!(matches!(error, SessionError::Tls { .. }), "{error}");
        let sent = heard.join().unwrap();
        assert_eq!(sent[..2], [22, 3], "a handshake record");
        assert!(!sent.windows(4).any(|four| four == b"BLYh"), "no hello left in clear");
    });
}

#[test]
fn a_thousand_connections_that_stop_in_their_handshake_do_not_keep_a_source_out() {
    let mut limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    limit.current = limit.maximum;
    rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).expect("up to the hard limit");
    let (listener, source, _dir) = listener(|_| {});
    // Those beyond the limit push out the oldest ones, so what each was told cannot be waited for.
    let stalled: Vec<_> = (0..1000)
        .map(|_| {
            let mut stream = TcpStream::connect(listener.address().to_string()).expect("connect");
            let _ = stream.write_all(&[&preamble()[..], &[22, 3, 1, 0, 200, 1]].concat());
            stream
        })
        .collect();
    let begun = Instant::now();
    assert_serves(&listener, source);
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    drop(stalled);
}

#[test]
fn a_tls_handshake_that_drips_is_cut_off_at_its_bound() {
    let bound = Duration::from_millis(400);
    let (listener, source, _dir) = listener(|config| config.handshake_bound = bound);
    let since = Instant::now();
    let mut stream = begun(&listener);
    stream.set_read_timeout(Some(Duration::from_millis(30))).unwrap();
    // A record of 200 bytes, one every 30 ms: six seconds, if nobody minded.
    let mut at = 0;
    loop {
        let byte = [22, 3, 1, 0, 200].get(at).copied().unwrap_or(1);
        if stream.write_all(&[byte]).is_err() {
            break;
        }
        match stream.read(&mut [0; 64]) {
            Ok(0) => break,
            Ok(_) => panic!("an answer to a part of a record"),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => break,
            Err(_) => assert!(at < 190, "never cut off"),
        }
        at += 1;
    }
    assert!(since.elapsed() >= bound, "{:?}", since.elapsed());
    rejected(&listener, |error| matches!(error, SessionError::TimedOut { .. }));
    assert_serves(&listener, source);
}

// On the lanes. The hand-made side speaks through a lane's own TLS, so that what it says arrives.

struct Spoken {
    socket: TcpStream,
    tls: Box<rustls::Connection>,
}

impl Spoken {
    fn new(lane: LaneStream) -> Self {
        let (fd, tls) = lane.into_parts();
        let socket = TcpStream::from(fd);
        socket.set_nonblocking(false).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        Self { socket, tls: tls.expect("a session with TLS") }
    }

    fn say(&mut self, bytes: &[u8]) {
        self.tls.writer().write_all(bytes).unwrap();
        while self.tls.wants_write() {
            if self.tls.write_tls(&mut self.socket).is_err() {
                return;
            }
        }
    }

    /// Everything up to the end.
    fn hear_all(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            match self.tls.read_tls(&mut self.socket) {
                Ok(1..) if self.tls.process_new_packets().is_ok() => {}
                _ => return all,
            }
            let _ = self.tls.reader().read_to_end(&mut all);
        }
    }
}

fn request(operation: u8, len: u32, key: u64, offset: u64, sequence: u64) -> Vec<u8> {
    [&[operation, 0, 0, 0][..], &len.to_le_bytes(), &key.to_le_bytes(), &offset.to_le_bytes(), &sequence.to_le_bytes()]
        .concat()
}

fn response(status: u8, len: u32, sequence: u64) -> Vec<u8> {
    [&[status, 0, 0, 0][..], &len.to_le_bytes(), &sequence.to_le_bytes()].concat()
}

#[test]
fn an_owner_behind_tls_refuses_whatever_an_initiator_should_not_ask() {
    let mut world = world(Over::Tls);
    let (ram, ring, region) = (world.ram.0, world.ring_keys.ring.0, world.ring_keys.owner_region.0);
    let cases = [
        // (what is asked, the refusal's status)
        (request(1, 4096, 0, 0, 0), Some(2)),
        (request(1, 4096, ram ^ 0x100, 0, 0), Some(2)),
        (request(2, 8, ram, 0, 0), Some(3)),
        (request(2, 8, region, 0, 0), Some(3)),
        (request(1, 8, ring, 0, 0), Some(3)),
        (request(1, 4096, ram, HOLE.offset, 0), Some(4)),
        (request(1, 8192, ram, HOLE.offset - 4096, 0), Some(4)),
        (request(1, 4096, ram, u64::MAX - 4095, 0), Some(4)),
        (request(2, 4096, ring, RING_BYTES as u64 - 4095, 0), Some(4)),
        (request(1, u32::MAX, ram, 0, 0), Some(5)),
        (request(2, 0, ring, 0, 0), Some(5)),
        (request(7, 4096, ram, 0, 0), None),
        (request(1, 4096, ram, 0, 9), None),
    ];
    for (index, (bytes, status)) in (0..).zip(cases) {
        let id = LaneId { index, ..BULK };
        world.owner.serve_lane(id, soon()).unwrap();
        let mut lane = Spoken::new(world.session.destination.lanes.take(id, soon()).unwrap());
        lane.say(&bytes);
        let got = lane.hear_all();
        let wanted = status.map_or_else(Vec::new, |status| response(status, 0, 0));
        assert_eq!(got, wanted, "case {index}");
    }
    assert_eq!(bytes(&world.ring, 0, RING_BYTES), vec![0; RING_BYTES]);
    assert_eq!(bytes(&world.owner_region, 0, 4096), vec![0; 4096]);
}

#[test]
fn an_initiator_behind_tls_believes_no_response_that_it_did_not_ask_for() {
    let cases = [
        (response(9, 0, 0), true),
        (response(1, 4096, 1), true),
        (response(1, u32::MAX, 0), true),
        (response(2, 5, 0), true),
        (vec![1], false),
    ];
    let mut world = world(Over::Tls);
    for (index, (said, asked)) in (0..).zip(cases) {
        let id = LaneId { index, ..FAULT };
        let mut owner = Spoken::new(world.session.source.lanes.dial_lane(id, soon()).unwrap());
        let mut lane = world.initiator.open_lane(id, 4, soon()).unwrap();
        if asked {
            lane.post_reads(&[world.read(1, 8192, 4096)]).unwrap();
        }
        owner.say(&said);
        let error = lane.wait(soon()).unwrap_err();
        assert!(matches!(error, FabricError::Protocol { .. }), "case {index}: {error:?}");
        assert!(matches!(lane.wait(soon()), Err(FabricError::Broken { .. })));
    }
    assert_eq!(bytes(&world.local, 0, 20_480), vec![0; 20_480]);
}

#[test]
fn revocation_does_not_wait_for_an_initiator_that_stops_reading_behind_tls() {
    let mut world = world(Over::Tls);
    world.owner.serve_lane(BULK, soon()).unwrap();
    let mut deaf = Spoken::new(world.session.destination.lanes.take(BULK, soon()).unwrap());
    let much: Vec<u8> = (0..50).flat_map(|sequence| request(1, 1 << 20, world.ram.0, 0, sequence)).collect();
    deaf.say(&much);
    // Until data has come, and with it the time at which the owner's thread is stuck in a send.
    deaf.socket.peek(&mut [0]).unwrap();
    let begun = Instant::now();
    revoke(&mut *world.owner);
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
}

// Somebody on the wire.

/// Stands between two hosts: passes everything on, keeps what the dialling side said, and may change a byte on the way back.
struct Between {
    address: SocketAddr,
    /// What each connection's dialling side said, in the order of the connections.
    kept: Arc<Mutex<Vec<Vec<u8>>>>,
    /// Everything that passed, in either direction.
    passed: Arc<Mutex<Vec<u8>>>,
    /// Flip a bit of this byte of whatever the listening side says next.
    flip: Arc<Mutex<Option<usize>>>,
}

impl Between {
    fn new(to: String) -> Self {
        let listening = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listening.local_addr().unwrap();
        let kept: Arc<Mutex<Vec<Vec<u8>>>> = Arc::default();
        let flip: Arc<Mutex<Option<usize>>> = Arc::default();
        let passed: Arc<Mutex<Vec<u8>>> = Arc::default();
        let (keep, flipping, all) = (Arc::clone(&kept), Arc::clone(&flip), Arc::clone(&passed));
        // Its threads end with the connections, and the acceptor with the test's process: it waits for nobody.
        std::thread::spawn(move || {
            for stream in listening.incoming() {
                let (Ok(near), Ok(far)) = (stream, TcpStream::connect(&to)) else { return };
                let index = {
                    let mut kept = keep.lock().unwrap();
                    kept.push(Vec::new());
                    kept.len() - 1
                };
                let (keep, flipping) = (Arc::clone(&keep), Arc::clone(&flipping));
                let (said, answered) = (Arc::clone(&all), Arc::clone(&all));
                let (near_too, far_too) = (near.try_clone().unwrap(), far.try_clone().unwrap());
                std::thread::spawn(move || {
                    pass(near, far, |bytes| {
                        keep.lock().unwrap()[index].extend_from_slice(bytes);
                        said.lock().unwrap().extend_from_slice(bytes);
                    })
                });
                std::thread::spawn(move || {
                    pass(far_too, near_too, |bytes| {
                        if let Some(at) = flipping.lock().unwrap().take() {
                            bytes[at] ^= 0x10;
                        }
                        answered.lock().unwrap().extend_from_slice(bytes);
                    })
                });
            }
        });
        Self { address, kept, passed, flip }
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, mut look: impl FnMut(&mut [u8])) {
    let mut chunk = [0; 16 << 10];
    while let Ok(got @ 1..) = from.read(&mut chunk) {
        look(&mut chunk[..got]);
        if to.write_all(&chunk[..got]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
    let _ = from.shutdown(Shutdown::Read);
}

/// A session whose source dials through `Between`.
fn meet_between() -> (Between, Session) {
    let (listener, source, dir) = listener(|_| {});
    let between = Between::new(listener.address().to_string());
    let through = Address::Tcp(between.address.to_string());
    let (source, destination) = std::thread::scope(|scope| {
        let dialled = scope.spawn(|| connect(&through, source, &Offer::default(), soon()));
        let accepted = listener.accept(soon()).expect("accept").accept(b"", soon()).expect("reply");
        (dialled.join().unwrap().expect("connect"), accepted)
    });
    (between, Session { source, destination, dir, listener })
}

#[test]
fn what_was_recorded_on_the_wire_opens_nothing_when_it_is_sent_again() {
    let (between, session) = meet_between();
    let mut world = world_in(session);
    let mut lane = world.lane(CHECKPOINT, 4);
    world.local.write(0, &[0xee; 64]);
    lane.post_writes(&[world.write(1, 0, 0, 64)]).unwrap();
    complete(lane.as_mut(), 1);
    revoke(&mut *world.owner);
    let ring = bytes(&world.ring, 0, RING_BYTES);
    let recorded = between.kept.lock().unwrap().clone();
    assert!(recorded.len() == 2 && recorded.iter().all(|said| said.len() > 500), "control, lane");
    for (what, said) in recorded.iter().enumerate() {
        let mut again = TcpStream::connect(world.session.listener.address().to_string()).unwrap();
        again.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let _ = again.write_all(said);
        let _ = again.shutdown(Shutdown::Write);
        let _ = again.read_to_end(&mut Vec::new());
        rejected(&world.session.listener, |error| {
            matches!(
                error,
                SessionError::Tls { .. } | SessionError::PeerClosed { .. } | SessionError::NoSuchSession { .. }
            )
        });
        assert!(world.session.listener.accept(Deadline::after(Duration::from_millis(1))).is_err(), "connection {what}");
    }
    assert_eq!(bytes(&world.ring, 0, RING_BYTES), ring, "nothing is placed after a revocation");
    // What was written passed here, and not in clear.
    let passed = between.passed.lock().unwrap();
    assert!(passed.len() > recorded.concat().len() && !passed.windows(8).any(|some| some == [0xee; 8]));
}

#[test]
fn what_is_changed_on_the_wire_ends_the_lane_and_brings_no_page() {
    let (between, session) = meet_between();
    let mut world = world_in(session);
    let mut lane = world.lane(FAULT, 4);
    lane.post_reads(&[world.read(1, 0, 4096)]).unwrap();
    complete(lane.as_mut(), 1);
    world.assert_local(0, 4096);
    // The next thing the destination says is a request: five bytes of a record's head, then what is sealed.
    *between.flip.lock().unwrap() = Some(9);
    lane.post_reads(&[world.read(2, 8192, 4096)]).unwrap();
    let error = lane.wait(soon()).unwrap_err();
    assert!(matches!(error, FabricError::PeerClosed { .. } | FabricError::Io { .. }), "{error:?}");
    assert_eq!(bytes(&world.local, 8192, 4096), vec![0; 4096]);
    let (deadline, mut told) = (soon(), Vec::new());
    while told.is_empty() && !deadline.expired() {
        told.extend(world.owner.take_failures());
    }
    assert!(matches!(told[..], [FabricError::Io { .. }]), "the operator hears that it did not decrypt: {told:?}");
}
