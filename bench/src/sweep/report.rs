//! What is said in the end: medians of all rounds, and of the ratios within each.

use super::{Way, Workload};
use crate::quantity::LinkRate;
use crate::report::{self, Axis, Better, Goal, Measure, Plot, Point, Reference, Role, Series};
use crate::table::median;
use belay_checkpoint::policy::PolicySpec;
use belay_transport::fabric::FabricKind;
use belay_vmm_glue::migrate::observation::Kind;
use std::time::Duration;

/// One migration.
#[derive(Debug, Clone)]
pub struct Sample {
    total_ms: f64,
    down_ms: f64,
    host_ms: [f64; 2],
    tether: Option<Tethered>,
}

#[derive(Debug, Clone)]
struct Tethered {
    epochs: f64,
    pages: f64,
    bytes: f64,
    /// Of age and of output delay.
    age_ms: [f64; 2],
    delay_ms: Option<[f64; 2]>,
    held_back_ms: f64,
    /// All pauses together.
    paused_ms: f64,
}

impl Tethered {
    /// Twice what a checkpoint takes that waits for nobody: until it is due, the pause, and its bytes over the link; the average one's.
    fn bound_ms(&self, period: Duration, bits_per_s: f64) -> f64 {
        let wire_ms = self.bytes / self.epochs * 8e3 / bits_per_s;
        2.0 * (period.as_secs_f64() * 1e3 + self.paused_ms / self.epochs + wire_ms)
    }
}

impl Sample {
    pub fn new(total: Duration, blackout: Duration, summary: Option<&Kind>, hosts: [Duration; 2]) -> Self {
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let mut sample = Self { total_ms: ms(total), down_ms: ms(blackout), host_ms: hosts.map(ms), tether: None };
        if let Some(Kind::TetherSummary {
            epochs,
            pages,
            bytes,
            age_p50_us,
            age_p99_us,
            pause_total_us,
            held_back_us,
            output_delay_p50_us,
            output_delay_p99_us,
            ..
        }) = summary
        {
            sample.down_ms += (pause_total_us + held_back_us) as f64 / 1e3;
            let delay = output_delay_p50_us.zip(*output_delay_p99_us);
            sample.tether = Some(Tethered {
                epochs: *epochs as f64,
                pages: *pages as f64,
                bytes: *bytes as f64,
                age_ms: [age_p50_us / 1e3, age_p99_us / 1e3],
                delay_ms: delay.map(|(half, most)| [half / 1e3, most / 1e3]),
                held_back_ms: *held_back_us as f64 / 1e3,
                paused_ms: *pause_total_us as f64 / 1e3,
            });
        }
        sample
    }
}

/// One guest with one workload, in all ways.
pub struct Case {
    workload: Workload,
    memory: u64,
    samples: Vec<(usize, Way, Sample)>,
}

impl Case {
    pub fn new(workload: Workload, memory: u64) -> Self {
        Self { workload, memory, samples: Vec::new() }
    }

    pub fn add(&mut self, round: usize, way: Way, sample: Sample) {
        self.samples.push((round, way, sample));
    }

    fn rows(&self, ways: &[Way]) -> Vec<Row> {
        ways.iter().filter_map(|way| self.row(*way)).collect()
    }

    fn row(&self, way: Way) -> Option<Row> {
        let of = |wanted: Way| self.samples.iter().filter(move |(_, way, _)| *way == wanted);
        let samples: Vec<&Sample> = of(way).map(|(_, _, sample)| sample).collect();
        if samples.is_empty() {
            return None;
        }
        let all = |value: &dyn Fn(&Sample) -> f64| samples.iter().map(|sample| value(sample)).collect::<Vec<f64>>();
        let tethers: Vec<&Tethered> = samples.iter().filter_map(|sample| sample.tether.as_ref()).collect();
        let tether = |value: &dyn Fn(&Tethered) -> Option<f64>| {
            let values: Vec<f64> = tethers.iter().filter_map(|tether| value(tether)).collect();
            (!values.is_empty()).then(|| median(&values))
        };
        let without = |round: usize| of(Way::None).find(|(at, ..)| *at == round).map(|(.., sample)| sample.total_ms);
        let ratios: Vec<f64> =
            of(way).filter_map(|(round, _, sample)| Some(sample.total_ms / without(*round)?)).collect();
        let totals = all(&|sample| sample.total_ms);
        let a_second = |sample: &Sample| sample.tether.as_ref().map(|tether| tether.epochs * 1e3 / sample.total_ms);
        let rates: Vec<f64> = samples.iter().filter_map(|sample| a_second(sample)).collect();
        Some(Row {
            policy: way.to_string(),
            total_ms: median(&totals),
            of_none: (!ratios.is_empty()).then(|| median(&ratios)),
            down_ms: median(&all(&|sample| sample.down_ms)),
            commits_per_s: (!rates.is_empty()).then(|| median(&rates)),
            pages: tether(&|tether| Some(tether.pages)),
            checkpoint_mib: tether(&|tether| Some(tether.bytes / f64::from(1 << 20))),
            age_p50_ms: tether(&|tether| Some(tether.age_ms[0])),
            age_p99_ms: tether(&|tether| Some(tether.age_ms[1])),
            delay_p50_ms: tether(&|tether| Some(tether.delay_ms?[0])),
            delay_p99_ms: tether(&|tether| Some(tether.delay_ms?[1])),
            held_back_ms: tether(&|tether| Some(tether.held_back_ms)),
            host_a_cpu_ms: median(&all(&|sample| sample.host_ms[0])),
            host_b_cpu_ms: median(&all(&|sample| sample.host_ms[1])),
        })
    }
}

