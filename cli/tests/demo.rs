//! The demo as CI runs it: both fabrics, every tracker, the VMM in the page server's process and apart from it, two seeds each.
//! A failure prints the command that replays it.

use std::process::{Command, Output};

#[path = "../../transport/src/testing.rs"]
mod huge_pages;

const BELAY: &str = env!("CARGO_BIN_EXE_belay");

fn has_kvm() -> bool {
    std::fs::File::options().read(true).write(true).open("/dev/kvm").is_ok()
}

fn has_userfaultfd() -> bool {
    std::fs::File::options().read(true).write(true).open("/dev/userfaultfd").is_ok()
}

/// Runs the demo and gives its report object.
fn demo(arguments: &[&str]) -> serde_json::Value {
    let arguments: Vec<_> =
        ["demo", "--json", "--deadline", "60s", "--run-on", "100ms"].iter().chain(arguments).collect();
    let Output { status, stdout, stderr } = Command::new(BELAY).args(&arguments).output().expect("belay starts");
    let replay = format!("belay {}", arguments.iter().map(|word| word.to_string()).collect::<Vec<_>>().join(" "));
    let text = String::from_utf8_lossy(&stdout);
    let told =
        text.lines().filter(|line| !line.contains(r#""event":"pull""#) && !line.contains(r#""event":"committed""#));
    let told = told.collect::<Vec<_>>().join("\n");
    assert!(status.success(), "{status}; replay with: {replay}\n{}\n{told}", String::from_utf8_lossy(&stderr));
    let report = text.lines().last().expect("a report is the last line");
    serde_json::from_str(report).expect("the report is JSON")
}

/// Two seeds of one way to run the demo over KVM.
fn caught(name: &str, seeds: [u64; 2], arguments: &[&str]) {
    if !has_kvm() {
        eprintln!("skipped: {name} needs /dev/kvm");
        return;
    }
    for seed in seeds {
        let seed = seed.to_string();
        let report = demo(&[&["--memory", "64M", "--drive", "kvm", "--seed", &seed], arguments].concat());
        assert_eq!(report["passed"], true, "{report}");
        assert_eq!(report["driven_by"], "KVM");
        assert!(report["kill_to_running_us"].as_u64().is_some(), "{report}");
    }
}

macro_rules! demo_kvm {
    ($($name:ident: $seeds:expr, $($argument:literal)+;)+) => { $(
        #[test]
        fn $name() {
            caught(stringify!($name), $seeds, &[$($argument),+]);
        }
    )+ };
}

demo_kvm! {
    demo_kvm_local_log_in_process: [1, 2], "--fabric" "local" "--tracker" "kvm-log" "--vmm" "in-process";
    demo_kvm_local_log_apart: [3, 4], "--fabric" "local" "--tracker" "kvm-log" "--vmm" "apart";
    demo_kvm_local_ring_in_process: [5, 6], "--fabric" "local" "--tracker" "kvm-ring" "--vmm" "in-process";
    demo_kvm_local_ring_apart: [7, 8], "--fabric" "local" "--tracker" "kvm-ring" "--vmm" "apart";
    demo_kvm_local_wp_in_process: [9, 10], "--fabric" "local" "--tracker" "uffd-wp" "--vmm" "in-process";
    demo_kvm_local_wp_apart: [11, 12], "--fabric" "local" "--tracker" "uffd-wp" "--vmm" "apart";
    demo_kvm_tcp_log_in_process: [13, 14], "--fabric" "tcp" "--tracker" "kvm-log" "--vmm" "in-process";
    demo_kvm_tcp_log_apart: [15, 16], "--fabric" "tcp" "--tracker" "kvm-log" "--vmm" "apart";
    demo_kvm_tcp_ring_in_process: [17, 18], "--fabric" "tcp" "--tls" "--tracker" "kvm-ring" "--vmm" "in-process";
    demo_kvm_tcp_ring_apart: [19, 20], "--fabric" "tcp" "--tracker" "kvm-ring" "--vmm" "apart";
    demo_kvm_tcp_wp_in_process: [21, 22], "--fabric" "tcp" "--tracker" "uffd-wp" "--vmm" "in-process";
    demo_kvm_tcp_wp_apart: [23, 24], "--fabric" "tcp" "--tls" "--tracker" "uffd-wp" "--vmm" "apart";
    demo_kvm_local_sync_in_process: [33, 34],
        "--fabric" "local" "--tracker" "uffd-sync" "--vmm" "in-process" "--vcpus" "2" "--shards" "2";
    demo_kvm_local_sync_copied_on_write: [37, 38],
        "--fabric" "local" "--tracker" "uffd-sync" "--staging" "cow" "--vmm" "in-process" "--vcpus" "2" "--shards" "2"
        "--dirty-rate" "100k";
    demo_kvm_tcp_sync_copied_on_write_apart: [39, 40],
        "--fabric" "tcp" "--tracker" "uffd-sync" "--staging" "cow" "--vmm" "apart" "--ring" "1M" "--dirty-rate" "200k";
    demo_kvm_tcp_sync_apart: [35, 36], "--fabric" "tcp" "--tracker" "uffd-sync" "--vmm" "apart" "--dirty-rate" "100k";
    demo_kvm_two_vcpus_two_shards: [25, 26], "--vcpus" "2" "--shards" "2" "--kill-at" "70";
    demo_kvm_scanner: [27, 28], "--guest" "scanner" "--dirty-rate" "100k";
    demo_kvm_lease_at_the_operators_word: [29, 30], "--output" "lease";
    demo_kvm_budget_policy_and_epochs_larger_than_the_ring: [31, 32],
        "--policy" "dirty:512,max=20ms" "--dirty-rate" "200k" "--ring" "1M";
}

#[test]
fn demo_kvm_goes_to_release_when_nobody_is_killed() {
    if !has_kvm() {
        eprintln!("skipped: it needs /dev/kvm");
        return;
    }
    for fabric in ["local", "tcp"] {
        let to_release = ["--memory", "64M", "--drive", "kvm", "--kill-at", "never", "--fabric", fabric];
        let report = demo(&to_release);
        assert_eq!(report["passed"], true, "{report}");
        assert!(report["total_us"].as_u64().is_some(), "{report}");
        // Write protection that somebody has to lift is gone when nobody is there any more to do it.
        let report = demo(&[&to_release[..], &["--tracker", "uffd-sync"]].concat());
        assert_eq!(report["passed"], true, "{report}");
        let report = demo(&[&to_release[..], &["--policy", "none"]].concat());
        assert_eq!((report["passed"].as_bool(), report["commits"].as_u64()), (Some(true), Some(0)), "{report}");
    }
}

#[test]
fn demo_on_host_threads_where_there_is_no_kvm() {
    if !has_userfaultfd() {
        eprintln!("skipped: it needs a userfaultfd");
        return;
    }
    for tracker in ["uffd-wp", "uffd-sync"] {
        let report = demo(&["--memory", "32M", "--drive", "threads", "--tracker", tracker]);
        assert_eq!(report["passed"], true, "{report}");
        assert!(report["driven_by"].as_str().is_some_and(|by| by.contains("threads")), "{report}");
    }
}

#[test]
fn demo_kvm_huge_pages() {
    if !has_kvm() {
        eprintln!("skipped: it needs /dev/kvm");
        return;
    }
    // Two copies of 32 MiB, and what the kernel keeps for itself.
    let Some(_reserved) = huge_pages::HugePages::reserve(40) else { return };
    for tracker in ["kvm-ring", "kvm-log", "uffd-wp", "uffd-sync"] {
        let report = demo(&["--memory", "32M", "--page-size", "2M", "--drive", "kvm", "--tracker", tracker]);
        assert_eq!(report["passed"], true, "{report}");
    }
}
