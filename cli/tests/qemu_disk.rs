//! A tethered QEMU guest with a writable disk: whatever dies, every sector is of the very generation that the guest's memory says.

mod qemu_guest;
mod running;

use qemu_guest::{Console, Linux, Machine, Qemu, no_qemu, qemu};
use running::{Place, Process, kill};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

const SECTORS: usize = 256;

/// One image that both hosts have, and a relay on each.
struct Shared {
    image: PathBuf,
    here: Process,
    there: Process,
}

fn relay(place: &Place, folder: &Path, image: &Path, name: &str, more: &[&str]) -> Process {
    let path = |suffix: &str| folder.join(format!("{name}.{suffix}")).display().to_string();
    let (guest, hand, image) = (path("nbd"), path("hand"), image.display().to_string());
    let words = [&["disk", "--json", "--guest", &guest, "--hand", &hand, "--image", &image], more].concat();
    place.belay(&words)
}

impl Shared {
    fn new(place: &Place, folder: &Path) -> Self {
        // On a disk, as images are.
        let image = place.path("image");
        fs::write(&image, vec![0; 1 << 20]).expect("an image");
        let mut here = relay(place, folder, &image, "here", &[]);
        let mut there = relay(place, folder, &image, "there", &["--incoming"]);
        here.wait_for_event("listening");
        there.wait_for_event("listening");
        Self { image, here, there }
    }
}

fn machine(linux: Linux) -> Machine {
    Machine { sectors: SECTORS, ..Machine::of("pc", Some(linux)) }
}

/// A destination that waits for the guest, and where.
fn receive(place: &Place, folder: &Path, machine: &Machine) -> (Process, String) {
    let (state_dir, hand, program) = (place.text("there"), folder.join("there.hand").display().to_string(), qemu());
    let arguments = machine.arguments(folder, "there");
    let run_dir = place.text("run");
    let mut words = vec!["receive", "--json", "--listen", "127.0.0.1:0", "--state-dir", &state_dir];
    words.extend(["--run-dir", &run_dir, "--name", "there"]);
    words.extend(["qemu", "--disk", &hand, "--", &program]);
    words.extend(arguments.iter().map(String::as_str));
    let mut destination = place.belay(&words);
    let to = destination.wait_for_event("listening")["address"].as_str().expect("an address").to_owned();
    (destination, to)
}

fn send(place: &Place, folder: &Path, to: &str, socket: &Path, more: &[&str]) -> Process {
    let (kept, run_dir) = (place.text("here"), place.text("run"));
    let (hand, socket) = (folder.join("here.hand").display().to_string(), socket.display().to_string());
    let mut words = vec!["send", "--json", "--to", to, "--state-dir", &kept, "--run-dir", &run_dir];
    words.extend(more);
    words.extend(["qemu", "--disk", &hand, "--qmp", &socket]);
    place.belay(&words)
}

/// Moves a guest, lets `strike` hit its destination, and sees the guest check its disk at home.
fn survives(strike: impl Fn(&mut Process, &mut Process)) {
    if no_qemu() {
        return;
    }
    let Some(linux) = Linux::here() else { return };
    let (place, folder) = (Place::new(), qemu_guest::shared_memory());
    let machine = machine(linux);
    let mut shared = Shared::new(&place, folder.path());
    let mut source = Qemu::start(&place, folder.path(), &machine, "here");
    source.console.wait_until_booted();
    source.console.wait_for_disk(1);
    let (mut destination, to) = receive(&place, folder.path(), &machine);
    // Long enough that a destination which is struck has always written something that is not committed.
    let more = ["--release", "never", "--period", "100ms"];
    let mut sender = send(&place, folder.path(), &to, &source.socket, &more);
    destination.wait_for_event("all-landed");
    Console(folder.path().join("there-console")).wait_for_disk(2);
    // Nobody else gets to write the image, wherever the guest is.
    let mut second = relay(&place, folder.path(), &shared.image, "second", &[]);
    assert_eq!(second.end(), 1, "{}", second.story());
    assert!(second.story().contains("somebody else writes"), "{}", second.story());
    let begun = Instant::now();
    strike(&mut destination, &mut shared.there);
    sender.wait_for_event("caught");
    println!("{} ms from the strike until the guest was caught", begun.elapsed().as_millis());
    Console(folder.path().join("here-console.standby")).wait_for_disk(3);
    assert_eq!(sender.end(), 10, "{}", sender.story());
    source.wait();
    // Nobody has its relay in hand any more, and it goes on.
    Console(folder.path().join("here-console.standby")).wait_for_disk(4);
    drop((shared.here, shared.there, destination));
}

fn qemu_of(destination: &Process) -> i32 {
    let started = destination.seen.iter().find(|event| event["event"] == "vmm-started").expect("told");
    started["pid"].as_i64().expect("a pid") as i32
}

#[test]
fn p3_every_sector_is_of_its_generation_after_the_destinations_qemu_was_killed() {
    survives(|destination, _| kill(qemu_of(destination), libc::SIGKILL));
}

