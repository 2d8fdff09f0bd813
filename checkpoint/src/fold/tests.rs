//! What folding and catching promise, end to end over a ring.

use super::*;
use crate::guest::RamBlock;
use crate::record::build::Image;
use crate::record::{CRITICAL, HEADER, SegmentHeader, encoding, kind};
use crate::ring::{OwnerRegion, RingBytes, RingReader, SEGMENTS_OFFSET, ShipError};
use crate::testing::*;
use belay_transport::fabric::FabricError;
use belay_transport::{PAGE_SIZE, PageIndex, RegionId};
use proptest::prelude::*;
use std::sync::Mutex;
use std::time::{Duration, Instant};
use zerocopy::FromBytes;

const SHAPE: [usize; 2] = [40, 24];
const RING: usize = (SEGMENTS_OFFSET + 9 * 4224).next_multiple_of(4096);
const OVERFLOW: usize = 512 << 10;

fn state(memory: &[RamBlock]) -> FoldState {
    let target = FoldTarget::new(memory).unwrap();
    let limits = Limits::for_regions(target.regions().collect::<Vec<_>>());
    FoldState::new(target, limits, b"state at the switch".to_vec())
}

fn folder(wire: &Wire, memory: &[RamBlock]) -> Folder {
    let reader = RingReader::new(wire.ring().len(), NONCE, OVERFLOW).unwrap();
    Folder::start(FoldConfig::default(), wire.ring(), OwnerRegion::new(wire.owner()), reader, state(memory)).unwrap()
}

fn packet(sequence: u64) -> Packet {
    Packet { sequence, bytes: vec![sequence as u8; 40] }
}

/// What one epoch of the model guest does.
#[derive(Debug, Clone)]
struct Doing {
    writes: Vec<(u16, u64, u8)>,
    discards: Vec<(u16, u64)>,
    packets: u64,
}

fn doing() -> impl Strategy<Value = Doing> {
    let page = prop_oneof![(Just(0u16), 0..SHAPE[0] as u64), (Just(1u16), 0..SHAPE[1] as u64)];
    let write = (page.clone(), any::<u8>()).prop_map(|((region, page), byte)| (region, page, byte));
    let writes = prop_oneof![prop::collection::vec(write.clone(), 0..6), prop::collection::vec(write, 20..90)];
    (writes, prop::collection::vec(page, 0..4), 0..3u64).prop_map(|(writes, discards, packets)| Doing {
        writes,
        discards,
        packets,
    })
}

/// What the source must have after a catch at an epoch.
struct Truth {
    ram: Vec<u8>,
    device_state: Vec<u8>,
    emitted: u64,
}

