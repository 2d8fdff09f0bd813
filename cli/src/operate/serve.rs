//! A small server for the operator's side: one thread, a few clients, a bound for everything.
//!
//! Rules of this room:
//! * A client has one request, and a deadline for all of it: one that sends a byte a second is hung up on like a silent one.
//! * There are at most [`MOST_CLIENTS`]. Whoever comes when all places are taken gets the place of the oldest that has not yet said
//!   what it wants: a thousand silent clients keep nobody out.
//! * Nothing here waits for a client or for the role; a role that hangs is told of by its own silence.

use super::protocol::LONGEST_ANSWER;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Clients at a time.
pub const MOST_CLIENTS: usize = 32;
/// Of them, those that wait for something to come to pass.
pub const MOST_WAITING: usize = 16;
/// From connecting to the whole request, and from the answer to its last byte taken.
pub const CLIENT_BOUND: Duration = Duration::from_secs(2);
/// How often what clients wait for is looked at.
const LOOK: Duration = Duration::from_millis(20);
/// After a failed accept (no descriptor left, say) nobody is let in for this long.
const RECOVER: Duration = Duration::from_millis(100);
/// Accepted in one go, so that those who are in are served meanwhile.
const ACCEPT_BURST: usize = 64;

/// What is spoken, and by whom it may be.
pub trait Dialect: Send + 'static {
    /// What an answer may wait for.
    type Waiting: Send;
    /// Longest request, in bytes.
    const LONGEST: usize;

    /// Whether this client may speak; if not, why.
    fn admit(&mut self, client: &Stream) -> Result<(), String>;
    /// What to do with all that a client has said so far.
    fn hear(&mut self, received: &[u8]) -> Heard<Self::Waiting>;
    /// What to tell a client that has said more than the longest request.
    fn too_long(&mut self) -> Vec<u8>;
    /// Looks whether there is something to say to a client that waits.
    fn look(&mut self, waiting: &mut Self::Waiting) -> Looked;
    /// What to tell a client for whom there is no place to wait.
    fn busy(&mut self) -> Vec<u8>;
}

/// What came of what a client said.
pub enum Heard<W> {
    /// There must be more of it.
    More,
    /// This, and then hang up.
    Say(Vec<u8>),
    /// Nothing yet.
    Wait(W),
}

/// What came of looking.
pub enum Looked {
    NotYet,
    /// There may be more to say after this.
    Say(Vec<u8>),
    SayAndHangUp(Vec<u8>),
}

/// A way in.
pub enum Door {
    Unix(UnixListener),
    Tcp(TcpListener),
}

/// A client's connection.
pub enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Door {
    fn accept(&self) -> io::Result<Stream> {
        let stream = match self {
            Self::Unix(listener) => Stream::Unix(listener.accept()?.0),
            Self::Tcp(listener) => Stream::Tcp(listener.accept()?.0),
        };
        match &stream {
            Stream::Unix(stream) => stream.set_nonblocking(true)?,
            Stream::Tcp(stream) => stream.set_nonblocking(true)?,
        }
        Ok(stream)
    }

    fn set_nonblocking(&self) -> io::Result<()> {
        match self {
            Self::Unix(listener) => listener.set_nonblocking(true),
            Self::Tcp(listener) => listener.set_nonblocking(true),
        }
    }
}

impl AsFd for Door {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(listener) => listener.as_fd(),
            Self::Tcp(listener) => listener.as_fd(),
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(stream) => stream.as_fd(),
            Self::Tcp(stream) => stream.as_fd(),
        }
    }
}

impl Stream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.read(into),
            Self::Tcp(stream) => stream.read(into),
        }
    }

    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.write(from),
            Self::Tcp(stream) => stream.write(from),
        }
    }
}

