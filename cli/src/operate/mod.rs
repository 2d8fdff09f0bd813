//! Seeing and operating the belay processes of this host: `list`, `status`, `release`, `catch`, `cancel`, `promote`.
//!
//! Each running `send` and `receive` has a socket ([`place`]) on which it speaks [`protocol`]; [`console`] is its side, [`client`] ours.

mod client;
pub mod console;
mod place;
pub mod protocol;
pub mod serve;
mod table;

use crate::complain;
use crate::exit::Exit;
use crate::quantity::Span;
use belay_vmm_glue::migrate::operator::{Answer, Ask};
use belay_vmm_glue::migrate::status::Status;
use clap::Args;
use client::{AskError, Ordered, Processes};
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::time::Duration;

/// Where the processes are looked for.
#[derive(Debug, Clone, Args)]
pub struct Where {
    /// Where their sockets lie [default: /run/belay, or a directory of the user's without root]
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
}

/// List the migrations that run on this host
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Examples:
  belay list
  belay list --json | jq -r '.[] | select(.state == \"fenced\") | .id'")]
pub struct ListArgs {
    #[command(flatten)]
    place: Where,
    /// A JSON array of statuses on stdout
    #[arg(long)]
    json: bool,
}

/// Say how a migration stands
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Examples:
  belay status                     the one there is, or each
  belay status vm1 --watch         again every second until it ends
  belay status source-4711 --json | jq .checkpoints.commit_age_us

Times in JSON are in the unit their name ends in (_us, _ns); a field without a value is not known on that side.")]
pub struct StatusArgs {
    /// An id from `belay list`, the start of one, or a migration's number; without it each there is
    #[arg(value_name = "ID")]
    id: Option<String>,
    #[command(flatten)]
    place: Where,
    /// One JSON object a line on stdout
    #[arg(long)]
    json: bool,
    /// Again every second, until the process has ended
    #[arg(long)]
    watch: bool,
}

/// What every order takes.
#[derive(Debug, Clone, Args)]
pub struct OrderArgs {
    /// An id from `belay list`, the start of one, or a migration's number
    #[arg(value_name = "ID")]
    id: String,
    #[command(flatten)]
    place: Where,
    /// How long to wait for it to come to pass; 0s: only until it is accepted or refused
    #[arg(long, value_name = "DURATION", default_value = "30s")]
    wait: Span,
    /// The answers as JSON lines on stdout
    #[arg(long)]
    json: bool,
}

/// Take the guest back to the source, from the newest committed checkpoint
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
With `belay send --arbiter` a catch waits until the arbiter says that the guest is the source's. --force does not, for an arbiter that is gone for \
good. It is your word that the destination neither has the guest nor ever will: a destination that had gone on alone, or that the arbiter \
says yes to later, RUNS IT TOO, and nothing can merge the two again. Make sure that its host is off first.

Where a checkpoint cannot be taken (it is damaged, or the destination lies) nothing is caught by itself: the world may have seen what only that \
one remembers. If every page is at the destination, end belay here and promote the guest there. --older goes on here instead, from the newest one that can \
be taken.")]
pub struct CatchArgs {
    #[command(flatten)]
    order: OrderArgs,
    /// Do not wait for the arbiter: nothing but your word then keeps two hosts from running this guest
    #[arg(long, requires = "i_know_the_destination_is_gone")]
    force: bool,
    /// Where newer checkpoints cannot be taken: from the newest that can be
    #[arg(long, requires = "i_know_what_came_after_is_undone", conflicts_with = "force")]
    older: bool,
    /// With --older: your word that what the guest did and showed after that checkpoint may be undone
    #[arg(long, requires = "older")]
    i_know_what_came_after_is_undone: bool,
    /// With --force: your word that the destination does not run this guest, will not, and had not made it its own
    #[arg(long, requires = "force")]
    i_know_the_destination_is_gone: bool,
}

/// Give a guest to a destination that is cut off from its source
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
A destination that has lost its source stops the guest and keeps its memory: the source may have the guest by now. If the source is \
gone for good, and every page had landed here, this lets the guest run on.

