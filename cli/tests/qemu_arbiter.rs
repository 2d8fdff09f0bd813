//! A QEMU guest whose hosts ask an arbiter: caught with its word, and gone on alone with it.

#[path = "running/etcd.rs"]
mod etcd;
mod qemu_guest;
mod running;

use belay_checkpoint::arbiter::Standing;
use etcd::Server;
use qemu_guest::moving::{end_left, is_frozen, receive, send, started, wait_until_ended};
use qemu_guest::{Console, Linux, Machine, Qemu, expect_no_gap, monitor, no_qemu, shared_memory, status};
use running::{Place, kill};
use std::path::Path;

/// One guest: its destination dies and it is caught, it leaves again, its source dies and it stays where it is.
#[test]
fn p2_of_a_qemu_guests_hosts_the_one_that_is_left_has_the_guest_with_the_arbiters_word() {
    if no_qemu() {
        return;
    }
    let (Some(linux), Some(program)) = (Linux::here(), etcd::etcd()) else { return };
    let etcd = Server::start(program);
    let address = etcd.address();
    let arbiter = ["--arbiter", &address, "--guest-name", "vm1"];
    let goes_on = [&arbiter[..], &["--on-source-loss", "continue"]].concat();
    let tethered = [&arbiter[..], &["--release", "never"]].concat();
    let (place, folder) = (Place::new(), shared_memory());
    let machine = Machine::of("q35", Some(linux));
    let source = Qemu::start(&place, folder.path(), &machine, "here");
    source.wait_until_booted();

    let (mut destination, to) = receive(&place, folder.path(), &machine, &goes_on);
    let mut sender = send(&place, &to, &source.socket, &tethered);
    destination.wait_for_event("all-landed");
    destination.wait_for_event("committed");
    assert_eq!(etcd.standing("vm1"), Some(Standing::Lent));
    let first_qemu = started(&mut destination);
    destination.crash();
    assert_eq!(sender.end(), 10, "{}", sender.story());
    assert!(sender.was("arbiter-granted"), "{}", sender.story());
    assert_eq!(etcd.standing("vm1"), Some(Standing::TakenBack));
    wait_until_ended(first_qemu);
    wait_until_ended(source.pid());
    let caught = Console(folder.path().join("here-console.standby"));
    expect_no_gap(&caught.wait_for(60));
    let left = sender.events("qemu-left").next().expect("the guest's QEMU is told").clone();
    let (standby, socket) = (left["pid"].as_i64().expect("a pid") as i32, left["monitor"].as_str().expect("a path"));

    let (mut destination, to) = receive(&place, folder.path(), &machine, &goes_on);
    let mut sender = send(&place, &to, Path::new(socket), &tethered);
    destination.wait_for_event("all-landed");
    destination.wait_for_event("committed");
    sender.crash();
    assert_eq!(destination.end(), 0, "{}", destination.story());
    assert!(destination.was("arbiter-granted") && destination.was("owner"), "{}", destination.story());
    assert_eq!(etcd.standing("vm1"), Some(Standing::Kept));
    let there = Console(folder.path().join("there-console"));
    let ticked = there.ticks().len();
    expect_no_gap(&there.wait_for(ticked + 100));
    let monitor_there =
        destination.events("qemu-left").next().expect("told")["monitor"].as_str().expect("a path").to_owned();
    assert_eq!(status(&mut monitor(Path::new(&monitor_there))), "running");
    end_left(&destination);
    // Its belay is dead, and it does not run by itself: its guest has left.
    assert!(is_frozen(standby));
    kill(standby, libc::SIGKILL);
    drop((destination, sender));
    place.expect_nothing_left();
}
