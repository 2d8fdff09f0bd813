//! One QEMU that is given orders: stop, go on, save, load. What each does inside QEMU, and what can be believed of it, is told there.

use super::process::Process;
use super::qmp::{Event, Qmp, QmpError};
use belay_checkpoint::guest::GuestError;
use belay_transport::Deadline;
use rustix::fs::{MemfdFlags, Mode, OFlags, SeekFrom, memfd_create, open, seek};
use rustix::io::Errno;
use rustix::process::{Signal, pidfd_send_signal};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::Duration;

/// Longest answer to anything but an order that may wait for a page. A QEMU whose main loop runs answers in well under a millisecond.
pub(super) const ANSWER: Duration = Duration::from_secs(5);
/// Longest that a migration's stream may take, out or in: 300 kB on one host.
const STREAM: Duration = Duration::from_secs(20);
/// Most bytes of such a stream: what a message between hosts may carry, with room for the rest of it.
pub(super) const MOST_STREAM: u64 = 60 << 20;
/// What a descriptor is called while QEMU takes it for a stream.
const STREAM_NAME: &str = "belay-stream";
/// Bytes a second; QEMU's own default would spread a screen's memory over a quarter of a second.
const UNBOUNDED: u64 = 1 << 40;

/// A QEMU with its monitor and its process.
#[derive(Debug)]
pub struct Machine {
    pub qmp: Qmp,
    pub process: Process,
    /// Where it saves device state, once it was asked to.
    saved: Option<Saved>,
    /// What it was told of migrations, and must forget when its guest stays or has come: an operator's own would leave RAM out.
    prepared: Option<Prepared>,
    /// Takes the stream of a migration that has stopped its guest and waits to be told to go on.
    leaving: Option<JoinHandle<io::Result<Vec<u8>>>>,
}

/// A QEMU that was told how to stream.
#[derive(Debug)]
struct Prepared {
    /// `max-bandwidth` as it was.
    bandwidth: Option<Value>,
    /// Our end of the stream; QEMU has the other.
    ours: Option<UnixStream>,
}

/// A file in memory that QEMU writes. Its end has a description of its own that may only be written, because that is how QEMU asks for it,
/// and whose position is put back before each use: QEMU goes on where it left off.
#[derive(Debug)]
struct Saved {
    file: File,
    end: OwnedFd,
    /// `/dev/fdset/N`.
    path: String,
}

pub(super) fn failed(doing: &str) -> impl FnOnce(io::Error) -> GuestError {
    let doing = doing.to_owned();
    move |source| GuestError::Io { doing, source }
}

/// What an error of QMP means to whoever asked for a guest to do something.
pub(super) fn told(error: QmpError) -> GuestError {
    match error {
        QmpError::Closed { .. } => GuestError::VmmGone(error.to_string()),
        error => GuestError::Io { doing: "give QEMU an order".to_owned(), source: io::Error::other(error) },
    }
}

impl Machine {
    pub fn new(qmp: Qmp, process: Process) -> Self {
        Self { qmp, process, saved: None, prepared: None, leaving: None }
    }

    /// One command with the usual bound.
    pub(super) fn order(&mut self, command: &str, arguments: Value) -> Result<Value, GuestError> {
        self.qmp.execute(command, arguments, Deadline::after(ANSWER)).map_err(told)
    }

    /// Stops the guest. When it answers, every vCPU stands, devices are drained and disks flushed.
    ///
    /// A vCPU that waits for a page holds QEMU's main loop, and the answer with it. Then the order to go on is left behind this one, so that a
    /// stop which comes too late to be of use is over at once, and the guest is as it was.
    pub fn stop(&mut self, deadline: Deadline) -> Result<(), GuestError> {
        let bound = deadline.left();
        match self.qmp.execute("stop", json!({}), deadline) {
            Ok(_) => Ok(()),
            Err(QmpError::TimedOut { .. }) => {
                self.qmp.leave("cont", Deadline::after(ANSWER)).map_err(told)?;
                Err(GuestError::StopTimedOut { bound_ms: bound.as_millis() as u64, running: 1, vcpus: 1 })
            }
            Err(error) => Err(told(error)),
        }
    }

