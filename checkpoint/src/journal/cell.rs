//! A value in kept memory that is replaced whole or not at all, whenever the process that writes it dies.
//!
//! ```text
//!    0  commit word: "BL" in the upper 16 bits, the generation in the other 48; 0 while the slot is being written
//!    8  bytes of the value      16  their CRC-64/NVME, the generation and length in it
//!   64  the value
//! ```
//! Two slots are written in turn. The commit word goes first to 0 and last to its value, so a death in between leaves the other
//! slot's value. Anything else than 0 or a slot that is right in every bit is damage, and refused: falling back to an older value
//! would be to forget what was done since.
//!
//! This holds against the death of processes. Against power loss it need not: the memory is gone with it.

use belay_transport::region::{Extent, Mapping, RamFile, RegionError};
use crc_fast::{CrcAlgorithm, Digest};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

const HEAD: usize = 64;
const COMMITTED: u64 = (u16::from_le_bytes(*b"BL") as u64) << GENERATION_BITS;
/// At a thousand values a second these last nine thousand years; 32 would not have lasted two months.
const GENERATION_BITS: u32 = 48;

/// What is kept is not what was written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the kept memory is damaged: {what} at {offset} is not as it was written")]
pub struct Damaged {
    pub what: &'static str,
    pub offset: usize,
}

/// One value of at most `capacity` bytes.
#[derive(Debug)]
pub(crate) struct Cell {
    what: &'static str,
    file: Arc<RamFile>,
    mapping: Arc<Mapping>,
    offset: usize,
    capacity: usize,
    /// Of the newest value; 0 before the first.
    generation: u64,
    /// Bytes of each slot that can be written without taking memory.
    reserved: [usize; 2],
}

impl Cell {
    /// Bytes that a cell for values of `capacity` bytes takes.
    pub(crate) const fn stride(capacity: usize) -> usize {
        2 * slot_stride(capacity)
    }

    /// The cell at `offset` of `file`, which `mapping` maps, with the value it holds, if any.
    pub(crate) fn open(
        what: &'static str,
        (file, mapping): (&Arc<RamFile>, &Arc<Mapping>),
        offset: usize,
        capacity: usize,
    ) -> Result<(Self, Option<Vec<u8>>), Damaged> {
        let (file, mapping) = (file.clone(), mapping.clone());
        let mut cell = Self { what, file, mapping, offset, capacity, generation: 0, reserved: [0; 2] };
        let mut newest: Option<(u64, Vec<u8>)> = None;
        for slot in 0..2 {
            if let Some((generation, value)) = cell.read(slot)?
                && newest.as_ref().is_none_or(|(before, _)| *before < generation)
            {
                newest = Some((generation, value));
            }
        }
        let value = newest.map(|(generation, value)| {
            cell.generation = generation;
            value
        });
        Ok((cell, value))
    }

    fn at(&self, slot: usize) -> usize {
        self.offset + slot * slot_stride(self.capacity)
    }

    fn read(&self, slot: usize) -> Result<Option<(u64, Vec<u8>)>, Damaged> {
        let at = self.at(slot);
        let damaged = Damaged { what: self.what, offset: at };
        let word = |offset| self.mapping.load_u64(at + offset, Ordering::Acquire);
        let (commit, len) = (word(0), word(8));
        if commit == 0 {
            return Ok(None);
        }
        let generation = commit & ((1 << GENERATION_BITS) - 1);
        let len = usize::try_from(len).ok().filter(|&len| len <= self.capacity).ok_or_else(|| damaged.clone())?;
        let mut value = vec![0; len];
        self.mapping.read(at + HEAD, &mut value);
        // Slots take turns, so a generation says by itself in which one it stands.
        let right = commit == COMMITTED | generation && generation % 2 == slot as u64;
        if !right || word(16) != crc(generation, &value) {
            return Err(damaged);
        }
        Ok(Some((generation, value)))
    }

    /// Makes sure that a value of `len` bytes can be written. Room beyond the capacity is an error like a full file system.
    pub(crate) fn reserve(&mut self, len: usize) -> Result<(), RegionError> {
        if len > self.capacity {
            let source = std::io::Error::from(std::io::ErrorKind::FileTooLarge);
            let doing = format!("keeping {len} bytes of {}; there is room for {}", self.what, self.capacity);
            return Err(RegionError::Io { doing, source });
        }
        let slot = (self.generation as usize + 1) % 2;
        let (at, len) = (self.at(slot), HEAD + len);
        if len > self.reserved[slot] {
            self.file.reserve(Extent { offset: at as u64, len: len as u64 })?;
            self.reserved[slot] = len;
        }
        Ok(())
    }

