//! The promises, the bounds, and the runs.

use super::quiet::{ROUNDS, home};
use super::world::{Broken, Gate, Record, World};
use super::{Bounds, Ownership};
use crate::mutation::Mutation;
use crate::outbox::OutputMode;
use crate::ownership::{destination, source};
use stateright::{Checker, HasDiscoveries, Model, Property};
use std::time::Instant;

/// What CI checks.
fn bounds(mode: OutputMode) -> Bounds {
    let wide = std::env::var_os("BELAY_MODEL").is_some_and(|value| value == "wide");
    let (few, lease) = if wide { (2, 2) } else { (1, 1) };
    let catch_failures = match mode {
        OutputMode::Commit => few,
        // Nothing about a catch that has begun depends on the lease, which multiplies the states as it is.
        OutputMode::Lease => few - 1,
    };
    Bounds { outputs: few, source_deaths: few, destination_deaths: few, catch_failures, lease, margin: 1 }
}

fn at_home(world: &World) -> bool {
    world.source.up && world.source.runs
}

/// P2: whether the destination can show something that the source does not send again.
fn destination_shows_new(model: &Ownership, world: &World) -> bool {
    let there = &world.destination;
    match (model.mode, there.gate) {
        _ if !there.up => false,
        (_, Gate::ForGood) => true,
        (_, Gate::Shut) => false,
        (OutputMode::Commit, Gate::Ruled) => world.can_commit(),
        (OutputMode::Lease, Gate::Ruled) => there.lease > 0,
    }
}

