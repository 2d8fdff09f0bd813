//! One vCPU and the thread that runs it.
//!
//! Stopping follows promise P8: `immediate_exit` is set and the thread is signalled, so KVM_RUN returns EINTR. KVM plays
//! the completion of a pending access in *before* it looks at `immediate_exit`, so once EINTR came back nothing is pending
//! and the vCPU may be saved.

use super::control::{Control, Waited};
use super::device::{Pacer, Port};
use super::tracker_ring::Ring;
use belay_transport::region::Mapping;
use kvm_bindings::kvm_run;
use kvm_ioctls::{VcpuExit, VcpuFd};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};

const KVM_EXIT_DIRTY_RING_FULL: u32 = kvm_bindings::KVM_EXIT_DIRTY_RING_FULL;

/// A vCPU as its thread, the controller and the trackers share it.
pub(super) struct Vcpu {
    pub index: usize,
    /// Held by the vCPU's thread while it runs, by the controller while it stands still.
    fd: Mutex<VcpuFd>,
    /// A second mapping of `struct kvm_run`, for the one byte of it that others write while the vCPU runs.
    run: Mapping,
    /// The thread's kernel id once it has started.
    thread: AtomicI32,
    pub ring: Option<Ring>,
}

impl Vcpu {
    pub fn new(index: usize, fd: VcpuFd, ring: Option<Ring>) -> io::Result<Self> {
        // SAFETY: `fd` stays open during this call, and the mapping made from it needs no open descriptor afterwards.
        let borrowed = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) };
        let run = Mapping::read_write(borrowed, belay_transport::PAGE_SIZE)?;
        Ok(Self { index, fd: Mutex::new(fd), run, thread: AtomicI32::new(0), ring })
    }

    /// The descriptor, for ioctls on a vCPU that stands still. Waits for as long as the vCPU runs.
    pub fn fd(&self) -> MutexGuard<'_, VcpuFd> {
        self.fd.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_immediate_exit(&self, value: u8) {
        self.run.atomic_u8(std::mem::offset_of!(kvm_run, immediate_exit)).store(value, Ordering::SeqCst);
    }

    /// Gets the vCPU out of KVM_RUN, or keeps it from going in.
    pub fn kick(&self) {
        self.set_immediate_exit(1);
        let thread = self.thread.load(Ordering::SeqCst);
        if thread != 0 {
            // SAFETY: getpid has no preconditions.
            let process = unsafe { libc::getpid() };
            // SAFETY: sends a signal that `install_kick_handler` gave a handler, to a thread of this process or (if it has
            // ended) to none.
            unsafe { libc::syscall(libc::SYS_tgkill, process, thread, kick_signal()) };
        }
    }

    /// Takes a kick back.
    pub fn unkick(&self) {
        self.set_immediate_exit(0);
    }
}

/// The signal that interrupts KVM_RUN.
fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN() + 1
}

extern "C" fn on_kick(_: libc::c_int) {}

/// Gives the kick signal a handler that does nothing: what matters is that KVM_RUN returns.
pub(super) fn install_kick_handler() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: sigaction is a plain C struct for which all-zero is valid.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_kick as *const () as usize;
        // SAFETY: the handler is async-signal-safe (empty) and the struct is initialised; no SA_RESTART, so calls return EINTR.
        let done = unsafe { libc::sigaction(kick_signal(), &action, std::ptr::null_mut()) };
        assert_eq!(done, 0, "sigaction refused a real-time signal");
    });
}

/// Lets the kick signal through to this thread whatever the mask it inherited.
fn unblock_kick() {
    // SAFETY: sigset_t is a plain C struct that sigemptyset initialises next.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is valid for writing.
    unsafe { libc::sigemptyset(&mut set) };
    // SAFETY: `set` is initialised and the signal number is valid.
    unsafe { libc::sigaddset(&mut set, kick_signal()) };
    // SAFETY: `set` is initialised; changes this thread's mask only.
    unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut()) };
}

/// What a vCPU's thread works with.
pub(super) struct VcpuThread {
    pub vcpu: Arc<Vcpu>,
    pub control: Arc<Control>,
    pub port: Arc<Port>,
    /// Kicks every vCPU: after a crash nobody runs on.
    pub kick_all: Box<dyn Fn() + Send>,
    /// Tells KVM that entries of the dirty rings may be used again.
    pub reset_rings: Box<dyn Fn() -> io::Result<()> + Send>,
}

