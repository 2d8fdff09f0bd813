//! A guest's memory, a source and an engine between them, for one test.

use super::lane::{Control, MemoryLane};
use crate::deadline::Deadline;
use crate::fabric::{LaneKind, LocalKey, ReadKey};
use crate::pages::{PageStates, RegionGeometry};
use crate::pull::*;
use crate::region::{Extent, Mapping, RamFile};
use crate::uffd::{Faults, Features, OpenMode, RegisterModes, Uffd};
use crate::units::PageSize;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};

pub const BOUND: Duration = Duration::from_secs(20);
pub const REGION: RegionId = RegionId(3);

/// The guest's memory, as its threads touch it.
#[derive(Clone)]
pub enum Guest {
    File(Arc<Mapping>),
    Anonymous(Arc<Anonymous>),
}

impl Guest {
    pub fn address(&self) -> u64 {
        match self {
            Self::File(mapping) => mapping.address(),
            Self::Anonymous(memory) => memory.start as u64,
        }
    }

    /// First word of a 4 KiB page. Waits for the page if it has not arrived.
    pub fn word(&self, page: u64) -> u64 {
        let at = (self.address() + page * 4096) as *const u64;
        // SAFETY: inside the guest's memory, aligned; volatile, because others write it.
        unsafe { at.read_volatile() }
    }

    pub fn write(&self, page: u64, value: u64) {
        let at = (self.address() + page * 4096) as *mut u64;
        // SAFETY: inside the guest's memory, aligned; volatile, because others read it.
        unsafe { at.write_volatile(value) }
    }

    pub fn advise(&self, page: u64, pages: u64, advice: i32) {
        let at = (self.address() + page * 4096) as *mut libc::c_void;
        // SAFETY: the range lies inside the guest's memory, to which no references exist.
        let outcome = unsafe { libc::madvise(at, (pages * 4096) as usize, advice) };
        assert_eq!(outcome, 0, "{}", std::io::Error::last_os_error());
    }
}

/// Private anonymous memory, as of a VMM whose frames cannot be shared.
pub struct Anonymous {
    start: *mut libc::c_void,
    len: usize,
}

// SAFETY: plain memory, accessed by volatile reads and writes only.
unsafe impl Send for Anonymous {}
// SAFETY: as above.
unsafe impl Sync for Anonymous {}

impl Anonymous {
    fn new(len: usize) -> Self {
        let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a null hint: no existing mapping is replaced.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, access, flags, -1, 0) };
        assert_ne!(start, libc::MAP_FAILED);
        Self { start, len }
    }
}

