//! What the headers define as inline functions and macros, which no library exports.
//!
//! A device's context is the tail of a larger structure, [`verbs_context`], which grows at its *head*: newer fields lie
//! farther from the context, and `sz` says how much of it the library that made it knew. So an extended operation exists when
//! the context says it is extended, `sz` reaches it, and it is not null.

use crate::types::*;
use libc::{EINVAL, ENOSYS, EOPNOTSUPP, c_int, c_uint, c_void, sockaddr};
use std::mem::{offset_of, size_of};
use std::ptr;

/// `abi_compat` of a context that is the tail of a [`verbs_context`] (`__VERBS_ABI_IS_EXTENDED`).
const VERBS_ABI_IS_EXTENDED: usize = usize::MAX;

/// Whether extended operations (`ibv_*_ex`, on-demand paging, advice) can be had in this build. Without them each answers as a
/// device does that has none. rdma-sys's own test for them never succeeds on 64 bits, so where it stands in they are not used.
pub const fn extended_available() -> bool {
    !cfg!(feature = "rdma-sys")
}

/// The extended context that `context` is the tail of, or none if it is not extended.
///
/// # Safety
/// `context` is a context that libibverbs opened (or one laid out as it does), and still open.
pub unsafe fn verbs_get_ctx(context: *mut ibv_context) -> Option<*mut verbs_context> {
    // SAFETY: the caller vouches for the context.
    let abi = unsafe { (*context).abi_compat };
    (extended_available() && abi as usize == VERBS_ABI_IS_EXTENDED)
        .then(|| context.wrapping_byte_sub(offset_of!(verbs_context, context)).cast())
}

/// An operation of a context's extended part, if it is there.
macro_rules! extended {
    ($context:expr, $op:ident) => {{
        // SAFETY: every caller of this macro requires an open context.
        let found = unsafe { verbs_get_ctx($context) };
        found.and_then(|extended| {
            // SAFETY: `sz` lies directly before the context and so is there in every extended context.
            let known = unsafe { (*extended).sz };
            let wanted = size_of::<verbs_context>() - offset_of!(verbs_context, $op);
            // SAFETY: the field is read only when the library that made this structure knew of it.
            if known < wanted { None } else { unsafe { (*extended).$op } }
        })
    }};
}

fn set_errno(to: c_int) {
    // SAFETY: takes nothing; the address it gives is this thread's own.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: valid for as long as the thread lives.
    unsafe { *errno = to };
}

/// A port's attributes; 0 or an errno. Older libraries fill only what they know and leave the rest zero.
///
/// # Safety
/// `context` is open; `port_attr` is valid for writing.
pub unsafe fn ibv_query_port(context: *mut ibv_context, port_num: u8, port_attr: *mut ibv_port_attr) -> c_int {
    if let Some(query_port) = extended!(context, query_port) {
        // SAFETY: the caller's context and attributes; the size is that of what `port_attr` points to.
        return unsafe { query_port(context, port_num, port_attr, size_of::<ibv_port_attr>()) };
    }
    // SAFETY: the caller says it may be written.
    unsafe { ptr::write_bytes(port_attr, 0, 1) };
    // SAFETY: the older structure is a prefix of the newer one, so it fits.
    unsafe { crate::symbols::ibv_query_port(context, port_num, port_attr.cast()) }
}

