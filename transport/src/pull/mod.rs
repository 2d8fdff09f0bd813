//! The pull engine: serves a guest's page faults from the source and pulls the rest in the background.
//!
//! One thread a shard, run to completion. The rules it keeps, and where:
//! * A guest never reads a page that has not arrived (P1): a fault on an absent frame is answered only by the frame's own
//!   bytes. When the fabric fails the guest waits. (`serve`)
//! * Landed is published before a page is shown, so that a harvest never misses a write. (`install`)
//! * A READ covers only frames claimed for it. (`sweep`, [`crate::pages`])
//! * Where RAM was allocated up front a missing frame is a discard, in any state, whoever notices it. (`serve`, `guard`)
//! * Nothing on the fault path allocates, locks or hands over. (`shard`)

mod discards;
mod guard;
mod histogram;
mod install;
mod log;
mod pace;
mod plan;
mod serve;
mod shard;
mod shared;
mod slots;
mod sweep;

pub use histogram::Latencies;
pub use log::{FaultLog, Noted, Overrun};
pub use plan::{
    ClassRun, Install, LandingPlan, MAX_READ_BYTES, PageClass, PlanError, PullPlan, RegionPlan, ShardParts, ShardRange,
    Tuning,
};
pub use shared::{NoObserver, Observer, Progress, PullFailure};

use crate::deadline::Deadline;
use crate::pages::{PageStates, State};
use crate::units::{FrameIndex, PageIndex, RegionId};
pub use discards::Discard;
use discards::DiscardSet;
use guard::Guard;
use histogram::Stages;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use shard::Shard;
use shared::{Counters, Shared, drain, event, signal};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A running engine. Dropping it without [`Engine::stop`] tells its threads to end and does not wait for them.
pub struct Engine {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    wakes: Vec<Arc<OwnedFd>>,
}

/// Why waiting for the last page ended otherwise.
#[derive(Debug, thiserror::Error)]
pub enum WaitError {
    #[error("{} of {} frames have not landed in time", .0.absent + .0.in_flight, .0.frames)]
    TimedOut(Progress),
    #[error("the pull failed")]
    Failed(#[source] Arc<PullFailure>),
}

/// The engine's threads did not end in time. They end on their own; until then their lanes stay open.
#[derive(Debug, thiserror::Error)]
#[error("{running} of the pull engine's threads have not ended in time")]
pub struct StopError {
    pub running: usize,
}

/// What an engine did.
#[derive(Debug)]
pub struct Stats {
    pub latencies: Latencies,
    pub progress: Progress,
    pub failure: Option<Arc<PullFailure>>,
}

impl Engine {
    /// Checks the plan, watches the aliases for discards and starts a thread a shard. Guest memory has been registered by
    /// the VMM: MISSING|MINOR for in-place landings (REMOVE events not asked for, or ignored), MISSING with REMOVE events for
    /// bounce landings. Wherever `states` has frames an earlier page server left, it goes on from them.
    pub fn start(
        plan: PullPlan,
        shards: Vec<ShardParts>,
        states: Arc<PageStates>,
        observer: Arc<dyn Observer>,
    ) -> Result<Self, PlanError> {
        let (install, tuning, slot_bytes) = (plan.install, plan.tuning, plan.slot_bytes());
        let (start_paused, log) = (plan.start_paused, plan.log.clone());
        let regions = plan::check(plan, &shards, &states)?;
        let failed = |doing| move |source| PlanError::Io { doing, source };
        let eventfd = || event().map_err(failed("eventfd"));
        let shared = Arc::new(Shared {
            discards: DiscardSet::new(&regions),
            regions,
            states,
            install,
            tuning,
            slot_bytes,
            observer,
            log,
            failure: OnceLock::new(),
            counters: shards.iter().map(|_| Counters::default()).collect(),
            stages: shards.iter().map(|_| Stages::new()).collect(),
            epoch: Instant::now(),
            paused: AtomicBool::new(start_paused),
            paused_until_ns: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            unfinished: AtomicUsize::new(shards.len()),
            landed_fd: eventfd()?,
            failed_fd: eventfd()?,
            ended_fd: eventfd()?,
        });
        settle_left_discards(&shared);
        wake_left_faults(&shared, &shards)?;
        let mut engine = Self { shared, threads: Vec::with_capacity(shards.len() + 1), wakes: Vec::new() };
        let wake = Arc::new(eventfd()?);
        if let Some(guard) = Guard::new(engine.shared.clone(), wake.clone()).map_err(PlanError::Guard)? {
            engine.spawn("pull-guard".into(), wake, move || guard.run())?;
        }
        for (index, parts) in shards.into_iter().enumerate() {
            let wake = Arc::new(eventfd()?);
            let core = parts.core;
            let shard = Shard::new(index, parts, engine.shared.clone(), wake.clone());
            engine.spawn(format!("pull-{index}"), wake, move || {
                if let Some(id) = core {
                    // It was there when the plan was checked; a core taken away since costs speed and nothing else.
                    core_affinity::set_for_current(core_affinity::CoreId { id });
                }
                shard.run();
            })?;
        }
        Ok(engine)
    }

