//! What a guest wrote to a disk whose image another host writes: read before the image, until the image has it.
//!
//! ```text
//!             close(1)     close(2)     open
//! ──── image ─┬── epoch 1 ─┬── epoch 2 ─┬── being written ──►
//!             └ applied(1): given up here, the image has it
//! ```
//! Rules of this room:
//! * Pure: no I/O, no clock. What is held is counted, and whoever fills it asks before ([`Overlay::held_bytes`]).
//! * Nothing is given up that is not said to be in the image.
//! * An epoch that is closed under a number which was used before has the old one in front of it: that one never came to the source.

use super::log::Entry;
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

/// Epoch of what is in no closed epoch yet.
const OPEN: u64 = u64::MAX;

#[derive(Debug, Clone)]
struct Extent {
    len: u64,
    /// Bytes and where in them the extent begins; zeroes where there are none.
    content: Option<(Arc<[u8]>, usize)>,
    epoch: u64,
}

impl Extent {
    /// All but the first `by` bytes.
    fn behind(&self, by: u64) -> Self {
        let content = self.content.as_ref().map(|(bytes, from)| (Arc::clone(bytes), from + by as usize));
        Self { len: self.len - by, content, epoch: self.epoch }
    }
}

/// See the module.
#[derive(Debug, Default)]
pub struct Overlay {
    /// By offset; none overlaps another.
    extents: BTreeMap<u64, Extent>,
    /// What was done in closed epochs that are not known to be in the image, oldest first.
    closed: VecDeque<(u64, Vec<Entry>)>,
    open: Vec<Entry>,
    open_bytes: u64,
    closed_bytes: u64,
}

impl Overlay {
    /// Bytes were written.
    pub fn write(&mut self, offset: u64, data: Arc<[u8]>) {
        let extent = Extent { len: data.len() as u64, content: Some((Arc::clone(&data), 0)), epoch: OPEN };
        self.lay(offset, extent);
        self.log(Entry::Write { offset, data });
    }

    /// Bytes read as zero from now on.
    pub fn zero(&mut self, offset: u64, len: u32) {
        self.lay(offset, Extent { len: u64::from(len), content: None, epoch: OPEN });
        self.log(Entry::Zero { offset, len });
    }

    /// The guest was told that all before this will last.
    pub fn flush(&mut self) {
        if self.open.last() != Some(&Entry::Flush) {
            self.log(Entry::Flush);
        }
    }

    fn log(&mut self, entry: Entry) {
        self.open_bytes += entry.cost();
        self.open.push(entry);
    }

    fn lay(&mut self, offset: u64, extent: Extent) {
        let end = offset + extent.len;
        // One that begins before and reaches into it, or over it.
        if let Some((&at, before)) = self.extents.range_mut(..offset).next_back()
            && at + before.len > offset
        {
            let whole = before.clone();
            before.len = offset - at;
            if at + whole.len > end {
                self.extents.insert(end, whole.behind(end - at));
            }
        }
        let under: Vec<u64> = self.extents.range(offset..end).map(|(&at, _)| at).collect();
        for at in under {
            let old = self.extents.remove(&at).expect("just seen");
            if at + old.len > end {
                self.extents.insert(end, old.behind(end - at));
            }
        }
        self.extents.insert(offset, extent);
    }

