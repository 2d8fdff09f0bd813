//! The source's side of a session: it dials control, every lane, and the guard connection.

use super::binding::BindingKey;
use super::control::Control;
use super::hello::{Agreed, MAX_HELLO_BYTES, Offer, decode_reply, encode_hello};
use super::preamble::{
    ANSWER_BYTES, Answer, Kind, LANE_TAKEN, PREAMBLE_VERSION, Preamble, Protection, SessionId, Token,
};
use super::stream::LaneStream;
use super::{Address, Security, SessionConfig, SessionError, socket};
use crate::deadline::Deadline;
use crate::fabric::LaneId;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use zeroize::Zeroizing;

/// A session as the source has it.
#[derive(Debug)]
pub struct SourceSession {
    pub control: Arc<Control>,
    pub agreed: Agreed,
    /// The destination's blob.
    pub blob: Vec<u8>,
    pub lanes: LaneDialer,
}

/// Opens further connections of a session. Cheap to clone.
#[derive(Debug, Clone)]
pub struct LaneDialer {
    inner: Arc<Dialer>,
    binding: Option<BindingKey>,
}

#[derive(Debug)]
struct Dialer {
    address: Address,
    config: SessionConfig,
    session: SessionId,
    token: Token,
}

/// Random bytes from the kernel.
pub(crate) fn random<const N: usize>() -> Result<[u8; N], SessionError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| SessionError::Io {
        doing: "asking for random bytes".to_owned(),
        source: std::io::Error::other(error.to_string()),
    })?;
    Ok(bytes)
}

/// Dials a destination and offers it a session. Returns once the destination's upper layer has accepted;
/// [`SessionError::Refused`] carries its reason.
pub fn connect(
    address: &Address,
    config: SessionConfig,
    offer: &Offer,
    deadline: Deadline,
) -> Result<SourceSession, SessionError> {
    config.check(address)?;
    let session = SessionId(random()?);
    let token = Token(random()?);
    let dialer = Dialer { address: address.clone(), config, session, token };
    let greeted = greet(&dialer, offer, deadline).map_err(|error| dialer.config.security.naming(error))?;
    let (stream, agreed, blob) = greeted;
    let binding = BindingKey::of(&stream, session, &dialer.token)?;
    let control = Arc::new(Control::new(stream, dialer.config.max_frame_bytes));
    Ok(SourceSession { control, agreed, blob, lanes: LaneDialer { inner: Arc::new(dialer), binding } })
}

/// Says hello and hears the reply.
fn greet(dialer: &Dialer, offer: &Offer, deadline: Deadline) -> Result<(LaneStream, Agreed, Vec<u8>), SessionError> {
    let versions = dialer.config.versions;
    let mut stream = dialer.open(Kind::Control, deadline)?;
    let ours = dialer.config.offers_over(&dialer.address, &stream);
    let hello = Zeroizing::new(encode_hello(dialer.session, &dialer.token, versions, &ours, offer)?);
    let length = u32::try_from(hello.len()).expect("a hello is at most 128 KiB").to_le_bytes();
    stream.write_all("sending the hello", &Zeroizing::new([&length, &hello[..]].concat()), deadline)?;

    let mut length = [0; 4];
    stream.read_exact("waiting for the reply", &mut length, deadline)?;
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_HELLO_BYTES {
        return Err(SessionError::FrameTooLarge { bytes: length as u64, limit: MAX_HELLO_BYTES });
    }
    let mut reply = vec![0; length];
    stream.read_exact("receiving the reply", &mut reply, deadline)?;
    let (agreed, blob) = decode_reply(&reply, dialer.session, versions, &ours)?;
    Ok((stream, agreed, blob))
}

impl LaneDialer {
    /// Whether this session's connections are encrypted.
    pub fn is_encrypted(&self) -> bool {
        matches!((&self.inner.address, &self.inner.config.security), (Address::Tcp(_), Security::Tls(_)))
    }

    /// Configuration the session was dialled with.
    pub fn config(&self) -> &SessionConfig {
        &self.inner.config
    }

    /// What binds connections outside TLS to this session; `None` where plaintext leaves the host.
    pub fn binding(&self) -> Option<&BindingKey> {
        self.binding.as_ref()
    }

    /// Opens the connection of lane `id`; returns once the destination has taken it into the session.
    pub fn dial_lane(&self, id: LaneId, deadline: Deadline) -> Result<LaneStream, SessionError> {
        let mut stream = self.inner.open(Kind::Lane(id), deadline)?;
        stream.write_all("showing the token", &self.inner.token.0, deadline)?;
        let mut verdict = [0];
        stream.read_exact("waiting for the lane to be taken", &mut verdict, deadline)?;
        match verdict[0] {
            LANE_TAKEN => Ok(stream),
            _ => Err(SessionError::LaneRefused { lane: id, why: "wrong token, or it is open already" }),
        }
    }

    /// Opens the guard connection: plain and bare from here on, meant to be handed to another process.
    pub fn dial_guard(&self, deadline: Deadline) -> Result<OwnedFd, SessionError> {
        let proof = self.inner.token.guard_proof(self.inner.session);
        let stream = self.inner.open(Kind::Guard(proof), deadline)?;
        let (fd, _) = stream.into_parts();
        rustix::io::ioctl_fionbio(&fd, false).map_err(|e| SessionError::Io {
            doing: "making the guard connection blocking".to_owned(),
            source: e.into(),
        })?;
        Ok(fd)
    }
}

impl Dialer {
    fn protection(&self) -> Protection {
        match (&self.address, &self.config.security) {
            (Address::Unix(_), _) => Protection::Unix,
            (Address::Tcp(_), Security::Tls(_)) => Protection::Tls,
            (Address::Tcp(_), Security::Insecure | Security::LoopbackOnly) => Protection::Plain,
        }
    }

    /// Dials, sends the preamble, reads the answer, and puts TLS on top where it belongs.
    fn open(&self, kind: Kind, deadline: Deadline) -> Result<LaneStream, SessionError> {
        let protection = self.protection();
        let mut stream = LaneStream::plain(socket::dial(&self.address, &self.config, deadline)?);
        let preamble = Preamble { kind, protection, session: self.session };
        stream.write_all("sending the preamble", &preamble.encode(), deadline)?;
        let mut answer = [0; ANSWER_BYTES];
        stream.read_exact("waiting for the listener's answer", &mut answer, deadline)?;
        let (answer, theirs) = Answer::decode(&answer)
            .ok_or_else(|| SessionError::Protocol { what: "the listener is not a belay".to_owned() })?;
        match answer {
            Answer::GoOn => {}
            Answer::WrongVersion => return Err(SessionError::PreambleVersion { ours: PREAMBLE_VERSION, theirs }),
            Answer::WrongProtection => return Err(SessionError::SecurityMismatch { ours: protection.name() }),
            Answer::NoSuchSession => return Err(SessionError::NoSuchSession { session: self.session }),
            Answer::Refused => return Err(SessionError::Busy),
        }
        if let (Protection::Tls, Security::Tls(credentials), Kind::Control | Kind::Lane(_)) =
            (protection, &self.config.security, kind)
        {
            stream.start_tls(credentials.dialling()?);
            stream.finish_handshake(deadline)?;
        }
        Ok(stream)
    }
}
