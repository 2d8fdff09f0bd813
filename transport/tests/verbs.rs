//! What only `verbs` can go through: a peer whose process dies while its device is in the middle of answering.
//!
//! Without an RDMA device each prints that it was skipped. The peer is this executable again, with BELAY_VERBS_CHILD set.

mod common;

use belay_transport::Deadline;
use belay_transport::fabric::verbs::UNREACHABLE_AFTER;
use belay_transport::fabric::{self, FabricError, FabricKind, Owner, Read, ReadKey};
use belay_transport::region::Extent;
use belay_transport::session::{Address, Listener, Offer, Security, SessionConfig, connect};
use common::*;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io::{BufRead, BufReader, Lines};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

const CHILD: &str = "BELAY_VERBS_CHILD";

fn config() -> SessionConfig {
    SessionConfig {
        verbs: verbs_settings(),
        only: Some(FabricKind::Verbs),
        ..SessionConfig::new(Security::LoopbackOnly)
    }
}

/// A process that is killed and reaped when dropped.
struct Peer {
    child: Child,
    says: Lines<BufReader<ChildStdout>>,
}

impl Peer {
    /// Starts this executable as `role`, with what it needs to know.
    fn start(role: &str, about: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().expect("an executable"))
            .args(["--exact", "peer", "--nocapture"])
            .env(CHILD, format!("{role} {about}"))
            .stdout(Stdio::piped())
            .spawn()
            .expect("this executable starts");
        let says = BufReader::new(child.stdout.take().expect("piped")).lines();
        Self { child, says }
    }

    /// The rest of the line that begins with `word`.
    fn says(&mut self, word: &str) -> String {
        for line in &mut self.says {
            if let Some((_, rest)) = line.expect("text").split_once(&format!("{word} ")) {
                return rest.to_owned();
            }
        }
        panic!("the peer ended without saying {word}");
    }

    fn kill(&mut self) {
        self.child.kill().expect("it runs");
        self.child.wait().expect("it ends");
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read(remote: ReadKey, local: fabric::LocalKey) -> Read {
    Read { id: 1, remote, remote_offset: 0, local, local_offset: 0, len: 4096 }
}

/// What the other process does; nothing in an ordinary run.
#[test]
fn peer() {
    let Ok(order) = std::env::var(CHILD) else { return };
    let (role, about) = order.split_once(' ').expect("a role and an argument");
    match role {
        "owner" => be_owner(about),
        "initiator" => be_initiator(),
        other => panic!("there is no role {other}"),
    }
    // To be killed here; the bound is for a parent that has died.
    std::thread::sleep(Duration::from_secs(60));
}

fn be_owner(address: &str) {
    let source = connect(&address.parse().expect("an address"), config(), &Offer::default(), soon()).expect("connect");
    let mut owner = fabric::owner(&source).expect("owner");
    let (file, mapping) = memory(RAM_BYTES);
    mapping.write(0, &[0x77; 4096]);
    let key = owner.export_read(&file, &mapping, &[Extent { offset: 0, len: RAM_BYTES as u64 }]).expect("export");
    owner.serve_lane(FAULT, soon()).expect("serve");
    println!("key {}", key.0);
    // Nothing here is dropped: the process is killed with all of it alive.
    std::mem::forget((source, owner, file, mapping));
}

fn be_initiator() {
    let listener = Listener::bind(&Address::Tcp("127.0.0.1:0".to_owned()), config()).expect("bind");
    println!("address {}", listener.address());
    let destination = listener.accept(soon()).expect("accept").accept(b"", soon()).expect("reply");
    let mut initiator = fabric::initiator(&destination).expect("a data path");
    let (file, mapping) = memory(RAM_BYTES);
    initiator.register_local(&mapping).expect("register");
    let lanes = [FAULT, BULK].map(|id| initiator.open_lane(id, 8, soon()).expect("open"));
    println!("open {}", lanes.len());
    std::mem::forget((listener, destination, initiator, file, mapping, lanes));
}

/// An owner in another process, and this process's lane to it.
fn to_an_owner() -> Option<(Peer, Box<dyn fabric::Lane>, Read, impl Sized)> {
    verbs_settings()?;
    let listener = Listener::bind(&Address::Tcp("127.0.0.1:0".to_owned()), config()).expect("bind");
    let mut peer = Peer::start("owner", &listener.address().to_string());
    let destination = listener.accept(soon()).expect("accept").accept(b"", soon()).expect("reply");
    let mut initiator = fabric::initiator(&destination).expect("a data path");
    let (file, local) = memory(RAM_BYTES);
    let key = initiator.register_local(&local).expect("register");
    let mut lane = initiator.open_lane(FAULT, 8, soon()).expect("open");
    let read = read(ReadKey(peer.says("key").parse().expect("a number")), key);
    lane.post_reads(&[read]).expect("post");
    assert_eq!(complete(&mut *lane, 1), [1]);
    assert_eq!(bytes(&local, 0, 4096), [0x77; 4096]);
    Some((peer, lane, read, (listener, destination, initiator, file, local)))
}

#[test]
fn the_death_of_the_owners_process_is_noticed_by_who_waits_for_nothing() {
    let Some((mut peer, mut lane, _, _kept)) = to_an_owner() else { return };
    peer.kill();
    let reaped = Instant::now();
    let error = lane.wait(soon()).unwrap_err();
    assert!(matches!(error, FabricError::PeerClosed { .. }), "{error:?}");
    eprintln!("noticed {:?} after the process was reaped", reaped.elapsed());
    assert!(reaped.elapsed() < UNREACHABLE_AFTER, "{:?}", reaped.elapsed());
}

#[test]
fn the_death_of_the_owners_process_fails_what_is_being_read_within_its_bound() {
    let Some((mut peer, mut lane, read, _kept)) = to_an_owner() else { return };
    let killed = Instant::now();
    peer.child.kill().unwrap();
    let error = loop {
        let outcome = lane.post_reads(&[read]).and_then(|()| lane.wait(soon())).and_then(|()| lane.poll(&mut [0; 8]));
        match outcome {
            Ok(_) => assert!(killed.elapsed() < Duration::from_secs(20), "a dead process answers"),
            Err(error) => break error,
        }
    };
    // Its device refuses once the process's memory is no longer registered, if the connection's end does not come first.
    assert!(matches!(error, FabricError::PeerClosed { .. } | FabricError::Refused { .. }), "{error:?}");
    eprintln!("failed {:?} after the kill: {error}", killed.elapsed());
    assert!(killed.elapsed() < UNREACHABLE_AFTER * 4, "{:?}", killed.elapsed());
}

/// Waits until the owner tells of a broken lane.
fn broken(owner: &dyn Owner, deadline: Deadline) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(owner.broken().expect("verbs can tell"), PollFlags::IN)];
    let left = deadline.left();
    let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
    poll(&mut fds, Some(&timeout)).expect("poll") == 1
}

