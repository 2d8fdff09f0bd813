//! The source's side of ownership. The diagram is in [`super`].

use super::{Fate, Illegal, Named, OwnerEpoch};
use crate::mutation::{Mutation, mutated};
use crate::outbox::OutputMode;
use serde::{Deserialize, Serialize};

/// Where the source stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum State {
    /// The guest runs here.
    Running { owner_epoch: OwnerEpoch },
    /// The guest is paused; its state goes to the destination. Once `handed_over`, the destination may already run.
    Switching { mode: OutputMode, owner_epoch: OwnerEpoch, handed_over: bool },
    /// The guest runs at the destination, pages are served, checkpoints come in.
    Serving(Serving),
    /// This process took over from one that died. Who has the guest is not known yet, and it is not taken back yet.
    Resuming(Resuming),
    /// The guest is being taken back.
    Revoking { owner_epoch: OwnerEpoch, step: CatchStep, stuck: bool },
    /// A release was written down and fsynced. Final.
    Released { owner_epoch: OwnerEpoch },
    /// Neither host can run the guest. Final.
    Lost { owner_epoch: OwnerEpoch },
    /// The arbiter says that the destination has made the guest its own, under this owner epoch. Final.
    Ceded { owner_epoch: OwnerEpoch },
}

/// What the source knows while it serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Serving {
    pub mode: OutputMode,
    pub owner_epoch: OwnerEpoch,
    pub lease: Lease,
    /// A death sign, a closed connection or silence was seen, and the destination has not come back since.
    pub failed: bool,
    /// The destination's VMM has provably ended (pidfd on that host, or a fence hook that succeeded).
    pub death_proven: bool,
    /// The operator ordered a catch.
    pub catch_ordered: bool,
    /// A release is being written; whether it is on disk is not known until its event says so, and until then nothing is caught.
    pub recording_release: bool,
}

/// What a source knows that has been started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Resuming {
    pub mode: OutputMode,
    pub owner_epoch: OwnerEpoch,
    /// Any lease that the process before this one can have granted has run out.
    pub lease_ran_out: bool,
}

/// The lease by which the destination may show output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Lease {
    /// Renewals are granted.
    Granted,
    /// No more renewals; one granted before may still be good.
    Withdrawn,
    /// Lease, drift and margin have passed since the last one could have been granted.
    RanOut,
}

/// The steps of a catch, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum CatchStep {
    /// Until [`Event::Revoked`] the destination may still commit.
    Revoke,
    /// Committed checkpoints go into guest RAM, the newest one's device state into the VMM.
    Fold,
    /// Committed output goes out again, then the guest runs.
    Resume,
    /// The first of them: until the arbiter says that the guest is this host's, the destination may make it its own. Where there is no
    /// arbiter it is so at once.
    Claim,
}

/// What happens to a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    /// Somebody wants the guest moved.
    SwitchStarted { mode: OutputMode },
    /// All of [`Action::SendSwitch`] has been sent, and the destination answered that it can resume.
    StateSent,
    /// The destination says its guest runs.
    DestinationResumed,
    /// The switch failed, or its deadline has passed.
    SwitchFailed,
    /// The operator cancelled the switch.
    Cancelled,
    /// The guard beside the destination's VMM says that it is dying. A sign, not a proof.
    DeathSign,
    /// The control connection or a lane ended without a word.
    ConnectionClosed,
    /// While renewals are granted: lease, drift and margin have passed since the last change seen of the destination's heartbeat.
    /// Once [`Action::WithdrawLease`] has been carried out: they have passed since then, whatever the heartbeat did. Counted anew
    /// after a stall of our own.
    LeaseRanOut,
    /// The operator wants the guest back here. Under `lease` this is also their word that the destination shows nothing more.
    OperatorCatch,
    /// The destination's VMM has ended: its pidfd, seen on that host, or a fence hook says so.
    DeathProven,
    /// [`Action::Revoke`] is done: nothing of the old session can commit or be taken into guest memory.
    Revoked,
    /// [`Action::FoldAndLoad`] is done.
    Folded,
    /// A step of the catch failed. `can_retry`: nothing was lost by it.
    CatchFailed { can_retry: bool },
    /// [`Action::ResumeGuest`] is done.
    GuestResumed,
    /// The destination asks to be let go, and says whether it has every page.
    ReleaseAsked { all_landed: bool },
    /// [`Action::RecordRelease`] is done: the record is on disk.
    ReleaseRecorded,
    /// [`Action::RecordRelease`] failed and the record is *known* not to be on disk.
    ReleaseFailed,
    /// A fenced destination asks, over a new connection, what became of the guest it had under `owner_epoch`. Once it was answered
    /// that it is still tethered, the end of its earlier connections is no event any more.
    FateAsked { owner_epoch: OwnerEpoch },
    /// The destination has been looked for as long as it was to be ([`Action::SeekDestination`]).
    GraceRanOut,
    /// The arbiter says that the guest is this host's, for good; or there is no arbiter.
    ArbiterGranted,
    /// The arbiter says that the guest is the destination's, for good.
    ArbiterRefused,
    /// The arbiter has not said, yet. It is asked again.
    ArbiterAway,
    /// The operator's word that the destination neither has the guest nor ever will, in place of an arbiter that does not answer.
    CatchByForce,
}

