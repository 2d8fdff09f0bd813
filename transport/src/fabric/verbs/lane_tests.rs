//! A lane's logic against the pretended device: posting, order, windows, commits, wake-ups, and the name of every end.

use super::device::AsyncEvent;
use super::error::VerbsError;
use super::fake_device::{FakeDevice, FakeRegion};
use super::fate::{Cause, Fate};
use super::lane::{Locals, Parts, SharedTable, VerbsLane};
use super::table::{ExportTable, RemoteTable, Span};
use crate::deadline::Deadline;
use crate::fabric::exports::Right;
use crate::fabric::{
    FabricError, Lane, LaneId, LaneKind, LocalKey, MAX_OPERATION_BYTES, Read, ReadKey, RefusedReason, Write, WriteKey,
};
use crate::region::Mapping;
use crate::session::wait_for;
use belay_verbs_sys::ibv_wc_status as status;
use proptest::prelude::*;
use rustix::event::PollFlags;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const RAM: u64 = 0x5100;
const RING: u64 = 0x5101;
const BYTES: usize = 64 << 10;
/// Where chunks end: in guest RAM at the owner, in the ring, and here. None of them fall together.
const RAM_CHUNKS: [u64; 3] = [12_288, 20_480, 1 << 16];
const RING_CHUNKS: [u64; 2] = [28_672, 1 << 16];
const LOCAL_CHUNKS: [u64; 3] = [4096, 36_864, 1 << 16];
const MAX_MESSAGE: u32 = 9000;

fn mapping(len: usize) -> Arc<Mapping> {
    let fd = memfd_create("lane-test", MemfdFlags::CLOEXEC).expect("memfd");
    ftruncate(&fd, len as u64).expect("ftruncate");
    Arc::new(Mapping::read_write(&fd, len).expect("mmap"))
}

/// Spans that end at `ends`, each with a key and an address of its own.
fn spans(base: u32, ends: &[u64]) -> Vec<Span> {
    let mut offset = 0;
    let span = |(at, end): (usize, &u64)| {
        let key = base + at as u32;
        let span = Span { offset, len: end - offset, address: u64::from(key) << 32, key };
        offset = *end;
        span
    };
    ends.iter().enumerate().map(span).collect()
}

fn regions(spans: &[Span], mapping: &Arc<Mapping>, right: Option<Right>) -> Vec<FakeRegion> {
    let region = |span: &Span| FakeRegion {
        key: span.key,
        address: span.address,
        len: span.len,
        mapping: Arc::clone(mapping),
        offset: span.offset,
        right,
    };
    spans.iter().map(region).collect()
}

struct World {
    device: Arc<FakeDevice>,
    lane: VerbsLane,
    fate: Arc<Fate>,
    table: Arc<SharedTable>,
    exports: Vec<ExportTable>,
    ram: Arc<Mapping>,
    ring: Arc<Mapping>,
    local: Arc<Mapping>,
}

struct Options {
    kind: LaneKind,
    window: usize,
    depth: u32,
    iwarp: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { kind: LaneKind::Checkpoint, window: 16, depth: 64, iwarp: false }
    }
}

fn world(options: &Options) -> World {
    let (ram, ring, local, back) = (mapping(BYTES), mapping(BYTES), mapping(BYTES), mapping(4096));
    let (ram_spans, ring_spans) = (spans(100, &RAM_CHUNKS), spans(200, &RING_CHUNKS));
    let (local_spans, back_spans) = (spans(300, &LOCAL_CHUNKS), spans(400, &[4096]));
    let mut all = regions(&ram_spans, &ram, Some(Right::Read));
    all.extend(regions(&ring_spans, &ring, Some(Right::Write)));
    all.extend(regions(&local_spans, &local, None));
    all.extend(regions(&back_spans, &back, None));
    let device = FakeDevice::new(options.depth, all);
    device.state().lazy_writes = options.iwarp;
    let exports = vec![
        ExportTable { key: RAM << 8, writable: false, spans: ram_spans },
        ExportTable { key: RING << 8 | 1, writable: true, spans: ring_spans },
    ];
    let table = Arc::new(SharedTable::new(RemoteTable::checked(exports.clone()).expect("a table"), 1));
    let fate = Arc::new(Fate::new().expect("eventfd"));
    let locals = Locals {
        mappings: vec![Arc::clone(&local)],
        spans: vec![local_spans.into(), back_spans.into()],
        read_back: options.iwarp.then_some(1),
        _regions: Mutex::new(Vec::new()),
    };
    let lane = VerbsLane::new(Parts {
        id: LaneId { kind: options.kind, index: 0 },
        queue_pair: device.queue_pair(64),
        window: options.window,
        depth: options.depth,
        max_message: MAX_MESSAGE,
        device: "fake0".to_owned(),
        port: 1,
        locals: Arc::new(locals),
        table: Arc::clone(&table),
        fate: Arc::clone(&fate),
        session: Box::new(()),
    })
    .expect("a lane");
    World { device, lane, fate, table, exports, ram, ring, local }
}

