//! What can happen next.

use super::world::{FIRST, Gate, Record, TO_DESTINATION, TO_SOURCE, World};
use super::{Ownership, world};
use crate::outbox::OutputMode;
use crate::ownership::{Fate, destination, source};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Move {
    SourceActs {
        fails: bool,
    },
    DestinationActs {
        fails: bool,
    },
    /// A message comes, by its bit; it can come again.
    SourceHears(u8),
    DestinationHears(u8),
    /// An event of the source's or destination's surroundings, or an order of the operator's.
    AtSource(source::Event),
    AtDestination(destination::Event),
    /// The guest makes an output at the destination.
    GuestGoesOn,
    /// The trailer of a record with everything so far is in the ring.
    Commits,
    /// The destination knows.
    CommitIsKnown,
    DestinationShows,
    /// The guest shows something at the source.
    SourceShows,
    /// A heartbeat just posted is seen, and its lease granted; what was granted last is lost if it was not read.
    Grants,
    GrantIsRead,
    TimePasses,
    VmmDies,
    DestinationDies,
    DestinationTakenOver,
    DestinationHostDies,
    SourceDies,
    SourceHostDies,
    /// A claim comes to the arbiter, by its bit; it can come again.
    ArbiterHears(u8),
}

impl Move {
    /// Everything that may happen in `world`; some of it changes nothing.
    pub fn all(model: &Ownership, world: &World, out: &mut Vec<Self>) {
        let (here, there) = (&world.source, &world.destination);
        let bounds = model.bounds;
        if here.up && !here.todo.is_empty() {
            out.push(Self::SourceActs { fails: false });
            if world.source_can_fail() {
                out.push(Self::SourceActs { fails: true });
            }
        }
        if there.up && !there.todo.is_empty() {
            out.push(Self::DestinationActs { fails: false });
            if world.destination_can_fail() {
                out.push(Self::DestinationActs { fails: true });
            }
        }
        if here.up && here.todo.is_empty() {
            source_hears(model, world, out);
        }
        if there.up && there.todo.is_empty() {
            destination_hears(world, out);
        }
        if there.runs && there.vmm && there.made < bounds.outputs {
            out.push(Self::GuestGoesOn);
        }
        if world.can_commit() && here.placed < there.made {
            out.push(Self::Commits);
        }
        if there.up && there.tether.is_some() && there.acked < here.placed {
            out.push(Self::CommitIsKnown);
        }
        if world.may_show(model.mode).is_some_and(|may| may > there.shown) {
            out.push(Self::DestinationShows);
        }
        if here.up && here.runs && here.recovered.is_some() && !here.shown_new {
            out.push(Self::SourceShows);
        }
        if model.mode == OutputMode::Lease {
            if here.up && here.granting && there.up && there.tether.is_some() {
                out.push(Self::Grants);
            }
            if there.up && there.tether.is_some() && world.grant.is_some() {
                out.push(Self::GrantIsRead);
            }
            let runs_out = here.wait > 0 || there.lease > 0 || world.grant.is_some();
            if runs_out {
                out.push(Self::TimePasses);
            }
        }
        if there.vmm {
            out.push(Self::VmmDies);
        }
        if there.up && there.deaths_left > 0 {
            out.push(Self::DestinationDies);
        }
        if !there.up && there.vmm && there.will.is_some() {
            out.push(Self::DestinationTakenOver);
        }
        if there.up || there.vmm {
            out.push(Self::DestinationHostDies);
        }
        if here.up {
            if here.deaths_left > 0 {
                out.push(Self::SourceDies);
            }
            out.push(Self::SourceHostDies);
        }
        out.extend(world.to_arbiter.each().map(Self::ArbiterHears));
    }

    /// What comes of it.
    pub fn make(self, model: &Ownership, world: &mut World) {
        let (here, there) = (&mut world.source, &mut world.destination);
        let bounds = model.bounds;
        match self {
            Self::SourceActs { fails } => world.source_acts(model, fails),
            Self::DestinationActs { fails } => world.destination_acts(fails),
            Self::SourceHears(at) => hear_at_source(world, at),
            Self::DestinationHears(at) => hear_at_destination(world, at),
            Self::AtSource(event) => {
                world.at_source(event);
            }
            Self::AtDestination(event) => {
                if event == destination::Event::AllLanded {
                    there.all_landed = true;
                }
                world.at_destination(event);
            }
            Self::GuestGoesOn => there.made += 1,
            Self::Commits => here.placed = there.made,
            Self::CommitIsKnown => there.acked = here.placed,
            Self::DestinationShows => there.shown += 1,
            Self::SourceShows => here.shown_new = true,
            Self::Grants => {
                here.wait = bounds.lease + bounds.margin;
                world.grant = Some(bounds.lease);
            }
            Self::GrantIsRead => there.lease = there.lease.max(world.grant.take().unwrap_or(0)),
            Self::TimePasses => {
                here.wait = here.wait.saturating_sub(1);
                there.lease = there.lease.saturating_sub(1);
                world.grant = world.grant.map(|left| left.saturating_sub(1)).filter(|&left| left > 0);
            }
            Self::VmmDies => (there.vmm, there.runs) = (false, false),
            // Its guest is stopped, its session ends, and what it knew of commits and of a lease is gone with it.
            Self::DestinationDies => {
                there.deaths_left -= 1;
                there.todo.clear();
                (there.up, there.runs, there.gate, there.tether) = (false, false, Gate::Shut, None);
                (there.lease, there.acked) = (0, there.acked.min(there.shown));
            }
            Self::DestinationTakenOver => world.destination_taken_over(),
            Self::DestinationHostDies => {
                there.todo.clear();
                (there.up, there.vmm, there.runs) = (false, false, false);
                (there.gate, there.tether, there.lease, there.will) = (Gate::Shut, None, 0, None);
            }
            Self::SourceDies => {
                here.deaths_left -= 1;
                world.source_starts_again();
            }
            Self::SourceHostDies => {
                here.todo.clear();
                (here.up, here.runs, here.granting) = (false, false, false);
            }
            Self::ArbiterHears(claim) => world.arbiter_hears(claim),
        }
    }
}

