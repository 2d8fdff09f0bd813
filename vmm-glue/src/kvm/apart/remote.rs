//! The client's side: a guest in another process.

use super::{Answer, Ask, Estate, FromClient, FromVmm, Keeper, Keeps, Kept, VERSION, frame};
use crate::guard::{kill_and_prove, proof_of_death};
use crate::kvm::guests::GuestSpec;
use crate::kvm::{BareGuest, KvmOptions};
use belay_checkpoint::dirty::DirtySet;
use belay_checkpoint::guest::{DirtyTracker, Guest, GuestError, Packet, PacketSink, RamBlock, TrackerKind};
use belay_transport::region::{Mapping, RamFile};
use belay_transport::uffd::{Features, Uffd};
use belay_transport::{Deadline, RegionId};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use serde::{Deserialize, Serialize};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// How long the VMM may take to answer what does not wait for the guest, or beyond what does.
const ANSWER_BOUND: Duration = Duration::from_secs(10);
/// How long a VMM that was told to end may take, before it is killed.
const EXIT_BOUND: Duration = Duration::from_secs(3);

/// Which faults a userfaultfd of the VMM reports; see [`belay_transport::uffd::Faults`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmmFaults {
    None,
    Missing,
    MissingAndMinor,
}

type Arrived = (u64, Result<Answer, GuestError>, Option<OwnedFd>);

/// The connection, shared by the guest and its trackers.
struct Channel {
    stream: UnixStream,
    /// Requests go one at a time: the next waits until the last was answered or given up.
    turn: Mutex<Turn>,
    /// Keeps frames whole between requests and [`FromClient::Room`].
    writing: Mutex<()>,
}

struct Turn {
    last_id: u64,
    answers: Receiver<Arrived>,
}

impl Channel {
    fn send(&self, message: &FromClient, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let _whole = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        frame::send(&self.stream, message, fd)
    }

    fn turn(&self) -> MutexGuard<'_, Turn> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks and waits for the answer. `bound` is how long the VMM may spend on it.
    fn ask(
        &self,
        ask: Ask,
        fd: Option<BorrowedFd<'_>>,
        bound: Duration,
    ) -> Result<(Answer, Option<OwnedFd>), GuestError> {
        let mut turn = self.turn();
        turn.last_id += 1;
        let id = turn.last_id;
        let gone = |what: String| GuestError::VmmGone(what);
        self.send(&FromClient::Request { id, ask }, fd).map_err(|error| gone(format!("its socket: {error}")))?;
        let deadline = Deadline::after(bound + ANSWER_BOUND);
        loop {
            match turn.answers.recv_timeout(deadline.left()) {
                Ok((answered, result, fd)) if answered == id => return Ok((result?, fd)),
                // The answer to a request that was given up.
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => return Err(gone(format!("no answer in {:?}", bound + ANSWER_BOUND))),
                Err(RecvTimeoutError::Disconnected) => return Err(gone("it closed its socket".into())),
            }
        }
    }

    fn done(&self, ask: Ask, bound: Duration) -> Result<(), GuestError> {
        self.done_with(ask, None, bound)
    }

    fn done_with(&self, ask: Ask, fd: Option<BorrowedFd<'_>>, bound: Duration) -> Result<(), GuestError> {
        match self.ask(ask, fd, bound)? {
            (Answer::Done, _) => Ok(()),
            (other, _) => Err(unexpected(&other)),
        }
    }

    fn dirty(&self, ask: Ask, into: &mut DirtySet) -> Result<(), GuestError> {
        match self.ask(ask, None, Duration::ZERO)? {
            (Answer::Dirty(words), _) => {
                words.into_iter().for_each(|(word, bits)| into.insert_word(RegionId(0), word as usize, bits));
                Ok(())
            }
            (other, _) => Err(unexpected(&other)),
        }
    }

    fn steps(&self, ask: Ask, bound: Duration) -> Result<Vec<u64>, GuestError> {
        match self.ask(ask, None, bound)? {
            (Answer::Steps(steps), _) => Ok(steps),
            (other, _) => Err(unexpected(&other)),
        }
    }
}

fn unexpected(answer: &Answer) -> GuestError {
    GuestError::VmmGone(format!("it answered {} to another question", answer.kind()))
}

/// The VMM's process, as far as it is this one's to end.
enum Process {
    /// Somebody else's.
    Unknown,
    Child(Child),
    /// Another page server's child, taken over.
    Adopted {
        pid: u32,
        pidfd: OwnedFd,
    },
}

