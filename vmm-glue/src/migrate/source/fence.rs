//! When the operator's fence hook is run, and what its success allows. Under `--output lease` it runs as soon as the destination is lost, beside
//! the lease and the operator's word, which go on counting as without it. Where it was asked for always, no catch revokes before the
//! destination's death is proven: a revocation then begins with the fence.

use super::herald::NO_SESSION;
use super::{Happening, Source};
use crate::fence_hook::{Report, Runs, Target, Turn};
use crate::migrate::observation::Kind;
use belay_checkpoint::outbox::OutputMode;
use belay_checkpoint::ownership::source::{CatchStep, Event, State};
use belay_transport::explain;
use belay_transport::session::Address;

/// What a source knows of its fence.
#[derive(Debug, Default)]
pub(super) struct Fence {
    runs: Option<Runs>,
    /// Of the runs that are wanted: what earlier ones still say means nothing.
    number: u64,
    turn: Turn,
    /// The destination of the current owner epoch has provably ended.
    proven: bool,
    /// A revocation waits for that.
    awaited: bool,
}

impl Source<'_> {
    /// Whether no catch revokes before the fence hook has succeeded.
    pub(super) fn fence_is_always_asked(&self) -> bool {
        self.config.fence.as_ref().is_some_and(|hook| hook.always)
    }

    /// Revokes; where the fence is asked for always, once the destination's death is proven.
    pub(super) fn revoke_once_fenced(&mut self) -> Option<Event> {
        if self.fence.proven || !self.fence_is_always_asked() {
            return self.revoke();
        }
        // What a revocation would do first, and nothing that needs a proof.
        if let Some(folder) = &self.folder {
            folder.set_granting(false);
        }
        self.fence.awaited = true;
        let why = "the catch goes on when the fence hook has succeeded (--fence-always)".to_owned();
        self.waits_for_a_person = true;
        self.words.board.entered("awaiting-fence", Some(self.state.owner_epoch().0), &why);
        self.note(Kind::State { state: "awaiting-fence".to_owned(), why });
        None
    }

    /// The destination's VMM has ended, as `by` proves.
    pub(super) fn death_proven(&mut self, by: &str) -> Option<Event> {
        self.fence.proven = true;
        if std::mem::take(&mut self.fence.awaited) {
            return self.revoke();
        }
        Some(self.lost(Event::DeathProven, by))
    }

    /// Begins or ends the hook's runs, as the state now asks for.
    pub(super) fn see_to_the_fence(&mut self) {
        let Some(hook) = &self.config.fence else { return };
        let wanted = match self.state {
            State::Serving(now) => {
                self.fence.proven = now.death_proven;
                now.failed && now.mode == OutputMode::Lease && !now.recording_release && !now.death_proven
            }
            State::Revoking { step: CatchStep::Revoke, .. } => self.fence.awaited,
            _ => false,
        };
        if wanted == self.fence.runs.is_some() {
            return;
        }
        self.fence.number += 1;
        self.fence.runs = None;
        if !wanted {
            return;
        }
        let (number, happened) = (self.fence.number, self.happened.clone());
        let say = move |report| {
            // Waits while the main loop is busy; a main loop that is gone hears nothing.
            let _ = happened.send((NO_SESSION, Happening::Fence(number, report)));
        };
        let target = self.target();
        let why = format!("the fence hook is run for {} under owner epoch {}", target.host, target.owner_epoch);
        match Runs::start(hook.clone(), target, Turn::clone(&self.fence.turn), say) {
            Ok(runs) => {
                self.fence.runs = Some(runs);
                self.note(Kind::State { state: "fence-hook-started".to_owned(), why });
            }
            Err(error) => {
                let what = format!("the fence hook cannot be run, no thread can be had: {error}");
                let advice = "It is tried again with the next sign of loss, or when the catch is ordered.".to_owned();
                self.note(Kind::Failed { what, advice });
            }
        }
    }

    /// Whom the hook is to end: the destination that has, or had, the guest.
    fn target(&self) -> Target {
        let address = &self.config.address;
        let now = self.state.owner_epoch().0;
        Target {
            host: match address {
                Address::Tcp(host_and_port) => {
                    let host = host_and_port.rsplit_once(':').map_or(host_and_port.as_str(), |(host, _)| host);
                    host.trim_start_matches('[').trim_end_matches(']').to_owned()
                }
                Address::Unix(_) => address.to_string(),
            },
            // A revocation has counted on already.
            owner_epoch: if matches!(self.state, State::Revoking { .. }) { now.saturating_sub(1) } else { now },
            migration: self.config.proposal.identity.migration.to_string(),
        }
    }

    /// What the hook's runs have come to.
    pub(super) fn fence_said(&mut self, number: u64, report: Report) -> Option<Event> {
        if number != self.fence.number {
            return None;
        }
        match report {
            Report::Proven { took } => {
                self.fence.runs = None;
                let why = format!("it says that the destination is off, after {took:?}");
                self.note(Kind::State { state: "fence-hook-succeeded".to_owned(), why });
                self.death_proven("the fence hook says that it is off")
            }
            Report::Failed { error, again } => {
                let advice = format!(
                    "This proves nothing, so it is run again in {again:?}; {}.",
                    if self.fence.awaited || self.fence_is_always_asked() {
                        "the catch waits for it, with the guest stopped here, and no signal ends that. Mend what it needs; `belay catch` has it run at once"
                    } else {
                        "the lease and your own word (`belay catch`) count as without it"
                    }
                );
                self.note(Kind::Failed { what: explain(&error), advice });
                None
            }
        }
    }

    /// The operator has ordered the catch again: what it waits for is tried at once.
    pub(super) fn hurry_the_fence(&self) {
        if let Some(runs) = &self.fence.runs {
            runs.hurry();
        }
    }

    /// Whether a catch stands still until the destination's death is proven.
    pub(super) fn awaits_fence(&self) -> bool {
        self.fence.awaited
    }

    /// What the process before this one had proof of.
    pub(super) fn take_over_proof(&mut self, state: &State) {
        self.fence.proven = matches!(state, State::Serving(serving) if serving.death_proven);
    }
}
