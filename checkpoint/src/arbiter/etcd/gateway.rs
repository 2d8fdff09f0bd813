//! What etcd's gateway says: protobuf's messages in JSON, where 64-bit numbers are text and whatever is nought is left out.

use belay_transport::harmless;
use serde::de::{DeserializeOwned, Error};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

/// A 64-bit number, written as text (or, by other gateways, as a number).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Number(pub i64);

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Text(String),
            Number(i64),
        }
        match Written::deserialize(deserializer)? {
            Written::Number(number) => Ok(Self(number)),
            Written::Text(text) => text.parse().map(Self).map_err(|_| D::Error::custom("a number that is none")),
        }
    }
}

#[derive(Debug, Default, Deserialize)]
pub struct Header {
    #[serde(default)]
    pub revision: Number,
}

#[derive(Debug, Deserialize)]
pub struct Record {
    pub key: String,
    #[serde(default)]
    pub value: String,
    pub mod_revision: Number,
    #[serde(default)]
    pub lease: Number,
}

/// Of `/v3/kv/range`. Its header is always there, and tells it from an answer of something else.
#[derive(Debug, Deserialize)]
pub struct Ranged {
    #[serde(rename = "header")]
    _header: Header,
    #[serde(default)]
    pub kvs: Vec<Record>,
}

#[derive(Debug, Deserialize)]
pub struct Response {
    pub response_range: Option<Ranged>,
}

/// Of `/v3/kv/txn`.
#[derive(Debug, Deserialize)]
pub struct Transacted {
    pub header: Header,
    #[serde(default)]
    pub succeeded: bool,
    #[serde(default)]
    pub responses: Vec<Response>,
}

/// Of `/v3/lease/grant`.
#[derive(Debug, Deserialize)]
pub struct Granted {
    #[serde(rename = "ID")]
    pub id: Number,
    #[serde(rename = "TTL", default)]
    pub ttl: Number,
}

/// Of `/v3/lease/keepalive`, one message of a stream.
#[derive(Debug, Deserialize)]
pub struct KeptAlive {
    #[serde(rename = "result")]
    _result: KeptAliveResult,
}

#[derive(Debug, Deserialize)]
struct KeptAliveResult {
    #[serde(rename = "ID")]
    _id: Number,
}

/// The first message of a body; what stands behind it must be nothing but space.
pub fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T, serde_json::Error> {
    serde_json::from_slice(body)
}

/// What a refusal says, short and printable.
pub fn refusal(body: &[u8]) -> String {
    let said = serde_json::from_slice::<Value>(body).ok();
    let said = said.as_ref().and_then(|said| said.get("message").or_else(|| said.get("error"))?.as_str());
    let text = said.map_or_else(|| String::from_utf8_lossy(body), Into::into);
    harmless(text.trim())
}
