//! The two hosts and what lies between them; what each action of a role does there.

use super::Ownership;
use crate::outbox::OutputMode;
use crate::ownership::{Fate, OwnerEpoch, destination, source};

/// What a role has before it: an action to carry out, or the answer of one that was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Todo<Action, Event> {
    Do(Action),
    Hear(Event),
}

/// Messages that were sent and can come from now on, as bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Messages(pub u16);

impl Messages {
    pub fn put(&mut self, at: u8) {
        self.0 |= 1 << at;
    }

    pub fn each(self) -> impl Iterator<Item = u8> {
        (0..16).filter(move |at| self.0 >> at & 1 == 1)
    }
}

/// Of the owner epoch before any catch: there is one migration.
pub const FIRST: OwnerEpoch = OwnerEpoch(0);

/// The arbiter's record: begins as lent, and changes once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Record {
    Lent,
    Source,
    Destination,
}

/// Who has asked the arbiter, by bit. A request that was sent can come at any time, also after whoever sent it has died.
pub const SOURCE_CLAIMS: u8 = 0;
pub const DESTINATION_CLAIMS: u8 = 1;

/// What the source can hear, by bit.
pub const TO_SOURCE: [source::Event; 7] = [
    source::Event::DestinationResumed,
    source::Event::SwitchFailed,
    source::Event::DeathProven,
    source::Event::ReleaseAsked { all_landed: true },
    source::Event::FateAsked { owner_epoch: FIRST },
    source::Event::ArbiterGranted,
    source::Event::ArbiterRefused,
];
const RESUMED: u8 = 0;
const SWITCH_FAILED: u8 = 1;
const GUEST_GONE: u8 = 2;
const RELEASE_ASKED: u8 = 3;
pub const FATE_ASKED: u8 = 4;
const HERE_GRANTED: u8 = 5;
const HERE_REFUSED: u8 = 6;

/// What the destination can hear, by bit.
pub const TO_DESTINATION: [destination::Event; 9] = [
    destination::Event::HandedOver { owner_epoch: FIRST },
    destination::Event::PrepareFailed,
    destination::Event::ReleaseAcknowledged,
    destination::Event::ReleaseRefused,
    destination::Event::FateAnswered(Fate::StillTethered),
    destination::Event::FateAnswered(Fate::Revoked),
    destination::Event::FateAnswered(Fate::Released),
    destination::Event::ArbiterGranted,
    destination::Event::ArbiterRefused,
];
const GO: u8 = 0;
const ABORT: u8 = 1;
const ACKNOWLEDGED: u8 = 2;
const REFUSED: u8 = 3;
const FATE: u8 = 4;
const THERE_GRANTED: u8 = 7;
const THERE_REFUSED: u8 = 8;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Gate {
    Shut,
    Ruled,
    ForGood,
}

/// A promise that an action has broken; those that a state can be asked about are in `check.rs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Broken {
    /// The ring was folded while it could be written.
    P5FoldedBeforeRevoked,
    /// A release was acknowledged that is not on disk.
    P6AcknowledgedTooEarly,
    /// A destination was told of a fate that is not so.
    P2ToldAFateThatIsNot,
    /// The end of an action had no meaning in the state that asked for it.
    AnswerWithoutMeaning,
}

/// The source: its process, what outlives it, its guest.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Source {
    pub state: source::State,
    /// Kept before each act it allows; what a next process starts from.
    pub kept: source::State,
    pub todo: Vec<Todo<source::Action, source::Event>>,
    /// Neither its host nor, where the guest ran here again, its process has died.
    pub up: bool,
    pub runs: bool,
    pub released: bool,
    /// The owner epoch that may commit into the ring.
    pub ring_open: Option<OwnerEpoch>,
    /// Outputs in committed records.
    pub placed: u8,
    /// Of those, in what was folded and loaded.
    pub recovered: Option<u8>,
    /// Committed outputs that were sent again.
    pub resent: bool,
    /// The guest has run here again and shown something that it never did at the destination.
    pub shown_new: bool,
    pub granting: bool,
    /// Ticks until lease and margin have passed since the last renewal seen, or the withdrawal.
    pub wait: u8,
    pub deaths_left: u8,
    pub failures_left: u8,
}

