//! What an outbox promises, with a world that remembers what it was shown.

use super::*;
use proptest::prelude::*;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const SOON: Duration = Duration::from_secs(10);
const BOUNDS: Bounds = Bounds { bytes: 1 << 20, packets: 1000 };

/// Remembers every packet; fails while `broken`, and then has shown the packet or not as `shows_when_failing` says.
#[derive(Clone, Default)]
struct World {
    seen: Arc<Mutex<Vec<Packet>>>,
    broken: Arc<AtomicBool>,
    shows_when_failing: bool,
}

impl Emitter for World {
    fn send(&mut self, packet: &Packet) -> io::Result<()> {
        let broken = self.broken.load(Ordering::SeqCst);
        if !broken || self.shows_when_failing {
            lock(&self.seen).push(packet.clone());
        }
        if broken { Err(io::ErrorKind::BrokenPipe.into()) } else { Ok(()) }
    }
}

impl World {
    fn sequences(&self) -> Vec<u64> {
        lock(&self.seen).iter().map(|packet| packet.sequence).collect()
    }
}

#[derive(Default)]
struct SwitchableLease(AtomicBool, AtomicU64);

impl LeaseClock for SwitchableLease {
    fn valid(&self) -> bool {
        self.1.fetch_add(1, Ordering::SeqCst);
        self.0.load(Ordering::SeqCst)
    }
}

fn packet(sequence: u64) -> Packet {
    Packet { sequence, bytes: sequence.to_le_bytes().to_vec() }
}

fn soon() -> Deadline {
    Deadline::after(SOON)
}

fn commit_outbox(world: &World) -> (Outbox, Arc<dyn PacketSink>) {
    let outbox = Outbox::commit(BOUNDS, Box::new(world.clone())).expect("thread");
    let sink = outbox.sink();
    (outbox, sink)
}

#[test]
fn p4_nothing_leaves_before_its_epoch_has_committed() {
    let world = World::default();
    let (outbox, sink) = commit_outbox(&world);
    (0..3).for_each(|n| sink.emit(packet(n)));
    let first = outbox.close_epoch(Epoch(1), false);
    assert_eq!(first, (0..3).map(packet).collect::<Vec<_>>());
    (3..5).for_each(|n| sink.emit(packet(n)));
    let second = outbox.close_epoch(Epoch(2), false);
    assert_eq!(second, (3..5).map(packet).collect::<Vec<_>>());
    sink.emit(packet(5));

    // An emission of any of these would be seen by now: the emitting thread has nothing that it may send.
    assert!(outbox.wait_sent(soon()));
    assert_eq!((world.sequences(), outbox.released_up_to()), (vec![], None));

    outbox.committed(Epoch(1));
    assert!(outbox.wait_sent(soon()));
    assert_eq!((world.sequences(), outbox.released_up_to()), (vec![0, 1, 2], Some(2)));

    outbox.committed(Epoch(2));
    assert!(outbox.wait_sent(soon()));
    assert_eq!(world.sequences(), [0, 1, 2, 3, 4]);
    assert_eq!(outbox.facts().held_packets, 1, "the open epoch's packet is still held");
}

#[test]
fn p4_a_later_commit_covers_the_epochs_before_it_in_order() {
    let world = World::default();
    let (outbox, sink) = commit_outbox(&world);
    for epoch in 1..=3 {
        (0..2).for_each(|n| sink.emit(packet(epoch * 2 + n)));
        outbox.close_epoch(Epoch(epoch), false);
    }
    outbox.committed(Epoch(2));
    assert!(outbox.wait_sent(soon()));
    assert_eq!(world.sequences(), [2, 3, 4, 5]);
    outbox.committed(Epoch(3));
    assert!(outbox.wait_sent(soon()));
    assert_eq!(world.sequences(), [2, 3, 4, 5, 6, 7]);
}

#[test]
fn packets_that_arrive_out_of_order_leave_in_order() {
    let world = World::default();
    let (outbox, sink) = commit_outbox(&world);
    [1, 0, 3, 2].into_iter().for_each(|n| sink.emit(packet(n)));
    outbox.close_epoch(Epoch(1), false);
    sink.emit(packet(4));
    outbox.committed(Epoch(1));
    assert!(outbox.wait_sent(soon()));
    assert_eq!(world.sequences(), [0, 1, 2, 3]);
}

