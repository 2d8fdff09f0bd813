//! The same promises in CI: over each target's corpus, over its inputs changed at random, and over any bytes.

use super::{arbiter, journal, record, ring};
use crate::guest::Packet;
use crate::record::build::Image;
use crate::record::{CRITICAL, DEVICE_VMM, kind};
use crate::testing::packet_bytes;
use proptest::prelude::*;
use std::path::{Path, PathBuf};

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

/// One with state alone.
fn small(epoch: u64, sequence: u64) -> Vec<u8> {
    Image::new(epoch, sequence, 2).section(kind::DEVICE_STATE, CRITICAL, DEVICE_VMM, 0, 0, b"state").end()
}

fn of(mode: u8, bytes: &[Vec<u8>]) -> Vec<u8> {
    [vec![mode], bytes.concat()].concat()
}

#[test]
fn the_corpus_of_record_breaks_no_promise() {
    let seeds = [("whole", of(0, &[full(1, 0)])), ("sealed", of(1, &[full(1, 0)])), ("small", of(1, &[small(1, 0)]))];
    check(&at("record"), &seeds, record);
}

#[test]
fn the_corpus_of_ring_breaks_no_promise() {
    let seeds = [
        ("whole", of(0, &[small(1, 0), full(2, 3)])),
        ("sealed", of(2, &[small(1, 0), small(2, 3), small(3, 6)])),
        ("large", of(1, &[full(1, 0)])),
    ];
    check(&at("ring"), &seeds, ring);
}

#[test]
fn the_corpus_of_arbiter_breaks_no_promise() {
    check(&at("arbiter"), &crate::arbiter::etcd::fuzzing::seeds(), arbiter);
}

#[test]
fn the_corpus_of_journal_breaks_no_promise() {
    let whole = [&[0; 32][..], b"what a source must know to be started again"].concat();
    let seeds = [("sealed", of(1, &[whole])), ("kept", of(2, &[crate::journal::cell::seed()]))];
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
