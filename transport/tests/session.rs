//! Sessions: who may make one, what both sides learn, and how frames travel.

mod common;

use belay_transport::fabric::FabricKind;
use belay_transport::session::{
    Address, Control, Credentials, Listener, Offer, RegionGeometry, Security, SessionConfig, SessionError,
    VersionRange, connect, keygen, keygen_valid,
};
use belay_transport::{Deadline, PageSize, RegionId};
use common::*;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

fn loopback() -> Address {
    Address::Tcp("127.0.0.1:0".to_owned())
}

fn plain() -> SessionConfig {
    SessionConfig::new(Security::LoopbackOnly)
}

/// Dials once and gives the listener's verdict and the dialler's.
fn dial_once(listener: &Listener, config: SessionConfig) -> Result<(), SessionError> {
    connect(listener.address(), config, &Offer::default(), soon()).map(|_| ())
}

/// Waits until the listener has turned somebody away.
fn rejection(listener: &Listener) -> SessionError {
    let deadline = soon();
    loop {
        if let Some(rejection) = listener.take_rejections().pop() {
            return rejection.error;
        }
        assert!(!deadline.expired(), "nothing was rejected");
        std::thread::yield_now();
    }
}

#[test]
fn both_sides_learn_of_each_other_before_the_session_begins() {
    for over in [Over::Local, Over::Tcp, Over::Tls] {
        let dir = tempfile::tempdir().unwrap();
        let (address, (source, destination)) = match over {
            Over::Local => (Address::Unix(dir.path().join("s")), (plain(), plain())),
            Over::Tcp => (loopback(), (plain(), plain())),
            Over::Tls | Over::Verbs | Over::VerbsTls => (loopback(), tls_configs(dir.path())),
        };
        let listener = Listener::bind(&address, destination).unwrap();
        let geometry = vec![
            RegionGeometry { id: RegionId(0), bytes: 1 << 30, page_size: PageSize::Small },
            RegionGeometry { id: RegionId(7), bytes: 4 << 21, page_size: PageSize::Huge },
        ];
        let offer = Offer { geometry: geometry.clone(), blob: vec![9; 64 << 10] };
        std::thread::scope(|scope| {
            let source = scope.spawn(|| connect(listener.address(), source, &offer, soon()).unwrap());
            let incoming = listener.accept(soon()).unwrap();
            assert_eq!(incoming.hello().geometry, geometry);
            assert_eq!(incoming.hello().blob, vec![9; 64 << 10]);
            let destination = incoming.accept(b"come in", soon()).unwrap();
            let source = source.join().unwrap();
            assert_eq!(source.blob, b"come in");
            assert_eq!(source.agreed.session, destination.agreed.session);
            assert_eq!(source.agreed.fabric, if over == Over::Local { FabricKind::Local } else { FabricKind::Tcp });
            assert_eq!((source.agreed.protocol, destination.agreed.protocol), (1, 1));
            assert_eq!(source.agreed.peer_belay_version, env!("CARGO_PKG_VERSION"));
        });
    }
}

#[test]
fn a_refusal_reaches_the_source_with_its_reason() {
    let listener = Listener::bind(&loopback(), plain()).unwrap();
    let error = std::thread::scope(|scope| {
        let source = scope.spawn(|| dial_once(&listener, plain()).unwrap_err());
        listener.accept(soon()).unwrap().refuse("the guest has 3 regions, this host was given 2", soon()).unwrap();
        source.join().unwrap()
    });
    assert!(matches!(&error, SessionError::Refused { reason } if reason.contains("3 regions")), "{error}");
}

#[test]
fn an_incoming_session_that_is_dropped_is_a_failure_at_the_source() {
    let listener = Listener::bind(&loopback(), plain()).unwrap();
    let error = std::thread::scope(|scope| {
        let source = scope.spawn(|| dial_once(&listener, plain()).unwrap_err());
        drop(listener.accept(soon()).unwrap());
        source.join().unwrap()
    });
    assert!(matches!(error, SessionError::PeerClosed { .. }), "{error}");
}

