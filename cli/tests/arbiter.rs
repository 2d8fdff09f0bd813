//! Two hosts and an arbiter: real guests, a real etcd, real SIGKILLs, and an observer outside that forgives no contradiction.

#[path = "running/cut.rs"]
mod cut;
#[path = "running/etcd.rs"]
mod etcd;
mod running;

use belay_checkpoint::arbiter::Standing;
use cut::Link;
use etcd::Server;
use running::{Place, Process, has_kvm};

/// A tethered guest whose every page has landed, an arbiter, and whoever sees what the guest shows.
struct Road {
    place: Place,
    etcd: Server,
    observer: Process,
    link: Link,
    destination: Process,
    source: Process,
}

/// A loss is what the test makes it, never a stall of a busy machine.
const LEASE: &str = "6s";
const CONTINUE: [&str; 2] = ["--on-source-loss", "continue"];

impl Road {
    /// None, and says why, where there is no etcd.
    fn start(receive: &[&str]) -> Option<Self> {
        let mut road = Self::begin(receive, &[])?;
        road.destination.wait_for_event("all-landed");
        let mut commits = 0;
        road.destination.wait_for("checkpoints of a guest that is all here", |event| {
            commits += u64::from(event["event"] == "committed");
            commits >= 3
        });
        Some(road)
    }

    fn begin(receive: &[&str], send: &[&str]) -> Option<Self> {
        let etcd = Server::start(etcd::etcd()?);
        let place = Place::new();
        let seen_at = format!("unix:{}", place.text("observer.sock"));
        let mut observer = place.belay(&["observe", "--json", "--listen", &seen_at]);
        observer.wait_for_event("listening");
        let address = etcd.address();
        let arbiter = ["--arbiter", &address, "--guest-name", "vm1"];
        let (drive, state, run) =
            (if has_kvm() { "kvm" } else { "threads" }, place.text("destination"), place.text("run"));
        let common = [
            "receive",
            "--json",
            "--listen",
            "127.0.0.1:0",
            "--state-dir",
            &state,
            "--run-dir",
            &run,
            "--drive",
            drive,
        ];
        let shown = ["--output-to", &seen_at, "--check", "--run-on", "200ms"];
        let mut destination = place.belay(&[&common[..], &shown, &arbiter, receive].concat());
        let link = Link::to(destination.wait_for_event("listening")["address"].as_str().unwrap());
        let (to, state) = (link.address().to_owned(), place.text("source"));
        let common = ["send", "--json", "--to", &to, "--state-dir", &state, "--run-dir", &run, "--drive", drive];
        let guest =
            ["--memory", "32M", "--run-before", "50ms", "--lease", LEASE, "--release", "never", "--fabric", "tcp"];
        let shown = ["--output-to", &seen_at, "--check", "--run-on", "200ms"];
        let source = place.belay(&[&common[..], &guest, &shown, &arbiter, send].concat());
        let mut road = Self { place, etcd, observer, link, destination, source };
        road.source.wait_for_state("lent");
        Some(road)
    }

    /// The destination has the guest for good, and the world has seen nothing that contradicts itself.
    fn expect_gone_on(&mut self) {
        assert_eq!(self.destination.end(), 0, "{}", self.destination.story());
        self.destination.expect_whole();
        assert!(self.destination.was("arbiter-granted") && self.destination.was("owner"));
        assert_eq!(self.etcd.standing("vm1"), Some(Standing::Kept));
    }

    /// The source has it.
    fn expect_caught(&mut self) {
        assert_eq!(self.source.end(), 10, "{}", self.source.story());
        self.source.expect_whole();
        assert!(self.source.was("arbiter-granted"));
        assert_eq!(self.etcd.standing("vm1"), Some(Standing::TakenBack));
    }

    /// Ended; what the observer saw has no gap and no contradiction, and nobody is left.
    fn expect_good_end(mut self) {
        self.observer.signal(libc::SIGTERM);
        assert_eq!(self.observer.end(), 0, "{}", self.observer.story());
        drop((self.source, self.destination, self.observer));
        self.place.expect_nothing_left();
    }
}

#[test]
fn p2_a_destination_with_every_page_goes_on_alone_when_its_source_dies_and_what_it_then_shows_is_seen() {
    let Some(mut road) = Road::start(&CONTINUE) else { return };
    road.source.crash();
    let resumed = road.destination.wait_for_state("owner");
    assert_eq!(resumed["state"], "owner");
    road.expect_gone_on();
    road.expect_good_end();
}

#[test]
fn p2_a_source_that_comes_back_late_cedes_the_guest_that_went_on_without_it() {
    let Some(mut road) = Road::start(&CONTINUE) else { return };
    road.source.signal(libc::SIGSTOP);
    road.destination.wait_for_state("owner");
    road.source.signal(libc::SIGCONT);
    assert_eq!(road.source.end(), 15, "{}", road.source.story());
    assert!(road.source.was("ceded"));
    let touched = ["revoked", "recovered", "caught"].map(|event| road.source.events(event).count());
    assert_eq!(touched, [0; 3], "{}", road.source.story());
    road.expect_gone_on();
    road.expect_good_end();
}

