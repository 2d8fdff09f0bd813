//! Reports as a document for the repository: bench/RESULTS.md, which holds the newest full run.
//!
//! What was missed stands there with its reason, or with the words that nobody has given one: figures without their misses are advertising.

use super::columns::Columns;
use super::text::figure;
use super::{Better, Goal, Report};
use serde::Deserialize;
use std::fmt::Write;

/// Why a goal is missed, as a person has found out.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reason {
    pub suite: String,
    /// The goal's measure.
    pub measure: String,
    /// Words of the case that it is the reason for; of every case without.
    #[serde(default)]
    pub case: String,
    pub why: String,
}

impl Reason {
    fn is_for(&self, suite: &str, goal: &Goal) -> bool {
        self.suite == suite && self.measure == goal.measure && goal.case.contains(&self.case)
    }
}

/// What stands where a missed goal has no reason.
pub const NO_REASON: &str = "**not explained**";

/// All of them, in this order.
pub fn document(reports: &[Report], reasons: &[Reason]) -> String {
    let mut text = "# Results\n\n".to_owned();
    let goals = || reports.iter().flat_map(|report| report.goals.iter().map(|goal| (&*report.suite, goal)));
    let machines: Vec<String> = reports.iter().map(|report| report.machine.line()).collect();
    let one_machine = machines.windows(2).all(|pair| pair[0] == pair[1]);
    if let (true, Some(machine)) = (one_machine, machines.first()) {
        let _ = writeln!(text, "Machine: {machine}.\n");
    }
    let met = goals().filter(|(_, goal)| goal.met).count();
    let _ = writeln!(
        text,
        "What each figure is, and how a comparison is kept fair: [README.md](README.md). {met} of {} goals are met.\n",
        goals().count()
    );
    if goals().next().is_some() {
        text.push_str("## Goals\n\n| suite | figure | measured | goal | |\n|---|---|---|---|---|\n");
        for (suite, goal) in goals() {
            let verdict = match (goal.met, reasons.iter().find(|reason| reason.is_for(suite, goal))) {
                (true, _) => "met".to_owned(),
                (false, Some(reason)) => format!("missed: {}", cell(&reason.why)),
                (false, None) => format!("missed: {NO_REASON}"),
            };
            let side = if goal.better == Better::Lower { "≤" } else { "≥" };
            let unit = if goal.unit.is_empty() { String::new() } else { format!(" {}", goal.unit) };
            let _ = writeln!(
                text,
                "| {suite} | {} ({}) | {}{unit} | {side} {}{unit} | {verdict} |",
                cell(&goal.measure),
                cell(&goal.case),
                figure(goal.value),
                figure(goal.bound)
            );
        }
    }
    for (report, machine) in reports.iter().zip(&machines) {
        let quick = if report.quick { " (`--quick`: a look, not a figure)" } else { "" };
        let _ = write!(text, "\n## `{}`{quick}\n\n```\n{}\n```\n", report.suite, report.command);
        if !one_machine {
            let _ = writeln!(text, "Machine: {machine}.");
        }
        for note in &report.notes {
            let _ = writeln!(text, "\n{note}");
        }
        for case in &report.cases {
            let _ = writeln!(text, "\n**{}**", case.title());
            Columns::of_case(case).iter().for_each(|columns| table(&mut text, columns));
        }
    }
    text
}

fn table(text: &mut String, Columns { head, rows }: &Columns) {
    let rule = "---|".to_owned() + &"---:|".repeat(head.len() - 1);
    let _ = write!(text, "\n| {} |\n|{rule}\n", head.join(" | "));
    for row in rows {
        let part = if row[0].starts_with(' ') { "… " } else { "" };
        let cells: Vec<String> = row.iter().map(|cell| self::cell(cell.trim())).collect();
        let _ = writeln!(text, "| {part}{} |", cells.join(" | "));
    }
}

/// In a table a bar would end the cell.
fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}

#[cfg(test)]
mod tests {
    use super::super::tests::report;
    use super::super::{Latency, Role};
    use super::*;

    #[test]
    fn a_missed_goal_stands_there_with_its_reason_or_with_the_words_that_there_is_none() {
        let mut fault = report("fault", &[7.0]);
        let case = fault.cases[0].clone();
        fault.goals = vec![
            Goal::at_most(&case, "engine over floor", "", 1.2, 1.3),
            Goal::at_most(&case, "99% under pull", "us", 40.0, 20.0),
            Goal::at_least(&case, "threads", "", 0.5, 1.0),
        ];
        let why = "two processors | one of them the guest's".to_owned();
        let reason = |case: &str| Reason {
            suite: "fault".into(),
            measure: "99% under pull".into(),
            case: case.into(),
            why: why.clone(),
        };
        let text = document(&[fault.clone()], &[reason("another case"), reason("fabric tcp")]);
        let row =
            |start: &str| text.lines().find(|line| line.contains(start)).unwrap_or_else(|| panic!("{start}: {text}"));
        assert!(row("engine over floor").ends_with("| 1.20 | ≤ 1.30 | met |"), "{text}");
        assert!(row("99% under pull").ends_with("| missed: two processors \\| one of them the guest's |"), "{text}");
        assert!(row("threads").ends_with(&format!("| ≥ 1.00 | missed: {NO_REASON} |")), "{text}");
        assert!(text.contains("1 of 3 goals are met"));
    }

    #[test]
    fn every_table_has_its_command_and_as_many_cells_in_each_row_as_in_its_head() {
        let mut report = report("fault", &[7.0, 8.0]);
        report.cases[0].latencies.push(Latency::of_samples("  queue", Role::Ours, 4096, &[900, 1000]));
        let text = document(&[report], &[]);
        assert!(text.contains("## `fault`\n\n```\nbelay-bench fault\n```"), "{text}");
        assert!(text.contains("| … queue | 4096 | 2 |"), "{text}");
        let bars = |line: &str| line.matches('|').count();
        let rows: Vec<&str> = text.lines().filter(|line| line.starts_with('|')).collect();
        for pair in rows.windows(2).filter(|pair| pair[1].starts_with("|---")) {
            assert_eq!(bars(pair[0]), bars(pair[1]), "{pair:?}");
        }
    }
}
