//! A lane over verbs: operations in, work requests out, completions back, and every way it can end named.
//!
//! *Commit*: on InfiniBand and RoCE the completion of the trailer's WRITE says that it is in the owner's memory, and everything
//! posted before it (one queue pair keeps the order of WRITEs; the ring is registered without relaxed ordering). On iWARP a WRITE
//! completes once it has been handed to TCP, so the trailer is followed by a READ of its last bytes: the owner's device
//! answers that only after it has placed what came before. Never WRITE_WITH_IMM, which iWARP emulates.
//!
//! *End*: dropping a lane stops its queue pair, which flushes it, and gives it back: afterwards nothing it had posted lands anywhere.

use super::device;
use super::error::VerbsError;
use super::fate::Fate;
use super::queue::{Operation, Queue};
use super::queue_pair::{CHAIN, Completion, QueuePair};
use super::registration::Registered;
use super::table::{RemoteTable, Span, covers};
use super::{RETRY_COUNT, UNREACHABLE_AFTER, acknowledgement_timeout};
use crate::deadline::Deadline;
use crate::fabric::exports::Right;
use crate::fabric::{FabricError, Lane, LaneId, LaneKind, Read, RefusedReason, Write, local, local_writable};
use crate::region::Mapping;
use crate::session::wait_for;
use belay_verbs_sys::ibv_wc_status as status;
use rustix::event::{PollFlags, epoll};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Longest and shortest time that a wait looks at the completion queue before it sleeps. Between the two it follows what it
/// sees: doubled where looking was enough, halved where it was not.
const MOST_SPIN: Duration = Duration::from_micros(200);
const LEAST_SPIN: Duration = Duration::from_micros(1);
/// Bytes of the trailer that iWARP's READ-back asks for, at most.
const READ_BACK_BYTES: u32 = 8;

/// This side's registered memory.
pub(super) struct Locals {
    pub mappings: Vec<Arc<Mapping>>,
    /// By the same index; and one more, the place of READ-backs, where there is one.
    pub spans: Vec<Box<[Span]>>,
    pub read_back: Option<usize>,
    /// The regions, which live as long as this.
    pub _regions: Mutex<Vec<Registered>>,
}

/// The owner's table as the steward keeps it up to date.
pub(super) struct SharedTable {
    version: AtomicU64,
    current: Mutex<Arc<RemoteTable>>,
}

impl SharedTable {
    pub(super) fn new(table: RemoteTable, version: u64) -> Self {
        Self { version: AtomicU64::new(version), current: Mutex::new(Arc::new(table)) }
    }

    pub(super) fn replace(&self, table: RemoteTable, version: u64) {
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(table);
        self.version.store(version, Ordering::Release);
    }

