//! What the shards, the guard and the handle share: atomics and event descriptors, no locks.

use super::discards::DiscardSet;
use super::histogram::Stages;
use super::log::FaultLog;
use super::plan::{Install, Region, Tuning};
use crate::fabric::FabricError;
use crate::pages::PageStates;
use crate::uffd::{Uffd, UffdError};
use crate::units::{PageIndex, RegionId};
use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// Told from the shards' threads; must return quickly, because faults wait meanwhile.
pub trait Observer: Send + Sync {
    /// Every frame is in place. Once.
    fn all_landed(&self) {}

    /// The engine can no longer fetch pages. Once.
    fn failed(&self, _failure: &PullFailure) {}

    /// A page that had been shown and was lost from the page table is about to be shown again, write-protected ([`Install::Protected`]). It
    /// may have been written before it was lost.
    fn shown_again(&self, _region: RegionId, _page: PageIndex) {}

    /// A frame that had landed is a hole, and is about to be filled with zeroes; this is its first page. Told by whoever meets it first, the
    /// thread that watches the alias included: it must not wait for anybody who may be reading there.
    fn given_up(&self, _region: RegionId, _page: PageIndex) {}

    /// A write to a write-protected page (synchronous tracking). Whether it was taken care of: unless the observer has lifted
    /// the protection through `uffd` and says so, it is [`PullFailure::UnhandledWriteFault`].
    fn write_fault(&self, _uffd: &Uffd, _region: RegionId, _page: PageIndex) -> bool {
        false
    }
}

/// An observer that wants to know nothing.
#[derive(Debug, Clone, Copy)]
pub struct NoObserver;

impl Observer for NoObserver {}

/// Why pages can no longer be fetched. The guest waits at what is absent; it never reads zeroes instead (P1).
#[derive(Debug, thiserror::Error)]
pub enum PullFailure {
    #[error("shard {shard}: a read of {region} frame {frame} has not completed within {bound:?}")]
    ReadTimedOut { shard: usize, region: RegionId, frame: u64, bound: Duration },
    #[error("shard {shard}: the fabric failed")]
    Fabric {
        shard: usize,
        #[source]
        source: FabricError,
    },
    #[error("shard {shard}: userfaultfd failed")]
    Uffd {
        shard: usize,
        #[source]
        source: UffdError,
    },
    #[error("watching the alias for discards failed")]
    Guard(#[source] UffdError),
    #[error("shard {shard}: the VMM or its mapping is gone")]
    VmmGone { shard: usize },
    #[error("shard {shard}: a fault at {address:#x}, which is none of its ranges")]
    ForeignFault { shard: usize, address: u64 },
    #[error("shard {shard}: nobody handles the write-protect fault at {address:#x}")]
    UnhandledWriteFault { shard: usize, address: u64 },
    #[error("shard {shard}: the VMM unmapped or moved guest memory at {address:#x}")]
    Remapped { shard: usize, address: u64 },
    #[error("the lane handed back read {id}, which was never posted")]
    UnknownCompletion { id: u64 },
    #[error("waiting for events failed")]
    Wait(#[source] std::io::Error),
}

/// One shard's counters; it alone writes them.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct Counters {
    pub faults: AtomicU64,
    pub demand_reads: AtomicU64,
    pub bytes_pulled: AtomicU64,
    pub zero_frames: AtomicU64,
    pub shown_again: AtomicU64,
    pub sent_back: AtomicU64,
}

impl Counters {
    /// Adds to a counter of which the caller is the only writer.
    #[inline]
    pub(super) fn add(counter: &AtomicU64, amount: u64) {
        counter.store(counter.load(Ordering::Relaxed) + amount, Ordering::Relaxed);
    }
}

/// How far the pull is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct Progress {
    pub frames: u64,
    pub absent: u64,
    pub in_flight: u64,
    pub landed: u64,
    pub discarded: u64,
    pub failed: u64,
    /// Of those landed, the ones that were zero and never read.
    pub zero_frames: u64,
    /// Bytes read over the fabric.
    pub bytes_pulled: u64,
    /// Fault events handled, of every kind.
    pub faults: u64,
    /// READs posted for a fault.
    pub demand_reads: u64,
    /// Faults at frames that were there already (zapped, or two threads at one page).
    pub shown_again: u64,
    /// Faults woken to come again because the backlog was full.
    pub sent_back: u64,
}

