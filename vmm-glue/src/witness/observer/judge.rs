//! What is wrong with what an observer saw, as the world would judge it.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

/// One arrival at the observer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// When, in microseconds since the observer began.
    pub at_us: u64,
    /// The sender's label: which host and which incarnation.
    pub sender: Arc<str>,
    pub sequence: u64,
    pub bytes: Vec<u8>,
}

/// What is wrong with what was seen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "kebab-case")]
pub enum OutputFault {
    #[error("packets {first} to {last} never arrived though later ones did")]
    Gap { first: u64, last: u64 },
    #[error("{second} sent packet {sequence} with other bytes than {first} had")]
    Contradiction { sequence: u64, first: Arc<str>, second: Arc<str> },
    #[error("{sender} showed packet {sequence} when the next new one was {expected}")]
    OutOfOrder { sequence: u64, expected: u64, sender: Arc<str> },
    #[error("the observer was full after {arrivals} arrivals and turned senders away")]
    Full { arrivals: usize },
}

/// A sender's part in what was seen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SenderSummary {
    pub sender: Arc<str>,
    /// Packets it was the first to show: how many, the first, the last.
    pub new: u64,
    pub first_new: Option<u64>,
    pub last_new: Option<u64>,
    /// Packets that somebody (perhaps itself) had shown before.
    pub repeats: u64,
}

/// The observer's judgement.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// Different packets, arrivals, and arrivals of packets seen before.
    pub packets: u64,
    pub arrivals: u64,
    pub repeats: u64,
    /// In the order in which they first sent anything.
    pub senders: Vec<SenderSummary>,
    /// Longest time between two new packets, and the packet that ended it.
    pub largest_silence_us: u64,
    pub silence_ended_by: Option<u64>,
    pub faults: Vec<OutputFault>,
}

impl Verdict {
    /// Whether the output could be that of one machine that never failed.
    pub fn is_good(&self) -> bool {
        self.faults.is_empty()
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { packets, repeats, largest_silence_us, .. } = self;
        let s = |count: u64| if count == 1 { "" } else { "s" };
        let (of_packets, of_repeats) = (s(*packets), s(*repeats));
        write!(f, "{packets} packet{of_packets}, {repeats} repeat{of_repeats}, ")?;
        write!(f, "longest silence {} ms", largest_silence_us / 1000)?;
        self.faults.iter().try_for_each(|fault| write!(f, "; {fault}"))
    }
}

/// Judges arrivals in their order. At most 100 faults are listed.
pub fn judge(seen: &[Seen]) -> Verdict {
    const MAX_FAULTS: usize = 100;
    let mut first: BTreeMap<u64, &Seen> = BTreeMap::new();
    let mut senders: Vec<SenderSummary> = Vec::new();
    let (mut faults, mut repeats, mut expected) = (Vec::new(), 0, 0);
    let (mut last_new_us, mut largest_silence_us, mut silence_ended_by) = (None, 0, None);
    for arrival in seen {
        let index = senders.iter().position(|summary| summary.sender == arrival.sender).unwrap_or_else(|| {
            let sender = arrival.sender.clone();
            senders.push(SenderSummary { sender, new: 0, first_new: None, last_new: None, repeats: 0 });
            senders.len() - 1
        });
        let sender = &mut senders[index];
        let Seen { sequence, at_us, .. } = *arrival;
        if let Some(before) = first.get(&sequence) {
            repeats += 1;
            sender.repeats += 1;
            if before.bytes != arrival.bytes {
                let (first, second) = (before.sender.clone(), arrival.sender.clone());
                faults.push(OutputFault::Contradiction { sequence, first, second });
            }
            continue;
        }
        if sequence != expected {
            faults.push(OutputFault::OutOfOrder { sequence, expected, sender: arrival.sender.clone() });
        }
        expected = expected.max(sequence.saturating_add(1));
        first.insert(sequence, arrival);
        sender.new += 1;
        sender.first_new.get_or_insert(sequence);
        sender.last_new = Some(sequence);
        let silence_us = last_new_us.map_or(0, |last| at_us.saturating_sub(last));
        last_new_us = Some(at_us);
        if silence_us > largest_silence_us {
            (largest_silence_us, silence_ended_by) = (silence_us, Some(sequence));
        }
    }
    let mut next = 0;
    for &sequence in first.keys() {
        if sequence > next {
            faults.push(OutputFault::Gap { first: next, last: sequence - 1 });
        }
        next = sequence.saturating_add(1);
    }
    faults.truncate(MAX_FAULTS);
    let (packets, arrivals) = (first.len() as u64, seen.len() as u64);
    Verdict { packets, arrivals, repeats, senders, largest_silence_us, silence_ended_by, faults }
}

