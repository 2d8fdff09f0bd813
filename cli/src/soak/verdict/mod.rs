//! The verdict on one run: what its processes said and did, and what the observer saw, held against the promises.
//!
//! A run *holds* when every claim does; it is *broken* when one does not; it is *void* when the strike met another run than the one
//! that was meant, because a short lease had run out by itself on a busy host. A void run is made again, and counted.

mod fenced;
mod said;
mod takeover;

use super::case::{Case, Moment, Phase, Strike};
use super::second::Second;
use super::strike::Struck;
use belay_transport::PAGE_SIZE;
use belay_vmm_glue::kvm::guests::GuestSpec;
use belay_vmm_glue::migrate::observation::Kind;
use belay_vmm_glue::witness::model::{Model, NonceSeen};
use belay_vmm_glue::witness::observer::{self, Seen};
pub use fenced::Compared;
pub use said::{Refused, Said};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;
pub use takeover::Succession;

/// Least RAM of a guest, and least share of its pages that must hold something at the switch, in percent.
const LEAST_RAM: u64 = 64 << 20;
const LEAST_FILLED: u64 = 60;

/// All that is known of a run when it is quiet.
#[derive(Clone)]
pub struct Evidence<'a> {
    pub case: Case,
    /// What the run was doing when the strike landed, or why its moment never came.
    pub came: Result<&'a str, &'a str>,
    pub struck: Option<Struck>,
    pub source: Said,
    pub destination: Said,
    pub observer_exit: Option<i32>,
    pub seen: Vec<Seen>,
    /// The release record is on disk.
    pub released: bool,
    /// A migration that followed in the same directories.
    pub second: Option<Second>,
    /// Processes that were left.
    pub left: Vec<String>,
    /// Roles that did not end though told to.
    pub forgotten: Vec<String>,
    pub took: Duration,
}

/// Where the guest is when all is quiet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Home {
    /// Caught, and it runs at the source.
    Caught,
    /// It never left the source.
    NotMoved,
    /// It runs at the destination, released.
    Owner,
    /// Stopped at the destination, its memory kept.
    Fenced,
    /// Gone with the host that owned it, as any guest without a tether.
    WithItsHost,
}

/// How a run went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    Held,
    Broken,
    Void,
}

/// One run's line of the sum, as its conductor prints it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RunReport {
    pub case: Case,
    pub outcome: Outcome,
    /// What does not hold, or why the run is void.
    pub wrong: Vec<String>,
    pub landed: String,
    pub home: Option<Home>,
    /// Last packet before the strike's effect to the first one from the source, where the destination was killed and the guest caught.
    pub silence_us: Option<u64>,
    /// What a takeover came to, and whether whoever took over was killed too.
    pub succession: Option<Succession>,
    pub killed_again: bool,
    /// Where a taken-over migration went on at the destination: the longest time without a packet from there.
    pub succession_silence_us: Option<u64>,
    /// Checkpoints in the source's RAM when it caught the guest.
    pub caught_epoch: Option<u64>,
    /// Pages that came out of the ring in the last read before that.
    pub recovered_pages: Option<u64>,
    /// What a fenced guest, or one that is gone, has of its memory was compared, or not.
    pub fenced: Option<Compared>,
    pub commits_told: u64,
    /// The checkpoint that the destination tried to commit in vain.
    pub refused: Option<Refused>,
    /// The destination was killed while the source stood in a fold.
    pub folding: bool,
    /// A second migration followed in the same directories.
    pub second: bool,
    pub took_ms: u64,
    /// Lines of its processes that were not kept.
    pub dropped: u64,
    /// The last lines of a broken run.
    pub story: Vec<String>,
}