    fn spawn(
        &mut self,
        name: String,
        wake: Arc<OwnedFd>,
        run: impl FnOnce() + Send + 'static,
    ) -> Result<(), PlanError> {
        let thread = std::thread::Builder::new().name(name).spawn(run);
        self.threads.push(thread.map_err(|source| PlanError::Io { doing: "starting a thread", source })?);
        self.wakes.push(wake);
        Ok(())
    }

    /// How far it is. Cheap; reads counters.
    pub fn progress(&self) -> Progress {
        self.shared.progress()
    }

    /// Fault latencies so far.
    pub fn latencies(&self) -> Latencies {
        Latencies::merged(self.shared.stages.iter())
    }

    /// Event read to page shown, in nanoseconds, to two digits: cheap enough to be asked for many times a second.
    pub fn fault_latency(&self) -> hdrhistogram::Histogram<u64> {
        Latencies::total_of(self.shared.stages.iter())
    }

    /// Whether a page's content is the guest's by now: landed, or given up.
    pub fn landed(&self, region: RegionId, page: PageIndex) -> bool {
        let Some(index) = self.shared.states.index_of(region) else { return false };
        let region = &self.shared.regions[index];
        let frame = page.frame(region.plan.page_size);
        let state = |frame: FrameIndex| self.shared.states.state_at(index, frame);
        frame.0 < region.frames && matches!(state(frame), State::Landed | State::Discarded)
    }

    /// The source has found frames of `region` to be zero that the plan has for its content: from `first` on those whose bit is set, lowest
    /// first. They are not read any more. `None` if there are no such frames.
    pub fn are_zero(&self, region: RegionId, first: FrameIndex, bitmap: &[u8]) -> Option<u64> {
        let region = &self.shared.regions[self.shared.states.index_of(region)?];
        // A bit more than there are frames may only be the last byte's.
        let within =
            first.0.checked_add(bitmap.len() as u64 * 8).is_some_and(|end| end < region.frames.saturating_add(8));
        within.then(|| region.classes.are_zero(first.0, bitmap))
    }

    /// The page states, for whoever harvests.
    pub fn states(&self) -> &Arc<PageStates> {
        &self.shared.states
    }

    /// Takes the pages that the guest gave up, or may have given up, since the last call. No discard is ever left out.
    pub fn take_discards(&self, f: &mut dyn FnMut(Discard)) {
        self.shared.discards.take(f);
    }

    /// Only faults are served from now on.
    pub fn pause_background(&self) {
        self.shared.paused.store(true, Ordering::Relaxed);
    }

    /// The background goes on, also when it was paused until a certain time.
    pub fn resume_background(&self) {
        self.shared.paused.store(false, Ordering::Relaxed);
        self.shared.paused_until_ns.store(0, Ordering::Relaxed);
        self.wake();
    }

    /// Only faults are served until `until`; then the background goes on by itself.
    pub fn pause_background_until(&self, until: Deadline) {
        let until = until.instant().saturating_duration_since(self.shared.epoch).as_nanos() as u64;
        self.shared.paused_until_ns.store(until, Ordering::Relaxed);
    }

    /// Why pages can no longer be fetched, if so.
    pub fn failure(&self) -> Option<Arc<PullFailure>> {
        self.shared.failure.get().cloned()
    }

