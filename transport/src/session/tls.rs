//! TLS 1.3 with pinned certificates: each side knows exactly one certificate of the other and accepts no other.
//!
//! There is no certificate authority and no host name to check: the certificate *is* the peer's name. What is verified:
//! the end-entity certificate is byte for byte the pinned one, it is within its validity period and signed by itself, and
//! the handshake is signed with its key.

use super::SessionError;
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair as GeneratedKey};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, ParsedCertificate};
use rustls::{
    AlertDescription, CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName as WireName, Error,
    RootCertStore, ServerConfig, SignatureScheme,
};
use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use time::OffsetDateTime;
use zeroize::Zeroizing;

const VALID_FOR: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
const CLOCK_SLACK: Duration = Duration::from_secs(24 * 3600);

/// One side's key and certificate and the other side's certificate, ready for use.
#[derive(Clone)]
pub struct Credentials {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
    /// Where our certificate and the peer's were read.
    own: PathBuf,
    peer: PathBuf,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Credentials(..)")
    }
}

impl Credentials {
    /// Reads PEM files: our certificate, our private key, and the one certificate the peer may show.
    pub fn load(own_cert: &Path, own_key: &Path, peer_cert: &Path) -> Result<Self, SessionError> {
        let read = |path: &Path| {
            CertificateDer::from_pem_file(path)
                .map_err(|e| SessionError::Credentials { path: path.into(), what: format!("no certificate: {e}") })
        };
        let (own, peer) = (read(own_cert)?, read(peer_cert)?);
        let key = PrivateKeyDer::from_pem_file(own_key)
            .map_err(|e| SessionError::Credentials { path: own_key.into(), what: format!("no private key: {e}") })?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = Arc::new(Pinned::new(peer, Arc::clone(&provider)).map_err(|e| SessionError::Credentials {
            path: peer_cert.into(),
            what: format!("not a certificate that can be pinned: {e}"),
        })?);
        let tls = |source| SessionError::Tls { doing: "setting up", source };
        let unusable = |source: Error| SessionError::Credentials {
            path: own_key.into(),
            what: format!("does not belong to {}: {source}", own_cert.display()),
        };
        let mut client = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(tls)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::clone(&verifier) as Arc<dyn ServerCertVerifier>)
            .with_client_auth_cert(vec![own.clone()], key.clone_key())
            .map_err(unusable)?;
        // Every connection proves the certificates anew; a ticket would let one handshake vouch for another.
        client.resumption = rustls::client::Resumption::disabled();
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(tls)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(vec![own], key)
            .map_err(unusable)?;
        server.send_tls13_tickets = 0;
        server.session_storage = Arc::new(NoServerSessionStorage {});
        let (own, peer) = (own_cert.into(), peer_cert.into());
        Ok(Self { client: Arc::new(client), server: Arc::new(server), own, peer })
    }

    /// Names the certificate, where a handshake has failed by its validity period: TLS itself knows no file, and no date.
    pub(super) fn naming(&self, error: SessionError) -> SessionError {
        let SessionError::Tls { source, .. } = &error else { return error };
        let (path, what) = match source {
            Error::InvalidCertificate(CertificateError::ExpiredContext { time, not_after }) => {
                (&self.peer, format!("the peer's certificate expired on {}; it is {} here", utc(not_after), utc(time)))
            }
            Error::InvalidCertificate(CertificateError::NotValidYetContext { time, not_before }) => (
                &self.peer,
                format!("the peer's certificate is not valid before {}; it is {} here", utc(not_before), utc(time)),
            ),
            Error::AlertReceived(AlertDescription::CertificateExpired) => {
                (&self.own, "by the peer's clock our certificate has expired, or is not valid yet".to_owned())
            }
            _ => return error,
        };
        SessionError::NotValidNow { path: path.clone(), what }
    }

    pub(super) fn dialling(&self) -> Result<rustls::Connection, SessionError> {
        // Required by the interface and looked at by nobody: the pinned certificate is the name.
        let name = ServerName::try_from("belay").expect("a constant, valid name");
        let connection = rustls::ClientConnection::new(Arc::clone(&self.client), name)
            .map_err(|source| SessionError::Tls { doing: "starting", source })?;
        Ok(connection.into())
    }

    pub(super) fn listening(&self) -> Result<rustls::Connection, SessionError> {
        let connection = rustls::ServerConnection::new(Arc::clone(&self.server))
            .map_err(|source| SessionError::Tls { doing: "starting", source })?;
        Ok(connection.into())
    }
}

