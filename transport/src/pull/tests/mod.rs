//! What the engine promises, with real userfaultfds and a fabric that the tests steer.

mod device;
mod lane;
mod rig;

use super::*;
use crate::testing::HugePages;
use crate::uffd::Features;
use crate::units::PageSize;
use rig::*;

#[test]
fn a_guest_never_reads_a_page_that_has_not_arrived() {
    for memory in Memory::ALL {
        let options = Options { memory, demand_permits: 0, ..Options::default() };
        let Some(rig) = Rig::new(options) else { return };
        let touchers: Vec<_> = [5, 77, 200].map(|page| (page, rig.touch(page))).into();
        until(|| rig.demand.posted().len() == 3);
        assert!(touchers.iter().all(|(_, toucher)| !toucher.is_finished()), "a page was shown before it had arrived");
        rig.demand.allow(u64::MAX);
        for (page, toucher) in touchers {
            assert_eq!(joined(toucher), content(page), "{memory:?}");
            assert!(rig.engine().landed(REGION, PageIndex(page)));
        }
        assert!(!rig.engine().landed(REGION, PageIndex(6)));
        assert_eq!(rig.stop().latencies.total.len(), 3);
    }
}

#[test]
fn every_page_is_pulled_right_while_threads_race_the_background() {
    for (memory, shards) in [
        (Memory::Populated, 1),
        (Memory::Populated, 3),
        (Memory::Reserved, 2),
        (Memory::Bounce, 1),
        (Memory::Bounce, 2),
    ] {
        let options = Options { memory, shards, pages: 3000, paused: false, ..Options::default() };
        let Some(rig) = Rig::new(options) else { return };
        let touchers: Vec<_> = (0..3_u64)
            .map(|thread| {
                let (guest, pages) = (rig.guest.clone(), rig.pages);
                std::thread::spawn(move || {
                    (0..pages)
                        .map(|i| (i * 7919 + thread * 31) % pages)
                        .filter(|p| guest.word(*p) != content(*p))
                        .count()
                })
            })
            .collect();
        for toucher in touchers {
            assert_eq!(joined(toucher), 0, "{memory:?}, {shards} shards");
        }
        rig.engine().wait_all_landed(Deadline::after(BOUND)).unwrap();
        let progress = rig.engine().progress();
        assert_eq!((progress.landed, progress.absent, progress.bytes_pulled), (3000, 0, 3000 * 4096));
        let mut read: Vec<u64> = rig.demand.posted().iter().chain(&rig.bulk.posted()).flat_map(pages_of).collect();
        read.sort_unstable();
        assert_eq!(read, (0..3000).collect::<Vec<_>>(), "every page is read once");
        rig.stop();
    }
}

#[test]
fn a_log_has_every_fault_with_who_waited_for_it_and_when_it_was_answered() {
    for memory in Memory::ALL {
        let log = Arc::new(FaultLog::new(2));
        let (shards, features) = (2, Features::THREAD_ID);
        let options = Options { memory, shards, features, log: Some(log.clone()), ..Options::default() };
        let Some(rig) = Rig::new(options) else { return };
        assert_eq!(joined(rig.touch(7)), content(7));
        let guest = rig.guest.clone();
        joined(std::thread::spawn(move || guest.write(200, 1)));
        rig.pull_all();
        // What is there is no fault any more, and nobody waits for what the background brings.
        assert_eq!(joined(rig.touch(9)), content(9));
        rig.stop();
        let mut all = Vec::new();
        log.take(&mut |shard, noted| all.push((shard, noted))).unwrap();
        let [(0, first), (0, first_shown), (1, second), (1, second_shown)] = all[..] else { panic!("{all:?}") };
        for (noted, answer, page, written) in [(first, first_shown, 7, false), (second, second_shown, 200, true)] {
            let (Noted::Fault { at_ns, region, frame, write, thread }, Noted::Shown { at_ns: shown, first, .. }) =
                (noted, answer)
            else {
                panic!("{noted:?} {answer:?}")
            };
            assert_eq!((region, frame, write, first), (REGION, FrameIndex(page), written, frame));
            assert!(thread > 0 && shown >= at_ns, "{noted:?} {answer:?}");
        }
    }
}