/// What the source is to do, in the order given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// Stop the guest.
    PauseGuest,
    /// Send device state and switch map; answered by [`Event::StateSent`] or [`Event::SwitchFailed`].
    SendSwitch,
    /// Send the word on which the destination resumes.
    SendGo { owner_epoch: OwnerEpoch },
    /// Tell the destination that the switch is off.
    SendAbort,
    /// Grant the lease from now on.
    GrantLease,
    /// Grant no more renewals; answered by [`Event::LeaseRanOut`] in time.
    WithdrawLease,
    /// Make the guest this host's at the arbiter, over the record that lends it to the destination; answered by [`Event::ArbiterGranted`],
    /// [`Event::ArbiterRefused`], or any number of [`Event::ArbiterAway`] before one of them.
    Claim { owner_epoch: OwnerEpoch },
    /// Shut the old session out, grant it no more renewals, and bump the owner epoch to this; answered by [`Event::Revoked`] or [`Event::CatchFailed`].
    Revoke { owner_epoch: OwnerEpoch },
    /// Read the ring for the last time, fold, load; answered by [`Event::Folded`] or [`Event::CatchFailed`].
    FoldAndLoad,
    /// Send committed output that is not known to have left (P4).
    ResendOutput,
    /// Let the guest run; answered by [`Event::GuestResumed`] or [`Event::CatchFailed`].
    ResumeGuest,
    /// Write down, fsynced, that this guest is never resumed here; answered by [`Event::ReleaseRecorded`] or
    /// [`Event::ReleaseFailed`].
    RecordRelease,
    /// Tell the destination that the guest is its own.
    AcknowledgeRelease,
    /// Tell the destination that it is not.
    RefuseRelease,
    /// Answer a fenced destination. That it is still tethered is answered over the session that asked, which then is the one that
    /// serves; where that fails it answers with [`Event::ConnectionClosed`].
    AnswerFate(Fate),
    /// Dial the destination, again and again, until it has come back; answered by [`Event::FateAsked`] or [`Event::GraceRanOut`].
    SeekDestination,
    /// Keep guest RAM and ring as they are.
    KeepMemory,
    /// Tell the operator.
    Report(Named),
}

impl State {
    /// A source whose guest has never been moved.
    pub fn new() -> Self {
        Self::Running { owner_epoch: OwnerEpoch(0) }
    }

    /// Its name in the diagram.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Running { .. } => "Running",
            Self::Switching { .. } => "Switching",
            Self::Serving(_) => "Serving",
            Self::Resuming(_) => "Resuming",
            Self::Revoking { .. } => "Revoking",
            Self::Released { .. } => "Released",
            Self::Lost { .. } => "Lost",
            Self::Ceded { .. } => "Ceded",
        }
    }

    /// The current owner epoch.
    pub fn owner_epoch(&self) -> OwnerEpoch {
        match *self {
            Self::Running { owner_epoch }
            | Self::Switching { owner_epoch, .. }
            | Self::Revoking { owner_epoch, .. }
            | Self::Released { owner_epoch }
            | Self::Lost { owner_epoch }
            | Self::Ceded { owner_epoch } => owner_epoch,
            Self::Serving(serving) => serving.owner_epoch,
            Self::Resuming(resuming) => resuming.owner_epoch,
        }
    }
}

