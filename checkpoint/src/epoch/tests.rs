//! What a tether promises, with a guest that runs meanwhile.

use super::heartbeat::Beats;
use super::model::*;
use super::*;
use crate::dirty::Harvested;
use crate::fold::{FoldConfig, FoldState, FoldTarget, Folder};
use crate::guest::{DirtyTracker, Guest, Packet, RamBlock, TrackerKind};
use crate::outbox::{Bounds, Emitter, Outbox};
use crate::policy::{Adaptive, Decision, EpochFacts, FixedPeriod, OnItsWay, Open, Policy};
use crate::record::{Limits, largest_record};
use crate::ring::{Mailbox, OwnerRegion, RingReader, RingShape, SEGMENTS_OFFSET};
use crate::staging::{Slot, Staging};
use crate::testing::*;
use belay_transport::Deadline;
use proptest::prelude::*;
use std::io;
use std::sync::Mutex;
use std::time::Instant;

const RING: usize = (SEGMENTS_OFFSET + 40 * 4224).next_multiple_of(4096);

/// The world: keeps what it is shown.
#[derive(Clone, Default)]
struct Witness(Arc<Mutex<Vec<Packet>>>);

impl Emitter for Witness {
    fn send(&mut self, packet: &Packet) -> io::Result<()> {
        self.0.lock().unwrap().push(packet.clone());
        Ok(())
    }
}

/// Every epoch that has committed.
#[derive(Default)]
struct Log(Mutex<Vec<EpochStats>>);

impl EpochObserver for Log {
    fn committed(&self, stats: &EpochStats) {
        self.0.lock().unwrap().push(*stats);
    }
}

/// Both hosts: the guest under tether here, the folder there.
struct Rig {
    wire: Wire,
    source: Vec<RamBlock>,
    folder: Folder,
    model: Model,
    tether: Tether,
    witness: Witness,
    outbox: Arc<Outbox>,
    log: Arc<Log>,
    pages: u64,
    _running: RunningGuest,
}

struct Setting {
    pages: u64,
    slot_bytes: usize,
    period: Duration,
    overflow: u64,
    step_time: Duration,
    config: TetherConfig,
    /// In place of the period.
    policy: Option<Box<dyn Policy>>,
}

impl Default for Setting {
    fn default() -> Self {
        let pages = 64;
        let overflow = largest_record(pages);
        let config = TetherConfig { commit_bound: Duration::from_secs(5), ..TetherConfig::default() };
        Self {
            pages,
            slot_bytes: 256 << 10,
            period: Duration::from_micros(300),
            overflow,
            step_time: Duration::ZERO,
            config,
            policy: None,
        }
    }
}

impl Setting {
    fn start(self) -> Rig {
        self.try_start(|guest| guest.tracker(TrackerKind::KvmRing).unwrap()).unwrap()
    }

    fn try_start(mut self, tracker: impl FnOnce(&mut Model) -> Box<dyn DirtyTracker>) -> Result<Rig, TetherError> {
        let mut wire = Wire::new(RING);
        let source = ram(&[self.pages as usize]);
        source[0].alias.write(0, &at_the_switch(self.pages));
        let target = FoldTarget::new(&source).unwrap();
        let limits = Limits::for_regions(target.regions().collect::<Vec<_>>());
        let state = FoldState::new(target, limits, 0u64.to_le_bytes().to_vec());
        let reader = RingReader::new(RING, NONCE, self.overflow as usize).unwrap();
        let folder =
            Folder::start(FoldConfig::default(), wire.ring(), OwnerRegion::new(wire.owner()), reader, state).unwrap();
        let witness = Witness::default();
        let bounds = Bounds { bytes: 1 << 20, packets: 500 };
        let outbox = Arc::new(Outbox::commit(bounds, Box::new(witness.clone())).unwrap());
        let (mut model, running) = Model::start(self.pages, self.step_time, outbox.sink());
        let shape = RingShape::of(RING).unwrap();
        let slots = [0, 1].map(|_| Slot::new(&mut wire, self.slot_bytes, shape).unwrap());
        let writer = wire.writer();
        self.config.overflow_bytes = self.overflow;
        let tracker = tracker(&mut model);
        let log = Arc::new(Log::default());
        let parts = TetherParts {
            guest: Box::new(model.clone()),
            tracker,
            arrivals: Box::new(model.clone()),
            policy: self.policy.unwrap_or(Box::new(FixedPeriod(self.period))),
            outbox: outbox.clone(),
            writer,
            slots,
            observer: log.clone(),
            carried: None,
        };
        let tether = Tether::start(self.config, parts)?;
        let pages = self.pages;
        Ok(Rig { wire, source, folder, model, tether, witness, outbox, log, pages, _running: running })
    }
}

