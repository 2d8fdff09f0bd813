//! Faults as the shards meet them, on their way to whoever writes them down.
//!
//! A ring a shard, made beforehand: the shard's thread puts in, one other thread takes out, and neither waits for the other. Without a log a fault
//! pays for a branch; with one, for two entries of 24 bytes, no lock, no system call and nothing allocated. A ring that is full is *over*: what is in
//! it is whole up to there, and nothing is put behind a gap.

use crate::units::{FrameIndex, RegionId};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Entries of a shard's ring: 1.5 MiB. What 150,000 faults a second put in while nobody takes out for a fifth of a second.
const ENTRIES: usize = 1 << 16;
/// Frames of a region that an entry can name.
const FRAME_BITS: u32 = 44;
const SHOWN: u64 = 1 << 63;
const WRITE: u64 = 1 << 62;

/// Something that a shard has noted. Times are nanoseconds since the engine started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Noted {
    /// A fault was read; its thread waits. Faults at write-protected pages are not noted.
    Fault {
        at_ns: u64,
        region: RegionId,
        frame: FrameIndex,
        write: bool,
        /// As the VMM's process counts its threads; 0 where the kernel does not say.
        thread: u32,
    },
    /// Whoever waits for one of these frames goes on.
    Shown { at_ns: u64, region: RegionId, first: FrameIndex, frames: u64 },
}

/// A shard's ring was full: it has noted nothing since.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("shard {shard} noted more than {ENTRIES} faults and answers before anybody took them")]
pub struct Overrun {
    pub shard: usize,
}

/// A word on a cache line of its own, and of the one that is fetched along.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Apart(AtomicU64);

#[derive(Debug)]
struct Ring {
    entries: Box<[[AtomicU64; 3]]>,
    /// Entries ever put in; the shard alone writes it.
    put: Apart,
    /// Entries ever taken out; the taker alone writes it.
    taken: Apart,
    over: AtomicBool,
}

/// What the shards note. One thread at a time takes from it.
#[derive(Debug)]
pub struct FaultLog {
    rings: Vec<Ring>,
}

impl FaultLog {
    /// For an engine of so many shards.
    pub fn new(shards: usize) -> Self {
        Self { rings: (0..shards).map(|_| Ring::new(ENTRIES)).collect() }
    }

    /// How many shards it was made for.
    pub fn shards(&self) -> usize {
        self.rings.len()
    }

    /// Hands over, shard by shard and in each in the order in which it was noted, what came since the last call. An error once all has been handed
    /// over that was noted before a ring was full.
    pub fn take(&self, f: &mut dyn FnMut(usize, Noted)) -> Result<(), Overrun> {
        let mut over = None;
        for (shard, ring) in self.rings.iter().enumerate() {
            // Looked at first: whatever a ring that is over has in it was put in before.
            if ring.over.load(Ordering::Acquire) {
                over.get_or_insert(Overrun { shard });
            }
            ring.take(&mut |entry| f(shard, decode(entry)));
        }
        over.map_or(Ok(()), Err)
    }

    /// By the shard's thread alone.
    #[inline]
    pub(super) fn note(&self, shard: usize, noted: Noted) {
        if let Some(ring) = self.rings.get(shard) {
            ring.put(encode(noted));
        }
    }
}

impl Ring {
    fn new(entries: usize) -> Self {
        let entries = (0..entries).map(|_| Default::default()).collect();
        Self { entries, put: Apart::default(), taken: Apart::default(), over: AtomicBool::new(false) }
    }

    #[inline]
    fn put(&self, words: [u64; 3]) {
        let put = self.put.0.load(Ordering::Relaxed);
        if put - self.taken.0.load(Ordering::Acquire) >= self.entries.len() as u64 {
            self.over.store(true, Ordering::Release);
        }
        if self.over.load(Ordering::Relaxed) {
            return;
        }
        let entry = &self.entries[put as usize % self.entries.len()];
        for (word, value) in entry.iter().zip(words) {
            word.store(value, Ordering::Relaxed);
        }
        self.put.0.store(put + 1, Ordering::Release);
    }

