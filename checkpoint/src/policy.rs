//! When to close an epoch: the policies of the tether loop, and their text form (`fixed:10ms`, `dirty:4096,max=100ms`).

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// Shortest period that may be asked for. Below it a guest would spend its time being stopped.
pub const SHORTEST_PERIOD: Duration = Duration::from_micros(50);
/// Longest period that may be asked for: output waits for its epoch's commit, and nobody means to wait longer than this.
pub const LONGEST_PERIOD: Duration = Duration::from_secs(60);
/// How often a budget is looked at, at most and at least, while an epoch is open.
const SHORTEST_LOOK: Duration = Duration::from_micros(100);
const LONGEST_LOOK: Duration = Duration::from_millis(20);

/// What the last closed epoch was like. All zero before the first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EpochFacts {
    /// From the close of the epoch before to the close of this one.
    pub lasted: Duration,
    /// Pages its harvest found.
    pub dirty_pages: u64,
    /// How long the guest was stopped for it.
    pub pause: Duration,
    /// From its close until it was committed; zero while it is not.
    pub commit: Duration,
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
    /// `since_last`: time since the last epoch was closed (or tracking began). `dirty_so_far`: what
    /// [`crate::guest::DirtyTracker::dirty_so_far`] says. `last`: the last closed epoch.
    fn next(&mut self, since_last: Duration, dirty_so_far: Option<u64>, last: &EpochFacts) -> Decision;
}

/// When, after the last close, an epoch's time of `longest` is over. A guest that was stopped for most of it, or for longer than it, would be
/// stopped again before it has come anywhere: it runs as long as it was stopped, and no longer than `longest`.
fn over_after(longest: Duration, last: &EpochFacts) -> Duration {
    longest.max(last.pause.saturating_add(last.pause.min(longest)))
}

/// Closes an epoch every `0`, whatever was dirtied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FixedPeriod(pub Duration);

impl Policy for FixedPeriod {
    fn next(&mut self, since_last: Duration, _dirty_so_far: Option<u64>, last: &EpochFacts) -> Decision {
        match over_after(self.0, last).checked_sub(since_last) {
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
    fn next(&mut self, since_last: Duration, dirty_so_far: Option<u64>, last: &EpochFacts) -> Decision {
        let Some(left) = over_after(self.at_most, last).checked_sub(since_last).filter(|left| !left.is_zero()) else {
            return Decision::CloseNow;
        };
        let dirty = dirty_so_far.unwrap_or_else(|| pages_at_rate(since_last, last));
        if dirty >= self.pages {
            return Decision::CloseNow;
        }
        // The rate of this epoch where it is known, of the last one otherwise, says when the budget will be met; half of that
        // keeps the overshoot small when the rate rises.
        let ns_a_page = match (dirty, last.dirty_pages) {
            (0, 0) => None,
            (0, pages) => Some(last.lasted.as_nanos() / u128::from(pages)),
            (dirty, _) => Some(since_last.as_nanos() / u128::from(dirty)),
        };
        let look = ns_a_page.map_or(LONGEST_LOOK, |ns| {
            let ns = ns.saturating_mul(u128::from(self.pages - dirty)) / 2;
            Duration::from_nanos(u64::try_from(ns).unwrap_or(u64::MAX))
        });
        Decision::WaitAtMost(look.clamp(SHORTEST_LOOK, LONGEST_LOOK).min(left))
    }
}

/// Pages dirtied in `time` at the rate of the epoch `last`.
fn pages_at_rate(time: Duration, last: &EpochFacts) -> u64 {
    let product = time.as_nanos().saturating_mul(u128::from(last.dirty_pages));
    product.checked_div(last.lasted.as_nanos()).map_or(0, |pages| u64::try_from(pages).unwrap_or(u64::MAX))
}

/// A policy as it is written: on the command line, in a config file, in a report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum PolicySpec {
    /// `fixed:10ms`
    Fixed { period: Duration },
    /// `dirty:4096,max=100ms`
    DirtyBudget { pages: u64, at_most: Duration },
}

impl PolicySpec {
    /// The policy it describes.
    pub fn build(&self) -> Box<dyn Policy> {
        match *self {
            Self::Fixed { period } => Box::new(FixedPeriod(period)),
            Self::DirtyBudget { pages, at_most } => Box::new(DirtyBudget { pages, at_most }),
        }
    }

    /// The longest an epoch may stay open under it.
    pub fn longest_epoch(&self) -> Duration {
        match *self {
            Self::Fixed { period } => period,
            Self::DirtyBudget { at_most, .. } => at_most,
        }
    }
}

impl Default for PolicySpec {
    fn default() -> Self {
        Self::Fixed { period: Duration::from_millis(10) }
    }
}

impl fmt::Display for PolicySpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Fixed { period } => write!(f, "fixed:{}", DurationText(period)),
            Self::DirtyBudget { pages, at_most } => write!(f, "dirty:{pages},max={}", DurationText(at_most)),
        }
    }
}