#[test]
fn the_death_of_the_initiators_process_is_told_for_each_of_its_lanes() {
    if verbs_settings().is_none() {
        return;
    }
    let mut peer = Peer::start("initiator", "-");
    let address: Address = peer.says("address").parse().expect("an address");
    let source = connect(&address, config(), &Offer::default(), soon()).expect("connect");
    let mut owner = fabric::owner(&source).expect("owner");
    let (file, mapping) = memory(RAM_BYTES);
    mapping.write(0, &[1; 4096]);
    owner.export_read(&file, &mapping, &[Extent { offset: 0, len: 4096 }]).expect("export");
    for lane in [FAULT, BULK] {
        owner.serve_lane(lane, soon()).expect("serve");
    }
    assert_eq!(peer.says("open"), "2");
    assert!(!broken(&*owner, Deadline::after(Duration::ZERO)));
    peer.kill();
    let reaped = Instant::now();
    assert!(broken(&*owner, soon()));
    eprintln!("noticed {:?} after the process was reaped", reaped.elapsed());
    let mut failures = Vec::new();
    while failures.len() < 2 && reaped.elapsed() < Duration::from_secs(10) {
        failures.extend(owner.take_failures());
    }
    let closed = |lane| failures.iter().any(|one| matches!(one, FabricError::PeerClosed { lane: of } if *of == lane));
    assert!(closed(FAULT) && closed(BULK), "{failures:?}");
}
