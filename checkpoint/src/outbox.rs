//! Where a guest's output waits until it may be shown to the world.
//!
//! Rules of this room:
//! * Under `commit` a packet leaves only when the epoch it was emitted in has committed (P4). Under `lease` it leaves at once, but the
//!   lease is asked at **every** emission.
//! * Where the guest flushed a disk, what it emitted in that epoch and later leaves once the source has made its disk writes durable.
//! * Packets leave in the order of their sequence numbers, each until the emitter has taken it: a failed emission is tried again,
//!   whole, for ever. Nothing is dropped and nothing overtakes.
//! * What is held is bounded (P7): at the bound [`PacketSink::has_room`] says no and vCPUs park; they hear of new room.
//! * Only the emitting thread emits. vCPUs, the tether loop and the fence touch the queue, never the wire, so a slow observer holds
//!   up neither a pause nor a fence.
//! * A gate that is shut stays shut until it is opened by name; what it holds stays.

mod resend;

pub use resend::{Resend, ResendError};

use crate::guest::{Epoch, Packet, PacketSink};
use crate::mutation::{Mutation, mutated};
use belay_transport::Deadline;
use belay_transport::stop_point::reached;
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::str::FromStr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// First and longest pause between two tries to emit a packet that the emitter would not take.
const FIRST_RETRY: Duration = Duration::from_millis(1);
const LONGEST_RETRY: Duration = Duration::from_millis(100);
/// How often a lease that is not valid is asked again while packets wait for it.
const LEASE_LOOK: Duration = Duration::from_millis(1);
/// Longest delay of a packet that is told from a longer one: an hour.
const LONGEST_DELAY_NS: u64 = 3_600_000_000_000;

/// When a tethered guest's output may leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OutputMode {
    /// Once the checkpoint that covers it has committed: no gap and no contradiction after a catch.
    #[default]
    Commit,
    /// At once, while the lease is good: faster, and after a catch the world may have seen what never was.
    Lease,
}

impl fmt::Display for OutputMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Commit => "commit",
            Self::Lease => "lease",
        })
    }
}

/// A text that is no output mode.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not an output mode; write commit or lease")]
pub struct OutputModeError(String);

impl FromStr for OutputMode {
    type Err = OutputModeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "commit" => Ok(Self::Commit),
            "lease" => Ok(Self::Lease),
            _ => Err(OutputModeError(text.to_owned())),
        }
    }
}

/// The world: takes packets one at a time, in order.
pub trait Emitter: Send {
    /// Shows one packet. Must return within a second or so, and either take the packet whole or fail; after a failure the same
    /// packet is given again, so the world may see it twice, byte for byte the same.
    fn send(&mut self, packet: &Packet) -> io::Result<()>;
}

/// Whether this host may show output now, by its own clock (CLOCK_BOOTTIME), counted from when it posted the renewal that succeeded.
pub trait LeaseClock: Send + Sync {
    /// Asked before every emission; must not block.
    fn valid(&self) -> bool;
}

/// Most that an outbox holds before it has no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    pub bytes: u64,
    pub packets: usize,
}

/// What an outbox holds and has done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutboxFacts {
    pub held_packets: usize,
    pub held_bytes: u64,
    pub sent_packets: u64,
    /// Emissions that failed and were tried again.
    pub failed_emissions: u64,
    /// What the last of them said.
    pub last_failure: Option<String>,
}

/// What decides whether a packet may leave.
#[derive(Clone)]
enum Gate {
    /// Everything may.
    Open,
    /// What has committed may.
    Commit,
    /// Everything may while the lease is valid.
    Lease(Arc<dyn LeaseClock>),
}

