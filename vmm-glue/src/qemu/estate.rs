//! What a dead page server has left of a QEMU, and the guest in it: it stands, stopped by its leash, until it is let run.

use super::arriving::ArrivingGuest;
use super::disks::Disks;
use super::keeping::QEMU;
use super::leash::{Answer, Ask, Holding, Leash, Line, What};
use super::machine::{Machine, failed};
use super::process::Process;
use super::qmp::Qmp;
use super::wire::Wire;
use crate::kvm::apart::{DoorError, Keeper, Kept, Waiting, take_keepers_seat, waiting_of};
use crate::migrate::destination::{DestinationError, Found, Inherited, Ram, shard_ranges};
use belay_checkpoint::dirty::DirtySet;
use belay_checkpoint::guest::{DirtyTracker, Guest, GuestError, RamBlock, TrackerKind};
use belay_transport::region::RamFile;
use belay_transport::uffd::Uffd;
use belay_transport::{Deadline, RegionId};
use rustix::process::{Signal, pidfd_send_signal};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// For a QEMU that goes on after it was stopped to answer.
const AWAKE: Duration = Duration::from_secs(10);

/// The QEMUs that wait in `directory` for a page server, by process number.
pub fn waiting(directory: &Path) -> io::Result<Vec<Waiting>> {
    waiting_of(directory, QEMU)
}

/// What there is to be taken over. Dropped, it is as it was before.
pub struct QemuEstate {
    line: Arc<Line>,
    holding: Holding,
    process: Process,
    ram: Vec<Arc<RamFile>>,
    uffds: Vec<Uffd>,
    kept: Vec<(Kept, OwnedFd)>,
}

/// A QEMU whose leash is this page server's now.
pub(super) struct Adopted {
    pub guest: Box<dyn Guest>,
    pub keeper: Keeper,
    pub leash: Leash,
    pub holding: Holding,
}

impl QemuEstate {
    /// Takes the seat at `door`, waiting until `deadline` for a predecessor that is still being torn down, and fetches everything it left.
    pub fn enter(door: &Path, deadline: Deadline) -> Result<Self, DoorError> {
        let line = Line::over(take_keepers_seat(door, deadline)?).map_err(DoorError::Socket)?;
        let (holding, all) = match line.ask(&Ask::Describe, None).map_err(DoorError::Socket)? {
            (Answer::Described { holding, kept }, _) => (holding, kept),
            _ => return Err(DoorError::Unexpected { got: "something else", wanted: "Described" }),
        };
        let give = |what| match line.ask(&Ask::Give(what), None).map_err(DoorError::Socket)? {
            (_, Some(fd)) => Ok(fd),
            _ => Err(DoorError::Unexpected { got: "something else", wanted: "a descriptor" }),
        };
        let process = Process::of(holding.pid, give(What::Process)?)
            .ok_or(DoorError::Unexpected { got: "no process number", wanted: "QEMU's" })?;
        let (mut ram, mut uffds, mut kept) = (Vec::new(), Vec::new(), Vec::new());
        for index in 0..=u16::MAX {
            if !all.contains(&What::Ram(index)) {
                break;
            }
            ram.push(Arc::new(RamFile::from_fd(give(What::Ram(index))?).map_err(DoorError::Ram)?));
        }
        for index in 0..=u16::MAX {
            if !all.contains(&What::Userfaultfd(index)) {
                break;
            }
            uffds.push(Uffd::from_fd(give(What::Userfaultfd(index))?).map_err(DoorError::Uffd)?);
        }
        for what in [Kept::PageStates, Kept::Will, Kept::Ledger, Kept::Guard] {
            if all.contains(&What::Kept(what)) {
                kept.push((what, give(What::Kept(what))?));
            }
        }
        Ok(Self { line, holding, process, ram, uffds, kept })
    }

    fn take(&mut self, what: Kept) -> Option<OwnedFd> {
        let at = self.kept.iter().position(|(kept, _)| *kept == what)?;
        Some(self.kept.swap_remove(at).1)
    }

