//! The door of a VMM: where a page server comes in when the one before it has died.
//!
//! ```text
//! new page server                      VMM's process
//!   connect(vmm-PID.door)  ─────────▶  uid checked; the first frame must be TakeOver, within a bound
//!   TakeOver { version }   ─────────▶  is the seat free? the one who had it must have *ended*, all of it
//!   ◀───────────────────── Estate      what there is: guest, userfaultfds, what was laid down   (or: taken, and by whom)
//!   GuestRam, Userfaultfd…, Kept…      one descriptor an answer
//!   Replay                 ─────────▶  output that has not left, then what comes
//! ```
//! Rules of this room:
//! * One page server at a time. The seat is free only when the pidfd of the one who had it says that no thread of it runs: until then a
//!   READ of its may still land in guest RAM. A server that is frozen, or that merely closed its socket, keeps the seat.
//! * The socket is 0600 in a directory of this user's, and whoever comes must be this user or root.
//! * Whatever a caller does costs one thread at most [`KNOCK_BOUND`], and never the guest anything.

use super::{Answer, Ask, FromClient, FromVmm, VERSION, WireError, frame};
use crate::guard::{is_ending, proof_of_death};
use belay_transport::Deadline;
use crossbeam_channel::{Receiver, Sender, bounded};
use rustix::fs::{AtFlags, CWD, Mode, chmodat};
use rustix::net::sockopt::socket_peercred;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// Longest that a caller may take for its first words.
const KNOCK_BOUND: Duration = Duration::from_secs(2);
/// Longest first words.
const KNOCK_BYTES: usize = 64;
/// Longest that anything may take to be written to a client.
const WRITE_BOUND: Duration = Duration::from_secs(10);

/// A page server's process.
pub(crate) struct Holder {
    pid: i32,
    /// `None`: it had ended before it could be looked at.
    pidfd: Option<OwnedFd>,
}

impl Holder {
    /// The process at the other end of `stream`, as the kernel noted it when the two were joined.
    pub(crate) fn of(stream: &UnixStream) -> io::Result<Self> {
        let pid = socket_peercred(stream)?.pid;
        match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => Ok(Self { pid: pid.as_raw_nonzero().get(), pidfd: Some(pidfd) }),
            Err(rustix::io::Errno::SRCH) => Ok(Self { pid: pid.as_raw_nonzero().get(), pidfd: None }),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Whether none of its threads runs any more.
    fn has_ended(&self) -> bool {
        self.ends_by(Deadline::after(Duration::ZERO))
    }

    /// As [`Holder::has_ended`], waiting for it.
    pub(crate) fn ends_by(&self, deadline: Deadline) -> bool {
        self.pidfd.as_ref().is_none_or(|pidfd| proof_of_death(pidfd, deadline).unwrap_or(false))
    }
}

/// Who has the seat.
struct Seat {
    holder: Holder,
    /// Its socket has closed.
    left: bool,
}

/// One that was let in: its socket, and the number of its request, which is to be answered with the estate.
pub(crate) struct Caller {
    pub(crate) stream: UnixStream,
    pub(crate) id: u64,
}

impl Caller {
    /// Tells it that it has the seat, and nothing else: the socket, for whatever the two say to each other then.
    pub(crate) fn welcome(self) -> io::Result<UnixStream> {
        frame::send(&self.stream, &FromVmm::Answer { id: self.id, result: Ok(Answer::Done) }, None)?;
        Ok(self.stream)
    }
}

/// An open door. Its socket is taken away when it is dropped.
pub(crate) struct Door {
    path: PathBuf,
    listener: Arc<UnixListener>,
    seat: Arc<Mutex<Seat>>,
    callers: Receiver<Caller>,
    thread: Option<JoinHandle<()>>,
}

/// What VMMs are whose doors are in one directory: the beginning of a door's name.
pub(crate) const VMM: &str = "vmm";

/// The name of the door of process `pid`.
pub(crate) fn name(kind: &str, pid: u32) -> String {
    format!("{kind}-{pid}.door")
}

impl Door {
    /// Opens the one called `name` in `directory`, which is made if it is not there, with `holder` in the seat.
    pub(crate) fn open(directory: &Path, name: &str, holder: Holder) -> io::Result<Self> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        let own = rustix::process::geteuid();
        let owner = std::fs::metadata(directory)?;
        if owner.uid() != own.as_raw() || owner.mode() & 0o022 != 0 && owner.mode() & 0o1000 == 0 {
            let (path, uid, mode) = (directory.display(), owner.uid(), owner.mode() & 0o7777);
            return Err(io::Error::other(format!(
                "{path} belongs to uid {uid} with mode {mode:o}: others could put a door of their own there"
            )));
        }
        let path = directory.join(name);
        let listener = bind(&path)?;
        let seat = Arc::new(Mutex::new(Seat { holder, left: false }));
        let (tell, callers) = bounded(1);
        let (listener, own_seat) = (Arc::new(listener), Arc::clone(&seat));
        let listening = Arc::clone(&listener);
        let thread = std::thread::Builder::new()
            .name("vmm-door".into())
            .spawn(move || answer_callers(&listening, &own_seat, &tell))?;
        Ok(Self { path, listener, seat, callers, thread: Some(thread) })
    }

