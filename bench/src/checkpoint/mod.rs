//! `checkpoint`: how long the guest stands still for a checkpoint, by its own clock, beside what no checkpoint can do without: a stop, a
//! tracker's answer, a copy of the pages. Over how many pages are dirty, how large the guest is and who tracks its writes.

mod rounds;
mod summary;

use crate::Fabric;
use crate::carrier::{Carrier, Device};
use crate::error::BenchError;
use crate::quantity;
use crate::report::{Output, Report};
use crate::tethered::Shape;
use belay_checkpoint::guest::TrackerKind;
use belay_checkpoint::record::largest_record;
use belay_transport::PAGE_SIZE;
use clap::{Args, ValueEnum};
use std::fmt;
use std::process::ExitCode;

/// The pause of a checkpoint, as the guest's own clock sees it: by dirty pages, guest size and tracker
#[derive(Debug, Args)]
#[command(after_help = "\
Needs /dev/kvm and userfaultfd. Without --pages and --memory: every number of pages at 1 GiB, and 1,000 pages at every size. With them: each of one with
each of the other. What does not fit this machine's memory, or a guest of that size, is left out and said.")]
pub struct CheckpointArgs {
    /// What carries the checkpoints; verbs goes through the RDMA device, out and in again
    #[arg(long, value_enum, default_value = "local")]
    fabric: Fabric,
    #[command(flatten)]
    device: Device,
    /// Scattered dirty pages of an epoch [default: 10,100,1000,10000,100000]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    pages: Vec<u64>,
    /// Sizes of the guest [default: 256M,1G,2G,4G,8G]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = quantity::bytes)]
    memory: Vec<u64>,
    /// Who tracks the guest's writes
    #[arg(long, value_enum, value_name = "LIST", value_delimiter = ',', default_values_t = Tracker::ALL)]
    tracker: Vec<Tracker>,
    /// Rounds of a case; half as many from 10,000 pages on, a fifth from 100,000 on
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=10_000))]
    rounds: Option<u64>,
    #[command(flatten)]
    output: Output,
}

/// As `--tracker` of `belay send` has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Tracker {
    KvmRing,
    KvmLog,
    UffdWp,
    UffdSync,
}

impl Tracker {
    const ALL: [Self; 4] = [Self::KvmRing, Self::KvmLog, Self::UffdWp, Self::UffdSync];

    fn kind(self) -> TrackerKind {
        match self {
            Self::KvmRing => TrackerKind::KvmRing,
            Self::KvmLog => TrackerKind::KvmLog,
            Self::UffdWp => TrackerKind::UffdWp,
            Self::UffdSync => TrackerKind::UffdSync,
        }
    }

    /// Whether it knows without a harvest how much is dirty: only then may a source reserve less than the largest record.
    fn counts(self) -> bool {
        matches!(self, Self::KvmRing | Self::UffdSync)
    }
}

impl fmt::Display for Tracker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.to_possible_value().expect("none is hidden").get_name())
    }
}

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const RING_BYTES: usize = 64 << 20;
/// The case that all sizes share.
const THOUSAND: u64 = 1_000;

/// Sizes and dirty pages of the cases: rows of a table first, then its columns.
fn cases(args: &CheckpointArgs) -> Vec<(u64, u64)> {
    let (pages, memory, at): (&[u64], &[u64], u64) = match args.output.quick {
        true => (&[10, THOUSAND, 10_000], &[256 * MIB, GIB], 256 * MIB),
        false => (&[10, 100, THOUSAND, 10_000, 100_000], &[256 * MIB, GIB, 2 * GIB, 4 * GIB, 8 * GIB], GIB),
    };
    let mut cases = Vec::new();
    match (&args.pages[..], &args.memory[..]) {
        ([], []) => {
            cases.extend(pages.iter().map(|&pages| (at, pages)));
            cases.extend(memory.iter().map(|&memory| (memory, THOUSAND)));
        }
        (asked, []) => cases.extend(asked.iter().map(|&pages| (at, pages))),
        ([], asked) => cases.extend(asked.iter().map(|&memory| (memory, THOUSAND))),
        (pages, memory) => {
            cases.extend(memory.iter().flat_map(|&memory| pages.iter().map(move |&pages| (memory, pages))))
        }
    }
    cases.sort_unstable();
    cases.dedup();
    cases
}

