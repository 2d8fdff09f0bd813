use super::*;
use crate::qemu::wire::Wire;
use belay_checkpoint::guest::{Packet, PacketSink};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, Protocol, RecvFlags, SocketFlags, SocketType, recv, socket_with};
use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Arc, Mutex};

/// For local experiments (IEEE 802): nobody else on a new device says anything of this type.
const EXPERIMENTS: u16 = 0x88b5;
const BOUND: Duration = Duration::from_secs(20);
const NAME: &str = "guest0";

/// Taps, and who hears what came in of them and through all that is before them.
struct Stage {
    taps: Vec<File>,
    listener: OwnedFd,
    came: VecDeque<u8>,
    next: u8,
}

impl Stage {
    /// With one tap.
    fn set() -> Result<Self, String> {
        Self::with(&[NAME])
    }

    /// In this thread's network namespace; why not, if it cannot be.
    fn with(names: &[&str]) -> Result<Self, String> {
        let taps = names.iter().map(|name| Self::tap(name)).collect::<Result<_, _>>()?;
        let protocol = Protocol::from_raw(std::num::NonZeroU32::new(u32::from(EXPERIMENTS.to_be())).unwrap());
        let listener = socket_with(AddressFamily::PACKET, SocketType::RAW, SocketFlags::CLOEXEC, Some(protocol));
        let listener = listener.map_err(|errno| format!("no packet socket: {errno}"))?;
        let mut netlink = Netlink::open().unwrap();
        for name in names {
            let link = netlink.link(name).unwrap().expect("just made");
            netlink.set_up(name, link.index).unwrap();
        }
        Ok(Self { taps, listener, came: VecDeque::new(), next: 1 })
    }

    fn tap(name: &str) -> Result<File, String> {
        let options = File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun");
        let tap = options.map_err(|error| format!("/dev/net/tun: {error}"))?;
        let mut request = [0_u8; 40];
        request[..name.len()].copy_from_slice(name.as_bytes());
        // IFF_TAP and IFF_NO_PI.
        request[16..18].copy_from_slice(&0x1002_u16.to_ne_bytes());
        // SAFETY: TUNSETIFF reads a struct ifreq, 40 bytes, which lives through the call.
        let done = unsafe { libc::ioctl(tap.as_raw_fd(), 0x4004_54ca, request.as_ptr()) };
        if done != 0 {
            return Err(format!("no tap: {}", io::Error::last_os_error()));
        }
        Ok(tap)
    }

    /// The guest sends this many frames; their numbers.
    fn send(&mut self, count: u8) -> Vec<u8> {
        self.send_by(0, count)
    }

    fn send_by(&mut self, tap: usize, count: u8) -> Vec<u8> {
        let numbers: Vec<u8> = (self.next..self.next + count).collect();
        for &number in &numbers {
            let mut frame = vec![0xff; 6];
            frame.extend([2, 0, 0, 0, 0, 1]);
            frame.extend(EXPERIMENTS.to_be_bytes());
            frame.extend([number; 50]);
            self.taps[tap].write_all(&frame).unwrap();
        }
        self.next += count;
        numbers
    }

    /// The next frames that the world hears.
    fn heard(&mut self, count: usize) -> Vec<u8> {
        let deadline = Deadline::after(BOUND);
        while self.came.len() < count {
            assert!(!deadline.expired(), "{} of {count} frames came", self.came.len());
            self.hear(Some(deadline.left()));
        }
        self.came.drain(..count).collect()
    }

    fn hear(&mut self, wait: Option<Duration>) {
        set_socket_timeout(&self.listener, Timeout::Recv, wait).unwrap();
        let flags = if wait.is_none() { RecvFlags::DONTWAIT } else { RecvFlags::empty() };
        let mut frame = [0; 100];
        match recv(&self.listener, &mut frame[..], flags) {
            Ok((length, _)) => self.came.push_back(frame[length - 1]),
            Err(errno) => assert_eq!(errno, Errno::AGAIN),
        }
    }

    /// That the world hears nothing while this many bytes are held: what was sent is there, and not on its way.
    fn expect_held(&mut self, gate: &mut Gate, frames: u32) {
        let held = gate.netlink.queue(&gate.ifb.name, gate.ifb.index).unwrap().held;
        assert_eq!(held, frames * 64);
        self.hear(None);
        assert!(self.came.is_empty(), "{:?} came out of a shut gate", self.came);
    }
}