fn read(id: u64, from: u64, to: u64, len: u32) -> Read {
    Read { id, remote: ReadKey(RAM << 8), remote_offset: from, local: LocalKey(0), local_offset: to, len }
}

fn write(id: u64, from: u64, to: u64, len: u32) -> Write {
    Write { id, remote: WriteKey(RING << 8 | 1), remote_offset: to, local: LocalKey(0), local_offset: from, len }
}

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(10))
}

fn now() -> Deadline {
    Deadline::after(Duration::ZERO)
}

fn bytes(mapping: &Mapping, offset: u64, len: u32) -> Vec<u8> {
    let mut out = vec![0; len as usize];
    mapping.read(offset as usize, &mut out);
    out
}

fn fill(mapping: &Mapping, seed: u64) {
    let all: Vec<u8> =
        (0..BYTES as u64).map(|at| ((at + seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect();
    mapping.write(0, &all);
}

fn take_all(lane: &mut VerbsLane) -> Vec<u64> {
    let mut ids = Vec::new();
    while lane.outstanding() > 0 {
        lane.wait(soon()).expect("completes");
        let mut some = [0; 3];
        let got = lane.poll(&mut some).expect("completes");
        ids.extend_from_slice(&some[..got]);
    }
    ids
}

#[test]
fn a_batch_goes_out_with_one_doorbell() {
    let mut w = world(&Options { kind: LaneKind::Fault, ..Options::default() });
    let batch: Vec<_> = (0..8).map(|at| read(at, at * 512, at * 512, 512)).collect();
    w.lane.post_reads(&batch).unwrap();
    {
        let state = w.device.state();
        assert_eq!(state.doorbells.len(), 1);
        assert_eq!(state.doorbells[0].len(), 8);
        assert!(state.doorbells[0].iter().all(|posted| posted.signalled), "somebody waits for each demand read");
    }
    assert_eq!(take_all(&mut w.lane), (0..8).collect::<Vec<_>>());
}

#[test]
fn only_the_last_of_a_chain_asks_for_a_completion_where_nobody_waits_for_each() {
    let mut w = world(&Options::default());
    let batch: Vec<_> = (0..8).map(|at| write(at, at * 100, at * 100, 100)).collect();
    w.lane.post_writes(&batch).unwrap();
    let signalled: Vec<_> = w.device.state().doorbells[0].iter().map(|posted| posted.signalled).collect();
    assert_eq!(signalled, [false, false, false, false, false, false, false, true]);
    assert_eq!(take_all(&mut w.lane), (0..8).collect::<Vec<_>>());
}

#[test]
fn short_writes_go_inline_and_their_memory_may_be_used_again_at_once() {
    let mut w = world(&Options::default());
    w.device.state().budget = Some(0);
    w.local.write(0, b"heartbeat 1");
    w.lane.post_writes(&[write(1, 0, 0, 11), write(2, 0, 4096, 65)]).unwrap();
    w.local.write(0, b"heartbeat 2");
    w.device.release(None);
    assert_eq!(take_all(&mut w.lane), [1, 2]);
    let inline: Vec<_> = w.device.state().doorbells[0].iter().map(|posted| posted.inline.is_some()).collect();
    assert_eq!(inline, [true, false], "64 bytes are what this device takes");
    assert_eq!(bytes(&w.ring, 0, 11), b"heartbeat 1");
}

#[test]
fn a_full_window_is_refused_whole_and_more_than_the_send_queue_holds_waits_its_turn() {
    let mut w = world(&Options { window: 12, depth: 5, ..Options::default() });
    fill(&w.ram, 1);
    let batch: Vec<_> = (0..12).map(|at| read(at, at * 5000, at * 5000, 5000)).collect();
    let error = w.lane.post_reads(&[&batch[..], &batch[..1]].concat()).unwrap_err();
    assert!(matches!(error, FabricError::WindowFull { asked: 13, outstanding: 0, window: 12 }), "{error}");
    assert!(w.device.state().doorbells.is_empty(), "nothing of a refused batch is posted");
    w.lane.post_reads(&batch).unwrap();
    assert_eq!(w.device.state().doorbells.iter().map(Vec::len).sum::<usize>(), 5);
    assert_eq!(w.lane.outstanding(), 12);
    assert_eq!(take_all(&mut w.lane), (0..12).collect::<Vec<_>>());
    assert!(bytes(&w.local, 0, 60_000) == bytes(&w.ram, 0, 60_000));
}

#[test]
fn what_the_table_does_not_allow_is_refused_before_it_is_posted_and_breaks_nothing() {
    let mut w = world(&Options::default());
    let refused = |lane: &mut VerbsLane, bad: Read| lane.post_reads(&[read(1, 0, 0, 8), bad]).unwrap_err();
    let other = |key| Read { remote: ReadKey(key), ..read(2, 0, 0, 8) };
    for key in [RAM << 8 ^ 0x100, RING << 8 | 1, 0xff, u64::MAX] {
        assert!(matches!(refused(&mut w.lane, other(key)), FabricError::UnknownKey { .. }), "{key:#x}");
    }
    for (offset, len) in [(BYTES as u64 - 7, 8), (u64::MAX, 1), (u64::MAX - 7, 8), (BYTES as u64, 1)] {
        assert!(matches!(refused(&mut w.lane, read(2, offset, 0, len)), FabricError::OutOfRange { .. }));
        assert!(matches!(refused(&mut w.lane, read(2, 0, offset, len)), FabricError::OutOfRange { .. }));
    }
    for len in [0, MAX_OPERATION_BYTES + 1] {
        assert!(matches!(refused(&mut w.lane, read(2, 0, 0, len)), FabricError::BadLength { .. }));
    }
    let local = Read { local: LocalKey(1), ..read(2, 0, 0, 8) };
    assert!(
        matches!(refused(&mut w.lane, local), FabricError::UnknownKey { .. }),
        "the place of READ-backs has no key"
    );
    let wrong = Write { remote: WriteKey(RAM << 8), ..write(1, 0, 0, 8) };
    assert!(matches!(w.lane.post_writes(&[wrong]), Err(FabricError::UnknownKey { .. })));
    assert!(w.device.state().doorbells.is_empty());
    w.lane.post_reads(&[read(3, 0, 0, 8)]).unwrap();
    assert_eq!(take_all(&mut w.lane), [3]);
}

#[test]
fn a_hole_in_the_table_is_not_read_and_is_read_once_the_owner_offers_it() {
    let mut w = world(&Options::default());
    fill(&w.ram, 3);
    let mut holed = w.exports.clone();
    let hole = holed[0].spans.remove(1);
    w.table.replace(RemoteTable::checked(holed).unwrap(), 2);
    for (from, len) in [(hole.offset, 1), (hole.offset - 1, 2), (hole.offset + hole.len - 1, 2), (0, 65_536)] {
        let error = w.lane.post_reads(&[read(1, from, 0, len)]).unwrap_err();
        assert!(matches!(error, FabricError::OutOfRange { .. }), "{from}+{len}: {error}");
    }
    w.table.replace(RemoteTable::checked(w.exports.clone()).unwrap(), 3);
    w.lane.post_reads(&[read(1, 0, 0, 65_536)]).unwrap();
    assert_eq!(take_all(&mut w.lane), [1]);
    assert!(bytes(&w.local, 0, 65_536) == bytes(&w.ram, 0, 65_536));
}

#[test]
fn an_owner_that_takes_back_what_is_being_read_breaks_the_lane_and_nothing_else() {
    let mut w = world(&Options { depth: 1, ..Options::default() });
    w.device.state().budget = Some(0);
    w.lane.post_reads(&[read(1, 0, 0, 8), read(2, 0, 8, 65_000)]).unwrap();
    let mut holed = w.exports.clone();
    holed[0].spans.truncate(1);
    w.table.replace(RemoteTable::checked(holed).unwrap(), 2);
    // The next admission takes the new table; what was admitted under the old one is posted by it.
    let error = w.lane.post_reads(&[read(3, 0, 0, 1)]).and_then(|()| {
        w.device.release(None);
        w.lane.wait(soon()).and_then(|()| w.lane.poll(&mut [0; 4])).and_then(|_| w.lane.wait(soon()))
    });
    assert!(matches!(error, Err(FabricError::Verbs(VerbsError::BadTable { .. }))), "{error:?}");
    assert!(matches!(w.lane.poll(&mut [0]), Err(FabricError::Broken { .. })));
}

/// Posts three reads of which the second fails with `how`.
fn fail_with(w: &mut World, how: u32) -> FabricError {
    w.device.state().fail = Some((1, how));
    w.lane.post_reads(&[read(7, 0, 0, 8), read(8, 0, 8, 8), read(9, 0, 16, 8)]).unwrap();
    assert_eq!(w.lane.poll(&mut [0; 4]).unwrap(), 1, "what completed before the failure did complete");
    let error = w.lane.poll(&mut [0; 4]).unwrap_err();
    assert!(matches!(w.lane.poll(&mut [0; 4]), Err(FabricError::Broken { .. })));
    assert!(matches!(w.lane.post_reads(&[read(1, 0, 0, 8)]), Err(FabricError::Broken { .. })));
    assert!(matches!(w.lane.wait(now()), Err(FabricError::Broken { .. })));
    assert!(matches!(w.lane.commit(&write(1, 0, 0, 8), now()), Err(FabricError::Broken { .. })));
    assert!(matches!(w.lane.arm(), Err(FabricError::Broken { .. })));
    error
}

fn demand() -> World {
    world(&Options { kind: LaneKind::Fault, ..Options::default() })
}

#[test]
fn every_status_of_a_device_has_a_name_and_the_operation_it_struck() {
    let named = |how| fail_with(&mut demand(), how);
    assert!(matches!(named(status::IBV_WC_RETRY_EXC_ERR), FabricError::Verbs(VerbsError::Unreachable { .. })));
    assert!(matches!(named(status::IBV_WC_RNR_RETRY_EXC_ERR), FabricError::Verbs(VerbsError::ReceiverNotReady { .. })));
    let refused = named(status::IBV_WC_REM_ACCESS_ERR);
    assert!(matches!(refused, FabricError::Refused { id: 8, reason: RefusedReason::ByDevice, .. }), "{refused:?}");
    let protection = named(status::IBV_WC_LOC_PROT_ERR);
    assert!(
        matches!(protection, FabricError::Verbs(VerbsError::LocalProtection { id: 8, vendor: 0x51, .. })),
        "{protection:?}"
    );
    let unsent = named(status::IBV_WC_LOC_QP_OP_ERR);
    assert!(matches!(unsent, FabricError::Verbs(VerbsError::NotSent { id: 8, .. })), "{unsent:?}");
    assert!(matches!(named(status::IBV_WC_WR_FLUSH_ERR), FabricError::Verbs(VerbsError::Flushed { .. })));
    assert!(matches!(named(status::IBV_WC_FATAL_ERR), FabricError::Verbs(VerbsError::DeviceLost { .. })));
    let other = named(status::IBV_WC_BAD_RESP_ERR).to_string();
    assert!(other.contains("BAD_RESP_ERR") && other.contains("status 7"), "{other}");
    assert!(named(99).to_string().contains("status 99"));
}

#[test]
fn silence_and_what_cannot_be_sent_with_the_port_down_are_told_as_that() {
    let mut w = demand();
    w.fate.hear(AsyncEvent::PortDown(2), 0, 0, 1);
    w.fate.hear(AsyncEvent::PortDown(1), 0, 0, 1);
    let error = fail_with(&mut w, status::IBV_WC_RETRY_EXC_ERR);
    assert!(matches!(error, FabricError::Verbs(VerbsError::PortDown { port: 1, .. })), "{error:?}");
    for other in [status::IBV_WC_LOC_QP_OP_ERR, status::IBV_WC_WR_FLUSH_ERR] {
        let mut w = demand();
        w.fate.hear(AsyncEvent::PortDown(1), 0, 0, 1);
        let error = fail_with(&mut w, other);
        assert!(matches!(error, FabricError::Verbs(VerbsError::PortDown { .. })), "status {other}: {error:?}");
    }
    let mut w = demand();
    w.fate.hear(AsyncEvent::PortDown(1), 0, 0, 1);
    w.fate.hear(AsyncEvent::PortUp(1), 0, 0, 1);
    let error = fail_with(&mut w, status::IBV_WC_RETRY_EXC_ERR);
    assert!(matches!(error, FabricError::Verbs(VerbsError::Unreachable { .. })), "it came back: {error:?}");
}

#[test]
fn a_flush_is_told_by_its_cause() {
    let named = |cause| {
        let mut w = demand();
        w.device.state().fail = Some((0, status::IBV_WC_WR_FLUSH_ERR));
        w.fate.end(cause);
        w.fate.end(Cause::DeviceLost);
        w.lane.post_reads(&[read(1, 0, 0, 8)]).unwrap();
        w.lane.poll(&mut [0]).unwrap_err()
    };
    assert!(matches!(named(Cause::PeerClosed), FabricError::PeerClosed { .. }), "the first cause is the cause");
    assert!(matches!(named(Cause::QueuePair), FabricError::Verbs(VerbsError::QueuePair { .. })));
    assert!(matches!(named(Cause::CompletionQueue), FabricError::Verbs(VerbsError::CompletionQueue { .. })));
    assert!(matches!(named(Cause::DeviceLost), FabricError::Verbs(VerbsError::DeviceLost { .. })));
}

#[test]
fn events_of_the_device_reach_the_lane_they_are_about() {
    let fate = Fate::new().unwrap();
    fate.hear(AsyncEvent::QueuePair(0x10), 0x20, 0x30, 1);
    fate.hear(AsyncEvent::CompletionQueue(0x20), 0x20, 0x30, 1);
    assert_eq!(fate.cause(), None);
    fate.hear(AsyncEvent::CompletionQueue(0x30), 0x20, 0x30, 1);
    assert_eq!(fate.cause(), Some(Cause::CompletionQueue));
    let fate = Fate::new().unwrap();
    fate.hear(AsyncEvent::QueuePair(0x20), 0x20, 0x30, 1);
    assert_eq!(fate.cause(), Some(Cause::QueuePair));
}

#[test]
fn a_completion_of_nothing_is_the_devices_fault_and_not_an_operation() {
    let mut w = demand();
    w.device.state().budget = Some(0);
    w.lane.post_reads(&[read(1, 0, 0, 8)]).unwrap();
    w.device.complete_falsely(5);
    let error = w.lane.poll(&mut [0]).unwrap_err();
    assert!(matches!(error, FabricError::Protocol { .. }), "{error:?}");
}

#[test]
fn who_waits_with_nothing_outstanding_is_woken_by_the_end_of_the_peer() {
    let mut w = demand();
    let begun = std::time::Instant::now();
    let fate = Arc::clone(&w.fate);
    let teller = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        fate.end(Cause::PeerClosed);
    });
    let error = w.lane.wait(soon()).unwrap_err();
    assert!(matches!(error, FabricError::PeerClosed { .. }), "{error:?}");
    assert!(begun.elapsed() < Duration::from_secs(5), "woken, not timed out");
    teller.join().unwrap();
}

#[test]
fn the_end_of_the_peer_makes_the_descriptor_readable_and_comes_after_what_has_completed() {
    let mut w = demand();
    w.lane.post_reads(&[read(1, 0, 0, 8), read(2, 0, 0, 8)]).unwrap();
    w.fate.end(Cause::PeerClosed);
    assert!(wait_for(w.lane.readiness().unwrap(), PollFlags::IN, now()).unwrap());
    let mut done = [0; 4];
    assert_eq!(w.lane.poll(&mut done).unwrap(), 2);
    assert!(matches!(w.lane.poll(&mut done), Err(FabricError::PeerClosed { .. })));
}

#[test]
fn arming_tells_of_what_completed_meanwhile_and_the_descriptor_of_what_completes_later() {
    let mut w = demand();
    w.device.state().budget = Some(0);
    let readable = |lane: &VerbsLane| wait_for(lane.readiness().unwrap(), PollFlags::IN, now()).unwrap();
    for round in 0..50_u64 {
        w.lane.post_reads(&[read(round, 0, 0, 8)]).unwrap();
        if round % 3 == 0 {
            // Completed before it is armed.
            w.device.release(Some(1));
            assert!(w.lane.arm().unwrap(), "round {round}");
        } else {
            assert!(!w.lane.arm().unwrap(), "round {round}: nothing has completed");
            // Armed twice is armed once.
            assert!(!w.lane.arm().unwrap());
            assert!(!readable(&w.lane), "round {round}: nothing to wake up for");
            w.device.release(Some(1));
            assert!(readable(&w.lane), "round {round}: a completion that nobody is woken for");
        }
        let mut done = [0; 2];
        assert_eq!((w.lane.poll(&mut done).unwrap(), done[0]), (1, round));
        assert!(w.device.state().notifications <= 1, "each is taken before the next is asked for");
    }
}

#[test]
fn a_wait_sleeps_and_is_woken_by_the_completion() {
    let mut w = demand();
    w.device.state().budget = Some(0);
    w.lane.post_reads(&[read(1, 0, 0, 8)]).unwrap();
    let error = w.lane.wait(Deadline::after(Duration::from_millis(5))).unwrap_err();
    assert!(matches!(error, FabricError::TimedOut { .. }), "{error}");
    let device = Arc::clone(&w.device);
    let other = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        device.release(Some(1));
    });
    w.lane.wait(soon()).unwrap();
    other.join().unwrap();
    assert_eq!(w.lane.poll(&mut [0; 2]).unwrap(), 1, "a wait that timed out leaves the lane usable");
}

