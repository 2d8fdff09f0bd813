//! A metronome guest that has moved, all of its pages with it, and is tethered: both hosts in one process, with the pieces the
//! two roles are made of, and without the roles.

mod clock;
mod lent;
mod moved;

use crate::carrier::Carrier;
use crate::error::BenchError;
use crate::rig::{Ends, soon};
use belay_checkpoint::dirty::DirtySet;
use belay_checkpoint::epoch::{Arrivals, EpochObserver, EpochStats, Tether, TetherConfig, TetherParts};
use belay_checkpoint::fold::{FoldConfig, FoldState, FoldTarget, Folder};
use belay_checkpoint::guest::{Epoch, TrackerKind};
use belay_checkpoint::policy::FixedPeriod;
use belay_checkpoint::record::Limits;
use belay_checkpoint::ring::{Mailbox, OWNER_REGION_BYTES, OwnerRegion, RingReader, RingShape, RingWriter};
use belay_checkpoint::staging::Slot;
use belay_transport::fabric::{LaneKind, RingKeys};
use belay_transport::pull::{Discard, Engine};
use belay_transport::region::{Mapping, RamFile};
use belay_transport::{PAGE_SIZE, PageIndex, PageSize, RegionId};
use clock::Watched;
use lent::LentTracker;
pub use moved::{Moved, compare};
use std::sync::{Arc, Mutex, PoisonError};

const REGION: RegionId = RegionId(0);
const NONCE: u64 = 0xbe1a_7be1_a7be_1a71;
/// As a migration has them.
const MOST_STAGING: usize = 64 << 20;

/// Which guest, and with how much memory it is tethered.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub memory_bytes: u64,
    /// Scattered pages that the guest dirties in a batch.
    pub pages: u64,
    pub ring_bytes: usize,
    /// What the source reserves for a record.
    pub overflow_bytes: u64,
}

/// See the module. The tether is idle unless a checkpoint is asked for.
pub struct Tethered {
    tether: Tether,
    folder: Folder,
    /// The tracker, for harvests that no epoch takes.
    pub tracker: LentTracker,
    epochs: Arc<Epochs>,
    pub moved: Moved,
}

/// What has to be registered before the first lane opens.
struct Reserved {
    ring: Ring,
    keys: RingKeys,
    slots: [Slot; 2],
    mailbox: Mailbox,
}

impl Reserved {
    fn new(ends: &mut Ends, ring_bytes: usize) -> Result<Self, BenchError> {
        let ring = Ring::new(ring_bytes)?;
        let keys = ends.owner.export_ring((&ring.file, &ring.mapping), (&ring.owner_file, &ring.owner))?;
        let shape = RingShape::of(ring_bytes)?;
        let initiator = ends.initiator.as_mut();
        let staging = ring_bytes.min(MOST_STAGING);
        let slots = [Slot::new(initiator, staging, shape)?, Slot::new(initiator, staging, shape)?];
        Ok(Self { ring, keys, slots, mailbox: Mailbox::new(initiator)? })
    }
}

impl Tethered {
    /// The guest stands, and does a batch when it is told to ([`Moved::batch`]).
    pub fn new(carrier: &Carrier, kind: TrackerKind, shape: &Shape) -> Result<Self, BenchError> {
        let prepare = |ends: &mut Ends| Reserved::new(ends, shape.ring_bytes);
        let (mut moved, reserved) = Moved::new(carrier, shape, Some(kind), prepare)?;
        let Reserved { ring, keys, slots, mailbox } = reserved;
        let lane = moved.ends.lane(LaneKind::Checkpoint, 0)?;
        let writer = RingWriter::new(lane, keys, shape.ring_bytes, NONCE, mailbox, soon())?;
        let limits = Limits::for_regions([(REGION, shape.memory_bytes / PAGE_SIZE as u64)]);
        let state = FoldState::new(FoldTarget::new(&[moved.home()])?, limits, moved.state.clone());
        let owner = OwnerRegion::new(ring.owner.clone());
        let reader = RingReader::new(shape.ring_bytes, NONCE, shape.overflow_bytes as usize)?;
        let folder = Folder::start(FoldConfig::default(), ring.mapping.clone(), owner, reader, state)
            .map_err(BenchError::io("starting to fold"))?;
        let epochs = Arc::new(Epochs::default());
        let tracker = moved.tracker.clone().expect("a tracker was asked for");
        let parts = TetherParts {
            guest: Box::new(Watched { guest: moved.guest.clone(), clock: moved.clock.clone() }),
            tracker: Box::new(tracker.clone()),
            arrivals: Box::new(Pulled(moved.engine.clone())),
            policy: Box::new(FixedPeriod(belay_checkpoint::policy::LONGEST_PERIOD)),
            outbox: moved.outbox.clone(),
            writer,
            slots,
            observer: epochs.clone(),
            carried: None,
        };
        let config = TetherConfig { overflow_bytes: shape.overflow_bytes, ..TetherConfig::default() };
        let tether = Tether::start(config, parts)?;
        Ok(Self { tether, folder, tracker, epochs, moved })
    }

