//! `belay receive --record-trace` and `--record-faults`: what a guest that has moved wrote and sent, for `belay-bench policy --trace`, and which pages it
//! waited for, for `belay-bench replay`. And `belay observe --log`: what was seen of it from outside.

mod running;

use belay_checkpoint::guest::Packet;
use belay_checkpoint::policy::Adaptive;
use belay_checkpoint::policy::simulator::{Costs, simulate};
use belay_checkpoint::policy::trace::file as writes;
use belay_vmm_glue::migrate::faults::file as faults;
use belay_vmm_glue::witness::observer::ObserverClient;
use running::{Place, has_kvm};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::BufReader;
use std::time::Duration;

const MEMORY_PAGES: u64 = (32 << 20) / 4096;

/// What committed at a destination.
#[derive(Default)]
struct Committed {
    epochs: u64,
    pages: u64,
}

/// Moves a guest of 32 MiB, keeps it tethered until so much has committed, and has it taken back. The file that was recorded, and what committed.
fn record(
    place: &Place,
    receive: &[&str],
    send: &[&str],
    enough: impl Fn(&Committed) -> bool,
) -> (BufReader<File>, Committed) {
    let drive = if has_kvm() { "kvm" } else { "host-threads" };
    let (trace, state) = (place.text("recorded"), place.text("destination"));
    let common = ["receive", "--json", "--listen", "127.0.0.1:0", "--state-dir", &state, "--drive", drive];
    let mut destination = place.belay(&[&common[..], receive, &[&trace]].concat());
    let to = destination.wait_for_event("listening")["address"].as_str().unwrap().to_owned();
    let state = place.text("source");
    let common = ["send", "--json", "--to", &to, "--state-dir", &state, "--memory", "32M", "--drive", drive];
    let common = [&common[..], &["--run-before", "50ms", "--release", "never"]].concat();
    let mut source = place.belay(&[&common[..], send].concat());
    let mut committed = Committed::default();
    destination.wait_for("enough checkpoints", |event| {
        if event["event"] == "committed" {
            committed.epochs += 1;
            committed.pages += event["pages"].as_u64().unwrap();
        }
        enough(&committed)
    });
    // Asked to end, it gives the guest back.
    destination.signal(libc::SIGTERM);
    destination.end();
    source.wait_for_event("caught");
    source.signal(libc::SIGTERM);
    source.end();
    drop((source, destination));
    let file = File::open(&trace).expect("it was recorded");
    (BufReader::new(file), committed)
}

#[test]
fn what_a_tethered_guest_wrote_and_sent_is_recorded_and_a_policy_can_be_tried_on_it() {
    let place = Place::new();
    let fifty = |committed: &Committed| committed.epochs >= 50;
    let (file, committed) = record(&place, &["--record-trace"], &["--policy", "fixed:2ms"], fifty);
    let (commits, pages) = (committed.epochs, committed.pages);
    let trace = writes::read(file).expect("it is whole");
    place.expect_nothing_left();
    assert_eq!(u64::from(trace.pages), MEMORY_PAGES);
    assert!(trace.stretches.len() as u64 >= commits, "{} of {commits} checkpoints", trace.stretches.len());
    let written: u64 = trace.stretches.iter().map(|stretch| stretch.pages().count() as u64).sum();
    assert!(written >= pages && pages > 0, "{written} of {pages} pages");
    assert!(trace.stretches.iter().any(|stretch| stretch.outputs > 0), "the guest tells how far it is");
    let ran: Duration = trace.stretches.iter().map(|stretch| stretch.lasts).sum();
    assert!((Duration::from_millis(50)..Duration::from_secs(600)).contains(&ran), "{ran:?}");
    let costs = Costs {
        pause: Duration::from_micros(300),
        pause_a_page: Duration::from_nanos(500),
        commit: Duration::from_micros(150),
        link_bytes_per_s: 1_250_000_000,
        noise: 0.3,
        hiccup_in: 500,
        counts: true,
    };
    let outcome = simulate(&trace, &costs, &mut Adaptive::new(Duration::from_millis(50)), 1);
    let sent: u64 = trace.stretches.iter().map(|stretch| u64::from(stretch.outputs)).sum();
    assert_eq!(outcome.delays_us.len(), sent, "every packet it sent was held and let go");
    assert!(outcome.epochs > 0 && outcome.bytes > 0);
}

