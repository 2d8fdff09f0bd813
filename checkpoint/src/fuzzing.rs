//! What the fuzz targets of `checkpoint/fuzz` call, and CI over their corpora: each function takes any bytes, and panics when a
//! reader breaks a promise. See docs/fuzzing.md.

use crate::record::{
    ALIGN, HEADER, Limits, MAGIC, RecordView, SegmentHeader, Trailer, VERSION, crc, kind, parse, stride,
};
use crate::ring::{RingReader, RingShape, SEGMENTS_OFFSET, Step, Still};
use belay_transport::{PAGE_SIZE, RegionId};
use zerocopy::{FromBytes, IntoBytes};

/// The session that inputs belong to.
const NONCE: u64 = 0x1bad_cafe_5eed_0001;
/// Regions of the guest and their pages.
const REGIONS: [(u16, u64); 2] = [(0, 100), (1, 10)];
/// Least ring region, rounded up to pages.
const RING_BYTES: usize = RingShape::LEAST.next_multiple_of(4096);
/// Memory for the record being put together.
const OVERFLOW_BYTES: usize = 64 << 10;
/// Longest input that is looked at.
const MOST_BYTES: usize = 64 << 10;

fn limits() -> Limits {
    let regions = REGIONS.map(|(id, pages)| (RegionId(id), pages));
    Limits { device_state_bytes: 1000, output_bytes: 1000, ..Limits::for_regions(regions) }
}

/// What an arbiter answers.
pub fn arbiter(data: &[u8]) {
    crate::arbiter::etcd::fuzzing::arbiter(&data[..data.len().min(MOST_BYTES)]);
}

/// A journal on disk, a value in kept memory, and two of the values that are kept: the newest epoch, and the place in the ring.
pub fn journal(data: &[u8]) {
    let Some((mode, bytes)) = data.split_first() else { return };
    match mode % 5 {
        0 => crate::journal::disk::fuzz(bytes, false),
        1 => crate::journal::disk::fuzz(bytes, true),
        2 => crate::journal::cell::fuzz(bytes),
        3 => crate::fold::image::fuzz(bytes),
        _ => crate::ring::spool::fuzz(bytes),
    }
}

/// Makes what checksums and counts say fit the bytes, as a hostile writer would: the sums are no secret. Segments are those that the
/// lengths make, up to a trailer.
fn seal(image: &mut [u8], mut sequence: u64, epoch: u64) {
    let (mut at, mut segments, mut bytes, mut chain) = (0, 0u64, 0u64, Vec::new());
    while let Some(Ok((header, rest))) = image.get_mut(at..).map(SegmentHeader::mut_from_prefix) {
        let section = &mut header.section;
        let Some(body) = rest.get_mut(..section.len.get() as usize) else { return };
        let last = section.kind.get() == kind::TRAILER;
        if last && let Ok((trailer, _)) = Trailer::mut_from_prefix(body) {
            trailer.segments = segments.into();
            trailer.bytes = bytes.into();
            trailer.chain = crc(&chain).into();
        }
        section.checksum = crc(body).into();
        sequence += 1;
        // A pad is a segment of the ring's and none of the record's.
        if section.kind.get() != kind::PAD {
            chain.extend_from_slice(section.as_bytes());
            (segments, bytes) = (segments + 1, bytes + stride(section.len.get() as usize) as u64);
        }
        (header.magic, header.version, header.nonce) = (MAGIC.into(), VERSION.into(), NONCE.into());
        (header.sequence, header.epoch) = (sequence.into(), epoch.into());
        *header = header.sealed();
        at += header.stride();
        if last {
            return;
        }
    }
}

/// A whole record in private memory, after its checksums.
pub fn record(data: &[u8]) {
    let Some((mode, bytes)) = data[..data.len().min(MOST_BYTES)].split_first() else { return };
    let mut image = bytes.to_vec();
    if mode % 2 == 1 {
        seal(&mut image, 0, 1);
    }
    let Ok(view) = parse(&image, &limits(), true) else { return };
    holds(&view, image.len());
    // What is checked with its sums is the same without.
    let again = parse(&image, &limits(), false).expect("it parsed before");
    assert!(again.pages == view.pages && again.outputs == view.outputs && again.discards == view.discards);
}

