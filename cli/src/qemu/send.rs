//! `belay send … qemu`: moves the guest of a QEMU that runs, and catches it into a standby.

use super::receive::{NAMED_TWICE, named_twice};
use super::{directory, leash};
use crate::exit::Exit;
use crate::keeping;
use crate::operate::console::Console;
use crate::options::GuestOptions;
use crate::send::{
    CEDED, SIZES_ADVICE, SendArgs, SessionRefused, can_tether, not_begun, outsiders, release_policy, session, sizes,
    tether_settings,
};
use crate::{holder, report, signals};
use belay_checkpoint::guest::TrackerKind;
use belay_checkpoint::outbox::{Outbox, OutputMode};
use belay_transport::explain;
use belay_transport::{Deadline, PageSize};
use belay_vmm_glue::guard::is_ending;
use belay_vmm_glue::migrate::observation::{Kind, Observer, us};
use belay_vmm_glue::migrate::operator::Words;
use belay_vmm_glue::migrate::protocol::PROTOCOL_VERSION;
use belay_vmm_glue::migrate::reattach::Identity;
use belay_vmm_glue::migrate::settings::{Bounds, Proposal, VmmSpec};
use belay_vmm_glue::migrate::source::keep::Keep;
use belay_vmm_glue::migrate::source::{self, Given, Outcome, SourceConfig};
use belay_vmm_glue::migrate::status::Board;
use belay_vmm_glue::qemu::disk;
use belay_vmm_glue::qemu::disks::Disks;
use belay_vmm_glue::qemu::inspect::Inspection;
use belay_vmm_glue::qemu::judge::{Against, HeldBy, objections};
use belay_vmm_glue::qemu::leaving::{Found, LeavingError, LeavingGuest, Relayed, StandbyPlan};
use belay_vmm_glue::qemu::qmp::QmpError;
use belay_vmm_glue::qemu::relay;
use belay_vmm_glue::qemu::spec::QemuSpec;
use belay_vmm_glue::qemu::tap;
use belay_vmm_glue::qemu::wire::Wire;
use clap::Args;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// For what the guest had sent to leave, once it may.
const DRAINED: Duration = Duration::from_secs(5);
/// For a relay to say who is connected.
const LOOK: Duration = Duration::from_secs(2);

/// Which QEMU, and what it is caught into.
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Examples:
  belay check --qmp /run/vm1.qmp                                  what stands against moving it, and what to change
  belay send --to host-b:7700 qemu --qmp /run/vm1.qmp             tethered
  belay send --to host-b:7700 --policy none qemu --qmp /run/vm1.qmp
  belay send --to host-b:7700 qemu --qmp /run/vm1.qmp -- qemu-system-x86_64 -machine q35,memory-backend=m …

The guest goes on meanwhile. A caught guest goes on in the standby, whose monitor is told; docs/qemu.md is the runbook.")]
pub struct QemuSend {
    /// Its QMP socket, which nobody else may hold meanwhile: `-qmp unix:SOCKET,server=on,wait=off`
    #[arg(long, value_name = "SOCKET")]
    qmp: PathBuf,
    /// Its process, if the socket was handed down by another (libvirt)
    #[arg(long, value_name = "PID")]
    pid: Option<u32>,
    /// The network relay of this host's that QEMU is connected to: where `belay relay --hand` listens. A tethered guest with a network needs one
    #[arg(long, value_name = "PATH")]
    relay: Option<PathBuf>,
    /// A tap of this host's that QEMU has open, if no relay is behind it; the destination's `qemu --tap` then holds what the guest sends. Once
    /// for each
    #[arg(long, value_name = "NAME", conflicts_with = "relay")]
    tap: Vec<String>,
    /// A disk relay of this host's that QEMU is connected to: where `belay disk --hand` listens. Once for each writable disk of a tethered guest
    #[arg(long, value_name = "PATH")]
    disk: Vec<PathBuf>,
    /// The standby's program and arguments, over the same RAM and without `-incoming` [default: as the running one was started, consoles
    /// and logs with .standby at the end of their names]
    #[arg(last = true, value_name = "STANDBY")]
    standby: Vec<OsString>,
}

