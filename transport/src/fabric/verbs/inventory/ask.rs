//! Asking the devices themselves, through libibverbs.

use super::{Answer, Answers, Libraries, Limits, OnDemand};
use belay_verbs_sys::{
    LoadError, extended_available, ibv_close_device, ibv_context, ibv_device, ibv_device_attr_ex, ibv_free_device_list,
    ibv_get_device_list, ibv_get_device_name, ibv_odp_general_caps, ibv_odp_transport_cap_bits, ibv_open_device,
    ibv_port_attr, ibv_query_device_ex, ibv_query_port, load, zeroed,
};
use std::ffi::{CStr, c_char};
use std::io;
use std::ptr::{self, NonNull};

/// The list of devices, freed when dropped.
struct List(NonNull<*mut ibv_device>);

impl Drop for List {
    fn drop(&mut self) {
        // SAFETY: came from ibv_get_device_list and is freed here only.
        unsafe { ibv_free_device_list(self.0.as_ptr()) };
    }
}

/// An open device, closed when dropped.
struct Context(NonNull<ibv_context>);

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: came from ibv_open_device, is closed here only, and nothing was made on it.
        unsafe { ibv_close_device(self.0.as_ptr()) };
    }
}

/// Loads the libraries and asks every device that they list.
pub(super) fn all() -> Result<(Libraries, Answers), LoadError> {
    let found = load()?;
    let libraries = Libraries { ibverbs: found.ibverbs.clone(), rdmacm: found.rdmacm.clone() };
    let mut count = 0;
    // SAFETY: loaded; the count is ours.
    let list = unsafe { ibv_get_device_list(&raw mut count) };
    // Null is what a kernel without RDMA gives: nothing to ask.
    let Some(list) = NonNull::new(list).map(List) else { return Ok((libraries, vec![])) };
    let answers = (0..usize::try_from(count).unwrap_or(0))
        .map(|index| {
            let entry = list.0.as_ptr().wrapping_add(index);
            // SAFETY: the list has `count` entries.
            let device = unsafe { entry.read() };
            // SAFETY: a device of the list, which is alive.
            let name = unsafe { ibv_get_device_name(device) };
            // SAFETY: a string in the device.
            let name = unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned();
            // SAFETY: a device of the list, which is alive.
            let answer = unsafe { ask(device) };
            (name, answer)
        })
        .collect();
    Ok((libraries, answers))
}

fn last_errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// # Safety
/// `device` is of a list that is alive.
unsafe fn ask(device: *mut ibv_device) -> Result<Answer, (&'static str, i32)> {
    // SAFETY: the caller says so.
    let context = NonNull::new(unsafe { ibv_open_device(device) }).map(Context);
    let context = context.ok_or_else(|| ("opening it", last_errno()))?;
    let mut attr: ibv_device_attr_ex = zeroed();
    // SAFETY: open; no input is allowed; the attributes are ours.
    let errno = unsafe { ibv_query_device_ex(context.0.as_ptr(), ptr::null(), &raw mut attr) };
    if errno != 0 {
        return Err(("querying it", errno));
    }
    let mut mtus = vec![];
    for port in 1..=attr.orig_attr.phys_port_cnt {
        let mut of_port: ibv_port_attr = zeroed();
        // SAFETY: open; the attributes are ours.
        let errno = unsafe { ibv_query_port(context.0.as_ptr(), port, &raw mut of_port) };
        if errno != 0 {
            return Err(("querying its ports", errno));
        }
        // 1 is 256 bytes, 5 is 4096.
        if (1..=5).contains(&of_port.active_mtu) {
            mtus.push((port, 128 << of_port.active_mtu));
        }
    }
    Ok(Answer { limits: limits(&attr), mtus })
}

pub(super) fn limits(attr: &ibv_device_attr_ex) -> Limits {
    let plain = &attr.orig_attr;
    // Drivers without a limit of their own report what overflows an int.
    let count = |value: i32| u32::try_from(value).unwrap_or(u32::MAX);
    Limits {
        firmware: text(&plain.fw_ver),
        max_mr: count(plain.max_mr),
        max_mr_size: plain.max_mr_size,
        max_qp_rd_atom: count(plain.max_qp_rd_atom),
        max_qp_init_rd_atom: count(plain.max_qp_init_rd_atom),
        max_qp_wr: count(plain.max_qp_wr),
        max_cqe: count(plain.max_cqe),
        max_sge: count(plain.max_sge),
        on_demand: on_demand(attr.odp_caps.general_caps, attr.odp_caps.per_transport_caps.rc_odp_caps),
    }
}

pub(super) fn on_demand(general: u64, rc: u32) -> OnDemand {
    let has = |bit: ibv_odp_transport_cap_bits| rc & bit.0 != 0;
    if !extended_available() {
        OnDemand::Unknown
    } else if general & u64::from(ibv_odp_general_caps::IBV_ODP_SUPPORT.0) == 0 {
        OnDemand::None
    } else {
        OnDemand::Some {
            read: has(ibv_odp_transport_cap_bits::IBV_ODP_SUPPORT_READ),
            write: has(ibv_odp_transport_cap_bits::IBV_ODP_SUPPORT_WRITE),
        }
    }
}

/// Characters up to the first NUL.
fn text(chars: &[c_char]) -> String {
    chars.iter().map(|char| char.cast_unsigned() as char).take_while(|char| *char != '\0').collect()
}
