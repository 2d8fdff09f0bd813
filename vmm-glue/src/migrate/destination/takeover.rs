//! A new page server goes on with the VMM that a dead one left waiting: what it finds there, and what it lays down for the next.

use super::claim::Claiming;
use super::{Destination, DestinationConfig, DestinationError, Ended, Host, Ram, Will, WillError, io, warden};
use crate::guard::GuardError;
use crate::kvm::apart::{Estate, Kept, Ledger};
use crate::migrate::observation::{Kind, Observer};
use crate::migrate::operator::{Pending, Words};
use crate::migrate::settings::Proposal;
use crate::migrate::switch_map::RegionClasses;
use crate::migrate::tethering::OUTBOX;
use belay_checkpoint::outbox::{Emitter, LeaseClock, Outbox, OutputMode};
use belay_checkpoint::ownership::destination::{Event, Fenced, State};
use belay_transport::RegionId;
use belay_transport::explain;
use belay_transport::fabric::{LocalKey, ReadKey};
use belay_transport::numa::Placement;
use belay_transport::pages::PageStates;
use belay_transport::pull::ShardRange;
use belay_transport::region::RamFile;
use belay_transport::session::{Listener, RegionGeometry};
use belay_transport::uffd::Uffd;
use crossbeam_channel::bounded;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

/// What a dead page server left, read and checked against each other. Nothing has been changed by that.
pub struct Inherited {
    pub will: Will,
    pub states: Arc<PageStates>,
    pub ram: Vec<Ram>,
    /// The VMM's userfaultfds, with the frames each reports faults of.
    pub shards: Vec<(Uffd, Vec<ShardRange>)>,
    pub ledger: Ledger,
    /// By which the dead page server's guard can be sent home.
    pub guard: Option<OwnedFd>,
    /// The VMM's process.
    pub pid: u32,
    /// Of each region of guest memory, in the VMM.
    pub addresses: Vec<u64>,
}

/// What lies with a VMM whose page server has died, and has not been looked into.
pub struct Found {
    pub will: Option<OwnedFd>,
    pub states: Option<OwnedFd>,
    pub ledger: Option<OwnedFd>,
    pub guard: Option<OwnedFd>,
    pub ram: Vec<Ram>,
    /// Of each region, in the VMM.
    pub addresses: Vec<u64>,
    pub pid: u32,
}

/// A VMM's userfaultfds, with the frames each reports faults of.
type Shards = Vec<(Uffd, Vec<ShardRange>)>;

impl Inherited {
    /// Takes it out of `estate`; the VMM's socket stays there.
    pub fn of(estate: &mut Estate) -> Result<Self, DestinationError> {
        let file = Arc::new(estate.ram.try_clone()?);
        let alias = Arc::new(file.map().map_err(io("map guest RAM"))?);
        let shift = file.page_size().shift();
        let found = Found {
            will: estate.take(Kept::Will),
            states: estate.take(Kept::PageStates),
            ledger: estate.take(Kept::Ledger),
            guard: estate.take(Kept::Guard),
            ram: vec![Ram { id: RegionId(0), file, alias }],
            addresses: vec![estate.vmm_address],
            pid: estate.pid,
        };
        Self::read(found, |_, _| {
            let one = |(uffd, bytes): &(Uffd, std::ops::Range<u64>)| {
                let frames = bytes.start >> shift..bytes.end >> shift;
                Ok((uffd.try_clone()?, vec![ShardRange { region: RegionId(0), frames }]))
            };
            estate.uffds.iter().map(one).collect()
        })
    }

    /// Reads what was found, and checks whether it fits together. `shards` has what the guest was proposed as, and its RAM.
    pub fn read(
        found: Found,
        shards: impl FnOnce(&Proposal, &[Ram]) -> Result<Shards, DestinationError>,
    ) -> Result<Self, DestinationError> {
        let Found { will, states, ledger, guard, ram, addresses, pid } = found;
        let will = Will::read(will)?;
        // Whoever had READs in flight has ended: the door has seen to that.
        let states = PageStates::open(RamFile::from_fd(states.ok_or(WillError::None)?)?)?;
        let ledger = Ledger::from_fd(ledger.ok_or(WillError::None)?)?;
        let frames = |ram: &Ram| (ram.id, ram.file.len() as u64 >> ram.file.page_size().shift());
        let here: Vec<_> = ram.iter().map(frames).collect();
        let told: Vec<_> = states.geometry().map(|region| (region.id, region.frames)).collect();
        let mapped = |region: &RegionClasses| (region.id, region.runs.iter().map(|(_, frames)| frames).sum::<u64>());
        let mapped: Vec<_> = will.map.iter().map(mapped).collect();
        if told != here || mapped != here || addresses.len() != here.len() {
            return Err(DestinationError::Refused(format!(
                "what was left does not fit together: RAM of {here:?}, page states of {told:?}, a switch map of {mapped:?} (regions and their frames)"
            )));
        }
        let shards = shards(&will.proposal, &ram)?;
        Ok(Self { will, states: Arc::new(states), ram, shards, ledger, guard, pid, addresses })
    }

    /// Frames that have not landed.
    pub fn missing(&self) -> u64 {
        let counts = self.states.counts();
        counts.absent + counts.in_flight + counts.failed
    }
}

