//! What a source writes into its journal and its ownership mark. They have no version of their own: the files they lie in have one,
//! and whoever reads a file of that version reads these.

use super::*;
use crate::golden::compare;
use crate::migrate::golden::proposal_of_version_3;
use crate::migrate::reattach::Secret;
use belay_checkpoint::outbox::OutputMode;
use belay_checkpoint::ownership::source::{CatchStep, Lease, Resuming, Serving};

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");
const IDENTITY: Identity = Identity { migration: MigrationId([0x3d; 8]), secret: Secret([0x5e; 32]) };

pub(super) fn written() -> [(&'static str, Written); 2] {
    let begun = Written {
        identity: IDENTITY,
        to: String::new(),
        proposal: None,
        regions: Vec::new(),
        memory: Some("/dev/shm/belay-3d3d3d3d3d3d3d3d".into()),
        extra: Vec::new(),
    };
    let agreed = Written {
        to: "192.0.2.1:7700".to_owned(),
        proposal: Some(proposal_of_version_3()),
        regions: vec![(RegionId(0), 256 << 20, PageSize::Small), (RegionId(7), 2 << 20, PageSize::Huge)],
        extra: b"{}".to_vec(),
        ..begun.clone()
    };
    [("begun", begun), ("agreed", agreed)]
}

#[test]
fn what_a_journal_holds_is_as_it_was_when_its_version_came_out() {
    let directory = tempfile::tempdir().expect("a directory");
    let journal = Journal::create(directory.path(), IDENTITY.migration).expect("made");
    let journals = written().map(|(name, written)| {
        journal.write(&protocol::encode(&written)).expect("written");
        (name, std::fs::read(journal.path()).expect("read"))
    });
    let version = u16::from_le_bytes([journals[0].1[8], journals[0].1[9]]);
    let path = journal.path();
    drop(journal);
    for (name, bytes) in compare(FOLDER, version, "journal", &journals) {
        std::fs::write(&path, bytes).expect("written");
        let (_, body) = Journal::open(directory.path(), IDENTITY.migration).expect("read");
        let read: Written = protocol::decode(&body.expect("there is one")).expect("understood");
        assert_eq!(Some(read), written().into_iter().find(|(there, _)| *there == name).map(|(_, written)| written));
    }
}

pub(super) fn marks() -> Vec<(&'static str, Marked)> {
    let (mode, owner_epoch) = (OutputMode::Lease, OwnerEpoch(3));
    let serving = |mode, lease| Serving {
        mode,
        owner_epoch,
        lease,
        failed: true,
        death_proven: false,
        catch_ordered: true,
        recording_release: false,
    };
    let resuming = Resuming { mode, owner_epoch, lease_ran_out: true };
    let revoking = |step| State::Revoking { owner_epoch, step, stuck: true };
    let states = [
        ("running", State::Running { owner_epoch }),
        ("switching", State::Switching { mode, owner_epoch, handed_over: true }),
        ("serving-granted", State::Serving(serving(OutputMode::Commit, Lease::Granted))),
        ("serving-withdrawn", State::Serving(serving(mode, Lease::Withdrawn))),
        ("serving-ran-out", State::Serving(serving(mode, Lease::RanOut))),
        ("resuming", State::Resuming(resuming)),
        ("revoking-revoke", revoking(CatchStep::Revoke)),
        ("revoking-fold", revoking(CatchStep::Fold)),
        ("revoking-resume", revoking(CatchStep::Resume)),
        ("revoking-claim", revoking(CatchStep::Claim)),
        ("released", State::Released { owner_epoch }),
        ("lost", State::Lost { owner_epoch }),
        ("ceded", State::Ceded { owner_epoch }),
    ];
    states.map(|(name, state)| (name, Marked { state, nonces: vec![1, 0x4847_4645_4443_4241] })).to_vec()
}

#[test]
fn an_ownership_mark_is_as_it_was_when_its_version_came_out() {
    let directory = tempfile::tempdir_in("/dev/shm").expect("a directory");
    let folder = MemoryFolder::create(directory.path(), IDENTITY.migration).expect("made");
    KeptState::create(&folder).expect("room");
    let mut head = [0; 16];
    folder.file("state").expect("made").map().expect("mapped").read(0, &mut head);
    let bytes: Vec<_> = marks().iter().map(|(name, mark)| (*name, protocol::encode(mark))).collect();
    for (name, bytes) in compare(FOLDER, u16::from_le_bytes([head[8], head[9]]), "ownership-mark", &bytes) {
        let read: Marked = protocol::decode(&bytes).expect("understood");
        assert_eq!(Some(read), marks().into_iter().find(|(there, _)| *there == name).map(|(_, mark)| mark));
    }
    // Every kind of state is among them: the next number is none yet.
    let kinds: std::collections::BTreeSet<u8> = bytes.iter().map(|(_, bytes)| bytes[0]).collect();
    let next = kinds.len() as u8;
    assert!(kinds.into_iter().eq(0..next));
    let unknown = protocol::decode::<State>(&[vec![next], vec![0; 64]].concat()).unwrap_err();
    assert!(unknown.to_string().contains("malformed"), "{unknown}");
}
