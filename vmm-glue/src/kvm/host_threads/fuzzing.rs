//! A saved state of host threads, under any bytes.

use super::*;
use crate::kvm::testing::Nowhere;
use belay_transport::PageSize;

/// What a fuzz target asks of a state: one that is understood is saved again as one that says the same, and threads that are taken go on
/// from it, or say why not.
pub(crate) fn state(state: &[u8]) {
    let Ok(saved) = Saved::read(state) else { return };
    let mut written = Vec::new();
    saved.write(&mut written).expect("plain data");
    assert!(written.len() <= state.len());
    thread_local!(static SHARED: Shared = fuzzed());
    SHARED.with(|shared| {
        if shared.load(saved).is_ok() {
            for vcpu in 0..shared.registers.len() {
                let (mut registers, mut pacer) = (shared.registers(vcpu).clone(), Pacer::default());
                for _ in 0..100 {
                    if shared.do_next(vcpu, &mut registers, &mut pacer).is_err() {
                        break;
                    }
                }
            }
        }
    });
}

fn fuzzed_spec() -> GuestSpec {
    GuestSpec {
        memory_bytes: 4 << 20,
        working_set_bytes: 1 << 20,
        vcpus: 2,
        rate_pages_per_s: 0,
        ..GuestSpec::default()
    }
}

/// A guest whose threads are not there: they are asked to do one thing after the other.
fn fuzzed() -> Shared {
    let spec = fuzzed_spec();
    let file = RamFile::memfd("belay-host-threads-fuzz", 4 << 20, PageSize::Small).expect("memory");
    let memory = Arc::new(file.map().expect("memory"));
    let (pattern, layout) = (spec.program.pattern().expect("a ledger"), spec.layout().expect("it fits"));
    Shared::new(&spec, pattern, layout, memory, Arc::new(Nowhere))
}

/// States as they are saved, for the corpus.
#[cfg(test)]
pub(crate) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let shared = fuzzed();
    let states = |next: Next, step: u64| {
        let registers = (0..2).map(|_| Registers { next, step, ..shared.first_registers() }).collect();
        let mut out = vec![3];
        Saved { registers, port: shared.port.save() }.write(&mut out).expect("plain data");
        out
    };
    vec![("threads-fill", states(Next::Fill(3), 0)), ("threads-note", states(Next::Note(7), 1234))]
}
