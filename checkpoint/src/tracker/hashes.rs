//! What a page held when it was last put into a record, by a hash of 128 bits: 16 bytes a page, taken from the system only
//! where pages are hashed.
//!
//! The hash has a secret seed, so that a guest cannot look for two pages with the same one. (It could only harm itself.)

use belay_transport::region::Mapping;
use belay_transport::{PAGE_SIZE, PageIndex};
use std::io;
use xxhash_rust::xxh3::xxh3_128_with_seed;

/// How a page compares with what it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    Same,
    Changed,
    /// Nothing was known of it.
    Unknown,
}

/// Of one region. 0 stands for a page whose content is not known.
pub(super) struct Hashes {
    of: Vec<u128>,
    seed: u64,
    page: Box<[u8; PAGE_SIZE]>,
}

impl Hashes {
    pub(super) fn new(pages: u64) -> io::Result<Self> {
        let mut seed = [0; 8];
        let got = rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty())?;
        if got < seed.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // Zeroed memory is the system's own, and touched only where something is written.
        Ok(Self { of: vec![0; pages as usize], seed: u64::from_ne_bytes(seed), page: Box::new([0; PAGE_SIZE]) })
    }

    /// Compares a page with what it was last, and remembers what it is.
    pub(super) fn renew(&mut self, memory: &Mapping, page: PageIndex) -> Content {
        memory.read(page.offset(), &mut self.page[..]);
        let hash = xxh3_128_with_seed(&self.page[..], self.seed).max(1);
        let old = std::mem::replace(&mut self.of[page.0 as usize], hash);
        match old {
            0 => Content::Unknown,
            old if old == hash => Content::Same,
            _ => Content::Changed,
        }
    }

    /// Nothing is known of the page any more.
    pub(super) fn forget(&mut self, page: PageIndex) {
        let hash = &mut self.of[page.0 as usize];
        if *hash != 0 {
            *hash = 0;
        }
    }

    /// Nothing is known of any page. Gives the memory back.
    pub(super) fn forget_all(&mut self) {
        self.of = vec![0; self.of.len()];
    }
}
