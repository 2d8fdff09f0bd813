//! `envelope`: what real cards allow, by arithmetic alone: which limit binds first for demand faults, background pull and
//! checkpoints. README.md explains the formulae; each is one function here, and the README's tables are this program's output.
//!
//! Sources. Packet overheads: InfiniBand Architecture Specification 1.x, volume 1, chapter 9 and annex A17 (RoCE v2); IEEE 802.3.
//! PCIe: Neugebauer et al., "Understanding PCIe Performance for End Host Networking", SIGCOMM 2018 (TLP sizes, the share that
//! flow control and acknowledgements take). What a card does for an operation: Kalia et al., "Design Guidelines for High
//! Performance RDMA Systems", USENIX ATC 2016. Costs of the host's own software are measured: the README says by what command.

use crate::quantity;
use clap::{Args, ValueEnum};
use serde::Serialize;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// Compute on paper what a link, a slot and a host allow
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Examples:
  belay-bench envelope --gbits 100 --pcie gen3x16
  belay-bench envelope --gbits 400 --pcie gen5x16 --shards 4 --page-size 2M
  belay-bench envelope --gbits 200 --link ib --rtt 3us --vcpus 64     with ib_read_lat's figure of your own")]
pub struct Envelope {
    /// Data rate of the link in Gb/s
    #[arg(long, default_value_t = 100.0, value_parser = positive)]
    gbits: f64,
    /// What the link is made of
    #[arg(long, value_enum, default_value = "roce")]
    link: Link,
    /// Path MTU of the queue pair in bytes
    #[arg(long, default_value = "4096", value_parser = mtu)]
    mtu: u32,
    /// The slot: generation and lanes
    #[arg(long, default_value = "gen4x16")]
    pcie: Slot,
    /// PCIe maximum payload size in bytes (lspci -vv: DevCtl MaxPayload)
    #[arg(long, default_value = "256", value_parser = payload)]
    mps: u32,
    /// PCIe maximum read request size in bytes (DevCtl MaxReadReq)
    #[arg(long, default_value = "512", value_parser = payload)]
    mrrs: u32,
    /// Round trip of a READ of 4 KiB: t_typical of ib_read_lat -s 4096
    #[arg(long, value_name = "TIME", default_value = "3us", value_parser = quantity::time)]
    rtt: Duration,
    /// READs a queue pair may have outstanding (max_qp_rd_atom)
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=255))]
    read_depth: u32,
    /// Packets (messages shorter than the MTU) the card does a second, in millions
    #[arg(long, value_name = "N", default_value_t = 200.0, value_parser = positive)]
    mops: f64,
    /// Engine threads, each with a userfaultfd and queue pairs of its own
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    shards: u32,
    /// Virtual CPUs that fault at once
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    vcpus: u32,
    /// Page size of guest RAM
    #[arg(long, value_enum, default_value = "4k")]
    page_size: Frame,
    /// Bytes of a background READ
    #[arg(long, value_name = "BYTES", default_value = "256K", value_parser = quantity::bytes)]
    chunk: u64,
    /// Background READs in flight a shard
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=64))]
    chunks: u32,
    /// Fault to wake-up without any wire, in ns (`belay-bench fault`: floor, touching thread)
    #[arg(long, default_value_t = 7_600.0, value_parser = positive)]
    fault_ns: f64,
    /// A shard's own work for a fault, in ns (`belay-bench fault`: floor, serving thread)
    #[arg(long, default_value_t = 6_900.0, value_parser = positive)]
    serve_ns: f64,
    /// UFFDIO_CONTINUE of a page inside a chunk, in ns (`belay-bench pull`: page[ns] of the floor less that of plain memcpy)
    #[arg(long, default_value_t = 290.0, value_parser = positive)]
    continue_ns: f64,
    /// Copying a dirty page aside, in ns (memcpy of 4 KiB)
    #[arg(long, default_value_t = 200.0, value_parser = positive)]
    copy_ns: f64,
    /// Pinning and translating a page of --page-size, in ns
    #[arg(long, default_value_t = 370.0, value_parser = positive)]
    pin_ns: f64,
    /// Also write the numbers as JSON
    #[arg(long, value_name = "FILE")]
    pub out_json: Option<PathBuf>,
}

