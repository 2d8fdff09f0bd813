//! `belay check --qmp`: a running QEMU guest is told what stands against moving and tethering it, by the QEMU that is installed here.

mod running;

use running::{BELAY, BOUND, Place};
use serde_json::Value;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

const QEMU: &str = "qemu-system-x86_64";

macro_rules! needs_qemu {
    () => {
        if !Command::new(QEMU).arg("--version").output().is_ok_and(|output| output.status.success()) {
            eprintln!("skipped: {QEMU} is not installed");
            return;
        }
    };
}

/// A QEMU whose guest is not started: nothing runs in it. It ends with the test.
struct Qemu {
    child: Child,
    socket: String,
}

impl Qemu {
    fn start(place: &Place, arguments: &[&str]) -> Self {
        let socket = place.text("qmp");
        let mut command = Command::new(QEMU);
        let quiet = ["-accel", "tcg", "-nodefaults", "-no-user-config", "-display", "none", "-S"];
        command.args(quiet).arg("-qmp").arg(format!("unix:{socket},server=on,wait=off")).args(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::inherit());
        let die_with_the_test = || {
            rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL)).map_err(Into::into)
        };
        // SAFETY: prctl(2) may be called between fork and exec.
        unsafe { command.pre_exec(die_with_the_test) };
        let child = command.spawn().expect("QEMU starts");
        let end = Instant::now() + BOUND;
        while !std::path::Path::new(&socket).exists() && Instant::now() < end {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        Self { child, socket }
    }

    /// What `belay check` found, and how it ended.
    fn check(&self) -> (Vec<Value>, i32) {
        let output = Command::new(BELAY).args(["check", "--json", "--qmp", &self.socket]).output().expect("belay runs");
        let code = output.status.code().expect("not killed");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let report: Value = serde_json::from_str(&said)
            .unwrap_or_else(|error| panic!("{error}: {said:?} {}", String::from_utf8_lossy(&output.stderr)));
        (report["findings"].as_array().expect("findings").clone(), code)
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn verdict<'a>(findings: &'a [Value], name: &str) -> &'a str {
    let found = findings.iter().find(|finding| finding["name"].as_str().is_some_and(|called| called.contains(name)));
    found.unwrap_or_else(|| panic!("nothing is called {name}: {findings:#?}"))["verdict"].as_str().unwrap()
}

#[test]
fn a_guest_whose_ram_is_a_shared_file_can_be_moved_and_its_process_and_file_are_found() {
    needs_qemu!();
    let place = Place::new();
    let (one, two) = (place.text("one"), place.text("two"));
    let backend = |id, path: &str| format!("memory-backend-file,id={id},size=32M,mem-path={path},share=on");
    let (first, second) = (backend("m0", &one), backend("m1", &two));
    let numa = ["-numa", "node,memdev=m0", "-numa", "node,memdev=m1", "-m", "64M", "-machine", "q35"];
    let objects = ["-object", first.as_str(), "-object", second.as_str()];
    let qemu = Qemu::start(&place, &[&objects[..], &numa, &["-device", "virtio-rng-pci"]].concat());
    let (findings, code) = qemu.check();
    assert_eq!(code, 0, "{findings:#?}");
    for (name, path) in [("RAM m0", &one), ("RAM m1", &two)] {
        assert_eq!(verdict(&findings, name), "ok");
        assert!(
            findings.iter().any(|finding| finding["detail"].as_str().unwrap().ends_with(path.as_str())),
            "{findings:#?}"
        );
    }
    let process = format!("process {},", qemu.child.id());
    assert!(findings[0]["detail"].as_str().unwrap().contains(&process), "{findings:#?}");
    assert!(findings[0]["name"].as_str().unwrap().starts_with("QEMU "), "{findings:#?}");
}

#[test]
fn a_guest_with_private_ram_is_told_the_options_and_one_with_a_screen_and_a_disk_that_it_cannot_be_tethered() {
    needs_qemu!();
    let place = Place::new();
    let disk = place.text("disk");
    std::fs::write(&disk, [0; 65536]).unwrap();
    let drive = format!("if=none,id=d0,format=raw,file={disk}");
    let devices = ["-vga", "std", "-drive", drive.as_str(), "-device", "virtio-blk-pci,drive=d0"];
    let qemu = Qemu::start(&place, &[&["-machine", "pc", "-m", "32M"][..], &devices].concat());
    let (findings, code) = qemu.check();
    assert_eq!(code, 3, "{findings:#?}");
    assert_eq!(verdict(&findings, "RAM pc.ram"), "missing");
    let ram = findings.iter().find(|finding| finding["name"] == "RAM pc.ram").unwrap();
    assert_eq!(
        ram["mend"][0],
        "-object memory-backend-file,id=pc.ram,size=33554432,mem-path=/dev/shm/pc.ram,share=on -machine memory-backend=pc.ram"
    );
    assert_eq!(verdict(&findings, "vga.vram"), "degraded");
    assert_eq!(verdict(&findings, "disk d0"), "degraded");
}

#[test]
fn a_qmp_socket_that_somebody_holds_is_said_to_be_held_within_a_bound() {
    needs_qemu!();
    let place = Place::new();
    let qemu = Qemu::start(&place, &["-machine", "none"]);
    let begun = Instant::now();
    let _held = loop {
        match std::os::unix::net::UnixStream::connect(&qemu.socket) {
            Ok(stream) => break stream,
            Err(error) => assert!(begun.elapsed() < BOUND, "{error}"),
        }
    };
    let begun = Instant::now();
    let output = Command::new(BELAY).args(["check", "--qmp", &qemu.socket]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && said.contains("another client holds it"), "{said}");
    assert!(begun.elapsed() < BOUND, "{:?}", begun.elapsed());
}

#[test]
fn a_qmp_socket_that_is_not_there_is_said_to_be_missing_without_waiting_for_it() {
    let place = Place::new();
    let begun = Instant::now();
    let output = Command::new(BELAY).args(["check", "--qmp", &place.text("none")]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && said.contains("No such file") && said.contains("none"), "{said}");
    // One that is there and refuses is waited for ten seconds.
    assert!(begun.elapsed() < std::time::Duration::from_secs(9), "{:?}", begun.elapsed());
}
