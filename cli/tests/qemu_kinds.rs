//! Machine types, numbers of vCPUs, ways to carry pages and versions of QEMU: a guest of each is tethered and released twice, and goes on where it
//! was. It checks its own memory all along.

mod qemu_guest;
mod running;

use qemu_guest::moving::{end_left, receive, send};
use qemu_guest::{Console, Linux, Machine, Qemu, expect_no_gap, newer_qemu, no_qemu, qemu, shared_memory};
use running::Place;
use std::path::Path;

/// Over tcp, and on from there over memory that both hosts have.
fn moves_and_moves_on(program: Option<String>, kind: &'static str, vcpus: usize) {
    if no_qemu() {
        return;
    }
    let (Some(program), Some(linux)) = (program, Linux::here()) else { return };
    let (place, folders) = (Place::new(), [shared_memory(), shared_memory()]);
    let machine = Machine { program, vcpus, ..Machine::of(kind, Some(linux)) };
    let mut source = Qemu::start(&place, folders[0].path(), &machine, "here");
    source.wait_until_booted();
    let door = format!("unix:{}", place.text("door"));
    let (mut monitor, mut before, mut left_to_itself) = (source.socket.clone(), source.console.ticks(), Vec::new());
    for (folder, listen) in folders.iter().zip(["127.0.0.1:0", &door]) {
        let (mut destination, to) = receive(&place, folder.path(), &machine, &["--listen", listen]);
        let mut sender = send(&place, &to, &monitor, &[]);
        assert_eq!(sender.end(), 0, "{}", sender.story());
        assert_eq!(destination.end(), 0, "{}", destination.story());
        assert!(destination.was("tethered"), "{}", destination.story());
        let moved = Console(folder.path().join("there-console")).wait_for(60);
        expect_no_gap(&moved);
        assert!(moved[0] > *before.last().expect("it ticked"), "went back from {before:?} to {moved:?}");
        let left = destination.events("qemu-left").next().expect("the guest's QEMU is told").clone();
        (monitor, before) = (Path::new(left["monitor"].as_str().expect("its monitor")).to_owned(), moved);
        left_to_itself.push(destination);
    }
    source.wait();
    left_to_itself.iter().for_each(end_left);
    place.expect_nothing_left();
}

#[test]
fn a_q35_of_four_vcpus_moves_and_moves_on() {
    moves_and_moves_on(Some(qemu()), "q35", 4);
}

#[test]
fn a_pc_of_two_vcpus_moves_and_moves_on() {
    moves_and_moves_on(Some(qemu()), "pc", 2);
}

#[test]
fn a_microvm_of_one_vcpu_moves_and_moves_on() {
    moves_and_moves_on(Some(qemu()), "microvm", 1);
}

#[test]
fn a_q35_of_two_vcpus_moves_and_moves_on_in_a_newer_qemu() {
    moves_and_moves_on(newer_qemu(), "q35", 2);
}

#[test]
fn a_pc_of_four_vcpus_moves_and_moves_on_in_a_newer_qemu() {
    moves_and_moves_on(newer_qemu(), "pc", 4);
}

#[test]
fn a_microvm_of_one_vcpu_moves_and_moves_on_in_a_newer_qemu() {
    moves_and_moves_on(newer_qemu(), "microvm", 1);
}