/// Options of the command that mean something to the proof guest alone.
fn meaningless(args: &SendArgs) -> Option<&'static str> {
    let GuestOptions { guest, memory, page_size, working_set, dirty_rate, vcpus, seed, vmm, drive } = &args.guest;
    let given = [
        ("--guest", guest.is_some()),
        ("--memory", memory.is_some()),
        ("--page-size", page_size.is_some()),
        ("--working-set", working_set.is_some()),
        ("--dirty-rate", dirty_rate.is_some()),
        ("--vcpus", vcpus.is_some()),
        ("--seed", seed.is_some()),
        ("--vmm", vmm.is_some()),
        ("--drive", drive.is_some()),
        ("--check", args.check),
        ("--run-on", args.run_on.is_some()),
        ("--output-to", args.output_to.is_some()),
    ];
    given.into_iter().find_map(|(name, given)| given.then_some(name))
}

/// What is refused by the options alone.
fn refused(args: &SendArgs) -> Option<(String, &'static str)> {
    if let Some(option) = meaningless(args) {
        return Some((format!("{option} is for the proof guest, and this is QEMU's"), "Leave it out."));
    }
    if args.keep.takeover.is_some() {
        let advice = "A destination that has a QEMU guest keeps it fenced when its source dies; promote it there.";
        return Some(("a QEMU guest cannot be taken over by another `belay send` yet".to_owned(), advice));
    }
    args.keep.memory_dir.as_ref().map(|_| {
        let advice = "Leave it out: guest RAM is the file that QEMU has.";
        ("--memory-dir keeps a guest for a takeover, which QEMU guests do not have yet".to_owned(), advice)
    })
}

