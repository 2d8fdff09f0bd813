//! One guest, caught again and again: it moves, its destination is struck, it comes back in the standby, and moves again from there. It boots
//! once, checks its own memory all along, and counts; so what a round leaves behind, in memory or in a QEMU, the next one finds.
//!
//! As many rounds as fit into a test; more, other ones, and a larger guest, by
//! `BELAY_TEST_ROUNDS=50 BELAY_TEST_SEED=7 BELAY_TEST_MIB=1024 cargo test --release -p belay --test qemu_rounds -- --nocapture`.

mod qemu_guest;
mod running;

use qemu_guest::moving::{end_left, receive, send, started, wait_until_ended};
use qemu_guest::{Console, Linux, Machine, Qemu, expect_no_gap, monitor, no_qemu, shared_memory, status};
use running::{Place, Process, kill};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Rounds where nobody says how many.
const ROUNDS: u64 = 15;
/// The first round's, where nobody says which.
const SEED: u64 = 1;

fn said(variable: &str, otherwise: u64) -> u64 {
    std::env::var(variable).map_or(otherwise, |text| text.parse().expect("a number"))
}

/// What happens to a destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Strike {
    Qemu,
    Belay,
    Both,
    /// Its belay is frozen until the source has the guest, and goes on then.
    Frozen,
    /// Its operator gives the guest back.
    GivenBack,
}

/// One round's choices.
#[derive(Debug, Clone, Copy)]
struct Round {
    strike: Strike,
    /// Over memory that both share, or over tcp.
    local: bool,
    period: &'static str,
    /// Struck with a part of its pages still at the source.
    in_mid_pull: bool,
    /// Checkpoints that commit before.
    commits: usize,
}

impl Round {
    /// The so-manieth with this seed. Every strike comes once in five rounds.
    fn of(seed: u64, number: u64) -> Self {
        let mut state = (seed << 32 | number).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut one_of = |count: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 33) % count
        };
        let strikes = [Strike::Qemu, Strike::Belay, Strike::Both, Strike::Frozen, Strike::GivenBack];
        Self {
            strike: strikes[((number + seed) % 5) as usize],
            local: one_of(2) == 0,
            period: ["5ms", "25ms", "100ms"][one_of(3) as usize],
            in_mid_pull: one_of(3) == 0,
            commits: one_of(12) as usize,
        }
    }

    fn strike(&self, destination: &Process, qemu: i32) {
        match self.strike {
            Strike::Qemu => kill(qemu, libc::SIGKILL),
            Strike::Belay => destination.signal(libc::SIGKILL),
            Strike::Both => {
                destination.signal(libc::SIGKILL);
                kill(qemu, libc::SIGKILL);
            }
            Strike::Frozen => destination.signal(libc::SIGSTOP),
            Strike::GivenBack => destination.signal(libc::SIGTERM),
        }
    }
}

/// The guest at its source, before and after a round.
struct Here {
    pid: i32,
    monitor: PathBuf,
    console: PathBuf,
}

impl Here {
    /// In the standby that a source has left.
    fn caught(sender: &Process, console: &Path) -> Self {
        let left = sender.events("qemu-left").next().expect("the guest's QEMU is told");
        let monitor = left["monitor"].as_str().expect("its monitor").into();
        let name = console.file_name().and_then(|name| name.to_str()).expect("a name");
        let (start, count) = name.rsplit_once(".standby").unwrap_or((name, "0"));
        let count = if name == start { 0 } else { count.parse().unwrap_or(1) };
        let next = if count == 0 { String::new() } else { (count + 1).to_string() };
        let console = console.with_file_name(format!("{start}.standby{next}"));
        Self { pid: left["pid"].as_i64().expect("a pid") as i32, monitor, console }
    }
}

