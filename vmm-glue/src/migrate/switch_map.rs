//! The switch map: a class for every page of guest RAM at the instant of the switch, run-length encoded.

use belay_transport::region::Extent;
use belay_transport::{PageSize, RegionId};
use serde::{Deserialize, Serialize};

/// What a frame holds at the switch, and so where it comes from. Numbers are part of the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum PageClass {
    /// Its bytes are at the source and are read from there.
    Peer = 1,
    /// All zero; never sent.
    Zero = 2,
    // 3 "content the destination already holds" and 4 "on the shared disk" are reserved.
}

impl PageClass {
    fn from_wire(class: u8) -> Result<Self, SwitchMapError> {
        match class {
            1 => Ok(Self::Peer),
            2 => Ok(Self::Zero),
            other => Err(SwitchMapError::UnknownClass(other)),
        }
    }
}

/// Classes of one region's frames, as they cross the wire: (class, frames) runs in ascending order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionClasses {
    pub id: RegionId,
    pub runs: Vec<(u8, u64)>,
}

/// Why a switch map was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SwitchMapError {
    #[error("page class {0} is not known to this version; only 1 (peer) and 2 (zero) are")]
    UnknownClass(u8),
    #[error("{id}: the map covers {covered} frames, the region has {frames}")]
    WrongLength { id: RegionId, covered: u64, frames: u64 },
    #[error("{id}: a run of no frames")]
    EmptyRun { id: RegionId },
}

impl RegionClasses {
    /// The map of a region of `bytes` bytes of which `data` holds bytes and the rest was never written.
    pub fn from_occupancy(id: RegionId, bytes: u64, page_size: PageSize, data: &[Extent]) -> Self {
        let frame = page_size.bytes() as u64;
        let mut runs: Vec<(u8, u64)> = Vec::new();
        let mut push = |class: PageClass, frames: u64| match runs.last_mut() {
            _ if frames == 0 => {}
            Some((last, count)) if *last == class as u8 => *count += frames,
            _ => runs.push((class as u8, frames)),
        };
        let mut at = 0;
        for extent in data {
            let (start, end) = (extent.offset / frame, (extent.offset + extent.len).div_ceil(frame));
            push(PageClass::Zero, start.saturating_sub(at));
            push(PageClass::Peer, end - start.max(at));
            at = end;
        }
        push(PageClass::Zero, bytes / frame - at);
        Self { id, runs }
    }

    /// Frames of one class.
    pub fn frames(&self, of: PageClass) -> u64 {
        self.runs.iter().filter(|&&(class, _)| class == of as u8).map(|&(_, frames)| frames).sum()
    }

    /// Checks the map against the region it is for and gives its runs as classes.
    pub fn decode(&self, frames: u64) -> Result<Vec<(PageClass, u64)>, SwitchMapError> {
        let mut covered = 0u64;
        let mut decoded = Vec::with_capacity(self.runs.len());
        for &(class, count) in &self.runs {
            let class = PageClass::from_wire(class)?;
            if count == 0 {
                return Err(SwitchMapError::EmptyRun { id: self.id });
            }
            covered = covered.saturating_add(count);
            if covered > frames {
                break;
            }
            decoded.push((class, count));
        }
        if covered != frames {
            return Err(SwitchMapError::WrongLength { id: self.id, covered, frames });
        }
        Ok(decoded)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(runs: &[(u8, u64)]) -> RegionClasses {
        RegionClasses { id: RegionId(0), runs: runs.to_vec() }
    }

    #[test]
    fn occupancy_becomes_runs_that_cover_the_region() {
        let data = [Extent { offset: 4096, len: 8192 }, Extent { offset: 12288, len: 4096 }];
        let classes = RegionClasses::from_occupancy(RegionId(0), 10 * 4096, PageSize::Small, &data);
        assert_eq!(classes.runs, [(2, 1), (1, 3), (2, 6)]);
        assert_eq!(classes.decode(10).unwrap().len(), 3);
    }

    #[test]
    fn a_map_that_lies_is_refused() {
        assert_eq!(map(&[(3, 10)]).decode(10), Err(SwitchMapError::UnknownClass(3)));
        assert!(matches!(map(&[(1, 9)]).decode(10), Err(SwitchMapError::WrongLength { covered: 9, .. })));
        assert!(matches!(map(&[(1, u64::MAX), (2, 11)]).decode(10), Err(SwitchMapError::WrongLength { .. })));
        assert!(matches!(map(&[(1, 0), (2, 10)]).decode(10), Err(SwitchMapError::EmptyRun { .. })));
    }
}
