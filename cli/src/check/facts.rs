//! What there is on this host. Looks and changes nothing.

use crate::descriptors;
use belay_checkpoint::guest::{DirtyTracker, GuestError, RamBlock};
use belay_checkpoint::tracker::{REQUIRED_FEATURES, UffdWpTracker, WhoseMemory};
use belay_transport::fabric::verbs::inventory::Inventory;
use belay_transport::region::RamFile;
use belay_transport::uffd::{Faults, Features, OpenMode, RegisterModes, Uffd};
use belay_transport::{PageSize, RegionId};
use kvm_ioctls::{Cap, Kvm};
use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;

/// KVM_CAP_DIRTY_LOG_RING_ACQ_REL and KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 (linux/kvm.h), which kvm-ioctls has no names for.
const CAP_DIRTY_LOG_RING_ACQ_REL: u64 = 223;
const CAP_MANUAL_DIRTY_LOG_PROTECT2: u64 = 168;
/// The memory the tracker is tried on.
const TRIAL_BYTES: usize = 64 << 10;
const TMPFS_MAGIC: i64 = 0x0102_1994;

/// Why /dev/kvm cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoKvm {
    NoDevice,
    NoPermission,
    Other(String),
}

/// What KVM can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvmFacts {
    pub api_version: i32,
    pub user_memory: bool,
    /// Bytes of the largest dirty ring; 0: none.
    pub dirty_ring_bytes: u64,
    pub manual_dirty_log: bool,
}

/// What userfaultfd can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UffdFacts {
    /// Whether it also holds faults raised in the kernel, which KVM needs; else why not.
    pub all_faults: Result<(), String>,
    /// What the kernel has; none where it has no userfaultfd.
    pub features: Option<Features>,
    pub device_exists: bool,
}

/// Everything [`super::judge`] goes by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    pub kernel: String,
    pub kvm: Result<KvmFacts, NoKvm>,
    pub uffd: UffdFacts,
    /// Whether asynchronous write protection with PAGEMAP_SCAN was seen to work; else why not.
    pub uffd_wp_tracker: Result<(), String>,
    /// 2 MiB pages that are reserved and free; none where the kernel has no such pages.
    pub free_huge_pages: Option<u64>,
    pub available_bytes: Option<u64>,
    /// Free bytes of /dev/shm; none where it is no tmpfs.
    pub shm_free_bytes: Option<u64>,
    pub cores: usize,
    /// Files this process may have open if it asks for it; none: any number.
    pub open_files: Option<u64>,
    /// Libraries, devices, ports and how much memory may be locked.
    pub rdma: Inventory,
}

impl Facts {
    /// Looks.
    pub fn of_this_host() -> Self {
        Self {
            kernel: read("/proc/sys/kernel/osrelease").unwrap_or_else(|| "unknown".into()),
            kvm: kvm(),
            uffd: uffd(),
            uffd_wp_tracker: try_tracker(),
            free_huge_pages: read("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
                .and_then(|n| n.parse().ok()),
            available_bytes: available(),
            shm_free_bytes: shm_free(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            open_files: descriptors::most(),
            rdma: Inventory::of_this_host(),
        }
    }
}

fn read(path: impl AsRef<Path>) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

fn kvm() -> Result<KvmFacts, NoKvm> {
    let kvm = Kvm::new().map_err(|error| match io::Error::from(error) {
        error if error.kind() == io::ErrorKind::NotFound => NoKvm::NoDevice,
        error if error.kind() == io::ErrorKind::PermissionDenied => NoKvm::NoPermission,
        error => NoKvm::Other(error.to_string()),
    })?;
    let ring = kvm.check_extension_raw(CAP_DIRTY_LOG_RING_ACQ_REL).max(kvm.check_extension_int(Cap::DirtyLogRing));
    Ok(KvmFacts {
        api_version: kvm.get_api_version(),
        user_memory: kvm.check_extension_int(Cap::UserMemory) > 0,
        dirty_ring_bytes: u64::try_from(ring).unwrap_or(0),
        manual_dirty_log: kvm.check_extension_raw(CAP_MANUAL_DIRTY_LOG_PROTECT2) > 0,
    })
}

fn uffd() -> UffdFacts {
    let all = Uffd::supported(OpenMode::All);
    let features = all.as_ref().ok().copied().or_else(|| Uffd::supported(OpenMode::UserModeOnly).ok());
    let all_faults = all.map(drop).map_err(|error| error.to_string());
    UffdFacts { all_faults, features, device_exists: Path::new("/dev/userfaultfd").exists() }
}

/// Tracks one write to a little memory of our own: proof that all of its parts are there.
fn try_tracker() -> Result<(), String> {
    let explain = |error: GuestError| error.to_string();
    let uffd = Uffd::open(OpenMode::UserModeOnly, REQUIRED_FEATURES).map_err(|error| error.to_string())?;
    let file = RamFile::memfd("belay-check", TRIAL_BYTES, PageSize::Small).map_err(|error| error.to_string())?;
    let guest = file.map().map_err(|error| error.to_string())?;
    let alias = file.map().map_err(|error| error.to_string())?;
    let modes = RegisterModes { faults: Faults::None, write_protect: true };
    uffd.register(guest.address(), TRIAL_BYTES as u64, modes).map_err(|error| error.to_string())?;
    let (id, vmm_address) = (RegionId(0), guest.address());
    let block = RamBlock { id, page_size: PageSize::Small, file: Arc::new(file), alias: Arc::new(alias), vmm_address };
    let mut tracker = UffdWpTracker::new(WhoseMemory::Own, &[block]).map_err(explain)?;
    tracker.start().map_err(explain)?;
    guest.write(0, &[1]);
    let mut found = belay_checkpoint::dirty::DirtySet::new([(id, (TRIAL_BYTES / belay_transport::PAGE_SIZE) as u64)]);
    tracker.harvest(&mut found).map_err(explain)?;
    if found.len() == 1 { Ok(()) } else { Err(format!("one page was written and {} were reported", found.len())) }
}

/// MemAvailable of /proc/meminfo.
fn available() -> Option<u64> {
    let text = read("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? << 10)
}

fn shm_free() -> Option<u64> {
    let stat = rustix::fs::statfs("/dev/shm").ok()?;
    let block_bytes = u64::try_from(stat.f_bsize).ok()?;
    (stat.f_type == TMPFS_MAGIC).then_some(stat.f_bavail * block_bytes)
}
