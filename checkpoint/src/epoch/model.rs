//! For tests: a guest whose memory is a known function of how far it has run, with a tracker and an engine around it.

use super::Arrivals;
use crate::dirty::DirtySet;
use crate::guest::*;
use crate::staging::{HeldPages, StageError};
use crate::testing::{empty_set, ram};
use belay_transport::region::Mapping;
use belay_transport::{Deadline, PAGE_SIZE, PageIndex, RegionId};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

/// A packet every so many steps.
pub const STEPS_A_PACKET: u64 = 8;

fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Where step `step` writes: region 0, this page and offset, these bytes.
fn write_of(step: u64, pages: u64) -> (PageIndex, usize, [u8; 16]) {
    let place = mix(step);
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&step.to_le_bytes());
    bytes[8..].copy_from_slice(&place.to_le_bytes());
    (PageIndex(place % pages), (place >> 32) as usize % (PAGE_SIZE - 16), bytes)
}

/// Step `n` discards this page when it is its turn to.
fn discard_of(step: u64, pages: u64) -> Option<PageIndex> {
    step.is_multiple_of(37).then(|| PageIndex(mix(step ^ 0xd15c) % pages))
}

pub fn packet_of(sequence: u64) -> Packet {
    Packet { sequence, bytes: format!("packet {sequence} of step {}", sequence * STEPS_A_PACKET).into_bytes() }
}

/// What RAM looked like at the switch.
pub fn at_the_switch(pages: u64) -> Vec<u8> {
    (0..pages).flat_map(|page| [mix(page) as u8; PAGE_SIZE]).collect()
}

/// What RAM must be after `steps` steps.
pub fn truth(pages: u64, steps: u64) -> Vec<u8> {
    let mut memory = at_the_switch(pages);
    for step in 1..=steps {
        if let Some(page) = discard_of(step, pages) {
            memory[page.offset()..][..PAGE_SIZE].fill(0);
        }
        let (page, offset, bytes) = write_of(step, pages);
        memory[page.offset() + offset..][..16].copy_from_slice(&bytes);
    }
    memory
}

pub fn steps_of(device_state: &[u8]) -> u64 {
    u64::from_le_bytes(device_state.try_into().unwrap())
}

/// All that is shared between the running guest, its tracker and its engine.
pub struct World {
    pub steps: u64,
    dirty: DirtySet,
    /// Told ahead of a pause, and not yet harvested.
    ahead: DirtySet,
    pub prepared: u64,
    discards: DirtySet,
    landed: Vec<bool>,
    running: bool,
    pub pauses: u64,
    /// So many attempts to stop fail before the next one succeeds.
    pub stubborn: u32,
    /// How long a step takes at least.
    step_time: Duration,
    /// Makes no step while its sink has no room.
    pub parks: bool,
    /// Its tracker can hold pages.
    pub holds: bool,
    /// How often held pages were taken while it ran.
    pub taken_running: u64,
}

/// Pages as they were, copied at once: the guest writes where nothing is protected.
struct Kept {
    world: Arc<Mutex<World>>,
    pages: HashMap<u64, Vec<u8>>,
}

impl HeldPages for Kept {
    fn take(
        &mut self,
        region: RegionId,
        first: PageIndex,
        count: u64,
        slot: &Mapping,
        at: usize,
    ) -> Result<(), StageError> {
        let mut world = self.world.lock().unwrap();
        world.taken_running += u64::from(world.running);
        drop(world);
        for page in first.0..first.0 + count {
            let bytes = self.pages.remove(&page).ok_or(StageError::NotHeld { region, page: PageIndex(page) })?;
            slot.write(at + (page - first.0) as usize * PAGE_SIZE, &bytes);
        }
        Ok(())
    }
    fn end(self: Box<Self>) -> Result<u64, StageError> {
        assert!(self.pages.is_empty(), "every page is taken");
        Ok(0)
    }
}

#[derive(Clone)]
pub struct Model {
    world: Arc<Mutex<World>>,
    memory: Arc<Vec<RamBlock>>,
    pages: u64,
    quit: Arc<AtomicBool>,
}

