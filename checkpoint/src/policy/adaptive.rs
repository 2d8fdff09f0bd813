//! Keeps the delay of output under a bound, at the least cost.
//!
//! A longer epoch costs less: a page that is written many times in it is sent once, and the guest is stopped less often. What limits it
//! is output, which waits for the close, the pause and the commit of its epoch. So an epoch is closed when its oldest output has waited
//! for as long as still leaves room for the pause and the commit that its pages are likely to take, both learned from the epochs before;
//! and without output when its pages alone would take nearly all of the bound, so that output which comes next finds room, or when it has
//! lasted for [`LONGEST_IN_BOUNDS`] bounds.
//!
//! A guest that writes more than the link carries is held back before it goes on, for as long as what is on its way needs, so that an epoch of an
//! eighth of the bound finds room after it.
//!
//! What is learned is a mean and a deviation, and the world has worse in store now and then. A reserve takes care of that: it grows by a step
//! whenever output was held for longer than the bound, and shrinks by a small part of the step when it was not, so that fewer than one
//! epoch in a hundred passes the bound.

use super::learned::Line;
use super::{
    Decision, EpochFacts, LONGEST_PERIOD, OnItsWay, Open, Policy, SHORTEST_LOOK, SHORTEST_PERIOD, over_after,
    pages_at_rate,
};
use std::time::Duration;

/// How many bounds an epoch without output may last.
const LONGEST_IN_BOUNDS: u32 = 10;
/// How often an epoch without output is looked at, in parts of the bound.
const LOOKS_A_BOUND: u32 = 16;
/// And of the room that it leaves.
const LOOKS_AHEAD: u32 = 3;
/// The reserve's step, and its range, in parts of the bound.
const RESERVE_STEP: f64 = 0.06;
const RESERVE_EASE: f64 = RESERVE_STEP / 120.0;
const RESERVE_LEAST: f64 = -0.1;
const RESERVE_MOST: f64 = 0.7;

/// A guest is held back only if one of so many epochs had output.
const HEARD_WITHIN: u32 = 10;
/// What an epoch's run is worth, at least, in parts of the room.
const LEAST_RUN: u32 = 8;

/// See the module.
#[derive(Debug, Clone)]
pub struct Adaptive {
    delay_bound: Duration,
    ahead: Line,
    pause: Line,
    commit: Line,
    reserve: f64,
    /// Epochs that were learned from.
    closed: u64,
    committed: u64,
    /// Epochs since one had output.
    silent: u32,
}

impl Adaptive {
    /// Output is to be delayed by no more than `delay_bound`, 99 times of 100.
    pub fn new(delay_bound: Duration) -> Self {
        let (ahead, pause, commit) = Default::default();
        Self { delay_bound, ahead, pause, commit, reserve: RESERVE_STEP, closed: 0, committed: 0, silent: u32::MAX }
    }

    /// The longest an epoch may stay open under such a bound.
    pub fn longest_epoch(delay_bound: Duration) -> Duration {
        delay_bound.saturating_mul(LONGEST_IN_BOUNDS).min(LONGEST_PERIOD)
    }

    /// Of the bound, what is not reserved.
    fn room(&self) -> Duration {
        self.delay_bound.mul_f64(1.0 - self.reserve)
    }

    /// From when it is decided to close an epoch with so many pages until it has committed. The link goes on with what is before it meanwhile.
    fn takes(&self, pages: u64, before: OnItsWay) -> Duration {
        let closing = self.closing(pages);
        closing + self.left_of(before).saturating_sub(closing) + self.commit.likely_at_most(pages)
    }

    /// Until the guest goes on: making the harvest ready, and the pause.
    fn closing(&self, pages: u64) -> Duration {
        self.ahead.likely_at_most(pages) + self.pause.likely_at_most(pages)
    }

    fn left_of(&self, on_its_way: OnItsWay) -> Duration {
        match on_its_way.pages {
            0 => Duration::ZERO,
            pages => self.commit.likely_at_most(pages).saturating_sub(on_its_way.since),
        }
    }

