//! With real memory: what was written is reported, once, and nothing written is missed.

use super::*;
use crate::testing::huge_pages::HugePages;
use belay_transport::PageSize;
use belay_transport::region::{Mapping, RamFile};
use belay_transport::uffd::{Faults, OpenMode, RegisterModes, Uffd};
use std::collections::BTreeSet;
use std::sync::atomic::Ordering;

const PAGES: u64 = 2048;
const PAGE: usize = 4096;
const ID: RegionId = RegionId(7);

/// Guest memory as a VMM has it: a mapping registered for write protection, and an alias.
struct Memory {
    guest: Arc<Mapping>,
    block: RamBlock,
    uffd: Uffd,
}

impl Memory {
    /// `None` where the kernel or the rights for it are missing.
    fn new(pages: u64, faults: Faults) -> Option<Self> {
        Self::of(pages as usize * PAGE, PageSize::Small, faults)
    }

    fn of(len: usize, page_size: PageSize, faults: Faults) -> Option<Self> {
        let asked = REQUIRED_FEATURES.union(Features::MINOR_SHMEM).union(Features::MISSING_SHMEM);
        let uffd = match Uffd::open(OpenMode::UserModeOnly, asked) {
            Ok(uffd) => uffd,
            Err(error) => {
                eprintln!("skipped: {error}");
                return None;
            }
        };
        let file = match RamFile::memfd("tracker-test", len, page_size) {
            Ok(file) => Arc::new(file),
            Err(error) if page_size == PageSize::Huge => {
                eprintln!("skipped: {error}");
                return None;
            }
            Err(error) => panic!("{error}"),
        };
        let guest = Arc::new(file.map().expect("map"));
        let alias = Arc::new(file.map().expect("map"));
        let modes = RegisterModes { faults, write_protect: true };
        uffd.register(guest.address(), len as u64, modes).expect("register");
        let vmm_address = guest.address();
        let block = RamBlock { id: ID, page_size, file, alias, vmm_address };
        Some(Self { guest, block, uffd })
    }

    fn write(&self, page: u64, byte: u8) {
        self.guest.write(page as usize * PAGE + 17, &[byte]);
    }

    fn zap(&self, page: u64, count: u64) {
        let start = (self.guest.address() as usize + page as usize * PAGE) as *mut std::ffi::c_void;
        let advice = rustix::mm::Advice::LinuxDontNeed;
        // SAFETY: the range lies in the mapping, and a shared mapping loses no bytes by this.
        unsafe { rustix::mm::madvise(start, count as usize * PAGE, advice) }.expect("madvise");
    }
}

fn harvest(tracker: &mut UffdWpTracker, pages: u64) -> BTreeSet<u64> {
    let mut set = DirtySet::new([(ID, pages)]);
    tracker.harvest(&mut set).expect("harvest");
    set.iter().map(|(_, page)| page.0).collect()
}

fn started(memory: &Memory) -> UffdWpTracker {
    let mut tracker = UffdWpTracker::new(WhoseMemory::Own, std::slice::from_ref(&memory.block)).expect("tracker");
    tracker.start().expect("start");
    tracker
}

#[test]
fn a_written_page_is_reported_once_and_again_only_if_written_again() {
    let Some(memory) = Memory::new(PAGES, Faults::None) else { return };
    (0..PAGES / 2).for_each(|page| memory.write(page, 1));
    let mut tracker = started(&memory);
    assert_eq!(
        harvest(&mut tracker, PAGES),
        BTreeSet::new(),
        "what was written before, and what was never mapped, is clean"
    );

    let written = BTreeSet::from([0, 1, 5, PAGES / 2 - 1, PAGES / 2, PAGES - 1]);
    written.iter().for_each(|&page| memory.write(page, 2));
    assert_eq!(harvest(&mut tracker, PAGES), written);
    assert_eq!(harvest(&mut tracker, PAGES), BTreeSet::new());
    memory.write(5, 3);
    assert_eq!(harvest(&mut tracker, PAGES), BTreeSet::from([5]));
}

#[test]
fn reading_does_not_make_a_page_dirty() {
    let Some(memory) = Memory::new(PAGES, Faults::None) else { return };
    memory.block.alias.write(9 * PAGE, &[9]);
    let mut tracker = started(&memory);
    for page in 0..32 {
        memory.guest.read(page * PAGE, &mut [0]);
    }
    assert_eq!(harvest(&mut tracker, PAGES), BTreeSet::new());
    memory.write(9, 1);
    assert_eq!(harvest(&mut tracker, PAGES), BTreeSet::from([9]));
}

