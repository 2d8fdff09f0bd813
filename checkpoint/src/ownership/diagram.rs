//! The diagrams at the head of `ownership.rs` are the code's: every edge of one is an edge of the other.

use super::{Fate, OwnerEpoch, destination, source};
use crate::outbox::OutputMode;
use std::collections::BTreeSet;

const TEXT: &str = include_str!("../ownership.rs");

type Edges = BTreeSet<(String, String, String)>;

/// Edges (from, to, event) of the diagram under the heading `# role`.
fn drawn(role: &str) -> Edges {
    let heading = format!("//! # {role}");
    let lines =
        TEXT.lines().skip_while(|line| **line != *heading).skip(1).take_while(|line| !line.starts_with("//! # "));
    let mut edges = Edges::new();
    for line in lines {
        let Some((from, rest)) = line.trim_start_matches("//!").trim().split_once(" --> ") else { continue };
        let Some((to, events)) = rest.split_once(" : ") else { continue };
        for event in events.split(", ") {
            assert!(edges.insert((from.into(), to.into(), event.into())), "drawn twice: {line} {event}");
        }
    }
    assert!(!edges.is_empty(), "no diagram for {role}");
    edges
}

fn bools() -> impl Iterator<Item = bool> + Clone {
    [false, true].into_iter()
}

/// Every state that can be reached, through two migrations at most.
fn source_states() -> Vec<source::State> {
    let mut all = vec![source::State::new()];
    let mut at = 0;
    while let Some(state) = all.get(at).copied() {
        for event in source_events() {
            if let Ok((next, _)) = source::step(&state, &event)
                && next.owner_epoch() <= OwnerEpoch(2)
                && !all.contains(&next)
            {
                all.push(next);
            }
        }
        // A death in any of them, and a process that takes over.
        let (again, _) = source::restart(&state);
        if again.owner_epoch() <= OwnerEpoch(2) && !all.contains(&again) {
            all.push(again);
        }
        at += 1;
    }
    all
}

fn source_events() -> Vec<source::Event> {
    use source::Event::*;
    let mut all = vec![
        SwitchStarted { mode: OutputMode::Commit },
        SwitchStarted { mode: OutputMode::Lease },
        StateSent,
        DestinationResumed,
        SwitchFailed,
        Cancelled,
        DeathSign,
        ConnectionClosed,
        LeaseRanOut,
        OperatorCatch,
        DeathProven,
        Revoked,
        Folded,
        GuestResumed,
        ReleaseRecorded,
        ReleaseFailed,
        GraceRanOut,
        ArbiterGranted,
        ArbiterRefused,
        ArbiterAway,
        CatchByForce,
    ];
    all.extend(bools().map(|can_retry| CatchFailed { can_retry }));
    all.extend(bools().map(|all_landed| ReleaseAsked { all_landed }));
    all.extend((0..4).map(|epoch| FateAsked { owner_epoch: OwnerEpoch(epoch) }));
    all
}

/// Every state that can be reached.
fn destination_states() -> Vec<destination::State> {
    let mut all = vec![destination::State::new()];
    let mut at = 0;
    while let Some(state) = all.get(at).copied() {
        for event in destination_events() {
            if let Ok((next, _)) = destination::step(&state, &event)
                && !all.contains(&next)
            {
                all.push(next);
            }
        }
        at += 1;
    }
    all
}

fn destination_events() -> Vec<destination::Event> {
    use destination::Event::*;
    vec![
        HandedOver { owner_epoch: OwnerEpoch(3) },
        GuestResumed,
        PrepareFailed,
        Cancelled,
        ConnectionClosed,
        AllLanded,
        ReleaseWanted,
        ReleaseAcknowledged,
        ReleaseRefused,
        LeaseExpired,
        CommitFailed,
        SourceRevoked,
        GuestStopped,
        StopTimedOut,
        GuestDied,
        FateAnswered(Fate::StillTethered),
        FateAnswered(Fate::Revoked),
        FateAnswered(Fate::Released),
        SourceDead,
        Promoted,
        PromotedByForce,
        ContinueWanted,
        ArbiterGranted,
        ArbiterRefused,
        ArbiterAway { untouched: false },
        ArbiterAway { untouched: true },
    ]
}

