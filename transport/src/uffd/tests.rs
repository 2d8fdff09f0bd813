//! What our userfaultfd promises, against the running kernel.

use super::*;
use crate::deadline::Deadline;
use crate::region::{Extent, Mapping, RamFile};
use rustix::event::{PollFd, PollFlags, poll};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

const PAGE: usize = 4096;
const BOUND: Duration = Duration::from_secs(10);

fn open(asked: Features) -> Option<Uffd> {
    match Uffd::open(OpenMode::All, asked) {
        Ok(uffd) => Some(uffd),
        Err(error) => {
            eprintln!("skipped: {error}");
            None
        }
    }
}

/// A file with its alias and its guest mapping; all frames allocated.
fn ram(pages: usize) -> (RamFile, Mapping, Arc<Mapping>) {
    let file = RamFile::memfd("uffd-test", pages * PAGE, PageSize::Small).unwrap();
    let alias = file.map().unwrap();
    file.preallocate_through(&alias, 1, &|_| ()).unwrap();
    let guest = Arc::new(file.map().unwrap());
    (file, alias, guest)
}

fn next(uffd: &Uffd) -> Event {
    let deadline = Deadline::after(BOUND);
    loop {
        let mut events = [Event::Remove { start: 0, end: 0 }; 4];
        match uffd.read_events(&mut events[..1]).unwrap() {
            0 => assert!(!deadline.expired(), "no event came"),
            _ => return events[0],
        }
        let timeout = rustix::event::Timespec { tv_sec: 1, tv_nsec: 0 };
        let _ = poll(&mut [PollFd::new(uffd, PollFlags::IN)], Some(&timeout));
    }
}

fn byte(mapping: &Mapping, offset: usize) -> u8 {
    let mut byte = [0];
    mapping.read(offset, &mut byte);
    byte[0]
}

const IN_PLACE: RegisterModes = RegisterModes { faults: Faults::MissingAndMinor, write_protect: false };

#[test]
fn a_minor_fault_waits_for_continue_and_then_sees_what_the_alias_wrote() {
    let Some(uffd) = open(Features::MINOR_SHMEM.union(Features::MISSING_SHMEM)) else { return };
    let (_file, alias, guest) = ram(4);
    uffd.register(guest.address(), guest.len() as u64, IN_PLACE).unwrap();
    let toucher = thread::spawn({
        let guest = guest.clone();
        move || byte(&guest, PAGE + 5)
    });
    let Event::Fault { address, kind, write, .. } = next(&uffd) else { panic!("not a fault") };
    assert_eq!((address & !4095, kind, write), (guest.address() + PAGE as u64, FaultKind::Minor, false));
    alias.write(PAGE + 5, &[77]);
    let done = uffd.continue_range(guest.address() + PAGE as u64, PAGE as u64, PageSize::Small, false).unwrap();
    assert_eq!(done, Installed { bytes: 4096, present: 0, stop: Stop::Done });
    assert_eq!(toucher.join().unwrap(), 77);
}

#[test]
fn a_hole_in_a_minor_range_faults_as_missing_and_never_reads_as_zero_by_itself() {
    let Some(uffd) = open(Features::MINOR_SHMEM.union(Features::MISSING_SHMEM)) else { return };
    let (file, _alias, guest) = ram(4);
    file.punch(Extent { offset: 0, len: 4096 }).unwrap();
    uffd.register(guest.address(), guest.len() as u64, IN_PLACE).unwrap();
    let toucher = thread::spawn({
        let guest = guest.clone();
        move || byte(&guest, 0)
    });
    let Event::Fault { kind, .. } = next(&uffd) else { panic!("not a fault") };
    assert_eq!(kind, FaultKind::Missing);
    let hole = uffd.continue_range(guest.address(), 4096, PageSize::Small, false).unwrap();
    assert_eq!(hole.stop, Stop::NoFrame);
    assert!(!toucher.is_finished());
    assert!(uffd.zeropage(guest.address(), 4096).unwrap().done());
    assert_eq!(toucher.join().unwrap(), 0);
}

#[test]
fn installing_over_pages_that_are_there_steps_over_them() {
    let Some(uffd) = open(Features::MINOR_SHMEM.union(Features::MISSING_SHMEM)) else { return };
    let (_file, alias, guest) = ram(8);
    alias.write(0, &[9; 8 * PAGE]);
    uffd.register(guest.address(), guest.len() as u64, IN_PLACE).unwrap();
    let at = |page: u64| guest.address() + page * 4096;
    uffd.continue_range(at(2), 2 * 4096, PageSize::Small, false).unwrap();
    let all = uffd.continue_range(at(0), 8 * 4096, PageSize::Small, false).unwrap();
    assert_eq!(all, Installed { bytes: 8 * 4096, present: 2 * 4096, stop: Stop::Done });
    assert_eq!(byte(&guest, 7 * PAGE), 9);
}

