//! A userfaultfd of another process, made by having one of its threads make it (ptrace(2)).
//!
//! A userfaultfd belongs to the address space that made it, and QEMU makes none for us. So its main thread is stopped, made to call
//! userfaultfd(2) by the `syscall` instruction of its vDSO, and let go where it was; the descriptor is then duplicated into this process
//! (pidfd_getfd(2)), which does the rest: UFFDIO_API and UFFDIO_REGISTER act on the address space of the descriptor, whoever calls them.
//! QEMU keeps its own for as long as it lives, so nothing that waits for a page goes on without it when this process dies (P1).
//!
//! Works on a QEMU that runs, on one that is linked statically, and under its own seccomp sandbox (which does not list the call). x86-64.
//! A process that dies between the two ends of this leaves QEMU in the middle of a call that is not its own: so this is done while the
//! QEMU has no guest yet, and never to one that has.

use super::process::Process;
use belay_transport::Deadline;
use libc::{c_int, c_long, c_void, user_regs_struct};
use rustix::process::{PidfdGetfdFlags, pidfd_getfd};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// `syscall` (0F 05, Intel SDM vol. 2B).
const SYSCALL: [u8; 2] = [0x0f, 0x05];
/// Between two looks whether a thread has stopped: it does in some tens of microseconds.
const LOOK: Duration = Duration::from_micros(20);
/// A vDSO has two pages or three.
const MOST_VDSO_BYTES: u64 = 1 << 16;

/// Why a process could not be made to open a userfaultfd. It runs as before.
#[derive(Debug, thiserror::Error)]
pub enum InjectError {
    #[error(
        "process {pid} may not be traced; run as root, or set kernel.yama.ptrace_scope to 0 for one's own processes"
    )]
    NotPermitted {
        pid: i32,
        #[source]
        source: io::Error,
    },
    #[error("process {pid} is being traced by another (a debugger?)")]
    Traced { pid: i32 },
    #[error("cannot {doing} in process {pid}")]
    Io {
        doing: &'static str,
        pid: i32,
        #[source]
        source: io::Error,
    },
    #[error("process {pid} has no vDSO with a syscall instruction: not an x86-64 process")]
    NoVdso { pid: i32 },
    #[error("process {pid} did not stop within {bound:?}")]
    NotStopped { pid: i32, bound: Duration },
    #[error("process {pid} ended")]
    Ended { pid: i32 },
    #[error("userfaultfd(2) failed in process {pid}; without root it needs vm.unprivileged_userfaultfd=1 there")]
    Refused {
        pid: i32,
        #[source]
        source: io::Error,
    },
}

/// Makes `process` open `count` userfaultfds, close-on-exec and non-blocking, and duplicates them into this one. UFFDIO_API has not
/// been called on them.
pub fn userfaultfds(process: &Process, count: usize, bound: Duration) -> Result<Vec<OwnedFd>, InjectError> {
    let pid = process.pid().as_raw_nonzero().get();
    let at = syscall_instruction(pid)?;
    let mut numbers = Vec::with_capacity(count);
    {
        let mut thread = Stopped::seize(pid, Deadline::after(bound), bound)?;
        for _ in 0..count {
            let flags = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;
            let result = thread.call(at, libc::SYS_userfaultfd, [flags, 0, 0])?;
            let number = c_int::try_from(result).ok().filter(|&number| number >= 0);
            let errno = || io::Error::from_raw_os_error(c_int::try_from(-result).unwrap_or(libc::EINVAL));
            numbers.push(number.ok_or_else(|| InjectError::Refused { pid, source: errno() })?);
        }
        thread.let_go()?;
    }
    let ours = |number| {
        pidfd_getfd(process.pidfd(), number, PidfdGetfdFlags::empty()).map_err(|errno| InjectError::Io {
            doing: "duplicate a userfaultfd",
            pid,
            source: errno.into(),
        })
    };
    numbers.into_iter().map(ours).collect()
}

/// Where the process's vDSO has a `syscall` instruction.
fn syscall_instruction(pid: i32) -> Result<u64, InjectError> {
    let failed = |doing| move |source| InjectError::Io { doing, pid, source };
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).map_err(failed("read the mappings"))?;
    let range = maps.lines().find(|line| line.ends_with("[vdso]")).and_then(|line| {
        let (start, end) = line.split_once(' ')?.0.split_once('-')?;
        Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
    });
    let (start, end) =
        range.filter(|(start, end)| end - start <= MOST_VDSO_BYTES).ok_or(InjectError::NoVdso { pid })?;
    let memory = File::open(format!("/proc/{pid}/mem")).map_err(|source| InjectError::NotPermitted { pid, source })?;
    let mut code = vec![0; (end - start) as usize];
    memory.read_exact_at(&mut code, start).map_err(failed("read the vDSO"))?;
    let found = code.windows(SYSCALL.len()).position(|bytes| bytes == SYSCALL);
    Ok(start + found.ok_or(InjectError::NoVdso { pid })? as u64)
}

