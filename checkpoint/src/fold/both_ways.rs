//! A ring that stands still is folded from where it lies, any other from private copies: what comes of it must be the same, of whatever ring.

use super::*;
use crate::guest::RamBlock;
use crate::record::build::Image;
use crate::record::{CRITICAL, HEADER, SegmentHeader, encoding, kind};
use crate::ring::{OwnerRegion, RingReader, SEGMENTS_OFFSET, Step, Still};
use crate::testing::*;
use belay_transport::{PAGE_SIZE, PageIndex};
use proptest::prelude::*;
use zerocopy::{FromBytes, IntoBytes};

const SHAPE: [usize; 2] = [40, 24];
const RING: usize = (SEGMENTS_OFFSET + 60 * 4224).next_multiple_of(4096);
const OVERFLOW: usize = 512 << 10;

/// What somebody did to a ring in which records lie.
#[derive(Debug, Clone)]
enum Damage {
    /// From here on it is as it was before the last records came.
    Torn(prop::sample::Index),
    /// Cache lines that are still as they were.
    Missing(Vec<prop::sample::Index>),
    Flipped(prop::sample::Index, u8),
    /// A field of a header says something else, and its sums are made right.
    Lie(prop::sample::Index, u8, u32),
    /// A body says something else, and its sum is made right.
    Replaced(prop::sample::Index, prop::sample::Index, u8),
}

fn damage() -> impl Strategy<Value = Damage> {
    let at = any::<prop::sample::Index>;
    prop_oneof![
        at().prop_map(Damage::Torn),
        prop::collection::vec(at(), 1..6).prop_map(Damage::Missing),
        (at(), 0..8u8).prop_map(|(at, bit)| Damage::Flipped(at, bit)),
        (at(), 0..8u8, any::<u32>()).prop_map(|(at, field, value)| Damage::Lie(at, field, value)),
        (at(), at(), any::<u8>()).prop_map(|(at, byte, value)| Damage::Replaced(at, byte, value)),
    ]
}

/// Where whole headers lie.
fn headers(ring: &[u8]) -> Vec<usize> {
    let whole = |at: &usize| SegmentHeader::ref_from_prefix(&ring[*at..]).is_ok_and(|(header, _)| header.is_whole());
    (SEGMENTS_OFFSET..ring.len() - HEADER).step_by(64).filter(whole).collect()
}

fn harm(ring: &mut [u8], before: &[u8], damage: &Damage) {
    let room = ring.len() - SEGMENTS_OFFSET;
    let all = headers(ring);
    match damage {
        Damage::Torn(from) => {
            let from = SEGMENTS_OFFSET + from.index(room);
            ring[from..].copy_from_slice(&before[from..]);
        }
        Damage::Missing(lines) => {
            for line in lines {
                let at = SEGMENTS_OFFSET + line.index(room / 64) * 64;
                ring[at..at + 64].copy_from_slice(&before[at..at + 64]);
            }
        }
        Damage::Flipped(at, bit) => ring[SEGMENTS_OFFSET + at.index(room)] ^= 1 << bit,
        Damage::Lie(at, field, value) if !all.is_empty() => {
            let (header, _) = SegmentHeader::mut_from_prefix(&mut ring[all[at.index(all.len())]..]).unwrap();
            let section = &mut header.section;
            match field {
                0 => section.kind = ((value % 9) as u16).into(),
                1 => section.kind = [kind::PAD, kind::TRAILER][(value % 2) as usize].into(),
                2 => section.len = (value % (2 * PAGE_SIZE as u32)).into(),
                3 => section.items = (value % 80).into(),
                4 => section.id = ((value % 3) as u16).into(),
                5 => header.epoch = u64::from(value % 8).into(),
                6 => header.sequence = u64::from(value % 40).into(),
                _ => header.flags = ((value % 2) as u16).into(),
            }
            *header = header.sealed();
        }
        Damage::Replaced(at, byte, value) if !all.is_empty() => {
            let at = all[at.index(all.len())];
            let (mut header, _) = SegmentHeader::read_from_prefix(&ring[at..]).unwrap();
            let len = header.section.len.get() as usize;
            let Some(body) = ring.get_mut(at + HEADER..at + HEADER + len).filter(|body| !body.is_empty()) else {
                return;
            };
            body[byte.index(len)] = *value;
            header.section.checksum = crate::record::crc(body).into();
            ring[at..at + HEADER].copy_from_slice(header.sealed().as_bytes());
        }
        Damage::Lie(..) | Damage::Replaced(..) => {}
    }
}

fn state(memory: &[RamBlock]) -> FoldState {
    let target = FoldTarget::new(memory).unwrap();
    let limits = Limits::for_regions(target.regions().collect::<Vec<_>>());
    FoldState::new(target, limits, b"state at the switch".to_vec())
}