/// All migrations of one guest by one policy: medians.
#[derive(Debug)]
pub struct Row {
    pub policy: String,
    pub total_ms: f64,
    /// Total, as a share of the same round's without checkpoints.
    pub of_none: Option<f64>,
    pub down_ms: f64,
    pub commits_per_s: Option<f64>,
    pub pages: Option<f64>,
    pub checkpoint_mib: Option<f64>,
    pub age_p50_ms: Option<f64>,
    pub age_p99_ms: Option<f64>,
    pub delay_p50_ms: Option<f64>,
    pub delay_p99_ms: Option<f64>,
    pub held_back_ms: Option<f64>,
    pub host_a_cpu_ms: f64,
    pub host_b_cpu_ms: f64,
}

/// What every migration of a run has in common.
#[derive(Debug)]
pub struct Setting {
    pub fabric: FabricKind,
    pub pace: Option<LinkRate>,
    pub hold: Option<Duration>,
    pub rounds: u32,
}

impl Case {
    /// A case of the report, empty.
    fn case(&self, setting: &Setting, name: &str) -> report::Case {
        let mut case = report::Case::new(name).with("workload", self.workload);
        case = case.with("memory", format!("{} MiB", self.memory >> 20)).with("fabric", setting.fabric);
        if let Some(pace) = &setting.pace {
            case = case.with("pace", &pace.text);
        }
        setting.hold.into_iter().fold(case, |case, hold| case.with("hold", format!("{hold:?}")))
    }

    /// Where a link binds, of every fixed period: that the migration takes no longer for its checkpoints, and that these are not late, so that a
    /// checkpoint which takes in all others does not count as cheap.
    pub fn goals(&self, setting: &Setting, ways: &[Way]) -> Vec<Goal> {
        let Some(pace) = &setting.pace else { return Vec::new() };
        let mut goals = Vec::new();
        for way in ways {
            let Way::Tethered(PolicySpec::Fixed { period }) = *way else { continue };
            let Some(case) = self.measures(*way, self.case(setting, &way.to_string())) else { continue };
            let total = case.measure("total").and_then(Measure::ratio);
            goals.extend(total.map(|ratio| Goal::at_most(&case, "total over none", "", ratio, 1.05)));
            let tethers =
                self.samples.iter().filter(|(_, of, _)| of == way).filter_map(|(.., sample)| sample.tether.as_ref());
            let tethers = tethers.filter(|tether| tether.epochs > 0.0);
            let late: Vec<f64> =
                tethers.map(|tether| tether.age_ms[1] / tether.bound_ms(period, pace.bits_per_s)).collect();
            if !late.is_empty() {
                let measure = "age at commit, 99%, over 2 x (period + pause + wire)";
                goals.push(Goal::at_most(&case, measure, "", median(&late), 1.0));
            }
        }
        goals
    }