It is your word for something that belay cannot know. If the source took the guest back, showed output and died only after that, \
the world has seen a past that the guest here does not remember. Make sure of it (the source's last words, what the guest showed) \
and say --i-know-the-source-is-gone.

Where the destination was started with --arbiter, that has to agree: it does unless the source has claimed the guest first. --force does \
without it, for an arbiter that is gone for good, or that gave the guest to a source which died before it ran it. The arbiter is told once, if it can be; where it cannot, \
a source that comes back claims the guest there and RUNS IT TOO. Two guests then write the same disks and answer for the same address, and \
nothing can merge them again. Before you say it, make sure that the source stays off, or take the record away from it: \
`etcdctl del belay/guest/NAME`.")]
pub struct PromoteArgs {
    #[command(flatten)]
    order: OrderArgs,
    /// Your word that the source does not run this guest, will not, and had not taken it back
    #[arg(long)]
    i_know_the_source_is_gone: bool,
    /// Do not ask the arbiter, or go against it: nothing but your word then keeps two hosts from running this guest
    #[arg(long, requires = "i_know_the_source_is_gone")]
    force: bool,
}

fn processes(place: &Where) -> Result<Processes, Exit> {
    let path = place.run_dir.clone().unwrap_or_else(crate::holder::default_run_dir);
    Processes::at(path).map_err(|error| {
        complain(&error, "Nothing in it can be trusted; mend its owner and mode, or choose another --run-dir.");
        Exit::Failed
    })
}

fn failed(error: &AskError) -> Exit {
    let (advice, exit) = match error {
        AskError::NoSuch { .. } | AskError::Ambiguous { .. } => ("`belay list` shows them.", Exit::NoSuchMigration),
        AskError::NoneRuns { .. } => ("--run-dir says where else to look.", Exit::NoSuchMigration),
        AskError::NoAnswer { .. } => (
            "`belay status` tells whether it has; `ps -o stat= -p PID` says T of a process that is stopped.",
            Exit::Failed,
        ),
        AskError::Silent { .. } => ("Is its process stopped? `ps -o stat= -p PID` says T then.", Exit::Failed),
        AskError::Place(_) => ("Choose another --run-dir, or mend this one.", Exit::Failed),
        AskError::Stranger { .. } => ("Nothing was asked of it.", Exit::Failed),
        AskError::Frame { .. } | AskError::Bad { .. } | AskError::Other { .. } => {
            ("Is it of another version? Use the belay that it was started with.", Exit::Failed)
        }
    };
    complain(error, advice);
    exit
}

/// Says something on stdout. A reader that went away has read enough.
fn say(text: &str) -> bool {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_ok()
}

fn json<T: serde::Serialize>(value: &T) -> String {
    serde_json::to_string(value).expect("plain data") + "\n"
}

/// Runs `belay list`.
pub fn list(args: &ListArgs) -> Exit {
    let asked =
        processes(&args.place).and_then(|processes| Ok((processes.all().map_err(|error| failed(&error))?, processes)));
    let (all, processes) = match asked {
        Ok(asked) => asked,
        Err(exit) => return exit,
    };
    let silent = all.iter().filter_map(|(_, status)| status.as_ref().err());
    silent.for_each(|error| complain(error, "Is its process stopped?"));
    let known: Vec<&Status> = all.iter().filter_map(|(_, status)| status.as_ref().ok()).collect();
    if args.json {
        say(&json(&known));
    } else if all.is_empty() {
        say(&format!("no migration runs here ({} has no living socket)\n", processes.path().display()));
    } else {
        let rows = std::iter::once(table::heading()).chain(known.into_iter().map(table::line));
        say(&crate::report::printable(&table::columns(&rows.collect::<Vec<_>>())));
    }
    Exit::Done
}

/// Runs `belay status`.
pub fn status(args: &StatusArgs) -> Exit {
    let processes = match processes(&args.place) {
        Ok(processes) => processes,
        Err(exit) => return exit,
    };
    let ids = match &args.id {
        Some(word) => processes.find(word).map(|id| vec![id]),
        None => processes.ids(),
    };
    let ids = match ids {
        Ok(ids) if ids.is_empty() => return failed(&AskError::NoneRuns { looked_in: processes.path().to_owned() }),
        Ok(ids) => ids,
        Err(error) => return failed(&error),
    };
    let mut shown = false;
    loop {
        let mut text = String::new();
        for id in &ids {
            match processes.status(id) {
                Ok(status) if args.json => text += &json(&status),
                Ok(status) => {
                    text += if text.is_empty() { "" } else { "\n" };
                    text += &table::page(&status);
                }
                // It has ended: that is what a watch waits for.
                Err(AskError::NoSuch { .. }) if shown && ids.len() == 1 => {
                    eprintln!("{id} has ended");
                    return Exit::Done;
                }
                Err(AskError::NoSuch { .. }) if shown => {}
                Err(error) => return failed(&error),
            }
        }
        if args.watch && !args.json && std::io::stdout().is_terminal() {
            // Home, and clear what is below.
            text.insert_str(0, "\u{1b}[H\u{1b}[J");
        }
        if !say(&text) || !args.watch || (shown && text.is_empty()) {
            return Exit::Done;
        }
        shown = true;
        std::thread::sleep(Duration::from_secs(1));
    }
}

/// Gives an order.
pub fn order(args: &OrderArgs, ask: Ask) -> Exit {
    let processes = match processes(&args.place) {
        Ok(processes) => processes,
        Err(exit) => return exit,
    };
    let id = match processes.find(&args.id) {
        Ok(id) => id,
        Err(error) => return failed(&error),
    };
    let told = |answer: &Answer| match answer {
        answer if args.json => drop(say(&json(answer))),
        Answer::Accepted { what } => drop(say(&format!("{id}: accepted: {what}\n"))),
        Answer::CameToPass { what } => drop(say(&format!("{id}: {what}\n"))),
        Answer::Refused { .. } | Answer::Failed { .. } => {}
    };
    match processes.order(&id, ask, args.wait.0, told) {
        Ok(Ordered::Answered(Answer::Accepted { .. } | Answer::CameToPass { .. })) => Exit::Done,
        Ok(Ordered::Answered(Answer::Refused { why })) => {
            eprintln!("belay: {id} refuses to {ask}: {}", crate::report::printable(&why));
            let wants_word = matches!(ask, Ask::Promote { source_is_gone: false, .. });
            match wants_word {
                true => eprintln!(
                    "       `belay help promote` says what it means; --i-know-the-source-is-gone gives that word"
                ),
                false => eprintln!("       `belay status {id}` says how it stands; nothing was changed"),
            }
            Exit::OrderRefused
        }
        Ok(Ordered::Answered(Answer::Failed { why })) => {
            eprintln!(
                "belay: {id}: the order was accepted, and will not come to pass: {}",
                crate::report::printable(&why)
            );
            Exit::NotInTime
        }
        Ok(Ordered::NotInTime { waiting_for }) => {
            eprintln!("belay: {id}: waited in vain for {}", crate::report::printable(&waiting_for));
            eprintln!("       `belay status {id}` says how it stands; ask again, or wait longer with --wait");
            Exit::NotInTime
        }
        Err(error) => failed(&error),
    }
}

/// Runs `belay catch`.
pub fn catch(args: &CatchArgs) -> Exit {
    if args.force {
        eprintln!(
            "belay: by force, without the arbiter's leave: should the destination run this guest, now or later, two hosts do. Keep it off"
        );
    }
    let ask = match (args.force, args.older) {
        (true, _) => Ask::CatchByForce,
        (_, true) => Ask::CatchOlder,
        _ => Ask::Catch,
    };
    order(&args.order, ask)
}

/// Runs `belay promote`.
pub fn promote(args: &PromoteArgs) -> Exit {
    if args.force {
        eprintln!(
            "belay: by force, without the arbiter's leave: should the source run this guest, now or when it comes back, two hosts do. Keep it off; \
             `etcdctl del belay/guest/NAME` keeps it from claiming the guest"
        );
    }
    order(&args.order, Ask::Promote { source_is_gone: args.i_know_the_source_is_gone, by_force: args.force })
}
