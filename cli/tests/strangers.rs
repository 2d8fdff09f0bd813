//! Strangers who dial a destination, over tcp and at its Unix socket: one that waits for a guest, and one that is fenced: its source is gone,
//! its guest stands still, and it listens for whoever comes back. Only the source of this very guest is heard, and strangers do not keep it out.

mod running;

use belay_transport::session::keygen_valid;
use running::{BELAY, Place, Process, has_kvm};
use serde_json::Value;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

/// Connections that a destination keeps at most while they are not through.
const IN_THEIR_HANDSHAKE: usize = 64;

/// Where a destination listens.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Door {
    /// On loopback, with certificates where a test makes them.
    Tcp,
    Unix,
}

impl Door {
    /// What `--listen` is told.
    fn listen(self, place: &Place, name: &str) -> String {
        match self {
            Self::Tcp => "127.0.0.1:0".to_owned(),
            Self::Unix => format!("unix:{}", place.text(&format!("{name}.sock"))),
        }
    }
}

/// A stranger's connection. What is done with it (read, write) is the same call on either kind of socket.
fn dial(to: &str) -> TcpStream {
    match to.strip_prefix("unix:") {
        Some(path) => OwnedFd::from(UnixStream::connect(path).expect("it listens")).into(),
        None => TcpStream::connect(to).expect("it listens"),
    }
}

/// Names that certificates are made for: two hosts of this migration's, and somebody who has one of his own.
fn make_certificates(place: &Place) {
    for [source, destination] in [["source", "destination"], ["stranger", "nobody"]] {
        let directory = place.text("keys");
        let arguments = ["keygen", "--out", &directory, "--source", source, "--destination", destination];
        let made = Command::new(BELAY).args(arguments).output().expect("belay runs");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    }
}

/// Options of somebody who shows `own` certificate and expects to see `peer`'s.
fn tls(place: &Place, own: &str, peer: &str) -> Vec<String> {
    let file = |name: &str, kind: &str| format!("{}/{name}.{kind}", place.text("keys"));
    let [cert, key, peer] = [file(own, "crt"), file(own, "key"), file(peer, "crt")];
    ["--cert".to_owned(), cert, "--key".to_owned(), key, "--peer-cert".to_owned(), peer].to_vec()
}

/// Processes whose certificates lie in one place.
struct Hosts {
    door: Door,
    place: Place,
    /// On tmpfs; gone with the test.
    memory: tempfile::TempDir,
}

impl Hosts {
    fn new(door: Door) -> Self {
        let place = Place::new();
        make_certificates(&place);
        Self { door, place, memory: tempfile::tempdir_in("/dev/shm").expect("/dev/shm is tmpfs") }
    }

    /// Somebody who shows `own` certificate and expects `peer`'s, where there are certificates.
    fn belay(&self, arguments: &[&str], own: &str, peer: &str) -> Process {
        let certificates = if self.door == Door::Tcp { tls(&self.place, own, peer) } else { Vec::new() };
        let certificates = certificates.iter().map(String::as_str);
        self.place.belay(&arguments.iter().copied().chain(certificates).collect::<Vec<_>>())
    }

    /// A destination with the right certificate, and where it listens.
    fn receive(&self, state: &str) -> (Process, String) {
        let listen = self.door.listen(&self.place, state);
        let state = self.place.text(state);
        let first = ["receive", "--json", "--listen", &listen, "--drive", "kvm", "--state-dir", &state];
        let mut destination = self.belay(&[&first[..], &["--hold-pull-at", "30"]].concat(), "destination", "source");
        let to = destination.wait_for_event("listening")["address"].as_str().unwrap().to_owned();
        (destination, to)
    }

    /// A source that shows `own` certificate.
    fn send(&self, to: &str, state: &str, own: &str) -> Process {
        let (state, memory) = (self.place.text(state), self.memory.path().to_str().unwrap().to_owned());
        let first = ["send", "--json", "--to", to, "--state-dir", &state, "--memory-dir", &memory];
        // A lease that outlasts whatever a busy host does.
        let guest = ["--memory", "32M", "--drive", "kvm", "--run-before", "20ms", "--ring", "4M", "--lease", "20s"];
        self.belay(&[&first[..], &guest].concat(), own, "destination")
    }

