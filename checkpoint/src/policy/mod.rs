//! When to close an epoch: the policies of the tether loop ([`spec`] has their text form, [`simulator`] compares them on one trace).

pub mod adaptive;
mod learned;
pub mod simulator;
pub mod spec;
pub mod trace;

pub use adaptive::Adaptive;
pub use spec::{PolicyParseError, PolicySpec};
use std::time::Duration;

/// Shortest period that may be asked for. Below it a guest would spend its time being stopped.
pub const SHORTEST_PERIOD: Duration = Duration::from_micros(50);
/// Longest period that may be asked for: output waits for its epoch's commit, and nobody means to wait longer than this.
pub const LONGEST_PERIOD: Duration = Duration::from_secs(60);
/// How often a budget is looked at, at most and at least, while an epoch is open.
const SHORTEST_LOOK: Duration = Duration::from_micros(100);
const LONGEST_LOOK: Duration = Duration::from_millis(20);
/// How often output is looked for by a policy that closes an epoch for it.
const EVENT_LOOK: Duration = Duration::from_millis(1);

/// What the last closed epoch was like. All zero before the first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EpochFacts {
    /// How many have been closed.
    pub closed: u64,
    /// From the close of the epoch before to the close of this one.
    pub lasted: Duration,
    /// Pages its harvest found.
    pub dirty_pages: u64,
    /// What of its time was spent on making its harvest ready, with the guest running, before it was closed.
    pub ahead: Duration,
    /// How long the guest ran in it.
    pub ran: Duration,
    /// How long the guest was stopped for it.
    pub pause: Duration,
    /// The last one that has committed, which may be an earlier one.
    pub committed: Committed,
}

/// What the last committed epoch was like. All zero before the first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Committed {
    /// How many have.
    pub epochs: u64,
    /// Its pages.
    pub pages: u64,
    /// From the guest's resume, or from the commit before it if that came later, until its commit was reported: what it took on the link.
    pub took: Duration,
    /// How long the oldest output of it was held; none, where it had none.
    pub held_output: Option<Duration>,
}

/// What is closed and has not committed yet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OnItsWay {
    /// Its pages.
    pub pages: u64,
    /// Since when the link has been free for it: since the resume, or the commit before it.
    pub since: Duration,
}

/// What is known of the epoch that is open.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Open {
    /// Since the last epoch was closed (or tracking began).
    pub lasted: Duration,
    /// Pages written in it, where [`crate::guest::DirtyTracker::dirty_so_far`] tells.
    pub dirty_pages: Option<u64>,
    /// For how long the oldest output of it has been waiting, if there is any.
    pub output_waits: Option<Duration>,
    pub on_its_way: OnItsWay,
}

impl Open {
    /// Pages written in it: as counted, or what the last epoch's rate makes of its time.
    fn pages(&self, last: &EpochFacts) -> u64 {
        self.dirty_pages.unwrap_or_else(|| pages_at_rate(self.lasted, last))
    }
}

/// What to do about the epoch that is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Stop the guest and harvest.
    CloseNow,
    /// Leave it running and ask again after this long at the latest.
    WaitAtMost(Duration),
}

/// Decides when the open epoch is closed. Asked again and again by the tether loop; keeps no clock of its own.
pub trait Policy: Send {
    /// What to do about the epoch that is `open`; `last` is the last closed one.
    fn next(&mut self, open: &Open, last: &EpochFacts) -> Decision;

    /// How long the guest is held back before it goes on after an epoch was closed, because it writes more than the link carries. `last` is
    /// that epoch, which is on its way, and `on_its_way` what was before it.
    fn hold_back(&mut self, last: &EpochFacts, on_its_way: OnItsWay) -> Duration {
        let _ = (last, on_its_way);
        Duration::ZERO
    }
}

/// When, after the last close, an epoch's time of `longest` is over. A guest that was stopped for most of it, or for longer than it, would be
/// stopped again before it has come anywhere: it runs as long as it was stopped, and no longer than `longest`. Making the harvest ready comes
/// before the close and takes what it took last; at most half of the epoch is given to it.
fn over_after(longest: Duration, last: &EpochFacts) -> Duration {
    let over = longest.max(last.pause.saturating_add(last.pause.min(longest)));
    over - last.ahead.min(over / 2)
}

/// Closes an epoch every `0`, whatever was dirtied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FixedPeriod(pub Duration);

impl Policy for FixedPeriod {
    fn next(&mut self, open: &Open, last: &EpochFacts) -> Decision {
        match over_after(self.0, last).checked_sub(open.lasted) {
            None | Some(Duration::ZERO) => Decision::CloseNow,
            Some(left) => Decision::WaitAtMost(left),
        }
    }
}

