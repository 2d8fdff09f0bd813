//! What the engine is told before it starts, and why it may refuse.

use super::log::FaultLog;
use crate::fabric::{Lane, LocalKey, ReadKey};
use crate::pages::PageStates;
use crate::region::Mapping;
use crate::uffd::Uffd;
use crate::units::{PageSize, RegionId};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Largest single READ: huge frames are read in several.
pub const MAX_READ_BYTES: u64 = 1 << 20;

/// How pages arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Install {
    /// Plain: no dirty tracking by userfaultfd.
    Clean,
    /// Write-protected, so that userfaultfd's asynchronous tracking sees a page as written only once the guest wrote it.
    Tracked,
    /// Write-protected at every showing, the first and any later one, and where a discard is answered with zeroes: for synchronous
    /// tracking, which hears of a write by its fault alone ([`super::Observer::write_fault`]).
    Protected,
}

impl Install {
    /// Whether a page is write-protected when it is shown for the first time.
    pub(super) fn protects(self) -> bool {
        self != Self::Clean
    }

    /// Whether it is whenever it is shown.
    pub(super) fn always_protects(self) -> bool {
        self == Self::Protected
    }
}

/// What the switch map says of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageClass {
    /// Its content is at the source.
    Peer,
    /// It is zero: never read over the fabric.
    Zero,
}

/// So many frames of one class, after those of the run before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClassRun {
    pub class: PageClass,
    pub frames: u64,
}

/// Where the bytes of a READ go.
#[derive(Debug, Clone)]
pub enum LandingPlan {
    /// Straight into the final frames, through an alias mapping of the same file; shown by CONTINUE. Every frame of the file
    /// has been allocated: `whole` if the file itself says so ([`crate::region::RamFile::is_whole`]); else each frame is looked for,
    /// and one that is reserved and was never touched is not found. The guest's mapping is registered MISSING|MINOR.
    InPlace { alias: Arc<Mapping>, key: LocalKey, whole: bool },
    /// Into bounce buffers ([`PullPlan::bounce_bytes`] of them), then COPY: memory whose frames cannot be shared. The guest's
    /// mapping is registered MISSING, with REMOVE events.
    Bounce { buffers: Arc<Mapping>, key: LocalKey },
}

/// One region of the guest.
#[derive(Debug, Clone)]
pub struct RegionPlan {
    pub id: RegionId,
    pub page_size: PageSize,
    /// Of the region's first byte in the VMM's address space.
    pub vmm_address: u64,
    pub bytes: u64,
    pub landing: LandingPlan,
    /// The region at the source, at the same offsets.
    pub remote: ReadKey,
    /// In frames of `page_size`, covering the region exactly.
    pub classes: Vec<ClassRun>,
}

/// Limits and sizes. The defaults are what the bench found good.
#[derive(Debug, Clone, Copy)]
pub struct Tuning {
    /// Demand READs in flight a shard; further faults wait in the backlog.
    pub demand_reads: usize,
    /// Background chunks in flight a shard, at most.
    pub bulk_chunks: usize,
    /// Bytes of one background chunk when no faults arrive.
    pub chunk_bytes: u64,
    /// Bytes of one background chunk while faults arrive: what a fault may have to wait for.
    pub busy_chunk_bytes: u64,
    /// Bytes around a fault that the background pulls before it goes on with the rest: what a guest is thought to touch next.
    pub bubble_bytes: u64,
    /// A READ that has not completed by then is a failure.
    pub demand_timeout: Duration,
    /// Most time spent spinning before sleeping in poll(2).
    pub spin: Duration,
    /// On a path that answers a demand READ within this, the shard stays awake for the answer (and yields the CPU now and then after `spin`):
    /// going to sleep and being woken would cost the fault as much again. Slower paths are slept for.
    pub demand_awake: Duration,
    /// Once so many frames have landed, only faults are served (for demonstrations and tests of what happens in mid-pull).
    pub hold_at_landed: Option<u64>,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            demand_reads: 32,
            bulk_chunks: 8,
            chunk_bytes: 256 << 10,
            busy_chunk_bytes: 64 << 10,
            bubble_bytes: 2 << 20,
            demand_timeout: Duration::from_secs(5),
            spin: Duration::from_micros(50),
            demand_awake: Duration::from_millis(2),
            hold_at_landed: None,
        }
    }
}

