//! The destination's side of a session: one listening socket, one acceptor thread that sorts what arrives.

use super::binding::BindingKey;
use super::control::Control;
use super::hello::{Agreed, Hello, encode_accept, encode_refusal};
use super::pending::{Arrived, Pending, Step};
use super::preamble::{Answer, LANE_REFUSED, LANE_TAKEN, SessionId, Token};
use super::stream::LaneStream;
use super::{Address, Security, SessionConfig, SessionError, socket};
use crate::deadline::Deadline;
use crate::fabric::LaneId;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TrySendError, bounded};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use rustix::net::SocketFlags;
use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Control connections that have said hello and wait for [`Listener::accept`].
const MAX_INCOMING: usize = 4;
/// Sessions that exist at once on one listener.
const MAX_SESSIONS: usize = 16;
/// Lanes one session may ever have.
const MAX_LANES: usize = 256;
/// Rejections kept for [`Listener::take_rejections`].
const MAX_REJECTIONS: usize = 16;
/// Connections taken at once before those that are in their handshake get their turn: a crowd that never stops dialling is heard
/// between them and not in their place.
const MAX_HEARD: usize = 16;
/// How long the acceptor leaves the listening socket alone when the process is out of descriptors.
const OUT_OF_DESCRIPTORS_PAUSE: Duration = Duration::from_millis(50);

/// A connection that did not become part of a session.
#[derive(Debug)]
pub struct Rejection {
    pub at: Instant,
    pub error: SessionError,
}

/// What the acceptor thread shares with everyone else.
pub(super) struct Shared {
    pub(super) address: Address,
    pub(super) config: SessionConfig,
    stop: AtomicBool,
    wake: OwnedFd,
    sessions: Mutex<HashMap<SessionId, Weak<Slot>>>,
    rejections: Mutex<VecDeque<Rejection>>,
}

/// Where a session's connections wait to be taken.
struct Slot {
    token: Token,
    state: Mutex<SlotState>,
    changed: Condvar,
}

#[derive(Default)]
struct SlotState {
    ever: Vec<LaneId>,
    waiting: Vec<(LaneId, LaneStream)>,
    guard_came: bool,
    guard: Option<OwnedFd>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Whoever panicked held the lock over single pushes and takes only: the state is whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(super) fn token_of(&self, session: SessionId) -> Option<Token> {
        self.slot(session).map(|slot| slot.token.clone())
    }

    fn slot(&self, session: SessionId) -> Option<Arc<Slot>> {
        lock(&self.sessions).get(&session)?.upgrade()
    }

    fn register(&self, session: SessionId, token: Token) -> Option<Arc<Slot>> {
        let mut sessions = lock(&self.sessions);
        sessions.retain(|_, slot| slot.strong_count() > 0);
        if sessions.len() >= MAX_SESSIONS || sessions.contains_key(&session) {
            return None;
        }
        let slot = Arc::new(Slot { token, state: Mutex::default(), changed: Condvar::new() });
        sessions.insert(session, Arc::downgrade(&slot));
        Some(slot)
    }

    /// A listener's state without its thread, that knows one session. The session lasts as long as the second is kept.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn for_fuzzing(session: SessionId, token: Token) -> (Self, Arc<impl Sized>) {
        let shared = Self {
            address: Address::Tcp("127.0.0.1:0".to_owned()),
            config: SessionConfig::new(Security::LoopbackOnly),
            stop: AtomicBool::new(false),
            wake: eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd"),
            sessions: Mutex::default(),
            rejections: Mutex::default(),
        };
        let slot = shared.register(session, token).expect("the first session");
        (shared, slot)
    }

    fn reject(&self, error: SessionError) {
        let mut rejections = lock(&self.rejections);
        if rejections.len() == MAX_REJECTIONS {
            rejections.pop_front();
        }
        rejections.push_back(Rejection { at: Instant::now(), error });
    }
}