/// As the outbox does: once more until it is taken.
fn release(gate: &mut Gate, mark: u64) {
    let deadline = Deadline::after(BOUND);
    while let Err(error) = gate.release(mark) {
        assert!(matches!(error, TapError::Busy { .. }) && !deadline.expired(), "{error}");
        std::thread::yield_now();
    }
}

/// The gate, or why this kernel has none.
fn gate() -> Result<Gate, String> {
    gate_before(NAME)
}

fn gate_before(name: &str) -> Result<Gate, String> {
    Gate::shut_before(name).map_err(|error| match error {
        TapError::Netlink(error @ NetlinkError::Refused { errno: Errno::NOENT | Errno::OPNOTSUPP, .. }) => {
            error.to_string()
        }
        other => panic!("{other}"),
    })
}

fn in_a_namespace(test: impl FnOnce() -> Result<(), String> + Send + 'static) {
    let inside = move || {
        // SAFETY: only this thread changes its namespace, and it ends with the test.
        let unshared = unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) };
        unshared.map_err(|errno| format!("no network namespace: {errno}"))?;
        test()
    };
    match std::thread::spawn(inside).join() {
        Ok(Ok(())) => {}
        Ok(Err(why)) => println!("skipped: {why}"),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

#[test]
fn what_was_not_committed_never_leaves_and_what_was_leaves_in_order() {
    in_a_namespace(|| {
        let mut stage = Stage::set()?;
        let mut gate = gate()?;
        assert!(matches!(Gate::shut_before(NAME), Err(TapError::Taken { .. })), "a second belay");
        let first = stage.send(5);
        stage.expect_held(&mut gate, 5);
        assert!(gate.close_epoch(0).unwrap());
        let second = stage.send(3);
        assert!(!gate.close_epoch(1).unwrap(), "its mark is behind the first one's commit");
        let third = stage.send(2);
        gate.release(7).unwrap();
        stage.expect_held(&mut gate, 10);
        release(&mut gate, 0);
        assert_eq!(stage.heard(5), first);
        stage.expect_held(&mut gate, 5);
        release(&mut gate, 0);
        stage.expect_held(&mut gate, 5);
        assert!(gate.close_epoch(1).unwrap());
        release(&mut gate, 1);
        assert_eq!(stage.heard(5), [second, third].concat());
        // An epoch in which nothing was sent, and many that follow each other closely.
        for mark in 2..50 {
            let sent = stage.send((mark % 4) as u8);
            assert!(gate.close_epoch(mark).unwrap());
            release(&mut gate, mark);
            assert_eq!(stage.heard(sent.len()), sent);
        }
        stage.expect_held(&mut gate, 0);
        assert_eq!(gate.dropped().unwrap(), 0);
        Ok(())
    });
}

#[test]
fn a_gate_whose_belay_died_stays_shut_and_the_next_one_throws_away_what_it_held() {
    in_a_namespace(|| {
        let mut stage = Stage::set()?;
        let dead = gate()?;
        stage.send(3);
        assert!({
            let mut dead = dead;
            dead.close_epoch(0).unwrap()
        });
        stage.send(2);
        let mut next = gate()?;
        stage.expect_held(&mut next, 0);
        let sent = stage.send(1);
        assert!(next.close_epoch(0).unwrap());
        release(&mut next, 0);
        assert_eq!(stage.heard(1), sent);
        stage.send(1);
        drop(next);
        clear(NAME).unwrap();
        let direct = stage.send(1);
        assert_eq!(stage.heard(1), direct);
        Ok(())
    });
}

#[test]
fn once_the_guest_is_its_hosts_own_everything_leaves_and_nothing_stays_of_the_gate() {
    in_a_namespace(|| {
        let mut stage = Stage::set()?;
        let mut gate = gate()?;
        let mut sent = stage.send(4);
        assert!(gate.close_epoch(0).unwrap());
        sent.extend(stage.send(4));
        let device = gate.device().to_owned();
        gate.open(Deadline::after(BOUND)).unwrap();
        // The ifb hands on in a softirq of its own what it has taken out of the plug; what comes now goes by itself.
        assert_eq!(stage.heard(8), sent);
        let direct = stage.send(2);
        assert_eq!(stage.heard(2), direct);
        assert_eq!(Netlink::open().unwrap().link(&device).unwrap(), None);
        Gate::shut_before(NAME).unwrap();
        Ok(())
    });
}

/// The marks that were emitted, as an outbox has them.
#[derive(Default)]
struct Marks(Mutex<VecDeque<Packet>>);

impl PacketSink for Marks {
    fn emit(&self, packet: Packet) {
        self.0.lock().unwrap().push_back(packet);
    }

    fn has_room(&self) -> bool {
        true
    }
}

#[test]
fn p4_two_taps_of_a_guest_let_an_epoch_go_by_one_mark_and_neither_before() {
    in_a_namespace(|| {
        let mut stage = Stage::with(&[NAME, "guest1"])?;
        let (wire, marks) = (Wire::new(), Arc::new(Marks::default()));
        wire.take_taps(vec![gate()?, gate_before("guest1")?], marks.clone());
        let mut world = wire.emitter();
        let mut commit = || {
            let mark = marks.0.lock().unwrap().pop_front().expect("a mark");
            let deadline = Deadline::after(BOUND);
            while let Err(error) = world.send(&mark) {
                assert!(!deadline.expired(), "{error}");
                std::thread::yield_now();
            }
        };
        let nothing_more = |stage: &mut Stage| {
            stage.hear(None);
            assert!(stage.came.is_empty(), "{:?} came out of a shut gate", stage.came);
        };
        let first = [stage.send_by(0, 2), stage.send_by(1, 3)].concat();
        wire.settle().unwrap();
        assert_eq!(marks.0.lock().unwrap().len(), 1, "one for both");
        let second = [stage.send_by(1, 1), stage.send_by(0, 1)].concat();
        nothing_more(&mut stage);
        commit();
        let mut heard = stage.heard(5);
        // Two wires keep no order between each other.
        heard.sort_unstable();
        assert_eq!(heard, first);
        nothing_more(&mut stage);
        wire.settle().unwrap();
        commit();
        let mut heard = stage.heard(2);
        heard.sort_unstable();
        assert_eq!(heard, second);
        stage.send_by(0, 1);
        stage.send_by(1, 1);
        nothing_more(&mut stage);
        wire.let_go(Deadline::after(BOUND), || {}).unwrap();
        stage.heard(2);
        let direct = [stage.send_by(0, 1), stage.send_by(1, 1)].concat();
        assert_eq!(stage.heard(2), direct);
        Ok(())
    });
}

#[test]
fn what_is_no_tap_or_has_another_ones_filters_is_refused_by_its_name() {
    for name in ["", "a b", "a/b", "..", "sixteen_letters_"] {
        assert!(matches!(check_name(name), Err(TapError::Name(_))), "{name}");
    }
    in_a_namespace(|| {
        assert!(matches!(Gate::shut_before("lo"), Err(TapError::NoTap { .. })));
        let absent = Gate::shut_before(NAME).unwrap_err().to_string();
        assert!(absent.contains("no device guest0") && absent.contains("ip tuntap add guest0"), "{absent}");
        let stage = Stage::set()?;
        is_of(std::process::id(), NAME).unwrap();
        let other = is_of(std::process::id(), "guest1").unwrap_err().to_string();
        assert!(other.contains("does not have the tap guest1 open") && other.contains(NAME), "{other}");
        let mut netlink = Netlink::open().unwrap();
        let index = netlink.link(NAME).unwrap().unwrap().index;
        let made = netlink.make_ingress(NAME, index);
        made.map_err(|error| error.to_string())?;
        match Gate::shut_before(NAME) {
            Err(TapError::Filtered { .. }) => {}
            Err(TapError::Netlink(error)) => return Err(error.to_string()),
            other => panic!("{other:?}"),
        }
        netlink.delete_ingress(NAME, index).unwrap();
        assert_eq!(netlink.link(&format!("belay-{index}")).unwrap(), None, "nothing stays of a gate that was not made");
        drop(stage);
        Ok(())
    });
}