#[test]
fn without_a_bubble_the_background_goes_through_memory_in_its_order_whatever_was_touched() {
    for (bubble_bytes, in_order) in [(0, true), (2 << 20, false)] {
        let Some(rig) = Rig::new(Options { bubble_bytes, ..Options::default() }) else { return };
        assert_eq!(joined(rig.touch(100)), content(100));
        rig.pull_all();
        let pages: Vec<u64> = rig.bulk.posted().iter().flat_map(pages_of).collect();
        assert_eq!(pages.is_sorted(), in_order, "{pages:?}");
        assert_eq!(pages.len(), 255);
        rig.stop();
    }
}

fn pages_of(read: &crate::fabric::Read) -> std::ops::Range<u64> {
    read.remote_offset / 4096..(read.remote_offset + u64::from(read.len)) / 4096
}

#[test]
fn zero_pages_are_never_read_over_the_fabric() {
    let classes = |pages: u64| {
        vec![
            ClassRun { class: PageClass::Zero, frames: 100 },
            ClassRun { class: PageClass::Peer, frames: 10 },
            ClassRun { class: PageClass::Zero, frames: pages - 110 },
        ]
    };
    for memory in Memory::ALL {
        for install in [Install::Clean, Install::Tracked, Install::Protected] {
            let features = if install == Install::Clean { Features::NONE } else { Features::WP_SHMEM };
            let options = Options { memory, install, features, classes: Some(classes(256)), ..Options::default() };
            let Some(rig) = Rig::new(options) else { return };
            assert_eq!(joined(rig.touch(3)), 0);
            assert_eq!(joined(rig.touch(100)), content(100));
            rig.pull_all();
            assert_eq!(joined(rig.touch(255)), 0);
            let mut read: Vec<u64> = rig.demand.posted().iter().chain(&rig.bulk.posted()).flat_map(pages_of).collect();
            read.sort_unstable();
            assert_eq!(read, (100..110).collect::<Vec<_>>());
            assert_eq!(rig.engine().progress().zero_frames, 246);
            rig.stop();
        }
    }
}

#[test]
fn pages_that_the_source_finds_to_be_zero_are_no_longer_read_and_what_is_not_there_is_refused() {
    for memory in Memory::ALL {
        let Some(rig) = Rig::new(Options { memory, ..Options::default() }) else { return };
        let told = |region, first, bitmap: &[u8]| rig.engine().are_zero(region, FrameIndex(first), bitmap);
        assert_eq!(joined(rig.touch(130)), content(130));
        // The one that is here already is among them.
        assert_eq!(told(REGION, 100, &[0xff; 18]), Some(144));
        assert_eq!(told(REGION, 100, &[0xff; 18]), Some(0));
        assert_eq!(told(REGION, 250, &[0xff]), Some(6), "what of the last byte is beyond the end means nothing");
        for (region, first) in [(REGION, 256), (REGION, u64::MAX), (RegionId(REGION.0 + 1), 0)] {
            assert_eq!(told(region, first, &[1]), None, "{region} {first}");
        }
        assert_eq!(joined(rig.touch(120)), 0);
        assert_eq!(joined(rig.touch(99)), content(99));
        rig.pull_all();
        let mut read: Vec<u64> = rig.demand.posted().iter().chain(&rig.bulk.posted()).flat_map(pages_of).collect();
        read.sort_unstable();
        assert_eq!(read, (0..100).chain([130]).chain(244..250).collect::<Vec<_>>());
        assert_eq!(joined(rig.touch(243)), 0);
        rig.stop();
    }
}

