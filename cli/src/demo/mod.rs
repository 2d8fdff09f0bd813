//! `belay demo`: source, destination and an outside observer as separate processes; the destination is killed in mid-pull and
//! the guest comes back; then every byte of RAM and every packet is checked.

mod child;
mod commands;
pub mod judge;
pub mod timeline;

use crate::exit::Exit;
use crate::options::{
    ConfigFile, FabricChoice, FabricOptions, GuestOptions, OutputChoice, PolicyChoice, ProgramChoice, StagingOptions,
    TetherOptions,
};
use crate::quantity::{Bytes, Span};
use crate::{fabric, report};
use belay_transport::explain;
use belay_transport::session::{Address, Security};
use belay_vmm_glue::migrate::observation::{Kind, monotonic_us};
use child::{Proc, Role, Said};
use clap::Args;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, unbounded};
use indicatif::ProgressBar;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};
use timeline::Story;

/// Move a guest, kill its destination in mid-pull, catch it, check every byte and packet
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub struct DemoArgs {
    #[command(flatten)]
    guest: GuestOptions,
    #[command(flatten)]
    tether: TetherOptions,
    #[command(flatten)]
    receive: StagingOptions,
    #[command(flatten)]
    fabric: FabricOptions,
    /// Encrypt TCP with a pair of certificates made for this run
    #[arg(long)]
    tls: bool,
    /// Share of pages landed at which the destination is killed, in percent (10 to 90), or never: then it goes to release
    #[arg(long, value_name = "PERCENT|never", default_value = "40")]
    kill_at: KillAt,
    /// How long the guest runs on after the catch (or the release) before everything is checked
    #[arg(long, value_name = "TIME", default_value = "300ms")]
    run_on: Span,
    /// Give up after this long
    #[arg(long, value_name = "TIME", default_value = "120s")]
    deadline: Span,
    /// Print every event of every process as JSON lines, then one report object
    #[arg(long)]
    json: bool,
    /// Defaults from a TOML file
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

const EXAMPLES: &str = "\
Examples:
  belay demo                                             256 MiB over shared memory, killed at 40 % landed
  belay demo --fabric tcp --tls --vmm apart              over TLS, the VMM in a process of its own
  belay demo --fabric verbs                              through this host's RDMA device, there and back
  belay demo --memory 1G --kill-at never --policy none   plain post-copy to the end, for comparison
  belay demo --output lease                              see what a catch costs without output commit

A checkpoint is taken every 10 ms, unless --policy or --period says otherwise.";

/// When the destination dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum KillAt {
    Never,
    Percent(u8),
}

impl std::str::FromStr for KillAt {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text.trim_end_matches('%') {
            "never" => Ok(Self::Never),
            number => match number.parse() {
                Ok(percent @ 10..=90) => Ok(Self::Percent(percent)),
                _ => Err("a percentage from 10 to 90, or never".to_owned()),
            },
        }
    }
}

/// Runs the demo.
pub fn run(mut args: DemoArgs) -> Exit {
    let observer = report::reporter("demo", args.json);
    let usage = |text: &str| {
        report::failed_text(&observer, text, "Nothing was started.");
        report::ended(&observer, Exit::Usage)
    };
    if let Some(path) = &args.config {
        match ConfigFile::read(path) {
            Ok(file) => {
                args.guest = args.guest.or(file.guest);
                args.tether = args.tether.or(file.tether);
                args.receive = args.receive.or(file.receive);
                args.fabric = args.fabric.or(file.fabric);
            }
            Err(error) => return usage(&explain(&error)),
        }
    }
    // Both hosts are this one, and the demo's guest holds nothing that anybody might not read.
    args.fabric.trusted_fabric = true;
    let fabric = args.fabric.fabric.unwrap_or(FabricChoice::Local);
    if args.tls && fabric == FabricChoice::Local {
        return usage(
            "--tls goes with --fabric tcp or verbs: over local, control is a Unix socket that only this user can open",
        );
    }
    if args.tether.policy == Some(PolicyChoice::None) && args.kill_at != KillAt::Never {
        return usage(
            "--policy none leaves nothing to catch the guest with: add --kill-at never, or drop --policy none",
        );
    }
    // Looked for here, so that it is told once and not by two processes.
    if let Err(refused) = fabric::session(&args.fabric, Security::LoopbackOnly, &demo_address(fabric)) {
        return report::ended(&observer, refused.told(&observer));
    }
    let memory = args.guest.memory.unwrap_or(Bytes(256 << 20)).0;
    if let Err(text) = enough_memory(memory, &args.tether) {
        return usage(&text);
    }
    match Demo::new(args, fabric, memory).and_then(Demo::run) {
        Ok(exit) => exit,
        Err(error) => {
            report::failed(&observer, &error, "Every process of the demo has been ended.");
            let exit = match error {
                DemoError::Interrupted(_) => Exit::Interrupted,
                DemoError::EndedEarly { exit: Some(exit), .. } => exit,
                _ => Exit::Failed,
            };
            report::ended(&observer, exit)
        }
    }
}

