//! The source's judgement of silence: when the lease of a destination that says nothing has certainly run out.
//!
//! Clocks of the two hosts are never compared. The destination counts its lease from when it *posted* the renewal that succeeded;
//! the source counts silence from the last change of the heartbeat that *it* saw, by CLOCK_BOOTTIME, so that a suspended host does
//! not believe that no time has passed. After a stall of its own the source counts anew, because it cannot tell whose silence it was.

use belay_checkpoint::fold::Heard;
use rustix::time::{ClockId, clock_gettime};
use std::time::Duration;

/// A look at the heartbeat that is older than this, or two looks further apart, are a stall of our own.
const OWN_STALL: Duration = Duration::from_millis(100);

/// Counts silence. Asked regularly, at least every [`OWN_STALL`].
#[derive(Debug)]
pub struct Silence {
    bound: Duration,
    counted_from: Duration,
    asked_at: Duration,
}

impl Silence {
    /// Counts from `now`; the lease has run out when `bound` has passed without a heartbeat.
    pub fn new(bound: Duration, now: Duration) -> Self {
        Self { bound, counted_from: now, asked_at: now }
    }

    /// When it will have lasted, as things stand, by CLOCK_BOOTTIME.
    pub fn ends(&self) -> Duration {
        self.counted_from + self.bound
    }

    /// Whether the destination has been silent for the whole bound.
    pub fn has_lasted(&mut self, heard: &Heard, now: Duration) -> bool {
        let looked_at = Duration::from_nanos(heard.looked_at_ns);
        let stalled = now.saturating_sub(self.asked_at) > OWN_STALL || now.saturating_sub(looked_at) > OWN_STALL;
        self.asked_at = now;
        if stalled {
            self.counted_from = now;
        }
        self.counted_from = self.counted_from.max(Duration::from_nanos(heard.changed_at_ns));
        now.saturating_sub(self.counted_from) > self.bound
    }
}

/// CLOCK_BOOTTIME: goes on while the host is suspended.
pub fn boot_time() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn heard(changed: Duration, looked: Duration) -> Heard {
        Heard { counter: 1, changed_at_ns: changed.as_nanos() as u64, looked_at_ns: looked.as_nanos() as u64 }
    }

    #[test]
    fn silence_lasts_from_the_last_heartbeat_seen() {
        let mut silence = Silence::new(50 * MS, Duration::ZERO);
        for now in (0..200).map(|ms| ms * MS) {
            let changed = now.min(100 * MS);
            assert_eq!(silence.has_lasted(&heard(changed, now), now), now > 150 * MS, "at {now:?}");
        }
    }

    #[test]
    fn a_stall_of_our_own_is_not_the_destinations_silence() {
        let mut silence = Silence::new(50 * MS, Duration::ZERO);
        assert!(!silence.has_lasted(&heard(Duration::ZERO, 10 * MS), 10 * MS));
        // Nobody asked for a second; then nobody looked for a second.
        assert!(!silence.has_lasted(&heard(Duration::ZERO, 1000 * MS), 1000 * MS));
        assert!(!silence.has_lasted(&heard(Duration::ZERO, 900 * MS), 1010 * MS));
        assert!(silence.has_lasted(&heard(Duration::ZERO, 1080 * MS), 1080 * MS));
    }
}
