//! rdma_cm made safe: event channels that never block, identifiers that are destroyed, and events copied out and acknowledged.
//!
//! Rules of this room (rdma_cm(7), rdma_get_cm_event(3), rdma_destroy_id(3)):
//! * An identifier belongs to one event channel and dies before it: [`Id`] holds its [`EventChannel`].
//! * `rdma_destroy_id` waits until every event of that identifier has been acknowledged: [`EventChannel::next`] acknowledges before
//!   it returns, so nobody ever waits for longer than that.
//! * An identifier's queue pair is destroyed before it: [`Id::destroy_queue_pair`], at the latest when it is dropped.
//! * `rdma_get_cm_event` itself moves a connecting queue pair to ready: only one thread reads a channel while its identifier connects.
//! * Destroying an identifier cancels whatever it waits for, so every wait can have a bound of ours.

use super::error::VerbsError;
use crate::deadline::Deadline;
use crate::session::wait_for;
use belay_verbs_sys as ibv;
use ibv::rdma_cm_event_type as kind;
use rustix::event::PollFlags;
use std::ffi::CStr;
use std::io;
use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;

/// Most private data that an event can carry (RDMA_MAX_PRIVATE_DATA).
const MAX_PRIVATE_DATA: usize = 256;

/// Where events of identifiers arrive.
pub(super) struct EventChannel(NonNull<ibv::rdma_event_channel>);

// SAFETY: librdmacm's functions may be called from any thread; the channel is a descriptor and nothing else.
unsafe impl Send for EventChannel {}
// SAFETY: as above; reading events from two threads gives each its own events.
unsafe impl Sync for EventChannel {}

/// What came with a connection event.
#[derive(Debug, Clone, Default)]
pub(super) struct ConnectionData {
    pub private_data: Vec<u8>,
    pub responder_resources: u8,
    pub initiator_depth: u8,
    pub queue_pair: u32,
}

/// An event, copied.
pub(super) struct CmEvent {
    /// One of `rdma_cm_event_type`.
    pub kind: u32,
    pub status: i32,
    /// Whose event it is: compare with [`Id::token`].
    pub of: usize,
    pub data: ConnectionData,
    /// The identifier that a connect request has made.
    pub new: Option<Id>,
}

impl CmEvent {
    /// The event's name, for people.
    pub(super) fn name(&self) -> String {
        // SAFETY: takes any number and gives a string that lives for ever.
        let name = unsafe { ibv::rdma_event_str(self.kind) };
        // SAFETY: librdmacm's strings are constants.
        unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
    }
}

impl EventChannel {
    pub(super) fn new() -> Result<Arc<Self>, VerbsError> {
        ibv::load()?;
        // SAFETY: the library is loaded; no preconditions.
        let channel = unsafe { ibv::rdma_create_event_channel() };
        let channel = NonNull::new(channel)
            .ok_or_else(|| VerbsError::last("rdma_create_event_channel", "opening the connection manager"))?;
        let channel = Self(channel);
        rustix::io::ioctl_fionbio(&channel, true).map_err(|error| {
            VerbsError::returned("ioctl", "making an event channel non-blocking", error.raw_os_error())
        })?;
        Ok(Arc::new(channel))
    }

    /// The next event, if there is one now.
    pub(super) fn next(self: &Arc<Self>) -> Result<Option<CmEvent>, VerbsError> {
        let mut event = ptr::null_mut();
        // SAFETY: the channel is alive, `event` may be written.
        let got = unsafe { ibv::rdma_get_cm_event(self.0.as_ptr(), &raw mut event) };
        if got != 0 {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
                _ => Err(VerbsError::Call {
                    call: "rdma_get_cm_event",
                    doing: "reading a connection event".to_owned(),
                    source: error,
                }),
            };
        }
        // SAFETY: the call succeeded, so `event` is a whole event until it is acknowledged.
        let seen = unsafe { event.read() };
        // SAFETY: every connection event of a connected service carries `conn`, others have zeroes there.
        let conn = unsafe { seen.param.conn };
        let mut private_data = Vec::new();
        let len = usize::from(conn.private_data_len).min(MAX_PRIVATE_DATA);
        if !conn.private_data.is_null() && len > 0 {
            // SAFETY: librdmacm points it at the event's own copy, which has at least that length until the acknowledgement.
            private_data.extend_from_slice(unsafe { std::slice::from_raw_parts(conn.private_data.cast::<u8>(), len) });
        }
        let new = (seen.event == kind::RDMA_CM_EVENT_CONNECT_REQUEST)
            .then(|| NonNull::new(seen.id))
            .flatten()
            .map(|id| Id { id, _channel: Arc::clone(self) });
        // SAFETY: given by rdma_get_cm_event and not acknowledged yet; everything needed has been copied.
        unsafe { ibv::rdma_ack_cm_event(event) };
        Ok(Some(CmEvent {
            kind: seen.event,
            status: seen.status,
            of: seen.id as usize,
            data: ConnectionData {
                private_data,
                responder_resources: conn.responder_resources,
                initiator_depth: conn.initiator_depth,
                queue_pair: conn.qp_num,
            },
            new,
        }))
    }

    /// Waits for an event; `None` once `deadline` has passed.
    pub(super) fn wait(self: &Arc<Self>, deadline: Deadline) -> Result<Option<CmEvent>, VerbsError> {
        loop {
            if let Some(event) = self.next()? {
                return Ok(Some(event));
            }
            let ready = wait_for(self.as_fd(), PollFlags::IN, deadline).map_err(|source| VerbsError::Call {
                call: "poll",
                doing: "waiting for a connection event".to_owned(),
                source,
            })?;
            if !ready {
                return Ok(None);
            }
        }
    }
}

