//! Moving such a guest with the command, on one host.

use super::super::running::{BOUND, Place, Process, is_running, kill};
use super::Machine;
use std::path::Path;
use std::time::{Duration, Instant};

/// A destination that starts `machine` for whoever comes, and where it listens.
pub fn receive(place: &Place, folder: &Path, machine: &Machine, more: &[&str]) -> (Process, String) {
    let mut destination = starts_receiving(place, folder, machine, more);
    let to = destination.wait_for_event("listening")["address"].as_str().expect("an address").to_owned();
    (destination, to)
}

/// As [`receive`], and does not wait until it listens.
pub fn starts_receiving(place: &Place, folder: &Path, machine: &Machine, more: &[&str]) -> Process {
    let state_dir = place.text("there");
    let mut words = vec!["receive", "--json", "--state-dir", &state_dir];
    if !more.contains(&"--listen") {
        words.extend(["--listen", "127.0.0.1:0"]);
    }
    words.extend(more);
    let arguments = machine.arguments(folder, "there");
    words.extend(["qemu", "--", &machine.program]);
    words.extend(arguments.iter().map(String::as_str));
    place.belay(&words)
}

/// A source of the guest in the QEMU whose monitor this is.
pub fn send(place: &Place, to: &str, monitor: &Path, more: &[&str]) -> Process {
    let (state_dir, run_dir, socket) = (place.text("here"), place.text("run"), monitor.display().to_string());
    let mut words = vec!["send", "--json", "--to", to, "--state-dir", &state_dir, "--run-dir", &run_dir];
    words.extend(more);
    words.extend(["qemu", "--qmp", &socket]);
    place.belay(&words)
}

/// The process of the QEMU that a destination has started.
pub fn started(destination: &mut Process) -> i32 {
    destination.hear();
    let known = destination.events("vmm-started").next().cloned();
    let started = known.unwrap_or_else(|| destination.wait_for_event("vmm-started"));
    started["pid"].as_i64().expect("a pid") as i32
}

/// Ends the QEMU that belay has left to itself.
pub fn end_left(process: &Process) {
    for left in process.events("qemu-left") {
        kill(left["pid"].as_u64().expect("a pid") as i32, libc::SIGKILL);
    }
}

/// Waits until the process runs no more.
pub fn wait_until_ended(pid: i32) {
    let end = Instant::now() + BOUND;
    while is_running(pid) {
        assert!(Instant::now() < end, "process {pid} does not end");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether the process was stopped by a signal.
pub fn is_frozen(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T'))
}
