//! The model: what every byte of a guest's memory and every packet of it must be, computed anew from the guest's spec, the steps
//! each vCPU has done, and the nonces it was given.
//!
//! Which nonce a guest saw at which step depends on when it was stopped, so that alone is taken from guest memory (the nonce logs)
//! and checked against the list of nonces really issued. Everything else is compared byte for byte: tables, text, parameters, logs,
//! holes and data. Costs as much private memory as the guest has.
//!
//! A guest that was stopped anywhere ([`Model::of_stopped`]) stands somewhere between two PACE reads, and its device state does not say at which
//! step. Its memory does: a step writes one word, and each new word follows from the old one, so that of the steps after the last PACE read those
//! done are the number with which memory agrees, if there is one. A guest that is stopped may lack pages: those it has are compared.

use super::packet::{self, PacketError, Parsed};
use crate::kvm::guests::rules::Pattern;
use crate::kvm::guests::{
    GuestSpec, Layout, NONCE_LOG_CAPACITY, NONCE_LOG_PAGES, Program, SpecError, low_pages, rules, text,
};
use belay_transport::region::Mapping;
use belay_transport::{PAGE_SIZE, PageIndex};
use std::collections::BTreeMap;

const PAGE_WORDS: usize = PAGE_SIZE / 8;

/// One entry of a vCPU's nonce log: it saw `nonce` for the first time when it had done `step` steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NonceSeen {
    pub step: u64,
    pub nonce: u64,
}

/// Why the nonces a guest says it saw cannot be true.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NonceError {
    #[error("vCPU {vcpu}'s nonce log says it holds {count} entries; it has room for {NONCE_LOG_CAPACITY}")]
    TooMany { vcpu: u16, count: u64 },
    #[error(
        "vCPU {vcpu} says it saw nonce {nonce:#x} at step {step}, where none is read (last entry at {after:?}, batches of {batch}, {steps} steps done)"
    )]
    Step { vcpu: u16, nonce: u64, step: u64, after: Option<u64>, batch: u64, steps: u64 },
    #[error("vCPU {vcpu} saw nonce {nonce:#x} at step {step}: it was not issued, or not in this order")]
    NotIssued { vcpu: u16, nonce: u64, step: u64 },
}

/// One 8-byte word that is not what it must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Difference {
    /// Byte offset in guest RAM.
    pub offset: u64,
    pub expected: u64,
    pub actual: u64,
}

/// What a comparison of all memory found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Comparison {
    pub pages_compared: u64,
    /// Pages that are not there, and those whose content depends on time (the metronome's log) or on where a vCPU of several stopped
    /// (the counters they share).
    pub pages_not_compared: u64,
    pub pages_different: u64,
    /// The first differing words, at most as many as asked for.
    pub first: Vec<Difference>,
}

impl Comparison {
    /// Whether memory is what it must be.
    pub fn is_equal(&self) -> bool {
        self.pages_different == 0
    }
}

impl std::fmt::Display for Comparison {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} of {} pages differ", self.pages_different, self.pages_compared)?;
        for difference in &self.first {
            let Difference { offset, expected, actual } = difference;
            write!(
                f,
                "; at {offset:#x} (page {}): expected {expected:#018x}, is {actual:#018x}",
                offset / PAGE_SIZE as u64
            )?;
        }
        Ok(())
    }
}

/// Why no model can be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ModelError {
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error(transparent)]
    Nonce(#[from] NonceError),
    #[error("steps of {got} vCPUs for a guest of {vcpus}")]
    Vcpus { got: usize, vcpus: u16 },
    #[error("vCPU {vcpu} stands at step {step}, which is not the end of a batch of {batch}")]
    Step { vcpu: u16, step: u64, batch: u64 },
    #[error("guest memory is mapped with {got} bytes; the guest has {wanted}")]
    Memory { got: usize, wanted: u64 },
    #[error("vCPU {vcpu} has not filled its part of memory yet")]
    NotFilled { vcpu: u16 },
}

/// A guest's past, from which all else follows.
pub struct Model {
    spec: GuestSpec,
    layout: Layout,
    image: Vec<u64>,
    packets: Vec<Vec<Parsed>>,
    logs: Vec<Vec<NonceSeen>>,
    issued: Vec<u64>,
    /// Pages whose content does not follow from all this.
    unknown: Vec<PageIndex>,
}

