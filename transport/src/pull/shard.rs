//! One shard: one thread, run to completion over one part of the guest's address space.
//!
//! ```text
//!   read events → rule for each (serve.rs) → post demand READs → poll both lanes → land and show (install.rs)
//!        ^                                                                              │
//!        └── sleep in poll(2) when there is nothing ── post background READs (sweep.rs) <┘
//! ```
//! Nothing here allocates, locks or hands over to another thread. Whatever cannot be done now waits in a bounded place: a
//! fault in the backlog, a page whose address space is changing in its slot.

use super::install;
use super::log::Noted;
use super::pace::{Pace, Spin};
use super::plan::{LandingPlan, MAX_READ_BYTES, PageClass, ShardParts, reads_a_frame};
use super::shared::{Counters, PullFailure, Shared, drain, signal};
use super::slots::{LaneOf, Slot, Slots};
use super::sweep::{Chunk, Next, Sweep};
use crate::fabric::{Lane, Read};
use crate::stop_point;
use crate::uffd::{Event, FaultKind, Uffd};
use crate::units::FrameIndex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Faults that wait for a slot or for the address space to settle. A fault that finds it full is woken and comes again.
const BACKLOG: usize = 1024;
/// Events and completions taken in one go.
const BATCH: usize = 32;
/// Longest sleep: what a missed wake-up would cost.
const IDLE_NS: u64 = 100_000_000;
/// Rounds between two looks at the clocks of posted READs while busy.
const TIMEOUT_ROUNDS: u32 = 256;
/// Rounds between two yields of the CPU while the answer to a demand READ is near: about 20 µs on a fast machine.
const YIELD_ROUNDS: u32 = 32;

/// A fault that waits for its turn.
#[derive(Debug, Clone, Copy)]
pub(super) struct Waiting {
    pub region: usize,
    pub frame: u64,
    pub kind: FaultKind,
    pub read_ns: u64,
}

/// A part of the guest's address space and the frames behind it.
#[derive(Debug, Clone, Copy)]
struct Window {
    start: u64,
    end: u64,
    region: usize,
}

pub(super) struct Shard {
    pub(super) index: usize,
    pub(super) uffd: Uffd,
    pub(super) shared: Arc<Shared>,
    pub(super) slots: Slots,
    pub(super) backlog: VecDeque<Waiting>,
    pub(super) staged: Vec<Read>,
    pub(super) staged_slots: Vec<usize>,
    pub(super) sweep: Sweep,
    pub(super) pace: Pace,
    pub(super) zeroes: Vec<u8>,
    pub(super) fault_lane: Option<Box<dyn Lane>>,
    bulk_lane: Option<Box<dyn Lane>>,
    wake: Arc<OwnedFd>,
    windows: Vec<Window>,
    /// Slots that have landed and could not be shown yet.
    retry: Vec<usize>,
    finished: bool,
    spin: Spin,
    /// READs the largest frame takes; a chunk is one READ, or one such frame.
    reads_a_frame: usize,
}

impl Shard {
    pub(super) fn new(index: usize, parts: ShardParts, shared: Arc<Shared>, wake: Arc<OwnedFd>) -> Self {
        let region_index = |id| shared.states.index_of(id).expect("the plan's check found every region");
        let ranges: Vec<_> = parts.ranges.into_iter().map(|r| (region_index(r.region), r.frames)).collect();
        let windows = ranges
            .iter()
            .map(|(region, frames)| {
                let plan = &shared.regions[*region];
                let at = |frame: u64| plan.plan.vmm_address + (frame << plan.shift());
                Window { start: at(frames.start), end: at(frames.end), region: *region }
            })
            .collect();
        let slots = Slots::new(shared.tuning.demand_reads, shared.tuning.bulk_chunks);
        Self {
            index,
            uffd: parts.uffd,
            backlog: VecDeque::with_capacity(BACKLOG),
            staged: Vec::with_capacity(BATCH + (BACKLOG.max(BATCH) * 2)),
            staged_slots: Vec::with_capacity(slots.len()),
            retry: Vec::with_capacity(slots.len()),
            slots,
            sweep: Sweep::new(ranges, shared.tuning.bubble_bytes),
            pace: Pace::new(&shared.tuning),
            zeroes: vec![0; shared.slot_bytes],
            fault_lane: Some(parts.fault),
            bulk_lane: Some(parts.bulk),
            wake,
            windows,
            finished: false,
            reads_a_frame: shared.regions.iter().map(reads_a_frame).max().unwrap_or(1),
            spin: Spin::new(shared.tuning.spin.as_nanos() as u64),
            shared,
        }
    }

