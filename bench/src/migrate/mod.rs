//! `belay-bench migrate`: one QEMU guest, moved by belay and by QEMU's own ways in turns, all in one run.
//!
//! The guest is booted once and goes from one QEMU into the next: each way of each round takes it where the one before has left it. It writes
//! pages at a steady rate all along, checks each, and is watched from outside, in the file that is its memory.

#[path = "guest/layout.rs"]
mod layout;
mod linux;
mod machine;
mod moved;
mod ours;
mod pulse;
mod qemu;
mod report;

use crate::belay::Belay;
use crate::error::BenchError;
use crate::folder::Folder;
use crate::quantity;
use crate::report::{Output, Report};
use belay_transport::fabric::FabricKind;
use clap::{Args, ValueEnum};
use linux::Linux;
use machine::{Begin, Machine, Vm, cpu_time};
use pulse::{Page, Pulse, times_between};
use qemu::Own;
use report::{Moves, Sample};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Move a QEMU guest by belay and by QEMU's own pre-copy, multifd, post-copy and preempt, in turns
#[derive(Debug, Args)]
#[command(after_help = "\
Everything goes over this host's loopback interface, without encryption. Needs root, QEMU, and a kernel for the guest; the guest's program is
compiled by rustc. Nothing is left behind.

Columns: total, from the order until the source has nothing of the guest's any more; blackout, as whoever stopped the guest says; stall, the
longest that the guest made no step, as seen from outside (the blackout is in it); lost, by how much its work fell behind; fault, what a write
took that waited, in the guest's own clock (post-copy only); host a
and host b, processor time of all processes there, the guest's own included.")]
pub struct MigrateArgs {
    /// Which ways
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Way::ALL)]
    ways: Vec<Way>,
    /// Rounds, each way once in every one
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Guest RAM
    #[arg(long, value_name = "BYTES", default_value = "1G", value_parser = quantity::bytes)]
    memory: u64,
    /// What of it the guest writes
    #[arg(long, value_name = "BYTES", default_value = "256M", value_parser = quantity::bytes)]
    working_set: u64,
    /// How many pages it writes in a second
    #[arg(long, value_name = "PAGES", default_value_t = 20_000, value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    rate: u64,
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    vcpus: u16,
    /// Which QEMU
    #[arg(long, value_name = "PROGRAM", default_value = "qemu-system-x86_64")]
    qemu: String,
    /// QEMU's accelerator
    #[arg(long, default_value = "tcg,thread=multi")]
    accel: String,
    /// Its machine type
    #[arg(long, default_value = "q35")]
    machine: String,
    /// The guest's kernel [default: the newest in /boot, or of the SoftRoCE lab's]
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Have QEMU's own destinations allocate all memory before the guest comes (prealloc=on, which QEMU does not do by itself). belay's does
    #[arg(long)]
    prealloc: bool,
    /// Where the guest's memory lies: tmpfs with room for two of them
    #[arg(long, value_name = "DIR", default_value = "/dev/shm")]
    memory_dir: PathBuf,
    /// The belay to measure [default: the one beside this program]
    #[arg(long, value_name = "PROGRAM")]
    belay: Option<PathBuf>,
    #[command(flatten)]
    output: Output,
}

/// How a guest is moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Way {
    BelayTcp,
    BelayLocal,
    Precopy,
    Multifd,
    Postcopy,
    PostcopyPreempt,
}

impl Way {
    const ALL: [Self; 6] =
        [Self::BelayTcp, Self::BelayLocal, Self::Precopy, Self::Multifd, Self::Postcopy, Self::PostcopyPreempt];

    fn begin(self) -> Begin {
        if self.is_ours() { Begin::WaitStopped } else { Begin::Wait }
    }

    fn is_ours(self) -> bool {
        matches!(self, Self::BelayTcp | Self::BelayLocal)
    }

