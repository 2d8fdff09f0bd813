//! One run: starts observer, destination and source, waits for the moment, strikes, waits until all is quiet, and judges.

use super::actor::{Actor, Log, Logs, Role, Told};
use super::case::{Case, Moment, Phase, SHORT_OF_HOLD, Script, Strike};
use super::doctor::{self, Lie};
use super::launch::{Launch, belay, memory, path, unix};
use super::pace::Pace;
use super::points::At;
use super::relay::Relay;
use super::second::Second;
use super::verdict::{self, Evidence, RunReport, Said};
use super::{stage, strike};
use crate::options::FabricChoice;
use belay_transport::session::SessionError;
use belay_vmm_glue::migrate::observation::Kind;
use rustix::process::Signal;
use std::path::Path;
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

/// Why a run could not be made or judged.
#[derive(Debug, thiserror::Error)]
pub enum ConductError {
    #[error("cannot {doing}")]
    Io {
        doing: &'static str,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot make the hosts' certificates")]
    Keygen(#[source] SessionError),
    #[error("{who:?} said nothing of {what} within {bound:?}")]
    Silent { who: Role, what: String, bound: Duration },
}

pub(super) fn io(doing: &'static str) -> impl FnOnce(std::io::Error) -> ConductError {
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
    /// Where the observer is, and where the destination listens.
    pub output: String,
    pub listens: String,
    /// Between the hosts, where the strike needs one.
    pub link: Option<Relay>,
    /// Between the guest's owners and the observer, where the strike needs one.
    pub view: Option<Relay>,
}

/// Makes the run and judges it.
pub fn run(case: Case, pace: Pace, lies: &[Lie]) -> Result<RunReport, ConductError> {
    let begun = Instant::now();
    let mut run = Run::start(case, pace)?;
    let came = run.await_moment()?;
    let struck = match &came {
        Ok(_) => Some(strike::land(&mut run)?),
        Err(_) => None,
    };
    let forgotten = run.await_quiet()?;
    // Before the second one, which writes a record of its own.
    let released = stage::files().iter().any(|file| file.contains("/source/released-") && file.ends_with(".json"));
    let second = if came.is_ok() && case.is_followed() { Some(Second::make(&run)?) } else { None };
    let left = await_nothing_left(pace.of(NOTHING_LEFT_BOUND));
    let logs = run.logs.lock();
    let evidence = Evidence {
        case,
        came: came.as_deref().map_err(String::as_str),
        struck,
        source: Said::of(logs.in_turn(Role::Source)),
        destination: Said::of(logs.in_turn(Role::Destination)),
        observer_exit: logs[Role::Observer].ended,
        seen: crate::observe::read_log(&path("packets")).map_err(io("read the observer's log"))?,
        released,
        second,
        left: left.into_iter().chain(kept_memory()).collect(),
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
        let command = |made: std::io::Result<_>| made.map_err(io("make the command of a process of the run"));
        let observer = start(Role::Observer, command(belay(&observe))?)?;
        listening(&logs, Role::Observer, pace)?;
        let view = match case.strike {
            Strike::ObserverCut => {
                let view = Relay::unix(&path("view.sock"), path("observer.sock"));
                Some(view.map_err(io("put a relay before the observer"))?)
            }
            _ => None,
        };
        let output = view.as_ref().map_or(unix("observer.sock"), |view| view.address.clone());
        let launch = Launch { case: &case, pace, script: &script, output: &output };
        launch.make_certificates().map_err(ConductError::Keygen)?;
        let destination = start(Role::Destination, command(launch.receive())?)?;
        let listens = listening(&logs, Role::Destination, pace)?;
        let link = match case.strike {
            Strike::LinkCut | Strike::HalfOpen if case.fabric == FabricChoice::Tcp => {
                Some(Relay::tcp(&listens).map_err(io("put a relay between the hosts"))?)
            }
            _ => None,
        };
        let to = link.as_ref().map_or(&listens, |link| &link.address);
        let source = start(Role::Source, command(launch.send(to))?)?;
        Ok(Self { case, pace, script, logs, source, destination, observer, output, listens, link, view })
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
                self.logs.wait(soon, |logs| logs[role].is_stopped.then_some(()));
            }
            // What this waits for is time itself: the strike lands anywhere, not on the heels of an event.
            None => std::thread::sleep(Duration::from_millis(self.script.delay_ms)),
        }
        Ok(came)
    }

    fn until(&self, end: Instant, moment: &Moment) -> Result<Result<String, String>, ConductError> {
        let blow_is_ours = self.case.phase == Phase::Catch;
        let found = self.logs.wait(end, |logs| {
            let (source, destination) = (&logs[Role::Source], &logs[Role::Destination]);
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
        let settled = |logs: &Told| {
            let log = &logs[Role::Destination];
            (log.ended.is_some() || log.was("fenced")).then_some(())
        };
        self.logs.wait(soon, settled);
        // It may just have heard that it owns the guest, and then ends by itself.
        let fate = |logs: &Told| {
            let log = &logs[Role::Destination];
            (log.ended.is_some() || log.was("owner")).then_some(())
        };
        let heard = self.logs.wait((Instant::now() + self.pace.of(FATE_BOUND)).min(soon), fate).is_some();
        if !heard || self.destination.wait(soon).is_none() {
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
pub(super) fn listening(logs: &Logs, role: Role, pace: Pace) -> Result<String, ConductError> {
    let bound = pace.of(LISTENING_BOUND);
    let address = |kind: &Kind| match kind {
        Kind::Listening { address } => Some(address.clone()),
        _ => None,
    };
    let found = logs.wait(Instant::now() + bound, |logs| logs[role].find(address));
    found.ok_or(ConductError::Silent { who: role, what: "where it listens".to_owned(), bound })
}

/// Whether the moment is now, and what the run is doing.
fn has_come(moment: &Moment, logs: &Told) -> Option<String> {
    let destination = &logs[Role::Destination];
    let pull = || {
        destination.events.iter().rev().find_map(|event| match event.kind {
            Kind::Pull { landed_frames, absent_frames, .. } => Some((landed_frames, absent_frames)),
            _ => None,
        })
    };
    match moment {
        Moment::At { point, times } => {
            let role = if point.at == At::Source { Role::Source } else { Role::Destination };
            let log = &logs[role];
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

/// Files of guest memory that nobody can need any more: every run comes to an end.
fn kept_memory() -> impl Iterator<Item = String> {
    let files = stage::files().into_iter();
    files.filter(|file| Path::new(file).starts_with(memory())).map(|file| format!("memory with a name: {file}"))
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
