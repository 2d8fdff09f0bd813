//! The tether thread: decides when, stops the guest, and puts the epoch together.

use super::pending::Pending;
use super::shared::Shared;
use super::{FLOOD_LOOK, LOOK, TetherConfig};
use crate::dirty::{DirtySet, Harvested};
use crate::epoch::ship::{Part, Taken};
use crate::epoch::{Arrivals, EpochObserver, EpochStats, PauseParts, TetherError, harvest};
use crate::guest::{DirtyTracker, Epoch, Guest, GuestError};
use crate::outbox::Outbox;
use crate::policy::{Decision, EpochFacts, Open, Policy};
use crate::staging::{Exchange, Slot, StageError};
use crate::storage::DiskWrites;
use belay_transport::stop_point::reached;
use belay_transport::{Deadline, RegionId};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The tether thread's side of the two queues.
pub(super) struct Slots {
    pub free: Receiver<Slot>,
    pub parts: Option<Sender<Part>>,
    pub bound: Duration,
}

impl Slots {
    fn ship(&self, part: Part) -> Result<(), StageError> {
        let parts = self.parts.as_ref().ok_or(StageError::ShippingEnded)?;
        parts.send(part).map_err(|_| StageError::ShippingEnded)
    }
}

impl Exchange for Slots {
    fn exchange(&mut self, full: Slot) -> Result<Slot, StageError> {
        self.ship(Part { slot: full, taken: None })?;
        self.free.recv_timeout(self.bound).map_err(|error| match error {
            RecvTimeoutError::Timeout => StageError::NoSlot { bound: self.bound },
            RecvTimeoutError::Disconnected => StageError::ShippingEnded,
        })
    }
}

pub(super) struct TetherLoop {
    pub config: TetherConfig,
    pub page_limit: Option<u64>,
    /// Whether epochs may be put together after the pause.
    pub may_hold: bool,
    pub guest: Box<dyn Guest>,
    pub tracker: Box<dyn DirtyTracker>,
    pub arrivals: Box<dyn Arrivals>,
    pub policy: Box<dyn Policy>,
    pub outbox: Arc<Outbox>,
    pub observer: Arc<dyn EpochObserver>,
    pub shared: Arc<Shared>,
    pub slots: Slots,
    /// A free slot that was got for an epoch that was not taken.
    pub spare: Option<Slot>,
    /// Of the epoch that is being taken.
    pub pages: Harvested,
    /// They have been harvested and are not yet among those outstanding.
    pub harvesting: bool,
    /// Of epochs on their way, the oldest first: given up when they have committed.
    pub outstanding: VecDeque<(Epoch, Harvested)>,
    /// Sets with nothing in them, so that no epoch allocates.
    pub emptied: Vec<Harvested>,
    pub carried: Option<Harvested>,
    /// Regions and their pages.
    pub sizes: Vec<(RegionId, u64)>,
    pub device_state: Vec<u8>,
    pub output: Vec<u8>,
    pub disk_writes: Vec<DiskWrites>,
    pub facts: EpochFacts,
    pub pending: Pending,
    pub closed_at: Instant,
    pub resumed_at: Instant,
    /// For how long the guest was held back before it went on last.
    pub held_back: Duration,
    /// Attempts to stop in a row that failed.
    pub tries: u32,
    pub paused: bool,
    /// Since when it is stopped, if it was stopped before there was a slot for its epoch.
    pub paused_since: Option<Instant>,
}

impl TetherLoop {
    pub fn run(mut self) -> Self {
        while self.wait_for_time() {
            if let Err(error) = self.epoch() {
                self.shared.fail(error);
                break;
            }
        }
        // Hanging up lets the shipping thread end once everything is shipped.
        self.slots.parts = None;
        self.pause_if_failed();
        self.shared.lock().ended = true;
        self.shared.changed.notify_all();
        self
    }

    /// Nothing the guest does after a failure can be caught. If it will not stop now, whoever decides above tries again.
    pub fn pause_if_failed(&mut self) {
        if self.shared.lock().failed.is_some() && !self.paused {
            self.paused = self.guest.pause(Deadline::after(self.config.stop_bound)).is_ok();
        }
    }

