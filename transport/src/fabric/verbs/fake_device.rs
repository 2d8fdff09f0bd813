//! A pretended device behind `ctx->ops`, for tests on hosts without RDMA: it executes READs and WRITEs by memcpy, in order.
//!
//! It is as strict as hardware: a send queue's slots come back only with a polled completion, a key reaches only its own region and
//! right, a completion queue that overruns is a panic, and after the first error everything is flushed.

use super::error::VerbsError;
use super::queue_pair::{Backing, QueuePair};
use crate::fabric::exports::Right;
use crate::region::Mapping;
use belay_verbs_sys as ibv;
use ibv::{ibv_wc_status as status, ibv_wr_opcode as opcode};
use rustix::event::{EventfdFlags, eventfd};
use std::collections::VecDeque;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};

/// Memory that a key leads to.
#[derive(Clone)]
pub(super) struct FakeRegion {
    pub key: u32,
    pub address: u64,
    pub len: u64,
    pub mapping: Arc<Mapping>,
    /// Of the mapping.
    pub offset: u64,
    /// What the peer may do there; `None` for local memory.
    pub right: Option<Right>,
}

/// A work request as it was posted.
#[derive(Debug, Clone)]
pub(super) struct Posted {
    pub number: u64,
    pub opcode: u32,
    pub signalled: bool,
    /// The data of an inline request.
    pub inline: Option<Vec<u8>>,
    local: (u64, u32, u32),
    remote: (u64, u32),
}

#[derive(Default)]
pub(super) struct State {
    pub regions: Vec<FakeRegion>,
    /// One list a doorbell.
    pub doorbells: Vec<Vec<Posted>>,
    pending: VecDeque<Posted>,
    completions: VecDeque<(u64, u32)>,
    /// Requests that may be executed; `None` for all.
    pub budget: Option<usize>,
    /// The request that fails, and how.
    pub fail: Option<(u64, u32)>,
    /// A WRITE completes before it is placed, and a later READ places it (iWARP).
    pub lazy_writes: bool,
    unplaced: Vec<Posted>,
    failed: bool,
    depth: u64,
    posted: u64,
    freed: u64,
    armed: bool,
    pub notifications: usize,
}

pub(super) struct FakeDevice {
    // Boxed, because pointers to them are handed out.
    context: Box<MaybeUninit<ibv::ibv_context>>,
    qp: Box<MaybeUninit<ibv::ibv_qp>>,
    cq: Box<MaybeUninit<ibv::ibv_cq>>,
    state: Box<Mutex<State>>,
    channel: OwnedFd,
}

// SAFETY: everything that changes is behind the mutex.
unsafe impl Send for FakeDevice {}
// SAFETY: as above.
unsafe impl Sync for FakeDevice {}

/// Keeps the device while a queue pair uses it.
struct Handle(Arc<FakeDevice>);

impl Backing for Handle {
    fn channel(&self) -> BorrowedFd<'_> {
        self.0.channel.as_fd()
    }

    fn take_notification(&mut self) -> Result<bool, VerbsError> {
        let mut state = self.0.state();
        if state.notifications == 0 {
            return Ok(false);
        }
        state.notifications -= 1;
        if state.notifications == 0 {
            rustix::io::read(&self.0.channel, &mut [0; 8]).expect("it was readable");
        }
        Ok(true)
    }
}

impl FakeDevice {
    pub(super) fn new(depth: u32, regions: Vec<FakeRegion>) -> Arc<Self> {
        let channel = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("eventfd");
        let state = State { regions, depth: u64::from(depth), ..State::default() };
        let mut device = Self {
            context: Box::new(MaybeUninit::zeroed()),
            qp: Box::new(MaybeUninit::zeroed()),
            cq: Box::new(MaybeUninit::zeroed()),
            state: Box::new(Mutex::new(state)),
            channel,
        };
        let this: *const Mutex<State> = &raw const *device.state;
        let context = device.context.as_mut_ptr();
        let (qp, cq) = (device.qp.as_mut_ptr(), device.cq.as_mut_ptr());
        // SAFETY: zeroed memory of the structure's size; plain fields are written through a pointer to it.
        unsafe { (*context).ops.post_send = Some(post_send) };
        // SAFETY: as above.
        unsafe { (*context).ops.poll_cq = Some(poll_cq) };
        // SAFETY: as above.
        unsafe { (*context).ops.req_notify_cq = Some(req_notify_cq) };
        // SAFETY: as above.
        unsafe { (*qp).context = context };
        // SAFETY: as above.
        unsafe { (*qp).qp_context = this.cast_mut().cast() };
        // SAFETY: as above.
        unsafe { (*cq).context = context };
        // SAFETY: as above.
        unsafe { (*cq).cq_context = this.cast_mut().cast() };
        Arc::new(device)
    }

