//! Reports as one page: no script, nothing fetched, every figure SVG.

use super::columns::Columns;
use super::figure;
use super::svg::escape;
use super::{Case, Goal, Report};
use std::fmt::Write;

/// Colours of lines are of M. Okabe and K. Ito's palette, which every kind of colour vision tells apart.
const STYLE: &str = include_str!("page.css");

/// All of them, in this order.
pub fn page(reports: &[Report]) -> String {
    let suites: Vec<&str> = reports.iter().map(|report| &*report.suite).collect();
    let title = escape(&format!("belay-bench: {}", suites.join(", ")));
    let mut text = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
         <title>{title}</title><style>\n{STYLE}</style></head>\n<body><main><h1>{title}</h1>\n"
    );
    let goals: Vec<&Goal> = reports.iter().flat_map(|report| &report.goals).collect();
    if !goals.is_empty() {
        let met = goals.iter().filter(|goal| goal.met).count();
        let _ = writeln!(text, "<p>{met} of {} goals met.</p>", goals.len());
    }
    if reports.len() > 1 {
        let links =
            reports.iter().enumerate().map(|(at, report)| format!("<a href=\"#r{at}\">{}</a>", escape(&report.suite)));
        let _ = writeln!(text, "<nav>{}</nav>", links.collect::<Vec<_>>().join(" "));
    }
    for (at, report) in reports.iter().enumerate() {
        one(&mut text, at, report);
    }
    text + "</main></body></html>\n"
}

fn one(text: &mut String, at: usize, report: &Report) {
    let quick = if report.quick { " <small>--quick: a look, not a figure</small>" } else { "" };
    let _ = writeln!(text, "<section id=\"r{at}\"><h2>{}{quick}</h2>", escape(&report.suite));
    let _ = writeln!(
        text,
        "<p class=\"run\"><code>{}</code><br>{}</p>",
        escape(&report.command),
        escape(&report.machine.line())
    );
    for note in &report.notes {
        let _ = writeln!(text, "<p class=\"note\">{}</p>", escape(note));
    }
    for case in &report.cases {
        let _ = writeln!(text, "<article><h3>{}</h3>", escape(&case.title()));
        let goals: String = report.goals.iter().filter(|goal| goal.case == case.title()).map(figure::goal).collect();
        if !goals.is_empty() {
            let _ = writeln!(text, "<ul class=\"goals\">{goals}</ul>");
        }
        text.push_str(&figure::of_case(case));
        tables(text, case);
        text.push_str("</article>\n");
    }
    let _ = writeln!(text, "</section>");
}

fn tables(text: &mut String, case: &Case) {
    for Columns { head, rows } in Columns::of_case(case) {
        table(text, &head, rows.into_iter());
    }
}

/// The first cell of a row is its name.
fn table(text: &mut String, head: &[&str], rows: impl Iterator<Item = Vec<String>>) {
    let cells = |tag: &str, cells: &[String]| -> String {
        cells.iter().map(|cell| format!("<{tag}>{}</{tag}>", escape(cell))).collect()
    };
    let head: Vec<String> = head.iter().map(|word| (*word).to_owned()).collect();
    let _ = write!(text, "<div class=\"table\"><table><thead><tr>{}</tr></thead><tbody>", cells("th", &head));
    for row in rows {
        // A part of what stands above it is set in by its spaces, which a page would swallow.
        let class = if row[0].starts_with(' ') { " class=\"part\"" } else { "" };
        let _ = write!(text, "<tr><th{class}>{}</th>{}</tr>", escape(row[0].trim()), cells("td", &row[1..]));
    }
    text.push_str("</tbody></table></div>\n");
}

#[cfg(test)]
mod tests {
    use super::super::tests::report;
    use super::super::{Axis, Latency, Line, Mark, Plot, Point, Reference, Role, Series};
    use super::*;

    fn full() -> Report {
        let mut report = report("fault", &[6.9, 7.1, 7.0]);
        let case = &mut report.cases[0];
        let samples: Vec<u64> = (0..5000_u64).map(|at| 6_000 + at * at % 9_000).collect();
        case.latencies.push(Latency::of_samples("engine, <serving> thread", Role::Ours, 4096, &samples));
        case.latencies.push(Latency::of_samples("floor", Role::Floor, 4096, &samples[..100]));
        let points = |level: f64| [1.0, 2.0, 64.0].map(|x| Point::of_rounds(x, &[level * x, level * x * 1.1])).to_vec();
        case.plots = vec![
            Plot::Sweep {
                title: "faults a second by threads".into(),
                x: Axis::log("threads", ""),
                y: Axis::linear("faults", "1/s"),
                series: vec![Series { name: "engine".into(), role: Role::Ours, points: points(90_000.0) }],
                references: vec![Reference { name: "one thread".into(), y: 90_000.0 }],
            },
            Plot::TimeLine {
                title: "steps of the guest".into(),
                x: Axis::linear("time", "ms"),
                y: Axis::linear("steps", "1/ms"),
                lines: vec![Line {
                    name: "guest".into(),
                    role: Role::Ours,
                    points: (0..100).map(|x| (f64::from(x), 5.0)).collect(),
                }],
                marks: vec![Mark { at: 50.0, name: "killed".into() }],
            },
            Plot::percentiles("latency by percentile", &["engine, <serving> thread", "floor"]),
        ];
        let goal = Goal::at_most(case, "engine over floor", "", 1.5, 1.3);
        report.goals.push(goal);
        report
    }

    #[test]
    fn a_page_stands_by_itself_with_every_figure_table_and_goal_on_it() {
        let page = page(&[full(), report("pull", &[1.0])]);
        assert_eq!(page.matches("<svg").count(), 3, "a sweep, a time line, percentiles; nothing is drawn of nothing");
        for outside in ["<script", "http://", "https://", "url(", "@import", "<img", "<link"] {
            assert!(!page.contains(outside), "{outside}");
        }
        for there in [
            "engine, &lt;serving&gt; thread",
            "class=\"missed\"",
            "killed",
            "99.9 %",
            "0 of 1 goals met",
            "href=\"#r1\"",
            "t_typical [us]",
        ] {
            assert!(page.contains(there), "{there} is not on the page");
        }
        assert!(!page.contains("NaN") && !page.contains("inf"), "a figure has a point that is nowhere");
        let (open, closed) = (page.matches("<text").count(), page.matches("</text>").count());
        assert_eq!(open, closed);
    }
}