#[test]
fn versions_that_do_not_meet_are_refused_on_both_sides_with_both_ranges() {
    let listener = Listener::bind(&loopback(), plain()).unwrap();
    let newer = SessionConfig { versions: VersionRange { min: 8, max: 9 }, ..plain() };
    let at_source = dial_once(&listener, newer).unwrap_err().to_string();
    let at_destination = rejection(&listener).to_string();
    for text in [at_source, at_destination] {
        assert!(text.contains("8 to 9") && text.contains("1 to 1"), "{text}");
    }
}

#[test]
fn the_highest_common_version_is_agreed_on() {
    let session = meet_with(Over::Tcp, |config| config.versions = VersionRange { min: 1, max: 1 });
    assert_eq!((session.source.agreed.protocol, session.destination.agreed.protocol), (1, 1));
    let listener = Listener::bind(&loopback(), SessionConfig { versions: VersionRange { min: 2, max: 5 }, ..plain() });
    let (listener, older) = (listener.unwrap(), SessionConfig { versions: VersionRange { min: 1, max: 3 }, ..plain() });
    std::thread::scope(|scope| {
        let source = scope.spawn(|| connect(listener.address(), older, &Offer::default(), soon()).unwrap());
        let destination = listener.accept(soon()).unwrap().accept(b"", soon()).unwrap();
        assert_eq!((destination.agreed.protocol, source.join().unwrap().agreed.protocol), (3, 3));
    });
}

#[test]
fn plaintext_beyond_loopback_needs_to_be_asked_for() {
    let everywhere = Address::Tcp("0.0.0.0:0".to_owned());
    let error = Listener::bind(&everywhere, plain()).err().expect("refused");
    assert!(matches!(error, SessionError::NotLoopback { .. }), "{error}");
    assert!(error.to_string().contains("--insecure"));
    Listener::bind(&everywhere, SessionConfig::new(Security::Insecure)).expect("asked for");
    // 192.0.2.0/24 is for documentation; nothing is sent there, the address alone is refused.
    let error = connect(&Address::Tcp("192.0.2.1:7".to_owned()), plain(), &Offer::default(), soon()).unwrap_err();
    assert!(matches!(error, SessionError::NotLoopback { .. }), "{error}");
}

#[test]
fn one_side_with_tls_and_one_without_is_said_plainly() {
    let dir = tempfile::tempdir().unwrap();
    let (source, destination) = tls_configs(dir.path());
    let secured = Listener::bind(&loopback(), destination).unwrap();
    let bare = Listener::bind(&loopback(), plain()).unwrap();
    for error in [dial_once(&secured, plain()).unwrap_err(), dial_once(&bare, source).unwrap_err()] {
        assert!(matches!(error, SessionError::SecurityMismatch { .. }), "{error}");
    }
}

fn credentials(own: (&Path, &str), peer: &Path) -> SessionConfig {
    let (dir, name) = own;
    let (cert, key) = (dir.join(format!("{name}.crt")), dir.join(format!("{name}.key")));
    SessionConfig::new(Security::Tls(Credentials::load(&cert, &key, peer).expect("loads")))
}

#[test]
fn only_the_pinned_certificates_are_accepted_in_both_directions() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    for name in ["source", "destination", "stranger"] {
        keygen(dir, name).unwrap();
    }
    let crt = |name: &str| dir.join(format!("{name}.crt"));
    let listener = Listener::bind(&loopback(), credentials((dir, "destination"), &crt("source"))).unwrap();
    // A stranger that knows the destination's certificate.
    let error = dial_once(&listener, credentials((dir, "stranger"), &crt("destination"))).unwrap_err();
    assert!(matches!(error, SessionError::Tls { .. } | SessionError::PeerClosed { .. }), "{error:?}");
    assert!(matches!(rejection(&listener), SessionError::Tls { .. }));
    // The right source, told of another destination's certificate.
    let error = dial_once(&listener, credentials((dir, "source"), &crt("stranger"))).unwrap_err();
    assert!(matches!(error, SessionError::Tls { .. }), "{error:?}");
    // The source hangs up; whether its alert is read before that is a race.
    assert!(matches!(rejection(&listener), SessionError::Tls { .. } | SessionError::PeerClosed { .. }));
    // The right ones still come through.
    std::thread::scope(|scope| {
        let source = scope.spawn(|| dial_once(&listener, credentials((dir, "source"), &crt("destination"))));
        listener.accept(soon()).unwrap().accept(b"", soon()).unwrap();
        source.join().unwrap().unwrap();
    });
}

