//! A second migration, small and plain, in the directories of one that was struck: nothing that is left there may stand in its way.

use super::actor::{Actor, Logs, Role};
use super::conduct::{ConductError, Run, io, listening};
use super::launch::Launch;
use super::verdict::Said;
use rustix::process::Signal;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long it may take altogether, and a process of it to be gone that did not end by then.
const SECOND_BOUND: Duration = Duration::from_secs(20);
const GONE_BOUND: Duration = Duration::from_secs(5);

/// What its processes said.
#[derive(Clone)]
pub struct Second {
    pub source: Said,
    pub destination: Said,
}

impl Second {
    /// Makes it and waits for its end. One that does not come about says so by what is missing.
    pub(super) fn make(run: &Run) -> Result<Self, ConductError> {
        let (logs, end) = (Arc::new(Logs::default()), Instant::now() + run.pace.of(SECOND_BOUND));
        let launch = Launch { case: &run.case, pace: run.pace, script: &run.script, output: &run.output };
        let start = |role, command: std::io::Result<_>| {
            command.and_then(|command| Actor::start(role, command, &logs)).map_err(io("start a second migration"))
        };
        let mut actors = vec![start(Role::Destination, launch.receive_second())?];
        if let Ok(listens) = listening(&logs, Role::Destination, run.pace) {
            actors.push(start(Role::Source, launch.send_second(&listens))?);
        }
        for actor in &actors {
            if actor.wait(end).is_none() {
                actor.signal(Signal::KILL);
                actor.wait(Instant::now() + GONE_BOUND);
            }
        }
        let logs = logs.lock();
        Ok(Self {
            source: Said::of(logs.in_turn(Role::Source)),
            destination: Said::of(logs.in_turn(Role::Destination)),
        })
    }
}
