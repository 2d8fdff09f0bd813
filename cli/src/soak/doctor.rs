//! False evidence, to try the verdict with: each way of lying makes of a run that held one that did not, and must be found out.

use super::verdict::{Evidence, Outcome, RunReport, judge};
use belay_vmm_glue::migrate::observation::{Kind, Observation, ObservationId};
use clap::ValueEnum;

/// What is changed in a run's evidence before it is judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Lie {
    /// A packet never arrived.
    LostPacket,
    /// A packet was shown twice, not the same.
    Contradiction,
    /// Every showing of a packet has a byte that memory does not account for.
    ForgedPacket,
    /// A page of memory is wrong.
    WrongPage,
    /// Nobody looked at memory.
    Unchecked,
    /// It was looked at, and not one page of it could be.
    Uncompared,
    /// Whoever caught the guest found nothing in the ring.
    NothingToFold,
    /// The destination was told that a checkpoint newer than the one caught had committed.
    LostCommit,
    /// Nobody said that a stale destination's commit was refused.
    UnsaidRefusal,
    /// What was refused was a checkpoint that was caught.
    OtherRefusal,
    /// The destination says that it owns the guest too.
    TwoOwners,
    /// The destination shows something new after the source has.
    StaleOutput,
    /// A release is on disk.
    Released,
    /// An exit code that says something else than the last event.
    OtherExitCode,
    /// A process was left.
    LeftBehind,
    /// The guest had hardly any content.
    EmptyGuest,
    /// The hosts spoke in clear where they should have encrypted, or the other way round.
    OtherTls,
    /// There was no second migration.
    NoSecond,
    /// It did not end well.
    SecondFailed,
    /// Its guest came with a wrong page, or nobody looked.
    SecondWrongPage,
    SecondUnchecked,
    /// Nobody said that it took over.
    NobodyTookOver,
    /// A destination that took over, or was joined again, had forgotten pages or checkpoints.
    Forgotten,
}

/// Judges the run again with each lie. The report is that of a broken run if the run itself held and every lie was found out.
pub fn try_with(lies: &[Lie], evidence: &Evidence<'_>, honest: RunReport) -> RunReport {
    if honest.outcome != Outcome::Held {
        return RunReport { outcome: Outcome::Void, wrong: vec!["the run itself did not hold".to_owned()], ..honest };
    }
    let mut report = RunReport { outcome: Outcome::Broken, ..honest };
    for &lie in lies {
        let mut evidence = evidence.clone();
        tell(lie, &mut evidence);
        let found = judge(&evidence);
        let name = lie.to_possible_value().map_or(String::new(), |value| value.get_name().to_owned());
        if found.outcome != Outcome::Broken {
            report.outcome = Outcome::Held;
            report.wrong.push(format!("{name} was believed"));
            continue;
        }
        report.wrong.push(format!("{name} was found out: {}", found.wrong.join("; ")));
    }
    report
}