impl AsFd for EventChannel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel is alive for as long as `self`.
        let fd = unsafe { (*self.0.as_ptr()).fd };
        // SAFETY: the channel's descriptor is open until the channel is destroyed, which `self` outlives.
        unsafe { BorrowedFd::borrow_raw(fd) }
    }
}

impl Drop for EventChannel {
    fn drop(&mut self) {
        // SAFETY: every identifier on it holds it, so none is left.
        unsafe { ibv::rdma_destroy_event_channel(self.0.as_ptr()) };
    }
}

/// A connection identifier, with or without a queue pair.
pub(super) struct Id {
    id: NonNull<ibv::rdma_cm_id>,
    _channel: Arc<EventChannel>,
}

// SAFETY: librdmacm's functions may be called from any thread; `&mut self` or ownership orders the calls that change it.
unsafe impl Send for Id {}

/// What a side says when it connects or accepts.
pub(super) struct Terms<'a> {
    pub private_data: &'a [u8],
    /// READs of the peer's that this side answers at once.
    pub responder_resources: u8,
    /// READs of this side's that may be outstanding.
    pub initiator_depth: u8,
}

impl Terms<'_> {
    fn parameters(&self) -> ibv::rdma_conn_param {
        let mut parameters: ibv::rdma_conn_param = ibv::zeroed();
        parameters.private_data = self.private_data.as_ptr().cast();
        parameters.private_data_len = u8::try_from(self.private_data.len()).expect("proofs are short");
        parameters.responder_resources = self.responder_resources;
        parameters.initiator_depth = self.initiator_depth;
        parameters.flow_control = 1;
        parameters.retry_count = super::RETRY_COUNT;
        parameters.rnr_retry_count = super::RNR_RETRY_COUNT;
        parameters
    }
}

impl Id {
    pub(super) fn new(channel: &Arc<EventChannel>) -> Result<Self, VerbsError> {
        let mut id = ptr::null_mut();
        let ps = ibv::rdma_port_space::RDMA_PS_TCP;
        // SAFETY: the channel is alive, `id` may be written, the context is not used.
        let made = unsafe { ibv::rdma_create_id(channel.0.as_ptr(), &raw mut id, ptr::null_mut(), ps) };
        match NonNull::new(id) {
            Some(id) if made == 0 => Ok(Self { id, _channel: Arc::clone(channel) }),
            _ => Err(VerbsError::last("rdma_create_id", "making a connection identifier")),
        }
    }

    /// What its events carry in [`CmEvent::of`].
    pub(super) fn token(&self) -> usize {
        self.id.as_ptr() as usize
    }

    /// The device behind it, once it is bound or resolved. Shared by all identifiers of one process on that device, and open
    /// while one of them lives.
    pub(super) fn device(&self) -> Option<NonNull<ibv::ibv_context>> {
        // SAFETY: the identifier is alive.
        NonNull::new(unsafe { (*self.id.as_ptr()).verbs })
    }

    /// The device's port it is bound to.
    pub(super) fn port(&self) -> u8 {
        // SAFETY: the identifier is alive.
        unsafe { (*self.id.as_ptr()).port_num }
    }

    /// Its queue pair, null without one.
    pub(super) fn queue_pair(&self) -> *mut ibv::ibv_qp {
        // SAFETY: the identifier is alive.
        unsafe { (*self.id.as_ptr()).qp }
    }

    /// Binds to a local address, and with it to a device.
    pub(super) fn bind(&mut self, address: SocketAddr) -> Result<(), VerbsError> {
        let mut address_c = storage(address);
        // SAFETY: the identifier is alive; the storage holds an address of its family's length.
        let bound = unsafe { ibv::rdma_bind_addr(self.id.as_ptr(), (&raw mut address_c).cast()) };
        self.done(bound, "rdma_bind_addr", || format!("binding to {address}"))
    }

