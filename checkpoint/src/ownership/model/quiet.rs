//! From here on no more faults: messages come, time passes, whoever is asked answers, and the operator does what the named states ask for.
//! Whether the guest then comes home, and what stands in its way if it does not.

use super::moves::{hear_at_destination, hear_at_source};
use super::world::{DESTINATION_CLAIMS, FATE_ASKED, Gate, Messages, Record, SOURCE_CLAIMS, World};
use super::{Move, Ownership};
use crate::outbox::OutputMode;
use crate::ownership::{destination, source};

/// Rounds until all must be at rest. A catch under `lease` that sticks takes the most.
pub const ROUNDS: u32 = 12;

/// Where the guest is when all is quiet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Home {
    Source,
    Destination,
    /// Neither host can run it, for a reason that is one.
    Lost,
}

/// The quiet end of `world`, with what was on its way at its beginning `lost` or not; `Err` says what keeps the guest from home.
pub fn home(model: &Ownership, world: &World, lost: bool) -> Result<Home, String> {
    let mut world = world.clone();
    if lost {
        (world.to_source, world.to_destination) = (Messages::default(), Messages::default());
        world.to_arbiter = Messages::default();
    }
    for _ in 0..ROUNDS {
        let before = world.clone();
        work(model, &mut world);
        deliver(&mut world);
        work(model, &mut world);
        notice(model, &mut world);
        work(model, &mut world);
        if world == before {
            return at_rest(&world);
        }
    }
    Err(format!("no rest in {ROUNDS} rounds: {:?}, {:?}", world.source, world.destination))
}

/// Both roles carry out what they have before them.
fn work(model: &Ownership, world: &mut World) {
    while world.source.up && !world.source.todo.is_empty() {
        world.source_acts(model, false);
    }
    while world.destination.up && !world.destination.todo.is_empty() {
        world.destination_acts(false);
    }
}

/// Everything on its way comes, once.
fn deliver(world: &mut World) {
    std::mem::take(&mut world.to_arbiter).each().for_each(|claim| world.arbiter_hears(claim));
    let (to_source, to_destination) = (std::mem::take(&mut world.to_source), std::mem::take(&mut world.to_destination));
    if world.source.up {
        to_source.each().for_each(|at| hear_at_source(world, at));
    }
    if world.destination.up {
        to_destination.each().for_each(|at| hear_at_destination(world, at));
    }
}

/// What time, the closed connections and the operator bring.
fn notice(model: &Ownership, world: &mut World) {
    let (ticks, up) = (model.bounds.lease + model.bounds.margin, world.destination.up);
    if model.mode == OutputMode::Lease {
        let renewed = world.source.granting && up && world.destination.tether.is_some();
        for _ in 0..ticks {
            Move::TimePasses.make(model, world);
            if renewed {
                Move::Grants.make(model, world);
                Move::GrantIsRead.make(model, world);
            }
        }
    }
    if up {
        destination_notices(world);
    }
    if world.source.up {
        source_notices(model, world);
    }
}

fn destination_notices(world: &mut World) {
    use destination::{Event, State};
    if !world.destination.vmm && !matches!(world.destination.state, State::Fenced(now) if now.guest_dead) {
        world.at_destination(Event::GuestDied);
    }
    let serves = world.source.up && matches!(world.source.state.name(), "Serving");
    match world.destination.state {
        State::Preparing { .. } if world.source.state.name() != "Switching" || !world.source.up => {
            world.at_destination(Event::ConnectionClosed);
        }
        State::Tethered { .. } if !serves => {
            world.at_destination(Event::ConnectionClosed);
        }
        // `AwaitingArbiter`: it is asked again.
        State::Fenced(now) if now.claiming => world.to_arbiter.put(DESTINATION_CLAIMS),
        // The source seeks it, or listens; either way it asks.
        State::Fenced(_) if world.source.up => {
            world.to_source.put(FATE_ASKED);
            if world.record.is_some() {
                world.at_destination(Event::ContinueWanted);
            }
        }
        // `AwaitingPromotion`, `PagesMissing`, `TakenBack`: the operator looks after the source's host.
        State::Fenced(now) => {
            world.at_destination(Event::SourceDead);
            if world.source.ring_open.is_some() {
                world.at_destination(if now.refused { Event::PromotedByForce } else { Event::Promoted });
            }
        }
        _ => {}
    }
}

fn source_notices(model: &Ownership, world: &mut World) {
    use source::{Event, State};
    let there = &world.destination;
    let answers = there.up && matches!(there.state, destination::State::Tethered { .. });
    let asks = there.up && matches!(there.state, destination::State::Fenced(_));
    match world.source.state {
        State::Switching { .. } => {
            world.at_source(Event::SwitchFailed);
        }
        State::Serving(now) if !now.failed && !now.catch_ordered && !answers => {
            world.at_source(Event::ConnectionClosed);
        }
        // `AwaitingOperator`: the operator makes sure that the destination is off. While it asks it is on, and will be answered.
        State::Serving(now) if now.failed && !now.catch_ordered && !asks => {
            world.at_source(Event::OperatorCatch);
        }
        State::Resuming(_) if !asks => {
            world.at_source(Event::GraceRanOut);
        }
        // `AwaitingArbiter`.
        State::Revoking { step: source::CatchStep::Claim, .. } if world.record.is_some() => {
            world.to_arbiter.put(SOURCE_CLAIMS);
        }
        // `CannotRevoke`, `CatchStuck`.
        State::Revoking { stuck: true, .. } => {
            world.at_source(Event::OperatorCatch);
        }
        _ => {}
    }
    // `AwaitingLease` and the silence after a withdrawal.
    let waits = matches!(world.source.state, State::Serving(now) if now.catch_ordered || now.failed);
    if model.mode == OutputMode::Lease && waits && world.source.todo.is_empty() && world.source.wait == 0 {
        world.at_source(Event::LeaseRanOut);
    }
}

fn at_rest(world: &World) -> Result<Home, String> {
    let (here, there) = (&world.source, &world.destination);
    let at_source = here.up && here.runs;
    // One that would not stop stands behind a shut gate: it waits for a page, most likely.
    let at_destination = there.up && there.vmm && there.runs && there.gate != Gate::Shut;
    let wrong = |what: &str| Err(format!("{what}: {here:?}, {there:?}"));
    match (at_source, at_destination) {
        (true, true) => wrong("both run it"),
        (true, false) if here.state.name() == "Running" => Ok(Home::Source),
        (false, true) if matches!(there.state.name(), "Tethered" | "Owner") => Ok(Home::Destination),
        (true, false) | (false, true) => wrong("it runs where it has no home"),
        // It was the destination's for good, and died there.
        (false, false) if world.record == Some(Record::Destination) && (!there.vmm || !there.up) => Ok(Home::Lost),
        // A source that lives and has not let go has it all.
        (false, false) if here.up && !here.released => wrong("nobody runs it, and the source could"),
        // The source let go; the guest died after that with its VMM, or waits for a process to take it over.
        (false, false) if here.released && (!there.vmm || !there.up) => Ok(Home::Lost),
        // The source's host is gone.
        (false, false) if !here.up && (!there.vmm || !there.up || !there.all_landed) => Ok(Home::Lost),
        // It had taken the guest back, and ran it or would have, when it died: what is left there is not the guest's past.
        (false, false) if !here.up && here.ring_open.is_none() => Ok(Home::Lost),
        (false, false) => wrong("nobody runs it, and the destination could"),
    }
}
