//! Figures as data; how they look is the page's affair.

use super::Role;
use serde::{Deserialize, Serialize};

/// One figure.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Plot {
    /// What happened when.
    TimeLine { title: String, x: Axis, y: Axis, lines: Vec<Line>, marks: Vec<Mark> },
    /// A value by a parameter, with what the rounds spread over.
    Sweep { title: String, x: Axis, y: Axis, series: Vec<Series>, references: Vec<Reference> },
    /// Latencies of the case by percentile, drawn from their histograms.
    Percentiles { title: String, curves: Vec<Curve> },
}

/// What an axis shows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Axis {
    pub name: String,
    /// Empty where there is none.
    pub unit: String,
    /// Logarithmic: every value is above zero.
    pub log: bool,
}

impl Axis {
    pub fn linear(name: &str, unit: &str) -> Self {
        Self { name: name.to_owned(), unit: unit.to_owned(), log: false }
    }

    pub fn log(name: &str, unit: &str) -> Self {
        Self { log: true, ..Self::linear(name, unit) }
    }
}

/// A line through its points, in their order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Line {
    pub name: String,
    pub role: Role,
    pub points: Vec<(f64, f64)>,
}

/// An instant with a name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Mark {
    pub at: f64,
    pub name: String,
}

/// The points of one way of doing it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Series {
    pub name: String,
    pub role: Role,
    pub points: Vec<Point>,
}

/// A median, and the quartiles of its rounds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Point {
    pub x: f64,
    pub y: f64,
    pub low: f64,
    pub high: f64,
}

impl Point {
    /// Of the values that the rounds had at `x`; there is one at least.
    pub fn of_rounds(x: f64, rounds: &[f64]) -> Self {
        let mut sorted = rounds.to_vec();
        sorted.sort_by(f64::total_cmp);
        let at = |share: f64| sorted[((sorted.len() - 1) as f64 * share).round() as usize];
        Self { x, y: crate::table::median(rounds), low: at(0.25), high: at(0.75) }
    }
}

/// A level to compare with, across the figure: a floor, a bound.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reference {
    pub name: String,
    pub y: f64,
}

/// One latency of the case, by its row's name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Curve {
    pub latency: String,
}

impl Plot {
    /// Percentiles of these latencies of the case.
    pub fn percentiles(title: &str, latencies: &[&str]) -> Self {
        let curves = latencies.iter().map(|latency| Curve { latency: (*latency).to_owned() }).collect();
        Self::Percentiles { title: title.to_owned(), curves }
    }
}
