//! Two ends of a session in one process, over each fabric.
#![allow(dead_code, reason = "each test binary uses its own part of this")]

use belay_transport::fabric::verbs::VerbsSettings;
use belay_transport::fabric::{
    self, FabricKind, Initiator, Lane, LaneId, LaneKind, LocalKey, Owner, Read, ReadKey, RevokedRing, RingKeys, Write,
};
use belay_transport::region::{Extent, Mapping, RamFile};
use belay_transport::session::{
    Address, Credentials, DestinationSession, Listener, Offer, Security, SessionConfig, SourceSession, connect, keygen,
};
use belay_transport::{Deadline, PageSize};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

pub const FAULT: LaneId = LaneId { kind: LaneKind::Fault, index: 0 };
pub const BULK: LaneId = LaneId { kind: LaneKind::Bulk, index: 0 };
pub const CHECKPOINT: LaneId = LaneId { kind: LaneKind::Checkpoint, index: 0 };
pub const HEARTBEAT: LaneId = LaneId { kind: LaneKind::Checkpoint, index: 1 };

pub const RAM_BYTES: usize = 4 << 20;
pub const RING_BYTES: usize = 1 << 20;
/// Guest RAM that is a hole at the owner and not exported.
pub const HOLE: Extent = Extent { offset: 1 << 20, len: 1 << 20 };

/// Long enough for a loaded machine, short enough for a test that hangs.
pub fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(20))
}

/// What the owner read of the ring when nothing could commit any more; nothing at a second revocation.
pub struct Revoked {
    pub bytes: Vec<u8>,
    /// Whether the fabric says that it stands still.
    pub still: bool,
}

/// Revokes `owner`'s session and keeps what it read last.
pub fn revoke(owner: &mut dyn Owner) -> Revoked {
    let (mut kept, mut still) = (Vec::new(), false);
    let mut keep = |ring: RevokedRing<'_>| {
        kept = vec![0; ring.len()];
        ring.read(0, &mut kept);
        still = matches!(ring, RevokedRing::Still(_));
    };
    owner.revoke(&mut keep, soon()).unwrap();
    Revoked { bytes: kept, still }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Over {
    Local,
    Tcp,
    Tls,
    /// Control over loopback without TLS, data over this host's RDMA device.
    Verbs,
    /// As above, with TLS.
    VerbsTls,
}

impl Over {
    pub fn is_verbs(self) -> bool {
        matches!(self, Self::Verbs | Self::VerbsTls)
    }
}

/// The RDMA settings of tests: the device that BELAY_VERBS_DEVICE names, or the only one there is. `None`, and said so, on a host
/// without any.
pub fn verbs_settings() -> Option<VerbsSettings> {
    let device = std::env::var("BELAY_VERBS_DEVICE").ok();
    let some = std::fs::read_dir("/sys/class/infiniband").is_ok_and(|mut devices| devices.next().is_some());
    if some || device.is_some() {
        return Some(VerbsSettings { device, trusted: true, ..VerbsSettings::default() });
    }
    eprintln!("skipped: no RDMA device on this host");
    None
}

/// Key pairs of both sides: (source's configuration, destination's).
pub fn tls_configs(dir: &Path) -> (SessionConfig, SessionConfig) {
    let source = keygen(dir, "source").expect("keygen");
    let destination = keygen(dir, "destination").expect("keygen");
    let of = |own: &belay_transport::session::KeyPair, peer: &belay_transport::session::KeyPair| {
        let credentials = Credentials::load(&own.cert, &own.key, &peer.cert).expect("fresh credentials load");
        SessionConfig::new(Security::Tls(credentials))
    };
    (of(&source, &destination), of(&destination, &source))
}

pub struct Session {
    pub source: SourceSession,
    pub destination: DestinationSession,
    pub dir: tempfile::TempDir,
    /// Kept until the end: the session's lanes come through it.
    pub listener: Listener,
}

pub fn meet(over: Over) -> Session {
    meet_with(over, |_| {})
}

pub fn meet_with(over: Over, change: impl Fn(&mut SessionConfig)) -> Session {
    let dir = tempfile::tempdir().expect("temporary directory");
    let plain = || SessionConfig::new(Security::LoopbackOnly);
    let (address, (mut source, mut destination)) = match over {
        Over::Local => (Address::Unix(dir.path().join("belay.sock")), (plain(), plain())),
        Over::Tcp => (Address::Tcp("127.0.0.1:0".to_owned()), (plain(), plain())),
        Over::Verbs => (Address::Tcp("127.0.0.1:0".to_owned()), (plain(), plain())),
        Over::Tls | Over::VerbsTls => (Address::Tcp("127.0.0.1:0".to_owned()), tls_configs(dir.path())),
    };
    if over.is_verbs() {
        for config in [&mut source, &mut destination] {
            config.verbs = verbs_settings();
            config.only = Some(FabricKind::Verbs);
        }
    }
    change(&mut source);
    change(&mut destination);
    let listener = Listener::bind(&address, destination).expect("bind");
    let (source, destination) = std::thread::scope(|scope| {
        let dialled = scope.spawn(|| connect(listener.address(), source, &Offer::default(), soon()));
        let accepted = listener.accept(soon()).expect("accept").accept(b"", soon()).expect("reply");
        (dialled.join().expect("no panic").expect("connect"), accepted)
    });
    Session { source, destination, dir, listener }
}

