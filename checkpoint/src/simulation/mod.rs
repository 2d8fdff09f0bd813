//! Whole migrations in one thread, from a seed: the real stager, outbox, ring, folder, kept state and catch, between a guest whose every
//! epoch is known and a world that remembers what it was shown, over lanes that tear and cut and a clock that jumps.
//!
//! ```text
//! guest.rs   the guest, its tracker, and pages that come one by one
//! wire.rs    the lanes: what was posted lands later, in parts, and stops at any byte; the source looks in between
//! world.rs   the observer of output
//! kit.rs     memory, sessions and shipping
//! life.rs    one migration, from the switch to the catch, and what must be so at its end (lived.rs: what happened in it)
//! ```
//! A failing seed is printed, and played again by `BELAY_SIM_SEED=… cargo test --release -p belay-checkpoint --lib simulation -- --nocapture`.

mod guest;
mod kit;
mod life;
mod lived;
mod wire;
mod world;

use crate::mutation::Mutation;
use kit::Kit;
use lived::Lived;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

/// Epochs that one run plays, over all its lives.
const EPOCHS: u64 = 1_000_000;
/// Most lives that a mistake may go unnoticed.
const LIVES_OF_A_MISTAKE: u64 = 2_000;

/// Numbers from a seed (splitmix64).
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Less than `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    /// True once in `times`.
    pub fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }
}

/// The seed of the life that is number `life` of a run.
fn seed_of(run: u64, life: u64) -> u64 {
    Rng(run ^ life.wrapping_mul(0xd134_2543_de82_ef95)).next()
}

/// Plays lives until `epochs` epochs were taken, on every core.
fn play(run: u64, epochs: u64) -> Lived {
    let (next, taken, stop) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    let work = || {
        let (mut kit, mut all) = (Kit::new(), Lived::default());
        while taken.load(Ordering::Relaxed) < epochs && !stop.load(Ordering::Relaxed) {
            let seed = seed_of(run, next.fetch_add(1, Ordering::Relaxed));
            match life::live(&mut kit, seed) {
                Ok(lived) => {
                    taken.fetch_add(lived.epochs, Ordering::Relaxed);
                    all.add(&lived);
                }
                Err(broken) => {
                    stop.store(true, Ordering::Relaxed);
                    panic!("{broken}\nplay it again: BELAY_SIM_SEED={seed}");
                }
            }
        }
        all
    };
    let workers = std::thread::available_parallelism().map_or(1, |cores| cores.get().min(4));
    std::thread::scope(|scope| {
        let handles: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        let mut all = Lived::default();
        for handle in handles {
            match handle.join() {
                Ok(lived) => all.add(&lived),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        all
    })
}

#[test]
fn a_million_epochs_lose_nothing_and_show_nothing_that_was_not_committed() {
    if let Ok(text) = std::env::var("BELAY_SIM_SEED") {
        let seed = text.parse().expect("BELAY_SIM_SEED is a number");
        println!("seed {seed}: {:?}", life::live(&mut Kit::new(), seed).unwrap_or_else(|broken| panic!("{broken}")));
        return;
    }
    let run = std::env::var("BELAY_SIM_RUN").map_or(1, |text| text.parse().expect("BELAY_SIM_RUN is a number"));
    crate::testing::give_way();
    let began = Instant::now();
    let lived = play(run, EPOCHS);
    let seconds = began.elapsed().as_secs_f64();
    println!("run {run}: {lived:?} in {seconds:.1} s, {:.0} epochs a second", lived.epochs as f64 / seconds);
    assert!(lived.epochs >= EPOCHS && lived.reached_everything(), "{lived:?}");
}

#[test]
fn a_life_is_the_same_each_time_it_is_played() {
    let mut kit = Kit::new();
    for life in 0..50 {
        let seed = seed_of(2, life);
        let first = life::live(&mut kit, seed).unwrap_or_else(|broken| panic!("{broken}"));
        assert_eq!(life::live(&mut Kit::new(), seed), Ok(first), "seed {seed}");
    }
}

/// Lives with `mutation` until one breaks a promise; which one it says.
fn broken_by(mutation: Mutation) -> String {
    let mut kit = Kit::new();
    crate::mutation::make(Some(mutation));
    let broken = (0..LIVES_OF_A_MISTAKE).find_map(|life| {
        let broken = life::live(&mut kit, seed_of(3, life)).err()?;
        println!("{mutation:?} is noticed in life {life}: {broken}");
        Some(broken)
    });
    crate::mutation::make(None);
    broken.unwrap_or_else(|| panic!("{mutation:?} is not noticed in {LIVES_OF_A_MISTAKE} lives"))
}

#[test]
fn p4_output_that_leaves_before_its_commit_is_noticed() {
    assert!(broken_by(Mutation::ReleaseBeforeCommit).starts_with("P4: uncommitted"));
}

#[test]
fn p3_a_segment_taken_without_its_checksum_is_noticed() {
    assert!(broken_by(Mutation::FoldWithoutChecksum).starts_with("P3: "));
}

#[test]
fn p4_a_packet_that_leaves_twice_is_noticed() {
    assert!(broken_by(Mutation::DoubleRelease).starts_with("P4: repeated"));
}

#[test]
fn p2_output_that_leaves_without_a_lease_is_noticed() {
    assert!(broken_by(Mutation::LeaseIgnored).starts_with("P2: "));
}

#[test]
fn p3_a_page_in_flight_that_counts_as_landed_is_noticed() {
    assert!(broken_by(Mutation::InFlightIsLanded).starts_with("P3: "));
}

#[test]
fn p3_a_discard_that_is_not_told_is_noticed() {
    assert!(broken_by(Mutation::DiscardSkipped).starts_with("P3: "));
}

#[test]
fn p4_output_that_is_lost_at_the_catch_is_noticed() {
    assert!(broken_by(Mutation::OutboxLost).starts_with("P4: a gap"));
}
