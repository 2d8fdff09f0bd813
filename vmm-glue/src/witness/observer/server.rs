//! The observer that listens: writes down what comes, and acknowledges it.

use super::address::{ObserverAddress, Stream};
use super::judge::{OutputFault, Seen, Verdict, judge};
use super::{
    MAGIC, MAX_ARRIVALS, MAX_CONNECTIONS, MAX_LABEL_BYTES, MAX_PACKET_BYTES, SERVER_BOUND, VERSION, invalid, is_label,
};
use belay_transport::Deadline;
use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

#[derive(Debug, Default)]
pub(super) struct Log {
    pub seen: Vec<Seen>,
    full: bool,
    ending: bool,
    connections: Vec<(u64, Stream)>,
}

#[derive(Debug)]
pub(super) struct Shared {
    pub log: Mutex<Log>,
    pub arrived: Condvar,
    pub began: Instant,
}

impl Shared {
    pub fn lock(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    fn accept(&self) -> io::Result<Stream> {
        match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nodelay(true)?;
                stream.set_nonblocking(false)?;
                Ok(Stream::Tcp(stream))
            }
            Self::Unix(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(false)?;
                Ok(Stream::Unix(stream))
            }
        }
    }

    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(listener) => listener.as_fd(),
            Self::Unix(listener) => listener.as_fd(),
        }
    }
}

/// An observer that listens. Dropping it ends it.
#[derive(Debug)]
pub struct ObserverServer {
    shared: Arc<Shared>,
    address: ObserverAddress,
    acceptor: Option<JoinHandle<()>>,
    /// Its other end tells the acceptor to end when it closes.
    alive: Option<UnixStream>,
}

impl ObserverServer {
    /// Listens at `address`; port 0 takes any free port (see [`Self::address`]).
    pub fn bind(address: &ObserverAddress) -> io::Result<Self> {
        let (listener, address) = match address {
            ObserverAddress::Tcp(wanted) => {
                let listener = TcpListener::bind(wanted)?;
                listener.set_nonblocking(true)?;
                let address = ObserverAddress::Tcp(listener.local_addr()?.to_string());
                (Listener::Tcp(listener), address)
            }
            ObserverAddress::Unix(path) => {
                let listener = UnixListener::bind(path)?;
                listener.set_nonblocking(true)?;
                (Listener::Unix(listener), address.clone())
            }
        };
        let shared = Arc::new(Shared { log: Mutex::default(), arrived: Condvar::new(), began: Instant::now() });
        let (alive, end) = UnixStream::pair()?;
        let accepting = shared.clone();
        let acceptor = std::thread::Builder::new()
            .name("observer".into())
            .spawn(move || accept_until_closed(&listener, &end, &accepting))?;
        Ok(Self { shared, address, acceptor: Some(acceptor), alive: Some(alive) })
    }

    /// Where it listens.
    pub fn address(&self) -> &ObserverAddress {
        &self.address
    }

    /// When [`Seen::at_us`] was 0.
    pub fn began(&self) -> Instant {
        self.shared.began
    }

