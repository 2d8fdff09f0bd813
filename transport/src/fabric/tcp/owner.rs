//! The owner's side of `tcp`: one thread a lane that answers from the exports, and the revocation that ends them.

use super::pipe::{Pieces, receive_bytes, receive_into, tls_flush, tls_read, tls_send, tls_send_mapped};
use super::wire::{Operation, REQUEST_BYTES, RESPONSE_BYTES, Request, Response};
use crate::deadline::Deadline;
use crate::fabric::exports::{Exports, Right, check_owner_region};
use crate::fabric::{FabricError, FabricKind, LaneId, Owner, ReadKey, RefusedReason, RevokedRing, RingKeys};
use crate::region::{Extent, Mapping, RamFile};
use crate::session::{LaneDialer, LaneStream};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use rustix::event::{EventfdFlags, eventfd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

/// Requests are read in helpings of this size.
const INTAKE_BYTES: usize = 64 << 10;
/// Responses gathered for one system call.
const MAX_GATHERED: usize = 64;
/// Bytes gathered for one system call: more only delays the first.
const MAX_GATHERED_BYTES: usize = 1 << 20;

fn io_error(doing: &str, source: impl Into<io::Error>) -> FabricError {
    FabricError::Io { doing: doing.to_owned(), source: source.into() }
}

/// The source's side.
pub struct TcpOwner {
    dialer: LaneDialer,
    exports: Exports,
    /// The exports as the threads see them, from the first lane on.
    serving: Option<Arc<Exports>>,
    lanes: Vec<ServedLane>,
    revoked: Arc<AtomicBool>,
    broken: Arc<OwnedFd>,
    /// The last read is over.
    read_last: bool,
}

struct ServedLane {
    id: LaneId,
    /// The thread's socket, to shut it from outside.
    socket: OwnedFd,
    /// Says why the thread ends by itself, and disconnects when it is about to end.
    ended: Receiver<FabricError>,
    /// Taken from `ended` and not told yet.
    failure: Option<FabricError>,
    thread: Option<JoinHandle<()>>,
}

impl TcpOwner {
    pub(in crate::fabric) fn new(dialer: LaneDialer) -> Result<Self, FabricError> {
        let broken = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        Ok(Self {
            dialer,
            exports: Exports::default(),
            serving: None,
            lanes: Vec::new(),
            revoked: Arc::default(),
            broken: Arc::new(broken.map_err(|error| io_error("making an eventfd", error))?),
            read_last: false,
        })
    }

    fn before_lanes(&self, what: &'static str) -> Result<(), FabricError> {
        if self.serving.is_none() { Ok(()) } else { Err(FabricError::TooLate { what }) }
    }

    /// Shuts every lane's socket and joins its thread. A thread waits for nothing but its socket.
    fn end_lanes(&mut self, deadline: Deadline) -> Result<(), FabricError> {
        self.revoked.store(true, Ordering::SeqCst);
        for lane in &self.lanes {
            // It fails only on a connection that has ended already.
            let _ = rustix::net::shutdown(&lane.socket, rustix::net::Shutdown::Both);
        }
        let bound = deadline.left();
        for lane in &mut self.lanes {
            loop {
                match lane.ended.recv_deadline(deadline.instant()) {
                    Ok(failure) => lane.failure = Some(failure),
                    Err(RecvTimeoutError::Disconnected) => break,
                    Err(RecvTimeoutError::Timeout) => return Err(FabricError::TimedOut { lane: lane.id, bound }),
                }
            }
            if let Some(thread) = lane.thread.take() {
                // A panic in it has been told by the panic hook, and its lane is over like any other.
                let _ = thread.join();
            }
        }
        Ok(())
    }
}

impl Owner for TcpOwner {
    fn kind(&self) -> FabricKind {
        FabricKind::Tcp
    }

    fn export_read(
        &mut self,
        _file: &RamFile,
        mapping: &Arc<Mapping>,
        extents: &[Extent],
    ) -> Result<ReadKey, FabricError> {
        self.before_lanes("memory exported")?;
        self.exports.add_read(mapping, extents)
    }

    fn extend_read(&mut self, key: ReadKey, extents: &[Extent]) -> Result<(), FabricError> {
        self.exports.extend_read(key, extents)
    }

    fn export_ring(
        &mut self,
        (_, ring): (&RamFile, &Arc<Mapping>),
        (_, owner_region): (&RamFile, &Arc<Mapping>),
    ) -> Result<RingKeys, FabricError> {
        self.before_lanes("the ring exported")?;
        check_owner_region(owner_region)?;
        self.exports.add_ring(ring, owner_region)
    }

    fn serve_lane(&mut self, id: LaneId, deadline: Deadline) -> Result<(), FabricError> {
        if self.revoked.load(Ordering::SeqCst) {
            return Err(FabricError::TooLate { what: "a lane opened: the session is revoked, which is" });
        }
        let exports = Arc::clone(self.serving.get_or_insert_with(|| Arc::new(self.exports.clone())));
        let stream = self.dialer.dial_lane(id, deadline)?;
        let socket = rustix::io::fcntl_dupfd_cloexec(&stream, 0).map_err(|e| io_error("duplicating a socket", e))?;
        rustix::io::ioctl_fionbio(&socket, false).map_err(|e| io_error("making a lane blocking", e))?;
        let (tell, ended) = bounded(1);
        let server = Server::new(id, stream, exports, Arc::clone(&self.revoked));
        let broken = Arc::clone(&self.broken);
        let thread = std::thread::Builder::new()
            .name(format!("belay-{:?}{}", id.kind, id.index).to_lowercase())
            .spawn(move || {
                let ending = Ending { broken, tell };
                if let Some(failure) = server.run() {
                    // There is room for the one failure that ends a lane.
                    let _ = ending.tell.try_send(failure);
                }
            })
            .map_err(|error| io_error("starting a lane's thread", error))?;
        self.lanes.push(ServedLane { id, socket, ended, failure: None, thread: Some(thread) });
        Ok(())
    }

    fn revoke(&mut self, last_read: &mut dyn FnMut(RevokedRing<'_>), deadline: Deadline) -> Result<(), FabricError> {
        if std::mem::replace(&mut self.read_last, true) {
            return Ok(());
        }
        if let Some(region) = self.exports.owner_region() {
            region.mapping.atomic_u64(crate::fabric::OWNER_EPOCH_OFFSET).fetch_add(1, Ordering::SeqCst);
        }
        if let Err(error) = self.end_lanes(deadline) {
            // A thread still runs: nothing was read, and the next call tries again.
            self.read_last = false;
            return Err(error);
        }
        if let Some(ring) = self.exports.ring() {
            // No thread of a lane is left, and nobody else writes there.
            last_read(RevokedRing::still(ring));
        }
        Ok(())
    }

    fn broken(&self) -> Option<BorrowedFd<'_>> {
        Some((*self.broken).as_fd())
    }

    fn take_failures(&mut self) -> Vec<FabricError> {
        let told = |lane: &mut ServedLane| lane.failure.take().or_else(|| lane.ended.try_recv().ok());
        self.lanes.iter_mut().filter_map(told).collect()
    }
}

impl Drop for TcpOwner {
    fn drop(&mut self) {
        // Their sockets are shut, so they end at once; the bound is for what cannot happen.
        let _ = self.end_lanes(Deadline::after(std::time::Duration::from_secs(5)));
    }
}

/// Tells, when a lane's thread ends in whatever way, that it has: first why, then by the descriptor, then by disconnecting.
struct Ending {
    broken: Arc<OwnedFd>,
    tell: Sender<FabricError>,
}

impl Drop for Ending {
    fn drop(&mut self) {
        // A full counter is readable too.
        let _ = rustix::io::write(&*self.broken, &1u64.to_ne_bytes());
    }
}

/// Why a lane's thread ends.
enum End {
    PeerClosed,
    Io(io::Error),
    NotARequest,
    Refused { sequence: u64, reason: RefusedReason },
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> Self {
        use io::ErrorKind as Kind;
        match error.kind() {
            Kind::ConnectionReset | Kind::BrokenPipe | Kind::UnexpectedEof | Kind::ConnectionAborted => {
                Self::PeerClosed
            }
            _ => Self::Io(error),
        }
    }
}

/// A lane's thread.
pub(super) struct Server {
    id: LaneId,
    fd: OwnedFd,
    tls: Option<Box<rustls::Connection>>,
    exports: Arc<Exports>,
    revoked: Arc<AtomicBool>,
    intake: Box<[u8]>,
    /// Received and not yet used: `intake[begin..end]`.
    begin: usize,
    end: usize,
    /// Headers of gathered responses; `pieces` names them and the memory of reads.
    headers: Box<[[u8; RESPONSE_BYTES]]>,
    gathered: usize,
    gathered_bytes: usize,
    pieces: Pieces,
}

impl Server {
    pub(super) fn new(id: LaneId, stream: LaneStream, exports: Arc<Exports>, revoked: Arc<AtomicBool>) -> Self {
        let (fd, tls) = stream.into_parts();
        Self {
            id,
            fd,
            tls,
            exports,
            revoked,
            intake: vec![0; INTAKE_BYTES].into(),
            begin: 0,
            end: 0,
            headers: vec![[0; RESPONSE_BYTES]; MAX_GATHERED].into(),
            gathered: 0,
            gathered_bytes: 0,
            pieces: Pieces::with_capacity(2 * MAX_GATHERED),
        }
    }

    /// Serves until the socket ends, at the latest when the owner shuts it. `None` when that was the owner's doing.
    pub(super) fn run(mut self) -> Option<FabricError> {
        let mut sequence = 0;
        let end = loop {
            if let Err(end) = self.serve(&mut sequence) {
                break end;
            }
        };
        let _ = rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Both);
        if self.revoked.load(Ordering::SeqCst) {
            return None;
        }
        let lane = self.id;
        Some(match end {
            End::PeerClosed => FabricError::PeerClosed { lane },
            End::Io(source) => FabricError::Io { doing: format!("serving lane {lane:?}"), source },
            End::NotARequest => FabricError::Protocol { lane, what: "what came is not the next request".to_owned() },
            End::Refused { sequence, reason } => FabricError::Refused { lane, id: sequence, reason },
        })
    }

    /// Takes one helping of requests and answers all of them.
    fn serve(&mut self, sequence: &mut u64) -> Result<(), End> {
        self.fill()?;
        while self.end - self.begin >= REQUEST_BYTES {
            let bytes = self.intake[self.begin..self.begin + REQUEST_BYTES].try_into().expect("32 bytes");
            self.begin += REQUEST_BYTES;
            let request =
                Request::decode(&bytes).filter(|request| request.sequence == *sequence).ok_or(End::NotARequest)?;
            let done = if self.revoked.load(Ordering::SeqCst) {
                Err(RefusedReason::Revoked)
            } else {
                match request.operation {
                    Operation::Read => self.read(&request)?,
                    Operation::Write => self.write(&request)?,
                }
            };
            if let Err(reason) = done {
                self.respond(Response { result: Err(reason), sequence: *sequence }, None)?;
                self.flush()?;
                return Err(End::Refused { sequence: *sequence, reason });
            }
            *sequence += 1;
        }
        self.flush()
    }

    fn read(&mut self, request: &Request) -> Result<Result<(), RefusedReason>, End> {
        let exports = Arc::clone(&self.exports);
        let (mapping, offset, len) = match exports.check(request.key, Right::Read, request.offset, request.len) {
            Ok(checked) => checked,
            Err(reason) => return Ok(Err(reason)),
        };
        let response = Response { result: Ok(request.len), sequence: request.sequence };
        self.respond(response, Some((mapping, offset, len)))?;
        Ok(Ok(()))
    }

    /// Places the data that follows the request, then answers.
    fn write(&mut self, request: &Request) -> Result<Result<(), RefusedReason>, End> {
        let exports = Arc::clone(&self.exports);
        let (mapping, offset, len) = match exports.check(request.key, Right::Write, request.offset, request.len) {
            Ok(checked) => checked,
            Err(reason) => return Ok(Err(reason)),
        };
        let here = len.min(self.end - self.begin);
        mapping.write(offset, &self.intake[self.begin..self.begin + here]);
        self.begin += here;
        if here < len {
            // The rest may be long in coming; what is answered already should not wait for it.
            self.flush()?;
        }
        let mut placed = here;
        while placed < len {
            let got = match self.tls.as_deref_mut() {
                None => receive_into(self.fd.as_fd(), mapping, offset + placed, len - placed)?,
                Some(tls) => {
                    let room = (len - placed).min(self.intake.len());
                    let got = tls_read(self.fd.as_fd(), tls, &mut self.intake[..room])?;
                    mapping.write(offset + placed, &self.intake[..got]);
                    got
                }
            };
            if got == 0 {
                return Err(End::PeerClosed);
            }
            placed += got;
            // The intake was empty when data was read past it.
            (self.begin, self.end) = (0, 0);
        }
        self.respond(Response { result: Ok(0), sequence: request.sequence }, None)?;
        Ok(Ok(()))
    }

    /// Waits for more bytes of requests.
    fn fill(&mut self) -> Result<(), End> {
        self.intake.copy_within(self.begin..self.end, 0);
        (self.begin, self.end) = (0, self.end - self.begin);
        let room = &mut self.intake[self.end..];
        let got = match self.tls.as_deref_mut() {
            None => receive_bytes(self.fd.as_fd(), room)?,
            Some(tls) => tls_read(self.fd.as_fd(), tls, room)?,
        };
        if got == 0 {
            return Err(End::PeerClosed);
        }
        self.end += got;
        Ok(())
    }

    /// Adds a response (and the memory that follows it) to those gathered, sending them when they are many.
    fn respond(&mut self, response: Response, data: Option<(&Mapping, usize, usize)>) -> Result<(), End> {
        let header = response.encode();
        match self.tls.as_deref_mut() {
            Some(tls) => {
                tls_send(self.fd.as_fd(), tls, &header, &mut 0)?;
                if let Some(data) = data {
                    tls_send_mapped(self.fd.as_fd(), tls, data, &mut 0)?;
                }
            }
            None => {
                self.headers[self.gathered] = header;
                self.pieces.push_bytes(&mut self.headers[self.gathered]);
                self.gathered += 1;
                if let Some((mapping, offset, len)) = data {
                    self.pieces.push_mapping(mapping, offset, len);
                    self.gathered_bytes += len;
                }
                if self.gathered == MAX_GATHERED || self.gathered_bytes >= MAX_GATHERED_BYTES {
                    self.flush()?;
                }
            }
        }
        Ok(())
    }

    /// Sends all gathered responses.
    fn flush(&mut self) -> Result<(), End> {
        match self.tls.as_deref_mut() {
            Some(tls) => tls_flush(self.fd.as_fd(), tls)?,
            None => {
                let sent = self.pieces.send(self.fd.as_fd(), &mut 0);
                self.pieces.clear();
                (self.gathered, self.gathered_bytes) = (0, 0);
                sent?;
            }
        }
        Ok(())
    }
}
