//! The directory that a source's memory lies in (`--memory-dir`): too small, filled by somebody else at any moment, or of huge pages. Each ends
//! in a named state, with an error that says how much room is missing, and nothing that was promised is lost.

#[path = "running/mounted.rs"]
mod mounted;
mod running;
#[path = "../../transport/src/testing.rs"]
mod testing;

use mounted::Mounted;
use running::{BOUND, Place, Process, has_kvm};
use serde_json::Value;
use std::fs::File;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
/// What a source of [`GUEST`] keeps: guest RAM, ring, overflow memory, state, and some pages.
const NEEDED: u64 = (32 + 4 + 65 + 81) * MIB;
/// A lease that outlasts whatever a busy host does while the source stands still.
const GUEST: [&str; 10] =
    ["--memory", "32M", "--drive", "kvm", "--run-before", "10ms", "--ring", "4M", "--lease", "20s"];
const SHORT: [&str; 3] = ["--check", "--run-on", "50ms"];

/// Each of these runs takes 200 MiB and more threads than most hosts have cores: one at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn turn() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A destination, and a source whose memory lies in `memory`.
struct Roles {
    place: Place,
    memory: Mounted,
    destination: Process,
    source: Process,
}

impl Roles {
    fn start(place: Place, memory: Mounted, receive: &[&str], send: &[&str]) -> Self {
        let state = place.text("destination");
        let first = ["receive", "--json", "--listen", "127.0.0.1:0", "--drive", "kvm", "--state-dir", &state];
        let mut destination = place.belay(&[&first[..], receive].concat());
        let to = destination.wait_for_event("listening")["address"].as_str().unwrap().to_owned();
        let state = place.text("source");
        let first = ["send", "--json", "--to", &to, "--state-dir", &state, "--memory-dir", &memory.directory];
        let source = memory.belay(&place, &[&first[..], &GUEST, send].concat());
        Self { place, memory, destination, source }
    }

    /// On a tmpfs with room for the source and little more; it stands still at `point`. One that never comes there, because a busy host
    /// took longer over the switch than its bound and it was taken back, is made again.
    fn frozen_at(point: &str, receive: &[&str], send: &[&str]) -> Option<Self> {
        for _ in 0..4 {
            let place = Place::new();
            let memory = Mounted::new(&place, "tmpfs", &format!("size={},mode=0700", NEEDED + 8 * MIB))?;
            let mut roles = Self::start(place, memory, receive, &[&["--stop-at", point], send].concat());
            if roles.await_stop(point) {
                return Some(roles);
            }
        }
        panic!("no run came to {point}: each switch was taken back");
    }

    /// Waits until the source stands still; whether it does, and has not taken its switch back.
    fn await_stop(&mut self, point: &str) -> bool {
        let end = Instant::now() + BOUND;
        let stat = format!("/proc/{}/stat", self.source.pid());
        while !std::fs::read_to_string(&stat).is_ok_and(|stat| stat.contains(") T ")) {
            self.source.hear();
            if self.source.was("switch-taken-back") {
                return false;
            }
            assert!(Instant::now() < end, "it does not come to {point}: {}", self.story());
            std::thread::sleep(Duration::from_millis(2));
        }
        true
    }

    fn thaw(&self) {
        self.source.signal(libc::SIGCONT);
    }

    fn take_over(&self, options: &[&str]) -> Process {
        let state = self.place.text("source");
        let first = ["send", "--json", "--takeover", "--state-dir", &state];
        self.memory.belay(&self.place, &[&first[..], &SHORT, options].concat())
    }

    fn story(&self) -> String {
        format!("source:\n{}\ndestination:\n{}", self.source.story(), self.destination.story())
    }

    /// The source has ended with `code` and has looked at every page of its guest.
    fn expect_at_the_source(&mut self, code: i32) {
        assert_eq!(self.source.end(), code, "{}", self.story());
        self.source.expect_whole();
        self.expect_nothing_left();
    }

