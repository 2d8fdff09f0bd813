//! userfaultfd(2), on the kernel's own types.
//!
//! Rules of this room:
//! * **MINOR is never registered without MISSING** (P1): a hole in the file would read as zeroes, silently. [`Faults`] has
//!   no such value.
//! * The descriptor belongs to the address space that made it. A page server holds a duplicate of the VMM's; all addresses
//!   are then the VMM's.
//! * Every page that is installed may already be there (EEXIST, benign: whoever waits is woken); the address space may be
//!   changing (EAGAIN with nothing done: read the events, then try again); it may be gone (ESRCH, ENOENT); the frame may be
//!   gone (EFAULT of CONTINUE: a hole was punched). Each is a value of [`Stop`], not an error, because the engine has a rule
//!   for each.

mod abi;
mod event;

pub use abi::Features;
pub use event::{Event, FaultKind};

use crate::units::PageSize;
use abi::Message;
use linux_raw_sys::general as raw;
use rustix::io::Errno;
use std::ffi::c_void;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Messages taken by one read(2).
const BATCH: usize = 32;

/// Whose faults a userfaultfd may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenMode {
    /// Faults raised in user mode and in the kernel (KVM, system calls). Needs root, /dev/userfaultfd, or
    /// vm.unprivileged_userfaultfd=1.
    All,
    /// Faults raised in user mode only; any user may.
    UserModeOnly,
}

/// Which faults a registered range reports. MINOR alone does not exist here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Faults {
    /// Only write-protect faults, or none.
    None,
    /// Pages without a frame.
    Missing,
    /// Pages without a frame, and pages whose frame has not been shown yet.
    MissingAndMinor,
}

/// How a range is registered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegisterModes {
    pub faults: Faults,
    pub write_protect: bool,
}

/// Where an installing call ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// All of it is there.
    Done,
    /// The address space is changing: events have to be read first, then the rest tried again.
    EventsPending,
    /// CONTINUE only: the file has a hole at this point.
    NoFrame,
    /// The process or its mapping is gone.
    Gone,
}

/// What an installing call did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Installed {
    /// Bytes from the start that are in place now.
    pub bytes: u64,
    /// Bytes among them that were there before (EEXIST).
    pub present: u64,
    /// Why it ended there.
    pub stop: Stop,
}

impl Installed {
    /// Whether all bytes are in place.
    pub fn done(&self) -> bool {
        self.stop == Stop::Done
    }
}