/// Judges a run.
pub fn judge(evidence: &Evidence<'_>) -> RunReport {
    let mut wrong = Vec::new();
    let home = home(evidence, &mut wrong);
    safety(evidence, home, &mut wrong);
    secrecy(evidence, &mut wrong);
    let fenced = fenced::compared(evidence, home, &mut wrong);
    second(evidence, &mut wrong);
    let void = match evidence.came {
        Err(why) => Some(why.to_owned()),
        Ok(_) => lease_ran_out_by_itself(evidence, home).or_else(|| takeover::void(evidence)),
    };
    let mut succession = None;
    match (&void, evidence.case.strike.is_takeover()) {
        (Some(_), _) => {}
        (None, true) => succession = takeover::expected(evidence, home, &mut wrong),
        (None, false) => expected(evidence, home, &mut wrong),
    }
    if void.is_none() {
        folded_in_the_catch(evidence, &mut wrong);
    }
    let outcome = match (wrong.is_empty(), &void) {
        (false, _) => Outcome::Broken,
        (true, Some(_)) => Outcome::Void,
        (true, None) => Outcome::Held,
    };
    wrong.extend(void);
    let mut story = Vec::new();
    if outcome == Outcome::Broken {
        let mut all = vec![("source", &evidence.source), ("destination", &evidence.destination)];
        if let Some(Second { source, destination }) = &evidence.second {
            all.extend([("second source", source), ("second destination", destination)]);
        }
        for (who, said) in all {
            story.extend(said.story(40).into_iter().map(|line| format!("{who}: {line}")));
            story.extend(said.text.lines().rev().take(10).map(|line| format!("{who} said: {line}")));
        }
        if let Some(Compared::Not { why }) = &fenced {
            story.push(format!("the guest that runs nowhere was not compared: {why}"));
        }
    }
    let killed = evidence.case.strike.kills_destination() && home == Some(Home::Caught);
    RunReport {
        case: evidence.case,
        outcome,
        wrong,
        landed: evidence.came.unwrap_or_else(|why| why).to_owned(),
        home,
        silence_us: if killed { silence(&evidence.seen) } else { None },
        succession,
        killed_again: evidence.struck.is_some_and(|struck| struck.killed_again),
        succession_silence_us: match succession {
            Some(Succession::WentOn) => takeover::silence(&evidence.seen),
            _ => None,
        },
        caught_epoch: evidence.source.caught(),
        recovered_pages: recovered_pages(evidence),
        fenced,
        commits_told: evidence.struck.map_or(0, |struck| struck.commits_told),
        refused: evidence.destination.refused(),
        folding: evidence.case.strike.kills_destination() && evidence.struck.is_some_and(|struck| struck.folding),
        second: evidence.second.is_some(),
        took_ms: evidence.took.as_millis() as u64,
        dropped: evidence.source.dropped + evidence.destination.dropped,
        story,
    }
}

/// Where the guest is, by what both sides said; more than one place is wrong whatever the strike was.
fn home(evidence: &Evidence<'_>, wrong: &mut Vec<String>) -> Option<Home> {
    let (source, destination) = (&evidence.source, &evidence.destination);
    let at_source = match source.caught() {
        Some(_) => Some(Home::Caught),
        None => (source.exit == Some(5)).then_some(Home::NotMoved),
    };
    let owner = destination.was("owner");
    if let (Some(home), true) = (at_source, owner) {
        wrong.push(format!("P2: the guest has two owners: {home:?} at the source, and the destination owns it"));
    }
    if evidence.released && at_source.is_some() {
        wrong.push("P6: the source runs a guest that it had released on disk".to_owned());
    }
    if at_source.is_some() {
        return at_source;
    }
    // Killed after it was the owner, with its guest: as on any host.
    if owner && destination.exit == Some(0) {
        return Some(Home::Owner);
    }
    if evidence.released && matches!(destination.exit, Some(code) if code < 0) {
        return Some(Home::WithItsHost);
    }
    // Nothing was left at the source to be taken over: the guest died with the process that had it.
    if source.exit == Some(7) && matches!(destination.exit, Some(5 | 11 | 13)) {
        return Some(Home::WithItsHost);
    }
    if destination.exit == Some(11) {
        return Some(Home::Fenced);
    }
    // The source was killed with the guest it still had.
    (source.exit == Some(-9) && destination.exit == Some(5)).then_some(Home::WithItsHost)
}