    /// Until the engine stops. A failure ends the fetching, not the serving of what is here.
    pub(super) fn run(mut self) {
        while !self.shared.stop.load(Ordering::Acquire) {
            if let Err(failure) = self.rounds() {
                self.fabric_is_over();
                let dead =
                    matches!(failure, PullFailure::VmmGone { .. } | PullFailure::Uffd { .. } | PullFailure::Wait(_));
                self.shared.fail(failure);
                if dead {
                    break;
                }
            }
        }
        self.end();
        signal(&self.shared.ended_fd);
    }

    /// Rounds until told to stop, or until something fails.
    fn rounds(&mut self) -> Result<(), PullFailure> {
        let (mut round, mut idle_since) = (0_u32, None);
        while !self.shared.stop.load(Ordering::Relaxed) {
            let mut busy = self.take_events()?;
            self.post_staged()?;
            busy |= self.poll_lane(LaneOf::Demand)?;
            busy |= self.poll_lane(LaneOf::Bulk)?;
            busy |= self.retry_installs()?;
            if self.staged.is_empty() {
                busy |= self.pull_background()?;
            }
            round = round.wrapping_add(1);
            if round.is_multiple_of(TIMEOUT_ROUNDS) {
                self.check_timeouts()?;
            }
            if busy {
                if let Some(since) = idle_since.take() {
                    self.spin.came_after(self.shared.now_ns() - since);
                }
                continue;
            }
            self.notice_end();
            let now = self.shared.now_ns();
            let idle = now - *idle_since.get_or_insert(now);
            if idle < self.spin.ns() {
                continue;
            }
            if self.slots.demand_in_use()
                && idle < self.pace.awake_ns(self.shared.tuning.demand_awake.as_nanos() as u64)
            {
                // The answer is near. Now and then whoever else wants this CPU has it: a software device's threads, or the peer's on one
                // host. Not in every round: what a yield costs, the fault pays.
                if round.is_multiple_of(YIELD_ROUNDS) {
                    std::thread::yield_now();
                }
                continue;
            }
            self.check_timeouts()?;
            self.sleep(now)?;
        }
        Ok(())
    }

    /// Faults of the backlog first, then what the userfaultfd has. Whether there was anything.
    fn take_events(&mut self) -> Result<bool, PullFailure> {
        for _ in 0..self.backlog.len() {
            if let Some(waiting) = self.backlog.pop_front() {
                self.serve(waiting)?;
            }
        }
        let mut events = [Event::Remove { start: 0, end: 0 }; BATCH];
        let count = self.uffd.read_events(&mut events).map_err(|source| self.uffd_failed(source))?;
        if count == 0 {
            return Ok(false);
        }
        let now = self.shared.now_ns();
        // One that fails must not lose the others: their threads wait too.
        let mut outcome = Ok(());
        for event in &events[..count] {
            let one = self.event(*event, now);
            outcome = outcome.and(one);
        }
        outcome.map(|()| true)
    }

    fn event(&mut self, event: Event, now_ns: u64) -> Result<(), PullFailure> {
        match event {
            Event::Fault { address, kind, write, thread_id } => {
                let Some((region, frame)) = self.locate(address) else {
                    return Err(PullFailure::ForeignFault { shard: self.index, address });
                };
                Counters::add(&self.counters().faults, 1);
                if kind == FaultKind::WriteProtect {
                    return self.write_fault(region, address);
                }
                self.pace.fault(now_ns);
                if let Some(log) = &self.shared.log {
                    let (at_ns, thread) = (now_ns, thread_id);
                    let (region, frame) = (self.shared.regions[region].plan.id, FrameIndex(frame));
                    log.note(self.index, Noted::Fault { at_ns, region, frame, write, thread });
                }
                self.serve(Waiting { region, frame, kind, read_ns: now_ns })
            }
            Event::Remove { start, end } => {
                self.removed(start, end);
                Ok(())
            }
            Event::Unmap { start: address, .. } | Event::Remap { from: address, .. } => {
                Err(PullFailure::Remapped { shard: self.index, address })
            }
        }
    }