    /// Listens; gives the port number.
    pub(super) fn listen(&mut self, backlog: i32) -> Result<u16, VerbsError> {
        // SAFETY: the identifier is alive.
        let listening = unsafe { ibv::rdma_listen(self.id.as_ptr(), backlog) };
        self.done(listening, "rdma_listen", || "listening for lanes".to_owned())?;
        Ok(self.own_port())
    }

    /// The port number (of rdma_cm's, as TCP's) that it has on this host.
    pub(super) fn own_port(&self) -> u16 {
        // SAFETY: the identifier is alive.
        u16::from_be(unsafe { ibv::rdma_get_src_port(self.id.as_ptr()) })
    }

    /// Looks for the way to a peer.
    pub(super) fn resolve_address(
        &mut self,
        from: SocketAddr,
        to: SocketAddr,
        deadline: Deadline,
    ) -> Result<(), VerbsError> {
        let (mut from_c, mut to_c) = (storage(from), storage(to));
        let timeout_ms = deadline.poll_timeout_ms().max(1);
        // SAFETY: the identifier is alive; both storages hold addresses of their family's length.
        let begun = unsafe {
            ibv::rdma_resolve_addr(self.id.as_ptr(), (&raw mut from_c).cast(), (&raw mut to_c).cast(), timeout_ms)
        };
        self.done(begun, "rdma_resolve_addr", || format!("looking for the way from {from} to {to}"))
    }

    pub(super) fn resolve_route(&mut self, deadline: Deadline) -> Result<(), VerbsError> {
        // SAFETY: the identifier is alive.
        let begun = unsafe { ibv::rdma_resolve_route(self.id.as_ptr(), deadline.poll_timeout_ms().max(1)) };
        self.done(begun, "rdma_resolve_route", || "looking for the route".to_owned())
    }

    /// Sets how long the queue pair waits for an acknowledgement: 4.096 µs times two to the power of `exponent`. Devices without
    /// such a time (iWARP, where TCP has its own) say so, and that is no failure.
    pub(super) fn set_acknowledgement_timeout(&mut self, exponent: u8) -> bool {
        let mut value = exponent;
        let (level, option) = (ibv::RDMA_OPTION_ID as i32, ibv::RDMA_OPTION_ID_ACK_TIMEOUT as i32);
        // SAFETY: the identifier is alive; the option's value is one byte.
        unsafe { ibv::rdma_set_option(self.id.as_ptr(), level, option, (&raw mut value).cast(), 1) == 0 }
    }

    pub(super) fn connect(&mut self, terms: &Terms<'_>) -> Result<(), VerbsError> {
        let mut parameters = terms.parameters();
        // SAFETY: the identifier is alive; the parameters point to private data of the length they say.
        let begun = unsafe { ibv::rdma_connect(self.id.as_ptr(), &raw mut parameters) };
        self.done(begun, "rdma_connect", || "asking for a connection".to_owned())
    }

    /// As [`Self::connect`], without a queue pair: asks for one of this number, which need not exist.
    #[cfg(test)]
    pub(super) fn connect_as(&mut self, queue_pair: u32, terms: &Terms<'_>) -> Result<(), VerbsError> {
        let mut parameters = terms.parameters();
        parameters.qp_num = queue_pair;
        // SAFETY: the identifier is alive; the parameters point to private data of the length they say.
        let begun = unsafe { ibv::rdma_connect(self.id.as_ptr(), &raw mut parameters) };
        self.done(begun, "rdma_connect", || "asking for a connection".to_owned())
    }

    pub(super) fn accept(&mut self, terms: &Terms<'_>) -> Result<(), VerbsError> {
        let mut parameters = terms.parameters();
        // SAFETY: the identifier is alive; the parameters point to private data of the length they say.
        let begun = unsafe { ibv::rdma_accept(self.id.as_ptr(), &raw mut parameters) };
        self.done(begun, "rdma_accept", || "accepting a connection".to_owned())
    }

    pub(super) fn reject(&mut self, private_data: &[u8]) -> Result<(), VerbsError> {
        let len = u8::try_from(private_data.len()).expect("refusals are short");
        // SAFETY: the identifier is alive; pointer and length describe `private_data`.
        let done = unsafe { ibv::rdma_reject(self.id.as_ptr(), private_data.as_ptr().cast(), len) };
        self.done(done, "rdma_reject", || "refusing a connection".to_owned())
    }

    /// Moves the queue pair to its error state and tells the peer, without waiting for its answer. A connection that has ended
    /// already has done this for us.
    pub(super) fn disconnect(&mut self) {
        // SAFETY: the identifier is alive and keeps its device while it lives.
        unsafe { ibv::rdma_disconnect(self.id.as_ptr()) };
    }

