//! The same promises in CI: over each target's corpus, over its inputs changed at random, and over any bytes.

use super::{arbiter, journal, record, ring};
use crate::guest::Packet;
use crate::record::build::Image;
use crate::record::{CRITICAL, DEVICE_VMM, HEADER, SectionHeader, SegmentHeader, kind};
use crate::ring::{RingReader, RingShape};
use crate::testing::packet_bytes;
use proptest::prelude::*;
use std::path::{Path, PathBuf};
use zerocopy::{FromBytes, IntoBytes};

#[path = "../../../transport/src/fuzzing/corpus.rs"]
mod corpus;
use corpus::{changed, check, corpus};

fn at(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target)
}

/// A record with every kind of section and one page.
fn full(epoch: u64, sequence: u64) -> Vec<u8> {
    let packets =
        packet_bytes(&[Packet { sequence: 4, bytes: vec![1; 30] }, Packet { sequence: 9, bytes: vec![2; 3] }]);
    Image::new(epoch, sequence, 2)
        .section(kind::DEVICE_STATE, CRITICAL, DEVICE_VMM, 0, 0, b"vcpu and device")
        .section(kind::HELD_OUTPUT, CRITICAL, 0, 0, 0, &packets)
        .section(kind::RELEASED_UP_TO, CRITICAL, 0, 0, 0, &3u64.to_le_bytes())
        .section(kind::DISK_WRITES, 0, 0, 0, 0, b"not known, not critical")
        .runs(kind::DISCARDS, 1, &[(0, 4), (7, 1)])
        .runs(kind::PAGE_INDEX, 0, &[(3, 1)])
        .data(0, &[5])
        .end()
}

/// One of two regions, their pages in several runs and the data of those in segments that keep to other bounds.
fn scattered(epoch: u64, sequence: u64) -> Vec<u8> {
    Image::new(epoch, sequence, 2)
        .section(kind::DEVICE_STATE, CRITICAL, DEVICE_VMM, 0, 0, b"vcpu and device")
        .runs(kind::DISCARDS, 0, &[(50, 9)])
        .runs(kind::PAGE_INDEX, 0, &[(3, 2), (8, 1)])
        .runs(kind::PAGE_INDEX, 1, &[(1, 1)])
        .data(0, &[epoch as u8])
        .data(0, &[5, 6])
        .data(1, &[7])
        .end()
}

/// The same, no segment with more data than a small ring takes.
fn single(epoch: u64) -> Vec<u8> {
    Image::new(epoch, 0, 2)
        .section(kind::DEVICE_STATE, CRITICAL, DEVICE_VMM, 0, 0, b"vcpu and device")
        .runs(kind::PAGE_INDEX, 0, &[(3, 1), (8, 1)])
        .data(0, &[epoch as u8])
        .data(0, &[6])
        .end()
}

/// Records as a writer puts them round and round the ring, pads where a segment does not fit before its end.
fn round_and_round(records: &[Vec<u8>]) -> Vec<u8> {
    let lap = RingShape::of(super::RING_BYTES).expect("the target's").bytes as usize;
    let (mut stream, mut sequence) = (Vec::new(), 0);
    let mut put = |stream: &mut Vec<u8>, mut header: SegmentHeader, body: &[u8]| {
        sequence += 1;
        header.sequence = sequence.into();
        let end = stream.len() + header.stride();
        stream.extend_from_slice(header.sealed().as_bytes());
        stream.extend_from_slice(body);
        stream.resize(end, 0);
    };
    for mut rest in records.iter().map(Vec::as_slice) {
        while let Ok((header, behind)) = SegmentHeader::read_from_prefix(rest) {
            let room = lap - stream.len() % lap;
            if header.stride() > room {
                let section = SectionHeader {
                    kind: kind::PAD.into(),
                    len: ((room - HEADER) as u32).into(),
                    ..Default::default()
                };
                put(&mut stream, SegmentHeader { section, ..header }, &[]);
            }
            put(&mut stream, header, &behind[..header.section.len.get() as usize]);
            rest = &rest[header.stride()..];
        }
    }
    stream
}

/// One with state alone.
fn small(epoch: u64, sequence: u64) -> Vec<u8> {
    Image::new(epoch, sequence, 2).section(kind::DEVICE_STATE, CRITICAL, DEVICE_VMM, 0, 0, b"state").end()
}

fn of(mode: u8, bytes: &[Vec<u8>]) -> Vec<u8> {
    [vec![mode], bytes.concat()].concat()
}

#[test]
fn the_corpus_of_record_breaks_no_promise() {
    let seeds = [
        ("whole", of(0, &[full(1, 0)])),
        ("sealed", of(1, &[full(1, 0)])),
        ("small", of(1, &[small(1, 0)])),
        ("scattered", of(1, &[scattered(1, 0)])),
    ];
    check(&at("record"), &seeds, record);
}

#[test]
fn the_corpus_of_ring_breaks_no_promise() {
    let seeds = [
        ("whole", of(0, &[small(1, 0), full(2, 3)])),
        ("sealed", of(2, &[small(1, 0), small(2, 3), small(3, 6)])),
        ("large", of(1, &[full(1, 0)])),
        ("laps", of(0, &[round_and_round(&[1, 2, 3].map(single))])),
    ];
    check(&at("ring"), &seeds, ring);
}

/// Otherwise the target would look at less than its seeds are made for.
#[test]
fn the_seed_of_more_than_a_lap_is_taken_to_its_end() {
    let mut reader = RingReader::new(super::RING_BYTES, super::NONCE, super::OVERFLOW_BYTES).expect("a little memory");
    let (stream, mut ring) = (round_and_round(&[1, 2, 3].map(single)), vec![0; super::RING_BYTES]);
    let lap = reader.shape().bytes as usize;
    assert!((lap + 1..3 * lap).contains(&stream.len()), "{} bytes in laps of {lap}", stream.len());
    while (reader.consumed() as usize) < stream.len() {
        let at = reader.consumed() as usize;
        super::write(&mut ring, &stream, at, lap);
        assert!(super::drain(&mut reader, &ring), "nothing in it is wrong");
        assert!(reader.consumed() as usize > at, "{at} of {} bytes", stream.len());
    }
    assert_eq!(reader.committed().0, 3);
    let view = crate::record::parse(&scattered(1, 0), &super::limits(), true).expect("nothing in it is wrong");
    assert_eq!((view.page_count(), view.pages.len()), (4, 4));
}

#[test]
fn the_corpus_of_arbiter_breaks_no_promise() {
    check(&at("arbiter"), &crate::arbiter::etcd::fuzzing::seeds(), arbiter);
}

#[test]
fn the_corpus_of_journal_breaks_no_promise() {
    let whole = [&[0; 32][..], b"what a source must know to be started again"].concat();
    let seeds = [
        ("sealed", of(1, &[whole])),
        ("kept", of(2, &[crate::journal::cell::seed()])),
        ("image", of(3, &[crate::fold::image::seed()])),
        ("place", of(4, &[crate::ring::spool::seed()])),
    ];
    check(&at("journal"), &seeds, journal);
}

proptest! {
    #[test]
    fn no_arbiter_breaks_a_promise(input in changed(corpus(&at("arbiter")))) {
        arbiter(&input);
    }

    #[test]
    fn no_journal_breaks_a_promise(input in changed(corpus(&at("journal")))) {
        journal(&input);
    }

    #[test]
    fn no_record_breaks_a_promise(input in changed(corpus(&at("record")))) {
        record(&input);
    }

    #[test]
    fn no_ring_breaks_a_promise(input in changed(corpus(&at("ring")))) {
        ring(&input);
    }
}