#[test]
fn p5_a_shut_gate_lets_nothing_out_even_if_it_commits() {
    let world = World::default();
    let (outbox, sink) = commit_outbox(&world);
    sink.emit(packet(0));
    outbox.close_epoch(Epoch(1), false);
    outbox.shut();
    assert!(outbox.wait_quiet(soon()));
    outbox.committed(Epoch(1));
    assert!(outbox.wait_sent(soon()), "shut: there is nothing that may leave");
    assert_eq!(world.sequences(), [0; 0]);
    assert_eq!(outbox.facts().held_packets, 1, "what is held stays");
    outbox.reopen();
    assert!(outbox.wait_sent(soon()));
    assert_eq!(world.sequences(), [0]);
}

#[test]
fn an_owner_lets_out_everything_that_was_held() {
    let world = World::default();
    let (outbox, sink) = commit_outbox(&world);
    sink.emit(packet(0));
    outbox.close_epoch(Epoch(1), false);
    sink.emit(packet(1));
    outbox.shut();
    outbox.open_for_good();
    sink.emit(packet(2));
    assert!(outbox.wait_sent(soon()));
    assert_eq!(world.sequences(), [0, 1, 2]);
}

#[test]
fn p7_a_full_outbox_has_no_room_and_says_when_it_has_again() {
    let world = World::default();
    for bounds in [Bounds { bytes: 1 << 20, packets: 3 }, Bounds { bytes: 24, packets: 1000 }] {
        let outbox = Outbox::commit(bounds, Box::new(world.clone())).expect("thread");
        let (sink, (told, tell)) = (outbox.sink(), channel());
        outbox.on_room(move || tell.send(()).expect("the test listens"));
        for n in 0..3 {
            assert!(sink.has_room(), "packet {n}");
            sink.emit(packet(n));
        }
        assert!(!sink.has_room());
        assert!(!outbox.wait_for_room(Deadline::after(Duration::from_millis(1))));
        outbox.close_epoch(Epoch(1), false);
        outbox.committed(Epoch(1));
        assert!(outbox.wait_for_room(soon()));
        told.recv_timeout(SOON).expect("woken");
        assert!(outbox.wait_sent(soon()));
        assert!(told.try_recv().is_err(), "told once: there was room ever after");
    }
}

fn channel() -> (crossbeam_channel::Receiver<()>, crossbeam_channel::Sender<()>) {
    let (tell, told) = crossbeam_channel::unbounded();
    (told, tell)
}

#[test]
fn a_world_that_is_away_for_a_while_gets_everything_in_order() {
    for shows_when_failing in [false, true] {
        let world = World { shows_when_failing, ..World::default() };
        world.broken.store(true, Ordering::SeqCst);
        let (outbox, sink) = commit_outbox(&world);
        (0..4).for_each(|n| sink.emit(packet(n)));
        outbox.close_epoch(Epoch(1), false);
        outbox.committed(Epoch(1));
        assert!(outbox.shared.wait(soon(), |state| state.failures >= 3), "tried again and again");
        assert_eq!(outbox.released_up_to(), None);
        world.broken.store(false, Ordering::SeqCst);
        assert!(outbox.wait_sent(soon()));
        let mut seen = world.sequences();
        seen.dedup();
        assert_eq!(seen, [0, 1, 2, 3]);
        assert_eq!(outbox.released_up_to(), Some(3));
    }
}

#[test]
fn under_lease_output_leaves_at_once_while_the_lease_is_good_and_waits_otherwise() {
    let world = World::default();
    let lease = Arc::new(SwitchableLease::default());
    let outbox =
        Outbox::lease(BOUNDS, Arc::clone(&lease) as Arc<dyn LeaseClock>, Box::new(world.clone())).expect("thread");
    let sink = outbox.sink();
    sink.emit(packet(0));
    assert!(outbox.wait_sent(soon()));
    assert_eq!(world.sequences(), [0; 0]);
    assert_eq!(outbox.close_epoch(Epoch(1), false), [packet(0)], "the record carries what has not left");
    lease.0.store(true, Ordering::SeqCst);
    assert!(outbox.shared.wait(soon(), |state| state.held.is_empty()));
    let asked = lease.1.load(Ordering::SeqCst);
    for n in 1..10 {
        sink.emit(packet(n));
        assert!(outbox.shared.wait(soon(), |state| state.held.is_empty()));
    }
    assert_eq!(world.sequences(), (0..10).collect::<Vec<_>>());
    assert!(lease.1.load(Ordering::SeqCst) >= asked + 9, "asked at every emission");
}