impl Model {
    /// The model of a guest that stands at a PACE read, with so many steps done by each vCPU. `memory` is read for the nonce logs
    /// only; `issued` are all nonces the guest was ever given, in order.
    pub fn new(spec: &GuestSpec, steps: &[u64], memory: &Mapping, issued: &[u64]) -> Result<Self, ModelError> {
        let layout = spec.layout()?;
        if memory.len() as u64 != spec.memory_bytes {
            return Err(ModelError::Memory { got: memory.len(), wanted: spec.memory_bytes });
        }
        if steps.len() != usize::from(spec.vcpus) {
            return Err(ModelError::Vcpus { got: steps.len(), vcpus: spec.vcpus });
        }
        let mut logs = Vec::new();
        for (vcpu, &step) in (0..spec.vcpus).zip(steps) {
            if !step.is_multiple_of(spec.batch_steps) {
                return Err(ModelError::Step { vcpu, step, batch: spec.batch_steps });
            }
            logs.push(read_nonce_log(spec, &layout, memory, vcpu, step, issued, false)?);
        }
        Ok(Self::from_logs(spec, layout, steps, logs, issued))
    }

    /// The model of a guest whose vCPUs were stopped anywhere behind the PACE reads of `steps`, and before the next ones; `is_there` tells which
    /// pages `memory` has. Nothing is said of a nonce log that is
    /// not there, nor of what follows from it: the packets.
    pub fn of_stopped(
        spec: &GuestSpec,
        steps: &[u64],
        memory: &Mapping,
        issued: &[u64],
        is_there: &dyn Fn(PageIndex) -> bool,
    ) -> Result<Self, ModelError> {
        let layout = spec.layout()?;
        if memory.len() as u64 != spec.memory_bytes {
            return Err(ModelError::Memory { got: memory.len(), wanted: spec.memory_bytes });
        }
        if steps.len() != usize::from(spec.vcpus) {
            return Err(ModelError::Vcpus { got: steps.len(), vcpus: spec.vcpus });
        }
        let pattern = spec.program.pattern();
        let (mut logs, mut unwritten, mut unknown) = (Vec::new(), Vec::new(), Vec::new());
        for (vcpu, &step) in (0..spec.vcpus).zip(steps) {
            if step == 0 && pattern.is_some() {
                return Err(ModelError::NotFilled { vcpu });
            }
            let log = (0..NONCE_LOG_PAGES).map(|page| PageIndex(layout.nonce_log(vcpu).0 + page));
            // Of the log what its count needs must be there.
            let needed = match is_there(layout.nonce_log(vcpu)) {
                true => (nonce_log_word(&layout, memory, vcpu, 0).min(NONCE_LOG_CAPACITY) * 16 + 16)
                    .div_ceil(PAGE_SIZE as u64),
                false => 1,
            };
            if pattern.is_none() || !log.clone().take(needed as usize).all(is_there) {
                logs.push(Vec::new());
                unknown.extend(log);
                continue;
            }
            let next = step + spec.batch_steps;
            let unfinished = unfinished_entry(&layout, memory, vcpu, step);
            logs.push(read_nonce_log(spec, &layout, memory, vcpu, next, issued, unfinished.is_some())?);
            unwritten.extend(unfinished.map(|words| (vcpu, words)));
        }
        let mut model = Self::from_logs(spec, layout, steps, logs, issued);
        if pattern.is_some() {
            model.unknown.extend(unknown);
        }
        for (vcpu, [count, step]) in unwritten {
            let at = model.layout.nonce_log(vcpu).0 as usize * PAGE_WORDS;
            model.image[at] = count;
            model.image[at + count as usize * 2] = step;
        }
        if let Some(pattern) = pattern {
            for (vcpu, &step) in (0..spec.vcpus).zip(steps) {
                if model.go_on(pattern, (vcpu, step), memory, is_there) && spec.vcpus > 1 {
                    model.unknown.push(model.layout.shared_counters());
                }
            }
        }
        Ok(model)
    }