impl Process {
    fn pid(&self) -> Option<u32> {
        match self {
            Self::Unknown => None,
            Self::Child(child) => Some(child.id()),
            Self::Adopted { pid, .. } => Some(*pid),
        }
    }

    /// Gives it until the deadline to end by itself, then kills it.
    fn end(&mut self, deadline: Deadline) {
        match self {
            Self::Unknown => {}
            Self::Child(child) => {
                while matches!(child.try_wait(), Ok(None)) && !deadline.expired() {
                    std::thread::sleep(Duration::from_millis(1));
                }
                let _ = child.kill();
                let _ = child.wait();
            }
            Self::Adopted { pidfd, .. } => {
                if !proof_of_death(&*pidfd, deadline).unwrap_or(false) {
                    let _ = kill_and_prove(&*pidfd, Deadline::after(EXIT_BOUND));
                }
            }
        }
    }
}

/// A guest whose VMM is a process of its own.
pub struct RemoteGuest {
    channel: Arc<Channel>,
    reader: Option<JoinHandle<()>>,
    process: Process,
    spec: GuestSpec,
    blocks: Vec<RamBlock>,
}

impl RemoteGuest {
    /// Starts `command`, which must call [`super::serve`] on its standard input, and makes the guest in it. See
    /// [`crate::kvm::KvmGuest::new`] for the rest.
    pub fn spawn(
        mut command: Command,
        spec: &GuestSpec,
        options: &KvmOptions,
        file: Arc<RamFile>,
        alias: Arc<Mapping>,
        sink: Arc<dyn PacketSink>,
    ) -> Result<Self, GuestError> {
        let failed = |doing: &str, source| GuestError::Io { doing: doing.to_owned(), source };
        let (ours, theirs) = UnixStream::pair().map_err(|error| failed("making a socket pair", error))?;
        let child = command.stdin(Stdio::from(OwnedFd::from(theirs))).spawn();
        let child = child.map_err(|error| failed("starting the VMM process", error))?;
        let mut child = child;
        match Self::connect(ours, spec, options, file, alias, sink) {
            Ok(mut guest) => {
                guest.process = Process::Child(child);
                Ok(guest)
            }
            Err(error) => {
                // Left to itself it would linger for a client that never comes back.
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }

    /// Makes the guest in the VMM at the other end of `stream`.
    pub fn connect(
        stream: UnixStream,
        spec: &GuestSpec,
        options: &KvmOptions,
        file: Arc<RamFile>,
        alias: Arc<Mapping>,
        sink: Arc<dyn PacketSink>,
    ) -> Result<Self, GuestError> {
        let mut guest = Self::over(stream, 0, spec, sink)?;
        let setup = Ask::Setup { version: VERSION, spec: spec.clone(), options: options.clone() };
        let (answer, _) = guest.channel.ask(setup, Some(file.as_fd()), Duration::ZERO)?;
        let Answer::Ready { vmm_address, .. } = answer else { return Err(unexpected(&answer)) };
        guest.hold(file, alias, vmm_address);
        Ok(guest)
    }

    /// Goes on with the guest of a VMM whose page server has died: it is stopped, or waits for a page and stops when it has that. Every
    /// packet that has not left is in `sink` when this returns, in order.
    pub fn take_over(estate: Estate, alias: Arc<Mapping>, sink: Arc<dyn PacketSink>) -> Result<Self, GuestError> {
        let Estate { stream, last_id, pid, pidfd, spec, vmm_address, ram, .. } = estate;
        let mut guest = Self::over(stream, last_id, &spec, sink)?;
        guest.process = Process::Adopted { pid, pidfd };
        guest.hold(Arc::new(ram), alias, vmm_address);
        match guest.channel.ask(Ask::Replay, None, ANSWER_BOUND) {
            Ok((Answer::Count(_), _)) => Ok(guest),
            Ok((other, _)) => Err(guest.let_go(unexpected(&other))),
            Err(error) => Err(guest.let_go(error)),
        }
    }

    /// Leaves the VMM as it is, for whoever comes next.
    fn let_go(mut self, why: GuestError) -> GuestError {
        self.process = Process::Unknown;
        why
    }

    fn over(stream: UnixStream, last_id: u64, spec: &GuestSpec, sink: Arc<dyn PacketSink>) -> Result<Self, GuestError> {
        let failed = |source| GuestError::Io { doing: "setting up the VMM's socket".into(), source };
        let (answered, answers) = bounded(16);
        let turn = Mutex::new(Turn { last_id, answers });
        stream.set_write_timeout(Some(ANSWER_BOUND)).map_err(failed)?;
        let reading = stream.try_clone().map_err(failed)?;
        let channel = Arc::new(Channel { stream, turn, writing: Mutex::new(()) });
        let room = channel.clone();
        let reader = std::thread::Builder::new()
            .name("vmm-reader".into())
            .spawn(move || read_all(&reading, &answered, &room, &*sink))
            .map_err(failed)?;
        let process = Process::Unknown;
        Ok(Self { channel, reader: Some(reader), process, spec: spec.clone(), blocks: Vec::new() })
    }

    fn hold(&mut self, file: Arc<RamFile>, alias: Arc<Mapping>, vmm_address: u64) {
        let page_size = file.page_size();
        self.blocks.push(RamBlock { id: RegionId(0), page_size, file, alias, vmm_address });
    }

    /// The VMM's process id, where this guest started or took it over.
    pub fn pid(&self) -> Option<u32> {
        self.process.pid()
    }

    /// The hand by which things are laid down for the next page server.
    pub fn keeper(&self) -> Keeper {
        Keeper::with(ByVmm(self.channel.clone()))
    }

    /// The hand by which its faults are asked for; it stays good while the guest is elsewhere.
    pub fn faults(&self) -> FaultSource {
        FaultSource { channel: self.channel.clone() }
    }

    /// Leaves the VMM to itself, as the death of this process would: it stops the guest and keeps its memory. Gives the
    /// process, where this guest started it.
    pub fn abandon(mut self) -> Option<Child> {
        match std::mem::replace(&mut self.process, Process::Unknown) {
            Process::Child(child) => Some(child),
            Process::Unknown | Process::Adopted { .. } => None,
        }
    }
}

/// Lays things down with a VMM.
struct ByVmm(Arc<Channel>);

impl Keeps for ByVmm {
    fn keep(&self, what: Kept, file: BorrowedFd<'_>) -> Result<(), GuestError> {
        self.0.done_with(Ask::Keep(what), Some(file), Duration::ZERO)
    }

    fn give_sign(&self, page: BorrowedFd<'_>, slot: usize) -> Result<bool, GuestError> {
        self.0.done_with(Ask::GiveSign { slot: slot as u64 }, Some(page), Duration::ZERO).map(|()| true)
    }
}

/// Asks a VMM for its userfaultfds.
pub struct FaultSource {
    channel: Arc<Channel>,
}

impl FaultSource {
    /// A userfaultfd over `bytes` of guest memory, made and registered by the VMM, which keeps its own duplicate (P1). Its
    /// addresses are the VMM's ([`RamBlock::vmm_address`]).
    pub fn userfaultfd(
        &self,
        features: Features,
        bytes: Range<u64>,
        faults: VmmFaults,
        write_protect: bool,
    ) -> Result<Uffd, GuestError> {
        let (offset, len) = (bytes.start, bytes.end - bytes.start);
        let ask = Ask::Userfaultfd { features: features.0, offset, len, faults, write_protect };
        match self.channel.ask(ask, None, Duration::ZERO)? {
            (Answer::Done, Some(fd)) => Uffd::from_fd(fd).map_err(|error| GuestError::Io {
                doing: "taking a userfaultfd".into(),
                source: io::Error::other(error),
            }),
            (other, _) => Err(unexpected(&other)),
        }
    }
}

/// Takes in everything the VMM sends: packets go to the sink at once; room is announced as the sink has it.
fn read_all(stream: &UnixStream, answered: &Sender<Arrived>, channel: &Channel, sink: &dyn PacketSink) {
    /// How soon a sink that has room again is noticed.
    const ROOM_POLL: rustix::time::Timespec = rustix::time::Timespec { tv_sec: 0, tv_nsec: 500_000 };
    let mut taken = 0;
    loop {
        if taken > 0 && sink.has_room() {
            if channel.send(&FromClient::Room { packets: taken }, None).is_err() {
                return;
            }
            taken = 0;
        }
        if taken > 0 {
            use rustix::event::{PollFd, PollFlags, poll};
            let ready = poll(&mut [PollFd::new(stream, PollFlags::IN)], Some(&ROOM_POLL));
            if matches!(ready, Ok(0) | Err(rustix::io::Errno::INTR)) {
                continue;
            }
        }
        match frame::receive(stream) {
            Ok(Some((FromVmm::Packet { sequence, bytes }, _))) => {
                sink.emit(Packet { sequence, bytes });
                taken += 1;
            }
            Ok(Some((FromVmm::Answer { id, result }, fd))) => {
                if answered.send((id, result.map_err(GuestError::from), fd)).is_err() {
                    return;
                }
            }
            Ok(None) | Err(_) => return,
        }
    }
}

impl Guest for RemoteGuest {
    fn pause(&mut self, deadline: Deadline) -> Result<(), GuestError> {
        let bound = deadline.left();
        self.channel.done(Ask::Pause { bound_us: bound.as_micros() as u64 }, bound)
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.channel.done(Ask::Resume, Duration::ZERO)
    }

    fn save(&mut self, out: &mut Vec<u8>) -> Result<(), GuestError> {
        match self.channel.ask(Ask::Save, None, Duration::ZERO)? {
            (Answer::State(state), _) => {
                out.extend(state);
                Ok(())
            }
            (other, _) => Err(unexpected(&other)),
        }
    }

    fn load(&mut self, state: &[u8]) -> Result<(), GuestError> {
        self.channel.done(Ask::Load(state.to_vec()), Duration::ZERO)
    }

    fn set_incarnation(&mut self, nonce: u64) -> Result<(), GuestError> {
        self.channel.done(Ask::SetIncarnation(nonce), Duration::ZERO)
    }

    fn memory(&self) -> &[RamBlock] {
        &self.blocks
    }

    fn tracker(&mut self, kind: TrackerKind) -> Result<Box<dyn DirtyTracker>, GuestError> {
        self.channel.done(Ask::Track(kind), Duration::ZERO)?;
        Ok(Box::new(RemoteTracker { channel: self.channel.clone(), kind }))
    }

    fn device_writes(&mut self, into: &mut DirtySet) -> Result<(), GuestError> {
        self.channel.dirty(Ask::DeviceWrites, into)
    }
}

impl BareGuest for RemoteGuest {
    fn spec(&self) -> &GuestSpec {
        &self.spec
    }

    fn boot(&mut self) -> Result<(), GuestError> {
        // Filling the largest guest takes its time.
        self.channel.done(Ask::Boot, Duration::from_secs(120))
    }

    fn park_at_step(&mut self, step: u64) -> Result<(), GuestError> {
        self.channel.done(Ask::Park(Some(step)), Duration::ZERO)
    }

    fn unpark(&mut self) -> Result<(), GuestError> {
        self.channel.done(Ask::Park(None), Duration::ZERO)
    }

    fn wait_parked(&mut self, deadline: Deadline) -> Result<Vec<u64>, GuestError> {
        let bound = deadline.left();
        self.channel.steps(Ask::WaitParked { bound_us: bound.as_micros() as u64 }, bound)
    }

    fn steps(&mut self) -> Result<Vec<u64>, GuestError> {
        self.channel.steps(Ask::Steps, Duration::ZERO)
    }

    fn failure(&mut self) -> Option<String> {
        match self.channel.ask(Ask::Failure, None, Duration::ZERO) {
            Ok((Answer::Failure(failure), _)) => failure,
            Ok((other, _)) => Some(unexpected(&other).to_string()),
            Err(error) => Some(error.to_string()),
        }
    }
}

impl Drop for RemoteGuest {
    fn drop(&mut self) {
        if self.process.pid().is_some() {
            // Whether or not it hears this, it is gone afterwards.
            let _ = self.channel.send(&FromClient::Request { id: u64::MAX, ask: Ask::Exit }, None);
            self.process.end(Deadline::after(EXIT_BOUND));
        }
        let _ = self.channel.stream.shutdown(std::net::Shutdown::Both);
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

struct RemoteTracker {
    channel: Arc<Channel>,
    kind: TrackerKind,
}

impl DirtyTracker for RemoteTracker {
    fn kind(&self) -> TrackerKind {
        self.kind
    }

    fn sees_device_writes(&self) -> bool {
        // The VMM has KVM's trackers only.
        false
    }

    fn start(&mut self) -> Result<(), GuestError> {
        self.channel.done(Ask::StartTracking, Duration::ZERO)
    }

    fn prepare(&mut self) -> Result<(), GuestError> {
        self.channel.done(Ask::PrepareHarvest, Duration::ZERO)
    }

    fn harvest(&mut self, into: &mut DirtySet) -> Result<(), GuestError> {
        self.channel.dirty(Ask::Harvest, into)
    }

    fn dirty_so_far(&mut self) -> Option<u64> {
        match self.channel.ask(Ask::DirtySoFar, None, Duration::ZERO) {
            Ok((Answer::Count(count), _)) => count,
            _ => None,
        }
    }
}
