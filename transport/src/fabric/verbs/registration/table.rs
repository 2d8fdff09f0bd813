//! Where the bytes of a registered mapping are to be had: file offset to address and keys. What is registered later is laid over what
//! was there.

use crate::region::Extent;

/// Bytes of a mapping that one memory region holds. (A part of a region, once a later one has taken over the rest.)
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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

/// Chunks in the order of their offsets, disjoint.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Table {
    chunks: Vec<Chunk>,
}

impl Table {
    pub(super) fn chunks(&self) -> &[Chunk] {
        &self.chunks
    }

    /// What the table covers.
    pub(super) fn extents(&self) -> Vec<Extent> {
        super::extents::normal(
            self.chunks.iter().map(|chunk| Extent { offset: chunk.offset, len: chunk.len }).collect(),
        )
    }

    /// Takes `gone` (sorted, disjoint) out of every chunk.
    pub(super) fn remove(&mut self, gone: &[Extent]) {
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
    pub(super) fn overlay(&mut self, newer: &[Chunk]) {
        let taken: Vec<Extent> = newer.iter().map(|chunk| Extent { offset: chunk.offset, len: chunk.len }).collect();
        self.remove(&taken);
        self.chunks.extend_from_slice(newer);
        self.chunks.sort_unstable_by_key(|chunk| chunk.offset);
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::extents::normal;
    use super::super::extents::tests::{PAGE, PAGES, any_extents};
    use super::*;
    use proptest::prelude::*;

    /// The chunk that holds the byte at `offset`, if one does.
    pub(in super::super) fn at(table: &Table, offset: u64) -> Option<&Chunk> {
        table.chunks().iter().find(|chunk| (chunk.offset..chunk.end()).contains(&offset))
    }

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
        let at = |page| at(table, page * PAGE).map(|chunk| (chunk.addr + (page * PAGE - chunk.offset), chunk.rkey));
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
                let chunks = table.chunks();
                prop_assert!(chunks.iter().all(|chunk| chunk.len > 0));
                prop_assert!(chunks.windows(2).all(|pair| pair[0].end() <= pair[1].offset), "in order and disjoint");
            }
        }
    }
}
