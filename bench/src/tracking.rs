//! `tracking`: what it costs a guest that its writes are tracked by userfaultfd write protection, and what is sent for it.
//!
//! The guest is a thread that writes a word of one page after the other, as a vCPU would; another answers its faults, as the pull engine
//! does, with the tracker's own code. No KVM: a vCPU's fault costs an exit more. Every way has memory of its own, and they take turns
//! epoch by epoch. Between the guest's turns it stands still, and its pages are harvested and sifted as for a checkpoint; what is left is
//! copied into an image, which must equal the guest's memory at the end.

use crate::error::BenchError;
use crate::report::{Better, Case, Goal, Measure, Output, Report};
use crate::table::median;
use belay_checkpoint::dirty::DirtySet;
use belay_checkpoint::guest::{DirtyTracker, RamBlock, TrackerKind};
use belay_checkpoint::tracker::{
    GroupSize, Groups, UffdSyncTracker, UffdWpTracker, WhoseMemory, WriteFaults, write_protection,
};
use belay_transport::pull::ShardRange;
use belay_transport::region::{Mapping, RamFile};
use belay_transport::uffd::{Event, Faults, OpenMode, RegisterModes, Uffd};
use belay_transport::{PAGE_SIZE, PageIndex, PageSize, RegionId};
use clap::Args;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const REGION: RegionId = RegionId(0);
const MEMORY_PAGES: u64 = 16_384;
/// Goals of adaptive groups against page by page: guest's time for a sequential writer, bytes for a random one.
const GOALS: [f64; 2] = [0.5, 1.2];

/// Measure what tracking by userfaultfd write protection costs a guest, and what is sent for it
#[derive(Debug, Clone, Args)]
pub struct TrackingArgs {
    #[command(flatten)]
    output: Output,
}

/// Which pages an epoch writes, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Writer {
    /// Half of memory from end to end, the same every time.
    Sequential,
    /// A tenth of memory anywhere, anew every time.
    Random,
    /// Every fourth page of half of memory, the same every time.
    Strided,
}

impl Writer {
    fn name(self) -> &'static str {
        match self {
            Self::Sequential => "sequential",
            Self::Random => "random",
            Self::Strided => "strided",
        }
    }

    fn pages(self, epoch: u64) -> Vec<u64> {
        match self {
            Self::Sequential => (0..MEMORY_PAGES / 2).collect(),
            Self::Strided => (0..MEMORY_PAGES / 2).step_by(4).collect(),
            Self::Random => {
                let mut state = epoch.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
                let mut next = || {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    (state >> 33) % MEMORY_PAGES
                };
                (0..MEMORY_PAGES / 10).map(|_| next()).collect()
            }
        }
    }
}

/// A way to track.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Untracked,
    Async,
    Sync(Groups),
}

impl Way {
    fn name(self) -> String {
        match self {
            Self::Untracked => "untracked".to_owned(),
            Self::Async => "uffd-wp (asynchronous)".to_owned(),
            Self::Sync(Groups::Adaptive) => "uffd-sync, adaptive groups".to_owned(),
            Self::Sync(groups) if groups == of(1) => "uffd-sync, page by page".to_owned(),
            Self::Sync(groups) if groups == of(16) => "uffd-sync, groups of 16".to_owned(),
            Self::Sync(_) => "uffd-sync, groups of 64".to_owned(),
        }
    }
}

fn of(pages: u64) -> Groups {
    Groups::Fixed(GroupSize::new(pages).expect("a power of two up to 64"))
}

/// Guest memory, who tracks it and who answers.
struct Tracked {
    way: Way,
    guest: Arc<Mapping>,
    alias: Arc<Mapping>,
    image: Mapping,
    tracker: Option<Box<dyn DirtyTracker>>,
    answers: Option<(Arc<WriteFaults>, Answering)>,
    dirty: DirtySet,
    discards: DirtySet,
    samples: Samples,
    // For as long as the rest: closing it would end the protection.
    _uffd: Option<Uffd>,
}

/// Of every epoch.
#[derive(Default)]
struct Samples {
    guest: Vec<f64>,
    faults: Vec<f64>,
    opened: Vec<f64>,
    sent: Vec<f64>,
    harvest: Vec<f64>,
}