/// The destination: its process, its VMM, what outlives the process.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Destination {
    pub state: destination::State,
    pub todo: Vec<Todo<destination::Action, destination::Event>>,
    /// The process, which has the gate.
    pub up: bool,
    /// The VMM.
    pub vmm: bool,
    pub runs: bool,
    pub gate: Gate,
    pub tether: Option<OwnerEpoch>,
    /// Ticks of the lease that are left by this host's clock.
    pub lease: u8,
    pub all_landed: bool,
    /// What a next process finds: the guest was handed over, and whether it is this host's own.
    pub will: Option<bool>,
    /// Outputs that the guest has made, that are known here to have committed, and that were shown.
    pub made: u8,
    pub acked: u8,
    pub shown: u8,
    pub deaths_left: u8,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct World {
    pub source: Source,
    pub destination: Destination,
    pub to_source: Messages,
    pub to_destination: Messages,
    pub to_arbiter: Messages,
    /// What the arbiter has written; `None`: there is no arbiter.
    pub record: Option<Record>,
    /// A renewal that was granted and not read yet: ticks left of it, counted from when it was posted.
    pub grant: Option<u8>,
    pub broken: Option<Broken>,
}

impl World {
    pub fn new(model: &Ownership) -> Self {
        let state = source::State::new();
        let bounds = model.bounds;
        let mut world = Self {
            source: Source {
                state,
                kept: state,
                todo: vec![],
                up: true,
                runs: true,
                released: false,
                ring_open: Some(FIRST),
                placed: 0,
                recovered: None,
                resent: false,
                shown_new: false,
                granting: false,
                wait: 0,
                deaths_left: bounds.source_deaths,
                failures_left: bounds.catch_failures,
            },
            destination: Destination {
                state: destination::State::new(),
                todo: vec![],
                up: true,
                vmm: true,
                runs: false,
                gate: Gate::Shut,
                tether: None,
                lease: 0,
                all_landed: false,
                will: None,
                made: 0,
                acked: 0,
                shown: 0,
                deaths_left: bounds.destination_deaths,
            },
            to_source: Messages::default(),
            to_destination: Messages::default(),
            to_arbiter: Messages::default(),
            record: model.arbiter.then_some(Record::Lent),
            grant: None,
            broken: None,
        };
        world.at_source(source::Event::SwitchStarted { mode: model.mode });
        world
    }

    /// Whether `event` had a meaning at the source. One that has none changes nothing, as with the real role.
    pub fn at_source(&mut self, event: source::Event) -> bool {
        let here = &mut self.source;
        let Ok((next, actions)) = source::step(&here.state, &event) else { return false };
        here.state = next;
        // That the guest runs here is kept where it is let run.
        if !matches!(next, source::State::Running { .. }) {
            here.kept = next;
        }
        here.todo.splice(0..0, actions.into_iter().map(Todo::Do));
        self.source_hurries();
        true
    }

    /// A new process of the source goes on from what was kept.
    pub fn source_starts_again(&mut self) {
        let here = &mut self.source;
        // What was decided and not done is forgotten, and a guest that ran here has died with its process.
        here.todo.clear();
        here.runs = false;
        here.granting = false;
        if matches!(here.kept, source::State::Running { .. }) {
            here.up = false;
            return;
        }
        let (state, actions) = source::restart(&here.kept);
        here.state = state;
        here.kept = state;
        here.todo.extend(actions.into_iter().map(Todo::Do));
        self.source_hurries();
    }

