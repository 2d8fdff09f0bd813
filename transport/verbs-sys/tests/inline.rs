//! The headers' inline operations, against contexts made here whose operations are Rust functions.

use belay_verbs_sys::*;
use libc::{EOPNOTSUPP, c_int, c_void};
use std::cell::RefCell;
use std::io;
use std::mem::{offset_of, size_of};
use std::ptr;

thread_local! {
    /// What the functions below were called with, in order; each test has a thread of its own.
    static CALLS: RefCell<Vec<(&'static str, usize, usize)>> = const { RefCell::new(vec![]) };
}

fn note(name: &'static str, first: usize, second: usize) {
    CALLS.with_borrow_mut(|calls| calls.push((name, first, second)));
}

fn calls() -> Vec<(&'static str, usize, usize)> {
    CALLS.take()
}

unsafe extern "C" fn post_send(qp: *mut ibv_qp, wr: *mut ibv_send_wr, bad: *mut *mut ibv_send_wr) -> c_int {
    note("post_send", qp.addr(), wr.addr());
    // SAFETY: the test gives a place for it.
    unsafe { *bad = wr };
    libc::ENOMEM
}

unsafe extern "C" fn post_recv(qp: *mut ibv_qp, wr: *mut ibv_recv_wr, _bad: *mut *mut ibv_recv_wr) -> c_int {
    note("post_recv", qp.addr(), wr.addr());
    0
}

unsafe extern "C" fn poll_cq(cq: *mut ibv_cq, entries: c_int, wc: *mut ibv_wc) -> c_int {
    note("poll_cq", cq.addr(), usize::try_from(entries).expect("not negative"));
    for entry in 0..2 {
        let mut one: ibv_wc = zeroed();
        (one.wr_id, one.status) = (70 + entry as u64, ibv_wc_status::IBV_WC_RETRY_EXC_ERR);
        // SAFETY: the test gives room for more than two.
        unsafe { wc.wrapping_add(entry).write(one) };
    }
    2
}

unsafe extern "C" fn req_notify_cq(cq: *mut ibv_cq, solicited_only: c_int) -> c_int {
    note("req_notify_cq", cq.addr(), usize::try_from(solicited_only).expect("not negative"));
    0
}

unsafe extern "C" fn query_port(_: *mut ibv_context, port: u8, attr: *mut ibv_port_attr, size: usize) -> c_int {
    note("query_port", usize::from(port), size);
    // SAFETY: the test gives whole attributes.
    unsafe { (*attr).link_layer = 2 };
    0
}

unsafe extern "C" fn query_device_ex(
    _: *mut ibv_context,
    input: *const ibv_query_device_ex_input,
    attr: *mut ibv_device_attr_ex,
    size: usize,
) -> c_int {
    note("query_device_ex", input.addr(), size);
    // SAFETY: the test gives whole attributes.
    unsafe { (*attr).odp_caps.general_caps = 3 };
    0
}

unsafe extern "C" fn create_cq_ex(context: *mut ibv_context, attr: *mut ibv_cq_init_attr_ex) -> *mut ibv_cq_ex {
    note("create_cq_ex", context.addr(), attr.addr());
    ptr::without_provenance_mut(0x1000)
}

unsafe extern "C" fn create_qp_ex(context: *mut ibv_context, attr: *mut ibv_qp_init_attr_ex) -> *mut ibv_qp {
    note("create_qp_ex", context.addr(), attr.addr());
    ptr::without_provenance_mut(0x2000)
}

unsafe extern "C" fn advise_mr(
    pd: *mut ibv_pd,
    advice: ibv_advise_mr_advice,
    _flags: u32,
    _sges: *mut ibv_sge,
    count: u32,
) -> c_int {
    note("advise_mr", pd.addr(), (advice + count) as usize);
    0
}

/// An extended context with every operation above. It stays where it is: the plain context is a part of it.
struct Device(*mut verbs_context);

impl Device {
    fn new() -> Self {
        // SAFETY: numbers, nullable pointers, optional functions and a mutex, whose zero bytes are its initializer.
        let mut made: Box<verbs_context> = Box::new(unsafe { std::mem::zeroed() });
        made.sz = size_of::<verbs_context>();
        made.context.abi_compat = ptr::without_provenance_mut(usize::MAX);
        made.query_port = Some(query_port);
        made.query_device_ex = Some(query_device_ex);
        made.create_cq_ex = Some(create_cq_ex);
        made.create_qp_ex = Some(create_qp_ex);
        made.advise_mr = Some(advise_mr);
        let ops = &mut made.context.ops;
        ops.post_send = Some(post_send);
        ops.post_recv = Some(post_recv);
        ops.poll_cq = Some(poll_cq);
        ops.req_notify_cq = Some(req_notify_cq);
        Self(Box::into_raw(made))
    }

    fn context(&self) -> *mut ibv_context {
        // SAFETY: alive for as long as this is; no reference is made.
        unsafe { &raw mut (*self.0).context }
    }

    fn change(&self, change: impl FnOnce(&mut verbs_context)) {
        // SAFETY: alive, and nobody else has a reference to it at the time.
        change(unsafe { &mut *self.0 });
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: made by Box::into_raw, once.
        drop(unsafe { Box::from_raw(self.0) });
    }
}

/// A queue pair, a completion queue or a protection domain of a device, with nothing in it but that.
fn of<T>(device: &Device, set: fn(&mut T, *mut ibv_context)) -> Box<T> {
    // SAFETY: only used for ibv_qp, ibv_cq and ibv_pd: numbers, nullable pointers and C locks.
    let mut made: Box<T> = Box::new(unsafe { std::mem::zeroed() });
    set(&mut made, device.context());
    made
}

fn errno() -> Option<c_int> {
    io::Error::last_os_error().raw_os_error()
}

#[test]
fn posting_and_polling_call_the_devices_own_functions() {
    let device = Device::new();
    let mut qp: Box<ibv_qp> = of(&device, |qp: &mut ibv_qp, context| qp.context = context);
    let mut cq: Box<ibv_cq> = of(&device, |cq: &mut ibv_cq, context| cq.context = context);
    let (qp, cq) = (&raw mut *qp, &raw mut *cq);
    let (mut send, mut receive): (ibv_send_wr, ibv_recv_wr) = (zeroed(), zeroed());
    let (mut bad_send, mut bad_receive) = (ptr::null_mut(), ptr::null_mut());

    // SAFETY: everything is alive and the functions are those above; so below.
    assert_eq!(unsafe { ibv_post_send(qp, &raw mut send, &raw mut bad_send) }, libc::ENOMEM);
    assert_eq!(bad_send, &raw mut send, "the request that was not posted");
    // SAFETY: as above.
    assert_eq!(unsafe { ibv_post_recv(qp, &raw mut receive, &raw mut bad_receive) }, 0);
    let mut done: [ibv_wc; 4] = zeroed();
    // SAFETY: as above; room for four.
    assert_eq!(unsafe { ibv_poll_cq(cq, 4, done.as_mut_ptr()) }, 2);
    assert_eq!((done[0].wr_id, done[1].wr_id, done[2].wr_id), (70, 71, 0));
    assert_eq!(done[1].status, ibv_wc_status::IBV_WC_RETRY_EXC_ERR);
    // SAFETY: as above.
    assert_eq!(unsafe { ibv_req_notify_cq(cq, 1) }, 0);

    let expected = [
        ("post_send", qp.addr(), (&raw mut send).addr()),
        ("post_recv", qp.addr(), (&raw mut receive).addr()),
        ("poll_cq", cq.addr(), 4),
        ("req_notify_cq", cq.addr(), 1),
    ];
    assert_eq!(calls(), expected);
}

#[test]
fn an_extended_context_is_known_by_all_its_bits_and_begins_before_the_plain_one() {
    let device = Device::new();
    // SAFETY: the context is alive; so below.
    let found = unsafe { verbs_get_ctx(device.context()) };
    assert_eq!(found, extended_available().then_some(device.0));
    // What a 32-bit pointer's all-ones would be, and what a context of the old ABI has.
    for not_extended in [u32::MAX as usize, 0, usize::MAX - 1] {
        device.change(|made| made.context.abi_compat = ptr::without_provenance_mut(not_extended));
        // SAFETY: as above.
        assert_eq!(unsafe { verbs_get_ctx(device.context()) }, None, "{not_extended:#x}");
    }
}

#[test]
fn extended_operations_reach_the_device_with_the_size_of_what_they_fill() {
    if !extended_available() {
        return refuse_everything(&Device::new());
    }
    let device = Device::new();
    let mut port: ibv_port_attr = zeroed();
    // SAFETY: everything is alive and the functions are those above; so below.
    assert_eq!(unsafe { ibv_query_port(device.context(), 9, &raw mut port) }, 0);
    assert_eq!(u32::from(port.link_layer), IBV_LINK_LAYER_ETHERNET);
    let mut attr: ibv_device_attr_ex = zeroed();
    // SAFETY: as above.
    assert_eq!(unsafe { ibv_query_device_ex(device.context(), ptr::null(), &raw mut attr) }, 0);
    assert_eq!(attr.odp_caps.general_caps, 3);
    let mut cq: ibv_cq_init_attr_ex = zeroed();
    // SAFETY: as above.
    let made = unsafe { ibv_create_cq_ex(device.context(), &raw mut cq) };
    assert_eq!(ibv_cq_ex_to_cq(made).addr(), 0x1000);
    let mut qp: ibv_qp_init_attr_ex = zeroed();
    // SAFETY: as above.
    assert_eq!(unsafe { ibv_create_qp_ex(device.context(), &raw mut qp) }.addr(), 0x2000);
    let mut pd: Box<ibv_pd> = of(&device, |pd: &mut ibv_pd, context| pd.context = context);
    let mut ranges: [ibv_sge; 5] = zeroed();
    // SAFETY: as above.
    assert_eq!(unsafe { ibv_advise_mr(&raw mut *pd, 1, 0, ranges.as_mut_ptr(), 5) }, 0);

    let at = device.context().addr();
    let expected = [
        ("query_port", 9, size_of::<ibv_port_attr>()),
        ("query_device_ex", 0, size_of::<ibv_device_attr_ex>()),
        ("create_cq_ex", at, (&raw mut cq).addr()),
        ("create_qp_ex", at, (&raw mut qp).addr()),
        ("advise_mr", (&raw mut *pd).addr(), 6),
    ];
    assert_eq!(calls(), expected);
}

/// Every extended operation that has no older way says that there is none, and calls nothing.
fn refuse_everything(device: &Device) {
    let clear = || {
        // SAFETY: takes nothing.
        let errno = unsafe { libc::__errno_location() };
        // SAFETY: this thread's own.
        unsafe { *errno = 0 };
    };
    let mut cq: ibv_cq_init_attr_ex = zeroed();
    clear();
    // SAFETY: everything is alive; so below.
    assert!(unsafe { ibv_create_cq_ex(device.context(), &raw mut cq) }.is_null());
    assert_eq!(errno(), Some(EOPNOTSUPP));
    let mut qp: ibv_qp_init_attr_ex = zeroed();
    clear();
    // SAFETY: as above.
    assert!(unsafe { ibv_create_qp_ex(device.context(), &raw mut qp) }.is_null());
    assert_eq!(errno(), Some(EOPNOTSUPP));
    let mut pd: Box<ibv_pd> = of(device, |pd: &mut ibv_pd, context| pd.context = context);
    // SAFETY: as above.
    assert_eq!(unsafe { ibv_advise_mr(&raw mut *pd, 0, 0, ptr::null_mut(), 0) }, EOPNOTSUPP);
    assert_eq!(calls(), []);
}

#[test]
fn a_context_that_is_not_extended_has_no_extended_operation() {
    let device = Device::new();
    device.change(|made| made.context.abi_compat = ptr::null_mut());
    refuse_everything(&device);
}

#[test]
fn an_operation_that_the_device_leaves_null_does_not_exist() {
    let device = Device::new();
    device.change(|made| (made.create_cq_ex, made.create_qp_ex, made.advise_mr) = (None, None, None));
    refuse_everything(&device);
}

/// The structure grows at its head: a library that knew less of it has a smaller `sz`, and what lies beyond is not its to be read.
#[test]
fn an_operation_beyond_the_size_the_library_knew_does_not_exist() {
    let whole = size_of::<verbs_context>();
    let device = Device::new();
    let mut pd: Box<ibv_pd> = of(&device, |pd: &mut ibv_pd, context| pd.context = context);
    let mut advise = |sz: usize| {
        device.change(|made| made.sz = sz);
        // SAFETY: everything is alive and the function is the one above.
        unsafe { ibv_advise_mr(&raw mut *pd, 0, 0, ptr::null_mut(), 0) }
    };
    let reach = whole - offset_of!(verbs_context, advise_mr);
    assert_eq!(advise(reach), if extended_available() { 0 } else { EOPNOTSUPP });
    calls();
    assert_eq!(advise(reach - 1), EOPNOTSUPP);
    assert_eq!(advise(0), EOPNOTSUPP);
    let create_qp_ex_is_reached = whole - offset_of!(verbs_context, create_qp_ex) < reach;
    assert!(create_qp_ex_is_reached, "an older operation lies nearer to the context");
    device.change(|made| made.sz = 0);
    refuse_everything(&device);
}

#[test]
fn an_event_that_no_enumeration_knows_is_still_a_number() {
    let mut event: ibv_async_event = zeroed();
    let at = (&raw mut event).wrapping_byte_add(offset_of!(ibv_async_event, event_type)).cast::<u32>();
    for number in [0, 7, 4711] {
        // SAFETY: within the event; it is read as a number only.
        unsafe { at.write(number) };
        // SAFETY: whole, as ibv_get_async_event fills it.
        assert_eq!(unsafe { async_event_number((&raw const event).cast()) }, number);
    }
    // A number that is known again, before the event is dropped as what it is.
    // SAFETY: as above.
    unsafe { at.write(0) };
}

#[test]
fn the_addresses_of_an_identifier_are_those_within_it() {
    // SAFETY: numbers, nullable pointers and socket addresses.
    let mut id: Box<rdma_cm_id> = Box::new(unsafe { std::mem::zeroed() });
    let id: *mut rdma_cm_id = &raw mut *id;
    let route = offset_of!(rdma_cm_id, route) + offset_of!(rdma_route, addr);
    // SAFETY: alive; so below.
    let local: *mut c_void = unsafe { rdma_get_local_addr(id) }.cast();
    // SAFETY: as above.
    let peer: *mut c_void = unsafe { rdma_get_peer_addr(id) }.cast();
    assert_eq!(local.addr(), id.addr() + route);
    assert_eq!(peer.addr(), id.addr() + route + size_of::<libc::sockaddr_storage>());
}
