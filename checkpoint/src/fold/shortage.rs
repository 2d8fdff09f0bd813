//! A host that has no memory for what has committed: it waits for some, and loses nothing meanwhile (P3, P9).

use super::*;
use crate::guest::RamBlock;
use crate::record::build::Image;
use crate::record::{CRITICAL, encoding, kind};
use crate::ring::{OwnerRegion, RingReader, SEGMENTS_OFFSET};
use crate::testing::*;
use belay_transport::region::RamFile;
use belay_transport::{PAGE_SIZE, PageSize, RegionId};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{FallocateFlags, Mode, OFlags, fallocate, ftruncate, openat};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen};

const PAGES: usize = 100;
const RING: usize = (SEGMENTS_OFFSET + 40 * 4224).next_multiple_of(4096);
/// What all files on the guest's file system may take: its RAM twice and a little.
const ROOM: u64 = 1 << 20;

/// Guest RAM on a small tmpfs that is mounted nowhere, and a file beside it that can take all its room.
struct Narrow {
    memory: Vec<RamBlock>,
    hog: OwnedFd,
}

impl Narrow {
    /// None where this process may not mount.
    fn new() -> Option<Self> {
        let made = || -> Result<Self, Errno> {
            let kind = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
            fsconfig_set_string(kind.as_fd(), "size", ROOM.to_string())?;
            fsconfig_create(kind.as_fd())?;
            let root = fsmount(kind.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
            let file =
                |name| openat(&root, name, OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR);
            let (ram, hog) = (file("ram")?, file("hog")?);
            ftruncate(&ram, (PAGES * PAGE_SIZE) as u64)?;
            let file = Arc::new(RamFile::from_fd(ram).expect("a file on tmpfs"));
            let alias = Arc::new(file.map().expect("a mapping"));
            let block = RamBlock { id: RegionId(0), page_size: PageSize::Small, file, alias, vmm_address: 0 };
            Ok(Self { memory: vec![block], hog })
        };
        made().inspect_err(|errno| eprintln!("skipped: no tmpfs can be mounted here: {errno}")).ok()
    }

    fn fill(&self) {
        let taken = (1..=ROOM / PAGE_SIZE as u64)
            .rev()
            .find(|pages| fallocate(&self.hog, FallocateFlags::empty(), 0, pages * PAGE_SIZE as u64).is_ok());
        assert!(taken.is_some(), "there was some room");
    }

    fn give_room(&self) {
        ftruncate(&self.hog, 0).expect("a file can be emptied");
    }

    fn page(&self, page: usize) -> u8 {
        let mut byte = [0];
        self.memory[0].alias.read(page * PAGE_SIZE, &mut byte);
        byte[0]
    }
}

/// A record that writes one page, after so many segments.
fn record(epoch: u64, sequence: u64, page: u64) -> Vec<u8> {
    Image::new(epoch, sequence, 1)
        .section(kind::DEVICE_STATE, CRITICAL, 0, encoding::NONE, 0, b"s")
        .runs(kind::PAGE_INDEX, 0, &[(page, 1)])
        .data(0, &[epoch as u8])
        .end()
}

const SEGMENTS: u64 = 5;

fn folder(wire: &Wire, memory: &[RamBlock]) -> Folder {
    let target = FoldTarget::new(memory).unwrap();
    let state = FoldState::new(target, Limits::for_regions([(RegionId(0), PAGES as u64)]), b"switch".to_vec());
    let reader = RingReader::new(wire.ring().len(), NONCE, 512 << 10).unwrap();
    Folder::start(FoldConfig::default(), wire.ring(), OwnerRegion::new(wire.owner()), reader, state).unwrap()
}

fn wait_until_stuck(folder: &Folder) {
    let patience = soon();
    loop {
        let status = folder.status();
        assert!(status.failed.is_none(), "{status:?}");
        match status.stuck {
            Some(stuck) => return assert!(matches!(stuck, FoldError::NoMemory { .. }), "{stuck}"),
            None => assert!(!patience.expired(), "{status:?}"),
        }
        std::thread::yield_now();
    }
}

#[test]
fn p9_a_host_without_memory_for_a_checkpoint_waits_and_takes_it_once_it_has_some() {
    let Some(host) = Narrow::new() else { return };
    let wire = Wire::new(RING);
    host.fill();
    let folder = folder(&wire, &host.memory);
    let (first, second) = (record(1, 0, 3), record(2, SEGMENTS, 70));
    wire.ring().write(SEGMENTS_OFFSET, &first);
    wait_until_stuck(&folder);
    host.give_room();
    let status = folder.wait_folded(Epoch(1), soon());
    assert!(status.failed.is_none() && status.stuck.is_none(), "{status:?}");
    assert_eq!(host.page(3), 1);
    // In a catch as well: what is in the ring nobody else has any more.
    host.fill();
    wire.ring().write(SEGMENTS_OFFSET + first.len(), &second);
    wait_until_stuck(&folder);
    let (catch, ring) = (folder.stop(), wire.revoke());
    let recovered = std::thread::scope(|both| {
        let finishing = both.spawn(|| catch.finish(&ring[..]));
        host.give_room();
        finishing.join().unwrap()
    });
    assert_eq!((recovered.unwrap().epoch, host.page(70)), (Epoch(2), 2));
}

#[test]
fn p7_a_catch_on_a_host_that_stays_without_memory_ends_and_gives_the_older_epoch_and_the_reason() {
    let Some(host) = Narrow::new() else { return };
    let wire = Wire::new(RING);
    host.fill();
    let folder = folder(&wire, &host.memory);
    wire.ring().write(SEGMENTS_OFFSET, &record(1, 0, 3));
    wait_until_stuck(&folder);
    let CatchError::Unreadable { source, older } = folder.stop().finish(&wire.revoke()[..]).unwrap_err();
    assert!(matches!(source, FoldError::NoMemory { .. }), "{source}");
    assert_eq!(older.epoch, Epoch(0));
}
