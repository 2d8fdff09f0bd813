//! Guests that wait for pages, for room, or that fail.

mod common;

use belay_checkpoint::guest::{Guest, GuestError};
use belay_transport::uffd::{Event, Faults, Features, OpenMode, RegisterModes, Uffd};
use belay_transport::{Deadline, PAGE_SIZE, PageSize};
use belay_vmm_glue::kvm::guests::{Filler, GuestSpec, Parameter, Program};
use belay_vmm_glue::kvm::{BareGuest, KvmOptions, Tracking};
use common::{Rig, no_kvm, soon};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

fn spec() -> GuestSpec {
    GuestSpec {
        memory_bytes: 8 << 20,
        working_set_bytes: 4 << 20,
        rate_pages_per_s: 0,
        filler: Filler::Host,
        ..GuestSpec::default()
    }
}

fn options() -> KvmOptions {
    KvmOptions { tracking: Tracking::None, irqchip: false }
}

/// A userfaultfd over all of the guest's memory, or why there is none here.
fn registered(rig: &Rig) -> Option<Uffd> {
    let asked = Features::MISSING_SHMEM.union(Features::MINOR_SHMEM);
    let uffd = match Uffd::open(OpenMode::All, asked) {
        Ok(uffd) => uffd,
        Err(error) => {
            eprintln!("skipped: no userfaultfd for KVM: {error}");
            return None;
        }
    };
    let memory = rig.guest.vmm_memory();
    let modes = RegisterModes { faults: Faults::MissingAndMinor, write_protect: false };
    uffd.register(memory.address(), memory.len() as u64, modes).expect("register");
    Some(uffd)
}

/// Serves faults from the file itself until told to end.
fn serve(uffd: &Uffd, end: &AtomicBool) {
    let mut events = [Event::Unmap { start: 0, end: 0 }; 16];
    while !end.load(Ordering::SeqCst) {
        let count = uffd.read_events(&mut events).expect("events");
        for event in &events[..count] {
            let Event::Fault { address, .. } = event else { panic!("{event:?}") };
            let page = address & !(PAGE_SIZE as u64 - 1);
            let done = uffd.continue_range(page, PAGE_SIZE as u64, PageSize::Small, false).expect("continue");
            if !done.done() {
                uffd.zeropage(page, PAGE_SIZE as u64).expect("zeropage");
            }
        }
        if count == 0 {
            std::thread::sleep(Duration::from_micros(50));
        }
    }
}

#[test]
fn a_stop_while_a_vcpu_waits_for_a_page_is_bounded_and_the_guest_goes_on() {
    if no_kvm() {
        return;
    }
    let mut rig = Rig::boot(spec(), options());
    let Some(uffd) = registered(&rig) else { return };
    rig.guest.resume().unwrap();
    // Nobody serves: the vCPU waits for its page tables or its text.
    std::thread::sleep(Duration::from_millis(20));
    let started = Instant::now();
    let stopped = rig.guest.pause(Deadline::after(Duration::from_millis(200)));
    assert!(started.elapsed() < Duration::from_secs(2), "a stop with a bound of 200 ms took {:?}", started.elapsed());
    eprintln!("stop while a page is missing: {stopped:?} after {:?}", started.elapsed());
    match stopped {
        Ok(()) => rig.guest.resume().unwrap(),
        Err(GuestError::StopTimedOut { bound_ms, running: 1, vcpus: 1 }) => assert!(bound_ms >= 200),
        Err(other) => panic!("{other}"),
    }
    let end = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| serve(&uffd, &end));
        rig.run_to_and_check(6400);
        end.store(true, Ordering::SeqCst);
    });
}

#[test]
fn dropping_a_guest_that_waits_for_a_page_does_not_hang() {
    if no_kvm() {
        return;
    }
    let mut rig = Rig::boot(spec(), options());
    let Some(uffd) = registered(&rig) else { return };
    rig.guest.resume().unwrap();
    std::thread::sleep(Duration::from_millis(20));
    let started = Instant::now();
    drop(rig);
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    drop(uffd);
}

