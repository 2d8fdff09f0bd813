//! `fault`: what a demand fault costs, beside the leanest loop that serves one, and what the background adds to it.

use crate::carrier::Carrier;
use crate::error::BenchError;
use crate::floor;
use crate::rig::{Rig, Source, soon};
use crate::table::{self, Row};
use belay_transport::fabric::FabricKind;
use belay_transport::pull::Engine;
use belay_transport::region::Mapping;
use hdrhistogram::Histogram;
use serde::Serialize;
use std::time::{Duration, Instant};

/// A touch that took less met a page that was there already.
const NO_FAULT_NS: u64 = 1_500;

#[derive(Debug, Serialize)]
pub struct Report {
    pub fabric: Option<FabricKind>,
    pub rows: Vec<Row>,
    /// Median over rounds of engine time (event read → page shown) over the floor's.
    pub engine_over_floor: f64,
    /// The same as the touching thread sees it.
    pub toucher_over_floor: f64,
    /// p99 under background pull over the median without.
    pub p99_loaded_over_unloaded_p50: f64,
    /// The same as the touching thread sees it.
    pub toucher_p99_loaded_over_unloaded_p50: f64,
}

pub fn run(wire: floor::Wire, quick: bool) -> Result<Report, BenchError> {
    let (rounds, touches, len) = if quick { (5, 1_000, 32 << 20) } else { (15, 4_000, 128 << 20) };
    let carrier = Carrier::beside(wire);
    let order = scattered(len / floor::PAGE, touches);
    let source = Source::new(len)?;
    let floor_source = floor::Source::new(len).map_err(BenchError::io("the floor's source"))?;
    let (mut floors, mut ours, mut loaded) = (floor::Faults::default(), Side::new(), Side::new());
    let (mut engine_ratios, mut toucher_ratios) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let floor = floor::faults(wire, &floor_source, &order, Duration::ZERO)
            .map_err(BenchError::io("the floor's fault loop"))?;
        let unloaded = engine_round(&carrier, &source, &order, true)?;
        engine_ratios.push(unloaded.server.value_at_quantile(0.5) as f64 / mid(&floor.server));
        toucher_ratios.push(mid(&unloaded.toucher) / mid(&floor.toucher));
        loaded.add(engine_round(&carrier, &source, &order, false)?);
        ours.add(unloaded);
        floors.toucher.extend(floor.toucher);
        floors.server.extend(floor.server);
    }
    let page = floor::PAGE;
    let mut rows = vec![
        Row::of_samples("floor, serving thread", page, &floors.server),
        Row::of_histogram("engine, serving thread", page, &ours.server),
        Row::of_histogram("  queue (event read to posted)", page, &ours.queue),
        Row::of_histogram("  wire (posted to completed)", page, &ours.wire),
        Row::of_histogram("  install (completed to shown)", page, &ours.install),
        Row::of_samples("floor, touching thread", page, &floors.toucher),
        Row::of_samples("engine, touching thread", page, &ours.toucher),
        Row::of_histogram("engine under pull, serving thread", page, &loaded.server),
        Row::of_samples("engine under pull, touching thread", page, &loaded.toucher),
    ];
    let p99 = |row: &Row, base: &Row| row.p99_us / base.t_typical_us;
    let report = Report {
        fabric: carrier.only,
        engine_over_floor: table::median(&engine_ratios),
        toucher_over_floor: table::median(&toucher_ratios),
        p99_loaded_over_unloaded_p50: p99(&rows[7], &rows[1]),
        toucher_p99_loaded_over_unloaded_p50: p99(&rows[8], &rows[6]),
        rows: std::mem::take(&mut rows),
    };
    table::print(&report.rows);
    println!(
        "\n engine time over floor        {:.2} (goal 1.50)    as the touching thread sees it {:.2}",
        report.engine_over_floor, report.toucher_over_floor
    );
    println!(
        " p99 under pull, unloaded p50  {:.2} (goal 5.00)    as the touching thread sees it {:.2}",
        report.p99_loaded_over_unloaded_p50, report.toucher_p99_loaded_over_unloaded_p50
    );
    Ok(report)
}

/// What one side of the comparison gathered.
pub struct Side {
    pub toucher: Vec<u64>,
    pub server: Histogram<u64>,
    pub queue: Histogram<u64>,
    pub wire: Histogram<u64>,
    pub install: Histogram<u64>,
}

impl Side {
    pub fn new() -> Self {
        let [server, queue, wire, install] =
            std::array::from_fn(|_| Histogram::new_with_bounds(1, 1 << 40, 3).expect("valid bounds"));
        Self { toucher: Vec::new(), server, queue, wire, install }
    }

    pub fn add(&mut self, other: Self) {
        self.toucher.extend(other.toucher);
        // Same bounds on both sides: adding cannot fail.
        self.server += other.server;
        self.queue += other.queue;
        self.wire += other.wire;
        self.install += other.install;
    }
}

fn engine_round(carrier: &Carrier, source: &Source, order: &[usize], unloaded: bool) -> Result<Side, BenchError> {
    let rig = Rig::new(carrier, source)?;
    touch(rig.engine, &rig.guest, order, unloaded)
}

/// Touches pages of `guest` one after the other while `engine` serves them, with or without its background pull; ends the engine.
pub fn touch(engine: Engine, guest: &Mapping, order: &[usize], unloaded: bool) -> Result<Side, BenchError> {
    if !unloaded {
        engine.resume_background();
    }
    let mut toucher = Vec::with_capacity(order.len());
    for page in order {
        let mut word = [0; 8];
        let start = Instant::now();
        guest.read(page * floor::PAGE, &mut word);
        let took = start.elapsed().as_nanos() as u64;
        if unloaded || took > NO_FAULT_NS {
            toucher.push(took);
        }
        let (found, expected) = (u64::from_ne_bytes(word), *page as u64 + 1);
        if found != expected {
            return Err(BenchError::Wrong { page: *page, found, expected });
        }
    }
    let latencies = engine.stop(soon())?.latencies;
    let (server, queue) = (latencies.total, latencies.queue);
    Ok(Side { toucher, server, queue, wire: latencies.wire, install: latencies.install })
}

/// `count` different pages of `pages`, in an order no prefetcher knows but every run repeats.
pub fn scattered(pages: usize, count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..pages).collect();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for at in (1..pages).rev() {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        order.swap(at, (state >> 33) as usize % (at + 1));
    }
    order.truncate(count);
    order
}

/// The median.
pub fn mid(ns: &[u64]) -> f64 {
    table::median(&ns.iter().map(|ns| *ns as f64).collect::<Vec<_>>())
}