    /// Takes as many of a vCPU's next steps, up to its next PACE read, as agree best with the pages that are there. Whether they may be all of them:
    /// it may then have added to the counters that it shares, or be about to.
    fn go_on(
        &mut self,
        pattern: Pattern,
        (vcpu, from): (u16, u64),
        memory: &Mapping,
        is_there: &dyn Fn(PageIndex) -> bool,
    ) -> bool {
        let own = self.layout.own_pages(vcpu);
        let seed = rules::step_seed(self.spec.seed, vcpu);
        let actual = |at: usize| {
            let mut bytes = [0; 8];
            memory.read(at * 8, &mut bytes);
            u64::from_le_bytes(bytes)
        };
        // Word by word of this batch: what is there, what it must be after the steps so far.
        let mut differing = 0i64;
        let mut touched: BTreeMap<usize, (u64, u64)> = BTreeMap::new();
        let mut writes = Vec::new();
        for step in from..from + self.spec.batch_steps {
            let (page, word, hash) = rules::step(pattern, seed, step, own.end - own.start);
            let page = own.start + page;
            let at = page as usize * PAGE_WORDS + word;
            let there = is_there(PageIndex(page));
            let (is, now) = *touched.entry(at).or_insert_with(|| {
                let now = self.image[at];
                let is = if there { actual(at) } else { now };
                differing += i64::from(is != now);
                (is, now)
            });
            let next = rules::chain(now, hash);
            touched.insert(at, (is, next));
            writes.push((at, there, is, now, next));
        }
        let (mut fewest, mut done) = (differing, 0);
        let mut may_be_all = false;
        for (index, &(_, there, is, now, next)) in writes.iter().enumerate() {
            if there {
                differing += i64::from(is != next) - i64::from(is != now);
            }
            if differing < fewest {
                (fewest, done) = (differing, index + 1);
            }
            may_be_all = differing == fewest;
        }
        for &(at, _, _, _, next) in &writes[..done] {
            self.image[at] = next;
        }
        may_be_all
    }

    /// The same from nonce logs read earlier ([`Self::nonces_seen`]), where guest memory is out of reach.
    pub fn from_nonces_seen(
        spec: &GuestSpec,
        steps: &[u64],
        logs: Vec<Vec<NonceSeen>>,
        issued: &[u64],
    ) -> Result<Self, ModelError> {
        let layout = spec.layout()?;
        if steps.len() != usize::from(spec.vcpus) || logs.len() != steps.len() {
            return Err(ModelError::Vcpus { got: steps.len().min(logs.len()), vcpus: spec.vcpus });
        }
        Ok(Self::from_logs(spec, layout, steps, logs, issued))
    }

    fn from_logs(spec: &GuestSpec, layout: Layout, steps: &[u64], logs: Vec<Vec<NonceSeen>>, issued: &[u64]) -> Self {
        let mut image = vec![0; layout.pages() as usize * PAGE_WORDS];
        for low in low_pages(&layout, spec, text()) {
            let at = low.page.0 as usize * PAGE_WORDS;
            for (word, bytes) in image[at..].iter_mut().zip(low.bytes.chunks(8)) {
                let mut whole = [0; 8];
                whole[..bytes.len()].copy_from_slice(bytes);
                *word = u64::from_le_bytes(whole);
            }
        }
        fill(&mut image, spec, &layout);
        let packets = match spec.program.pattern() {
            Some(pattern) => run_ledger(&mut image, spec, pattern, &layout, steps, &logs),
            None => (0..spec.vcpus).map(|vcpu| scanner_packets(&image, &layout, vcpu, steps)).collect(),
        };
        let unknown = match spec.program {
            Program::Metronome => vec![layout.metronome_log()],
            _ => Vec::new(),
        };
        Self { spec: spec.clone(), layout, image, packets, logs, issued: issued.to_vec(), unknown }
    }

    /// Compares all of guest memory, and lists up to `limit` differing words.
    pub fn compare(&self, memory: &Mapping, limit: usize) -> Comparison {
        self.compare_those(memory, limit, &|_| true)
    }

