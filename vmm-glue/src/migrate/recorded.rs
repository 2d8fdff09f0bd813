//! A file that something of a migration is recorded into: made before the guest comes, written by a thread of its own, and ended where that cannot
//! go on. The end is told of as a state: a recording with a gap would be of another guest.

use super::observation::{Kind, Observer};
use crossbeam_channel::{Receiver, bounded};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Longest that the end of a migration waits for what is still to be written.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// Which file, how large it may be, and who hears of its end.
#[derive(Debug, Clone)]
pub(super) struct Recorded {
    path: PathBuf,
    most_bytes: u64,
    observer: Observer,
}

impl Recorded {
    /// Makes `path`, which must not be there.
    pub fn create(path: &Path, most_bytes: u64, observer: Observer) -> io::Result<(Self, File)> {
        let file = File::create_new(path)?;
        Ok((Self { path: path.to_owned(), most_bytes, observer }, file))
    }

    /// Starts the thread that writes, by this name.
    pub fn write(
        &self,
        thread: &str,
        work: impl FnOnce(&Self) -> io::Result<()> + Send + 'static,
    ) -> io::Result<Written> {
        let (done, written) = bounded(0);
        let recorded = self.clone();
        std::thread::Builder::new().name(thread.to_owned()).spawn(move || {
            if let Err(error) = work(&recorded) {
                recorded.over(&error);
            }
            drop(done);
        })?;
        Ok(Written(written))
    }

    /// Whether so many bytes are as many as may be; the reason why it ends then.
    pub fn room_beyond(&self, bytes: u64) -> io::Result<()> {
        match bytes < self.most_bytes {
            true => Ok(()),
            false => Err(io::Error::other(format!("{bytes} bytes were written, which is as much as was asked for"))),
        }
    }

    /// Says that nothing more will be recorded.
    pub fn over(&self, why: &io::Error) {
        let state = "recording-over".to_owned();
        self.observer.note(None, Kind::State { state, why: format!("{} ends here: {why}", self.path.display()) });
    }
}

/// A thread that writes: it hangs up when all that it was given is in the file.
#[derive(Debug)]
pub(super) struct Written(Receiver<()>);

impl Written {
    /// Waits for that, for a bounded time; whether it came.
    pub fn wait(&self) -> bool {
        !matches!(self.0.recv_timeout(LAST_WORDS), Err(crossbeam_channel::RecvTimeoutError::Timeout))
    }
}
