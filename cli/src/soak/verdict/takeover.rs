//! What must come of a takeover. ARCHITECTURE.md has it as tables: "When a page server dies", "When a source dies, or its connection".

use super::{Evidence, Home};
use crate::soak::case::{Moment, Phase, Strike};
use crate::soak::takeover::{Ending, Setting};
use belay_vmm_glue::migrate::observation::Kind;
use belay_vmm_glue::witness::observer::Seen;
use serde::{Deserialize, Serialize};

/// What a takeover came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Succession {
    /// There was nothing to take over: the guest had not gone, or had ended with its process.
    Nothing,
    /// The destination was tethered again and went on.
    WentOn,
    /// The guest was caught from the newest committed checkpoint.
    Caught,
    /// The guest had been released, and the destination heard so.
    Released,
}

impl std::fmt::Display for Succession {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Nothing => "nothing",
            Self::WentOn => "went-on",
            Self::Caught => "caught",
            Self::Released => "released",
        })
    }
}

/// Whether the source noticed a loss by these words.
fn noticed(evidence: &Evidence<'_>, words: &str) -> bool {
    evidence.source.said(|kind| matches!(kind, Kind::Noticed { by } if by.contains(words)))
}

fn ran(evidence: &Evidence<'_>) -> bool {
    evidence.destination.said(|kind| matches!(kind, Kind::Resumed { .. }))
}

