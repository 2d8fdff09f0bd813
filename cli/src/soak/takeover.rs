//! The takeover strikes: a process is killed, and another goes on in its place. What it finds depends on where the first one died; what
//! then goes on for ever is struck again, or comes to its end as any migration does.

use super::actor::{Actor, Log, Role, Told};
use super::case::{Case, Moment, Phase, Strike};
use super::conduct::{ConductError, Run, io};
use super::launch::{Launch, path};
use super::points;
use super::strike::{Struck, kill_destination, kill_vmm};
use belay_vmm_glue::migrate::observation::Kind;
use rustix::process::Signal;
use std::time::{Duration, Instant};

/// How long whoever takes over may take to come to the next thing that is waited for, its grace included.
const SUCCESSION_BOUND: Duration = Duration::from_secs(20);
/// How long a killed process may take to be gone.
const GONE_BOUND: Duration = Duration::from_secs(5);

/// Who else is there when a page server is taken over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Setting {
    /// Output leaves by lease: the source waits for the next page server.
    Lease,
    /// Output leaves by commit: the source has caught the guest, and what is left of it is given up.
    Commit,
    /// The source has died before, and is taken over as well.
    BothDead,
}

/// Where the first that takes over is killed too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Again {
    /// Once it has said this: an event, or a state.
    Said(&'static str),
    /// At this stop point.
    At(&'static str),
}

/// How a run ends that goes on with its pull held, or with its tether kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The destination is killed.
    Kill,
    /// The operator of the destination gives the guest back.
    GivenBack,
}

/// What follows from a case's seed for a takeover.
#[derive(Debug, Clone, Copy)]
pub struct Takeover {
    /// Of a page server's.
    pub setting: Setting,
    pub again: Option<Again>,
    /// Whoever stands still goes on once somebody takes over, not before.
    pub late: bool,
    /// Of a source's.
    pub ending: Ending,
}

impl Takeover {
    /// Draws one, if the case has one.
    pub fn draw(case: &Case, moment: &Moment, mut draw: impl FnMut(u64) -> u64) -> Option<Self> {
        let settings = [Setting::Lease, Setting::Commit, Setting::BothDead];
        let setting = match (case.strike, case.phase) {
            // Before the guest has been at the destination for certain the source decides, and in a catch it has decided.
            (Strike::ServerTakeover, Phase::Catch) => Setting::Commit,
            (
                Strike::ServerTakeover,
                Phase::Prepare | Phase::Switch | Phase::Handover | Phase::Landing | Phase::Release,
            ) => settings[draw(2) as usize],
            (Strike::ServerTakeover, _) => settings[draw(3) as usize],
            // What a source leaves is caught from, which `lease` would ask its operator for.
            (Strike::SourceTakeover, _) => Setting::Commit,
            _ => return None,
        };
        let (twice, which) = (draw(2) == 0, draw(5) as usize);
        let again = if twice { again(case, moment, setting, which) } else { None };
        let ending = if draw(2) == 0 { Ending::Kill } else { Ending::GivenBack };
        Some(Self { setting, again, late: draw(2) == 0, ending })
    }

    /// Whether a tether that the moment needs is let go by itself afterwards.
    pub fn is_released_in_time(&self, strike: Strike) -> bool {
        strike == Strike::ServerTakeover && self.setting != Setting::Commit
    }

    /// Whether the source's memory outlives it.
    pub fn keeps_memory(&self, strike: Strike) -> bool {
        strike == Strike::SourceTakeover || self.setting == Setting::BothDead
    }

    /// For a plan: what is done beside the kill.
    pub fn words(&self, strike: Strike) -> String {
        let setting = match (strike, self.setting) {
            (Strike::ServerTakeover, Setting::Lease) => ", output by lease",
            (Strike::ServerTakeover, Setting::Commit) => ", output by commit",
            (Strike::ServerTakeover, Setting::BothDead) => ", the source dead before and taken over as well",
            _ => "",
        };
        match self.again {
            Some(Again::Said(what)) => format!("{setting}; whoever takes over is killed too, once it has said {what}"),
            Some(Again::At(point)) => format!("{setting}; whoever takes over is killed too, at {point}"),
            None => setting.to_owned(),
        }
    }
}

