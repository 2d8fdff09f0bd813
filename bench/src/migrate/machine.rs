//! The QEMUs that a guest moves between: all are started alike, over a RAM file each.

use super::linux::Linux;
use crate::error::BenchError;
use crate::leavings::{self, Remembered};
use belay_transport::Deadline;
use belay_vmm_glue::qemu::qmp::{Qmp, QmpError};
use rustix::process::{Signal, set_parent_process_death_signal};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// For an order, and for a QEMU to start.
pub const ANSWER: Duration = Duration::from_secs(20);
/// For a guest to boot, emulated, on a busy machine.
const BOOTED: Duration = Duration::from_secs(240);
/// The clocks' rates are told, because measuring them fails where the host is busy. Pages must stay where they are.
const BOOT: &str = "console=ttyS0 quiet loglevel=0 panic=-1 nokaslr mitigations=off no_timer_check tsc_early_khz=2500000 lpj=5000000 \
                    tsc=reliable transparent_hugepage=never";

/// What all of them are.
pub struct Machine {
    pub program: String,
    pub accel: String,
    pub kind: String,
    pub memory: u64,
    pub vcpus: u16,
    pub working_set: u64,
    /// Pages a second.
    pub rate: u64,
    /// Of QEMU's own destinations: whether they allocate all RAM before the guest comes.
    pub prealloc: bool,
    pub nonce: u64,
    pub linux: Linux,
    /// For RAM files: on tmpfs.
    pub folder: PathBuf,
}

/// How a QEMU begins.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Begin {
    Boot,
    /// It waits for a guest, and runs it when it has come.
    Wait,
    /// It waits for a guest, and does nothing of its own accord.
    WaitStopped,
}

/// One that runs. It ends with this, and its RAM file goes.
pub struct Vm {
    child: Child,
    /// Forgotten once the child has been waited for.
    _remembered: Remembered,
    pub ram: PathBuf,
    pub socket: PathBuf,
    console: PathBuf,
    log: PathBuf,
}

pub fn qmp(error: QmpError) -> BenchError {
    BenchError::Refused { why: error.to_string() }
}

impl Machine {
    /// Starts one.
    pub fn start(&self, name: &str, begin: Begin) -> Result<Vm, BenchError> {
        let path = |what: &str| self.folder.join(format!("{name}.{what}"));
        let (ram, socket, console) = (path("ram"), path("qmp"), path("console"));
        let memory = self.memory >> 20;
        let parts = self.vcpus;
        let append =
            format!("{BOOT} nonce={} parts={parts} mib={} rate={}", self.nonce, self.working_set >> 20, self.rate);
        let mut command = Command::new(&self.program);
        command.args(["-accel", &self.accel, "-cpu", "max", "-nodefaults", "-no-user-config", "-no-reboot"]);
        command.args(["-display", "none", "-smp", &parts.to_string(), "-m", &format!("{memory}M")]);
        let ahead = if begin == Begin::Wait && self.prealloc { ",prealloc=on" } else { "" };
        let backend = format!("memory-backend-file,id=m,size={memory}M,mem-path={},share=on{ahead}", ram.display());
        command.args(["-object", &backend, "-machine", &format!("{},memory-backend=m", self.kind)]);
        command.arg("-serial").arg(format!("file:{}", console.display()));
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", socket.display()));
        command.arg("-kernel").arg(&self.linux.kernel).arg("-initrd").arg(&self.linux.initramfs);
        command.args(["-append", &append]);
        match begin {
            Begin::Boot => &mut command,
            Begin::Wait => command.args(["-incoming", "defer"]),
            Begin::WaitStopped => command.args(["-incoming", "defer", "-S"]),
        };
        let log_path = path("log");
        let log = fs::File::create(&log_path).map_err(BenchError::io("make a QEMU's log"))?;
        let error_log = log.try_clone().map_err(BenchError::io("make a QEMU's log"))?;
        command.stdin(Stdio::null()).stdout(log).stderr(error_log);
        let die_with_the_bench = || set_parent_process_death_signal(Some(Signal::KILL)).map_err(Into::into);
        // SAFETY: prctl(2) may be called between fork and exec.
        unsafe { command.pre_exec(die_with_the_bench) };
        let mut child = command.spawn().map_err(BenchError::io("start QEMU (--qemu names it)"))?;
        let remembered = leavings::process(&mut child)?;
        let mut vm = Vm { child, _remembered: remembered, ram, socket, console, log: log_path };
        match vm.qmp() {
            Ok(_) => Ok(vm),
            Err(error) => {
                let why = match vm.child.try_wait().ok().flatten() {
                    Some(status) => format!("QEMU ended ({status}) before it did anything; it said: {}", vm.said()),
                    None => error.to_string(),
                };
                Err(BenchError::Refused { why })
            }
        }
    }
}

