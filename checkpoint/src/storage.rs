//! Disks that a guest writes, where what it writes is kept out of their images until its checkpoint has committed.
//!
//! Memory goes back in time at a catch, and a shared disk would not. So at the destination a guest's writes are kept beside the image and go
//! into its records (`kind::DISK_WRITES`); **only the source writes the image**, while it folds, in the order of the epochs and in the
//! guest's order within each. The guest is answered at once, whatever it flushes; its output after a flush waits until the source has said
//! that the epoch is in the image ([`crate::outbox::Outbox::applied`]).

use crate::guest::{Epoch, GuestError};
use belay_transport::Deadline;
use std::fmt;

/// What a guest did to one of its disks in one epoch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskWrites {
    /// Which, counted from 0 at the destination.
    pub device: u16,
    /// In the encoding of whoever keeps the disk; it says itself which disk that is.
    pub bytes: Vec<u8>,
    /// Whether the guest flushed.
    pub flushed: bool,
}

/// A guest's writable disks, all of them. Called from several threads.
pub trait Storage: fmt::Debug + Send + Sync {
    /// How many there are.
    fn disks(&self) -> u16;

    /// Destination, guest paused and its state saved: ends what was done since the last epoch under this number. A number that was used
    /// before had not come to the source, and what it named is part of this one.
    fn close_epoch(&self, epoch: Epoch) -> Result<Vec<DiskWrites>, GuestError>;

    /// Destination: the source has everything up to this epoch in the images, durably.
    fn applied(&self, epoch: Epoch);

    /// Destination: the guest is this host's own. When this returns the images have everything it wrote, and are written here. An error leaves
    /// everything where it is, and what can be tried again is.
    fn own(&self, deadline: Deadline) -> Result<(), GuestError>;

    /// Source: does to an image what a committed epoch says; durable when this returns. Doing it again changes nothing. `between` is called now
    /// and then.
    fn apply(&self, writes: &[u8], between: &mut dyn FnMut()) -> Result<(), GuestError>;

    /// Source, before the destination is shut out: whether the images can be written, so that a catch will not fail by them.
    fn check(&self) -> Result<(), GuestError>;

    /// Source, before a release is written down: nothing here writes the images any more.
    fn give_up(&self) -> Result<(), GuestError>;

    /// Source: the release did not come about, and the images are this host's as before.
    fn keep(&self) -> Result<(), GuestError>;
}
