//! Reports, from a suite's run to what is made of them.

use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};

fn bench(words: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_belay-bench"));
    command.args(words).output().expect("belay-bench runs")
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr[..]].concat()).into_owned()
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).expect("it was written")).expect("JSON")
}

/// Every round of the report's measures, times `factor`; what stood beside is left alone.
fn slowed(report: &Value, factor: f64) -> Value {
    let mut report = report.clone();
    for case in report["cases"].as_array_mut().expect("cases") {
        for measure in case["measures"].as_array_mut().expect("measures") {
            let lower = measure["better"] == "lower";
            for round in measure["rounds"].as_array_mut().expect("rounds") {
                let value = round.as_f64().expect("a number");
                *round = Value::from(if lower { value * factor } else { value / factor });
            }
        }
    }
    report
}

#[test]
fn a_suites_report_is_written_drawn_and_compared_and_a_slow_down_is_an_exit_code() {
    let folder = tempfile::tempdir().expect("a directory");
    let path = |name: &str| folder.path().join(name);
    let text = |name: &str| path(name).display().to_string();
    let (json, page, hgrm) = (text("new.json"), text("page.html"), text("hgrm"));
    let run = bench(&["fault", "--quick", "--out-json", &json, "--html", &page, "--hgrm", &hgrm]);
    if !run.status.success() && said(&run).contains("userfaultfd") {
        println!("skipped: {}", said(&run).trim());
        return;
    }
    assert!(run.status.success(), "{}", said(&run));

    let report = read(&path("new.json"));
    assert_eq!((&report["suite"], &report["quick"]), (&Value::from("fault"), &Value::from(true)));
    let case = &report["cases"][0];
    let rows = case["latencies"].as_array().expect("latencies");
    assert!(rows.iter().all(|row| row["iterations"].as_u64() > Some(0)), "{rows:?}");
    let rounds = case["measures"][0]["rounds"].as_array().expect("rounds");
    assert_eq!(Some(rounds.len()), case["measures"][0]["beside"]["rounds"].as_array().map(Vec::len));
    assert!(report["goals"].as_array().expect("goals").len() >= 3, "{}", report["goals"]);

    let drawn = std::fs::read_to_string(path("page.html")).expect("the page");
    assert!(drawn.contains("<svg") && !drawn.contains("<script") && !drawn.contains("NaN"));
    let files: Vec<_> = std::fs::read_dir(path("hgrm")).expect("the folder").flatten().collect();
    assert!(files.len() >= rows.len(), "{} .hgrm files of {} rows", files.len(), rows.len());
    let first = std::fs::read_to_string(files[0].path()).expect("a .hgrm file");
    assert!(first.trim_start().starts_with("Value") && first.contains("#[Max"), "{first}");

    // Nothing is slower than itself; twice as slow is found whatever the noise of this machine was, since the old is the new by a factor.
    let same = bench(&["compare", &json, &json]);
    assert!(same.status.success() && said(&same).contains("no difference"), "{}", said(&same));
    let calm = calm(&report);
    std::fs::write(path("old.json"), calm.to_string()).expect("written");
    std::fs::write(path("slow.json"), slowed(&calm, 2.0).to_string()).expect("written");
    let slower = bench(&["compare", &text("old.json"), &text("slow.json")]);
    assert_eq!(slower.status.code(), Some(3), "{}", said(&slower));
    assert!(said(&slower).contains("slower"), "{}", said(&slower));
    let tolerated = bench(&["compare", "--tolerance", "150", &text("old.json"), &text("slow.json")]);
    assert!(tolerated.status.success(), "{}", said(&tolerated));

    let both = bench(&["html", &json, &text("slow.json"), "--out", &text("both.html")]);
    assert!(both.status.success(), "{}", said(&both));
    let both = std::fs::read_to_string(path("both.html")).expect("the page");
    assert_eq!(both.matches("<section").count(), 2);
}

/// Rounds without this machine's noise: each its measure's first, give or take a hundredth.
fn calm(report: &Value) -> Value {
    let mut report = report.clone();
    for case in report["cases"].as_array_mut().expect("cases") {
        for measure in case["measures"].as_array_mut().expect("measures") {
            even(&mut measure["rounds"]);
            if measure["beside"].is_object() {
                even(&mut measure["beside"]["rounds"]);
            }
        }
    }
    report
}

fn even(rounds: &mut Value) {
    let rounds = rounds.as_array_mut().expect("rounds");
    let first = rounds[0].as_f64().expect("a number");
    for (at, round) in rounds.iter_mut().enumerate() {
        *round = Value::from(first * (1.0 + at as f64 * 0.01));
    }
}

#[test]
fn what_is_no_report_is_refused_with_its_name() {
    let folder = tempfile::tempdir().expect("a directory");
    let path = folder.path().join("other.json");
    std::fs::write(&path, "{\"rows\": []}").expect("written");
    let name = path.display().to_string();
    for words in [vec!["compare", &name, &name], vec!["html", &name, "--out", "-"]] {
        let refused = bench(&words);
        assert_eq!(refused.status.code(), Some(1), "{}", said(&refused));
        assert!(said(&refused).contains("other.json"), "{}", said(&refused));
    }
}