    /// As cases of the report: one a policy, and behind them one with the figure of all fixed periods.
    pub fn cases(&self, setting: &Setting, ways: &[Way]) -> Vec<report::Case> {
        let case = |name: &str| self.case(setting, name);
        let mut cases: Vec<report::Case> =
            ways.iter().filter_map(|way| self.measures(*way, case(&way.to_string()))).collect();
        let periods: Vec<(f64, Vec<f64>)> = ways
            .iter()
            .filter_map(|way| match way {
                Way::Tethered(PolicySpec::Fixed { period }) => Some((period.as_secs_f64() * 1e3, self.totals(*way))),
                _ => None,
            })
            .filter(|(_, totals)| !totals.is_empty())
            .collect();
        if periods.len() > 1 {
            let mut all = case("fixed periods");
            let points = periods.iter().map(|(period, totals)| Point::of_rounds(*period, totals)).collect();
            let none = self.totals(Way::None);
            let level = (!none.is_empty()).then(|| Reference { name: "none".into(), y: median(&none) });
            all.plots.push(Plot::Sweep {
                title: format!(
                    "Total time by the time between checkpoints, {}; bars: quartiles of the rounds",
                    self.workload
                ),
                x: Axis::log("period", "ms"),
                y: Axis::linear("total", "ms"),
                series: vec![Series { name: "fixed".into(), role: Role::Ours, points }],
                references: level.into_iter().collect(),
            });
            cases.push(all);
        }
        cases
    }

    fn totals(&self, way: Way) -> Vec<f64> {
        self.samples.iter().filter(|(_, of, _)| *of == way).map(|(.., sample)| sample.total_ms).collect()
    }

    fn measures(&self, way: Way, mut case: report::Case) -> Option<report::Case> {
        let of = |wanted: Way| self.samples.iter().filter(move |(_, way, _)| *way == wanted);
        let samples: Vec<&Sample> = of(way).map(|(.., sample)| sample).collect();
        if samples.is_empty() {
            return None;
        }
        let none = |round: usize| of(Way::None).find(|(at, ..)| *at == round).map(|(.., sample)| sample.total_ms);
        let beside: Option<Vec<f64>> = of(way).map(|(round, ..)| none(*round)).collect();
        let all = |value: &dyn Fn(&Sample) -> Option<f64>| {
            samples.iter().filter_map(|sample| value(sample)).collect::<Vec<f64>>()
        };
        let tether = |value: fn(&Tethered) -> Option<f64>| all(&move |sample| value(sample.tether.as_ref()?));
        let total = Measure::new("total", "ms", Better::Lower, all(&|sample| Some(sample.total_ms)));
        case.measures.push(match beside.filter(|_| way != Way::None) {
            Some(beside) => total.beside("none", beside),
            None => total,
        });
        let a_second = |sample: &Sample| Some(sample.tether.as_ref()?.epochs * 1e3 / sample.total_ms);
        let more = [
            ("down", "ms", Better::Lower, all(&|sample| Some(sample.down_ms))),
            ("commits a second", "1/s", Better::Higher, all(&a_second)),
            ("pages of checkpoints", "", Better::Lower, tether(|tether| Some(tether.pages))),
            ("sent for checkpoints", "MiB", Better::Lower, tether(|tether| Some(tether.bytes / f64::from(1 << 20)))),
            ("age at commit, median", "ms", Better::Lower, tether(|tether| Some(tether.age_ms[0]))),
            ("age at commit, 99%", "ms", Better::Lower, tether(|tether| Some(tether.age_ms[1]))),
            ("output delay, median", "ms", Better::Lower, tether(|tether| Some(tether.delay_ms?[0]))),
            ("output delay, 99%", "ms", Better::Lower, tether(|tether| Some(tether.delay_ms?[1]))),
            ("held back", "ms", Better::Lower, tether(|tether| Some(tether.held_back_ms))),
            ("processor time at the source", "ms", Better::Lower, all(&|sample| Some(sample.host_ms[0]))),
            ("processor time at the destination", "ms", Better::Lower, all(&|sample| Some(sample.host_ms[1]))),
        ];
        let more = more.into_iter().filter(|(.., rounds)| !rounds.is_empty());
        case.measures.extend(more.map(|(name, unit, better, rounds)| Measure::new(name, unit, better, rounds)));
        Some(case)
    }

