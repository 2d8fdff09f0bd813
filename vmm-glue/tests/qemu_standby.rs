//! A second QEMU over the memory of one that has a guest: it changes nothing there while it waits.

use belay_checkpoint::guest::Guest;
use belay_transport::Deadline;
use belay_vmm_glue::guard::GuardCommand;
use belay_vmm_glue::qemu::leaving::{Found, LeavingError, LeavingGuest, StandbyPlan};
use belay_vmm_glue::qemu::qmp::Qmp;
use serde_json::json;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const QEMU: &str = "qemu-system-x86_64";
const MIB: usize = 64;
/// What firmware leaves in memory, at the least.
const WRITTEN: usize = 256;
const BOUND: Duration = Duration::from_secs(40);

fn soon() -> Deadline {
    Deadline::after(BOUND)
}

/// A QEMU whose guest is its firmware. It ends with the test.
struct Qemu {
    child: Child,
    directory: tempfile::TempDir,
}

impl Qemu {
    fn start(kind: &str, more: &[&str]) -> Option<Self> {
        if !Command::new(QEMU).arg("--version").output().is_ok_and(|output| output.status.success()) {
            eprintln!("skipped: {QEMU} is not installed");
            return None;
        }
        let directory = tempfile::Builder::new().prefix("qemu-test-").tempdir_in("/dev/shm").unwrap();
        let path = |name: &str| directory.path().join(name).display().to_string();
        let mut command = Command::new(QEMU);
        command.args(["-accel", "tcg", "-nodefaults", "-no-user-config", "-display", "none", "-m", &format!("{MIB}M")]);
        command.args(["-machine", &format!("{kind},memory-backend=m"), "-object"]);
        // `prealloc` and `discard-data` would be the standby's doing too, if they were left to it.
        command.arg(format!(
            "memory-backend-file,id=m,size={MIB}M,share=on,prealloc=on,discard-data=on,mem-path={}",
            path("ram")
        ));
        command.args(["-qmp", &format!("unix:{},server=on,wait=off", path("qmp"))]).args(more);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let die_with_the_test = || {
            rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL)).map_err(Into::into)
        };
        // SAFETY: prctl(2) may be called between fork and exec.
        unsafe { command.pre_exec(die_with_the_test) };
        Some(Self { child: command.spawn().expect("QEMU starts"), directory })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Waits until the firmware has written memory, and stands the guest still.
    fn stand(&self) {
        let mut qmp = Qmp::connect(&self.path("qmp"), soon()).unwrap();
        let end = Instant::now() + BOUND;
        while image(&self.path("ram")).iter().filter(|&&byte| byte != 0).count() < WRITTEN {
            assert!(Instant::now() < end, "the firmware writes nothing");
            std::thread::sleep(Duration::from_millis(20));
        }
        qmp.execute("stop", json!({}), soon()).unwrap();
    }

    fn plan(&self) -> StandbyPlan {
        // It lets go at once: the standby ends with the guest that holds it.
        let leash = GuardCommand { program: "true".into(), args: vec![], envs: vec![] };
        StandbyPlan { command: None, directory: self.path("standby"), leash }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn image(ram: &Path) -> Vec<u8> {
    let mut bytes = vec![0; MIB << 20];
    std::fs::File::open(ram).and_then(|file| file.read_exact_at(&mut bytes, 0)).unwrap_or_default();
    bytes
}

#[test]
fn a_standby_changes_nothing_of_the_memory_it_waits_over_and_takes_the_guest_back() {
    for kind in ["pc", "q35", "microvm"] {
        let Some(qemu) =
            Qemu::start(kind, &["-device", if kind == "microvm" { "virtio-rng-device" } else { "virtio-rng-pci" }])
        else {
            return;
        };
        qemu.stand();
        let before = image(&qemu.path("ram"));
        let found = Found::at(&qemu.path("qmp"), None).unwrap();
        let mut guest = LeavingGuest::prepare(found, Some(&qemu.plan()), None).unwrap();
        assert_eq!(guest.memory().len(), 1);
        assert!(image(&qemu.path("ram")) == before, "{kind}: the standby has written guest memory");
        // It leaves, and is caught from the state it left with: into the other QEMU, which then runs.
        let mut state = Vec::new();
        guest.pause(soon()).unwrap();
        guest.save(&mut state).unwrap();
        let (standby, monitor) = guest.standby().map(|(process, monitor)| (process.number(), monitor)).unwrap();
        guest.load(&state).unwrap();
        assert!(image(&qemu.path("ram")) == before, "{kind}: nor has loading");
        guest.resume().unwrap();
        drop(guest.leave_caught().unwrap());
        let mut qmp = Qmp::connect(&monitor, soon()).unwrap();
        assert_eq!(qmp.execute("query-status", json!({}), soon()).unwrap()["status"], "running");
        let _ = qmp.execute("quit", json!({}), soon());
        assert_ne!(standby, qemu.child.id());
    }
}

#[test]
fn a_standby_that_is_not_like_the_running_qemu_is_refused_by_what_differs() {
    let Some(qemu) = Qemu::start("q35", &["-device", "pcie-root-port,id=port0"]) else { return };
    let mut qmp = Qmp::connect(&qemu.path("qmp"), soon()).unwrap();
    // Plugged in after the start, so its command line does not tell.
    let device = json!({ "driver": "virtio-rng-pci", "id": "late", "bus": "port0" });
    qmp.execute("device_add", device, soon()).unwrap();
    drop(qmp);
    let found = Found::at(&qemu.path("qmp"), None).unwrap();
    let error = LeavingGuest::prepare(found, Some(&qemu.plan()), None).err().expect("refused");
    assert!(matches!(&error, LeavingError::Unlike(why) if why.contains("virtio-rng-pci")), "{error}");
    let other = ["-machine", "q35", "-m", "64M", "-display", "none", "-nodefaults"];
    let command = std::iter::once(QEMU).chain(other).map(Into::into).collect();
    let found = Found::at(&qemu.path("qmp"), None).unwrap();
    let plan = StandbyPlan { command: Some(command), ..qemu.plan() };
    let error = LeavingGuest::prepare(found, Some(&plan), None).err().expect("refused");
    assert!(matches!(&error, LeavingError::Unlike(why) if why.contains("RAM")), "{error}");
    // Nothing of either is left.
    assert!(!qemu.path("standby").exists());
}