pub fn properties() -> Vec<Property<Ownership>> {
    type Case = fn(&Ownership, &World) -> bool;
    let always: [(&'static str, Case); 12] = [
        ("P2 never two hosts whose output can be seen", |model, world| {
            !(at_home(world) && destination_shows_new(model, world))
        }),
        ("P2 whoever has the guest for good has it from the arbiter", |_, world| {
            let (here, there) = (&world.source, &world.destination);
            let (Some(record), true) = (world.record, here.up) else { return true };
            // By force, where there is no destination any more: nothing of what it had asked for can come to anything.
            let caught = here.runs && here.recovered.is_some() && (there.up || there.vmm);
            let alone = there.up && there.gate == Gate::ForGood;
            (!caught || record == Record::Source) && (!alone || here.released || record == Record::Destination)
        }),
        ("P3 a tethered destination can be caught", |_, world| {
            !matches!(world.destination.state, destination::State::Tethered { .. }) || !world.destination_may_own()
        }),
        ("P2 a destination is told no fate that is not so", |_, world| {
            world.broken != Some(Broken::P2ToldAFateThatIsNot)
        }),
        ("P3 no committed checkpoint is lost", |_, world| {
            let (here, there) = (&world.source, &world.destination);
            !(here.runs && here.recovered.is_some_and(|recovered| recovered < there.acked.max(here.placed)))
        }),
        ("P4 no uncommitted output", |model, world| {
            let held = model.mode == OutputMode::Commit && world.destination.gate == Gate::Ruled;
            !held || world.destination.shown <= world.source.placed
        }),
        ("P4 no contradiction after a catch", |model, world| {
            let (here, shown) = (&world.source, world.destination.shown);
            let caught = here.recovered.filter(|_| here.runs);
            model.mode == OutputMode::Lease || caught.is_none_or(|recovered| shown <= recovered)
        }),
        ("P4 no gap after a catch", |_, world| {
            let here = &world.source;
            !here.shown_new || here.resent || here.recovered.is_some_and(|all| all <= world.destination.shown)
        }),
        ("P5 nothing is folded while it can be written", |_, world| {
            world.broken != Some(Broken::P5FoldedBeforeRevoked)
        }),
        ("P6 only a recorded release ends a migration", |_, world| {
            let (here, there) = (&world.source, &world.destination);
            let owner = matches!(there.state, destination::State::Owner) && there.up;
            world.broken != Some(Broken::P6AcknowledgedTooEarly)
                && !(here.runs && here.released)
                && (!matches!(here.state, source::State::Released { .. }) || here.released)
                && (!owner
                    || (there.all_landed && (here.released || !here.up || world.record == Some(Record::Destination))))
        }),
        ("every answer of an action has a meaning", |_, world| world.broken != Some(Broken::AnswerWithoutMeaning)),
        ("once all is quiet the guest comes home, or is lost for a reason", |model, world| {
            // Whoever still has something to do comes to a state without by doing it.
            let busy = !world.source.todo.is_empty() || !world.destination.todo.is_empty();
            busy || [false, true].into_iter().all(|lost| home(model, world, lost).is_ok())
        }),
    ];
    let sometimes: [(&'static str, Case); 12] = [
        ("the guest was caught", |_, world| world.source.runs && world.source.recovered.is_some()),
        ("what had committed was sent again", |_, world| world.source.resent && world.source.placed > 0),
        ("the guest was released", |_, world| world.source.released && world.destination.gate == Gate::ForGood),
        ("the guest was promoted", |_, world| !world.source.released && world.destination.gate == Gate::ForGood),
        ("a fenced destination is tethered again", |_, world| {
            world.destination.deaths_left == 0 && matches!(world.destination.state, destination::State::Tethered { .. })
        }),
        ("a catch is stuck", |model, world| {
            model.bounds.catch_failures == 0
                || matches!(world.source.state, source::State::Revoking { stuck: true, .. })
        }),
        ("the destination retired", |_, world| matches!(world.destination.state, destination::State::Retired)),
        ("the destination aborted", |_, world| matches!(world.destination.state, destination::State::Aborted)),
        ("the source has ceded the guest", |model, world| {
            !model.arbiter || matches!(world.source.state, source::State::Ceded { .. })
        }),
        ("the destination was refused and is fenced", |model, world| {
            !model.arbiter || matches!(world.destination.state, destination::State::Fenced(now) if now.refused)
        }),
        ("the destination goes on alone while the source lives", |model, world| {
            let there = &world.destination;
            !model.arbiter || (world.source.up && !world.source.released && there.gate == Gate::ForGood && there.runs)
        }),
        ("the guest is lost", |_, world| matches!(world.destination.state, destination::State::Lost)),
    ];
    let always = always.map(|(name, case)| Property::always(name, case));
    let sometimes = sometimes.map(|(name, case)| Property::sometimes(name, case));
    always.into_iter().chain(sometimes).collect()
}

/// What an arbiter multiplies the states by is made up for where it changes nothing: a catch's later steps.
fn arbiters_bounds(mode: OutputMode) -> Bounds {
    Bounds { catch_failures: 0, ..bounds(mode) }
}

/// Goes through every history within the bounds.
fn check(mode: OutputMode, arbiter: bool) {
    let bounds = if arbiter { arbiters_bounds(mode) } else { bounds(mode) };
    let model = Ownership { mode, arbiter, bounds, mutation: None };
    crate::testing::give_way();
    let began = Instant::now();
    let checked = model.checker().spawn_bfs().join();
    println!(
        "ownership under {mode}{}: {} unique states, {} in all, depth {}, {:.1} s; every end is quiet within {ROUNDS} rounds; {:?}",
        if arbiter { " with an arbiter" } else { "" },
        checked.unique_state_count(),
        checked.state_count(),
        checked.max_depth(),
        began.elapsed().as_secs_f64(),
        model.bounds
    );
    for (name, path) in checked.discoveries() {
        let property = model.property(name);
        if property.expectation != stateright::Expectation::Sometimes {
            let last = path.last_state().clone();
            let ends = [false, true].map(|lost| home(&model, &last, lost));
            panic!("{name}: after {:#?} the world is {last:#?}; {ends:?}", path.into_actions());
        }
    }
    checked.assert_properties();
    assert!(checked.is_done());
}

#[test]
fn every_history_under_output_commit_keeps_the_promises() {
    check(OutputMode::Commit, false);
}

#[test]
fn every_history_under_output_lease_keeps_the_promises() {
    check(OutputMode::Lease, false);
}

#[test]
fn every_history_with_an_arbiter_under_output_commit_keeps_the_promises() {
    check(OutputMode::Commit, true);
}

#[test]
fn every_history_with_an_arbiter_under_output_lease_keeps_the_promises() {
    check(OutputMode::Lease, true);
}

/// Goes through histories with `mutation` until one breaks `promise`.
fn breaks(mutation: Mutation, mode: OutputMode, promise: &'static str) {
    let arbiter = matches!(mutation, Mutation::ContinuesUnasked | Mutation::RefusalIgnored);
    let model = Ownership { mode, arbiter, bounds: bounds(mode), mutation: Some(mutation) };
    let found = HasDiscoveries::AnyOf([promise].into());
    let checked = model.checker().finish_when(found).spawn_bfs().join();
    println!("{mutation:?} under {mode}: {} unique states until it was noticed", checked.unique_state_count());
    assert!(checked.discovery(promise).is_some(), "{mutation:?} is not noticed: {promise}");
}

#[test]
fn p5_a_catch_before_the_revocation_is_noticed() {
    breaks(Mutation::CatchBeforeRevoke, OutputMode::Commit, "P5 nothing is folded while it can be written");
    breaks(Mutation::CatchBeforeRevoke, OutputMode::Commit, "P3 no committed checkpoint is lost");
}

#[test]
fn p2_an_owner_epoch_that_is_over_and_is_accepted_is_noticed() {
    breaks(Mutation::StaleOwnerEpoch, OutputMode::Commit, "P2 a destination is told no fate that is not so");
}

#[test]
fn p6_a_closed_connection_that_is_taken_for_a_release_is_noticed() {
    breaks(Mutation::EofIsRelease, OutputMode::Commit, "P6 only a recorded release ends a migration");
    breaks(Mutation::EofIsRelease, OutputMode::Commit, "P2 never two hosts whose output can be seen");
}

#[test]
fn p2_a_lease_that_is_not_waited_for_is_noticed() {
    breaks(Mutation::LeaseIgnored, OutputMode::Lease, "P2 never two hosts whose output can be seen");
}

#[test]
fn p4_output_that_is_not_sent_again_is_noticed() {
    breaks(Mutation::OutboxLost, OutputMode::Commit, "P4 no gap after a catch");
}

#[test]
fn p2_a_destination_that_goes_on_without_the_arbiter_is_noticed() {
    breaks(Mutation::ContinuesUnasked, OutputMode::Commit, "P2 never two hosts whose output can be seen");
}

#[test]
fn p2_a_source_that_resumes_what_the_arbiter_gave_away_is_noticed() {
    breaks(Mutation::RefusalIgnored, OutputMode::Commit, "P2 never two hosts whose output can be seen");
}
