//! `belay receive`: waits for a guest, pulls its memory, tethers it, and owns it once the source has let go.

use crate::descriptors::TooFew;
use crate::exit::Exit;
use crate::holder::{self, Doors, Held, ThisHost};
use crate::operate::console::{Console, ConsoleOptions};
use crate::options::{
    ArbiterOptions, ConfigFile, FabricOptions, GuestOptions, SecurityOptions, SourceLossOptions, StagingOptions,
};
use crate::qemu::receive::QemuReceive;
use crate::quantity::Span;
use crate::soak::points::StopAt;
use crate::takeover::TakeoverError;
use crate::{descriptors, fabric, logs, qemu, report, signals, takeover};
use belay_checkpoint::guest::GuestError;
use belay_checkpoint::staging::Staging;
use belay_transport::session::{Address, Listener};
use belay_vmm_glue::kvm::SharedGuest;
use belay_vmm_glue::kvm::apart::Estate;
use belay_vmm_glue::migrate::destination::{
    self, DestinationConfig, DestinationError, Ended, Inherited, Outcome, WillError,
};
use belay_vmm_glue::migrate::faults::recording::FaultRecording;
use belay_vmm_glue::migrate::observation::{Kind, Observer};
use belay_vmm_glue::migrate::recording::Recording;
use belay_vmm_glue::migrate::settings::{Bounds, VmmSpec};
use belay_vmm_glue::migrate::status::Board;
use belay_vmm_glue::qemu::estate::QemuEstate;
use clap::{Args, Subcommand};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Wait for a guest, pull its memory, send checkpoints back
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub struct ReceiveArgs {
    /// Which VMM takes the guest, if not belay's own
    #[command(subcommand)]
    vmm: Option<ReceiveVmm>,
    /// Where to listen: HOST:PORT (tcp and verbs; port 0 takes a free one), or unix:/path (shared memory on one host)
    #[arg(long, value_name = "ADDR")]
    listen: Address,
    #[command(flatten)]
    guest: PlaceOptions,
    #[command(flatten)]
    tether: StagingOptions,
    #[command(flatten)]
    fabric: FabricOptions,
    #[command(flatten)]
    security: SecurityOptions,
    /// Where the guest's output goes, if it is another address here than at the source
    #[arg(long, value_name = "ADDR")]
    output_to: Option<String>,
    /// Where page states are kept [default: /run/belay, or a directory of the user's without root]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Go on with the guest of a `belay receive --vmm apart`, or `belay receive --linger … qemu`, that has died: of the one VMM that waits in
    /// --state-dir, or of the one with this process number. Listen where the dead one did: the source dials there
    #[arg(long, value_name = "PID", num_args = 0..=1, default_missing_value = "0")]
    takeover: Option<u32>,
    /// With --takeover: give the guest to this host without asking its source. Your word that the source neither runs the guest nor has taken
    /// it back; refused while pages are missing
    #[arg(long, requires = "takeover")]
    promote: bool,
    /// With --vmm apart: how long the guest's memory is kept without a page server, for a --takeover [default: 60min]. With `qemu`: the same of a
    /// tethered guest's QEMU, which ends with this process without it
    #[arg(long, value_name = "TIME")]
    linger: Option<Span>,
    /// Cores for the threads that serve faults, near the network card: 2 or 2,3 [default: wherever the system puts them]
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    engine_cores: Vec<usize>,
    /// Hold the background pull once this share of pages is here, and serve only faults; 0: from the start (for demonstrations and tests, and for
    /// --record-faults)
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(..=100))]
    hold_pull_at: Option<u8>,
    /// Write down what the guest writes and sends while it is tethered, a line a checkpoint, at most 4G: `belay-bench policy --trace FILE` compares
    /// policies on it, best taken with `--policy fixed:1ms` at the source
    #[arg(long, value_name = "FILE")]
    record_trace: Option<PathBuf>,
    /// Write down each fault of the guest that has moved: when, which page, whose thread, how long it waited; a line each, at most 4G. `belay-bench
    /// replay FILE` pulls by it without a guest; with --hold-pull-at 0 every page that is touched is there, and nothing is released
    #[arg(long, value_name = "FILE")]
    record_faults: Option<PathBuf>,
    /// After a release: end this long after it (without this the guest runs until a signal)
    #[arg(long, value_name = "TIME")]
    run_on: Option<Span>,
    /// At the end compare all of guest RAM with what it must be; of a guest that is fenced what is here of it
    #[arg(long)]
    check: bool,
    /// Freeze this process (SIGSTOP) when it comes to a stop point for the N-th time (for tests)
    #[arg(long, value_name = "NAME[:N]", hide = true)]
    stop_at: Option<StopAt>,
    #[command(flatten)]
    arbiter: ArbiterOptions,
    #[command(flatten)]
    source_loss: SourceLossOptions,
    #[command(flatten)]
    console: ConsoleOptions,
    /// Events as JSON lines on stdout
    #[arg(long)]
    json: bool,
    /// Defaults from a TOML file, see cluster-configs/
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// Other VMMs.
#[derive(Debug, Clone, Subcommand)]
pub enum ReceiveVmm {
    /// Take a guest of QEMU's
    Qemu(QemuReceive),
}