/// Keeps the acceptor thread alive; the last one to go ends it.
struct Acceptor {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Acceptor {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        // A full eventfd counter is readable too.
        let _ = rustix::io::write(&self.shared.wake, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        if let Address::Unix(path) = &self.shared.address {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// A listening destination.
pub struct Listener {
    acceptor: Arc<Acceptor>,
    incoming: Receiver<Greeted>,
}

struct Greeted {
    stream: LaneStream,
    hello: Hello,
    slot: Arc<Slot>,
}

impl Listener {
    /// Listens on `address` and starts the acceptor thread. TCP beyond loopback needs certificates or an explicit
    /// [`super::Security::Insecure`]; a Unix socket is made with mode 0600 and admits our own uid and root.
    pub fn bind(address: &Address, config: SessionConfig) -> Result<Self, SessionError> {
        let io = |doing: &str| {
            let doing = doing.to_owned();
            move |source: std::io::Error| SessionError::Io { doing, source }
        };
        config.check(address)?;
        let (socket, address) = socket::listen(address, &config)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| io("making an eventfd")(error.into()))?;
        let shared = Arc::new(Shared {
            address,
            config,
            stop: AtomicBool::new(false),
            wake,
            sessions: Mutex::default(),
            rejections: Mutex::default(),
        });
        let (send, incoming) = bounded(MAX_INCOMING);
        let for_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("belay-accept".to_owned())
            .spawn(move || run(&socket, &for_thread, &send))
            .map_err(io("starting the acceptor thread"))?;
        Ok(Self { acceptor: Arc::new(Acceptor { shared, thread: Some(thread) }), incoming })
    }

    /// The address listened on, with the port the system chose if 0 was asked for.
    pub fn address(&self) -> &Address {
        &self.acceptor.shared.address
    }

    /// Waits for a source that has proved who it is and said a hello that both can go on from.
    pub fn accept(&self, deadline: Deadline) -> Result<Incoming, SessionError> {
        let bound = deadline.left();
        match self.incoming.recv_deadline(deadline.instant()) {
            Ok(Greeted { stream, hello, slot }) => {
                Ok(Incoming { stream, hello, slot, acceptor: Arc::clone(&self.acceptor) })
            }
            Err(RecvTimeoutError::Timeout) => Err(SessionError::TimedOut { doing: "waiting for a source", bound }),
            Err(RecvTimeoutError::Disconnected) => Err(SessionError::Io {
                doing: "waiting for a source".to_owned(),
                source: std::io::Error::other("the acceptor thread has ended"),
            }),
        }
    }

    /// Why recent connections were turned away (the last 16), for the operator.
    pub fn take_rejections(&self) -> Vec<Rejection> {
        lock(&self.acceptor.shared.rejections).drain(..).collect()
    }
}

/// A source that waits for a verdict. Dropping it closes the connection.
pub struct Incoming {
    stream: LaneStream,
    hello: Hello,
    slot: Arc<Slot>,
    acceptor: Arc<Acceptor>,
}

impl Incoming {
    /// What the source has said of itself and its guest.
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// Accepts, with a blob for the source's upper layer.
    pub fn accept(mut self, blob: &[u8], deadline: Deadline) -> Result<DestinationSession, SessionError> {
        let config = &self.acceptor.shared.config;
        let ours = config.offers_over(&self.acceptor.shared.address, &self.stream);
        let reply = encode_accept(&self.hello, config.versions, ours.no_verbs, blob)?;
        send_frame(&mut self.stream, &reply, deadline)?;
        let agreed = Agreed {
            session: self.hello.session,
            protocol: self.hello.protocol,
            fabric: self.hello.fabric,
            without_verbs: self.hello.without_verbs.clone(),
            peer_belay_version: self.hello.belay_version.clone(),
        };
        let binding = BindingKey::of(&self.stream, self.hello.session, &self.slot.token)?;
        let control = Arc::new(Control::new(self.stream, config.max_frame_bytes));
        let lanes = LaneAcceptor { slot: self.slot, acceptor: self.acceptor, binding };
        Ok(DestinationSession { control, agreed, hello: self.hello, lanes })
    }

    /// Refuses, with a reason for the source's operator.
    pub fn refuse(mut self, reason: &str, deadline: Deadline) -> Result<(), SessionError> {
        let reply = encode_refusal(reason, self.acceptor.shared.config.versions)?;
        send_frame(&mut self.stream, &reply, deadline)
    }
}

fn send_frame(stream: &mut LaneStream, frame: &[u8], deadline: Deadline) -> Result<(), SessionError> {
    let length = u32::try_from(frame.len()).expect("a reply is at most 128 KiB").to_le_bytes();
    stream.write_all("sending the reply", &[&length, frame].concat(), deadline)
}

/// A session as the destination has it.
pub struct DestinationSession {
    pub control: Arc<Control>,
    pub agreed: Agreed,
    /// What the source said.
    pub hello: Hello,
    pub lanes: LaneAcceptor,
}

/// Takes the connections that the source dials for this session. Cheap to clone; keeps the listener's thread alive.
#[derive(Clone)]
pub struct LaneAcceptor {
    slot: Arc<Slot>,
    acceptor: Arc<Acceptor>,
    binding: Option<BindingKey>,
}

impl LaneAcceptor {
    /// Waits for lane `id`. Each lane comes once.
    pub fn take(&self, id: LaneId, deadline: Deadline) -> Result<LaneStream, SessionError> {
        self.wait("waiting for a lane", deadline, |state| {
            let at = state.waiting.iter().position(|(waiting, _)| *waiting == id)?;
            Some(state.waiting.swap_remove(at).1)
        })
    }

    /// Waits for the guard connection and gives its bare, blocking descriptor.
    pub fn take_guard(&self, deadline: Deadline) -> Result<OwnedFd, SessionError> {
        let fd = self.wait("waiting for the guard connection", deadline, |state| state.guard.take())?;
        rustix::io::ioctl_fionbio(&fd, false).map_err(|e| SessionError::Io {
            doing: "making the guard connection blocking".to_owned(),
            source: e.into(),
        })?;
        Ok(fd)
    }

    /// Whether this session's connections are encrypted.
    pub fn is_encrypted(&self) -> bool {
        let shared = &self.acceptor.shared;
        matches!((&shared.address, &shared.config.security), (Address::Tcp(_), Security::Tls(_)))
    }

    /// Configuration the listener was given.
    pub fn config(&self) -> &SessionConfig {
        &self.acceptor.shared.config
    }

    /// What binds connections outside TLS to this session; `None` where plaintext leaves the host.
    pub fn binding(&self) -> Option<&BindingKey> {
        self.binding.as_ref()
    }

    fn wait<T>(
        &self,
        doing: &'static str,
        deadline: Deadline,
        mut take: impl FnMut(&mut SlotState) -> Option<T>,
    ) -> Result<T, SessionError> {
        let bound = deadline.left();
        let mut state = lock(&self.slot.state);
        loop {
            if let Some(taken) = take(&mut state) {
                return Ok(taken);
            }
            let left = deadline.left();
            if left.is_zero() {
                return Err(SessionError::TimedOut { doing, bound });
            }
            state = self.slot.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// The acceptor thread. Never waits for one connection: everything it holds is polled together.
fn run(listening: &OwnedFd, shared: &Arc<Shared>, incoming: &Sender<Greeted>) {
    let mut pending: Vec<Pending> = Vec::with_capacity(shared.config.max_pending + 1);
    let mut deaf_until: Option<Instant> = None;
    while !shared.stop.load(Ordering::Acquire) {
        deaf_until = deaf_until.filter(|until| *until > Instant::now());
        let (woken, heard, ready) = wait(listening, shared, &pending, deaf_until);
        if woken {
            continue;
        }
        let mut kept = Vec::with_capacity(shared.config.max_pending + 1);
        for (connection, ready) in pending.drain(..).zip(ready) {
            if let Some(connection) = step(connection, ready, shared, incoming) {
                kept.push(connection);
            }
        }
        pending = kept;
        if heard {
            deaf_until = hear(listening, shared, incoming, &mut pending);
        }
    }
}

/// Waits for anything: (told to stop, somebody dials, which pending connections have something).
fn wait(
    listening: &OwnedFd,
    shared: &Shared,
    pending: &[Pending],
    deaf_until: Option<Instant>,
) -> (bool, bool, Vec<bool>) {
    let mut fds = Vec::with_capacity(pending.len() + 2);
    fds.push(PollFd::new(&shared.wake, PollFlags::IN));
    let listen_for = if deaf_until.is_some() { PollFlags::empty() } else { PollFlags::IN };
    fds.push(PollFd::new(listening, listen_for));
    fds.extend(pending.iter().map(|one| PollFd::from_borrowed_fd(one.as_fd(), one.interest())));
    let first = pending.iter().map(|one| one.deadline.instant()).chain(deaf_until).min();
    let timeout = first.map(|first| socket::timespec(Deadline::at(first).left()));
    // An interrupted or failed poll looks like one that found nothing; the loop comes round again.
    if poll(&mut fds, timeout.as_ref()).is_err() {
        return (false, false, vec![false; pending.len()]);
    }
    let ready = |fd: &PollFd<'_>| !fd.revents().is_empty();
    (ready(&fds[0]), ready(&fds[1]), fds[2..].iter().map(ready).collect())
}

/// Takes one pending connection further. `None`: it has arrived or is gone.
fn step(connection: Pending, ready: bool, shared: &Arc<Shared>, incoming: &Sender<Greeted>) -> Option<Pending> {
    if connection.deadline.expired() {
        shared.reject(SessionError::TimedOut { doing: "shaking hands", bound: shared.config.handshake_bound });
        return None;
    }
    if !ready {
        return Some(connection);
    }
    match connection.advance(shared) {
        Ok(Step::Later(connection)) => return Some(connection),
        Ok(Step::Arrived(arrived)) => arrive(arrived, shared, incoming),
        Err(error) => shared.reject(error),
    }
    None
}

/// Accepts what has dialled, making room where there is none. Gives until when to leave the socket alone, if it must.
fn hear(
    listening: &OwnedFd,
    shared: &Arc<Shared>,
    incoming: &Sender<Greeted>,
    pending: &mut Vec<Pending>,
) -> Option<Instant> {
    for _ in 0..MAX_HEARD {
        let fd = match rustix::net::accept_with(listening, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(fd) => fd,
            Err(Errno::AGAIN) => return None,
            Err(Errno::INTR | Errno::CONNABORTED | Errno::PROTO) => continue,
            // Out of descriptors or memory: the connection stays in the backlog, polling for it would spin.
            Err(error) => {
                shared.reject(SessionError::Io { doing: "accepting".to_owned(), source: error.into() });
                return Some(Instant::now() + OUT_OF_DESCRIPTORS_PAUSE);
            }
        };
        let prepared = match &shared.address {
            Address::Unix(_) => socket::check_uid(fd.as_fd(), &shared.address),
            Address::Tcp(_) => socket::tune_tcp(fd.as_fd(), &shared.config)
                .map_err(|source| SessionError::Io { doing: "setting up a connection".to_owned(), source }),
        };
        if let Err(error) = prepared {
            shared.reject(error);
            continue;
        }
        if pending.len() >= shared.config.max_pending.max(1) {
            // The longest silent one first, else the one longest in its handshake: honest ones are through in a moment.
            let victim = pending.iter().position(Pending::is_silent).unwrap_or(0);
            drop(pending.remove(victim));
            shared.reject(SessionError::Busy);
        }
        let connection = Pending::new(fd, Deadline::after(shared.config.handshake_bound));
        // Most have sent their preamble by now, which lifts them out of the silent.
        pending.extend(step(connection, true, shared, incoming));
    }
    // Whoever is left in the backlog is polled for.
    None
}

/// Puts a connection that has come through where its session waits for it.
fn arrive(arrived: Arrived, shared: &Arc<Shared>, incoming: &Sender<Greeted>) {
    match arrived {
        Arrived::Control { mut stream, hello, token } => {
            let refused = match shared.register(hello.session, token) {
                None => "the listener has too many sessions",
                Some(slot) => match incoming.try_send(Greeted { stream, hello, slot }) {
                    Ok(()) => return,
                    Err(TrySendError::Full(greeted) | TrySendError::Disconnected(greeted)) => {
                        stream = greeted.stream;
                        "the listener is busy with other sources"
                    }
                },
            };
            if let Ok(frame) = encode_refusal(refused, shared.config.versions) {
                let length = u32::try_from(frame.len()).expect("a reply is at most 128 KiB").to_le_bytes();
                let _ = stream.write(&[&length, &frame[..]].concat());
            }
            shared.reject(SessionError::Busy);
        }
        Arrived::Lane { mut stream, session, lane } => {
            let Some(slot) = shared.slot(session) else { return };
            let mut state = lock(&slot.state);
            if state.ever.contains(&lane) || state.ever.len() >= MAX_LANES {
                let _ = stream.write(&[LANE_REFUSED]);
                shared.reject(SessionError::LaneRefused { lane, why: "it is open already, or there are too many" });
                return;
            }
            // One byte into a socket that has carried a handshake; a peer that is gone shows at the lane's first use.
            if stream.write(&[LANE_TAKEN]).and_then(|_| stream.flush()).is_err() {
                shared.reject(SessionError::PeerClosed { doing: "shaking hands" });
                return;
            }
            state.ever.push(lane);
            state.waiting.push((lane, stream));
            slot.changed.notify_all();
        }
        Arrived::Guard { mut stream, session } => {
            let Some(slot) = shared.slot(session) else { return };
            let mut state = lock(&slot.state);
            if state.guard_came {
                let _ = stream.write(&Answer::Refused.encode());
                shared.reject(SessionError::Protocol { what: "a second guard connection".to_owned() });
                return;
            }
            if stream.write(&Answer::GoOn.encode()).is_err() {
                shared.reject(SessionError::PeerClosed { doing: "shaking hands" });
                return;
            }
            state.guard_came = true;
            state.guard = Some(stream.into_parts().0);
            slot.changed.notify_all();
        }
    }
}
