//! A page server dies, and another goes on with the VMM that waits. The page server that dies is this program, run again.

mod common;

use belay_checkpoint::guest::{Guest, GuestError};
use belay_transport::pages::{PageStates, RegionGeometry};
use belay_transport::region::RamFile;
use belay_transport::uffd::{Event, FaultKind, Features, OpenMode, Uffd};
use belay_transport::{Deadline, FrameIndex, PAGE_SIZE, PageSize, RegionId};
use belay_vmm_glue::kvm::apart::{DoorError, Estate, Kept, Ledger, RemoteGuest, VmmFaults, waiting};
use belay_vmm_glue::kvm::guests::{Filler, GuestSpec, Program};
use belay_vmm_glue::kvm::{BareGuest, KvmOptions, Tracking};
use belay_vmm_glue::witness::model::Model;
use common::{Collected, Ram, no_kvm, soon, spawn_with_doors};
use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const NONCE: u64 = 7;
/// Faults that the page server serves at least before it stops serving, so that the guest waits at the next.
const SERVED: u64 = 300;
/// Packets that it lets out.
const LEFT: u64 = 5;
const SERVER_VARIABLE: &str = "BELAY_TEST_IS_PAGE_SERVER";

fn spec() -> GuestSpec {
    GuestSpec {
        program: Program::Ledger,
        memory_bytes: 16 << 20,
        working_set_bytes: 8 << 20,
        rate_pages_per_s: 0,
        filler: Filler::Host,
        ..GuestSpec::default()
    }
}

fn features() -> Features {
    Features::MISSING_SHMEM.union(Features::MINOR_SHMEM)
}

#[test]
fn the_vmm_process_of_the_other_tests() {
    common::be_a_vmm_if_asked();
}

/// Serves faults from the file itself: what has landed is what was served.
fn serve(uffd: &Uffd, states: &PageStates, address: u64, most: u64, until: &dyn Fn() -> bool) -> u64 {
    let (mut events, mut served) = ([Event::Unmap { start: 0, end: 0 }; 1], 0);
    while served < most && !until() {
        if uffd.read_events(&mut events).expect("events") == 0 {
            std::thread::sleep(Duration::from_micros(20));
            continue;
        }
        let Event::Fault { address: at, kind, .. } = events[0] else { panic!("{events:?}") };
        assert_eq!(kind, FaultKind::Minor, "every frame was allocated");
        let page = at & !(PAGE_SIZE as u64 - 1);
        let frame = FrameIndex((page - address) / PAGE_SIZE as u64);
        if states.claim(0, frame) {
            states.land_run(0, frame, 1, &mut |_| ());
            served += 1;
        }
        assert!(uffd.continue_range(page, PAGE_SIZE as u64, PageSize::Small, false).expect("continue").done());
    }
    served
}

/// The page server that is killed.
#[test]
fn the_page_server_process_of_the_other_tests() {
    let Some(doors) = std::env::var_os(SERVER_VARIABLE).map(PathBuf::from) else { return };
    let spec = spec();
    let (ram, sink) = (Ram::of(&spec), Arc::new(Collected::default()));
    let options = KvmOptions { tracking: Tracking::None, irqchip: false };
    ram.file.preallocate(1, &|_| ()).unwrap();
    let mut guest = spawn_with_doors(&spec, &options, &ram, &sink, Some(&doors));
    guest.boot().unwrap();
    guest.set_incarnation(NONCE).unwrap();
    let bytes = 0..spec.memory_bytes;
    let uffd = guest.faults().userfaultfd(features(), bytes, VmmFaults::MissingAndMinor, false).unwrap();
    let frames = spec.memory_bytes / PAGE_SIZE as u64;
    let geometry = RegionGeometry { id: RegionId(0), page_size: PageSize::Small, frames };
    let states = PageStates::in_memory(&[geometry]).unwrap();
    let ledger = Ledger::new().unwrap();
    let keeper = guest.keeper();
    keeper.keep(Kept::PageStates, states.file().as_fd()).unwrap();
    keeper.keep(Kept::Ledger, ledger.fd()).unwrap();
    let address = guest.memory()[0].vmm_address;
    guest.resume().unwrap();
    let shown = || sink.0.lock().unwrap().len() as u64;
    let mut served = 0;
    while served < SERVED || shown() < 2 * LEFT {
        served += serve(&uffd, &states, address, 1, &|| false);
    }
    // Claimed and never landed, as by a READ that was under way.
    assert_eq!(states.claim_run(0, FrameIndex(frames - 8), 8), 8);
    ledger.has_left(LEFT - 1);
    println!("\nserved {} {served}", guest.pid().expect("its child"));
    loop {
        std::thread::park();
    }
}

