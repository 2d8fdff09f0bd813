//! The `local` fabric: one host, shared memory, descriptors passed over each lane's Unix socket.
//!
//! An operation is a copy and completes as it is posted. Revocation is cooperative, because a mapping that another process
//! has cannot be taken away: the owner bumps its epoch, and
//! * a *commit* counts only if the epoch is read unchanged after the trailer and a fence. Owner: epoch bumped, fence, ring
//!   copied. Initiator: trailer stored, fence, epoch read. One of the two fences comes first: either the copy holds the
//!   trailer, or the initiator sees the new epoch and does not report a commit.
//! * a batch of reads or writes counts only if the epoch is read unchanged after the copies.
//! * the ring file is truncated in the background: the old initiator's writes go through the kernel and see EFAULT, not SIGBUS.
//!
//! The lane's socket carries the exports at the start and nothing afterwards; its end says that the other side is gone.

use super::exports::{Exports, MAX_EXPORTS, Right, check_owner_region};
use super::{
    FabricError, FabricKind, Initiator, Lane, LaneId, LocalKey, MAX_WINDOW, OWNER_EPOCH_OFFSET, Owner, Read, ReadKey,
    RevokedRing, RingKeys, Write,
};
use crate::deadline::Deadline;
use crate::region::{Extent, Mapping, RamFile};
use crate::session::{LaneAcceptor, LaneDialer, LaneStream, wait_for};
use rustix::event::{PollFlags, epoll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::thread::JoinHandle;

const EXPORTS_MAGIC: u64 = u64::from_le_bytes(*b"BLYlocal");
const HEAD_BYTES: usize = 32;
const ENTRY_BYTES: usize = 24;

fn io_error(doing: &str, source: impl Into<io::Error>) -> FabricError {
    FabricError::Io { doing: doing.to_owned(), source: source.into() }
}

/// The source's side.
pub struct LocalOwner {
    dialer: LaneDialer,
    exports: Exports,
    /// As passed: opened again with the least right that works.
    files: Vec<OwnedFd>,
    ring_file: Option<OwnedFd>,
    truncating: Option<JoinHandle<io::Result<()>>>,
    revoked: bool,
    lanes: Vec<ServedLane>,
    broken: OwnedFd,
}

struct ServedLane {
    id: LaneId,
    stream: LaneStream,
    /// Its end has been told, or is our own doing.
    told: bool,
}

impl LocalOwner {
    pub(super) fn new(dialer: LaneDialer) -> Result<Self, FabricError> {
        let broken = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|e| io_error("making an epoll", e))?;
        Ok(Self {
            dialer,
            exports: Exports::default(),
            files: Vec::new(),
            ring_file: None,
            truncating: None,
            revoked: false,
            lanes: Vec::new(),
            broken,
        })
    }

    fn before_lanes(&self, what: &'static str) -> Result<(), FabricError> {
        if self.lanes.is_empty() { Ok(()) } else { Err(FabricError::TooLate { what }) }
    }

    fn epoch(&self) -> u64 {
        self.exports.owner_region().map_or(0, |region| region.mapping.load_u64(OWNER_EPOCH_OFFSET, Ordering::SeqCst))
    }

    /// The one message of a lane's socket: what is exported, with the descriptors.
    fn send_exports(&self, lane: &LaneStream) -> Result<(), FabricError> {
        let message = exports_message(&self.exports, self.epoch());
        let descriptors: Vec<_> = self.files.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_EXPORTS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
            return Err(FabricError::TooManyExports { limit: MAX_EXPORTS });
        }
        // At most 1.6 KB into the empty buffer of a fresh socket: it goes whole or not at all.
        let sent = rustix::net::sendmsg(lane, &[IoSlice::new(&message)], &mut control, SendFlags::NOSIGNAL)
            .map_err(|error| io_error("passing the exported descriptors", error))?;
        if sent == message.len() { Ok(()) } else { Err(io_error("passing the exported descriptors", Errno::MSGSIZE)) }
    }
}

