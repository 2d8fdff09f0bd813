//! A shared mapping of a file, and the rules of touching guest memory.
//!
//! Rules of this room:
//! * The bytes behind a [`Mapping`] are written by others (vCPUs, a NIC, another process) at any moment. No reference
//!   or slice to them is ever made; they are only copied out and in, or read and written as aligned atomics.
//! * Offsets are checked against the mapping's length at every call; an offset out of range is a bug of the caller
//!   and panics, because offsets that come from a peer are checked where they are parsed.
//! * A mapping of a file that its owner truncates raises SIGBUS. Only the checkpoint ring of the `local` fabric is
//!   ever truncated (that is how it is revoked), and it is written through [`Mapping::write_from_checked`].

use rustix::mm::{MapFlags, ProtFlags};
use std::io;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

/// A MAP_SHARED mapping, unmapped when dropped.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<u8>,
    len: usize,
    writable: bool,
}

// SAFETY: the mapping is process-wide memory; every access goes through raw copies or atomics that are valid from any
// thread, and the pages stay mapped until the last owner drops it.
unsafe impl Send for Mapping {}
// SAFETY: as above; no method hands out a reference into the memory.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of `file` from its start, readable and writable.
    pub fn read_write(file: impl AsFd, len: usize) -> io::Result<Self> {
        Self::map(file, len, true)
    }

    /// Maps `len` bytes of `file` from its start, readable only.
    pub fn read_only(file: impl AsFd, len: usize) -> io::Result<Self> {
        Self::map(file, len, false)
    }

    fn map(file: impl AsFd, len: usize, writable: bool) -> io::Result<Self> {
        let mut protection = ProtFlags::READ;
        if writable {
            protection |= ProtFlags::WRITE;
        }
        // SAFETY: a null hint lets the kernel choose a free range, so no existing mapping is replaced.
        let start = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, protection, MapFlags::SHARED, file, 0) }?;
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mmap returned a null address"))?;
        Ok(Self { start, len, writable })
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes (never true for a mapping the kernel gave).
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether it may be written.
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// First address, for system calls and device registration. Not to be made a reference.
    pub fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// First address as a number, as userfaultfd and KVM want it.
    pub fn address(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    /// The address of `offset`, after checking that `len` bytes lie behind it.
    #[inline]
    fn at(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(
            offset.checked_add(len).is_some_and(|end| end <= self.len),
            "bytes {offset}+{len} are outside a mapping of {} bytes",
            self.len
        );
        // SAFETY: offset + len <= self.len was just checked, so the result lies in (or one past) the mapping.
        unsafe { self.start.as_ptr().add(offset) }
    }

    #[inline]
    fn at_mut(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(self.writable, "write to a read-only mapping at {offset}");
        self.at(offset, len)
    }

    /// Copies bytes out, from `offset` into `into`. Torn if somebody writes meanwhile; the caller knows whether that matters.
    #[inline]
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        let from = self.at(offset, into.len());
        // SAFETY: `from` is valid for `into.len()` bytes (checked), `into` is private memory, so they do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) }
    }

    /// Copies `bytes` in at `offset`.
    #[inline]
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        let to = self.at_mut(offset, bytes.len());
        // SAFETY: `to` is valid for `bytes.len()` bytes (checked), `bytes` is private memory, so they do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) }
    }

    /// Copies `len` bytes from another mapping (or another place of this one; the two may overlap).
    #[inline]
    pub fn copy_from(&self, offset: usize, source: &Self, source_offset: usize, len: usize) {
        let from = source.at(source_offset, len);
        let to = self.at_mut(offset, len);
        // SAFETY: both sides are valid for `len` bytes (checked); `copy` allows overlap.
        unsafe { std::ptr::copy(from, to, len) }
    }

    /// Has the CPU fetch the beginning of what lies at `offset`: for whoever copies pages from all over memory and knows the next
    /// one, where no prefetcher of the CPU's own does. A hint; nothing happens beyond the mapping's end.
    #[inline]
    pub fn prefetch(&self, offset: usize) {
        /// Enough that the CPU's own prefetchers take over.
        const LINES: usize = 16;
        #[cfg(target_arch = "x86_64")]
        for line in (offset..self.len.min(offset + LINES * 64)).step_by(64) {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            let at = self.start.as_ptr().wrapping_add(line).cast();
            // SAFETY: a prefetch reads nothing architecturally and raises no fault, whatever the address; SSE is part of x86-64.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(at) };
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (offset, LINES);
    }

    /// Writes zeroes over `len` bytes at `offset`.
    pub fn zero(&self, offset: usize, len: usize) {
        let to = self.at_mut(offset, len);
        // SAFETY: `to` is valid for `len` bytes (checked).
        unsafe { std::ptr::write_bytes(to, 0, len) }
    }

    /// Copies `len` bytes from `source` through the kernel, so that a file truncated under this mapping is an error
    /// (EFAULT) and not a SIGBUS.
    pub fn write_from_checked(&self, offset: usize, source: &Self, source_offset: usize, len: usize) -> io::Result<()> {
        let from = source.at(source_offset, len);
        let to = self.at_mut(offset, len);
        let local = libc::iovec { iov_base: from.cast(), iov_len: len };
        let remote = libc::iovec { iov_base: to.cast(), iov_len: len };
        // SAFETY: getpid has no preconditions.
        let own = unsafe { libc::getpid() };
        // SAFETY: both vectors name memory valid for `len` bytes (checked above); the kernel checks the pages itself.
        let done = unsafe { libc::process_vm_writev(own, &local, 1, &remote, 1, 0) };
        match usize::try_from(done) {
            Ok(done) if done == len => Ok(()),
            Ok(_) => Err(io::Error::from_raw_os_error(libc::EFAULT)),
            Err(_) => Err(io::Error::last_os_error()),
        }
    }

    /// Atomic load of the aligned u64 at `offset`.
    #[inline]
    pub fn load_u64(&self, offset: usize, order: Ordering) -> u64 {
        self.atomic_u64(offset).load(order)
    }

    /// Atomic store to the aligned u64 at `offset`.
    #[inline]
    pub fn store_u64(&self, offset: usize, value: u64, order: Ordering) {
        assert!(self.writable, "write to a read-only mapping at {offset}");
        self.atomic_u64(offset).store(value, order);
    }

    /// The aligned u64 at `offset` as an atomic: the one shape in which shared bytes may be referred to.
    #[inline]
    pub fn atomic_u64(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8), "offset {offset} is not aligned to 8");
        let at = self.at(offset, 8);
        // SAFETY: in range (checked), aligned (the mapping starts on a page), and lives as long as `self`; other
        // writers of the same word use atomics or a device's aligned writes.
        unsafe { AtomicU64::from_ptr(at.cast()) }
    }

    /// The byte at `offset` as an atomic.
    #[inline]
    pub fn atomic_u8(&self, offset: usize) -> &AtomicU8 {
        let at = self.at(offset, 1);
        // SAFETY: in range (checked), and lives as long as `self`; a byte has no alignment.
        unsafe { AtomicU8::from_ptr(at) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: start and len are those mmap gave; nothing refers to the range once the last owner is gone.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    fn file(len: u64) -> std::os::fd::OwnedFd {
        let fd = memfd_create("mapping-test", MemfdFlags::CLOEXEC).expect("memfd");
        ftruncate(&fd, len).expect("ftruncate");
        fd
    }

    #[test]
    fn two_mappings_of_one_file_show_the_same_bytes() {
        let fd = file(8192);
        let (a, b) = (Mapping::read_write(&fd, 8192).unwrap(), Mapping::read_only(&fd, 8192).unwrap());
        a.write(4090, b"climber");
        let mut seen = [0; 7];
        b.read(4090, &mut seen);
        assert_eq!(&seen, b"climber");
    }

    #[test]
    #[should_panic(expected = "outside a mapping")]
    fn an_offset_out_of_range_is_refused() {
        let fd = file(4096);
        Mapping::read_write(&fd, 4096).unwrap().write(4095, &[1, 2]);
    }

    #[test]
    fn a_write_into_a_truncated_file_is_an_error_and_not_a_signal() {
        let (ring, staging) = (file(8192), file(8192));
        let to = Mapping::read_write(&ring, 8192).unwrap();
        let from = Mapping::read_write(&staging, 8192).unwrap();
        from.write(0, &[7; 8192]);
        to.write_from_checked(0, &from, 0, 8192).expect("whole file");
        ftruncate(&ring, 0).unwrap();
        let error = to.write_from_checked(0, &from, 0, 8192).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
    }
}