    /// Polls readable from the moment that every page is in place. Not to be read.
    pub fn all_landed_fd(&self) -> BorrowedFd<'_> {
        self.shared.landed_fd.as_fd()
    }

    /// Polls readable from the moment that [`Engine::failure`] is there. Not to be read.
    pub fn failure_fd(&self) -> BorrowedFd<'_> {
        self.shared.failed_fd.as_fd()
    }

    /// Waits until every page is in place: the guest's mapping then needs no userfaultfd any more.
    pub fn wait_all_landed(&self, deadline: Deadline) -> Result<(), WaitError> {
        loop {
            let mut descriptors = [self.all_landed_fd(), self.failure_fd()]
                .map(|descriptor| PollFd::from_borrowed_fd(descriptor, PollFlags::IN));
            // A failed poll is an interrupted one; the deadline bounds how often.
            let _ = poll(&mut descriptors, Some(&timespec(deadline.left())));
            let [landed, failed] = descriptors.map(|descriptor| descriptor.revents().contains(PollFlags::IN));
            match (landed, self.failure().filter(|_| failed)) {
                (true, _) => return Ok(()),
                (false, Some(failure)) => return Err(WaitError::Failed(failure)),
                (false, None) if deadline.expired() => return Err(WaitError::TimedOut(self.progress())),
                (false, None) => {}
            }
        }
    }

    /// As [`Engine::stop`], and takes the discards that came until the very end ([`Engine::take_discards`]).
    pub fn stop_and_take(self, deadline: Deadline, f: &mut dyn FnMut(Discard)) -> Result<Stats, StopError> {
        let shared = self.shared.clone();
        let stats = self.stop(deadline)?;
        shared.discards.take(f);
        Ok(stats)
    }

    /// Ends the engine: lanes are dropped, frames still in flight are absent again, threads joined.
    pub fn stop(mut self, deadline: Deadline) -> Result<Stats, StopError> {
        self.shared.stop.store(true, Ordering::Release);
        self.wake();
        let mut running = self.threads.len();
        while running > 0 {
            let mut descriptors = [PollFd::new(&self.shared.ended_fd, PollFlags::IN)];
            let _ = poll(&mut descriptors, Some(&timespec(deadline.left())));
            running = running.saturating_sub(drain(&self.shared.ended_fd) as usize);
            if running > 0 && deadline.expired() {
                return Err(StopError { running });
            }
        }
        for thread in self.threads.drain(..) {
            // They have signalled their end as the last thing they did.
            thread.join().expect("a pull thread ends only after it has said so");
        }
        Ok(Stats { latencies: self.latencies(), progress: self.progress(), failure: self.failure() })
    }

    fn wake(&self) {
        self.wakes.iter().for_each(|wake| signal(wake));
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.wake();
    }
}

/// Discards that were wanted when an earlier page server died: its READ is over, the frame may hold the source's bytes, and
/// nobody has seen it.
fn settle_left_discards(shared: &Shared) {
    for (index, region) in shared.regions.iter().enumerate() {
        for frame in (0..region.frames).map(FrameIndex) {
            if shared.states.state_at(index, frame) == State::DiscardWanted {
                install::zero_alias(shared, index, frame);
                shared.states.settle_discard(index, frame);
                shared.discards.record(index, frame);
            }
        }
    }
}

/// Faults that an earlier page server had read and not answered are in no queue any more: whoever waits is woken, and comes again.
fn wake_left_faults(shared: &Shared, shards: &[ShardParts]) -> Result<(), PlanError> {
    for parts in shards {
        for range in &parts.ranges {
            let region = shared.regions.iter().find(|region| region.plan.id == range.region);
            let Some(region) = region else { continue };
            let (first, frames) = (range.frames.start, range.frames.end - range.frames.start);
            let start = region.plan.vmm_address + (first << region.shift());
            parts.uffd.wake(start, frames << region.shift()).map_err(PlanError::Wake)?;
        }
    }
    Ok(())
}

fn timespec(duration: Duration) -> Timespec {
    Timespec { tv_sec: duration.as_secs() as i64, tv_nsec: i64::from(duration.subsec_nanos()) }
}

#[cfg(test)]
mod tests;
