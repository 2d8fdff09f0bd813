//! The relay itself: what it holds, and what its page server may have it do. One lock over all of it; a thread for each who is connected.

use super::client;
use super::hand::served;
use super::image::{Image, ImageError};
use super::log::{self, Entry, Part};
use super::overlay::Overlay;
use crate::qemu::relay::{Listener, RelayError, failed};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::socket_peercred;
use std::collections::BTreeMap;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// What one epoch may hold before the guest waits for its checkpoint.
const OPEN_BYTES: u64 = 16 << 20;
/// What lies over the image at most before the guest waits for the source.
const HELD_BYTES: u64 = 256 << 20;
/// What one epoch may hold at the very most, with what the guest had under way when it was stopped: what a record needs room for. More is
/// not taken, and the stop fails.
pub const MOST_LOG_BYTES: u64 = 64 << 20;
/// QEMUs connected at a time: the guest's, its standby, and some that look.
const MOST_CLIENTS: usize = 8;
/// Who wants the hand at a time.
const MOST_HANDS: usize = 4;
/// Between two tries to become the one who writes the image.
const OWN_AGAIN: Duration = Duration::from_millis(200);

/// Where a relay stands; see [the table](super).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    Waiting,
    Open,
    Away,
    Covered,
}

/// Hears of each change.
pub type Told = Box<dyn Fn(Place, &str) + Send + Sync>;

pub(super) enum Mode {
    Waiting,
    Open(Image),
    Away(Image),
    Covered(Covered),
}

/// What lies over the image.
#[derive(Default)]
pub(super) struct Covered {
    pub overlay: Overlay,
    /// The guest is this host's own, and the image is to become it: open already, where only writing it failed.
    own: Option<Option<Image>>,
}

pub(super) struct Core {
    pub mode: Mode,
    /// Process whose writes are taken: the guest's QEMU.
    pub writer: Option<u32>,
    /// Who is connected, by number, and their processes.
    pub clients: BTreeMap<u64, (u32, UnixStream)>,
    /// Number and process of the page server that has the hand.
    pub hand: Option<(u64, u32)>,
    hands: BTreeMap<u64, UnixStream>,
    /// The guest is being stopped, or stands: all that it had sent is let in.
    pub standing: bool,
    next: u64,
}

pub(super) struct Shared {
    pub core: Mutex<Core>,
    /// Something changed that a guest may wait for.
    pub changed: Condvar,
    pub name: String,
    pub socket: String,
    pub disk_bytes: u64,
    /// The storage as it is, whoever writes it.
    pub storage: Image,
    path: PathBuf,
    told: Told,
}

/// A relay that listens for QEMU and for page servers.
pub struct DiskRelay {
    guests: Listener,
    hands: Listener,
    shared: Arc<Shared>,
}

impl DiskRelay {
    /// Serves the image under this name. `incoming`: it is another host's, from which a guest is to come.
    pub fn new(
        guest: &Path,
        hand: &Path,
        (image, name): (&Path, &str),
        incoming: bool,
        told: Told,
    ) -> Result<Self, RelayError> {
        let unusable = |error: ImageError| RelayError::Image(Box::new(error));
        let storage = Image::reader(image).map_err(unusable)?;
        let mode = match incoming {
            true => Mode::Waiting,
            false => Mode::Open(Image::writer(image).map_err(unusable)?),
        };
        let guests = Listener::bind(guest)?;
        let core = Core {
            mode,
            writer: None,
            clients: BTreeMap::new(),
            hand: None,
            hands: BTreeMap::new(),
            standing: false,
            next: 1,
        };
        let shared = Shared {
            core: Mutex::new(core),
            changed: Condvar::new(),
            name: name.to_owned(),
            socket: std::path::absolute(guest).map_err(failed("find a path"))?.display().to_string(),
            disk_bytes: storage.bytes(),
            storage,
            path: image.to_owned(),
            told,
        };
        Ok(Self { guests, hands: Listener::bind(hand)?, shared: Arc::new(shared) })
    }

