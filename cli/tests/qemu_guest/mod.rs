//! A QEMU with a Linux in it that checks its own memory (`guest.rs`), for tests that move it.
//!
//! The kernel is the SoftRoCE lab's, from its cache (`cluster-configs/softroce/lab --image` puts it there), or this machine's own. The initramfs
//! holds one program. `BELAY_TEST_QEMU` names another QEMU than the installed one, `BELAY_TEST_NEWER_QEMU` than the newer one that `.ci/run`
//! unpacks.
#![allow(dead_code, reason = "each test file uses its part")]

pub mod moving;
pub mod network;

use super::running::{BOUND, Place, kill};
use belay_transport::Deadline;
use belay_vmm_glue::qemu::qmp::Qmp;
use serde_json::json;
use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The QEMU of these tests.
pub fn qemu() -> String {
    std::env::var("BELAY_TEST_QEMU").unwrap_or_else(|_| "qemu-system-x86_64".to_owned())
}

/// A QEMU that is newer than the installed one: `cluster-configs/softroce/lab --kernel 6.12 --qemu target/qemu-newer` unpacks it. `None`, said,
/// where there is none.
pub fn newer_qemu() -> Option<String> {
    let unpacked = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/qemu-newer/usr/bin/qemu-system-x86_64");
    let program = std::env::var("BELAY_TEST_NEWER_QEMU").unwrap_or_else(|_| unpacked.to_owned());
    let found = Command::new(&program).arg("--version").output().is_ok_and(|output| output.status.success());
    if !found {
        eprintln!("skipped: {program} does not run; cluster-configs/softroce/lab --kernel 6.12 --qemu unpacks one");
    }
    found.then_some(program)
}

/// Says why and is true where no QEMU can be moved.
pub fn no_qemu() -> bool {
    if !Command::new(qemu()).arg("--version").output().is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: {} is not installed", qemu());
        return true;
    }
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: tracing another process and holding its faults needs root");
        return true;
    }
    false
}

/// Told the clocks' rates, because measuring them fails where the host is busy: an emulated microvm then waits for ever.
const BOOT: &str =
    "console=ttyS0 quiet loglevel=0 panic=-1 nokaslr mitigations=off no_timer_check tsc_early_khz=2500000 lpj=5000000";
/// Longest that a guest may take to boot: some seconds of processor time, of which a busy machine gives little.
pub const BOOTED: Duration = Duration::from_secs(240);
/// Attempts in that time.
const BOOTS: u32 = 3;

/// Kernel and initramfs.
#[derive(Debug, Clone)]
pub struct Linux {
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
    /// The lab's own with the program as its init: it has the kernel's modules. `None` where the kernel is not the lab's.
    pub with_modules: Option<PathBuf>,
}

impl Linux {
    /// The same for all tests of a program; `None`, said, where something is missing.
    pub fn here() -> Option<Self> {
        static MADE: OnceLock<Result<Linux, String>> = OnceLock::new();
        match MADE.get_or_init(Self::make) {
            Ok(linux) => Some(linux.clone()),
            Err(why) => {
                eprintln!("skipped: {why}");
                None
            }
        }
    }

    fn make() -> Result<Self, String> {
        let kernel =
            kernel().ok_or("no kernel: neither the lab's (cluster-configs/softroce/lab --image) nor /boot's")?;
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let own = |name: &str| folder.join(format!("qemu-guest-{name}-{}", std::process::id()));
        let (program, made) = (own("init"), own("initramfs"));
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/qemu_guest/guest.rs");
        let options =
            ["--edition", "2024", "-O", "-C", "target-feature=+crt-static", "-C", "panic=abort", "-C", "strip=symbols"];
        let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
        let built = Command::new(rustc).args(options).arg("-o").arg(&program).arg(source).output();
        let built = built.map_err(|error| format!("rustc cannot be run: {error}"))?;
        if !built.status.success() {
            return Err(format!("the guest's program cannot be built: {}", String::from_utf8_lossy(&built.stderr)));
        }
        let written = |name: &str, bytes: &[u8]| {
            let done = folder.join(name);
            fs::write(&made, bytes).and_then(|()| fs::rename(&made, &done)).map(|()| done)
        };
        let failed = |error: std::io::Error| format!("the initramfs cannot be made: {error}");
        let archive = fs::read(&program).map(|program| archive(&program)).map_err(failed)?;
        let initramfs = written("qemu-guest.cpio", &archive).map_err(failed)?;
        // Archives behind each other are unpacked one over the other (kernel documentation, early-userspace/buffer-format).
        let with_modules = fs::read(kernel.with_file_name("initramfs")).ok().map(|mut lab| {
            lab.resize(lab.len().next_multiple_of(4), 0);
            lab.extend(&archive);
            written("qemu-guest-with-modules.cpio", &lab)
        });
        let with_modules = with_modules.transpose().map_err(failed)?;
        fs::remove_file(&program).map_err(failed)?;
        Ok(Self { kernel, initramfs, with_modules })
    }
}