    pub(super) fn queue_pair(self: &Arc<Self>, max_inline: u32) -> QueuePair {
        let (qp, cq) = (self.qp.as_ptr().cast_mut(), self.cq.as_ptr().cast_mut());
        // SAFETY: both live as long as the device, which the handle keeps.
        unsafe { QueuePair::new(qp, cq, max_inline, Box::new(Handle(Arc::clone(self)))) }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic in the device")
    }

    /// Lets `count` more requests be executed (all of them without a number).
    pub(super) fn release(&self, count: Option<usize>) {
        let mut state = self.state();
        state.budget = match (state.budget, count) {
            (Some(had), Some(more)) => Some(had + more),
            _ => None,
        };
        let before = state.completions.len();
        state.run();
        // A notification tells of completions that come after it was asked for.
        if state.completions.len() > before && std::mem::take(&mut state.armed) {
            self.notify(&mut state);
        }
    }

    /// A completion for a request that is not in flight.
    pub(super) fn complete_falsely(&self, number: u64) {
        self.state().completions.push_back((number, status::IBV_WC_SUCCESS));
    }

    fn notify(&self, state: &mut State) {
        state.notifications += 1;
        rustix::io::write(&self.channel, &1u64.to_ne_bytes()).expect("room for a count");
    }
}

impl State {
    /// The region a key leads to, if all of the range is in it.
    fn region(&self, key: u32, address: u64, len: u32) -> Option<&FakeRegion> {
        let region = self.regions.iter().find(|region| region.key == key)?;
        let skip = address.checked_sub(region.address)?;
        (skip + u64::from(len) <= region.len).then_some(region)
    }

    fn copy(&self, posted: &Posted) -> u32 {
        let (address, len, lkey) = posted.local;
        let (remote, rkey) = posted.remote;
        let Some(there) = self.region(rkey, remote, len) else { return status::IBV_WC_REM_ACCESS_ERR };
        let right = if posted.opcode == opcode::IBV_WR_RDMA_READ { Right::Read } else { Right::Write };
        // A ring on iWARP may be read back.
        if there.right != Some(right) && !(self.lazy_writes && there.right == Some(Right::Write)) {
            return status::IBV_WC_REM_ACCESS_ERR;
        }
        let there_at = (there.offset + remote - there.address) as usize;
        if let Some(data) = &posted.inline {
            there.mapping.write(there_at, data);
            return status::IBV_WC_SUCCESS;
        }
        let Some(here) = self.region(lkey, address, len).filter(|region| region.right.is_none()) else {
            return status::IBV_WC_LOC_PROT_ERR;
        };
        let here_at = (here.offset + address - here.address) as usize;
        match right {
            Right::Read => here.mapping.copy_from(here_at, &there.mapping, there_at, len as usize),
            Right::Write => there.mapping.copy_from(there_at, &here.mapping, here_at, len as usize),
        }
        status::IBV_WC_SUCCESS
    }

    fn run(&mut self) {
        while self.budget != Some(0) {
            let Some(posted) = self.pending.pop_front() else { return };
            if let Some(budget) = &mut self.budget {
                *budget -= 1;
            }
            let outcome = match self.fail {
                _ if self.failed => status::IBV_WC_WR_FLUSH_ERR,
                Some((number, how)) if number == posted.number => how,
                _ if self.lazy_writes && posted.opcode == opcode::IBV_WR_RDMA_WRITE => {
                    self.unplaced.push(posted.clone());
                    status::IBV_WC_SUCCESS
                }
                _ => {
                    for write in std::mem::take(&mut self.unplaced) {
                        assert_eq!(self.copy(&write), status::IBV_WC_SUCCESS, "a lazy write fails");
                    }
                    self.copy(&posted)
                }
            };
            self.failed |= outcome != status::IBV_WC_SUCCESS;
            // Errors complete whether they were asked to or not.
            if posted.signalled || outcome != status::IBV_WC_SUCCESS {
                self.completions.push_back((posted.number, outcome));
                assert!(self.completions.len() as u64 <= self.depth, "the completion queue overran");
            }
        }
    }
}

