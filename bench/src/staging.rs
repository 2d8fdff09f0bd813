//! `staging`: how long a guest stands still for a checkpoint of 100,000 scattered dirty pages, copied in the pause or on write, beside what
//! both ways have to do: harvest these pages and protect them again.
//!
//! The guest is a thread that writes a word of one page after the other, tracked by synchronous userfaultfd write protection; another answers its
//! faults. No KVM, and nothing is sent: a full slot is exchanged for an empty one at once, which is the best copying in the pause can have.
//! One guest, one tracker; the ways take turns epoch by epoch. As in a tether, pages are protected ahead of the pause; the guest writes on
//! meanwhile, anywhere, as fast as it can, and one way does without. Where pages are copied on write the guest goes on before they are staged, and
//! writes some of them again: what that costs it is told too.

use crate::carrier::{Carrier, Device};
use crate::error::BenchError;
use crate::report::{Better, Case, Goal, Measure, Output, Report};
use crate::rig::Ends;
use crate::table::median;
use crate::tracking::Answering;
use belay_checkpoint::dirty::DirtySet;
use belay_checkpoint::guest::{DirtyTracker, Epoch, RamBlock};
use belay_checkpoint::record::DEVICE_VMM;
use belay_checkpoint::record::kind::DEVICE_STATE;
use belay_checkpoint::ring::RingShape;
use belay_checkpoint::staging::{Exchange, Slot, StageError, Stager};
use belay_checkpoint::tracker::{GroupSize, Groups, HELD_PAGES, SYNC_FEATURES, UffdSyncTracker, WriteFaults};
use belay_transport::fabric::FabricKind;
use belay_transport::pull::ShardRange;
use belay_transport::region::{Mapping, RamFile};
use belay_transport::uffd::{Faults, OpenMode, RegisterModes, Uffd};
use belay_transport::{PAGE_SIZE, PageIndex, PageSize, RegionId};
use clap::Args;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

const REGION: RegionId = RegionId(0);
/// One page of so many is dirty.
const OF: u64 = 4;
const RING_BYTES: usize = 64 << 20;
/// Pages that the guest writes while they are held.
const AGAIN: usize = 1000;
/// Goals: of copying on write against copying in the pause, and against harvesting and protecting alone.
const GOALS: [f64; 2] = [1.0 / 3.0, 1.3];

/// Measure the pause of a checkpoint whose pages are copied in it, or on write
#[derive(Debug, Clone, Args)]
pub struct StagingArgs {
    /// Dirty pages of an epoch, one in four of the guest's
    #[arg(long, value_name = "PAGES", default_value = "100000", value_parser = clap::value_parser!(u64).range(64..=1 << 22))]
    pages: u64,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Harvested and protected again in the pause; no checkpoint.
    Bare,
    Copy,
    Cow,
    /// All of the harvest is in the pause.
    CowUnprepared,
}

impl Way {
    const ALL: [Self; 4] = [Self::Bare, Self::Copy, Self::Cow, Self::CowUnprepared];

    fn name(self) -> &'static str {
        match self {
            Self::Bare => "harvest and protect",
            Self::Copy => "copy",
            Self::Cow => "copy on write",
            Self::CowUnprepared => "copy on write, nothing ahead of the pause",
        }
    }
}

/// Of one way, a value an epoch.
#[derive(Default)]
struct Samples {
    ahead: Vec<f64>,
    meanwhile: Vec<f64>,
    pause: Vec<f64>,
    harvest: Vec<f64>,
    after: Vec<f64>,
    write: Vec<f64>,
    copied: Vec<f64>,
}

/// Two slots that take turns: shipping that takes no time.
struct AtOnce(Option<Slot>);

impl Exchange for AtOnce {
    fn exchange(&mut self, full: Slot) -> Result<Slot, StageError> {
        Ok(self.0.replace(full).expect("one of the two is always here"))
    }
}

struct Rig {
    guest: Arc<Mapping>,
    blocks: Vec<RamBlock>,
    tracker: UffdSyncTracker,
    dirty: DirtySet,
    none: DirtySet,
    slot: Option<Slot>,
    other: AtOnce,
    epoch: Epoch,
    _answering: Answering,
    _ends: Ends,
    // For as long as the rest: closing it would end the protection.
    _uffd: Uffd,
}

