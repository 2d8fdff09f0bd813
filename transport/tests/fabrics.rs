//! Which fabric two sides agree on, who says why it is not `verbs`, and the key that binds RDMA connections to a session.
//!
//! No RDMA device is needed: a session only agrees; the fabric's own tests use it.

mod common;

use belay_transport::fabric::FabricKind;
use belay_transport::fabric::verbs::VerbsSettings;
use belay_transport::session::{
    Address, Listener, NoVerbs, Offer, Security, SessionConfig, SessionError, WithoutVerbs, connect,
};
use common::*;
use std::net::Ipv4Addr;

fn plain() -> SessionConfig {
    SessionConfig::new(Security::LoopbackOnly)
}

/// A side that has a device and whose operator trusts the network.
fn offers_verbs(config: SessionConfig) -> SessionConfig {
    SessionConfig { verbs: Some(VerbsSettings { trusted: true, ..VerbsSettings::default() }), ..config }
}

fn only(fabric: FabricKind, config: SessionConfig) -> SessionConfig {
    SessionConfig { only: Some(fabric), ..config }
}

fn no_device() -> SessionConfig {
    SessionConfig { no_verbs: Some(NoVerbs::NoDevice), ..plain() }
}

/// What source and destination agree on: the fabric, and what each gives as the reason that it is not verbs.
fn agree(
    source: SessionConfig,
    destination: SessionConfig,
) -> (FabricKind, Option<WithoutVerbs>, Option<WithoutVerbs>) {
    let listener = Listener::bind(&Address::Tcp("127.0.0.1:0".to_owned()), destination).expect("bind");
    std::thread::scope(|scope| {
        let source = scope.spawn(|| connect(listener.address(), source, &Offer::default(), soon()));
        let incoming = listener.accept(soon()).expect("accept");
        assert_eq!(incoming.hello().without_verbs.is_none(), incoming.hello().fabric == FabricKind::Verbs);
        let destination = incoming.accept(b"", soon()).expect("reply");
        let source = source.join().expect("no panic").expect("connect");
        assert_eq!(source.agreed.fabric, destination.agreed.fabric);
        (source.agreed.fabric, source.agreed.without_verbs, destination.agreed.without_verbs)
    })
}

/// The errors of both sides where there is nothing to agree on.
fn disagree(source: SessionConfig, destination: SessionConfig) -> (SessionError, SessionError) {
    let listener = Listener::bind(&Address::Tcp("127.0.0.1:0".to_owned()), destination).expect("bind");
    let at_source = connect(listener.address(), source, &Offer::default(), soon()).expect_err("nothing in common");
    let deadline = soon();
    loop {
        if let Some(rejection) = listener.take_rejections().pop() {
            return (at_source, rejection.error);
        }
        assert!(!deadline.expired(), "the destination does not tell");
        std::thread::yield_now();
    }
}

#[test]
fn verbs_is_taken_where_both_have_a_device_and_trust_the_network() {
    assert_eq!(agree(offers_verbs(plain()), offers_verbs(plain())), (FabricKind::Verbs, None, None));
    let dir = tempfile::tempdir().unwrap();
    let (source, destination) = tls_configs(dir.path());
    let both = agree(offers_verbs(source), only(FabricKind::Verbs, offers_verbs(destination)));
    assert_eq!(both, (FabricKind::Verbs, None, None));
}

#[test]
fn without_a_device_or_without_trust_it_is_tcp_and_both_operators_learn_whose_doing_that_is() {
    use WithoutVerbs::{Ours, Theirs};
    let untrusting = || SessionConfig { verbs: Some(VerbsSettings::default()), ..plain() };
    let why = NoVerbs::NoDevice;
    let tcp = |source, destination| {
        let (fabric, at_source, at_destination) = agree(source, destination);
        assert_eq!(fabric, FabricKind::Tcp);
        (at_source.expect("told at the source"), at_destination.expect("told at the destination"))
    };
    assert_eq!(tcp(no_device(), offers_verbs(plain())), (Ours(why.clone()), Theirs(why.clone())));
    assert_eq!(tcp(offers_verbs(plain()), no_device()), (Theirs(why.clone()), Ours(why.clone())));
    assert_eq!(tcp(offers_verbs(plain()), untrusting()), (Theirs(NoVerbs::NotTrusted), Ours(NoVerbs::NotTrusted)));
    // Where both lack something, each is told what it can change itself.
    assert_eq!(tcp(untrusting(), no_device()), (Ours(NoVerbs::NotTrusted), Ours(why)));
}

