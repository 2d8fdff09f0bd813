//! The kill matrix: `belay soak` as CI runs it. Every phase and strike over both fabrics of one host, each run judged by what its
//! processes said and did and what an observer saw. A failure prints the command that makes the run again.

mod running;

use running::{BELAY, has_kvm};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

const PHASES: [&str; 13] = [
    "prepare", "switch", "handover", "pull", "landing", "epoch", "record", "commit", "output", "fold", "tethered",
    "release", "catch",
];

/// What the matrix promises: so many strikes within so long, on two processors. It makes more than that, for every strike to come in every
/// phase, and the bound is on the promise: the first two hundred take about half of it where nothing else runs, so a machine that is as busy with
/// other work as with this keeps it, and one on which a run has become twice as slow does not. A bound on the whole would have a quarter to
/// spare, and would be crossed by other people's work more often than by ours.
const PROMISED: u64 = 200;
const PROMISED_WITHIN: Duration = Duration::from_secs(300);

fn can_soak(name: &str) -> bool {
    let why = match (has_kvm(), rustix::process::geteuid().is_root()) {
        (false, _) => "needs /dev/kvm",
        (_, false) => "needs root: its runs have namespaces of their own",
        (true, true) => return true,
    };
    eprintln!("skipped: {name} {why}");
    false
}

/// Runs `belay soak --json` and gives its exit code, what it said of each run, and its sum.
fn soak(arguments: &[&str]) -> (i32, Vec<Value>, Value) {
    soak_heard(arguments, |_| {})
}

/// The same, and `hear` has each line as it comes.
fn soak_heard(arguments: &[&str], mut hear: impl FnMut(&Value)) -> (i32, Vec<Value>, Value) {
    let mut command = Command::new(BELAY);
    command.args(["soak", "--json"]).args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("belay starts");
    let mut complaints = child.stderr.take().expect("stderr is a pipe");
    let complaints = std::thread::spawn(move || {
        let mut text = Vec::new();
        // What it could not be heard of is missing from a message, no more.
        let _ = complaints.read_to_end(&mut text);
        String::from_utf8_lossy(&text).into_owned()
    });
    let lines = BufReader::new(child.stdout.take().expect("stdout is a pipe")).lines().map_while(Result::ok);
    let lines = lines.filter_map(|line| serde_json::from_str(&line).ok());
    let lines: Vec<Value> = lines.inspect(|line| hear(line)).collect();
    let (status, complaints) = (child.wait().expect("it ends"), complaints.join().expect("its words are bytes"));
    let runs = lines.iter().filter(|line| line.get("case").is_some()).cloned().collect();
    let sum = lines.iter().find(|line| line["event"] == "soak").cloned();
    let sum = sum.unwrap_or_else(|| panic!("{status}, and no sum: {complaints}"));
    (status.code().expect("it ends by itself"), runs, sum)
}

/// The case of a run as the command line takes it.
fn named(run: &Value) -> String {
    let of = |field: &str| run["case"][field].as_str().expect("a word").to_owned();
    format!("{}/{}/{}/{}", of("fabric"), of("phase"), of("strike"), run["case"]["seed"])
}

/// What broke, for a person.
fn failures(runs: &[Value]) -> String {
    let broken = runs.iter().filter(|run| run["outcome"] == "broken");
    let told = broken.map(|run| {
        let lines = |field: &str| {
            let lines = run[field].as_array().into_iter().flatten();
            lines.filter_map(Value::as_str).map(|line| format!("\n    {line}")).collect::<String>()
        };
        format!(
            "{} ({}){}{}\n  again: belay soak --case {}",
            named(run),
            run["landed"],
            lines("wrong"),
            lines("story"),
            named(run)
        )
    });
    told.collect::<Vec<_>>().join("\n")
}

mod kvm {
    use super::*;

