//! Hosts that lack something, judged on one that may not.

use super::facts::{KvmFacts, NoKvm, UffdFacts};
use super::rdma::tests::good as good_rdma;
use super::*;
use belay_transport::uffd::Features;
use std::borrow::Cow;

fn all_features() -> Features {
    Features(0x1ffff)
}

fn good() -> Facts {
    Facts {
        kernel: "6.12.0".into(),
        kvm: Ok(KvmFacts { api_version: 12, user_memory: true, dirty_ring_bytes: 1 << 20, manual_dirty_log: true }),
        uffd: UffdFacts { all_faults: Ok(()), features: Some(all_features()), device_exists: true },
        uffd_wp_tracker: Ok(()),
        free_huge_pages: Some(64),
        available_bytes: Some(8 << 30),
        shm_free_bytes: Some(4 << 30),
        cores: 4,
        open_files: Some(1 << 20),
        rdma: good_rdma(),
    }
}

/// What the one thing that differs from a good host is called, how it stands and what mends it.
fn odd(facts: &Facts) -> (&'static str, Verdict, Vec<String>) {
    let mut odd: Vec<Finding> = judge(facts).into_iter().filter(|finding| finding.verdict != Verdict::Ok).collect();
    assert_eq!(odd.len(), 1, "{odd:?}");
    let finding = odd.remove(0);
    (name(&finding), finding.verdict, finding.mend)
}

/// The names of a host's findings are all in the code.
pub fn name(finding: &Finding) -> &'static str {
    match finding.name {
        Cow::Borrowed(name) => name,
        Cow::Owned(ref name) => panic!("{name} was made up"),
    }
}

#[test]
fn a_good_host_lacks_nothing() {
    let findings = judge(&good());
    assert!(findings.iter().all(|finding| finding.verdict == Verdict::Ok), "{findings:?}");
    let rdma = findings.iter().filter(|finding| finding.name.starts_with("rdma")).count();
    assert_eq!((findings.len() - rdma, rdma), (13, 7));
}

#[test]
fn each_missing_thing_is_named_with_the_command_that_mends_it() {
    let lacking = |change: fn(&mut Facts)| {
        let mut facts = good();
        change(&mut facts);
        facts
    };
    let no_kvm = |why: NoKvm| {
        let mut facts = good();
        facts.kvm = Err(why);
        odd(&facts)
    };
    assert_eq!(
        no_kvm(NoKvm::NoDevice),
        ("kvm", Verdict::Missing, vec!["sudo modprobe kvm_intel".into(), "sudo modprobe kvm_amd".into()])
    );
    assert_eq!(no_kvm(NoKvm::NoPermission).2, ["sudo usermod -aG kvm $USER   # then log in again"]);

    let unprivileged = lacking(|facts| facts.uffd.all_faults = Err("no permission".into()));
    let (name, verdict, mend) = odd(&unprivileged);
    assert_eq!((name, verdict), ("userfaultfd", Verdict::Missing));
    assert!(
        mend.iter().any(|mend| mend.contains("/dev/userfaultfd")) && mend.iter().any(|mend| mend.contains("sysctl"))
    );
    let no_device = lacking(|facts| {
        facts.uffd.all_faults = Err("no permission".into());
        facts.uffd.device_exists = false;
    });
    assert_eq!(odd(&no_device).2, ["sudo sysctl vm.unprivileged_userfaultfd=1"]);

    let no_huge = odd(&lacking(|facts| facts.free_huge_pages = Some(0)));
    assert_eq!((no_huge.0, no_huge.1), ("huge pages", Verdict::Degraded));
    assert!(no_huge.2[0].contains("vm.nr_hugepages"));
    let memlock = odd(&lacking(|facts| facts.rdma.memory.limit = Some(8 << 20)));
    assert!(memlock.0 == "memlock" && memlock.2[0] == "ulimit -l unlimited");
    assert_eq!(odd(&lacking(|facts| facts.shm_free_bytes = Some(1 << 20))).0, "tmpfs");
    assert_eq!(odd(&lacking(|facts| facts.shm_free_bytes = None)).0, "tmpfs");
    assert_eq!(odd(&lacking(|facts| facts.available_bytes = Some(1 << 20))).0, "memory");
    assert_eq!(odd(&lacking(|facts| facts.cores = 1)).0, "cores");
    assert_eq!(odd(&lacking(|facts| facts.open_files = Some(127))).0, "open files");
    assert!(judge(&lacking(|facts| facts.open_files = None)).iter().all(|finding| finding.verdict == Verdict::Ok));
    assert_eq!(odd(&lacking(|facts| facts.rdma.devices.clear())).0, "rdma device");
}

