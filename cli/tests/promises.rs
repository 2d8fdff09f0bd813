//! The promises P1 to P9 kept by belay's own processes: real guests, real signals, real ends.

mod running;

#[path = "running/cut.rs"]
mod cut;

use belay_vmm_glue::kvm::guests::GuestSpec;
use belay_vmm_glue::witness::observer::Seen;
use cut::{BACK, Link, THERE};
use running::{BELAY, Place, Process, has_kvm, is_running, kill, packets};
use serde_json::Value;
use std::os::unix::fs::FileExt;

/// Source, destination and an outside observer, joined as an operator would join them.
struct Road {
    place: Place,
    observer: Process,
    destination: Process,
    source: Process,
}

impl Road {
    /// Starts all three over `fabric` ("local" or "tcp"), with further options of `receive` and `send`.
    fn start(fabric: &str, receive: &[&str], send: &[&str]) -> Self {
        Self::start_in(Place::new(), fabric, receive, send)
    }

    fn start_in(place: Place, fabric: &str, receive: &[&str], send: &[&str]) -> Self {
        let observer_address = format!("unix:{}", place.text("observer.sock"));
        let (observer, _) = Self::observer(&place, &observer_address);
        let listen = match fabric {
            "local" => format!("unix:{}", place.text("receive.sock")),
            _ => "127.0.0.1:0".to_owned(),
        };
        let (destination, there) = Self::destination(&place, &listen, &observer_address, receive);
        let source = Self::source(&place, &there, &observer_address, send);
        Self { place, observer, destination, source }
    }

    /// One that writes down what it saw, and its address.
    fn observer(place: &Place, listen: &str) -> (Process, String) {
        let mut observer = place.belay(&["observe", "--json", "--listen", listen, "--log", &place.text("packets")]);
        let address = observer.wait_for_event("listening")["address"].as_str().unwrap().to_owned();
        (observer, address)
    }

    /// With the link between both hosts, over `tcp`, and the one between each of them and the observer.
    fn start_over_links(receive: &[&str], send: &[&str]) -> (Self, Link, Link) {
        let place = Place::new();
        let (observer, seen) = Self::observer(&place, "127.0.0.1:0");
        let output = Link::to(&seen);
        let (destination, there) = Self::destination(&place, "127.0.0.1:0", output.address(), receive);
        let link = Link::to(&there);
        let source = Self::source(&place, link.address(), output.address(), send);
        (Self { place, observer, destination, source }, link, output)
    }

    fn destination(place: &Place, listen: &str, output: &str, more: &[&str]) -> (Process, String) {
        let state = place.text("destination");
        let arguments = ["receive", "--json", "--listen", listen, "--output-to", output, "--state-dir", &state];
        let mut destination = place.belay(&[&arguments[..], &["--drive", "kvm"], more].concat());
        let address = destination.wait_for_event("listening")["address"].as_str().unwrap().to_owned();
        (destination, address)
    }

    fn source(place: &Place, to: &str, output: &str, more: &[&str]) -> Process {
        let state = place.text("source");
        let arguments = ["send", "--json", "--to", to, "--output-to", output, "--state-dir", &state];
        let guest = ["--memory", "32M", "--drive", "kvm", "--run-before", "50ms", "--check"];
        place.belay(&[&arguments[..], &guest, more].concat())
    }

    /// The source must have caught the guest, found every byte right, and ended by itself; the epoch it caught.
    fn expect_caught(&mut self) -> u64 {
        assert_eq!(self.source.end(), 10, "{}", self.source.story());
        let caught = self.source.events("caught").last().expect("it says what it caught").clone();
        self.source.expect_whole();
        caught["epoch"].as_u64().unwrap()
    }