/// All the engine has to pull.
#[derive(Debug, Clone)]
pub struct PullPlan {
    pub regions: Vec<RegionPlan>,
    pub install: Install,
    pub tuning: Tuning,
    /// Serve only faults until [`super::Engine::resume_background`]: for loading device state before the guest runs.
    pub start_paused: bool,
    /// Where the shards note the faults they meet, if anywhere.
    pub log: Option<Arc<FaultLog>>,
}

impl PullPlan {
    /// Bytes of bounce buffers that `shards` shards need.
    pub fn bounce_bytes(&self, shards: usize) -> usize {
        shards * self.tuning.slots() * self.slot_bytes()
    }

    /// Bytes of one slot's bounce buffer: a chunk, or a frame where that is larger.
    pub(super) fn slot_bytes(&self) -> usize {
        let frame = self.regions.iter().map(|region| region.page_size.bytes()).max().unwrap_or(PageSize::Small.bytes());
        (self.tuning.chunk_bytes as usize).max(frame)
    }
}

impl Tuning {
    pub(super) fn slots(&self) -> usize {
        self.demand_reads + self.bulk_chunks
    }
}

/// Frames of one region.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardRange {
    pub region: RegionId,
    pub frames: Range<u64>,
}

/// What one shard (one thread) owns.
pub struct ShardParts {
    /// Reports the faults of `ranges` and of nothing else: a userfaultfd a shard.
    pub uffd: Uffd,
    pub fault: Box<dyn Lane>,
    pub bulk: Box<dyn Lane>,
    pub ranges: Vec<ShardRange>,
    /// Core to run on, as the system numbers them; anywhere without one.
    pub core: Option<usize>,
}

