//! A source that dies while it folds, at every step and again and again: whoever takes over has the newest committed epoch whole.

use super::*;
use crate::guest::{Packet, RamBlock};
use crate::journal::{KeptState, MemoryFolder, MigrationId};
use crate::ring::{RingBytes, RingReader, SEGMENTS_OFFSET, Spool, Step, Still};
use crate::testing::*;
use belay_transport::{PAGE_SIZE, PageIndex};
use proptest::prelude::*;

const SHAPE: [usize; 2] = [40, 24];
/// Nothing is given back in these tests, so every epoch has room.
const RING: usize = SEGMENTS_OFFSET + (4 << 20);
const OVERFLOW: usize = 512 << 10;

/// Where in the life of one record the process dies.
#[derive(Debug, Clone, Copy)]
enum Death {
    /// After so many segments were taken.
    Taking(u32),
    /// When the next record is complete and so many of its runs are in RAM.
    Folding(usize),
    /// When the next record is in RAM and kept, and not yet given up.
    Folded,
    /// As the two before, where the record is folded from where it lies in the ring.
    FoldingInPlace(usize),
    FoldedInPlace,
}

fn death() -> impl Strategy<Value = Death> {
    prop_oneof![
        (0..40u32).prop_map(Death::Taking),
        (0..12usize).prop_map(Death::Folding),
        Just(Death::Folded),
        (0..12usize).prop_map(Death::FoldingInPlace),
        Just(Death::FoldedInPlace)
    ]
}

struct Kept {
    _directory: tempfile::TempDir,
    folder: MemoryFolder,
    memory: Vec<RamBlock>,
}

impl Kept {
    fn limits(&self) -> (FoldTarget, Limits) {
        let target = FoldTarget::new(&self.memory).unwrap();
        let limits = Limits::for_regions(target.regions().collect::<Vec<_>>());
        (target, limits)
    }

    fn begin(ring_len: usize) -> (Self, RingReader, FoldState) {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let folder = MemoryFolder::create(directory.path(), MigrationId([9; 8])).unwrap();
        let state = KeptState::create(&folder).unwrap();
        let kept = Self { _directory: directory, folder, memory: ram(&SHAPE) };
        let spool = Spool::create(&kept.folder, &state, OVERFLOW).unwrap();
        let reader = RingReader::with(spool, ring_len, NONCE).unwrap();
        let (target, limits) = kept.limits();
        let fold = FoldState::kept(target, limits, b"state at the switch".to_vec(), &state).unwrap();
        (kept, reader, fold)
    }

    /// As a new process has them.
    fn take_over(&self, ring_len: usize) -> (RingReader, FoldState) {
        let state = KeptState::open(&self.folder).unwrap().unwrap();
        let (spool, at) = Spool::open(&self.folder, &state).unwrap();
        let mut reader = RingReader::resume(spool, at.unwrap(), ring_len).unwrap();
        let (target, limits) = self.limits();
        let fold = FoldState::resume(target, limits, &state).unwrap().unwrap();
        fold.settle(&mut reader).unwrap();
        (reader, fold)
    }
}