    fn learn(&mut self, last: &EpochFacts) {
        if last.closed != self.closed {
            self.closed = last.closed;
            self.ahead.saw(last.dirty_pages, last.ahead);
            self.pause.saw(last.dirty_pages, last.pause);
        }
        let committed = last.committed;
        if committed.epochs != self.committed {
            self.committed = committed.epochs;
            self.commit.saw(committed.pages, committed.took);
            self.silent = if committed.held_output.is_some() { 0 } else { self.silent.saturating_add(1) };
            if let Some(held) = committed.held_output {
                let step = if held > self.delay_bound { RESERVE_STEP } else { -RESERVE_EASE };
                self.reserve = (self.reserve + step).clamp(RESERVE_LEAST, RESERVE_MOST);
            }
        }
    }
}

impl Policy for Adaptive {
    fn next(&mut self, open: &Open, last: &EpochFacts) -> Decision {
        self.learn(last);
        // A guest that was stopped for long runs as long before it is stopped again.
        let least = over_after(SHORTEST_PERIOD, last);
        if open.lasted < least {
            return Decision::WaitAtMost(least - open.lasted);
        }
        let pages = open.pages(last);
        let (takes, room) = (self.takes(pages, open.on_its_way), self.room());
        let look = self.delay_bound / LOOKS_A_BOUND;
        let left = match open.output_waits {
            // Its pages go on growing meanwhile: half of what is left, then it is looked at again.
            Some(waits) => room.checked_sub(waits + takes).map(|left| left.min((left / 2).max(SHORTEST_LOOK))),
            None if takes + look * 2 >= room => None,
            // The less there is on its way, the more may come before output would wait too long.
            None => {
                let look = look.max((room - takes) / LOOKS_AHEAD);
                Self::longest_epoch(self.delay_bound).checked_sub(open.lasted).map(|left| left.min(look))
            }
        };
        match left {
            None | Some(Duration::ZERO) => Decision::CloseNow,
            Some(left) => Decision::WaitAtMost(left),
        }
    }

