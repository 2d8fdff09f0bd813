//! `read-lat`, `read-bw`, `write-bw`, `commit-lat`: the lanes alone, as the engine and the tether use them.

use super::client::{Client, Met};
use super::loops::{self, Amount, BATCH, Post, Streamed, Waiting};
use super::protocol::{BULK, CHECKPOINT, FAULT, TRAILER_ROOM, Wanted, source_word, written_word};
use super::report::{Outcome, SourceUse, Test};
use super::server::memory;
use super::{LEAST_RING, Options};
use crate::error::BenchError;
use crate::floor::PAGE;
use crate::rig::soon;
use crate::table::{Bandwidth, Row};
use belay_transport::fabric::{Lane, LocalKey, MAX_OPERATION_BYTES, Read, ReadKey, Write, WriteKey};
use belay_transport::region::{Mapping, RamFile};
use std::sync::Arc;

/// Bytes of a checkpoint's trailer as the ring writes it, less its checksum's padding: what a commit moves.
const COMMIT_BYTES: usize = 64;

/// Reads of `bytes` each from all over the server's RAM, to the same offsets here.
pub struct Reads {
    local: Arc<Mapping>,
    key: LocalKey,
    remote: ReadKey,
    bytes: usize,
    scattered: bool,
    _file: RamFile,
}

impl Reads {
    /// Registers as much memory as the server's RAM has.
    pub fn new(met: &mut Met, ram_bytes: usize) -> Result<Self, BenchError> {
        let (file, local) = memory("bench-local", ram_bytes)?;
        let key = met.initiator.register_local(&local)?;
        Ok(Self { local, key, remote: met.ram, bytes: PAGE, scattered: true, _file: file })
    }

    /// Of so many bytes, one after the other, or `scattered` at pages that no prefetcher expects.
    pub fn shape(&mut self, bytes: usize, scattered: bool) -> Result<(), BenchError> {
        check_size(bytes, self.local.len())?;
        (self.bytes, self.scattered) = (bytes, scattered);
        Ok(())
    }

    fn offset(&self, sequence: u64) -> usize {
        let stride = if self.scattered { PAGE } else { self.bytes.next_multiple_of(PAGE) };
        let places = ((self.local.len() - self.bytes) / stride + 1) as u64;
        let at = if self.scattered { mixed(sequence) } else { sequence };
        (at % places) as usize * stride
    }

    /// Posts `count` reads from `first` on.
    pub fn post(
        &self,
        lane: &mut dyn Lane,
        first: u64,
        count: u64,
    ) -> Result<(), belay_transport::fabric::FabricError> {
        let read = |id: u64| {
            let (offset, len) = (self.offset(id) as u64, self.bytes as u32);
            Read { id, remote: self.remote, remote_offset: offset, local: self.key, local_offset: offset, len }
        };
        let mut batch = [read(first); BATCH];
        batch.iter_mut().zip(first..first + count).for_each(|(slot, id)| *slot = read(id));
        lane.post_reads(&batch[..count as usize])
    }

    /// Makes sure that what is found by [`Reads::check`] has come since.
    pub fn forget(&self) {
        (0..self.local.len()).step_by(PAGE).for_each(|at| self.local.write(at, &0_u64.to_ne_bytes()));
    }

    /// Whether the page at the start of each of the first `count` reads is the server's.
    pub fn check(&self, count: u64) -> Result<(), BenchError> {
        let word = self.bytes.min(8);
        for page in (0..count).map(|sequence| self.offset(sequence) / PAGE) {
            let (mut found, expected) = ([0; 8], source_word(page as u64).to_ne_bytes());
            self.local.read(page * PAGE, &mut found[..word]);
            if found[..word] != expected[..word] {
                let [found, expected] = [found, expected].map(u64::from_ne_bytes);
                return Err(BenchError::Wrong { page, found, expected });
            }
        }
        Ok(())
    }
}

/// Splitmix64: the same scattered order every time.
fn mixed(sequence: u64) -> u64 {
    let mut z = sequence.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z ^ (z >> 31)
}

