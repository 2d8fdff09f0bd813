//! Every claim of docs/security.md names tests, and they exist.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Names of all functions in the project's Rust files.
fn functions(folder: &Path, into: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(folder).expect("a folder").flatten() {
        let path = entry.path();
        let name = entry.file_name();
        if path.is_dir() && name != "target" && !name.to_string_lossy().starts_with('.') {
            functions(&path, into);
        } else if path.extension().is_some_and(|end| end == "rs") {
            let text = std::fs::read_to_string(&path).expect("read");
            let after = text.split("fn ").skip(1);
            into.extend(after.map(|rest| rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()));
        }
    }
}

/// Words in backquotes that look like the name of a test: three underscores or more.
fn named(line: &str) -> impl Iterator<Item = &str> {
    let quoted = line.split('`').skip(1).step_by(2);
    quoted.filter(|word| word.matches('_').count() >= 3 && word.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'))
}

#[test]
fn every_claim_of_the_security_page_names_a_test_that_exists() {
    let page = std::fs::read_to_string(root().join("docs/security.md")).expect("the page");
    let mut there = BTreeSet::new();
    functions(&root(), &mut there);
    let (mut claims, mut missing) = (0, Vec::new());
    // A claim is a row of a table below its head and its rule.
    let rows =
        page.lines().filter(|line| line.starts_with('|') && !line.starts_with("|---") && !line.starts_with("| claim"));
    for row in rows {
        claims += 1;
        let tests: Vec<_> = named(row).collect();
        let says_none = row.contains("no test: ");
        assert!(!tests.is_empty() || says_none, "neither a test nor why there is none: {row}");
        missing.extend(tests.into_iter().filter(|test| !there.contains(*test)));
    }
    assert!(missing.is_empty(), "no such tests: {missing:?}");
    assert!(claims >= 20, "{claims} claims");
}

#[test]
fn the_fuzzing_page_names_every_target_there_is() {
    let page = std::fs::read_to_string(root().join("docs/fuzzing.md")).expect("the page");
    let script = std::fs::read_to_string(root().join(".ci/fuzz")).expect("the script");
    for folder in ["transport", "checkpoint", "vmm-glue", "cli"] {
        for entry in std::fs::read_dir(root().join(folder).join("fuzz/fuzz_targets")).expect("targets").flatten() {
            let name = entry.file_name().into_string().expect("ASCII");
            let target = format!("{folder}/{}", name.trim_end_matches(".rs"));
            assert!(page.contains(&format!("`{target}`")) && script.contains(&target), "{target}");
            let test = format!("the_corpus_of_{}_breaks_no_promise", name.trim_end_matches(".rs"));
            let mut there = BTreeSet::new();
            functions(&root().join(folder).join("src"), &mut there);
            assert!(there.contains(&test), "{test}");
        }
    }
}
