//! Every guest does what its model says, whatever it is stopped by, saved into and moved to.

mod common;

use belay_checkpoint::guest::Guest;
use belay_vmm_glue::kvm::guests::{Filler, GuestSpec, Program};
use belay_vmm_glue::kvm::{BareGuest, KvmOptions, Tracking};
use common::{Kind, Rig, no_kvm, runs_identically_with_and_without_stops, soon};
use std::time::{Duration, Instant};

fn spec(program: Program, vcpus: u16, seed: u64) -> GuestSpec {
    GuestSpec {
        program,
        memory_bytes: 24 << 20,
        working_set_bytes: 8 << 20,
        rate_pages_per_s: 0,
        batch_steps: 64,
        packet_interval_steps: 128,
        vcpus,
        seed,
        filled_of_256: 192,
        filler: if seed.is_multiple_of(2) { Filler::Guest } else { Filler::Host },
        metronome_spin_ticks: 100_000,
    }
}

fn guests() -> impl Iterator<Item = GuestSpec> {
    let programs = [(Program::Ledger, 1), (Program::Ledger, 2), (Program::Scanner, 1), (Program::Scanner, 2)];
    let programs = programs.into_iter().chain([(Program::Metronome, 1), (Program::Sequential, 2), (Program::Zipf, 1)]);
    let programs = programs.chain([(Program::Phases, 2)]);
    programs.zip(10..).map(|((program, vcpus), seed)| spec(program, vcpus, seed))
}

#[test]
fn every_guest_runs_identically_with_and_without_a_stop_in_the_middle() {
    if no_kvm() {
        return;
    }
    for spec in guests() {
        let options = KvmOptions { tracking: Tracking::None, irqchip: spec.seed.is_multiple_of(3) };
        runs_identically_with_and_without_stops(&spec, &Kind::Kvm(options));
    }
}

#[test]
fn a_ledger_of_host_threads_runs_identically_with_and_without_a_stop_in_the_middle() {
    let ledgers = [(Program::Ledger, 1), (Program::Sequential, 1), (Program::Zipf, 2), (Program::Phases, 2)];
    for ((program, vcpus), seed) in ledgers.into_iter().zip(1..) {
        runs_identically_with_and_without_stops(&spec(program, vcpus, seed), &Kind::HostThreads);
    }
}

#[test]
fn a_guest_is_paced_to_its_rate_also_when_it_is_stopped_often() {
    if no_kvm() {
        return;
    }
    let spec = GuestSpec { rate_pages_per_s: 20_000, filler: Filler::Host, ..spec(Program::Ledger, 1, 8) };
    let mut rig = Rig::boot(spec, KvmOptions { tracking: Tracking::None, irqchip: false });
    rig.guest.resume().unwrap();
    let started = Instant::now();
    while started.elapsed() < Duration::from_millis(600) {
        std::thread::sleep(Duration::from_millis(2));
        rig.guest.pause(soon()).unwrap();
        rig.guest.resume().unwrap();
    }
    rig.guest.pause(soon()).unwrap();
    let per_second = rig.guest.steps().unwrap()[0] as f64 / started.elapsed().as_secs_f64();
    // It may lag where the machine is busy; running ahead would be the pacer's fault.
    assert!((5_000.0..24_000.0).contains(&per_second), "{per_second:.0} pages/s");
}