#[test]
fn a_side_that_insists_and_a_side_that_cannot_are_both_told_the_reason() {
    let (at_source, at_destination) = disagree(only(FabricKind::Verbs, offers_verbs(plain())), no_device());
    for error in [&at_source, &at_destination] {
        assert!(matches!(error, SessionError::NoCommonFabric { .. }), "{error}");
    }
    assert_eq!(
        at_source.to_string(),
        "no common fabric: this host would use verbs, the peer tcp; \
         the peer has no RDMA device"
    );
    assert_eq!(
        at_destination.to_string(),
        "no common fabric: this host would use tcp, the peer verbs; \
         this host has no RDMA device"
    );
    let (at_source, at_destination) =
        disagree(only(FabricKind::Tcp, plain()), only(FabricKind::Verbs, offers_verbs(plain())));
    assert!(at_source.to_string().contains("this host was told to use another fabric"), "{at_source}");
    assert!(at_destination.to_string().contains("the peer was told to use another fabric"), "{at_destination}");
}

#[test]
fn verbs_without_trust_or_over_a_unix_socket_is_refused_before_anything_is_bound_or_dialled() {
    let untrusted = || only(FabricKind::Verbs, SessionConfig { verbs: Some(VerbsSettings::default()), ..plain() });
    let tcp = Address::Tcp("127.0.0.1:0".to_owned());
    let bound = Listener::bind(&tcp, untrusted()).err().expect("refused");
    // Nobody listens on port 1: the refusal comes first.
    let dialled = connect(&Address::Tcp("127.0.0.1:1".to_owned()), untrusted(), &Offer::default(), soon());
    for error in [bound, dialled.expect_err("refused")] {
        assert!(matches!(error, SessionError::NoVerbs { why: NoVerbs::NotTrusted }), "{error}");
        assert!(error.to_string().contains("--trusted-fabric") && error.to_string().contains("in clear"), "{error}");
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("belay.sock");
    let error = Listener::bind(&Address::Unix(path.clone()), only(FabricKind::Verbs, offers_verbs(plain())));
    assert!(matches!(error, Err(SessionError::FabricOverAddress { fabric: FabricKind::Verbs, .. })));
    assert!(!path.exists());
}

fn keys(session: &Session) -> [Option<[u8; 32]>; 2] {
    let (source, destination) = (session.source.lanes.binding(), session.destination.lanes.binding());
    [source, destination].map(|key| key.map(|key| *key.bytes()))
}

#[test]
fn both_ends_of_a_session_derive_the_same_key_and_no_two_sessions_the_same_one() {
    let mut seen = Vec::new();
    for over in [Over::Local, Over::Tcp, Over::Tls] {
        for _ in 0..2 {
            let [source, destination] = keys(&meet(over));
            let key = source.expect("a session that TLS or this host protects has a key");
            assert_eq!(Some(key), destination, "{over:?}");
            assert!(!seen.contains(&key), "{over:?}: a key was used before");
            assert_ne!(key, [0; 32], "{over:?}");
            seen.push(key);
        }
    }
}

#[test]
fn the_key_is_not_shown() {
    let session = meet(Over::Tls);
    let key = session.source.lanes.binding().expect("a key");
    let shown = format!("{:?} {:?}", key, session.source);
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let list = |bytes: &[u8]| bytes.iter().map(u8::to_string).collect::<Vec<_>>().join(", ");
    for form in [hex(&key.bytes()[..4]), list(&key.bytes()[..4])] {
        assert!(!shown.contains(&form), "{shown}");
    }
    assert!(shown.contains("BindingKey(..)"), "{shown}");
}

/// An address of documentation (RFC 5737), given to the loopback interface of a network namespace of this thread's own: to a
/// session it is a host elsewhere. `false` where this process may not make one.
fn elsewhere(address: Ipv4Addr) -> bool {
    // SAFETY: takes no pointer; only this thread moves, and it ends with its test.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        return false;
    }
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").expect("a socket");
    let give = |request: libc::Ioctl, fill: &dyn Fn(&mut libc::ifreq)| {
        // SAFETY: an all-zero ifreq is a valid one; it is plain data.
        let mut interface: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in interface.ifr_name.iter_mut().zip(b"lo") {
            *to = *from as libc::c_char;
        }
        fill(&mut interface);
        // SAFETY: both requests take a pointer to an ifreq, which lives through the call.
        let done = unsafe { libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&socket), request, &raw mut interface) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    };
    give(libc::SIOCSIFADDR, &|interface| {
        let ip = libc::in_addr { s_addr: u32::from(address).to_be() };
        let inet = libc::sockaddr_in { sin_family: libc::AF_INET as u16, sin_port: 0, sin_addr: ip, sin_zero: [0; 8] };
        // SAFETY: a sockaddr_in is as long as a sockaddr and is what SIOCSIFADDR reads there.
        interface.ifr_ifru.ifru_addr = unsafe { std::mem::transmute::<libc::sockaddr_in, libc::sockaddr>(inet) };
    });
    give(libc::SIOCSIFFLAGS, &|interface| interface.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short);
    true
}