#[test]
fn a_commit_returns_when_the_trailer_has_completed_and_not_before() {
    let mut w = world(&Options::default());
    fill(&w.local, 9);
    w.device.state().budget = Some(0);
    let batch: Vec<_> = (0..15).map(|at| write(at, at * 3000, at * 3000, 3000)).collect();
    w.lane.post_writes(&batch).unwrap();
    w.lane.post_reads(&[read(15, 0, 60_000, 100)]).unwrap();
    let requests = w.device.state().doorbells.iter().map(Vec::len).sum::<usize>();
    // All but the trailer.
    w.device.release(Some(requests));
    let error = w.lane.commit(&write(99, 8, 50_000, 8), Deadline::after(Duration::from_millis(5))).unwrap_err();
    assert!(matches!(error, FabricError::TimedOut { .. }), "{error}");
    assert_eq!(bytes(&w.ring, 50_000, 8), [0; 8]);
    assert!(matches!(w.lane.poll(&mut [0]), Err(FabricError::Broken { .. })), "whether it was placed is unknown");

    let mut w = world(&Options::default());
    fill(&w.local, 9);
    w.lane.post_writes(&batch).unwrap();
    w.lane.post_reads(&[read(15, 0, 60_000, 100)]).unwrap();
    w.lane.commit(&write(99, 8, 50_000, 8), soon()).unwrap();
    assert_eq!(bytes(&w.ring, 50_000, 8), bytes(&w.local, 8, 8));
    assert!(bytes(&w.ring, 0, 45_000) == bytes(&w.local, 0, 45_000));
    assert_eq!((w.lane.outstanding(), w.lane.poll(&mut [0; 4]).unwrap()), (0, 0), "what was not polled is dropped");
}