/// Why a userfaultfd operation failed.
#[derive(Debug, thiserror::Error)]
pub enum UffdError {
    #[error(
        "no permission for a userfaultfd that also holds faults raised in the kernel, as KVM needs; run as root, give this \
         user /dev/userfaultfd, or `sysctl vm.unprivileged_userfaultfd=1`"
    )]
    NoPermission(#[source] io::Error),
    #[error("this kernel's userfaultfd lacks {missing} (asked for: {asked}; it has: {has})")]
    MissingFeatures { asked: Features, has: Features, missing: Features },
    #[error("the registered range {start:#x}+{len:#x} does not take {what} (its ioctls are {ioctls:#x})")]
    NotPossible { start: u64, len: u64, what: &'static str, ioctls: u64 },
    #[error("range {start:#x}+{len:#x} is already registered with another userfaultfd")]
    Busy { start: u64, len: u64 },
    #[error("the process forked with a registered mapping: the child's faults would be nobody's")]
    Forked,
    #[error("userfaultfd sent event {event:#x}, which was never asked for")]
    UnknownEvent { event: u32 },
    #[error("userfaultfd {doing}")]
    Io {
        doing: String,
        #[source]
        source: io::Error,
    },
}

fn failed(doing: impl Into<String>) -> impl FnOnce(Errno) -> UffdError {
    let doing = doing.into();
    move |errno| UffdError::Io { doing, source: errno.into() }
}

/// A userfaultfd of this process or, by a received descriptor, of another.
#[derive(Debug)]
pub struct Uffd {
    fd: OwnedFd,
}

impl Uffd {
    /// A new userfaultfd of this process with exactly the `asked` features, non-blocking.
    pub fn open(mode: OpenMode, asked: Features) -> Result<Self, UffdError> {
        // UFFDIO_API can be used once a descriptor: a first one is asked what the kernel has.
        let has = api(&create(mode)?, Features::NONE)?;
        let missing = asked.missing_from(has);
        if missing != Features::NONE {
            return Err(UffdError::MissingFeatures { asked, has, missing });
        }
        let fd = create(mode)?;
        api(&fd, asked)?;
        Ok(Self { fd })
    }

    /// What the kernel has.
    pub fn supported(mode: OpenMode) -> Result<Features, UffdError> {
        api(&create(mode)?, Features::NONE)
    }

    /// A userfaultfd received from the process it belongs to; its features were negotiated there. It is made non-blocking.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, UffdError> {
        let flags = rustix::fs::fcntl_getfl(&fd).map_err(failed("F_GETFL"))?;
        rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK).map_err(failed("F_SETFL"))?;
        Ok(Self { fd })
    }

    /// A userfaultfd that another process has just made, and with which nothing was done yet: the features are negotiated here. It is
    /// made non-blocking.
    pub fn from_fresh_fd(fd: OwnedFd, asked: Features) -> Result<Self, UffdError> {
        let missing = asked.missing_from(Self::supported(OpenMode::UserModeOnly)?);
        if missing != Features::NONE {
            return Err(UffdError::MissingFeatures { asked, has: Features(asked.0 & !missing.0), missing });
        }
        let uffd = Self::from_fd(fd)?;
        api(&uffd.fd, asked)?;
        Ok(uffd)
    }

    /// Another descriptor of the same userfaultfd.
    pub fn try_clone(&self) -> Result<Self, UffdError> {
        let fd = self.fd.try_clone().map_err(|source| UffdError::Io { doing: "dup".into(), source })?;
        Ok(Self { fd })
    }

    /// Registers `start..start + len` and makes sure that what its modes promise can be done there.
    pub fn register(&self, start: u64, len: u64, modes: RegisterModes) -> Result<(), UffdError> {
        let mut mode = match modes.faults {
            Faults::None => 0,
            Faults::Missing => raw::UFFDIO_REGISTER_MODE_MISSING,
            Faults::MissingAndMinor => raw::UFFDIO_REGISTER_MODE_MISSING | raw::UFFDIO_REGISTER_MODE_MINOR,
        };
        if modes.write_protect {
            mode |= raw::UFFDIO_REGISTER_MODE_WP;
        }
        let range = raw::uffdio_range { start, len };
        let mut argument = raw::uffdio_register { range, mode: u64::from(mode), ioctls: 0 };
        ioctl(&self.fd, abi::UFFDIO_REGISTER, &mut argument).map_err(|errno| match errno {
            Errno::BUSY => UffdError::Busy { start, len },
            other => failed(format!("register {start:#x}+{len:#x} with {modes:?}"))(other),
        })?;
        let able = |ioctl: u32| argument.ioctls >> ioctl & 1 == 1;
        let (minor, missing) = (modes.faults == Faults::MissingAndMinor, modes.faults != Faults::None);
        let needs = [
            (minor, raw::_UFFDIO_CONTINUE, "CONTINUE"),
            (missing, raw::_UFFDIO_COPY, "COPY"),
            (modes.write_protect, raw::_UFFDIO_WRITEPROTECT, "WRITEPROTECT"),
        ];
        match needs.iter().find(|(needed, ioctl, _)| *needed && !able(*ioctl)) {
            None => Ok(()),
            Some((_, _, what)) => {
                self.unregister(start, len)?;
                Err(UffdError::NotPossible { start, len, what, ioctls: argument.ioctls })
            }
        }
    }

    /// Ends the registration of a range; whoever waits there is woken and takes the kernel's ordinary path.
    pub fn unregister(&self, start: u64, len: u64) -> Result<(), UffdError> {
        let mut range = raw::uffdio_range { start, len };
        ioctl(&self.fd, abi::UFFDIO_UNREGISTER, &mut range).map_err(failed(format!("unregister {start:#x}+{len:#x}")))
    }

    /// Shows the file's frames at `start..start + len`, write-protected if `protect` (so that they arrive clean).
    #[inline]
    pub fn continue_range(&self, start: u64, len: u64, page: PageSize, protect: bool) -> Result<Installed, UffdError> {
        let mode = if protect { abi::UFFDIO_CONTINUE_MODE_WP } else { 0 };
        self.install("continue", start, len, page, |start, len| {
            let range = raw::uffdio_range { start, len };
            let mut argument = raw::uffdio_continue { range, mode, mapped: 0 };
            let outcome = ioctl(&self.fd, abi::UFFDIO_CONTINUE, &mut argument);
            (outcome, argument.mapped)
        })
    }

    /// Copies `len` bytes from `source` of *this* process to `start` of the registered address space.
    ///
    /// # Safety
    /// `source` must be readable for `len` bytes. (A wild address would be an EFAULT and not a fault of ours, but bytes
    /// nobody meant to show would reach the guest.)
    #[inline]
    pub unsafe fn copy(
        &self,
        start: u64,
        source: *const c_void,
        len: u64,
        page: PageSize,
        protect: bool,
    ) -> Result<Installed, UffdError> {
        let mode = if protect { u64::from(raw::UFFDIO_COPY_MODE_WP) } else { 0 };
        self.install("copy", start, len, page, |at, len| {
            let src = source as u64 + (at - start);
            let mut argument = raw::uffdio_copy { dst: at, src, len, mode, copy: 0 };
            let outcome = ioctl(&self.fd, abi::UFFDIO_COPY, &mut argument);
            (outcome, argument.copy)
        })
    }

    /// Puts zero pages where there is no frame. Counts as written. Not for hugetlbfs (the kernel has no such thing there).
    #[inline]
    pub fn zeropage(&self, start: u64, len: u64) -> Result<Installed, UffdError> {
        self.install("zeropage", start, len, PageSize::Small, |start, len| {
            let range = raw::uffdio_range { start, len };
            let mut argument = raw::uffdio_zeropage { range, mode: 0, zeropage: 0 };
            let outcome = ioctl(&self.fd, abi::UFFDIO_ZEROPAGE, &mut argument);
            (outcome, argument.zeropage)
        })
    }

    /// The loop all three share: goes on after partial progress, steps over pages that are there already.
    #[inline]
    fn install(
        &self,
        doing: &str,
        start: u64,
        len: u64,
        page: PageSize,
        mut call: impl FnMut(u64, u64) -> (Result<(), Errno>, i64),
    ) -> Result<Installed, UffdError> {
        let (mut bytes, mut present) = (0, 0);
        let stop = loop {
            if bytes == len {
                break Stop::Done;
            }
            let (outcome, progress) = call(start + bytes, len - bytes);
            match outcome {
                Ok(()) => bytes = len,
                // EAGAIN with progress: that much is done and woken; the error at the next page comes with the next call.
                Err(Errno::AGAIN) if progress > 0 => bytes += progress as u64,
                Err(Errno::AGAIN) => break Stop::EventsPending,
                Err(Errno::EXIST) => {
                    self.wake(start + bytes, page.bytes() as u64)?;
                    bytes += page.bytes() as u64;
                    present += page.bytes() as u64;
                }
                Err(Errno::FAULT) if doing == "continue" => break Stop::NoFrame,
                Err(Errno::SRCH | Errno::NOENT) => break Stop::Gone,
                Err(Errno::INTR) => {}
                Err(other) => return Err(failed(format!("{doing} {:#x}+{:#x}", start + bytes, len - bytes))(other)),
            }
        };
        Ok(Installed { bytes, present, stop })
    }

    /// Lets every thread that waits in a range look again.
    pub fn wake(&self, start: u64, len: u64) -> Result<(), UffdError> {
        let mut range = raw::uffdio_range { start, len };
        match ioctl(&self.fd, abi::UFFDIO_WAKE, &mut range) {
            // A process that is gone has nobody to wake.
            Ok(()) | Err(Errno::SRCH | Errno::NOENT) => Ok(()),
            Err(errno) => Err(failed(format!("wake {start:#x}+{len:#x}"))(errno)),
        }
    }

    /// Write-protects a range, or lifts the protection and wakes. [`Stop::EventsPending`] and [`Stop::Gone`] as elsewhere.
    pub fn writeprotect(&self, start: u64, len: u64, protect: bool) -> Result<Stop, UffdError> {
        let mode = if protect { abi::UFFDIO_WRITEPROTECT_MODE_WP } else { 0 };
        let range = raw::uffdio_range { start, len };
        let mut argument = raw::uffdio_writeprotect { range, mode };
        match ioctl(&self.fd, abi::UFFDIO_WRITEPROTECT, &mut argument) {
            Ok(()) => Ok(Stop::Done),
            Err(Errno::AGAIN) => Ok(Stop::EventsPending),
            Err(Errno::SRCH | Errno::NOENT) => Ok(Stop::Gone),
            Err(errno) => Err(failed(format!("writeprotect {start:#x}+{len:#x}"))(errno)),
        }
    }

    /// Takes what events there are, without waiting and without allocating; their number (0: none).
    #[inline]
    pub fn read_events(&self, into: &mut [Event]) -> Result<usize, UffdError> {
        let mut messages: [Message; BATCH] = [[0; 4]; BATCH];
        let room = into.len().min(BATCH) * size_of::<Message>();
        if room == 0 {
            return Ok(0);
        }
        // SAFETY: the buffer is writable for `room` bytes, and any bytes the kernel puts there are valid u64s.
        let got = unsafe { libc::read(self.fd.as_raw_fd(), messages.as_mut_ptr().cast(), room) };
        let Ok(got) = usize::try_from(got) else {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(0),
                _ => Err(UffdError::Io { doing: "read".into(), source: error }),
            };
        };
        let count = got / size_of::<Message>();
        for (event, message) in into.iter_mut().zip(&messages[..count]) {
            *event = Event::parse(message)?;
        }
        Ok(count)
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A bare userfaultfd: from /dev/userfaultfd where it may be opened, else by the system call.
fn create(mode: OpenMode) -> Result<OwnedFd, UffdError> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    if mode == OpenMode::All
        && let Ok(device) = std::fs::File::open("/dev/userfaultfd")
    {
        // SAFETY: USERFAULTFD_IOC_NEW takes its flags by value and touches no memory of ours.
        let fd = unsafe { libc::ioctl(device.as_raw_fd(), u64::from(abi::USERFAULTFD_IOC_NEW), flags) };
        return owned(fd.into()).map_err(failed("USERFAULTFD_IOC_NEW"));
    }
    let flags = match mode {
        OpenMode::All => flags,
        OpenMode::UserModeOnly => flags | raw::UFFD_USER_MODE_ONLY as i32,
    };
    // SAFETY: userfaultfd(2) takes its flags by value and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    owned(fd).map_err(|errno| match errno {
        Errno::PERM => UffdError::NoPermission(errno.into()),
        other => failed("userfaultfd(2)")(other),
    })
}

fn owned(fd: i64) -> Result<OwnedFd, Errno> {
    match i32::try_from(fd) {
        // SAFETY: the kernel just made this descriptor and nobody else has it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(last_errno()),
    }
}

fn api(fd: &OwnedFd, asked: Features) -> Result<Features, UffdError> {
    let mut argument = raw::uffdio_api { api: u64::from(raw::UFFD_API), features: asked.0, ioctls: 0 };
    ioctl(fd, abi::UFFDIO_API, &mut argument).map_err(failed(format!("UFFDIO_API with {asked}")))?;
    Ok(Features(argument.features))
}

/// One UFFDIO_ ioctl. `T` is the type its number was made from.
#[inline]
fn ioctl<T>(fd: &OwnedFd, request: u32, argument: &mut T) -> Result<(), Errno> {
    // SAFETY: every caller pairs a request with the kernel's own struct for it (sizes asserted in abi.rs); the struct is
    // plain data and writable.
    let outcome = unsafe { libc::ioctl(fd.as_raw_fd(), u64::from(request), std::ptr::from_mut(argument)) };
    if outcome == 0 { Ok(()) } else { Err(last_errno()) }
}

fn last_errno() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests;
