//! The demo's verdict: each claim by itself, with the figures it rests on.

use super::AtKill;
use super::timeline::Story;
use crate::observe;
use crate::report::time;
use belay_vmm_glue::kvm::guests::{GuestSpec, Program};
use belay_vmm_glue::migrate::observation::{Kind, Observation};
use belay_vmm_glue::witness::model::{Model, NonceSeen};
use belay_vmm_glue::witness::observer::{self, OutputFault, Seen};
use belay_vmm_glue::witness::packet;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::Path;

/// One thing that must be so.
#[derive(Debug, Clone, Serialize)]
pub struct Claim {
    pub claim: &'static str,
    pub holds: bool,
    pub figures: String,
}

/// All of them.
#[derive(Debug, Clone, Serialize)]
pub struct Verdict {
    pub claims: Vec<Claim>,
    pub driven_by: String,
    pub blackout_us: Option<u64>,
    pub total_us: Option<u64>,
    pub commits: u64,
    pub pause_p50_us: Option<u64>,
    /// SIGKILL sent to the source having noticed.
    pub kill_to_noticed_us: Option<u64>,
    pub noticed_to_running_us: Option<u64>,
    pub kill_to_running_us: Option<u64>,
    /// Last packet of the destination to the first new one of the source, as the observer saw it.
    pub silence_us: Option<u64>,
}

/// What `--json` ends with.
#[derive(Debug, Serialize)]
pub struct Report<'a> {
    event: &'static str,
    passed: bool,
    #[serde(flatten)]
    verdict: &'a Verdict,
}

impl Verdict {
    /// Whether every claim holds.
    pub fn passed(&self) -> bool {
        self.claims.iter().all(|claim| claim.holds)
    }

    /// The report object of `--json`.
    pub fn report(&self) -> Report<'_> {
        Report { event: "report", passed: self.passed(), verdict: self }
    }

    /// The verdict for a person.
    pub fn text(&self) -> String {
        let mut out = String::new();
        for Claim { claim, holds, figures } in &self.claims {
            out.push_str(&format!("{} {claim}: {figures}\n", if *holds { "  ok  " } else { "WRONG " }));
        }
        if let (Some(noticed), Some(running), Some(whole)) =
            (self.kill_to_noticed_us, self.noticed_to_running_us, self.kill_to_running_us)
        {
            out.push_str(&format!(
                "\nkill to noticed {}, noticed to running {}, kill to running {}; guest driven by {}\n",
                time(noticed),
                time(running),
                time(whole),
                self.driven_by
            ));
        } else if let Some(noticed) = self.noticed_to_running_us {
            out.push_str(&format!("\nnoticed to running {}; guest driven by {}\n", time(noticed), self.driven_by));
        } else if let (Some(total), Some(blackout)) = (self.total_us, self.blackout_us) {
            out.push_str(&format!(
                "\ntotal migration time {}, of which blackout {}; {} checkpoints; guest driven by {}\n",
                time(total),
                time(blackout),
                self.commits,
                self.driven_by
            ));
        }
        out.push_str(if self.passed() { "PASSED\n" } else { "FAILED\n" });
        out
    }
}

fn find<'a, T>(of: &'a [Observation], pick: impl Fn(&'a Kind) -> Option<T>) -> Option<(u64, T)> {
    of.iter().rev().find_map(|seen| pick(&seen.kind).map(|found| (seen.at_us, found)))
}

