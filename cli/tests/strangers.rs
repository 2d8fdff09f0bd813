//! Strangers who dial a destination that is fenced: its source is gone, its guest stands still, and it listens for whoever comes back. Only the
//! source of this very guest is heard, and strangers do not keep it out.

mod running;

use running::{BELAY, Place, Process, has_kvm};
use serde_json::Value;
use std::io::Write;
use std::net::TcpStream;
use std::process::Command;

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
    place: Place,
    /// On tmpfs; gone with the test.
    memory: tempfile::TempDir,
}

impl Hosts {
    fn new() -> Self {
        let place = Place::new();
        make_certificates(&place);
        Self { place, memory: tempfile::tempdir_in("/dev/shm").expect("/dev/shm is tmpfs") }
    }

    fn belay(&self, arguments: &[&str], certificates: &[String]) -> Process {
        let certificates = certificates.iter().map(String::as_str);
        self.place.belay(&arguments.iter().copied().chain(certificates).collect::<Vec<_>>())
    }

    /// A destination with the right certificate, and where it listens.
    fn receive(&self, state: &str) -> (Process, String) {
        let state = self.place.text(state);
        let first = ["receive", "--json", "--listen", "127.0.0.1:0", "--drive", "kvm", "--state-dir", &state];
        let own = tls(&self.place, "destination", "source");
        let mut destination = self.belay(&[&first[..], &["--hold-pull-at", "30"]].concat(), &own);
        let to = destination.wait_for_event("listening")["address"].as_str().unwrap().to_owned();
        (destination, to)
    }

    /// A source that shows `own` certificate.
    fn send(&self, to: &str, state: &str, own: &str) -> Process {
        let (state, memory) = (self.place.text(state), self.memory.path().to_str().unwrap().to_owned());
        let first = ["send", "--json", "--to", to, "--state-dir", &state, "--memory-dir", &memory];
        // A lease that outlasts whatever a busy host does.
        let guest = ["--memory", "32M", "--drive", "kvm", "--run-before", "20ms", "--ring", "4M", "--lease", "20s"];
        self.belay(&[&first[..], &guest].concat(), &tls(&self.place, own, "destination"))
    }

    fn take_over(&self, state: &str, options: &[&str]) -> Process {
        let state = self.place.text(state);
        let first = ["send", "--json", "--takeover", "--state-dir", &state, "--check", "--run-on", "50ms"];
        self.place.belay(&[&first[..], options].concat())
    }
}

fn await_mid_pull(destination: &mut Process) {
    let mut commits = 0;
    destination.wait_for("a pull under way with three checkpoints", |event| {
        commits += u64::from(event["event"] == "committed");
        let frames = |name: &str| event[name].as_u64().unwrap_or(0);
        commits >= 3 && frames("landed_frames") > 0 && frames("absent_frames") > 0
    });
}

/// Strangers who connect and say nothing, or nothing that is a word; and stay.
fn come_in_crowds(to: &str) -> Vec<TcpStream> {
    let mut silent: Vec<_> = (0..24).map(|_| TcpStream::connect(to).expect("it listens")).collect();
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

mod kvm {
    use super::*;

    #[test]
    fn p2_no_stranger_gets_a_fenced_guest_or_sets_it_free_and_none_keeps_its_source_out() {
        if !has_kvm() {
            eprintln!("skipped: strangers at a fenced destination need /dev/kvm");
            return;
        }
        let hosts = Hosts::new();
        let (mut destination, to) = hosts.receive("destination");
        let mut source = hosts.send(&to, "source", "source");
        let migration = source.wait_for_event("kept")["migration"].as_str().unwrap().to_owned();
        await_mid_pull(&mut destination);
        source.crash();
        destination.wait_for_state("fenced");
        let fenced_since = destination.seen.len();

        let silent = come_in_crowds(&to);

        // Another certificate than the one that is expected.
        let mut stranger = hosts.send(&to, "stranger", "stranger");
        assert_eq!(stranger.end(), 4, "{}", stranger.story());
        let mut why = turned_away(&mut destination);
        while !why.contains("certificate") {
            // The garbage above.
            why = turned_away(&mut destination);
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
        await_mid_pull(&mut elsewhere);
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
}