#[test]
fn copy_and_zeropage_fill_anonymous_style_missing_pages() {
    let Some(uffd) = open(Features::MISSING_SHMEM) else { return };
    let file = RamFile::memfd("copy", 4 * PAGE, PageSize::Small).unwrap();
    let guest = file.map().unwrap();
    let source = RamFile::memfd("copy-source", 4 * PAGE, PageSize::Small).unwrap().map().unwrap();
    source.write(0, &[5; 2 * PAGE]);
    let modes = RegisterModes { faults: Faults::Missing, write_protect: false };
    uffd.register(guest.address(), guest.len() as u64, modes).unwrap();
    // SAFETY: the source mapping is four pages long.
    let copied = unsafe { uffd.copy(guest.address(), source.as_ptr().cast(), 8192, PageSize::Small, false) }.unwrap();
    assert!(copied.done());
    let zeroed = uffd.zeropage(guest.address(), 4 * 4096).unwrap();
    assert_eq!(zeroed, Installed { bytes: 4 * 4096, present: 2 * 4096, stop: Stop::Done });
    assert_eq!((byte(&guest, PAGE), byte(&guest, 3 * PAGE)), (5, 0));
}

#[test]
fn a_remove_is_told_and_holds_installs_back_until_it_is_read() {
    let asked = Features::EVENT_REMOVE.union(Features::MISSING_SHMEM);
    let Some(uffd) = open(asked) else { return };
    let file = RamFile::memfd("remove", 4 * PAGE, PageSize::Small).unwrap();
    let guest = Arc::new(file.map().unwrap());
    let modes = RegisterModes { faults: Faults::Missing, write_protect: false };
    uffd.register(guest.address(), guest.len() as u64, modes).unwrap();
    uffd.zeropage(guest.address(), 4096).unwrap();
    let discarder = thread::spawn({
        let guest = guest.clone();
        // SAFETY: dropping a page of our own test mapping, to which no reference exists.
        move || unsafe { libc::madvise(guest.as_ptr().cast(), PAGE, libc::MADV_REMOVE) }
    });
    let mut descriptors = [PollFd::new(&uffd, PollFlags::IN)];
    let bound = rustix::event::Timespec { tv_sec: 10, tv_nsec: 0 };
    assert_eq!(poll(&mut descriptors, Some(&bound)).unwrap(), 1);
    let held = uffd.zeropage(guest.address() + PAGE as u64, 4096).unwrap();
    assert_eq!(held, Installed { bytes: 0, present: 0, stop: Stop::EventsPending });
    assert_eq!(next(&uffd), Event::Remove { start: guest.address(), end: guest.address() + 4096 });
    assert_eq!(discarder.join().unwrap(), 0);
    assert!(uffd.zeropage(guest.address() + PAGE as u64, 4096).unwrap().done());
}

#[test]
fn a_missing_feature_is_named() {
    let asked = Features(1 << 60).union(Features::MISSING_SHMEM);
    match Uffd::open(OpenMode::UserModeOnly, asked) {
        Err(error @ UffdError::MissingFeatures { .. }) => {
            let text = error.to_string();
            assert!(text.contains("lacks bit 60"), "{text}");
            assert!(text.contains("MISSING_SHMEM"), "{text}");
        }
        Err(error) => eprintln!("skipped: {error}"),
        Ok(_) => panic!("feature bit 60 does not exist"),
    }
}

#[test]
fn a_second_userfaultfd_on_a_range_is_refused_as_busy() {
    let (Some(first), Some(second)) = (open(Features::MISSING_SHMEM), open(Features::MISSING_SHMEM)) else { return };
    let guest = RamFile::memfd("busy", PAGE, PageSize::Small).unwrap().map().unwrap();
    let modes = RegisterModes { faults: Faults::Missing, write_protect: false };
    first.register(guest.address(), 4096, modes).unwrap();
    assert!(matches!(second.register(guest.address(), 4096, modes), Err(UffdError::Busy { len: 4096, .. })));
    first.unregister(guest.address(), 4096).unwrap();
    second.register(guest.address(), 4096, modes).unwrap();
}

#[test]
fn a_mapping_that_is_gone_is_told_as_gone() {
    let Some(uffd) = open(Features::MISSING_SHMEM) else { return };
    let guest = RamFile::memfd("gone", PAGE, PageSize::Small).unwrap().map().unwrap();
    let modes = RegisterModes { faults: Faults::Missing, write_protect: false };
    uffd.register(guest.address(), 4096, modes).unwrap();
    uffd.unregister(guest.address(), 4096).unwrap();
    assert_eq!(uffd.zeropage(guest.address(), 4096).unwrap().stop, Stop::Gone);
}
