//! One migration's use of an arbiter: the source lends the guest, and of source and destination the one that claims it first has it for good.
//!
//! ```text
//! nothing, or a record of this host's ── lend ──▶ Lent ── the catch ──────────────────▶ TakenBack
//!                                                     └── a destination goes on alone ─▶ Kept
//! ```
//! Rules of this room:
//! * A claim is made over the record that lends *this* migration's guest and over nothing else: a record that is gone, or another migration's, is
//!   nobody's to take, and says nothing of who runs the guest.
//! * *Ours* and *theirs* are said for good: no record of a migration is ever lent again.
//! * Whatever else comes of asking is no answer, and it is asked again. It says whether a claim may be on its way.

use super::{Arbiter, ArbiterError, Claim, GuestName, Held, Standing, Verdict, Version};
use crate::ownership::OwnerEpoch;
use belay_transport::Deadline;

/// A host's place in one migration of a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seat {
    pub guest: GuestName,
    /// This host as it calls itself: the same in every migration.
    pub host: String,
    pub migration: String,
}

/// Whose the guest is, for good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ruling {
    /// This side's, by this record.
    Ours(Held),
    /// The other side's.
    Theirs(Held),
}

/// Nobody knows whose the guest is.
#[derive(Debug, thiserror::Error)]
#[error("the arbiter has not said whose the guest is")]
pub struct Unruled {
    #[source]
    pub why: WhyUnruled,
    /// A claim was sent, and can come to be granted at any time from now on.
    pub asked: bool,
}

/// Why nobody knows.
#[derive(Debug, thiserror::Error)]
pub enum WhyUnruled {
    #[error(transparent)]
    NoAnswer(#[from] ArbiterError),
    #[error(
        "the arbiter has no record of guest {0}: one was there when this migration began, so it was removed, or the arbiter has lost its data"
    )]
    Gone(GuestName),
    #[error("the arbiter's record of guest {guest} is another migration's: {claim}")]
    OfAnother { guest: GuestName, claim: Claim },
}

/// Why a guest is not lent.
#[derive(Debug, thiserror::Error)]
pub enum LendError {
    #[error(transparent)]
    NoAnswer(#[from] ArbiterError),
    #[error("the arbiter says that guest {guest} is another host's: {claim}")]
    NotOurs { guest: GuestName, claim: Claim },
    #[error("others write the arbiter's record of guest {0} at this moment")]
    Contended(GuestName),
}

/// How often a record is read again that somebody else changed meanwhile.
const TRIES: usize = 3;

impl Seat {
    fn record(&self, standing: Standing, owner_epoch: OwnerEpoch) -> Claim {
        Claim { owner: self.host.clone(), owner_epoch, migration: self.migration.clone(), standing }
    }

    /// Writes down that this host lends the guest, under `owner_epoch`. Over a record of another host nothing is written.
    pub fn lend(
        &self,
        arbiter: &mut dyn Arbiter,
        owner_epoch: OwnerEpoch,
        deadline: Deadline,
    ) -> Result<Held, LendError> {
        let lent = self.record(Standing::Lent, owner_epoch);
        for _ in 0..TRIES {
            let over = match arbiter.who(&self.guest, deadline)? {
                Some(held) if held.claim == lent => return Ok(held),
                Some(Held { claim, .. }) if claim.owner != self.host => {
                    return Err(LendError::NotOurs { guest: self.guest.clone(), claim });
                }
                Some(held) => Some(held.version),
                None => None,
            };
            if let Verdict::Ours(held) = arbiter.claim(&self.guest, &lent, over, None, deadline)? {
                return Ok(held);
            }
        }
        Err(LendError::Contended(self.guest.clone()))
    }

    /// Claims the guest that was lent under the owner epoch `lent`, as the source (`TakenBack`) or the destination (`Kept`).
    pub fn claim(
        &self,
        arbiter: &mut dyn Arbiter,
        standing: Standing,
        lent: OwnerEpoch,
        deadline: Deadline,
    ) -> Result<Ruling, Unruled> {
        let mine = self.record(standing, lent.next());
        let looked = |why: WhyUnruled| Unruled { why, asked: false };
        let held = arbiter.who(&self.guest, deadline).map_err(|error| looked(error.into()))?;
        let version = match self.judge(&mine, lent, held).map_err(looked)? {
            Read::Ruled(ruling) => return Ok(ruling),
            Read::Lent(version) => version,
        };
        let verdict = arbiter.claim(&self.guest, &mine, Some(version), None, deadline).map_err(|error| {
            let asked = error.may_have_happened();
            Unruled { why: error.into(), asked }
        })?;
        match verdict {
            Verdict::Ours(held) => Ok(Ruling::Ours(held)),
            // The comparison has failed, so ours was not granted and will not be.
            Verdict::Not(held) => match self.judge(&mine, lent, held).map_err(looked)? {
                Read::Ruled(ruling) => Ok(ruling),
                // Written anew by hand, most likely: it is read again.
                Read::Lent(_) => Err(looked(WhyUnruled::Gone(self.guest.clone()))),
            },
        }
    }

    fn judge(&self, mine: &Claim, lent: OwnerEpoch, held: Option<Held>) -> Result<Read, WhyUnruled> {
        let held = held.ok_or_else(|| WhyUnruled::Gone(self.guest.clone()))?;
        let Claim { migration, standing, owner_epoch, .. } = &held.claim;
        let other_side = match mine.standing {
            Standing::TakenBack => Standing::Kept,
            Standing::Kept | Standing::Lent => Standing::TakenBack,
        };
        if *migration != self.migration {
            Err(WhyUnruled::OfAnother { guest: self.guest.clone(), claim: held.claim })
        } else if held.claim == *mine {
            Ok(Read::Ruled(Ruling::Ours(held)))
        } else if *standing == other_side && *owner_epoch == lent.next() {
            Ok(Read::Ruled(Ruling::Theirs(held)))
        } else if *standing == Standing::Lent && *owner_epoch == lent {
            Ok(Read::Lent(held.version))
        } else {
            Err(WhyUnruled::OfAnother { guest: self.guest.clone(), claim: held.claim })
        }
    }
}

/// What a record means to a claim.
enum Read {
    Ruled(Ruling),
    Lent(Version),
}

#[cfg(test)]
mod tests;