/// Runs the command.
pub fn send(args: &SendArgs, qemu: &QemuSend, board: &Arc<Board>, observer: &Observer) -> Exit {
    let fail = |what: &dyn std::error::Error, advice: &str, exit: Exit| {
        report::failed(observer, what, advice);
        exit
    };
    let usage = |what: &str, advice: &str| {
        report::failed_text(observer, what, advice);
        Exit::Usage
    };
    if let Some((what, advice)) = refused(args) {
        return usage(&what, advice);
    }
    let Some(to) = args.to.clone() else { return usage("--to is missing", "Say where `belay receive` listens.") };
    let (fence, arbiter) = match outsiders(args, observer) {
        Ok(outsiders) => outsiders,
        Err(exit) => return exit,
    };
    let session = match session(args, &to) {
        Ok(session) => session,
        Err(SessionRefused::Security(error)) => {
            return fail(&error, "Make certificates with `belay keygen`.", Exit::Usage);
        }
        Err(SessionRefused::Fabric(refused)) => return refused.told(observer),
    };
    let identity = match Identity::random() {
        Ok(identity) => identity,
        Err(error) => return fail(&error, "Nothing was started.", Exit::Failed),
    };
    let console = match signals::termination() {
        Ok(signals) => Console::open(&args.console, board, signals, observer),
        Err(error) => return fail(&error, "Nothing was started.", Exit::Failed),
    };
    let console = match console {
        Ok(console) => console,
        Err(exit) => return exit,
    };
    let tether = tether_settings(&args.tether, TrackerKind::UffdWp);
    if !qemu.disk.is_empty() && tether.as_ref().is_some_and(|tether| tether.output != OutputMode::Commit) {
        let advice = "Leave --output out: what a guest shows must not be ahead of what its disk has.";
        return usage("a writable disk needs --output commit", advice);
    }
    if !qemu.tap.is_empty() && tether.as_ref().is_some_and(|tether| tether.output != OutputMode::Commit) {
        let advice =
            "Leave --output out, or use a relay: the kernel holds a tap's frames by epochs, and knows of no lease.";
        return usage("--tap needs --output commit", advice);
    }
    if named_twice(&qemu.tap) {
        return usage(NAMED_TWICE.0, NAMED_TWICE.1);
    }
    let found = match Found::at(&qemu.qmp, qemu.pid) {
        Ok(found) => found,
        Err(error) => return fail(&error, advice(&error), Exit::Missing),
    };
    let told = told(&found.guest);
    observer.note(None, told);
    let relay = match qemu.relay.as_deref().map(|relay| relay_of(relay, &found.guest)).transpose() {
        Ok(relay) => relay,
        Err((why, advice)) => {
            report::failed_text(observer, &why, advice);
            return Exit::Missing;
        }
    };
    if let Err(error) = qemu.tap.iter().try_for_each(|name| tap::is_of(found.guest.pid, name)) {
        return fail(
            &error,
            "Nothing was touched. --tap is the tap of this guest's QEMU, ifname=… of its netdev.",
            Exit::Missing,
        );
    }
    let held = match (&relay, qemu.tap.len()) {
        (Some(_), _) => HeldBy::Relay,
        (None, 0) => HeldBy::Nobody,
        (None, taps) => HeldBy::Gates(taps),
    };
    let disks = match taken_disks(&qemu.disk, &found.guest) {
        Ok(disks) => disks,
        Err(error) => {
            let advice = "Nothing was touched. --disk is what `belay disk --hand` was given, of a relay whose --guest is this QEMU's -blockdev nbd.";
            return fail(&error, advice, Exit::Missing);
        }
    };
    if !may_leave(&found.guest, tether.is_some(), (held, &disks.1), observer) {
        return Exit::Missing;
    }
    let spec = QemuSpec::of(&found.guest);
    let disk_bytes = qemu.disk.len() as u64 * disk::MOST_LOG_BYTES;
    let (ring_bytes, overflow_bytes) = sizes(&args.tether, spec.memory_bytes().saturating_add(disk_bytes));
    if let (Some(_), Err(why)) = (&tether, can_tether((ring_bytes, overflow_bytes), spec.memory_bytes())) {
        return usage(&why, SIZES_ADVICE);
    }
    let proposal = Proposal {
        protocol: PROTOCOL_VERSION,
        vmm: VmmSpec::of_qemu(spec, disks.0.known()),
        tether,
        output_to: None,
        release: release_policy(args.tether.release),
        shards: args.tether.shards.unwrap_or(1),
        nonces: Vec::new(),
        identity,
        reattach: None,
    };
    if let Err(why) = proposal.check() {
        return usage(&why, "Nothing was started; `belay help send` names the limits.");
    }
    let wire = Wire::new();
    if !qemu.tap.is_empty() {
        wire.take_open_taps();
    }
    let output = match Outbox::open(holder::OUTBOX_BOUNDS, wire.emitter()) {
        Ok(output) => Arc::new(output),
        Err(error) => return fail(&error, "Nothing was started.", Exit::Failed),
    };
    let network = relay.map(|path| {
        let (sink, drained) = (output.sink(), Arc::clone(&output));
        let drained = Box::new(move || {
            drained.wait_sent(Deadline::after(DRAINED));
        });
        (Relayed { path, sink, drained }, wire.clone())
    });
    let guest = match prepare(args, qemu, found, (proposal.tether.is_some(), network, disks.0), observer) {
        Ok(guest) => guest,
        Err(error) => return fail(&error, advice(&error), Exit::Missing),
    };
    let keep = match keeping::begin(&args.keep, PageSize::Small, identity, observer) {
        Ok(keep) => keep,
        Err(error) => return keeping::refused(&error, observer),
    };
    let config = SourceConfig {
        address: to,
        session,
        ring_bytes,
        overflow_bytes,
        proposal,
        extra: keeping::remember(args),
        grace: args.keep.takeover_grace.0,
        bounds: Bounds::default(),
        numa: args.fabric.numa(),
        catch_on_loss: args.catch_on_loss,
        fence,
        arbiter,
    };
    see_through(&config, (keep, guest), &output, &console.words, observer)
}