#[test]
fn p2_a_destination_that_comes_back_late_stays_fenced_and_retires() {
    let Some(mut road) = Road::start(&CONTINUE) else { return };
    road.destination.signal(libc::SIGSTOP);
    road.expect_caught();
    road.destination.signal(libc::SIGCONT);
    assert_eq!(road.destination.end(), 13, "{}", road.destination.story());
    assert!(!road.destination.was("owner") && !road.destination.was("arbiter-granted"));
    road.expect_good_end();
}

#[test]
fn p2_where_both_have_lost_each_other_exactly_one_has_the_guest() {
    let Some(mut road) = Road::start(&CONTINUE) else { return };
    road.link.cut();
    // Whoever is first: the source says so by its end, whichever it is.
    let source = road.source.end();
    match source {
        10 => {
            road.expect_caught();
            road.destination.wait_for_state("taken-back");
            assert!(!road.destination.was("owner"), "{}", road.destination.story());
            road.destination.signal(libc::SIGTERM);
            assert_eq!(road.destination.end(), 11, "{}", road.destination.story());
        }
        15 => road.expect_gone_on(),
        other => panic!("{other}: {}", road.source.story()),
    }
    road.expect_good_end();
}

#[test]
fn an_arbiter_that_is_away_leaves_the_guest_fenced_until_it_is_back_and_then_it_goes_on() {
    let Some(mut road) = Road::start(&CONTINUE) else { return };
    road.etcd.kill();
    road.source.crash();
    road.destination.wait_for_state("awaiting-arbiter");
    assert!(!road.destination.was("owner"), "{}", road.destination.story());
    road.etcd.start_again();
    road.destination.wait_for_state("owner");
    road.expect_gone_on();
    road.expect_good_end();
}

#[test]
fn an_arbiter_that_is_away_lets_no_source_take_the_guest_back_until_it_says_so() {
    let Some(mut road) = Road::start(&CONTINUE) else { return };
    road.etcd.kill();
    road.destination.crash();
    road.source.wait_for_state("awaiting-arbiter");
    // Not by order either; that only has it asked at once.
    road.source.signal(libc::SIGINT);
    assert_eq!(road.source.events("revoked").count(), 0, "{}", road.source.story());
    road.etcd.start_again();
    road.expect_caught();
    road.expect_good_end();
}

#[test]
fn an_arbiter_that_flaps_has_nobody_take_what_is_not_theirs_and_is_believed_when_it_has_settled() {
    let Some(mut road) = Road::start(&CONTINUE) else { return };
    // It hears and does not answer: what was sent may still be done.
    road.etcd.freeze();
    road.link.cut();
    road.source.wait_for_state("awaiting-arbiter");
    road.destination.wait_for_state("awaiting-arbiter");
    road.etcd.kill();
    road.etcd.start_again();
    road.etcd.freeze();
    std::thread::yield_now();
    road.etcd.thaw();
    road.etcd.kill();
    assert_eq!((road.source.events("caught").count(), road.destination.was("tethered")), (0, true));
    road.etcd.start_again();
    let source = road.source.end();
    match (source, road.etcd.standing("vm1")) {
        (10, Some(Standing::TakenBack)) => {
            road.destination.wait_for_state("taken-back");
            road.destination.signal(libc::SIGTERM);
            assert_eq!(road.destination.end(), 11, "{}", road.destination.story());
        }
        (15, Some(Standing::Kept)) => road.expect_gone_on(),
        other => panic!("{other:?}: {}", road.source.story()),
    }
    road.expect_good_end();
}

#[test]
fn p2_a_destination_that_is_to_be_fenced_claims_nothing_until_it_is_promoted_and_then_with_the_arbiters_word() {
    let Some(mut road) = Road::start(&[]) else { return };
    road.source.crash();
    road.destination.wait_for_state("fenced");
    assert_eq!(road.etcd.standing("vm1"), Some(Standing::Lent));
    assert_eq!(road.promote(&["--i-know-the-source-is-gone"]), 0, "{}", road.destination.story());
    road.expect_gone_on();
    road.expect_good_end();
}

#[test]
fn a_promotion_waits_for_an_arbiter_that_is_away_and_one_by_force_does_not_and_says_on_what_it_stands() {
    let Some(mut road) = Road::start(&CONTINUE) else { return };
    road.etcd.kill();
    road.source.crash();
    road.destination.wait_for_state("awaiting-arbiter");
    assert_eq!(road.promote(&["--i-know-the-source-is-gone", "--wait", "300ms"]), 32);
    assert_eq!(road.promote(&["--force"]), 2, "the word is asked for as well");
    assert_eq!(road.promote(&["--force", "--i-know-the-source-is-gone"]), 0, "{}", road.destination.story());
    assert_eq!(road.destination.end(), 0, "{}", road.destination.story());
    road.destination.expect_whole();
    let said = road.destination.seen.iter().find(|event| event["state"] == "promoted-by-force").expect("it is noted");
    assert!(said["why"].as_str().unwrap().contains("two hosts run it"), "{said}");
    assert!(!road.destination.was("arbiter-granted"));
    road.expect_good_end();
}