/// Lets the model guest do one epoch in the destination's RAM; what to send of it.
fn run_epoch(memory: &[RamBlock], epoch: Epoch, doing: &Doing, emitted: &mut u64, released: Option<u64>) -> Content {
    let mut content = Content { device_state: format!("state of {epoch}").into_bytes(), ..Content::default() };
    for &(region, page) in &doing.discards {
        memory[region as usize].alias.zero(PageIndex(page).offset(), PAGE_SIZE);
        content.discards.push((region, page));
    }
    for &(region, page, byte) in &doing.writes {
        memory[region as usize].alias.write(PageIndex(page).offset() + byte as usize, &[byte; 99]);
        content.dirty.push((region, page));
        content.discards.retain(|&at| at != (region, page));
    }
    for _ in 0..doing.packets {
        *emitted += 1;
        content.outputs.push(packet(*emitted));
    }
    content.released_up_to = released;
    content
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    /// P3, P4 and P5 in one: whatever the sizes (also larger than the ring and the slot) and wherever the destination dies or is
    /// revoked, the source has the newest committed epoch whole, at least the newest one whose commit was reported, and the
    /// output that epoch covers.
    #[test]
    fn p3_a_catch_recovers_the_newest_committed_epoch_whole_wherever_the_destination_dies(
        epochs in prop::collection::vec(doing(), 1..10),
        life in prop_oneof![1 => Just(u64::MAX), 6 => 0u64..1_500_000],
        slot in prop_oneof![Just(5 * 4224usize), Just(64 << 10)],
        in_place in any::<bool>(),
    ) {
        let (here, there, mut wire) = (ram(&SHAPE), ram(&SHAPE), Wire::new(RING));
        let folder = folder(&wire, &there);
        let mut sender = Sender::new(&mut wire, slot);
        wire.dies_after(life);
        let mut emitted = 0;
        let mut truths = vec![Truth { ram: bytes_of(&here), device_state: b"state at the switch".to_vec(), emitted }];
        let (mut reported, mut released) = (Epoch(0), None);
        for (at, doing) in epochs.iter().enumerate() {
            let epoch = Epoch(at as u64 + 1);
            let content = run_epoch(&here, epoch, doing, &mut emitted, released);
            truths.push(Truth { ram: bytes_of(&here), device_state: content.device_state.clone(), emitted });
            match sender.send(epoch, &here, &content) {
                Ok(shipped) => {
                    prop_assert_eq!(shipped.committed, Some(epoch));
                    reported = epoch;
                    released = Some(emitted).filter(|_| emitted > 0 && epoch.0.is_multiple_of(2)).or(released);
                }
                Err(error) => {
                    prop_assert!(matches!(error, ShipError::Fabric(FabricError::PeerClosed { .. })), "{}", error);
                    break;
                }
            }
        }
        let catch = folder.stop();
        let recovered = finish(catch, &wire.revoke(), in_place).unwrap();
        prop_assert!(recovered.epoch >= reported, "{} recovered, {} reported", recovered.epoch, reported);
        let truth = &truths[recovered.epoch.0 as usize];
        prop_assert!(bytes_of(&there) == truth.ram, "RAM is not that of {}", recovered.epoch);
        prop_assert_eq!(recovered.device_state, truth.device_state.clone());
        // What the records say was released is all that may be missing from what is sent again.
        let again: Vec<_> = recovered.outputs_to_resend.iter().map(|packet| packet.sequence).collect();
        let first = again.first().copied().unwrap_or(truth.emitted + 1);
        prop_assert!(again.iter().copied().eq(first..=truth.emitted), "{:?} of {}", again, truth.emitted);
        prop_assert!(first <= released.unwrap_or(0) + 1, "packet {} is lost", first - 1);
        prop_assert!(recovered.outputs_to_resend.iter().all(|again| *again == packet(again.sequence)));
    }
}

#[test]
fn a_catch_before_any_commit_gives_the_state_at_the_switch() {
    let (there, mut wire) = (ram(&SHAPE), Wire::new(RING));
    there[0].alias.write(5000, b"as it was");
    let before = bytes_of(&there);
    let folder = folder(&wire, &there);
    let mut sender = Sender::new(&mut wire, 64 << 10);
    wire.dies_after(4400);
    let content = Content { dirty: (0..9).map(|page| (0, page)).collect(), ..Content::default() };
    sender.send(Epoch(1), &ram(&SHAPE), &content).unwrap_err();
    let recovered = folder.stop().finish(&wire.revoke()[..]).unwrap();
    assert_eq!((recovered.epoch, &recovered.device_state[..]), (Epoch(0), &b"state at the switch"[..]));
    assert!(recovered.outputs_to_resend.is_empty() && recovered.folded_pages == 0);
    assert!(bytes_of(&there) == before);
}

#[test]
fn p5_a_commit_that_is_reported_is_in_what_revocation_hands_back() {
    let here = ram(&SHAPE);
    for (delay_us, in_place) in [0, 50, 200, 500, 900].into_iter().flat_map(|us| [(us, false), (us, true)]) {
        let (there, mut wire) = (ram(&SHAPE), Wire::new(RING));
        let folder = folder(&wire, &there);
        let mut sender = Sender::new(&mut wire, 64 << 10);
        let content =
            Content { dirty: (0..5).map(|page| (0, page)).collect(), device_state: vec![1], ..Content::default() };
        let (recovered, reported) = std::thread::scope(|scope| {
            let shipping = scope.spawn(|| {
                let mut reported = Epoch(0);
                while let Ok(shipped) = sender.send(reported.next(), &here, &content) {
                    reported = shipped.committed.unwrap();
                }
                reported
            });
            let until = Instant::now() + Duration::from_micros(delay_us);
            while Instant::now() < until {
                std::hint::spin_loop();
            }
            let catch = folder.stop();
            let recovered = finish(catch, &wire.revoke(), in_place).unwrap();
            (recovered, shipping.join().unwrap())
        });
        assert_eq!(recovered.epoch, reported, "what was in the ring at revocation was reported, and nothing else");
    }
}