pub(super) struct Shared {
    pub states: Arc<PageStates>,
    pub regions: Vec<Region>,
    pub install: Install,
    pub tuning: Tuning,
    pub slot_bytes: usize,
    pub discards: DiscardSet,
    pub observer: Arc<dyn Observer>,
    pub log: Option<Arc<FaultLog>>,
    pub failure: OnceLock<Arc<PullFailure>>,
    pub counters: Vec<Counters>,
    pub stages: Vec<Stages>,
    pub epoch: Instant,
    pub paused: AtomicBool,
    /// Nanoseconds after `epoch` until which the background holds still.
    pub paused_until_ns: AtomicU64,
    pub stop: AtomicBool,
    /// Shards with frames still to come.
    pub unfinished: AtomicUsize,
    pub landed_fd: OwnedFd,
    pub failed_fd: OwnedFd,
    /// Counts threads that have ended.
    pub ended_fd: OwnedFd,
}

impl Shared {
    /// Nanoseconds since the engine started.
    #[inline]
    pub(super) fn now_ns(&self) -> u64 {
        self.epoch.elapsed().as_nanos() as u64
    }

    /// When the background may go on; `None`: now.
    #[inline]
    pub(super) fn background_held_until(&self, now_ns: u64) -> Option<u64> {
        if self.paused.load(Ordering::Relaxed) || self.failure.get().is_some() {
            return Some(u64::MAX);
        }
        if let Some(hold) = self.tuning.hold_at_landed
            && self.states.counts().landed >= hold
        {
            return Some(u64::MAX);
        }
        let until = self.paused_until_ns.load(Ordering::Relaxed);
        (until > now_ns).then_some(until)
    }

    /// Keeps the first failure and tells everybody.
    pub(super) fn fail(&self, failure: PullFailure) {
        let failure = Arc::new(failure);
        if self.failure.set(failure.clone()).is_ok() {
            signal(&self.failed_fd);
            self.observer.failed(&failure);
        }
    }

    /// One more shard has all its frames.
    pub(super) fn shard_finished(&self) {
        if self.unfinished.fetch_sub(1, Ordering::AcqRel) == 1 {
            signal(&self.landed_fd);
            self.observer.all_landed();
        }
    }

    pub(super) fn progress(&self) -> Progress {
        let counts = self.states.counts();
        let mut progress = Progress {
            frames: self.regions.iter().map(|region| region.frames).sum(),
            absent: counts.absent,
            in_flight: counts.in_flight,
            landed: counts.landed,
            discarded: counts.discarded,
            failed: counts.failed,
            ..Progress::default()
        };
        for shard in &self.counters {
            let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
            progress.zero_frames += read(&shard.zero_frames);
            progress.bytes_pulled += read(&shard.bytes_pulled);
            progress.faults += read(&shard.faults);
            progress.demand_reads += read(&shard.demand_reads);
            progress.shown_again += read(&shard.shown_again);
            progress.sent_back += read(&shard.sent_back);
        }
        progress
    }
}

/// A new event descriptor, not signalled.
pub(super) fn event() -> std::io::Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

/// Adds one. The counter cannot overflow by anything we do, so an error leaves it readable all the same.
pub(super) fn signal(event: &OwnedFd) {
    let _ = rustix::io::write(event, &1_u64.to_ne_bytes());
}

/// Takes the counter back to zero; what it was.
pub(super) fn drain(event: &OwnedFd) -> u64 {
    let mut count = [0; 8];
    match rustix::io::read(event, &mut count) {
        Ok(8) => u64::from_ne_bytes(count),
        _ => 0,
    }
}
