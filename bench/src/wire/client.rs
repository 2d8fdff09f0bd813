//! The initiator's side of a wire measurement: one session with the server for each.

use super::protocol::{Answer, Ask, Bell, Call, Wanted};
use super::usage::Usage;
use crate::error::BenchError;
use crate::rig::{BOUND, soon};
use belay_transport::Deadline;
use belay_transport::fabric::{FabricKind, Initiator, Lane, LaneId, ReadKey, RingKeys, initiator};
use belay_transport::session::{Address, DestinationSession, Listener, SessionConfig, SessionError};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::time::Duration;

/// How long the client waits to be dialled before it looks whether the server said why not.
const LOOK: Duration = Duration::from_millis(100);

/// A client, and the listener at which the server dials it back.
pub struct Client {
    bell: Bell,
    listener: Listener,
    /// As dialled.
    pub server: SocketAddr,
}

impl Client {
    pub fn connect(address: &str, config: SessionConfig) -> Result<Self, BenchError> {
        let resolved = address.to_socket_addrs().map_err(BenchError::io("looking up the server's address"))?;
        let mut last = std::io::Error::other("the name has no address");
        for server in resolved {
            match TcpStream::connect_timeout(&server, BOUND) {
                Ok(stream) => {
                    let bell = Bell::new(stream)?;
                    let ours = SocketAddr::new(bell.local()?, 0).to_string();
                    let listener = Listener::bind(&Address::Tcp(ours), config)?;
                    return Ok(Self { bell, listener, server });
                }
                Err(error) => last = error,
            }
        }
        Err(BenchError::io("connecting to the server (is `belay-bench wire --listen` running there?)")(last))
    }

    /// A session with the server, which has made and exported what is `wanted`.
    pub fn meet(&mut self, wanted: &Wanted) -> Result<Met, BenchError> {
        let Address::Tcp(own) = self.listener.address() else { unreachable!("bound to TCP above") };
        let port = own.rsplit(':').next().and_then(|port| port.parse().ok());
        self.bell.ring(&Call::Dial(port.expect("a listener's address ends in its port")))?;
        let deadline = soon();
        let incoming = loop {
            match self.listener.accept(Deadline::after(LOOK).min(deadline)) {
                Ok(incoming) => break incoming,
                Err(SessionError::TimedOut { .. }) if !deadline.expired() => {
                    if let Some(Call::Failed(why)) = self.bell.heard(Duration::ZERO)? {
                        let ours = self.listener.take_rejections().pop().map(|rejection| rejection.error.to_string());
                        return Err(BenchError::NotMet { why, ours: ours.unwrap_or_default() });
                    }
                }
                Err(error) => return Err(error.into()),
            }
        };
        let blob = serde_json::to_vec(wanted).map_err(|error| BenchError::Refused { why: error.to_string() })?;
        let session = incoming.accept(&blob, deadline)?;
        match hear(&session)? {
            Answer::Ready { ram, ring } => {
                let initiator = initiator(&session)?;
                Ok(Met { initiator, ram, ring, session })
            }
            other => Err(BenchError::Peer { why: format!("it said {other:?} instead of being ready") }),
        }
    }

    /// Tells the server that this client is done.
    pub fn bye(mut self) -> Result<(), BenchError> {
        self.bell.ring(&Call::Bye)
    }
}

/// A session, as the initiator has it. Memory is registered with `initiator` before the first lane.
pub struct Met {
    pub initiator: Box<dyn Initiator>,
    pub ram: ReadKey,
    pub ring: RingKeys,
    session: DestinationSession,
}

impl Met {
    pub fn lane(&mut self, id: LaneId, window: usize) -> Result<Box<dyn Lane>, BenchError> {
        Ok(self.initiator.open_lane(id, window, soon())?)
    }

    pub fn fabric(&self) -> FabricKind {
        self.session.agreed.fabric
    }

    /// Whether everything but what RDMA moves is encrypted.
    pub fn encrypted(&self) -> bool {
        self.session.lanes.is_encrypted()
    }

    /// What the server's process has used of its CPU by now.
    pub fn usage(&self) -> Result<Usage, BenchError> {
        match self.ask(Ask::Usage)? {
            Answer::Usage(usage) => Ok(usage),
            other => Err(BenchError::Peer { why: format!("asked for its usage it said {other:?}") }),
        }
    }

    /// Has the server compare what was written.
    pub fn check_written(&self, salt: u64, bytes: u64) -> Result<(), BenchError> {
        match self.ask(Ask::Written { salt, bytes })? {
            Answer::Written { wrong: None } => Ok(()),
            Answer::Written { wrong: Some((page, found)) } => {
                let expected = super::protocol::written_word(salt, page);
                Err(BenchError::WrongAtServer { page, found, expected })
            }
            other => Err(BenchError::Peer { why: format!("asked for a comparison it said {other:?}") }),
        }
    }

    /// Ends the session by word. Lanes are to be dropped before.
    pub fn done(self) -> Result<(), BenchError> {
        self.say(Ask::Done)
    }

    fn say(&self, ask: Ask) -> Result<(), BenchError> {
        let frame = serde_json::to_vec(&ask).map_err(|error| BenchError::Refused { why: error.to_string() })?;
        Ok(self.session.control.send(&frame, soon())?)
    }

    fn ask(&self, ask: Ask) -> Result<Answer, BenchError> {
        self.say(ask)?;
        hear(&self.session)
    }
}

fn hear(session: &DestinationSession) -> Result<Answer, BenchError> {
    let frame = session.control.recv(soon())?;
    match serde_json::from_slice(&frame) {
        Ok(Answer::Refused { why }) => Err(BenchError::Peer { why }),
        Ok(answer) => Ok(answer),
        Err(error) => Err(BenchError::Peer { why: format!("an answer that does not parse: {error}") }),
    }
}