#[test]
fn folding_is_in_order_and_a_record_is_refused_twice() {
    let memory = ram(&[100]);
    let mut state = state(&memory);
    let record = |epoch, byte| {
        Image::new(epoch, 0, 1)
            .section(kind::DEVICE_STATE, CRITICAL, 0, encoding::NONE, 0, b"s")
            .runs(kind::PAGE_INDEX, 0, &[(3, 1)])
            .data(0, &[byte])
            .end()
    };
    assert_eq!(state.fold(&record(1, 1), || ()).unwrap(), 1);
    let again = state.fold(&record(1, 9), || ()).unwrap_err();
    assert!(matches!(again, FoldError::Gap { folded: Epoch(1), found: Epoch(1) }), "{again}");
    let gap = state.fold(&record(3, 9), || ()).unwrap_err();
    assert!(matches!(gap, FoldError::Gap { folded: Epoch(1), found: Epoch(3) }), "{gap}");
    state.fold(&record(2, 2), || ()).unwrap();
    assert_eq!(bytes_of(&memory)[3 * PAGE_SIZE], 2);
}

#[test]
fn applying_a_record_again_changes_nothing() {
    let image = Image::new(1, 0, 1)
        .section(kind::DEVICE_STATE, CRITICAL, 0, encoding::NONE, 0, b"s")
        .runs(kind::DISCARDS, 0, &[(0, 2), (50, 4)])
        .runs(kind::PAGE_INDEX, 0, &[(1, 3)])
        .data(0, &[7, 8, 9])
        .end();
    let memory = ram(&[100]);
    memory[0].alias.write(0, &[5; 60 * PAGE_SIZE]);
    state(&memory).fold(&image, || ()).unwrap();
    let once = bytes_of(&memory);
    assert_eq!([once[0], once[PAGE_SIZE], once[3 * PAGE_SIZE], once[51 * PAGE_SIZE]], [0, 7, 9, 0]);
    state(&memory).fold(&image, || ()).unwrap();
    assert!(bytes_of(&memory) == once);
}

#[test]
fn a_refused_record_leaves_ram_untouched_and_the_catch_says_so() {
    let (memory, wire) = (ram(&[100]), Wire::new(RING));
    let image = Image::new(1, 0, 1)
        .section(kind::DEVICE_STATE, CRITICAL, 0, encoding::NONE, 0, b"s")
        .runs(kind::PAGE_INDEX, 0, &[(3, 1)])
        .data(0, &[1])
        .section(77, CRITICAL, 0, 0, 0, b"from the future")
        .end();
    let folder = folder(&wire, &memory);
    wire.ring().write(SEGMENTS_OFFSET, &image);
    let status = folder.wait_folded(Epoch(1), soon());
    assert!(matches!(status.failed, Some(FoldError::Refused { epoch: Epoch(1), .. })), "{status:?}");
    let error = folder.stop().finish(&wire.revoke()[..]).unwrap_err();
    let CatchError::Unreadable { source, older } = error;
    assert!(matches!(source, FoldError::Refused { .. }));
    assert_eq!((older.epoch, bytes_of(&memory)), (Epoch(0), vec![0; 100 * PAGE_SIZE]));
}