struct State {
    gate: Gate,
    shut: bool,
    stopping: bool,
    /// All that has not left, in order: first what may leave (`cleared` packets), then closed epochs, then the open one.
    held: VecDeque<Packet>,
    /// When each of `held` came, by position.
    came: VecDeque<Instant>,
    /// How long packets waited here until they had left, in nanoseconds.
    delays: Histogram<u64>,
    held_bytes: u64,
    cleared: usize,
    /// Epochs whose output may not leave yet.
    closed: VecDeque<Closed>,
    /// Newest epochs that have committed, and whose disk writes the source has made durable.
    committed: Epoch,
    applied: Epoch,
    /// The emitting thread is inside [`Emitter::send`] with a copy of `held`'s first packet.
    sending: bool,
    released_up_to: Option<u64>,
    facts_sent: u64,
    failures: u64,
    last_failure: Option<String>,
}

/// An epoch that was closed.
#[derive(Debug, Clone, Copy)]
struct Closed {
    epoch: Epoch,
    packets: usize,
    /// The newest epoch up to here in which the guest flushed a disk: what follows shows that it did.
    flushed: Epoch,
}

type RoomCallback = Box<dyn Fn() + Send + Sync>;

struct Shared {
    bounds: Bounds,
    state: Mutex<State>,
    /// The emitting thread waits here for something that may leave.
    work: Condvar,
    /// Everybody else waits here for room, or for the emitting thread.
    progress: Condvar,
    on_room: Mutex<Option<RoomCallback>>,
}

/// Holds a guest's output and shows it when it may be shown. A VMM puts packets in through [`Outbox::sink`].
pub struct Outbox {
    shared: Arc<Shared>,
    emitting: Option<JoinHandle<()>>,
}

impl Outbox {
    /// An outbox of a guest that nobody else can run: output leaves at once.
    pub fn open(bounds: Bounds, out: Box<dyn Emitter>) -> io::Result<Self> {
        Self::start(Gate::Open, bounds, out)
    }

    /// An outbox under `--output commit`.
    pub fn commit(bounds: Bounds, out: Box<dyn Emitter>) -> io::Result<Self> {
        Self::start(Gate::Commit, bounds, out)
    }

    /// An outbox under `--output lease`.
    pub fn lease(bounds: Bounds, lease: Arc<dyn LeaseClock>, out: Box<dyn Emitter>) -> io::Result<Self> {
        Self::start(Gate::Lease(lease), bounds, out)
    }

    fn start(gate: Gate, bounds: Bounds, mut out: Box<dyn Emitter>) -> io::Result<Self> {
        let shared = Arc::new(Shared::new(gate, bounds));
        let emitting = {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new()
                .name("belay-outbox".into())
                .spawn(move || shared.emit_until_stopped(&mut *out))?
        };
        Ok(Self { shared, emitting: Some(emitting) })
    }

    /// The end that a VMM's vCPUs put packets into.
    pub fn sink(&self) -> Arc<dyn PacketSink> {
        Arc::new(Sink(Arc::clone(&self.shared)))
    }

    /// Has `wake` called whenever there is room again after there was none, from a thread of the outbox's or its user's, without
    /// a lock that the outbox needs.
    pub fn on_room(&self, wake: impl Fn() + Send + Sync + 'static) {
        *lock(&self.shared.on_room) = Some(Box::new(wake));
    }

    /// Closes the open epoch under the name `epoch` and returns the output that its record must carry: under `commit` all that was
    /// emitted in it, otherwise all that has not left yet. `flushed`: the guest flushed a disk in it, so its output also waits for
    /// [`Outbox::applied`]. Guest paused.
    pub fn close_epoch(&self, epoch: Epoch, flushed: bool) -> Vec<Packet> {
        let mut state = self.shared.lock();
        if !matches!(state.gate, Gate::Commit) {
            return state.held.iter().cloned().collect();
        }
        let last = state.closed.back().copied();
        if let Some(Closed { epoch: last, .. }) = last {
            assert!(last < epoch, "{epoch} is closed after {last}");
        }
        let first = state.first_open();
        let packets: Vec<Packet> = state.held.range(first..).cloned().collect();
        let flushed = if flushed { epoch } else { last.map_or(Epoch(0), |last| last.flushed) };
        state.closed.push_back(Closed { epoch, packets: packets.len(), flushed });
        if mutated(Mutation::ReleaseBeforeCommit) {
            state.clear();
        }
        packets
    }

