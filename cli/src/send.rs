//! `belay send`: runs the proof guest and moves it to a waiting `belay receive`; catches it if that fails.

use crate::descriptors::TooFew;
use crate::exit::Exit;
use crate::holder::{self, Driver, Held};
use crate::keeping::{self, KeepOptions};
use crate::operate::console::{Console, ConsoleOptions};
use crate::options::{
    ArbiterOptions, ConfigFile, FabricOptions, FenceOptions, GuestOptions, PolicyChoice, ProgramChoice, ReleaseChoice,
    SecurityOptions, TetherOptions,
};
use crate::qemu::send::QemuSend;
use crate::quantity::Span;
use crate::soak::points::StopAt;
use crate::{descriptors, fabric, logs, report, signals};
use belay_checkpoint::arbiter::LendError;
use belay_checkpoint::epoch::overflow_is_enough;
use belay_checkpoint::guest::TrackerKind;
use belay_checkpoint::outbox::{Outbox, OutputMode};
use belay_checkpoint::policy::PolicySpec;
use belay_checkpoint::ring::{RingShape, SpoolError};
use belay_transport::region::RegionError;
use belay_transport::session::{Address, SessionConfig, SessionError};
use belay_transport::{PAGE_SIZE, PageSize, RegionId};
use belay_vmm_glue::fence_hook::FenceHook;
use belay_vmm_glue::kvm::guests::{GuestSpec, Program};
use belay_vmm_glue::migrate::arbitration::Arbitration;
use belay_vmm_glue::migrate::observation::Observer;
use belay_vmm_glue::migrate::operator::{Ended as WaitEnded, Words};
use belay_vmm_glue::migrate::protocol::PROTOCOL_VERSION;
use belay_vmm_glue::migrate::reattach::Identity;
use belay_vmm_glue::migrate::settings::{Bounds, LeaseSettings, Proposal, ReleasePolicy, TetherSettings, VmmSpec};
use belay_vmm_glue::migrate::source::keep::Keep;
use belay_vmm_glue::migrate::source::{self, Given, Outcome, SourceConfig, SourceError};
use belay_vmm_glue::migrate::status::Board;
use clap::{Args, Subcommand};
use std::path::PathBuf;
use std::sync::Arc;

