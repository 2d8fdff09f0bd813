//! What the operator says to a role: signals, and orders that are answered.
//!
//! ```text
//! who orders            role
//!   Order(ask) ─────────►   judged by the state it finds
//!   ◄────────── Refused(why)            nothing was done
//!   ◄────────── Accepted(what)          an event of `ownership` was raised by it
//!   ◄────────── CameToPass | Failed     once the state says so; the role never forgets to say it, because it ends with the role
//! ```
//! An order is never an ownership event by itself: the role first asks whether it means anything where it stands, so that a refusal
//! carries the reason and the values, and an order that comes late changes nothing.

use super::status::Board;
use crossbeam_channel::{Receiver, Sender, bounded, never};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Orders not yet looked at; more are refused where they come in.
pub const WAITING_ORDERS: usize = 8;
/// Orders under way whose askers still wait; older ones are told that newer ones took their place.
const PENDING_ORDERS: usize = 32;

/// What an operator can order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ask {
    /// End the tether: the destination asks the source to let go. At the destination.
    Release,
    /// Take the guest back from the newest committed checkpoint. At the source.
    Catch,
    /// As [`Ask::Catch`], without an arbiter that does not answer: the operator's word that the destination neither has the guest nor ever
    /// will.
    CatchByForce,
    /// As [`Ask::Catch`], from the newest checkpoint that can be taken, where a newer one cannot: the operator's word that what the guest did and
    /// showed after it may be undone.
    CatchOlder,
    /// Call the migration off while the guest has not left. At either.
    Cancel,
    /// Give the guest to a destination that is cut off from a source that will not come back. At the destination.
    Promote {
        /// The operator's word that the source does not run the guest and has not taken it back.
        source_is_gone: bool,
        /// Also where an arbiter says otherwise, or does not answer.
        #[serde(default)]
        by_force: bool,
    },
}

impl Ask {
    /// The command that orders it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Release => "release",
            Self::Catch | Self::CatchByForce | Self::CatchOlder => "catch",
            Self::Cancel => "cancel",
            Self::Promote { .. } => "promote",
        }
    }
}

impl fmt::Display for Ask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What becomes of an order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "answer")]
pub enum Answer {
    /// Nothing was done, and why; what would be right is said with it.
    Refused { why: String },
    /// It is under way.
    Accepted { what: String },
    /// It has come to pass.
    CameToPass { what: String },
    /// It was under way and will not come to pass.
    Failed { why: String },
}

impl Answer {
    /// Whether nothing comes after it.
    pub fn is_last(&self) -> bool {
        !matches!(self, Self::Accepted { .. })
    }
}

/// An order and the way back to who gave it.
#[derive(Debug)]
pub struct Order {
    pub ask: Ask,
    answers: Sender<Answer>,
}

impl Order {
    /// An order, and where its answers come: an acceptance and an end, or a refusal. The channel closes after the last.
    pub fn new(ask: Ask) -> (Self, Receiver<Answer>) {
        // Two is all that is ever said, so saying it never waits.
        let (answers, heard) = bounded(2);
        (Self { ask, answers }, heard)
    }

    /// Turns it down.
    pub fn refuse(self, why: impl Into<String>) {
        self.say(Answer::Refused { why: why.into() });
    }

    /// It was accepted and has come to pass at once.
    pub fn done(self, what: &str) {
        self.say(Answer::Accepted { what: what.to_owned() });
        self.say(Answer::CameToPass { what: what.to_owned() });
    }

    fn say(&self, answer: Answer) {
        // Who asked may have gone; the order stands all the same.
        let _ = self.answers.try_send(answer);
    }
}

/// The operator's two voices, and the board on which the role shows how it stands.
#[derive(Debug)]
pub struct Words {
    /// SIGINT and SIGTERM, by number.
    pub signals: Receiver<i32>,
    pub orders: Receiver<Order>,
    pub board: Arc<Board>,
}

/// Why a wait for words ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// The time was over.
    Time,
    Signal,
    /// An order that the waiter took.
    Order,
}

impl Words {
    /// Nobody ever says anything (for tests and benches).
    pub fn none() -> Self {
        Self { signals: never(), orders: never(), board: Arc::default() }
    }