pub(super) fn hear_at_destination(world: &mut World, at: u8) {
    let event = TO_DESTINATION[usize::from(at)];
    let there = &mut world.destination;
    // The answer comes over a session of its own, which brings a lease of its own: what an earlier one granted is good no more.
    if event == destination::Event::FateAnswered(Fate::StillTethered)
        && matches!(there.state, destination::State::Fenced(_))
    {
        (there.lease, world.grant) = (0, None);
    }
    world.at_destination(event);
}

pub(super) fn hear_at_source(world: &mut World, at: u8) {
    let event = match TO_SOURCE[usize::from(at)] {
        // The destination says that it has failed: after the switch it has fenced itself.
        source::Event::SwitchFailed if world.source.state.name() != "Switching" => source::Event::ConnectionClosed,
        event => event,
    };
    world.at_source(event);
}

fn source_hears(model: &Ownership, world: &World, out: &mut Vec<Move>) {
    use source::Event;
    let (here, there) = (&world.source, &world.destination);
    out.extend(world.to_source.each().map(Move::SourceHears));
    let mut event = |event| out.push(Move::AtSource(event));
    match here.state.name() {
        "Switching" => {
            event(Event::SwitchFailed);
            event(Event::Cancelled);
            event(Event::ConnectionClosed);
            event(Event::DeathSign);
        }
        "Serving" => {
            event(Event::ConnectionClosed);
            event(Event::DeathSign);
            event(Event::OperatorCatch);
        }
        "Resuming" => {
            event(Event::ConnectionClosed);
            event(Event::OperatorCatch);
            event(Event::GraceRanOut);
        }
        _ => event(Event::OperatorCatch),
    }
    // The guard's word, or a fence's: the VMM has ended, and so has whoever could show what it left.
    if !there.vmm && !there.up {
        event(Event::DeathProven);
    }
    // What the operator says by force is so: the destination is gone, and had not made the guest its own.
    let had_not = world.record.is_some_and(|record| record != Record::Destination);
    if had_not && !there.vmm && !there.up && matches!(here.state, source::State::Revoking { .. }) {
        event(Event::CatchByForce);
    }
    // Under `commit` nothing is granted, and nothing waits for it.
    if model.mode == OutputMode::Lease && here.wait == 0 && matches!(here.state.name(), "Serving" | "Resuming") {
        event(Event::LeaseRanOut);
    }
}

fn destination_hears(world: &World, out: &mut Vec<Move>) {
    use destination::{Event, State};
    let (here, there) = (&world.source, &world.destination);
    out.extend(world.to_destination.each().map(Move::DestinationHears));
    let mut event = |event| out.push(Move::AtDestination(event));
    match there.state {
        State::Preparing { .. } => {
            event(Event::ConnectionClosed);
            event(Event::Cancelled);
            event(Event::PrepareFailed);
        }
        State::Tethered { .. } => {
            event(Event::ConnectionClosed);
            event(Event::CommitFailed);
            if there.all_landed {
                event(Event::ReleaseWanted);
            }
            if there.lease == 0 {
                event(Event::LeaseExpired);
            }
        }
        State::Fenced(_) => {
            event(Event::ConnectionClosed);
            if world.record.is_some() {
                event(Event::ContinueWanted);
            }
        }
        _ => {}
    }
    // Pages come while there is somebody to read them from.
    if !there.all_landed && here.up && there.tether == Some(FIRST) {
        event(Event::AllLanded);
    }
    let preparing = matches!(there.state, State::Preparing { .. });
    if here.ring_open.is_none() && (there.tether.is_some() || preparing) {
        event(Event::SourceRevoked);
    }
    if !there.vmm && !matches!(there.state, State::Fenced(now) if now.guest_dead) {
        event(Event::GuestDied);
    }
    if !here.up {
        event(Event::SourceDead);
        // Whoever promotes must know that the source had not taken the guest back before it died.
        if here.ring_open.is_some() {
            event(Event::Promoted);
            if world.record.is_some() {
                event(Event::PromotedByForce);
            }
        }
    }
}

impl stateright::Model for Ownership {
    type State = World;
    type Action = Move;

    fn init_states(&self) -> Vec<World> {
        crate::mutation::make(self.mutation);
        vec![World::new(self)]
    }

    fn actions(&self, world: &World, out: &mut Vec<Move>) {
        Move::all(self, world, out);
    }

    fn next_state(&self, world: &World, action: Move) -> Option<World> {
        // The checker calls from threads of its own.
        crate::mutation::make(self.mutation);
        let mut next = world.clone();
        action.make(self, &mut next);
        (next != *world).then_some(next)
    }

    fn properties(&self) -> Vec<stateright::Property<Self>> {
        super::check::properties()
    }
}

const _: () = assert!(TO_SOURCE.len() == world::FATE_ASKED as usize + 3 && TO_DESTINATION.len() <= 16);