    /// Waits until an epoch is to be closed; false when it is time to end.
    fn wait_for_time(&mut self) -> bool {
        // A guest that would not stop is left alone for a moment and then asked again, whatever the policy says.
        let again = (self.tries > 0).then(|| Deadline::after(LOOK));
        loop {
            let dirty = self.tracker.dirty_so_far();
            let decision = match self.is_near_limit(dirty) || self.is_flooded() {
                true => Decision::CloseNow,
                false => {
                    let on_its_way = {
                        let state = self.shared.lock();
                        self.facts.committed = state.stats.newest();
                        self.pending.on_its_way(&state)
                    };
                    let output_waits = self.outbox.open_since().map(|since| since.elapsed());
                    let open = Open { lasted: self.closed_at.elapsed(), dirty_pages: dirty, output_waits, on_its_way };
                    self.policy.next(&open, &self.facts)
                }
            };
            let state = self.shared.lock();
            if state.is_over() {
                return false;
            }
            let wait = match (again, decision) {
                (Some(again), _) => again.left(),
                (None, Decision::CloseNow) => Duration::ZERO,
                (None, Decision::WaitAtMost(_)) if state.wanted > state.taken => Duration::ZERO,
                (None, Decision::WaitAtMost(wait)) => self.look().map_or(wait, |look| wait.min(look)),
            };
            if wait.is_zero() {
                return true;
            }
            reached("between-epochs");
            // Commits wake this too, so the policy sees them.
            drop(self.shared.changed.wait_timeout(state, wait));
        }
    }

    fn is_near_limit(&self, dirty: Option<u64>) -> bool {
        matches!((self.page_limit, dirty), (Some(limit), Some(dirty)) if dirty >= limit)
    }

    /// Whether a guest that does not park by itself has emitted as much as may be held (P7).
    fn is_flooded(&self) -> bool {
        !self.guest.parks_itself() && (!self.outbox.has_room() || self.guest.output_is_full())
    }

    /// How often something must be looked at while the guest runs.
    fn look(&self) -> Option<Duration> {
        match (self.page_limit, self.guest.parks_itself()) {
            (Some(_), _) => Some(LOOK),
            (None, false) => Some(FLOOD_LOOK),
            (None, true) => None,
        }
    }

