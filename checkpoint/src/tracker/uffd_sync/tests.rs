//! With real memory, real faults and somebody who answers them: what was written is reported, and nothing written is missed.

use super::*;
use crate::testing::huge_pages::HugePages;
use belay_transport::pull::ShardRange;
use belay_transport::region::{Mapping, RamFile};
use belay_transport::uffd::{Event, FaultKind, Faults, OpenMode, RegisterModes, Uffd};
use belay_transport::{PAGE_SIZE, PageSize, RegionId};
use proptest::prelude::*;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Barrier, RwLock};
use std::thread::JoinHandle;

mod ahead;
mod held;

const ID: RegionId = RegionId(7);

/// Guest memory as a VMM has it, and a thread that serves its faults as the pull engine does.
struct Memory {
    guest: Arc<Mapping>,
    block: RamBlock,
    uffds: Vec<(Uffd, Vec<ShardRange>)>,
    faults: Arc<WriteFaults>,
    stop: Arc<AtomicBool>,
    server: Option<JoinHandle<()>>,
}

impl Memory {
    /// `None` where the kernel or the rights for it are missing.
    fn new(pages: u64, groups: Groups) -> Option<Self> {
        Self::of(pages as usize * PAGE_SIZE, PageSize::Small, groups, 1, Faults::None)
    }

    /// Split into `shards` parts, each with a userfaultfd, wherever that cuts a group.
    fn of(len: usize, page_size: PageSize, groups: Groups, shards: u64, faults: Faults) -> Option<Self> {
        let asked = SYNC_FEATURES.union(Features::MINOR_SHMEM).union(Features::MISSING_SHMEM);
        let file = match RamFile::memfd("sync-tracker-test", len, page_size) {
            Ok(file) => Arc::new(file),
            Err(error) if page_size == PageSize::Huge => {
                eprintln!("skipped: {error}");
                return None;
            }
            Err(error) => panic!("{error}"),
        };
        if let Err(error) = file.preallocate(1, &|_| {}) {
            eprintln!("skipped: {error}");
            return None;
        }
        let guest = Arc::new(file.map().expect("map"));
        let alias = Arc::new(file.map().expect("map"));
        let (vmm_address, frames) = (guest.address(), len as u64 >> page_size.shift());
        let mut uffds = Vec::new();
        for shard in 0..shards {
            let uffd = match Uffd::open(OpenMode::UserModeOnly, asked) {
                Ok(uffd) => uffd,
                Err(error) => {
                    eprintln!("skipped: {error}");
                    return None;
                }
            };
            let frames = frames * shard / shards..frames * (shard + 1) / shards;
            let (start, len) = (frames.start << page_size.shift(), (frames.end - frames.start) << page_size.shift());
            uffd.register(vmm_address + start, len, RegisterModes { faults, write_protect: true }).expect("register");
            uffds.push((uffd, vec![ShardRange { region: ID, frames }]));
        }
        let block = RamBlock { id: ID, page_size, file, alias, vmm_address };
        let mut write_faults = WriteFaults::new(std::slice::from_ref(&block), &uffds, groups).expect("write faults");
        // However many processors there are: what is shared out is to be shared out here too.
        write_faults.threads = 4;
        let (faults, stop) = (Arc::new(write_faults), Arc::new(AtomicBool::new(false)));
        let mut memory = Self { guest, block, uffds, faults, stop, server: None };
        memory.serve();
        Some(memory)
    }

    /// Answers faults in a thread, until this is dropped.
    fn serve(&mut self) {
        let uffds: Vec<Uffd> = self.uffds.iter().map(|(uffd, _)| uffd.try_clone().expect("dup")).collect();
        let (faults, stop) = (Arc::clone(&self.faults), Arc::clone(&self.stop));
        let (start, page_size) = (self.block.vmm_address, self.block.page_size);
        self.server = Some(std::thread::spawn(move || {
            while !stop.load(Ordering::Acquire) {
                let mut ready: Vec<_> = uffds.iter().map(|uffd| PollFd::new(uffd, PollFlags::IN)).collect();
                let _ = poll(&mut ready, Some(&Timespec { tv_sec: 0, tv_nsec: 2_000_000 }));
                for uffd in &uffds {
                    let mut events = [Event::Remove { start: 0, end: 0 }; 32];
                    let count = uffd.read_events(&mut events).expect("read");
                    for event in &events[..count] {
                        let Event::Fault { address, kind, .. } = *event else { panic!("{event:?}") };
                        let page = PageIndex::containing((address - start) as usize);
                        let frame = address & !(page_size.bytes() as u64 - 1);
                        match kind {
                            FaultKind::WriteProtect => assert!(faults.answer(ID, page), "{event:?}"),
                            FaultKind::Minor => {
                                faults.shown_again(ID, page);
                                let len = page_size.bytes() as u64;
                                assert!(uffd.continue_range(frame, len, page_size, true).expect("continue").done());
                            }
                            FaultKind::Missing => panic!("all of it is allocated: {event:?}"),
                        }
                    }
                }
            }
        }));
    }