/// Each packet once, in the order of their numbers, as a model wants them.
pub fn distinct(seen: &[Seen]) -> impl Iterator<Item = (u64, &[u8])> {
    let mut first: BTreeMap<u64, &[u8]> = BTreeMap::new();
    for arrival in seen {
        first.entry(arrival.sequence).or_insert(&arrival.bytes);
    }
    first.into_iter()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn seen(arrivals: &[(&str, u64, u8)]) -> Vec<Seen> {
        let arrival = |(at_us, &(sender, sequence, byte)): (u64, &(&str, u64, u8))| Seen {
            at_us: at_us * 10,
            sender: sender.into(),
            sequence,
            bytes: vec![byte],
        };
        (0..).zip(arrivals).map(arrival).collect()
    }

    #[test]
    fn repeats_of_the_same_bytes_are_allowed_and_counted() {
        let verdict = judge(&seen(&[("a", 0, 1), ("a", 1, 2), ("b", 0, 1), ("b", 1, 2), ("b", 2, 3)]));
        assert!(verdict.is_good(), "{verdict}");
        assert_eq!((verdict.packets, verdict.arrivals, verdict.repeats), (3, 5, 2));
        let b = &verdict.senders[1];
        assert_eq!((b.new, b.first_new, b.last_new, b.repeats), (1, Some(2), Some(2), 2));
        assert_eq!((verdict.largest_silence_us, verdict.silence_ended_by), (30, Some(2)));
    }

    #[test]
    fn a_gap_is_found_with_its_ends() {
        let verdict = judge(&seen(&[("a", 0, 1), ("a", 3, 2)]));
        let sender: Arc<str> = "a".into();
        let expected =
            [OutputFault::OutOfOrder { sequence: 3, expected: 1, sender }, OutputFault::Gap { first: 1, last: 2 }];
        assert_eq!(verdict.faults, expected);
    }

    #[test]
    fn a_gap_that_is_filled_late_is_still_out_of_order() {
        let verdict = judge(&seen(&[("a", 0, 1), ("a", 2, 2), ("b", 1, 9)]));
        assert!(
            verdict.faults.iter().all(|fault| matches!(fault, OutputFault::OutOfOrder { .. })) && !verdict.is_good()
        );
    }

    #[test]
    fn a_repeat_with_other_bytes_is_a_contradiction() {
        let verdict = judge(&seen(&[("destination", 0, 1), ("source", 0, 2)]));
        let (first, second): (Arc<str>, Arc<str>) = ("destination".into(), "source".into());
        assert_eq!(verdict.faults, [OutputFault::Contradiction { sequence: 0, first, second }]);
    }

    proptest! {
        #[test]
        fn whatever_is_repeated_in_order_is_good_and_whatever_is_left_out_is_not(
            count in 2u64..40, catches in prop::collection::vec((0u64..40, 0u64..40), 0..6), drop in 0u64..40,
        ) {
            // The guest moves on and is caught back again and again: each owner repeats a tail of what was shown, then goes on.
            let (mut arrivals, mut shown) = (Vec::new(), 0);
            for (owner, (forward, back)) in catches.into_iter().chain([(count, 0)]).enumerate() {
                let sender: Arc<str> = owner.to_string().into();
                let (from, to) = (shown - back.min(shown), (shown + forward).min(count));
                for sequence in from..to {
                    arrivals.push(Seen { at_us: 0, sender: sender.clone(), sequence, bytes: vec![sequence as u8] });
                }
                shown = shown.max(to);
            }
            let verdict = judge(&arrivals);
            prop_assert!(verdict.is_good() && verdict.packets == count, "{}", verdict);
            let hole = drop % (count - 1);
            arrivals.retain(|arrival| arrival.sequence != hole);
            prop_assert!(!judge(&arrivals).is_good());
        }
    }
}