    /// Does what nothing can tell apart from doing it later: what is sent may come at any time or never, and a report changes nothing.
    fn source_hurries(&mut self) {
        use source::Action;
        while let Some(&first) = self.source.todo.first() {
            match first {
                Todo::Hear(event) => {
                    self.source.todo.remove(0);
                    if !self.at_source(event) {
                        self.broken = Some(Broken::AnswerWithoutMeaning);
                    }
                    continue;
                }
                Todo::Do(Action::SendGo { .. }) => self.to_destination.put(GO),
                Todo::Do(Action::SendAbort) => self.to_destination.put(ABORT),
                Todo::Do(Action::RefuseRelease) => self.to_destination.put(REFUSED),
                Todo::Do(Action::AcknowledgeRelease) => {
                    if !self.source.released {
                        self.broken = Some(Broken::P6AcknowledgedTooEarly);
                    }
                    self.to_destination.put(ACKNOWLEDGED);
                }
                Todo::Do(Action::AnswerFate(fate)) => {
                    let so = match fate {
                        Fate::StillTethered => self.source.ring_open.is_some() && !self.source.released,
                        // Under a lease it is said as soon as the catch is ordered: whoever has claimed does not go by it.
                        Fate::Revoked => {
                            let about_to_be = matches!(self.source.state, source::State::Serving(_));
                            // By force; a claim of a destination that is no more can come to the arbiter after that.
                            let nobody_there = !self.destination.up && !self.destination.vmm;
                            let taken = nobody_there || self.record != Some(Record::Destination);
                            !self.source.released && (about_to_be || taken)
                        }
                        Fate::Released => self.source.released || self.record == Some(Record::Destination),
                    };
                    if !so {
                        self.broken = Some(Broken::P2ToldAFateThatIsNot);
                    }
                    self.to_destination.put(FATE + fate as u8);
                }
                Todo::Do(Action::Claim { .. }) if self.record.is_some() => self.to_arbiter.put(SOURCE_CLAIMS),
                Todo::Do(Action::Claim { .. }) => self.source.todo.push(Todo::Hear(source::Event::ArbiterGranted)),
                Todo::Do(Action::KeepMemory | Action::SeekDestination | Action::Report(_)) => {}
                Todo::Do(_) => return,
            }
            self.source.todo.remove(0);
        }
    }

    /// Whether the action before the source can fail.
    pub fn source_can_fail(&self) -> bool {
        use source::Action;
        match self.source.todo.first() {
            Some(Todo::Do(Action::SendSwitch | Action::RecordRelease)) => true,
            // A switch that is taken back lets the guest run on, and that is all.
            Some(Todo::Do(Action::Revoke { .. } | Action::FoldAndLoad | Action::ResumeGuest)) => {
                self.source.failures_left > 0 && matches!(self.source.state, source::State::Revoking { .. })
            }
            _ => false,
        }
    }

    /// Carries out the source's next action.
    pub fn source_acts(&mut self, model: &Ownership, fails: bool) {
        use source::{Action, Event};
        if self.source.todo.is_empty() {
            return;
        }
        let Todo::Do(action) = self.source.todo.remove(0) else { return };
        let here = &mut self.source;
        let wait = model.bounds.lease + model.bounds.margin;
        let answer = match action {
            Action::PauseGuest => {
                here.runs = false;
                None
            }
            Action::SendSwitch => Some(if fails { Event::SwitchFailed } else { Event::StateSent }),
            Action::GrantLease => {
                (here.granting, here.wait) = (true, wait);
                None
            }
            Action::WithdrawLease => {
                (here.granting, here.wait) = (false, wait);
                None
            }
            Action::Revoke { .. } | Action::FoldAndLoad | Action::ResumeGuest if fails => {
                here.failures_left -= 1;
                Some(Event::CatchFailed { can_retry: true })
            }
            Action::Revoke { .. } => {
                (here.ring_open, here.granting) = (None, false);
                Some(Event::Revoked)
            }
            Action::FoldAndLoad => {
                if here.ring_open.is_some() {
                    self.broken = Some(Broken::P5FoldedBeforeRevoked);
                }
                here.recovered = Some(here.placed);
                Some(Event::Folded)
            }
            Action::ResendOutput => {
                here.resent = true;
                None
            }
            Action::ResumeGuest => {
                here.kept = source::State::Running { owner_epoch: here.state.owner_epoch() };
                here.runs = true;
                Some(Event::GuestResumed)
            }
            Action::RecordRelease if fails => Some(Event::ReleaseFailed),
            Action::RecordRelease => {
                here.released = true;
                here.kept = source::State::Released { owner_epoch: here.state.owner_epoch() };
                Some(Event::ReleaseRecorded)
            }
            _ => unreachable!("{action:?} is done as soon as it is decided"),
        };
        self.source.todo.extend(answer.map(Todo::Hear));
        self.source_hurries();
    }

