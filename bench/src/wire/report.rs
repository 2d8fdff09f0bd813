//! What a wire measurement found, as a table and as JSON.

use super::client::Met;
use super::usage::Usage;
use crate::profile::Profile;
use crate::report::{Better, Case, Goal, Latency, Measure, Rate, Role};
use crate::table::{self, Bandwidth, Row};
use belay_transport::fabric::{FabricDetails, FabricKind};
use clap::ValueEnum;
use serde::Serialize;

/// What can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Test {
    /// One READ at a time on the fault lane: ib_read_lat's place
    ReadLat,
    /// A full window of READs on the bulk lane: ib_read_bw's
    ReadBw,
    /// A full window of WRITEs on the checkpoint lane: ib_write_bw's
    WriteBw,
    /// One commit at a time on the checkpoint lane
    CommitLat,
    /// Demand faults through userfaultfd and the engine, beside a bare READ and a bare userfaultfd
    Fault,
    /// The engine's background pull, beside bare READs of the same size and window
    Pull,
    /// What the server's process spends of its CPU on N and on 4N pages
    Cpu,
    /// Where the engine's threads are while they pull, by function: whether they copy (perf events, root)
    Profile,
}

/// The report: what `--out-json` writes.
#[derive(Debug, Serialize)]
pub struct Report {
    pub belay_bench: &'static str,
    /// As the client dialled it.
    pub server: String,
    pub tests: Vec<Outcome>,
}

/// One test's outcome. Names carry their units.
#[derive(Debug, Serialize)]
pub struct Outcome {
    pub test: Test,
    pub fabric: FabricKind,
    /// The control stream; and the lanes, unless they are RDMA's.
    pub encrypted: bool,
    /// Device, address and depth, where the fabric has some to tell.
    pub device: Option<FabricDetails>,
    pub latency: Vec<Row>,
    pub bandwidth: Vec<Bandwidth>,
    pub ratios: Vec<Ratio>,
    pub source: Vec<SourceUse>,
    /// Of `profile` only: one a round.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub profiles: Vec<Profile>,
}

impl Outcome {
    pub fn new(test: Test, met: &Met) -> Self {
        Self {
            test,
            fabric: met.fabric(),
            encrypted: met.encrypted(),
            device: met.initiator.details(),
            latency: Vec::new(),
            bandwidth: Vec::new(),
            ratios: Vec::new(),
            source: Vec::new(),
            profiles: Vec::new(),
        }
    }
}

impl Outcome {
    /// As a case of a suite whose floor a device cannot have: medians of all rounds, without their histograms.
    pub fn case(&self) -> (Case, Vec<Goal>) {
        let name = self.test.to_possible_value().expect("no variant is skipped").get_name().to_owned();
        let mut case = Case::new(name).with("fabric", self.fabric);
        let ours = |name: &str| if name.trim().starts_with("engine") { Role::Ours } else { Role::Peer };
        case.latencies = self.latency.iter().map(|row| Latency::of_row(row.clone(), ours(&row.name))).collect();
        case.rates = self
            .bandwidth
            .iter()
            .map(|row| Rate {
                name: row.name.clone(),
                role: ours(&row.name),
                bytes: row.bytes,
                iterations: row.iterations,
                rounds: vec![row.average_bytes_per_s],
                source_processors: None,
                destination_processors: None,
            })
            .collect();
        let measure = |ratio: &Ratio| Measure::new(ratio.what, "", ratio.better, vec![ratio.value]);
        case.measures = self.ratios.iter().map(measure).collect();
        let goals = self.ratios.iter().filter_map(|ratio| {
            let goal = ratio.goal?;
            Some(match ratio.better {
                Better::Lower => Goal::at_most(&case, ratio.what, "", ratio.value, goal),
                Better::Higher => Goal::at_least(&case, ratio.what, "", ratio.value, goal),
            })
        });
        let goals = goals.collect();
        (case, goals)
    }
}

/// A ratio (or another number without a unit of its own in a table), the median of the rounds'.
#[derive(Debug, Serialize)]
pub struct Ratio {
    pub name: &'static str,
    pub what: &'static str,
    pub value: f64,
    pub goal: Option<f64>,
    /// Whether the goal is kept, where there is one.
    pub kept: Option<bool>,
    #[serde(skip)]
    better: Better,
}

impl Ratio {
    pub fn plain(name: &'static str, what: &'static str, rounds: &[f64]) -> Self {
        Self { name, what, value: table::median(rounds), goal: None, kept: None, better: Better::Lower }
    }

    pub fn at_most(name: &'static str, what: &'static str, rounds: &[f64], goal: f64) -> Self {
        let plain = Self::plain(name, what, rounds);
        Self { goal: Some(goal), kept: Some(plain.value <= goal), ..plain }
    }

    pub fn at_least(name: &'static str, what: &'static str, rounds: &[f64], goal: f64) -> Self {
        let plain = Self::plain(name, what, rounds);
        Self { goal: Some(goal), kept: Some(plain.value >= goal), better: Better::Higher, ..plain }
    }
}

/// What the source's process used while so many operations (pages, where an engine pulled) went by.
#[derive(Debug, Serialize)]
pub struct SourceUse {
    /// Of one operation.
    pub bytes: usize,
    pub operations: u64,
    pub usage: Usage,
}

impl SourceUse {
    pub fn new(bytes: usize, operations: u64, usage: Usage) -> Self {
        Self { bytes, operations, usage }
    }
}

pub fn print(outcome: &Outcome, server: &str, gbits: bool) {
    let name = outcome.test.to_possible_value().expect("no variant is skipped");
    let tls = if outcome.encrypted { "TLS" } else { "no TLS" };
    let line = "-".repeat(150);
    println!("{line}\n {}: {}", name.get_name(), name.get_help().map(ToString::to_string).unwrap_or_default());
    println!(" {server} over {}, {tls}", outcome.fabric);
    if let Some(device) = &outcome.device {
        println!(" {device}");
    }
    println!("{line}");
    match outcome.test {
        Test::ReadLat | Test::CommitLat => table::print_latency(&outcome.latency),
        _ if !outcome.latency.is_empty() => table::print(&outcome.latency),
        _ => {}
    }
    if !outcome.bandwidth.is_empty() {
        table::print_bandwidth(&outcome.bandwidth, gbits);
    }
    if !outcome.ratios.is_empty() {
        println!();
    }
    for ratio in &outcome.ratios {
        let goal = ratio.goal.map(|goal| format!(" (goal {goal:.2})")).unwrap_or_default();
        println!(" {:<30} {:>9.3}   {}{goal}", ratio.name, ratio.value, ratio.what);
    }
    println!();
    for function in outcome.profiles.iter().flat_map(|profile| &profile.functions) {
        let copies = if function.copies { "copies" } else { "" };
        println!(" {:>6} {:>6}  {} [{}]", function.samples, copies, function.name, function.of);
    }
    for used in &outcome.source {
        let (process, bytes) = (used.usage.process, used.bytes);
        println!(
            " source: {} operations of {bytes} bytes, {:.0} us of its CPU, {:.0} without the thread that is asked; {} context \
             switches of its own will, {} forced",
            used.operations,
            process.cpu_ns as f64 / 1e3,
            used.usage.others.cpu_ns as f64 / 1e3,
            process.voluntary_switches,
            process.involuntary_switches
        );
    }
    println!();
}
