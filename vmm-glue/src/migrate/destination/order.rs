//! What a destination does with an order.

use super::{Destination, DestinationError, Outcome};
use crate::migrate::observation::Kind;
use crate::migrate::operator::{Ask, Order};
use belay_checkpoint::ownership::destination::{Event, State};
use belay_checkpoint::ownership::{Named, OwnerEpoch};
use crossbeam_channel::RecvError;

/// Why most orders mean nothing yet.
pub(super) const NO_GUEST_YET: &str = "no guest runs here yet; `belay cancel` calls the migration off";

/// An order while the guest still runs at the source: only calling it off means something.
pub(super) fn before_the_switch(order: Result<Order, RecvError>) -> Result<(), DestinationError> {
    match order {
        Ok(order) if order.ask == Ask::Cancel => {
            order.done("called off; the guest runs on at the source");
            Err(DestinationError::Cancelled)
        }
        Ok(order) => {
            order.refuse(NO_GUEST_YET);
            Ok(())
        }
        Err(_) => Err(DestinationError::Interrupted),
    }
}

impl Destination<'_> {
    pub(super) fn owner_epoch(&self) -> Option<OwnerEpoch> {
        match self.state {
            State::Preparing { owner_epoch, .. } => owner_epoch,
            State::Tethered { owner_epoch, .. } => Some(owner_epoch),
            State::Fenced(fenced) => Some(fenced.owner_epoch),
            State::Owner | State::Aborted | State::Retired | State::Lost => None,
        }
    }

    /// Pages that are neither here nor given up by the guest.
    pub(super) fn pages_missing(&self) -> u64 {
        // Of the states and not of the engine: a page server that took over has none before its source comes back.
        let counts = self.states.as_ref().map(|states| states.counts()).unwrap_or_default();
        counts.absent + counts.in_flight + counts.failed
    }

    /// Judges an order by where this host stands; what it makes happen.
    pub(super) fn order(&mut self, order: Order) -> Option<Event> {
        let missing = self.pages_missing();
        let some_missing = |means: &str| format!("{missing} pages have not landed here, {means}");
        let event = match (order.ask, self.state) {
            (Ask::Catch | Ask::CatchByForce, _) => Err("a catch is ordered at the source; SIGTERM here gives the guest back".to_owned()),
            (Ask::Cancel, State::Preparing { .. }) => Ok((Event::Cancelled, "the switch is being called off")),
            (Ask::Cancel, State::Tethered { .. } | State::Fenced(_)) => {
                Err("the guest has come; `belay catch` at the source takes it back".to_owned())
            }
            (Ask::Release | Ask::Promote { .. }, State::Preparing { .. }) => Err(NO_GUEST_YET.to_owned()),
            (Ask::Release, State::Tethered { all_landed: false, .. }) => {
                Err(some_missing("and until they have the guest needs the source"))
            }
            (Ask::Release, State::Tethered { .. }) => Ok((Event::ReleaseWanted, "the source is asked to let go")),
            (Ask::Release, State::Fenced(_)) => {
                Err("this host is cut off from the source, which cannot be asked; see `belay promote`".to_owned())
            }
            (Ask::Promote { .. }, State::Tethered { .. }) => {
                Err("the source is heard and tethers this guest: `belay release` asks it to let go".to_owned())
            }
            (Ask::Promote { .. }, State::Fenced(fenced)) if fenced.revoked => {
                Err("the source has taken this guest back".to_owned())
            }
            (Ask::Promote { .. }, State::Fenced(fenced)) if fenced.guest_dead => Err("its VMM has ended".to_owned()),
            (Ask::Promote { .. }, State::Fenced(fenced)) if !fenced.all_landed => {
                Err(some_missing("so this host cannot run the guest alone; its memory is kept"))
            }
            (Ask::Promote { source_is_gone: false, .. }, State::Fenced(_)) => Err(
                "only who knows that the source does not run this guest may order this: a source that had taken it back and shown \
                 output, and died after, has left this host with a past that never was"
                    .to_owned(),
            ),
            (Ask::Promote { by_force: true, .. }, State::Fenced(_)) => {
                Ok((Event::PromotedByForce, "the guest is given to this host by force"))
            }
            (Ask::Promote { .. }, State::Fenced(fenced)) if fenced.refused => Err(format!("{}", Named::TakenBack)),
            (Ask::Promote { .. }, State::Fenced(_)) if self.config.arbiter.is_some() => {
                Ok((Event::Promoted, "the arbiter is asked for the guest"))
            }
            (Ask::Promote { .. }, State::Fenced(_)) => Ok((Event::Promoted, "the guest is given to this host")),
            (ask, state) => {
                Err(format!("the migration is over here ({}): there is nothing to {ask}", state.name().to_lowercase()))
            }
        };
        match event {
            Ok((event, what)) => {
                match order.ask {
                    Ask::Cancel => self.why = "the operator cancelled".to_owned(),
                    Ask::Promote { by_force, .. } => {
                        self.claiming.promoted = true;
                        self.why = "promoted by the operator".to_owned();
                        if by_force {
                            self.promoted_by_force();
                        }
                    }
                    _ => {}
                }
                self.pending.accept(order, what);
                Some(event)
            }
            Err(why) => {
                order.refuse(why);
                None
            }
        }
    }

    /// Says on what a promotion by force stands, for whoever looks into it afterwards.
    fn promoted_by_force(&mut self) {
        let State::Fenced(now) = self.state else { return };
        let arbiter = match &self.config.arbiter {
            None => "there is no arbiter",
            Some(_) if now.refused => "the arbiter says that the source has taken the guest back",
            Some(_) if now.claiming => "the arbiter was asked and has not answered",
            Some(_) => "the arbiter has not agreed",
        };
        let why = format!(
            "it stands on the operator's word alone that the source neither runs this guest nor ever will: {arbiter}. If that word is wrong, two \
             hosts run it"
        );
        self.why = format!("promoted by force: {arbiter}");
        self.note(Kind::State { state: "promoted-by-force".to_owned(), why });
    }

    /// The source did not let go.
    pub(super) fn release_refused(&mut self) {
        self.pending.settle(|ask| {
            (ask == Ask::Release).then(|| Err("the source has refused to let go; its own messages say why".to_owned()))
        });
    }

    /// Tells those who wait how their orders ended.
    pub(super) fn settle_orders(&mut self) {
        let (state, outcome, why) = (self.state, self.outcome, &self.why);
        self.pending.settle(|ask| match (ask, state, outcome) {
            (Ask::Release | Ask::Promote { .. }, State::Owner, _) => {
                Some(Ok("the guest is this host's own".to_owned()))
            }
            (Ask::Promote { by_force: false, .. }, State::Fenced(fenced), _) if fenced.refused => {
                Some(Err(Named::TakenBack.to_string()))
            }
            (Ask::Cancel, State::Aborted, _) => Some(Ok("the guest runs on at the source".to_owned())),
            (Ask::Release, State::Fenced(_), _) => {
                Some(Err(format!("cut off from the source before it let go: {why}")))
            }
            (
                _,
                state,
                Some(Outcome::Owner | Outcome::Aborted | Outcome::Retired | Outcome::Lost | Outcome::Fenced),
            ) => Some(Err(format!("this host's part has ended ({}): {why}", state.name().to_lowercase()))),
            _ => None,
        });
    }
}
