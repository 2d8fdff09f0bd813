//! `belay judge`: the demo's verdict on a run of two hosts, from what each wrote down and what an observer saw.

use crate::demo::AtKill;
use crate::demo::judge::{Verdict, judge};
use crate::demo::timeline::Story;
use crate::exit::Exit;
use crate::{complain, report};
use belay_vmm_glue::migrate::observation::Observation;
use clap::Args;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Judge a run of two hosts by what each wrote down and what an observer saw
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub struct JudgeArgs {
    /// What `belay send --json --check` wrote
    #[arg(long, value_name = "FILE")]
    source: PathBuf,
    /// What `belay receive --json` wrote (with --check, if the guest went to release)
    #[arg(long, value_name = "FILE")]
    destination: PathBuf,
    /// What `belay observe --log` wrote
    #[arg(long, value_name = "FILE")]
    packets: PathBuf,
    /// The run was one of --output lease: the world may have seen output that the caught guest does not remember
    #[arg(long)]
    lease: bool,
    /// The verdict as one JSON object on stdout
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Example:
  observer$ belay observe --listen 0.0.0.0:7800 --log packets.log
  host-b$   belay receive --listen 0.0.0.0:7700 --json … >destination.events
  host-a$   belay send --to host-b:7700 --output-to observer:7800 --check --run-on 1s --json … >source.events
  belay judge --source source.events --destination destination.events --packets packets.log

A destination that died may have left its last line unfinished: that line is passed over.";

/// What keeps a run from being judged.
#[derive(Debug, thiserror::Error)]
enum JudgeError {
    #[error("cannot read {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("line {line} of {path} is no event of belay")]
    NotAnEvent { path: PathBuf, line: usize },
}

/// Runs the command.
pub fn run(args: &JudgeArgs) -> Exit {
    match verdict(args) {
        Ok((story, verdict)) => {
            let text = if args.json {
                serde_json::to_string(&verdict.report()).expect("a report is plain data") + "\n"
            } else {
                format!("{}\n{}", story.histogram(), verdict.text())
            };
            // A reader that went away still gets the exit code.
            let _ = std::io::stdout().lock().write_all(text.as_bytes());
            if verdict.passed() { Exit::Done } else { Exit::CheckFailed }
        }
        Err(error) => {
            complain(&error, "Give the files that `--json` and `observe --log` wrote; `belay help judge` shows how.");
            Exit::Usage
        }
    }
}

fn verdict(args: &JudgeArgs) -> Result<(Story, Verdict), JudgeError> {
    let story = Story {
        source: events(&args.source)?,
        destination: events(&args.destination)?,
        observer: Vec::new(),
        killed_at_us: None,
    };
    let at_kill = at_loss(&story);
    let verdict = judge(&story, at_kill.as_ref(), args.lease, &args.packets);
    Ok((story, verdict))
}

/// What the destination knew when it was lost; nothing if the guest went to release.
fn at_loss(story: &Story) -> Option<AtKill> {
    if story.is_released() {
        return None;
    }
    let mut known = AtKill::default();
    story.destination.iter().for_each(|said: &Observation| known.learn(&said.kind));
    Some(known)
}

/// The events of a file, in order. Its last line may be unfinished.
fn events(path: &Path) -> Result<Vec<Observation>, JudgeError> {
    let text = std::fs::read(path).map_err(|source| JudgeError::Read { path: path.into(), source })?;
    let text = String::from_utf8_lossy(&text);
    let lines = text.lines().count();
    let mut events = Vec::new();
    for (at, line) in text.lines().enumerate() {
        match report::parse(line) {
            Some(event) => events.push(event),
            None if at + 1 == lines && !text.ends_with('\n') => {}
            None => return Err(JudgeError::NotAnEvent { path: path.into(), line: at + 1 }),
        }
    }
    Ok(events)
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVENT: &str = r#"{"id":"source-1-1","at_us":5,"event":"all-landed","took_us":1,"bytes":2,"faults":3}"#;

    #[test]
    fn a_line_that_power_loss_cut_short_is_passed_over_and_any_other_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("events");
        std::fs::write(&path, format!("{EVENT}\n{EVENT}\n{}", &EVENT[..40])).unwrap();
        assert_eq!(events(&path).unwrap().len(), 2);
        std::fs::write(&path, format!("{EVENT}\n{}\n{EVENT}\n", &EVENT[..40])).unwrap();
        assert!(matches!(events(&path), Err(JudgeError::NotAnEvent { line: 2, .. })));
        std::fs::write(&path, format!("{EVENT}\nnot finished with a newline\n")).unwrap();
        assert!(matches!(events(&path), Err(JudgeError::NotAnEvent { line: 2, .. })), "a whole line that is no event");
    }
}