/// The kind of address over which a fabric runs, for a check before there is one.
fn demo_address(fabric: FabricChoice) -> Address {
    match fabric {
        FabricChoice::Local => Address::Unix(PathBuf::new()),
        FabricChoice::Auto | FabricChoice::Tcp | FabricChoice::Verbs => Address::Tcp("127.0.0.1:0".to_owned()),
    }
}

/// Two copies of RAM, the overflow reservation, ring and staging, and the checker's own copy must fit in what is free.
fn enough_memory(memory: u64, tether: &TetherOptions) -> Result<(), String> {
    let ring = tether.ring.map_or(64 << 20, |bytes| bytes.0);
    let overflow =
        if tether.policy == Some(PolicyChoice::None) { 0 } else { tether.overflow.map_or(memory, |bytes| bytes.0) };
    let wanted = 3 * memory + overflow + 3 * ring + (128 << 20);
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let available = available.and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    match available {
        Some(kib) if kib * 1024 < wanted => Err(format!(
            "a guest of {} needs {} (two copies of RAM, the overflow reservation, ring, staging and the checker), and {} is available: choose a smaller --memory or --overflow",
            report::bytes(memory),
            report::bytes(wanted),
            report::bytes(kib * 1024)
        )),
        _ => Ok(()),
    }
}