#[test]
fn a_read_run_breaks_at_every_frame_that_is_not_its_own() {
    let Some(rig) = Rig::new(Options { demand_permits: 1, ..Options::default() }) else { return };
    assert_eq!(joined(rig.touch(20)), content(20));
    let waiting = rig.touch(40);
    until(|| rig.demand.posted().len() == 2);
    rig.punch(60);
    assert_eq!(joined(rig.touch(60)), 0, "a page given up before anything was read for it is zero");
    rig.engine().resume_background();
    until(|| rig.engine().progress().absent == 0);
    rig.demand.allow(u64::MAX);
    assert_eq!(joined(waiting), content(40));
    rig.engine().wait_all_landed(Deadline::after(BOUND)).unwrap();
    let bulk: Vec<u64> = rig.bulk.posted().iter().flat_map(pages_of).collect();
    assert!([20, 40, 60].iter().all(|page| !bulk.contains(page)), "{bulk:?}");
    assert_eq!(bulk.len(), 253);
    assert_eq!(joined(rig.touch(60)), 0);
    assert_eq!(rig.discards(), [60]);
    rig.stop();
}

#[test]
fn a_page_given_up_before_during_or_after_its_read_is_never_stale() {
    for memory in [Memory::Populated, Memory::Reserved] {
        let Some(rig) = Rig::new(Options { memory, demand_permits: 0, ..Options::default() }) else { return };
        // Before: absent, no userfaultfd event tells; the guest touches it only after the background has been there.
        rig.punch(1);
        // During: a READ is in flight, held.
        let during = rig.touch(2);
        until(|| rig.demand.posted().len() == 1);
        rig.punch(2);
        // During, and a second guest thread meets the hole while the READ is in flight.
        let third = rig.touch(3);
        until(|| rig.demand.posted().len() == 2);
        rig.punch(3);
        let fourth = rig.touch(3);
        until(|| rig.engine().progress().faults >= 3);
        rig.demand.allow(u64::MAX);
        assert_eq!(joined(during), 0, "a READ that was in flight put old bytes into a new frame");
        assert_eq!((joined(third), joined(fourth)), (0, 0));
        rig.pull_all();
        assert_eq!(joined(rig.touch(1)), 0, "a READ posted after the discard put old bytes into a new frame");
        // After it has landed and been read.
        assert_eq!(joined(rig.touch(4)), content(4));
        rig.punch(4);
        assert_eq!(joined(rig.touch(4)), 0);
        // Given up again after the guest wrote to it.
        rig.guest.write(4, 99);
        rig.punch(4);
        assert_eq!(joined(rig.touch(4)), 0);
        assert_eq!(rig.discards(), [1, 2, 3, 4]);
        assert_eq!(rig.discards(), [0; 0], "taken once");
        until(|| [1, 2, 3, 4].iter().all(|page| rig.state(*page) == State::Discarded));
        assert_eq!(joined(rig.touch(5)), content(5));
        rig.stop();
    }
}

#[test]
fn p3_an_old_fault_on_a_hole_that_is_filled_and_written_by_now_makes_no_certain_discard() {
    let Some(rig) = Rig::new(Options::default()) else { return };
    rig.pull_all();
    for round in 1..=300 {
        rig.punch(7);
        // Several find the hole; whoever is answered first lets all of them go on, and the others' faults are read by then or never.
        let readers = [rig.touch(7), rig.touch(7), rig.touch(7)];
        readers.into_iter().for_each(|reader| assert_eq!(joined(reader), 0));
        let taken = rig.all_discards();
        assert!(taken.iter().all(|discard| discard.page.0 == 7), "{taken:?}");
        // Harvested. What the guest writes now and a later harvest does not find written must not be said to be zero.
        rig.guest.write(7, round);
        for _ in 0..3 {
            std::thread::yield_now();
            let certain: Vec<_> = rig.all_discards().into_iter().filter(|discard| discard.certain).collect();
            assert_eq!(certain, [], "round {round}, with {} in it", rig.guest.word(7));
        }
    }
    rig.stop();
}

