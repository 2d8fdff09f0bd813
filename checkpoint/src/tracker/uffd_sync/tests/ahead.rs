//! What is protected ahead of a pause is in its harvest, and so is whatever is written meanwhile.

use super::*;

const PAGES: u64 = 4096;

fn prepared(memory: &Memory, pages: &BTreeSet<u64>) -> UffdSyncTracker {
    let mut tracker = memory.tracker();
    pages.iter().for_each(|&page| memory.write(page, 1));
    tracker.prepare().expect("prepare");
    tracker
}

#[test]
fn what_is_protected_ahead_is_in_the_next_harvest_once_and_so_is_what_is_written_after_it() {
    for groups in [fixed(1), fixed(16), Groups::Adaptive] {
        let Some(memory) = Memory::new(PAGES, groups) else { return };
        let pages: BTreeSet<u64> = (0..600).map(|page| page * 5).collect();
        let mut tracker = prepared(&memory, &pages);
        assert_eq!(memory.faults.opened(), 0, "all of it is protected again, with {groups:?}");
        assert!(tracker.dirty_so_far() >= Some(600), "and not forgotten");
        let answered = memory.faults.answered();
        for page in [5, 2500, 3001] {
            memory.write(page, 2);
        }
        assert_eq!(memory.faults.answered(), answered + 3, "it is tracked from there on");
        let (opened, sent) = harvest(&mut tracker, PAGES);
        assert!(opened.is_superset(&pages) && opened.contains(&3001));
        assert_eq!(sent, opened, "each for the first time");
        assert_eq!(harvest(&mut tracker, PAGES).0, BTreeSet::new());
    }
}

#[test]
fn a_page_of_a_group_that_was_found_twice_is_compared_once() {
    let Some(memory) = Memory::new(PAGES, fixed(16)) else { return };
    let pages: BTreeSet<u64> = (0..PAGES / 16).map(|group| group * 16).collect();
    let mut tracker = prepared(&memory, &pages);
    harvest(&mut tracker, PAGES);
    // Now what each holds is known.
    pages.iter().for_each(|&page| memory.write(page, 2));
    tracker.prepare().expect("prepare");
    memory.write(16, 3);
    memory.write(33, 3);
    let changed: BTreeSet<u64> = pages.iter().copied().chain([33]).collect();
    assert_eq!(harvest(&mut tracker, PAGES).1, changed);
}

#[test]
fn p3_what_was_protected_ahead_of_a_pause_that_did_not_come_is_in_the_next() {
    let Some(memory) = Memory::new(PAGES, fixed(1)) else { return };
    let mut tracker = prepared(&memory, &(0..600).collect());
    (300..1200).for_each(|page| memory.write(page, 2));
    // The guest would not stop, and is asked again.
    tracker.prepare().expect("prepare");
    memory.write(7, 3);
    assert_eq!(harvest(&mut tracker, PAGES).1, (0..1200).collect());
    // What comes back after it was dropped is as new, and nothing of the old session is told.
    (0..600).for_each(|page| memory.write(page, 4));
    tracker.prepare().expect("prepare");
    tracker.start().expect("start");
    assert_eq!(harvest(&mut tracker, PAGES).0, BTreeSet::new());
}

#[test]
fn a_guest_that_goes_round_in_the_same_pages_is_left_alone_for_a_while_and_tried_again() {
    let Some(memory) = Memory::new(PAGES, fixed(1)) else { return };
    let pages: BTreeSet<u64> = (0..600).collect();
    let mut tracker = prepared(&memory, &pages);
    let mut tried = Vec::new();
    for _ in 0..9 {
        // Written again before the pause, each of them.
        pages.iter().for_each(|&page| memory.write(page, 2));
        assert_eq!(harvest(&mut tracker, PAGES).1, pages);
        pages.iter().for_each(|&page| memory.write(page, 3));
        tracker.prepare().expect("prepare");
        tried.push(memory.faults.opened() == 0);
    }
    assert_eq!(tried, [false, true, false, false, true, false, false, false, false]);
    harvest(&mut tracker, PAGES);
    // From now on it writes each once.
    let tries = (0..12).filter(|_| {
        pages.iter().for_each(|&page| memory.write(page, 2));
        tracker.prepare().expect("prepare");
        let tried = memory.faults.opened() == 0;
        assert_eq!(harvest(&mut tracker, PAGES).1, pages);
        tried
    });
    assert_eq!(tries.count(), 12, "nothing stays of it");
}

#[test]
fn few_pages_are_left_to_the_pause() {
    let Some(memory) = Memory::new(PAGES, fixed(1)) else { return };
    let mut tracker = prepared(&memory, &(0..100).collect());
    assert_eq!(memory.faults.opened(), 100);
    assert_eq!(harvest(&mut tracker, PAGES).1, (0..100).collect());
}

#[test]
fn p3_memory_that_is_gone_is_an_error_ahead_of_a_pause_too_and_what_was_told_is_kept() {
    // Several runs of chunks, of which some can be protected still.
    let pages = PAGES * 4;
    let len = pages as usize * PAGE_SIZE;
    let Some(memory) = Memory::of(len, PageSize::Small, fixed(1), 2, Faults::None) else { return };
    let mut tracker = memory.tracker();
    (0..pages).step_by(3).for_each(|page| memory.write(page, 1));
    let half = len as u64 / 2;
    memory.uffds[1].0.unregister(memory.guest.address() + half, half).expect("unregister");
    assert!(matches!(tracker.prepare(), Err(GuestError::VmmGone(_))));
    let mut set = DirtySet::new([(ID, pages)]);
    assert!(matches!(tracker.harvest(&mut set), Err(GuestError::VmmGone(_))));
    let told: BTreeSet<u64> = set.iter().map(|(_, page)| page.0).collect();
    assert!(told.is_superset(&(0..pages / 2).step_by(3).collect()), "{} pages", told.len());
}