    /// Lets the guest run.
    pub fn go_on(&mut self) -> Result<(), GuestError> {
        self.order("cont", json!({})).map(drop)
    }

    /// Appends the state of vCPUs and devices to `out`: everything but memory blocks. The guest must stand, and stands after.
    pub fn save_devices(&mut self, out: &mut Vec<u8>) -> Result<(), GuestError> {
        let saved = match &mut self.saved {
            Some(saved) => saved,
            none => none.insert(Saved::made_known_to(&mut self.qmp)?),
        };
        seek(&saved.end, SeekFrom::Start(0)).map_err(|errno| failed("rewind device state")(errno.into()))?;
        // The default, `live`, hands the disks' images over to somebody else.
        let arguments = json!({ "filename": saved.path, "live": false });
        self.qmp.execute("xen-save-devices-state", arguments, Deadline::after(ANSWER)).map_err(told)?;
        let saved = self.saved.as_ref().expect("made above");
        let bytes =
            seek(&saved.end, SeekFrom::Current(0)).map_err(|errno| failed("find device state")(errno.into()))?;
        if bytes == 0 || bytes > MOST_STREAM {
            return Err(GuestError::Unsupported(format!(
                "{bytes} bytes of device state; at most {MOST_STREAM} can go"
            )));
        }
        let at = out.len();
        out.resize(at + bytes as usize, 0);
        saved.file.read_exact_at(&mut out[at..], 0).map_err(failed("read device state"))
    }

    /// Stops a guest that is about to leave. QEMU does what it can of a migration while the guest still runs, and then waits: the blackout begins
    /// after all that takes long and needs no guest that stands.
    pub fn stop_to_leave(&mut self, deadline: Deadline) -> Result<(), GuestError> {
        let bound = deadline.left();
        let ours = self.take_stream()?;
        // On a thread of its own: QEMU must not wait for a socket that is full.
        let taken = std::thread::Builder::new().name("qemu-stream".into()).spawn(move || take(&ours));
        self.leaving = Some(taken.map_err(failed("start a thread"))?);
        let stopped = self.migrate("migrate", "pre-switchover", deadline);
        stopped.map_err(|error| {
            // What is wrong with it is told already.
            let _ = self.stay();
            match error {
                QmpOr::Qmp(QmpError::TimedOut { .. }) => {
                    GuestError::StopTimedOut { bound_ms: bound.as_millis() as u64, running: 1, vcpus: 1 }
                }
                other => other.told(),
            }
        })
    }

    /// Calls a migration off that has stopped its guest. The guest runs then, as it did before.
    fn stay(&mut self) -> Result<(), GuestError> {
        let Some(taken) = self.leaving.take() else { return Ok(()) };
        self.qmp.forget_events();
        self.order("migrate_cancel", json!({}))?;
        let over = |event: &Event| event.name == "MIGRATION" && matches!(status(&event.data), "cancelled" | "failed");
        self.qmp.wait_for("migrate_cancel", over, Deadline::after(STREAM)).map_err(told)?;
        // What it took is of no use.
        drop(taken.join());
        Ok(())
    }

    /// Appends the stream of a migration that leaves RAM out to `out`: vCPUs, devices, and every block that is no shared file. After
    /// [`Machine::stop_to_leave`]; the guest can go on later, or be left.
    pub fn stream_out(&mut self, out: &mut Vec<u8>) -> Result<(), GuestError> {
        let none = || GuestError::WrongState { call: "save", state: "running", wanted: "stopped to leave" };
        let taken = self.leaving.take().ok_or_else(none)?;
        let gone = self.migrate("migrate-continue", "completed", Deadline::after(STREAM));
        if gone.is_err() {
            // It stands as before; a stream that nobody takes must not go on.
            let _ = self.order("migrate_cancel", json!({}));
        }
        let taken = taken.join().map_err(|_| GuestError::Unsupported("reading QEMU's stream failed".to_owned()))?;
        gone.map_err(QmpOr::told)?;
        let taken = taken.map_err(failed("read QEMU's migration stream"))?;
        if taken.len() as u64 > MOST_STREAM {
            return Err(GuestError::Unsupported(format!(
                "a stream of more than {MOST_STREAM} bytes: the guest has that much memory that is no shared file"
            )));
        }
        out.extend_from_slice(&taken);
        Ok(())
    }