#[test]
fn with_bounce_landing_a_page_dropped_by_madvise_reads_as_zero_and_is_never_fetched() {
    let options = Options { memory: Memory::Bounce, demand_permits: 0, ..Options::default() };
    let Some(rig) = Rig::new(options) else { return };
    // Absent.
    rig.guest.advise(10, 2, libc::MADV_DONTNEED);
    until(|| rig.state(11) == State::Discarded);
    // In flight.
    let waiting = rig.touch(20);
    until(|| rig.demand.posted().len() == 1);
    rig.guest.advise(20, 1, libc::MADV_DONTNEED);
    until(|| rig.state(20) == State::DiscardWanted);
    rig.demand.allow(u64::MAX);
    assert_eq!(joined(waiting), 0);
    rig.pull_all();
    // Landed.
    assert_eq!(joined(rig.touch(30)), content(30));
    rig.guest.advise(30, 1, libc::MADV_DONTNEED);
    assert_eq!(joined(rig.touch(30)), 0);
    assert_eq!((joined(rig.touch(10)), joined(rig.touch(11))), (0, 0));
    assert_eq!(rig.discards(), [10, 11, 20, 30]);
    let read: Vec<u64> = rig.bulk.posted().iter().flat_map(pages_of).collect();
    assert!(!read.contains(&10) && !read.contains(&11) && !read.contains(&20));
    rig.stop();
}

#[test]
fn a_zapped_page_is_shown_again_with_what_the_guest_last_wrote() {
    let Some(rig) = Rig::new(Options::default()) else { return };
    assert_eq!(joined(rig.touch(9)), content(9));
    rig.guest.write(9, 4711);
    rig.guest.advise(9, 1, libc::MADV_DONTNEED);
    assert_eq!(joined(rig.touch(9)), 4711);
    until(|| rig.engine().progress().shown_again == 1);
    assert_eq!(rig.discards(), [0; 0]);
    assert_eq!(rig.demand.posted().len(), 1, "the source is not read for it again");
    rig.stop();
}

#[test]
fn when_the_fabric_fails_the_guest_waits_and_a_new_server_finishes() {
    let Some(rig) = Rig::new(Options { demand_permits: 0, ..Options::default() }) else { return };
    let waiting = rig.touch(50);
    until(|| rig.demand.posted().len() == 1);
    rig.demand.fail();
    let told = rig.failed.recv_timeout(BOUND).unwrap();
    assert_eq!(told, "shard 0: the fabric failed");
    assert!(matches!(rig.engine().wait_all_landed(Deadline::after(BOUND)), Err(WaitError::Failed(_))));
    until(|| rig.state(50) == State::Failed);
    let later = rig.touch(51);
    until(|| rig.engine().progress().faults == 2);
    assert!(!waiting.is_finished() && !later.is_finished(), "a guest must wait, never read zeroes");
    assert_eq!(rig.state(51), State::Absent);
    let (guest, uffd, alias) = (rig.guest.clone(), rig.uffds[0].try_clone().unwrap(), rig.alias.clone().unwrap());
    let stats = rig.stop();
    assert!(stats.failure.is_some());
    assert!(!waiting.is_finished() && !later.is_finished());
    // Whoever holds the duplicate can finish.
    for page in [50, 51] {
        alias.write((page * 4096) as usize, &content(page).to_ne_bytes());
        let shown = uffd.continue_range(guest.address() + page * 4096, 4096, PageSize::Small, false).unwrap();
        assert!(shown.done());
    }
    assert_eq!((joined(waiting), joined(later)), (content(50), content(51)));
}

#[test]
fn a_read_that_never_completes_is_a_named_failure() {
    let options = Options { demand_permits: 0, timeout: Duration::from_millis(80), ..Options::default() };
    let Some(rig) = Rig::new(options) else { return };
    let waiting = rig.touch(50);
    let told = rig.failed.recv_timeout(BOUND).unwrap();
    assert!(told.contains("region 3 frame 50 has not completed within 80ms"), "{told}");
    assert!(!waiting.is_finished());
    let (guest, uffd) = (rig.guest.clone(), rig.uffds[0].try_clone().unwrap());
    rig.stop();
    assert!(uffd.continue_range(guest.address() + 50 * 4096, 4096, PageSize::Small, false).unwrap().done());
    joined(waiting);
}

#[test]
fn stopping_leaves_what_was_in_flight_absent_for_the_next_server() {
    let Some(rig) = Rig::new(Options { demand_permits: 0, ..Options::default() }) else { return };
    let waiting = rig.touch(8);
    until(|| rig.demand.posted().len() == 1);
    let (states, guest, uffd) = (rig.engine().states().clone(), rig.guest.clone(), rig.uffds[0].try_clone().unwrap());
    let stats = rig.stop();
    assert_eq!(stats.progress.in_flight, 0);
    assert_eq!(states.state_at(0, FrameIndex(8)), State::Absent);
    assert!(uffd.continue_range(guest.address() + 8 * 4096, 4096, PageSize::Small, false).unwrap().done());
    joined(waiting);
}