    /// The region and frame of an address of the VMM.
    fn locate(&self, address: u64) -> Option<(usize, u64)> {
        let window = self.windows.iter().find(|window| (window.start..window.end).contains(&address))?;
        let region = &self.shared.regions[window.region];
        Some((window.region, (address - region.plan.vmm_address) >> region.shift()))
    }

    /// madvise(2) drops `start..end`. With frames that cannot be shared this is the one word of it; with shared frames it
    /// may be a mere zap, and the MISSING fault (or the guard) tells of a real discard.
    fn removed(&mut self, start: u64, end: u64) {
        for index in 0..self.windows.len() {
            let Window { start: low, end: high, region } = self.windows[index];
            let plan = &self.shared.regions[region];
            if plan.in_place() {
                continue;
            }
            let (from, to) = (start.max(low), end.min(high));
            let frame = |address: u64| (address - plan.plan.vmm_address) >> plan.shift();
            if from < to {
                let whole = frame(from + (plan.plan.page_size.bytes() as u64 - 1))..frame(to);
                for frame in whole.map(FrameIndex) {
                    self.shared.states.discard(region, frame);
                    self.shared.discards.record(region, frame);
                }
            }
        }
    }

    /// Keeps a fault for later, or wakes it to come again when there is no room: a fault is never lost.
    pub(super) fn defer(&mut self, waiting: Waiting) -> Result<(), PullFailure> {
        if self.backlog.len() < BACKLOG {
            self.backlog.push_back(waiting);
            return Ok(());
        }
        Counters::add(&self.counters().sent_back, 1);
        let region = &self.shared.regions[waiting.region];
        let address = region.plan.vmm_address + (waiting.frame << region.shift());
        self.uffd.wake(address, region.plan.page_size.bytes() as u64).map_err(|source| self.uffd_failed(source))
    }

    /// The READs of a slot, into `batch`. Huge frames take several.
    pub(super) fn reads(&self, index: usize, slot: &Slot, batch: &mut Vec<Read>) {
        let region = &self.shared.regions[slot.region];
        let (offset, bytes) = (slot.first << region.shift(), slot.frames << region.shift());
        let (local, local_offset) = match &region.plan.landing {
            LandingPlan::InPlace { key, .. } => (*key, offset),
            LandingPlan::Bounce { key, .. } => (*key, self.bounce_offset(index) as u64),
        };
        let mut done = 0;
        while done < bytes {
            let len = (bytes - done).min(MAX_READ_BYTES);
            batch.push(Read {
                id: index as u64,
                remote: region.plan.remote,
                remote_offset: offset + done,
                local,
                local_offset: local_offset + done,
                len: len as u32,
            });
            done += len;
        }
    }

    /// Where in the bounce buffers a slot's bytes lie.
    pub(super) fn bounce_offset(&self, slot: usize) -> usize {
        (self.index * self.slots.len() + slot) * self.shared.slot_bytes
    }

    /// Posts the demand READs of this round with one call.
    fn post_staged(&mut self) -> Result<(), PullFailure> {
        if self.staged.is_empty() {
            return Ok(());
        }
        let now = self.shared.now_ns();
        for index in self.staged_slots.drain(..) {
            if let Some(slot) = self.slots.get_mut(index) {
                slot.posted_ns = now;
            }
        }
        let Some(lane) = &mut self.fault_lane else { return Ok(()) };
        let posted = lane.post_reads(&self.staged);
        stop_point::reached("demand-posted");
        self.staged.clear();
        posted.map_err(|source| PullFailure::Fabric { shard: self.index, source })
    }

    /// Lands and shows what a lane has completed. Whether there was anything.
    fn poll_lane(&mut self, which: LaneOf) -> Result<bool, PullFailure> {
        let lane = match which {
            LaneOf::Demand => &mut self.fault_lane,
            LaneOf::Bulk => &mut self.bulk_lane,
        };
        let Some(lane) = lane.as_mut().filter(|lane| lane.outstanding() > 0) else { return Ok(false) };
        let mut done = [0; BATCH];
        let count = lane.poll(&mut done).map_err(|source| PullFailure::Fabric { shard: self.index, source })?;
        let now = if count > 0 { self.shared.now_ns() } else { 0 };
        for id in &done[..count] {
            let index = *id as usize;
            let Some(slot) = self.slots.get_mut(index).filter(|slot| slot.lane == which && slot.parts_left > 0) else {
                return Err(PullFailure::UnknownCompletion { id: *id });
            };
            slot.parts_left -= 1;
            if slot.parts_left == 0 {
                slot.completed_ns = now;
                self.land(index);
                stop_point::reached("page-landed");
                self.show(index)?;
            }
        }
        Ok(count > 0)
    }