#[test]
fn a_guest_that_fails_says_where_and_never_runs_again() {
    if no_kvm() {
        return;
    }
    let mut rig = Rig::boot(GuestSpec { vcpus: 2, ..spec() }, options());
    let at = rig.spec.layout().unwrap().parameters(1) as usize + Parameter::OwnFirstPage as usize * 8;
    rig.ram.alias.write(at, &(1u64 << 30).to_le_bytes());
    rig.guest.park_at_step(u64::MAX).unwrap();
    rig.guest.resume().unwrap();
    let failed = rig.guest.wait_parked(soon()).unwrap_err();
    let GuestError::Crashed(message) = &failed else { panic!("{failed}") };
    assert!(
        message.starts_with("vCPU 1: ") && message.contains("rip 0x5") && message.contains("cr3 0x1000"),
        "{message}"
    );
    assert_eq!(rig.guest.failure().as_ref(), Some(message));
    for refused in [rig.guest.resume(), rig.guest.pause(soon()), rig.guest.save(&mut Vec::new())] {
        assert!(matches!(refused, Err(GuestError::Crashed(_))), "{refused:?}");
    }
}

#[test]
fn a_guest_without_room_for_output_waits_stoppable_and_goes_on_when_there_is_room() {
    if no_kvm() {
        return;
    }
    let mut rig = Rig::boot(spec(), options());
    rig.run_to_and_check(64);
    rig.sink.1.store(true, Ordering::SeqCst);
    rig.guest.unpark().unwrap();
    std::thread::sleep(Duration::from_millis(10));
    let (steps, packets) = (rig.guest.steps().unwrap(), rig.guest.packets());
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!((rig.guest.steps().unwrap(), rig.guest.packets()), (steps.clone(), packets), "it ran on without room");
    // A stop completes the PACE read; what it waited for is waited for all the same.
    for _ in 0..5 {
        let started = Instant::now();
        rig.guest.pause(soon()).unwrap();
        assert!(started.elapsed() < Duration::from_millis(500), "{:?}", started.elapsed());
        rig.guest.resume().unwrap();
        std::thread::sleep(Duration::from_millis(2));
    }
    assert_eq!(
        (rig.guest.steps().unwrap(), rig.guest.packets()),
        (steps.clone(), packets),
        "stops let it on without room"
    );
    rig.sink.1.store(false, Ordering::SeqCst);
    rig.run_to_and_check(steps[0] + 6400);
}

#[test]
fn a_pause_is_as_long_in_the_guests_own_clock_as_in_the_hosts() {
    if no_kvm() {
        return;
    }
    let spec = GuestSpec { program: Program::Metronome, metronome_spin_ticks: u64::from(u32::MAX), ..spec() };
    let mut rig = Rig::boot(spec, options());
    let khz = u64::from(rig.guest.tsc_khz().unwrap());
    let log = rig.spec.layout().unwrap().metronome_log().offset();
    let largest = |rig: &Rig| {
        let mut bytes = [0; 8];
        rig.ram.alias.read(log + 8, &mut bytes);
        u64::from_le_bytes(bytes)
    };
    rig.guest.resume().unwrap();
    // A loaded machine lengthens a gap and never shortens one: each try is held to the lower bound, one of them to the upper.
    let mut tries = Vec::new();
    for _ in 0..20 {
        std::thread::sleep(Duration::from_millis(50));
        rig.guest.pause(soon()).unwrap();
        rig.ram.alias.write(log + 8, &0_u64.to_le_bytes());
        let paused = Instant::now();
        std::thread::sleep(Duration::from_millis(100));
        rig.guest.resume().unwrap();
        let held_ms = paused.elapsed().as_millis() as u64;
        let until = Instant::now() + Duration::from_secs(5);
        while largest(&rig) / khz < 90 && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
        let seen_ms = largest(&rig) / khz;
        assert!(seen_ms + 5 >= held_ms, "{seen_ms} ms of {held_ms}");
        if seen_ms < held_ms + 50 {
            return;
        }
        tries.push((seen_ms, held_ms));
    }
    panic!("the guest saw much longer pauses than it was given (ms seen, held): {tries:?}");
}