/// A running server. Stops when dropped.
pub struct Server {
    wake: UnixStream,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves `dialect` at `door` from a thread named `name`.
    pub fn start<D: Dialect>(name: &str, door: Door, dialect: D) -> io::Result<Self> {
        door.set_nonblocking()?;
        let (wake, woken) = UnixStream::pair()?;
        let serving = Serving { door, dialect, woken, clients: Vec::new(), closed_until: None };
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || serving.run())?;
        Ok(Self { wake, thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.wake.shutdown(std::net::Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Client<W> {
    stream: Stream,
    phase: Phase<W>,
    /// When it is hung up on; none while it waits (what it waits for has a bound of its own).
    due: Option<Instant>,
}

enum Phase<W> {
    Saying(Vec<u8>),
    Waiting(W),
    /// The answer, how much of it has gone, and what may come after it.
    Hearing(Vec<u8>, usize, Option<W>),
}

struct Serving<D: Dialect> {
    door: Door,
    dialect: D,
    woken: UnixStream,
    /// Oldest first.
    clients: Vec<Client<D::Waiting>>,
    closed_until: Option<Instant>,
}

impl<D: Dialect> Serving<D> {
    fn run(mut self) {
        loop {
            let now = Instant::now();
            let open = self.closed_until.is_none_or(|until| until <= now);
            let mut watched = vec![PollFd::new(&self.woken, PollFlags::IN)];
            watched.push(PollFd::new(&self.door, if open { PollFlags::IN } else { PollFlags::empty() }));
            watched.extend(self.clients.iter().map(|client| {
                let wanted = match client.phase {
                    Phase::Saying(_) => PollFlags::IN,
                    // Only its hanging up is of interest, and that is always told.
                    Phase::Waiting(_) => PollFlags::empty(),
                    Phase::Hearing(..) => PollFlags::OUT,
                };
                PollFd::new(&client.stream, wanted)
            }));
            let wait = self.next_look(now);
            let timeout =
                wait.map(|wait| Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: i64::from(wait.subsec_nanos()) });
            // An interrupted poll is one that found nothing.
            let _ = poll(&mut watched, timeout.as_ref());
            let ready: Vec<bool> = watched.iter().map(|fd| !fd.revents().is_empty()).collect();
            let gone = |flags: PollFlags| flags.intersects(PollFlags::HUP | PollFlags::ERR);
            let hung_up: Vec<bool> = watched.iter().map(|fd| gone(fd.revents())).collect();
            drop(watched);
            if ready[0] {
                return self.last_words();
            }
            let now = Instant::now();
            let clients = std::mem::take(&mut self.clients);
            for (index, client) in clients.into_iter().enumerate() {
                let waits = matches!(client.phase, Phase::Waiting(_));
                let overdue = client.due.is_some_and(|due| due <= now);
                if overdue || (waits && hung_up[index + 2]) {
                    continue;
                }
                let next = if ready[index + 2] || waits { self.turn(client) } else { Some(client) };
                self.clients.extend(next);
            }
            if ready[1] && open {
                self.accept();
            }
        }
    }

    /// What has been answered goes out before the process does; an answer fits what a socket holds, so nobody is waited for.
    fn last_words(mut self) {
        for client in std::mem::take(&mut self.clients) {
            let _ = self.turn(client);
        }
    }

    /// How long nothing need be looked at, if nobody stirs.
    fn next_look(&self, now: Instant) -> Option<Duration> {
        let waits = self.clients.iter().any(|client| matches!(client.phase, Phase::Waiting(_)));
        let due =
            self.clients.iter().filter_map(|client| client.due).chain(self.closed_until.filter(|&until| until > now));
        let due = due.min().map(|due| due.saturating_duration_since(now) + Duration::from_millis(1));
        if waits { Some(due.map_or(LOOK, |due| due.min(LOOK))) } else { due }
    }

    fn accept(&mut self) {
        self.closed_until = None;
        for _ in 0..ACCEPT_BURST {
            let stream = match self.door.accept() {
                Ok(stream) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // One that has hung up already.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
                Err(error) => {
                    tracing::warn!(%error, "nobody is let in for a moment");
                    self.closed_until = Some(Instant::now() + RECOVER);
                    return;
                }
            };
            if let Err(why) = self.dialect.admit(&stream) {
                tracing::debug!(why, "a client was turned away");
                continue;
            }
            if self.clients.len() >= MOST_CLIENTS {
                match self.clients.iter().position(|client| matches!(client.phase, Phase::Saying(_))) {
                    Some(oldest) => drop(self.clients.remove(oldest)),
                    None => continue,
                }
            }
            let due = Some(Instant::now() + CLIENT_BOUND);
            // Mostly the request is there already.
            let client = self.turn(Client { stream, phase: Phase::Saying(Vec::new()), due });
            self.clients.extend(client);
        }
    }

    /// Does for a client what can be done now; it is gone if nothing more is to be done for it.
    fn turn(&mut self, mut client: Client<D::Waiting>) -> Option<Client<D::Waiting>> {
        loop {
            let (phase, goes_on) = match client.phase {
                Phase::Saying(received) => self.listen(&mut client.stream, received)?,
                Phase::Waiting(mut waiting) => match self.dialect.look(&mut waiting) {
                    Looked::NotYet => (Phase::Waiting(waiting), false),
                    Looked::Say(answer) => (Phase::Hearing(answer, 0, Some(waiting)), true),
                    Looked::SayAndHangUp(answer) => (Phase::Hearing(answer, 0, None), true),
                },
                Phase::Hearing(answer, gone, then) if gone == answer.len() => (Phase::Waiting(then?), true),
                Phase::Hearing(answer, gone, then) => match client.stream.write(&answer[gone..]) {
                    Ok(0) => return None,
                    Ok(more) => (Phase::Hearing(answer, gone + more, then), true),
                    Err(error) if is_later(&error) => (Phase::Hearing(answer, gone, then), false),
                    Err(_) => return None,
                },
            };
            client.due = match (&phase, client.due) {
                (Phase::Waiting(_), _) => None,
                // Of one phase, not of each byte.
                (_, None) => Some(Instant::now() + CLIENT_BOUND),
                (_, due) => due,
            };
            client.phase = phase;
            if !goes_on {
                return Some(client);
            }
        }
    }

    fn listen(&mut self, stream: &mut Stream, mut received: Vec<u8>) -> Option<(Phase<D::Waiting>, bool)> {
        let mut part = [0; 1024];
        match stream.read(&mut part) {
            Ok(0) => return None,
            Ok(more) => received.extend_from_slice(&part[..more]),
            Err(error) if is_later(&error) => return Some((Phase::Saying(received), false)),
            Err(_) => return None,
        }
        // Whoever has given up is told nothing, and gets nothing done behind his back.
        if hung_up(stream) {
            return None;
        }
        Some(match self.dialect.hear(&received) {
            Heard::More if received.len() > D::LONGEST => (Phase::Hearing(self.dialect.too_long(), 0, None), true),
            Heard::More => (Phase::Saying(received), true),
            Heard::Say(answer) => {
                debug_assert!(answer.len() <= LONGEST_ANSWER + 4, "an answer of {} bytes", answer.len());
                (Phase::Hearing(answer, 0, None), true)
            }
            Heard::Wait(waiting) => {
                let waiting_now =
                    self.clients.iter().filter(|client| !matches!(client.phase, Phase::Saying(_))).count();
                match waiting_now < MOST_WAITING {
                    true => (Phase::Waiting(waiting), true),
                    false => (Phase::Hearing(self.dialect.busy(), 0, None), true),
                }
            }
        })
    }
}

/// Whether both directions are closed: a client of a Unix socket has gone. One that only has no more to say hears the answer.
fn hung_up(stream: &Stream) -> bool {
    let mut fds = [PollFd::new(stream, PollFlags::empty())];
    poll(&mut fds, Some(&Timespec::default())).is_ok() && fds[0].revents().contains(PollFlags::HUP)
}

fn is_later(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