    /// Reads what was left, and checks whether it fits together.
    pub fn inherited(&mut self) -> Result<Inherited, DestinationError> {
        let map = |(index, file): (usize, &Arc<RamFile>)| {
            let alias = Arc::new(file.map()?);
            Ok(Ram { id: RegionId(index as u16), file: Arc::clone(file), alias })
        };
        let ram = self.ram.iter().enumerate().map(map).collect::<io::Result<_>>();
        let found = Found {
            will: self.take(Kept::Will),
            states: self.take(Kept::PageStates),
            ledger: self.take(Kept::Ledger),
            guard: self.take(Kept::Guard),
            ram: ram.map_err(|source| DestinationError::Io { doing: "map guest RAM", source })?,
            addresses: self.holding.addresses.clone(),
            pid: self.holding.pid,
        };
        Inherited::read(found, |proposal, ram| {
            let parts = shard_ranges(ram, proposal.shards);
            if parts.len() != self.uffds.len() {
                return Err(DestinationError::Refused(format!(
                    "{} userfaultfds were left for {} shards",
                    self.uffds.len(),
                    parts.len()
                )));
            }
            self.uffds.iter().zip(parts).map(|(uffd, part)| Ok((uffd.try_clone()?, part))).collect()
        })
    }

    /// Goes on with it, over `ram`.
    pub(super) fn adopt(self, ram: &[Ram], wire: Wire) -> Adopted {
        let Self { line, holding, process, .. } = self;
        let block = |(ram, &vmm_address): (&Ram, &u64)| RamBlock {
            id: ram.id,
            page_size: ram.file.page_size(),
            file: Arc::clone(&ram.file),
            alias: Arc::clone(&ram.alias),
            vmm_address,
        };
        let blocks = ram.iter().zip(&holding.addresses).map(block).collect();
        let (leash, monitor) = (Leash::taken(line), holding.monitor.clone());
        let guest = Box::new(LeftGuest { asleep: Some((process, monitor)), awake: None, blocks, wire });
        Adopted { guest, keeper: leash.keeper(), leash, holding }
    }
}

/// The guest in a QEMU that its leash has stopped (SIGSTOP). It stands, whatever state QEMU itself thinks it is in: so it needs not be paused, and
/// answers nothing, until it is to run.
struct LeftGuest {
    asleep: Option<(Process, PathBuf)>,
    awake: Option<ArrivingGuest>,
    blocks: Vec<RamBlock>,
    wire: Wire,
}

impl LeftGuest {
    fn awake(&mut self, call: &'static str) -> Result<&mut ArrivingGuest, GuestError> {
        self.awake.as_mut().ok_or(GuestError::WrongState { call, state: "stopped by its leash", wanted: "running" })
    }
}

impl Guest for LeftGuest {
    fn pause(&mut self, deadline: Deadline) -> Result<(), GuestError> {
        self.awake.as_mut().map_or(Ok(()), |guest| guest.pause(deadline))
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        if let Some((process, monitor)) = self.asleep.take() {
            pidfd_send_signal(process.pidfd(), Signal::CONT)
                .map_err(|errno| GuestError::VmmGone(format!("it cannot be let go on: {errno}")))?;
            let qmp = Qmp::connect(&monitor, Deadline::after(AWAKE))
                .map_err(|error| failed("reach QEMU")(io::Error::other(error)))?;
            // The dead page server may have left it in a checkpoint's pause. A guest with a relay is not left to anybody.
            let machine = Machine::new(qmp, process);
            self.awake =
                Some(ArrivingGuest::new(machine, self.blocks.clone(), self.wire.clone(), Disks::default(), true));
        }
        self.awake("resume")?.resume()
    }

    fn save(&mut self, out: &mut Vec<u8>) -> Result<(), GuestError> {
        self.awake("save")?.save(out)
    }

    fn load(&mut self, _state: &[u8]) -> Result<(), GuestError> {
        Err(GuestError::WrongState { call: "load", state: "a guest's already", wanted: "without a guest" })
    }

    fn set_incarnation(&mut self, _nonce: u64) -> Result<(), GuestError> {
        // Nothing of QEMU's machine tells a guest.
        Ok(())
    }

    fn memory(&self) -> &[RamBlock] {
        &self.blocks
    }

    fn tracker(&mut self, kind: TrackerKind) -> Result<Box<dyn DirtyTracker>, GuestError> {
        self.awake("track")?.tracker(kind)
    }

    fn parks_itself(&self) -> bool {
        false
    }

    fn device_writes(&mut self, _into: &mut DirtySet) -> Result<(), GuestError> {
        // What QEMU's threads write goes through the mapping that is tracked.
        Ok(())
    }
}
