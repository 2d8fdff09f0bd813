//! Guests of a QEMU that nobody patched are moved, tethered and caught by `belay send … qemu` and `belay receive … qemu`. Each guest checks its
//! own memory all along, and counts: so its consoles show that it went on where it was.

mod qemu_guest;
mod running;

use belay_transport::Deadline;
use qemu_guest::moving::{end_left, is_frozen, receive, send, starts_receiving, wait_until_ended};
use qemu_guest::{Console, Linux, Machine, Qemu, expect_no_gap, monitor, newer_qemu, no_qemu, shared_memory, status};
use running::{BOUND, Place, Process, is_running, kill};
use serde_json::json;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

#[test]
fn a_running_qemu_guest_moves_without_a_gap_and_its_memory_is_right_all_along() {
    if no_qemu() {
        return;
    }
    let Some(linux) = Linux::here() else { return };
    let (place, folder) = (Place::new(), shared_memory());
    let machine = Machine::of("pc", Some(linux));
    let mut source = Qemu::start(&place, folder.path(), &machine, "here");
    source.wait_until_booted();
    let (mut destination, to) = receive(&place, folder.path(), &machine, &[]);
    let mut sender = send(&place, &to, &source.socket, &["--policy", "none"]);
    assert_eq!(sender.end(), 0, "{}", sender.story());
    assert_eq!(destination.end(), 0, "{}", destination.story());
    // The one it left is of no use, and can never run again.
    source.wait();
    let here = source.console.ticks();
    let there = Console(folder.path().join("there-console"));
    // Of the tick in which it moved each console may have a part.
    let moved = there.wait_for(60);
    expect_no_gap(&here);
    expect_no_gap(&moved);
    let (left, came) = (*here.last().unwrap(), moved[0]);
    assert!((left + 1..=left + 2).contains(&came), "left at {left}, came at {came}");
    let left = destination.events("qemu-left").next().expect("the guest's QEMU is told").clone();
    let mut qmp = monitor(Path::new(left["monitor"].as_str().expect("its monitor")));
    assert_eq!(status(&mut qmp), "running");
    // Whoever moves it next finds this QEMU as it was started: left on, the capability would leave the guest's RAM out.
    let capabilities = qmp.execute("query-migrate-capabilities", json!({}), Deadline::after(BOUND)).expect("an answer");
    let all = capabilities.as_array().expect("a list");
    let on: Vec<_> = all.iter().filter(|one| one["state"] == true).map(|one| &one["capability"]).collect();
    assert!(on.is_empty(), "left on: {on:?}");
    end_left(&destination);
    place.expect_nothing_left();
}

/// Moves a tethered guest, strikes, and looks at what comes back.
fn comes_back(machine: &Machine, strike: impl FnOnce(&mut Process, i32)) {
    comes_back_after(machine, |_| {}, strike);
}

/// The same, where something happens at the source before.
fn comes_back_after(machine: &Machine, before: impl FnOnce(&mut Process), strike: impl FnOnce(&mut Process, i32)) {
    let (place, folder) = (Place::new(), shared_memory());
    let mut source = Qemu::start(&place, folder.path(), machine, "here");
    source.wait_until_booted();
    let (mut destination, to) = receive(&place, folder.path(), machine, &[]);
    let mut sender = send(&place, &to, &source.socket, &["--release", "never"]);
    destination.wait_for_event("all-landed");
    let there = Console(folder.path().join("there-console"));
    there.wait_for(120);
    let qemu = destination.seen.iter().find(|event| event["event"] == "vmm-started").expect("told")["pid"].as_i64();
    let qemu = qemu.expect("a pid") as i32;
    assert!(is_running(qemu));
    before(&mut sender);
    strike(&mut destination, qemu);
    let caught = sender.wait_for_event("caught");
    assert!(caught["epoch"].as_u64().is_some_and(|epoch| epoch > 0), "{caught}");
    assert_eq!(sender.end(), 10, "{}", sender.story());
    wait_until_ended(qemu);
    // The source's own QEMU cannot take its guest back, and must not be let go on either.
    source.wait();
    let back = Console(folder.path().join("here-console.standby"));
    let returned = back.wait_for(60);
    let (here, there) = (source.console.ticks(), there.ticks());
    for part in [&here, &there, &returned] {
        expect_no_gap(part);
    }
    // Back to its last commit: after the switch, and at the latest where the destination was struck.
    let (left, lost, first) = (*here.last().unwrap(), *there.last().unwrap(), returned[0]);
    assert!(first > left + 20 && first <= lost + 2, "left at {left}, lost at {lost}, back at {first}");
    let told = sender.events("qemu-left").next().expect("the guest's QEMU is told").clone();
    let mut qmp = monitor(Path::new(told["monitor"].as_str().expect("its monitor")));
    assert_eq!(status(&mut qmp), "running");
    end_left(&sender);
    drop(destination);
    place.expect_nothing_left();
}