impl Rig {
    /// Stops the folder, revokes, catches, and checks every byte and packet against what the model says they must be.
    fn catch_and_check(self) -> (Epoch, TetherEnd) {
        let Rig { wire, source, folder, tether, witness, outbox, pages, .. } = self;
        let recovered = folder.stop().finish(&wire.revoke()[..]).unwrap();
        let end = tether.stop().unwrap();
        assert!(recovered.epoch >= end.committed, "{} recovered, {} reported", recovered.epoch, end.committed);
        let steps = steps_of(&recovered.device_state);
        assert!(bytes_of(&source) == truth(pages, steps), "RAM of {} is not that of step {steps}", recovered.epoch);
        // The destination's outbox may still be emitting what has committed.
        assert!(outbox.wait_sent(soon()));
        let seen = witness.0.lock().unwrap();
        assert!(
            seen.iter().enumerate().all(|(at, packet)| *packet == packet_of(at as u64 + 1)),
            "a gap or a falsehood"
        );
        let covered = steps / STEPS_A_PACKET;
        assert!(seen.len() as u64 <= covered, "packet {} was seen, {} is recovered", seen.len(), covered);
        let again = &recovered.outputs_to_resend;
        assert!(again.iter().all(|packet| *packet == packet_of(packet.sequence)));
        let first = again.first().map_or(covered + 1, |packet| packet.sequence);
        assert!(first <= seen.len() as u64 + 1, "packet {first} is the first sent again, {} were seen", seen.len());
        assert_eq!(again.len() as u64, covered + 1 - first, "all from the first one on is sent again");
        (recovered.epoch, end)
    }

    fn commits(&self, epochs: u64) {
        assert!(self.tether.wait_committed(Epoch(epochs), soon()), "{:?}", self.tether.failed());
    }
}

#[test]
fn p3_p4_a_tethered_guest_is_caught_whole_whenever_its_source_takes_it_back() {
    for epochs in [1, 2, 7, 20] {
        let rig = Setting::default().start();
        rig.commits(epochs);
        let (epoch, end) = rig.catch_and_check();
        assert!(epoch >= Epoch(epochs));
        assert!(
            end.failed.is_some() == end.paused,
            "a tether that failed has stopped its guest, one that did not has not"
        );
    }
}

#[test]
fn p3_p5_a_tethered_guest_is_caught_whole_wherever_its_destination_dies() {
    for at in 0..24 {
        let rig = Setting { period: Duration::ZERO, ..Setting::default() }.start();
        rig.wire.dies_after(at * 31_337);
        assert!(rig.tether.wait_failed(soon()));
        let (_, end) = rig.catch_and_check();
        assert!(end.paused, "nothing it did from there on could be caught");
        assert!(matches!(end.failed.as_deref(), Some(TetherError::Ship { .. })), "{:?}", end.failed);
    }
}

/// Cuts a rig's session off after `life` bytes and goes on over another one.
fn over_another_session(rig: Rig, life: u64) -> Rig {
    over_another_session_with(rig, life, |_| ())
}

/// As above; `meanwhile` changes what is carried over.
fn over_another_session_with(rig: Rig, life: u64, meanwhile: impl FnOnce(&mut Harvested)) -> Rig {
    rig.wire.dies_after(life);
    assert!(rig.tether.wait_failed(soon()));
    let Rig { wire, source, folder, model, tether, witness, outbox, log, pages, _running } = rig;
    let mut end = tether.stop().unwrap();
    meanwhile(&mut end.uncommitted);
    let mut catch = folder.stop();
    let committed = catch.drain(&wire.ring_bytes()[..]).unwrap();
    assert!(committed >= end.committed, "{committed} is there, {} was reported", end.committed);
    let mut wire = Wire::new(RING);
    let (reader, state) = catch.next_session(RING, NONCE).unwrap();
    let owner = OwnerRegion::new(wire.owner());
    let folder = Folder::start(FoldConfig::default(), wire.ring(), owner, reader, state).unwrap();
    let shape = RingShape::of(RING).unwrap();
    let slots = [0, 1].map(|_| Slot::new(&mut wire, 256 << 10, shape).unwrap());
    outbox.reopen_epochs(committed);
    let parts = TetherParts {
        guest: end.guest,
        tracker: end.tracker,
        arrivals: end.arrivals,
        policy: Box::new(FixedPeriod(Duration::ZERO)),
        outbox: outbox.clone(),
        writer: wire.writer().going_on_from(committed),
        slots,
        observer: log.clone(),
        carried: Some(end.uncommitted),
    };
    let config = TetherConfig { overflow_bytes: largest_record(pages), ..Setting::default().config };
    let tether = Tether::start(config, parts).unwrap();
    let rig = Rig { wire, source, folder, model, tether, witness, outbox, log, pages, _running };
    rig.commits(committed.0 + 1);
    rig
}