/// How a case is to be measured here, or why it is not. `available` bytes of memory.
fn shape(tracker: Tracker, (memory_bytes, pages): (u64, u64), available: u64) -> Result<Shape, String> {
    let guest = memory_bytes / PAGE_SIZE as u64;
    // Beyond that pages are not scattered any more.
    if pages * 10 > guest / 2 * 8 {
        return Err(format!("its working set of {} pages has no {pages} scattered ones", guest / 2));
    }
    let fixed = 2 * memory_bytes + 3 * RING_BYTES as u64 + 2 * pages * PAGE_SIZE as u64 + 256 * MIB;
    let whole = largest_record(guest);
    // Half of it at most is used before an epoch is closed for its size.
    let least = largest_record((4 * pages).max(1 << 16).min(guest));
    let room = available.saturating_sub(fixed);
    let overflow_bytes = match tracker.counts() {
        _ if whole <= room => whole,
        true if least <= room => least,
        counts => {
            let needs = fixed + if counts { least } else { whole };
            return Err(format!("it needs {} MiB of memory, {} are available", needs / MIB, available / MIB));
        }
    };
    Ok(Shape { memory_bytes, pages, ring_bytes: RING_BYTES, overflow_bytes })
}

/// Rounds of a case of so many pages: what takes a second a round is measured seldom.
fn rounds(asked: u64, pages: u64) -> u64 {
    match pages {
        100_000.. => (asked / 5).max(3),
        10_000.. => (asked / 2).max(3),
        _ => asked,
    }
}

pub fn run(args: &CheckpointArgs) -> Result<ExitCode, BenchError> {
    let carrier = Carrier::within_this_host(args.fabric.into(), args.device.clone());
    let mut report = Report::new("checkpoint", &args.output);
    let asked = args.rounds.unwrap_or(if args.output.quick { 5 } else { 20 });
    let cases = cases(args);
    let bar = args.output.progress((cases.len() * args.tracker.len()) as u64);
    for &(memory, pages) in &cases {
        let mut untethered = None;
        for &tracker in &args.tracker {
            let title = format!("{tracker}, {} MiB, {pages} pages", memory / MIB);
            bar.set_message(title.clone());
            match shape(tracker, (memory, pages), available()?) {
                Err(why) => bar.suspend(|| report.note(format!("left out: {title}: {why}"))),
                Ok(shape) => {
                    let rounds = rounds(asked, pages);
                    let alone = match untethered {
                        Some(alone) => alone,
                        None => *untethered.insert(rounds::untethered(&carrier, &shape, rounds)?),
                    };
                    let case = rounds::measure(&carrier, tracker, &shape, rounds, alone)?;
                    bar.suspend(|| case.print());
                    report.cases.push(case);
                }
            }
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    summary::goals(&mut report);
    summary::plots(&mut report);
    args.output.finish(&report)
}

/// Memory that can be had at this moment.
pub fn available() -> Result<u64, BenchError> {
    let text = std::fs::read_to_string("/proc/meminfo").map_err(BenchError::io("read /proc/meminfo"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    // Some of it for everybody else.
    Ok(kib.unwrap_or_default() * 1024 / 20 * 19)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: CheckpointArgs,
    }

    fn cases_of(line: &str) -> Vec<(u64, u64)> {
        cases(&Line::parse_from(std::iter::once("checkpoint").chain(line.split_whitespace())).args)
    }

    #[test]
    fn without_lists_pages_are_swept_at_one_size_and_sizes_at_one_number_of_pages_and_with_both_each_with_each() {
        assert_eq!(cases_of("").len(), 9);
        assert!(cases_of("").contains(&(8 * GIB, 1_000)) && cases_of("").contains(&(GIB, 100_000)));
        assert_eq!(cases_of("--pages 10,20 --memory 1G,2G"), [(GIB, 10), (GIB, 20), (2 * GIB, 10), (2 * GIB, 20)]);
        assert_eq!(cases_of("--memory 512M"), [(512 * MIB, 1_000)]);
    }

    #[test]
    fn a_source_reserves_less_only_for_a_tracker_that_counts_and_only_where_all_does_not_fit() {
        let reserved = |tracker, available| {
            shape(tracker, (8 * GIB, 1_000), available).map(|shape| shape.overflow_bytes).map_err(|why| why.len() > 10)
        };
        assert_eq!(reserved(Tracker::KvmRing, 40 * GIB), Ok(largest_record(8 * GIB / 4096)));
        assert_eq!(reserved(Tracker::KvmRing, 20 * GIB), Ok(largest_record(1 << 16)));
        assert_eq!(reserved(Tracker::KvmLog, 20 * GIB), Err(true));
        assert!(shape(Tracker::KvmRing, (256 * MIB, 100_000), 40 * GIB).is_err());
    }
}