fn source_edges() -> Edges {
    let mut edges = Edges::new();
    for state in source_states() {
        for event in source_events() {
            if let Ok((next, _)) = source::step(&state, &event)
                && next.name() != state.name()
            {
                edges.insert((state.name().into(), next.name().into(), event.name().into()));
            }
        }
    }
    edges
}

fn destination_edges() -> Edges {
    let mut edges = Edges::new();
    for state in destination_states() {
        for event in destination_events() {
            if let Ok((next, _)) = destination::step(&state, &event)
                && next.name() != state.name()
            {
                edges.insert((state.name().into(), next.name().into(), event.name().into()));
            }
        }
    }
    edges
}

#[test]
fn the_diagrams_edges_are_the_codes_edges() {
    for (role, coded) in [("Source", source_edges()), ("Destination", destination_edges())] {
        let drawn = drawn(role);
        let missing: Vec<_> = coded.difference(&drawn).collect();
        let invented: Vec<_> = drawn.difference(&coded).collect();
        assert!(missing.is_empty() && invented.is_empty(), "{role}: not drawn {missing:#?}, not coded {invented:#?}");
    }
}

#[test]
fn p6_after_a_recorded_release_nothing_resumes_the_guest_on_the_source() {
    use source::Action;
    let released: Vec<_> = source_states().into_iter().filter(|state| state.name() == "Released").collect();
    for state in released {
        for event in source_events() {
            let Ok((next, actions)) = source::step(&state, &event) else { continue };
            assert_eq!(next, state, "{event:?} leads out of Released");
            let harmless = |action: &Action| {
                matches!(
                    action,
                    Action::AcknowledgeRelease | Action::AnswerFate(Fate::Released | Fate::Revoked) | Action::Report(_)
                )
            };
            assert!(actions.iter().all(harmless), "{event:?} makes {actions:?}");
        }
    }
}

#[test]
fn p6_no_fate_is_told_while_a_release_is_being_written() {
    use source::{Action, Event, State};
    for state in source_states() {
        let State::Serving(now) = state else { continue };
        let event = Event::FateAsked { owner_epoch: now.owner_epoch };
        let (next, actions) = source::step(&state, &event).expect("legal");
        if now.recording_release {
            assert_eq!((next, actions), (state, vec![]), "whichever answer it were, the record may make it a lie");
        } else {
            assert!(actions.iter().any(|action| matches!(action, Action::AnswerFate(_))), "{state:?}");
        }
    }
}

#[test]
fn p2_silence_while_renewals_are_granted_is_not_yet_a_lease_that_has_run_out() {
    use source::{Action, Event, State};
    let mut state = State::new();
    let mut done = vec![];
    for event in [
        Event::SwitchStarted { mode: OutputMode::Lease },
        Event::StateSent,
        Event::DestinationResumed,
        Event::LeaseRanOut,
        Event::OperatorCatch,
        Event::LeaseRanOut,
    ] {
        let (next, actions) = source::step(&state, &event).expect("legal");
        let catches = actions.iter().any(|action| matches!(action, Action::Claim { .. }));
        assert_eq!(
            catches,
            done.len() == 5,
            "{event:?} in {state:?}: a renewal granted before the withdrawal must run out first"
        );
        state = next;
        done.push(event);
    }
}

#[test]
fn p6_a_release_asked_before_every_page_landed_is_refused() {
    for state in source_states() {
        let event = source::Event::ReleaseAsked { all_landed: false };
        let Ok((_, actions)) = source::step(&state, &event) else { continue };
        assert!(!actions.contains(&source::Action::RecordRelease), "{state:?} releases too early");
    }
    let too_early = destination::State::Tethered { owner_epoch: OwnerEpoch(3), all_landed: false };
    for event in [destination::Event::ReleaseWanted, destination::Event::Promoted] {
        let (next, actions) = destination::step(&too_early, &event).expect("legal");
        assert_eq!(next, too_early);
        assert!(!actions.contains(&destination::Action::AskRelease));
    }
    assert!(destination::step(&too_early, &destination::Event::ReleaseAcknowledged).is_err());
}

