//! What the ring promises: whole segments in order, whatever is torn, flipped, stale or hostile.

use super::*;
use crate::guest::{Packet, RamBlock};
use crate::record::build::Image;
use crate::record::{FIRST, SegmentHeader, VERSION, kind};
use crate::testing::*;
use belay_transport::{Deadline, PageIndex};
use proptest::prelude::*;
use std::time::Duration;
use zerocopy::{FromBytes, IntoBytes};

const SMALL: usize = (SEGMENTS_OFFSET + 5 * 4224).next_multiple_of(4096);

fn reader(len: usize) -> RingReader {
    RingReader::new(len, NONCE, 256 << 10).unwrap()
}

/// Takes everything that is there; the records that were complete. Both ways, which must say the same of whatever ring.
pub(super) fn take_all(reader: &mut RingReader, ring: &(impl RingBytes + ?Sized)) -> Result<Vec<Vec<u8>>, RingError> {
    let mut other = reader.clone();
    let mut private = vec![0; ring.len()];
    ring.read(0, &mut private);
    let (copied, in_place) = (take(reader, ring, None), take(&mut other, ring, Some(Still::Private(&private))));
    assert!(copied == in_place && reader.place() == other.place(), "{:?} and {:?}", reader.place(), other.place());
    copied
}

fn take(
    reader: &mut RingReader,
    ring: &(impl RingBytes + ?Sized),
    still: Option<Still<'_>>,
) -> Result<Vec<Vec<u8>>, RingError> {
    let mut records = Vec::new();
    loop {
        if let Some(record) = still.and_then(|ring| reader.in_place(ring)) {
            records.push(record.whole());
            let after = record.after();
            reader.pass(after);
            continue;
        }
        match reader.step(ring)? {
            Step::NotYet => return Ok(records),
            Step::Spooled => {}
            Step::Committed(_) => {
                records.push(reader.record().unwrap().to_vec());
                reader.clear();
            }
        }
    }
}

fn content(memory: &[RamBlock], salt: u64) -> Content {
    let page = salt % 8;
    memory[0].alias.write(PageIndex(page).offset(), &[salt as u8; 4096]);
    Content { dirty: vec![(0, page)], device_state: salt.to_le_bytes().to_vec(), ..Content::default() }
}

/// A ring several laps old, everything in it taken, and the next record: the ring's bytes before and after it was written, the
/// reader before, and which of the bytes are the new ones, in the order of the ring.
fn old_ring_and_a_new_record() -> (Vec<u8>, Vec<u8>, RingReader, std::ops::Range<usize>, Vec<u8>) {
    let (memory, mut wire) = (ram(&[8]), Wire::new(SMALL));
    let owner = OwnerRegion::new(wire.owner());
    let (mut sender, mut reader) = (Sender::new(&mut wire, 64 << 10), reader(SMALL));
    let mut epoch = Epoch(0);
    // Until the next record will fit without a pad, somewhere in the middle and laps later.
    while epoch.0 < 20 || !(4096..12_000).contains(&(reader.consumed() % reader.shape().bytes)) {
        epoch = epoch.next();
        sender.send(epoch, &memory, &content(&memory, epoch.0)).unwrap();
        assert_eq!(take_all(&mut reader, &*wire.ring()).unwrap().len(), 1);
        owner.set_consumed(reader.consumed());
    }
    let before = wire.ring_bytes();
    let start = SEGMENTS_OFFSET + (reader.consumed() % reader.shape().bytes) as usize;
    let shipped = sender.send(epoch.next(), &memory, &content(&memory, epoch.0 + 1)).unwrap();
    let after = wire.ring_bytes();
    let record = take_all(&mut reader.clone(), &after[..]).unwrap().remove(0);
    let range = start..start + shipped.bytes as usize;
    assert!(before[..range.start] == after[..range.start] && before[range.end..] == after[range.end..]);
    (before, after, reader, range, record)
}

#[test]
fn no_torn_prefix_of_a_record_over_an_older_lap_is_taken_for_committed() {
    let (before, after, reader, new, record) = old_ring_and_a_new_record();
    let mut ring = before;
    for at in new.clone() {
        let records = take_all(&mut reader.clone(), &ring[..]).unwrap();
        // The end of the trailer is zeroes, and so is what lies there: with only those missing, nothing is.
        let whole = ring[new.clone()] == after[new.clone()];
        assert!(records.is_empty() && !whole || records == [&record[..]] && at > new.end - 64, "cut at {at}");
        ring[at] = after[at];
    }
    assert!(take_all(&mut reader.clone(), &ring[..]).unwrap() == [record]);
}