/// All that whoever folds a record relies on.
fn holds(view: &RecordView, image_bytes: usize) {
    let pages_of =
        |id: RegionId| REGIONS.iter().find(|(region, _)| *region == id.0).expect("a region of the guest's").1;
    let mut ends = [0u64; 2];
    for run in &view.pages {
        let pages = run.pages();
        assert!(!pages.is_empty() && run.len.is_multiple_of(PAGE_SIZE) && run.at + run.len <= image_bytes);
        assert!(pages.start >= ends[usize::from(run.region.0)], "pages come once and in order");
        ends[usize::from(run.region.0)] = pages.end;
        assert!(pages.end <= pages_of(run.region));
    }
    let mut ends = [0u64; 2];
    for (region, run) in &view.discards {
        assert!(!run.is_empty() && run.start >= ends[usize::from(region.0)] && run.end <= pages_of(*region));
        ends[usize::from(region.0)] = run.end;
    }
    let output: usize = view.outputs.iter().map(|packet| packet.bytes.len()).sum();
    assert!(view.device_state.len() <= 1000 && output <= 1000);
    assert!(view.outputs.is_sorted_by(|a, b| a.sequence < b.sequence));
    assert!(view.page_count() as usize * PAGE_SIZE + view.device_state.len() + output <= image_bytes);
}

/// A ring that a hostile destination writes, round and round, wherever the source's reader has given room.
pub fn ring(data: &[u8]) {
    let Some((mode, bytes)) = data[..data.len().min(MOST_BYTES)].split_first() else { return };
    let (mut stream, mut ring) = (bytes.to_vec(), vec![0; RING_BYTES]);
    thread_local! {
        static FRESH: RingReader = RingReader::new(RING_BYTES, NONCE, OVERFLOW_BYTES).expect("a little memory");
    }
    let mut reader = FRESH.with(Clone::clone);
    let mut whole = mode % 8;
    loop {
        let at = reader.consumed() as usize;
        let Some(next) = stream.get_mut(at..) else { return };
        if whole > 0 {
            // One record after the other is made whole, as if it had just been written.
            seal(next, reader.sequence(), reader.committed().next().0);
        }
        write(&mut ring, &stream, at, reader.shape().bytes as usize);
        let goes_on = drain(&mut reader, &ring);
        if !goes_on || (whole == 0 && reader.consumed() as usize == at) {
            return;
        }
        whole = whole.saturating_sub(1);
    }
}

/// Puts what follows `at` in the `stream` of all that is ever written where it belongs in a ring of `lap` bytes, as far as there is room.
fn write(ring: &mut [u8], stream: &[u8], mut at: usize, lap: usize) {
    let end = stream.len().min(at + lap);
    while at < end {
        let offset = at % lap;
        let count = (lap - offset).min(end - at);
        ring[SEGMENTS_OFFSET + offset..][..count].copy_from_slice(&stream[at..at + count]);
        at += count;
    }
}

/// What is taken of a ring that stands still.
fn in_place(mut reader: RingReader, ring: &[u8]) -> Vec<Vec<u8>> {
    let mut records = Vec::new();
    while let Some(record) = reader.in_place(Still::Private(ring)) {
        records.push(record.whole());
        let after = record.after();
        reader.pass(after);
    }
    records
}

/// Takes everything that is there; `false` when the reader has had enough of this destination.
fn drain(reader: &mut RingReader, ring: &[u8]) -> bool {
    let (in_place, mut records) = (in_place(reader.clone(), ring), Vec::new());
    let goes_on = take(reader, ring, &mut records);
    assert!(in_place == records, "{} records in place, {} copied", in_place.len(), records.len());
    goes_on
}

fn take(reader: &mut RingReader, ring: &[u8], records: &mut Vec<Vec<u8>>) -> bool {
    // A ring that stands still has as many segments as fit into it, and no more.
    let most = ring.len() / ALIGN + 1;
    for _ in 0..=most {
        let (before, epoch) = (reader.consumed(), reader.committed());
        match reader.step(ring) {
            Ok(Step::NotYet) => {
                assert_eq!((reader.consumed(), reader.committed()), (before, epoch));
                return true;
            }
            Ok(step) => {
                let taken = reader.consumed() - before;
                assert!(taken >= HEADER as u64 && taken.is_multiple_of(ALIGN as u64));
                assert!(taken <= stride(reader.shape().body_max) as u64 || step == Step::Spooled);
                let Step::Committed(now) = step else {
                    assert!(reader.record().is_none() && reader.committed() == epoch);
                    continue;
                };
                assert_eq!((now, reader.committed()), (epoch.next(), now));
                let image = reader.record().expect("committed").to_vec();
                assert!(image.len() <= OVERFLOW_BYTES);
                if let Ok(view) = parse(&image, &limits(), true) {
                    assert_eq!(view.epoch, now);
                    holds(&view, image.len());
                }
                records.push(image);
                reader.clear();
            }
            Err(error) => {
                assert_eq!(reader.consumed(), before, "{error}");
                return false;
            }
        }
    }
    panic!("more segments than the ring can hold");
}

#[cfg(test)]
mod tests;
