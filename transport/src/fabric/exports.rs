//! What an owner has exported: keys, rights and ranges, and the check of what a peer asks for against them.

use super::{FabricError, OWNER_EPOCH_OFFSET, ReadKey, RefusedReason, RingKeys, WriteKey};
use crate::region::{Extent, Mapping};
use std::sync::{Arc, PoisonError, RwLock};

/// Exports of one session: a key's low byte is its place here.
pub(super) const MAX_EXPORTS: usize = 64;

/// What a key allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Right {
    Read,
    Write,
}

/// One exported mapping.
#[derive(Debug, Clone)]
pub(super) struct Export {
    pub key: u64,
    pub right: Right,
    pub mapping: Arc<Mapping>,
    /// Sorted, disjoint and not touching. Shared with the threads that check requests, because a running guest populates more.
    extents: Arc<RwLock<Vec<Extent>>>,
}

/// All of an owner's exports.
#[derive(Debug, Clone, Default)]
pub(super) struct Exports {
    all: Vec<Export>,
    ring: Option<Ring>,
}

#[derive(Debug, Clone, Copy)]
struct Ring {
    ring: usize,
    owner_region: usize,
}

impl Exports {
    pub(super) fn all(&self) -> &[Export] {
        &self.all
    }

    fn add(&mut self, right: Right, mapping: &Arc<Mapping>, extents: Vec<Extent>) -> Result<u64, FabricError> {
        if self.all.len() >= MAX_EXPORTS {
            return Err(FabricError::TooManyExports { limit: MAX_EXPORTS });
        }
        // Seven random bytes: a key says where it belongs and cannot be guessed.
        let random = u64::from_le_bytes(crate::session::random()?);
        let key = (random & !0xff) | self.all.len() as u64;
        let extents = Arc::new(RwLock::new(extents));
        self.all.push(Export { key, right, mapping: Arc::clone(mapping), extents });
        Ok(key)
    }

    /// The same exports under keys that are known beforehand: `base` and the place.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn with_keys(mut self, base: u64) -> Self {
        (base..).zip(&mut self.all).for_each(|(key, export)| export.key = key);
        self
    }

    /// Exports extents for reading.
    pub(super) fn add_read(&mut self, mapping: &Arc<Mapping>, extents: &[Extent]) -> Result<ReadKey, FabricError> {
        let extents = merged(extents, mapping.len() as u64)?;
        self.add(Right::Read, mapping, extents).map(ReadKey)
    }

    /// Replaces what may be read by `key`.
    pub(super) fn extend_read(&self, key: ReadKey, extents: &[Extent]) -> Result<(), FabricError> {
        let export = self.all.get((key.0 & 0xff) as usize).filter(|export| export.key == key.0);
        let export = export.ok_or(FabricError::UnknownKey { what: "extending an export", key: key.0 })?;
        let extents = merged(extents, export.mapping.len() as u64)?;
        *export.extents.write().unwrap_or_else(PoisonError::into_inner) = extents;
        Ok(())
    }

    /// Exports the checkpoint ring and the owner's region, each as a whole.
    pub(super) fn add_ring(
        &mut self,
        ring: &Arc<Mapping>,
        owner_region: &Arc<Mapping>,
    ) -> Result<RingKeys, FabricError> {
        if self.ring.is_some() {
            return Err(FabricError::TooLate { what: "a second ring exported" });
        }
        let whole = |mapping: &Mapping| vec![Extent { offset: 0, len: mapping.len() as u64 }];
        let place = self.all.len();
        let keys = RingKeys {
            ring: WriteKey(self.add(Right::Write, ring, whole(ring))?),
            owner_region: ReadKey(self.add(Right::Read, owner_region, whole(owner_region))?),
        };
        self.ring = Some(Ring { ring: place, owner_region: place + 1 });
        Ok(keys)
    }

    /// The ring, if one was exported.
    pub(super) fn ring(&self) -> Option<&Arc<Mapping>> {
        self.ring.map(|at| &self.all[at.ring].mapping)
    }

    /// Where the owner's region stands, if there is a ring.
    pub(super) fn owner_region(&self) -> Option<&Export> {
        self.ring.map(|at| &self.all[at.owner_region])
    }

    /// Decides whether a peer may do this, and where: offset and length in range as `usize`.
    pub(super) fn check(
        &self,
        key: u64,
        right: Right,
        offset: u64,
        len: u32,
    ) -> Result<(&Arc<Mapping>, usize, usize), RefusedReason> {
        let export = self.all.get((key & 0xff) as usize).filter(|export| export.key == key);
        let export = export.ok_or(RefusedReason::UnknownKey)?;
        if export.right != right {
            return Err(RefusedReason::NoRight);
        }
        if len == 0 || len > super::MAX_OPERATION_BYTES {
            return Err(RefusedReason::BadLength);
        }
        let end = offset.checked_add(u64::from(len)).ok_or(RefusedReason::OutOfRange)?;
        let extents = export.extents.read().unwrap_or_else(PoisonError::into_inner);
        let after = extents.partition_point(|extent| extent.offset <= offset);
        let inside = after.checked_sub(1).is_some_and(|at| {
            let extent = extents[at];
            end <= extent.offset + extent.len
        });
        if inside { Ok((&export.mapping, offset as usize, len as usize)) } else { Err(RefusedReason::OutOfRange) }
    }
}

