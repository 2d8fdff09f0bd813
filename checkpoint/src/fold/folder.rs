//! The source's background thread while it serves: takes segments out of the ring, folds committed records, answers heartbeats.

use super::catch::Catch;
use super::{FoldError, FoldState};
use crate::clock::boottime_ns;
use crate::guest::Epoch;
use crate::ring::{HEARTBEAT_OFFSET, OwnerRegion, RingReader, Step};
use belay_transport::Deadline;
use belay_transport::region::Mapping;
use belay_transport::stop_point::{is_awaited, reached};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Until what this host had no room for is tried again.
const SHORTAGE_AGAIN: Duration = Duration::from_millis(200);

/// How the folder behaves.
#[derive(Debug, Clone, Copy)]
pub struct FoldConfig {
    /// How long it sleeps when the ring holds nothing new, and had something new a moment ago.
    pub idle: Duration,
    /// Length of the lease it grants for each heartbeat it sees.
    pub lease: Duration,
    /// Whether it grants from the start; see [`Folder::set_granting`].
    pub granting: bool,
}

impl Default for FoldConfig {
    fn default() -> Self {
        Self { idle: Duration::from_millis(1), lease: Duration::from_secs(1), granting: true }
    }
}

/// What the folder has heard of the destination. Times are CLOCK_BOOTTIME in ns, of this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heard {
    /// Heartbeat counter last seen.
    pub counter: u64,
    /// When it was seen to change; when the folder started, before it first did.
    pub changed_at_ns: u64,
    /// When the folder last looked. A caller that means to declare the destination dead first makes sure that this is recent:
    /// a source that has stalled has not listened.
    pub looked_at_ns: u64,
}

/// Where folding stands.
#[derive(Debug, Clone)]
pub struct FoldStatus {
    /// Newest epoch known to have committed.
    pub committed: Epoch,
    /// Newest epoch in guest RAM.
    pub folded: Epoch,
    /// Pages folded since the switch.
    pub folded_pages: u64,
    /// Ring bytes taken since the session began.
    pub consumed: u64,
    /// Why it stopped by itself, if it did.
    pub failed: Option<FoldError>,
    /// What this host lacks room for at the moment, on a disk's image or in memory: the epoch waits, and is tried again and again.
    pub stuck: Option<FoldError>,
}

#[derive(Debug)]
struct Shared {
    status: Mutex<FoldStatus>,
    changed: Condvar,
    /// Woken to stop.
    parked: Condvar,
    stop: AtomicBool,
    held: AtomicBool,
    /// Taken while a segment is.
    turn: Mutex<()>,
    granting: AtomicBool,
    counter: AtomicU64,
    changed_at_ns: AtomicU64,
    looked_at_ns: AtomicU64,
}

