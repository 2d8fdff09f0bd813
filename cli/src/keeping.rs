//! What `send` keeps so that another process can take over, and taking over.

use crate::exit::Exit;
use crate::holder::{self, Driver, Held};
use crate::operate::console::Console;
use crate::options::{ArbiterOptions, FabricOptions, FenceOptions, GuestOptions, SecurityOptions, TetherOptions};
use crate::quantity::Span;
use crate::send::{Going, SendArgs, SessionRefused, outsiders, see_through, session, sizes};
use crate::{report, signals};
use belay_checkpoint::journal::{JournalError, MigrationId};
use belay_checkpoint::outbox::Outbox;
use belay_transport::region::{RegionError, backing_of};
use belay_transport::session::Address;
use belay_transport::{PageSize, RegionId};
use belay_vmm_glue::fence_hook::FenceHook;
use belay_vmm_glue::migrate::arbitration::Arbitration;
use belay_vmm_glue::migrate::observation::{Kind, Observer};
use belay_vmm_glue::migrate::operator::Words;
use belay_vmm_glue::migrate::reattach::Identity;
use belay_vmm_glue::migrate::settings::{Bounds, Proposal, VmmSpec};
use belay_vmm_glue::migrate::source::keep::{self, GivenAway, Keep, KeepError, Written};
use belay_vmm_glue::migrate::source::{self, Given, Outcome, SourceConfig};
use belay_vmm_glue::migrate::status::Board;
use clap::Args;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::sync::Arc;

/// What outlives the process, and where.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Restart and takeover")]
pub struct KeepOptions {
    /// Where the journal is written, releases in it [default: /var/lib/belay, or ~/.local/state/belay without root]
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Keep guest RAM, ring and overflow memory in files here, on tmpfs or hugetlbfs: another process can then take over if this one
    /// dies. Removed at an orderly end [default: anonymous memory, which dies with the process]
    #[arg(long, value_name = "DIR", conflicts_with = "takeover")]
    pub memory_dir: Option<PathBuf>,
    /// Go on with a migration whose `belay send` has died: all of it is read from the state directory. Without an ID the only one
    /// there is
    #[arg(long, value_name = "ID", num_args = 0..=1)]
    pub takeover: Option<Option<MigrationId>>,
    /// How long a takeover waits for the destination to come back before it catches the guest from the newest committed checkpoint
    #[arg(long, value_name = "TIME", default_value = "10s")]
    pub takeover_grace: Span,
}

impl KeepOptions {
    fn state_dir(&self) -> PathBuf {
        self.state_dir.clone().unwrap_or_else(holder::default_state_dir)
    }
}

/// Options of the command that a takeover goes by, unless it is given others.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Remembered {
    guest: GuestOptions,
    tether: TetherOptions,
    fabric: FabricOptions,
    security: SecurityOptions,
    catch_on_loss: bool,
    #[serde(default)]
    fence: FenceOptions,
    #[serde(default)]
    arbiter: ArbiterOptions,
}

/// For the journal.
pub fn remember(args: &SendArgs) -> Vec<u8> {
    let mut security = args.security.clone();
    for path in [&mut security.cert, &mut security.key, &mut security.peer_cert].into_iter().flatten() {
        // Whoever takes over may stand in another directory.
        if let Ok(absolute) = std::path::absolute(&*path) {
            *path = absolute;
        }
    }
    let remembered = Remembered {
        guest: args.guest.clone(),
        tether: args.tether.clone(),
        fabric: args.fabric.clone(),
        security,
        catch_on_loss: args.catch_on_loss,
        fence: args.fence.clone(),
        arbiter: args.arbiter.clone(),
    };
    serde_json::to_vec(&remembered).expect("options are plain data")
}

/// Begins to keep, and says at once whether a takeover will be possible.
/// Guest RAM will have pages of `page_size`.
pub fn begin(
    options: &KeepOptions,
    page_size: PageSize,
    identity: Identity,
    observer: &Observer,
) -> Result<Keep, KeepError> {
    let memory_dir = options.memory_dir.as_deref().map(std::path::absolute).transpose();
    let memory_dir = memory_dir.map_err(|source| KeepError::Io { doing: "find --memory-dir", source })?;
    if let Some(directory) = &memory_dir {
        let backing = backing_of(directory)?;
        if backing != page_size {
            let (path, backing) = (directory.clone(), backing.to_string());
            return Err(RegionError::WrongPageSize { path, backing, asked: page_size }.into());
        }
    }
    let keep = Keep::begin(&options.state_dir(), memory_dir.as_deref(), identity)?;
    let memory = keep.memory_path().map(|path| path.display().to_string());
    observer.note(None, Kind::Kept { migration: identity.migration.to_string(), memory });
    Ok(keep)
}

