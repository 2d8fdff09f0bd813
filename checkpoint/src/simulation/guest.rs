//! The guest, its tracker, and pages that come one by one. What its memory must be is kept beside it, and a copy of each epoch.

use super::Rng;
use crate::dirty::DirtySet;
use crate::epoch::Arrivals;
use crate::guest::{DirtyTracker, Guest, GuestError, PacketSink, RamBlock, TrackerKind};
use crate::simulation::world::{Emitted, World};
use crate::testing::empty_set;
use belay_transport::{Deadline, PAGE_SIZE, PageIndex, RegionId};

/// Pages of its two regions.
pub const SHAPE: [usize; 2] = [48, 16];
const PAGES: usize = SHAPE[0] + SHAPE[1];
/// What lies in a frame to which nothing has come yet.
const NOTHING: u8 = 0xee;

#[derive(Debug, Clone, Copy, PartialEq)]
enum Page {
    Absent,
    InFlight,
    Landed,
}

/// Whole pages as they were at one epoch.
pub type Delta = Vec<(usize, Box<[u8; PAGE_SIZE]>)>;

pub struct SimGuest {
    memory: Vec<RamBlock>,
    /// The source's memory: a page that was never written since the switch is read from there.
    source: Vec<RamBlock>,
    pages: [Page; PAGES],
    dirty: DirtySet,
    discards: DirtySet,
    /// Pages written or discarded in the open epoch.
    touched: [bool; PAGES],
    pub truth: Vec<u8>,
    pub steps: u64,
}

/// Region and page of the guest's page `at`.
fn place(at: usize) -> (RegionId, PageIndex) {
    if at < SHAPE[0] { (RegionId(0), PageIndex(at as u64)) } else { (RegionId(1), PageIndex((at - SHAPE[0]) as u64)) }
}

fn number(region: RegionId, page: PageIndex) -> usize {
    page.0 as usize + if region == RegionId(0) { 0 } else { SHAPE[0] }
}

/// Guest memory at the switch.
pub fn at_the_switch(rng: &mut Rng) -> Vec<u8> {
    let mut memory = vec![0; PAGES * PAGE_SIZE];
    for page in memory.chunks_mut(PAGE_SIZE) {
        if !rng.once_in(4) {
            page.fill(rng.next() as u8);
        }
    }
    memory
}

pub fn write_all(memory: &[RamBlock], bytes: &[u8]) {
    let (first, second) = bytes.split_at(SHAPE[0] * PAGE_SIZE);
    memory[0].alias.write(0, first);
    memory[1].alias.write(0, second);
}

/// The first page of `memory` that is not as in `bytes`.
pub fn first_wrong(memory: &[RamBlock], bytes: &[u8]) -> Option<usize> {
    let mut is = [0; PAGE_SIZE];
    (0..PAGES).find(|&at| {
        let (region, page) = place(at);
        memory[usize::from(region.0)].alias.read(page.offset(), &mut is);
        is != bytes[at * PAGE_SIZE..][..PAGE_SIZE]
    })
}

impl SimGuest {
    pub fn new(source: &[RamBlock], memory: &[RamBlock], truth: Vec<u8>) -> Self {
        for at in 0..PAGES {
            let (region, page) = place(at);
            memory[usize::from(region.0)].alias.write(page.offset(), &[NOTHING; PAGE_SIZE]);
        }
        Self {
            memory: memory.to_vec(),
            source: source.to_vec(),
            pages: [Page::Absent; PAGES],
            dirty: empty_set(memory),
            discards: empty_set(memory),
            touched: [false; PAGES],
            truth,
            steps: 0,
        }
    }

    /// Reads a page from the source, or a part of it; `Err`: what lies there is not what the guest left there.
    pub fn arrives(&mut self, at: usize, whole: bool) -> Result<(), String> {
        if self.pages[at] == Page::Landed {
            return Ok(());
        }
        let (region, page) = place(at);
        let (from, to) = (&self.source[usize::from(region.0)].alias, &self.memory[usize::from(region.0)].alias);
        let len = if whole { PAGE_SIZE } else { PAGE_SIZE / 2 };
        to.copy_from(page.offset(), from, page.offset(), len);
        self.pages[at] = if whole { Page::Landed } else { Page::InFlight };
        if whole {
            let mut bytes = [0; PAGE_SIZE];
            to.read(page.offset(), &mut bytes);
            if bytes != self.truth[at * PAGE_SIZE..][..PAGE_SIZE] {
                return Err(format!("P1: page {at} was read from the source and is not the guest's"));
            }
        }
        Ok(())
    }

    pub fn comes_in_the_background(&mut self, rng: &mut Rng) -> Result<(), String> {
        let whole = rng.once_in(2);
        self.arrives(rng.below(PAGES as u64) as usize, whole)
    }

    /// Everything that has not come yet.
    pub fn all_comes(&mut self) -> Result<(), String> {
        (0..PAGES).try_for_each(|at| self.arrives(at, true))
    }

