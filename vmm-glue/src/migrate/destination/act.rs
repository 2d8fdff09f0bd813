//! What a destination does: the guest, the gate, the tether, the words to the source.

use super::{Destination, ENDED_BY_SIGNAL};
use crate::migrate::observation::{Kind, named_state};
use crate::migrate::protocol::ToSource;
use crate::migrate::tethering::Leftover;
use belay_checkpoint::ownership::Named;
use belay_checkpoint::ownership::destination::{Action, Event, State};
use belay_transport::stop_point::reached;
use belay_transport::{Deadline, explain};
use std::sync::Arc;
use std::time::Instant;

impl Destination<'_> {
    /// Does one thing; what came of it, if that is an event.
    pub(super) fn carry_out(&mut self, action: Action) -> Option<Event> {
        match action {
            Action::ResumeGuest => {
                reached("go-heard");
                self.resume_guest()
            }
            Action::SendResumed => {
                reached("tether-started");
                self.send(&ToSource::Resumed { because: self.last.clone() })
            }
            Action::SendSwitchFailed => {
                let _ = self.tell(&ToSource::Failed { reason: self.why.clone(), because: self.last.clone() });
                None
            }
            Action::StartTether { .. } => {
                let Some(tethering) = &mut self.tethering else {
                    // Without one by agreement there is nothing to start; one that was stopped cannot start again over this session.
                    return self.proposal.tether.is_some().then_some(Event::CommitFailed);
                };
                let guest = self.guest.take()?;
                let (output, observer) = (Arc::clone(&self.output), self.observer.clone());
                let recording = self.config.recording.clone();
                match tethering.start(guest, output, observer, self.last.clone(), recording) {
                    Ok(()) => None,
                    Err(error) => {
                        self.why = explain(&error);
                        Some(Event::CommitFailed)
                    }
                }
            }
            Action::StopTether => {
                self.stop_tether();
                None
            }
            Action::ShutGate => {
                self.output.shut();
                None
            }
            Action::OpenGate => {
                match self.proposal.tether {
                    Some(_) => self.output.reopen(),
                    // Nothing can catch this guest, so nothing is held for it.
                    None => self.output.open_for_good(),
                }
                None
            }
            Action::OpenGateForGood => {
                // Before anything leaves that nothing covers: a page server after this one must not ask whose the guest is.
                self.lay_down_will(true);
                self.own_disks();
                None
            }
            Action::StopGuest => Some(match self.stop_guest() {
                true => Event::GuestStopped,
                false => Event::StopTimedOut,
            }),
            // Guest RAM lives as long as this process does.
            Action::KeepMemory => None,
            Action::AskFate { .. } => {
                // A tether is made once a session, so over this one there is no way back to Tethered, and the answer that there is must
                // not be asked for. The source is told instead, so that it need not wait for silence; what it does with the guest
                // comes as its fate, or over another session, which the source dials ([`super::resume`]).
                let _ = self.tell(&ToSource::Failed { reason: self.why.clone(), because: self.last.clone() });
                None
            }
            Action::SendGuestGone => {
                // Where the stopped tether was noticed sooner the source has hung up; its last words, if any, are still to be read.
                let _ = self.tell(&ToSource::GuestGone { because: self.last.clone() });
                if self.why == ENDED_BY_SIGNAL {
                    self.leaving = Some(Deadline::after(self.config.bounds.handshake));
                }
                None
            }
            Action::AskRelease => {
                let because =
                    self.note(Kind::State { state: "release-asked".to_owned(), why: "every page is here".to_owned() });
                let asked = self.send(&ToSource::ReleaseAsked { all_landed: true, because });
                reached("release-asked");
                asked
            }
            Action::Claim { owner_epoch } => self.claim(owner_epoch, false),
            Action::DiscardGuest => {
                self.stop_guest();
                None
            }
            Action::Report(named) => {
                // Revoked, it is about to retire: nothing is asked of anybody.
                if named == Named::Fenced && matches!(self.state, State::Fenced(fenced) if !fenced.revoked) {
                    let what = format!("cut off from the source: {}", self.why);
                    let advice = "The guest is stopped and its memory kept. If the source has it, this host hears of it and retires; if \
                                  the source is gone for good, `belay status` here says whether it can be promoted."
                        .to_owned();
                    self.note(Kind::Failed { what, advice });
                }
                let why = match named {
                    Named::PagesMissing => format!("{named}: {} pages are missing", self.pages_missing()),
                    Named::AwaitingArbiter if self.claiming.told_away() => return None,
                    _ => named.to_string(),
                };
                self.note(Kind::State { state: named_state(named), why });
                None
            }
        }
    }

    /// Nothing leaves that shows what a guest wrote before its images have it, here or at the source.
    fn own_disks(&mut self) {
        let owned = match &self.storage {
            Some(storage) => storage.own(Deadline::after(self.config.bounds.release)),
            None => Ok(()),
        };
        match owned {
            Ok(()) => self.output.open_for_good(),
            Err(error) => {
                let advice = "The guest is this host's own and runs; what it sends is held until its disks are this host's too. Free the image: \
                              the disk relay goes on trying, and holds what the guest writes meanwhile. End no relay.";
                self.note(Kind::Failed { what: explain(&error), advice: advice.to_owned() });
            }
        }
    }

    pub(super) fn send(&mut self, message: &ToSource) -> Option<Event> {
        match self.tell(message) {
            Ok(()) => None,
            Err(error) => {
                self.why = explain(&error);
                Some(Event::ConnectionClosed)
            }
        }
    }

    pub(super) fn resume_guest(&mut self) -> Option<Event> {
        let Some(guest) = &mut self.guest else { return None };
        match guest.resume() {
            Ok(()) => {
                let nonce = self.nonces.last().copied().unwrap_or(0);
                if self.resumed_at.is_none() {
                    self.resumed_at = Some(Instant::now());
                }
                if let Some(engine) = &self.engine {
                    engine.resume_background();
                }
                self.note(Kind::Resumed { nonce });
                reached("resumed");
                Some(Event::GuestResumed)
            }
            Err(error) => {
                self.why = explain(&error);
                Some(if matches!(self.state, State::Tethered { .. }) { Event::GuestDied } else { Event::PrepareFailed })
            }
        }
    }

    /// Whether the guest stands still.
    pub(super) fn stop_guest(&mut self) -> bool {
        let Some(guest) = &mut self.guest else { return false };
        match guest.pause(Deadline::after(self.config.bounds.stop)) {
            Ok(()) => true,
            Err(error) => {
                self.note(Kind::Failed {
                    what: explain(&error),
                    advice: "Its output is shut; it waits for a page that will not come.".to_owned(),
                });
                false
            }
        }
    }

    pub(super) fn stop_tether(&mut self) {
        let Some(tethering) = self.tethering.take() else { return };
        let (end, summary) = tethering.stop();
        if let Some(summary) = summary {
            self.note(summary);
        }
        let Some(mut end) = end else { return };
        self.inherited = false;
        self.leftover = Some(Leftover { tracker: end.tracker, carried: end.uncommitted });
        // A tether that failed, even while it was being stopped, leaves its guest stopped, because nothing the guest did after that
        // could be caught. An owner's guest needs no catching.
        if end.paused
            && matches!(self.state, State::Owner)
            && let Err(error) = end.guest.resume()
        {
            let advice = "The guest is this host's own and stands still.".to_owned();
            self.note(Kind::Failed { what: explain(&error), advice });
        }
        self.guest = Some(end.guest);
    }
}