/// Says why nothing can be kept or taken over, and with which exit code.
pub fn refused(error: &KeepError, observer: &Observer) -> Exit {
    let (exit, advice) = match error {
        KeepError::None(_) | KeepError::NothingLeft { .. } | KeepError::Journal(JournalError::NoSuch { .. }) => (
            Exit::NothingToTakeOver,
            "Nothing was started. A destination that still has the guest keeps it fenced; promote it there.",
        ),
        KeepError::Several(_) => (Exit::Usage, "Nothing was started; write --takeover ID."),
        KeepError::Journal(JournalError::Held { .. }) => {
            (Exit::StillHeld, "Nothing was started. End that process first, or let it go on.")
        }
        KeepError::Journal(JournalError::Io { .. }) | KeepError::NotWritten(_) => {
            (Exit::Missing, "Nothing was started. Make room in the state directory, or name another with --state-dir.")
        }
        KeepError::Region(RegionError::WrongPageSize { .. }) => (
            Exit::Missing,
            "Nothing was started. Say the pages of --memory-dir with --page-size, or name another directory.",
        ),
        KeepError::Region(_) | KeepError::Io { .. } => (
            Exit::Missing,
            "Nothing was started. --memory-dir must be on tmpfs or hugetlbfs with room for the guest, its ring, its overflow memory (--overflow) and 81 MiB of state.",
        ),
        KeepError::OtherProtocol { .. } => (
            Exit::KeptDamaged,
            "Nothing was started and nothing was changed. Take it over with the version of belay that began it.",
        ),
        KeepError::Journal(_) | KeepError::Damaged { .. } | KeepError::Memory { .. } => (
            Exit::KeptDamaged,
            "Nothing was started and nothing was changed. A destination that still has the guest keeps it fenced; promote it there.",
        ),
    };
    report::failed(observer, error, advice);
    exit
}

/// The migration is over: nothing of it is left.
pub fn close(keep: Keep, observer: &Observer) {
    if let Err(error) = keep.close() {
        report::failed(observer, &error, "The guest is not concerned; remove what is left by hand.");
    }
}

/// As [`close`], after a release: the journal is left until the destination has said that it knows.
pub fn released(mut keep: Keep, heard: bool, observer: &Observer) {
    if heard {
        return close(keep, observer);
    }
    if let Err(error) = keep.give_up_memory() {
        let what = format!("the memory of a released guest cannot be removed: {error}");
        report::failed_text(observer, &what, "Remove it by hand; nothing will resume that guest here.");
    }
}

/// Takes over and goes on. Where nothing is left to go on with, what is left of it is removed.
pub fn take_over(args: SendArgs, id: Option<MigrationId>, board: &Arc<Board>, observer: &Observer) -> Exit {
    let state_dir = args.keep.state_dir();
    let exit = go_on(args, id, board, observer);
    if exit == Exit::NothingToTakeOver {
        keep::sweep(&state_dir);
    }
    exit
}

