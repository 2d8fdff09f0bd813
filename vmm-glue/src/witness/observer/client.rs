//! A sender's side of the observer.

use super::address::{ObserverAddress, Stream};
use super::{CLIENT_BOUND, MAGIC, VERSION, invalid};
use belay_checkpoint::guest::Packet;
use belay_checkpoint::outbox::Emitter;
use std::io::{self, Read, Write};

/// A sender's way to the observer. Connects when it must, and again after a failure.
#[derive(Debug)]
pub struct ObserverClient {
    address: ObserverAddress,
    label: String,
    stream: Option<Stream>,
}

impl ObserverClient {
    /// A client that will name itself `label` (which host, which incarnation; at most 256 bytes).
    pub fn new(address: ObserverAddress, label: impl Into<String>) -> Self {
        Self { address, label: label.into(), stream: None }
    }

    /// Shows a packet; it has been seen when this returns. Takes at most a few seconds.
    pub fn send(&mut self, packet: &Packet) -> io::Result<()> {
        let mut stream = match self.stream.take() {
            Some(stream) => stream,
            None => self.connect()?,
        };
        let len = u32::try_from(8 + packet.bytes.len()).map_err(invalid)?;
        let mut message = Vec::with_capacity(12 + packet.bytes.len());
        message.extend(len.to_le_bytes());
        message.extend(packet.sequence.to_le_bytes());
        message.extend(&packet.bytes);
        stream.write_all(&message)?;
        let mut acknowledged = [0; 8];
        stream.read_exact(&mut acknowledged)?;
        let acknowledged = u64::from_le_bytes(acknowledged);
        if acknowledged != packet.sequence {
            return Err(invalid(format!("packet {} was answered with {acknowledged}", packet.sequence)));
        }
        self.stream = Some(stream);
        Ok(())
    }

    fn connect(&self) -> io::Result<Stream> {
        let mut stream = Stream::connect(&self.address)?;
        stream.set_bounds(CLIENT_BOUND)?;
        let label_len = u16::try_from(self.label.len()).map_err(invalid)?;
        let mut hello = MAGIC.to_vec();
        hello.extend(VERSION.to_le_bytes());
        hello.extend(label_len.to_le_bytes());
        hello.extend(self.label.as_bytes());
        stream.write_all(&hello)?;
        Ok(stream)
    }
}

impl Emitter for ObserverClient {
    fn send(&mut self, packet: &Packet) -> io::Result<()> {
        Self::send(self, packet)
    }
}
