//! A memory region: a run of a mapping that a device may use, deregistered when dropped.

use super::device::Pd;
use super::registration::{Access, Region, Registrar};
use crate::region::{Extent, Mapping};
use belay_verbs_sys as ibv;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

/// A region of the protection domain's.
struct MemoryRegion {
    mr: NonNull<ibv::ibv_mr>,
    // After the region: what it is made of.
    pd: Arc<Pd>,
    _mapping: Arc<Mapping>,
}

// SAFETY: libibverbs' functions may be called from any thread.
unsafe impl Send for MemoryRegion {}

impl Drop for MemoryRegion {
    fn drop(&mut self) {
        // SAFETY: registered once, deregistered once; a queue pair that would use it later gets an error and touches nothing.
        if unsafe { ibv::ibv_dereg_mr(self.mr.as_ptr()) } != 0 {
            self.pd.keeps_a_region();
        }
    }
}

/// Registers with one protection domain.
pub(super) struct PdRegistrar(pub Arc<Pd>);

impl Registrar for PdRegistrar {
    fn register(&self, mapping: &Arc<Mapping>, offset: u64, len: u64, access: Access) -> io::Result<Region> {
        let end = offset.checked_add(len).filter(|end| *end <= mapping.len() as u64);
        let (Some(_), Ok(length)) = (end, usize::try_from(len)) else {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        };
        let address = mapping.as_ptr().wrapping_add(offset as usize);
        // SAFETY: the domain is alive; the range lies in the mapping, which the region holds; no Rust reference to a mapping's
        // bytes is ever made (region::mapping).
        let mr = unsafe { ibv::ibv_reg_mr(self.0.as_ptr(), address.cast(), length, access.bits()) };
        let mr = NonNull::new(mr).ok_or_else(io::Error::last_os_error)?;
        // SAFETY: a region that was just made, which nobody else knows yet.
        let made = unsafe { mr.as_ref() };
        let (lkey, rkey) = (made.lkey, made.rkey);
        let handle = MemoryRegion { mr, pd: Arc::clone(&self.0), _mapping: Arc::clone(mapping) };
        Ok(Region { lkey, rkey, handle: Box::new(handle) })
    }

    fn announce(&self, region: &Region, mapping: &Mapping, extents: &[Extent]) -> io::Result<()> {
        const AT_ONCE: usize = 64;
        for some in extents.chunks(AT_ONCE) {
            let mut list = [ibv::zeroed::<ibv::ibv_sge>(); AT_ONCE];
            for (entry, extent) in list.iter_mut().zip(some) {
                entry.addr = mapping.address() + extent.offset;
                // Advice: what is longer than an entry can say is announced as far as it can.
                entry.length = u32::try_from(extent.len).unwrap_or(u32::MAX);
                entry.lkey = region.lkey;
            }
            let advice = ibv::ib_uverbs_advise_mr_advice::IB_UVERBS_ADVISE_MR_ADVICE_PREFETCH;
            // SAFETY: the domain is alive; the list has that many entries, all of a region of this domain.
            let errno = unsafe { ibv::ibv_advise_mr(self.0.as_ptr(), advice, 0, list.as_mut_ptr(), some.len() as u32) };
            if errno != 0 {
                return Err(io::Error::from_raw_os_error(errno.abs()));
            }
        }
        Ok(())
    }
}
