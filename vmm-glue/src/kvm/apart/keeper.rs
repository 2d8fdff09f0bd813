//! What outlives a page server, as the page server has it: by it things are laid down for the next one.

use super::Kept;
use belay_checkpoint::guest::GuestError;
use std::os::fd::BorrowedFd;

/// Somebody who keeps things: a VMM in a process of its own, or a process beside one that cannot.
pub trait Keeps: Send + Sync {
    /// Keeps a duplicate of `file`; an earlier one of its kind is forgotten.
    fn keep(&self, what: Kept, file: BorrowedFd<'_>) -> Result<(), GuestError>;

    /// Gives the VMM's sign of life in a slot of `page`, until it is told to exit. False where it gives none.
    fn give_sign(&self, page: BorrowedFd<'_>, slot: usize) -> Result<bool, GuestError>;
}

/// Lays things down for the page server after this one.
pub struct Keeper(Box<dyn Keeps>);

impl Keeper {
    /// With whoever keeps them.
    pub fn with(keeps: impl Keeps + 'static) -> Self {
        Self(Box::new(keeps))
    }

    /// See [`Keeps::keep`].
    pub fn keep(&self, what: Kept, file: BorrowedFd<'_>) -> Result<(), GuestError> {
        self.0.keep(what, file)
    }

    /// See [`Keeps::give_sign`].
    pub fn give_sign(&self, page: BorrowedFd<'_>, slot: usize) -> Result<bool, GuestError> {
        self.0.give_sign(page, slot)
    }
}
