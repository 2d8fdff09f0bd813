//! One run: starts observer, destination and source, waits for the moment, strikes, waits until all is quiet, and judges.

use super::actor::{Actor, Log, Logs, Role};
use super::case::{Case, Moment, Phase, SHORT_OF_HOLD, Script, Strike};
use super::doctor::{self, Lie};
use super::pace::Pace;
use super::points::At;
use super::relay::Relay;
use super::verdict::{self, Evidence, RunReport, Said};
use super::{stage, strike};
use crate::options::FabricChoice;
use belay_vmm_glue::migrate::observation::Kind;
use rustix::process::Signal;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

// All of these at the pace of a host with processors of its own.
/// How long the moment of the strike may take to come.
const MOMENT_BOUND: Duration = Duration::from_secs(25);
/// How long everything may take to be quiet after it.
const QUIET_BOUND: Duration = Duration::from_secs(25);
/// How long the threads that do not stand at a stop point have to stop too.
const STOP_BOUND: Duration = Duration::from_millis(30);
/// How long a destination that was told to end may take: one step of a handshake, with some spare.
const END_BOUND: Duration = Duration::from_secs(12);
/// How long a fenced destination is left to hear its fate before it is told to end.
const FATE_BOUND: Duration = Duration::from_millis(400);
/// How long a process may take to say where it listens, to end once it has been told to, and to be gone once it was killed.
const LISTENING_BOUND: Duration = Duration::from_secs(10);
const OBSERVER_BOUND: Duration = Duration::from_secs(10);
const GONE_BOUND: Duration = Duration::from_secs(5);
const NOTHING_LEFT_BOUND: Duration = Duration::from_secs(3);

/// How long the guest runs before its switch, and once its fate is settled.
const RUN_BEFORE: Duration = Duration::from_millis(20);
const RUN_ON: Duration = Duration::from_millis(60);

/// Why a run could not be made or judged.
#[derive(Debug, thiserror::Error)]
pub enum ConductError {
    #[error("cannot {doing}")]
    Io {
        doing: &'static str,
        #[source]
        source: std::io::Error,
    },
    #[error("{who:?} said nothing of {what} within {bound:?}")]
    Silent { who: Role, what: String, bound: Duration },
}

fn io(doing: &'static str) -> impl FnOnce(std::io::Error) -> ConductError {
    move |source| ConductError::Io { doing, source }
}

/// A run under way.
pub(super) struct Run {
    pub case: Case,
    pub pace: Pace,
    pub script: Script,
    pub logs: Arc<Logs>,
    pub source: Actor,
    pub destination: Actor,
    pub observer: Actor,
    /// Between the hosts, where the strike needs one.
    pub link: Option<Relay>,
    /// Between the guest's owners and the observer, where the strike needs one.
    pub view: Option<Relay>,
}

fn path(name: &str) -> PathBuf {
    Path::new(stage::PLACE).join(name)
}

fn unix(name: &str) -> String {
    format!("unix:{}", path(name).display())
}

fn belay(arguments: &[&str]) -> Result<Command, ConductError> {
    let mut command = Command::new(std::env::current_exe().map_err(io("find belay's own program"))?);
    command.args(arguments).env("TMPDIR", stage::PLACE);
    Ok(command)
}

/// Makes the run and judges it.
pub fn run(case: Case, pace: Pace, lies: &[Lie]) -> Result<RunReport, ConductError> {
    let begun = Instant::now();
    let mut run = Run::start(case, pace)?;
    let came = run.await_moment()?;
    let struck = match &came {
        Ok(_) => Some(strike::land(&run).map_err(io("strike"))?),
        Err(_) => None,
    };
    let forgotten = run.await_quiet()?;
    let left = await_nothing_left(pace.of(NOTHING_LEFT_BOUND));
    let logs = run.logs.lock();
    let evidence = Evidence {
        case,
        came: came.as_deref().map_err(String::as_str),
        struck,
        source: Said::of(&logs[Role::Source as usize]),
        destination: Said::of(&logs[Role::Destination as usize]),
        observer_exit: logs[Role::Observer as usize].ended,
        seen: crate::observe::read_log(&path("packets")).map_err(io("read the observer's log"))?,
        released: stage::files().iter().any(|file| file.contains("/source/released-") && file.ends_with(".json")),
        left,
        forgotten,
        took: begun.elapsed(),
    };
    let report = verdict::judge(&evidence);
    Ok(if lies.is_empty() { report } else { doctor::try_with(lies, &evidence, report) })
}

