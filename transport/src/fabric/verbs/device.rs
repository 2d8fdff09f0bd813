//! An RDMA device in use: its context, its limits, its protection domains, and what it says by itself.
//!
//! librdmacm opens each device once a process and keeps it open: every identifier on a device has the same context. So a
//! [`Context`] is found by binding an identifier to one of the device's addresses, and what the device says by itself
//! (asynchronous events) is for everybody in the process: it is read by whoever wakes first and kept for all.

use super::address::Local;
use super::cm::{EventChannel, Id};
use super::error::VerbsError;
use belay_verbs_sys as ibv;
use std::collections::VecDeque;
use std::ffi::CStr;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// Asynchronous events kept for those who have not looked yet; who is further behind has missed the oldest.
const EVENTS_KEPT: usize = 256;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every step under these locks leaves the state whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a device allows; every size and depth in this fabric is taken from here.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub max_qp_wr: u32,
    pub max_cqe: u32,
    pub max_mr: u32,
    pub max_mr_size: u64,
    /// READs of a peer's that a queue pair can answer at once.
    pub max_responder_resources: u8,
    /// READs that a queue pair can have outstanding.
    pub max_initiator_depth: u8,
    /// Longest message of the port.
    pub max_message: u32,
    /// On-demand paging: what it can do for reliable connections, as `ibv_odp_transport_cap_bits`; 0 without any.
    pub rc_odp: u32,
}

/// An open device, and the port that a session uses.
pub(super) struct Context {
    verbs: NonNull<ibv::ibv_context>,
    /// Bound to a local address of the device, so that librdmacm keeps it open and the address is ours.
    _anchor: Id,
    name: String,
    port: u8,
    is_iwarp: bool,
    limits: Limits,
    events: Arc<AsyncEvents>,
}

// SAFETY: libibverbs' functions may be called from any thread (ibv_open_device(3) and its kin are thread-safe).
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// The device that was chosen: rdma_cm must find the same one behind its address.
    pub(super) fn of(local: &Local) -> Result<Arc<Self>, VerbsError> {
        let context = Self::at(local.address)?;
        if context.name == local.device && context.port == local.port {
            return Ok(context);
        }
        Err(VerbsError::OtherDevice {
            address: local.address.ip(),
            asked: format!("{} port {}", local.device, local.port),
            got: format!("{} port {}", context.name, context.port),
        })
    }

    /// The device behind one of this host's addresses.
    fn at(address: SocketAddr) -> Result<Arc<Self>, VerbsError> {
        let channel = EventChannel::new()?;
        let mut anchor = Id::new(&channel)?;
        anchor.bind(address)?;
        let verbs = anchor.device().ok_or_else(|| VerbsError::Call {
            call: "rdma_bind_addr",
            doing: format!("looking for the device behind {address}"),
            source: io::Error::from_raw_os_error(libc::ENODEV),
        })?;
        let port = anchor.port();
        // SAFETY: the context is open while the anchor lives.
        let device = unsafe { (*verbs.as_ptr()).device };
        // SAFETY: an open context's device lives as long as it.
        let name = unsafe { ibv::ibv_get_device_name(device) };
        // SAFETY: the device's own, zero-terminated.
        let name = unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned();
        // SAFETY: as for the name.
        let transport = unsafe { (*device).transport_type };
        let limits = limits(verbs, port, &name)?;
        let events = AsyncEvents::of(verbs)?;
        let is_iwarp = transport == ibv::ibv_transport_type::IBV_TRANSPORT_IWARP;
        Ok(Arc::new(Self { verbs, _anchor: anchor, name, port, is_iwarp, limits, events }))
    }

    /// For libibverbs' calls; valid while `self` lives.
    pub(super) fn as_ptr(&self) -> *mut ibv::ibv_context {
        self.verbs.as_ptr()
    }

    /// The device's name, as `ibv_devinfo -l` lists it.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The port that the session's address belongs to, from 1.
    pub(super) fn port(&self) -> u8 {
        self.port
    }

    /// Whether it speaks iWARP, where a WRITE completes once it has been handed to TCP.
    pub(super) fn is_iwarp(&self) -> bool {
        self.is_iwarp
    }

    pub(super) fn limits(&self) -> &Limits {
        &self.limits
    }

    pub(super) fn events(&self) -> &Arc<AsyncEvents> {
        &self.events
    }

    /// The NUMA node that the device is attached to, where the system says.
    pub(super) fn numa_node(&self) -> Option<u32> {
        numa_node_in(Path::new("/sys/class/infiniband"), &self.name)
    }
}

