//! Requests and answers as they go over a role's socket. A belay that was started months ago is asked by the command of today.

use super::*;
use crate::golden::compare;
use belay_vmm_glue::migrate::observation::{Kind, Observation, ObservationId};
use belay_vmm_glue::migrate::status::{BUCKETS, Checkpoints, Distribution, Failure, Output, Pages, STATUS_VERSION};
use serde_json::Value;
use std::fmt::Debug;

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");

fn requests() -> Vec<(&'static str, Request)> {
    let order = |order| Wanted::Order { order, wait_ms: 2500 };
    let promote = |source_is_gone, by_force| order(Ask::Promote { source_is_gone, by_force });
    let asked = [
        ("status", Wanted::Status),
        ("release", order(Ask::Release)),
        ("catch", order(Ask::Catch)),
        ("catch-by-force", order(Ask::CatchByForce)),
        ("catch-older", order(Ask::CatchOlder)),
        ("cancel", order(Ask::Cancel)),
        ("promote", promote(true, false)),
        ("promote-by-force", promote(false, true)),
    ];
    asked.map(|(name, ask)| (name, Request { belay: VERSION, ask })).to_vec()
}

fn answers() -> Vec<(&'static str, Said)> {
    let (what, why) = (String::from("the guest is being taken back"), String::from("there is no tether"));
    vec![
        ("refused", Said::Order(Answer::Refused { why: why.clone() })),
        ("accepted", Said::Order(Answer::Accepted { what: what.clone() })),
        ("came-to-pass", Said::Order(Answer::CameToPass { what: what.clone() })),
        ("failed", Said::Order(Answer::Failed { why: why.clone() })),
        ("not-in-time", Said::NotInTime { waiting_for: what }),
        ("bad", Said::Bad { why }),
    ]
}

/// What is in the frame `bytes`, all of them.
fn read<T: for<'a> Deserialize<'a>>(bytes: &[u8]) -> T {
    let body = body(bytes, LONGEST_ANSWER).expect("short enough").expect("whole");
    assert_eq!(body.len() + 4, bytes.len());
    parse(body).expect("understood")
}

#[test]
fn requests_are_what_they_were_when_their_version_came_out() {
    let bytes: Vec<_> = requests().iter().map(|(name, request)| (*name, frame(request))).collect();
    for (name, bytes) in compare(FOLDER, VERSION, "operator-requests", &bytes) {
        let (_, request) = requests().into_iter().find(|(there, _)| *there == name).expect("compared");
        assert_eq!(read::<Request>(&bytes), request);
    }
}

#[test]
fn answers_are_what_they_were_when_their_version_came_out() {
    let bytes: Vec<_> = answers().into_iter().map(|(name, said)| (name, answer(said))).collect();
    let shown = |said: &dyn Debug| format!("{said:?}");
    for (name, bytes) in compare(FOLDER, VERSION, "operator-answers", &bytes) {
        let (_, said) = answers().into_iter().find(|(there, _)| *there == name).expect("compared");
        assert_eq!(shown(&read::<Response>(&bytes).said), shown(&said));
    }
}

