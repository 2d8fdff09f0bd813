//! The control protocol, the proposal and the release record as they are on the wire and on disk.
//!
//! Each message is listed with the version it came in. A version's files hold every message that was there then; a message that
//! is added takes the next version and the end of its list.

use super::observation::ObservationId;
use super::protocol::{PROTOCOL_VERSION, RingOffer, ToDestination, ToSource, decode, encode};
use super::reattach::{Identity, Reattach, Secret, decode_proposal};
use super::release::ReleaseRecord;
use super::settings::{LeaseSettings, Proposal, ReleasePolicy, TetherSettings, VmmSpec};
use super::switch_map::RegionClasses;
use crate::guard::Secrets;
use crate::kvm::guests::{Filler, GuestSpec, Program};
use crate::qemu::spec::{QemuDisk, QemuSpec};
use belay_checkpoint::guest::{Epoch, TrackerKind};
use belay_checkpoint::journal::MigrationId;
use belay_checkpoint::outbox::OutputMode;
use belay_checkpoint::ownership::{Fate, OwnerEpoch};
use belay_checkpoint::policy::PolicySpec;
use belay_transport::RegionId;
use belay_transport::fabric::{ReadKey, RingKeys, WriteKey};
use serde::{Serialize, de::DeserializeOwned};
use std::fmt::Debug;
use std::time::Duration;

use crate::golden::compare;

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");

fn because() -> ObservationId {
    ObservationId("source-4711-3".to_owned())
}

/// Every message to a destination.
pub(crate) fn to_destination() -> Vec<(&'static str, ToDestination)> {
    to_destination_since().into_iter().map(|(_, name, message)| (name, message)).collect()
}

/// Every message to a source.
pub(crate) fn to_source() -> Vec<(&'static str, ToSource)> {
    to_source_since().into_iter().map(|(_, name, message)| (name, message)).collect()
}

fn to_destination_since() -> Vec<(u16, &'static str, ToDestination)> {
    let key = |at: u64| 0x1817_1615_1413_1200 | at;
    let ring = RingKeys { ring: WriteKey(key(1)), owner_region: ReadKey(key(2)) };
    let ring_geometry = RingOffer { bytes: 64 << 20, nonce: 0x2827_2625_2423_2221, overflow_bytes: 256 << 20 };
    let map = vec![
        RegionClasses { id: RegionId(0), runs: vec![(2, 1), (1, 300), (2, 6)] },
        RegionClasses { id: RegionId(7), runs: vec![(1, 3)] },
    ];
    let fate = |fate| ToDestination::Fate { fate, because: because() };
    vec![
        (
            1,
            "prepare",
            ToDestination::Prepare {
                ram: vec![(RegionId(0), ReadKey(key(0)))],
                ring,
                ring_geometry,
                because: because(),
            },
        ),
        (1, "switch", ToDestination::Switch { map, device_state: vec![0xd5; 9], nonce: 5, because: because() }),
        (1, "go", ToDestination::Go { owner_epoch: OwnerEpoch(2), because: because() }),
        (1, "released", ToDestination::Released { because: because() }),
        (1, "release-refused", ToDestination::ReleaseRefused { because: because() }),
        (1, "fate-tethered", fate(Fate::StillTethered)),
        (1, "fate-revoked", fate(Fate::Revoked)),
        (1, "fate-released", fate(Fate::Released)),
        (1, "failed", ToDestination::Failed { reason: "no room".to_owned(), because: because() }),
        (2, "reattach", ToDestination::Reattach { proof: [0x4e; 32] }),
        (
            2,
            "prepare-again",
            ToDestination::PrepareAgain {
                ram: vec![(RegionId(0), ReadKey(key(3)))],
                ring,
                ring_geometry,
                committed: Epoch(41),
                because: because(),
            },
        ),
        (3, "zeros", ToDestination::Zeros { region: RegionId(7), first: 8192, bitmap: vec![0x81, 0, 0x7e] }),
    ]
}

fn to_source_since() -> Vec<(u16, &'static str, ToSource)> {
    let secrets = Secrets { sign: [0x51; 32], proof: [0x90; 32], fence: [0xfe; 32] };
    vec![
        // The guard has had the secret of the fence since version 2.
        (2, "prepared", ToSource::Prepared { secrets: Some(secrets), because: because() }),
        (1, "prepared-without-a-guard", ToSource::Prepared { secrets: None, because: because() }),
        (1, "loaded", ToSource::Loaded { because: because() }),
        (1, "resumed", ToSource::Resumed { because: because() }),
        (1, "all-landed", ToSource::AllLanded { because: because() }),
        (1, "release-asked", ToSource::ReleaseAsked { all_landed: true, because: because() }),
        (1, "farewell", ToSource::Farewell),
        (1, "fate-asked", ToSource::FateAsked { owner_epoch: OwnerEpoch(2) }),
        (1, "guest-gone", ToSource::GuestGone { because: because() }),
        (1, "failed", ToSource::Failed { reason: "no room".to_owned(), because: because() }),
    ]
}

