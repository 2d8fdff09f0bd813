//! What a source does: the switch, the words to the destination, the release.

use super::{Source, SourceError, fresh_nonce, io};
use crate::migrate::lease::{Silence, boot_time};
use crate::migrate::observation::{Kind, named_state, us};
use crate::migrate::protocol;
use crate::migrate::protocol::ToDestination;
use crate::migrate::release::{ReleaseError, ReleaseRecord};
use crate::migrate::switch_map::{PageClass, RegionClasses};
use belay_checkpoint::fold::{FoldConfig, FoldState, FoldTarget, Folder};
use belay_checkpoint::ownership::Named;
use belay_checkpoint::ownership::source::{Action, Event};
use belay_checkpoint::record::Limits;
use belay_checkpoint::ring::{OwnerRegion, RingReader};
use belay_transport::stop_point::reached;
use belay_transport::{Deadline, PAGE_SIZE};
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
                if let (Some(folder), Some(tether)) = (&self.live.folder, &self.config.proposal.tether) {
                    folder.set_granting(true);
                    self.live.lease_ends = None;
                    self.live.silence = Some(Silence::new(tether.lease.silence_bound(), boot_time()));
                }
                None
            }
            Action::WithdrawLease => {
                if let Some(folder) = &self.live.folder {
                    folder.set_granting(false);
                }
                let lasts =
                    self.config.proposal.tether.as_ref().map_or(Duration::ZERO, |tether| tether.lease.silence_bound());
                self.live.lease_ends = Some(boot_time() + lasts);
                None
            }
            Action::Revoke { .. } => self.revoke(),
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
            Action::AnswerFate(fate) => {
                let _ = self.tell(&ToDestination::Fate { fate, because: self.last.clone() });
                None
            }
            // Guest RAM and ring live as long as this process does.
            Action::KeepMemory => None,
            Action::Report(named) => self.report(named),
        }
    }

    pub(super) fn report(&mut self, named: Named) -> Option<Event> {
        self.note(Kind::State { state: named_state(named), why: named.to_string() });
        let advice = match named {
            Named::AwaitingOperator if self.config.catch_on_loss => return Some(Event::OperatorCatch),
            Named::AwaitingOperator => {
                "The guest's memory is kept here. Make sure that the destination shows no more output, then send SIGINT: that is your \
                 word for the catch. --catch-on-loss gives it beforehand."
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
        self.why = protocol::explain(error);
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
        let mut map = Vec::new();
        let (mut peer_frames, mut zero_frames) = (0, 0);
        let offering = Instant::now();
        for (block, &(_, key)) in self.guest.memory().iter().zip(&self.live.ram) {
            // Again, now that the guest stands still: what was populated since is offered too, and nothing is given up after this.
            let extents = block.file.occupancy()?;
            self.live.owner.extend_read(key, &extents)?;
            let classes = RegionClasses::from_occupancy(block.id, block.file.len() as u64, block.page_size, &extents);
            peer_frames += classes.frames(PageClass::Peer);
            zero_frames += classes.frames(PageClass::Zero);
            map.push(classes);
        }
        if let Some(registered) = self.live.registrations.take(offering.elapsed()) {
            self.note(registered);
        }
        if let (Some(reserved), Some(tether)) = (self.live.reserved.take(), &self.config.proposal.tether) {
            let start = || self.start_folder(reserved, device_state.clone(), tether.lease.length);
            let folder = self.live.placement.run_near(start)?;
            self.live.folder = Some(folder);
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

    pub(super) fn start_folder(
        &self,
        (reader, target): (RingReader, FoldTarget),
        device_state: Vec<u8>,
        lease: Duration,
    ) -> Result<Folder, SourceError> {
        let blocks = self.guest.memory();
        let pages = |bytes: usize| (bytes / PAGE_SIZE) as u64;
        let limits = Limits::for_regions(blocks.iter().map(|block| (block.id, pages(block.file.len()))));
        let state = FoldState::new(target, limits, device_state);
        let config = FoldConfig { lease, ..FoldConfig::default() };
        let owner = OwnerRegion::new(Arc::clone(&self.live.owner_region));
        Folder::start(config, Arc::clone(&self.live.ring), owner, reader, state).map_err(io("start folding"))
    }

    pub(super) fn record_release(&mut self) -> Option<Event> {
        reached("release-due");
        let owner_epoch = self.state.owner_epoch().0;
        let record = ReleaseRecord::new(self.live.nonce, owner_epoch, self.config.address.to_string());
        match record.write(&self.config.state_dir) {
            Ok(path) => {
                self.note(Kind::ReleaseRecorded { path: path.display().to_string() });
                self.note(Kind::Released { total_us: us(self.paused_at.elapsed()) });
                Some(Event::ReleaseRecorded)
            }
            Err(error @ ReleaseError::NotWritten { .. }) => {
                self.note(Kind::Failed {
                    what: protocol::explain(&error),
                    advice: "The tether is kept; make room or mend the directory, and the destination asks again."
                        .to_owned(),
                });
                Some(Event::ReleaseFailed)
            }
            Err(error @ ReleaseError::Unknown { .. }) => {
                let what = protocol::explain(&error);
                self.why = what.clone();
                let advice = "This host will not resume the guest; it runs on at the destination, tethered. Look at the file and mend the disk. \
                              SIGINT ends this host's part, and the guest is then the destination's to promote.";
                self.note(Kind::Failed { what, advice: advice.to_owned() });
                None
            }
        }
    }
}