fn positive(text: &str) -> Result<f64, String> {
    let number: f64 = text.parse().map_err(|_| format!("{text:?} is not a number"))?;
    if number > 0.0 && number < 1e12 { Ok(number) } else { Err(format!("{text} is not a positive number")) }
}

fn one_of(text: &str, allowed: &[u32]) -> Result<u32, String> {
    let number = text.parse().ok().filter(|number| allowed.contains(number));
    number.ok_or_else(|| format!("{text} is not one of {allowed:?}"))
}

fn mtu(text: &str) -> Result<u32, String> {
    one_of(text, &[256, 512, 1024, 2048, 4096])
}

fn payload(text: &str) -> Result<u32, String> {
    one_of(text, &[128, 256, 512, 1024, 2048, 4096])
}

/// Bytes of a small page, the unit of every rate here.
const PAGE: f64 = 4096.0;
/// What a checkpoint's record adds to a page: index, section headers, checksums.
const RECORD_BYTES: f64 = 48.0;
/// Checkpoint WRITEs are as long as the ring's segments.
const SEGMENT: f64 = 65_536.0;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Link {
    /// RoCE v2 over Ethernet and IPv4
    Roce,
    /// InfiniBand within a subnet
    Ib,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Frame {
    /// 4 KiB
    #[value(name = "4k")]
    Small,
    /// 2 MiB
    #[value(name = "2M")]
    Huge,
}

impl Frame {
    fn pages(self) -> f64 {
        match self {
            Self::Small => 1.0,
            Self::Huge => 512.0,
        }
    }
}

impl Link {
    /// Bytes on the link beside the payload of a data packet: Ethernet's preamble 8, header 14, FCS 4 and gap 12, IPv4 20, UDP 8,
    /// BTH 12, ICRC 4; or LRH 8, BTH 12, ICRC 4, VCRC 2.
    fn packet_bytes(self) -> f64 {
        match self {
            Self::Roce => 82.0,
            Self::Ib => 26.0,
        }
    }
}

/// RDMA extended transport header, in a READ request and the first packet of a WRITE; acknowledgement header, in a READ's first
/// and last response.
const RETH: f64 = 16.0;
const AETH: f64 = 4.0;

/// A PCIe slot: `gen4x16`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    generation: u32,
    lanes: u32,
}

impl std::str::FromStr for Slot {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not a slot; write gen3x16, gen4x16, gen5x8 …");
        let (generation, lanes) = text.strip_prefix("gen").and_then(|rest| rest.split_once('x')).ok_or_else(wrong)?;
        let slot =
            Self { generation: generation.parse().map_err(|_| wrong())?, lanes: lanes.parse().map_err(|_| wrong())? };
        let known = (3..=5).contains(&slot.generation) && [1, 2, 4, 8, 16].contains(&slot.lanes);
        if known { Ok(slot) } else { Err(wrong()) }
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "gen{}x{}", self.generation, self.lanes)
    }
}

/// Of a link's bytes, what flow control and acknowledgements of the data link layer leave (57.88 of 62.96 Gb/s at 8 lanes of
/// generation 3, by Neugebauer et al.).
const TRANSACTION_SHARE: f64 = 57.88 / 62.96;
/// Framing, sequence number, header and LCRC: of a write or a read request with a 64-bit address, and of a completion.
const WRITE_TLP: f64 = 24.0;
const COMPLETION_TLP: f64 = 20.0;
/// A completion queue entry, and a work queue entry with its doorbell.
const CQE: f64 = 64.0;
const WQE: f64 = 64.0;

impl Slot {
    /// Bytes a second for transactions, each way: 8, 16, 32 GT/s a lane, 128b/130b.
    fn bytes_per_s(self) -> f64 {
        let per_lane = 1e9 * f64::from(1_u32 << (self.generation - 3));
        per_lane * f64::from(self.lanes) * 128.0 / 130.0 * TRANSACTION_SHARE
    }
}

/// One limit of one kind of work.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Limit {
    pub what: &'static str,
    pub pages_per_s: f64,
    pub bytes_per_s: f64,
    pub binds_first: bool,
}

/// The limits of one kind of work, lowest marked.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Work {
    pub what: &'static str,
    pub limits: Vec<Limit>,
}

/// Everything that was computed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    pub fault_us: f64,
    pub work: Vec<Work>,
    pub register_ms_per_gib: f64,
    pub depth_needed: f64,
    pub pages_per_epoch_10ms: f64,
}

