//! Real processes, really killed. The guard and what it watches are this test binary, run again.

use super::*;
use belay_transport::Deadline;
use crossbeam_channel::{Receiver, unbounded};
use rustix::fd::{AsFd, OwnedFd};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

const ROLE: &str = "BELAY_TEST_GUARD_ROLE";
const MEMORY: usize = 256 << 20;
const BOUND: Duration = Duration::from_secs(20);

fn soon() -> Deadline {
    Deadline::after(BOUND)
}

fn role() -> Option<String> {
    std::env::var(ROLE).ok()
}

/// The guard process.
#[test]
fn run_as_guard() {
    if role().as_deref() == Some("guard") {
        guard_main().expect("guard");
        std::process::exit(0);
    }
}

/// The watched process: opens the page of the process that started it, holds a slot and a lot of memory, then does what it is told.
#[test]
fn run_as_vmm() {
    if role().as_deref() != Some("vmm") {
        return;
    }
    let mut lines = io::stdin().lock().lines().map(|line| line.expect("stdin"));
    let path = lines.next().expect("a path");
    let page = std::fs::OpenOptions::new().read(true).write(true).open(path).expect("page");
    let page = Arc::new(LifePage::from_fd(page.into()).expect("a page"));
    let slot = lines.next().expect("a slot").parse().expect("a number");
    let life = SignOfLife::hold(page, slot).expect("hold");
    let memory = vec![1_u8; MEMORY];
    println!("\nready {}", std::hint::black_box(&memory)[MEMORY - 1]);
    match lines.next().as_deref() {
        Some("stand down") => {
            life.stand_down();
            println!("\ndown");
            lines.next();
        }
        Some("drop") => {
            drop(life);
            println!("\ndropped");
            lines.next();
        }
        Some("thread ends") => {
            std::thread::spawn(move || drop(life)).join().expect("thread");
            println!("\nended");
            lines.next();
        }
        _ => {}
    }
    std::process::exit(0);
}

fn test_command(entry: &str, role: &str) -> GuardCommand {
    let name = format!("guard::tests::{entry}");
    let mut command = GuardCommand::this_program(&["--exact", &name, "--nocapture", "--test-threads=1"]).expect("exe");
    command.envs = vec![(ROLE.into(), role.into())];
    command
}

/// A watched process, killed and reaped at the end of a test whatever happened in it.
struct Vmm {
    child: Child,
    lines: io::Lines<BufReader<ChildStdout>>,
    input: ChildStdin,
}

impl Vmm {
    fn start(page: &LifePage) -> Self {
        Self::start_in(page, 0)
    }

    fn start_in(page: &LifePage, slot: usize) -> Self {
        use std::os::fd::AsRawFd;
        let command = test_command("run_as_vmm", "vmm");
        let mut child = Command::new(&command.program)
            .args(&command.args)
            .envs(command.envs)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("spawn");
        let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let input = child.stdin.take().expect("piped");
        let mut vmm = Self { child, lines, input };
        vmm.tell(&format!("/proc/{}/fd/{}", std::process::id(), page.fd().as_raw_fd()));
        vmm.tell(&slot.to_string());
        vmm.hear("ready 1");
        vmm
    }

    fn tell(&mut self, line: &str) {
        writeln!(self.input, "{line}").expect("stdin");
    }

    fn hear(&mut self, wanted: &str) {
        assert!(self.lines.any(|line| line.expect("stdout") == wanted), "ended without saying {wanted}");
    }

    fn kill(&mut self) -> Instant {
        let at = Instant::now();
        self.child.kill().expect("kill");
        at
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Scene {
    page: Arc<LifePage>,
    guard: Guard,
    vmm: Vmm,
    _watch: DeathWatch,
    notices: Receiver<(Notice, Instant)>,
}

fn socket_pair() -> (OwnedFd, OwnedFd) {
    rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).expect("socketpair")
}

fn listen(connection: OwnedFd, secrets: &Secrets) -> (DeathWatch, Receiver<(Notice, Instant)>) {
    let (tell, notices) = unbounded();
    let notify = move |notice| tell.send((notice, Instant::now())).expect("the test listens");
    (DeathWatch::spawn(connection, secrets.clone(), notify).expect("thread"), notices)
}

fn scene() -> Scene {
    let page = Arc::new(LifePage::new(2).expect("page"));
    let secrets = Secrets::random().expect("secrets");
    let (ours, theirs) = socket_pair();
    let mut guard =
        Guard::spawn(&test_command("run_as_guard", "guard"), &page, &secrets, Arms::None, &[theirs.as_fd()])
            .expect("guard");
    drop(theirs);
    let vmm = Vmm::start(&page);
    guard.watch(0, soon()).expect("watch");
    let (watch, notices) = listen(ours, &secrets);
    Scene { page, guard, vmm, _watch: watch, notices }
}

impl Scene {
    fn next(&self) -> (Notice, Instant) {
        self.notices.recv_timeout(BOUND).expect("a notice")
    }

