//! `checkpoint`, `catch`, `scale` and `replay` as they are run: each measures, checks what it measured, and says so in its report.

use belay_transport::uffd::{Features, OpenMode, Uffd};
use belay_transport::{FrameIndex, PageSize, RegionId};
use belay_vmm_glue::migrate::faults::{Fault, Region, file};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

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

/// Children of a process: their numbers, and the letter of their state (proc_pid_stat(5)).
fn children(parent: u32) -> Vec<(i32, char)> {
    let all = std::fs::read_dir("/proc").expect("/proc").flatten();
    let stat = all.filter_map(|entry| std::fs::read_to_string(entry.path().join("stat")).ok());
    let child = stat.filter_map(|stat| {
        let (number, rest) = (stat.split(' ').next()?.parse().ok()?, stat.rsplit_once(") ")?.1);
        let mut rest = rest.split(' ');
        let (state, of) = (rest.next()?.chars().next()?, rest.next()?);
        (of == parent.to_string()).then_some((number, state))
    });
    child.collect()
}

/// Starts `catch` by these words, ends it with these signals while its destination is frozen, and looks at what is left.
fn end_from_outside(by: &[&str], signals: &[Signal], code: i32) {
    let place = tempfile::tempdir().expect("a folder");
    let mut bench = Command::new(by[0])
        .args(&by[1..])
        .args(["catch", "--pages", "100", "--epochs", "1", "--rounds", "1", "--tethered", "100ms", "--fabric", "local"])
        .args(["--loss", "freeze", "--trials", "1000"])
        .env("TMPDIR", place.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("it starts");
    let deadline = Instant::now() + Duration::from_secs(60);
    let there = loop {
        let there = children(bench.id());
        if there.len() >= 2 && there.iter().any(|(_, state)| *state == 'T') {
            break there;
        }
        let ended = bench.try_wait().expect("it is ours");
        assert!(ended.is_none() && Instant::now() < deadline, "{ended:?}, nobody is frozen: {there:?}");
        std::thread::yield_now();
    };
    assert!(std::fs::read_dir(place.path()).expect("a folder").count() > 0);
    for &signal in signals {
        kill_process(Pid::from_child(&bench), signal).expect("it runs");
    }
    let deadline = Instant::now() + Duration::from_secs(30);
    let ended = loop {
        match bench.try_wait().expect("it is ours") {
            Some(ended) => break ended,
            None if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
            None => {
                let _ = bench.kill();
                panic!("{signals:?} did not end it");
            }
        }
    };
    assert_eq!(ended.code(), Some(code), "{ended}");
    let left: Vec<_> = std::fs::read_dir(place.path()).expect("a folder").flatten().collect();
    assert!(left.is_empty(), "{left:?}");
    for (number, _) in there {
        let stat = std::fs::read_to_string(format!("/proc/{number}/stat")).unwrap_or_default();
        // Whoever takes orphans in may not have waited for it yet.
        let is_gone = stat.rsplit_once(") ").is_none_or(|(_, state)| state.starts_with('Z'));
        assert!(is_gone, "{stat}");
    }
}

#[test]
fn a_suite_that_is_ended_from_outside_takes_its_processes_and_its_files_along_even_a_frozen_one() {
    if !kvm() || !belay() {
        return;
    }
    std::thread::scope(|scope| {
        // Not SIGINT: whoever runs the tests in the background of a script has it ignored, and so it stays.
        scope.spawn(|| end_from_outside(&[BENCH], &[Signal::TERM], 143));
        // A terminal that closes is none of its business then.
        scope.spawn(|| end_from_outside(&["nohup", BENCH], &[Signal::HUP, Signal::TERM], 143));
    });
}

/// Two threads of a guest of 4 MiB, a quarter of it zero, that touch a page every 100 us or so.
fn small_trace() -> Vec<u8> {
    let zero = vec![(256, 256)];
    let region = Region { id: RegionId(0), page_size: PageSize::Small, frames: 1024, zero };
    let mut text = Vec::new();
    let mut writer = file::Writer::new(&mut text, 1, &[region]).expect("memory takes it");
    for at in 0..200_u64 {
        let (ns, thread, frame) = (at * 50_000, 10 + (at % 2) as u32, FrameIndex(at * 37 % 1024));
        let (region, waited_ns, write) = (RegionId(0), Some(20_000), at % 3 == 0);
        writer.write(&Fault { ns, waited_ns, shard: 0, thread, region, frame, write }).expect("memory takes it");
    }
    text
}

#[test]
fn recorded_faults_are_met_again_under_each_way_of_prefetching_beside_the_floor() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("small.faults");
    std::fs::write(&path, small_trace()).expect("written");
    let trace = path.display().to_string();
    let words = ["replay", &trace, "--quick", "--policy", "default;demand;bubble=0,window=2", "--shards", "2"];
    if Uffd::open(OpenMode::All, Features::MINOR_SHMEM).is_err() {
        println!("skipped: no userfaultfd that holds the kernel's own faults");
        return;
    }
    let Some(report) = report(&words) else { return };
    for policy in ["default", "demand", "bubble=0,window=2"] {
        let cases = cases(&report, policy);
        assert_eq!(cases.iter().map(|case| parameter(case, "fabric")).collect::<Vec<_>>(), ["local", "tcp"]);
        for case in cases {
            assert_eq!(parameter(case, "trace"), "small.faults");
            assert_eq!(measure(case, "stalled, all threads").len(), 2, "{case}");
            let (waits, needless) =
                (measure(case, "touches that waited"), measure(case, "pages pulled needlessly before the last touch"));
            assert!(waits.iter().all(|waits| *waits <= 200.0), "{case}");
            match policy {
                // Nothing comes by itself: each page is waited for, and none is for nothing.
                "demand" => assert!(waits[0] >= 190.0 && needless == [0.0, 0.0], "{case}"),
                // 768 pages have content, and 200 are touched, some of them zero.
                _ => assert!(needless.iter().all(|pages| *pages < 768.0), "{case}"),
            }
            let all = case["measures"].to_string().contains("until everything had come");
            assert_eq!(all, policy != "demand", "{case}");
        }
    }
}

#[test]
fn a_damaged_trace_of_faults_is_refused_by_its_line_before_anything_is_replayed() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("cut.faults");
    let text = small_trace();
    for (bytes, why) in [
        (&text[..text.len() - 5], "line 201: it ends in the middle; the recording was cut off"),
        (&text[..0], "it has no fault in it"),
        (&b"{\"belay-trace\":1,\"pages\":64}\n"[..], "line 1: unknown field `belay-trace`"),
    ] {
        std::fs::write(&path, bytes).expect("written");
        let output = Command::new(BENCH).arg("replay").arg(&path).output().expect("belay-bench starts");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("cut.faults") && said.contains(why), "{said}");
    }
}
