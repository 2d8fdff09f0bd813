//! What `send` and `receive` share: the proof guest that one of them holds at the end, its output, and the check of both.

use crate::exit::Exit;
use crate::options::{Drive, VmmPlace};
use crate::quantity::Span;
use crate::report;
use belay_checkpoint::guest::{Guest, GuestError, Packet, PacketSink, TrackerKind};
use belay_checkpoint::outbox::{Bounds, Emitter, Outbox};
use belay_checkpoint::tracker::write_protection;
use belay_transport::pages::PageStates;
use belay_transport::region::RamFile;
use belay_transport::uffd::{Features, OpenMode, Uffd};
use belay_transport::{Deadline, RegionId, explain};
use belay_vmm_glue::guard::{GuardCommand, GuardError, LifePage};
use belay_vmm_glue::kvm::apart::{Estate, FaultSource, Keeper, RemoteGuest, VmmFaults};
use belay_vmm_glue::kvm::guests::{GuestSpec, Program};
use belay_vmm_glue::kvm::registration::{features, register};
use belay_vmm_glue::kvm::{DEFAULT_RING_ENTRIES, HostGuest, KvmGuest, KvmOptions, SharedGuest, Tracking};
use belay_vmm_glue::migrate::destination::{Built, Host, Ram, VMM_SLOT, shard_ranges};
use belay_vmm_glue::migrate::observation::{Kind, Observer, us};
use belay_vmm_glue::migrate::operator::{Ask, Ended as WaitEnded, Words};
use belay_vmm_glue::migrate::settings::VmmSpec;
use belay_vmm_glue::migrate::source::{SourceError, fresh_nonce};
use belay_vmm_glue::migrate::status::Board;
use belay_vmm_glue::witness::model::{ModelError, NonceSeen};
use belay_vmm_glue::witness::observer::{ObserverAddress, ObserverClient};
use belay_vmm_glue::witness::proof::{self, CheckError, Checked};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Why a guest that was to be moved is not.
pub const CANCELLED: &str = "the operator cancelled the migration";

/// What a guest may have waiting to leave before its vCPUs park.
pub const OUTBOX_BOUNDS: Bounds = Bounds { bytes: 16 << 20, packets: 65_536 };

/// Where a guest's output goes when nobody asked for it.
struct Nowhere;

/// The way to nowhere.
pub fn nowhere() -> Box<dyn Emitter> {
    Box::new(Nowhere)
}

impl Emitter for Nowhere {
    fn send(&mut self, _packet: &Packet) -> io::Result<()> {
        Ok(())
    }
}

/// The way to the observer at `address`, or to nowhere.
pub fn output(address: Option<&str>, role: &str) -> io::Result<Box<dyn Emitter>> {
    match address {
        Some(address) => {
            let address: ObserverAddress = address.parse().map_err(io::Error::other)?;
            Ok(Box::new(ObserverClient::new(address, role)))
        }
        None => Ok(nowhere()),
    }
}

/// Source memory for the largest epoch: every page of the guest, its index, device state and held output.
pub fn overflow_for(memory_bytes: u64) -> u64 {
    memory_bytes + memory_bytes / 32 + (32 << 20)
}

/// State that outlives a process: `/var/lib/belay` for root, else where the user's own state goes.
pub fn default_state_dir() -> PathBuf {
    if rustix::process::geteuid().is_root() {
        return PathBuf::from("/var/lib/belay");
    }
    let home = std::env::var_os("HOME").map_or_else(std::env::temp_dir, PathBuf::from);
    std::env::var_os("XDG_STATE_HOME").map_or_else(|| home.join(".local/state"), PathBuf::from).join("belay")
}

/// Sockets and page states that live as long as the processes: `/run/belay` for root, else the user's runtime directory.
pub fn default_run_dir() -> PathBuf {
    if rustix::process::geteuid().is_root() {
        return PathBuf::from("/run/belay");
    }
    let own = || std::env::temp_dir().join(format!("belay-{}", rustix::process::geteuid().as_raw()));
    std::env::var_os("XDG_RUNTIME_DIR").map_or_else(own, |directory| PathBuf::from(directory).join("belay"))
}