impl Shared {
    fn status(&self) -> MutexGuard<'_, FoldStatus> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The running folder. Stop it ([`Folder::stop`]) before the session is revoked: `local` takes the ring's file away under it.
#[derive(Debug)]
pub struct Folder {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<(RingReader, FoldState)>>,
}

impl Folder {
    /// Starts folding what arrives in `ring` into `state`, and granting leases.
    pub fn start(
        config: FoldConfig,
        ring: Arc<Mapping>,
        owner: OwnerRegion,
        reader: RingReader,
        state: FoldState,
    ) -> std::io::Result<Self> {
        let work = Work::new(config, ring, owner, reader, state);
        let shared = work.shared.clone();
        let thread = std::thread::Builder::new().name("belay-fold".into()).spawn(move || work.run())?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Where folding stands.
    pub fn status(&self) -> FoldStatus {
        self.shared.status().clone()
    }

    /// What was heard of the destination.
    pub fn heard(&self) -> Heard {
        Heard {
            counter: self.shared.counter.load(Ordering::Acquire),
            changed_at_ns: self.shared.changed_at_ns.load(Ordering::Acquire),
            looked_at_ns: self.shared.looked_at_ns.load(Ordering::Acquire),
        }
    }

    /// Stops granting leases (or grants them again). Heartbeats are still listened to.
    pub fn set_granting(&self, granting: bool) {
        self.shared.granting.store(granting, Ordering::Release);
    }

    /// Stops taking anything out of the ring (or goes on). When this returns nothing is being folded; heartbeats are still answered.
    pub fn hold(&self, held: bool) {
        self.shared.held.store(held, Ordering::Release);
        drop(self.shared.turn.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Waits until `epoch` is folded, folding has failed or `deadline` has passed; where folding stands then.
    pub fn wait_folded(&self, epoch: Epoch, deadline: Deadline) -> FoldStatus {
        let mut status = self.shared.status();
        while status.folded < epoch && status.failed.is_none() && !deadline.expired() {
            let wait = self.shared.changed.wait_timeout(status, deadline.left());
            status = wait.unwrap_or_else(PoisonError::into_inner).0;
        }
        status.clone()
    }

    /// Stops the thread (at most one record's folding later) and hands over for the catch. The ring is not looked at after this.
    pub fn stop(mut self) -> Catch {
        let began = Instant::now();
        let thread = self.thread.take().expect("taken here and in drop only");
        self.signal();
        let (reader, state) = match thread.join() {
            Ok(done) => done,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        let failed = self.shared.status().failed.clone();
        Catch::new(reader, state, failed, began.elapsed())
    }

    fn signal(&self) {
        self.shared.stop.store(true, Ordering::Release);
        // The lock is taken so that the thread is either before its look at `stop` or already parked.
        let _status = self.shared.status();
        self.shared.parked.notify_all();
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.signal();
            // A panic in there has been printed; there is nobody to hand it to.
            let _ = thread.join();
        }
    }
}

/// With nothing new for so many sleeps it sleeps longer, up to so many times as long. A catch wakes it; an epoch that comes then has committed
/// before it is seen. Where there are disks, output waits for their images, and it stays awake.
const QUIET_AFTER: u32 = 50;
const QUIET: u32 = 20;

/// The epoch after which all is left to the last read, where a process is to stop in that.
const LEFT_AFTER: u64 = 2;

struct Work {
    config: FoldConfig,
    ring: Arc<Mapping>,
    owner: OwnerRegion,
    reader: RingReader,
    state: FoldState,
    shared: Arc<Shared>,
    /// When an image that could not be written is tried again.
    again: Option<Instant>,
    /// Sleeps since there was something new.
    quiet: u32,
}

impl Work {
    fn new(config: FoldConfig, ring: Arc<Mapping>, owner: OwnerRegion, reader: RingReader, state: FoldState) -> Self {
        let now = boottime_ns();
        let counter = ring.load_u64(HEARTBEAT_OFFSET, Ordering::Acquire);
        let status = FoldStatus {
            committed: reader.committed(),
            folded: state.epoch(),
            folded_pages: state.folded_pages(),
            consumed: reader.consumed(),
            failed: None,
            stuck: None,
        };
        let shared = Arc::new(Shared {
            status: Mutex::new(status),
            changed: Condvar::new(),
            parked: Condvar::new(),
            stop: AtomicBool::new(false),
            held: AtomicBool::new(false),
            turn: Mutex::new(()),
            granting: AtomicBool::new(config.granting),
            counter: AtomicU64::new(counter),
            changed_at_ns: AtomicU64::new(now),
            looked_at_ns: AtomicU64::new(now),
        });
        Self { config, ring, owner, reader, state, shared, again: None, quiet: 0 }
    }

    fn run(mut self) -> (RingReader, FoldState) {
        let mut failed = false;
        while !self.shared.stop.load(Ordering::Acquire) {
            let heard = self.shared.changed_at_ns.load(Ordering::Relaxed);
            listen(&self.ring, &self.owner, &self.shared, self.config.lease);
            let since = self.shared.changed_at_ns.load(Ordering::Relaxed).saturating_sub(heard);
            if u128::from(since) > self.config.lease.as_nanos() / 4 {
                // Somebody was stopped, and is about to renew a lease that has little left.
                self.quiet = 0;
            }
            match if failed { Ok(false) } else { self.turn() } {
                Ok(true) => self.quiet = 0,
                Ok(false) => self.park(),
                Err(error) if error.is_shortage() => {
                    // Storage and memory fill up and are given room again. The record is complete, and the next step brings it again.
                    self.again = Some(Instant::now() + SHORTAGE_AGAIN);
                    self.shared.status().stuck = Some(error);
                }
                Err(error) => {
                    // Heartbeats are still answered: who runs the guest is decided above, from what this status says.
                    failed = true;
                    self.owner.set_refused();
                    self.shared.status().failed = Some(error);
                    self.shared.changed.notify_all();
                }
            }
        }
        (self.reader, self.state)
    }

    fn turn(&mut self) -> Result<bool, FoldError> {
        let shared = Arc::clone(&self.shared);
        let _turn = shared.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let waits = self.again.is_some_and(|again| Instant::now() < again);
        if waits || shared.held.load(Ordering::Acquire) || self.leaves_it() { Ok(false) } else { self.step() }
    }

    /// Who waits for the last read in the midst of a fold needs one there, and a folder that keeps up leaves none.
    fn leaves_it(&self) -> bool {
        is_awaited("catch-folding") && self.state.epoch() >= Epoch(LEFT_AFTER)
    }

    /// Takes one segment, and folds if it completes a record; whether there was one.
    fn step(&mut self) -> Result<bool, FoldError> {
        let step = self.reader.step(&*self.ring)?;
        if step == Step::NotYet {
            return Ok(false);
        }
        // The segment lies in private memory: its room is free before folding, which takes longer.
        let consumed = self.reader.consumed();
        self.owner.set_consumed(consumed);
        {
            let mut status = self.shared.status();
            status.consumed = consumed;
            status.committed = self.reader.committed();
        }
        if let (Step::Committed(_), Some(image)) = (step, self.reader.record()) {
            let (ring, owner, shared, lease) = (&self.ring, &self.owner, &self.shared, self.config.lease);
            reached("fold-begun");
            self.state.fold(image, || listen(ring, owner, shared, lease))?;
            reached("fold-done");
            self.reader.clear();
            self.owner.set_folded(self.state.epoch());
            self.owner.set_applied(self.state.epoch());
            let mut status = self.shared.status();
            status.folded = self.state.epoch();
            status.stuck = None;
            status.folded_pages = self.state.folded_pages();
            self.shared.changed.notify_all();
        }
        Ok(true)
    }

    fn park(&mut self) {
        self.quiet = self.quiet.saturating_add(1);
        let (longer, shortest) = (self.config.idle * QUIET, self.config.idle);
        // A heartbeat is answered when it is seen: that must stay a small part of the lease.
        let quiet = self.quiet > QUIET_AFTER && !self.state.has_disks();
        let sleep = if quiet { longer.min(self.config.lease / 50).max(shortest) } else { shortest };
        let status = self.shared.status();
        if !self.shared.stop.load(Ordering::Acquire) {
            let _ = self.shared.parked.wait_timeout(status, sleep);
        }
    }
}

/// Looks at the heartbeat counter and grants the lease for it if it moved.
fn listen(ring: &Mapping, owner: &OwnerRegion, shared: &Shared, lease: Duration) {
    let now = boottime_ns();
    let counter = ring.load_u64(HEARTBEAT_OFFSET, Ordering::Acquire);
    if counter != shared.counter.load(Ordering::Relaxed) {
        shared.counter.store(counter, Ordering::Release);
        shared.changed_at_ns.store(now, Ordering::Release);
        if shared.granting.load(Ordering::Acquire) {
            owner.grant(counter, lease);
        }
    }
    shared.looked_at_ns.store(now, Ordering::Release);
}

/// The folder without its thread, for the simulation: one look at a time.
#[cfg(test)]
pub(crate) struct Looking(Work);

#[cfg(test)]
impl Looking {
    pub(crate) fn new(
        config: FoldConfig,
        ring: Arc<Mapping>,
        owner: OwnerRegion,
        reader: RingReader,
        state: FoldState,
    ) -> Self {
        Self(Work::new(config, ring, owner, reader, state))
    }

    /// What the thread does between two looks at `stop`; whether there was something.
    pub(crate) fn look(&mut self) -> Result<bool, FoldError> {
        listen(&self.0.ring, &self.0.owner, &self.0.shared, self.0.config.lease);
        self.0.turn()
    }

    /// When a heartbeat was last seen to change.
    pub(crate) fn changed_at_ns(&self) -> u64 {
        self.0.shared.changed_at_ns.load(Ordering::Acquire)
    }

    pub(crate) fn into_catch(self) -> Catch {
        Catch::new(self.0.reader, self.0.state, None, Duration::ZERO)
    }

    pub(crate) fn into_parts(self) -> (RingReader, FoldState) {
        (self.0.reader, self.0.state)
    }
}
