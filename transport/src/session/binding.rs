//! The key that binds connections which TLS does not carry (RDMA queue pairs) to the session that TLS authenticated.
//!
//! Under TLS it is exported keying material of the control connection (RFC 8446 §7.5, RFC 5705): only the two ends of that
//! handshake can know it. On loopback without TLS it comes from the session's token, which loopback keeps from other hosts.
//! Beyond loopback without TLS there is no key: whoever reads the wire would have it too.

use super::SessionError;
use super::preamble::{SessionId, Token};
use super::stream::LaneStream;
use sha2::{Digest, Sha256};
use std::fmt;
use zeroize::Zeroize;

const LABEL: &[u8] = b"EXPORTER-belay-lane-binding-1";

/// Known to both ends of one session and to nobody else. Wiped when dropped.
#[derive(Clone)]
pub struct BindingKey([u8; 32]);

impl Drop for BindingKey {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for BindingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BindingKey(..)")
    }
}

impl BindingKey {
    /// A key that no session has.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn for_test(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The key's bytes, for an HMAC.
    pub fn bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Whether a session with this control connection has a key.
    pub(super) fn possible(control: &LaneStream) -> bool {
        control.tls().is_some() || control.stays_on_this_host()
    }

    /// The key of the session whose control connection is `control`, if its protection allows one.
    pub(super) fn of(control: &LaneStream, session: SessionId, token: &Token) -> Result<Option<Self>, SessionError> {
        if !Self::possible(control) {
            return Ok(None);
        }
        if let Some(tls) = control.tls() {
            let key = tls.export_keying_material([0; 32], LABEL, Some(&session.0)).map_err(|source| {
                SessionError::Tls { doing: "deriving the key that binds data connections", source }
            })?;
            return Ok(Some(Self(key)));
        }
        let mut hash = Sha256::new();
        hash.update(b"belay lane binding");
        hash.update(token.0);
        hash.update(session.0);
        Ok(Some(Self(hash.finalize().into())))
    }
}
