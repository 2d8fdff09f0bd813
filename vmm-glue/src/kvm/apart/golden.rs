//! The protocol between page server and VMM as it is on their socket.

use super::door::version_of_knock;
use super::{Answer, Ask, FromClient, FromVmm, Kept, VERSION, VmmFaults, WireError};
use crate::kvm::guests::{Filler, GuestSpec, Program};
use crate::kvm::{KvmOptions, Tracking};
use belay_checkpoint::guest::TrackerKind;

use crate::golden::compare;

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");

fn spec() -> GuestSpec {
    GuestSpec {
        program: Program::Ledger,
        memory_bytes: 64 << 20,
        working_set_bytes: 16 << 20,
        rate_pages_per_s: 20_000,
        batch_steps: 64,
        packet_interval_steps: 256,
        vcpus: 2,
        seed: 7,
        filled_of_256: 192,
        filler: Filler::Guest,
        metronome_spin_ticks: 0,
    }
}

/// What a client says, encoded.
pub(crate) fn from_client() -> Vec<(&'static str, Vec<u8>)> {
    let options = KvmOptions { tracking: Tracking::Ring { entries: 8192 }, irqchip: false };
    let faults = VmmFaults::MissingAndMinor;
    let asks = [
        ("setup", Ask::Setup { version: 1, spec: spec(), options }),
        ("boot", Ask::Boot),
        ("pause", Ask::Pause { bound_us: 300 }),
        ("resume", Ask::Resume),
        ("save", Ask::Save),
        ("load", Ask::Load(vec![0xd5; 9])),
        ("set-incarnation", Ask::SetIncarnation(0x4847_4645_4443_4241)),
        ("track", Ask::Track(TrackerKind::KvmLog)),
        ("start-tracking", Ask::StartTracking),
        ("prepare-harvest", Ask::PrepareHarvest),
        ("harvest", Ask::Harvest),
        ("dirty-so-far", Ask::DirtySoFar),
        ("device-writes", Ask::DeviceWrites),
        ("park", Ask::Park(Some(300))),
        ("wait-parked", Ask::WaitParked { bound_us: 300 }),
        ("steps", Ask::Steps),
        ("failure", Ask::Failure),
        ("userfaultfd", Ask::Userfaultfd { features: 0x1234, offset: 4096, len: 8192, faults, write_protect: true }),
        ("keep", Ask::Keep(Kept::PageStates)),
        ("give-sign", Ask::GiveSign { slot: 1 }),
        ("take-over", Ask::TakeOver { version: 1 }),
        ("guest-ram", Ask::GuestRam),
        ("userfaultfd-again", Ask::UserfaultfdAgain(300)),
        ("kept", Ask::Kept(Kept::Will)),
        ("replay", Ask::Replay),
        ("exit", Ask::Exit),
    ];
    let encoded = |message: &FromClient| postcard::to_stdvec(message).expect("plain data");
    let mut all: Vec<_> =
        asks.into_iter().map(|(name, ask)| (name, encoded(&FromClient::Request { id: 300, ask }))).collect();
    all.push(("room", encoded(&FromClient::Room { packets: 300 })));
    all
}

/// What a VMM says, encoded.
pub(crate) fn from_vmm() -> Vec<(&'static str, Vec<u8>)> {
    let io = WireError::Io { doing: "d".into(), errno: Some(12), text: "t".into() };
    let state = WireError::WrongState { call: "save".into(), state: "running".into(), wanted: "paused".into() };
    let (uffds, kept) = (vec![(0, 300 << 12)], vec![Kept::PageStates, Kept::Will, Kept::Ledger, Kept::Guard]);
    let estate = Answer::Estate { pid: 4711, spec: spec(), vmm_address: 1 << 40, uffds, kept };
    let results = [
        ("done", Ok(Answer::Done)),
        ("ready", Ok(Answer::Ready { vmm_address: 1 << 40, tracking: Tracking::Log })),
        ("state", Ok(Answer::State(vec![0xd5; 9]))),
        ("dirty", Ok(Answer::Dirty(vec![(0, 1), (300, u64::MAX)]))),
        ("count", Ok(Answer::Count(Some(300)))),
        ("steps", Ok(Answer::Steps(vec![300, 5]))),
        ("failure", Ok(Answer::Failure(Some("f".into())))),
        ("estate", Ok(estate)),
        ("stop-timed-out", Err(WireError::StopTimedOut { bound_ms: 300, running: 1, vcpus: 2 })),
        ("wrong-state", Err(state)),
        ("io", Err(io)),
        ("bad-state", Err(WireError::BadState("b".into()))),
        ("no-tracker", Err(WireError::NoTracker { kind: TrackerKind::UffdWp, reason: "r".into() })),
        ("vmm-gone", Err(WireError::VmmGone("g".into()))),
        ("crashed", Err(WireError::Crashed("c".into()))),
        ("unsupported", Err(WireError::Unsupported("u".into()))),
    ];
    let encoded = |message: &FromVmm| postcard::to_stdvec(message).expect("plain data");
    let mut all: Vec<_> =
        results.into_iter().map(|(name, result)| (name, encoded(&FromVmm::Answer { id: 300, result }))).collect();
    all.push(("packet", encoded(&FromVmm::Packet { sequence: 300, bytes: vec![0xaa; 5] })));
    all
}

#[test]
fn a_vmm_apart_is_spoken_to_as_when_the_version_came_out() {
    for (name, bytes) in compare(FOLDER, VERSION, "vmm-from-client", &from_client()) {
        let message: FromClient = postcard::from_bytes(&bytes).expect("read");
        assert_eq!(postcard::to_stdvec(&message).expect("plain data"), bytes, "{name}");
    }
    for (name, bytes) in compare(FOLDER, VERSION, "vmm-from-vmm", &from_vmm()) {
        let message: FromVmm = postcard::from_bytes(&bytes).expect("read");
        assert_eq!(postcard::to_stdvec(&message).expect("plain data"), bytes, "{name}");
    }
}

#[test]
fn whoever_speaks_an_earlier_version_is_understood_as_far_as_its_version() {
    let of_version = |version: u16, name: &str| -> FromClient {
        let bytes = std::fs::read(format!("{FOLDER}/v{version}/vmm-from-client/{name}")).expect("the file is there");
        postcard::from_bytes(&bytes).expect("understood")
    };
    // Version 1 left no files. The files of all versions say 1 where their version stands.
    for version in 2..=VERSION {
        let FromClient::Request { id: 300, ask } = of_version(version, "take-over") else { panic!("no request") };
        assert_eq!(version_of_knock(&ask), Some(1), "{ask:?} of version {version}");
        let setup = of_version(version, "setup");
        assert!(matches!(setup, FromClient::Request { id: 300, ask: Ask::Setup { version: 1, .. } }), "{version}");
    }
    let knocks = from_client().into_iter().filter(|(_, bytes)| {
        let message: FromClient = postcard::from_bytes(bytes).expect("our own");
        // A sign of life is given in a slot, and a version of then was 1 or 2.
        matches!(message, FromClient::Request { ask, .. } if version_of_knock(&ask).is_some())
    });
    assert_eq!(knocks.map(|(name, _)| name).collect::<Vec<_>>(), ["give-sign", "take-over"]);
}
