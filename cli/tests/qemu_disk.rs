//! A tethered QEMU guest with a writable disk: whatever dies, every sector is of the very generation that the guest's memory says.

#[path = "running/mounted.rs"]
mod mounted;
mod qemu_guest;
mod running;

use mounted::Mounted;
use qemu_guest::moving::is_frozen;
use qemu_guest::{Console, Linux, Machine, Qemu, SharedMemory, newer_qemu, no_qemu, status, tell};
use running::{Place, Process, kill};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use std::time::{Duration, Instant};

const SECTORS: usize = 256;
const LOOPBACK: &str = "127.0.0.1:0";

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
        Self::of(place, folder, [image.clone(), image])
    }

    /// `images`: as each host knows it.
    fn of(place: &Place, folder: &Path, [image, there]: [PathBuf; 2]) -> Self {
        let mut here = relay(place, folder, &image, "here", &[]);
        let mut there = relay(place, folder, &there, "there", &["--incoming"]);
        here.wait_for_event("listening");
        there.wait_for_event("listening");
        Self { image, here, there }
    }
}

fn machine(linux: Linux) -> Machine {
    Machine { sectors: SECTORS, ..Machine::of("pc", Some(linux)) }
}

/// A destination that waits for the guest, and where.
fn receive(place: &Place, folder: &Path, machine: &Machine, listen: &str) -> (Process, String) {
    receive_as(place, folder, &machine.program, &machine.arguments(folder, "there"), listen)
}

