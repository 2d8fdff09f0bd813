//! A tether: how it behaves, what it is made of, and what is left when it has ended. Its thread is in `tether/taking.rs`.

mod pending;
mod recording;
mod shared;
mod taking;

use super::ship::Shipping;
use super::{Arrivals, EpochObserver, TetherError, TetherStats};
use crate::dirty::Harvested;
use crate::guest::{DirtyTracker, Epoch, Guest};
use crate::outbox::Outbox;
use crate::policy::{EpochFacts, Policy};
use crate::record::{RECORD_OVERHEAD_BYTES, RECORD_PAGE_BYTES, largest_record};
use crate::ring::RingWriter;
use crate::staging::{Slot, Staging};
use belay_transport::{Deadline, PAGE_SIZE};
use crossbeam_channel::bounded;
use pending::Pending;
pub(super) use shared::Shared;
use shared::State;
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use taking::{Slots, TetherLoop};

/// How long until a guest that would not stop is asked again, and how often a watched overflow is looked at.
const LOOK: Duration = Duration::from_millis(1);
/// How often it is looked whether a guest that does not park by itself has filled the outbox: a link of 100 Gb/s brings 60 MB in that time.
const FLOOD_LOOK: Duration = Duration::from_millis(5);
/// Epochs that can be on their way at once: one a slot, one being taken, one whose commit has not been looked at.
const OUTSTANDING: usize = 4;
/// Pages that the smallest reservation must have room for.
const LEAST_PAGES: u64 = 64;

/// How a tether behaves.
#[derive(Debug, Clone, Copy)]
pub struct TetherConfig {
    /// Longest that one attempt to stop the guest may take.
    pub stop_bound: Duration,
    /// Attempts in a row that may fail before the tether does.
    pub stop_tries: u32,
    /// Longest that shipping one part, commit included, or waiting for a slot may take.
    pub commit_bound: Duration,
    /// Bytes the source has reserved for one record (`--overflow`, from the handshake).
    pub overflow_bytes: u64,
    pub staging: Staging,
}

impl Default for TetherConfig {
    fn default() -> Self {
        Self {
            stop_bound: Duration::from_millis(500),
            stop_tries: 20,
            commit_bound: Duration::from_secs(10),
            overflow_bytes: 0,
            staging: Staging::Auto,
        }
    }
}

/// What a tether is made of. The tracker has been started, with the guest stopped.
pub struct TetherParts {
    pub guest: Box<dyn Guest>,
    pub tracker: Box<dyn DirtyTracker>,
    pub arrivals: Box<dyn Arrivals>,
    pub policy: Box<dyn Policy>,
    /// Its bound must not exceed [`Limits::OUTPUT_BYTES`].
    pub outbox: Arc<Outbox>,
    pub writer: RingWriter,
    /// Two slots.
    pub slots: [Slot; 2],
    pub observer: Arc<dyn EpochObserver>,
    /// What an earlier session's tether left over ([`TetherEnd::uncommitted`]): part of the first epoch.
    pub carried: Option<Harvested>,
}

/// What is left when a tether has ended.
pub struct TetherEnd {
    pub guest: Box<dyn Guest>,
    pub tracker: Box<dyn DirtyTracker>,
    pub arrivals: Box<dyn Arrivals>,
    /// Newest epoch that has committed.
    pub committed: Epoch,
    /// Whether the guest is stopped: always asked for when the tether has failed.
    pub paused: bool,
    /// Why it ended, unless it was told to.
    pub failed: Option<Arc<TetherError>>,
    /// What was harvested and is not known to have committed: a next session's first record must hold it.
    pub uncommitted: Harvested,
    pub stats: TetherStats,
}

/// A running tether.
pub struct Tether {
    shared: Arc<Shared>,
    tether: Option<JoinHandle<TetherLoop>>,
    shipping: Option<JoinHandle<()>>,
}