#[test]
fn a_certificate_is_not_accepted_outside_its_validity_period_in_either_direction() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let day = Duration::from_secs(86_400);
    // `date -u -d @…` has the dates.
    let [past, future] = [1_582_977_600, 4_107_542_400].map(|at| SystemTime::UNIX_EPOCH + Duration::from_secs(at));
    keygen(dir, "valid").unwrap();
    keygen_valid(dir, "expired", past - day, past).unwrap();
    keygen_valid(dir, "early", future, future + day).unwrap();
    let crt = |name: &str| dir.join(format!("{name}.crt"));
    let dates =
        [("expired", "expired on 2020-02-29 12:00:00 UTC"), ("early", "not valid before 2100-03-01 00:00:00 UTC")];
    for (name, date) in dates {
        for [source, destination] in [[name, "valid"], ["valid", name]] {
            let listener = Listener::bind(&loopback(), credentials((dir, destination), &crt(source))).unwrap();
            let dialled = dial_once(&listener, credentials((dir, source), &crt(destination))).unwrap_err();
            let rejected = rejection(&listener);
            for (at, error) in [("the source", &dialled), ("the destination", &rejected)] {
                let (said, of) = (error.to_string(), format!("{name}.crt"));
                // The one whose certificate it is may be gone before it has heard why.
                let unheard = matches!(error, SessionError::PeerClosed { .. });
                let is_own = (at == "the source") == (source == name);
                assert!(said.contains(&of) || is_own && unheard, "{at}, {source} to {destination}: {said}");
                assert!(is_own || said.contains(date), "{at}: {said}");
            }
            assert!(listener.accept(Deadline::after(Duration::from_millis(1))).is_err(), "nobody came in");
        }
    }
}

#[test]
fn keygen_keeps_the_key_private_and_replaces_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let pair = keygen(dir.path(), "source").unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&pair.key), 0o600);
    let key = std::fs::read(&pair.key).unwrap();
    let error = keygen(dir.path(), "source").unwrap_err();
    assert!(error.to_string().contains("source.key"), "{error}");
    assert_eq!(std::fs::read(&pair.key).unwrap(), key);
    // A key of another pair is noticed when it is loaded, not when somebody dials.
    let other = keygen(dir.path(), "other").unwrap();
    assert!(Credentials::load(&pair.cert, &other.key, &other.cert).is_err());
    assert!(Credentials::load(&pair.cert, &pair.cert, &other.cert).is_err());
    assert!(Credentials::load(&dir.path().join("absent"), &pair.key, &other.cert).is_err());
}

fn exchange(a: &Control, b: &Control, bytes: usize) {
    let frame = |seed: usize| -> Vec<u8> { (0..bytes).map(|at| expected(at + seed)).collect() };
    std::thread::scope(|scope| {
        let sends = [scope.spawn(|| a.send(&frame(1), soon())), scope.spawn(|| b.send(&frame(2), soon()))];
        let at_b = scope.spawn(|| b.recv(soon()));
        assert!(a.recv(soon()).unwrap() == frame(2));
        assert!(at_b.join().unwrap().unwrap() == frame(1));
        sends.into_iter().for_each(|send| send.join().unwrap().unwrap());
    });
}

#[test]
fn frames_of_every_size_travel_both_ways_at_once() {
    for over in [Over::Local, Over::Tcp, Over::Tls] {
        let session = meet(over);
        let (a, b) = (&session.source.control, &session.destination.control);
        for bytes in [0, 1, 65_535, 65_536, 65_537, 12_000_000] {
            exchange(a, b, bytes);
        }
        std::thread::scope(|scope| {
            scope.spawn(|| (0..1000_u32).for_each(|number| a.send(&number.to_le_bytes(), soon()).unwrap()));
            for number in 0..1000_u32 {
                assert_eq!(b.recv(soon()).unwrap(), number.to_le_bytes());
            }
        });
    }
}