    /// Everything seen so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.shared.lock().seen.clone()
    }

    /// Judges what was seen so far.
    pub fn verdict(&self) -> Verdict {
        let log = self.shared.lock();
        let mut verdict = judge(&log.seen);
        if log.full {
            verdict.faults.push(OutputFault::Full { arrivals: log.seen.len() });
        }
        verdict
    }

    /// Waits until `enough` says so of all arrivals; whether it did before the deadline.
    pub fn wait_until(&self, deadline: Deadline, mut enough: impl FnMut(&[Seen]) -> bool) -> bool {
        let mut log = self.shared.lock();
        loop {
            if enough(&log.seen) {
                return true;
            }
            let left = deadline.left();
            if left.is_zero() {
                return false;
            }
            log = self.shared.arrived.wait_timeout(log, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for ObserverServer {
    fn drop(&mut self) {
        {
            let mut log = self.shared.lock();
            log.ending = true;
            log.connections.iter().for_each(|(_, stream)| stream.shut());
        }
        self.alive = None;
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
        if let ObserverAddress::Unix(path) = &self.address {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Accepts until the other end of `end` closes, then waits for the connections' threads.
fn accept_until_closed(listener: &Listener, end: &UnixStream, shared: &Arc<Shared>) {
    use rustix::event::{PollFd, PollFlags, poll};
    let mut serving: Vec<JoinHandle<()>> = Vec::new();
    for id in 0.. {
        let mut fds = [PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN), PollFd::new(end, PollFlags::IN)];
        let polled = poll(&mut fds, None);
        if !fds[1].revents().is_empty() || polled.is_err_and(|errno| errno != rustix::io::Errno::INTR) {
            break;
        }
        serving.retain(|thread| !thread.is_finished());
        // A connection that breaks before it is accepted, or one too many, is its sender's to try again.
        let Ok(stream) = listener.accept() else { continue };
        if serving.len() >= MAX_CONNECTIONS || stream.set_bounds(SERVER_BOUND).is_err() {
            continue;
        }
        let Ok(handle) = stream.try_clone() else { continue };
        {
            let mut log = shared.lock();
            if log.ending {
                break;
            }
            log.connections.push((id, handle));
        }
        let serving_shared = shared.clone();
        let spawned = std::thread::Builder::new().name("observer-conn".into()).spawn(move || {
            // However a connection ends, what arrived whole is written down; the rest is sent again by its sender.
            let _ = serve(stream, &serving_shared);
            serving_shared.lock().connections.retain(|(other, _)| *other != id);
        });
        serving.extend(spawned.ok());
    }
    for thread in serving {
        let _ = thread.join();
    }
}

/// Reads the whole of `into`; a quiet connection may stay quiet for ever, one that stalls within a message may not.
fn read_whole(stream: &mut Stream, into: &mut [u8], may_be_quiet: bool, shared: &Shared) -> io::Result<()> {
    let mut filled = 0;
    while filled < into.len() {
        match stream.read(&mut into[filled..]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && may_be_quiet && filled == 0 => {
                if shared.lock().ending {
                    return Err(error);
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

pub(super) fn serve(mut stream: Stream, shared: &Shared) -> io::Result<()> {
    let mut head = [0; 12];
    read_whole(&mut stream, &mut head, true, shared)?;
    let (version, label_len) = (u16::from_le_bytes([head[8], head[9]]), u16::from_le_bytes([head[10], head[11]]));
    if &head[..8] != MAGIC || version != VERSION || usize::from(label_len) > MAX_LABEL_BYTES {
        return Err(invalid("not an emitter of this version"));
    }
    let mut label = vec![0; usize::from(label_len)];
    read_whole(&mut stream, &mut label, false, shared)?;
    let sender = String::from_utf8(label).ok().filter(|label| is_label(label));
    let sender: Arc<str> = sender.ok_or_else(|| invalid("a sender without a name that can be shown"))?.into();
    loop {
        let mut len = [0; 4];
        read_whole(&mut stream, &mut len, true, shared)?;
        let len = u32::from_le_bytes(len) as usize;
        if !(8..=8 + MAX_PACKET_BYTES).contains(&len) {
            return Err(invalid(format!("a packet of {len} bytes")));
        }
        let mut body = vec![0; len];
        read_whole(&mut stream, &mut body, false, shared)?;
        let bytes = body.split_off(8);
        let sequence = u64::from_le_bytes(body.try_into().expect("split at 8 bytes"));
        {
            let mut log = shared.lock();
            if log.seen.len() >= MAX_ARRIVALS {
                log.full = true;
                return Err(invalid("the observer is full"));
            }
            let at_us = shared.began.elapsed().as_micros() as u64;
            log.seen.push(Seen { at_us, sender: sender.clone(), sequence, bytes });
            shared.arrived.notify_all();
        }
        stream.write_all(&sequence.to_le_bytes())?;
    }
}
