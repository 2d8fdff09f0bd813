//! The page server of a VMM apart dies, and `belay receive --takeover` goes on with the guest: real processes, real kills.
//!
//! Under `--output lease` a living source waits for a destination it has lost until a catch is ordered, so these runs need no clock.

mod running;

use running::{Place, Process, has_kvm, is_running, kill};
use serde_json::Value;

/// A source, a page server with its VMM apart, and an outside observer.
struct Scene {
    place: Place,
    observer: Process,
    observer_address: String,
    /// Where page servers listen, one after the other.
    listen: String,
    server: Process,
    source: Process,
    vmm: i32,
}

const LEASE: [&str; 2] = ["--output", "lease"];

impl Scene {
    /// Starts all of them over `fabric`, and waits until the guest is at the destination.
    fn start(fabric: &str, receive: &[&str], send: &[&str]) -> Self {
        let place = Place::new();
        let observer_address = format!("unix:{}", place.text("observer.sock"));
        let mut observer = place.belay(&["observe", "--json", "--listen", &observer_address]);
        observer.wait_for_event("listening");
        let listen = match fabric {
            "local" => format!("unix:{}", place.text("receive.sock")),
            _ => "127.0.0.1:0".to_owned(),
        };
        let mut server = Self::serve(&place, &listen, &observer_address, &[&["--vmm", "apart"], receive].concat());
        let listen = server.wait_for_event("listening")["address"].as_str().unwrap().to_owned();
        let state = place.text("source");
        let source = place.belay(
            &[
                &["send", "--json", "--to", &listen, "--state-dir", &state, "--output-to", &observer_address][..],
                // A working set that fills most of RAM, dirtied fast: pages are needed and written all the time.
                &["--memory", "64M", "--working-set", "48M", "--dirty-rate", "40k", "--drive", "kvm"],
                &["--run-before", "50ms", "--check"],
                send,
            ]
            .concat(),
        );
        let vmm = server.wait_for_event("vmm-started")["pid"].as_i64().unwrap() as i32;
        Self { place, observer, observer_address, listen, server, source, vmm }
    }

    fn serve(place: &Place, listen: &str, observer: &str, more: &[&str]) -> Process {
        let state = place.text("destination");
        let common = ["receive", "--json", "--listen", listen, "--state-dir", &state, "--output-to", observer];
        place.belay(&[&common[..], &["--drive", "kvm", "--linger", "2m"], more].concat())
    }

    /// Starts another page server that is to go on; the one before it is ended when the test is.
    fn another(&self, more: &[&str]) -> Process {
        Self::serve(&self.place, &self.listen, &self.observer_address, &[&["--takeover"], more].concat())
    }

    /// Kills the page server and has another go on; what that one found.
    fn take_over(&mut self, more: &[&str]) -> Value {
        self.server.crash();
        self.server = self.another(more);
        let took = self.server.wait_for_event("took-over");
        assert_eq!(took["pid"].as_i64(), Some(self.vmm.into()));
        took
    }

    /// The page server is tethered, takes checkpoints, and owns the guest in the end, with every byte what it must be.
    fn expect_released(mut self) {
        assert_eq!(self.server.end(), 0, "{}\nsource: {}", self.server.story(), self.source.story());
        assert!(self.server.was("owner"), "{}", self.server.story());
        self.server.expect_whole();
        assert_eq!(self.source.end(), 0, "{}", self.source.story());
        self.expect_good_end();
    }

    /// The outside must have seen neither gap nor contradiction, and no process may be left.
    fn expect_good_end(mut self) {
        self.observer.signal(libc::SIGTERM);
        assert_eq!(self.observer.end(), 0, "{}", self.observer.story());
        drop((self.source, self.server, self.observer));
        self.place.expect_nothing_left();
    }
}

macro_rules! needs_kvm {
    ($name:literal) => {
        if !has_kvm() {
            eprintln!("skipped: {} needs /dev/kvm", $name);
            return;
        }
    };
}

/// What a page server that has taken over needs to end by itself.
const CHECKED: [&str; 3] = ["--check", "--run-on", "100ms"];

mod kvm {
    use super::*;

    #[test]
    fn a_frozen_page_server_keeps_its_guest_and_a_dead_one_leaves_it_with_all_that_had_landed() {
        needs_kvm!("a frozen page server");
        let mut scene = Scene::start("tcp", &["--hold-pull-at", "30"], &LEASE);
        scene.server.await_mid_pull(30);
        scene.server.signal(libc::SIGSTOP);
        let mut early = scene.another(&[]);
        assert_eq!(early.end(), 8, "{}", early.story());
        let failed = early.events("failed").last().expect("it says by whom").clone();
        assert!(failed["what"].as_str().unwrap().contains(&scene.server.pid().to_string()), "{failed}");
        let landed = scene.server.events("pull").last().unwrap()["landed_frames"].as_u64().unwrap();
        let took = scene.take_over(&[]);
        assert!(took["landed_frames"].as_u64().unwrap() >= landed, "what has landed stays landed: {took}");
        assert!(took["missing_frames"].as_u64().unwrap() > 0, "{took}");
        assert!(is_running(scene.vmm));
    }

