//! The destination's side of ownership. The diagram is in [`super`].

use super::{Fate, Illegal, Named, OwnerEpoch};
use crate::mutation::{Mutation, mutated};
use serde::{Deserialize, Serialize};

/// Where the destination stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum State {
    /// Memory and VMM are made, state is loaded. `owner_epoch` is there once the source has said go.
    Preparing { owner_epoch: Option<OwnerEpoch>, all_landed: bool },
    /// The guest runs here and is checkpointed to the source.
    Tethered { owner_epoch: OwnerEpoch, all_landed: bool },
    /// Cut off: gate shut, guest stopped, memory kept.
    Fenced(Fenced),
    /// The guest is this host's own. Final.
    Owner,
    /// The guest never ran here. Final.
    Aborted,
    /// The source has the guest. Final.
    Retired,
    /// Neither host can run the guest. Final.
    Lost,
}

/// What a fenced destination knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Fenced {
    pub owner_epoch: OwnerEpoch,
    pub all_landed: bool,
    /// The fabric said that this session is revoked; the guest is given up as soon as it stands still.
    pub revoked: bool,
    /// The VMM has ended.
    pub guest_dead: bool,
    /// Somebody who must know said that the source will not come back.
    pub source_dead: bool,
    /// The arbiter was asked for the guest, and what it has made of that is not known.
    pub claiming: bool,
    /// The arbiter says that the source has taken the guest back.
    pub refused: bool,
}

/// What happens to a destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    /// The source says go: from here on the guest may run here.
    HandedOver { owner_epoch: OwnerEpoch },
    /// [`Action::ResumeGuest`] is done.
    GuestResumed,
    /// Preparing, loading or resuming failed, or the source called it off.
    PrepareFailed,
    /// The operator cancelled.
    Cancelled,
    /// The control connection or a lane ended without a word.
    ConnectionClosed,
    /// Every page is here.
    AllLanded,
    /// Policy or operator wants the tether ended.
    ReleaseWanted,
    /// The source has written the release down.
    ReleaseAcknowledged,
    /// The source has not.
    ReleaseRefused,
    /// The lease has run out by this host's own clock, counted from when it posted the renewal that succeeded.
    LeaseExpired,
    /// A commit failed or had no answer by its deadline.
    CommitFailed,
    /// The fabric says that the source has revoked this session.
    SourceRevoked,
    /// [`Action::StopGuest`] is done.
    GuestStopped,
    /// [`Action::StopGuest`] had no end by its deadline (a vCPU waits on a page that will not come).
    StopTimedOut,
    /// The VMM has ended (its pidfd says so).
    GuestDied,
    /// The source answers [`Action::AskFate`].
    FateAnswered(Fate),
    /// The operator, a fence hook or an arbiter says that the source will not come back.
    SourceDead,
    /// The operator gives the guest to this host, knowing that the source does not run it **and has not revoked**: a
    /// source that caught the guest, showed output and died after has left this host with a past that never was. Where there is an arbiter it
    /// has to agree.
    Promoted,
    /// As [`Event::Promoted`], whatever an arbiter says or fails to say.
    PromotedByForce,
    /// The source is lost, and this guest is to go on here where the arbiter agrees (never said where there is none).
    ContinueWanted,
    /// The arbiter says that the guest is this host's, for good; or there is no arbiter.
    ArbiterGranted,
    /// The arbiter says that the source has taken the guest back, for good.
    ArbiterRefused,
    /// The arbiter has not said. `untouched`: nor can it ever come to have granted what it was asked for; it has to be asked anew. Otherwise it
    /// is asked again until it says.
    ArbiterAway { untouched: bool },
}

/// What the destination is to do, in the order given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// Let the guest run; answered by [`Event::GuestResumed`], [`Event::PrepareFailed`] or [`Event::GuestDied`].
    ResumeGuest,
    /// Tell the source that the guest runs here.
    SendResumed,
    /// Tell the source that it will not.
    SendSwitchFailed,
    /// Take checkpoints from now on, over a session under this owner epoch.
    StartTether { owner_epoch: OwnerEpoch },
    /// Take no more checkpoints.
    StopTether,
    /// Let nothing out from here on, at once.
    ShutGate,
    /// Let out again what may leave (committed, or under a good lease).
    OpenGate,
    /// Let everything out, what is held first: nobody else can run this guest.
    OpenGateForGood,
    /// Stop the guest; answered by [`Event::GuestStopped`] or [`Event::StopTimedOut`].
    StopGuest,
    /// Keep guest RAM.
    KeepMemory,
    /// Ask the source, again and again with a deadline each, what became of the guest.
    AskFate { owner_epoch: OwnerEpoch },
    /// Tell the source that the guest's VMM has provably ended here.
    SendGuestGone,
    /// Ask the source to let go.
    AskRelease,
    /// Make the guest this host's at the arbiter, over the record that lends it to this host under `owner_epoch`; answered by
    /// [`Event::ArbiterGranted`], [`Event::ArbiterRefused`], or any number of [`Event::ArbiterAway`] before one of them.
    Claim { owner_epoch: OwnerEpoch },
    /// End the VMM and give its memory back.
    DiscardGuest,
    /// Tell the operator.
    Report(Named),
}

