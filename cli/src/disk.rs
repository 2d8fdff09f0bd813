//! `belay disk`: stands between a QEMU guest's writable disk and its image, for as long as the guest lives.

use crate::exit::Exit;
use crate::privileges::{self, Part};
use crate::{report, signals};
use belay_vmm_glue::migrate::observation::Kind;
use belay_vmm_glue::qemu::disk::{DiskRelay, ImageError, MOST_NAME_BYTES, Place, Told};
use belay_vmm_glue::qemu::relay::RelayError;
use clap::Args;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

/// Stand between a QEMU guest's writable disk and its image
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Example, the same image on storage that both hosts have:
  host-a# belay disk --guest /run/vm1.nbd --hand /run/vm1.disk --image /shared/vm1.img
  host-a# qemu-system-x86_64 … -blockdev nbd,node-name=d0,server.type=unix,server.path=/run/vm1.nbd,export=disk -device virtio-blk-pci,drive=d0
  host-b# belay disk --guest /run/vm1.nbd --hand /run/vm1.disk --image /shared/vm1.img --incoming

The guest reads and writes the image until a belay of this host takes the relay in hand and the guest leaves. At any time one host writes the
image, and its locks (QEMU's own) keep everybody else out. A relay must not be ended before its guest is: what a guest wrote that came here
lies in its memory until the image has it. SIGINT or SIGTERM ends it.")]
pub struct DiskArgs {
    /// Where QEMU connects to: a Unix socket that is made here, 0600
    #[arg(long, value_name = "PATH")]
    guest: PathBuf,
    /// Where a belay of this host takes the relay in hand: a Unix socket that is made here, 0600
    #[arg(long, value_name = "PATH")]
    hand: PathBuf,
    /// The image: raw, a file or a block device
    #[arg(long, value_name = "FILE")]
    image: PathBuf,
    /// What the disk is called, on both hosts: the NBD export
    #[arg(long, value_name = "NAME", default_value = "disk", value_parser = name)]
    name: String,
    /// The guest is another host's and is to come: leave the image alone until it is this host's own
    #[arg(long)]
    incoming: bool,
    /// Events as JSON lines on stdout
    #[arg(long)]
    json: bool,
}

fn name(text: &str) -> Result<String, String> {
    match text.len() {
        1..=MOST_NAME_BYTES if !text.contains(char::is_control) => Ok(text.to_owned()),
        _ => Err(format!("a disk's name has 1 to {MOST_NAME_BYTES} printable bytes")),
    }
}

/// Runs the command.
pub fn run(args: DiskArgs) -> Exit {
    let observer = report::reporter("disk", args.json);
    let note = {
        let observer = observer.clone();
        move |place: Place, why: &str| {
            let gate = match place {
                Place::Waiting => "waiting",
                Place::Open => "open",
                Place::Away => "away",
                Place::Covered => "covered",
            };
            observer.note(observer.latest().as_ref(), Kind::Relay { gate: gate.to_owned(), why: why.to_owned() });
        }
    };
    let (relay, stopped) = match begin(&args, Box::new(note)) {
        Ok(begun) => begun,
        Err(error) => {
            let advice = match &error {
                RelayError::Image(error) if matches!(**error, ImageError::InUse { .. }) => {
                    "Nothing was changed. Of two hosts one writes an image: on the one where a guest is to come, say --incoming."
                }
                RelayError::Image(_) => {
                    "Nothing was changed. --image names a raw image that is there already, or a block device."
                }
                RelayError::Served { .. } => "End that one first, or choose another path.",
                _ => "Nothing was changed.",
            };
            report::failed(&observer, &error, advice);
            return report::ended(&observer, Exit::Failed);
        }
    };
    observer.note(None, Kind::Listening { address: format!("unix:{}", args.guest.display()) });
    let exit = match relay.run(stopped.as_fd()) {
        Ok(()) => Exit::Done,
        Err(error) => {
            report::failed(&observer, &error, "The guest has no disk any more; start the relay again.");
            Exit::Failed
        }
    };
    report::ended(&observer, exit)
}

/// The relay, and what is readable once it is to end.
fn begin(args: &DiskArgs, told: Told) -> Result<(DiskRelay, OwnedFd), RelayError> {
    let io = |doing| move |source| RelayError::Io { doing, source };
    let relay = DiskRelay::new(&args.guest, &args.hand, (&args.image, &args.name), args.incoming, told)?;
    // Once all is open, and before there is another thread.
    privileges::give_up(Part::Relay);
    let words = signals::termination().map_err(io("hear signals"))?;
    // A bound on a file's length is an error of that write, and no end of the guest's disk.
    signals::outlive_file_limit().map_err(io("hear signals"))?;
    let (stopped, stop) = rustix::pipe::pipe().map_err(|errno| io("make a pipe")(errno.into()))?;
    let wait = move || {
        let _ = words.recv();
        drop(stop);
    };
    std::thread::Builder::new().name("stop".into()).spawn(wait).map_err(io("start a thread"))?;
    Ok((relay, stopped))
}
