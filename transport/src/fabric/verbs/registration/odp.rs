//! On-demand paging: registrations that pin nothing, where the device has them. (ibv_query_device_ex(3), "ODP")
//!
//! The device then follows the page table: a hole punched takes the frame from it at once, so there are no stale pins, holes
//! stay holes, and one region serves a whole file. The price is a fault of the *device* where it does not know a page yet, which a
//! kernel thread of that host serves. So it is used
//! * for what is **exported for reading**, with the populated extents announced beforehand (ibv_advise_mr(3)), so that the source's CPU
//!   has nothing to do while pages are pulled;
//! * not for what READs **land** in: those frames are allocated and pinned before the downtime, and a fault would be in the
//!   guest's way;
//! * not for the **ring**: it is small, and a commit waits for nothing.

/// `IBV_ODP_SUPPORT`: the device has on-demand paging at all.
const SUPPORTED: u64 = 1;
/// `IBV_ODP_SUPPORT_READ`.
const READ: u32 = 1 << 3;

/// What a device offers (`struct ibv_odp_caps`). All zero where it could not be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(in crate::fabric::verbs) struct OnDemand {
    pub general_caps: u64,
    pub rc_caps: u32,
}

impl OnDemand {
    /// Whether reliable connections may READ from memory that is not pinned.
    pub(in crate::fabric::verbs) fn serves_reads(self) -> bool {
        self.general_caps & SUPPORTED != 0 && self.rc_caps & READ != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exports_go_unpinned_only_where_the_device_serves_reads_of_them() {
        let offers = |general_caps, rc_caps| OnDemand { general_caps, rc_caps }.serves_reads();
        assert!(offers(1, 0b11111));
        assert!(!offers(1, 0b00111), "sends, receives and writes are not reads");
        assert!(!offers(0, 0b11111), "capabilities of a device without the feature mean nothing");
        assert!(!OnDemand::default().serves_reads());
    }
}