    fn hold_back(&mut self, last: &EpochFacts, on_its_way: OnItsWay) -> Duration {
        self.learn(last);
        if self.silent > HEARD_WITHIN {
            return Duration::ZERO;
        }
        // After it, an epoch in which the guest runs for a while must find room within the bound.
        let room = self.room();
        let runs = room / LEAST_RUN;
        let pages = pages_at_rate(runs, &EpochFacts { lasted: last.ran, ..*last });
        let before = self.left_of(on_its_way) + self.commit.likely_at_most(last.dirty_pages);
        let next = self.closing(pages) + self.commit.likely_at_most(pages);
        (before + runs + next).saturating_sub(room).min(self.delay_bound)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Committed;
    use super::*;

    const BOUND: Duration = Duration::from_millis(50);

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// One that has seen epochs of up to 1,000 pages, each page taking 1 µs of pause and 9 µs of commit.
    fn taught() -> (Adaptive, EpochFacts) {
        let mut policy = Adaptive::new(BOUND);
        let mut facts = EpochFacts::default();
        for epoch in 1..=50_u64 {
            let pages = epoch * 317 % 1000;
            facts.closed = epoch;
            facts.lasted = ms(10);
            facts.dirty_pages = pages;
            facts.pause = Duration::from_micros(pages);
            facts.committed =
                Committed { epochs: epoch, pages, took: Duration::from_micros(9 * pages), held_output: None };
            policy.learn(&facts);
        }
        (policy, facts)
    }

    fn closes_at(policy: &mut Adaptive, facts: &EpochFacts, pages: u64, output_at: Option<Duration>) -> Duration {
        let mut lasted = Duration::ZERO;
        for _ in 0..100_000 {
            let output_waits = output_at.and_then(|at| lasted.checked_sub(at));
            match policy.next(&Open { lasted, dirty_pages: Some(pages), output_waits, ..Open::default() }, facts) {
                Decision::CloseNow => return lasted,
                Decision::WaitAtMost(wait) => lasted += wait,
            }
        }
        panic!("never");
    }

    #[test]
    fn output_waits_for_as_long_as_leaves_room_for_pause_and_commit() {
        let (mut policy, facts) = taught();
        // 1,000 pages take 10 ms.
        let at = closes_at(&mut policy, &facts, 1000, Some(ms(2)));
        assert!((ms(33)..ms(43)).contains(&at), "{at:?}");
        let at = closes_at(&mut policy, &facts, 0, Some(ms(100)));
        assert!((ms(140)..=ms(150)).contains(&at), "{at:?}");
    }

    #[test]
    fn what_making_the_harvest_ready_takes_is_part_of_what_output_waits_for() {
        let (mut policy, mut facts) = taught();
        let before = closes_at(&mut policy, &facts, 1000, Some(ms(2)));
        for epoch in 51..=100_u64 {
            let pages = epoch * 317 % 1000;
            (facts.closed, facts.dirty_pages) = (epoch, pages);
            (facts.ahead, facts.pause) = (Duration::from_micros(8 * pages), Duration::from_micros(pages));
            policy.learn(&facts);
        }
        let after = closes_at(&mut policy, &facts, 1000, Some(ms(2)));
        assert!((ms(6)..ms(11)).contains(&(before - after)), "{before:?} {after:?}");
    }

    #[test]
    fn without_output_an_epoch_is_long_unless_its_pages_would_take_the_bound() {
        let (mut policy, facts) = taught();
        assert_eq!(closes_at(&mut policy, &facts, 100, None), ms(500));
        assert!(closes_at(&mut policy, &facts, 4600, None) < ms(2));
    }

    #[test]
    fn a_guest_that_writes_more_than_the_link_carries_is_held_back_and_no_other() {
        let (mut policy, mut facts) = taught();
        // 3,000 pages in 10 ms take 27 ms on the link.
        facts.closed += 1;
        (facts.dirty_pages, facts.ran, facts.pause) = (3000, ms(10), ms(3));
        assert_eq!(policy.hold_back(&facts, OnItsWay::default()), Duration::ZERO, "nobody waits for its output");
        facts.committed =
            Committed { epochs: 51, pages: 500, took: Duration::from_micros(4500), held_output: Some(ms(9)) };
        let held = policy.hold_back(&facts, OnItsWay::default());
        assert!((ms(3)..ms(20)).contains(&held), "{held:?}");
        assert!(policy.hold_back(&facts, OnItsWay { pages: 1000, since: ms(1) }) > held + ms(5));
        assert_eq!(policy.hold_back(&facts, OnItsWay { pages: 1000, since: ms(20) }), held, "about to commit");
        facts.closed += 1;
        (facts.dirty_pages, facts.pause) = (300, Duration::from_micros(300));
        assert_eq!(policy.hold_back(&facts, OnItsWay::default()), Duration::ZERO);
    }

    #[test]
    fn output_that_was_held_too_long_shortens_epochs_and_they_grow_again() {
        let (mut policy, mut facts) = taught();
        let before = closes_at(&mut policy, &facts, 0, Some(ms(0)));
        let mut held = |policy: &mut Adaptive, held| {
            facts.committed.epochs += 1;
            facts.committed =
                Committed { epochs: facts.committed.epochs, held_output: Some(held), ..Committed::default() };
            closes_at(policy, &facts, 0, Some(ms(0)))
        };
        let after = held(&mut policy, ms(51));
        assert!(after < before - ms(2), "{before:?} {after:?}");
        let at_last = (0..300).map(|_| held(&mut policy, ms(49))).last().unwrap();
        assert!(at_last >= before, "{before:?} {at_last:?}");
        for _ in 0..100 {
            held(&mut policy, ms(1000));
        }
        assert!(held(&mut policy, ms(1000)) > ms(10), "there is a limit to that");
    }
}