#[test]
fn p3_p4_what_was_harvested_and_never_committed_is_in_the_next_sessions_first_record() {
    for at in 0..16 {
        let rig = Setting { period: Duration::ZERO, ..Setting::default() }.start();
        let rig = over_another_session(rig, at * 31_337);
        // Cut off again, sooner or later in the new one.
        let rig = over_another_session(rig, (16 - at) * 17_011);
        rig.catch_and_check();
    }
}

/// A tracker that notes which discards it is told of.
struct Told(Box<dyn DirtyTracker>, Arc<Mutex<Vec<u64>>>);

impl DirtyTracker for Told {
    fn kind(&self) -> TrackerKind {
        self.0.kind()
    }
    fn sees_device_writes(&self) -> bool {
        self.0.sees_device_writes()
    }
    fn start(&mut self) -> Result<(), GuestError> {
        self.0.start()
    }
    fn harvest(&mut self, into: &mut DirtySet) -> Result<(), GuestError> {
        self.0.harvest(into)
    }
    fn sift(&mut self, _: &mut DirtySet, discards: &DirtySet) -> Result<(), GuestError> {
        self.1.lock().unwrap().extend(discards.iter().map(|(_, page)| page.0));
        Ok(())
    }
    fn dirty_so_far(&mut self) -> Option<u64> {
        self.0.dirty_so_far()
    }
}

#[test]
fn p3_a_tracker_that_knows_contents_hears_of_what_was_given_up_between_two_sessions() {
    let heard = Arc::new(Mutex::new(Vec::new()));
    let noting = |guest: &mut Model| -> Box<dyn DirtyTracker> {
        Box::new(Told(guest.tracker(TrackerKind::KvmRing).unwrap(), Arc::clone(&heard)))
    };
    let rig = Setting { period: Duration::ZERO, ..Setting::default() }.try_start(noting).unwrap();
    let last = rig.pages - 1;
    heard.lock().unwrap().clear();
    let rig = over_another_session_with(rig, 31_337, |carried| {
        heard.lock().unwrap().clear();
        carried.dirty.retain(|_, page| page.0 != last);
        carried.discards.insert(RegionId(0), PageIndex(last));
    });
    assert!(heard.lock().unwrap().contains(&last), "it was told of {:?}", heard.lock().unwrap());
    drop(rig);
}

#[test]
fn an_epoch_larger_than_slot_and_ring_streams_through_them_with_the_guest_stopped() {
    let pages = 256;
    let overflow = largest_record(pages);
    let period = Duration::from_millis(2);
    let rig = Setting { pages, slot_bytes: 10 * 4224, period, overflow, ..Setting::default() }.start();
    let deadline = soon();
    while !rig.log.0.lock().unwrap().iter().any(|stats| stats.parts > 4 && stats.bytes > RING as u64) {
        assert!(!deadline.expired());
        std::thread::yield_now();
    }
    let (_, end) = rig.catch_and_check();
    assert!(end.stats.committed > 0 && end.stats.pause_ns.len() == end.stats.committed);
}

/// Holds the guest back after every epoch.
struct HoldsBack(Duration);

impl Policy for HoldsBack {
    fn next(&mut self, open: &Open, last: &EpochFacts) -> Decision {
        FixedPeriod(Duration::from_micros(300)).next(open, last)
    }
    fn hold_back(&mut self, _: &EpochFacts, _: OnItsWay) -> Duration {
        self.0
    }
}

/// As a setting, its tracker able to hold pages.
fn copying_on_write(mut setting: Setting) -> Rig {
    setting.config.staging = Staging::Cow;
    let rig = setting.try_start(|guest| {
        guest.world().holds = true;
        guest.tracker(TrackerKind::KvmRing).unwrap()
    });
    rig.unwrap()
}

