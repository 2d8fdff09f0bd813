//! Guests of QEMU: `belay send … qemu` and `belay receive … qemu`.
//!
//! The proof guest's rooms (`send`, `receive`, `holder`) run their guest themselves and can look into it; a QEMU was there before, and goes
//! on after. So these are rooms of their own, and what both share is called from here.

pub mod receive;
pub mod send;

use belay_vmm_glue::guard::{GuardCommand, GuardError};
use std::path::{Path, PathBuf};

/// How the process is started that ends a QEMU with belay.
fn leash() -> Result<GuardCommand, GuardError> {
    GuardCommand::this_program(&["leash"])
}

/// Where a QEMU that this process starts has its monitor and its log.
fn directory(under: &Path, what: &str) -> PathBuf {
    under.join(format!("{what}-{}", std::process::id()))
}