    /// Serves until `stop` is readable. What lies over the image then is lost with the process.
    pub fn run(&self, stop: BorrowedFd<'_>) -> Result<(), RelayError> {
        let tick = Timespec::try_from(OWN_AGAIN).expect("a short time");
        loop {
            let mut fds = [
                PollFd::new(&stop, PollFlags::IN),
                PollFd::from_borrowed_fd(self.guests.socket.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(self.hands.socket.as_fd(), PollFlags::IN),
            ];
            match poll(&mut fds, Some(&tick)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(failed("wait for anything to happen")(errno.into())),
            }
            let ready = fds.map(|fd| !fd.revents().is_empty());
            if ready[0] {
                return Ok(());
            }
            if ready[1] {
                self.accept(&self.guests, true)?;
            }
            if ready[2] {
                self.accept(&self.hands, false)?;
            }
            self.own_again();
        }
    }

    fn accept(&self, listener: &Listener, is_guest: bool) -> Result<(), RelayError> {
        let stream = match listener.socket.accept() {
            Ok((stream, _)) => stream,
            // Who came has gone again, or there are no descriptors for now.
            Err(_) => return Ok(()),
        };
        let io = failed("take in who came");
        let begun = stream.set_nonblocking(false).and_then(|()| {
            let pid = socket_peercred(&stream)?.pid.as_raw_nonzero().get() as u32;
            Ok((pid, stream.try_clone()?))
        });
        let (pid, again) = begun.map_err(io)?;
        let number = {
            let mut core = self.shared.lock();
            let many = if is_guest { core.clients.len() >= MOST_CLIENTS } else { core.hands.len() >= MOST_HANDS };
            if many {
                return Ok(());
            }
            let number = core.next;
            core.next += 1;
            match is_guest {
                true => drop(core.clients.insert(number, (pid, again))),
                false => drop(core.hands.insert(number, again)),
            }
            number
        };
        let shared = Arc::clone(&self.shared);
        let serve = move || {
            match is_guest {
                true => client::serve(&shared, stream, pid),
                false => served(&shared, stream, (number, pid)),
            }
            shared.gone(number);
        };
        let name = if is_guest { "disk-guest" } else { "disk-hand" };
        std::thread::Builder::new().name(name.into()).spawn(serve).map(drop).map_err(failed("start a thread"))
    }

    /// A relay whose guest is this host's own tries until it has the image.
    fn own_again(&self) {
        let mut core = self.shared.lock();
        if matches!(&core.mode, Mode::Covered(covered) if covered.own.is_some()) {
            // Why not was told when it was asked for first.
            let _ = self.shared.own(&mut core);
        }
    }
}

impl Drop for DiskRelay {
    fn drop(&mut self) {
        let core = self.shared.lock();
        for stream in core.clients.values().map(|(_, stream)| stream).chain(core.hands.values()) {
            let _ = stream.shutdown(Shutdown::Both);
        }
        drop(core);
        self.shared.changed.notify_all();
    }
}

impl Core {
    pub(super) fn place(&self) -> Place {
        match self.mode {
            Mode::Waiting => Place::Waiting,
            Mode::Open(_) => Place::Open,
            Mode::Away(_) => Place::Away,
            Mode::Covered(_) => Place::Covered,
        }
    }

    /// Whether this process's writes are the guest's. The first who writes is; another only once no connection of that one is left.
    pub(super) fn is_writer(&mut self, pid: u32) -> bool {
        let has = |writer| self.clients.values().any(|(pid, _)| *pid == writer);
        if self.writer.is_none_or(|writer| writer != pid && !has(writer)) {
            self.writer = Some(pid);
        }
        self.writer == Some(pid)
    }