impl Model {
    pub fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap()
    }

    /// A guest of `pages` pages, none landed, that makes steps as fast as it can while it runs and there is room.
    pub fn start(pages: u64, step_time: Duration, sink: Arc<dyn PacketSink>) -> (Self, RunningGuest) {
        let memory = Arc::new(ram(&[pages as usize]));
        memory[0].alias.write(0, &vec![0xee; pages as usize * PAGE_SIZE]);
        let world = World {
            steps: 0,
            dirty: empty_set(&memory),
            ahead: empty_set(&memory),
            prepared: 0,
            discards: empty_set(&memory),
            landed: vec![false; pages as usize],
            running: true,
            pauses: 0,
            stubborn: 0,
            step_time,
            parks: true,
            holds: false,
            taken_running: 0,
        };
        let model = Self { world: Arc::new(Mutex::new(world)), memory, pages, quit: Arc::default() };
        let vcpu = model.clone();
        let thread = std::thread::spawn(move || {
            while !vcpu.quit.load(Ordering::Acquire) {
                let (running, time, parks) = {
                    let world = vcpu.world();
                    (world.running, world.step_time, world.parks)
                };
                if running && (!parks || sink.has_room()) {
                    vcpu.step(sink.as_ref());
                    std::thread::sleep(time);
                } else {
                    std::thread::yield_now();
                }
            }
        });
        (model.clone(), RunningGuest { model, thread: Some(thread) })
    }

    fn land(&self, world: &mut World, page: PageIndex) {
        if !std::mem::replace(&mut world.landed[page.0 as usize], true) {
            self.memory[0].alias.write(page.offset(), &[mix(page.0) as u8; PAGE_SIZE]);
        }
    }

    fn step(&self, sink: &dyn PacketSink) {
        let mut world = self.world();
        if !world.running {
            return;
        }
        let step = world.steps + 1;
        if let Some(page) = discard_of(step, self.pages) {
            self.land(&mut world, page);
            self.memory[0].alias.zero(page.offset(), PAGE_SIZE);
            world.discards.insert(RegionId(0), page);
            // A discard takes the write before it with it, and a tracker does not report it again.
            world.dirty.retain(|_, other| other != page);
        }
        let (page, offset, bytes) = write_of(step, self.pages);
        self.land(&mut world, page);
        self.memory[0].alias.write(page.offset() + offset, &bytes);
        world.dirty.insert(RegionId(0), page);
        // A tracker may report what was only read, also where nothing has landed yet.
        world.dirty.insert(RegionId(0), PageIndex(mix(step ^ 0xfa15e) % self.pages));
        world.steps = step;
        if step.is_multiple_of(STEPS_A_PACKET) {
            sink.emit(packet_of(step / STEPS_A_PACKET));
        }
    }
}

/// Ends the guest's thread when dropped.
pub struct RunningGuest {
    model: Model,
    thread: Option<JoinHandle<()>>,
}

impl Drop for RunningGuest {
    fn drop(&mut self) {
        self.model.quit.store(true, Ordering::Release);
        self.thread.take().unwrap().join().unwrap();
    }
}

impl Guest for Model {
    fn pause(&mut self, _: Deadline) -> Result<(), GuestError> {
        let mut world = self.world();
        if world.stubborn > 0 {
            world.stubborn -= 1;
            return Err(GuestError::StopTimedOut { bound_ms: 0, running: 1, vcpus: 1 });
        }
        world.running = false;
        world.pauses += 1;
        Ok(())
    }
    fn resume(&mut self) -> Result<(), GuestError> {
        self.world().running = true;
        Ok(())
    }
    fn save(&mut self, out: &mut Vec<u8>) -> Result<(), GuestError> {
        let world = self.world();
        assert!(!world.running, "saved while it runs");
        out.extend_from_slice(&world.steps.to_le_bytes());
        Ok(())
    }
    fn load(&mut self, state: &[u8]) -> Result<(), GuestError> {
        self.world().steps = steps_of(state);
        Ok(())
    }
    fn set_incarnation(&mut self, _: u64) -> Result<(), GuestError> {
        Ok(())
    }
    fn parks_itself(&self) -> bool {
        self.world().parks
    }
    fn memory(&self) -> &[RamBlock] {
        &self.memory
    }
    fn tracker(&mut self, _: TrackerKind) -> Result<Box<dyn DirtyTracker>, GuestError> {
        Ok(Box::new(self.clone()))
    }
    fn device_writes(&mut self, _: &mut DirtySet) -> Result<(), GuestError> {
        Ok(())
    }
}

impl DirtyTracker for Model {
    fn kind(&self) -> TrackerKind {
        TrackerKind::KvmRing
    }
    fn sees_device_writes(&self) -> bool {
        false
    }
    fn start(&mut self) -> Result<(), GuestError> {
        Ok(())
    }
    fn prepare(&mut self) -> Result<(), GuestError> {
        let mut world = self.world();
        let World { dirty, ahead, prepared, .. } = &mut *world;
        ahead.merge(dirty);
        dirty.clear();
        *prepared += 1;
        Ok(())
    }
    fn harvest(&mut self, into: &mut DirtySet) -> Result<(), GuestError> {
        let mut world = self.world();
        assert!(!world.running, "harvested while it runs");
        let World { dirty, ahead, .. } = &mut *world;
        for set in [dirty, ahead] {
            into.merge(set);
            set.clear();
        }
        Ok(())
    }
    fn can_hold(&self) -> bool {
        self.world().holds
    }
    fn hold(&mut self, dirty: &DirtySet) -> Result<Option<Box<dyn HeldPages>>, StageError> {
        let world = self.world();
        assert!(!world.running, "held while it runs");
        let mut bytes = vec![0; PAGE_SIZE];
        let pages = dirty.iter().map(|(_, page)| {
            self.memory[0].alias.read(page.offset(), &mut bytes);
            (page.0, bytes.clone())
        });
        Ok(Some(Box::new(Kept { pages: pages.collect(), world: Arc::clone(&self.world) })))
    }
    fn dirty_so_far(&mut self) -> Option<u64> {
        let world = self.world();
        Some(world.dirty.len() + world.ahead.len())
    }
}

impl Arrivals for Model {
    fn landed(&self, _: RegionId, page: PageIndex) -> bool {
        self.world().landed[page.0 as usize]
    }
    fn take_discards(&mut self, into: &mut DirtySet, _: &mut DirtySet) {
        let mut world = self.world();
        into.merge(&world.discards);
        world.discards.clear();
    }
}
