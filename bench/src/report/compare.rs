//! What got slower between two reports, with the noise of both taken into account.
//!
//! A measure that has a floor beside it is compared by each round's ratio to that floor, because what else the machine did hit both; any other
//! by its bare values. The figure is median(new) / median(old), its interval the bootstrap's: rounds are drawn anew from each report, with
//! replacement (B. Efron, R. Tibshirani, *An Introduction to the Bootstrap*, 1993, chapter 13). An interval that holds 1 says nothing.

use super::{Better, Measure, Report};
use crate::table::median;

const RESAMPLES: usize = 10_000;
/// The interval's share of the resamples.
const CONFIDENCE: f64 = 0.95;
const SEED: u64 = 0x9e37_79b9_7f4a_7c15;
/// Fewer rounds than this on a side, and its median's noise cannot be told.
const LEAST_ROUNDS: usize = 5;

/// What became of a measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Worse: slower, or less of what there should be more of.
    Worse,
    Better,
    /// Nothing that this noise allows to see.
    Same,
    /// Too few rounds, or a median of zero.
    Unknown,
}

/// One measure in both reports.
#[derive(Debug, Clone, PartialEq)]
pub struct Change {
    pub case: String,
    pub measure: String,
    /// What each round was divided by, in both.
    pub over: Option<String>,
    /// Medians.
    pub old: f64,
    pub new: f64,
    /// New over old: the figure and its interval.
    pub ratio: f64,
    pub interval: (f64, f64),
    pub better: Better,
    pub verdict: Verdict,
}

impl Change {
    /// By how much it got worse, as a share of the old: 0.1 is 10 % slower, or a tenth less of a rate. Negative where it got better.
    pub fn worse_by(&self) -> f64 {
        match self.better {
            Better::Lower => self.ratio - 1.0,
            Better::Higher => 1.0 - self.ratio,
        }
    }
}

/// Two reports side by side.
#[derive(Debug, Default)]
pub struct Comparison {
    /// What makes them less than comparable.
    pub warnings: Vec<String>,
    pub changes: Vec<Change>,
}

impl Comparison {
    pub fn of(old: &Report, new: &Report) -> Self {
        let mut comparison = Self { warnings: warnings(old, new), changes: Vec::new() };
        let mut resampler = Resampler(SEED);
        for case in &new.cases {
            let Some(before) =
                old.cases.iter().find(|before| (&before.name, &before.parameters) == (&case.name, &case.parameters))
            else {
                comparison.warnings.push(format!("only in the new report: {}", case.title()));
                continue;
            };
            for measure in &case.measures {
                match before.measure(&measure.name) {
                    Some(before) => comparison.changes.push(change(&mut resampler, case.title(), before, measure)),
                    None => {
                        comparison.warnings.push(format!("only in the new report: {}: {}", case.title(), measure.name))
                    }
                }
            }
        }
        let gone = old.cases.iter().filter(|before| {
            !new.cases.iter().any(|case| (&before.name, &before.parameters) == (&case.name, &case.parameters))
        });
        comparison.warnings.extend(gone.map(|case| format!("only in the old report: {}", case.title())));
        comparison
    }

    /// What got worse by more than `tolerance`, a share.
    pub fn worse(&self, tolerance: f64) -> impl Iterator<Item = &Change> {
        self.changes.iter().filter(move |change| change.verdict == Verdict::Worse && change.worse_by() > tolerance)
    }

    pub fn print(&self) {
        println!(
            "\n compared with the older report: new / old, medians, with an interval of {:.0} %",
            CONFIDENCE * 100.0
        );
        self.warnings.iter().for_each(|warning| println!(" warning: {warning}"));
        println!(" {:<13} {:>9} {:>17} {:>12} {:>12}  measure", "", "new/old", "interval", "old", "new");
        for change in &self.changes {
            let verdict = match (change.verdict, change.better) {
                (Verdict::Worse, Better::Lower) => "slower",
                (Verdict::Better, Better::Lower) => "faster",
                (Verdict::Worse, Better::Higher) => "less",
                (Verdict::Better, Better::Higher) => "more",
                (Verdict::Same, _) => "no difference",
                (Verdict::Unknown, _) => "cannot tell",
            };
            let (low, high) = change.interval;
            let over = change.over.as_ref().map(|over| format!(", over {over}")).unwrap_or_default();
            let figure = super::text::figure;
            println!(
                " {verdict:<13} {:>9.3} {:>17} {:>12} {:>12}  {}: {}{over}",
                change.ratio,
                format!("{low:.3} to {high:.3}"),
                figure(change.old),
                figure(change.new),
                change.case,
                change.measure
            );
        }
    }
}

/// Whatever differs that is not what is measured.
fn warnings(old: &Report, new: &Report) -> Vec<String> {
    let mut warnings = Vec::new();
    if old.suite != new.suite {
        warnings.push(format!("another suite: {} here, {} there", new.suite, old.suite));
    }
    if old.quick != new.quick {
        let quick = |report: &Report| if report.quick { "--quick" } else { "not --quick" };
        warnings.push(format!("{} here, {} there", quick(new), quick(old)));
    }
    warnings.extend(new.machine.differences(&old.machine).into_iter().map(|what| format!("another machine: {what}")));
    warnings
}

