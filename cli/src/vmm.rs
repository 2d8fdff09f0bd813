//! Hidden subcommands: processes that belay starts beside itself.

use crate::exit::Exit;
use crate::quantity::Span;
use crate::{complain, holder};
use belay_vmm_glue::kvm::apart;
use clap::Args;
use std::ffi::OsString;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;

/// The VMM takes everything over its standard input, a socket.
#[derive(Debug, Clone, Args)]
pub struct VmmArgs {
    /// Directory of the door by which another page server can come in
    #[arg(long, value_name = "DIR")]
    doors: Option<PathBuf>,
    /// How long the guest's memory is kept without a page server
    #[arg(long, value_name = "TIME")]
    linger: Option<Span>,
}

/// Runs the VMM.
pub fn run(args: VmmArgs) -> Exit {
    let socket = std::io::stdin().as_fd().try_clone_to_owned().map(UnixStream::from);
    let linger = args.linger.map_or(holder::LINGER, |linger| linger.0);
    let serve = |socket| apart::serve(socket, Some(linger), args.doors.as_deref());
    let served = socket.map_err(apart::ServeError::from).and_then(serve);
    match served {
        Ok(()) => Exit::Done,
        Err(error) => {
            complain(
                &error,
                "`belay send` and `belay receive` start the VMM with --vmm apart; it is of no use by itself.",
            );
            Exit::Failed
        }
    }
}

/// The guard and the leash take everything over their standard descriptors.
#[derive(Debug, Clone, Args)]
pub struct GuardArgs {}

/// Runs the guard.
pub fn run_guard(_args: GuardArgs) -> Exit {
    match belay_vmm_glue::guard::guard_main() {
        Ok(()) => Exit::Done,
        Err(error) => {
            complain(&error, "`belay receive` starts the guard; it is of no use by itself.");
            Exit::Failed
        }
    }
}

/// What the fence hook's holder is given.
#[derive(Debug, Clone, Args)]
pub struct HookArgs {
    /// For sh
    command: OsString,
}

/// Runs the fence hook and holds it.
pub fn run_hook(args: &HookArgs) -> ExitCode {
    match belay_vmm_glue::fence_hook::hold(&args.command) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            complain(&error, "`belay send --fence-hook` starts it; it is of no use by itself.");
            ExitCode::from(Exit::Failed.code())
        }
    }
}

/// Runs the leash.
pub fn run_leash(_args: GuardArgs) -> Exit {
    match belay_vmm_glue::qemu::keeping::leash_main() {
        Ok(()) => Exit::Done,
        Err(error) => {
            complain(&error, "`belay send` and `belay receive` start the leash of a QEMU; it is of no use by itself.");
            Exit::Failed
        }
    }
}
