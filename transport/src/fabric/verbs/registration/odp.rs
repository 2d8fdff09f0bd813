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

/// `IBV_ODP_SUPPORT_READ` of `ibv_odp_transport_cap_bits`.
const READ: u32 = 1 << 3;

/// Whether a registration pins nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::fabric::verbs) struct OnDemand(bool);

impl OnDemand {
    /// Frames are pinned.
    pub(in crate::fabric::verbs) const NONE: Self = Self(false);

    /// Where reliable connections may READ from memory that is not pinned, by a device's `rc_odp_caps` (zero where it has no
    /// on-demand paging, and where it could not be asked).
    pub(in crate::fabric::verbs) const fn of(rc_odp_caps: u32) -> Self {
        Self(rc_odp_caps & READ != 0)
    }

    pub(super) const fn is_wanted(self) -> bool {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exports_go_unpinned_only_where_the_device_serves_reads_of_them() {
        assert!(OnDemand::of(0b11111).is_wanted());
        assert!(!OnDemand::of(0b00111).is_wanted(), "sends, receives and writes are not reads");
        assert_eq!(OnDemand::of(0), OnDemand::NONE);
    }
}
