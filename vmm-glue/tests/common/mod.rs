//! What the tests of the kvm VMM share.
#![allow(dead_code, reason = "each test file uses its part")]

pub mod roles;

use belay_checkpoint::guest::{GuestError, Packet, PacketSink};
use belay_transport::region::{Mapping, RamFile};
use belay_transport::{Deadline, PageSize};
use belay_vmm_glue::kvm::apart::{self, RemoteGuest};
use belay_vmm_glue::kvm::guests::{GuestSpec, Program};
use belay_vmm_glue::kvm::{BareGuest, HostGuest, KvmGuest, KvmOptions};
use belay_vmm_glue::witness::model::Model;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Says why and is true where there is no /dev/kvm.
pub fn no_kvm() -> bool {
    match std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        Ok(_) => false,
        Err(error) => {
            eprintln!("skipped: /dev/kvm cannot be opened: {error}");
            true
        }
    }
}

/// A deadline that only a broken test reaches.
pub fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(20))
}

/// Collects packets, and has room until told otherwise.
#[derive(Default)]
pub struct Collected(pub Mutex<Vec<Packet>>, pub AtomicBool);

impl PacketSink for Collected {
    fn emit(&self, packet: Packet) {
        self.0.lock().unwrap().push(packet);
    }
    fn has_room(&self) -> bool {
        !self.1.load(Ordering::SeqCst)
    }
}

/// Guest RAM with its alias.
pub struct Ram {
    pub file: Arc<RamFile>,
    pub alias: Arc<Mapping>,
}

impl Ram {
    pub fn of(spec: &GuestSpec) -> Self {
        let file = RamFile::memfd("belay-test-ram", spec.memory_bytes as usize, PageSize::Small).expect("memfd");
        let alias = Arc::new(file.map().expect("map"));
        Self { file: Arc::new(file), alias }
    }
}

/// How a guest is run.
#[derive(Debug, Clone)]
pub enum Kind {
    Kvm(KvmOptions),
    HostThreads,
    /// In a process of its own: this test program once more, running only `the_vmm_process_of_the_other_tests`.
    Apart(KvmOptions),
}

/// Set for a test program that is to be a VMM.
const VMM_VARIABLE: &str = "BELAY_TEST_IS_VMM";
/// The directory of its door, where it is to have one.
const DOORS_VARIABLE: &str = "BELAY_TEST_DOORS";

/// What `the_vmm_process_of_the_other_tests` does, where it is to be one.
pub fn be_a_vmm_if_asked() {
    if std::env::var_os(VMM_VARIABLE).is_some() {
        let socket = std::io::stdin().as_fd().try_clone_to_owned().expect("stdin");
        let doors = std::env::var_os(DOORS_VARIABLE).map(PathBuf::from);
        // How it ended is its parent's to judge: it watches the process.
        let _ = apart::serve(socket.into(), Some(Duration::from_secs(30)), doors.as_deref());
    }
}

pub fn spawn_apart(spec: &GuestSpec, options: &KvmOptions, ram: &Ram, sink: &Arc<Collected>) -> RemoteGuest {
    spawn_with_doors(spec, options, ram, sink, None)
}

/// A VMM that another page server can come in to, by its door in `doors`.
pub fn spawn_with_doors(
    spec: &GuestSpec,
    options: &KvmOptions,
    ram: &Ram,
    sink: &Arc<Collected>,
    doors: Option<&Path>,
) -> RemoteGuest {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.args(["--exact", "the_vmm_process_of_the_other_tests", "--test-threads=1"]).env(VMM_VARIABLE, "1");
    command.stdout(Stdio::null());
    if let Some(doors) = doors {
        command.env(DOORS_VARIABLE, doors);
    }
    RemoteGuest::spawn(command, spec, options, ram.file.clone(), ram.alias.clone(), sink.clone()).expect("VMM process")
}

impl Kind {
    pub fn new_guest(&self, spec: &GuestSpec, ram: &Ram, sink: &Arc<Collected>) -> Box<dyn BareGuest> {
        let (file, alias, sink) = (ram.file.clone(), ram.alias.clone(), sink.clone());
        match self {
            Self::Kvm(options) => Box::new(KvmGuest::new(spec, options, file, alias, sink).expect("VM")),
            Self::Apart(options) => Box::new(spawn_apart(spec, options, ram, &sink)),
            Self::HostThreads => Box::new(HostGuest::new(spec, file, alias, sink).expect("threads")),
        }
    }
}