    fn tracker(&self) -> UffdSyncTracker {
        let blocks = std::slice::from_ref(&self.block);
        let mut tracker = UffdSyncTracker::new(blocks, Arc::clone(&self.faults)).expect("tracker");
        tracker.start().expect("start");
        tracker
    }

    fn write(&self, page: u64, byte: u8) {
        self.guest.write(page as usize * PAGE_SIZE + 17, &[byte]);
    }

    fn read(&self, page: u64) -> u8 {
        let mut byte = [0];
        self.guest.read(page as usize * PAGE_SIZE, &mut byte);
        std::hint::black_box(byte[0])
    }

    fn zap(&self, page: u64, count: u64) {
        let start = self.guest.as_ptr().wrapping_add(page as usize * PAGE_SIZE).cast();
        // SAFETY: the range lies in the mapping, and a shared mapping loses no bytes by this.
        unsafe { rustix::mm::madvise(start, count as usize * PAGE_SIZE, rustix::mm::Advice::LinuxDontNeed) }
            .expect("madvise");
    }

    fn pages(&self) -> u64 {
        (self.guest.len() / PAGE_SIZE) as u64
    }

    /// Everything it holds, as a record's reader would see it.
    fn content(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.block.alias.len()];
        self.block.alias.read(0, &mut bytes);
        bytes
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(server) = self.server.take()
            && server.join().is_err()
            && !std::thread::panicking()
        {
            panic!("the thread that serves faults has failed");
        }
    }
}

fn fixed(pages: u64) -> Groups {
    Groups::Fixed(GroupSize::new(pages).expect("a power of two up to 64"))
}

/// What the harvest found, before and after the sifting.
fn harvest(tracker: &mut UffdSyncTracker, pages: u64) -> (BTreeSet<u64>, BTreeSet<u64>) {
    let sizes = [(ID, pages)];
    let mut set = DirtySet::new(sizes);
    tracker.harvest(&mut set).expect("harvest");
    let opened = set.iter().map(|(_, page)| page.0).collect();
    tracker.sift(&mut set, &DirtySet::new(sizes)).expect("sift");
    (opened, set.iter().map(|(_, page)| page.0).collect())
}

#[test]
fn a_written_page_is_reported_once_and_again_only_if_written_again() {
    let Some(memory) = Memory::new(2048, fixed(1)) else { return };
    (0..1024).for_each(|page| memory.write(page, 1));
    let mut tracker = memory.tracker();
    assert_eq!(harvest(&mut tracker, 2048).1, BTreeSet::new(), "what was written before is clean");
    for page in 0..32_u64 {
        memory.read(page);
    }
    assert_eq!(harvest(&mut tracker, 2048).1, BTreeSet::new(), "reading makes nothing dirty");
    let written = BTreeSet::from([0, 1, 5, 1023, 1024, 2047]);
    written.iter().for_each(|&page| memory.write(page, 2));
    assert_eq!(tracker.dirty_so_far(), Some(written.len() as u64));
    assert_eq!(harvest(&mut tracker, 2048).1, written);
    assert_eq!(tracker.dirty_so_far(), Some(0));
    assert_eq!(harvest(&mut tracker, 2048).1, BTreeSet::new());
    memory.write(5, 2);
    assert_eq!(
        harvest(&mut tracker, 2048).1,
        BTreeSet::from([5]),
        "alone in its group it is sent without a look at its content"
    );
}