/// Why a text is not a policy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PolicyParseError {
    #[error("`{0}` is not a policy; write fixed:PERIOD (fixed:10ms) or dirty:PAGES,max=PERIOD (dirty:4096,max=100ms)")]
    Unknown(String),
    #[error("`{0}` is not a time; write a number and one of us, ms, s (100us, 2.5ms, 1s)")]
    BadTime(String),
    #[error("a period of {} is out of range; {} to {} can be had", DurationText(*.0), DurationText(SHORTEST_PERIOD), DurationText(LONGEST_PERIOD))]
    OutOfRange(Duration),
    #[error("`{0}` is not a number of pages; write a whole number of 4 KiB pages, 1 or more")]
    BadPages(String),
}

impl FromStr for PolicySpec {
    type Err = PolicyParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let unknown = || PolicyParseError::Unknown(text.to_owned());
        let (kind, rest) = text.split_once(':').ok_or_else(unknown)?;
        match kind {
            "fixed" => Ok(Self::Fixed { period: parse_period(rest)? }),
            "dirty" => {
                let (pages, max) = rest.split_once(",max=").ok_or_else(unknown)?;
                let bad_pages = || PolicyParseError::BadPages(pages.to_owned());
                let count = pages.parse::<u64>().ok().filter(|&count| count > 0).ok_or_else(bad_pages)?;
                Ok(Self::DirtyBudget { pages: count, at_most: parse_period(max)? })
            }
            _ => Err(unknown()),
        }
    }
}

