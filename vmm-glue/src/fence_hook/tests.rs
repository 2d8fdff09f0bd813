//! Real scripts. The holder is this test binary, run again.

use super::*;
use crossbeam_channel::{Receiver, unbounded};
use rustix::process::test_kill_process;
use std::path::{Path, PathBuf};

const ROLE: &str = "BELAY_TEST_HOLDS_A_HOOK";
/// Only a broken test waits so long.
const BOUND: Duration = Duration::from_secs(30);

/// The holder process: the command is its last word.
#[test]
fn run_as_holder() {
    if std::env::var_os(ROLE).is_some() {
        let command = std::env::args_os().next_back().expect("a command");
        let code = hold(&command).map_or(1, i32::from);
        std::process::exit(code);
    }
}

fn hook(command: &str, timeout: Duration) -> FenceHook {
    let entry = ["--exact", "fence_hook::tests::run_as_holder", "--nocapture", "--test-threads=1"];
    let mut holder = GuardCommand::this_program(&entry).expect("this program");
    holder.envs = vec![(ROLE.into(), "1".into())];
    FenceHook { command: command.into(), timeout, always: false, holder }
}

fn start_with(turn: &Turn, hook: FenceHook) -> (Runs, Receiver<Report>) {
    let (say, said) = unbounded();
    let target = Target { host: "host-b".to_owned(), owner_epoch: 7, migration: "00ff".to_owned() };
    let runs = Runs::start(hook, target, Turn::clone(turn), move |report| drop(say.send(report)));
    (runs.expect("a thread"), said)
}

fn start(command: &str, timeout: Duration) -> (Runs, Receiver<Report>) {
    start_with(&Turn::default(), hook(command, timeout))
}

fn failure(said: &Receiver<Report>) -> (HookError, Duration) {
    match said.recv_timeout(BOUND).expect("a report") {
        Report::Failed { error, again } => (error, again),
        Report::Proven { .. } => panic!("it was said to have succeeded"),
    }
}

