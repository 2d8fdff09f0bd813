//! Starvation: too little memory, no room where state is written, hardly any descriptors, one CPU, clocks that disagree. Each ends in a
//! named state, and nothing is lost: whoever has the guest has compared its memory, and an observer that starves of nothing has seen of it what one
//! machine that never failed would have shown.

mod running;

use belay_vmm_glue::migrate::observation::{Kind, Observation};
use belay_vmm_glue::witness::model::{Model, NonceSeen};
use belay_vmm_glue::witness::observer::{Seen, distinct};
use running::{BELAY, BOUND, Place, Process, has_kvm, packets};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

/// What stands before `belay` on a role's command line: a shell's words that end in `exec "$@"`, or another program that runs its
/// arguments.
type Before<'a> = &'a [&'a str];

/// Two roles that were started with something before them, and who looks on.
struct Roles {
    source: Process,
    destination: Process,
    observer: Process,
    packets: PathBuf,
}

const GUEST: [&str; 8] = ["--memory", "32M", "--drive", "kvm", "--run-before", "10ms", "--ring", "4M"];
const SHORT: [&str; 3] = ["--check", "--run-on", "50ms"];

fn start(place: &Place, before: Before<'_>, arguments: &[&str]) -> Process {
    match before {
        [] => place.belay(arguments),
        [program, rest @ ..] => {
            let mut command = Command::new(program);
            command.args(rest).arg(BELAY).args(arguments);
            place.start(command)
        }
    }
}

/// What a side is started with: before `belay` and behind what every run has.
#[derive(Clone, Copy, Default)]
struct With<'a> {
    before: Before<'a>,
    more: &'a [&'a str],
}

/// Starts an observer, a destination and then a source; the source is not started when the destination ended before it could listen.
fn roles(place: &Place, of_destination: With<'_>, of_source: With<'_>) -> (Process, Process, Option<Process>) {
    let output = format!("unix:{}", place.text("observer.sock"));
    let mut observer = place.belay(&["observe", "--json", "--listen", &output, "--log", &place.text("packets")]);
    observer.wait_for_event("listening");
    let state = place.text("destination");
    let receive = ["receive", "--json", "--listen", "127.0.0.1:0", "--drive", "kvm", "--state-dir", &state];
    let receive = [&receive[..], &["--output-to", &output], &SHORT, of_destination.more].concat();
    let mut destination = start(place, of_destination.before, &receive);
    let Some(listening) = destination.wait_for_event_or_end("listening") else { return (observer, destination, None) };
    let to = listening["address"].as_str().unwrap().to_owned();
    let state = place.text("source");
    let send = ["send", "--json", "--to", &to, "--state-dir", &state, "--output-to", &output];
    let source = start(place, of_source.before, &[&send[..], &GUEST, &SHORT, of_source.more].concat());
    (observer, destination, Some(source))
}

fn both(place: &Place, of_destination: Before<'_>, of_source: Before<'_>, send: &[&str]) -> Roles {
    both_with(place, With { before: of_destination, ..With::default() }, With { before: of_source, more: send })
}

fn both_with(place: &Place, of_destination: With<'_>, of_source: With<'_>) -> Roles {
    let (observer, destination, source) = roles(place, of_destination, of_source);
    let packets = place.path("packets");
    Roles { source: source.expect("the destination listens"), destination, observer, packets }
}