    /// Whether a guest that came may write that much more now (P7).
    pub(super) fn has_room(&self, covered: &Overlay) -> bool {
        let open = covered.open_bytes();
        match self.standing {
            true => open < MOST_LOG_BYTES,
            false => open < OPEN_BYTES && covered.held_bytes() < HELD_BYTES,
        }
    }
}

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn wait<'c>(&self, core: MutexGuard<'c, Core>, bound: Duration) -> MutexGuard<'c, Core> {
        self.changed.wait_timeout(core, bound).unwrap_or_else(PoisonError::into_inner).0
    }

    fn gone(&self, number: u64) {
        let mut core = self.lock();
        core.clients.remove(&number);
        core.hands.remove(&number);
        let had = core.hand.is_some_and(|(hand, _)| hand == number);
        if had {
            core.hand = None;
            core.standing = false;
            let why = match core.mode {
                Mode::Covered(Covered { own: None, .. }) => {
                    "the page server has gone without letting go: the guest's disk waits"
                }
                _ => "the page server has gone without letting go",
            };
            (self.told)(core.place(), why);
        }
        drop(core);
        self.changed.notify_all();
    }

    fn turn_into(&self, core: &mut Core, mode: Mode, why: &str) {
        core.mode = mode;
        (self.told)(core.place(), why);
        self.changed.notify_all();
    }

    /// The guest of this process is to leave.
    pub(super) fn attach_leaving(&self, core: &mut Core, guest: u32) -> Result<(), String> {
        let is_writer = core.is_writer(guest);
        match core.mode {
            Mode::Away(_) => Ok(()),
            Mode::Open(_) if is_writer => Ok(()),
            Mode::Open(_) => Err(format!("the guest of process {} runs here", core.writer.unwrap_or(0))),
            Mode::Waiting | Mode::Covered(_) => Err("no guest of this host's writes its image".to_owned()),
        }
    }

    /// A guest is to come to this process. What lies over the image is kept for one that is here already.
    pub(super) fn attach_arriving(&self, core: &mut Core, guest: u32) -> Result<(), String> {
        match &core.mode {
            Mode::Covered(_) if core.writer == Some(guest) => return Ok(()),
            Mode::Covered(Covered { own: Some(_), .. }) => {
                return Err("it holds writes of this host's own guest that are not in the image yet".to_owned());
            }
            Mode::Waiting | Mode::Covered(_) => {}
            Mode::Open(_) | Mode::Away(_) => {
                return Err(
                    "its image is written here; a relay that waits for a guest is started with --incoming".to_owned()
                );
            }
        }
        core.writer = Some(guest);
        self.turn_into(core, Mode::Covered(Covered::default()), "a guest is expected");
        Ok(())
    }

    /// Nothing of the guest writes from here on, and what it wrote is on the storage.
    pub(super) fn away(&self, core: &mut Core) -> Result<(), String> {
        match std::mem::replace(&mut core.mode, Mode::Waiting) {
            Mode::Open(image) | Mode::Away(image) => {
                let synced = image.sync();
                if let Err(error) = synced {
                    core.mode = Mode::Open(image);
                    return Err(format!("cannot flush the image: {error}"));
                }
                self.turn_into(core, Mode::Away(image), "the guest leaves");
            }
            // It was given up for a release that did not come about.
            Mode::Waiting => {
                let image = self.writer().map_err(|error| error.to_string())?;
                self.turn_into(core, Mode::Away(image), "the image is this host's again");
            }
            Mode::Covered(covered) => {
                core.mode = Mode::Covered(covered);
                return Err("the guest came here, and is not to leave".to_owned());
            }
        }
        Ok(())
    }

    fn writer(&self) -> Result<Image, ImageError> {
        let image = Image::writer(&self.path)?;
        if image.bytes() != self.disk_bytes {
            let (before, now) = (self.disk_bytes, image.bytes());
            return Err(ImageError::Changed { path: self.path.clone(), before, now });
        }
        Ok(image)
    }

    /// Does to the image what a committed epoch's log says.
    pub(super) fn apply(&self, core: &Core, bytes: &[u8]) -> Result<(), String> {
        let Mode::Away(image) = &core.mode else { return Err("no guest has left this host".to_owned()) };
        let log = log::decode(bytes).map_err(|error| error.to_string())?;
        if (log.name, log.disk_bytes) != (self.name.as_str(), self.disk_bytes) {
            let (here, bytes) = (&self.name, self.disk_bytes);
            return Err(format!("a log of {} with {} bytes came to {here} with {bytes}", log.name, log.disk_bytes));
        }
        image.apply(log.parts).map_err(|error| format!("cannot write {}: {error}", self.path.display()))
    }

    /// The guest goes on here, in this process.
    pub(super) fn back(&self, core: &mut Core, guest: u32) -> Result<(), String> {
        match std::mem::replace(&mut core.mode, Mode::Waiting) {
            Mode::Open(image) | Mode::Away(image) => {
                core.writer = Some(guest);
                self.turn_into(core, Mode::Open(image), "the guest runs here");
                Ok(())
            }
            other => {
                core.mode = other;
                Err("its image is not this host's".to_owned())
            }
        }
    }

    /// The guest is another host's for good, or until [`Shared::away`].
    pub(super) fn give_up(&self, core: &mut Core) -> Result<(), String> {
        match &core.mode {
            Mode::Waiting => {}
            Mode::Away(image) => {
                image.sync().map_err(|error| format!("cannot flush the image: {error}"))?;
                self.turn_into(core, Mode::Waiting, "the guest is another host's");
            }
            Mode::Open(_) | Mode::Covered(_) => return Err("the guest has not left".to_owned()),
        }
        Ok(())
    }

    /// The guest is this host's own: brings the image up to what the guest wrote, and writes it from then on. Tried again for as long as the
    /// relay runs.
    pub(super) fn own(&self, core: &mut Core) -> Result<(), String> {
        let covered = match &mut core.mode {
            Mode::Covered(covered) => covered,
            Mode::Open(_) => return Ok(()),
            Mode::Waiting | Mode::Away(_) => return Err("no guest came here".to_owned()),
        };
        let image = match covered.own.get_or_insert(None).take() {
            Some(image) => image,
            None => match self.writer() {
                Ok(image) => image,
                Err(error) => {
                    covered.own = Some(None);
                    return Err(error.to_string());
                }
            },
        };
        let parts = covered.overlay.remaining().map(|entry| match entry {
            Entry::Write { offset, data } => Part::Write { offset: *offset, data },
            Entry::Zero { offset, len } => Part::Zero { offset: *offset, len: *len },
            Entry::Flush => Part::Flush,
        });
        match image.apply(parts) {
            Ok(()) => {
                self.turn_into(core, Mode::Open(image), "the guest is this host's own, and so is the image");
                Ok(())
            }
            Err(error) => {
                // Nothing is lost: it lies over the image still, and the image is nobody else's.
                covered.own = Some(Some(image));
                Err(format!("cannot write {}: {error}", self.path.display()))
            }
        }
    }

    /// Nobody needs what a guest wrote that is not to be this host's.
    pub(super) fn let_go(&self, core: &mut Core) {
        if matches!(&core.mode, Mode::Covered(covered) if covered.own.is_none()) {
            self.turn_into(core, Mode::Waiting, "the guest is not this host's");
        }
    }

    /// Whether the guest is this host's own and its image is not yet.
    pub(super) fn wants_own(&self, core: &Core) -> bool {
        matches!(&core.mode, Mode::Covered(covered) if covered.own.is_some())
    }
}

/// What an error of the image is to its guest.
pub(super) fn told_to_guest(error: &io::Error) -> super::nbd::Failure {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            super::nbd::Failure::NoSpace
        }
        _ => super::nbd::Failure::Io,
    }
}