    /// Compares the pages that are there.
    pub fn compare_those(
        &self,
        memory: &Mapping,
        limit: usize,
        is_there: &(dyn Fn(PageIndex) -> bool + Sync),
    ) -> Comparison {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let pages = self.layout.pages() as usize;
        let share = pages.div_ceil(threads);
        let parts = std::thread::scope(|scope| {
            let ranges = (0..threads).map(|index| (index * share).min(pages)..((index + 1) * share).min(pages));
            let running: Vec<_> =
                ranges.map(|range| scope.spawn(move || self.compare_range(memory, range, limit, is_there))).collect();
            running.into_iter().map(|thread| thread.join().expect("comparing does not panic")).collect::<Vec<_>>()
        });
        let mut whole = Comparison { pages_compared: 0, pages_not_compared: 0, pages_different: 0, first: Vec::new() };
        for part in parts {
            whole.pages_compared += part.pages_compared;
            whole.pages_not_compared += part.pages_not_compared;
            whole.pages_different += part.pages_different;
            whole.first.extend(part.first);
        }
        whole.first.truncate(limit);
        whole
    }

    fn compare_range(
        &self,
        memory: &Mapping,
        pages: std::ops::Range<usize>,
        limit: usize,
        is_there: &(dyn Fn(PageIndex) -> bool + Sync),
    ) -> Comparison {
        let mut found = Comparison { pages_compared: 0, pages_not_compared: 0, pages_different: 0, first: Vec::new() };
        let mut bytes = [0; PAGE_SIZE];
        for page in pages {
            let index = PageIndex(page as u64);
            if self.unknown.contains(&index) || !is_there(index) {
                found.pages_not_compared += 1;
                continue;
            }
            found.pages_compared += 1;
            memory.read(page * PAGE_SIZE, &mut bytes);
            let expected = &self.image[page * PAGE_WORDS..(page + 1) * PAGE_WORDS];
            let actual = bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("chunks of 8")));
            let mut differs = false;
            for (word, (actual, &expected)) in actual.zip(expected).enumerate() {
                if actual != expected {
                    differs = true;
                    if found.first.len() < limit {
                        found.first.push(Difference { offset: (page * PAGE_SIZE + word * 8) as u64, expected, actual });
                    }
                }
            }
            found.pages_different += u64::from(differs);
        }
        found
    }

    /// Checks the guest's whole output, in the order of its sequence numbers. Gives how many packets each vCPU emitted.
    pub fn check_packets<'a>(
        &self,
        packets: impl IntoIterator<Item = (u64, &'a [u8])>,
    ) -> Result<Vec<u64>, PacketError> {
        let mut seen = vec![0; self.packets.len()];
        let mut nonces = vec![(0, 0); self.packets.len()];
        for (sequence, bytes) in packets {
            let actual = packet::parse(sequence, bytes)?;
            let vcpu = usize::from(actual.vcpu);
            let (Some(list), Some(index)) = (self.packets.get(vcpu), seen.get_mut(vcpu)) else {
                return Err(PacketError::NoSuchVcpu { sequence, vcpu: actual.vcpu });
            };
            let Some(expected) = list.get(*index as usize) else {
                return Err(PacketError::FromTheFuture { sequence, actual });
            };
            match self.spec.program {
                Program::Scanner if actual.same_pass(expected) => {
                    self.check_scanner_nonce(sequence, &actual, &mut nonces[vcpu])?;
                }
                program if program != Program::Scanner && actual == *expected => {}
                _ => return Err(PacketError::Wrong { sequence, actual, expected: *expected }),
            }
            *index += 1;
        }
        Ok(seen)
    }

    /// A scanner writes nothing down, so of its nonces only this is known: they were issued, in this order.
    fn check_scanner_nonce(&self, sequence: u64, actual: &Parsed, last: &mut (u64, usize)) -> Result<(), PacketError> {
        let bad = PacketError::Nonce { sequence, nonces: actual.nonces, last: actual.last_nonce };
        if actual.nonces < last.0 {
            return Err(bad);
        }
        if actual.nonces > 0 {
            let from = last.1;
            let at = self.issued[from..].iter().position(|&nonce| nonce == actual.last_nonce).ok_or(bad.clone())?;
            if actual.nonces > (from + at + 1) as u64 {
                return Err(bad);
            }
            *last = (actual.nonces, from + at);
        }
        Ok(())
    }

    /// How many packets each vCPU must have emitted by now.
    pub fn packets_due(&self) -> Vec<u64> {
        self.packets.iter().map(|packets| packets.len() as u64).collect()
    }

    /// The nonces each vCPU saw, and when.
    pub fn nonces_seen(&self) -> &[Vec<NonceSeen>] {
        &self.logs
    }
}

