//! What a suite found, as data: tables, JSON, `.hgrm` files, the page and the comparison are all made from it and from nothing else.
//!
//! A [`Report`] has cases, a [`Case`] has what was measured under one set of parameters. Each [`Measure`] keeps the value of every round,
//! and beside it what a floor or a peer did in the same round, so that a ratio is always one of two neighbours in time.

mod columns;
mod compare;
mod distribution;
mod figure;
mod hgrm;
mod html;
mod json;
mod machine;
mod markdown;
mod output;
mod plot;
mod svg;
mod text;
mod tools;

pub use distribution::Latency;
pub use machine::Machine;
pub use output::Output;
pub use plot::{Axis, Curve, Line, Mark, Plot, Point, Reference, Series};
pub use tools::{CompareArgs, HtmlArgs, ResultsArgs};

use crate::table::median;
use serde::{Deserialize, Serialize};

/// Of a report's form. One of another form is refused.
pub const FORM: u32 = 1;

/// What one run of one suite found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`FORM`].
    pub form: u32,
    pub suite: String,
    /// As it was typed.
    pub command: String,
    /// Whether it was `--quick`: a look and not a figure.
    pub quick: bool,
    pub machine: Machine,
    pub cases: Vec<Case>,
    pub goals: Vec<Goal>,
    /// What was not measured and why, and what a reader must know of what was.
    pub notes: Vec<String>,
}

impl Report {
    /// Of this run on this machine, empty.
    pub fn new(suite: &str, output: &Output) -> Self {
        Self {
            form: FORM,
            suite: suite.to_owned(),
            command: std::env::args().skip(1).fold("belay-bench".to_owned(), |all, word| all + " " + &word),
            quick: output.quick,
            machine: Machine::this(),
            cases: Vec::new(),
            goals: Vec::new(),
            notes: Vec::new(),
        }
    }

    /// Says it at once, and in the report.
    pub fn note(&mut self, text: impl Into<String>) {
        let text = text.into();
        println!("\n note: {text}");
        self.notes.push(text);
    }
}

/// Whose a latency, a rate or a line of a plot is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    Ours,
    /// The leanest loop that does the same work.
    Floor,
    /// Another program's, or a bare wire's.
    Peer,
}

/// What was measured under one set of parameters.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Case {
    pub name: String,
    /// Names and values, in the order in which they are to be read. Two reports' cases are the same if name and parameters are.
    pub parameters: Vec<(String, String)>,
    pub latencies: Vec<Latency>,
    pub rates: Vec<Rate>,
    pub measures: Vec<Measure>,
    pub plots: Vec<Plot>,
}

impl Case {
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), ..Self::default() }
    }

    pub fn with(mut self, parameter: &str, value: impl ToString) -> Self {
        self.parameters.push((parameter.to_owned(), value.to_string()));
        self
    }

    pub fn latency(&self, name: &str) -> Option<&Latency> {
        self.latencies.iter().find(|latency| latency.row.name == name)
    }

    pub fn measure(&self, name: &str) -> Option<&Measure> {
        self.measures.iter().find(|measure| measure.name == name)
    }

    /// Name and parameters, on one line.
    pub fn title(&self) -> String {
        self.parameters.iter().fold(self.name.clone(), |all, (name, value)| format!("{all}, {name} {value}"))
    }
}

/// Bandwidth of one side.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rate {
    pub name: String,
    pub role: Role,
    /// Of one operation.
    pub bytes: usize,
    /// Operations of a round.
    pub iterations: u64,
    /// Bytes a second, one value a round.
    pub rounds: Vec<f64>,
    /// Processors that each side kept busy (processor time over time), medians, where it was measured.
    pub source_processors: Option<f64>,
    pub destination_processors: Option<f64>,
}

impl Rate {
    pub fn bytes_per_s(&self) -> f64 {
        median(&self.rounds)
    }
}

/// Which way is good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Better {
    Lower,
    Higher,
}

/// One number of interest: a value a round, and what stood beside it in the same round.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measure {
    pub name: String,
    /// Of the value; empty for a ratio.
    pub unit: String,
    pub better: Better,
    pub rounds: Vec<f64>,
    pub beside: Option<Beside>,
}

