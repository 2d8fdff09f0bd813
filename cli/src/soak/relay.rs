//! A relay between two processes, which can cut what passes through it, or swallow it.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Connections relayed at a time; more are turned away.
const MOST_CONNECTIONS: usize = 64;

const PASS: u8 = 0;
const SWALLOW: u8 = 1;

/// One end of a connection.
pub trait Stream: Read + Write + Send + Sized + 'static {
    fn twin(&self) -> io::Result<Self>;
    fn cut(&self);
}

impl Stream for TcpStream {
    fn twin(&self) -> io::Result<Self> {
        self.try_clone()
    }
    fn cut(&self) {
        // It may have ended already.
        let _ = self.shutdown(Shutdown::Both);
    }
}

impl Stream for UnixStream {
    fn twin(&self) -> io::Result<Self> {
        self.try_clone()
    }
    fn cut(&self) {
        let _ = self.shutdown(Shutdown::Both);
    }
}

/// Of connections that have not ended what cuts both ends of each, by its number.
type Open = BTreeMap<u64, Box<dyn Fn() + Send>>;

struct Shared {
    mode: AtomicU8,
    connections: Mutex<Open>,
    opened: Condvar,
}

impl Shared {
    fn connections(&self) -> MutexGuard<'_, Open> {
        // A panic elsewhere leaves a connection uncut, nothing worse.
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running relay. It ends with its process: a run's conductor, whose end is the end of the run.
pub struct Relay {
    shared: Arc<Shared>,
    pub address: String,
}

impl Relay {
    /// Listens on a free port of loopback and passes on to `to`.
    pub fn tcp(to: &str) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let (address, to) = (listener.local_addr()?.to_string(), to.to_owned());
        let accept = move || {
            let (near, _) = listener.accept()?;
            let far = TcpStream::connect(&to)?;
            near.set_nodelay(true).and(far.set_nodelay(true))?;
            Ok((near, far))
        };
        Self::start(address, accept)
    }

    /// Listens at `path` and passes on to the socket at `to`. Descriptors do not pass.
    pub fn unix(path: &Path, to: PathBuf) -> io::Result<Self> {
        let listener = UnixListener::bind(path)?;
        let accept = move || Ok((listener.accept()?.0, UnixStream::connect(&to)?));
        Self::start(format!("unix:{}", path.display()), accept)
    }

    fn start<S: Stream>(address: String, accept: impl Fn() -> io::Result<(S, S)> + Send + 'static) -> io::Result<Self> {
        let shared =
            Arc::new(Shared { mode: AtomicU8::new(PASS), connections: Mutex::default(), opened: Condvar::new() });
        let ours = Arc::clone(&shared);
        std::thread::Builder::new().name("relay".into()).spawn(move || {
            for number in 0.. {
                let Ok((near, far)) = accept() else {
                    // Its sender's to try again. A listener that cannot accept at all must not spin.
                    std::thread::park_timeout(Duration::from_millis(10));
                    continue;
                };
                let mut connections = ours.connections();
                if connections.len() >= MOST_CONNECTIONS {
                    continue;
                }
                let pair = near.twin().and_then(|n| Ok((n, far.twin()?, near.twin()?, far.twin()?)));
                let Ok((near_out, far_out, near_cut, far_cut)) = pair else { continue };
                let cut = move || {
                    near_cut.cut();
                    far_cut.cut();
                };
                connections.insert(number, Box::new(cut));
                ours.opened.notify_all();
                for (from, to) in [(near, far_out), (far, near_out)] {
                    let shared = Arc::clone(&ours);
                    // Without a thread the connection hangs, which is a failure like any other.
                    let _ = std::thread::Builder::new().spawn(move || pass(from, to, &shared, number));
                }
            }
        })?;
        Ok(Self { shared, address })
    }

    /// Cuts every connection there is, once there is one, which is an error if it is not so `within` this time. New ones pass.
    pub fn cut(&self, within: Duration) -> io::Result<()> {
        std::mem::take(&mut *self.connected(within)?).into_values().for_each(|cut| cut());
        Ok(())
    }