    /// The outside must have seen neither gap nor contradiction, and no process may be left. All that it saw, in order.
    fn expect_good_end(mut self) -> Vec<Seen> {
        self.observer.signal(libc::SIGTERM);
        assert_eq!(self.observer.end(), 0, "{}", self.observer.story());
        drop((self.source, self.destination, self.observer));
        self.place.expect_nothing_left();
        packets(&self.place.path("packets"))
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

fn committed_epochs(process: &Process) -> impl Iterator<Item = u64> {
    process.events("committed").map(|event| event["epoch"].as_u64().unwrap())
}

mod kvm {
    use super::*;

    #[test]
    fn p1_a_guest_whose_page_server_is_killed_waits_while_the_source_catches_it() {
        needs_kvm!("p1");
        let mut road = Road::start("local", &["--vmm", "apart", "--hold-pull-at", "30"], &["--run-on", "200ms"]);
        road.destination.await_mid_pull(30);
        let vmm = road.destination.events("vmm-started").next().expect("the VMM is apart")["pid"].as_i64().unwrap();
        let vmm = i32::try_from(vmm).unwrap();
        road.destination.crash();
        road.expect_caught();
        // The stale guest is still there: it waits for pages, its gate is shut. Had it read zeroes it would have crashed or said so.
        assert!(is_running(vmm), "the VMM outlives its page server");
        kill(vmm, libc::SIGTERM);
        road.expect_good_end();
    }

    #[test]
    fn p2_p5_a_destination_that_stalled_past_its_lease_commits_and_shows_nothing_more_over_local() {
        needs_kvm!("p2");
        stall_past_the_lease("local");
    }

    #[test]
    fn p2_p5_a_destination_that_stalled_past_its_lease_commits_and_shows_nothing_more_over_tcp() {
        needs_kvm!("p2");
        stall_past_the_lease("tcp");
    }

    fn stall_past_the_lease(fabric: &str) {
        let send = ["--lease", "200ms", "--run-on", "400ms"];
        let mut road = Road::start(fabric, &["--hold-pull-at", "40"], &send);
        road.destination.await_mid_pull(40);
        road.destination.signal(libc::SIGSTOP);
        let revoked = road.source.wait_for_event("revoked")["at_us"].as_u64().unwrap();
        road.source.wait_for_event("caught");
        road.destination.signal(libc::SIGCONT);
        let code = road.destination.end();
        assert_eq!(code, 13, "it hears that the source has the guest: {}", road.destination.story());
        let caught = road.expect_caught();
        let newest = committed_epochs(&road.destination).max().unwrap();
        assert!(newest <= caught, "the destination was told of checkpoint {newest}, {caught} was caught");
        assert!(!road.destination.was("owner"), "{}", road.destination.story());
        let pulls = road.destination.events("pull");
        let told: Vec<_> =
            pulls.map(|event| ["at_us", "released_packets"].map(|of| event[of].as_u64().unwrap())).collect();
        let recovered = road.source.events("recovered").last().expect("it says what it recovered").clone();
        let resent = recovered["resent_packets"].as_u64().unwrap() as usize;
        let seen = road.expect_good_end();
        // What the source shows after a packet of the destination's it shows after the revocation: the destination stood still by then.
        let is = |who: &'static str| move |packet: &&Seen| &*packet.sender == who;
        let moved = seen.iter().position(|packet| &*packet.sender == "destination").expect("the guest ran there");
        let back = moved + seen[moved..].iter().position(|packet| &*packet.sender == "source").expect("it runs here");
        let shown = seen[..back].iter().filter(is("destination")).count();
        let again: Vec<_> = seen[back..].iter().filter(is("source")).take(resent).collect();
        let late: Vec<_> = seen[back..].iter().filter(is("destination")).collect();
        // Stopped between a commit and the packets that it lets go, it shows those when it goes on: committed, and what the source sends again.
        let committed = |packet: &&&Seen| {
            again.iter().any(|again| (again.sequence, &again.bytes) == (packet.sequence, &packet.bytes))
        };
        let new: Vec<_> = late.iter().filter(|packet| !committed(packet)).collect();
        assert!(new.is_empty(), "packets left after the revocation: {new:?}");
        // Its own count, before the revocation and after it, however often it was told: what was seen, and not one more.
        let (before, after): (Vec<_>, Vec<_>) = told.iter().partition(|[at_us, _]| *at_us <= revoked);
        let [_, before] = before.last().expect("it said how far it was before it was stopped");
        assert!(*before <= shown as u64, "{before} packets had been let go, {shown} were seen");
        let most = (shown + late.len()) as u64;
        assert!(after.iter().all(|[_, released]| *released <= most), "{most} packets were seen: {told:?}");
    }

    /// Each side hears nothing of the other any more, or only one does. Nobody closes a connection, so nobody is told.
    fn lose_the_link(directions: &[usize]) {
        let send = ["--lease", "1s", "--run-on", "400ms", "--release", "never"];
        let (mut road, link, _output) = Road::start_over_links(&["--hold-pull-at", "40"], &send);
        road.destination.await_mid_pull(40);
        link.cut_in(directions);
        road.expect_caught();
        // What the source says is heard where the way there is open.
        let (state, code) = if directions.contains(&THERE) { ("fenced", 11) } else { ("retired", 13) };
        if code == 11 {
            road.destination.wait_for_state(state);
            road.destination.signal(libc::SIGTERM);
        }
        assert_eq!(road.destination.end(), code, "{directions:?}: {}", road.destination.story());
        assert!(road.destination.was(state) && !road.destination.was("owner"), "{}", road.destination.story());
        road.expect_good_end();
    }

    #[test]
    fn p2_where_both_have_lost_each_other_and_there_is_no_arbiter_the_source_has_the_guest() {
        needs_kvm!("p2");
        lose_the_link(&[THERE, BACK]);
    }

    #[test]
    fn p2_where_the_link_is_lost_in_one_direction_the_source_has_the_guest() {
        needs_kvm!("p2");
        lose_the_link(&[THERE]);
        lose_the_link(&[BACK]);
    }

    #[test]
    fn p4_output_whose_connection_breaks_is_shown_over_the_next_and_none_is_missing() {
        needs_kvm!("p4");
        let (mut road, _link, output) = Road::start_over_links(&[], &["--release", "never", "--run-on", "200ms"]);
        for _ in 0..5 {
            let before = output.heard().len();
            output.break_connections();
            // Whoever shows output notices with the next packet, and a packet comes with every few checkpoints.
            road.destination.wait_for("output over a new connection", |_| output.heard().len() > before);
        }
        road.destination.crash();
        road.expect_caught();
        road.expect_good_end();
    }

    #[test]
    fn p3_p4_whenever_the_destination_dies_the_guest_is_whole_and_its_output_has_no_gap() {
        needs_kvm!("p3");
        for (percent, seed, fabric) in [("12", "101", "tcp"), ("45", "102", "local"), ("75", "103", "tcp")] {
            let place = Place::new();
            let arguments = ["demo", "--json", "--memory", "64M", "--drive", "kvm", "--run-on", "100ms"];
            let mut demo =
                place.belay(&[&arguments[..], &["--kill-at", percent, "--seed", seed, "--fabric", fabric]].concat());
            assert_eq!(demo.end(), 0, "{}", demo.story());
            let claims = demo.events("report").last().expect("it ends with a report")["claims"].clone();
            for about in
                ["every byte of RAM", "no gap, no contradiction", "none is missing", "recovered the newest commit"]
            {
                let claim =
                    claims.as_array().unwrap().iter().find(|claim| claim["claim"].as_str().unwrap().contains(about));
                assert_eq!(claim.unwrap_or_else(|| panic!("{about} is claimed"))["holds"], true, "{claims}");
            }
            place.expect_nothing_left();
        }
    }

    #[test]
    fn p6_a_source_that_is_gone_has_released_nothing() {
        needs_kvm!("p6");
        for fabric in ["local", "tcp"] {
            let mut road = Road::start(fabric, &[], &["--release", "never"]);
            road.destination.wait_for_event("all-landed");
            road.source.crash();
            road.destination.wait_for_state("fenced");
            road.destination.signal(libc::SIGTERM);
            assert_eq!(road.destination.end(), 11, "{}", road.destination.story());
            assert!(!road.destination.was("owner"), "{}", road.destination.story());
            road.expect_good_end();
        }
    }

    #[test]
    fn p6_a_source_that_dies_in_mid_pull_leaves_a_fenced_guest_that_can_be_ended() {
        needs_kvm!("p6");
        for place in ["in-process", "apart"] {
            let mut road = Road::start("tcp", &["--hold-pull-at", "20", "--vmm", place], &[]);
            road.destination.await_mid_pull(20);
            road.source.crash();
            road.destination.wait_for_state("fenced");
            road.destination.signal(libc::SIGINT);
            assert_eq!(road.destination.end(), 11, "{}", road.destination.story());
            road.expect_good_end();
        }
    }

    #[test]
    fn p6_a_release_that_cannot_be_written_down_is_refused_and_the_tether_kept() {
        needs_kvm!("p6");
        let mut road = Road::start("local", &[], &["--run-on", "200ms"]);
        let kept = road.source.wait_for_event("kept");
        let name = format!("source/released-{}.json", kept["migration"].as_str().unwrap());
        std::fs::create_dir(road.place.path(&name)).unwrap();
        road.destination.wait_for_event("all-landed");
        let failed = road.source.wait_for_event("failed");
        assert!(failed["what"].as_str().unwrap().contains("release record"), "{failed}");
        // Kept: checkpoints go on being committed, and the guest can still be caught.
        let newest = committed_epochs(&road.destination).max().unwrap_or(0);
        road.destination.wait_for("a later checkpoint", |event| event["epoch"].as_u64() > Some(newest + 3));
        assert!(!road.destination.was("owner"));
        road.destination.crash();
        assert!(road.expect_caught() > newest);
        assert_eq!(road.source.events("release-recorded").count(), 0);
        road.expect_good_end();
    }

    #[test]
    fn p7_a_guest_that_dirties_more_than_the_link_carries_is_slowed_and_still_caught_whole() {
        needs_kvm!("p7");
        let send = ["--dirty-rate", "300k", "--ring", "1M", "--pace", "400M", "--run-on", "100ms", "--lease", "5s"];
        let mut road = Road::start("tcp", &["--hold-pull-at", "50"], &send);
        road.destination.await_mid_pull(50);
        road.destination.crash();
        road.expect_caught();
        let held = road.destination.events("pull").filter_map(|event| event["held_packets"].as_u64()).max();
        assert!(held < Some(65_536), "{held:?}");
        road.expect_good_end();
    }

    /// Of a guest whose source has died: what it has is compared when its operator gives it up; `change` is made to its memory before.
    fn fence_and_compare(receive: &[&str], whole: bool, change: Option<usize>) -> (i32, Value) {
        let mut road = Road::start("tcp", &[receive, &["--check"]].concat(), &["--release", "never"]);
        match whole {
            true => drop(road.destination.wait_for_event("all-landed")),
            false => road.destination.await_mid_pull(30),
        }
        road.source.crash();
        road.destination.wait_for_state("fenced");
        if let Some(place) = change {
            // Guest RAM is the one file in memory of that size that the destination has open.
            let descriptors = std::fs::read_dir(format!("/proc/{}/fd", road.destination.pid())).unwrap().flatten();
            let ram = descriptors.map(|entry| entry.path()).find(|path| {
                let is_memory = std::fs::read_link(path).is_ok_and(|to| to.to_string_lossy().contains("memfd"));
                is_memory && std::fs::metadata(path).is_ok_and(|file| file.len() == 32 << 20)
            });
            let ram = std::fs::File::options().read(true).write(true).open(ram.expect("it has guest RAM")).unwrap();
            let mut byte = [0];
            ram.read_exact_at(&mut byte, place as u64).unwrap();
            ram.write_all_at(&[byte[0] ^ 1], place as u64).unwrap();
        }
        road.destination.signal(libc::SIGTERM);
        let code = road.destination.end();
        let checked = road.destination.events("checked").last().cloned().unwrap_or_default();
        assert!(checked["pages"].as_u64() > Some(0), "it never looked: {}", road.destination.story());
        assert_eq!(checked["not_compared"].as_u64() == Some(0), whole, "{checked}");
        drop(road.observer);
        drop(road.destination);
        road.place.expect_nothing_left();
        (code, checked)
    }

    #[test]
    fn p3_what_a_fenced_guest_has_is_what_its_steps_make_of_it_and_one_byte_that_is_not_is_found() {
        needs_kvm!("p3");
        let layout =
            GuestSpec { memory_bytes: 32 << 20, working_set_bytes: 8 << 20, ..GuestSpec::default() }.layout().unwrap();
        let held: &[&str] = &["--hold-pull-at", "40"];
        let apart: &[&str] = &["--hold-pull-at", "40", "--vmm", "apart"];
        for (receive, whole) in [(held, false), (apart, false), (&[], true)] {
            let (code, checked) = fence_and_compare(receive, whole, None);
            assert_eq!((code, &checked["wrong_pages"]), (11, &0.into()), "{receive:?}: {checked}");
        }
        // A page that it runs from is there whatever was pulled; the last one where everything was.
        let (text, last) = (layout.text().offset() + 4000, (32 << 20) - 1);
        for (receive, whole, place) in [(held, false, text), (&[], true, last)] {
            let (code, checked) = fence_and_compare(receive, whole, Some(place));
            assert_eq!((code, &checked["wrong_pages"]), (20, &1.into()), "{receive:?}: {checked}");
            let page = format!("(page {})", place / 4096);
            assert!(checked["detail"].as_str().unwrap().contains(&page), "{page}: {checked}");
        }
    }

    #[test]
    fn p9_without_a_tether_the_guest_of_a_dead_destination_is_lost_and_said_to_be() {
        needs_kvm!("p9");
        let mut road = Road::start("local", &["--hold-pull-at", "30"], &["--policy", "none"]);
        road.destination.wait_for("a pull under way", |event| event["landed_frames"].as_u64() > Some(0));
        road.destination.crash();
        assert_eq!(road.source.end(), 12, "{}", road.source.story());
        let failed = road.source.events("failed").last().expect("it says what was lost").clone();
        assert!(failed["what"].as_str().unwrap().contains("without a tether"), "{failed}");
        road.observer.signal(libc::SIGTERM);
        road.observer.end();
        road.place.expect_nothing_left();
    }

    #[test]
    fn p9_a_signal_does_not_lose_a_guest_that_moved_without_a_tether() {
        needs_kvm!("p9");
        let send = ["--policy", "none", "--pace", "200M"];
        let mut road = Road::start("tcp", &["--run-on", "100ms", "--check"], &send);
        road.destination.wait_for_state("tethered");
        road.destination.signal(libc::SIGTERM);
        road.source.signal(libc::SIGTERM);
        for process in [&mut road.destination, &mut road.source] {
            let failed = process.wait_for_event("failed");
            assert!(failed["what"].as_str().unwrap().contains("without a tether"), "{failed}");
            assert_eq!(process.end(), 0, "{}", process.story());
        }
        road.destination.expect_whole();
        road.expect_good_end();
    }

    #[test]
    fn p2_under_lease_the_guest_is_kept_until_the_operator_gives_the_word() {
        needs_kvm!("p2");
        let send = ["--output", "lease", "--lease", "200ms", "--run-on", "100ms"];
        let mut road = Road::start("tcp", &["--hold-pull-at", "30"], &send);
        road.destination.await_mid_pull(30);
        // Frozen, not dead: nothing proves that it shows nothing more.
        road.destination.signal(libc::SIGSTOP);
        let failed = road.source.wait_for_event("failed");
        assert!(failed["advice"].as_str().unwrap().contains("SIGINT"), "{failed}");
        road.source.signal(libc::SIGINT);
        road.source.wait_for_event("caught");
        road.destination.signal(libc::SIGCONT);
        assert_eq!(road.destination.end(), 13, "{}", road.destination.story());
        road.expect_caught();
        drop(road.observer);
        road.place.expect_nothing_left();
    }

    #[test]
    fn p9_a_signal_at_the_source_takes_the_guest_back() {
        needs_kvm!("p9");
        for signal in [libc::SIGINT, libc::SIGTERM] {
            let mut road = Road::start("local", &["--hold-pull-at", "30"], &["--run-on", "100ms"]);
            road.destination.await_mid_pull(30);
            road.source.signal(signal);
            road.expect_caught();
            assert_eq!(road.destination.end(), 13, "{}", road.destination.story());
            road.expect_good_end();
        }
    }

    #[test]
    fn p9_a_signal_at_the_destination_gives_the_guest_back() {
        needs_kvm!("p9");
        for (fabric, signal, vmm) in [("local", libc::SIGINT, "apart"), ("tcp", libc::SIGTERM, "in-process")] {
            let mut road = Road::start(fabric, &["--hold-pull-at", "30", "--vmm", vmm], &["--run-on", "100ms"]);
            road.destination.await_mid_pull(30);
            road.destination.signal(signal);
            assert_eq!(road.destination.end(), 13, "{}", road.destination.story());
            road.expect_caught();
            road.expect_good_end();
        }
    }

    #[test]
    fn p9_a_signal_ends_a_demo_and_everything_it_started() {
        needs_kvm!("p9");
        let place = Place::new();
        let mut demo = place.belay(&[
            "demo",
            "--json",
            "--memory",
            "32M",
            "--vmm",
            "apart",
            "--kill-at",
            "never",
            "--release",
            "never",
        ]);
        demo.wait_for_event("all-landed");
        demo.signal(libc::SIGINT);
        assert_eq!(demo.end(), 130, "{}", demo.story());
        place.expect_nothing_left();
    }

    #[test]
    fn p9_a_signal_before_anything_moved_ends_in_order() {
        needs_kvm!("p9");
        let place = Place::new();
        let listen = format!("unix:{}", place.text("receive.sock"));
        let mut destination = place.belay(&["receive", "--json", "--listen", &listen]);
        destination.wait_for_event("listening");
        let mut source = place.belay(&["send", "--json", "--to", &listen, "--memory", "32M", "--run-before", "60s"]);
        source.wait_for_event("guest-started");
        source.signal(libc::SIGTERM);
        assert_eq!(source.end(), 130, "{}", source.story());
        destination.signal(libc::SIGINT);
        assert_eq!(destination.end(), 130, "{}", destination.story());
        place.expect_nothing_left();
    }
}

#[test]
fn p9_every_configuration_file_we_ship_is_understood() {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/../cluster-configs");
    let place = Place::new();
    let mut files = 0;
    for entry in std::fs::read_dir(directory).unwrap().map(Result::unwrap) {
        if entry.path().extension().is_none_or(|kind| kind != "toml") {
            continue;
        }
        files += 1;
        let path = entry.path().to_str().unwrap().to_owned();
        // An address beyond loopback without certificates is refused after the file was read: nothing is started.
        let receive = ["receive", "--json", "--listen", "0.0.0.0:0", "--fabric", "tcp", "--config", &path];
        let mut receive = place.belay(&receive);
        assert_eq!(receive.end(), 2, "{path}: {}", receive.story());
        let what = receive.events("failed").last().unwrap()["what"].clone();
        assert!(what.as_str().unwrap().contains("0.0.0.0:0 is not a loopback address"), "{path}: {what}");
        let send = ["send", "--json", "--to", "127.0.0.1:1", "--fabric", "tcp", "--config", &path, "--output-to", "?"];
        let mut send = place.belay(&send);
        assert_eq!(send.end(), 2, "{path}: {}", send.story());
        let what = send.events("failed").last().unwrap()["what"].clone();
        assert!(!what.as_str().unwrap().contains(&path), "{what}");
    }
    assert!(files >= 2, "{directory} has {files} configuration files");
}

/// A failing command line: what it ends with, and a word its message must have.
struct Failing {
    arguments: Vec<String>,
    code: i32,
    says: &'static str,
}

fn failing(arguments: &str, code: i32, says: &'static str) -> Failing {
    Failing { arguments: arguments.split_whitespace().map(str::to_owned).collect(), code, says }
}

#[test]
fn p9_every_wrong_command_line_ends_with_a_code_a_message_and_an_event() {
    let place = Place::new();
    let file = |name: &str, text: &str| {
        std::fs::write(place.path(name), text).unwrap();
        place.text(name)
    };
    let unknown = file("unknown.toml", "[tether]\noutputt = \"commit\"\n");
    let twice = file("twice.toml", "[tether]\nperiod = \"10ms\"\npolicy = \"none\"\n");
    let bad = file("bad.toml", "[tether\n");
    let wrong_value = file("value.toml", "[guest]\nmemory = \"lots\"\n");
    let nobody = format!("unix:{}", place.text("nobody.sock"));
    for case in [
        failing("send --to nonsense", 2, "nonsense"),
        failing("send --too 127.0.0.1:1", 2, "--to"),
        failing("receive", 2, "--listen"),
        failing("receive --listen 127.0.0.1:0 --hold-pull-at 101", 2, "0..=100"),
        failing("send --to 127.0.0.1:1 --period 5ms --policy none", 2, "cannot be used with"),
        failing("send --to 127.0.0.1:1 --period 0ms", 2, "period"),
        failing("send --to 127.0.0.1:1 --lease 0ms", 2, "lease"),
        failing("send --to 127.0.0.1:1 --cert x.crt", 2, "--key"),
        failing("send --to 127.0.0.1:1 --cert x.crt --key x.key --peer-cert y.crt", 2, "x.crt"),
        failing("demo --policy none", 2, "--kill-at never"),
        failing("demo --tls", 2, "--fabric tcp"),
        failing("demo --memory 900T", 2, "--memory"),
        failing("demo --memory 0", 2, "guest memory of 0 bytes"),
        failing("send --to 127.0.0.1:1 --overflow 4K", 2, "is the least that can be worked with"),
        failing("send --to 127.0.0.1:1 --ring 4K", 2, "a ring region of 4096 bytes is too small"),
        failing(&format!("send --to 127.0.0.1:1 --config {twice}"), 2, "both a policy and a period"),
        failing("soak --fabric verbs --runs 1", 3, "RDMA cannot be used on this host"),
        failing("send --to 127.0.0.1:1 --fabric verbs", 2, "--trusted-fabric on both hosts"),
        failing("receive --listen 0.0.0.0:0 --insecure --fabric verbs --trusted-fabric", 2, "belay keygen"),
        failing("receive --listen unix:/nowhere/x.sock --fabric verbs --trusted-fabric", 2, "HOST:PORT"),
        failing("send --to 127.0.0.1:1 --fabric local", 2, "unix:/path"),
        failing("send --to 127.0.0.1:1 --numa-node far", 2, "NUMA"),
        failing("receive --listen 127.0.0.1:0 -i 0", 2, "1..=255"),
        failing("receive --listen 127.0.0.1:0 -x nine", 2, "--gid-index"),
        failing("receive --listen 127.0.0.1:0 --fabric verbs --trusted-fabric -d nosuch0", 3, "belay check"),
        failing("receive --listen 127.0.0.1:0 -d nosuch0", 3, "RDMA cannot be used on this host"),
        failing("demo --fabric verbs -d nosuch0", 3, "RDMA cannot be used on this host"),
        failing("frobnicate", 2, "frobnicate"),
        failing(&format!("send --to 127.0.0.1:1 --config {unknown}"), 2, "outputt"),
        failing(&format!("receive --listen 127.0.0.1:0 --config {bad}"), 2, "bad.toml"),
        failing(&format!("demo --config {wrong_value}"), 2, "lots"),
        failing("demo --config /nowhere/at/all.toml", 2, "/nowhere/at/all.toml"),
        failing("receive --listen 0.0.0.0:0", 2, "not a loopback address"),
        failing("receive --listen unix:/nowhere/at/all.sock", 4, "/nowhere/at/all.sock"),
        failing("observe --listen unix:/nowhere/at/all.sock", 4, "/nowhere/at/all.sock"),
        failing("send --to 192.0.2.1:7700 --memory 8M --drive threads", 2, "belay keygen"),
        failing("send --to 127.0.0.1:1 --memory 8M --drive threads --run-before 0ms", 4, "127.0.0.1:1"),
        failing(&format!("send --to {nobody} --memory 8M --drive threads --run-before 0ms"), 4, "nobody.sock"),
        failing("send --to 127.0.0.1:1 --drive threads --vmm apart", 3, "--vmm apart"),
        failing("send --to 127.0.0.1:1 --drive threads --guest scanner --memory 8M", 3, "Scanner"),
    ] {
        let mut arguments: Vec<_> = case.arguments.iter().map(String::as_str).collect();
        arguments.insert(1, "--json");
        let mut process = place.belay(&arguments);
        let code = process.end();
        let said = process.complaints();
        let events = process.seen.iter().map(Value::to_string).collect::<Vec<_>>().join("\n");
        assert_eq!(code, case.code, "{arguments:?}: {said}\n{events}");
        let failed = process.events("failed").last().unwrap_or_else(|| panic!("{arguments:?} has no event: {said}"));
        let text = format!("{} {}", failed["what"].as_str().unwrap(), failed["advice"].as_str().unwrap());
        assert!(text.contains(case.says), "{arguments:?}: {text:?} lacks {:?}", case.says);
        assert!(!failed["advice"].as_str().unwrap().is_empty(), "{arguments:?} advises nothing: {failed}");
        let ended = process.events("ended").last().unwrap_or_else(|| panic!("{arguments:?} does not end: {events}"));
        assert_eq!(
            (&ended["parent"], &ended["exit_code"]),
            (&failed["id"], &case.code.into()),
            "{arguments:?}: {ended}"
        );
    }
    place.expect_nothing_left();
}

#[test]
fn p9_the_wrong_certificate_is_named_at_both_ends_and_the_destination_waits_on() {
    let place = Place::new();
    let directory = place.text("keys");
    for names in [["source", "destination"], ["stranger", "nobody"]] {
        let [source, destination] = names;
        let arguments = ["keygen", "--out", &directory, "--source", source, "--destination", destination];
        let made = std::process::Command::new(BELAY).args(arguments).output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    }
    let of = |own: &str, peer: &str| {
        let file = |name: &str, kind: &str| format!("{directory}/{name}.{kind}");
        let [cert, key, peer] = [file(own, "crt"), file(own, "key"), file(peer, "crt")];
        ["--cert".to_owned(), cert, "--key".to_owned(), key, "--peer-cert".to_owned(), peer].to_vec()
    };
    let start = |first: &[&str], keys: Vec<String>| {
        place.belay(&first.iter().copied().chain(keys.iter().map(String::as_str)).collect::<Vec<_>>())
    };
    let mut destination = start(&["receive", "--json", "--listen", "127.0.0.1:0"], of("destination", "source"));
    let to = destination.wait_for_event("listening")["address"].as_str().unwrap().to_owned();
    let mut send = vec!["send", "--json", "--to", &to, "--memory", "8M", "--drive", "threads", "--run-before", "0ms"];
    let mut source = start(&send, of("stranger", "destination"));
    assert_eq!(source.end(), 4, "{}", source.story());
    let failed = source.events("failed").last().expect("it says why").clone();
    assert!(!failed["advice"].as_str().unwrap().is_empty(), "{failed}");
    let refused = destination.wait_for_state("turned-away");
    assert!(refused["why"].as_str().unwrap().contains("certificate"), "{refused}");
    // One stranger must not keep the right source out.
    send.extend(["--tracker", "uffd-wp"]);
    let mut right = start(&send, of("source", "destination"));
    destination.wait_for_event("connected");
    right.signal(libc::SIGKILL);
    right.end();
    destination.signal(libc::SIGTERM);
    destination.end();
    place.expect_nothing_left();
}
