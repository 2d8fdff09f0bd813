//! A source that dies and is taken over: real guests, real SIGKILLs, an observer outside that forgives no gap.

mod running;

use running::{Place, Process, has_kvm};
use std::path::PathBuf;

macro_rules! needs_kvm {
    ($name:literal) => {
        if !has_kvm() {
            eprintln!("skipped: {} needs /dev/kvm", $name);
            return;
        }
    };
}

/// Source with named memory, destination and observer.
struct Road {
    place: Place,
    /// On tmpfs; gone with the road.
    memory: tempfile::TempDir,
    observer: Process,
    destination: Process,
    source: Process,
    observer_address: String,
}

impl Road {
    fn start(fabric: &str, receive: &[&str], send: &[&str]) -> Self {
        let place = Place::new();
        let memory = tempfile::tempdir_in("/dev/shm").expect("/dev/shm is tmpfs");
        let observer_address = format!("unix:{}", place.text("observer.sock"));
        let mut observer = place.belay(&["observe", "--json", "--listen", &observer_address]);
        observer.wait_for_event("listening");
        let (destination, to) = Self::receive(&place, fabric, &observer_address, receive);
        let source = Self::send(&place, &memory, &to, &observer_address, send);
        Self { place, memory, observer, destination, source, observer_address }
    }

    fn receive(place: &Place, fabric: &str, observer: &str, options: &[&str]) -> (Process, String) {
        let listen = match fabric {
            "local" => format!("unix:{}", place.text("receive.sock")),
            _ => "127.0.0.1:0".to_owned(),
        };
        let state = place.text("destination");
        let common = ["receive", "--json", "--listen", &listen, "--output-to", observer, "--state-dir", &state];
        let mut destination = place.belay(&[&common[..], &["--drive", "kvm"], options].concat());
        let to = destination.wait_for_event("listening")["address"].as_str().unwrap().to_owned();
        (destination, to)
    }

    fn send(place: &Place, memory: &tempfile::TempDir, to: &str, observer: &str, options: &[&str]) -> Process {
        let (state, memory) = (place.text("source"), memory.path().to_str().unwrap().to_owned());
        let common = ["send", "--json", "--to", to, "--output-to", observer, "--state-dir", &state];
        let guest = ["--memory", "32M", "--drive", "kvm", "--run-before", "50ms", "--check", "--memory-dir", &memory];
        place.belay(&[&common[..], &guest, options].concat())
    }

    /// A process that takes over.
    fn take_over(&self, options: &[&str]) -> Process {
        let state = self.place.text("source");
        let common = ["send", "--json", "--takeover", "--state-dir", &state, "--check"];
        self.place.belay(&[&common[..], options].concat())
    }

    fn await_mid_pull(&mut self, landed_percent: u64) {
        let mut commits = 0;
        self.destination.wait_for("a pull under way with three checkpoints", |event| {
            commits += u64::from(event["event"] == "committed");
            let landed = event["landed_frames"].as_u64().unwrap_or(0);
            let absent = event["absent_frames"].as_u64().unwrap_or(0);
            commits >= 3 && absent > 0 && landed * 100 >= (landed + absent) * landed_percent
        });
    }

    /// Files of memory that are left.
    fn left(&self) -> Vec<PathBuf> {
        let folders = std::fs::read_dir(self.memory.path()).unwrap().flatten().map(|entry| entry.path());
        folders.flat_map(|folder| std::fs::read_dir(folder).unwrap().flatten().map(|entry| entry.path())).collect()
    }

    fn journals(&self) -> usize {
        let folder = self.place.path("source").join("migrations");
        std::fs::read_dir(folder).map_or(0, |entries| entries.count())
    }

    fn expect_good_end(mut self) {
        self.observer.signal(libc::SIGTERM);
        assert_eq!(self.observer.end(), 0, "{}", self.observer.story());
        drop((self.source, self.destination, self.observer));
        self.place.expect_nothing_left();
    }
}

fn expect_right(process: &Process) {
    let checked = process.events("checked").last().expect("it says what it found").clone();
    assert_eq!((&checked["wrong_pages"], &checked["detail"]), (&0.into(), &"".into()), "{checked}");
}

/// The destination is alive: its guest goes on, is tethered again, pulls the rest, and is released.
fn goes_on(fabric: &str, send: &[&str], receive: &[&str], times: usize) {
    let mut road = Road::start(fabric, &[&["--run-on", "100ms", "--check"], receive].concat(), send);
    if receive.is_empty() {
        road.destination.wait_for_state("tethered");
    } else {
        road.await_mid_pull(30);
    }
    road.source.crash();
    for round in 0..times {
        let mut again = road.take_over(&["--takeover-grace", "20s"]);
        let joined = again.wait_for_event("tethered-again");
        let committed = joined["committed"].as_u64().unwrap();
        road.destination
            .wait_for("a checkpoint over the new session", |event| event["epoch"].as_u64() > Some(committed));
        road.source = again;
        if round + 1 < times {
            road.source.crash();
        }
    }
    assert!(road.left().len() >= 4, "RAM, ring, overflow and state: {:?}", road.left());
    if receive.contains(&"--hold-pull-at") {
        // Never all there, so never released: the operator wants it back.
        road.source.signal(libc::SIGTERM);
        road.source.wait_for_event("caught");
        road.source.signal(libc::SIGTERM);
        let code = road.source.end();
        assert!(matches!(code, 10 | 130), "{code}: {}", road.source.story());
        expect_right(&road.source);
        assert_eq!(road.destination.end(), 13, "{}", road.destination.story());
    } else {
        assert_eq!(road.destination.end(), 0, "{}", road.destination.story());
        assert_eq!(road.source.end(), 0, "{}", road.source.story());
        expect_right(&road.destination);
    }
    assert_eq!((road.left(), road.journals()), (vec![], 0), "an orderly end leaves nothing");
    road.expect_good_end();
}

#[test]
fn a_source_that_dies_in_mid_pull_is_taken_over_and_the_guest_goes_on_over_tcp() {
    needs_kvm!("takeover");
    goes_on("tcp", &[], &["--hold-pull-at", "40"], 1);
}

#[test]
fn a_source_that_dies_in_mid_pull_is_taken_over_and_the_guest_goes_on_over_local() {
    needs_kvm!("takeover");
    goes_on("local", &[], &["--hold-pull-at", "40"], 1);
}

#[test]
fn a_guest_whose_source_died_twice_is_released_in_the_end() {
    needs_kvm!("takeover");
    for fabric in ["tcp", "local"] {
        goes_on(fabric, &["--release", "1500ms"], &[], 2);
    }
}
