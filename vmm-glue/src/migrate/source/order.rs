//! What a source does with an order, and what it shows of itself.

use super::prepare::NOT_LEFT_YET;
use super::{BY_ORDER, Outcome, Source};
use crate::migrate::operator::{Ask, Order};
use belay_checkpoint::ownership::source::{CatchStep, Event, State};

impl Source<'_> {
    /// Judges an order by where this host stands; what it makes happen.
    pub(super) fn order(&mut self, order: Order) -> Option<Event> {
        let tethered = self.config.proposal.tether.is_some();
        let untakable = self.untakable();
        let event = match (order.ask, self.state) {
            (Ask::Release, _) => {
                Err("a release is asked for where the guest runs: give this order at the destination".to_owned())
            }
            (Ask::Promote { .. }, _) => {
                Err("only a destination that is cut off can be promoted; this is the source".to_owned())
            }
            (Ask::Cancel, State::Switching { handed_over: false, .. }) => {
                Ok((Event::Cancelled, "the switch is being taken back"))
            }
            (Ask::Cancel, State::Switching { .. } | State::Serving(_) | State::Resuming(_)) => {
                Err("the guest has left this host; `belay catch` takes it back".to_owned())
            }
            (Ask::Catch, State::Switching { handed_over: false, .. }) => Err(NOT_LEFT_YET.to_owned()),
            (Ask::Catch, State::Serving(serving)) if serving.recording_release => Err(format!(
                "a release is being written down, and whether it is on disk is not known: {}",
                if self.why.is_empty() { "ask again in a moment" } else { &self.why }
            )),
            (Ask::Catch, State::Switching { .. } | State::Serving(_)) if !tethered => {
                Err("it moved without a tether, so there is no checkpoint: taking it back would lose it".to_owned())
            }
            // Sent on its way, and nobody has said yet that it runs: taken back like a switch that fails late.
            (Ask::Catch, State::Switching { .. }) => Ok((Event::Cancelled, "the guest is being taken back")),
            (Ask::Catch, State::Serving(_) | State::Resuming(_)) => Ok((Event::OperatorCatch, "the catch is ordered")),
            (Ask::Catch, State::Revoking { stuck: true, .. }) if untakable.is_some() => {
                let why = untakable.unwrap_or_default();
                Err(format!("{why}. Trying again changes nothing: `belay catch --older` goes on from that one"))
            }
            (Ask::CatchOlder, State::Revoking { stuck: true, .. }) if untakable.is_some() => {
                Ok((Event::OperatorCatch, "the guest is taken back from an older checkpoint"))
            }
            (Ask::CatchOlder, _) => Err("no checkpoint has been refused here, so the newest is what the guest comes back from: `belay catch`".to_owned()),
            (Ask::Catch, State::Revoking { step, stuck, .. }) => {
                self.hurry_the_fence();
                let asks_arbiter = self.hurry_the_arbiter();
                // An order never ends the only process that has the guest; a signal may.
                self.ordered_again = stuck && step != CatchStep::Fold;
                Ok((
                    Event::OperatorCatch,
                    match stuck {
                        true => "the catch is tried again",
                        false if asks_arbiter => "the catch waits for the arbiter, which is asked again now",
                        false if self.awaits_fence() => "the catch waits for the fence hook, which is run again now",
                        false => "a catch is under way",
                    },
                ))
            }
            (Ask::CatchByForce, State::Revoking { step: CatchStep::Claim, .. }) => {
                Ok((Event::CatchByForce, "the guest is taken back without the arbiter's word"))
            }
            (Ask::CatchByForce, _) => Err("force takes the place of an arbiter that a catch waits for, and none does: `belay catch` orders one, and \
                                           `belay status` says how it stands"
                .to_owned()),
            (ask, state) => {
                Err(format!("the migration is over here ({}): there is nothing to {ask}", state.name().to_lowercase()))
            }
        };
        match event {
            Ok((event, what)) => {
                let older = order.ask == Ask::CatchOlder;
                self.pending.accept(order, what);
                Some(match event {
                    Event::OperatorCatch if older => self.caught_from_older(),
                    Event::OperatorCatch => self.lost(event, BY_ORDER),
                    Event::CatchByForce => self.caught_by_force(),
                    event => {
                        self.why = "the operator cancelled".to_owned();
                        event
                    }
                })
            }
            Err(why) => {
                order.refuse(why);
                None
            }
        }
    }

    /// Tells those who wait how their orders ended: by the role's outcome where there is one, else by its state.
    pub(super) fn settle_orders(&mut self, outcome: Option<&Outcome>) {
        let state = self.state;
        let (why, back) = (&self.why, self.recovered.as_ref().map(|recovered| recovered.epoch));
        self.pending.settle(|ask| match (ask, state, outcome) {
            (Ask::Catch | Ask::CatchByForce | Ask::CatchOlder, State::Running { .. }, _) if back.is_some() => {
                Some(Ok(format!("the guest runs here again, from {}", back.expect("asked above"))))
            }
            (_, State::Running { .. }, _) => Some(Ok("the guest never left and runs here".to_owned())),
            (_, State::Released { .. }, _) => Some(Err("the guest was released to the destination before".to_owned())),
            (_, State::Lost { .. }, _) => Some(Err(format!("neither host can run the guest: {why}"))),
            (_, State::Ceded { .. }, _) => Some(Err(format!("the guest is the destination's: {why}"))),
            (_, State::Revoking { stuck: true, .. }, _) => {
                Some(Err(format!("the catch is stuck, nothing is lost: {why}. Mend it and order it again")))
            }
            (_, _, Some(_)) => Some(Err(format!("this host's part has ended: {why}"))),
            (_, _, None) => None,
        });
    }

    /// Shows what changes all the time.
    pub(super) fn show(&self) {
        if let Some(folder) = &self.folder {
            let status = folder.status();
            self.words.board.folded(status.committed.0, status.folded.0, status.folded_pages);
        }
        let ends = match self.state {
            State::Serving(_) => self.lease_ends.or_else(|| self.silence.as_ref().map(|silence| silence.ends())),
            State::Resuming(_) => self.lease_ends,
            _ => None,
        };
        self.words.board.turned(ends.map(|ends| ends.as_nanos() as u64));
    }
}
