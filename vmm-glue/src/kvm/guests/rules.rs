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

/// Where the steps of a ledger go. The numbers are those that the program text is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Pattern {
    /// Anywhere.
    Random = 0,
    /// To one page after the other.
    Sequential = 1,
    /// To the first of n pages r with probability (r/n)^(1/8): ranks by Zipf's law with the exponent 7/8, the first page the most frequent. The
    /// first hundredth of the pages has 56 % of the steps.
    Zipf = 2,
    /// Random, sequential, zipf and random, 2^[`PHASE_SHIFT`] steps each, in turns.
    Phases = 3,
}

/// Steps of a phase, as a power of two: 1.6 s at 20,000 a second.
pub const PHASE_SHIFT: u32 = 15;

impl Pattern {
    /// What it is at `step`.
    #[inline]
    fn at(self, step: u64) -> Self {
        match (self, (step >> PHASE_SHIFT) & 3) {
            (Self::Phases, 1) => Self::Sequential,
            (Self::Phases, 2) => Self::Zipf,
            (Self::Phases, _) => Self::Random,
            (pattern, _) => pattern,
        }
    }
}

/// The upper half of a product: with the factors as fractions of 2^64, their product.
#[inline]
fn upper(a: u64, b: u64) -> u64 {
    ((u128::from(a) * u128::from(b)) >> 64) as u64
}

/// One step's place and value: page within the working set, word within the page, and what is added to the old word.
#[inline]
pub fn step(pattern: Pattern, step_seed: u64, step: u64, working_set_pages: u64) -> (u64, usize, u64) {
    let hash = mix(step.wrapping_mul(GOLDEN).wrapping_add(step_seed));
    let page = match pattern.at(step) {
        Pattern::Sequential => step % working_set_pages,
        Pattern::Zipf => {
            let eighth_power = (0..3).fold(hash, |power, _| upper(power, power));
            upper(eighth_power, working_set_pages)
        }
        Pattern::Random | Pattern::Phases => upper(hash, working_set_pages),
    };
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

#[cfg(test)]
mod tests {
    use super::*;

    const PAGES: u64 = 1000;

    fn pages(pattern: Pattern, steps: std::ops::Range<u64>) -> Vec<u64> {
        steps.map(|at| step(pattern, step_seed(7, 0), at, PAGES).0).collect()
    }

    /// The share of the steps that go to the first hundredth of the pages.
    fn share_of_the_first(pages: &[u64]) -> f64 {
        pages.iter().filter(|&&page| page < PAGES / 100).count() as f64 / pages.len() as f64
    }

    #[test]
    fn every_pattern_goes_where_it_says_and_stays_in_the_working_set() {
        let all = 0..100_000;
        for pattern in [Pattern::Random, Pattern::Sequential, Pattern::Zipf, Pattern::Phases] {
            assert!(pages(pattern, all.clone()).iter().all(|&page| page < PAGES), "{pattern:?}");
        }
        assert!((0.008..0.012).contains(&share_of_the_first(&pages(Pattern::Random, all.clone()))));
        let zipf = share_of_the_first(&pages(Pattern::Zipf, all));
        assert!((0.55..0.575).contains(&zipf), "{zipf}: 0.01^(1/8) is 0.562");
        assert_eq!(pages(Pattern::Sequential, 998..1002), [998, 999, 0, 1]);
    }

    #[test]
    fn phases_are_random_sequential_zipf_and_random_again() {
        let phase = 1 << PHASE_SHIFT;
        for (number, pattern) in [
            (0, Pattern::Random),
            (1, Pattern::Sequential),
            (2, Pattern::Zipf),
            (3, Pattern::Random),
            (4, Pattern::Random),
        ] {
            let steps = number * phase..(number + 1) * phase;
            assert_eq!(pages(Pattern::Phases, steps.clone()), pages(pattern, steps), "phase {number}");
        }
    }
}
