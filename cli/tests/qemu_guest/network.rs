//! A network of a test's own, a client in conversation with the guest on it, and the relays between both.

use super::super::running::{BOUND, Place, Process};
use super::{BOOTED, Linux};
use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{SocketAddrV4, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const GUEST: [u8; 4] = [10, 77, 0, 2];
const CLIENT: [u8; 4] = [10, 77, 0, 1];
/// Requests that wait for their answers.
pub const IN_FLIGHT: usize = 16;

/// As the guest has it (`guest.rs`).
fn mixed(sequence: u64, page: u64, word: u64) -> u64 {
    let x = sequence.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ page.wrapping_mul(0xc2b2_ae3d_27d4_eb4f) ^ word << 32;
    (x ^ x >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9)
}

/// A network of this test's own, in a namespace that ends with its threads: every frame goes to everybody else who is connected.
pub struct Network {
    pub socket: std::path::PathBuf,
    answered: Arc<AtomicU64>,
    over: Arc<AtomicBool>,
    client: Option<JoinHandle<Result<(), String>>>,
}

/// Asks the interface `name` for something (netdevice(7)).
fn ask(request: libc::c_ulong, name: &str, value: &[u8], fd: i32) {
    let mut packet = [0_u8; 40];
    packet[..name.len()].copy_from_slice(name.as_bytes());
    packet[16..16 + value.len()].copy_from_slice(value);
    // SAFETY: the descriptor is open, and these requests read a struct ifreq, 40 bytes, which lives through the call.
    let done = unsafe { libc::ioctl(fd, request, packet.as_ptr()) };
    assert_eq!(done, 0, "{request:#x}: {}", std::io::Error::last_os_error());
}

/// A network device of this thread's namespace, up and with the address.
fn tap() -> std::fs::File {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = std::fs::File::options();
    let device =
        options.read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun").expect("a tap device");
    // TUNSETIFF with IFF_TAP and IFF_NO_PI.
    ask(0x4004_54ca, "world0", &0x1002_u16.to_le_bytes(), device.as_raw_fd());
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").expect("a socket");
    let address = |octets: [u8; 4]| [&[2, 0, 0, 0][..], &octets].concat();
    ask(libc::SIOCSIFADDR, "world0", &address(CLIENT), socket.as_raw_fd());
    ask(libc::SIOCSIFNETMASK, "world0", &address([255, 255, 255, 0]), socket.as_raw_fd());
    ask(libc::SIOCSIFFLAGS, "world0", &(libc::IFF_UP as u16).to_le_bytes(), socket.as_raw_fd());
    device
}

/// Takes whole frames out of `bytes`.
pub fn frames(bytes: &mut Vec<u8>) -> Vec<Vec<u8>> {
    let mut found = Vec::new();
    while let Some((length, rest)) = bytes.split_first_chunk::<4>() {
        let length = u32::from_be_bytes(*length) as usize;
        if rest.len() < length {
            break;
        }
        found.push(rest[..length].to_vec());
        bytes.drain(..4 + length);
    }
    found
}

/// Passes frames on until it is over.
fn switch(listener: &UnixListener, mut device: std::fs::File, over: &AtomicBool) {
    listener.set_nonblocking(true).expect("a listener");
    let mut ports: Vec<(UnixStream, Vec<u8>)> = Vec::new();
    let mut buffer = vec![0; 1 << 16];
    while !over.load(Ordering::Acquire) {
        let mut quiet = true;
        if let Ok((port, _)) = listener.accept() {
            port.set_read_timeout(Some(Duration::from_micros(100))).expect("a port");
            ports.push((port, Vec::new()));
        }
        // From whom: 0 is the device.
        let mut come: Vec<(usize, Vec<u8>)> = Vec::new();
        while let Ok(length) = device.read(&mut buffer) {
            come.push((0, buffer[..length].to_vec()));
        }
        for (index, (port, bytes)) in ports.iter_mut().enumerate() {
            if let Ok(length) = port.read(&mut buffer) {
                bytes.extend(&buffer[..length]);
                come.extend(frames(bytes).into_iter().map(|frame| (index + 1, frame)));
            }
        }
        for (from, frame) in come {
            quiet = false;
            if from != 0 {
                let _ = device.write(&frame);
            }
            let framed = [&(frame.len() as u32).to_be_bytes()[..], &frame].concat();
            for (_, (port, _)) in ports.iter_mut().enumerate().filter(|(index, _)| index + 1 != from) {
                let _ = port.write_all(&framed);
            }
        }
        if quiet {
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}

/// One conversation over one connection, until it is over: every answer continues the chain of all before it.
fn converse(answered: &AtomicU64, over: &AtomicBool) -> Result<(), String> {
    let guest = SocketAddrV4::new(GUEST.into(), 7).into();
    // It is tried from before the guest boots.
    let end = Instant::now() + BOOTED + BOUND;
    let mut stream = loop {
        match TcpStream::connect_timeout(&guest, Duration::from_secs(1)) {
            Ok(stream) => break stream,
            Err(error) if Instant::now() > end => return Err(format!("no connection: {error}")),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    let told = |error: std::io::Error| format!("after {} answers: {error}", answered.load(Ordering::Acquire));
    stream.set_nodelay(true).map_err(told)?;
    stream.set_read_timeout(Some(BOUND)).map_err(told)?;
    let (mut next, mut chain) = (0_u64, 0_u64);
    let mut waiting = VecDeque::new();
    while !over.load(Ordering::Acquire) {
        while waiting.len() < IN_FLIGHT {
            next += 1;
            stream.write_all(&next.to_le_bytes()).map_err(told)?;
            waiting.push_back(next);
        }
        let mut answer = [0; 16];
        stream.read_exact(&mut answer).map_err(told)?;
        let (count, is) = answer.split_at(8);
        let [count, is] = [count, is].map(|word| u64::from_le_bytes(word.try_into().expect("8 bytes")));
        let due = answered.load(Ordering::Acquire) + 1;
        chain = mixed(chain ^ waiting.pop_front().expect("one waits"), due, 1);
        if (count, is) != (due, chain) {
            return Err(format!("answer {due} is {count} with {is:#x}; it must have {chain:#x}"));
        }
        answered.store(due, Ordering::Release);
    }
    Ok(())
}

impl Network {
    /// `None`, said, where there cannot be one for this guest.
    pub fn here(folder: &Path, linux: &Linux) -> Option<Self> {
        if linux.with_modules.is_none() {
            eprintln!("skipped: no modules of virtio devices: the kernel is not the lab's");
            return None;
        }
        if !Path::new("/dev/net/tun").exists() {
            eprintln!("skipped: this kernel has no /dev/net/tun");
            return None;
        }
        Self::new(folder).map_err(|why| eprintln!("skipped: {why}")).ok()
    }

    fn new(folder: &Path) -> Result<Self, String> {
        let socket = folder.join("world");
        let listener = UnixListener::bind(&socket).expect("a socket");
        let (answered, over) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (told, hear) = mpsc::channel();
        let (counter, ended) = (Arc::clone(&answered), Arc::clone(&over));
        let client = std::thread::spawn(move || {
            // SAFETY: the network namespace is this thread's own, and nothing in this process counts on the one it leaves.
            let unshared = unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) };
            if let Err(error) = unshared {
                let _ = told.send(Err(format!("no network namespace: {error}")));
                return Ok(());
            }
            let device = tap();
            // Not before the last answer has come.
            let heard = Arc::new(AtomicBool::new(false));
            let passing = {
                let heard = Arc::clone(&heard);
                std::thread::spawn(move || switch(&listener, device, &heard))
            };
            let _ = told.send(Ok(()));
            let spoken = converse(&counter, &ended);
            heard.store(true, Ordering::Release);
            passing.join().expect("the switch");
            spoken
        });
        hear.recv().expect("told")?;
        Ok(Self { socket, answered, over, client: Some(client) })
    }

    pub fn answered(&self) -> u64 {
        self.answered.load(Ordering::Acquire)
    }

    /// Waits until so many have been answered.
    pub fn wait_for(&mut self, count: u64) {
        let end = Instant::now() + BOUND;
        while self.answered() < count {
            if self.client.as_ref().is_none_or(JoinHandle::is_finished) {
                panic!("the conversation is over: {:?}", self.client.take().map(JoinHandle::join));
            }
            assert!(Instant::now() < end, "{} of {count} answers", self.answered());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn end(mut self) {
        self.over.store(true, Ordering::Release);
        self.client
            .take()
            .expect("not ended yet")
            .join()
            .expect("the client")
            .expect("a conversation without a contradiction");
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
    }
}

/// A relay of `name`'s guest, between NAME.net and the world.
pub fn relay(place: &Place, folder: &Path, name: &str, network: &Network) -> (Process, String) {
    let path = |suffix: &str| folder.join(format!("{name}.{suffix}")).display().to_string();
    let (guest, hand, world) = (path("net"), path("hand"), format!("unix:{}", network.socket.display()));
    let mut relay = place.belay(&["relay", "--json", "--guest", &guest, "--hand", &hand, "--world", &world]);
    relay.wait_for_event("listening");
    (relay, hand)
}
