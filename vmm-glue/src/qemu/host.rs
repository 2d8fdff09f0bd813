//! A host that takes QEMU guests: it starts a QEMU, or finds one that was started, and has its page faults served from here.

use super::arriving::ArrivingGuest;
use super::disk;
use super::disks::Disks;
use super::estate::{Adopted, QemuEstate};
use super::inject::userfaultfds;
use super::inspect::Inspection;
use super::judge::{Against, HeldBy, objections};
use super::launch::{Launch, Launched};
use super::leash::{Holding, Leash};
use super::machine::Machine;
use super::memory::{block, expect_untouched, file_of, in_order};
use super::process::Process;
use super::qmp::Qmp;
use super::relay::Hand;
use super::spec::{QemuDisk, QemuSpec, disks_differ};
use super::tap::{self, Gate};
use super::wire::{LetGoError, Wire};
use crate::guard::{GuardCommand, GuardError, LifePage};
use crate::kvm::apart::Keeper;
use crate::kvm::registration::features;
use crate::migrate::destination::{Built, Host, HostRam, Ram, VMM_SLOT, shard_ranges};
use crate::migrate::observation::{Kind, Observer};
use crate::migrate::settings::VmmSpec;
use belay_checkpoint::guest::{Guest, GuestError, PacketSink, RamBlock, TrackerKind};
use belay_checkpoint::outbox::Emitter;
use belay_checkpoint::storage::Storage;
use belay_checkpoint::tracker::write_protection;
use belay_transport::Deadline;
use belay_transport::uffd::{Faults, Features, RegisterModes, Uffd};
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// For a QEMU to start, and for all questions together.
const BOUND: Duration = Duration::from_secs(30);
/// For one that was started to greet: another client may have it.
const GREETING: Duration = Duration::from_secs(2);
/// For its main thread to make userfaultfds.
const INJECTION: Duration = Duration::from_secs(5);
/// For a relay to be taken in hand, or let go of.
const HAND: Duration = Duration::from_secs(5);
/// For what a guest wrote to reach its images, once they are this host's.
const DISKS: Duration = Duration::from_secs(30);

/// Which QEMU takes the guest.
#[derive(Debug, Clone)]
pub enum Taker {
    /// One that is started for it.
    Start(Launch),
    /// One that was started with `-incoming defer -S`.
    Attach { socket: PathBuf, pid: Option<u32> },
}

/// What ends the QEMU if the guest does not become its own.
enum Held {
    Started(Launched),
    Attached {
        leash: Leash,
        monitor: PathBuf,
    },
    /// By another page server, which died.
    Left {
        leash: Leash,
        holding: Holding,
    },
}

/// See the module.
pub struct QemuHost {
    taker: Taker,
    guard: GuardCommand,
    leash: GuardCommand,
    /// Where the guest's relay is taken in hand.
    relay: Option<PathBuf>,
    /// Taps of the guest's, to be shut while it is tethered.
    taps: Vec<String>,
    wire: Wire,
    /// Where the guest's disk relays are taken in hand.
    disk_relays: Vec<PathBuf>,
    disks: Disks,
    /// Started before its guest came, with RAM that is allocated.
    ready: Option<(Machine, Vec<(String, HostRam)>)>,
    /// A guest has come for it: one that belay was told to attach to is its operator's until then.
    asked_for: bool,
    /// Waiting, and looked at.
    waiting: Option<(Machine, Inspection)>,
    held: Option<(u32, Held)>,
    /// Where and for how long a QEMU waits for the next page server if this one dies; not at all without.
    lingers: Option<Lingers>,
    /// To be gone on with.
    estate: Option<QemuEstate>,
}

/// How long a QEMU is kept whose page server has died.
#[derive(Debug, Clone)]
pub struct Lingers {
    /// Of its door.
    pub directory: PathBuf,
    pub linger: Duration,
}

fn failed(doing: &'static str) -> impl FnOnce(Box<dyn std::error::Error + Send + Sync>) -> GuestError {
    move |source| GuestError::Io { doing: doing.to_owned(), source: io::Error::other(source) }
}