/// ```text
/// 0 "BLYlocal" · 8 exports u64 · 16 owner epoch u64 · 24 key of the owner's region u64, 0 without one
/// 32 one entry an export: key u64 · bytes u64 · 0 to be read, 1 to be written u64
/// ```
fn exports_message(exports: &Exports, owner_epoch: u64) -> Vec<u8> {
    let all = exports.all();
    let region = exports.owner_region().map_or(0, |region| region.key);
    let mut message = Vec::with_capacity(HEAD_BYTES + all.len() * ENTRY_BYTES);
    for word in [EXPORTS_MAGIC, all.len() as u64, owner_epoch, region] {
        message.extend_from_slice(&word.to_le_bytes());
    }
    for export in all {
        for word in [export.key, export.mapping.len() as u64, u64::from(export.right == Right::Write)] {
            message.extend_from_slice(&word.to_le_bytes());
        }
    }
    message
}

impl Drop for LocalOwner {
    fn drop(&mut self) {
        if let Some(truncating) = self.truncating.take() {
            // One system call on memory: it ends. Its failure changes nothing that anybody relies on.
            let _ = truncating.join();
        }
    }
}

/// Opens `file` again for reading only: the initiator is given no right that it does not need.
fn read_only(file: &impl AsFd) -> Result<OwnedFd, FabricError> {
    let path = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
    rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| io_error("opening an exported file again for reading", error))
}

fn duplicate(file: &impl AsFd) -> Result<OwnedFd, FabricError> {
    rustix::io::fcntl_dupfd_cloexec(file, 0).map_err(|error| io_error("duplicating the ring's descriptor", error))
}

impl Owner for LocalOwner {
    fn kind(&self) -> FabricKind {
        FabricKind::Local
    }

    fn export_read(
        &mut self,
        file: &RamFile,
        mapping: &Arc<Mapping>,
        extents: &[Extent],
    ) -> Result<ReadKey, FabricError> {
        self.before_lanes("memory exported")?;
        let file = read_only(file)?;
        let key = self.exports.add_read(mapping, extents)?;
        self.files.push(file);
        Ok(key)
    }

    fn extend_read(&mut self, key: ReadKey, extents: &[Extent]) -> Result<(), FabricError> {
        self.exports.extend_read(key, extents)
    }

    fn export_ring(
        &mut self,
        ring: (&RamFile, &Arc<Mapping>),
        owner_region: (&RamFile, &Arc<Mapping>),
    ) -> Result<RingKeys, FabricError> {
        self.before_lanes("the ring exported")?;
        check_owner_region(owner_region.1)?;
        let (to_pass, to_truncate, region) = (duplicate(ring.0)?, duplicate(ring.0)?, read_only(owner_region.0)?);
        let keys = self.exports.add_ring(ring.1, owner_region.1)?;
        self.files.extend([to_pass, region]);
        self.ring_file = Some(to_truncate);
        Ok(keys)
    }

    fn serve_lane(&mut self, id: LaneId, deadline: Deadline) -> Result<(), FabricError> {
        if self.revoked {
            return Err(FabricError::TooLate { what: "a lane opened: the session is revoked, which is" });
        }
        let lane = self.dialer.dial_lane(id, deadline)?;
        self.send_exports(&lane)?;
        let gone = epoll::EventFlags::RDHUP | epoll::EventFlags::HUP;
        epoll::add(&self.broken, &lane, epoll::EventData::new_u64(self.lanes.len() as u64), gone)
            .map_err(|error| io_error("watching a lane", error))?;
        self.lanes.push(ServedLane { id, stream: lane, told: false });
        Ok(())
    }

    fn revoke(&mut self, last_read: &mut dyn FnMut(RevokedRing<'_>), _deadline: Deadline) -> Result<(), FabricError> {
        if std::mem::replace(&mut self.revoked, true) {
            return Ok(());
        }
        if let Some(region) = self.exports.owner_region() {
            region.mapping.atomic_u64(OWNER_EPOCH_OFFSET).fetch_add(1, Ordering::SeqCst);
            fence(Ordering::SeqCst);
        }
        if let Some(ring) = self.exports.ring() {
            last_read(RevokedRing::Shared(ring));
        }
        if let Some(file) = self.ring_file.take() {
            // Beside the catch, which waits for nothing here: giving 64 MiB of pages back takes 11 ms. What counts has been read;
            // this only makes what a stale writer still does end sooner.
            let truncate = move || rustix::fs::ftruncate(&file, 0).map_err(io::Error::from);
            let thread = std::thread::Builder::new().name("belay-truncate".to_owned()).spawn(truncate);
            self.truncating =
                Some(thread.map_err(|error| io_error("starting the truncation of the revoked ring", error))?);
        }
        for lane in &mut self.lanes {
            // A peer that is gone already has done this for us.
            let _ = rustix::net::shutdown(&lane.stream, rustix::net::Shutdown::Both);
            lane.told = true;
        }
        Ok(())
    }

    fn broken(&self) -> Option<BorrowedFd<'_>> {
        Some(self.broken.as_fd())
    }