/// How long a guest may take to come to a point where it can be checked.
const PARK_BOUND: Duration = Duration::from_secs(20);
/// How long a fenced guest is asked to stand still, which it does already unless it waits for a page.
const STILL_BOUND: Duration = Duration::from_millis(200);
/// Said of a fenced guest whose memory could not be looked at.
pub const NOT_COMPARED: &str = "not-compared";
/// How long a guest may take to fill its memory.
const FILL_BOUND: Duration = Duration::from_secs(120);

/// What drives guest memory, as decided on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Driver {
    Kvm,
    /// Host threads, and why.
    Threads(String),
}

impl Driver {
    /// KVM where it can be used and where faults raised in it can be held; else threads, unless KVM was insisted on.
    pub fn choose(asked: Option<Drive>) -> Self {
        let kvm = || {
            std::fs::File::options()
                .read(true)
                .write(true)
                .open("/dev/kvm")
                .map_err(|error| format!("/dev/kvm: {error}"))
        };
        let faults = || Uffd::open(OpenMode::All, Features::NONE).map_err(|error| error.to_string());
        match asked.unwrap_or(Drive::Auto) {
            Drive::Kvm => Self::Kvm,
            Drive::Threads => Self::Threads("as asked".to_owned()),
            Drive::Auto => match kvm().and_then(|_| faults()) {
                Ok(_) => Self::Kvm,
                Err(why) => Self::Threads(format!("{why}; `belay check` says how to mend it")),
            },
        }
    }

    fn name(&self) -> String {
        match self {
            Self::Kvm => "KVM".to_owned(),
            Self::Threads(why) => format!("host threads ({why})"),
        }
    }

    /// The tracker to use when none was asked for: threads of the host are seen by userfaultfd alone.
    pub fn tracker(&self) -> TrackerKind {
        match self {
            Self::Kvm => TrackerKind::KvmRing,
            Self::Threads(_) => TrackerKind::UffdWp,
        }
    }
}

/// How long a VMM whose page server has died keeps the guest's memory, unless it is told otherwise.
pub const LINGER: Duration = Duration::from_secs(3600);

/// Where another page server can come in to a VMM of its own, and for how long it is waited for.
#[derive(Debug, Clone)]
pub struct Doors {
    pub directory: PathBuf,
    pub linger: Duration,
}

/// A VMM, its guest paused and empty; beside it the guest's other face where it runs in a process of its own.
fn build(
    driver: &Driver,
    (place, doors): (VmmPlace, Option<&Doors>),
    spec: &GuestSpec,
    tracker: Option<TrackerKind>,
    ram: &Ram,
    sink: Arc<dyn PacketSink>,
) -> Result<Vmm, GuestError> {
    let (file, alias) = (Arc::clone(&ram.file), Arc::clone(&ram.alias));
    let tracking = match tracker {
        Some(TrackerKind::KvmLog) => Tracking::Log,
        Some(TrackerKind::KvmRing) => Tracking::Ring { entries: DEFAULT_RING_ENTRIES },
        Some(TrackerKind::UffdWp | TrackerKind::UffdSync) | None => Tracking::None,
    };
    let options = KvmOptions { tracking, ..KvmOptions::default() };
    let own = std::process::id();
    Ok(match (driver, place) {
        (Driver::Kvm, VmmPlace::InProcess) => {
            let guest = KvmGuest::new(spec, &options, file, alias, sink)?;
            Vmm { guest: SharedGuest::new(Box::new(guest)), remote: None, pid: own }
        }
        (Driver::Kvm, VmmPlace::Apart) => {
            let program = std::env::current_exe()
                .map_err(|source| GuestError::Io { doing: "find this program".into(), source })?;
            let mut command = Command::new(program);
            // Its own group: a SIGINT from the terminal is for whoever holds the guest, who then decides.
            command.arg("vmm").process_group(0);
            if let Some(Doors { directory, linger }) = doors {
                command.arg("--doors").arg(directory).arg("--linger").arg(Span(*linger).to_string());
            }
            let guest = RemoteGuest::spawn(command, spec, &options, file, alias, sink)?;
            let (pid, hands) = (guest.pid().unwrap_or(own), (guest.faults(), guest.keeper()));
            Vmm { guest: SharedGuest::new(Box::new(guest)), remote: Some(hands), pid }
        }
        (Driver::Threads(_), VmmPlace::InProcess) => {
            let guest = HostGuest::new(spec, file, alias, sink)?;
            Vmm { guest: SharedGuest::new(Box::new(guest)), remote: None, pid: own }
        }
        (Driver::Threads(_), VmmPlace::Apart) => {
            return Err(GuestError::Unsupported(
                "host threads run in the page server's process only: drop --vmm apart".into(),
            ));
        }
    })
}