impl QemuHost {
    /// A host whose guard and leashes are started by these commands, and whose guest's network goes through the relay that is taken in hand
    /// at `relay`, if it has any, and its writable disks through those at `disk_relays`.
    pub fn new(
        taker: Taker,
        guard: GuardCommand,
        leash: GuardCommand,
        relay: Option<PathBuf>,
        disk_relays: Vec<PathBuf>,
    ) -> Self {
        let (wire, disks) = (Wire::new(), Disks::default());
        let (ready, waiting, held, lingers, estate, taps) = (None, None, None, None, None, Vec::new());
        Self {
            taker,
            guard,
            leash,
            relay,
            taps,
            wire,
            disk_relays,
            disks,
            ready,
            asked_for: false,
            waiting,
            held,
            lingers,
            estate,
        }
    }

    /// A tethered guest's network goes through these taps of the QEMU here, before which gates are put; it has no relay.
    pub fn gate_before(&mut self, taps: Vec<String>) {
        self.taps = taps;
    }

    /// Starts or finds the QEMU and allocates its RAM before its guest comes, so that the guest need not wait for that; what is wrong with it
    /// is found now.
    pub fn make_ready(&mut self, observer: &Observer) -> Result<(), GuestError> {
        let mut machine = self.start()?;
        let guest = self.look(&mut machine, false)?;
        let mut ready = Vec::new();
        for ram in &guest.ram {
            let ready_ram = HostRam::made_ready(Arc::new(file_of(&machine.process, ram)?), observer);
            ready.push((ram.id.clone(), ready_ram.map_err(|error| failed("allocate QEMU's RAM")(error.into()))?));
        }
        self.ready = Some((machine, ready));
        observer.note(None, Kind::VmmReady { pid: guest.pid });
        for tap in &self.taps {
            observer.note(None, Kind::TapGated { tap: tap.clone() });
        }
        Ok(())
    }

    /// Should this page server die, the QEMU of a tethered guest waits for the next. A guest with a relay cannot be gone on with: what its relay
    /// had given the dead one is lost.
    pub fn keep_for_the_next(&mut self, lingers: Lingers) {
        self.lingers = Some(lingers);
    }

    /// Goes on with the QEMU of `estate`.
    pub fn adopt_from(&mut self, estate: QemuEstate) {
        self.estate = Some(estate);
    }

    /// Lays down what the next page server needs of this QEMU, if it is to be kept for one.
    fn lay_down(&self, process: &Process, blocks: &[RamBlock], shards: &Shards) -> Result<Option<Keeper>, GuestError> {
        let Some((pid, held)) = &self.held else { return Ok(None) };
        let (leash, monitor, made) = match held {
            Held::Started(launched) => (launched.leash(), launched.monitor(), Some(launched.directory.clone())),
            Held::Attached { leash, monitor } => (Some(leash), monitor.clone(), None),
            Held::Left { .. } => (None, PathBuf::new(), None),
        };
        let Some(leash) = leash else { return Ok(None) };
        if let (Some(lingers), None, true, true) =
            (&self.lingers, &self.relay, self.taps.is_empty(), self.disk_relays.is_empty())
        {
            let addresses = blocks.iter().map(|block| block.vmm_address).collect();
            let Lingers { directory, linger } = lingers.clone();
            let holding = Holding { pid: *pid, monitor, made, addresses, doors: directory, linger };
            let files = blocks.iter().map(|block| block.file.as_fd());
            leash.hold(holding, process, files, shards.iter().map(|(uffd, _)| uffd.as_fd()))?;
        }
        Ok(Some(leash.keeper()))
    }

    /// The guest is this host's own: its QEMU goes on whatever becomes of belay. Its process, and its monitor
    /// where belay made it.
    pub fn leave(&mut self) -> Option<(u32, Option<PathBuf>)> {
        let (pid, held) = self.held.take()?;
        let monitor = match held {
            Held::Started(launched) => {
                let monitor = launched.monitor();
                launched.leave();
                Some(monitor)
            }
            Held::Attached { leash, .. } => {
                leash.let_go();
                None
            }
            Held::Left { leash, holding } => {
                leash.let_go();
                holding.made.is_some().then_some(holding.monitor)
            }
        };
        Some((pid, monitor))
    }