/// A page server that has served what it serves; killed and reaped at the end of the test.
struct Server {
    child: Child,
    vmm: i32,
    /// Pages that it served.
    served: u64,
}

impl Server {
    fn start(doors: &Path) -> Self {
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        command.args(["--exact", "the_page_server_process_of_the_other_tests", "--nocapture", "--test-threads=1"]);
        command.env(SERVER_VARIABLE, doors).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("spawn");
        let mut lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
        let said = lines.find_map(|line| Some(line.expect("stdout").strip_prefix("served ")?.to_owned()));
        let said = said.expect("it serves");
        let (vmm, served) = said.split_once(' ').expect("two numbers");
        Self { child, vmm: vmm.parse().expect("a pid"), served: served.parse().expect("a count") }
    }

    fn signal(&self, signal: i32) {
        // SAFETY: signals a child of this test that nobody has waited for yet.
        unsafe { libc::kill(self.child.id() as i32, signal) };
    }

    fn kill(&mut self) {
        self.child.kill().expect("kill");
        self.child.wait().expect("reap");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn ready() -> bool {
    if no_kvm() {
        return false;
    }
    match Uffd::supported(OpenMode::All) {
        Ok(_) => true,
        Err(error) => {
            eprintln!("skipped: no userfaultfd for KVM: {error}");
            false
        }
    }
}

fn door(doors: &Path, vmm: i32) -> PathBuf {
    let found = waiting(doors).expect("the directory is there");
    let ours = found.iter().find(|waiting| waiting.pid == vmm);
    ours.unwrap_or_else(|| panic!("the door of {vmm} among {found:?}")).path.clone()
}

/// What a second page server finds.
struct Taken {
    guest: RemoteGuest,
    uffd: Uffd,
    states: PageStates,
    sink: Arc<Collected>,
}

fn take_over(path: &Path) -> Taken {
    let mut estate = Estate::enter(path, soon()).expect("the seat is free");
    let states = estate.take(Kept::PageStates).expect("the states were laid down");
    let states = PageStates::open(RamFile::from_fd(states).unwrap()).expect("they can be read");
    assert!(estate.take(Kept::Will).is_none());
    let (uffd, bytes) = estate.uffds.pop().expect("a userfaultfd");
    assert_eq!(bytes, 0..spec().memory_bytes);
    let alias = Arc::new(estate.ram.map().unwrap());
    let sink = Arc::new(Collected::default());
    let guest = RemoteGuest::take_over(estate, alias, sink.clone()).expect("the VMM answers");
    Taken { guest, uffd, states, sink }
}

#[test]
fn p1_another_page_server_goes_on_where_a_dead_one_was_and_the_guest_sees_nothing_of_it() {
    if !ready() {
        return;
    }
    let doors = tempfile::tempdir().unwrap();
    let mut server = Server::start(doors.path());
    let path = door(doors.path(), server.vmm);
    server.kill();
    let Taken { mut guest, uffd, states, sink } = take_over(&path);
    let counts = states.counts();
    assert_eq!((counts.landed, counts.in_flight), (server.served, 0), "in flight is absent again, landed stays landed");
    let first = sink.0.lock().unwrap().first().map(|packet| packet.sequence);
    assert_eq!(first, Some(LEFT), "what has not left comes again, and nothing that has");
    // Whoever waited is made to ask again: the dead server had taken their faults.
    let address = guest.memory()[0].vmm_address;
    uffd.wake(address, spec().memory_bytes).unwrap();
    let ended = AtomicBool::new(false);
    let alias = guest.memory()[0].alias.clone();
    std::thread::scope(|scope| {
        let serving = scope.spawn(|| serve(&uffd, &states, address, u64::MAX, &|| ended.load(Ordering::SeqCst)));
        guest.pause(soon()).expect("served, it stops");
        let at = guest.steps().unwrap().into_iter().max().unwrap();
        guest.park_at_step(at + 6400).unwrap();
        guest.resume().unwrap();
        let steps = guest.wait_parked(soon()).expect("it goes on");
        let model = Model::new(&spec(), &steps, &alias, &[NONCE]).expect("model");
        let comparison = model.compare(&alias, 8);
        assert!(comparison.is_equal(), "{comparison}");
        let packets = sink.0.lock().unwrap();
        let due: u64 = model.packets_due().iter().sum();
        let sequences: Vec<_> = packets.iter().map(|packet| packet.sequence).collect();
        assert_eq!(sequences, (LEFT..due).collect::<Vec<_>>(), "no gap and none twice");
        drop(packets);
        ended.store(true, Ordering::SeqCst);
        assert!(serving.join().unwrap() > 0, "pages that the dead server had not served were needed");
    });
}

#[test]
fn p2_the_guest_of_a_dead_page_server_is_stopped_and_stays_so_when_its_page_comes() {
    if !ready() {
        return;
    }
    let doors = tempfile::tempdir().unwrap();
    let mut server = Server::start(doors.path());
    let path = door(doors.path(), server.vmm);
    server.kill();
    let Taken { mut guest, uffd, states, sink } = take_over(&path);
    let before = guest.steps().unwrap();
    let address = guest.memory()[0].vmm_address;
    uffd.wake(address, spec().memory_bytes).unwrap();
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| serve(&uffd, &states, address, u64::MAX, &|| ended.load(Ordering::SeqCst)));
        // Nobody asked for this stop but the VMM itself, when its page server died.
        let stopped = guest.save(&mut Vec::new());
        let deadline = soon();
        let mut last = stopped;
        while matches!(last, Err(GuestError::WrongState { .. })) && !deadline.expired() {
            last = guest.save(&mut Vec::new());
        }
        last.expect("it stands still by itself");
        ended.store(true, Ordering::SeqCst);
    });
    assert!(guest.steps().unwrap()[0] <= before[0] + spec().batch_steps, "it ran on without a page server");
    let sequences: Vec<_> = sink.0.lock().unwrap().iter().map(|packet| packet.sequence).collect();
    assert!(sequences.iter().copied().eq(LEFT..LEFT + sequences.len() as u64), "{sequences:?}");
}

