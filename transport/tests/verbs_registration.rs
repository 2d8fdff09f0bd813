//! Registration with a real RDMA device: that stale pins exist and that we do not fall for them, that exporting fills no hole, and that a
//! caught guest does not wait for its memory to be given back.

mod common;

use belay_transport::fabric::verbs::LockedMemory;
use belay_transport::fabric::{self, Lane, Registering, RevokedRing};
use belay_transport::region::Extent;
use belay_transport::{Deadline, PAGE_SIZE};
use common::*;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// The byte at `offset` of the owner's RAM, read by the device into local memory.
fn read_byte(world: &World, lane: &mut dyn Lane, offset: usize) -> u8 {
    world.local.zero(offset, PAGE_SIZE);
    lane.post_reads(&[world.read(9, offset, PAGE_SIZE)]).expect("posted");
    complete(lane, 1);
    bytes(&world.local, offset, 1)[0]
}

fn page(number: usize) -> Extent {
    Extent { offset: (number * PAGE_SIZE) as u64, len: PAGE_SIZE as u64 }
}

#[test]
fn a_hole_punched_under_a_registration_is_found_and_the_guests_newer_bytes_are_read() {
    if verbs_settings().is_none() {
        return;
    }
    let mut world = world(Over::Verbs);
    let mut lane = world.lane(FAULT, 16);
    let guest = world.files[0].map().expect("the guest's mapping");
    let given_up = [3, 4, 100, 700].map(|number| number * PAGE_SIZE);
    for offset in given_up {
        assert_eq!(read_byte(&world, &mut *lane, offset), expected(offset));
        world.files[0].punch(page(offset / PAGE_SIZE)).expect("punched");
        guest.write(offset, &[!expected(offset); PAGE_SIZE]);
    }
    // The trap: the READ succeeds, and what it brings is not the guest's memory any more. (A device that pages on demand has no such trap;
    // SoftRoCE in the lab's kernels does not.)
    let old: Vec<bool> =
        given_up.iter().map(|offset| read_byte(&world, &mut *lane, *offset) == expected(*offset)).collect();
    eprintln!("READs through a registration older than the hole bring old bytes: {old:?}");
    assert!(old.iter().all(|is_old| *is_old == old[0]), "{old:?}");
    // What the switch does.
    let extents = world.files[0].occupancy().expect("occupancy");
    world.owner.extend_read(world.ram, &extents).expect("offered again");
    for offset in given_up {
        assert_eq!(read_byte(&world, &mut *lane, offset), !expected(offset), "old bytes of {offset} after the switch");
        for neighbour in [offset - PAGE_SIZE, offset + PAGE_SIZE] {
            if !given_up.contains(&neighbour) {
                assert_eq!(read_byte(&world, &mut *lane, neighbour), expected(neighbour));
            }
        }
    }
    assert_eq!(world.files[0].occupancy().expect("occupancy"), extents, "looking for holes filled some");
}

#[test]
fn what_the_guest_populates_after_the_export_is_read_after_it_was_offered() {
    if verbs_settings().is_none() {
        return;
    }
    let mut world = world(Over::Verbs);
    let before = world.files[0].occupancy().expect("occupancy");
    let mut lane = world.lane(BULK, 16);
    assert_eq!(world.files[0].occupancy().expect("occupancy"), before, "exporting filled holes");
    let hole = HOLE.offset as usize;
    assert_eq!(before.iter().filter(|extent| extent.offset == HOLE.offset).count(), 0);
    let guest = world.files[0].map().expect("the guest's mapping");
    let populated = [hole + 5 * PAGE_SIZE, hole + 6 * PAGE_SIZE, hole + 99 * PAGE_SIZE];
    for offset in populated {
        guest.write(offset, &[0xa5; PAGE_SIZE]);
    }
    let extents = world.files[0].occupancy().expect("occupancy");
    world.owner.extend_read(world.ram, &extents).expect("offered");
    for offset in populated {
        assert_eq!(read_byte(&world, &mut *lane, offset), 0xa5);
    }
    assert_eq!(world.files[0].occupancy().expect("occupancy"), extents, "a hole was filled");
    // Across the border of old and new registrations in one operation.
    guest.write(hole, &[0x5a; PAGE_SIZE]);
    let extents = world.files[0].occupancy().expect("occupancy");
    world.owner.extend_read(world.ram, &extents).expect("offered");
    world.local.zero(0, RAM_BYTES);
    lane.post_reads(&[world.read(1, hole - 3 * PAGE_SIZE - 7, 4 * PAGE_SIZE + 7)]).expect("posted");
    complete(&mut *lane, 1);
    world.assert_local(hole - 3 * PAGE_SIZE - 7, 3 * PAGE_SIZE + 7);
    assert_eq!(bytes(&world.local, hole, PAGE_SIZE), [0x5a; PAGE_SIZE]);
}

#[test]
fn revocation_does_not_wait_for_guest_ram_to_be_given_back() {
    const LARGE: usize = 192 << 20;
    if verbs_settings().is_none() {
        return;
    }
    let before = LockedMemory::now().pinned;
    let session = meet(Over::Verbs);
    let mut owner = fabric::owner(&session.source).expect("owner");
    let progress = Arc::new(Mutex::new(Vec::<Registering>::new()));
    let told = progress.clone();
    owner.observe_registration(Arc::new(move |at| told.lock().expect("no panic").push(at)));
    let (file, map) = memory(LARGE);
    file.preallocate(1, &|_| ()).expect("allocated");
    let begun = Instant::now();
    owner.export_read(&file, &map, &[Extent { offset: 0, len: LARGE as u64 }]).expect("exported");
    let registering = begun.elapsed();
    let pinned = LockedMemory::now().pinned - before;
    {
        let progress = progress.lock().expect("no panic");
        assert!(progress.len() > 1, "{progress:?}");
        let last = progress.last().expect("some");
        assert_eq!((last.done_bytes, last.total_bytes), (LARGE as u64, LARGE as u64));
        assert_eq!(last.pinned_bytes, pinned, "what is told is what the kernel counts");
    }
    let (ring_file, ring) = memory(RING_BYTES);
    let (region_file, region) = memory(PAGE_SIZE);
    owner.export_ring((&ring_file, &ring), (&region_file, &region)).expect("ring");
    let with_ring = LockedMemory::now().pinned;
    let begun = Instant::now();
    let mut at_last_read = 0;
    owner.revoke(&mut |_: RevokedRing<'_>| at_last_read = LockedMemory::now().pinned, soon()).expect("revoked");
    let revoking = begun.elapsed();
    assert_eq!(
        with_ring - at_last_read,
        RING_BYTES as u64,
        "the ring is given back before it is read for the last time"
    );
    assert!(at_last_read - before >= pinned, "guest RAM is not waited for");
    let deadline = Deadline::after(Duration::from_secs(20));
    while LockedMemory::now().pinned > before {
        assert!(!deadline.expired(), "{} bytes stay pinned", LockedMemory::now().pinned - before);
        std::thread::yield_now();
    }
    let all = begun.elapsed();
    eprintln!("{LARGE} bytes: registered in {registering:?}, revoked in {revoking:?}, given back after {all:?}");
}
