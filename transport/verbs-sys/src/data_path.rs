//! The data path: posting and polling go straight to the device's own functions in `ctx->ops`, with no library between.

#[cfg(feature = "rdma-sys")]
pub use rdma_sys::{ibv_poll_cq, ibv_post_recv, ibv_post_send, ibv_req_notify_cq};

#[cfg(not(feature = "rdma-sys"))]
mod ours {
    use crate::types::*;
    use libc::{EOPNOTSUPP, c_int};

    /// Posts a list of work requests to the send queue with one doorbell; 0 or an errno, and then `bad_wr` points to the
    /// first request that was not posted. Data of an inline request may be reused at once.
    ///
    /// # Safety
    /// `qp` is alive; `wr` is a list whose elements, gather lists and memory regions are valid; the memory of what is not inline
    /// stays so until its completion; `bad_wr` is valid for writing.
    #[inline]
    pub unsafe fn ibv_post_send(qp: *mut ibv_qp, wr: *mut ibv_send_wr, bad_wr: *mut *mut ibv_send_wr) -> c_int {
        // SAFETY: the caller says that the queue pair is alive.
        let context = unsafe { (*qp).context };
        // SAFETY: a context outlives its queue pairs.
        let post_send = unsafe { (*context).ops.post_send };
        let Some(post_send) = post_send else { return EOPNOTSUPP };
        // SAFETY: the caller's own.
        unsafe { post_send(qp, wr, bad_wr) }
    }

    /// Posts a list of work requests to the receive queue; 0 or an errno, and then `bad_wr` points to the first request that
    /// was not posted.
    ///
    /// # Safety
    /// As [`ibv_post_send`], for memory that the device writes.
    #[inline]
    pub unsafe fn ibv_post_recv(qp: *mut ibv_qp, wr: *mut ibv_recv_wr, bad_wr: *mut *mut ibv_recv_wr) -> c_int {
        // SAFETY: the caller says that the queue pair is alive.
        let context = unsafe { (*qp).context };
        // SAFETY: a context outlives its queue pairs.
        let post_recv = unsafe { (*context).ops.post_recv };
        let Some(post_recv) = post_recv else { return EOPNOTSUPP };
        // SAFETY: the caller's own.
        unsafe { post_recv(qp, wr, bad_wr) }
    }

    /// Takes up to `num_entries` completions: their number, or negative when the queue is in error. Fewer than asked for means
    /// that the queue was emptied.
    ///
    /// # Safety
    /// `cq` is alive; `wc` has room for `num_entries`.
    #[inline]
    pub unsafe fn ibv_poll_cq(cq: *mut ibv_cq, num_entries: c_int, wc: *mut ibv_wc) -> c_int {
        // SAFETY: the caller says that the completion queue is alive.
        let context = unsafe { (*cq).context };
        // SAFETY: a context outlives its completion queues.
        let poll_cq = unsafe { (*context).ops.poll_cq };
        let Some(poll_cq) = poll_cq else { return -EOPNOTSUPP };
        // SAFETY: the caller's own.
        unsafe { poll_cq(cq, num_entries, wc) }
    }

    /// Asks for one event on the queue's completion channel at its next completion (the next solicited one or error, if
    /// `solicited_only` is not 0); 0 or an errno. What completed before is not told: poll once more after arming.
    ///
    /// # Safety
    /// `cq` is alive.
    #[inline]
    pub unsafe fn ibv_req_notify_cq(cq: *mut ibv_cq, solicited_only: c_int) -> c_int {
        // SAFETY: the caller says that the completion queue is alive.
        let context = unsafe { (*cq).context };
        // SAFETY: a context outlives its completion queues.
        let req_notify_cq = unsafe { (*context).ops.req_notify_cq };
        let Some(req_notify_cq) = req_notify_cq else { return EOPNOTSUPP };
        // SAFETY: the caller's own.
        unsafe { req_notify_cq(cq, solicited_only) }
    }
}
#[cfg(not(feature = "rdma-sys"))]
pub use ours::*;
