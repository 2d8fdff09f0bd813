//! The userfaultfd of a QEMU that nobody patched: what its main thread touches is served from here, and it goes on as before.

use belay_transport::region::RamFile;
use belay_transport::uffd::{Event, FaultKind, Faults, Features, RegisterModes, Uffd};
use belay_transport::{Deadline, PAGE_SIZE, PageSize};
use belay_vmm_glue::qemu::inject::{InjectError, userfaultfds};
use belay_vmm_glue::qemu::process::{Mapping, Process};
use belay_vmm_glue::qemu::qmp::Qmp;
use serde_json::json;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const QEMU: &str = "qemu-system-x86_64";
const BYTES: usize = 16 << 20;
const BOUND: Duration = Duration::from_secs(40);

fn soon() -> Deadline {
    Deadline::after(BOUND)
}

struct Qemu {
    child: Child,
    qmp: Qmp,
    process: Process,
    ram: Mapping,
    directory: tempfile::TempDir,
}

impl Qemu {
    /// A QEMU whose guest does not run; `None`, said, where there is none or where it may not be traced.
    fn start(options: &[&str]) -> Option<Self> {
        if !Command::new(QEMU).arg("--version").output().is_ok_and(|output| output.status.success()) {
            eprintln!("skipped: {QEMU} is not installed");
            return None;
        }
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: tracing another process and holding its faults needs root");
            return None;
        }
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let (socket, file) = (directory.path().join("qmp"), directory.path().join("ram"));
        let mut command = Command::new(QEMU);
        command.args(["-accel", "tcg", "-nodefaults", "-no-user-config", "-display", "none", "-S", "-machine"]);
        command.arg("q35,memory-backend=m").args(["-m", "16M", "-object"]);
        command.arg(format!("memory-backend-file,id=m,size={BYTES},share=on,mem-path={}", file.display()));
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", socket.display())).args(options);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let die_with_the_test = || {
            rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL)).map_err(Into::into)
        };
        // SAFETY: prctl(2) may be called between fork and exec.
        unsafe { command.pre_exec(die_with_the_test) };
        let child = command.spawn().expect("QEMU starts");
        let qmp = Qmp::connect(&socket, soon()).unwrap();
        let process = Process::behind(&qmp, None).unwrap();
        let path = file.to_str().unwrap();
        let ram = process.shared_mappings().unwrap().into_iter().find(|mapping| mapping.path == path).expect("mapped");
        Some(Self { child, qmp, process, ram, directory })
    }

    fn path(&self, name: &str) -> String {
        self.directory.path().join(name).to_str().unwrap().to_owned()
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn wait_for_event(uffd: &Uffd) -> Event {
    let end = soon();
    let mut events = [Event::Remove { start: 0, end: 0 }];
    while uffd.read_events(&mut events).unwrap() == 0 {
        assert!(!end.expired(), "no fault came");
        std::thread::sleep(Duration::from_millis(1));
    }
    events[0]
}

/// Registers RAM, has QEMU's main thread read a page that is not there, and shows it one.
fn serves(mut qemu: Qemu) {
    let fds = userfaultfds(&qemu.process, 2, BOUND).unwrap();
    let features = Features::MISSING_SHMEM.union(Features::MINOR_SHMEM);
    let mut uffds = fds.into_iter().map(|fd| Uffd::from_fresh_fd(fd, features).unwrap());
    let (uffd, other) = (uffds.next().unwrap(), uffds.next().unwrap());
    let modes = RegisterModes { faults: Faults::MissingAndMinor, write_protect: false };
    let half = BYTES as u64 / 2;
    uffd.register(qemu.ram.start, half, modes).unwrap();
    other.register(qemu.ram.start + half, half, modes).unwrap();
    // QEMU keeps its own of each.
    let links = std::fs::read_dir(format!("/proc/{}/fd", qemu.child.id())).unwrap();
    let names = links.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
    assert_eq!(names.filter(|name| name.to_string_lossy().contains("[userfaultfd]")).count(), 2);

    let (page, out) = (2 << 20, qemu.path("out"));
    let file = std::fs::File::options().read(true).write(true).open(qemu.path("ram")).unwrap();
    let alias = RamFile::from_fd(file.into()).unwrap().map().unwrap();
    let (start, reader) = (qemu.ram.start, out.clone());
    let asked = std::thread::spawn(move || {
        let arguments = json!({ "val": page, "size": PAGE_SIZE, "filename": reader });
        qemu.qmp.execute("pmemsave", arguments, soon()).unwrap();
        // It does what it is asked as before.
        qemu.qmp.execute("query-status", json!({}), soon()).unwrap();
        qemu
    });
    let Event::Fault { address, kind, .. } = wait_for_event(&uffd) else { panic!("no fault") };
    assert_eq!((address & !(PAGE_SIZE as u64 - 1), kind), (start + page, FaultKind::Missing));
    alias.write(page as usize, &[0xa5; PAGE_SIZE]);
    assert!(uffd.continue_range(start + page, PAGE_SIZE as u64, PageSize::Small, false).unwrap().done());
    let _qemu = asked.join().unwrap();
    assert_eq!(std::fs::read(&out).unwrap(), [0xa5; PAGE_SIZE]);
}

#[test]
fn a_page_that_qemu_touches_is_shown_to_it_from_another_process() {
    let Some(qemu) = Qemu::start(&[]) else { return };
    serves(qemu);
}

#[test]
fn a_qemu_in_its_own_sandbox_is_served_as_well() {
    let options = ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"];
    let Some(qemu) = Qemu::start(&options) else { return };
    serves(qemu);
}

#[test]
fn a_qemu_that_is_busy_with_questions_misses_none_of_them_while_it_is_stopped_a_hundred_times() {
    let Some(mut qemu) = Qemu::start(&[]) else { return };
    let again = Process::behind(&qemu.qmp, None).unwrap();
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            for _ in 0..2_000 {
                qemu.qmp.execute("query-status", json!({}), soon()).unwrap();
            }
        });
        for _ in 0..100 {
            userfaultfds(&again, 1, BOUND).unwrap();
        }
        asking.join().unwrap();
    });
}

#[test]
fn a_process_that_has_ended_or_is_traced_is_said_to_be_so() {
    let Some(mut qemu) = Qemu::start(&[]) else { return };
    qemu.child.kill().unwrap();
    qemu.child.wait().unwrap();
    let error = userfaultfds(&qemu.process, 1, BOUND).unwrap_err();
    assert!(matches!(error, InjectError::Ended { .. } | InjectError::Io { .. }), "{error:?}");
    assert!(Path::new(&qemu.path("ram")).exists());
}