#[test]
fn a_heartbeat_that_moves_is_granted_and_one_that_does_not_is_not_heard() {
    let (memory, wire) = (ram(&[4]), Wire::new(RING));
    let folder = folder(&wire, &memory);
    let before = folder.heard();
    wire.ring().store_u64(crate::ring::HEARTBEAT_OFFSET, 41, std::sync::atomic::Ordering::Release);
    let heard = wait_until(|| Some(folder.heard()).filter(|heard| heard.counter == 41));
    assert!(heard.changed_at_ns > before.changed_at_ns);
    let later = wait_until(|| Some(folder.heard()).filter(|later| later.looked_at_ns > heard.looked_at_ns));
    assert_eq!(later.changed_at_ns, heard.changed_at_ns);
    drop(folder);
}

#[test]
fn output_that_is_never_released_has_a_bound() {
    let memory = ram(&[100]);
    let target = FoldTarget::new(&memory).unwrap();
    let mut limits = Limits::for_regions([(RegionId(0), 100)]);
    limits.output_bytes = 100;
    let mut state = FoldState::new(target, limits, Vec::new());
    let record = |epoch: u64, released: Option<u64>| {
        let image =
            Image::new(epoch, 0, 1).section(kind::HELD_OUTPUT, CRITICAL, 0, 0, 0, &packet_bytes(&[packet(epoch)]));
        let image = match released {
            Some(up_to) => image.section(kind::RELEASED_UP_TO, CRITICAL, 0, 0, 0, &up_to.to_le_bytes()),
            None => image,
        };
        image.end()
    };
    state.fold(&record(1, None), || ()).unwrap();
    state.fold(&record(2, None), || ()).unwrap();
    let full = state.fold(&record(3, None), || ()).unwrap_err();
    assert!(matches!(full, FoldError::TooMuchOutput { bytes: 120, limit: 100 }), "{full}");
    state.fold(&record(3, Some(1)), || ()).expect("the first has left");
}

#[test]
fn twenty_thousand_pages_are_folded_in_twenty_milliseconds() {
    const PAGES: u64 = 20_000;
    let memory = ram(&[2 * PAGES as usize]);
    // RAM that a guest has used is allocated and mapped; that is not what is measured.
    memory[0].alias.zero(0, memory[0].alias.len());
    let mut image = Image::new(1, 0, 1).section(kind::DEVICE_STATE, CRITICAL, 0, encoding::NONE, 0, b"s");
    let runs: Vec<_> = (0..PAGES).map(|page| (2 * page, 1)).collect();
    for chunk in runs.chunks(1000) {
        image = image.runs(kind::PAGE_INDEX, 0, chunk);
    }
    for _ in 0..PAGES / 50 {
        image = image.data(0, &[3; 50]);
    }
    let image = image.end();
    // Other work runs at the same time: it is tried until it has had the machine to itself for as long as it takes.
    let (mut best, patience) = (Duration::MAX, soon());
    while best >= Duration::from_millis(20) && !patience.expired() {
        let mut state = state(&memory);
        let began = Instant::now();
        state.fold(&image, || ()).unwrap();
        best = best.min(began.elapsed());
    }
    eprintln!("{PAGES} scattered pages folded in {best:?}");
    assert!(best < Duration::from_millis(20), "{best:?}");
}

/// Looks until there is something to see, within a bound.
fn wait_until<T>(mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = soon();
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(!deadline.expired(), "never seen");
        std::thread::yield_now();
    }
}

#[test]
fn a_revoked_ring_of_another_size_is_an_error() {
    let (memory, wire) = (ram(&[4]), Wire::new(RING));
    let catch = folder(&wire, &memory).stop();
    let error = catch.finish(&[0; 10][..]).unwrap_err();
    assert!(matches!(error, CatchError::Unreadable { source: FoldError::Ring(_), .. }), "{error}");
}

/// Two disks that note what is done to them, and fail when told to.
#[derive(Debug, Default)]
struct Disks {
    done: Mutex<Vec<Vec<u8>>>,
    full: std::sync::atomic::AtomicBool,
}

impl Storage for Disks {
    fn disks(&self) -> u16 {
        2
    }

    fn close_epoch(&self, _: Epoch) -> Result<Vec<crate::storage::DiskWrites>, crate::guest::GuestError> {
        unreachable!("nothing is written at a source")
    }

