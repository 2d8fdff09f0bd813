//! What the facts of a host mean for belay, and what mends what is wrong.

use super::facts::{Facts, KvmFacts, NoKvm};
use crate::descriptors;
use belay_checkpoint::tracker::{REQUIRED_FEATURES, SYNC_FEATURES};
use belay_transport::uffd::Features;
use serde::Serialize;
use std::borrow::Cow;

/// What a guest in post-copy needs of userfaultfd.
const POSTCOPY_FEATURES: Features = Features::MISSING_SHMEM.union(Features::MINOR_SHMEM);
/// The demo's guest, its source and its destination, and what belay takes beside them.
const DEMO_BYTES: u64 = 1 << 30;
/// Below this a destination's fault server and its guest share a core.
const CORES_WANTED: usize = 2;
/// The stable KVM API; there is no other.
const KVM_API_VERSION: i32 = 12;

/// How one thing stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Ok,
    /// Guests move; something is slower, or a choice is not there.
    Degraded,
    /// Guests do not move.
    Missing,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub name: Cow<'static, str>,
    pub verdict: Verdict,
    pub detail: String,
    /// Commands that mend it, alternatives one an entry; none when all is well or no command can.
    pub mend: Vec<String>,
}

fn ok(name: &'static str, detail: impl Into<String>) -> Finding {
    Finding { name: name.into(), verdict: Verdict::Ok, detail: detail.into(), mend: vec![] }
}

fn commands(mend: &[&str]) -> Vec<String> {
    mend.iter().map(|command| (*command).to_owned()).collect()
}

fn degraded(name: &'static str, detail: impl Into<String>, mend: &[&'static str]) -> Finding {
    Finding { name: name.into(), verdict: Verdict::Degraded, detail: detail.into(), mend: commands(mend) }
}

fn missing(name: &'static str, detail: impl Into<String>, mend: &[&'static str]) -> Finding {
    Finding { name: name.into(), verdict: Verdict::Missing, detail: detail.into(), mend: commands(mend) }
}

/// Judges a host, most needed things first.
pub fn judge(facts: &Facts) -> Vec<Finding> {
    let mut findings = vec![kvm(&facts.kvm)];
    if let Ok(kvm) = &facts.kvm {
        findings.push(dirty_ring(kvm));
        findings.push(dirty_log(kvm));
    }
    findings.push(userfaultfd(facts));
    if let Some(has) = facts.uffd.features {
        findings.push(postcopy(facts, has));
    }
    findings.push(tracker(facts));
    if let Some(has) = facts.uffd.features {
        findings.push(sync_tracker(facts, has));
    }
    findings.extend([memory(facts), shm(facts), cores(facts), open_files(facts), huge_pages(facts)]);
    findings.extend(super::rdma::judge(&facts.rdma));
    findings
}

fn kvm(kvm: &Result<KvmFacts, NoKvm>) -> Finding {
    const NAME: &str = "kvm";
    match kvm {
        Ok(facts) if facts.api_version != KVM_API_VERSION || !facts.user_memory => missing(
            NAME,
            format!("/dev/kvm speaks API version {}, user memory: {}", facts.api_version, facts.user_memory),
            &[],
        ),
        Ok(facts) => ok(NAME, format!("/dev/kvm opens, API version {}", facts.api_version)),
        Err(NoKvm::NoDevice) => missing(
            NAME,
            "there is no /dev/kvm: the module is not loaded, or virtualization is off in firmware or not given to this guest",
            &["sudo modprobe kvm_intel", "sudo modprobe kvm_amd"],
        ),
        Err(NoKvm::NoPermission) => {
            missing(NAME, "this user may not open /dev/kvm", &["sudo usermod -aG kvm $USER   # then log in again"])
        }
        Err(NoKvm::Other(why)) => missing(NAME, format!("/dev/kvm does not open: {why}"), &[]),
    }
}

fn dirty_ring(kvm: &KvmFacts) -> Finding {
    const NAME: &str = "kvm dirty ring";
    match kvm.dirty_ring_bytes {
        0 => degraded(NAME, "this kernel's KVM has none (5.11 has it): use --tracker kvm-log", &[]),
        bytes => ok(NAME, format!("up to {} entries a vCPU", bytes / 16)),
    }
}

fn dirty_log(kvm: &KvmFacts) -> Finding {
    const NAME: &str = "kvm dirty log";
    if kvm.manual_dirty_log {
        ok(NAME, "with manual protection")
    } else {
        degraded(NAME, "without manual protection (5.1 has it): --tracker kvm-log is not to be had", &[])
    }
}

