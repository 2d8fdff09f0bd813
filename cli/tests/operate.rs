//! Seeing and operating real migrations: status of both sides, orders, metrics and logs, as an operator has them.

mod running;

#[path = "running/cut.rs"]
mod cut;

use belay_checkpoint::journal;
use belay_vmm_glue::migrate::protocol;
use belay_vmm_glue::migrate::source::keep::Written;
use cut::Link;
use running::{BELAY, BOUND, Place, Process, has_kvm};
use serde_json::Value;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

/// A source and a destination whose sockets lie in the test's own directory.
struct Pair {
    place: Place,
    destination: Process,
    source: Process,
}

/// What `--drive` says: KVM where there is one, else threads, which operate the same.
fn drive() -> &'static str {
    if has_kvm() { "kvm" } else { "threads" }
}

impl Pair {
    /// `fabric`: "local" or "tcp". The processes are called `there` and `here`.
    fn start(fabric: &str, receive: &[&str], send: &[&str]) -> Self {
        let place = Place::new();
        let run = place.text("run");
        let listen = match fabric {
            "local" => format!("unix:{}", place.text("receive.sock")),
            _ => "127.0.0.1:0".to_owned(),
        };
        let state = place.text("destination");
        let common = ["--json", "--drive", drive(), "--run-dir", &run];
        let mut destination = place.belay(
            &[&["receive", "--listen", &listen, "--state-dir", &state, "--name", "there"], &common[..], receive]
                .concat(),
        );
        let to = destination.wait_for_event("listening")["address"].as_str().unwrap().to_owned();
        let state = place.text("source");
        let guest = ["--memory", "32M", "--check", "--name", "here"];
        let unless = |option: &'static str, value: &'static str| {
            if send.contains(&option) { vec![] } else { vec![option, value] }
        };
        let runs = [unless("--run-before", "50ms"), unless("--run-on", "50ms")].concat();
        let send = [&["send", "--to", &to, "--state-dir", &state], &guest[..], &common[..], &runs, send].concat();
        let mut source = place.belay(&send);
        source.wait_for_event("operable");
        Self { place, destination, source }
    }

    /// Runs an operator's command over these two.
    fn belay(&self, arguments: &[&str]) -> Output {
        belay(&self.place, arguments)
    }

    fn status(&self, id: &str) -> Value {
        status(&self.place, id)
    }

