//! Asking running belay processes.

use super::place::{self, Place, PlaceError};
use super::protocol::{self, FrameError, LONGEST_ANSWER, Request, Response, Said, VERSION, Wanted};
use belay_vmm_glue::migrate::operator::{Answer, Ask};
use belay_vmm_glue::migrate::status::Status;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How long a process may take to answer.
const ANSWER_BOUND: Duration = Duration::from_secs(3);
/// Beyond what an order is waited for there.
const ORDER_GRACE: Duration = Duration::from_secs(8);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    #[error(transparent)]
    Place(#[from] PlaceError),
    #[error("no belay process runs here ({} has no living socket)", .looked_in.display())]
    NoneRuns { looked_in: PathBuf },
    /// With those that there are.
    #[error("no belay process here is called `{id}`{}", among(.there))]
    NoSuch { id: String, there: Vec<String> },
    #[error("`{id}` may mean any of: {}", .which.join(", "))]
    Ambiguous { id: String, which: Vec<String> },
    #[error("{id} does not answer")]
    Silent {
        id: String,
        #[source]
        source: io::Error,
    },
    #[error("{id} was given the order and has not answered: it may still carry it out")]
    NoAnswer {
        id: String,
        #[source]
        source: io::Error,
    },
    #[error("{id} runs as user {owner}, who is neither root nor this user")]
    Stranger { id: String, owner: u32 },
    #[error("{id} said what is no answer")]
    Frame {
        id: String,
        #[source]
        source: FrameError,
    },
    #[error("{id} did not take the request: {why}")]
    Bad { id: String, why: String },
    #[error("{id} answered what was not asked")]
    Other { id: String },
}

fn among(there: &[String]) -> String {
    match there {
        [] => "; none runs".to_owned(),
        [one] => format!("; there is {one}"),
        more => format!("; there are {}", more.join(", ")),
    }
}

/// The processes of one run directory.
pub struct Processes {
    path: PathBuf,
    /// The directory itself, then those in it.
    places: Vec<Place>,
}

/// A process by its id, and what it says of itself.
type Answered = (String, Result<Status, AskError>);

impl Processes {
    /// Those whose sockets lie at `path`. A directory that is not there holds none.
    pub fn at(path: PathBuf) -> Result<Self, PlaceError> {
        let place = Place::at(&path)?;
        let inner = place.as_ref().map(Place::inner).unwrap_or_default();
        Ok(Self { places: place.into_iter().chain(inner).collect(), path })
    }

    /// Where they were looked for.
    pub fn path(&self) -> &std::path::Path {
        &self.path
    }

    /// The ids of those that live. What dead ones left is taken away, where that is possible.
    pub fn ids(&self) -> Result<Vec<String>, AskError> {
        let mut ids = Vec::new();
        for place in &self.places {
            // A directory that only root may write to is read all the same.
            let _ = place.sweep();
            ids.extend(place.ids()?);
        }
        ids.sort();
        ids.dedup();
        Ok(ids)
    }

    /// What each says of itself.
    pub fn all(&self) -> Result<Vec<Answered>, AskError> {
        let ids = self.ids()?;
        // One that is stopped must not make the others wait.
        Ok(std::thread::scope(|scope| {
            let asked: Vec<_> = ids.into_iter().map(|id| (id.clone(), scope.spawn(move || self.status(&id)))).collect();
            asked.into_iter().map(|(id, answer)| (id, answer.join().expect("asking does not panic"))).collect()
        }))
    }

    /// The one that `word` means: an id, the start of one, or the number of a migration.
    pub fn find(&self, word: &str) -> Result<String, AskError> {
        let ids = self.ids()?;
        if ids.iter().any(|id| id == word) {
            return Ok(word.to_owned());
        }
        let mut which: Vec<String> =
            if word.is_empty() { Vec::new() } else { ids.iter().filter(|id| id.starts_with(word)).cloned().collect() };
        if which.is_empty() && word.len() == 16 {
            let of = |(id, status): (String, Result<Status, AskError>)| {
                (status.ok()?.migration.as_deref() == Some(word)).then_some(id)
            };
            which = self.all()?.into_iter().filter_map(of).collect();
        }
        match which.len() {
            0 => Err(AskError::NoSuch { id: word.to_owned(), there: ids }),
            1 => Ok(which.remove(0)),
            _ => Err(AskError::Ambiguous { id: word.to_owned(), which }),
        }
    }