impl Envelope {
    fn line_bytes_per_s(&self) -> f64 {
        self.gbits * 1e9 / 8.0
    }

    fn packets(&self, bytes: f64) -> f64 {
        (bytes / f64::from(self.mtu)).ceil()
    }

    /// Bytes on the link, in the direction of the data, for a READ of `bytes`.
    fn read_wire_bytes(&self, bytes: f64) -> f64 {
        let packets = self.packets(bytes);
        bytes + packets * self.link.packet_bytes() + AETH * packets.min(2.0)
    }

    /// The same for a WRITE.
    fn write_wire_bytes(&self, bytes: f64) -> f64 {
        bytes + self.packets(bytes) * self.link.packet_bytes() + RETH
    }

    /// PCIe bytes for a card that writes `bytes` to memory, with one completion queue entry.
    fn to_memory_bytes(&self, bytes: f64) -> f64 {
        bytes + (bytes / f64::from(self.mps)).ceil() * WRITE_TLP + CQE + WRITE_TLP
    }

    /// PCIe bytes towards a card that reads `bytes` of memory, with the fetch of one work queue entry; and away from it.
    fn bytes_of_reading(&self, bytes: f64) -> (f64, f64) {
        let towards = bytes + (bytes / f64::from(self.mps)).ceil() * COMPLETION_TLP + WQE + COMPLETION_TLP;
        let away = (bytes / f64::from(self.mrrs)).ceil() * WRITE_TLP + WRITE_TLP;
        (towards, away)
    }

    /// Round trip of a READ of `bytes` alone.
    fn read_s(&self, bytes: f64) -> f64 {
        let beyond = self.read_wire_bytes(bytes) - self.read_wire_bytes(PAGE);
        self.rtt.as_secs_f64() + beyond / self.line_bytes_per_s()
    }

    /// Pages a second if pieces of `bytes` cost `piece` of something of which there is `supply` a second.
    fn pages(bytes: f64, piece: f64, supply: f64) -> f64 {
        supply / piece * bytes / PAGE
    }

    /// What a fault waits for: 4 KiB, or all of a huge page.
    fn fault_bytes(&self) -> f64 {
        self.page_size.pages() * PAGE
    }

    pub fn fault_s(&self) -> f64 {
        self.read_s(self.fault_bytes()) + self.fault_ns * 1e-9
    }

    /// READs of `bytes`: link, both slots, depth of `queue_pairs` with `outstanding` each, card.
    fn reads(&self, bytes: f64, outstanding: u32) -> Vec<(&'static str, f64)> {
        let line = self.line_bytes_per_s();
        let slot = self.pcie.bytes_per_s();
        let (towards, away) = self.bytes_of_reading(bytes);
        let depth = f64::from(outstanding.min(self.read_depth) * self.shards);
        vec![
            ("link", Self::pages(bytes, self.read_wire_bytes(bytes), line)),
            ("PCIe, destination writes memory", Self::pages(bytes, self.to_memory_bytes(bytes), slot)),
            ("PCIe, source reads memory", Self::pages(bytes, towards.max(away), slot)),
            ("READ depth x size / round trip", Self::pages(bytes, self.read_s(bytes), depth)),
            ("card's packets", Self::pages(bytes, self.packets(bytes), self.mops * 1e6)),
        ]
    }

    fn demand(&self) -> Work {
        let bytes = self.fault_bytes();
        let mut limits = vec![
            ("vCPUs that wait, each for one fault", Self::pages(bytes, self.fault_s(), f64::from(self.vcpus))),
            (
                "shards' threads: event, CONTINUE, wake",
                Self::pages(bytes, self.serve_ns * 1e-9, f64::from(self.shards)),
            ),
        ];
        limits.extend(self.reads(bytes, 32));
        work("demand faults", limits)
    }

    fn pull(&self) -> Work {
        let frame = self.page_size.pages() * PAGE;
        let show_s = self.continue_ns * 1e-9;
        let mut limits = vec![("shards' threads: CONTINUE", Self::pages(frame, show_s, f64::from(self.shards)))];
        limits.extend(self.reads(self.chunk as f64, self.chunks));
        work("background pull", limits)
    }

