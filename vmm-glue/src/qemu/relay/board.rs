//! The relay itself: one thread, one poll(2), every socket without blocking.

use super::frames::{Came, Frames, Queue};
use super::messages::{FromHand, FromRelay, VERSION};
use super::world::World;
use super::{RelayError, failed};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::net::sockopt::socket_peercred;
use std::collections::VecDeque;
use std::fs::Permissions;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Bytes that wait for a guest, at most: what comes while it stands still for a checkpoint.
const MOST_TO_GUEST_BYTES: usize = 4 << 20;
/// Bytes that wait for a page server, at most. It reads all the time; its outbox stops the guest long before.
const MOST_TO_HAND_BYTES: usize = 64 << 20;
/// QEMUs that wait until the guest's has gone, at most: a standby, and one that was started twice.
const MOST_WAITING: usize = 4;
/// Longest that one who wants the hand may take to say so.
const ATTACH_BOUND: Duration = Duration::from_secs(2);

/// Whether what the guest sends may leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    Open,
    Held,
    Shut,
}

/// What a relay has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RelayCounts {
    /// Frames of the guest's.
    pub from_guest: u64,
    /// Frames that the world was given.
    pub to_world: u64,
    pub from_world: u64,
    pub to_guest: u64,
    /// Frames for the world that found no room, or no world.
    pub dropped_to_world: u64,
    /// Frames for the guest that found no room, or no guest.
    pub dropped_to_guest: u64,
    /// Frames for the page server that found no room.
    pub dropped_to_hand: u64,
    /// Frames that came to a shut gate, from either side.
    pub dropped_at_gate: u64,
}

/// A socket with frames.
struct Link {
    stream: UnixStream,
    frames: Frames,
    queue: Queue,
}

impl Link {
    fn new(stream: UnixStream, most: usize) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { stream, frames: Frames::default(), queue: Queue::new(most) })
    }
}

/// Who has, or wants, the hand.
struct Holder {
    link: Link,
    pid: i32,
    stage: Stage,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// It has not said yet what it wants.
    Knocking(Instant),
    Attached,
    /// It has let go, and may still give what it was given before.
    LettingGo,
}

/// A relay that listens for its guest and for page servers.
pub struct Relay {
    guest_listener: Listener,
    hand_listener: Listener,
    guest: Option<Link>,
    /// The process of `guest`, as the kernel noted it.
    guest_pid: u32,
    waiting: VecDeque<UnixStream>,
    holder: Option<Holder>,
    /// What the guest sent while a page server was letting go.
    stash: Queue,
    world: World,
    gate: Gate,
    /// The guest stands still: nothing is for it now.
    settled: bool,
    counts: RelayCounts,
    dropped_told: u64,
}

/// A socket's file, taken away again at the end.
pub(in crate::qemu) struct Listener {
    pub(in crate::qemu) socket: UnixListener,
    path: PathBuf,
}

