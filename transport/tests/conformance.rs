//! What every fabric promises, run over each of them: `local`, `tcp`, and `tcp` under TLS; and, where there is an RDMA device,
//! `verbs` with its control connection in clear and under TLS.

mod common;

use belay_transport::Deadline;
use belay_transport::fabric::{FabricError, ReadKey, RefusedReason, WriteKey};
use common::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

macro_rules! on_every_fabric {
    ($($name:ident)*) => {
        mod local { $(#[test] fn $name() { super::$name(super::Over::Local) })* }
        mod tcp { $(#[test] fn $name() { super::$name(super::Over::Tcp) })* }
        mod tls { $(#[test] fn $name() { super::$name(super::Over::Tls) })* }
        mod verbs { $(#[test] fn $name() { super::where_rdma_is(super::Over::Verbs, super::$name) })* }
        mod verbs_tls { $(#[test] fn $name() { super::where_rdma_is(super::Over::VerbsTls, super::$name) })* }
    };
}

on_every_fabric! {
    a_read_brings_the_right_bytes_from_every_offset_and_length
    operations_complete_in_the_order_in_which_they_were_posted
    a_batch_beyond_the_window_is_not_posted_at_all
    writes_land_in_the_ring_and_nowhere_else
    a_committed_trailer_and_everything_before_it_is_in_the_ring
    a_commit_drops_what_was_not_polled
    the_owner_region_is_read_as_the_owner_wrote_it
    a_forged_key_is_refused
    a_key_does_not_carry_the_other_right
    what_lies_outside_is_refused
    bad_lengths_are_refused_before_anything_is_sent
    after_the_first_failure_every_call_fails
    after_revocation_nothing_the_old_initiator_does_changes_the_ring
    a_commit_that_races_with_revocation_is_in_the_ring_or_is_not_a_commit
    revoking_twice_reads_the_ring_once
    an_owner_that_goes_away_is_noticed_by_who_waits
    an_initiator_that_goes_away_is_noticed_by_the_owner
    waiting_for_nothing_ends_at_the_deadline_and_leaves_the_lane_usable
    exports_and_registrations_come_before_the_first_lane
    lanes_do_not_wait_for_each_other
    any_mixture_of_operations_leaves_the_bytes_a_plain_copy_would
}

/// Runs a test on a host that has an RDMA device, and says so on one that has not.
fn where_rdma_is(over: Over, test: impl FnOnce(Over)) {
    if verbs_settings().is_some() {
        test(over);
    }
}

fn a_read_brings_the_right_bytes_from_every_offset_and_length(over: Over) {
    let mut world = world(over);
    let mut lane = world.lane(FAULT, 64);
    let after = (HOLE.offset + HOLE.len) as usize;
    let lengths = [1, 7, 16, 4095, 4096, 4097, 65_536, 300_001, HOLE.offset as usize];
    for (id, len) in (0..).zip(lengths) {
        for offset in [0, 1, 4096, 8191, HOLE.offset as usize - len, after, after + 3, RAM_BYTES - len] {
            if offset + len > HOLE.offset as usize && offset < after {
                continue;
            }
            world.local.zero(0, RAM_BYTES);
            lane.post_reads(&[world.read(id, offset, len)]).unwrap();
            assert_eq!(complete(&mut *lane, 1), [id]);
            world.assert_local(offset, len);
            // Not a byte beyond.
            for around in [offset.wrapping_sub(1), offset + len] {
                if around < RAM_BYTES {
                    assert_eq!(bytes(&world.local, around, 1), [0]);
                }
            }
        }
    }
}

fn operations_complete_in_the_order_in_which_they_were_posted(over: Over) {
    let mut world = world(over);
    let mut lane = world.lane(CHECKPOINT, 200);
    let sizes = [4096, 1, 65_536, 512, 200_000];
    let mut expected_ids = Vec::new();
    for round in 0..10_u64 {
        let mut batch = Vec::new();
        let mut offset = 0;
        for (at, size) in (0..).zip(sizes.iter().cycle().take(15)) {
            if offset + size > HOLE.offset as usize {
                offset = 0;
            }
            batch.push(world.read(round * 1000 + at, offset, *size));
            offset += size;
        }
        lane.post_reads(&batch).unwrap();
        let writes = [world.write(round * 1000 + 500, 0, 64, 9000), world.write(round * 1000 + 501, 5, 0, 1)];
        lane.post_writes(&writes).unwrap();
        expected_ids.extend(batch.iter().map(|read| read.id).chain(writes.iter().map(|write| write.id)));
    }
    assert_eq!(lane.outstanding(), 170);
    assert_eq!(complete(&mut *lane, 170), expected_ids);
    assert_eq!(lane.outstanding(), 0);
    world.assert_local(0, 400_000);
}

fn a_batch_beyond_the_window_is_not_posted_at_all(over: Over) {
    let mut world = world(over);
    let mut lane = world.lane(BULK, 8);
    assert_eq!(lane.window(), 8);
    let batch: Vec<_> = (0..9).map(|at| world.read(at, at as usize * 4096, 4096)).collect();
    let error = lane.post_reads(&batch).unwrap_err();
    assert!(matches!(error, FabricError::WindowFull { asked: 9, outstanding: 0, window: 8 }), "{error}");
    assert_eq!(lane.outstanding(), 0);
    lane.post_reads(&batch[..6]).unwrap();
    let error = lane.post_reads(&batch[6..]).unwrap_err();
    assert!(matches!(error, FabricError::WindowFull { asked: 3, outstanding: 6, window: 8 }), "{error}");
    assert_eq!(complete(&mut *lane, 6), [0, 1, 2, 3, 4, 5]);
    assert_eq!(bytes(&world.local, 6 * 4096, 3 * 4096), vec![0; 3 * 4096], "a refused batch moved bytes");
    // A full window that is drained is open again, many times over.
    for _ in 0..100 {
        lane.post_reads(&batch[..8]).unwrap();
        complete(&mut *lane, 8);
    }
}

fn writes_land_in_the_ring_and_nowhere_else(over: Over) {
    let mut world = world(over);
    let mut lane = world.lane(CHECKPOINT, 64);
    let pattern: Vec<u8> = (0..RAM_BYTES).map(|at| expected(at) | 1).collect();
    world.local.write(0, &pattern);
    for (from, to, len) in [(0, 0, 1), (5, 100, 32), (4095, 8191, 70_000), (0, RING_BYTES - 10, 10), (9, 0, RING_BYTES)]
    {
        world.ring.zero(0, RING_BYTES);
        lane.post_writes(&[world.write(1, from, to, len)]).unwrap();
        complete(&mut *lane, 1);
        let mut model = vec![0; RING_BYTES];
        model[to..to + len].copy_from_slice(&pattern[from..from + len]);
        assert!(bytes(&world.ring, 0, RING_BYTES) == model, "{from} -> {to}+{len}");
    }
    // Many in one batch, of sizes around the owner's intake.
    let batch: Vec<_> = (0..60).map(|at| world.write(at, at as usize * 3, at as usize * 17_000, 16_000)).collect();
    lane.post_writes(&batch).unwrap();
    complete(&mut *lane, 60);
    for at in 0..60 {
        assert!(bytes(&world.ring, at * 17_000, 16_000) == pattern[at * 3..at * 3 + 16_000], "write {at}");
    }
}

fn a_committed_trailer_and_everything_before_it_is_in_the_ring(over: Over) {
    let mut world = world(over);
    let mut lane = world.lane(CHECKPOINT, 16);
    for epoch in 1..=50_u64 {
        world.local.write(0, &vec![epoch as u8; 200_000]);
        world.local.store_u64(204_800, epoch, Ordering::SeqCst);
        let batch = [world.write(1, 0, 4096, 100_000), world.write(2, 100_000, 104_096, 100_000)];
        lane.post_writes(&batch).unwrap();
        lane.commit(&world.write(3, 204_800, 0, 8), soon()).unwrap();
        assert_eq!(world.ring.load_u64(0, Ordering::SeqCst), epoch);
        assert!(bytes(&world.ring, 4096, 200_000) == vec![epoch as u8; 200_000], "epoch {epoch}");
    }
}

fn a_commit_drops_what_was_not_polled(over: Over) {
    let mut world = world(over);
    let mut lane = world.lane(CHECKPOINT, 4);
    // A full window leaves room for the trailer.
    let batch: Vec<_> = (0..3).map(|at| world.write(at, 0, at as usize * 100, 100)).collect();
    lane.post_writes(&batch).unwrap();
    lane.post_reads(&[world.read(3, 8192, 4096)]).unwrap();
    lane.commit(&world.write(9, 0, 500, 8), soon()).unwrap();
    assert_eq!(lane.outstanding(), 0);
    assert_eq!(lane.poll(&mut [0; 8]).unwrap(), 0);
    world.assert_local(8192, 4096);
    lane.post_reads(&[world.read(10, 0, 4096)]).unwrap();
    assert_eq!(complete(&mut *lane, 1), [10]);
}

fn the_owner_region_is_read_as_the_owner_wrote_it(over: Over) {
    let mut world = world(over);
    let mut lane = world.lane(HEARTBEAT, 4);
    for grant in 1..100_u64 {
        world.owner_region.store_u64(64, grant, Ordering::SeqCst);
        let mut read = world.read(grant, 0, 8);
        (read.remote, read.remote_offset) = (world.ring_keys.owner_region, 64);
        lane.post_reads(&[read]).unwrap();
        complete(&mut *lane, 1);
        assert_eq!(world.local.load_u64(0, Ordering::SeqCst), grant);
    }
}

fn assert_refused(over: Over, error: &FabricError, reason: RefusedReason) {
    match (over, error) {
        // The initiator has the mappings and refuses by itself.
        (
            Over::Local | Over::Verbs | Over::VerbsTls,
            FabricError::UnknownKey { .. } | FabricError::OutOfRange { .. },
        ) => {}
        (Over::Tcp | Over::Tls, FabricError::Refused { reason: got, .. }) if *got == reason => {}
        _ => panic!("{over:?}: {error:?} where {reason:?} was expected"),
    }
}

/// Posts and waits; a fabric may refuse at either.
fn attempt_read(lane: &mut dyn belay_transport::fabric::Lane, read: belay_transport::fabric::Read) -> FabricError {
    match lane.post_reads(&[read]) {
        Err(error) => error,
        Ok(()) => lane.wait(soon()).expect_err("a refusal"),
    }
}

fn attempt_write(lane: &mut dyn belay_transport::fabric::Lane, write: belay_transport::fabric::Write) -> FabricError {
    match lane.post_writes(&[write]) {
        Err(error) => error,
        Ok(()) => lane.wait(soon()).expect_err("a refusal"),
    }
}

fn a_forged_key_is_refused(over: Over) {
    let mut world = world(over);
    let (mut fault, mut checkpoint) = (world.lane(FAULT, 4), world.lane(CHECKPOINT, 4));
    let mut read = world.read(1, 0, 4096);
    read.remote = ReadKey(world.ram.0 ^ (1 << 40));
    assert_refused(over, &attempt_read(&mut *fault, read), RefusedReason::UnknownKey);
    assert_eq!(bytes(&world.local, 0, 4096), [0; 4096]);
    let mut write = world.write(1, 0, 0, 4096);
    write.remote = WriteKey(world.ring_keys.ring.0 & 0xff);
    world.local.write(0, &[1; 4096]);
    assert_refused(over, &attempt_write(&mut *checkpoint, write), RefusedReason::UnknownKey);
    assert_eq!(bytes(&world.ring, 0, 4096), [0; 4096]);
}

fn a_key_does_not_carry_the_other_right(over: Over) {
    let mut world = world(over);
    let (mut fault, mut checkpoint) = (world.lane(FAULT, 4), world.lane(CHECKPOINT, 4));
    let mut read = world.read(1, 0, 4096);
    read.remote = ReadKey(world.ring_keys.ring.0);
    assert_refused(over, &attempt_read(&mut *fault, read), RefusedReason::NoRight);
    world.local.write(0, &[0xaa; 4096]);
    let before = bytes(&world.owner_region, 0, 4096);
    let mut write = world.write(1, 0, 0, 4096);
    write.remote = WriteKey(world.ring_keys.owner_region.0);
    assert_refused(over, &attempt_write(&mut *checkpoint, write), RefusedReason::NoRight);
    assert_eq!(bytes(&world.owner_region, 0, 4096), before);
}

fn what_lies_outside_is_refused(over: Over) {
    let cases = [
        (RAM_BYTES as u64 - 100, 101),
        (RAM_BYTES as u64, 1),
        (u64::MAX, 1),
        (u64::MAX - 4095, 4096),
        // Holes: a read there would allocate pages at the owner. `local` cannot tell.
        (HOLE.offset, 1),
        (HOLE.offset - 1, 2),
        (HOLE.offset + HOLE.len - 1, 1),
        (0, RAM_BYTES as u32),
    ];
    let mut world = world(over);
    for (index, (offset, len)) in (0..).zip(cases) {
        let in_file = offset.checked_add(u64::from(len)).is_some_and(|end| end <= RAM_BYTES as u64);
        if over == Over::Local && in_file {
            continue;
        }
        let id = belay_transport::fabric::LaneId { index, ..FAULT };
        let mut lane = world.lane(id, 4);
        let mut read = world.read(1, 0, len as usize);
        read.remote_offset = offset;
        assert_refused(over, &attempt_read(&mut *lane, read), RefusedReason::OutOfRange);
        if in_file && len < 4096 {
            let data = rustix::fs::seek(&world.files[0], rustix::fs::SeekFrom::Data(HOLE.offset)).unwrap();
            assert_eq!(data, HOLE.offset + HOLE.len, "the owner's hole was filled");
        }
    }
    let mut lane = world.lane(CHECKPOINT, 4);
    let mut write = world.write(1, 0, 0, 8);
    write.remote_offset = RING_BYTES as u64 - 7;
    assert_refused(over, &attempt_write(&mut *lane, write), RefusedReason::OutOfRange);
}

fn bad_lengths_are_refused_before_anything_is_sent(over: Over) {
    let mut world = world(over);
    let mut lane = world.lane(CHECKPOINT, 4);
    let mut too_long = world.read(1, 0, 1);
    too_long.len = belay_transport::fabric::MAX_OPERATION_BYTES + 1;
    let mut beyond = world.read(1, 0, 4096);
    beyond.local_offset = RAM_BYTES as u64 - 4095;
    let good = world.read(2, 0, 4096);
    for bad in [world.read(1, 0, 0), too_long, beyond] {
        let error = lane.post_reads(&[good, bad]).unwrap_err();
        assert!(matches!(error, FabricError::BadLength { .. } | FabricError::OutOfRange { .. }), "{error}");
    }
    assert!(lane.post_writes(&[world.write(1, 0, 0, 0)]).is_err());
    // A caller's mistake that never left breaks nothing, and of a refused batch nothing was done.
    assert_eq!(bytes(&world.local, 0, 4096), [0; 4096]);
    lane.post_reads(&[good]).unwrap();
    assert_eq!(complete(&mut *lane, 1), [2]);
}

fn after_the_first_failure_every_call_fails(over: Over) {
    let mut world = world(over);
    let mut lane = world.lane(CHECKPOINT, 4);
    revoke(&mut *world.owner);
    assert!(lane.commit(&world.write(1, 0, 0, 8), soon()).is_err());
    assert!(matches!(lane.post_reads(&[world.read(1, 0, 1)]), Err(FabricError::Broken { .. })));
    assert!(matches!(lane.post_writes(&[world.write(1, 0, 0, 1)]), Err(FabricError::Broken { .. })));
    assert!(matches!(lane.poll(&mut [0]), Err(FabricError::Broken { .. })));
    assert!(matches!(lane.wait(soon()), Err(FabricError::Broken { .. })));
    assert!(matches!(lane.commit(&world.write(1, 0, 0, 8), soon()), Err(FabricError::Broken { .. })));
}

fn after_revocation_nothing_the_old_initiator_does_changes_the_ring(over: Over) {
    let mut world = world(over);
    let lanes: Vec<_> =
        (0..3).map(|index| world.lane(belay_transport::fabric::LaneId { index, ..CHECKPOINT }, 16)).collect();
    let mut fault = world.lane(FAULT, 4);
    world.local.write(0, &[1; 8192]);
    let mut lanes = lanes.into_iter();
    let mut first = lanes.next().unwrap();
    first.post_writes(&[world.write(1, 0, 0, 8192)]).unwrap();
    complete(&mut *first, 1);

    let revoked = revoke(&mut *world.owner);
    assert_eq!(revoked.bytes.len(), RING_BYTES);
    assert_eq!(revoked.still, over != Over::Local, "what others have mapped is never said to stand still");
    assert_eq!(revoked.bytes[..8192], [1; 8192]);

    world.local.write(0, &[2; 8192]);
    let mut second = lanes.next().unwrap();
    // On tcp a first send may still go into the socket; what counts is that it never completes.
    let stale = attempt_write(&mut *second, world.write(1, 0, 0, 8192));
    let commit = first.commit(&world.write(2, 0, 0, 8), soon()).unwrap_err();
    let read = attempt_read(&mut *fault, world.read(3, 0, 4096));
    for error in [&stale, &commit, &read] {
        match over {
            Over::Local => assert!(matches!(error, FabricError::Revoked { was: 0, is: 1 }), "{error:?}"),
            Over::Tcp | Over::Tls => assert!(
                matches!(
                    error,
                    FabricError::PeerClosed { .. } | FabricError::Refused { reason: RefusedReason::Revoked, .. }
                ),
                "{error:?}"
            ),
            Over::Verbs | Over::VerbsTls => assert!(
                matches!(
                    error,
                    FabricError::PeerClosed { .. } | FabricError::Refused { reason: RefusedReason::ByDevice, .. }
                ),
                "{error:?}"
            ),
        }
    }
    if over != Over::Local {
        assert_eq!(bytes(&world.ring, 0, 8192), [1; 8192]);
    }
    assert_eq!(revoked.bytes[..8192], [1; 8192]);
}

/// A stale initiator commits in a tight loop while the owner revokes. Each commit writes its number twice, far apart.
fn a_commit_that_races_with_revocation_is_in_the_ring_or_is_not_a_commit(over: Over) {
    const BODY: usize = 900_000;
    // Under TLS and on SoftRoCE in an emulated host a round takes long.
    let rounds = if matches!(over, Over::Local | Over::Tcp) { 40 } else { 15 };
    for round in 0..rounds {
        let mut world = world(over);
        let mut lane = world.lane(CHECKPOINT, 4);
        let committed = Arc::new(AtomicU64::new(0));
        let (body, trailer) = (world.write(1, 0, 4096, BODY), world.write(2, 1 << 20, 0, 8));
        let started = Arc::new(AtomicBool::new(false));
        let loose = {
            let (committed, started, local) = (Arc::clone(&committed), Arc::clone(&started), Arc::clone(&world.local));
            std::thread::spawn(move || {
                for number in 1..u64::MAX {
                    local.write(0, &vec![number as u8; BODY]);
                    local.store_u64(1 << 20, number, Ordering::SeqCst);
                    let done = lane.post_writes(&[body]).and_then(|()| lane.commit(&trailer, soon()));
                    if done.is_err() {
                        return number;
                    }
                    committed.store(number, Ordering::SeqCst);
                    started.store(true, Ordering::SeqCst);
                }
                unreachable!("a u64 does not run out")
            })
        };
        while !started.load(Ordering::SeqCst) {
            std::hint::spin_loop();
        }
        // A different moment each round.
        let until = std::time::Instant::now() + Duration::from_micros(round * 37);
        while std::time::Instant::now() < until {
            std::hint::spin_loop();
        }
        let revoked = revoke(&mut *world.owner);
        let failed_at = loose.join().unwrap();
        let last_commit = committed.load(Ordering::SeqCst);
        let in_ring = u64::from_le_bytes(revoked.bytes[..8].try_into().unwrap());
        assert_eq!(last_commit + 1, failed_at);
        if over != Over::Local {
            // Nobody went on placing after the copy was taken.
            assert!(bytes(&world.ring, 0, RING_BYTES) == revoked.bytes, "the ring changed after its revocation");
        }
        // The attempt that failed may have placed its trailer: not known to be committed, never the other way round.
        assert!(in_ring == last_commit || in_ring == failed_at, "ring {in_ring}, committed {last_commit}");
        if in_ring == failed_at {
            assert!(
                revoked.bytes[4096..4096 + BODY].iter().all(|byte| *byte == failed_at as u8),
                "trailer without its body"
            );
        }
    }
}

fn revoking_twice_reads_the_ring_once(over: Over) {
    let mut world = world(over);
    let mut lane = world.lane(CHECKPOINT, 4);
    world.local.write(0, &[5; 100]);
    lane.commit(&world.write(1, 0, 10, 100), soon()).unwrap();
    let first = revoke(&mut *world.owner);
    let second = revoke(&mut *world.owner);
    assert!(second.bytes.is_empty());
    assert_eq!(first.bytes[10..110], [5; 100]);
    assert!(matches!(world.owner.serve_lane(FAULT, soon()), Err(FabricError::TooLate { .. })));
}

fn an_owner_that_goes_away_is_noticed_by_who_waits(over: Over) {
    let mut world = world(over);
    let mut lane = world.lane(FAULT, 4);
    drop(world.owner);
    let error = lane.wait(soon()).unwrap_err();
    assert!(matches!(error, FabricError::PeerClosed { .. }), "{error:?}");
}

fn an_initiator_that_goes_away_is_noticed_by_the_owner(over: Over) {
    let mut world = world(over);
    let (lane, other) = (world.lane(FAULT, 4), world.lane(BULK, 4));
    let readable = |world: &World, wait: Duration| {
        let fd = world.owner.broken().expect("both fabrics can tell");
        let mut fds = [rustix::event::PollFd::from_borrowed_fd(fd, rustix::event::PollFlags::IN)];
        let timeout =
            rustix::event::Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: i64::from(wait.subsec_nanos()) };
        rustix::event::poll(&mut fds, Some(&timeout)).unwrap() == 1
    };
    assert!(!readable(&world, Duration::ZERO), "nothing is broken yet");
    assert!(world.owner.take_failures().is_empty());
    drop(lane);
    assert!(readable(&world, Duration::from_secs(20)));
    let failures = world.owner.take_failures();
    assert!(matches!(failures[..], [FabricError::PeerClosed { lane: FAULT }]), "{failures:?}");
    assert!(world.owner.take_failures().is_empty(), "told once");
    drop(other);
}

fn waiting_for_nothing_ends_at_the_deadline_and_leaves_the_lane_usable(over: Over) {
    let mut world = world(over);
    let mut lane = world.lane(FAULT, 4);
    let begun = std::time::Instant::now();
    let error = lane.wait(Deadline::after(Duration::from_millis(30))).unwrap_err();
    assert!(matches!(error, FabricError::TimedOut { .. }), "{error:?}");
    assert!(begun.elapsed() >= Duration::from_millis(29));
    lane.post_reads(&[world.read(7, 0, 4096)]).unwrap();
    assert_eq!(complete(&mut *lane, 1), [7]);
    world.assert_local(0, 4096);
    let error = world.initiator.open_lane(BULK, 4, Deadline::after(Duration::from_millis(10)));
    assert!(error.is_err(), "a lane that nobody dials");
}

fn exports_and_registrations_come_before_the_first_lane(over: Over) {
    let mut world = world(over);
    let _lane = world.lane(FAULT, 4);
    let (file, mapping) = memory(4096);
    assert!(matches!(world.owner.export_read(&file, &mapping, &[]), Err(FabricError::TooLate { .. })));
    assert!(matches!(world.initiator.register_local(&mapping), Err(FabricError::TooLate { .. })));
}

/// A lane that is stuck behind a peer's unread data does not hold up another.
fn lanes_do_not_wait_for_each_other(over: Over) {
    let mut world = world(over);
    let (mut bulk, mut fault) = (world.lane(BULK, 64), world.lane(FAULT, 4));
    let batch: Vec<_> = (0..64).map(|id| world.read(id, 0, HOLE.offset as usize)).collect();
    bulk.post_reads(&batch).unwrap();
    for id in 0..20 {
        fault.post_reads(&[world.read(id, 4096, 4096)]).unwrap();
        assert_eq!(complete(&mut *fault, 1), [id]);
    }
    assert_eq!(bulk.outstanding(), 64);
    assert_eq!(complete(&mut *bulk, 64).len(), 64);
}

#[derive(Debug, Clone)]
enum Action {
    Reads(Vec<(usize, usize, usize)>),
    Writes(Vec<(usize, usize, usize)>),
    Poll,
    Commit(usize, usize, usize),
}

/// (remote offset, local offset, length), of all sizes.
fn spans(remote: usize) -> impl proptest::strategy::Strategy<Value = (usize, usize, usize)> {
    use proptest::prelude::*;
    let len = prop_oneof![1..64_usize, Just(4096), 1..100_000_usize];
    (len, any::<prop::sample::Index>(), any::<prop::sample::Index>())
        .prop_map(move |(len, from, to)| (from.index(remote - len), to.index(RAM_BYTES / 2 - len), len))
}

/// Reads go to the lower half of local memory, writes come from the upper; the model copies at once.
fn any_mixture_of_operations_leaves_the_bytes_a_plain_copy_would(over: Over) {
    use proptest::prelude::*;
    let reads = prop::collection::vec(spans(HOLE.offset as usize), 1..12).prop_map(Action::Reads);
    let writes = prop::collection::vec(spans(RING_BYTES), 1..12).prop_map(Action::Writes);
    let commit = spans(RING_BYTES).prop_map(|(to, from, len)| Action::Commit(to, from, len));
    let actions =
        prop::collection::vec(prop_oneof![3 => reads, 3 => writes, 2 => Just(Action::Poll), 1 => commit], 1..40);

    let world = std::cell::RefCell::new(world(over));
    let lane = std::cell::RefCell::new(world.borrow_mut().lane(CHECKPOINT, 32));
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(40)
    });
    let outcome = runner.run(&actions, |actions| {
        let (world, mut lane) = (world.borrow(), lane.borrow_mut());
        let half = RAM_BYTES / 2;
        world.local.zero(0, RAM_BYTES);
        let upper: Vec<u8> = (0..half).map(|at| expected(at * 7) | 1).collect();
        world.local.write(half, &upper);
        world.ring.zero(0, RING_BYTES);
        let (mut lower, mut ring, mut ids, mut expected_ids) =
            (vec![0; half], vec![0; RING_BYTES], Vec::new(), Vec::new());
        let mut next = 0;
        let take = |lane: &mut dyn belay_transport::fabric::Lane, all: bool, ids: &mut Vec<u64>| {
            while lane.outstanding() > 0 {
                let mut some = [0; 5];
                lane.wait(soon()).unwrap();
                let got = lane.poll(&mut some).unwrap();
                ids.extend_from_slice(&some[..got]);
                if !all {
                    break;
                }
            }
        };
        for action in actions {
            match action {
                Action::Reads(spans) => {
                    if lane.outstanding() + spans.len() > lane.window() {
                        take(&mut **lane, true, &mut ids);
                    }
                    let batch: Vec<_> = spans
                        .iter()
                        .map(|(from, to, len)| {
                            next += 1;
                            expected_ids.push(next);
                            let mut read = world.read(next, *from, *len);
                            read.local_offset = *to as u64;
                            for at in 0..*len {
                                lower[to + at] = expected(from + at);
                            }
                            read
                        })
                        .collect();
                    lane.post_reads(&batch).unwrap();
                }
                Action::Writes(spans) => {
                    if lane.outstanding() + spans.len() > lane.window() {
                        take(&mut **lane, true, &mut ids);
                    }
                    let batch: Vec<_> = spans
                        .iter()
                        .map(|(to, from, len)| {
                            next += 1;
                            expected_ids.push(next);
                            ring[*to..to + len].copy_from_slice(&upper[*from..from + len]);
                            world.write(next, half + from, *to, *len)
                        })
                        .collect();
                    lane.post_writes(&batch).unwrap();
                }
                Action::Poll => take(&mut **lane, false, &mut ids),
                Action::Commit(to, from, len) => {
                    ring[to..to + len].copy_from_slice(&upper[from..from + len]);
                    lane.commit(&world.write(0, half + from, to, len), soon()).unwrap();
                    // What was not polled is dropped.
                    expected_ids.truncate(ids.len());
                    prop_assert_eq!(lane.outstanding(), 0);
                    prop_assert!(bytes(&world.ring, 0, RING_BYTES) == ring, "the ring at a commit");
                }
            }
        }
        take(&mut **lane, true, &mut ids);
        prop_assert_eq!(&ids, &expected_ids);
        prop_assert!(bytes(&world.local, 0, half) == lower, "what was read");
        prop_assert!(bytes(&world.ring, 0, RING_BYTES) == ring, "what was written");
        Ok(())
    });
    outcome.unwrap();
}