impl Default for State {
    fn default() -> Self {
        Self::new()
    }
}

impl Event {
    /// Its name in the diagram.
    pub fn name(&self) -> &'static str {
        match self {
            Self::SwitchStarted { .. } => "SwitchStarted",
            Self::StateSent => "StateSent",
            Self::DestinationResumed => "DestinationResumed",
            Self::SwitchFailed => "SwitchFailed",
            Self::Cancelled => "Cancelled",
            Self::DeathSign => "DeathSign",
            Self::ConnectionClosed => "ConnectionClosed",
            Self::LeaseRanOut => "LeaseRanOut",
            Self::OperatorCatch => "OperatorCatch",
            Self::DeathProven => "DeathProven",
            Self::Revoked => "Revoked",
            Self::Folded => "Folded",
            Self::CatchFailed { .. } => "CatchFailed",
            Self::GuestResumed => "GuestResumed",
            Self::ReleaseAsked { .. } => "ReleaseAsked",
            Self::ReleaseRecorded => "ReleaseRecorded",
            Self::ReleaseFailed => "ReleaseFailed",
            Self::FateAsked { .. } => "FateAsked",
            Self::GraceRanOut => "GraceRanOut",
            Self::ArbiterGranted => "ArbiterGranted",
            Self::ArbiterRefused => "ArbiterRefused",
            Self::ArbiterAway => "ArbiterAway",
            Self::CatchByForce => "CatchByForce",
        }
    }
}

type Step = (State, Vec<Action>);

/// The next state and what to do now. An event without meaning in `state` is an error and changes nothing; one that merely comes
/// late (a death sign during the catch it began) changes nothing either and is no error.
pub fn step(state: &State, event: &Event) -> Result<Step, Illegal> {
    let taken = match *state {
        State::Running { owner_epoch } => running(owner_epoch, event),
        State::Switching { mode, owner_epoch, handed_over } => switching(mode, owner_epoch, handed_over, event),
        State::Serving(now) => serving(now, event),
        State::Resuming(now) => resuming(now, event),
        State::Revoking { owner_epoch, step, stuck } => revoking(owner_epoch, step, stuck, event),
        State::Released { .. } => released(state, event),
        State::Lost { .. } => lost(state, event),
        State::Ceded { .. } => ceded(state, event),
    };
    taken.ok_or_else(|| Illegal { role: "source", state: state.name(), event: format!("{event:?}") })
}

/// Where a process goes on that takes over from one that died, given the state that was kept last. What was kept came before each act
/// it allowed, so nothing has happened beyond it.
///
/// * A guest that ran here died with its process: [`State::Running`] stays and asks nothing. It is kept before the guest is let run.
/// * A switch of which the destination has not heard *go* is caught like any other: it can have done nothing. So is one under `lease`
///   that has, because no lease is granted before it says that it runs.
/// * A catch begins anew, with the claim if that was not answered: claiming, revoking and folding twice come to the same.
/// * A release stands: nothing here resumes the guest; the destination is told if it has not heard.
pub fn restart(state: &State) -> Step {
    let resume = |mode, owner_epoch| {
        let now = Resuming { mode, owner_epoch, lease_ran_out: false };
        let actions = vec![Action::WithdrawLease, Action::Report(Named::Resuming), Action::SeekDestination];
        (State::Resuming(now), actions)
    };
    match *state {
        State::Switching { mode: OutputMode::Commit, owner_epoch, handed_over: true } => {
            resume(OutputMode::Commit, owner_epoch)
        }
        State::Switching { owner_epoch, .. } => begin_catch(owner_epoch),
        State::Serving(Serving { owner_epoch, death_proven: true, .. }) => begin_catch(owner_epoch),
        // The destination may have been told already that there is no way back.
        State::Serving(before) if before.catch_ordered => {
            let now = Serving { lease: Lease::Withdrawn, recording_release: false, ..before };
            settle(&Serving { catch_ordered: false, ..now }, now, vec![Action::WithdrawLease])
        }
        State::Serving(Serving { mode, owner_epoch, .. }) => resume(mode, owner_epoch),
        State::Resuming(Resuming { mode, owner_epoch, .. }) => resume(mode, owner_epoch),
        State::Revoking { owner_epoch, step: CatchStep::Claim, .. } => claim(owner_epoch),
        State::Revoking { owner_epoch, .. } => {
            let state = State::Revoking { owner_epoch, step: CatchStep::Revoke, stuck: false };
            (state, vec![Action::Revoke { owner_epoch }, Action::Report(Named::Catching)])
        }
        State::Released { .. } => (*state, vec![Action::SeekDestination]),
        State::Running { .. } | State::Lost { .. } | State::Ceded { .. } => (*state, vec![]),
    }
}

