//! The lanes: what was posted lands later, in parts, and stops at any byte; the source looks in between.
//!
//! As the fabric contract has it: operations of one lane take place in order, those of two lanes in any; the bytes of one write land in any
//! order; local memory is read when an operation takes place, not when it is posted. A commit says yes only when its trailer is in the
//! ring and the owner epoch is what it was.

use super::Rng;
use crate::fold::{FoldError, Looking};
use belay_transport::Deadline;
use belay_transport::fabric::*;
use belay_transport::region::Mapping;
use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard};

pub const KEYS: RingKeys = RingKeys { ring: WriteKey(1), owner_region: ReadKey(2) };

#[derive(Debug, Clone, Copy)]
enum Operation {
    Read(Read),
    Write(Write),
}

/// Both ends of a session, and the source's folder, which looks whenever the wire lets it.
pub struct Net {
    pub rng: Rng,
    pub ring: Arc<Mapping>,
    pub owner: Arc<Mapping>,
    pub locals: Vec<Arc<Mapping>>,
    pub source: Option<Looking>,
    /// Why the source would not go on.
    pub refused: Option<FoldError>,
    lanes: [VecDeque<Operation>; 2],
    /// Sessions so far: a lane of an earlier one is broken.
    session: u64,
    owner_epoch: u64,
    /// Bytes that land before the destination dies; what is under way then is torn there.
    pub life: u64,
    pub now_ns: u64,
    /// Parts that landed, for whoever wants to know that something was torn.
    pub torn: u64,
}

#[derive(Clone)]
pub struct Wire(pub Arc<Mutex<Net>>);

impl Wire {
    pub fn new(ring: Arc<Mapping>, owner: Arc<Mapping>) -> Self {
        Self(Arc::new(Mutex::new(Net {
            rng: Rng(0),
            ring,
            owner,
            locals: Vec::new(),
            source: None,
            refused: None,
            lanes: [VecDeque::new(), VecDeque::new()],
            session: 0,
            owner_epoch: 0,
            life: u64::MAX,
            now_ns: 0,
            torn: 0,
        })))
    }

    pub fn lock(&self) -> MutexGuard<'_, Net> {
        self.0.lock().unwrap()
    }

    pub fn lane(&self, index: usize) -> Box<dyn Lane> {
        let session = self.lock().session;
        Box::new(SimLane { wire: self.clone(), index, session, done: VecDeque::new(), posted: 0 })
    }
}

impl Net {
    /// What an earlier session had under way never lands; its lanes are broken. Local memory from `keep` on is forgotten.
    pub fn begin_session(&mut self, keep: usize) {
        self.session += 1;
        self.lanes.iter_mut().for_each(VecDeque::clear);
        self.locals.truncate(keep);
        self.life = u64::MAX;
        self.owner_epoch = self.owner.load_u64(OWNER_EPOCH_OFFSET, Ordering::SeqCst);
    }

    /// The source has the session for itself from here on: the ring as it is then.
    pub fn revoke(&mut self) -> Vec<u8> {
        self.owner.atomic_u64(OWNER_EPOCH_OFFSET).fetch_add(1, Ordering::SeqCst);
        self.ring_bytes()
    }

    pub fn ring_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.ring.len()];
        self.ring.read(0, &mut bytes);
        bytes
    }

    pub fn passes(&mut self, ns: u64) {
        self.now_ns += ns;
        crate::clock::simulate(Some(self.now_ns));
    }

    /// The source looks once; whether there was something.
    pub fn look(&mut self) -> bool {
        let Some(source) = &mut self.source else { return false };
        match source.look() {
            Ok(something) => something,
            Err(error) => {
                self.refused = Some(error);
                self.source = None;
                false
            }
        }
    }

    /// Lets the next operation of a lane take place; its id.
    fn advance(&mut self, lane: usize) -> Result<Option<u64>, FabricError> {
        let step = self.rng.below(20_000);
        self.passes(step);
        let Some(operation) = self.lanes[lane].pop_front() else { return Ok(None) };
        if self.life == 0 {
            return Err(FabricError::PeerClosed { lane: id_of(lane) });
        }
        match operation {
            Operation::Read(read) => {
                // Where there is something to be taken a source mostly has by then.
                let looks = if self.rng.once_in(64) { self.rng.below(4) } else { 64 };
                for _ in 0..looks {
                    if !self.look() {
                        break;
                    }
                }
                let to = &self.locals[read.local.0 as usize];
                to.copy_from(read.local_offset as usize, &self.owner, read.remote_offset as usize, read.len as usize);
                Ok(Some(read.id))
            }
            Operation::Write(write) => self.lands(lane, &write).map(|()| Some(write.id)),
        }
    }

    fn lands(&mut self, lane: usize, write: &Write) -> Result<(), FabricError> {
        let len = write.len as usize;
        let whole = self.life >= len as u64;
        let cut = if self.rng.once_in(3) || !whole { self.rng.below(len as u64 + 1) as usize } else { 0 };
        let from = self.locals[write.local.0 as usize].clone();
        let part = |net: &Self, begin: usize, end: usize| {
            let (to, at) = (write.remote_offset as usize + begin, write.local_offset as usize + begin);
            net.ring.copy_from(to, &from, at, end - begin);
        };
        let parts = if self.rng.once_in(2) { [(0, cut), (cut, len)] } else { [(cut, len), (0, cut)] };
        part(self, parts[0].0, parts[0].1);
        if cut > 0 {
            self.torn += 1;
            if self.rng.once_in(2) {
                self.look();
            }
        }
        if !whole {
            self.life = 0;
            return Err(FabricError::PeerClosed { lane: id_of(lane) });
        }
        part(self, parts[1].0, parts[1].1);
        self.life -= if self.life == u64::MAX { 0 } else { len as u64 };
        if self.rng.once_in(8) {
            self.look();
        }
        Ok(())
    }
}

