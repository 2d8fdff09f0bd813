//! A source that comes back: over another session, from the process that was cut off or from one that took over from it.
//!
//! Mirror image of [`crate::migrate::source`]'s `resume`. Whatever goes wrong on the way leaves the guest fenced, its memory kept, and the
//! new session closed; the source then decides as for any loss.

use super::prepare::{Joined, Opened, open_lanes, shard_parts};
use super::warden::Warden;
use super::{Destination, DestinationError, Link, VMM_SLOT, heard, io};
use crate::guard::dismiss;
use crate::kvm::apart::Kept;
use crate::migrate::observation::{Kind, connected};
use crate::migrate::peer::{Inbox, listen_to};
use crate::migrate::protocol::{self, ToDestination, ToSource};
use crate::migrate::reattach::{Reattach, decode_proposal};
use crate::migrate::registering::place;
use crate::migrate::settings::Proposal;
use belay_checkpoint::dirty::Harvested;
use belay_checkpoint::ownership::destination::{Event, State};
use belay_checkpoint::ownership::{Fate, OwnerEpoch};
use belay_transport::pages::PageStates;
use belay_transport::pull::Discard;
use belay_transport::region::RamFile;
use belay_transport::session::{DestinationSession, Incoming};
use belay_transport::{Deadline, explain, fabric};
use crossbeam_channel::bounded;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often it is looked whether somebody dials.
const LOOK: Duration = Duration::from_millis(10);

/// A session in which the source has proved that it is this migration's.
struct Proved {
    session: DestinationSession,
    inbox: Arc<Inbox<ToDestination>>,
}

