//! Recordings as files, under any bytes: of faults, of what a guest wrote, and of what an observer saw.

use crate::fuzzing::told;
use crate::migrate::faults::FaultTrace;
use crate::migrate::faults::file as faults;
use belay_checkpoint::policy::trace::Trace;
use belay_checkpoint::policy::trace::file as writes;

pub(crate) fn traces(data: &[u8]) {
    let Some((mode, bytes)) = data.split_first() else { return };
    match mode % 3 {
        0 => match faults::read(bytes) {
            Ok(trace) => of_faults(&trace),
            Err(error) => told(&error),
        },
        1 => match writes::read(bytes) {
            Ok(trace) => of_writes(&trace, bytes.len()),
            Err(error) => told(&error),
        },
        _ => crate::witness::observer::log::fuzz(bytes),
    }
}

/// Every fault is of memory and a shard that are there, in the order of time, and the trace reads back as it is written.
fn of_faults(trace: &FaultTrace) {
    assert!(trace.faults.is_sorted_by_key(|fault| fault.ns) && !trace.faults.is_empty());
    for region in &trace.regions {
        let mut end = 0;
        for (first, count) in &region.zero {
            assert!(*first >= end && first + count <= region.frames);
            end = first + count;
        }
    }
    for fault in &trace.faults {
        let region = trace.regions.iter().find(|region| region.id == fault.region).expect("a region of the trace's");
        assert!(fault.frame.0 < region.frames && fault.shard < trace.shards);
        assert!(fault.ns.checked_add(fault.waited_ns.unwrap_or(0)).is_some());
    }
    let mut written = Vec::new();
    let mut writer = faults::Writer::new(&mut written, trace.shards, &trace.regions).expect("memory");
    trace.faults.iter().for_each(|fault| writer.write(fault).expect("memory"));
    assert!(faults::read(&*written).expect("our own") == *trace);
}

/// Every page is one of the guest's, what was read takes no more memory than a few times its bytes, and it reads back as it is written.
fn of_writes(trace: &Trace, bytes: usize) {
    let runs: usize = trace.stretches.iter().map(|stretch| stretch.runs.len()).sum();
    // The least that a stretch and a run can be written as: `{"us":0,"outputs":0,"runs":[]}` and `[0,0]`.
    assert!(trace.stretches.len() * 30 + runs * 5 <= bytes);
    let mut written = Vec::new();
    let mut writer = writes::Writer::new(&mut written, trace.pages).expect("memory");
    for stretch in &trace.stretches {
        assert!(stretch.runs.iter().all(|&(first, count)| u64::from(first) + u64::from(count) <= trace.pages.into()));
        writer.write(stretch.clone()).expect("memory");
    }
    assert!(writes::read(&*written).expect("our own") == *trace);
}

/// Inputs of our own encoders, for the corpus.
#[cfg(test)]
pub(crate) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    use belay_checkpoint::policy::trace::Stretch;
    use std::time::Duration;
    let (mut of_faults, trace) = (vec![0], faults::tests::trace());
    let mut writer = faults::Writer::new(&mut of_faults, trace.shards, &trace.regions).expect("memory");
    trace.faults.iter().rev().for_each(|fault| writer.write(fault).expect("memory"));
    let mut of_writes = vec![1];
    let mut writer = writes::Writer::new(&mut of_writes, 64).expect("memory");
    let busy = Stretch { lasts: Duration::from_micros(1003), outputs: 2, runs: vec![(17, 4), (0, 1)] };
    let idle = Stretch { lasts: Duration::from_millis(20), ..Stretch::default() };
    [busy, idle].into_iter().for_each(|stretch| writer.write(stretch).expect("memory"));
    let seen = [vec![2], crate::witness::observer::log::seed()].concat();
    vec![("faults", of_faults), ("writes", of_writes), ("seen", seen)]
}
