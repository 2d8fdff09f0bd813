//! How fast a run is: on a host without processors of its own (an emulated one) all of it happens in slow motion, the same number of
//! pages an epoch and of heartbeats a lease, so that nothing is taken for dead that is only slow.

use std::fmt;
use std::time::Duration;

/// Lease of a run: short, so that silence is noticed soon.
pub const LEASE: Duration = Duration::from_millis(500);
/// How often a checkpoint is taken.
const PERIOD: Duration = Duration::from_millis(10);
/// Pages the guest writes to in a second.
const RATE: u32 = 20_000;
/// The slowest there is: beyond it waits are hours.
const SLOWEST: u32 = 100;

/// So many times slower than a host with processors of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace(u32);

impl Default for Pace {
    fn default() -> Self {
        Self(1)
    }
}

impl fmt::Display for Pace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Reads `--slow-host`.
pub fn parse(text: &str) -> Result<Pace, String> {
    match text.parse() {
        Ok(times @ 1..=SLOWEST) => Ok(Pace(times)),
        _ => Err(format!("a whole number from 1 to {SLOWEST}")),
    }
}

impl Pace {
    /// What a bound of the usual pace is at this one.
    pub fn of(self, usual: Duration) -> Duration {
        usual * self.0
    }

    /// The same, as an option's value.
    pub fn ms(self, usual: Duration) -> String {
        format!("{}ms", self.of(usual).as_millis())
    }

    /// What `belay send` is told of lease, period and guest.
    pub fn words(self, lasts: Duration) -> [String; 6] {
        let [lease, period, rate] = ["--lease", "--period", "--dirty-rate"].map(str::to_owned);
        [lease, self.ms(lasts), period, self.ms(PERIOD), rate, (RATE / self.0).to_string()]
    }

    /// The option as a person types it, nothing at the usual pace.
    pub fn option(self) -> String {
        if self == Self::default() { String::new() } else { format!(" --slow-host {self}") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usual_pace_is_what_send_does_unasked_and_a_slower_one_has_as_many_pages_an_epoch() {
        let words = |text| parse(text).unwrap().words(LEASE);
        assert_eq!(words("1"), ["--lease", "500ms", "--period", "10ms", "--dirty-rate", "20000"]);
        assert_eq!(words("8"), ["--lease", "4000ms", "--period", "80ms", "--dirty-rate", "2500"]);
        assert_eq!(parse("1").unwrap().option(), "");
        assert_eq!(parse("8").unwrap().option(), " --slow-host 8");
        for wrong in ["0", "101", "-1", "two", ""] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