/// Goes on with what a dead page server left: the guest is stopped, nothing of it is shown, and the source is waited for. With `promote` the
/// operator gives the guest to this host, knowing that the source neither runs it nor has taken it back; it is refused while pages are
/// missing. An error means that nothing was changed, unless it is the VMM's own.
pub fn take_over(
    (config, promote): (&DestinationConfig, bool),
    inherited: Inherited,
    listener: &Listener,
    host: &mut dyn Host,
    observer: &Observer,
    words: &Words,
) -> Result<Ended, DestinationError> {
    let missing_frames = inherited.missing();
    let Inherited { will, states, ram, shards, ledger, guard, pid, addresses } = inherited;
    let Will { proposal, map, owner_epoch, nonces, owned, because } = will;
    let address = config.output_to.as_deref().or(proposal.output_to.as_deref());
    let emitter = host.output(address).map_err(io("reach the observer of the guest's output"))?;
    let output = outbox_of(&proposal, ledger.keep(emitter)).map_err(io("start the outbox"))?;
    // Before anything is put into it.
    output.shut();
    let placement = Placement::decide(config.numa, None)?;
    let tether = proposal.tether.as_ref();
    let guard_beside = tether.map(|tether| Ok((host.guard_command()?, warden::arms(tether, host.vmm_is_apart()))));
    let guard_beside = guard_beside.transpose().map_err(|error: GuardError| DestinationError::from(error))?;
    let output = Arc::new(output);
    words.board.emits_through(&output);
    let (guest, keeper) = host.adopt(&ram, output.sink())?;
    let landed_frames = states.counts().landed + states.counts().discarded;
    let held_packets = output.facts().held_packets as u64;
    let last = observer.note(Some(&because), Kind::TookOver { pid, landed_frames, missing_frames, held_packets });
    let geometry =
        |ram: &Ram| RegionGeometry { id: ram.id, bytes: ram.file.len() as u64, page_size: ram.file.page_size() };
    let (happened, happenings) = bounded(64);
    let now = Instant::now();
    let all_landed = missing_frames == 0;
    // The process before this one may have asked, and been granted what it did not hear.
    let claiming = all_landed && !owned && config.arbiter.as_ref().is_some_and(|arbiter| arbiter.goes_on_alone);
    let fenced = Fenced { claiming, ..Fenced::new(owner_epoch, all_landed) };
    let mut destination = Destination {
        config,
        listener,
        guard: guard_beside,
        placement,
        geometry: ram.iter().map(geometry).collect(),
        proposal,
        observer,
        words,
        pending: Pending::default(),
        link: None,
        happenings,
        happened,
        state: State::Fenced(fenced),
        last,
        storage: guest.storage(),
        guest: Some(guest),
        output,
        warden: None,
        keeper: Some(keeper),
        // Keys are a session's; there is none yet, and no engine without one.
        ram: ram.into_iter().zip(addresses).map(|(ram, at)| (ram, LocalKey(0), ReadKey(0), at)).collect(),
        vmm_pid: pid,
        // One that is apart in our own way gives its sign to the next session's guard.
        signless: (!host.vmm_is_apart()).then_some(pid),
        parts: Vec::new(),
        uffds: shards,
        write_faults: None,
        engine: None,
        states: Some(states),
        map,
        leftover: None,
        inherited: true,
        old_guard: guard,
        owner_epoch,
        tethering: None,
        nonces,
        resumed_at: None,
        all_landed_at: None,
        release_asked_at: None,
        go_due: None,
        leaving: None,
        warned: false,
        claiming: Claiming::default(),
        ticked_at: now,
        dialled_at: now,
        reported_at: now,
        latencies_at: now,
        why: "the page server of this guest has died".to_owned(),
        outcome: None,
    };
    let why = destination.why.clone();
    words.board.entered(destination.state.name(), Some(owner_epoch.0), &why);
    destination.note(Kind::State { state: "fenced".to_owned(), why });
    if claiming && let Some(event) = destination.claim(owner_epoch, true) {
        destination.drive(event);
    }
    if owned {
        // The source had let go before: there is nobody to ask.
        destination.drive(Event::ReleaseAcknowledged);
    } else if promote {
        destination.drive(Event::Promoted);
    }
    Ok(destination.run())
}

/// An outbox under the proposal's rule; one that goes by lease has none until a session brings one.
fn outbox_of(proposal: &Proposal, emitter: Box<dyn Emitter>) -> std::io::Result<Outbox> {
    struct NoLease;
    impl LeaseClock for NoLease {
        fn valid(&self) -> bool {
            false
        }
    }
    match proposal.tether.as_ref().map(|tether| tether.output) {
        None => Outbox::open(OUTBOX, emitter),
        Some(OutputMode::Commit) => Outbox::commit(OUTBOX, emitter),
        Some(OutputMode::Lease) => Outbox::lease(OUTBOX, Arc::new(NoLease), emitter),
    }
}

impl Destination<'_> {
    /// Writes down for the next page server what this one alone knows. Where that cannot be done the guest goes on, and nobody can take it
    /// over: that is said.
    pub(super) fn lay_down_will(&mut self, owned: bool) {
        let Some(keeper) = &self.keeper else { return };
        let will = Will {
            proposal: self.proposal.clone(),
            map: self.map.clone(),
            owner_epoch: self.owner_epoch,
            nonces: self.nonces.clone(),
            owned,
            because: self.last.clone(),
        };
        if let Err(error) = will.lay_down(keeper) {
            let why = format!("should this page server die, no other can go on with the guest: {}", explain(&error));
            self.note(Kind::State { state: "no-takeover".to_owned(), why });
        }
    }
}