#[test]
fn a_commit_on_iwarp_reads_its_trailer_back_because_a_write_completes_before_it_is_placed() {
    for len in [1, 8, 32, 9001] {
        let mut w = world(&Options { iwarp: true, ..Options::default() });
        fill(&w.local, 5);
        w.lane.post_writes(&[write(1, 0, 0, 30_000)]).unwrap();
        w.lane.wait(soon()).unwrap();
        assert_eq!(bytes(&w.ring, 0, 100), [0; 100], "completed and not placed: this is iWARP");
        w.lane.commit(&write(2, 30_000, 28_600, len), soon()).unwrap();
        assert!(bytes(&w.ring, 0, 28_600) == bytes(&w.local, 0, 28_600), "{len}");
        assert!(bytes(&w.ring, 28_600, len) == bytes(&w.local, 30_000, len), "{len}");
    }
}

#[test]
fn a_commit_whose_batch_fails_is_not_a_commit() {
    let mut w = world(&Options::default());
    w.device.state().fail = Some((1, status::IBV_WC_REM_ACCESS_ERR));
    let batch: Vec<_> = (0..4).map(|at| write(at, at * 100, at * 100, 100)).collect();
    w.lane.post_writes(&batch).unwrap();
    let error = w.lane.commit(&write(9, 0, 0, 8), soon()).unwrap_err();
    assert!(matches!(error, FabricError::Refused { .. }), "{error:?}");
}