    fn expect_released(&mut self) {
        assert_eq!((self.source.end(), self.destination.end()), (0, 0), "{}", self.story());
        self.destination.expect_whole();
        self.expect_nothing_left();
    }

    fn expect_nothing_left(&mut self) {
        let migrations = self.place.path("source").join("migrations");
        let journals = std::fs::read_dir(migrations).map_or(0, |entries| entries.count());
        assert_eq!((self.memory.left(), journals), (vec![], 0), "{}", self.story());
        self.destination.signal(libc::SIGTERM);
        self.destination.end();
        self.place.expect_nothing_left();
    }
}

/// What the last failure was and what to do about it.
fn failure(process: &Process) -> (String, String) {
    let failed = process.events("failed").last().cloned().unwrap_or_default();
    let text = |field: &str| failed[field].as_str().unwrap_or_else(|| panic!("{}", process.story())).to_owned();
    (text("what"), text("advice"))
}

/// A source that must be refused before it starts anything: nobody listens where it would go.
fn refused(place: &Place, memory: &Mounted, options: &[&str]) -> (String, String) {
    let state = place.text("source");
    let first = ["send", "--json", "--to", "127.0.0.1:1", "--state-dir", &state, "--memory-dir", &memory.directory];
    let mut source = memory.belay(place, &[&first[..], &["--memory", "32M", "--ring", "4M"], options].concat());
    assert_eq!(source.end(), 3, "{}", source.story());
    assert_eq!(source.events("guest-started").count(), 0, "{}", source.story());
    assert_eq!(memory.left(), Vec::<PathBuf>::new());
    assert!(std::fs::read_dir(place.path("source").join("migrations")).map_or(0, |entries| entries.count()) == 0);
    failure(&source)
}

macro_rules! needs_kvm {
    ($what:literal) => {
        if !has_kvm() {
            eprintln!("skipped: {} needs /dev/kvm", $what);
            return;
        }
    };
}

#[test]
fn a_memory_directory_that_is_too_small_is_refused_with_numbers_before_anything_is_started() {
    let place = Place::new();
    for bytes in [64 << 10, 40 * MIB, 90 * MIB, 120 * MIB, NEEDED - 2 * MIB] {
        let Some(memory) = Mounted::new(&place, "tmpfs", &format!("size={bytes},mode=0700")) else { return };
        let (what, advice) = refused(&place, &memory, &[]);
        assert!(what.contains(&memory.directory) && what.contains("needs") && what.contains("are free"), "{what}");
        assert!(advice.contains("--memory-dir") && advice.contains("--overflow"), "{advice}");
    }
    place.expect_nothing_left();
}

#[test]
fn a_guest_that_cannot_be_is_refused_with_the_reason_before_anything_is_started() {
    let place = Place::new();
    let state = place.text("state");
    for (guest, reason) in [
        (&["--memory", "3K"][..], "guest memory of 3072 bytes is not a multiple of 4096"),
        (&["--memory", "0"], "guest memory of 0 bytes"),
        (&["--memory", "1M", "--working-set", "4M"], "between 2097152 and"),
        (&["--memory", "8M", "--working-set", "8M"], "a working set of 8388608 bytes"),
        (&["--memory", "3M", "--working-set", "1M", "--page-size", "2M"], "3145728 bytes is no whole number of 2 MiB"),
    ] {
        let send = ["send", "--json", "--to", "127.0.0.1:1", "--drive", "threads", "--state-dir", &state];
        let mut refused = place.belay(&[&send[..], guest].concat());
        assert_eq!(refused.end(), 2, "{}", refused.story());
        let failed = refused.events("failed").last().unwrap().clone();
        assert!(failed["what"].as_str().unwrap().contains(reason), "{failed}");
        assert!(failed["advice"].as_str().unwrap().starts_with("Nothing was started"), "{failed}");
    }
    assert!(!place.path("state").join("migrations").exists(), "nothing is left of what was refused");
    place.expect_nothing_left();
}