    /// The guard has ended by itself and left nothing behind.
    fn guard_ends(&mut self) {
        assert!(self.guard.wait(soon()).expect("wait"), "the guard did not end");
    }
}

#[test]
fn a_killed_process_is_noticed_in_less_than_five_milliseconds_and_its_death_proven_after() {
    let mut noticed = vec![];
    for _ in 0..7 {
        let mut scene = scene();
        let killed = scene.vmm.kill();
        let (first, at) = scene.next();
        assert_eq!(first, Notice::DeathSign);
        noticed.push(at.duration_since(killed));
        // Only a reaped process has no pidfd to fire; ours fires at its end and is reaped by the scene.
        assert_eq!(scene.next().0, Notice::DeathProven);
        assert!(matches!(scene.next().0, Notice::GuardGone { .. }));
        scene.guard_ends();
    }
    noticed.sort();
    eprintln!("noticed after SIGKILL with {} MiB: {noticed:?}", MEMORY >> 20);
    assert!(noticed[3] < Duration::from_millis(5), "median of {noticed:?}");
}

#[test]
fn an_orderly_end_gives_no_death_sign() {
    let mut scene = scene();
    scene.vmm.tell("stand down");
    scene.vmm.hear("down");
    assert_eq!(scene.next().0, Notice::GuardGone { why: "its connection ended".into() });
    scene.guard_ends();
    assert!(scene.vmm.child.try_wait().expect("wait").is_none(), "the process itself lives on");
}

#[test]
fn a_dropped_sign_of_life_is_no_orderly_end_and_no_death_while_the_process_lives() {
    for (order, done) in [("drop", "dropped"), ("thread ends", "ended")] {
        let mut scene = scene();
        scene.vmm.tell(order);
        scene.vmm.hear(done);
        assert!(scene.guard.is_running() && scene.notices.is_empty());
        // Leaves main without standing down.
        scene.vmm.tell("leave");
        assert_eq!(scene.next().0, Notice::DeathSign, "after {order}");
        scene.guard_ends();
    }
}

#[test]
fn a_guard_watches_several_and_speaks_at_the_first_death() {
    let mut scene = scene();
    let life = SignOfLife::hold(Arc::clone(&scene.page), 1).expect("hold");
    scene.guard.watch(1, soon()).expect("watch");
    scene.vmm.kill();
    assert_eq!(scene.next().0, Notice::DeathSign);
    assert!(scene.notices.recv_timeout(Duration::from_millis(100)).is_err(), "no proof while one of the two lives");
    life.stand_down();
    assert_eq!(scene.next().0, Notice::DeathProven);
    scene.guard_ends();
}

#[test]
fn a_process_that_died_before_it_was_watched_is_a_death_without_proof() {
    let page = Arc::new(LifePage::new(1).expect("page"));
    let secrets = Secrets::random().expect("secrets");
    let (ours, theirs) = socket_pair();
    let mut guard =
        Guard::spawn(&test_command("run_as_guard", "guard"), &page, &secrets, Arms::None, &[theirs.as_fd()])
            .expect("guard");
    drop(theirs);
    drop(Vmm::start(&page));
    guard.watch(0, soon()).expect("watch");
    let (_watch, notices) = listen(ours, &secrets);
    let next = || notices.recv_timeout(BOUND).expect("a notice").0;
    assert_eq!(next(), Notice::DeathSign);
    assert!(matches!(next(), Notice::GuardGone { .. }), "its pid may be somebody else's by now");
    assert!(guard.wait(soon()).expect("wait"));
}

#[test]
fn a_slot_that_nobody_holds_is_refused_and_a_guard_with_nothing_to_watch_ends() {
    let page = LifePage::new(1).expect("page");
    let (_ours, theirs) = socket_pair();
    let secrets = Secrets::random().expect("secrets");
    let command = test_command("run_as_guard", "guard");
    let mut guard = Guard::spawn(&command, &page, &secrets, Arms::None, &[theirs.as_fd()]).expect("guard");
    assert!(matches!(guard.watch(0, soon()), Err(GuardError::NotHeld { slot: 0 })));
    assert!(matches!(guard.watch(9, soon()), Err(GuardError::NotHeld { slot: 9 })));
    rustix::net::shutdown(guard.hand_over(), rustix::net::Shutdown::Both).expect("shutdown");
    assert!(guard.wait(soon()).expect("wait"));
}

#[test]
fn a_slot_is_held_once_and_can_be_held_again_after_standing_down() {
    let page = Arc::new(LifePage::new(1).expect("page"));
    let life = SignOfLife::hold(Arc::clone(&page), 0).expect("hold");
    let again = SignOfLife::hold(Arc::clone(&page), 0).map(drop);
    assert!(matches!(again, Err(GuardError::AlreadyHeld { slot: 0, .. })), "{again:?}");
    life.stand_down();
    SignOfLife::hold(page, 0).expect("hold again").stand_down();
}

#[test]
fn only_the_right_words_are_a_death_sign() {
    let secrets = Secrets::random().expect("secrets");
    let mut nearly = secrets.sign;
    nearly[31] ^= 1;
    let garbage: [&[u8]; 4] = [&nearly, &secrets.proof, &secrets.sign[..31], b""];
    for bytes in garbage {
        let (ours, theirs) = socket_pair();
        let (_watch, notices) = listen(ours, &secrets);
        rustix::io::write(&theirs, bytes).expect("write");
        drop(theirs);
        let (notice, _) = notices.recv_timeout(BOUND).expect("a notice");
        assert!(matches!(notice, Notice::GuardGone { .. }), "{bytes:?} gave {notice:?}");
    }
    // In pieces, as TCP may cut it.
    let (ours, theirs) = socket_pair();
    let (_watch, notices) = listen(ours, &secrets);
    secrets.sign.chunks(5).for_each(|piece| assert_eq!(rustix::io::write(&theirs, piece), Ok(piece.len())));
    assert_eq!(notices.recv_timeout(BOUND).expect("a notice").0, Notice::DeathSign);
}

#[test]
fn a_stopped_watch_says_nothing_more() {
    let secrets = Secrets::random().expect("secrets");
    let (ours, theirs) = socket_pair();
    let (watch, notices) = listen(ours, &secrets);
    watch.stop();
    let _ = rustix::io::write(&theirs, &secrets.sign);
    drop(theirs);
    assert!(notices.recv().is_err(), "the callback is gone, and was never called");
}

#[test]
fn a_killed_process_is_proven_dead_and_a_living_one_is_not() {
    let page = LifePage::new(1).expect("page");
    let vmm = Vmm::start(&page);
    let pidfd = pidfd_open(Pid::from_child(&vmm.child), PidfdFlags::empty()).expect("pidfd");
    assert!(!proof_of_death(&pidfd, Deadline::after(Duration::from_millis(20))).expect("poll"));
    assert!(kill_and_prove(&pidfd, soon()).expect("kill"));
    assert!(kill_and_prove(&pidfd, soon()).expect("and again"), "a process that is gone is proven gone");
}

/// A scene whose guard may fence: the test process is the page server (slot 1), the child is the VMM (slot 0).
fn armed(gate_bound: Duration) -> Scene {
    let page = Arc::new(LifePage::new(2).expect("page"));
    let secrets = Secrets::random().expect("secrets");
    let (ours, theirs) = socket_pair();
    let arms = Arms::Fence { gate_bound };
    let command = test_command("run_as_guard", "guard");
    let mut guard = Guard::spawn(&command, &page, &secrets, arms, &[theirs.as_fd()]).expect("guard");
    drop(theirs);
    let vmm = Vmm::start(&page);
    guard.watch(0, soon()).expect("watch");
    let (watch, notices) = listen(ours, &secrets);
    Scene { page, guard, vmm, _watch: watch, notices }
}

#[test]
fn the_fence_ends_what_is_watched_and_its_success_is_proof_of_death() {
    let mut scene = armed(BOUND);
    assert!(scene.vmm.child.try_wait().expect("wait").is_none());
    assert!(scene._watch.fence(), "the order could be sent");
    assert_eq!(scene.next().0, Notice::DeathSign);
    assert_eq!(scene.next().0, Notice::DeathProven);
    let status = scene.vmm.child.wait().expect("wait");
    use std::os::unix::process::ExitStatusExt;
    assert_eq!(status.signal(), Some(libc::SIGKILL));
    scene.guard_ends();
}

#[test]
fn a_frozen_process_is_fenced_too() {
    let mut scene = armed(BOUND);
    // SAFETY: stops a child of this test that nobody has waited for.
    unsafe { libc::kill(scene.vmm.child.id() as i32, libc::SIGSTOP) };
    assert!(scene._watch.fence());
    assert_eq!(scene.next().0, Notice::DeathSign);
    assert_eq!(scene.next().0, Notice::DeathProven);
    scene.guard_ends();
}

#[test]
fn only_the_right_words_are_an_order_to_fence_and_an_unarmed_guard_obeys_none() {
    let secrets = Secrets::random().expect("secrets");
    let mut nearly = secrets.fence;
    nearly[0] ^= 0x80;
    let orders = [
        (Arms::Fence { gate_bound: BOUND }, nearly),
        (Arms::Fence { gate_bound: BOUND }, secrets.sign),
        (Arms::None, secrets.fence),
    ];
    for (arms, order) in orders {
        let page = Arc::new(LifePage::new(1).expect("page"));
        let (ours, theirs) = socket_pair();
        let command = test_command("run_as_guard", "guard");
        let mut guard = Guard::spawn(&command, &page, &secrets, arms, &[theirs.as_fd()]).expect("guard");
        drop(theirs);
        let mut vmm = Vmm::start(&page);
        guard.watch(0, soon()).expect("watch");
        rustix::io::write(&ours, &order).expect("write");
        // The guard answers this only after the hand-over thread has run; the order has been with it for longer.
        guard.watch(0, soon()).expect("watched again");
        let (_watch, notices) = listen(ours, &secrets);
        assert!(notices.recv_timeout(Duration::from_millis(200)).is_err(), "nobody dies of {arms:?}");
        assert!(vmm.child.try_wait().expect("wait").is_none());
        assert!(dismiss(guard.hand_over()));
        assert!(guard.wait(soon()).expect("wait"));
    }
}

#[test]
fn a_vmm_that_does_not_shut_its_gate_when_its_page_server_dies_is_fenced_and_one_that_does_is_kept() {
    for quiet in [false, true] {
        let page = Arc::new(LifePage::new(2).expect("page"));
        let secrets = Secrets::random().expect("secrets");
        let (ours, theirs) = socket_pair();
        let arms = Arms::Fence { gate_bound: Duration::from_millis(if quiet { 20_000 } else { 50 }) };
        let command = test_command("run_as_guard", "guard");
        let mut guard = Guard::spawn(&command, &page, &secrets, arms, &[theirs.as_fd()]).expect("guard");
        drop(theirs);
        let mut server = Vmm::start(&page);
        guard.watch(0, soon()).expect("watch");
        let mut vmm = Vmm::start_in(&page, 1);
        guard.watch(1, soon()).expect("watch");
        let (watch, notices) = listen(ours, &secrets);
        let next = || notices.recv_timeout(BOUND).expect("a notice").0;
        if quiet {
            page.set_quiet(1, true);
        }
        server.kill();
        assert_eq!(next(), Notice::DeathSign);
        if quiet {
            assert!(notices.recv_timeout(Duration::from_millis(200)).is_err(), "no proof while the VMM lives");
            assert!(vmm.child.try_wait().expect("wait").is_none(), "never killed for being fenced");
            assert!(watch.fence());
        }
        assert_eq!(next(), Notice::DeathProven);
        assert!(!vmm.child.wait().expect("wait").success());
        assert!(guard.wait(soon()).expect("wait"));
    }
}

#[test]
fn a_dismissed_guard_ends_without_a_word_whatever_it_watches() {
    let mut scene = scene();
    assert!(dismiss(scene.guard.hand_over()));
    assert_eq!(scene.next().0, Notice::GuardGone { why: "its connection ended".into() });
    scene.guard_ends();
    assert!(scene.vmm.child.try_wait().expect("wait").is_none());
}

#[test]
fn secrets_are_wiped_when_they_are_dropped_and_never_shown() {
    let mut secrets = Secrets::random().expect("secrets");
    assert_eq!(format!("{secrets:?}"), "Secrets(..)");
    assert!(secrets.each().iter().all(|secret| secret.iter().any(|&byte| byte != 0)));
    let mut room = std::mem::ManuallyDrop::new(secrets);
    // SAFETY: dropped once; what remains is read as plain bytes and not used as Secrets again.
    unsafe { std::mem::ManuallyDrop::drop(&mut room) };
    let left: *const Secrets = &*room;
    // SAFETY: the place is still there, and any bytes are valid ones.
    let bytes = unsafe { left.cast::<[u8; 96]>().read_volatile() };
    assert_eq!(bytes, [0; 96]);
}

#[test]
fn a_process_that_gives_no_sign_is_seen_to_end_before_it_is_reaped() {
    let mut child = Command::new("sleep").arg("600").spawn().expect("a process");
    let pid = child.id() as i32;
    assert!(!is_ending(pid) && !is_ending(std::process::id() as i32));
    child.kill().expect("kill");
    let end = Instant::now() + BOUND;
    while !is_ending(pid) {
        assert!(Instant::now() < end, "it is not seen to end");
        std::thread::yield_now();
    }
    child.wait().expect("it has ended");
    assert!(is_ending(i32::MAX), "no process has that number");
}