#[test]
fn p3_p4_a_guest_that_runs_while_its_epochs_are_staged_is_caught_whole_wherever_its_destination_dies() {
    for at in 0..16 {
        let rig = copying_on_write(Setting { period: Duration::ZERO, ..Setting::default() });
        let log = rig.log.clone();
        rig.wire.dies_after(at * 31_337);
        assert!(rig.tether.wait_failed(soon()));
        let (_, end) = rig.catch_and_check();
        assert!(end.paused, "nothing it did from there on could be caught");
        for stats in &*log.0.lock().unwrap() {
            assert_eq!(stats.copied_on_write.is_some(), stats.pages > 0, "{stats:?}");
        }
    }
}

#[test]
fn p3_p4_what_was_held_when_a_session_ended_is_in_the_next_ones_first_record() {
    for at in 0..8 {
        let rig = copying_on_write(Setting { period: Duration::ZERO, ..Setting::default() });
        let rig = over_another_session(rig, at * 31_337);
        let rig = over_another_session(rig, (8 - at) * 17_011);
        rig.catch_and_check();
    }
}

#[test]
fn an_epoch_larger_than_its_slots_streams_through_them_with_the_guest_running() {
    let pages = 256;
    let setting = Setting {
        pages,
        slot_bytes: 16 * 4224,
        period: Duration::from_secs(100),
        overflow: largest_record(pages),
        ..Setting::default()
    };
    let rig = copying_on_write(setting);
    while rig.model.world().steps < 4 * pages {
        std::thread::yield_now();
    }
    rig.tether.checkpoint_now(soon()).unwrap();
    let first = rig.tether.stats().last;
    assert!(first.parts > 1 && first.pages > 200, "{first:?}");
    assert_eq!(first.copied_on_write, Some(0));
    assert!(rig.model.world().taken_running > 0, "it ran while its epoch was staged");
    rig.tether.checkpoint_now(soon()).unwrap();
    rig.catch_and_check();
}

#[test]
fn copying_on_write_is_refused_where_pages_cannot_be_held_or_the_guest_must_be_watched() {
    let start = |holds, overflow| {
        let mut setting = Setting { pages: 256, overflow, ..Setting::default() };
        setting.config.staging = Staging::Cow;
        let tracker = |guest: &mut Model| {
            guest.world().holds = holds;
            guest.tracker(TrackerKind::KvmRing).unwrap()
        };
        setting.try_start(tracker).map(drop)
    };
    let whole = largest_record(256);
    assert!(matches!(start(false, whole), Err(TetherError::CannotHold { watched: false, .. })));
    assert!(matches!(start(true, whole - 1), Err(TetherError::CannotHold { watched: true, .. })));
    start(true, whole).unwrap();
}

#[test]
fn a_guest_is_held_back_for_as_long_as_the_policy_says_and_its_checkpoints_commit_meanwhile() {
    let hold = Duration::from_millis(2);
    let rig = Setting { policy: Some(Box::new(HoldsBack(hold))), ..Setting::default() }.start();
    rig.commits(20);
    let held: Vec<Duration> = rig.log.0.lock().unwrap().iter().map(|stats| stats.held_back).collect();
    assert_eq!(held[0], Duration::ZERO, "it had not been held back before the first");
    assert!(held[1..].iter().all(|held| *held >= hold), "{held:?}");
    assert!(rig.tether.stats().held_back >= hold * 18);
    rig.catch_and_check();
}

#[test]
fn a_guest_that_is_held_back_for_long_is_let_go_when_its_tether_ends() {
    let policy: Option<Box<dyn Policy>> = Some(Box::new(HoldsBack(Duration::from_secs(3600))));
    let rig = Setting { policy, ..Setting::default() }.start();
    rig.commits(1);
    rig.catch_and_check();
}

#[test]
fn p3_p4_a_guest_under_the_adaptive_policy_is_caught_whole() {
    let policy: Option<Box<dyn Policy>> = Some(Box::new(Adaptive::new(Duration::from_millis(5))));
    let rig = Setting { policy, ..Setting::default() }.start();
    rig.commits(30);
    rig.catch_and_check();
}

#[test]
fn a_guest_that_does_not_stop_goes_on_and_is_asked_again() {
    let rig = Setting::default().start();
    rig.commits(1);
    rig.model.world().stubborn = 5;
    let committed = rig.tether.committed();
    rig.commits(committed.0 + 3);
    assert_eq!(rig.tether.stats().stop_timeouts, 5);
    let world = rig.model.world();
    assert!(world.prepared >= world.pauses + 5, "ready each time: {} for {}", world.prepared, world.pauses);
    drop(world);
    rig.catch_and_check();
}