    /// Waits for a signal or an order that `taken` accepts (with what it says of it), at most for `bound`. Every other order is
    /// refused with the reason that `taken` gives.
    pub fn wait(&self, bound: Option<Duration>, taken: impl Fn(Ask) -> Result<String, String>) -> Ended {
        let end = bound.and_then(|bound| Instant::now().checked_add(bound));
        let until = end.map_or_else(never, crossbeam_channel::at);
        // A voice that has gone must not be heard again and again.
        let (mut signals, mut orders) = (self.signals.clone(), self.orders.clone());
        loop {
            crossbeam_channel::select! {
                recv(signals) -> signal => match signal {
                    Ok(_) => return Ended::Signal,
                    Err(_) => signals = never(),
                },
                recv(orders) -> order => match order {
                    Ok(order) => match taken(order.ask) {
                        Ok(what) => {
                            order.done(&what);
                            return Ended::Order;
                        }
                        Err(why) => order.refuse(why),
                    },
                    Err(_) => orders = never(),
                },
                recv(until) -> _ => return Ended::Time,
            }
        }
    }
}

/// Orders that were accepted and have not come to pass.
#[derive(Debug, Default)]
pub struct Pending(Vec<Order>);

impl Pending {
    /// Accepts `order`: `what` is under way now.
    pub fn accept(&mut self, order: Order, what: impl Into<String>) {
        order.say(Answer::Accepted { what: what.into() });
        if self.0.len() == PENDING_ORDERS {
            let oldest = self.0.remove(0);
            oldest.say(Answer::Failed { why: format!("{PENDING_ORDERS} newer orders wait; look at its status") });
        }
        self.0.push(order);
    }

    /// Ends those of which `verdict` says how they ended.
    pub fn settle(&mut self, verdict: impl Fn(Ask) -> Option<Result<String, String>>) {
        self.0.retain(|order| match verdict(order.ask) {
            None => true,
            Some(ended) => {
                order.say(match ended {
                    Ok(what) => Answer::CameToPass { what },
                    Err(why) => Answer::Failed { why },
                });
                false
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROMOTE: Ask = Ask::Promote { source_is_gone: true, by_force: false };

    #[test]
    fn an_order_is_answered_when_it_is_accepted_and_again_when_it_has_come_to_pass() {
        let (order, answers) = Order::new(Ask::Release);
        let mut pending = Pending::default();
        pending.accept(order, "asked");
        assert_eq!(answers.try_recv(), Ok(Answer::Accepted { what: "asked".into() }));
        pending.settle(|ask| (ask == Ask::Catch).then(|| Ok(String::new())));
        assert!(answers.try_recv().is_err(), "a release is not settled by a catch");
        pending.settle(|ask| (ask == Ask::Release).then(|| Ok("released".into())));
        assert_eq!(answers.recv(), Ok(Answer::CameToPass { what: "released".into() }));
        assert!(answers.recv().is_err(), "nothing comes after the last answer");
    }

    #[test]
    fn p7_orders_that_wait_are_bounded_and_the_oldest_hears_of_it() {
        let mut pending = Pending::default();
        let heard: Vec<_> = (0..PENDING_ORDERS + 1)
            .map(|_| {
                let (order, answers) = Order::new(Ask::Catch);
                pending.accept(order, "");
                answers
            })
            .collect();
        let last = |answers: &Receiver<Answer>| answers.try_iter().last();
        assert!(matches!(last(&heard[0]), Some(Answer::Failed { .. })));
        assert!(heard[1..].iter().all(|answers| matches!(last(answers), Some(Answer::Accepted { .. }))));
    }

    #[test]
    fn a_wait_refuses_what_makes_no_sense_there_and_ends_with_what_does() {
        let (signal, signals) = bounded(1);
        let (give, orders) = bounded(WAITING_ORDERS);
        let words = Words { signals, orders, board: Arc::default() };
        let (refused, why) = Order::new(PROMOTE);
        let (taken, what) = Order::new(Ask::Cancel);
        give.send(refused).unwrap();
        give.send(taken).unwrap();
        let judge = |ask| if ask == Ask::Cancel { Ok("cancelled".to_owned()) } else { Err("not here".to_owned()) };
        assert_eq!(words.wait(None, judge), Ended::Order);
        assert_eq!(why.try_recv(), Ok(Answer::Refused { why: "not here".into() }));
        assert_eq!(what.try_iter().last(), Some(Answer::CameToPass { what: "cancelled".into() }));
        assert_eq!(words.wait(Some(Duration::from_millis(1)), judge), Ended::Time);
        signal.send(2).unwrap();
        drop((signal, give));
        assert_eq!(words.wait(None, judge), Ended::Signal);
        assert_eq!(words.wait(Some(Duration::from_millis(1)), judge), Ended::Time, "voices that have gone say nothing");
    }
}
