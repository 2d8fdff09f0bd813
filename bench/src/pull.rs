//! `pull`: how fast the background pulls, beside a floor that copies or receives and shows the same bytes.

use crate::carrier::Carrier;
use crate::error::BenchError;
use crate::floor;
use crate::rig::{Rig, Source, soon};
use crate::table;
use belay_transport::fabric::FabricKind;
use belay_transport::pull::Tuning;
use serde::Serialize;
use std::time::{Duration, Instant};

#[derive(Debug, Serialize)]
pub struct Report {
    pub fabric: Option<FabricKind>,
    pub bytes: usize,
    pub chunk_bytes: usize,
    pub rounds: usize,
    /// Medians, in bytes a second.
    pub plain_bytes_s: f64,
    pub floor_bytes_s: f64,
    pub engine_bytes_s: f64,
    /// Median over rounds.
    pub engine_over_floor: f64,
}

pub fn run(wire: floor::Wire, quick: bool) -> Result<Report, BenchError> {
    let (rounds, len) = if quick { (7, 64 << 20) } else { (9, 256 << 20) };
    let chunk = Tuning::default().chunk_bytes as usize;
    let carrier = Carrier::beside(wire);
    let source = Source::new(len)?;
    let floor_source = floor::Source::new(len).map_err(BenchError::io("the floor's source"))?;
    let rate = |took: Duration| len as f64 / took.as_secs_f64();
    let (mut plain, mut floors, mut ours, mut ratios) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        plain.push(rate(floor::plain(wire, &floor_source, chunk).map_err(BenchError::io("the plain copy"))?));
        let floor = rate(floor::sweep(wire, &floor_source, chunk).map_err(BenchError::io("the floor's sweep"))?);
        let engine = rate(engine_round(&carrier, &source)?);
        floors.push(floor);
        ours.push(engine);
        ratios.push(engine / floor);
    }
    let report = Report {
        fabric: carrier.only,
        bytes: len,
        chunk_bytes: chunk,
        rounds,
        plain_bytes_s: table::median(&plain),
        floor_bytes_s: table::median(&floors),
        engine_bytes_s: table::median(&ours),
        engine_over_floor: table::median(&ratios),
    };
    println!(" {:<28} {:>10} {:>12} {:>16} {:>14}", "", "#bytes", "#iterations", "BW average[MB/s]", "page[ns]");
    let names = match wire {
        floor::Wire::Memory => ["plain memcpy", "floor: memcpy + CONTINUE"],
        floor::Wire::Tcp => ["plain recv", "floor: recv + CONTINUE"],
    };
    let rows = [(names[0], report.plain_bytes_s), (names[1], report.floor_bytes_s), ("engine", report.engine_bytes_s)];
    for (name, rate) in rows {
        println!(
            " {name:<28} {:>10} {:>12} {:>16.0} {:>14.0}",
            chunk,
            len / chunk,
            rate / 1e6,
            floor::PAGE as f64 / rate * 1e9
        );
    }
    let goal = if wire == floor::Wire::Memory { 0.80 } else { 0.85 };
    println!("\n engine over floor             {:.2} (goal {goal:.2})", report.engine_over_floor);
    Ok(report)
}

fn engine_round(carrier: &Carrier, source: &Source) -> Result<Duration, BenchError> {
    let rig = Rig::new(carrier, source)?;
    let start = Instant::now();
    rig.engine.resume_background();
    rig.engine.wait_all_landed(soon())?;
    let took = start.elapsed();
    rig.engine.stop(soon())?;
    let pages = rig.guest.len() / floor::PAGE;
    for page in (0..pages).step_by(997) {
        let mut word = [0; 8];
        rig.guest.read(page * floor::PAGE, &mut word);
        let (found, expected) = (u64::from_ne_bytes(word), page as u64 + 1);
        if found != expected {
            return Err(BenchError::Wrong { page, found, expected });
        }
    }
    Ok(took)
}
