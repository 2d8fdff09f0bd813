//! A lane in memory whose completions a test holds back, lets go, or turns into failures; as told, it wakes only who has armed it, and
//! its READs go where a NIC's would.

use crate::deadline::Deadline;
use crate::fabric::{FabricError, Lane, LaneId, LaneKind, Read, Write};
use crate::pull::shared::{drain, event, signal};
use crate::region::Mapping;
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// How a test steers its lanes.
pub struct Control {
    /// READs that may still complete.
    permits: AtomicU64,
    failing: AtomicBool,
    ready: OwnedFd,
    posted: Mutex<Vec<Read>>,
    /// As with verbs: a completion makes the descriptor readable only if the lane was armed before.
    must_arm: AtomicBool,
    armed: AtomicBool,
    /// Permits that come while the lane is being armed, after the engine's last poll.
    while_arming: AtomicU64,
    /// Times that arming found something completed.
    found_arming: AtomicU64,
    /// As with pinned frames: a READ goes to the frame that was there when the lane was made, not to the one that is there now.
    pinned: Mutex<Option<PinnedFrames>>,
}

/// Frames that a NIC would hold: for each, whether it is still the file's. What is written to another is seen by nobody.
pub type PinnedFrames = Box<dyn Fn(u64) -> bool + Send>;

impl Control {
    /// Lets `permits` READs complete (u64::MAX: all).
    pub fn new(permits: u64) -> Arc<Self> {
        Arc::new(Self {
            permits: AtomicU64::new(permits),
            failing: AtomicBool::new(false),
            ready: event().unwrap(),
            posted: Mutex::new(Vec::new()),
            must_arm: AtomicBool::new(false),
            armed: AtomicBool::new(false),
            while_arming: AtomicU64::new(0),
            found_arming: AtomicU64::new(0),
            pinned: Mutex::new(None),
        })
    }

    /// From now on completions wake only who has armed the lane. `while_arming` permits come at the next arming, just in time not to
    /// be told.
    pub fn must_arm(&self, while_arming: u64) {
        self.while_arming.store(while_arming, Ordering::Release);
        self.must_arm.store(true, Ordering::Release);
    }

    /// How often arming said that there is something to poll.
    pub fn found_arming(&self) -> u64 {
        self.found_arming.load(Ordering::Acquire)
    }

    /// Whether the engine has armed the lane since its last completion.
    pub fn is_armed(&self) -> bool {
        self.armed.load(Ordering::Acquire)
    }

    /// From now on READs land in frames that were pinned.
    pub fn pin(&self, frames: PinnedFrames) {
        *self.pinned.lock().unwrap() = Some(frames);
    }

    /// As a completion tells: who has armed is woken, once.
    fn tell(&self) {
        if !self.must_arm.load(Ordering::Acquire) || self.armed.swap(false, Ordering::AcqRel) {
            signal(&self.ready);
        }
    }

    pub fn allow(&self, permits: u64) {
        self.permits.store(permits, Ordering::Release);
        self.tell();
    }

    pub fn fail(&self) {
        self.failing.store(true, Ordering::Release);
        self.tell();
    }

    /// Everything posted so far.
    pub fn posted(&self) -> Vec<Read> {
        self.posted.lock().unwrap().clone()
    }
}

pub struct MemoryLane {
    id: LaneId,
    source: Arc<Mapping>,
    local: Arc<Mapping>,
    control: Arc<Control>,
    queue: VecDeque<Read>,
    window: usize,
}

impl MemoryLane {
    pub fn new(kind: LaneKind, source: &Arc<Mapping>, local: &Arc<Mapping>, control: &Arc<Control>) -> Box<Self> {
        Box::new(Self {
            id: LaneId { kind, index: 0 },
            source: source.clone(),
            local: local.clone(),
            control: control.clone(),
            queue: VecDeque::new(),
            window: 64,
        })
    }
}

impl MemoryLane {
    /// A part of a READ, into the mapping.
    fn land(&self, read: &Read, part: std::ops::Range<usize>) {
        let (to, from) = (read.local_offset as usize + part.start, read.remote_offset as usize + part.start);
        self.local.copy_from(to, &self.source, from, part.len());
    }
}

impl Lane for MemoryLane {
    fn id(&self) -> LaneId {
        self.id
    }

    fn window(&self) -> usize {
        self.window
    }

    fn outstanding(&self) -> usize {
        self.queue.len()
    }

    fn post_reads(&mut self, batch: &[Read]) -> Result<(), FabricError> {
        if self.queue.len() + batch.len() > self.window {
            let (asked, outstanding, window) = (batch.len(), self.queue.len(), self.window);
            return Err(FabricError::WindowFull { asked, outstanding, window });
        }
        self.control.posted.lock().unwrap().extend_from_slice(batch);
        self.queue.extend(batch);
        self.control.tell();
        Ok(())
    }

    fn post_writes(&mut self, _: &[Write]) -> Result<(), FabricError> {
        Err(FabricError::Broken { lane: self.id })
    }

    fn poll(&mut self, done: &mut [u64]) -> Result<usize, FabricError> {
        drain(&self.control.ready);
        if self.control.failing.load(Ordering::Acquire) {
            return Err(FabricError::PeerClosed { lane: self.id });
        }
        let mut count = 0;
        while count < done.len() && !self.queue.is_empty() {
            let permit = |left: u64| if left == u64::MAX { Some(left) } else { left.checked_sub(1) };
            if self.control.permits.fetch_update(Ordering::AcqRel, Ordering::Acquire, permit).is_err() {
                break;
            }
            let read = self.queue.pop_front().unwrap();
            match &*self.control.pinned.lock().unwrap() {
                None => self.land(&read, 0..read.len as usize),
                Some(frames) => {
                    for at in (0..read.len as usize).step_by(4096) {
                        if frames((read.local_offset as usize + at) as u64 / 4096) {
                            self.land(&read, at..at + 4096);
                        }
                    }
                }
            }
            done[count] = read.id;
            count += 1;
        }
        Ok(count)
    }

    fn arm(&mut self) -> Result<bool, FabricError> {
        self.control.armed.store(true, Ordering::Release);
        let late = self.control.while_arming.swap(0, Ordering::AcqRel);
        if late > 0 {
            self.control.permits.store(late, Ordering::Release);
        }
        let completed = !self.queue.is_empty() && self.control.permits.load(Ordering::Acquire) > 0;
        if completed && self.control.must_arm.load(Ordering::Acquire) {
            self.control.found_arming.fetch_add(1, Ordering::AcqRel);
        }
        Ok(completed)
    }

    fn readiness(&self) -> Option<BorrowedFd<'_>> {
        Some(self.control.ready.as_fd())
    }

    fn wait(&mut self, _: Deadline) -> Result<(), FabricError> {
        Err(FabricError::Broken { lane: self.id })
    }

    fn commit(&mut self, _: &Write, _: Deadline) -> Result<(), FabricError> {
        Err(FabricError::Broken { lane: self.id })
    }
}