fn tell(lie: Lie, evidence: &mut Evidence<'_>) {
    let middle = evidence.seen.len() / 2;
    let add = |events: &mut Vec<Observation>, kind| {
        events.push(Observation { id: ObservationId("lie".to_owned()), parent: None, at_us: 0, kind });
    };
    match lie {
        Lie::LostPacket => {
            let sequence = evidence.seen[middle].sequence;
            evidence.seen.retain(|packet| packet.sequence != sequence);
        }
        Lie::Contradiction => {
            let mut again = evidence.seen[middle].clone();
            again.bytes[8] ^= 1;
            evidence.seen.insert(middle + 1, again);
        }
        Lie::ForgedPacket => {
            let sequence = evidence.seen[middle].sequence;
            let showings = evidence.seen.iter_mut().filter(|packet| packet.sequence == sequence);
            showings.for_each(|packet| packet.bytes[16] ^= 1);
        }
        Lie::WrongPage => {
            for event in evidence.source.events.iter_mut().chain(&mut evidence.destination.events) {
                if let Kind::Checked { wrong_pages, .. } = &mut event.kind {
                    *wrong_pages = 1;
                }
            }
        }
        Lie::Unchecked => {
            for said in [&mut evidence.source, &mut evidence.destination] {
                said.events.retain(|event| !matches!(event.kind, Kind::Checked { .. }));
            }
        }
        Lie::Uncompared => {
            for event in &mut evidence.destination.events {
                if let Kind::Checked { pages, not_compared: Some(left), .. } = &mut event.kind {
                    (*pages, *left) = (0, *pages + *left);
                }
            }
        }
        Lie::NothingToFold => {
            for event in &mut evidence.source.events {
                if let Kind::Recovered { pages, .. } = &mut event.kind {
                    *pages = 0;
                }
            }
        }
        Lie::LostCommit => {
            let later = Kind::Committed {
                epoch: 1 << 40,
                pages: 1,
                bytes: 1,
                pause_us: 1,
                held_back_us: 0,
                commit_us: 1,
                age_us: 1,
                copied_on_write: None,
            };
            add(&mut evidence.destination.events, later);
        }
        Lie::UnsaidRefusal => {
            let refusal = |kind: &Kind| matches!(kind, Kind::State { state, .. } if state == "tether-failed");
            evidence.destination.events.retain(|event| !refusal(&event.kind));
        }
        Lie::OtherRefusal => {
            let caught = evidence.source.caught().unwrap_or(0);
            for event in &mut evidence.destination.events {
                match &mut event.kind {
                    Kind::State { state, why } if state == "tether-failed" => {
                        *why = format!("epoch {caught} could not be shipped: lie");
                    }
                    _ => {}
                }
            }
        }
        Lie::TwoOwners => {
            add(&mut evidence.destination.events, Kind::State { state: "owner".into(), why: "lie".into() });
        }
        Lie::StaleOutput => {
            let mut stale = evidence.seen[evidence.seen.len() - 1].clone();
            stale.sender = "destination".into();
            stale.sequence += 1;
            evidence.seen.push(stale);
        }
        Lie::Released => evidence.released = true,
        Lie::OtherExitCode => evidence.source.exit = Some(0),
        Lie::LeftBehind => evidence.left.push("process 7: belay vmm".to_owned()),
        Lie::OtherTls => {
            for event in &mut evidence.destination.events {
                if let Kind::Connected { tls, .. } = &mut event.kind {
                    *tls = !*tls;
                }
            }
        }
        Lie::NoSecond => evidence.second = None,
        Lie::SecondFailed => {
            if let Some(second) = &mut evidence.second {
                second.destination.exit = Some(5);
            }
        }
        Lie::SecondWrongPage => {
            for event in evidence.second.iter_mut().flat_map(|second| &mut second.destination.events) {
                if let Kind::Checked { wrong_pages, .. } = &mut event.kind {
                    *wrong_pages = 1;
                }
            }
        }
        Lie::SecondUnchecked => {
            if let Some(second) = &mut evidence.second {
                second.destination.events.retain(|event| !matches!(event.kind, Kind::Checked { .. }));
            }
        }
        Lie::NobodyTookOver => {
            let took = |event: &Observation| matches!(event.kind, Kind::TakenOver { .. } | Kind::TookOver { .. });
            evidence.source.events.retain(|event| !took(event));
            evidence.destination.events.retain(|event| !took(event));
        }
        Lie::Forgotten => {
            for event in evidence.source.events.iter_mut().chain(&mut evidence.destination.events) {
                match &mut event.kind {
                    Kind::TetheredAgain { committed } => *committed = 0,
                    Kind::TookOver { landed_frames, .. } => *landed_frames = 0,
                    _ => {}
                }
            }
        }
        Lie::EmptyGuest => {
            for event in &mut evidence.source.events {
                if let Kind::SwitchSent { peer_frames, zero_frames, .. } = &mut event.kind {
                    (*peer_frames, *zero_frames) = (*peer_frames / 4, *zero_frames + *peer_frames - *peer_frames / 4);
                }
            }
        }
    }
}
