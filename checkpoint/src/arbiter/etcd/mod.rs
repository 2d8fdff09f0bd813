//! etcd as an arbiter, by its JSON gateway (`/v3/…`, etcd 3.4 and newer), so that no gRPC is needed.
//!
//! ```text
//! record of a guest   key    belay/guest/NAME
//!                     value  {"owner":…,"owner-epoch":…,"migration":…,"standing":…}
//!                     its version is the key's mod_revision; a lease of etcd's lets it go when nobody renews it
//! claim               one transaction: mod_revision (or create_revision 0) compared, the record put or else read
//! ```
//! One connection a request, plain HTTP: TLS to etcd is not here. A gateway on loopback that speaks TLS (`etcd grpc-proxy` is one) fills that in.

mod base64;
mod gateway;
mod http;

pub use http::{Answer, HttpError, LONGEST};

use super::{Arbiter, ArbiterError, Claim, GuestName, Held, LeaseId, Verdict, Version};
use belay_transport::{Deadline, harmless};
use gateway::{Granted, KeptAlive, Ranged, Transacted};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::str::FromStr;
use std::time::Duration;

/// Where the gateway listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint(String);

/// No endpoint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no arbiter: write http://HOST:PORT (TLS to etcd is not supported)")]
pub struct NotAnEndpoint(String);

impl FromStr for Endpoint {
    type Err = NotAnEndpoint;

    fn from_str(text: &str) -> Result<Self, NotAnEndpoint> {
        let not_one = || NotAnEndpoint(text.chars().take(200).collect());
        let host = text.strip_prefix("http://").ok_or_else(not_one)?;
        let host = host.strip_suffix('/').unwrap_or(host);
        let (name, port) = host.rsplit_once(':').ok_or_else(not_one)?;
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b".-_:[]%".contains(&byte);
        let fits = !name.is_empty() && name.len() <= 255 && name.bytes().all(plain);
        match port.parse::<u16>() {
            Ok(1..) if fits => Ok(Self(host.to_owned())),
            _ => Err(not_one()),
        }
    }
}

impl std::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "http://{}", self.0)
    }
}

/// A client of one endpoint. Nothing is kept between two requests.
#[derive(Debug, Clone)]
pub struct Etcd {
    endpoint: Endpoint,
}