    fn checkpoint(&self) -> Work {
        let (line, slot) = (self.line_bytes_per_s(), self.pcie.bytes_per_s());
        let share = PAGE / (PAGE + RECORD_BYTES);
        let (towards, away) = self.bytes_of_reading(SEGMENT);
        let pages = |piece: f64, supply: f64| Self::pages(SEGMENT, piece, supply) * share;
        work(
            "checkpoints",
            vec![
                ("link", pages(self.write_wire_bytes(SEGMENT), line)),
                ("PCIe, destination reads memory", pages(towards.max(away), slot)),
                ("PCIe, source writes memory", pages(self.to_memory_bytes(SEGMENT), slot)),
                ("copying pages aside, guest stopped", 1e9 / self.copy_ns),
                ("folding at the source, one thread", 1e9 / self.copy_ns),
            ],
        )
    }

    /// Milliseconds to register a GiB with one thread.
    fn register_ms_per_gib(&self) -> f64 {
        f64::from(1 << 30) / (self.page_size.pages() * PAGE) * self.pin_ns / 1e6
    }

    /// READs of a small page that fill the link: the bandwidth-delay product in pages.
    fn depth_needed(&self) -> f64 {
        self.line_bytes_per_s() * self.rtt.as_secs_f64() / self.read_wire_bytes(PAGE)
    }

    pub fn report(&self) -> Report {
        let checkpoint = self.checkpoint();
        let link = checkpoint.limits[0].pages_per_s;
        Report {
            fault_us: self.fault_s() * 1e6,
            work: vec![self.demand(), self.pull(), checkpoint],
            register_ms_per_gib: self.register_ms_per_gib(),
            depth_needed: self.depth_needed(),
            pages_per_epoch_10ms: link * 0.01,
        }
    }

    /// The report as the README shows it.
    pub fn text(&self) -> String {
        let report = self.report();
        let link = if self.link == Link::Roce { "RoCE v2" } else { "InfiniBand" };
        let page = if self.page_size == Frame::Small { "4 KiB" } else { "2 MiB" };
        let mut lines = vec![
            format!(
                "{} Gb/s {link}, MTU {}, {} (payload {}, read request {}), READ of 4 KiB {:?}, depth {}",
                self.gbits, self.mtu, self.pcie, self.mps, self.mrrs, self.rtt, self.read_depth
            ),
            format!(
                "pages of {page}, {} shard(s), {} vCPU(s), chunks of {} KiB",
                self.shards,
                self.vcpus,
                self.chunk >> 10
            ),
            String::new(),
            format!("{:<42} {:>14} {:>8} {:>8}", "limit", "4 KiB pages/s", "GB/s", "Gb/s"),
        ];
        for work in &report.work {
            lines.push(format!("{}:", work.what));
            for limit in &work.limits {
                let first = if limit.binds_first { "  <- binds first" } else { "" };
                lines.push(format!(
                    "  {:<40} {:>14.0} {:>8.2} {:>8.1}{first}",
                    limit.what,
                    limit.pages_per_s,
                    limit.bytes_per_s / 1e9,
                    limit.bytes_per_s * 8e-9
                ));
            }
        }
        lines.push(String::new());
        lines.push(format!("one fault, seen by the vCPU: {:.1} us", report.fault_us));
        lines.push(format!("READs of 4 KiB in flight that fill the link: {:.1}", report.depth_needed));
        lines.push(format!("registering a GiB, one thread: {:.1} ms", report.register_ms_per_gib));
        lines.push(format!("dirty pages an epoch of 10 ms that the link takes: {:.0}", report.pages_per_epoch_10ms));
        lines.join("\n")
    }
}