#[test]
fn p3_every_sector_is_of_its_generation_after_the_destinations_belay_was_killed() {
    survives(|destination, _| destination.signal(libc::SIGKILL));
}

#[test]
fn p3_every_sector_is_of_its_generation_after_both_were_killed() {
    survives(|destination, _| {
        let qemu = qemu_of(destination);
        destination.signal(libc::SIGKILL);
        kill(qemu, libc::SIGKILL);
    });
}

#[test]
fn a_released_guest_has_its_disk_and_its_image_is_its_new_hosts() {
    moves(&["--release", "when-landed", "--period", "100ms"]);
}

#[test]
fn an_untethered_guest_takes_its_disk_with_it() {
    moves(&["--policy", "none"]);
}

fn moves(more: &[&str]) {
    if no_qemu() {
        return;
    }
    let Some(linux) = Linux::here() else { return };
    let (place, folder) = (Place::new(), qemu_guest::shared_memory());
    let machine = machine(linux);
    let mut shared = Shared::new(&place, folder.path());
    let mut source = Qemu::start(&place, folder.path(), &machine, "here");
    source.console.wait_until_booted();
    source.console.wait_for_disk(1);
    let (mut destination, to) = receive(&place, folder.path(), &machine);
    let mut sender = send(&place, folder.path(), &to, &source.socket, more);
    assert_eq!(sender.end(), 0, "{}", sender.story());
    assert_eq!(destination.end(), 0, "{}", destination.story());
    source.wait();
    shared.there.wait_for("the image is its host's", |event| event["event"] == "relay" && event["gate"] == "open");
    let console = Console(folder.path().join("there-console"));
    console.wait_for_disk(2);
    // The relay it left ends, and is not missed.
    shared.here.signal(libc::SIGTERM);
    assert_eq!(shared.here.end(), 0, "{}", shared.here.story());
    console.wait_for_disk(4);
    let image = fs::read(&shared.image).expect("the image");
    assert!(image[..SECTORS * 512].iter().filter(|&&byte| byte != 0).count() > SECTORS * 256, "it is in the image");
}

#[test]
fn p9_a_source_whose_disk_relay_is_killed_says_so_and_leaves_the_guest_where_it_is_whole() {
    if no_qemu() {
        return;
    }
    let Some(linux) = Linux::here() else { return };
    let (place, folder) = (Place::new(), qemu_guest::shared_memory());
    let machine = machine(linux);
    let mut shared = Shared::new(&place, folder.path());
    let source = Qemu::start(&place, folder.path(), &machine, "here");
    source.console.wait_until_booted();
    source.console.wait_for_disk(1);
    let (mut destination, to) = receive(&place, folder.path(), &machine);
    let mut sender = send(&place, folder.path(), &to, &source.socket, &["--release", "never", "--period", "100ms"]);
    destination.wait_for_event("all-landed");
    let console = Console(folder.path().join("there-console"));
    console.wait_for_disk(2);
    shared.here.crash();
    let told = sender.wait_for_event("failed");
    assert!(told["what"].as_str().is_some_and(|what| what.contains("disk relay")), "{told}");
    // The source takes nothing back that it could not have whole.
    sender.signal(libc::SIGINT);
    sender.wait_for_state("cannot-revoke");
    sender.crash();
    destination.wait_for_state("fenced");
    let rounds = console.disk_rounds();
    let mut promoted =
        place.belay(&["promote", "there", "--i-know-the-source-is-gone", "--run-dir", &place.text("run")]);
    assert_eq!(promoted.end(), 0, "{}", promoted.story());
    assert_eq!(destination.end(), 0, "{}", destination.story());
    shared.there.wait_for("the image is its host's", |event| event["event"] == "relay" && event["gate"] == "open");
    console.wait_for_disk(rounds + 2);
}

#[test]
fn p3_a_destination_whose_disk_relay_is_killed_gives_the_guest_back_at_its_last_commit() {
    survives(|_, there| there.crash());
}

#[test]
fn a_writable_disk_needs_output_commit_and_its_relay() {
    if no_qemu() {
        return;
    }
    let (place, folder) = (Place::new(), qemu_guest::shared_memory());
    let machine = Machine { sectors: SECTORS, blocks: vec![32], ..Machine::of("pc", None) };
    let shared = Shared::new(&place, folder.path());
    let source = Qemu::start(&place, folder.path(), &machine, "here");
    let mut refused = send(&place, folder.path(), "127.0.0.1:1", &source.socket, &["--output", "lease"]);
    assert_eq!(refused.end(), 2, "{}", refused.story());
    assert!(refused.story().contains("--output commit"), "{}", refused.story());
    let socket = source.socket.display().to_string();
    let mut refused = place.belay(&["send", "--json", "--to", "127.0.0.1:1", "qemu", "--qmp", &socket]);
    assert_ne!(refused.end(), 0);
    assert!(refused.story().contains("belay disk"), "{}", refused.story());
    drop(shared);
}
