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