    /// The guest is this host's own: its network needs nobody any more. `drained` waits until all that it had sent has left.
    pub fn let_go_of_network(&self, drained: impl FnOnce()) -> Result<(), LetGoError> {
        self.wire.let_go(Deadline::after(HAND), drained)
    }

    /// The guest is this host's own: so are its disks. What could not be done when it became that is tried again.
    pub fn own_disks(&self) -> Result<(), GuestError> {
        self.disks.own(Deadline::after(DISKS))?;
        self.disks.let_go()
    }

    /// Looks at a QEMU in which a guest is to run, and for what is in the way of that.
    fn look(&self, machine: &mut Machine, tethered: bool) -> Result<Inspection, GuestError> {
        let deadline = Deadline::after(BOUND);
        for name in &self.taps {
            let looked = tap::is_of(machine.process.number(), name);
            looked.map_err(|error| failed("find the guest's tap")(error.into()))?;
        }
        let guest = Inspection::of(&mut machine.qmp, &machine.process, deadline);
        let mut guest = guest.map_err(|error| failed("look at QEMU")(error.into()))?;
        if guest.status != "inmigrate" {
            let why = format!("QEMU here is in the state {}; start it with -incoming defer", guest.status);
            return Err(GuestError::Unsupported(why));
        }
        // What a guest would be in that runs in there.
        guest.status = "running".to_owned();
        let served: Result<Vec<_>, _> = self
            .disk_relays
            .iter()
            .map(|path| disk::look(path, Deadline::after(HAND)).map(|known| known.socket))
            .collect();
        let served = served.map_err(|error| failed("look at the guest's disk relays")(error.into()))?;
        let against = |against| against == Against::Moving || tethered;
        if let Some(objection) =
            objections(&guest, Ok(()), self.held_by(), &served).into_iter().find(|objection| against(objection.against))
        {
            let why = format!("QEMU here, {}: {}. {}", objection.what, objection.why, objection.change);
            return Err(GuestError::Unsupported(why.trim_end_matches([' ', '.']).to_owned()));
        }
        Ok(guest)
    }

    /// The disks whose relays there are here.
    fn disks_here(&self) -> Result<Vec<QemuDisk>, GuestError> {
        let one = |path: &PathBuf| disk::look(path, Deadline::after(HAND)).map(|known| QemuDisk::of(&known));
        let known: Result<Vec<_>, _> = self.disk_relays.iter().map(one).collect();
        known.map_err(|error| failed("look at the guest's disk relays")(error.into()))
    }

    /// What holds a tethered guest's packets.
    fn held_by(&self) -> HeldBy {
        match (&self.relay, self.taps.len()) {
            (Some(_), _) => HeldBy::Relay,
            (None, 0) => HeldBy::Nobody,
            (None, taps) => HeldBy::Gates(taps),
        }
    }

    fn start(&mut self) -> Result<Machine, GuestError> {
        // One that has ended while it waited has left its directory.
        self.held = None;
        let deadline = Deadline::after(BOUND);
        match &self.taker {
            Taker::Start(launch) => {
                let (launched, machine) = launch.start(deadline)?;
                self.held = Some((machine.process.number(), Held::Started(launched)));
                Ok(machine)
            }
            Taker::Attach { socket, pid } => {
                let qmp = Qmp::connect(socket, Deadline::after(GREETING))
                    .map_err(|error| failed("reach QEMU")(error.into()))?;
                let process =
                    Process::behind(&qmp, *pid).map_err(|error| failed("find QEMU's process")(error.into()))?;
                let line = process.command_line().map_err(|error| failed("read QEMU's command line")(error.into()))?;
                if !line.iter().any(|word| word == "-S" || word == "--S") {
                    let why = "QEMU here was started without -S: its guest would run before it is this host's to run";
                    return Err(GuestError::Unsupported(why.to_owned()));
                }
                let leash =
                    Leash::tie(&self.leash, &process).map_err(|error| failed("start the leash")(error.into()))?;
                let monitor = std::path::absolute(socket).unwrap_or_else(|_| socket.clone());
                self.held = Some((process.number(), Held::Attached { leash, monitor }));
                Ok(Machine::new(qmp, process))
            }
        }
    }
}