#[test]
fn p2_under_lease_nothing_is_caught_without_proof_or_the_operators_word_and_an_expired_lease() {
    use source::{Action, Event, Lease, State};
    for state in source_states() {
        let State::Serving(before) = state else { continue };
        for event in source_events() {
            let Ok((_, actions)) = source::step(&state, &event) else { continue };
            if before.mode == OutputMode::Lease && actions.iter().any(|action| matches!(action, Action::Claim { .. })) {
                let proven = before.death_proven || event == Event::DeathProven;
                let ordered = before.catch_ordered || event == Event::OperatorCatch;
                let ran_out =
                    before.lease == Lease::RanOut || (before.lease == Lease::Withdrawn && event == Event::LeaseRanOut);
                assert!(proven || (ordered && ran_out), "{before:?} caught on {event:?}");
            }
        }
    }
}

#[test]
fn p2_a_source_that_takes_over_catches_under_lease_only_as_one_that_lived_would() {
    use source::{Action, Event, Resuming, State};
    for state in source_states() {
        let State::Resuming(Resuming { mode, lease_ran_out, .. }) = state else { continue };
        for event in source_events() {
            let Ok((_, actions)) = source::step(&state, &event) else { continue };
            if actions.iter().any(|action| matches!(action, Action::Claim { .. })) {
                let allowed = match mode {
                    OutputMode::Commit => {
                        matches!(event, Event::GraceRanOut | Event::OperatorCatch | Event::DeathProven)
                    }
                    OutputMode::Lease => {
                        event == Event::DeathProven || (event == Event::OperatorCatch && lease_ran_out)
                    }
                };
                assert!(allowed, "{state:?} caught on {event:?}");
            }
        }
    }
}

#[test]
fn p2_a_death_forgets_no_revocation_and_no_release() {
    use source::{Action, CatchStep, State};
    for state in source_states() {
        let (again, actions) = source::restart(&state);
        let resumes = actions.contains(&Action::ResumeGuest) || actions.contains(&Action::FoldAndLoad);
        assert!(!resumes, "{state:?} resumes without revoking");
        match state {
            State::Released { .. } | State::Running { .. } | State::Lost { .. } | State::Ceded { .. } => {
                assert_eq!(again, state);
            }
            State::Revoking { owner_epoch, step: CatchStep::Claim, .. } => {
                assert!(actions.contains(&Action::Claim { owner_epoch }), "{state:?} is not claimed again");
            }
            State::Revoking { owner_epoch, .. } => {
                assert!(actions.contains(&Action::Revoke { owner_epoch }), "{state:?} is not revoked again");
            }
            State::Serving(now) if now.catch_ordered => match again {
                State::Serving(again) => assert!(again.catch_ordered && again.lease == source::Lease::Withdrawn),
                other => assert_eq!(other.name(), "Revoking"),
            },
            State::Switching { .. } | State::Serving(_) | State::Resuming(_) => {
                assert!(matches!(again, State::Resuming(_) | State::Revoking { .. }), "{state:?} goes to {again:?}");
            }
        }
    }
}

#[test]
fn p2_a_lease_is_never_taken_for_run_out_while_renewals_are_granted() {
    use source::{Action, Lease, State};
    for state in source_states() {
        let State::Serving(before) = state else { continue };
        for event in source_events() {
            let Ok((State::Serving(after), actions)) = source::step(&state, &event) else { continue };
            let (was, is) = (before.lease == Lease::Granted, after.lease == Lease::Granted);
            assert_eq!(was && !is, actions.contains(&Action::WithdrawLease), "{before:?} {event:?}");
            assert!(was || !is || actions.contains(&Action::GrantLease), "{before:?} {event:?}");
        }
    }
}