    fn applied(&self, _: Epoch) {}

    fn own(&self, _: belay_transport::Deadline) -> Result<(), crate::guest::GuestError> {
        unreachable!("a source never owns what came back to it")
    }

    fn apply(&self, writes: &[u8], _: &mut dyn FnMut()) -> Result<(), crate::guest::GuestError> {
        if self.full.load(std::sync::atomic::Ordering::SeqCst) {
            let source = io::Error::from(io::ErrorKind::StorageFull);
            return Err(crate::guest::GuestError::Io { doing: "write the image".to_owned(), source });
        }
        self.done.lock().unwrap().push(writes.to_vec());
        Ok(())
    }

    fn check(&self) -> Result<(), crate::guest::GuestError> {
        Ok(())
    }

    fn give_up(&self) -> Result<(), crate::guest::GuestError> {
        Ok(())
    }

    fn keep(&self) -> Result<(), crate::guest::GuestError> {
        Ok(())
    }
}

#[test]
fn what_an_epoch_did_to_disks_is_in_the_images_before_it_is_in_ram_and_before_the_destination_hears_of_it() {
    let disks = Arc::new(Disks::default());
    let memory = ram(&[4]);
    let state = || {
        let limits = Limits::for_regions([(RegionId(0), 4)]);
        FoldState::new(FoldTarget::new(&memory).unwrap(), limits, Vec::new()).with_storage(Some(disks.clone()))
    };
    let record = |epoch: u64, disk: u16| {
        let write = |image: Image, bytes: &[u8]| image.section(kind::DISK_WRITES, CRITICAL, disk, 0, 0, bytes);
        let image = write(write(Image::new(epoch, 0, 1), &[epoch as u8; 3]), b"more");
        image.runs(kind::PAGE_INDEX, 0, &[(0, 1)]).data(0, &[epoch as u8]).end()
    };
    let page = |memory: &[RamBlock]| {
        let mut bytes = [0; 1];
        memory[0].alias.read(0, &mut bytes);
        bytes[0]
    };
    let mut folding = state();
    folding.fold(&record(1, 1), || ()).unwrap();
    assert_eq!((disks.done.lock().unwrap().as_slice(), page(&memory)), (&[b"\x01\x01\x01more".to_vec()][..], 1));
    disks.full.store(true, std::sync::atomic::Ordering::SeqCst);
    let full = folding.fold(&record(2, 0), || ()).unwrap_err();
    assert!(
        matches!(&full, FoldError::Disk { epoch: Epoch(2), disk: 0, why } if why.contains("no storage space")),
        "{full}"
    );
    assert_eq!((folding.epoch(), page(&memory)), (Epoch(1), 1), "RAM and disk stay together");
    disks.full.store(false, std::sync::atomic::Ordering::SeqCst);
    folding.fold(&record(2, 0), || ()).unwrap();
    assert_eq!((disks.done.lock().unwrap().len(), page(&memory)), (2, 2));
    let stranger = folding.fold(&record(3, 2), || ()).unwrap_err();
    assert!(matches!(stranger, FoldError::Refused { source: RecordError::UnknownDevice { id: 2 }, .. }), "{stranger}");
}

#[test]
fn p3_a_catch_whose_image_is_full_keeps_what_it_lacks_in_order_until_it_takes_it() {
    let disks = Arc::new(Disks::default());
    let full = |is| disks.full.store(is, std::sync::atomic::Ordering::SeqCst);
    let (memory, mut wire) = (ram(&SHAPE), Wire::new(RING));
    let reader = RingReader::new(RING, NONCE, OVERFLOW).unwrap();
    let state = state(&memory).with_storage(Some(disks.clone()));
    let owner = OwnerRegion::new(wire.owner());
    let catch = Folder::start(FoldConfig::default(), wire.ring(), owner, reader, state).unwrap().stop();
    // They committed when no folder looked any more, and the image filled up.
    let mut sender = Sender::new(&mut wire, 64 << 10);
    for epoch in 1..=3_u8 {
        let content = Content { device_state: vec![epoch], disk_writes: vec![epoch; 3], ..Content::default() };
        sender.send(Epoch(u64::from(epoch)), &memory, &content).unwrap();
    }
    full(true);
    let mut recovered = catch.finish(&wire.revoke()[..]).unwrap();
    assert_eq!((recovered.epoch, recovered.device_state.as_slice()), (Epoch(3), &[3][..]), "the newest commit");
    let still = recovered.unwritten.write().unwrap_err();
    assert!(matches!(&still, FoldError::Disk { epoch: Epoch(1), disk: 0, .. }), "{still}");
    assert!(!recovered.unwritten.is_empty() && disks.done.lock().unwrap().is_empty());
    full(false);
    recovered.unwritten.write().unwrap();
    assert!(recovered.unwritten.is_empty());
    assert_eq!(*disks.done.lock().unwrap(), [vec![1; 3], vec![2; 3], vec![3; 3]], "in the order of the epochs");
}

