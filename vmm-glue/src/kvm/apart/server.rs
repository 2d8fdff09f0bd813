//! The VMM's side: one guest, one client.

use super::door::{Caller, Door, Holder};
use super::outlet::Outlet;
use super::{Answer, Ask, FromClient, Kept, Ledger, VERSION, VmmFaults, WireError, door, frame, orphan};
use crate::guard::{GuardError, LifePage, SignOfLife};
use crate::kvm::{BareGuest, KvmGuest};
use belay_checkpoint::dirty::DirtySet;
use belay_checkpoint::guest::{DirtyTracker, Guest, GuestError};
use belay_transport::explain;
use belay_transport::region::RamFile;
use belay_transport::uffd::{Faults, Features, OpenMode, RegisterModes, Uffd};
use belay_transport::{Deadline, PAGE_SIZE};
use crossbeam_channel::{Receiver, Sender, bounded};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
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
/// stopped with its gate shut, and its memory and userfaultfds are kept for `linger` (for ever without one; SIGTERM ends it). With
/// `doors`, a directory, another page server can come in there meanwhile.
pub fn serve(stream: UnixStream, linger: Option<Duration>, doors: Option<&Path>) -> Result<(), ServeError> {
    let outlet = Arc::new(Outlet::new(stream.try_clone()?));
    let (mut vmm, door) = Vmm::set_up(&stream, outlet.clone(), doors)?;
    let mut stream = stream;
    loop {
        let (asked, requests) = bounded(1);
        // One thread reads, so that room is heard of while a request is being worked on.
        let left = std::thread::scope(|scope| {
            let worker = scope.spawn(|| vmm.work(requests, &outlet));
            let ended = read_requests(&stream, &outlet, asked);
            outlet.shut();
            let exit = worker.join().expect("the worker does not panic");
            if exit { None } else { Some(ended) }
        });
        let Some(error) = left else {
            vmm.stand_down();
            return Ok(());
        };
        drop(stream);
        if let Some(door) = &door {
            door.has_left();
        }
        vmm.quiet(true);
        let began = Instant::now();
        let Some(Caller { stream: next, id }) = orphan::wait(&mut vmm, door.as_ref(), linger.map(Deadline::after))
        else {
            // Not an orderly end: with this process the guest's memory goes.
            return match error.kind() {
                io::ErrorKind::InvalidData => Err(ServeError::Socket(error)),
                _ => Err(ServeError::Abandoned { lingered_s: began.elapsed().as_secs() }),
            };
        };
        vmm.quiet(false);
        outlet.admit(next.try_clone()?);
        // If it cannot be sent, the reader finds the socket closed too.
        let _ = outlet.answer(id, Ok(vmm.estate()), None);
        stream = next;
    }
}

type Asked = (u64, Ask, Option<OwnedFd>);

/// Hands requests on until the socket ends or the worker has; why it ended.
fn read_requests(stream: &UnixStream, outlet: &Outlet, asked: Sender<Asked>) -> io::Error {
    loop {
        match frame::receive(stream) {
            Ok(Some((FromClient::Room { packets }, _))) => outlet.taken(packets),
            Ok(Some((FromClient::Request { id, ask }, fd))) => {
                let last = matches!(ask, Ask::Exit);
                if asked.send((id, ask, fd)).is_err() || last {
                    return io::ErrorKind::UnexpectedEof.into();
                }
            }
            Ok(None) => return io::ErrorKind::UnexpectedEof.into(),
            Err(error) => return error,
        }
    }
}

pub(super) struct Vmm {
    guest: KvmGuest,
    tracker: Option<Box<dyn DirtyTracker>>,
    /// Kept for as long as this process lives (P1), with the offset and length of what each reports faults of.
    uffds: Vec<(Uffd, (u64, u64))>,
    /// Laid down by a page server for its successor.
    kept: Vec<(Kept, OwnedFd)>,
    /// Slots held in pages of signs of life. An earlier page server's are held on to: that one's guard would take a slot given back for
    /// an end.
    signs: Vec<SignOfLife>,
    outlet: Arc<Outlet>,
    dirty: DirtySet,
}

