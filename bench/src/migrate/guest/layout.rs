//! The page in which the guest of `belay-bench migrate` says how it fares. Part of the guest's program and of the bench, which reads the page
//! in the file that is the guest's memory, so that nothing of the guest is asked or disturbed.
//!
//! Words of 8 bytes: 0 to 3 by which the page is found, made of the run's nonce; [`STEPS`]; [`WRONG`]; from [`BUCKETS`] on a histogram.

/// How many words there are.
pub const WORDS: usize = 512;
/// Pages written since the guest began.
pub const STEPS: usize = 4;
/// 0, or the number of a page that was not as it had been left, plus 1.
pub const WRONG: usize = 5;
/// How many writes took so long; see [`bucket`].
pub const BUCKETS: usize = 8;
/// How many buckets there are: up to a minute.
pub const BUCKET_COUNT: usize = 280;

/// What the page begins with, and what a page of the working set begins with before it was written the first time.
pub fn mixed(nonce: u64, index: u64) -> u64 {
    let x = nonce.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (index + 1).wrapping_mul(0xc2b2_ae3d_27d4_eb4f);
    (x ^ x >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9)
}

#[allow(dead_code, reason = "what the guest alone does")]
/// The bucket of a time: eight to a power of two.
pub fn bucket(ns: u64) -> usize {
    let exponent = 63 - (ns | 1).leading_zeros() as usize;
    let index = if exponent < 3 { ns as usize } else { (exponent - 2) * 8 + (ns >> (exponent - 3) & 7) as usize };
    index.min(BUCKET_COUNT - 1)
}

/// The shortest time of a bucket, in nanoseconds.
pub fn shortest(bucket: usize) -> u64 {
    if bucket < 8 { bucket as u64 } else { (8 + (bucket as u64 & 7)) << (bucket / 8 - 1) }
}