    /// Slots whose address space was changing. Whether any got further.
    fn retry_installs(&mut self) -> Result<bool, PullFailure> {
        let waiting = self.retry.len();
        for _ in 0..waiting {
            let index = self.retry.swap_remove(0);
            self.show(index)?;
        }
        Ok(self.retry.len() < waiting)
    }

    /// Shows a landed slot; what cannot be shown yet is tried again next round.
    pub(super) fn show(&mut self, index: usize) -> Result<(), PullFailure> {
        match install::show(self, index)? {
            install::Shown::All => self.shown(index),
            install::Shown::Later => self.retry.push(index),
        }
        Ok(())
    }

    /// A slot is done: its latency counts if somebody waited.
    fn shown(&mut self, index: usize) {
        let Some(slot) = self.slots.at(index) else { return };
        if let Some(since) = slot.waited_since_ns {
            let now = self.shared.now_ns();
            let stages = &self.shared.stages[self.index];
            let wire = slot.completed_ns.saturating_sub(slot.posted_ns.max(since));
            stages.queue.record(slot.posted_ns.saturating_sub(since));
            stages.wire.record(wire);
            stages.install.record(now - slot.completed_ns.max(since));
            stages.total.record(now - since);
            self.note_shown(slot.region, slot.first, slot.frames, now);
            if slot.lane == LaneOf::Demand && !slot.zero {
                self.pace.demand_completed(wire);
            }
        }
        if slot.lane == LaneOf::Bulk {
            self.pace.bulk_completed();
        }
        self.slots.remove(index);
    }

    /// Whoever waits for these frames goes on.
    #[inline]
    pub(super) fn note_shown(&self, region: usize, first: u64, frames: u64, at_ns: u64) {
        if let Some(log) = &self.shared.log {
            let (region, first) = (self.shared.regions[region].plan.id, FrameIndex(first));
            log.note(self.index, Noted::Shown { at_ns, region, first, frames });
        }
    }

    /// One background chunk, if there is room and nobody holds it back. Whether one was posted.
    fn pull_background(&mut self) -> Result<bool, PullFailure> {
        if self.sweep.done() {
            return Ok(false);
        }
        let now = self.shared.now_ns();
        if self.shared.background_held_until(now).is_some() {
            self.sweep.skip_settled(&self.shared.states);
            return Ok(false);
        }
        let Some(lane) = &self.bulk_lane else { return Ok(false) };
        let room = lane.window() - lane.outstanding();
        if self.slots.bulk_in_use() >= self.pace.window() || room < self.reads_a_frame || !self.slots.room(LaneOf::Bulk)
        {
            return Ok(false);
        }
        let most = self.pace.chunk_bytes(now);
        match self.sweep.next(&self.shared.regions, &self.shared.states, most) {
            Next::Done => Ok(false),
            Next::Scanning => Ok(true),
            Next::Chunk(chunk) => self.post_chunk(chunk, now).map(|()| true),
        }
    }

    fn post_chunk(&mut self, chunk: Chunk, now_ns: u64) -> Result<(), PullFailure> {
        let slot = Slot {
            lane: LaneOf::Bulk,
            region: chunk.region,
            first: chunk.first,
            frames: chunk.frames,
            parts_left: 0,
            zero: chunk.class == PageClass::Zero,
            landed: false,
            shown: 0,
            waited_since_ns: None,
            posted_ns: now_ns,
            completed_ns: now_ns,
        };
        let index = self.slots.insert(slot);
        if slot.zero {
            self.land(index);
            return self.show(index);
        }
        // The demand stage is empty here (the caller looked), so its buffer serves.
        let mut batch = std::mem::take(&mut self.staged);
        self.reads(index, &slot, &mut batch);
        if let Some(slot) = self.slots.get_mut(index) {
            slot.parts_left = batch.len() as u32;
        }
        let posted = match &mut self.bulk_lane {
            Some(lane) => lane.post_reads(&batch),
            None => Ok(()),
        };
        batch.clear();
        self.staged = batch;
        posted.map_err(|source| PullFailure::Fabric { shard: self.index, source })
    }

