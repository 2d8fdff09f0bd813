//! What documents name is there: tests, exit codes, commands and their options.

mod running;

use running::BELAY;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Files under `folder` with this ending, build output aside.
fn files(folder: &Path, ending: &str, into: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("a folder of ours").flatten() {
        let path = entry.path();
        let name = entry.file_name();
        if path.is_dir() && name != "target" && name != ".git" {
            files(&path, ending, into);
        } else if path.extension().is_some_and(|end| end == ending) {
            into.push(path);
        }
    }
}

fn documents() -> Vec<(PathBuf, String)> {
    let mut paths = vec![root().join("README.md"), root().join("ARCHITECTURE.md")];
    files(&root().join("docs"), "md", &mut paths);
    paths.into_iter().map(|path| (path.clone(), read(&path))).collect()
}

/// Names of functions in all of our code.
fn functions() -> BTreeSet<String> {
    let mut sources = Vec::new();
    files(&root(), "rs", &mut sources);
    let mut names = BTreeSet::new();
    for source in sources {
        for line in read(&source).lines() {
            if let Some((_, rest)) = line.split_once("fn ") {
                let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
                names.insert(rest[..end].to_owned());
            }
        }
    }
    names
}

/// Whether a word in backticks is the name of a test: a sentence in snake case. It may end in `…` or `_*` for several.
fn test_name(word: &str) -> Option<(&str, bool)> {
    let start = word.trim_end_matches('…').trim_end_matches('*');
    let snake = start.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
    // Metrics are named in the same way.
    (snake && start.matches('_').count() >= 3 && !start.starts_with("belay_"))
        .then_some((start, start.len() < word.len()))
}

#[test]
fn every_test_that_a_document_names_is_there() {
    let functions = functions();
    let mut named = 0;
    for (path, text) in documents() {
        for (name, more) in text.split('`').skip(1).step_by(2).filter_map(test_name) {
            named += 1;
            let there =
                if more { functions.iter().any(|there| there.starts_with(name)) } else { functions.contains(name) };
            assert!(there, "{} names {name}, which is no function here", path.display());
        }
    }
    assert!(named > 30, "only {named} names were found: is this still how they are written?");
}

#[test]
fn p9_every_row_of_the_failure_table_is_linked_to_a_test() {
    let readme = read(&root().join("README.md"));
    let (_, table) = readme.split_once("| what fails |").expect("the failure table");
    let rows: Vec<_> = table.lines().skip(2).take_while(|line| line.starts_with('|')).collect();
    assert!(rows.len() > 12, "{rows:?}");
    for row in rows {
        let cells: Vec<_> = row.trim_matches('|').split(" | ").collect();
        assert_eq!(cells.len(), 6, "{row}");
        let tests = cells[5].split('`').skip(1).step_by(2).filter_map(test_name).count();
        assert!(tests >= 1 && cells.iter().all(|cell| !cell.trim().is_empty()), "{row}");
    }
}

#[test]
fn p9_every_row_of_the_rdma_failure_table_is_linked_to_a_test_or_says_why_there_is_none() {
    let readme = read(&root().join("README.md"));
    let (_, table) = readme.split_once("| said | after at most |").expect("the table");
    let rows: Vec<_> = table.lines().skip(2).take_while(|line| line.starts_with('|')).collect();
    assert!(rows.len() > 8, "{rows:?}");
    for row in rows {
        let cells: Vec<_> = row.trim_matches('|').split(" | ").collect();
        assert_eq!(cells.len(), 4, "{row}");
        let tests = cells[3].split('`').skip(1).step_by(2).filter_map(test_name).count();
        assert!(tests >= 1 || cells[3].starts_with("none: "), "{row}");
    }
}

