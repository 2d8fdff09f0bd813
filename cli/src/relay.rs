//! `belay relay`: stands between a QEMU guest's network card and the world, for as long as the guest lives.

use crate::exit::Exit;
use crate::privileges::{self, Part};
use crate::{report, signals};
use belay_vmm_glue::migrate::observation::Kind;
use belay_vmm_glue::qemu::relay::{Gate, Relay, RelayError, World, WorldAddress};
use clap::Args;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

/// Stand between a QEMU guest's network card and the world
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Example:
  belay relay --guest /run/vm1.net --hand /run/vm1.hand --world tap:tap0
  qemu-system-x86_64 … -netdev stream,id=n0,server=off,addr.type=unix,addr.path=/run/vm1.net -device virtio-net-pci,netdev=n0

Frames pass both ways until a belay of this host takes the relay in hand; then what the guest sends leaves once its checkpoint has committed.
If that belay dies, nothing passes until another one has taken its place. SIGINT or SIGTERM ends it, and the guest's network with it.")]
pub struct RelayArgs {
    /// Where QEMU connects to: a Unix socket that is made here, 0600
    #[arg(long, value_name = "PATH")]
    guest: PathBuf,
    /// Where a belay of this host takes the relay in hand: a Unix socket that is made here, 0600
    #[arg(long, value_name = "PATH")]
    hand: PathBuf,
    /// The far side: tap:NAME, or unix:PATH of a socket with QEMU's framing
    #[arg(long, value_name = "ADDR")]
    world: WorldAddress,
    /// Events as JSON lines on stdout
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: RelayArgs) -> Exit {
    let observer = report::reporter("relay", args.json);
    let begun = begin(&args);
    let (mut relay, stopped) = match begun {
        Ok(begun) => begun,
        Err(error) => {
            let advice = match &error {
                RelayError::Tap { .. } => {
                    "A tap device needs CAP_NET_ADMIN, or one that was made for this user: `ip tuntap add NAME mode tap user USER`."
                }
                RelayError::Served { .. } => "End that one first, or choose another path.",
                RelayError::Listen { .. } | RelayError::Image(_) | RelayError::Io { .. } => "Nothing was changed.",
            };
            report::failed(&observer, &error, advice);
            return report::ended(&observer, Exit::Failed);
        }
    };
    observer.note(None, Kind::Listening { address: format!("unix:{}", args.guest.display()) });
    let note = |gate: Gate, why: &str| {
        let gate = match gate {
            Gate::Open => "open",
            Gate::Held => "held",
            Gate::Shut => "shut",
        };
        observer.note(observer.latest().as_ref(), Kind::Relay { gate: gate.to_owned(), why: why.to_owned() });
    };
    let ended = relay.run(stopped.as_fd(), note);
    let counts = relay.counts();
    let outcome = format!(
        "{} frames of the guest's, {} passed on; {} for it, {} passed on; dropped for want of room: {} outward, {} inward, {} to the hand; \
         {} came to a shut gate",
        counts.from_guest,
        counts.to_world,
        counts.from_world,
        counts.to_guest,
        counts.dropped_to_world,
        counts.dropped_to_guest,
        counts.dropped_to_hand,
        counts.dropped_at_gate
    );
    let exit = match ended {
        Ok(()) => Exit::Done,
        Err(error) => {
            report::failed(&observer, &error, "The guest has no network any more; start the relay again.");
            Exit::Failed
        }
    };
    observer.note(observer.latest().as_ref(), Kind::Ended { outcome, exit_code: exit.code() });
    exit
}

/// The relay, and what is readable once it is to end.
fn begin(args: &RelayArgs) -> Result<(Relay, OwnedFd), RelayError> {
    let io = |doing| move |source| RelayError::Io { doing, source };
    let relay = Relay::new(&args.guest, &args.hand, World::open(&args.world)?)?;
    // Once all is open, and before there is another thread.
    privileges::give_up(match args.world {
        WorldAddress::Tap(_) => Part::RelayOfTap,
        WorldAddress::Unix(_) => Part::Relay,
    });
    let words = signals::termination().map_err(io("hear signals"))?;
    let (stopped, stop) = rustix::pipe::pipe().map_err(|errno| io("make a pipe")(errno.into()))?;
    let wait = move || {
        let _ = words.recv();
        drop(stop);
    };
    std::thread::Builder::new().name("stop".into()).spawn(wait).map_err(io("start a thread"))?;
    Ok((relay, stopped))
}