/// Accepts one certificate and no other.
#[derive(Debug)]
struct Pinned {
    certificate: CertificateDer<'static>,
    /// Holds the pinned certificate alone, as the anchor of its own signature.
    anchor: RootCertStore,
    provider: Arc<CryptoProvider>,
}

impl Pinned {
    fn new(certificate: CertificateDer<'static>, provider: Arc<CryptoProvider>) -> Result<Self, Error> {
        let mut anchor = RootCertStore::empty();
        anchor.add(certificate.clone())?;
        Ok(Self { certificate, anchor, provider })
    }

    fn check(&self, shown: &CertificateDer<'_>, now: UnixTime) -> Result<(), Error> {
        if shown.as_ref() != self.certificate.as_ref() {
            return Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure));
        }
        let parsed = ParsedCertificate::try_from(shown)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&parsed, &self.anchor, &[], now, algorithms)
    }

    fn check_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, signed, &self.provider.signature_verification_algorithms)
    }

    fn no_tls12() -> Error {
        Error::General("TLS 1.2 is not spoken here".to_owned())
    }
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(end_entity, now).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Self::no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.check_signature(message, cert, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for Pinned {
    fn root_hint_subjects(&self) -> &[WireName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check(end_entity, now).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Self::no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.check_signature(message, cert, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// A certificate's moment for a person.
fn utc(at: &UnixTime) -> String {
    let seconds = i64::try_from(at.as_secs()).ok();
    match seconds.and_then(|seconds| OffsetDateTime::from_unix_timestamp(seconds).ok()) {
        Some(at) => format!("{} {:02}:{:02}:{:02} UTC", at.date(), at.hour(), at.minute(), at.second()),
        None => format!("{} s after 1970", at.as_secs()),
    }
}

/// Where one side's private key and certificate were written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyPair {
    /// Stays on its host, mode 0600.
    pub key: PathBuf,
    /// Goes to the other side too.
    pub cert: PathBuf,
}

/// Makes a key and a self-signed certificate in `dir`: `NAME.key` (0600) and `NAME.crt`. Files that exist are not replaced.
/// Valid for ten years, from a day ago so that clocks may differ.
pub fn keygen(dir: &Path, name: &str) -> Result<KeyPair, SessionError> {
    let now = SystemTime::now();
    keygen_valid(dir, name, now - CLOCK_SLACK, now + VALID_FOR)
}

/// As [`keygen`], with the validity period given.
pub fn keygen_valid(dir: &Path, name: &str, from: SystemTime, until: SystemTime) -> Result<KeyPair, SessionError> {
    let pair = KeyPair { key: dir.join(format!("{name}.key")), cert: dir.join(format!("{name}.crt")) };
    let failed = |e: rcgen::Error| SessionError::Credentials { path: pair.key.clone(), what: e.to_string() };
    let key = GeneratedKey::generate().map_err(failed)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, format!("belay {name}"));
    params.not_before = from.into();
    params.not_after = until.into();
    let certificate = params.self_signed(&key).map_err(failed)?;
    write_new(&pair.key, 0o600, Zeroizing::new(key.serialize_pem()).as_bytes())?;
    write_new(&pair.cert, 0o644, certificate.pem().as_bytes())?;
    Ok(pair)
}

fn write_new(path: &Path, mode: u32, bytes: &[u8]) -> Result<(), SessionError> {
    let failed = |e: std::io::Error| SessionError::Credentials { path: path.into(), what: e.to_string() };
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path).map_err(failed)?;
    file.write_all(bytes).map_err(failed)?;
    file.sync_all().map_err(failed)
}
