//! Pages that are held: whatever is written, answered late or given up meanwhile, a record has them as they were, or does not end.

use super::*;
use crate::staging::{HeldPages, StageError};
use belay_transport::Deadline;
use belay_transport::region::Extent;
use std::time::Duration;

/// An epoch that is on its way: its pages, who has them, and where they are put together.
struct OnItsWay {
    dirty: DirtySet,
    held: Box<dyn HeldPages>,
    slot: Mapping,
}

impl OnItsWay {
    /// Harvests and holds, with the guest stopped; what was harvested, where the pool has no room for it.
    fn try_take(memory: &Memory, tracker: &mut UffdSyncTracker) -> Result<Self, DirtySet> {
        let sizes = [(ID, memory.pages())];
        let mut dirty = DirtySet::new(sizes);
        tracker.harvest(&mut dirty).expect("harvest");
        tracker.sift(&mut dirty, &DirtySet::new(sizes)).expect("sift");
        Self::hold(memory, tracker, dirty)
    }

    fn hold(memory: &Memory, tracker: &mut UffdSyncTracker, dirty: DirtySet) -> Result<Self, DirtySet> {
        let file = RamFile::memfd("held-slot", memory.guest.len(), PageSize::Small).expect("memfd");
        let Some(held) = tracker.hold(&dirty).expect("hold") else { return Err(dirty) };
        Ok(Self { dirty, held, slot: file.map().expect("map") })
    }

    fn take(memory: &Memory, tracker: &mut UffdSyncTracker) -> Self {
        Self::try_take(memory, tracker).unwrap_or_else(|_| panic!("there is room"))
    }

    /// Takes every page, each to where it is in memory, a few at a time.
    fn stage(&mut self) {
        let runs: Vec<_> = self.dirty.runs(ID).collect();
        for (first, count) in runs {
            for first in (first.0..first.0 + count).step_by(5) {
                let count = 5.min(self.dirty_end(first));
                self.held.take(ID, PageIndex(first), count, &self.slot, PageIndex(first).offset()).expect("take");
            }
        }
    }

    /// Dirty pages from `first` on.
    fn dirty_end(&self, first: u64) -> u64 {
        (first..).take_while(|&page| self.dirty.contains(ID, PageIndex(page))).count() as u64
    }

    /// Ends it, and puts what it has into `image`; how many were copied on write.
    fn fold(self, image: &mut [u8]) -> Result<u64, StageError> {
        let copied = self.held.end()?;
        for (_, page) in self.dirty.iter() {
            self.slot.read(page.offset(), &mut image[page.offset()..][..PAGE_SIZE]);
        }
        Ok(copied)
    }
}

fn holding(memory: &Memory, pages: u32) -> UffdSyncTracker {
    memory.tracker().holding(pages).expect("a pool")
}

/// Waits until `done`, with a bound.
fn until(what: &str, done: impl Fn() -> bool) {
    let deadline = Deadline::after(Duration::from_secs(20));
    while !done() {
        assert!(!deadline.expired(), "waited for {what}");
        std::thread::yield_now();
    }
}

#[test]
fn p3_a_page_written_while_it_is_held_is_sent_as_it_was_at_the_pause() {
    for groups in [fixed(1), fixed(16), fixed(64), Groups::Adaptive] {
        let Some(memory) = Memory::new(256, groups) else { return };
        let mut tracker = holding(&memory, 256);
        let mut image = memory.content();
        (0..200).for_each(|page| memory.write(page, 1));
        let then = memory.content();
        let mut epoch = OnItsWay::take(&memory, &mut tracker);
        // The guest goes on: it writes what is held and what is not.
        (100..256).for_each(|page| memory.write(page, 2));
        epoch.stage();
        (0..256).for_each(|page| memory.write(page, 3));
        let copied = epoch.fold(&mut image).expect("whole");
        assert!((100..=200).contains(&copied), "{copied} pages were copied on write with {groups:?}");
        assert!(image == then, "with {groups:?}");
        let now = memory.content();
        let mut next = OnItsWay::take(&memory, &mut tracker);
        next.stage();
        next.fold(&mut image).expect("whole");
        assert!(image == now, "what was written meanwhile is in the next one, with {groups:?}");
    }
}

