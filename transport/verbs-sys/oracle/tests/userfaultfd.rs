//! The transport's userfaultfd numbers and structures, against the crates userfaultfd and userfaultfd-sys.

use linux_raw_sys::general as raw;
use std::mem::{align_of, offset_of, size_of};

/// The transport's own file: what it sends to the kernel and reads from it.
#[allow(dead_code, unused_imports)]
#[path = "../../../src/uffd/abi.rs"]
mod abi;

use abi::Features;
use userfaultfd::FeatureFlags;

#[test]
fn features_have_the_bits_that_the_kernels_header_gives_them() {
    let theirs = [
        (Features::MISSING_SHMEM, FeatureFlags::MISSING_SHMEM),
        (Features::MISSING_HUGETLBFS, FeatureFlags::MISSING_HUGETLBFS),
        (Features::EVENT_REMOVE, FeatureFlags::EVENT_REMOVE),
        (Features::EVENT_UNMAP, FeatureFlags::EVENT_UNMAP),
    ];
    for (ours, theirs) in theirs {
        assert_eq!(ours.0, theirs.bits(), "{ours}");
        assert_ne!(ours.0, 0);
    }
    // Newer than that crate's own list.
    assert_eq!(Features::THREAD_ID.0, userfaultfd_sys::UFFD_FEATURE_THREAD_ID);
    assert_eq!(Features::MINOR_HUGETLBFS.0, userfaultfd_sys::UFFD_FEATURE_MINOR_HUGETLBFS);
    assert_eq!(Features::MINOR_SHMEM.0, userfaultfd_sys::UFFD_FEATURE_MINOR_SHMEM);
    assert_eq!(Features::WP_SHMEM.0, userfaultfd_sys::UFFD_FEATURE_WP_HUGETLBFS_SHMEM);
}

#[test]
fn requests_have_the_kernels_numbers() {
    let theirs = [
        (abi::UFFDIO_API, userfaultfd_sys::UFFDIO_API, "API"),
        (abi::UFFDIO_REGISTER, userfaultfd_sys::UFFDIO_REGISTER, "REGISTER"),
        (abi::UFFDIO_UNREGISTER, userfaultfd_sys::UFFDIO_UNREGISTER, "UNREGISTER"),
        (abi::UFFDIO_WAKE, userfaultfd_sys::UFFDIO_WAKE, "WAKE"),
        (abi::UFFDIO_COPY, userfaultfd_sys::UFFDIO_COPY, "COPY"),
        (abi::UFFDIO_ZEROPAGE, userfaultfd_sys::UFFDIO_ZEROPAGE, "ZEROPAGE"),
        (abi::UFFDIO_WRITEPROTECT, userfaultfd_sys::UFFDIO_WRITEPROTECT, "WRITEPROTECT"),
    ];
    for (ours, theirs, name) in theirs {
        // UFFDIO_CONTINUE they have not; its structure is below. Theirs are widened from a signed int; the lower half is the request.
        assert_eq!(ours, theirs as u32, "UFFDIO_{name}");
    }
    assert_eq!(abi::UFFDIO_WRITEPROTECT_MODE_WP, u64::from(userfaultfd_sys::UFFDIO_WRITEPROTECT_MODE_WP as u32));
}

macro_rules! same {
    ($($name:ident { $($field:ident)* })*) => {
        $(
            assert_eq!(size_of::<raw::$name>(), size_of::<userfaultfd_sys::$name>(), stringify!($name));
            assert_eq!(align_of::<raw::$name>(), align_of::<userfaultfd_sys::$name>(), stringify!($name));
            $(
                assert_eq!(
                    offset_of!(raw::$name, $field),
                    offset_of!(userfaultfd_sys::$name, $field),
                    concat!(stringify!($name), ".", stringify!($field))
                );
            )*
        )*
    };
}

#[test]
fn structures_are_laid_out_as_the_kernels() {
    same! {
        uffdio_api { api features ioctls }
        uffdio_range { start len }
        uffdio_register { range mode ioctls }
        uffdio_copy { dst src len mode copy }
        uffdio_zeropage { range mode zeropage }
        uffdio_writeprotect { range mode }
        uffdio_continue { range mode }
        uffd_msg { event arg }
    }
    assert_eq!(size_of::<abi::Message>(), size_of::<userfaultfd_sys::uffd_msg>());
}

#[test]
fn events_and_fault_flags_have_the_kernels_numbers() {
    assert_eq!(raw::UFFD_EVENT_PAGEFAULT as u8, userfaultfd_sys::UFFD_EVENT_PAGEFAULT);
    assert_eq!(raw::UFFD_EVENT_REMOVE as u8, userfaultfd_sys::UFFD_EVENT_REMOVE);
    assert_eq!(raw::UFFD_EVENT_UNMAP as u8, userfaultfd_sys::UFFD_EVENT_UNMAP);
    assert_eq!(u64::from(raw::UFFD_PAGEFAULT_FLAG_WRITE), userfaultfd_sys::UFFD_PAGEFAULT_FLAG_WRITE);
    assert_eq!(u64::from(raw::UFFD_PAGEFAULT_FLAG_WP), userfaultfd_sys::UFFD_PAGEFAULT_FLAG_WP);
    assert_eq!(u64::from(raw::UFFD_PAGEFAULT_FLAG_MINOR), userfaultfd_sys::UFFD_PAGEFAULT_FLAG_MINOR);
}