impl State {
    /// A destination that has just been asked to take a guest.
    pub fn new() -> Self {
        Self::Preparing { owner_epoch: None, all_landed: false }
    }

    /// Its name in the diagram.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Preparing { .. } => "Preparing",
            Self::Tethered { .. } => "Tethered",
            Self::Fenced(_) => "Fenced",
            Self::Owner => "Owner",
            Self::Aborted => "Aborted",
            Self::Retired => "Retired",
            Self::Lost => "Lost",
        }
    }
}

impl Default for State {
    fn default() -> Self {
        Self::new()
    }
}

impl Fenced {
    /// A destination that was just cut off and knows nothing more.
    pub fn new(owner_epoch: OwnerEpoch, all_landed: bool) -> Self {
        Self {
            owner_epoch,
            all_landed,
            revoked: false,
            guest_dead: false,
            source_dead: false,
            claiming: false,
            refused: false,
        }
    }
}

impl Event {
    /// Its name in the diagram.
    pub fn name(&self) -> &'static str {
        match self {
            Self::HandedOver { .. } => "HandedOver",
            Self::GuestResumed => "GuestResumed",
            Self::PrepareFailed => "PrepareFailed",
            Self::Cancelled => "Cancelled",
            Self::ConnectionClosed => "ConnectionClosed",
            Self::AllLanded => "AllLanded",
            Self::ReleaseWanted => "ReleaseWanted",
            Self::ReleaseAcknowledged => "ReleaseAcknowledged",
            Self::ReleaseRefused => "ReleaseRefused",
            Self::LeaseExpired => "LeaseExpired",
            Self::CommitFailed => "CommitFailed",
            Self::SourceRevoked => "SourceRevoked",
            Self::GuestStopped => "GuestStopped",
            Self::StopTimedOut => "StopTimedOut",
            Self::GuestDied => "GuestDied",
            Self::FateAnswered(_) => "FateAnswered",
            Self::SourceDead => "SourceDead",
            Self::Promoted => "Promoted",
            Self::PromotedByForce => "PromotedByForce",
            Self::ContinueWanted => "ContinueWanted",
            Self::ArbiterGranted => "ArbiterGranted",
            Self::ArbiterRefused => "ArbiterRefused",
            Self::ArbiterAway { .. } => "ArbiterAway",
        }
    }
}

type Step = (State, Vec<Action>);

/// The next state and what to do now. An event without meaning in `state` is an error and changes nothing; one that merely comes
/// late changes nothing either and is no error.
pub fn step(state: &State, event: &Event) -> Result<Step, Illegal> {
    let taken = match *state {
        State::Preparing { owner_epoch, all_landed } => preparing(owner_epoch, all_landed, event),
        State::Tethered { owner_epoch, all_landed } => tethered(owner_epoch, all_landed, event),
        State::Fenced(now) => fenced(now, event),
        State::Owner => owner(event),
        State::Aborted | State::Retired | State::Lost => over(state, event),
    };
    taken.ok_or_else(|| Illegal { role: "destination", state: state.name(), event: format!("{event:?}") })
}

fn preparing(owner_epoch: Option<OwnerEpoch>, all_landed: bool, event: &Event) -> Option<Step> {
    let stay = |actions| Some((State::Preparing { owner_epoch, all_landed }, actions));
    match *event {
        Event::HandedOver { owner_epoch: given } if owner_epoch.is_none() => {
            Some((State::Preparing { owner_epoch: Some(given), all_landed }, vec![Action::ResumeGuest]))
        }
        Event::GuestResumed => {
            let owner_epoch = owner_epoch?;
            let actions = vec![Action::OpenGate, Action::StartTether { owner_epoch }, Action::SendResumed];
            Some((State::Tethered { owner_epoch, all_landed }, actions))
        }
        Event::AllLanded => Some((State::Preparing { owner_epoch, all_landed: true }, vec![])),
        // The gate has been shut all along and no checkpoint was committed, so whatever the guest did here never was.
        Event::PrepareFailed
        | Event::Cancelled
        | Event::ConnectionClosed
        | Event::SourceRevoked
        | Event::GuestDied
        | Event::SourceDead => {
            let actions = vec![
                Action::ShutGate,
                Action::StopGuest,
                Action::SendSwitchFailed,
                Action::DiscardGuest,
                Action::Report(Named::Aborted),
            ];
            Some((State::Aborted, actions))
        }
        Event::Promoted | Event::PromotedByForce => stay(vec![Action::Report(Named::PagesMissing)]),
        _ => None,
    }
}