impl Tether {
    /// Begins. Refuses a reservation that cannot be kept to ([`TetherError::OverflowUnwatched`]), and copying on write where it cannot be
    /// done ([`TetherError::CannotHold`]).
    pub fn start(config: TetherConfig, parts: TetherParts) -> Result<Self, TetherError> {
        let TetherParts { guest, mut tracker, arrivals, policy, outbox, writer, slots, observer, carried } = parts;
        let pages: u64 = guest.memory().iter().map(|block| (block.alias.len() / PAGE_SIZE) as u64).sum();
        let page_limit = page_limit(&config, pages, tracker.as_mut())?;
        // Whoever has to be stopped before too much is dirty, or held, must not run while the thread that stops it is copying.
        let may_hold = tracker.can_hold() && page_limit.is_none() && guest.parks_itself();
        if config.staging == Staging::Cow && !may_hold {
            return Err(TetherError::CannotHold { tracker: tracker.kind(), watched: page_limit.is_some() });
        }
        let state = State::at(writer.committed());
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new(), observer: observer.clone() });
        let (parts_in, parts_out) = bounded(slots.len());
        let (free_in, free_out) = bounded(slots.len());
        for slot in slots {
            free_in.send(slot).expect("the channel has room for every slot");
        }
        let shipping = Shipping {
            writer,
            parts: parts_out,
            free: free_in,
            outbox: outbox.clone(),
            observer: observer.clone(),
            shared: shared.clone(),
            bound: config.commit_bound,
            last_commit: None,
        };
        let sizes: Vec<_> =
            guest.memory().iter().map(|block| (block.id, (block.alias.len() / PAGE_SIZE) as u64)).collect();
        let tether = TetherLoop {
            config,
            page_limit,
            may_hold,
            guest,
            tracker,
            arrivals,
            policy,
            outbox,
            observer,
            shared: shared.clone(),
            slots: Slots { free: free_out, parts: Some(parts_in), bound: config.commit_bound },
            spare: None,
            pages: Harvested::new(sizes.iter().copied()),
            harvesting: false,
            outstanding: VecDeque::with_capacity(OUTSTANDING),
            emptied: (0..OUTSTANDING).map(|_| Harvested::new(sizes.iter().copied())).collect(),
            carried,
            sizes,
            device_state: Vec::new(),
            output: Vec::new(),
            disk_writes: Vec::new(),
            facts: EpochFacts::default(),
            pending: Pending::default(),
            closed_at: Instant::now(),
            resumed_at: Instant::now(),
            held_back: Duration::ZERO,
            tries: 0,
            paused: false,
            paused_since: None,
        };
        let spawn = |what: &'static str, name: &str| {
            (std::thread::Builder::new().name(name.into()), move |source| TetherError::Thread { what, source })
        };
        let (builder, failed) = spawn("shipping", "belay-ship");
        let shipping = builder.spawn(move || shipping.run()).map_err(failed)?;
        let (builder, failed) = spawn("taking epochs", "belay-tether");
        let tether = builder.spawn(move || tether.run()).map_err(failed)?;
        Ok(Self { shared, tether: Some(tether), shipping: Some(shipping) })
    }

    /// Newest epoch that has committed.
    pub fn committed(&self) -> Epoch {
        self.shared.lock().committed
    }

    /// Why it has failed, if it has.
    pub fn failed(&self) -> Option<Arc<TetherError>> {
        self.shared.lock().failed.clone()
    }

    /// What epochs have cost so far.
    pub fn stats(&self) -> TetherStats {
        self.shared.lock().stats.clone()
    }

    /// Waits until `epoch` has committed; whether it has by `deadline`. False at once when the tether fails.
    pub fn wait_committed(&self, epoch: Epoch, deadline: Deadline) -> bool {
        self.shared.wait(deadline, |state| state.committed >= epoch)
    }

    /// Waits until the tether has failed or ended by itself; whether it has by `deadline`.
    pub fn wait_failed(&self, deadline: Deadline) -> bool {
        self.shared.wait(deadline, |state| state.failed.is_some())
    }

    /// Waits until every epoch taken so far has committed; whether that was so by `deadline`.
    pub fn quiesce(&self, deadline: Deadline) -> bool {
        let taken = self.shared.lock().taken;
        self.wait_committed(taken, deadline)
    }

    /// Takes an epoch now, whatever the policy says, and waits until it has committed: everything the guest did before this call
    /// is in it. `None` when that was not so by `deadline`.
    pub fn checkpoint_now(&self, deadline: Deadline) -> Option<Epoch> {
        let wanted = {
            let mut state = self.shared.lock();
            // One that has begun may already have let the guest go on.
            let wanted = state.begun.next();
            state.wanted = state.wanted.max(wanted);
            wanted
        };
        self.shared.changed.notify_all();
        self.wait_committed(wanted, deadline).then_some(wanted)
    }

    /// Ends: the epoch that is being taken is finished, what is on its way is shipped, and the guest goes on (or is stopped, if the
    /// tether has failed). Takes at most the configured bounds.
    pub fn stop(mut self) -> Result<TetherEnd, TetherError> {
        self.signal();
        let tether = self.tether.take().expect("taken here and in drop only").join();
        let shipping = self.shipping.take().expect("as above").join();
        let mut tether = tether.map_err(|_| TetherError::Panicked { what: "taking epochs" })?;
        shipping.map_err(|_| TetherError::Panicked { what: "shipping" })?;
        // Shipping may have failed after the other thread had ended well.
        tether.pause_if_failed();
        let uncommitted = tether.uncommitted();
        let state = self.shared.lock();
        Ok(TetherEnd {
            guest: tether.guest,
            tracker: tether.tracker,
            arrivals: tether.arrivals,
            committed: state.committed,
            paused: tether.paused,
            failed: state.failed.clone(),
            uncommitted,
            stats: state.stats.clone(),
        })
    }

    fn signal(&self) {
        self.shared.lock().stop = true;
        self.shared.changed.notify_all();
    }
}

impl Drop for Tether {
    fn drop(&mut self) {
        self.signal();
        if let Some(thread) = self.tether.take() {
            let _ = thread.join();
        }
        if let Some(thread) = self.shipping.take() {
            let _ = thread.join();
        }
    }
}

/// Whether so many bytes of overflow memory are enough for a guest of so many pages; what is the least where they are not.
pub fn overflow_is_enough(reserved: u64, pages: u64) -> Result<(), TetherError> {
    let least = largest_record(LEAST_PAGES);
    match reserved >= least.min(largest_record(pages)) {
        true => Ok(()),
        false => Err(TetherError::OverflowTooSmall { reserved, least }),
    }
}

/// Dirty pages at which an epoch is closed whatever the policy says, or `None` when even all of the guest fits the reservation.
fn page_limit(config: &TetherConfig, pages: u64, tracker: &mut dyn DirtyTracker) -> Result<Option<u64>, TetherError> {
    let (needed, reserved) = (largest_record(pages), config.overflow_bytes);
    if reserved >= needed {
        return Ok(None);
    }
    overflow_is_enough(reserved, pages)?;
    if tracker.dirty_so_far().is_none() {
        return Err(TetherError::OverflowUnwatched { needed, reserved });
    }
    // Half: the guest runs on between a look and the stop.
    Ok(Some((reserved - RECORD_OVERHEAD_BYTES) / RECORD_PAGE_BYTES / 2))
}
