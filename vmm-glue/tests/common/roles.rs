//! Both roles of a migration inside test processes: a host that builds KVM guests, and what a source proposes.
#![allow(dead_code, reason = "each test file uses its part")]

use belay_checkpoint::guest::{Guest, GuestError, Packet, PacketSink, TrackerKind};
use belay_checkpoint::outbox::{Bounds as OutboxBounds, Emitter, Outbox, OutputMode};
use belay_checkpoint::policy::PolicySpec;
use belay_checkpoint::staging::Staging;
use belay_checkpoint::tracker::write_protection;
use belay_transport::PageSize;
use belay_transport::numa::NumaChoice;
use belay_transport::region::{Mapping, RamFile};
use belay_transport::session::{Address, Security, SessionConfig};
use belay_transport::uffd::OpenMode;
use belay_vmm_glue::guard::{GuardCommand, GuardError, LifePage, guard_main};
use belay_vmm_glue::kvm::apart::Keeper;
use belay_vmm_glue::kvm::guests::GuestSpec;
use belay_vmm_glue::kvm::registration::register;
use belay_vmm_glue::kvm::{BareGuest, KvmGuest, KvmOptions, SharedGuest, Tracking};
use belay_vmm_glue::migrate::destination::{Built, DestinationConfig, Host, Ram, shard_ranges};
use belay_vmm_glue::migrate::observation::Observer;
use belay_vmm_glue::migrate::operator::Words;
use belay_vmm_glue::migrate::protocol::PROTOCOL_VERSION;
use belay_vmm_glue::migrate::reattach::Identity;
use belay_vmm_glue::migrate::settings::{Bounds, LeaseSettings, Proposal, ReleasePolicy, TetherSettings, VmmSpec};
use belay_vmm_glue::migrate::source::keep::Keep;
use belay_vmm_glue::migrate::source::{self, Given, SourceConfig, SourceError};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// How a VM has to be made for a tracker.
pub fn tracking(tracker: TrackerKind) -> Tracking {
    match tracker {
        TrackerKind::KvmLog => Tracking::Log,
        TrackerKind::KvmRing => Tracking::Ring { entries: 1024 },
        TrackerKind::UffdWp | TrackerKind::UffdSync => Tracking::None,
    }
}

/// Where a guest's output goes.
pub struct Nowhere;

impl Emitter for Nowhere {
    fn send(&mut self, _packet: &Packet) -> std::io::Result<()> {
        Ok(())
    }
}

/// Set for a test program that is to be a guard.
const ROLE: &str = "BELAY_TEST_IS_GUARD";

/// What `the_guard_of_the_other_tests` does, where it is to be one.
pub fn be_a_guard_if_asked() {
    if std::env::var_os(ROLE).is_some() {
        guard_main().expect("guard");
        std::process::exit(0);
    }
}

/// Guest RAM at the destination, as the test sees it.
#[derive(Clone)]
pub struct Seen {
    pub file: Arc<RamFile>,
    /// The mapping that the vCPUs use: an access to it faults as theirs do.
    pub vmm: Arc<Mapping>,
}

/// Builds KVM guests in this process.
#[derive(Default)]
pub struct TestHost {
    pub built: Arc<Mutex<Option<Seen>>>,
}

impl Host for TestHost {
    fn build(
        &mut self,
        spec: &VmmSpec,
        ram: &[Ram],
        shards: u16,
        tracker: Option<TrackerKind>,
        sink: Arc<dyn PacketSink>,
        _life: Option<&LifePage>,
    ) -> Result<Built, GuestError> {
        let VmmSpec::Kvm(spec) = spec else { panic!("another VMM's guest") };
        let tracker = tracker.expect("tethered");
        let options = KvmOptions { tracking: tracking(tracker), irqchip: false };
        let guest = KvmGuest::new(spec, &options, ram[0].file.clone(), ram[0].alias.clone(), sink)?;
        let seen = Seen { file: ram[0].file.clone(), vmm: guest.vmm_memory().clone() };
        *self.built.lock().unwrap() = Some(seen);
        let guest = SharedGuest::new(Box::new(guest));
        let parts = shard_ranges(ram, shards);
        let shift = ram[0].file.page_size().shift();
        let bytes = parts.iter().flatten().map(|range| range.frames.start << shift..range.frames.end << shift);
        let address = guest.memory()[0].vmm_address;
        let protection = write_protection(tracker);
        let uffds = register(address, PageSize::Small, &bytes.collect::<Vec<_>>(), protection, OpenMode::All);
        let uffds = uffds.map_err(|error| GuestError::Unsupported(error.to_string()))?;
        let shards = uffds.into_iter().zip(parts).collect();
        Ok(Built { guest: Box::new(guest), shards, pid: std::process::id(), gives_sign: false, keeper: None })
    }

