//! The model sees a single wrong byte anywhere, a stale page, and a packet that is not true.

mod common;

use belay_transport::{PAGE_SIZE, PageIndex};
use belay_vmm_glue::kvm::BareGuest;
use belay_vmm_glue::kvm::guests::{Filler, GuestSpec, rules};
use belay_vmm_glue::witness::model::{Model, ModelError, NonceError};
use belay_vmm_glue::witness::packet::PacketError;
use common::{Kind, Rig};

/// A ledger that ran to its step 6400 with two incarnations.
fn ran() -> (Rig<dyn BareGuest>, Model) {
    let spec = GuestSpec {
        memory_bytes: 6 << 20,
        working_set_bytes: 2 << 20,
        rate_pages_per_s: 0,
        filler: Filler::Host,
        ..GuestSpec::default()
    };
    let mut rig = Rig::boot_any(spec, &Kind::HostThreads);
    rig.run_to_and_check(640);
    rig.new_incarnation();
    let model = rig.run_to_and_check(6400);
    assert_eq!(model.nonces_seen()[0].len(), 2);
    (rig, model)
}

#[test]
fn one_flipped_byte_anywhere_in_memory_is_found_where_it_is() {
    let (rig, model) = ran();
    let layout = rig.spec.layout().unwrap();
    let last = rig.spec.memory_bytes as usize - 1;
    let hole = layout.own_pages(0).end + 1;
    let places = [
        5,
        layout.page_tables().offset(),
        layout.text().offset() + 100,
        layout.text().offset() + 4000,
        layout.shared_counters().offset() + 3,
        layout.parameters(0) as usize + 8,
        layout.nonce_log(0).offset() + 3000,
        PageIndex(layout.own_pages(0).start).offset() + 77,
        PageIndex(hole).offset() + 4095,
        last,
    ];
    for place in places {
        let byte = rig.ram.alias.atomic_u8(place);
        let flip = || byte.fetch_xor(0x10, std::sync::atomic::Ordering::SeqCst);
        flip();
        let comparison = model.compare(&rig.ram.alias, 4);
        assert_eq!(comparison.pages_different, 1, "byte {place:#x}: {comparison}");
        assert_eq!(comparison.first.len(), 1);
        assert_eq!(comparison.first[0].offset, place as u64 & !7);
        flip();
    }
    assert!(model.compare(&rig.ram.alias, 4).is_equal());
}

#[test]
fn of_a_guest_that_was_stopped_anywhere_one_flipped_byte_of_what_it_has_is_found() {
    let (mut rig, _) = ran();
    let layout = rig.spec.layout().unwrap();
    let own = layout.own_pages(0);
    let all = |_: PageIndex| true;
    rig.guest.unpark().unwrap();
    for round in 0..20 {
        rig.guest.resume().unwrap();
        // Anywhere: what is waited for is that it has gone on, and it stops wherever it is by then.
        let from = rig.guest.steps().unwrap()[0];
        while rig.guest.steps().unwrap()[0] <= from + round {}
        rig.guest.pause(common::soon()).unwrap();
        let steps = rig.guest.steps().unwrap();
        let stopped = |is_there: &dyn Fn(PageIndex) -> bool| {
            Model::of_stopped(&rig.spec, &steps, &rig.ram.alias, &rig.issued, is_there).unwrap()
        };
        let comparison = stopped(&all).compare_those(&rig.ram.alias, 4, &all);
        assert!(comparison.is_equal() && comparison.pages_not_compared == 0, "{steps:?}: {comparison}");
        // Where a page is missing nothing is said of it, and of the others as much as before.
        let missing = PageIndex(own.start + round);
        let but_one = |page: PageIndex| page != missing;
        let word = rig.ram.alias.atomic_u8(missing.offset() + 9);
        word.fetch_xor(1, std::sync::atomic::Ordering::SeqCst);
        let comparison = stopped(&but_one).compare_those(&rig.ram.alias, 4, &but_one);
        assert!(comparison.is_equal() && comparison.pages_not_compared == 1, "{steps:?}: {comparison}");
        let comparison = stopped(&all).compare_those(&rig.ram.alias, 4, &all);
        assert_eq!((comparison.pages_different, comparison.first[0].offset / PAGE_SIZE as u64), (1, missing.0));
        word.fetch_xor(1, std::sync::atomic::Ordering::SeqCst);
        // The words that the guest is about to write, and those it has just written, are no less known than others.
        let seed = rules::step_seed(rig.spec.seed, 0);
        let pattern = rig.spec.program.pattern().unwrap();
        for step in [steps[0] - 1, steps[0], steps[0] + 31, steps[0] + 63] {
            let (page, word, _) = rules::step(pattern, seed, step, own.end - own.start);
            let place = PageIndex(own.start + page).offset() + word * 8;
            let byte = rig.ram.alias.atomic_u8(place);
            byte.fetch_xor(0x10, std::sync::atomic::Ordering::SeqCst);
            let comparison = stopped(&all).compare_those(&rig.ram.alias, 100, &all);
            let found = comparison.first.iter().any(|difference| difference.offset == place as u64);
            assert!(found, "step {step} of {steps:?}: {comparison}");
            byte.fetch_xor(0x10, std::sync::atomic::Ordering::SeqCst);
        }
    }
}