/// Sorts extents and joins those that touch or overlap, after checking that they lie within `size` bytes.
fn merged(extents: &[Extent], size: u64) -> Result<Vec<Extent>, FabricError> {
    let mut sorted = extents.to_vec();
    sorted.retain(|extent| extent.len > 0);
    sorted.sort_unstable_by_key(|extent| extent.offset);
    let mut out: Vec<Extent> = Vec::with_capacity(sorted.len());
    for Extent { offset, len } in sorted {
        let end = offset.checked_add(len).filter(|end| *end <= size);
        let end = end.ok_or(FabricError::OutOfRange { offset, len, size })?;
        match out.last_mut() {
            Some(last) if offset <= last.offset + last.len => last.len = last.len.max(end - last.offset),
            _ => out.push(Extent { offset, len }),
        }
    }
    Ok(out)
}

/// Whether a region can hold the owner epoch.
pub(super) fn check_owner_region(region: &Mapping) -> Result<(), FabricError> {
    if region.len() >= OWNER_EPOCH_OFFSET + 8 {
        return Ok(());
    }
    Err(FabricError::OutOfRange { offset: OWNER_EPOCH_OFFSET as u64, len: 8, size: region.len() as u64 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    const PAGES: u64 = 64;

    fn mapping() -> Arc<Mapping> {
        let fd = memfd_create("exports-test", MemfdFlags::CLOEXEC).expect("memfd");
        ftruncate(&fd, PAGES * 4096).expect("ftruncate");
        Arc::new(Mapping::read_write(&fd, (PAGES * 4096) as usize).expect("mmap"))
    }

    proptest! {
        /// Against the plainest model there is: one flag a page.
        #[test]
        fn a_read_is_allowed_exactly_where_every_byte_was_exported(
            runs in prop::collection::vec((0..PAGES, 1..8u64), 0..12),
            offset in 0..(PAGES + 2) * 4096,
            len in 1..20_000u32,
        ) {
            let runs: Vec<_> = runs.into_iter().map(|(at, pages)| (at, pages.min(PAGES - at))).collect();
            let mut model = vec![false; PAGES as usize];
            for &(at, pages) in &runs {
                model[at as usize..(at + pages) as usize].fill(true);
            }
            let extents: Vec<_> =
                runs.iter().map(|(at, pages)| Extent { offset: at * 4096, len: pages * 4096 }).collect();
            let mut exports = Exports::default();
            let key = exports.add_read(&mapping(), &extents).unwrap().0;
            let allowed = (offset / 4096..=(offset + u64::from(len) - 1) / 4096)
                .all(|page| model.get(page as usize).copied().unwrap_or(false));
            prop_assert_eq!(exports.check(key, Right::Read, offset, len).is_ok(), allowed);
        }

        #[test]
        fn nothing_a_peer_sends_passes_beyond_the_mapping(key in any::<u64>(), place in 0..4u64, offset in any::<u64>(), len in any::<u32>()) {
            let mut exports = Exports::default();
            let keys = exports.add_ring(&mapping(), &mapping()).unwrap();
            for key in [key, keys.ring.0, keys.owner_region.0, keys.ring.0 ^ (1 << (8 + place)), place] {
                for right in [Right::Read, Right::Write] {
                    if let Ok((mapping, offset, len)) = exports.check(key, right, offset, len) {
                        prop_assert!(offset + len <= mapping.len());
                        prop_assert!(key == keys.ring.0 && right == Right::Write || key == keys.owner_region.0 && right == Right::Read);
                    }
                }
            }
        }
    }

    #[test]
    fn every_way_of_asking_wrongly_has_its_reason() {
        let mut exports = Exports::default();
        let keys = exports.add_ring(&mapping(), &mapping()).unwrap();
        let why = |key, right, offset, len| exports.check(key, right, offset, len).unwrap_err();
        assert_eq!(why(keys.ring.0 ^ 0x100, Right::Write, 0, 8), RefusedReason::UnknownKey);
        assert_eq!(why(keys.ring.0 | 0xff, Right::Write, 0, 8), RefusedReason::UnknownKey);
        assert_eq!(why(keys.ring.0, Right::Read, 0, 8), RefusedReason::NoRight);
        assert_eq!(why(keys.owner_region.0, Right::Write, 0, 8), RefusedReason::NoRight);
        assert_eq!(why(keys.ring.0, Right::Write, 0, 0), RefusedReason::BadLength);
        assert_eq!(why(keys.ring.0, Right::Write, 0, u32::MAX), RefusedReason::BadLength);
        assert_eq!(why(keys.ring.0, Right::Write, u64::MAX, 8), RefusedReason::OutOfRange);
        assert_eq!(why(keys.ring.0, Right::Write, PAGES * 4096 - 7, 8), RefusedReason::OutOfRange);
    }
}
