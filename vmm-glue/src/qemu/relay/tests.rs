//! A relay between sockets of these tests' own: QEMU's end, the world's end, and a page server.

use super::frames::{Came, Queue};
use super::messages::{FromHand, FromRelay};
use super::*;
use belay_checkpoint::guest::{Packet, PacketSink};
use belay_transport::Deadline;
use proptest::prelude::*;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Longest that anything here is waited for; a machine may be busy.
const BOUND: Duration = Duration::from_secs(30);

fn soon() -> Deadline {
    Deadline::after(BOUND)
}

/// What came to a page server.
#[derive(Default)]
struct Inbox {
    packets: Mutex<Vec<Packet>>,
    came: Condvar,
}

impl Inbox {
    fn wait_for(&self, count: usize) -> Vec<Packet> {
        let packets = self.packets.lock().unwrap();
        let (packets, _) = self.came.wait_timeout_while(packets, BOUND, |packets| packets.len() < count).unwrap();
        assert!(packets.len() >= count, "{} of {count} packets came", packets.len());
        packets.clone()
    }
}

impl PacketSink for Inbox {
    fn emit(&self, packet: Packet) {
        self.packets.lock().unwrap().push(packet);
        self.came.notify_all();
    }

    fn has_room(&self) -> bool {
        true
    }
}

/// One end of a connection of frames.
struct End {
    stream: UnixStream,
    frames: Frames,
}

impl End {
    fn over(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(BOUND)).unwrap();
        stream.set_write_timeout(Some(BOUND)).unwrap();
        Self { stream, frames: Frames::default() }
    }

    fn send(&mut self, frame: &[u8]) {
        self.stream.write_all(&(frame.len() as u32).to_be_bytes()).unwrap();
        self.stream.write_all(frame).unwrap();
    }

    fn receive(&mut self) -> Vec<u8> {
        loop {
            if let Some(frame) = self.frames.next().unwrap() {
                return frame.to_vec();
            }
            match self.frames.fill(&mut self.stream).unwrap() {
                Came::Bytes(_) => {}
                other => panic!("{other:?} instead of a frame"),
            }
        }
    }

    /// Whether nothing has come. Sound only where what would come has had to come before something else did.
    fn is_silent(&mut self) -> bool {
        self.stream.set_nonblocking(true).unwrap();
        let came = self.frames.fill(&mut self.stream).unwrap();
        self.stream.set_nonblocking(false).unwrap();
        came == Came::Nothing && self.frames.next().unwrap().is_none()
    }
}

type Changes = Vec<(Gate, String)>;

/// A relay that runs in a thread, and its world.
struct Place {
    directory: tempfile::TempDir,
    worlds: UnixListener,
    stop: Option<OwnedFd>,
    relay: Option<JoinHandle<RelayCounts>>,
    changes: Arc<(Mutex<Changes>, Condvar)>,
}

impl Place {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let worlds = UnixListener::bind(path("world")).unwrap();
        let world = World::open(&format!("unix:{}", path("world").display()).parse().unwrap()).unwrap();
        let mut relay = Relay::new(&path("guest"), &path("hand"), world).unwrap();
        let (stopped, stop) = rustix::pipe::pipe().unwrap();
        let changes = Arc::new((Mutex::new(Vec::new()), Condvar::new()));
        let told = Arc::clone(&changes);
        let relay = std::thread::spawn(move || {
            let changed = |gate, why: &str| {
                told.0.lock().unwrap().push((gate, why.to_owned()));
                told.1.notify_all();
            };
            relay.run(stopped.as_fd(), changed).unwrap();
            relay.counts()
        });
        Self { directory, worlds, stop: Some(stop), relay: Some(relay), changes }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn world(&self) -> End {
        End::over(self.worlds.accept().unwrap().0)
    }

    fn guest(&self) -> End {
        End::over(UnixStream::connect(self.path("guest")).unwrap())
    }

    fn hand(&self, next_sequence: u64) -> (Hand, Arc<Inbox>) {
        let inbox = Arc::new(Inbox::default());
        let sink = Arc::clone(&inbox) as Arc<dyn PacketSink>;
        (Hand::attach(&self.path("hand"), sink, next_sequence, soon()).unwrap(), inbox)
    }

