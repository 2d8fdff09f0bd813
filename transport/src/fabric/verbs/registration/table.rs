//! Where the bytes of a mapping are to be had: file offset to address and keys.
//!
//! Both sides of an operation have such a table: the owner's exports, as the initiator was told of them, and the initiator's own
//! mappings. An operation that crosses a chunk's border is done in pieces, one a chunk.

use crate::region::Extent;
use serde::{Deserialize, Serialize};

/// Bytes of a mapping that one memory region holds. (A part of a region, once a later one has taken over the rest.)
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::fabric::verbs) struct Chunk {
    /// In the mapping.
    pub offset: u64,
    pub len: u64,
    /// Address of the first byte, as the device knows it.
    pub addr: u64,
    /// For the host that registered it; meaningless to another.
    pub lkey: u32,
    pub rkey: u32,
}

impl Chunk {
    fn end(&self) -> u64 {
        self.offset + self.len
    }

    /// The part of it between two offsets inside it.
    fn part(&self, start: u64, end: u64) -> Self {
        Self { offset: start, len: end - start, addr: self.addr + (start - self.offset), ..*self }
    }
}

/// A part of an operation that lies within one chunk on each side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::fabric::verbs) struct Piece {
    pub local_addr: u64,
    pub lkey: u32,
    pub remote_addr: u64,
    pub rkey: u32,
    pub len: u32,
}

/// Chunks in the order of their offsets, disjoint.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::fabric::verbs) struct Table {
    chunks: Vec<Chunk>,
}

/// A table from a peer that cannot be one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the chunk of {len} bytes at {offset} is empty, overlaps the one before it, or lies beyond {limit} bytes")]
pub struct BadChunk {
    pub offset: u64,
    pub len: u64,
    pub limit: u64,
}

impl Table {
    /// A table of a mapping of `len` bytes, after checking that it is one: it may have come from a peer.
    pub(in crate::fabric::verbs) fn new(chunks: Vec<Chunk>, len: u64) -> Result<Self, BadChunk> {
        let mut free_from = 0;
        for chunk in &chunks {
            let bad = BadChunk { offset: chunk.offset, len: chunk.len, limit: len };
            let end = chunk.offset.checked_add(chunk.len).filter(|end| *end <= len);
            let addressable = chunk.addr.checked_add(chunk.len).is_some();
            match end {
                Some(end) if chunk.len > 0 && chunk.offset >= free_from && addressable => free_from = end,
                _ => return Err(bad),
            }
        }
        Ok(Self { chunks })
    }

    pub(in crate::fabric::verbs) fn chunks(&self) -> &[Chunk] {
        &self.chunks
    }

    /// The chunk that holds the byte at `offset`.
    #[inline]
    pub(in crate::fabric::verbs) fn at(&self, offset: u64) -> Option<&Chunk> {
        let after = self.chunks.partition_point(|chunk| chunk.offset <= offset);
        self.chunks.get(after.checked_sub(1)?).filter(|chunk| offset < chunk.end())
    }

    /// Whether every byte of a range lies in some chunk.
    pub(in crate::fabric::verbs) fn covers(&self, offset: u64, len: u64) -> bool {
        let Some(end) = offset.checked_add(len) else { return false };
        let mut at = offset;
        while at < end {
            let Some(chunk) = self.at(at) else { return false };
            at = chunk.end();
        }
        true
    }

    /// What the table covers.
    pub(super) fn extents(&self) -> Vec<Extent> {
        super::extents::normal(
            self.chunks.iter().map(|chunk| Extent { offset: chunk.offset, len: chunk.len }).collect(),
        )
    }

