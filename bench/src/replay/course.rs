//! What a trace's threads do, as it can be done again: pages counted through all regions, with the time that each thread took between them.

use crate::error::BenchError;
use crate::floor::Step;
use belay_transport::PageSize;
use belay_transport::pull::{ClassRun, PageClass};
use belay_vmm_glue::migrate::faults::{Fault, FaultTrace};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// Most threads that are replayed.
const MOST_THREADS: usize = 256;

/// How fast a trace is replayed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Speed {
    /// So many times as fast as it was recorded.
    Times(f64),
    /// Each thread touches the next page as soon as it has one.
    Max,
}

impl std::str::FromStr for Speed {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.parse::<f64>()) {
            ("max", _) => Ok(Self::Max),
            (_, Ok(times)) if (0.001..=1000.0).contains(&times) => Ok(Self::Times(times)),
            _ => Err(format!("{text:?} is neither `max` nor a number from 0.001 to 1000")),
        }
    }
}

impl std::fmt::Display for Speed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Times(times) => write!(f, "{times}"),
            Self::Max => f.write_str("max"),
        }
    }
}

/// A guest's memory, and what its threads touch of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Course {
    pub page_size: PageSize,
    pub frames: u64,
    pub shards: u16,
    pub classes: Vec<ClassRun>,
    pub threads: Vec<Vec<Step>>,
    /// Different frames that are touched, and how many of those are read from the source.
    pub touched: u64,
    pub touched_peer: u64,
}

impl Course {
    pub fn of(trace: &FaultTrace, speed: Speed) -> Result<Self, BenchError> {
        let cannot = |why: String| Err(BenchError::Options { what: "a trace that cannot be replayed", why });
        let page_size = trace.regions.first().map_or(PageSize::Small, |region| region.page_size);
        if trace.regions.iter().any(|region| region.page_size != page_size) {
            return cannot("its regions have pages of different sizes".to_owned());
        }
        let (mut firsts, mut frames, mut classes) = (BTreeMap::new(), 0, Vec::new());
        for region in &trace.regions {
            firsts.insert(region.id, frames);
            frames += region.frames;
            let mut at = 0;
            for (first, count) in region.zero.iter().chain([&(region.frames, 0)]) {
                classes.push(ClassRun { class: PageClass::Peer, frames: first - at });
                classes.push(ClassRun { class: PageClass::Zero, frames: *count });
                at = first + count;
            }
        }
        classes.retain(|run| run.frames > 0);
        let page = |fault: &Fault| firsts[&fault.region] + fault.frame.0;
        let mut by_thread: BTreeMap<(u32, u16), Vec<&Fault>> = BTreeMap::new();
        for fault in &trace.faults {
            // Where the kernel did not say whose a fault was, a shard's are one thread's.
            let shard = if fault.thread == 0 { fault.shard } else { 0 };
            by_thread.entry((fault.thread, shard)).or_default().push(fault);
        }
        if by_thread.len() > MOST_THREADS {
            return cannot(format!("{} threads; {MOST_THREADS} are the most that are replayed", by_thread.len()));
        }
        let threads: Vec<_> = by_thread.values().map(|faults| steps(faults, speed, &page)).collect();
        let touched: BTreeSet<u64> = trace.faults.iter().map(page).collect();
        let mut course = Self {
            page_size,
            frames,
            shards: trace.shards,
            classes,
            threads,
            touched: touched.len() as u64,
            touched_peer: 0,
        };
        let zero = course.zero();
        course.touched_peer = touched.iter().filter(|page| !zero[**page as usize]).count() as u64;
        Ok(course)
    }

    pub fn bytes(&self) -> u64 {
        self.frames << self.page_size.shift()
    }

    /// Of each frame, whether it is zero.
    pub fn zero(&self) -> Vec<bool> {
        let run = |run: &ClassRun| std::iter::repeat_n(run.class == PageClass::Zero, run.frames as usize);
        self.classes.iter().flat_map(run).collect()
    }
}

/// One thread's: what it did between an answer and its next fault is the time it thinks. A page that it had already is no step.
fn steps(faults: &[&Fault], speed: Speed, page: &dyn Fn(&Fault) -> u64) -> Vec<Step> {
    let (mut free_ns, mut had) = (0, BTreeSet::new());
    let mut steps = Vec::new();
    for fault in faults {
        let think = Duration::from_nanos(fault.ns.saturating_sub(free_ns));
        free_ns = free_ns.max(fault.ns.saturating_add(fault.waited_ns.unwrap_or(0)));
        if had.insert(page(fault)) {
            let think = match speed {
                Speed::Times(times) => think.div_f64(times),
                Speed::Max => Duration::ZERO,
            };
            steps.push(Step { think, page: page(fault) as usize, write: fault.write });
        }
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::*;
    use belay_transport::{FrameIndex, RegionId};
    use belay_vmm_glue::migrate::faults::Region;

    fn region(id: u16, frames: u64, zero: &[(u64, u64)]) -> Region {
        Region { id: RegionId(id), page_size: PageSize::Small, frames, zero: zero.to_vec() }
    }

    fn fault(ns: u64, waited_ns: u64, thread: u32, region: u16, frame: u64) -> Fault {
        let (region, frame, waited_ns) = (RegionId(region), FrameIndex(frame), Some(waited_ns));
        Fault { ns, waited_ns, shard: 0, thread, region, frame, write: false }
    }

    #[test]
    fn a_threads_time_between_an_answer_and_its_next_fault_is_kept_and_its_waiting_is_not() {
        let faults = vec![
            fault(1_000, 500, 7, 0, 3),
            fault(1_200, 100, 8, 0, 4),
            fault(2_000, 300, 7, 5, 1),
            fault(2_400, 1, 7, 0, 3),
            fault(4_300, 1, 7, 0, 9),
        ];
        let trace = FaultTrace { shards: 1, regions: vec![region(0, 10, &[(4, 2)]), region(5, 4, &[])], faults };
        let course = Course::of(&trace, Speed::Times(2.0)).unwrap();
        let step = |think, page| Step { think: Duration::from_nanos(think), page, write: false };
        // The second fault at page 3 is none: the thread had it.
        assert_eq!(course.threads, [vec![step(500, 3), step(250, 11), step(949, 9)], vec![step(600, 4)]]);
        assert_eq!((course.frames, course.touched, course.touched_peer), (14, 4, 3));
        let zero: Vec<usize> = (0..14).filter(|at| course.zero()[*at]).collect();
        assert_eq!(zero, [4, 5]);
        let fast = Course::of(&trace, Speed::Max).unwrap();
        assert!(fast.threads.iter().flatten().all(|step| step.think.is_zero()));
    }

    #[test]
    fn what_cannot_be_replayed_is_said() {
        let regions = vec![region(0, 1000, &[])];
        let faults = (0..300).map(|at| fault(1, 1, at as u32 + 1, 0, at)).collect();
        let trace = FaultTrace { shards: 1, regions, faults };
        let told = Course::of(&trace, Speed::Max).unwrap_err().to_string();
        assert!(told.contains("300 threads; 256"), "{told}");
        let mut mixed = trace.clone();
        mixed.regions.push(Region { page_size: PageSize::Huge, ..region(1, 2, &[]) });
        assert!(Course::of(&mixed, Speed::Max).unwrap_err().to_string().contains("different sizes"));
        assert!("0".parse::<Speed>().is_err() && "fast".parse::<Speed>().is_err());
        assert_eq!("0.5".parse::<Speed>(), Ok(Speed::Times(0.5)));
    }
}
