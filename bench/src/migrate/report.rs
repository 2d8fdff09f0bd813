//! What is said in the end: medians of all rounds, and what belay has of the best and of post-copy.

use super::Way;
use super::machine::Machine;
use super::pulse::STRETCH;
use crate::report::{Axis, Better, Case, Line, Mark, Measure, Plot, Role};
use crate::table::median;
use std::time::Duration;

/// One move.
#[derive(Debug, Clone)]
pub struct Sample {
    pub total: Duration,
    pub blackout: Option<Duration>,
    pub stall: Duration,
    pub lost: Duration,
    pub fault_p50: Option<Duration>,
    pub faults: u64,
    pub bytes: Option<u64>,
    pub hosts: [Duration; 2],
    /// When the order was given, in the guest's course.
    pub ordered: Duration,
    /// Steps of the guest in each [`STRETCH`], from a little before the order on.
    pub course: Vec<u64>,
    /// Why the guest was of no use afterwards.
    pub lost_guest: Option<String>,
}

/// The guest's pace around the order, in the move that took as long as half of them.
fn course(way: &str, sample: &Sample) -> Plot {
    let stretch_ms = STRETCH.as_secs_f64() * 1e3;
    let ordered_ms = sample.ordered.as_secs_f64() * 1e3;
    let point = |(at, steps): (usize, &u64)| ((at as f64 + 0.5) * stretch_ms - ordered_ms, *steps as f64 / stretch_ms);
    Plot::TimeLine {
        title: format!("The guest's pace while it is moved: {way}"),
        x: Axis::linear("since the order", "ms"),
        y: Axis::linear("pages written", "1/ms"),
        lines: vec![Line {
            name: "guest".to_owned(),
            role: Role::Ours,
            points: sample.course.iter().enumerate().map(point).collect(),
        }],
        marks: vec![Mark { at: sample.total.as_secs_f64() * 1e3, name: "moved".to_owned() }],
    }
}

/// All moves by one way: medians.
#[derive(Debug)]
pub struct Row {
    pub way: String,
    pub moves: usize,
    pub lost_guests: Vec<String>,
    pub total_ms: f64,
    pub blackout_ms: Option<f64>,
    pub stall_ms: f64,
    pub lost_ms: f64,
    pub fault_p50_us: Option<f64>,
    pub waits: f64,
    pub transferred_mib: Option<f64>,
    pub host_a_cpu_ms: f64,
    pub host_b_cpu_ms: f64,
}

/// See the module.
#[derive(Debug)]
pub struct Moves {
    pub qemu: String,
    pub machine: String,
    pub accel: String,
    pub memory_bytes: u64,
    pub working_set_bytes: u64,
    pub pages_per_s: u64,
    pub vcpus: u16,
    /// Whether QEMU's own destinations had allocated all memory before the guest came.
    pub prealloc: bool,
    pub rounds: u32,
    pub rows: Vec<Row>,
    samples: Vec<(Way, Sample)>,
}

impl Moves {
    pub fn new(machine: &Machine, qemu: &str, rounds: u32) -> Self {
        Self {
            qemu: qemu.to_owned(),
            machine: machine.kind.clone(),
            accel: machine.accel.clone(),
            memory_bytes: machine.memory,
            working_set_bytes: machine.working_set,
            pages_per_s: machine.rate,
            vcpus: machine.vcpus,
            prealloc: machine.prealloc,
            rounds,
            rows: Vec::new(),
            samples: Vec::new(),
        }
    }

    /// As cases of the report, one a way.
    pub fn cases(&self) -> Vec<Case> {
        self.rows.iter().map(|row| self.case(row)).collect()
    }

    fn case(&self, row: &Row) -> Case {
        let mut case = Case::new(&row.way)
            .with("QEMU", &self.qemu)
            .with("machine", &self.machine)
            .with("accelerator", &self.accel)
            .with("memory", format!("{} MiB", self.memory_bytes >> 20))
            .with("vCPUs", self.vcpus)
            .with("working set", format!("{} MiB", self.working_set_bytes >> 20))
            .with("pages a second", self.pages_per_s)
            .with("prealloc", self.prealloc);
        let of_way = || self.samples.iter().filter(|(way, _)| way.name() == row.way).map(|(_, sample)| sample);
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let all = |value: &dyn Fn(&Sample) -> Option<f64>| of_way().filter_map(value).collect::<Vec<f64>>();
        let unless_lost = |sample: &Sample, time| sample.lost_guest.is_none().then(|| ms(time));
        let measures = [
            ("total", "ms", all(&|sample| Some(ms(sample.total)))),
            ("blackout", "ms", all(&|sample| sample.blackout.map(ms))),
            ("stall", "ms", all(&|sample| unless_lost(sample, sample.stall))),
            ("lost", "ms", all(&|sample| unless_lost(sample, sample.lost))),
            ("fault, median", "us", all(&|sample| sample.fault_p50.map(|time| ms(time) * 1e3))),
            ("waits", "", all(&|sample| Some(sample.faults as f64))),
            ("sent", "MiB", all(&|sample| sample.bytes.map(|bytes| bytes as f64 / f64::from(1 << 20)))),
            ("processor time at host a", "ms", all(&|sample| Some(ms(sample.hosts[0])))),
            ("processor time at host b", "ms", all(&|sample| Some(ms(sample.hosts[1])))),
            ("guests lost", "", vec![row.lost_guests.len() as f64]),
        ];
        let measures = measures.into_iter().filter(|(.., rounds)| !rounds.is_empty());
        case.measures.extend(measures.map(|(name, unit, rounds)| Measure::new(name, unit, Better::Lower, rounds)));
        let mut kept: Vec<&Sample> = of_way().filter(|sample| sample.lost_guest.is_none()).collect();
        kept.sort_by_key(|sample| sample.total);
        case.plots.extend(kept.get(kept.len() / 2).map(|sample| course(&row.way, sample)));
        case
    }