    /// Gets a free slot before the guest is stopped, unless the reservation is nearly full: then the guest is stopped first.
    fn wait_for_slot(&mut self) -> Result<Option<Slot>, TetherError> {
        if let Some(slot) = self.spare.take() {
            return Ok(Some(slot));
        }
        let deadline = Deadline::after(self.config.commit_bound);
        loop {
            let look = self.look().unwrap_or(self.config.commit_bound);
            match self.slots.free.recv_timeout(look.min(deadline.left())) {
                Ok(slot) => return Ok(Some(slot)),
                Err(RecvTimeoutError::Disconnected) => return self.shipping_has_ended(),
                Err(RecvTimeoutError::Timeout) if deadline.expired() => {
                    let shipping = self.shared.lock().committed.next();
                    return Err(TetherError::NoSlot { shipping, bound: self.config.commit_bound });
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
            let dirty = self.tracker.dirty_so_far();
            if !self.paused && (self.is_near_limit(dirty) || self.is_flooded()) {
                // It goes on with the epoch that is taken next, or stays stopped if that fails.
                let began = Instant::now();
                self.paused = self.guest.pause(Deadline::after(self.config.stop_bound)).is_ok();
                self.paused_since = self.paused.then_some(began);
            }
        }
    }

    /// The shipping thread hung up: its failure is noted already, unless it had no chance to.
    fn shipping_has_ended(&self) -> Result<Option<Slot>, TetherError> {
        match self.shared.lock().failed {
            Some(_) => Ok(None),
            None => Err(TetherError::Panicked { what: "shipping" }),
        }
    }

    /// Takes one epoch, or finds that the guest does not stop yet.
    fn epoch(&mut self) -> Result<(), TetherError> {
        let Some(slot) = self.wait_for_slot()? else { return Ok(()) };
        let epoch = {
            let mut state = self.shared.lock();
            state.begun = state.taken.next();
            state.begun
        };
        let guest_error = |doing| move |source| TetherError::Guest { doing, epoch, source };
        let ahead = self.prepare().map_err(guest_error("making the harvest ready"))?;
        // Where the guest was stopped to wait for this slot, that was part of the pause.
        let began = self.paused_since.take().unwrap_or_else(Instant::now);
        let mut clock = Lap(began);
        let mut pause = PauseParts::default();
        match self.guest.pause(Deadline::after(self.config.stop_bound)) {
            Ok(()) => {}
            Err(error @ GuestError::StopTimedOut { .. }) => {
                self.spare = Some(slot);
                return self.would_not_stop(error);
            }
            Err(error) => return Err(guest_error("pausing the guest for the checkpoint")(error)),
        }
        self.paused = true;
        self.tries = 0;
        reached("epoch-stopped");
        let instant = Instant::now();
        pause.stop = clock.lap();
        self.device_state.clear();
        self.guest.save(&mut self.device_state).map_err(guest_error("saving the state"))?;
        // After the state: saving it may flush a disk once more.
        self.disk_writes = match self.guest.storage() {
            Some(storage) => storage.close_epoch(epoch).map_err(guest_error("closing the epoch of its disks"))?,
            None => Vec::new(),
        };
        pause.save = clock.lap();
        self.harvest().map_err(guest_error("the harvest"))?;
        reached("epoch-harvested");
        pause.harvest = clock.lap();
        let output_since = self.outbox.open_since();
        let mut begun = self.begin_record(slot, epoch)?;
        if begun.held.is_none() {
            self.add_pages(&mut begun)?;
        }
        let next = self.emptied.pop().unwrap_or_else(|| Harvested::new(self.sizes.iter().copied()));
        self.outstanding.push_back((epoch, std::mem::replace(&mut self.pages, next)));
        self.harvesting = false;
        reached("epoch-staged");
        pause.stage = clock.lap();
        let lasted = instant - self.closed_at;
        begun.stats.lasted = lasted;
        begun.stats.ahead = ahead;
        begun.stats.held_back = std::mem::take(&mut self.held_back);
        self.closed_at = instant;
        self.facts = EpochFacts {
            closed: self.facts.closed + 1,
            lasted,
            dirty_pages: begun.stats.pages,
            ahead,
            ran: began.saturating_duration_since(self.resumed_at),
            pause: pause.total(),
            committed: self.facts.committed,
        };
        let on_its_way = self.pending.on_its_way(&self.shared.lock());
        let hold = self.policy.hold_back(&self.facts, on_its_way);
        let (ran, packets) = (self.facts.ran, begun.stats.packets);
        let taken =
            |resumed, pause, stats| Taken { instant, resumed, output_since, stats: EpochStats { pause, ..stats } };
        let resume_failed = guest_error("resuming the guest after the checkpoint");
        if hold.is_zero() {
            self.resume().map_err(resume_failed)?;
            pause.resume = clock.lap();
            self.facts.pause = pause.total();
            let resumed = Instant::now();
            self.add_held_pages(&mut begun)?;
            let (slot, stats) = self.end_record(begun)?;
            self.ship(slot, epoch, taken(resumed, pause, stats));
        } else {
            let began = Instant::now();
            self.add_held_pages(&mut begun)?;
            let (slot, stats) = self.end_record(begun)?;
            self.ship(slot, epoch, taken(Instant::now(), pause, stats));
            self.hold_back(began, hold);
            if self.shared.lock().failed.is_some() {
                // It stays stopped: nothing it did from here on could be caught.
                return Ok(());
            }
            self.resume().map_err(resume_failed)?;
        }
        if let Some((_, pages)) = self.outstanding.back() {
            self.observer.closed(ran, packets, &pages.dirty);
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.guest.resume()?;
        self.paused = false;
        self.resumed_at = Instant::now();
        reached("epoch-resumed");
        Ok(())
    }

    fn ship(&mut self, slot: Slot, epoch: Epoch, taken: Taken) {
        self.shared.lock().taken = epoch;
        self.shared.changed.notify_all();
        self.pending.ship(epoch, taken.stats.pages);
        // If shipping has ended its failure is noted, and the next look finds it.
        let _ = self.slots.ship(Part { slot, taken: Some(taken) });
    }

    /// Leaves the guest stopped for so long from when that `began`, or until the tether is over.
    fn hold_back(&mut self, began: Instant, hold: Duration) {
        let end = Deadline::after(hold.saturating_sub(began.elapsed()));
        let over = self.shared.changed.wait_timeout_while(self.shared.lock(), end.left(), |state| !state.is_over());
        drop(over);
        self.held_back = began.elapsed();
    }

    /// Does ahead of the pause what can be; how long that took. Nothing where the guest is stopped already, or has to be watched: this thread is the
    /// one that stops it before too much is dirty, or held (P7).
    fn prepare(&mut self) -> Result<Duration, GuestError> {
        if self.paused || self.look().is_some() {
            return Ok(Duration::ZERO);
        }
        let began = Instant::now();
        if let Err(error) = self.tracker.prepare() {
            self.carried = Some(Harvested::everything(self.sizes.iter().copied()));
            return Err(error);
        }
        reached("epoch-prepared");
        Ok(began.elapsed())
    }

    /// Fills `pages` with what the epoch holds. From here on only this thread knows of them.
    fn harvest(&mut self) -> Result<(), GuestError> {
        let committed = self.shared.lock().committed;
        while self.outstanding.front().is_some_and(|(epoch, _)| *epoch <= committed) {
            if let Some((_, mut pages)) = self.outstanding.pop_front() {
                pages.clear();
                self.emptied.push(pages);
            }
        }
        self.harvesting = true;
        if let Some(carried) = &self.carried {
            // What was given up between two sessions no harvest has seen: it must not be taken for what it was before.
            self.tracker.sift(&mut DirtySet::new(self.sizes.iter().copied()), &carried.discards)?;
        }
        let (guest, tracker, arrivals) = (self.guest.as_mut(), self.tracker.as_mut(), self.arrivals.as_mut());
        let Harvested { dirty, discards } = &mut self.pages;
        if let Err(error) = harvest(guest, tracker, arrivals, dirty, discards) {
            // What the tracker had told before it failed is not known to be all it knew.
            self.carried = Some(Harvested::everything(self.sizes.iter().copied()));
            return Err(error);
        }
        if let Some(mut carried) = self.carried.take() {
            carried.dirty.retain(|region, page| arrivals.landed(region, page));
            self.pages.merge(&carried);
        }
        Ok(())
    }

    /// What is in no record that is known to have committed.
    pub fn uncommitted(&mut self) -> Harvested {
        let committed = self.shared.lock().committed;
        let mut all = self.carried.take().unwrap_or_else(|| Harvested::new(self.sizes.iter().copied()));
        if self.harvesting {
            all.merge(&self.pages);
        }
        for (_, pages) in self.outstanding.iter().filter(|(epoch, _)| *epoch > committed) {
            all.merge(pages);
        }
        all
    }

    fn would_not_stop(&mut self, source: GuestError) -> Result<(), TetherError> {
        self.tries += 1;
        {
            let mut state = self.shared.lock();
            state.stats.stop_timeouts += 1;
            state.begun = state.taken;
        }
        self.observer.stop_timed_out(self.tries, &source);
        if self.tries < self.config.stop_tries {
            return Ok(());
        }
        Err(TetherError::StopTimedOut { tries: self.tries, source })
    }
}

/// Time since the last lap.
struct Lap(Instant);

impl Lap {
    fn lap(&mut self) -> Duration {
        let now = Instant::now();
        let lap = now - self.0;
        self.0 = now;
        lap
    }
}