impl TryFrom<String> for PolicySpec {
    type Error = PolicyParseError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<PolicySpec> for String {
    fn from(spec: PolicySpec) -> Self {
        spec.to_string()
    }
}

/// Parses a time with a unit and checks that an epoch may last that long.
fn parse_period(text: &str) -> Result<Duration, PolicyParseError> {
    let bad = || PolicyParseError::BadTime(text.to_owned());
    let unit_at = text.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(bad)?;
    let (number, unit) = text.split_at(unit_at);
    let ns_a_unit: u32 = match unit {
        "us" | "µs" => 1_000,
        "ms" => 1_000_000,
        "s" => 1_000_000_000,
        _ => return Err(bad()),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    if fraction.is_empty() || fraction.len() > 9 {
        return Err(bad());
    }
    let whole: u64 = whole.parse().map_err(|_| bad())?;
    let digits: u64 = fraction.parse().map_err(|_| bad())?;
    let fraction_ns = digits * u64::from(ns_a_unit) / 10_u64.pow(fraction.len() as u32);
    let ns = whole.checked_mul(u64::from(ns_a_unit)).and_then(|ns| ns.checked_add(fraction_ns)).ok_or_else(bad)?;
    let period = Duration::from_nanos(ns);
    if (SHORTEST_PERIOD..=LONGEST_PERIOD).contains(&period) {
        Ok(period)
    } else {
        Err(PolicyParseError::OutOfRange(period))
    }
}

/// A time in the largest unit that says it exactly enough: what [`parse_period`] reads back.
struct DurationText(Duration);

impl fmt::Display for DurationText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ns = self.0.as_nanos();
        let (ns_a_unit, unit) = match ns {
            0..1_000_000 => (1_000, "us"),
            1_000_000..1_000_000_000 => (1_000_000, "ms"),
            _ => (1_000_000_000, "s"),
        };
        let (whole, rest) = (ns / ns_a_unit, ns % ns_a_unit);
        if rest == 0 {
            return write!(f, "{whole}{unit}");
        }
        let width = ns_a_unit.ilog10() as usize;
        let fraction = format!("{rest:0width$}");
        write!(f, "{whole}.{}{unit}", fraction.trim_end_matches('0'))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_fixed_period_closes_when_it_is_over_and_not_before() {
        let mut policy = FixedPeriod(ms(10));
        let facts = EpochFacts::default();
        assert_eq!(policy.next(ms(4), Some(1 << 40), &facts), Decision::WaitAtMost(ms(6)));
        assert_eq!(policy.next(ms(10), Some(0), &facts), Decision::CloseNow);
        assert_eq!(policy.next(ms(25), None, &facts), Decision::CloseNow);
    }

    #[test]
    fn a_guest_whose_pauses_take_its_whole_period_runs_all_the_same() {
        let after = |pause| EpochFacts { lasted: ms(10), pause, ..EpochFacts::default() };
        let mut policies: [Box<dyn Policy>; 2] =
            [Box::new(FixedPeriod(ms(10))), Box::new(DirtyBudget { pages: 1000, at_most: ms(10) })];
        for policy in &mut policies {
            // Up to half of a period nothing changes.
            assert_eq!(policy.next(ms(10), Some(0), &after(ms(5))), Decision::CloseNow);
            for (pause, close_at) in [(8, 16), (10, 20), (200, 210)] {
                assert_eq!(policy.next(ms(close_at - 1), Some(0), &after(ms(pause))), Decision::WaitAtMost(ms(1)));
                assert_eq!(policy.next(ms(close_at), Some(0), &after(ms(pause))), Decision::CloseNow);
            }
        }
        let longest = EpochFacts { pause: Duration::MAX, ..EpochFacts::default() };
        assert!(matches!(FixedPeriod(ms(10)).next(ms(10), None, &longest), Decision::WaitAtMost(_)));
    }

    #[test]
    fn a_dirty_budget_closes_when_it_is_spent_or_its_time_is_over() {
        let mut policy = DirtyBudget { pages: 1000, at_most: ms(100) };
        let facts = EpochFacts::default();
        assert_eq!(policy.next(ms(1), Some(1000), &facts), Decision::CloseNow);
        assert_eq!(policy.next(ms(100), Some(0), &facts), Decision::CloseNow);
        // 100 pages in 1 ms: the budget would be met in 9 ms, looked at after half of that.
        assert_eq!(policy.next(ms(1), Some(100), &facts), Decision::WaitAtMost(Duration::from_micros(4500)));
        assert_eq!(policy.next(ms(99), Some(1), &facts), Decision::WaitAtMost(ms(1)));
    }

    #[test]
    fn a_dirty_budget_without_a_count_goes_by_the_last_epochs_rate() {
        let mut policy = DirtyBudget { pages: 1000, at_most: ms(100) };
        let last = EpochFacts { lasted: ms(10), dirty_pages: 500, ..EpochFacts::default() };
        assert!(matches!(policy.next(ms(19), None, &last), Decision::WaitAtMost(_)));
        assert_eq!(policy.next(ms(20), None, &last), Decision::CloseNow);
        assert!(matches!(policy.next(ms(99), None, &EpochFacts::default()), Decision::WaitAtMost(_)));
    }

    #[test]
    fn a_policy_is_read_from_text_and_refused_with_a_reason() {
        let fixed = |period| PolicySpec::Fixed { period };
        assert_eq!("fixed:10ms".parse(), Ok(fixed(ms(10))));
        assert_eq!("fixed:0.1ms".parse(), Ok(fixed(Duration::from_micros(100))));
        assert_eq!("dirty:4096,max=100ms".parse(), Ok(PolicySpec::DirtyBudget { pages: 4096, at_most: ms(100) }));
        for bad in ["", "fixed", "adaptive", "dirty:4096", "dirty:4096,min=1ms"] {
            assert_eq!(bad.parse::<PolicySpec>(), Err(PolicyParseError::Unknown(bad.to_owned())), "{bad}");
        }
        for bad in
            ["fixed:10", "fixed:ms", "fixed:1.ms", "fixed:1.2.3ms", "fixed:-1ms", "fixed:1h", "fixed:99999999999999s"]
        {
            assert!(matches!(bad.parse::<PolicySpec>(), Err(PolicyParseError::BadTime(_))), "{bad}");
        }
        for bad in ["fixed:0s", "fixed:1us", "dirty:1,max=61s"] {
            assert!(matches!(bad.parse::<PolicySpec>(), Err(PolicyParseError::OutOfRange(_))), "{bad}");
        }
        for bad in ["dirty:0,max=1ms", "dirty:x,max=1ms"] {
            assert!(matches!(bad.parse::<PolicySpec>(), Err(PolicyParseError::BadPages(_))), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn a_policy_reads_back_what_it_writes(ns in 50_000u64..60_000_000_000, pages in 1u64.., dirty: bool) {
            let time = Duration::from_nanos(ns);
            let spec = if dirty { PolicySpec::DirtyBudget { pages, at_most: time } } else { PolicySpec::Fixed { period: time } };
            prop_assert_eq!(spec.to_string().parse(), Ok(spec));
        }

        #[test]
        fn a_budget_never_waits_past_its_end(
            since in 0u64..200_000, dirty in prop::option::of(0u64..5000), last_us in 0u64..100_000, last_pages in 0u64..10_000,
        ) {
            let mut policy = DirtyBudget { pages: 1000, at_most: ms(100) };
            let last = EpochFacts { lasted: Duration::from_micros(last_us), dirty_pages: last_pages, ..EpochFacts::default() };
            match policy.next(Duration::from_micros(since), dirty, &last) {
                Decision::CloseNow => prop_assert!(since >= 100_000 || dirty.is_none_or(|pages| pages >= 1000)),
                Decision::WaitAtMost(wait) => {
                    prop_assert!(!wait.is_zero() && Duration::from_micros(since) + wait <= ms(100));
                    prop_assert!(dirty.is_none_or(|pages| pages < 1000));
                }
            }
        }
    }
}
