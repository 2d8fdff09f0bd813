//! A connected queue pair as a lane's thread uses it: chains of work requests out, completions in, a notification before sleep.
//!
//! Rules of this room:
//! * One thread at a time; `&mut self` says so.
//! * Posting and polling go straight to the device's functions (`ctx->ops`): no allocation, no lock of ours.
//! * Whatever a work request names (regions, and so mappings) outlives the queue pair: the lane holds both.
//! * Every notification that was delivered is acknowledged before the completion queue is destroyed, which waits for that
//!   (ibv_get_cq_event(3)).

use super::burial::{Mortal, Stop};
use super::error::VerbsError;
use super::queue::Request;
use crate::fabric::exports::Right;
use belay_verbs_sys as ibv;
use std::os::fd::BorrowedFd;
use std::ptr;

/// Work requests that go out with one doorbell.
pub(super) const CHAIN: usize = 64;
/// Completions taken at once.
const REAP: usize = 32;

/// A completion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Completion {
    pub number: u64,
    pub status: u32,
    pub vendor: u32,
}

/// What stands behind a queue pair: keeps it alive, and its completion channel.
pub(super) trait Backing: Send {
    /// Polls readable once a notification has been delivered.
    fn channel(&self) -> BorrowedFd<'_>;

    /// Takes (and acknowledges) one notification; `false`: there is none.
    fn take_notification(&mut self) -> Result<bool, VerbsError>;
}

impl<T: Backing + Stop> Backing for Mortal<T> {
    fn channel(&self) -> BorrowedFd<'_> {
        (**self).channel()
    }

    fn take_notification(&mut self) -> Result<bool, VerbsError> {
        (**self).take_notification()
    }
}

/// A queue pair and its completion queue.
pub(super) struct QueuePair {
    qp: *mut ibv::ibv_qp,
    cq: *mut ibv::ibv_cq,
    max_inline: u32,
    requests: Box<[ibv::ibv_send_wr]>,
    gather: Box<[ibv::ibv_sge]>,
    chained: usize,
    completions: Box<[ibv::ibv_wc]>,
    /// A notification was asked for and no completion has been seen since.
    armed: bool,
    /// Notifications asked for whose completion has been seen: they have been or will be delivered.
    owed: u32,
    // Last: what it keeps alive is used by the fields above.
    backing: Box<dyn Backing>,
}

// SAFETY: libibverbs' objects may be used from any thread, one at a time here; the raw pointers inside the arrays point into
// those arrays or are null.
unsafe impl Send for QueuePair {}

impl QueuePair {
    /// # Safety
    /// `qp` is connected (or being connected), `cq` its send completion queue, and both stay alive as long as `backing`.
    pub(super) unsafe fn new(
        qp: *mut ibv::ibv_qp,
        cq: *mut ibv::ibv_cq,
        max_inline: u32,
        backing: Box<dyn Backing>,
    ) -> Self {
        Self {
            qp,
            cq,
            max_inline,
            requests: (0..CHAIN).map(|_| ibv::zeroed::<ibv::ibv_send_wr>()).collect(),
            gather: (0..CHAIN).map(|_| ibv::zeroed::<ibv::ibv_sge>()).collect(),
            chained: 0,
            completions: (0..REAP).map(|_| ibv::zeroed::<ibv::ibv_wc>()).collect(),
            armed: false,
            owed: 0,
            backing,
        }
    }

    /// Work requests in the chain that is being built.
    #[inline]
    pub(super) fn chained(&self) -> usize {
        self.chained
    }

