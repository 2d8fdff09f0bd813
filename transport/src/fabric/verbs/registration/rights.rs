//! What a memory region may be used for: the least that works. (ibv_reg_mr(3))

/// Bits of `enum ibv_access_flags`.
const LOCAL_WRITE: i32 = 1;
const REMOTE_WRITE: i32 = 1 << 1;
const REMOTE_READ: i32 = 1 << 2;
const ON_DEMAND: i32 = 1 << 6;

/// Access flags of a memory region. Never with relaxed ordering: a checkpoint's trailer must not overtake its records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::fabric::verbs) struct Access(i32);

impl Access {
    /// Guest RAM of the owner, and its region of epochs and leases: the peer reads, nobody writes.
    pub(in crate::fabric::verbs) const EXPORTED: Self = Self(REMOTE_READ);
    /// The origin of writes: the device reads it for us, the peer cannot reach it.
    pub(in crate::fabric::verbs) const ORIGIN: Self = Self(0);

    /// What READs land in. On iWARP the peer's answer to a READ is a tagged write to this memory, so that it needs to be
    /// remotely writable there (RFC 5040, 5.1; ib_core's rdma_read_access_flags).
    pub(in crate::fabric::verbs) const fn landing(iwarp: bool) -> Self {
        Self(if iwarp { LOCAL_WRITE | REMOTE_WRITE } else { LOCAL_WRITE })
    }

    /// The checkpoint ring: the peer writes it (which the verbs allow only with LOCAL_WRITE), and on iWARP reads its trailer back.
    pub(in crate::fabric::verbs) const fn ring(iwarp: bool) -> Self {
        let write = LOCAL_WRITE | REMOTE_WRITE;
        Self(if iwarp { write | REMOTE_READ } else { write })
    }

    /// The same, not pinned.
    pub(super) const fn on_demand(self) -> Self {
        Self(self.0 | ON_DEMAND)
    }

    /// As ibv_reg_mr takes it.
    pub(in crate::fabric::verbs) const fn bits(self) -> i32 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_gets_a_right_it_does_not_need() {
        for iwarp in [false, true] {
            assert_eq!(Access::EXPORTED.bits() & (LOCAL_WRITE | REMOTE_WRITE), 0, "guest RAM of a source is only read");
            assert_eq!(Access::ORIGIN.bits(), 0);
            assert_eq!(Access::landing(iwarp).bits() & REMOTE_READ, 0);
            assert_eq!(Access::landing(iwarp).bits() & REMOTE_WRITE != 0, iwarp);
            assert_eq!(Access::ring(iwarp).bits() & REMOTE_READ != 0, iwarp);
        }
        // The verbs demand it (ibv_reg_mr(3)).
        assert_ne!(Access::ring(false).bits() & LOCAL_WRITE, 0);
        assert_eq!(Access::EXPORTED.on_demand().bits(), REMOTE_READ | ON_DEMAND);
    }
}