pub fn memory(len: usize) -> (RamFile, Arc<Mapping>) {
    let file = RamFile::memfd("belay-conformance", len, PageSize::Small).expect("memfd");
    let mapping = Arc::new(file.map().expect("mmap"));
    (file, mapping)
}

/// What the owner's RAM holds at `offset`.
pub fn expected(offset: usize) -> u8 {
    ((offset as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

/// A session with everything exported and registered, and no lane yet.
pub struct World {
    pub owner: Box<dyn Owner>,
    pub initiator: Box<dyn Initiator>,
    pub ram: ReadKey,
    pub ring_keys: RingKeys,
    pub ring: Arc<Mapping>,
    pub owner_region: Arc<Mapping>,
    /// The initiator's memory, [`RAM_BYTES`] long.
    pub local: Arc<Mapping>,
    pub local_key: LocalKey,
    pub files: Vec<RamFile>,
    pub session: Session,
}

pub fn world(over: Over) -> World {
    world_in(meet(over))
}

pub fn world_in(session: Session) -> World {
    let mut owner = fabric::owner(&session.source).expect("owner");
    let mut initiator = fabric::initiator(&session.destination).expect("a data path");
    let (ram_file, ram_map) = memory(RAM_BYTES);
    let hole = HOLE.offset as usize..(HOLE.offset + HOLE.len) as usize;
    for run in [0..hole.start, hole.end..RAM_BYTES] {
        let bytes: Vec<u8> = run.clone().map(expected).collect();
        ram_map.write(run.start, &bytes);
    }
    let extents = [
        Extent { offset: 0, len: HOLE.offset },
        Extent { offset: HOLE.offset + HOLE.len, len: RAM_BYTES as u64 - HOLE.offset - HOLE.len },
    ];
    let ram = owner.export_read(&ram_file, &ram_map, &extents).expect("export RAM");
    let (ring_file, ring) = memory(RING_BYTES);
    let (region_file, owner_region) = memory(4096);
    let ring_keys = owner.export_ring((&ring_file, &ring), (&region_file, &owner_region)).expect("export ring");
    let (local_file, local) = memory(RAM_BYTES);
    let local_key = initiator.register_local(&local).expect("register");
    let files = vec![ram_file, ring_file, region_file, local_file];
    World { owner, initiator, ram, ring_keys, ring, owner_region, local, local_key, files, session }
}

impl World {
    pub fn lane(&mut self, id: LaneId, window: usize) -> Box<dyn Lane> {
        self.owner.serve_lane(id, soon()).expect("serve");
        self.initiator.open_lane(id, window, soon()).expect("open")
    }

    /// A read of RAM into the same place of local memory.
    pub fn read(&self, id: u64, offset: usize, len: usize) -> Read {
        Read {
            id,
            remote: self.ram,
            remote_offset: offset as u64,
            local: self.local_key,
            local_offset: offset as u64,
            len: len as u32,
        }
    }

    /// A write of local memory at `from` to the ring at `to`.
    pub fn write(&self, id: u64, from: usize, to: usize, len: usize) -> Write {
        Write {
            id,
            remote: self.ring_keys.ring,
            remote_offset: to as u64,
            local: self.local_key,
            local_offset: from as u64,
            len: len as u32,
        }
    }

    pub fn assert_local(&self, offset: usize, len: usize) {
        let got = bytes(&self.local, offset, len);
        let first = got.iter().enumerate().find(|(at, byte)| **byte != expected(offset + at));
        assert!(first.is_none(), "byte {} of {offset}+{len} is wrong", first.map_or(0, |(at, _)| at));
    }
}

pub fn bytes(mapping: &Mapping, offset: usize, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    mapping.read(offset, &mut out);
    out
}

/// Waits for `count` completions and gives their ids in order.
pub fn complete(lane: &mut dyn Lane, count: usize) -> Vec<u64> {
    let mut ids = Vec::new();
    let mut some = [0; 7];
    while ids.len() < count {
        lane.wait(soon()).expect("completes");
        let got = lane.poll(&mut some).expect("completes");
        ids.extend_from_slice(&some[..got]);
    }
    assert_eq!(ids.len(), count, "more completed than was posted");
    ids
}