/// Run a guest and move it to a waiting `belay receive`, tethered; or move the guest of a QEMU that runs
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES, args_conflicts_with_subcommands = false)]
pub struct SendArgs {
    /// Which guest, if not the proof guest that is run here
    #[command(subcommand)]
    pub vmm: Option<SendVmm>,
    /// Where `belay receive` listens: HOST:PORT (tcp and verbs), or unix:/path (shared memory on one host)
    #[arg(long, value_name = "ADDR", required_unless_present = "takeover")]
    pub to: Option<Address>,
    #[command(flatten)]
    pub guest: GuestOptions,
    #[command(flatten)]
    pub tether: TetherOptions,
    #[command(flatten)]
    pub fabric: FabricOptions,
    #[command(flatten)]
    pub security: SecurityOptions,
    /// Where the guest's output goes: the address of a `belay observe` [default: nowhere]
    #[arg(long, value_name = "ADDR")]
    pub output_to: Option<String>,
    #[command(flatten)]
    pub keep: KeepOptions,
    /// How long the guest runs here before it is moved, once it has filled its memory
    #[arg(long, value_name = "TIME", default_value = "200ms")]
    run_before: Span,
    /// After a catch: end this long after it (without this the guest runs until a signal)
    #[arg(long, value_name = "TIME")]
    pub run_on: Option<Span>,
    /// At the end compare all of guest RAM with what it must be
    #[arg(long)]
    pub check: bool,
    /// Freeze this process (SIGSTOP) when it comes to a stop point for the N-th time (for tests)
    #[arg(long, value_name = "NAME[:N]", hide = true)]
    stop_at: Option<StopAt>,
    /// Under --output lease: order the catch as soon as the destination is lost. You then vouch that it shows no more output
    #[arg(long)]
    pub catch_on_loss: bool,
    #[command(flatten)]
    pub fence: FenceOptions,
    #[command(flatten)]
    pub arbiter: ArbiterOptions,
    #[command(flatten)]
    pub console: ConsoleOptions,
    /// Events as JSON lines on stdout
    #[arg(long)]
    json: bool,
    /// Defaults from a TOML file, see cluster-configs/
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// Guests of other VMMs.
#[derive(Debug, Clone, Subcommand)]
pub enum SendVmm {
    /// Move the guest of a QEMU that runs
    Qemu(QemuSend),
}

const EXAMPLES: &str = "\
Examples:
  belay send --to 127.0.0.1:7700                                       beside `belay receive --listen 127.0.0.1:7700`
  belay send --to unix:/run/belay/receive.sock --memory 1G             over shared memory
  belay send --to host-b:7700 --cert source.crt --key source.key --peer-cert destination.crt
  belay send --to host-b:7700 --config cluster-configs/plain-tcp.toml --release never
  belay send --to host-b:7700 --memory-dir /dev/shm                    so that another process can take over if this one dies,
  belay send --takeover                                                which is this
  belay send --to host-b:7700 --fabric verbs --trusted-fabric -d mlx5_0 -x 3 --cert … --key … --peer-cert …
  belay send --to host-b:7700 qemu --qmp /run/vm1.qmp                  the guest of a QEMU that runs: docs/qemu.md

SIGINT or SIGTERM before the switch takes it back; after it, the guest is caught; once it runs here again, the guest is ended.";

/// Runs the command.
pub fn run(mut args: SendArgs) -> Exit {
    if let Some(path) = &args.config {
        match ConfigFile::read(path) {
            Ok(file) => {
                args.console = args.console.or(file.operate);
                let mut tether = file.tether;
                match args.vmm {
                    None => args.guest = args.guest.or(file.guest),
                    // A file that says how the proof guest is tracked says nothing of another.
                    Some(_) => tether.tracker = None,
                }
                args.tether = args.tether.or(tether);
                args.fabric = args.fabric.or(file.fabric);
                args.security = args.security.or(file.security);
                args.fence = args.fence.or(file.fence);
                args.arbiter = args.arbiter.or(file.arbiter.parts().0);
            }
            Err(error) => {
                let observer = report::reporter("source", args.json);
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
    let board = args.console.board("source");
    let observer = report::watched("source", args.json, Some(Arc::clone(&board)), Some(logs));
    let exit = match (descriptors::take(), args.keep.takeover) {
        (Err(too_few), _) => {
            report::failed(&observer, &too_few, TooFew::ADVICE);
            Exit::Missing
        }
        (Ok(()), Some(id)) if args.vmm.is_none() => keeping::take_over(args, id, &board, &observer),
        (Ok(()), _) => match args.vmm.take() {
            Some(SendVmm::Qemu(guest)) => crate::qemu::send::send(&args, &guest, &board, &observer),
            None => send(&args, &board, &observer),
        },
    };
    report::ended(&observer, exit)
}

fn send(args: &SendArgs, board: &Arc<Board>, observer: &Observer) -> Exit {
    let fail = |what: &dyn std::error::Error, advice: &str, exit: Exit| {
        report::failed(observer, what, advice);
        exit
    };
    let Some(to) = args.to.clone() else {
        report::failed_text(observer, "--to is missing", "Say where `belay receive` listens.");
        return Exit::Usage;
    };
    let spec = guest_spec(&args.guest);
    let page_size = args.guest.page_size.map_or(PageSize::Small, Into::into);
    if let Err(why) = can_be(&spec, page_size) {
        report::failed_text(observer, &why, "Nothing was started; `belay help send` names the limits.");
        return Exit::Usage;
    }
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
    let console = match signals::termination() {
        Ok(signals) => Console::open(&args.console, board, signals, observer),
        Err(error) => return fail(&error, "Nothing was started.", Exit::Failed),
    };
    let console = match console {
        Ok(console) => console,
        Err(exit) => return exit,
    };
    let words = &console.words;
    let driver = Driver::choose(args.guest.drive);
    let tether = tether_settings(&args.tether, driver.tracker());
    let mut proposal = Proposal {
        protocol: PROTOCOL_VERSION,
        vmm: VmmSpec::Kvm(spec.clone()),
        tether,
        output_to: args.output_to.clone(),
        release: release_policy(args.tether.release),
        shards: args.tether.shards.unwrap_or(1),
        nonces: Vec::new(),
        identity: match Identity::random() {
            Ok(identity) => identity,
            Err(error) => return fail(&error, "Nothing was started.", Exit::Failed),
        },
        reattach: None,
    };
    if args.keep.memory_dir.is_some() && proposal.tether.is_none() {
        let what = "--memory-dir with --policy none: there would be no checkpoint to go on from";
        report::failed_text(observer, what, "Nothing was started; leave out one of them.");
        return Exit::Usage;
    }
    if let Err(why) = proposal.check() {
        report::failed_text(observer, &why, "Nothing was started; `belay help send` names the limits.");
        return Exit::Usage;
    }
    let sizes = sizes(&args.tether, spec.memory_bytes);
    if let (Some(_), Err(why)) = (&proposal.tether, can_tether(sizes, spec.memory_bytes)) {
        report::failed_text(observer, &why, SIZES_ADVICE);
        return Exit::Usage;
    }
    let output =
        holder::output(args.output_to.as_deref(), "source").and_then(|out| Outbox::open(holder::OUTBOX_BOUNDS, out));
    let output = match output {
        Ok(output) => Arc::new(output),
        Err(error) => return fail(&error, "Write --output-to as `belay observe` prints it.", Exit::Usage),
    };
    board.emits_through(&output);
    let keep = match keeping::begin(&args.keep, page_size, proposal.identity, observer) {
        Ok(keep) => keep,
        Err(error) => return keeping::refused(&error, observer),
    };
    let (ring_bytes, overflow_bytes) = sizes;
    let room = keep.expect_room(spec.memory_bytes, ring_bytes as u64, overflow_bytes);
    let made = room.and_then(|()| keep.make_ram(RegionId(0), spec.memory_bytes as usize, page_size));
    let file = match made {
        Ok(file) => file,
        Err(error) => {
            let exit = match keep.outlives() {
                true => keeping::refused(&error, observer),
                false => fail(&error, "Nothing was started; `belay check` says what this host lacks.", Exit::Missing),
            };
            keeping::close(keep, observer);
            return exit;
        }
    };
    let held = match Held::start(&spec, file, (&driver, args.guest.vmm), output.sink(), observer) {
        Ok(held) => held,
        Err(error) => {
            let exit = fail(&error, "`belay check` says what this host lacks.", Exit::Missing);
            keeping::close(keep, observer);
            return exit;
        }
    };
    match held.warm_up(args.run_before.0, words, board) {
        Ok(WaitEnded::Time) => {}
        Ok(WaitEnded::Signal) => {
            keeping::close(keep, observer);
            return Exit::Interrupted;
        }
        Ok(WaitEnded::Order) => {
            keeping::close(keep, observer);
            report::failed_text(observer, holder::CANCELLED, "The guest never left and runs on here.");
            return held.run_on(args.run_on, args.check, &output, words, observer, Exit::NotMoved);
        }
        Err(error) => {
            keeping::close(keep, observer);
            return fail(&error, "The guest was not moved.", Exit::Failed);
        }
    }
    board.phase("running", "everything before the switch is being made ready");
    proposal.nonces = held.nonces.clone();
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
    see_through(args, Going { config: &config, keep, held, taken_over: false }, &output, words, observer)
}

/// A migration that is about to go on.
pub struct Going<'a> {
    pub config: &'a SourceConfig,
    pub keep: Keep,
    pub held: Held,
    /// From where another process left it.
    pub taken_over: bool,
}

/// Carries the migration out and says how it ended.
pub fn see_through(
    args: &SendArgs,
    Going { config, mut keep, mut held, taken_over }: Going<'_>,
    output: &Outbox,
    words: &Words,
    observer: &Observer,
) -> Exit {
    let (mut guest, steps_of) = (held.guest.clone(), held.guest.clone());
    let steps = || steps_of.steps();
    let given = Given { config, keep: &mut keep, guest: &mut guest, output, steps: &steps, observer, words };
    let outcome = if taken_over { source::take_over(given) } else { source::run(given) };
    let (why, advice, exit) = match outcome {
        Ok(Outcome::Released { heard }) => {
            keeping::released(keep, heard, observer);
            holder::cpu_time(observer);
            return Exit::Done;
        }
        Ok(Outcome::Caught { nonces, .. }) => {
            // The guest runs here and nothing of the migration is left to be taken over.
            keeping::close(keep, observer);
            held.nonces = nonces;
            return held.run_on(args.run_on, args.check, output, words, observer, Exit::Caught);
        }
        Ok(Outcome::NotMoved { why }) => {
            keeping::close(keep, observer);
            (why, "The guest never left and runs on here.", Exit::NotMoved)
        }
        Ok(Outcome::AwaitsOperator { why }) => {
            let advice = "This host has not resumed the guest. If the destination still has it, promote it there.";
            (why, advice, Exit::CatchNeedsOperator)
        }
        Ok(Outcome::Lost { why }) => (why, "Neither host can run this guest.", Exit::Lost),
        Ok(Outcome::Ceded { why }) => (why, CEDED, Exit::Ceded),
        Err(error) => {
            let exit = not_begun(&error, taken_over, observer);
            if taken_over {
                // What was there to be taken over still is.
                return exit;
            }
            keeping::close(keep, observer);
            // The guest runs here as it did. Where it was said how long it shall, it does; else it has nobody to run for.
            return match (&error, args.run_on) {
                (SourceError::Cancelled, _) | (_, Some(_)) => {
                    held.run_on(args.run_on, args.check, output, words, observer, exit)
                }
                (_, None) => exit,
            };
        }
    };
    report::failed_text(observer, &why, advice);
    match exit {
        Exit::NotMoved => held.run_on(args.run_on, args.check, output, words, observer, exit),
        exit => exit,
    }
}

/// What is left to say where the arbiter has given the guest away.
pub const CEDED: &str =
    "The guest runs at the destination, or ended there, and was not resumed here. See `belay list` on that host.";

/// Says why a migration did not begin, and with which exit code.
pub fn not_begun(error: &SourceError, taken_over: bool, observer: &Observer) -> Exit {
    let (exit, advice) = match error {
        SourceError::Connect { source, .. } => {
            let otherwise =
                "The guest was not touched. Is `belay receive` running there, with matching --cert or --insecure?";
            (Exit::NoSession, fabric::no_session(source).unwrap_or(otherwise))
        }
        SourceError::Fabric(error) => (fabric::exit(error), fabric::advice(error)),
        SourceError::Interrupted => (Exit::Interrupted, "The guest was not touched."),
        SourceError::Cancelled => (Exit::NotMoved, "The guest was not touched and runs on here."),
        SourceError::Fold(_) | SourceError::Spool(_) if taken_over => {
            (Exit::KeptDamaged, "Nothing was changed. What is kept of the guest cannot be used as it is.")
        }
        SourceError::Region(RegionError::NoRoom { .. } | RegionError::NoHugePages { .. })
        | SourceError::Spool(SpoolError::Region(_)) => (
            Exit::NotMoved,
            "The guest was not touched. Make room where --memory-dir is (mount -o remount,size=…), or name another.",
        ),
        SourceError::Lend(LendError::NotOurs { .. }) => (
            Exit::NotMoved,
            "The guest was not touched. If that host does not have the guest any more, remove the record: `etcdctl del belay/guest/NAME`.",
        ),
        SourceError::Lend(_) => {
            (Exit::NotMoved, "The guest was not touched. Mend the arbiter, or leave --arbiter out on both hosts.")
        }
        SourceError::Keep(error) => return keeping::refused(error, observer),
        _ => (Exit::NotMoved, "The guest was not touched. `belay check`, there and here, says what a host lacks."),
    };
    report::failed(observer, error, advice);
    exit
}

/// Bytes of the ring and of overflow memory.
pub fn sizes(tether: &TetherOptions, memory_bytes: u64) -> (usize, u64) {
    let ring = tether.ring.map_or(64 << 20, |ring| ring.0 as usize);
    (ring, tether.overflow.map_or(holder::overflow_for(memory_bytes), |bytes| bytes.0))
}

/// What to do about sizes with which nothing can be tethered.
pub const SIZES_ADVICE: &str = "Nothing was started; leave --ring and --overflow out to have what the guest needs.";

/// Whether a guest of so much memory can be tethered with a ring and overflow memory of these sizes; why not.
pub fn can_tether((ring_bytes, overflow_bytes): (usize, u64), memory_bytes: u64) -> Result<(), String> {
    RingShape::of(ring_bytes).map_err(|error| format!("--ring: {error}"))?;
    overflow_is_enough(overflow_bytes, memory_bytes / PAGE_SIZE as u64).map_err(|error| error.to_string())
}

/// Why no session can be had with these options.
pub enum SessionRefused {
    Security(SessionError),
    Fabric(fabric::Refused),
}

/// What makes sure that a lost destination is off, and who says whose the guest is, if anything was named.
pub fn outsiders(args: &SendArgs, observer: &Observer) -> Result<(Option<FenceHook>, Option<Arbitration>), Exit> {
    let both = || {
        let (fence, arbiter) = (args.fence.hook()?, args.arbiter.arbitration()?);
        match (&arbiter, &args.tether.policy) {
            (Some(_), Some(PolicyChoice::None)) => {
                Err("--arbiter with --policy none: there would be no checkpoint to take \
                                                        the guest back from"
                    .to_owned())
            }
            _ => Ok((fence, arbiter)),
        }
    };
    both().map_err(|why: String| {
        let advice = "Nothing was started; `belay help send` tells what a fence and an arbiter need.";
        report::failed_text(observer, &why, advice);
        Exit::Usage
    })
}

/// What a session is made with.
pub fn session(args: &SendArgs, to: &Address) -> Result<SessionConfig, SessionRefused> {
    let security = args.security.security().map_err(SessionRefused::Security)?;
    let mut session = fabric::session(&args.fabric, security, to).map_err(SessionRefused::Fabric)?;
    session.pace_bytes_per_s = args.tether.pace.map(|pace| pace.bits_per_s / 8);
    Ok(session)
}

/// Whether there can be such a guest on such pages; why not.
fn can_be(spec: &GuestSpec, page_size: PageSize) -> Result<(), String> {
    spec.layout().map_err(|error| error.to_string())?;
    match spec.memory_bytes.is_multiple_of(page_size.bytes() as u64) {
        true => Ok(()),
        false => Err(format!("guest memory of {} bytes is no whole number of {page_size} pages", spec.memory_bytes)),
    }
}

/// What the guest is asked to do, with the defaults of the command.
fn guest_spec(options: &GuestOptions) -> GuestSpec {
    let defaults = GuestSpec::default();
    let memory_bytes = options.memory.map_or(256 << 20, |bytes| bytes.0);
    GuestSpec {
        program: match options.guest {
            Some(ProgramChoice::Scanner) => Program::Scanner,
            Some(ProgramChoice::Sequential) => Program::Sequential,
            Some(ProgramChoice::Zipf) => Program::Zipf,
            Some(ProgramChoice::Phases) => Program::Phases,
            Some(ProgramChoice::Ledger) | None => Program::Ledger,
        },
        memory_bytes,
        working_set_bytes: options.working_set.map_or(memory_bytes / 2, |bytes| bytes.0),
        rate_pages_per_s: options.dirty_rate.map_or(defaults.rate_pages_per_s, |rate| rate.0),
        vcpus: options.vcpus.unwrap_or(1),
        seed: options.seed.unwrap_or(defaults.seed),
        ..defaults
    }
}

/// The tether, with the defaults of the command; `None` with `--policy none`.
pub fn tether_settings(options: &TetherOptions, tracker: TrackerKind) -> Option<TetherSettings> {
    let output = options.output.map_or(OutputMode::Commit, Into::into);
    let policy = match (&options.policy, options.period) {
        (Some(PolicyChoice::None), _) => return None,
        (Some(PolicyChoice::Take(policy)), _) => *policy,
        (None, Some(period)) => PolicySpec::Fixed { period: period.0 },
        (None, None) => PolicySpec::of_output(output),
    };
    Some(TetherSettings {
        tracker: options.tracker.map_or(tracker, Into::into),
        policy,
        output,
        lease: options.lease.map_or_else(
            || LeaseSettings::lasting(LeaseSettings::default().length),
            |lease| LeaseSettings::lasting(lease.0),
        ),
    })
}

pub fn release_policy(choice: Option<ReleaseChoice>) -> ReleasePolicy {
    match choice {
        None | Some(ReleaseChoice::WhenLanded) => ReleasePolicy::WhenLanded,
        Some(ReleaseChoice::Never) => ReleasePolicy::Never,
        Some(ReleaseChoice::After(span)) => ReleasePolicy::After(span.0),
    }
}