#[test]
fn p3_a_harvest_that_several_threads_share_reports_every_page_once_and_leaves_none_writable() {
    let pages = 40_000;
    let Some(memory) = Memory::of(pages as usize * PAGE_SIZE, PageSize::Small, fixed(1), 3, Faults::None) else {
        return;
    };
    let mut tracker = memory.tracker();
    for round in 1..4 {
        let written: BTreeSet<u64> = (0..pages / 29).map(|at| at * 29 + at % round).collect();
        written.iter().for_each(|&page| memory.write(page, round as u8));
        assert_eq!(harvest(&mut tracker, pages), (written.clone(), written), "round {round}");
        assert_eq!(harvest(&mut tracker, pages).0, BTreeSet::new(), "all of it is shut");
    }
}

#[test]
fn one_write_opens_its_aligned_group_and_the_rest_of_it_faults_no_more() {
    let Some(memory) = Memory::new(256, fixed(16)) else { return };
    let mut tracker = memory.tracker();
    (32..48).rev().for_each(|page| memory.write(page, 1));
    memory.write(100, 1);
    assert_eq!(memory.faults.answered(), 2);
    let (opened, sent) = harvest(&mut tracker, 256);
    assert_eq!(opened, (32..48).chain(96..112).collect());
    assert_eq!(sent, opened, "what nothing was known of is sent");
    memory.write(40, 2);
    memory.write(96, 2);
    let (opened, sent) = harvest(&mut tracker, 256);
    assert_eq!(opened, (32..48).chain(96..112).collect());
    assert_eq!(sent, BTreeSet::from([40, 96]), "now the others are known to be as they were");
    memory.write(40, 2);
    assert_eq!(harvest(&mut tracker, 256).1, BTreeSet::new(), "written, and the same as before");
}

#[test]
fn a_sequential_writer_faults_less_with_every_pass_and_a_scattered_one_is_left_alone() {
    let Some(memory) = Memory::new(64 * 40, Groups::Adaptive) else { return };
    let mut tracker = memory.tracker();
    let mut faults = Vec::new();
    for pass in 1..=4 {
        let before = memory.faults.answered();
        (0..64 * 16).for_each(|page| memory.write(page, pass));
        faults.push(memory.faults.answered() - before);
        assert_eq!(harvest(&mut tracker, memory.pages()).1, (0..64 * 16).collect());
    }
    assert_eq!(faults, [16 * 7, 16 * 7, 16, 16]);
    for pass in 1..=4 {
        let scattered: BTreeSet<u64> =
            (16..40).map(|chunk| chunk * 64 + (chunk * 29 + u64::from(pass) * 31) % 64).collect();
        let before = memory.faults.answered();
        scattered.iter().for_each(|&page| memory.write(page, pass));
        assert_eq!(memory.faults.answered() - before, scattered.len() as u64);
        let (opened, sent) = harvest(&mut tracker, memory.pages());
        assert_eq!((&opened, &sent), (&scattered, &scattered), "no page more than was written");
    }
}

#[test]
fn a_group_that_turns_out_mostly_unwritten_is_made_smaller() {
    let Some(memory) = Memory::new(64, Groups::Adaptive) else { return };
    let mut tracker = memory.tracker();
    for pass in 1..=3 {
        (0..64).for_each(|page| memory.write(page, pass));
        harvest(&mut tracker, 64);
    }
    memory.write(9, 100);
    assert_eq!(harvest(&mut tracker, 64), ((0..64).collect(), BTreeSet::from([9])));
    memory.write(9, 101);
    harvest(&mut tracker, 64);
    memory.write(9, 102);
    assert_eq!(harvest(&mut tracker, 64).0, BTreeSet::from([9]), "two epochs have said that it is written alone");
}

#[test]
fn a_write_to_a_huge_page_opens_all_of_it_and_only_what_was_changed_is_sent() {
    let huge = PageSize::Huge.bytes();
    let Some(_reserved) = HugePages::reserve(4) else { return };
    for groups in [fixed(16), Groups::Adaptive] {
        let Some(memory) = Memory::of(4 * huge, PageSize::Huge, groups, 2, Faults::None) else { return };
        let pages = memory.pages();
        (0..4).for_each(|frame| memory.write(frame * 512, 1));
        let mut tracker = memory.tracker();
        assert_eq!(harvest(&mut tracker, pages).1, BTreeSet::new());
        memory.write(512 * 2 + 77, 2);
        assert_eq!(harvest(&mut tracker, pages).1, (1024..1536).collect());
        memory.write(512 * 2 + 78, 3);
        assert_eq!(harvest(&mut tracker, pages), ((1024..1536).collect(), BTreeSet::from([512 * 2 + 78])));
        assert_eq!(harvest(&mut tracker, pages).0, BTreeSet::new());
    }
}