    /// Replaces the value. Its room was reserved.
    pub(crate) fn write(&mut self, value: &[u8]) {
        let generation = self.generation + 1;
        let slot = generation as usize % 2;
        assert!(self.reserved[slot] >= HEAD + value.len(), "{} bytes of {} were not reserved", value.len(), self.what);
        let at = self.at(slot);
        self.mapping.store_u64(at, 0, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        self.mapping.write(at + HEAD, value);
        self.mapping.store_u64(at + 8, value.len() as u64, Ordering::Release);
        self.mapping.store_u64(at + 16, crc(generation, value), Ordering::Release);
        fence(Ordering::SeqCst);
        self.mapping.store_u64(at, COMMITTED | generation, Ordering::SeqCst);
        self.generation = generation;
    }
}

const fn slot_stride(capacity: usize) -> usize {
    (HEAD + capacity).next_multiple_of(64)
}

fn crc(generation: u64, value: &[u8]) -> u64 {
    let mut digest = Digest::new(CrcAlgorithm::Crc64Nvme);
    digest.update(&generation.to_le_bytes());
    digest.update(&(value.len() as u64).to_le_bytes());
    digest.update(value);
    digest.finalize()
}

/// What a fuzz target asks of a cell: whatever its memory holds, it is refused or gives a value that one of its slots holds whole; and what is
/// written next is read next.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz(memory: &[u8]) {
    const CAPACITY: usize = 500;
    const BYTES: usize = 4096;
    let file = RamFile::memfd("belay-cell-fuzz", BYTES, belay_transport::PageSize::Small).expect("memory");
    let file = Arc::new(file);
    let mapping = Arc::new(file.map().expect("memory"));
    mapping.write(0, &memory[..memory.len().min(BYTES)]);
    let open = || Cell::open("a fuzzed value", (&file, &mapping), 0, CAPACITY);
    let Ok((mut cell, value)) = open() else { return };
    assert!(value.is_none_or(|value| value.len() <= CAPACITY));
    if cell.generation < (1 << GENERATION_BITS) - 1 {
        cell.reserve(4).expect("room");
        cell.write(b"next");
        assert_eq!(open().expect("just written").1.as_deref(), Some(&b"next"[..]));
    }
}

/// Memory with a value of each slot, as it is written, for the corpus.
#[cfg(test)]
pub(crate) fn seed() -> Vec<u8> {
    let file = Arc::new(RamFile::memfd("belay-cell-fuzz", 4096, belay_transport::PageSize::Small).expect("memory"));
    let mapping = Arc::new(file.map().expect("memory"));
    let (mut cell, _) = Cell::open("a seed", (&file, &mapping), 0, 500).expect("empty");
    for value in [&b"before"[..], b"now"] {
        cell.reserve(value.len()).expect("room");
        cell.write(value);
    }
    let mut bytes = vec![0; Cell::stride(500)];
    mapping.read(0, &mut bytes);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use belay_transport::PageSize;
    use proptest::prelude::*;

    fn memory() -> (Arc<RamFile>, Arc<Mapping>) {
        let file = Arc::new(RamFile::memfd("belay-cell-test", 8192, PageSize::Small).unwrap());
        let mapping = Arc::new(file.map().unwrap());
        (file, mapping)
    }

    fn open(memory: &(Arc<RamFile>, Arc<Mapping>)) -> Result<(Cell, Option<Vec<u8>>), Damaged> {
        Cell::open("a test's value", (&memory.0, &memory.1), 64, 500)
    }

    fn put(cell: &mut Cell, value: &[u8]) {
        cell.reserve(value.len()).unwrap();
        cell.write(value);
    }

    #[test]
    fn the_newest_value_is_read_back_by_whoever_opens_it() {
        let memory = memory();
        assert!(open(&memory).unwrap().1.is_none());
        for round in 1..6u8 {
            let (mut cell, _) = open(&memory).unwrap();
            put(&mut cell, &vec![round; usize::from(round) * 90]);
            assert_eq!(open(&memory).unwrap().1.unwrap(), vec![round; usize::from(round) * 90]);
        }
        let (mut cell, _) = open(&memory).unwrap();
        assert!(cell.reserve(501).is_err(), "a value that does not fit is an error");
    }

    proptest! {
        /// A death stops the writer between two stores: of the head's words, or within the value.
        #[test]
        fn a_death_in_the_middle_of_a_write_leaves_the_value_before_it(written in 0usize..200, words in 0usize..3) {
            let memory = memory();
            let (mut cell, _) = open(&memory).unwrap();
            put(&mut cell, b"first");
            put(&mut cell, b"second");
            // As `write` goes about it.
            let at = cell.at(1);
            memory.1.store_u64(at, 0, Ordering::SeqCst);
            memory.1.write(at + HEAD, &vec![9; written]);
            for (offset, value) in [(8, 200), (16, 7)].into_iter().take(words) {
                memory.1.store_u64(at + offset, value, Ordering::SeqCst);
            }
            let (mut again, value) = open(&memory).unwrap();
            prop_assert_eq!(value.as_deref(), Some(&b"second"[..]));
            put(&mut again, b"third");
            let value = open(&memory).unwrap().1;
            prop_assert_eq!(value.as_deref(), Some(&b"third"[..]));
        }
    }

    #[test]
    fn a_flipped_bit_is_refused_and_never_read_as_an_older_value() {
        let memory = memory();
        let (mut cell, _) = open(&memory).unwrap();
        put(&mut cell, b"before");
        put(&mut cell, b"now");
        let at = cell.at(0);
        for byte in (0..24).chain(HEAD..HEAD + 3) {
            for bit in 0..8 {
                let flip = |byte: usize| {
                    let mut one = [0];
                    memory.1.read(at + byte, &mut one);
                    memory.1.write(at + byte, &[one[0] ^ 1 << bit]);
                };
                flip(byte);
                let found = open(&memory).map(|(_, value)| value);
                flip(byte);
                assert!(found.is_err(), "bit {bit} of byte {byte}: {found:?}");
            }
        }
        assert_eq!(open(&memory).unwrap().1.as_deref(), Some(&b"now"[..]));
    }
}