/// Why the engine would not start.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    #[error("the plan has {plan} regions, the page states {states}, in this order of ids and shapes")]
    StatesDiffer { plan: usize, states: usize },
    #[error("{region}: {what}")]
    Region { region: RegionId, what: String },
    #[error(
        "{region}: frame {frame} has no memory yet; allocate all of it through the alias first (a hole would read as zeroes)"
    )]
    NotAllocated { region: RegionId, frame: u64 },
    #[error(
        "{region} lands by COPY and {landed} frames have landed before: a new page server cannot tell which were shown"
    )]
    BounceTakeover { region: RegionId, landed: u64 },
    #[error("shard {shard}: {what}")]
    Shard { shard: usize, what: String },
    #[error("{what} = {value} is outside {allowed}")]
    Tuning { what: &'static str, value: u64, allowed: &'static str },
    #[error("{doing}")]
    Io {
        doing: &'static str,
        #[source]
        source: std::io::Error,
    },
    #[error("watching the alias for discards")]
    Guard(#[source] crate::uffd::UffdError),
    #[error("waking what an earlier page server left waiting")]
    Wake(#[source] crate::uffd::UffdError),
}

/// Frames of one class, as a bitmap: set where the content is at the source. Bits are only ever taken away: a frame whose content is
/// found to be zero.
#[derive(Debug)]
pub(super) struct ClassMap {
    words: Vec<AtomicU64>,
    frames: u64,
}

impl ClassMap {
    pub(super) fn new(runs: &[ClassRun], frames: u64) -> Option<Self> {
        let mut words = vec![0_u64; frames.div_ceil(64) as usize];
        let mut at = 0_u64;
        for run in runs {
            let end = at.checked_add(run.frames).filter(|end| *end <= frames)?;
            if run.class == PageClass::Peer {
                for frame in at..end {
                    words[(frame / 64) as usize] |= 1 << (frame % 64);
                }
            }
            at = end;
        }
        let words = words.into_iter().map(AtomicU64::new).collect();
        (at == frames).then_some(Self { words, frames })
    }

    /// The class of `frame` and how many frames from it on share it, up to `most`.
    #[inline]
    pub(super) fn run(&self, frame: u64, most: u64) -> (PageClass, u64) {
        let word = |frame: u64| self.words[(frame / 64) as usize].load(Ordering::Relaxed);
        let peer = word(frame) >> (frame % 64) & 1 == 1;
        let most = most.min(self.frames - frame);
        let mut run = 0;
        while run < most {
            let at = frame + run;
            let word = word(at) >> (at % 64);
            let same = if peer { word.trailing_ones() } else { word.trailing_zeros() };
            let same = u64::from(same).min(64 - at % 64);
            run += same;
            if same < 64 - at % 64 {
                break;
            }
        }
        (if peer { PageClass::Peer } else { PageClass::Zero }, run.min(most))
    }
}

impl ClassMap {
    /// The frames from `first` on whose bit is set (lowest first) are zero; how many were not known to be. Whoever reads one all the same reads
    /// zeros.
    pub(super) fn are_zero(&self, first: u64, bitmap: &[u8]) -> u64 {
        let mut fewer = 0;
        for (frame, bit) in
            (first..self.frames).zip(bitmap.iter().flat_map(|byte| (0..8).map(move |bit| byte >> bit & 1)))
        {
            if bit == 1 {
                let mask = 1 << (frame % 64);
                let before = self.words[(frame / 64) as usize].fetch_and(!mask, Ordering::Relaxed);
                fewer += u64::from(before & mask != 0);
            }
        }
        fewer
    }
}

/// A region of the plan, checked, as the shards use it.
#[derive(Debug)]
pub(super) struct Region {
    pub plan: RegionPlan,
    pub frames: u64,
    pub classes: ClassMap,
}

impl Region {
    pub(super) fn shift(&self) -> u32 {
        self.plan.page_size.shift()
    }

    pub(super) fn in_place(&self) -> bool {
        matches!(self.plan.landing, LandingPlan::InPlace { .. })
    }
}

/// Checks everything that can be wrong with a plan before a thread is started.
pub(super) fn check(plan: PullPlan, shards: &[ShardParts], states: &PageStates) -> Result<Vec<Region>, PlanError> {
    check_tuning(&plan.tuning)?;
    let same = plan.regions.len() == states.geometry().len()
        && plan.regions.iter().zip(states.geometry()).all(|(region, geometry)| {
            let frames = region.bytes >> region.page_size.shift();
            (region.id, region.page_size, frames) == (geometry.id, geometry.page_size, geometry.frames)
        });
    if !same {
        return Err(PlanError::StatesDiffer { plan: plan.regions.len(), states: states.geometry().len() });
    }
    let fresh = states.counts().absent == states.geometry().map(|region| region.frames).sum::<u64>();
    let bounce_bytes = plan.bounce_bytes(shards.len());
    let mut regions = Vec::with_capacity(plan.regions.len());
    for region in plan.regions {
        check_region(&region, fresh, bounce_bytes, states)?;
        let frames = region.bytes >> region.page_size.shift();
        let classes = ClassMap::new(&region.classes, frames).ok_or_else(|| PlanError::Region {
            region: region.id,
            what: format!("its classes do not cover its {frames} frames exactly"),
        })?;
        regions.push(Region { plan: region, frames, classes });
    }
    check_shards(shards, &regions, &plan.tuning)?;
    Ok(regions)
}

fn check_tuning(tuning: &Tuning) -> Result<(), PlanError> {
    let chunk_fits = |bytes: u64| (4096..=MAX_READ_BYTES).contains(&bytes) && bytes.is_multiple_of(4096);
    let limits = [
        ("demand_reads", tuning.demand_reads as u64, (1..=1024).contains(&tuning.demand_reads), "1 to 1024"),
        ("bulk_chunks", tuning.bulk_chunks as u64, (1..=1024).contains(&tuning.bulk_chunks), "1 to 1024"),
        ("chunk_bytes", tuning.chunk_bytes, chunk_fits(tuning.chunk_bytes), "4 KiB to 1 MiB, in whole pages"),
        (
            "busy_chunk_bytes",
            tuning.busy_chunk_bytes,
            chunk_fits(tuning.busy_chunk_bytes) && tuning.busy_chunk_bytes <= tuning.chunk_bytes,
            "4 KiB to chunk_bytes, in whole pages",
        ),
        (
            "bubble_bytes",
            tuning.bubble_bytes,
            tuning.bubble_bytes <= 1 << 30,
            "0 (the rest in its order alone) to 1 GiB",
        ),
    ];
    match limits.into_iter().find(|(_, _, good, _)| !good) {
        Some((what, value, _, allowed)) => Err(PlanError::Tuning { what, value, allowed }),
        None => Ok(()),
    }
}

fn check_region(region: &RegionPlan, fresh: bool, bounce_bytes: usize, states: &PageStates) -> Result<(), PlanError> {
    let wrong = |what: String| Err(PlanError::Region { region: region.id, what });
    let page = region.page_size.bytes() as u64;
    if region.bytes == 0 || !region.bytes.is_multiple_of(page) || !region.vmm_address.is_multiple_of(page) {
        return wrong(format!(
            "{} bytes at {:#x} are not whole {} pages",
            region.bytes, region.vmm_address, region.page_size
        ));
    }
    match &region.landing {
        LandingPlan::InPlace { alias, .. } if (alias.len() as u64) < region.bytes => {
            wrong(format!("its alias has {} of {} bytes", alias.len(), region.bytes))
        }
        LandingPlan::InPlace { alias, whole: false, .. } if fresh => match first_hole(alias, region)? {
            Some(frame) => Err(PlanError::NotAllocated { region: region.id, frame }),
            None => Ok(()),
        },
        LandingPlan::InPlace { .. } => Ok(()),
        LandingPlan::Bounce { buffers, .. } if buffers.len() < bounce_bytes => {
            wrong(format!("{} bytes of bounce buffers where {bounce_bytes} are needed", buffers.len()))
        }
        LandingPlan::Bounce { .. } if fresh => Ok(()),
        LandingPlan::Bounce { .. } => {
            Err(PlanError::BounceTakeover { region: region.id, landed: states.counts().landed })
        }
    }
}

/// The first frame without memory, by mincore(2) on the alias: reading would allocate it.
fn first_hole(alias: &Mapping, region: &RegionPlan) -> Result<Option<u64>, PlanError> {
    const STEP: usize = 64 << 20;
    let mut resident = vec![0_u8; STEP >> 12];
    for start in (0..region.bytes as usize).step_by(STEP) {
        let len = STEP.min(region.bytes as usize - start);
        let at = alias.as_ptr().wrapping_add(start);
        // SAFETY: the range lies inside the alias (checked by the caller), and `resident` has a byte for each of its pages.
        if unsafe { libc::mincore(at.cast(), len, resident.as_mut_ptr()) } != 0 {
            return Err(PlanError::Io { doing: "mincore on the alias", source: std::io::Error::last_os_error() });
        }
        if let Some(page) = resident[..len >> 12].iter().position(|byte| byte & 1 == 0) {
            return Ok(Some(((start >> 12) + page) as u64 >> (region.page_size.shift() - 12)));
        }
    }
    Ok(None)
}

fn check_shards(shards: &[ShardParts], regions: &[Region], tuning: &Tuning) -> Result<(), PlanError> {
    let wrong = |shard: usize, what: String| Err(PlanError::Shard { shard, what });
    if shards.is_empty() {
        return wrong(0, "there is none".into());
    }
    for (index, shard) in shards.iter().enumerate() {
        if let Some(core) = shard.core
            && !core_affinity::get_core_ids().is_some_and(|cores| cores.iter().any(|known| known.id == core))
        {
            return wrong(index, format!("this process has no core {core}"));
        }
        for range in &shard.ranges {
            let known = regions.iter().find(|region| region.plan.id == range.region);
            if known.is_none_or(|region| range.frames.is_empty() || range.frames.end > region.frames) {
                return wrong(index, format!("frames {:?} of {} do not exist", range.frames, range.region));
            }
        }
        let parts = regions.iter().map(reads_a_frame).max().unwrap_or(1);
        for lane in [&shard.fault, &shard.bulk] {
            if lane.window() < parts {
                return wrong(
                    index,
                    format!("lane {:?} has a window of {}, {parts} is the least", lane.id(), lane.window()),
                );
            }
        }
    }
    for region in regions {
        let mut owned: Vec<Range<u64>> = shards
            .iter()
            .flat_map(|shard| shard.ranges.iter())
            .filter(|range| range.region == region.plan.id)
            .map(|range| range.frames.clone())
            .collect();
        owned.sort_by_key(|range| range.start);
        let end = owned.iter().try_fold(0, |end, range| (range.start == end).then_some(range.end));
        if end != Some(region.frames) {
            return Err(PlanError::Region {
                region: region.plan.id,
                what: format!("the shards' ranges {owned:?} do not cover its {} frames once each", region.frames),
            });
        }
    }
    let least = tuning.slots();
    if least > usize::from(u16::MAX) {
        return wrong(0, format!("{least} slots"));
    }
    Ok(())
}

/// READs that one frame takes.
pub(super) fn reads_a_frame(region: &Region) -> usize {
    (region.plan.page_size.bytes() as u64).div_ceil(MAX_READ_BYTES) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn class_runs_are_found_again(runs in prop::collection::vec((any::<bool>(), 1..200u64), 1..20), most in 1..300u64) {
            let flat: Vec<bool> = runs.iter().flat_map(|(peer, n)| std::iter::repeat_n(*peer, *n as usize)).collect();
            let class = |peer| if peer { PageClass::Peer } else { PageClass::Zero };
            let runs: Vec<_> = runs.iter().map(|(peer, frames)| ClassRun { class: class(*peer), frames: *frames }).collect();
            let map = ClassMap::new(&runs, flat.len() as u64).unwrap();
            for at in 0..flat.len() {
                let same = flat[at..].iter().take_while(|peer| **peer == flat[at]).count() as u64;
                prop_assert_eq!(map.run(at as u64, most), (class(flat[at]), same.min(most)));
            }
            prop_assert!(ClassMap::new(&runs, flat.len() as u64 + 1).is_none());
            prop_assert!(ClassMap::new(&runs, flat.len() as u64 - 1).is_none());
        }

        #[test]
        fn frames_found_to_be_zero_are_no_longer_the_sources_and_no_others(
            peers in prop::collection::vec(any::<bool>(), 1..300),
            first in 0..310u64,
            bitmap in prop::collection::vec(any::<u8>(), 0..40),
        ) {
            let class = |peer| if peer { PageClass::Peer } else { PageClass::Zero };
            let runs: Vec<_> = peers.iter().map(|peer| ClassRun { class: class(*peer), frames: 1 }).collect();
            let map = ClassMap::new(&runs, peers.len() as u64).unwrap();
            let told = |frame: u64| frame.checked_sub(first).is_some_and(|at| bitmap.get(at as usize / 8).is_some_and(|byte| byte >> (at % 8) & 1 == 1));
            let fewer = map.are_zero(first, &bitmap);
            let mut gone = 0;
            for (frame, peer) in peers.iter().enumerate() {
                let left = *peer && !told(frame as u64);
                gone += u64::from(*peer && !left);
                prop_assert_eq!(map.run(frame as u64, 1).0, class(left), "frame {}", frame);
            }
            prop_assert_eq!(fewer, gone);
        }
    }
}
