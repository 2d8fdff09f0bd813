//! One end of a lane: a queue pair on its identifier, with its completion queue, and the order in which they are made and unmade.
//!
//! The initiator's end posts and completes; the owner's only answers, by its device alone, so that its queues are as small as the
//! device allows.

use super::address::{Gid, Host, Local};
use super::burial::Stop;
use super::cm::Id;
use super::device::Pd;
use super::error::VerbsError;
use super::queue_pair::Backing;
use crate::fabric::FabricDetails;
use belay_verbs_sys as ibv;
use std::io;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};
use std::sync::Arc;

/// Longest WRITE whose data goes along with the request, if the device has room for it there: trailers and heartbeats.
const INLINE_BYTES: u32 = 128;

/// A queue pair with all that belongs to it.
pub(super) struct Endpoint {
    id: Id,
    cq: NonNull<ibv::ibv_cq>,
    channel: Option<NonNull<ibv::ibv_comp_channel>>,
    /// What the device gave, which may be less or more than was asked for.
    max_inline: u32,
    pd: Arc<Pd>,
}

// SAFETY: libibverbs' objects may be used from any thread.
unsafe impl Send for Endpoint {}

/// What a queue pair is for.
pub(super) enum Use {
    /// Posts up to so many requests.
    Initiate { depth: u32 },
    /// Answers.
    Respond,
}

impl Endpoint {
    /// Makes a queue pair on `id`, which has a device (the domain's).
    pub(super) fn new(id: Id, pd: &Arc<Pd>, what_for: &Use) -> Result<Self, VerbsError> {
        let context = pd.context();
        if id.device().map(NonNull::as_ptr) != Some(context.as_ptr()) {
            return Err(VerbsError::Call {
                call: "rdma_resolve_addr",
                doing: format!("looking for the way by {}: another device is in it", context.name()),
                source: io::Error::from_raw_os_error(libc::EXDEV),
            });
        }
        let (depth, channel) = match what_for {
            Use::Respond => (1, None),
            Use::Initiate { depth } => {
                // SAFETY: the context is open.
                let channel = unsafe { ibv::ibv_create_comp_channel(context.as_ptr()) };
                let channel = NonNull::new(channel)
                    .ok_or_else(|| VerbsError::last("ibv_create_comp_channel", "making a completion channel"))?;
                (*depth, Some(channel))
            }
        };
        let channel_c = channel.map_or(ptr::null_mut(), NonNull::as_ptr);
        let entries = i32::try_from(depth).unwrap_or(i32::MAX);
        // SAFETY: the context is open, the channel null or just made, vector 0 always exists.
        let cq = unsafe { ibv::ibv_create_cq(context.as_ptr(), entries, ptr::null_mut(), channel_c, 0) };
        let Some(cq) = NonNull::new(cq) else {
            let error = VerbsError::last("ibv_create_cq", format!("making a completion queue of {depth} entries"));
            if let Some(channel) = channel {
                // SAFETY: just made, and no completion queue uses it.
                unsafe { ibv::ibv_destroy_comp_channel(channel.as_ptr()) };
            }
            return Err(error);
        };
        // From here on dropping it undoes everything.
        let mut endpoint = Self { id, cq, channel, max_inline: 0, pd: Arc::clone(pd) };
        if endpoint.channel.is_some() {
            rustix::io::ioctl_fionbio(endpoint.channel(), true).map_err(|error| {
                VerbsError::returned("ioctl", "making a completion channel non-blocking", error.raw_os_error())
            })?;
        }
        endpoint.create_queue_pair(depth)?;
        Ok(endpoint)
    }

    /// With room for inline data, or without where the device takes none.
    fn create_queue_pair(&mut self, depth: u32) -> Result<(), VerbsError> {
        let inline = if self.channel.is_some() { INLINE_BYTES } else { 0 };
        match self.try_queue_pair(depth, inline) {
            Err(_) if inline > 0 => self.try_queue_pair(depth, 0),
            done => done,
        }
    }

    fn try_queue_pair(&mut self, depth: u32, inline: u32) -> Result<(), VerbsError> {
        let mut attributes: ibv::ibv_qp_init_attr = ibv::zeroed();
        attributes.send_cq = self.cq.as_ptr();
        attributes.recv_cq = self.cq.as_ptr();
        attributes.qp_type = ibv::ibv_qp_type::IBV_QPT_RC;
        attributes.cap.max_send_wr = depth;
        attributes.cap.max_recv_wr = 1;
        attributes.cap.max_send_sge = 1;
        attributes.cap.max_recv_sge = 1;
        attributes.cap.max_inline_data = inline;
        let pd = self.pd.as_ptr();
        // SAFETY: domain and completion queue are this endpoint's, which destroys the queue pair before them.
        unsafe { self.id.create_queue_pair(pd, &mut attributes) }?;
        self.max_inline = if inline > 0 { attributes.cap.max_inline_data } else { 0 };
        Ok(())
    }

    pub(super) fn id(&self) -> &Id {
        &self.id
    }

    pub(super) fn id_mut(&mut self) -> &mut Id {
        &mut self.id
    }

    pub(super) fn max_inline(&self) -> u32 {
        self.max_inline
    }