#[derive(Debug, Clone)]
enum Action {
    Reads(Vec<(u64, u64, u32)>),
    Writes(Vec<(u64, u64, u32)>),
    Release(usize),
    Poll(usize),
    Commit(u64, u64, u32),
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    let half = BYTES as u64 / 2;
    let span = move || {
        (1..12_000_u32, any::<prop::sample::Index>(), any::<prop::sample::Index>()).prop_map(move |(len, a, b)| {
            let room = (half - u64::from(len)) as usize;
            (a.index(room) as u64, b.index(room) as u64, len)
        })
    };
    let action = prop_oneof![
        3 => prop::collection::vec(span(), 1..6).prop_map(Action::Reads),
        3 => prop::collection::vec(span(), 1..6).prop_map(Action::Writes),
        3 => (1..20_usize).prop_map(Action::Release),
        3 => (1..5_usize).prop_map(Action::Poll),
        1 => span().prop_map(|(from, to, len)| Action::Commit(from, to, len)),
    ];
    prop::collection::vec(action, 1..40)
}

proptest! {
    /// Reads go to the lower half of local memory, writes come from the upper. The device completes whenever it likes.
    #[test]
    fn any_mixture_leaves_the_bytes_a_plain_copy_would_in_posting_order(
        actions in actions(),
        depth in 1..20_u32,
        iwarp in any::<bool>(),
        fault in any::<bool>(),
    ) {
        let half = BYTES as u64 / 2;
        let kind = if fault { LaneKind::Fault } else { LaneKind::Checkpoint };
        let mut w = world(&Options { kind, window: 12, depth, iwarp });
        fill(&w.ram, 1);
        fill(&w.local, 2);
        w.local.zero(0, half as usize);
        w.device.state().budget = Some(0);
        let (mut lower, mut ring) = (vec![0; half as usize], vec![0; BYTES]);
        let upper = bytes(&w.local, half, half as u32);
        let ram = bytes(&w.ram, 0, BYTES as u32);
        let (mut posted, mut done, mut next) = (Vec::new(), Vec::new(), 0);
        let at = |offset: u64, len: u32| offset as usize..offset as usize + len as usize;
        for action in actions {
            match action {
                Action::Reads(spans) | Action::Writes(spans) if w.lane.outstanding() + spans.len() > 12 => {
                    let batch = vec![read(0, 0, 0, 1); spans.len()];
                    let refused = matches!(w.lane.post_reads(&batch), Err(FabricError::WindowFull { .. }));
                    prop_assert!(refused);
                }
                Action::Reads(spans) => {
                    let batch: Vec<_> = spans.iter().map(|&(from, to, len)| {
                        next += 1;
                        lower[at(to, len)].copy_from_slice(&ram[at(from, len)]);
                        read(next, from, to, len)
                    }).collect();
                    posted.extend(batch.iter().map(|read| read.id));
                    w.lane.post_reads(&batch).unwrap();
                }
                Action::Writes(spans) => {
                    let batch: Vec<_> = spans.iter().map(|&(from, to, len)| {
                        next += 1;
                        ring[at(to, len)].copy_from_slice(&upper[at(from, len)]);
                        write(next, half + from, to, len)
                    }).collect();
                    posted.extend(batch.iter().map(|write| write.id));
                    w.lane.post_writes(&batch).unwrap();
                }
                Action::Release(count) => w.device.release(Some(count)),
                Action::Poll(count) => {
                    let mut some = [0; 5];
                    let got = w.lane.poll(&mut some[..count]).unwrap();
                    done.extend_from_slice(&some[..got]);
                }
                Action::Commit(from, to, len) => {
                    ring[at(to, len)].copy_from_slice(&upper[at(from, len)]);
                    let device = Arc::clone(&w.device);
                    device.release(Some(1_000_000));
                    w.lane.commit(&write(0, half + from, to, len), soon()).unwrap();
                    device.state().budget = Some(0);
                    posted.truncate(done.len());
                    prop_assert_eq!(w.lane.outstanding(), 0);
                    prop_assert!(bytes(&w.ring, 0, BYTES as u32) == ring, "the ring at a commit");
                }
            }
            prop_assert_eq!(posted.len() - done.len(), w.lane.outstanding());
            prop_assert!(posted.starts_with(&done), "out of order");
        }
        w.device.release(Some(1_000_000));
        done.extend(take_all(&mut w.lane));
        prop_assert_eq!(&done, &posted);
        prop_assert!(bytes(&w.local, 0, half as u32) == lower, "what was read");
        if !iwarp {
            prop_assert!(bytes(&w.ring, 0, BYTES as u32) == ring, "what was written");
        }
    }
}