    fn take_failures(&mut self) -> Vec<FabricError> {
        let now = Deadline::after(std::time::Duration::ZERO);
        let ended = |lane: &ServedLane| wait_for(lane.stream.as_fd(), PollFlags::RDHUP, now).unwrap_or(true);
        let mut failures = Vec::new();
        for lane in self.lanes.iter_mut().filter(|lane| !lane.told) {
            if ended(lane) {
                lane.told = true;
                failures.push(FabricError::PeerClosed { lane: lane.id });
            }
        }
        failures
    }
}

/// An export as the initiator has it.
#[derive(Debug, Clone)]
struct Remote {
    key: u64,
    right: Right,
    mapping: Arc<Mapping>,
}

/// The word that the owner changes to take the session back.
#[derive(Debug, Clone)]
struct EpochWatch {
    region: Arc<Mapping>,
    was: u64,
}

impl EpochWatch {
    /// Everything this thread did before comes before the look.
    fn check(&self) -> Result<(), FabricError> {
        fence(Ordering::SeqCst);
        let is = self.region.load_u64(OWNER_EPOCH_OFFSET, Ordering::SeqCst);
        if is == self.was { Ok(()) } else { Err(FabricError::Revoked { was: self.was, is }) }
    }
}

/// The destination's side.
pub struct LocalInitiator {
    acceptor: LaneAcceptor,
    locals: Vec<Arc<Mapping>>,
    /// From the first lane's message; every later one says the same.
    remotes: Option<(Vec<Remote>, Option<EpochWatch>)>,
}

impl LocalInitiator {
    pub(super) fn new(acceptor: LaneAcceptor) -> Self {
        Self { acceptor, locals: Vec::new(), remotes: None }
    }
}

impl Initiator for LocalInitiator {
    fn kind(&self) -> FabricKind {
        FabricKind::Local
    }

    fn register_local(&mut self, mapping: &Arc<Mapping>) -> Result<LocalKey, FabricError> {
        super::register(&mut self.locals, self.remotes.is_some(), mapping)
    }

    fn open_lane(&mut self, id: LaneId, window: usize, deadline: Deadline) -> Result<Box<dyn Lane>, FabricError> {
        let stream = self.acceptor.take(id, deadline)?;
        let (message, descriptors) = receive_exports(id, &stream, deadline)?;
        if self.remotes.is_none() {
            self.remotes = Some(map_exports(id, &message, descriptors)?);
        }
        let (remotes, watch) = self.remotes.clone().expect("set above");
        let window = window.clamp(1, MAX_WINDOW);
        Ok(Box::new(LocalLane {
            id,
            stream,
            locals: self.locals.clone(),
            remotes,
            watch,
            window,
            done: VecDeque::with_capacity(window),
            broken: false,
        }))
    }
}

/// Receives a lane's message and the descriptors that came with it.
fn receive_exports(
    id: LaneId,
    stream: &LaneStream,
    deadline: Deadline,
) -> Result<(Vec<u8>, Vec<OwnedFd>), FabricError> {
    let bound = deadline.left();
    let mut message = vec![0; HEAD_BYTES + MAX_EXPORTS * ENTRY_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_EXPORTS))];
    let got = loop {
        let ready =
            wait_for(stream.as_fd(), PollFlags::IN, deadline).map_err(|e| io_error("waiting for exports", e))?;
        if !ready {
            return Err(FabricError::TimedOut { lane: id, bound });
        }
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut slices = [IoSliceMut::new(&mut message)];
        match rustix::net::recvmsg(stream, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Ok(received) => {
                let mut descriptors = Vec::new();
                for part in control.drain() {
                    if let RecvAncillaryMessage::ScmRights(passed) = part {
                        descriptors.extend(passed);
                    }
                }
                break (received.bytes, descriptors);
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(Errno::CONNRESET) => return Err(FabricError::PeerClosed { lane: id }),
            Err(error) => return Err(io_error("receiving the exported descriptors", error)),
        }
    };
    let (bytes, descriptors) = got;
    if bytes == 0 {
        return Err(FabricError::PeerClosed { lane: id });
    }
    message.truncate(bytes);
    Ok((message, descriptors))
}