    /// Fills in what is here of the bytes at `offset`; what is not, in order, is the image's.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> Vec<Range<u64>> {
        let end = offset + into.len() as u64;
        let (mut at, mut holes) = (offset, Vec::new());
        let before = self.extents.range(..offset).next_back().filter(|(start, extent)| **start + extent.len > offset);
        for (&start, extent) in before.into_iter().chain(self.extents.range(offset..end)) {
            if start > at {
                holes.push(at..start);
            }
            let from = start.max(offset);
            let to = (start + extent.len).min(end);
            let here = &mut into[(from - offset) as usize..(to - offset) as usize];
            match &extent.content {
                Some((bytes, first)) => {
                    let first = first + (from - start) as usize;
                    here.copy_from_slice(&bytes[first..first + here.len()]);
                }
                None => here.fill(0),
            }
            at = to;
        }
        if at < end {
            holes.push(at..end);
        }
        holes
    }

    /// Ends the open epoch under this number; what its record must carry, in the guest's order.
    pub fn close(&mut self, epoch: u64) -> &[Entry] {
        assert!(epoch < OPEN, "an epoch's number");
        let mut entries = Vec::new();
        // Of a session that ended before these had come to the source: they go again, under the number that is free.
        let first = self.closed.partition_point(|(closed, _)| *closed < epoch);
        for (_, again) in self.closed.drain(first..) {
            entries.extend(again);
        }
        entries.append(&mut self.open);
        self.closed_bytes += std::mem::take(&mut self.open_bytes);
        for extent in self.extents.values_mut().filter(|extent| extent.epoch >= epoch) {
            extent.epoch = epoch;
        }
        self.closed.push_back((epoch, entries));
        &self.closed.back().expect("just pushed").1
    }

    /// The image has everything of `epoch` and before, durably.
    pub fn applied(&mut self, epoch: u64) {
        while self.closed.front().is_some_and(|(closed, _)| *closed <= epoch) {
            let (_, entries) = self.closed.pop_front().expect("just seen");
            self.closed_bytes -= entries.iter().map(Entry::cost).sum::<u64>();
            self.extents.retain(|_, extent| extent.epoch > epoch);
        }
    }

    /// What the open epoch holds.
    pub fn open_bytes(&self) -> u64 {
        self.open_bytes
    }

    /// All that is held.
    pub fn held_bytes(&self) -> u64 {
        self.open_bytes + self.closed_bytes
    }

    /// All that the image is not known to have, in the guest's order.
    pub fn remaining(&self) -> impl Iterator<Item = &Entry> {
        self.closed.iter().flat_map(|(_, entries)| entries).chain(&self.open)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DISK: usize = 256;

    #[derive(Debug, Clone)]
    enum Step {
        Write(usize, usize, u8),
        Zero(usize, usize),
        Flush,
        Close,
        /// The newest record that was sent commits; sent and not committed is what comes after.
        Commit,
        /// The source applies this many of the committed epochs, and dies in the middle of the next one after so many entries.
        Apply(usize, usize),
        /// The session ends: what had not committed is to go again.
        Reattach,
    }

    fn step() -> impl Strategy<Value = Step> {
        let range = || (0..DISK, 1..80_usize).prop_map(|(at, len)| (at, len.min(DISK - at)));
        prop_oneof![
            6 => (range(), any::<u8>()).prop_map(|((at, len), byte)| Step::Write(at, len, byte)),
            2 => range().prop_map(|(at, len)| Step::Zero(at, len)),
            2 => Just(Step::Flush),
            3 => Just(Step::Close),
            3 => Just(Step::Commit),
            2 => (0..3_usize, 0..4_usize).prop_map(|(epochs, cut)| Step::Apply(epochs, cut)),
            1 => Just(Step::Reattach),
        ]
    }

    fn redo(image: &mut [u8], entries: &[Entry]) {
        for entry in entries {
            match entry {
                Entry::Write { offset, data } => image[*offset as usize..][..data.len()].copy_from_slice(data),
                Entry::Zero { offset, len } => image[*offset as usize..][..*len as usize].fill(0),
                Entry::Flush => {}
            }
        }
    }

    fn seen(overlay: &Overlay, image: &[u8], at: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0xee; len];
        for hole in overlay.read(at as u64, &mut bytes) {
            let hole = hole.start as usize..hole.end as usize;
            bytes[hole.start - at..hole.end - at].copy_from_slice(&image[hole]);
        }
        bytes
    }

    proptest! {
        /// Whatever is written, closed, committed, applied in part and again, or sent anew: the guest reads what it wrote, the image is the
        /// committed prefix once the source has applied it, and what is over is exactly what is missing there.
        #[test]
        fn a_guest_reads_what_it_wrote_and_the_image_becomes_exactly_what_has_committed(steps in prop::collection::vec(step(), 1..120)) {
            let mut overlay = Overlay::default();
            let (mut model, mut image) = (vec![0_u8; DISK], vec![0_u8; DISK]);
            // Records: sent and not committed, committed and not applied. What the guest had written at each close.
            let mut sent: VecDeque<(u64, Vec<Entry>, Vec<u8>)> = VecDeque::new();
            let mut committed: VecDeque<(u64, Vec<Entry>, Vec<u8>)> = VecDeque::new();
            let mut epoch = 0;
            for step in steps {
                match step {
                    Step::Write(at, len, byte) => {
                        model[at..at + len].fill(byte);
                        overlay.write(at as u64, vec![byte; len].into());
                    }
                    Step::Zero(at, len) => {
                        model[at..at + len].fill(0);
                        overlay.zero(at as u64, len as u32);
                    }
                    Step::Flush => overlay.flush(),
                    Step::Close => {
                        epoch += 1;
                        let entries = overlay.close(epoch).to_vec();
                        sent.push_back((epoch, entries, model.clone()));
                        prop_assert_eq!(overlay.open_bytes(), 0);
                    }
                    Step::Commit => committed.extend(sent.pop_front()),
                    Step::Apply(epochs, cut) => {
                        for _ in 0..epochs {
                            let Some((applied, entries, then)) = committed.pop_front() else { break };
                            redo(&mut image, &entries);
                            prop_assert_eq!(&image, &then, "epoch {}", applied);
                            overlay.applied(applied);
                        }
                        // Half of the next one, in the middle of which the source dies: it is done again from its beginning.
                        if let Some((_, entries, _)) = committed.front() {
                            redo(&mut image, &entries[..cut.min(entries.len())]);
                        }
                    }
                    Step::Reattach => {
                        sent.clear();
                        epoch = committed.back().map_or_else(
                            || overlay.closed.front().map_or(epoch, |(closed, _)| closed - 1),
                            |(last, ..)| *last,
                        );
                    }
                }
                for (at, len) in [(0, DISK), (13, 100), (DISK - 1, 1)] {
                    prop_assert_eq!(&seen(&overlay, &image, at, len), &model[at..at + len]);
                }
                let mut whole = image.clone();
                redo(&mut whole, &overlay.remaining().cloned().collect::<Vec<_>>());
                prop_assert_eq!(&whole, &model, "an owner writes what is over, and has all of it");
                prop_assert_eq!(overlay.held_bytes(), overlay.remaining().map(Entry::cost).sum::<u64>());
            }
        }
    }

    #[test]
    fn flushes_without_a_write_between_them_take_no_room() {
        let mut overlay = Overlay::default();
        (0..1000).for_each(|_| overlay.flush());
        assert_eq!(overlay.close(1), [Entry::Flush]);
    }
}
