//! `belay receive --record-faults`: which pages a guest that has moved waited for, for `belay-bench replay`.

mod running;

use belay_vmm_glue::migrate::faults::file;
use running::{Place, has_kvm};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::BufReader;

const MEMORY_PAGES: u64 = (32 << 20) / 4096;
/// The guest has touched so many pages before it is taken back.
const ENOUGH: u64 = 200;

#[test]
fn the_faults_of_a_guest_that_has_moved_are_recorded_with_who_waited_and_how_long() {
    let place = Place::new();
    let drive = if has_kvm() { "kvm" } else { "host-threads" };
    let (trace, state) = (place.text("guest.faults"), place.text("destination"));
    let receive = ["receive", "--json", "--listen", "127.0.0.1:0", "--state-dir", &state, "--drive", drive];
    let record = ["--record-faults", &trace, "--hold-pull-at", "0"];
    let mut destination = place.belay(&[&receive[..], &record].concat());
    let to = destination.wait_for_event("listening")["address"].as_str().unwrap().to_owned();
    let state = place.text("source");
    let send = ["send", "--json", "--to", &to, "--state-dir", &state, "--memory", "32M", "--drive", drive];
    let mut source = place.belay(&[&send[..], &["--run-before", "50ms", "--release", "never"]].concat());
    let mut pages = 0;
    destination.wait_for("checkpoints of what it has touched", |event| {
        if event["event"] == "committed" {
            pages += event["pages"].as_u64().unwrap();
        }
        pages >= ENOUGH
    });
    // Asked to end, it gives the guest back.
    destination.signal(libc::SIGTERM);
    destination.end();
    source.wait_for_event("caught");
    source.signal(libc::SIGTERM);
    source.end();
    drop((source, destination));

    let trace = file::read(BufReader::new(File::open(trace).expect("it was recorded"))).expect("it is whole");
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
    let mut writer = file::Writer::new(&mut text, trace.shards, &trace.regions).unwrap();
    trace.faults.iter().for_each(|fault| writer.write(fault).unwrap());
    assert_eq!(file::read(&*text).expect("as it was"), trace);
}

#[test]
fn a_trace_of_faults_that_cannot_be_written_is_said_before_any_guest_comes_and_none_is_overwritten() {
    let place = Place::new();
    let there = place.path("there");
    std::fs::write(&there, "mine").expect("writable");
    for path in [place.text("there"), place.text("no/such/folder")] {
        let mut receive = place.belay(&["receive", "--json", "--listen", "127.0.0.1:0", "--record-faults", &path]);
        assert_eq!(receive.end(), 2, "{}", receive.story());
        let told = receive.events("failed").last().expect("it says why")["what"].to_string();
        assert!(told.contains("--record-faults") && told.contains(&path), "{told}");
    }
    assert_eq!(std::fs::read_to_string(there).unwrap(), "mine");
    place.expect_nothing_left();
}