#[test]
fn p7_a_guest_that_never_stops_ends_the_tether_by_name_and_keeps_running() {
    let rig = Setting::default().start();
    rig.commits(1);
    rig.model.world().stubborn = 1_000_000;
    assert!(rig.tether.wait_failed(soon()));
    let (_, end) = rig.catch_and_check();
    assert!(!end.paused);
    assert!(matches!(end.failed.as_deref(), Some(TetherError::StopTimedOut { tries: 20, .. })), "{:?}", end.failed);
}

#[test]
fn p7_a_guest_that_does_not_park_by_itself_is_stopped_when_the_outbox_is_full() {
    // No epoch for a minute by the policy: what leaves, leaves because the outbox had no room.
    let (period, step_time) = (Duration::from_secs(60), Duration::from_micros(20));
    let rig = Setting { period, step_time, ..Setting::default() }.start();
    rig.model.world().parks = false;
    // A guest's kind does not change while it runs, and the tether has begun to wait for one that parks.
    rig.tether.checkpoint_now(soon()).expect("committed");
    let prepared = rig.model.world().prepared;
    let end = soon();
    while rig.outbox.facts().sent_packets < 2_000 {
        assert!(!end.expired(), "{:?}", rig.outbox.facts());
        std::thread::yield_now();
    }
    assert_eq!(rig.model.world().prepared, prepared, "nobody would look at the outbox meanwhile");
    rig.catch_and_check();
}

#[test]
fn p7_a_source_that_takes_nothing_in_ends_the_tether_by_name_with_the_guest_stopped() {
    let mut setting = Setting::default();
    // Long enough for the first commit of a busy machine.
    setting.config.commit_bound = Duration::from_secs(2);
    let rig = setting.start();
    rig.commits(1);
    let Rig { folder, tether, model, .. } = rig;
    drop(folder);
    assert!(tether.wait_failed(soon()));
    let end = tether.stop().unwrap();
    assert!(end.paused && end.failed.is_some());
    let steps = model.world().steps;
    std::thread::yield_now();
    assert_eq!(model.world().steps, steps, "a stopped guest makes no step");
}

#[test]
fn a_checkpoint_taken_now_holds_all_that_was_done_before_it_was_asked_for() {
    let rig = Setting { period: Duration::from_secs(60), ..Setting::default() }.start();
    for _ in 0..5 {
        let steps = rig.model.world().steps;
        let epoch = rig.tether.checkpoint_now(soon()).expect("committed");
        assert_eq!(rig.tether.committed(), epoch);
        let status = rig.folder.wait_folded(epoch, soon());
        assert!(status.folded >= epoch && rig.model.world().steps >= steps);
    }
    assert!(rig.tether.quiesce(soon()));
    assert_eq!(rig.tether.committed(), Epoch(5));
    let before = rig.model.world().steps;
    let last = rig.tether.checkpoint_now(soon()).unwrap();
    let (epoch, end) = rig.catch_and_check();
    assert_eq!((epoch, end.committed), (last, last));
    assert!(before > 0);
}

#[test]
fn a_reservation_smaller_than_the_guest_closes_epochs_before_they_outgrow_it() {
    let overflow = largest_record(128);
    let (period, step_time) = (Duration::from_secs(60), Duration::from_micros(200));
    let rig = Setting { pages: 512, overflow, period, step_time, ..Setting::default() }.start();
    rig.commits(3);
    assert_eq!(rig.model.world().prepared, 0, "nobody would look at how much is dirty meanwhile");
    rig.catch_and_check();
}

#[test]
fn an_epoch_that_outgrew_the_reservation_all_the_same_ends_the_tether_by_name_and_the_one_before_is_caught() {
    // What a tracker says without a stop is a lower bound.
    let low = |guest: &mut Model| -> Box<dyn DirtyTracker> {
        Box::new(Blind(guest.tracker(TrackerKind::KvmRing).unwrap(), Some(0)))
    };
    let (pages, overflow) = (1024, largest_record(64));
    let rig =
        Setting { pages, overflow, period: Duration::from_secs(60), ..Setting::default() }.try_start(low).unwrap();
    while rig.outbox.facts().held_packets < 500 {
        std::thread::yield_now();
    }
    assert_eq!(rig.tether.checkpoint_now(soon()), None);
    let (epoch, end) = rig.catch_and_check();
    assert_eq!((epoch, end.paused), (Epoch(0), true));
    let cause = end.failed.unwrap();
    let TetherError::Stage { source: StageError::EpochTooLarge { .. }, .. } = &*cause else { panic!("{cause}") };
}

