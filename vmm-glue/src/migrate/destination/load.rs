//! The switch as the destination has it: faults are served, writes tracked, state loaded.

use super::{Destination, DestinationError, Happening, heard};
use crate::kvm::apart::Kept;
use crate::migrate::observation::{Kind, us};
use crate::migrate::protocol::{ToDestination, ToSource};
use crate::migrate::switch_map::PageClass;
use crate::migrate::tethering;
use belay_checkpoint::guest::TrackerKind;
use belay_checkpoint::tracker::WriteFaults;
use belay_transport::pages::{PageStates, RegionGeometry as Frames};
use belay_transport::pull::{ClassRun, Engine, Install, LandingPlan, PullPlan, RegionPlan, Tuning};
use belay_transport::stop_point::reached;
use belay_transport::uffd::Uffd;
use belay_transport::{Deadline, PageIndex, RegionId, pull};
use crossbeam_channel::Sender;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Instant;

/// Hears of the engine's end on its own threads.
pub(super) struct EngineEars {
    happened: Sender<Happening>,
    /// Who answers writes to protected pages, where they are tracked that way.
    writes: Option<Arc<WriteFaults>>,
}

impl pull::Observer for EngineEars {
    fn all_landed(&self) {
        let _ = self.happened.try_send(Happening::AllLanded);
    }

    fn failed(&self, _failure: &pull::PullFailure) {
        let _ = self.happened.try_send(Happening::PullFailed);
    }

    fn shown_again(&self, region: RegionId, page: PageIndex) {
        if let Some(writes) = &self.writes {
            writes.shown_again(region, page);
        }
    }

    fn given_up(&self, region: RegionId, page: PageIndex) {
        if let Some(writes) = &self.writes {
            writes.given_up(region, page);
        }
    }

    fn write_fault(&self, _: &Uffd, region: RegionId, page: PageIndex) -> bool {
        self.writes.as_ref().is_some_and(|writes| writes.answer(region, page))
    }
}

impl Destination<'_> {
    /// Waits for the switch, as long as the source likes: the guest runs there. Then loads, with faults served already.
    pub(super) fn await_switch(&mut self) -> Result<(), DestinationError> {
        let link = self.link.as_ref().expect("whoever waits for a switch has prepared for it over a session");
        let (map, device_state, nonce, because) = match heard::next(&link.inbox, "Switch", None, self.words)? {
            ToDestination::Switch { map, device_state, nonce, because } => (map, device_state, nonce, because),
            other => return Err(heard::unexpected(&other, "Switch")),
        };
        self.last = because;
        reached("switch-heard");
        let begun = Instant::now();
        self.map = map;
        let engine = self.start_engine(None)?;
        self.engine = Some(Arc::clone(&engine));
        let guest = self.guest.as_mut().expect("the tether has not been started");
        // Tracked from before the load: what loading writes (a clock page, say) is in the first epoch, the source does not have it.
        if let Some(tethering) = &mut self.tethering {
            tethering.arm(guest.as_mut(), engine, (self.vmm_pid, self.write_faults.as_ref()))?;
        }
        reached("state-loading");
        guest.load(&device_state)?;
        guest.set_incarnation(nonce)?;
        self.nonces.push(nonce);
        let because = self.note(Kind::Loaded { took_us: us(begun.elapsed()) });
        reached("state-loaded");
        self.tell(&ToSource::Loaded { because })?;
        reached("loaded-told");
        self.go_due = Some(Deadline::after(self.config.bounds.switch));
        Ok(())
    }

    /// Who answers this guest's write faults, if its writes are tracked that way. The same one for as long as there is this guest.
    fn write_faults(&mut self) -> Result<Option<Arc<WriteFaults>>, DestinationError> {
        let guest = self.guest.as_ref().filter(|_| self.write_faults.is_none());
        if let (Some(tether), Some(guest)) = (&self.proposal.tether, guest) {
            self.write_faults = tethering::write_faults(tether, guest.memory(), &self.uffds)?;
        }
        Ok(self.write_faults.clone())
    }

    /// Serves faults from now on, over the lanes of the session. `states`: what an engine before this one has come to.
    pub(super) fn start_engine(&mut self, states: Option<PageStates>) -> Result<Arc<Engine>, DestinationError> {
        let mut regions = Vec::new();
        let mut frames = Vec::new();
        for (ram, local, remote, vmm_address) in &self.ram {
            let page_size = ram.file.page_size();
            let count = ram.file.len() as u64 >> page_size.shift();
            let classes = self.map.iter().find(|classes| classes.id == ram.id);
            let classes =
                classes.ok_or_else(|| DestinationError::Refused(format!("the switch map lacks {}", ram.id)))?;
            let classes = classes.decode(count)?.into_iter().map(|(class, frames)| ClassRun {
                class: match class {
                    PageClass::Peer => pull::PageClass::Peer,
                    PageClass::Zero => pull::PageClass::Zero,
                },
                frames,
            });
            frames.push(Frames { id: ram.id, page_size, frames: count });
            regions.push(RegionPlan {
                id: ram.id,
                page_size,
                vmm_address: *vmm_address,
                bytes: ram.file.len() as u64,
                landing: LandingPlan::InPlace {
                    alias: Arc::clone(&ram.alias),
                    key: *local,
                    whole: ram.file.is_whole()?,
                },
                remote: *remote,
                classes: classes.collect(),
            });
        }
        let install = match self.proposal.tether.as_ref().map(|tether| tether.tracker) {
            Some(TrackerKind::UffdWp) => Install::Tracked,
            Some(TrackerKind::UffdSync) => Install::Protected,
            Some(TrackerKind::KvmLog | TrackerKind::KvmRing) | None => Install::Clean,
        };
        let total: u64 = frames.iter().map(|region| region.frames).sum();
        let hold_at_landed = self.config.hold_pull_at.map(|share| (share * total as f64).ceil() as u64);
        let tuning = Tuning { demand_timeout: self.config.bounds.demand, hold_at_landed, ..Tuning::default() };
        let states = Arc::new(match states {
            Some(states) => states,
            None => PageStates::in_memory(&frames)?,
        });
        if let Some(keeper) = &self.keeper {
            keeper.keep(Kept::PageStates, states.file().as_fd())?;
        }
        self.states = Some(Arc::clone(&states));
        let ears = Arc::new(EngineEars { happened: self.happened.clone(), writes: self.write_faults()? });
        let parts = std::mem::take(&mut self.parts);
        let log = self.config.fault_recording.as_ref().and_then(|recording| recording.begins(parts.len(), &regions));
        let plan = PullPlan { regions, install, tuning, start_paused: true, log };
        let engine = Arc::new(self.placement.run_near(|| Engine::start(plan, parts, states, ears))?);
        self.words.board.pulls_with(&engine);
        Ok(engine)
    }
}
