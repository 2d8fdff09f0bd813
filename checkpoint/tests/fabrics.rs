//! Commit, revocation and catch over the real fabrics.

use belay_checkpoint::dirty::DirtySet;
use belay_checkpoint::epoch::{Heartbeat, HeartbeatConfig};
use belay_checkpoint::fold::{FoldConfig, FoldState, FoldTarget, Folder};
use belay_checkpoint::guest::{Epoch, RamBlock};
use belay_checkpoint::record::{Limits, kind, largest_record};
use belay_checkpoint::ring::{Mailbox, OWNER_REGION_BYTES, OwnerRegion, RingReader, RingShape, RingWriter};
use belay_checkpoint::staging::{Exchange, Slot, StageError, Stager};
use belay_transport::fabric::{self, LaneId, LaneKind, RevokedRing};
use belay_transport::region::{Mapping, RamFile};
use belay_transport::session::{Address, Listener, Offer, Security, SessionConfig, connect};
use belay_transport::{Deadline, PAGE_SIZE, PageIndex, PageSize, RegionId};
use std::sync::Arc;
use std::time::Duration;

const NONCE: u64 = 0xbe1a;
const PAGES: u64 = 64;
const RING: usize = 128 << 10;

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(20))
}

fn memory(len: usize) -> (RamFile, Arc<Mapping>) {
    let file = RamFile::memfd("belay-fabrics-test", len, PageSize::Small).unwrap();
    let mapping = Arc::new(file.map().unwrap());
    (file, mapping)
}

fn ram() -> Vec<RamBlock> {
    let (file, alias) = memory(PAGES as usize * PAGE_SIZE);
    vec![RamBlock { id: RegionId(0), page_size: PageSize::Small, file: Arc::new(file), alias, vmm_address: 0 }]
}

struct NoExchange;

impl Exchange for NoExchange {
    fn exchange(&mut self, _: Slot) -> Result<Slot, StageError> {
        Err(StageError::ShippingEnded)
    }
}

/// Every page of `epoch` holds its number.
fn stage(slot: Slot, epoch: Epoch, memory: &[RamBlock]) -> Slot {
    memory[0].alias.write(0, &vec![epoch.0 as u8; PAGES as usize * PAGE_SIZE]);
    let mut dirty = DirtySet::new([(RegionId(0), PAGES)]);
    dirty.insert_run(RegionId(0), PageIndex(0), PAGES);
    let mut exchange = NoExchange;
    let mut stager = Stager::begin(slot, &mut exchange, epoch, 1, 0, u64::MAX).unwrap();
    stager.stream(kind::DEVICE_STATE, 0, &epoch.0.to_le_bytes()).unwrap();
    stager.pages(&mut dirty, memory).unwrap();
    stager.finish().unwrap().0
}

/// Ships epoch after epoch, each larger than the ring, until the source takes the session back after `delay`; checks that what is
/// recovered is what was reported, whole.
fn revoke_while_shipping(address: &Address, delay: Duration) {
    let listener = Listener::bind(address, SessionConfig::new(Security::LoopbackOnly)).unwrap();
    let (source, destination) = std::thread::scope(|scope| {
        let config = SessionConfig::new(Security::LoopbackOnly);
        let dialled = scope.spawn(|| connect(listener.address(), config, &Offer::default(), soon()));
        let accepted = listener.accept(soon()).unwrap().accept(b"", soon()).unwrap();
        (dialled.join().unwrap().unwrap(), accepted)
    });
    let (mut owner, mut initiator) =
        (fabric::owner(&source).unwrap(), fabric::initiator(&destination).expect("a data path"));
    let ((ring_file, ring), (region_file, region)) = (memory(RING), memory(OWNER_REGION_BYTES));
    let owner_region = OwnerRegion::new(region.clone());
    let keys = owner.export_ring((&ring_file, &ring), (&region_file, &region)).unwrap();
    let mailboxes = [0, 1].map(|_| Mailbox::new(initiator.as_mut()).unwrap());
    let mut slot = Some(Slot::new(initiator.as_mut(), 1 << 20, RingShape::of(RING).unwrap()).unwrap());
    let [records, beats] = [0, 1].map(|index| {
        let id = LaneId { kind: LaneKind::Checkpoint, index };
        owner.serve_lane(id, soon()).unwrap();
        initiator.open_lane(id, 16, soon()).unwrap()
    });
    let there = ram();
    let state =
        FoldState::new(FoldTarget::new(&there).unwrap(), Limits::for_regions([(RegionId(0), PAGES)]), vec![0; 8]);
    let reader = RingReader::new(RING, NONCE, largest_record(PAGES) as usize).unwrap();
    let folder = Folder::start(FoldConfig::default(), ring, owner_region, reader, state).unwrap();
    let [mailbox, heart_mailbox] = mailboxes;
    let heart = Heartbeat::start(beats, keys, heart_mailbox, HeartbeatConfig::default()).unwrap();
    assert!(heart.wait(soon(), |status| status.granted > 0) && heart.lease().valid());

    let (recovered, reported) = std::thread::scope(|scope| {
        let shipping = scope.spawn(move || {
            let here = ram();
            let mut writer = RingWriter::new(records, keys, RING, NONCE, mailbox, soon()).unwrap();
            loop {
                let staged = stage(slot.take().unwrap(), writer.committed().next(), &here);
                let shipped = writer.ship(&staged, soon());
                slot = Some(staged);
                if shipped.is_err() {
                    return writer.committed();
                }
            }
        });
        folder.wait_folded(Epoch(2), soon());
        let from = std::time::Instant::now();
        while from.elapsed() < delay {
            std::hint::spin_loop();
        }
        let catch = folder.stop();
        let mut catch = Some(catch);
        let mut recovered = None;
        let mut last_read = |ring: RevokedRing<'_>| recovered = catch.take().map(|catch| catch.finish(&ring).unwrap());
        owner.revoke(&mut last_read, soon()).unwrap();
        (recovered.expect("the ring was read"), shipping.join().unwrap())
    });
    assert!(
        recovered.epoch >= reported && recovered.epoch >= Epoch(2),
        "{} recovered, {reported} reported",
        recovered.epoch
    );
    assert!(recovered.epoch <= reported.next(), "at most the one whose commit was on its way");
    assert_eq!(recovered.device_state, recovered.epoch.0.to_le_bytes());
    let mut bytes = vec![0; PAGES as usize * PAGE_SIZE];
    there[0].alias.read(0, &mut bytes);
    assert!(bytes.iter().all(|&byte| byte == recovered.epoch.0 as u8), "RAM is not one epoch's");
    assert!(heart.wait(soon(), |status| status.failed.is_some()) || heart.status().failed.is_some());
}

#[test]
fn p5_over_local_what_is_recovered_after_revocation_is_what_was_reported_whole() {
    for delay_us in [0, 150, 700, 1500] {
        let dir = tempfile::tempdir().unwrap();
        revoke_while_shipping(&Address::Unix(dir.path().join("belay.sock")), Duration::from_micros(delay_us));
    }
}

#[test]
fn p5_over_tcp_what_is_recovered_after_revocation_is_what_was_reported_whole() {
    for delay_us in [0, 150, 700, 1500] {
        revoke_while_shipping(&Address::Tcp("127.0.0.1:0".to_owned()), Duration::from_micros(delay_us));
    }
}
