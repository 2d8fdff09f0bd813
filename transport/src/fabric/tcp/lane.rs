//! The initiator's side of `tcp`: requests out in one send a batch, data received straight into its final place.

use super::pipe::{Pieces, send_bytes, tls_flush, tls_send, tls_send_mapped, tls_take};
use super::wire::{Operation, REQUEST_BYTES, RESPONSE_BYTES, Request, Response};
use crate::deadline::Deadline;
use crate::fabric::{
    FabricError, FabricKind, Initiator, Lane, LaneId, LocalKey, MAX_WINDOW, Read, Write, local, local_writable,
    register,
};
use crate::region::Mapping;
use crate::session::{LaneAcceptor, LaneStream, wait_for};
use rustix::event::PollFlags;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

/// Operations whose data one system call receives.
const MAX_SCATTERED: usize = 32;
/// Writes that one system call sends.
const MAX_GATHERED: usize = 32;

/// The destination's side.
pub struct TcpInitiator {
    acceptor: LaneAcceptor,
    locals: Vec<Arc<Mapping>>,
    opened: bool,
}

impl TcpInitiator {
    pub(in crate::fabric) fn new(acceptor: LaneAcceptor) -> Self {
        Self { acceptor, locals: Vec::new(), opened: false }
    }
}

impl Initiator for TcpInitiator {
    fn kind(&self) -> FabricKind {
        FabricKind::Tcp
    }

    fn register_local(&mut self, mapping: &Arc<Mapping>) -> Result<LocalKey, FabricError> {
        register(&mut self.locals, self.opened, mapping)
    }

    fn open_lane(&mut self, id: LaneId, window: usize, deadline: Deadline) -> Result<Box<dyn Lane>, FabricError> {
        let stream = self.acceptor.take(id, deadline)?;
        self.opened = true;
        let window = window.clamp(1, MAX_WINDOW);
        Ok(Box::new(TcpLane::new(id, stream, self.locals.clone().into(), window, self.acceptor.config().peer_silence)))
    }
}

/// An operation on its way.
#[derive(Debug, Clone, Copy)]
struct Posted {
    id: u64,
    /// Bytes of data in the response, and where they go; none for a write.
    local: LocalKey,
    local_offset: usize,
    len: usize,
}

pub(super) struct TcpLane {
    id: LaneId,
    fd: OwnedFd,
    tls: Option<Box<rustls::Connection>>,
    locals: Arc<[Arc<Mapping>]>,
    window: usize,
    /// Everything posted and not polled, oldest first; the first `completed` are complete.
    posted: VecDeque<Posted>,
    completed: usize,
    /// Of the first incomplete operation: header bytes received, data bytes received.
    header_bytes: usize,
    data_bytes: usize,
    headers: Box<[[u8; RESPONSE_BYTES]]>,
    pieces: Pieces,
    /// Apart from `pieces`, which is used by what is received while a batch is being sent.
    outgoing: Pieces,
    requests: Vec<u8>,
    next_sequence: u64,
    /// Sequence of the first incomplete operation.
    expected_sequence: u64,
    /// Longest wait for a peer that takes nothing while a batch is being posted.
    patience: Duration,
    broken: bool,
}

impl TcpLane {
    pub(super) fn new(
        id: LaneId,
        stream: LaneStream,
        locals: Arc<[Arc<Mapping>]>,
        window: usize,
        patience: Duration,
    ) -> Self {
        let (fd, tls) = stream.into_parts();
        Self {
            id,
            fd,
            tls,
            locals,
            window,
            // One more than the window: a commit's trailer goes beside a full one.
            posted: VecDeque::with_capacity(window + 1),
            completed: 0,
            header_bytes: 0,
            data_bytes: 0,
            headers: vec![[0; RESPONSE_BYTES]; MAX_SCATTERED].into(),
            pieces: Pieces::with_capacity(2 * MAX_SCATTERED),
            outgoing: Pieces::with_capacity(2 * MAX_GATHERED),
            requests: Vec::with_capacity((window + 1) * REQUEST_BYTES),
            next_sequence: 0,
            expected_sequence: 0,
            patience,
            broken: false,
        }
    }

    fn usable(&self) -> Result<(), FabricError> {
        if self.broken { Err(FabricError::Broken { lane: self.id }) } else { Ok(()) }
    }

    fn admit(&self, asked: usize) -> Result<(), FabricError> {
        self.usable()?;
        let outstanding = self.posted.len();
        if outstanding + asked > self.window {
            return Err(FabricError::WindowFull { asked, outstanding, window: self.window });
        }
        Ok(())
    }