    /// Takes `gone` (sorted, disjoint) out of every chunk.
    pub(in crate::fabric::verbs) fn remove(&mut self, gone: &[Extent]) {
        if gone.is_empty() {
            return;
        }
        let mut left = Vec::with_capacity(self.chunks.len() + gone.len());
        for chunk in &self.chunks {
            let mut at = chunk.offset;
            let first = gone.partition_point(|extent| super::extents::end(extent) <= at);
            for extent in gone[first..].iter().take_while(|extent| extent.offset < chunk.end()) {
                if extent.offset > at {
                    left.push(chunk.part(at, extent.offset));
                }
                at = super::extents::end(extent).min(chunk.end());
            }
            if at < chunk.end() {
                left.push(chunk.part(at, chunk.end()));
            }
        }
        self.chunks = left;
    }

    /// Puts newer chunks (sorted, disjoint) over what was there.
    pub(in crate::fabric::verbs) fn overlay(&mut self, newer: &[Chunk]) {
        let taken: Vec<Extent> = newer.iter().map(|chunk| Extent { offset: chunk.offset, len: chunk.len }).collect();
        self.remove(&taken);
        self.chunks.extend_from_slice(newer);
        self.chunks.sort_unstable_by_key(|chunk| chunk.offset);
    }
}

/// The first piece of an operation between `local` and `remote`; `None` where either side has no chunk. The caller goes on behind it
/// until all of `len` is done, which takes at most [`most_pieces`] pieces.
#[inline]
pub(in crate::fabric::verbs) fn piece(
    (local, local_offset): (&Table, u64),
    (remote, remote_offset): (&Table, u64),
    len: u32,
) -> Option<Piece> {
    let (from, to) = (local.at(local_offset)?, remote.at(remote_offset)?);
    let (local_skip, remote_skip) = (local_offset - from.offset, remote_offset - to.offset);
    let within = (from.len - local_skip).min(to.len - remote_skip);
    Some(Piece {
        local_addr: from.addr + local_skip,
        lkey: from.lkey,
        remote_addr: to.addr + remote_skip,
        rkey: to.rkey,
        len: within.min(u64::from(len)) as u32,
    })
}

/// Pieces that an operation of `len` bytes can come to: chunks begin and end on pages, on either side.
pub(in crate::fabric::verbs) const fn most_pieces(len: u32) -> usize {
    2 * (len as usize).div_ceil(crate::units::PAGE_SIZE) + 1
}

#[cfg(test)]
mod tests {
    use super::super::extents::tests::{PAGE, PAGES, any_extents};
    use super::super::extents::{difference, normal};
    use super::*;
    use proptest::prelude::*;

    /// Chunks over extents, each region with a base and keys of its own.
    fn chunks(extents: &[Extent], generation: u32) -> Vec<Chunk> {
        let chunk = |(index, extent): (usize, &Extent)| {
            let key = generation * 1000 + index as u32;
            Chunk { offset: extent.offset, len: extent.len, addr: (u64::from(key) + 1) << 32, lkey: key, rkey: !key }
        };
        extents.iter().enumerate().map(chunk).collect()
    }

    /// Address and key of every byte's page, or nothing: the model.
    type Pages = Vec<Option<(u64, u32)>>;

    fn put(pages: &mut Pages, chunks: &[Chunk]) {
        for chunk in chunks {
            for page in chunk.offset / PAGE..chunk.end() / PAGE {
                pages[page as usize] = Some((chunk.addr + (page * PAGE - chunk.offset), chunk.rkey));
            }
        }
    }

    fn seen(table: &Table) -> Pages {
        let at = |page| table.at(page * PAGE).map(|chunk| (chunk.addr + (page * PAGE - chunk.offset), chunk.rkey));
        (0..PAGES).map(at).collect()
    }