/// Where and how the VMM runs here; what it runs is the source's to say.
#[derive(Debug, Clone, Default, Args)]
pub struct PlaceOptions {
    /// Run the VMM in the page server's process or in one of its own [default: in-process]
    #[arg(long, value_enum)]
    vmm: Option<crate::options::VmmPlace>,
    /// What drives the guest's memory: kvm, or threads of the host where there is no KVM [default: auto]
    #[arg(long, value_enum)]
    drive: Option<crate::options::Drive>,
}

const EXAMPLES: &str = "\
Examples:
  belay receive --listen 127.0.0.1:7700                    for a `belay send` on this host
  belay receive --listen unix:/run/belay/receive.sock      over shared memory
  belay receive --listen 0.0.0.0:7700 --cert destination.crt --key destination.key --peer-cert source.crt
  belay receive --listen 127.0.0.1:7700 --takeover         go on with the guest of one that was started with --vmm apart and has died
  belay receive --listen 0.0.0.0:7700 --fabric verbs --trusted-fabric -d mlx5_0 -x 3 --cert … --key … --peer-cert …
  belay receive --listen 0.0.0.0:7700 … qemu -- qemu-system-x86_64 …   a QEMU guest: `belay receive qemu --help`, docs/qemu.md

SIGINT or SIGTERM gives a tethered guest back to the source; a fenced guest's memory is given up; an owned guest is ended.";

impl ReceiveArgs {
    /// Whether it changes the host's network.
    pub fn gates_a_tap(&self) -> bool {
        matches!(&self.vmm, Some(ReceiveVmm::Qemu(qemu)) if !qemu.tap.is_empty())
    }
}

/// Runs the command.
pub fn run(mut args: ReceiveArgs) -> Exit {
    if let Some(path) = &args.config {
        match ConfigFile::read(path) {
            Ok(file) => {
                args.console = args.console.or(file.operate);
                if args.vmm.is_none() {
                    let place =
                        GuestOptions { vmm: args.guest.vmm, drive: args.guest.drive, ..GuestOptions::default() };
                    let place = place.or(file.guest);
                    args.guest = PlaceOptions { vmm: place.vmm, drive: place.drive };
                }
                args.tether = args.tether.or(file.receive);
                args.fabric = args.fabric.or(file.fabric);
                args.security = args.security.or(file.security);
                let (arbiter, loss) = file.arbiter.parts();
                args.arbiter = args.arbiter.or(arbiter);
                args.source_loss = args.source_loss.or(loss);
            }
            Err(error) => {
                let observer = report::reporter("destination", args.json);
                report::failed(&observer, &error, "Nothing was started.");
                return report::ended(&observer, Exit::Usage);
            }
        }
    }
    args.stop_at.iter().for_each(StopAt::arm);
    let logs = match logs::start(args.console.log.as_deref(), args.console.log_format) {
        Ok(logs) => logs,
        Err(exit) => return exit,
    };
    let board = args.console.board("destination");
    let observer = report::watched("destination", args.json, Some(Arc::clone(&board)), Some(logs));
    let exit = match descriptors::take() {
        Ok(()) => receive(&args, &board, &observer),
        Err(too_few) => {
            report::failed(&observer, &too_few, TooFew::ADVICE);
            Exit::Missing
        }
    };
    report::ended(&observer, exit)
}