#[test]
fn an_old_kernel_is_told_which_one_is_new_enough() {
    let mut facts = good();
    facts.kernel = "6.1.0".into();
    facts.uffd.features = Some(Features(0x1fff));
    facts.uffd_wp_tracker = Err("lacks it".into());
    let findings = judge(&facts);
    let finding = findings.iter().find(|finding| finding.name == "tracker uffd-wp").expect("judged");
    assert_eq!(finding.verdict, Verdict::Degraded);
    assert!(
        finding.detail.contains("6.1.0") && finding.detail.contains("WP_ASYNC") && finding.detail.contains("6.7"),
        "{finding:?}"
    );

    let finding = findings.iter().find(|finding| finding.name == "tracker uffd-sync").expect("judged");
    assert_eq!(finding.verdict, Verdict::Degraded);
    assert!(finding.detail.contains("WP_UNPOPULATED") && finding.detail.contains("6.4"), "{finding:?}");

    facts.uffd.features = Some(Features::NONE);
    let findings = judge(&facts);
    let finding = findings.iter().find(|finding| finding.name == "post-copy faults").expect("judged");
    assert!(finding.verdict == Verdict::Missing && finding.detail.contains("MINOR_SHMEM"), "{finding:?}");
}

#[test]
fn the_table_and_the_json_say_the_same() {
    let mut facts = good();
    facts.kvm = Err(NoKvm::NoDevice);
    let findings = judge(&facts);
    let (mut table, mut json) = (vec![], vec![]);
    print_table(&mut table, &findings, &OF_A_HOST).expect("table");
    print_json(&mut json, &findings).expect("json");
    let (table, json) = (String::from_utf8(table).expect("utf-8"), String::from_utf8(json).expect("utf-8"));
    let parsed: serde_json::Value = serde_json::from_str(&json).expect("one JSON object");
    assert_eq!(parsed["missing"], 1);
    for finding in parsed["findings"].as_array().expect("findings") {
        assert!(table.contains(finding["name"].as_str().expect("name")));
        assert!(table.contains(finding["detail"].as_str().expect("detail")));
    }
    assert!(table.contains("MISSING") && table.contains("mend: sudo modprobe kvm_intel"), "{table}");
}

#[test]
fn what_a_qemu_calls_its_parts_neither_steers_a_terminal_nor_makes_a_line_of_the_table() {
    let name = format!("RAM \u{1b}[2J{}", "m".repeat(10_000));
    let finding = Finding {
        name: name.into(),
        verdict: Verdict::Missing,
        detail: "process 7, \u{1b}]0;title\u{7}\nok        all".to_owned(),
        mend: vec!["mem-path=/dev/shm\r\n".to_owned()],
    };
    let mut table = vec![];
    print_table(&mut table, &[finding], &OF_A_HOST).expect("table");
    let table = String::from_utf8(table).expect("utf-8");
    assert!(table.lines().count() == 4 && table.len() < 2000, "{table:?}");
    assert!(table.chars().all(|c| c == '\n' || !c.is_control()), "{table:?}");
}

#[test]
fn this_host_can_be_looked_at() {
    let facts = Facts::of_this_host();
    let findings = judge(&facts);
    let mut table = vec![];
    print_table(&mut table, &findings, &OF_A_HOST).expect("table");
    eprintln!("{}", String::from_utf8_lossy(&table));
    assert!(facts.cores >= 1 && facts.available_bytes.is_some() && facts.kernel != "unknown");
    assert_eq!(facts.kvm == Err(NoKvm::NoDevice), !std::path::Path::new("/dev/kvm").exists());
    for finding in findings.iter().filter(|finding| finding.verdict == Verdict::Ok) {
        assert!(finding.mend.is_empty(), "nothing to mend: {finding:?}");
    }
}
