//! What the engine promises with lanes that behave as a NIC's do: they wake only who has armed them, and they write to the frames that
//! were pinned, whatever has become of the file since.

use super::lane::Control;
use super::rig::*;
use super::*;
use std::collections::HashSet;
use std::sync::Mutex;

#[test]
fn a_lane_is_armed_before_the_engine_sleeps_on_it() {
    let Some(rig) = Rig::new(Options { demand_permits: 0, ..Options::default() }) else { return };
    rig.demand.must_arm(0);
    for page in 0..20 {
        let waiting = rig.touch(page);
        // Whoever sleeps without having armed is never woken, and this never comes to hold.
        until(|| rig.demand.posted().len() as u64 == page + 1 && rig.demand.is_armed());
        rig.demand.allow(1);
        assert_eq!(joined(waiting), content(page));
    }
    assert_eq!(rig.demand.found_arming(), 0);
    rig.stop();
}

#[test]
fn what_completes_while_the_lane_is_being_armed_is_not_slept_through() {
    const READS: u64 = 30;
    let Some(rig) = Rig::new(Options { demand_permits: 0, ..Options::default() }) else { return };
    let begun = Instant::now();
    for page in 0..READS {
        // The completion comes after the engine's last poll and before it sleeps, and nothing else will wake it.
        rig.demand.must_arm(1);
        assert_eq!(joined(rig.touch(page)), content(page));
    }
    assert_eq!(rig.demand.found_arming(), READS);
    // An engine that slept all the same is woken by its longest sleep, 100 ms, each time.
    let slept_through = Duration::from_millis(100) * READS as u32;
    assert!(begun.elapsed() < slept_through / 2, "{READS} reads took {:?}", begun.elapsed());
    rig.stop();
}

#[test]
fn both_lanes_are_armed_when_both_have_something_outstanding() {
    let Some(rig) = Rig::new(Options { demand_permits: 0, ..Options::default() }) else { return };
    rig.bulk.allow(0);
    let waiting = rig.touch(3);
    until(|| rig.demand.posted().len() == 1);
    rig.engine().resume_background();
    until(|| !rig.bulk.posted().is_empty());
    for lane in [&rig.demand, &rig.bulk] {
        lane.must_arm(0);
        until(|| lane.is_armed());
    }
    rig.bulk.allow(u64::MAX);
    until(|| rig.engine().progress().in_flight == 1);
    rig.demand.allow(u64::MAX);
    assert_eq!(joined(waiting), content(3));
    rig.engine().wait_all_landed(Deadline::after(BOUND)).unwrap();
    rig.stop();
}

/// A rig whose READs land in pinned frames, and which frames are still the file's.
struct Pinned {
    rig: Rig,
    orphans: Arc<Mutex<HashSet<u64>>>,
}

impl Pinned {
    fn new(options: Options) -> Option<Self> {
        let rig = Rig::new(options)?;
        let orphans = Arc::new(Mutex::new(HashSet::new()));
        let pin = |control: &Control| {
            let orphans = Arc::clone(&orphans);
            control.pin(Box::new(move |page| !orphans.lock().unwrap().contains(&page)));
        };
        pin(&rig.demand);
        pin(&rig.bulk);
        Some(Self { rig, orphans })
    }

    /// The frame leaves the file and stays the NIC's, for good.
    fn punch(&self, page: u64) {
        self.orphans.lock().unwrap().insert(page);
        self.rig.punch(page);
    }
}

