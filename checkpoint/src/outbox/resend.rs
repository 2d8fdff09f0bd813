//! What a source sends again after a catch: committed output that is not known to have left, byte for byte (P4).

use crate::guest::Packet;
use std::collections::BTreeMap;

/// Collects the output of committed records, in any order and with repeats, and gives what must be sent again.
#[derive(Debug, Clone, Default)]
pub struct Resend {
    packets: BTreeMap<u64, Vec<u8>>,
    released_up_to: Option<u64>,
}

/// The records contradict each other: nothing is sent, because whatever were sent might be wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ResendError {
    #[error(
        "two committed records hold different bytes for packet {sequence}: {first_bytes} and {second_bytes} bytes long"
    )]
    Contradiction { sequence: u64, first_bytes: usize, second_bytes: usize },
    #[error("committed output has a gap: packet {expected} is missing, {found} is there")]
    Gap { expected: u64, found: u64 },
}

impl Resend {
    /// With nothing in it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes a packet of a committed record.
    pub fn add(&mut self, packet: Packet) -> Result<(), ResendError> {
        if self.released_up_to.is_some_and(|released| packet.sequence <= released) {
            return Ok(());
        }
        match self.packets.get(&packet.sequence) {
            Some(known) if *known != packet.bytes => Err(ResendError::Contradiction {
                sequence: packet.sequence,
                first_bytes: known.len(),
                second_bytes: packet.bytes.len(),
            }),
            Some(_) => Ok(()),
            None => {
                self.packets.insert(packet.sequence, packet.bytes);
                Ok(())
            }
        }
    }

    /// A committed record says that everything up to `sequence` had left: it need not be kept.
    pub fn released(&mut self, sequence: u64) {
        self.released_up_to = self.released_up_to.max(Some(sequence));
        match sequence.checked_add(1) {
            Some(first) => self.packets = self.packets.split_off(&first),
            None => self.packets.clear(),
        }
    }

    /// Bytes of output kept.
    pub fn bytes(&self) -> usize {
        self.packets.values().map(Vec::len).sum()
    }

    /// Highest sequence known to have left.
    pub fn released_up_to(&self) -> Option<u64> {
        self.released_up_to
    }

    /// What is kept: sequence and bytes, ascending.
    pub fn packets(&self) -> impl Iterator<Item = (u64, &[u8])> {
        self.packets.iter().map(|(&sequence, bytes)| (sequence, &bytes[..]))
    }

    /// Packets kept.
    pub fn len(&self) -> usize {
        self.packets.len()
    }

    /// Whether none is kept.
    pub fn is_empty(&self) -> bool {
        self.packets.is_empty()
    }

    /// What must be sent again, in order and without a gap.
    pub fn finish(self) -> Result<Vec<Packet>, ResendError> {
        let mut expected = self.released_up_to.map(|released| released.saturating_add(1));
        for &found in self.packets.keys() {
            if let Some(expected) = expected.filter(|&expected| expected != found) {
                return Err(ResendError::Gap { expected, found });
            }
            expected = Some(found.saturating_add(1));
        }
        Ok(self.packets.into_iter().map(|(sequence, bytes)| Packet { sequence, bytes }).collect())
    }
}