impl VcpuThread {
    /// The thread's body: runs the vCPU whenever that is wanted, until the VM is dropped.
    pub fn run(self) {
        unblock_kick();
        self.vcpu.thread.store(rustix::thread::gettid().as_raw_nonzero().get(), Ordering::SeqCst);
        let mut pacer = Pacer::default();
        while self.control.stand_still(self.vcpu.index, || self.vcpu.unkick()) {
            if self.port.wait_out(self.vcpu.index, &self.control, &mut pacer) == Waited::Stop {
                continue;
            }
            let mut fd = self.vcpu.fd();
            if let Err(message) = self.run_until_stopped(&mut fd, &mut pacer) {
                let registers = registers(&fd);
                self.control.crash(format!("vCPU {}: {message}; {registers}", self.vcpu.index));
                (self.kick_all)();
            }
        }
        self.vcpu.thread.store(0, Ordering::SeqCst);
        self.control.ended(self.vcpu.index);
    }

    /// Runs until a kick was meant (`Ok`) or the guest failed.
    fn run_until_stopped(&self, fd: &mut VcpuFd, pacer: &mut Pacer) -> Result<(), String> {
        loop {
            match fd.run() {
                Ok(VcpuExit::MmioRead(gpa, data)) => {
                    self.port.read(gpa, data, &self.control, pacer).map_err(|error| error.to_string())?;
                }
                Ok(VcpuExit::MmioWrite(gpa, data)) => {
                    self.port.write(gpa, data).map_err(|error| error.to_string())?;
                }
                Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => self.empty_ring()?,
                Ok(VcpuExit::Intr) => {}
                Ok(VcpuExit::InternalError) => return Err(internal_error(fd)),
                Ok(exit) => return Err(format!("unexpected exit {exit:?}")),
                Err(error) if error.errno() == libc::EINTR => {
                    if !self.control.may_go_on(|| self.vcpu.unkick()) {
                        return Ok(());
                    }
                }
                Err(error) if error.errno() == libc::EAGAIN => {}
                Err(error) => return Err(format!("KVM_RUN: {error}")),
            }
        }
    }

    /// Moves what the full ring holds into its epoch's set and gives the entries back.
    fn empty_ring(&self) -> Result<(), String> {
        let ring = self.vcpu.ring.as_ref().ok_or("a full dirty ring where there is no ring")?;
        ring.collect().map_err(|error| error.to_string())?;
        (self.reset_rings)().map_err(|error| format!("KVM_RESET_DIRTY_RINGS: {error}"))
    }
}

fn internal_error(fd: &mut VcpuFd) -> String {
    let run = fd.get_kvm_run();
    // SAFETY: the exit reason was KVM_EXIT_INTERNAL_ERROR, which fills this member of the union; all its fields are integers.
    let internal = unsafe { run.__bindgen_anon_1.internal };
    format!("KVM internal error, suberror {}", internal.suberror)
}

/// What can be said about where the vCPU is.
fn registers(fd: &VcpuFd) -> String {
    match (fd.get_regs(), fd.get_sregs()) {
        (Ok(r), Ok(s)) => format!(
            "rip {:#x} rflags {:#x} rax {:#x} rbx {:#x} rcx {:#x} rdx {:#x} rsi {:#x} rdi {:#x} rsp {:#x} rbp {:#x} r8 {:#x} \
             r9 {:#x} r10 {:#x} r11 {:#x} r12 {:#x} r13 {:#x} r14 {:#x} r15 {:#x} cr0 {:#x} cr2 {:#x} cr3 {:#x} cr4 {:#x} efer {:#x} \
             cs {:#x}",
            r.rip,
            r.rflags,
            r.rax,
            r.rbx,
            r.rcx,
            r.rdx,
            r.rsi,
            r.rdi,
            r.rsp,
            r.rbp,
            r.r8,
            r.r9,
            r.r10,
            r.r11,
            r.r12,
            r.r13,
            r.r14,
            r.r15,
            s.cr0,
            s.cr2,
            s.cr3,
            s.cr4,
            s.efer,
            s.cs.selector
        ),
        (Err(error), _) | (_, Err(error)) => format!("its registers cannot be read: {error}"),
    }
}
