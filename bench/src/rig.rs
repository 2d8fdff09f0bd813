//! A source, a session over a real fabric and an engine, in one process.

use crate::carrier::Carrier;
use crate::cores::Cores;
use crate::error::BenchError;
use crate::leavings::{self, Remembered};
use belay_transport::fabric::{
    FabricKind, Initiator, Lane, LaneId, LaneKind, LocalKey, Owner, ReadKey, initiator, owner,
};
use belay_transport::pages::{PageStates, RegionGeometry};
use belay_transport::pull::{
    ClassRun, Engine, Install, LandingPlan, NoObserver, Observer, PageClass, PullPlan, RegionPlan, ShardParts,
    ShardRange, Tuning,
};
use belay_transport::region::{Extent, Mapping, RamFile};
use belay_transport::session::{Address, DestinationSession, Listener, Offer, Security, SourceSession, connect};
use belay_transport::uffd::{Faults, Features, OpenMode, RegisterModes, Uffd};
use belay_transport::{Deadline, PageSize, RegionId};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Bound of everything that is waited for.
pub const BOUND: Duration = Duration::from_secs(60);

pub fn soon() -> Deadline {
    Deadline::after(BOUND)
}

/// Guest RAM at the source, filled once.
pub struct Source {
    pub file: Arc<RamFile>,
    pub mapping: Arc<Mapping>,
}

impl Source {
    /// Every page begins with its number + 1.
    pub fn new(len: usize) -> Result<Self, BenchError> {
        let source = Self::zeroed(len)?;
        for page in 0..len / 4096 {
            source.mapping.write(page * 4096, &(page as u64 + 1).to_ne_bytes());
        }
        Ok(source)
    }

    /// Allocated to the last page.
    pub fn zeroed(len: usize) -> Result<Self, BenchError> {
        let file = RamFile::memfd("bench-source", len, PageSize::Small)?;
        file.preallocate(2, &|_| ())?;
        let mapping = file.map().map_err(BenchError::io("mapping the source"))?;
        Ok(Self { file: Arc::new(file), mapping: Arc::new(mapping) })
    }
}

/// Both ends of a session over a real fabric.
pub struct Ends {
    pub owner: Box<dyn Owner>,
    pub initiator: Box<dyn Initiator>,
    destination: DestinationSession,
    source: AtSource,
}

/// What the source has of a session beside its data path.
pub struct AtSource {
    _session: (SourceSession, Listener, SocketPath),
}

/// A socket's path, removed when dropped.
struct SocketPath(Option<(PathBuf, Remembered)>);