fn word(message: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(message.get(at..at + 8)?.try_into().ok()?))
}

/// Maps what was passed, after checking that message and files agree.
fn map_exports(
    lane: LaneId,
    message: &[u8],
    descriptors: Vec<OwnedFd>,
) -> Result<(Vec<Remote>, Option<EpochWatch>), FabricError> {
    let bad = |what: &str| FabricError::Protocol { lane, what: what.to_owned() };
    let head = |at| word(message, at).ok_or_else(|| bad("an export message that is cut short"));
    if head(0)? != EXPORTS_MAGIC {
        return Err(bad("an export message without its magic"));
    }
    let (count, was, region_key) = (head(8)? as usize, head(16)?, head(24)?);
    if count != descriptors.len() || count > MAX_EXPORTS || message.len() != HEAD_BYTES + count * ENTRY_BYTES {
        return Err(bad("as many descriptors as exports must come"));
    }
    let mut remotes = Vec::with_capacity(count);
    for (index, file) in descriptors.into_iter().enumerate() {
        let at = HEAD_BYTES + index * ENTRY_BYTES;
        let (key, len, writable) = (head(at)?, head(at + 8)?, head(at + 16)?);
        let size = rustix::fs::fstat(&file).map_err(|error| io_error("looking at an exported file", error))?.st_size;
        if len == 0 || i64::try_from(len).map_or(true, |len| len > size) {
            return Err(bad("an exported file that is shorter than it was said to be"));
        }
        let (right, mapping) = match writable {
            0 => (Right::Read, Mapping::read_only(&file, len as usize)),
            1 => (Right::Write, Mapping::read_write(&file, len as usize)),
            _ => return Err(bad("an export with an unknown right")),
        };
        let mapping = Arc::new(mapping.map_err(|error| io_error("mapping an exported file", error))?);
        if right == Right::Read {
            // A page fault on this side of a copy is a third of its price; better now than in a read.
            crate::region::map_data_ahead(&mapping, &file)
                .map_err(|error| io_error("looking for data in an exported file", error))?;
        }
        remotes.push(Remote { key, right, mapping });
    }
    let watch = match region_key {
        0 => None,
        key => {
            let region = remotes.iter().find(|remote| remote.key == key && remote.right == Right::Read);
            let region = Arc::clone(&region.ok_or_else(|| bad("an owner region that was not exported"))?.mapping);
            check_owner_region(&region)?;
            Some(EpochWatch { region, was })
        }
    };
    Ok((remotes, watch))
}

/// One lane of the initiator.
struct LocalLane {
    id: LaneId,
    stream: LaneStream,
    locals: Vec<Arc<Mapping>>,
    remotes: Vec<Remote>,
    watch: Option<EpochWatch>,
    window: usize,
    /// Completed and not yet polled.
    done: VecDeque<u64>,
    broken: bool,
}

impl LocalLane {
    fn admit(&self, asked: usize) -> Result<(), FabricError> {
        if self.broken {
            return Err(FabricError::Broken { lane: self.id });
        }
        if self.done.len() + asked > self.window {
            return Err(FabricError::WindowFull { asked, outstanding: self.done.len(), window: self.window });
        }
        Ok(())
    }

    fn remote(&self, key: u64, right: Right, offset: u64, len: u32) -> Result<&Mapping, FabricError> {
        let known = self.remotes.iter().find(|remote| remote.key == key && remote.right == right);
        let remote = known.ok_or(FabricError::UnknownKey { what: "the owner's memory", key })?;
        super::check_range(&remote.mapping, offset, len)?;
        Ok(&remote.mapping)
    }