    /// Makes its queue pair, in `attributes`' completion queue and `pd`, initialized and ready to be connected.
    ///
    /// # Safety
    /// `pd` and the completion queues of `attributes` are alive, of this identifier's device, and outlive the queue pair.
    pub(super) unsafe fn create_queue_pair(
        &mut self,
        pd: *mut ibv::ibv_pd,
        attributes: &mut ibv::ibv_qp_init_attr,
    ) -> Result<NonNull<ibv::ibv_qp>, VerbsError> {
        // SAFETY: the identifier is alive; the caller vouches for the rest.
        let made = unsafe { ibv::rdma_create_qp(self.id.as_ptr(), pd, attributes) };
        self.done(made, "rdma_create_qp", || "making a queue pair".to_owned())?;
        Ok(NonNull::new(self.queue_pair()).expect("rdma_create_qp succeeded"))
    }

    /// Destroys its queue pair: once it returns, nothing of the peer's is done through it any more.
    pub(super) fn destroy_queue_pair(&mut self) {
        if !self.queue_pair().is_null() {
            // SAFETY: the identifier is alive and has a queue pair.
            unsafe { ibv::rdma_destroy_qp(self.id.as_ptr()) };
        }
    }

    fn done(&self, code: i32, call: &'static str, doing: impl FnOnce() -> String) -> Result<(), VerbsError> {
        if code == 0 { Ok(()) } else { Err(VerbsError::last(call, doing())) }
    }
}

impl Drop for Id {
    fn drop(&mut self) {
        self.destroy_queue_pair();
        // SAFETY: the identifier is alive, has no queue pair, and nothing refers to it afterwards.
        unsafe { ibv::rdma_destroy_id(self.id.as_ptr()) };
    }
}

/// An address as the C library has it.
fn storage(address: SocketAddr) -> libc::sockaddr_storage {
    // SAFETY: zero is a value of it: no family.
    let mut storage: libc::sockaddr_storage = unsafe { MaybeUninit::zeroed().assume_init() };
    let to = &raw mut storage;
    match address {
        SocketAddr::V4(v4) => {
            let c = libc::sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: v4.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from(*v4.ip()).to_be() },
                sin_zero: [0; 8],
            };
            // SAFETY: the storage is large enough and aligned for every family's address.
            unsafe { to.cast::<libc::sockaddr_in>().write(c) };
        }
        SocketAddr::V6(v6) => {
            let c = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as libc::sa_family_t,
                sin6_port: v6.port().to_be(),
                sin6_flowinfo: v6.flowinfo(),
                sin6_addr: libc::in6_addr { s6_addr: v6.ip().octets() },
                sin6_scope_id: v6.scope_id(),
            };
            // SAFETY: the storage is large enough and aligned for every family's address.
            unsafe { to.cast::<libc::sockaddr_in6>().write(c) };
        }
    }
    storage
}

/// `ip` with a port, and with the interface that a link-local address needs.
pub(super) fn socket_address(ip: IpAddr, port: u16, scope: u32) -> SocketAddr {
    match ip {
        IpAddr::V4(v4) => SocketAddr::from((v4, port)),
        IpAddr::V6(v6) if v6.is_unicast_link_local() => SocketAddrV6::new(v6, port, 0, scope).into(),
        IpAddr::V6(v6) => SocketAddrV6::new(v6, port, 0, 0).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv4Addr, Ipv6Addr};

    #[test]
    fn addresses_become_the_c_librarys() {
        let v4 = storage(SocketAddr::from((Ipv4Addr::new(10, 9, 0, 1), 0x1234)));
        // SAFETY: an IPv4 address was written there.
        let v4 = unsafe { (&raw const v4).cast::<libc::sockaddr_in>().read() };
        assert_eq!((v4.sin_family, v4.sin_port.to_ne_bytes()), (libc::AF_INET as u16, [0x12, 0x34]));
        assert_eq!(v4.sin_addr.s_addr.to_ne_bytes(), [10, 9, 0, 1]);
        let link_local: Ipv6Addr = "fe80::1".parse().unwrap();
        let v6 = storage(socket_address(link_local.into(), 1, 7));
        // SAFETY: an IPv6 address was written there.
        let v6 = unsafe { (&raw const v6).cast::<libc::sockaddr_in6>().read() };
        assert_eq!((v6.sin6_scope_id, v6.sin6_addr.s6_addr), (7, link_local.octets()));
        let global = socket_address("2001:db8::1".parse().unwrap(), 1, 7);
        assert!(matches!(global, SocketAddr::V6(v6) if v6.scope_id() == 0));
    }
}