    /// One step: reads, writes or gives up a page, and may emit.
    pub fn step(&mut self, rng: &mut Rng, sink: &dyn PacketSink, world: &World) -> Result<(), String> {
        self.steps += 1;
        let at = rng.below(PAGES as u64) as usize;
        let (region, page) = place(at);
        let alias = self.memory[usize::from(region.0)].alias.clone();
        match rng.below(16) {
            0 => {
                // What it gives up it has, and a tracker does not tell of a write that went with it.
                alias.zero(page.offset(), PAGE_SIZE);
                self.truth[at * PAGE_SIZE..][..PAGE_SIZE].fill(0);
                self.pages[at] = Page::Landed;
                self.discards.insert(region, page);
                self.dirty.retain(|other, index| (other, index) != (region, page));
                self.touched[at] = true;
            }
            // Some trackers tell of what was only looked at, and was not even there yet.
            1 | 2 => {
                if self.pages[at] == Page::Absent && rng.once_in(2) {
                    self.arrives(at, false)?;
                }
                self.dirty.insert(region, page);
            }
            _ => {
                self.arrives(at, true)?;
                let (offset, bytes) = (rng.below((PAGE_SIZE - 8) as u64) as usize, rng.next().to_le_bytes());
                alias.write(page.offset() + offset, &bytes);
                self.truth[at * PAGE_SIZE + offset..][..8].copy_from_slice(&bytes);
                self.dirty.insert(region, page);
                self.touched[at] = true;
            }
        }
        if rng.once_in(4) && sink.has_room() {
            let mut seen = world.lock();
            let sequence = seen.emitted.len() as u64 + 1;
            let bytes = format!("packet {sequence} of step {} {:x}", self.steps, rng.next()).into_bytes();
            seen.emitted.push(Emitted { bytes: bytes.clone(), epoch: None });
            drop(seen);
            sink.emit(crate::guest::Packet { sequence, bytes });
        }
        Ok(())
    }

    /// What the open epoch changed, as it is now; the next one is open.
    pub fn close_epoch(&mut self) -> Delta {
        let touched = std::mem::replace(&mut self.touched, [false; PAGES]);
        let pages = touched.iter().enumerate().filter(|(_, touched)| **touched);
        pages
            .map(|(at, _)| {
                let bytes: &[u8; PAGE_SIZE] = self.truth[at * PAGE_SIZE..][..PAGE_SIZE].try_into().expect("a page");
                (at, Box::new(*bytes))
            })
            .collect()
    }

    /// An epoch did not come to anything: what it changed is part of the open one.
    pub fn reopen(&mut self, delta: &Delta) {
        delta.iter().for_each(|(at, _)| self.touched[*at] = true);
    }

    /// The tracker as the harvest sees it, and the pages as it asks for them.
    pub fn split(&mut self) -> (Tracker<'_>, Pages<'_>) {
        (Tracker(&mut self.dirty), Pages(&self.pages, &mut self.discards))
    }
}

pub struct Tracker<'a>(&'a mut DirtySet);
pub struct Pages<'a>(&'a [Page; PAGES], &'a mut DirtySet);

impl DirtyTracker for Tracker<'_> {
    fn kind(&self) -> TrackerKind {
        TrackerKind::KvmRing
    }
    fn sees_device_writes(&self) -> bool {
        true
    }
    fn start(&mut self) -> Result<(), GuestError> {
        Ok(())
    }
    fn harvest(&mut self, into: &mut DirtySet) -> Result<(), GuestError> {
        into.merge(self.0);
        self.0.clear();
        Ok(())
    }
    fn dirty_so_far(&mut self) -> Option<u64> {
        Some(self.0.len())
    }
}

impl Arrivals for Pages<'_> {
    fn landed(&self, region: RegionId, page: PageIndex) -> bool {
        self.0[number(region, page)] == Page::Landed
    }
    fn take_discards(&mut self, into: &mut DirtySet, _: &mut DirtySet) {
        into.merge(self.1);
        self.1.clear();
    }
}

/// What a harvest asks of the VMM: nothing, the tracker sees all.
pub struct Vmm;

impl Guest for Vmm {
    fn pause(&mut self, _: Deadline) -> Result<(), GuestError> {
        Ok(())
    }
    fn resume(&mut self) -> Result<(), GuestError> {
        Ok(())
    }
    fn save(&mut self, _: &mut Vec<u8>) -> Result<(), GuestError> {
        Ok(())
    }
    fn load(&mut self, _: &[u8]) -> Result<(), GuestError> {
        Ok(())
    }
    fn set_incarnation(&mut self, _: u64) -> Result<(), GuestError> {
        Ok(())
    }
    fn memory(&self) -> &[RamBlock] {
        &[]
    }
    fn tracker(&mut self, kind: TrackerKind) -> Result<Box<dyn DirtyTracker>, GuestError> {
        Err(GuestError::NoTracker { kind, reason: "the simulation has its own".to_owned() })
    }
    fn device_writes(&mut self, _: &mut DirtySet) -> Result<(), GuestError> {
        Ok(())
    }
}