#[test]
fn a_page_that_went_back_in_time_shows_for_ever() {
    let (mut rig, _) = ran();
    let page = rig.spec.layout().unwrap().own_pages(0).start + 3;
    let mut old = [0; PAGE_SIZE];
    rig.ram.alias.read(PageIndex(page).offset(), &mut old);
    rig.guest.unpark().unwrap();
    rig.run_to_and_check(60_000);
    // The page is written again and again after this; without the chain in each word that would hide the loss.
    rig.ram.alias.write(PageIndex(page).offset(), &old);
    rig.guest.park_at_step(2_000_000).unwrap();
    let steps = rig.guest.wait_parked(common::soon()).unwrap();
    let model = Model::new(&rig.spec, &steps, &rig.ram.alias, &rig.issued).unwrap();
    let comparison = model.compare(&rig.ram.alias, 4);
    assert_eq!(comparison.pages_different, 1, "{comparison}");
    assert_eq!(comparison.first[0].offset / PAGE_SIZE as u64, page);
    let packets = rig.sink.0.lock().unwrap();
    let wrong = model.check_packets(packets.iter().map(|packet| (packet.sequence, packet.bytes.as_slice())));
    assert!(matches!(wrong, Err(PacketError::Wrong { .. })), "the digest did not see it: {wrong:?}");
}

#[test]
fn packets_that_are_not_true_are_found() {
    let (rig, model) = ran();
    let packets: Vec<(u64, Vec<u8>)> =
        rig.sink.0.lock().unwrap().iter().map(|packet| (packet.sequence, packet.bytes.clone())).collect();
    let check =
        |packets: &[(u64, Vec<u8>)]| model.check_packets(packets.iter().map(|(n, bytes)| (*n, bytes.as_slice())));
    assert_eq!(check(&packets).unwrap(), model.packets_due());
    for byte in 0..40 {
        let mut wrong = packets.clone();
        wrong[7].1[byte] ^= 1;
        let error = check(&wrong).unwrap_err();
        assert!(
            matches!(
                error,
                PacketError::Wrong { sequence: 7, .. } | PacketError::NoSuchVcpu { .. } | PacketError::Shape { .. }
            ),
            "{error}"
        );
    }
    let mut left_out = packets.clone();
    left_out.remove(3);
    assert!(matches!(check(&left_out), Err(PacketError::Wrong { sequence: 4, .. })));
    let mut more = packets.clone();
    more.push((packets.len() as u64, packets[1].1.clone()));
    assert!(matches!(check(&more), Err(PacketError::FromTheFuture { .. })));
    let short = [(0, packets[0].1[..39].to_vec())];
    assert!(matches!(check(&short), Err(PacketError::Shape { sequence: 0, len: 39 })));
}

#[test]
fn nonces_that_were_not_issued_or_not_then_are_found() {
    let (rig, model) = ran();
    let seen = &model.nonces_seen()[0];
    let make = |issued: &[u64]| Model::new(&rig.spec, &[6400], &rig.ram.alias, issued).map(drop);
    let (first, second) = (rig.issued[0], rig.issued[1]);
    make(&[first, 99, second]).unwrap();
    let refused = |issued: &[u64], nonce: u64, step: u64| {
        assert_eq!(make(issued), Err(ModelError::Nonce(NonceError::NotIssued { vcpu: 0, nonce, step })));
    };
    refused(&[second], first, seen[0].step);
    refused(&[first], second, seen[1].step);
    refused(&[second, first], second, seen[1].step);
    // The second was seen after step 640, so a guest that stands there cannot have seen it.
    let early = Model::new(&rig.spec, &[640], &rig.ram.alias, &rig.issued).map(drop);
    assert!(matches!(early, Err(ModelError::Nonce(NonceError::Step { .. }))), "{early:?}");
}