    #[test]
    fn two_hundred_and_eighty_six_seeded_strikes_lose_nothing_that_was_promised() {
        if !can_soak("the kill matrix") {
            return;
        }
        let begun = Instant::now();
        let jobs = std::thread::available_parallelism().map_or(2, usize::from).clamp(2, 4).to_string();
        let (mut held, mut promised) = (0, Duration::MAX);
        let arguments = ["--runs", "286", "--jobs", &jobs, "--fabric", "local,tcp", "--seed", "1"];
        let (code, runs, sum) = soak_heard(&arguments, |line| {
            held += u64::from(line["outcome"] == "held");
            if held == PROMISED {
                promised = promised.min(begun.elapsed());
            }
        });
        println!("kill matrix: {:.0} s, {jobs} at a time: {sum}", begun.elapsed().as_secs_f64());
        assert_eq!((code, &sum["broken"], &sum["held"]), (0, &0.into(), &286.into()), "{}", failures(&runs));
        for fabric in ["local", "tcp"] {
            for phase in PHASES {
                let held = sum["by_phase"][format!("{fabric}/{phase}")].as_u64().unwrap_or(0);
                assert!(held >= 10, "{fabric}/{phase}: {held} runs held");
            }
            let latency = &sum["death_to_running"][fabric];
            assert!(latency["runs"].as_u64().is_some_and(|runs| runs >= 10), "{fabric}: {latency}");
        }
        // Every strike in every phase of both, takeovers included.
        for strike in ["source-takeover", "server-takeover"] {
            for fabric in ["local", "tcp"] {
                let held = sum["by_strike"][format!("{fabric}/{strike}")].as_u64();
                assert!(held >= Some(PHASES.len() as u64), "{fabric}/{strike}: {held:?} runs held");
            }
            for came in ["went-on", "caught", "nothing"] {
                let runs = sum["by_succession"][format!("{strike}/{came}")].as_u64();
                assert!(runs >= Some(1), "no {strike} came to {came}: {}", sum["by_succession"]);
            }
        }
        assert!(sum["taken_over_twice"].as_u64() >= Some(4), "{}", sum["taken_over_twice"]);
        for fabric in ["local", "tcp"] {
            assert!(sum["kills_after_folding_over"][fabric].as_u64() >= Some(1), "{fabric}: {sum}");
        }
        // Those and no others: a guest is caught from a checkpoint in nearly every run, which says nothing of when the kill came.
        let in_folds = runs.iter().filter(|run| run["outcome"] == "held" && run["folding"] == true);
        let in_folds: Vec<_> = in_folds.map(|run| (named(run), &run["landed"])).collect();
        let kill = |name: &str| name.contains("/fold/") && name.contains("-kill/") && !name.contains("source");
        let meant = |(name, landed): &(String, &Value)| kill(name) && landed.to_string().contains("fold-");
        assert!(in_folds.iter().all(meant), "{in_folds:?}");
        assert_eq!(sum["kills_after_folding"], in_folds.len(), "{in_folds:?}");
        // A guest that is fenced in the end was compared as far as it is there; one that is gone with its process counts as nothing but that.
        let fenced: Vec<_> = runs.iter().filter(|run| run["outcome"] == "held" && run["home"] == "fenced").collect();
        let not_compared = |run: &&Value| run["fenced"]["not"]["why"].as_str() == Some("none of its pages had come");
        let compared = |run: &&Value| run["fenced"]["pages"]["pages"].as_u64() > Some(0);
        assert!(fenced.iter().all(|run| compared(run) || not_compared(run)), "{fenced:#?}");
        let fenced: Vec<_> = fenced.into_iter().filter(compared).collect();
        assert!(fenced.len() >= 10, "{fenced:#?}");
        let whole = |run: &&Value| run["fenced"]["pages"]["not_there"] == 0;
        assert!(fenced.iter().any(&whole) && !fenced.iter().all(whole), "{fenced:#?}");
        assert!(sum["fenced_compared"].as_u64() >= Some(fenced.len() as u64), "{sum}");
        // Whatever the first one came to, the same directories serve a second migration.
        for end in ["caught", "not-moved", "owner", "fenced", "with-its-host"] {
            assert!(sum["second_after"][end].as_u64() >= Some(1), "after {end}: {}", sum["second_after"]);
        }
        // A short lease may run out on a busy host; more often than that it would hide something.
        assert!(sum["void"].as_u64() <= Some(26), "{} runs were made again", sum["void"]);
        assert_eq!(sum["dropped_lines"], 0, "a process of a run talked too much");
        assert!(promised < PROMISED_WITHIN, "{PROMISED} strikes took {promised:?}, {jobs} at a time");
    }

