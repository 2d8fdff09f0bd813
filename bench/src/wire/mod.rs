//! `wire`: two hosts, in perftest's spirit: a server that owns memory, a client that reads and writes it and prints the tables.
//!
//! The envelope, drawn before the loops were written (SoftRoCE lab: two hosts in software; a real 100 Gb/s link beside it):
//!
//! | test | moves an operation | lab | 100 Gb/s |
//! |---|---|---|---|
//! | read-lat | 4 KiB + 1 request | 350 µs round trip, 2 readings of a clock: < 0.1 % | 2.5 to 4 µs; the clocks are 2 % |
//! | read-bw | 4 KiB to 1 MiB, a window of 128 | 50 MB/s: 0.8 ms a 4 KiB read in a full window is bandwidth | 11 GB/s: 370 ns a page, post + poll ~100 ns |
//! | write-bw | 64 KiB | 40 MB/s: 1.6 ms each | 11 GB/s: 6 µs each |
//! | commit-lat | 64 bytes | one round trip | 2 µs |
//! | fault | 4 KiB, one at a time | 350 + 50 µs (two sleeping threads on one core) | 3 + 7 µs: userfaultfd is the larger part |
//! | pull | all RAM, 256 KiB chunks, 8 in flight | bandwidth: CONTINUE is 0.3 of 80 µs a page | 370 ns of wire and 270 to 310 ns of CONTINUE a page: near each other |
//!
//! Memory: RAM once at the server, once or twice at the client. Nothing is allocated between an operation's two clock readings.

mod client;
mod engine;
mod lean;
mod loops;
mod protocol;
mod raw;
mod report;
mod server;
pub mod usage;

use crate::carrier::{Carrier, Device};
use crate::error::BenchError;
use crate::quantity;
use crate::report::{Output, Report as SuiteReport};
use crate::rig::BOUND;
use belay_transport::fabric::FabricKind;
use belay_transport::pull::Tuning;
use belay_transport::session::{Address, Credentials, Security, SessionConfig, SessionError};
use clap::{Args, ValueEnum};
use client::Client;
use loops::{Amount, Waiting};
use protocol::TRAILER_ROOM;
pub use report::{Report, Test};
use server::Server;
use std::net::ToSocketAddrs;
use std::path::PathBuf;
use std::time::Duration;

/// A ring for tests that write none.
const LEAST_RING: u64 = 2 * TRAILER_ROOM;
/// Least bytes that a bandwidth is taken from, when nobody said how many operations.
const BANDWIDTH_BYTES: u64 = 64 << 20;

/// Measure the wire between two hosts
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct WireArgs {
    /// Serve: own the memory that clients read and write, at HOST:PORT
    #[arg(long, value_name = "ADDR", conflicts_with = "to", required_unless_present = "to")]
    listen: Option<String>,
    /// Measure, against the server at HOST:PORT
    #[arg(long, value_name = "ADDR", requires = "tests")]
    to: Option<String>,
    /// What to measure, in this order
    #[arg(value_enum, value_name = "TEST", conflicts_with = "listen")]
    tests: Vec<Test>,

    /// What carries the bytes: the client decides, the server offers all it has [default: the best that both have]
    #[arg(long, value_enum)]
    fabric: Option<WireFabric>,
    #[command(flatten)]
    device: Device,
    /// You vouch that nobody on this network reads or forges packets: RDMA carries memory in clear. Without this no RDMA
    #[arg(long)]
    trusted_fabric: bool,

    /// Bytes of one operation, several with commas [default: read-lat 4K; read-bw 4K,64K,1M; write-bw 64K; commit-lat 64]
    #[arg(short = 's', long, value_name = "BYTES", value_delimiter = ',', value_parser = quantity::bytes)]
    size: Vec<u64>,
    /// Operations a measurement; touches a round for `fault` [default: 1000, or what moves 64 MiB]
    #[arg(short = 'n', long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=4_000_000))]
    iters: Option<u64>,
    /// Measure for so long instead
    #[arg(short = 'D', long, value_name = "TIME", value_parser = quantity::time, conflicts_with = "iters")]
    duration: Option<Duration>,
    /// Operations in flight
    #[arg(short = 't', long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u16).range(1..=1024))]
    tx_depth: u16,
    /// Sleep until a completion instead of polling for it
    #[arg(short = 'e', long)]
    events: bool,
    /// Bandwidth in Gb/s instead of MiB/s
    #[arg(long, alias = "report_gbits")]
    report_gbits: bool,
    /// No warning when the CPU's clock is not held at its highest
    #[arg(short = 'F', long)]
    no_freq_warning: bool,
    /// RAM at the server that is read
    #[arg(long, value_name = "BYTES", default_value = "64M", value_parser = quantity::bytes)]
    memory: u64,
    /// Ring at the server that is written
    #[arg(long, value_name = "BYTES", default_value = "16M", value_parser = quantity::bytes)]
    ring: u64,
    /// Rounds of fault, pull and cpu; each measures all sides by turns
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,
    /// Bytes of one of the engine's background reads
    #[arg(long, value_name = "BYTES", value_parser = quantity::bytes)]
    chunk: Option<u64>,
    /// Background reads the engine keeps in flight
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    chunks: Option<u16>,
    /// Longest time the engine looks for a completion before it sleeps
    #[arg(long, value_name = "TIME", value_parser = quantity::time)]
    spin: Option<Duration>,
    /// Also write the report as JSON; - for stdout
    #[arg(long, alias = "out_json", value_name = "FILE")]
    pub out_json: Option<PathBuf>,

    /// Serve so many clients, one after the other, then end; 0 for any number
    #[arg(long, value_name = "N", default_value_t = 1)]
    clients: u32,
    /// Give up when nobody has called for so long
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = quantity::time)]
    idle: Duration,

    /// Our own certificate (belay keygen makes it)
    #[arg(long, value_name = "FILE", requires_all = ["key", "peer_cert"])]
    cert: Option<PathBuf>,
    /// The key of our certificate
    #[arg(long, value_name = "FILE", requires_all = ["cert", "peer_cert"])]
    key: Option<PathBuf>,
    /// The one certificate the peer must show
    #[arg(long, value_name = "FILE", requires_all = ["cert", "key"])]
    peer_cert: Option<PathBuf>,
    /// Go without TLS beyond loopback (and so without RDMA there)
    #[arg(long)]
    insecure: bool,
}