fn again(case: &Case, moment: &Moment, setting: Setting, which: usize) -> Option<Again> {
    let at = match moment {
        Moment::At { point, .. } => Some(point.name),
        Moment::Landed { .. } | Moment::AllLanded => None,
    };
    match (case.strike, case.phase) {
        // It is over at once: there is nothing to take over.
        (_, Phase::Prepare) => None,
        (Strike::SourceTakeover, Phase::Switch) if at == Some("switch-paused") => None,
        (Strike::SourceTakeover, Phase::Catch) if at == Some("catch-resumed") => None,
        // A catch dies at its steps; killed anywhere it may have let the guest run, which is its end.
        (Strike::SourceTakeover, Phase::Catch) => at.map(Again::At),
        (Strike::SourceTakeover, Phase::Switch) => Some(Again::At(points::of(Phase::Catch)[which].name)),
        (Strike::SourceTakeover, Phase::Release) => Some(Again::Said(["taken-over", "connected"][which % 2])),
        (Strike::SourceTakeover, _) => Some(Again::Said(["taken-over", "connected", "tethered-again"][which % 3])),
        (_, Phase::Switch | Phase::Handover | Phase::Release) => None,
        (_, _) => match setting {
            Setting::Lease => Some(Again::Said(["took-over", "connected", "tethered"][which % 3])),
            // It may have given the VMM up.
            Setting::Commit => None,
            Setting::BothDead => Some(Again::Said("took-over")),
        },
    }
}

/// Whether a process has said so.
fn has_said(log: &Log, what: &str) -> bool {
    let said = |kind: &Kind| match kind {
        Kind::TakenOver { .. } => what == "taken-over",
        Kind::TookOver { .. } => what == "took-over",
        Kind::Connected { .. } => what == "connected",
        Kind::TetheredAgain { .. } => what == "tethered-again",
        Kind::State { state, .. } => what == state,
        _ => false,
    };
    log.events.iter().any(|event| said(&event.kind))
}

/// The checkpoint from which a source that took over has gone on.
fn joined_at(log: &Log) -> Option<u64> {
    log.find(|kind| match kind {
        Kind::TetheredAgain { committed } => Some(*committed),
        _ => None,
    })
}

impl Run {
    fn launch(&self) -> Launch<'_> {
        Launch { case: &self.case, pace: self.pace, script: &self.script, output: &self.output }
    }

    fn await_succession(&self, mut until: impl FnMut(&Told) -> bool) -> bool {
        let end = Instant::now() + self.pace.of(SUCCESSION_BOUND);
        self.logs.wait(end, |logs| until(logs).then_some(())).is_some()
    }

    /// Kills whoever has a role now and waits until it is gone: what it held is free then, and a takeover is no mistake.
    fn kill(&mut self, role: Role) {
        let actor = if role == Role::Source { &self.source } else { &self.destination };
        actor.signal(Signal::KILL);
        actor.wait(Instant::now() + GONE_BOUND);
    }

    fn succeed_source(&mut self, stop_at: Option<String>) -> Result<(), ConductError> {
        let doing = io("start a source that takes over");
        let started = self.launch().send_again(stop_at).and_then(|again| Actor::start(Role::Source, again, &self.logs));
        self.source = started.map_err(doing)?;
        Ok(())
    }

    fn succeed_server(&mut self) -> Result<(), ConductError> {
        let doing = io("start a page server that takes over");
        let again = self.launch().receive_again(&self.listens);
        let started = again.and_then(|again| Actor::start(Role::Destination, again, &self.logs));
        self.destination = started.map_err(doing)?;
        Ok(())
    }

    /// Waits until whoever took over has come to where it is to be killed, and kills it there. False: it ended, or went another way.
    fn kill_again(&mut self, role: Role, again: Again) -> bool {
        let came = |log: &Log| match again {
            Again::Said(what) => has_said(log, what),
            Again::At(point) => log.stopped_at.as_deref() == Some(point),
        };
        let went_by = |log: &Log| log.ended.is_some() || (joined_at(log).is_some() && matches!(again, Again::At(_)));
        self.await_succession(|logs| came(&logs[role]) || went_by(&logs[role]));
        let came = came(&self.logs.lock()[role]);
        if came {
            self.kill(role);
        }
        came
    }
}