#[test]
fn p5_folding_waits_for_revocation_and_resuming_for_folding() {
    use source::{Action, CatchStep, Event, State};
    for state in source_states() {
        for event in source_events() {
            let Ok((_, actions)) = source::step(&state, &event) else { continue };
            let at = |wanted| matches!(state, State::Revoking { step, .. } if step == wanted);
            if actions.contains(&Action::FoldAndLoad) {
                let retried = at(CatchStep::Fold) && event == Event::OperatorCatch;
                assert!((at(CatchStep::Revoke) && event == Event::Revoked) || retried, "{state:?} {event:?}");
            }
            if actions.contains(&Action::ResumeGuest) {
                let after_fold = at(CatchStep::Fold) && event == Event::Folded;
                let retried = at(CatchStep::Resume) && event == Event::OperatorCatch;
                let never_left = matches!(state, State::Switching { handed_over: false, .. });
                assert!(after_fold || retried || never_left, "{state:?} {event:?}");
            }
        }
    }
}

#[test]
fn p2_nothing_is_revoked_before_the_claim_is_granted_and_nothing_said_of_the_guest_while_it_is_not() {
    use source::{Action, CatchStep, Event, State};
    for state in source_states() {
        let claims = matches!(state, State::Revoking { step: CatchStep::Claim, .. });
        for event in source_events() {
            let Ok((next, actions)) = source::step(&state, &event) else { continue };
            let revokes = actions.iter().any(|action| matches!(action, Action::Revoke { .. }));
            let again = matches!(state, State::Revoking { step: CatchStep::Revoke, stuck: true, .. });
            let granted = claims && matches!(event, Event::ArbiterGranted | Event::CatchByForce);
            assert!(!revokes || granted || (again && event == Event::OperatorCatch), "{state:?} {event:?}");
            // One epoch before the catch's own is the destination's that was lost.
            let of_now = matches!(event, Event::FateAsked { owner_epoch } if owner_epoch.next() == state.owner_epoch());
            if claims && of_now {
                assert_eq!((next, actions), (state, vec![]), "whichever answer it were, the arbiter may make it a lie");
            }
        }
    }
}

#[test]
fn p2_a_destination_that_may_have_been_granted_the_guest_is_tethered_no_more_and_runs_it_only_once_it_is_told() {
    use destination::{Action, Event, State};
    for state in destination_states() {
        let State::Fenced(now) = state else { continue };
        for event in destination_events() {
            let Ok((next, _)) = destination::step(&state, &event) else { continue };
            if now.claiming {
                assert_ne!(next.name(), "Tethered", "{event:?} in {now:?}");
            }
            let told = matches!(event, Event::ArbiterGranted if now.claiming)
                || matches!(event, Event::PromotedByForce | Event::ReleaseAcknowledged)
                || event == Event::FateAnswered(Fate::Released);
            assert!(next.name() != "Owner" || (told && now.all_landed), "{event:?} in {now:?}");
        }
        let (_, actions) = destination::step(&state, &Event::ContinueWanted).expect("legal");
        let asks = actions.iter().any(|action| matches!(action, Action::Claim { .. }));
        let may = now.all_landed && !now.claiming && !now.refused && !now.revoked && !now.guest_dead;
        assert_eq!(asks, may, "{now:?}");
    }
}

#[test]
fn p9_every_way_out_of_the_good_course_is_reported() {
    for state in destination_states() {
        for event in destination_events() {
            let Ok((next, actions)) = destination::step(&state, &event) else { continue };
            if next.name() != state.name() && next.name() != "Tethered" {
                let told = actions.iter().any(|action| matches!(action, destination::Action::Report(_)));
                assert!(told, "{state:?} {event:?} goes to {} and nobody is told", next.name());
            }
        }
    }
    for state in source_states() {
        for event in source_events() {
            let Ok((next, actions)) = source::step(&state, &event) else { continue };
            if matches!(next.name(), "Revoking" | "Released" | "Lost" | "Ceded") && next.name() != state.name() {
                let told = actions.iter().any(|action| matches!(action, source::Action::Report(_)));
                assert!(told, "{state:?} {event:?} goes to {} and nobody is told", next.name());
            }
        }
    }
}
