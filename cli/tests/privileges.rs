//! What belay's processes have given up while they run: read from /proc, of real ones.

mod running;

use running::{BELAY, BOUND, Place, kill};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Instant;

const DAC_OVERRIDE: u32 = 1;
const IPC_LOCK: u32 = 14;
const SYS_PTRACE: u32 = 19;
const SYS_NICE: u32 = 23;
/// What a page server or VMM keeps of root's capabilities, and what a guard does.
const HOST: u64 = 1 << DAC_OVERRIDE | 1 << IPC_LOCK | 1 << SYS_PTRACE | 1 << SYS_NICE;
const GUARD: u64 = 1 << SYS_NICE;
/// What a relay or a disk keeps once it has opened its far side.
const RELAY: u64 = 1 << DAC_OVERRIDE;

/// A line of /proc/PID/status.
fn status(pid: i32, key: &str) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("{key} in {text}")).trim().to_owned()
}

fn expect_given_up(what: &str, pid: i32, kept: u64) {
    assert_eq!(status(pid, "NoNewPrivs"), "1", "{what}");
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        let has = u64::from_str_radix(&status(pid, set), 16).expect("hexadecimal");
        assert_eq!(has & !kept, 0, "{what}: {set} is {has:x}, {kept:x} may be kept");
    }
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).expect("it runs");
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).expect("a limit");
    assert_eq!(core.split_whitespace().skip(4).take(2).collect::<Vec<_>>(), ["0", "0"], "{what}");
}

#[test]
fn a_running_source_destination_and_guard_have_given_up_what_they_do_not_need() {
    if std::fs::metadata("/dev/userfaultfd").is_err() && !rustix::process::geteuid().is_root() {
        eprintln!("skipped: it needs a userfaultfd");
        return;
    }
    let place = Place::new();
    let (here, there) = (place.text("source"), place.text("destination"));
    let mut destination =
        place.belay(&["receive", "--json", "--listen", "127.0.0.1:0", "--drive", "threads", "--state-dir", &there]);
    let to = destination.wait_for_event("listening")["address"].as_str().expect("an address").to_owned();
    expect_given_up("a destination that waits", destination.pid(), HOST);
    let mut source = place.belay(&[
        "send",
        "--json",
        "--to",
        &to,
        "--drive",
        "threads",
        "--memory",
        "8M",
        "--run-before",
        "0ms",
        "--release",
        "never",
        "--state-dir",
        &here,
    ]);
    destination.wait_for_event("committed");
    expect_given_up("a source that serves", source.pid(), HOST);
    expect_given_up("a destination with a guest", destination.pid(), HOST);
    let guards: Vec<_> = place.running().into_iter().filter(|(_, line)| line.contains(" guard")).collect();
    assert_eq!(guards.len(), 1, "{guards:?}");
    expect_given_up("a guard", guards[0].0, GUARD);
    // It works all the same: the destination is killed, the guard says so, and the source catches the guest.
    destination.crash();
    let noticed = source.wait_for_event("noticed");
    assert!(noticed["by"].as_str().is_some_and(|by| by.contains("guard")), "{noticed}");
    source.wait_for_event("caught");
    source.signal(libc::SIGTERM);
    source.end();
    place.expect_nothing_left();
}

/// Of every thread, because each has capabilities of its own.
fn expect_all_threads_given_up(what: &str, pid: i32, kept: u64) {
    let threads: Vec<i32> = std::fs::read_dir(format!("/proc/{pid}/task"))
        .expect("it runs")
        .map(|thread| thread.expect("an entry").file_name().to_str().expect("a number").parse().expect("a number"))
        .collect();
    assert!(threads.len() > 1, "{what} has one that waits for signals");
    threads.into_iter().for_each(|thread| expect_given_up(what, thread, kept));
}

#[test]
fn a_relay_and_a_disk_have_given_up_what_they_opened_their_far_side_with() {
    let place = Place::new();
    let (guest, hand, world, image) =
        (place.text("guest"), place.text("hand"), place.text("world"), place.text("image"));
    std::fs::write(&image, [0; 4096]).expect("written");
    let far_side = UnixListener::bind(&world).expect("a socket");
    let world = format!("unix:{world}");
    let mut relay = place.belay(&["relay", "--json", "--guest", &guest, "--hand", &hand, "--world", &world]);
    relay.wait_for_event("listening");
    // It connects to the far side when all is given up.
    far_side.accept().expect("it comes");
    expect_all_threads_given_up("a relay", relay.pid(), RELAY);
    relay.signal(libc::SIGTERM);
    assert_eq!(relay.end(), 0, "{}", relay.story());
    let mut disk = place.belay(&["disk", "--json", "--guest", &guest, "--hand", &hand, "--image", &image]);
    disk.wait_for_event("listening");
    expect_all_threads_given_up("a disk", disk.pid(), RELAY);
    disk.signal(libc::SIGTERM);
    assert_eq!(disk.end(), 0, "{}", disk.story());
    drop((relay, disk));
    place.expect_nothing_left();
}