#[test]
fn huge_frames_are_pulled_in_parts_and_shown_whole() {
    let Some(_pages) = HugePages::reserve(12) else { return };
    let options = Options { pages: 6 * 512, page_size: PageSize::Huge, demand_permits: 1, ..Options::default() };
    let Some(rig) = Rig::new(options) else { return };
    let toucher = rig.touch(2 * 512 + 300);
    until(|| rig.demand.posted().len() == 2 && rig.engine().progress().in_flight == 1);
    assert_eq!(rig.demand.posted().iter().map(|read| read.len).collect::<Vec<_>>(), [1 << 20, 1 << 20]);
    assert!(!toucher.is_finished(), "half a frame is not a frame");
    rig.demand.allow(u64::MAX);
    assert_eq!(joined(toucher), content(2 * 512 + 300));
    rig.pull_all();
    for page in (0..6 * 512).step_by(100) {
        assert_eq!(joined(rig.touch(page)), content(page));
    }
    // A huge frame given up reads as zero, all of it.
    rig.file.as_ref().unwrap().punch(crate::region::Extent { offset: 2 << 20, len: 2 << 20 }).unwrap();
    assert_eq!(joined(rig.touch(512 + 77)), 0);
    assert_eq!(rig.discards(), (512..1024).collect::<Vec<_>>());
    rig.stop();
}

#[test]
fn tracked_pages_arrive_clean_and_only_what_the_guest_writes_is_written() {
    let features = Features::WP_ASYNC.union(Features::WP_SHMEM).union(Features::WP_UNPOPULATED);
    for memory in Memory::ALL {
        let options = Options { memory, install: Install::Tracked, features, ..Options::default() };
        let Some(rig) = Rig::new(options) else { return };
        assert_eq!(joined(rig.touch(7)), content(7));
        rig.pull_all();
        assert_eq!(written(&rig), [0; 0], "{memory:?}: pages arrive clean");
        rig.guest.write(7, 1);
        rig.guest.write(250, 1);
        assert_eq!(written(&rig), [7, 250]);
        if memory != Memory::Bounce {
            // Zapped after it was written: it must not come back as clean.
            rig.guest.advise(7, 1, libc::MADV_DONTNEED);
            assert_eq!(joined(rig.touch(7)), 1);
            assert_eq!(written(&rig), [7, 250]);
        }
        rig.stop();
    }
}

#[test]
fn protected_pages_are_protected_at_every_showing_and_a_write_is_told_each_time() {
    let features = Features::WP_SHMEM.union(Features::WP_UNPOPULATED);
    let options = Options { install: Install::Protected, features, ..Options::default() };
    let Some(rig) = Rig::new(options) else { return };
    let written = || std::mem::take(&mut *rig.told.written.lock().unwrap());
    let write = |page| {
        let guest = rig.guest.clone();
        joined(std::thread::spawn(move || guest.write(page, 1)));
    };
    assert_eq!(joined(rig.touch(7)), content(7));
    rig.pull_all();
    assert_eq!(written(), [0; 0], "nobody wrote");
    write(7);
    write(7);
    assert_eq!(written(), [7], "a page that was opened faults no more");
    // Zapped: it comes back as it was, protected, and whoever tracks is told that it may have been written.
    rig.guest.advise(7, 1, libc::MADV_DONTNEED);
    assert_eq!(joined(rig.touch(7)), 1);
    assert_eq!(*rig.told.shown_again.lock().unwrap(), [7]);
    write(7);
    assert_eq!(written(), [7]);
    // Given up: the zeroes that answer are protected too, and it was told of before there were any.
    assert_eq!(*rig.told.given_up.lock().unwrap(), [0; 0]);
    rig.punch(9);
    assert_eq!(joined(rig.touch(9)), 0);
    assert_eq!(*rig.told.given_up.lock().unwrap(), [9]);
    assert_eq!(rig.discards(), [9]);
    write(9);
    assert_eq!(written(), [9]);
    // Whoever reads it where the engine's reads land meets the hole too.
    rig.punch(11);
    let alias = rig.alias.clone().unwrap();
    assert_eq!(joined(std::thread::spawn(move || alias.load_u64(11 * 4096, Ordering::Acquire))), 0);
    assert_eq!(*rig.told.given_up.lock().unwrap(), [9, 11]);
    rig.stop();
}

