//! What is left of a guest that runs nowhere: whoever promotes it, or tethers it again, runs it with that.

use super::{Evidence, Home, packets};
use crate::holder::NOT_COMPARED;
use belay_vmm_glue::kvm::guests::NONCE_LOG_PAGES;
use belay_vmm_glue::migrate::observation::Kind;
use serde::{Deserialize, Serialize};

/// What was looked at of a guest that runs nowhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Compared {
    /// So many pages of a fenced guest; of so many nothing was known, because they had not come.
    Pages { pages: u64, not_there: u64 },
    /// None, and why.
    Not { why: String },
}

/// What a fenced guest has must be what its own steps make of it. A guest whose process was killed has nothing that could be looked at, which is told and never counts as compared.
pub(super) fn compared(evidence: &Evidence<'_>, home: Option<Home>, wrong: &mut Vec<String>) -> Option<Compared> {
    let destination = &evidence.destination;
    if destination.exit != Some(11) {
        let gone = || Compared::Not { why: "it has gone with the process that had it".to_owned() };
        return matches!(home, Some(Home::WithItsHost) | None).then(gone);
    }
    let compared = destination.last_of_the_last(|kind| match kind {
        Kind::Checked { pages, not_compared: Some(not_there), steps, nonces, issued, .. } => {
            Some((*pages, *not_there, steps, nonces, issued))
        }
        _ => None,
    });
    let Some((pages, not_there, steps, nonces, issued)) = compared else {
        let why = destination.last_of_the_last(|kind| match kind {
            Kind::State { state, why } if state == NOT_COMPARED => Some(why.clone()),
            _ => None,
        });
        if why.is_none() {
            wrong.push("P1, P3: the destination was fenced and what it has of the guest was not compared".to_owned());
        }
        return Some(Compared::Not { why: why.unwrap_or_else(|| "nobody looked".to_owned()) });
    };
    // The pages of a nonce log that is not there as a whole are not compared either.
    let landed = destination.last_of_the_last(|kind| match kind {
        Kind::Pull { landed_frames, .. } => Some(*landed_frames),
        _ => None,
    });
    if pages + NONCE_LOG_PAGES < landed.unwrap_or(0) {
        wrong.push(format!("P1, P3: {landed:?} pages of a fenced guest had landed, and {pages} were compared"));
    }
    if pages == 0 {
        return Some(Compared::Not { why: "none of its pages had come".to_owned() });
    }
    // Whoever has forgotten the nonces, because that page had not come, knows what its packets were no more.
    let knows = nonces.iter().all(|log| !log.is_empty());
    if home == Some(Home::Fenced) && knows {
        let spec = evidence.source.last(|kind| match kind {
            Kind::GuestStarted { spec, .. } => Some(spec),
            _ => None,
        });
        // It stands between these steps and the next of its PACE reads.
        let shown = spec.ok_or("nobody said what guest was started".to_owned()).and_then(|spec| {
            let next: Vec<_> = steps.iter().map(|step| step + spec.batch_steps).collect();
            let (got, most) = packets(&evidence.seen, spec, &next, nonces, issued)?;
            let few = got.iter().zip(&most).all(|(got, most)| got <= most);
            if few {
                Ok(())
            } else {
                Err(format!("{got:?} packets were shown of a fenced guest that has come to {most:?}"))
            }
        });
        if let Err(why) = shown {
            wrong.push(format!("P4: {why}"));
        }
    }
    Some(Compared::Pages { pages, not_there })
}
