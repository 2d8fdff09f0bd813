//! A new page server goes on with the VMM that a dead one left waiting: what it finds there, and what it lays down for the next.

use super::{Destination, DestinationConfig, DestinationError, Ended, Host, Ram, Will, WillError, io, warden};
use crate::guard::GuardError;
use crate::kvm::apart::{Estate, Kept, Ledger};
use crate::migrate::observation::{Kind, Observer};
use crate::migrate::operator::{Pending, Words};
use crate::migrate::protocol::explain;
use crate::migrate::settings::Proposal;
use crate::migrate::tethering::OUTBOX;
use belay_checkpoint::outbox::{Emitter, LeaseClock, Outbox, OutputMode};
use belay_checkpoint::ownership::destination::{Event, Fenced, State};
use belay_transport::RegionId;
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
    /// Of guest memory in the VMM.
    pub vmm_address: u64,
}

impl Inherited {
    /// Takes it out of `estate`; the VMM's socket stays there.
    pub fn of(estate: &mut Estate) -> Result<Self, DestinationError> {
        let will = Will::read(estate.take(Kept::Will))?;
        let states = estate.take(Kept::PageStates).ok_or(WillError::None)?;
        // Whoever had READs in flight has ended: the VMM's door has seen to that.
        let states = PageStates::open(RamFile::from_fd(states)?)?;
        let ledger = Ledger::from_fd(estate.take(Kept::Ledger).ok_or(WillError::None)?)?;
        let file = Arc::new(estate.ram.try_clone()?);
        let alias = Arc::new(file.map().map_err(io("map guest RAM"))?);
        let ram = vec![Ram { id: RegionId(0), file, alias }];
        let frames = ram[0].file.len() as u64 >> ram[0].file.page_size().shift();
        let told: Vec<_> = states.geometry().map(|region| (region.id, region.frames)).collect();
        let mapped: u64 = will.map.iter().flat_map(|region| &region.runs).map(|(_, frames)| frames).sum();
        if told != [(RegionId(0), frames)] || mapped != frames {
            return Err(DestinationError::Refused(format!(
                "what was left does not fit together: {frames} frames of RAM, page states of {told:?}, a switch map of {mapped}"
            )));
        }
        let shift = ram[0].file.page_size().shift();
        let shards = estate.uffds.iter().map(|(uffd, bytes)| {
            let frames = bytes.start >> shift..bytes.end >> shift;
            Ok((uffd.try_clone()?, vec![ShardRange { region: RegionId(0), frames }]))
        });
        let shards = shards.collect::<Result<Vec<_>, DestinationError>>()?;
        let guard = estate.take(Kept::Guard);
        let (pid, vmm_address) = (estate.pid, estate.vmm_address);
        Ok(Self { will, states: Arc::new(states), ram, shards, ledger, guard, pid, vmm_address })
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
    let Inherited { will, states, ram, shards, ledger, guard, pid, vmm_address } = inherited;
    let Will { proposal, map, owner_epoch, nonces, owned, because } = will;
    let address = config.output_to.as_deref().or(proposal.output_to.as_deref());
    let emitter = host.output(address).map_err(io("reach the observer of the guest's output"))?;
    let output = outbox_of(&proposal, ledger.keep(emitter)).map_err(io("start the outbox"))?;
    // Before anything is put into it.
    output.shut();
    let placement = Placement::decide(config.numa, None)?;
    let tether = proposal.tether.as_ref();
    let guard_beside = tether.map(|tether| Ok((host.guard_command()?, warden::arms(tether, true))));
    let guard_beside = guard_beside.transpose().map_err(|error: GuardError| DestinationError::from(error))?;
    let output = Arc::new(output);
    words.board.emits_through(&output);
    let (guest, keeper) = host.adopt(Arc::clone(&ram[0].alias), output.sink())?;
    let landed_frames = states.counts().landed + states.counts().discarded;
    let held_packets = output.facts().held_packets as u64;
    let last = observer.note(Some(&because), Kind::TookOver { pid, landed_frames, missing_frames, held_packets });
    let geometry =
        |ram: &Ram| RegionGeometry { id: ram.id, bytes: ram.file.len() as u64, page_size: ram.file.page_size() };
    let (happened, happenings) = bounded(64);
    let now = Instant::now();
    let all_landed = missing_frames == 0;
    let fenced = Fenced { owner_epoch, all_landed, revoked: false, guest_dead: false, source_dead: false };
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
        guest: Some(guest),
        output,
        warden: None,
        keeper: Some(keeper),
        // Keys are a session's; there is none yet, and no engine without one.
        ram: ram.into_iter().map(|ram| (ram, LocalKey(0), ReadKey(0), vmm_address)).collect(),
        vmm_pid: pid,
        signless: None,
        parts: Vec::new(),
        uffds: shards,
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