    /// Whether the guest waits for pages after it was moved.
    pub fn has_faults(self) -> bool {
        !matches!(self, Self::Precopy | Self::Multifd)
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::BelayTcp => "belay tcp",
            Self::BelayLocal => "belay local",
            Self::Precopy => "QEMU precopy",
            Self::Multifd => "QEMU multifd",
            Self::Postcopy => "QEMU postcopy",
            Self::PostcopyPreempt => "QEMU postcopy-preempt",
        }
    }
}

impl std::fmt::Display for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.to_possible_value().expect("none is hidden").get_name())
    }
}

/// A write that took longer waited for its page, or for a processor; an emulated one that finds its page takes a microsecond.
const WAITED: Duration = Duration::from_micros(20);
/// How long the guest is watched before it is moved, and after.
const REST: Duration = Duration::from_millis(300);

/// How long a moved guest must run on for the move to count as one.
const PROVED: Duration = Duration::from_millis(1500);
/// For a guest to fill its working set and to begin, emulated, on a busy machine.
const FILLED: Duration = Duration::from_secs(120);

/// Runs the suite.
pub fn run(args: &MigrateArgs) -> Result<ExitCode, BenchError> {
    // One round, and a small guest.
    let (memory, working_set, rounds) = if args.output.quick {
        (args.memory.min(256 << 20), args.working_set.min(64 << 20), 1)
    } else {
        (args.memory, args.working_set, args.rounds)
    };
    if working_set + (128 << 20) > memory {
        let why = format!("a guest of {} MiB needs 128 MiB for itself", memory >> 20);
        return Err(BenchError::Options { what: "--working-set", why });
    }
    if !rustix::process::geteuid().is_root() {
        return Err(BenchError::Options {
            what: "moving a QEMU guest needs root",
            why: "its page faults are held".into(),
        });
    }
    let folder = Folder::make(&args.memory_dir, "migrate")?;
    let belay = Belay::find(args.belay.as_deref(), folder.path())?;
    let machine = Machine {
        program: args.qemu.clone(),
        accel: args.accel.clone(),
        kind: args.machine.clone(),
        memory,
        vcpus: args.vcpus,
        working_set,
        rate: args.rate,
        prealloc: args.prealloc,
        nonce: u64::from(std::process::id()),
        linux: Linux::make(folder.path(), args.kernel.as_deref())?,
        folder: folder.path().to_owned(),
    };
    let bar = args.output.progress(u64::from(rounds) * args.ways.len() as u64);
    bar.set_message("the guest boots");
    let (mut source, mut page) = booted(&machine, "0")?;
    let version = source.qmp()?.version().to_string();
    let mut moves = Moves::new(&machine, &version, rounds);
    for round in 0..rounds {
        for turn in 0..args.ways.len() {
            // Another one first in every round.
            let way = args.ways[(turn + round as usize) % args.ways.len()];
            bar.set_message(way.name());
            let name = (1 + bar.position()).to_string();
            let (sample, destination) = once(way, &machine, &belay, &page, source, &name)?;
            let lost = sample.lost_guest.is_some();
            moves.add(way, sample);
            source = destination;
            if lost {
                bar.set_message("another guest boots");
                (source, page) = booted(&machine, &format!("{name}-again"))?;
            }
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    moves.print();
    let mut report = Report::new("migrate", &args.output);
    report.cases = moves.cases();
    report.notes.extend(moves.losses());
    args.output.finish(&report)
}

/// A guest that runs and writes, and the page it counts in.
fn booted(machine: &Machine, name: &str) -> Result<(Vm, Page), BenchError> {
    let mut vm = machine.start(name, Begin::Boot)?;
    vm.wait_until_ready()?;
    let page = Page::find(&vm.ram, machine.nonce)?;
    let (begun, mut last) = (Instant::now(), page.count()?.steps);
    // It has filled its memory when it writes at its pace, or as fast as it can.
    while last < machine.rate {
        if begun.elapsed() > FILLED {
            let why = format!(
                "the guest made {last} steps within {} s; it was to make {} in a second",
                FILLED.as_secs(),
                machine.rate
            );
            return Err(BenchError::Refused { why });
        }
        std::thread::sleep(Duration::from_millis(20));
        last = page.count()?.steps;
    }
    Ok((vm, page))
}

/// Moves the guest once.
fn once(
    way: Way,
    machine: &Machine,
    belay: &Belay,
    page: &Page,
    mut source: Vm,
    name: &str,
) -> Result<(Sample, Vm), BenchError> {
    let status = source.status()?;
    if status != "running" {
        return Err(BenchError::Refused { why: format!("where it was moved last, the guest is {status}") });
    }
    let mut destination = machine.start(name, way.begin())?;
    let (here, there) = (page.in_file(&source.ram)?, page.in_file(&destination.ram)?);
    let resting = here.count()?;
    std::thread::sleep(REST);
    let before = here.count()?;
    let pace = (before.steps - resting.steps) as f64 / REST.as_secs_f64();
    let cpu = |vm: &Vm| cpu_time(vm.pid());
    let used = [cpu(&source), cpu(&destination)];
    let begun = Instant::now();
    let pulse = Pulse::watch(here, page.in_file(&destination.ram)?)?;
    let moved = match way {
        Way::BelayTcp => ours::migrate(belay, FabricKind::Tcp, &source, &destination),
        Way::BelayLocal => ours::migrate(belay, FabricKind::Local, &source, &destination),
        Way::Precopy => qemu::migrate(Own::Precopy, &mut source, &mut destination),
        Way::Multifd => qemu::migrate(Own::Multifd, &mut source, &mut destination),
        Way::Postcopy => qemu::migrate(Own::Postcopy, &mut source, &mut destination),
        Way::PostcopyPreempt => qemu::migrate(Own::PostcopyPreempt, &mut source, &mut destination),
    };
    let not_moved = |error, source: &Vm, destination: &Vm| BenchError::NotMoved {
        way: way.name(),
        said: [source.said(), destination.said()],
        source: Box::new(error),
    };
    let moved = moved.map_err(|error| not_moved(error, &source, &destination))?;
    let host_b = cpu(&destination).saturating_sub(used[1]) + moved.helpers[1];
    // One that has ended keeps its times until it is waited for.
    let host_a = cpu(&source).saturating_sub(used[0]) + moved.helpers[0];
    std::thread::sleep(REST.saturating_sub(begun.elapsed()).max(Duration::from_millis(50)));
    let felt = pulse.stop()?;
    let after = there.count();
    // A guest that was lost does not always know it at once: it must have gone on by itself since.
    std::thread::sleep(PROVED);
    let status = destination.status()?;
    let (after, lost_guest) = match after.and_then(|after| Ok((after, there.count()?))) {
        Ok((after, later)) if status == "running" && later.steps > after.steps => (after, None),
        Ok((after, _)) => (after, Some(format!("it is {status} and makes no step"))),
        Err(error @ BenchError::GuestFoundWrong { .. }) => (before.clone(), Some(error.to_string())),
        Err(error) => return Err(error),
    };
    if let (Some(why), true) = (&lost_guest, way.is_ours()) {
        let error = BenchError::Refused { why: why.clone() };
        return Err(not_moved(error, &source, &destination));
    }
    let waited = times_between(&before, &after, WAITED.as_nanos() as u64);
    let done = Duration::from_secs_f64(felt.steps as f64 / pace.max(1.0));
    let sample = Sample {
        total: moved.total,
        blackout: moved.blackout,
        stall: felt.longest,
        lost: felt.time.saturating_sub(done),
        fault_p50: waited.get(waited.len() / 2).copied().filter(|_| way.has_faults()).map(Duration::from_nanos),
        faults: waited.len() as u64,
        bytes: moved.bytes,
        hosts: [host_a, host_b],
        ordered: moved.ordered.saturating_duration_since(begun),
        course: felt.course,
        lost_guest,
    };
    Ok((sample, destination))
}
