//! The libraries as this machine has them, or has not.

use belay_verbs_sys::{ibv_free_device_list, ibv_get_device_list, load};
use std::path::Path;

/// Whether the libraries are here; says so when they are not.
fn have_libraries() -> bool {
    match load() {
        Ok(_) => true,
        Err(error) => {
            eprintln!("skipped: {error}");
            false
        }
    }
}

#[test]
fn the_libraries_are_the_files_that_were_opened() {
    if !have_libraries() {
        return;
    }
    let verbs = load().expect("they are here");
    assert_eq!(verbs, load().expect("loaded once"));
    let name = |path: &Path| path.file_name().expect("a file").to_string_lossy().into_owned();
    assert!(name(&verbs.ibverbs).starts_with("libibverbs.so.1") && verbs.ibverbs.is_file(), "{verbs:?}");
    assert!(name(&verbs.rdmacm).starts_with("librdmacm.so.1") && verbs.rdmacm.is_file(), "{verbs:?}");
}

#[test]
fn devices_are_listed_as_many_as_the_kernel_has_uverbs() {
    if !have_libraries() {
        return;
    }
    let in_sysfs = std::fs::read_dir("/sys/class/infiniband_verbs").map_or(0, |entries| {
        entries.flatten().filter(|e| e.file_name().to_string_lossy().starts_with("uverbs")).count()
    });
    let mut count = -1;
    // SAFETY: the libraries are loaded; the count is ours to be written.
    let list = unsafe { ibv_get_device_list(&raw mut count) };
    // Where the kernel has no RDMA at all the list is null, with ENOSYS; an empty list otherwise.
    if list.is_null() {
        assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::ENOSYS));
        assert_eq!(in_sysfs, 0);
        return;
    }
    assert_eq!(usize::try_from(count), Ok(in_sysfs));
    // SAFETY: it came from ibv_get_device_list and is freed once.
    unsafe { ibv_free_device_list(list) };
}