/// What must be so of every run.
fn safety(evidence: &Evidence<'_>, home: Option<Home>, wrong: &mut Vec<String>) {
    let Evidence { source, destination, seen, .. } = evidence;
    let verdict = observer::judge(seen);
    if !verdict.is_good() || evidence.observer_exit != Some(0) {
        wrong.push(format!("P4: the observer (exit {:?}) saw {verdict}", evidence.observer_exit));
    }
    if let Some(order) = owners_in_turn(seen) {
        wrong.push(format!("P2: {order}"));
    }
    if let Some(caught) = source.caught() {
        let told = destination.newest_commit();
        if told > caught {
            wrong.push(format!(
                "P3: checkpoint {caught} was caught, the destination was told that {told} had committed"
            ));
        }
    }
    match home {
        Some(Home::Caught | Home::NotMoved) => checked("source", source, source, seen, wrong),
        Some(Home::Owner) => checked("destination", destination, source, seen, wrong),
        Some(Home::Fenced | Home::WithItsHost) | None => {}
    }
    for (who, said) in [("source", source), ("destination", destination)] {
        if said.said(
            |kind| matches!(kind, Kind::Checked { wrong_pages, detail, .. } if *wrong_pages > 0 || !detail.is_empty()),
        ) {
            wrong.push(format!("P1, P3: the {who}'s memory is not what it must be"));
        }
        let told = said.last(|kind| match kind {
            Kind::Ended { exit_code, .. } => Some(i32::from(*exit_code)),
            _ => None,
        });
        if said.exit.is_some_and(|code| code >= 0) && told != said.exit {
            wrong.push(format!("P9: the {who} ended with {:?} and said {told:?}", said.exit));
        }
        let nothing_left = evidence.case.strike.is_takeover() && said.exit == Some(7);
        if said.exit.is_some_and(|code| ![0, 5, 10, 11, 12, 13, 14, 130, -9].contains(&code)) && !nothing_left {
            wrong.push(format!("P9: the {who} ended with {:?}, which is no outcome of a migration", said.exit));
        }
    }
    if let Some((peer, zero)) = source.last(|kind| match kind {
        Kind::SwitchSent { peer_frames, zero_frames, .. } => Some((*peer_frames, *zero_frames)),
        _ => None,
    }) {
        let (frames, ram) = (peer + zero, (peer + zero) * PAGE_SIZE as u64);
        if ram < LEAST_RAM || peer * 100 < frames * LEAST_FILLED {
            wrong.push(format!("the guest was too easy: {ram} bytes, {peer} of {frames} pages held something"));
        }
    }
    wrong.extend(evidence.left.iter().map(|left| format!("left behind: {left}")));
    wrong.extend(evidence.forgotten.iter().map(|who| format!("P7: {who} did not end")));
}

/// Pages in the last read of whoever caught the guest.
fn recovered_pages(evidence: &Evidence<'_>) -> Option<u64> {
    evidence.source.last(|kind| match kind {
        Kind::Recovered { pages, .. } => Some(*pages),
        _ => None,
    })
}

/// A catch that was struck in the midst of its fold had something to fold, and so has whoever does it again.
fn folded_in_the_catch(evidence: &Evidence<'_>, wrong: &mut Vec<String>) {
    let in_the_fold =
        matches!(evidence.case.script().moment, Moment::At { point, .. } if point.name == "catch-folding");
    if in_the_fold && evidence.source.caught().is_some() && recovered_pages(evidence).is_none_or(|pages| pages == 0) {
        wrong.push(
            "P3: the catch was struck while it folded, and who caught the guest says that there was nothing to fold"
                .to_owned(),
        );
    }
}

/// Whoever has certificates speaks TLS with whoever it meets, and nobody else does.
fn secrecy(evidence: &Evidence<'_>, wrong: &mut Vec<String>) {
    let meant = evidence.case.script().tls;
    for (who, said) in [("source", &evidence.source), ("destination", &evidence.destination)] {
        if said.said(|kind| matches!(kind, Kind::Connected { tls, .. } if *tls != meant)) {
            wrong.push(format!("the {who} spoke {}", if meant { "in clear" } else { "TLS without certificates" }));
        }
    }
}

/// Whatever became of the guest, the next one moves: the directories of the first are as good as new ones.
fn second(evidence: &Evidence<'_>, wrong: &mut Vec<String>) {
    let Some(Second { source, destination }) = &evidence.second else {
        if evidence.came.is_ok() && evidence.case.is_followed() {
            wrong.push("no second migration was made".to_owned());
        }
        return;
    };
    let checked = destination.last(|kind| match kind {
        Kind::Checked { wrong_pages, detail, .. } => Some(*wrong_pages == 0 && detail.is_empty()),
        _ => None,
    });
    let ended = (source.exit, destination.exit);
    if ended != (Some(0), Some(0)) || !destination.was("owner") || checked != Some(true) {
        let whole = match checked {
            Some(true) => "whole",
            Some(false) => "not what it must be",
            None => "not checked",
        };
        wrong.push(format!(
            "a second migration ended with {:?} at the source and {:?} at the destination, its guest's memory {whole}",
            source.exit, destination.exit
        ));
    }
}