    /// After the first failure every later call fails.
    fn break_on<T>(&mut self, result: Result<T, FabricError>) -> Result<T, FabricError> {
        if result.is_err() {
            self.broken = true;
            // The owner's thread should not go on sending to nobody.
            let _ = rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Both);
        }
        result
    }

    fn failed(&self, doing: &str, error: io::Error) -> FabricError {
        use io::ErrorKind as Kind;
        match error.kind() {
            Kind::ConnectionReset | Kind::BrokenPipe | Kind::UnexpectedEof | Kind::ConnectionAborted => {
                FabricError::PeerClosed { lane: self.id }
            }
            _ => FabricError::Io { doing: format!("{doing} on lane {:?}", self.id), source: error },
        }
    }

    fn protocol(&self, what: &str) -> FabricError {
        FabricError::Protocol { lane: self.id, what: what.to_owned() }
    }

    /// Queues a request; its bytes go to `requests`.
    fn enqueue(&mut self, operation: Operation, key: u64, offset: u64, len: u32, posted: Posted) {
        let request = Request { operation, len, key, offset, sequence: self.next_sequence };
        self.next_sequence += 1;
        self.requests.extend_from_slice(&request.encode());
        self.posted.push_back(posted);
    }

    fn enqueue_read(&mut self, read: &Read) {
        let (local_offset, len) = (read.local_offset as usize, read.len as usize);
        let posted = Posted { id: read.id, local: read.local, local_offset, len };
        self.enqueue(Operation::Read, read.remote.0, read.remote_offset, read.len, posted);
    }

    fn enqueue_write(&mut self, write: &Write) {
        let posted = Posted { id: write.id, local: write.local, local_offset: 0, len: 0 };
        self.enqueue(Operation::Write, write.remote.0, write.remote_offset, write.len, posted);
    }

    /// Repeats a sending step until it is done, receiving meanwhile: the owner may be waiting for us to take its data before
    /// it takes ours.
    fn send_all(&mut self, mut step: impl FnMut(&mut Self) -> io::Result<()>) -> Result<(), FabricError> {
        let mut deadline = None;
        loop {
            match step(self) {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(self.failed("sending", error)),
            }
            let deadline = *deadline.get_or_insert_with(|| Deadline::after(self.patience));
            let ready = wait_for(self.fd.as_fd(), PollFlags::OUT | PollFlags::IN, deadline)
                .map_err(|error| self.failed("waiting", error))?;
            if !ready {
                return Err(FabricError::TimedOut { lane: self.id, bound: self.patience });
            }
            self.receive()?;
        }
    }

    /// Sends `requests` alone.
    fn send_requests(&mut self) -> Result<(), FabricError> {
        let requests = std::mem::take(&mut self.requests);
        let mut sent = 0;
        let done = self.send_all(|lane| {
            match lane.tls.as_deref_mut() {
                None => {
                    while sent < requests.len() {
                        sent += send_bytes(lane.fd.as_fd(), &requests[sent..])?;
                    }
                }
                Some(tls) => {
                    tls_send(lane.fd.as_fd(), tls, &requests, &mut sent)?;
                    tls_flush(lane.fd.as_fd(), tls)?;
                }
            }
            Ok(())
        });
        self.requests = requests;
        done
    }

    /// Sends requests that are in `requests`, each followed by its write's data.
    fn send_writes(&mut self, batch: &[Write]) -> Result<(), FabricError> {
        let mut requests = std::mem::take(&mut self.requests);
        let mut pieces = std::mem::replace(&mut self.outgoing, Pieces::with_capacity(0));
        let done = self.send_with_data(&mut requests, &mut pieces, batch);
        (self.requests, self.outgoing) = (requests, pieces);
        done
    }

    fn send_with_data(&mut self, requests: &mut [u8], pieces: &mut Pieces, batch: &[Write]) -> Result<(), FabricError> {
        let locals = Arc::clone(&self.locals);
        let mapped = |write: &Write| &*locals[write.local.0 as usize];
        let some = batch.chunks(MAX_GATHERED).zip(requests.chunks_mut(MAX_GATHERED * REQUEST_BYTES));
        for (writes, requests) in some {
            if self.tls.is_some() {
                for (write, request) in writes.iter().zip(requests.chunks(REQUEST_BYTES)) {
                    let data = (mapped(write), write.local_offset as usize, write.len as usize);
                    let (mut sent_head, mut sent_data) = (0, 0);
                    self.send_all(|lane| {
                        let tls = lane.tls.as_deref_mut().expect("looked at above");
                        tls_send(lane.fd.as_fd(), tls, request, &mut sent_head)?;
                        tls_send_mapped(lane.fd.as_fd(), tls, data, &mut sent_data)
                    })?;
                }
                continue;
            }
            pieces.clear();
            for (write, request) in writes.iter().zip(requests.chunks_mut(REQUEST_BYTES)) {
                pieces.push_bytes(request);
                pieces.push_mapping(mapped(write), write.local_offset as usize, write.len as usize);
            }
            let mut from = 0;
            self.send_all(|lane| pieces.send(lane.fd.as_fd(), &mut from).map(|_| ()))?;
        }
        self.send_all(|lane| match lane.tls.as_deref_mut() {
            Some(tls) => tls_flush(lane.fd.as_fd(), tls),
            None => Ok(()),
        })
    }

    /// Takes in what has arrived, without waiting.
    fn receive(&mut self) -> Result<(), FabricError> {
        loop {
            let more = if self.tls.is_some() { self.receive_tls() } else { self.receive_plain() }?;
            if !more || self.completed == self.posted.len() {
                return Ok(());
            }
        }
    }

    /// One recvmsg into the headers and final places of the next operations. `true`: there may be more.
    fn receive_plain(&mut self) -> Result<bool, FabricError> {
        self.pieces.clear();
        let mut asked = 0;
        let (header_done, data_done) = (self.header_bytes, self.data_bytes);
        for (at, operation) in self.posted.iter().skip(self.completed).take(MAX_SCATTERED).enumerate() {
            let (from, skip) = if at == 0 { (header_done, data_done) } else { (0, 0) };
            let header = &mut self.headers[at][from..];
            if !header.is_empty() {
                asked += header.len();
                self.pieces.push_bytes(header);
            }
            if operation.len > skip {
                asked += operation.len - skip;
                let mapping = &self.locals[operation.local.0 as usize];
                self.pieces.push_mapping(mapping, operation.local_offset + skip, operation.len - skip);
            }
        }
        let mut unasked = [0];
        if self.pieces.len() == 0 {
            self.pieces.push_bytes(&mut unasked);
        }
        let got = match self.pieces.receive(self.fd.as_fd()) {
            Ok(0) => return Err(FabricError::PeerClosed { lane: self.id }),
            Ok(got) => got,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(self.failed("receiving", error)),
        };
        if asked == 0 {
            return Err(self.protocol("bytes that nobody asked for"));
        }
        self.account(got)?;
        Ok(got == asked)
    }

    /// Counts `got` bytes that have been placed as `receive_plain` laid them out.
    fn account(&mut self, mut got: usize) -> Result<(), FabricError> {
        let mut at = 0;
        while got > 0 {
            let operation = self.posted[self.completed];
            let header = got.min(RESPONSE_BYTES - self.header_bytes);
            self.header_bytes += header;
            got -= header;
            if self.header_bytes < RESPONSE_BYTES {
                // Where the next receive goes on.
                self.headers[0] = self.headers[at];
                return Ok(());
            }
            if header > 0 {
                let bytes = self.headers[at];
                self.check_response(&bytes, &operation)?;
            }
            let data = got.min(operation.len - self.data_bytes);
            self.data_bytes += data;
            got -= data;
            if self.data_bytes < operation.len {
                return Ok(());
            }
            self.complete();
            at += 1;
        }
        Ok(())
    }

    fn complete(&mut self) {
        (self.header_bytes, self.data_bytes) = (0, 0);
        self.completed += 1;
        self.expected_sequence += 1;
    }

    fn check_response(&self, bytes: &[u8; RESPONSE_BYTES], operation: &Posted) -> Result<(), FabricError> {
        let response = Response::decode(bytes).ok_or_else(|| self.protocol("a response with an unknown status"))?;
        if response.sequence != self.expected_sequence {
            return Err(self.protocol("a response out of order"));
        }
        match response.result {
            Ok(len) if len as usize == operation.len => Ok(()),
            Ok(_) => Err(self.protocol("a response of another length than was asked for")),
            Err(reason) => Err(FabricError::Refused { lane: self.id, id: operation.id, reason }),
        }
    }

    /// As `receive_plain`, from TLS's buffer of decrypted bytes.
    fn receive_tls(&mut self) -> Result<bool, FabricError> {
        let mut tls = self.tls.take().expect("the caller looked");
        let fd = self.fd.as_fd();
        let (completed, header_bytes, data_bytes) = (self.completed, self.header_bytes, self.data_bytes);
        let next = self.posted.get(completed).copied();
        let (headers, locals) = (&mut self.headers, &self.locals);
        let mut unasked = false;
        let taken = tls_take(fd, &mut tls, |bytes| match next {
            None => {
                unasked = true;
                0
            }
            Some(_) if header_bytes < RESPONSE_BYTES => {
                let used = bytes.len().min(RESPONSE_BYTES - header_bytes);
                headers[0][header_bytes..header_bytes + used].copy_from_slice(&bytes[..used]);
                used
            }
            Some(operation) => {
                let used = bytes.len().min(operation.len - data_bytes);
                let mapping = &locals[operation.local.0 as usize];
                mapping.write(operation.local_offset + data_bytes, &bytes[..used]);
                used
            }
        });
        self.tls = Some(tls);
        match taken {
            Ok(_) if unasked => Err(self.protocol("bytes that nobody asked for")),
            Ok(0) => Err(FabricError::PeerClosed { lane: self.id }),
            Ok(got) => self.account(got).map(|()| true),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(self.failed("receiving", error)),
        }
    }

    /// Waits until bytes have arrived.
    fn wait_readable(&mut self, deadline: Deadline) -> Result<bool, FabricError> {
        wait_for(self.fd.as_fd(), PollFlags::IN, deadline).map_err(|error| self.failed("waiting", error))
    }
}

