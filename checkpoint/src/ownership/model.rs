//! Two hosts, a network that loses, repeats and reorders, processes that die, and a world that remembers: the ownership functions
//! are driven through random histories, and whatever the history, P2, P4, P5 and P6 hold.
//!
//! The hosts here do what the actions say, one at a time and late, so that everything can happen between a decision and its effect.

use super::{Fate, OwnerEpoch, destination, source};
use crate::outbox::OutputMode;
use proptest::prelude::*;
use std::collections::{BTreeMap, VecDeque};

const LEASE: u64 = 3;
const MARGIN: u64 = 1;

#[derive(Debug, Clone, Copy, PartialEq)]
enum ToSource {
    Resumed,
    SwitchFailed,
    GuestGone,
    ReleaseAsked { all_landed: bool },
    FateAsked { owner_epoch: OwnerEpoch },
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum ToDestination {
    Go { owner_epoch: OwnerEpoch, next_output: u64 },
    Abort,
    Acknowledged,
    Refused,
    Fate(Fate),
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Gate {
    Shut,
    Ruled,
    ForGood,
}

/// An output: its number, and who produced it when, which stands for its bytes.
type Output = (u64, u64);

struct Model {
    mode: OutputMode,
    now: u64,
    made: u64,
    shown: BTreeMap<u64, u64>,

    source: source::State,
    source_todo: VecDeque<source::Action>,
    source_alive: bool,
    /// What the source kept last, for a process that takes over. It outlives the process that dies.
    kept: source::State,
    source_runs: bool,
    source_next: u64,
    source_resend: Vec<Output>,
    released: bool,
    granting: bool,
    /// When the source last saw a renewal or withdrew the lease.
    lease_seen: u64,
    /// The owner epoch that may commit into the ring, and what was committed: outputs and the number of the next one.
    ring_open_to: Option<OwnerEpoch>,
    ring: Vec<(Vec<Output>, u64)>,
    to_source: Vec<ToSource>,

    destination: destination::State,
    destination_todo: VecDeque<destination::Action>,
    destination_alive: bool,
    destination_runs: bool,
    destination_next: u64,
    open_epoch: Vec<Output>,
    cleared: VecDeque<Output>,
    gate: Gate,
    tether: Option<OwnerEpoch>,
    lease_until: u64,
    all_landed: bool,
    to_destination: Vec<ToDestination>,
}

impl Model {
    fn new(mode: OutputMode) -> Self {
        let mut model = Self {
            mode,
            now: 0,
            made: 0,
            shown: BTreeMap::new(),
            source: source::State::new(),
            source_todo: VecDeque::new(),
            source_alive: true,
            kept: source::State::new(),
            source_runs: true,
            source_next: 0,
            source_resend: vec![],
            released: false,
            granting: false,
            lease_seen: 0,
            ring_open_to: Some(OwnerEpoch(0)),
            ring: vec![],
            to_source: vec![],
            destination: destination::State::new(),
            destination_todo: VecDeque::new(),
            destination_alive: true,
            destination_runs: false,
            destination_next: 0,
            open_epoch: vec![],
            cleared: VecDeque::new(),
            gate: Gate::Shut,
            tether: None,
            lease_until: 0,
            all_landed: false,
            to_destination: vec![],
        };
        model.source_event(source::Event::SwitchStarted { mode });
        model
    }

    /// Whether the event had a meaning.
    fn source_event(&mut self, event: source::Event) -> bool {
        if !self.source_alive {
            return true;
        }
        let Ok((next, actions)) = source::step(&self.source, &event) else { return false };
        self.source = next;
        self.source_todo.extend(actions);
        // Kept before any of the actions; that the guest runs is kept by the action that lets it.
        if !matches!(next, source::State::Running { .. }) {
            self.kept = next;
        }
        true
    }

    /// SIGKILL, and a new process that takes over from what was kept.
    fn source_restarts(&mut self) {
        if !self.source_alive {
            return;
        }
        // What was decided and not done is forgotten; a guest that ran here has died.
        self.source_todo.clear();
        self.source_runs = false;
        self.granting = false;
        if matches!(self.kept, source::State::Running { .. }) {
            self.source_alive = false;
            return;
        }
        let (state, actions) = source::restart(&self.kept);
        self.source = state;
        self.kept = state;
        self.source_todo.extend(actions);
    }

    fn destination_event(&mut self, event: destination::Event) -> bool {
        if !self.destination_alive {
            return true;
        }
        let Ok((next, actions)) = destination::step(&self.destination, &event) else { return false };
        self.destination = next;
        self.destination_todo.extend(actions);
        true
    }

    /// Carries out the source's next action; `fails` where it can.
    fn source_acts(&mut self, fails: bool) {
        use source::{Action, Event};
        if !self.source_alive {
            return;
        }
        let Some(action) = self.source_todo.pop_front() else { return };
        let answered = match action {
            Action::PauseGuest => {
                self.source_runs = false;
                true
            }
            Action::SendSwitch if fails => self.source_event(Event::SwitchFailed),
            Action::SendSwitch => self.source_event(Event::StateSent),
            Action::SendGo { owner_epoch } => {
                self.to_destination.push(ToDestination::Go { owner_epoch, next_output: self.source_next });
                true
            }
            Action::SendAbort => self.say(ToDestination::Abort),
            Action::GrantLease => {
                self.granting = true;
                true
            }
            Action::WithdrawLease => {
                self.granting = false;
                self.lease_seen = self.now;
                true
            }
            Action::Revoke { .. } | Action::FoldAndLoad if fails => {
                self.source_event(Event::CatchFailed { can_retry: true })
            }
            Action::Revoke { owner_epoch } => {
                assert_eq!(owner_epoch, self.source.owner_epoch());
                self.ring_open_to = None;
                self.granting = false;
                self.source_event(Event::Revoked)
            }
            Action::FoldAndLoad => {
                assert_eq!(self.ring_open_to, None, "P5: folded before it was revoked");
                if let Some(&(_, next)) = self.ring.last() {
                    self.source_next = next;
                }
                // Kept until the guest runs: a death in between folds and sends it all again.
                self.source_resend = self.ring.iter().flat_map(|(outputs, _)| outputs.clone()).collect();
                self.source_event(Event::Folded)
            }
            Action::ResendOutput => {
                for output in std::mem::take(&mut self.source_resend) {
                    self.show(output);
                }
                true
            }
            Action::ResumeGuest => {
                assert!(!self.released, "P6: resumed after a recorded release");
                self.kept = self.source;
                if matches!(self.source, source::State::Revoking { .. }) {
                    self.kept = source::State::Running { owner_epoch: self.source.owner_epoch() };
                }
                self.source_runs = true;
                self.ring.clear();
                self.source_event(Event::GuestResumed)
            }
            Action::RecordRelease if fails => self.source_event(Event::ReleaseFailed),
            Action::RecordRelease => {
                self.released = true;
                // On disk, before anybody hears of it.
                self.kept = source::State::Released { owner_epoch: self.source.owner_epoch() };
                self.source_event(Event::ReleaseRecorded)
            }
            Action::AcknowledgeRelease => {
                assert!(self.released, "P6: acknowledged what is not on disk");
                self.say(ToDestination::Acknowledged)
            }
            Action::RefuseRelease => self.say(ToDestination::Refused),
            Action::AnswerFate(fate) => self.say(ToDestination::Fate(fate)),
            Action::KeepMemory | Action::SeekDestination | Action::Report(_) => true,
        };
        assert!(answered, "the end of {action:?} has no meaning in {:?}", self.source);
    }

    fn say(&mut self, message: ToDestination) -> bool {
        self.to_destination.push(message);
        true
    }

    fn destination_acts(&mut self, fails: bool) {
        use destination::{Action, Event};
        if !self.destination_alive {
            return;
        }
        let Some(action) = self.destination_todo.pop_front() else { return };
        let answered = match action {
            Action::ResumeGuest if fails && self.destination.name() == "Preparing" => {
                self.destination_event(Event::PrepareFailed)
            }
            Action::ResumeGuest => {
                self.destination_runs = true;
                self.destination_event(Event::GuestResumed)
            }
            Action::StopGuest if fails => self.destination_event(Event::StopTimedOut),
            Action::StopGuest => {
                self.destination_runs = false;
                self.destination_event(Event::GuestStopped)
            }
            Action::SendResumed => self.ask(ToSource::Resumed),
            Action::SendSwitchFailed => self.ask(ToSource::SwitchFailed),
            Action::SendGuestGone => self.ask(ToSource::GuestGone),
            Action::AskRelease => self.ask(ToSource::ReleaseAsked { all_landed: self.all_landed }),
            Action::AskFate { owner_epoch } => self.ask(ToSource::FateAsked { owner_epoch }),
            Action::StartTether { owner_epoch } => {
                self.tether = Some(owner_epoch);
                true
            }
            Action::StopTether => {
                self.tether = None;
                true
            }
            Action::ShutGate => self.set_gate(Gate::Shut),
            Action::OpenGate => self.set_gate(Gate::Ruled),
            Action::OpenGateForGood => self.set_gate(Gate::ForGood),
            Action::DiscardGuest => {
                self.destination_runs = false;
                true
            }
            Action::KeepMemory | Action::Report(_) => true,
        };
        assert!(answered, "the end of {action:?} has no meaning in {:?}", self.destination);
    }

    fn ask(&mut self, message: ToSource) -> bool {
        self.to_source.push(message);
        true
    }

    fn set_gate(&mut self, gate: Gate) -> bool {
        self.gate = gate;
        true
    }

    fn hear_at_source(&mut self, message: ToSource) {
        use source::Event;
        // A message may come twice or late, where it has no meaning; that the state stands then is all that is asked.
        self.source_event(match message {
            ToSource::Resumed => Event::DestinationResumed,
            ToSource::SwitchFailed => Event::SwitchFailed,
            ToSource::GuestGone => Event::DeathProven,
            ToSource::ReleaseAsked { all_landed } => Event::ReleaseAsked { all_landed },
            ToSource::FateAsked { owner_epoch } => Event::FateAsked { owner_epoch },
        });
    }

    fn hear_at_destination(&mut self, message: ToDestination) {
        use destination::Event;
        let before = self.destination.name();
        let event = match message {
            ToDestination::Go { owner_epoch, next_output } => {
                if self.destination.name() == "Preparing" && !self.destination_runs {
                    self.destination_next = next_output;
                }
                Event::HandedOver { owner_epoch }
            }
            ToDestination::Abort => Event::PrepareFailed,
            ToDestination::Acknowledged => Event::ReleaseAcknowledged,
            ToDestination::Refused => Event::ReleaseRefused,
            ToDestination::Fate(fate) => Event::FateAnswered(fate),
        };
        self.destination_event(event);
        if self.destination.name() == "Owner" && before != "Owner" {
            assert!(self.released && self.all_landed, "P6: an owner without a recorded release and every page");
        }
    }

    /// The world sees an output. Under `commit` it must be the one it saw before under this number, if it saw one, and the next one
    /// otherwise.
    fn show(&mut self, (number, made): Output) {
        if self.mode == OutputMode::Commit {
            let high = self.shown.keys().next_back().map_or(0, |last| last + 1);
            assert!(number <= high, "P4: output {number} leaves a gap after {high}");
            let first = *self.shown.entry(number).or_insert(made);
            assert_eq!(first, made, "P4: output {number} contradicts what was shown");
        }
    }

    fn produce(&mut self, number: u64) -> Output {
        self.made += 1;
        (number, self.made)
    }

    /// Whether the source may raise `LeaseRanOut`: silence while it grants, the time since the withdrawal once that is done.
    fn lease_wait_is_over(&self) -> bool {
        let pending = self.source_todo.contains(&source::Action::WithdrawLease);
        matches!(self.source.name(), "Serving" | "Resuming") && !pending && self.now >= self.lease_seen + LEASE + MARGIN
    }

    fn lease_is_good(&self) -> bool {
        self.now < self.lease_until
    }

    fn destination_shows(&mut self) {
        if !self.destination_alive {
            return;
        }
        let free = match (self.gate, self.mode) {
            (Gate::Shut, _) => return,
            (Gate::ForGood, _) => true,
            (Gate::Ruled, OutputMode::Commit) => false,
            (Gate::Ruled, OutputMode::Lease) => self.lease_is_good(),
        };
        if let Some(output) = self.cleared.pop_front() {
            self.show(output);
        } else if free && !self.open_epoch.is_empty() {
            let output = self.open_epoch.remove(0);
            self.show(output);
        }
    }

    fn can_commit(&self) -> bool {
        self.destination_alive && self.tether.is_some() && self.tether == self.ring_open_to && self.source_alive
    }

    /// One step of the history. `pick` chooses among messages, and whether what can fail does.
    fn step(&mut self, what: u8, pick: u8) {
        let fails = pick.is_multiple_of(5);
        let repeat = pick & 1 == 1;
        match what {
            0..=7 => self.source_acts(fails),
            8..=15 => self.destination_acts(fails),
            16..=21 => {
                if let Some(at) = choose(self.to_source.len(), pick) {
                    let message = if repeat { self.to_source[at] } else { self.to_source.remove(at) };
                    self.hear_at_source(message);
                }
            }
            22..=27 => {
                if let Some(at) = choose(self.to_destination.len(), pick) {
                    let message = if repeat { self.to_destination[at] } else { self.to_destination.remove(at) };
                    self.hear_at_destination(message);
                }
            }
            28 => {
                if let Some(at) = choose(self.to_source.len(), pick) {
                    self.to_source.remove(at);
                }
            }
            29 => {
                if let Some(at) = choose(self.to_destination.len(), pick) {
                    self.to_destination.remove(at);
                }
            }
            30..=32 if self.destination_runs && self.destination_alive => {
                let output = self.produce(self.destination_next);
                self.destination_next += 1;
                self.open_epoch.push(output);
            }
            33..=35 if self.can_commit() => {
                let outputs =
                    if self.mode == OutputMode::Commit { std::mem::take(&mut self.open_epoch) } else { vec![] };
                self.cleared.extend(&outputs);
                self.ring.push((outputs, self.destination_next));
            }
            36..=38 => self.destination_shows(),
            39..=40 if self.granting && self.source_alive && self.tether.is_some() && self.destination_alive => {
                self.lease_until = self.now + LEASE;
                self.lease_seen = self.now;
            }
            41..=43 => self.now += 1,
            44 if !self.lease_is_good() && self.destination.name() == "Tethered" => {
                self.destination_event(destination::Event::LeaseExpired);
            }
            45 if self.lease_wait_is_over() => {
                self.source_event(source::Event::LeaseRanOut);
            }
            46 => {
                self.source_event(source::Event::ConnectionClosed);
            }
            47 => {
                self.destination_event(destination::Event::ConnectionClosed);
            }
            // A sign may be false.
            48 if fails => {
                self.source_event(source::Event::DeathSign);
            }
            49 if !self.destination_alive => {
                self.source_event(source::Event::DeathProven);
            }
            50 if pick.is_multiple_of(2) => {
                self.source_event(source::Event::OperatorCatch);
            }
            51..=52 if self.tether.is_some() => {
                self.all_landed = true;
                self.destination_event(destination::Event::AllLanded);
            }
            53..=54 => {
                self.destination_event(destination::Event::ReleaseWanted);
            }
            55 if fails => {
                self.source_event(source::Event::Cancelled);
            }
            56 if self.tether.is_some() && self.tether != self.ring_open_to => {
                self.destination_event(destination::Event::SourceRevoked);
            }
            57 if fails => {
                self.destination_alive = false;
                self.destination_runs = false;
            }
            58 if pick == 0 => {
                self.source_alive = false;
                self.source_runs = false;
            }
            59 if !self.source_alive => {
                self.destination_event(destination::Event::SourceDead);
            }
            // Whoever promotes must know that the source had not taken the guest back before it died.
            60 if !self.source_alive && self.ring_open_to.is_some() => {
                self.destination_event(destination::Event::Promoted);
            }
            63 if pick.is_multiple_of(3) => self.source_restarts(),
            64 if self.source.name() == "Resuming" && fails => {
                self.source_event(source::Event::GraceRanOut);
            }
            61..=62 if self.source_runs => {
                let output = self.produce(self.source_next);
                self.source_next += 1;
                self.show(output);
            }
            _ => {}
        }
        self.check();
    }

    fn check(&self) {
        if self.source_runs {
            assert!(!self.released, "P6: the source runs a guest it has released");
            assert!(!(self.destination_alive && self.gate == Gate::ForGood), "P2: two owners");
            match self.mode {
                OutputMode::Commit => assert!(!self.can_commit(), "P2: the destination can still commit"),
                OutputMode::Lease => {
                    let shows = self.destination_alive && self.gate == Gate::Ruled && self.lease_is_good();
                    assert!(!shows, "P2: the destination can still show output");
                }
            }
        }
    }

    /// The network heals, everybody acts, the operator gives their word: every guest must come to rest with one owner.
    fn heal(&mut self) {
        self.now += LEASE + MARGIN;
        for _ in 0..200 {
            while !self.source_todo.is_empty() && self.source_alive {
                self.source_acts(false);
                self.check();
            }
            while !self.destination_todo.is_empty() && self.destination_alive {
                self.destination_acts(false);
                self.check();
            }
            for message in std::mem::take(&mut self.to_source) {
                self.hear_at_source(message);
            }
            for message in std::mem::take(&mut self.to_destination) {
                self.hear_at_destination(message);
            }
            match self.destination {
                destination::State::Fenced(fenced) if self.source_alive => {
                    self.to_source.push(ToSource::FateAsked { owner_epoch: fenced.owner_epoch });
                }
                _ if !self.destination_alive && self.source.name() == "Resuming" => {
                    self.source_event(source::Event::GraceRanOut);
                }
                destination::State::Tethered { .. } if self.source.name() != "Serving" => {
                    self.destination_event(destination::Event::ConnectionClosed);
                }
                destination::State::Preparing { .. } if self.source.name() != "Switching" => {
                    self.destination_event(destination::Event::ConnectionClosed);
                }
                destination::State::Aborted if self.source.name() == "Resuming" => {
                    self.source_event(source::Event::GraceRanOut);
                }
                _ => {}
            }
            if self.source.name() == "Switching" {
                self.source_event(source::Event::SwitchFailed);
            }
            if !self.destination_alive {
                self.source_event(source::Event::DeathProven);
            }
            if let source::State::Revoking { stuck: true, .. } = self.source {
                self.source_event(source::Event::OperatorCatch);
            }
            if let source::State::Serving(now) = self.source
                && now.catch_ordered
            {
                self.now = self.now.max(self.lease_seen + LEASE + MARGIN);
                if self.lease_wait_is_over() {
                    self.source_event(source::Event::LeaseRanOut);
                }
            }
            self.check();
        }
    }
}

fn choose(count: usize, pick: u8) -> Option<usize> {
    (count > 0).then(|| usize::from(pick) % count)
}

fn history() -> impl Strategy<Value = Vec<(u8, u8)>> {
    prop::collection::vec((0u8..65, any::<u8>()), 0..300)
}

fn play(mode: OutputMode, history: Vec<(u8, u8)>) -> Model {
    let mut model = Model::new(mode);
    for (what, pick) in history {
        model.step(what, pick);
    }
    model
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, ..ProptestConfig::default() })]

    #[test]
    fn p2_at_most_one_host_can_show_anything_new(lease: bool, history in history()) {
        play(if lease { OutputMode::Lease } else { OutputMode::Commit }, history);
    }

    #[test]
    fn p2_when_all_is_quiet_the_guest_has_exactly_one_home(lease: bool, history in history()) {
        let mut model = play(if lease { OutputMode::Lease } else { OutputMode::Commit }, history);
        model.heal();
        let (source, destination) = (model.source, model.destination);
        let here = model.source_runs && model.source_alive;
        let there = model.destination_runs && model.destination_alive;
        prop_assert!(!(here && there), "both run: {source:?} {destination:?}");
        if model.source_alive && model.destination_alive {
            prop_assert!(here || there, "nobody runs it: {source:?} {destination:?}");
        }
        if model.source_alive && !model.released {
            prop_assert!(here || there, "the source does not catch: {source:?} {destination:?}");
        }
    }
}

/// The histories above would prove little if they never got anywhere.
#[test]
fn the_histories_reach_every_end() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;
    let mut runner = TestRunner::deterministic();
    let mut ends: BTreeMap<(&str, &str), u32> = BTreeMap::new();
    for round in 0..4000 {
        let history = history().new_tree(&mut runner).expect("a history").current();
        let model = play(if round % 2 == 0 { OutputMode::Commit } else { OutputMode::Lease }, history);
        *ends.entry(("source", model.source.name())).or_default() += 1;
        *ends.entry(("destination", model.destination.name())).or_default() += 1;
    }
    for wanted in ["Running", "Serving", "Revoking", "Released"] {
        assert!(ends.contains_key(&("source", wanted)), "no history ends with the source {wanted}: {ends:?}");
    }
    for wanted in ["Tethered", "Fenced", "Owner", "Aborted", "Retired", "Lost"] {
        assert!(ends.contains_key(&("destination", wanted)), "no history ends with the destination {wanted}: {ends:?}");
    }
}
