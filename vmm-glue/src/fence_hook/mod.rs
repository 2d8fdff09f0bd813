//! The fence hook: a command of the operator's that makes sure a lost destination is off, for sites with STONITH or SBD.
//!
//! ```text
//! source (a thread of its own)            holder (`belay hook`)              sh -c COMMAND (a group of its own)
//!   a pipe to its standard input ───────▶   starts it ───────────────────▶     BELAY_FENCE_HOST, _OWNER_EPOCH, _MIGRATION
//!   ◀─────────────── what it says on stderr, the end of it                     powers the host off, and sees that it is
//!   ◀──────────────────── the exit status   has ended: kills what is left of the group
//!   time is over, not wanted any more, or belay has died: the pipe closes
//!                                           kills the group
//! ```
//! Rules of this room:
//! * Exit status 0 is proof of death, and nothing else is: not another status, not a signal, not the end of the time.
//! * Never two at once: whoever starts has the turn until the holder has ended, and the holder ends after the command.
//! * Whoever waits for it waits on a channel. Nothing here stands in the way of noticing, or of the lease.
//! * What has left the command's process group (a daemon of its own making) is not reached.

mod holder;

pub use holder::{HoldError, hold};

use crate::guard::GuardCommand;
use belay_transport::harmless;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::ffi::OsString;
use std::io::{self, Read};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, TryLockError};
use std::time::{Duration, Instant};

/// How soon an order to stop is seen.
const LOOK: Duration = Duration::from_millis(20);
/// Between two tries.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// So much of the end of what it said on stderr is told.
const SAID_BYTES: usize = 400;
/// What can be read at once of what a command says that never stops talking.
const ONE_READ: usize = 4096;

/// What the operator named.
#[derive(Debug, Clone)]
pub struct FenceHook {
    /// For `sh -c`.
    pub command: OsString,
    /// Longest that it may take.
    pub timeout: Duration,
    /// Not under `--output lease` alone: no catch at all goes on before the destination's death is proven.
    pub always: bool,
    /// How the holder is started: a command that ends up in [`hold`]; the operator's is added to its arguments.
    pub holder: GuardCommand,
}

/// Whom to fence.
#[derive(Debug, Clone)]
pub struct Target {
    /// Its host, as the operator named it.
    pub host: String,
    /// Of the destination that is to be off.
    pub owner_epoch: u64,
    pub migration: String,
}

/// Why a run proves nothing.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    #[error("the fence hook cannot be {doing}")]
    Io {
        doing: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("the fence hook ended with {status}{said}")]
    Refused { status: ExitStatus, said: Said },
    #[error("the fence hook had not ended after {bound:?}, and was killed with all that it had started{said}")]
    TooLong { bound: Duration, said: Said },
}

/// The end of what a command said, to be shown behind what became of it.
#[derive(Debug, Clone, Default)]
pub struct Said(Vec<u8>);

impl std::fmt::Display for Said {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = String::from_utf8_lossy(&self.0);
        match text.trim() {
            "" => Ok(()),
            text => write!(f, ": {}", harmless(text)),
        }
    }
}

impl Said {
    fn hear(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
        let too_many = self.0.len().saturating_sub(SAID_BYTES);
        self.0.drain(..too_many);
    }
}

/// What comes of the hook's runs.
#[derive(Debug)]
pub enum Report {
    /// It succeeded, which took so long: the destination is off. The last.
    Proven { took: Duration },
    /// It proved nothing, and is run again after this time.
    Failed { error: HookError, again: Duration },
}

/// Who may run a hook now. One for a whole migration.
pub type Turn = Arc<Mutex<()>>;

/// Runs the hook until it succeeds. Dropped, a run that is under way is killed, and nothing is reported any more.
#[derive(Debug)]
pub struct Runs {
    stop: Arc<AtomicBool>,
    hurry: Arc<AtomicBool>,
}

impl Runs {
    /// Begins, on a thread of its own, as soon as it has the `turn`.
    pub fn start(
        hook: FenceHook,
        target: Target,
        turn: Turn,
        report: impl Fn(Report) + Send + 'static,
    ) -> io::Result<Self> {
        let (stop, hurry) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let runs = Self { stop: Arc::clone(&stop), hurry: Arc::clone(&hurry) };
        std::thread::Builder::new()
            .name("fence-hook".into())
            .spawn(move || run_until_proven(&hook, &target, &turn, (&stop, &hurry), report))?;
        Ok(runs)
    }

    /// A try that waits for its time is made now.
    pub fn hurry(&self) {
        self.hurry.store(true, Ordering::Release);
    }
}

impl Drop for Runs {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
    }
}

