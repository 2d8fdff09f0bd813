//! How hard the background may pull while a guest waits for pages.
//!
//! Two controls. The *chunk* is small while faults arrive: it is what a fault that comes just after a post has to wait for on a
//! fabric that completes while posting. The *window* (chunks in flight) halves when a demand READ takes much longer on the
//! wire than it does unloaded, and grows back by one for every few chunks that complete in peace.

use super::plan::Tuning;

/// Faults this recent mean that more will come.
const BUSY_NS: u64 = 2_000_000;
/// A demand READ this much slower than unloaded says that the background is in its way.
const SLOWER: u64 = 3;
/// Below this, slowness is the scheduler's and no sign of queueing.
const NOISE_NS: u64 = 20_000;
/// Completed chunks that earn one more in flight.
const EARN: u32 = 8;

#[derive(Debug)]
pub(super) struct Pace {
    chunk_bytes: u64,
    busy_chunk_bytes: u64,
    most: usize,
    window: usize,
    /// Smoothed wire time of demand READs when fast; creeps up so that a change of the path is learnt.
    unloaded_ns: u64,
    last_fault_ns: Option<u64>,
    earned: u32,
}

impl Pace {
    pub(super) fn new(tuning: &Tuning) -> Self {
        Self {
            chunk_bytes: tuning.chunk_bytes,
            busy_chunk_bytes: tuning.busy_chunk_bytes,
            most: tuning.bulk_chunks,
            window: tuning.bulk_chunks,
            unloaded_ns: 0,
            last_fault_ns: None,
            earned: 0,
        }
    }

    /// A fault was read.
    #[inline]
    pub(super) fn fault(&mut self, now_ns: u64) {
        self.last_fault_ns = Some(now_ns);
    }

    /// A demand READ took `wire_ns`.
    #[inline]
    pub(super) fn demand_completed(&mut self, wire_ns: u64) {
        if self.unloaded_ns == 0 || wire_ns < self.unloaded_ns {
            self.unloaded_ns = wire_ns.max(1);
            return;
        }
        self.unloaded_ns += (self.unloaded_ns / 256).max(1);
        if wire_ns > (self.unloaded_ns * SLOWER).max(NOISE_NS) {
            self.window = (self.window / 2).max(1);
            self.earned = 0;
        }
    }

    /// How long the answer to a demand READ is worth being awake for: twice what it takes unloaded, nothing where that is longer
    /// than `bound` or not known yet.
    #[inline]
    pub(super) fn awake_ns(&self, bound_ns: u64) -> u64 {
        let expected = self.unloaded_ns * 2;
        if expected <= bound_ns { expected } else { 0 }
    }

    /// A background chunk completed.
    #[inline]
    pub(super) fn bulk_completed(&mut self) {
        self.earned += 1;
        if self.earned >= EARN && self.window < self.most {
            self.window += 1;
            self.earned = 0;
        }
    }

    /// Chunks that may be in flight.
    #[inline]
    pub(super) fn window(&self) -> usize {
        self.window
    }

    /// Bytes of the next chunk.
    #[inline]
    pub(super) fn chunk_bytes(&self, now_ns: u64) -> u64 {
        if self.busy(now_ns) { self.busy_chunk_bytes } else { self.chunk_bytes }
    }

    /// Whether faults have been arriving.
    #[inline]
    pub(super) fn busy(&self, now_ns: u64) -> bool {
        self.last_fault_ns.is_some_and(|last| now_ns.saturating_sub(last) < BUSY_NS)
    }
}

/// How long a shard that has nothing to do stays awake, by how soon something came before.
///
/// As KVM's halt polling has it (Documentation/virt/kvm/halt-polling.rst): what came soon would have been met awake, so it grows; what
/// came late was not worth it, so it shrinks. To fall asleep and to be woken takes both sides many times what a fault does where an idle
/// processor halts, and the time until something comes is then mostly that.
#[derive(Debug)]
pub(super) struct Spin {
    ns: u64,
    most_ns: u64,
}

/// What it shrinks to.
const LEAST_SPIN_NS: u64 = 1_000;
/// What came within so many times the longest spin came soon: the sleep itself is most of that.
const SOON: u64 = 4;

impl Spin {
    pub(super) fn new(most_ns: u64) -> Self {
        Self { ns: most_ns / 4, most_ns }
    }

    /// How long to stay awake now.
    #[inline]
    pub(super) fn ns(&self) -> u64 {
        self.ns
    }

    /// Something came after so long without any.
    pub(super) fn came_after(&mut self, idle_ns: u64) {
        self.ns = if idle_ns <= self.most_ns * SOON {
            (self.ns * 2).min(self.most_ns)
        } else {
            (self.ns / 2).max(LEAST_SPIN_NS.min(self.most_ns))
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_shrinks_when_demand_slows_and_grows_back_in_peace() {
        let mut pace = Pace::new(&Tuning { bulk_chunks: 8, ..Tuning::default() });
        (0..100).for_each(|_| pace.demand_completed(15_000));
        assert_eq!(pace.window(), 8);
        pace.demand_completed(200_000);
        pace.demand_completed(200_000);
        assert_eq!(pace.window(), 2);
        (0..10).for_each(|_| pace.demand_completed(500_000));
        assert_eq!(pace.window(), 1);
        (0..1000).for_each(|_| pace.bulk_completed());
        assert_eq!(pace.window(), 8);
    }

    #[test]
    fn a_quick_answer_is_waited_for_awake_and_a_slow_one_asleep() {
        let mut pace = Pace::new(&Tuning::default());
        assert_eq!(pace.awake_ns(2_000_000), 0, "nothing is known of the path yet");
        (0..100).for_each(|_| pace.demand_completed(400_000));
        assert!((800_000..2_000_000).contains(&pace.awake_ns(2_000_000)));
        assert_eq!(pace.awake_ns(500_000), 0);
        let mut far = Pace::new(&Tuning::default());
        far.demand_completed(30_000_000);
        assert_eq!(far.awake_ns(2_000_000), 0);
    }

    #[test]
    fn who_has_something_soon_stays_awake_for_it_even_after_having_slept_and_who_has_not_does_not() {
        let mut spin = Spin::new(50_000);
        (0..20).for_each(|_| spin.came_after(10_000_000));
        assert_eq!(spin.ns(), LEAST_SPIN_NS);
        // Longer than it spun, and no longer than a sleep takes.
        (0..20).for_each(|_| spin.came_after(90_000));
        assert_eq!(spin.ns(), 50_000);
        let mut never = Spin::new(0);
        (0..20).for_each(|at| never.came_after(at * 1_000));
        assert_eq!(never.ns(), 0);
    }

    #[test]
    fn chunks_are_small_while_faults_arrive() {
        let tuning = Tuning::default();
        let mut pace = Pace::new(&tuning);
        assert_eq!(pace.chunk_bytes(0), tuning.chunk_bytes);
        pace.fault(1_000);
        assert_eq!(pace.chunk_bytes(100_000), tuning.busy_chunk_bytes);
        assert_eq!(pace.chunk_bytes(10_000_000), tuning.chunk_bytes);
    }
}