fn work(what: &'static str, limits: Vec<(&'static str, f64)>) -> Work {
    let least = limits.iter().map(|(_, pages)| *pages).fold(f64::INFINITY, f64::min);
    let limit = |(what, pages_per_s): (&'static str, f64)| Limit {
        what,
        pages_per_s,
        bytes_per_s: pages_per_s * PAGE,
        binds_first: pages_per_s <= least,
    };
    Work { what, limits: limits.into_iter().map(limit).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        envelope: Envelope,
    }

    fn of(line: &str) -> Envelope {
        Line::parse_from(std::iter::once("envelope").chain(line.split_whitespace())).envelope
    }

    fn close(a: f64, b: f64) -> bool {
        (a / b - 1.0).abs() < 1e-3
    }

    #[test]
    fn the_formulae_give_what_one_gets_by_hand() {
        let at_100 = of("--gbits 100 --pcie gen3x16 --rtt 2us");
        // 4096 + 82 + 4 = 4182 bytes at 12.5e9 a second.
        assert!(close(at_100.reads(4096.0, 32)[0].1, 12.5e9 / 4182.0));
        // 16 lanes of 8 GT/s, 128b/130b: 15.754 GB/s, of which 14.483 for transactions; 16 packets of 256 + 24, and an entry.
        assert!(close(at_100.pcie.bytes_per_s(), 14.483e9));
        assert!(close(at_100.reads(4096.0, 32)[1].1, 14.483e9 / 4568.0));
        // 16 READs of a page every 2 µs.
        assert!(close(at_100.reads(4096.0, 32)[3].1, 8e6));
        // The 25 KB that 100 Gb/s moves in 2 µs are six pages.
        assert!(close(at_100.depth_needed(), 25_000.0 / 4182.0));
        assert!(close(of("--gbits 400 --rtt 2us").depth_needed(), 100_000.0 / 4182.0));
        // Within a subnet of InfiniBand: 26 + 4 bytes.
        assert!(close(of("--link ib").reads(4096.0, 32)[0].1, 12.5e9 / 4126.0));
        // Four packets at an MTU of 1024, the first and last with an AETH.
        assert!((of("--mtu 1024").read_wire_bytes(4096.0) - (4096.0 + 4.0 * 82.0 + 8.0)).abs() < 1e-9);
        assert!(close(at_100.fault_s(), 9.6e-6));
        assert!(close(of("--pin-ns 100").register_ms_per_gib(), 26.2144));
    }

    #[test]
    fn exactly_the_lowest_limit_of_each_kind_of_work_binds_first() {
        for line in
            ["", "--gbits 400 --pcie gen5x16 --shards 8", "--page-size 2M", "--gbits 400 --pcie gen3x8 --vcpus 512"]
        {
            for work in of(line).report().work {
                let first: Vec<_> = work.limits.iter().filter(|limit| limit.binds_first).collect();
                let least = work.limits.iter().map(|limit| limit.pages_per_s).fold(f64::INFINITY, f64::min);
                assert!(!first.is_empty() && first.iter().all(|limit| limit.pages_per_s == least), "{line}: {work:?}");
            }
        }
    }

    #[test]
    fn what_is_said_to_move_a_limit_moves_it() {
        let first = |line: &str, work: usize| {
            let report = of(line).report();
            let limit = report.work[work].limits.iter().find(|limit| limit.binds_first).expect("one binds");
            (limit.what, limit.pages_per_s)
        };
        let shards = |n: u32| format!("--gbits 400 --pcie gen5x16 --shards {n}");
        assert_eq!(first(&shards(1), 1).0, "shards' threads: CONTINUE");
        assert!(first(&shards(2), 1).1 > 1.9 * first(&shards(1), 1).1);
        assert_ne!(first("--gbits 400 --pcie gen5x16 --page-size 2M", 1).0, "shards' threads: CONTINUE");
        assert!(first("--gbits 400 --pcie gen3x16 --page-size 2M", 1).0.starts_with("PCIe"));
        assert!(first("--vcpus 64 --shards 4", 0).1 > 2.0 * first("--vcpus 64", 0).1);
    }

    #[test]
    fn the_readme_shows_what_this_program_prints() {
        let readme = include_str!("../README.md");
        let shown = readme.match_indices("$ belay-bench envelope").count();
        assert!(shown >= 2, "the README shows this program");
        for block in readme.split("$ belay-bench envelope").skip(1) {
            let (line, output) = block.split_once('\n').expect("a command line ends");
            let printed = of(line).text();
            assert!(output.starts_with(&printed), "envelope{line} prints now:\n{printed}");
        }
    }

    #[test]
    fn slots_and_sizes_that_do_not_exist_are_refused() {
        for wrong in ["gen2x16", "gen4x3", "x16", "gen4"] {
            assert!(wrong.parse::<Slot>().is_err(), "{wrong}");
        }
        assert!(mtu("9000").is_err() && payload("100").is_err() && positive("-1").is_err());
    }
}