fn resuming(mut now: Resuming, event: &Event) -> Option<Step> {
    let Resuming { mode, owner_epoch, lease_ran_out } = now;
    let stay = |now, actions| Some((State::Resuming(now), actions));
    // As a source that has served all along and knows what this one does.
    let serving = Serving {
        mode,
        owner_epoch,
        lease: if lease_ran_out { Lease::RanOut } else { Lease::Withdrawn },
        failed: false,
        death_proven: false,
        catch_ordered: false,
        recording_release: false,
    };
    match *event {
        Event::FateAsked { owner_epoch: asked } if asked < owner_epoch => stay(now, vec![answer_earlier()]),
        Event::FateAsked { owner_epoch: asked } if asked == owner_epoch => {
            let serving = Serving { lease: Lease::Granted, ..serving };
            Some((State::Serving(serving), vec![Action::AnswerFate(Fate::StillTethered), Action::GrantLease]))
        }
        Event::LeaseRanOut => {
            now.lease_ran_out = true;
            stay(now, vec![])
        }
        Event::GraceRanOut => Some(settle(&serving, Serving { failed: true, ..serving }, vec![])),
        Event::OperatorCatch => Some(settle(&serving, Serving { catch_ordered: true, ..serving }, vec![])),
        Event::DeathProven => {
            let proven = Serving { failed: true, death_proven: true, ..serving };
            Some(settle(&serving, proven, vec![]))
        }
        // It has said nothing over this session that could be refused; it asks again.
        Event::ReleaseAsked { .. } => stay(now, vec![Action::RefuseRelease]),
        // Of sessions that came to nothing, and of the process before this one.
        Event::DeathSign
        | Event::ConnectionClosed
        | Event::DestinationResumed
        | Event::StateSent
        | Event::SwitchFailed
        | Event::Cancelled
        | Event::GuestResumed => stay(now, vec![]),
        _ => None,
    }
}

fn running(owner_epoch: OwnerEpoch, event: &Event) -> Option<Step> {
    let stay = |actions| Some((State::Running { owner_epoch }, actions));
    match *event {
        Event::SwitchStarted { mode } => {
            let state = State::Switching { mode, owner_epoch, handed_over: false };
            Some((state, vec![Action::PauseGuest, Action::SendSwitch]))
        }
        // The guest runs here, so whoever asks has lost it.
        Event::FateAsked { .. } => stay(vec![answer_earlier()]),
        Event::ReleaseAsked { .. } => stay(vec![Action::RefuseRelease]),
        // Late words of a switch or session that is over.
        Event::StateSent
        | Event::DestinationResumed
        | Event::SwitchFailed
        | Event::Cancelled
        | Event::DeathSign
        | Event::ConnectionClosed
        | Event::LeaseRanOut
        | Event::OperatorCatch
        | Event::DeathProven
        | Event::GraceRanOut
        | Event::GuestResumed => stay(vec![]),
        Event::Revoked
        | Event::Folded
        | Event::CatchFailed { .. }
        | Event::ReleaseRecorded
        | Event::ReleaseFailed
        | Event::ArbiterGranted
        | Event::ArbiterRefused
        | Event::ArbiterAway
        | Event::CatchByForce => None,
    }
}