fn go_on(mut args: SendArgs, id: Option<MigrationId>, board: &Arc<Board>, observer: &Observer) -> Exit {
    let fail = |what: &dyn std::error::Error, advice: &str, exit: Exit| {
        report::failed(observer, what, advice);
        exit
    };
    let keep = match Keep::take_over(&args.keep.state_dir(), id) {
        Ok(keep) => keep,
        Err(error) => return refused(&error, observer),
    };
    let written = keep.written().clone();
    let damaged = |what: &str| {
        report::failed_text(observer, what, "Nothing was started and nothing was changed.");
        Exit::KeptDamaged
    };
    let Some(proposal) = written.proposal.clone() else { return damaged("the journal has no proposal") };
    let remembered: Remembered = match serde_json::from_slice(&written.extra) {
        Ok(remembered) => remembered,
        Err(error) => return damaged(&format!("the journal's options cannot be read: {error}")),
    };
    args.guest = args.guest.or(remembered.guest);
    args.tether = args.tether.or(remembered.tether);
    args.fabric = args.fabric.or(remembered.fabric);
    args.security = args.security.or(remembered.security);
    args.catch_on_loss |= remembered.catch_on_loss;
    args.fence = args.fence.or(remembered.fence);
    args.arbiter = args.arbiter.or(remembered.arbiter);
    let outsiders = match outsiders(&args, observer) {
        Ok(outsiders) => outsiders,
        Err(exit) => return exit,
    };
    let to = match args.to.clone().map_or_else(|| written.to.parse::<Address>(), Ok) {
        Ok(to) => to,
        Err(error) => return fail(&error, "Say with --to where the destination listens.", Exit::Usage),
    };
    let session = match session(&args, &to) {
        Ok(session) => session,
        Err(SessionRefused::Security(error)) => {
            return fail(&error, "Say --cert, --key and --peer-cert as they are now.", Exit::Usage);
        }
        Err(SessionRefused::Fabric(refused)) => return refused.told(observer),
    };
    let console = match signals::termination() {
        Ok(signals) => Console::open(&args.console, board, signals, observer),
        Err(error) => return fail(&error, "Nothing was started.", Exit::Failed),
    };
    let console = match console {
        Ok(console) => console,
        Err(exit) => return exit,
    };
    let words = &console.words;
    let address = args.output_to.clone().or(proposal.output_to.clone());
    let output = holder::output(address.as_deref(), "source").and_then(|out| Outbox::open(holder::OUTBOX_BOUNDS, out));
    let output = match output {
        Ok(output) => Arc::new(output),
        Err(error) => return fail(&error, "Write --output-to as `belay observe` prints it.", Exit::Usage),
    };
    board.emits_through(&output);
    let config = config(&args, &written, proposal, (session, to), outsiders);
    if keep.is_released() {
        let mut keep = keep;
        return tell_release(&mut keep, &config, &output, words, observer).map_or_else(
            |exit| exit,
            |heard| {
                released(keep, heard, observer);
                Exit::Done
            },
        );
    }
    let VmmSpec::Kvm(spec) = &config.proposal.vmm else {
        return damaged("it is of a QEMU guest, which nobody takes over");
    };
    let file = match keep.open_ram(RegionId(0)) {
        Ok(file) => file,
        Err(error) => return refused(&error, observer),
    };
    let driver = Driver::choose(args.guest.drive);
    let (place, nonces) = (args.guest.vmm, config.proposal.nonces.clone());
    let held = match Held::adopt(spec, file, (&driver, place), nonces, output.sink(), observer) {
        Ok(held) => held,
        Err(error) => return fail(&error, "`belay check` says what this host lacks.", Exit::Missing),
    };
    see_through(&args, Going { config: &config, keep, held, taken_over: true }, &output, words, observer)
}

fn config(
    args: &SendArgs,
    written: &Written,
    proposal: Proposal,
    (session, address): (belay_transport::session::SessionConfig, Address),
    (fence, arbiter): (Option<FenceHook>, Option<Arbitration>),
) -> SourceConfig {
    let memory_bytes = match &proposal.vmm {
        VmmSpec::Kvm(spec) => spec.memory_bytes,
        VmmSpec::Qemu(guest) | VmmSpec::QemuWithDisks { guest, .. } => guest.memory_bytes(),
    };
    let (ring_bytes, overflow_bytes) = sizes(&args.tether, memory_bytes);
    SourceConfig {
        address,
        session,
        ring_bytes,
        overflow_bytes,
        proposal,
        extra: written.extra.clone(),
        grace: args.keep.takeover_grace.0,
        bounds: Bounds::default(),
        numa: args.fabric.numa(),
        catch_on_loss: args.catch_on_loss,
        fence,
        arbiter,
    }
}

/// The guest was released and its destination may not know: it is looked for and told. Whether it has said that it knows.
fn tell_release(
    keep: &mut Keep,
    config: &SourceConfig,
    output: &Outbox,
    words: &Words,
    observer: &Observer,
) -> Result<bool, Exit> {
    let given = Given { config, keep, guest: &mut GivenAway, output, steps: &Vec::new, observer, words };
    match source::take_over(given) {
        Ok(Outcome::Released { heard }) => Ok(heard),
        Ok(other) => {
            let what = format!("a released guest came to {other:?}");
            report::failed_text(observer, &what, "A bug of ours: please report it. Nothing was resumed here.");
            Err(Exit::Failed)
        }
        Err(error) => {
            report::failed(observer, &error, "Nothing was resumed here.");
            Err(Exit::Failed)
        }
    }
}