    /// As [`World::at_source`].
    pub fn at_destination(&mut self, event: destination::Event) -> bool {
        let there = &mut self.destination;
        let Ok((next, actions)) = destination::step(&there.state, &event) else { return false };
        there.state = next;
        if matches!(event, destination::Event::HandedOver { .. }) && there.will.is_none() {
            there.will = Some(false);
        }
        there.todo.splice(0..0, actions.into_iter().map(Todo::Do));
        self.destination_hurries();
        true
    }

    /// A new process of the destination adopts the VMM that the dead one left waiting: stopped, and nothing of it is shown.
    pub fn destination_taken_over(&mut self) {
        let there = &mut self.destination;
        let (Some(owned), true) = (there.will, there.vmm) else { return };
        there.up = true;
        let Destination { all_landed, .. } = *there;
        // The process before this one may have claimed.
        let claiming = self.record.is_some() && all_landed && !owned;
        let fenced = destination::Fenced { claiming, ..destination::Fenced::new(FIRST, all_landed) };
        there.state = destination::State::Fenced(fenced);
        if owned {
            self.at_destination(destination::Event::ReleaseAcknowledged);
        } else if claiming {
            self.to_arbiter.put(DESTINATION_CLAIMS);
        }
    }

    /// A claim comes to the arbiter: of all of them the first one has the guest. Whoever asks is answered, which can be lost.
    pub fn arbiter_hears(&mut self, claim: u8) {
        let mine = if claim == SOURCE_CLAIMS { Record::Source } else { Record::Destination };
        if self.record == Some(Record::Lent) {
            self.record = Some(mine);
        }
        let granted = self.record == Some(mine);
        match (claim, granted) {
            (SOURCE_CLAIMS, true) => self.to_source.put(HERE_GRANTED),
            (SOURCE_CLAIMS, false) => self.to_source.put(HERE_REFUSED),
            (_, true) => self.to_destination.put(THERE_GRANTED),
            (_, false) => self.to_destination.put(THERE_REFUSED),
        }
    }

    /// Whether a claim of the destination's can still come to the arbiter and be granted, or was.
    pub fn destination_may_own(&self) -> bool {
        let on_its_way = self.to_arbiter.each().any(|at| at == DESTINATION_CLAIMS);
        self.record == Some(Record::Destination) || (self.record == Some(Record::Lent) && on_its_way)
    }

    fn destination_hurries(&mut self) {
        use destination::Action;
        while let Some(&first) = self.destination.todo.first() {
            match first {
                Todo::Hear(event) => {
                    self.destination.todo.remove(0);
                    if !self.at_destination(event) {
                        self.broken = Some(Broken::AnswerWithoutMeaning);
                    }
                    continue;
                }
                Todo::Do(Action::SendResumed) => self.to_source.put(RESUMED),
                Todo::Do(Action::SendSwitchFailed) => self.to_source.put(SWITCH_FAILED),
                Todo::Do(Action::SendGuestGone) => self.to_source.put(GUEST_GONE),
                Todo::Do(Action::AskRelease) => self.to_source.put(RELEASE_ASKED),
                Todo::Do(Action::AskFate { .. }) => self.to_source.put(FATE_ASKED),
                Todo::Do(Action::KeepMemory | Action::Report(_)) => {}
                Todo::Do(_) => return,
            }
            self.destination.todo.remove(0);
        }
    }