impl Lane for TcpLane {
    fn id(&self) -> LaneId {
        self.id
    }

    fn window(&self) -> usize {
        self.window
    }

    fn outstanding(&self) -> usize {
        self.posted.len()
    }

    fn post_reads(&mut self, batch: &[Read]) -> Result<(), FabricError> {
        self.admit(batch.len())?;
        for read in batch {
            local_writable(&self.locals, read.local, read.local_offset, read.len)?;
        }
        self.requests.clear();
        batch.iter().for_each(|read| self.enqueue_read(read));
        let sent = self.send_requests();
        self.break_on(sent)
    }

    fn post_writes(&mut self, batch: &[Write]) -> Result<(), FabricError> {
        self.admit(batch.len())?;
        for write in batch {
            local(&self.locals, write.local, write.local_offset, write.len)?;
        }
        self.requests.clear();
        batch.iter().for_each(|write| self.enqueue_write(write));
        let sent = self.send_writes(batch);
        self.break_on(sent)
    }

    fn poll(&mut self, done: &mut [u64]) -> Result<usize, FabricError> {
        self.usable()?;
        if self.completed == 0 && !self.posted.is_empty() {
            let received = self.receive();
            self.break_on(received)?;
        }
        let count = done.len().min(self.completed);
        for (to, operation) in done.iter_mut().zip(self.posted.drain(..count)) {
            *to = operation.id;
        }
        self.completed -= count;
        Ok(count)
    }