fn state_of(context: *mut std::ffi::c_void) -> MutexGuard<'static, State> {
    // SAFETY: set by `FakeDevice::new` to its state, which lives as long as whatever is called with it.
    let state: &'static Mutex<State> = unsafe { &*context.cast() };
    state.lock().expect("no panic in the device")
}

unsafe extern "C" fn post_send(
    qp: *mut ibv::ibv_qp,
    wr: *mut ibv::ibv_send_wr,
    bad: *mut *mut ibv::ibv_send_wr,
) -> std::ffi::c_int {
    // SAFETY: the fake's own queue pair.
    let mut state = state_of(unsafe { (*qp).qp_context });
    let (mut next, mut doorbell) = (wr, Vec::new());
    while !next.is_null() {
        // SAFETY: an element of the caller's list.
        let wr = unsafe { next.read() };
        if state.posted - state.freed == state.depth {
            // SAFETY: the caller's place for it.
            unsafe { *bad = next };
            return libc::ENOMEM;
        }
        assert_eq!(wr.num_sge, 1);
        // SAFETY: it says that it has one entry.
        let sge = unsafe { wr.sg_list.read() };
        // SAFETY: READs and WRITEs carry this.
        let rdma = unsafe { wr.wr.rdma };
        let has = |flag: ibv::ibv_send_flags| wr.send_flags & flag.0 != 0;
        let inline = has(ibv::ibv_send_flags::IBV_SEND_INLINE).then(|| {
            assert_eq!(wr.opcode, opcode::IBV_WR_RDMA_WRITE, "only WRITEs can be inline");
            let region = state.regions.iter().find(|region| {
                region.right.is_none() && (region.address..region.address + region.len).contains(&sge.addr)
            });
            let region = region.expect("inline data lies in local memory");
            let mut data = vec![0; sge.length as usize];
            region.mapping.read((region.offset + sge.addr - region.address) as usize, &mut data);
            data
        });
        let posted = Posted {
            number: wr.wr_id,
            opcode: wr.opcode,
            signalled: has(ibv::ibv_send_flags::IBV_SEND_SIGNALED),
            inline,
            local: (sge.addr, sge.length, sge.lkey),
            remote: (rdma.remote_addr, rdma.rkey),
        };
        doorbell.push(posted.clone());
        state.pending.push_back(posted);
        state.posted += 1;
        next = wr.next;
    }
    state.doorbells.push(doorbell);
    state.run();
    0
}

unsafe extern "C" fn poll_cq(cq: *mut ibv::ibv_cq, entries: std::ffi::c_int, wc: *mut ibv::ibv_wc) -> std::ffi::c_int {
    // SAFETY: the fake's own completion queue.
    let mut state = state_of(unsafe { (*cq).cq_context });
    let mut count = 0;
    while count < entries {
        let Some((number, status)) = state.completions.pop_front() else { break };
        // Numbers count from zero, so a completion frees every slot up to its own.
        state.freed = number + 1;
        let mut one: ibv::ibv_wc = ibv::zeroed();
        (one.wr_id, one.status, one.vendor_err) = (number, status, 0x51);
        // SAFETY: the caller has room for `entries`.
        unsafe { wc.wrapping_add(count as usize).write(one) };
        count += 1;
    }
    count
}

unsafe extern "C" fn req_notify_cq(cq: *mut ibv::ibv_cq, solicited: std::ffi::c_int) -> std::ffi::c_int {
    assert_eq!(solicited, 0);
    // SAFETY: the fake's own completion queue.
    state_of(unsafe { (*cq).cq_context }).armed = true;
    0
}