fn id_of(lane: usize) -> LaneId {
    LaneId { kind: LaneKind::Checkpoint, index: lane as u16 }
}

impl Initiator for Wire {
    fn kind(&self) -> FabricKind {
        FabricKind::Local
    }
    fn register_local(&mut self, mapping: &Arc<Mapping>) -> Result<LocalKey, FabricError> {
        let mut net = self.lock();
        net.locals.push(mapping.clone());
        Ok(LocalKey(net.locals.len() as u32 - 1))
    }
    fn open_lane(&mut self, id: LaneId, _: usize, _: Deadline) -> Result<Box<dyn Lane>, FabricError> {
        Ok(self.lane(usize::from(id.index)))
    }
}

struct SimLane {
    wire: Wire,
    index: usize,
    session: u64,
    done: VecDeque<u64>,
    /// Of which the ids are not in `done` yet.
    posted: usize,
}

impl SimLane {
    fn net(&self) -> Result<MutexGuard<'_, Net>, FabricError> {
        let net = self.wire.lock();
        if net.session == self.session { Ok(net) } else { Err(FabricError::PeerClosed { lane: self.id() }) }
    }

    fn advance(&mut self) -> Result<(), FabricError> {
        let done = self.net()?.advance(self.index)?;
        if let Some(id) = done {
            self.posted -= 1;
            self.done.push_back(id);
        }
        Ok(())
    }

    fn post(&mut self, operation: Operation) -> Result<(), FabricError> {
        assert!(self.outstanding() < self.window(), "a post beyond the window");
        self.net()?.lanes[self.index].push_back(operation);
        self.posted += 1;
        Ok(())
    }
}

impl Lane for SimLane {
    fn id(&self) -> LaneId {
        id_of(self.index)
    }
    fn window(&self) -> usize {
        4
    }
    fn outstanding(&self) -> usize {
        self.posted + self.done.len()
    }
    fn post_reads(&mut self, batch: &[Read]) -> Result<(), FabricError> {
        batch.iter().try_for_each(|read| self.post(Operation::Read(*read)))
    }
    fn post_writes(&mut self, batch: &[Write]) -> Result<(), FabricError> {
        batch.iter().try_for_each(|write| self.post(Operation::Write(*write)))
    }
    fn poll(&mut self, done: &mut [u64]) -> Result<usize, FabricError> {
        if self.done.is_empty() {
            self.advance()?;
        }
        let count = done.len().min(self.done.len());
        done.iter_mut().zip(self.done.drain(..count)).for_each(|(place, id)| *place = id);
        Ok(count)
    }
    fn readiness(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    fn wait(&mut self, _: Deadline) -> Result<(), FabricError> {
        self.advance()
    }
    fn commit(&mut self, trailer: &Write, _: Deadline) -> Result<(), FabricError> {
        while self.posted > 0 {
            self.advance()?;
        }
        self.done.clear();
        self.post(Operation::Write(*trailer))?;
        self.advance()?;
        self.done.clear();
        let mut net = self.net()?;
        // It has committed, and nobody there lives to know.
        if net.rng.once_in(400) {
            net.life = 0;
            return Err(FabricError::PeerClosed { lane: id_of(self.index) });
        }
        let (was, is) = (net.owner_epoch, net.owner.load_u64(OWNER_EPOCH_OFFSET, Ordering::SeqCst));
        if was == is { Ok(()) } else { Err(FabricError::Revoked { was, is }) }
    }
}