    /// Of each guest that was lost, how.
    pub fn losses(&self) -> impl Iterator<Item = String> {
        let rows = self.rows.iter();
        rows.flat_map(|row| row.lost_guests.iter().map(move |why| format!("{}: a guest was lost: {why}", row.way)))
    }

    pub fn add(&mut self, way: Way, sample: Sample) {
        self.samples.push((way, sample));
        let mut ways: Vec<Way> = Vec::new();
        self.samples.iter().for_each(|(way, _)| {
            if !ways.contains(way) {
                ways.push(*way);
            }
        });
        self.rows = ways.into_iter().map(|way| row(way, &self.samples)).collect();
    }

    /// As a table.
    pub fn print(&self) {
        println!(
            "QEMU {}, {} ({}), {} MiB, {} vCPU, working set {} MiB written at {} pages/s{}; medians of {}",
            self.qemu,
            self.machine,
            self.accel,
            self.memory_bytes >> 20,
            self.vcpus,
            self.working_set_bytes >> 20,
            self.pages_per_s,
            if self.prealloc { "; QEMU's destinations with prealloc=on" } else { "" },
            self.rounds
        );
        println!(
            " {:<22} {:>10} {:>13} {:>10} {:>9} {:>14} {:>7} {:>10} {:>11} {:>11}",
            "",
            "total[ms]",
            "blackout[ms]",
            "stall[ms]",
            "lost[ms]",
            "fault p50[us]",
            "waits",
            "sent[MiB]",
            "host a[ms]",
            "host b[ms]"
        );
        let or_none =
            |value: Option<f64>, digits: usize| value.map_or("-".to_owned(), |value| format!("{value:.digits$}"));
        for row in &self.rows {
            println!(
                " {:<22} {:>10.0} {:>13} {:>10.1} {:>9.0} {:>14} {:>7.0} {:>10} {:>11.0} {:>11.0}",
                row.way,
                row.total_ms,
                or_none(row.blackout_ms, 1),
                row.stall_ms,
                row.lost_ms,
                or_none(row.fault_p50_us, 0),
                row.waits,
                or_none(row.transferred_mib, 0),
                row.host_a_cpu_ms,
                row.host_b_cpu_ms
            );
        }
        for row in self.rows.iter().filter(|row| !row.lost_guests.is_empty()) {
            println!(
                "{}: {} of {} guests lost: {}",
                row.way,
                row.lost_guests.len(),
                row.moves,
                row.lost_guests.join("; ")
            );
        }
        for line in self.compared() {
            println!("{line}");
        }
    }

    /// belay over TCP beside QEMU over TCP.
    fn compared(&self) -> Vec<String> {
        let row = |way: Way| self.rows.iter().find(|row| row.way == way.name());
        let Some(ours) = row(Way::BelayTcp) else { return Vec::new() };
        let own = [Way::Precopy, Way::Multifd, Way::Postcopy, Way::PostcopyPreempt].into_iter().filter_map(row);
        let best = own.min_by(|one, other| one.total_ms.total_cmp(&other.total_ms));
        let total = best
            .map(|best| format!("total: {:.2} of the best of QEMU's ({})", ours.total_ms / best.total_ms, best.way));
        let postcopy = row(Way::Postcopy).map(|postcopy| {
            let fault = ours
                .fault_p50_us
                .zip(postcopy.fault_p50_us)
                .map(|(ours, theirs)| format!(", fault p50 {:.2}", ours / theirs));
            format!("of QEMU's post-copy: stall {:.2}{}", ours.stall_ms / postcopy.stall_ms, fault.unwrap_or_default())
        });
        total.into_iter().chain(postcopy).collect()
    }
}

fn row(way: Way, samples: &[(Way, Sample)]) -> Row {
    let of_way: Vec<&Sample> = samples.iter().filter(|(of, _)| *of == way).map(|(_, sample)| sample).collect();
    let all =
        |value: &dyn Fn(&Sample) -> Option<f64>| of_way.iter().filter_map(|sample| value(sample)).collect::<Vec<f64>>();
    let middle = |value: &dyn Fn(&Sample) -> Option<f64>| median(&all(value));
    let if_any =
        |value: &dyn Fn(&Sample) -> Option<f64>| Some(all(value)).filter(|all| !all.is_empty()).map(|all| median(&all));
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let unless_lost = |sample: &Sample, time| sample.lost_guest.is_none().then(|| ms(time));
    let stall = |sample: &Sample| unless_lost(sample, sample.stall);
    Row {
        way: way.name().to_owned(),
        moves: of_way.len(),
        lost_guests: of_way.iter().filter_map(|sample| sample.lost_guest.clone()).collect(),
        total_ms: middle(&|sample| Some(ms(sample.total))),
        blackout_ms: if_any(&|sample| sample.blackout.map(ms)),
        stall_ms: middle(&stall),
        lost_ms: middle(&|sample| unless_lost(sample, sample.lost)),
        fault_p50_us: if_any(&|sample| sample.fault_p50.map(|time| ms(time) * 1e3)),
        waits: middle(&|sample| Some(sample.faults as f64)),
        transferred_mib: if_any(&|sample| sample.bytes.map(|bytes| bytes as f64 / f64::from(1 << 20))),
        host_a_cpu_ms: middle(&|sample| Some(ms(sample.hosts[0]))),
        host_b_cpu_ms: middle(&|sample| Some(ms(sample.hosts[1]))),
    }
}
