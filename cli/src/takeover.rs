//! `belay receive --takeover`: finds the VMM that a dead page server left, and gets in.

use crate::exit::Exit;
use belay_transport::Deadline;
use belay_vmm_glue::kvm::apart::{DoorError, Estate, Waiting, waiting};
use belay_vmm_glue::qemu::estate::{self, QemuEstate};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long a page server that was killed may take to be gone: the address space of a large guest goes slowly.
const GONE_BOUND: Duration = Duration::from_secs(30);

/// Why there is nothing to go on with.
#[derive(Debug, thiserror::Error)]
pub enum TakeoverError {
    #[error("cannot look for waiting VMMs in {directory}")]
    Look {
        directory: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("no VMM waits in {directory}")]
    None { directory: PathBuf },
    #[error("VMM {pid} does not wait in {directory}; there are {there:?}")]
    NotThis { directory: PathBuf, pid: u32, there: Vec<i32> },
    #[error("several VMMs are in {directory}: {there:?}")]
    Several { directory: PathBuf, there: Vec<i32> },
    #[error(transparent)]
    Door(#[from] DoorError),
}

impl TakeoverError {
    /// What to do.
    pub fn advice(&self) -> &'static str {
        match self {
            Self::Look { .. } | Self::None { .. } | Self::NotThis { .. } => {
                "Name the --state-dir of the `belay receive --vmm apart`, or `belay receive --linger … qemu`, that died. Any other VMM ended with it: \
                 the source catches its guest."
            }
            Self::Several { .. } => "Say which one: --takeover PID.",
            Self::Door(DoorError::Taken { .. }) => {
                "One page server at a time. If that one hangs, end it (SIGKILL): the guest waits for the next."
            }
            Self::Door(DoorError::NotEnded { .. }) => "It is being torn down; try again.",
            Self::Door(_) => "Nothing was changed there. Both must be of one build of belay and run as one user.",
        }
    }

    /// The exit code.
    pub fn exit(&self) -> Exit {
        match self {
            Self::Look { .. } | Self::None { .. } | Self::NotThis { .. } => Exit::NothingToTakeOver,
            Self::Several { .. } => Exit::Usage,
            Self::Door(DoorError::Taken { .. } | DoorError::NotEnded { .. }) => Exit::StillHeld,
            Self::Door(_) => Exit::Failed,
        }
    }
}

/// Gets in where a VMM waits in `directory`: the process `asked`, or with 0 the only one there is.
pub fn enter(directory: &Path, asked: u32) -> Result<Estate, TakeoverError> {
    let door = door(directory, asked, waiting(directory))?;
    Ok(Estate::enter(&door, Deadline::after(GONE_BOUND))?)
}

/// As [`enter`], where a QEMU waits.
pub fn enter_qemu(directory: &Path, asked: u32) -> Result<QemuEstate, TakeoverError> {
    let door = door(directory, asked, estate::waiting(directory))?;
    Ok(QemuEstate::enter(&door, Deadline::after(GONE_BOUND))?)
}

/// Whose door is asked for.
fn door(directory: &Path, asked: u32, there: io::Result<Vec<Waiting>>) -> Result<PathBuf, TakeoverError> {
    let owned = || directory.to_owned();
    let there = there.map_err(|source| TakeoverError::Look { directory: owned(), source })?;
    let pids: Vec<_> = there.iter().map(|waiting| waiting.pid).collect();
    let of = |waiting: &Waiting| waiting.pid.unsigned_abs() == asked;
    let found = match (asked, there.as_slice()) {
        (_, []) => return Err(TakeoverError::None { directory: owned() }),
        (0, [one]) => one,
        (0, _) => return Err(TakeoverError::Several { directory: owned(), there: pids }),
        (pid, all) => match all.iter().find(|waiting| of(waiting)) {
            Some(one) => one,
            None => return Err(TakeoverError::NotThis { directory: owned(), pid, there: pids }),
        },
    };
    Ok(found.path.clone())
}