/// Judges a run by what its processes said and what the observer saw.
/// Under a `lease` the world may have seen output that the guest, once caught, does not remember: that is told and not held against
/// it, and what must be so is said of the history that survived.
pub fn judge(story: &Story, at_kill: Option<&AtKill>, lease: bool, log: &Path) -> Verdict {
    let mut claims = Vec::new();
    let mut claim = |claim, holds, figures: String| claims.push(Claim { claim, holds, figures });
    let spec = find(&story.source, |kind| match kind {
        Kind::GuestStarted { spec, driven_by, .. } => Some((spec.clone(), driven_by.clone())),
        _ => None,
    });
    let scanner = spec.as_ref().is_some_and(|(_, (spec, _))| spec.program == Program::Scanner);
    let driven_by = spec.as_ref().map_or("nothing".to_owned(), |(_, (_, by))| by.clone());
    let caught = find(&story.source, |kind| match kind {
        Kind::Caught { epoch, noticed_to_running_us, steps, .. } => {
            Some((*epoch, *noticed_to_running_us, steps.clone()))
        }
        _ => None,
    });
    let commits = story.commits();
    let seen = observe::read_log(log);
    if let Some(at_kill) = at_kill {
        let (absent, held) = (100.0 - at_kill.landed_percent(), at_kill.held_packets);
        claim(
            if story.killed_at_us.is_some() { "killed in mid-pull" } else { "lost in mid-pull" },
            (10.0..=90.0).contains(&absent) && at_kill.commits >= 3 && (at_kill.released_packets >= 1 || scanner),
            format!(
                "{absent:.0} % of pages absent, {} checkpoints committed, {} packets out, {held} held",
                at_kill.commits, at_kill.released_packets
            ),
        );
        let newest = commits.last().map_or(0, |commit| commit.1);
        match &caught {
            None => claim("caught", false, "the guest does not run at the source".to_owned()),
            Some((_, (epoch, _, steps))) => {
                claim(
                    "recovered the newest commit the destination was told of, or a later one",
                    *epoch >= newest,
                    format!("checkpoint {epoch}, told of {newest}"),
                );
                let shown = seen.as_ref().ok().map(|seen| newest_steps(seen, steps.len()));
                claim(
                    "recovered step is at or behind no packet the world has seen",
                    lease
                        || shown
                            .as_ref()
                            .is_some_and(|shown| shown.iter().zip(steps).all(|(shown, step)| shown <= step)),
                    format!("recovered at step {steps:?}, destination showed up to {:?}", shown.unwrap_or_default()),
                );
            }
        }
    }
    let holder = if at_kill.is_some() { &story.source } else { &story.destination };
    let checked = find(holder, |kind| match kind {
        Kind::Checked { pages, wrong_pages, steps, nonces, issued, detail, .. } => {
            Some((*pages, *wrong_pages, steps, nonces, issued, detail))
        }
        _ => None,
    });
    match &checked {
        None => claim("every byte of RAM is what it must be", false, "no check was made".to_owned()),
        Some((_, (pages, wrong, steps, .., detail))) => claim(
            "every byte of RAM is what it must be",
            *wrong == 0 && detail.is_empty(),
            format!("{pages} pages compared at step {steps:?} {detail}"),
        ),
    }
    match (&seen, &checked, &spec) {
        (Ok(seen), Some((_, (_, _, steps, nonces, issued, _))), Some((_, (spec, _)))) => {
            let past = Past { steps, nonces, issued };
            judge_output(&mut claim, seen, spec, past, at_kill.is_some(), lease);
        }
        (Err(error), ..) => claim("every packet is what it must be", false, format!("no log of packets: {error}")),
        _ => claim("every packet is what it must be", false, "nothing to judge packets by".to_owned()),
    }
    if at_kill.is_none() {
        let released = find(&story.source, |kind| matches!(kind, Kind::ReleaseRecorded { .. }).then_some(()));
        claim("released by a record on disk", released.is_some(), "written and fsynced by the source".to_owned());
    }
    let pick = |pick: fn(&Kind) -> Option<u64>| find(&story.source, pick).map(|(_, found)| found);
    let noticed_at = find(&story.source, |kind| matches!(kind, Kind::Noticed { .. }).then_some(())).map(|(at, ())| at);
    let mut pauses: Vec<u64> = commits.iter().map(|commit| commit.3).collect();
    pauses.sort_unstable();
    let after_kill = |at: Option<u64>| Some(at?.saturating_sub(story.killed_at_us?));
    Verdict {
        claims,
        driven_by,
        blackout_us: pick(|kind| match kind {
            Kind::Blackout { took_us } => Some(*took_us),
            _ => None,
        }),
        total_us: pick(|kind| match kind {
            Kind::Released { total_us } => Some(*total_us),
            _ => None,
        }),
        commits: commits.len() as u64,
        pause_p50_us: pauses.get(pauses.len() / 2).copied(),
        kill_to_noticed_us: after_kill(noticed_at),
        noticed_to_running_us: caught.as_ref().map(|(_, (_, us, _))| *us),
        kill_to_running_us: after_kill(caught.as_ref().map(|(at, _)| *at)),
        silence_us: seen.ok().map(|seen| observer::judge(&seen).largest_silence_us),
    }
}