    /// How `id` stands.
    pub fn status(&self, id: &str) -> Result<Status, AskError> {
        let mut line = self.ask(id, Wanted::Status, ANSWER_BOUND)?;
        match line.answer()? {
            Said::Status(status) => Ok(*status),
            Said::Bad { why } => Err(AskError::Bad { id: id.to_owned(), why }),
            _ => Err(AskError::Other { id: id.to_owned() }),
        }
    }

    /// Orders `ask` of `id` and gives each answer to `heard`; the last of them.
    pub fn order(&self, id: &str, ask: Ask, wait: Duration, heard: impl Fn(&Answer)) -> Result<Ordered, AskError> {
        let wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        let mut line = self.ask(id, Wanted::Order { order: ask, wait_ms }, wait.saturating_add(ORDER_GRACE))?;
        loop {
            let said = line.answer().map_err(|error| match error {
                AskError::Silent { id, source } => AskError::NoAnswer { id, source },
                other => other,
            });
            match said? {
                Said::Order(answer) => {
                    heard(&answer);
                    if answer.is_last() || wait.is_zero() {
                        return Ok(Ordered::Answered(answer));
                    }
                }
                Said::NotInTime { waiting_for } => return Ok(Ordered::NotInTime { waiting_for }),
                Said::Bad { why } => return Err(AskError::Bad { id: id.to_owned(), why }),
                Said::Status(_) => return Err(AskError::Other { id: id.to_owned() }),
            }
        }
    }

    fn ask(&self, id: &str, ask: Wanted, bound: Duration) -> Result<Line, AskError> {
        let silent = |source| AskError::Silent { id: id.to_owned(), source };
        let no_such = || AskError::NoSuch { id: id.to_owned(), there: Vec::new() };
        let has_it = |place: &&Place| place.socket(id).symlink_metadata().is_ok();
        let place = self.places.iter().find(has_it).ok_or_else(no_such)?;
        let stream = place::dial(&place.socket(id), ANSWER_BOUND).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => no_such(),
            _ => silent(source),
        })?;
        let peer = rustix::net::sockopt::socket_peercred(&stream).map_err(|source| silent(source.into()))?;
        if peer.uid != rustix::process::geteuid() && !peer.uid.is_root() && !rustix::process::geteuid().is_root() {
            return Err(AskError::Stranger { id: id.to_owned(), owner: peer.uid.as_raw() });
        }
        let mut line = Line { id: id.to_owned(), stream, end: Instant::now() + bound, received: Vec::new() };
        line.stream.set_write_timeout(Some(ANSWER_BOUND)).map_err(silent)?;
        line.stream.write_all(&protocol::frame(&Request { belay: VERSION, ask })).map_err(silent)?;
        Ok(line)
    }
}

/// How an order went.
#[derive(Debug)]
pub enum Ordered {
    Answered(Answer),
    NotInTime { waiting_for: String },
}

/// A connection on which answers come.
struct Line {
    id: String,
    stream: UnixStream,
    end: Instant,
    received: Vec<u8>,
}

impl Line {
    fn answer(&mut self) -> Result<Said, AskError> {
        let frame = |source| AskError::Frame { id: self.id.clone(), source };
        loop {
            if let Some(body) = protocol::body(&self.received, LONGEST_ANSWER).map_err(frame)? {
                let length = body.len() + 4;
                let response: Response = protocol::parse(body).map_err(frame)?;
                self.received.drain(..length);
                return Ok(response.said);
            }
            let silent = |source: io::Error| AskError::Silent { id: self.id.clone(), source };
            let left = self.end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(silent(io::Error::new(io::ErrorKind::TimedOut, "nothing came in time; is it stopped?")));
            }
            self.stream.set_read_timeout(Some(left)).map_err(silent)?;
            let mut part = [0; 16384];
            match self.stream.read(&mut part) {
                Ok(0) => {
                    return Err(silent(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        "it hung up: it has ended, or many ask it",
                    )));
                }
                Ok(more) => self.received.extend_from_slice(&part[..more]),
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(error) => return Err(silent(error)),
            }
        }
    }
}
