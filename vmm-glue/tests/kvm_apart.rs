//! The VMM in a process of its own.

mod common;

use belay_checkpoint::dirty::DirtySet;
use belay_checkpoint::guest::{Guest, GuestError, TrackerKind};
use belay_transport::uffd::{Event, Features, OpenMode, Uffd};
use belay_transport::{Deadline, PAGE_SIZE, PageIndex, PageSize, RegionId};
use belay_vmm_glue::kvm::apart::VmmFaults;
use belay_vmm_glue::kvm::guests::{Filler, GuestSpec, Program};
use belay_vmm_glue::kvm::{BareGuest, KvmOptions, Tracking};
use common::{Collected, Kind, Ram, Rig, no_kvm, runs_identically_with_and_without_stops, soon, spawn_apart};
use std::process::Child;
use std::sync::Arc;
use std::time::{Duration, Instant};

fn spec(vcpus: u16, rate_pages_per_s: u64) -> GuestSpec {
    GuestSpec {
        program: Program::Ledger,
        memory_bytes: 16 << 20,
        working_set_bytes: 8 << 20,
        rate_pages_per_s,
        vcpus,
        filler: Filler::Host,
        ..GuestSpec::default()
    }
}

fn options(tracking: Tracking) -> KvmOptions {
    KvmOptions { tracking, irqchip: false }
}

#[test]
fn the_vmm_process_of_the_other_tests() {
    common::be_a_vmm_if_asked();
}

#[test]
fn a_guest_in_a_process_of_its_own_runs_identically_with_and_without_a_stop_in_the_middle() {
    if no_kvm() {
        return;
    }
    for vcpus in [1, 2] {
        runs_identically_with_and_without_stops(&spec(vcpus, 0), &Kind::Apart(options(Tracking::None)));
    }
}

fn snapshot(ram: &Ram) -> Vec<u8> {
    let mut bytes = vec![0; ram.alias.len()];
    ram.alias.read(0, &mut bytes);
    bytes
}

#[test]
fn trackers_never_miss_a_write_over_the_socket_and_packets_arrive_before_the_stop() {
    if no_kvm() {
        return;
    }
    let kinds = [(Tracking::Log, TrackerKind::KvmLog), (Tracking::Ring { entries: 1024 }, TrackerKind::KvmRing)];
    for (tracking, kind) in kinds {
        let mut rig = Rig::boot_any(spec(2, 40_000), &Kind::Apart(options(tracking)));
        let mut tracker = rig.guest.tracker(kind).unwrap();
        tracker.start().unwrap();
        let mut set = DirtySet::new([(RegionId(0), rig.spec.memory_bytes / PAGE_SIZE as u64)]);
        let (mut before, mut written) = (snapshot(&rig.ram), 0);
        for _ in 0..10 {
            rig.guest.resume().unwrap();
            std::thread::sleep(Duration::from_millis(4));
            tracker.prepare().unwrap();
            rig.guest.pause(soon()).unwrap();
            let arrived = rig.sink.0.lock().unwrap().len();
            set.clear();
            tracker.harvest(&mut set).unwrap();
            rig.guest.device_writes(&mut set).unwrap();
            let after = snapshot(&rig.ram);
            for page in 0..rig.spec.memory_bytes / PAGE_SIZE as u64 {
                let bytes = PageIndex(page).offset()..PageIndex(page + 1).offset();
                if before[bytes.clone()] != after[bytes] {
                    assert!(set.contains(RegionId(0), PageIndex(page)), "{kind:?}: page {page} was missed");
                    written += 1;
                }
            }
            before = after;
            assert_eq!(rig.sink.0.lock().unwrap().len(), arrived, "a packet arrived after the stop");
        }
        assert!(written > 100, "{kind:?}: only {written} pages were written");
        let reached = rig.guest.steps().unwrap().into_iter().max().unwrap();
        rig.run_to_and_check(reached + 6400);
    }
}

fn features() -> Option<Features> {
    match Uffd::supported(OpenMode::All) {
        Ok(_) => Some(Features::MISSING_SHMEM.union(Features::MINOR_SHMEM)),
        Err(error) => {
            eprintln!("skipped: no userfaultfd for KVM: {error}");
            None
        }
    }
}

/// Serves up to `count` faults from the file itself; how many came before the deadline.
fn serve(uffd: &Uffd, count: usize, deadline: Deadline) -> usize {
    let (mut events, mut served) = ([Event::Unmap { start: 0, end: 0 }; 1], 0);
    while served < count && !deadline.expired() {
        if uffd.read_events(&mut events).expect("events") == 0 {
            std::thread::sleep(Duration::from_micros(20));
            continue;
        }
        let Event::Fault { address, .. } = events[0] else { panic!("{events:?}") };
        let page = address & !(PAGE_SIZE as u64 - 1);
        let done = uffd.continue_range(page, PAGE_SIZE as u64, PageSize::Small, false).expect("continue");
        if !done.done() {
            uffd.zeropage(page, PAGE_SIZE as u64).expect("zeropage");
        }
        served += 1;
    }
    served
}

fn ends_within(child: &mut Child, bound: Duration) -> bool {
    let deadline = Deadline::after(bound);
    while matches!(child.try_wait(), Ok(None)) && !deadline.expired() {
        std::thread::sleep(Duration::from_millis(2));
    }
    matches!(child.try_wait(), Ok(Some(_)))
}

