//! How a source that comes back and a destination that was cut off know each other again.
//!
//! ```text
//! source                                                destination
//!   Hello: Proposal with reattach (challenge, proof 0) ─────►       which migration, by whoever knows its secret
//!   ◄──────────────── reply: Answered (challenge, proof 1)
//!   Reattach (proof 2) ─────────────────────────────────────►
//!   ◄───────────────────────── FateAsked (owner epoch)              gate shut, guest stopped, tether ended
//!   ─────────────────────────── Fate ───────────────────────►       revoked: retired; released: owner
//!   still tethered: PrepareAgain (keys, ring, newest epoch) ►
//!   dials every lane, and the guard ────────────────────────►       pages not landed are read again, over the new session
//!   ◄──────────────────────────────── Prepared
//!   ◄──────────────────────────────── Resumed                       the next record holds all that is in none the source has
//! ```
//! Each proof is an HMAC-SHA256 under the migration's secret, over a label, the migration, the session and the challenges drawn so far.
//! The secret is drawn by the source, crosses once, in the first Hello, and is kept 0600 on both hosts. TLS identities are checked as for
//! any session; this says in addition that it is *this* guest's other half. Proof 0 costs a stranger who knows the address its try, and
//! this host nothing.

use super::settings::Proposal;
use belay_checkpoint::journal::MigrationId;
use belay_transport::session::SessionId;
use hmac::{Hmac, Mac};
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use std::fmt;

/// What both halves of a migration know and nobody else.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Secret(pub [u8; 32]);

/// Never shows what it is.
impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// Names a migration and proves it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pub migration: MigrationId,
    pub secret: Secret,
}

/// In the Hello of a source that comes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reattach {
    pub migration: MigrationId,
    pub challenge: [u8; 32],
    pub proof: [u8; 32],
}

/// In the destination's reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answered {
    pub challenge: [u8; 32],
    pub proof: [u8; 32],
}

fn random<const N: usize>() -> std::io::Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| std::io::Error::other(error.to_string()))?;
    Ok(bytes)
}

impl Identity {
    /// A new migration's.
    pub fn random() -> std::io::Result<Self> {
        Ok(Self { migration: MigrationId(random()?), secret: Secret(random()?) })
    }

    fn mac(&self, label: &[u8], parts: &[&[u8]]) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.secret.0).expect("an HMAC takes a key of any length");
        mac.update(b"belay reattach 1 ");
        mac.update(label);
        mac.update(&self.migration.0);
        // Every part has a length of its own that is always the same, so none can be read as another.
        parts.iter().for_each(|part| mac.update(part));
        mac
    }

    fn proof(&self, label: &[u8], parts: &[&[u8]]) -> [u8; 32] {
        self.mac(label, parts).finalize().into_bytes().into()
    }

    fn holds(&self, label: &[u8], parts: &[&[u8]], proof: &[u8; 32]) -> bool {
        self.mac(label, parts).verify_slice(proof).is_ok()
    }

    /// For a source's Hello.
    pub fn call(&self) -> std::io::Result<Reattach> {
        let challenge: [u8; 32] = random()?;
        let proof = self.proof(b"call", &[&challenge]);
        Ok(Reattach { migration: self.migration, challenge, proof })
    }

    /// Whether a Hello is from somebody who knows the secret (or has heard one who does: what follows tells).
    pub fn knows(&self, call: &Reattach) -> bool {
        call.migration == self.migration && self.holds(b"call", &[&call.challenge], &call.proof)
    }

    /// The destination's reply.
    pub fn answer(&self, session: SessionId, call: &Reattach) -> std::io::Result<Answered> {
        let challenge: [u8; 32] = random()?;
        let proof = self.proof(b"destination", &[&session.0, &call.challenge, &challenge]);
        Ok(Answered { challenge, proof })
    }

    /// Judges the destination's reply and gives the source's own proof; `None`: it is not this migration's destination.
    pub fn conclude(&self, session: SessionId, call: &Reattach, answered: &Answered) -> Option<[u8; 32]> {
        let parts: [&[u8]; 3] = [&session.0, &call.challenge, &answered.challenge];
        self.holds(b"destination", &parts, &answered.proof).then(|| self.proof(b"source", &parts))
    }

    /// Whether the source has proved that it is this migration's.
    pub fn is_source(&self, session: SessionId, call: &Reattach, answered: &Answered, proof: &[u8; 32]) -> bool {
        self.holds(b"source", &[&session.0, &call.challenge, &answered.challenge], proof)
    }
}

/// What a Hello's blob asks for, after its version: its first field is the same in every version.
pub fn decode_proposal(blob: &[u8]) -> Result<Proposal, String> {
    use super::protocol::{PROTOCOL_VERSION, decode};
    use belay_transport::explain;
    match postcard::take_from_bytes::<u16>(blob) {
        Ok((version, _)) if version != PROTOCOL_VERSION => {
            Err(format!("migration protocol {version} is proposed, {PROTOCOL_VERSION} is spoken here"))
        }
        _ => decode::<Proposal>(blob).map_err(|error| explain(&error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SESSION: SessionId = SessionId([5; 16]);

    #[test]
    fn two_halves_of_one_migration_know_each_other() {
        let identity = Identity::random().unwrap();
        let call = identity.call().unwrap();
        assert!(identity.knows(&call));
        let answered = identity.answer(SESSION, &call).unwrap();
        let proof = identity.conclude(SESSION, &call, &answered).expect("it is the destination");
        assert!(identity.is_source(SESSION, &call, &answered, &proof));
        assert!(!format!("{identity:?}").contains(&format!("{:?}", identity.secret.0)), "a secret is never shown");
    }

    #[test]
    fn nobody_without_the_secret_and_nobody_who_only_repeats_is_believed() {
        let identity = Identity::random().unwrap();
        let stranger = Identity { secret: Secret([0; 32]), ..identity };
        assert!(!identity.knows(&stranger.call().unwrap()));
        let call = identity.call().unwrap();
        let other = Identity { migration: MigrationId([1; 8]), ..identity };
        assert!(!identity.knows(&other.call().unwrap()), "another migration");
        assert!(identity.conclude(SESSION, &call, &stranger.answer(SESSION, &call).unwrap()).is_none());
        // What was said in one session proves nothing in another, nor for the other side.
        let answered = identity.answer(SESSION, &call).unwrap();
        let proof = identity.conclude(SESSION, &call, &answered).unwrap();
        assert!(identity.conclude(SessionId([6; 16]), &call, &answered).is_none());
        let again = identity.answer(SESSION, &call).unwrap();
        assert!(!identity.is_source(SESSION, &call, &again, &proof), "its own challenge is new each time");
        assert!(!identity.is_source(SESSION, &call, &answered, &answered.proof));
        assert!(!identity.is_source(SessionId([6; 16]), &call, &answered, &proof));
    }
}