/// The guest's disk relays, in hand, and the sockets they serve.
fn taken_disks(paths: &[PathBuf], guest: &Inspection) -> Result<(Disks, Vec<PathBuf>), disk::HandError> {
    let disks = Disks::default();
    disks.attach(paths, disk::Role::Leaving, guest.pid, Deadline::after(LOOK))?;
    let served = paths.iter().map(|path| disk::look(path, Deadline::after(LOOK)).map(|known| known.socket));
    Ok((disks, served.collect::<Result<_, _>>()?))
}

/// The relay at `path`, if it is this guest's.
fn relay_of(path: &Path, guest: &Inspection) -> Result<PathBuf, (String, &'static str)> {
    let there = relay::look(path, Deadline::after(LOOK));
    let there = there.map_err(|error| {
        (explain(&error), "Nothing was touched. --relay is what `belay relay --hand` was given; it must run.")
    })?;
    match there {
        Some(pid) if pid == guest.pid => Ok(path.to_owned()),
        Some(pid) => {
            let why = format!(
                "process {pid} is connected to the relay at {}, and the guest is {}'s",
                path.display(),
                guest.pid
            );
            Err((why, "Nothing was touched. Name the relay of this guest."))
        }
        None => {
            let why = format!("no QEMU is connected to the relay at {}", path.display());
            Err((
                why,
                "Nothing was touched. Start QEMU with -netdev stream,server=off,addr.type=unix,addr.path=… of `belay relay --guest`.",
            ))
        }
    }
}

fn told(guest: &Inspection) -> Kind {
    Kind::QemuFound {
        pid: guest.pid,
        version: guest.version.to_string(),
        machine: guest.machine.strip_suffix("-machine").unwrap_or(&guest.machine).to_owned(),
        vcpus: guest.vcpus as u32,
        ram_bytes: guest.ram.iter().map(|ram| ram.bytes).sum(),
    }
}

/// Whether nothing stands against it; what does is told, all of it.
fn may_leave(guest: &Inspection, tethered: bool, (held, served): (HeldBy, &[PathBuf]), observer: &Observer) -> bool {
    let mut free = true;
    let mut refuse = |what: String, advice: &str| {
        report::failed_text(observer, &what, advice);
        free = false;
    };
    for objection in objections(guest, Ok(()), held, served) {
        let what = format!("{}: {}", objection.what, objection.why);
        match objection.against {
            Against::Moving if objection.change.is_empty() => refuse(what, "It cannot be moved. Nothing was touched."),
            Against::Moving => refuse(what, &format!("Nothing was touched. Change: {}", objection.change)),
            Against::Tethering if tethered => {
                let or = "or move it without a tether: --policy none";
                let change =
                    if objection.change.is_empty() { or.to_owned() } else { format!("{}; {or}", objection.change) };
                refuse(format!("not to be tethered: {what}"), &format!("Nothing was touched. Change: {change}"));
            }
            Against::Tethering => {}
        }
    }
    if guest.status != "running" {
        refuse(
            format!("the guest is in the state {}", guest.status),
            "Nothing was touched. Let it run (`cont`): it would run after the move.",
        );
    }
    free
}

fn prepare(
    args: &SendArgs,
    qemu: &QemuSend,
    found: Found,
    (tethered, network, disks): (bool, Option<(Relayed, Wire)>, Disks),
    observer: &Observer,
) -> Result<LeavingGuest, LeavingError> {
    let run_dir = args.console.run_dir.clone().unwrap_or_else(holder::default_run_dir);
    let leash = leash().map_err(|error| belay_checkpoint::guest::GuestError::Io {
        doing: "find this program".to_owned(),
        source: std::io::Error::other(error),
    })?;
    let command = (!qemu.standby.is_empty()).then(|| qemu.standby.clone());
    let plan = StandbyPlan { command, directory: directory(&run_dir, "standby"), leash };
    let begun = Instant::now();
    let guest = LeavingGuest::prepare(found, tethered.then_some(&plan), network)?.with_disks(disks);
    if let Some((process, monitor)) = guest.standby() {
        let pid = process.number();
        let monitor = monitor.display().to_string();
        observer.note(None, Kind::StandbyStarted { pid, monitor, took_us: us(begun.elapsed()) });
    }
    Ok(guest)
}