/// A tracker that cannot tell how much is dirty, or not well.
struct Blind(Box<dyn DirtyTracker>, Option<u64>);

impl DirtyTracker for Blind {
    fn kind(&self) -> TrackerKind {
        TrackerKind::KvmLog
    }
    fn sees_device_writes(&self) -> bool {
        false
    }
    fn start(&mut self) -> Result<(), GuestError> {
        self.0.start()
    }
    fn harvest(&mut self, into: &mut DirtySet) -> Result<(), GuestError> {
        self.0.harvest(into)
    }
    fn dirty_so_far(&mut self) -> Option<u64> {
        self.1
    }
}

#[test]
fn a_reservation_that_cannot_be_kept_to_is_refused_at_start() {
    let blind = |guest: &mut Model| -> Box<dyn DirtyTracker> {
        Box::new(Blind(guest.tracker(TrackerKind::KvmRing).unwrap(), None))
    };
    let setting = Setting { pages: 512, overflow: largest_record(128), ..Setting::default() };
    assert!(matches!(setting.try_start(blind).err(), Some(TetherError::OverflowUnwatched { .. })));
    let setting = Setting { pages: 512, overflow: 4096, ..Setting::default() };
    let none = setting.try_start(|guest| guest.tracker(TrackerKind::KvmRing).unwrap()).err();
    assert!(matches!(none, Some(TetherError::OverflowTooSmall { .. })));
}

#[test]
fn p4_no_packet_leaves_before_the_epoch_that_covers_it_has_committed() {
    let rig = Setting { period: Duration::from_secs(60), ..Setting::default() }.start();
    // The guest runs until its outbox has no more room: all of it is held.
    while rig.outbox.facts().held_packets < 500 {
        std::thread::yield_now();
    }
    assert!(rig.witness.0.lock().unwrap().is_empty());
    rig.tether.checkpoint_now(soon()).unwrap();
    let sent = Deadline::after(Duration::from_secs(20));
    while rig.witness.0.lock().unwrap().len() < 500 {
        assert!(!sent.expired());
        std::thread::yield_now();
    }
    rig.catch_and_check();
}

/// A guest that stands still, for the harvest rule and the cost of a pause.
struct Still {
    memory: Vec<RamBlock>,
    dirty: Vec<u64>,
    landed: Vec<bool>,
    device: Vec<u64>,
    discards: Vec<u64>,
    sees_devices: bool,
}

impl Guest for Still {
    fn pause(&mut self, _: Deadline) -> Result<(), GuestError> {
        Ok(())
    }
    fn resume(&mut self) -> Result<(), GuestError> {
        Ok(())
    }
    fn save(&mut self, _: &mut Vec<u8>) -> Result<(), GuestError> {
        Ok(())
    }
    fn load(&mut self, _: &[u8]) -> Result<(), GuestError> {
        Ok(())
    }
    fn set_incarnation(&mut self, _: u64) -> Result<(), GuestError> {
        Ok(())
    }
    fn memory(&self) -> &[RamBlock] {
        &self.memory
    }
    fn tracker(&mut self, kind: TrackerKind) -> Result<Box<dyn DirtyTracker>, GuestError> {
        Err(GuestError::NoTracker { kind, reason: "it stands still".into() })
    }
    fn device_writes(&mut self, into: &mut DirtySet) -> Result<(), GuestError> {
        self.device.iter().for_each(|&page| {
            into.insert(RegionId(0), PageIndex(page));
        });
        Ok(())
    }
}

struct Saw(Vec<u64>, bool);

impl DirtyTracker for Saw {
    fn kind(&self) -> TrackerKind {
        TrackerKind::KvmLog
    }
    fn sees_device_writes(&self) -> bool {
        self.1
    }
    fn start(&mut self) -> Result<(), GuestError> {
        Ok(())
    }
    fn harvest(&mut self, into: &mut DirtySet) -> Result<(), GuestError> {
        self.0.iter().for_each(|&page| {
            into.insert(RegionId(0), PageIndex(page));
        });
        Ok(())
    }
    fn dirty_so_far(&mut self) -> Option<u64> {
        None
    }
}

