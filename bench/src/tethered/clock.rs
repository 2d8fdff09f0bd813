//! A pause as the guest sees it: the metronome's log of gaps in its own clock, and which of them was the last stop.

use belay_checkpoint::dirty::DirtySet;
use belay_checkpoint::guest::{DirtyTracker, Guest, GuestError, RamBlock, TrackerKind};
use belay_transport::Deadline;
use belay_transport::region::Mapping;
use belay_vmm_glue::kvm::SharedGuest;
use belay_vmm_glue::kvm::guests::{GuestSpec, METRONOME_LOG_ENTRIES};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The metronome's log of gaps in the guest's own clock.
#[derive(Clone)]
pub struct GuestClock {
    memory: Arc<Mapping>,
    at: usize,
    khz: u32,
    last: Arc<Stop>,
}

/// The last stop, by the host's clock.
#[derive(Default)]
struct Stop {
    since: Mutex<Option<Instant>>,
    /// Gaps logged before the resume, and for how long the guest had certainly stood still by then, in ns: the first gap after
    /// those that is no shorter is this stop. (A gap may come between: the guest was just about to log it.)
    mark: AtomicU64,
    still_ns: AtomicU64,
}

impl GuestClock {
    /// Of a metronome whose memory `alias` maps, and whose TSC makes so many ticks in a millisecond.
    pub fn new(spec: &GuestSpec, alias: &Arc<Mapping>, khz: u32) -> Result<Self, GuestError> {
        let layout = spec.layout().map_err(|error| GuestError::BadState(error.to_string()))?;
        let at = layout.metronome_log().offset();
        Ok(Self { memory: alias.clone(), at, khz, last: Arc::default() })
    }

    fn logged(&self) -> u64 {
        self.memory.load_u64(self.at, Ordering::Acquire)
    }

    fn gap(&self, index: u64) -> Duration {
        let entry = self.at + 128 + (index % METRONOME_LOG_ENTRIES) as usize * 16;
        let ticks = self.memory.load_u64(entry + 8, Ordering::Acquire);
        Duration::from_nanos(ticks.saturating_mul(1_000_000) / u64::from(self.khz))
    }

    /// How long the last pause was for the guest, which is parked by now: what it saw is in its log. `None` when it was not watching.
    pub fn last_pause(&self) -> Option<Duration> {
        let mark = self.last.mark.load(Ordering::Acquire);
        let still = Duration::from_nanos(self.last.still_ns.load(Ordering::Acquire));
        (mark..self.logged()).map(|index| self.gap(index)).find(|gap| *gap >= still)
    }

    fn stopped(&self) {
        *self.last.since.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    fn resuming(&self) {
        let since = self.last.since.lock().unwrap_or_else(PoisonError::into_inner).take();
        let still = since.map_or(Duration::ZERO, |since| since.elapsed());
        self.last.mark.store(self.logged(), Ordering::Release);
        self.last.still_ns.store(u64::try_from(still.as_nanos()).unwrap_or(u64::MAX), Ordering::Release);
    }
}

/// The guest as the tether sees it: notes when it stands still, and how many gaps it had logged by then.
pub struct Watched {
    pub guest: SharedGuest,
    pub clock: GuestClock,
}

impl Guest for Watched {
    fn pause(&mut self, deadline: Deadline) -> Result<(), GuestError> {
        self.guest.pause(deadline)?;
        self.clock.stopped();
        Ok(())
    }
    fn resume(&mut self) -> Result<(), GuestError> {
        self.clock.resuming();
        self.guest.resume()
    }
    fn save(&mut self, out: &mut Vec<u8>) -> Result<(), GuestError> {
        self.guest.save(out)
    }
    fn load(&mut self, state: &[u8]) -> Result<(), GuestError> {
        self.guest.load(state)
    }
    fn set_incarnation(&mut self, nonce: u64) -> Result<(), GuestError> {
        self.guest.set_incarnation(nonce)
    }
    fn memory(&self) -> &[RamBlock] {
        self.guest.memory()
    }
    fn tracker(&mut self, kind: TrackerKind) -> Result<Box<dyn DirtyTracker>, GuestError> {
        self.guest.tracker(kind)
    }
    fn device_writes(&mut self, into: &mut DirtySet) -> Result<(), GuestError> {
        self.guest.device_writes(into)
    }
}
