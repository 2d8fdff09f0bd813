//! A point in time by which a wait must have ended. Every wait in belay takes one (P7).

use std::time::{Duration, Instant};

/// When a wait gives up. Cheap to copy; made once at the top of an operation and handed down, so that nested
/// waits share one bound instead of adding theirs up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(Instant);

impl Deadline {
    /// A deadline `bound` from now.
    pub fn after(bound: Duration) -> Self {
        Self(Instant::now() + bound)
    }

    /// A deadline at `instant`.
    pub fn at(instant: Instant) -> Self {
        Self(instant)
    }

    /// Time left; zero once it has passed.
    pub fn left(&self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }

    /// Whether it has passed.
    pub fn expired(&self) -> bool {
        self.left().is_zero()
    }

    /// The earlier of the two.
    pub fn min(self, other: Self) -> Self {
        Self(self.0.min(other.0))
    }

    /// The instant itself.
    pub fn instant(&self) -> Instant {
        self.0
    }

    /// What is left, as poll(2) wants it: milliseconds rounded up, so that a wait never spins on a last fraction.
    pub fn poll_timeout_ms(&self) -> i32 {
        i32::try_from(self.left().as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
    }
}