fn run_until_proven(
    hook: &FenceHook,
    target: &Target,
    turn: &Mutex<()>,
    (stop, hurry): (&AtomicBool, &AtomicBool),
    report: impl Fn(Report),
) {
    let stopped = || stop.load(Ordering::Acquire);
    // The run before this one may still be on its way out.
    let _turn = loop {
        match turn.try_lock() {
            Ok(turn) => break turn,
            Err(TryLockError::Poisoned(poisoned)) => break poisoned.into_inner(),
            Err(TryLockError::WouldBlock) if stopped() => return,
            Err(TryLockError::WouldBlock) => std::thread::sleep(LOOK),
        }
    };
    let mut pause = FIRST_PAUSE;
    while !stopped() {
        let begun = Instant::now();
        let ended = run(hook, target, stop);
        if stopped() {
            return;
        }
        match ended {
            Ok(()) => return report(Report::Proven { took: begun.elapsed() }),
            Err(error) => report(Report::Failed { error, again: pause }),
        }
        let next = Instant::now() + pause;
        pause = (pause * 2).min(LONGEST_PAUSE);
        while Instant::now() < next && !stopped() && !hurry.swap(false, Ordering::AcqRel) {
            std::thread::sleep(LOOK);
        }
    }
}

fn io_error<E: Into<io::Error>>(doing: &'static str) -> impl FnOnce(E) -> HookError {
    move |source| HookError::Io { doing, source: source.into() }
}

/// One run. Returns only when nothing of it runs any more, whatever its end was.
fn run(hook: &FenceHook, target: &Target, stop: &AtomicBool) -> Result<(), HookError> {
    let mut holder = Command::new(&hook.holder.program)
        .args(&hook.holder.args)
        .arg(&hook.command)
        .envs(hook.holder.envs.iter().map(|(name, value)| (name, value)))
        .env("BELAY_FENCE_HOST", &target.host)
        .env("BELAY_FENCE_OWNER_EPOCH", target.owner_epoch.to_string())
        .env("BELAY_FENCE_MIGRATION", &target.migration)
        // While this end is open belay lives and wants it.
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        // Its own group: a SIGINT from the terminal is for belay.
        .process_group(0)
        .spawn()
        .map_err(io_error("started"))?;
    let lifeline = holder.stdin.take();
    let mut said = Said::default();
    let mut hearing = holder.stderr.take();
    let ended = match pidfd_open(Pid::from_child(&holder), PidfdFlags::empty()) {
        Ok(pidfd) => wait(&pidfd, &mut hearing, &mut said, (hook.timeout, stop)).map_err(io_error("waited for")),
        Err(errno) => Err(io_error("watched")(errno)),
    };
    drop(lifeline);
    let status = reap(&mut holder)?;
    // What it said last; whoever it left behind may hold the pipe open for ever, so nobody waits for its end.
    listen(&mut hearing, &mut said);
    match ended? {
        true if status.success() => Ok(()),
        true => Err(HookError::Refused { status: shells_status(status), said }),
        false => Err(HookError::TooLong { bound: hook.timeout, said }),
    }
}

/// The command's own end, where the holder tells a signal as shells do.
fn shells_status(status: ExitStatus) -> ExitStatus {
    match status.code() {
        Some(code @ 129..=192) => ExitStatus::from_raw(code - 128),
        _ => status,
    }
}

fn reap(holder: &mut Child) -> Result<ExitStatus, HookError> {
    holder.wait().map_err(io_error("reaped"))
}

/// Whether the holder ended by itself, before its time was over and before it was not wanted any more.
fn wait(
    pidfd: &OwnedFd,
    hearing: &mut Option<ChildStderr>,
    said: &mut Said,
    (bound, stop): (Duration, &AtomicBool),
) -> io::Result<bool> {
    let begun = Instant::now();
    while begun.elapsed() < bound && !stop.load(Ordering::Acquire) {
        if readable(pidfd, LOOK)? {
            return Ok(true);
        }
        listen(hearing, said);
    }
    // It may have ended while this thread had no processor.
    readable(pidfd, Duration::ZERO)
}

/// Takes what has been said so far, a bounded part of it.
fn listen(hearing: &mut Option<ChildStderr>, said: &mut Said) {
    let mut bytes = [0; ONE_READ];
    for _ in 0..16 {
        let Some(pipe) = hearing else { return };
        match readable(pipe, Duration::ZERO).and_then(|ready| ready.then(|| pipe.read(&mut bytes)).transpose()) {
            Ok(None) => return,
            Ok(Some(0)) | Err(_) => *hearing = None,
            Ok(Some(count)) => said.hear(&bytes[..count]),
        }
    }
}

/// Whether `fd` can be read, or has ended, within this time.
fn readable(fd: &impl AsFd, within: Duration) -> io::Result<bool> {
    let timeout = Timespec { tv_sec: within.as_secs() as i64, tv_nsec: within.subsec_nanos().into() };
    let mut polled = [PollFd::new(fd, PollFlags::IN)];
    match poll(&mut polled, Some(&timeout)) {
        Ok(count) => Ok(count > 0),
        Err(Errno::INTR) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests;