const EXAMPLES: &str = "\
Examples:
  belay-bench wire --listen 127.0.0.1:7710 --clients 0
  belay-bench wire --to 127.0.0.1:7710 read-lat read-bw write-bw commit-lat fault pull
  belay-bench wire --to host-a:7710 --fabric verbs --trusted-fabric -d mlx5_0 -x 3 -s 4096 -n 10000 read-lat \\
      --cert client.crt --key client.key --peer-cert server.crt --out-json read-lat.json

The server dials the client back, at a port of its choice: a firewall between them must let that through.";

/// What a wire can be made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum WireFabric {
    Tcp,
    Verbs,
}

/// What the tests are told.
pub struct Options {
    sizes: Vec<usize>,
    iterations: Option<u64>,
    time: Option<Duration>,
    window: usize,
    waiting: Waiting,
    memory: usize,
    ring: usize,
    rounds: usize,
    tuning: Tuning,
}

impl Options {
    /// The sizes that were asked for, or a test's own.
    fn sizes(&self, own: &[usize]) -> Vec<usize> {
        if self.sizes.is_empty() { own.to_vec() } else { self.sizes.clone() }
    }

    fn amount(&self, own: u64) -> Amount {
        match (self.time, self.iterations) {
            (Some(time), _) => Amount::Time(time),
            (None, iterations) => Amount::Iterations(iterations.unwrap_or(own)),
        }
    }

    /// For a bandwidth of operations of `bytes`.
    fn amount_for(&self, bytes: usize) -> Amount {
        self.amount((BANDWIDTH_BYTES / bytes as u64).clamp(128, 16_384))
    }
}

impl WireArgs {
    /// What goes for both sides' sessions.
    fn session(&self, address: &Address) -> Result<SessionConfig, BenchError> {
        let security = match (&self.cert, &self.key, &self.peer_cert) {
            (Some(cert), Some(key), Some(peer)) => Security::Tls(Credentials::load(cert, key, peer)?),
            _ if self.insecure => Security::Insecure,
            _ => Security::LoopbackOnly,
        };
        let only = self.fabric.map(|fabric| match fabric {
            WireFabric::Tcp => FabricKind::Tcp,
            WireFabric::Verbs => FabricKind::Verbs,
        });
        Carrier { only, device: self.device.clone(), trusted: self.trusted_fabric }.session(security, address)
    }

    fn options(&self) -> Result<Options, BenchError> {
        let usize = |bytes: u64| usize::try_from(bytes).expect("64-bit");
        let whole = |what: &'static str, bytes: u64| match bytes.is_multiple_of(4096) {
            true => Ok(usize(bytes)),
            false => Err(BenchError::Options { what, why: format!("{bytes} bytes are not whole pages of 4096") }),
        };
        let mut tuning = Tuning::default();
        if let Some(chunk) = self.chunk {
            tuning.chunk_bytes = whole("--chunk", chunk)? as u64;
            tuning.busy_chunk_bytes = tuning.busy_chunk_bytes.min(tuning.chunk_bytes);
        }
        tuning.bulk_chunks = self.chunks.map_or(tuning.bulk_chunks, usize::from);
        tuning.spin = self.spin.unwrap_or(tuning.spin);
        Ok(Options {
            sizes: self.size.iter().copied().map(usize).collect(),
            iterations: self.iters,
            time: self.duration,
            window: self.tx_depth.into(),
            waiting: if self.events { Waiting::Events } else { Waiting::Polling },
            memory: whole("--memory", self.memory)?,
            ring: whole("--ring", self.ring)?,
            rounds: self.rounds.into(),
            tuning,
        })
    }
}

