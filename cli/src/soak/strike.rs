//! The strikes, and what happens right after each so that the run comes to an end.

use super::actor::{Role, Told};
use super::case::{Phase, Strike};
use super::conduct::{ConductError, Run, io, noticed};
use super::relay::Relay;
use super::{points, stage, takeover};
use crate::options::FabricChoice;
use belay_vmm_glue::migrate::observation::Kind;
use rustix::io::Errno;
use rustix::net::{Shutdown, SocketAddrAny, getpeername, shutdown};
use rustix::process::{Pid, PidfdGetfdFlags, Signal, kill_process, pidfd_getfd};
use std::time::{Duration, Instant};

/// How long a source may take to catch the guest of a destination that stands still.
const CATCH_BOUND: Duration = Duration::from_secs(12);
/// How long a stale destination may take to find out that it is.
const FENCE_BOUND: Duration = Duration::from_secs(5);
/// How long it may take until there is a connection to strike at: one was asked for before the moment came, and is taken soon after.
const CONNECTED_BOUND: Duration = Duration::from_secs(2);

/// What a strike did.
#[derive(Debug, Clone, Copy, Default)]
pub struct Struck {
    /// Checkpoints the destination had said had committed when it landed.
    pub commits_told: u64,
    /// The source stood in a fold.
    pub folding: bool,
    /// A VMM apart from a killed page server still ran when the guest ran elsewhere (P1).
    pub vmm_waited: Option<bool>,
    /// Whoever took over was killed too.
    pub killed_again: bool,
    /// A checkpoint committed over the session of a source that took over.
    pub committed_again: bool,
    /// A source that had released the guest was started again to tell so.
    pub told_again: bool,
}

/// Lands the strike and lets whoever is left go on.
pub(super) fn land(run: &mut Run) -> Result<Struck, ConductError> {
    let mut struck = Struck { commits_told: commits_told(run), folding: folding(run), ..Struck::default() };
    match (run.case.strike, run.script.takeover) {
        (Strike::SourceTakeover, Some(how)) => takeover::of_source(run, how, &mut struck)?,
        (Strike::ServerTakeover, Some(how)) => takeover::of_server(run, how, &mut struck)?,
        _ => strike(run, &mut struck).map_err(io("strike"))?,
    }
    Ok(struck)
}

fn commits_told(run: &Run) -> u64 {
    let logs = run.logs.lock();
    let events = &logs[Role::Destination].events;
    events.iter().filter(|event| matches!(event.kind, Kind::Committed { .. })).count() as u64
}

/// Whether the source stands at a stop point of its folding.
fn folding(run: &Run) -> bool {
    let logs = run.logs.lock();
    let at = logs[Role::Source].stopped_at.as_deref();
    points::of(Phase::Fold).iter().any(|point| at == Some(point.name))
}

fn strike(run: &Run, struck: &mut Struck) -> std::io::Result<()> {
    match run.case.strike {
        Strike::DestinationKill => kill_destination(run, true),
        Strike::HostKill => {
            kill_guard(true)?;
            kill_destination(run, true);
        }
        Strike::ServerKill => kill_destination(run, false),
        Strike::SourceKill => {
            run.source.signal(Signal::KILL);
        }
        Strike::GuardKill => kill_guard(false)?,
        Strike::ObserverCut => relay(&run.view)?.cut(run.pace.of(CONNECTED_BOUND))?,
        Strike::LinkCut if run.case.fabric == FabricChoice::Local => cut_sockets(run)?,
        Strike::LinkCut => relay(&run.link)?.cut(run.pace.of(CONNECTED_BOUND))?,
        Strike::HalfOpen => relay(&run.link)?.swallow(run.pace.of(CONNECTED_BOUND))?,
        Strike::Freeze => {
            run.destination.signal(Signal::STOP);
        }
        // These are strikes of their own: `takeover.rs`.
        Strike::SourceTakeover | Strike::ServerTakeover => {}
    }
    if run.case.strike == Strike::Freeze && run.case.phase == Phase::Catch {
        // The stale one comes back in the middle of the catch, and is left to do all that it can.
        run.destination.signal(Signal::CONT);
        let role = Role::Destination;
        let done = |logs: &Told| (logs[role].was("fenced") || logs[role].ended.is_some()).then_some(());
        run.logs.wait(Instant::now() + run.pace.of(FENCE_BOUND), done);
    }
    run.source.signal(Signal::CONT);
    if run.case.strike == Strike::Freeze {
        await_verdict_of_the_source(run);
    }
    run.destination.signal(Signal::CONT);
    match run.case.strike {
        Strike::ServerKill => {
            await_verdict_of_the_source(run);
            let told =
                run.logs.lock()[Role::Destination].find(|kind| matches!(kind, Kind::VmmStarted { .. }).then_some(()));
            struck.vmm_waited = told.map(|()| stage::running().iter().any(|(_, line)| is_vmm(line)));
            kill_vmm();
        }
        Strike::GuardKill | Strike::ObserverCut if !run.case.goes_to_release() => {
            // Nothing happens of it, so after a while the operator gives the guest back.
            if run.case.phase != Phase::Catch {
                std::thread::sleep(run.pace.of(Duration::from_millis(40 + run.script.delay_ms)));
            }
            run.destination.signal(Signal::TERM);
        }
        _ => {}
    }
    Ok(())
}