#[test]
fn p9_an_arbiter_that_would_be_none_starts_nothing() {
    let place = Place::new();
    for (wrong, said) in [
        (&["receive", "--listen", "127.0.0.1:0", "--on-source-loss", "continue"][..], "--arbiter http://"),
        (&["receive", "--listen", "127.0.0.1:0", "--guest-name", "vm1"], "--arbiter"),
        (
            &["send", "--to", "127.0.0.1:9", "--arbiter", "https://127.0.0.1:1", "--guest-name", "vm1"],
            "http://HOST:PORT",
        ),
    ] {
        let mut process = place.belay(&[wrong, &["--json"]].concat());
        assert_eq!(process.end(), 2, "{}", process.story());
        let failed = process.events("failed").next().expect("it says why").to_string();
        assert!(failed.contains(said), "{failed}");
    }
}

#[test]
fn p9_a_guest_that_the_arbiter_cannot_lend_is_not_moved() {
    let place = Place::new();
    // Nobody listens on a port that was just given back.
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (state, arbiter) = (place.text("source"), format!("http://{nobody}"));
    let common =
        ["send", "--json", "--to", "127.0.0.1:9", "--state-dir", &state, "--memory", "16M", "--run-before", "1ms"];
    let drive = ["--drive", if has_kvm() { "kvm" } else { "threads" }, "--arbiter", &arbiter, "--guest-name", "vm1"];
    let mut source = place.belay(&[&common[..], &drive].concat());
    assert_eq!(source.end(), 5, "{}", source.story());
    assert!(source.story().contains("cannot be lent"), "{}", source.story());
}

impl Road {
    /// The exit code of `belay promote` for the destination.
    fn promote(&self, words: &[&str]) -> i32 {
        self.order("promote", &self.destination, words)
    }

    fn order(&self, order: &str, of: &Process, words: &[&str]) -> i32 {
        let run = self.place.text("run");
        let name = of.events("operable").next().expect("it says so")["name"].as_str().unwrap().to_owned();
        self.place.belay(&[&[order, &name, "--run-dir", &run][..], words].concat()).end()
    }
}

#[test]
fn a_destination_that_is_to_go_on_and_lacks_pages_says_so_and_claims_nothing() {
    let Some(mut road) = Road::begin(&[&CONTINUE[..], &["--hold-pull-at", "30"]].concat(), &[]) else { return };
    road.destination.wait_for_event("committed");
    road.source.crash();
    road.destination.wait_for_state("pages-missing");
    assert!(!road.destination.was("claiming"), "{}", road.destination.story());
    assert_eq!(road.etcd.standing("vm1"), Some(Standing::Lent));
    road.destination.signal(libc::SIGTERM);
    assert_eq!(road.destination.end(), 11, "{}", road.destination.story());
    road.expect_good_end();
}

#[test]
fn p2_whoever_takes_over_from_a_source_whose_guest_went_on_alone_cedes_it() {
    let memory = tempfile::tempdir_in("/dev/shm").expect("/dev/shm is tmpfs");
    let kept = ["--memory-dir", memory.path().to_str().expect("UTF-8")];
    let Some(mut road) = Road::begin(&CONTINUE, &kept) else { return };
    road.destination.wait_for_event("all-landed");
    road.source.crash();
    road.destination.wait_for_state("owner");
    let (state, run) = (road.place.text("source"), road.place.text("run"));
    let takeover =
        ["send", "--json", "--takeover", "--takeover-grace", "200ms", "--state-dir", &state, "--run-dir", &run];
    road.source = road.place.belay(&takeover);
    assert_eq!(road.source.end(), 15, "{}", road.source.story());
    assert_eq!(road.source.events("caught").count(), 0, "{}", road.source.story());
    road.expect_gone_on();
    road.expect_good_end();
}

#[test]
fn a_catch_waits_for_an_arbiter_that_is_away_and_one_by_force_does_not_and_says_on_what_it_stands() {
    let Some(mut road) = Road::start(&CONTINUE) else { return };
    road.etcd.kill();
    road.destination.crash();
    road.source.wait_for_state("awaiting-arbiter");
    assert_eq!(road.order("catch", &road.source, &["--wait", "300ms"]), 32);
    assert_eq!(road.order("catch", &road.source, &["--force"]), 2, "the word is asked for as well");
    let word = ["--force", "--i-know-the-destination-is-gone"];
    assert_eq!(road.order("catch", &road.source, &word), 0, "{}", road.source.story());
    assert_eq!(road.source.end(), 10, "{}", road.source.story());
    road.source.expect_whole();
    let said = road.source.seen.iter().find(|event| event["state"] == "caught-by-force").expect("it is noted");
    assert!(said["why"].as_str().unwrap().contains("two hosts run it"), "{said}");
    assert!(!road.source.was("arbiter-granted"));
    road.expect_good_end();
}