/// A host is upgraded while its guest is away: what an older command does not know of a newer belay's story takes nothing else from it.
#[test]
fn a_status_with_an_event_of_a_later_belay_is_read_without_it() {
    let whole = answer(Said::Status(Box::new(full())));
    let text = String::from_utf8(whole[4..].to_vec()).expect("text");
    let later = text.replacen(r#""event":"noticed","by":"#, r#""event":"danced","with":[1,{"a":null}],"by":"#, 1);
    assert_ne!(later, text);
    let Said::Status(status) = parse::<Response>(later.as_bytes()).expect("a status all the same").said else {
        panic!("a status")
    };
    let error = status.last_error.expect("there is one");
    assert!(matches!(error.story[0].kind, Kind::Unknown), "{:?}", error.story);
    assert!(matches!(error.story[1].kind, Kind::Failed { .. }), "{:?}", error.story);
}

/// The names of an enum's cases, as serde has them, from its refusal of one that is none.
fn cases_of<T: for<'a> Deserialize<'a>>(none: &str) -> Vec<String> {
    let refused = serde_json::from_str::<T>(none).err().expect("it is none").to_string();
    let (_, among) = refused.split_once("expected").unwrap_or_else(|| panic!("{refused}"));
    among.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

#[test]
fn every_request_and_answer_has_a_golden_file() {
    let asked = cases_of::<Ask>(r#""dance""#);
    let wanted = cases_of::<Wanted>(r#""dance""#);
    let said = cases_of::<Said>(r#""dance""#);
    let answered = cases_of::<Answer>(r#"{"answer":"dance"}"#);
    assert_eq!(
        (asked.len(), wanted.len(), said.len(), answered.len()),
        (6, 2, 4, 4),
        "a case more is to be in the files"
    );
    let requests =
        format!("{:?}", requests().iter().map(|(_, it)| serde_json::to_string(it).unwrap()).collect::<Vec<_>>());
    let answers = answers().into_iter().map(|(_, said)| String::from_utf8(answer(said)).expect("text"));
    let answers = answers.collect::<String>() + r#""status""#;
    for (cases, text) in [(asked, &requests), (wanted, &requests), (said, &answers), (answered, &answers)] {
        for case in cases {
            assert!(text.contains(&case), "{case} is in no file");
        }
    }
}

fn distribution(from: u64) -> Distribution {
    let buckets = (0..BUCKETS as u64).map(|bucket| from + bucket).collect();
    Distribution { count: from, sum_ns: from + 1, p50_ns: from + 2, p99_ns: from + 3, max_ns: from + 4, buckets }
}

/// One that says everything there is to say.
fn full() -> Status {
    let id = |number: u64| ObservationId(format!("source-4711-{number}"));
    let noticed = Kind::Noticed { by: "a sign".to_owned() };
    let failed = Kind::Failed { what: "it broke".to_owned(), advice: "mend it".to_owned() };
    let story = vec![
        Observation { id: id(1), parent: None, at_us: 100, kind: noticed },
        Observation { id: id(2), parent: Some(id(1)), at_us: 200, kind: failed },
    ];
    Status {
        version: STATUS_VERSION,
        id: "vm1".to_owned(),
        role: "source".to_owned(),
        pid: 4711,
        migration: Some("3d3d3d3d3d3d3d3d".to_owned()),
        state: "serving".to_owned(),
        why: "the guest runs at the destination".to_owned(),
        in_state_us: 1,
        owner_epoch: Some(2),
        up_us: 3,
        loop_turned_us: Some(4),
        peer: Some("192.0.2.1:7700".to_owned()),
        fabric: Some("tcp".to_owned()),
        tls: Some(true),
        memory_bytes: Some(5),
        pages: Some(Pages {
            total: 6,
            left: 7,
            zero: 8,
            bytes_pulled: 9,
            bytes_per_second: 10.5,
            faults: 11,
            demand_reads: 12,
        }),
        checkpoints: Some(Checkpoints {
            committed_epoch: 13,
            commit_age_us: Some(14),
            folded_epoch: Some(15),
            commits: 16,
            pages: 17,
            bytes: 18,
            held_back_us: 19,
            dirty_pages_per_second: Some(20.5),
            pause: Some(distribution(100)),
            age_at_commit: Some(distribution(200)),
        }),
        output: Some(Output {
            held_packets: 21,
            held_bytes: 22,
            sent_packets: 23,
            failed_emissions: 24,
            delay: Some(distribution(300)),
        }),
        lease_left_us: Some(25),
        fault_latency: Some(distribution(400)),
        blackout_us: Some(26),
        last_error: Some(Failure { what: "it broke".to_owned(), advice: "mend it".to_owned(), ago_us: 27, story }),
    }
}

/// Whether all that `was` says is in `is` too, and no otherwise.
fn still_says(is: &Value, was: &Value) -> bool {
    match (is, was) {
        (Value::Object(is), Value::Object(was)) => {
            was.iter().all(|(name, was)| is.get(name).is_some_and(|is| still_says(is, was)))
        }
        (Value::Array(is), Value::Array(was)) => {
            is.len() == was.len() && is.iter().zip(was).all(|(is, was)| still_says(is, was))
        }
        _ => is == was,
    }
}

fn said_in(bytes: &[u8]) -> Value {
    serde_json::from_slice(&bytes[4..]).expect("JSON")
}

/// The one answer that may grow under its version: each file is what a status was for a while, and today's still says all of it.
#[test]
fn a_status_says_what_it_said_in_every_belay_of_its_version() {
    for (name, status) in [("full", full()), ("least", Status { version: STATUS_VERSION, ..Status::default() })] {
        let today = answer(Said::Status(Box::new(status)));
        assert_eq!(name == "full", !said_in(&today).to_string().contains("null"), "{name}");
        let folder = std::path::Path::new(FOLDER).join(format!("v{STATUS_VERSION}/operator-status-{name}"));
        let files = || -> Vec<Vec<u8>> {
            let entries = std::fs::read_dir(&folder).into_iter().flatten();
            entries.map(|file| std::fs::read(file.expect("an entry").path()).expect("read")).collect()
        };
        if std::env::var("BELAY_GOLDEN").as_deref() == Ok("write") && !files().contains(&today) {
            std::fs::create_dir_all(&folder).expect("a folder");
            std::fs::write(folder.join(format!("{}", files().len() + 1)), &today).expect("written");
        }
        assert!(!files().is_empty(), "{}: BELAY_GOLDEN=write writes a new version's files", folder.display());
        for was in files() {
            assert!(
                still_says(&said_in(&today), &said_in(&was)),
                "{name}: something is no longer said: raise the version"
            );
            let Said::Status(read) = read::<Response>(&was).said else { panic!("no status") };
            assert!(
                still_says(&said_in(&answer(Said::Status(read))), &said_in(&was)),
                "{name}: something is no longer read"
            );
        }
        assert!(
            files().contains(&today),
            "{name}: more is said than any file has; BELAY_GOLDEN=write adds one beside them"
        );
    }
}
