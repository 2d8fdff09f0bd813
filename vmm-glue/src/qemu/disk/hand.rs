//! The page server's end of a disk relay, and the relay's end of a page server: one asks, the other answers.

use super::log::Entry;
use super::messages::{CHUNK_BYTES, FromHand, FromRelay, MessageError, Role, VERSION, get, put};
use super::server::{MOST_LOG_BYTES, Mode, Shared};
use super::{ImageError, log};
use belay_transport::Deadline;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Between two tries to get what somebody else still has: a process that was killed keeps its sockets until its memory is gone.
const RETRY: Duration = Duration::from_millis(5);
/// Longest that one who wants the hand may take to say so.
const ATTACH_BOUND: Duration = Duration::from_secs(2);
/// Least time that the relay has for an answer: it may be writing to a disk.
const ANSWER: Duration = Duration::from_secs(5);
/// Between two words of an answer that takes long, for whoever waits and has something to see to.
const BREATH: Duration = Duration::from_millis(10);
/// Of a log that comes in, with its heads.
const MOST_LOG: usize = 2 * MOST_LOG_BYTES as usize;

/// Why a disk relay could not be used.
#[derive(Debug, thiserror::Error)]
pub enum HandError {
    #[error("cannot reach the disk relay at {}", .path.display())]
    Connect {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the disk relay at {} refused: {why}", .path.display())]
    Refused { path: PathBuf, why: String },
    #[error("the disk relay could not {asked}: {why}")]
    Failed { asked: &'static str, why: String },
    #[error("the disk relay did not {asked} within {bound_ms} ms")]
    TimedOut { asked: &'static str, bound_ms: u128 },
    #[error("the disk relay has gone")]
    Gone(#[source] io::Error),
    #[error(transparent)]
    Message(#[from] MessageError),
    #[error(transparent)]
    Image(#[from] ImageError),
}

/// What a relay says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Known {
    /// Of the disk, and of the NBD export.
    pub name: String,
    pub disk_bytes: u64,
    /// Where QEMU connects to.
    pub socket: PathBuf,
    /// Processes that are connected.
    pub guests: Vec<u32>,
}

/// Has a disk relay in hand. Dropped without [`Hand::let_go`], it leaves the relay as it is: a guest that came waits, and one that left
/// writes nothing.
#[derive(Debug)]
pub struct Hand {
    pub known: Known,
    /// One who asks at a time.
    asking: Mutex<UnixStream>,
    /// For whole messages, some of which are no questions.
    saying: Mutex<UnixStream>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the relay at `path` is. Changes nothing.
pub fn look(path: &Path, deadline: Deadline) -> Result<Known, HandError> {
    begin(path, FromHand::Look { version: VERSION }, deadline).map(|(_, known)| known)
}

fn begin(path: &Path, word: FromHand<'_>, deadline: Deadline) -> Result<(UnixStream, Known), HandError> {
    let connect = |source| HandError::Connect { path: path.to_owned(), source };
    let mut stream = UnixStream::connect(path).map_err(connect)?;
    let bound = deadline.left().max(ATTACH_BOUND);
    stream.set_read_timeout(Some(bound)).and_then(|()| stream.set_write_timeout(Some(bound))).map_err(connect)?;
    put(&mut stream, &word.encode()).map_err(connect)?;
    let answer = get(&mut stream).map_err(connect)?;
    let refused = |why: String| Err(HandError::Refused { path: path.to_owned(), why });
    match FromRelay::decode(&answer)? {
        FromRelay::Attached { version: VERSION, disk_bytes, name, socket, guests } => {
            let guests = guests.as_chunks().0.iter().map(|pid| u32::from_be_bytes(*pid)).collect();
            Ok((stream, Known { name: name.to_owned(), disk_bytes, socket: socket.into(), guests }))
        }
        FromRelay::Attached { version, .. } => refused(format!("it speaks version {version}, and this is {VERSION}")),
        FromRelay::Refused(why) => refused(why.to_owned()),
        _ => refused("it began with something else than an answer".to_owned()),
    }
}

impl Hand {
    /// Takes the relay at `path` in hand for the guest in process `guest`; waits until `deadline` for whoever has it.
    pub fn attach(path: &Path, role: Role, guest: u32, deadline: Deadline) -> Result<Self, HandError> {
        let word = FromHand::Attach { version: VERSION, role, guest };
        let (stream, known) = loop {
            match begin(path, word, deadline) {
                Err(HandError::Refused { .. }) if !deadline.expired() => {
                    std::thread::sleep(RETRY.min(deadline.left()));
                }
                done => break done?,
            }
        };
        let again = stream.try_clone().map_err(HandError::Gone)?;
        Ok(Self { known, asking: Mutex::new(stream), saying: Mutex::new(again) })
    }

    /// The guest stands and leaves. Everything it wrote is on the storage when this returns, and nothing of it writes any more.
    pub fn away(&self, deadline: Deadline) -> Result<(), HandError> {
        self.ask("take the image from the guest", FromHand::Away, deadline, &mut || ()).map(drop)
    }

    /// Has the image do what a committed epoch's log says; on the storage when this returns. `between` is called now and then.
    pub fn apply(&self, log: &[u8], deadline: Deadline, between: &mut dyn FnMut()) -> Result<(), HandError> {
        for chunk in log.chunks(CHUNK_BYTES) {
            self.say(FromHand::Chunk(chunk))?;
        }
        self.ask("write what the guest had committed", FromHand::Apply, deadline, between).map(drop)
    }

    /// The guest goes on here, in this process.
    pub fn back(&self, guest: u32, deadline: Deadline) -> Result<(), HandError> {
        self.ask("give the guest its disk", FromHand::Back { guest }, deadline, &mut || ()).map(drop)
    }

    /// The guest is another host's: the image is locked no more when this returns.
    pub fn give_up(&self, deadline: Deadline) -> Result<(), HandError> {
        self.ask("give the image up", FromHand::Gone, deadline, &mut || ()).map(drop)
    }

    /// The guest is about to be stopped: what it has under way is let in.
    pub fn prepare(&self) -> Result<(), HandError> {
        self.say(FromHand::Prepare)
    }

    /// The guest stands: closes the epoch. Its log, empty where the guest did nothing, and whether it flushed.
    pub fn settle(&self, epoch: u64, deadline: Deadline) -> Result<(Vec<u8>, bool), HandError> {
        self.ask("close the epoch", FromHand::Settle { epoch }, deadline, &mut || ())
    }

    /// The guest goes on.
    pub fn go(&self) -> Result<(), HandError> {
        self.say(FromHand::Go)
    }

    /// The source has everything up to this epoch in the image.
    pub fn applied(&self, epoch: u64) -> Result<(), HandError> {
        self.say(FromHand::Applied { epoch })
    }

    /// Waits until another epoch has room.
    pub fn wait_for_room(&self, deadline: Deadline) -> Result<(), HandError> {
        self.repeat("find room for another epoch", FromHand::Room, deadline)
    }

    /// The guest is this host's own: waits until the image has everything and is written here. The relay goes on trying when this fails.
    pub fn own(&self, deadline: Deadline) -> Result<(), HandError> {
        self.repeat("make the image this host's", FromHand::Own, deadline)
    }

    /// Lets go.
    pub fn let_go(&self, deadline: Deadline) -> Result<(), HandError> {
        self.ask("be let go", FromHand::LetGo, deadline, &mut || ()).map(drop)
    }

    fn repeat(&self, asked: &'static str, word: FromHand<'_>, deadline: Deadline) -> Result<(), HandError> {
        loop {
            // An answer that is on its way is waited for: without it the next one would not be understood.
            let answer = Deadline::after(deadline.left().max(ANSWER));
            match self.ask(asked, word, answer, &mut || ()) {
                Err(HandError::Failed { .. }) if !deadline.expired() => std::thread::sleep(RETRY),
                done => return done.map(drop),
            }
        }
    }

    fn say(&self, word: FromHand<'_>) -> Result<(), HandError> {
        let mut stream = lock(&self.saying);
        put(&mut *stream, &word.encode()).map_err(|error| {
            // Half a message would make the rest another language.
            let _ = stream.shutdown(Shutdown::Both);
            HandError::Gone(error)
        })
    }

    fn ask(
        &self,
        asked: &'static str,
        word: FromHand<'_>,
        deadline: Deadline,
        between: &mut dyn FnMut(),
    ) -> Result<(Vec<u8>, bool), HandError> {
        let bound_ms = deadline.left().as_millis();
        let mut stream = lock(&self.asking);
        self.say(word)?;
        let mut log = Vec::new();
        loop {
            while !readable(&stream, BREATH.min(deadline.left())) {
                between();
                if deadline.expired() {
                    let _ = stream.shutdown(Shutdown::Both);
                    return Err(HandError::TimedOut { asked, bound_ms });
                }
            }
            let answer = get(&mut *stream).map_err(HandError::Gone)?;
            match FromRelay::decode(&answer)? {
                FromRelay::Done => return Ok((log, false)),
                FromRelay::Settled { flushed } => return Ok((log, flushed)),
                FromRelay::Chunk(chunk) if log.len() + chunk.len() <= MOST_LOG => log.extend_from_slice(chunk),
                FromRelay::Failed(why) => return Err(HandError::Failed { asked, why: why.to_owned() }),
                _ => {
                    let why = "it answered something else".to_owned();
                    let _ = stream.shutdown(Shutdown::Both);
                    return Err(HandError::Failed { asked, why });
                }
            }
        }
    }
}

fn readable(stream: &UnixStream, bound: Duration) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut fds = [PollFd::new(stream, PollFlags::IN)];
    let bound = Timespec::try_from(bound).unwrap_or(Timespec { tv_sec: 0, tv_nsec: 0 });
    poll(&mut fds, Some(&bound)).is_ok_and(|ready| ready > 0)
}

/// Serves one page server that may have the hand, or wants it, until it leaves or says what is no message.
pub(super) fn served(shared: &Shared, mut stream: UnixStream, who: (u64, u32)) {
    let begun = stream.set_read_timeout(Some(ATTACH_BOUND)).and_then(|()| get(&mut stream));
    let Ok(first) = begun else { return };
    let attached = match FromHand::decode(&first) {
        Ok(FromHand::Look { .. }) => return drop(introduce(shared, &mut stream)),
        Ok(FromHand::Attach { version: VERSION, role, guest }) => attach(shared, role, guest, who),
        Ok(FromHand::Attach { version, .. }) => Err(format!("this relay speaks version {VERSION}, and not {version}")),
        Ok(_) => Err("the first word is to attach".to_owned()),
        Err(error) => Err(error.to_string()),
    };
    if let Err(why) = attached {
        return drop(put(&mut stream, &FromRelay::Refused(&why).encode()));
    }
    // The end of the connection ends this, whatever ended it.
    let _ = introduce(shared, &mut stream)
        .and_then(|()| stream.set_read_timeout(None))
        .and_then(|()| obey(shared, &mut stream));
}

fn introduce(shared: &Shared, stream: &mut UnixStream) -> io::Result<()> {
    let guests: Vec<u8> = shared.lock().clients.values().flat_map(|(pid, _)| pid.to_be_bytes()).collect();
    let Shared { name, socket, disk_bytes, .. } = shared;
    let known = FromRelay::Attached { version: VERSION, disk_bytes: *disk_bytes, name, socket, guests: &guests };
    put(stream, &known.encode())
}

fn attach(shared: &Shared, role: Role, guest: u32, who: (u64, u32)) -> Result<(), String> {
    let mut core = shared.lock();
    if let Some((_, pid)) = core.hand {
        return Err(format!("process {pid} has the hand"));
    }
    if !core.clients.values().any(|(pid, _)| *pid == guest) {
        return Err(format!("process {guest} is not connected to it"));
    }
    match role {
        Role::Leaving => shared.attach_leaving(&mut core, guest)?,
        Role::Arriving => shared.attach_arriving(&mut core, guest)?,
    }
    core.hand = Some(who);
    drop(core);
    shared.changed.notify_all();
    Ok(())
}

/// Does what the page server says, in its order.
fn obey(shared: &Shared, stream: &mut UnixStream) -> io::Result<()> {
    let mut log = Vec::new();
    loop {
        let message = get(stream)?;
        let Ok(word) = FromHand::decode(&message) else { return Ok(()) };
        let mut core = shared.lock();
        let done = match word {
            FromHand::Attach { .. } | FromHand::Look { .. } => return Ok(()),
            FromHand::Chunk(chunk) => {
                if log.len() + chunk.len() > MOST_LOG {
                    return Ok(());
                }
                log.extend_from_slice(chunk);
                continue;
            }
            FromHand::Apply => shared.apply(&core, &std::mem::take(&mut log)),
            FromHand::Away => shared.away(&mut core),
            FromHand::Back { guest } => shared.back(&mut core, guest),
            FromHand::Gone => shared.give_up(&mut core),
            FromHand::Prepare | FromHand::Go => {
                core.standing = word == FromHand::Prepare;
                drop(core);
                shared.changed.notify_all();
                continue;
            }
            FromHand::Applied { epoch } => {
                if let Mode::Covered(covered) = &mut core.mode {
                    covered.overlay.applied(epoch);
                }
                drop(core);
                shared.changed.notify_all();
                continue;
            }
            FromHand::Settle { epoch } => {
                let Mode::Covered(covered) = &mut core.mode else {
                    put(stream, &FromRelay::Failed("no guest came here").encode())?;
                    continue;
                };
                let entries = covered.overlay.close(epoch);
                let flushed = entries.contains(&Entry::Flush);
                let bytes = match entries.is_empty() {
                    true => Vec::new(),
                    false => log::encode(&shared.name, shared.disk_bytes, entries),
                };
                drop(core);
                for chunk in bytes.chunks(CHUNK_BYTES) {
                    put(stream, &FromRelay::Chunk(chunk).encode())?;
                }
                put(stream, &FromRelay::Settled { flushed }.encode())?;
                continue;
            }
            FromHand::Room => {
                core.standing = false;
                let full = match &core.mode {
                    Mode::Covered(covered) => !core.has_room(&covered.overlay),
                    _ => false,
                };
                core.standing = true;
                if full { Err("the source has not written what lies over the image".to_owned()) } else { Ok(()) }
            }
            FromHand::Own => shared.own(&mut core),
            FromHand::LetGo => {
                shared.let_go(&mut core);
                core.hand = None;
                core.standing = false;
                Ok(())
            }
        };
        drop(core);
        shared.changed.notify_all();
        let answer = match &done {
            Ok(()) => FromRelay::Done,
            Err(why) => FromRelay::Failed(why),
        };
        put(stream, &answer.encode())?;
    }
}
