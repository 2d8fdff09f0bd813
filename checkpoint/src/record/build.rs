//! For tests: records put together section by section, right or wrong on purpose; and the tests of parsing.

use super::*;
use crate::guest::Packet;
use crate::testing::{NONCE, packet_bytes};
use belay_transport::PAGE_SIZE;
use proptest::prelude::*;

/// A record in the making.
pub struct Image {
    pub epoch: u64,
    pub sequence: u64,
    pub bytes: Vec<u8>,
    segments: u64,
    chain: Vec<u8>,
}

impl Image {
    /// One with a head for a guest of `regions` regions.
    pub fn new(epoch: u64, sequence: u64, regions: u32) -> Self {
        let image = Self { epoch, sequence, bytes: Vec::new(), segments: 0, chain: Vec::new() };
        let head = Head { page_shift: 12.into(), regions: regions.into(), taken_at_ns: 5.into() };
        image.section(kind::HEAD, CRITICAL, 0, 0, 0, head.as_bytes())
    }

    pub fn section(mut self, kind: u16, flags: u16, id: u16, encoding: u16, items: u32, body: &[u8]) -> Self {
        let section = SectionHeader {
            kind: kind.into(),
            flags: flags.into(),
            id: id.into(),
            encoding: encoding.into(),
            items: items.into(),
            len: (body.len() as u32).into(),
            checksum: crc(body).into(),
        };
        self.sequence += 1;
        let header = SegmentHeader {
            magic: MAGIC.into(),
            version: VERSION.into(),
            flags: if self.segments == 0 { FIRST } else { 0 }.into(),
            nonce: NONCE.into(),
            sequence: self.sequence.into(),
            epoch: self.epoch.into(),
            section,
            check: 0.into(),
        };
        let end = self.bytes.len() + stride(body.len());
        self.bytes.extend_from_slice(header.sealed().as_bytes());
        self.bytes.extend_from_slice(body);
        self.bytes.resize(end, 0);
        self.segments += 1;
        self.chain.extend_from_slice(section.as_bytes());
        self
    }

    pub fn runs(self, kind: u16, region: u16, runs: &[(u64, u64)]) -> Self {
        let body: Vec<_> =
            runs.iter().map(|&(first, count)| Run { first: first.into(), count: count.into() }).collect();
        self.section(kind, CRITICAL, region, encoding::RUNS, runs.len() as u32, body.as_slice().as_bytes())
    }

    pub fn data(self, region: u16, pages: &[u8]) -> Self {
        let body: Vec<u8> = pages.iter().flat_map(|&byte| [byte; PAGE_SIZE]).collect();
        self.section(kind::PAGE_DATA, CRITICAL, region, encoding::RAW_4K, pages.len() as u32, &body)
    }

    pub fn end(self) -> Vec<u8> {
        let (segments, bytes, chain) = (self.segments, self.bytes.len() as u64, crc(&self.chain));
        let trailer =
            Trailer { segments: segments.into(), bytes: bytes.into(), chain: chain.into(), reserved: 0.into() };
        self.section(kind::TRAILER, CRITICAL, 0, 0, 0, trailer.as_bytes()).bytes
    }
}

fn limits() -> Limits {
    Limits::for_regions([(RegionId(0), 100), (RegionId(1), 10)])
}

fn packet(sequence: u64, len: usize) -> Packet {
    Packet { sequence, bytes: vec![sequence as u8; len] }
}

fn good() -> Vec<u8> {
    let packets = packet_bytes(&[packet(4, 100), packet(9, 3)]);
    Image::new(1, 0, 2)
        .section(kind::DEVICE_STATE, CRITICAL, DEVICE_VMM, 0, 0, b"vcpu ")
        .section(kind::DEVICE_STATE, CRITICAL, DEVICE_VMM, 0, 0, b"and device")
        .section(kind::HELD_OUTPUT, CRITICAL, 0, 0, 0, &packets[..50])
        .section(kind::HELD_OUTPUT, CRITICAL, 0, 0, 0, &packets[50..])
        .section(kind::RELEASED_UP_TO, CRITICAL, 0, 0, 0, &3u64.to_le_bytes())
        .runs(kind::DISCARDS, 1, &[(0, 4)])
        .runs(kind::PAGE_INDEX, 0, &[(3, 2), (7, 1)])
        .runs(kind::PAGE_INDEX, 0, &[(99, 1)])
        .data(0, &[1])
        .data(0, &[2, 3, 4])
        .end()
}

#[test]
fn a_record_says_the_same_when_it_is_read_as_when_it_was_written() {
    let image = good();
    let view = parse(&image, &limits(), true).unwrap();
    assert_eq!(view.epoch.0, 1);
    assert_eq!(view.device_state, b"vcpu and device");
    assert_eq!(view.outputs, [packet(4, 100), packet(9, 3)]);
    assert_eq!(view.released_up_to, Some(3));
    assert_eq!(view.discards, [(RegionId(1), 0..4)]);
    let pages: Vec<_> =
        view.pages.iter().map(|run| (run.first.0, run.len / PAGE_SIZE, run.bytes_in(&image)[0])).collect();
    assert_eq!(pages, [(3, 1, 1), (4, 1, 2), (7, 1, 3), (99, 1, 4)]);
    assert_eq!(view.page_count(), 4);
}