impl Drop for QemuHost {
    fn drop(&mut self) {
        match self.held.take() {
            Some((_, Held::Attached { leash, .. })) if !self.asked_for => leash.let_go(),
            Some((_, Held::Left { leash, holding })) => {
                // Ended first.
                drop(leash);
                // belay's alone, made for this QEMU.
                let _ = holding.made.map(std::fs::remove_dir_all);
            }
            _ => {}
        }
    }
}

impl Host for QemuHost {
    fn ram(&mut self, spec: &VmmSpec, tethered: bool) -> Result<Option<Vec<HostRam>>, GuestError> {
        let Some((spec, disks)) = spec.qemu() else {
            let why = "the guest that comes is of belay's own VMM: start `belay receive` without `qemu`";
            return Err(GuestError::Unsupported(why.to_owned()));
        };
        let (mut machine, ready) = match self.ready.take() {
            Some((machine, ready)) if !machine.process.has_ended() => (machine, ready),
            _ => (self.start()?, Vec::new()),
        };
        self.asked_for = true;
        let guest = self.look(&mut machine, tethered)?;
        if let Some(why) = spec.differs(&QemuSpec::of(&guest), tethered) {
            return Err(GuestError::Unsupported(why));
        }
        if !disks.is_empty()
            && let Some(why) = disks_differ(disks, &self.disks_here()?)
        {
            return Err(GuestError::Unsupported(why));
        }
        let mut blocks = Vec::new();
        for ram in in_order(&guest.ram) {
            let known = ready.iter().find(|(id, _)| *id == ram.id);
            blocks.push(match known {
                Some((_, ready)) => ready.clone(),
                None => Arc::new(file_of(&machine.process, ram)?).into(),
            });
        }
        self.waiting = Some((machine, guest));
        Ok(Some(blocks))
    }

    fn build(
        &mut self,
        _spec: &VmmSpec,
        ram: &[Ram],
        shards: u16,
        tracker: Option<TrackerKind>,
        sink: Arc<dyn PacketSink>,
        life: Option<&LifePage>,
    ) -> Result<Built, GuestError> {
        let none = || GuestError::Unsupported("no QEMU was started for this guest".to_owned());
        let (mut machine, guest) = self.waiting.take().ok_or_else(none)?;
        let mut blocks: Vec<RamBlock> = Vec::new();
        for (ram, seen) in ram.iter().zip(in_order(&guest.ram)) {
            blocks.push(block(ram.id, seen, Arc::clone(&ram.file), Arc::clone(&ram.alias), &machine.process)?);
        }
        let protection = tracker.and_then(write_protection);
        let shards = register(&machine.process, &blocks, ram, shards, protection)?;
        for block in &blocks {
            expect_untouched(&machine.process, block)?;
        }
        machine.prepare_stream()?;
        let keeper = match tracker {
            Some(_) => self.lay_down(&machine.process, &blocks, &shards)?,
            None => None,
        };
        let gives_sign = match (&keeper, life) {
            (Some(keeper), Some(life)) => keeper.give_sign(life.fd(), VMM_SLOT)?,
            _ => false,
        };
        let pid = guest.pid;
        if let Some(relay) = &self.relay {
            let hand = Hand::attach(relay, Arc::clone(&sink), 0, Deadline::after(HAND));
            let hand = hand.map_err(|error| failed("take the guest's relay in hand")(error.into()))?;
            if hand.guest() != Some(pid) {
                let there = hand.guest().map_or("nobody".to_owned(), |there| format!("process {there}"));
                let why =
                    format!("{there} is connected to the relay at {}, and QEMU here is process {pid}", relay.display());
                // Nobody's guest was held by it.
                let _ = hand.let_go(Deadline::after(HAND), || {});
                return Err(GuestError::Unsupported(why));
            }
            self.wire.take(hand);
        }
        let attached = self.disks.attach(&self.disk_relays, disk::Role::Arriving, pid, Deadline::after(HAND));
        attached.map_err(|error| failed("take the guest's disk relays in hand")(error.into()))?;
        let tethered = tracker.is_some();
        if !self.taps.is_empty() {
            // Of a session that came to nothing, or of a belay that died: nobody's guest is behind it.
            self.wire.forget_taps();
            let one = |tap| if tethered { Gate::shut_before(tap).map(Some) } else { tap::clear(tap).map(|()| None) };
            let gates = self.taps.iter().map(|tap| one(tap)).collect::<Result<Vec<_>, _>>();
            let gates = gates.map_err(|error| failed("put a gate before the guest's tap")(error.into()))?;
            if tethered {
                self.wire.take_taps(gates.into_iter().flatten().collect(), sink);
            }
        }
        let guest = Box::new(ArrivingGuest::new(machine, blocks, self.wire.clone(), self.disks.clone(), tethered));
        Ok(Built { guest, shards, pid, gives_sign, keeper })
    }

