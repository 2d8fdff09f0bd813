//! The kernel's pool of 2 MiB pages: how many can be had, and what to say when they cannot.
//! (Documentation/admin-guide/mm/hugetlbpage.rst)

use super::RegionError;
use std::fs;

const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// Fails when fewer than `needed` pages can be had now. A check of this kind is only advice (others allocate too); mapping
/// and allocating fail by themselves later. It exists for its message.
pub(super) fn check(needed: u64) -> Result<(), RegionError> {
    let free = available();
    if free < needed { Err(shortage(needed)) } else { Ok(()) }
}

/// The error that says how many pages are missing and how to reserve them.
pub(super) fn shortage(needed: u64) -> RegionError {
    let free = available();
    let missing = needed.saturating_sub(free);
    RegionError::NoHugePages { needed, free, advice: read("nr_hugepages") + missing.max(1) }
}

/// Pages neither used nor promised to a mapping, and those the kernel may still allocate on demand.
fn available() -> u64 {
    let pool = read("free_hugepages").saturating_sub(read("resv_hugepages"));
    pool + read("nr_overcommit_hugepages").saturating_sub(read("surplus_hugepages"))
}

/// One counter of the pool; a kernel without huge pages has no such file, and none of them.
fn read(counter: &str) -> u64 {
    fs::read_to_string(format!("{POOL}/{counter}")).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}
