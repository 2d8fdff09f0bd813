//! The page-state file under any bytes: what an earlier page server (or whoever wrote there) left.

use super::*;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

/// The file: header, and the states of a few frames.
const FILE_BYTES: u64 = 3 * 4096;

/// A file that opens has every frame within it, in a state the diagram has and none in flight; and opens again, the same.
pub(crate) fn state_file(bytes: &[u8]) {
    let open = || {
        let fd = memfd_create("belay-fuzzing", MemfdFlags::CLOEXEC).expect("a memfd");
        ftruncate(&fd, FILE_BYTES).expect("memory");
        let file = RamFile::from_fd(fd).expect("two pages");
        let mapping = file.map().expect("mmap");
        mapping.write(0, &bytes[..bytes.len().min(FILE_BYTES as usize)]);
        PageStates::open(file)
    };
    let states = match open() {
        Ok(states) => states,
        Err(error) => return assert!(error.to_string().len() < 1000),
    };
    let mut frames = 0;
    for (index, region) in states.geometry().enumerate() {
        frames += region.frames;
        for frame in (0..region.frames).map(FrameIndex) {
            let state = states.state_at(index, frame);
            assert!(!matches!(state, State::InFlight | State::Failed), "{state:?} where nothing can be on its way");
        }
    }
    assert!(frames > 0 && frames <= FILE_BYTES - HEADER as u64);
    let Counts { absent, in_flight, landed, discarded, failed } = states.counts();
    assert_eq!((absent + in_flight + landed + discarded, failed), (frames, 0));
    let geometry: Vec<_> = states.geometry().collect();
    let again = open().expect("it opened before");
    assert!(again.geometry().eq(geometry.iter().copied()));
    // A new file of that shape has that header.
    let fresh = PageStates::in_memory(&geometry).expect("a shape that opens can be made");
    let header = |states: &PageStates| {
        let mut header = vec![0; 16 + geometry.len() * ENTRY];
        states.mapping.read(0, &mut header);
        header
    };
    let (mut ours, mut theirs) = (header(&fresh), header(&states));
    for header in [&mut ours, &mut theirs] {
        // Where a region's bytes begin follows from the shapes and is not believed; the word is for people.
        (0..geometry.len()).for_each(|at| header[16 + at * ENTRY + 24..16 + (at + 1) * ENTRY].fill(0));
    }
    assert_eq!(ours, theirs);
}

/// Inputs of our own encoder, for the corpus.
#[cfg(test)]
pub(crate) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let regions = [
        RegionGeometry { id: RegionId(0), page_size: PageSize::Small, frames: 70 },
        RegionGeometry { id: RegionId(4), page_size: PageSize::Huge, frames: 3 },
    ];
    let states = PageStates::in_memory(&regions).expect("a shape");
    states.claim_run(0, FrameIndex(3), 4);
    states.land_run(0, FrameIndex(3), 2, &mut |_| ());
    states.discard(0, FrameIndex(6));
    states.discard(1, FrameIndex(0));
    let mut file = vec![0; HEADER + 256];
    states.mapping.read(0, &mut file);
    vec![("page-states", [vec![2], file].concat())]
}
