//! A source that dies and is taken over: real guests, real SIGKILLs, an observer outside that forgives no gap.

mod running;

use running::{BOUND, Place, Process, has_kvm};
use std::path::PathBuf;
use std::time::{Duration, Instant};

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
        Self { place, memory, observer, destination, source }
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

    /// Waits until the source has stopped where it was told to, and ends it there.
    fn crash_where_it_stopped(&mut self) {
        let end = Instant::now() + BOUND;
        let stat = format!("/proc/{}/stat", self.source.pid());
        let stopped = || std::fs::read_to_string(&stat).is_ok_and(|stat| stat.contains(") T "));
        while !stopped() {
            assert!(Instant::now() < end, "it does not come to its stop point: {}", self.source.story());
            std::thread::sleep(Duration::from_millis(2));
        }
        self.source.crash();
    }

    /// Takes over; the guest must come back here, whole.
    fn expect_caught_by_takeover(&mut self) {
        self.source = self.take_over(&["--takeover-grace", "300ms", "--run-on", "100ms"]);
        assert_eq!(self.source.end(), 10, "{}", self.source.story());
        self.source.expect_whole();
        assert_eq!((self.left(), self.journals()), (vec![], 0), "an orderly end leaves nothing");
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

/// The destination is alive: its guest goes on, is tethered again, pulls the rest, and is released.
fn goes_on(fabric: &str, send: &[&str], receive: &[&str], times: usize) {
    let mut road = Road::start(fabric, &[&["--run-on", "100ms", "--check"], receive].concat(), send);
    if receive.is_empty() {
        road.destination.wait_for_state("tethered");
    } else {
        road.destination.await_mid_pull(30);
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
        road.source.expect_whole();
        assert_eq!(road.destination.end(), 13, "{}", road.destination.story());
    } else {
        assert_eq!(road.destination.end(), 0, "{}", road.destination.story());
        assert_eq!(road.source.end(), 0, "{}", road.source.story());
        road.destination.expect_whole();
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

const HELD: [&str; 2] = ["--hold-pull-at", "30"];

#[test]
fn a_source_taken_over_without_its_destination_has_the_guest_from_the_newest_commit() {
    needs_kvm!("takeover");
    for fabric in ["tcp", "local"] {
        let mut road = Road::start(fabric, &HELD, &[]);
        road.destination.await_mid_pull(30);
        road.source.crash();
        road.destination.crash();
        let newest = road.destination.events("committed").map(|event| event["epoch"].as_u64().unwrap()).max();
        road.expect_caught_by_takeover();
        let caught = road.source.events("caught").last().unwrap()["epoch"].as_u64();
        assert!(caught >= newest, "{caught:?} was caught, the destination was told of {newest:?}");
        road.expect_good_end();
    }
}

#[test]
fn a_source_that_dies_at_any_step_of_a_catch_is_taken_over_and_nothing_is_lost() {
    needs_kvm!("takeover");
    let points = ["catch-begun", "catch-unrevoked", "catch-revoked", "catch-loaded", "catch-resume"];
    for (fabric, point) in ["local", "tcp"].into_iter().flat_map(|fabric| points.map(|point| (fabric, point))) {
        let mut road = Road::start(fabric, &HELD, &["--stop-at", point]);
        road.destination.await_mid_pull(30);
        road.destination.crash();
        road.crash_where_it_stopped();
        // And the one that takes over dies there too.
        road.source = road.take_over(&["--takeover-grace", "300ms", "--stop-at", point]);
        road.crash_where_it_stopped();
        road.expect_caught_by_takeover();
        road.expect_good_end();
    }
}

#[test]
fn p2_a_guest_that_ran_at_the_source_again_is_not_brought_back_a_second_time() {
    needs_kvm!("takeover");
    let mut road = Road::start("tcp", &HELD, &["--stop-at", "catch-resumed"]);
    let id = road.source.wait_for_event("kept")["migration"].as_str().unwrap().to_owned();
    road.destination.await_mid_pull(30);
    road.destination.crash();
    road.crash_where_it_stopped();
    assert!(refused(&road.place, &[&id], 7).contains("ran here"));
    assert!(refused(&road.place, &[], 7).contains("nothing to take over"));
    drop((road.observer, road.destination, road.source));
    road.place.expect_nothing_left();
}

#[test]
fn a_source_that_dies_while_it_folds_is_taken_over_and_the_guest_goes_on() {
    needs_kvm!("takeover");
    for (point, fabric) in [("fold-begun:3", "tcp"), ("fold-mid:3", "local"), ("fold-done:4", "tcp")] {
        let mut road = Road::start(fabric, &HELD, &["--stop-at", point, "--dirty-rate", "200k", "--period", "100ms"]);
        road.crash_where_it_stopped();
        road.source = road.take_over(&["--takeover-grace", "20s"]);
        let committed = road.source.wait_for_event("tethered-again")["committed"].as_u64().unwrap();
        let over_it = |event: &serde_json::Value| event["epoch"].as_u64() > Some(committed);
        road.destination.wait_for("a checkpoint over the new session", over_it);
        road.destination.crash();
        road.source.wait_for_event("caught");
        road.source.signal(libc::SIGTERM);
        assert_eq!(road.source.end(), 10, "{}", road.source.story());
        road.source.expect_whole();
        road.expect_good_end();
    }
}

#[test]
fn p6_a_source_that_dies_in_a_release_has_released_exactly_if_it_is_on_disk() {
    needs_kvm!("takeover");
    for (point, released) in
        [("release-due", false), ("release-unsynced", false), ("release-renamed", true), ("release-recorded", true)]
    {
        let receive = ["--run-on", "100ms", "--check"];
        let mut road = Road::start("tcp", &receive, &["--stop-at", point]);
        road.crash_where_it_stopped();
        let mut again = road.take_over(&["--takeover-grace", "20s"]);
        assert_eq!(again.end(), 0, "{point}: {}", again.story());
        assert_eq!(again.was("serving"), !released, "{point}: {}", again.story());
        assert_eq!(again.events("caught").count(), 0, "{point}: {}", again.story());
        assert_eq!(road.destination.end(), 0, "{point}: {}", road.destination.story());
        road.destination.expect_whole();
        assert_eq!((road.left(), road.journals()), (vec![], 0), "{point}: an orderly end leaves nothing");
        // Nobody takes over what is released and known to be.
        let mut late = road.take_over(&[]);
        assert_eq!(late.end(), 7, "{point}: {}", late.story());
        drop((again, late));
        road.expect_good_end();
    }
}

#[test]
fn p6_a_release_that_was_told_stands_though_nobody_says_farewell() {
    needs_kvm!("takeover");
    let mut road = Road::start("tcp", &["--run-on", "100ms", "--check"], &["--stop-at", "release-told"]);
    road.crash_where_it_stopped();
    assert_eq!(road.destination.end(), 0, "{}", road.destination.story());
    road.destination.expect_whole();
    // It is not found any more; that changes nothing, and whoever wants may ask again.
    for _ in 0..2 {
        let mut again = road.take_over(&["--takeover-grace", "300ms"]);
        assert_eq!(again.end(), 0, "{}", again.story());
        assert_eq!(again.events("taken-over").last().expect("it says so")["was"], "released");
        assert_eq!(again.events("caught").count(), 0, "{}", again.story());
        assert_eq!((road.left(), road.journals()), (vec![], 1), "the record stands, its memory is given back");
    }
    road.expect_good_end();
}

#[test]
fn a_source_that_dies_in_the_switch_is_taken_over_once_the_guests_state_is_saved() {
    needs_kvm!("takeover");
    for (point, back) in [("switch-paused", false), ("switch-told", true), ("go-due", true), ("go-told", true)] {
        let mut road = Road::start("tcp", &HELD, &["--stop-at", point]);
        road.crash_where_it_stopped();
        if back {
            // Where the word to go was sent the destination may be running the guest: it goes on there, or comes back here.
            road.source = road.take_over(&["--takeover-grace", "3s", "--run-on", "100ms"]);
            road.source.wait_for("an end of the takeover", |event| {
                event["event"] == "caught" || event["event"] == "tethered-again"
            });
            if road.source.events("tethered-again").count() > 0 {
                road.source.signal(libc::SIGTERM);
                road.source.wait_for_event("caught");
            }
            assert_eq!(road.source.end(), 10, "{point}: {}", road.source.story());
            road.source.expect_whole();
        } else {
            let mut again = road.take_over(&[]);
            assert_eq!(again.end(), 7, "{point}: {}", again.story());
        }
        road.destination.signal(libc::SIGTERM);
        road.destination.end();
        drop((road.observer, road.destination, road.source));
        road.place.expect_nothing_left();
    }
}

#[test]
fn a_source_that_dies_in_the_handshake_of_a_takeover_is_taken_over_again() {
    needs_kvm!("takeover");
    for fabric in ["tcp", "local"] {
        let mut road = Road::start(fabric, &HELD, &[]);
        road.destination.await_mid_pull(30);
        road.source.crash();
        for wait in ["taken-over", "connected", "tethered-again"] {
            road.source = road.take_over(&["--takeover-grace", "20s"]);
            road.source.wait_for_event(wait);
            road.source.crash();
        }
        road.source = road.take_over(&["--takeover-grace", "20s", "--run-on", "100ms"]);
        road.source.wait_for("an end of the takeover", |event| {
            event["event"] == "caught" || event["event"] == "tethered-again"
        });
        road.destination.crash();
        assert_eq!(road.source.end(), 10, "{}", road.source.story());
        road.source.expect_whole();
        road.expect_good_end();
    }
}

#[test]
fn a_second_migration_succeeds_after_a_takeover() {
    needs_kvm!("takeover");
    let mut road = Road::start("tcp", &HELD, &[]);
    road.destination.await_mid_pull(30);
    road.source.crash();
    road.destination.crash();
    road.expect_caught_by_takeover();
    let observer = format!("unix:{}", road.place.text("observer.sock"));
    road.observer.signal(libc::SIGTERM);
    assert_eq!(road.observer.end(), 0, "{}", road.observer.story());
    road.observer = road.place.belay(&["observe", "--json", "--listen", &observer]);
    road.observer.wait_for_event("listening");
    let (destination, to) = Road::receive(&road.place, "tcp", &observer, &["--run-on", "100ms", "--check"]);
    road.destination = destination;
    road.source = Road::send(&road.place, &road.memory, &to, &observer, &[]);
    assert_eq!(road.destination.end(), 0, "{}", road.destination.story());
    assert_eq!(road.source.end(), 0, "{}", road.source.story());
    road.destination.expect_whole();
    assert_eq!((road.left(), road.journals()), (vec![], 0));
    road.expect_good_end();
}

#[test]
fn under_lease_a_destination_that_was_silent_too_long_tethers_again() {
    needs_kvm!("takeover");
    let mut road = Road::start("tcp", &HELD, &["--output", "lease", "--lease", "300ms"]);
    road.destination.await_mid_pull(30);
    road.destination.signal(libc::SIGSTOP);
    road.source.wait_for_state("awaiting-operator");
    road.destination.signal(libc::SIGCONT);
    let committed = road.source.wait_for_event("tethered-again")["committed"].as_u64().unwrap();
    road.destination.wait_for("a later checkpoint", |event| event["epoch"].as_u64() > Some(committed));
    road.source.signal(libc::SIGTERM);
    road.source.wait_for_event("caught");
    road.source.signal(libc::SIGTERM);
    assert_eq!(road.source.end(), 10, "{}", road.source.story());
    road.source.expect_whole();
    assert_eq!(road.destination.end(), 13, "{}", road.destination.story());
    drop((road.observer, road.destination, road.source));
    road.place.expect_nothing_left();
}

/// Ends a takeover that must be refused, and gives what it says.
fn refused(place: &Place, options: &[&str], code: i32) -> String {
    let state = place.text("source");
    let mut refused = place.belay(&[&["send", "--json", "--state-dir", &state, "--takeover"], options].concat());
    assert_eq!(refused.end(), code, "{}", refused.story());
    let failed = refused.events("failed").last().expect("it says why").clone();
    assert!(!failed["advice"].as_str().unwrap().is_empty(), "{failed}");
    failed["what"].as_str().unwrap().to_owned()
}

#[test]
fn what_cannot_be_taken_over_is_said_with_a_code_of_its_own() {
    needs_kvm!("takeover");
    let place = Place::new();
    assert!(refused(&place, &[], 7).contains("nothing to take over"));
    assert!(refused(&place, &["0123456789abcdef"], 7).contains("0123456789abcdef"));
    let mut road = Road::start("tcp", &HELD, &[]);
    let id = road.source.wait_for_event("kept")["migration"].as_str().unwrap().to_owned();
    road.destination.await_mid_pull(30);
    // Held by a process that lives.
    let held = refused(&road.place, &[], 8);
    assert!(held.contains(&road.source.pid().to_string()) && held.contains(&id), "{held}");
    road.source.crash();
    // Damaged: refused, and nothing is changed by that.
    let journal = road.place.path("source").join("migrations").join(&id).join("journal");
    let whole = std::fs::read(&journal).unwrap();
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 4;
    std::fs::write(&journal, flipped).unwrap();
    assert!(refused(&road.place, &[], 9).contains("damaged"));
    std::fs::write(&journal, &whole).unwrap();
    let state = road.left().into_iter().find(|path| path.ends_with("state")).expect("the kept state");
    let right = std::fs::read(&state).unwrap();
    let mut wrong = right.clone();
    // In the ownership state, whichever of its two places holds the newest.
    (4096..4096 + 2 * (64 + (16 << 10))).step_by(16).for_each(|at| wrong[at] ^= 1);
    std::fs::write(&state, wrong).unwrap();
    assert!(refused(&road.place, &[], 9).contains("damaged"));
    std::fs::write(&state, right).unwrap();
    // Mended, it goes on.
    road.source = road.take_over(&["--takeover-grace", "20s"]);
    road.source.wait_for_event("tethered-again");
    road.destination.crash();
    road.source.wait_for_event("caught");
    road.source.signal(libc::SIGTERM);
    assert_eq!(road.source.end(), 10, "{}", road.source.story());
    road.source.expect_whole();
    road.expect_good_end();
}

#[test]
fn without_named_memory_send_says_at_its_start_that_nobody_can_take_over() {
    needs_kvm!("takeover");
    let place = Place::new();
    let state = place.text("source");
    let (mut destination, to) = Road::receive(&place, "tcp", "unix:/nowhere", &HELD);
    let guest = ["--memory", "32M", "--drive", "kvm", "--run-before", "50ms"];
    let mut source = place.belay(&[&["send", "--json", "--to", &to, "--state-dir", &state], &guest[..]].concat());
    let kept = source.wait_for_event("kept");
    assert!(kept.get("memory").is_none(), "{kept}");
    source.wait_for_state("serving");
    source.crash();
    let id = kept["migration"].as_str().unwrap();
    assert!(refused(&place, &[id], 7).contains("anonymous"));
    assert!(refused(&place, &[], 7).contains("nothing to take over"));
    destination.signal(libc::SIGTERM);
    destination.end();
    drop((source, destination));
    place.expect_nothing_left();
}

#[test]
fn named_memory_that_cannot_be_is_refused_before_anything_is_started() {
    let place = Place::new();
    let (state, directory) = (place.text("source"), place.text("memory"));
    std::fs::create_dir(&directory).unwrap();
    let send = ["send", "--json", "--to", "127.0.0.1:1", "--drive", "threads", "--memory", "8M", "--state-dir"];
    let blocked = place.text("blocked");
    std::fs::write(&blocked, "in the way").unwrap();
    let mut refused = place.belay(&[&send[..], &[&blocked]].concat());
    assert_eq!(refused.end(), 3, "{}", refused.story());
    assert!(refused.events("failed").last().unwrap()["what"].as_str().unwrap().contains("blocked"));
    let mut refused = place.belay(&[&send[..], &[&state, "--memory-dir", "/nowhere/at/all"]].concat());
    assert_eq!(refused.end(), 3, "{}", refused.story());
    if belay_transport::region::backing_of(directory.as_ref()).is_err() {
        let mut refused = place.belay(&[&send[..], &[&state, "--memory-dir", &directory]].concat());
        assert_eq!(refused.end(), 3, "{}", refused.story());
        assert!(refused.events("failed").last().unwrap()["what"].as_str().unwrap().contains("tmpfs"));
    }
    let migrations = place.path("source").join("migrations");
    assert!(std::fs::read_dir(migrations).map_or(0, |all| all.count()) == 0, "nothing is left of what was refused");
}