/// The thread that answers write faults; ends when dropped.
pub struct Answering {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Answering {
    /// `start`: where the region that `faults` knows begins.
    pub fn start(uffd: Uffd, faults: Arc<WriteFaults>, start: u64) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let run = move || {
            let mut events = [Event::Remove { start: 0, end: 0 }; 32];
            while !told.load(Ordering::Acquire) {
                let _ =
                    poll(&mut [PollFd::new(&uffd, PollFlags::IN)], Some(&Timespec { tv_sec: 0, tv_nsec: 5_000_000 }));
                let Ok(count) = uffd.read_events(&mut events) else { return };
                for event in &events[..count] {
                    if let Event::Fault { address, .. } = *event {
                        faults.answer(REGION, PageIndex::containing((address - start) as usize));
                    }
                }
            }
        };
        Self { stop, thread: Some(std::thread::spawn(run)) }
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Tracked {
    fn new(way: Way) -> Result<Self, BenchError> {
        let len = MEMORY_PAGES as usize * PAGE_SIZE;
        let map = |file: &RamFile| file.map().map_err(BenchError::io("mapping the guest"));
        let file = Arc::new(RamFile::memfd("bench-tracking", len, PageSize::Small)?);
        file.preallocate(1, &|_| ())?;
        let (guest, alias) = (Arc::new(map(&file)?), Arc::new(map(&file)?));
        let image = map(&RamFile::memfd("bench-tracking-image", len, PageSize::Small)?)?;
        // Every page is in the page table by now, as it is once all have landed.
        (0..len).step_by(PAGE_SIZE).for_each(|at| guest.store_u64(at, 0, Ordering::Relaxed));
        let kind = match way {
            Way::Untracked => None,
            Way::Async => Some(TrackerKind::UffdWp),
            Way::Sync(_) => Some(TrackerKind::UffdSync),
        };
        let block = RamBlock {
            id: REGION,
            page_size: PageSize::Small,
            file,
            alias: Arc::clone(&alias),
            vmm_address: guest.address(),
        };
        let uffd = match kind.and_then(write_protection) {
            None => None,
            Some(features) => {
                let uffd = Uffd::open(OpenMode::UserModeOnly, features)?;
                let modes = RegisterModes { faults: Faults::None, write_protect: true };
                uffd.register(guest.address(), len as u64, modes)?;
                Some(uffd)
            }
        };
        let (mut tracker, answers): (Option<Box<dyn DirtyTracker>>, _) = match (way, &uffd) {
            (Way::Async, _) => (Some(Box::new(UffdWpTracker::new(WhoseMemory::Own, &[block])?)), None),
            (Way::Sync(groups), Some(uffd)) => {
                let frames = ShardRange { region: REGION, frames: 0..MEMORY_PAGES };
                let blocks = [block];
                let faults = Arc::new(WriteFaults::new(&blocks, &[(uffd.try_clone()?, vec![frames])], groups)?);
                let answering = Answering::start(uffd.try_clone()?, Arc::clone(&faults), guest.address());
                let tracker = UffdSyncTracker::new(&blocks, Arc::clone(&faults))?;
                (Some(Box::new(tracker)), Some((faults, answering)))
            }
            (Way::Untracked | Way::Sync(_), _) => (None, None),
        };
        if let Some(tracker) = &mut tracker {
            tracker.start()?;
        }
        let set = || DirtySet::new([(REGION, MEMORY_PAGES)]);
        let samples = Samples::default();
        Ok(Self { way, guest, alias, image, tracker, answers, dirty: set(), discards: set(), samples, _uffd: uffd })
    }

    /// The guest writes `pages`; then it stands still, and what it wrote is taken.
    fn epoch(&mut self, pages: &[u64], value: u64) -> Result<(), BenchError> {
        let answered = || self.answers.as_ref().map_or(0, |(faults, _)| faults.answered());
        let before = answered();
        let began = Instant::now();
        for page in pages {
            self.guest.store_u64(PageIndex(*page).offset(), value, Ordering::Relaxed);
        }
        let guest = began.elapsed();
        let faults = answered() - before;
        let Some(tracker) = &mut self.tracker else {
            self.samples.guest.push(guest.as_nanos() as f64);
            return Ok(());
        };
        self.dirty.clear();
        let began = Instant::now();
        tracker.harvest(&mut self.dirty)?;
        let opened = self.dirty.len();
        tracker.sift(&mut self.dirty, &self.discards)?;
        let harvest = began.elapsed();
        for (first, count) in self.dirty.runs(REGION) {
            self.image.copy_from(first.offset(), &self.alias, first.offset(), count as usize * PAGE_SIZE);
        }
        let samples = &mut self.samples;
        samples.guest.push(guest.as_nanos() as f64);
        samples.faults.push(faults as f64);
        samples.opened.push(opened as f64);
        samples.sent.push(self.dirty.len() as f64);
        samples.harvest.push(harvest.as_nanos() as f64 / 1e3);
        Ok(())
    }

    /// Whether nothing was missed.
    fn check(&self) -> Result<(), BenchError> {
        for page in 0..MEMORY_PAGES as usize {
            let read = |memory: &Mapping| memory.load_u64(page * PAGE_SIZE, Ordering::Relaxed);
            let (found, expected) = (read(&self.image), read(&self.alias));
            if self.tracker.is_some() && found != expected {
                return Err(BenchError::Wrong { page, found, expected });
            }
        }
        Ok(())
    }
}

/// Runs the suite.
pub fn run(args: &TrackingArgs) -> Result<ExitCode, BenchError> {
    let epochs = if args.output.quick { 8 } else { 24 };
    let ways = [
        Way::Untracked,
        Way::Async,
        Way::Sync(of(1)),
        Way::Sync(of(16)),
        Way::Sync(of(64)),
        Way::Sync(Groups::Adaptive),
    ];
    let mut report = Report::new("tracking", &args.output);
    let writers = [Writer::Sequential, Writer::Random, Writer::Strided];
    let bar = args.output.progress(writers.len() as u64 * epochs);
    for writer in writers {
        bar.set_message(format!("{writer:?} writer"));
        let mut tracked = ways.iter().map(|&way| Tracked::new(way)).collect::<Result<Vec<_>, _>>()?;
        for epoch in 1..=epochs {
            let pages = writer.pages(epoch);
            for one in &mut tracked {
                one.epoch(&pages, epoch)?;
                // Cores that have gone to sleep would be this turn's cost and not the way's.
                std::thread::sleep(Duration::from_micros(50));
            }
            bar.inc(1);
        }
        tracked.iter().try_for_each(Tracked::check)?;
        bar.suspend(|| print(writer, &tracked));
        let [untracked, rest @ ..] = &tracked[..] else { unreachable!("there are six ways") };
        report.cases.extend(rest.iter().map(|one| one.case(writer, &untracked.samples)));
        let of_way = |way: Way| tracked.iter().find(|one| one.way == way).expect("every way has been measured");
        let (adaptive, singly) = (of_way(Way::Sync(Groups::Adaptive)), of_way(Way::Sync(of(1))));
        let case = Case::new(adaptive.way.name()).with("writer", writer.name());
        let ratio = |of: &dyn Fn(&Tracked) -> f64| of(adaptive) / of(singly);
        match writer {
            Writer::Sequential => report.goals.push(Goal::at_most(
                &case,
                "the guest's slow-down over all epochs, over page by page",
                "",
                ratio(&|one| one.samples.guest.iter().sum::<f64>() - untracked.samples.guest.iter().sum::<f64>()),
                GOALS[0],
            )),
            Writer::Random => report.goals.push(Goal::at_most(
                &case,
                "bytes sent over all epochs, over page by page",
                "",
                ratio(&|one| one.samples.sent.iter().sum()),
                GOALS[1],
            )),
            Writer::Strided => {}
        }
    }
    bar.finish_and_clear();
    args.output.finish(&report)
}

impl Tracked {
    /// A round is an epoch.
    fn case(&self, writer: Writer, untracked: &Samples) -> Case {
        let samples = &self.samples;
        let written = writer.pages(1).len() as f64;
        let a_page = |guest: &[f64]| guest.iter().map(|ns| ns / written).collect::<Vec<_>>();
        let measure = |name: &str, unit: &str, of: &[f64]| Measure::new(name, unit, Better::Lower, of.to_vec());
        let sent: f64 = samples.sent.iter().sum();
        let mut case = Case::new(self.way.name()).with("writer", writer.name());
        case.measures = vec![
            measure("guest's time a page", "ns", &a_page(&samples.guest)).beside("untracked", a_page(&untracked.guest)),
            measure("write faults an epoch", "", &samples.faults),
            measure("pages opened an epoch", "", &samples.opened),
            measure("pages sent an epoch", "", &samples.sent),
            measure("harvest and sift, guest stopped", "us", &samples.harvest),
            measure("sent over all epochs", "MiB", &[sent * PAGE_SIZE as f64 / f64::from(1 << 20)]),
        ];
        case
    }
}

fn print(writer: Writer, tracked: &[Tracked]) {
    let written = writer.pages(1).len();
    println!("\n {writer:?} writer, {written} writes an epoch in {} MiB; medians of an epoch", MEMORY_PAGES >> 8);
    println!(
        " {:<28} {:>13} {:>9} {:>8} {:>8} {:>15} {:>17}",
        "", "guest[ns/page]", "#faults", "#opened", "#sent", "harvest[usec]", "all sent[MiB]"
    );
    for Tracked { way, samples, .. } in tracked {
        println!(
            " {:<28} {:>13.0} {:>9.0} {:>8.0} {:>8.0} {:>15.0} {:>17.1}",
            way.name(),
            median(&samples.guest) / written as f64,
            median(&samples.faults),
            median(&samples.opened),
            median(&samples.sent),
            median(&samples.harvest),
            samples.sent.iter().fold(0.0, |sum, pages| sum + pages) / 256.0
        );
    }
}
