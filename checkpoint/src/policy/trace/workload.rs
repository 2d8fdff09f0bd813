//! Traces made from a seed.

use super::{Stretch, Trace};
use std::fmt;
use std::time::Duration;

/// Ways in which guests write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Workload {
    /// A page now and then, output ten times a second.
    Idle,
    /// From one end of memory to the other, again and again.
    Sequential,
    /// Anywhere.
    Random,
    /// A few pages much more often than the rest.
    Zipf,
    /// More than a link carries, in a set that fits an epoch.
    WriteHeavy,
    /// Idle, then random, then write-heavy, a second each.
    Phases,
}

impl Workload {
    pub const ALL: [Self; 6] = [Self::Idle, Self::Sequential, Self::Random, Self::Zipf, Self::WriteHeavy, Self::Phases];

    /// What a guest of `pages` pages does in `length`, in stretches of 1 ms.
    pub fn trace(self, seed: u64, pages: u32, length: Duration) -> Trace {
        let mut random = Random(seed);
        let mut at = 0;
        let count = (length.as_millis() as u64).max(1);
        let stretches = (0..count).map(|ms| self.stretch(ms, pages, &mut random, &mut at)).collect();
        Trace { pages, stretches }
    }

    fn stretch(self, ms: u64, pages: u32, random: &mut Random, at: &mut u32) -> Stretch {
        let mut stretch = Stretch { lasts: Duration::from_millis(1), ..Stretch::default() };
        let mut write = |page: u32| {
            if !stretch.pages().any(|written| written == page) {
                stretch.wrote(page);
            }
        };
        // Request and response: 1,000 packets a second, in bursts and gaps.
        let talks = random.below(100) < if (ms / 50).is_multiple_of(3) { 20 } else { 140 };
        match self {
            Self::Idle => {
                if ms.is_multiple_of(10) {
                    write(random.below(64.min(pages)));
                }
                stretch.outputs = u32::from(ms.is_multiple_of(100));
                return stretch;
            }
            Self::Sequential => (0..20).for_each(|_| {
                write(*at);
                *at = (*at + 1) % pages;
            }),
            Self::Random => (0..20).for_each(|_| write(random.below(pages))),
            Self::Zipf => (0..40).for_each(|_| {
                // Inverse transform of a density that falls as 1/rank.
                let rank = (f64::from(pages).ln() * random.unit()).exp() - 1.0;
                write((rank as u32).min(pages - 1));
            }),
            Self::WriteHeavy => (0..120).for_each(|_| write(random.below(2000.min(pages)))),
            Self::Phases => {
                let phase = [Self::Idle, Self::Random, Self::WriteHeavy][(ms / 1000 % 3) as usize];
                return phase.stretch(ms, pages, random, at);
            }
        }
        stretch.outputs = u32::from(talks);
        stretch
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Idle => "idle",
            Self::Sequential => "sequential",
            Self::Random => "random",
            Self::Zipf => "zipf",
            Self::WriteHeavy => "write-heavy",
            Self::Phases => "phases",
        })
    }
}

/// Numbers from a seed (splitmix64).
pub(in super::super) struct Random(pub u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u32) -> u32 {
        (self.next() % u64::from(bound)) as u32
    }

    /// From 0 up to 1.
    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }
}