fn switching(mode: OutputMode, owner_epoch: OwnerEpoch, handed_over: bool, event: &Event) -> Option<Step> {
    let stay = |actions| Some((State::Switching { mode, owner_epoch, handed_over }, actions));
    match *event {
        Event::StateSent if !handed_over => {
            let state = State::Switching { mode, owner_epoch, handed_over: true };
            Some((state, vec![Action::SendGo { owner_epoch }]))
        }
        Event::DestinationResumed if handed_over => {
            let serving = Serving {
                mode,
                owner_epoch,
                lease: Lease::Granted,
                failed: false,
                death_proven: false,
                catch_ordered: false,
                recording_release: false,
            };
            Some((State::Serving(serving), vec![Action::GrantLease]))
        }
        Event::SwitchFailed | Event::Cancelled | Event::DeathSign | Event::ConnectionClosed | Event::DeathProven => {
            Some(if handed_over {
                // It may have resumed, committed and shown output before it fell silent: a catch like any other. No lease was granted
                // yet, so this needs no proof of death under `lease` either.
                begin_catch(owner_epoch)
            } else {
                let actions = vec![Action::SendAbort, Action::ResumeGuest, Action::Report(Named::SwitchTakenBack)];
                (State::Running { owner_epoch }, actions)
            })
        }
        Event::FateAsked { owner_epoch: asked } if asked < owner_epoch => stay(vec![answer_earlier()]),
        // Fenced before we heard that it had resumed: the closed connection will be noticed here too, it asks again then.
        Event::FateAsked { owner_epoch: asked } if asked == owner_epoch && handed_over => stay(vec![]),
        Event::LeaseRanOut | Event::GraceRanOut | Event::GuestResumed => stay(vec![]),
        _ => None,
    }
}

fn serving(before: Serving, event: &Event) -> Option<Step> {
    let mut now = before;
    let mut actions = vec![];
    match *event {
        Event::DeathSign | Event::ConnectionClosed => now.failed = true,
        Event::LeaseRanOut => {
            now.failed = true;
            // Where renewals were still granted this is only silence: one may have been granted since it was noticed. It is withdrawn
            // now (`settle`), and has run out when that much time has passed again.
            if now.lease == Lease::Withdrawn {
                now.lease = Lease::RanOut;
            }
        }
        Event::OperatorCatch => now.catch_ordered = true,
        Event::DeathProven => {
            now.failed = true;
            now.death_proven = true;
        }
        Event::ReleaseAsked { .. } if now.recording_release => {}
        Event::ReleaseAsked { all_landed } if all_landed && !now.failed && !now.catch_ordered => {
            now.recording_release = true;
            actions.push(Action::RecordRelease);
        }
        Event::ReleaseAsked { .. } => {
            actions.extend([Action::RefuseRelease, Action::Report(Named::ReleaseRefused)]);
        }
        Event::ReleaseRecorded if now.recording_release => {
            let actions = vec![Action::AcknowledgeRelease, Action::Report(Named::Released)];
            return Some((State::Released { owner_epoch: now.owner_epoch }, actions));
        }
        Event::ReleaseFailed if now.recording_release => {
            now.recording_release = false;
            actions.extend([Action::RefuseRelease, Action::Report(Named::ReleaseRefused)]);
        }
        Event::FateAsked { owner_epoch } if owner_epoch < now.owner_epoch => actions.push(answer_earlier()),
        // While a release is being written no answer is known to be true, whatever was ordered meanwhile; it asks again.
        Event::FateAsked { owner_epoch } if owner_epoch == now.owner_epoch && now.recording_release => {}
        // There is no way back from an ordered catch, whether the lease has run out yet or not.
        Event::FateAsked { owner_epoch } if owner_epoch == now.owner_epoch && now.catch_ordered => {
            actions.push(Action::AnswerFate(Fate::Revoked));
        }
        Event::FateAsked { owner_epoch } if owner_epoch == now.owner_epoch => {
            now.failed = false;
            now.lease = Lease::Granted;
            actions.extend([Action::AnswerFate(Fate::StillTethered), Action::GrantLease]);
        }
        Event::DestinationResumed | Event::StateSent | Event::GuestResumed | Event::GraceRanOut => {}
        _ => return None,
    }
    Some(settle(&before, now, actions))
}

