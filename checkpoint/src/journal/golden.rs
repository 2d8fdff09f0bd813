//! The journal on disk and the values in kept memory as another process finds them, which may be of another belay.

use super::{Journal, KeptState, MemoryFolder, MigrationId, disk, memory};
use crate::fold::{Catch, FoldState, FoldTarget};
use crate::golden::compare;
use crate::guest::Epoch;
use crate::record::Limits;
use crate::ring::golden::{RING_BYTES, keep_place, open_place, record};
use crate::ring::{Place, RingReader};
use crate::testing::ram;
use belay_transport::RegionId;

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");
const ID: MigrationId = MigrationId([0x3d; 8]);
/// What is kept is mostly nothing: only lines with something in them are in the file.
const LINE: usize = 64;

#[test]
fn a_journal_is_on_disk_as_it_was_when_its_version_came_out() {
    let directory = tempfile::tempdir().expect("a directory");
    let journal = Journal::create(directory.path(), ID).expect("made");
    journal.write(b"what was agreed on").expect("written");
    let path = journal.path();
    drop(journal);
    let written = std::fs::read(&path).expect("read");
    for (_, bytes) in compare(FOLDER, disk::VERSION as u16, "journal", &[("journal", written)]) {
        std::fs::write(&path, bytes).expect("written");
        let (_, body) = Journal::open(directory.path(), ID).expect("read");
        assert_eq!(body.as_deref(), Some(&b"what was agreed on"[..]));
    }
}

fn place() -> Place {
    let nonce = 0x2827_2625_2423_2221;
    Place { nonce, sequence: 9, consumed: 0x0102_0304_0506, epoch: Epoch(1), used: 4000, complete: true }
}

/// Each line that is not all zeros, behind where it is.
fn lines(state: &[u8]) -> Vec<u8> {
    let filled = state.chunks(LINE).enumerate().filter(|(_, line)| line.iter().any(|&byte| byte != 0));
    filled.flat_map(|(at, line)| [&(at as u64 * LINE as u64).to_le_bytes(), line].concat()).collect()
}

#[test]
fn what_is_kept_in_memory_is_there_as_it_was_when_its_version_came_out() {
    let directory = tempfile::tempdir_in("/dev/shm").expect("a directory");
    let folder = MemoryFolder::create(directory.path(), ID).expect("made");
    let limits = || Limits::for_regions([(RegionId(0), 8), (RegionId(1), 2)]);
    {
        let state = KeptState::create(&folder).expect("made");
        let mut mark = state.mark().expect("new").0;
        mark.write(b"before").expect("room");
        mark.write(b"who owns the guest").expect("room");
        keep_place(&state, &place());
        let target = FoldTarget::new(&ram(&[8, 2])).expect("memory");
        let mut fold = FoldState::kept(target, limits(), b"at the switch".to_vec(), &state).expect("room");
        fold.fold(&record(), || ()).expect("folded");
    }
    let mapping = folder.file("state").expect("made").map().expect("mapped");
    let mut written = vec![0; mapping.len()];
    mapping.read(0, &mut written);
    for (_, bytes) in compare(FOLDER, memory::VERSION as u16, "kept-memory", &[("state", lines(&written))]) {
        folder.forget("state");
        let file = folder.make("state", written.len(), false).expect("room");
        let mapping = file.map().expect("mapped");
        for line in bytes.chunks(8 + LINE) {
            let (at, line) = line.split_first_chunk().expect("eight bytes and a line");
            mapping.write(u64::from_le_bytes(*at) as usize, line);
        }
        let state = KeptState::open(&folder).expect("opened").expect("as it was written");
        assert_eq!(state.mark().expect("whole").1.as_deref(), Some(&b"who owns the guest"[..]));
        assert_eq!(open_place(&state).1, Some(place()));
        let target = FoldTarget::new(&ram(&[8, 2])).expect("memory");
        let fold = FoldState::resume(target, limits(), &state).expect("whole").expect("there was a switch");
        // Of a record that was folded and not given up, as the place says, nothing is done again.
        let (spool, place) = (open_place(&state).0, place());
        let ring = vec![0; RING_BYTES];
        let reader = RingReader::resume(spool, place, RING_BYTES).expect("a ring's size");
        let recovered =
            Catch::resume(reader, fold).expect("one story").finish(&ring[..]).expect("nothing is left to fold");
        assert_eq!((recovered.epoch, recovered.folded_pages), (Epoch(1), 1));
        assert_eq!(recovered.device_state, b"vCPUs and devices");
        // 299 has left; it was the last before them.
        let outputs: Vec<_> = recovered.outputs_to_resend.iter().map(|out| (out.sequence, out.bytes.len())).collect();
        assert_eq!(outputs, [(300, 5), (301, 0)]);
    }
}
