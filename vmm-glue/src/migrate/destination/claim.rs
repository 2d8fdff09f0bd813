//! A destination that has lost its source and every page of whose guest is here: the arbiter is asked for the guest, by `--on-source-loss
//! continue` or by the operator's promotion, and with its word this host is the owner.

use super::Destination;
use crate::migrate::arbitration::{Answer, Arbitration, Claims, Wanted};
use crate::migrate::observation::Kind;
use belay_checkpoint::arbiter::{Ruling, Standing};
use belay_checkpoint::ownership::OwnerEpoch;
use belay_checkpoint::ownership::destination::{Event, State};
use belay_transport::explain;
use crossbeam_channel::Receiver;
use std::time::{Duration, Instant};

/// How long the end of a role waits for the arbiter to write down a release.
const KEEP: Duration = Duration::from_secs(1);

/// What a destination makes of an arbiter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DestinationArbiter {
    pub arbitration: Arbitration,
    /// Goes on by itself where the arbiter agrees; otherwise only once it is promoted.
    pub goes_on_alone: bool,
}

/// What a destination knows of its arbiter.
#[derive(Debug, Default)]
pub(super) struct Claiming {
    claims: Option<Claims>,
    /// When it is asked for anew, after it could not be asked.
    due: Option<Instant>,
    /// The operator wants it.
    pub(super) promoted: bool,
    /// That pages are missing was told.
    told_missing: bool,
    /// Why it was away when that was told last.
    away: String,
    /// That state was told.
    away_named: String,
    granted: bool,
}

impl Claiming {
    /// Whether the operator knows already that it is away for this reason.
    pub(super) fn told_away(&mut self) -> bool {
        let told = self.away == self.away_named;
        self.away_named.clone_from(&self.away);
        told
    }

    pub(super) fn answers(&self) -> Option<Receiver<Answer>> {
        self.claims.as_ref().map(|claims| claims.answers().clone())
    }
}

impl Destination<'_> {
    /// What an event is called before people. Where there is no arbiter only an operator's order is granted.
    pub(super) fn named(&self, event: &Event) -> &'static str {
        match event {
            Event::ArbiterGranted if self.config.arbiter.is_none() => "PromotedByOrder",
            event => event.name(),
        }
    }

    /// Asks the arbiter. Without one only an operator's promotion comes here, and that is granted.
    pub(super) fn claim(&mut self, lent: OwnerEpoch, asked_before: bool) -> Option<Event> {
        let Some(DestinationArbiter { arbitration, .. }) = &self.config.arbiter else {
            return Some(Event::ArbiterGranted);
        };
        if let Some(claims) = &self.claiming.claims {
            claims.hurry();
            return None;
        }
        let migration = self.proposal.identity.migration;
        match Claims::start(arbitration, Wanted { migration, standing: Standing::Kept, lent, asked_before }) {
            Ok(claims) => {
                self.claiming.claims = Some(claims);
                let why = format!("guest {} at {}", arbitration.guest, arbitration.endpoint);
                self.note(Kind::State { state: "claiming".to_owned(), why });
                None
            }
            Err(error) => {
                let (why, again) = (format!("no thread can be had to ask it: {error}"), Duration::from_secs(1));
                self.arbiter_said(Answer::Away { why, untouched: !asked_before, again })
            }
        }
    }

    /// What the arbiter has said.
    pub(super) fn arbiter_said(&mut self, answer: Answer) -> Option<Event> {
        match answer {
            Answer::Granted { record } => {
                (self.claiming.claims, self.claiming.granted) = (None, true);
                self.why = format!("the arbiter says that the guest is this host's: {record}");
                self.note(Kind::State { state: "arbiter-granted".to_owned(), why: record });
                Some(Event::ArbiterGranted)
            }
            Answer::Refused { record } => {
                self.claiming.claims = None;
                self.why = format!("the arbiter says that the source has the guest: {record}");
                let what = self.why.clone();
                let advice = "It stays stopped here and its memory is kept. If the source runs it, end this process. If the source died before it \
                              ran it again, and only then: `belay promote --force`.";
                self.note(Kind::Failed { what, advice: advice.to_owned() });
                Some(Event::ArbiterRefused)
            }
            Answer::Away { why, untouched, again } => {
                self.claiming.due = Some(Instant::now() + again);
                let new = why != self.claiming.away;
                if new {
                    self.claiming.away.clone_from(&why);
                    let advice = "Nobody takes the guest meanwhile: it stays stopped here, its memory is kept, and the arbiter is asked again every few \
                                  seconds. Mend the arbiter. If it is gone for good, and the source too: `belay promote --force`.";
                    self.note(Kind::Failed { what: why, advice: advice.to_owned() });
                }
                (new || untouched).then_some(Event::ArbiterAway { untouched })
            }
        }
    }

    /// Whether it is time to ask for the guest, again or at all.
    pub(super) fn wants_to_go_on(&mut self) -> Option<Event> {
        let State::Fenced(now) = self.state else { return None };
        let arbiter = self.config.arbiter.as_ref()?;
        let wanted = arbiter.goes_on_alone || self.claiming.promoted;
        let over = now.revoked || now.guest_dead || now.refused || now.claiming || self.leaving.is_some();
        if !wanted || over || self.claiming.due.is_some_and(|due| Instant::now() < due) {
            return None;
        }
        if !now.all_landed && std::mem::replace(&mut self.claiming.told_missing, true) {
            return None;
        }
        Some(Event::ContinueWanted)
    }

    /// A guest that the source let go of: that it is this host's is written down, for whoever moves it next.
    pub(super) fn keep_the_record(&mut self) {
        let (Some(arbiter), false) = (&self.config.arbiter, self.claiming.granted) else { return };
        let kept = arbiter.arbitration.keep(self.proposal.identity.migration, self.owner_epoch, KEEP);
        let what = match kept {
            Ok(Ruling::Ours(_)) => return,
            Ok(Ruling::Theirs(held)) => format!("the arbiter's record says otherwise: {}", held.claim),
            Err(unruled) => explain(&unruled),
        };
        let guest = &arbiter.arbitration.guest;
        let advice = format!(
            "The guest is this host's own and runs. Before it is moved on from here, see that the arbiter's record of it is right, or remove it: \
             `etcdctl del belay/guest/{guest}`."
        );
        self.note(Kind::Failed { what, advice });
    }
}