    // The seeds of the matrix freeze no destination between its last look at the source's ring and the write that commits.
    #[test]
    fn a_destination_frozen_between_check_and_write_of_a_commit_tries_it_past_its_lease_and_is_refused() {
        if !can_soak("a freeze before a commit") {
            return;
        }
        for case in ["local/commit/freeze/2", "tcp/commit/freeze/2"] {
            // That the observer saw nothing which had not committed, and of the guest no two stories, is part of holding.
            let (code, runs, _) = soak(&["--case", case]);
            assert_eq!(code, 0, "{}", failures(&runs));
            let run = runs.iter().find(|run| run["outcome"] == "held").expect("it held");
            assert_eq!(run["landed"], "stopped at commit-due number 2", "{case}");
            let (tried, caught) = (run["refused"]["epoch"].as_u64(), run["caught_epoch"].as_u64());
            assert_eq!((tried, caught), (Some(2), Some(1)), "{case}: {run}");
            let why = run["refused"]["why"].as_str().expect("a refusal says why");
            // By a source that has shut it out, not by a bound of its own that ran out.
            assert!(!why.is_empty() && !why.contains("within"), "{case}: {why}");
            all_found_out(case, "unsaid-refusal,other-refusal,stale-output,contradiction,lost-commit");
        }
    }

    /// Seeds whose strike lands when a catch has the first page of what it found in the ring in guest RAM, and no more of it: the first of them has
    /// whoever takes over killed there too.
    const IN_THE_FOLD: [u64; 2] = [20, 36];

    #[test]
    fn a_soak_in_which_a_process_dies_while_a_catch_folds_loses_nothing_that_had_committed() {
        if !can_soak("deaths in a catch's fold") {
            return;
        }
        let strikes = [
            "source-takeover",
            "source-kill",
            "destination-kill",
            "host-kill",
            "server-kill",
            "server-takeover",
            "guard-kill",
        ];
        let case = |fabric, strike, seed| format!("{fabric}/catch/{strike}/{seed}");
        let of = |fabric| strikes.iter().flat_map(move |strike| IN_THE_FOLD.map(|seed| case(fabric, strike, seed)));
        let cases: Vec<String> = of("local").chain(of("tcp")).collect();
        let arguments = cases.iter().flat_map(|case| ["--case", case]).chain(["--jobs", "2"]).collect::<Vec<_>>();
        let (code, runs, _) = soak(&arguments);
        assert_eq!(code, 0, "{}", failures(&runs));
        for case in &cases {
            let run = runs.iter().find(|run| run["outcome"] == "held" && named(run) == *case).expect("it held");
            assert_eq!(run["landed"], "stopped at catch-folding number 1", "{case}");
            if case.contains("/source-kill/") {
                // The guest has gone with whoever had shut the destination out, and no other may run it.
                assert!(run["caught_epoch"].is_null() && run["home"] != "owner", "{case}: {run}");
                continue;
            }
            // That nothing is missing of what the destination was told had committed, and that the guest's memory is whole, is part of holding.
            assert_eq!(run["home"], "caught", "{case}: {run}");
            assert!(
                run["recovered_pages"].as_u64() > Some(0) && run["caught_epoch"].as_u64() >= Some(3),
                "{case}: {run}"
            );
            let took_over = case.contains("/source-takeover/");
            assert_eq!(run["succession"] == "caught", took_over || case.contains("/server-takeover/"), "{case}: {run}");
            assert_eq!(run["killed_again"], took_over && case.ends_with("/20"), "{case}: {run}");
        }
        all_found_out(
            "tcp/catch/source-takeover/20",
            "lost-commit,wrong-page,unchecked,nobody-took-over,nothing-to-fold",
        );
    }

