//! Guests that move at once, each between two processes of belay.

use super::memory::beside_guest_ram;
use crate::belay::{ANSWER, Belay, Told};
use crate::error::BenchError;
use crate::report::{Better, Case, Measure};
use crate::table::median;
use belay_transport::fabric::FabricKind;
use belay_vmm_glue::migrate::observation::Kind;
use std::time::{Duration, Instant};

/// Longest that all of them may take to move.
const MOVED: Duration = Duration::from_secs(300);
/// More guests than processors are late with their signs of life; how late is for `suspicion` to say.
const LEASE: &str = "10s";
/// The source's last stop point before it pauses the guest.
const READY: &str = "source-prepared";
/// A guest stays tethered for so long after its last page has come; then its processes' memory is looked at, and it is released.
const TETHERED: &str = "500ms";

pub const AGGREGATE: &str = "pulled, all together";

/// What one guest's processes said.
#[derive(Debug, Clone)]
struct Guest {
    switched: Instant,
    landed: Instant,
    bytes: f64,
    blackout_ms: f64,
    fault_p99_us: Option<f64>,
    /// Beside its RAM, of source and destination.
    memory: [f64; 2],
}

/// One round of so many guests.
#[derive(Debug, Clone)]
pub struct Moved {
    guests: Vec<Guest>,
}

impl Moved {
    /// Bytes a second of each, from its switch to its last page.
    fn rates(&self) -> Vec<f64> {
        self.guests.iter().map(|guest| guest.bytes / (guest.landed - guest.switched).as_secs_f64()).collect()
    }

    /// Bytes a second of all, from the first switch to the last page.
    fn aggregate(&self) -> f64 {
        let began = self.guests.iter().map(|guest| guest.switched).min();
        let ended = self.guests.iter().map(|guest| guest.landed).max();
        let bytes: f64 = self.guests.iter().map(|guest| guest.bytes).sum();
        began.zip(ended).map_or(0.0, |(began, ended)| bytes / (ended - began).as_secs_f64())
    }

    /// The part of that time in which all of them moved.
    fn together(&self) -> f64 {
        let instant = |of: fn(&Guest) -> Instant| self.guests.iter().map(of);
        let (first, last) = (instant(|guest| guest.switched).min(), instant(|guest| guest.switched).max());
        let (early, late) = (instant(|guest| guest.landed).min(), instant(|guest| guest.landed).max());
        let (Some(first), Some(last), Some(early), Some(late)) = (first, last, early, late) else { return 0.0 };
        early.saturating_duration_since(last).as_secs_f64() / (late - first).as_secs_f64()
    }

    fn worst(&self, of: impl Fn(&Guest) -> Option<f64>) -> f64 {
        self.guests.iter().filter_map(of).fold(f64::NAN, f64::max)
    }

    fn middle(&self, of: impl Fn(&Guest) -> f64) -> f64 {
        median(&self.guests.iter().map(of).collect::<Vec<f64>>())
    }
}

/// Jain's index of fairness (R. Jain et al., DEC-TR-301, 1984): 1 where all have the same, 1/n where one has all.
fn jain(shares: &[f64]) -> f64 {
    let (sum, squares) = shares.iter().fold((0.0, 0.0), |(sum, squares), share| (sum + share, squares + share * share));
    sum * sum / (shares.len() as f64 * squares)
}

/// Moves so many guests at once and checks each where it has moved to.
pub fn move_at_once(
    belay: &Belay,
    fabric: FabricKind,
    memory: u64,
    policy: &str,
    count: u64,
) -> Result<Moved, BenchError> {
    // Each is ready to pause its guest, and has stopped there, before any goes on.
    let mut pairs = Vec::new();
    for number in 0..count {
        pairs.push(prepare(belay, fabric, memory, policy, number)?);
    }
    for (sender, _) in &mut pairs {
        sender.stopped_at(READY, MOVED)?;
    }
    for (sender, _) in &pairs {
        sender.go_on()?;
    }
    let guests = std::thread::scope(|scope| {
        let movers: Vec<_> = pairs.into_iter().map(|pair| scope.spawn(move || follow(pair))).collect();
        let joined = movers.into_iter().map(|mover| mover.join().map_err(|_| BenchError::Thread("moving a guest"))?);
        joined.collect::<Result<Vec<Guest>, BenchError>>()
    })?;
    Ok(Moved { guests })
}

/// Starts both processes of one guest. The source stops itself when all is ready for its guest's pause.
fn prepare(
    belay: &Belay,
    fabric: FabricKind,
    memory: u64,
    policy: &str,
    number: u64,
) -> Result<(Told, Told), BenchError> {
    let (listen, carrier) = (belay.address(fabric, &format!("listen-{number}")), fabric.to_string());
    let (there, here) = (belay.path(&format!("there-{number}")), belay.path(&format!("here-{number}")));
    let words = ["receive", "--fabric", &carrier, "--listen", &listen, "--state-dir", &there];
    let words = [&words[..], &["--check", "--run-on", "1ms"]].concat();
    let (receiver, to) = belay.start_telling_all(&words)?.listening()?;
    let memory = memory.to_string();
    let words = ["send", "--fabric", &carrier, "--to", &to, "--state-dir", &here, "--memory", &memory];
    let guest = ["--dirty-rate", "5k", "--policy", policy, "--release", TETHERED, "--run-before", "200ms"];
    let sender = belay.start(&[&words[..], &guest, &["--lease", LEASE, "--stop-at", READY]].concat())?;
    Ok((sender, receiver))
}

