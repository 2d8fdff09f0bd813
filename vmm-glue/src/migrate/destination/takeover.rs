//! A new page server goes on with the VMM that a dead one left waiting: what it finds there, and what it lays down for the next.

use super::{Destination, DestinationConfig, DestinationError, Ended, Host, Outcome, Ram, Will, WillError, io};
use crate::guard::dismiss;
use crate::kvm::apart::{Estate, Kept, Ledger};
use crate::migrate::observation::{Kind, Observer};
use crate::migrate::operator::Words;
use crate::migrate::protocol::explain;
use crate::migrate::tethering::OUTBOX;
use belay_checkpoint::outbox::Outbox;
use belay_checkpoint::ownership::OwnerEpoch;
use belay_transport::RegionId;
use belay_transport::pages::PageStates;
use belay_transport::pull::ShardRange;
use belay_transport::region::RamFile;
use belay_transport::session::Listener;
use belay_transport::uffd::Uffd;
use std::os::fd::OwnedFd;
use std::sync::Arc;

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

/// Goes on with what a dead page server left: the guest is stopped, nothing of it is shown, and the source is waited for. An error means
/// that nothing was changed, unless it is the VMM's own.
pub fn take_over(
    config: &DestinationConfig,
    inherited: Inherited,
    listener: &Listener,
    host: &mut dyn Host,
    observer: &Observer,
    words: &Words,
) -> Result<Ended, DestinationError> {
    let missing_frames = inherited.missing();
    let Inherited { will, states, ram, shards, ledger, guard, pid, .. } = inherited;
    let address = config.output_to.as_deref().or(will.proposal.output_to.as_deref());
    let emitter = host.output(address).map_err(io("reach the observer of the guest's output"))?;
    let output = Outbox::commit(OUTBOX, ledger.keep(emitter)).map_err(io("start the outbox"))?;
    // Before anything is put into it.
    output.shut();
    let (guest, _keeper) = host.adopt(Arc::clone(&ram[0].alias), output.sink())?;
    if let Some(guard) = guard {
        dismiss(guard);
    }
    let landed_frames = states.counts().landed + states.counts().discarded;
    let held_packets = output.facts().held_packets as u64;
    let took = observer.note(Some(&will.because), Kind::TookOver { pid, landed_frames, missing_frames, held_packets });
    let why = "the page server of this guest has died".to_owned();
    observer.note(Some(&took), Kind::State { state: "fenced".to_owned(), why });
    let _ = (listener, words.signals.recv());
    Ok(Ended {
        outcome: Outcome::Fenced,
        why: "ended by a signal".to_owned(),
        guest: Some(guest),
        faults: shards.into_iter().map(|(uffd, _)| uffd).collect(),
        output: Some(Arc::new(output)),
        nonces: will.nonces,
        spec: Some(will.proposal.vmm),
    })
}

impl Destination<'_> {
    /// Writes down for the next page server what this one alone knows. Where that cannot be done the guest goes on, and nobody can take it
    /// over: that is said.
    pub(super) fn lay_down_will(&mut self, owner_epoch: OwnerEpoch, owned: bool) {
        let Some(keeper) = &self.keeper else { return };
        let will = Will {
            proposal: self.proposal.clone(),
            map: self.map.clone(),
            owner_epoch,
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