#[test]
fn p3_a_write_is_not_missed_when_its_page_is_zapped_after_it() {
    let Some(memory) = Memory::new(PAGES, Faults::None) else { return };
    (0..64).for_each(|page| memory.write(page, 1));
    let mut tracker = started(&memory);
    memory.write(3, 2);
    memory.write(40, 2);
    // The page table forgets them; the file holds the newer bytes.
    memory.zap(0, 64);
    let found = harvest(&mut tracker, PAGES);
    assert!(found.is_superset(&BTreeSet::from([3, 40])), "{found:?}");
    assert_eq!(found, BTreeSet::from([3, 40]), "clean pages stay clean through a zap");
    // And zapped before: the write comes through a marker.
    memory.zap(0, 64);
    memory.write(41, 3);
    assert_eq!(harvest(&mut tracker, PAGES), BTreeSet::from([41]));
    assert_eq!(harvest(&mut tracker, PAGES), BTreeSet::new());
}

#[test]
fn p3_a_page_that_lands_clean_is_reported_once_it_is_written() {
    let Some(memory) = Memory::new(PAGES, Faults::MissingAndMinor) else { return };
    (0..8).for_each(|page| memory.block.alias.write(page * PAGE, &[page as u8]));
    let mut tracker = started(&memory);
    for page in 0..8 {
        let at = memory.guest.address() + page * PAGE as u64;
        let protect = page != 6;
        let installed = memory.uffd.continue_range(at, PAGE as u64, PageSize::Small, protect).expect("continue");
        assert!(installed.done(), "{installed:?}");
    }
    let landed = harvest(&mut tracker, PAGES);
    assert_eq!(landed, BTreeSet::from([6]), "only the page that was shown without protection counts as written");
    memory.write(2, 1);
    memory.write(6, 1);
    assert_eq!(harvest(&mut tracker, PAGES), BTreeSet::from([2, 6]));
}

#[test]
fn a_write_to_a_huge_page_reports_all_of_it() {
    let huge = PageSize::Huge.bytes();
    let Some(_reserved) = HugePages::reserve(4) else { return };
    let Some(memory) = Memory::of(4 * huge, PageSize::Huge, Faults::None) else { return };
    if let Err(error) = memory.block.file.preallocate(1, &|_| {}) {
        eprintln!("skipped: {error}");
        return;
    }
    let pages = (4 * huge / PAGE) as u64;
    (0..4).for_each(|frame| memory.write(frame * 512, 1));
    let mut tracker = started(&memory);
    assert_eq!(harvest(&mut tracker, pages), BTreeSet::new());
    memory.write(512 * 2 + 77, 2);
    assert_eq!(harvest(&mut tracker, pages), (1024..1536).collect());
    assert_eq!(harvest(&mut tracker, pages), BTreeSet::new());
}

/// What goes into a record after a harvest.
fn sifted(tracker: &mut UffdWpTracker, pages: u64, discards: &[u64]) -> BTreeSet<u64> {
    let (mut dirty, mut given_up) = (DirtySet::new([(ID, pages)]), DirtySet::new([(ID, pages)]));
    for &page in discards {
        given_up.insert(ID, PageIndex(page));
    }
    tracker.harvest(&mut dirty).expect("harvest");
    tracker.sift(&mut dirty, &given_up).expect("sift");
    dirty.iter().map(|(_, page)| page.0).collect()
}

#[test]
fn p3_of_a_huge_page_that_was_written_only_what_changed_is_sent_and_none_of_it_is_missed() {
    let huge = PageSize::Huge.bytes();
    let Some(_reserved) = HugePages::reserve(4) else { return };
    let Some(memory) = Memory::of(4 * huge, PageSize::Huge, Faults::None) else { return };
    if let Err(error) = memory.block.file.preallocate(1, &|_| {}) {
        eprintln!("skipped: {error}");
        return;
    }
    let pages = (4 * huge / PAGE) as u64;
    (0..4).for_each(|frame| memory.write(frame * 512, 1));
    let mut tracker = started(&memory);
    memory.write(1024 + 77, 2);
    assert_eq!(sifted(&mut tracker, pages, &[]), (1024..1536).collect(), "nothing was known of it");
    memory.write(1024 + 77, 3);
    memory.write(1024 + 300, 1);
    assert_eq!(sifted(&mut tracker, pages, &[]), BTreeSet::from([1024 + 77, 1024 + 300]));
    // Written, and the same as before.
    memory.write(1024 + 77, 3);
    assert_eq!(sifted(&mut tracker, pages, &[]), BTreeSet::new());
    // The record said that it reads as zero: what it held before is not what the other side has.
    assert_eq!(sifted(&mut tracker, pages, &[1024 + 77]), BTreeSet::new());
    memory.write(1024 + 77, 3);
    assert_eq!(sifted(&mut tracker, pages, &[]), BTreeSet::from([1024 + 77]));
    tracker.start().expect("start");
    memory.write(1024 + 77, 3);
    assert_eq!(sifted(&mut tracker, pages, &[]), (1024..1536).collect(), "a tracker that starts anew knows nothing");
}

