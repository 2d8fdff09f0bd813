//! What the programs compute, once more in Rust: the arithmetic that guest text, host threads and the checker share.
//!
//! The program text (`text.rs`) does the same with the same constants; the model's tests are what keep the two together.

/// Step of the sequence that feeds [`mix`] (2^64 divided by the golden ratio).
pub const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
const C1: u64 = 0xbf58_476d_1ce4_e5b9;
const C2: u64 = 0x94d0_49bb_1331_11eb;

/// The finalizer of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014).
#[inline]
pub fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(C1);
    z = (z ^ (z >> 27)).wrapping_mul(C2);
    z ^ (z >> 31)
}

/// Where a vCPU's steps start in the sequence.
pub fn step_seed(seed: u64, vcpu: u16) -> u64 {
    mix(seed ^ mix(u64::from(vcpu) + 1))
}

/// One step's place and value: page within the working set, word within the page, and what is added to the old word.
#[inline]
pub fn step(step_seed: u64, step: u64, working_set_pages: u64) -> (u64, usize, u64) {
    let hash = mix(step.wrapping_mul(GOLDEN).wrapping_add(step_seed));
    let page = ((u128::from(hash) * u128::from(working_set_pages)) >> 64) as u64;
    (page, (hash & 511) as usize, hash)
}

/// The word that replaces `old`.
#[inline]
pub fn chain(old: u64, hash: u64) -> u64 {
    mix(old.wrapping_add(hash))
}

/// Folds a word into a digest.
#[inline]
pub fn fold(digest: u64, word: u64) -> u64 {
    (digest.rotate_left(5) ^ word).wrapping_mul(C1)
}

/// The base of a page's fill, or `None` for a page that is left a hole. Word `n` of the page is base + n·[`GOLDEN`].
#[inline]
pub fn fill_base(fill_seed: u64, page: u64, filled_of_256: u16) -> Option<u64> {
    let base = mix(page.wrapping_mul(GOLDEN).wrapping_add(fill_seed));
    ((base & 0xff) < u64::from(filled_of_256)).then_some(base)
}

/// The shared counter that a batch ending with `hash` adds to.
#[inline]
pub fn shared_counter(hash: u64) -> usize {
    (hash & 63) as usize
}

/// What a packet is about: its first word, low byte.
pub mod kind {
    /// Memory is filled; steps begin. Words: kind and vCPU, 0, digest, nonces seen, last nonce.
    pub const FILLED: u64 = 1;
    /// So far a ledger (or metronome) got. Words as above with the step count.
    pub const PROGRESS: u64 = 2;
    /// A pass of the scanner is over. Words as above; the digest is of all words read in the pass.
    pub const PASS: u64 = 3;
    /// The scanner found a word that is not what it must be. Words: kind and vCPU, address, value, expected.
    pub const MISMATCH: u64 = 4;
}
