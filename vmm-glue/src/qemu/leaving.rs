//! A guest in a QEMU of this host, on its way to another one; and back, if it is caught: then it goes on in the standby.
//!
//! ```text
//! the running QEMU   running ── stop, stream out ──► left, and stands ── taken back ──► running
//!                                                      └──────── caught: ended ──► ∅
//! the standby        waiting for a guest ──────────────── stream in, go on ──────► running
//! ```
//! Both map the same files of RAM. Only one of them ever runs: the first is ended before the second is let go, and its process stands from when
//! its guest has left: whoever else has a monitor of it (libvirt) could have it run on.

use super::disks::Disks;
use super::inspect::{InspectError, Inspection};
use super::launch::{Launch, Launched};
use super::machine::{Machine, failed};
use super::memory::{block, file_of, in_order, path_of};
use super::process::{Process, ProcessError};
use super::qmp::{Qmp, QmpError};
use super::relay::Hand;
use super::spec::QemuSpec;
use super::standby::{self, StandbyError};
use super::state::{State, begin_stream, behind_the_prefix, first_header, prefix_bytes};
use super::wire::Wire;
use crate::guard::GuardCommand;
use belay_checkpoint::dirty::DirtySet;
use belay_checkpoint::guest::{DirtyTracker, Guest, GuestError, PacketSink, RamBlock, TrackerKind};
use belay_checkpoint::storage::Storage;
use belay_transport::{Deadline, RegionId};
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// For all questions together, and for a QEMU that is started.
const BOUND: Duration = Duration::from_secs(30);

/// Between two tries to start a standby in place of one that has ended.
const STANDBY_AGAIN: Duration = Duration::from_secs(5);