/// Closes an epoch once `pages` are dirty, and at the latest after `at_most`.
///
/// Where the tracker cannot tell how much is dirty, the rate of the last epoch stands in for it; before the first epoch there is
/// none, and `at_most` alone decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirtyBudget {
    /// Pages of 4 KiB.
    pub pages: u64,
    /// Longest an epoch may last.
    pub at_most: Duration,
}

impl Policy for DirtyBudget {
    fn next(&mut self, open: &Open, last: &EpochFacts) -> Decision {
        let Some(left) = over_after(self.at_most, last).checked_sub(open.lasted).filter(|left| !left.is_zero()) else {
            return Decision::CloseNow;
        };
        let dirty = open.pages(last);
        if dirty >= self.pages {
            return Decision::CloseNow;
        }
        // The rate of this epoch where it is known, of the last one otherwise, says when the budget will be met; half of that
        // keeps the overshoot small when the rate rises.
        let ns_a_page = match (dirty, last.dirty_pages) {
            (0, 0) => None,
            (0, pages) => Some(last.lasted.as_nanos() / u128::from(pages)),
            (dirty, _) => Some(open.lasted.as_nanos() / u128::from(dirty)),
        };
        let look = ns_a_page.map_or(LONGEST_LOOK, |ns| {
            let ns = ns.saturating_mul(u128::from(self.pages - dirty)) / 2;
            Duration::from_nanos(u64::try_from(ns).unwrap_or(u64::MAX))
        });
        Decision::WaitAtMost(look.clamp(SHORTEST_LOOK, LONGEST_LOOK).min(left))
    }
}

/// Closes an epoch as soon as output waits or `pages` are dirty, and at the latest after `at_most`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OnEvent {
    /// Pages of 4 KiB.
    pub pages: u64,
    /// Longest an epoch may last.
    pub at_most: Duration,
}

impl Policy for OnEvent {
    fn next(&mut self, open: &Open, last: &EpochFacts) -> Decision {
        // A guest that was stopped for long runs as long before it is stopped for its output.
        if open.output_waits.is_some() && open.lasted >= over_after(SHORTEST_PERIOD, last) {
            return Decision::CloseNow;
        }
        match (DirtyBudget { pages: self.pages, at_most: self.at_most }).next(open, last) {
            Decision::WaitAtMost(wait) => Decision::WaitAtMost(wait.min(EVENT_LOOK)),
            close => close,
        }
    }
}

