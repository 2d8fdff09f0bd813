//! Two hosts, a network that loses, repeats, reorders and delays, processes and hosts that die at any point, an operator who may say
//! anything at any time: **every** history of the real ownership functions within the bounds, by stateright.
//!
//! ```text
//! world.rs   the two hosts, an arbiter, and what lies between them; what each action of a role does there
//! moves.rs   what can happen next
//! quiet.rs   from here on no more faults: whether the guest comes home
//! check.rs   the promises, the bounds, and the runs
//! ```
//! What is bounded is in [`Bounds`]; all else is not: a message that was sent can come at any later time, any number of times, or never
//! (the network is a set that only grows). A role takes its actions one after the other, as the real ones do, and everything else can
//! happen between two of them; a process can die there.
//!
//! The guest is a counter of outputs. What it does at the destination is one past, what it does at the source after a catch another:
//! whatever the world has seen of both contradicts itself unless the first was committed before.

mod check;
mod moves;
mod quiet;
mod world;

use crate::mutation::Mutation;
use crate::outbox::OutputMode;
use moves::Move;

/// How far the exhaustive check goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Bounds {
    /// Outputs that the guest makes at the destination.
    outputs: u8,
    /// Deaths of the source's process that another takes over from.
    source_deaths: u8,
    /// Deaths of the destination's process (its VMM lives on) that another takes over from.
    destination_deaths: u8,
    /// Steps of a catch that fail with nothing lost.
    catch_failures: u8,
    /// Ticks of a lease and of the margin after it.
    lease: u8,
    margin: u8,
}

/// What is checked.
#[derive(Debug, Clone, Copy)]
struct Ownership {
    mode: OutputMode,
    /// Whether there is one. The destination then goes on alone wherever it agrees.
    arbiter: bool,
    bounds: Bounds,
    mutation: Option<Mutation>,
}
