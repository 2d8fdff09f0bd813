//! A guest's network as its pauses need it: the relay in hand, or none.
//!
//! Shared by the guest, which stops and goes on, and by whoever lets go of the relay once the guest is nobody else's.

use super::relay::{Hand, HandError};
use belay_checkpoint::guest::{GuestError, Packet};
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
    /// The number that the guest's next frame will have, as it was when it last stood.
    next_output: u64,
}

fn failed(error: HandError) -> GuestError {
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

    /// The guest stands: all that it had sent is in the sink when this returns, and nothing comes to it.
    pub fn settle(&self) -> Result<(), GuestError> {
        let inner = &mut *self.lock();
        if let Some(hand) = &mut inner.hand {
            let settled = hand.settle(Deadline::after(SETTLE)).map_err(failed)?;
            inner.next_output = settled.next_sequence;
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

    /// Lets go of the relay, if there is one. `last` waits until everything that came by then has left.
    pub fn let_go(&self, deadline: Deadline, last: impl FnOnce()) -> Result<(), HandError> {
        // Not under the lock: what `last` waits for leaves through it.
        let hand = self.lock().hand.take();
        hand.map_or(Ok(()), |hand| hand.let_go(deadline, last))
    }
}

struct Way(Wire);

impl Emitter for Way {
    fn send(&mut self, packet: &Packet) -> io::Result<()> {
        match &mut self.0.lock().way {
            Some(way) => way.send(packet),
            None => Err(io::Error::new(io::ErrorKind::NotConnected, "the guest's relay is not in hand yet")),
        }
    }
}
