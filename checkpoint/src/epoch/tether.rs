//! The tether thread: decides when, stops the guest, and puts the epoch together.

use super::ship::{Part, Shipping, Taken};
use super::{Arrivals, EpochObserver, EpochStats, PauseParts, TetherError, TetherStats, harvest};
use crate::dirty::Harvested;
use crate::fold::boottime_ns;
use crate::guest::{DirtyTracker, Epoch, Guest, GuestError, Packet};
use crate::outbox::Outbox;
use crate::policy::{Decision, EpochFacts, Policy};
use crate::record::{DEVICE_VMM, Limits, PacketHeader, RECORD_OVERHEAD_BYTES, RECORD_PAGE_BYTES, kind, largest_record};
use crate::ring::RingWriter;
use crate::staging::{Exchange, Slot, StageError, Stager};
use belay_transport::stop_point::reached;
use belay_transport::{Deadline, PAGE_SIZE, RegionId};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use zerocopy::IntoBytes;

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
}

impl Default for TetherConfig {
    fn default() -> Self {
        Self {
            stop_bound: Duration::from_millis(500),
            stop_tries: 20,
            commit_bound: Duration::from_secs(10),
            overflow_bytes: 0,
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

pub(super) struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    observer: Arc<dyn EpochObserver>,
}

struct State {
    /// The epoch that is being taken, or the one below it when none is.
    begun: Epoch,
    /// Newest epoch whose guest has gone on, and newest that has committed.
    taken: Epoch,
    committed: Epoch,
    /// This epoch is wanted at once, whatever the policy says.
    wanted: Epoch,
    stop: bool,
    ended: bool,
    failed: Option<Arc<TetherError>>,
    stats: TetherStats,
}

impl State {
    fn at(epoch: Epoch) -> Self {
        Self {
            begun: epoch,
            taken: epoch,
            committed: epoch,
            wanted: epoch,
            stop: false,
            ended: false,
            failed: None,
            stats: TetherStats::default(),
        }
    }

    fn is_over(&self) -> bool {
        self.stop || self.failed.is_some()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change is a few assignments: a panic elsewhere leaves nothing half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes the first failure and wakes everybody.
    pub fn fail(&self, error: TetherError) {
        let error = Arc::new(error);
        let mut state = self.lock();
        let first = state.failed.is_none();
        if first {
            state.failed = Some(error.clone());
        }
        drop(state);
        self.changed.notify_all();
        if first {
            self.observer.failed(&error);
        }
    }

    pub fn committed(&self, epoch: Epoch, stats: &EpochStats) {
        let mut state = self.lock();
        state.committed = epoch;
        state.stats.record(stats);
        drop(state);
        self.changed.notify_all();
    }

    /// Waits until `until` says so, the tether has failed or ended, or `deadline` has passed; what `until` says then.
    fn wait(&self, deadline: Deadline, until: impl Fn(&State) -> bool) -> bool {
        let over = |state: &mut State| until(state) || state.failed.is_some() || state.ended;
        let waited = self.changed.wait_timeout_while(self.lock(), deadline.left(), |state| !over(state));
        until(&waited.unwrap_or_else(PoisonError::into_inner).0)
    }
}

impl Tether {
    /// Begins. Refuses a reservation that cannot be kept to ([`TetherError::OverflowUnwatched`]).
    pub fn start(config: TetherConfig, parts: TetherParts) -> Result<Self, TetherError> {
        let TetherParts { guest, mut tracker, arrivals, policy, outbox, writer, slots, observer, carried } = parts;
        let pages: u64 = guest.memory().iter().map(|block| (block.alias.len() / PAGE_SIZE) as u64).sum();
        let page_limit = page_limit(&config, pages, tracker.as_mut())?;
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
        };
        let sizes: Vec<_> =
            guest.memory().iter().map(|block| (block.id, (block.alias.len() / PAGE_SIZE) as u64)).collect();
        let tether = TetherLoop {
            config,
            page_limit,
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
            facts: EpochFacts::default(),
            closed_at: Instant::now(),
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

/// Dirty pages at which an epoch is closed whatever the policy says, or `None` when even all of the guest fits the reservation.
fn page_limit(config: &TetherConfig, pages: u64, tracker: &mut dyn DirtyTracker) -> Result<Option<u64>, TetherError> {
    let (needed, reserved) = (largest_record(pages), config.overflow_bytes);
    if reserved >= needed {
        return Ok(None);
    }
    let least = largest_record(LEAST_PAGES);
    if reserved < least {
        return Err(TetherError::OverflowTooSmall { reserved, least });
    }
    if tracker.dirty_so_far().is_none() {
        return Err(TetherError::OverflowUnwatched { needed, reserved });
    }
    // Half: the guest runs on between a look and the stop.
    Ok(Some((reserved - RECORD_OVERHEAD_BYTES) / RECORD_PAGE_BYTES / 2))
}

/// The tether thread's side of the two queues.
struct Slots {
    free: Receiver<Slot>,
    parts: Option<Sender<Part>>,
    bound: Duration,
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

struct TetherLoop {
    config: TetherConfig,
    page_limit: Option<u64>,
    guest: Box<dyn Guest>,
    tracker: Box<dyn DirtyTracker>,
    arrivals: Box<dyn Arrivals>,
    policy: Box<dyn Policy>,
    outbox: Arc<Outbox>,
    observer: Arc<dyn EpochObserver>,
    shared: Arc<Shared>,
    slots: Slots,
    /// A free slot that was got for an epoch that was not taken.
    spare: Option<Slot>,
    /// Of the epoch that is being taken.
    pages: Harvested,
    /// They have been harvested and are not yet among those outstanding.
    harvesting: bool,
    /// Of epochs on their way, the oldest first: given up when they have committed.
    outstanding: VecDeque<(Epoch, Harvested)>,
    /// Sets with nothing in them, so that no epoch allocates.
    emptied: Vec<Harvested>,
    carried: Option<Harvested>,
    /// Regions and their pages.
    sizes: Vec<(RegionId, u64)>,
    device_state: Vec<u8>,
    output: Vec<u8>,
    facts: EpochFacts,
    closed_at: Instant,
    /// Attempts to stop in a row that failed.
    tries: u32,
    paused: bool,
    /// Since when it is stopped, if it was stopped before there was a slot for its epoch.
    paused_since: Option<Instant>,
}

impl TetherLoop {
    fn run(mut self) -> Self {
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
    fn pause_if_failed(&mut self) {
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
                false => self.policy.next(self.closed_at.elapsed(), dirty, &self.facts),
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
        !self.guest.parks_itself() && !self.outbox.has_room()
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
        // Where the guest was stopped to wait for this slot, that was part of the pause.
        let mut clock = Lap(self.paused_since.take().unwrap_or_else(Instant::now));
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
        pause.save = clock.lap();
        self.harvest().map_err(guest_error("the harvest"))?;
        reached("epoch-harvested");
        pause.harvest = clock.lap();
        let (slot, mut stats) = self.stage(slot, epoch)?;
        let next = self.emptied.pop().unwrap_or_else(|| Harvested::new(self.sizes.iter().copied()));
        self.outstanding.push_back((epoch, std::mem::replace(&mut self.pages, next)));
        self.harvesting = false;
        reached("epoch-staged");
        pause.stage = clock.lap();
        self.guest.resume().map_err(guest_error("resuming the guest after the checkpoint"))?;
        self.paused = false;
        reached("epoch-resumed");
        pause.resume = clock.lap();
        stats.pause = pause;
        stats.lasted = instant - self.closed_at;
        self.closed_at = instant;
        let commit = self.shared.lock().stats.last.commit;
        self.facts = EpochFacts { lasted: stats.lasted, dirty_pages: stats.pages, pause: pause.total(), commit };
        self.shared.lock().taken = epoch;
        self.shared.changed.notify_all();
        let taken = Taken { instant, resumed: Instant::now(), stats };
        // If shipping has ended its failure is noted, and the next look finds it.
        let _ = self.slots.ship(Part { slot, taken: Some(taken) });
        Ok(())
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
    fn uncommitted(&mut self) -> Harvested {
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

    /// Puts the epoch into slots; gives the last one and what it holds.
    fn stage(&mut self, slot: Slot, epoch: Epoch) -> Result<(Slot, EpochStats), TetherError> {
        let packets = self.outbox.close_epoch(epoch);
        output_stream(&packets, &mut self.output);
        let released = self.outbox.released_up_to();
        let too_large = |what, bytes, limit| Err(TetherError::TooLarge { what, epoch, bytes, limit });
        if self.device_state.len() > Limits::DEVICE_STATE_BYTES {
            return too_large("device state", self.device_state.len(), Limits::DEVICE_STATE_BYTES);
        }
        if self.output.len() > Limits::OUTPUT_BYTES {
            return too_large("held output", self.output.len(), Limits::OUTPUT_BYTES);
        }
        let memory = self.guest.memory();
        let Harvested { dirty, discards } = &mut self.pages;
        let limit = self.config.overflow_bytes;
        let stage = || -> Result<(Slot, EpochStats), StageError> {
            let mut stager = Stager::begin(slot, &mut self.slots, epoch, memory.len(), boottime_ns(), limit)?;
            stager.stream(kind::DEVICE_STATE, DEVICE_VMM, &self.device_state)?;
            stager.stream(kind::HELD_OUTPUT, 0, &self.output)?;
            if let Some(released) = released {
                stager.stream(kind::RELEASED_UP_TO, 0, &released.to_le_bytes())?;
            }
            stager.discards(discards, memory)?;
            stager.pages(dirty, memory)?;
            let pages = stager.page_count();
            let (slot, bytes) = stager.finish()?;
            let stats = EpochStats {
                epoch: epoch.0,
                pages,
                discards: discards.len(),
                bytes,
                packets: packets.len(),
                ..EpochStats::default()
            };
            Ok((slot, stats))
        };
        stage().map_err(|source| TetherError::Stage { epoch, source })
    }
}

/// Writes packets as the held-output stream.
fn output_stream(packets: &[Packet], into: &mut Vec<u8>) {
    into.clear();
    for packet in packets {
        let len = u32::try_from(packet.bytes.len()).expect("an outbox is bounded far below 4 GiB");
        let header = PacketHeader { sequence: packet.sequence.into(), len: len.into() };
        into.extend_from_slice(header.as_bytes());
        into.extend_from_slice(&packet.bytes);
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
