//! A set of pages, cheap to fill, walk and empty in proportion to what is in it, whatever the guest's size.

use belay_transport::{PageIndex, RegionId};

/// Dirty pages of all regions. A bitmap a region beside a list of the words in use, so that walking and emptying cost what was
/// dirtied and not what the guest is large.
#[derive(Debug, Clone)]
pub struct DirtySet {
    regions: Vec<RegionSet>,
    count: u64,
}

#[derive(Debug, Clone)]
struct RegionSet {
    id: RegionId,
    pages: u64,
    words: Vec<u64>,
    used: Vec<u32>,
}

impl DirtySet {
    /// An empty set over regions of the given sizes in 4 KiB pages. All memory is taken here.
    pub fn new(regions: impl IntoIterator<Item = (RegionId, u64)>) -> Self {
        let regions = regions
            .into_iter()
            .map(|(id, pages)| {
                let words = pages.div_ceil(64) as usize;
                RegionSet { id, pages, words: vec![0; words], used: Vec::with_capacity(words) }
            })
            .collect();
        Self { regions, count: 0 }
    }

    /// Pages in the set.
    pub fn len(&self) -> u64 {
        self.count
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    fn region(&mut self, id: RegionId) -> &mut RegionSet {
        let found = self.regions.iter_mut().find(|region| region.id == id);
        found.unwrap_or_else(|| panic!("{id} is not a region of this set"))
    }

    /// Adds a page; whether it was new.
    pub fn insert(&mut self, id: RegionId, page: PageIndex) -> bool {
        let region = self.region(id);
        assert!(page.0 < region.pages, "page {} of {id}, which has {}", page.0, region.pages);
        let new = region.or_word((page.0 / 64) as usize, 1 << (page.0 % 64));
        self.count += new;
        new > 0
    }

    /// Adds `count` pages from `first` on.
    pub fn insert_run(&mut self, id: RegionId, first: PageIndex, count: u64) {
        let region = self.region(id);
        let end = first.0.checked_add(count).filter(|&end| end <= region.pages);
        let end = end.unwrap_or_else(|| panic!("pages {}+{count} of {id}, which has {}", first.0, region.pages));
        let mut at = first.0;
        let mut new = 0;
        while at < end {
            let bit = at % 64;
            let take = (64 - bit).min(end - at);
            let mask = if take == 64 { u64::MAX } else { ((1 << take) - 1) << bit };
            new += region.or_word((at / 64) as usize, mask);
            at += take;
        }
        self.count += new;
    }

    /// Adds the pages whose bits are set in word `word` (pages 64·word …), as KVM's dirty log has them.
    pub fn insert_word(&mut self, id: RegionId, word: usize, bits: u64) {
        if bits != 0 {
            let new = self.region(id).or_word(word, bits);
            self.count += new;
        }
    }

    /// Whether the page is in the set.
    pub fn contains(&self, id: RegionId, page: PageIndex) -> bool {
        let region = self.regions.iter().find(|region| region.id == id);
        region.is_some_and(|r| r.words.get((page.0 / 64) as usize).is_some_and(|word| word >> (page.0 % 64) & 1 == 1))
    }

    /// Keeps only the pages `keep` says yes to.
    pub fn retain(&mut self, mut keep: impl FnMut(RegionId, PageIndex) -> bool) {
        let mut gone = 0;
        for region in &mut self.regions {
            for &word in &region.used {
                let mut bits = region.words[word as usize];
                while bits != 0 {
                    let bit = bits.trailing_zeros() as u64;
                    bits &= bits - 1;
                    if !keep(region.id, PageIndex(word as u64 * 64 + bit)) {
                        region.words[word as usize] &= !(1 << bit);
                        gone += 1;
                    }
                }
            }
            let words = &region.words;
            region.used.retain(|&word| words[word as usize] != 0);
        }
        self.count -= gone;
    }

    /// Adds everything `other` holds.
    pub fn merge(&mut self, other: &Self) {
        for region in &other.regions {
            for &word in &region.used {
                self.insert_word(region.id, word as usize, region.words[word as usize]);
            }
        }
    }

    /// Takes out everything `other` holds.
    pub fn subtract(&mut self, other: &Self) {
        for region in &mut self.regions {
            let Some(other) = other.regions.iter().find(|other| other.id == region.id && !other.used.is_empty()) else {
                continue;
            };
            for &word in &other.used {
                let (bits, out) = (&mut region.words[word as usize], other.words[word as usize]);
                self.count -= u64::from((*bits & out).count_ones());
                *bits &= !out;
            }
            let words = &region.words;
            region.used.retain(|&word| words[word as usize] != 0);
        }
    }

    /// Every page, region by region, in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = (RegionId, PageIndex)> + '_ {
        self.regions.iter().flat_map(|region| {
            let mut used = region.used.clone();
            used.sort_unstable();
            used.into_iter().flat_map(move |word| {
                let mut bits = region.words[word as usize];
                std::iter::from_fn(move || {
                    let bit = (bits != 0).then(|| bits.trailing_zeros() as u64)?;
                    bits &= bits - 1;
                    Some((region.id, PageIndex(word as u64 * 64 + bit)))
                })
            })
        })
    }