    fn take_over(&self, state: &str, options: &[&str]) -> Process {
        let state = self.place.text(state);
        let first = ["send", "--json", "--takeover", "--state-dir", &state, "--check", "--run-on", "50ms"];
        self.place.belay(&[&first[..], options].concat())
    }
}

/// Strangers who connect and say nothing, or nothing that is a word; and stay.
fn come_in_crowds(to: &str) -> Vec<TcpStream> {
    let mut silent: Vec<_> = (0..24).map(|_| dial(to)).collect();
    for (at, stranger) in silent.iter_mut().enumerate().filter(|(at, _)| at % 2 == 1) {
        // The first of them may be turned away before it has said all.
        let _ = stranger.write_all(&vec![at as u8; at * 100]);
    }
    silent
}

/// Waits until the destination says that it has turned somebody away, and why.
fn turned_away(destination: &mut Process) -> String {
    let event = destination.wait_for_state("turned-away");
    event["why"].as_str().expect("it says why").to_owned()
}

fn failure(process: &Process) -> String {
    let failed = process.events("failed").last().unwrap_or_else(|| panic!("{}", process.story()));
    assert!(!failed["advice"].as_str().unwrap().is_empty(), "{failed}");
    failed["what"].as_str().unwrap().to_owned()
}

macro_rules! at_every_door {
    ($($name:ident)*) => {
        mod tcp { $(#[test] fn $name() { super::$name(super::Door::Tcp) })* }
        mod unix { $(#[test] fn $name() { super::$name(super::Door::Unix) })* }
    };
}

at_every_door! {
    p7_a_thousand_strangers_cost_a_waiting_destination_little_and_its_source_nothing
}

#[test]
fn p9_a_source_whose_destinations_certificate_has_expired_says_so_and_keeps_its_guest() {
    let place = Place::new();
    make_certificates(&place);
    let keys = place.path("keys");
    let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    keygen_valid(&keys, "expired", at(1_500_000_000), at(1_582_977_600)).unwrap();
    for [source, destination] in [["source", "expired"], ["expired", "destination"]] {
        let state = place.text(&format!("{destination}-state"));
        let receive = ["receive", "--json", "--listen", "127.0.0.1:0", "--drive", "threads", "--state-dir", &state];
        let belay = |arguments: &[&str], certificates: &[String]| {
            place.belay(&arguments.iter().copied().chain(certificates.iter().map(String::as_str)).collect::<Vec<_>>())
        };
        let mut receiving = belay(&receive, &tls(&place, destination, source));
        let to = receiving.wait_for_event("listening")["address"].as_str().unwrap().to_owned();
        let state = place.text(&format!("{source}-state"));
        let send = ["send", "--json", "--to", &to, "--state-dir", &state, "--drive", "threads", "--memory", "8M"];
        let mut sending = belay(&send, &tls(&place, source, destination));
        assert_eq!(sending.end(), 4, "{}", sending.story());
        let (here, there) = (sending.story(), turned_away(&mut receiving));
        let dated = "expired.crt: the peer's certificate expired on 2020-02-29 12:00:00 UTC";
        let told = "expired.crt: by the peer's clock our certificate has expired";
        if destination == "expired" {
            assert!(here.contains(dated), "{here}");
        } else {
            assert!(there.contains(dated), "{there}");
            assert!(here.contains(told), "{here}");
        }
        assert!(here.contains("The guest was not touched") && here.contains("belay keygen"), "{here}");
        assert!(!sending.was("released") && !receiving.was("owner"), "{here}");
        receiving.signal(libc::SIGTERM);
        assert_eq!(receiving.end(), 130, "{}", receiving.story());
    }
    place.expect_nothing_left();
}

mod kvm {
    use super::*;

    at_every_door! {
        p2_no_stranger_gets_a_fenced_guest_or_sets_it_free_and_none_keeps_its_source_out
    }
}

/// Descriptors that a process has open, and bytes of memory that are its own (neither files' nor shared).
fn holds(process: &Process) -> (usize, u64) {
    let proc = format!("/proc/{}", process.pid());
    let status = std::fs::read_to_string(format!("{proc}/status")).expect("it runs");
    let kilobytes = status.lines().find_map(|line| line.strip_prefix("RssAnon:")?.trim().strip_suffix(" kB"));
    let kilobytes: u64 = kilobytes.expect("RssAnon").trim().parse().expect("a number");
    (std::fs::read_dir(format!("{proc}/fd")).expect("it runs").count(), kilobytes << 10)
}

/// How many of a crowd have a connection still.
fn still_there(crowd: &mut [TcpStream]) -> usize {
    let mut answer = [0; 256];
    let mut is_open = |stranger: &mut TcpStream| loop {
        match stranger.read(&mut answer) {
            Ok(0) => return false,
            Ok(_) => {}
            Err(error) => return error.kind() == std::io::ErrorKind::WouldBlock,
        }
    };
    crowd.iter_mut().map(|stranger| usize::from(is_open(stranger))).sum()
}

/// What a stranger says first, and why he is turned away for it.
fn strange_words(door: Door) -> Vec<(Vec<u8>, &'static str)> {
    let preamble = |protection| {
        let mut bytes = [0; 64];
        bytes[..8].copy_from_slice(b"BELAY\0\r\n");
        (bytes[8], bytes[10], bytes[11], bytes[12]) = (1, 1, protection, 1);
        bytes.to_vec()
    };
    let (own, other) = if door == Door::Tcp { (1, 3) } else { (3, 1) };
    vec![
        ([&b"GET / HTTP/1.1\r\n\r\n"[..], &[b' '; 64]].concat(), "does not begin like belay's"),
        ([&preamble(own)[..], &u32::MAX.to_le_bytes()].concat(), "4294967295 bytes"),
        ([&preamble(own)[..], &[8, 0, 0, 0], &[0xff; 8]].concat(), "hello"),
        (preamble(other), "both must be the same"),
    ]
}

fn p7_a_thousand_strangers_cost_a_waiting_destination_little_and_its_source_nothing(door: Door) {
    if std::fs::File::open("/dev/userfaultfd").is_err() {
        eprintln!("skipped: it needs a userfaultfd");
        return;
    }
    let place = Place::new();
    let (state, listen) = (place.text("destination"), door.listen(&place, "receive"));
    let first = ["receive", "--json", "--listen", &listen, "--drive", "threads", "--state-dir", &state];
    let mut destination = place.belay(&[&first[..], &["--check", "--run-on", "50ms"]].concat());
    let to = destination.wait_for_event("listening")["address"].as_str().unwrap().to_owned();
    let (fds, bytes) = holds(&destination);

    let words = strange_words(door);
    for (words, wanted) in &words {
        let mut stranger = dial(&to);
        stranger.write_all(words).expect("a fresh socket takes this much");
        let why = turned_away(&mut destination);
        assert!(why.contains(wanted), "{why:?} does not speak of {wanted:?}");
    }
    // Some are silent, some say a byte, the others what they were just turned away for; all of them stay.
    let mut crowd: Vec<_> = (0..1000)
        .map(|at| {
            let mut stranger = dial(&to);
            let said = match at % 6 {
                0 => &[][..],
                1 => &b"B"[..],
                other => &words[other - 2].0,
            };
            let _ = stranger.write_all(said);
            stranger.set_nonblocking(true).expect("a socket");
            stranger
        })
        .collect();
    while !turned_away(&mut destination).contains("too many connections") {}
    let deadline = Instant::now() + Duration::from_secs(20);
    // Until all of them have been heard: those that are kept are in their handshake.
    while still_there(&mut crowd) > IN_THEIR_HANDSHAKE {
        assert!(Instant::now() < deadline, "{} strangers are kept", still_there(&mut crowd));
        std::thread::yield_now();
    }
    let (fds_now, bytes_now) = holds(&destination);
    // With what the destination opens besides.
    assert!(fds_now <= fds + IN_THEIR_HANDSHAKE + 16, "{fds} descriptors became {fds_now}");
    assert!(bytes_now <= bytes + (8 << 20), "{bytes} bytes became {bytes_now}");

    let state = place.text("source");
    let first = ["send", "--json", "--to", &to, "--state-dir", &state, "--drive", "threads", "--memory", "8M"];
    let mut source = place.belay(&[&first[..], &["--run-before", "0ms"]].concat());
    assert_eq!(source.end(), 0, "{}", source.story());
    assert_eq!(destination.end(), 0, "{}", destination.story());
    destination.expect_whole();
    drop(crowd);
    if let Some(path) = to.strip_prefix("unix:") {
        assert!(!std::fs::exists(path).unwrap(), "its socket is left");
    }
    place.expect_nothing_left();
}

fn p2_no_stranger_gets_a_fenced_guest_or_sets_it_free_and_none_keeps_its_source_out(door: Door) {
    if !has_kvm() {
        eprintln!("skipped: strangers at a fenced destination need /dev/kvm");
        return;
    }
    let hosts = Hosts::new(door);
    let (mut destination, to) = hosts.receive("destination");
    let mut source = hosts.send(&to, "source", "source");
    let migration = source.wait_for_event("kept")["migration"].as_str().unwrap().to_owned();
    destination.await_mid_pull(1);
    source.crash();
    destination.wait_for_state("fenced");
    let fenced_since = destination.seen.len();

    let silent = come_in_crowds(&to);

    if door == Door::Tcp {
        // Another certificate than the one that is expected.
        let mut stranger = hosts.send(&to, "stranger", "stranger");
        assert_eq!(stranger.end(), 4, "{}", stranger.story());
        // The garbage above comes first.
        while !turned_away(&mut destination).contains("certificate") {}
    }

    // The right certificate, and a guest of his own: this host has one.
    let mut newcomer = hosts.send(&to, "newcomer", "source");
    assert_eq!(newcomer.end(), 4, "{}", newcomer.story());
    assert!(failure(&newcomer).contains("has a guest already"), "{}", newcomer.story());
    while !turned_away(&mut destination).contains("has a guest already") {}

    // The right certificate, and a migration of his own that he takes over: sent to the wrong destination.
    let (mut elsewhere, to_elsewhere) = hosts.receive("elsewhere");
    let mut other = hosts.send(&to_elsewhere, "other", "source");
    let other_migration = other.wait_for_event("kept")["migration"].as_str().unwrap().to_owned();
    elsewhere.await_mid_pull(1);
    other.crash();
    elsewhere.crash();
    let mut other = hosts.take_over("other", &["--to", &to, "--takeover-grace", "2s"]);
    let is_told = |event: &Value| {
        let why = event["why"].as_str().unwrap_or("");
        event["state"] == "turned-away" && why.contains(&migration) && why.contains(&other_migration)
    };
    destination.wait_for("the source of another guest turned away", is_told);
    // He gets what is his, and nothing else.
    assert_eq!(other.end(), 10, "{}", other.story());
    other.expect_whole();

    let since = &destination.seen[fenced_since..];
    let states: Vec<_> = since.iter().filter_map(|event| event["state"].as_str()).collect();
    assert!(
        states.iter().all(|&state| !matches!(state, "tethered" | "owner" | "retired" | "release-asked")),
        "{states:?}"
    );
    assert!(since.iter().all(|event| event["event"] != "tethered-again"), "{}", destination.story());

    // The right one is heard, among all of them.
    let silent = (silent, come_in_crowds(&to));
    source = hosts.take_over("source", &["--takeover-grace", "20s"]);
    let committed = source.wait_for_event("tethered-again")["committed"].as_u64();
    destination.wait_for("a checkpoint over the new session", |event| event["epoch"].as_u64() > committed);
    destination.crash();
    assert_eq!(source.end(), 10, "{}", source.story());
    source.expect_whole();
    drop((silent, source, destination, elsewhere));
    hosts.place.expect_nothing_left();
}
