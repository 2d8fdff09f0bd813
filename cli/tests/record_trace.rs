//! `belay receive --record-trace`: what a tethered guest wrote and sent, for `belay-bench policy --trace`.

mod running;

use belay_checkpoint::policy::Adaptive;
use belay_checkpoint::policy::simulator::{Costs, simulate};
use belay_checkpoint::policy::trace::file;
use running::{Place, has_kvm};
use std::fs::File;
use std::io::BufReader;
use std::time::Duration;

const MEMORY_PAGES: u32 = (32 << 20) / 4096;

#[test]
fn what_a_tethered_guest_wrote_and_sent_is_recorded_and_a_policy_can_be_tried_on_it() {
    let place = Place::new();
    let drive = if has_kvm() { "kvm" } else { "host-threads" };
    let (trace, state) = (place.text("guest.trace"), place.text("destination"));
    let receive = ["receive", "--json", "--listen", "127.0.0.1:0", "--state-dir", &state, "--drive", drive];
    let mut destination = place.belay(&[&receive[..], &["--record-trace", &trace]].concat());
    let to = destination.wait_for_event("listening")["address"].as_str().unwrap().to_owned();
    let state = place.text("source");
    let send = ["send", "--json", "--to", &to, "--state-dir", &state, "--memory", "32M", "--drive", drive];
    let tether = ["--run-before", "50ms", "--policy", "fixed:2ms", "--release", "never"];
    let mut source = place.belay(&[&send[..], &tether].concat());
    let (mut commits, mut pages) = (0_u64, 0_u64);
    destination.wait_for("fifty checkpoints", |event| {
        if event["event"] == "committed" {
            commits += 1;
            pages += event["pages"].as_u64().unwrap();
        }
        commits >= 50
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
    assert_eq!(trace.pages, MEMORY_PAGES);
    assert!(trace.slots.len() as u64 >= commits, "{} of {commits} checkpoints", trace.slots.len());
    let written: u64 = trace.slots.iter().map(|slot| slot.pages.len() as u64).sum();
    assert!(written >= pages && pages > 0, "{written} of {pages} pages");
    assert!(trace.slots.iter().any(|slot| slot.outputs > 0), "the guest tells how far it is");
    let ran: Duration = trace.slots.iter().map(|slot| slot.lasts).sum();
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
    let sent: u64 = trace.slots.iter().map(|slot| u64::from(slot.outputs)).sum();
    assert_eq!(outcome.delays_us.len(), sent, "every packet it sent was held and let go");
    assert!(outcome.epochs > 0 && outcome.bytes > 0);
}

#[test]
fn a_trace_that_cannot_be_written_is_said_before_any_guest_comes_and_none_is_overwritten() {
    let place = Place::new();
    let there = place.path("there");
    std::fs::write(&there, "mine").expect("writable");
    for path in [place.text("there"), place.text("no/such/folder")] {
        let mut receive = place.belay(&["receive", "--json", "--listen", "127.0.0.1:0", "--record-trace", &path]);
        assert_eq!(receive.end(), 2, "{}", receive.story());
        let told = receive.events("failed").last().expect("it says why")["what"].to_string();
        assert!(told.contains(&path), "{told}");
    }
    assert_eq!(std::fs::read_to_string(there).unwrap(), "mine");
    place.expect_nothing_left();
}
