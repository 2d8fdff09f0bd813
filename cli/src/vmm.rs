//! Hidden subcommands: processes that belay starts beside itself.

use crate::complain;
use crate::exit::Exit;
use clap::Args;

/// The guard takes everything over its standard input.
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