    /// Queue pair and completion queue, for who posts and polls.
    pub(super) fn as_ptrs(&self) -> (*mut ibv::ibv_qp, *mut ibv::ibv_cq) {
        (self.id.queue_pair(), self.cq.as_ptr())
    }

    /// The queue pair's number, by which the peer knows it; zero on iWARP, where rdma_cm does not tell it.
    pub(super) fn number(&self) -> u32 {
        let qp = self.id.queue_pair();
        if qp.is_null() || self.pd.context().is_iwarp() {
            return 0;
        }
        // SAFETY: not null, so it is this endpoint's queue pair, which is alive.
        unsafe { (*qp).qp_num }
    }

    /// What the connection got, for the operator; an error if it is another GID than was asked for.
    pub(super) fn details(&self, host: &Host, local: &Local, port: u16) -> Result<FabricDetails, VerbsError> {
        let mut attributes: ibv::ibv_qp_attr = ibv::zeroed();
        let mut init: ibv::ibv_qp_init_attr = ibv::zeroed();
        let wanted = ibv::ibv_qp_attr_mask::IBV_QP_AV | ibv::ibv_qp_attr_mask::IBV_QP_PATH_MTU;
        let mask = wanted.0.cast_signed();
        // SAFETY: the queue pair is alive, both structures may be written.
        let errno = unsafe { ibv::ibv_query_qp(self.id.queue_pair(), &raw mut attributes, mask, &raw mut init) };
        if errno != 0 {
            return Err(VerbsError::returned("ibv_query_qp", "asking for the path of a connection", errno.abs()));
        }
        let context = self.pd.context();
        let (device, number) = (context.name(), context.port());
        let index = u16::from(attributes.ah_attr.grh.sgid_index);
        let gid = (attributes.ah_attr.is_global != 0 && !context.is_iwarp()).then(|| host.gid(device, number, index));
        let gid = gid.flatten();
        let link = host.link(device, number, gid.as_ref());
        if let (Some(asked), Some(got)) = (local.gid_index, &gid)
            && asked != got.index
        {
            return Err(VerbsError::OtherGid { asked, got: got.index, got_type: link });
        }
        let text = |gid: &Gid| gid.gid.to_ipv4_mapped().map_or(gid.gid.to_string(), |v4| format!("::ffff:{v4}"));
        Ok(FabricDetails {
            device: device.to_owned(),
            port: number,
            link,
            gid_index: gid.as_ref().and_then(|gid| u8::try_from(gid.index).ok()),
            gid: gid.as_ref().map(text),
            address: SocketAddr::new(local.address.ip(), port).to_string(),
            mtu_bytes: 128 << attributes.path_mtu.min(5),
            read_depth: context.limits().max_initiator_depth.min(context.limits().max_responder_resources),
        })
    }
}

impl Backing for Endpoint {
    fn channel(&self) -> BorrowedFd<'_> {
        let channel = self.channel.expect("only an initiator's end is waited for");
        // SAFETY: the channel is alive until this endpoint is dropped.
        let fd = unsafe { (*channel.as_ptr()).fd };
        // SAFETY: open as long as the channel.
        unsafe { BorrowedFd::borrow_raw(fd) }
    }

    fn take_notification(&mut self) -> Result<bool, VerbsError> {
        let Some(channel) = self.channel else { return Ok(false) };
        let (mut cq, mut context) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: the channel is alive, both places may be written.
        if unsafe { ibv::ibv_get_cq_event(channel.as_ptr(), &raw mut cq, &raw mut context) } != 0 {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(false),
                _ => Err(VerbsError::Call {
                    call: "ibv_get_cq_event",
                    doing: "taking a completion's notification".to_owned(),
                    source: error,
                }),
            };
        }
        // SAFETY: one event of this completion queue was taken, and this acknowledges it, so that destroying never waits.
        unsafe { ibv::ibv_ack_cq_events(cq, 1) };
        Ok(true)
    }
}

impl Stop for Endpoint {
    fn stop(&mut self) -> bool {
        let qp = self.id.queue_pair();
        if qp.is_null() {
            return true;
        }
        let mut attributes: ibv::ibv_qp_attr = ibv::zeroed();
        attributes.qp_state = ibv::ibv_qp_state::IBV_QPS_ERR;
        let mask = ibv::ibv_qp_attr_mask::IBV_QP_STATE.0.cast_signed();
        // SAFETY: the queue pair is alive, the attributes say its state and nothing else.
        unsafe { ibv::ibv_modify_qp(qp, &raw mut attributes, mask) == 0 }
    }
}

/// Gives it back, which may take the kernel long: not on a thread that somebody waits for (see [`super::burial`]).
impl Drop for Endpoint {
    fn drop(&mut self) {
        if !self.id.queue_pair().is_null() {
            self.id.disconnect();
            self.id.destroy_queue_pair();
        }
        // SAFETY: the queue pair is destroyed, every event acknowledged.
        unsafe { ibv::ibv_destroy_cq(self.cq.as_ptr()) };
        if let Some(channel) = self.channel {
            // SAFETY: its only completion queue is destroyed.
            unsafe { ibv::ibv_destroy_comp_channel(channel.as_ptr()) };
        }
    }
}
