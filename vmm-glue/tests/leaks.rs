//! Many migrations between the same two processes: when one is over, however it ended, nothing of it is left in either.
//!
//! `BELAY_LEAK_MIGRATIONS=1000` makes a long run of it. Each process counts its descriptors, threads and mappings and looks at its
//! resident memory after every migration.

mod common;

use belay_checkpoint::guest::TrackerKind;
use belay_transport::session::{Address, Listener, Security, SessionConfig};
use belay_vmm_glue::kvm::guests::{Filler, GuestSpec};
use belay_vmm_glue::migrate::destination;
use belay_vmm_glue::migrate::observation::{Kind, Observer};
use belay_vmm_glue::migrate::operator::Words;
use common::roles::{TestHost, be_a_guard_if_asked, destination_config, move_away, running_guest, source_config};
use crossbeam_channel::bounded;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

/// Set for a process that is to be the destination, and where the files of both go.
const ROLE: &str = "BELAY_TEST_LEAKS_IS_DESTINATION";
const PLACE: &str = "BELAY_TEST_LEAKS_PLACE";
/// What the two processes tell each other starts with this: libtest prints on the same stream.
const WORD: &str = "leaks:";

/// Every kind of migration has been twice over each fabric before anything is counted: what is made once is no leak.
const WARM: usize = 24;

/// How a migration is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Released,
    Caught,
    /// Called off before the switch.
    NotMoved,
}

/// The n-th migration: its end, whether over shared memory, and its tracker.
fn nth(n: usize) -> (End, bool, TrackerKind) {
    let end = [End::Released, End::Caught, End::Released, End::NotMoved][n % 4];
    let tracker = [TrackerKind::KvmRing, TrackerKind::KvmLog, TrackerKind::UffdWp][n % 3];
    (end, (n / 4).is_multiple_of(2), tracker)
}

/// What a process holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Held {
    descriptors: usize,
    threads: usize,
    mappings: usize,
    resident_kib: usize,
    files: usize,
}

impl Held {
    fn now(place: &Path) -> Self {
        let entries = |path: &str| std::fs::read_dir(path).map_or(0, Iterator::count);
        let status = std::fs::read_to_string("/proc/self/status").expect("status");
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
        let resident_kib = resident.trim().trim_end_matches("kB").trim().parse().expect("a number");
        let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
        // A release record stays by intent, one a released guest; everything else goes with its migration.
        let kept = |name: &str| !name.starts_with("released-");
        let names = |directory: &Path| {
            let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
            entries.filter_map(|entry| entry.file_name().into_string().ok()).filter(|name| kept(name)).count()
        };
        let shared = std::fs::read_dir("/dev/shm").into_iter().flatten().flatten();
        let shared = shared.filter(|entry| entry.file_name().to_string_lossy().contains("belay")).count();
        Self {
            // Without the descriptor of the directory that is being read.
            descriptors: entries("/proc/self/fd") - 1,
            threads: entries("/proc/self/task"),
            mappings: maps.lines().count(),
            resident_kib,
            files: names(&place.join("source")) + names(&place.join("destination")) + shared,
        }
    }

    /// After the threads that were told to end have: nothing else waits for those that nobody joins. Where no number is `wanted` yet, once it has
    /// been the same for a while.
    fn settled(place: &Path, wanted: Option<Self>) -> Self {
        let mut held = Self::now(place);
        let mut unchanged = 0;
        for _ in 0..400 {
            let there = |wanted: Self| held.threads <= wanted.threads && held.descriptors <= wanted.descriptors;
            if wanted.map_or(unchanged == 20, there) {
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
            let now = Self::now(place);
            let same = (now.threads, now.descriptors, now.mappings) == (held.threads, held.descriptors, held.mappings);
            unchanged = if same { unchanged + 1 } else { 0 };
            held = now;
        }
        held
    }

    /// The middle one of what was counted.
    fn median(all: &[Self], of: fn(&Self) -> usize) -> usize {
        let mut all: Vec<usize> = all.iter().map(of).collect();
        all.sort_unstable();
        all[all.len() / 2]
    }

    fn text(&self) -> String {
        let Self { descriptors, threads, mappings, resident_kib, files } = self;
        format!("{descriptors} {threads} {mappings} {resident_kib} {files}")
    }

    fn parse(text: &str) -> Self {
        let numbers: Vec<usize> = text.split_whitespace().map(|word| word.parse().expect("a number")).collect();
        let [descriptors, threads, mappings, resident_kib, files] = numbers[..] else { panic!("{text}") };
        Self { descriptors, threads, mappings, resident_kib, files }
    }
}

#[test]
fn the_guard_of_the_other_tests() {
    be_a_guard_if_asked();
}

/// The destination: one migration after another, for as long as a line with its number comes on standard input.
#[test]
fn the_destination_of_the_other_test() {
    if std::env::var_os(ROLE).is_none() {
        return;
    }
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL)).expect("prctl");
    let place = std::env::var(PLACE).expect("a place");
    let place = Path::new(&place);
    let mut first = None;
    for line in std::io::stdin().lock().lines() {
        let n: usize = line.expect("a line").parse().expect("a number");
        let (end, local, _) = nth(n);
        let listen = if local { Address::Unix(place.join("receive.sock")) } else { Address::Tcp("127.0.0.1:0".into()) };
        let listener = Listener::bind(&listen, SessionConfig::new(Security::LoopbackOnly)).expect("listen");
        println!("{WORD} listening {}", listener.address());
        // Held in the middle where the guest is to be caught.
        let config = destination_config(place, (end == End::Caught).then_some(0.3));
        let mut host = TestHost::default();
        let ended = destination::run(&config, &listener, &mut host, &Observer::silent(), &Words::none());
        drop(host);
        let outcome = match ended {
            Ok(ended) => {
                let outcome = format!("{:?}", ended.outcome);
                // The guest before what holds back its faults (P1).
                drop(ended.guest);
                drop(ended.faults);
                outcome
            }
            Err(error) => format!("Failed: {error}").replace('\n', " "),
        };
        drop(listener);
        println!("{WORD} ended {outcome}");
        let held = Held::settled(place, first);
        if n + 1 == WARM {
            first = Some(held);
        }
        println!("{WORD} held {}", held.text());
        std::io::stdout().flush().expect("flush");
    }
    std::process::exit(0);
}

