//! `checkpoint`: how long the guest stands still for a checkpoint of 1,000 scattered dirty pages, by its own clock, beside what
//! no checkpoint can do without: a stop, a tracker's answer, a copy of the pages.

use crate::carrier::{Carrier, Device};
use crate::error::BenchError;
use crate::floor::{self, Scattered};
use crate::table::{self, Row};
use crate::tethered::Tethered;
use belay_checkpoint::guest::{Guest, TrackerKind};
use belay_transport::fabric::FabricKind;
use serde::Serialize;
use std::time::Duration;

/// A few of them meet in the same page.
const STEPS: u64 = 1_004;
/// Fewer than this: the guest was still at work when it was stopped.
const LEAST_PAGES: u64 = 950;
/// How long the guest watches its clock after a batch, and when in an iteration it is stopped: a batch takes about 10 ms.
const WATCH: Duration = Duration::from_millis(50);
const INTO: Duration = Duration::from_millis(30);
/// Rounds in which caches, page tables and the tether settle.
const WARM_UP: usize = 3;
const GOAL_US: f64 = 1_500.0;

#[derive(Debug, Serialize)]
pub struct Report {
    pub fabric: FabricKind,
    pub rounds: usize,
    pub goal_us: f64,
    pub cases: Vec<Case>,
}

/// One tracker with one size of guest.
#[derive(Debug, Serialize)]
pub struct Case {
    pub tracker: TrackerKind,
    pub memory_bytes: u64,
    /// Median of an epoch.
    pub pages: f64,
    /// Rounds in which the guest was not watching its clock when it was stopped.
    pub dropped: usize,
    pub pause_p50_us: f64,
    pub pause_p99_us: f64,
    /// Medians of the three floors, added.
    pub floors_us: f64,
    pub rows: Vec<Row>,
}

pub fn run(fabric: FabricKind, device: Device, quick: bool) -> Result<Report, BenchError> {
    let carrier = Carrier::within_this_host(fabric, device);
    let rounds = if quick { 15 } else { 60 };
    let mut cases = Vec::new();
    for memory_bytes in [256 << 20, 1 << 30] {
        for tracker in [TrackerKind::KvmRing, TrackerKind::KvmLog, TrackerKind::UffdWp] {
            let case = measure(&carrier, tracker, memory_bytes, rounds)?;
            print(&case);
            cases.push(case);
        }
    }
    Ok(Report { fabric, rounds, goal_us: GOAL_US, cases })
}

/// What the rounds of one case gave, in nanoseconds.
#[derive(Default)]
struct Samples {
    copy: Vec<u64>,
    bare_stop: Vec<u64>,
    scan: Vec<u64>,
    pause: Vec<u64>,
    by_tether: Vec<u64>,
    parts: [Vec<u64>; 5],
    age: Vec<u64>,
    pages: Vec<f64>,
}

fn measure(carrier: &Carrier, kind: TrackerKind, memory_bytes: u64, rounds: usize) -> Result<Case, BenchError> {
    let rig = Tethered::new(carrier, kind, memory_bytes, STEPS, WATCH)?;
    let scattered = Scattered::new(memory_bytes as usize, STEPS as usize);
    let mut scattered = scattered.map_err(BenchError::io("the floor's memory"))?;
    let mut samples = Samples::default();
    let mut dropped = 0;
    for at in 0..rounds + WARM_UP {
        let mut one = Samples::default();
        let whole = round(&rig, &mut scattered, &mut one)?;
        match (at < WARM_UP, whole) {
            (true, _) => {}
            (false, true) => samples.add(one),
            (false, false) => dropped += 1,
        }
    }
    if samples.pause.len() < rounds / 2 {
        return Err(BenchError::TooNoisy { dropped, rounds });
    }
    rig.finish()?;
    Ok(samples.into_case(kind, memory_bytes, dropped))
}

/// One round; false when the guest was not watching its clock at some stop.
fn round(rig: &Tethered, scattered: &mut Scattered, into: &mut Samples) -> Result<bool, BenchError> {
    let ns = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    into.copy.push(ns(scattered.copy()));
    rig.wait_for_batch()?;
    std::thread::sleep(INTO);
    let stats = rig.checkpoint()?;
    let Some(pause) = rig.clock.last_pause() else { return Ok(false) };
    rig.wait_folded(stats.number())?;
    rig.stop_and_resume()?;
    let Some(bare) = rig.clock.last_pause() else { return Ok(false) };

    // The tracker alone, with as many dirty pages; the epoch that holds them is not measured.
    rig.wait_for_batch()?;
    std::thread::sleep(INTO);
    rig.guest.clone().pause(crate::rig::soon())?;
    let (scan, scanned) = rig.tracker.scan()?;
    rig.guest.clone().resume()?;
    rig.checkpoint()?;

    into.pause.push(ns(pause));
    into.by_tether.push(ns(stats.pause.total()));
    into.bare_stop.push(ns(bare));
    into.scan.push(ns(scan));
    let parts = [stats.pause.stop, stats.pause.save, stats.pause.harvest, stats.pause.stage, stats.pause.resume];
    into.parts.iter_mut().zip(parts).for_each(|(all, part)| all.push(ns(part)));
    into.age.push(ns(stats.age));
    into.pages.push(stats.pages as f64);
    Ok(stats.pages >= LEAST_PAGES && scanned >= LEAST_PAGES)
}

impl Samples {
    fn add(&mut self, other: Self) {
        self.copy.extend(other.copy);
        self.bare_stop.extend(other.bare_stop);
        self.scan.extend(other.scan);
        self.pause.extend(other.pause);
        self.by_tether.extend(other.by_tether);
        self.parts.iter_mut().zip(other.parts).for_each(|(all, one)| all.extend(one));
        self.age.extend(other.age);
        self.pages.extend(other.pages);
    }

    fn into_case(self, tracker: TrackerKind, memory_bytes: u64, dropped: usize) -> Case {
        let bytes = STEPS as usize * floor::PAGE;
        let [stop, save, harvest, stage, resume] = &self.parts;
        let row = |name: &str, samples: &Vec<u64>| Row::of_samples(name, bytes, samples);
        let rows = vec![
            row("floor: memcpy of scattered pages", &self.copy),
            row("floor: stop, resume, guest's clock", &self.bare_stop),
            row("floor: the tracker alone", &self.scan),
            row("pause, guest's clock", &self.pause),
            row("pause, tether's clock", &self.by_tether),
            row("  stop", stop),
            row("  save", save),
            row("  harvest", harvest),
            row("  stage", stage),
            row("  resume", resume),
            row("age at commit", &self.age),
        ];
        Case {
            tracker,
            memory_bytes,
            pages: table::median(&self.pages),
            dropped,
            pause_p50_us: rows[3].t_typical_us,
            pause_p99_us: rows[3].p99_us,
            floors_us: rows[..3].iter().map(|row| row.t_typical_us).sum(),
            rows,
        }
    }
}

fn print(case: &Case) {
    let tracker = serde_json::to_value(case.tracker).ok();
    let tracker = tracker.as_ref().and_then(|name| name.as_str()).unwrap_or_default();
    let (mib, pages) = (case.memory_bytes >> 20, case.pages);
    println!("\n {tracker}, guest of {mib} MiB, {pages:.0} dirty pages an epoch, {} rounds dropped", case.dropped);
    table::print(&case.rows);
    println!(
        "\n pause by the guest's clock    {:.0} us median (goal {GOAL_US:.0}), {:.0} us 99%; floors together {:.0} us",
        case.pause_p50_us, case.pause_p99_us, case.floors_us
    );
}