/// Serves, or measures: the report then.
pub fn run(args: &WireArgs) -> Result<Option<Report>, BenchError> {
    let config = |address: &String| args.session(&Address::Tcp(address.clone()));
    match (&args.listen, &args.to) {
        (Some(address), _) => serve(args, address, config(address)?).map(|()| None),
        (None, Some(address)) => {
            let options = args.options()?;
            if !args.no_freq_warning {
                warn_of_frequency();
            }
            let quiet = args.out_json.as_deref().is_some_and(|path| path.as_os_str() == "-");
            let show = (!quiet).then_some(args.report_gbits);
            measure(&args.tests, address, config(address)?, &options, show).map(Some)
        }
        (None, None) => unreachable!("the command line asks for one of them"),
    }
}

fn serve(args: &WireArgs, address: &str, config: SessionConfig) -> Result<(), BenchError> {
    let mut resolved = address.to_socket_addrs().map_err(BenchError::io("looking up the address to listen on"))?;
    if matches!(config.security, Security::LoopbackOnly) && !resolved.all(|address| address.ip().is_loopback()) {
        return Err(SessionError::NotLoopback { address: address.to_owned() }.into());
    }
    let mut server = Server::bind(address, config)?;
    println!("listening on {}", server.address()?);
    server.run((args.clients > 0).then_some(args.clients), args.idle)
}

/// `show`: print tables, in Gb/s or not.
fn measure(
    tests: &[Test],
    address: &str,
    config: SessionConfig,
    options: &Options,
    show: Option<bool>,
) -> Result<Report, BenchError> {
    let mut client = Client::connect(address, config)?;
    let mut report =
        Report { belay_bench: env!("CARGO_PKG_VERSION"), server: client.server.to_string(), tests: Vec::new() };
    for test in tests {
        let outcome = match test {
            Test::ReadLat => raw::read_lat(&mut client, options),
            Test::ReadBw => raw::read_bw(&mut client, options),
            Test::WriteBw => raw::write_bw(&mut client, options),
            Test::CommitLat => raw::commit_lat(&mut client, options),
            Test::Fault => engine::fault(&mut client, options),
            Test::Pull => engine::pull(&mut client, options),
            Test::Cpu => engine::cpu(&mut client, options),
            Test::Profile => engine::profile(&mut client, options),
        }?;
        if let Some(gbits) = show {
            report::print(&outcome, &report.server, gbits);
        }
        report.tests.push(outcome);
    }
    client.bye()?;
    Ok(report)
}

/// Both sides in this process: what a device costs without a network behind it. Adds it to a suite's report.
pub fn through_device(
    test: Test,
    device: &Device,
    output: &Output,
    report: &mut SuiteReport,
) -> Result<(), BenchError> {
    let carrier = Carrier::within_this_host(FabricKind::Verbs, device.clone());
    for outcome in within_this_host(test, &carrier, output.quick)?.tests {
        let (case, goals) = outcome.case();
        report.cases.push(case);
        report.goals.extend(goals);
    }
    Ok(())
}

fn within_this_host(test: Test, carrier: &Carrier, quick: bool) -> Result<Report, BenchError> {
    let loopback = Address::Tcp("127.0.0.1:0".into());
    let config = || carrier.session(Security::LoopbackOnly, &loopback);
    let mut server = Server::bind("127.0.0.1:0", config()?)?;
    let (address, config) = (server.address()?.to_string(), config()?);
    let options = Options {
        sizes: Vec::new(),
        iterations: None,
        time: None,
        window: 128,
        waiting: Waiting::Polling,
        memory: if quick { 32 << 20 } else { 128 << 20 },
        ring: 16 << 20,
        rounds: if quick { 5 } else { 15 },
        tuning: Tuning::default(),
    };
    std::thread::scope(|scope| {
        let serving = scope.spawn(|| server.run(Some(1), BOUND));
        let report = measure(&[test], &address, config, &options, Some(false));
        serving.join().map_err(|_| BenchError::Thread("the server"))??;
        report
    })
}

/// As perftest warns: a clock that goes up and down makes latencies that mean little.
fn warn_of_frequency() {
    let governor = std::fs::read_to_string("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor");
    if let Some(governor) = governor.ok().filter(|governor| governor.trim() != "performance") {
        eprintln!("the CPU's frequency governor is {}: latencies will vary (-F says no more)", governor.trim());
    }
}