    pub fn destination_can_fail(&self) -> bool {
        use destination::Action;
        match self.destination.todo.first() {
            Some(Todo::Do(Action::ResumeGuest)) => {
                matches!(self.destination.state, destination::State::Preparing { .. })
            }
            Some(Todo::Do(Action::StopGuest)) => self.destination.runs,
            Some(Todo::Do(Action::StartTether { .. })) => true,
            // It was not sent, which is known for certain only if none was ever sent.
            Some(Todo::Do(Action::Claim { .. })) => {
                self.record.is_some() && self.to_arbiter.each().all(|at| at != DESTINATION_CLAIMS)
            }
            _ => false,
        }
    }

    pub fn destination_acts(&mut self, fails: bool) {
        use destination::{Action, Event};
        if self.destination.todo.is_empty() {
            return;
        }
        let Todo::Do(action) = self.destination.todo.remove(0) else { return };
        let there = &mut self.destination;
        let answer = match action {
            Action::ResumeGuest if fails || !there.vmm => match there.state {
                destination::State::Preparing { .. } => Some(Event::PrepareFailed),
                _ => Some(Event::GuestDied),
            },
            Action::ResumeGuest => {
                there.runs = true;
                Some(Event::GuestResumed)
            }
            Action::StopGuest if fails => Some(Event::StopTimedOut),
            Action::StopGuest => {
                there.runs = false;
                Some(Event::GuestStopped)
            }
            Action::StartTether { .. } if fails => Some(Event::CommitFailed),
            Action::StartTether { owner_epoch } => {
                there.tether = Some(owner_epoch);
                // The source says with the session which epoch it has.
                if self.source.ring_open == there.tether {
                    there.acked = self.source.placed;
                }
                None
            }
            Action::StopTether => {
                there.tether = None;
                None
            }
            Action::ShutGate => {
                there.gate = Gate::Shut;
                None
            }
            Action::OpenGate => {
                there.gate = Gate::Ruled;
                None
            }
            Action::OpenGateForGood => {
                (there.gate, there.will) = (Gate::ForGood, Some(true));
                None
            }
            Action::DiscardGuest => {
                (there.runs, there.vmm) = (false, false);
                None
            }
            Action::Claim { .. } if self.record.is_none() => Some(Event::ArbiterGranted),
            Action::Claim { .. } if fails => Some(Event::ArbiterAway { untouched: true }),
            Action::Claim { .. } => {
                self.to_arbiter.put(DESTINATION_CLAIMS);
                None
            }
            _ => unreachable!("{action:?} is done as soon as it is decided"),
        };
        self.destination.todo.extend(answer.map(Todo::Hear));
        self.destination_hurries();
    }

    /// Whether a checkpoint of the destination can commit.
    pub fn can_commit(&self) -> bool {
        self.destination.up && self.destination.tether.is_some() && self.destination.tether == self.source.ring_open
    }

    /// How many outputs the destination may have shown by now; `None`: the gate is shut.
    pub fn may_show(&self, mode: OutputMode) -> Option<u8> {
        let there = &self.destination;
        match (there.up, there.gate, mode) {
            (false, ..) | (_, Gate::Shut, _) => None,
            (_, Gate::ForGood, _) => Some(there.made),
            (_, Gate::Ruled, OutputMode::Commit) => Some(there.acked),
            (_, Gate::Ruled, OutputMode::Lease) => (there.lease > 0).then_some(there.made),
        }
    }
}