    fn adopt(&mut self, ram: &[Ram], _: Arc<dyn PacketSink>) -> Result<(Box<dyn Guest>, Keeper), GuestError> {
        let none = || GuestError::Unsupported("there is no QEMU to take over".to_owned());
        let Adopted { guest, keeper, leash, holding } =
            self.estate.take().ok_or_else(none)?.adopt(ram, self.wire.clone());
        self.held = Some((holding.pid, Held::Left { leash, holding }));
        Ok((guest, keeper))
    }

    fn output(&mut self, _address: Option<&str>) -> io::Result<Box<dyn Emitter>> {
        Ok(self.wire.emitter())
    }

    fn vmm_is_apart(&self) -> bool {
        // It is, and shuts no gate: the guard has none to see to. What it lets out goes through this process or through nobody.
        false
    }

    fn guard_command(&self) -> Result<GuardCommand, GuardError> {
        Ok(self.guard.clone())
    }
}

/// Userfaultfds, with the frames each reports faults of.
type Shards = Vec<(Uffd, Vec<belay_transport::pull::ShardRange>)>;

/// One userfaultfd of QEMU's a shard, over its part of every block.
fn register(
    process: &Process,
    blocks: &[RamBlock],
    ram: &[Ram],
    shards: u16,
    protection: Option<Features>,
) -> Result<Shards, GuestError> {
    let asked = blocks.iter().map(|block| features(block.page_size, protection)).fold(Features::NONE, Features::union);
    let fds = userfaultfds(process, usize::from(shards), INJECTION);
    let fds = fds.map_err(|error| failed("have QEMU make a userfaultfd")(error.into()))?;
    let parts = shard_ranges(ram, shards);
    if parts.iter().any(Vec::is_empty) {
        return Err(GuestError::Unsupported(format!("{shards} shards are more than guest RAM can be split in")));
    }
    let modes = RegisterModes { faults: Faults::MissingAndMinor, write_protect: protection.is_some() };
    let one = |(fd, part): (std::os::fd::OwnedFd, Vec<belay_transport::pull::ShardRange>)| {
        let uffd = Uffd::from_fresh_fd(fd, asked)?;
        for range in &part {
            let block = blocks.iter().find(|block| block.id == range.region).expect("shards are made of these");
            let shift = block.page_size.shift();
            let (start, frames) = (range.frames.start << shift, range.frames.end - range.frames.start);
            uffd.register(block.vmm_address + start, frames << shift, modes)?;
        }
        Ok((uffd, part))
    };
    let registered: Result<_, belay_transport::uffd::UffdError> = fds.into_iter().zip(parts).map(one).collect();
    registered.map_err(|error| failed("register QEMU's RAM")(error.into()))
}