#[test]
fn p3_writes_of_all_threads_are_seen() {
    let Some(memory) = Memory::new(PAGES, Faults::None) else { return };
    let mut tracker = started(&memory);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let memory = &memory;
            scope.spawn(move || (0..50).for_each(|n| memory.write((n * 4 + thread) * 7 % PAGES, 1)));
        }
    });
    let written = (0..200).map(|n| n * 7 % PAGES).collect::<BTreeSet<_>>();
    assert_eq!(harvest(&mut tracker, PAGES), written);
}

#[test]
fn more_runs_than_a_buffer_holds_and_several_threads_miss_nothing() {
    let pages = 20_000;
    for threads in [0, 1, 3] {
        let Some(memory) = Memory::new(pages, Faults::None) else { return };
        let mut tracker = started(&memory);
        tracker.scanners = Scanners::for_test(Arc::clone(&tracker.pagemap), threads);
        let written: BTreeSet<u64> = (0..pages).filter(|page| page % 2 == 1).collect();
        written.iter().for_each(|&page| memory.write(page, 1));
        assert_eq!(harvest(&mut tracker, pages), written, "with {threads} threads");
        assert_eq!(harvest(&mut tracker, pages), BTreeSet::new(), "with {threads} threads");
    }
}

/// As after a harvest of many pages.
fn prepare(tracker: &mut UffdWpTracker) {
    (tracker.expected, tracker.back_off.least_pages, tracker.back_off.skip) = (u64::MAX, 1, 0);
    tracker.prepare().expect("prepare");
}

#[test]
fn what_is_protected_ahead_is_in_the_next_harvest_once_and_so_is_what_is_written_after_it() {
    for threads in [0, 3] {
        let Some(memory) = Memory::new(PAGES, Faults::None) else { return };
        let mut tracker = started(&memory);
        tracker.scanners = Scanners::for_test(Arc::clone(&tracker.pagemap), threads);
        let written: BTreeSet<u64> = (0..600).map(|page| page * 3).collect();
        written.iter().for_each(|&page| memory.write(page, 1));
        prepare(&mut tracker);
        assert_eq!(tracker.ahead.len(), 600);
        memory.write(9, 2);
        memory.write(10, 2);
        let all: BTreeSet<u64> = written.iter().copied().chain([10]).collect();
        assert_eq!(harvest(&mut tracker, PAGES), all);
        assert_eq!(harvest(&mut tracker, PAGES), BTreeSet::new());
        // What was ready when tracking began anew is nobody's.
        memory.write(5, 3);
        prepare(&mut tracker);
        tracker.start().expect("start");
        assert_eq!(harvest(&mut tracker, PAGES), BTreeSet::new());
    }
}

#[test]
fn p3_no_write_made_while_pages_are_protected_ahead_is_missed() {
    let Some(memory) = Memory::new(PAGES, Faults::None) else { return };
    let mut tracker = started(&memory);
    let read = |page: u64| memory.guest.load_u64(page as usize * PAGE, Ordering::Relaxed);
    let mut image: Vec<u64> = (0..PAGES).map(read).collect();
    for round in 1..=30_u64 {
        std::thread::scope(|scope| {
            let writing = scope.spawn(|| {
                for step in 0..400 {
                    let page = (step * step * 7 + round * 13) % PAGES;
                    memory.guest.store_u64(page as usize * PAGE, round << 32 | step, Ordering::Relaxed);
                }
            });
            while !writing.is_finished() {
                prepare(&mut tracker);
            }
        });
        for page in harvest(&mut tracker, PAGES) {
            image[page as usize] = read(page);
        }
        assert!(image.iter().copied().eq((0..PAGES).map(read)), "round {round}");
    }
}

