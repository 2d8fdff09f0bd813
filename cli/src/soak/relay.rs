//! A relay between two processes, which can cut what passes through it, or swallow it.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

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

struct Shared {
    mode: AtomicU8,
    /// Cuts both ends of a connection.
    connections: Mutex<Vec<Box<dyn Fn() + Send>>>,
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
        let shared = Arc::new(Shared { mode: AtomicU8::new(PASS), connections: Mutex::default() });
        let ours = Arc::clone(&shared);
        std::thread::Builder::new().name("relay".into()).spawn(move || {
            loop {
                let Ok((near, far)) = accept() else {
                    // Its sender's to try again. A listener that cannot accept at all must not spin.
                    std::thread::park_timeout(std::time::Duration::from_millis(10));
                    continue;
                };
                let mut connections = ours.connections.lock().unwrap_or_else(PoisonError::into_inner);
                if connections.len() >= MOST_CONNECTIONS {
                    continue;
                }
                let pair = near.twin().and_then(|n| Ok((n, far.twin()?, near.twin()?, far.twin()?)));
                let Ok((near_out, far_out, near_cut, far_cut)) = pair else { continue };
                connections.push(Box::new(move || {
                    near_cut.cut();
                    far_cut.cut();
                }));
                for (from, to) in [(near, far_out), (far, near_out)] {
                    let shared = Arc::clone(&ours);
                    // Without a thread the connection hangs, which is a failure like any other.
                    let _ = std::thread::Builder::new().spawn(move || pass(from, to, &shared));
                }
            }
        })?;
        Ok(Self { shared, address })
    }

    /// Cuts every connection there is. New ones pass.
    pub fn cut(&self) {
        let mut connections = self.shared.connections.lock().unwrap_or_else(PoisonError::into_inner);
        connections.drain(..).for_each(|cut| cut());
    }

    /// From here on takes what is sent and gives nothing on; ends are not passed on either.
    pub fn swallow(&self) {
        self.shared.mode.store(SWALLOW, Ordering::SeqCst);
    }
}

fn pass<S: Stream>(mut from: S, mut to: S, shared: &Shared) {
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
    } else {
        // Held open for whoever is left.
        std::mem::forget(to);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn through() -> (Relay, TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let relay = Relay::tcp(&listener.local_addr().unwrap().to_string()).unwrap();
        let mut near = TcpStream::connect(&relay.address).unwrap();
        let mut far = listener.accept().unwrap().0;
        for stream in [&near, &far] {
            stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
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
        relay.cut();
        assert!(matches!(near.read(&mut [0; 1]), Ok(0) | Err(_)));
        assert!(matches!(far.read(&mut [0; 1]), Ok(0) | Err(_)));
    }

    #[test]
    fn what_is_swallowed_does_not_arrive_and_neither_end_sees_an_end() {
        let (relay, mut near, mut far) = through();
        relay.swallow();
        near.write_all(b"lost").unwrap();
        drop(near);
        far.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let error = far.read(&mut [0; 1]).unwrap_err();
        assert!(matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut), "{error}");
    }
}