#[test]
fn a_living_page_server_keeps_its_seat_also_when_it_is_frozen() {
    if !ready() {
        return;
    }
    let doors = tempfile::tempdir().unwrap();
    let mut server = Server::start(doors.path());
    let path = door(doors.path(), server.vmm);
    let pid = server.child.id() as i32;
    for signal in [libc::SIGCONT, libc::SIGSTOP] {
        server.signal(signal);
        let error = Estate::enter(&path, Deadline::after(Duration::from_millis(200))).map(drop).unwrap_err();
        assert!(matches!(error, DoorError::Taken { pid: by } if by == pid), "{error}");
    }
    server.kill();
    drop(take_over(&path));
    assert!(waiting(doors.path()).unwrap().is_empty(), "a VMM that was told to exit takes its door away");
}

#[test]
fn a_second_takeover_finds_all_that_the_first_had_when_its_server_died_in_the_handshake_or_after() {
    if !ready() {
        return;
    }
    let doors = tempfile::tempdir().unwrap();
    let mut server = Server::start(doors.path());
    let path = door(doors.path(), server.vmm);
    server.kill();
    // One that dies having said what it wants and heard nothing; one that has the seat and nothing else.
    for how in ["silent", "knock", "estate"] {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "the_page_server_that_dies_at_the_door", "--nocapture", "--test-threads=1"])
            .env(VISITOR_VARIABLE, format!("{how}:{}", path.display()))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap() == "there"), "{how}");
        if how == "estate" {
            let error = Estate::enter(&path, Deadline::after(Duration::from_millis(100))).map(drop).unwrap_err();
            assert!(matches!(error, DoorError::Taken { pid } if pid == child.id() as i32), "{error}");
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let Taken { mut guest, states, sink, .. } = take_over(&path);
    assert_eq!(states.counts().landed, server.served);
    assert_eq!(sink.0.lock().unwrap().first().map(|packet| packet.sequence), Some(LEFT));
    assert!(guest.failure().is_none());
}

const VISITOR_VARIABLE: &str = "BELAY_TEST_IS_VISITOR";

#[test]
fn the_page_server_that_dies_at_the_door() {
    let Ok(asked) = std::env::var(VISITOR_VARIABLE) else { return };
    let (how, path) = asked.split_once(':').expect("how and where");
    let stream;
    let estate;
    match how {
        "estate" => {
            estate = Estate::enter(Path::new(path), soon()).expect("free");
            assert!(!estate.uffds.is_empty());
        }
        _ => {
            stream = std::os::unix::net::UnixStream::connect(path).expect("connect");
            if how == "knock" {
                use std::io::Write;
                // Half a frame.
                (&stream).write_all(&[9, 0, 0]).expect("write");
            }
        }
    }
    println!("\nthere");
    loop {
        std::thread::park();
    }
}

#[test]
fn a_door_that_nobody_answers_and_one_whose_vmm_has_gone_are_named() {
    let doors = tempfile::tempdir().unwrap();
    assert!(waiting(&doors.path().join("nowhere")).unwrap().is_empty());
    let path = doors.path().join("vmm-2147483646.door");
    std::fs::write(&path, "").unwrap();
    let error = Estate::enter(&path, soon()).map(drop).unwrap_err();
    assert!(matches!(error, DoorError::Closed { .. }), "{error}");
    assert!(waiting(doors.path()).unwrap().is_empty() && !path.exists(), "the door of a process that has ended goes");
}