impl Listener {
    /// Binds a socket for this user alone. A file that a relay which died left is replaced; one that is served is not.
    pub(in crate::qemu) fn bind(path: &Path) -> Result<Self, RelayError> {
        let listen = |source| RelayError::Listen { path: path.to_owned(), source };
        if UnixStream::connect(path).is_ok() {
            return Err(RelayError::Served { path: path.to_owned() });
        }
        if std::fs::symlink_metadata(path).is_ok_and(|found| {
            use std::os::unix::fs::FileTypeExt;
            found.file_type().is_socket()
        }) {
            std::fs::remove_file(path).map_err(listen)?;
        }
        // Under a name of its own first: the file never stands there with other rights than 0600.
        let mut unready = path.as_os_str().to_owned();
        unready.push(format!(".{}", std::process::id()));
        let unready = PathBuf::from(unready);
        let socket = UnixListener::bind(&unready).map_err(listen)?;
        let made = std::fs::set_permissions(&unready, Permissions::from_mode(0o600))
            .and_then(|()| socket.set_nonblocking(true))
            .and_then(|()| renameat_with(CWD, &unready, CWD, path, RenameFlags::NOREPLACE).map_err(Into::into));
        made.inspect_err(|_| drop(std::fs::remove_file(&unready))).map_err(listen)?;
        Ok(Self { socket, path: path.to_owned() })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Relay {
    /// Listens for the guest's QEMU at `guest` and for page servers at `hand`.
    pub fn new(guest: &Path, hand: &Path, world: World) -> Result<Self, RelayError> {
        Ok(Self {
            guest_listener: Listener::bind(guest)?,
            hand_listener: Listener::bind(hand)?,
            guest: None,
            guest_pid: 0,
            waiting: VecDeque::new(),
            holder: None,
            stash: Queue::new(MOST_TO_HAND_BYTES),
            world,
            gate: Gate::Open,
            settled: false,
            counts: RelayCounts::default(),
            dropped_told: 0,
        })
    }

    /// What it has done.
    pub fn counts(&self) -> RelayCounts {
        self.counts
    }

    /// Relays until `stop` is readable. `changed` hears of each change of the gate, and of guests and page servers that come and go.
    pub fn run(&mut self, stop: BorrowedFd<'_>, mut changed: impl FnMut(Gate, &str)) -> Result<(), RelayError> {
        loop {
            let retry = self.world.reconnect();
            let Ready { stop: over, guest_listener, hand_listener, guest, hand, world } = self.wait(stop, retry)?;
            if over {
                return Ok(());
            }
            if guest_listener {
                self.let_guest_in(&mut changed);
            }
            // First what the guest sent: a hand's Settle then finds as little as can be.
            if guest {
                self.hear_guest(&mut changed);
            }
            if world {
                self.hear_world();
            }
            if hand {
                self.hear_hand(&mut changed);
            }
            if hand_listener {
                self.let_hand_in();
            }
            self.give_up_on_silence();
            self.flush(&mut changed);
        }
    }

    fn wait(&self, stop: BorrowedFd<'_>, retry: Option<Duration>) -> Result<Ready, RelayError> {
        let mut fds = Vec::with_capacity(6);
        fds.push(PollFd::from_borrowed_fd(stop, PollFlags::IN));
        fds.push(PollFd::from_borrowed_fd(self.guest_listener.socket.as_fd(), PollFlags::IN));
        fds.push(PollFd::from_borrowed_fd(self.hand_listener.socket.as_fd(), PollFlags::IN));
        let wish = |out: bool| if out { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
        let links = [
            self.guest.as_ref().map(|link| (link.stream.as_fd(), !self.settled && !link.queue.is_empty())),
            self.holder.as_ref().map(|one| (one.link.stream.as_fd(), !one.link.queue.is_empty())),
            self.world.interest(),
        ];
        let [guest, hand, world] = links.map(|link| {
            let (fd, out) = link?;
            fds.push(PollFd::from_borrowed_fd(fd, wish(out)));
            Some(fds.len() - 1)
        });
        let knocking = self.holder.as_ref().and_then(|holder| match holder.stage {
            Stage::Knocking(since) => Some(ATTACH_BOUND.saturating_sub(since.elapsed())),
            Stage::Attached | Stage::LettingGo => None,
        });
        let timeout = [retry, knocking].into_iter().flatten().min().map(|wait| Timespec {
            tv_sec: wait.as_secs() as i64,
            // A millisecond more, so that what is waited for is over then.
            tv_nsec: i64::from(wait.subsec_nanos().min(998_000_000)) + 1_000_000,
        });
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(failed("wait for frames")(errno.into())),
        }
        let ready = |at: usize| !fds[at].revents().is_empty();
        Ok(Ready {
            stop: ready(0),
            guest_listener: ready(1),
            hand_listener: ready(2),
            guest: guest.is_some_and(ready),
            hand: hand.is_some_and(ready),
            world: world.is_some_and(ready),
        })
    }

    fn let_guest_in(&mut self, changed: &mut impl FnMut(Gate, &str)) {
        while let Ok((stream, _)) = self.guest_listener.socket.accept() {
            if self.waiting.len() < MOST_WAITING {
                self.waiting.push_back(stream);
            }
        }
        self.next_guest(changed);
    }

    /// Lets the QEMU in that has waited longest, where there is none.
    fn next_guest(&mut self, changed: &mut impl FnMut(Gate, &str)) {
        while self.guest.is_none()
            && let Some(stream) = self.waiting.pop_front()
        {
            self.guest_pid = socket_peercred(&stream).map_or(0, |who| who.pid.as_raw_nonzero().get() as u32);
            self.guest = Link::new(stream, MOST_TO_GUEST_BYTES).ok();
            if self.guest.is_some() {
                changed(self.gate, "a guest has connected");
            }
        }
    }

    /// Reads what the guest sent, once or until nothing is left; whether the guest is still there.
    fn take_from_guest(&mut self, all: bool) -> bool {
        let Some(guest) = &mut self.guest else { return true };
        loop {
            let came = guest.frames.fill(&mut guest.stream);
            loop {
                let frame = match guest.frames.next() {
                    Ok(Some(frame)) => frame,
                    Ok(None) => break,
                    Err(_) => return false,
                };
                self.counts.from_guest += 1;
                let attached = self.holder.as_mut().filter(|holder| holder.stage == Stage::Attached);
                match (self.gate, attached) {
                    (Gate::Held, Some(holder)) => {
                        if !holder.link.queue.push(&FromRelay::Frame(frame).encode().parts()) {
                            self.counts.dropped_to_hand += 1;
                        }
                    }
                    (Gate::Held, None) => {
                        if !self.stash.push(&[frame]) {
                            self.counts.dropped_to_world += 1;
                        }
                    }
                    (Gate::Open, _) => match self.world.send(frame) {
                        true => self.counts.to_world += 1,
                        false => self.counts.dropped_to_world += 1,
                    },
                    (Gate::Shut, _) => self.counts.dropped_at_gate += 1,
                }
            }
            match came {
                Ok(Came::Bytes(_)) if all => {}
                Ok(Came::Bytes(_) | Came::Nothing) => return true,
                Ok(Came::End) | Err(_) => return false,
            }
        }
    }

    fn hear_guest(&mut self, changed: &mut impl FnMut(Gate, &str)) {
        if !self.take_from_guest(false) {
            self.guest = None;
            changed(self.gate, "the guest has gone");
            self.next_guest(changed);
        }
    }

    fn hear_world(&mut self) {
        let (gate, guest, counts) = (self.gate, &mut self.guest, &mut self.counts);
        self.world.receive(|frame| {
            counts.from_world += 1;
            if gate == Gate::Shut {
                counts.dropped_at_gate += 1;
                return;
            }
            match guest.as_mut().is_some_and(|guest| guest.queue.push(&[frame])) {
                true => counts.to_guest += 1,
                false => counts.dropped_to_guest += 1,
            }
        });
    }

    fn let_hand_in(&mut self) {
        while let Ok((stream, _)) = self.hand_listener.socket.accept() {
            let pid = socket_peercred(&stream).map_or(0, |who| who.pid.as_raw_nonzero().get());
            let Ok(mut link) = Link::new(stream, MOST_TO_HAND_BYTES) else { continue };
            match &self.holder {
                None => self.holder = Some(Holder { link, pid, stage: Stage::Knocking(Instant::now()) }),
                Some(holder) => {
                    let why = format!("process {} has the hand", holder.pid);
                    link.queue.push(&FromRelay::Refused(&why).encode().parts());
                    // It fits into a socket's empty buffer; whoever does not read it sees the end.
                    let _ = link.queue.flush(&mut link.stream);
                }
            }
        }
    }

    fn give_up_on_silence(&mut self) {
        let silent =
            |holder: &Holder| matches!(holder.stage, Stage::Knocking(since) if since.elapsed() >= ATTACH_BOUND);
        if self.holder.as_ref().is_some_and(silent) {
            self.holder = None;
        }
    }

    fn hear_hand(&mut self, changed: &mut impl FnMut(Gate, &str)) {
        let Some(mut holder) = self.holder.take() else { return };
        let came = holder.link.frames.fill(&mut holder.link.stream);
        // Taken out and put back: what it says is about the rest of this.
        let mut frames = std::mem::take(&mut holder.link.frames);
        self.holder = Some(holder);
        let understood = loop {
            match frames.next() {
                Ok(Some(bytes)) => match FromHand::decode(bytes) {
                    Ok(message) if self.obey(message, changed) => {}
                    _ => break false,
                },
                Ok(None) => break true,
                Err(_) => break false,
            }
        };
        match &mut self.holder {
            Some(holder) if understood && matches!(came, Ok(Came::Bytes(_) | Came::Nothing)) => {
                holder.link.frames = frames;
            }
            _ => self.hand_gone(changed),
        }
    }

    /// Does what the page server says; whether it could be said there.
    fn obey(&mut self, message: FromHand<'_>, changed: &mut impl FnMut(Gate, &str)) -> bool {
        let Some(stage) = self.holder.as_ref().map(|holder| holder.stage) else { return false };
        match (stage, message) {
            (Stage::Knocking(_), FromHand::Attach { version } | FromHand::Look { version }) => {
                if version != VERSION {
                    let why = format!("this relay speaks version {VERSION}, and was asked for {version}");
                    self.tell(FromRelay::Refused(&why));
                    return false;
                }
                self.tell(FromRelay::Attached {
                    version: VERSION,
                    guest: self.guest.as_ref().map_or(0, |_| self.guest_pid),
                });
                if matches!(message, FromHand::Look { .. }) {
                    return false;
                }
                if let Some(holder) = &mut self.holder {
                    holder.stage = Stage::Attached;
                }
                self.gate = Gate::Held;
                self.settled = false;
                self.dropped_told = self.counts.dropped_to_hand;
                changed(self.gate, "a page server has the hand");
                true
            }
            (Stage::Attached | Stage::LettingGo, FromHand::Emit(frame)) => {
                match self.world.send(frame) {
                    true => self.counts.to_world += 1,
                    false => self.counts.dropped_to_world += 1,
                }
                true
            }
            (Stage::Attached, FromHand::Settle { number }) => {
                self.settled = true;
                if !self.take_from_guest(true) {
                    self.guest = None;
                    changed(self.gate, "the guest has gone");
                    self.next_guest(changed);
                }
                let torn = self.guest.as_ref().is_some_and(|guest| guest.frames.is_torn());
                let dropped = self.counts.dropped_to_hand - self.dropped_told;
                self.dropped_told = self.counts.dropped_to_hand;
                self.tell(FromRelay::Settled { number, torn, dropped })
            }
            (Stage::Attached, FromHand::Go) => {
                self.settled = false;
                true
            }
            (Stage::Attached, FromHand::LetGo) => {
                if let Some(holder) = &mut self.holder {
                    holder.stage = Stage::LettingGo;
                }
                self.settled = false;
                self.tell(FromRelay::Free)
            }
            _ => false,
        }
    }

    /// Says something to the page server; whether it had room.
    fn tell(&mut self, message: FromRelay<'_>) -> bool {
        let Some(holder) = &mut self.holder else { return false };
        let told = holder.link.queue.push(&message.encode().parts());
        // What is said is waited for; a frame may come with the next turn.
        told && holder.link.queue.flush(&mut holder.link.stream).is_ok()
    }

    fn hand_gone(&mut self, changed: &mut impl FnMut(Gate, &str)) {
        let Some(holder) = self.holder.take() else { return };
        match holder.stage {
            Stage::Knocking(_) => {}
            Stage::Attached => {
                self.gate = Gate::Shut;
                changed(self.gate, "the page server has gone without letting go");
            }
            Stage::LettingGo => self.open(changed),
        }
    }

    /// Nobody has the hand any more, by its own will: what came since is the world's.
    fn open(&mut self, changed: &mut impl FnMut(Gate, &str)) {
        self.gate = Gate::Open;
        let mut stash = Frames::default();
        let mut bytes = self.stash.take();
        let mut left = bytes.make_contiguous() as &[u8];
        while let Ok(Came::Bytes(_)) = stash.fill(&mut left) {
            while let Ok(Some(frame)) = stash.next() {
                match self.world.send(frame) {
                    true => self.counts.to_world += 1,
                    false => self.counts.dropped_to_world += 1,
                }
            }
        }
        changed(self.gate, "the page server has let go");
    }

    fn flush(&mut self, changed: &mut impl FnMut(Gate, &str)) {
        self.world.flush();
        if let Some(guest) = self.guest.as_mut().filter(|_| !self.settled)
            && guest.queue.flush(&mut guest.stream).is_err()
        {
            // Its end is heard by reading, after what it had sent.
            guest.queue.clear();
        }
        let lost = self.holder.as_mut().is_some_and(|holder| holder.link.queue.flush(&mut holder.link.stream).is_err());
        if lost {
            self.hand_gone(changed);
        }
    }
}

/// Who can be heard.
struct Ready {
    stop: bool,
    guest_listener: bool,
    hand_listener: bool,
    guest: bool,
    hand: bool,
    world: bool,
}
