//! A source, a session over a real fabric and an engine, in one process.

use crate::error::BenchError;
use belay_transport::fabric::{FabricKind, Initiator, LaneId, LaneKind, Owner, initiator, owner};
use belay_transport::pages::{PageStates, RegionGeometry};
use belay_transport::pull::{
    ClassRun, Engine, Install, LandingPlan, NoObserver, PageClass, PullPlan, RegionPlan, ShardParts, ShardRange, Tuning,
};
use belay_transport::region::{Extent, Mapping, RamFile};
use belay_transport::session::{
    Address, DestinationSession, Listener, Offer, Security, SessionConfig, SourceSession, connect,
};
use belay_transport::uffd::{Faults, Features, OpenMode, RegisterModes, Uffd};
use belay_transport::{Deadline, PageSize, RegionId};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Bound of everything that is waited for.
pub fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(60))
}

/// Guest RAM at the source, filled once.
pub struct Source {
    file: RamFile,
    mapping: Arc<Mapping>,
}

impl Source {
    pub fn new(len: usize) -> Result<Self, BenchError> {
        let file = RamFile::memfd("bench-source", len, PageSize::Small)?;
        file.preallocate(2, &|_| ())?;
        let mapping = Arc::new(file.map().map_err(BenchError::io("mapping the source"))?);
        for page in 0..len / 4096 {
            mapping.write(page * 4096, &(page as u64 + 1).to_ne_bytes());
        }
        Ok(Self { file, mapping })
    }
}

/// One pull, from registration to stop.
pub struct Rig {
    pub engine: Engine,
    pub guest: Mapping,
    // Ends of the session: dropped after the engine.
    _data: (Box<dyn Owner>, Box<dyn Initiator>),
    _session: (SourceSession, DestinationSession, Listener, SocketPath),
}

/// A socket's path, removed when dropped.
struct SocketPath(Option<PathBuf>);

impl Drop for SocketPath {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            // The listener may have removed it already.
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Rig {
    pub fn new(fabric: FabricKind, source: &Source, start_paused: bool) -> Result<Self, BenchError> {
        let len = source.mapping.len();
        let (address, path) = address(fabric);
        let config = || SessionConfig::new(Security::LoopbackOnly);
        let listener = Listener::bind(&address, config())?;
        let (dialled, destination) = std::thread::scope(|scope| {
            let dialled = scope.spawn(|| connect(listener.address(), config(), &Offer::default(), soon()));
            let destination = listener.accept(soon()).and_then(|incoming| incoming.accept(b"", soon()));
            (dialled.join(), destination)
        });
        let dialled = dialled.map_err(|_| BenchError::Thread("dialling"))??;
        let destination = destination?;
        let (mut owner, mut initiator) = (owner(&dialled)?, initiator(&destination));
        let whole = Extent { offset: 0, len: len as u64 };
        let remote = owner.export_read(&source.file, &source.mapping, &[whole])?;

        let file = RamFile::memfd("bench-guest", len, PageSize::Small)?;
        let map = || file.map().map_err(BenchError::io("mapping the guest"));
        let (alias, guest) = (Arc::new(map()?), map()?);
        file.preallocate_through(&alias, 2, &|_| ())?;
        let uffd = Uffd::open(OpenMode::All, Features::MINOR_SHMEM.union(Features::MISSING_SHMEM))?;
        let modes = RegisterModes { faults: Faults::MissingAndMinor, write_protect: false };
        uffd.register(guest.address(), len as u64, modes)?;
        let key = initiator.register_local(&alias)?;
        let mut lane = |kind| {
            let id = LaneId { kind, index: 0 };
            owner.serve_lane(id, soon())?;
            initiator.open_lane(id, 64, soon())
        };
        let (fault, bulk) = (lane(LaneKind::Fault)?, lane(LaneKind::Bulk)?);

        let frames = (len / 4096) as u64;
        let region = RegionPlan {
            id: RegionId(0),
            page_size: PageSize::Small,
            vmm_address: guest.address(),
            bytes: len as u64,
            landing: LandingPlan::InPlace { alias, key },
            remote,
            classes: vec![ClassRun { class: PageClass::Peer, frames }],
        };
        let plan = PullPlan { regions: vec![region], install: Install::Clean, tuning: Tuning::default(), start_paused };
        let shard =
            ShardParts { uffd, fault, bulk, ranges: vec![ShardRange { region: RegionId(0), frames: 0..frames }] };
        let geometry = RegionGeometry { id: RegionId(0), page_size: PageSize::Small, frames };
        let states = Arc::new(PageStates::in_memory(&[geometry])?);
        let engine = Engine::start(plan, vec![shard], states, Arc::new(NoObserver))?;
        Ok(Self { engine, guest, _data: (owner, initiator), _session: (dialled, destination, listener, path) })
    }
}

fn address(fabric: FabricKind) -> (Address, SocketPath) {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    match fabric {
        FabricKind::Tcp => (Address::Tcp("127.0.0.1:0".into()), SocketPath(None)),
        FabricKind::Local => {
            let name = format!("belay-bench-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
            let path = std::env::temp_dir().join(name);
            (Address::Unix(path.clone()), SocketPath(Some(path)))
        }
    }
}
