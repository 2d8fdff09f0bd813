//! Trackers never miss a page that was written: what they report is compared with what really changed in memory.

mod common;

use belay_checkpoint::dirty::DirtySet;
use belay_checkpoint::guest::{Guest, GuestError, TrackerKind};
use belay_transport::{PAGE_SIZE, PageIndex, RegionId};
use belay_vmm_glue::kvm::guests::{Filler, GuestSpec, Program};
use belay_vmm_glue::kvm::{BareGuest, KvmOptions, Tracking};
use common::{Rig, no_kvm, soon};
use std::time::Duration;

fn spec(program: Program, rate_pages_per_s: u64) -> GuestSpec {
    GuestSpec {
        program,
        memory_bytes: 16 << 20,
        working_set_bytes: 8 << 20,
        rate_pages_per_s,
        packet_interval_steps: 64,
        vcpus: 2,
        filler: Filler::Host,
        ..GuestSpec::default()
    }
}

fn snapshot(rig: &Rig) -> Vec<u8> {
    let mut bytes = vec![0; rig.ram.alias.len()];
    rig.ram.alias.read(0, &mut bytes);
    bytes
}

fn never_misses_a_write(tracking: Tracking, kind: TrackerKind, rate_pages_per_s: u64) {
    if no_kvm() {
        return;
    }
    let region = RegionId(0);
    let options = KvmOptions { tracking, irqchip: false };
    let mut rig = Rig::boot(spec(Program::Ledger, rate_pages_per_s), options);
    // Some steps before tracking starts, whose pages must not be taken for the first epoch's.
    rig.run_to_and_check(1280);
    rig.guest.pause(soon()).unwrap();
    rig.guest.unpark().unwrap();
    let mut tracker = rig.guest.tracker(kind).unwrap();
    assert!(tracker.kind() == kind && !tracker.sees_device_writes());
    tracker.start().unwrap();
    let mut before = snapshot(&rig);
    let mut set = DirtySet::new([(region, rig.spec.memory_bytes / PAGE_SIZE as u64)]);
    let (mut written, mut ready) = (0, 0);
    for epoch in 0..20 {
        rig.guest.resume().unwrap();
        std::thread::sleep(Duration::from_millis(1 + epoch % 5));
        let running = tracker.harvest(&mut set);
        assert!(matches!(running, Err(GuestError::WrongState { .. })), "harvested from a running guest: {running:?}");
        if epoch % 2 == 1 {
            tracker.prepare().unwrap();
            ready += tracker.dirty_so_far().unwrap_or(0);
            std::thread::sleep(Duration::from_millis(epoch % 3));
        }
        rig.guest.pause(soon()).unwrap();
        let so_far = tracker.dirty_so_far();
        set.clear();
        tracker.harvest(&mut set).unwrap();
        let after = snapshot(&rig);
        let changed = |page: u64| {
            let bytes = PageIndex(page).offset()..PageIndex(page + 1).offset();
            before[bytes.clone()] != after[bytes]
        };
        let changed: Vec<u64> = (0..rig.spec.memory_bytes / PAGE_SIZE as u64).filter(|&page| changed(page)).collect();
        let missed: Vec<_> = changed.iter().filter(|&&page| !set.contains(region, PageIndex(page))).collect();
        assert!(
            missed.is_empty(),
            "epoch {epoch}: pages {missed:?} changed and are not in the harvest of {}",
            set.len()
        );
        assert!(set.len() <= changed.len() as u64 + 4, "{} pages harvested where {} changed", set.len(), changed.len());
        assert!(so_far.is_none_or(|count| count >= changed.len() as u64), "{so_far:?} where {} changed", changed.len());
        let tables = rig.spec.layout().unwrap().page_tables();
        assert!(!set.contains(region, tables), "the CPU wrote to the page tables");
        written += changed.len();
        before = after;
    }
    eprintln!("{kind:?}: {written} pages written, {ready} known before their pause");
    assert!(written > 500, "only {written} pages were written: this test proves little");
    // What was tracked and what was done agree with the model too.
    let reached = rig.guest.steps().unwrap().into_iter().max().unwrap();
    rig.run_to_and_check(reached + 640);
}

#[test]
fn the_dirty_log_never_misses_a_write() {
    never_misses_a_write(Tracking::Log, TrackerKind::KvmLog, 40_000);
    never_misses_a_write(Tracking::Log, TrackerKind::KvmLog, 0);
}

#[test]
fn the_dirty_ring_never_misses_a_write() {
    never_misses_a_write(Tracking::Ring { entries: 8192 }, TrackerKind::KvmRing, 40_000);
}

#[test]
fn a_dirty_ring_that_fills_up_again_and_again_never_misses_a_write() {
    never_misses_a_write(Tracking::Ring { entries: 1024 }, TrackerKind::KvmRing, 0);
}

#[test]
fn a_tracker_the_vm_was_not_made_for_is_refused_with_the_reason() {
    if no_kvm() {
        return;
    }
    let mut rig = Rig::boot(spec(Program::Ledger, 0), KvmOptions { tracking: Tracking::Log, irqchip: false });
    for kind in [TrackerKind::KvmRing, TrackerKind::UffdWp, TrackerKind::UffdSync] {
        assert!(matches!(rig.guest.tracker(kind), Err(GuestError::NoTracker { .. })));
    }
}

#[test]
fn a_guest_that_only_reads_what_it_has_read_before_is_harvested_empty() {
    if no_kvm() {
        return;
    }
    for (tracking, kind) in
        [(Tracking::Log, TrackerKind::KvmLog), (Tracking::Ring { entries: 1024 }, TrackerKind::KvmRing)]
    {
        let mut rig = Rig::boot(spec(Program::Scanner, 0), KvmOptions { tracking, irqchip: false });
        let mut tracker = rig.guest.tracker(kind).unwrap();
        tracker.start().unwrap();
        let mut set = DirtySet::new([(RegionId(0), rig.spec.memory_bytes / PAGE_SIZE as u64)]);
        // KVM may map a page writable, and call it dirty, when it is read for the first time. One pass is 2,048 pages a vCPU.
        for step in [3000, 6000] {
            set.clear();
            rig.guest.park_at_step(step).unwrap();
            rig.guest.resume().unwrap();
            rig.guest.wait_parked(soon()).unwrap();
            rig.guest.pause(soon()).unwrap();
            tracker.harvest(&mut set).unwrap();
        }
        let pages: Vec<_> = set.iter().take(10).collect();
        assert!(pages.is_empty(), "{kind:?}: {} pages, the first {pages:?}", set.len());
    }
}