    #[test]
    fn every_lie_about_what_a_fenced_guest_has_is_found_out_by_its_verdict() {
        if !can_soak("lies about fenced guests") {
            return;
        }
        for case in ["tcp/tethered/source-kill/1", "local/pull/source-kill/1"] {
            all_found_out(case, "wrong-page,unchecked,uncompared,forged-packet,stale-output,lost-packet");
        }
    }

    #[test]
    fn a_seed_is_repeated_by_one_command_and_is_the_same_case() {
        if !can_soak("a seed repeated") {
            return;
        }
        let (_, first, _) = soak(&["--runs", "3", "--seed", "77", "--fabric", "local"]);
        let (_, second, _) = soak(&["--runs", "3", "--seed", "77", "--fabric", "local"]);
        let cases = |runs: &[Value]| {
            let mut cases: Vec<_> = runs.iter().filter(|run| run["outcome"] == "held").map(named).collect();
            cases.sort();
            cases
        };
        assert_eq!(cases(&first), cases(&second));
        // A failure names its case so that it can be typed as it stands; a lie in the evidence makes one.
        let case = named(first.iter().find(|run| run["outcome"] == "held").expect("one held"));
        let lying = Command::new(BELAY).args(["soak", "--case", &case, "--lie", "left-behind"]).output().unwrap();
        assert_eq!(lying.status.code(), Some(20));
        let said = String::from_utf8_lossy(&lying.stderr).into_owned();
        let again = said.lines().find_map(|line| line.trim().strip_prefix("again: belay ")).expect("it says how");
        let words: Vec<_> = again.split(' ').skip(1).collect();
        let (code, again, _) = soak(&words);
        let landed = |runs: &[Value]| {
            let run = runs.iter().find(|run| run["outcome"] == "held" && named(run) == case);
            run.map(|run| run["landed"].clone())
        };
        assert_eq!((code, landed(&again)), (0, landed(&first)), "{again:?}");
    }

    #[test]
    fn a_soak_at_the_pace_of_a_slow_host_holds_and_a_failure_says_how_to_make_it_again_at_that_pace() {
        if !can_soak("a slow soak") {
            return;
        }
        let case = "tcp/fold/destination-kill/5";
        let (code, runs, sum) = soak(&["--case", case, "--slow-host", "3"]);
        assert_eq!((code, &sum["held"]), (0, &1.into()), "{}", failures(&runs));
        let lying = ["soak", "--slow-host", "3", "--case", case, "--lie", "left-behind"];
        let said = Command::new(BELAY).args(lying).output().unwrap().stderr;
        let said = String::from_utf8_lossy(&said).into_owned();
        assert!(said.contains(&format!("again: belay soak --slow-host 3 --case {case}")), "{said}");
    }

    #[test]
    fn a_soak_goes_on_until_told_to_stop_and_then_sums_up() {
        if !can_soak("a soak without end") {
            return;
        }
        let arguments = ["soak", "--json", "--until-stopped", "--jobs", "1", "--fabric", "tcp", "--seed", "5"];
        let mut child = Command::new(BELAY).args(arguments).stdout(Stdio::piped()).spawn().expect("belay starts");
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut next = || -> Option<Value> { serde_json::from_str(&lines.next()?.ok()?).ok() };
        let mut held = 0;
        while held < 2 {
            let run = next().expect("it goes on");
            held += u64::from(run["outcome"] == "held");
            assert_ne!(run["outcome"], "broken", "{run}");
        }
        running::kill(child.id() as i32, libc::SIGTERM);
        let told = Instant::now();
        let sum = std::iter::from_fn(&mut next).find(|line| line["event"] == "soak").expect("it sums up");
        assert!(sum["held"].as_u64() >= Some(held) && sum["broken"] == 0, "{sum}");
        assert_eq!(child.wait().unwrap().code(), Some(0));
        assert!(told.elapsed() < Duration::from_secs(100), "it took {:?} to stop", told.elapsed());
    }