/// sysfs says -1 where there is only one node, and nothing for devices that are not on a bus.
fn numa_node_in(devices: &Path, name: &str) -> Option<u32> {
    std::fs::read_to_string(devices.join(name).join("device/numa_node")).ok()?.trim().parse().ok()
}

/// Whether the kernel says now that a port is down, or the network interface below it. Not so of a device that it does not list.
pub(super) fn port_is_down(device: &str, port: u8) -> bool {
    port_is_down_in(Path::new("/sys/class"), device, port)
}

fn port_is_down_in(class: &Path, device: &str, port: u8) -> bool {
    const IFF_UP: u32 = libc::IFF_UP as u32;
    let port = class.join("infiniband").join(device).join(format!("ports/{port}"));
    // "1: DOWN", "4: ACTIVE", …
    if std::fs::read_to_string(port.join("state")).is_ok_and(|state| state.trim().ends_with(": DOWN")) {
        return true;
    }
    // An interface that goes down sends nothing any more before its port is said to be.
    let interfaces = std::fs::read_dir(port.join("gid_attrs/ndevs")).into_iter().flatten().flatten();
    let Some(interface) = interfaces.filter_map(|entry| std::fs::read_to_string(entry.path()).ok()).next() else {
        return false;
    };
    let flags = std::fs::read_to_string(class.join("net").join(interface.trim()).join("flags"));
    let flags = flags.ok().and_then(|flags| u32::from_str_radix(flags.trim().strip_prefix("0x")?, 16).ok());
    flags.is_some_and(|flags| flags & IFF_UP == 0)
}

fn limits(verbs: NonNull<ibv::ibv_context>, port: u8, name: &str) -> Result<Limits, VerbsError> {
    let mut device: ibv::ibv_device_attr_ex = ibv::zeroed();
    // SAFETY: the context is open, no input is needed, `device` may be written.
    let errno = unsafe { ibv::ibv_query_device_ex(verbs.as_ptr(), std::ptr::null(), &raw mut device) };
    if errno != 0 {
        return Err(VerbsError::returned("ibv_query_device_ex", format!("asking {name} for its limits"), errno.abs()));
    }
    let mut attributes: ibv::ibv_port_attr = ibv::zeroed();
    // SAFETY: the context is open, `attributes` may be written.
    let errno = unsafe { ibv::ibv_query_port(verbs.as_ptr(), port, &raw mut attributes) };
    if errno != 0 {
        return Err(VerbsError::returned("ibv_query_port", format!("asking port {port} of {name}"), errno.abs()));
    }
    let plain = &device.orig_attr;
    let positive = |value: i32| u32::try_from(value).unwrap_or(0);
    let depth = |value: i32| u8::try_from(positive(value)).unwrap_or(u8::MAX);
    Ok(Limits {
        max_qp_wr: positive(plain.max_qp_wr),
        max_cqe: positive(plain.max_cqe),
        max_mr: positive(plain.max_mr),
        max_mr_size: plain.max_mr_size,
        max_responder_resources: depth(plain.max_qp_rd_atom),
        max_initiator_depth: depth(plain.max_qp_init_rd_atom),
        // 2^31 by the specification, and some drivers say 0 for it.
        max_message: if attributes.max_msg_sz == 0 { 1 << 31 } else { attributes.max_msg_sz },
        rc_odp: device.odp_caps.per_transport_caps.rc_odp_caps,
    })
}

/// A protection domain: regions and queue pairs of one belong together and to nobody else.
pub(super) struct Pd {
    pd: NonNull<ibv::ibv_pd>,
    context: Arc<Context>,
    /// A region could not be deregistered.
    keeps: AtomicBool,
}

// SAFETY: libibverbs' functions may be called from any thread.
unsafe impl Send for Pd {}
// SAFETY: as above.
unsafe impl Sync for Pd {}

impl Pd {
    pub(super) fn new(context: &Arc<Context>) -> Result<Arc<Self>, VerbsError> {
        // SAFETY: the context is open.
        let pd = unsafe { ibv::ibv_alloc_pd(context.as_ptr()) };
        let pd = NonNull::new(pd).ok_or_else(|| VerbsError::last("ibv_alloc_pd", "making a protection domain"))?;
        Ok(Arc::new(Self { pd, context: Arc::clone(context), keeps: AtomicBool::new(false) }))
    }