impl Drop for Anonymous {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`, whose last user this is.
        unsafe { libc::munmap(self.start, self.len) };
    }
}

/// Where pages land, and how that was allocated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Memory {
    Populated,
    Reserved,
    Bounce,
}

impl Memory {
    pub const ALL: [Self; 3] = [Self::Populated, Self::Reserved, Self::Bounce];
}

pub struct Options {
    pub pages: u64,
    pub page_size: PageSize,
    pub memory: Memory,
    pub install: Install,
    pub shards: u64,
    pub classes: Option<Vec<ClassRun>>,
    pub paused: bool,
    pub demand_permits: u64,
    pub timeout: Duration,
    pub features: Features,
    pub log: Option<Arc<FaultLog>>,
    pub bubble_bytes: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            pages: 256,
            page_size: PageSize::Small,
            memory: Memory::Populated,
            install: Install::Clean,
            shards: 1,
            classes: None,
            paused: true,
            demand_permits: u64::MAX,
            timeout: BOUND,
            features: Features::NONE,
            log: None,
            bubble_bytes: Tuning::default().bubble_bytes,
        }
    }
}

pub struct Rig {
    pub engine: Option<Engine>,
    pub guest: Guest,
    pub file: Option<RamFile>,
    pub alias: Option<Arc<Mapping>>,
    pub demand: Arc<Control>,
    pub bulk: Arc<Control>,
    pub uffds: Vec<Uffd>,
    pub pages: u64,
    pub failed: mpsc::Receiver<String>,
    pub told: Arc<Told>,
}

/// What the source has in a page.
pub fn content(page: u64) -> u64 {
    (page + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// What an engine with [`Install::Protected`] tells.
#[derive(Default)]
pub struct Told {
    /// Pages whose protection was lifted because they were written.
    pub written: std::sync::Mutex<Vec<u64>>,
    pub shown_again: std::sync::Mutex<Vec<u64>>,
    pub given_up: std::sync::Mutex<Vec<u64>>,
}

struct Tell(std::sync::Mutex<mpsc::Sender<String>>, Arc<Told>, u64);

impl Observer for Tell {
    fn failed(&self, failure: &PullFailure) {
        let _ = self.0.lock().unwrap().send(failure.to_string());
    }

    fn shown_again(&self, region: RegionId, page: PageIndex) {
        assert_eq!(region, REGION);
        self.1.shown_again.lock().unwrap().push(page.0);
    }

    fn given_up(&self, region: RegionId, page: PageIndex) {
        assert_eq!(region, REGION);
        self.1.given_up.lock().unwrap().push(page.0);
    }

    fn write_fault(&self, uffd: &Uffd, region: RegionId, page: PageIndex) -> bool {
        self.1.written.lock().unwrap().push(page.0);
        region == REGION && uffd.writeprotect(self.2 + page.0 * 4096, 4096, false).is_ok()
    }
}

impl Rig {
    /// `None` (said on stderr) where the machine cannot.
    pub fn new(options: Options) -> Option<Self> {
        let bytes = (options.pages * 4096) as usize;
        let source = RamFile::memfd("pull-source", bytes, PageSize::Small).unwrap().map().unwrap();
        for page in 0..options.pages {
            let words: Vec<u8> = std::iter::repeat_n(content(page).to_ne_bytes(), 512).flatten().collect();
            source.write((page * 4096) as usize, &words);
        }
        let source = Arc::new(source);
        let frames = bytes as u64 >> options.page_size.shift();
        let all_peer = || vec![ClassRun { class: PageClass::Peer, frames }];
        let (demand_timeout, bubble_bytes) = (options.timeout, options.bubble_bytes);
        let tuning = Tuning { demand_timeout, bubble_bytes, ..Tuning::default() };
        let (install, start_paused) = (options.install, options.paused);
        let mut plan = PullPlan { regions: Vec::new(), install, tuning, start_paused, log: options.log };

        let (guest, file, local, landing, faults);
        if options.memory == Memory::Bounce {
            let needed = plan.bounce_bytes(options.shards as usize);
            local = Arc::new(RamFile::memfd("pull-bounce", needed, PageSize::Small).unwrap().map().unwrap());
            landing = LandingPlan::Bounce { buffers: local.clone(), key: LocalKey(1) };
            (guest, file, faults) = (Guest::Anonymous(Arc::new(Anonymous::new(bytes))), None, Faults::Missing);
        } else {
            let ram = RamFile::memfd("pull-guest", bytes, options.page_size).unwrap();
            local = Arc::new(ram.map().unwrap());
            match options.memory {
                Memory::Reserved => ram.reserve(Extent { offset: 0, len: bytes as u64 }).unwrap(),
                _ => ram.preallocate_through(&local, 1, &|_| ()).unwrap(),
            }
            landing = LandingPlan::InPlace { alias: local.clone(), key: LocalKey(1), whole: ram.is_whole().unwrap() };
            guest = Guest::File(Arc::new(ram.map().unwrap()));
            (file, faults) = (Some(ram), Faults::MissingAndMinor);
        }
        plan.regions.push(RegionPlan {
            id: REGION,
            page_size: options.page_size,
            vmm_address: guest.address(),
            bytes: bytes as u64,
            landing,
            remote: ReadKey(7),
            classes: options.classes.unwrap_or_else(all_peer),
        });

        let (demand, bulk) = (Control::new(options.demand_permits), Control::new(u64::MAX));
        let (mut shards, mut uffds) = (Vec::new(), Vec::new());
        let mut asked = options.features;
        if options.memory == Memory::Bounce {
            asked = asked.union(Features::EVENT_REMOVE);
        }
        for shard in 0..options.shards {
            let uffd = match Uffd::open(OpenMode::All, asked) {
                Ok(uffd) => uffd,
                Err(error) => {
                    eprintln!("skipped: {error}");
                    return None;
                }
            };
            let frames = frames * shard / options.shards..frames * (shard + 1) / options.shards;
            let at = |frame: u64| frame << options.page_size.shift();
            let modes = RegisterModes { faults, write_protect: options.install != Install::Clean };
            uffd.register(guest.address() + at(frames.start), at(frames.end - frames.start), modes).unwrap();
            uffds.push(uffd.try_clone().unwrap());
            shards.push(ShardParts {
                uffd,
                fault: MemoryLane::new(LaneKind::Fault, &source, &local, &demand),
                bulk: MemoryLane::new(LaneKind::Bulk, &source, &local, &bulk),
                core: None,
                ranges: vec![ShardRange { region: REGION, frames }],
            });
        }
        let geometry = RegionGeometry { id: REGION, page_size: options.page_size, frames };
        let states = Arc::new(PageStates::in_memory(&[geometry]).unwrap());
        let (tell, failed) = mpsc::channel();
        let told = Arc::new(Told::default());
        let observer = Arc::new(Tell(std::sync::Mutex::new(tell), told.clone(), guest.address()));
        let alias = (!(options.memory == Memory::Bounce)).then_some(local);
        let engine = Engine::start(plan, shards, states, observer).unwrap();
        Some(Self { engine: Some(engine), guest, file, alias, demand, bulk, uffds, pages: options.pages, failed, told })
    }

    pub fn engine(&self) -> &Engine {
        self.engine.as_ref().unwrap()
    }

    /// A guest thread that reads one page.
    pub fn touch(&self, page: u64) -> JoinHandle<u64> {
        let guest = self.guest.clone();
        thread::spawn(move || guest.word(page))
    }

    pub fn punch(&self, page: u64) {
        self.file.as_ref().unwrap().punch(Extent { offset: page * 4096, len: 4096 }).unwrap();
    }

    pub fn pull_all(&self) {
        self.engine().resume_background();
        self.engine().wait_all_landed(Deadline::after(BOUND)).unwrap();
    }

    pub fn discards(&self) -> Vec<u64> {
        self.all_discards().into_iter().map(|discard| discard.page.0).collect()
    }

    pub fn all_discards(&self) -> Vec<Discard> {
        let mut all = Vec::new();
        self.engine().take_discards(&mut |discard| {
            assert_eq!(discard.region, REGION);
            all.push(discard);
        });
        all
    }

    pub fn state(&self, page: u64) -> State {
        self.engine().states().state_at(0, FrameIndex(page))
    }

    pub fn stop(mut self) -> Stats {
        self.engine.take().unwrap().stop(Deadline::after(BOUND)).unwrap()
    }
}

/// Waits until `what` holds, by looking.
pub fn until(mut what: impl FnMut() -> bool) {
    let deadline = Deadline::after(BOUND);
    while !what() {
        assert!(!deadline.expired(), "it never came to hold");
        thread::yield_now();
    }
}

pub fn joined<T>(thread: JoinHandle<T>) -> T {
    until(|| thread.is_finished());
    thread.join().unwrap()
}