fn check_size(bytes: usize, room: usize) -> Result<(), BenchError> {
    if bytes == 0 || bytes > MAX_OPERATION_BYTES as usize || bytes > room {
        let why = format!("{bytes} is not from 1 to {}", room.min(MAX_OPERATION_BYTES as usize));
        return Err(BenchError::Options { what: "--size", why });
    }
    Ok(())
}

/// One demand READ at a time.
pub fn read_lat(client: &mut Client, options: &Options) -> Result<Outcome, BenchError> {
    let ram_bytes = options.memory as u64;
    let mut met = client.meet(&Wanted { ram_bytes, ring_bytes: LEAST_RING, lanes: vec![FAULT] })?;
    let mut reads = Reads::new(&mut met, options.memory)?;
    let mut lane = met.lane(FAULT, options.window)?;
    let mut outcome = Outcome::new(Test::ReadLat, &met);
    for bytes in options.sizes(&[PAGE]) {
        reads.shape(bytes, true)?;
        reads.forget();
        let before = met.usage()?;
        let took = loops::latency(lane.as_mut(), options.waiting, options.amount(1_000), &mut |lane, first, count| {
            reads.post(lane, first, count)
        })?;
        let used = met.usage()?.since(&before);
        reads.check(took.len() as u64)?;
        outcome.source.push(SourceUse::new(bytes, took.len() as u64, used));
        outcome.latency.push(Row::of_samples("READ on the fault lane", bytes, &took));
    }
    drop(lane);
    met.done()?;
    Ok(outcome)
}

/// A full window of background READs.
pub fn read_bw(client: &mut Client, options: &Options) -> Result<Outcome, BenchError> {
    let ram_bytes = options.memory as u64;
    let mut met = client.meet(&Wanted { ram_bytes, ring_bytes: LEAST_RING, lanes: vec![BULK] })?;
    let mut reads = Reads::new(&mut met, options.memory)?;
    let mut lane = met.lane(BULK, options.window)?;
    let mut outcome = Outcome::new(Test::ReadBw, &met);
    for bytes in options.sizes(&[4 << 10, 64 << 10, 1 << 20]) {
        reads.shape(bytes, false)?;
        reads.forget();
        let before = met.usage()?;
        let amount = options.amount_for(bytes);
        let streamed =
            stream(lane.as_mut(), options, amount, &mut |lane, first, count| reads.post(lane, first, count))?;
        let used = met.usage()?.since(&before);
        reads.check(streamed.operations)?;
        outcome.source.push(SourceUse::new(bytes, streamed.operations, used));
        outcome.bandwidth.push(bandwidth("READ", bytes, streamed));
    }
    drop(lane);
    met.done()?;
    Ok(outcome)
}

pub fn stream(
    lane: &mut dyn Lane,
    options: &Options,
    amount: Amount,
    post: &mut Post<'_>,
) -> Result<Streamed, BenchError> {
    loops::stream(lane, options.window, options.waiting, amount, post)
}

pub fn bandwidth(name: &str, bytes: usize, streamed: Streamed) -> Bandwidth {
    Bandwidth {
        name: name.to_owned(),
        bytes,
        iterations: streamed.operations,
        peak_bytes_per_s: streamed.peak_per_s * bytes as f64,
        average_bytes_per_s: streamed.average_per_s * bytes as f64,
        messages_per_s: streamed.average_per_s,
    }
}

/// Memory here that is written to the same offsets of the server's ring.
struct Writes {
    local: Arc<Mapping>,
    key: LocalKey,
    remote: WriteKey,
    /// What is written over and over; behind it lies [`TRAILER_ROOM`].
    room: usize,
    _file: RamFile,
}

impl Writes {
    fn new(met: &mut Met, ring_bytes: u64) -> Result<Self, BenchError> {
        let (file, local) = memory("bench-staging", ring_bytes as usize)?;
        let key = met.initiator.register_local(&local)?;
        Ok(Self { local, key, remote: met.ring.ring, room: (ring_bytes - TRAILER_ROOM) as usize, _file: file })
    }

    fn fill(&self, salt: u64) {
        for page in 0..self.room / PAGE {
            self.local.write(page * PAGE, &written_word(salt, page as u64).to_ne_bytes());
        }
    }