fn nonce_log_word(layout: &Layout, memory: &Mapping, vcpu: u16, index: u64) -> u64 {
    let mut bytes = [0; 8];
    memory.read(layout.nonce_log(vcpu).offset() + index as usize * 8, &mut bytes);
    u64::from_le_bytes(bytes)
}

/// The entry that a vCPU stopped at `steps` was writing, if it was: it counts, then writes the step and then the nonce. Its count and its step.
fn unfinished_entry(layout: &Layout, memory: &Mapping, vcpu: u16, steps: u64) -> Option<[u64; 2]> {
    let word = |index| nonce_log_word(layout, memory, vcpu, index);
    let count = word(0);
    if !(1..=NONCE_LOG_CAPACITY).contains(&count) {
        return None;
    }
    let (step, nonce) = (word(count * 2), word(count * 2 + 1));
    (nonce == 0 && [0, steps].contains(&step)).then_some([count, step])
}

fn read_nonce_log(
    spec: &GuestSpec,
    layout: &Layout,
    memory: &Mapping,
    vcpu: u16,
    steps: u64,
    issued: &[u64],
    but_the_last: bool,
) -> Result<Vec<NonceSeen>, NonceError> {
    let word = |index| nonce_log_word(layout, memory, vcpu, index);
    let count = word(0);
    if count > NONCE_LOG_CAPACITY {
        return Err(NonceError::TooMany { vcpu, count });
    }
    let count = count - u64::from(but_the_last);
    let mut log: Vec<NonceSeen> = Vec::new();
    let mut left = issued;
    for index in 0..count {
        let (step, nonce) = (word(2 + index * 2), word(3 + index * 2));
        let (after, batch) = (log.last().map(|entry| entry.step), spec.batch_steps);
        let in_order = step > after.unwrap_or(0) && step < steps && step.is_multiple_of(batch);
        if !in_order {
            return Err(NonceError::Step { vcpu, nonce, step, after, batch, steps });
        }
        let at = left.iter().position(|&issued| issued == nonce).ok_or(NonceError::NotIssued { vcpu, nonce, step })?;
        left = &left[at + 1..];
        log.push(NonceSeen { step, nonce });
    }
    Ok(log)
}

/// Fills the data pages, in parallel.
fn fill(image: &mut [u64], spec: &GuestSpec, layout: &Layout) {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let first = layout.data_first() as usize;
    let data = &mut image[first * PAGE_WORDS..];
    let share = (data.len() / PAGE_WORDS).div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        for (index, part) in data.chunks_mut(share * PAGE_WORDS).enumerate() {
            scope.spawn(move || {
                for (page, words) in part.chunks_exact_mut(PAGE_WORDS).enumerate() {
                    let page = (first + index * share + page) as u64;
                    let Some(base) = rules::fill_base(spec.seed, page, spec.filled_of_256) else { continue };
                    for (word, value) in words.iter_mut().zip(0u64..) {
                        *word = base.wrapping_add(value.wrapping_mul(rules::GOLDEN));
                    }
                }
            });
        }
    });
}