/// Goes on until it dies as `death` says or there is nothing more to take.
fn live(mut reader: RingReader, mut fold: FoldState, ring: &[u8], death: Death) {
    let mut taken = 0;
    loop {
        if matches!(death, Death::Taking(at) if at == taken) {
            return;
        }
        if let Death::FoldingInPlace(_) | Death::FoldedInPlace = death
            && let Some(record) = reader.in_place(Still::Private(ring))
            && record.epoch() != fold.epoch()
        {
            match death {
                Death::FoldingInPlace(runs) => fold.fold_partly(record.image(), &record, runs),
                _ => _ = fold.fold_in_place(&record).unwrap(),
            }
            return;
        }
        match reader.step(ring).unwrap() {
            Step::NotYet => return,
            Step::Spooled => taken += 1,
            // Folded from where it lay, by a process that died before it gave it up.
            Step::Committed(epoch) if epoch == fold.epoch() => reader.clear(),
            Step::Committed(_) => {
                taken += 1;
                let image = reader.record().unwrap();
                if let Death::Folding(runs) = death {
                    fold.fold_partly(image, &image, runs);
                    return;
                }
                fold.fold(image, || ()).unwrap();
                if matches!(death, Death::Folded) {
                    return;
                }
                reader.clear();
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn p3_a_source_that_dies_in_the_middle_of_folding_has_the_newest_committed_epoch_whole(
        epochs in prop::collection::vec(prop::collection::vec((0..40u64, any::<u8>()), 1..60), 1..6),
        deaths in prop::collection::vec(death(), 1..12),
        in_place in any::<bool>(),
    ) {
        let mut wire = Wire::new(RING);
        let (kept, reader, fold) = Kept::begin(RING);
        let here = ram(&SHAPE);
        let mut sender = Sender::new(&mut wire, 512 << 10);
        for (at, writes) in epochs.iter().enumerate() {
            let epoch = Epoch(at as u64 + 1);
            let mut content = Content { device_state: format!("state of {epoch}").into_bytes(), ..Content::default() };
            for &(page, byte) in writes {
                here[0].alias.write(PageIndex(page).offset() + usize::from(byte), &[byte; 99]);
                content.dirty.push((0, page));
            }
            here[1].alias.zero(PageIndex(at as u64).offset(), PAGE_SIZE);
            content.discards.push((1, at as u64));
            content.outputs.push(Packet { sequence: epoch.0, bytes: vec![epoch.0 as u8; 30] });
            sender.send(epoch, &here, &content).unwrap();
        }
        let ring = wire.ring_bytes();
        let mut lives = Some((reader, fold));
        for death in deaths {
            let (reader, fold) = lives.take().unwrap_or_else(|| kept.take_over(RING));
            live(reader, fold, &ring, death);
        }
        let (reader, fold) = kept.take_over(RING);
        let recovered = finish(Catch::resume(reader, fold).unwrap(), &ring, in_place).unwrap();
        let newest = epochs.len() as u64;
        prop_assert_eq!(recovered.epoch, Epoch(newest));
        prop_assert_eq!(recovered.device_state, format!("state of epoch {newest}").into_bytes());
        prop_assert!(bytes_of(&kept.memory) == bytes_of(&here), "RAM is not that of epoch {}", newest);
        let again: Vec<_> = recovered.outputs_to_resend.iter().map(|packet| packet.sequence).collect();
        prop_assert!(again.iter().copied().eq(1..=newest), "{:?}", again);
    }
}

#[test]
fn a_next_session_goes_on_from_the_epoch_the_last_one_came_to() {
    let mut wire = Wire::new(RING);
    let (kept, reader, fold) = Kept::begin(RING);
    let here = ram(&SHAPE);
    let write = |page: u64, byte| {
        here[0].alias.write(PageIndex(page).offset(), &[byte; 9]);
        Content { device_state: vec![byte], dirty: vec![(0, page)], ..Content::default() }
    };
    let content = write(3, 1);
    Sender::new(&mut wire, 512 << 10).send(Epoch(1), &here, &content).unwrap();
    drop((reader, fold));
    let (reader, fold) = kept.take_over(RING);
    let mut catch = Catch::resume(reader, fold).unwrap();
    assert_eq!(catch.drain(&wire.ring_bytes()[..]).unwrap(), Epoch(1));
    // Over the new session's ring the next record is epoch 2, and the old ring means nothing any more.
    let old = wire.ring_bytes();
    let (mut reader, mut fold) = catch.next_session(RING, NONCE + 1).unwrap();
    assert_eq!(reader.step(&old[..]).unwrap(), Step::NotYet);
    drop((reader, fold));
    (reader, fold) = kept.take_over(RING);
    assert_eq!((reader.nonce(), reader.committed(), fold.epoch()), (NONCE + 1, Epoch(1), Epoch(1)));
    assert_eq!(old.len(), RingBytes::len(&old[..]));
    assert_eq!(reader.step(&old[..]).unwrap(), Step::NotYet);
}

#[test]
fn what_was_kept_and_contradicts_itself_is_refused() {
    let mut wire = Wire::new(RING);
    let (kept, mut reader, fold) = Kept::begin(RING);
    let here = ram(&SHAPE);
    let content = Content { device_state: vec![1], dirty: vec![(0, 1)], ..Content::default() };
    Sender::new(&mut wire, 512 << 10).send(Epoch(1), &here, &content).unwrap();
    while reader.record().is_none() {
        reader.step(&wire.ring_bytes()[..]).unwrap();
    }
    // Given up without having been folded: nothing here does that.
    reader.clear();
    drop((reader, fold));
    let state = KeptState::open(&kept.folder).unwrap().unwrap();
    let (spool, at) = Spool::open(&kept.folder, &state).unwrap();
    let reader = RingReader::resume(spool, at.unwrap(), RING).unwrap();
    let (target, limits) = kept.limits();
    let fold = FoldState::resume(target, limits, &state).unwrap().unwrap();
    let error = Catch::resume(reader, fold).unwrap_err();
    assert!(matches!(error, FoldError::Inconsistent { read: Epoch(1), folded: Epoch(0) }), "{error}");
}