/// Pages dirtied in `time` at the rate of the epoch `last`.
fn pages_at_rate(time: Duration, last: &EpochFacts) -> u64 {
    let product = time.as_nanos().saturating_mul(u128::from(last.dirty_pages));
    product.checked_div(last.lasted.as_nanos()).map_or(0, |pages| u64::try_from(pages).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn open(lasted: Duration, dirty_pages: Option<u64>) -> Open {
        Open { lasted, dirty_pages, ..Open::default() }
    }

    #[test]
    fn a_fixed_period_closes_when_it_is_over_and_not_before() {
        let mut policy = FixedPeriod(ms(10));
        let facts = EpochFacts::default();
        assert_eq!(policy.next(&open(ms(4), Some(1 << 40)), &facts), Decision::WaitAtMost(ms(6)));
        assert_eq!(policy.next(&open(ms(10), Some(0)), &facts), Decision::CloseNow);
        assert_eq!(policy.next(&open(ms(25), None), &facts), Decision::CloseNow);
    }

    #[test]
    fn an_epoch_whose_harvest_is_made_ready_first_closes_when_its_period_is_over_all_the_same() {
        let ready = |ahead| EpochFacts { lasted: ms(10), ahead, ..EpochFacts::default() };
        let mut policy = FixedPeriod(ms(10));
        assert_eq!(policy.next(&open(ms(6), Some(0)), &ready(ms(3))), Decision::WaitAtMost(ms(1)));
        assert_eq!(policy.next(&open(ms(7), Some(0)), &ready(ms(3))), Decision::CloseNow);
        // It runs for half of its period at least before that begins.
        assert_eq!(policy.next(&open(ms(4), Some(0)), &ready(ms(300))), Decision::WaitAtMost(ms(1)));
        assert_eq!(policy.next(&open(ms(5), Some(0)), &ready(ms(300))), Decision::CloseNow);
    }

    #[test]
    fn a_guest_whose_pauses_take_its_whole_period_runs_all_the_same() {
        let after = |pause| EpochFacts { lasted: ms(10), pause, ..EpochFacts::default() };
        let mut policies: [Box<dyn Policy>; 2] =
            [Box::new(FixedPeriod(ms(10))), Box::new(DirtyBudget { pages: 1000, at_most: ms(10) })];
        for policy in &mut policies {
            // Up to half of a period nothing changes.
            assert_eq!(policy.next(&open(ms(10), Some(0)), &after(ms(5))), Decision::CloseNow);
            for (pause, close_at) in [(8, 16), (10, 20), (200, 210)] {
                assert_eq!(
                    policy.next(&open(ms(close_at - 1), Some(0)), &after(ms(pause))),
                    Decision::WaitAtMost(ms(1))
                );
                assert_eq!(policy.next(&open(ms(close_at), Some(0)), &after(ms(pause))), Decision::CloseNow);
            }
        }
        let longest = EpochFacts { pause: Duration::MAX, ..EpochFacts::default() };
        assert!(matches!(FixedPeriod(ms(10)).next(&open(ms(10), None), &longest), Decision::WaitAtMost(_)));
    }

    #[test]
    fn a_dirty_budget_closes_when_it_is_spent_or_its_time_is_over() {
        let mut policy = DirtyBudget { pages: 1000, at_most: ms(100) };
        let facts = EpochFacts::default();
        assert_eq!(policy.next(&open(ms(1), Some(1000)), &facts), Decision::CloseNow);
        assert_eq!(policy.next(&open(ms(100), Some(0)), &facts), Decision::CloseNow);
        // 100 pages in 1 ms: the budget would be met in 9 ms, looked at after half of that.
        assert_eq!(policy.next(&open(ms(1), Some(100)), &facts), Decision::WaitAtMost(Duration::from_micros(4500)));
        assert_eq!(policy.next(&open(ms(99), Some(1)), &facts), Decision::WaitAtMost(ms(1)));
    }

    #[test]
    fn a_dirty_budget_without_a_count_goes_by_the_last_epochs_rate() {
        let mut policy = DirtyBudget { pages: 1000, at_most: ms(100) };
        let last = EpochFacts { lasted: ms(10), dirty_pages: 500, ..EpochFacts::default() };
        assert!(matches!(policy.next(&open(ms(19), None), &last), Decision::WaitAtMost(_)));
        assert_eq!(policy.next(&open(ms(20), None), &last), Decision::CloseNow);
        assert!(matches!(policy.next(&open(ms(99), None), &EpochFacts::default()), Decision::WaitAtMost(_)));
    }

    #[test]
    fn an_event_policy_closes_for_output_and_for_a_budget_and_lets_a_stopped_guest_run() {
        let mut policy = OnEvent { pages: 1000, at_most: ms(100) };
        let facts = EpochFacts { lasted: ms(10), pause: Duration::from_micros(20), ..EpochFacts::default() };
        let waits = |lasted| Open { output_waits: Some(Duration::ZERO), ..open(lasted, Some(0)) };
        assert_eq!(policy.next(&waits(ms(1)), &facts), Decision::CloseNow);
        assert_eq!(policy.next(&open(ms(1), Some(0)), &facts), Decision::WaitAtMost(EVENT_LOOK));
        assert_eq!(policy.next(&open(ms(1), Some(1000)), &facts), Decision::CloseNow);
        assert_eq!(policy.next(&open(ms(100), Some(0)), &facts), Decision::CloseNow);
        let stopped = EpochFacts { pause: ms(3), ..facts };
        assert!(matches!(policy.next(&waits(ms(3)), &stopped), Decision::WaitAtMost(_)));
        assert_eq!(policy.next(&waits(ms(4)), &stopped), Decision::CloseNow);
    }

    proptest! {
        #[test]
        fn a_budget_never_waits_past_its_end(
            since in 0u64..200_000, dirty in prop::option::of(0u64..5000), last_us in 0u64..100_000, last_pages in 0u64..10_000,
        ) {
            let mut policy = DirtyBudget { pages: 1000, at_most: ms(100) };
            let last = EpochFacts { lasted: Duration::from_micros(last_us), dirty_pages: last_pages, ..EpochFacts::default() };
            match policy.next(&open(Duration::from_micros(since), dirty), &last) {
                Decision::CloseNow => prop_assert!(since >= 100_000 || dirty.is_none_or(|pages| pages >= 1000)),
                Decision::WaitAtMost(wait) => {
                    prop_assert!(!wait.is_zero() && Duration::from_micros(since) + wait <= ms(100));
                    prop_assert!(dirty.is_none_or(|pages| pages < 1000));
                }
            }
        }
    }
}