/// How a migration ended, source first. A destination that waits for somebody's word is told to end.
fn ends(roles: &mut Roles) -> (i32, i32) {
    let source = roles.source.end();
    let settled = Instant::now() + std::time::Duration::from_millis(500);
    while roles.destination.is_running() && Instant::now() < settled {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    if roles.destination.is_running() {
        roles.destination.signal(libc::SIGTERM);
    }
    (source, roles.destination.end())
}

/// Whoever has the guest at the end has looked at every page of it, and the observer saw nothing else than what that guest remembers. Gives what
/// the end is called.
fn home_is_whole(roles: &mut Roles, (source, destination): (i32, i32)) -> &'static str {
    let told = format!(
        "source {source}:\n{}\ndestination {destination}:\n{}",
        roles.source.story(),
        roles.destination.story()
    );
    roles.observer.signal(libc::SIGTERM);
    // No gap, no contradiction, nothing out of order: its own verdict.
    assert_eq!(roles.observer.end(), 0, "the observer: {}\n{told}", roles.observer.story());
    let seen = packets(&roles.packets);
    let whole = |process: &Process| {
        let checked = process.events("checked").last().cloned().unwrap_or_default();
        assert_eq!((&checked["wrong_pages"], &checked["detail"]), (&0.into(), &"".into()), "{told}");
    };
    let remembered = |process: &Process| {
        whole(process);
        assert_eq!(remembers(process, &roles.source, &seen), Ok(()), "{told}");
    };
    let by = |who: &str| seen.iter().any(|packet| &*packet.sender == who);
    match (source, destination) {
        (0, 0) => {
            remembered(&roles.destination);
            "released"
        }
        (10, _) => {
            remembered(&roles.source);
            "caught"
        }
        (KILLED, 0) => {
            remembered(&roles.destination);
            "released"
        }
        (3, _) if roles.source.events("guest-started").count() == 0 => {
            assert!(seen.is_empty(), "output of a guest that never was\n{told}");
            "nothing started"
        }
        (3..=6, _) => {
            remembered(&roles.source);
            assert!(!by("destination"), "output of a guest that was not moved came from the destination\n{told}");
            "not moved"
        }
        (0, KILLED) => "released, and gone with its host",
        (KILLED, 11) => {
            whole(&roles.destination);
            "fenced"
        }
        // Killed with the guest it still had: as any host without memory.
        (KILLED, 5 | 130) => "gone with its host",
        _ => panic!("no named end: {told}"),
    }
}

/// Whether the packets that were seen are those that the guest at `home`, by what it says of its past, has sent: none that it does not remember,
/// because it had not committed, none otherwise and none too few.
fn remembers(home: &Process, source: &Process, seen: &[Seen]) -> Result<(), String> {
    let said = |process: &Process, pick: fn(Kind) -> Option<Kind>| {
        let events = process.seen.iter().rev().filter_map(|event| serde_json::from_value(event.clone()).ok());
        events.filter_map(|event: Observation| pick(event.kind)).next()
    };
    let started = said(source, |kind| matches!(kind, Kind::GuestStarted { .. }).then_some(kind));
    let checked = said(home, |kind| matches!(kind, Kind::Checked { .. }).then_some(kind));
    let (Some(Kind::GuestStarted { spec, .. }), Some(Kind::Checked { steps, nonces, issued, .. })) = (started, checked)
    else {
        return Err("nobody said what guest this is, or where it stands".to_owned());
    };
    let log = |log: Vec<_>| log.into_iter().map(|(step, nonce)| NonceSeen { step, nonce }).collect();
    let logs = nonces.into_iter().map(log).collect();
    let model = Model::from_nonces_seen(&spec, &steps, logs, &issued).map_err(|error| error.to_string())?;
    let got = model.check_packets(distinct(seen)).map_err(|error| error.to_string())?;
    let due = model.packets_due();
    if got == due { Ok(()) } else { Err(format!("{got:?} packets were shown, {due:?} were due")) }
}

const KILLED: i32 = -libc::SIGKILL;

/// A memory cgroup of this test's own, of whichever version there is.
struct MemoryGroup(PathBuf);

impl MemoryGroup {
    fn with_limit(name: &str, bytes: u64) -> Result<Self, String> {
        let name = format!("belay-test-{}-{name}", std::process::id());
        let (v1, v2) = (Path::new("/sys/fs/cgroup/memory"), Path::new("/sys/fs/cgroup"));
        let (parent, limit) = match v1.join("memory.limit_in_bytes").exists() {
            true => (v1, "memory.limit_in_bytes"),
            false if v2.join("cgroup.controllers").exists() => (v2, "memory.max"),
            false => return Err("there is no memory cgroup hierarchy".to_owned()),
        };
        let group = Self(parent.join(name));
        std::fs::create_dir(&group.0).map_err(|error| format!("{}: {error}", group.0.display()))?;
        let limit = group.0.join(limit);
        std::fs::write(&limit, bytes.to_string()).map_err(|error| format!("{}: {error}", limit.display()))?;
        Ok(group)
    }