/// What has landed, what was discarded, and what may have been.
struct Arrived(Vec<bool>, Vec<u64>, Vec<u64>);

impl Arrivals for Arrived {
    fn landed(&self, _: RegionId, page: PageIndex) -> bool {
        self.0[page.0 as usize]
    }
    fn take_discards(&mut self, discards: &mut DirtySet, perhaps: &mut DirtySet) {
        let fill = |from: &mut Vec<u64>, into: &mut DirtySet| {
            from.drain(..).for_each(|page| {
                into.insert(RegionId(0), PageIndex(page));
            });
        };
        fill(&mut self.1, discards);
        fill(&mut self.2, perhaps);
    }
}

const STILL: u64 = 200;

proptest! {
    #[test]
    fn p8_the_harvest_is_what_was_written_and_landed_and_what_devices_wrote_and_what_was_discarded(
        dirty in prop::collection::vec(0..STILL, 0..80),
        device in prop::collection::vec(0..STILL, 0..20),
        discards in prop::collection::vec(0..STILL, 0..40),
        perhaps in prop::collection::vec(0..STILL, 0..10),
        landed in prop::collection::vec(any::<bool>(), STILL as usize),
        sees_devices in any::<bool>(),
    ) {
        let mut still = Still { memory: Vec::new(), dirty, landed, device, discards, sees_devices };
        let mut tracker = Saw(still.dirty.clone(), still.sees_devices);
        let mut arrived = Arrived(still.landed.clone(), still.discards.clone(), perhaps.clone());
        let (mut pages, mut gone) = (DirtySet::new([(RegionId(0), STILL)]), DirtySet::new([(RegionId(0), STILL)]));
        pages.insert(RegionId(0), PageIndex(1));
        gone.insert(RegionId(0), PageIndex(2));
        harvest(&mut still, &mut tracker, &mut arrived, &mut pages, &mut gone).unwrap();
        for page in 0..STILL {
            let by_device = !still.sees_devices && still.device.contains(&page);
            let written = still.dirty.contains(&page) && still.landed[page as usize] || by_device;
            let data = written || perhaps.contains(&page);
            prop_assert_eq!(pages.contains(RegionId(0), PageIndex(page)), data, "page {}", page);
            let discarded = still.discards.contains(&page) && !data;
            prop_assert_eq!(gone.contains(RegionId(0), PageIndex(page)), discarded, "discard of page {}", page);
        }
    }
}

#[test]
fn a_thousand_scattered_pages_are_harvested_and_staged_in_half_a_millisecond() {
    const PAGES: usize = 1_000;
    let memory = ram(&[16 * PAGES]);
    memory[0].alias.zero(0, memory[0].alias.len());
    let mut wire = Wire::new(16 << 20);
    let shape = RingShape::of(16 << 20).unwrap();
    let mut slot = Some(Slot::new(&mut wire, 8 << 20, shape).unwrap());
    let dirty: Vec<u64> = (0..PAGES as u64).map(|page| page * 16).collect();
    let landed = vec![true; 16 * PAGES];
    let sees_devices = true;
    let mut still =
        Still { memory: memory.clone(), dirty, landed, device: Vec::new(), discards: Vec::new(), sees_devices };
    let mut tracker = Saw(still.dirty.clone(), true);
    let mut arrived = Arrived(still.landed.clone(), Vec::new(), Vec::new());
    let (mut pages, mut gone) = (empty_set(&memory), empty_set(&memory));
    let (mut best, mut exchange) = (Duration::MAX, NoExchange);
    for epoch in 1..200 {
        let began = Instant::now();
        harvest(&mut still, &mut tracker, &mut arrived, &mut pages, &mut gone).unwrap();
        let mut stager =
            crate::staging::Stager::begin(slot.take().unwrap(), &mut exchange, Epoch(epoch), 1, 0, u64::MAX).unwrap();
        stager.pages(&mut pages, &memory).unwrap();
        slot = Some(stager.finish().unwrap().0);
        best = best.min(began.elapsed());
    }
    eprintln!("{PAGES} scattered pages harvested and staged in {best:?}");
    assert!(best < Duration::from_micros(500), "{best:?}");
}

struct NoExchange;

impl crate::staging::Exchange for NoExchange {
    fn exchange(&mut self, _: Slot) -> Result<Slot, StageError> {
        panic!("the epoch fits its slot");
    }
}