/// As [`receive`], by a command line.
fn receive_as(place: &Place, folder: &Path, program: &str, arguments: &[String], listen: &str) -> (Process, String) {
    let (state_dir, hand) = (place.text("there"), folder.join("there.hand").display().to_string());
    let run_dir = place.text("run");
    let mut words = vec!["receive", "--json", "--listen", listen, "--state-dir", &state_dir];
    words.extend(["--run-dir", &run_dir, "--name", "there"]);
    words.extend(["qemu", "--disk", &hand, "--", program]);
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

/// A guest with a disk that is tethered, all of it there, and has found its disk right there.
struct Tethered {
    place: Place,
    folder: SharedMemory,
    shared: Shared,
    source: Qemu,
    destination: Process,
    sender: Process,
}

impl Tethered {
    /// `None` where this machine cannot have one.
    fn new(local: bool, sending: &[&str]) -> Option<Self> {
        if no_qemu() {
            return None;
        }
        let (place, folder) = (Place::new(), qemu_guest::shared_memory());
        let shared = Shared::new(&place, folder.path());
        Some(Self::of(place, folder, shared, machine(Linux::here()?), local, sending))
    }

    fn of(place: Place, folder: SharedMemory, shared: Shared, machine: Machine, local: bool, sending: &[&str]) -> Self {
        let listen = if local { format!("unix:{}", place.text("door")) } else { LOOPBACK.to_owned() };
        let source = Qemu::start(&place, folder.path(), &machine, "here");
        source.wait_until_booted();
        source.console.wait_for_disk(1);
        let (mut destination, to) = receive(&place, folder.path(), &machine, &listen);
        // Long enough that a destination which is struck has always written something that is not committed.
        let more = [&["--release", "never", "--period", "100ms"], sending].concat();
        let sender = send(&place, folder.path(), &to, &source.socket, &more);
        destination.wait_for_event("all-landed");
        let there = Self { place, folder, shared, source, destination, sender };
        there.console().wait_for_disk(2);
        there
    }

    fn console(&self) -> Console {
        Console(self.folder.path().join("there-console"))
    }

    fn at_home(&self) -> Console {
        Console(self.folder.path().join("here-console.standby"))
    }

    /// Sees the guest check its disk at home; when it was caught.
    fn expect_caught(mut self) -> Instant {
        self.sender.wait_for_event("caught");
        let caught = Instant::now();
        self.at_home().wait_for_disk(3);
        assert_eq!(self.sender.end(), 10, "{}", self.sender.story());
        self.source.wait();
        // Nobody has its relay in hand any more, and it goes on.
        self.at_home().wait_for_disk(4);
        drop((self.shared.here, self.shared.there, self.destination));
        caught
    }
}

/// Moves a guest, lets `strike` hit its destination, and sees the guest check its disk at home.
fn survives(strike: impl Fn(&mut Process, &mut Process)) {
    let Some(tethered) = Tethered::new(false, &[]) else { return };
    comes_back(tethered, strike);
}

fn comes_back(mut tethered: Tethered, strike: impl Fn(&mut Process, &mut Process)) {
    // Nobody else gets to write the image, wherever the guest is.
    let image = tethered.shared.image.clone();
    let mut second = relay(&tethered.place, tethered.folder.path(), &image, "second", &[]);
    assert_eq!(second.end(), 1, "{}", second.story());
    assert!(second.story().contains("somebody else writes"), "{}", second.story());
    let begun = Instant::now();
    strike(&mut tethered.destination, &mut tethered.shared.there);
    let caught = tethered.expect_caught();
    println!("{} ms from the strike until the guest was caught", caught.duration_since(begun).as_millis());
}

/// No process's file grows beyond this, and none is written there: for a relay, a file system that is full, or has room again.
fn limit_files(process: &Process, bytes: libc::rlim_t) {
    let limit = libc::rlimit { rlim_cur: bytes, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: prlimit(2) reads a struct rlimit that lives through the call, and writes nothing.
    let done = unsafe { libc::prlimit(process.pid(), libc::RLIMIT_FSIZE, &limit, std::ptr::null_mut()) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

const UNWRITABLE: &str = "cannot be done to the image";

fn says_unwritable(event: &serde_json::Value) -> bool {
    event["event"] == "failed" && event["what"].as_str().is_some_and(|what| what.contains(UNWRITABLE))
}

#[test]
fn p3_a_catch_waits_for_an_image_that_has_no_room_and_goes_on_by_itself_once_it_has() {
    let Some(mut tethered) = Tethered::new(false, &[]) else { return };
    limit_files(&tethered.shared.here, 0);
    let told = tethered.sender.wait_for("the image is full", says_unwritable);
    assert!(told["what"].as_str().is_some_and(|what| what.contains("File too large")), "{told}");
    // The guest goes on meanwhile, and none of it is lost.
    let console = tethered.console();
    console.wait_for_disk(console.disk_rounds() + 1);
    tethered.destination.signal(libc::SIGKILL);
    tethered.sender.wait_for_state("cannot-revoke");
    assert!(tethered.at_home().ticks().is_empty(), "it must not run ahead of its disk");
    limit_files(&tethered.shared.here, libc::RLIM_INFINITY);
    tethered.expect_caught();
}

#[test]
fn p3_an_image_that_fills_up_when_the_old_destination_is_shut_out_already_is_waited_for() {
    // What commits while the source is frozen commits without it: in memory that both have.
    let sending = ["--fabric", "local", "--lease", "30s", "--stop-at", "catch-unrevoked"];
    let Some(mut tethered) = Tethered::new(true, &sending) else { return };
    tethered.sender.signal(libc::SIGINT);
    let end = Instant::now() + running::BOUND;
    while !is_frozen(tethered.sender.pid()) {
        assert!(Instant::now() < end, "it does not stop; it said {}", tethered.sender.story());
        std::thread::sleep(Duration::from_millis(5));
    }
    // Nobody folds any more. What the guest writes now commits, and is found in the last read.
    let console = tethered.console();
    console.wait_for_disk(console.disk_rounds() + 1);
    tethered.destination.hear();
    for _ in 0..2 {
        tethered.destination.wait_for_event("committed");
    }
    limit_files(&tethered.shared.here, 0);
    tethered.sender.signal(libc::SIGCONT);
    tethered.sender.wait_for_state("catch-stuck");
    tethered.sender.wait_for("the image is full", says_unwritable);
    // A person who tries it again too early ends nothing: it is in this process alone.
    tethered.sender.signal(libc::SIGINT);
    tethered.sender.wait_for_state("catch-stuck");
    assert!(tethered.at_home().ticks().is_empty(), "it must not run ahead of its disk");
    limit_files(&tethered.shared.here, libc::RLIM_INFINITY);
    tethered.expect_caught();
}

/// An image whose second half has no room in its file system, of a guest that has not written there yet: what it writes there at its destination
/// commits, and cannot be done to the image until there is room. `images` are made of a file, for each host one; `said` is why it cannot.
fn waits_for_room(images: impl Fn(&Path) -> Option<[PathBuf; 2]>, said: &str) {
    if no_qemu() {
        return;
    }
    let Some(linux) = Linux::here() else { return };
    let (place, folder) = (Place::new(), qemu_guest::shared_memory());
    let Some(small) = Mounted::new(&place, "tmpfs", "size=256k") else { return };
    let file = small.path("image");
    fs::File::create(&file).and_then(|file| file.set_len((SECTORS * 512) as u64)).expect("a file without room");
    let Some(images) = images(&file) else { return };
    let shared = Shared::of(&place, folder.path(), images);
    let machine = Machine { obeys: true, ..machine(linux) };
    let mut tethered = Tethered::of(place, folder, shared, machine, false, &[]);
    small.fill();
    tell(tethered.folder.path(), "there", "grow");
    let told = tethered.sender.wait_for("the image has no room", says_unwritable);
    assert!(told["what"].as_str().is_some_and(|what| what.contains(said)), "{told}");
    // The guest goes on meanwhile, and none of it is lost.
    let console = tethered.console();
    console.wait_for_disk(console.disk_rounds() + 1);
    tethered.destination.signal(libc::SIGKILL);
    let waits = ["cannot-revoke", "catch-stuck"];
    tethered.sender.wait_for("a catch that waits", |event| {
        event["event"] == "state" && event["state"].as_str().is_some_and(|state| waits.contains(&state))
    });
    assert!(tethered.at_home().ticks().is_empty(), "it must not run ahead of its disk");
    small.make_room();
    tethered.expect_caught();
}

#[test]
fn p3_a_catch_waits_for_a_file_system_that_is_full_and_goes_on_by_itself_once_it_has_room() {
    waits_for_room(|file| Some([file.to_owned(), file.to_owned()]), "No space left on device");
}

#[test]
fn p3_a_catch_waits_for_a_block_device_that_fails_and_what_it_lost_is_written_again() {
    // Its page cache takes every write, and what the device did not take is told once, by the next flush. Two hosts have two page caches.
    let devices = Mutex::new(Vec::new());
    let one = |file: &Path| {
        let (path, open) = block_device(file)?;
        devices.lock().unwrap().push(open);
        Some(path)
    };
    waits_for_room(|file| Some([one(file)?, one(file)?]), "Input/output error");
}

/// A block device over a file, and what keeps it: it goes with the last who has it open.
fn block_device(file: &Path) -> Option<(PathBuf, fs::File)> {
    let run =
        |words: &[&str]| Command::new("losetup").args(words).output().ok().filter(|output| output.status.success());
    let text = file.to_str().expect("a path of text");
    let Some(made) = run(&["--find", "--show", "--sector-size", "512", text]) else {
        eprintln!("skipped: no block device can be made of a file (losetup)");
        return None;
    };
    let path = String::from_utf8_lossy(&made.stdout).trim().to_owned();
    let open = fs::File::open(&path);
    run(&["--detach", &path]).expect("a device of this test's");
    Some((path.into(), open.expect("the device")))
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
fn p3_every_sector_is_of_its_generation_after_a_newer_qemu_was_killed_at_the_destination() {
    if no_qemu() {
        return;
    }
    let (Some(program), Some(linux)) = (newer_qemu(), Linux::here()) else { return };
    let (place, folder) = (Place::new(), qemu_guest::shared_memory());
    let shared = Shared::new(&place, folder.path());
    let tethered = Tethered::of(place, folder, shared, Machine { program, ..machine(linux) }, false, &[]);
    comes_back(tethered, |destination, _| kill(qemu_of(destination), libc::SIGKILL));
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
    source.wait_until_booted();
    source.console.wait_for_disk(1);
    let (mut destination, to) = receive(&place, folder.path(), &machine, LOOPBACK);
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
    source.wait_until_booted();
    source.console.wait_for_disk(1);
    let (mut destination, to) = receive(&place, folder.path(), &machine, LOOPBACK);
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
fn a_destination_whose_disks_are_others_is_refused_by_their_names_before_the_guest_is_touched() {
    if no_qemu() {
        return;
    }
    let (place, folder) = (Place::new(), qemu_guest::shared_memory());
    let machine = Machine { sectors: SECTORS, blocks: vec![32], ..Machine::of("pc", None) };
    let image = place.path("image");
    fs::write(&image, vec![0; 1 << 20]).expect("an image");
    let mut here = relay(&place, folder.path(), &image, "here", &[]);
    let mut there = relay(&place, folder.path(), &image, "there", &["--incoming", "--name", "other"]);
    here.wait_for_event("listening");
    there.wait_for_event("listening");
    let source = Qemu::start(&place, folder.path(), &machine, "here");
    let arguments = machine.arguments(folder.path(), "there");
    let arguments: Vec<_> = arguments.iter().map(|word| word.replace("export=disk", "export=other")).collect();
    let (mut destination, to) = receive_as(&place, folder.path(), &machine.program, &arguments, LOOPBACK);
    let mut sender = send(&place, folder.path(), &to, &source.socket, &[]);
    assert_eq!(sender.end(), 5, "{}", sender.story());
    let said = "disk of 1048576 bytes at the source and other of 1048576 bytes here";
    assert!(sender.story().contains(said), "{}", sender.story());
    assert_eq!(destination.end(), 3, "{}", destination.story());
    assert_eq!(status(&mut source.qmp()), "running");
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