/// A guest with its RAM and its output.
pub struct Rig<G: ?Sized = KvmGuest> {
    pub spec: GuestSpec,
    pub ram: Ram,
    pub sink: Arc<Collected>,
    pub issued: Vec<u64>,
    pub guest: Box<G>,
}

impl Rig {
    /// A KVM guest at its start, paused.
    pub fn boot(spec: GuestSpec, options: KvmOptions) -> Self {
        let (ram, sink) = (Ram::of(&spec), Arc::new(Collected::default()));
        let guest = KvmGuest::new(&spec, &options, ram.file.clone(), ram.alias.clone(), sink.clone()).expect("VM");
        Self::around(spec, ram, sink, Box::new(guest))
    }
}

impl Rig<dyn BareGuest> {
    /// A guest of any kind at its start, paused.
    pub fn boot_any(spec: GuestSpec, kind: &Kind) -> Self {
        let (ram, sink) = (Ram::of(&spec), Arc::new(Collected::default()));
        let guest = kind.new_guest(&spec, &ram, &sink);
        Self::around(spec, ram, sink, guest)
    }

    /// Saves the paused guest and goes on with it in a new VM over the same RAM.
    pub fn move_to_new_vm(&mut self, kind: &Kind) -> Result<(), GuestError> {
        let mut state = Vec::new();
        self.guest.save(&mut state)?;
        let mut next = kind.new_guest(&self.spec, &self.ram, &self.sink);
        next.load(&state)?;
        self.guest = next;
        self.new_incarnation();
        Ok(())
    }
}

/// Numbers for choosing when to stop, from a seed.
fn numbers(mut seed: u64) -> impl FnMut(u64) -> u64 {
    move |below| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 33) % below
    }
}

/// A guest ends up the same whether it ran straight on or was stopped and moved to a new VM again and again.
pub fn runs_identically_with_and_without_stops(spec: &GuestSpec, kind: &Kind) {
    let mut straight = Rig::boot_any(spec.clone(), kind);
    straight.run_to_and_check(20_000);

    let mut stopped = Rig::boot_any(spec.clone(), kind);
    let mut number = numbers(spec.seed);
    for stop in 0..12 {
        if stop == 4 {
            // The first stops fall into the fill, the others into the steps.
            stopped.run_to_and_check(1);
            stopped.guest.unpark().unwrap();
        }
        stopped.guest.resume().expect("resume");
        std::thread::sleep(Duration::from_micros(number(8000)));
        stopped.guest.pause(soon()).expect("pause");
        if number(3) > 0 {
            stopped.move_to_new_vm(kind).expect("save and load");
        }
    }
    let reached = stopped.guest.steps().unwrap().into_iter().max().unwrap_or(0);
    let model = stopped.run_to_and_check(reached + 20_000);
    if spec.program != Program::Scanner {
        let seen: usize = model.nonces_seen().iter().map(Vec::len).sum();
        assert!(seen > 1, "no incarnation after the first was noticed");
    }
}

impl<G: BareGuest + ?Sized> Rig<G> {
    fn around(spec: GuestSpec, ram: Ram, sink: Arc<Collected>, guest: Box<G>) -> Self {
        let mut rig = Self { spec, ram, sink, guest, issued: Vec::new() };
        rig.guest.boot().expect("boot");
        rig.new_incarnation();
        rig
    }

    pub fn new_incarnation(&mut self) {
        let nonce = 0x1000 + self.issued.len() as u64 * 0x77;
        self.issued.push(nonce);
        self.guest.set_incarnation(nonce).expect("nonce");
    }

    /// Lets the guest run to a step, and checks all of its memory and output.
    pub fn run_to_and_check(&mut self, step: u64) -> Model {
        self.guest.park_at_step(step).expect("park");
        self.guest.resume().expect("resume");
        let steps = self.guest.wait_parked(soon()).unwrap_or_else(|error| panic!("{error} of {:?}", self.spec));
        let model = Model::new(&self.spec, &steps, &self.ram.alias, &self.issued).expect("model");
        let comparison = model.compare(&self.ram.alias, 8);
        assert!(comparison.is_equal(), "steps {steps:?}: {comparison}");
        let packets = self.sink.0.lock().unwrap();
        assert!(packets.iter().zip(0..).all(|(packet, sequence)| packet.sequence == sequence), "a gap in the output");
        let seen = model.check_packets(packets.iter().map(|packet| (packet.sequence, packet.bytes.as_slice())));
        assert_eq!(seen.unwrap_or_else(|error| panic!("steps {steps:?}: {error}")), model.packets_due());
        drop(packets);
        model
    }
}
