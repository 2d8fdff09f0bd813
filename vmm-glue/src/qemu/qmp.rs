//! The QEMU Machine Protocol: JSON lines over a Unix socket (qemu docs/interop/qmp-spec.rst).
//!
//! QEMU is the other side of a trust boundary here: it runs a guest, and a guest may have taken it over. Lines are bounded, every
//! wait has a deadline, and what it says is data.

use belay_transport::{Deadline, harmless};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Longest line that is taken. The longest known, the QOM tree's and the schema's, stay below a megabyte.
const MOST_LINE_BYTES: usize = 8 << 20;
/// Events kept until somebody asks for them; beyond it the oldest are dropped.
const MOST_EVENTS: usize = 1024;
/// Bytes of their lines that are kept, but for the newest.
const MOST_EVENT_BYTES: usize = 1 << 20;
/// Between two tries while nothing listens at the socket.
const RETRY: Duration = Duration::from_millis(5);

/// Why QEMU could not be spoken to.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    #[error("cannot connect to the QMP socket {}", .path.display())]
    Connect {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "the QMP socket {} accepts and does not greet within {waited_ms} ms: another client holds it (libvirt, another belay), or QEMU hangs", .path.display()
    )]
    NoGreeting { path: PathBuf, waited_ms: u128 },
    #[error("QEMU closed its QMP socket while it was asked to {asked}")]
    Closed { asked: String },
    #[error("QEMU did not answer {asked} within {waited_ms} ms")]
    TimedOut { asked: String, waited_ms: u128 },
    #[error("QEMU refused {asked}: {description} ({class})")]
    Refused { asked: String, class: String, description: String },
    #[error("what came over the QMP socket is not the protocol: {0}")]
    NotQmp(String),
    #[error("the QMP socket failed while QEMU was asked to {asked}")]
    Io {
        asked: String,
        #[source]
        source: io::Error,
    },
}

/// What QEMU says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Version {
    pub major: u32,
    pub minor: u32,
    pub micro: u32,
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// Something that happened in QEMU.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    pub name: String,
    pub data: Value,
    /// QEMU's wall clock in microseconds, which may be set at any time: to show, never to decide by.
    pub at_us: i64,
}

/// A connection to one QEMU. It serves one client at a time: while this is open, nobody else can order anything.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    buffer: Vec<u8>,
    /// Up to where `buffer` is known to hold no line's end.
    searched: usize,
    /// Each with its line's bytes.
    events: VecDeque<(Event, usize)>,
    event_bytes: usize,
    last_id: u64,
    version: Version,
}