/// New packets must come from the source, then from the destination, then from the source again, and never back.
fn owners_in_turn(seen: &[Seen]) -> Option<String> {
    let (mut turns, mut next) = (vec![], 0);
    for packet in seen.iter().filter(|packet| {
        let new = packet.sequence >= next;
        next = next.max(packet.sequence + 1);
        new
    }) {
        if turns.last() != Some(&&*packet.sender) {
            turns.push(&*packet.sender);
        }
    }
    let in_turn: &[&[&str]] = &[&[], &["source"], &["source", "destination"], &["source", "destination", "source"]];
    (!in_turn.contains(&&turns[..])).then(|| format!("new output came from {turns:?} in turn"))
}

/// The guest's home must have compared all its memory, and every packet must be what that memory says. The source started it.
fn checked(who: &str, said: &Said, source: &Said, seen: &[Seen], wrong: &mut Vec<String>) {
    let found = said.last(|kind| match kind {
        Kind::Checked { steps, nonces, issued, .. } => Some((steps, nonces, issued)),
        _ => None,
    });
    let Some((steps, nonces, issued)) = found else {
        return wrong.push(format!("P1, P3: the {who} has the guest and its memory was not checked"));
    };
    let spec = source.last(|kind| match kind {
        Kind::GuestStarted { spec, .. } => Some(spec.clone()),
        _ => None,
    });
    let Some(spec) = spec else {
        return wrong.push("nobody said what guest was started".to_owned());
    };
    if let Err(why) = packets_are_right(seen, &spec, steps, nonces, issued) {
        wrong.push(format!("P4: {why}"));
    }
}

fn packets_are_right(
    seen: &[Seen],
    spec: &GuestSpec,
    steps: &[u64],
    nonces: &[Vec<(u64, u64)>],
    issued: &[u64],
) -> Result<(), String> {
    let (got, due) = packets(seen, spec, steps, nonces, issued)?;
    if got == due { Ok(()) } else { Err(format!("{got:?} packets were shown, {due:?} were due")) }
}

/// How many packets each vCPU showed, all of them right, and how many it must have sent.
fn packets(
    seen: &[Seen],
    spec: &GuestSpec,
    steps: &[u64],
    nonces: &[Vec<(u64, u64)>],
    issued: &[u64],
) -> Result<(Vec<u64>, Vec<u64>), String> {
    let shown: BTreeMap<u64, &[u8]> = seen.iter().map(|packet| (packet.sequence, &packet.bytes[..])).collect();
    let logs = nonces.iter().map(|log| log.iter().map(|&(step, nonce)| NonceSeen { step, nonce }).collect()).collect();
    let model = Model::from_nonces_seen(spec, steps, logs, issued).map_err(|error| error.to_string())?;
    Ok((model.check_packets(shown).map_err(|error| error.to_string())?, model.packets_due()))
}

/// Whether a lease ran out that nobody had struck.
fn lease_ran_out_by_itself(evidence: &Evidence<'_>, home: Option<Home>) -> Option<String> {
    let Case { strike, phase, .. } = evidence.case;
    if strike.is_deadly() || phase == Phase::Catch || home != Some(Home::Caught) {
        return None;
    }
    let by = evidence.source.last(|kind| match kind {
        Kind::Noticed { by } => Some(by.clone()),
        _ => None,
    })?;
    let expired = evidence
        .destination
        .said(|kind| matches!(kind, Kind::State { state, why } if state == "fenced" && why == "LeaseExpired"));
    (expired || by.contains("silent for") || by.contains("lease")).then(|| format!("a lease ran out by itself: {by}"))
}

