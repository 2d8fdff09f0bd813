//! Mistakes that the tests can have the code make, to see that they are noticed: each is one line gone wrong, where it would go wrong.
//!
//! Outside of tests there is no switch: [`mutated`] is the constant `false`, and nothing of this is in a shipped binary.

/// One mistake. `docs/ownership.md` says which check notices it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Mutation {
    /// Output leaves when its epoch is closed.
    ReleaseBeforeCommit,
    /// The ring is folded while the destination can still commit.
    CatchBeforeRevoke,
    /// A segment is taken because its header is there, whatever its body.
    FoldWithoutChecksum,
    /// A destination of an owner epoch that is over is treated as the present one.
    StaleOwnerEpoch,
    /// The end of a connection is taken for the word that ends a migration.
    EofIsRelease,
    /// A packet that has left is kept as one that has not.
    DoubleRelease,
    /// What must wait for a lease does not.
    LeaseIgnored,
    /// A page whose bytes are still on their way counts as the guest's.
    InFlightIsLanded,
    /// What the guest gave up is not told.
    DiscardSkipped,
    /// Committed output that is not known to have left is forgotten by the catch.
    OutboxLost,
    /// A destination that is to go on alone does so without the arbiter.
    ContinuesUnasked,
    /// A source takes the guest back although the arbiter says that it is the destination's.
    RefusalIgnored,
}

#[cfg(test)]
thread_local! {
    static ON: std::cell::Cell<Option<Mutation>> = const { std::cell::Cell::new(None) };
}

/// Whether this thread makes the mistake.
#[cfg(test)]
pub(crate) fn mutated(mutation: Mutation) -> bool {
    ON.get() == Some(mutation)
}

/// Never.
#[cfg(not(test))]
#[inline(always)]
pub(crate) const fn mutated(_: Mutation) -> bool {
    false
}

/// Has this thread make the mistake, or none, until it is told otherwise.
#[cfg(test)]
pub(crate) fn make(mutation: Option<Mutation>) {
    ON.set(mutation);
}