/// A device's attributes with the extended ones (on-demand paging among them); 0 or an errno. Where there are no extended
/// operations the extended attributes are zero.
///
/// # Safety
/// `context` is open; `input` is null or valid; `attr` is valid for writing.
pub unsafe fn ibv_query_device_ex(
    context: *mut ibv_context,
    input: *const ibv_query_device_ex_input,
    attr: *mut ibv_device_attr_ex,
) -> c_int {
    // SAFETY: read only when it is not null; then the caller says that it is valid.
    if !input.is_null() && unsafe { (*input).comp_mask } != 0 {
        return EINVAL;
    }
    if let Some(query_device_ex) = extended!(context, query_device_ex) {
        // SAFETY: the caller's context, input and attributes; the size is that of what `attr` points to.
        let answer = unsafe { query_device_ex(context, input, attr, size_of::<ibv_device_attr_ex>()) };
        if answer != EOPNOTSUPP && answer != ENOSYS {
            return answer;
        }
    }
    // SAFETY: the caller says it may be written.
    unsafe { ptr::write_bytes(attr, 0, 1) };
    // SAFETY: `attr` is valid, so its first field is.
    let plain = unsafe { &raw mut (*attr).orig_attr };
    // SAFETY: an open context and a place for the plain attributes.
    unsafe { crate::symbols::ibv_query_device(context, plain) }
}

/// A completion queue with extended attributes, or null with errno: EOPNOTSUPP where the device has none.
/// [`ibv_cq_ex_to_cq`] gives the plain queue in it.
///
/// # Safety
/// `context` is open; `cq_attr` is valid and what it points to lives as long as the queue.
pub unsafe fn ibv_create_cq_ex(context: *mut ibv_context, cq_attr: *mut ibv_cq_init_attr_ex) -> *mut ibv_cq_ex {
    let Some(create_cq_ex) = extended!(context, create_cq_ex) else {
        set_errno(EOPNOTSUPP);
        return ptr::null_mut();
    };
    // SAFETY: the caller's own context and attributes.
    unsafe { create_cq_ex(context, cq_attr) }
}

/// The plain completion queue that an extended one begins with.
pub fn ibv_cq_ex_to_cq(cq: *mut ibv_cq_ex) -> *mut ibv_cq {
    cq.cast()
}

/// A queue pair with extended attributes, or null with errno: EOPNOTSUPP where the device has none. With nothing but a
/// protection domain in the mask it is [`crate::ibv_create_qp`].
///
/// # Safety
/// `context` is open; `attr` is valid and what it points to lives as long as the queue pair.
pub unsafe fn ibv_create_qp_ex(context: *mut ibv_context, attr: *mut ibv_qp_init_attr_ex) -> *mut ibv_qp {
    // SAFETY: the caller says that it is valid.
    if unsafe { (*attr).comp_mask } == ibv_qp_init_attr_mask::IBV_QP_INIT_ATTR_PD.0 {
        // SAFETY: valid, and the mask says that the field is set.
        let pd = unsafe { (*attr).pd };
        // SAFETY: the extended attributes begin with the plain ones.
        return unsafe { crate::symbols::ibv_create_qp(pd, attr.cast()) };
    }
    let Some(create_qp_ex) = extended!(context, create_qp_ex) else {
        set_errno(EOPNOTSUPP);
        return ptr::null_mut();
    };
    // SAFETY: the caller's own context and attributes.
    unsafe { create_qp_ex(context, attr) }
}

/// Advice about ranges of memory regions (prefetch, where paging is on demand); 0 or an errno, EOPNOTSUPP where the device
/// takes none.
///
/// # Safety
/// `pd` is alive; `sg_list` has `num_sge` entries whose keys belong to it.
pub unsafe fn ibv_advise_mr(
    pd: *mut ibv_pd,
    advice: ibv_advise_mr_advice,
    flags: u32,
    sg_list: *mut ibv_sge,
    num_sge: u32,
) -> c_int {
    // SAFETY: the caller says that the protection domain is alive.
    let context = unsafe { (*pd).context };
    let Some(advise_mr) = extended!(context, advise_mr) else { return EOPNOTSUPP };
    // SAFETY: the caller's own domain and list.
    unsafe { advise_mr(pd, advice, flags, sg_list, num_sge) }
}