#[test]
fn a_folder_that_is_held_takes_nothing_until_it_may_go_on() {
    let (memory, mut wire) = (ram(&[4]), Wire::new(RING));
    let folder = folder(&wire, &memory);
    folder.hold(true);
    let mut sender = Sender::new(&mut wire, 64 << 10);
    let content = Content { device_state: b"s".to_vec(), ..Content::default() };
    sender.send(Epoch(1), &memory, &content).unwrap();
    let before = folder.heard().looked_at_ns;
    // It has looked around since the record was there, and has not touched it.
    wait_until(|| (folder.heard().looked_at_ns > before).then_some(()));
    assert_eq!((folder.status().consumed, folder.status().folded), (0, Epoch(0)));
    folder.hold(false);
    assert_eq!(folder.wait_folded(Epoch(1), soon()).folded, Epoch(1));
}

/// A ring whose writer goes on after the revocation: wherever the reader looks, the next record is there by then.
struct Endless<'a> {
    wire: &'a Wire,
    here: &'a [RamBlock],
    writing: Mutex<Writing>,
}

struct Writing {
    sender: Sender,
    epoch: Epoch,
    bytes: u64,
    /// The newest segment that the reader has seen.
    seen: u64,
}

impl RingBytes for Endless<'_> {
    fn len(&self) -> usize {
        RING
    }
    fn read(&self, offset: usize, into: &mut [u8]) {
        let ring = self.wire.ring();
        if into.len() == HEADER {
            let Writing { sender, epoch, bytes, seen } = &mut *self.writing.lock().unwrap();
            RingBytes::read(&*ring, offset, into);
            let sequence = |bytes: &[u8]| match SegmentHeader::ref_from_prefix(bytes) {
                Ok((header, _)) if header.is_whole() => header.sequence.get(),
                _ => 0,
            };
            if sequence(into) <= *seen && epoch.0 < 500 {
                *epoch = epoch.next();
                // It takes everything for read.
                OwnerRegion::new(self.wire.owner()).set_consumed(*bytes);
                let content =
                    Content { dirty: vec![(0, epoch.0 % 8)], device_state: vec![1; 64], ..Content::default() };
                *bytes += sender.send(*epoch, self.here, &content).unwrap().bytes;
                RingBytes::read(&*ring, offset, into);
            }
            *seen = sequence(into).max(*seen);
            return;
        }
        RingBytes::read(&*ring, offset, into);
    }
}

#[test]
fn p7_a_writer_that_does_not_stop_keeps_a_catch_busy_for_one_ring_and_no_longer() {
    let (here, there, mut wire) = (ram(&SHAPE), ram(&SHAPE), Wire::new(RING));
    let catch = folder(&wire, &there).stop();
    let sender = Sender::new(&mut wire, 64 << 10);
    let writing = Mutex::new(Writing { sender, epoch: Epoch(0), bytes: 0, seen: 0 });
    let ring = Endless { wire: &wire, here: &here, writing };
    let recovered = catch.finish(&ring).unwrap();
    let written = ring.writing.lock().unwrap().epoch;
    assert!(recovered.epoch > Epoch(3) && written < Epoch(500), "{} of {written}", recovered.epoch);
}