impl Rig {
    fn new(pages: u64) -> Result<Self, BenchError> {
        let len = pages as usize * PAGE_SIZE;
        let file = Arc::new(RamFile::memfd("bench-staging", len, PageSize::Small)?);
        let map = || file.map().map_err(BenchError::io("mapping the guest")).map(Arc::new);
        let (guest, alias) = (map()?, map()?);
        file.preallocate_through(&guest, 2, &|_| ())?;
        file.preallocate_through(&alias, 2, &|_| ())?;
        let vmm_address = guest.address();
        let blocks = vec![RamBlock { id: REGION, page_size: PageSize::Small, file, alias, vmm_address }];
        let uffd = Uffd::open(OpenMode::UserModeOnly, SYNC_FEATURES)?;
        uffd.register(vmm_address, len as u64, RegisterModes { faults: Faults::None, write_protect: true })?;
        let frames = ShardRange { region: REGION, frames: 0..pages };
        let groups = Groups::Fixed(GroupSize::new(1).expect("a page"));
        let faults = Arc::new(WriteFaults::new(&blocks, &[(uffd.try_clone()?, vec![frames])], groups)?);
        let answering = Answering::start(uffd.try_clone()?, Arc::clone(&faults), vmm_address);
        let mut tracker = UffdSyncTracker::new(&blocks, faults)?.holding(HELD_PAGES)?;
        tracker.start()?;
        let carrier = Carrier::within_this_host(FabricKind::Local, Device::default());
        let mut ends = Ends::new(&carrier)?;
        let shape = RingShape::of(RING_BYTES)?;
        let mut slot = || Slot::new(ends.initiator.as_mut(), RING_BYTES, shape);
        let (slot, other) = (Some(slot()?), AtOnce(Some(slot()?)));
        let set = || DirtySet::new([(REGION, pages)]);
        Ok(Self {
            guest,
            blocks,
            tracker,
            dirty: set(),
            none: set(),
            slot,
            other,
            epoch: Epoch(0),
            _answering: answering,
            _ends: ends,
            _uffd: uffd,
        })
    }

    fn write(&self, pages: &[u64], value: u64) {
        for &page in pages {
            self.guest.store_u64(PageIndex(page).offset(), value, Ordering::Relaxed);
        }
    }

    /// The harvest is made ready, and the guest writes on meanwhile: how long that took, in µs, and the writes.
    fn prepare(&mut self, value: u64) -> Result<(f64, u64), BenchError> {
        let all = (self.guest.len() / PAGE_SIZE) as u64;
        let (guest, stop) = (Arc::clone(&self.guest), AtomicBool::new(false));
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let (mut state, mut written) = (value, 0);
                while !stop.load(Ordering::Acquire) {
                    let page = PageIndex((random(&mut state) >> 33) % all);
                    guest.store_u64(page.offset(), value, Ordering::Relaxed);
                    written += 1;
                }
                written
            });
            let began = Instant::now();
            let outcome = self.tracker.prepare();
            let took = began.elapsed().as_nanos() as f64 / 1e3;
            stop.store(true, Ordering::Release);
            outcome?;
            Ok((took, writer.join().expect("a thread that writes memory does not panic")))
        })
    }

    /// The guest writes `pages`, stands still, and is checkpointed that way.
    fn epoch(&mut self, way: Way, pages: &[u64], samples: &mut Samples) -> Result<(), BenchError> {
        self.epoch = self.epoch.next();
        let value = self.epoch.0;
        self.write(pages, value);
        self.dirty.clear();
        let us = |since: Instant| since.elapsed().as_nanos() as f64 / 1e3;
        if matches!(way, Way::Copy | Way::Cow) {
            let (ahead, written) = self.prepare(value)?;
            samples.ahead.push(ahead);
            samples.meanwhile.push(written as f64);
        }
        let stopped = Instant::now();
        self.tracker.harvest(&mut self.dirty)?;
        self.tracker.sift(&mut self.dirty, &self.none)?;
        samples.harvest.push(us(stopped));
        if way == Way::Bare {
            samples.pause.push(us(stopped));
            return Ok(());
        }
        let slot = self.slot.take().expect("put back after each");
        let mut stager = Stager::begin(slot, &mut self.other, self.epoch, 1, 0, u64::MAX)?;
        stager.stream(DEVICE_STATE, DEVICE_VMM, &[1; 2048])?;
        if way == Way::Copy {
            stager.pages(&mut self.dirty, &self.blocks)?;
            samples.pause.push(us(stopped));
        } else {
            let mut held = self.tracker.hold(&self.dirty)?.expect("a tracker with room holds what is protected");
            samples.pause.push(us(stopped));
            let resumed = Instant::now();
            let again = &pages[pages.len().saturating_sub(AGAIN)..];
            let guest = Arc::clone(&self.guest);
            std::thread::scope(|scope| {
                let writer = scope.spawn(move || {
                    let began = Instant::now();
                    for &page in again {
                        guest.store_u64(PageIndex(page).offset(), value + 1, Ordering::Relaxed);
                    }
                    us(began) / again.len() as f64
                });
                stager.held_pages(&mut self.dirty, &self.blocks, held.as_mut())?;
                samples.after.push(us(resumed));
                samples.write.push(writer.join().unwrap_or(f64::NAN));
                samples.copied.push(held.end()? as f64);
                Ok::<_, BenchError>(())
            })?;
        }
        self.slot = Some(stager.finish()?.0);
        Ok(())
    }
}

