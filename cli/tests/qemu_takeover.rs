//! The page server of a QEMU guest dies, and another goes on with it: the guest waits meanwhile, reads nothing that has not arrived, and checks
//! its own memory all along.
//!
//! Under `--output lease` a living source waits for a destination it has lost until a catch is ordered, so these runs need no clock.

mod qemu_guest;
mod running;

use qemu_guest::moving::{end_left, is_frozen, receive, send, started, wait_until_ended};
use qemu_guest::{Console, Linux, Machine, Qemu, expect_no_gap, monitor, no_qemu, shared_memory, status};
use running::{BOUND, Place, Process, is_running};
use std::path::Path;
use std::time::{Duration, Instant};

/// A guest on its way, and the page server that has it.
struct Scene {
    place: Place,
    folder: qemu_guest::SharedMemory,
    source: Qemu,
    server: Process,
    /// Where page servers listen, one after the other.
    listen: String,
    sender: Process,
    qemu: i32,
}

impl Scene {
    fn start(linux: Linux, received: &[&str], sent: &[&str]) -> Self {
        let (place, folder) = (Place::new(), shared_memory());
        let machine = Machine { vcpus: 2, blocks: vec![64, 64], ..Machine::of("q35", Some(linux)) };
        let source = Qemu::start(&place, folder.path(), &machine, "here");
        source.wait_until_booted();
        let (mut server, listen) = receive(&place, folder.path(), &machine, received);
        let sender = send(&place, &listen, &source.socket, sent);
        let qemu = started(&mut server);
        Self { place, folder, source, server, listen, sender, qemu }
    }

    /// Another page server.
    fn another(&self, more: &[&str]) -> Process {
        let state_dir = self.place.text("there");
        let words = ["receive", "--json", "--takeover", "--listen", &self.listen, "--state-dir", &state_dir];
        self.place.belay(&[&words[..], more, &["qemu"]].concat())
    }

