//! belay as its user runs it: processes of `belay`, followed by their log.

use crate::error::BenchError;
use crate::leavings::{self, Remembered};
use belay_transport::fabric::FabricKind;
use belay_transport::stop_point::ANNOUNCED;
use belay_vmm_glue::migrate::observation::Kind;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, set_parent_process_death_signal, waitid};
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// For anything that a process does at once.
pub const ANSWER: Duration = Duration::from_secs(20);
/// Lines remembered of what a process says beside its log.
const REMEMBERED: usize = 16;

/// The program, and where it may put things down.
pub struct Belay {
    program: PathBuf,
    folder: PathBuf,
}

/// A process of it that tells what happens.
pub struct Told {
    child: Child,
    /// Forgotten once the child has been waited for.
    _remembered: Remembered,
    lines: Receiver<(Instant, Line)>,
    /// Everything that it has told so far.
    pub seen: Vec<Kind>,
    said: Vec<String>,
}

enum Line {
    Told(Kind),
    /// What is no observation: an option that was mistyped, a panic.
    Said(String),
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

    /// A path in the folder.
    pub fn path(&self, name: &str) -> String {
        self.folder.join(name).display().to_string()
    }

    /// Where a destination may listen, for this fabric.
    pub fn address(&self, fabric: FabricKind, name: &str) -> String {
        match fabric {
            FabricKind::Local => format!("unix:{}", self.path(name)),
            FabricKind::Tcp | FabricKind::Verbs => "127.0.0.1:0".to_owned(),
        }
    }

    /// Starts it with these words. It ends with this process.
    pub fn start(&self, words: &[&str]) -> Result<Told, BenchError> {
        // Not --json: a line a checkpoint would cost as much as the checkpoint.
        self.start_telling("belay::observation=info", words)
    }

    /// As [`Self::start`], and it tells of everything, each checkpoint too.
    pub fn start_telling_all(&self, words: &[&str]) -> Result<Told, BenchError> {
        self.start_telling("belay::observation=trace", words)
    }

    fn start_telling(&self, what: &str, words: &[&str]) -> Result<Told, BenchError> {
        let mut command = Command::new(&self.program);
        let (command_word, words) = words.split_first().expect("there is a command");
        command.arg(command_word).args(["--log", what, "--log-format", "json"]).args(words);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let die_with_the_bench = || set_parent_process_death_signal(Some(Signal::TERM)).map_err(Into::into);
        // SAFETY: prctl(2) may be called between fork and exec.
        unsafe { command.pre_exec(die_with_the_bench) };
        let mut child = command.spawn().map_err(BenchError::io("start belay"))?;
        let remembered = leavings::process(&mut child)?;
        let said = BufReader::new(child.stderr.take().expect("stderr is a pipe"));
        let (tell, lines) = channel();
        let listen = move || {
            for line in said.lines().map_while(Result::ok) {
                if tell.send((Instant::now(), Line::of(line))).is_err() {
                    return;
                }
            }
        };
        std::thread::Builder::new().name("events".into()).spawn(listen).map_err(BenchError::io("start a thread"))?;
        Ok(Told { child, _remembered: remembered, lines, seen: Vec::new(), said: Vec::new() })
    }
}

impl Line {
    fn of(line: String) -> Self {
        let logged: Option<serde_json::Value> = serde_json::from_str(&line).ok();
        let kind = logged.as_ref().and_then(|logged| serde_json::from_str(logged["what"].as_str()?).ok());
        kind.map_or(Self::Said(line), Self::Told)
    }
}

impl Told {
    /// Waits until it tells what is `wanted`, and when that was.
    pub fn wait(
        &mut self,
        what: &str,
        bound: Duration,
        wanted: impl Fn(&Kind) -> bool,
    ) -> Result<(Instant, Kind), BenchError> {
        let heard = self.next_of(bound, |kind| wanted(kind).then(|| kind.clone()));
        heard.map_err(|why| {
            let why = match why {
                RecvTimeoutError::Timeout => format!("belay did not {what} within {} s", bound.as_secs()),
                RecvTimeoutError::Disconnected => {
                    format!("belay ended before it could {what}: {}", self.complaint())
                }
            };
            BenchError::Refused { why }
        })
    }

