//! What a life is lived in: both hosts' memory, a session between them, and the destination's shipping.

use super::guest::SHAPE;
use super::wire::{KEYS, Wire};
use crate::epoch::{Beats, HeartbeatConfig};
use crate::fold::{FoldConfig, FoldState, FoldTarget, Looking};
use crate::guest::RamBlock;
use crate::journal::KeptState;
use crate::record::Limits;
use crate::ring::{Mailbox, OWNER_REGION_BYTES, OwnerRegion, RingReader, RingShape, RingWriter};
use crate::staging::{Exchange, Slot, StageError};
use crate::testing::{memory, ram, soon};
use belay_transport::PageSize;
use belay_transport::region::RamFile;
use std::collections::VecDeque;
use std::time::Duration;

/// A few large records fill it; bodies have three pages at most.
pub const RING: usize = 64 << 10;
/// Holds an epoch of six pages; larger ones leave in parts.
pub const SLOT: usize = 28 << 10;
pub const OVERFLOW: usize = 512 << 10;
pub const LEASE: Duration = Duration::from_millis(2);
pub const SLOTS: usize = 2;

/// What outlives a life, because making it anew would take longer than the life. Nothing of a life is left in it that the next one reads.
pub struct Kit {
    pub source: Vec<RamBlock>,
    pub destination: Vec<RamBlock>,
    pub wire: Wire,
    pub slots: Vec<Slot>,
    pub overflow: RamFile,
    pub kept: KeptState,
}

impl Kit {
    pub fn new() -> Self {
        let mut wire = Wire::new(memory(RING), memory(OWNER_REGION_BYTES));
        let shape = RingShape::of(RING).unwrap();
        let slots = (0..SLOTS).map(|_| Slot::new(&mut wire, SLOT, shape).unwrap()).collect();
        let overflow = RamFile::memfd("belay-overflow-simulated", OVERFLOW, PageSize::Small).unwrap();
        Self {
            source: ram(&SHAPE),
            destination: ram(&SHAPE),
            wire,
            slots,
            overflow,
            kept: KeptState::in_private_memory(),
        }
    }
}

pub fn fold_target(source: &[RamBlock]) -> (FoldTarget, Limits) {
    let target = FoldTarget::new(source).unwrap();
    let limits = Limits::for_regions(target.regions().collect::<Vec<_>>());
    (target, limits)
}

/// Writer and heartbeat of a new session, whose ring the source reads into `state`.
pub fn begin_session(
    wire: &mut Wire,
    (reader, state): (RingReader, FoldState),
    nonce: u64,
    granting: bool,
) -> (RingWriter, Beats) {
    let (committed, folded) = (reader.committed(), state.epoch());
    {
        let mut net = wire.lock();
        net.begin_session(SLOTS);
        let owner = OwnerRegion::new(net.owner.clone());
        owner.set_folded(folded);
        owner.set_applied(folded);
        let config = FoldConfig { lease: LEASE, granting, ..FoldConfig::default() };
        net.source = Some(Looking::new(config, net.ring.clone(), owner, reader, state));
    }
    let [first, second] = [0, 1].map(|_| Mailbox::new(wire).unwrap());
    let writer = RingWriter::new(wire.lane(0), KEYS, RING, nonce, first, soon()).unwrap();
    let config = HeartbeatConfig { lease: LEASE, ..HeartbeatConfig::default() };
    (writer.going_on_from(committed), Beats::new(wire.lane(1), KEYS, second, config))
}

/// The destination's shipping: what is staged, and the ring.
pub struct Shipper {
    pub writer: RingWriter,
    pub staged: VecDeque<Slot>,
    pub free: Vec<Slot>,
    pub committed: Vec<u64>,
    pub failed: bool,
    pub parts: u64,
}

impl Shipper {
    /// Ships the oldest part; whether the session is still good.
    pub fn ship(&mut self) -> bool {
        let Some(slot) = self.staged.pop_front() else { return !self.failed };
        if !self.failed {
            match self.writer.ship(&slot, soon()) {
                Ok(shipped) => self.committed.extend(shipped.committed.map(|epoch| epoch.0)),
                Err(_) => self.failed = true,
            }
        }
        self.free.push(slot);
        !self.failed
    }
}

impl Exchange for Shipper {
    fn exchange(&mut self, full: Slot) -> Result<Slot, StageError> {
        self.parts += 1;
        self.staged.push_back(full);
        while !self.staged.is_empty() {
            self.ship();
        }
        if self.failed { Err(StageError::ShippingEnded) } else { Ok(self.free.pop().expect("all are free")) }
    }
}