/// Registers memory, or null with errno. Flags of the optional range (relaxed ordering) go through [`crate::ibv_reg_mr_iova2`],
/// which drops those that the kernel does not know; the plain call would be refused for them.
///
/// # Safety
/// `pd` is alive; the memory stays mapped until the region is deregistered, and nothing the device may write there is a Rust
/// reference.
pub unsafe fn ibv_reg_mr(pd: *mut ibv_pd, addr: *mut c_void, length: usize, access: c_int) -> *mut ibv_mr {
    let flags = access.cast_unsigned();
    if flags & IBV_ACCESS_OPTIONAL_RANGE == 0 {
        // SAFETY: the caller's own.
        unsafe { crate::symbols::ibv_reg_mr(pd, addr, length, access) }
    } else {
        // SAFETY: the caller's own; addressed as it is mapped.
        unsafe { crate::symbols::ibv_reg_mr_iova2(pd, addr, length, addr as u64, flags) }
    }
}

/// As [`ibv_reg_mr`], addressed by the peer from `iova` on.
///
/// # Safety
/// As [`ibv_reg_mr`].
pub unsafe fn ibv_reg_mr_iova(
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    iova: u64,
    access: c_int,
) -> *mut ibv_mr {
    let flags: c_uint = access.cast_unsigned();
    if flags & IBV_ACCESS_OPTIONAL_RANGE == 0 {
        // SAFETY: the caller's own.
        unsafe { crate::symbols::ibv_reg_mr_iova(pd, addr, length, iova, access) }
    } else {
        // SAFETY: the caller's own.
        unsafe { crate::symbols::ibv_reg_mr_iova2(pd, addr, length, iova, flags) }
    }
}

/// One entry of a port's GID table with its type and interface; 0 or an errno.
///
/// # Safety
/// `context` is open; `entry` is valid for writing.
pub unsafe fn ibv_query_gid_ex(
    context: *mut ibv_context,
    port_num: u32,
    gid_index: u32,
    entry: *mut ibv_gid_entry,
    flags: u32,
) -> c_int {
    // SAFETY: the caller's own; the size is that of what `entry` points to.
    unsafe { crate::symbols::_ibv_query_gid_ex(context, port_num, gid_index, entry, flags, size_of::<ibv_gid_entry>()) }
}

/// All valid entries of a device's GID tables: their number, or a negative errno.
///
/// # Safety
/// `context` is open; `entries` has room for `max_entries`.
pub unsafe fn ibv_query_gid_table(
    context: *mut ibv_context,
    entries: *mut ibv_gid_entry,
    max_entries: usize,
    flags: u32,
) -> isize {
    // SAFETY: the caller's own; the size is that of one entry.
    unsafe { crate::symbols::_ibv_query_gid_table(context, entries, max_entries, flags, size_of::<ibv_gid_entry>()) }
}

/// The local address of a connection identifier.
///
/// # Safety
/// `id` is alive. The address lives as long as it.
pub unsafe fn rdma_get_local_addr(id: *mut rdma_cm_id) -> *mut sockaddr {
    // SAFETY: the caller says that it is alive; no reference is made.
    unsafe { &raw mut (*id).route.addr.src_addr_union.src_addr }
}

/// The peer's address of a connection identifier.
///
/// # Safety
/// `id` is alive. The address lives as long as it.
pub unsafe fn rdma_get_peer_addr(id: *mut rdma_cm_id) -> *mut sockaddr {
    // SAFETY: the caller says that it is alive; no reference is made.
    unsafe { &raw mut (*id).route.addr.dst_addr_union.dst_addr }
}

/// Which of [`ibv_event_type`] an asynchronous event is, as a number: a kernel may send one that no enumeration here knows.
///
/// # Safety
/// `event` was filled by [`crate::ibv_get_async_event`].
pub unsafe fn async_event_number(event: *const ibv_async_event) -> u32 {
    let at = event.wrapping_byte_add(offset_of!(ibv_async_event, event_type)).cast::<u32>();
    // SAFETY: a C enumeration is an int; within the event, aligned as its field.
    unsafe { at.read() }
}
