//! Processors for the two threads of a fault, so that belay's and the floor's have the same way to each other.
//!
//! Left to the scheduler they share a processor in one round and not in the next. Who shares one needs no interrupt to be woken, and two threads of
//! one processor never run at once: a figure of one kind beside one of the other says nothing.

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Who runs where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cores {
    pub server: usize,
    pub toucher: usize,
}

impl Cores {
    /// The first two that this process may run on; none where there are no two.
    pub fn first_two() -> Option<Self> {
        let mine = sched_getaffinity(None).ok()?;
        let mut mine = (0..CpuSet::MAX_CPU).filter(|&core| mine.is_set(core));
        Some(Self { server: mine.next()?, toucher: mine.next()? })
    }
}

/// Keeps the calling thread on `core`. Where that is refused it runs anywhere, which costs the comparison and nothing else.
pub fn keep_on(core: usize) {
    let mut set = CpuSet::new();
    set.set(core);
    let _ = sched_setaffinity(None, &set);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_is_kept_on_a_processor_may_run_nowhere_else() {
        let Some(Cores { server, toucher }) = Cores::first_two() else {
            eprintln!("skipped: keeping threads apart needs two processors");
            return;
        };
        assert_ne!(server, toucher);
        let kept = std::thread::spawn(move || {
            keep_on(toucher);
            Cores::first_two()
        });
        assert_eq!(kept.join().unwrap(), None);
        assert!(Cores::first_two().is_some(), "nobody else is kept there");
    }
}