#[test]
fn a_tethered_guest_whose_qemu_is_killed_comes_back_in_the_standby_at_its_last_commit() {
    if no_qemu() {
        return;
    }
    let Some(linux) = Linux::here() else { return };
    // Two blocks, one of them above 4 GiB, and two vCPUs.
    let machine = Machine { vcpus: 2, blocks: vec![96, 64], ..Machine::of("q35,max-ram-below-4g=128M", Some(linux)) };
    comes_back(&machine, |destination, qemu| {
        kill(qemu, libc::SIGKILL);
        assert_eq!(destination.end(), 13, "{}", destination.story());
    });
}

#[test]
fn a_standby_that_dies_while_its_guest_is_away_is_replaced_and_the_guest_comes_back_in_the_other() {
    if no_qemu() {
        return;
    }
    let Some(linux) = Linux::here() else { return };
    let standby_dies = |sender: &mut Process| {
        let started = sender.wait_for_event("standby-started");
        let pid = started["pid"].as_i64().expect("a pid") as i32;
        kill(pid, libc::SIGKILL);
        let replaced = sender.wait_for_state("standby-replaced");
        assert!(replaced["why"].as_str().is_some_and(|why| why.contains(&format!("process {pid},"))), "{replaced}");
        assert!(!sender.was("revoking"), "{}", sender.story());
    };
    comes_back_after(&Machine::of("q35", Some(linux)), standby_dies, |destination, qemu| {
        kill(qemu, libc::SIGKILL);
        assert_eq!(destination.end(), 13, "{}", destination.story());
    });
}

#[test]
fn a_tethered_guest_of_a_newer_qemu_comes_back_in_the_standby_when_all_of_its_destination_is_killed() {
    if no_qemu() {
        return;
    }
    let (Some(program), Some(linux)) = (newer_qemu(), Linux::here()) else { return };
    let machine = Machine { program, vcpus: 2, blocks: vec![64, 64], ..Machine::of("q35", Some(linux)) };
    comes_back(&machine, |destination, qemu| {
        kill(qemu, libc::SIGKILL);
        destination.crash();
    });
}

#[test]
fn a_destination_whose_belay_is_killed_takes_its_qemu_with_it_and_the_guest_comes_back() {
    if no_qemu() {
        return;
    }
    let Some(linux) = Linux::here() else { return };
    comes_back(&Machine::of("microvm", Some(linux)), |destination, _| destination.crash());
}

/// A QEMU whose guest is its firmware: quick to start, and nothing is to be seen of it.
fn firmware(place: &Place, folder: &Path, more: &[&str]) -> Qemu {
    let more = more.iter().map(|word| (*word).to_owned()).collect();
    Qemu::start(place, folder, &Machine { blocks: vec![32], more, ..Machine::of("q35", None) }, "here")
}

#[test]
fn a_qemu_that_cannot_be_moved_as_it_is_is_told_why_and_left_alone() {
    if no_qemu() {
        return;
    }
    let (place, folder) = (Place::new(), shared_memory());
    let refused = |qemu: &Qemu, more: &[&str], said: &[&str]| {
        let mut sender = send(&place, "127.0.0.1:9", &qemu.socket, more);
        assert_eq!(sender.end(), 3, "{}", sender.story());
        let story = sender.story();
        for said in said {
            assert!(story.contains(said), "{said} in {story}");
        }
        assert_eq!(status(&mut qemu.qmp()), "running");
    };
    let good = firmware(&place, folder.path(), &[]);
    let mut other = send(&place, "127.0.0.1:9", &good.socket, &[]);
    // Nobody listens there: it was found good, and nothing was changed.
    assert_eq!(other.end(), 4, "{}", other.story());
    assert_eq!(status(&mut good.qmp()), "running");
    let mistyped = place.text("mistyped.qmp");
    let run_dir = place.text("run");
    let mut sender =
        place.belay(&["send", "--json", "--to", "127.0.0.1:9", "--run-dir", &run_dir, "qemu", "--qmp", &mistyped]);
    assert_eq!(sender.end(), 3);
    assert!(sender.story().contains("mistyped.qmp") && sender.story().contains("No such file"), "{}", sender.story());
    drop(good);
    let networked = firmware(&place, folder.path(), &["-netdev", "user,id=n0", "-device", "virtio-net-pci,netdev=n0"]);
    refused(&networked, &[], &["netdev n0: user", "--policy none"]);
    drop(networked);
    let screened = firmware(&place, folder.path(), &["-device", "VGA"]);
    refused(&screened, &[], &["vga.vram", "--policy none"]);
    refused(&screened, &["--output", "lease"], &["vga.vram"]);
    drop(screened);
    let mut private = Machine { blocks: vec![], ..Machine::of("q35", None) };
    private.kind = "q35";
    private.more = ["-object", "memory-backend-ram,id=p,size=32M", "-numa", "node,memdev=p", "-m", "32M"]
        .map(str::to_owned)
        .to_vec();
    let private = Qemu::start(&place, folder.path(), &private, "here");
    refused(
        &private,
        &["--policy", "none"],
        &["-object memory-backend-file,id=p,size=33554432,mem-path=/dev/shm/p,share=on -machine memory-backend=p"],
    );
    place.expect_nothing_left();
}