impl Vm {
    /// Its monitor, which takes one at a time.
    pub fn qmp(&mut self) -> Result<Qmp, BenchError> {
        let end = Deadline::after(ANSWER);
        loop {
            // A socket that is not there yet is waited for; a process that has ended is not.
            match Qmp::connect(&self.socket, Deadline::after(Duration::from_millis(500))) {
                Ok(qmp) => return Ok(qmp),
                Err(error) if end.expired() || self.child.try_wait().is_ok_and(|ended| ended.is_some()) => {
                    return Err(qmp(error));
                }
                Err(_) => {}
            }
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has to say for itself, on one line.
    pub fn said(&self) -> String {
        let said = fs::read(&self.log).unwrap_or_default();
        let said = String::from_utf8_lossy(&said);
        let lines: Vec<&str> = said.lines().map(str::trim).filter(|line| !line.is_empty()).take(8).collect();
        if lines.is_empty() { "nothing".to_owned() } else { lines.join("; ") }
    }

    /// Waits until the guest has said `ready`.
    pub fn wait_until_ready(&mut self) -> Result<(), BenchError> {
        let begun = Instant::now();
        loop {
            let said = fs::read(&self.console).unwrap_or_default();
            let said = String::from_utf8_lossy(&said);
            if said.lines().any(|line| line.trim_end() == "ready") {
                return Ok(());
            }
            let ended = self.child.try_wait().ok().flatten();
            if ended.is_some() || begun.elapsed() > BOOTED {
                let last = said.lines().last().unwrap_or("nothing");
                let why =
                    format!("the guest did not come up within {} s; its last word: {last}", begun.elapsed().as_secs());
                return Err(BenchError::Refused { why });
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The state of its guest; where there is no QEMU any more, its last words.
    pub fn status(&mut self) -> Result<String, BenchError> {
        if let Some(status) = self.child.try_wait().map_err(BenchError::io("look at QEMU"))? {
            let console = fs::read(&self.console).unwrap_or_default();
            let console = String::from_utf8_lossy(&console);
            let last = console.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("nothing");
            return Ok(format!("gone ({status}; its console's last line: {})", last.trim()));
        }
        let answer = self.qmp()?.execute("query-status", json!({}), Deadline::after(ANSWER)).map_err(qmp)?;
        Ok(answer.get("status").and_then(Value::as_str).unwrap_or_default().to_owned())
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        for path in [&self.ram, &self.socket, &self.console, &self.log] {
            let _ = fs::remove_file(path);
        }
    }
}

/// Processor time that a process has used, of all its threads (proc_pid_stat(5)).
pub fn cpu_time(pid: u32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields: Vec<u64> =
        stat.rsplit(") ").next().unwrap_or_default().split(' ').filter_map(|field| field.parse().ok()).collect();
    // After the command's name: state (no number), then 10 more, then utime and stime.
    let ticks = fields.get(10).copied().unwrap_or(0) + fields.get(11).copied().unwrap_or(0);
    Duration::from_secs_f64(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}