#[test]
fn an_unknown_critical_section_is_refused_and_any_other_skipped() {
    const UNKNOWN: u16 = 99;
    let image = |flags| Image::new(1, 0, 2).section(UNKNOWN, flags, 0, 0, 0, b"?").end();
    let refused = parse(&image(CRITICAL), &limits(), true).unwrap_err();
    assert!(matches!(refused, RecordError::UnknownCritical { kind: UNKNOWN, .. }), "{refused}");
    parse(&image(0), &limits(), true).expect("not critical");
}

#[test]
fn lengths_and_indexes_of_the_destination_are_never_trusted() {
    let wrong = |build: &dyn Fn(Image) -> Image| parse(&build(Image::new(1, 0, 2)).end(), &limits(), true).unwrap_err();
    for runs in [&[(99u64, 2u64)][..], &[(0, 0)], &[(u64::MAX, 2)], &[(5, 1), (5, 1)], &[(5, 1), (4, 1)], &[(100, 1)]] {
        for kind in [kind::PAGE_INDEX, kind::DISCARDS] {
            assert!(matches!(wrong(&|image| image.runs(kind, 0, runs)), RecordError::BadRun { .. }), "{runs:?}");
        }
    }
    assert!(matches!(wrong(&|image| image.runs(kind::DISCARDS, 2, &[(0, 1)])), RecordError::UnknownRegion { id: 2 }));
    assert!(matches!(wrong(&|image| image.data(2, &[1])), RecordError::UnknownRegion { id: 2 }));
    assert!(matches!(wrong(&|image| image.data(0, &[1])), RecordError::DataWithoutIndex { .. }));
    let too_little = |image: Image| image.runs(kind::PAGE_INDEX, 0, &[(0, 2)]).data(0, &[1]);
    assert!(matches!(wrong(&too_little), RecordError::DataWithoutIndex { index: 2, data: 1, .. }));
    let miscounted = |image: Image| image.section(kind::PAGE_DATA, CRITICAL, 0, encoding::RAW_4K, 2, &[0; PAGE_SIZE]);
    assert!(matches!(wrong(&miscounted), RecordError::BadLength { .. }));
    let compressed = |image: Image| image.section(kind::PAGE_DATA, CRITICAL, 0, 77, 1, &[0; PAGE_SIZE]);
    assert!(matches!(wrong(&compressed), RecordError::UnknownEncoding { encoding: 77, .. }));
    let cut = |image: Image| image.section(kind::HELD_OUTPUT, CRITICAL, 0, 0, 0, &packet_bytes(&[packet(1, 9)])[..20]);
    assert!(matches!(wrong(&cut), RecordError::CutPacket));
    let disorder = packet_bytes(&[packet(2, 1), packet(2, 1)]);
    let disordered = |image: Image| image.section(kind::HELD_OUTPUT, CRITICAL, 0, 0, 0, &disorder);
    assert!(matches!(wrong(&disordered), RecordError::PacketOrder { before: 2, found: 2 }));
    let other_device = |image: Image| image.section(kind::DEVICE_STATE, CRITICAL, 3, 0, 0, b"gpu");
    assert!(matches!(wrong(&other_device), RecordError::UnknownDevice { id: 3 }));
    let two_heads = |image: Image| image.section(kind::HEAD, CRITICAL, 0, 0, 0, &[0; 16]);
    assert!(matches!(wrong(&two_heads), RecordError::Count { found: 2, .. }));
    let guest_of_three = parse(&Image::new(1, 0, 3).end(), &limits(), true).unwrap_err();
    assert!(matches!(guest_of_three, RecordError::Geometry { regions: 3, wanted: 2, .. }));
    let mut small = limits();
    small.device_state_bytes = 8;
    assert!(matches!(parse(&good(), &small, true).unwrap_err(), RecordError::TooLarge { found: 15, limit: 8, .. }));
}

#[test]
fn a_record_that_ends_early_is_refused() {
    let image = good();
    for end in (0..image.len()).step_by(8) {
        parse(&image[..end], &limits(), true).unwrap_err();
    }
}

proptest! {
    #[test]
    fn no_bytes_make_parsing_panic(hits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..20)) {
        let mut image = good();
        for (at, byte) in hits {
            let at = at.index(image.len());
            image[at] = byte;
        }
        // Without checksums everything inside is reached; pages that come out lie inside the guest.
        if let Ok(view) = parse(&image, &limits(), false) {
            for run in view.pages {
                let pages = limits().pages_of(run.region.0).unwrap().1;
                prop_assert!(run.pages().end <= pages);
            }
        }
    }
}