    pub(super) fn get(&self) -> Arc<RemoteTable> {
        Arc::clone(&self.current.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// What a lane is made from.
pub(super) struct Parts {
    pub id: LaneId,
    pub queue_pair: QueuePair,
    pub window: usize,
    /// Depth of the send queue.
    pub depth: u32,
    pub max_message: u32,
    pub device: String,
    pub port: u8,
    pub locals: Arc<Locals>,
    pub table: Arc<SharedTable>,
    pub fate: Arc<Fate>,
    /// Held as long as the lane lives.
    pub session: Box<dyn std::any::Any + Send>,
}

pub(super) struct VerbsLane {
    id: LaneId,
    window: usize,
    queue: Queue,
    /// An operation that asks for a completion of its own comes every so many.
    signal_every: u32,
    unsignalled: u32,
    spin: Duration,
    remotes: Arc<RemoteTable>,
    remotes_version: u64,
    /// Found by a poll that also had completions to hand back; told at the next call.
    failure: Option<FabricError>,
    broken: bool,
    device: String,
    port: u8,
    fate: Arc<Fate>,
    table: Arc<SharedTable>,
    /// Readable when the completion channel or the fate is.
    readiness: OwnedFd,
    // In this order: the queue pair is stopped before the memory it works on goes; what stands behind it keeps that memory too.
    queue_pair: QueuePair,
    locals: Arc<Locals>,
    _session: Box<dyn std::any::Any + Send>,
}

fn io_error(doing: &str, error: rustix::io::Errno) -> FabricError {
    FabricError::Io { doing: doing.to_owned(), source: error.into() }
}

impl VerbsLane {
    pub(super) fn new(parts: Parts) -> Result<Self, FabricError> {
        let readiness = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|e| io_error("making an epoll", e))?;
        let watch = |fd: BorrowedFd<'_>, what| {
            epoll::add(&readiness, fd, epoll::EventData::new_u64(what), epoll::EventFlags::IN)
                .map_err(|error| io_error("watching a lane's descriptors", error))
        };
        watch(parts.queue_pair.channel(), 0)?;
        watch(parts.fate.as_fd(), 1)?;
        let remotes_version = parts.table.version.load(Ordering::Acquire);
        Ok(Self {
            id: parts.id,
            window: parts.window,
            // A commit's trailer and its READ-back go beside a full window.
            queue: Queue::new(parts.window + 2, parts.depth, parts.max_message),
            signal_every: match parts.id.kind {
                // Somebody waits for each.
                LaneKind::Fault => 1,
                LaneKind::Bulk => 4,
                LaneKind::Checkpoint => 16,
            },
            unsignalled: 0,
            spin: MOST_SPIN / 4,
            remotes: parts.table.get(),
            remotes_version,
            failure: None,
            broken: false,
            device: parts.device,
            port: parts.port,
            fate: parts.fate,
            table: parts.table,
            readiness,
            queue_pair: parts.queue_pair,
            locals: parts.locals,
            _session: parts.session,
        })
    }

    fn usable(&self) -> Result<(), FabricError> {
        if self.broken { Err(FabricError::Broken { lane: self.id }) } else { Ok(()) }
    }

    /// After the first failure every later call fails.
    fn broken_by<T>(&mut self, error: impl Into<FabricError>) -> Result<T, FabricError> {
        self.broken = true;
        Err(error.into())
    }

    fn admit(&mut self, asked: usize) -> Result<(), FabricError> {
        self.usable()?;
        let outstanding = self.queue.len();
        if outstanding + asked > self.window {
            return Err(FabricError::WindowFull { asked, outstanding, window: self.window });
        }
        self.take_table();
        Ok(())
    }

    /// Takes the owner's newest table.
    #[inline]
    fn take_table(&mut self) {
        // A lock that is held for a pointer's copy, and only when the table has changed.
        let version = self.table.version.load(Ordering::Acquire);
        if version != self.remotes_version {
            self.remotes = self.table.get();
            self.remotes_version = version;
        }
    }

    /// Where the export of `key` stands, if all of the range may be used with that right.
    fn remote(&self, key: u64, right: Right, offset: u64, len: u32) -> Result<usize, FabricError> {
        let what = match right {
            Right::Read => "a read of the owner's memory",
            Right::Write => "a write of the owner's memory",
        };
        let place = self.remotes.find(key, right).ok_or(FabricError::UnknownKey { what, key })?;
        if covers(self.remotes.spans(place), offset, u64::from(len)) {
            return Ok(place);
        }
        Err(FabricError::OutOfRange { offset, len: u64::from(len), size: self.remotes.size(place) })
    }

    fn checked_read(&self, read: &Read) -> Result<Operation, FabricError> {
        let Read { id, remote, remote_offset, local: key, local_offset, len } = *read;
        local_writable(&self.locals.mappings, key, local_offset, len)?;
        let remote = self.remote(remote.0, Right::Read, remote_offset, len)?;
        Ok(Operation { id, right: Right::Read, remote, remote_offset, local: key.0 as usize, local_offset, len })
    }

    fn checked_write(&self, write: &Write) -> Result<Operation, FabricError> {
        let Write { id, remote, remote_offset, local: key, local_offset, len } = *write;
        local(&self.locals.mappings, key, local_offset, len)?;
        let remote = self.remote(remote.0, Right::Write, remote_offset, len)?;
        Ok(Operation { id, right: Right::Write, remote, remote_offset, local: key.0 as usize, local_offset, len })
    }

    /// Posts what the send queue has room for, a chain at a time.
    fn fill(&mut self) -> Result<(), FabricError> {
        while self.queue.has_unposted() && self.queue.room() > 0 {
            while self.queue_pair.chained() < CHAIN {
                let request = match self.queue.next_request(&self.remotes, &self.locals.spans) {
                    None => break,
                    Some(Ok(request)) => request,
                    Some(Err(gap)) => {
                        // Only a new table of the owner's can take away what an admitted operation was promised.
                        let what = format!("it took back {}+{} while it was being read", gap.offset, gap.len);
                        return self.broken_by(VerbsError::BadTable { what });
                    }
                };
                let mut signalled = false;
                if request.ends {
                    self.unsignalled += 1;
                    signalled = self.unsignalled >= self.signal_every;
                }
                // A send queue full of requests that nobody hears of would never have room again: the end of a chain always tells.
                if signalled {
                    self.unsignalled = 0;
                }
                self.queue_pair.chain(&request, signalled);
            }
            if let Err(error) = self.queue_pair.post() {
                return self.broken_by(error);
            }
            self.unsignalled = 0;
        }
        Ok(())
    }

    /// Takes in completions, and posts what they have made room for. Whether there were any.
    #[inline]
    fn reap(&mut self) -> Result<bool, FabricError> {
        let (mut bad, queue) = (None, &mut self.queue);
        let polled = self.queue_pair.poll(|completion| {
            let Completion { number, status, .. } = completion;
            let fine = status == status::IBV_WC_SUCCESS && bad.is_none();
            if !(fine && queue.complete_through(number)) && bad.is_none() {
                bad = Some(completion);
            }
        });
        let got = match polled {
            Ok(got) => got,
            Err(error) => return self.broken_by(error),
        };
        if let Some(bad) = bad {
            let error = self.name(bad);
            if self.queue.completed() == 0 {
                return self.broken_by(error);
            }
            // What completed before the failure did complete.
            self.failure = Some(error);
            return Ok(true);
        }
        if got == 0 {
            // Last: what has completed counts although the lane is over.
            if let Some(cause) = self.fate.cause() {
                let error = cause.error(self.id, &self.device);
                return self.broken_by(error);
            }
        } else if self.queue.has_unposted() {
            self.fill()?;
        }
        Ok(got > 0)
    }

    /// The error that a bad completion means.
    #[cold]
    fn name(&self, completion: Completion) -> FabricError {
        let Completion { number, status, vendor } = completion;
        let (lane, id) = (self.id, self.queue.id_of(number).unwrap_or(u64::MAX));
        // What is known beside a status that tells no cause.
        let cause = || {
            let told = self.fate.cause().map(|cause| cause.error(lane, &self.device));
            let down = || VerbsError::PortDown { lane, device: self.device.clone(), port: self.port }.into();
            told.or_else(|| self.port_is_down().then(down))
        };
        match status {
            status::IBV_WC_RETRY_EXC_ERR | status::IBV_WC_RESP_TIMEOUT_ERR => cause().unwrap_or_else(|| {
                let (tries, each) = (u32::from(RETRY_COUNT) + 1, acknowledgement_timeout());
                VerbsError::Unreachable { lane, tries, each, bound: UNREACHABLE_AFTER }.into()
            }),
            // SoftRoCE's word for a packet that has no way out, at once where the interface is down.
            status::IBV_WC_LOC_QP_OP_ERR => cause().unwrap_or_else(|| VerbsError::NotSent { lane, id, vendor }.into()),
            status::IBV_WC_RNR_RETRY_EXC_ERR => VerbsError::ReceiverNotReady { lane }.into(),
            status::IBV_WC_REM_ACCESS_ERR | status::IBV_WC_REM_INV_REQ_ERR | status::IBV_WC_REM_OP_ERR => {
                FabricError::Refused { lane, id, reason: RefusedReason::ByDevice }
            }
            status::IBV_WC_LOC_PROT_ERR | status::IBV_WC_LOC_LEN_ERR => {
                VerbsError::LocalProtection { lane, id, vendor }.into()
            }
            status::IBV_WC_WR_FLUSH_ERR => cause().unwrap_or_else(|| VerbsError::Flushed { lane }.into()),
            status::IBV_WC_FATAL_ERR => VerbsError::DeviceLost { device: self.device.clone() }.into(),
            status::IBV_WC_SUCCESS => FabricError::Protocol {
                lane,
                what: format!("its device completed request {number}, which is not in flight"),
            },
            _ => VerbsError::Completion { lane, id, status, name: status_name(status), vendor }.into(),
        }
    }

    /// Its event may come after the completions that it caused.
    fn port_is_down(&self) -> bool {
        self.fate.port_is_down() || device::port_is_down(&self.device, self.port)
    }

    /// Waits until `enough` says so of the queue; `false` once `deadline` has passed. Looks first, sleeps later.
    fn wait_until(&mut self, deadline: Deadline, enough: impl Fn(&Queue) -> bool) -> Result<bool, FabricError> {
        loop {
            if enough(&self.queue) {
                return Ok(true);
            }
            self.tell_failure()?;
            let begun = Instant::now();
            loop {
                if self.reap()? {
                    if enough(&self.queue) {
                        self.spin = (self.spin * 2).min(MOST_SPIN);
                        return Ok(true);
                    }
                    self.tell_failure()?;
                }
                if begun.elapsed() >= self.spin {
                    break;
                }
                std::hint::spin_loop();
            }
            self.spin = (self.spin / 2).max(LEAST_SPIN);
            if deadline.expired() {
                return Ok(false);
            }
            if self.arm_and_look()? {
                continue;
            }
            let waited = wait_for(self.readiness.as_fd(), PollFlags::IN, deadline);
            match waited {
                Ok(true) => {}
                Ok(false) => return Ok(false),
                Err(source) => {
                    return self.broken_by(FabricError::Io { doing: "waiting for a completion".to_owned(), source });
                }
            }
        }
    }

    /// A failure that was kept because something had completed before it.
    fn tell_failure(&mut self) -> Result<(), FabricError> {
        match self.failure.take() {
            Some(failure) => self.broken_by(failure),
            None => Ok(()),
        }
    }

    /// Asks for a wake-up; `true`: something has completed meanwhile.
    fn arm_and_look(&mut self) -> Result<bool, FabricError> {
        if let Err(error) = self.queue_pair.arm() {
            return self.broken_by(error);
        }
        self.reap()
    }
}

/// The name that <infiniband/verbs.h> has for a status that nothing here treats by itself.
fn status_name(status: u32) -> &'static str {
    match status {
        status::IBV_WC_LOC_EEC_OP_ERR => "LOC_EEC_OP_ERR",
        status::IBV_WC_MW_BIND_ERR => "MW_BIND_ERR",
        status::IBV_WC_BAD_RESP_ERR => "BAD_RESP_ERR",
        status::IBV_WC_LOC_ACCESS_ERR => "LOC_ACCESS_ERR",
        status::IBV_WC_LOC_RDD_VIOL_ERR => "LOC_RDD_VIOL_ERR",
        status::IBV_WC_REM_INV_RD_REQ_ERR => "REM_INV_RD_REQ_ERR",
        status::IBV_WC_REM_ABORT_ERR => "REM_ABORT_ERR",
        status::IBV_WC_INV_EECN_ERR => "INV_EECN_ERR",
        status::IBV_WC_INV_EEC_STATE_ERR => "INV_EEC_STATE_ERR",
        status::IBV_WC_GENERAL_ERR => "GENERAL_ERR",
        _ => "not in the specification",
    }
}