pub(crate) fn proposal() -> Proposal {
    let guest = GuestSpec {
        program: Program::Scanner,
        memory_bytes: 256 << 20,
        working_set_bytes: 64 << 20,
        rate_pages_per_s: 20_000,
        batch_steps: 64,
        packet_interval_steps: 256,
        vcpus: 2,
        seed: 0x3837_3635_3433_3231,
        filled_of_256: 192,
        filler: Filler::Host,
        metronome_spin_ticks: 1000,
    };
    let tether = TetherSettings {
        tracker: TrackerKind::KvmRing,
        policy: PolicySpec::DirtyBudget { pages: 4096, at_most: Duration::from_millis(100) },
        output: OutputMode::Commit,
        lease: LeaseSettings::default(),
    };
    Proposal {
        protocol: PROTOCOL_VERSION,
        vmm: VmmSpec::Kvm(guest),
        tether: Some(tether),
        output_to: Some("192.0.2.1:9000".to_owned()),
        release: ReleasePolicy::After(Duration::from_millis(2500)),
        shards: 2,
        nonces: vec![1, 0x4847_4645_4443_4241],
        identity: Identity { migration: MigrationId([0x3d; 8]), secret: Secret([0x5e; 32]) },
        reattach: None,
    }
}

/// For what is kept and has a version beside the protocol's: it changes with what a proposal holds, and not with its number alone.
pub(crate) fn proposal_of_version_3() -> Proposal {
    Proposal { protocol: 3, ..proposal() }
}