impl Destination<'_> {
    /// Looks whether somebody dials. The source of this guest is heard out; anybody else is told that this host has a guest.
    pub(super) fn hear_dialler(&mut self) -> Option<Event> {
        // Once the arbiter may have given the guest to this host, a source can neither tether it again nor know what became of it.
        let hears = match self.state {
            State::Tethered { .. } => true,
            State::Fenced(now) => !now.claiming,
            _ => false,
        };
        if self.dialled_at.elapsed() < LOOK || !hears {
            return None;
        }
        self.dialled_at = Instant::now();
        for rejection in self.listener.take_rejections() {
            let why = explain(&rejection.error);
            self.note(Kind::State { state: "turned-away".to_owned(), why });
        }
        let incoming = self.listener.accept(Deadline::after(Duration::ZERO)).ok()?;
        let call = match self.judge(&incoming) {
            Ok(call) => call,
            Err(why) => {
                let _ = incoming.refuse(&why, Deadline::after(Duration::from_millis(200)));
                self.note(Kind::State { state: "turned-away".to_owned(), why });
                return None;
            }
        };
        if matches!(self.state, State::Tethered { .. }) {
            // A source that dials again has lost its session, whatever this end still believes.
            self.why = "the source dials again: its session is over".to_owned();
            self.drive(Event::ConnectionClosed);
        }
        match self.reattach(incoming, &call) {
            Ok(event) => event,
            Err(error) => {
                let what = format!("the source came back and could not be joined: {}", explain(&error));
                let advice =
                    "The guest stays fenced and its memory kept; the source decides, or dials again.".to_owned();
                self.note(Kind::Failed { what, advice });
                None
            }
        }
    }

    /// Whether a hello is the source's of this guest.
    fn judge(&self, incoming: &Incoming) -> Result<Reattach, String> {
        let hello = incoming.hello();
        let proposal = decode_proposal(&hello.blob)?;
        let Some(call) = proposal.reattach else { return Err("this host has a guest already".to_owned()) };
        let identity = self.proposal.identity;
        if call.migration != identity.migration {
            return Err(format!("the guest here is of migration {}, not of {}", identity.migration, call.migration));
        }
        if !identity.knows(&call) {
            return Err(format!("whoever dials does not know the secret of migration {}", identity.migration));
        }
        if (Proposal { reattach: None, ..proposal }) != self.proposal || hello.geometry != self.geometry {
            return Err("it proposes something else than at first".to_owned());
        }
        Ok(call)
    }

    /// The whole exchange, bounded step by step; what came of it, if that is an event.
    fn reattach(&mut self, incoming: Incoming, call: &Reattach) -> Result<Option<Event>, DestinationError> {
        let State::Fenced(fenced) = self.state else { return Ok(None) };
        let proved = self.prove(incoming, call)?;
        let kind = connected("the source".to_owned(), &proved.session.agreed, proved.session.lanes.is_encrypted());
        self.note(kind);
        match self.ask(&proved, fenced.owner_epoch)? {
            Fate::Revoked => {
                self.why = "the source says: Revoked".to_owned();
                Ok(Some(Event::SourceRevoked))
            }
            Fate::Released => {
                self.take_over_session(&proved);
                Ok(Some(Event::FateAnswered(Fate::Released)))
            }
            Fate::StillTethered => self.tether_again(proved).map(Some),
        }
    }

    fn prove(&mut self, incoming: Incoming, call: &Reattach) -> Result<Proved, DestinationError> {
        let (identity, bound) = (self.proposal.identity, self.config.bounds.handshake);
        let id = incoming.hello().session;
        let answered = identity.answer(id, call).map_err(io("draw a challenge"))?;
        let session = incoming.accept(&protocol::encode(&answered), Deadline::after(bound))?;
        let inbox = Arc::new(listen_to(Arc::clone(&session.control)).map_err(io("start the control thread"))?);
        match heard::next_within(&inbox, "its proof", bound)? {
            ToDestination::Reattach { proof } if identity.is_source(id, call, &answered, &proof) => {
                Ok(Proved { session, inbox })
            }
            ToDestination::Reattach { .. } => Err(DestinationError::Refused("its proof is wrong".to_owned())),
            other => Err(heard::unexpected(&other, "Reattach")),
        }
    }

    fn ask(&self, proved: &Proved, owner_epoch: OwnerEpoch) -> Result<Fate, DestinationError> {
        let bound = self.config.bounds.handshake;
        let asked = protocol::encode(&ToSource::FateAsked { owner_epoch });
        proved.session.control.send(&asked, Deadline::after(bound))?;
        match heard::next_within(&proved.inbox, "what became of the guest", bound)? {
            ToDestination::Fate { fate, .. } => Ok(fate),
            other => Err(heard::unexpected(&other, "Fate")),
        }
    }

    /// From here on this is the session.
    fn take_over_session(&mut self, proved: &Proved) {
        let (control, inbox) = (Arc::clone(&proved.session.control), Arc::clone(&proved.inbox));
        self.link = Some(Link { control, inbox });
    }

    /// Pulls and tethers over the new session. The guest still stands when this returns.
    fn tether_again(&mut self, proved: Proved) -> Result<Event, DestinationError> {
        let bounds = self.config.bounds;
        // The source registers all of its memory before it says where that is.
        let (ram, ring, offer, committed) =
            match heard::next_unless_told(&proved.inbox, "where its memory is", bounds.prepare, self.words)? {
                ToDestination::PrepareAgain { ram, ring, ring_geometry, committed, because } => {
                    self.last = because;
                    (ram, ring, ring_geometry, committed)
                }
                other => return Err(heard::unexpected(&other, "PrepareAgain")),
            };
        let deadline = Deadline::after(bounds.prepare);
        let refused = |why: &str| DestinationError::Refused(why.to_owned());
        if self.leftover.is_none() && !self.inherited {
            return Err(refused("nothing is left of the guest's tether"));
        }
        let (states, discards) = self.end_engine()?;
        if let Some(leftover) = &mut self.leftover {
            let Harvested { dirty, discards: carried } = &mut leftover.carried;
            for Discard { region, page, certain } in discards {
                if certain { &mut *carried } else { &mut *dirty }.insert(region, page);
            }
            carried.retain(|region, page| !dirty.contains(region, page));
        }
        self.replace_guard(proved.session.lanes.take_guard(Deadline::after(bounds.handshake))?, deadline)?;
        // What the old session's threads may still say is said to nobody.
        let (happened, happenings) = bounded(64);
        let mut initiator = fabric::initiator(&proved.session)?;
        let agreed = proved.session.agreed.fabric;
        self.placement = place(self.config.numa, agreed, initiator.numa_node(), self.observer, &self.last)?;
        let own: Vec<_> = self.ram.iter().map(|(ram, ..)| ram.clone()).collect();
        let (staging, bound) = (self.config.staging, bounds.handshake);
        let joined = Joined { ring, offer, committed, staging, bound, deadline };
        let (whereabouts, told) = ((&self.placement, &happened), (self.observer, &self.last));
        let opened = open_lanes(&mut *initiator, &self.proposal, &own, joined, whereabouts, told)?;
        let Opened { landing, lane_pairs, tethering } = opened;
        for ((_, local, ..), landing) in self.ram.iter_mut().zip(landing) {
            *local = landing;
        }
        for (own, _, remote, _) in &mut self.ram {
            let key = ram.iter().find(|(id, _)| *id == own.id).map(|&(_, key)| key);
            *remote = key.ok_or_else(|| DestinationError::Refused(format!("no key for {}", own.id)))?;
        }
        self.parts = shard_parts(self.config, lane_pairs, &self.uffds)?;
        (self.happened, self.happenings) = (happened, happenings);
        let engine = self.start_engine(Some(states))?;
        self.engine = Some(Arc::clone(&engine));
        self.all_landed_at = None;
        self.release_asked_at = None;
        // Faults are served again, so a vCPU that waited for a page comes to a stop now.
        let guest = self.guest.as_mut().ok_or_else(|| refused("its VMM is gone"))?;
        guest.pause(Deadline::after(bounds.stop))?;
        let mut tethering = tethering.ok_or_else(|| refused("the guest moved without a tether"))?;
        if self.leftover.is_none() {
            tethering.arm_anew(guest.as_mut(), Arc::clone(&engine), (self.vmm_pid, self.write_faults.as_ref()))?;
        }
        self.take_over_session(&proved);
        let secrets = self.warden.as_ref().map(|warden| warden.secrets.clone());
        self.tell(&ToSource::Prepared { secrets, because: self.last.clone() })?;
        // Nothing fails from here on.
        if let Some(leftover) = self.leftover.take() {
            tethering.arm_again(leftover, engine);
        }
        self.output.reopen_epochs(committed);
        self.output.renew_lease(tethering.lease());
        self.tethering = Some(tethering);
        Ok(Event::FateAnswered(Fate::StillTethered))
    }

    /// Starts this session's guard; the one before it, or the dead page server's, is sent home.
    fn replace_guard(&mut self, connection: OwnedFd, deadline: Deadline) -> Result<(), DestinationError> {
        if let Some(warden) = self.warden.take() {
            warden.stand_down(Deadline::after(Duration::from_millis(200)));
        }
        let Some((command, arms)) = &self.guard else { return Ok(()) };
        let mut warden = Warden::start(command, connection, *arms, deadline)?;
        if let Some(keeper) = &self.keeper {
            if keeper.give_sign(warden.page.fd(), VMM_SLOT)? {
                warden.guard.watch(VMM_SLOT, deadline)?;
            }
            keeper.keep(Kept::Guard, warden.guard.hand_over())?;
        }
        if let Some(old) = self.old_guard.take() {
            dismiss(old);
        }
        self.warden = Some(warden);
        Ok(())
    }

    /// Ends the old engine: what it had come to, and the discards nobody has taken yet.
    fn end_engine(&mut self) -> Result<(PageStates, Vec<Discard>), DestinationError> {
        let refused = |why: &str| DestinationError::Refused(why.to_owned());
        let states = self.states.clone().ok_or_else(|| refused("no page of the guest was ever served here"))?;
        let mut discards = Vec::new();
        // None where an earlier try came no further than this.
        if let Some(engine) = self.engine.take() {
            let engine = match Arc::try_unwrap(engine) {
                Ok(engine) => engine,
                Err(engine) => {
                    self.engine = Some(engine);
                    return Err(refused("the old pull engine is still in use"));
                }
            };
            // Its lanes are closed with it; what it had in flight is absent again, and read over the new session.
            let stopped = engine.stop_and_take(Deadline::after(self.config.bounds.stop), &mut |discard| {
                discards.push(discard);
            });
            stopped.map_err(|error| DestinationError::Refused(error.to_string()))?;
        }
        let file = rustix::io::dup(states.file()).map_err(|errno| io("keep the page states")(errno.into()))?;
        Ok((PageStates::open(RamFile::from_fd(file)?)?, discards))
    }
}