fn userfaultfd(facts: &Facts) -> Finding {
    const NAME: &str = "userfaultfd";
    match (&facts.uffd.all_faults, facts.uffd.features) {
        (Ok(()), _) => ok(NAME, "opens, and holds faults raised in the kernel, as KVM needs"),
        (Err(_), Some(_)) if facts.uffd.device_exists => missing(
            NAME,
            "this user's holds faults of user mode only, and KVM raises them in the kernel",
            &["sudo setfacl -m u:$USER:rw /dev/userfaultfd", "sudo sysctl vm.unprivileged_userfaultfd=1"],
        ),
        (Err(_), Some(_)) => missing(
            NAME,
            "this user's holds faults of user mode only, and KVM raises them in the kernel",
            &["sudo sysctl vm.unprivileged_userfaultfd=1"],
        ),
        (Err(why), None) => missing(NAME, format!("{why} (the kernel needs CONFIG_USERFAULTFD)"), &[]),
    }
}

fn postcopy(facts: &Facts, has: Features) -> Finding {
    const NAME: &str = "post-copy faults";
    match POSTCOPY_FEATURES.missing_from(has) {
        Features::NONE => ok(NAME, "missing and minor faults on shared memory"),
        lacking => missing(NAME, format!("Linux {} lacks {lacking}; 5.14 or newer has it", facts.kernel), &[]),
    }
}

fn tracker(facts: &Facts) -> Finding {
    const NAME: &str = "tracker uffd-wp";
    match (&facts.uffd_wp_tracker, facts.uffd.features) {
        (Ok(()), _) => ok(NAME, "a write was tracked with asynchronous write protection and PAGEMAP_SCAN"),
        (Err(_), Some(has)) if !has.contains(REQUIRED_FEATURES) => degraded(
            NAME,
            format!("Linux {} lacks {}; 6.7 or newer has it", facts.kernel, REQUIRED_FEATURES.missing_from(has)),
            &[],
        ),
        (Err(why), _) => degraded(NAME, why.clone(), &[]),
    }
}

fn sync_tracker(facts: &Facts, has: Features) -> Finding {
    const NAME: &str = "tracker uffd-sync";
    match SYNC_FEATURES.missing_from(has) {
        Features::NONE => ok(NAME, "synchronous write protection of shared memory, by groups of pages"),
        lacking => degraded(NAME, format!("Linux {} lacks {lacking}; 6.4 or newer has it", facts.kernel), &[]),
    }
}

fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / (1 << 30) as f64)
}

fn memory(facts: &Facts) -> Finding {
    const NAME: &str = "memory";
    match facts.available_bytes {
        Some(bytes) if bytes >= DEMO_BYTES => ok(NAME, format!("{} available", gib(bytes))),
        Some(bytes) => degraded(
            NAME,
            format!("{} available; the demo of 256 MiB wants {}", gib(bytes), gib(DEMO_BYTES)),
            &["belay demo --memory 64M"],
        ),
        None => degraded(NAME, "/proc/meminfo does not say how much is available", &[]),
    }
}

fn shm(facts: &Facts) -> Finding {
    const NAME: &str = "tmpfs";
    match facts.shm_free_bytes {
        Some(bytes) if bytes >= DEMO_BYTES => ok(NAME, format!("{} free in /dev/shm", gib(bytes))),
        Some(bytes) => degraded(
            NAME,
            format!("{} free in /dev/shm, which must hold the guests' memory where it is a file", gib(bytes)),
            &["sudo mount -o remount,size=80% /dev/shm"],
        ),
        None => degraded(
            NAME,
            "/dev/shm is no tmpfs: guest memory can only be a memfd, which a restarted belay cannot take over",
            &["sudo mount -t tmpfs tmpfs /dev/shm"],
        ),
    }
}

fn cores(facts: &Facts) -> Finding {
    const NAME: &str = "cores";
    if facts.cores >= CORES_WANTED {
        ok(NAME, format!("{} for this process", facts.cores))
    } else {
        degraded(
            NAME,
            "one for this process: faults are served by the core that waits for them, and figures mean little",
            &[],
        )
    }
}

fn open_files(facts: &Facts) -> Finding {
    const NAME: &str = "open files";
    match facts.open_files {
        Some(limit) if limit < descriptors::NEEDED => missing(
            NAME,
            descriptors::TooFew { limit }.to_string(),
            &["ulimit -Hn 1024   # LimitNOFILE=1024 in a unit"],
        ),
        Some(limit) => ok(NAME, format!("{limit} may be open")),
        None => ok(NAME, "any number may be open"),
    }
}

fn huge_pages(facts: &Facts) -> Finding {
    const NAME: &str = "huge pages";
    const RESERVE: &[&str] = &["sudo sysctl vm.nr_hugepages=512   # 1 GiB of 2 MiB pages"];
    let minor = facts.uffd.features.is_none_or(|has| has.contains(Features::MINOR_HUGETLBFS));
    match facts.free_huge_pages {
        None => degraded(NAME, "this kernel has no 2 MiB pages; guests of 4 KiB pages move", &[]),
        Some(_) if !minor => degraded(
            NAME,
            "this kernel's userfaultfd lacks MINOR_HUGETLBFS (5.13 has it); guests of 4 KiB pages move",
            &[],
        ),
        Some(0) => degraded(NAME, "no 2 MiB page is reserved and free; guests of 4 KiB pages move", RESERVE),
        Some(free) => ok(NAME, format!("{free} of 2 MiB free ({})", gib(free << 21))),
    }
}
