//! Pages that are punched out of the file or zapped from the page table while they come: before, during and after they land, written
//! again or not. A reader never gets an old byte (P1), and a catch gives exactly what the destination had (P3).
//!
//! What is given up lies outside the guest's working set, so the guest runs on undisturbed; the test reads and writes it through the
//! mapping that the vCPUs use, and faults as they do.

mod common;

use belay_checkpoint::guest::TrackerKind;
use belay_checkpoint::staging::Staging;
use belay_transport::region::{Extent, Mapping};
use belay_transport::session::{Address, Listener, Security, SessionConfig};
use belay_transport::{Deadline, PAGE_SIZE};
use belay_vmm_glue::kvm::guests::{Filler, GuestSpec};
use belay_vmm_glue::migrate::destination;
use belay_vmm_glue::migrate::observation::{Kind, Observer};
use belay_vmm_glue::migrate::operator::Words;
use belay_vmm_glue::migrate::settings::ReleasePolicy;
use belay_vmm_glue::migrate::source::Outcome;
use common::no_kvm;
use common::roles::{Seen, TestHost, be_a_guard_if_asked, destination_config, move_away, running_guest, source_config};
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

#[test]
fn the_guard_of_the_other_tests() {
    be_a_guard_if_asked();
}

/// How a page is given up, and what is done with it then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Give {
    /// Out of the file: it reads as zeroes from then on.
    Punch,
    PunchAndRefill,
    /// Out of the page table: what it held stays.
    Zap,
    RefillAndZap,
    /// Both, as a balloon does.
    PunchAndZap,
}

const WAYS: [Give; 5] = [Give::Punch, Give::PunchAndRefill, Give::Zap, Give::RefillAndZap, Give::PunchAndZap];

fn bound() -> Deadline {
    Deadline::after(Duration::from_secs(30))
}

fn page_of(memory: &Mapping, page: u64) -> Vec<u8> {
    let mut bytes = vec![0; PAGE_SIZE];
    memory.read(page as usize * PAGE_SIZE, &mut bytes);
    bytes
}

/// Whether the VMM has it in its page table, which is when it has landed (/proc/PID/pagemap, bit 63: Documentation/admin-guide/mm/pagemap.rst).
fn is_mapped(seen: &Seen, page: u64) -> bool {
    let table = File::open("/proc/self/pagemap").expect("pagemap");
    let mut entry = [0; 8];
    table.read_exact_at(&mut entry, (seen.vmm.as_ptr() as u64 / PAGE_SIZE as u64 + page) * 8).expect("an entry");
    u64::from_le_bytes(entry) >> 63 == 1
}

fn zap(seen: &Seen, page: u64) {
    let at = seen.vmm.as_ptr().wrapping_add(page as usize * PAGE_SIZE);
    // SAFETY: a page of a shared file mapping of this process: its bytes are the file's, and nobody holds a reference into it.
    unsafe { rustix::mm::madvise(at.cast(), PAGE_SIZE, rustix::mm::Advice::LinuxDontNeed) }.expect("madvise");
}

/// Gives a page up and gives what it must hold from then on.
fn give_up(seen: &Seen, page: u64, how: Give, first: &[u8]) -> Vec<u8> {
    let extent = Extent { offset: page * PAGE_SIZE as u64, len: PAGE_SIZE as u64 };
    let punch = || seen.file.punch(extent).expect("punch");
    let refilled: Vec<u8> = (0..PAGE_SIZE).map(|byte| (byte as u64 * 31 + page) as u8 | 1).collect();
    let refill = || seen.vmm.write(page as usize * PAGE_SIZE, &refilled);
    let zeroes = vec![0; PAGE_SIZE];
    match how {
        Give::Punch => {
            punch();
            zeroes
        }
        Give::PunchAndRefill => {
            punch();
            refill();
            refilled
        }
        Give::Zap => {
            zap(seen, page);
            first.to_vec()
        }
        Give::RefillAndZap => {
            refill();
            zap(seen, page);
            refilled
        }
        Give::PunchAndZap => {
            punch();
            zap(seen, page);
            zeroes
        }
    }
}

/// When pages are given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum When {
    /// The pull is held: what is given up is absent, until somebody needs it.
    Before,
    /// While the pull sweeps over them, up to the middle of the guest: some have landed, some have not.
    During,
    After,
}

fn wait_for(events: &Receiver<Kind>, what: &str, is_it: impl Fn(&Kind) -> bool) {
    loop {
        match events.recv_timeout(bound().left()) {
            Ok(event) if is_it(&event) => return,
            Ok(_) => {}
            Err(error) => panic!("waited for {what}: {error}"),
        }
    }
}

/// Signals the source when it is dropped.
struct Ends(Sender<i32>);

impl Drop for Ends {
    fn drop(&mut self) {
        let _ = self.0.try_send(2);
    }
}