/// What [`build`] built.
struct Vmm {
    guest: SharedGuest,
    /// By which a VMM of its own is asked for its faults, and to keep things.
    remote: Option<(FaultSource, Keeper)>,
    pid: u32,
}

/// Builds a VMM over `file`; the process it runs in.
fn place_over(
    spec: &GuestSpec,
    file: RamFile,
    (driver, place): (&Driver, Option<VmmPlace>),
    sink: Arc<dyn PacketSink>,
) -> Result<(SharedGuest, u32), HolderError> {
    let file = Arc::new(file);
    let alias = Arc::new(file.map().map_err(HolderError::Map)?);
    let place = place.unwrap_or(VmmPlace::InProcess);
    let Vmm { guest, pid, .. } = build(driver, (place, None), spec, None, &Ram { id: RegionId(0), file, alias }, sink)?;
    Ok((guest, pid))
}

/// A guest that runs, with all it was given.
pub struct Held {
    pub guest: SharedGuest,
    pub spec: GuestSpec,
    /// Incarnation nonces, in order.
    pub nonces: Vec<u64>,
}

impl Held {
    /// Makes guest RAM, boots the guest for the first time and lets it run.
    pub fn start(
        spec: &GuestSpec,
        file: RamFile,
        (driver, place): (&Driver, Option<VmmPlace>),
        sink: Arc<dyn PacketSink>,
        observer: &Observer,
    ) -> Result<Self, HolderError> {
        let (mut guest, pid) = place_over(spec, file, (driver, place), sink)?;
        if pid != std::process::id() {
            observer.note(None, Kind::VmmStarted { pid });
        }
        let nonce = fresh_nonce()?;
        guest.lock().boot()?;
        guest.set_incarnation(nonce)?;
        guest.resume()?;
        observer.note(None, Kind::GuestStarted { nonce, driven_by: driver.name(), spec: spec.clone() });
        Ok(Self { guest, spec: spec.clone(), nonces: vec![nonce] })
    }

    /// A VMM with no state over guest RAM that another process left.
    pub fn adopt(
        spec: &GuestSpec,
        file: RamFile,
        (driver, place): (&Driver, Option<VmmPlace>),
        nonces: Vec<u64>,
        sink: Arc<dyn PacketSink>,
        observer: &Observer,
    ) -> Result<Self, HolderError> {
        let (guest, pid) = place_over(spec, file, (driver, place), sink)?;
        if pid != std::process::id() {
            observer.note(None, Kind::VmmStarted { pid });
        }
        Ok(Self { guest, spec: spec.clone(), nonces })
    }

    /// Waits until the guest has filled its memory, and then for as long as it shall run here; what ended the wait. `board` shows each.
    pub fn warm_up(&self, run: Duration, words: &Words, board: &Board) -> Result<WaitEnded, HolderError> {
        board.phase("filling", "the guest fills its memory before it is moved");
        let taken = |ask| match ask {
            Ask::Cancel => {
                // Shown before it is answered: whoever has the answer may look at once.
                board.phase("running", CANCELLED);
                Ok("the guest is not moved and runs on here".to_owned())
            }
            ask => Err(format!(
                "the guest has not been moved yet, so there is nothing to {ask}; `belay cancel` calls it off"
            )),
        };
        let begun = Instant::now();
        while self.guest.steps().contains(&0) && self.spec.program != Program::Scanner {
            if let Some(failure) = self.guest.lock().failure() {
                return Err(GuestError::Crashed(failure).into());
            }
            if begun.elapsed() > FILL_BOUND {
                return Err(HolderError::NotFilled { bound: FILL_BOUND });
            }
            match words.wait(Some(Duration::from_millis(5)), taken) {
                WaitEnded::Time => {}
                ended => return Ok(ended),
            }
        }
        Ok(words.wait(Some(run), taken))
    }