/// What a source has after a catch over `ring`, and what it says of it. `reader` has come as far as it has.
fn caught(reader: &RingReader, ring: &[u8], before: &[u8], in_place: bool) -> (String, Vec<u8>) {
    let memory = ram(&SHAPE);
    let mut at = 0;
    for block in &memory {
        block.alias.write(0, &before[at..at + block.alias.len()]);
        at += block.alias.len();
    }
    let mut state = state(&memory);
    state.epoch = reader.committed();
    let recovered = finish(Catch::new(reader.clone(), state, None, std::time::Duration::ZERO), ring, in_place);
    let said = |recovered: &Recovered| {
        let Recovered { epoch, device_state, outputs_to_resend, folded_pages, .. } = recovered;
        format!("{epoch} {device_state:?} {outputs_to_resend:?} {folded_pages}")
    };
    let said = match recovered {
        Ok(recovered) => said(&recovered),
        Err(CatchError::Unreadable { source, older }) => format!("{source:?}; {}", said(&older)),
    };
    (said, bytes_of(&memory))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    #[test]
    fn p3_p5_a_ring_folded_from_where_it_lies_gives_the_same_bytes_as_from_private_copies_whatever_is_in_it(
        laps in 0..5u64,
        epochs in prop::collection::vec(prop::collection::vec((0..40u64, any::<u8>()), 0..24), 1..4),
        spooled in 0..8u32,
        damages in prop::collection::vec(damage(), 0..3),
    ) {
        let mut wire = Wire::new(RING);
        let owner = OwnerRegion::new(wire.owner());
        let here = ram(&SHAPE);
        let mut reader = RingReader::new(RING, NONCE, OVERFLOW).unwrap();
        let mut sender = Sender::new(&mut wire, OVERFLOW);
        let mut epoch = Epoch(0);
        let mut send = |writes: &[(u64, u8)], epoch: Epoch| {
            let mut content = Content { device_state: vec![epoch.0 as u8; 300], ..Content::default() };
            for &(page, byte) in writes {
                here[0].alias.write(PageIndex(page).offset() + usize::from(byte), &[byte; 99]);
                content.dirty.push((0, page));
            }
            content.discards.push((1, epoch.0 % SHAPE[1] as u64));
            content.outputs.push(Packet { sequence: epoch.0, bytes: vec![epoch.0 as u8; 30] });
            sender.send(epoch, &here, &content).unwrap();
        };
        // Older laps, all taken: the ring has whole records of theirs.
        for lap in 0..laps * 4 {
            epoch = epoch.next();
            send(&(0..20).map(|page| (page, lap as u8)).collect::<Vec<_>>(), epoch);
            while reader.record().is_none() {
                reader.step(&*wire.ring()).unwrap();
            }
            reader.clear();
            owner.set_consumed(reader.consumed());
        }
        let (old, ram_before) = (wire.ring_bytes(), bytes_of(&here));
        for writes in &epochs {
            epoch = epoch.next();
            send(writes, epoch);
        }
        // The folder had come into the first of them when it was stopped.
        let mut ring = wire.ring_bytes();
        for _ in 0..spooled {
            if reader.step(&ring[..]).unwrap() != Step::Spooled {
                break;
            }
        }
        if reader.record().is_some() {
            return Ok(());
        }
        damages.iter().for_each(|damage| harm(&mut ring, &old, damage));
        let (copied, in_place) = (caught(&reader, &ring, &ram_before, false), caught(&reader, &ring, &ram_before, true));
        prop_assert_eq!(&copied.0, &in_place.0);
        prop_assert!(copied.1 == in_place.1, "RAM differs");
        // And whole records were taken so, and not only by what they fall back to.
        if damages.is_empty() {
            prop_assert!(in_place.0.starts_with(&epoch.to_string()) && in_place.1 == bytes_of(&here));
            prop_assert!(reader.clone().in_place(Still::Private(&ring)).is_some());
        }
    }
}

#[test]
fn what_lies_in_overflow_memory_where_page_data_would_be_gets_nowhere() {
    // Large enough that several threads check and copy it.
    const PAGES: usize = 6000;
    let mut image = Image::new(1, 0, 1).section(kind::DEVICE_STATE, CRITICAL, 0, encoding::NONE, 0, b"s");
    let runs: Vec<_> = (0..PAGES as u64).map(|page| (2 * page, 1)).collect();
    for chunk in runs.chunks(1000) {
        image = image.runs(kind::PAGE_INDEX, 0, chunk);
    }
    for first in (0..PAGES).step_by(50) {
        image = image.data(0, &(first..first + 50).map(|page| page as u8 | 1).collect::<Vec<_>>());
    }
    let image = image.end();
    let mut ring = vec![0; SEGMENTS_OFFSET + 2 * image.len()];
    ring[SEGMENTS_OFFSET..SEGMENTS_OFFSET + image.len()].copy_from_slice(&image);
    let mut reader = RingReader::new(ring.len(), NONCE, image.len()).unwrap();
    let memory = ram(&[2 * PAGES]);
    memory[0].alias.write(0, &vec![0x55; memory[0].alias.len()]);
    let record = reader.in_place(Still::Private(&ring)).expect("a whole record");
    assert!(record.image() != image && record.whole() == image, "page data stays in the ring");
    assert_eq!(state(&memory).fold_in_place(&record).unwrap(), PAGES as u64);
    let bytes = bytes_of(&memory);
    let wrong = (0..2 * PAGES).find(|&page| {
        let wanted = if page % 2 == 0 { (page / 2) as u8 | 1 } else { 0x55 };
        bytes[page * PAGE_SIZE..][..PAGE_SIZE] != [wanted; PAGE_SIZE]
    });
    assert_eq!(wrong, None);
    // One bit of the last page, and it is no record.
    ring[SEGMENTS_OFFSET + image.len() - 500] ^= 1;
    assert!(RingReader::new(ring.len(), NONCE, image.len()).unwrap().in_place(Still::Private(&ring)).is_none());
}