    #[test]
    fn a_soak_that_is_killed_leaves_neither_process_nor_file() {
        if !can_soak("a soak that is killed") {
            return;
        }
        let place = running::Place::new();
        let arguments =
            ["soak", "--json", "--jobs", "2", "--case", "local/pull/server-kill/3", "--case", "tcp/pull/server-kill/4"];
        let before = shared_files();
        let soak = place.belay(&arguments);
        // Waits until the runs' own processes are there: a VMM apart is the last of them.
        let end = Instant::now() + running::BOUND;
        while place.running().iter().filter(|(_, line)| line.contains(" vmm")).count() == 0 {
            assert!(Instant::now() < end, "no run ever had a VMM: {:?}", place.running());
            std::thread::sleep(Duration::from_millis(5));
        }
        soak.signal(libc::SIGKILL);
        place.expect_nothing_left();
        assert_eq!(shared_files(), before);
    }

    #[test]
    fn every_lie_about_a_run_is_found_out_by_its_verdict() {
        if !can_soak("lies") {
            return;
        }
        let lies = "lost-packet,contradiction,forged-packet,wrong-page,unchecked,lost-commit,two-owners,stale-output,released,other-exit-code,left-behind,empty-guest,other-tls";
        all_found_out("local/pull/destination-kill/11", lies);
    }

    #[test]
    fn every_lie_about_a_takeover_is_found_out_by_its_verdict() {
        if !can_soak("lies about takeovers") {
            return;
        }
        let lies = "no-second,second-failed,second-wrong-page,second-unchecked,\
            nobody-took-over,forgotten,lost-packet,contradiction,forged-packet,wrong-page,unchecked,left-behind";
        for case in ["tcp/pull/source-takeover/1", "local/pull/server-takeover/3"] {
            all_found_out(case, lies);
        }
    }

    fn all_found_out(case: &str, lies: &str) {
        let (code, runs, sum) = soak(&["--case", case, "--lie", lies]);
        let wrong = &runs.last().expect("a report")["wrong"];
        assert_eq!((code, &sum["broken"]), (20, &1.into()), "{case}: {wrong}");
        let found = wrong.as_array().unwrap().iter().filter_map(Value::as_str);
        let found: Vec<_> = found.filter(|line| line.contains(" was found out: ")).collect();
        assert_eq!(found.len(), lies.split(',').count(), "{case}: {found:#?}");
    }
}

#[test]
fn a_plan_says_what_each_run_would_be_and_when_it_is_struck_and_makes_none() {
    let plan = |arguments: &[&str]| {
        let Output { status, stdout, stderr } =
            Command::new(BELAY).args(["soak", "--plan"]).args(arguments).output().expect("belay starts");
        assert!(status.success(), "{status}: {}", String::from_utf8_lossy(&stderr));
        String::from_utf8(stdout).expect("text")
    };
    let all = plan(&["--runs", "26", "--fabric", "verbs", "--seed", "9"]);
    assert_eq!(all.lines().count(), 26);
    for phase in PHASES {
        let of_it = all.lines().filter(|line| line.starts_with(&format!("verbs/{phase}/")));
        assert_eq!(of_it.count(), 2, "{phase} in {all}");
    }
    // A line's first word is a case as the command line takes it, and its moment is the same then.
    let line = all.lines().nth(7).expect("26 of them");
    let (case, moment) = line.split_once("  ").expect("a case and a moment");
    assert!(moment.starts_with("at ") || moment.starts_with("with "), "{line}");
    assert_eq!(plan(&["--case", case]).trim_end(), line);
}

/// Files of belay in memory that outlive a process.
fn shared_files() -> Vec<String> {
    let entries = std::fs::read_dir("/dev/shm").into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.retain(|name| name.contains("belay"));
    names.sort();
    names
}
