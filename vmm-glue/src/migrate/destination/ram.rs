//! Guest RAM on this host: allocated before the downtime, some of it before the source has even called.

use super::{DestinationError, Observer, Placement};
use crate::migrate::observation::{Kind, ObservationId, us};
use crate::migrate::registering::prefer;
use belay_transport::pull::ShardRange;
use belay_transport::region::{Extent, Mapping, RamFile, RegionError};
use belay_transport::session::RegionGeometry;
use belay_transport::{PageSize, RegionId};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Threads that allocate RAM.
const ALLOCATORS: usize = 2;

/// Bytes between two reports of how far it is.
const ALLOCATION_REPORT: u64 = 64 << 20;

/// One region of guest RAM on this host, allocated.
#[derive(Debug, Clone)]
pub struct Ram {
    pub id: RegionId,
    pub file: Arc<RamFile>,
    /// Where pages land: a mapping the vCPUs do not use.
    pub alias: Arc<Mapping>,
}

/// A region that the VMM made.
#[derive(Debug, Clone)]
pub struct HostRam {
    pub file: Arc<RamFile>,
    /// Where it was emptied, allocated and mapped before the guest came, its frames taken from anywhere.
    ready: Option<Arc<Mapping>>,
}

impl From<Arc<RamFile>> for HostRam {
    fn from(file: Arc<RamFile>) -> Self {
        Self { file, ready: None }
    }
}

impl HostRam {
    /// Empties and allocates it now. The VMM must not touch it from here on.
    pub fn made_ready(file: Arc<RamFile>, observer: &Observer) -> Result<Self, RegionError> {
        let (begun, bytes) = (Instant::now(), file.len() as u64);
        let alias = allocated(&file, |_| (), &telling(observer, None, bytes))?;
        observer.note(None, Kind::Allocated { bytes, took_us: us(begun.elapsed()) });
        Ok(Self { file, ready: Some(alias) })
    }
}

/// Allocates all of guest RAM, so that no frame is a hole when it is registered (P1).
pub(super) fn allocate(
    geometry: &[RegionGeometry],
    files: Option<Vec<HostRam>>,
    placement: &Placement,
    observer: &Observer,
    because: &ObservationId,
) -> Result<Vec<Ram>, DestinationError> {
    let begun = Instant::now();
    let mut ram = Vec::new();
    let mut allocated_bytes = 0;
    let mut files = files.map(Vec::into_iter);
    for region in geometry {
        let bytes = region.bytes as usize;
        let HostRam { file, ready } = match &mut files {
            None => Arc::new(RamFile::memfd("belay-guest-ram", bytes, region.page_size)?).into(),
            Some(files) => of_the_vmm(files.next(), region)?,
        };
        // Its frames may be anywhere.
        if let (Some(alias), Placement::Anywhere { .. }) = (ready, placement) {
            ram.push(Ram { id: region.id, file, alias });
            continue;
        }
        allocated_bytes += region.bytes;
        let progress = telling(observer, Some(because), region.bytes);
        let alias = allocated(&file, |alias| prefer(placement, alias, observer, because), &progress)?;
        ram.push(Ram { id: region.id, file, alias });
    }
    if files.is_some_and(|mut files| files.next().is_some()) {
        return Err(DestinationError::Refused(format!(
            "more regions of RAM here than the source's {}",
            geometry.len()
        )));
    }
    if allocated_bytes > 0 {
        observer.note(Some(because), Kind::Allocated { bytes: allocated_bytes, took_us: us(begun.elapsed()) });
    }
    Ok(ram)
}

/// Tells now and then how far it is; which of several threads tells does not matter.
fn telling<'a>(
    observer: &'a Observer,
    because: Option<&'a ObservationId>,
    total_bytes: u64,
) -> impl Fn(u64) + Sync + 'a {
    let told = AtomicU64::new(0);
    move |done_bytes| {
        if done_bytes >= told.load(Ordering::Relaxed) + ALLOCATION_REPORT {
            told.store(done_bytes, Ordering::Relaxed);
            observer.note(because, Kind::Allocating { done_bytes, total_bytes });
        }
    }
}

/// Empties a file, so that it is all holes to whoever has it mapped, and allocates all of it. `before` is given the alias before any frame
/// is, `progress` the bytes done so far, from several threads.
fn allocated(
    file: &RamFile,
    before: impl FnOnce(&Mapping),
    progress: &(dyn Fn(u64) + Sync),
) -> Result<Arc<Mapping>, RegionError> {
    file.punch(Extent { offset: 0, len: file.len() as u64 })?;
    let alias = file.map().map_err(|source| RegionError::Io { doing: "mapping guest RAM".into(), source })?;
    before(&alias);
    file.preallocate_through(&alias, ALLOCATORS, progress)?;
    Ok(Arc::new(alias))
}

/// A file that the VMM made, if it is like the source's.
fn of_the_vmm(ram: Option<HostRam>, region: &RegionGeometry) -> Result<HostRam, DestinationError> {
    let refused =
        |what: String| DestinationError::Refused(format!("{} of {what} here and {}", region.id, like(region)));
    let ram = ram.ok_or_else(|| refused("nothing".to_owned()))?;
    let here = RegionGeometry { id: region.id, bytes: ram.file.len() as u64, page_size: ram.file.page_size() };
    if here != *region {
        return Err(refused(like(&here)));
    }
    Ok(ram)
}

fn like(region: &RegionGeometry) -> String {
    format!("{} bytes in pages of {}", region.bytes, region.page_size)
}

/// Splits every region's frames among the shards, each part a multiple of 2 MiB where there is enough, so that no huge frame and
/// no background chunk is split.
pub fn shard_ranges(ram: &[Ram], shards: u16) -> Vec<Vec<ShardRange>> {
    let mut parts = vec![Vec::new(); usize::from(shards)];
    for region in ram {
        let frames = region.file.len() as u64 >> region.file.page_size().shift();
        let grain = if region.file.page_size() == PageSize::Small { 512 } else { 1 };
        let share = frames.div_ceil(u64::from(shards)).next_multiple_of(grain);
        for (index, part) in parts.iter_mut().enumerate() {
            let (start, end) = ((index as u64 * share).min(frames), ((index as u64 + 1) * share).min(frames));
            if start < end {
                part.push(ShardRange { region: region.id, frames: start..end });
            }
        }
    }
    parts
}
