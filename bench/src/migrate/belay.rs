//! belay's own way, as its user goes it: `belay receive` and `belay send`, two processes.

use super::machine::{ANSWER, Vm};
use super::moved::Moved;
use super::qemu::MIGRATED;
use crate::error::BenchError;
use belay_transport::fabric::FabricKind;
use belay_vmm_glue::migrate::observation::{Kind, Observation};
use rustix::process::{Signal, set_parent_process_death_signal};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// The program, and where it may put things down.
pub struct Belay {
    program: PathBuf,
    folder: PathBuf,
}

/// A process of it that tells what happens.
struct Told {
    child: Child,
    events: Receiver<(Instant, Kind)>,
    cpu: Duration,
    bytes: Option<u64>,
    blackout: Option<Duration>,
    failed: Option<String>,
}

impl Belay {
    /// `program`, or the one that was built beside this one.
    pub fn find(program: Option<&Path>, folder: &Path) -> Result<Self, BenchError> {
        let beside = || std::env::current_exe().map(|own| own.with_file_name("belay"));
        let program = program.map_or_else(beside, |program| Ok(program.to_owned()));
        let program = program.map_err(BenchError::io("find this program"))?;
        if !program.is_file() {
            let why =
                format!("there is no {}; `cargo build --release` makes it, --belay names another", program.display());
            return Err(BenchError::Options { what: "belay is not built", why });
        }
        Ok(Self { program, folder: folder.to_owned() })
    }

    fn start(&self, words: &[&str]) -> Result<Told, BenchError> {
        let mut command = Command::new(&self.program);
        command.args(words).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let die_with_the_bench = || set_parent_process_death_signal(Some(Signal::TERM)).map_err(Into::into);
        // SAFETY: prctl(2) may be called between fork and exec.
        unsafe { command.pre_exec(die_with_the_bench) };
        let mut child = command.spawn().map_err(BenchError::io("start belay"))?;
        let said = BufReader::new(child.stdout.take().expect("stdout is a pipe"));
        let (tell, events) = channel();
        let listen = move || {
            for line in said.lines().map_while(Result::ok) {
                if let Ok(seen) = serde_json::from_str::<Observation>(&line)
                    && tell.send((Instant::now(), seen.kind)).is_err()
                {
                    return;
                }
            }
        };
        std::thread::Builder::new().name("events".into()).spawn(listen).map_err(BenchError::io("start a thread"))?;
        Ok(Told { child, events, cpu: Duration::ZERO, bytes: None, blackout: None, failed: None })
    }

    /// Moves the guest of `source` into `destination`, which waits.
    pub fn migrate(&self, fabric: FabricKind, source: &Vm, destination: &Vm) -> Result<Moved, BenchError> {
        let path = |name: &str| self.folder.join(name).display().to_string();
        let (here, there) = (source.socket.display().to_string(), destination.socket.display().to_string());
        let address = match fabric {
            FabricKind::Local => format!("unix:{}", path("listen")),
            FabricKind::Tcp | FabricKind::Verbs => "127.0.0.1:0".to_owned(),
        };
        let fabric = fabric.to_string();
        let words = ["receive", "--json", "--fabric", &fabric, "--listen", &address, "--state-dir", &path("there")];
        let mut receiver = self.start(&[&words[..], &["qemu", "--qmp", &there]].concat())?;
        let (_, listening) =
            receiver.wait("say where it listens", ANSWER, |kind| matches!(kind, Kind::Listening { .. }))?;
        let Kind::Listening { address } = listening else { unreachable!("waited for it") };
        let begun = Instant::now();
        let words = ["send", "--json", "--fabric", &fabric, "--to", &address, "--policy", "none"];
        let dirs = ["--state-dir", &path("here"), "--run-dir", &path("run"), "qemu", "--qmp", &here];
        let mut sender = self.start(&[&words[..], &dirs].concat())?;
        let (released, _) = sender.wait("move the guest", MIGRATED, |kind| matches!(kind, Kind::Released { .. }))?;
        sender.end()?;
        receiver.end()?;
        Ok(Moved {
            total: released - begun,
            blackout: sender.blackout,
            bytes: receiver.bytes,
            helpers: [sender.cpu, receiver.cpu],
        })
    }
}

impl Told {
    /// Waits until it tells what is `wanted`, and when that was.
    fn wait(
        &mut self,
        what: &str,
        bound: Duration,
        wanted: impl Fn(&Kind) -> bool,
    ) -> Result<(Instant, Kind), BenchError> {
        let end = Instant::now() + bound;
        loop {
            let why = match self.events.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok((at, kind)) => {
                    self.look_at(&kind);
                    if wanted(&kind) {
                        return Ok((at, kind));
                    }
                    continue;
                }
                Err(RecvTimeoutError::Timeout) => format!("belay did not {what} within {} s", bound.as_secs()),
                Err(RecvTimeoutError::Disconnected) => {
                    format!("belay ended before it could {what}: {}", self.complaint())
                }
            };
            return Err(BenchError::Refused { why });
        }
    }

    fn look_at(&mut self, kind: &Kind) {
        match kind {
            Kind::Blackout { took_us } => self.blackout = Some(Duration::from_micros(*took_us)),
            Kind::AllLanded { bytes, .. } => self.bytes = Some(*bytes),
            Kind::CpuTime { user_us, system_us } => self.cpu = Duration::from_micros(user_us + system_us),
            Kind::Failed { what, .. } => self.failed = Some(what.clone()),
            _ => {}
        }
    }

    /// Waits until it has ended by itself, and well.
    fn end(&mut self) -> Result<(), BenchError> {
        let end = Instant::now() + ANSWER;
        while let Ok((_, kind)) = self.events.recv_timeout(end.saturating_duration_since(Instant::now())) {
            self.look_at(&kind);
        }
        loop {
            match self.child.try_wait().map_err(BenchError::io("wait for belay"))? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => {
                    return Err(BenchError::Refused {
                        why: format!("belay ended with {status}: {}", self.complaint()),
                    });
                }
                None if Instant::now() > end => return Err(BenchError::Refused { why: "belay does not end".into() }),
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    /// What it said on stderr. Only of one that has closed its events.
    fn complaint(&mut self) -> String {
        let mut said = String::new();
        if let Some(mut from) = self.child.stderr.take() {
            let _ = self.child.kill();
            let _ = from.by_ref().take(4096).read_to_string(&mut said);
        }
        self.failed.take().unwrap_or_else(|| said.trim().replace('\n', "; "))
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