/// The source is dead; another goes on, and after it perhaps a third.
pub(super) fn of_source(run: &mut Run, takeover: Takeover, struck: &mut Struck) -> Result<(), ConductError> {
    run.kill(Role::Source);
    if !takeover.late {
        run.destination.signal(Signal::CONT);
    }
    let mut late = takeover.late;
    let mut begun = |run: &Run| {
        if std::mem::take(&mut late) {
            run.await_succession(|logs| {
                logs[Role::Source].ended.is_some() || has_said(&logs[Role::Source], "taken-over")
            });
            run.destination.signal(Signal::CONT);
        }
    };
    if let Some(again) = takeover.again {
        let stop_at = match again {
            Again::At(point) => Some(point.to_owned()),
            Again::Said(_) => None,
        };
        run.succeed_source(stop_at)?;
        begun(run);
        struck.killed_again = run.kill_again(Role::Source, again);
    }
    if takeover.again.is_none() || struck.killed_again {
        run.succeed_source(None)?;
        begun(run);
    }
    let decided = |log: &Log| {
        log.ended.is_some()
            || joined_at(log).is_some()
            || log.find(|kind| matches!(kind, Kind::Caught { .. }).then_some(())).is_some()
    };
    run.await_succession(|logs| decided(&logs[Role::Source]));
    let joined = joined_at(&run.logs.lock()[Role::Source]);
    let Some(committed) = joined.filter(|_| !run.case.goes_to_release()) else { return Ok(()) };
    // It goes on. It is to be worth something: a checkpoint over the new session, and then an end that needs it.
    let newer = |log: &Log| {
        log.events.iter().any(|event| matches!(event.kind, Kind::Committed { epoch, .. } if epoch > committed))
    };
    run.await_succession(|logs| {
        newer(&logs[Role::Destination]) || logs[Role::Destination].ended.is_some() || logs[Role::Source].ended.is_some()
    });
    struck.committed_again = newer(&run.logs.lock()[Role::Destination]);
    match takeover.ending {
        Ending::Kill => kill_destination(run, true),
        Ending::GivenBack => drop(run.destination.signal(Signal::TERM)),
    }
    Ok(())
}

/// The page server is dead, and in one setting the source too; others go on.
pub(super) fn of_server(run: &mut Run, takeover: Takeover, struck: &mut Struck) -> Result<(), ConductError> {
    let server = Role::Destination;
    // In this order: under commit a living source catches the guest of a dead page server at once.
    let both = takeover.setting == Setting::BothDead;
    if both {
        run.kill(Role::Source);
    }
    run.kill(server);
    let mut late = takeover.late && !both;
    if !late {
        run.source.signal(Signal::CONT);
    }
    let mut begun = |run: &Run| {
        if std::mem::take(&mut late) {
            run.await_succession(|logs| logs[server].ended.is_some() || has_said(&logs[server], "took-over"));
            run.source.signal(Signal::CONT);
        }
    };
    run.succeed_server()?;
    begun(run);
    if let Some(again) = takeover.again {
        struck.killed_again = run.kill_again(server, again);
        if struck.killed_again {
            run.succeed_server()?;
        }
    }
    if both {
        run.succeed_source(None)?;
    }
    run.await_succession(|logs| logs[server].ended.is_some() || has_said(&logs[server], "took-over"));
    if run.logs.lock()[server].ended.is_some() {
        // Nothing that the next one could go on with. The VMM waits for somebody who knows what to do with it, and nobody does.
        kill_vmm();
        return Ok(());
    }
    let settled = |log: &Log| log.ended.is_some() || log.was("owner");
    run.await_succession(|logs| settled(&logs[server]) || logs[Role::Source].ended.is_some());
    // A source that has released the guest and said so to a page server that died has nobody to wait for. Its record has.
    if run.logs.lock()[Role::Source].ended == Some(0) && has_unheard_release() {
        run.await_succession(|logs| logs[server].was("fenced") || settled(&logs[server]));
        run.succeed_source(None)?;
        struck.told_again = true;
    }
    Ok(())
}

/// Whether a journal is left by a source that ended: its destination has not said that it knows of the release.
fn has_unheard_release() -> bool {
    std::fs::read_dir(path("source").join("migrations")).is_ok_and(|mut entries| entries.next().is_some())
}