    #[test]
    fn where_no_page_server_has_died_there_is_nothing_to_take_over() {
        needs_kvm!("nothing to take over");
        let place = Place::new();
        let listen = format!("unix:{}", place.text("receive.sock"));
        let mut lone =
            place.belay(&["receive", "--json", "--listen", &listen, "--state-dir", &place.text("none"), "--takeover"]);
        assert_eq!(lone.end(), 7, "{}", lone.story());
        place.expect_nothing_left();
    }

    #[test]
    fn a_page_server_killed_in_mid_pull_is_replaced_and_the_guest_goes_on_to_its_release_over_tcp() {
        needs_kvm!("a takeover over tcp");
        killed_in_mid_pull("tcp");
    }

    #[test]
    fn a_page_server_killed_in_mid_pull_is_replaced_and_the_guest_goes_on_to_its_release_over_local() {
        needs_kvm!("a takeover over local");
        killed_in_mid_pull("local");
    }

    fn killed_in_mid_pull(fabric: &str) {
        let mut scene = Scene::start(fabric, &["--hold-pull-at", "30"], &LEASE);
        scene.server.await_mid_pull(30);
        scene.take_over(&CHECKED);
        scene.server.wait_for_state("tethered");
        scene.expect_released();
    }

    #[test]
    fn page_servers_killed_one_after_the_other_leave_the_guest_whole() {
        needs_kvm!("takeovers in a row");
        let mut scene = Scene::start("tcp", &["--hold-pull-at", "20"], &LEASE);
        scene.server.await_mid_pull(20);
        let first = scene.take_over(&["--hold-pull-at", "60"]);
        scene.server.await_mid_pull(60);
        let second = scene.take_over(&CHECKED);
        let landed = |took: &Value| took["landed_frames"].as_u64().unwrap();
        assert!(landed(&second) > landed(&first), "{first} {second}");
        scene.expect_released();
    }

    #[test]
    fn a_page_server_killed_in_the_takeover_leaves_it_to_the_next() {
        needs_kvm!("a death in the takeover");
        let mut scene = Scene::start("tcp", &["--hold-pull-at", "30"], &LEASE);
        scene.server.await_mid_pull(30);
        scene.take_over(&[]);
        // It has the VMM and has not, or has only just, been heard by the source.
        scene.take_over(&CHECKED);
        scene.expect_released();
    }

    #[test]
    fn a_page_server_killed_when_every_page_has_landed_is_replaced_and_released() {
        needs_kvm!("a takeover with every page");
        let mut scene = Scene::start("local", &[], &[&LEASE[..], &["--release", "2s"]].concat());
        scene.server.wait_for_event("all-landed");
        let took = scene.take_over(&CHECKED);
        assert_eq!(took["missing_frames"], 0, "{took}");
        scene.expect_released();
    }

    #[test]
    fn p4_under_commit_the_guest_of_a_dead_page_server_is_caught_and_a_later_one_retires_what_was_left() {
        needs_kvm!("a catch before a takeover");
        let mut scene = Scene::start("tcp", &["--hold-pull-at", "30"], &["--run-on", "3s"]);
        scene.server.await_mid_pull(30);
        scene.server.crash();
        scene.source.wait_for_event("caught");
        scene.server = scene.another(&[]);
        scene.server.wait_for_event("took-over");
        assert_eq!(scene.source.end(), 10, "{}", scene.source.story());
        scene.source.expect_whole();
        scene.server.signal(libc::SIGTERM);
        assert!([11, 13].contains(&scene.server.end()), "{}", scene.server.story());
        assert!(!scene.server.was("tethered"), "{}", scene.server.story());
        assert!(!is_running(scene.vmm), "what was left is given up");
        scene.expect_good_end();
    }

    #[test]
    fn p6_with_source_and_page_server_dead_the_guest_stays_fenced_with_its_memory() {
        needs_kvm!("both dead");
        let mut scene = Scene::start("tcp", &["--hold-pull-at", "30"], &LEASE);
        scene.server.await_mid_pull(30);
        scene.source.crash();
        scene.take_over(&[]);
        scene.server.wait_for_state("fenced");
        assert!(is_running(scene.vmm));
        scene.server.signal(libc::SIGTERM);
        assert_eq!(scene.server.end(), 11, "{}", scene.server.story());
        assert!(!scene.server.was("owner") && !scene.server.was("tethered"), "{}", scene.server.story());
        scene.expect_good_end();
    }

    #[test]
    fn p2_under_lease_an_ordered_catch_fences_the_vmm_of_a_dead_page_server_and_needs_no_clock() {
        needs_kvm!("the fence");
        // A lease that no test waits for: only the fence's proof lets this catch begin.
        let send = [&LEASE[..], &["--lease", "60min", "--catch-on-loss", "--run-on", "50ms"]].concat();
        let mut scene = Scene::start("tcp", &["--hold-pull-at", "30"], &send);
        scene.server.await_mid_pull(30);
        scene.server.crash();
        assert_eq!(scene.source.end(), 10, "{}", scene.source.story());
        assert!(!is_running(scene.vmm), "fenced");
        scene.source.expect_whole();
        drop((scene.server, scene.source, scene.observer));
        scene.place.expect_nothing_left();
    }