    /// The oldest READ that should have completed long ago is a failure.
    fn check_timeouts(&mut self) -> Result<(), PullFailure> {
        let now = self.shared.now_ns();
        let bound = self.shared.tuning.demand_timeout;
        let late = |slot: &Slot| slot.parts_left > 0 && now.saturating_sub(slot.posted_ns) > bound.as_nanos() as u64;
        match self.slots.used().find(|(_, slot)| late(slot)) {
            None => Ok(()),
            Some((_, slot)) => {
                let region = self.shared.regions[slot.region].plan.id;
                Err(PullFailure::ReadTimedOut { shard: self.index, region, frame: slot.first, bound })
            }
        }
    }

    /// Tells once that every frame of this shard is in place.
    fn notice_end(&mut self) {
        if !self.finished && self.sweep.done() && self.slots.idle() && self.shared.states.counts().failed == 0 {
            self.finished = true;
            self.shared.shard_finished();
        }
    }

    /// Sleeps until something can have happened.
    fn sleep(&mut self, now_ns: u64) -> Result<(), PullFailure> {
        if !self.backlog.is_empty() || !self.retry.is_empty() {
            // They wait for another thread to get on; it needs the CPU, and no descriptor tells when it has.
            std::thread::yield_now();
            return Ok(());
        }
        let mut wake_in = IDLE_NS;
        if let Some(until) = self.shared.background_held_until(now_ns) {
            wake_in = wake_in.min(until - now_ns);
        }
        // Before anything is borrowed for the poll. A lane that has completed something meanwhile is polled, not slept on.
        for lane in [&mut self.fault_lane, &mut self.bulk_lane].into_iter().flatten() {
            if lane.outstanding() > 0
                && lane.arm().map_err(|source| PullFailure::Fabric { shard: self.index, source })?
            {
                return Ok(());
            }
        }
        let mut descriptors = [
            PollFd::from_borrowed_fd(self.uffd.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.wake.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.wake.as_fd(), PollFlags::empty()),
            PollFd::from_borrowed_fd(self.wake.as_fd(), PollFlags::empty()),
        ];
        for (lane, descriptor) in [&self.fault_lane, &self.bulk_lane].into_iter().zip(&mut descriptors[2..]) {
            let Some(lane) = lane.as_ref().filter(|lane| lane.outstanding() > 0) else { continue };
            wake_in = wake_in.min(self.shared.tuning.demand_timeout.as_nanos() as u64 / 4);
            match lane.readiness() {
                Some(ready) => *descriptor = PollFd::from_borrowed_fd(ready, PollFlags::IN),
                None => {
                    // A lane that completes while posting and still has something: it can only be polled.
                    std::thread::yield_now();
                    return Ok(());
                }
            }
        }
        let wait = Duration::from_nanos(wake_in);
        let timeout = Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: i64::from(wait.subsec_nanos()) };
        let outcome = poll(&mut descriptors, Some(&timeout));
        drain(&self.wake);
        match outcome {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(PullFailure::Wait(errno.into())),
        }
    }

    /// The lanes are dropped, which flushes them: nothing they had posted can write a frame any more. Only then the
    /// frames are given up as failed.
    fn fabric_is_over(&mut self) {
        self.give_up(|shared, slot| {
            let mut zero = |frame| install::zero_alias(shared, slot.region, frame);
            shared.states.fail_run(slot.region, FrameIndex(slot.first), slot.frames, &mut zero);
        });
    }

    /// As above at an ordinary end: the frames are absent again, for whoever comes next.
    fn end(&mut self) {
        self.give_up(|shared, slot| {
            let mut zero = |frame| install::zero_alias(shared, slot.region, frame);
            shared.states.release_run(slot.region, FrameIndex(slot.first), slot.frames, &mut zero);
        });
    }

    fn give_up(&mut self, how: impl Fn(&Shared, &Slot)) {
        self.fault_lane = None;
        self.bulk_lane = None;
        self.staged.clear();
        self.staged_slots.clear();
        for index in 0..self.slots.len() {
            if let Some(slot) = self.slots.at(index).filter(|slot| !slot.landed) {
                how(&self.shared, &slot);
                self.slots.remove(index);
            }
        }
    }

    pub(super) fn counters(&self) -> &Counters {
        &self.shared.counters[self.index]
    }

    pub(super) fn uffd_failed(&self, source: crate::uffd::UffdError) -> PullFailure {
        PullFailure::Uffd { shard: self.index, source }
    }
}
