//! A link between two processes of a test that can be cut: from then on nothing passes, and nobody is told.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Forwards every connection to one address.
pub struct Link {
    address: String,
    streams: Arc<Mutex<Vec<TcpStream>>>,
    cut: Arc<AtomicBool>,
}

impl Link {
    pub fn to(target: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
        listener.set_nonblocking(true).expect("a listener");
        let address = listener.local_addr().expect("bound").to_string();
        let (streams, cut) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let link = Self { address, streams: Arc::clone(&streams), cut: Arc::clone(&cut) };
        let target = target.to_owned();
        std::thread::spawn(move || {
            while !cut.load(Ordering::Acquire) {
                let Ok((near, _)) = listener.accept() else {
                    std::thread::sleep(Duration::from_millis(2));
                    continue;
                };
                let Ok(far) = TcpStream::connect(&target) else { continue };
                near.set_nonblocking(false).expect("a stream");
                for stream in [&near, &far] {
                    let _ = stream.set_nodelay(true);
                    streams.lock().unwrap().push(stream.try_clone().expect("a descriptor"));
                }
                let (near_too, far_too) =
                    (near.try_clone().expect("a descriptor"), far.try_clone().expect("a descriptor"));
                for (from, to) in [(near, far), (far_too, near_too)] {
                    let cut = Arc::clone(&cut);
                    std::thread::spawn(move || forward(from, to, &cut));
                }
            }
        });
        link
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    /// Both sides are left alone with connections over which nothing comes any more.
    pub fn cut(&self) {
        self.cut.store(true, Ordering::Release);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.cut();
        for stream in self.streams.lock().unwrap().iter() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn forward(mut from: TcpStream, mut to: TcpStream, cut: &AtomicBool) {
    let mut room = vec![0; 64 << 10];
    loop {
        let count = from.read(&mut room).unwrap_or(0);
        // What came after the cut is swallowed, its end too.
        if cut.load(Ordering::Acquire) {
            if count == 0 {
                return;
            }
            continue;
        }
        if count == 0 || to.write_all(&room[..count]).is_err() {
            let _ = to.shutdown(Shutdown::Write);
            return;
        }
    }
}