    /// Loads a stream into a QEMU that was started with `-incoming defer`; its guest stands after. QEMU ends if it cannot.
    pub fn stream_in(&mut self, parts: &[&[u8]]) -> Result<(), GuestError> {
        let mut ours = self.take_stream()?;
        ours.set_write_timeout(Some(STREAM)).map_err(failed("bound a stream"))?;
        std::thread::scope(|scope| {
            let given = scope.spawn(move || {
                let given = parts.iter().try_for_each(|part| ours.write_all(part));
                // Its end is the stream's.
                drop(ours);
                given
            });
            let loaded = self.migrate("migrate-incoming", "completed", Deadline::after(STREAM));
            let loaded = loaded.map_err(QmpOr::told);
            if loaded.is_err() {
                // Whoever still writes to it is let go by its end.
                let _ = self.kill();
            }
            let given = given.join().map_err(|_| GuestError::Unsupported("writing QEMU's stream failed".to_owned()))?;
            loaded?;
            given.map_err(failed("write a stream to QEMU"))
        })?;
        // While it stands and answers at once: a move of its operator's own would leave RAM out.
        self.forget_the_switch()
    }

    /// Tells it all that can be told before a stream is wanted, so that a guest need not stand for it: RAM is left out, events are wanted, the
    /// stream's end.
    pub fn prepare_stream(&mut self) -> Result<(), GuestError> {
        if self.prepared.is_none() {
            let before = self.order("query-migrate-parameters", json!({}))?;
            self.prepared = Some(Prepared { bandwidth: before.get("max-bandwidth").cloned(), ours: None });
            self.order("migrate-set-parameters", json!({ "max-bandwidth": UNBOUNDED }))?;
            self.order("migrate-set-capabilities", capabilities(true))?;
        }
        let prepared = self.prepared.as_mut().expect("made above");
        if prepared.ours.is_none() {
            let (ours, theirs) = UnixStream::pair().map_err(failed("make a socket pair"))?;
            let arguments = json!({ "fdname": STREAM_NAME });
            self.qmp.execute_with("getfd", arguments, theirs.as_fd(), Deadline::after(ANSWER)).map_err(told)?;
            prepared.ours = Some(ours);
        }
        Ok(())
    }

    fn take_stream(&mut self) -> Result<UnixStream, GuestError> {
        self.prepare_stream()?;
        let ours = self.prepared.as_mut().and_then(|prepared| prepared.ours.take());
        Ok(ours.expect("prepared above"))
    }

    /// Gives an order that a migration follows, and waits until that has come to the status `wanted`.
    fn migrate(&mut self, command: &'static str, wanted: &str, deadline: Deadline) -> Result<(), QmpOr> {
        self.qmp.forget_events();
        let arguments = match command {
            "migrate-continue" => json!({ "state": "pre-switchover" }),
            _ => json!({ "uri": format!("fd:{STREAM_NAME}") }),
        };
        self.qmp.execute(command, arguments, deadline)?;
        let over = |event: &Event| {
            let status = status(&event.data);
            event.name == "MIGRATION" && (status == wanted || matches!(status, "completed" | "failed" | "cancelled"))
        };
        let ended = self.qmp.wait_for(command, over, deadline)?;
        let came_to = status(&ended.data);
        if came_to == wanted {
            return Ok(());
        }
        let why = self.qmp.execute("query-migrate", json!({}), Deadline::after(ANSWER)).ok();
        let why = why.as_ref().and_then(|why| why.get("error-desc")).and_then(Value::as_str);
        let doing = if command == "migrate-incoming" { "loading the guest" } else { "saving the guest" };
        let why = why.unwrap_or("its log says more");
        Err(QmpOr::Guest(GuestError::BadState(format!("{doing} came to {came_to}: {why}"))))
    }

