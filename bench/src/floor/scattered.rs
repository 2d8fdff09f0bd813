//! memcpy of pages from all over memory: what staging and folding cannot do without.

use super::{Map, PAGE, copy, memfd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

/// A guest's memory, and what is copied out of it and into it in pages from all over.
pub struct Scattered {
    memory: Map,
    /// Two, by turns, like staging slots.
    buffers: [Map; 2],
    chosen: Vec<usize>,
    state: u64,
    turn: usize,
}

impl Scattered {
    /// Over `file` of `len` bytes, whose content it does not change; for `pages` pages at a time.
    pub fn over(file: BorrowedFd<'_>, len: usize, pages: usize) -> io::Result<Self> {
        let buffer = || Map::new(memfd(pages * PAGE)?.as_fd(), pages * PAGE, true);
        let (memory, buffers) = (Map::new(file, len, true)?, [buffer()?, buffer()?]);
        Ok(Self { memory, buffers, chosen: Vec::with_capacity(pages), state: 1, turn: 0 })
    }

    /// Writes a word of as many scattered pages as a buffer takes, then copies those pages, in ascending order.
    pub fn copy(&mut self) -> Duration {
        let pages = self.memory.len / PAGE;
        self.turn += 1;
        let buffer = &self.buffers[self.turn % 2];
        self.chosen.clear();
        for _ in 0..buffer.len / PAGE {
            self.state = self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let page = (self.state >> 33) as usize % pages;
            let word = self.memory.page(page * PAGE, PAGE).cast::<u64>();
            // SAFETY: `page` gives a whole page of the mapping, and nobody writes to it meanwhile.
            let value = unsafe { word.read_volatile() };
            // SAFETY: as above.
            unsafe { word.write_volatile(value) };
            self.chosen.push(page);
        }
        self.chosen.sort_unstable();
        let start = Instant::now();
        for (at, page) in self.chosen.iter().enumerate() {
            copy(self.memory.page(page * PAGE, PAGE), buffer.page(at * PAGE, PAGE), PAGE);
        }
        start.elapsed()
    }

    /// Puts what was copied last back where it was.
    pub fn put_back(&mut self) -> Duration {
        let buffer = &self.buffers[self.turn % 2];
        let start = Instant::now();
        for (at, page) in self.chosen.iter().enumerate() {
            copy(buffer.page(at * PAGE, PAGE), self.memory.page(page * PAGE, PAGE), PAGE);
        }
        start.elapsed()
    }
}