    /// Waits until the gate has changed to `gate` for `why`, so often.
    fn wait_for(&self, gate: Gate, why: &str, times: usize) {
        let seen = |changes: &[(Gate, String)]| changes.iter().filter(|(at, is)| *at == gate && is == why).count();
        let changes = self.changes.0.lock().unwrap();
        let (changes, _) = self.changes.1.wait_timeout_while(changes, BOUND, |changes| seen(changes) < times).unwrap();
        assert!(seen(&changes) >= times, "{gate:?} for {why}: {changes:?}");
    }

    fn end(mut self) -> RelayCounts {
        drop(self.stop.take());
        self.relay.take().unwrap().join().unwrap()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(relay) = self.relay.take() {
            let _ = relay.join();
        }
    }
}

const CAME: &str = "a guest has connected";
const GONE: &str = "the page server has gone without letting go";

#[test]
fn frames_pass_both_ways_in_order_while_nobody_has_the_relay_in_hand() {
    let place = Place::new();
    let (mut world, mut guest) = (place.world(), place.guest());
    for number in 0..200_u32 {
        guest.send(&[&number.to_le_bytes()[..], &vec![7; number as usize * 7]].concat());
        world.send(&[&number.to_le_bytes()[..], &vec![9; number as usize * 3]].concat());
    }
    for number in 0..200_u32 {
        assert_eq!(world.receive(), [&number.to_le_bytes()[..], &vec![7; number as usize * 7]].concat());
        assert_eq!(guest.receive(), [&number.to_le_bytes()[..], &vec![9; number as usize * 3]].concat());
    }
    let counts = place.end();
    assert_eq!((counts.from_guest, counts.to_world, counts.from_world, counts.to_guest), (200, 200, 200, 200));
}

#[test]
fn p4_what_a_held_guest_sends_leaves_only_by_the_hand() {
    let place = Place::new();
    let (mut world, mut guest) = (place.world(), place.guest());
    place.wait_for(Gate::Open, CAME, 1);
    let (mut hand, inbox) = place.hand(40);
    assert_eq!(hand.guest(), Some(std::process::id()));
    guest.send(b"one");
    guest.send(b"two");
    let packets = inbox.wait_for(2);
    let packet = |sequence, bytes: &[u8]| Packet { sequence, bytes: bytes.to_vec() };
    assert_eq!(packets, [packet(40, b"one"), packet(41, b"two")]);
    let mut way = hand.emitter();
    // What the relay would have passed on by itself would have gone before this.
    way.send(&packet(0, b"ours")).unwrap();
    assert_eq!(world.receive(), b"ours");
    // Input is not held.
    world.send(b"in");
    assert_eq!(guest.receive(), b"in");
    let settled = hand.settle(soon()).unwrap();
    assert_eq!(settled, Settled { next_sequence: 42, torn: false, dropped: 0 });
}

#[test]
fn a_settle_comes_back_when_all_that_was_sent_before_is_in_the_sink_and_holds_input_until_the_guest_goes_on() {
    let place = Place::new();
    let (mut world, mut guest) = (place.world(), place.guest());
    place.wait_for(Gate::Open, CAME, 1);
    let (mut hand, inbox) = place.hand(0);
    for round in 0..50_u64 {
        for _ in 0..20 {
            guest.send(&vec![round as u8 + 1; 1514]);
        }
        // Half a frame, as a QEMU that is stopped in the middle of one.
        guest.stream.write_all(&[0, 0, 0, 2, 9]).unwrap();
        let settled = hand.settle(soon()).unwrap();
        assert_eq!(settled, Settled { next_sequence: round * 21 + 20, torn: true, dropped: 0 });
        assert_eq!(inbox.packets.lock().unwrap().len() as u64, round * 21 + 20, "all before, and none after");
        world.send(b"while it stands");
        // The world's frame has come to the relay before this answer of the relay's; it is not passed on.
        hand.settle(soon()).unwrap();
        assert!(guest.is_silent());
        guest.stream.write_all(&[9]).unwrap();
        hand.go().unwrap();
        assert_eq!(guest.receive(), b"while it stands");
        inbox.wait_for((round as usize + 1) * 21);
    }
}