fn pages_are_never_stale(when: When, tracker: TrackerKind) {
    if no_kvm() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let place = directory.path();
    let spec = GuestSpec {
        memory_bytes: 32 << 20,
        working_set_bytes: 4 << 20,
        filler: Filler::Host,
        filled_of_256: 240,
        ..GuestSpec::default()
    };
    let layout = spec.layout().expect("a layout");
    // Behind all that the guest writes.
    let from = layout.own_pages(0).end + 1;
    let pages: Vec<u64> = (from..layout.pages()).step_by(23).collect();
    assert!(pages.len() > 200, "{} pages", pages.len());

    let (mut guest, output, source_ram) = running_guest(&spec);
    let listener = Listener::bind(&Address::Unix(place.join("sock")), SessionConfig::new(Security::LoopbackOnly));
    let listener = listener.expect("listen");
    // Only write-protection sees what is written through the mapping by others than vCPUs.
    let mut config = source_config(listener.address().clone(), &spec, tracker);
    config.proposal.release = ReleasePolicy::Never;
    let (tell, events) = unbounded();
    let observer = Observer::new("discards", move |observation| drop(tell.send(observation.kind.clone())));
    let (word, signals) = bounded(1);
    let words = Words { signals, ..Words::none() };
    let mut host = TestHost::default();
    let built = host.built.clone();
    let hold = match when {
        When::Before => Some(0.05),
        When::During => Some(0.5),
        When::After => None,
    };
    let mut destination_place = destination_config(place, hold);
    if tracker == TrackerKind::UffdSync {
        // The most that can go wrong: the guest runs while its epochs are staged.
        destination_place.staging = Staging::Cow;
    }
    let (wanted, had_landed, caught) = std::thread::scope(|scope| {
        let destination = scope
            .spawn(|| destination::run(&destination_place, &listener, &mut host, &observer, &Words::none()).map(drop));
        let (guest, output, config) = (&mut guest, &output, &config);
        let source = scope.spawn(move || move_away(place, config, guest, output, &Observer::silent(), &words));
        // Whatever is found: the source takes the guest back, and both roles end.
        let ends = Ends(word);
        wait_for(&events, "the guest to run there", |kind| matches!(kind, Kind::Resumed { .. }));
        if when == When::After {
            wait_for(&events, "all to have landed", |kind| matches!(kind, Kind::AllLanded { .. }));
        }
        let seen = built.lock().unwrap().clone().expect("it has been built");
        let landed = || pages.iter().filter(|&&page| is_mapped(&seen, page)).count();
        let (mut had_landed, end) = (landed(), bound());
        while when == When::During && had_landed == 0 && !end.expired() {
            had_landed = landed();
        }
        let mut wanted = Vec::new();
        for (index, &page) in pages.iter().enumerate() {
            let how = WAYS[index % WAYS.len()];
            let first = page_of(&source_ram, page);
            let must = give_up(&seen, page, how, &first);
            // Needed by somebody at once, or only later: a discard that nobody meets is none yet.
            if index % 2 == 0 {
                assert_eq!(page_of(&seen.vmm, page), must, "{tracker:?} {when:?} {how:?}: page {page} is stale");
            }
            wanted.push((page, how, must));
        }
        for (page, how, must) in &wanted {
            assert_eq!(&page_of(&seen.vmm, *page), must, "{tracker:?} {when:?} {how:?}: page {page} is stale later");
        }
        // What was done so far is in the next epoch but one at the latest.
        while events.try_recv().is_ok() {}
        for _ in 0..3 {
            wait_for(&events, "a checkpoint", |kind| matches!(kind, Kind::Committed { .. }));
        }
        drop(ends);
        let caught = source.join().expect("the source does not panic");
        destination.join().expect("the destination does not panic").expect("it has run");
        (wanted, had_landed, caught)
    });
    assert!(matches!(caught, Ok(Outcome::Caught { .. })), "{caught:?}");
    // When was as it says.
    let as_said = match when {
        When::Before => had_landed * 5 < pages.len(),
        When::During => (1..pages.len()).contains(&had_landed),
        When::After => had_landed == pages.len(),
    };
    assert!(as_said, "{when:?}: {had_landed} of {} had landed", pages.len());
    for (page, how, must) in &wanted {
        assert_eq!(&page_of(&source_ram, *page), must, "{tracker:?} {when:?} {how:?}: page {page} after the catch");
    }
    drop(guest);
}

#[test]
fn what_is_given_up_before_it_lands_is_never_stale_there_nor_after_a_catch() {
    pages_are_never_stale(When::Before, TrackerKind::UffdWp);
    pages_are_never_stale(When::Before, TrackerKind::UffdSync);
}

#[test]
fn what_is_given_up_while_it_lands_is_never_stale_there_nor_after_a_catch() {
    pages_are_never_stale(When::During, TrackerKind::UffdWp);
    pages_are_never_stale(When::During, TrackerKind::UffdSync);
}

#[test]
fn what_is_given_up_after_it_has_landed_is_never_stale_there_nor_after_a_catch() {
    pages_are_never_stale(When::After, TrackerKind::UffdWp);
    pages_are_never_stale(When::After, TrackerKind::UffdSync);
}