    #[test]
    fn a_guard_that_is_killed_is_named_on_both_hosts_and_the_guest_goes_on() {
        needs_kvm!("a dead guard");
        let mut scene = Scene::start("tcp", &CHECKED, &["--release", "1s"]);
        scene.server.wait_for_event("all-landed");
        kill(guard_of(scene.server.pid()), libc::SIGKILL);
        scene.server.wait_for_state("guard-gone");
        scene.source.wait_for_state("guard-gone");
        scene.expect_released();
    }

    #[test]
    fn p3_the_first_checkpoint_after_a_takeover_holds_all_that_the_dead_page_server_had_harvested_and_not_committed() {
        needs_kvm!("a catch after a takeover");
        for (tracker, fabric) in [("kvm-ring", "tcp"), ("kvm-log", "local"), ("uffd-wp", "tcp"), ("uffd-sync", "local")]
        {
            let send = [&LEASE[..], &["--tracker", tracker, "--run-on", "50ms"]].concat();
            let mut scene = Scene::start(fabric, &["--hold-pull-at", "40"], &send);
            scene.server.await_mid_pull(40);
            let took = scene.take_over(&["--hold-pull-at", "60"]);
            let landed = took["landed_frames"].as_u64().unwrap();
            let first = scene.server.wait_for_event("committed");
            let (pages, epoch) = (first["pages"].as_u64().unwrap(), first["epoch"].as_u64().unwrap());
            assert!(pages >= landed, "{tracker}: {pages} pages in the first checkpoint, {landed} had landed");
            scene.server.wait_for("a later checkpoint", |event| event["epoch"].as_u64() > Some(epoch + 2));
            scene.server.crash();
            scene.source.wait_for_state("awaiting-operator");
            scene.source.signal(libc::SIGINT);
            assert_eq!(scene.source.end(), 10, "{tracker}: {}", scene.source.story());
            scene.source.expect_whole();
            // Under a lease the world may have seen what the caught guest does not remember, so the observer is not asked.
            drop((scene.server, scene.source, scene.observer));
            scene.place.expect_nothing_left();
        }
    }

    #[test]
    fn with_source_and_page_server_dead_both_are_taken_over_and_the_guest_goes_on() {
        needs_kvm!("both taken over");
        for fabric in ["tcp", "local"] {
            let memory = tempfile::tempdir_in("/dev/shm").expect("/dev/shm is tmpfs");
            let kept = ["--memory-dir", memory.path().to_str().unwrap()];
            let mut scene = Scene::start(fabric, &["--hold-pull-at", "30"], &kept);
            scene.server.await_mid_pull(30);
            // In this order: under commit a living source catches the guest of a dead page server at once.
            scene.source.crash();
            scene.take_over(&CHECKED);
            let state = scene.place.text("source");
            let again = ["send", "--json", "--takeover", "--state-dir", &state, "--takeover-grace", "30s", "--check"];
            scene.source = scene.place.belay(&again);
            scene.expect_released();
        }
    }

    #[test]
    fn a_guest_whose_pages_are_all_here_can_be_promoted_without_its_source() {
        needs_kvm!("a promotion");
        let mut scene = Scene::start("tcp", &[], &["--release", "never"]);
        scene.server.wait_for_event("all-landed");
        scene.source.crash();
        let took = scene.take_over(&[&["--promote"], &CHECKED[..]].concat());
        assert_eq!(took["missing_frames"], 0, "{took}");
        assert_eq!(scene.server.end(), 0, "{}", scene.server.story());
        assert!(scene.server.was("owner"), "{}", scene.server.story());
        scene.server.expect_whole();
        scene.expect_good_end();
    }

    #[test]
    fn a_promotion_is_refused_while_pages_are_missing_and_says_how_many() {
        needs_kvm!("a refused promotion");
        let mut scene = Scene::start("tcp", &["--hold-pull-at", "30"], &["--release", "never"]);
        scene.server.await_mid_pull(30);
        scene.source.crash();
        let took = scene.take_over(&["--promote"]);
        let refused = scene.server.wait_for_state("pages-missing");
        let missing = format!("{} pages are missing", took["missing_frames"]);
        assert!(refused["why"].as_str().unwrap().contains(&missing), "{refused}");
        scene.server.signal(libc::SIGTERM);
        assert_eq!(scene.server.end(), 11, "{}", scene.server.story());
        assert!(!scene.server.was("owner"), "{}", scene.server.story());
        scene.expect_good_end();
    }

    /// The guard that `server` has started.
    fn guard_of(server: i32) -> i32 {
        let children = std::fs::read_to_string(format!("/proc/{server}/task/{server}/children")).unwrap();
        let is_guard = |pid: &i32| {
            std::fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.contains("\0guard"))
        };
        children.split_whitespace().filter_map(|pid| pid.parse().ok()).find(is_guard).expect("it has a guard")
    }
}
