//! For tests: a session in one process's memory, guest RAM, and an end-to-end rig of writer and reader.

/// Huge pages for a test: the same way as the transport's tests get them.
#[path = "../../transport/src/testing.rs"]
pub mod huge_pages;

pub mod etcd;

use crate::dirty::DirtySet;
use crate::fold::{Catch, CatchError, Recovered};
use crate::guest::{Epoch, Packet, RamBlock};
use crate::record::{PacketHeader, kind};
use crate::ring::{Mailbox, OWNER_REGION_BYTES, RingBytes, RingShape, RingWriter, ShipError, Shipped};
use crate::staging::{Exchange, Slot, StageError, Stager};
use belay_transport::fabric::*;
use belay_transport::region::{Extent, Mapping, RamFile};
use belay_transport::{Deadline, PAGE_SIZE, PageIndex, PageSize, RegionId};
use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use zerocopy::IntoBytes;

pub const NONCE: u64 = 0x1bad_cafe_5eed_0001;
pub const LANE: LaneId = LaneId { kind: LaneKind::Checkpoint, index: 0 };

pub fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(20))
}

/// For a test that computes for long: this thread, and those it starts, let tests that watch a clock go first.
pub fn give_way() {
    // Where that is refused it only takes from the others.
    let _ = rustix::process::nice(5);
}

/// A session whose two ends are in this process. Every operation is done whole under one lock, except the one at which the
/// initiator "dies".
#[derive(Clone)]
pub struct Wire(Arc<Mutex<WireState>>);

struct WireState {
    ring: Arc<Mapping>,
    owner: Arc<Mapping>,
    locals: Vec<Arc<Mapping>>,
    revoked: bool,
    /// Bytes the initiator may still write; the write that reaches it is torn there and the initiator is dead.
    life: u64,
}

impl Wire {
    pub fn new(ring_len: usize) -> Self {
        let (ring, owner) = (memory(ring_len), memory(OWNER_REGION_BYTES));
        Self(Arc::new(Mutex::new(WireState { ring, owner, locals: Vec::new(), revoked: false, life: u64::MAX })))
    }

    pub fn ring(&self) -> Arc<Mapping> {
        self.0.lock().unwrap().ring.clone()
    }

    pub fn owner(&self) -> Arc<Mapping> {
        self.0.lock().unwrap().owner.clone()
    }

    pub fn dies_after(&self, bytes: u64) {
        self.0.lock().unwrap().life = bytes;
    }

    pub fn keys() -> RingKeys {
        RingKeys { ring: WriteKey(1), owner_region: ReadKey(2) }
    }

    pub fn lane(&self) -> Box<dyn Lane> {
        Box::new(MemoryLane { wire: self.clone(), done: VecDeque::new() })
    }

    pub fn revoke(&self) -> Vec<u8> {
        let mut state = self.0.lock().unwrap();
        state.revoked = true;
        // Reads still work, as they do over shared memory; the owner epoch tells.
        state.owner.atomic_u64(OWNER_EPOCH_OFFSET).fetch_add(1, Ordering::SeqCst);
        copy_of(&state.ring)
    }

    /// The ring as it is now.
    pub fn ring_bytes(&self) -> Vec<u8> {
        copy_of(&self.0.lock().unwrap().ring)
    }

    /// A writer, with its mailbox.
    pub fn writer(&mut self) -> RingWriter {
        let mailbox = Mailbox::new(self).unwrap();
        RingWriter::new(self.lane(), Self::keys(), self.ring().len(), NONCE, mailbox, soon()).unwrap()
    }

    fn put(&self, write: &Write) -> Result<(), FabricError> {
        let mut state = self.0.lock().unwrap();
        if state.revoked {
            return Err(FabricError::Revoked { was: 0, is: 1 });
        }
        assert_eq!(write.remote, Self::keys().ring);
        let len = u64::from(write.len).min(state.life);
        let from = &state.locals[write.local.0 as usize];
        state.ring.copy_from(write.remote_offset as usize, from, write.local_offset as usize, len as usize);
        state.life -= len;
        if len < u64::from(write.len) { Err(FabricError::PeerClosed { lane: LANE }) } else { Ok(()) }
    }
}

impl Initiator for Wire {
    fn kind(&self) -> FabricKind {
        FabricKind::Local
    }
    fn register_local(&mut self, mapping: &Arc<Mapping>) -> Result<LocalKey, FabricError> {
        let mut state = self.0.lock().unwrap();
        state.locals.push(mapping.clone());
        Ok(LocalKey(state.locals.len() as u32 - 1))
    }
    fn open_lane(&mut self, _: LaneId, _: usize, _: Deadline) -> Result<Box<dyn Lane>, FabricError> {
        Ok(self.lane())
    }
}