    fn readiness(&self) -> Option<BorrowedFd<'_>> {
        Some(self.fd.as_fd())
    }

    fn wait(&mut self, deadline: Deadline) -> Result<(), FabricError> {
        self.usable()?;
        let bound = deadline.left();
        loop {
            if self.completed > 0 {
                return Ok(());
            }
            let received = self.receive();
            self.break_on(received)?;
            if self.completed > 0 {
                return Ok(());
            }
            let ready = self.wait_readable(deadline);
            if !self.break_on(ready)? {
                return Err(FabricError::TimedOut { lane: self.id, bound });
            }
        }
    }

    fn commit(&mut self, trailer: &Write, deadline: Deadline) -> Result<(), FabricError> {
        self.usable()?;
        local(&self.locals, trailer.local, trailer.local_offset, trailer.len)?;
        self.requests.clear();
        self.enqueue_write(trailer);
        let sent = self.send_writes(std::slice::from_ref(trailer));
        self.break_on(sent)?;
        crate::stop_point::reached("commit-placed");
        let bound = deadline.left();
        loop {
            let received = self.receive();
            self.break_on(received)?;
            if self.completed == self.posted.len() {
                break;
            }
            let ready = self.wait_readable(deadline);
            if !self.break_on(ready)? {
                return self.break_on(Err(FabricError::TimedOut { lane: self.id, bound }));
            }
        }
        self.posted.clear();
        self.completed = 0;
        Ok(())
    }
}