/// Begins the catch if it may begin now; otherwise sees to it that the lease runs out and that the operator knows.
fn settle(before: &Serving, mut now: Serving, mut actions: Vec<Action>) -> Step {
    if may_catch(&now) {
        let (state, catch) = begin_catch(now.owner_epoch);
        actions.extend(catch);
        return (state, actions);
    }
    let wants_catch = now.failed || now.catch_ordered;
    if wants_catch && now.lease == Lease::Granted {
        now.lease = Lease::Withdrawn;
        actions.push(Action::WithdrawLease);
    }
    // A release that is being written decides first; what then remains to be said is said by then.
    let known = |serving: &Serving| (serving.failed, serving.catch_ordered, serving.recording_release);
    if wants_catch && !now.recording_release && known(before) != known(&now) {
        // Until a catch is ordered it may come back over another session.
        if !now.catch_ordered {
            actions.push(Action::SeekDestination);
        }
        actions.push(Action::Report(if now.catch_ordered { Named::AwaitingLease } else { Named::AwaitingOperator }));
    }
    (State::Serving(now), actions)
}

/// Under `commit` nothing new can be shown there once the session is revoked, so any failure is reason enough. Under `lease` output
/// leaves there without asking: only a proof of death, or the operator's word when the lease has run out, makes it safe.
fn may_catch(now: &Serving) -> bool {
    !now.recording_release
        && match now.mode {
            OutputMode::Commit => now.failed || now.catch_ordered,
            OutputMode::Lease => {
                let ran_out = now.lease == Lease::RanOut || mutated(Mutation::LeaseIgnored);
                now.death_proven || (now.catch_ordered && ran_out)
            }
        }
}

/// To a destination of an owner epoch that is over.
fn answer_earlier() -> Action {
    Action::AnswerFate(if mutated(Mutation::StaleOwnerEpoch) { Fate::StillTethered } else { Fate::Revoked })
}

fn begin_catch(owner_epoch: OwnerEpoch) -> Step {
    let owner_epoch = owner_epoch.next();
    if mutated(Mutation::CatchBeforeRevoke) {
        let state = State::Revoking { owner_epoch, step: CatchStep::Fold, stuck: false };
        return (state, vec![Action::FoldAndLoad]);
    }
    claim(owner_epoch)
}

/// The claim comes before the revocation: whatever the destination hears of a revocation, and whatever it is told, is then true for good;
/// and while the arbiter is silent the tether is left whole.
fn claim(owner_epoch: OwnerEpoch) -> Step {
    let state = State::Revoking { owner_epoch, step: CatchStep::Claim, stuck: false };
    (state, vec![Action::Claim { owner_epoch }, Action::Report(Named::Catching)])
}

fn revoking(owner_epoch: OwnerEpoch, step: CatchStep, stuck: bool, event: &Event) -> Option<Step> {
    let go = |step, actions| Some((State::Revoking { owner_epoch, step, stuck: false }, actions));
    match (*event, step) {
        (Event::ArbiterGranted | Event::CatchByForce, CatchStep::Claim) => {
            go(CatchStep::Revoke, vec![Action::Revoke { owner_epoch }])
        }
        (Event::ArbiterRefused, CatchStep::Claim) if mutated(Mutation::RefusalIgnored) => {
            go(CatchStep::Revoke, vec![Action::Revoke { owner_epoch }])
        }
        (Event::ArbiterRefused, CatchStep::Claim) => {
            let actions = vec![Action::KeepMemory, Action::Report(Named::Ceded)];
            Some((State::Ceded { owner_epoch: owner_epoch.before() }, actions))
        }
        (Event::ArbiterAway, CatchStep::Claim) => go(step, vec![Action::Report(Named::AwaitingArbiter)]),
        // What it says is said for good; an answer that comes twice changes nothing.
        (Event::ArbiterGranted, _) => Some((State::Revoking { owner_epoch, step, stuck }, vec![])),
        // Whose the guest is is not known: it asks again.
        (Event::FateAsked { owner_epoch: asked }, CatchStep::Claim) if asked.next() == owner_epoch => {
            Some((State::Revoking { owner_epoch, step, stuck }, vec![]))
        }
        (Event::Revoked, CatchStep::Revoke) if !stuck => go(CatchStep::Fold, vec![Action::FoldAndLoad]),
        (Event::Folded, CatchStep::Fold) if !stuck && mutated(Mutation::OutboxLost) => {
            go(CatchStep::Resume, vec![Action::ResumeGuest])
        }
        (Event::Folded, CatchStep::Fold) if !stuck => {
            go(CatchStep::Resume, vec![Action::ResendOutput, Action::ResumeGuest])
        }
        (Event::GuestResumed, CatchStep::Resume) if !stuck => {
            Some((State::Running { owner_epoch }, vec![Action::Report(Named::Caught)]))
        }
        // While it is not revoked the destination may be well: not lost, whatever failed.
        (Event::CatchFailed { can_retry }, _) if !stuck => Some(if can_retry || step == CatchStep::Revoke {
            let named = if step == CatchStep::Revoke { Named::CannotRevoke } else { Named::CatchStuck };
            (State::Revoking { owner_epoch, step, stuck: true }, vec![Action::KeepMemory, Action::Report(named)])
        } else {
            (State::Lost { owner_epoch }, vec![Action::KeepMemory, Action::Report(Named::Lost)])
        }),
        (Event::OperatorCatch, step) if stuck => go(
            step,
            match step {
                CatchStep::Claim => vec![Action::Claim { owner_epoch }],
                CatchStep::Revoke => vec![Action::Revoke { owner_epoch }],
                CatchStep::Fold => vec![Action::FoldAndLoad],
                CatchStep::Resume => vec![Action::ResendOutput, Action::ResumeGuest],
            },
        ),
        (Event::FateAsked { owner_epoch: asked }, _) if asked < owner_epoch => {
            Some((State::Revoking { owner_epoch, step, stuck }, vec![answer_earlier()]))
        }
        (Event::ReleaseAsked { .. }, _) => {
            Some((State::Revoking { owner_epoch, step, stuck }, vec![Action::RefuseRelease]))
        }
        (
            Event::StateSent
            | Event::DestinationResumed
            | Event::SwitchFailed
            | Event::Cancelled
            | Event::DeathSign
            | Event::ConnectionClosed
            | Event::LeaseRanOut
            | Event::OperatorCatch
            | Event::GraceRanOut
            | Event::DeathProven,
            _,
        ) => Some((State::Revoking { owner_epoch, step, stuck }, vec![])),
        _ => None,
    }
}

