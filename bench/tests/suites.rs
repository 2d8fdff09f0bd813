//! `checkpoint`, `catch` and `scale` as they are run: each measures, checks what it measured, and says so in its report.

use serde_json::Value;
use std::path::Path;
use std::process::Command;

const BENCH: &str = env!("CARGO_BIN_EXE_belay-bench");
/// What a machine that is too busy to measure on makes a suite say. It is right to; nothing is wrong with the suite then.
const BUSY: [&str; 2] = ["nothing can be said", "taken for dead before it was lost"];

/// The report of a suite that was run with these words; none where this machine cannot run it.
fn report(words: &[&str]) -> Option<Value> {
    let folder = tempfile::tempdir().expect("a folder");
    let json = folder.path().join("report.json");
    let output = Command::new(BENCH).args(words).arg("--out-json").arg(&json).output().expect("belay-bench starts");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if BUSY.iter().any(|busy| said.contains(busy)) {
        println!("skipped: {}", said.trim());
        return None;
    }
    assert!(output.status.success(), "{said}");
    let text = std::fs::read_to_string(json).expect("the report was written");
    Some(serde_json::from_str(&text).expect("JSON"))
}

fn kvm() -> bool {
    use belay_transport::uffd::{Features, OpenMode, Uffd};
    let there = Path::new("/dev/kvm").exists() && Uffd::open(OpenMode::All, Features::MINOR_SHMEM).is_ok();
    if !there {
        println!("skipped: no /dev/kvm, or no userfaultfd that holds KVM's faults");
    }
    there
}

/// The `belay` built beside the bench.
fn belay() -> bool {
    let there = Path::new(BENCH).with_file_name("belay").is_file();
    if !there {
        println!("skipped: belay is not built beside belay-bench");
    }
    there
}

fn cases<'a>(report: &'a Value, name: &str) -> Vec<&'a Value> {
    let cases = report["cases"].as_array().expect("a list of cases");
    cases.iter().filter(|case| case["name"] == name).collect()
}

fn parameter<'a>(case: &'a Value, name: &str) -> &'a str {
    let all = case["parameters"].as_array().expect("a list of parameters");
    all.iter().find(|pair| pair[0] == name).and_then(|pair| pair[1].as_str()).expect(name)
}

/// Every round of a measure.
fn measure(case: &Value, name: &str) -> Vec<f64> {
    let all = case["measures"].as_array().expect("a list of measures");
    let found = all.iter().find(|measure| measure["name"] == name).expect(name);
    found["rounds"].as_array().expect("rounds").iter().map(|value| value.as_f64().expect("a number")).collect()
}

#[test]
fn a_checkpoint_is_measured_with_every_tracker_and_what_does_not_fit_the_guest_is_said() {
    if !kvm() {
        return;
    }
    let words = ["checkpoint", "--pages", "200,100000", "--memory", "64M", "--rounds", "1"];
    let Some(report) = report(&words) else { return };
    let cases = cases(&report, "checkpoint");
    let trackers: Vec<&str> = cases.iter().map(|case| parameter(case, "tracker")).collect();
    assert_eq!(trackers, ["kvm-ring", "kvm-log", "uffd-wp", "uffd-sync"]);
    for case in cases {
        assert!(measure(case, "dirty pages sent")[0] >= 180.0, "{case}");
        assert!(measure(case, "pause, guest's clock")[0] > 0.0, "{case}");
    }
    let notes = report["notes"].to_string();
    assert_eq!(notes.matches("left out: ").count(), 4, "{notes}");
}

#[test]
fn a_catch_is_measured_step_by_step_of_a_ring_and_of_a_destination_that_is_killed_or_frozen() {
    if !kvm() || !belay() {
        return;
    }
    let words = ["catch", "--pages", "500", "--epochs", "1,5", "--rounds", "1", "--trials", "1", "--tethered", "200ms"];
    let Some(report) = report(&words) else { return };
    let rings = cases(&report, "catch with pages in the ring");
    assert_eq!(rings.len(), 2);
    for case in rings {
        assert!(measure(case, "pages folded")[0] >= 450.0, "{case}");
        assert!(measure(case, "noticed to running")[0] >= measure(case, "folded")[0], "{case}");
    }
    let lost = cases(&report, "belay loses its destination");
    assert_eq!(lost.iter().map(|case| parameter(case, "loss")).collect::<Vec<_>>(), ["kill", "freeze"]);
    for case in lost {
        assert!(measure(case, "pages checkpointed before")[0] > 0.0, "{case}");
        // The world waits for as long as it takes to notice, at least.
        assert!(measure(case, "last output to next output")[0] > 0.0, "{case}");
    }
}

#[test]
fn guests_that_move_at_once_are_each_whole_and_so_is_every_page_that_threads_ask_for_at_once() {
    if !kvm() || !belay() {
        return;
    }
    let guests = ["scale", "--guests", "2", "--fabric", "local", "--memory", "32M", "--rounds", "1"];
    let Some(report) = report(&[&guests[..], &["--threads", "8", "--shards", "2", "--quick"]].concat()) else { return };
    let [guests] = cases(&report, "guests that move at once")[..] else { panic!("one case: {report}") };
    let fairness = measure(guests, "fairness of the pull (Jain)")[0];
    assert!((0.5..=1.0).contains(&fairness), "{fairness}");
    assert!(measure(guests, "memory beside RAM a guest, destination")[0] > 1.0);
    let [engine] = cases(&report, "the engine alone")[..] else { panic!("one case: {report}") };
    assert!(measure(engine, "faults served")[0] > 0.0);
}