/// A floor's or a peer's values of the same rounds, in the same unit.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Beside {
    pub name: String,
    pub rounds: Vec<f64>,
}

impl Measure {
    pub fn new(name: &str, unit: &str, better: Better, rounds: Vec<f64>) -> Self {
        Self { name: name.to_owned(), unit: unit.to_owned(), better, rounds, beside: None }
    }

    pub fn beside(mut self, name: &str, rounds: Vec<f64>) -> Self {
        self.beside = Some(Beside { name: name.to_owned(), rounds });
        self
    }

    /// Median of the rounds.
    pub fn value(&self) -> f64 {
        median(&self.rounds)
    }

    /// Of each round, ours over what stood beside it; none without.
    pub fn ratios(&self) -> Option<Vec<f64>> {
        let beside = self.beside.as_ref()?;
        let ratios = self.rounds.iter().zip(&beside.rounds).map(|(ours, theirs)| ours / theirs);
        Some(ratios.filter(|ratio| ratio.is_finite()).collect())
    }

    /// Median of the rounds' ratios.
    pub fn ratio(&self) -> Option<f64> {
        self.ratios().filter(|ratios| !ratios.is_empty()).map(|ratios| median(&ratios))
    }
}

/// A figure that is to be reached, and whether it was.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Goal {
    /// The case's title.
    pub case: String,
    /// What must be so, as a sentence's subject: "engine time over the floor's".
    pub measure: String,
    pub unit: String,
    pub value: f64,
    pub bound: f64,
    /// [`Better::Lower`]: at most the bound; otherwise at least.
    pub better: Better,
    pub met: bool,
}

impl Goal {
    pub fn at_most(case: &Case, measure: &str, unit: &str, value: f64, bound: f64) -> Self {
        Self::new(case, measure, unit, (value, bound), Better::Lower, value <= bound)
    }

    pub fn at_least(case: &Case, measure: &str, unit: &str, value: f64, bound: f64) -> Self {
        Self::new(case, measure, unit, (value, bound), Better::Higher, value >= bound)
    }

    fn new(case: &Case, measure: &str, unit: &str, (value, bound): (f64, f64), better: Better, met: bool) -> Self {
        let (measure, unit) = (measure.to_owned(), unit.to_owned());
        Self { case: case.title(), measure, unit, value, bound, better, met }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One case with one measure.
    pub fn report(suite: &str, rounds: &[f64]) -> Report {
        let mut case = Case::new("unloaded").with("fabric", "tcp");
        case.measures.push(Measure::new("engine time", "us", Better::Lower, rounds.to_vec()));
        let machine = Machine {
            cpu: "a processor".into(),
            cores: 2,
            memory_bytes: 1 << 30,
            kernel: "6.18".into(),
            page_bytes: 4096,
            rdma: Vec::new(),
            belay: "0.1.0".into(),
            commit: None,
            debug: false,
        };
        let command = format!("belay-bench {suite}");
        let (cases, goals, notes) = (vec![case], Vec::new(), Vec::new());
        Report { form: FORM, suite: suite.into(), command, quick: false, machine, cases, goals, notes }
    }

    #[test]
    fn a_ratio_is_the_median_of_each_rounds_own() {
        let measure = Measure::new("engine", "us", Better::Lower, vec![10.0, 40.0, 30.0]);
        assert_eq!((measure.value(), measure.ratio()), (30.0, None));
        let measure = measure.beside("floor", vec![10.0, 20.0, 10.0]);
        assert_eq!(measure.ratios(), Some(vec![1.0, 2.0, 3.0]));
        assert_eq!(measure.ratio(), Some(2.0));
    }

    #[test]
    fn a_goal_is_met_at_its_bound_and_says_of_which_case() {
        let case = Case::new("unloaded").with("fabric", "tcp").with("threads", 4);
        assert!(Goal::at_most(&case, "engine over floor", "", 1.3, 1.3).met);
        assert!(!Goal::at_least(&case, "of the floor", "", 0.89, 0.9).met);
        let line = text::line(&Goal::at_least(&case, "of the floor", "", 0.89, 0.9));
        assert_eq!(line, "missed  of the floor: 0.89, at least 0.90  (unloaded, fabric tcp, threads 4)");
    }
}