    /// Adds a request to the chain, which must have room.
    #[inline]
    pub(super) fn chain(&mut self, request: &Request, signalled: bool) {
        let at = self.chained;
        self.gather[at].addr = request.local.address;
        self.gather[at].length = request.local.len;
        self.gather[at].lkey = request.local.key;
        let wr = &mut self.requests[at];
        wr.wr_id = request.number;
        wr.num_sge = 1;
        let mut flags = 0;
        if signalled {
            flags |= ibv::ibv_send_flags::IBV_SEND_SIGNALED.0;
        }
        wr.opcode = match request.right {
            Right::Read => ibv::ibv_wr_opcode::IBV_WR_RDMA_READ,
            Right::Write => {
                if request.local.len <= self.max_inline {
                    flags |= ibv::ibv_send_flags::IBV_SEND_INLINE.0;
                }
                ibv::ibv_wr_opcode::IBV_WR_RDMA_WRITE
            }
        };
        wr.send_flags = flags;
        wr.wr.rdma.remote_addr = request.remote.address;
        wr.wr.rdma.rkey = request.remote.key;
        self.chained += 1;
    }

    /// Posts the chain with one doorbell; its last request asks for a completion. An error leaves the queue pair in an unknown
    /// state: the lane is broken.
    pub(super) fn post(&mut self) -> Result<(), VerbsError> {
        let count = std::mem::take(&mut self.chained);
        if count == 0 {
            return Ok(());
        }
        self.requests[count - 1].send_flags |= ibv::ibv_send_flags::IBV_SEND_SIGNALED.0;
        let (requests, gather) = (self.requests.as_mut_ptr(), self.gather.as_mut_ptr());
        for at in 0..count {
            let next = if at + 1 < count { requests.wrapping_add(at + 1) } else { ptr::null_mut() };
            let request = requests.wrapping_add(at);
            // SAFETY: `at` is below the array's length.
            unsafe { (*request).next = next };
            // SAFETY: as above.
            unsafe { (*request).sg_list = gather.wrapping_add(at) };
        }
        let mut bad = ptr::null_mut();
        // SAFETY: the queue pair is alive (backing); the chain is `count` requests, each with one gather entry; regions and mappings
        // that they name are held by the lane, beyond the queue pair.
        let errno = unsafe { ibv::ibv_post_send(self.qp, requests, &raw mut bad) };
        if errno == 0 {
            return Ok(());
        }
        Err(VerbsError::returned("ibv_post_send", format!("posting {count} work requests"), errno.abs()))
    }

    /// Takes completions, handing each to `to`; their number.
    #[inline]
    pub(super) fn poll(&mut self, mut to: impl FnMut(Completion)) -> Result<usize, VerbsError> {
        // SAFETY: the completion queue is alive (backing), the array has room for REAP entries.
        let got = unsafe { ibv::ibv_poll_cq(self.cq, REAP as i32, self.completions.as_mut_ptr()) };
        let Ok(got) = usize::try_from(got) else {
            return Err(VerbsError::returned("ibv_poll_cq", "taking completions", got.unsigned_abs().cast_signed()));
        };
        if got > 0 && std::mem::take(&mut self.armed) {
            self.owed = self.owed.saturating_add(1);
        }
        for wc in &self.completions[..got.min(REAP)] {
            to(Completion { number: wc.wr_id, status: wc.status, vendor: wc.vendor_err });
        }
        Ok(got)
    }

    /// Asks for a notification at the next completion. What completed before is not told: poll once more.
    pub(super) fn arm(&mut self) -> Result<(), VerbsError> {
        // One that was asked for earlier would wake for nothing; one that is still on its way will, once.
        while self.owed > 0 && self.backing.take_notification()? {
            self.owed -= 1;
        }
        if self.armed {
            return Ok(());
        }
        // SAFETY: the completion queue is alive (backing).
        let errno = unsafe { ibv::ibv_req_notify_cq(self.cq, 0) };
        if errno != 0 {
            return Err(VerbsError::returned("ibv_req_notify_cq", "asking for a notification", errno.abs()));
        }
        self.armed = true;
        Ok(())
    }

    /// Polls readable once a notification has been delivered.
    pub(super) fn channel(&self) -> BorrowedFd<'_> {
        self.backing.channel()
    }
}
