//! What else happens to those who move a QEMU guest, and to the guest while it moves: each ends in a state with a name, and the guest runs
//! somewhere or is plainly said to run nowhere.

mod qemu_guest;
mod running;

use belay_transport::Deadline;
use qemu_guest::moving::{end_left, is_frozen, receive, send, started, wait_until_ended};
use qemu_guest::{Console, Linux, Machine, Qemu, expect_no_gap, monitor, no_qemu, qemu, shared_memory, status, tell};
use running::{BOUND, Place, Process, kill};
use serde_json::json;
use std::path::Path;
use std::time::{Duration, Instant};

/// A guest that hears words, at its destination with all its pages, tethered.
struct Away {
    place: Place,
    folder: qemu_guest::SharedMemory,
    source: Qemu,
    destination: Process,
    sender: Process,
}

impl Away {
    fn start(linux: Linux, sent: &[&str]) -> Self {
        let (place, folder) = (Place::new(), shared_memory());
        let machine = Machine { blocks: vec![64, 64], obeys: true, ..Machine::of("q35", Some(linux)) };
        let source = Qemu::start(&place, folder.path(), &machine, "here");
        source.wait_until_booted();
        let (mut destination, to) = receive(&place, folder.path(), &machine, &[]);
        let sender = send(&place, &to, &source.socket, &[&["--release", "never"], sent].concat());
        destination.wait_for_event("all-landed");
        Self { place, folder, source, destination, sender }
    }

    /// Says a word to the guest, once it listens, and waits until it has heard.
    fn tell(&self, word: &str) {
        tell(self.folder.path(), "there", word);
    }

    fn console(&self, name: &str) -> Console {
        Console(self.folder.path().join(format!("{name}-console")))
    }
}

/// Pages in which the files of RAM differ.
fn differing(folder: &Path) -> usize {
    let image = |name: &str, block: usize| std::fs::read(folder.join(format!("{name}-m{block}"))).expect("RAM");
    let pages = |block| {
        let (here, there) = (image("here", block), image("there", block));
        assert_eq!(here.len(), there.len());
        here.chunks(4096).zip(there.chunks(4096)).filter(|(here, there)| here != there).count()
    };
    pages(0) + pages(1)
}

#[test]
fn p3_what_the_source_has_after_the_last_commit_of_a_guest_that_stands_is_its_memory_byte_for_byte() {
    if no_qemu() {
        return;
    }
    let Some(linux) = Linux::here() else { return };
    let mut away = Away::start(linux, &["--period", "25ms"]);
    away.tell("halt");
    // It stands soon. From then on nothing is dirtied, and what is committed and folded after that is all there is.
    let mut clean = 0;
    away.destination.wait_for("checkpoints without a page", |event| {
        if event["event"] == "committed" {
            clean = if event["pages"] == 0 { clean + 1 } else { 0 };
        }
        clean == 3
    });
    let end = Instant::now() + BOUND;
    loop {
        match differing(away.folder.path()) {
            0 => break,
            pages => assert!(Instant::now() < end, "{pages} pages differ"),
        }
        // The destination's pipe must not fill meanwhile.
        away.destination.hear();
    }
    away.destination.signal(libc::SIGTERM);
    assert_eq!(away.sender.end(), 10, "{}", away.sender.story());
    assert_eq!(away.destination.end(), 13, "{}", away.destination.story());
    end_left(&away.sender);
    away.source.wait();
    away.place.expect_nothing_left();
}

#[test]
fn a_guest_that_powers_itself_off_under_the_tether_is_back_at_its_last_commit() {
    if no_qemu() {
        return;
    }
    let Some(linux) = Linux::here() else { return };
    // Longer than a guest takes to power off: nothing commits that has heard the word.
    let mut away = Away::start(linux, &["--period", "1s"]);
    let qemu = started(&mut away.destination);
    away.destination.wait_for_event("committed");
    tell(away.folder.path(), "there", "off");
    assert_eq!(away.sender.end(), 10, "{}", away.sender.story());
    assert_eq!(away.destination.end(), 13, "{}", away.destination.story());
    wait_until_ended(qemu);
    // It goes on from before, or ends once more: it was told so once, and a second time by nobody.
    let left = away.sender.events("qemu-left").next().expect("the guest's QEMU is told").clone();
    let (pid, back) = (left["pid"].as_i64().expect("a pid") as i32, away.console("here").0.with_extension("standby"));
    let end = Instant::now() + BOUND;
    while running::is_running(pid) && Console(back.clone()).ticks().len() < 100 {
        assert!(Instant::now() < end, "it neither goes on nor ends");
        std::thread::sleep(Duration::from_millis(10));
    }
    expect_no_gap(&Console(back).ticks());
    end_left(&away.sender);
    away.source.wait();
    away.place.expect_nothing_left();
}

