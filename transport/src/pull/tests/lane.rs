//! A lane in memory whose completions a test holds back, lets go, or turns into failures.

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
}

impl Control {
    /// Lets `permits` READs complete (u64::MAX: all).
    pub fn new(permits: u64) -> Arc<Self> {
        Arc::new(Self {
            permits: AtomicU64::new(permits),
            failing: AtomicBool::new(false),
            ready: event().unwrap(),
            posted: Mutex::new(Vec::new()),
        })
    }

    pub fn allow(&self, permits: u64) {
        self.permits.store(permits, Ordering::Release);
        signal(&self.ready);
    }

    pub fn fail(&self) {
        self.failing.store(true, Ordering::Release);
        signal(&self.ready);
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
        signal(&self.control.ready);
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
            self.local.copy_from(
                read.local_offset as usize,
                &self.source,
                read.remote_offset as usize,
                read.len as usize,
            );
            done[count] = read.id;
            count += 1;
        }
        Ok(count)
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
