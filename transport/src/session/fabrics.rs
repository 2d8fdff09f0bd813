//! Which fabrics a side offers, and why not `verbs` where it does not. Each side decides by itself; the other's word adds nothing.
//!
//! RDMA carries memory in clear and TLS does not cover it, so `verbs` asks for more than the other fabrics: a device, the
//! operator's word that the network is trusted, and a key only the two ends have ([`super::BindingKey`]).

use super::socket::own_ip;
use super::stream::LaneStream;
use super::{Address, BindingKey, Security, SessionConfig, SessionError};
use crate::fabric::{FabricKind, verbs};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::SocketAddr;

/// Why a side does not offer `verbs`. Told to the peer, so that both operators learn it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum NoVerbs {
    /// It was told to use another fabric.
    NotWanted,
    /// It has no RDMA device.
    NoDevice,
    /// It has one that cannot be used, and why.
    Unusable { why: String },
    /// Its operator has not said that the network is trusted.
    NotTrusted,
    /// The session is plaintext beyond loopback: nothing could prove that an RDMA connection belongs to it.
    NoKey,
}

impl fmt::Display for NoVerbs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotWanted => f.write_str("it was not asked for"),
            Self::NoDevice => f.write_str("this host has no RDMA device"),
            Self::Unusable { why } => f.write_str(why),
            Self::NotTrusted => f.write_str(
                "--trusted-fabric was not said, and RDMA carries guest memory in clear: whoever can read or send packets on that network could read and change the guest",
            ),
            Self::NoKey => f.write_str(
                "the session is plaintext beyond loopback, so nothing could prove that an RDMA connection belongs to it",
            ),
        }
    }
}

/// Why a session does not run over `verbs`, and whose doing that is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WithoutVerbs {
    /// This side did not offer it.
    Ours(NoVerbs),
    /// The peer did not.
    Theirs(NoVerbs),
}

impl fmt::Display for WithoutVerbs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (who, here, why) = match self {
            Self::Ours(why) => ("this host", "on this host", why),
            Self::Theirs(why) => ("the peer", "by the peer", why),
        };
        match why {
            NoVerbs::NotWanted => write!(f, "{who} was told to use another fabric"),
            NoVerbs::NoDevice => write!(f, "{who} has no RDMA device"),
            NoVerbs::Unusable { why } => write!(f, "{who} has RDMA that cannot be used ({why})"),
            NoVerbs::NotTrusted => write!(f, "--trusted-fabric was not said {here}"),
            NoVerbs::NoKey => write!(f, "{why}"),
        }
    }
}

/// Fabrics as errors name them: those of this side, or codes of the peer's, some of which may be of a later version.
pub(super) fn named(codes: &[u8]) -> String {
    let name = |code: &u8| match FabricKind::from_code(*code) {
        Some(fabric) => fabric.to_string(),
        None => format!("an unknown one (code {code})"),
    };
    if codes.is_empty() { "none".to_owned() } else { codes.iter().map(name).collect::<Vec<_>>().join(" or ") }
}

/// What a side offers for one connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Offered {
    /// Best first.
    pub fabrics: Vec<FabricKind>,
    /// Set if `verbs` is not among them though the address would allow it.
    pub no_verbs: Option<NoVerbs>,
}

impl SessionConfig {
    /// What may run over `address` by way of this connection.
    pub(super) fn offers_over(&self, address: &Address, connection: &LaneStream) -> Offered {
        let mut offered = self.offers(address, BindingKey::possible(connection));
        // Where `verbs` was asked for by name, that several devices would do is an error of its own and no reason for another fabric.
        let verbs = self.verbs.as_ref().filter(|_| self.only.is_none() && offered.fabrics.contains(&FabricKind::Verbs));
        if let Some(why) = verbs.and_then(|verbs| verbs::undecided(verbs, own_ip(connection))) {
            offered.fabrics.retain(|fabric| *fabric != FabricKind::Verbs);
            offered.no_verbs = Some(NoVerbs::Unusable { why: why.to_string() });
        }
        offered
    }

    /// What may run over `address`. `bindable`: whether the connection's protection gives a [`BindingKey`].
    fn offers(&self, address: &Address, bindable: bool) -> Offered {
        let possible = address.fabrics();
        let no_verbs = self.lacks_verbs(bindable).filter(|_| possible.contains(&FabricKind::Verbs));
        let wanted = |fabric: &FabricKind| self.only.is_none_or(|only| only == *fabric);
        let has = |fabric: &FabricKind| *fabric != FabricKind::Verbs || no_verbs.is_none();
        Offered { fabrics: possible.iter().copied().filter(wanted).filter(has).collect(), no_verbs }
    }

    fn lacks_verbs(&self, bindable: bool) -> Option<NoVerbs> {
        if self.only.is_some_and(|only| only != FabricKind::Verbs) {
            return Some(NoVerbs::NotWanted);
        }
        match (&self.verbs, &self.no_verbs) {
            (None, Some(why)) => Some(why.clone()),
            (None, None) => Some(NoVerbs::NotWanted),
            (Some(verbs), _) if !verbs.trusted => Some(NoVerbs::NotTrusted),
            (Some(_), _) => (!bindable).then_some(NoVerbs::NoKey),
        }
    }

    /// Refuses, before anything is dialled or bound, what could only fail later: plaintext beyond loopback that nobody asked for,
    /// a fabric that this kind of address does not carry, and `verbs` alone where this side may not use it.
    pub fn check(&self, address: &Address) -> Result<(), SessionError> {
        for address in resolved_now(address) {
            super::socket::check_reach(&address, self)?;
        }
        let Some(only) = self.only else { return Ok(()) };
        if !address.fabrics().contains(&only) {
            return Err(SessionError::FabricOverAddress { fabric: only, address: address.to_string() });
        }
        if only != FabricKind::Verbs {
            return Ok(());
        }
        match self.lacks_verbs(self.could_bind(address)) {
            Some(why) => Err(SessionError::NoVerbs { why }),
            None => Ok(()),
        }
    }