/// Replays every vCPU's steps on its own part of the image, in parallel; gives the packets due by vCPU.
fn run_ledger(
    image: &mut [u64],
    spec: &GuestSpec,
    pattern: Pattern,
    layout: &Layout,
    steps: &[u64],
    logs: &[Vec<NonceSeen>],
) -> Vec<Vec<Parsed>> {
    let mut rest = &mut image[layout.data_first() as usize * PAGE_WORDS..];
    let mut parts = Vec::new();
    for vcpu in 0..spec.vcpus {
        let own = layout.own_pages(vcpu);
        let (part, next) = rest.split_at_mut((own.end - own.start) as usize * PAGE_WORDS);
        parts.push(part);
        rest = next;
    }
    let replayed: Vec<Replayed> = std::thread::scope(|scope| {
        let running: Vec<_> = (0..spec.vcpus)
            .zip(parts)
            .map(|(vcpu, part)| {
                let (steps, log) = (steps[usize::from(vcpu)], &logs[usize::from(vcpu)]);
                scope.spawn(move || replay(part, (spec, pattern), vcpu, steps, log))
            })
            .collect();
        running.into_iter().map(|thread| thread.join().expect("replaying does not panic")).collect()
    });
    for (vcpu, log) in (0..spec.vcpus).zip(logs) {
        let at = layout.nonce_log(vcpu).0 as usize * PAGE_WORDS;
        image[at] = log.len() as u64;
        for (index, entry) in log.iter().enumerate() {
            image[at + 2 + index * 2] = entry.step;
            image[at + 3 + index * 2] = entry.nonce;
        }
    }
    if spec.vcpus > 1 {
        let at = layout.shared_counters().0 as usize * PAGE_WORDS;
        for (vcpu, replayed) in replayed.iter().enumerate() {
            for (counter, sum) in replayed.counters.iter().enumerate() {
                image[at + counter] = image[at + counter].wrapping_add(*sum);
            }
            image[at + 64] = image[at + 64].wrapping_add(steps[vcpu]);
        }
    }
    replayed.into_iter().map(|replayed| replayed.packets).collect()
}

struct Replayed {
    packets: Vec<Parsed>,
    counters: [u64; 64],
}

fn replay(
    own: &mut [u64],
    (spec, pattern): (&GuestSpec, Pattern),
    vcpu: u16,
    steps: u64,
    log: &[NonceSeen],
) -> Replayed {
    let (seed, pages) = (rules::step_seed(spec.seed, vcpu), (own.len() / PAGE_WORDS) as u64);
    let mut now = Parsed { kind: rules::kind::FILLED, vcpu, step: 0, digest: 0, nonces: 0, last_nonce: 0 };
    let mut replayed = Replayed { packets: vec![now], counters: [0; 64] };
    now.kind = rules::kind::PROGRESS;
    let mut log = log.iter().peekable();
    while now.step < steps {
        let mut last_hash = 0;
        for _ in 0..spec.batch_steps {
            let (page, word, hash) = rules::step(pattern, seed, now.step, pages);
            let at = page as usize * PAGE_WORDS + word;
            now.digest = rules::fold(now.digest, own[at]);
            own[at] = rules::chain(own[at], hash);
            last_hash = hash;
            now.step += 1;
        }
        let counter = &mut replayed.counters[rules::shared_counter(last_hash)];
        *counter = counter.wrapping_add(last_hash);
        if let Some(seen) = log.next_if(|seen| seen.step == now.step) {
            now.digest = rules::fold(now.digest, seen.nonce);
            (now.nonces, now.last_nonce) = (now.nonces + 1, seen.nonce);
        }
        // The guest stands at the PACE read of its last step: what comes behind that read has not happened.
        if now.step < steps && now.step.is_multiple_of(spec.packet_interval_steps) {
            replayed.packets.push(now);
        }
    }
    replayed
}

fn scanner_packets(image: &[u64], layout: &Layout, vcpu: u16, steps: &[u64]) -> Vec<Parsed> {
    let ranges = [layout.own_pages(vcpu), layout.rest_pages(vcpu)];
    let pages: u64 = ranges.iter().map(|range| range.end - range.start).sum();
    let words = ranges
        .into_iter()
        .flat_map(|range| image[range.start as usize * PAGE_WORDS..range.end as usize * PAGE_WORDS].iter());
    let digest = words.fold(0, |digest, &word| rules::fold(digest, word));
    let first = Parsed { kind: rules::kind::FILLED, vcpu, step: 0, digest: 0, nonces: 0, last_nonce: 0 };
    // As for a ledger: at the PACE read of its last page the scanner has not yet begun what comes behind it.
    let passes = steps[usize::from(vcpu)].saturating_sub(1) / pages;
    let pass = |pass| Parsed { kind: rules::kind::PASS, step: pass * pages, digest, ..first };
    std::iter::once(first).chain((1..=passes).map(pass)).collect()
}