#[test]
fn a_frame_beyond_the_limit_is_neither_sent_nor_received() {
    let session = meet_with(Over::Tcp, |config| config.max_frame_bytes = 1000);
    let (a, b) = (&session.source.control, &session.destination.control);
    let error = a.send(&[0; 1001], soon()).unwrap_err();
    assert!(matches!(error, SessionError::FrameTooLarge { bytes: 1001, limit: 1000 }), "{error}");
    a.send(&[1; 1000], soon()).expect("the caller's mistake broke nothing");
    assert_eq!(b.recv(soon()).unwrap(), [1; 1000]);
    // A peer that lies about a length.
    rustix::net::send(a.as_fd(), &u32::MAX.to_le_bytes(), rustix::net::SendFlags::empty()).unwrap();
    let error = b.recv(soon()).unwrap_err();
    assert!(matches!(error, SessionError::FrameTooLarge { limit: 1000, .. }), "{error}");
    // Whoever comes after the failure hears what it was.
    let after = b.recv(soon()).unwrap_err();
    assert_eq!(after.to_string(), format!("the control stream has ended before: {error}"));
}

#[test]
fn a_receive_that_runs_out_of_time_loses_nothing() {
    let session = meet(Over::Tcp);
    let (a, b) = (&session.source.control, &session.destination.control);
    let whole: Vec<u8> = [&10_u32.to_le_bytes()[..], b"0123456789"].concat();
    for piece in [&whole[..2], &whole[2..4], &whole[4..9]] {
        rustix::net::send(a.as_fd(), piece, rustix::net::SendFlags::empty()).unwrap();
        let error = b.recv(Deadline::after(Duration::from_millis(10))).unwrap_err();
        assert!(matches!(error, SessionError::TimedOut { .. }), "{error}");
    }
    rustix::net::send(a.as_fd(), &whole[9..], rustix::net::SendFlags::empty()).unwrap();
    assert_eq!(b.recv(soon()).unwrap(), b"0123456789");
}

#[test]
fn a_send_that_nobody_takes_ends_at_its_deadline_and_breaks_the_stream() {
    for over in [Over::Local, Over::Tcp, Over::Tls] {
        let session = meet(over);
        let control = &session.source.control;
        let error = control.send(&vec![0; 60 << 20], Deadline::after(Duration::from_millis(100))).unwrap_err();
        assert!(matches!(error, SessionError::TimedOut { .. }), "{over:?}: {error}");
        let after = control.send(b"more", soon()).unwrap_err();
        assert_eq!(after.to_string(), format!("the control stream has ended before: {error}"));
    }
}

#[test]
fn p6_a_closed_control_stream_is_a_failure_wherever_it_comes() {
    for over in [Over::Local, Over::Tcp, Over::Tls] {
        let session = meet(over);
        drop(session.source);
        let error = session.destination.control.recv(soon()).unwrap_err();
        assert!(matches!(error, SessionError::PeerClosed { .. }), "{over:?}: {error}");
        let after = session.destination.control.recv(soon()).unwrap_err();
        assert_eq!(after.to_string(), format!("the control stream has ended before: {error}"));

        let session = meet(over);
        let waiting = Arc::clone(&session.destination.control);
        let waiter = std::thread::spawn(move || waiting.recv(soon()).unwrap_err());
        session.source.control.shutdown();
        assert!(matches!(waiter.join().unwrap(), SessionError::PeerClosed { .. }), "{over:?}");
    }
}

#[test]
fn shutting_down_wakes_our_own_receiver() {
    for over in [Over::Local, Over::Tcp, Over::Tls] {
        let session = meet(over);
        let control = &session.destination.control;
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| control.recv(soon()).unwrap_err());
            control.shutdown();
            let error = waiter.join().unwrap();
            assert!(
                matches!(error, SessionError::PeerClosed { .. } | SessionError::Broken { .. }),
                "{over:?}: {error}"
            );
        });
        let after = control.send(b"more", soon()).unwrap_err();
        assert_eq!(after.to_string(), "the control stream has ended before: this side has closed it");
    }
}

#[test]
fn the_guard_connection_is_bare_and_carries_bytes_both_ways() {
    for over in [Over::Local, Over::Tcp, Over::Tls] {
        let session = meet(over);
        let at_source = session.source.lanes.dial_guard(soon()).unwrap();
        let at_destination = session.destination.lanes.take_guard(soon()).unwrap();
        rustix::io::write(&at_destination, b"the sign").unwrap();
        let mut got = [0; 8];
        assert_eq!(
            rustix::io::read(&at_source, &mut got[..]).unwrap(),
            8,
            "{over:?}: it blocks until there is something"
        );
        assert_eq!(&got, b"the sign");
        assert!(session.source.lanes.dial_guard(soon()).is_err(), "{over:?}: a second one");
        drop(at_destination);
        assert_eq!(rustix::io::read(&at_source, &mut got[..]).unwrap(), 0);
    }
}