#[test]
fn p3_a_write_is_not_missed_when_its_page_is_zapped_after_it_or_before() {
    let len = 64 * PAGE_SIZE;
    let Some(memory) = Memory::of(len, PageSize::Small, fixed(1), 1, Faults::MissingAndMinor) else { return };
    (0..64).for_each(|page| memory.write(page, 1));
    let mut tracker = memory.tracker();
    memory.write(3, 2);
    memory.write(40, 2);
    memory.zap(0, 64);
    assert_eq!(harvest(&mut tracker, 64).1, BTreeSet::from([3, 40]));
    // What comes back counts as written, because nobody can tell that it was not; and it comes back protected.
    memory.read(40);
    memory.write(41, 3);
    assert_eq!(harvest(&mut tracker, 64).1, BTreeSet::from([40, 41]));
    assert_eq!(harvest(&mut tracker, 64).1, BTreeSet::new());
    memory.write(40, 4);
    memory.write(41, 4);
    assert_eq!(harvest(&mut tracker, 64).1, BTreeSet::from([40, 41]));
}

#[test]
fn p3_a_page_that_was_given_up_is_sent_although_it_holds_what_it_held_before() {
    let Some(memory) = Memory::new(64, fixed(64)) else { return };
    let mut tracker = memory.tracker();
    memory.write(8, 1);
    harvest(&mut tracker, 64);
    let mut discards = DirtySet::new([(ID, 64)]);
    discards.insert(ID, PageIndex(8));
    let mut dirty = DirtySet::new([(ID, 64)]);
    // Its record says that it reads as zero.
    tracker.sift(&mut dirty, &discards).expect("sift");
    memory.write(8, 1);
    assert_eq!(harvest(&mut tracker, 64).1, BTreeSet::from([8]));
}

#[test]
fn p3_what_is_not_put_into_a_record_is_not_taken_for_known() {
    let Some(memory) = Memory::new(64, fixed(64)) else { return };
    let mut tracker = memory.tracker();
    memory.write(8, 1);
    let sizes = [(ID, 64)];
    let mut dirty = DirtySet::new(sizes);
    tracker.harvest(&mut dirty).expect("harvest");
    // It has not landed: what lies there is nobody's.
    dirty.retain(|_, page| page.0 != 8);
    tracker.sift(&mut dirty, &DirtySet::new(sizes)).expect("sift");
    assert_eq!(dirty.len(), 63);
    memory.write(9, 1);
    assert_eq!(harvest(&mut tracker, 64).1, BTreeSet::from([8, 9]));
}

#[test]
fn whoever_answers_faults_never_waits_for_a_harvest() {
    let Some(memory) = Memory::new(128, fixed(16)) else { return };
    let mut tracker = memory.tracker();
    std::thread::scope(|scope| {
        let held = memory.faults.state(0, 0).expect("free");
        let writer = scope.spawn(|| memory.write(3, 1));
        // Another chunk's faults are answered meanwhile, by the same thread.
        memory.write(70, 1);
        assert!(memory.faults.answer(ID, PageIndex(3)), "it is told to come again");
        assert!(!writer.is_finished());
        drop(held);
        writer.join().expect("it goes on once the chunk is free");
    });
    assert_eq!(harvest(&mut tracker, 128).0, (0..16).chain(64..80).collect());
}

#[test]
fn p3_memory_that_is_gone_is_an_error_and_not_a_clean_page() {
    let Some(memory) = Memory::new(64, fixed(1)) else { return };
    let mut tracker = memory.tracker();
    memory.write(40, 1);
    memory.uffds[0].0.unregister(memory.guest.address(), 64 * PAGE_SIZE as u64).expect("unregister");
    let mut set = DirtySet::new([(ID, 64)]);
    for _ in 0..2 {
        let error = tracker.harvest(&mut set).expect_err("nobody tracks there");
        assert!(matches!(error, GuestError::VmmGone(_)), "{error:?}");
    }
    assert!(!memory.faults.answer(ID, PageIndex(41)), "and nobody can answer");
    assert!(!memory.faults.answer(RegionId(8), PageIndex(41)) && !memory.faults.answer(ID, PageIndex(64)));
}

/// Pseudo-random numbers from a seed (xorshift64*).
fn random(state: &mut u64) -> u64 {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    state.wrapping_mul(0x2545_f491_4f6c_dd1d)
}