#[test]
fn the_faults_of_a_guest_that_has_moved_are_recorded_with_who_waited_and_how_long() {
    let place = Place::new();
    let enough = |committed: &Committed| committed.pages >= 200;
    let (file, _) = record(&place, &["--hold-pull-at", "0", "--record-faults"], &[], enough);
    let trace = faults::read(file).expect("it is whole");
    place.expect_nothing_left();
    let [region] = &trace.regions[..] else { panic!("{:?}", trace.regions) };
    assert_eq!((trace.shards, region.frames), (1, MEMORY_PAGES));
    let touched: BTreeSet<u64> = trace.faults.iter().map(|fault| fault.frame.0).collect();
    // Nothing came in the background: what the guest has used, it has waited for.
    assert!(touched.len() > 10, "{touched:?}");
    assert!(trace.faults.iter().all(|fault| fault.thread > 0), "the kernel says whose faults they are");
    let answered = trace.faults.iter().filter(|fault| fault.waited_ns.is_some_and(|waited| waited > 0)).count();
    assert!(answered + 8 >= trace.faults.len(), "{answered} of {} were answered", trace.faults.len());
    // Written again, it is the same trace.
    let mut text = Vec::new();
    let mut writer = faults::Writer::new(&mut text, trace.shards, &trace.regions).unwrap();
    trace.faults.iter().for_each(|fault| writer.write(fault).unwrap());
    assert_eq!(faults::read(&*text).expect("as it was"), trace);
}

#[test]
fn a_recording_that_cannot_be_written_is_said_before_any_guest_comes_and_none_is_overwritten() {
    let place = Place::new();
    let there = place.path("there");
    std::fs::write(&there, "mine").expect("writable");
    for option in ["--record-trace", "--record-faults"] {
        for path in [place.text("there"), place.text("no/such/folder")] {
            let mut receive = place.belay(&["receive", "--json", "--listen", "127.0.0.1:0", option, &path]);
            assert_eq!(receive.end(), 2, "{}", receive.story());
            let told = receive.events("failed").last().expect("it says why")["what"].to_string();
            assert!(told.contains(option) && told.contains(&path), "{told}");
        }
    }
    assert_eq!(std::fs::read_to_string(there).unwrap(), "mine");
    place.expect_nothing_left();
}

/// Runs an observer that writes down what it sees, lets it see one packet, and ends it: its exit code, what failed, what it ended with.
fn observe_one_packet(place: &Place, log: &str) -> (i32, Option<String>, String) {
    let listen = format!("unix:{}", place.text("observer.sock"));
    let mut observer = place.belay(&["observe", "--json", "--listen", &listen, "--log", log]);
    observer.wait_for_event("listening");
    let packet = Packet { sequence: 0, bytes: b"hello".to_vec() };
    ObserverClient::new(listen.parse().unwrap(), "guest").send(&packet).expect("it is acknowledged");
    observer.signal(libc::SIGTERM);
    let code = observer.end();
    let failed = observer.events("failed").last().map(|failed| failed["what"].as_str().unwrap().to_owned());
    let ended = observer.events("ended").last().unwrap()["outcome"].as_str().unwrap().to_owned();
    (code, failed, ended)
}

#[test]
fn an_observer_that_cannot_write_what_it_saw_says_which_file_and_keeps_its_verdict() {
    let place = Place::new();
    let log = place.text("packets");
    let (code, failed, verdict) = observe_one_packet(&place, &log);
    assert_eq!((code, failed), (0, None), "{verdict}");
    assert_eq!(running::packets(log.as_ref()).len(), 1);
    // Every write there fails, as on a full file system.
    let (code, failed, ended) = observe_one_packet(&place, "/dev/full");
    assert_eq!((code, &ended), (1, &verdict));
    assert!(failed.as_ref().unwrap().contains("cannot write 1 packets to /dev/full: No space left"), "{failed:?}");
    place.expect_nothing_left();
}

#[test]
fn an_observer_whose_log_cannot_be_made_says_so_before_it_listens() {
    let place = Place::new();
    let (listen, log) = (format!("unix:{}", place.text("observer.sock")), place.text("nowhere/packets"));
    let mut observer = place.belay(&["observe", "--json", "--listen", &listen, "--log", &log]);
    assert_eq!(observer.end(), 2, "{}", observer.story());
    let failed = observer.events("failed").last().unwrap()["what"].as_str().unwrap().to_owned();
    assert!(failed.contains(&log) && failed.contains("No such file"), "{failed}");
    assert!(observer.events("listening").next().is_none(), "{}", observer.story());
    place.expect_nothing_left();
}
