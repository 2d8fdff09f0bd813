//! The first step of a catch where there is an arbiter: the guest is claimed, and nothing is revoked before it says that it is this host's.

use super::Source;
use crate::migrate::arbitration::{Answer, Claims, Wanted};
use crate::migrate::observation::Kind;
use belay_checkpoint::arbiter::Standing;
use belay_checkpoint::ownership::OwnerEpoch;
use belay_checkpoint::ownership::source::{CatchStep, Event, State};

impl Source<'_> {
    /// Claims the guest for the catch under `owner_epoch`. Without an arbiter it is granted at once.
    pub(super) fn claim(&mut self, owner_epoch: OwnerEpoch) -> Option<Event> {
        // Before anybody is asked or told: it may be that the guest has to go on at the destination.
        if let Some(waits) = self.waits_for_the_word() {
            return Some(waits);
        }
        let Some(arbitration) = &self.config.arbiter else { return Some(Event::ArbiterGranted) };
        // Whose the guest is is not known from here on, so nobody who comes back can be told.
        (self.herald, self.asking) = (None, None);
        if let Some(claims) = &self.claims {
            claims.hurry();
            return None;
        }
        let migration = self.config.proposal.identity.migration;
        let wanted =
            Wanted { migration, standing: Standing::TakenBack, lent: owner_epoch.before(), asked_before: false };
        match Claims::start(arbitration, wanted) {
            Ok(claims) => {
                self.claims = Some(claims);
                let why = format!("guest {} at {}", arbitration.guest, arbitration.endpoint);
                self.note(Kind::State { state: "claiming".to_owned(), why });
                None
            }
            Err(error) => {
                self.why = format!("the arbiter cannot be asked, no thread can be had: {error}");
                Some(Event::CatchFailed { can_retry: true })
            }
        }
    }

    /// What the arbiter has said.
    pub(super) fn arbiter_said(&mut self, answer: Answer) -> Option<Event> {
        match answer {
            Answer::Granted { record } => {
                self.claims = None;
                self.note(Kind::State { state: "arbiter-granted".to_owned(), why: record });
                Some(Event::ArbiterGranted)
            }
            Answer::Refused { record } => {
                self.claims = None;
                self.why = format!("the arbiter says that the destination has the guest: {record}");
                Some(Event::ArbiterRefused)
            }
            Answer::Away { why, .. } if why == self.arbiter_away => None,
            Answer::Away { why, .. } => {
                self.arbiter_away.clone_from(&why);
                let advice = "Nobody takes the guest meanwhile: nothing is revoked, its memory is kept here, and the arbiter is asked again every few \
                              seconds. Mend the arbiter; `belay catch` asks at once. If it is gone for good, and the destination too: `belay catch --force`.";
                self.note(Kind::Failed { what: why, advice: advice.to_owned() });
                Some(Event::ArbiterAway)
            }
        }
    }

    /// The operator's word takes the place of the arbiter's: on what that stands is noted for whoever looks into it afterwards.
    pub(super) fn caught_by_force(&mut self) -> Event {
        self.claims = None;
        let why = format!(
            "it stands on the operator's word alone that the destination neither has this guest nor ever will: the arbiter has not said so ({}). If that \
             word is wrong, two hosts run it",
            if self.arbiter_away.is_empty() { "it was asked" } else { &self.arbiter_away }
        );
        self.note(Kind::State { state: "caught-by-force".to_owned(), why });
        Event::CatchByForce
    }

    /// Whether the catch waits for the arbiter. Asked for by the operator, it is asked at once.
    pub(super) fn hurry_the_arbiter(&self) -> bool {
        let waits = matches!(self.state, State::Revoking { step: CatchStep::Claim, .. });
        if let (true, Some(claims)) = (waits, &self.claims) {
            claims.hurry();
        }
        waits && self.claims.is_some()
    }
}
