//! A QEMU guest moved by belay: `belay receive` and `belay send`, two processes.

use super::machine::Vm;
use super::moved::Moved;
use super::qemu::MIGRATED;
use crate::belay::Belay;
use crate::error::BenchError;
use belay_transport::fabric::FabricKind;
use belay_vmm_glue::migrate::observation::Kind;
use std::time::Instant;

/// Moves the guest of `source` into `destination`, which waits.
pub fn migrate(belay: &Belay, fabric: FabricKind, source: &Vm, destination: &Vm) -> Result<Moved, BenchError> {
    let (here, there) = (source.socket.display().to_string(), destination.socket.display().to_string());
    let address = belay.address(fabric, "listen");
    let (fabric, state) = (fabric.to_string(), belay.path("there"));
    let words = ["receive", "--fabric", &fabric, "--listen", &address, "--state-dir", &state, "qemu", "--qmp", &there];
    let (mut receiver, address) = belay.start(&words)?.listening()?;
    let ordered = Instant::now();
    let words = ["send", "--fabric", &fabric, "--to", &address, "--policy", "none"];
    let dirs = ["--state-dir", &belay.path("here"), "--run-dir", &belay.path("run"), "qemu", "--qmp", &here];
    let mut sender = belay.start(&[&words[..], &dirs].concat())?;
    let (released, _) = sender.wait("move the guest", MIGRATED, |kind| matches!(kind, Kind::Released { .. }))?;
    sender.end()?;
    receiver.end()?;
    Ok(Moved {
        ordered,
        total: released - ordered,
        blackout: sender.blackout(),
        bytes: receiver.bytes(),
        helpers: [sender.cpu(), receiver.cpu()],
    })
}