    /// The pages of one region as runs (first page, count), ascending. Takes no memory, unlike [`DirtySet::iter`]; needs the
    /// set for itself because it puts the list of words in use in order.
    pub fn runs(&mut self, id: RegionId) -> impl Iterator<Item = (PageIndex, u64)> + '_ {
        let region = self.region(id);
        region.used.sort_unstable();
        let (words, used) = (&region.words, &region.used);
        // `at`: place in `used`; `bits`: what is left of that word.
        let (mut at, mut bits) = (0, used.first().map_or(0, |&word| words[word as usize]));
        std::iter::from_fn(move || {
            let mut word = *used.get(at)?;
            let mut bit = bits.trailing_zeros();
            let first = u64::from(word) * 64 + u64::from(bit);
            let mut count = 0;
            loop {
                let ones = (bits >> bit).trailing_ones();
                count += u64::from(ones);
                let ended = bit + ones < 64;
                bits = if ended { bits & (u64::MAX << (bit + ones)) } else { 0 };
                if bits == 0 {
                    at += 1;
                    bits = used.get(at).map_or(0, |&next| words[next as usize]);
                }
                let goes_on = !ended && used.get(at) == Some(&(word + 1)) && bits & 1 == 1;
                if !goes_on {
                    return Some((PageIndex(first), count));
                }
                word += 1;
                bit = 0;
            }
        })
    }

    /// The pages of one region, 64 at a time: a word's number (pages 64·word …) and its bits, in no order.
    pub fn words(&self, id: RegionId) -> impl Iterator<Item = (u64, u64)> + '_ {
        let region = self.regions.iter().find(|region| region.id == id);
        let (used, words) = region.map_or((&[][..], &[][..]), |region| (&region.used[..], &region.words[..]));
        used.iter().map(|&word| (u64::from(word), words[word as usize]))
    }

    /// Empties the set and keeps its memory.
    pub fn clear(&mut self) {
        for region in &mut self.regions {
            for word in region.used.drain(..) {
                region.words[word as usize] = 0;
            }
        }
        self.count = 0;
    }
}

/// Pages that were harvested, and with that forgotten by their tracker, and are in no record that is known to have committed.
#[derive(Debug, Clone)]
pub struct Harvested {
    /// Their content is to be sent.
    pub dirty: DirtySet,
    /// They read as zero.
    pub discards: DirtySet,
}

impl Harvested {
    /// None yet, over regions as in [`DirtySet::new`].
    pub fn new(regions: impl IntoIterator<Item = (RegionId, u64)> + Clone) -> Self {
        Self { dirty: DirtySet::new(regions.clone()), discards: DirtySet::new(regions) }
    }

    /// Every page, where it is not known what a tracker saw.
    pub fn everything(regions: impl IntoIterator<Item = (RegionId, u64)> + Clone) -> Self {
        let mut all = Self::new(regions.clone());
        for (id, pages) in regions {
            all.dirty.insert_run(id, PageIndex(0), pages);
        }
        all
    }

    /// Adds what `other` holds. A page that is dirty in one and discarded in the other is dirty: it is sent as it is then.
    pub fn merge(&mut self, other: &Self) {
        self.dirty.merge(&other.dirty);
        self.discards.merge(&other.discards);
        let dirty = &self.dirty;
        self.discards.retain(|region, page| !dirty.contains(region, page));
    }

    /// Empties it and keeps its memory.
    pub fn clear(&mut self) {
        self.dirty.clear();
        self.discards.clear();
    }
}

impl RegionSet {
    /// Sets bits of a word; how many were new. A word is listed in `used` exactly while it is not zero.
    fn or_word(&mut self, word: usize, bits: u64) -> u64 {
        let valid = if (word as u64 + 1) * 64 <= self.pages { u64::MAX } else { (1 << (self.pages % 64)) - 1 };
        assert!(bits & !valid == 0, "bits {bits:#x} of word {word} lie beyond page {}", self.pages);
        let old = self.words[word];
        if old == 0 && bits != 0 {
            self.used.push(word as u32);
        }
        self.words[word] = old | bits;
        u64::from((bits & !old).count_ones())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn a_dirty_set_holds_exactly_what_was_put_in_and_not_taken_out(
            runs in prop::collection::vec((0u64..1000, 1u64..200), 0..40),
            modulus in 1u64..7,
            again in prop::collection::vec(0u64..1000, 0..40),
            out in prop::collection::vec(0u64..1200, 0..200),
        ) {
            let id = RegionId(3);
            let mut set = DirtySet::new([(id, 1200)]);
            let mut model = BTreeSet::new();
            for (first, count) in runs {
                set.insert_run(id, PageIndex(first), count);
                model.extend(first..first + count);
            }
            set.retain(|_, page| page.0 % modulus != 0);
            model.retain(|page| page % modulus != 0);
            for page in again {
                prop_assert_eq!(set.insert(id, PageIndex(page)), model.insert(page));
            }
            let mut gone = DirtySet::new([(id, 1200)]);
            out.iter().for_each(|&page| gone.insert_run(id, PageIndex(page), 1));
            set.subtract(&gone);
            model.retain(|page| !out.contains(page));
            prop_assert_eq!(set.len(), model.len() as u64);
            prop_assert!(set.iter().map(|(_, page)| page.0).eq(model.iter().copied()));
            let runs: Vec<_> = set.runs(id).map(|(first, count)| (first.0, count)).collect();
            prop_assert!(runs.iter().flat_map(|&(first, count)| first..first + count).eq(model.iter().copied()));
            prop_assert!(runs.windows(2).all(|pair| pair[0].0 + pair[0].1 < pair[1].0), "runs are as long as they can be");
            set.clear();
            prop_assert!(set.is_empty() && set.iter().next().is_none());
        }
    }
}