    /// The client's socket has closed: the seat is free once its process has ended.
    pub(crate) fn has_left(&self) {
        self.seat.lock().unwrap_or_else(PoisonError::into_inner).left = true;
    }

    /// Waits for the next page server.
    pub(crate) fn next(&self, deadline: Deadline) -> Option<Caller> {
        self.callers.recv_deadline(deadline.instant()).ok()
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
        // Wakes the accept(2).
        let _ = rustix::net::shutdown(&*self.listener, rustix::net::Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A socket of mode 0600 from before anybody can connect to it. One that a dead process of the same number left is replaced.
fn bind(path: &Path) -> io::Result<UnixListener> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    let address = SocketAddrUnix::new(path)?;
    match rustix::net::bind(&socket, &address) {
        // Our own number: nobody else can be listening there.
        Err(rustix::io::Errno::ADDRINUSE) => {
            std::fs::remove_file(path)?;
            rustix::net::bind(&socket, &address)?;
        }
        bound => bound?,
    }
    chmodat(CWD, path, Mode::RUSR | Mode::WUSR, AtFlags::empty())?;
    rustix::net::listen(&socket, 8)?;
    Ok(socket.into())
}

fn answer_callers(listener: &UnixListener, seat: &Mutex<Seat>, tell: &Sender<Caller>) {
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            // Out of descriptors: the caller stays in the backlog.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM)) => {
                std::thread::sleep(Duration::from_millis(100));
                continue;
            }
            // The door was taken away.
            Err(_) => return,
        };
        if let Some((caller, holder)) = hear(stream, seat) {
            // One place in the channel: it is taken before the seat can be free again.
            *seat.lock().unwrap_or_else(PoisonError::into_inner) = Seat { holder, left: false };
            if tell.send(caller).is_err() {
                return;
            }
        }
    }
}

/// The version that a caller speaks, if `ask` is its knock. Until version 2 a knock had the number that [`Ask::GiveSign`] has now, which
/// nobody begins with: a page server of then is refused by its version too.
pub(super) fn version_of_knock(ask: &Ask) -> Option<u16> {
    match ask {
        Ask::TakeOver { version } => Some(*version),
        Ask::GiveSign { slot: version @ ..=2 } => Some(*version as u16),
        _ => None,
    }
}

/// Hears what a caller wants; gives it if it may come in, and has answered it if it may not.
fn hear(stream: UnixStream, seat: &Mutex<Seat>) -> Option<(Caller, Holder)> {
    let peer = socket_peercred(&stream).ok()?;
    if peer.uid != rustix::process::geteuid() && !peer.uid.is_root() {
        return None;
    }
    stream.set_write_timeout(Some(WRITE_BOUND)).ok()?;
    let knock = frame::receive_within(&stream, KNOCK_BYTES, Some(Deadline::after(KNOCK_BOUND)));
    let Ok(Some((FromClient::Request { id, ask }, _))) = knock else { return None };
    let version = version_of_knock(&ask)?;
    let refuse = |error: WireError| {
        // It may have gone again, which is as well.
        let _ = frame::send(&stream, &FromVmm::Answer { id, result: Err::<Answer, _>(error) }, None);
    };
    if version != VERSION {
        refuse(WireError::BadState(format!("the page server speaks version {version}, this VMM {VERSION}")));
        return None;
    }
    let (pid, left, free) = {
        let Seat { holder, left } = &*seat.lock().unwrap_or_else(PoisonError::into_inner);
        let ended = holder.has_ended();
        // On its way out: its socket closes only when its address space is gone.
        (holder.pid, *left || ended || is_ending(holder.pid), *left && ended)
    };
    if !free {
        refuse(WireError::Taken { pid, left });
        return None;
    }
    let holder = Holder::of(&stream).ok()?;
    stream.set_read_timeout(None).ok()?;
    Some((Caller { stream, id }, holder))
}

/// Whether the process `pid` could be asked for by its door: for those who look for doors.
pub(crate) fn process_of(path: &Path, kind: &str) -> Option<Pid> {
    let name = path.file_name()?.to_str()?;
    let pid = name.strip_prefix(kind)?.strip_prefix('-')?.strip_suffix(".door")?;
    Pid::from_raw(pid.parse().ok()?)
}