/// The stop point of the strike; nothing where it was told by events.
fn point(evidence: &Evidence<'_>) -> &'static str {
    match evidence.case.script().moment {
        Moment::At { point, .. } => point.name,
        Moment::Landed { .. } | Moment::AllLanded => "",
    }
}

/// Whether the run became another one: a short lease ran out by itself, or a busy host was not back within a short grace.
pub fn void(evidence: &Evidence<'_>) -> Option<String> {
    if !evidence.case.strike.is_takeover() || evidence.case.phase == Phase::Catch {
        return None;
    }
    if noticed(evidence, "silent for") {
        return Some("a lease ran out by itself".to_owned());
    }
    let late =
        ran(evidence) && evidence.source.said(|kind| matches!(kind, Kind::State { why, .. } if why == "GraceRanOut"));
    late.then(|| "a destination that lived did not come back within the grace".to_owned())
}

/// Holds the run against what must be; what the takeover came to.
pub fn expected(evidence: &Evidence<'_>, home: Option<Home>, wrong: &mut Vec<String>) -> Option<Succession> {
    let struck = evidence.struck.unwrap_or_default();
    let sources = &evidence.source.before;
    // A source that had released the guest ended by itself, before it was started again to tell so.
    let (last, killed) = match (sources.split_last(), struck.told_again) {
        (Some((last, killed)), true) => (Some(*last), killed),
        _ => (None, &sources[..]),
    };
    let servers = &evidence.destination.before;
    if last.is_some_and(|exit| exit != Some(0)) || killed.iter().chain(servers).any(|exit| *exit != Some(-9)) {
        wrong.push(format!("P9: sources before the last one ended with {sources:?}, page servers with {servers:?}"));
    }
    let takeover = evidence.case.script().takeover?;
    let came = match evidence.case.strike {
        Strike::SourceTakeover => of_source(evidence, wrong),
        _ => of_server(evidence, takeover.setting, wrong),
    };
    ends(evidence, home, came, takeover.ending, wrong);
    if came == Succession::WentOn {
        went_on(evidence, wrong);
    }
    Some(came)
}

/// What the source that was started last came to, by what it said.
fn source_came_to(evidence: &Evidence<'_>) -> Succession {
    let source = &evidence.source;
    if source.exit == Some(7) {
        Succession::Nothing
    } else if source.said(|kind| matches!(kind, Kind::TetheredAgain { .. })) {
        Succession::WentOn
    } else if source.caught().is_some() {
        Succession::Caught
    } else {
        Succession::Released
    }
}

fn of_source(evidence: &Evidence<'_>, wrong: &mut Vec<String>) -> Succession {
    use Succession::{Caught, Nothing, Released, WentOn};
    let (source, phase) = (&evidence.source, evidence.case.phase);
    let killed_again = evidence.struck.is_some_and(|struck| struck.killed_again);
    if source.before.len() != 1 + usize::from(killed_again) {
        wrong.push(format!(
            "{} sources were killed, and {killed_again} that one took over and was killed too",
            source.before.len()
        ));
    }
    let due: &[Succession] = match (phase, point(evidence)) {
        (Phase::Prepare, _) | (_, "switch-paused" | "catch-resumed") => &[Nothing],
        // The source's word may have gone out before it died: the destination's answer may have been there already.
        (Phase::Switch, "loaded-told") => &[Caught, WentOn],
        (Phase::Switch | Phase::Catch, _) => &[Caught],
        // Sent, and lost with its process, or heard.
        (Phase::Handover, "go-told") => &[Caught, WentOn],
        (Phase::Handover, _) => &[WentOn],
        (_, "release-asked") => &[WentOn, Released],
        (_, "release-renamed" | "release-recorded" | "release-told" | "release-heard") => &[Released],
        // The first pages are asked for, and come, while the guest's state is loaded.
        (Phase::Landing, _) if !ran(evidence) => &[Caught, WentOn],
        _ => &[WentOn],
    };
    let came = source_came_to(evidence);
    if !due.contains(&came) {
        wrong.push(format!("the takeover came to {came:?} where one of {due:?} was due"));
    }
    if came == Caught && phase != Phase::Catch && source.caught() != Some(0) {
        wrong.push(format!("P3: checkpoint {:?} was caught of a guest that had not run there", source.caught()));
    }
    let kept = source.last(|kind| match kind {
        Kind::Kept { migration, memory: Some(_) } => Some(migration),
        _ => None,
    });
    let taken = source.last_of_the_last(|kind| match kind {
        Kind::TakenOver { migration, was } => Some((migration, was.as_str())),
        _ => None,
    });
    match (came, taken) {
        (Nothing, None) => {}
        (Nothing, Some(taken)) => wrong.push(format!("nothing was to be taken over, and {taken:?} was")),
        (_, None) => wrong.push("no source said that it took over".to_owned()),
        (_, Some((migration, was))) => {
            // Tethered again and released between two deaths.
            let between = came == WentOn && killed_again && evidence.released;
            if Some(migration) != kept || was == "running" || (was == "released" && came != Released && !between) {
                wrong.push(format!("migration {migration} was taken over as {was} where {kept:?} came to {came:?}"));
            }
        }
    }
    came
}

fn of_server(evidence: &Evidence<'_>, setting: Setting, wrong: &mut Vec<String>) -> Succession {
    use Succession::{Caught, Nothing, Released, WentOn};
    let (destination, phase) = (&evidence.destination, evidence.case.phase);
    let served = evidence.source.was("serving");
    let due: &[Succession] = match (phase, setting) {
        (Phase::Prepare | Phase::Switch, _) => &[Nothing],
        // Heard or not, the source has had no word that the guest runs there: it takes it back. Where the word was on its way it may come.
        (Phase::Handover | Phase::Landing, Setting::Lease) if !served || point(evidence) == "go-told" => {
            &[Nothing, Caught, WentOn]
        }
        (Phase::Handover | Phase::Landing, _) if !served => &[Nothing, Caught],
        (Phase::Handover, Setting::Lease) => &[WentOn],
        (Phase::Release, Setting::Lease) => &[WentOn, Released],
        (Phase::Release, _) => &[Caught, Released],
        (_, Setting::Commit) => &[Caught],
        (_, Setting::Lease | Setting::BothDead) => &[WentOn],
    };
    let came = match destination.exit {
        Some(7) => Nothing,
        _ => source_came_to(evidence),
    };
    if !due.contains(&came) {
        wrong.push(format!("the takeover came to {came:?} where one of {due:?} was due"));
    }
    let took = destination.last_of_the_last(|kind| match kind {
        Kind::TookOver { pid, .. } => Some(*pid),
        _ => None,
    });
    match (came, took) {
        (Nothing, None) if !ran(evidence) => {}
        (Nothing, _) => wrong.push("a guest that had run there was not taken over".to_owned()),
        (_, None) => wrong.push("no page server said that it took over".to_owned()),
        (_, Some(pid)) => {
            let vmm = destination.last(|kind| match kind {
                Kind::VmmStarted { pid } => Some(*pid),
                _ => None,
            });
            if vmm != Some(pid) {
                wrong.push(format!("P1: VMM {pid} was taken over where {vmm:?} had been started"));
            }
        }
    }
    // What has landed stays landed.
    let mut told = 0;
    for event in &destination.events {
        match event.kind {
            Kind::Pull { landed_frames, .. } => told = landed_frames,
            Kind::TookOver { landed_frames, .. } if landed_frames < told => {
                wrong.push(format!("P1: {told} pages had landed, and {landed_frames} of them were taken over"));
            }
            _ => {}
        }
    }
    if came == Caught {
        let tethered = destination.last_of_the_last(|kind| match kind {
            Kind::State { state, .. } if state == "tethered" || state == "owner" => Some(state.clone()),
            _ => None,
        });
        if let Some(state) = tethered {
            wrong.push(format!("P2: the source has caught the guest, and the page server that took over was {state}"));
        }
    }
    if setting == Setting::BothDead {
        let taken = evidence.source.last_of_the_last(|kind| matches!(kind, Kind::TakenOver { .. }).then_some(()));
        if taken.is_none() {
            wrong.push("no source said that it took over".to_owned());
        }
    }
    came
}

/// Who has the guest in the end, and with which exit codes.
fn ends(evidence: &Evidence<'_>, home: Option<Home>, came: Succession, ending: Ending, wrong: &mut Vec<String>) {
    let (source, destination) = (&evidence.source, &evidence.destination);
    let of_source = evidence.case.strike == Strike::SourceTakeover;
    let caught_after = of_source && !evidence.case.goes_to_release();
    let (homes, sources, destinations): (&[Home], &[i32], &[i32]) = match came {
        Succession::Nothing if of_source && ran(evidence) => (&[Home::WithItsHost], &[7], &[11, 13]),
        Succession::Nothing if of_source => (&[Home::WithItsHost], &[7], &[5]),
        Succession::Nothing => (&[Home::NotMoved, Home::Caught], &[5, 10], &[7]),
        Succession::WentOn if caught_after && ending == Ending::Kill => (&[Home::Caught], &[10], &[-9]),
        Succession::WentOn if caught_after => (&[Home::Caught], &[10], &[11, 13]),
        Succession::WentOn | Succession::Released => (&[Home::Owner], &[0], &[0]),
        Succession::Caught if of_source && !ran(evidence) => (&[Home::Caught], &[10], &[5]),
        Succession::Caught => (&[Home::Caught], &[10], &[11, 13]),
    };
    if !home.is_some_and(|home| homes.contains(&home)) {
        wrong.push(format!("the guest's end is {home:?} where one of {homes:?} was due"));
    }
    for (who, exit, due) in [("source", source.exit, sources), ("destination", destination.exit, destinations)] {
        if !exit.is_some_and(|code| due.contains(&code)) {
            wrong.push(format!("P9: the {who} ended with {exit:?}, one of {due:?} was due"));
        }
    }
}

/// A migration that went on did so from a checkpoint that holds all the destination had been told of, and more came after.
fn went_on(evidence: &Evidence<'_>, wrong: &mut Vec<String>) {
    for event in &evidence.source.events {
        let Kind::TetheredAgain { committed } = event.kind else { continue };
        // Who was fenced stood still from there until the new session, whose first checkpoints may have committed by the time this was said.
        // Who took over from a page server has no such moment.
        let (until, more) = match evidence.destination.when_last("fenced", event.at_us) {
            Some(fenced) => (fenced, 0),
            None => (event.at_us, 1),
        };
        let told = evidence.destination.newest_commit_until(until);
        if told > committed + more {
            wrong.push(format!(
                "P3: it went on from checkpoint {committed}, the destination was told that {told} had committed"
            ));
        }
    }
    let struck = evidence.struck.unwrap_or_default();
    if evidence.case.strike == Strike::SourceTakeover && !evidence.case.goes_to_release() && !struck.committed_again {
        wrong.push("no checkpoint committed over the session of the source that took over".to_owned());
    }
}

/// The longest time without a new packet while the guest was the destination's.
pub fn silence(seen: &[Seen]) -> Option<u64> {
    let mut next = 0;
    let new: Vec<_> = seen
        .iter()
        .filter(|packet| {
            let is_new = packet.sequence >= next;
            next = next.max(packet.sequence + 1);
            is_new && &*packet.sender == "destination"
        })
        .collect();
    new.windows(2).map(|pair| pair[1].at_us.saturating_sub(pair[0].at_us)).max()
}