    /// Takes a checkpoint and waits for its commit. What it cost, by the tether's clock.
    pub fn checkpoint(&self) -> Result<EpochStats, BenchError> {
        match self.tether.checkpoint_now(soon()) {
            Some(epoch) => Ok(self.epochs.of(epoch.0)),
            None => Err(BenchError::NoCommit { why: self.tether.failed() }),
        }
    }

    /// Pages of all checkpoints so far: a guest that writes much has some that nobody asked for.
    pub fn pages_committed(&self) -> u64 {
        self.epochs.pages()
    }

    /// Waits until the source has folded it: until nobody works for it any more.
    pub fn wait_folded(&self, epoch: Epoch) -> Result<(), BenchError> {
        let folded = self.folder.wait_folded(epoch, soon()).folded;
        if folded < epoch { Err(BenchError::NoCommit { why: self.tether.failed() }) } else { Ok(()) }
    }

    /// What commits from here on stays in the ring.
    pub fn hold(&self) {
        self.folder.hold(true);
    }

    /// Takes a last checkpoint of the guest where it stands, and compares all of the source's RAM with the guest's.
    pub fn finish(self) -> Result<(), BenchError> {
        self.moved.parked()?;
        let epoch = self.checkpoint()?.number();
        self.wait_folded(epoch)?;
        compare(&self.moved.source, &self.moved.alias, epoch)?;
        self.tether.stop()?;
        Ok(())
    }

    /// Ends the tether without a word to the source: what it has committed is there, and nobody writes any more.
    pub fn silence(self) -> Result<(Moved, Folder), BenchError> {
        drop(self.tether.stop()?);
        Ok((self.moved, self.folder))
    }
}

/// Memory of the ring and of the owner's words.
struct Ring {
    file: RamFile,
    mapping: Arc<Mapping>,
    owner_file: RamFile,
    owner: Arc<Mapping>,
}

impl Ring {
    fn new(bytes: usize) -> Result<Self, BenchError> {
        let file = RamFile::memfd("bench-ring", bytes, PageSize::Small)?;
        let owner_file = RamFile::memfd("bench-owner", OWNER_REGION_BYTES, PageSize::Small)?;
        let map = |file: &RamFile| file.map().map_err(BenchError::io("mapping the ring")).map(Arc::new);
        let (mapping, owner) = (map(&file)?, map(&owner_file)?);
        // As a source has it: its page table is full before the guest leaves.
        file.preallocate_through(&mapping, 2, &|_| ())?;
        OwnerRegion::new(owner.clone());
        Ok(Self { file, mapping, owner_file, owner })
    }
}

/// The pull engine, as a harvest needs it.
struct Pulled(Arc<Engine>);

impl Arrivals for Pulled {
    fn landed(&self, region: RegionId, page: PageIndex) -> bool {
        self.0.landed(region, page)
    }
    fn take_discards(&mut self, discards: &mut DirtySet, perhaps: &mut DirtySet) {
        self.0.take_discards(&mut |Discard { region, page, certain }| {
            if certain { &mut *discards } else { &mut *perhaps }.insert(region, page);
        });
    }
}

/// What has committed.
#[derive(Default)]
struct Epochs(Mutex<Committed>);

#[derive(Debug, Default)]
struct Committed {
    last: EpochStats,
    /// Of all of them.
    pages: u64,
}

impl Epochs {
    fn of(&self, epoch: u64) -> EpochStats {
        // Told of right after the waiter is woken.
        loop {
            let last = self.0.lock().unwrap_or_else(PoisonError::into_inner).last;
            if last.epoch >= epoch {
                return last;
            }
            std::thread::yield_now();
        }
    }

    fn pages(&self) -> u64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pages
    }
}

impl EpochObserver for Epochs {
    fn committed(&self, stats: &EpochStats) {
        let mut committed = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        committed.pages += stats.pages;
        committed.last = *stats;
    }
}