impl Owner for Wire {
    fn kind(&self) -> FabricKind {
        FabricKind::Local
    }
    fn export_read(&mut self, _: &RamFile, _: &Arc<Mapping>, _: &[Extent]) -> Result<ReadKey, FabricError> {
        Ok(ReadKey(9))
    }
    fn export_ring(
        &mut self,
        _: (&RamFile, &Arc<Mapping>),
        _: (&RamFile, &Arc<Mapping>),
    ) -> Result<RingKeys, FabricError> {
        Ok(Self::keys())
    }
    fn serve_lane(&mut self, _: LaneId, _: Deadline) -> Result<(), FabricError> {
        Ok(())
    }
    fn extend_read(&mut self, _: ReadKey, _: &[Extent]) -> Result<(), FabricError> {
        Ok(())
    }
    fn revoke(&mut self, last_read: &mut dyn FnMut(RevokedRing<'_>), _: Deadline) -> Result<(), FabricError> {
        Wire::revoke(self);
        last_read(RevokedRing::Shared(&self.0.lock().unwrap().ring));
        Ok(())
    }
    fn broken(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    fn take_failures(&mut self) -> Vec<FabricError> {
        Vec::new()
    }
}

struct MemoryLane {
    wire: Wire,
    done: VecDeque<u64>,
}

impl Lane for MemoryLane {
    fn id(&self) -> LaneId {
        LANE
    }
    fn window(&self) -> usize {
        4
    }
    fn outstanding(&self) -> usize {
        self.done.len()
    }
    fn post_reads(&mut self, batch: &[Read]) -> Result<(), FabricError> {
        assert!(self.done.len() + batch.len() <= self.window());
        for read in batch {
            assert_eq!(read.remote, Wire::keys().owner_region);
            let state = self.wire.0.lock().unwrap();
            if state.life == 0 {
                return Err(FabricError::PeerClosed { lane: LANE });
            }
            let to = &state.locals[read.local.0 as usize];
            to.copy_from(read.local_offset as usize, &state.owner, read.remote_offset as usize, read.len as usize);
            self.done.push_back(read.id);
        }
        Ok(())
    }
    fn post_writes(&mut self, batch: &[Write]) -> Result<(), FabricError> {
        assert!(self.done.len() + batch.len() <= self.window(), "a post beyond the window");
        for write in batch {
            self.wire.put(write)?;
            self.done.push_back(write.id);
        }
        Ok(())
    }
    fn poll(&mut self, done: &mut [u64]) -> Result<usize, FabricError> {
        let mut count = 0;
        while let (Some(place), Some(id)) = (done.get_mut(count), self.done.front()) {
            *place = *id;
            self.done.pop_front();
            count += 1;
        }
        Ok(count)
    }
    fn readiness(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    fn wait(&mut self, _: Deadline) -> Result<(), FabricError> {
        assert!(!self.done.is_empty(), "waiting for nothing");
        Ok(())
    }
    fn commit(&mut self, trailer: &Write, _: Deadline) -> Result<(), FabricError> {
        self.done.clear();
        self.wire.put(trailer)
    }
}

/// A revoked ring of which nobody says that it stands still: it is read the other way.
pub struct Shared<'r>(pub &'r [u8]);

impl RingBytes for Shared<'_> {
    fn len(&self) -> usize {
        self.0.len()
    }
    fn read(&self, offset: usize, into: &mut [u8]) {
        RingBytes::read(self.0, offset, into);
    }
}

/// Finishes a catch over `ring`, where it lies or by way of private copies.
pub fn finish(catch: Catch, ring: &[u8], in_place: bool) -> Result<Recovered, CatchError> {
    if in_place { catch.finish(ring) } else { catch.finish(&Shared(ring)) }
}

fn copy_of(mapping: &Mapping) -> Vec<u8> {
    let mut bytes = vec![0; mapping.len()];
    mapping.read(0, &mut bytes);
    bytes
}

pub fn memory(len: usize) -> Arc<Mapping> {
    Arc::new(RamFile::memfd("belay-test", len, PageSize::Small).unwrap().map().unwrap())
}

/// Guest RAM: blocks of the given page counts, regions 0, 1, …
pub fn ram(pages: &[usize]) -> Vec<RamBlock> {
    let blocks = pages.iter().enumerate().map(|(id, pages)| {
        let file = Arc::new(RamFile::memfd("belay-test-ram", pages * PAGE_SIZE, PageSize::Small).unwrap());
        let alias = Arc::new(file.map().unwrap());
        RamBlock { id: RegionId(id as u16), page_size: PageSize::Small, file, alias, vmm_address: 0 }
    });
    blocks.collect()
}

pub fn bytes_of(memory: &[RamBlock]) -> Vec<u8> {
    let mut all = Vec::new();
    for block in memory {
        let from = all.len();
        all.resize(from + block.alias.len(), 0);
        block.alias.read(0, &mut all[from..]);
    }
    all
}

pub fn empty_set(memory: &[RamBlock]) -> DirtySet {
    DirtySet::new(memory.iter().map(|block| (block.id, (block.alias.len() / PAGE_SIZE) as u64)))
}

/// What an epoch holds, for tests that stage by hand.
#[derive(Debug, Clone, Default)]
pub struct Content {
    pub dirty: Vec<(u16, u64)>,
    pub discards: Vec<(u16, u64)>,
    pub device_state: Vec<u8>,
    pub outputs: Vec<Packet>,
    pub released_up_to: Option<u64>,
    /// Of disk 0.
    pub disk_writes: Vec<u8>,
}

pub fn packet_bytes(packets: &[Packet]) -> Vec<u8> {
    let mut all = Vec::new();
    for packet in packets {
        let header = PacketHeader { sequence: packet.sequence.into(), len: (packet.bytes.len() as u32).into() };
        all.extend_from_slice(header.as_bytes());
        all.extend_from_slice(&packet.bytes);
    }
    all
}

/// A destination that stages and ships in one thread.
pub struct Sender {
    pub writer: RingWriter,
    pub slots: Vec<Slot>,
}

struct ShipNow<'a> {
    writer: &'a mut RingWriter,
    failed: Option<ShipError>,
}

