//! The page server's end of a relay: the guest's frames become packets of its outbox, and what the outbox lets go of goes to the world.

use super::frames::{Came, Frames, Queue};
use super::messages::{FromHand, FromRelay, MessageError, VERSION};
use belay_checkpoint::guest::{Packet, PacketSink};
use belay_checkpoint::outbox::Emitter;
use belay_transport::Deadline;
use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// Between two tries to get a hand that somebody still has: a process that was killed keeps its sockets until its memory is gone.
const RETRY: Duration = Duration::from_millis(5);
/// Longest that the relay may take to read one message. It never waits for anybody, so this is time that it is kept off a processor.
const WRITE_BOUND: Duration = Duration::from_secs(1);

/// Why a relay could not be used.
#[derive(Debug, thiserror::Error)]
pub enum HandError {
    #[error("cannot reach the relay at {}", .path.display())]
    Connect {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the relay at {} refused: {why}", .path.display())]
    Refused { path: PathBuf, why: String },
    #[error("the relay did not answer {asked} within {bound_ms} ms")]
    TimedOut { asked: &'static str, bound_ms: u128 },
    #[error("the relay has gone: {why}")]
    Gone { why: String },
    #[error(transparent)]
    Message(#[from] MessageError),
    #[error("cannot {doing}")]
    Io {
        doing: &'static str,
        #[source]
        source: io::Error,
    },
}

fn io(doing: &'static str) -> impl FnOnce(io::Error) -> HandError {
    move |source| HandError::Io { doing, source }
}

/// What a relay said when the guest stood still.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settled {
    /// The number that the guest's next frame will have: all before it are in the sink.
    pub next_sequence: u64,
    /// Part of a frame had come: the guest was stopped in the middle of sending it, and its rest comes when it goes on.
    pub torn: bool,
    /// Frames of the guest's that found no room since the last time, and are lost.
    pub dropped: u64,
}

#[derive(Default)]
struct State {
    next_sequence: u64,
    /// The newest answer, and the number it answers.
    settled: Option<(u64, Settled)>,
    free: bool,
    ended: Option<String>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// For whole messages, one at a time.
    writer: Mutex<UnixStream>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn say(&self, message: FromHand<'_>) -> io::Result<()> {
        let mut queue = Queue::new(usize::MAX);
        if !queue.push(&message.encode().parts()) {
            return Err(io::Error::new(ErrorKind::InvalidInput, "a frame that is longer than QEMU takes any"));
        }
        let mut stream = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        queue.flush(&mut *stream)?;
        if queue.is_empty() {
            return Ok(());
        }
        // Half a message would make the rest of them another language.
        let _ = stream.shutdown(Shutdown::Both);
        Err(io::Error::new(ErrorKind::TimedOut, format!("the relay did not read for {WRITE_BOUND:?}")))
    }

    fn wait<T>(
        &self,
        asked: &'static str,
        deadline: Deadline,
        until: impl Fn(&State) -> Option<T>,
    ) -> Result<T, HandError> {
        let bound = deadline.left();
        let over = |state: &mut State| until(state).is_none() && state.ended.is_none();
        let waited = self.changed.wait_timeout_while(self.lock(), deadline.left(), over);
        let state = waited.unwrap_or_else(PoisonError::into_inner).0;
        match (until(&state), &state.ended) {
            (Some(found), _) => Ok(found),
            (None, Some(why)) => Err(HandError::Gone { why: why.clone() }),
            (None, None) => Err(HandError::TimedOut { asked, bound_ms: bound.as_millis() }),
        }
    }
}

/// Has a relay in hand: nothing that the guest sends leaves but through [`Hand::emitter`]. Dropped without [`Hand::let_go`], it leaves the
/// relay shut.
pub struct Hand {
    shared: Arc<Shared>,
    stream: UnixStream,
    reading: Option<JoinHandle<()>>,
    asked: u64,
    guest: Option<u32>,
}

impl Hand {
    /// Takes the relay at `path` in hand; waits until `deadline` for whoever has it. The guest's first frame gets the number
    /// `next_sequence`.
    pub fn attach(
        path: &Path,
        sink: Arc<dyn PacketSink>,
        next_sequence: u64,
        deadline: Deadline,
    ) -> Result<Self, HandError> {
        let mut refused = None;
        loop {
            match Self::try_attach(path, Arc::clone(&sink), next_sequence, deadline) {
                Err(why @ HandError::Refused { .. }) if !deadline.expired() => {
                    refused = Some(why);
                    std::thread::sleep(RETRY.min(deadline.left()));
                }
                // The last try had no time of its own.
                Err(HandError::TimedOut { .. }) if refused.is_some() => return Err(refused.expect("just seen")),
                done => return done,
            }
        }
    }

    fn try_attach(
        path: &Path,
        sink: Arc<dyn PacketSink>,
        next_sequence: u64,
        deadline: Deadline,
    ) -> Result<Self, HandError> {
        let state = State { next_sequence, ..State::default() };
        let (stream, mut frames, guest) = begin(path, FromHand::Attach { version: VERSION }, deadline)?;
        let writer = stream.try_clone().map_err(io("open the relay's connection twice"))?;
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new(), writer: Mutex::new(writer) });
        stream.set_read_timeout(None).map_err(io("unbound the relay's connection"))?;
        let reading = {
            let (shared, mut heard) = (Arc::clone(&shared), stream.try_clone().map_err(io("open it twice"))?);
            let read = move || {
                let why = read_on(&mut heard, &mut frames, &shared, sink.as_ref());
                shared.lock().ended = Some(why);
                shared.changed.notify_all();
            };
            std::thread::Builder::new().name("belay-relay".into()).spawn(read).map_err(io("start a thread"))?
        };
        Ok(Self { shared, stream, reading: Some(reading), asked: 0, guest: (guest > 0).then_some(guest) })
    }