impl Run {
    fn start(case: Case, pace: Pace) -> Result<Self, ConductError> {
        let script = case.script();
        let logs = Arc::new(Logs::default());
        let start = |role, command| Actor::start(role, command, &logs).map_err(io("start a process of the run"));
        let log = path("packets");
        let observe = ["observe", "--json", "--listen", &unix("observer.sock"), "--log", &log.display().to_string()];
        let observer = start(Role::Observer, belay(&observe)?)?;
        listening(&logs, Role::Observer, pace)?;
        let view = match case.strike {
            Strike::ObserverCut => {
                let view = Relay::unix(&path("view.sock"), path("observer.sock"));
                Some(view.map_err(io("put a relay before the observer"))?)
            }
            _ => None,
        };
        let output = view.as_ref().map_or(unix("observer.sock"), |view| view.address.clone());
        let destination = start(Role::Destination, receive(&case, pace, &script, &output)?)?;
        let mut to = listening(&logs, Role::Destination, pace)?;
        let link = match case.strike {
            Strike::LinkCut | Strike::HalfOpen if case.fabric == FabricChoice::Tcp => {
                Some(Relay::tcp(&to).map_err(io("put a relay between the hosts"))?)
            }
            _ => None,
        };
        to = link.as_ref().map_or(to, |link| link.address.clone());
        let source = start(Role::Source, send(&case, pace, &script, &output, &to)?)?;
        Ok(Self { case, pace, script, logs, source, destination, observer, link, view })
    }

    /// Waits for the moment of the strike. What the run was doing then, or why it never came there.
    fn await_moment(&self) -> Result<Result<String, String>, ConductError> {
        let end = Instant::now() + self.pace.of(MOMENT_BOUND);
        if self.case.phase == Phase::Catch {
            // The first blow: the source hears nothing any more, and begins to catch.
            let percent = self.script.hold_at.map_or(10, |percent| percent - SHORT_OF_HOLD);
            if let Err(why) = self.until(end, &Moment::Landed { percent })? {
                return Ok(Err(why));
            }
            self.destination.signal(Signal::STOP);
        }
        let came = self.until(end, &self.script.moment)?;
        match self.script.moment.stop_at() {
            Some((at, _)) => {
                let role = if at == At::Source { Role::Source } else { Role::Destination };
                let soon = Instant::now() + self.pace.of(STOP_BOUND);
                self.logs.wait(soon, |logs| logs[role as usize].is_stopped.then_some(()));
            }
            // What this waits for is time itself: the strike lands anywhere, not on the heels of an event.
            None => std::thread::sleep(Duration::from_millis(self.script.delay_ms)),
        }
        Ok(came)
    }

    fn until(&self, end: Instant, moment: &Moment) -> Result<Result<String, String>, ConductError> {
        let blow_is_ours = self.case.phase == Phase::Catch;
        let found = self.logs.wait(end, |logs| {
            let (source, destination) = (&logs[Role::Source as usize], &logs[Role::Destination as usize]);
            if let Some(came) = has_come(moment, logs) {
                return Some(Ok(came));
            }
            let by_itself = |log: &Log| (!blow_is_ours).then(|| noticed(log)).flatten();
            let early = by_itself(source).map(|by| format!("the source lost the destination by itself: {by}"));
            let ended = [source, destination].into_iter().find_map(|log| Some((log.ended?, log)));
            let over =
                ended.map(|(code, log)| format!("a role ended with {code} before its time: {}", last_words(log)));
            early.or(over).map(Err)
        });
        let what = moment.to_string();
        let silent = || ConductError::Silent { who: Role::Destination, what, bound: self.pace.of(MOMENT_BOUND) };
        found.ok_or_else(silent)
    }

    /// Waits until every process has ended that can, and tells the others to. What had to be told to end, and could not say why.
    fn await_quiet(&mut self) -> Result<Vec<String>, ConductError> {
        let end = Instant::now() + self.pace.of(QUIET_BOUND);
        let mut forgotten = Vec::new();
        let source_ended = self.source.wait(end).is_some();
        if !source_ended {
            forgotten.push("the source".to_owned());
        }
        // With the source over, a destination that neither owns the guest nor knows its fate waits for a person.
        let soon = if source_ended { end } else { Instant::now() };
        let destination = Role::Destination as usize;
        let settled = |logs: &[Log; 3]| {
            let log = &logs[destination];
            (log.ended.is_some() || log.was("fenced")).then_some(())
        };
        self.logs.wait(soon, settled);
        if self.destination.wait((Instant::now() + self.pace.of(FATE_BOUND)).min(soon)).is_none() {
            self.destination.signal(Signal::CONT);
            self.destination.signal(Signal::TERM);
            if self.destination.wait(Instant::now() + self.pace.of(END_BOUND)).is_none() {
                forgotten.push("the destination".to_owned());
            }
        }
        for actor in [&self.source, &self.destination] {
            actor.signal(Signal::KILL);
            actor.wait(Instant::now() + self.pace.of(GONE_BOUND));
        }
        self.observer.signal(Signal::TERM);
        if self.observer.wait(Instant::now() + self.pace.of(OBSERVER_BOUND)).is_none() {
            forgotten.push("the observer".to_owned());
        }
        Ok(forgotten)
    }
}

