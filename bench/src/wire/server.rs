//! The owner's side of a wire measurement: exports memory, answers questions, and otherwise sleeps.

use super::protocol::{Answer, Ask, Bell, Call, MAX_RAM_BYTES, TRAILER_ROOM, Wanted, source_word, written_word};
use super::usage::Usage;
use crate::error::BenchError;
use crate::rig::{Source, soon};
use belay_transport::fabric::owner;
use belay_transport::region::{Extent, Mapping, RamFile};
use belay_transport::session::{Address, Control, Offer, SessionConfig, SourceSession, connect};
use belay_transport::{Deadline, PageSize};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

/// How often the server looks whether its time is up while nobody calls.
const LOOK: Duration = Duration::from_millis(100);

/// Serves one client after the other.
pub struct Server {
    listener: TcpListener,
    config: SessionConfig,
    /// Made by the first client that wants so much, kept for the next.
    source: Option<Source>,
}

impl Server {
    pub fn bind(address: &str, config: SessionConfig) -> Result<Self, BenchError> {
        let listener = TcpListener::bind(address).map_err(BenchError::io("listening for a client"))?;
        listener.set_nonblocking(true).map_err(BenchError::io("the server's socket"))?;
        Ok(Self { listener, config, source: None })
    }

    pub fn address(&self) -> Result<SocketAddr, BenchError> {
        self.listener.local_addr().map_err(BenchError::io("the server's address"))
    }

    /// Serves `clients` of them (any number without one), and gives up when none has called for `idle`.
    pub fn run(&mut self, clients: Option<u32>, idle: Duration) -> Result<(), BenchError> {
        let mut served = 0;
        while clients.is_none_or(|clients| served < clients) {
            let (stream, from) = self.call(idle)?;
            // One that goes wrong must not keep the next from being served.
            match self.client(stream, idle) {
                Ok(measurements) => eprintln!("served {from}: {measurements} measurements"),
                Err(error) => eprintln!("client {from}: {}", error.with_causes()),
            }
            served += 1;
        }
        Ok(())
    }

    fn call(&self, idle: Duration) -> Result<(TcpStream, SocketAddr), BenchError> {
        let deadline = Deadline::after(idle);
        loop {
            match self.listener.accept() {
                Ok((stream, from)) => {
                    stream.set_nonblocking(false).map_err(BenchError::io("a client's socket"))?;
                    return Ok((stream, from));
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    if deadline.expired() {
                        return Err(BenchError::NobodyCalled(idle));
                    }
                    std::thread::sleep(LOOK.min(deadline.left()));
                }
                Err(error) => return Err(BenchError::io("taking a client's call")(error)),
            }
        }
    }

    /// One client, until it says bye: how many measurements it made.
    fn client(&mut self, stream: TcpStream, idle: Duration) -> Result<u32, BenchError> {
        let mut bell = Bell::new(stream)?;
        let from = bell.peer()?;
        let mut measurements = 0;
        loop {
            match bell.heard(idle)?.ok_or(BenchError::NobodyCalled(idle))? {
                Call::Bye => return Ok(measurements),
                Call::Failed(why) => return Err(BenchError::Peer { why }),
                Call::Dial(port) => {
                    let address = Address::Tcp(SocketAddr::new(from, port).to_string());
                    match connect(&address, self.config.clone(), &Offer::default(), soon()) {
                        Ok(session) => self.measurement(session, idle)?,
                        Err(error) => {
                            let error = BenchError::from(error);
                            bell.ring(&Call::Failed(error.with_causes()))?;
                            return Err(error);
                        }
                    }
                    measurements += 1;
                }
            }
        }
    }

    fn measurement(&mut self, session: SourceSession, idle: Duration) -> Result<(), BenchError> {
        let control = Arc::clone(&session.control);
        let done = self.serve(session, idle);
        if let Err(error) = &done {
            // The client hears why, if it still listens.
            let _ = say(&control, &Answer::Refused { why: error.with_causes() });
        }
        control.shutdown();
        done
    }

    fn serve(&mut self, session: SourceSession, idle: Duration) -> Result<(), BenchError> {
        let refused = |why| BenchError::Refused { why };
        let wanted: Wanted = serde_json::from_slice(&session.blob).map_err(|error| refused(error.to_string()))?;
        wanted.check().map_err(refused)?;
        let source = self.source(wanted.ram_bytes)?;
        let (ring_file, ring) = memory("bench-ring", wanted.ring_bytes as usize)?;
        let (region_file, region) = memory("bench-owner", 4096)?;
        let mut owner = owner(&session)?;
        let extent = Extent { offset: 0, len: wanted.ram_bytes };
        let ram = owner.export_read(&source.file, &source.mapping, &[extent])?;
        let keys = owner.export_ring((&ring_file, &ring), (&region_file, &region))?;
        let control = Arc::clone(&session.control);
        say(&control, &Answer::Ready { ram, ring: keys })?;
        for lane in &wanted.lanes {
            owner.serve_lane(*lane, soon())?;
        }
        loop {
            let ask = control.recv(Deadline::after(idle))?;
            match serde_json::from_slice(&ask).map_err(|error| refused(error.to_string()))? {
                Ask::Usage => {
                    let usage = Usage::now().map_err(BenchError::io("looking at the process's CPU time"))?;
                    say(&control, &Answer::Usage(usage))?;
                }
                Ask::Written { salt, bytes } => {
                    let pages = bytes.min(wanted.ring_bytes - TRAILER_ROOM) / 4096;
                    let found = |page: u64| ring.load_u64(page as usize * 4096, std::sync::atomic::Ordering::Acquire);
                    let wrong = (0..pages).find(|page| found(*page) != written_word(salt, *page));
                    say(&control, &Answer::Written { wrong: wrong.map(|page| (page, found(page))) })?;
                }
                Ask::Done => return Ok(()),
            }
        }
    }

    /// RAM of that size whose pages begin with [`source_word`].
    fn source(&mut self, bytes: u64) -> Result<&Source, BenchError> {
        debug_assert!(bytes <= MAX_RAM_BYTES && source_word(0) == 1);
        if self.source.as_ref().is_none_or(|source| source.mapping.len() as u64 != bytes) {
            // The old one goes first: both together may be more than there is.
            self.source = None;
            self.source = Some(Source::new(bytes as usize)?);
        }
        Ok(self.source.as_ref().expect("made above"))
    }
}

/// Allocated memory.
pub fn memory(name: &str, len: usize) -> Result<(RamFile, Arc<Mapping>), BenchError> {
    let file = RamFile::memfd(name, len, PageSize::Small)?;
    let mapping = Arc::new(file.map().map_err(BenchError::io("mapping memory"))?);
    file.preallocate_through(&mapping, 2, &|_| ())?;
    Ok((file, mapping))
}

fn say(control: &Control, answer: &Answer) -> Result<(), BenchError> {
    let frame = serde_json::to_vec(answer).map_err(|error| BenchError::Refused { why: error.to_string() })?;
    Ok(control.send(&frame, soon())?)
}