    /// Whether a connection with `address` could be bound. Each connection is judged again once it is there.
    fn could_bind(&self, address: &Address) -> bool {
        match self.security {
            Security::Insecure => resolved_now(address).iter().all(|address| super::socket::is_loopback(address.ip())),
            // Without certificates, anything but loopback is refused when it is dialled or bound.
            Security::Tls(_) | Security::LoopbackOnly => true,
        }
    }
}

/// What a TCP address resolves to. A name that does not resolve has nothing that could be judged yet: it may when it is dialled, and
/// whoever takes a guest over must not be stopped by it.
fn resolved_now(address: &Address) -> Vec<SocketAddr> {
    match address {
        Address::Tcp(host_and_port) => Address::resolve(host_and_port).unwrap_or_default(),
        Address::Unix(_) => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fabric::verbs::VerbsSettings;

    fn tcp() -> Address {
        Address::Tcp("127.0.0.1:7".to_owned())
    }

    fn config(trusted: bool, only: Option<FabricKind>) -> SessionConfig {
        let verbs = Some(VerbsSettings { trusted, ..VerbsSettings::default() });
        SessionConfig { verbs, only, ..SessionConfig::new(Security::Insecure) }
    }

    fn unusable(why: &str) -> Option<NoVerbs> {
        Some(NoVerbs::Unusable { why: why.to_owned() })
    }

    #[test]
    fn verbs_is_offered_first_where_device_trust_and_key_are_there_and_not_otherwise() {
        use FabricKind::{Tcp, Verbs};
        let offers = |config: &SessionConfig, bindable| {
            let Offered { fabrics, no_verbs } = config.offers(&tcp(), bindable);
            (fabrics, no_verbs)
        };
        assert_eq!(offers(&config(true, None), true), (vec![Verbs, Tcp], None));
        assert_eq!(offers(&config(true, Some(Verbs)), true), (vec![Verbs], None));
        assert_eq!(offers(&config(true, None), false), (vec![Tcp], Some(NoVerbs::NoKey)));
        assert_eq!(offers(&config(true, Some(Verbs)), false), (vec![], Some(NoVerbs::NoKey)));
        assert_eq!(offers(&config(false, None), true), (vec![Tcp], Some(NoVerbs::NotTrusted)));
        assert_eq!(offers(&config(true, Some(Tcp)), true), (vec![Tcp], Some(NoVerbs::NotWanted)));
        let without = SessionConfig { no_verbs: Some(NoVerbs::NoDevice), ..SessionConfig::new(Security::Insecure) };
        assert_eq!(offers(&without, true), (vec![Tcp], Some(NoVerbs::NoDevice)));
    }

    #[test]
    fn a_unix_socket_carries_local_alone_and_owes_no_reason_for_it() {
        let offered = config(true, None).offers(&Address::Unix("/s".into()), true);
        assert_eq!(offered, Offered { fabrics: vec![FabricKind::Local], no_verbs: None });
    }

    #[test]
    fn what_could_only_fail_later_is_refused_before_anything_is_dialled() {
        let verbs = Some(FabricKind::Verbs);
        config(true, verbs).check(&tcp()).expect("all there");
        let refused =
            |config: SessionConfig, address: &Address| config.check(address).expect_err("refused").to_string();
        assert!(refused(config(false, verbs), &tcp()).contains("in clear"));
        assert!(refused(config(true, verbs), &Address::Tcp("0.0.0.0:7".into())).contains("plaintext beyond loopback"));
        assert!(refused(config(true, verbs), &Address::Unix("/s".into())).contains("unix:/s"));
        assert!(refused(config(true, Some(FabricKind::Local)), &tcp()).contains("local"));
        let no_device = SessionConfig { verbs: None, no_verbs: unusable("port 1 is DOWN"), ..config(true, verbs) };
        assert!(refused(no_device, &tcp()).contains("port 1 is DOWN"));
        // Without --fabric there is always something left.
        config(false, None).check(&Address::Tcp("0.0.0.0:7".into())).expect("tcp is left");
        let beyond = SessionConfig { security: Security::LoopbackOnly, ..config(false, None) };
        beyond.check(&tcp()).expect("it is loopback");
        assert!(refused(beyond, &Address::Tcp("192.0.2.1:7".into())).contains("not a loopback address"));
    }

    #[test]
    fn a_name_that_does_not_resolve_is_left_to_whoever_dials_it() {
        // A label longer than any name server is asked for.
        let nobody = Address::Tcp(format!("{}.invalid:7", "n".repeat(64)));
        for security in [Security::Insecure, Security::LoopbackOnly] {
            let config = SessionConfig { security, ..config(true, Some(FabricKind::Verbs)) };
            config.check(&nobody).expect("nothing can be said of it yet");
        }
    }

    #[test]
    fn a_reason_is_told_of_the_side_whose_it_is() {
        let down = unusable("mlx5_0 port 1 is DOWN").expect("a reason");
        assert_eq!(
            WithoutVerbs::Theirs(down).to_string(),
            "the peer has RDMA that cannot be used (mlx5_0 port 1 is DOWN)"
        );
        assert_eq!(WithoutVerbs::Ours(NoVerbs::NoDevice).to_string(), "this host has no RDMA device");
        assert_eq!(WithoutVerbs::Ours(NoVerbs::NotTrusted).to_string(), "--trusted-fabric was not said on this host");
        assert_eq!(named(&[2, 3, 9]), "tcp or verbs or an unknown one (code 9)");
        assert_eq!(named(&[]), "none");
    }
}