#[test]
fn a_lane_comes_once() {
    let session = meet(Over::Tcp);
    let lanes = &session.source.lanes;
    let _first = lanes.dial_lane(FAULT, soon()).unwrap();
    assert!(matches!(lanes.dial_lane(FAULT, soon()), Err(SessionError::LaneRefused { .. })));
    let _taken = session.destination.lanes.take(FAULT, soon()).unwrap();
    assert!(matches!(lanes.dial_lane(FAULT, soon()), Err(SessionError::LaneRefused { .. })));
    let error = session.destination.lanes.take(BULK, Deadline::after(Duration::from_millis(5)));
    assert!(matches!(error, Err(SessionError::TimedOut { .. })));
}

#[test]
fn a_unix_socket_is_private_and_only_a_dead_ones_path_is_taken_over() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("belay.sock");
    let address = Address::Unix(path.clone());
    let first = Listener::bind(&address, plain()).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(matches!(Listener::bind(&address, plain()), Err(SessionError::Io { .. })), "somebody listens there");
    drop(first);
    assert!(!path.exists(), "the path goes with its listener");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "a dead process leaves its path behind");
    drop(Listener::bind(&address, plain()).unwrap());
    std::fs::write(&path, b"precious").unwrap();
    assert!(Listener::bind(&address, plain()).is_err());
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
}

#[test]
fn another_users_process_is_refused_even_when_it_may_open_the_socket() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: needs root to become another user");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("belay.sock");
    let listener = Listener::bind(&Address::Unix(path.clone()), plain()).unwrap();
    let wide = |path: &Path, mode| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    wide(dir.path(), 0o755);
    wide(&path, 0o666);
    let address = listener.address().clone();
    let error = std::thread::spawn(move || {
        // SAFETY: the bare system call changes this thread's ids only, and the thread ends after this test.
        let changed = unsafe { libc::syscall(libc::SYS_setresuid, 65_534, 65_534, 65_534) };
        assert_eq!(changed, 0);
        connect(&address, plain(), &Offer::default(), soon()).unwrap_err()
    });
    let error = error.join().unwrap();
    assert!(matches!(error, SessionError::PeerClosed { .. }), "{error}");
    assert!(matches!(rejection(&listener), SessionError::ForeignUid { peer: 65_534, .. }));
}

#[test]
fn a_silent_tcp_peer_is_given_up_after_the_stated_time() {
    use rustix::net::sockopt;
    let session = meet_with(Over::Tcp, |config| config.peer_silence = Duration::from_secs(3));
    for fd in [session.source.control.as_fd(), session.destination.control.as_fd()] {
        assert_eq!(sockopt::tcp_user_timeout(fd).unwrap(), 3000);
        assert!(sockopt::socket_keepalive(fd).unwrap() && sockopt::tcp_nodelay(fd).unwrap());
        let worst = sockopt::tcp_keepidle(fd).unwrap()
            + sockopt::tcp_keepintvl(fd).unwrap() * sockopt::tcp_keepcnt(fd).unwrap();
        assert_eq!(worst, Duration::from_secs(3));
    }
}

#[test]
fn pacing_holds_a_connection_to_its_rate() {
    const RATE: u64 = 50_000_000;
    let session = meet_with(Over::Tcp, |config| config.pace_bytes_per_s = Some(RATE));
    let bytes = 10_000_000;
    let begun = std::time::Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| session.source.control.send(&vec![0; bytes], soon()).unwrap());
        session.destination.control.recv(soon()).unwrap();
    });
    let rate = bytes as f64 / begun.elapsed().as_secs_f64();
    assert!(rate < RATE as f64 * 1.2, "{rate} bytes/s");
}

#[test]
fn an_ended_listener_frees_its_address() {
    let listener = Listener::bind(&loopback(), plain()).unwrap();
    let address = listener.address().clone();
    drop(listener);
    Listener::bind(&address, plain()).expect("the address is free again");
    let error = connect(&address, plain(), &Offer::default(), soon()).unwrap_err();
    assert!(matches!(error, SessionError::Io { .. }), "{error}");
}