#[test]
fn a_relay_before_a_tap_keeps_no_capability_and_still_passes_frames() {
    if !rustix::process::geteuid().is_root() || std::fs::metadata("/dev/net/tun").is_err() {
        eprintln!("skipped: a tap in a network of its own needs root and /dev/net/tun");
        return;
    }
    let place = Place::new();
    let guest = place.text("guest");
    let mut relay = Command::new("unshare");
    let hand = place.text("hand");
    relay.args(["--net", BELAY, "relay", "--json", "--guest", &guest, "--hand", &hand, "--world", "tap:t0"]);
    let mut relay = place.start(relay);
    relay.wait_for_event("listening");
    expect_all_threads_given_up("a relay before a tap", relay.pid(), 0);
    let pid = relay.pid().to_string();
    let up = Command::new("nsenter").args(["--net", "--target", &pid, "ip", "link", "set", "t0", "up"]).output();
    assert!(up.as_ref().is_ok_and(|up| up.status.success()), "{up:?}");
    // What a tap is given, its network receives; the kernel sends some of its own, the other way.
    let received = || -> u64 {
        let devices = std::fs::read_to_string(format!("/proc/{pid}/net/dev")).expect("it runs");
        let line = devices.lines().find_map(|line| line.trim().strip_prefix("t0:")).expect("its tap");
        line.split_whitespace().nth(1).expect("packets").parse().expect("a number")
    };
    assert_eq!(received(), 0);
    let mut frame = [0xff; 64];
    frame[6..14].copy_from_slice(&[2, 0, 0, 0, 0, 1, 0x88, 0xb5]);
    let mut qemu = UnixStream::connect(&guest).expect("it listens");
    qemu.write_all(&[&64_u32.to_be_bytes()[..], &frame].concat()).expect("sent");
    let until = Instant::now() + BOUND;
    while received() == 0 {
        assert!(Instant::now() < until, "the frame has not come: {}", relay.story());
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    relay.signal(libc::SIGTERM);
    assert_eq!(relay.end(), 0, "{}", relay.story());
    drop(relay);
    place.expect_nothing_left();
}

/// A process that is not dumpable belongs to root in /proc, whoever runs it: nobody else may look into it.
#[test]
fn nobody_may_look_into_a_guard_or_a_page_server_of_root() {
    const NOBODY: u32 = 65_534;
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root can run a guard as another user");
        return;
    }
    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
    let mut command = Command::new("/proc/self/fd/100");
    // The executable is opened here: the other user may not reach the folder it is in.
    let executable = std::fs::File::open(BELAY).expect("the program");
    let place = std::os::fd::AsRawFd::as_raw_fd(&executable);
    let take_place = move || {
        // SAFETY: both are numbers.
        let taken = unsafe { libc::dup2(place, 100) };
        if taken == 100 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    };
    // SAFETY: dup2 is a system call and nothing else; it may be made between fork and exec.
    unsafe { command.pre_exec(take_place) };
    command.arg("guard").stdin(Stdio::from(std::os::fd::OwnedFd::from(theirs))).stdout(Stdio::null());
    let mut child = command.uid(NOBODY).gid(NOBODY).spawn().expect("a guard as another user");
    let pid = child.id() as i32;
    let until = Instant::now() + BOUND;
    let mut is = (String::new(), 0);
    while is.0 != "1" && Instant::now() < until {
        is = (status(pid, "NoNewPrivs"), std::fs::metadata(format!("/proc/{pid}/mem")).expect("it runs").uid());
    }
    let runs_as = status(pid, "Uid");
    kill(pid, libc::SIGKILL);
    child.wait().expect("a child");
    drop(ours);
    assert!(runs_as.starts_with("65534\t"), "{runs_as}");
    assert_eq!(is, ("1".to_owned(), 0), "no new privileges, and /proc/PID/mem belongs to root");
}