    /// From here on takes what is sent and gives nothing on; ends are not passed on either. An error if nothing is connected `within`
    /// this time.
    pub fn swallow(&self, within: Duration) -> io::Result<()> {
        let _connected = self.connected(within)?;
        self.shared.mode.store(SWALLOW, Ordering::SeqCst);
        Ok(())
    }

    /// The connections, once there are some.
    fn connected(&self, within: Duration) -> io::Result<MutexGuard<'_, Open>> {
        let waited = self.shared.opened.wait_timeout_while(self.shared.connections(), within, |all| all.is_empty());
        let (connections, _) = waited.unwrap_or_else(PoisonError::into_inner);
        match connections.is_empty() {
            true => Err(io::Error::new(io::ErrorKind::NotFound, "nothing is connected that could be cut")),
            false => Ok(connections),
        }
    }
}

fn pass<S: Stream>(mut from: S, mut to: S, shared: &Shared, number: u64) {
    let mut bytes = vec![0; 256 << 10];
    loop {
        let got = match from.read(&mut bytes) {
            Ok(0) | Err(_) => break,
            Ok(got) => got,
        };
        if shared.mode.load(Ordering::SeqCst) == PASS && to.write_all(&bytes[..got]).is_err() {
            break;
        }
    }
    if shared.mode.load(Ordering::SeqCst) == PASS {
        from.cut();
        to.cut();
        shared.connections().remove(&number);
    } else {
        // Held open for whoever is left.
        std::mem::forget(to);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUND: Duration = Duration::from_secs(10);

    fn through() -> (Relay, TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let relay = Relay::tcp(&listener.local_addr().unwrap().to_string()).unwrap();
        let mut near = TcpStream::connect(&relay.address).unwrap();
        let mut far = listener.accept().unwrap().0;
        for stream in [&near, &far] {
            stream.set_read_timeout(Some(BOUND)).unwrap();
        }
        near.write_all(b"there").unwrap();
        let mut got = [0; 5];
        far.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"there");
        (relay, near, far)
    }

    #[test]
    fn what_passes_can_be_cut_and_both_ends_see_it() {
        let (relay, mut near, mut far) = through();
        relay.cut(BOUND).unwrap();
        assert!(matches!(near.read(&mut [0; 1]), Ok(0) | Err(_)));
        assert!(matches!(far.read(&mut [0; 1]), Ok(0) | Err(_)));
    }

    #[test]
    fn where_nothing_is_connected_any_more_there_is_nothing_to_cut_or_to_swallow_and_that_is_said() {
        let (relay, near, mut far) = through();
        drop(near);
        assert!(matches!(far.read(&mut [0; 1]), Ok(0) | Err(_)));
        // The relay's own threads end a moment after they have passed the end on.
        let end = std::time::Instant::now() + BOUND;
        while !relay.shared.connections().is_empty() {
            assert!(std::time::Instant::now() < end, "a connection that has ended is still thought open");
            std::thread::yield_now();
        }
        for nothing in [relay.cut(Duration::ZERO), relay.swallow(Duration::ZERO)] {
            assert_eq!(nothing.unwrap_err().kind(), io::ErrorKind::NotFound);
        }
        assert_eq!(relay.shared.mode.load(Ordering::SeqCst), PASS);
    }

    #[test]
    fn a_cut_waits_for_a_connection_that_is_about_to_be_made() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let relay = Relay::tcp(&listener.local_addr().unwrap().to_string()).unwrap();
        let mut near = std::thread::scope(|scope| {
            let cut = scope.spawn(|| relay.cut(BOUND));
            let near = TcpStream::connect(&relay.address).unwrap();
            cut.join().unwrap().unwrap();
            near
        });
        near.set_read_timeout(Some(BOUND)).unwrap();
        assert!(matches!(near.read(&mut [0; 1]), Ok(0) | Err(_)));
    }

    #[test]
    fn what_is_swallowed_does_not_arrive_and_neither_end_sees_an_end() {
        let (relay, mut near, mut far) = through();
        relay.swallow(BOUND).unwrap();
        near.write_all(b"lost").unwrap();
        drop(near);
        far.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let error = far.read(&mut [0; 1]).unwrap_err();
        assert!(matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut), "{error}");
    }
}