impl Drop for SocketPath {
    fn drop(&mut self) {
        if let Some((path, _)) = &self.0 {
            // The listener may have removed it already.
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Ends {
    pub fn new(carrier: &Carrier) -> Result<Self, BenchError> {
        Self::secured(carrier, [Security::LoopbackOnly, Security::LoopbackOnly])
    }

    /// With the security of the source and of the destination.
    pub fn secured(carrier: &Carrier, [source, destination]: [Security; 2]) -> Result<Self, BenchError> {
        let (address, path) = address(carrier);
        let (source, destination) = (carrier.session(source, &address)?, carrier.session(destination, &address)?);
        let listener = Listener::bind(&address, destination)?;
        let (dialled, destination) = std::thread::scope(|scope| {
            let dialled = scope.spawn(|| connect(listener.address(), source, &Offer::default(), soon()));
            let destination = listener.accept(soon()).and_then(|incoming| incoming.accept(b"", soon()));
            (dialled.join(), destination)
        });
        let dialled = dialled.map_err(|_| BenchError::Thread("dialling"))??;
        let destination = destination?;
        let (owner, initiator) = (owner(&dialled)?, initiator(&destination)?);
        Ok(Self { owner, initiator, destination, source: AtSource { _session: (dialled, listener, path) } })
    }

    /// The destination's end goes away, as when its process dies.
    pub fn lose_destination(self) -> (Box<dyn Owner>, AtSource) {
        drop((self.initiator, self.destination));
        (self.owner, self.source)
    }

    /// Opens a lane at both ends. What the initiator reads into and writes from is registered before the first one.
    pub fn lane(&mut self, kind: LaneKind, index: u16) -> Result<Box<dyn Lane>, BenchError> {
        let id = LaneId { kind, index };
        self.owner.serve_lane(id, soon())?;
        Ok(self.initiator.open_lane(id, 64, soon())?)
    }
}

/// Where pulled pages go: guest RAM by its alias, and where the guest has it mapped.
pub struct Landing {
    pub alias: Arc<Mapping>,
    pub key: LocalKey,
    pub guest_address: u64,
    pub uffd: Uffd,
    pub install: Install,
}

impl Landing {
    /// `len` bytes that no vCPU uses, allocated and registered: the mapping that faults, and how to land in it.
    pub fn new(initiator: &mut dyn Initiator, len: usize) -> Result<(Mapping, Self), BenchError> {
        let file = RamFile::memfd("bench-guest", len, PageSize::Small)?;
        let map = || file.map().map_err(BenchError::io("mapping the guest"));
        let (alias, guest) = (Arc::new(map()?), map()?);
        file.preallocate_through(&alias, 2, &|_| ())?;
        let uffd = Uffd::open(OpenMode::All, Features::MINOR_SHMEM.union(Features::MISSING_SHMEM))?;
        let modes = RegisterModes { faults: Faults::MissingAndMinor, write_protect: false };
        uffd.register(guest.address(), len as u64, modes)?;
        let key = initiator.register_local(&alias)?;
        let guest_address = guest.address();
        Ok((guest, Self { alias, key, guest_address, uffd, install: Install::Clean }))
    }
}

/// Starts an engine of one shard, with its background paused, over a lane for demand and one for the background.
pub fn engine(
    lanes: (Box<dyn Lane>, Box<dyn Lane>),
    remote: ReadKey,
    landing: Landing,
    tuning: Tuning,
) -> Result<Engine, BenchError> {
    engine_told(lanes, remote, landing, tuning, Arc::new(NoObserver))
}

/// As [`engine`], and `observer` hears of it.
pub fn engine_told(
    (fault, bulk): (Box<dyn Lane>, Box<dyn Lane>),
    remote: ReadKey,
    landing: Landing,
    tuning: Tuning,
    observer: Arc<dyn Observer>,
) -> Result<Engine, BenchError> {
    let Landing { alias, key, guest_address, uffd, install } = landing;
    let bytes = alias.len() as u64;
    let frames = bytes / 4096;
    let region = RegionPlan {
        id: RegionId(0),
        page_size: PageSize::Small,
        vmm_address: guest_address,
        bytes,
        landing: LandingPlan::InPlace { alias, key, whole: false },
        remote,
        classes: vec![ClassRun { class: PageClass::Peer, frames }],
    };
    let plan = PullPlan { regions: vec![region], install, tuning, start_paused: true, log: None };
    let shard = ShardParts {
        uffd,
        fault,
        bulk,
        ranges: vec![ShardRange { region: RegionId(0), frames: 0..frames }],
        core: None,
    };
    let geometry = RegionGeometry { id: RegionId(0), page_size: PageSize::Small, frames };
    let states = Arc::new(PageStates::in_memory(&[geometry])?);
    Ok(Engine::start(plan, vec![shard], states, observer)?)
}

/// How the memory of a pull's destination is made, and how it is pulled.
#[derive(Clone)]
pub struct Shape {
    pub page_size: PageSize,
    /// Into bounce buffers and copied, as where a VMM's frames cannot be shared; else in place.
    pub bounce: bool,
    pub shards: u16,
    /// Where the first shard's thread and those that touch are kept.
    pub cores: Option<Cores>,
    pub tuning: Tuning,
    /// What each frame is, if not all are the source's.
    pub classes: Option<Vec<ClassRun>>,
    /// Hears of the engine.
    pub observer: Arc<dyn Observer>,
    /// Of the source and of the destination.
    pub security: [Security; 2],
}

impl Default for Shape {
    fn default() -> Self {
        let security = [Security::LoopbackOnly, Security::LoopbackOnly];
        Self {
            page_size: PageSize::Small,
            bounce: false,
            shards: 1,
            cores: None,
            tuning: Tuning::default(),
            classes: None,
            observer: Arc::new(NoObserver),
            security,
        }
    }
}

/// One pull, from registration to stop, into memory that no vCPU uses.
pub struct Rig {
    pub engine: Engine,
    pub guest: Mapping,
    // Dropped after the engine.
    _ends: Ends,
}

impl Rig {
    /// With its background paused. Every shard has a userfaultfd, a lane for demand and one for the background.
    pub fn new(carrier: &Carrier, source: &Source, shape: &Shape) -> Result<Self, BenchError> {
        let mut ends = Ends::secured(carrier, shape.security.clone())?;
        let bytes = source.mapping.len();
        let file = RamFile::memfd("bench-guest", bytes, shape.page_size)?;
        let map = |file: &RamFile| file.map().map_err(BenchError::io("mapping the guest"));
        let guest = map(&file)?;
        let landing = match shape.bounce {
            true => {
                let slots = usize::from(shape.shards) * (shape.tuning.demand_reads + shape.tuning.bulk_chunks);
                let slot = (shape.tuning.chunk_bytes as usize).max(shape.page_size.bytes());
                let buffers = RamFile::memfd("bench-bounce", slots * slot, PageSize::Small)?;
                buffers.preallocate(1, &|_| ())?;
                let buffers = Arc::new(map(&buffers)?);
                let key = ends.initiator.register_local(&buffers)?;
                LandingPlan::Bounce { buffers, key }
            }
            false => {
                let alias = Arc::new(map(&file)?);
                file.preallocate_through(&alias, 2, &|_| ())?;
                let key = ends.initiator.register_local(&alias)?;
                LandingPlan::InPlace { alias, key, whole: false }
            }
        };
        let frames = bytes as u64 >> shape.page_size.shift();
        let region = RegionPlan {
            id: RegionId(0),
            page_size: shape.page_size,
            vmm_address: guest.address(),
            bytes: bytes as u64,
            landing,
            remote: ends.owner.export_read(
                &source.file,
                &source.mapping,
                &[Extent { offset: 0, len: bytes as u64 }],
            )?,
            classes: shape.classes.clone().unwrap_or_else(|| vec![ClassRun { class: PageClass::Peer, frames }]),
        };
        let shards = (0..shape.shards).map(|index| {
            let of = |index: u16| frames * u64::from(index) / u64::from(shape.shards);
            let range = ShardRange { region: RegionId(0), frames: of(index)..of(index + 1) };
            let (fault, bulk) = (ends.lane(LaneKind::Fault, index)?, ends.lane(LaneKind::Bulk, index)?);
            let core = shape.cores.filter(|_| index == 0).map(|cores| cores.server);
            Ok(ShardParts { uffd: shape.uffd(&guest, &range)?, fault, bulk, ranges: vec![range], core })
        });
        let shards = shards.collect::<Result<Vec<_>, BenchError>>()?;
        let (install, tuning) = (Install::Clean, shape.tuning);
        let plan = PullPlan { regions: vec![region], install, tuning, start_paused: true, log: None };
        let geometry = RegionGeometry { id: RegionId(0), page_size: shape.page_size, frames };
        let states = Arc::new(PageStates::in_memory(&[geometry])?);
        let engine = Engine::start(plan, shards, states, Arc::clone(&shape.observer))?;
        Ok(Self { engine, guest, _ends: ends })
    }
}

impl Shape {
    /// A userfaultfd that hears of the faults of these frames.
    fn uffd(&self, guest: &Mapping, range: &ShardRange) -> Result<Uffd, BenchError> {
        let (missing, minor) = match self.page_size {
            PageSize::Small => (Features::MISSING_SHMEM, Features::MINOR_SHMEM),
            PageSize::Huge => (Features::MISSING_HUGETLBFS, Features::MINOR_HUGETLBFS),
        };
        let (features, faults) = match self.bounce {
            true => (missing.union(Features::EVENT_REMOVE), Faults::Missing),
            false => (missing.union(minor), Faults::MissingAndMinor),
        };
        let uffd = Uffd::open(OpenMode::All, features)?;
        let at = |frame: u64| frame << self.page_size.shift();
        let modes = RegisterModes { faults, write_protect: false };
        uffd.register(guest.address() + at(range.frames.start), at(range.frames.end - range.frames.start), modes)?;
        Ok(uffd)
    }
}

fn address(carrier: &Carrier) -> (Address, SocketPath) {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    match carrier.only {
        None | Some(FabricKind::Tcp | FabricKind::Verbs) => (Address::Tcp("127.0.0.1:0".into()), SocketPath(None)),
        Some(FabricKind::Local) => {
            let name = format!("belay-bench-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
            let path = std::env::temp_dir().join(name);
            let remembered = leavings::path(&path);
            (Address::Unix(path.clone()), SocketPath(Some((path, remembered))))
        }
    }
}