/// The number that a script wrote into a file of its own, once it has.
fn number_in(path: &Path) -> Pid {
    let end = Instant::now() + BOUND;
    loop {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        if let Some(number) = text.strip_suffix('\n').and_then(|number| number.parse().ok()) {
            return Pid::from_raw(number).expect("a process");
        }
        assert!(Instant::now() < end, "{} is not written", path.display());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Waits until a process is gone, or waits to be reaped by whoever got it.
fn expect_gone(pid: Pid) {
    let end = Instant::now() + BOUND;
    let stat = format!("/proc/{}/stat", pid.as_raw_nonzero());
    while test_kill_process(pid).is_ok() && !std::fs::read_to_string(&stat).is_ok_and(|stat| stat.contains(") Z")) {
        assert!(Instant::now() < end, "{pid:?} still runs");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A folder, and a script's way to write into it.
fn place() -> (tempfile::TempDir, impl Fn(&str) -> PathBuf) {
    let folder = tempfile::tempdir().expect("a temporary directory");
    let root = folder.path().to_owned();
    (folder, move |name| root.join(name))
}

#[test]
fn a_fence_hook_that_succeeds_is_told_whom_to_end_and_is_proof() {
    let (_folder, path) = place();
    let told = path("told");
    let script = format!("echo $BELAY_FENCE_HOST $BELAY_FENCE_OWNER_EPOCH $BELAY_FENCE_MIGRATION > {}", told.display());
    let (_runs, said) = start(&script, BOUND);
    assert!(matches!(said.recv_timeout(BOUND), Ok(Report::Proven { .. })));
    assert_eq!(std::fs::read_to_string(told).expect("written"), "host-b 7 00ff\n");
    assert!(said.recv_timeout(BOUND).is_err(), "its thread ends, and says nothing more");
}

#[test]
fn a_fence_hook_that_fails_is_told_with_what_it_said_and_run_again_one_at_a_time() {
    let (_folder, path) = place();
    // A second one while the first runs would find the directory there.
    let script = format!(
        "cd {} && mkdir alone || {{ touch twice; exit 0; }}; n=$(cat n 2>/dev/null || echo 0); echo $((n + 1)) > n; \
         rmdir alone; [ $n -ge 2 ] || {{ echo \"the fence \u{7}is $n\" >&2; exit 3; }}",
        path("").display()
    );
    let (runs, said) = start(&script, BOUND);
    for (round, pause) in [(0, FIRST_PAUSE), (1, FIRST_PAUSE * 2)] {
        let (error, again) = failure(&said);
        let HookError::Refused { status, said } = &error else { panic!("{error}") };
        assert_eq!((status.code(), again), (Some(3), pause));
        assert_eq!(said.to_string(), format!(": the fence  is {round}"), "no control character of a script's");
        runs.hurry();
    }
    assert!(matches!(said.recv_timeout(BOUND), Ok(Report::Proven { .. })));
    assert!(!path("twice").exists());
}

#[test]
fn a_fence_hook_that_hangs_is_killed_with_its_children_at_its_deadline_and_proves_nothing() {
    let (_folder, path) = place();
    let child = path("child");
    // The shell ignores whatever it can, and its child holds its pipes open.
    let script =
        format!("trap '' TERM HUP INT; sleep 600 & echo $! > {}; echo waiting >&2; wait; wait", child.display());
    let (_runs, said) = start(&script, Duration::from_millis(1500));
    let (error, _) = failure(&said);
    assert!(matches!(error, HookError::TooLong { .. }), "{error}");
    expect_gone(number_in(&child));
}

#[test]
fn a_fence_hook_that_is_missing_or_killed_proves_nothing() {
    let (_runs, said) = start("/no/such/fence-hook --now", BOUND);
    let (error, _) = failure(&said);
    let HookError::Refused { status, said } = &error else { panic!("{error}") };
    assert_eq!(status.code(), Some(127));
    assert!(said.to_string().contains("/no/such/fence-hook"), "{error}");
    let (_runs, said) = start("kill -KILL $$", BOUND);
    let (error, _) = failure(&said);
    let HookError::Refused { status, .. } = &error else { panic!("{error}") };
    assert_eq!(status.signal(), Some(9), "{error}");
    let mut without = hook("true", BOUND);
    without.holder.program = "/no/such/belay".into();
    let (_runs, said) = start_with(&Turn::default(), without);
    assert!(matches!(failure(&said).0, HookError::Io { doing: "started", .. }));
}

#[test]
fn a_fence_hook_that_is_not_wanted_any_more_ends_before_another_begins() {
    let (_folder, path) = place();
    let (first, child, turn) = (path("first"), path("child"), Turn::default());
    let script = format!("echo $$ > {}; sleep 600 & echo $! > {}; wait", first.display(), child.display());
    let (runs, said) = start_with(&turn, hook(&script, BOUND * 10));
    let pids = [number_in(&first), number_in(&child)];
    drop(runs);
    let gone = format!("! kill -0 {} 2>/dev/null", pids[0].as_raw_nonzero());
    let (_runs, next) = start_with(&turn, hook(&gone, BOUND));
    assert!(matches!(next.recv_timeout(BOUND), Ok(Report::Proven { .. })), "the first one still ran");
    assert!(said.recv_timeout(BOUND).is_err(), "whoever was stopped says nothing");
    pids.into_iter().for_each(expect_gone);
}

#[test]
fn what_a_fence_hook_says_without_end_is_kept_bounded() {
    let (_runs, said) = start("yes 'no answer from the power switch' | head -c 3000000 >&2; exit 1", BOUND);
    let (error, _) = failure(&said);
    let HookError::Refused { said, .. } = &error else { panic!("{error}") };
    assert!(said.0.len() <= SAID_BYTES && said.to_string().contains("power switch"), "{error}");
}

#[test]
fn a_descendant_that_holds_the_hooks_pipe_open_delays_nothing() {
    let (_folder, path) = place();
    let pid = path("pid");
    // In a session of its own it is not reached by what ends the group.
    let written = pid.display();
    let script = format!(
        "setsid sh -c 'echo $$ > {written}; exec sleep 600' & while ! test -s {written}; do sleep 0.01; done; exit 0"
    );
    let (_runs, said) = start(&script, BOUND * 10);
    assert!(matches!(said.recv_timeout(BOUND), Ok(Report::Proven { .. })));
    rustix::process::kill_process(number_in(&pid), rustix::process::Signal::KILL).expect("it was left");
}