/// Compares every version's files of one direction with what is encoded today, and reads them again.
fn held<M: Serialize + DeserializeOwned + PartialEq + Debug>(room: &str, messages: &[(u16, &'static str, M)]) {
    for version in 1..=PROTOCOL_VERSION {
        let of_version: Vec<_> = messages.iter().filter(|(since, ..)| *since <= version).collect();
        let bytes: Vec<_> = of_version.iter().map(|(_, name, message)| (*name, encode(message))).collect();
        for (name, bytes) in compare(FOLDER, version, room, &bytes) {
            let (.., message) = of_version.iter().find(|(_, there, _)| *there == name).expect("compared");
            assert_eq!(&decode::<M>(&bytes).expect("read"), message, "version {version}");
        }
    }
}

#[test]
fn what_a_source_says_is_on_the_wire_as_it_was_when_its_version_came_out() {
    held("to-destination", &to_destination_since());
}

#[test]
fn what_a_destination_says_is_on_the_wire_as_it_was_when_its_version_came_out() {
    held("to-source", &to_source_since());
}

#[test]
fn an_unexpected_message_is_named_and_what_is_in_it_is_not_told() {
    use super::protocol::ProtocolError;
    let said: Vec<_> = to_source().iter().map(|(_, message)| message.kind()).collect();
    assert_eq!(said[0], "Prepared");
    let told = to_destination().iter().map(|(_, message)| message.kind()).collect::<Vec<_>>();
    assert_eq!(told[..3], ["Prepare", "Switch", "Go"]);
    for name in said.iter().chain(&told) {
        let error = ProtocolError::Unexpected { got: (*name).to_owned(), wanted: "Loaded" }.to_string();
        assert!(error.len() < 80 && name.chars().all(char::is_alphanumeric), "{error}");
    }
    let secrets = Secrets { sign: [0xa7; 32], proof: [0xa7; 32], fence: [0xa7; 32] };
    let formatted =
        format!("{secrets:?} {:?}", ToSource::Prepared { secrets: Some(secrets.clone()), because: because() });
    assert!(
        formatted.contains("Secrets(..)") && !formatted.contains("167") && !formatted.contains("a7"),
        "{formatted}"
    );
}

#[test]
fn every_message_has_a_golden_file_of_its_version() {
    // A message more is a number more, and bytes of that number are none yet.
    let numbers = |bytes: Vec<u8>| bytes[0];
    let mut to_destination: Vec<_> = to_destination().iter().map(|(_, message)| numbers(encode(message))).collect();
    let mut to_source: Vec<_> = to_source().iter().map(|(_, message)| numbers(encode(message))).collect();
    to_destination.dedup();
    to_source.dedup();
    assert!(to_destination.iter().copied().eq(0..to_destination.len() as u8), "{to_destination:?}");
    assert!(to_source.iter().copied().eq(0..to_source.len() as u8), "{to_source:?}");
    let unknown = |number: usize| [vec![number as u8], vec![0; 64]].concat();
    let refused = |error: &str| error.contains("malformed");
    assert!(refused(&decode::<ToDestination>(&unknown(to_destination.len())).unwrap_err().to_string()));
    assert!(refused(&decode::<ToSource>(&unknown(to_source.len())).unwrap_err().to_string()));
}

#[test]
fn a_proposal_is_on_the_wire_as_it_was_when_the_version_came_out() {
    let untethered = Proposal { tether: None, output_to: None, release: ReleasePolicy::WhenLanded, ..proposal() };
    let call = Reattach { migration: MigrationId([0x3d; 8]), challenge: [0xc4; 32], proof: [0x4f; 32] };
    let again = Proposal { reattach: Some(call), ..proposal() };
    let proposals = [("tethered", proposal()), ("untethered", untethered), ("reattached", again)];
    let bytes: Vec<_> = proposals.iter().map(|(name, proposal)| (*name, encode(proposal))).collect();
    for (name, bytes) in compare(FOLDER, PROTOCOL_VERSION, "proposal", &bytes) {
        let (_, proposal) = proposals.iter().find(|(there, _)| *there == name).expect("compared");
        assert_eq!(&decode_proposal(&bytes).expect("read"), proposal);
    }
}

#[test]
fn a_qemu_guests_proposal_is_on_the_wire_as_it_was_when_it_came_in() {
    let ram = vec![("m0".to_owned(), 96 << 20), ("m1".to_owned(), 64 << 20)];
    let guest = QemuSpec { machine: "pc-q35-7.2-machine".to_owned(), version: "7.2.22".to_owned(), vcpus: 2, ram };
    let tether = proposal().tether.map(|tether| TetherSettings { tracker: TrackerKind::UffdWp, ..tether });
    let tethered = Proposal { vmm: VmmSpec::Qemu(guest), tether, ..proposal() };
    for (_, bytes) in compare(FOLDER, PROTOCOL_VERSION, "proposal-qemu", &[("tethered", encode(&tethered))]) {
        let read = decode_proposal(&bytes).expect("read");
        assert_eq!(read, tethered);
        assert_eq!(read.check(), Ok(()));
    }
}

#[test]
fn a_proposal_of_a_qemu_guest_with_disks_is_on_the_wire_as_it_was_when_it_came_in() {
    let ram = vec![("m0".to_owned(), 96 << 20)];
    let guest = QemuSpec { machine: "pc-q35-7.2-machine".to_owned(), version: "7.2.22".to_owned(), vcpus: 2, ram };
    let disks = [("disk", 1 << 20), ("other", 512)];
    let disks = disks.map(|(name, bytes)| QemuDisk { name: name.to_owned(), bytes }).to_vec();
    let tether = proposal().tether.map(|tether| TetherSettings { tracker: TrackerKind::UffdWp, ..tether });
    let tethered = Proposal { vmm: VmmSpec::of_qemu(guest, disks), tether, ..proposal() };
    for (_, bytes) in compare(FOLDER, PROTOCOL_VERSION, "proposal-qemu-disks", &[("tethered", encode(&tethered))]) {
        let read = decode_proposal(&bytes).expect("read");
        assert_eq!(read, tethered);
        assert_eq!(read.check(), Ok(()));
    }
}

/// The files of `room` in the folder of each version before this one, with the version's number.
fn of_earlier_versions(room: &str) -> Vec<(u16, Vec<u8>)> {
    let mut files = Vec::new();
    for version in 1..PROTOCOL_VERSION {
        let Ok(folder) = std::fs::read_dir(format!("{FOLDER}/v{version}/{room}")) else { continue };
        files.extend(folder.map(|file| (version, std::fs::read(file.expect("an entry").path()).expect("read"))));
    }
    files
}

#[test]
fn a_proposal_of_every_earlier_version_is_refused_by_its_version() {
    let proposals: Vec<_> = ["proposal", "proposal-qemu", "proposal-qemu-disks"].map(of_earlier_versions).concat();
    for (version, bytes) in &proposals {
        let refused = decode_proposal(bytes).expect_err("another version");
        assert!(refused.contains(&format!("protocol {version} is proposed")), "{refused}");
    }
    let versions: std::collections::BTreeSet<_> = proposals.iter().map(|(version, _)| *version).collect();
    assert!(versions.into_iter().eq(1..PROTOCOL_VERSION), "a version has no files");
}

#[test]
fn a_release_record_of_every_earlier_version_still_says_that_the_guest_was_released() {
    let records = of_earlier_versions("release");
    // The first version left none.
    assert!(records.iter().map(|(version, _)| *version).eq(2..PROTOCOL_VERSION));
    for (version, bytes) in records {
        let state_dir = tempfile::tempdir().expect("a directory");
        std::fs::write(state_dir.path().join("released-3d3d3d3d3d3d3d3d.json"), bytes).expect("written");
        let found = ReleaseRecord::find(state_dir.path(), MigrationId([0x3d; 8]));
        assert_eq!(found.expect("read"), Some(release_record()), "version {version}");
    }
}

fn release_record() -> ReleaseRecord {
    let record = ReleaseRecord::new(MigrationId([0x3d; 8]), 0x2827_2625_2423_2221, 2, "192.0.2.1:7700".to_owned());
    ReleaseRecord { at_us: 1_234_567, ..record }
}

#[test]
fn a_release_record_is_on_disk_as_it_was_when_the_version_came_out() {
    let directory = tempfile::tempdir().expect("a directory");
    let record = release_record();
    let written = std::fs::read(record.write(directory.path()).expect("written")).expect("read");
    for (_, bytes) in compare(FOLDER, PROTOCOL_VERSION, "release", &[("record.json", written)]) {
        assert_eq!(serde_json::from_slice::<ReleaseRecord>(&bytes).expect("read"), record);
    }
}