/// The relay that this strike needs.
fn relay(relay: &Option<Relay>) -> std::io::Result<&Relay> {
    relay.as_ref().ok_or_else(|| std::io::Error::new(std::io::ErrorKind::NotFound, "there is no relay to strike at"))
}

/// Waits until the source has the guest, knows that it never left, has let it go, or has ended.
fn await_verdict_of_the_source(run: &Run) {
    let decided = |logs: &Told| {
        let source = &logs[Role::Source];
        let caught = source.find(|kind| {
            matches!(kind, Kind::Caught { .. } | Kind::ReleaseRecorded { .. } | Kind::Failed { .. }).then_some(())
        });
        caught.or(source.ended.map(|_| ()))
    };
    let bound = run.pace.of(CATCH_BOUND);
    if run.logs.wait(Instant::now() + bound, decided).is_none() {
        let logs = run.logs.lock();
        eprintln!("soak: the source decided nothing within {bound:?}: {:?}", noticed(&logs[Role::Source]));
    }
}

fn is_vmm(line: &str) -> bool {
    line.split_whitespace().nth(1) == Some("vmm")
}

pub(super) fn kill_destination(run: &Run, with_vmm: bool) {
    run.destination.signal(Signal::KILL);
    if with_vmm {
        kill_vmm();
    }
}

pub(super) fn kill_vmm() {
    kill_those(is_vmm);
}

fn kill_guard(may_be_gone: bool) -> std::io::Result<()> {
    match kill_those(|line| line.split_whitespace().nth(1) == Some("guard")) {
        0 if !may_be_gone => Err(std::io::Error::new(std::io::ErrorKind::NotFound, "there is no guard to kill")),
        _ => Ok(()),
    }
}

/// Ends the processes of this namespace whose command line says so; how many.
fn kill_those(which: impl Fn(&str) -> bool) -> usize {
    let found = stage::running().into_iter().filter(|(_, line)| which(line));
    let killed = found.filter_map(|(pid, _)| kill_process(Pid::from_raw(pid)?, Signal::KILL).ok());
    killed.count()
}

/// Shuts every socket of the source's that leads to the destination, from outside of both.
fn cut_sockets(run: &Run) -> std::io::Result<()> {
    let theirs = format!("{}/receive.sock", stage::PLACE);
    let mut cut = 0;
    for entry in std::fs::read_dir(format!("/proc/{}/fd", run.source.pid))?.flatten() {
        let target = std::fs::read_link(entry.path()).unwrap_or_default();
        let number = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok());
        let (Some(number), true) = (number, target.to_string_lossy().starts_with("socket:")) else { continue };
        // Once one is cut, the source closes the others by itself.
        let socket = match pidfd_getfd(run.source.pidfd(), number, PidfdGetfdFlags::empty()) {
            Ok(socket) => socket,
            Err(Errno::BADF) => continue,
            Err(error) => return Err(error.into()),
        };
        let peer = getpeername(&socket).ok().flatten();
        if peer.is_some_and(|peer| is_at(&peer, &theirs)) {
            match shutdown(&socket, Shutdown::Both) {
                Ok(()) | Err(Errno::NOTCONN) => cut += 1,
                Err(error) => return Err(error.into()),
            }
        }
    }
    match cut {
        0 => Err(std::io::Error::new(std::io::ErrorKind::NotFound, format!("the source has no socket to {theirs}"))),
        _ => Ok(()),
    }
}

fn is_at(peer: &SocketAddrAny, path: &str) -> bool {
    let unix = rustix::net::SocketAddrUnix::try_from(peer.clone());
    unix.is_ok_and(|unix| unix.path_bytes() == Some(path.as_bytes()))
}