#[test]
fn a_read_into_an_orphaned_frame_is_a_discard_and_shows_nothing_stale() {
    for install in [Install::Clean, Install::Tracked, Install::Protected] {
        // CONTINUE write-protects from the same kernel on (6.4) that can protect what was never populated.
        let tracked = Features::WP_SHMEM.union(Features::WP_UNPOPULATED);
        let features = if install == Install::Clean { Features::NONE } else { tracked };
        let options = Options { demand_permits: 0, install, features, ..Options::default() };
        let Some(pinned) = Pinned::new(options) else { return };
        let rig = &pinned.rig;
        // Before anything was read for it; in the middle of what the background reads in one go.
        pinned.punch(1);
        // While its READ is in flight.
        let during = rig.touch(2);
        until(|| rig.demand.posted().len() == 1);
        pinned.punch(2);
        // While it is in flight, and another guest thread meets the hole.
        let third = rig.touch(3);
        until(|| rig.demand.posted().len() == 2);
        pinned.punch(3);
        let fourth = rig.touch(3);
        until(|| rig.engine().progress().faults >= 3);
        rig.demand.allow(u64::MAX);
        assert_eq!(joined(during), 0, "the READ succeeded, its bytes are in a frame that nobody has");
        assert_eq!((joined(third), joined(fourth)), (0, 0));
        // Given up and filled anew by the guest before the READ of its neighbours comes by.
        pinned.punch(10);
        let guest = rig.guest.clone();
        joined(std::thread::spawn(move || guest.write(10, 4711)));
        rig.pull_all();
        assert_eq!(joined(rig.touch(1)), 0);
        assert_eq!(joined(rig.touch(10)), 4711, "what the guest wrote after the discard stays");
        // After it has landed, and again after it was written.
        assert_eq!(joined(rig.touch(4)), content(4));
        pinned.punch(4);
        assert_eq!(joined(rig.touch(4)), 0);
        assert_eq!(rig.discards(), [1, 2, 3, 4, 10]);
        for page in [0, 5, 9, 11, 255] {
            assert_eq!(joined(rig.touch(page)), content(page));
        }
        pinned.rig.stop();
    }
}

#[test]
fn an_orphaned_huge_frame_reads_as_zero_all_of_it() {
    let Some(_pages) = HugePages::reserve(8) else { return };
    let options = Options { pages: 4 * 512, page_size: PageSize::Huge, demand_permits: 1, ..Options::default() };
    let Some(pinned) = Pinned::new(options) else { return };
    let rig = &pinned.rig;
    // Half of the frame has been read when it is given up.
    let waiting = rig.touch(512 + 300);
    until(|| rig.demand.posted().len() == 2);
    pinned.orphans.lock().unwrap().extend(512..1024);
    rig.file.as_ref().unwrap().punch(crate::region::Extent { offset: 2 << 20, len: 2 << 20 }).unwrap();
    rig.demand.allow(u64::MAX);
    assert_eq!(joined(waiting), 0);
    rig.pull_all();
    for page in (512..1024).step_by(61) {
        assert_eq!(joined(rig.touch(page)), 0);
    }
    assert_eq!(joined(rig.touch(100)), content(100));
    assert_eq!(rig.discards(), (512..1024).collect::<Vec<_>>());
    pinned.rig.stop();
}

/// A guest that reads, writes and gives up pages as it likes while they are pulled.
#[test]
fn a_guest_that_gives_pages_up_at_any_moment_sees_what_it_wrote_last_or_zeroes() {
    const PAGES: u64 = 96;
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = move |below: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % below
    };
    for _ in 0..40 {
        let options = Options { pages: PAGES, paused: false, ..Options::default() };
        let Some(pinned) = Pinned::new(options) else { return };
        let steps: Vec<(u64, u64)> = (0..200).map(|_| (next(3), next(PAGES))).collect();
        let pinned = std::thread::spawn(move || {
            let mut model: Vec<u64> = (0..PAGES).map(content).collect();
            for (count, (what, page)) in steps.into_iter().enumerate() {
                let expected = &mut model[page as usize];
                match what {
                    0 => assert_eq!(pinned.rig.guest.word(page), *expected, "page {page} at step {count}"),
                    1 => {
                        *expected = count as u64;
                        pinned.rig.guest.write(page, *expected);
                    }
                    _ => {
                        *expected = 0;
                        pinned.punch(page);
                    }
                }
            }
            pinned.rig.engine().wait_all_landed(Deadline::after(BOUND)).unwrap();
            for page in 0..PAGES {
                assert_eq!(pinned.rig.guest.word(page), model[page as usize], "page {page} at the end");
            }
            pinned
        });
        let pinned = joined(pinned);
        let discards: HashSet<u64> = pinned.rig.discards().into_iter().collect();
        assert!(pinned.orphans.lock().unwrap().is_subset(&discards), "no discard is left out of a checkpoint");
        pinned.rig.stop();
    }
}