#[test]
fn no_single_bit_flip_makes_another_record_than_the_one_written() {
    let (_, mut ring, reader, new, record) = old_ring_and_a_new_record();
    let mut taken = 0;
    for at in new.clone() {
        for bit in 0..8 {
            ring[at] ^= 1 << bit;
            if let Ok(records) = take_all(&mut reader.clone(), &ring[..])
                && let [found] = &records[..]
            {
                assert!(*found == record, "flip of bit {bit} at {at}");
                taken += 1;
            }
            ring[at] ^= 1 << bit;
        }
    }
    // Only flips in the padding behind bodies go unseen, because padding is not part of the record.
    assert!(taken > 0 && taken < new.len(), "{taken} flips did not matter");
}

/// A ring full of whole records of older laps, all of one shape that divides the ring, so that every old header, body and trailer
/// lies exactly where a new one comes; and the next record, small, with every kind of section. As in
/// [`old_ring_and_a_new_record`].
fn laps_that_line_up() -> (Vec<u8>, Vec<u8>, RingReader, std::ops::Range<usize>, Vec<u8>) {
    const BYTES: u64 = 20_480;
    let len = SEGMENTS_OFFSET + BYTES as usize;
    let (memory, mut wire) = (ram(&[8, 2]), Wire::new(len));
    let owner = OwnerRegion::new(wire.owner());
    let (mut sender, mut reader) = (Sender::new(&mut wire, 64 << 10), reader(len));
    // What an epoch holds differs from lap to lap and takes the same room.
    let content = |epoch: Epoch| Content {
        discards: vec![(0, epoch.0 % 8), (1, epoch.0 % 2)],
        device_state: vec![epoch.0 as u8; 392],
        outputs: vec![Packet { sequence: epoch.0, bytes: vec![epoch.0 as u8; 30] }],
        released_up_to: Some(epoch.0 - 1),
        ..Content::default()
    };
    let mut strides = Vec::new();
    for epoch in (1..=50).map(Epoch) {
        strides.push(sender.send(epoch, &memory, &content(epoch)).unwrap().bytes);
        assert_eq!(take_all(&mut reader, &*wire.ring()).unwrap().len(), 1);
        owner.set_consumed(reader.consumed());
    }
    assert!(strides.iter().all(|stride| *stride == strides[0] && BYTES.is_multiple_of(*stride)), "{strides:?}");
    assert!(reader.consumed() > 2 * BYTES && !reader.consumed().is_multiple_of(BYTES));
    let before = wire.ring_bytes();
    let start = SEGMENTS_OFFSET + (reader.consumed() % BYTES) as usize;
    sender.send(Epoch(51), &memory, &content(Epoch(51))).unwrap();
    let after = wire.ring_bytes();
    let record = take_all(&mut reader.clone(), &after[..]).unwrap().remove(0);
    (before, after, reader, start..start + strides[0] as usize, record)
}

/// The segments of a record that lies at `range`: kind, and how much of the stride says something.
fn segments(ring: &[u8], range: &std::ops::Range<usize>) -> Vec<(u16, std::ops::Range<usize>, std::ops::Range<usize>)> {
    let (mut at, mut all) = (range.start, Vec::new());
    while at < range.end {
        let (header, _) = SegmentHeader::ref_from_prefix(&ring[at..]).unwrap();
        assert!(header.is_whole());
        let said = at..at + HEADER + header.section.len.get() as usize;
        all.push((header.section.kind.get(), said.clone(), said.end..at + header.stride()));
        at += header.stride();
    }
    all
}

