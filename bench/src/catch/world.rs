//! belay's own destination is lost, and the world waits: what the source says of its catch, and when output came.

use crate::belay::{ANSWER, Belay};
use crate::error::BenchError;
use crate::report::{Axis, Better, Case, Line, Mark, Measure, Plot, Role};
use belay_transport::Deadline;
use belay_transport::fabric::FabricKind;
use belay_vmm_glue::migrate::observation::Kind;
use belay_vmm_glue::witness::observer::{ObserverAddress, ObserverServer, Seen};
use clap::ValueEnum;
use rustix::process::{Signal, kill_process};
use std::collections::BTreeSet;
use std::fmt;
use std::time::{Duration, Instant};

/// How a destination is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Loss {
    /// SIGKILL
    Kill,
    /// SIGSTOP: nothing ends, and only the lease tells
    Freeze,
}

impl Loss {
    pub const ALL: [Self; 2] = [Self::Kill, Self::Freeze];
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.to_possible_value().expect("none is hidden").get_name())
    }
}

/// For a guest to be moved, and for a loss to be noticed under the default lease.
const MOVED: Duration = Duration::from_secs(120);
const NOTICED: Duration = Duration::from_secs(30);

/// How `belay send` ends after a catch.
const CAUGHT: i32 = 10;

/// Drawn at least of what was before the loss, and of what came after the catch.
const SHOWN_MS: f64 = 100.0;

pub const BESIDE: &str = "noticed to running, without the fold";

/// One loss, in milliseconds.
pub struct Lost {
    noticed: f64,
    revoked: f64,
    folded: f64,
    loaded: f64,
    running: f64,
    /// From the last new packet of the destination to the source's first.
    silence: f64,
    /// Folded over the whole migration, and of those in the catch.
    total_pages: f64,
    pages: f64,
    resent: f64,
    /// When each new packet was seen, since the loss.
    packets: Vec<f64>,
}

/// Moves a guest, loses its destination once it has been tethered for so long with all pages there, and looks at the catch.
pub fn lose(belay: &Belay, fabric: FabricKind, loss: Loss, tethered: Duration, trial: u64) -> Result<Lost, BenchError> {
    let refused = |why: String| BenchError::Refused { why };
    let address = ObserverAddress::Unix(belay.path(&format!("observer-{loss}-{trial}")).into());
    let observer = ObserverServer::bind(&address).map_err(BenchError::io("start the observer"))?;
    let output_to = observer.address().to_string();
    let (listen, carrier) = (belay.address(fabric, &format!("receive-{loss}-{trial}")), fabric.to_string());
    let there = belay.path(&format!("there-{loss}-{trial}"));
    let words = ["receive", "--fabric", &carrier, "--listen", &listen, "--state-dir", &there];
    let (mut receiver, to) = belay.start(&words)?.listening()?;
    let here = belay.path(&format!("here-{loss}-{trial}"));
    let words = ["send", "--fabric", &carrier, "--to", &to, "--state-dir", &here, "--output-to", &output_to];
    let guest = ["--memory", "256M", "--working-set", "64M", "--dirty-rate", "20k", "--release", "never"];
    let mut sender = belay.start(&[&words[..], &guest, &["--check", "--run-on", "300ms"]].concat())?;
    receiver.wait("pull the guest", MOVED, |kind| matches!(kind, Kind::AllLanded { .. }))?;
    let early = |kind: &Kind| match kind {
        Kind::Noticed { by } => Some(by.clone()),
        _ => None,
    };
    if let Some((_, by)) = sender.wait_if(tethered, early)? {
        return Err(refused(format!("the destination was taken for dead before it was lost: {by}")));
    }
    let signal = match loss {
        Loss::Kill => Signal::KILL,
        Loss::Freeze => Signal::STOP,
    };
    let lost = Instant::now();
    kill_process(receiver.pid(), signal).map_err(|errno| BenchError::io("lose the destination")(errno.into()))?;
    let (noticed, _) = sender.wait("notice the loss", NOTICED, |kind| matches!(kind, Kind::Noticed { .. }))?;
    sender.wait("run the guest again", NOTICED, |kind| matches!(kind, Kind::Caught { .. }))?;
    sender.end_with(CAUGHT)?;
    let ms = |us: u64| us as f64 / 1e3;
    let missing = |what: &str| refused(format!("belay did not say {what}"));
    let revoked = sender.find(|kind| match kind {
        Kind::Revoked { took_us } => Some(ms(*took_us)),
        _ => None,
    });
    let recovered = sender.find(|kind| match *kind {
        Kind::Recovered { pages, total_pages, took_us, load_us, resent_packets, .. } => {
            Some((pages as f64, total_pages as f64, ms(took_us - load_us), ms(load_us), resent_packets as f64))
        }
        _ => None,
    });
    let whole = sender.find(|kind| match kind {
        Kind::Caught { noticed_to_running_us, .. } => Some(ms(*noticed_to_running_us)),
        _ => None,
    });
    let wrong = sender.find(|kind| match kind {
        Kind::Checked { wrong_pages, detail, .. } => Some((*wrong_pages, detail.clone())),
        _ => None,
    });
    match wrong.ok_or_else(|| missing("that its memory was checked"))? {
        (0, detail) if detail.is_empty() => {}
        (wrong, detail) => {
            return Err(refused(format!("{wrong} pages of the guest that was caught are wrong {detail}")));
        }
    }
    let revoked = revoked.ok_or_else(|| missing("that the destination is shut out"))?;
    let (pages, total_pages, folded, loaded, resent) = recovered.ok_or_else(|| missing("what was folded"))?;
    let whole = whole.ok_or_else(|| missing("that the guest runs"))?;
    // Packets of the source's last moments are acknowledged before it ends.
    observer.wait_until(Deadline::after(ANSWER), |seen| handed_over(seen).is_some());
    let verdict = observer.verdict();
    if !verdict.is_good() {
        return Err(refused(format!("output was not as if nothing had happened: {verdict}")));
    }
    let seen = observer.seen();
    let lost_at = lost.saturating_duration_since(observer.began()).as_secs_f64() * 1e3;
    let silence = handed_over(&seen).ok_or_else(|| refused("no output came after the catch".to_owned()))?;
    Ok(Lost {
        noticed: noticed.saturating_duration_since(lost).as_secs_f64() * 1e3,
        revoked,
        folded,
        loaded,
        running: (whole - revoked - folded - loaded).max(0.0),
        silence: ms(silence),
        total_pages,
        pages,
        resent,
        packets: new(&seen).iter().map(|packet| ms(packet.at_us) - lost_at).collect(),
    })
}

