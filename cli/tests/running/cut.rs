//! A link between two processes of a test that can be cut, wholly or in one direction: from then on nothing passes there, and nobody is
//! told. What passed can be looked at.

// Each file of tests uses its part.
#![allow(dead_code)]

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Of each connection and direction, how many bytes are kept to be looked at.
const KEPT_BYTES: usize = 64 << 10;

/// The direction of a link: to its target.
pub const THERE: usize = 0;
/// From its target.
pub const BACK: usize = 1;

/// The first bytes of a connection, to the target and from it.
pub type Heard = Arc<[Mutex<Vec<u8>>; 2]>;

/// Forwards every connection to one address.
pub struct Link {
    address: String,
    streams: Arc<Mutex<Vec<TcpStream>>>,
    heard: Arc<Mutex<Vec<Heard>>>,
    cut: Arc<[AtomicBool; 2]>,
    dropped: Arc<AtomicBool>,
}

impl Link {
    pub fn to(target: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
        listener.set_nonblocking(true).expect("a listener");
        let address = listener.local_addr().expect("bound").to_string();
        let (streams, cut) = (Arc::new(Mutex::new(Vec::new())), Arc::<[AtomicBool; 2]>::default());
        let dropped = Arc::new(AtomicBool::new(false));
        let heard = Arc::new(Mutex::new(Vec::new()));
        let link = Self {
            address,
            streams: Arc::clone(&streams),
            heard: Arc::clone(&heard),
            cut: Arc::clone(&cut),
            dropped: Arc::clone(&dropped),
        };
        let target = target.to_owned();
        std::thread::spawn(move || {
            while !dropped.load(Ordering::Acquire) {
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
                let words = Heard::default();
                heard.lock().unwrap().push(Arc::clone(&words));
                for (direction, from, to) in [(THERE, near, far), (BACK, far_too, near_too)] {
                    let (cut, words) = (Arc::clone(&cut), Arc::clone(&words));
                    std::thread::spawn(move || forward(from, to, &words[direction], &cut[direction]));
                }
            }
        });
        link
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    /// What each connection began with so far, to the target and from it.
    pub fn heard(&self) -> Vec<[Vec<u8>; 2]> {
        let heard = self.heard.lock().unwrap();
        heard.iter().map(|words| [THERE, BACK].map(|direction| words[direction].lock().unwrap().clone())).collect()
    }

    /// Both sides are left alone with connections over which nothing comes any more.
    pub fn cut(&self) {
        self.cut_in(&[THERE, BACK]);
    }

    /// As [`Link::cut`], in these directions alone.
    pub fn cut_in(&self, directions: &[usize]) {
        directions.iter().for_each(|&direction| self.cut[direction].store(true, Ordering::Release));
    }

    /// Every connection that there is ends, for both sides to see. New ones are forwarded.
    pub fn break_connections(&self) {
        for stream in self.streams.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.cut();
        self.dropped.store(true, Ordering::Release);
        self.break_connections();
    }
}

fn forward(mut from: TcpStream, mut to: TcpStream, heard: &Mutex<Vec<u8>>, cut: &AtomicBool) {
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
        {
            let mut heard = heard.lock().unwrap();
            let kept = count.min(KEPT_BYTES - heard.len());
            heard.extend_from_slice(&room[..kept]);
        }
        if count == 0 || to.write_all(&room[..count]).is_err() {
            let _ = to.shutdown(Shutdown::Write);
            return;
        }
    }
}