    /// Stands the guest still, compares all of its RAM, and notes what was found; whether all is as it must be.
    pub fn check(&self, output: &Outbox, observer: &Observer) -> bool {
        let begun = Instant::now();
        let checked = match proof::check(&self.guest, &self.nonces, Deadline::after(PARK_BOUND)) {
            Ok(checked) => checked,
            Err(error) => {
                report::failed(observer, &error, "The guest's memory could not be judged, so nothing is proven.");
                return false;
            }
        };
        let all_sent = output.wait_sent(Deadline::after(PARK_BOUND));
        let detail = match (checked.comparison.is_equal(), all_sent) {
            (true, true) => String::new(),
            (false, _) => checked.comparison.to_string(),
            (true, false) => "output that may leave did not leave".to_owned(),
        };
        self.tell(checked, None, detail, begun, observer)
    }

    /// Compares what a fenced guest has of its memory, of which `states` tells, and notes what was found: whoever promotes it, or tethers it again,
    /// runs it with that. False where a byte is not what it must be; what cannot be looked at is said to be so, and is not held against it.
    pub fn check_fenced(&self, states: &PageStates, observer: &Observer) -> bool {
        let begun = Instant::now();
        let checked = match proof::check_stopped(&self.guest, &self.nonces, states, Deadline::after(STILL_BOUND)) {
            Ok(checked) => checked,
            // What it says of itself lies in the memory that is in question.
            Err(error @ CheckError::Model(ModelError::Nonce(_))) => {
                report::failed(observer, &error, "The fenced guest's memory is not what it must be.");
                return false;
            }
            Err(error) => {
                observer.note(None, Kind::State { state: NOT_COMPARED.to_owned(), why: explain(&error) });
                return true;
            }
        };
        let detail = if checked.comparison.is_equal() { String::new() } else { checked.comparison.to_string() };
        let not_there = checked.comparison.pages_not_compared;
        self.tell(checked, Some(not_there), detail, begun, observer)
    }

    /// Notes what a comparison begun at `begun` found; whether all is as it must be, which is where there is no `detail`.
    fn tell(
        &self,
        Checked { comparison, steps, nonces }: Checked,
        not_compared: Option<u64>,
        detail: String,
        begun: Instant,
        observer: &Observer,
    ) -> bool {
        let good = detail.is_empty();
        let log = |log: Vec<NonceSeen>| log.into_iter().map(|seen| (seen.step, seen.nonce)).collect();
        let checked = Kind::Checked {
            pages: comparison.pages_compared,
            not_compared,
            wrong_pages: comparison.pages_different,
            steps,
            nonces: nonces.into_iter().map(log).collect(),
            issued: self.nonces.clone(),
            detail,
            took_us: us(begun.elapsed()),
        };
        observer.note(None, checked);
        good
    }

    /// Lets the guest run on for `run_on` (or until a signal), then checks it if that was asked for; `exit` if all went well.
    pub fn run_on(
        &self,
        run_on: Option<Span>,
        checked: bool,
        output: &Outbox,
        words: &Words,
        observer: &Observer,
        exit: Exit,
    ) -> Exit {
        let over = |ask| Err(format!("the migration is over and the guest runs here: there is nothing to {ask}"));
        let ended = words.wait(run_on.map(|span| span.0), over);
        let interrupted = run_on.is_some() && ended == WaitEnded::Signal;
        let good = !checked || self.check(output, observer);
        cpu_time(observer);
        match (good, interrupted) {
            (false, _) => Exit::CheckFailed,
            (true, true) => Exit::Interrupted,
            (true, false) => exit,
        }
    }
}

/// What a destination's role asks of this host.
pub struct ThisHost {
    drive: Option<Drive>,
    place: VmmPlace,
    doors: Doors,
    /// A VMM that a dead page server left.
    estate: Option<Estate>,
    /// The guest, once it was built.
    pub built: Option<SharedGuest>,
}

impl ThisHost {
    /// A host that drives guests as asked.
    pub fn new(drive: Option<Drive>, place: Option<VmmPlace>, doors: Doors) -> Self {
        Self { drive, place: place.unwrap_or(VmmPlace::InProcess), doors, estate: None, built: None }
    }

    /// Goes on with the VMM of `estate`.
    pub fn adopt_from(&mut self, estate: Estate) {
        self.place = VmmPlace::Apart;
        self.estate = Some(estate);
    }
}

