//! bench/RESULTS.md, which `belay-bench results` writes from the reports of a full run: that it is whole, and that nothing missed goes unexplained.

use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

const BENCH: &str = env!("CARGO_BIN_EXE_belay-bench");
/// What stands where a missed goal has no reason.
const NO_REASON: &str = "**not explained**";
/// Commands whose runs make no report of the common form: two hosts, paper, and what is done with reports.
const OTHERS: [&str; 6] = ["wire", "envelope", "html", "results", "compare", "help"];

fn here(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// Every suite that makes a report, as `belay-bench --help` lists the commands.
fn suites() -> BTreeSet<String> {
    let output = Command::new(BENCH).arg("--help").output().expect("belay-bench starts");
    let help = String::from_utf8(output.stdout).expect("text");
    let (_, commands) = help.split_once("Commands:\n").expect("a list of commands");
    let commands = commands.lines().take_while(|line| !line.is_empty());
    // A line that goes on is further in.
    let names = commands.filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    let names = names.filter_map(|line| line.split_whitespace().next());
    names.filter(|name| !OTHERS.contains(name)).map(str::to_owned).collect()
}

/// What is wrong with such a document.
fn faults(text: &str, suites: &BTreeSet<String>) -> Vec<String> {
    let mut faults = Vec::new();
    if !text.starts_with("# Results\n") {
        faults.push("it does not begin as results do".to_owned());
    }
    let mut missing = suites.clone();
    let (top, sections) = text.split_once("\n## `").unwrap_or((text, ""));
    let one_machine = top.contains("\nMachine: ");
    for section in sections.split("\n## `").filter(|section| !section.is_empty()) {
        let (suite, rest) = section.split_once('`').unwrap_or((section, ""));
        missing.remove(suite);
        let mut wrong = |what: &str| faults.push(format!("{suite}: {what}"));
        let (heading, body) = rest.split_once('\n').unwrap_or((rest, ""));
        if heading.contains("--quick") {
            wrong("its report is of a run with --quick");
        }
        let command = body.strip_prefix("\n```\n").and_then(|body| body.split_once("\n```\n"));
        if !command.is_some_and(|(command, _)| command.starts_with(&format!("belay-bench {suite}"))) {
            wrong("no command stands before its tables");
        }
        if !body.contains("|---|") {
            wrong("it has no table");
        }
        if !one_machine && !body.contains("\nMachine: ") {
            wrong("no machine is named");
        }
        if body.contains("NaN") {
            wrong("a figure is none");
        }
    }
    faults.extend(missing.iter().map(|suite| format!("{suite}: it has no section")));
    faults.extend(goal_faults(top));
    faults
}

/// What is wrong with the table of goals, which stands before the suites.
fn goal_faults(top: &str) -> Vec<String> {
    let rows = top.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| suite |"));
    let verdicts: Vec<(&str, &str)> =
        rows.map(|row| (row, row.trim_end_matches(" |").rsplit(" | ").next().unwrap_or_default())).collect();
    let met = verdicts.iter().filter(|(_, verdict)| *verdict == "met").count();
    let mut faults = Vec::new();
    if !top.contains(&format!(" {met} of {} goals are met.", verdicts.len())) {
        faults.push(format!("it does not say that {met} of {} goals are met", verdicts.len()));
    }
    for (row, verdict) in verdicts {
        let why = verdict.strip_prefix("missed: ").map(str::trim);
        if verdict != "met" && why.is_none_or(|why| why.is_empty() || why == NO_REASON) {
            faults.push(format!("missed without a reason in bench/reasons.json: {row}"));
        }
    }
    faults
}

/// A report of one case with one goal, which is missed.
fn report(suite: &str) -> Value {
    let machine = json!({
        "cpu": "a processor", "cores": 2, "memory_bytes": 1 << 30, "kernel": "6.18", "page_bytes": 4096, "rdma": [], "belay": "0.1.0",
        "commit": null, "debug": false,
    });
    let measure = json!({"name": "time", "unit": "us", "better": "lower", "rounds": [1.0, 2.0], "beside": null});
    let case = json!({
        "name": "a case", "parameters": [["fabric", "tcp"]], "latencies": [], "rates": [], "measures": [measure], "plots": [],
    });
    let goal = json!({
        "case": "a case, fabric tcp", "measure": "time", "unit": "us", "value": 2.0, "bound": 1.0, "better": "lower", "met": false,
    });
    let command = format!("belay-bench {suite}");
    json!({
        "form": 1, "suite": suite, "command": command, "quick": false, "machine": machine, "cases": [case], "goals": [goal], "notes": [],
    })
}

/// What `results` makes of these, with these reasons.
fn document(reports: &[Value], reasons: &Value) -> String {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name);
    std::fs::write(path("reasons.json"), reasons.to_string()).expect("written");
    let mut command = Command::new(BENCH);
    command.arg("results").arg("--reasons").arg(path("reasons.json")).arg("--out").arg(path("out.md"));
    for (at, report) in reports.iter().enumerate() {
        let path = path(&format!("{at}.json"));
        std::fs::write(&path, report.to_string()).expect("written");
        command.arg(path);
    }
    let output = command.output().expect("belay-bench starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    std::fs::read_to_string(path("out.md")).expect("it was written")
}

#[test]
fn the_results_have_every_suite_with_its_command_and_machine_and_no_miss_without_its_reason() {
    let path = here("RESULTS.md");
    // On from when somebody has written it; any other trouble in reading it is a failure.
    if !path.exists() {
        println!("{} has not been written yet", path.display());
        return;
    }
    let text = std::fs::read_to_string(&path).expect("bench/RESULTS.md");
    assert_eq!(faults(&text, &suites()), Vec::<String>::new(), "write it anew: see bench/README.md, Results");
}

#[test]
fn every_reason_is_of_a_suite_and_says_something_and_is_taken() {
    let text = std::fs::read_to_string(here("reasons.json")).expect("bench/reasons.json");
    let reasons: Value = serde_json::from_str(&text).expect("JSON");
    let suites = suites();
    for reason in reasons.as_array().expect("a list") {
        let word = |name: &str| reason[name].as_str().unwrap_or_default().trim();
        assert!(suites.contains(word("suite")), "{reason}");
        assert!(!word("measure").is_empty() && word("why").len() > 20, "{reason}");
    }
    document(&[report("fault")], &reasons);
}

#[test]
fn what_results_writes_is_whole_and_what_is_left_out_or_not_explained_is_found() {
    let suites = suites();
    assert!(suites.contains("fault") && suites.contains("replay") && suites.len() >= 12, "{suites:?}");
    let reports: Vec<Value> = suites.iter().map(|suite| report(suite)).collect();
    let reason = |suite: &String| json!({"suite": suite, "measure": "time", "why": "one processor | two"});
    let reasons: Vec<Value> = suites.iter().map(reason).collect();
    let whole = document(&reports, &Value::from(reasons.clone()));
    assert_eq!(faults(&whole, &suites), Vec::<String>::new(), "{whole}");

    let unexplained = document(&reports, &Value::from(reasons[1..].to_vec()));
    let [found] = &faults(&unexplained, &suites)[..] else { panic!("{unexplained}") };
    assert!(found.contains("without a reason") && found.contains(suites.first().expect("some")), "{found}");

    let fewer = faults(&document(&reports[1..], &Value::from(reasons.clone())), &suites);
    assert_eq!(fewer, [format!("{}: it has no section", suites.first().expect("some"))]);

    let mut quick = reports.clone();
    quick[0]["quick"] = true.into();
    let found = faults(&document(&quick, &Value::from(reasons)), &suites);
    assert!(found.len() == 1 && found[0].contains("--quick"), "{found:?}");
}