    /// For libibverbs' calls; valid while `self` lives.
    pub(super) fn as_ptr(&self) -> *mut ibv::ibv_pd {
        self.pd.as_ptr()
    }

    pub(super) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// Notes that the device did not deregister a region.
    pub(super) fn keeps_a_region(&self) {
        self.keeps.store(true, Ordering::Release);
    }

    /// Whether every region that was given back was deregistered: only then is it certain that the device works on none of them.
    pub(super) fn has_let_go(&self) -> bool {
        !self.keeps.load(Ordering::Acquire)
    }
}

impl Drop for Pd {
    fn drop(&mut self) {
        // SAFETY: regions and queue pairs hold the domain, so none is left in it.
        unsafe { ibv::ibv_dealloc_pd(self.pd.as_ptr()) };
    }
}

/// What a device says by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AsyncEvent {
    /// The completion queue at this address overran.
    CompletionQueue(usize),
    /// The queue pair at this address failed.
    QueuePair(usize),
    /// The device failed.
    Device,
    PortDown(u8),
    PortUp(u8),
}

/// The asynchronous events of one device, for everybody in this process who uses it.
pub(super) struct AsyncEvents {
    verbs: NonNull<ibv::ibv_context>,
    log: Mutex<Log>,
}

// SAFETY: libibverbs' functions may be called from any thread.
unsafe impl Send for AsyncEvents {}
// SAFETY: as above.
unsafe impl Sync for AsyncEvents {}

#[derive(Default)]
struct Log {
    /// Number of the first event in `kept`.
    first: u64,
    kept: VecDeque<AsyncEvent>,
    listeners: Vec<Weak<OwnedFd>>,
}

static ALL: Mutex<Vec<Weak<AsyncEvents>>> = Mutex::new(Vec::new());

/// Numbers of asynchronous events. With the feature `rdma-sys` they are an enumeration that knows no number of a later kernel.
#[allow(clippy::unnecessary_cast)]
mod event {
    use belay_verbs_sys::ibv_event_type as kind;
    pub(super) const CQ_ERR: u32 = kind::IBV_EVENT_CQ_ERR as u32;
    pub(super) const QP_FATAL: u32 = kind::IBV_EVENT_QP_FATAL as u32;
    pub(super) const QP_REQ_ERR: u32 = kind::IBV_EVENT_QP_REQ_ERR as u32;
    pub(super) const QP_ACCESS_ERR: u32 = kind::IBV_EVENT_QP_ACCESS_ERR as u32;
    pub(super) const DEVICE_FATAL: u32 = kind::IBV_EVENT_DEVICE_FATAL as u32;
    pub(super) const PORT_ERR: u32 = kind::IBV_EVENT_PORT_ERR as u32;
    pub(super) const PORT_ACTIVE: u32 = kind::IBV_EVENT_PORT_ACTIVE as u32;
}

impl AsyncEvents {
    /// The one of that context.
    fn of(verbs: NonNull<ibv::ibv_context>) -> Result<Arc<Self>, VerbsError> {
        let mut all = lock(&ALL);
        all.retain(|events| events.strong_count() > 0);
        if let Some(found) = all.iter().filter_map(Weak::upgrade).find(|events| events.verbs == verbs) {
            return Ok(found);
        }
        let new = Arc::new(Self { verbs, log: Mutex::default() });
        rustix::io::ioctl_fionbio(new.as_fd(), true).map_err(|error| {
            VerbsError::returned("ioctl", "making a device's event queue non-blocking", error.raw_os_error())
        })?;
        all.push(Arc::downgrade(&new));
        Ok(new)
    }

    /// Has `wake` (an eventfd) written whenever there is something new; gives where to begin reading.
    pub(super) fn listen(&self, wake: &Arc<OwnedFd>) -> u64 {
        let mut log = lock(&self.log);
        log.listeners.retain(|listener| listener.strong_count() > 0);
        log.listeners.push(Arc::downgrade(wake));
        log.first + log.kept.len() as u64
    }