/// One migration from here; how it ended.
fn send(n: usize, to: &str, place: &Path) -> String {
    let (end, _, tracker) = nth(n);
    let spec = GuestSpec {
        memory_bytes: 8 << 20,
        working_set_bytes: 2 << 20,
        filler: Filler::Host,
        seed: n as u64 + 1,
        ..GuestSpec::default()
    };
    let (mut guest, output, _) = running_guest(&spec);
    let config = source_config(to.parse().expect("an address"), &spec, tracker);
    let (word, signals) = bounded(1);
    let words = Words { signals, ..Words::none() };
    let order = move |kind: &Kind| match end {
        End::Caught => matches!(kind, Kind::Blackout { .. }),
        End::NotMoved => matches!(kind, Kind::Connected { .. }),
        End::Released => false,
    };
    let observer = Observer::new("leaks", move |observation| {
        if order(&observation.kind) {
            let _ = word.try_send(2);
        }
    });
    let outcome = move_away(place, &config, &mut guest, &output, &observer, &words);
    match outcome {
        Ok(outcome) => format!("{outcome:?}"),
        Err(error) => format!("Failed: {error}"),
    }
}

#[test]
fn however_many_migrations_end_between_two_processes_nothing_of_them_is_left() {
    if common::no_kvm() {
        return;
    }
    let many = std::env::var("BELAY_LEAK_MIGRATIONS").map_or(100, |text| text.parse().expect("a number"));
    let directory = tempfile::tempdir().expect("a directory");
    let place = directory.path();
    let entry = ["--exact", "the_destination_of_the_other_test", "--nocapture", "--test-threads=1"];
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.args(entry).env(ROLE, "1").env(PLACE, place);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("the destination's process");
    let mut orders = child.stdin.take().expect("a pipe");
    let mut lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
    let mut word = |of: &str| loop {
        let line = lines.next().expect("the destination goes on").expect("a line");
        if let Some(at) = line.find(WORD)
            && let Some(rest) = line[at + WORD.len()..].trim().strip_prefix(of)
        {
            return rest.trim().to_owned();
        }
    };
    let (mut first, mut history) = (None, Vec::new());
    for n in 0..many.max(3 * WARM) {
        writeln!(orders, "{n}").expect("the destination listens");
        let to = word("listening");
        let ours = send(n, &to, place);
        let theirs = word("ended");
        let (end, ..) = nth(n);
        let as_meant = match end {
            End::Released => ours == "Released { heard: true }" && theirs == "Owner",
            End::Caught => ours.starts_with("Caught") && theirs == "Retired",
            End::NotMoved => ours.starts_with("Failed") && theirs.starts_with("Failed"),
        };
        assert!(as_meant, "migration {n} was to be {end:?}: {ours} and {theirs}");
        let theirs = Held::parse(&word("held"));
        let now = (Held::settled(place, first.map(|(ours, _)| ours)), theirs);
        if n + 1 == WARM {
            first = Some(now);
        }
        if (n + 1) % 100 == 0 || n + 1 == many || n + 1 == WARM {
            println!("after {} migrations: source {:?}, destination {:?}", n + 1, now.0, now.1);
        }
        history.push(now);
    }
    drop(orders);
    assert!(child.wait().expect("it ends").success());
    let (first, last) = (first.expect("warm"), history[history.len() - 1]);
    let counted = &history[WARM..];
    type Side = fn(&(Held, Held)) -> Held;
    let sides: [(&str, Side); 2] = [("source", |both| both.0), ("destination", |both| both.1)];
    for (who, side) in sides {
        let (first, last) = (side(&first), side(&last));
        assert!(last.descriptors <= first.descriptors, "{who}: descriptors {first:?} then {last:?}");
        assert!(last.threads <= first.threads, "{who}: threads {first:?} then {last:?}");
        assert!(last.files <= first.files, "{who}: files {first:?} then {last:?}");
        // The allocator's arenas come and go with threads, so that one look says little: the middle of the first quarter beside that of the last.
        let all: Vec<Held> = counted.iter().map(side).collect();
        let (early, late) = (&all[..all.len() / 4], &all[all.len() * 3 / 4..]);
        let between = all.len() * 3 / 4;
        let mappings = |part| Held::median(part, |held| held.mappings);
        let (before, after) = (mappings(early), mappings(late));
        println!("{who}: mappings {before} then {after}");
        assert!(
            after <= before + (between / 10).max(5),
            "{who}: mappings {before} then {after} over {between} migrations"
        );
        let resident = |part| Held::median(part, |held| held.resident_kib);
        let (before, after) = (resident(early), resident(late));
        println!("{who}: resident memory {before} KiB then {after} KiB");
        // Less than half a page of its guest's for each.
        let most = before + 1024 + 2 * between;
        assert!(after <= most, "{who}: resident memory {before} KiB then {after} KiB over {between} migrations");
    }
}