    /// Since when the oldest output of the open epoch has been held, if there is any. Without output commit none waits for an epoch.
    pub fn open_since(&self) -> Option<Instant> {
        let state = self.shared.lock();
        matches!(state.gate, Gate::Commit).then(|| state.came.get(state.first_open()).copied())?
    }

    /// `epoch` and all before it have committed: their output may leave.
    pub fn committed(&self, epoch: Epoch) {
        let mut state = self.shared.lock();
        state.committed = state.committed.max(epoch);
        state.clear();
        drop(state);
        self.shared.work.notify_all();
    }

    /// What the guest did to its disks up to `epoch` is durable in their images.
    pub fn applied(&self, epoch: Epoch) {
        let mut state = self.shared.lock();
        state.applied = state.applied.max(epoch);
        state.clear();
        drop(state);
        self.shared.work.notify_all();
    }

    /// Another session begins, and `committed` is the newest epoch that the source has: output of it and those before may leave. What was
    /// closed later never committed: it is part of the open epoch again, whose record then carries it.
    pub fn reopen_epochs(&self, committed: Epoch) {
        self.committed(committed);
        // What has committed may still wait for its disk writes.
        self.shared.lock().closed.retain(|closed| closed.epoch <= committed);
    }

    /// Another session brings another lease. Without effect unless output leaves by lease.
    pub fn renew_lease(&self, lease: Arc<dyn LeaseClock>) {
        let mut state = self.shared.lock();
        if matches!(state.gate, Gate::Lease(_)) {
            state.gate = Gate::Lease(lease);
        }
        drop(state);
        self.shared.work.notify_all();
    }

    /// Puts packets before everything held, to leave first: what [`Resend::finish`] gave. Only while nothing is held or sent.
    pub fn resend(&self, packets: Vec<Packet>) {
        let mut state = self.shared.lock();
        assert!(
            state.held.is_empty() && !state.sending,
            "output is sent again after {} packets were held",
            state.held.len()
        );
        state.cleared = packets.len();
        state.held_bytes = packets.iter().map(|packet| packet.bytes.len() as u64).sum();
        state.came = std::iter::repeat_n(Instant::now(), packets.len()).collect();
        state.held = packets.into();
        drop(state);
        self.shared.work.notify_all();
    }

    /// Highest sequence number that was handed to the world.
    pub fn released_up_to(&self) -> Option<u64> {
        self.shared.lock().released_up_to
    }

    /// Shuts the gate: no emission *begins* from here on. One that is under way may end; see [`Outbox::wait_quiet`].
    pub fn shut(&self) {
        self.shared.lock().shut = true;
        // Whoever waits for what may leave has nothing more to wait for.
        self.shared.progress.notify_all();
    }

    /// Opens a shut gate again, under the rule it had.
    pub fn reopen(&self) {
        self.shared.lock().shut = false;
        self.shared.work.notify_all();
    }

    /// Lets everything out from here on, what is held first: this host alone can run the guest.
    pub fn open_for_good(&self) {
        let mut state = self.shared.lock();
        state.gate = Gate::Open;
        state.shut = false;
        state.closed.clear();
        drop(state);
        self.shared.work.notify_all();
    }

    /// Waits until no emission is under way; whether that was so by `deadline`. After [`Outbox::shut`] none begins either.
    pub fn wait_quiet(&self, deadline: Deadline) -> bool {
        self.shared.wait(deadline, |state| !state.sending)
    }

    /// Waits until everything that may leave has left; whether that was so by `deadline`.
    pub fn wait_sent(&self, deadline: Deadline) -> bool {
        self.shared.wait(deadline, |state| !state.sending && !state.may_send())
    }

    /// Whether the guest may emit more.
    pub fn has_room(&self) -> bool {
        self.shared.lock().has_room(self.shared.bounds)
    }