impl Qmp {
    /// Connects and negotiates. Tries again until the deadline while the socket is not there yet or nobody listens (a QEMU that is
    /// being started).
    pub fn connect(path: &Path, deadline: Deadline) -> Result<Self, QmpError> {
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(source) => {
                    let starting = matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused);
                    if !starting || deadline.expired() {
                        return Err(QmpError::Connect { path: path.to_owned(), source });
                    }
                    std::thread::sleep(RETRY.min(deadline.left()));
                }
            }
        };
        Self::over(stream, path, deadline)
    }

    /// The same over a stream that is connected; `path` is for errors.
    pub fn over(stream: UnixStream, path: &Path, deadline: Deadline) -> Result<Self, QmpError> {
        let started = Instant::now();
        let version = Version { major: 0, minor: 0, micro: 0 };
        let (buffer, events) = (Vec::new(), VecDeque::new());
        let mut qmp = Self { stream, buffer, searched: 0, events, event_bytes: 0, last_id: 0, version };
        let (greeting, _) = match qmp.line("greet", deadline) {
            Err(QmpError::TimedOut { .. }) => {
                return Err(QmpError::NoGreeting { path: path.to_owned(), waited_ms: started.elapsed().as_millis() });
            }
            other => other?,
        };
        let version = greeting.pointer("/QMP/version/qemu").cloned().unwrap_or_default();
        qmp.version = Version::deserialize(version)
            .map_err(|error| QmpError::NotQmp(harmless(&format!("a greeting without QEMU's version: {error}"))))?;
        qmp.execute("qmp_capabilities", json!({}), deadline)?;
        Ok(qmp)
    }

    /// QEMU's version, for people; what a version can do is asked, never concluded from it.
    pub fn version(&self) -> &Version {
        &self.version
    }

    /// Executes a command and gives what it returned. Events that come meanwhile are kept for [`Qmp::wait_for`].
    pub fn execute(&mut self, command: &str, arguments: Value, deadline: Deadline) -> Result<Value, QmpError> {
        let id = self.ask(command, arguments, None, deadline)?;
        self.answer(command, id, deadline)
    }

    /// As [`Qmp::execute`], with a descriptor beside the command (SCM_RIGHTS) for QEMU to keep: `getfd`, `add-fd`.
    pub fn execute_with(
        &mut self,
        command: &str,
        arguments: Value,
        fd: BorrowedFd<'_>,
        deadline: Deadline,
    ) -> Result<Value, QmpError> {
        let id = self.ask(command, arguments, Some(fd), deadline)?;
        self.answer(command, id, deadline)
    }

    /// Leaves a command with QEMU, which carries it out after those before it. Its answer is not waited for.
    pub fn leave(&mut self, command: &str, deadline: Deadline) -> Result<(), QmpError> {
        self.ask(command, json!({}), None, deadline).map(drop)
    }

    fn ask(
        &mut self,
        command: &str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
        deadline: Deadline,
    ) -> Result<u64, QmpError> {
        self.last_id += 1;
        let mut text = json!({ "execute": command, "arguments": arguments, "id": self.last_id }).to_string();
        text.push('\n');
        let mut bytes = text.as_bytes();
        if let Some(fd) = fd {
            // The descriptor goes with the first of them.
            bytes = &bytes[self.send_with(command, bytes, fd, deadline)?..];
        }
        self.send(command, bytes, deadline)?;
        Ok(self.last_id)
    }

    /// What was returned to the command `id`.
    fn answer(&mut self, command: &str, id: u64, deadline: Deadline) -> Result<Value, QmpError> {
        loop {
            let (mut answer, bytes) = self.line(command, deadline)?;
            if self.keep_event(&answer, bytes)? {
                continue;
            }
            if answer.get("id").and_then(Value::as_u64).is_some_and(|answered| answered != id) {
                // The answer to one that was given up.
                continue;
            }
            if let Some(error) = answer.get("error") {
                let word = |name| harmless(error.get(name).and_then(Value::as_str).unwrap_or_default());
                let (class, description) = (word("class"), word("desc"));
                return Err(QmpError::Refused { asked: command.to_owned(), class, description });
            }
            return match answer.get_mut("return") {
                Some(value) => Ok(value.take()),
                None => Err(QmpError::NotQmp(format!("an answer to {command} that is neither a return nor an error"))),
            };
        }
    }

    /// The next event that `wanted` takes; those before it are dropped.
    pub fn wait_for(
        &mut self,
        what: &str,
        mut wanted: impl FnMut(&Event) -> bool,
        deadline: Deadline,
    ) -> Result<Event, QmpError> {
        loop {
            while let Some(event) = self.oldest_event() {
                if wanted(&event) {
                    return Ok(event);
                }
            }
            let (line, bytes) = self.line(what, deadline)?;
            self.keep_event(&line, bytes)?;
        }
    }

    /// Drops the events that came so far: what is waited for next comes after this.
    pub fn forget_events(&mut self) {
        self.events.clear();
        self.event_bytes = 0;
    }

    fn oldest_event(&mut self) -> Option<Event> {
        let (event, bytes) = self.events.pop_front()?;
        self.event_bytes -= bytes;
        Some(event)
    }

    /// Keeps what was said in a line of so many bytes if it is an event.
    fn keep_event(&mut self, line: &Value, bytes: usize) -> Result<bool, QmpError> {
        let Some(name) = line.get("event") else { return Ok(false) };
        let name = name.as_str().ok_or_else(|| QmpError::NotQmp("an event without a name".to_owned()))?.to_owned();
        let stamp = |part: &str| line.pointer(part).and_then(Value::as_i64).unwrap_or(0);
        let at_us =
            stamp("/timestamp/seconds").saturating_mul(1_000_000).saturating_add(stamp("/timestamp/microseconds"));
        while self.events.len() >= MOST_EVENTS
            || (self.event_bytes + bytes > MOST_EVENT_BYTES && !self.events.is_empty())
        {
            self.oldest_event();
        }
        self.event_bytes += bytes;
        self.events.push_back((Event { name, data: line.get("data").cloned().unwrap_or_default(), at_us }, bytes));
        Ok(true)
    }

    /// A QEMU that does not read (its main loop waits for a page) must not hold whoever asks it.
    fn send(&mut self, asked: &str, bytes: &[u8], deadline: Deadline) -> Result<(), QmpError> {
        let started = Instant::now();
        let mut left = bytes;
        while !left.is_empty() {
            let wait = self.wait(asked, deadline, started)?;
            let written = self.stream.set_write_timeout(Some(wait)).and_then(|()| self.stream.write(left));
            match written {
                Ok(count) => left = &left[count..],
                Err(error) => self.failed(asked, error)?,
            }
        }
        Ok(())
    }

    /// Sends as much as there is room for, and a descriptor.
    fn send_with(
        &mut self,
        asked: &str,
        bytes: &[u8],
        fd: BorrowedFd<'_>,
        deadline: Deadline,
    ) -> Result<usize, QmpError> {
        let started = Instant::now();
        let fds = [fd];
        loop {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            assert!(control.push(SendAncillaryMessage::ScmRights(&fds)), "the space is made for one");
            let wait = self.wait(asked, deadline, started)?;
            let sent = self.stream.set_write_timeout(Some(wait)).and_then(|()| {
                sendmsg(&self.stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).map_err(Into::into)
            });
            match sent {
                Ok(count) => return Ok(count),
                Err(error) => self.failed(asked, error)?,
            }
        }
    }

    /// The next line and how many bytes it had.
    fn line(&mut self, asked: &str, deadline: Deadline) -> Result<(Value, usize), QmpError> {
        let started = Instant::now();
        loop {
            if let Some(end) = self.buffer[self.searched..].iter().position(|&byte| byte == b'\n') {
                let end = self.searched + end;
                let line = serde_json::from_slice(&self.buffer[..end])
                    .map_err(|error| QmpError::NotQmp(format!("a line of {end} bytes: {error}")))?;
                self.buffer.drain(..=end);
                self.searched = 0;
                return Ok((line, end));
            }
            self.searched = self.buffer.len();
            if self.buffer.len() > MOST_LINE_BYTES {
                return Err(QmpError::NotQmp(format!("a line longer than {MOST_LINE_BYTES} bytes")));
            }
            let wait = self.wait(asked, deadline, started)?;
            let mut bytes = [0; 16 << 10];
            match self.stream.set_read_timeout(Some(wait)).and_then(|()| self.stream.read(&mut bytes)) {
                Ok(0) => return Err(QmpError::Closed { asked: asked.to_owned() }),
                Ok(count) => self.buffer.extend_from_slice(&bytes[..count]),
                Err(error) => self.failed(asked, error)?,
            }
        }
    }

    fn wait(&self, asked: &str, deadline: Deadline, started: Instant) -> Result<Duration, QmpError> {
        if deadline.expired() {
            return Err(QmpError::TimedOut { asked: asked.to_owned(), waited_ms: started.elapsed().as_millis() });
        }
        // A socket's timeout is in microseconds at the finest, and zero would mean for ever.
        Ok(deadline.left().max(Duration::from_micros(1)))
    }

    /// What ends a request, and what is only the end of one wait.
    fn failed(&self, asked: &str, source: io::Error) -> Result<(), QmpError> {
        match source.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted => Ok(()),
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                Err(QmpError::Closed { asked: asked.to_owned() })
            }
            _ => Err(QmpError::Io { asked: asked.to_owned(), source }),
        }
    }
}

