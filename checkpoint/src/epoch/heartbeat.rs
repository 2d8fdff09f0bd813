//! The destination's heartbeat and the lease it brings.
//!
//! Every interval a counter is written to the ring's first word and the owner's words are read back. The source echoes the
//! counter it has seen, with a length: the lease then lasts that long *from when that counter was posted*, so that whatever
//! time the way there and back took is on the safe side. CLOCK_BOOTTIME of this host only; clocks are never compared.

use crate::clock::boottime_ns;
use crate::guest::Epoch;
use crate::outbox::LeaseClock;
use crate::ring::{HEARTBEAT_OFFSET, Mailbox, OwnerWords, PULSE_OFFSET, fetch_words, make_room};
use belay_transport::Deadline;
use belay_transport::fabric::{FabricError, Lane, RingKeys, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// Heartbeats whose posting time is remembered: at 2 ms, eight seconds of them.
const REMEMBERED: usize = 4096;

/// How the heartbeat behaves.
#[derive(Debug, Clone, Copy)]
pub struct HeartbeatConfig {
    /// Between two beats.
    pub interval: Duration,
    /// Longest lease believed, whatever the source grants.
    pub lease: Duration,
    /// Longest that one beat may take.
    pub bound: Duration,
}

/// How often it beats where output waits for disks, and while less than half of the lease is left: whoever was stopped for long and may be stopped
/// again soon has little time to renew it.
const IN_A_HURRY: Duration = Duration::from_millis(2);

impl Default for HeartbeatConfig {
    fn default() -> Self {
        Self { interval: Duration::from_millis(2), lease: Duration::from_secs(1), bound: Duration::from_secs(10) }
    }
}

/// Why the heartbeat has stopped by itself.
#[derive(Debug, thiserror::Error)]
pub enum HeartbeatError {
    #[error("beat {counter} failed")]
    Fabric {
        counter: u64,
        #[source]
        source: FabricError,
    },
    #[error("the source grants beat {granted}, {counter} is the newest that was sent")]
    GrantFromTheFuture { granted: u64, counter: u64 },
}

/// How the heartbeat stands.
#[derive(Debug, Clone)]
pub struct HeartbeatStatus {
    /// Newest beat sent, and newest that the source granted a lease for.
    pub counter: u64,
    pub granted: u64,
    /// What the source last said.
    pub words: Option<OwnerWords>,
    /// Why it has stopped, if it has. The lease runs out by itself.
    pub failed: Option<Arc<HeartbeatError>>,
}

/// When the lease ends, shared with whoever must not emit after it.
#[derive(Debug, Default)]
struct LeaseEnd(AtomicU64);

impl LeaseClock for LeaseEnd {
    fn valid(&self) -> bool {
        boottime_ns() < self.0.load(Ordering::Acquire)
    }
}

type Listener = Box<dyn Fn(Epoch) + Send>;

struct Shared {
    state: Mutex<(bool, HeartbeatStatus)>,
    changed: Condvar,
    lease: Arc<LeaseEnd>,
    /// Who hears of disk writes that are durable, and what was told last.
    applied: Mutex<Option<(Listener, Option<Epoch>)>>,
}

impl Shared {
    fn new() -> Self {
        let status = HeartbeatStatus { counter: 0, granted: 0, words: None, failed: None };
        Self {
            state: Mutex::new((false, status)),
            changed: Condvar::new(),
            lease: Arc::default(),
            applied: Mutex::new(None),
        }
    }

    fn lock(&self) -> MutexGuard<'_, (bool, HeartbeatStatus)> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The running heartbeat. Stops when dropped.
pub struct Heartbeat {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Heartbeat {
    /// Starts beating over `lane` (the second checkpoint lane, so that no record stands in its way).
    pub fn start(
        lane: Box<dyn Lane>,
        keys: RingKeys,
        mailbox: Mailbox,
        config: HeartbeatConfig,
    ) -> std::io::Result<Self> {
        let shared = Arc::new(Shared::new());
        let mut beating = Beating::new(lane, keys, mailbox, config, shared.clone());
        let thread = std::thread::Builder::new().name("belay-heartbeat".into()).spawn(move || beating.run())?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// The lease, to be asked before each emission.
    pub fn lease(&self) -> Arc<dyn LeaseClock> {
        self.shared.lease.clone()
    }

    /// When the lease ends, in ns of CLOCK_BOOTTIME; 0 before the first grant.
    pub fn lease_ends_at_ns(&self) -> u64 {
        self.shared.lease.0.load(Ordering::Acquire)
    }

    /// Has `hear` called with the newest epoch whose disk writes the source has made durable, whenever that is another one; on the
    /// heartbeat's thread, which it must not hold up.
    pub fn on_applied(&self, hear: impl Fn(Epoch) + Send + 'static) {
        *self.shared.applied.lock().unwrap_or_else(PoisonError::into_inner) = Some((Box::new(hear), None));
    }

    /// How it stands.
    pub fn status(&self) -> HeartbeatStatus {
        self.shared.lock().1.clone()
    }

    /// Waits until `until` is true of the status or the heartbeat has failed; what `until` says by `deadline`.
    pub fn wait(&self, deadline: Deadline, until: impl Fn(&HeartbeatStatus) -> bool) -> bool {
        let over = |state: &mut (bool, HeartbeatStatus)| until(&state.1) || state.1.failed.is_some();
        let waited = self.shared.changed.wait_timeout_while(self.shared.lock(), deadline.left(), |state| !over(state));
        until(&waited.unwrap_or_else(PoisonError::into_inner).0.1)
    }
}

impl Drop for Heartbeat {
    fn drop(&mut self) {
        self.shared.lock().0 = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Beating {
    lane: Box<dyn Lane>,
    keys: RingKeys,
    mailbox: Mailbox,
    config: HeartbeatConfig,
    shared: Arc<Shared>,
    counter: u64,
    granted: u64,
    owner_epoch: Option<u64>,
    /// When the last beats were posted, by counter modulo its length.
    posted: Vec<u64>,
}

impl Beating {
    fn new(
        lane: Box<dyn Lane>,
        keys: RingKeys,
        mailbox: Mailbox,
        config: HeartbeatConfig,
        shared: Arc<Shared>,
    ) -> Self {
        let posted = vec![0; REMEMBERED];
        Self { lane, keys, mailbox, config, shared, counter: 0, granted: 0, owner_epoch: None, posted }
    }

    fn run(&mut self) {
        loop {
            let next = Deadline::after(self.interval());
            let failed = self.beat().err();
            let mut state = self.shared.lock();
            let ended = failed.is_some();
            if let Some(error) = failed {
                state.1.failed = Some(Arc::new(error));
            }
            self.shared.changed.notify_all();
            if ended {
                return;
            }
            let stopped = |state: &mut (bool, HeartbeatStatus)| !state.0;
            let waited = self.shared.changed.wait_timeout_while(state, next.left(), stopped);
            if waited.unwrap_or_else(PoisonError::into_inner).0.0 {
                return;
            }
        }
    }

    /// Output waits for disk writes that become durable, and only a beat tells that they have.
    fn interval(&self) -> Duration {
        let waits = self.shared.applied.lock().unwrap_or_else(PoisonError::into_inner).is_some();
        let left = self.shared.lease.0.load(Ordering::Acquire).saturating_sub(boottime_ns());
        let hurry = waits || u128::from(left) < self.config.lease.as_nanos() / 2;
        if hurry { self.config.interval.min(IN_A_HURRY) } else { self.config.interval }
    }

    fn beat(&mut self) -> Result<(), HeartbeatError> {
        let counter = self.counter + 1;
        self.counter = counter;
        let words = self.exchange(counter).map_err(|source| HeartbeatError::Fabric { counter, source })?;
        let was = *self.owner_epoch.get_or_insert(words.owner_epoch);
        if was != words.owner_epoch {
            let source = FabricError::Revoked { was, is: words.owner_epoch };
            return Err(HeartbeatError::Fabric { counter, source });
        }
        if let (Some(granted), Some(lease)) = (words.granted, words.lease) {
            if granted > counter {
                return Err(HeartbeatError::GrantFromTheFuture { granted, counter });
            }
            self.renew(granted, lease);
        }
        if let (Some(now), Some((hear, told))) =
            (words.applied, &mut *self.shared.applied.lock().unwrap_or_else(PoisonError::into_inner))
            && *told != Some(now)
        {
            hear(now);
            *told = Some(now);
        }
        let mut state = self.shared.lock();
        state.1.counter = counter;
        state.1.granted = self.granted;
        state.1.words = Some(words);
        Ok(())
    }

    /// Writes the counter and reads the owner's words, one after the other on one lane.
    fn exchange(&mut self, counter: u64) -> Result<OwnerWords, FabricError> {
        let deadline = Deadline::after(self.config.bound);
        make_room(self.lane.as_mut(), deadline)?;
        self.posted[counter as usize % REMEMBERED] = boottime_ns();
        self.mailbox.mapping.store_u64(PULSE_OFFSET, counter, Ordering::Release);
        self.lane.post_writes(&[Write {
            id: counter,
            remote: self.keys.ring,
            remote_offset: HEARTBEAT_OFFSET as u64,
            local: self.mailbox.key,
            local_offset: PULSE_OFFSET as u64,
            len: 8,
        }])?;
        fetch_words(self.lane.as_mut(), &self.mailbox, &self.keys, deadline)
    }

    /// The source has seen beat `granted`: the lease lasts from when that was posted.
    fn renew(&mut self, granted: u64, lease: Duration) {
        if granted <= self.granted || self.counter - granted >= REMEMBERED as u64 {
            return;
        }
        self.granted = granted;
        let lease = u64::try_from(lease.min(self.config.lease).as_nanos()).unwrap_or(u64::MAX);
        let ends = self.posted[granted as usize % REMEMBERED].saturating_add(lease);
        self.shared.lease.0.fetch_max(ends, Ordering::AcqRel);
    }
}

/// The heartbeat without its thread, for the simulation: one beat at a time.
#[cfg(test)]
pub(crate) struct Beats(Beating);

#[cfg(test)]
impl Beats {
    pub(crate) fn new(lane: Box<dyn Lane>, keys: RingKeys, mailbox: Mailbox, config: HeartbeatConfig) -> Self {
        Self(Beating::new(lane, keys, mailbox, config, Arc::new(Shared::new())))
    }

    pub(crate) fn beat(&mut self) -> Result<(), HeartbeatError> {
        self.0.beat()
    }

    pub(crate) fn lease(&self) -> Arc<dyn LeaseClock> {
        self.0.shared.lease.clone()
    }

    /// How long it would wait now before its next beat.
    pub(crate) fn interval(&self) -> Duration {
        self.0.interval()
    }

    /// How long the lease lasts from now on.
    pub(crate) fn left(&self) -> Duration {
        Duration::from_nanos(self.0.shared.lease.0.load(Ordering::Acquire).saturating_sub(boottime_ns()))
    }
}
