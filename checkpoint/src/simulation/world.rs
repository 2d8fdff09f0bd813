//! The observer of output: what it was shown can never be taken back.

use crate::guest::Packet;
use crate::outbox::{Emitter, OutputMode};
use std::io;
use std::sync::{Arc, Mutex};

/// One packet of the guest's past at the destination.
#[derive(Debug, Clone)]
pub struct Emitted {
    pub bytes: Vec<u8>,
    /// The epoch it was closed in, if it was.
    pub epoch: Option<u64>,
}

#[derive(Debug, Default)]
pub struct Seen {
    /// Of every packet, from sequence 1 on.
    pub emitted: Vec<Emitted>,
    /// Highest sequence seen; all before it were seen too.
    pub last: u64,
    /// Newest epoch that is known at the destination to have committed.
    pub acked: u64,
    /// Until when the source believes that the destination may show output.
    pub lease_ends_ns: u64,
    pub now_ns: u64,
    pub mode: OutputMode,
    /// The guest is back at the source, as of this packet: what is shown again must be what was.
    pub caught: Option<u64>,
    /// The guest is the destination's own: nothing is held any more.
    pub released: bool,
    /// The next emission fails, after the world has seen it or before.
    pub fail: Option<bool>,
    /// The last emission failed, so its packet may come again.
    failed: bool,
    pub broken: Option<String>,
}

#[derive(Debug, Clone, Default)]
pub struct World(pub Arc<Mutex<Seen>>);

impl World {
    pub fn lock(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.0.lock().unwrap()
    }
}

impl Seen {
    fn see(&mut self, packet: &Packet) {
        let known = self.emitted.get(packet.sequence as usize - 1).cloned();
        let Some(known) = known.filter(|known| known.bytes == packet.bytes) else {
            self.broken = Some(format!("P4: contradiction: packet {} is another than it was", packet.sequence));
            return;
        };
        let (sequence, last, acked) = (packet.sequence, self.last, self.acked);
        let broken = match self.mode {
            _ if sequence > last + 1 => Some(format!("P4: a gap: packet {sequence} after {last}")),
            _ if sequence <= last && !self.failed && self.caught.is_none() => {
                Some(format!("P4: repeated: packet {sequence} after {last}"))
            }
            _ if self.released => None,
            OutputMode::Commit if known.epoch.is_none_or(|epoch| epoch > acked) => {
                Some(format!("P4: uncommitted: packet {sequence} of {:?}, {acked} has committed", known.epoch))
            }
            OutputMode::Commit if self.caught.is_some_and(|caught| sequence > caught) => {
                Some(format!("P4: contradiction: packet {sequence} of a past that never was"))
            }
            OutputMode::Lease if self.now_ns >= self.lease_ends_ns => {
                let late = self.now_ns - self.lease_ends_ns;
                Some(format!("P2: packet {sequence} is shown {late} ns after the source may have taken the guest back"))
            }
            _ => None,
        };
        self.broken = self.broken.take().or(broken);
        self.last = last.max(sequence);
    }
}

impl Emitter for World {
    fn send(&mut self, packet: &Packet) -> io::Result<()> {
        let mut seen = self.lock();
        match seen.fail.take() {
            None => {
                seen.see(packet);
                seen.failed = false;
                Ok(())
            }
            Some(after) => {
                if after {
                    seen.see(packet);
                }
                seen.failed = true;
                Err(io::Error::other("the world does not listen"))
            }
        }
    }
}