#[test]
fn no_prefix_over_whole_records_of_an_older_lap_is_taken_for_committed() {
    let (before, after, reader, new, record) = laps_that_line_up();
    let kinds = |ring: &[u8]| segments(ring, &new).into_iter().map(|(kind, ..)| kind).collect::<Vec<_>>();
    assert_eq!(kinds(&before), kinds(&after), "an older record lies in its place, header on header");
    let trailer = segments(&after, &new).pop().expect("a trailer").1;
    let mut ring = before;
    for at in new.clone() {
        let whole = ring[new.start..trailer.end] == after[new.start..trailer.end];
        let records = take_all(&mut reader.clone(), &ring[..]).unwrap();
        assert!(records.is_empty() || whole && records == [&record[..]], "cut at {at}");
        ring[at] = after[at];
    }
    assert!(take_all(&mut reader.clone(), &ring[..]).unwrap() == [record]);
}

#[test]
fn no_bit_flip_in_any_section_over_an_older_lap_is_taken_for_committed() {
    let (_, mut ring, reader, new, record) = laps_that_line_up();
    let segments = segments(&ring, &new);
    let kinds: std::collections::BTreeSet<_> = segments.iter().map(|(kind, ..)| *kind).collect();
    use kind::{DEVICE_STATE, DISCARDS, HEAD, HELD_OUTPUT, RELEASED_UP_TO, TRAILER};
    assert!(
        [HEAD, DEVICE_STATE, DISCARDS, HELD_OUTPUT, RELEASED_UP_TO, TRAILER].iter().all(|kind| kinds.contains(kind))
    );
    for (kind, said, padding) in segments {
        for (at, bit) in said.clone().chain(padding.clone()).flat_map(|at| (0..8).map(move |bit| (at, bit))) {
            ring[at] ^= 1 << bit;
            let records = take_all(&mut reader.clone(), &ring[..]).unwrap();
            // Padding is no part of a record; a flip there is seen by nobody.
            let wanted: &[&[u8]] = if padding.contains(&at) { &[&record] } else { &[] };
            assert!(records == wanted, "section {kind}, bit {bit} of byte {}", at - said.start);
            ring[at] ^= 1 << bit;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_mixture_of_old_and_new_cache_lines_is_taken_for_committed(
        missing in prop::collection::vec(any::<prop::sample::Index>(), 1..8),
    ) {
        let (before, after, reader, new, record) = old_ring_and_a_new_record();
        let mut ring = after.clone();
        for line in missing {
            let at = new.start + line.index(new.len() / 64) * 64;
            ring[at..at + 64].copy_from_slice(&before[at..at + 64]);
        }
        let records = take_all(&mut reader.clone(), &ring[..]).unwrap();
        prop_assert!(records.is_empty() || records == [record]);
        if new.clone().any(|at| ring[at] != after[at]) {
            prop_assert!(records.is_empty());
        }
    }
}

#[test]
fn a_segment_with_a_stale_nonce_is_not_there() {
    let image = Image::new(1, 0, 1).end();
    let mut ring = vec![0; SMALL];
    ring[SEGMENTS_OFFSET..SEGMENTS_OFFSET + image.len()].copy_from_slice(&image);
    assert_eq!(take_all(&mut reader(SMALL), &ring[..]).unwrap().len(), 1);
    let mut other = RingReader::new(SMALL, NONCE + 1, 64 << 10).unwrap();
    assert_eq!(other.step(&ring[..]).unwrap(), Step::NotYet);
}

/// What a reader says to a ring whose first segment is `header` of its own making.
fn told(change: impl Fn(&mut SegmentHeader)) -> Result<Step, RingError> {
    let mut image = Image::new(1, 0, 1).end();
    let (header, _) = SegmentHeader::mut_from_prefix(&mut image).unwrap();
    change(header);
    *header = header.sealed();
    let mut ring = vec![0; SMALL];
    ring[SEGMENTS_OFFSET..SEGMENTS_OFFSET + image.len()].copy_from_slice(&image);
    reader(SMALL).step(&ring[..])
}

#[test]
fn a_whole_header_that_lies_is_an_error_and_never_a_read_out_of_bounds() {
    assert_eq!(told(|_| ()), Ok(Step::Spooled));
    let lie = |change: &dyn Fn(&mut SegmentHeader)| told(change).unwrap_err();
    assert!(matches!(lie(&|h| h.section.len = u32::MAX.into()), RingError::BadLength { .. }));
    assert!(matches!(lie(&|h| h.section.len = 4097.into()), RingError::BadLength { limit: 4096, .. }));
    assert!(matches!(lie(&|h| h.sequence = 2.into()), RingError::Ahead { found: 2, wanted: 1 }));
    assert!(matches!(lie(&|h| h.version = (VERSION + 1).into()), RingError::Version { .. }));
    assert!(matches!(lie(&|h| h.epoch = 2.into()), RingError::WrongEpoch { .. }));
    assert!(matches!(lie(&|h| h.flags = (FIRST ^ 1).into()), RingError::OutOfPlace { .. }));
    assert!(matches!(lie(&|h| h.section.kind = kind::PAD.into()), RingError::BadLength { .. }));
    assert!(matches!(reader(SMALL).step(&[0u8; 100][..]), Err(RingError::Resized { found: 100, .. })));
}

#[test]
fn a_record_larger_than_what_was_reserved_is_refused_by_name() {
    let (memory, mut wire) = (ram(&[8]), Wire::new(SMALL));
    let mut sender = Sender::new(&mut wire, 64 << 10);
    let mut reader = RingReader::new(SMALL, NONCE, 4096).unwrap();
    sender.send(Epoch(1), &memory, &content(&memory, 1)).unwrap();
    let error = take_all(&mut reader, &*wire.ring()).unwrap_err();
    assert_eq!(error, RingError::RecordTooLarge { epoch: Epoch(1), reserved: 4096 });
}

#[test]
fn memory_that_is_not_there_is_found_missing_at_start() {
    let error = RingReader::new(SMALL, NONCE, 1 << 50).unwrap_err();
    assert!(matches!(error, RingError::NoMemory { .. }), "{error}");
}

#[test]
fn p7_a_source_that_takes_nothing_in_ends_shipping_at_its_deadline() {
    let (memory, mut wire) = (ram(&[8]), Wire::new(SMALL));
    OwnerRegion::new(wire.owner());
    let mut sender = Sender::new(&mut wire, 64 << 10);
    let everything = Content { dirty: (0..8).map(|page| (0, page)).collect(), ..Content::default() };
    let slot = stage(sender.slots.pop().unwrap(), &mut NoExchange, Epoch(1), &memory, &everything).unwrap();
    let error = sender.writer.ship(&slot, Deadline::after(Duration::from_millis(30))).unwrap_err();
    assert!(matches!(error, ShipError::NoRoom { consumed: 0, .. }), "{error}");
}

#[test]
fn a_source_that_claims_what_was_never_written_is_not_believed() {
    let (memory, mut wire) = (ram(&[8]), Wire::new(SMALL));
    let owner = OwnerRegion::new(wire.owner());
    owner.set_consumed(1 << 40);
    let mut sender = Sender::new(&mut wire, 64 << 10);
    let everything = Content { dirty: (0..8).map(|page| (0, page)).collect(), ..Content::default() };
    let error = sender.send(Epoch(1), &memory, &everything).unwrap_err();
    assert!(matches!(error, ShipError::BadConsumed { said, .. } if said == 1 << 40), "{error}");
}

#[test]
fn the_destination_hears_that_the_source_refused() {
    let (memory, mut wire) = (ram(&[8]), Wire::new(SMALL));
    OwnerRegion::new(wire.owner()).set_refused();
    let mut sender = Sender::new(&mut wire, 64 << 10);
    let everything = Content { dirty: (0..8).map(|page| (0, page)).collect(), ..Content::default() };
    assert!(matches!(sender.send(Epoch(1), &memory, &everything).unwrap_err(), ShipError::Refused));
}

#[test]
fn sizes_are_derived_alike_and_a_ring_too_small_is_refused() {
    assert!(RingShape::of(RingShape::LEAST - 1).is_err());
    let least = RingShape::of(RingShape::LEAST).unwrap();
    assert_eq!(least.body_max, 4096);
    let usual = RingShape::of(64 << 20).unwrap();
    assert_eq!(usual.body_max, 63 * 4096);
    assert!(usual.body_max < 256 << 10 && SegmentHeader::default().as_bytes().len() == 64);
}

/// For tests whose epoch fits its slot.
struct NoExchange;

impl crate::staging::Exchange for NoExchange {
    fn exchange(&mut self, _: crate::staging::Slot) -> Result<crate::staging::Slot, crate::staging::StageError> {
        panic!("the epoch fits its slot");
    }
}