#[test]
fn whoever_waits_for_output_to_leave_is_told_when_it_may_not_any_more() {
    let world = World::default();
    world.broken.store(true, Ordering::SeqCst);
    let (outbox, sink) = commit_outbox(&world);
    sink.emit(packet(0));
    outbox.close_epoch(Epoch(1), false);
    outbox.committed(Epoch(1));
    assert!(outbox.shared.wait(soon(), |state| state.failures > 0));
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| outbox.wait_sent(soon()));
        outbox.shut();
        assert!(waiting.join().expect("no panic"));
    });
    assert!(begun.elapsed() < SOON, "it waited for its deadline");
}

#[test]
fn dropping_an_outbox_ends_its_thread() {
    let (outbox, sink) = commit_outbox(&World::default());
    sink.emit(packet(0));
    let shared = Arc::downgrade(&outbox.shared);
    drop((outbox, sink));
    assert!(shared.upgrade().is_none(), "the emitting thread has let go of it");
}

#[test]
fn resend_refuses_records_that_contradict_each_other_or_leave_a_gap() {
    let mut resend = Resend::new();
    resend.add(packet(4)).expect("new");
    resend.add(packet(4)).expect("the same again");
    let other = Packet { sequence: 4, bytes: vec![1] };
    assert_eq!(resend.add(other), Err(ResendError::Contradiction { sequence: 4, first_bytes: 8, second_bytes: 1 }));
    resend.add(packet(6)).expect("new");
    assert_eq!(resend.finish(), Err(ResendError::Gap { expected: 5, found: 6 }));

    let mut resend = Resend::new();
    resend.released(2);
    resend.add(packet(4)).expect("new");
    assert_eq!(resend.finish(), Err(ResendError::Gap { expected: 3, found: 4 }));
}

#[derive(Debug, Clone, Copy)]
enum Move {
    Emit,
    Close,
    /// A closed epoch's record becomes a commit in the source's ring.
    Commit,
    /// The destination hears of it.
    HearCommit,
    /// The world comes and goes.
    Break,
    Mend,
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let one = prop_oneof![
        4 => Just(Move::Emit),
        2 => Just(Move::Close),
        2 => Just(Move::Commit),
        2 => Just(Move::HearCommit),
        1 => Just(Move::Break),
        1 => Just(Move::Mend),
    ];
    prop::collection::vec(one, 0..60)
}

/// A record: its packets and what it says had left, and the guest's state (the number of its next packet).
struct Record {
    packets: Vec<Packet>,
    released_up_to: Option<u64>,
    next_sequence: u64,
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    /// The destination dies at any point; the source sends again and goes on with a guest that emits *other* bytes from there.
    #[test]
    fn p4_after_a_catch_there_is_no_gap_and_no_contradiction(moves in moves(), shows_when_failing: bool) {
        let world = World { shows_when_failing, ..World::default() };
        let (outbox, sink) = commit_outbox(&world);
        let (mut next, mut epoch, mut heard) = (0, 0, 0);
        let (mut records, mut committed) = (VecDeque::new(), Vec::<Record>::new());
        for step in moves {
            match step {
                Move::Emit => {
                    sink.emit(Packet { sequence: next, bytes: format!("destination {next}").into_bytes() });
                    next += 1;
                }
                Move::Close => {
                    epoch += 1;
                    let released_up_to = outbox.released_up_to();
                    records.push_back(Record { packets: outbox.close_epoch(Epoch(epoch), false), released_up_to, next_sequence: next });
                }
                Move::Commit => committed.extend(records.pop_front()),
                Move::HearCommit if heard < committed.len() as u64 => {
                    heard += 1;
                    outbox.committed(Epoch(heard));
                }
                Move::HearCommit => {}
                Move::Break => world.broken.store(true, Ordering::SeqCst),
                Move::Mend => world.broken.store(false, Ordering::SeqCst),
            }
        }
        drop(outbox);

        world.broken.store(false, Ordering::SeqCst);
        let mut resend = Resend::new();
        let mut resumed_at = 0;
        for record in committed {
            if let Some(released) = record.released_up_to {
                resend.released(released);
            }
            for packet in record.packets {
                resend.add(packet).expect("no contradiction");
            }
            resumed_at = record.next_sequence;
        }
        let source = Outbox::open(BOUNDS, Box::new(world.clone())).expect("thread");
        source.resend(resend.finish().expect("no gap"));
        for sequence in resumed_at..resumed_at + 3 {
            source.sink().emit(Packet { sequence, bytes: format!("source {sequence}").into_bytes() });
        }
        prop_assert!(source.wait_sent(soon()));

        let mut known = std::collections::BTreeMap::new();
        let mut high = None;
        for packet in lock(&world.seen).iter() {
            let first = known.entry(packet.sequence).or_insert_with(|| packet.bytes.clone());
            prop_assert_eq!(&*first, &packet.bytes, "packet {} contradicts itself", packet.sequence);
            prop_assert!(packet.sequence <= high.map_or(0, |high| high + 1), "a gap before {}", packet.sequence);
            high = high.max(Some(packet.sequence));
        }
        prop_assert_eq!(high, Some(resumed_at + 2));
    }
}