/// The next of a sequence that its upper bits make look random (a linear congruential generator, Knuth's MMIX).
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state
}

/// So many different pages anywhere in `OF` times as many, in no order.
fn scattered(pages: u64, seed: u64) -> Vec<u64> {
    let mut all: Vec<u64> = (0..pages * OF).collect();
    let mut state = seed | 1;
    for at in 0..pages as usize {
        let other = at + ((random(&mut state) >> 33) as usize) % (all.len() - at);
        all.swap(at, other);
    }
    all.truncate(pages as usize);
    all
}

/// Runs the suite.
pub fn run(args: &StagingArgs) -> Result<ExitCode, BenchError> {
    let quick = args.output.quick;
    let (pages, epochs) = if quick { (args.pages / 10, 5) } else { (args.pages, 9) };
    let mut rig = Rig::new(pages * OF)?;
    let mut samples = Way::ALL.map(|_| Samples::default());
    let bar = args.output.progress(epochs + 1);
    // The first round is warm-up.
    for round in 0..=epochs {
        for (way, samples) in Way::ALL.into_iter().zip(&mut samples) {
            let dirty = scattered(pages, round * Way::ALL.len() as u64 + way as u64);
            match round {
                0 => rig.epoch(way, &dirty, &mut Samples::default())?,
                _ => rig.epoch(way, &dirty, samples)?,
            }
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    let mut report = Report::new("staging", &args.output);
    let [bare, copy, cow, _] = &samples;
    for (way, of) in Way::ALL.into_iter().zip(&samples) {
        report.cases.push(case(way, pages, of, bare));
    }
    for case in &report.cases {
        case.print();
    }
    let last = &report.cases[Way::Cow as usize];
    let ratio =
        |of: &Samples| median(&cow.pause.iter().zip(&of.pause).map(|(ours, theirs)| ours / theirs).collect::<Vec<_>>());
    report.goals = vec![
        Goal::at_most(last, "pause over copying's", "", ratio(copy), GOALS[0]),
        Goal::at_most(last, "pause over harvesting and protecting alone", "", ratio(bare), GOALS[1]),
    ];
    args.output.finish(&report)
}

fn case(way: Way, pages: u64, of: &Samples, bare: &Samples) -> Case {
    let mut case = Case::new(way.name()).with("pages", pages).with("of", pages * OF);
    let pause = Measure::new("pause", "us", Better::Lower, of.pause.clone());
    case.measures.push(match way {
        Way::Bare => pause,
        Way::Copy | Way::Cow | Way::CowUnprepared => pause.beside(Way::Bare.name(), bare.pause.clone()),
    });
    let more = [
        ("  harvest", "us", &of.harvest),
        ("made ready before it", "us", &of.ahead),
        ("writes meanwhile", "writes", &of.meanwhile),
        ("staged after the resume", "us", &of.after),
        ("first write meanwhile", "us", &of.write),
        ("copied on write", "pages", &of.copied),
    ];
    let more = more.into_iter().filter(|(.., rounds)| !rounds.is_empty());
    case.measures.extend(more.map(|(name, unit, rounds)| Measure::new(name, unit, Better::Lower, rounds.clone())));
    case
}