    /// Takes in what the device has said and gives what came after `seen`, which moves on.
    pub(super) fn take(&self, seen: &mut u64) -> Vec<AsyncEvent> {
        let mut log = lock(&self.log);
        let mut new = false;
        while let Some(event) = self.read() {
            let Some(event) = event else { continue };
            new = true;
            if log.kept.len() == EVENTS_KEPT {
                log.kept.pop_front();
                log.first += 1;
            }
            log.kept.push_back(event);
        }
        if new {
            for listener in log.listeners.iter().filter_map(Weak::upgrade) {
                // A full counter is readable too.
                let _ = rustix::io::write(&*listener, &1u64.to_ne_bytes());
            }
        }
        let from = usize::try_from(seen.saturating_sub(log.first)).unwrap_or(usize::MAX).min(log.kept.len());
        *seen = log.first + log.kept.len() as u64;
        log.kept.range(from..).copied().collect()
    }

    /// One event: `None` when there is none, `Some(None)` for one that nobody here cares for.
    fn read(&self) -> Option<Option<AsyncEvent>> {
        let mut happened: ibv::ibv_async_event = ibv::zeroed();
        // SAFETY: the context is open while anybody holds this; `happened` may be written.
        if unsafe { ibv::ibv_get_async_event(self.verbs.as_ptr(), &raw mut happened) } != 0 {
            return None;
        }
        // SAFETY: the call filled it.
        let number = unsafe { ibv::async_event_number(&raw const happened) };
        let told = match number {
            event::CQ_ERR => {
                // SAFETY: this event carries a completion queue.
                Some(AsyncEvent::CompletionQueue(unsafe { happened.element.cq } as usize))
            }
            event::QP_FATAL | event::QP_REQ_ERR | event::QP_ACCESS_ERR => {
                // SAFETY: these events carry a queue pair.
                Some(AsyncEvent::QueuePair(unsafe { happened.element.qp } as usize))
            }
            event::DEVICE_FATAL => Some(AsyncEvent::Device),
            event::PORT_ERR | event::PORT_ACTIVE => {
                // SAFETY: these events carry a port's number.
                let port = u8::try_from(unsafe { happened.element.port_num }).unwrap_or(0);
                Some(if number == event::PORT_ERR { AsyncEvent::PortDown(port) } else { AsyncEvent::PortUp(port) })
            }
            _ => None,
        };
        // SAFETY: filled by ibv_get_async_event and acknowledged once, before its queue can be waited for by a destroyer.
        unsafe { ibv::ibv_ack_async_event(&raw mut happened) };
        Some(told)
    }
}

impl AsFd for AsyncEvents {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: librdmacm keeps the context open for the life of the process.
        let fd = unsafe { (*self.verbs.as_ptr()).async_fd };
        // SAFETY: the descriptor is open as long as its context.
        unsafe { BorrowedFd::borrow_raw(fd) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_down_where_the_kernel_says_so_of_it_or_of_its_interface_and_nowhere_else() {
        let class = tempfile::tempdir().unwrap();
        let (port, interface) = (class.path().join("infiniband/rxe0/ports/1"), class.path().join("net/eth0"));
        let is_down = |number| port_is_down_in(class.path(), "rxe0", number);
        assert!(!is_down(1), "nothing is said");
        std::fs::create_dir_all(port.join("gid_attrs/ndevs")).unwrap();
        std::fs::create_dir_all(&interface).unwrap();
        for (state, down) in [("4: ACTIVE\n", false), ("1: DOWN\n", true), ("2: INIT\n", false)] {
            std::fs::write(port.join("state"), state).unwrap();
            assert_eq!((is_down(1), is_down(2)), (down, false), "{state}");
        }
        std::fs::write(port.join("gid_attrs/ndevs/0"), "eth0\n").unwrap();
        for (flags, down) in [("0x1003\n", false), ("0x1002\n", true), ("what\n", false)] {
            std::fs::write(interface.join("flags"), flags).unwrap();
            assert_eq!((is_down(1), is_down(2)), (down, false), "{flags}");
        }
    }

    #[test]
    fn the_node_of_a_device_is_what_sysfs_says() {
        let devices = tempfile::tempdir().unwrap();
        let path = devices.path().join("mlx5_0/device");
        std::fs::create_dir_all(&path).unwrap();
        assert_eq!(numa_node_in(devices.path(), "mlx5_0"), None);
        std::fs::write(path.join("numa_node"), "1\n").unwrap();
        assert_eq!(numa_node_in(devices.path(), "mlx5_0"), Some(1));
        std::fs::write(path.join("numa_node"), "-1\n").unwrap();
        assert_eq!(numa_node_in(devices.path(), "mlx5_0"), None);
    }
}