/// What a request would do, which decides what its failure leaves open.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Doing {
    Look(&'static str),
    Write(&'static str),
}

impl Etcd {
    /// A client of `endpoint`, which is not asked yet.
    pub fn new(endpoint: Endpoint) -> Self {
        Self { endpoint }
    }

    /// Posts one request and reads what the gateway says to it.
    fn ask<T: DeserializeOwned>(
        &self,
        doing: Doing,
        path: &str,
        body: &Value,
        deadline: Deadline,
    ) -> Result<T, ArbiterError> {
        let (Doing::Look(what) | Doing::Write(what)) = doing;
        let address = || self.endpoint.to_string();
        let body = serde_json::to_vec(body).expect("a value is plain data");
        let answer = http::post(&self.endpoint.0, path, &body, deadline).map_err(|source| {
            if matches!(doing, Doing::Look(_)) || source.was_not_sent() {
                ArbiterError::NotAsked { address: address(), doing: what, source }
            } else {
                ArbiterError::MayHaveHappened { address: address(), doing: what, source }
            }
        })?;
        if answer.status != 200 {
            let (status, said) = (answer.status, gateway::refusal(&answer.body));
            return Err(ArbiterError::Refused { address: address(), doing: what, status, said });
        }
        gateway::read(&answer.body).map_err(|error| ArbiterError::Misunderstood {
            address: address(),
            doing: what,
            what: error.to_string(),
        })
    }

    fn misunderstood(&self, doing: &'static str, what: &str) -> ArbiterError {
        ArbiterError::Misunderstood { address: self.endpoint.to_string(), doing, what: what.to_owned() }
    }

    /// The record in what a range brought, which is of one key.
    fn record(&self, guest: &GuestName, doing: &'static str, found: &Ranged) -> Result<Option<Held>, ArbiterError> {
        let [record] = found.kvs.as_slice() else {
            return match found.kvs.is_empty() {
                true => Ok(None),
                false => Err(self.misunderstood(doing, "several records of one guest")),
            };
        };
        if record.key != base64::encode(key(guest).as_bytes()) {
            return Err(self.misunderstood(doing, "another key than was asked for"));
        }
        if record.mod_revision.0 <= 0 {
            return Err(self.misunderstood(doing, "a record without a revision"));
        }
        let foreign = |what: String| ArbiterError::ForeignRecord { guest: guest.clone(), what };
        let value =
            base64::decode(&record.value).ok_or_else(|| self.misunderstood(doing, "a value that is no base64"))?;
        let claim: Claim = serde_json::from_slice(&value).map_err(|error| foreign(harmless(&error.to_string())))?;
        if !claim.fits() {
            return Err(foreign("its owner or migration has no bytes, or too many".to_owned()));
        }
        let lease = (record.lease.0 != 0).then_some(LeaseId(record.lease.0));
        Ok(Some(Held { claim, version: Version(record.mod_revision.0.unsigned_abs()), lease }))
    }

    fn grant(&self, lasting: Duration, deadline: Deadline) -> Result<LeaseId, ArbiterError> {
        const DOING: &str = "grant a lease";
        let seconds = lasting.as_secs().clamp(1, 24 * 3600);
        // A lease without a key changes nothing for anybody: whether it was granted or not need not be known.
        let body = json!({"TTL": seconds.to_string()});
        let granted: Granted = self.ask(Doing::Look(DOING), "/v3/lease/grant", &body, deadline)?;
        match (granted.id.0, granted.ttl.0) {
            (0, _) | (_, ..1) => Err(self.misunderstood(DOING, "a lease of no number, or of no time")),
            (id, _) => Ok(LeaseId(id)),
        }
    }
}

/// Where a guest's record is.
fn key(guest: &GuestName) -> String {
    format!("belay/guest/{guest}")
}

impl Arbiter for Etcd {
    fn who(&mut self, guest: &GuestName, deadline: Deadline) -> Result<Option<Held>, ArbiterError> {
        const DOING: &str = "say whose the guest is";
        // Linearizable, which is etcd's own default: what was written before this was asked is seen.
        let body = json!({"key": base64::encode(key(guest).as_bytes())});
        let found: Ranged = self.ask(Doing::Look(DOING), "/v3/kv/range", &body, deadline)?;
        self.record(guest, DOING, &found)
    }

    fn claim(
        &mut self,
        guest: &GuestName,
        claim: &Claim,
        over: Option<Version>,
        lasting: Option<Duration>,
        deadline: Deadline,
    ) -> Result<Verdict, ArbiterError> {
        const DOING: &str = "make the guest ours";
        if !claim.fits() {
            return Err(ArbiterError::TooLong);
        }
        let lease = lasting.map(|lasting| self.grant(lasting, deadline)).transpose()?;
        let key = base64::encode(key(guest).as_bytes());
        let value = base64::encode(&serde_json::to_vec(claim).expect("a claim is plain data"));
        let compare = match over {
            Some(Version(version)) => {
                json!({"key": key, "target": "MOD", "result": "EQUAL", "mod_revision": version.to_string()})
            }
            None => json!({"key": key, "target": "CREATE", "result": "EQUAL", "create_revision": "0"}),
        };
        let number = lease.map_or(0, |lease| lease.0).to_string();
        let body = json!({
            "compare": [compare],
            "success": [{"request_put": {"key": key, "value": value, "lease": number}}],
            "failure": [{"request_range": {"key": key}}],
        });
        let done: Transacted = self.ask(Doing::Write(DOING), "/v3/kv/txn", &body, deadline)?;
        if done.succeeded {
            let version = Version(done.header.revision.0.max(0).unsigned_abs());
            if version.0 == 0 {
                return Err(self.misunderstood(DOING, "a success without a revision"));
            }
            return Ok(Verdict::Ours(Held { claim: claim.clone(), version, lease }));
        }
        let [found] = done.responses.as_slice() else {
            return Err(self.misunderstood(DOING, "a failure without what is there instead"));
        };
        let found = found.response_range.as_ref();
        let found = found.ok_or_else(|| self.misunderstood(DOING, "a failure without what is there instead"))?;
        Ok(match self.record(guest, DOING, found)? {
            // Of an earlier try whose answer was lost.
            Some(held) if held.claim == *claim => Verdict::Ours(held),
            other => Verdict::Not(other),
        })
    }

    fn renew(&mut self, guest: &GuestName, held: &Held, deadline: Deadline) -> Result<Verdict, ArbiterError> {
        const DOING: &str = "renew a lease";
        if let Some(LeaseId(lease)) = held.lease {
            // Whether it was renewed is seen by whether the record is still there.
            let body = json!({"ID": lease.to_string()});
            let _: KeptAlive = self.ask(Doing::Look(DOING), "/v3/lease/keepalive", &body, deadline)?;
        }
        Ok(match self.who(guest, deadline)? {
            Some(now) if now == *held => Verdict::Ours(now),
            other => Verdict::Not(other),
        })
    }
}

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
#[cfg(test)]
mod tests;
