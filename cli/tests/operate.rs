//! Seeing and operating real migrations: status of both sides, orders, metrics and logs, as an operator has them.

mod running;

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
        let guest = ["--memory", "32M", "--run-before", "50ms", "--check", "--name", "here"];
        let source =
            place.belay(&[&["send", "--to", &to, "--state-dir", &state], &guest[..], &common[..], send].concat());
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
        let here = pair.wait_status("here", "a source that serves", |status| status["state"] == "serving");
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
        assert_eq!(code, 7, "{complaint}");
        assert!(complaint.contains("`vm9`; none runs"), "{complaint}");
        let run = place.text("run");
        let mut first =
            place.belay(&["receive", "--json", "--listen", "127.0.0.1:0", "--run-dir", &run, "--name", "vm1"]);
        let mut second =
            place.belay(&["receive", "--json", "--listen", "127.0.0.1:0", "--run-dir", &run, "--name", "vm2"]);
        [&mut first, &mut second].map(|process| process.wait_for_event("listening"));
        for command in [&["status", "vm9"][..], &["release", "vm9"], &["promote", "vm9"]] {
            let (code, _, complaint) = told(&belay(&place, command));
            assert_eq!(code, 7, "{complaint}");
            assert!(complaint.contains("vm1, vm2"), "{complaint}");
        }
        let (code, _, complaint) = told(&belay(&place, &["catch", "vm"]));
        assert!(code == 7 && complaint.contains("may mean any of: vm1, vm2"), "{complaint}");
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
        process.signal(libc::SIGCONT);
        process.signal(libc::SIGTERM);
        assert_eq!(process.end(), 130);
    }
}
