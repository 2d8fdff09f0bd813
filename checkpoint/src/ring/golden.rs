//! Records, pads and the owner's words as they are in the ring.

use super::tests::take_all;
use super::*;
use crate::guest::Packet;
use crate::journal::KeptState;
use crate::record::{Limits, SegmentHeader, VERSION, kind, parse};
use crate::testing::*;
use belay_transport::RegionId;
use belay_transport::region::RamFile;
use std::time::Duration;
use zerocopy::FromBytes;

use crate::golden::compare;

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");
pub(crate) const RING_BYTES: usize = RingShape::LEAST.next_multiple_of(4096);

/// One record with every kind of section but disk writes, shipped by the writer and taken by the reader; and the ring a lap later,
/// which has a pad.
fn shipped() -> (Vec<u8>, Vec<u8>) {
    shipped_with(Vec::new())
}

fn shipped_with(disk_writes: Vec<u8>) -> (Vec<u8>, Vec<u8>) {
    let (memory, mut wire) = (ram(&[8, 2]), Wire::new(RING_BYTES));
    let owner = OwnerRegion::new(wire.owner());
    memory[0].alias.write(3 * PAGE_SIZE, &(0..PAGE_SIZE).map(|at| (at * 7 + at / 256) as u8).collect::<Vec<_>>());
    let content = Content {
        dirty: vec![(0, 3)],
        discards: vec![(0, 6), (0, 7), (1, 0)],
        device_state: b"vCPUs and devices".to_vec(),
        outputs: vec![Packet { sequence: 300, bytes: vec![0xaa; 5] }, Packet { sequence: 301, bytes: vec![] }],
        released_up_to: Some(299),
        disk_writes,
    };
    let mut sender = Sender::new(&mut wire, 64 << 10);
    let mut reader = RingReader::new(RING_BYTES, NONCE, 64 << 10).unwrap();
    let mut first = None;
    while reader.consumed() <= reader.shape().bytes {
        sender.send(reader.committed().next(), &memory, &content).unwrap();
        let mut taken = take_all(&mut reader, &*wire.ring()).unwrap();
        owner.set_consumed(reader.consumed());
        first = first.or(taken.pop());
    }
    (first.expect("a record"), wire.ring_bytes())
}

#[test]
fn a_record_is_in_the_ring_as_it_was_when_the_version_came_out() {
    let (record, ring) = shipped();
    let header = |at: usize| SegmentHeader::ref_from_prefix(&ring[at..]).expect("64 bytes").0;
    let is_pad = |at: &usize| header(*at).is_whole() && header(*at).section.kind.get() == kind::PAD;
    let pad = (SEGMENTS_OFFSET..ring.len()).step_by(ALIGN).find(is_pad).expect("a pad once a lap");
    let limits = Limits::for_regions([(RegionId(0), 8), (RegionId(1), 2)]);
    for (name, bytes) in
        compare(FOLDER, VERSION, "record", &[("record", record), ("pad", ring[pad..pad + HEADER].to_vec())])
    {
        if name == "pad" {
            let (header, _) = SegmentHeader::ref_from_prefix(&bytes).expect("64 bytes");
            assert!(header.is_whole() && header.section.kind.get() == kind::PAD);
            continue;
        }
        let view = parse(&bytes, &limits, true).expect("read");
        assert_eq!((view.epoch, view.taken_at_ns, view.page_count()), (Epoch(1), 7, 1));
        assert_eq!(
            (view.pages[0].region, view.pages[0].first.0, view.pages[0].bytes_in(&bytes)[255 + 256]),
            (RegionId(0), 3, 250)
        );
        assert_eq!(view.discards, [(RegionId(0), 6..8), (RegionId(1), 0..1)]);
        assert_eq!((&view.device_state[..], view.released_up_to), (&b"vCPUs and devices"[..], Some(299)));
        assert_eq!(view.outputs.iter().map(|packet| packet.sequence).collect::<Vec<_>>(), [300, 301]);
        // In a ring of the session it is taken, and committed.
        let mut ring = vec![0; RING_BYTES];
        ring[SEGMENTS_OFFSET..SEGMENTS_OFFSET + bytes.len()].copy_from_slice(&bytes);
        let mut reader = RingReader::new(RING_BYTES, NONCE, 64 << 10).unwrap();
        assert!(take_all(&mut reader, &ring[..]).unwrap() == [bytes]);
    }
}

#[test]
fn what_was_done_to_a_disk_is_in_a_record_as_it_was_when_it_came_in() {
    let done = b"what was done to the disk".to_vec();
    let limits = Limits { disks: 1, ..Limits::for_regions([(RegionId(0), 8), (RegionId(1), 2)]) };
    for (_, bytes) in compare(FOLDER, VERSION, "record-disk-writes", &[("record", shipped_with(done.clone()).0)]) {
        let view = parse(&bytes, &limits, true).expect("read");
        assert_eq!((&view.disk_writes, view.page_count()), (&vec![done.clone()], 1));
        // A guest that has no such disk does not take it.
        assert!(parse(&bytes, &Limits { disks: 0, ..limits.clone() }, true).is_err());
    }
}

/// A record for whoever folds one, of regions of 8 and 2 pages.
pub(crate) fn record() -> Vec<u8> {
    shipped().0
}

/// Keeps `place` in `state`.
pub(crate) fn keep_place(state: &KeptState, place: &Place) {
    open_place(state).0.note(place);
}

/// The place that is kept in `state`, and overflow memory with nothing in it.
pub(crate) fn open_place(state: &KeptState) -> (Spool, Option<Place>) {
    let file = RamFile::memfd("belay-golden-overflow", 4096, belay_transport::PageSize::Small).expect("memory");
    Spool::over(file, state).expect("as it was kept")
}

#[test]
fn the_owners_words_are_where_they_were_when_the_version_came_out() {
    let mut wire = Wire::new(RING_BYTES);
    let owner = OwnerRegion::new(wire.owner());
    owner.set_consumed(0x0101_0101);
    owner.set_folded(Epoch(0x0202_0202));
    owner.set_applied(Epoch(0x0303_0303));
    owner.grant(0x0404_0404, Duration::from_millis(1000));
    owner.set_refused();
    let mut words = vec![0; OWNER_WORDS_BYTES];
    wire.owner().read(0, &mut words);
    for (_, bytes) in compare(FOLDER, VERSION, "owner-region", &[("words", words)]) {
        let mailbox = Mailbox::new(&mut wire).unwrap();
        mailbox.mapping.write(0, &bytes);
        let read = mailbox.words();
        let wanted = OwnerWords {
            owner_epoch: 0,
            consumed: Some(0x0101_0101),
            folded: Some(Epoch(0x0202_0202)),
            applied: Some(Epoch(0x0303_0303)),
            granted: Some(0x0404_0404),
            lease: Some(Duration::from_secs(1)),
            refused: true,
        };
        assert_eq!(read, wanted);
    }
    assert_eq!((HEARTBEAT_OFFSET, SEGMENTS_OFFSET, OWNER_EPOCH_OFFSET), (0, 4096, 0));
}