fn change(resampler: &mut Resampler, case: String, old: &Measure, new: &Measure) -> Change {
    let same_floor = match (&old.beside, &new.beside) {
        (Some(before), Some(after)) if before.name == after.name => Some(after.name.clone()),
        _ => None,
    };
    let values = |measure: &Measure| match same_floor {
        Some(_) => measure.ratios().unwrap_or_default(),
        None => measure.rounds.clone(),
    };
    let (before, after) = (values(old), values(new));
    let (old, new_median) = (median(&before), median(&after));
    let mut change = Change {
        case,
        measure: new.name.clone(),
        over: same_floor,
        old,
        new: new_median,
        ratio: new_median / old,
        interval: (f64::NAN, f64::NAN),
        better: new.better,
        verdict: Verdict::Unknown,
    };
    if before.len() < LEAST_ROUNDS || after.len() < LEAST_ROUNDS || !change.ratio.is_finite() || change.ratio <= 0.0 {
        return change;
    }
    change.interval = resampler.interval(&before, &after);
    let (low, high) = change.interval;
    change.verdict = match (low > 1.0, high < 1.0, new.better) {
        (true, _, Better::Lower) | (_, true, Better::Higher) => Verdict::Worse,
        (_, true, Better::Lower) | (true, _, Better::Higher) => Verdict::Better,
        _ => Verdict::Same,
    };
    change
}

/// Draws rounds; always the same ones, so that a comparison says the same thing twice.
struct Resampler(u64);

impl Resampler {
    /// SplitMix64.
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn drawn(&mut self, from: &[f64], into: &mut Vec<f64>) -> f64 {
        into.clear();
        into.extend((0..from.len()).map(|_| from[(self.next() % from.len() as u64) as usize]));
        let middle = into.len() / 2;
        *into.select_nth_unstable_by(middle, f64::total_cmp).1
    }

    /// Of median(new) / median(old).
    fn interval(&mut self, old: &[f64], new: &[f64]) -> (f64, f64) {
        let mut drawn = Vec::with_capacity(old.len().max(new.len()));
        let mut ratios: Vec<f64> = (0..RESAMPLES)
            .map(|_| self.drawn(new, &mut drawn) / self.drawn(old, &mut drawn))
            .filter(|ratio| ratio.is_finite())
            .collect();
        ratios.sort_unstable_by(f64::total_cmp);
        let at = |share: f64| {
            ratios.get(((ratios.len() as f64 - 1.0) * share).round() as usize).copied().unwrap_or(f64::NAN)
        };
        (at((1.0 - CONFIDENCE) / 2.0), at((1.0 + CONFIDENCE) / 2.0))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::report;
    use super::*;

    /// `count` values around `level`, spread by a standard deviation of `noise` of it.
    fn rounds(seed: u64, count: usize, level: f64, noise: f64) -> Vec<f64> {
        let mut draw = Resampler(seed);
        let mut uniform = || draw.next() as f64 / u64::MAX as f64;
        // The sum of twelve uniforms has a deviation of one.
        (0..count).map(|_| level * (1.0 + noise * ((0..12).map(|_| uniform()).sum::<f64>() - 6.0))).collect()
    }

    fn compared(old: &[f64], new: &[f64]) -> Change {
        Comparison::of(&report("fault", old), &report("fault", new)).changes.remove(0)
    }

    #[test]
    fn a_slow_down_of_a_tenth_is_found_in_noise_of_a_twentieth_and_nothing_is_found_where_nothing_is() {
        let found = (0..100).filter(|seed| {
            let change = compared(&rounds(*seed, 25, 7.0, 0.05), &rounds(seed + 1000, 25, 7.7, 0.05));
            change.verdict == Verdict::Worse && change.worse_by() > 0.02
        });
        assert!(found.count() >= 95);
        let quiet = (0..100).filter(|seed| {
            compared(&rounds(*seed, 25, 7.0, 0.05), &rounds(seed + 1000, 25, 7.0, 0.05)).verdict == Verdict::Same
        });
        assert!(quiet.count() >= 90);
    }

    #[test]
    fn what_the_whole_machine_did_is_not_taken_for_a_slow_down_where_a_floor_stood_beside() {
        let of_machine = |factor: f64| {
            let mut report = report("fault", &rounds(1, 15, 9.0 * factor, 0.02));
            let measure = report.cases[0].measures.remove(0).beside("floor", rounds(2, 15, 7.0 * factor, 0.02));
            report.cases[0].measures.push(measure);
            report
        };
        let change = Comparison::of(&of_machine(1.0), &of_machine(1.5)).changes.remove(0);
        assert_eq!((change.verdict, change.over.as_deref()), (Verdict::Same, Some("floor")));
    }

    #[test]
    fn less_of_a_rate_is_worse_and_more_of_it_is_better() {
        let of_rate = |level: f64| {
            let mut report = report("pull", &rounds(3, 9, level, 0.01));
            report.cases[0].measures[0].better = Better::Higher;
            report
        };
        let comparison = Comparison::of(&of_rate(100.0), &of_rate(80.0));
        assert_eq!(comparison.changes[0].verdict, Verdict::Worse);
        assert_eq!((comparison.worse(0.1).count(), comparison.worse(0.3).count()), (1, 0));
        assert_eq!(Comparison::of(&of_rate(80.0), &of_rate(100.0)).changes[0].verdict, Verdict::Better);
    }

    #[test]
    fn two_rounds_say_nothing_and_what_differs_is_said() {
        assert_eq!(compared(&[1.0, 1.1], &[2.0, 2.1]).verdict, Verdict::Unknown);
        assert_eq!(compared(&[0.0; 9], &[1.0; 9]).verdict, Verdict::Unknown);
        let (old, mut new) = (report("fault", &[1.0; 9]), report("fault", &[1.0; 9]));
        new.machine.cores = 64;
        new.quick = true;
        new.cases[0].parameters[0].1 = "local".into();
        let warnings = Comparison::of(&old, &new).warnings.join("\n");
        for word in [
            "cores: 64 here, 2 there",
            "--quick here",
            "only in the new report: unloaded, fabric local",
            "only in the old report",
        ] {
            assert!(warnings.contains(word), "{warnings}");
        }
    }
}