    /// The process of the QEMU that was connected when the relay was taken in hand.
    pub fn guest(&self) -> Option<u32> {
        self.guest
    }

    /// The guest has been stopped: waits until all that it had sent before is in the sink. What is for it is held from here on.
    pub fn settle(&mut self, deadline: Deadline) -> Result<Settled, HandError> {
        self.asked += 1;
        let number = self.asked;
        self.say(FromHand::Settle { number })?;
        self.shared.wait("to settle", deadline, |state| {
            state.settled.filter(|(answered, _)| *answered == number).map(|(_, settled)| settled)
        })
    }

    /// The guest goes on.
    pub fn go(&self) -> Result<(), HandError> {
        self.say(FromHand::Go)
    }

    /// The guest's next frame gets this number. Only while it stands still: right after a state has been loaded.
    pub fn count_from(&self, next_sequence: u64) {
        self.shared.lock().next_sequence = next_sequence;
    }

    /// The way out to the world.
    pub fn emitter(&self) -> Box<dyn Emitter> {
        Box::new(Way(Arc::clone(&self.shared)))
    }

    /// Opens the relay for good. `last` lets out what the guest had sent until then, through an emitter of before; what it sends meanwhile waits.
    pub fn let_go(self, deadline: Deadline, last: impl FnOnce()) -> Result<(), HandError> {
        self.say(FromHand::LetGo)?;
        self.shared.wait("to be let go", deadline, |state| state.free.then_some(()))?;
        last();
        Ok(())
    }

    fn say(&self, message: FromHand<'_>) -> Result<(), HandError> {
        self.shared.say(message).map_err(|error| HandError::Gone { why: error.to_string() })
    }
}

impl Drop for Hand {
    fn drop(&mut self) {
        let _ = self.stream.shutdown(Shutdown::Both);
        if let Some(reading) = self.reading.take() {
            let _ = reading.join();
        }
    }
}