fn advice(error: &LeavingError) -> &'static str {
    match error {
        LeavingError::Qmp(QmpError::Connect { .. } | QmpError::NoGreeting { .. }) => {
            "Nothing was touched. `-qmp unix:SOCKET,server=on,wait=off` gives QEMU such a socket; `info qmp`-like tools must let go of it."
        }
        LeavingError::Standby(_) | LeavingError::Unlike(_) => {
            "The guest runs on here. Say the standby's program and arguments behind `--`, or move it without a tether: --policy none."
        }
        _ => "The guest runs on here. `belay check --qmp SOCKET` looks at it.",
    }
}

/// Carries the migration out and says how it ended.
fn see_through(
    config: &SourceConfig,
    (mut keep, mut guest): (Keep, LeavingGuest),
    output: &Outbox,
    words: &Words,
    observer: &Observer,
) -> Exit {
    let steps = Vec::new;
    let given = Given { config, keep: &mut keep, guest: &mut guest, output, steps: &steps, observer, words };
    let (why, advice, exit) = match source::run(given) {
        Ok(Outcome::Released { heard }) => {
            keeping::released(keep, heard, observer);
            if let Err(error) = guest.end_released() {
                let advice =
                    "The destination has the guest. End the QEMU that it left (`quit`), and never let it go on.";
                report::failed(observer, &error, advice);
            }
            holder::cpu_time(observer);
            return Exit::Done;
        }
        Ok(Outcome::Caught { .. }) => {
            keeping::close(keep, observer);
            if let Err(error) = guest.let_go_of_relays() {
                let advice = "The guest runs here. A network relay is shut: start it again. A disk relay goes on.";
                report::failed(observer, &error, advice);
            }
            leave(guest, observer);
            holder::cpu_time(observer);
            return Exit::Caught;
        }
        Ok(Outcome::NotMoved { why }) if is_ending(guest.process().number() as i32) => {
            keeping::close(keep, observer);
            let why = format!("its QEMU has ended, before the guest had left: {why}");
            let advice = "The guest runs nowhere. It may have powered itself off; QEMU's own log says more. Nothing is left of it at the destination.";
            (why, advice, Exit::Lost)
        }
        Ok(Outcome::NotMoved { why }) => {
            keeping::close(keep, observer);
            (why, "The guest never left and runs on here.", Exit::NotMoved)
        }
        Ok(Outcome::AwaitsOperator { why }) => {
            // If the standby has it, it is there that it waits.
            leave(guest, observer);
            let advice = "This host has not resumed the guest. If the destination still has it, promote it there.";
            (why, advice, Exit::CatchNeedsOperator)
        }
        Ok(Outcome::Lost { why }) => (why, "Neither host can run this guest.", Exit::Lost),
        Ok(Outcome::Ceded { why }) => (why, CEDED, Exit::Ceded),
        Err(error) => {
            let exit = not_begun(&error, false, observer);
            keeping::close(keep, observer);
            return exit;
        }
    };
    report::failed_text(observer, &why, advice);
    exit
}

/// The standby, if it has the guest, goes on whatever becomes of this process.
fn leave(guest: LeavingGuest, observer: &Observer) {
    if let Some((pid, monitor)) = guest.leave_caught() {
        observer.note(observer.latest().as_ref(), Kind::QemuLeft { pid, monitor: Some(monitor.display().to_string()) });
    }
}