    /// Has it forget what it was told for a switch that was taken back, or that is over: the next to migrate its guest is perhaps not belay.
    pub fn forget_the_switch(&mut self) -> Result<(), GuestError> {
        self.stay()?;
        let Some(Prepared { bandwidth, ours }) = self.prepared.take() else { return Ok(()) };
        if ours.is_some() {
            // The end of a stream that never began.
            self.order("closefd", json!({ "fdname": STREAM_NAME }))?;
        }
        if let Some(bandwidth) = bandwidth {
            self.order("migrate-set-parameters", json!({ "max-bandwidth": bandwidth }))?;
        }
        self.order("migrate-set-capabilities", capabilities(false)).map(drop)
    }

    /// Stops its process, or lets it go on. One that stands does not let its guest run whoever orders that, by another monitor too. Another user's,
    /// which this process may not signal, stays as it is.
    pub fn stand_still(&mut self, still: bool) -> Result<(), GuestError> {
        let signal = if still { Signal::STOP } else { Signal::CONT };
        match pidfd_send_signal(self.process.pidfd(), signal) {
            Ok(()) | Err(Errno::SRCH | Errno::PERM) => Ok(()),
            Err(errno) => Err(failed("stop QEMU's process, or let it go on")(errno.into())),
        }
    }

    /// Ends it as nothing else can: a QEMU that waits for a page answers no order. One of another user's, which this process may not kill, is
    /// asked to end.
    pub fn kill(&mut self) -> Result<(), GuestError> {
        match pidfd_send_signal(self.process.pidfd(), Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(Errno::PERM) => match self.qmp.execute("quit", json!({}), Deadline::after(ANSWER)) {
                Ok(_) | Err(QmpError::Closed { .. }) => Ok(()),
                Err(error) => Err(told(error)),
            },
            Err(errno) => Err(failed("end QEMU")(errno.into())),
        }
    }
}

/// RAM that is a shared file is left out of a stream, QEMU says how far it is, and waits when it has stopped its guest; or none of these.
fn capabilities(on: bool) -> Value {
    let one = |name: &str| json!({ "capability": name, "state": on });
    json!({ "capabilities": [one("x-ignore-shared"), one("events"), one("pause-before-switchover")] })
}

fn status(data: &Value) -> &str {
    data.get("status").and_then(Value::as_str).unwrap_or_default()
}

/// Why a migration did not come to where it was to.
enum QmpOr {
    Qmp(QmpError),
    Guest(GuestError),
}

impl From<QmpError> for QmpOr {
    fn from(error: QmpError) -> Self {
        Self::Qmp(error)
    }
}

impl QmpOr {
    fn told(self) -> GuestError {
        match self {
            Self::Qmp(error) => told(error),
            Self::Guest(error) => error,
        }
    }
}

/// All of a stream, up to a little more than there may be.
fn take(mut stream: &UnixStream) -> io::Result<Vec<u8>> {
    stream.set_read_timeout(Some(STREAM))?;
    let mut bytes = Vec::with_capacity(1 << 20);
    Read::take(&mut stream, MOST_STREAM + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

impl Saved {
    fn made_known_to(qmp: &mut Qmp) -> Result<Self, GuestError> {
        let file = memfd_create("belay-device-state", MemfdFlags::CLOEXEC);
        let file = file.map_err(|errno| failed("make a file in memory")(errno.into()))?;
        let again = format!("/proc/self/fd/{}", file.as_raw_fd());
        let end = open(again, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty());
        let end = end.map_err(|errno| failed("open a file in memory again")(errno.into()))?;
        let added = qmp.execute_with("add-fd", json!({}), end.as_fd(), Deadline::after(ANSWER)).map_err(told)?;
        let set = added.get("fdset-id").and_then(Value::as_u64);
        let set =
            set.ok_or_else(|| GuestError::Unsupported("QEMU took a descriptor and did not say where".to_owned()))?;
        Ok(Self { file: file.into(), end, path: format!("/dev/fdset/{set}") })
    }
}