#[test]
fn p2_a_hand_that_dies_leaves_the_gate_shut_until_another_one_lets_go() {
    let place = Place::new();
    let (mut world, mut guest) = (place.world(), place.guest());
    place.wait_for(Gate::Open, CAME, 1);
    let (hand, inbox) = place.hand(0);
    guest.send(b"held");
    inbox.wait_for(1);
    drop(hand);
    place.wait_for(Gate::Shut, GONE, 1);
    guest.send(b"to a shut gate");
    world.send(b"to a shut gate");
    let (mut hand, inbox) = place.hand(7);
    // Whatever came to the shut gate is gone once this has been answered.
    hand.settle(soon()).unwrap();
    hand.go().unwrap();
    guest.send(b"again");
    assert_eq!(inbox.wait_for(1), [Packet { sequence: 7, bytes: b"again".to_vec() }]);
    let mut way = hand.emitter();
    hand.let_go(soon(), || {
        guest.send(b"after");
        for packet in inbox.wait_for(1) {
            way.send(&packet).unwrap();
        }
    })
    .unwrap();
    assert_eq!(world.receive(), b"again");
    assert_eq!(world.receive(), b"after");
    world.send(b"welcome");
    assert_eq!(guest.receive(), b"welcome");
    let counts = place.end();
    assert_eq!(counts.dropped_at_gate, 2, "{counts:?}");
}