#[test]
fn p7_a_writer_that_finds_no_room_waits_until_its_page_is_taken_and_no_longer() {
    let Some(memory) = Memory::new(256, fixed(1)) else { return };
    let mut tracker = holding(&memory, 2);
    let mut image = memory.content();
    (0..10).for_each(|page| memory.write(page * 20, 1));
    let then = memory.content();
    let mut epoch = OnItsWay::take(&memory, &mut tracker);
    std::thread::scope(|scope| {
        memory.write(0, 2);
        memory.write(20, 2);
        let waits = scope.spawn(|| memory.write(180, 2));
        until("the writer to be told to wait", || memory.faults.regions[0].waited_for.is_set(2));
        assert!(!waits.is_finished());
        memory.write(33, 2);
        epoch.stage();
        until("the writer to go on", || waits.is_finished());
    });
    epoch.fold(&mut image).expect("whole");
    assert!(image == then);
    assert_eq!(harvest(&mut tracker, 256).1, BTreeSet::from([0, 20, 33, 180]));
}

#[test]
fn nobody_waits_any_more_once_an_epoch_is_let_go_untaken() {
    for group in [1, 16] {
        let Some(memory) = Memory::new(1024, fixed(group)) else { return };
        let mut tracker = holding(&memory, 1);
        (0..1024).for_each(|page| memory.write(page, 1));
        let epoch = OnItsWay::take(&memory, &mut tracker);
        std::thread::scope(|scope| {
            let writers: Vec<_> = (0..4_u64)
                .map(|at| {
                    let memory = &memory;
                    scope.spawn(move || (at * 256..at * 256 + 256).for_each(|page| memory.write(page, 2)))
                })
                .collect();
            let waited_for = |chunk| memory.faults.regions[0].waited_for.is_set(chunk);
            until("writers to wait", || (0..16).filter(|&chunk| waited_for(chunk)).count() >= 3);
            // As when shipping has died: some are taken, the others never will be.
            drop(epoch);
            until("all of them to go on", || writers.iter().all(|writer| writer.is_finished()));
        });
        // It was let go, not forgotten: whoever harvested it has its pages. What was written since is in the next.
        let mut image = memory.content();
        (0..1024).for_each(|page| image[page * PAGE_SIZE + 17] = 1);
        let mut next = OnItsWay::take(&memory, &mut tracker);
        next.stage();
        next.fold(&mut image).expect("whole");
        assert!(image == memory.content());
    }
}

#[test]
fn p3_a_write_fault_that_is_answered_with_the_guest_stopped_lets_nobody_write_what_is_held() {
    let Some(memory) = Memory::new(128, fixed(16)) else { return };
    let mut tracker = holding(&memory, 128);
    let mut image = memory.content();
    (0..128).for_each(|page| memory.write(page, 1));
    let then = memory.content();
    let sizes = [(ID, 128)];
    let mut dirty = DirtySet::new(sizes);
    tracker.harvest(&mut dirty).expect("harvest");
    tracker.sift(&mut dirty, &DirtySet::new(sizes)).expect("sift");
    // Read before the guest was stopped, answered after its harvest.
    assert!(memory.faults.answer(ID, PageIndex(40)));
    let mut epoch = OnItsWay::hold(&memory, &mut tracker, dirty).unwrap_or_else(|_| panic!("there is room"));
    // And one that is answered when they are held.
    assert!(memory.faults.answer(ID, PageIndex(70)));
    let before = memory.faults.answered();
    (32..48).chain(64..80).for_each(|page| memory.write(page, 2));
    assert_eq!(memory.faults.answered(), before, "these were writable");
    epoch.stage();
    epoch.fold(&mut image).expect("whole");
    assert!(image == then);
}

/// As the engine does at a hole: told of first, filled then.
fn give_up(memory: &Memory, page: u64) {
    let at = page << belay_transport::PAGE_SHIFT;
    memory.block.file.punch(Extent { offset: at, len: PAGE_SIZE as u64 }).expect("punch");
    memory.faults.given_up(ID, PageIndex(page));
    memory.block.alias.zero(at as usize, PAGE_SIZE);
}