    fn wait_until_frozen(&self) {
        let end = Instant::now() + BOUND;
        while !is_frozen(self.qemu) {
            assert!(Instant::now() < end && is_running(self.qemu), "QEMU is not kept: {}", self.server.story());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn there(&self) -> Console {
        Console(self.folder.path().join("there-console"))
    }
}

#[test]
fn p1_a_qemu_whose_page_server_is_killed_in_mid_pull_waits_for_the_next_and_ends_as_its_own() {
    if no_qemu() {
        return;
    }
    let Some(linux) = Linux::here() else { return };
    let mut scene = Scene::start(linux, &["--linger", "5m", "--hold-pull-at", "40"], &["--output", "lease"]);
    let (mut commits, mut landed) = (0, 0);
    scene.server.wait_for("a pull under way with three checkpoints", |event| {
        commits += u64::from(event["event"] == "committed");
        landed = event["landed_frames"].as_u64().unwrap_or(landed);
        commits >= 3 && event["absent_frames"].as_u64().is_some_and(|absent| absent > 0)
    });
    // A page server that is frozen has not died: its READs may still land.
    scene.server.signal(libc::SIGSTOP);
    let mut early = scene.another(&[]);
    assert_eq!(early.end(), 8, "{}", early.story());
    assert!(early.story().contains(&scene.server.pid().to_string()), "{}", early.story());
    scene.server.crash();
    scene.wait_until_frozen();
    let mut next = scene.another(&[]);
    let took = next.wait_for_event("took-over");
    assert_eq!(took["pid"].as_i64(), Some(scene.qemu.into()));
    assert!(took["landed_frames"].as_u64().is_some_and(|now| now >= landed), "what has landed stays landed: {took}");
    assert!(took["missing_frames"].as_u64().is_some_and(|missing| missing > 0), "{took}");
    assert_eq!(next.end(), 0, "{}\n{}", next.story(), scene.sender.story());
    assert!(next.was("owner"), "{}", next.story());
    assert_eq!(scene.sender.end(), 0, "{}", scene.sender.story());
    scene.source.wait();
    let ticked = scene.there().ticks().len();
    expect_no_gap(&scene.there().wait_for(ticked + 200));
    let left = next.events("qemu-left").next().expect("the guest's QEMU is told").clone();
    assert_eq!(left["pid"].as_i64(), Some(scene.qemu.into()));
    assert_eq!(status(&mut monitor(Path::new(left["monitor"].as_str().expect("its monitor")))), "running");
    end_left(&next);
    scene.place.expect_nothing_left();
}

#[test]
fn a_page_server_that_took_over_a_tethered_qemu_tethers_it_again_and_gives_it_back_when_told() {
    if no_qemu() {
        return;
    }
    let Some(linux) = Linux::here() else { return };
    let sent = ["--output", "lease", "--release", "never"];
    let mut scene = Scene::start(linux, &["--linger", "5m"], &sent);
    scene.server.wait_for_event("all-landed");
    // Twice: what took over is as good as what it took over from.
    for _ in 0..2 {
        let ticked = scene.there().ticks().len();
        scene.there().wait_for(ticked + 20);
        scene.server.crash();
        scene.wait_until_frozen();
        scene.server = scene.another(&[]);
        let took = scene.server.wait_for_event("took-over");
        assert_eq!(took["missing_frames"].as_u64(), Some(0), "{took}");
        for _ in 0..3 {
            scene.server.wait_for_event("committed");
        }
    }
    scene.server.signal(libc::SIGTERM);
    assert_eq!(scene.sender.end(), 10, "{}\n{}", scene.sender.story(), scene.server.story());
    assert_eq!(scene.server.end(), 13, "{}", scene.server.story());
    wait_until_ended(scene.qemu);
    scene.source.wait();
    let back = Console(scene.folder.path().join("here-console.standby")).wait_for(200);
    let (left, lost) = (scene.source.console.ticks(), scene.there().ticks());
    for part in [&left, &lost, &back] {
        expect_no_gap(part);
    }
    assert!(back[0] > *left.last().unwrap() && back[0] <= *lost.last().unwrap() + 2);
    let made: Vec<_> =
        std::fs::read_dir(scene.place.path("there")).unwrap().flatten().map(|one| one.file_name()).collect();
    assert!(made.is_empty(), "what belay made for that QEMU went with it: {made:?}");
    end_left(&scene.sender);
    drop(scene.server);
    scene.place.expect_nothing_left();
}

#[test]
fn a_qemu_that_no_page_server_comes_for_ends_when_its_time_is_over_and_its_guest_is_back_long_before() {
    if no_qemu() {
        return;
    }
    let Some(linux) = Linux::here() else { return };
    let mut scene = Scene::start(linux, &["--linger", "2s"], &["--release", "never"]);
    scene.server.wait_for_event("all-landed");
    scene.server.wait_for_event("committed");
    scene.server.crash();
    assert_eq!(scene.sender.end(), 10, "{}", scene.sender.story());
    Console(scene.folder.path().join("here-console.standby")).wait_for(20);
    wait_until_ended(scene.qemu);
    let mut late = scene.another(&[]);
    assert_eq!(late.end(), 7, "{}", late.story());
    end_left(&scene.sender);
    drop((scene.server, late));
    scene.place.expect_nothing_left();
}

#[test]
fn under_lease_a_killed_page_server_takes_its_qemu_with_it_and_that_end_is_proof_enough_for_the_catch() {
    if no_qemu() {
        return;
    }
    let Some(linux) = Linux::here() else { return };
    // A lease that does not run out: what lets the source catch is the proof.
    let sent = ["--output", "lease", "--lease", "60min", "--release", "never"];
    let mut scene = Scene::start(linux, &[], &sent);
    scene.server.wait_for_event("all-landed");
    scene.server.wait_for_event("committed");
    scene.server.crash();
    assert_eq!(scene.sender.end(), 10, "{}", scene.sender.story());
    wait_until_ended(scene.qemu);
    scene.source.wait();
    expect_no_gap(&Console(scene.folder.path().join("here-console.standby")).wait_for(40));
    end_left(&scene.sender);
    drop(scene.server);
    scene.place.expect_nothing_left();
}

#[test]
fn a_guest_whose_belays_have_both_died_is_given_to_its_destination_by_a_page_server_that_takes_over() {
    if no_qemu() {
        return;
    }
    let Some(linux) = Linux::here() else { return };
    let mut scene = Scene::start(linux, &["--linger", "5m"], &["--release", "never"]);
    scene.server.wait_for_event("all-landed");
    scene.server.wait_for_event("committed");
    scene.sender.crash();
    scene.server.wait_for_state("fenced");
    scene.server.crash();
    scene.wait_until_frozen();
    let ticked = scene.there().ticks().len();
    let mut next = scene.another(&["--promote"]);
    assert_eq!(next.end(), 0, "{}", next.story());
    expect_no_gap(&scene.there().wait_for(ticked + 200));
    end_left(&next);
    drop(scene.server);
    scene.place.expect_nothing_left();
}