#[test]
fn a_guest_that_starts_again_under_the_tether_is_caught_as_the_one_it_is_then() {
    if no_qemu() {
        return;
    }
    let Some(linux) = Linux::here() else { return };
    let mut away = Away::start(linux, &["--period", "25ms"]);
    let before = *away.console("there").wait_for(20).last().expect("it ticks");
    away.tell("again");
    // The second boot's ticks begin at one.
    let there = away.console("there");
    let end = Instant::now() + Duration::from_secs(240);
    let second = loop {
        let ticks = there.ticks();
        match ticks.iter().rposition(|&tick| tick == 1) {
            Some(at) if at > 0 && ticks.len() > at + 20 => break ticks[at..].to_vec(),
            _ => assert!(Instant::now() < end, "it does not start again: {}", away.destination.story()),
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    expect_no_gap(&second);
    away.destination.hear();
    away.destination.wait_for_event("committed");
    let qemu = started(&mut away.destination);
    kill(qemu, libc::SIGKILL);
    assert_eq!(away.sender.end(), 10, "{}", away.sender.story());
    assert_eq!(away.destination.end(), 13, "{}", away.destination.story());
    let lost = *there.ticks().last().expect("it ticked");
    let back = Console(away.console("here").0.with_extension("standby")).wait_for(60);
    expect_no_gap(&back);
    assert!(back[0] <= lost + 2, "before: {before}, lost at {lost}, back at {}", back[0]);
    end_left(&away.sender);
    away.source.wait();
    away.place.expect_nothing_left();
}

#[test]
fn a_guest_that_powers_itself_off_before_it_has_left_is_said_to_have_ended() {
    if no_qemu() {
        return;
    }
    let Some(linux) = Linux::here() else { return };
    let (place, folder) = (Place::new(), shared_memory());
    let machine = Machine { blocks: vec![64, 64], obeys: true, ..Machine::of("q35", Some(linux)) };
    let mut source = Qemu::start(&place, folder.path(), &machine, "here");
    source.wait_until_booted();
    let (mut destination, to) = receive(&place, folder.path(), &machine, &[]);
    let mut sender = send(&place, &to, &source.socket, &["--stop-at", "source-prepared"]);
    let end = Instant::now() + BOUND;
    while !is_frozen(sender.pid()) {
        assert!(Instant::now() < end, "{}", sender.story());
        std::thread::sleep(Duration::from_millis(5));
    }
    tell(folder.path(), "here", "off");
    source.wait();
    sender.signal(libc::SIGCONT);
    assert_eq!(sender.end(), 12, "{}", sender.story());
    assert!(sender.story().contains("its QEMU has ended"), "{}", sender.story());
    assert_eq!(destination.end(), 5, "{}", destination.story());
    place.expect_nothing_left();
}

/// A QEMU whose guest is its firmware.
fn firmware(kind: &'static str, more: &[&str]) -> Machine {
    let more = more.iter().map(|word| (*word).to_owned()).collect();
    Machine { blocks: vec![32], more, ..Machine::of(kind, None) }
}

/// One that waits for a guest, which somebody else has started.
fn waiting(place: &Place, folder: &Path, name: &str) -> Qemu {
    Qemu::start(place, folder, &firmware("q35", &["-incoming", "defer", "-S"]), name)
}

#[test]
fn a_second_belay_on_the_same_qemu_is_turned_away_on_either_host_and_changes_nothing() {
    if no_qemu() {
        return;
    }
    let (place, folder) = (Place::new(), shared_memory());
    let source = Qemu::start(&place, folder.path(), &firmware("q35", &[]), "here");
    let there = waiting(&place, folder.path(), "there");
    let socket = there.socket.display().to_string();
    let attach = |name: &str| {
        let state_dir = place.text(name);
        let words =
            ["receive", "--json", "--listen", "127.0.0.1:0", "--state-dir", &state_dir, "qemu", "--qmp", &socket];
        place.belay(&words)
    };
    // Told to end before any guest came: the QEMU is not belay's, and waits for the next.
    let mut early = attach("none");
    early.wait_for_event("listening");
    early.signal(libc::SIGTERM);
    assert_eq!(early.end(), 130, "{}", early.story());
    let mut first = attach("one");
    let to = first.wait_for_event("listening")["address"].as_str().expect("an address").to_owned();
    let mut second = attach("two");
    assert_eq!(second.end(), 3, "{}", second.story());
    assert!(second.story().contains("does not greet"), "{}", second.story());
    // The standby by a command line of its own.
    let program = qemu();
    let standby = firmware("q35", &[]).arguments(folder.path(), "here");
    let (state_dir, run_dir, monitor_here) =
        (place.text("here"), place.text("run"), source.socket.display().to_string());
    let mut words =
        vec!["send", "--json", "--to", &to, "--state-dir", &state_dir, "--run-dir", &run_dir, "--release", "never"];
    words.extend(["qemu", "--qmp", &monitor_here, "--", &program]);
    words.extend(standby.iter().map(String::as_str));
    let mut sender = place.belay(&words);
    first.wait_for_event("all-landed");
    assert_eq!(started(&mut first), there.pid());
    let mut again = send(&place, &to, &source.socket, &[]);
    assert_eq!(again.end(), 3, "{}", again.story());
    assert!(again.story().contains("does not greet"), "{}", again.story());
    // The first is not disturbed, and its guest comes back into the standby that was named.
    first.wait_for_event("committed");
    first.crash();
    assert_eq!(sender.end(), 10, "{}", sender.story());
    let left = sender.events("qemu-left").next().expect("told").clone();
    assert_eq!(status(&mut monitor(Path::new(left["monitor"].as_str().expect("its monitor")))), "running");
    wait_until_ended(there.pid());
    end_left(&sender);
    place.expect_nothing_left();
}

#[test]
fn a_destination_whose_memory_has_no_room_says_so_before_any_guest_comes() {
    if no_qemu() {
        return;
    }
    let place = Place::new();
    let small = place.path("small");
    std::fs::create_dir(&small).expect("a folder");
    // A tmpfs that ends with the mount namespace of that belay.
    let mut command = std::process::Command::new("unshare");
    let script = format!("mount -t tmpfs -o size=8m none {} && exec \"$@\"", small.display());
    command.args([
        "--mount",
        "sh",
        "-c",
        &script,
        "sh",
        running::BELAY,
        "receive",
        "--json",
        "--listen",
        "127.0.0.1:0",
    ]);
    command.args(["--state-dir", &place.text("there"), "qemu", "--", &qemu()]);
    command.args(firmware("q35", &[]).arguments(&small, "there"));
    let mut destination = place.start(command);
    if destination.wait_for_event_or_end("operable").is_none() {
        return eprintln!("skipped: no mount namespace: {}", destination.story());
    }
    assert_eq!(destination.end(), 3, "{}", destination.story());
    assert!(destination.events("listening").next().is_none(), "{}", destination.story());
    assert!(destination.story().contains("space"), "{}", destination.story());
    place.expect_nothing_left();
}

#[test]
fn a_frozen_qemu_is_no_riddle_before_the_switch_nor_after_it() {
    if no_qemu() {
        return;
    }
    let (place, folder) = (Place::new(), shared_memory());
    let machine = firmware("q35", &[]);
    let source = Qemu::start(&place, folder.path(), &machine, "here");
    kill(source.pid(), libc::SIGSTOP);
    let mut early = send(&place, "127.0.0.1:9", &source.socket, &[]);
    assert_eq!(early.end(), 3, "{}", early.story());
    assert!(early.story().contains("does not greet"), "{}", early.story());
    kill(source.pid(), libc::SIGCONT);
    assert_eq!(status(&mut source.qmp()), "running");
    let (mut destination, to) = receive(&place, folder.path(), &machine, &[]);
    let mut sender = send(&place, &to, &source.socket, &["--release", "never"]);
    destination.wait_for_event("all-landed");
    destination.wait_for_event("committed");
    let there = started(&mut destination);
    kill(there, libc::SIGSTOP);
    // It answers no order to stop. A guest that cannot be checkpointed is given up here, and comes back there.
    assert_eq!(sender.end(), 10, "{}\n{}", sender.story(), destination.story());
    assert_eq!(destination.end(), 13, "{}", destination.story());
    // In the middle of a checkpoint, or before the next one.
    let told = destination.was("stop-timed-out") || destination.was("tether-failed");
    assert!(told, "{}", destination.story());
    wait_until_ended(there);
    let left = sender.events("qemu-left").next().expect("told").clone();
    assert_eq!(status(&mut monitor(Path::new(left["monitor"].as_str().expect("its monitor")))), "running");
    end_left(&sender);
    place.expect_nothing_left();
}

#[test]
fn a_dimm_that_was_plugged_in_later_moves_to_where_it_is_on_the_command_line() {
    if no_qemu() {
        return;
    }
    let (place, folder) = (Place::new(), shared_memory());
    let sized = |machine: &Machine, name: &str| -> Vec<String> {
        let mut words = machine.arguments(folder.path(), name);
        let at = words.iter().position(|word| word == "-m").expect("its size") + 1;
        words[at] = "32M,slots=2,maxmem=1G".to_owned();
        words
    };
    let slots = firmware("q35", &["-m", "32M,slots=2,maxmem=1G"]);
    let source = Qemu::start(&place, folder.path(), &slots, "here");
    let path = |name: &str| folder.path().join(format!("{name}-dimm")).display().to_string();
    {
        let mut qmp = source.qmp();
        let mut order =
            |command: &str, arguments| qmp.execute(command, arguments, Deadline::after(BOUND)).expect(command);
        let object = json!({ "qom-type": "memory-backend-file", "id": "d", "size": 128 << 20, "mem-path": path("here"), "share": true });
        order("object-add", object);
        order("device_add", json!({ "driver": "pc-dimm", "id": "dimm", "memdev": "d" }));
    }
    let with = |name: &str| -> Vec<String> {
        let object = format!("memory-backend-file,id=d,size=128M,mem-path={},share=on", path(name));
        let dimm = ["-object", &object, "-device", "pc-dimm,id=dimm,memdev=d"].map(str::to_owned);
        [sized(&firmware("q35", &[]), name), dimm.to_vec()].concat()
    };
    let mut refused = send(&place, "127.0.0.1:9", &source.socket, &[]);
    assert_eq!(refused.end(), 3, "{}", refused.story());
    assert!(refused.story().contains('d'), "{}", refused.story());
    assert_eq!(status(&mut source.qmp()), "running");
    let (program, state_dir) = (qemu(), place.text("there"));
    let arguments = with("there");
    let mut words =
        vec!["receive", "--json", "--listen", "127.0.0.1:0", "--state-dir", &state_dir, "qemu", "--", &program];
    words.extend(arguments.iter().map(String::as_str));
    let mut destination = place.belay(&words);
    let to = destination.wait_for_event("listening")["address"].as_str().expect("an address").to_owned();
    let (kept, run_dir, monitor_here, standby) =
        (place.text("here"), place.text("run"), source.socket.display().to_string(), with("here"));
    let mut words =
        vec!["send", "--json", "--to", &to, "--state-dir", &kept, "--run-dir", &run_dir, "--release", "never"];
    words.extend(["qemu", "--qmp", &monitor_here, "--", &program]);
    words.extend(standby.iter().map(String::as_str));
    let mut sender = place.belay(&words);
    destination.wait_for_event("all-landed");
    destination.wait_for_event("committed");
    destination.crash();
    assert_eq!(sender.end(), 10, "{}", sender.story());
    let left = sender.events("qemu-left").next().expect("told").clone();
    let mut qmp = monitor(Path::new(left["monitor"].as_str().expect("its monitor")));
    assert_eq!(status(&mut qmp), "running");
    let dimms = qmp.execute("query-memory-devices", json!({}), Deadline::after(BOUND)).expect("an answer");
    assert_eq!(dimms[0]["data"]["size"].as_u64(), Some(128 << 20), "{dimms}");
    end_left(&sender);
    place.expect_nothing_left();
}