impl Lane for VerbsLane {
    fn id(&self) -> LaneId {
        self.id
    }

    fn window(&self) -> usize {
        self.window
    }

    fn outstanding(&self) -> usize {
        self.queue.len()
    }

    fn post_reads(&mut self, batch: &[Read]) -> Result<(), FabricError> {
        self.admit(batch.len())?;
        for read in batch {
            self.checked_read(read)?;
        }
        for read in batch {
            let operation = self.checked_read(read)?;
            self.queue.push(operation);
        }
        self.fill()
    }

    fn post_writes(&mut self, batch: &[Write]) -> Result<(), FabricError> {
        self.admit(batch.len())?;
        for write in batch {
            self.checked_write(write)?;
        }
        for write in batch {
            let operation = self.checked_write(write)?;
            self.queue.push(operation);
        }
        self.fill()
    }

    fn poll(&mut self, done: &mut [u64]) -> Result<usize, FabricError> {
        self.usable()?;
        if self.queue.completed() == 0 {
            self.tell_failure()?;
            self.reap()?;
        }
        Ok(self.queue.take(done))
    }

    fn arm(&mut self) -> Result<bool, FabricError> {
        self.usable()?;
        if self.queue.completed() > 0 || self.failure.is_some() {
            return Ok(true);
        }
        self.arm_and_look()
    }