fn beating(wire: &mut Wire, lease: Duration) -> Heartbeat {
    let mailbox = Mailbox::new(wire).unwrap();
    let config = HeartbeatConfig { lease, ..HeartbeatConfig::default() };
    Heartbeat::start(wire.lane(), Wire::keys(), mailbox, config).unwrap()
}

fn source_folder(wire: &Wire, lease: Duration) -> Folder {
    let memory = ram(&[4]);
    let state = FoldState::new(FoldTarget::new(&memory).unwrap(), Limits::for_regions([(RegionId(0), 4)]), Vec::new());
    let reader = RingReader::new(RING, NONCE, 64 << 10).unwrap();
    let config = FoldConfig { lease, ..FoldConfig::default() };
    Folder::start(config, wire.ring(), OwnerRegion::new(wire.owner()), reader, state).unwrap()
}

#[test]
fn the_lease_lasts_while_the_source_grants_it_and_runs_out_by_itself() {
    // Long against what a busy machine keeps a thread waiting.
    let (mut wire, lease) = (Wire::new(RING), Duration::from_secs(1));
    let folder = source_folder(&wire, lease);
    let heart = beating(&mut wire, Duration::from_secs(60));
    assert!(heart.wait(soon(), |status| status.granted > 3));
    let clock = heart.lease();
    assert!(clock.valid());
    assert!(heart.lease_ends_at_ns() <= crate::clock::boottime_ns() + lease.as_nanos() as u64, "counted from posting");
    folder.set_granting(false);
    let deadline = soon();
    while clock.valid() {
        assert!(!deadline.expired(), "a lease that nobody grants runs out");
        std::thread::yield_now();
    }
    let counter = heart.status().counter;
    assert!(heart.wait(soon(), |status| status.counter > counter), "the heart beats on");
    assert!(!clock.valid());
}

#[test]
fn a_lease_is_never_longer_than_what_both_sides_said() {
    let mut wire = Wire::new(RING);
    let _folder = source_folder(&wire, Duration::from_secs(3600));
    let own = Duration::from_millis(50);
    let heart = beating(&mut wire, own);
    assert!(heart.wait(soon(), |status| status.granted > 0));
    assert!(heart.lease_ends_at_ns() <= crate::clock::boottime_ns() + own.as_nanos() as u64);
}

#[test]
fn a_lease_of_which_less_than_half_is_left_is_renewed_in_a_hurry_and_one_of_which_more_is_left_is_not() {
    let mut wire = Wire::new(RING);
    let (lease, interval) = (Duration::from_millis(200), Duration::from_millis(20));
    let _folder = source_folder(&wire, Duration::from_secs(3600));
    let mailbox = Mailbox::new(&mut wire).unwrap();
    let config = HeartbeatConfig { lease, interval, ..HeartbeatConfig::default() };
    let mut heart = Beats::new(wire.lane(), Wire::keys(), mailbox, config);
    let deadline = soon();
    let (mut calm, mut hurried) = (false, false);
    while !(calm && hurried) {
        assert!(!deadline.expired(), "calm: {calm}, hurried: {hurried}");
        // What it says holds for the whole time between two looks at the lease, however long this thread was kept waiting there.
        let before = heart.left();
        let says = heart.interval();
        let after = heart.left();
        if after * 2 > lease {
            assert_eq!(says, interval);
            calm = true;
        }
        if before * 2 < lease {
            assert!(says < interval, "{says:?} with {before:?} left");
            hurried = calm;
        }
        if before.is_zero() || !calm {
            heart.beat().unwrap();
        }
    }
}

#[test]
fn p5_the_heartbeat_ends_when_the_source_takes_the_session_back() {
    let mut wire = Wire::new(RING);
    let folder = source_folder(&wire, Duration::from_secs(1));
    let heart = beating(&mut wire, Duration::from_secs(1));
    assert!(heart.wait(soon(), |status| status.counter > 2));
    drop(folder);
    wire.revoke();
    heart.wait(soon(), |status| status.failed.is_some());
    assert!(matches!(heart.status().failed.as_deref(), Some(HeartbeatError::Fabric { .. })));
}

#[test]
fn a_grant_for_a_beat_that_was_never_sent_is_not_believed() {
    let mut wire = Wire::new(RING);
    OwnerRegion::new(wire.owner()).grant(1 << 40, Duration::from_secs(1));
    let heart = beating(&mut wire, Duration::from_secs(1));
    assert!(heart.wait(soon(), |status| status.failed.is_some()));
    assert!(!heart.lease().valid());
}
