//! The only program of the test guest: its init. It keeps a working set that it checks itself, on every processor, and says so on the
//! console: `tick N` every few milliseconds, each number once; `WRONG …` if memory is ever not what it wrote there last.
//!
//! A page of the set holds a sequence number and words made of it and of the page's own number. What the number must be stands in a table,
//! so a page that is older than its entry, torn, or another's is found when it is next looked at, and all of them are looked at in turns.
//! Compiled by the tests with the toolchain that is there, linked statically.

use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const WORDS: usize = 512;
const TICK: Duration = Duration::from_millis(10);

fn mixed(sequence: u64, page: u64, word: u64) -> u64 {
    let x = sequence.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ page.wrapping_mul(0xc2b2_ae3d_27d4_eb4f) ^ word << 32;
    (x ^ x >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9)
}

/// `name=value` of the kernel's command line, which init finds among its variables.
fn wanted(name: &str, otherwise: usize) -> usize {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(otherwise)
}

fn say(line: &str) {
    // One write a line: the console does not mix them.
    let _ = std::io::stdout().write_all(format!("{line}\n").as_bytes());
}

/// One processor's part of the set.
fn work(part: usize, pages: usize, at_once: usize, steps: &'static AtomicU64) -> ! {
    let mut memory = vec![0u64; pages * WORDS];
    let mut expected = vec![0u64; pages];
    let number = |page: usize| (part * pages + page) as u64;
    for page in 0..pages {
        for word in 0..WORDS {
            memory[page * WORDS + word] = mixed(0, number(page), word as u64);
        }
    }
    let (mut next, mut seed) = (0, 0x1234_5678_9abc_def0u64 ^ part as u64);
    loop {
        for turn in 0..at_once {
            // Every second one in order, so that none is left out; the others anywhere.
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let page = if turn % 2 == 0 { next } else { (seed >> 33) as usize % pages };
            next = (page + usize::from(turn % 2 == 0)) % pages;
            let words = &mut memory[page * WORDS..][..WORDS];
            let sequence = expected[page];
            for (word, is) in words.iter_mut().enumerate() {
                let must = mixed(sequence, number(page), word as u64);
                if *is != must {
                    loop {
                        say(&format!("WRONG page {page} of part {part} word {word}: {is:#x}, must be {must:#x} ({sequence})"));
                        std::thread::sleep(Duration::from_millis(100));
                    }
                }
                *is = mixed(sequence + 1, number(page), word as u64);
            }
            expected[page] = sequence + 1;
            steps.fetch_add(1, Ordering::SeqCst);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn main() {
    static STEPS: AtomicU64 = AtomicU64::new(0);
    let (parts, mib, at_once) = (wanted("parts", 1), wanted("mib", 16), wanted("at_once", 8));
    let pages = (mib << 20) / 4096 / parts;
    say(&format!("guest of {parts} parts with {pages} pages"));
    for part in 0..parts {
        std::thread::spawn(move || work(part, pages, at_once, &STEPS));
    }
    let (mut tick, mut slowest) = (0u64, Duration::ZERO);
    let mut at = Instant::now();
    loop {
        std::thread::sleep(TICK);
        slowest = slowest.max(at.elapsed());
        at = Instant::now();
        tick += 1;
        say(&format!("tick {tick} steps {} slowest {} ms", STEPS.load(Ordering::SeqCst), slowest.as_millis()));
        if tick % 8 == 0 {
            slowest = Duration::ZERO;
        }
    }
}
