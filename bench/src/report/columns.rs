//! Tables of a case as cells, for whoever writes them down: a head with a unit in every column, and the row's name first.

use super::text::figure;
use super::{Case, Measure, Rate};
use crate::table::Row;

pub struct Columns {
    pub head: Vec<&'static str>,
    pub rows: Vec<Vec<String>>,
}

impl Columns {
    /// Latencies, rates and measures, whichever there are.
    pub fn of_case(case: &Case) -> Vec<Self> {
        let latencies = [
            "",
            "#bytes",
            "#iterations",
            "t_min [us]",
            "t_max [us]",
            "t_typical [us]",
            "t_avg [us]",
            "t_stdev [us]",
            "99% [us]",
            "99.9% [us]",
        ];
        let rates = [
            "",
            "#bytes",
            "#iterations",
            "BW peak [MB/s]",
            "BW average [MB/s]",
            "page [ns/4 KiB]",
            "source [CPUs]",
            "destination [CPUs]",
        ];
        let measures = ["", "median", "unit", "rounds", "ratio", "over, in the same round"];
        let tables = [
            Self::new(&latencies, case.latencies.iter().map(|latency| latency_cells(&latency.row))),
            Self::new(&rates, case.rates.iter().map(rate_cells)),
            Self::new(&measures, case.measures.iter().map(measure_cells)),
        ];
        tables.into_iter().filter(|table| !table.rows.is_empty()).collect()
    }

    fn new(head: &[&'static str], rows: impl Iterator<Item = Vec<String>>) -> Self {
        Self { head: head.to_vec(), rows: rows.collect() }
    }
}

fn latency_cells(row: &Row) -> Vec<String> {
    let times = [row.t_min_us, row.t_max_us, row.t_typical_us, row.t_avg_us, row.t_stdev_us, row.p99_us, row.p999_us];
    let counts = [row.name.clone(), row.bytes.to_string(), row.iterations.to_string()];
    counts.into_iter().chain(times.map(|us| format!("{us:.2}"))).collect()
}

fn rate_cells(rate: &Rate) -> Vec<String> {
    let processors = |value: Option<f64>| value.map_or("–".to_owned(), |value| format!("{value:.2}"));
    vec![
        rate.name.clone(),
        rate.bytes.to_string(),
        rate.iterations.to_string(),
        format!("{:.0}", rate.rounds.iter().copied().fold(0.0, f64::max) / 1e6),
        format!("{:.0}", rate.bytes_per_s() / 1e6),
        format!("{:.0}", 4096.0 * 1e9 / rate.bytes_per_s()),
        processors(rate.source_processors),
        processors(rate.destination_processors),
    ]
}

fn measure_cells(measure: &Measure) -> Vec<String> {
    let beside = measure.beside.as_ref().map_or(String::new(), |beside| beside.name.clone());
    let ratio = measure.ratio().map_or("–".to_owned(), |ratio| format!("{ratio:.3}"));
    let rounds = measure.rounds.len().to_string();
    vec![measure.name.clone(), figure(measure.value()), measure.unit.clone(), rounds, ratio, beside]
}