/// Why a running QEMU's guest cannot be moved as it is.
#[derive(Debug, thiserror::Error)]
pub enum LeavingError {
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error(transparent)]
    Inspect(#[from] InspectError),
    #[error(transparent)]
    Guest(#[from] GuestError),
    #[error("no standby can be made of this QEMU's command line")]
    Standby(#[from] StandbyError),
    #[error("the standby is not like the running QEMU: {0}")]
    Unlike(String),
}

/// A QEMU that was looked at.
pub struct Found {
    pub machine: Machine,
    pub guest: Inspection,
}

impl Found {
    /// Connects to the monitor at `socket`, of process `pid` if the socket does not tell. Nothing is changed.
    pub fn at(socket: &Path, pid: Option<u32>) -> Result<Self, LeavingError> {
        let deadline = Deadline::after(BOUND);
        let mut qmp = Qmp::connect(socket, Deadline::after(Duration::from_secs(2)))?;
        let process = Process::behind(&qmp, pid)?;
        let guest = Inspection::of(&mut qmp, &process, deadline)?;
        Ok(Self { machine: Machine::new(qmp, process), guest })
    }
}

/// The relay through which the guest's network goes.
pub struct Relayed {
    /// Where it is taken in hand.
    pub path: PathBuf,
    /// Where the guest's frames go then.
    pub sink: Arc<dyn PacketSink>,
    /// Waits until all that came there has left.
    pub drained: Box<dyn Fn() + Send>,
}

/// How the standby is started.
#[derive(Debug, Clone)]
pub struct StandbyPlan {
    /// Program and arguments, where they are not to be those of the running one.
    pub command: Option<Vec<OsString>>,
    /// For its monitor and its log.
    pub directory: PathBuf,
    pub leash: GuardCommand,
}

struct Standby {
    launched: Launched,
    machine: Machine,
    /// By which the first device is known in a stream.
    header: Vec<u8>,
}

/// What a standby is started from.
struct Spare {
    plan: StandbyPlan,
    guest: Inspection,
    header: Vec<u8>,
    /// Not before, after one that could not be started.
    after: Option<Deadline>,
}

/// See the module.
pub struct LeavingGuest {
    machine: Machine,
    blocks: Vec<RamBlock>,
    standby: Option<Standby>,
    /// What another one is made of, should this one end.
    spare: Option<Spare>,
    relayed: Option<Relayed>,
    wire: Wire,
    /// Taken in hand already; they stay with the guest until it has left.
    disks: Disks,
    paused: bool,
    /// What stood before the devices when it left.
    prefix: Option<Vec<u8>>,
    /// The standby has the guest.
    caught: bool,
}

impl LeavingGuest {
    /// Takes hold of the guest's memory, and starts the standby if there is to be one. The guest runs on, but for a stop of about a millisecond
    /// in which it is seen how its devices begin.
    pub fn prepare(
        found: Found,
        plan: Option<&StandbyPlan>,
        network: Option<(Relayed, Wire)>,
    ) -> Result<Self, LeavingError> {
        let (relayed, wire) = network.map_or_else(Default::default, |(relayed, wire)| (Some(relayed), wire));
        let Found { mut machine, guest } = found;
        let mut blocks = Vec::new();
        for (index, ram) in in_order(&guest.ram).into_iter().enumerate() {
            let file = Arc::new(file_of(&machine.process, ram)?);
            let alias = Arc::new(file.map().map_err(failed("map guest RAM"))?);
            blocks.push(block(RegionId(index as u16), ram, file, alias, &machine.process)?);
        }
        let spare = plan.map(|plan| Spare::new(plan, &mut machine, guest)).transpose()?;
        let standby = spare.as_ref().map(|spare| spare.start(&machine.process)).transpose()?;
        Ok(Self {
            machine,
            blocks,
            standby,
            spare,
            relayed,
            wire,
            disks: Disks::default(),
            paused: false,
            prefix: None,
            caught: false,
        })
    }

    /// With its writable disks, in hand.
    pub fn with_disks(mut self, disks: Disks) -> Self {
        self.disks = disks;
        self
    }

    /// The process that runs the guest, or has.
    pub fn process(&self) -> &Process {
        &self.machine.process
    }

    /// The standby's process and monitor.
    pub fn standby(&self) -> Option<(&Process, PathBuf)> {
        self.standby.as_ref().map(|standby| (&standby.machine.process, standby.launched.monitor()))
    }

    /// Starts another standby where the one that waited has ended: what is there of the guest is not its own.
    fn replace_standby(&mut self) -> Option<Result<String, GuestError>> {
        let ended = self.standby.as_ref().is_none_or(|standby| standby.machine.process.has_ended());
        let spare = self.spare.as_mut().filter(|_| ended && !self.caught)?;
        if spare.after.is_some_and(|after| !after.expired()) {
            return None;
        }
        // Its directory is the next one's.
        let before = self.standby.take().map(|standby| standby.machine.process.number());
        let name = before.map_or("the one before".to_owned(), |pid| format!("process {pid}"));
        spare.after = Some(Deadline::after(STANDBY_AGAIN));
        Some(match spare.start(&self.machine.process) {
            Ok(standby) => {
                let (now, monitor) = (standby.machine.process.number(), standby.launched.monitor());
                self.standby = Some(standby);
                Ok(format!(
                    "the standby, {name}, has ended; process {now} waits in its place, its monitor is {}",
                    monitor.display()
                ))
            }
            Err(error) => {
                let what = format!("start another standby in place of {name}, which has ended");
                Err(failed(&what)(io::Error::other(error)))
            }
        })
    }

    fn let_go_of(&self, relayed: &Relayed) -> Result<(), GuestError> {
        let done = self.wire.let_go(Deadline::after(BOUND), &relayed.drained);
        done.map_err(|error| failed("let go of the guest's relay")(io::Error::other(error)))
    }

    /// The guest is this host's own again: its disks and its network need nobody any more.
    pub fn let_go_of_relays(&self) -> Result<(), GuestError> {
        self.disks.let_go()?;
        self.relayed.as_ref().map_or(Ok(()), |relayed| self.let_go_of(relayed))
    }

    /// After a catch: the standby is the guest's QEMU, and goes on whatever becomes of belay. Its process and monitor; `None` where nothing was
    /// loaded into one.
    pub fn leave_caught(mut self) -> Option<(u32, PathBuf)> {
        let standby = self.standby.take().filter(|_| self.caught)?;
        let monitor = standby.launched.monitor();
        standby.launched.leave();
        Some((standby.machine.process.number(), monitor))
    }

    /// After a release: what is here of the guest is of no use, and must never run.
    pub fn end_released(mut self) -> Result<(), GuestError> {
        self.machine.kill()?;
        // Nobody is behind its relays any more: they are as they were before a guest came.
        self.let_go_of_relays()
    }
}

impl Spare {
    fn new(plan: &StandbyPlan, running: &mut Machine, guest: Inspection) -> Result<Self, LeavingError> {
        let mut devices = Vec::new();
        running.save_devices(&mut devices)?;
        let header = first_header(&devices)?.to_vec();
        Ok(Self { plan: plan.clone(), guest, header, after: None })
    }

    /// Starts one, over the memory of the process that runs the guest or has.
    fn start(&self, running: &Process) -> Result<Standby, LeavingError> {
        let Self { plan, guest, header, .. } = self;
        let (program, arguments) = match &plan.command {
            Some(command) => {
                let (program, arguments) = command.split_first().ok_or(StandbyError::Empty)?;
                (program.clone(), arguments.to_vec())
            }
            None => {
                let arguments = standby::arguments(&running.command_line()?, &elsewhere(running, guest)?)?;
                (running.executable()?.into(), arguments.into_iter().map(OsString::from).collect())
            }
        };
        let (directory, leash) = (plan.directory.clone(), plan.leash.clone());
        let working_directory = Some(running.working_directory()?);
        let deadline = Deadline::after(BOUND);
        let launch = Launch { program, arguments, working_directory, directory, leash };
        let (launched, mut machine) = launch.start(deadline)?;
        let there = Inspection::of(&mut machine.qmp, &machine.process, deadline)?;
        expect_alike(guest, &there)?;
        machine.prepare_stream()?;
        Ok(Standby { launched, machine, header: header.clone() })
    }
}

/// Backends whose files have no path any more, or another's.
fn elsewhere(process: &Process, guest: &Inspection) -> Result<standby::Elsewhere, LeavingError> {
    use std::os::unix::fs::MetadataExt;
    let mut found = Vec::new();
    for ram in &guest.ram {
        let open = path_of(process, ram)?;
        let identity = |path: &Path| std::fs::metadata(path).map(|file| (file.dev(), file.ino())).ok();
        let named = ram.path.as_deref().map(Path::new).and_then(identity);
        if named.is_none() || named != identity(&open) {
            found.push((ram.id.clone(), open));
        }
    }
    Ok(found)
}

/// Whether what one saves the other can load, over the same memory.
fn expect_alike(running: &Inspection, standby: &Inspection) -> Result<(), LeavingError> {
    if let Some(why) = QemuSpec::of(running).differs(&QemuSpec::of(standby), true) {
        return Err(LeavingError::Unlike(why));
    }
    for (one, other) in in_order(&running.ram).into_iter().zip(in_order(&standby.ram)) {
        let file = |ram: &super::inspect::Ram| ram.mapping.as_ref().map(|mapping| mapping.file);
        if file(one) != file(other) || file(one).is_none() {
            return Err(LeavingError::Unlike(format!("RAM {} is of another file", one.id)));
        }
    }
    let kinds = |guest: &Inspection| {
        let mut kinds: Vec<String> = guest.devices.iter().map(|(kind, _)| kind.clone()).collect();
        kinds.sort();
        kinds
    };
    let (one, mut other) = (kinds(running), kinds(standby));
    for kind in one {
        match other.iter().position(|there| *there == kind) {
            Some(at) => drop(other.remove(at)),
            None => {
                let why = format!("it lacks a {kind}, which was plugged in after the start");
                return Err(LeavingError::Unlike(why));
            }
        }
    }
    match other.first() {
        Some(kind) => Err(LeavingError::Unlike(format!("it has a {kind}, which the running one was unplugged from"))),
        None => Ok(()),
    }
}

impl Guest for LeavingGuest {
    fn pause(&mut self, deadline: Deadline) -> Result<(), GuestError> {
        if !self.paused {
            // Not before it must be: a belay that dies with the relay in hand leaves it shut, and until here the guest is at home.
            if let Some(relayed) = self.relayed.as_ref().filter(|_| !self.wire.is_held()) {
                let hand = Hand::attach(&relayed.path, Arc::clone(&relayed.sink), self.wire.next_output(), deadline);
                self.wire
                    .take(hand.map_err(|error| failed("take the guest's relay in hand")(io::Error::other(error)))?);
            }
            self.machine.stop_to_leave(deadline)?;
            self.paused = true;
            self.wire.settle()?;
            self.disks.away()?;
            if self.standby.is_none() {
                // Nothing can catch it: from `go` on its disks are the destination's.
                self.disks.give_up()?;
            }
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        match &mut self.standby {
            Some(standby) if self.caught => {
                // One of the two may run, and this is where the other can no more.
                self.machine.kill()?;
                self.disks.back(standby.machine.process.number())?;
                standby.machine.go_on()?;
            }
            _ => {
                self.machine.stand_still(false)?;
                // Also where it never stood: it was told of a switch before it was to stop.
                self.machine.forget_the_switch()?;
                if self.paused {
                    self.disks.keep()?;
                    self.disks.back(self.machine.process.number())?;
                    self.machine.go_on()?;
                }
                self.prefix = None;
            }
        }
        self.paused = false;
        self.wire.go()?;
        if let Some(relayed) = self.relayed.as_ref().filter(|_| !self.caught) {
            self.let_go_of(relayed)?;
        }
        Ok(())
    }

    fn save(&mut self, out: &mut Vec<u8>) -> Result<(), GuestError> {
        begin_stream(out, self.wire.next_output());
        let at = out.len();
        self.machine.stream_out(out)?;
        let stream = &out[at..];
        // Now is the time to find that a catch would fail.
        let prefix = self.standby.as_ref().map_or(Ok(0), |standby| prefix_bytes(stream, &standby.header))?;
        self.prefix = Some(stream[..prefix].to_vec());
        self.machine.stand_still(true)
    }

    fn load(&mut self, state: &[u8]) -> Result<(), GuestError> {
        let none = || GuestError::Unsupported("no standby was started to load a guest into".to_owned());
        if let Some(spare) = &mut self.spare {
            spare.after = None;
        }
        if let Some(Err(error)) = self.replace_standby() {
            return Err(error);
        }
        let standby = self.standby.as_mut().ok_or_else(none)?;
        let (state, next_output) = State::read(state)?;
        let loaded = match state {
            State::Stream(stream) => standby.machine.stream_in(&[stream]),
            State::Devices(devices) => {
                let prefix = self.prefix.as_ref().ok_or_else(none)?;
                standby.machine.stream_in(&[prefix, behind_the_prefix(devices)])
            }
        };
        if let Err(error) = loaded {
            // It has been told to take a guest and takes no second one: the next try is another's.
            self.standby = None;
            return Err(error);
        }
        self.wire.count_from(next_output);
        self.caught = true;
        Ok(())
    }

    fn set_incarnation(&mut self, _nonce: u64) -> Result<(), GuestError> {
        // Nothing of QEMU's machine tells a guest.
        Ok(())
    }

    fn memory(&self) -> &[RamBlock] {
        &self.blocks
    }

    fn tracker(&mut self, kind: TrackerKind) -> Result<Box<dyn DirtyTracker>, GuestError> {
        Err(GuestError::NoTracker { kind, reason: "nothing is tracked at a source".to_owned() })
    }

    fn tend(&mut self) -> Option<Result<String, GuestError>> {
        self.replace_standby()
    }

    fn storage(&self) -> Option<Arc<dyn Storage>> {
        self.disks.storage()
    }

    fn device_writes(&mut self, _into: &mut DirtySet) -> Result<(), GuestError> {
        Ok(())
    }
}