#[test]
fn a_harvest_is_made_ready_where_many_pages_are_expected_and_few_are_soon_expected() {
    let Some(memory) = Memory::new(PAGES, Faults::None) else { return };
    let mut tracker = started(&memory);
    for round in 0..3_u8 {
        (0..PAGES).for_each(|page| memory.write(page, round));
        tracker.prepare().expect("prepare");
        assert_eq!(!tracker.ahead.is_empty(), round > 0, "the first time nothing says that there will be many");
        harvest(&mut tracker, PAGES);
    }
    for _ in 0..10 {
        memory.write(1, 1);
        harvest(&mut tracker, PAGES);
    }
    (0..PAGES).for_each(|page| memory.write(page, 9));
    tracker.prepare().expect("prepare");
    assert_eq!(tracker.ahead.len(), 0);
}

#[test]
fn a_range_that_is_not_registered_is_refused_with_the_reason() {
    let Some(memory) = Memory::new(16, Faults::None) else { return };
    memory.uffd.unregister(memory.guest.address(), 16 * PAGE as u64).expect("unregister");
    let refused = UffdWpTracker::new(WhoseMemory::Own, std::slice::from_ref(&memory.block)).map(drop);
    let Err(GuestError::NoTracker { reason, .. }) = refused else { panic!("{refused:?}") };
    assert!(reason.contains("WP_ASYNC") && reason.contains("region 7"), "{reason}");
}

#[test]
fn p3_a_range_that_stops_being_registered_is_an_error_and_not_a_clean_page() {
    let Some(memory) = Memory::new(64, Faults::None) else { return };
    let mut tracker = started(&memory);
    memory.uffd.unregister(memory.guest.address() + 32 * PAGE as u64, 32 * PAGE as u64).expect("unregister");
    memory.write(40, 1);
    let mut set = DirtySet::new([(ID, 64)]);
    assert!(tracker.harvest(&mut set).is_err());
    assert!(tracker.harvest(&mut set).is_err(), "and it stays one until tracking starts anew");
}

/// Set in the process that plays the VMM, which is this test binary run again.
const CHILD: &str = "BELAY_TEST_TRACKED_CHILD";

/// The VMM's process: tells where its memory is, then writes the page whose number each line holds and answers with the line.
#[test]
fn tracked_child() {
    use std::io::BufRead;
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let Some(memory) = Memory::new(PAGES, Faults::None) else { return };
    println!("\nat {}", memory.guest.address());
    for line in std::io::stdin().lock().lines() {
        let page = line.expect("stdin").parse().expect("a page");
        memory.write(page, 1);
        memory.zap(page, page % 2);
        println!("\ndid {page}");
    }
}

struct Child(std::process::Child);

impl Drop for Child {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn p3_writes_of_another_process_are_seen_and_its_death_is_not_taken_for_silence() {
    use std::io::{BufRead, BufReader, Write};
    use std::process::{Command, Stdio};
    let Some(stand_in) = Memory::new(PAGES, Faults::None) else { return };
    let exe = std::env::current_exe().expect("test binary");
    let mut command = Command::new(exe);
    command.args(["--exact", "tracker::uffd_wp::tests::tracked_child", "--nocapture"]).env(CHILD, "1");
    let mut child = Child(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("spawn"));
    let mut lines = BufReader::new(child.0.stdout.take().expect("piped")).lines().map(|line| line.expect("stdout"));
    let mut input = child.0.stdin.take().expect("piped");
    let at =
        lines.find_map(|line| line.strip_prefix("at ").map(|at| at.parse().expect("an address"))).expect("started");

    let pid = Pid::from_child(&child.0);
    let block = RamBlock { vmm_address: at, ..stand_in.block.clone() };
    let mut tracker = UffdWpTracker::new(WhoseMemory::Process(pid), &[block]).expect("tracker");
    tracker.start().expect("start");
    let mut order = |page: u64| {
        writeln!(input, "{page}").expect("stdin");
        assert!(lines.any(|line| line == format!("did {page}")), "the child ended");
    };
    [4, 7, 300].into_iter().for_each(&mut order);
    assert_eq!(harvest(&mut tracker, PAGES), BTreeSet::from([4, 7, 300]));
    assert_eq!(harvest(&mut tracker, PAGES), BTreeSet::new());
    order(7);
    assert_eq!(harvest(&mut tracker, PAGES), BTreeSet::from([7]));

    drop(child);
    let mut set = DirtySet::new([(ID, PAGES)]);
    let error = tracker.harvest(&mut set).expect_err("a dead process has no clean pages");
    assert!(matches!(error, GuestError::VmmGone(_)), "{error:?}");
}