#[test]
fn p9_every_exit_code_is_in_the_readme_and_in_the_help() {
    let source = read(&root().join("cli/src/exit.rs"));
    let numbered = |line: &str| line.trim().strip_suffix(',')?.split_once(" = ")?.1.parse::<u8>().ok();
    let codes: Vec<u8> = source.lines().filter_map(numbered).collect();
    assert!(codes.len() > 14, "{codes:?}");
    let readme = read(&root().join("README.md"));
    let help = Command::new(BELAY).arg("--help").output().expect("belay runs").stdout;
    let help = String::from_utf8(help).expect("UTF-8");
    let (_, table) = help.split_once("Exit codes:").expect("the help has the table");
    let in_help: BTreeSet<_> = table.split_whitespace().filter_map(|word| word.parse::<u8>().ok()).collect();
    for code in codes {
        // Of 1 there is nothing to say but that it is none of the others.
        assert!(code == 1 || readme.contains(&format!("\n| {code} | ")), "README's table lacks {code}");
        assert!(in_help.contains(&code), "the help lacks {code}: {table}");
    }
}

/// Commands in a document's console blocks, each a line (or several that end in a backslash but for the last), without prompts, comments, the
/// dots that stand for more, and what comes after a pipe.
fn commands(text: &str) -> Vec<Vec<String>> {
    let text = text.replace("\\\n", " ");
    let blocks = text.split("```console\n").skip(1).filter_map(|block| block.split("```").next());
    let said = blocks.flat_map(str::lines).filter_map(|line| {
        let (prompt, command) = line.split_once("$ ").or_else(|| line.split_once("# "))?;
        (!prompt.contains(' ')).then_some(command)
    });
    let commands = said.filter_map(|command| command.strip_prefix("belay "));
    let words = commands.map(|command| {
        let command = command.split(" | ").next().unwrap_or_default();
        let command = command.split(" > ").next().unwrap_or_default();
        let command = command.split("  # ").next().unwrap_or_default();
        command.split_whitespace().filter(|word| *word != "…").map(str::to_owned).collect::<Vec<_>>()
    });
    words.filter(|words| !words.is_empty()).collect()
}

/// Has belay read every command of a page, and do nothing else; which commands those were.
fn taken(page: &str) -> BTreeSet<String> {
    let commands = commands(&read(&root().join(page)));
    assert!(commands.len() > 8, "{commands:?}");
    let nowhere = tempfile::tempdir().expect("a directory");
    let elsewhere = |path: &str| format!("{}{path}", nowhere.path().display());
    let mut seen = BTreeSet::new();
    for words in commands {
        let mut command = Command::new(BELAY);
        command.arg(&words[0]);
        let expected = match &*words[0] {
            "list" | "status" | "release" | "catch" | "cancel" | "promote" => {
                command.args(["--run-dir", &elsewhere("/run")]);
                match (&*words[0], words.iter().skip(1).any(|word| !word.starts_with('-'))) {
                    ("list", _) => "no migration runs here",
                    ("status", false) => "no belay process runs here",
                    _ => "none runs",
                }
            }
            // Starts nothing, and only complains of this if the rest was understood.
            "send" | "receive" => {
                command.args(["--config", "/nonexistent"]);
                "cannot read /nonexistent"
            }
            // Sockets, images and devices that nobody has there.
            "relay" | "disk" => "FAILED: cannot",
            "check" if words.len() > 1 => "cannot connect to the QMP socket",
            "check" => "userfaultfd",
            "keygen" => "never leaves it",
            "man" => " pages in ",
            "completions" => "_belay",
            other => panic!("{page} shows `belay {other}`, which this test does not know"),
        };
        // Where a page speaks of this host's own folders, a test has others.
        let own = |word: &String| ["/usr/", "/run/", "/etc/", "/shared/"].iter().any(|start| word.starts_with(start));
        command.args(words[1..].iter().map(|word| if own(word) { elsewhere(word) } else { word.clone() }));
        let output = command.output().expect("belay runs");
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        assert!(said.contains(expected), "belay {}: {said}", words.join(" "));
        seen.insert(words[0].clone());
    }
    seen
}

#[test]
fn every_command_that_the_operators_page_shows_is_one_that_belay_takes() {
    let seen = taken("docs/operating.md");
    for command in ["list", "status", "release", "catch", "cancel", "promote", "send", "receive"] {
        assert!(seen.contains(command), "the page does not show {command}");
    }
}

#[test]
fn every_command_that_the_runbook_shows_is_one_that_belay_takes() {
    let seen = taken("docs/runbook.md");
    for command in ["keygen", "check", "relay", "disk", "send", "receive", "status", "release", "promote"] {
        assert!(seen.contains(command), "the runbook does not show {command}");
    }
}