fn released(state: &State, event: &Event) -> Option<Step> {
    let actions = match *event {
        // Its acknowledgement may have been lost.
        Event::ReleaseAsked { .. } => vec![Action::AcknowledgeRelease],
        Event::FateAsked { owner_epoch } if owner_epoch == state.owner_epoch() => {
            vec![Action::AnswerFate(Fate::Released)]
        }
        Event::FateAsked { owner_epoch } if owner_epoch < state.owner_epoch() => vec![answer_earlier()],
        Event::OperatorCatch => vec![Action::Report(Named::Released)],
        Event::DeathSign
        | Event::ConnectionClosed
        | Event::LeaseRanOut
        | Event::DeathProven
        | Event::GraceRanOut
        | Event::DestinationResumed => vec![],
        _ => return None,
    };
    Some((*state, actions))
}

fn lost(state: &State, event: &Event) -> Option<Step> {
    let actions = match *event {
        Event::FateAsked { owner_epoch } if owner_epoch < state.owner_epoch() => vec![answer_earlier()],
        Event::ReleaseAsked { .. } => vec![Action::RefuseRelease],
        Event::OperatorCatch => vec![Action::Report(Named::Lost)],
        Event::DeathSign
        | Event::ConnectionClosed
        | Event::LeaseRanOut
        | Event::DeathProven
        | Event::GraceRanOut
        | Event::DestinationResumed => vec![],
        _ => return None,
    };
    Some((*state, actions))
}

/// The guest is the destination's, as after a release, but that no record of this host's says so: the arbiter's does.
fn ceded(state: &State, event: &Event) -> Option<Step> {
    let actions = match *event {
        Event::FateAsked { owner_epoch } if owner_epoch == state.owner_epoch() => {
            vec![Action::AnswerFate(Fate::Released)]
        }
        Event::FateAsked { owner_epoch } if owner_epoch < state.owner_epoch() => vec![answer_earlier()],
        Event::ReleaseAsked { .. } => vec![Action::RefuseRelease],
        Event::OperatorCatch => vec![Action::Report(Named::Ceded)],
        Event::DeathSign
        | Event::ConnectionClosed
        | Event::LeaseRanOut
        | Event::DeathProven
        | Event::GraceRanOut
        | Event::ArbiterRefused
        | Event::ArbiterAway
        | Event::DestinationResumed => vec![],
        _ => return None,
    };
    Some((*state, actions))
}
