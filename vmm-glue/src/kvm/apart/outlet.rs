//! The guest's way out of the VMM's process: packets and answers share the client's socket, so they keep their order.
//!
//! Where the client has laid down a [`Ledger`], every packet is kept until the ledger says that it has left: the client holds output
//! back until it has committed, and what it held is gone when it dies. Its successor is given all of that again.

use super::{Answer, FromVmm, Ledger, PACKET_WINDOW, WireError, frame};
use belay_checkpoint::guest::{Packet, PacketSink};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

pub(super) struct Outlet {
    gate: Mutex<Gate>,
    /// Packets sent that the client has not taken in yet.
    on_the_way: AtomicU64,
}

struct Gate {
    /// Where answers go; `None` while there is no client.
    client: Option<UnixStream>,
    /// Whether packets go there too.
    open: bool,
    /// What was emitted and is not known to have left, in order. Bounded by the client's own bound: without room there the guest
    /// stops at its next PACE read. Without a ledger only what no client was sent.
    kept: VecDeque<Packet>,
    ledger: Option<Ledger>,
}

impl Gate {
    /// Forgets what has left.
    fn prune(&mut self) {
        let Some(ledger) = &self.ledger else { return };
        let left = ledger.left_before();
        while self.kept.front().is_some_and(|packet| packet.sequence < left) {
            self.kept.pop_front();
        }
    }

    /// Shuts itself when the client cannot be written to: what it was sent of this packet is of no use to anybody.
    fn send(&mut self, packet: &Packet) -> bool {
        let Some(client) = &self.client else { return false };
        let message = FromVmm::Packet { sequence: packet.sequence, bytes: packet.bytes.clone() };
        let sent = frame::send(client, &message, None).is_ok();
        if !sent {
            self.shut();
        }
        sent
    }

    fn shut(&mut self) {
        self.client = None;
        self.open = false;
    }
}

impl Outlet {
    /// One whose first client takes packets from the start.
    pub(super) fn new(client: UnixStream) -> Self {
        let gate = Gate { client: Some(client), open: true, kept: VecDeque::new(), ledger: None };
        Self { gate: Mutex::new(gate), on_the_way: AtomicU64::new(0) }
    }

    fn lock(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn answer(&self, id: u64, result: Result<Answer, WireError>, fd: Option<&OwnedFd>) -> io::Result<()> {
        match &self.lock().client {
            Some(client) => frame::send(client, &FromVmm::Answer { id, result }, fd.map(AsFd::as_fd)),
            None => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// Keeps every packet from here on until `ledger` says that it has left.
    pub(super) fn keep_until_left(&self, ledger: Ledger) {
        self.lock().ledger = Some(ledger);
    }

    /// A new client, which is answered from now on and gets packets once it has asked for them.
    pub(super) fn admit(&self, client: UnixStream) {
        let mut gate = self.lock();
        gate.client = Some(client);
        gate.open = false;
    }

    /// Sends all that has not left, in order, and then what comes; how many packets that were.
    pub(super) fn replay(&self) -> u64 {
        let mut gate = self.lock();
        gate.prune();
        let kept = std::mem::take(&mut gate.kept);
        self.on_the_way.store(kept.len() as u64, Ordering::SeqCst);
        gate.open = kept.iter().all(|packet| gate.send(packet)) && gate.client.is_some();
        let count = kept.len() as u64;
        if gate.ledger.is_some() || !gate.open {
            gate.kept = kept;
        }
        count
    }

    pub(super) fn taken(&self, packets: u64) {
        // A client that takes more than was sent is wrong about what it took, but can only let its own guest run sooner.
        let subtract = |sent: u64| Some(sent.saturating_sub(packets));
        let _ = self.on_the_way.fetch_update(Ordering::SeqCst, Ordering::SeqCst, subtract);
    }

    pub(super) fn shut(&self) {
        self.lock().shut();
    }

    pub(super) fn is_shut(&self) -> bool {
        self.lock().client.is_none()
    }
}

impl PacketSink for Outlet {
    fn emit(&self, packet: Packet) {
        let mut gate = self.lock();
        gate.prune();
        let sent = gate.open && {
            self.on_the_way.fetch_add(1, Ordering::SeqCst);
            gate.send(&packet)
        };
        if !sent || gate.ledger.is_some() {
            gate.kept.push_back(packet);
        }
    }

    fn has_room(&self) -> bool {
        self.on_the_way.load(Ordering::SeqCst) < PACKET_WINDOW && self.lock().open
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::apart::FromVmm;

    fn packet(sequence: u64) -> Packet {
        Packet { sequence, bytes: sequence.to_le_bytes().to_vec() }
    }

    /// Sequence numbers of `count` packets that arrive.
    fn arrive(client: &UnixStream, count: usize) -> Vec<u64> {
        let one = || match frame::receive(client).expect("a frame") {
            Some((FromVmm::Packet { sequence, bytes }, _)) => {
                assert_eq!(packet(sequence).bytes, bytes);
                sequence
            }
            _ => panic!("no packet"),
        };
        (0..count).map(|_| one()).collect()
    }

    #[test]
    fn a_successor_is_given_what_has_not_left_and_nothing_that_has() {
        let (first, to_first) = UnixStream::pair().expect("pair");
        let outlet = Outlet::new(to_first);
        let ledger = Ledger::new().expect("ledger");
        outlet.keep_until_left(Ledger::from_fd(ledger.fd().try_clone_to_owned().expect("dup")).expect("the same"));
        (0..5).for_each(|sequence| outlet.emit(packet(sequence)));
        assert_eq!(arrive(&first, 5), [0, 1, 2, 3, 4]);
        ledger.has_left(2);
        drop(first);
        outlet.shut();
        assert!(!outlet.has_room());
        outlet.emit(packet(5));
        let (second, to_second) = UnixStream::pair().expect("pair");
        outlet.admit(to_second);
        outlet.emit(packet(6));
        assert!(!outlet.has_room(), "nobody has asked for packets yet");
        assert_eq!(outlet.replay(), 4);
        outlet.emit(packet(7));
        assert_eq!(arrive(&second, 5), [3, 4, 5, 6, 7]);
        assert!(outlet.has_room());
        // Only the next death shows that those were kept too.
        ledger.has_left(6);
        outlet.shut();
        let (third, to_third) = UnixStream::pair().expect("pair");
        outlet.admit(to_third);
        assert_eq!(outlet.replay(), 1);
        assert_eq!(arrive(&third, 1), [7]);
    }

    #[test]
    fn a_client_that_dies_during_the_replay_loses_nothing_for_the_next() {
        let (first, to_first) = UnixStream::pair().expect("pair");
        let outlet = Outlet::new(to_first);
        outlet.keep_until_left(Ledger::new().expect("ledger"));
        (0..3).for_each(|sequence| outlet.emit(packet(sequence)));
        drop(first);
        let (second, to_second) = UnixStream::pair().expect("pair");
        outlet.admit(to_second);
        drop(second);
        outlet.replay();
        assert!(outlet.is_shut());
        let (third, to_third) = UnixStream::pair().expect("pair");
        outlet.admit(to_third);
        outlet.replay();
        assert_eq!(arrive(&third, 3), [0, 1, 2]);
    }
}