impl Vmm {
    fn set_up(
        stream: &UnixStream,
        outlet: Arc<Outlet>,
        doors: Option<&Path>,
    ) -> Result<(Self, Option<Door>), ServeError> {
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
            let name = door::name(door::VMM, std::process::id());
            let open = |directory| Door::open(directory, &name, Holder::of(stream)?);
            let door = doors.map(open).transpose().map_err(|source| {
                let directory = doors.unwrap_or(Path::new("")).display();
                GuestError::Io { doing: format!("opening a door for the next page server in {directory}"), source }
            })?;
            Ok((KvmGuest::new(&spec, &options, Arc::new(ram), Arc::new(alias), outlet.clone())?, door))
        };
        match make() {
            Ok((guest, door)) => {
                let vmm_address = guest.vmm_memory().address();
                outlet.answer(id, Ok(Answer::Ready { vmm_address, tracking: options.tracking }), None)?;
                let pages = spec.memory_bytes / PAGE_SIZE as u64;
                let dirty = DirtySet::new([(guest.memory()[0].id, pages)]);
                let (uffds, kept, signs) = (Vec::new(), Vec::new(), Vec::new());
                Ok((Self { guest, tracker: None, uffds, kept, signs, outlet, dirty }, door))
            }
            Err(error) => {
                outlet.answer(id, Err(error.into()), None)?;
                Err(ServeError::NoSetup)
            }
        }
    }

    /// Works on requests in their order until there are no more; whether the last was to exit.
    fn work(&mut self, requests: Receiver<Asked>, outlet: &Outlet) -> bool {
        for (id, ask, given) in requests {
            if matches!(ask, Ask::Exit) {
                // Whether it hears of it or not, the client wanted this.
                let _ = outlet.answer(id, Ok(Answer::Done), None);
                return true;
            }
            let mut descriptor = None;
            let result = match ask {
                Ask::WaitParked { bound_us } => self.wait_parked(bound_us, outlet),
                ask => self.answer(ask, given, &mut descriptor),
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

    fn answer(
        &mut self,
        ask: Ask,
        given: Option<OwnedFd>,
        descriptor: &mut Option<OwnedFd>,
    ) -> Result<Answer, GuestError> {
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
            Ask::PrepareHarvest => self.tracker()?.prepare(),
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
            Ask::Keep(what) => self.keep(what, given),
            Ask::GiveSign { slot } => self.give_sign(slot, given),
            Ask::TakeOver { .. } => Err(GuestError::BadState("this page server has the seat already".into())),
            Ask::GuestRam => {
                *descriptor = Some(duplicate(guest.memory()[0].file.as_fd())?);
                Ok(())
            }
            Ask::UserfaultfdAgain(index) => {
                let made = usize::try_from(index).ok().and_then(|index| self.uffds.get(index));
                let (uffd, _) = made.ok_or_else(|| GuestError::BadState(format!("no userfaultfd {index}")))?;
                *descriptor = Some(duplicate(uffd.as_fd())?);
                Ok(())
            }
            Ask::Kept(what) => {
                let kept = self.kept.iter().find(|(kept, _)| *kept == what);
                let (_, fd) = kept.ok_or_else(|| GuestError::BadState(format!("no {what:?} was laid down")))?;
                *descriptor = Some(duplicate(fd.as_fd())?);
                Ok(())
            }
            Ask::Replay => return Ok(Answer::Count(Some(self.outlet.replay()))),
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
        let given = duplicate(uffd.as_fd())?;
        self.uffds.push((uffd, (offset, len)));
        Ok(given)
    }

    fn keep(&mut self, what: Kept, given: Option<OwnedFd>) -> Result<(), GuestError> {
        let fd = given.ok_or_else(|| GuestError::BadState(format!("{what:?} was laid down without a descriptor")))?;
        if what == Kept::Ledger {
            let ledger = Ledger::from_fd(duplicate(fd.as_fd())?);
            self.outlet.keep_until_left(ledger.map_err(|error| GuestError::BadState(explain(&error)))?);
        }
        self.kept.retain(|(kept, _)| *kept != what);
        self.kept.push((what, fd));
        Ok(())
    }

    fn give_sign(&mut self, slot: u64, given: Option<OwnedFd>) -> Result<(), GuestError> {
        let bad = |error: GuardError| GuestError::BadState(explain(&error));
        let fd = given.ok_or_else(|| GuestError::BadState("a sign of life without its page".into()))?;
        let page = LifePage::from_fd(fd).map_err(bad)?;
        let slot = usize::try_from(slot).unwrap_or(usize::MAX);
        self.signs.push(SignOfLife::hold(Arc::new(page), slot).map_err(bad)?);
        Ok(())
    }

    /// The end of this process is no death from here on.
    fn stand_down(&mut self) {
        self.signs.drain(..).for_each(SignOfLife::stand_down);
    }

    /// Tells the guards whether this VMM has done what it must when its page server has gone.
    fn quiet(&mut self, quiet: bool) {
        if quiet {
            // The gate is shut already. Ordered, a vCPU runs nothing more from its next exit on, also one that waits for a page.
            self.halt(Deadline::after(Duration::ZERO));
        }
        self.signs.iter().for_each(|sign| sign.quiet(quiet));
    }

    fn estate(&self) -> Answer {
        Answer::Estate {
            pid: std::process::id(),
            spec: self.guest.spec().clone(),
            vmm_address: self.guest.vmm_memory().address(),
            uffds: self.uffds.iter().map(|&(_, range)| range).collect(),
            kept: self.kept.iter().map(|&(what, _)| what).collect(),
        }
    }

    /// Orders the guest to stop for good; whether it has by the deadline.
    pub(super) fn halt(&mut self, deadline: Deadline) -> bool {
        // A guest that failed by itself runs nothing more either.
        !matches!(self.guest.halt(deadline), Err(GuestError::StopTimedOut { .. }))
    }
}

fn duplicate(fd: BorrowedFd<'_>) -> Result<OwnedFd, GuestError> {
    fd.try_clone_to_owned().map_err(|source| GuestError::Io { doing: "duplicating a descriptor".into(), source })
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
