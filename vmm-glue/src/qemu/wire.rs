//! A guest's network as its pauses need it: the relay in hand, gates before its taps, or none.
//!
//! Shared by the guest, which stops and goes on, and by whoever lets go of the relay once the guest is nobody else's.

use super::relay::{Hand, HandError};
use super::tap::{Gate, TapError};
use belay_checkpoint::guest::{GuestError, Packet, PacketSink};
use belay_checkpoint::outbox::Emitter;
use belay_transport::Deadline;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Longest that a relay may take to give what the guest had sent before it stood.
const SETTLE: Duration = Duration::from_secs(2);

/// See the module.
#[derive(Clone, Default)]
pub struct Wire(Arc<Mutex<Inner>>);

#[derive(Default)]
struct Inner {
    hand: Option<Hand>,
    way: Option<Box<dyn Emitter>>,
    taps: Option<Taps>,
    /// The number that the guest's next frame will have, as it was when it last stood.
    next_output: u64,
}

/// At the destination a gate before each, at the source none: nothing is held there, and marks that are sent again after a catch have nothing to
/// let go.
enum Taps {
    Gated { gates: Vec<Gate>, sink: Arc<dyn PacketSink> },
    Open,
}

/// Why a guest's network could not be let go of.
#[derive(Debug, thiserror::Error)]
pub enum LetGoError {
    #[error(transparent)]
    Relay(#[from] HandError),
    #[error(transparent)]
    Tap(#[from] TapError),
}

fn failed(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> GuestError {
    GuestError::Io { doing: "hold the guest's network".to_owned(), source: io::Error::other(error) }
}

impl Wire {
    /// Of a guest without a network, until a relay is [given](Self::take).
    pub fn new() -> Self {
        Self::default()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there is a relay.
    pub fn is_held(&self) -> bool {
        self.lock().hand.is_some()
    }

    /// The guest's frames come and go by this relay.
    pub fn take(&self, hand: Hand) {
        let mut inner = self.lock();
        inner.way = Some(hand.emitter());
        inner.hand = Some(hand);
    }

    /// What the guest sends goes through these gates, and their marks into `sink`.
    pub fn take_taps(&self, gates: Vec<Gate>, sink: Arc<dyn PacketSink>) {
        self.lock().taps = Some(Taps::Gated { gates, sink });
    }

    /// There is no gate any more that this process answers for; they stay as they are.
    pub fn forget_taps(&self) {
        self.lock().taps = None;
    }

    /// The guest has taps of this host's that no gate is before.
    pub fn take_open_taps(&self) {
        self.lock().taps = Some(Taps::Open);
    }

    /// Whether a gate holds as much as it should (P7). One that cannot be asked says so where the next epoch ends.
    pub fn is_full(&self) -> bool {
        match &mut self.lock().taps {
            Some(Taps::Gated { gates, .. }) => gates.iter_mut().any(|gate| gate.is_full().unwrap_or(true)),
            _ => false,
        }
    }

    /// The guest stands: all that it had sent is in the sink when this returns, and nothing comes to it.
    pub fn settle(&self) -> Result<(), GuestError> {
        let inner = &mut *self.lock();
        if let Some(hand) = &mut inner.hand {
            let settled = hand.settle(Deadline::after(SETTLE)).map_err(failed)?;
            inner.next_output = settled.next_sequence;
        }
        if let Some(Taps::Gated { gates, sink }) = &mut inner.taps {
            // One mark for all of them.
            let mut marked = false;
            for gate in gates {
                marked |= gate.close_epoch(inner.next_output).map_err(failed)?;
            }
            if marked {
                sink.emit(Packet { sequence: inner.next_output, bytes: Vec::new() });
                inner.next_output += 1;
            }
        }
        Ok(())
    }

    /// The guest goes on.
    pub fn go(&self) -> Result<(), GuestError> {
        self.lock().hand.as_ref().map_or(Ok(()), |hand| hand.go().map_err(failed))
    }

    /// The number that the guest's next frame will have, as it was when it last stood.
    pub fn next_output(&self) -> u64 {
        self.lock().next_output
    }

    /// A state was loaded whose next frame has this number.
    pub fn count_from(&self, next_output: u64) {
        let mut inner = self.lock();
        inner.next_output = next_output;
        if let Some(hand) = &inner.hand {
            hand.count_from(next_output);
        }
    }

    /// The way out. Until there is a relay nothing goes, and is tried again.
    pub fn emitter(&self) -> Box<dyn Emitter> {
        Box::new(Way(self.clone()))
    }

    /// Lets go of the relay, or opens the gates, if there are any. `last` waits until everything that came by then has left.
    pub fn let_go(&self, deadline: Deadline, last: impl FnOnce()) -> Result<(), LetGoError> {
        // Not under the lock: what `last` waits for leaves through it.
        let hand = self.lock().hand.take();
        if let Some(hand) = hand {
            return Ok(hand.let_go(deadline, last)?);
        }
        let taps = self.lock().taps.replace(Taps::Open);
        let Some(Taps::Gated { gates, .. }) = taps else { return Ok(()) };
        // A gate that opens lets out what any mark would have. One that does not keeps no other shut.
        let opened: Vec<_> = gates.into_iter().map(|gate| gate.open(deadline)).collect();
        Ok(opened.into_iter().collect::<Result<(), _>>()?)
    }
}

struct Way(Wire);

impl Emitter for Way {
    fn send(&mut self, packet: &Packet) -> io::Result<()> {
        let inner = &mut *self.0.lock();
        match (&mut inner.taps, &mut inner.way) {
            // One that has let this mark go does nothing when it is told again.
            (Some(Taps::Gated { gates, .. }), _) => {
                gates.iter_mut().try_for_each(|gate| gate.release(packet.sequence)).map_err(io::Error::other)
            }
            (Some(Taps::Open), _) => Ok(()),
            (None, Some(way)) => way.send(packet),
            (None, None) => Err(io::Error::new(io::ErrorKind::NotConnected, "the guest's network is not in hand yet")),
        }
    }
}