impl Exchange for ShipNow<'_> {
    fn exchange(&mut self, full: Slot) -> Result<Slot, StageError> {
        match self.writer.ship(&full, soon()) {
            Ok(_) => Ok(full),
            Err(error) => {
                self.failed = Some(error);
                Err(StageError::ShippingEnded)
            }
        }
    }
}

impl Sender {
    pub fn new(wire: &mut Wire, slot_bytes: usize) -> Self {
        let shape = RingShape::of(wire.ring().len()).unwrap();
        let slots = vec![Slot::new(wire, slot_bytes, shape).unwrap()];
        Self { writer: wire.writer(), slots }
    }

    pub fn send(&mut self, epoch: Epoch, memory: &[RamBlock], content: &Content) -> Result<Shipped, ShipError> {
        let slot = self.slots.pop().unwrap();
        let mut exchange = ShipNow { writer: &mut self.writer, failed: None };
        let staged = stage(slot, &mut exchange, epoch, memory, content);
        match staged {
            Ok(slot) => {
                let shipped = self.writer.ship(&slot, soon());
                self.slots.push(slot);
                shipped
            }
            Err(error) => Err(exchange.failed.unwrap_or_else(|| panic!("{error}"))),
        }
    }
}

pub fn stage(
    slot: Slot,
    exchange: &mut dyn Exchange,
    epoch: Epoch,
    memory: &[RamBlock],
    content: &Content,
) -> Result<Slot, StageError> {
    let (mut dirty, mut discards) = (empty_set(memory), empty_set(memory));
    for &(region, page) in &content.dirty {
        dirty.insert(RegionId(region), PageIndex(page));
    }
    for &(region, page) in &content.discards {
        discards.insert(RegionId(region), PageIndex(page));
    }
    let mut stager = Stager::begin(slot, exchange, epoch, memory.len(), 7, u64::MAX)?;
    stager.stream(kind::DEVICE_STATE, 0, &content.device_state)?;
    stager.stream(kind::HELD_OUTPUT, 0, &packet_bytes(&content.outputs))?;
    if let Some(released) = content.released_up_to {
        stager.stream(kind::RELEASED_UP_TO, 0, &released.to_le_bytes())?;
    }
    if !content.disk_writes.is_empty() {
        stager.stream(kind::DISK_WRITES, 0, &content.disk_writes)?;
    }
    stager.discards(&mut discards, memory)?;
    stager.pages(&mut dirty, memory)?;
    Ok(stager.finish()?.0)
}