fn tethered(owner_epoch: OwnerEpoch, all_landed: bool, event: &Event) -> Option<Step> {
    let stay = |actions| Some((State::Tethered { owner_epoch, all_landed }, actions));
    let now = Fenced::new(owner_epoch, all_landed);
    match *event {
        Event::AllLanded => Some((State::Tethered { owner_epoch, all_landed: true }, vec![])),
        Event::ReleaseWanted if all_landed => stay(vec![Action::AskRelease]),
        Event::ReleaseWanted => stay(vec![Action::Report(Named::PagesMissing)]),
        Event::ReleaseRefused => stay(vec![Action::Report(Named::ReleaseRefused)]),
        Event::ReleaseAcknowledged | Event::ConnectionClosed
            if all_landed && (event == &Event::ReleaseAcknowledged || mutated(Mutation::EofIsRelease)) =>
        {
            let actions = vec![Action::StopTether, Action::OpenGateForGood, Action::Report(Named::Owner)];
            Some((State::Owner, actions))
        }
        Event::ConnectionClosed | Event::LeaseExpired | Event::CommitFailed => Some(fence(now)),
        Event::SourceRevoked => Some(fence(Fenced { revoked: true, ..now })),
        Event::GuestDied => Some(fence(Fenced { guest_dead: true, ..now })),
        Event::SourceDead => Some(fence(Fenced { source_dead: true, ..now })),
        // Late ends of a stop or a resume that this state has overtaken; a promotion while all is well changes nothing.
        Event::GuestResumed
        | Event::GuestStopped
        | Event::StopTimedOut
        | Event::FateAnswered(Fate::StillTethered)
        | Event::Promoted
        | Event::PromotedByForce
        | Event::ContinueWanted
        | Event::ArbiterAway { .. } => stay(vec![]),
        _ => None,
    }
}

/// Gate first: that is what keeps P2, and it takes no time.
fn fence(now: Fenced) -> Step {
    let mut actions = vec![Action::ShutGate, Action::StopTether];
    if now.guest_dead {
        actions.push(Action::SendGuestGone);
    } else {
        actions.push(Action::StopGuest);
    }
    actions.extend([Action::KeepMemory, Action::Report(Named::Fenced)]);
    if !now.revoked {
        actions.push(Action::AskFate { owner_epoch: now.owner_epoch });
    }
    (State::Fenced(now), actions)
}