    /// One guest's table.
    pub fn print(&self, setting: &Setting, ways: &[Way]) {
        let pace = setting.pace.as_ref().map_or(String::new(), |pace| format!(" at {}", pace.text));
        let hold = setting.hold.map_or(String::new(), |hold| format!(", held for {hold:?} once all is there"));
        println!(
            "{}, {} MiB, over {}{pace}{hold}; medians of {}",
            self.workload,
            self.memory >> 20,
            setting.fabric,
            setting.rounds
        );
        println!(
            " {:<16}{:>10}{:>8}{:>10}{:>11}{:>9}{:>10}{:>12}{:>12}{:>14}{:>14}{:>10}{:>12}{:>12}",
            "policy",
            "total[ms]",
            "/none",
            "down[ms]",
            "commits/s",
            "pages",
            "sent[MiB]",
            "age p50[ms]",
            "age p99[ms]",
            "delay p50[ms]",
            "delay p99[ms]",
            "held[ms]",
            "host a[ms]",
            "host b[ms]"
        );
        let or_none =
            |value: Option<f64>, digits: usize| value.map_or("-".to_owned(), |value| format!("{value:.digits$}"));
        for row in self.rows(ways) {
            println!(
                " {:<16}{:>10.0}{:>8}{:>10.1}{:>11}{:>9}{:>10}{:>12}{:>12}{:>14}{:>14}{:>10}{:>12.0}{:>12.0}",
                row.policy,
                row.total_ms,
                or_none(row.of_none, 3),
                row.down_ms,
                or_none(row.commits_per_s, 1),
                or_none(row.pages, 0),
                or_none(row.checkpoint_mib, 1),
                or_none(row.age_p50_ms, 2),
                or_none(row.age_p99_ms, 2),
                or_none(row.delay_p50_ms, 2),
                or_none(row.delay_p99_ms, 2),
                or_none(row.held_back_ms, 1),
                row.host_a_cpu_ms,
                row.host_b_cpu_ms
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantity;

    fn summary() -> Kind {
        Kind::TetherSummary {
            epochs: 50,
            pages: 1000,
            bytes: 4 << 20,
            pause_p50_us: 300.0,
            pause_p99_us: 600.0,
            commit_p50_us: 100.0,
            age_p50_us: 1200.0,
            age_p99_us: 2400.0,
            pause_total_us: 15_000,
            held_back_us: 5000,
            output_delay_p50_us: Some(7000.0),
            output_delay_p99_us: None,
        }
    }

    #[test]
    fn a_ratio_is_the_median_of_each_rounds_own_and_downtime_is_the_switch_the_pauses_and_the_holding_back() {
        let fixed = Way::Tethered(PolicySpec::Fixed { period: Duration::from_millis(10) });
        let mut case = Case::new(Workload::Random, 1 << 30);
        let ms = Duration::from_millis;
        for (round, (none, tethered)) in [(1000, 1100), (2000, 2000), (500, 600)].into_iter().enumerate() {
            case.add(round, Way::None, Sample::new(ms(none), ms(10), None, [ms(1), ms(2)]));
            case.add(round, fixed, Sample::new(ms(tethered), ms(10), Some(&summary()), [ms(3), ms(4)]));
        }
        let rows = case.rows(&[fixed, Way::None]);
        assert_eq!(rows.iter().map(|row| row.policy.as_str()).collect::<Vec<_>>(), ["fixed:10ms", "none"]);
        let [tethered, none] = &rows[..] else { unreachable!("there are two") };
        assert_eq!((tethered.total_ms, tethered.of_none), (1100.0, Some(1.1)));
        assert_eq!((tethered.down_ms, none.down_ms, none.of_none), (30.0, 10.0, Some(1.0)));
        assert_eq!((tethered.commits_per_s, tethered.checkpoint_mib), (Some(50_000.0 / 1100.0), Some(4.0)));
        assert_eq!((tethered.age_p99_ms, tethered.delay_p99_ms, none.pages), (Some(2.4), None, None));
        assert_eq!((tethered.host_a_cpu_ms, tethered.host_b_cpu_ms), (3.0, 4.0));

        let setting =
            Setting { fabric: FabricKind::Tcp, pace: Some(quantity::link_rate("1G").unwrap()), hold: None, rounds: 3 };
        let cases = case.cases(&setting, &[fixed, Way::None]);
        assert_eq!(cases[0].title(), "fixed:10ms, workload random, memory 1024 MiB, fabric tcp, pace 1G");
        assert_eq!(cases[0].measures[0].ratio(), Some(1.1));
        assert_eq!((cases.len(), cases[1].measure("commits a second"), &cases[1].measures[0].beside), (2, None, &None));

        let goals = case.goals(&setting, &[fixed, Way::None]);
        assert_eq!(goals.iter().map(|goal| goal.met).collect::<Vec<_>>(), [false, true], "{goals:?}");
        // 10 ms, 0.3 ms of pause, 80 KiB at 1 Gb/s: 0.67 ms; 2.4 of 21.9.
        assert!((goals[1].value - 0.1094).abs() < 0.001, "{goals:?}");
        let unpaced = Setting { pace: None, ..setting };
        assert_eq!(
            case.goals(&unpaced, &[fixed]),
            [],
            "where no link binds, checkpoints cost what processors they find"
        );
    }
}
