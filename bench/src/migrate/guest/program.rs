//! The only program of the guest that `belay-bench migrate` moves: its init. It writes pages of a working set at a steady rate, looks each time
//! whether the page is as it left it, and keeps count in a page of its own (`layout.rs`). Compiled by the bench, linked statically.

mod layout;

use layout::{BUCKETS, STEPS, WORDS, WRONG, bucket, mixed};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

#[repr(align(4096))]
struct Report([AtomicU64; WORDS]);

static REPORT: Report = Report([const { AtomicU64::new(0) }; WORDS]);

/// `name=value` of the kernel's command line, which init finds among its variables.
fn wanted(name: &str) -> u64 {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("{name}= is missing"))
}

/// One processor's part of the set: `rate` pages a second, anywhere in it.
fn write(part: u64, pages: usize, rate: u64) {
    const PAGE_WORDS: usize = 512;
    const TURN: Duration = Duration::from_millis(1);
    let memory: Vec<AtomicU64> = (0..pages * PAGE_WORDS).map(|_| AtomicU64::new(0)).collect();
    let number = |page: usize| part << 40 | page as u64;
    for page in 0..pages {
        memory[page * PAGE_WORDS].store(mixed(number(page), 0), Ordering::SeqCst);
    }
    let mut written = vec![0u64; pages];
    let (mut seed, mut due, mut owed) = (0x1234_5678_9abc_def0u64 ^ part, Instant::now(), 0);
    loop {
        owed += rate;
        while owed >= 1000 {
            owed -= 1000;
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let page = (seed >> 33) as usize % pages;
            let must = mixed(number(page), written[page]);
            written[page] += 1;
            let next = mixed(number(page), written[page]);
            let begun = Instant::now();
            let found = memory[page * PAGE_WORDS].swap(next, Ordering::SeqCst);
            let took = begun.elapsed().as_nanos() as u64;
            if found != must {
                REPORT.0[WRONG].store(number(page) + 1, Ordering::SeqCst);
            }
            REPORT.0[BUCKETS + bucket(took)].fetch_add(1, Ordering::Relaxed);
            REPORT.0[STEPS].fetch_add(1, Ordering::SeqCst);
        }
        // What it could not do while it stood is lost, not made up for.
        due = (due + TURN).max(Instant::now());
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
}

fn main() {
    let (nonce, parts, mib, rate) = (wanted("nonce"), wanted("parts"), wanted("mib"), wanted("rate"));
    let pages = (mib << 20) as usize / 4096 / parts as usize;
    let writers = (0..parts).map(|part| std::thread::spawn(move || write(part, pages, rate / parts)));
    let writers: Vec<_> = writers.collect();
    // The first of them to have filled its part begins to count; all have when the counts have grown for a while.
    for (index, word) in REPORT.0[..STEPS].iter().enumerate() {
        word.store(mixed(nonce, index as u64), Ordering::SeqCst);
    }
    println!("ready");
    // Init must not end.
    writers.into_iter().for_each(|writer| drop(writer.join()));
    println!("a writer has ended");
    loop {
        std::thread::park();
    }
}
