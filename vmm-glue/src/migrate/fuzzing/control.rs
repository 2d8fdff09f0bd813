//! The control protocol under any bytes.

use crate::fuzzing::says_the_same_again;
use crate::migrate::protocol::{MAX_REASON_BYTES, ToDestination, ToSource, decode, encode};
use crate::migrate::settings::{Proposal, ReleasePolicy};
use crate::migrate::switch_map::RegionClasses;
use std::time::Duration;

pub(crate) fn control(data: &[u8]) {
    let Some((mode, bytes)) = data.split_first() else { return };
    match mode % 4 {
        0 => {
            if let Ok(message) = decode::<ToDestination>(bytes) {
                says_the_same_again(&message, bytes.len());
                assert_eq!(decode::<ToDestination>(&encode(&message)).expect("our own"), message);
                match message {
                    ToDestination::Switch { map, .. } => {
                        map.iter().for_each(|classes| covers(classes, bytes.len() as u64));
                    }
                    ToDestination::Failed { reason, .. } => is_fit_to_print(&reason),
                    _ => {}
                }
            }
        }
        1 => {
            if let Ok(message) = decode::<ToSource>(bytes) {
                says_the_same_again(&message, bytes.len());
                assert_eq!(decode::<ToSource>(&encode(&message)).expect("our own"), message);
                if let ToSource::Failed { reason, .. } = message {
                    is_fit_to_print(&reason);
                }
            }
        }
        2 => {
            if let Ok(proposal) = decode::<Proposal>(bytes) {
                says_the_same_again(&proposal, bytes.len() + 64);
                accepted(&proposal);
            }
        }
        _ => {
            if let Ok((frames, classes)) = decode::<(u64, RegionClasses)>(bytes) {
                covers(&classes, frames);
            }
        }
    }
}

/// What the operator is shown of a peer's words is short and moves no cursor.
fn is_fit_to_print(reason: &str) {
    assert!(reason.len() <= MAX_REASON_BYTES && !reason.chars().any(char::is_control), "{reason:?}");
}

/// A map that is taken covers its region, every frame once.
fn covers(classes: &RegionClasses, frames: u64) {
    if let Ok(runs) = classes.decode(frames) {
        assert_eq!(runs.iter().map(|(_, count)| count).sum::<u64>(), frames);
        assert!(runs.len() == classes.runs.len() && runs.iter().all(|(_, count)| *count > 0));
    }
}

/// A proposal that is taken asks for a bounded number of threads and bounded waits.
fn accepted(proposal: &Proposal) {
    if proposal.check().is_err() {
        return;
    }
    let day = Duration::from_secs(24 * 3600);
    assert!((1..=64).contains(&proposal.shards));
    if let Some(tether) = &proposal.tether {
        assert!(tether.lease.silence_bound() <= 3 * day && tether.lease.heartbeat * 5 <= tether.lease.length);
        assert!(tether.policy.longest_epoch() <= day && !tether.policy.longest_epoch().is_zero());
        assert!(!matches!(proposal.release, ReleasePolicy::After(kept) if kept > day * 365));
    }
}

/// Inputs of our own encoders, for the corpus.
#[cfg(test)]
pub(crate) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    use crate::migrate::golden::{proposal, to_destination, to_source};
    let of = |mode: u8, bytes: Vec<u8>| [vec![mode], bytes].concat();
    let classes = RegionClasses { id: belay_transport::RegionId(0), runs: vec![(2, 1), (1, 300), (2, 6)] };
    let mut seeds = vec![("proposal", of(2, encode(&proposal()))), ("map", of(3, encode(&(307u64, classes))))];
    // Both directions have a message of this name.
    let to_source_only = |name: &'static str| if name == "failed" { "failed-to-source" } else { name };
    seeds.extend(to_destination().into_iter().map(|(name, message)| (name, of(0, encode(&message)))));
    seeds.extend(to_source().into_iter().map(|(name, message)| (to_source_only(name), of(1, encode(&message)))));
    seeds
}
