//! Plots of a case, drawn.

use super::svg::{Figure, Scale, class, escape};
use super::{Axis, Case, Curve, Latency, Line, Mark, Plot, Reference, Role, Series};

/// All of a case: its own, and its latencies by percentile where it does not say which.
pub fn of_case(case: &Case) -> String {
    let mut text: String = case.plots.iter().map(|plot| draw(case, plot)).collect();
    if !case.plots.iter().any(|plot| matches!(plot, Plot::Percentiles { .. })) {
        let names: Vec<&str> = case.latencies.iter().map(|latency| &*latency.row.name).collect();
        text += &draw(case, &Plot::percentiles(&format!("Latency by percentile: {}", case.title()), &names));
    }
    text
}

fn draw(case: &Case, plot: &Plot) -> String {
    match plot {
        Plot::TimeLine { title, x, y, lines, marks } => time_line(title, x, y, lines, marks),
        Plot::Sweep { title, x, y, series, references } => sweep(title, x, y, series, references),
        Plot::Percentiles { title, curves } => percentiles(title, case, curves),
    }
}

/// Colours go to our own and the peers' lines in turn, greys to floors.
fn classes(roles: impl Iterator<Item = Role>) -> Vec<String> {
    let (mut ours, mut floors) = (0, 0);
    let mut next = |role| {
        let counter = if role == Role::Floor { &mut floors } else { &mut ours };
        *counter += 1;
        class(role, *counter - 1)
    };
    roles.map(&mut next).collect()
}

fn time_line(title: &str, x: &Axis, y: &Axis, lines: &[Line], marks: &[Mark]) -> String {
    let points = || lines.iter().flat_map(|line| line.points.iter().copied());
    if points().next().is_none() {
        return String::new();
    }
    let across = Scale::over(x, points().map(|(x, _)| x).chain(marks.iter().map(|mark| mark.at)));
    // The marks' names stand above the lines.
    let (least, most) =
        points().fold((f64::INFINITY, f64::NEG_INFINITY), |(least, most), (_, y)| (least.min(y), most.max(y)));
    let room = (!marks.is_empty() && !y.log).then(|| most + (most - least.min(0.0)) * 0.3);
    let up = Scale::over(y, points().map(|(_, y)| y).chain(room));
    let mut figure = Figure::new(title, across, up, lines.iter().map(|line| &*line.name));
    figure.marks(marks.iter().map(|mark| (mark.at, &*mark.name)));
    for (line, class) in lines.iter().zip(classes(lines.iter().map(|line| line.role))) {
        figure.line(&class, line.points.iter().copied(), false);
        if let Some((_, last)) = line.points.last() {
            figure.name(&class, *last, &line.name);
        }
    }
    figure.svg()
}

fn sweep(title: &str, x: &Axis, y: &Axis, series: &[Series], references: &[Reference]) -> String {
    let points = || series.iter().flat_map(|series| &series.points);
    if points().next().is_none() {
        return String::new();
    }
    let places: Vec<f64> = points().map(|point| point.x).collect();
    let across = Scale::over(x, places.iter().copied()).at(&places);
    let levels = references.iter().map(|reference| reference.y);
    let up = Scale::over(y, points().flat_map(|point| [point.y, point.low, point.high]).chain(levels));
    let names = series.iter().map(|series| &*series.name).chain(references.iter().map(|reference| &*reference.name));
    let mut figure = Figure::new(title, across, up, names);
    references.iter().for_each(|reference| figure.level(&reference.name, reference.y));
    for (series, class) in series.iter().zip(classes(series.iter().map(|series| series.role))) {
        figure.line(&class, series.points.iter().map(|point| (point.x, point.y)), false);
        series.points.iter().for_each(|point| figure.point(&class, point.x, point.y, point.low, point.high));
        if let Some(last) = series.points.last() {
            figure.name(&class, last.y, &series.name);
        }
    }
    figure.svg()
}

/// By 1 / (1 - percentile), logarithmic: each decade is one more nine, as HdrHistogram's plotter has it.
fn percentiles(title: &str, case: &Case, curves: &[Curve]) -> String {
    let found = curves.iter().filter_map(|curve| case.latency(&curve.latency));
    let found: Vec<&Latency> = found.filter(|latency| !latency.distribution.0.is_empty()).collect();
    let curves: Vec<Vec<(f64, f64)>> = found.iter().map(|latency| curve(latency)).collect();
    let Some(most) = found.iter().map(|latency| latency.row.iterations).max() else { return String::new() };
    let x = Axis::log("percentile", "");
    let nines = [
        (1.0, "0 %"),
        (2.0, "50 %"),
        (10.0, "90 %"),
        (1e2, "99 %"),
        (1e3, "99.9 %"),
        (1e4, "99.99 %"),
        (1e5, "99.999 %"),
        (1e6, "99.9999 %"),
    ];
    let ticks =
        nines.into_iter().filter(|(at, _)| *at <= most as f64).map(|(at, word)| (at, word.to_owned())).collect();
    let across = Scale::over(&x, [1.0, most as f64].into_iter()).with_ticks(ticks);
    let up = Scale::over(&Axis::log("latency", "us"), curves.iter().flatten().map(|(_, y)| *y));
    let mut figure = Figure::new(title, across, up, found.iter().map(|latency| &*latency.row.name));
    for ((latency, points), class) in found.iter().zip(&curves).zip(classes(found.iter().map(|latency| latency.role))) {
        figure.line(&class, points.iter().copied(), true);
        if let Some((_, last)) = points.last() {
            figure.name(&class, *last, &latency.row.name);
        }
    }
    figure.svg()
}

/// Where each recorded value begins: one over the share that is not below it. The last one ends at one over one sample.
fn curve(latency: &Latency) -> Vec<(f64, f64)> {
    let recorded = &latency.distribution.0;
    let total: u64 = recorded.iter().map(|(_, count)| count).sum();
    let mut below = 0;
    let mut points: Vec<(f64, f64)> = recorded
        .iter()
        .map(|(ns, count)| {
            let x = total as f64 / (total - below) as f64;
            below += count;
            (x, *ns as f64 / 1e3)
        })
        .collect();
    if let Some((_, longest)) = points.last().copied() {
        points.push((total as f64, longest));
    }
    points
}

/// A goal beside its figure.
pub fn goal(goal: &super::Goal) -> String {
    let (class, word) = if goal.met { ("met", "met") } else { ("missed", "missed") };
    let side = if goal.better == super::Better::Lower { "at most" } else { "at least" };
    let unit = if goal.unit.is_empty() { String::new() } else { format!("&#8239;{}", escape(&goal.unit)) };
    let figure = super::text::figure;
    format!(
        "<li class=\"{class}\"><b>{word}</b> {}: <span class=\"n\">{}{unit}</span>, {side} <span class=\"n\">{}{unit}</span></li>",
        escape(&goal.measure),
        figure(goal.value),
        figure(goal.bound)
    )
}
