//! The `belay` command: parses, wires and shows. It decides nothing of its own.
//!
//! A library only so that fuzz targets reach its parsers; the program is [`main`].

mod check;
mod demo;
mod descriptors;
mod disk;
mod exit;
mod fabric;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
#[cfg(test)]
#[path = "../../transport/src/golden.rs"]
mod golden;
mod holder;
mod judge;
mod keeping;
mod keygen;
mod logs;
mod manual;
mod metrics;
mod observe;
mod operate;
mod options;
mod privileges;
mod qemu;
mod quantity;
mod receive;
mod relay;
mod report;
mod send;
mod signals;
mod soak;
mod takeover;
mod vmm;

use belay_transport::explain;
use belay_vmm_glue::migrate::operator::Ask;
use clap::{Parser, Subcommand};
use exit::Exit;
use privileges::Part;
use std::process::ExitCode;

/// Post-copy live migration that survives the loss of its destination.
///
/// The guest moves at once and its memory follows by one-sided reads. Until the last page has arrived, the destination sends
/// checkpoints back, so that the source can catch the guest if the destination or the network fails.
#[derive(Debug, Parser)]
#[command(name = "belay", version, arg_required_else_help = true, after_help = AFTER_HELP, after_long_help = format!("{AFTER_HELP}\n\n{}", exit::TABLE))]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const AFTER_HELP: &str = "\
Examples:
  belay demo                                   kill a destination in mid-pull and watch the guest come back
  belay check                                  what this host can do, and how to mend what it cannot
  belay receive --listen 127.0.0.1:7700        terminal 1: wait for a guest
  belay send --to 127.0.0.1:7700               terminal 2: run a proof guest, move it there, tethered

`belay help COMMAND` tells more of each; README.md tells how it works.";

#[derive(Debug, Subcommand)]
enum Command {
    /// Move a guest, kill its destination in mid-pull, catch it, check every byte and packet
    Demo(demo::DemoArgs),
    /// Run a guest and move it to a waiting `belay receive`, tethered
    Send(Box<send::SendArgs>),
    /// Wait for a guest, pull its memory, send checkpoints back
    Receive(Box<receive::ReceiveArgs>),
    /// List the migrations that run on this host
    List(operate::ListArgs),
    /// Say how a migration stands: state, pages left, checkpoint age, output delay, last error and what led to it
    Status(operate::StatusArgs),
    /// Have a destination ask its source to let go of the guest
    Release(operate::OrderArgs),
    /// Take the guest back to the source, from the newest committed checkpoint
    Catch(operate::CatchArgs),
    /// Call a migration off while the guest has not left
    Cancel(operate::OrderArgs),
    /// Give a guest to a destination that is cut off from a source that is gone for good
    Promote(operate::PromoteArgs),
    /// Make the certificates two hosts need to trust each other
    Keygen(keygen::KeygenArgs),
    /// Say what this host can do, and for each thing missing the command that mends it
    Check(check::CheckArgs),
    /// Print completions for a shell
    Completions(manual::CompletionsArgs),
    /// Print the manual page of belay, or write those of all commands
    Man(manual::ManArgs),
    /// Watch a guest's output from outside and judge it
    Observe(observe::ObserveArgs),
    /// Stand between a QEMU guest's network card and the world
    Relay(relay::RelayArgs),
    /// Stand between a QEMU guest's writable disk and its image
    Disk(disk::DiskArgs),
    /// Judge a run of two hosts by what each wrote down and what an observer saw
    Judge(judge::JudgeArgs),
    /// Break seeded migrations in known places and judge what becomes of each
    Soak(soak::SoakArgs),
    /// The VMM in a process of its own (started by send and receive with --vmm apart)
    #[command(hide = true)]
    Vmm(vmm::VmmArgs),
    /// The small process that outlives a VMM (started by receive)
    #[command(hide = true)]
    Guard(vmm::GuardArgs),
    /// The small process that ends a QEMU with belay (started by send and receive)
    #[command(hide = true)]
    Leash(vmm::GuardArgs),
    /// The small process that ends a fence hook with belay (started by send)
    #[command(hide = true)]
    Hook(vmm::HookArgs),
}

/// Runs the command that this process was started with.
pub fn main() -> ExitCode {
    let command = match Cli::try_parse() {
        Ok(cli) => cli.command,
        Err(error) => return ExitCode::from(wrong_command_line(&error).code()),
    };
    match &command {
        Command::Receive(args) if args.gates_a_tap() => privileges::give_up(Part::HostOfTap),
        Command::Send(_) | Command::Receive(_) | Command::Vmm(_) => privileges::give_up(Part::Host),
        Command::Guard(_) | Command::Leash(_) => privileges::give_up(Part::Guard),
        // The demo's and the soak's children are sends and receives; the others only look or ask.
        _ => {}
    }
    let exit = match command {
        Command::Demo(args) => demo::run(args),
        Command::Send(args) => send::run(*args),
        Command::Receive(args) => receive::run(*args),
        Command::List(args) => operate::list(&args),
        Command::Status(args) => operate::status(&args),
        Command::Release(args) => operate::order(&args, Ask::Release),
        Command::Catch(args) => operate::catch(&args),
        Command::Cancel(args) => operate::order(&args, Ask::Cancel),
        Command::Promote(args) => operate::promote(&args),
        Command::Keygen(args) => keygen::run(args),
        Command::Check(args) => check::run(args),
        Command::Completions(args) => manual::completions(&args),
        Command::Man(args) => manual::man(&args),
        Command::Observe(args) => observe::run(args),
        Command::Relay(args) => relay::run(args),
        Command::Disk(args) => disk::run(args),
        Command::Judge(args) => judge::run(&args),
        Command::Soak(args) => soak::run(&args),
        Command::Vmm(args) => vmm::run(args),
        Command::Guard(args) => vmm::run_guard(args),
        Command::Leash(args) => vmm::run_leash(args),
        // Its exit code is the hook's own.
        Command::Hook(args) => return vmm::run_hook(&args),
    };
    ExitCode::from(exit.code())
}

/// Shows what clap has to say: the help that was asked for, or what is wrong; to programs too, if --json was among the words.
fn wrong_command_line(error: &clap::Error) -> Exit {
    if !error.use_stderr() {
        // A reader that went away has read enough.
        let _ = error.print();
        return Exit::Done;
    }
    if std::env::args_os().any(|word| word == "--json") {
        let observer = report::reporter("command-line", true);
        report::failed_text(
            &observer,
            error.to_string().trim(),
            "Nothing was started; `belay help COMMAND` tells what is possible.",
        );
        return report::ended(&observer, Exit::Usage);
    }
    let _ = error.print();
    Exit::Usage
}

/// Prints an error with everything that caused it, and what to do next.
pub(crate) fn complain(error: &dyn std::error::Error, advice: &str) {
    eprintln!("belay: {}", explain(error));
    if !advice.is_empty() {
        eprintln!("       {advice}");
    }
}