#[test]
fn p1_a_guest_whose_page_server_died_waits_and_never_reads_what_has_not_arrived() {
    if no_kvm() {
        return;
    }
    let Some(features) = features() else { return };
    let spec = spec(1, 0);
    let (ram, sink) = (Ram::of(&spec), Arc::new(Collected::default()));
    let mut guest = spawn_apart(&spec, &options(Tracking::None), &ram, &sink);
    guest.boot().unwrap();
    guest.set_incarnation(7).unwrap();
    let uffd = guest.faults().userfaultfd(features, 0..spec.memory_bytes, VmmFaults::MissingAndMinor, false).unwrap();
    guest.resume().unwrap();
    // Enough for the guest to be well among its steps.
    assert_eq!(serve(&uffd, 300, soon()), 300);
    // A request is answered although the vCPU waits for a page now.
    let asked = Instant::now();
    let stopped = guest.pause(Deadline::after(Duration::from_millis(100)));
    assert!(asked.elapsed() < Duration::from_secs(3), "{:?}", asked.elapsed());
    assert!(matches!(stopped, Ok(()) | Err(GuestError::StopTimedOut { .. })), "{stopped:?}");
    guest.resume().unwrap();
    // The page server dies: its duplicates and its socket close.
    let mut vmm = guest.abandon().expect("a child");
    drop(uffd);
    let before = snapshot(&ram);
    std::thread::sleep(Duration::from_millis(400));
    assert!(snapshot(&ram) == before, "the guest went on without a page server");
    assert!(matches!(vmm.try_wait(), Ok(None)), "the VMM ended and with it the guest's memory");
    // SAFETY: sends SIGTERM to the child this test started and has not waited for.
    unsafe { libc::kill(vmm.id() as i32, libc::SIGTERM) };
    assert!(ends_within(&mut vmm, Duration::from_secs(10)), "SIGTERM did not end it");
}

#[test]
fn a_vmm_whose_client_is_gone_stops_its_guest_and_keeps_its_memory() {
    if no_kvm() {
        return;
    }
    let spec = spec(2, 0);
    let (ram, sink) = (Ram::of(&spec), Arc::new(Collected::default()));
    let mut guest = spawn_apart(&spec, &options(Tracking::None), &ram, &sink);
    guest.boot().unwrap();
    guest.resume().unwrap();
    std::thread::sleep(Duration::from_millis(50));
    let mut vmm = guest.abandon().expect("a child");
    // It runs at full speed, so a millisecond without a change means that it has stopped.
    let deadline = soon();
    let mut before = snapshot(&ram);
    loop {
        std::thread::sleep(Duration::from_millis(20));
        let now = snapshot(&ram);
        if now == before {
            break;
        }
        before = now;
        assert!(!deadline.expired(), "the guest still runs");
    }
    assert!(before.iter().any(|&byte| byte != 0) && matches!(vmm.try_wait(), Ok(None)));
    vmm.kill().unwrap();
    vmm.wait().unwrap();
}

#[test]
fn a_vmm_that_was_killed_is_an_error_with_a_name_and_not_a_hang() {
    if no_kvm() {
        return;
    }
    let spec = spec(1, 0);
    let (ram, sink) = (Ram::of(&spec), Arc::new(Collected::default()));
    let mut guest = spawn_apart(&spec, &options(Tracking::None), &ram, &sink);
    guest.boot().unwrap();
    guest.resume().unwrap();
    let pid = guest.pid().expect("a child") as i32;
    // SAFETY: kills the child this test started; nobody has waited for it yet.
    unsafe { libc::kill(pid, libc::SIGKILL) };
    let asked = Instant::now();
    let error = guest.pause(soon()).unwrap_err();
    assert!(matches!(error, GuestError::VmmGone(_)), "{error}");
    assert!(asked.elapsed() < Duration::from_secs(5), "{:?}", asked.elapsed());
}

#[test]
fn a_guest_in_a_process_of_its_own_is_held_back_without_room() {
    if no_kvm() {
        return;
    }
    let mut rig = Rig::boot_any(spec(1, 0), &Kind::Apart(options(Tracking::None)));
    rig.sink.1.store(true, std::sync::atomic::Ordering::SeqCst);
    rig.guest.resume().unwrap();
    let deadline = soon();
    let mut before = None;
    let steps = loop {
        std::thread::sleep(Duration::from_millis(30));
        let steps = rig.guest.steps().unwrap();
        if before.as_ref() == Some(&steps) && steps[0] > 0 {
            break steps;
        }
        before = Some(steps);
        assert!(!deadline.expired(), "it never stopped for want of room");
    };
    let packets = rig.sink.0.lock().unwrap().len();
    assert!(packets <= 80, "{packets} packets without room");
    rig.sink.1.store(false, std::sync::atomic::Ordering::SeqCst);
    rig.run_to_and_check(steps[0] + 6400);
}

#[test]
fn errors_of_the_vmm_come_over_with_their_names() {
    if no_kvm() {
        return;
    }
    let mut rig = Rig::boot_any(spec(1, 0), &Kind::Apart(options(Tracking::Log)));
    assert!(matches!(rig.guest.tracker(TrackerKind::KvmRing), Err(GuestError::NoTracker { .. })));
    assert!(matches!(rig.guest.load(b"nonsense"), Err(GuestError::BadState(_))));
    rig.guest.resume().unwrap();
    let error = rig.guest.save(&mut Vec::new()).unwrap_err();
    assert!(matches!(error, GuestError::WrongState { call: "save", state: "running", wanted: "paused" }), "{error}");
}