    /// The next thing told that `of` makes something of, if it comes within `bound`.
    pub fn wait_if<T>(
        &mut self,
        bound: Duration,
        of: impl Fn(&Kind) -> Option<T>,
    ) -> Result<Option<(Instant, T)>, BenchError> {
        match self.next_of(bound, of) {
            Ok(heard) => Ok(Some(heard)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => {
                Err(BenchError::Refused { why: format!("belay ended: {}", self.complaint()) })
            }
        }
    }

    fn next_of<T>(
        &mut self,
        bound: Duration,
        of: impl Fn(&Kind) -> Option<T>,
    ) -> Result<(Instant, T), RecvTimeoutError> {
        let end = Instant::now() + bound;
        loop {
            let (at, line) = self.lines.recv_timeout(end.saturating_duration_since(Instant::now()))?;
            if let Some(heard) = self.take(line).and_then(&of) {
                return Ok((at, heard));
            }
        }
    }

    /// Waits until it listens, and where.
    pub fn listening(mut self) -> Result<(Self, String), BenchError> {
        let (_, said) = self.wait("say where it listens", ANSWER, |kind| matches!(kind, Kind::Listening { .. }))?;
        let Kind::Listening { address } = said else { unreachable!("waited for it") };
        Ok((self, address))
    }

    fn take(&mut self, line: Line) -> Option<&Kind> {
        match line {
            Line::Told(kind) => {
                self.seen.push(kind);
                self.seen.last()
            }
            Line::Said(line) => {
                if self.said.len() < REMEMBERED {
                    self.said.push(line);
                }
                None
            }
        }
    }

    /// Takes in what it has told so far.
    pub fn catch_up(&mut self) {
        while let Ok((_, line)) = self.lines.try_recv() {
            self.take(line);
        }
    }

    /// Its process.
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Asks it to end, and hears it out, at most for so long. How it ends is not looked at.
    pub fn ask_to_end(&mut self, bound: Duration) {
        // One that has ended already needs no asking.
        let _ = kill_process(self.pid(), Signal::TERM);
        let end = Instant::now() + bound;
        while let Ok((_, line)) = self.lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
            self.take(line);
        }
    }

    /// Waits until it has stopped itself (SIGSTOP) at this point, where `--stop-at` told it to.
    pub fn stopped_at(&mut self, point: &str, bound: Duration) -> Result<(), BenchError> {
        let (wanted, end) = (format!("{ANNOUNCED}{point}"), Instant::now() + bound);
        loop {
            match self.lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok((_, Line::Said(line))) if line == wanted => break,
                Ok((_, line)) => {
                    self.take(line);
                }
                Err(_) => return Err(self.not_at(point, bound)),
            }
        }
        // It says so first, and stops then: told to go on in between it would stop for good.
        while !self.stands()? {
            if Instant::now() > end {
                return Err(self.not_at(point, bound));
            }
            // A wait of the kernel's has no bound.
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }

    /// Whether it has been stopped, or has ended, which its lines tell of.
    fn stands(&self) -> Result<bool, BenchError> {
        let any = WaitIdOptions::STOPPED | WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        let found = waitid(WaitId::Pid(self.pid()), any);
        found.map(|status| status.is_some()).map_err(|errno| BenchError::io("look at belay")(errno.into()))
    }

    fn not_at(&self, point: &str, bound: Duration) -> BenchError {
        let why = format!("belay did not come to {point} within {} s: {}", bound.as_secs(), self.complaint());
        BenchError::Refused { why }
    }

    /// Lets it go on from there.
    pub fn go_on(&self) -> Result<(), BenchError> {
        kill_process(self.pid(), Signal::CONT).map_err(|errno| BenchError::io("let belay go on")(errno.into()))
    }

    /// Waits until it has ended by itself, and well.
    pub fn end(&mut self) -> Result<(), BenchError> {
        self.end_with(0)
    }

    /// Waits until it has ended by itself, with this exit code (`belay help exit-codes`).
    pub fn end_with(&mut self, code: i32) -> Result<(), BenchError> {
        let end = Instant::now() + ANSWER;
        while let Ok((_, line)) = self.lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
            self.take(line);
        }
        loop {
            match self.child.try_wait().map_err(BenchError::io("wait for belay"))? {
                Some(status) if status.code() == Some(code) => return Ok(()),
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

    /// The first thing told that `of` makes something of.
    pub fn find<T>(&self, of: impl Fn(&Kind) -> Option<T>) -> Option<T> {
        self.seen.iter().find_map(of)
    }

    /// Processor time it had used when it ended.
    pub fn cpu(&self) -> Duration {
        let used = self.find(|kind| match kind {
            Kind::CpuTime { user_us, system_us } => Some(Duration::from_micros(user_us + system_us)),
            _ => None,
        });
        used.unwrap_or_default()
    }

    /// What the guest went without at the switch, as the source says.
    pub fn blackout(&self) -> Option<Duration> {
        self.find(|kind| match kind {
            Kind::Blackout { took_us } => Some(Duration::from_micros(*took_us)),
            _ => None,
        })
    }

    /// What was pulled.
    pub fn bytes(&self) -> Option<u64> {
        self.find(|kind| match kind {
            Kind::AllLanded { bytes, .. } => Some(*bytes),
            _ => None,
        })
    }

    /// What it said went wrong.
    fn complaint(&self) -> String {
        let failed = self.find(|kind| match kind {
            Kind::Failed { what, .. } => Some(what.clone()),
            _ => None,
        });
        failed.unwrap_or_else(|| self.said.join("; "))
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
