//! What all cases say together: goals, and how the pause grows.

use super::THOUSAND;
use super::rounds::{A_GIB, PAUSE};
use crate::report::{Axis, Case, Goal, Plot, Point, Reference, Report, Role, Series};

/// Of a pause at 1,000 scattered pages, in microseconds.
const PAUSE_US: f64 = 1_000.0;
/// Over its share of one thread's time, what several scanning threads may take.
const SHARED_OUT: f64 = 1.3;

fn parameter<'a>(case: &'a Case, name: &str) -> &'a str {
    case.parameters.iter().find(|(known, _)| known == name).map_or("", |(_, value)| value)
}

/// A parameter that is a number, perhaps with a unit behind it.
fn number(case: &Case, name: &str) -> f64 {
    parameter(case, name).split(' ').next().and_then(|text| text.parse().ok()).unwrap_or_default()
}

pub fn goals(report: &mut Report) {
    let mut goals = Vec::new();
    let thousand = |case: &&Case| number(case, "pages") == THOUSAND as f64;
    for case in report.cases.iter().filter(thousand) {
        if let Some(pause) = case.measure(PAUSE) {
            goals.push(Goal::at_most(case, "pause by the guest's clock", "us", pause.value(), PAUSE_US));
        }
        let threads = case.measure("scanning threads").map_or(1.0, |threads| threads.value());
        let ratio = case.measure(A_GIB).and_then(|scan| scan.ratio()).filter(|_| threads > 1.0);
        if let Some(ratio) = ratio {
            let measure = "the tracker's scan over one thread's";
            goals.push(Goal::at_most(case, measure, "", ratio, SHARED_OUT / threads));
        }
    }
    let ring: Vec<&Case> =
        report.cases.iter().filter(thousand).filter(|case| parameter(case, "tracker") == "kvm-ring").collect();
    if let [smallest, .., largest] = &ring[..]
        && let (Some(small), Some(large)) = (smallest.measure(PAUSE), largest.measure(PAUSE))
    {
        let point = Point::of_rounds(0.0, &small.rounds);
        let other = Point::of_rounds(0.0, &large.rounds);
        let noise = ((point.high - point.low) + (other.high - other.low)) / 2.0 / point.y;
        let measure = format!("pause over that at {}, within the quartiles' spread", parameter(smallest, "memory"));
        goals.push(Goal::at_most(largest, &measure, "", other.y / point.y, 1.0 + noise));
    }
    report.goals = goals;
}

/// The pause by guest size and by dirty pages, a line a tracker.
pub fn plots(report: &mut Report) {
    let by_size = plot(report, "Pause by guest size, 1,000 scattered dirty pages", ("memory", "MiB"), "pages", "1000");
    let most = report.cases.iter().map(|case| parameter(case, "memory").to_owned());
    let most = most.max_by_key(|memory| report.cases.iter().filter(|case| parameter(case, "memory") == memory).count());
    let title = format!("Pause by dirty pages, guest of {}", most.as_deref().unwrap_or_default());
    let by_pages = plot(report, &title, ("pages", ""), "memory", most.as_deref().unwrap_or_default());
    let mut case = Case::new("how the pause grows");
    case.plots.extend(by_size.into_iter().chain(by_pages));
    if !case.plots.is_empty() {
        report.cases.push(case);
    }
}

/// One line a tracker over `x`, of the cases whose parameter `fixed` has `value`. None of fewer than two points.
fn plot(report: &Report, title: &str, (x, unit): (&str, &str), fixed: &str, value: &str) -> Option<Plot> {
    let mut series: Vec<Series> = Vec::new();
    for case in report.cases.iter().filter(|case| parameter(case, fixed) == value) {
        let Some(pause) = case.measure(PAUSE) else { continue };
        let name = parameter(case, "tracker");
        let point = Point::of_rounds(number(case, x), &pause.rounds);
        match series.iter_mut().find(|series| series.name == name) {
            Some(series) => series.points.push(point),
            None => series.push(Series { name: name.to_owned(), role: Role::Ours, points: vec![point] }),
        }
    }
    series.iter().any(|series| series.points.len() > 1).then(|| Plot::Sweep {
        title: title.to_owned(),
        x: Axis::log(x, unit),
        y: Axis::log("pause by the guest's clock", "us"),
        series,
        references: vec![Reference { name: "goal at 1,000 pages".to_owned(), y: PAUSE_US }],
    })
}