/// What can go wrong with the demo itself (a wrong result is a verdict, not one of these).
#[derive(Debug, thiserror::Error)]
enum DemoError {
    #[error("cannot {doing}")]
    Io {
        doing: &'static str,
        #[source]
        source: std::io::Error,
    },
    #[error("the {who} ended before it was ready; what was said last: {said}")]
    EndedEarly { who: Role, said: String, exit: Option<Exit> },
    #[error("after {after:?} the demo still waited for {waiting_for}; what was said last: {said}")]
    TookTooLong { after: Duration, waiting_for: &'static str, said: String },
    #[error("interrupted by signal {0}")]
    Interrupted(i32),
    #[error("cannot make certificates")]
    Keygen(#[source] belay_transport::session::SessionError),
}

fn io(doing: &'static str) -> impl FnOnce(std::io::Error) -> DemoError {
    move |source| DemoError::Io { doing, source }
}

struct Demo {
    args: DemoArgs,
    fabric: FabricChoice,
    memory: u64,
    /// Sockets, certificates and packet logs; gone when the demo ends.
    directory: Scratch,
    said: Receiver<Said>,
    say: Sender<Said>,
    signals: Receiver<i32>,
    started: Instant,
    story: Story,
    last_lines: Vec<String>,
}

/// A directory that is removed again.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> std::io::Result<Self> {
        let path = std::env::temp_dir().join(format!("belay-demo-{}", std::process::id()));
        std::fs::create_dir(&path)?;
        Ok(Self(path))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// What was known when the destination was lost.
#[derive(Debug, Clone, Copy, Default)]
pub struct AtKill {
    landed_frames: u64,
    absent_frames: u64,
    commits: u64,
    newest_commit: u64,
    released_packets: u64,
    held_packets: u64,
}

impl AtKill {
    /// Takes in what the destination said next.
    pub fn learn(&mut self, said: &Kind) {
        match *said {
            Kind::Committed { epoch, .. } => (self.commits, self.newest_commit) = (self.commits + 1, epoch),
            Kind::Pull { landed_frames, absent_frames, held_packets, released_packets, .. } => {
                (self.landed_frames, self.absent_frames) = (landed_frames, absent_frames);
                (self.held_packets, self.released_packets) = (held_packets, released_packets);
            }
            _ => {}
        }
    }

    fn landed_percent(&self) -> f64 {
        self.landed_frames as f64 * 100.0 / (self.landed_frames + self.absent_frames).max(1) as f64
    }
}

impl Demo {
    fn new(args: DemoArgs, fabric: FabricChoice, memory: u64) -> Result<Self, DemoError> {
        let (say, said) = unbounded();
        Ok(Self {
            args,
            fabric,
            memory,
            directory: Scratch::new().map_err(io("make a directory for the demo's sockets"))?,
            said,
            say,
            signals: crate::signals::termination().map_err(io("catch signals"))?,
            started: Instant::now(),
            story: Story::default(),
            last_lines: Vec::new(),
        })
    }

    fn run(mut self) -> Result<Exit, DemoError> {
        let packets = self.directory.path("packets.log");
        let mut observer = self.start(Role::Observer, self.observer_command(&packets)?)?;
        let output_to = self.await_listening(Role::Observer)?;
        let credentials = self.credentials()?;
        let mut destination = self.start(Role::Destination, self.receive_command(&output_to, credentials)?)?;
        let address = self.await_listening(Role::Destination)?;
        let mut source = self.start(Role::Source, self.send_command(&address, &output_to, credentials)?)?;

        let at_kill = match self.args.kill_at {
            KillAt::Percent(percent) => {
                let at_kill = self.await_kill_moment(percent)?;
                self.story.killed_at_us = Some(monotonic_us());
                // With the VMM apart, the host's death takes it too.
                destination.kill().map_err(io("kill the destination"))?;
                Some(at_kill)
            }
            KillAt::Never => None,
        };
        let holder = if at_kill.is_some() { Role::Source } else { Role::Destination };
        self.await_end(holder)?;
        // In a release the source ends by itself once it has been told farewell; after a catch the destination is dead. A source
        // whose guest did not get away runs it until it is told to end.
        self.drain();
        if at_kill.is_none() && !self.story.is_released() {
            source.terminate();
        }
        for proc in [&mut source, &mut destination] {
            if proc.role() == holder || at_kill.is_none() {
                let bound = self.left().max(Duration::from_millis(100));
                proc.wait(bound).map_err(io("wait for a process of the demo"))?;
            }
        }
        observer.terminate();
        observer.wait(Duration::from_secs(10)).map_err(io("wait for the observer"))?;
        self.drain();
        let verdict =
            judge::judge(&self.story, at_kill.as_ref(), self.args.tether.output == Some(OutputChoice::Lease), &packets);
        self.show(&verdict);
        Ok(if verdict.passed() { Exit::Done } else { Exit::CheckFailed })
    }

    fn start(&self, role: Role, command: Command) -> Result<Proc, DemoError> {
        Proc::start(role, command, self.say.clone()).map_err(io("start a process of the demo"))
    }

    fn left(&self) -> Duration {
        self.args.deadline.0.saturating_sub(self.started.elapsed())
    }

    /// Takes the next thing said, remembers it, and tells it to whoever watches.
    fn next(&mut self, waiting_for: &'static str) -> Result<Said, DemoError> {
        loop {
            if let Ok(signal) = self.signals.try_recv() {
                return Err(DemoError::Interrupted(signal));
            }
            match self.said.recv_timeout(self.left().min(Duration::from_millis(100))) {
                Ok(said) => {
                    self.remember(&said);
                    return Ok(said);
                }
                Err(RecvTimeoutError::Timeout) if !self.left().is_zero() => {}
                Err(_) => {
                    let (after, said) = (self.args.deadline.0, self.last_words());
                    return Err(DemoError::TookTooLong { after, waiting_for, said });
                }
            }
        }
    }

    fn last_words(&self) -> String {
        if self.last_lines.is_empty() { "nothing".to_owned() } else { self.last_lines.join(" | ") }
    }

    /// What was wrong with the words that both were given, or with this host, is as wrong for the demo.
    fn ended_early(&self, who: Role) -> DemoError {
        let story = match who {
            Role::Source => &self.story.source,
            Role::Destination => &self.story.destination,
            Role::Observer => &self.story.observer,
        };
        let code = story.iter().find_map(|seen| match seen.kind {
            Kind::Ended { exit_code, .. } => Some(exit_code),
            _ => None,
        });
        let exit = [Exit::Usage, Exit::Missing].into_iter().find(|exit| code == Some(exit.code()));
        DemoError::EndedEarly { who, said: self.last_words(), exit }
    }

    fn remember(&mut self, said: &Said) {
        match said {
            Said::Observation(role, observation) => {
                if self.args.json
                    && let Ok(line) = serde_json::to_string(observation)
                {
                    println!("{line}");
                }
                if let Kind::Failed { what, advice } = &observation.kind {
                    self.last_lines.push(format!("{what}. {advice}"));
                }
                match role {
                    Role::Source => self.story.source.push((**observation).clone()),
                    Role::Destination => self.story.destination.push((**observation).clone()),
                    Role::Observer => self.story.observer.push((**observation).clone()),
                }
            }
            Said::Line(role, line) => {
                self.last_lines.push(format!("{role:?}: {line}"));
                let surplus = self.last_lines.len().saturating_sub(8);
                self.last_lines.drain(..surplus);
            }
            Said::Closed(_) => {}
        }
    }

    /// Takes what has been said already, without waiting.
    fn drain(&mut self) {
        while let Ok(said) = self.said.try_recv() {
            self.remember(&said);
        }
    }

    fn await_listening(&mut self, who: Role) -> Result<String, DemoError> {
        loop {
            match self.next("a process to listen")? {
                Said::Observation(role, observation) if role == who => {
                    if let Kind::Listening { address } = observation.kind {
                        return Ok(address);
                    }
                }
                Said::Closed(role) if role == who => {
                    return Err(self.ended_early(who));
                }
                _ => {}
            }
        }
    }

    /// Waits until the pull has come as far as asked, with at least three commits, a packet out and one held.
    fn await_kill_moment(&mut self, percent: u8) -> Result<AtKill, DemoError> {
        let bar = self.bar("pulling");
        let mut seen = AtKill::default();
        loop {
            let said = self.next(
                "the moment to kill the destination (pull in progress, three commits, a packet out and one held)",
            )?;
            match said {
                Said::Observation(Role::Destination, observation) => {
                    seen.learn(&observation.kind);
                    if !matches!(observation.kind, Kind::Pull { .. }) {
                        continue;
                    }
                    bar.set_length(seen.landed_frames + seen.absent_frames);
                    bar.set_position(seen.landed_frames);
                    // Under a lease nothing is held, so a held packet is not waited for.
                    let held = seen.held_packets >= 1 || self.args.tether.output == Some(OutputChoice::Lease);
                    let far = seen.landed_percent() >= f64::from(percent);
                    // A scanner speaks only once it has read everything.
                    let shown =
                        self.args.guest.guest == Some(ProgramChoice::Scanner) || (seen.released_packets >= 1 && held);
                    if far && seen.commits >= 3 && shown {
                        bar.finish_and_clear();
                        return Ok(seen);
                    }
                }
                Said::Closed(who @ (Role::Source | Role::Destination)) => {
                    return Err(self.ended_early(who));
                }
                _ => {}
            }
        }
    }

    fn await_end(&mut self, who: Role) -> Result<(), DemoError> {
        loop {
            match self.next("the guest to run on and be checked")? {
                Said::Observation(role, observation)
                    if role == who && matches!(observation.kind, Kind::Ended { .. }) =>
                {
                    return Ok(());
                }
                Said::Closed(role) if role == who => return Ok(()),
                _ => {}
            }
        }
    }

    fn bar(&self, what: &'static str) -> ProgressBar {
        if self.args.json || !std::io::stderr().is_terminal() {
            return ProgressBar::hidden();
        }
        report::progress_bar(what, "pages")
    }

    fn show(&self, verdict: &judge::Verdict) {
        let mut out = std::io::stdout().lock();
        let text = if self.args.json {
            serde_json::to_string(&verdict.report()).expect("a report is plain data") + "\n"
        } else {
            format!("{}\n{}\n{}", self.story.draw(), self.story.histogram(), verdict.text())
        };
        let _ = out.write_all(text.as_bytes());
    }
}
