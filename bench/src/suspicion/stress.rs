//! What makes a living process look dead: no processor, stops, no memory.

use crate::error::BenchError;
use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::hint::{black_box, spin_loop};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Memory is taken in pieces of so many bytes, until so many are left to everybody else.
const PIECE: usize = 64 << 20;
const LEFT: u64 = 1 << 30;
/// How often a waiting thread looks whether it is over.
const LOOK: Duration = Duration::from_millis(5);

/// Goes on until it is dropped.
pub struct Stress {
    over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    /// Goes on again, whatever became of the threads.
    stopped: Vec<Pid>,
}

impl Stress {
    pub fn none() -> Self {
        Self { over: Arc::default(), threads: Vec::new(), stopped: Vec::new() }
    }

    fn thread(&mut self, work: impl FnOnce(&AtomicBool) + Send + 'static) -> Result<(), BenchError> {
        let over = Arc::clone(&self.over);
        let spawned = std::thread::Builder::new().name("stress".into()).spawn(move || work(&over));
        self.threads.push(spawned.map_err(BenchError::io("start a thread"))?);
        Ok(())
    }

    /// So many threads that never wait.
    pub fn processors(threads: usize) -> Result<Self, BenchError> {
        let mut stress = Self::none();
        for _ in 0..threads {
            stress.thread(|over| {
                while !over.load(Ordering::Relaxed) {
                    spin_loop();
                }
            })?;
        }
        Ok(stress)
    }

    /// One of `pids` after the other, at random: stopped for up to `longest`, every 20 to 100 ms.
    pub fn stops(pids: [Pid; 2], longest: Duration, seed: u64) -> Result<Self, BenchError> {
        let mut stress = Self::none();
        stress.stopped = pids.to_vec();
        let mut random = Random(seed);
        stress.thread(move |over| {
            let wait = |time: Duration| {
                let end = Instant::now() + time;
                while Instant::now() < end && !over.load(Ordering::Relaxed) {
                    std::thread::sleep(LOOK.min(end.saturating_duration_since(Instant::now())));
                }
            };
            while !over.load(Ordering::Relaxed) {
                wait(Duration::from_millis(20 + random.below(80)));
                let pid = pids[random.below(2) as usize];
                // One that has ended is not this thread's to tell.
                let _ = kill_process(pid, Signal::STOP);
                wait(longest.mul_f64(random.below(1001) as f64 / 1000.0));
                let _ = kill_process(pid, Signal::CONT);
            }
        })?;
        Ok(stress)
    }

    /// Memory is taken and touched until a GiB is left, given back, and taken again.
    pub fn memory() -> Result<Self, BenchError> {
        let mut stress = Self::none();
        stress.thread(|over| {
            while !over.load(Ordering::Relaxed) {
                let mut taken = Vec::new();
                while available_bytes() > LEFT + PIECE as u64 && !over.load(Ordering::Relaxed) {
                    taken.push(black_box(vec![1_u8; PIECE]));
                }
            }
        })?;
        Ok(stress)
    }
}

impl Drop for Stress {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        for pid in &self.stopped {
            let _ = kill_process(*pid, Signal::CONT);
        }
    }
}

/// MemAvailable of proc_meminfo(5); none where it is not told.
fn available_bytes() -> u64 {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}

/// Numbers from a seed (splitmix64).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
}
