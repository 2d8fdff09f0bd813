//! Policies as they are written: `fixed:10ms`, `dirty:4096,max=100ms`, `event:4096,max=100ms`, `adaptive:50ms`.

use super::{Adaptive, DirtyBudget, FixedPeriod, LONGEST_PERIOD, OnEvent, Policy, SHORTEST_PERIOD};
use crate::outbox::OutputMode;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// What output may be delayed by under `adaptive`, if nothing else is said.
pub const DELAY_BOUND: Duration = Duration::from_millis(50);
/// How old a checkpoint may be where no output waits for it, if nothing else is said.
pub const LEASE_PERIOD: Duration = Duration::from_millis(10);

/// A policy as it is written: on the command line, in a config file, in a report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum PolicySpec {
    /// `fixed:10ms`
    Fixed { period: Duration },
    /// `dirty:4096,max=100ms`
    DirtyBudget { pages: u64, at_most: Duration },
    /// `event:4096,max=100ms`
    OnEvent { pages: u64, at_most: Duration },
    /// `adaptive:50ms`, or `adaptive` for that bound
    Adaptive { delay_bound: Duration },
}

impl PolicySpec {
    /// What is best for output of this mode where nothing is said: its delay is bounded; where it has none, what a catch takes back of what the
    /// world has seen.
    pub const fn of_output(mode: OutputMode) -> Self {
        match mode {
            OutputMode::Commit => Self::Adaptive { delay_bound: DELAY_BOUND },
            OutputMode::Lease => Self::Fixed { period: LEASE_PERIOD },
        }
    }

    /// The policy it describes.
    pub fn build(&self) -> Box<dyn Policy> {
        match *self {
            Self::Fixed { period } => Box::new(FixedPeriod(period)),
            Self::DirtyBudget { pages, at_most } => Box::new(DirtyBudget { pages, at_most }),
            Self::OnEvent { pages, at_most } => Box::new(OnEvent { pages, at_most }),
            Self::Adaptive { delay_bound } => Box::new(Adaptive::new(delay_bound)),
        }
    }

    /// The longest an epoch may stay open under it.
    pub fn longest_epoch(&self) -> Duration {
        match *self {
            Self::Fixed { period } => period,
            Self::DirtyBudget { at_most, .. } | Self::OnEvent { at_most, .. } => at_most,
            Self::Adaptive { delay_bound } => Adaptive::longest_epoch(delay_bound),
        }
    }
}

impl fmt::Display for PolicySpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Fixed { period } => write!(f, "fixed:{}", DurationText(period)),
            Self::DirtyBudget { pages, at_most } => write!(f, "dirty:{pages},max={}", DurationText(at_most)),
            Self::OnEvent { pages, at_most } => write!(f, "event:{pages},max={}", DurationText(at_most)),
            Self::Adaptive { delay_bound } => write!(f, "adaptive:{}", DurationText(delay_bound)),
        }
    }
}

/// Why a text is not a policy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PolicyParseError {
    #[error(
        "`{0}` is not a policy; write fixed:PERIOD (fixed:10ms), dirty:PAGES,max=PERIOD (dirty:4096,max=100ms), event:PAGES,max=PERIOD, or adaptive:DELAY (adaptive:50ms)"
    )]
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
        if text == "adaptive" {
            return Ok(Self::Adaptive { delay_bound: DELAY_BOUND });
        }
        let (kind, rest) = text.split_once(':').ok_or_else(unknown)?;
        match kind {
            "adaptive" => Ok(Self::Adaptive { delay_bound: parse_period(rest)? }),
            "fixed" => Ok(Self::Fixed { period: parse_period(rest)? }),
            "dirty" | "event" => {
                let (pages, max) = rest.split_once(",max=").ok_or_else(unknown)?;
                let bad_pages = || PolicyParseError::BadPages(pages.to_owned());
                let count = pages.parse::<u64>().ok().filter(|&count| count > 0).ok_or_else(bad_pages)?;
                let at_most = parse_period(max)?;
                Ok(match kind {
                    "dirty" => Self::DirtyBudget { pages: count, at_most },
                    _ => Self::OnEvent { pages: count, at_most },
                })
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
    fn a_policy_is_read_from_text_and_refused_with_a_reason() {
        let fixed = |period| PolicySpec::Fixed { period };
        assert_eq!("fixed:10ms".parse(), Ok(fixed(ms(10))));
        assert_eq!("fixed:0.1ms".parse(), Ok(fixed(Duration::from_micros(100))));
        assert_eq!("dirty:4096,max=100ms".parse(), Ok(PolicySpec::DirtyBudget { pages: 4096, at_most: ms(100) }));
        assert_eq!("event:9,max=1s".parse(), Ok(PolicySpec::OnEvent { pages: 9, at_most: ms(1000) }));
        assert_eq!("adaptive".parse(), Ok(PolicySpec::Adaptive { delay_bound: ms(50) }));
        assert_eq!("adaptive:20ms".parse(), Ok(PolicySpec::Adaptive { delay_bound: ms(20) }));
        for bad in ["", "fixed", "adaptiv", "dirty:4096", "dirty:4096,min=1ms", "event:4096"] {
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
        fn a_policy_reads_back_what_it_writes(ns in 50_000u64..60_000_000_000, pages in 1u64.., kind in 0..4) {
            let time = Duration::from_nanos(ns);
            let spec = match kind {
                0 => PolicySpec::DirtyBudget { pages, at_most: time },
                1 => PolicySpec::OnEvent { pages, at_most: time },
                2 => PolicySpec::Adaptive { delay_bound: time },
                _ => PolicySpec::Fixed { period: time },
            };
            prop_assert_eq!(spec.to_string().parse(), Ok(spec));
        }
    }
}