#[test]
fn plaintext_that_leaves_the_host_has_no_key_and_no_verbs_whatever_either_side_offers() {
    let own = std::thread::spawn(|| {
        let address = Ipv4Addr::new(192, 0, 2, 7);
        if !elsewhere(address) {
            eprintln!("skipped: it needs root to make a network namespace");
            return;
        }
        let insecure = || offers_verbs(SessionConfig::new(Security::Insecure));
        let everywhere = Address::Tcp("0.0.0.0:0".to_owned());
        let listener = Listener::bind(&everywhere, insecure()).expect("bind");
        let port = listener.address().to_string().rsplit(':').next().expect("a port").to_owned();
        let there = Address::Tcp(format!("{address}:{port}"));
        let (source, destination) = std::thread::scope(|scope| {
            let source = scope.spawn(|| connect(&there, insecure(), &Offer::default(), soon()));
            let destination = listener.accept(soon()).expect("accept").accept(b"", soon()).expect("reply");
            (source.join().expect("no panic").expect("connect"), destination)
        });
        assert!(source.lanes.binding().is_none() && destination.lanes.binding().is_none());
        for agreed in [&source.agreed, &destination.agreed] {
            assert_eq!(agreed.fabric, FabricKind::Tcp);
            assert_eq!(agreed.without_verbs, Some(WithoutVerbs::Ours(NoVerbs::NoKey)));
        }
        // Where verbs alone was asked for it is refused outright, by either side for itself.
        let insist = || only(FabricKind::Verbs, insecure());
        for error in [
            Listener::bind(&everywhere, insist()).err().expect("refused"),
            connect(&there, insist(), &Offer::default(), soon()).expect_err("refused"),
        ] {
            assert!(matches!(error, SessionError::NoVerbs { why: NoVerbs::NoKey }), "{error}");
        }
        // With certificates the same two addresses have a key.
        let dir = tempfile::tempdir().unwrap();
        let (source, destination) = tls_configs(dir.path());
        let listener = Listener::bind(&everywhere, offers_verbs(destination)).expect("bind");
        let port = listener.address().to_string().rsplit(':').next().expect("a port").to_owned();
        let there = Address::Tcp(format!("{address}:{port}"));
        std::thread::scope(|scope| {
            let source = scope.spawn(|| connect(&there, offers_verbs(source), &Offer::default(), soon()));
            let destination = listener.accept(soon()).expect("accept").accept(b"", soon()).expect("reply");
            let source = source.join().expect("no panic").expect("connect");
            assert_eq!(source.agreed.fabric, FabricKind::Verbs);
            let keys = [source.lanes.binding(), destination.lanes.binding()].map(|key| key.map(|key| *key.bytes()));
            assert!(keys[0].is_some() && keys[0] == keys[1]);
        });
    });
    own.join().expect("the test's own thread");
}