    fn check_epoch(&self) -> Result<(), FabricError> {
        self.watch.as_ref().map_or(Ok(()), EpochWatch::check)
    }

    fn store(&self, write: &Write) -> Result<(), FabricError> {
        let to = self.remote(write.remote.0, Right::Write, write.remote_offset, write.len)?;
        let from = super::local(&self.locals, write.local, write.local_offset, write.len)?;
        let stored =
            to.write_from_checked(write.remote_offset as usize, from, write.local_offset as usize, write.len as usize);
        match stored {
            Ok(()) => Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::EFAULT) => {
                // The epoch was bumped before the file was truncated, so this says "revoked"; without a bump it is a bug.
                self.check_epoch()?;
                Err(io_error("writing to the ring", error))
            }
            Err(error) => Err(io_error("writing to the ring", error)),
        }
    }

    fn break_on<T>(&mut self, result: Result<T, FabricError>) -> Result<T, FabricError> {
        self.broken |= result.is_err();
        result
    }
}

impl Lane for LocalLane {
    fn id(&self) -> LaneId {
        self.id
    }

    fn window(&self) -> usize {
        self.window
    }

    fn outstanding(&self) -> usize {
        self.done.len()
    }

    fn post_reads(&mut self, batch: &[Read]) -> Result<(), FabricError> {
        self.admit(batch.len())?;
        for read in batch {
            self.remote(read.remote.0, Right::Read, read.remote_offset, read.len)?;
            super::local_writable(&self.locals, read.local, read.local_offset, read.len)?;
        }
        for read in batch {
            let from = self.remote(read.remote.0, Right::Read, read.remote_offset, read.len)?;
            let to = super::local(&self.locals, read.local, read.local_offset, read.len)?;
            to.copy_from(read.local_offset as usize, from, read.remote_offset as usize, read.len as usize);
        }
        let still_ours = self.check_epoch();
        self.break_on(still_ours)?;
        self.done.extend(batch.iter().map(|read| read.id));
        Ok(())
    }

    fn post_writes(&mut self, batch: &[Write]) -> Result<(), FabricError> {
        self.admit(batch.len())?;
        for write in batch {
            self.remote(write.remote.0, Right::Write, write.remote_offset, write.len)?;
            super::local(&self.locals, write.local, write.local_offset, write.len)?;
        }
        let stored = batch.iter().try_for_each(|write| self.store(write)).and_then(|()| self.check_epoch());
        self.break_on(stored)?;
        self.done.extend(batch.iter().map(|write| write.id));
        Ok(())
    }

    fn poll(&mut self, done: &mut [u64]) -> Result<usize, FabricError> {
        if self.broken {
            return Err(FabricError::Broken { lane: self.id });
        }
        let count = done.len().min(self.done.len());
        for (to, id) in done.iter_mut().zip(self.done.drain(..count)) {
            *to = id;
        }
        Ok(count)
    }

    fn readiness(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn wait(&mut self, deadline: Deadline) -> Result<(), FabricError> {
        if self.broken {
            return Err(FabricError::Broken { lane: self.id });
        }
        if !self.done.is_empty() {
            return Ok(());
        }
        let bound = deadline.left();
        // The owner sends nothing after its exports: the socket shows its end or nothing.
        let ended = wait_for(self.stream.as_fd(), PollFlags::IN | PollFlags::RDHUP, deadline)
            .map_err(|error| io_error("waiting for a lane", error))?;
        if !ended {
            return Err(FabricError::TimedOut { lane: self.id, bound });
        }
        let why = self.check_epoch().and(Err(FabricError::PeerClosed { lane: self.id }));
        self.break_on(why)
    }

    fn commit(&mut self, trailer: &Write, _deadline: Deadline) -> Result<(), FabricError> {
        if self.broken {
            return Err(FabricError::Broken { lane: self.id });
        }
        // Earlier writes of this lane are stored already; the store below goes through the kernel on this same thread.
        let stored = self.store(trailer);
        crate::stop_point::reached("commit-placed");
        let committed = stored.and_then(|()| self.check_epoch());
        self.break_on(committed)?;
        self.done.clear();
        Ok(())
    }
}

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
#[cfg(test)]
mod golden;
