//! What a source keeps so that another process can go on where it died.
//!
//! ```text
//! STATE_DIR/migrations/ID/lock       held (flock(2)) by the one process that has the migration
//!                        journal     what was agreed on; fsynced, replaced whole
//! STATE_DIR/released-ID.json          the release record of the layer above: nothing here resumes this guest
//! MEMORY_DIR/belay-ID/ram-0 …        guest RAM
//!                    ring-NONCE      the ring of one session, and beside it
//!                    owner-NONCE     the region that only the source writes
//!                    overflow        the record that is being put together
//!                    state           who owns the guest; how far the ring was read; device state and output of the newest epoch
//! ```
//! Rules of this room:
//! * What is written down comes before the act it allows. A release is on disk before it is acknowledged; ownership and folding move in
//!   kept memory, which outlives a process and is gone with guest RAM itself when the host is: losing both at once forgets nothing.
//! * Each value is replaced whole or not at all ([`Journal::write`] by rename, [`Cell`] by turns). A write cut short leaves what was
//!   there before; a bit that has changed is an error and never an older value.
//! * Folding is redo: a record stays where it was put together until the state that comes of it is kept; what a death left half
//!   done is done again, with the same bytes.
//! * One process at a time: the lock is taken before anything is read, and goes with the process.

pub(crate) mod cell;
pub(crate) mod disk;
#[cfg(test)]
mod golden;
mod memory;

pub(crate) use cell::Cell;
pub use cell::Damaged;
pub use disk::{Journal, JournalError, Listed, WriteError, list};
pub use memory::{IMAGE_BYTES, KeptState, Mark, MemoryFolder};

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Names one migration for as long as anything of it is left on either host.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct MigrationId(pub [u8; 8]);

impl MigrationId {
    /// The same 16 digits as a number.
    pub fn number(self) -> u64 {
        u64::from_be_bytes(self.0)
    }
}

impl fmt::Display for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MigrationId({self})")
    }
}

/// A text that names no migration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` names no migration; it has 16 hexadecimal digits")]
pub struct BadId(String);

impl FromStr for MigrationId {
    type Err = BadId;

    fn from_str(text: &str) -> Result<Self, BadId> {
        let bad = || BadId(text.to_owned());
        if text.len() != 16 || !text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte)) {
            return Err(bad());
        }
        u64::from_str_radix(text, 16).map(|number| Self(number.to_be_bytes())).map_err(|_| bad())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_read_as_it_is_written() {
        let id = MigrationId([0, 1, 2, 0xab, 0xcd, 0xef, 0xff, 9]);
        assert_eq!((id.to_string().parse(), format!("{:016x}", id.number())), (Ok(id), id.to_string()));
        for wrong in ["", "0001", "0001 02abcdefff09", "000102ABCDEFFF09", "../000102abcdefff", "000102abcdefff0900"] {
            assert!(wrong.parse::<MigrationId>().is_err(), "{wrong}");
        }
    }
}
