//! The VMM's side: one guest, one client.

use super::{Answer, Ask, FromClient, FromVmm, PACKET_WINDOW, VERSION, VmmFaults, WireError, frame};
use crate::kvm::{BareGuest, KvmGuest};
use belay_checkpoint::dirty::DirtySet;
use belay_checkpoint::guest::{DirtyTracker, Guest, GuestError, Packet, PacketSink};
use belay_transport::region::RamFile;
use belay_transport::uffd::{Faults, Features, OpenMode, RegisterModes, Uffd};
use belay_transport::{Deadline, PAGE_SIZE};
use crossbeam_channel::{Receiver, Sender, bounded};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Why the VMM process ended other than by being asked to.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("the first request was not a setup with a RAM file")]
    NoSetup,
    #[error(
        "the client closed the socket; the guest was stopped, and kept for {lingered_s} s without anyone coming for it"
    )]
    Abandoned { lingered_s: u64 },
    #[error("the socket to the client")]
    Socket(#[from] io::Error),
}

/// Runs a VMM for the client at the other end of `stream` until it says to end. When it closes the socket instead, the guest is
/// stopped with its gate shut, and its memory and userfaultfds are kept for `linger` (for ever without one; SIGTERM ends it).
pub fn serve(stream: UnixStream, linger: Option<Duration>) -> Result<(), ServeError> {
    let outlet = Arc::new(Outlet::new(stream.try_clone()?));
    let mut vmm = Vmm::set_up(&stream, outlet.clone())?;
    let (asked, requests) = bounded(1);
    // One thread reads, so that room is heard of while a request is being worked on.
    let ended = std::thread::scope(|scope| {
        let worker = scope.spawn(|| vmm.work(requests, &outlet));
        let ended = read_requests(&stream, &outlet, asked);
        outlet.shut();
        let exit = worker.join().expect("the worker does not panic");
        if exit { Ok(()) } else { Err(ended) }
    });
    let Err(error) = ended else { return Ok(()) };
    let began = Instant::now();
    vmm.hold(linger.map(Deadline::after));
    match error.kind() {
        io::ErrorKind::InvalidData => Err(ServeError::Socket(error)),
        _ => Err(ServeError::Abandoned { lingered_s: began.elapsed().as_secs() }),
    }
}

/// Hands requests on until the socket ends or the worker has; why it ended.
fn read_requests(stream: &UnixStream, outlet: &Outlet, asked: Sender<(u64, Ask)>) -> io::Error {
    loop {
        match frame::receive(stream) {
            Ok(Some((FromClient::Room { packets }, _))) => outlet.taken(packets),
            Ok(Some((FromClient::Request { id, ask }, _))) => {
                let last = matches!(ask, Ask::Exit);
                if asked.send((id, ask)).is_err() || last {
                    return io::ErrorKind::UnexpectedEof.into();
                }
            }
            Ok(None) => return io::ErrorKind::UnexpectedEof.into(),
            Err(error) => return error,
        }
    }
}

/// The guest's way out: packets and answers share the socket, so they keep their order.
struct Outlet {
    gate: Mutex<Gate>,
    /// Packets sent that the client has not taken in yet.
    on_the_way: AtomicU64,
}

struct Gate {
    /// `None` once the gate is shut.
    stream: Option<UnixStream>,
    /// What was emitted after that: few, because without room a guest stops at its next PACE read.
    held: VecDeque<Packet>,
}

impl Outlet {
    fn new(stream: UnixStream) -> Self {
        let gate = Gate { stream: Some(stream), held: VecDeque::new() };
        Self { gate: Mutex::new(gate), on_the_way: AtomicU64::new(0) }
    }

