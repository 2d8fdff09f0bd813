//! What a source does: the switch, the words to the destination, the release.

use super::keep::limits;
use super::zeros::{Looked, ZeroLook};
use super::{Source, SourceError, fresh_nonce, io};
use crate::guard::DeathWatch;
use crate::migrate::lease::{Silence, boot_time};
use crate::migrate::observation::{Kind, named_state, us};
use crate::migrate::protocol::ToDestination;
use crate::migrate::release::ReleaseError;
use crate::migrate::switch_map::{PageClass, RegionClasses};
use belay_checkpoint::fold::{FoldConfig, FoldState, Folder};
use belay_checkpoint::guest::{GuestError, RamBlock};
use belay_checkpoint::ownership::Named;
use belay_checkpoint::ownership::source::{Action, CatchStep, Event, State};
use belay_checkpoint::ring::{OwnerRegion, RingReader};
use belay_transport::fabric::FabricKind;
use belay_transport::region::Extent;
use belay_transport::session::SessionError;
use belay_transport::stop_point::reached;
use belay_transport::{Deadline, explain};
use std::sync::Arc;
use std::time::{Duration, Instant};

impl Source<'_> {
    /// Does one thing; what came of it, if that is an event.
    pub(super) fn carry_out(&mut self, action: Action) -> Option<Event> {
        let bounds = self.config.bounds;
        match action {
            Action::PauseGuest => match self.guest.pause(Deadline::after(bounds.stop)) {
                Ok(()) => {
                    self.paused_at = Instant::now();
                    let steps = (self.steps)();
                    self.note(Kind::Paused { steps });
                    reached("switch-paused");
                    None
                }
                Err(error) => Some(self.failed_switch(&error)),
            },
            Action::SendSwitch => match self.send_switch() {
                Ok(()) => None,
                Err(error) => Some(self.failed_switch(&error)),
            },
            Action::SendGo { owner_epoch } => {
                let go = ToDestination::Go { owner_epoch, because: self.last.clone() };
                reached("go-due");
                match self.tell(&go) {
                    Ok(()) => {
                        reached("go-told");
                        None
                    }
                    Err(error) => Some(self.lost(Event::ConnectionClosed, &error.to_string())),
                }
            }
            Action::SendAbort => {
                let failed = ToDestination::Failed { reason: self.why.clone(), because: self.last.clone() };
                let _ = self.tell(&failed);
                None
            }
            Action::GrantLease => {
                self.answer_due = None;
                if let (Some(folder), Some(tether)) = (&self.folder, &self.config.proposal.tether) {
                    folder.set_granting(true);
                    self.lease_ends = None;
                    self.silence = Some(Silence::new(tether.lease.silence_bound(), boot_time()));
                }
                None
            }
            Action::WithdrawLease => {
                if let Some(folder) = &self.folder {
                    folder.set_granting(false);
                }
                let lasts =
                    self.config.proposal.tether.as_ref().map_or(Duration::ZERO, |tether| tether.lease.silence_bound());
                self.lease_ends = Some(boot_time() + lasts);
                None
            }
            Action::Claim { owner_epoch } => self.claim(owner_epoch),
            Action::Revoke { .. } => self.revoke_once_fenced(),
            Action::FoldAndLoad => self.fold_and_load(),
            Action::ResendOutput => {
                // Once: a resume that is tried again finds them on their way already.
                let again = self.recovered.as_mut().map(|recovered| std::mem::take(&mut recovered.outputs_to_resend));
                if let Some(packets) = again.filter(|packets| !packets.is_empty()) {
                    self.output.resend(packets);
                }
                None
            }
            Action::ResumeGuest => self.resume(),
            Action::RecordRelease => self.record_release(),
            Action::AcknowledgeRelease => {
                let released = ToDestination::Released { because: self.last.clone() };
                reached("release-recorded");
                let _ = self.tell(&released);
                reached("release-told");
                self.answer_due = Some(Deadline::after(bounds.release));
                None
            }
            Action::RefuseRelease => {
                let _ = self.tell(&ToDestination::ReleaseRefused { because: self.last.clone() });
                None
            }
            Action::AnswerFate(fate) => self.answer_fate(fate),
            Action::SeekDestination => {
                self.seek();
                None
            }
            // Guest RAM and ring live as long as this process does, and with --memory-dir longer.
            Action::KeepMemory => None,
            Action::Report(named) => self.report(named),
        }
    }

    pub(super) fn report(&mut self, named: Named) -> Option<Event> {
        self.note(Kind::State { state: named_state(named), why: named.to_string() });
        let waits_for_a_person = match named {
            Named::AwaitingOperator => !self.config.catch_on_loss,
            Named::CannotRevoke | Named::CatchStuck => true,
            _ => false,
        };
        if waits_for_a_person {
            self.waits_for_a_person = true;
            let epoch = Some(self.state.owner_epoch().0);
            self.words.board.entered(&named_state(named), epoch, &named.to_string());
        }
        let advice = match named {
            Named::AwaitingLease => {
                // Its proof makes the catch safe at once. Where it is not armed or out of reach the lease decides, as it would have.
                if self.live.as_ref().and_then(|live| live.death_watch.as_ref()).is_some_and(DeathWatch::fence) {
                    let why = "the guard there was ordered to end the guest's VMM".to_owned();
                    self.note(Kind::State { state: "fence-ordered".to_owned(), why });
                }
                return None;
            }
            Named::AwaitingOperator if self.config.catch_on_loss => return Some(Event::OperatorCatch),
            Named::AwaitingOperator if self.fence_is_always_asked() => {
                "The guest's memory is kept here. Only the fence hook's success proves the destination off (--fence-always): it is run until then, \
                 and no signal ends this process meanwhile."
            }
            Named::AwaitingOperator => {
                "The guest's memory is kept here. Where the destination's death is not proven yet, make sure that it shows no more output, then order \
                 `belay catch`, or send SIGINT or SIGTERM: either is your word for the catch. --catch-on-loss gives it beforehand."
            }
            Named::CannotRevoke if self.room_due.is_some() => {
                "The guest's memory is kept here. Make room on the storage, or in memory, or mend it: the catch goes on by itself then. SIGINT tries it again, once."
            }
            Named::CatchStuck if self.room_due.is_some() => {
                "The guest is in this process alone: do not end it. Make room on the storage, or mend it: the catch goes on by itself then."
            }
            Named::CatchStuck if self.untakable().is_some() => match self.state {
                State::Revoking { step: CatchStep::Claim, .. } => {
                    "Nobody is shut out and the guest's memory is kept on both hosts. If every page is at the destination, end belay here and promote the guest \
                     there. `belay catch --older` goes on here instead, from that checkpoint: what the guest did and showed after it is undone."
                }
                _ => {
                    "The guest is in this process alone: do not end it. `belay catch --older` goes on from that checkpoint: what the guest did and showed after it \
                     is undone."
                }
            },
            Named::CatchStuck if matches!(self.state, State::Revoking { step: CatchStep::Fold, .. }) => {
                "The guest is in this process alone: do not end it. Mend what failed, then `belay catch` tries again. A signal tries once more and ends this process \
                 if that fails too: then what --memory-dir keeps is all that is left of the guest."
            }
            Named::CannotRevoke | Named::CatchStuck => {
                "The guest's memory is kept here. Mend what failed, then send SIGINT to try again, once."
            }
            _ => return None,
        };
        let what = format!("{named}: {}", self.why);
        self.note(Kind::Failed { what, advice: advice.to_owned() });
        None
    }

    pub(super) fn failed_switch(&mut self, error: &dyn std::error::Error) -> Event {
        self.why = explain(error);
        Event::SwitchFailed
    }

    pub(super) fn send_switch(&mut self) -> Result<(), SourceError> {
        let bounds = self.config.bounds;
        // What the guest showed before the switch has left before anything it shows after it.
        if !self.output.wait_sent(Deadline::after(bounds.stop)) {
            return Err(SourceError::TimedOut {
                waiting_for: "output from before the switch to leave",
                bound: bounds.stop,
            });
        }
        let mut device_state = Vec::new();
        self.guest.save(&mut device_state)?;
        // Nothing is given up after this.
        self.keep.reserve_ram(self.guest.memory())?;
        let mut map = Vec::new();
        let (mut peer_frames, mut zero_frames) = (0, 0);
        let offering = Instant::now();
        let live = self.live.as_mut().ok_or(SessionError::NoSession)?;
        let mut occupied = Vec::new();
        for (index, (block, &(_, key))) in self.guest.memory().iter().zip(&live.ram).enumerate() {
            // Again, now that the guest stands still: what was populated since is offered too, and nothing is given up after this.
            let before = live.occupied.get(index).map_or(&[][..], Vec::as_slice);
            let extents = block.file.occupancy_since(before)?;
            live.owner.extend_read(key, &extents)?;
            let classes = RegionClasses::from_occupancy(block.id, block.file.len() as u64, block.page_size, &extents);
            peer_frames += classes.frames(PageClass::Peer);
            zero_frames += classes.frames(PageClass::Zero);
            map.push(classes);
            occupied.push(extents);
        }
        live.occupied = occupied;
        if let Some(registered) = live.registrations.take(offering.elapsed()) {
            self.note(registered);
        }
        if let (Some((reader, target)), Some(tether)) = (self.reserved.take(), &self.config.proposal.tether) {
            let lease = tether.lease.length;
            // Epoch 0: kept before the destination hears a word of it.
            let state = self.keep.fold_state(target, limits(self.guest.memory()), device_state.clone())?;
            let state = state.with_storage(self.guest.storage());
            self.start_folder(reader, state, lease)?;
        }
        let nonce = fresh_nonce()?;
        self.nonces.push(nonce);
        let device_state_bytes = device_state.len() as u64;
        let because = self.note(Kind::SwitchSent { peer_frames, zero_frames, device_state_bytes });
        self.answer_due = Some(Deadline::after(bounds.switch));
        self.tell(&ToDestination::Switch { map, device_state, nonce, because })?;
        reached("switch-told");
        Ok(())
    }

    /// The guest runs at the destination, and what that lacks does not change here any more. Where no thread can be had the pages are read
    /// as they are.
    pub(super) fn look_for_zeros(&mut self) {
        let Some(live) = &mut self.live else { return };
        if live.fabric != FabricKind::Tcp {
            return;
        }
        let blocks = self.guest.memory().iter().zip(std::mem::take(&mut live.occupied));
        let look = |(block, extents): (&RamBlock, Vec<Extent>)| Looked {
            id: block.id,
            page_size: block.page_size,
            memory: Arc::clone(&block.alias),
            extents,
        };
        let bound = self.config.bounds.handshake;
        live.zeros = ZeroLook::start(blocks.map(look).collect(), Arc::clone(&live.control), bound).ok();
    }

    /// Begins to read the ring of the live session and to fold. No lease is granted yet.
    pub(super) fn start_folder(
        &mut self,
        reader: RingReader,
        state: FoldState,
        lease: Duration,
    ) -> Result<(), SourceError> {
        let live = self.live.as_ref().ok_or(SessionError::NoSession)?;
        let owner = OwnerRegion::new(Arc::clone(&live.owner_region));
        owner.set_folded(state.epoch());
        owner.set_applied(state.epoch());
        let config = FoldConfig { lease, granting: false, ..FoldConfig::default() };
        let start = || Folder::start(config, Arc::clone(&live.ring), owner, reader, state);
        self.folder = Some(live.placement.run_near(start).map_err(io("start folding"))?);
        Ok(())
    }

    pub(super) fn record_release(&mut self) -> Option<Event> {
        reached("release-due");
        if let Err(error) = self.give_up_disks() {
            self.note(Kind::Failed {
                what: explain(&error),
                advice: "The tether is kept, and the destination asks again.".to_owned(),
            });
            self.keep_disks();
            return Some(Event::ReleaseFailed);
        }
        let session = self.live.as_ref().map_or(0, |live| live.nonce);
        match self.keep.release(session, self.state.owner_epoch()) {
            Ok(path) => {
                self.note(Kind::ReleaseRecorded { path: path.display().to_string() });
                self.note(Kind::Released { total_us: us(self.paused_at.elapsed()) });
                Some(Event::ReleaseRecorded)
            }
            Err(error @ ReleaseError::NotWritten { .. }) => {
                self.keep_disks();
                self.note(Kind::Failed {
                    what: explain(&error),
                    advice: "The tether is kept; make room or mend the directory, and the destination asks again."
                        .to_owned(),
                });
                Some(Event::ReleaseFailed)
            }
            Err(error @ ReleaseError::Unknown { .. }) => {
                let what = explain(&error);
                self.why = what.clone();
                let advice = "This host will not resume the guest; it runs on at the destination, tethered. Look at the file and mend the disk. \
                              SIGINT ends this host's part, and the guest is then the destination's to promote.";
                self.note(Kind::Failed { what, advice: advice.to_owned() });
                None
            }
        }
    }

    /// Before the release is written down: from then on the destination may write the images, so nothing here may.
    fn give_up_disks(&mut self) -> Result<(), GuestError> {
        let Some(storage) = self.guest.storage() else { return Ok(()) };
        if let Some(folder) = &self.folder {
            folder.hold(true);
        }
        storage.give_up()
    }

    /// The release did not come about. Where even this fails the next epoch cannot be done to the images, and its folding says so.
    fn keep_disks(&mut self) {
        let Some(storage) = self.guest.storage() else { return };
        if let Err(error) = storage.keep() {
            let advice =
                "Free the image: nothing of the guest's can be written to it, and the tether will end.".to_owned();
            self.note(Kind::Failed { what: explain(&error), advice });
        }
        if let Some(folder) = &self.folder {
            folder.hold(false);
        }
    }
}