#[test]
fn memory_of_another_page_size_is_refused_before_anything_is_started() {
    let place = Place::new();
    // None of these pages is there to be had: what is wrong is said first.
    let Some(huge) = Mounted::new(&place, "hugetlbfs", "pagesize=2M") else { return };
    let (what, advice) = refused(&place, &huge, &[]);
    assert!(what.contains("2 MiB pages and 4 KiB pages were asked for"), "{what}");
    assert!(advice.contains("--page-size"), "{advice}");
    let Some(small) = Mounted::new(&place, "tmpfs", "size=1m") else { return };
    let (what, advice) = refused(&place, &small, &["--page-size", "2M"]);
    assert!(what.contains("4 KiB pages and 2 MiB pages were asked for"), "{what}");
    assert!(advice.contains("--page-size"), "{advice}");
    if !std::path::Path::new("/sys/kernel/mm/hugepages/hugepages-1048576kB").exists() {
        return;
    }
    let Some(gigantic) = Mounted::new(&place, "hugetlbfs", "pagesize=1G") else { return };
    let (what, _) = refused(&place, &gigantic, &["--page-size", "2M"]);
    assert!(what.contains("pages of 1073741824 bytes"), "{what}");
    place.expect_nothing_left();
}

#[test]
fn huge_pages_that_are_too_few_are_counted_before_anything_is_started() {
    let place = Place::new();
    let Some(_pages) = testing::HugePages::reserve(60) else { return };
    let Some(memory) = Mounted::new(&place, "hugetlbfs", "pagesize=2M,size=100m") else { return };
    let (what, _) = refused(&place, &memory, &["--page-size", "2M"]);
    assert!(what.contains("are free"), "{what}");
    place.expect_nothing_left();
}

mod kvm {
    use super::*;

    #[test]
    fn a_memory_directory_that_fills_before_the_destination_is_prepared_leaves_the_guest_where_it_is() {
        needs_kvm!("a full memory directory");
        let _turn = turn();
        let Some(mut roles) = Roles::frozen_at("source-connected", &[], &SHORT) else { return };
        roles.memory.fill();
        roles.thaw();
        let failed = roles.source.wait_for_event("failed");
        assert!(failed["what"].as_str().unwrap().contains("/ring-"), "{failed}");
        assert!(failed["advice"].as_str().unwrap().contains("--memory-dir"), "{failed}");
        roles.expect_at_the_source(5);
    }