/// Follows one guest to its release.
fn follow((mut sender, mut receiver): (Told, Told)) -> Result<Guest, BenchError> {
    let (switched, _) = sender.wait("pause the guest", MOVED, |kind| matches!(kind, Kind::Paused { .. }))?;
    let (landed, _) = receiver.wait("pull the guest", MOVED, |kind| matches!(kind, Kind::AllLanded { .. }))?;
    // Tethered, and everything of it in use: not while it pulls, because looking takes the lock that faults take.
    let memory = [beside_guest_ram(sender.pid())? as f64, beside_guest_ram(receiver.pid())? as f64];
    sender.wait("release the guest", MOVED, |kind| matches!(kind, Kind::Released { .. }))?;
    sender.end()?;
    let checked = |kind: &Kind| match kind {
        Kind::Checked { wrong_pages, detail, .. } => Some((*wrong_pages, detail.clone())),
        _ => None,
    };
    match receiver.wait_if(ANSWER, checked)? {
        Some((_, (0, detail))) if detail.is_empty() => {}
        Some((_, (wrong, detail))) => {
            return Err(BenchError::Refused { why: format!("{wrong} pages of a guest that moved are wrong {detail}") });
        }
        None => return Err(BenchError::Refused { why: "belay did not check the guest that moved".to_owned() }),
    }
    receiver.end()?;
    let missing = || BenchError::Refused { why: "belay did not say what was pulled".to_owned() };
    let fault_p99_us = receiver.find(|kind| match kind {
        Kind::Latency { what, p99_us, .. } if what == "total" => Some(*p99_us),
        _ => None,
    });
    let blackout_ms = sender.blackout().ok_or_else(missing)?.as_secs_f64() * 1e3;
    let bytes = receiver.bytes().ok_or_else(missing)? as f64;
    Ok(Guest { switched, landed, bytes, blackout_ms, fault_p99_us, memory })
}

/// What all rounds of so many guests were, beside a single guest in the same rounds.
pub fn case(fabric: FabricKind, memory: u64, policy: &str, count: u64, all: &[Moved], alone: &[&Moved]) -> Case {
    let mut case = Case::new("guests that move at once")
        .with("guests", count)
        .with("fabric", fabric)
        .with("memory", format!("{} MiB", memory >> 20))
        .with("policy", policy);
    let mut measure = |name: &str, unit: &str, better, of: &dyn Fn(&Moved) -> f64| {
        let rounds: Vec<f64> = all.iter().map(of).collect();
        // What nobody said is left out.
        if rounds.iter().all(|value| value.is_finite()) {
            let beside = alone.iter().map(|moved| of(moved)).collect();
            case.measures.push(Measure::new(name, unit, better, rounds).beside("a single guest", beside));
        }
    };
    let mb = 1e-6;
    measure(AGGREGATE, "MB/s", Better::Higher, &|moved| moved.aggregate() * mb);
    measure("pulled, slowest guest", "MB/s", Better::Higher, &|moved| {
        moved.rates().into_iter().fold(f64::INFINITY, f64::min) * mb
    });
    measure("fairness of the pull (Jain)", "", Better::Higher, &|moved| jain(&moved.rates()));
    measure("part of the time in which all moved", "", Better::Higher, &Moved::together);
    measure("demand fault 99%, worst guest", "us", Better::Lower, &|moved| moved.worst(|guest| guest.fault_p99_us));
    measure("blackout, worst guest", "ms", Better::Lower, &|moved| moved.worst(|guest| Some(guest.blackout_ms)));
    let mib = |bytes: f64| bytes / f64::from(1 << 20);
    measure("memory beside RAM a guest, source", "MiB", Better::Lower, &|moved| {
        mib(moved.middle(|guest| guest.memory[0]))
    });
    measure("memory beside RAM a guest, destination", "MiB", Better::Lower, &|moved| {
        mib(moved.middle(|guest| guest.memory[1]))
    });
    case
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fairness_is_one_of_equals_and_an_nth_where_one_has_all() {
        assert_eq!(jain(&[3.0, 3.0, 3.0, 3.0]), 1.0);
        assert_eq!(jain(&[0.0, 8.0, 0.0, 0.0]), 0.25);
        assert!((jain(&[1.0, 2.0]) - 0.9).abs() < 1e-12);
    }

    #[test]
    fn together_is_the_part_between_the_last_switch_and_the_first_that_had_all_its_pages() {
        let zero = Instant::now();
        let at = |ms| zero + Duration::from_millis(ms);
        let guest = |switched, landed| Guest {
            switched: at(switched),
            landed: at(landed),
            bytes: 1e6,
            blackout_ms: 1.0,
            fault_p99_us: None,
            memory: [0.0; 2],
        };
        let moved = Moved { guests: vec![guest(0, 80), guest(20, 100)] };
        assert!((moved.together() - 0.6).abs() < 1e-9);
        assert!((moved.aggregate() - 2e7).abs() < 1.0);
        assert!(moved.worst(|guest| guest.fault_p99_us).is_nan());
    }
}