    /// Waits for room; whether there was any by `deadline`.
    pub fn wait_for_room(&self, deadline: Deadline) -> bool {
        let bounds = self.shared.bounds;
        self.shared.wait(deadline, |state| state.has_room(bounds))
    }

    /// How long packets waited from the guest's emitting them until the world had taken them, in nanoseconds, to two digits.
    pub fn delays(&self) -> Histogram<u64> {
        self.shared.lock().delays.clone()
    }

    /// What it holds and has done.
    pub fn facts(&self) -> OutboxFacts {
        let state = self.shared.lock();
        OutboxFacts {
            held_packets: state.held.len(),
            held_bytes: state.held_bytes,
            sent_packets: state.facts_sent,
            failed_emissions: state.failures,
            last_failure: state.last_failure.clone(),
        }
    }
}

impl Drop for Outbox {
    /// Ends the emitting thread after the emission that is under way. What is still held is the owner's to have waited for.
    fn drop(&mut self) {
        self.shared.lock().stopping = true;
        self.shared.work.notify_all();
        if let Some(emitting) = self.emitting.take() {
            let _ = emitting.join();
        }
    }
}

struct Sink(Arc<Shared>);

impl PacketSink for Sink {
    fn emit(&self, packet: Packet) {
        let mut state = self.0.lock();
        state.held_bytes += packet.bytes.len() as u64;
        // vCPUs draw their numbers under the device's lock but may arrive here in another order.
        let open = state.first_open();
        let mut at = state.held.len();
        while at > open && state.held[at - 1].sequence > packet.sequence {
            at -= 1;
        }
        state.held.insert(at, packet);
        state.came.insert(at, Instant::now());
        drop(state);
        self.0.work.notify_all();
    }

    fn has_room(&self) -> bool {
        self.0.lock().has_room(self.0.bounds)
    }
}

/// A panic while a lock was held leaves nothing half done here: every change of the state is a few assignments.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    /// Index of the first packet of the open epoch. The one that is being sent is never overtaken, whatever the gate.
    fn first_open(&self) -> usize {
        let closed: usize = self.closed.iter().map(|closed| closed.packets).sum();
        (self.cleared + closed).max(usize::from(self.sending))
    }

    /// Clears what may leave by now.
    fn clear(&mut self) {
        while let Some(closed) = self.closed.front().copied() {
            let committed = closed.epoch <= self.committed || mutated(Mutation::ReleaseBeforeCommit);
            if !committed || closed.flushed > self.applied {
                break;
            }
            self.closed.pop_front();
            self.cleared += closed.packets;
        }
    }

    fn has_room(&self, bounds: Bounds) -> bool {
        self.held.len() < bounds.packets && self.held_bytes < bounds.bytes
    }

    /// Whether the first packet may leave, the lease aside.
    fn cleared_to_send(&self) -> bool {
        let cleared = match self.gate {
            Gate::Commit => self.cleared > 0,
            Gate::Open | Gate::Lease(_) => !self.held.is_empty(),
        };
        cleared && !self.shut && !self.stopping
    }

    /// Whether the first packet may leave now.
    fn may_send(&self) -> bool {
        self.cleared_to_send()
            && match &self.gate {
                // What is sent again was committed once and needs no lease.
                Gate::Lease(lease) => self.cleared > 0 || lease.valid() || mutated(Mutation::LeaseIgnored),
                Gate::Open | Gate::Commit => true,
            }
    }

    /// The first packet, where it may leave, marked as being sent.
    fn begin_sending(&mut self) -> Option<Packet> {
        let packet = self.may_send().then(|| self.held.front().cloned()).flatten();
        self.sending = packet.is_some();
        packet
    }

    /// The first packet has left.
    fn sent(&mut self) {
        if mutated(Mutation::DoubleRelease) && self.facts_sent.is_multiple_of(8) {
            self.facts_sent += 1;
            return;
        }
        let packet = self.held.pop_front().expect("the packet that was sent is held until it is");
        let came = self.came.pop_front().expect("every packet held has come");
        self.delays.saturating_record(u64::try_from(came.elapsed().as_nanos()).unwrap_or(u64::MAX));
        self.held_bytes -= packet.bytes.len() as u64;
        self.cleared = self.cleared.saturating_sub(1);
        self.released_up_to = self.released_up_to.max(Some(packet.sequence));
        self.facts_sent += 1;
    }
}