    #[test]
    fn room_that_a_guest_gave_back_and_somebody_else_took_is_missed_before_it_leaves() {
        needs_kvm!("a full memory directory");
        let _turn = turn();
        for point in ["source-connected", "switch-paused"] {
            let Some(mut roles) = Roles::frozen_at(point, &[], &[]) else { return };
            let folder = roles.memory.left().pop().expect("the memory of the migration");
            let ram = File::options().write(true).open(folder.join("ram-0")).unwrap();
            let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&ram, punch, 8 * MIB, 4 * MIB).unwrap();
            // Room for all but what was given back, where the rest is not made yet.
            let later = File::create(roles.memory.path("later")).unwrap();
            if point == "source-connected" {
                rustix::fs::fallocate(&later, rustix::fs::FallocateFlags::empty(), 0, (65 + 4 + 1) * MIB).unwrap();
            }
            roles.memory.fill();
            std::fs::remove_file(roles.memory.path("later")).unwrap();
            drop(later);
            roles.thaw();
            let failed = roles.source.wait_for_event("failed");
            let what = failed["what"].as_str().unwrap();
            assert!(what.contains("needs") && what.contains("are free"), "{point}: {what}");
            // What the switch had begun is taken back, and the guest goes on here until it is told to end.
            roles.source.signal(libc::SIGTERM);
            assert_eq!(roles.source.end(), 5, "{point}: {}", roles.story());
            assert!(!roles.source.was("serving"), "{point}: {}", roles.story());
            roles.expect_nothing_left();
        }
    }

    /// From the moment the destination is prepared all that is needed is reserved.
    #[test]
    fn a_memory_directory_that_fills_in_any_later_phase_costs_the_migration_nothing() {
        needs_kvm!("a full memory directory");
        let _turn = turn();
        for point in ["source-prepared", "switch-paused", "go-due", "fold-begun", "fold-mid:2", "release-due"] {
            let Some(mut roles) = Roles::frozen_at(point, &SHORT, &["--release", "300ms"]) else { return };
            roles.memory.fill();
            roles.thaw();
            roles.expect_released();
        }
    }

    const HELD: [&str; 2] = ["--hold-pull-at", "30"];

    #[test]
    fn p3_a_guest_is_caught_whole_while_the_memory_directory_is_full() {
        needs_kvm!("a full memory directory");
        let _turn = turn();
        for point in ["switch-told", "go-told", "fold-begun", "fold-mid:3"] {
            let Some(mut roles) = Roles::frozen_at(point, &HELD, &SHORT) else { return };
            roles.memory.fill();
            roles.thaw();
            let mut commits = 0;
            roles.destination.wait_for("checkpoints after there was no room", |event| {
                commits += u64::from(event["event"] == "committed");
                commits > 5
            });
            roles.destination.crash();
            let newest = epoch(roles.destination.events("committed").last().unwrap());
            roles.expect_at_the_source(10);
            let caught = epoch(roles.source.events("caught").last().unwrap());
            assert!(caught >= newest, "{caught} was caught, the destination was told of {newest}");
        }
    }

    fn epoch(event: &Value) -> u64 {
        event["epoch"].as_u64().unwrap_or_else(|| panic!("{event}"))
    }

    #[test]
    fn a_source_that_died_beside_a_full_memory_directory_is_taken_over_and_the_guest_comes_back() {
        needs_kvm!("a full memory directory");
        let _turn = turn();
        // A destination that is still there finds the source without room for another ring: then too the guest comes back.
        for (point, there) in [("go-told", false), ("fold-mid:3", false), ("fold-begun:2", true)] {
            let Some(mut roles) = Roles::frozen_at(point, &HELD, &[]) else { return };
            roles.memory.fill();
            roles.source.crash();
            if !there {
                roles.destination.crash();
            }
            let grace = if there { "20s" } else { "300ms" };
            roles.source = roles.take_over(&["--takeover-grace", grace]);
            roles.expect_at_the_source(10);
            let noticed = roles.source.events("noticed").last().cloned().unwrap_or_default();
            let missing = noticed["by"].as_str().is_some_and(|by| by.contains("/ring-") && by.contains("needs"));
            assert_eq!(missing, there, "{noticed}");
        }
    }

    #[test]
    fn a_source_on_huge_pages_that_dies_in_mid_pull_is_taken_over_and_the_guest_goes_on() {
        needs_kvm!("a takeover on huge pages");
        let _turn = turn();
        // The source's files, a second ring, and guest RAM at the destination.
        let Some(_pages) = testing::HugePages::reserve(136) else { return };
        let place = Place::new();
        let Some(memory) = Mounted::new(&place, "hugetlbfs", "pagesize=2M") else { return };
        let mut roles = Roles::start(place, memory, &HELD, &["--page-size", "2M"]);
        let mut commits = 0;
        roles.destination.wait_for("a pull under way with three checkpoints", |event| {
            commits += u64::from(event["event"] == "committed");
            let frames = |name: &str| event[name].as_u64().unwrap_or(0);
            commits >= 3 && frames("landed_frames") > 0 && frames("absent_frames") > 0
        });
        roles.source.crash();
        roles.source = roles.take_over(&["--takeover-grace", "20s"]);
        let committed = roles.source.wait_for_event("tethered-again")["committed"].as_u64();
        roles.destination.wait_for("a checkpoint over the new session", |event| event["epoch"].as_u64() > committed);
        roles.destination.crash();
        let newest = epoch(roles.destination.events("committed").last().unwrap());
        roles.expect_at_the_source(10);
        assert!(epoch(roles.source.events("caught").last().unwrap()) >= newest);
    }
}
