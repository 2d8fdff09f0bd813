//! A tethered QEMU guest with a network: what it said and was not committed nobody has heard, what was heard it has said, and who was in
//! conversation with it goes on.

mod qemu_guest;
mod running;

use qemu_guest::{BOOTED, Linux, Machine, Qemu, newer_qemu, no_qemu};
use running::{BOUND, Place, Process, kill};
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
const IN_FLIGHT: usize = 16;

/// As the guest has it (`qemu_guest/guest.rs`).
fn mixed(sequence: u64, page: u64, word: u64) -> u64 {
    let x = sequence.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ page.wrapping_mul(0xc2b2_ae3d_27d4_eb4f) ^ word << 32;
    (x ^ x >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9)
}

/// A network of this test's own, in a namespace that ends with its threads: every frame goes to everybody else who is connected.
struct Network {
    socket: std::path::PathBuf,
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
fn frames(bytes: &mut Vec<u8>) -> Vec<Vec<u8>> {
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

    fn answered(&self) -> u64 {
        self.answered.load(Ordering::Acquire)
    }

    /// Waits until so many have been answered.
    fn wait_for(&mut self, count: u64) {
        let end = Instant::now() + BOUND;
        while self.answered() < count {
            if self.client.as_ref().is_none_or(JoinHandle::is_finished) {
                panic!("the conversation is over: {:?}", self.client.take().map(JoinHandle::join));
            }
            assert!(Instant::now() < end, "{} of {count} answers", self.answered());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn end(mut self) {
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
fn relay(place: &Place, folder: &Path, name: &str, network: &Network) -> (Process, String) {
    let path = |suffix: &str| folder.join(format!("{name}.{suffix}")).display().to_string();
    let (guest, hand, world) = (path("net"), path("hand"), format!("unix:{}", network.socket.display()));
    let mut relay = place.belay(&["relay", "--json", "--guest", &guest, "--hand", &hand, "--world", &world]);
    relay.wait_for_event("listening");
    (relay, hand)
}

/// A guest in conversation at home.
struct Home {
    place: Place,
    folder: qemu_guest::SharedMemory,
    network: Network,
    machine: Machine,
    relay: Process,
    hand: String,
    source: Qemu,
}

/// On its way between two relays.
struct Scene {
    place: Place,
    folder: qemu_guest::SharedMemory,
    network: Network,
    source: Qemu,
    destination: Process,
    sender: Process,
    relays: [Process; 2],
}

impl Home {
    /// In a QEMU that connects to its relay again by itself where there is a `newer` one. `None`, said, where it cannot be.
    fn start(newer: Option<String>) -> Option<Self> {
        if no_qemu() {
            return None;
        }
        let Some(linux) = Linux::here().filter(|linux| linux.with_modules.is_some()) else {
            eprintln!("skipped: no modules of a network card: the kernel is not the lab's");
            return None;
        };
        if !Path::new("/dev/net/tun").exists() {
            eprintln!("skipped: this kernel has no /dev/net/tun");
            return None;
        }
        let (place, folder) = (Place::new(), qemu_guest::shared_memory());
        let mut network = match Network::new(folder.path()) {
            Ok(network) => network,
            Err(why) => {
                eprintln!("skipped: {why}");
                return None;
            }
        };
        let mut machine = Machine { blocks: vec![192], address: Some("10.77.0.2"), ..Machine::of("q35", Some(linux)) };
        if let Some(program) = newer {
            (machine.program, machine.reconnects) = (program, true);
        }
        let (relay, hand) = relay(&place, folder.path(), "here", &network);
        let source = Qemu::start(&place, folder.path(), &machine, "here");
        source.console.wait_until_booted();
        network.wait_for(200);
        Some(Self { place, folder, network, machine, relay, hand, source })
    }

    /// Sends it away.
    fn leave(self, sent: &[&str]) -> Scene {
        let Self { place, folder, network, machine, relay: here, hand: hand_here, source } = self;
        let (there, hand_there) = relay(&place, folder.path(), "there", &network);
        let (state_dir, arguments) = (place.text("there"), machine.arguments(folder.path(), "there"));
        let mut words = vec!["receive", "--json", "--listen", "127.0.0.1:0", "--state-dir", &state_dir];
        words.extend(["qemu", "--relay", &hand_there, "--", &machine.program]);
        words.extend(arguments.iter().map(String::as_str));
        let mut destination = place.belay(&words);
        let to = destination.wait_for_event("listening")["address"].as_str().expect("an address").to_owned();
        let (kept, run_dir, socket) = (place.text("here"), place.text("run"), source.socket.display().to_string());
        let mut words = vec!["send", "--json", "--to", &to, "--state-dir", &kept, "--run-dir", &run_dir];
        words.extend(sent);
        words.extend(["qemu", "--relay", &hand_here, "--qmp", &socket]);
        let sender = place.belay(&words);
        Scene { place, folder, network, source, destination, sender, relays: [here, there] }
    }
}

/// Long enough that a destination which is struck has always said something that is not committed.
const STRUCK: [&str; 4] = ["--release", "never", "--period", "100ms"];

#[test]
fn p4_a_conversation_with_a_guest_survives_its_destination_and_no_answer_is_taken_back() {
    let Some(home) = Home::start(None) else { return };
    survives_its_destination(home.leave(&STRUCK));
}

#[test]
fn p4_a_conversation_with_a_guest_survives_its_relay_where_qemu_connects_again_and_then_its_destination() {
    let Some(newer) = newer_qemu() else { return };
    let Some(mut home) = Home::start(Some(newer)) else { return };
    home.relay.crash();
    let answered = home.network.answered();
    // A socket that nobody serves is replaced.
    (home.relay, home.hand) = relay(&home.place, home.folder.path(), "here", &home.network);
    home.network.wait_for(answered + 2 * IN_FLIGHT as u64);
    survives_its_destination(home.leave(&STRUCK));
}

fn survives_its_destination(scene: Scene) {
    let Scene { place: _place, folder: _folder, mut network, mut source, mut destination, mut sender, relays } = scene;
    destination.wait_for_event("all-landed");
    let (before, begun) = (network.answered(), Instant::now());
    network.wait_for(before + 300);
    println!("{:.0} answers a second under the tether", 300.0 / begun.elapsed().as_secs_f64());
    let qemu = destination.seen.iter().find(|event| event["event"] == "vmm-started").expect("told")["pid"].as_i64();
    let (struck, begun) = (network.answered(), Instant::now());
    kill(qemu.expect("a pid") as i32, libc::SIGKILL);
    sender.wait_for_event("caught");
    network.wait_for(struck + 2 * IN_FLIGHT as u64);
    println!("{} ms from the kill until the conversation went on", begun.elapsed().as_millis());
    network.wait_for(struck + 300);
    assert_eq!(sender.end(), 10, "{}", sender.story());
    assert_eq!(destination.end(), 13, "{}", destination.story());
    source.wait();
    // Nobody has the relay in hand any more, and it goes on.
    network.wait_for(struck + 600);
    network.end();
    drop(relays);
    drop(sender);
}

#[test]
fn after_a_release_the_conversation_goes_on_and_the_relay_that_the_guest_left_is_anybodys_again() {
    let Some(home) = Home::start(None) else { return };
    let mut scene = home.leave(&[]);
    assert_eq!(scene.sender.end(), 0, "{}", scene.sender.story());
    assert_eq!(scene.destination.end(), 0, "{}", scene.destination.story());
    scene.source.wait();
    let answered = scene.network.answered();
    scene.network.wait_for(answered + 300);
    // Another guest's card, at the relay that was left: what it sends reaches everybody.
    let frame = [&[0xff; 6][..], &[0x52, 0x54, 0, 1, 2, 3, 0x88, 0xb5], &[0x5a; 46]].concat();
    let framed = [&(frame.len() as u32).to_be_bytes()[..], &frame].concat();
    let mut port = UnixStream::connect(&scene.network.socket).expect("a port of the network");
    port.set_read_timeout(Some(Duration::from_millis(50))).expect("a port");
    let end = Instant::now() + BOUND;
    let (mut bytes, mut buffer) = (Vec::new(), vec![0; 1 << 16]);
    // Seldom enough that all of them have room where they wait until the relay has heard that the killed QEMU is gone: whoever waited for room
    // here would not read the port.
    let mut card = UnixStream::connect(scene.folder.path().join("here.net")).expect("the relay that was left");
    let mut next = Instant::now();
    loop {
        if Instant::now() >= next {
            card.write_all(&framed).expect("room for a frame");
            next += Duration::from_millis(250);
        }
        let read = port.read(&mut buffer).unwrap_or(0);
        bytes.extend(&buffer[..read]);
        if frames(&mut bytes).contains(&frame) {
            break;
        }
        assert!(Instant::now() < end, "nothing comes through the relay that was left");
    }
    // The network passes nothing on while one of its ports is full, which this would soon be: nobody reads it any more.
    drop(port);
    scene.network.end();
    for left in scene.destination.events("qemu-left") {
        kill(left["pid"].as_i64().expect("a pid") as i32, libc::SIGKILL);
    }
    drop(scene.relays);
    scene.place.expect_nothing_left();
}