#[test]
fn p3_a_page_given_up_before_it_was_taken_fails_its_epoch_and_its_neighbours_are_copied_in_the_pause_from_then_on() {
    let Some(memory) = Memory::new(256, fixed(1)) else { return };
    let mut tracker = holding(&memory, 64);
    let mut image = memory.content();
    (0..128).for_each(|page| memory.write(page, 1));
    let mut epoch = OnItsWay::take(&memory, &mut tracker);
    give_up(&memory, 7);
    epoch.stage();
    let failed = epoch.fold(&mut image).expect_err("what it held is gone");
    assert!(matches!(failed, StageError::GivenUp { region: ID, page: PageIndex(7) }), "{failed}");
    // One that has been taken may go.
    (64..128).for_each(|page| memory.write(page, 2));
    let mut epoch = OnItsWay::take(&memory, &mut tracker);
    epoch.stage();
    give_up(&memory, 100);
    epoch.fold(&mut image).expect("whole");
    // Both chunks have seen it now: what is given up there is in the pool before.
    let mut image = memory.content();
    (0..20).chain(90..120).for_each(|page| memory.write(page, 3));
    let then = memory.content();
    let mut epoch = OnItsWay::take(&memory, &mut tracker);
    (0..20).for_each(|page| give_up(&memory, page));
    epoch.stage();
    assert_eq!(epoch.fold(&mut image).expect("whole"), 0);
    assert!(image == then, "as it was, not zeroes");
    // More than it has room for: then not at all, and nothing of it is left there.
    (0..128).for_each(|page| memory.write(page, 4));
    assert!(OnItsWay::try_take(&memory, &mut tracker).is_err());
    memory.write(1, 5);
    memory.write(200, 5);
    OnItsWay::take(&memory, &mut tracker).stage();
    // Registered anew.
    tracker.start().expect("start");
    (0..128).for_each(|page| memory.write(page, 6));
    OnItsWay::take(&memory, &mut tracker).stage();
}

#[test]
fn p3_pages_of_a_huge_frame_are_held_aside_and_not_at_all_where_they_are_too_many() {
    let huge = PageSize::Huge.bytes();
    let Some(_reserved) = HugePages::reserve(4) else { return };
    let Some(memory) = Memory::of(4 * huge, PageSize::Huge, Groups::Adaptive, 1, Faults::None) else { return };
    let mut tracker = holding(&memory, 600);
    let mut image = memory.content();
    memory.write(512 + 3, 1);
    let then = memory.content();
    let mut epoch = OnItsWay::take(&memory, &mut tracker);
    memory.write(512 + 3, 2);
    memory.write(512 + 4, 2);
    epoch.stage();
    epoch.fold(&mut image).expect("whole");
    assert!(image == then);
    memory.write(0, 3);
    memory.write(1024, 3);
    assert!(OnItsWay::try_take(&memory, &mut tracker).is_err());
}

/// Threads write while epochs are staged; each must be what memory was when they last stood still.
fn every_epoch_is_what_it_was(groups: Groups, shards: u64, seed: u64, pool: u32) -> Option<()> {
    const PAGES: u64 = 512;
    let memory = Memory::of(PAGES as usize * PAGE_SIZE, PageSize::Small, groups, shards, Faults::MissingAndMinor)?;
    (0..PAGES).for_each(|page| memory.write(page, 0));
    let mut tracker = holding(&memory, pool);
    let mut image = memory.content();
    let paused = RwLock::new(());
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for thread in 0..3_u64 {
            let (memory, paused, done) = (&memory, &paused, &done);
            let mut state = seed ^ (thread + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            scope.spawn(move || {
                while !done.load(Ordering::Acquire) {
                    let from = random(&mut state) % PAGES;
                    for step in 0..random(&mut state) % 100 {
                        let page = if thread == 0 { (from + step) % PAGES } else { random(&mut state) % PAGES };
                        let running = paused.read().expect("lock");
                        memory.write(page, (random(&mut state) % 5) as u8);
                        if step % 41 == 40 {
                            memory.zap(page, 1);
                        }
                        drop(running);
                    }
                }
            });
        }
        for epoch in 0..24 {
            let stopped = paused.write().expect("lock");
            let then = memory.content();
            match OnItsWay::try_take(&memory, &mut tracker) {
                Ok(mut taken) => {
                    drop(stopped);
                    taken.stage();
                    taken.fold(&mut image).expect("nothing is given up");
                }
                // A fault was answered late, and its group is more than there is room for: it is copied in the pause.
                Err(dirty) => {
                    fold(&mut image, &memory, &dirty.iter().map(|(_, page)| page.0).collect());
                    drop(stopped);
                }
            }
            if image != then {
                done.store(true, Ordering::Release);
                panic!("epoch {epoch} of seed {seed} with {groups:?} and room for {pool} is not what it was");
            }
        }
        done.store(true, Ordering::Release);
    });
    Some(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, ..ProptestConfig::default() })]

    #[test]
    fn p3_what_is_staged_while_the_guest_runs_is_what_it_was_at_the_pause(
        seed: u64,
        size in prop::sample::select(vec![None, Some(1), Some(8), Some(64)]),
        shards in 1_u64..3,
        pool in prop::sample::select(vec![1_u32, 16, 512]),
    ) {
        let groups = size.map_or(Groups::Adaptive, fixed);
        every_epoch_is_what_it_was(groups, shards, seed, pool);
    }
}
