//! `belay receive … qemu`: a QEMU that is started for a guest that comes, or one that was.

use super::{directory, leash};
use crate::exit::Exit;
use crate::holder;
use crate::report;
use belay_checkpoint::outbox::Outbox;
use belay_transport::Deadline;
use belay_vmm_glue::guard::{GuardCommand, GuardError};
use belay_vmm_glue::migrate::observation::{Kind, Observer};
use belay_vmm_glue::qemu::host::{Lingers, QemuHost, Taker};
use belay_vmm_glue::qemu::launch::Launch;
use clap::Args;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// For what the guest had sent to leave, once it may.
const DRAINED: Duration = Duration::from_secs(5);

/// Which QEMU takes the guest.
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Examples:
  belay receive --listen 0.0.0.0:7700 … qemu -- qemu-system-x86_64 -machine q35,memory-backend=m -m 1G \\
      -object memory-backend-file,id=m,size=1G,mem-path=/dev/shm/vm1,share=on …
  belay receive --listen 0.0.0.0:7700 … qemu --qmp /run/vm1.qmp          one that was started with -incoming defer -S
  belay receive --listen 0.0.0.0:7700 … --linger 10min qemu -- …          kept so long for another page server if this one dies
  belay receive --takeover --listen 0.0.0.0:7700 … qemu                   that other one

Start it as the source's was started, RAM on tmpfs or hugetlbfs. `-incoming defer`, `-S` and a QMP socket are added to what belay starts.")]
pub struct QemuReceive {
    /// QMP socket of a QEMU that was started with `-incoming defer -S` and waits
    #[arg(long, value_name = "SOCKET", conflicts_with = "command")]
    qmp: Option<PathBuf>,
    /// Its process, if the socket was handed down by another (libvirt)
    #[arg(long, value_name = "PID", requires = "qmp")]
    pid: Option<u32>,
    /// The network relay of this host's that QEMU is connected to: where `belay relay --hand` listens. A tethered guest with a network needs one
    #[arg(long, value_name = "PATH")]
    relay: Option<PathBuf>,
    /// A tap of this host's that QEMU has open and no relay is behind: what a tethered guest sends there is held in the kernel (ifb, sch_plug).
    /// Once for each
    #[arg(long, value_name = "NAME", conflicts_with = "relay")]
    pub tap: Vec<String>,
    /// A disk relay of this host's that QEMU is connected to: where `belay disk --hand` listens. Once for each writable disk of a tethered guest
    #[arg(long, value_name = "PATH")]
    disk: Vec<PathBuf>,
    /// The QEMU to start, which waits for the guest with its memory allocated: program and arguments
    #[arg(last = true, value_name = "QEMU")]
    command: Vec<OsString>,
}

pub(super) const NAMED_TWICE: (&str, &str) = ("a tap is named twice", "Say --tap once for each tap of the guest's.");

/// Whether two of these taps are the same: one gate would pass for two.
pub(super) fn named_twice(taps: &[String]) -> bool {
    taps.iter().enumerate().any(|(index, tap)| taps[..index].contains(tap))
}

/// What is wrong with the options, and what to do. `takeover`: the QEMU is there already; `linger`: it is to be kept for the next page server.
pub fn refused(qemu: &QemuReceive, takeover: bool, linger: bool) -> Option<(&'static str, &'static str)> {
    let named = qemu.qmp.is_some() || !qemu.command.is_empty();
    match (takeover, named) {
        (true, _) if named || qemu.relay.is_some() || !qemu.tap.is_empty() || !qemu.disk.is_empty() => {
            Some(("--takeover goes on with a QEMU that is there already", "Say `qemu` and nothing behind it."))
        }
        _ if named_twice(&qemu.tap) => Some(NAMED_TWICE),
        (false, false) => Some((
            "no QEMU was named",
            "Say the command line of the QEMU to start behind `--`, or --qmp of one that waits.",
        )),
        _ if linger && (qemu.relay.is_some() || !qemu.tap.is_empty() || !qemu.disk.is_empty()) => Some((
            "a guest whose network or disk goes through a relay or a gate cannot be taken over yet",
            "Leave --linger out: if this process dies its QEMU ends, and the source catches the guest.",
        )),
        _ => None,
    }
}

/// The host that takes the guest; its QEMU waits so long for another page server if this one dies.
pub fn host(qemu: &QemuReceive, state_dir: &Path, linger: Option<Duration>) -> Result<QemuHost, GuardError> {
    let taker = match (&qemu.qmp, qemu.command.split_first()) {
        (Some(socket), _) => Taker::Attach { socket: socket.clone(), pid: qemu.pid },
        (None, command) => {
            let (program, arguments) =
                command.map_or_else(Default::default, |(program, rest)| (program.clone(), rest.to_vec()));
            let directory = directory(state_dir, "qemu");
            Taker::Start(Launch { program, arguments, working_directory: None, directory, leash: leash()? })
        }
    };
    let guard = GuardCommand::this_program(&["guard"])?;
    let mut host = QemuHost::new(taker, guard, leash()?, qemu.relay.clone(), qemu.disk.clone());
    host.gate_before(qemu.tap.clone());
    if let Some(linger) = linger {
        host.keep_for_the_next(Lingers { directory: state_dir.to_owned(), linger });
    }
    Ok(host)
}

/// The guest is this host's own: its QEMU goes on, and belay has nothing more to do.
pub fn owned(host: &mut QemuHost, output: Option<&Outbox>, observer: &Observer) -> Exit {
    match host.own_disks() {
        Ok(()) => {
            if let Some(output) = output {
                output.open_for_good();
            }
        }
        Err(error) => {
            let advice = "The guest runs here, and its disk relay holds what it writes until it can write the image, which it goes on trying: see who \
                          has the image, and end no relay.";
            report::failed(observer, &error, advice);
        }
    }
    let drained = || {
        if let Some(output) = output {
            output.wait_sent(Deadline::after(DRAINED));
        }
    };
    if let Err(error) = host.let_go_of_network(drained) {
        let advice = "The guest runs here. Its relay is shut until another belay has taken it in hand and let go of it: start it again. A gate before its \
                      tap goes with `tc qdisc del dev TAP ingress` and `ip link del belay-INDEX`, INDEX as `ip link show TAP` says it.";
        report::failed(observer, &error, advice);
    }
    match host.leave() {
        Some((pid, monitor)) => {
            let monitor = monitor.map(|monitor| monitor.display().to_string());
            observer.note(observer.latest().as_ref(), Kind::QemuLeft { pid, monitor });
            holder::cpu_time(observer);
            Exit::Done
        }
        None => {
            report::failed_text(observer, "an owned guest without a QEMU", "A bug of ours: please report it.");
            Exit::Failed
        }
    }
}
