//! What several modules' tests need: huge pages reserved for a test and given back.

use rustix::fs::{FlockOperation, flock};
use std::fs::{self, File};

const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

/// Huge pages added to the pool for as long as this lives.
pub struct HugePages {
    added: u64,
    /// One test at a time, of whichever process: the pool is the machine's. Locked (flock(2)) until it is closed.
    _turn: File,
}

impl HugePages {
    /// `count` more pages in the pool; `None` (said on stderr) where that cannot be.
    pub fn reserve(count: u64) -> Option<Self> {
        let turn = File::open(POOL).ok().filter(|pool| flock(pool, FlockOperation::LockExclusive).is_ok());
        let (Some(turn), Some(before)) = (turn, pool()) else {
            eprintln!("skipped: no pool of huge pages");
            return None;
        };
        if fs::write(POOL, (before + count).to_string()).is_err() {
            eprintln!("skipped: no privilege to reserve huge pages");
            return None;
        }
        let added = pool()?.saturating_sub(before);
        let pages = Self { added, _turn: turn };
        if added < count {
            eprintln!("skipped: only {added} of {count} huge pages could be reserved");
            return None;
        }
        Some(pages)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Some(now) = pool() {
            let _ = fs::write(POOL, now.saturating_sub(self.added).to_string());
        }
    }
}

fn pool() -> Option<u64> {
    fs::read_to_string(POOL).ok()?.trim().parse().ok()
}
