//! Who may run a guest, kept where neither of its hosts is: a record that changes hands by compare-and-swap alone.
//!
//! ```text
//! a host                         arbiter
//!   who(guest) ───────────────▶    the record, and which of its versions that is; or none
//!   claim(mine, over that) ────▶   the record is mine if it is still that version: of all who claim over one version, one wins
//!   renew(mine) ───────────────▶   it lasts for another while, if it is still mine
//! ```
//! Rules of this room:
//! * A version is claimed over only after it was *read*: nobody takes what they have not seen.
//! * An error is no answer. After [`ArbiterError::MayHaveHappened`] the record may be ours or not; a claim that is made again says which,
//!   because a record that is our own claim, word for word, counts as won.
//! * What comes back from the arbiter is bytes from outside: bounded in size and time, and believed only whole.

pub mod etcd;
mod seat;

pub use seat::{LendError, Ruling, Seat, Unruled, WhyUnruled};

use crate::ownership::OwnerEpoch;
use belay_transport::Deadline;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// What the operator calls a guest, the same on every host: 1 to 64 letters, digits, `.`, `_` and `-`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct GuestName(String);

/// A name that no guest has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no guest's name: 1 to 64 letters, digits, '.', '_' and '-'")]
pub struct NotAName(String);

impl FromStr for GuestName {
    type Err = NotAName;

    fn from_str(text: &str) -> Result<Self, NotAName> {
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        if text.is_empty() || text.len() > 64 || !text.bytes().all(fits) {
            return Err(NotAName(text.chars().take(80).collect()));
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for GuestName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a record says: whose the guest is. Two claims are the same claim only if all of this is the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Claim {
    /// The host, or the process, as it calls itself. At most [`Claim::LONGEST_OWNER`] bytes.
    pub owner: String,
    pub owner_epoch: OwnerEpoch,
    /// The migration by which it has the guest.
    pub migration: String,
    pub standing: Standing,
}

/// By what an owner has a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Standing {
    /// It is the source of a migration and has lent the guest to the destination. Which of them will have it is not said.
    Lent,
    /// It was the source and has taken the guest back, for good.
    TakenBack,
    /// It was the destination and has made the guest its own, for good.
    Kept,
}

impl fmt::Display for Standing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Lent => "has lent it to a destination",
            Self::TakenBack => "has taken it back",
            Self::Kept => "keeps it",
        })
    }
}

impl Claim {
    /// Longest name of an owner, and of a migration, in bytes.
    pub const LONGEST_OWNER: usize = 256;

    /// Whether it can be written down.
    pub fn fits(&self) -> bool {
        [&self.owner, &self.migration].iter().all(|text| !text.is_empty() && text.len() <= Self::LONGEST_OWNER)
    }
}

impl fmt::Display for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { owner, owner_epoch, migration, standing } = self;
        write!(f, "{owner:?} {standing}, under {owner_epoch} of migration {migration:?}")
    }
}

/// A record as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    pub claim: Claim,
    /// Which version of the record: another one each time that it is written.
    pub version: Version,
    /// By which it lasts, if not for good.
    pub lease: Option<LeaseId>,
}

/// A version of a record, in the arbiter's own count; 0 is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u64);

/// The arbiter's number of a lease; not 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeaseId(pub i64);

/// How a claim or a renewal ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The record is ours, in this version.
    Ours(Held),
    /// It is not; what is there instead.
    Not(Option<Held>),
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ArbiterError {
    /// It was not asked, or only asked to look: nothing has changed.
    #[error("the arbiter at {address} cannot be asked to {doing}")]
    NotAsked {
        address: String,
        doing: &'static str,
        #[source]
        source: etcd::HttpError,
    },
    /// It was asked to write and has not answered: the record may have changed.
    #[error("the arbiter at {address} was asked to {doing} and has not answered: it may have happened")]
    MayHaveHappened {
        address: String,
        doing: &'static str,
        #[source]
        source: etcd::HttpError,
    },
    /// It answered that it cannot.
    #[error("the arbiter at {address} refuses to {doing} (HTTP status {status}): {said}")]
    Refused { address: String, doing: &'static str, status: u16, said: String },
    /// What it answered is no answer, so it says nothing of the record.
    #[error("the arbiter at {address}, asked to {doing}, answered something else: {what}")]
    Misunderstood { address: String, doing: &'static str, what: String },
    /// The record is there and is not one of ours: nobody claims over it.
    #[error("the record of guest {guest} at the arbiter is not belay's: {what}")]
    ForeignRecord { guest: GuestName, what: String },
    /// The claim cannot be written down.
    #[error("a claim by an owner or migration of no bytes, or of more than {} of them", Claim::LONGEST_OWNER)]
    TooLong,
}

impl ArbiterError {
    /// Whether a record may have been written that nobody has confirmed.
    pub fn may_have_happened(&self) -> bool {
        // A refusal or a misunderstood answer to a write may stand behind one that was done.
        !matches!(self, Self::NotAsked { .. } | Self::TooLong | Self::ForeignRecord { .. })
    }
}

/// Whoever keeps the records.
pub trait Arbiter {
    /// Whose the guest is, as everybody sees it who asks from now on. None: nobody's, or its lease has run out.
    fn who(&mut self, guest: &GuestName, deadline: Deadline) -> Result<Option<Held>, ArbiterError>;

    /// Makes the guest `claim`'s if its record is still in the version `over` (none: if there is no record). `lasting`: for so long without a
    /// renewal, in whole seconds from 1; none: for good.
    fn claim(
        &mut self,
        guest: &GuestName,
        claim: &Claim,
        over: Option<Version>,
        lasting: Option<Duration>,
        deadline: Deadline,
    ) -> Result<Verdict, ArbiterError>;

    /// Lets a record that is ours last for another while, and looks whether it still is.
    fn renew(&mut self, guest: &GuestName, held: &Held, deadline: Deadline) -> Result<Verdict, ArbiterError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guests_name_is_a_plain_word() {
        for right in ["vm1", "a", "db_3.example-7", &"x".repeat(64)] {
            assert_eq!(right.parse::<GuestName>().expect(right).to_string(), right);
        }
        for wrong in ["", "a/b", "ä", "a b", "a\n", "../x\0", &"x".repeat(65)] {
            assert!(wrong.parse::<GuestName>().is_err(), "{wrong:?}");
        }
    }
}
