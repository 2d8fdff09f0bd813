//! Where a session is listened for and dialled: `HOST:PORT`, or `unix:/path` for one host.

use super::SessionError;
use crate::fabric::FabricKind;
use std::fmt;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::str::FromStr;

/// An address as the operator writes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// `HOST:PORT`.
    Tcp(String),
    /// `unix:/path`.
    Unix(PathBuf),
}

impl Address {
    /// The fabrics that can run over this kind of address, best first.
    pub fn fabrics(&self) -> &'static [FabricKind] {
        match self {
            Self::Tcp(_) => &[FabricKind::Verbs, FabricKind::Tcp],
            Self::Unix(_) => &[FabricKind::Local],
        }
    }

    /// What the host name resolves to. Name resolution is the system's and keeps the system's own time limit.
    pub(super) fn resolve(host_and_port: &str) -> Result<Vec<SocketAddr>, SessionError> {
        let resolved = host_and_port
            .to_socket_addrs()
            .map_err(|source| SessionError::Resolve { address: host_and_port.to_owned(), source })?;
        let all: Vec<_> = resolved.collect();
        if all.is_empty() {
            return Err(SessionError::Resolve {
                address: host_and_port.to_owned(),
                source: std::io::Error::other("the name has no address"),
            });
        }
        Ok(all)
    }
}

impl FromStr for Address {
    type Err = SessionError;

    fn from_str(text: &str) -> Result<Self, SessionError> {
        let bad = |why| SessionError::BadAddress { address: text.to_owned(), why };
        if let Some(path) = text.strip_prefix("unix:") {
            if path.is_empty() {
                return Err(bad("the path is empty"));
            }
            return Ok(Self::Unix(path.into()));
        }
        let (host, port) = text.rsplit_once(':').ok_or_else(|| bad("there is no port"))?;
        if host.is_empty() {
            return Err(bad("there is no host"));
        }
        port.parse::<u16>().map_err(|_| bad("the port is not a number from 0 to 65535"))?;
        Ok(Self::Tcp(text.to_owned()))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => f.write_str(address),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_back_as_they_were_written() {
        for text in ["127.0.0.1:7000", "[::1]:7000", "host.example:1", "unix:/run/belay/a.sock"] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_not_an_address_is_refused() {
        for text in ["", "host", ":7000", "host:", "host:99999", "unix:"] {
            assert!(matches!(text.parse::<Address>(), Err(SessionError::BadAddress { .. })), "{text:?}");
        }
    }
}