    /// A shell's word that moves it in before it becomes belay.
    fn enter(&self) -> String {
        format!("echo $$ > {}/cgroup.procs && exec \"$@\"", self.0.display())
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        // The kernel may still be tearing the last process down.
        let end = Instant::now() + BOUND;
        while std::fs::remove_dir(&self.0).is_err() && self.0.exists() && Instant::now() < end {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
}

/// Waits until a process stands still, which only /proc tells of somebody else's child.
fn await_stop(pid: i32) {
    let end = Instant::now() + BOUND;
    let stands = || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit(") ").next().is_some_and(|state| state.starts_with('T'))
    };
    while !stands() {
        assert!(Instant::now() < end, "process {pid} did not come to its stop point within {BOUND:?}");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

/// Takes all the room that is left where `file` is.
fn fill(file: &Path) {
    let mut file = std::fs::File::create(file).expect("room for a name");
    while file.write_all(&[0; 4096]).is_ok() {}
}

macro_rules! needs_kvm {
    ($what:literal) => {
        if !has_kvm() {
            eprintln!("skipped: {} needs /dev/kvm", $what);
            return;
        }
    };
}

mod kvm {
    use super::*;

    fn within_memory(side: &str, megabytes: &[u64]) {
        let mut ends_seen = Vec::new();
        for &limit in megabytes {
            let group = match MemoryGroup::with_limit(&format!("{side}-{limit}"), limit << 20) {
                Ok(group) => group,
                Err(why) => {
                    eprintln!("skipped: {side} within {limit} MiB: {why}");
                    return;
                }
            };
            let enter = group.enter();
            let starved = ["sh", "-c", &enter, "sh"];
            let place = Place::new();
            let (of_destination, of_source): (Before<'_>, Before<'_>) =
                if side == "destination" { (&starved, &[]) } else { (&[], &starved) };
            let mut roles = both(&place, of_destination, of_source, &[]);
            let ended = ends(&mut roles);
            ends_seen.push((limit, home_is_whole(&mut roles, ended)));
            drop(roles);
            place.expect_nothing_left();
        }
        println!("{side} within a memory limit (MiB): {ends_seen:?}");
        assert_ne!(ends_seen[0].1, "released", "{side}: the smallest limit starves nobody: {ends_seen:?}");
        assert_eq!(ends_seen.last().unwrap().1, "released", "{side}: the largest is not enough: {ends_seen:?}");
    }

    #[test]
    fn a_destination_short_of_memory_loses_no_guest() {
        needs_kvm!("a memory limit");
        within_memory("destination", &[20, 36, 48, 64, 400]);
    }

    #[test]
    fn a_source_short_of_memory_takes_nobody_else_down() {
        needs_kvm!("a memory limit");
        within_memory("source", &[20, 36, 48, 64, 400]);
    }

    #[test]
    fn a_release_that_finds_no_room_is_refused_and_asked_for_again_and_the_tether_holds_meanwhile() {
        needs_kvm!("a full state directory");
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: mounting a small tmpfs needs root");
            return;
        }
        let place = Place::new();
        let state = place.text("source");
        std::fs::create_dir(&state).unwrap();
        // Seen by the source alone, and gone with it.
        let small = format!("mount -t tmpfs -o size=256k,mode=0700 none {state} && exec \"$@\"");
        // The source stands still until the directory is full: its journal is in it then, the release is not.
        let frozen = ["--stop-at", "release-due"];
        let mut roles = both(&place, &[], &["unshare", "--mount", "sh", "-c", &small, "sh"], &frozen);
        await_stop(roles.source.pid());
        let filler = format!("/proc/{}/root{state}/filler", roles.source.pid());
        fill(Path::new(&filler));
        roles.source.signal(libc::SIGCONT);
        let refused = roles.source.wait_for_event("failed");
        assert!(refused["what"].as_str().unwrap().contains("release record"), "{refused}");
        assert!(refused["advice"].as_str().unwrap().contains("make room"), "{refused}");
        roles.destination.wait_for_state("release-refused");
        // The tether goes on: more checkpoints commit after the refusal.
        roles.destination.wait_for_event("committed");
        assert!(!roles.destination.was("owner"));
        std::fs::remove_file(filler).unwrap();
        let ended = ends(&mut roles);
        assert_eq!(home_is_whole(&mut roles, ended), "released");
        drop(roles);
        place.expect_nothing_left();
    }

    /// Which side's state directory has no room any more, from where on, and whether the destination dies in mid-pull.
    struct Full {
        of_source: bool,
        /// At this stop point; nothing: before it is started.
        from: Option<&'static str>,
        destination_dies: bool,
        /// The destination's VMM is a process of its own.
        apart: bool,
    }

    /// Runs into a full directory; what the end is called, and what was said of the shortage. Room is made again where the source has said that it
    /// lacks it for the release.
    fn run_into(full: &Full) -> (&'static str, String) {
        let place = Place::new();
        let state = place.text(if full.of_source { "source" } else { "destination" });
        std::fs::create_dir(&state).unwrap();
        let mount = format!("mount -t tmpfs -o size=256k,nr_inodes=64,mode=0700 none {state}");
        let filled = format!(
            "{{ dd if=/dev/zero of={state}/filler bs=4k; i=0; while true >{state}/name-$i; do i=$((i+1)); done; }} 2>{state}.full"
        );
        // Seen by this side alone, and gone with it.
        let words = match full.from {
            None => format!("{mount} && {filled}; exec \"$@\""),
            Some(_) => format!("{mount} && exec \"$@\""),
        };
        let small = ["unshare", "--mount", "sh", "-c", &words, "sh"];
        let hold: &[&str] = match (full.destination_dies, full.apart) {
            (true, _) => &["--hold-pull-at", "40"],
            (false, true) => &["--vmm", "apart"],
            (false, false) => &[],
        };
        let stop = full.from.map_or(vec![], |point| vec!["--stop-at", point]);
        let (mut at_source, mut at_destination) = (With::default(), With { more: hold, ..With::default() });
        let (tethered, stopping) = ([&["--release", "300ms"][..], &stop].concat(), [hold, &stop].concat());
        at_source.more = &tethered[..2];
        match full.of_source {
            true => at_source = With { before: &small, more: &tethered },
            false => at_destination = With { before: &small, more: &stopping },
        }
        let mut roles = both_with(&place, at_destination, at_source);
        if full.destination_dies {
            roles.destination.await_mid_pull(1);
            roles.destination.crash();
        }
        let mut filler = None;
        if full.from.is_some() {
            let starved = if full.of_source { &roles.source } else { &roles.destination };
            await_stop(starved.pid());
            let seen_from_here = PathBuf::from(format!("/proc/{}/root{state}", starved.pid()));
            fill(&seen_from_here.join("filler"));
            let mut names = 0;
            while std::fs::File::create(seen_from_here.join(format!("name-{names}"))).is_ok() {
                names += 1;
            }
            assert!(names < 64, "there is room for names without end");
            filler = Some(seen_from_here);
            starved.signal(libc::SIGCONT);
        }
        if let (true, false, Some(place)) = (full.of_source, full.destination_dies, filler)
            && let Some(refused) = roles.source.wait_for_event_or_end("failed")
            && refused["what"].as_str().unwrap().contains("release record")
        {
            roles.destination.wait_for_state("release-refused");
            for name in std::fs::read_dir(place).unwrap().flatten() {
                let name = name.path();
                if name.file_name().unwrap().to_str().is_some_and(|name| name.starts_with("name-") || name == "filler")
                {
                    std::fs::remove_file(name).unwrap();
                }
            }
        }
        let ended = ends(&mut roles);
        let end = home_is_whole(&mut roles, ended);
        let said = [&roles.source, &roles.destination].map(|role| {
            role.events("failed")
                .map(|failed| failed["what"].as_str().unwrap_or("").to_owned())
                .collect::<Vec<_>>()
                .join("; ")
        });
        drop(roles);
        place.expect_nothing_left();
        (end, said.join(" | "))
    }

    fn can_mount(what: &str) -> bool {
        let can = rustix::process::geteuid().is_root();
        if !can {
            eprintln!("skipped: {what}: mounting a small tmpfs needs root");
        }
        can
    }

    #[test]
    fn a_full_state_directory_of_the_source_at_the_start_starts_nothing_and_later_only_holds_the_release_up() {
        needs_kvm!("a full state directory");
        if !can_mount("a full state directory of the source") {
            return;
        }
        let run = |from| run_into(&Full { of_source: true, from, destination_dies: false, apart: false });
        let (end, said) = run(None);
        assert_eq!(end, "nothing started", "{said}");
        assert!(said.contains("migrations: No space left on device"), "{said}");
        // Before the switch, in it, after it, and while checkpoints are taken: what it writes then it has room for already.
        for point in ["source-connected", "source-prepared", "switch-paused", "go-told", "fold-begun:3"] {
            let (end, said) = run(Some(point));
            assert_eq!(end, "released", "{point}: {said}");
            assert!(said.contains("cannot write the release record"), "{point}: {said}");
        }
        assert_eq!(run(Some("release-recorded")), ("released", " | ".to_owned()));
    }

    #[test]
    fn a_full_state_directory_of_the_source_stands_in_the_way_of_no_catch() {
        needs_kvm!("a full state directory");
        if !can_mount("a full state directory in a catch") {
            return;
        }
        for point in ["catch-begun", "catch-revoked", "catch-loaded", "catch-resume", "catch-resumed"] {
            let full = Full { of_source: true, from: Some(point), destination_dies: true, apart: false };
            assert_eq!(run_into(&full), ("caught", " | ".to_owned()), "{point}");
        }
    }

    #[test]
    fn a_full_state_directory_of_the_destination_is_in_the_way_of_nothing_but_a_door_for_the_next_page_server() {
        needs_kvm!("a full state directory");
        if !can_mount("a full state directory of the destination") {
            return;
        }
        let points =
            ["prepare-heard", "prepared", "state-loaded", "resumed", "commit-due:2", "release-asked", "release-heard"];
        for from in std::iter::once(None).chain(points.into_iter().map(Some)) {
            let full = Full { of_source: false, from, destination_dies: false, apart: false };
            assert_eq!(run_into(&full), ("released", " | ".to_owned()), "{from:?}");
        }
        // A VMM of its own leaves a door there for the next page server.
        let apart = Full { of_source: false, from: None, destination_dies: false, apart: true };
        let (end, said) = run_into(&apart);
        assert_eq!(end, "not moved", "{said}");
        assert!(said.contains("opening a door for the next page server") && said.contains("No space left"), "{said}");
    }

    /// With room for so many pages and no more a source comes as far as it can: it starts nothing, or cannot write down what was agreed on, or has
    /// room for all.
    #[test]
    fn whatever_little_room_a_source_has_to_write_in_its_guest_is_somewhere_whole() {
        needs_kvm!("a small state directory");
        if !can_mount("a small state directory") {
            return;
        }
        let mut ends_seen = Vec::new();
        for pages in 1..=6 {
            let place = Place::new();
            let state = place.text("source");
            std::fs::create_dir(&state).unwrap();
            let small = format!("mount -t tmpfs -o size={}k,mode=0700 none {state} && exec \"$@\"", pages * 4);
            let mut roles = both(&place, &[], &["unshare", "--mount", "sh", "-c", &small, "sh"], &[]);
            let ended = ends(&mut roles);
            ends_seen.push(home_is_whole(&mut roles, ended));
            drop(roles);
            place.expect_nothing_left();
        }
        println!("a state directory of 1 to 6 pages: {ends_seen:?}");
        assert_eq!((ends_seen[0], ends_seen[5]), ("nothing started", "released"), "{ends_seen:?}");
        assert!(ends_seen.contains(&"not moved"), "{ends_seen:?}");
    }

    /// A role that may not open as many files as it could come to need says so and starts nothing.
    fn with_few_descriptors(side: &str) {
        for limit in [3, 4, 5, 8, 16, 30, 64, 127, 128, 256] {
            let limit_text = format!("ulimit -n {limit} && exec \"$@\"");
            let starved = ["sh", "-c", &limit_text, "sh"];
            let place = Place::new();
            let (of_destination, of_source): (Before<'_>, Before<'_>) =
                if side == "destination" { (&starved, &[]) } else { (&[], &starved) };
            let with = |before| With { before, ..With::default() };
            let (observer, destination, source) = roles(&place, with(of_destination), with(of_source));
            if limit >= 128 {
                let (source, packets) = (source.expect("the destination listens"), place.path("packets"));
                let mut roles = Roles { source, destination, observer, packets };
                let ended = ends(&mut roles);
                assert_eq!(home_is_whole(&mut roles, ended), "released", "with {limit} descriptors");
            } else {
                let mut starved = source.unwrap_or(destination);
                let code = starved.end();
                if limit > 5 {
                    let failed = starved.events("failed").last().cloned().unwrap_or_default();
                    let told = format!("{limit} descriptors, {code}: {}", starved.story());
                    assert_eq!(code, 3, "{told}");
                    assert!(
                        failed["what"].as_str().is_some_and(|what| what.contains(&format!("{limit} open files"))),
                        "{told}"
                    );
                    assert!(failed["advice"].as_str().is_some_and(|advice| advice.contains("ulimit")), "{told}");
                } else {
                    // Not even the loader can open its libraries, nor a source of entropy be asked.
                    assert!(
                        code > 0 && code != 101,
                        "with {limit} descriptors it ended with {code}: {}",
                        starved.story()
                    );
                }
            }
        }
    }

    #[test]
    fn a_destination_with_hardly_any_descriptors_says_so_and_the_guest_stays_where_it_is() {
        needs_kvm!("few descriptors");
        with_few_descriptors("destination");
    }

    #[test]
    fn a_source_with_hardly_any_descriptors_says_so_and_starts_nothing() {
        needs_kvm!("few descriptors");
        with_few_descriptors("source");
    }

    #[test]
    fn a_release_for_which_no_file_can_be_opened_is_refused_and_asked_for_again_and_the_tether_holds_meanwhile() {
        needs_kvm!("a limit of open files lowered in mid-run");
        let place = Place::new();
        let mut roles = both(&place, &[], &[], &["--stop-at", "release-due"]);
        await_stop(roles.source.pid());
        let source = rustix::process::Pid::from_raw(roles.source.pid());
        let open_files = |soft| {
            let limit = rustix::process::Rlimit { current: Some(soft), maximum: Some(1024) };
            rustix::process::prlimit(source, rustix::process::Resource::Nofile, limit)
                .expect("a child's limits can be set")
        };
        open_files(3);
        roles.source.signal(libc::SIGCONT);
        let refused = roles.source.wait_for_event("failed");
        assert!(refused["what"].as_str().unwrap().contains("os error 24"), "{refused}");
        roles.destination.wait_for_state("release-refused");
        roles.destination.wait_for_event("committed");
        assert!(!roles.destination.was("owner"));
        open_files(1024);
        let ended = ends(&mut roles);
        assert_eq!(home_is_whole(&mut roles, ended), "released");
        drop(roles);
        place.expect_nothing_left();
    }

    #[test]
    fn a_source_that_takes_longer_than_a_handshake_to_register_its_memory_still_moves_its_guest() {
        needs_kvm!("a slow registration");
        let place = Place::new();
        // It stands still where it is about to register: pinning a large guest takes as long.
        let mut roles = both(&place, &[], &[], &["--stop-at", "source-connected"]);
        await_stop(roles.source.pid());
        // What is waited for is time itself: more than the ten seconds of one step of a handshake.
        std::thread::sleep(std::time::Duration::from_secs(11));
        roles.source.signal(libc::SIGCONT);
        let ended = ends(&mut roles);
        assert_eq!(home_is_whole(&mut roles, ended), "released");
        drop(roles);
        place.expect_nothing_left();
    }

    #[test]
    fn on_one_cpu_everything_is_slower_and_nothing_is_lost() {
        needs_kvm!("one CPU");
        let place = Place::new();
        let one = ["taskset", "-c", "0"];
        let mut roles = both(&place, &one, &one, &[]);
        let ended = ends(&mut roles);
        assert_eq!(home_is_whole(&mut roles, ended), "released", "{}", roles.source.story());
        drop(roles);
        place.expect_nothing_left();
    }

    #[test]
    fn on_one_cpu_a_guest_is_caught_in_mid_pull_and_its_output_goes_on() {
        needs_kvm!("one CPU");
        let place = Place::new();
        let one = ["taskset", "-c", "0"];
        let held = With { before: &one, more: &["--hold-pull-at", "40"] };
        let mut roles = both_with(&place, held, With { before: &one, more: &[] });
        roles.destination.await_mid_pull(1);
        roles.destination.crash();
        let ended = ends(&mut roles);
        assert_eq!(home_is_whole(&mut roles, ended), "caught", "{}", roles.source.story());
        let seen = packets(&roles.packets);
        let new = |who: &str| seen.iter().filter(|packet| &*packet.sender == who).map(|packet| packet.sequence).max();
        let (before, after) = (new("destination"), new("source"));
        assert!(before.is_some() && after > before, "shown up to {before:?} there, and {after:?} here");
        drop(roles);
        place.expect_nothing_left();
    }

    #[test]
    fn hosts_whose_clocks_are_years_apart_keep_one_lease() {
        needs_kvm!("clocks apart");
        let years = |years: u64| (years * 365 * 86_400).to_string();
        let (one, other) = (years(1), years(9));
        let ahead = ["unshare", "--time", "--boottime", &one, "--monotonic", &other, "--fork", "--kill-child"];
        let far = ["unshare", "--time", "--boottime", &other, "--monotonic", &one, "--fork", "--kill-child"];
        if !Command::new(ahead[0]).args(&ahead[1..]).arg("true").status().is_ok_and(|status| status.success()) {
            eprintln!("skipped: no time namespaces here");
            return;
        }
        // Kept for several leases, so that both sides have counted some to the end of their length.
        let place = Place::new();
        let mut roles = both(&place, &ahead, &far, &["--lease", "1s", "--release", "4s"]);
        let ended = ends(&mut roles);
        assert_eq!(home_is_whole(&mut roles, ended), "released", "{}", roles.source.story());
        drop(roles);
        place.expect_nothing_left();
    }
}

/// A step of CLOCK_REALTIME cannot matter where nobody asks it. The one who does makes certificates.
#[test]
fn no_part_of_a_migration_asks_the_clock_that_can_be_set() {
    fn sources(directory: &Path, found: &mut Vec<(PathBuf, String)>) {
        for entry in std::fs::read_dir(directory).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() {
                sources(&path, found);
            } else if path.extension().is_some_and(|kind| kind == "rs") {
                found.push((path.clone(), std::fs::read_to_string(&path).unwrap()));
            }
        }
    }
    let mut found = Vec::new();
    for part in ["transport", "checkpoint", "vmm-glue", "cli"] {
        sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(part).join("src"), &mut found);
    }
    assert!(found.len() > 100, "{} files", found.len());
    let asks = |text: &str| {
        ["SystemTime", "ClockId::Realtime", "CLOCK_REALTIME", "UNIX_EPOCH"].iter().any(|word| text.contains(word))
    };
    let who: Vec<_> = found.iter().filter(|(_, text)| asks(text)).map(|(path, _)| path).collect();
    assert!(who.iter().all(|path| path.ends_with("session/tls.rs")), "{who:?}");
}