impl Host for ThisHost {
    fn build(
        &mut self,
        spec: &VmmSpec,
        ram: &[Ram],
        shards: u16,
        tracker: Option<TrackerKind>,
        sink: Arc<dyn PacketSink>,
        life: Option<&LifePage>,
    ) -> Result<Built, GuestError> {
        let VmmSpec::Kvm(spec) = spec else {
            let why = "the guest that comes is QEMU's: start `belay receive … qemu -- qemu-system-x86_64 …`";
            return Err(GuestError::Unsupported(why.to_owned()));
        };
        let [region] = ram else {
            return Err(GuestError::Unsupported(format!("{} regions of RAM; this VMM has one", ram.len())));
        };
        let driver = Driver::choose(self.drive);
        let Vmm { guest, remote, pid } = build(&driver, (self.place, Some(&self.doors)), spec, tracker, region, sink)?;
        let parts = shard_ranges(ram, shards);
        let page_size = region.file.page_size();
        let bytes: Vec<_> = parts
            .iter()
            .flatten()
            .map(|range| range.frames.start << page_size.shift()..range.frames.end << page_size.shift())
            .collect();
        if bytes.len() != parts.len() {
            return Err(GuestError::Unsupported(format!(
                "{shards} shards are more than {} of RAM can be split in",
                region.file.len()
            )));
        }
        let mode = match driver {
            Driver::Kvm => OpenMode::All,
            Driver::Threads(_) => OpenMode::UserModeOnly,
        };
        let address = guest.memory()[0].vmm_address;
        let protection = tracker.and_then(write_protection);
        let uffds = match &remote {
            Some((faults, _)) => {
                let features = features(page_size, protection);
                let one = |part: &std::ops::Range<u64>| {
                    faults.userfaultfd(features, part.clone(), VmmFaults::MissingAndMinor, protection.is_some())
                };
                bytes.iter().map(one).collect()
            }
            None => register(address, page_size, &bytes, protection, mode).map_err(|error| GuestError::Io {
                doing: "registering guest RAM".into(),
                source: io::Error::other(error),
            }),
        }?;
        self.built = Some(guest.clone());
        let shards = uffds.into_iter().zip(parts).collect();
        let keeper = remote.map(|(_, keeper)| keeper);
        let gives_sign = match (&keeper, life) {
            (Some(keeper), Some(life)) => keeper.give_sign(life.fd(), VMM_SLOT)?,
            _ => false,
        };
        Ok(Built { guest: Box::new(guest), shards, pid, gives_sign, keeper })
    }

    fn adopt(&mut self, ram: &[Ram], sink: Arc<dyn PacketSink>) -> Result<(Box<dyn Guest>, Keeper), GuestError> {
        let estate = self.estate.take();
        let estate = estate.ok_or_else(|| GuestError::Unsupported("there is no VMM to take over".into()))?;
        let guest = RemoteGuest::take_over(estate, Arc::clone(&ram[0].alias), sink)?;
        let keeper = guest.keeper();
        let guest = SharedGuest::new(Box::new(guest));
        self.built = Some(guest.clone());
        Ok((Box::new(guest), keeper))
    }

    fn output(&mut self, address: Option<&str>) -> io::Result<Box<dyn Emitter>> {
        output(address, "destination")
    }

    fn vmm_is_apart(&self) -> bool {
        self.place == VmmPlace::Apart
    }

    fn guard_command(&self) -> Result<GuardCommand, GuardError> {
        GuardCommand::this_program(&["guard"])
    }
}

/// Why a guest could not be run here.
#[derive(Debug, thiserror::Error)]
pub enum HolderError {
    #[error(transparent)]
    Guest(#[from] GuestError),
    #[error("cannot map guest RAM")]
    Map(#[source] io::Error),
    #[error(transparent)]
    Nonce(#[from] SourceError),
    #[error("the guest has not filled its memory within {bound:?}")]
    NotFilled { bound: Duration },
}

/// Notes the processor time this process has used (getrusage(2)).
pub fn cpu_time(observer: &Observer) {
    // SAFETY: an all-zero rusage is a valid one; it is plain integers.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: `usage` is valid for writes, and RUSAGE_SELF always succeeds.
    unsafe { libc::getrusage(libc::RUSAGE_SELF, &mut usage) };
    let microseconds = |time: libc::timeval| time.tv_sec as u64 * 1_000_000 + time.tv_usec as u64;
    let (user_us, system_us) = (microseconds(usage.ru_utime), microseconds(usage.ru_stime));
    observer.note(None, Kind::CpuTime { user_us, system_us });
}