/// One ptrace(2) request that takes no memory of ours, or `data` for it to read or fill.
fn ptrace(request: libc::c_uint, pid: i32, address: usize, data: *mut c_void) -> io::Result<c_long> {
    // SAFETY: `data` is null, a plain number, or points to memory of this process that is valid for what `request` does with it; every
    // caller is in this file and passes one of the three. The tracee's memory and registers are no objects of this process.
    let result = unsafe { libc::ptrace(request, pid, address, data) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A thread that was stopped where it was. Dropped, it goes on there.
struct Stopped {
    pid: i32,
    deadline: Deadline,
    bound: Duration,
    registers: user_regs_struct,
    mask: u64,
    /// It is traced, so it has to be let go.
    seized: bool,
    /// Its registers and its mask are known, so they have to be put back.
    held: bool,
}

impl Stopped {
    fn seize(pid: i32, deadline: Deadline, bound: Duration) -> Result<Self, InjectError> {
        ptrace(libc::PTRACE_SEIZE, pid, 0, std::ptr::null_mut()).map_err(|source| match source.raw_os_error() {
            Some(libc::ESRCH) => InjectError::Ended { pid },
            Some(libc::EPERM) if traced(pid) => InjectError::Traced { pid },
            _ => InjectError::NotPermitted { pid, source },
        })?;
        // SAFETY: registers are plain numbers, for which all bits zero are a value; they are filled before they are used.
        let registers = unsafe { std::mem::zeroed() };
        let mut thread = Self { pid, deadline, bound, registers, mask: 0, seized: true, held: false };
        thread.step(libc::PTRACE_INTERRUPT, "stop a thread")?;
        thread.registers = thread.read_registers()?;
        thread.mask = thread.signal_mask(libc::PTRACE_GETSIGMASK, 0, "read a signal mask")?;
        thread.held = true;
        // A signal that came between two steps would be taken for the end of one.
        thread.signal_mask(libc::PTRACE_SETSIGMASK, u64::MAX, "block signals")?;
        Ok(thread)
    }

    /// A request after which the thread stops again.
    fn step(&mut self, request: libc::c_uint, doing: &'static str) -> Result<(), InjectError> {
        let pid = self.pid;
        ptrace(request, pid, 0, std::ptr::null_mut()).map_err(|source| InjectError::Io { doing, pid, source })?;
        loop {
            let mut status = 0;
            // SAFETY: `status` is valid for writes. __WALL takes threads of any kind; WNOHANG never waits.
            let waited = unsafe { libc::waitpid(pid, &mut status, libc::__WALL | libc::WNOHANG) };
            match waited {
                0 if self.deadline.expired() => return Err(InjectError::NotStopped { pid, bound: self.bound }),
                0 => std::thread::sleep(LOOK),
                -1 if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
                -1 => return Err(InjectError::Io { doing, pid, source: io::Error::last_os_error() }),
                _ if libc::WIFSTOPPED(status) => return Ok(()),
                _ => {
                    self.seized = false;
                    return Err(InjectError::Ended { pid });
                }
            }
        }
    }

    fn read_registers(&self) -> Result<user_regs_struct, InjectError> {
        let pid = self.pid;
        // SAFETY: registers are plain numbers, for which all bits zero are a value.
        let mut registers: user_regs_struct = unsafe { std::mem::zeroed() };
        ptrace(libc::PTRACE_GETREGS, pid, 0, (&raw mut registers).cast()).map_err(|source| InjectError::Io {
            doing: "read registers",
            pid,
            source,
        })?;
        Ok(registers)
    }

    fn write_registers(&self, mut registers: user_regs_struct) -> Result<(), InjectError> {
        let pid = self.pid;
        ptrace(libc::PTRACE_SETREGS, pid, 0, (&raw mut registers).cast()).map(drop).map_err(|source| InjectError::Io {
            doing: "write registers",
            pid,
            source,
        })
    }

    /// The kernel's signal set is 64 bits on x86-64.
    fn signal_mask(&self, request: libc::c_uint, mut mask: u64, doing: &'static str) -> Result<u64, InjectError> {
        let pid = self.pid;
        ptrace(request, pid, size_of::<u64>(), (&raw mut mask).cast()).map_err(|source| InjectError::Io {
            doing,
            pid,
            source,
        })?;
        Ok(mask)
    }

    /// Has the thread make one system call; what the kernel returned, -errno where it failed.
    fn call(&mut self, at: u64, number: c_long, [first, second, third]: [u64; 3]) -> Result<i64, InjectError> {
        let registers = user_regs_struct {
            rip: at,
            rax: number as u64,
            // No call that was interrupted here is to be made again.
            orig_rax: u64::MAX,
            rdi: first,
            rsi: second,
            rdx: third,
            ..self.registers
        };
        self.write_registers(registers)?;
        self.step(libc::PTRACE_SINGLESTEP, "make a system call")?;
        Ok(self.read_registers()?.rax as i64)
    }

    /// Lets the thread go on where it was; the call it was in, if any, is made again by the kernel.
    fn let_go(mut self) -> Result<(), InjectError> {
        self.put_back()
    }

    fn put_back(&mut self) -> Result<(), InjectError> {
        let pid = self.pid;
        if !std::mem::take(&mut self.seized) {
            return Ok(());
        }
        if std::mem::take(&mut self.held) {
            self.write_registers(self.registers)?;
            self.signal_mask(libc::PTRACE_SETSIGMASK, self.mask, "restore a signal mask")?;
        }
        ptrace(libc::PTRACE_DETACH, pid, 0, std::ptr::null_mut()).map(drop).map_err(|source| InjectError::Io {
            doing: "let a thread go",
            pid,
            source,
        })
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // What is wrong is told by whoever made it go wrong; a thread that is gone needs nothing put back.
        let _ = self.put_back();
    }
}

/// Whether somebody traces the process now.
fn traced(pid: i32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status.lines().any(|line| line.strip_prefix("TracerPid:").is_some_and(|tracer| tracer.trim() != "0"))
}
