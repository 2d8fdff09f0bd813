//! The guard: a small process that outlives a VMM and tells the source the moment it dies.
//!
//! When a process is killed, its sockets close and its pidfd fires only after its address space is gone, which takes longer the
//! larger the guest is. A robust mutex that one of its threads holds is passed on at the very start of dying, in a fraction of a
//! millisecond whatever the size. So:
//!
//! ```text
//! watched process (VMM, page server)          guard process                          source
//!   SignOfLife::hold: a thread that    ───▶   waits for the mutex
//!   holds a mutex and does nothing
//!   SIGKILL  ✗ ────────────────────────────▶  EOWNERDEAD: sends the death sign ────▶  DeathWatch: begin the catch
//!                                             pidfd fires: sends the proof     ────▶  DeathWatch: death is proven
//!   SignOfLife::stand_down ────────────────▶  got the mutex: ends, silent      ────▶  DeathWatch: the guard has gone
//!
//!                                             the fence: SIGKILL through pidfds  ◀────  DeathWatch::fence (a third secret)
//!   ✗ ◀────────────────────────────────────   to all that is watched; then sign and proof as above
//! ```
//! The fence is for `--output lease`, where only proof of death or a person's word makes a catch safe. It is armed only where the VMM is
//! a process of its own ([`Arms`]). An armed guard also fences by itself a VMM whose page server has died and which has not shut its gate
//! and ordered its guest to stop within a bound.
//!
//! Rules of this room:
//! * The mutex is held by a thread of its own that never ends before the process does: a robust mutex is passed on when its *thread* dies,
//!   and a worker that finished would look like a death.
//! * Only [`SignOfLife::stand_down`] is an orderly end. Leaving main, a panic, exec and SIGKILL are all deaths.
//! * The sign says that the process is dying, not that its last thread has stopped. Only the proof says that.
//! * The two secrets were told to the source over the authenticated control channel; nobody else can give the sign. Whatever
//!   else comes over the guard's connection, or its end, is no sign: the guard is gone, and the source falls back to the slower ways.
//!   In the same way only the third secret is an order to fence. They are wiped when they are dropped, and never shown.
//! * The guard maps next to nothing and frees nothing on the way: the thread that gets the mutex says so itself.

mod death_watch;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
mod page;
mod process;
mod sign_of_life;
mod watcher;

pub use death_watch::{DeathWatch, Notice};
pub use page::LifePage;
pub use process::{Guard, GuardCommand, dismiss, is_ending, kill_and_prove, proof_of_death};
pub use sign_of_life::SignOfLife;
pub use watcher::guard_main;

use rustix::rand::GetRandomFlags;
use serde::{Deserialize, Serialize};
use std::io;
use std::time::Duration;
use zeroize::Zeroize;

/// What the guard says and hears, known to source and guard alone.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Secrets {
    /// Sent when a watched process begins to die.
    pub sign: [u8; 32],
    /// Sent when every watched process that did not stand down has provably ended.
    pub proof: [u8; 32],
    /// Sent *to* the guard: end what you watch.
    pub fence: [u8; 32],
}

impl Drop for Secrets {
    fn drop(&mut self) {
        for secret in self.each() {
            secret.zeroize();
        }
    }
}

impl Secrets {
    /// Fresh ones from the kernel's generator.
    pub fn random() -> Result<Self, GuardError> {
        let mut secrets = Self::none();
        for secret in secrets.each() {
            // Up to 256 bytes come whole or not at all (getrandom(2)).
            let drawn = rustix::rand::getrandom(&mut secret[..], GetRandomFlags::empty());
            drawn.map_err(io_error("draw a secret"))?;
        }
        Ok(secrets)
    }

    fn none() -> Self {
        Self { sign: [0; 32], proof: [0; 32], fence: [0; 32] }
    }

    fn each(&mut self) -> [&mut [u8; 32]; 3] {
        [&mut self.sign, &mut self.proof, &mut self.fence]
    }
}

/// Whether, and how, a guard may end what it watches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arms {
    /// It only tells.
    None,
    /// On the source's order; and by itself, when a watched page server has died and the VMM has not shut its gate within this time.
    Fence { gate_bound: Duration },
}

/// Never shows what they are.
impl std::fmt::Debug for Secrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secrets(..)")
    }
}

/// Why a guard could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum GuardError {
    #[error("{doing}")]
    Io {
        doing: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("slot {slot} of a page with {slots} slots")]
    NoSuchSlot { slot: usize, slots: usize },
    #[error("slot {slot} is held by process {pid} already")]
    AlreadyHeld { slot: usize, pid: u64 },
    #[error("nobody holds slot {slot}, so there is nothing to watch")]
    NotHeld { slot: usize },
    #[error("a page of signs of life has {len} bytes and begins with {magic:#018x}; it is not one")]
    NotAPage { len: u64, magic: u64 },
    #[error("{count} connections; a guard takes 1 to {most}")]
    Connections { count: usize, most: usize },
    #[error("the guard process did not answer within {bound_ms} ms")]
    NoAnswer { bound_ms: u128 },
    #[error("the guard process has ended ({status})")]
    Ended { status: String },
    #[error("the guard was handed something it does not know: {what}")]
    BadHandOver { what: &'static str },
}

fn io_error<E: Into<io::Error>>(doing: &'static str) -> impl FnOnce(E) -> GuardError {
    move |source| GuardError::Io { doing, source: source.into() }
}

#[cfg(test)]
mod tests;