    fn take(&self, f: &mut dyn FnMut([u64; 3])) {
        let put = self.put.0.load(Ordering::Acquire);
        for at in self.taken.0.load(Ordering::Relaxed)..put {
            let entry = &self.entries[at as usize % self.entries.len()];
            f(std::array::from_fn(|word| entry[word].load(Ordering::Relaxed)));
            self.taken.0.store(at + 1, Ordering::Release);
        }
    }
}

/// Time; what, region and frame; the thread or how many frames.
fn encode(noted: Noted) -> [u64; 3] {
    let place =
        |region: RegionId, frame: FrameIndex| u64::from(region.0) << FRAME_BITS | (frame.0 & ((1 << FRAME_BITS) - 1));
    match noted {
        Noted::Fault { at_ns, region, frame, write, thread } => {
            [at_ns, place(region, frame) | if write { WRITE } else { 0 }, u64::from(thread)]
        }
        Noted::Shown { at_ns, region, first, frames } => [at_ns, place(region, first) | SHOWN, frames],
    }
}

fn decode([at_ns, what, more]: [u64; 3]) -> Noted {
    let region = RegionId((what >> FRAME_BITS) as u16);
    let frame = FrameIndex(what & ((1 << FRAME_BITS) - 1));
    match what & SHOWN {
        0 => Noted::Fault { at_ns, region, frame, write: what & WRITE != 0, thread: more as u32 },
        _ => Noted::Shown { at_ns, region, first: frame, frames: more },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn fault(at_ns: u64) -> Noted {
        Noted::Fault { at_ns, region: RegionId(3), frame: FrameIndex(at_ns * 7), write: at_ns % 2 == 1, thread: 41 }
    }

    fn taken(log: &FaultLog) -> (Vec<(usize, Noted)>, Result<(), Overrun>) {
        let mut all = Vec::new();
        let outcome = log.take(&mut |shard, noted| all.push((shard, noted)));
        (all, outcome)
    }

    #[test]
    fn what_is_noted_is_taken_once_in_its_order_whatever_it_says() {
        let log = FaultLog::new(2);
        let (region, first) = (RegionId(u16::MAX), FrameIndex((1 << FRAME_BITS) - 1));
        let ends = [
            Noted::Shown { at_ns: u64::MAX, region, first, frames: u64::MAX },
            Noted::Fault { at_ns: 0, region, frame: first, write: true, thread: u32::MAX },
            Noted::Fault { at_ns: 1, region: RegionId(0), frame: FrameIndex(0), write: false, thread: 0 },
        ];
        ends.into_iter().for_each(|noted| log.note(1, noted));
        log.note(0, fault(5));
        log.note(2, fault(6));
        let expected = [(0, fault(5)), (1, ends[0]), (1, ends[1]), (1, ends[2])];
        assert_eq!(taken(&log), (expected.to_vec(), Ok(())));
        assert_eq!(taken(&log), (Vec::new(), Ok(())));
    }

    #[test]
    fn a_ring_that_was_full_says_so_and_has_everything_before_and_nothing_after() {
        let log = FaultLog::new(1);
        (0..ENTRIES as u64 + 10).for_each(|at| log.note(0, fault(at)));
        let (first, outcome) = taken(&log);
        assert_eq!((first.len(), outcome), (ENTRIES, Err(Overrun { shard: 0 })));
        assert_eq!(first.last(), Some(&(0, fault(ENTRIES as u64 - 1))));
        log.note(0, fault(1));
        assert_eq!(taken(&log), (Vec::new(), Err(Overrun { shard: 0 })), "nothing comes behind a gap");
    }

    #[test]
    fn one_thread_notes_while_another_takes_and_nothing_is_torn_or_lost() {
        const MANY: u64 = 400_000;
        let log = Arc::new(FaultLog::new(1));
        let noting = Arc::clone(&log);
        let noted = std::thread::spawn(move || {
            for at in 0..MANY {
                while at - noting.rings[0].taken.0.load(Ordering::Relaxed) >= ENTRIES as u64 {
                    std::thread::yield_now();
                }
                noting.note(0, fault(at));
            }
        });
        let mut next = 0;
        while next < MANY {
            let outcome = log.take(&mut |_, noted| {
                assert_eq!(noted, fault(next));
                next += 1;
            });
            assert_eq!(outcome, Ok(()));
        }
        noted.join().unwrap();
    }
}