    proptest! {
        #[test]
        fn a_byte_is_found_in_the_newest_chunk_that_holds_it(
            generations in prop::collection::vec((any_extents(), any_extents()), 1..5),
        ) {
            let (mut table, mut model) = (Table::default(), vec![None; PAGES as usize]);
            for (generation, (more, gone)) in generations.into_iter().enumerate() {
                let newer = chunks(&normal(more), generation as u32);
                table.overlay(&newer);
                put(&mut model, &newer);
                prop_assert_eq!(&seen(&table), &model);
                let gone = normal(gone);
                table.remove(&gone);
                for extent in &gone {
                    model[(extent.offset / PAGE) as usize..((extent.offset + extent.len) / PAGE) as usize].fill(None);
                }
                prop_assert_eq!(&seen(&table), &model);
                prop_assert!(Table::new(table.chunks().to_vec(), PAGES * PAGE).is_ok(), "still in order and disjoint");
                for page in 0..PAGES {
                    let run = (page..PAGES).take_while(|page| model[*page as usize].is_some()).count() as u64;
                    prop_assert!(run == 0 || table.covers(page * PAGE, run * PAGE));
                    prop_assert!(!table.covers(page * PAGE, run * PAGE + 1));
                }
            }
        }

        #[test]
        fn the_pieces_of_an_operation_are_its_bytes_in_order_and_bounded_in_number(
            (local, remote) in (any_extents(), any_extents()),
            (cut_local, cut_remote) in (any_extents(), any_extents()),
            (local_offset, remote_offset) in (0..PAGES * PAGE, 0..PAGES * PAGE),
            len in 1..300_000_u32,
        ) {
            let table = |extents: Vec<Extent>, cuts: Vec<Extent>| {
                let mut table = Table::default();
                table.overlay(&chunks(&normal(extents), 0));
                table.overlay(&chunks(&difference(&normal(cuts), &[]), 1));
                table
            };
            let (local, remote) = (table(local, cut_local), table(remote, cut_remote));
            let (mut done, mut count) = (0_u32, 0);
            while done < len {
                let at = u64::from(done);
                let Some(piece) = piece((&local, local_offset + at), (&remote, remote_offset + at), len - done) else { break };
                count += 1;
                prop_assert!(piece.len > 0 && piece.len <= len - done);
                // Every byte of it is where byte-by-byte lookup says.
                for byte in [0, u64::from(piece.len) / 2, u64::from(piece.len) - 1] {
                    let from = local.at(local_offset + at + byte).unwrap();
                    let to = remote.at(remote_offset + at + byte).unwrap();
                    prop_assert_eq!(piece.local_addr + byte, from.addr + (local_offset + at + byte - from.offset));
                    prop_assert_eq!(piece.remote_addr + byte, to.addr + (remote_offset + at + byte - to.offset));
                    prop_assert_eq!((piece.lkey, piece.rkey), (from.lkey, to.rkey));
                }
                done += piece.len;
            }
            let covered = local.covers(local_offset, len.into()) && remote.covers(remote_offset, len.into());
            prop_assert_eq!(done == len, covered);
            prop_assert!(count <= most_pieces(len), "{} pieces of {} bytes", count, len);
        }

        #[test]
        fn a_table_from_a_peer_is_taken_only_if_it_is_one(
            chunks in prop::collection::vec((any::<u64>(), any::<u64>(), any::<u64>()), 0..6),
            near in prop::collection::vec((0..8_u64, 0..4_u64), 0..6),
        ) {
            let wild = chunks.into_iter().map(|(offset, len, addr)| Chunk { offset, len, addr, lkey: 0, rkey: 0 });
            let near = near.into_iter().map(|(offset, len)| Chunk { offset, len, addr: 0, lkey: 0, rkey: 0 });
            for chunks in [wild.collect::<Vec<_>>(), near.collect()] {
                let ends = |chunk: &Chunk| u128::from(chunk.offset) + u128::from(chunk.len);
                let right = chunks.iter().all(|chunk| {
                    chunk.len > 0 && ends(chunk) <= 10 && u128::from(chunk.addr) + u128::from(chunk.len) <= u128::from(u64::MAX)
                }) && chunks.windows(2).all(|pair| ends(&pair[0]) <= u128::from(pair[1].offset));
                prop_assert_eq!(Table::new(chunks, 10).is_ok(), right);
            }
        }
    }
}
