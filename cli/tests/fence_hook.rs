//! The fence hook of belay's own processes: a destination that stands still says nothing and proves nothing, so the hook decides.

mod running;

use running::{Place, Process, has_kvm, kill};

/// A source with a hook, and a destination that can be made to stand still.
struct Road {
    place: Place,
    destination: Process,
    source: Process,
}

/// Until somebody makes the file `allowed`, the hook fails.
const ALLOWED: &str = "echo run >> \"$PLACE/runs\"; test -e \"$PLACE/allowed\"";

impl Road {
    fn start(hook: &str, send: &[&str]) -> Self {
        let place = Place::new();
        let state = place.text("destination");
        let drive = if has_kvm() { "kvm" } else { "host-threads" };
        let receive = ["receive", "--json", "--listen", "127.0.0.1:0", "--state-dir", &state, "--drive", drive];
        let mut destination = place.belay(&[&receive[..], &["--hold-pull-at", "30"]].concat());
        let to = destination.wait_for_event("listening")["address"].as_str().unwrap().to_owned();
        let state = place.text("source");
        let common = ["send", "--json", "--to", &to, "--state-dir", &state, "--memory", "32M", "--drive", drive];
        let fence = ["--run-before", "50ms", "--lease", "500ms", "--check", "--fence-hook", hook];
        let mut command = std::process::Command::new(running::BELAY);
        command.args([&common[..], &fence, send].concat()).env("PLACE", place.directory.path());
        let source = place.start(command);
        Self { place, destination, source }
    }

    /// The destination says nothing any more: no end of a connection, no death sign, no proof.
    fn freeze(&mut self) {
        let mut commits = 0;
        self.destination.wait_for("three checkpoints", |event| {
            commits += u64::from(event["event"] == "committed");
            commits >= 3
        });
        self.destination.signal(libc::SIGSTOP);
    }

    fn allow(&self) {
        std::fs::write(self.place.path("allowed"), "").expect("writable");
    }

    /// The hook has been run and has failed.
    fn expect_refused(&mut self) {
        self.source.wait_for("a hook that proves nothing", |event| {
            event["event"] == "failed"
                && event["what"].as_str().is_some_and(|what| what.contains("the fence hook ended"))
        });
    }

    /// The guest came back whole; before that the hook had succeeded, and after it nothing of it runs.
    fn expect_caught(mut self) {
        assert_eq!(self.source.end(), 10, "{}", self.source.story());
        self.source.expect_whole();
        let at = |is_it: &dyn Fn(&serde_json::Value) -> bool| self.source.seen.iter().position(is_it);
        let proven = at(&|event| event["state"] == "fence-hook-succeeded").expect("it succeeded");
        for after in ["revoked", "recovered", "caught"] {
            let after_it = at(&|event| event["event"] == after).expect("part of every catch");
            assert!(proven < after_it, "{after} before the proof: {}", self.source.story());
        }
        // What the hook said was so: it is off now.
        kill(self.destination.pid(), libc::SIGKILL);
        drop((self.source, self.destination));
        self.place.expect_nothing_left();
    }
}

#[test]
fn p2_under_lease_a_fence_hook_that_succeeds_has_the_guest_caught_without_anybodys_word() {
    let mut road = Road::start("true", &["--output", "lease", "--run-on", "100ms"]);
    road.freeze();
    road.expect_caught();
}

#[test]
fn p2_under_lease_a_fence_hook_that_proves_nothing_is_told_and_the_catch_waits() {
    let mut road = Road::start(ALLOWED, &["--output", "lease", "--run-on", "100ms"]);
    road.freeze();
    road.expect_refused();
    road.expect_refused();
    assert_eq!(road.source.events("revoked").count(), 0, "{}", road.source.story());
    road.allow();
    road.expect_caught();
}

#[test]
fn under_lease_the_operators_word_counts_beside_a_fence_hook_that_fails() {
    let mut road = Road::start("exit 9", &["--output", "lease", "--run-on", "100ms"]);
    road.freeze();
    road.expect_refused();
    road.source.signal(libc::SIGINT);
    assert_eq!(road.source.end(), 10, "{}", road.source.story());
    assert!(!road.source.was("fence-hook-succeeded"));
    kill(road.destination.pid(), libc::SIGKILL);
}

#[test]
fn p5_where_the_fence_is_asked_for_always_nothing_is_revoked_or_folded_before_it_has_succeeded() {
    let mut road = Road::start(ALLOWED, &["--fence-always", "--run-on", "100ms"]);
    road.freeze();
    road.expect_refused();
    // Not by order either; that only has it run at once.
    road.source.signal(libc::SIGINT);
    road.expect_refused();
    let early = ["revoked", "recovered", "caught"].map(|event| road.source.events(event).count());
    assert_eq!(early, [0; 3], "{}", road.source.story());
    assert!(road.source.was("awaiting-fence"));
    road.allow();
    road.expect_caught();
}

#[test]
fn p2_a_destination_that_comes_back_while_the_fence_is_awaited_stays_fenced_and_retires_after_the_catch() {
    let mut road = Road::start(ALLOWED, &["--fence-always", "--run-on", "100ms"]);
    road.freeze();
    road.expect_refused();
    road.destination.signal(libc::SIGCONT);
    // Its lease has run out and is not renewed; it stops the guest and keeps its memory.
    road.destination.wait_for_state("fenced");
    assert!(!road.source.was("fence-hook-succeeded"));
    road.allow();
    assert_eq!(road.source.end(), 10, "{}", road.source.story());
    assert_eq!(road.destination.end(), 13, "{}", road.destination.story());
}

#[test]
fn a_fence_hook_that_runs_dies_with_belay() {
    let mut road = Road::start("echo $$ > \"$PLACE/hook\"; sleep 600 & sleep 601", &["--output", "lease"]);
    road.freeze();
    road.source.wait_for_state("fence-hook-started");
    let begun = road.place.path("hook");
    let end = std::time::Instant::now() + running::BOUND;
    while !begun.exists() {
        assert!(std::time::Instant::now() < end, "the hook does not begin: {}", road.source.story());
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    road.source.crash();
    kill(road.destination.pid(), libc::SIGKILL);
    drop((road.source, road.destination));
    road.place.expect_nothing_left();
}

#[test]
fn p9_a_fence_that_would_be_none_starts_nothing() {
    let place = Place::new();
    for wrong in [&["--fence-always"][..], &["--fence-timeout", "5s"], &["--fence-hook", " "]] {
        let mut source = place.belay(&[&["send", "--json", "--to", "127.0.0.1:9"], wrong].concat());
        assert_eq!(source.end(), 2, "{}", source.story());
        assert!(source.events("failed").count() == 1, "{}", source.story());
    }
}