/// What must be so after this strike in this phase.
fn expected(evidence: &Evidence<'_>, home: Option<Home>, wrong: &mut Vec<String>) {
    let Case { strike, phase, .. } = evidence.case;
    let (source, destination) = (&evidence.source, &evidence.destination);
    let ran = destination.said(|kind| matches!(kind, Kind::Resumed { .. }));
    // At the end of the switch the source's word may have gone out before it could notice: the destination's answer may be there already.
    let told = ["switch-told", "loaded-told", "go-due"];
    let go_may_follow = evidence.came.is_ok_and(|came| told.iter().any(|point| came.contains(point)));
    let before_go = matches!(phase, Phase::Prepare | Phase::Switch) && !go_may_follow;
    let homes: &[Home] = match strike {
        Strike::SourceKill if evidence.released => &[Home::Owner, Home::Fenced],
        Strike::SourceKill if before_go => &[Home::WithItsHost],
        // Killed when the guest ran again there: it has gone with its host.
        Strike::SourceKill if source.caught().is_some() => &[Home::Caught],
        Strike::SourceKill => &[Home::Fenced, Home::WithItsHost],
        _ if strike.kills_destination() && evidence.released => &[Home::WithItsHost],
        _ if strike.is_deadly() && evidence.released => &[Home::Owner, Home::Fenced],
        _ if strike.is_deadly() && before_go => &[Home::NotMoved],
        _ if strike.is_deadly() && ran => &[Home::Caught],
        _ if strike.is_deadly() => &[Home::Caught, Home::NotMoved],
        _ if evidence.case.goes_to_release() => &[Home::Owner],
        _ => &[Home::Caught],
    };
    // A source that was killed in the middle of its catch has taken the guest with it, and the destination is shut out.
    let gone = strike == Strike::SourceKill && phase == Phase::Catch && destination.exit == Some(13);
    if !gone && !home.is_some_and(|home| homes.contains(&home)) {
        wrong.push(format!(
            "the guest's end is {home:?} where one of {homes:?} was due (source ended with {:?}, destination with {:?})",
            source.exit, destination.exit
        ));
    }
    let source_exit = match (strike, home) {
        (Strike::SourceKill, _) => -9,
        (_, Some(Home::Caught)) => 10,
        (_, Some(Home::NotMoved)) => 5,
        _ => 0,
    };
    if source.exit != Some(source_exit) {
        wrong.push(format!("P9: the source ended with {:?}, {source_exit} was due", source.exit));
    }
    let destination_exits: &[i32] = match home {
        _ if strike.kills_destination() => &[-9],
        Some(Home::Owner) => &[0],
        Some(Home::NotMoved) => &[5],
        // It may have been cut off before it could hear what became of the guest; 5 where it was so before the guest had run there.
        Some(Home::Caught) if ran => &[11, 13],
        Some(Home::Caught) => &[5, 11, 13],
        Some(Home::Fenced) => &[11],
        Some(Home::WithItsHost) | None => &[5, 11, 13],
    };
    if !destination.exit.is_some_and(|code| destination_exits.contains(&code)) {
        wrong.push(format!(
            "P9: the destination ended with {:?}, one of {destination_exits:?} was due",
            destination.exit
        ));
    }
    stale(evidence, wrong);
    if evidence.struck.is_some_and(|struck| struck.vmm_waited == Some(false)) {
        wrong.push("P1: the VMM apart did not outlive its page server".to_owned());
    }
}

/// A destination that stood still past its lease and went on: it must be told, and what it then tries must fail and be said.
fn stale(evidence: &Evidence<'_>, wrong: &mut Vec<String>) {
    let (Strike::Freeze, Some(caught)) = (evidence.case.strike, evidence.source.caught()) else { return };
    let destination = &evidence.destination;
    let tethered = destination.was("tethered");
    // Frozen right before its trailer's write: the first thing it does is to commit.
    if let (Ok(_), Some(due)) = (evidence.came, commit_due(evidence.case)) {
        match destination.refused() {
            None => wrong.push(format!(
                "P5: the stale destination went on before the commit of epoch {due} and did not say that it was refused"
            )),
            Some(refused) if refused.epoch != due || refused.epoch <= caught => wrong.push(format!(
                "P5: epoch {due} was about to commit and {caught} was caught, the stale destination said that {} was refused",
                refused.epoch
            )),
            Some(_) => {}
        }
    }
    if tethered && !destination.was("fenced") {
        wrong.push("P5: the stale destination never fenced its guest".to_owned());
    }
}

/// The epoch whose trailer is written next where the run is struck right before that write: from the first on each epoch has one.
fn commit_due(case: Case) -> Option<u64> {
    match case.script().moment {
        Moment::At { point, times } if point.name == "commit-due" => Some(u64::from(times)),
        _ => None,
    }
}

/// The longest time without a new packet between the last new one from the destination and the first from the source after it.
fn silence(seen: &[Seen]) -> Option<u64> {
    let last = seen.iter().rposition(|packet| &*packet.sender == "destination")?;
    let newest = seen[..=last].iter().map(|packet| packet.sequence).max();
    let next = seen[last + 1..].iter().find(|packet| Some(packet.sequence) > newest)?;
    Some(next.at_us - seen[last].at_us)
}