impl AsFd for Qmp {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GREETING: &str =
        r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": ""}, "capabilities": []}}"#;

    /// A QEMU that says these lines, one for each that it hears; the first at once.
    fn qemu(lines: Vec<String>) -> (UnixStream, std::thread::JoinHandle<Vec<String>>) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let thread = std::thread::spawn(move || {
            let mut heard = Vec::new();
            let mut reader = io::BufReader::new(theirs.try_clone().unwrap());
            for (index, line) in lines.iter().enumerate() {
                if index > 0 {
                    let mut text = String::new();
                    if io::BufRead::read_line(&mut reader, &mut text).unwrap_or(0) == 0 {
                        break;
                    }
                    heard.push(text);
                }
                if theirs.write_all(line.as_bytes()).is_err() {
                    break;
                }
            }
            heard
        });
        (ours, thread)
    }

    fn soon() -> Deadline {
        Deadline::after(Duration::from_secs(10))
    }

    fn open(lines: &[&str]) -> (Result<Qmp, QmpError>, std::thread::JoinHandle<Vec<String>>) {
        let (stream, thread) = qemu(lines.iter().map(|line| (*line).to_owned()).collect());
        (Qmp::over(stream, Path::new("qmp"), soon()), thread)
    }

    #[test]
    fn an_answer_is_told_from_events_and_from_answers_to_what_was_given_up() {
        let greeting = format!("{GREETING}\r\n");
        let stop = r#"{"timestamp": {"seconds": 2, "microseconds": 5}, "event": "STOP"}"#;
        let answer =
            format!("{stop}\n{{\"return\": 1, \"id\": 1}}\n{{\"return\": {{\"running\": false}}, \"id\": 2}}\n");
        let (qmp, thread) = open(&[&greeting, "{\"return\": {}, \"id\": 1}\r\n", &answer]);
        let mut qmp = qmp.unwrap();
        assert_eq!(qmp.version().to_string(), "10.0.2");
        let status = qmp.execute("query-status", json!({}), soon()).unwrap();
        assert_eq!(status, json!({ "running": false }));
        let event = qmp.wait_for("stop", |event| event.name == "STOP", soon()).unwrap();
        assert_eq!((event.at_us, event.data), (2_000_005, Value::Null));
        drop(qmp);
        let heard: Vec<Value> = thread.join().unwrap().iter().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(heard[1], json!({ "execute": "query-status", "arguments": {}, "id": 2 }));
    }

    #[test]
    fn a_refusal_names_the_command_and_qemus_reason() {
        let refusal = r#"{"id": 2, "error": {"class": "GenericError", "desc": "no such thing"}}"#;
        let (qmp, _thread) =
            open(&[&format!("{GREETING}\n"), "{\"return\": {}, \"id\": 1}\n", &format!("{refusal}\n")]);
        let error = qmp.unwrap().execute("device_add", json!({}), soon()).unwrap_err();
        assert_eq!(error.to_string(), "QEMU refused device_add: no such thing (GenericError)");
        let refusal = format!(r#"{{"id": 2, "error": {{"class": "a\u001b[2J", "desc": "{}"}}}}"#, "no".repeat(10_000));
        let (qmp, _thread) =
            open(&[&format!("{GREETING}\n"), "{\"return\": {}, \"id\": 1}\n", &format!("{refusal}\n")]);
        let error = qmp.unwrap().execute("device_add", json!({}), soon()).unwrap_err().to_string();
        assert!(error.len() < 500 && error.ends_with("… (a [2J)"), "a QEMU's words stay words: {error:?}");
    }

    #[test]
    fn a_qemu_that_says_nothing_is_waited_for_no_longer_than_was_said() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let bound = Duration::from_millis(30);
        let error = Qmp::over(ours, Path::new("/run/qmp"), Deadline::after(bound)).unwrap_err();
        assert!(matches!(&error, QmpError::NoGreeting { waited_ms, .. } if *waited_ms >= 30), "{error}");
        assert!(error.to_string().contains("another client holds it"), "{error}");
        let (qmp, _thread) = open(&[&format!("{GREETING}\n"), "{\"return\": {}, \"id\": 1}\n"]);
        let mut qmp = qmp.unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        qmp.stream = ours;
        let error = qmp.execute("stop", json!({}), Deadline::after(bound)).unwrap_err();
        assert!(matches!(&error, QmpError::TimedOut { asked, .. } if asked == "stop"), "{error}");
        // One that does not even read: the socket's buffer is full.
        let long = "x".repeat(4 << 20);
        let error = qmp.execute("stop", json!({ "long": long }), Deadline::after(bound)).unwrap_err();
        assert!(matches!(error, QmpError::TimedOut { .. }), "{error}");
        drop(theirs);
        let error = qmp.execute("stop", json!({}), soon()).unwrap_err();
        assert!(matches!(error, QmpError::Closed { .. }), "{error}");
    }

    #[test]
    fn what_is_not_the_protocol_is_refused_and_takes_bounded_memory() {
        for line in ["[]\n", "{\n", "{\"QMP\": {}}\n", "\u{0}\n"] {
            let error = open(&[line]).0.unwrap_err();
            assert!(matches!(error, QmpError::NotQmp(_)), "{line:?}: {error}");
        }
        let endless = "y".repeat(MOST_LINE_BYTES + (64 << 10));
        let error = open(&[&endless]).0.unwrap_err();
        assert!(error.to_string().contains("longer than"), "{error}");
        let (qmp, _thread) = open(&[&format!("{GREETING}\n"), "{\"return\": {}, \"id\": 1}\n", "{\"id\": 2}\n"]);
        let error = qmp.unwrap().execute("stop", json!({}), soon()).unwrap_err();
        assert!(error.to_string().contains("neither a return nor an error"), "{error}");
    }

    #[test]
    fn events_that_nobody_takes_are_kept_to_a_bound() {
        let (qmp, _thread) = open(&[&format!("{GREETING}\n"), "{\"return\": {}, \"id\": 1}\n"]);
        let mut qmp = qmp.unwrap();
        for number in 0..MOST_EVENTS + 7 {
            qmp.keep_event(&json!({ "event": format!("E{number}") }), 16).unwrap();
        }
        assert_eq!(qmp.events.len(), MOST_EVENTS);
        assert_eq!(qmp.wait_for("any", |_| true, soon()).unwrap().name, "E7");
        // Long ones to a bound in bytes, and the newest however long it is.
        qmp.forget_events();
        for number in 0..20 {
            qmp.keep_event(&json!({ "event": format!("L{number}") }), MOST_EVENT_BYTES / 4).unwrap();
        }
        assert_eq!((qmp.events.len(), qmp.event_bytes), (4, MOST_EVENT_BYTES));
        qmp.keep_event(&json!({ "event": "huge" }), MOST_LINE_BYTES).unwrap();
        assert_eq!(qmp.wait_for("any", |_| true, soon()).unwrap().name, "huge");
        assert_eq!((qmp.events.len(), qmp.event_bytes), (0, 0));
    }

    #[test]
    fn a_socket_that_is_not_there_is_named() {
        let path = Path::new("/nonexistent/qmp");
        let error = Qmp::connect(path, Deadline::after(Duration::from_millis(20))).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/qmp"), "{error}");
    }
}
