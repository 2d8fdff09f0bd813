//! Registers a VMM's mapping of guest RAM with userfaultfd: one descriptor a shard, held by the VMM for as long as it lives (P1).

use belay_transport::PageSize;
use belay_transport::uffd::{Faults, Features, OpenMode, RegisterModes, Uffd, UffdError};
use std::ops::Range;

/// What a userfaultfd over guest RAM has to be opened with. Faults tell their thread, for whoever records them. `protection`: what a tracker needs beside
/// ([`belay_checkpoint::tracker::write_protection`]).
pub fn features(page_size: PageSize, protection: Option<Features>) -> Features {
    let faults = match page_size {
        PageSize::Small => Features::MISSING_SHMEM.union(Features::MINOR_SHMEM),
        PageSize::Huge => Features::MISSING_HUGETLBFS.union(Features::MINOR_HUGETLBFS),
    };
    faults.union(Features::THREAD_ID).union(protection.unwrap_or(Features::NONE))
}

/// Registers the byte ranges of `shards` (offsets from `address`), each with a userfaultfd of its own. `protection`: for
/// tracking by write protection too, with these features. Every frame must have been allocated. `mode` says whether faults raised by KVM are held.
pub fn register(
    address: u64,
    page_size: PageSize,
    shards: &[Range<u64>],
    protection: Option<Features>,
    mode: OpenMode,
) -> Result<Vec<Uffd>, UffdError> {
    let features = features(page_size, protection);
    let modes = RegisterModes { faults: Faults::MissingAndMinor, write_protect: protection.is_some() };
    let one = |range: &Range<u64>| {
        let uffd = Uffd::open(mode, features)?;
        uffd.register(address + range.start, range.end - range.start, modes)?;
        Ok(uffd)
    };
    shards.iter().map(one).collect()
}