/// The lab's newest kernel of 6.1, else any of its, else this machine's.
fn kernel() -> Option<PathBuf> {
    let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache"));
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(home);
    let lab = std::env::var_os("BELAY_LAB_CACHE").map(PathBuf::from).or_else(|| Some(cache?.join("belay-lab")));
    let in_folder = |folder: &Path, start: &str| -> Vec<PathBuf> {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        let named = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(start));
        let mut found: Vec<_> = entries.map(|entry| entry.path()).filter(named).collect();
        found.sort_by_key(|path| fs::metadata(path).and_then(|file| file.modified()).ok());
        found
    };
    let images = |start| lab.iter().flat_map(move |lab| in_folder(lab, start)).map(|image| image.join("vmlinuz"));
    let candidates =
        in_folder(Path::new("/boot"), "vmlinuz-").into_iter().chain(images("image-6.12-")).chain(images("image-6.1-"));
    candidates.rev().find(|kernel| fs::File::open(kernel).is_ok())
}

/// An initramfs (cpio, newc) of one program.
fn archive(program: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (inode, name, mode, content) in [(1, "init", 0o100_755, program), (0, "TRAILER!!!", 0, &[][..])] {
        let fields = [inode, mode, 0, 0, 1, 0, content.len(), 0, 0, 0, 0, name.len() + 1, 0];
        bytes.extend(b"070701");
        fields.iter().for_each(|field| bytes.extend(format!("{field:08x}").bytes()));
        bytes.extend(name.bytes());
        bytes.push(0);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes.extend(content);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}

/// A machine that two QEMUs are started as.
#[derive(Debug, Clone)]
pub struct Machine {
    /// The QEMU that it is started in.
    pub program: String,
    /// `q35`, with what else `-machine` is to say.
    pub kind: &'static str,
    pub vcpus: usize,
    /// Size of each block of RAM in MiB; several are NUMA nodes.
    pub blocks: Vec<usize>,
    pub more: Vec<String>,
    pub linux: Option<Linux>,
    /// MiB of the guest's working set.
    pub set: usize,
    /// Address of its network card, which is connected to NAME.net in the folder. Needs the lab's initramfs.
    pub address: Option<&'static str>,
    /// Its network card connects again by itself: of QEMU 9.2 or newer.
    pub reconnects: bool,
    /// Sectors of its disk, which NAME.nbd in the folder serves; 0 for none. Of the machine `pc` alone, unless it is a virtio disk.
    pub sectors: usize,
    /// Its disk is virtio-blk, and several requests are on their way at a time. Needs the lab's initramfs.
    pub virtio_disk: bool,
    /// MiB that it takes and gives back all the time; 0 for none. Needs the lab's initramfs.
    pub churn: usize,
    /// It hears words at NAME.words in the folder (`guest.rs` has which), and may start again. Of its disk it writes half until it is told to grow.
    pub obeys: bool,
}

impl Machine {
    pub fn of(kind: &'static str, linux: Option<Linux>) -> Self {
        Self {
            program: qemu(),
            kind,
            vcpus: 1,
            blocks: vec![128],
            more: vec![],
            linux,
            set: 16,
            address: None,
            reconnects: false,
            sectors: 0,
            churn: 0,
            virtio_disk: false,
            obeys: false,
        }
    }

    /// Arguments of a QEMU whose RAM files and console lie in `folder`, called by `name`.
    pub fn arguments(&self, folder: &Path, name: &str) -> Vec<String> {
        let mut words: Vec<String> =
            ["-accel", "tcg,thread=multi", "-cpu", "max", "-nodefaults", "-no-user-config", "-no-reboot"]
                .map(str::to_owned)
                .to_vec();
        let mut add = |option: &str, value: String| words.extend([option.to_owned(), value]);
        let total: usize = self.blocks.iter().sum();
        add("-smp", self.vcpus.to_string());
        if total > 0 {
            add("-m", format!("{total}M"));
        }
        for (index, mib) in self.blocks.iter().enumerate() {
            let path = folder.join(format!("{name}-m{index}"));
            add("-object", format!("memory-backend-file,id=m{index},size={mib}M,mem-path={},share=on", path.display()));
            if self.blocks.len() > 1 {
                add("-numa", format!("node,memdev=m{index}"));
            }
        }
        let backend = if self.blocks.len() == 1 { ",memory-backend=m0" } else { "" };
        add("-machine", format!("{}{backend}", self.kind));
        add("-display", "none".to_owned());
        add("-serial", format!("file:{}", folder.join(format!("{name}-console")).display()));
        if let Some(linux) = &self.linux {
            add("-kernel", linux.kernel.display().to_string());
            let address = self.address.map_or_else(String::new, |address| format!(" address={address}"));
            let wanted =
                linux.with_modules.as_ref().filter(|_| self.address.is_some() || self.virtio_disk || self.churn > 0);
            add("-initrd", wanted.unwrap_or(&linux.initramfs).display().to_string());
            let (obeys, sectors, virtio_disk) = (u8::from(self.obeys), self.sectors, u8::from(self.virtio_disk));
            let own = format!(
                "parts={} mib={} obeys={obeys} sectors={sectors} virtio_disk={virtio_disk}",
                self.vcpus, self.set
            );
            // Pages are zeroed when they are given back, and not when they are taken.
            let churn = match self.churn {
                0 => String::new(),
                mib => format!(" churn={mib} init_on_free=1 transparent_hugepage=never"),
            };
            add("-append", format!("{BOOT} {own}{address}{churn}"));
        }
        if self.obeys {
            words.retain(|word| word != "-no-reboot");
            let socket = folder.join(format!("{name}.words"));
            words.extend(["-serial".to_owned(), format!("unix:{},server=on,wait=off", socket.display())]);
        }
        if self.address.is_some() {
            let socket = folder.join(format!("{name}.net"));
            let again = if self.reconnects { ",reconnect-ms=50" } else { "" };
            let netdev = format!("stream,id=n0,server=off,addr.type=unix,addr.path={}{again}", socket.display());
            words.extend(
                ["-netdev", &netdev, "-device", "virtio-net-pci,netdev=n0,mac=52:54:00:be:1a:77,romfile="]
                    .map(str::to_owned),
            );
        }
        if self.sectors > 0 {
            let socket = folder.join(format!("{name}.nbd"));
            let server = format!("nbd,node-name=d0,server.type=unix,server.path={},export=disk", socket.display());
            let device = if self.virtio_disk { "virtio-blk-pci,drive=d0" } else { "ide-hd,drive=d0,bus=ide.0" };
            words.extend(["-blockdev", &server, "-device", device].map(str::to_owned));
        }
        words.extend(self.more.iter().cloned());
        words
    }
}

/// A QEMU that a test started. It ends with the test.
pub struct Qemu {
    child: Child,
    pub socket: PathBuf,
    pub console: Console,
    /// Whether a guest that starts again does so in the same QEMU (no `-no-reboot`).
    reboots: bool,
}

impl Qemu {
    pub fn start(place: &Place, folder: &Path, machine: &Machine, name: &str) -> Self {
        let socket = place.path(&format!("{name}.qmp"));
        let mut command = Command::new(&machine.program);
        command.args(machine.arguments(folder, name));
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", socket.display()));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::inherit());
        let die_with_the_test = || {
            rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL)).map_err(Into::into)
        };
        // SAFETY: prctl(2) may be called between fork and exec.
        unsafe { command.pre_exec(die_with_the_test) };
        let child = command.spawn().expect("QEMU starts");
        let console = Console(folder.join(format!("{name}-console")));
        let qemu = Self { child, socket, console, reboots: machine.obeys };
        drop(qemu.qmp());
        qemu
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Waits until it has booted, and has ticked a little. A Linux that says nothing for long has lost an interrupt of an emulated timer while it
    /// brought up its processors, which has nothing to do with belay: it is reset, as whoever sits before it would.
    pub fn wait_until_booted(&self) {
        let mut was_reset = false;
        for _ in 0..BOOTS {
            let end = Instant::now() + BOOTED / BOOTS;
            while self.console.ticks().is_empty() && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(10));
            }
            if !self.console.ticks().is_empty() {
                break;
            }
            eprintln!("{} is reset: it has said {:?}", self.socket.display(), self.console.last_words());
            let mut qmp = self.qmp();
            let mut ask =
                |command, arguments| qmp.execute(command, arguments, Deadline::after(BOUND)).expect("an answer");
            ask("set-action", json!({ "reboot": "reset" }));
            ask("system_reset", json!({}));
            was_reset = true;
        }
        self.console.wait_for(20);
        if was_reset && !self.reboots {
            // As its command line has it.
            let mut qmp = self.qmp();
            qmp.execute("set-action", json!({ "reboot": "shutdown" }), Deadline::after(BOUND)).expect("an answer");
        }
    }

    /// Its monitor. One at a time.
    pub fn qmp(&self) -> Qmp {
        monitor(&self.socket)
    }

    /// Waits until it has ended.
    pub fn wait(&mut self) {
        let end = Instant::now() + BOUND;
        while matches!(self.child.try_wait(), Ok(None)) {
            assert!(Instant::now() < end, "QEMU does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A folder for RAM files and consoles. A QEMU that belay has left to itself would outlive a test that failed: whatever names the folder on its
/// command line ends with it.
pub struct SharedMemory(tempfile::TempDir);

/// A new one.
pub fn shared_memory() -> SharedMemory {
    SharedMemory(tempfile::Builder::new().prefix("qemu-test-").tempdir_in("/dev/shm").expect("tmpfs"))
}

impl SharedMemory {
    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        let name = self.path().display().to_string();
        let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
        for pid in processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok()) {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            if String::from_utf8_lossy(&line).contains(&name) {
                kill(pid, libc::SIGKILL);
            }
        }
    }
}

/// The monitor at `socket`, and the state of its guest.
pub fn monitor(socket: &Path) -> Qmp {
    Qmp::connect(socket, Deadline::after(BOUND)).expect("a monitor")
}

pub fn status(qmp: &mut Qmp) -> String {
    let answer = qmp.execute("query-status", json!({}), Deadline::after(BOUND)).expect("an answer");
    answer["status"].as_str().expect("a state").to_owned()
}

/// What a guest says.
pub struct Console(pub PathBuf);

impl Console {
    /// Numbers of its ticks so far, in order. Fails if the guest found its memory wrong.
    pub fn ticks(&self) -> Vec<u64> {
        let text = String::from_utf8_lossy(&fs::read(&self.0).unwrap_or_default()).into_owned();
        for wrong in ["WRONG", "Kernel panic", "BUG:", "Oops"] {
            let at = text.lines().position(|line| line.contains(wrong));
            assert!(
                at.is_none(),
                "{}: {:?}",
                self.0.display(),
                text.lines().skip(at.unwrap_or(0)).take(9).collect::<Vec<_>>()
            );
        }
        // The last line may be half there, and the first half of one may be another QEMU's.
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let number = |line: &str| line.trim_end().strip_prefix("tick ")?.split_once(' ')?.0.parse().ok();
        whole.lines().filter_map(number).collect()
    }

    /// How often it has found all its disk as it must be. Fails if it once was not.
    pub fn disk_rounds(&self) -> usize {
        self.rounds("disk ")
    }

    /// The end of what it said.
    fn last_words(&self) -> String {
        let text = fs::read(&self.0).unwrap_or_default();
        String::from_utf8_lossy(&text[text.len().saturating_sub(400)..]).into_owned()
    }

    fn rounds(&self, of: &str) -> usize {
        self.ticks();
        let text = String::from_utf8_lossy(&fs::read(&self.0).unwrap_or_default()).into_owned();
        text.lines().filter(|line| line.starts_with(of)).count()
    }

    /// How often it has taken memory and given it back.
    pub fn churned(&self) -> usize {
        self.rounds("churn ")
    }

    /// Waits until it has taken memory and given it back, so often. Fails if it was not as it must be.
    pub fn wait_for_churn(&self, rounds: usize) {
        self.wait_for_rounds("churn ", rounds);
    }

    /// Waits until it has found all its disk as it must be, so often. Fails if it is not.
    pub fn wait_for_disk(&self, rounds: usize) {
        self.wait_for_rounds("disk ", rounds);
    }

    fn wait_for_rounds(&self, of: &str, rounds: usize) {
        let end = Instant::now() + BOOTED;
        loop {
            let seen = self.rounds(of);
            if seen >= rounds {
                return;
            }
            assert!(Instant::now() < end, "{seen} rounds at {}, {rounds} were to come", self.0.display());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until it has ticked so often.
    pub fn wait_for(&self, ticks: usize) -> Vec<u64> {
        self.wait_within(BOUND, ticks)
    }

    fn wait_within(&self, bound: Duration, ticks: usize) -> Vec<u64> {
        let end = Instant::now() + bound;
        loop {
            let heard = self.ticks();
            if heard.len() >= ticks {
                return heard;
            }
            assert!(Instant::now() < end, "{} ticks at {}, {ticks} were to come", heard.len(), self.0.display());
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Fails unless each of these is the one before it and one more.
pub fn expect_no_gap(ticks: &[u64]) {
    for pair in ticks.windows(2) {
        assert_eq!(pair[0] + 1, pair[1], "a gap in {ticks:?}");
    }
}

/// Says a word to the guest that is called `name`, once it listens, and waits until it has heard.
pub fn tell(folder: &Path, name: &str, word: &str) {
    let mut port = UnixStream::connect(folder.join(format!("{name}.words"))).expect("its second port");
    let console = folder.join(format!("{name}-console"));
    let heard = || fs::read_to_string(&console).unwrap_or_default().contains(&format!("told {word}"));
    let end = Instant::now() + BOUND;
    writeln!(port, "{word}").expect("it listens");
    while !heard() {
        assert!(Instant::now() < end, "the guest does not hear");
        std::thread::sleep(Duration::from_millis(5));
    }
}