impl Shared {
    fn new(gate: Gate, bounds: Bounds) -> Self {
        let state = State {
            gate,
            shut: false,
            stopping: false,
            held: VecDeque::new(),
            came: VecDeque::new(),
            delays: Histogram::new_with_max(LONGEST_DELAY_NS, 2).expect("bounds that hdrhistogram takes"),
            held_bytes: 0,
            cleared: 0,
            closed: VecDeque::new(),
            committed: Epoch(0),
            applied: Epoch(0),
            sending: false,
            released_up_to: None,
            facts_sent: 0,
            failures: 0,
            last_failure: None,
        };
        Self {
            bounds,
            state: Mutex::new(state),
            work: Condvar::new(),
            progress: Condvar::new(),
            on_room: Mutex::new(None),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn wait(&self, deadline: Deadline, mut until: impl FnMut(&State) -> bool) -> bool {
        let waited = self.progress.wait_timeout_while(self.lock(), deadline.left(), |state| !until(state));
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        until(&state)
    }

    /// The emitting thread.
    fn emit_until_stopped(&self, out: &mut dyn Emitter) {
        let mut retry = FIRST_RETRY;
        while let Some(packet) = self.next_to_send() {
            // The lock is not held here; `sending` says that the first packet is on its way.
            reached("output-cleared");
            let result = out.send(&packet);
            reached("output-shown");
            let mut state = self.lock();
            state.sending = false;
            let had_room = state.has_room(self.bounds);
            match result {
                Ok(()) => {
                    state.sent();
                    retry = FIRST_RETRY;
                }
                Err(error) => {
                    state.failures += 1;
                    state.last_failure = Some(error.to_string());
                    self.progress.notify_all();
                    let waited = self.work.wait_timeout_while(state, retry, |state| !state.stopping);
                    state = waited.unwrap_or_else(PoisonError::into_inner).0;
                    retry = (retry * 2).min(LONGEST_RETRY);
                }
            }
            let room_came = !had_room && state.has_room(self.bounds);
            drop(state);
            self.progress.notify_all();
            if room_came && let Some(wake) = &*lock(&self.on_room) {
                wake();
            }
        }
    }

    /// Waits for a packet that may leave and marks it as being sent; `None` once the outbox is being dropped.
    fn next_to_send(&self) -> Option<Packet> {
        let mut state = self.lock();
        loop {
            if state.stopping {
                return None;
            }
            if let Some(packet) = state.begin_sending() {
                return Some(packet);
            }
            state = if state.cleared_to_send() {
                // Only time tells that a lease has run out, so nobody else would tell those who wait.
                self.progress.notify_all();
                let waited = self.work.wait_timeout(state, LEASE_LOOK);
                waited.unwrap_or_else(PoisonError::into_inner).0
            } else {
                self.work.wait(state).unwrap_or_else(PoisonError::into_inner)
            };
        }
    }
}

/// Without the emitting thread, for the simulation: one emission at a time.
#[cfg(test)]
impl Outbox {
    pub(crate) fn stepped(lease: Option<Arc<dyn LeaseClock>>, bounds: Bounds) -> Self {
        let gate = lease.map_or(Gate::Commit, Gate::Lease);
        Self { shared: Arc::new(Shared::new(gate, bounds)), emitting: None }
    }

    /// Sends the first packet, if it may leave; whether there was one.
    pub(crate) fn emit_one(&self, out: &mut dyn Emitter) -> bool {
        let Some(packet) = self.shared.lock().begin_sending() else { return false };
        let result = out.send(&packet);
        let mut state = self.shared.lock();
        state.sending = false;
        if result.is_ok() {
            state.sent();
        }
        true
    }
}

#[cfg(test)]
mod tests;