/// The process of the QEMU that is connected to the relay at `path`, if one is. Changes nothing.
pub fn look(path: &Path, deadline: Deadline) -> Result<Option<u32>, HandError> {
    let (_, _, guest) = begin(path, FromHand::Look { version: VERSION }, deadline)?;
    Ok((guest > 0).then_some(guest))
}

/// Connects, says the first word, and waits for the answer.
fn begin(path: &Path, word: FromHand<'_>, deadline: Deadline) -> Result<(UnixStream, Frames, u32), HandError> {
    let connect = |source| HandError::Connect { path: path.to_owned(), source };
    let mut stream = UnixStream::connect(path).map_err(connect)?;
    stream.set_write_timeout(Some(WRITE_BOUND)).map_err(io("bound the relay's connection"))?;
    let mut queue = Queue::new(usize::MAX);
    queue.push(&word.encode().parts());
    match queue.flush(&mut stream) {
        // It has hung up already; what it said before that is why.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
        done => done.map_err(connect)?,
    }
    let bound = deadline.left();
    let mut frames = Frames::default();
    loop {
        let left = deadline.left();
        if left.is_zero() {
            return Err(HandError::TimedOut { asked: "the first word", bound_ms: bound.as_millis() });
        }
        stream.set_read_timeout(Some(left)).map_err(io("bound the relay's connection"))?;
        if let Some(bytes) = frames.next().map_err(MessageError::from)? {
            let refused = |why: String| HandError::Refused { path: path.to_owned(), why };
            match FromRelay::decode(bytes)? {
                FromRelay::Attached { version: VERSION, guest } => return Ok((stream, frames, guest)),
                FromRelay::Attached { version, .. } => {
                    return Err(refused(format!("it speaks version {version}, and this is {VERSION}")));
                }
                FromRelay::Refused(why) => return Err(refused(why.to_owned())),
                _ => return Err(HandError::Gone { why: "it began with something else than an answer".to_owned() }),
            }
        }
        match frames.fill(&mut stream) {
            Ok(Came::Bytes(_) | Came::Nothing) => {}
            Ok(Came::End) => return Err(HandError::Gone { why: "it closed the connection".to_owned() }),
            Err(source) => return Err(connect(source)),
        }
    }
}

/// Takes what the relay says until it ends; why it did.
fn read_on(stream: &mut UnixStream, frames: &mut Frames, shared: &Shared, sink: &dyn PacketSink) -> String {
    loop {
        loop {
            let message = match frames.next() {
                Ok(Some(bytes)) => FromRelay::decode(bytes),
                Ok(None) => break,
                Err(error) => return error.to_string(),
            };
            match message {
                Ok(FromRelay::Frame(frame)) => {
                    let sequence = {
                        let mut state = shared.lock();
                        state.next_sequence += 1;
                        state.next_sequence - 1
                    };
                    sink.emit(Packet { sequence, bytes: frame.to_vec() });
                }
                Ok(FromRelay::Settled { number, torn, dropped }) => {
                    let mut state = shared.lock();
                    let next_sequence = state.next_sequence;
                    state.settled = Some((number, Settled { next_sequence, torn, dropped }));
                    drop(state);
                    shared.changed.notify_all();
                }
                Ok(FromRelay::Free) => {
                    shared.lock().free = true;
                    shared.changed.notify_all();
                }
                Ok(FromRelay::Refused(why)) => return format!("it refused: {why}"),
                Ok(FromRelay::Attached { .. }) => return "it gave itself into this hand twice".to_owned(),
                Err(error) => return error.to_string(),
            }
        }
        match frames.fill(stream) {
            Ok(Came::Bytes(_) | Came::Nothing) => {}
            Ok(Came::End) => return "it closed the connection".to_owned(),
            Err(error) => return error.to_string(),
        }
    }
}

/// Gives packets to the world, through the relay.
struct Way(Arc<Shared>);

impl Emitter for Way {
    fn send(&mut self, packet: &Packet) -> io::Result<()> {
        self.0.say(FromHand::Emit(&packet.bytes))
    }
}