/// Where the observer or the destination listens.
fn listening(logs: &Logs, role: Role, pace: Pace) -> Result<String, ConductError> {
    let bound = pace.of(LISTENING_BOUND);
    let address = |kind: &Kind| match kind {
        Kind::Listening { address } => Some(address.clone()),
        _ => None,
    };
    let found = logs.wait(Instant::now() + bound, |logs| logs[role as usize].find(address));
    found.ok_or(ConductError::Silent { who: role, what: "where it listens".to_owned(), bound })
}

fn receive(case: &Case, pace: Pace, script: &Script, output: &str) -> Result<Command, ConductError> {
    let listen = match case.fabric {
        FabricChoice::Local => unix("receive.sock"),
        _ => "127.0.0.1:0".to_owned(),
    };
    let state = path("destination").display().to_string();
    let mut command = belay(&["receive", "--json", "--listen", &listen, "--output-to", output, "--state-dir", &state])?;
    command.args(["--fabric", &case.fabric.to_string(), "--drive", "kvm", "--check", "--run-on", &pace.ms(RUN_ON)]);
    command.args(["--vmm", if script.apart { "apart" } else { "in-process" }]);
    if let Some(percent) = script.hold_at {
        command.args(["--hold-pull-at", &percent.to_string()]);
    }
    finish(command, case, script, At::Destination)
}

fn send(case: &Case, pace: Pace, script: &Script, output: &str, to: &str) -> Result<Command, ConductError> {
    let state = path("source").display().to_string();
    let mut command = belay(&["send", "--json", "--to", to, "--output-to", output, "--state-dir", &state])?;
    command.args(["--fabric", &case.fabric.to_string(), "--drive", "kvm", "--check", "--run-on", &pace.ms(RUN_ON)]);
    command.args(["--memory", "64M", "--working-set", "24M", "--ring", "16M", "--run-before", &pace.ms(RUN_BEFORE)]);
    command.args(["--seed", &script.guest_seed.to_string(), "--tracker", script.tracker]);
    command.args(pace.words());
    command.args(["--release", if script.keep_tether { "never" } else { "when-landed" }]);
    finish(command, case, script, At::Source)
}

fn finish(mut command: Command, case: &Case, script: &Script, at: At) -> Result<Command, ConductError> {
    if case.fabric == FabricChoice::Verbs {
        command.arg("--trusted-fabric");
    }
    command.arg("--run-dir").arg(path("run"));
    if let Some((_, point)) = script.moment.stop_at().filter(|(who, _)| *who == at) {
        command.args(["--stop-at", &point]);
    }
    Ok(command)
}

/// Whether the moment is now, and what the run is doing.
fn has_come(moment: &Moment, logs: &[Log; 3]) -> Option<String> {
    let destination = &logs[Role::Destination as usize];
    let pull = || {
        destination.events.iter().rev().find_map(|event| match event.kind {
            Kind::Pull { landed_frames, absent_frames, .. } => Some((landed_frames, absent_frames)),
            _ => None,
        })
    };
    match moment {
        Moment::At { point, times } => {
            let role = if point.at == At::Source { Role::Source } else { Role::Destination };
            let log = &logs[role as usize];
            // Its thread stands there as soon as it has said so. The whole process need not: a thread that waits in the kernel for a
            // page stops when it gets it.
            let stands = log.stopped_at.as_deref() == Some(point.name);
            stands.then(|| format!("stopped at {} number {times}", point.name))
        }
        Moment::Landed { percent } => {
            let (landed, absent) = pull()?;
            let commits =
                destination.events.iter().filter(|event| matches!(event.kind, Kind::Committed { .. })).count();
            let far = absent > 0 && landed * 100 >= (landed + absent) * percent && commits >= 3;
            far.then(|| format!("{landed} of {} pages landed, {commits} commits", landed + absent))
        }
        Moment::AllLanded => {
            let landed = destination.find(|kind| matches!(kind, Kind::AllLanded { .. }).then_some(()));
            landed.map(|()| "all landed, tether kept".to_owned())
        }
    }
}

/// What made the source think that the destination is lost.
pub(super) fn noticed(source: &Log) -> Option<String> {
    source.find(|kind| match kind {
        Kind::Noticed { by } => Some(by.clone()),
        _ => None,
    })
}

fn last_words(log: &Log) -> String {
    let failed = log.find(|kind| match kind {
        Kind::Failed { what, .. } => Some(what.clone()),
        _ => None,
    });
    failed.unwrap_or_else(|| log.text.lines().last().unwrap_or("it said nothing").to_owned())
}

/// What is left of the run's processes once those that end by themselves have; they are ended.
fn await_nothing_left(bound: Duration) -> Vec<String> {
    let end = Instant::now() + bound;
    loop {
        let left = stage::running();
        if left.is_empty() || Instant::now() > end {
            for &(pid, _) in &left {
                if let Some(pid) = rustix::process::Pid::from_raw(pid) {
                    let _ = rustix::process::kill_process(pid, Signal::KILL);
                }
            }
            return left.into_iter().map(|(pid, line)| format!("process {pid}: {line}")).collect();
        }
        // Nothing tells of the end of somebody else's child.
        std::thread::sleep(Duration::from_millis(5));
    }
}