/// Puts an epoch's pages into what the other host has.
fn fold(image: &mut [u8], memory: &Memory, sent: &BTreeSet<u64>) {
    for &page in sent {
        let at = page as usize * PAGE_SIZE;
        memory.block.alias.read(at, &mut image[at..at + PAGE_SIZE]);
    }
}

/// Writers of several habits, over some epochs; each epoch folded, and compared byte for byte.
fn every_epoch_is_whole(groups: Groups, shards: u64, seed: u64, threads: u64, epochs: u64) -> bool {
    const PAGES: u64 = 64 * 9 + 13;
    let len = PAGES as usize * PAGE_SIZE;
    let Some(memory) = Memory::of(len, PageSize::Small, groups, shards, Faults::MissingAndMinor) else { return false };
    let mut tracker = memory.tracker();
    let mut image = memory.content();
    let paused = RwLock::new(());
    let rounds = Barrier::new(threads as usize + 1);
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let (memory, paused, rounds) = (&memory, &paused, &rounds);
            let mut state = seed ^ (thread + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            scope.spawn(move || {
                for _ in 0..epochs {
                    let from = random(&mut state) % PAGES;
                    for step in 0..random(&mut state) % 200 {
                        let page = match thread % 3 {
                            0 => (from + step) % PAGES,
                            1 => random(&mut state) % PAGES,
                            _ => (from + step * 8) % PAGES,
                        };
                        // Few values, so that a page often holds what it held before.
                        let value = (random(&mut state) % 3) as u8;
                        let running = paused.read().expect("lock");
                        memory.write(page, value);
                        if step % 61 == 60 {
                            memory.zap(page, 1);
                        }
                        drop(running);
                    }
                    rounds.wait();
                    rounds.wait();
                }
            });
        }
        let mut state = seed | 1;
        let mut take = || {
            if random(&mut state).is_multiple_of(2) {
                (tracker.ahead.back_off.least_pages, tracker.ahead.back_off.skip) = (1, 0);
                tracker.prepare().expect("prepare");
            }
            let stopped = paused.write().expect("lock");
            let sent = harvest(&mut tracker, PAGES).1;
            fold(&mut image, &memory, &sent);
            assert!(image == memory.content(), "an epoch of seed {seed} with {groups:?} is not whole");
            drop(stopped);
        };
        for _ in 0..epochs {
            // Some while they are at it, and one when they rest.
            (0..3).for_each(|_| take());
            rounds.wait();
            take();
            rounds.wait();
        }
    });
    true
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, ..ProptestConfig::default() })]

    #[test]
    fn p3_every_epoch_holds_whatever_its_writers_did(
        seed: u64,
        size in prop::sample::select(vec![None, Some(1), Some(2), Some(8), Some(64)]),
        shards in 1_u64..4,
        threads in 1_u64..4,
    ) {
        let groups = size.map_or(Groups::Adaptive, fixed);
        every_epoch_is_whole(groups, shards, seed, threads, 4);
    }
}

/// Nobody pauses them: an epoch may hold any mixture then, but nothing may stay behind for good.
#[test]
fn p3_no_write_is_lost_between_an_answer_and_a_harvest() {
    for groups in [fixed(1), fixed(16), Groups::Adaptive] {
        let Some(memory) = Memory::new(256, groups) else { return };
        let mut tracker = memory.tracker();
        let mut image = memory.content();
        let running = AtomicU64::new(3);
        std::thread::scope(|scope| {
            for thread in 0..3_u64 {
                let (memory, running) = (&memory, &running);
                scope.spawn(move || {
                    let mut state = thread + 1;
                    for step in 0..1500 {
                        // No value twice: nothing else would tell a page that is what it was when it was hashed, but was something
                        // else when it was copied. A guest that stands still cannot do that.
                        let at = (random(&mut state) % 256) as usize * PAGE_SIZE;
                        memory.guest.store_u64(at, (thread + 1) << 32 | step, Ordering::Relaxed);
                    }
                    running.fetch_sub(1, Ordering::Release);
                });
            }
            let mut more = true;
            while more {
                more = running.load(Ordering::Acquire) > 0;
                (tracker.ahead.back_off.least_pages, tracker.ahead.back_off.skip) = (1, 0);
                tracker.prepare().expect("prepare");
                let sent = harvest(&mut tracker, 256).1;
                fold(&mut image, &memory, &sent);
            }
        });
        assert!(image == memory.content(), "with {groups:?}");
    }
}
