//! The page-state file as it is on disk.

use super::*;
use crate::golden::compare;
use std::fs;

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");

#[test]
fn the_page_state_file_is_as_it_was_when_the_version_came_out() {
    let regions = [
        RegionGeometry { id: RegionId(0), page_size: PageSize::Small, frames: 70 },
        RegionGeometry { id: RegionId(7), page_size: PageSize::Huge, frames: 3 },
    ];
    let directory = tempfile::tempdir_in("/dev/shm").expect("tmpfs");
    let states = PageStates::create_in(&directory.path().join("states"), &regions).expect("a file");
    let frame = FrameIndex;
    // One frame of every state: absent, landed, discarded, in flight, in flight with a discard wanted, failed.
    states.claim_run(0, frame(1), 1);
    states.land_run(0, frame(1), 1, &mut |_| ());
    states.discard(0, frame(2));
    states.claim_run(0, frame(3), 3);
    states.discard(0, frame(4));
    states.fail_run(0, frame(5), 1, &mut |_| {});
    let bytes = fs::read(directory.path().join("states")).expect("read");
    for (_, bytes) in compare(FOLDER, VERSION as u16, "page-states", &[("file", bytes)]) {
        let path = directory.path().join("again");
        fs::write(&path, bytes).expect("written");
        let states = PageStates::open(RamFile::open(&path).expect("a file")).expect("states");
        assert!(states.geometry().eq(regions));
        let found: Vec<_> = (0..6).map(|at| states.state_at(0, frame(at))).collect();
        use State::{Absent, DiscardWanted, Discarded, Landed};
        // What was in flight or had failed is asked for again.
        assert_eq!(found, [Absent, Landed, Discarded, Absent, DiscardWanted, Absent]);
    }
}