    /// Asks until `id` says what is waited for.
    fn wait_status(&self, id: &str, what: &str, is_it: impl Fn(&Value) -> bool) -> Value {
        let end = Instant::now() + BOUND;
        loop {
            let status = self.status(id);
            if is_it(&status) {
                return status;
            }
            assert!(Instant::now() < end, "waited for {what}; it says {status:#}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Ends both, and nothing may be left.
    fn end(self) {
        let Self { place, mut destination, mut source } = self;
        for process in [&mut source, &mut destination] {
            process.signal(libc::SIGTERM);
            process.end();
        }
        drop((source, destination));
        place.expect_nothing_left();
        assert_eq!(sockets(&place), [""; 0], "a process that ends takes its socket away");
    }
}

fn belay(place: &Place, arguments: &[&str]) -> Output {
    let run = place.text("run");
    Command::new(BELAY).args(arguments).args(["--run-dir", &run]).output().expect("belay runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

/// Exit code, stdout, stderr.
fn told(output: &Output) -> (i32, String, String) {
    (output.status.code().expect("it ends by itself"), text(&output.stdout), text(&output.stderr))
}

fn status(place: &Place, id: &str) -> Value {
    let output = belay(place, &["status", id, "--json"]);
    let (code, said, complaint) = told(&output);
    assert_eq!(code, 0, "{complaint}");
    serde_json::from_str(&said).unwrap_or_else(|error| panic!("{error}: {said}"))
}

fn sockets(place: &Place) -> Vec<String> {
    let entries = std::fs::read_dir(place.path("run")).expect("the run directory").flatten();
    let names = entries.map(|entry| entry.file_name().into_string().unwrap());
    let mut names: Vec<_> = names.filter(|name| name.ends_with(".sock")).collect();
    names.sort();
    names
}

mod seeing {
    use super::*;

    #[test]
    fn p9_both_sides_say_how_they_stand_from_the_switch_to_the_release_over_local() {
        from_the_switch_to_the_release("local");
    }

    #[test]
    fn p9_both_sides_say_how_they_stand_from_the_switch_to_the_release_over_tcp() {
        from_the_switch_to_the_release("tcp");
    }

    fn from_the_switch_to_the_release(fabric: &str) {
        let place = Place::new();
        let run = place.text("run");
        let listen = ["receive", "--json", "--listen", "127.0.0.1:0", "--run-dir", &run, "--name", "waiting"];
        let mut waiting = place.belay(&listen);
        waiting.wait_for_event("listening");
        let alone = status(&place, "waiting");
        assert_eq!(
            (&alone["state"], &alone["role"], &alone["migration"]),
            (&"listening".into(), &"destination".into(), &Value::Null)
        );
        waiting.signal(libc::SIGTERM);
        assert_eq!(waiting.end(), 130);

        let pair = Pair::start(fabric, &["--hold-pull-at", "40"], &["--release", "never"]);
        let here = pair.wait_status("here", "a source that serves", |status| {
            status["state"] == "serving" && status["lease_left_us"].is_u64()
        });
        let mid_pull =
            |status: &Value| status["state"] == "tethered" && status["checkpoints"]["commits"].as_u64() > Some(3);
        let there = pair.wait_status("there", "a tether in mid-pull", mid_pull);
        assert_eq!(here["migration"], there["migration"], "both sides of one migration");
        assert_eq!(here["migration"].as_str().map(str::len), Some(16));
        assert_eq!((&here["owner_epoch"], &there["owner_epoch"]), (&0.into(), &0.into()));
        assert_eq!((&here["fabric"], &there["fabric"]), (&fabric.into(), &fabric.into()));
        for status in [&here, &there] {
            assert_eq!((&status["memory_bytes"], &status["version"]), (&(32 << 20).into(), &1.into()));
            let lease = status["lease_left_us"].as_u64().expect("a lease is granted");
            assert!((1..=1_200_000).contains(&lease), "{status:#}");
            assert!(status["loop_turned_us"].as_u64().is_some_and(|turned| turned < 5_000_000), "{status:#}");
            assert_eq!(status["last_error"], Value::Null, "{status:#}");
        }
        let pages = &there["pages"];
        assert_eq!(pages["total"], 8192);
        assert!(pages["left"].as_u64() > Some(0) && pages["left"].as_u64() < Some(8192), "{pages}");
        assert!(there["fault_latency"]["count"].as_u64() > Some(0), "{there:#}");
        assert!(there["output"]["sent_packets"].as_u64().is_some() && there["output"]["held_bytes"].is_u64());
        // It goes on, and the board with it.
        let commits = there["checkpoints"]["commits"].as_u64().unwrap();
        let later = pair
            .wait_status("there", "more commits", |now| now["checkpoints"]["commits"].as_u64() > Some(commits + 10));
        assert!(later["checkpoints"]["dirty_pages_per_second"].as_f64() > Some(0.0), "{later:#}");
        assert!(
            later["checkpoints"]["pause"]["p50_ns"].as_u64() > Some(0)
                && later["checkpoints"]["commit_age_us"].is_u64()
        );
        pair.wait_status("here", "what was committed folded", |now| {
            now["checkpoints"]["folded_epoch"].as_u64() > Some(0)
        });

        let (code, list, _) = told(&pair.belay(&["list"]));
        assert_eq!(code, 0);
        for line in ["ID ", "here ", "there "] {
            assert!(list.lines().any(|said| said.starts_with(line)), "{list}");
        }
        let (_, page, _) = told(&pair.belay(&["status", "the"]));
        assert!(page.contains("there (destination, ") && page.contains(" left of 8192 ("), "{page}");
        pair.end();
    }

    #[test]
    fn a_name_that_nobody_has_is_answered_with_those_that_there_are() {
        let place = Place::new();
        let (code, said, _) = told(&belay(&place, &["list"]));
        assert_eq!((code, said.starts_with("no migration runs here")), (0, true), "{said}");
        let (code, _, complaint) = told(&belay(&place, &["status", "vm9"]));
        assert_eq!(code, 30, "{complaint}");
        assert!(complaint.contains("`vm9`; none runs"), "{complaint}");
        let (code, _, complaint) = told(&belay(&place, &["status"]));
        assert_eq!(code, 30, "{complaint}");
        let expected = format!("no belay process runs here ({} has no living socket)", place.text("run"));
        assert!(complaint.contains(&expected) && complaint.contains("--run-dir"), "{complaint}");
        let run = place.text("run");
        let mut first =
            place.belay(&["receive", "--json", "--listen", "127.0.0.1:0", "--run-dir", &run, "--name", "vm1"]);
        let mut second =
            place.belay(&["receive", "--json", "--listen", "127.0.0.1:0", "--run-dir", &run, "--name", "vm2"]);
        for process in [&mut first, &mut second] {
            process.wait_for_event("listening");
        }
        for command in [&["status", "vm9"][..], &["release", "vm9"], &["promote", "vm9"]] {
            let (code, _, complaint) = told(&belay(&place, command));
            assert_eq!(code, 30, "{complaint}");
            assert!(complaint.contains("vm1, vm2"), "{complaint}");
        }
        let (code, _, complaint) = told(&belay(&place, &["catch", "vm"]));
        assert!(code == 30 && complaint.contains("may mean any of: vm1, vm2"), "{complaint}");
        let mut third =
            place.belay(&["receive", "--json", "--listen", "127.0.0.1:0", "--run-dir", &run, "--name", "vm1"]);
        assert_eq!(third.end(), 2, "a name is one process's: {}", third.story());
        // What a crash leaves is seen for what it is.
        first.crash();
        assert_eq!(sockets(&place), ["vm1.sock", "vm2.sock"]);
        let (_, list, _) = told(&belay(&place, &["list", "--json"]));
        let list: Value = serde_json::from_str(&list).expect("JSON");
        assert_eq!(
            list.as_array().map(|all| all.iter().map(|one| &one["id"]).collect::<Vec<_>>()),
            Some(vec![&"vm2".into()])
        );
        assert_eq!(sockets(&place), ["vm2.sock"]);
        second.signal(libc::SIGTERM);
        second.end();
    }

    #[test]
    fn a_run_directory_that_others_may_write_to_is_refused_on_both_sides() {
        use std::os::unix::fs::PermissionsExt;
        let place = Place::new();
        let run = place.text("run");
        std::fs::create_dir(&run).unwrap();
        std::fs::set_permissions(&run, std::fs::Permissions::from_mode(0o777)).unwrap();
        let mut receive = place.belay(&["receive", "--json", "--listen", "127.0.0.1:0", "--run-dir", &run]);
        assert_eq!(receive.end(), 1);
        assert!(receive.story().contains("whoever may write there"), "{}", receive.story());
        let (code, _, complaint) = told(&belay(&place, &["list"]));
        assert!(code == 1 && complaint.contains("whoever may write there"), "{complaint}");
    }

    #[test]
    fn p7_a_thousand_silent_clients_and_one_that_says_a_byte_a_second_keep_nobody_out() {
        let place = Place::new();
        let run = place.text("run");
        let mut process =
            place.belay(&["receive", "--json", "--listen", "127.0.0.1:0", "--run-dir", &run, "--name", "vm"]);
        process.wait_for_event("listening");
        let socket = place.path("run").join("vm.sock");
        let mut slow = UnixStream::connect(&socket).expect("it listens");
        slow.write_all(&[0]).unwrap();
        let begun = Instant::now();
        slow.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let silent: Vec<_> = (0..1000).map(|_| UnixStream::connect(&socket).expect("it listens")).collect();
        assert_eq!(status(&place, "vm")["state"], "listening");
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
        let _ = slow.write_all(&[0]);
        assert!(matches!(slow.read(&mut [0; 1]), Ok(0) | Err(_)), "hung up on");
        // Its descriptors are bounded, whoever holds theirs.
        let open = std::fs::read_dir(format!("/proc/{}/fd", process.pid())).expect("it runs").count();
        assert!(open < 100, "{open} descriptors");
        drop(silent);
        // What is no request is answered, and hung up on.
        for (bytes, words) in [
            (&b"\0\0\0\x02{}"[..], "no message of belay's"),
            (b"\xff\xff\xff\xff", "are possible"),
            (b"\0\0\0\x0b{\"belay\":9}", "version 9"),
        ] {
            let mut client = UnixStream::connect(&socket).expect("it listens");
            client.write_all(bytes).unwrap();
            let mut said = Vec::new();
            client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            client.read_to_end(&mut said).expect("it hangs up");
            assert!(String::from_utf8_lossy(&said).contains(words), "{}", String::from_utf8_lossy(&said));
        }
        process.signal(libc::SIGTERM);
        process.end();
    }

    #[test]
    fn a_process_that_is_stopped_makes_nobody_wait_for_long() {
        let place = Place::new();
        let run = place.text("run");
        let mut process =
            place.belay(&["receive", "--json", "--listen", "127.0.0.1:0", "--run-dir", &run, "--name", "vm"]);
        process.wait_for_event("listening");
        process.signal(libc::SIGSTOP);
        let begun = Instant::now();
        let (code, _, complaint) = told(&belay(&place, &["status", "vm"]));
        assert!(code == 1 && complaint.contains("vm does not answer"), "{complaint}");
        assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
        let (code, _, complaint) = told(&belay(&place, &["cancel", "vm", "--wait", "1s"]));
        assert!(code == 1 && complaint.contains("vm was given the order and has not answered"), "{complaint}");
        // Whoever gave it has gone, so it is not carried out behind his back.
        process.signal(libc::SIGCONT);
        let (code, said, complaint) = told(&belay(&place, &["status", "vm"]));
        assert!(code == 0 && said.contains("listening"), "{said} {complaint}");
        process.signal(libc::SIGTERM);
        assert_eq!(process.end(), 130);
    }
}

mod ordering {
    use super::*;

    #[test]
    fn a_release_by_order_waits_for_the_last_page_and_gives_the_guest_away() {
        let mut pair = Pair::start("tcp", &["--hold-pull-at", "50", "--run-on", "100ms"], &["--release", "never"]);
        pair.wait_status("there", "a tether in mid-pull", |now| now["state"] == "tethered");
        let (code, _, complaint) = told(&pair.belay(&["release", "there"]));
        assert_eq!(code, 31, "{complaint}");
        assert!(complaint.contains("pages have not landed here"), "{complaint}");
        let (code, _, complaint) = told(&pair.belay(&["release", "here"]));
        assert!(code == 31 && complaint.contains("at the destination"), "{complaint}");
        let (code, _, complaint) = told(&pair.belay(&["cancel", "here"]));
        assert!(code == 31 && complaint.contains("the guest has left this host"), "{complaint}");
        let (code, _, complaint) = told(&pair.belay(&["promote", "there", "--i-know-the-source-is-gone"]));
        assert!(code == 31 && complaint.contains("the source is heard"), "{complaint}");
        // It went on all the same.
        assert_eq!(pair.status("there")["state"], "tethered");
        pair.source.signal(libc::SIGTERM);
        assert_eq!((pair.source.end(), pair.destination.end()), (10, 13), "{}", pair.destination.story());

        let mut pair = Pair::start("tcp", &["--run-on", "100ms"], &["--release", "never"]);
        pair.destination.wait_for_event("all-landed");
        pair.wait_status("there", "no page left", |now| now["pages"]["left"] == 0);
        let (code, said, complaint) = told(&pair.belay(&["release", "there"]));
        assert_eq!(code, 0, "{complaint}");
        assert!(said.contains("accepted") && said.contains("this host's own"), "{said}");
        assert_eq!((pair.source.end(), pair.destination.end()), (0, 0), "{}", pair.source.story());
        pair.place.expect_nothing_left();
    }

    #[test]
    fn a_catch_by_order_brings_the_guest_back_under_commit_and_under_lease() {
        for (fabric, output) in [("local", "commit"), ("tcp", "lease")] {
            let send = ["--release", "never", "--output", output, "--lease", "300ms", "--run-on", "100ms"];
            let mut pair = Pair::start(fabric, &["--hold-pull-at", "60"], &send);
            let tethered = |now: &Value| now["checkpoints"]["folded_epoch"].as_u64() > Some(2);
            pair.wait_status("here", "checkpoints to catch from", tethered);
            let (code, _, complaint) = told(&pair.belay(&["catch", "there"]));
            assert!(code == 31 && complaint.contains("at the source"), "{complaint}");
            let (code, said, complaint) = told(&pair.belay(&["catch", "here", "--json"]));
            assert_eq!(code, 0, "{complaint} {}", pair.source.story());
            let answers: Vec<Value> = said.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
            let kinds: Vec<_> = answers.iter().map(|answer| answer["answer"].as_str().unwrap()).collect();
            assert_eq!(kinds, ["accepted", "came-to-pass"]);
            assert_eq!((pair.source.end(), pair.destination.end()), (10, 13), "{}", pair.source.story());
            pair.source.expect_whole();
            pair.place.expect_nothing_left();
        }
    }

    #[test]
    fn a_guest_that_waits_for_the_operator_is_seen_to_wait_until_it_is_caught() {
        let send = ["--release", "never", "--output", "lease", "--lease", "200ms", "--run-on", "100ms"];
        let mut pair = Pair::start("tcp", &["--hold-pull-at", "60"], &send);
        pair.wait_status("here", "checkpoints", |now| now["checkpoints"]["folded_epoch"].as_u64() > Some(2));
        // Frozen, not dead: nothing proves that it shows nothing more.
        pair.destination.signal(libc::SIGSTOP);
        pair.wait_status("here", "the operator to be waited for", |now| now["state"] == "awaiting-operator");
        // That its lease runs out meanwhile changes nothing about it.
        pair.wait_status("here", "the lease to run out", |now| now["lease_left_us"] == 0);
        let end = Instant::now() + Duration::from_millis(500);
        while Instant::now() < end {
            let (code, said, complaint) = told(&pair.belay(&["status", "here"]));
            assert!(code == 0 && said.contains("awaiting-operator"), "{said} {complaint}");
        }
        let (code, _, complaint) = told(&pair.belay(&["catch", "here"]));
        assert_eq!(code, 0, "{complaint}");
        pair.destination.signal(libc::SIGCONT);
        assert_eq!((pair.source.end(), pair.destination.end()), (10, 13), "{}", pair.source.story());
        pair.source.expect_whole();
        pair.place.expect_nothing_left();
    }

    #[test]
    fn a_cancel_before_the_switch_leaves_the_guest_where_it_was_and_running() {
        let mut pair = Pair::start("tcp", &[], &["--run-before", "60s", "--run-on", "200ms"]);
        pair.wait_status("here", "a guest that fills its memory", |now| now["state"] == "filling");
        let (code, _, complaint) = told(&pair.belay(&["catch", "here"]));
        assert!(code == 31 && complaint.contains("has not been moved yet"), "{complaint}");
        let (code, _, complaint) = told(&pair.belay(&["release", "there"]));
        assert!(code == 31 && complaint.contains("no guest runs here yet"), "{complaint}");
        let (code, said, complaint) = told(&pair.belay(&["cancel", "here"]));
        assert_eq!(code, 0, "{complaint}");
        assert!(said.contains("runs on here"), "{said}");
        let status = pair.status("here");
        assert_eq!(status["state"], "running");
        // It runs on as it was, and its memory is what it must be.
        assert_eq!(pair.source.end(), 5, "{}", pair.source.story());
        pair.source.expect_whole();
        let (code, _, complaint) = told(&pair.belay(&["cancel", "there"]));
        assert_eq!(code, 0, "{complaint}");
        assert_eq!(pair.destination.end(), 5);
        pair.place.expect_nothing_left();
    }

    #[test]
    fn p2_a_fenced_destination_is_promoted_by_order_once_every_page_is_here_and_only_on_the_operators_word() {
        let mut pair = Pair::start("tcp", &["--run-on", "200ms", "--check"], &["--release", "never"]);
        pair.destination.wait_for_event("all-landed");
        pair.source.crash();
        pair.destination.wait_for_state("fenced");
        let fenced =
            pair.wait_status("there", "a fence", |now| now["state"] == "fenced" && now["last_error"].is_object());
        let error = &fenced["last_error"];
        assert!(error["what"].as_str().is_some_and(|what| what.starts_with("cut off from the source")), "{error:#}");
        assert!(error["advice"].as_str().is_some_and(|advice| advice.contains("belay status")), "{error:#}");
        assert!(error["story"].as_array().is_some_and(|story| story.len() > 1), "{error:#}");
        assert_eq!(fenced["pages"]["left"], 0);
        let (code, _, complaint) = told(&pair.belay(&["promote", "there"]));
        assert_eq!(code, 31, "{complaint}");
        assert!(
            complaint.contains("a past that never was") && complaint.contains("--i-know-the-source-is-gone"),
            "{complaint}"
        );
        let (code, _, complaint) = told(&pair.belay(&["release", "there"]));
        assert!(code == 31 && complaint.contains("belay promote"), "{complaint}");
        assert_eq!(pair.status("there")["state"], "fenced");
        let (code, said, complaint) = told(&pair.belay(&["promote", "there", "--i-know-the-source-is-gone"]));
        assert_eq!(code, 0, "{complaint} {}", pair.destination.story());
        assert!(said.contains("this host's own"), "{said}");
        assert_eq!(pair.destination.end(), 0, "{}", pair.destination.story());
        pair.destination.expect_whole();
        pair.place.expect_nothing_left();
    }

    #[test]
    fn p1_a_promotion_with_pages_missing_is_refused_with_their_number() {
        let mut pair = Pair::start("tcp", &["--hold-pull-at", "50"], &["--release", "never"]);
        pair.wait_status("there", "half of it", |now| {
            now["state"] == "tethered" && now["pages"]["left"].as_u64() < Some(5000)
        });
        pair.source.crash();
        let fenced = pair.wait_status("there", "a fence", |now| now["state"] == "fenced");
        let (code, _, complaint) = told(&pair.belay(&["promote", "there", "--i-know-the-source-is-gone"]));
        assert_eq!(code, 31, "{complaint}");
        let missing = pair.status("there")["pages"]["left"].as_u64().unwrap();
        assert!(complaint.contains(&format!("{missing} pages have not landed here")), "{complaint} {fenced:#}");
        assert_eq!(pair.status("there")["state"], "fenced");
        let (code, page, _) = told(&pair.belay(&["status", "there"]));
        assert!(code == 0 && page.contains("last error") && page.contains("led to it"), "{page}");
        pair.destination.signal(libc::SIGTERM);
        assert_eq!(pair.destination.end(), 11, "{}", pair.destination.story());
        pair.place.expect_nothing_left();
    }

    #[test]
    fn an_order_that_comes_when_all_is_over_is_refused_and_says_so() {
        let mut pair = Pair::start("local", &[], &["--run-on", "60s"]);
        pair.source.wait_for_event("released");
        let owner = pair.wait_status("there", "an owner", |now| now["state"] == "owner");
        assert_eq!(owner["pages"]["left"], 0, "{owner:#}");
        for ask in ["release", "cancel"] {
            let (code, _, complaint) = told(&pair.belay(&[ask, "there"]));
            assert!(code == 31 && complaint.contains("the migration is over"), "{complaint}");
        }
        assert_eq!(pair.source.end(), 0);
        pair.destination.signal(libc::SIGTERM);
        pair.destination.end();
        pair.place.expect_nothing_left();
    }
}

/// One scrape, as Prometheus does it: status line and body.
fn scrape(address: &str) -> (String, String) {
    let mut stream = TcpStream::connect(address).expect("metrics are served");
    stream.set_read_timeout(Some(BOUND)).unwrap();
    write!(stream, "GET /metrics HTTP/1.1\r\nHost: {address}\r\nAccept: text/plain\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer that ends");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    (head.lines().next().unwrap_or_default().to_owned(), body.to_owned())
}

/// A sample without labels, or with exactly these.
fn sample(body: &str, series: &str) -> Option<f64> {
    body.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok())
}

mod watching {
    use super::*;

    #[test]
    fn metrics_of_both_sides_say_what_their_status_says() {
        let send = ["--release", "never", "--metrics", "0"];
        let mut pair = Pair::start("tcp", &["--hold-pull-at", "70", "--metrics", "127.0.0.1:0"], &send);
        let there =
            pair.destination.seen.iter().find(|event| event["event"] == "metrics").expect("it says where")["address"]
                .clone();
        let here = pair.source.wait_for_event("metrics")["address"].clone();
        let (here, there) = (here.as_str().unwrap(), there.as_str().unwrap());
        assert!(here.starts_with("127.0.0.1:"), "a port alone is loopback: {here}");
        pair.wait_status("there", "a held pull", |now| now["checkpoints"]["commits"].as_u64() > Some(20));
        // What only grows lies between what it was before and after.
        let before = pair.status("there");
        let (status, body) = scrape(there);
        let after = pair.status("there");
        assert_eq!(status, "HTTP/1.1 200 OK");
        let grows = [
            ("belay_pulled_bytes_total", "/pages/bytes_pulled"),
            ("belay_faults_total", "/pages/faults"),
            ("belay_postcopy_requests_total", "/pages/demand_reads"),
            ("belay_postcopy_latency_seconds_count", "/fault_latency/count"),
            ("belay_checkpoints_total", "/checkpoints/commits"),
            ("belay_checkpoint_pages_total", "/checkpoints/pages"),
            ("belay_checkpoint_pause_seconds_count", "/checkpoints/pause/count"),
            ("belay_output_sent_packets_total", "/output/sent_packets"),
        ];
        for (series, pointer) in grows {
            let value = sample(&body, series).unwrap_or_else(|| panic!("{series} in {body}"));
            let at = |status: &Value| status.pointer(pointer).and_then(Value::as_f64).unwrap_or(0.0);
            assert!(at(&before) <= value && value <= at(&after), "{series} {value}: {} to {}", at(&before), at(&after));
        }
        assert_eq!(sample(&body, "belay_pages"), Some(8192.0));
        assert_eq!(sample(&body, "belay_memory_bytes"), Some(f64::from(32 << 20)));
        assert_eq!(sample(&body, "belay_state{state=\"tethered\"}"), Some(1.0));
        let age = sample(&body, "belay_checkpoint_age_seconds").expect("known");
        assert!((0.0..5.0).contains(&age), "{age}");
        let (_, source) = scrape(here);
        assert_eq!(sample(&source, "belay_state{state=\"serving\"}"), Some(1.0), "{source}");
        assert!(sample(&source, "belay_checkpoint_folded_epoch") > Some(0.0), "{source}");
        assert!(sample(&source, "belay_lease_left_seconds") > Some(0.0), "{source}");
        for (id, body) in [("there", &body), ("here", &source)] {
            let migration = after["migration"].as_str().unwrap();
            let info = body.lines().find(|line| line.starts_with("belay_info{")).expect("it says who it is");
            assert!(info.contains(&format!("id=\"{id}\"")) && info.contains(migration), "{info}");
        }
        pair.end();
    }

    /// A migration over a link that is listened to, caught after its destination died, and all that both hosts said of it.
    struct Logged {
        link: Link,
        /// Host, and what it wrote to stderr: its log at the finest level.
        logs: Vec<(&'static str, String)>,
        /// Host, and the events that it wrote to stdout.
        events: Vec<(&'static str, String)>,
        /// By which both halves of the migration know each other, from the source's journal.
        secret: [u8; 32],
    }

    fn logged_run(place: &Place, receive: &[&str], send: &[&str]) -> Logged {
        let run = place.text("run");
        let log = ["--log", "trace", "--log-format", "json", "--json", "--drive", drive(), "--run-dir", &run];
        let state = place.text("destination");
        let args = ["receive", "--listen", "127.0.0.1:0", "--state-dir", &state, "--hold-pull-at", "30"];
        let mut destination = place.belay(&[&args[..], &log, receive].concat());
        let link = Link::to(destination.wait_for_event("listening")["address"].as_str().unwrap());
        let (to, state) = (link.address().to_owned(), place.text("source"));
        let args =
            ["send", "--to", &to, "--state-dir", &state, "--memory", "16M", "--run-before", "20ms", "--run-on", "50ms"];
        let mut source = place.belay(&[&args[..], &log, send].concat());
        let mut commits = 0;
        destination.wait_for("commits", |event| {
            commits += u64::from(event["event"] == "committed");
            commits > 3
        });
        let [migration] = &journal::list(std::path::Path::new(&state)).expect("a state directory")[..] else {
            panic!("one migration is under way")
        };
        let body = migration.body.as_ref().expect("read").as_ref().expect("written");
        let written: Written = protocol::decode(body).expect("this belay's");
        destination.crash();
        assert_eq!(source.end(), 10, "{}", source.story());
        let logs = vec![("source", source.complaints()), ("destination", destination.complaints())];
        let said = |process: &Process| process.seen.iter().map(Value::to_string).collect::<String>();
        let events = vec![("source", said(&source)), ("destination", said(&destination))];
        Logged { link, logs, events, secret: written.identity.secret.0 }
    }

    /// Every way in which a log could show these bytes, whole or their beginning or end alone.
    fn ways_to_show(secret: &[u8; 32]) -> Vec<String> {
        let shown = |bytes: &[u8]| {
            let joined =
                |each: &dyn Fn(&u8) -> String, with: &str| bytes.iter().map(each).collect::<Vec<_>>().join(with);
            let forms: [&dyn Fn(&u8) -> String; 6] = [
                &|byte| byte.to_string(),
                &|byte| format!("{byte:02x}"),
                &|byte| format!("{byte:02X}"),
                &|byte| format!("{byte:x}"),
                &|byte| format!("{byte:X}"),
                &|byte| format!("{byte:#04x}"),
            ];
            let mut ways = Vec::new();
            for form in forms {
                ways.extend(["", " ", ",", ", ", ":"].map(|with| joined(form, with)));
            }
            let escaped = bytes.escape_ascii().to_string();
            // In JSON a backslash is written twice.
            ways.extend([escaped.replace('\\', "\\\\"), escaped]);
            ways
        };
        [shown(&secret[..8]), shown(&secret[24..])].concat()
    }

    /// Panics if a host's log or events hold one of these secrets.
    fn expect_untold(run: &Logged, secrets: &[(&str, [u8; 32])]) {
        for (name, secret) in secrets {
            let ways = ways_to_show(secret);
            for told in [format!("{secret:?}"), format!("{secret:02x?}"), format!("{secret:X?}")] {
                assert!(ways.iter().any(|way| told.contains(way)), "{told} would not be found");
            }
            for (host, said) in run.logs.iter().chain(&run.events) {
                for way in &ways {
                    assert!(!said.contains(way), "{host} told the {name}: {way}");
                }
            }
        }
    }

    /// What keeps strangers out of a session in clear passes over the link, where it can be read.
    #[test]
    fn p9_no_secret_of_a_run_is_told_by_either_host_in_any_form() {
        const PREAMBLE: usize = 64;
        // Where a preamble says what its connection is for.
        let [control, lane, guard] = [1, 2, 3];
        let place = Place::new();
        let run = logged_run(&place, &[], &[]);
        let at = |bytes: &[u8], offset: usize| -> [u8; 32] { bytes[offset..offset + 32].try_into().expect("32 bytes") };
        let heard = run.link.heard();
        let of_kind = |kind: u8| heard.iter().filter(move |[to, _]| to.get(10) == Some(&kind));
        // Each lane shows the session's token behind its preamble.
        let tokens: Vec<_> = of_kind(lane).map(|[to, _]| at(to, PREAMBLE)).collect();
        assert!(tokens.len() >= 3 && tokens.iter().all(|token| *token == tokens[0]), "{} lanes", tokens.len());
        // The guard's connection has a proof in its preamble; over it came the sign of death.
        let [to_guard, from_guard] = of_kind(guard).next().expect("there is a guard");
        let sign = at(from_guard, 16);
        // Control told the source what that would be: sign, proof of death, order to fence.
        let [to_destination, from_destination] = of_kind(control).next().expect("there is control");
        let told = from_destination.windows(32).position(|bytes| bytes == sign).expect("the source knew the sign");
        assert!(to_destination.windows(32).any(|bytes| bytes == run.secret), "the destination knows the secret");
        let secrets = [
            ("secret of the migration", run.secret),
            ("session's token", tokens[0]),
            ("guard connection's proof", at(to_guard, 32)),
            ("guard's sign of death", sign),
            ("guard's proof of death", at(from_destination, told + 32)),
            ("order to fence", at(from_destination, told + 64)),
        ];
        expect_untold(&run, &secrets);
        place.expect_nothing_left();
    }

    #[test]
    fn p9_the_logs_of_both_hosts_are_one_story_and_hold_no_secret() {
        let place = Place::new();
        let keys = place.text("keys");
        let made = Command::new(BELAY).args(["keygen", "--out", &keys]).output().expect("belay runs");
        assert!(made.status.success(), "{made:?}");
        let file = |name: &str| format!("{keys}/{name}");
        let tls = |own: &str, peer: &str| {
            let [cert, key, peer] = [format!("{own}.crt"), format!("{own}.key"), format!("{peer}.crt")];
            ["--cert".to_owned(), file(&cert), "--key".to_owned(), file(&key), "--peer-cert".to_owned(), file(&peer)]
        };
        let (destination, source) = (tls("destination", "source"), tls("source", "destination"));
        fn words(all: &[String; 6]) -> Vec<&str> {
            all.iter().map(String::as_str).collect()
        }
        let run = logged_run(&place, &words(&destination), &words(&source));
        let logs = &run.logs;
        let mut ids = std::collections::HashMap::new();
        let mut joined = 0;
        for (host, log) in logs {
            for line in log.lines() {
                let line: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{host}: {error}: {line}"));
                if line["target"] == "belay::observation" {
                    ids.insert(
                        line["id"].as_str().expect("an id").to_owned(),
                        (*host, line["parent"].as_str().map(str::to_owned)),
                    );
                }
            }
        }
        for (host, parent) in ids.values() {
            if let Some((other, _)) = parent.as_ref().and_then(|parent| ids.get(parent)) {
                joined += u32::from(other != host);
            }
        }
        assert!(joined >= 2, "causes that lie on the other host: {joined} of {}", ids.len());
        // At the finest level, nothing of what keeps strangers out.
        let mut secrets: Vec<String> = ["source.key", "destination.key"]
            .iter()
            .flat_map(|name| {
                std::fs::read_to_string(file(name)).expect("made above").lines().map(str::to_owned).collect::<Vec<_>>()
            })
            .filter(|line| !line.starts_with("-----"))
            .collect();
        secrets.push("PRIVATE KEY".to_owned());
        for word in ["device_state", "secret", "token", "binding_key", "rkey"] {
            secrets.push(format!("\"{word}\""));
            secrets.push(format!("{word}:"));
        }
        assert!(secrets.len() > 5);
        for (host, log) in logs {
            assert!(log.lines().count() > 10 && log.lines().all(|line| line.len() < 16 << 10), "{host}: {log}");
            for secret in &secrets {
                assert!(!log.contains(secret), "{host} logged {secret}");
            }
        }
        expect_untold(&run, &[("secret of the migration", run.secret)]);
        place.expect_nothing_left();
    }

    #[test]
    fn a_filter_or_an_address_that_makes_no_sense_starts_nothing() {
        let place = Place::new();
        for bad in [
            ["--log", "belay=loud"],
            ["--log", "inof"],
            ["--log", "info,trase"],
            ["--metrics", "everywhere"],
            ["--name", "../x"],
        ] {
            let listen = ["receive", "--listen", "127.0.0.1:0", "--run-dir", &place.text("run")];
            let mut process = place.belay(&[&listen[..], &bad].concat());
            assert_eq!(process.end(), 2, "{bad:?}: {}", process.story());
        }
    }

    /// Fault latency with and without 33 scrapes a second: `cargo test --release --test operate -- --ignored --nocapture scrapes`.
    #[test]
    #[ignore = "a measurement, for a quiet machine"]
    fn scrapes_cost_the_faults_nothing_to_speak_of() {
        let mut medians = [Vec::new(), Vec::new()];
        for round in 0..10 {
            let scraped = round % 2 == 1;
            let mut pair = Pair::start("tcp", &["--hold-pull-at", "1", "--metrics", "0"], &["--release", "never"]);
            let there =
                pair.destination.seen.iter().find(|event| event["event"] == "metrics").expect("served")["address"]
                    .clone();
            pair.destination.wait_for_event("resumed");
            let end = Instant::now() + Duration::from_secs(3);
            while Instant::now() < end {
                if scraped {
                    scrape(there.as_str().unwrap());
                }
                std::thread::sleep(Duration::from_millis(30));
            }
            let latency = pair.status("there")["fault_latency"].clone();
            println!(
                "{}: {} faults, p50 {} ns, p99 {} ns",
                if scraped { "scraped" } else { "quiet" },
                latency["count"],
                latency["p50_ns"],
                latency["p99_ns"]
            );
            medians[usize::from(scraped)].push(latency["p50_ns"].as_u64().unwrap());
            pair.end();
        }
        let [quiet, scraped] = medians.map(|mut all| {
            all.sort_unstable();
            all[all.len() / 2]
        });
        println!("p50 quiet {quiet} ns, with 33 scrapes a second {scraped} ns: {:.2} x", scraped as f64 / quiet as f64);
        assert!(scraped < quiet * 3 / 2, "{scraped} against {quiet}");
    }
}