#[test]
fn there_is_one_hand_and_one_that_says_nothing_is_not_it_for_long() {
    let place = Place::new();
    let (hand, _inbox) = place.hand(0);
    let refused =
        Hand::attach(&place.path("hand"), Arc::new(Inbox::default()), 0, Deadline::after(Duration::from_millis(300)));
    match refused {
        Err(HandError::Refused { why, .. }) => assert_eq!(why, format!("process {} has the hand", std::process::id())),
        other => panic!("{:?}", other.err()),
    }
    drop(hand);
    place.wait_for(Gate::Shut, GONE, 1);
    let silent = UnixStream::connect(place.path("hand")).unwrap();
    let begun = Instant::now();
    let (hand, _inbox) = place.hand(0);
    assert!(begun.elapsed() < BOUND / 2, "{:?}", begun.elapsed());
    drop((silent, hand));
    // Another version, and something that is none of the messages.
    let mut other = End::over(UnixStream::connect(place.path("hand")).unwrap());
    place.wait_for(Gate::Shut, GONE, 2);
    other.send(&[b'A', 9, 9]);
    assert_eq!(other.receive(), b"xthis relay speaks version 1, and was asked for 2313");
    assert_eq!(other.stream.read(&mut [0]).unwrap(), 0);
    let mut other = End::over(UnixStream::connect(place.path("hand")).unwrap());
    other.send(b"E without a hand");
    assert_eq!(other.stream.read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_guest_that_sends_nonsense_is_let_go_and_the_one_that_waits_takes_its_place() {
    let place = Place::new();
    let mut world = place.world();
    let mut guest = place.guest();
    place.wait_for(Gate::Open, CAME, 1);
    let mut standby = place.guest();
    standby.send(b"from the standby");
    for length in [0_u32, MAX_FRAME_BYTES as u32 + 1, u32::MAX] {
        guest.stream.write_all(&length.to_be_bytes()).unwrap();
        assert_eq!(guest.stream.read(&mut [0]).unwrap_or(0), 0);
        if length == 0 {
            assert_eq!(world.receive(), b"from the standby");
        }
        guest = standby;
        standby = place.guest();
    }
}

#[test]
fn p7_a_guest_is_read_from_whatever_waits_behind_the_relay_and_nothing_grows_without_a_bound() {
    let place = Place::new();
    // The world is there and never reads.
    let _world = place.world();
    let mut guest = place.guest();
    let frame = vec![1; 60_000];
    for _ in 0..400 {
        guest.send(&frame);
    }
    let counts = place.end();
    assert!(counts.dropped_to_world > 300 && counts.from_guest <= 400, "{counts:?}");
}

#[test]
fn a_served_path_is_not_taken_over_and_a_dead_ones_is() {
    let place = Place::new();
    let world = || World::open(&format!("unix:{}", place.path("world").display()).parse().unwrap()).unwrap();
    match Relay::new(&place.path("guest"), &place.path("hand-2"), world()) {
        Err(RelayError::Served { path }) => assert_eq!(path, place.path("guest")),
        other => panic!("{:?}", other.err()),
    }
    drop(UnixListener::bind(place.path("left")).unwrap());
    let relay = Relay::new(&place.path("left"), &place.path("hand-3"), world()).unwrap();
    use std::os::unix::fs::PermissionsExt;
    let mode = |name| std::fs::metadata(place.path(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode("left"), mode("hand-3")), (0o600, 0o600));
    drop(relay);
    assert!(!place.path("left").exists() && !place.path("hand-3").exists());
    std::fs::write(place.path("a file"), "not ours").unwrap();
    assert!(matches!(
        Relay::new(&place.path("a file"), &place.path("hand-4"), world()),
        Err(RelayError::Listen { .. })
    ));
    assert_eq!(std::fs::read(place.path("a file")).unwrap(), b"not ours");
}

/// In a network namespace of this thread's own: nothing of this host is touched, and all of it is gone with the thread.
#[test]
fn a_tap_device_gives_the_kernels_frames_and_takes_the_guests() {
    // SAFETY: a network namespace is this thread's own, and nothing in this process counts on the one it leaves: descriptors are not shared less.
    let unshared = unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) };
    if let Err(error) = unshared {
        return println!("skipped: no network namespace: {error}");
    }
    if !Path::new("/dev/net/tun").exists() {
        return println!("skipped: this kernel has no /dev/net/tun");
    }
    let mut world = World::open(&"tap:belay0".parse().unwrap()).unwrap();
    set_up("belay0");
    // A device that comes up has things to say: neighbour discovery and multicast reports of IPv6. Until then, what the relay would do:
    let mut heard = Vec::new();
    let end = soon();
    while heard.is_empty() && !end.expired() {
        world.receive(|frame| heard.push(frame.to_vec()));
        std::thread::yield_now();
    }
    let Some(frame) = heard.first() else { return println!("skipped: this kernel says nothing on a new device") };
    assert!(frame.len() >= 14, "{frame:?}");
    let received = || {
        let all = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
        let line = all.lines().find_map(|line| line.trim().strip_prefix("belay0:").map(str::to_owned)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
    };
    let before = received();
    let mut frame = vec![0xff; 6];
    frame.extend([0x52, 0x54, 0, 0, 0, 1, 0x88, 0xb5]);
    frame.resize(60, 7);
    assert!(world.send(&frame));
    assert_eq!(received(), before + 1);
}

/// `ip link set NAME up`.
fn set_up(name: &str) {
    use std::os::fd::AsRawFd;
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
    // SAFETY: an all-zero ifreq is a valid one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: the socket is open, and the argument points to an ifreq that lives through the call.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as libc::Ioctl, &raw const request) };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
}

#[test]
fn addresses_are_read_as_they_are_written_and_bad_ones_say_why() {
    for good in ["tap:tap0", "unix:/run/x"] {
        assert_eq!(good.parse::<WorldAddress>().unwrap().to_string(), good);
    }
    for bad in ["tap:", "tap:0123456789abcdef", "tap:a/b", "tap:%d", "unix:", "tcp:1", ""] {
        assert!(bad.parse::<WorldAddress>().is_err(), "{bad}");
    }
}

proptest! {
    #[test]
    fn frames_come_out_as_they_went_in_however_they_were_cut(
        frames in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..200), 0..20),
        cuts in prop::collection::vec(1_usize..97, 1..9),
    ) {
        let mut queue = Queue::new(1 << 20);
        for frame in &frames {
            prop_assert!(queue.push(&[&frame[..1], &frame[1..]]));
        }
        let mut bytes = Vec::new();
        queue.flush(&mut bytes).unwrap();
        let (mut into, mut found, mut left) = (Frames::default(), Vec::new(), &bytes[..]);
        for cut in cuts.iter().cycle() {
            let (now, rest) = left.split_at((*cut).min(left.len()));
            into.push(now);
            left = rest;
            while let Some(frame) = into.next().unwrap() {
                found.push(frame.to_vec());
            }
            if left.is_empty() {
                break;
            }
        }
        prop_assert_eq!(found, frames);
        prop_assert!(!into.is_torn());
    }

    #[test]
    fn what_is_understood_of_a_message_is_written_as_it_came(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
        if let Ok(message) = FromHand::decode(&bytes) {
            prop_assert_eq!(message.encode().parts().concat(), &bytes[..]);
        }
        if let Ok(message) = FromRelay::decode(&bytes) {
            prop_assert_eq!(message.encode().parts().concat(), &bytes[..]);
        }
    }
}
