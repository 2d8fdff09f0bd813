//! A QEMU that belay starts: in a directory of its own, with a monitor, a log and a leash.

use super::leash::Leash;
use super::machine::Machine;
use super::process::Process;
use super::qmp::{Qmp, QmpError};
use crate::guard::GuardCommand;
use belay_checkpoint::guest::GuestError;
use belay_transport::Deadline;
use std::ffi::OsString;
use std::fs;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Between two looks whether a QEMU that is being started has ended instead.
const LOOK: Duration = Duration::from_millis(5);
/// Of its log, what an error quotes.
const QUOTED_BYTES: u64 = 2048;
/// How long a QEMU that was killed may take to be gone: the address space of a large guest goes slowly.
const GONE: Duration = Duration::from_secs(10);

/// A QEMU to be started.
#[derive(Debug, Clone)]
pub struct Launch {
    pub program: OsString,
    /// Without a monitor and without `-incoming`: both are added.
    pub arguments: Vec<OsString>,
    /// Where relative paths among them begin, if not here.
    pub working_directory: Option<PathBuf>,
    /// Where its monitor and its log lie; made by this, removed when the QEMU is ended by it.
    pub directory: PathBuf,
    /// How the process is started that ends it if this one dies.
    pub leash: GuardCommand,
}

/// One that was started, waiting for a guest. Dropped, it is ended.
#[derive(Debug)]
pub struct Launched {
    child: Option<Child>,
    leash: Option<Leash>,
    pub directory: PathBuf,
}

impl Launched {
    /// Its monitor, for whoever comes after belay.
    pub fn monitor(&self) -> PathBuf {
        monitor(&self.directory)
    }

    /// What ends it with belay, or keeps it for the next.
    pub fn leash(&self) -> Option<&Leash> {
        self.leash.as_ref()
    }

    /// The guest in it is its own: it goes on whatever becomes of belay.
    pub fn leave(mut self) {
        if let Some(leash) = self.leash.take() {
            leash.let_go();
        }
        self.child = None;
    }
}

impl Drop for Launched {
    fn drop(&mut self) {
        // The leash ends it.
        drop(self.leash.take());
        let Some(mut child) = self.child.take() else { return };
        let _ = child.kill();
        let gone = Deadline::after(GONE);
        while matches!(child.try_wait(), Ok(None)) && !gone.expired() {
            std::thread::sleep(Duration::from_millis(1));
        }
        // Ours alone, made for this.
        let _ = fs::remove_dir_all(&self.directory);
    }
}

fn monitor(directory: &Path) -> PathBuf {
    directory.join("qmp")
}

fn failed(doing: String) -> impl FnOnce(io::Error) -> GuestError {
    move |source| GuestError::Io { doing, source }
}

impl Launch {
    /// Starts it and waits until its monitor answers.
    pub fn start(&self, deadline: Deadline) -> Result<(Launched, Machine), GuestError> {
        let directory = &self.directory;
        let make = |path: &Path| fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
        make(directory).map_err(failed(format!("make {}", directory.display())))?;
        let path = directory.join("log");
        let log = fs::OpenOptions::new().create(true).append(true).mode(0o600).open(&path);
        let log = log.map_err(failed(format!("make {}", path.display())))?;
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).args(["-incoming", "defer", "-S"]);
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", monitor(directory).display()));
        let again = log.try_clone().map_err(failed(format!("open {} again", path.display())))?;
        if let Some(directory) = &self.working_directory {
            command.current_dir(directory);
        }
        command.stdin(Stdio::null()).stdout(log).stderr(again);
        // Its own group: a SIGINT from the terminal is for belay, which then decides.
        command.process_group(0);
        let program = self.program.to_string_lossy();
        let child = command.spawn().map_err(failed(format!("start {program}")))?;
        let mut launched = Launched { child: Some(child), leash: None, directory: directory.clone() };
        let qmp = launched.connect(&program, &path, deadline)?;
        let process = Process::behind(&qmp, launched.child.as_ref().map(Child::id));
        let process = process.map_err(|error| failed(format!("take hold of {program}"))(io::Error::other(error)))?;
        launched.leash = Some(Leash::tie(&self.leash, &process).map_err(failed("start the leash".to_owned()))?);
        Ok((launched, Machine::new(qmp, process)))
    }
}

impl Launched {
    fn connect(&mut self, program: &str, log: &Path, deadline: Deadline) -> Result<Qmp, GuestError> {
        let socket = self.monitor();
        let error = loop {
            match UnixStream::connect(&socket) {
                Ok(stream) => match Qmp::over(stream, &socket, deadline) {
                    Ok(qmp) => return Ok(qmp),
                    Err(error) => break error,
                },
                Err(_) if !self.has_ended() && !deadline.expired() => std::thread::sleep(LOOK),
                Err(source) => break QmpError::Connect { path: socket, source },
            }
        };
        // One that closes its monitor is about to end.
        let soon = Deadline::after(GONE.min(deadline.left()));
        while matches!(error, QmpError::Closed { .. }) && !self.has_ended() && !soon.expired() {
            std::thread::sleep(LOOK);
        }
        let said = last_words(log);
        if let Some(Ok(Some(status))) = self.child.as_mut().map(Child::try_wait) {
            let why = format!("{program} ended ({status}) before it could take a guest; it said: {said}");
            return Err(GuestError::Unsupported(why));
        }
        Err(failed(format!("speak to {program}, which said: {said}"))(io::Error::other(error)))
    }

    fn has_ended(&mut self) -> bool {
        self.child.as_mut().is_none_or(|child| !matches!(child.try_wait(), Ok(None)))
    }
}

/// The end of what a QEMU wrote, on one line.
fn last_words(log: &Path) -> String {
    let mut text = Vec::new();
    let read = fs::File::open(log).and_then(|mut file| {
        let bytes = file.metadata()?.len();
        file.seek(SeekFrom::Start(bytes.saturating_sub(QUOTED_BYTES)))?;
        file.take(QUOTED_BYTES).read_to_end(&mut text)
    });
    let text = String::from_utf8_lossy(&text).trim().replace('\n', "; ").replace(char::is_control, "?");
    match read {
        Ok(_) if !text.is_empty() => text,
        _ => "nothing".to_owned(),
    }
}
