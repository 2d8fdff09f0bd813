//! The KVM ioctls that kvm-ioctls does not wrap.

use kvm_bindings::kvm_enable_cap;
use kvm_ioctls::VmFd;
use std::io;
use std::os::fd::AsRawFd;

/// `struct kvm_dirty_log` and `struct kvm_clear_dirty_log` of linux/kvm.h, with the bitmap as a plain address.
#[repr(C)]
struct GetDirtyLog {
    slot: u32,
    padding: u32,
    bitmap: u64,
}

#[repr(C)]
struct ClearDirtyLog {
    slot: u32,
    num_pages: u32,
    first_page: u64,
    bitmap: u64,
}

const _: () = assert!(size_of::<GetDirtyLog>() == 16);
const _: () = assert!(size_of::<ClearDirtyLog>() == 24);

const fn ioc(direction: u64, number: u64, size: usize) -> u64 {
    direction << 30 | (size as u64) << 16 | 0xae << 8 | number
}

const KVM_GET_DIRTY_LOG: u64 = ioc(1, 0x42, size_of::<GetDirtyLog>());
const KVM_CLEAR_DIRTY_LOG: u64 = ioc(3, 0xc0, size_of::<ClearDirtyLog>());
const KVM_RESET_DIRTY_RINGS: u64 = ioc(0, 0xc7, 0);

fn check(returned: libc::c_int) -> io::Result<libc::c_int> {
    if returned < 0 { Err(io::Error::last_os_error()) } else { Ok(returned) }
}

/// Reads a slot's dirty bitmap. With manual protect nothing is protected or cleared by this.
pub(super) fn get_dirty_log(vm: &VmFd, slot: u32, pages: u64, bitmap: &mut [u64]) -> io::Result<()> {
    assert!(bitmap.len() as u64 * 64 >= pages, "a bitmap of {} words for {pages} pages", bitmap.len());
    let log = GetDirtyLog { slot, padding: 0, bitmap: bitmap.as_mut_ptr() as u64 };
    // SAFETY: the structure is the kernel's, and the bitmap has room for every page of the slot (checked).
    check(unsafe { libc::ioctl(vm.as_raw_fd(), KVM_GET_DIRTY_LOG, &log) }).map(drop)
}

/// Clears the slot's pages whose bits are set and protects them anew.
pub(super) fn clear_dirty_log(vm: &VmFd, slot: u32, pages: u64, bitmap: &[u64]) -> io::Result<()> {
    assert!(bitmap.len() as u64 * 64 >= pages, "a bitmap of {} words for {pages} pages", bitmap.len());
    let num_pages = u32::try_from(pages).map_err(io::Error::other)?;
    let log = ClearDirtyLog { slot, num_pages, first_page: 0, bitmap: bitmap.as_ptr() as u64 };
    // SAFETY: the structure is the kernel's, and it reads at most `pages` bits of the bitmap (checked).
    check(unsafe { libc::ioctl(vm.as_raw_fd(), KVM_CLEAR_DIRTY_LOG, &log) }).map(drop)
}

/// Lets the kernel use the ring entries marked for it again, and protects their pages anew.
pub(super) fn reset_dirty_rings(vm: &VmFd) -> io::Result<()> {
    // SAFETY: takes no argument; works on the VM's own rings.
    check(unsafe { libc::ioctl(vm.as_raw_fd(), KVM_RESET_DIRTY_RINGS, 0) }).map(drop)
}

/// Enables a capability of the VM with one argument.
pub(super) fn enable(vm: &VmFd, cap: u32, argument: u64) -> io::Result<()> {
    let mut request = kvm_enable_cap { cap, ..Default::default() };
    request.args[0] = argument;
    vm.enable_cap(&request).map_err(io::Error::from)
}
