//! Structures for libibverbs to read or to fill, all zero: what memset is in C.

use crate::types::*;

/// Whose zero bytes are a value.
///
/// # Safety
/// Every field is a number, a pointer that may be null, an optional function, or a union or array of these.
pub unsafe trait Zeroed: Sized {}

/// All zero.
pub fn zeroed<T: Zeroed>() -> T {
    // SAFETY: that zero bytes are a value is what the trait says.
    unsafe { std::mem::zeroed() }
}

macro_rules! zeroed {
    ($($name:ident)*) => {
        $(
            // SAFETY: numbers, nullable pointers, unions and arrays of them (the libraries' headers).
            unsafe impl Zeroed for $name {}
        )*
    };
}

zeroed! {
    ibv_ah_attr ibv_async_event ibv_cq_init_attr_ex ibv_device_attr ibv_device_attr_ex ibv_gid ibv_gid_entry ibv_port_attr
    ibv_qp_attr ibv_qp_cap ibv_qp_init_attr ibv_qp_init_attr_ex ibv_query_device_ex_input ibv_recv_wr ibv_send_wr ibv_sge
    ibv_wc rdma_conn_param
}

// SAFETY: its elements are.
unsafe impl<T: Zeroed, const N: usize> Zeroed for [T; N] {}
