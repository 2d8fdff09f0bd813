//! The ring as a revocation hands it over for the last read, and the proof, where a fabric has one, that it stands still.
//!
//! Whoever reads bytes twice, to check them and then to use them, must know that they are the same bytes. Before a revocation nobody knows
//! that of a ring. After one it depends on the fabric what is known, and only a fabric can say it:
//!
//! | fabric | who could write | why nobody can any more |
//! |---|---|---|
//! | `tcp` | the lanes' threads, each for its peer | every one of them has been joined: no system call of theirs is under way |
//! | `verbs` | the device, for the session's queue pairs | they are in their error state, and the device has deregistered the ring, which waits for what is being placed; where it says that it has not, it is not so |
//! | `local` | whoever has the ring's file mapped | it is **not so**: a mapping that another process has cannot be taken away, nor is it known who has one |

use crate::region::Mapping;

/// A ring that nobody writes to for as long as this is borrowed: its owner is in the middle of its revocation, and opens no lane. Made by
/// fabrics alone.
#[derive(Debug, Clone, Copy)]
pub struct StillRing<'a>(&'a Mapping);

impl StillRing<'_> {
    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Copies bytes out; the same at every call.
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        self.0.read(offset, into);
    }

    /// Copies `len` bytes at `offset` to `to`.
    pub fn copy_to(&self, offset: usize, len: usize, to: &Mapping, to_offset: usize) {
        to.copy_from(to_offset, self.0, offset, len);
    }
}

/// What the last read is given.
#[derive(Debug, Clone, Copy)]
pub enum RevokedRing<'a> {
    /// Proven to stand still.
    Still(StillRing<'a>),
    /// A stale writer may still scribble: to be judged from private copies, each byte read once.
    Shared(&'a Mapping),
}

impl<'a> RevokedRing<'a> {
    /// For a fabric that has made certain of it; see the module.
    pub(super) fn still(ring: &'a Mapping) -> Self {
        Self::Still(StillRing(ring))
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.mapping().len()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.mapping().is_empty()
    }

    /// Copies bytes out.
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        self.mapping().read(offset, into);
    }

    fn mapping(&self) -> &'a Mapping {
        match self {
            Self::Still(StillRing(ring)) | Self::Shared(ring) => ring,
        }
    }
}
