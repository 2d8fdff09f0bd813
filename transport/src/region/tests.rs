//! What RAM files promise.

use super::*;
use crate::testing::HugePages;
use std::sync::atomic::{AtomicU64, Ordering};

const MIB: usize = 1 << 20;

#[test]
fn occupancy_names_exactly_the_extents_written_and_fills_no_hole() {
    let file = RamFile::memfd("occupancy", 8 * MIB, PageSize::Small).unwrap();
    assert_eq!(file.occupancy().unwrap(), []);
    let mapping = file.map().unwrap();
    mapping.write(4096, &[1]);
    mapping.write(3 * 4096 - 1, &[1]);
    mapping.write(8 * MIB - 1, &[1]);
    let expected = [Extent { offset: 4096, len: 8192 }, Extent { offset: (8 * MIB - 4096) as u64, len: 4096 }];
    assert_eq!(file.occupancy().unwrap(), expected);
    assert_eq!(file.occupancy().unwrap(), expected);
}

#[test]
fn preallocation_leaves_no_hole_and_says_how_far_it_is() {
    let file = RamFile::memfd("prealloc", 48 * MIB, PageSize::Small).unwrap();
    let most = AtomicU64::new(0);
    file.preallocate(3, &|done| {
        most.fetch_max(done, Ordering::Relaxed);
    })
    .unwrap();
    assert_eq!(most.into_inner(), 48 * MIB as u64);
    assert_eq!(file.occupancy().unwrap(), [Extent { offset: 0, len: 48 * MIB as u64 }]);
}

#[test]
fn a_punched_extent_is_a_hole_again() {
    let file = RamFile::memfd("punch", MIB, PageSize::Small).unwrap();
    file.preallocate(1, &|_| ()).unwrap();
    file.punch(Extent { offset: 8192, len: 4096 }).unwrap();
    assert_eq!(file.occupancy().unwrap().len(), 2);
}

#[test]
fn a_file_on_another_file_system_is_refused_by_name() {
    // A test's own executable lies on a disk file system wherever tests are run from a checkout on one.
    let file = std::fs::File::open("/proc/self/exe").unwrap();
    match RamFile::from_fd(file.into()) {
        Err(RegionError::WrongFileSystem { filesystem, .. }) => assert!(!filesystem.is_empty()),
        Ok(_) | Err(RegionError::BadLength { .. }) => eprintln!("skipped: the checkout itself lies on tmpfs"),
        Err(other) => panic!("{other}"),
    }
    let proc = RamFile::from_fd(std::fs::File::open("/proc/self/status").unwrap().into()).unwrap_err();
    assert!(proc.to_string().contains("tmpfs or hugetlbfs"), "{proc}");
}

#[test]
fn a_file_on_tmpfs_is_created_once_and_opened_again() {
    let Ok(dir) = tempfile::tempdir_in("/dev/shm") else {
        eprintln!("skipped: /dev/shm is not writable");
        return;
    };
    let path = dir.path().join("ram");
    let file = RamFile::create_in(&path, MIB, PageSize::Small).unwrap();
    file.map().unwrap().write(5, b"x");
    assert!(matches!(RamFile::create_in(&path, MIB, PageSize::Small), Err(RegionError::Io { .. })));
    let again = RamFile::open(&path).unwrap();
    assert_eq!((again.len(), again.page_size()), (MIB, PageSize::Small));
    let other = dir.path().join("huge");
    assert!(matches!(RamFile::create_in(&other, 2 * MIB, PageSize::Huge), Err(RegionError::WrongPageSize { .. })));
    assert!(!other.exists(), "a refused file must not stay behind");
}

#[test]
fn lengths_that_are_no_whole_pages_are_refused() {
    for (len, page_size) in [(0, PageSize::Small), (4097, PageSize::Small), (4096, PageSize::Huge)] {
        assert!(matches!(RamFile::memfd("len", len, page_size), Err(RegionError::BadLength { .. })));
    }
}

#[test]
fn too_few_huge_pages_is_an_error_that_says_how_to_reserve_them() {
    let error = RamFile::memfd("huge", 1 << 46, PageSize::Huge).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("sysctl vm.nr_hugepages="), "{text}");
    assert!(text.contains("33554432 huge pages"), "{text}");
}

#[test]
fn huge_pages_are_allocated_and_mapped_and_their_holes_known() {
    let Some(_pages) = HugePages::reserve(8) else { return };
    let file = RamFile::memfd("huge", 8 * MIB, PageSize::Huge).unwrap();
    let before = file.occupancy().unwrap();
    assert_eq!(before, [Extent { offset: 0, len: 8 * MIB as u64 }], "hugetlbfs knows no holes: all counts as data");
    file.preallocate(2, &|_| ()).unwrap();
    let mapping = file.map().unwrap();
    mapping.write(5 * MIB, b"climber");
    let mut seen = [0; 7];
    file.map().unwrap().read(5 * MIB, &mut seen);
    assert_eq!(&seen, b"climber");
}

#[test]
fn a_full_file_system_is_an_error_and_not_a_signal() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let target = std::ffi::CString::new(dir.path().as_os_str().as_encoded_bytes()).unwrap();
    // SAFETY: all strings are NUL-terminated and live across the call.
    let mounted =
        unsafe { libc::mount(c"tmpfs".as_ptr(), target.as_ptr(), c"tmpfs".as_ptr(), 0, c"size=1m".as_ptr().cast()) };
    if mounted != 0 {
        eprintln!("skipped: no privilege to mount a small tmpfs");
        return;
    }
    let file = RamFile::create_in(&dir.path().join("ram"), 4 * MIB, PageSize::Small).unwrap();
    let outcome = file.preallocate(1, &|_| ());
    drop(file);
    // SAFETY: the string is NUL-terminated and lives across the call.
    unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
    assert!(matches!(outcome, Err(RegionError::NoSpace { len: 4194304, .. })), "{outcome:?}");
}

#[test]
fn a_file_is_whole_once_all_of_it_is_reserved_and_until_a_page_is_given_back() {
    let file = RamFile::memfd("whole", MIB, PageSize::Small).unwrap();
    file.map().unwrap().write(0, &[1]);
    assert!(!file.is_whole().unwrap());
    file.reserve(Extent { offset: 0, len: MIB as u64 }).unwrap();
    assert!(file.is_whole().unwrap());
    for offset in [0, 9 * 4096] {
        file.punch(Extent { offset, len: 4096 }).unwrap();
        assert!(!file.is_whole().unwrap(), "written or only reserved: {offset}");
        file.reserve(Extent { offset, len: 4096 }).unwrap();
    }
    let Some(_pages) = HugePages::reserve(2) else { return };
    let file = RamFile::memfd("whole", 4 * MIB, PageSize::Huge).unwrap();
    assert!(!file.is_whole().unwrap());
    file.reserve(Extent { offset: 0, len: 4 * MIB as u64 }).unwrap();
    assert!(file.is_whole().unwrap());
    file.punch(Extent { offset: 2 * MIB as u64, len: 2 * MIB as u64 }).unwrap();
    assert!(!file.is_whole().unwrap());
}