/// Moves the guest away and has it come back; how long after the strike it ran.
fn goes_and_comes_back(place: &Place, folder: &Path, machine: &Machine, here: &Here, round: Round) -> (Here, Duration) {
    let listen = format!("unix:{}", place.text("receive.sock"));
    let mut received = if round.local { vec!["--listen", &listen[..]] } else { vec![] };
    if round.in_mid_pull {
        received.extend(["--hold-pull-at", "40"]);
    }
    let (mut destination, to) = receive(place, folder, machine, &received);
    let mut sender = send(place, &to, &here.monitor, &["--release", "never", "--period", round.period]);
    if round.in_mid_pull {
        destination.wait_for_state("tethered");
    } else {
        destination.wait_for_event("all-landed");
    }
    for _ in 0..round.commits {
        destination.wait_for_event("committed");
    }
    let qemu = started(&mut destination);
    let struck = Instant::now();
    round.strike(&destination, qemu);
    sender.wait_for_event("caught");
    let after = struck.elapsed();
    if round.strike == Strike::Frozen {
        destination.signal(libc::SIGCONT);
    }
    assert_eq!(sender.end(), 10, "{round:?}: {}", sender.story());
    let ended = destination.end();
    let expected = match round.strike {
        Strike::Belay | Strike::Both => -libc::SIGKILL,
        Strike::Qemu | Strike::Frozen | Strike::GivenBack => 13,
    };
    assert_eq!(ended, expected, "{round:?}: {}", destination.story());
    // What the destination knew to be committed is not taken back.
    let epoch = |event: &serde_json::Value| event["epoch"].as_u64().expect("an epoch");
    let committed = destination.events("committed").map(epoch).max().unwrap_or(0);
    let caught = epoch(sender.events("caught").next().expect("told"));
    assert!(caught >= committed && caught >= round.commits as u64, "{round:?}: {committed} committed, {caught} caught");
    wait_until_ended(qemu);
    wait_until_ended(here.pid);
    let back = Here::caught(&sender, &here.console);
    let returned = Console(back.console.clone()).wait_for(40);
    let (before, away) = (Console(here.console.clone()).ticks(), Console(folder.join("there-console")).ticks());
    for part in [&before, &away, &returned] {
        expect_no_gap(part);
    }
    let left = *before.last().expect("it ran here");
    let lost = away.last().map_or(left, |&last| last.max(left));
    assert!(
        returned[0] > left && returned[0] <= lost + 2,
        "{round:?}: left at {left}, lost at {lost}, back at {}",
        returned[0]
    );
    assert_eq!(status(&mut monitor(&back.monitor)), "running");
    (back, after)
}

#[test]
fn a_guest_is_caught_round_after_round_and_moves_again_from_where_it_came_back() {
    if no_qemu() {
        return;
    }
    let Some(linux) = Linux::here() else { return };
    let (rounds, seed) = (said("BELAY_TEST_ROUNDS", ROUNDS), said("BELAY_TEST_SEED", SEED));
    let (place, folder) = (Place::new(), shared_memory());
    let kind = ["q35", "pc", "microvm"][(seed % 3) as usize];
    let mib = said("BELAY_TEST_MIB", 128) as usize;
    // A microvm has no nodes.
    let blocks = if kind == "microvm" { vec![mib] } else { vec![mib / 2, mib / 2] };
    let machine = Machine { vcpus: 2, blocks, ..Machine::of(kind, Some(linux)) };
    let source = Qemu::start(&place, folder.path(), &machine, "here");
    source.wait_until_booted();
    let mut here =
        Here { pid: source.pid(), monitor: source.socket.clone(), console: folder.path().join("here-console") };
    let begun = Instant::now();
    for number in 0..rounds {
        let round = Round::of(seed, number);
        let after;
        (here, after) = goes_and_comes_back(&place, folder.path(), &machine, &here, round);
        println!("round {number} of seed {seed}: {round:?}: it ran {:.1} ms after", after.as_secs_f64() * 1e3);
    }
    println!("{rounds} rounds in {:.1} s", begun.elapsed().as_secs_f64());
    // All of it is looked at once more, at the end by the guest at another host for good.
    let (mut destination, to) = receive(&place, folder.path(), &machine, &[]);
    let mut sender = send(&place, &to, &here.monitor, &[]);
    assert_eq!(sender.end(), 0, "{}", sender.story());
    assert_eq!(destination.end(), 0, "{}", destination.story());
    let there = Console(folder.path().join("there-console"));
    expect_no_gap(&there.wait_for(300));
    end_left(&destination);
    wait_until_ended(here.pid);
    place.expect_nothing_left();
}