    fn readiness(&self) -> Option<BorrowedFd<'_>> {
        Some(self.readiness.as_fd())
    }

    fn wait(&mut self, deadline: Deadline) -> Result<(), FabricError> {
        self.usable()?;
        let bound = deadline.left();
        if self.wait_until(deadline, |queue| queue.completed() > 0)? {
            return Ok(());
        }
        Err(FabricError::TimedOut { lane: self.id, bound })
    }

    fn commit(&mut self, trailer: &Write, deadline: Deadline) -> Result<(), FabricError> {
        self.usable()?;
        self.take_table();
        let write = self.checked_write(trailer)?;
        self.queue.push(write);
        if let Some(local) = self.locals.read_back {
            let len = trailer.len.min(READ_BACK_BYTES);
            let remote_offset = trailer.remote_offset + u64::from(trailer.len - len);
            self.queue.push(Operation { right: Right::Read, remote_offset, local, local_offset: 0, len, ..write });
        }
        self.fill()?;
        let bound = deadline.left();
        let done = self.wait_until(deadline, |queue| queue.completed() == queue.len());
        match done {
            Ok(true) => {
                self.queue.drop_completed();
                Ok(())
            }
            Ok(false) => self.broken_by(FabricError::TimedOut { lane: self.id, bound }),
            Err(error) => Err(error),
        }
    }
}