/// Microseconds between the last new packet of one sender and the first new one of the next, the last time that it changed: at the catch.
/// The first time was the switch.
fn handed_over(seen: &[Seen]) -> Option<u64> {
    let new = new(seen);
    let changes: Vec<&[&Seen]> = new.windows(2).filter(|pair| pair[0].sender != pair[1].sender).collect();
    match changes[..] {
        [_, .., last] => Some(last[1].at_us.saturating_sub(last[0].at_us)),
        _ => None,
    }
}

/// Those of the packets that had not been seen before.
fn new(seen: &[Seen]) -> Vec<&Seen> {
    let mut known = BTreeSet::new();
    seen.iter().filter(|packet| known.insert(packet.sequence)).collect()
}

/// What the world saw of the loss that it had to wait longest but half of them for.
fn course(loss: Loss, all: &[Lost]) -> Option<Plot> {
    let mut by_silence: Vec<&Lost> = all.iter().collect();
    by_silence.sort_by(|one, other| one.silence.total_cmp(&other.silence));
    let lost = by_silence.get(by_silence.len() / 2)?;
    let running = lost.noticed + lost.revoked + lost.folded + lost.loaded + lost.running;
    // As much again on both sides of the silence, and no more than there is.
    let around = -lost.silence.max(SHOWN_MS)..=running + lost.silence.max(SHOWN_MS);
    let shown: Vec<f64> = lost.packets.iter().copied().filter(|at| around.contains(at)).collect();
    // It stays at what it was until the next one comes.
    let points = shown.iter().enumerate().flat_map(|(before, &at)| [(at, before as f64), (at, before as f64 + 1.0)]);
    let mark = |at, name: &str| Mark { at, name: name.to_owned() };
    Some(Plot::TimeLine {
        title: format!("What the world sees of a destination that is lost ({loss})"),
        x: Axis::linear("since the loss", "ms"),
        y: Axis::linear("packets seen", ""),
        lines: vec![Line { name: "guest".to_owned(), role: Role::Ours, points: points.collect() }],
        marks: vec![mark(0.0, "lost"), mark(lost.noticed, "noticed"), mark(running, "running")],
    })
}

/// What all losses of one kind took.
pub fn case(fabric: FabricKind, loss: Loss, tethered: Duration, all: &[Lost]) -> Case {
    let mut case = Case::new("belay loses its destination")
        .with("loss", loss)
        .with("fabric", fabric)
        .with("tethered", format!("{} ms", tethered.as_millis()))
        .with("lease", "default")
        .with("policy", "default");
    let mut lower = |name: &str, unit: &str, of: &dyn Fn(&Lost) -> f64| {
        case.measures.push(Measure::new(name, unit, Better::Lower, all.iter().map(of).collect()));
    };
    lower("lost to noticed", "ms", &|lost| lost.noticed);
    lower("revoked", "ms", &|lost| lost.revoked);
    lower("folded", "ms", &|lost| lost.folded);
    lower("loaded", "ms", &|lost| lost.loaded);
    lower("running", "ms", &|lost| lost.running);
    lower(BESIDE, "ms", &|lost| lost.revoked + lost.loaded + lost.running);
    lower("last output to next output", "ms", &|lost| lost.silence);
    lower("pages left to fold", "", &|lost| lost.pages);
    lower("pages checkpointed before", "", &|lost| lost.total_pages);
    lower("packets sent again", "", &|lost| lost.resent);
    case.plots.extend(course(loss, all));
    case
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_silence_is_that_between_the_destinations_last_new_packet_and_the_sources_first() {
        let packet = |at_us, sender: &str, sequence| Seen { at_us, sender: sender.into(), sequence, bytes: Vec::new() };
        let mut seen = vec![packet(0, "source", 0), packet(500, "destination", 1), packet(600, "destination", 2)];
        assert_eq!(handed_over(&seen), None, "no catch yet");
        // What the source sends again is not new.
        seen.extend([packet(700, "source-2", 2), packet(950, "source-2", 3)]);
        assert_eq!(handed_over(&seen), Some(350));
    }
}
