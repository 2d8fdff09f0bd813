//! Pages touched as a trace has them, by several threads with time between, while the leanest loop serves them.

use super::{Fault, Map, Source, Wire, served};
use std::io;
use std::time::{Duration, Instant};

/// Before what is waited for a thread is awake: what being woken may be late by.
const AWAKE: Duration = Duration::from_micros(100);

/// What a thread does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// Before it touches.
    pub think: Duration,
    pub page: usize,
    pub write: bool,
}

impl Step {
    /// Lets the time pass that its thread did something else.
    pub fn think(&self) {
        let until = Instant::now() + self.think;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match left.checked_sub(AWAKE) {
                _ if left.is_zero() => return,
                Some(asleep) if !asleep.is_zero() => std::thread::sleep(asleep),
                _ => std::hint::spin_loop(),
            }
        }
    }
}

/// A thread for each of `threads`; what each touch took, in nanoseconds, and how long it was until the last one was over.
pub fn replay(
    wire: Wire,
    Source(source): &Source,
    fault: Fault,
    threads: &[Vec<Step>],
) -> io::Result<(Vec<u64>, Duration)> {
    let touched =
        served(wire, source, fault, Duration::ZERO, threads, |memory, steps| touch(&memory.guest, fault.page, steps));
    touched.map(|(faults, took)| (faults.toucher, took))
}

fn touch(guest: &Map, page: usize, steps: &[Step]) -> Vec<u64> {
    let mut took = Vec::with_capacity(steps.len());
    for step in steps {
        step.think();
        let at = guest.page(step.page * page, page).cast::<u64>();
        let start = Instant::now();
        if step.write {
            // SAFETY: `page` gives a whole page of the mapping; volatile, because another thread fills it.
            unsafe { at.write_volatile(1) };
        } else {
            // SAFETY: as above.
            unsafe { at.read_volatile() };
        }
        took.push(start.elapsed().as_nanos() as u64);
    }
    took
}