    fn lock(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn answer(&self, id: u64, result: Result<Answer, WireError>, fd: Option<&OwnedFd>) -> io::Result<()> {
        match &self.lock().stream {
            Some(stream) => frame::send(stream, &FromVmm::Answer { id, result }, fd.map(AsFd::as_fd)),
            None => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    fn taken(&self, packets: u64) {
        // A client that takes more than was sent is wrong about what it took, but can only let its own guest run sooner.
        let subtract = |sent: u64| Some(sent.saturating_sub(packets));
        let _ = self.on_the_way.fetch_update(Ordering::SeqCst, Ordering::SeqCst, subtract);
    }

    fn shut(&self) {
        self.lock().stream = None;
    }

    fn is_shut(&self) -> bool {
        self.lock().stream.is_none()
    }
}

impl PacketSink for Outlet {
    fn emit(&self, packet: Packet) {
        let mut gate = self.lock();
        if let Some(stream) = &gate.stream {
            self.on_the_way.fetch_add(1, Ordering::SeqCst);
            let message = FromVmm::Packet { sequence: packet.sequence, bytes: packet.bytes.clone() };
            if frame::send(stream, &message, None).is_ok() {
                return;
            }
            gate.stream = None;
        }
        gate.held.push_back(packet);
    }

    fn has_room(&self) -> bool {
        self.on_the_way.load(Ordering::SeqCst) < PACKET_WINDOW && self.lock().stream.is_some()
    }
}

struct Vmm {
    guest: KvmGuest,
    tracker: Option<Box<dyn DirtyTracker>>,
    /// Kept for as long as this process lives (P1).
    uffds: Vec<Uffd>,
    dirty: DirtySet,
}

impl Vmm {
    fn set_up(stream: &UnixStream, outlet: Arc<Outlet>) -> Result<Self, ServeError> {
        let Some((FromClient::Request { id, ask: Ask::Setup { version, spec, options } }, Some(ram))) =
            frame::receive(stream)?
        else {
            return Err(ServeError::NoSetup);
        };
        let make = || {
            if version != VERSION {
                return Err(GuestError::BadState(format!("the client speaks version {version}, this VMM {VERSION}")));
            }
            let ram = RamFile::from_fd(ram).map_err(|error| GuestError::BadState(error.to_string()))?;
            let alias = ram.map().map_err(|source| GuestError::Io { doing: "mapping guest memory".into(), source })?;
            KvmGuest::new(&spec, &options, Arc::new(ram), Arc::new(alias), outlet.clone())
        };
        match make() {
            Ok(guest) => {
                let vmm_address = guest.vmm_memory().address();
                outlet.answer(id, Ok(Answer::Ready { vmm_address, tracking: options.tracking }), None)?;
                let pages = spec.memory_bytes / PAGE_SIZE as u64;
                let dirty = DirtySet::new([(guest.memory()[0].id, pages)]);
                Ok(Self { guest, tracker: None, uffds: Vec::new(), dirty })
            }
            Err(error) => {
                outlet.answer(id, Err(error.into()), None)?;
                Err(ServeError::NoSetup)
            }
        }
    }

    /// Works on requests in their order until there are no more; whether the last was to exit.
    fn work(&mut self, requests: Receiver<(u64, Ask)>, outlet: &Outlet) -> bool {
        for (id, ask) in requests {
            if matches!(ask, Ask::Exit) {
                // Whether it hears of it or not, the client wanted this.
                let _ = outlet.answer(id, Ok(Answer::Done), None);
                return true;
            }
            let mut descriptor = None;
            let result = match ask {
                Ask::WaitParked { bound_us } => self.wait_parked(bound_us, outlet),
                ask => self.answer(ask, &mut descriptor),
            };
            // If it cannot be sent, the reader finds the socket closed too.
            let _ = outlet.answer(id, result.map_err(WireError::from), descriptor.as_ref());
        }
        false
    }

    /// Waits in slices, so that a client that is gone is noticed.
    fn wait_parked(&mut self, bound_us: u64, outlet: &Outlet) -> Result<Answer, GuestError> {
        const SLICE: Duration = Duration::from_millis(100);
        let deadline = Deadline::after(Duration::from_micros(bound_us));
        loop {
            match self.guest.wait_parked(deadline.min(Deadline::after(SLICE))) {
                Err(GuestError::StopTimedOut { .. }) if !deadline.expired() && !outlet.is_shut() => {}
                Err(GuestError::StopTimedOut { running, vcpus, .. }) => {
                    return Err(GuestError::StopTimedOut { bound_ms: bound_us / 1000, running, vcpus });
                }
                waited => return waited.map(Answer::Steps),
            }
        }
    }

    fn answer(&mut self, ask: Ask, descriptor: &mut Option<OwnedFd>) -> Result<Answer, GuestError> {
        let within = |bound_us| Deadline::after(Duration::from_micros(bound_us));
        let guest = &mut self.guest;
        let done = match ask {
            Ask::Setup { .. } => return Err(GuestError::BadState("a second setup".into())),
            Ask::Boot => guest.boot(),
            Ask::Pause { bound_us } => guest.pause(within(bound_us)),
            Ask::Resume => guest.resume(),
            Ask::Save => {
                let mut state = Vec::new();
                guest.save(&mut state)?;
                return Ok(Answer::State(state));
            }
            Ask::Load(state) => guest.load(&state),
            Ask::SetIncarnation(nonce) => guest.set_incarnation(nonce),
            Ask::Track(kind) => {
                self.tracker = Some(guest.tracker(kind)?);
                Ok(())
            }
            Ask::StartTracking => self.tracker()?.start(),
            Ask::Harvest => return self.harvest(),
            Ask::DirtySoFar => return Ok(Answer::Count(self.tracker()?.dirty_so_far())),
            Ask::DeviceWrites => return self.device_writes(),
            Ask::Park(Some(step)) => guest.park_at_step(step),
            Ask::Park(None) => guest.unpark(),
            Ask::Steps => return guest.steps().map(Answer::Steps),
            Ask::Failure => return Ok(Answer::Failure(guest.failure())),
            Ask::Userfaultfd { features, offset, len, faults, write_protect } => {
                *descriptor = Some(self.userfaultfd(Features(features), offset, len, faults, write_protect)?);
                Ok(())
            }
            Ask::Exit | Ask::WaitParked { .. } => unreachable!("the loop of `work` takes these"),
        };
        done.map(|()| Answer::Done)
    }

    fn tracker(&mut self) -> Result<&mut Box<dyn DirtyTracker>, GuestError> {
        self.tracker.as_mut().ok_or_else(|| GuestError::BadState("no tracker was asked for".into()))
    }

    fn harvest(&mut self) -> Result<Answer, GuestError> {
        self.dirty.clear();
        let tracker = self.tracker.as_mut().ok_or_else(|| GuestError::BadState("no tracker was asked for".into()))?;
        tracker.harvest(&mut self.dirty)?;
        Ok(Answer::Dirty(words(&self.dirty)))
    }

    fn device_writes(&mut self) -> Result<Answer, GuestError> {
        self.dirty.clear();
        self.guest.device_writes(&mut self.dirty)?;
        Ok(Answer::Dirty(words(&self.dirty)))
    }

    fn userfaultfd(
        &mut self,
        features: Features,
        offset: u64,
        len: u64,
        faults: VmmFaults,
        write_protect: bool,
    ) -> Result<OwnedFd, GuestError> {
        let memory = self.guest.vmm_memory();
        if offset.checked_add(len).is_none_or(|end| end > memory.len() as u64) {
            let has = memory.len();
            return Err(GuestError::BadState(format!("bytes {offset}+{len} of guest memory, which has {has}")));
        }
        let failed = |error: belay_transport::uffd::UffdError| GuestError::Io {
            doing: "making a userfaultfd".into(),
            source: io::Error::other(error),
        };
        let uffd = Uffd::open(OpenMode::All, features).map_err(failed)?;
        let faults = match faults {
            VmmFaults::None => Faults::None,
            VmmFaults::Missing => Faults::Missing,
            VmmFaults::MissingAndMinor => Faults::MissingAndMinor,
        };
        uffd.register(memory.address() + offset, len, RegisterModes { faults, write_protect }).map_err(failed)?;
        let given = uffd.as_fd().try_clone_to_owned();
        let given = given.map_err(|source| GuestError::Io { doing: "duplicating a userfaultfd".into(), source })?;
        self.uffds.push(uffd);
        Ok(given)
    }

    /// Stops the guest, however long that takes, and stands by until the deadline.
    fn hold(&mut self, until: Option<Deadline>) {
        const LOOK: Duration = Duration::from_millis(200);
        loop {
            let next = until.map_or(LOOK, |until| until.left().min(LOOK));
            // A vCPU that waits for a page cannot be stopped, and does nothing either. It is asked again, so that it stops
            // should the page come.
            let stopped = self.guest.pause(Deadline::after(next)).is_ok();
            if until.is_some_and(|until| until.expired()) {
                return;
            }
            if stopped {
                std::thread::sleep(next);
            }
        }
    }
}

/// The words of a one-region set that are not zero.
fn words(dirty: &DirtySet) -> Vec<(u32, u64)> {
    let mut words: Vec<(u32, u64)> = Vec::new();
    for (_, page) in dirty.iter() {
        let (index, bit) = ((page.0 / 64) as u32, 1 << (page.0 % 64));
        match words.last_mut() {
            Some((last, bits)) if *last == index => *bits |= bit,
            _ => words.push((index, bit)),
        }
    }
    words
}