#[test]
fn p4_another_session_lets_out_what_the_source_has_and_holds_the_rest_for_its_first_record() {
    let world = World::default();
    let (outbox, sink) = commit_outbox(&world);
    (0..2).for_each(|n| sink.emit(packet(n)));
    outbox.close_epoch(Epoch(1), false);
    sink.emit(packet(2));
    outbox.close_epoch(Epoch(2), false);
    sink.emit(packet(3));
    outbox.shut();
    // Neither commit was reported, and the source has the first.
    outbox.reopen_epochs(Epoch(1));
    outbox.reopen();
    assert!(outbox.wait_sent(soon()));
    assert_eq!(world.sequences(), [0, 1]);
    assert_eq!(outbox.close_epoch(Epoch(2), false), [packet(2), packet(3)]);
    outbox.committed(Epoch(2));
    assert!(outbox.wait_sent(soon()));
    assert_eq!(world.sequences(), [0, 1, 2, 3]);
}

#[test]
fn p2_another_sessions_lease_takes_the_place_of_the_one_that_ran_out() {
    let world = World::default();
    let (old, new) = (Arc::new(SwitchableLease::default()), Arc::new(SwitchableLease::default()));
    let outbox = Outbox::lease(BOUNDS, old.clone(), Box::new(world.clone())).expect("thread");
    outbox.sink().emit(packet(0));
    outbox.renew_lease(new.clone());
    // The old one says nothing any more, whatever it says.
    old.0.store(true, Ordering::SeqCst);
    assert!(outbox.wait_sent(soon()), "nothing may leave");
    assert!(world.sequences().is_empty());
    new.0.store(true, Ordering::SeqCst);
    let deadline = soon();
    while world.sequences().is_empty() && !deadline.expired() {
        std::thread::yield_now();
    }
    assert_eq!(world.sequences(), [0]);
}

#[test]
fn p4_output_after_a_guest_flushed_leaves_once_its_disk_writes_are_durable() {
    let world = World::default();
    let (outbox, sink) = commit_outbox(&world);
    for (epoch, flushed) in [(1, false), (2, true), (3, false)] {
        sink.emit(packet(epoch));
        outbox.close_epoch(Epoch(epoch), flushed);
    }
    outbox.committed(Epoch(3));
    assert!(outbox.wait_sent(soon()));
    assert_eq!(world.sequences(), [1], "what came before the flush does not wait for it, and what came after does");
    outbox.applied(Epoch(1));
    assert!(outbox.wait_sent(soon()));
    assert_eq!(world.sequences(), [1]);
    // Another session begins meanwhile: what has committed is still waited for, and is in no record again.
    outbox.reopen_epochs(Epoch(3));
    sink.emit(packet(4));
    assert_eq!(outbox.close_epoch(Epoch(4), false), [packet(4)]);
    assert!(outbox.wait_sent(soon()));
    assert_eq!(world.sequences(), [1]);
    outbox.applied(Epoch(2));
    assert!(outbox.wait_sent(soon()));
    assert_eq!(world.sequences(), [1, 2, 3]);
    outbox.committed(Epoch(4));
    assert!(outbox.wait_sent(soon()));
    assert_eq!(world.sequences(), [1, 2, 3, 4]);
}