/// Highest step of each vCPU that the destination has shown.
fn newest_steps(seen: &[Seen], vcpus: usize) -> Vec<u64> {
    let mut newest = vec![0; vcpus];
    for packet in seen.iter().filter(|packet| &*packet.sender == "destination") {
        if let Ok(parsed) = packet::parse(packet.sequence, &packet.bytes)
            && let Some(step) = newest.get_mut(usize::from(parsed.vcpu))
        {
            *step = parsed.step.max(*step);
        }
    }
    newest
}

/// What determines, beside its spec, all that a guest must have shown.
struct Past<'a> {
    steps: &'a [u64],
    nonces: &'a [Vec<(u64, u64)>],
    issued: &'a [u64],
}

fn judge_output(
    claim: &mut impl FnMut(&'static str, bool, String),
    seen: &[Seen],
    spec: &GuestSpec,
    Past { steps, nonces, issued }: Past<'_>,
    killed: bool,
    lease: bool,
) {
    let mut verdict = observer::judge(seen);
    let all = verdict.faults.len();
    if lease {
        verdict.faults.retain(|fault| !matches!(fault, OutputFault::Contradiction { .. }));
    }
    let contradicted = all - verdict.faults.len();
    // A scanner may be caught before it has come round at the destination.
    let talkative = spec.program != Program::Scanner;
    let both = !talkative || (verdict.senders.len() >= 2 && verdict.senders.iter().all(|sender| sender.new > 0));
    let parts = verdict.senders.iter().map(|sender| format!("{} from {}", sender.new, sender.sender));
    let parts = parts.collect::<Vec<_>>().join(", ");
    if lease {
        let figures =
            format!("{verdict}; {contradicted} packets shown twice and not the same, as a lease allows ({parts})");
        claim("no gap", verdict.is_good() && both, figures);
    } else {
        let figures = format!("{verdict} ({parts})");
        claim("no gap, no contradiction, repeats only byte for byte the same", verdict.is_good() && both, figures);
    }
    // What was shown last is what the guest remembers.
    let shown: BTreeMap<u64, &[u8]> = seen.iter().map(|packet| (packet.sequence, &packet.bytes[..])).collect();
    let logs = nonces.iter().map(|log| log.iter().map(|&(step, nonce)| NonceSeen { step, nonce }).collect()).collect();
    let judged =
        Model::from_nonces_seen(spec, steps, logs, issued).map_err(|error| error.to_string()).and_then(|model| {
            let got = model.check_packets(shown).map_err(|error| error.to_string())?;
            Ok((got, model.packets_due()))
        });
    match judged {
        Ok((got, due)) => claim(
            "every packet is what it must be, and none is missing",
            got == due,
            format!(
                "{} packets, {} due; the guest had {} incarnations",
                got.iter().sum::<u64>(),
                due.iter().sum::<u64>(),
                issued.len()
            ),
        ),
        Err(error) => claim("every packet is what it must be, and none is missing", false, error),
    }
    let wanted = if killed { 3 } else { 2 };
    claim("each incarnation had its own nonce", issued.len() == wanted, format!("{} issued", issued.len()));
}