    fn write(&self, id: u64, offset: usize, len: usize) -> Write {
        let offset = offset as u64;
        let (remote, local) = (self.remote, self.key);
        Write { id, remote, remote_offset: offset, local, local_offset: offset, len: len as u32 }
    }

    /// The `sequence`th piece of `bytes`.
    fn piece(&self, sequence: u64, bytes: usize) -> Write {
        let places = (self.room / bytes) as u64;
        self.write(sequence, (sequence % places) as usize * bytes, bytes)
    }

    /// What commits all that was written before.
    fn trailer(&self) -> Write {
        self.write(u64::MAX, self.room, COMMIT_BYTES)
    }
}

/// A full window of checkpoint WRITEs.
pub fn write_bw(client: &mut Client, options: &Options) -> Result<Outcome, BenchError> {
    let ring_bytes = options.ring as u64 + TRAILER_ROOM;
    let mut met = client.meet(&Wanted { ram_bytes: PAGE as u64, ring_bytes, lanes: vec![CHECKPOINT] })?;
    let writes = Writes::new(&mut met, ring_bytes)?;
    let mut lane = met.lane(CHECKPOINT, options.window)?;
    let mut outcome = Outcome::new(Test::WriteBw, &met);
    for (salt, bytes) in (1_u64..).zip(options.sizes(&[64 << 10])) {
        check_size(bytes, writes.room)?;
        writes.fill(salt);
        let before = met.usage()?;
        let amount = options.amount_for(bytes);
        let streamed = stream(lane.as_mut(), options, amount, &mut |lane, first, count| {
            let mut batch = [writes.piece(first, bytes); BATCH];
            batch.iter_mut().zip(first..first + count).for_each(|(slot, id)| *slot = writes.piece(id, bytes));
            lane.post_writes(&batch[..count as usize])
        })?;
        let used = met.usage()?.since(&before);
        // Completed is not always placed (iWARP); committed is.
        lane.commit(&writes.trailer(), soon())?;
        let places = (writes.room / bytes) as u64;
        met.check_written(salt, streamed.operations.min(places) * bytes as u64)?;
        outcome.source.push(SourceUse::new(bytes, streamed.operations, used));
        outcome.bandwidth.push(bandwidth("WRITE", bytes, streamed));
    }
    drop(lane);
    met.done()?;
    Ok(outcome)
}

/// One commit at a time: a trailer that is known to be in the ring.
pub fn commit_lat(client: &mut Client, options: &Options) -> Result<Outcome, BenchError> {
    let ring_bytes = options.ring as u64 + TRAILER_ROOM;
    let mut met = client.meet(&Wanted { ram_bytes: PAGE as u64, ring_bytes, lanes: vec![CHECKPOINT] })?;
    let writes = Writes::new(&mut met, ring_bytes)?;
    let mut lane = met.lane(CHECKPOINT, options.window)?;
    let mut outcome = Outcome::new(Test::CommitLat, &met);
    let amount = options.amount(1_000);
    for (salt, bytes) in (1_u64..).zip(options.sizes(&[COMMIT_BYTES])) {
        check_size(bytes, writes.room)?;
        writes.fill(salt);
        let before = met.usage()?;
        let took = loops::commits(lane.as_mut(), amount, |sequence| writes.piece(sequence, bytes))?;
        let used = met.usage()?.since(&before);
        let places = (writes.room / bytes) as u64;
        met.check_written(salt, (took.len() as u64).min(places) * bytes as u64)?;
        outcome.source.push(SourceUse::new(bytes, took.len() as u64, used));
        outcome.latency.push(Row::of_samples("commit on the checkpoint lane", bytes, &took));
    }
    drop(lane);
    met.done()?;
    Ok(outcome)
}

/// One READ at a time with the engine's own lane, before the engine has it: what a fault cannot be faster than.
pub fn bare_reads(lane: &mut dyn Lane, reads: &Reads, count: u64) -> Result<Vec<u64>, BenchError> {
    let amount = Amount::Iterations(count);
    loops::latency(lane, Waiting::Polling, amount, &mut |lane, first, count| reads.post(lane, first, count))
}