fn fenced(mut now: Fenced, event: &Event) -> Option<Step> {
    let retire = || Some((State::Retired, vec![Action::DiscardGuest, Action::Report(Named::Retired)]));
    let mut actions = vec![];
    match *event {
        Event::AllLanded => now.all_landed = true,
        // Under a lease a source says so before it has claimed: what the arbiter makes of ours decides.
        Event::FateAnswered(Fate::Revoked) | Event::SourceRevoked if now.claiming => now.revoked = true,
        Event::FateAnswered(Fate::Revoked) | Event::SourceRevoked => return retire(),
        Event::GuestStopped | Event::StopTimedOut if now.revoked && !now.claiming => return retire(),
        Event::GuestStopped => {}
        Event::StopTimedOut => actions.push(Action::Report(Named::StopTimedOut)),
        // Once the arbiter may have given the guest to this host, a source that tethers it again could not catch it any more.
        Event::FateAnswered(Fate::StillTethered) if now.revoked || now.claiming => {}
        Event::FateAnswered(Fate::StillTethered) if now.guest_dead => actions.push(Action::SendGuestGone),
        Event::FateAnswered(Fate::StillTethered) => {
            let Fenced { owner_epoch, all_landed, .. } = now;
            let actions = vec![
                Action::OpenGate,
                Action::ResumeGuest,
                Action::StartTether { owner_epoch },
                Action::SendResumed,
                Action::Report(Named::TetheredAgain),
            ];
            return Some((State::Tethered { owner_epoch, all_landed }, actions));
        }
        // A source that releases was told that every page had landed; one that does so all the same breaks the protocol.
        Event::FateAnswered(Fate::Released) | Event::ReleaseAcknowledged if now.all_landed && !now.revoked => {
            return Some(if now.guest_dead { lose() } else { own() });
        }
        Event::Promoted | Event::PromotedByForce | Event::ContinueWanted if now.revoked || now.guest_dead => {
            actions.push(Action::Report(Named::Fenced));
        }
        Event::Promoted | Event::PromotedByForce | Event::ContinueWanted if !now.all_landed => {
            actions.push(Action::Report(Named::PagesMissing));
        }
        Event::PromotedByForce => return Some(own()),
        Event::ContinueWanted if mutated(Mutation::ContinuesUnasked) => return Some(own()),
        Event::Promoted | Event::ContinueWanted if now.refused => actions.push(Action::Report(Named::TakenBack)),
        Event::Promoted | Event::ContinueWanted if now.claiming => {}
        Event::Promoted | Event::ContinueWanted => {
            now.claiming = true;
            actions.push(Action::Claim { owner_epoch: now.owner_epoch });
        }
        // Its VMM may have died while the arbiter was asked: the source cannot have the guest any more.
        Event::ArbiterGranted if now.claiming => return Some(if now.guest_dead { lose() } else { own() }),
        Event::ArbiterRefused | Event::ArbiterAway { untouched: true } if now.claiming && now.revoked => {
            return retire();
        }
        Event::ArbiterRefused if now.claiming => {
            (now.claiming, now.refused) = (false, true);
            actions.push(Action::Report(Named::TakenBack));
        }
        Event::ArbiterAway { untouched } if now.claiming => {
            now.claiming = !untouched;
            actions.push(Action::Report(Named::AwaitingArbiter));
        }
        // Said twice, or of a claim that something else has overtaken.
        Event::ArbiterRefused | Event::ArbiterAway { .. } => {}
        Event::SourceDead => {
            now.source_dead = true;
            actions.push(Action::Report(if now.all_landed { Named::AwaitingPromotion } else { Named::PagesMissing }));
        }
        Event::GuestDied => {
            now.guest_dead = true;
            actions.push(Action::SendGuestGone);
        }
        Event::ReleaseRefused
        | Event::ReleaseWanted
        | Event::ConnectionClosed
        | Event::LeaseExpired
        | Event::CommitFailed => {}
        // A resume that was under way when the fence came down.
        Event::GuestResumed => actions.push(Action::StopGuest),
        _ => return None,
    }
    // Pages of the last operations may still land while the guest is being stopped, so this is not decided at the fence itself.
    let decides = matches!(event, Event::SourceDead | Event::GuestDied | Event::GuestStopped | Event::StopTimedOut);
    let cannot_run = now.guest_dead || !now.all_landed;
    if decides && now.source_dead && cannot_run && !now.revoked {
        return Some(lose());
    }
    Some((State::Fenced(now), actions))
}

fn own() -> Step {
    (State::Owner, vec![Action::OpenGateForGood, Action::ResumeGuest, Action::Report(Named::Owner)])
}

fn lose() -> Step {
    (State::Lost, vec![Action::KeepMemory, Action::Report(Named::Lost)])
}

/// Nothing the source says or fails to say matters any more.
fn owner(event: &Event) -> Option<Step> {
    match *event {
        Event::HandedOver { .. } | Event::PrepareFailed | Event::Cancelled => None,
        Event::ContinueWanted => None,
        // An owner is never revoked: a source that says so has broken its own record.
        Event::FateAnswered(Fate::Revoked) | Event::SourceRevoked => None,
        _ => Some((State::Owner, vec![])),
    }
}

/// A guest that is not ours any more must not start running because an order to run it was already on its way.
fn over(state: &State, event: &Event) -> Option<Step> {
    let actions = match *event {
        Event::GuestResumed => vec![Action::StopGuest],
        Event::HandedOver { .. } | Event::Promoted | Event::PromotedByForce | Event::ReleaseWanted => {
            vec![Action::Report(match state {
                State::Aborted => Named::Aborted,
                State::Retired => Named::Retired,
                _ => Named::Lost,
            })]
        }
        Event::ReleaseAcknowledged
        | Event::FateAnswered(Fate::Released)
        | Event::ContinueWanted
        | Event::ArbiterGranted => return None,
        _ => vec![],
    };
    Some((*state, actions))
}