/// Pages that are present and written, by PAGEMAP_SCAN (Documentation/admin-guide/mm/pagemap.rst).
fn written(rig: &Rig) -> Vec<u64> {
    use linux_raw_sys::general as raw;
    use std::os::fd::AsRawFd;
    let pagemap = std::fs::File::open("/proc/self/pagemap").unwrap();
    let start = rig.guest.address();
    let mut regions = [raw::page_region { start: 0, end: 0, categories: 0 }; 64];
    let mask = u64::from(raw::PAGE_IS_WRITTEN | raw::PAGE_IS_PRESENT);
    let mut scan = raw::pm_scan_arg {
        size: size_of::<raw::pm_scan_arg>() as u64,
        flags: 0,
        start,
        end: start + rig.pages * 4096,
        walk_end: 0,
        vec: regions.as_mut_ptr() as u64,
        vec_len: regions.len() as u64,
        max_pages: 0,
        category_inverted: 0,
        category_mask: mask,
        category_anyof_mask: 0,
        return_mask: mask,
    };
    // _IOWR('f', 16, struct pm_scan_arg)
    let request = 0xc000_6610_u64 | (size_of::<raw::pm_scan_arg>() as u64) << 16;
    // SAFETY: the kernel's own struct for this request; `vec` names `vec_len` writable entries.
    let count = unsafe { libc::ioctl(pagemap.as_raw_fd(), request, &raw mut scan) };
    assert!(count >= 0, "{}", std::io::Error::last_os_error());
    let pages = |region: &raw::page_region| (region.start - start) / 4096..(region.end - start) / 4096;
    regions[..count as usize].iter().flat_map(pages).collect()
}

#[test]
fn a_plan_on_memory_with_holes_is_refused() {
    use crate::fabric::{LocalKey, ReadKey};
    use crate::pages::RegionGeometry;
    use crate::region::RamFile;
    let file = RamFile::memfd("holes", 64 * 4096, PageSize::Small).unwrap();
    let alias = Arc::new(file.map().unwrap());
    file.preallocate_through(&alias, 1, &|_| ()).unwrap();
    file.punch(crate::region::Extent { offset: 9 * 4096, len: 4096 }).unwrap();
    let region = RegionPlan {
        id: REGION,
        page_size: PageSize::Small,
        vmm_address: 0x7000_0000,
        bytes: 64 * 4096,
        landing: LandingPlan::InPlace { alias, key: LocalKey(0), whole: file.is_whole().unwrap() },
        remote: ReadKey(0),
        classes: vec![ClassRun { class: PageClass::Peer, frames: 64 }],
    };
    let geometry = RegionGeometry { id: REGION, page_size: PageSize::Small, frames: 64 };
    let states = Arc::new(PageStates::in_memory(&[geometry]).unwrap());
    let plan = PullPlan {
        regions: vec![region],
        install: Install::Clean,
        tuning: Tuning::default(),
        start_paused: false,
        log: None,
    };
    let refused = Engine::start(plan, Vec::new(), states, Arc::new(NoObserver)).err().unwrap();
    assert!(matches!(refused, PlanError::NotAllocated { frame: 9, .. }), "{refused}");
}

#[test]
fn the_background_goes_on_by_itself_after_a_pause_with_an_end() {
    let Some(rig) = Rig::new(Options::default()) else { return };
    rig.engine().resume_background();
    rig.engine().pause_background_until(Deadline::after(Duration::from_millis(20)));
    rig.engine().wait_all_landed(Deadline::after(BOUND)).unwrap();
    rig.stop();
}