#[test]
fn a_destination_whose_qemu_fails_before_the_guest_runs_there_leaves_it_where_it_is() {
    if no_qemu() {
        return;
    }
    let (place, folder) = (Place::new(), shared_memory());
    let source = firmware(&place, folder.path(), &[]);
    let wanted = Machine { blocks: vec![32], ..Machine::of("q35", None) };
    let stays = |sender: &mut Process, said: &str| {
        assert_eq!(sender.end(), 5, "{}", sender.story());
        assert!(sender.story().contains(said), "{said} in {}", sender.story());
        let mut qmp = source.qmp();
        assert_eq!(status(&mut qmp), "running");
        // A migration of the operator's own would leave RAM out.
        let capabilities = qmp.execute("query-migrate-capabilities", json!({}), Deadline::after(BOUND));
        let set: Vec<_> =
            capabilities.unwrap().as_array().unwrap().iter().filter(|one| one["state"] == true).cloned().collect();
        assert!(set.iter().all(|one| one["capability"] != "x-ignore-shared"), "{set:?}");
    };
    // It does not start at all: its own words reach the operator before any source calls.
    let nonsense = Machine { kind: "nonsense", ..wanted.clone() };
    let apart = shared_memory();
    let mut destination = starts_receiving(&place, apart.path(), &nonsense, &[]);
    assert_eq!(destination.end(), 3, "{}", destination.story());
    assert!(destination.story().contains("unsupported machine type"), "{}", destination.story());
    assert!(destination.events("listening").next().is_none(), "{}", destination.story());
    // Another machine.
    let other = Machine { blocks: vec![64], ..wanted.clone() };
    let (mut destination, to) = receive(&place, apart.path(), &other, &[]);
    let mut sender = send(&place, &to, &source.socket, &[]);
    stays(&mut sender, "m0 of 32 MiB at the source and m0 of 64 MiB here");
    assert_eq!(destination.end(), 3, "{}", destination.story());
    // It has died while it waited: another takes the guest, which has to wait for its memory then. That one dies when everything is
    // prepared, and the switch is taken back.
    let (mut destination, to) = receive(&place, folder.path(), &wanted, &["--stop-at", "switch-heard"]);
    let ready = destination.events("vmm-ready").next().cloned().expect("told before it listens");
    let blocks = |file: &str| std::fs::metadata(folder.path().join(file)).expect("the guest's RAM").blocks();
    assert_eq!(blocks("there-m0") * 512, 32 << 20, "allocated before any source calls");
    let waiting = ready["pid"].as_i64().expect("a pid") as i32;
    kill(waiting, libc::SIGKILL);
    wait_until_ended(waiting);
    let mut sender = send(&place, &to, &source.socket, &[]);
    let started = destination.wait_for_event("vmm-started")["pid"].as_i64().expect("a pid") as i32;
    sender.wait_for_event("switch-sent");
    let end = Instant::now() + BOUND;
    while !is_frozen(destination.pid()) {
        assert!(Instant::now() < end, "it does not come to the switch: {}", destination.story());
        std::thread::sleep(Duration::from_millis(2));
    }
    kill(started, libc::SIGKILL);
    destination.signal(libc::SIGCONT);
    stays(&mut sender, "the VMM process ended");
    assert_eq!(destination.end(), 5, "{}", destination.story());
    place.expect_nothing_left();
}
