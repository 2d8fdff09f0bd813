//! How much room is left where files of memory are made.

use super::{RegionError, backing_of, huge};
use crate::units::PageSize;
use std::path::Path;

/// Fails where fewer than `needed` bytes are free in `directory` now; the error says that they are for `path`. Others take room too, so
/// this is advice with numbers, and never instead of reserving ([`super::RamFile::reserve`]).
pub fn expect_room(directory: &Path, path: &Path, needed: u64) -> Result<(), RegionError> {
    let page_size = backing_of(directory)?;
    let stat = rustix::fs::statvfs(directory)
        .map_err(RegionError::io(format!("asking how much is free in {}", directory.display())))?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    // A mount without a limit of its own tells of no blocks at all.
    if stat.f_blocks > 0 && free < needed {
        return Err(RegionError::NoRoom { path: path.to_owned(), needed, free });
    }
    match page_size {
        PageSize::Huge => huge::check(needed.div_ceil(PageSize::Huge.bytes() as u64)),
        PageSize::Small => Ok(()),
    }
}
