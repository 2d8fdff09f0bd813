//! Starvation: too little memory, no room for the release record, hardly any descriptors, one CPU, clocks that disagree. Each ends in a
//! named state, and nothing is lost.

mod running;

use running::{BELAY, BOUND, Place, Process, has_kvm};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

/// What stands before `belay` on a role's command line: a shell's words that end in `exec "$@"`, or another program that runs its
/// arguments.
type Before<'a> = &'a [&'a str];

/// Two roles that were started with something before them.
struct Roles {
    source: Process,
    destination: Process,
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

/// Starts a destination and then a source; the source is not started when the destination ended before it could listen.
fn roles(
    place: &Place,
    of_destination: Before<'_>,
    of_source: Before<'_>,
    send: &[&str],
) -> (Process, Option<Process>) {
    let state = place.text("destination");
    let receive = ["receive", "--json", "--listen", "127.0.0.1:0", "--drive", "kvm", "--state-dir", &state];
    let mut destination = start(place, of_destination, &[&receive[..], &SHORT].concat());
    let Some(listening) = destination.wait_for_event_or_end("listening") else { return (destination, None) };
    let to = listening["address"].as_str().unwrap().to_owned();
    let state = place.text("source");
    let first = ["send", "--json", "--to", &to, "--state-dir", &state];
    let source = start(place, of_source, &[&first[..], &GUEST, &SHORT, send].concat());
    (destination, Some(source))
}

fn both(place: &Place, of_destination: Before<'_>, of_source: Before<'_>, send: &[&str]) -> Roles {
    let (destination, source) = roles(place, of_destination, of_source, send);
    Roles { source: source.expect("the destination listens"), destination }
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

/// Whoever has the guest at the end has looked at every page of it. Gives what the end is called.
fn home_is_whole(roles: &Roles, (source, destination): (i32, i32)) -> &'static str {
    let told = || {
        format!("source {source}:\n{}\ndestination {destination}:\n{}", roles.source.story(), roles.destination.story())
    };
    let whole = |process: &Process| {
        let checked = process.events("checked").last().cloned().unwrap_or_default();
        assert_eq!((&checked["wrong_pages"], &checked["detail"]), (&0.into(), &"".into()), "{}", told());
    };
    match (source, destination) {
        (0, 0) => {
            whole(&roles.destination);
            "released"
        }
        (10, _) => {
            whole(&roles.source);
            "caught"
        }
        (KILLED, 0) => {
            whole(&roles.destination);
            "released"
        }
        (3..=6, _) => {
            whole(&roles.source);
            "not moved"
        }
        (0, KILLED) => "released, and gone with its host",
        (KILLED, 11) => "fenced",
        // Killed with the guest it still had: as any host without memory.
        (KILLED, 5 | 130) => "gone with its host",
        _ => panic!("no named end: {}", told()),
    }
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
            ends_seen.push((limit, home_is_whole(&roles, ended)));
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
        assert_eq!(home_is_whole(&roles, ended), "released");
        drop(roles);
        place.expect_nothing_left();
    }

    /// A role that may not open as many files as it could come to need says so and starts nothing.
    fn with_few_descriptors(side: &str) {
        for limit in [3, 4, 5, 8, 16, 30, 64, 127, 128, 256] {
            let limit_text = format!("ulimit -n {limit} && exec \"$@\"");
            let starved = ["sh", "-c", &limit_text, "sh"];
            let place = Place::new();
            let (of_destination, of_source): (Before<'_>, Before<'_>) =
                if side == "destination" { (&starved, &[]) } else { (&[], &starved) };
            let (destination, source) = roles(&place, of_destination, of_source, &[]);
            if limit >= 128 {
                let mut roles = Roles { source: source.expect("the destination listens"), destination };
                let ended = ends(&mut roles);
                assert_eq!(home_is_whole(&roles, ended), "released", "with {limit} descriptors");
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
        assert_eq!(home_is_whole(&roles, ended), "released");
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
        assert_eq!(home_is_whole(&roles, ended), "released");
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
        assert_eq!(home_is_whole(&roles, ended), "released", "{}", roles.source.story());
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
        assert_eq!(home_is_whole(&roles, ended), "released", "{}", roles.source.story());
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
