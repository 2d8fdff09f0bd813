//! What `send` and `receive` share: the proof guest that one of them holds at the end, its output, and the check of both.

use crate::exit::Exit;
use crate::options::{Drive, GuestOptions, VmmPlace};
use crate::quantity::Span;
use crate::report;
use belay_checkpoint::guest::{Guest, GuestError, Packet, TrackerKind};
use belay_checkpoint::outbox::{Bounds, Emitter, Outbox};
use belay_transport::Deadline;
use belay_vmm_glue::kvm::guests::GuestSpec;
use belay_vmm_glue::migrate::observation::{Kind, Observer, us};
use belay_vmm_glue::witness::observer::ObserverClient;
use belay_vmm_glue::witness::proof::{self, ProofGuest};
use crossbeam_channel::Receiver;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// What a guest may have waiting to leave before its vCPUs park.
pub const OUTBOX_BOUNDS: Bounds = Bounds { bytes: 16 << 20, packets: 65_536 };

/// Where a guest's output goes when nobody asked for it.
struct Nowhere;

impl Emitter for Nowhere {
    fn send(&mut self, _packet: &Packet) -> io::Result<()> {
        Ok(())
    }
}

/// The way to the observer at `address`, or to nowhere.
pub fn output(address: Option<&str>, role: &str) -> io::Result<Box<dyn Emitter>> {
    match address {
        Some(address) => Ok(Box::new(ObserverClient::connect(address, role)?)),
        None => Ok(Box::new(Nowhere)),
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
    std::env::var_os("XDG_RUNTIME_DIR").map_or_else(std::env::temp_dir, PathBuf::from).join("belay")
}

/// The check of all RAM, and how long a guest may take to come to a point where it can be made.
const PARK_BOUND: Duration = Duration::from_secs(20);

/// Stands the guest still, compares all of its RAM, and notes what was found; whether all is as it must be.
pub fn check(guest: &mut dyn ProofGuest, spec: &GuestSpec, issued: &[u64], output: &Outbox, observer: &Observer) -> bool {
    let begun = Instant::now();
    match proof::check(guest, spec, issued, Deadline::after(PARK_BOUND)) {
        Ok(checked) => {
            let all_sent = output.wait_sent(Deadline::after(PARK_BOUND));
            let detail = match (checked.comparison.is_equal(), all_sent) {
                (true, true) => String::new(),
                (false, _) => checked.comparison.to_string(),
                (true, false) => "output that may leave did not leave".to_owned(),
            };
            let nonces = checked.nonces.iter().map(|log| log.iter().map(|seen| (seen.step, seen.nonce)).collect());
            observer.note(
                None,
                Kind::Checked {
                    pages: checked.comparison.pages_compared,
                    wrong_pages: checked.comparison.pages_different,
                    steps: checked.steps.clone(),
                    nonces: nonces.collect(),
                    issued: issued.to_vec(),
                    detail: detail.clone(),
                    took_us: us(begun.elapsed()),
                },
            );
            detail.is_empty()
        }
        Err(error) => {
            report::failed(observer, &error, "The guest's memory could not be judged, so nothing is proven.");
            false
        }
    }
}

/// Lets the guest run on for `run_on` (or until a signal), then checks it if that was asked for.
#[expect(clippy::too_many_arguments, reason = "the end of a command: everything it made goes in")]
pub fn run_on(
    guest: &mut dyn ProofGuest,
    spec: &GuestSpec,
    issued: &[u64],
    run_on: Option<Span>,
    checked: bool,
    output: &Outbox,
    words: &Receiver<i32>,
    observer: &Observer,
    exit: Exit,
) -> Exit {
    let interrupted = match run_on {
        Some(span) => words.recv_timeout(span.0).is_ok(),
        None => words.recv().is_ok(),
    };
    let good = !checked || check(guest, spec, issued, output, observer);
    cpu_time(observer);
    match (good, interrupted && run_on.is_some()) {
        (false, _) => Exit::CheckFailed,
        (true, true) => Exit::Interrupted,
        (true, false) => exit,
    }
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
