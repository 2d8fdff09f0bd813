//! How many files this process may have open: asked before anything is started, so that it cannot run out of them in mid-migration.
//!
//! A role without sockets, vCPUs and a strange dialler has about thirty. Short of one in the wrong moment it could not write its
//! release record or open another lane; that is a tether which holds and a guest that cannot be let go.

use rustix::process::{Resource, getrlimit, setrlimit};
use std::fmt;

/// What a role needs at the most: itself, its lanes and vCPUs, whoever knocks at its doors (each has a bound of its own).
pub const NEEDED: u64 = 128;

/// Too few files may be open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooFew {
    /// The hard limit: what this process cannot go beyond.
    pub limit: u64,
}

impl TooFew {
    /// What to do.
    pub const ADVICE: &str = "Raise it: `ulimit -Hn 1024`, or LimitNOFILE=1024 in the unit. Nothing was started.";
}

impl fmt::Display for TooFew {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no more than {} open files are allowed here (RLIMIT_NOFILE), and {NEEDED} are needed", self.limit)
    }
}

impl std::error::Error for TooFew {}

/// How many files this process can have open if it asks for it; `None`: any number.
pub fn most() -> Option<u64> {
    getrlimit(Resource::Nofile).maximum
}

/// Takes as many as are allowed, and says so if those are too few.
pub fn take() -> Result<(), TooFew> {
    let mut limit = getrlimit(Resource::Nofile);
    if let Some(limit) = limit.maximum.filter(|&limit| limit < NEEDED) {
        return Err(TooFew { limit });
    }
    if limit.current.is_some_and(|current| current < NEEDED) {
        limit.current = Some(NEEDED);
        // Up to the hard limit needs no privilege.
        let _ = setrlimit(Resource::Nofile, limit);
    }
    Ok(())
}