fn receive(args: &ReceiveArgs, board: &Arc<Board>, observer: &Observer) -> Exit {
    let fail = |what: &dyn std::error::Error, advice: &str, exit: Exit| {
        report::failed(observer, what, advice);
        exit
    };
    if let Some(option) = meaningless(args) {
        report::failed_text(observer, &format!("{option} is for belay's own VMM, and this is QEMU's"), "Leave it out.");
        return Exit::Usage;
    }
    if let Some(ReceiveVmm::Qemu(qemu)) = &args.vmm
        && let Some((what, advice)) = qemu::receive::refused(qemu, args.takeover.is_some(), args.linger.is_some())
    {
        report::failed_text(observer, what, advice);
        return Exit::Usage;
    }
    let arbiter = match args.source_loss.of(&args.arbiter) {
        Ok(arbiter) => arbiter,
        Err(why) => {
            report::failed_text(
                observer,
                &why,
                "Nothing was started; `belay help receive` tells what an arbiter needs.",
            );
            return Exit::Usage;
        }
    };
    let security = match args.security.security() {
        Ok(security) => security,
        Err(error) => return fail(&error, "Make certificates with `belay keygen`.", Exit::Usage),
    };
    let session = match fabric::session(&args.fabric, security, &args.listen) {
        Ok(session) => session,
        Err(refused) => return refused.told(observer),
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
    let state_dir = args.state_dir.clone().unwrap_or_else(holder::default_run_dir);
    // First of all: once the seat of a dead page server is free, so is its address.
    let estate = match args.takeover.map(|asked| Left::enter(args, &state_dir, asked)).transpose() {
        Ok(estate) => estate,
        Err(error) => return fail(&error, error.advice(), error.exit()),
    };
    let listener = match Listener::bind(&args.listen, session) {
        Ok(listener) => listener,
        Err(error) => return fail(&error, "Choose another --listen address, or give certificates.", Exit::NoSession),
    };
    let trace = args.record_trace.as_deref();
    let trace =
        trace.map(|path| told(Recording::create(path, MOST_RECORDED, observer.clone()), ("--record-trace", path)));
    let faults = args.record_faults.as_deref();
    let faults = faults
        .map(|path| told(FaultRecording::create(path, MOST_RECORDED, observer.clone()), ("--record-faults", path)));
    let (recording, fault_recording) = match (trace.transpose(), faults.transpose()) {
        (Ok(trace), Ok(faults)) => (trace.map(Arc::new), faults.map(Arc::new)),
        (Err(what), _) | (_, Err(what)) => {
            let advice = "Nothing was started; name a file that is not there yet, in a directory that is.";
            report::failed_text(observer, &what, advice);
            return Exit::Usage;
        }
    };
    let config = DestinationConfig {
        output_to: args.output_to.clone(),
        state_dir,
        engine_cores: args.engine_cores.clone(),
        hold_pull_at: args.hold_pull_at.map(|percent| f64::from(percent) / 100.0),
        bounds: Bounds::default(),
        staging: args.tether.staging.map_or(Staging::Auto, Into::into),
        recording,
        fault_recording,
        numa: args.fabric.numa(),
        arbiter,
    };
    let listening = || {
        board.phase("listening", format!("at {}", listener.address()));
        observer.note(None, Kind::Listening { address: listener.address().to_string() });
    };
    if let Some(ReceiveVmm::Qemu(qemu)) = &args.vmm {
        let mut host = match qemu::receive::host(qemu, &config.state_dir, args.linger.map(|linger| linger.0)) {
            Ok(host) => host,
            Err(error) => return fail(&error, "Nothing was started.", Exit::Failed),
        };
        if estate.is_none() {
            board.phase("preparing", "QEMU and its memory".to_owned());
            if let Err(error) = host.make_ready(observer) {
                let advice = "No guest can come before this is mended. `belay check` says what this host lacks.";
                return fail(&error, advice, Exit::Missing);
            }
        }
        listening();
        let ended = match estate {
            Some(Left::Qemu(mut estate)) => estate.inherited().and_then(|inherited| {
                host.adopt_from(estate);
                let how = (&config, args.promote);
                destination::take_over(how, inherited, &listener, &mut host, observer, words)
            }),
            _ => destination::run(&config, &listener, &mut host, observer, words),
        };
        return match ended {
            Ok(Ended { outcome: Outcome::Owner, output, .. }) => {
                qemu::receive::owned(&mut host, output.as_deref(), observer)
            }
            other => not_owned(args, other, observer),
        };
    }
    listening();
    let linger = args.linger.map_or(holder::LINGER, |linger| linger.0);
    let doors = Doors { directory: config.state_dir.clone(), linger };
    let mut host = ThisHost::new(args.guest.drive, args.guest.vmm, doors);
    let ended = match estate {
        None | Some(Left::Qemu(_)) => destination::run(&config, &listener, &mut host, observer, words),
        Some(Left::Vmm(mut estate)) => Inherited::of(&mut estate).and_then(|inherited| {
            host.adopt_from(estate);
            let how = (&config, args.promote);
            destination::take_over(how, inherited, &listener, &mut host, observer, words)
        }),
    };
    match ended {
        Ok(Ended { outcome: Outcome::Owner, output: Some(output), nonces, spec: Some(VmmSpec::Kvm(spec)), .. }) => {
            let guest = host.built.take().expect("an owned guest was built here");
            let held = Held { guest, spec, nonces };
            held.run_on(args.run_on, args.check, &output, words, observer, Exit::Done)
        }
        other => match (&other, &host.built) {
            (Ok(fenced @ Ended { outcome: Outcome::Fenced, .. }), Some(guest))
                if args.check && !holds(fenced, guest, observer) =>
            {
                not_owned(args, other, observer);
                Exit::CheckFailed
            }
            _ => not_owned(args, other, observer),
        },
    }
}

/// Whether what a fenced guest has of its memory is what it must be, as far as it can be looked at.
fn holds(fenced: &Ended, guest: &SharedGuest, observer: &Observer) -> bool {
    match (&fenced.states, &fenced.spec) {
        (Some(states), Some(VmmSpec::Kvm(spec))) => {
            let held = Held { guest: guest.clone(), spec: spec.clone(), nonces: fenced.nonces.clone() };
            held.check_fenced(states, observer)
        }
        _ => true,
    }
}

/// Most bytes of a recorded trace.
const MOST_RECORDED: u64 = 4 << 30;

/// What is wrong with a recording's file, with the option that named it.
fn told<T>(made: std::io::Result<T>, (option, path): (&str, &Path)) -> Result<T, String> {
    made.map_err(|error| format!("{option} {}: {error}", path.display()))
}

/// What a page server has left that died.
enum Left {
    Vmm(Estate),
    Qemu(QemuEstate),
}

impl Left {
    fn enter(args: &ReceiveArgs, state_dir: &Path, asked: u32) -> Result<Self, TakeoverError> {
        match args.vmm {
            None => takeover::enter(state_dir, asked).map(Self::Vmm),
            Some(ReceiveVmm::Qemu(_)) => takeover::enter_qemu(state_dir, asked).map(Self::Qemu),
        }
    }
}

/// Says why the guest is not this host's, and with which exit code.
fn not_owned(args: &ReceiveArgs, ended: Result<Ended, DestinationError>, observer: &Observer) -> Exit {
    match ended {
        Ok(Ended { outcome, why, faults, .. }) => {
            // A guest that waits for a page which will not come must wait until this process has ended (P1).
            std::mem::forget(faults);
            let (exit, advice) = match outcome {
                Outcome::Owner => (Exit::Done, ""),
                Outcome::Aborted => (Exit::NotMoved, "The guest runs on at the source."),
                Outcome::Retired => (Exit::Retired, "The source has taken the guest back; what was here is void."),
                Outcome::Fenced => (Exit::Fenced, "The guest was stopped and its memory given up at your word."),
                Outcome::Lost => (Exit::Lost, "Neither host can run this guest."),
                Outcome::Interrupted => (Exit::Interrupted, "No guest was here."),
            };
            report::failed_text(observer, &why, advice);
            exit
        }
        Err(error) => {
            let exit = match &error {
                DestinationError::Connect(_) => Exit::NoSession,
                DestinationError::Interrupted => Exit::Interrupted,
                DestinationError::Cancelled => Exit::NotMoved,
                // What the source sent is not what a VMM here can load, or the VMM has died: nothing that this host lacks.
                DestinationError::Guest(GuestError::BadState(_) | GuestError::VmmGone(_)) => Exit::NotMoved,
                DestinationError::Guest(_) | DestinationError::Uffd(_) => Exit::Missing,
                DestinationError::Fabric(error) => fabric::exit(error),
                DestinationError::Will(WillError::None) => Exit::NothingToTakeOver,
                _ if args.takeover.is_some() => Exit::KeptDamaged,
                _ => Exit::NotMoved,
            };
            let advice = match &error {
                DestinationError::Fabric(error) => fabric::advice(error),
                DestinationError::Cancelled => "A guest that was to come runs on at the source.",
                DestinationError::Will(WillError::None) => {
                    "The guest never ran here: its source has it, or catches it. What waits here holds nothing; end that process."
                }
                DestinationError::Will(WillError::Version { .. } | WillError::Protocol { .. }) => {
                    "The guest waits in its VMM as before, and its source may still catch it. Take it over with the version of belay that received it."
                }
                _ if args.takeover.is_some() => {
                    "The guest waits in its VMM as before, and its source may still catch it. Its memory is given up by ending that process."
                }
                _ => "The guest runs on at the source. `belay check` says what this host lacks.",
            };
            report::failed(observer, &error, advice);
            exit
        }
    }
}

/// Options that mean something to belay's own VMM alone, where another's guest is taken.
fn meaningless(args: &ReceiveArgs) -> Option<&'static str> {
    let given = [
        ("--vmm", args.guest.vmm.is_some()),
        ("--drive", args.guest.drive.is_some()),
        ("--check", args.check),
        ("--run-on", args.run_on.is_some()),
        ("--output-to", args.output_to.is_some()),
    ];
    given.into_iter().find_map(|(name, given)| (given && args.vmm.is_some()).then_some(name))
}