    fn adopt(&mut self, _: &[Ram], _: Arc<dyn PacketSink>) -> Result<(Box<dyn Guest>, Keeper), GuestError> {
        Err(GuestError::Unsupported("a VMM in this process has nobody to outlive".to_owned()))
    }

    fn vmm_is_apart(&self) -> bool {
        false
    }

    fn output(&mut self, _address: Option<&str>) -> std::io::Result<Box<dyn Emitter>> {
        Ok(Box::new(Nowhere))
    }

    fn guard_command(&self) -> Result<GuardCommand, GuardError> {
        let entry = ["--exact", "the_guard_of_the_other_tests", "--nocapture", "--test-threads=1"];
        let mut command = GuardCommand::this_program(&entry)?;
        command.envs = vec![(ROLE.into(), "1".into())];
        Ok(command)
    }
}

/// A destination without anything special about it.
pub fn destination_config(place: &Path, hold_pull_at: Option<f64>) -> DestinationConfig {
    DestinationConfig {
        output_to: None,
        state_dir: place.join("destination"),
        engine_cores: Vec::new(),
        recording: None,
        fault_recording: None,
        numa: NumaChoice::Off,
        hold_pull_at,
        bounds: Bounds::default(),
        staging: Staging::Auto,
        arbiter: None,
    }
}

/// A source that moves `spec` to `address`, tethered.
pub fn source_config(address: Address, spec: &GuestSpec, tracker: TrackerKind) -> SourceConfig {
    SourceConfig {
        address,
        session: SessionConfig::new(Security::LoopbackOnly),
        proposal: Proposal {
            protocol: PROTOCOL_VERSION,
            vmm: VmmSpec::Kvm(spec.clone()),
            tether: Some(TetherSettings {
                tracker,
                policy: PolicySpec::Fixed { period: Duration::from_millis(5) },
                output: OutputMode::Commit,
                lease: LeaseSettings { length: Duration::from_secs(5), ..LeaseSettings::default() },
            }),
            output_to: None,
            release: ReleasePolicy::WhenLanded,
            shards: 1,
            nonces: vec![NONCE],
            identity: Identity::random().expect("random bytes"),
            reattach: None,
        },
        ring_bytes: 4 << 20,
        overflow_bytes: 48 << 20,
        extra: Vec::new(),
        grace: Duration::from_secs(5),
        bounds: Bounds::default(),
        numa: NumaChoice::Off,
        catch_on_loss: false,
        fence: None,
        arbiter: None,
    }
}

const NONCE: u64 = 7;

/// A guest that runs here, with its output and its RAM.
pub fn running_guest(spec: &GuestSpec) -> (SharedGuest, Outbox, Arc<Mapping>) {
    let output = Outbox::open(OutboxBounds { bytes: 1 << 20, packets: 4096 }, Box::new(Nowhere)).expect("outbox");
    let file = Arc::new(RamFile::memfd("belay-test-ram", spec.memory_bytes as usize, PageSize::Small).expect("memfd"));
    let alias = Arc::new(file.map().expect("map"));
    let options = KvmOptions { tracking: Tracking::None, irqchip: false };
    let mut guest = KvmGuest::new(spec, &options, file, alias.clone(), output.sink()).expect("VM");
    guest.boot().expect("boot");
    guest.set_incarnation(NONCE).expect("nonce");
    guest.resume().expect("resume");
    (SharedGuest::new(Box::new(guest)), output, alias)
}

/// Moves a guest away from here, and lets go of what was kept for whoever might have taken over.
pub fn move_away(
    place: &Path,
    config: &SourceConfig,
    guest: &mut SharedGuest,
    output: &Outbox,
    observer: &Observer,
    words: &Words,
) -> Result<source::Outcome, SourceError> {
    let mut keep = Keep::begin(&place.join("source"), None, config.proposal.identity)?;
    let steps_of = guest.clone();
    let steps = || steps_of.steps();
    let given = Given { config, keep: &mut keep, guest, output, steps: &steps, observer, words };
    let outcome = source::run(given);
    keep.close()?;
    outcome
}
