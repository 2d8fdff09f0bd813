//! Asking the arbiter whose a guest is, on a thread of its own: nothing that serves faults, pulls or folds ever waits for it.
//!
//! One try has a deadline, tries come more and more seldom, and they go on until the arbiter has said, or nobody wants to know any more: what
//! the operator can do meanwhile is said where it is told. Whether a claim that was not answered may be on its way is part of each report.

use belay_checkpoint::arbiter::etcd::{Endpoint, Etcd};
use belay_checkpoint::arbiter::{GuestName, Held, LendError, Ruling, Seat, Standing, Unruled};
use belay_checkpoint::journal::MigrationId;
use belay_checkpoint::ownership::OwnerEpoch;
use belay_transport::Deadline;
use belay_transport::explain;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use std::time::{Duration, Instant};

/// One try: reading the record and claiming it.
const ONE_TRY: Duration = Duration::from_secs(3);
/// Between two tries.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Lending a guest before it leaves: it runs meanwhile.
const LEND: Duration = Duration::from_secs(10);

/// Which arbiter, and who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arbitration {
    pub endpoint: Endpoint,
    pub guest: GuestName,
    /// This host, as it calls itself in every migration.
    pub host: String,
}

impl Arbitration {
    fn seat(&self, migration: MigrationId) -> Seat {
        Seat { guest: self.guest.clone(), host: self.host.clone(), migration: migration.to_string() }
    }

    /// Writes down that the guest is lent, before it can leave; tried again until it is known or the time is over.
    pub(super) fn lend(&self, migration: MigrationId, owner_epoch: OwnerEpoch) -> Result<Held, LendError> {
        let (seat, mut etcd) = (self.seat(migration), Etcd::new(self.endpoint.clone()));
        let over = Instant::now() + LEND;
        let mut pause = FIRST_PAUSE;
        loop {
            match seat.lend(&mut etcd, owner_epoch, Deadline::after(ONE_TRY)) {
                Err(LendError::NoAnswer(_) | LendError::Contended(_)) if Instant::now() + pause < over => {
                    std::thread::sleep(pause);
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
                lent => return lent,
            }
        }
    }

    /// One try to write down that a guest that was let go of is this host's: the next migration begins with that.
    pub(super) fn keep(&self, migration: MigrationId, lent: OwnerEpoch, bound: Duration) -> Result<Ruling, Unruled> {
        let mut etcd = Etcd::new(self.endpoint.clone());
        self.seat(migration).claim(&mut etcd, Standing::Kept, lent, Deadline::after(bound))
    }
}

/// What the arbiter has said, or that it has not.
#[derive(Debug)]
pub(super) enum Answer {
    /// The guest is ours, for good. The last.
    Granted { record: String },
    /// It is the other side's, for good. The last.
    Refused { record: String },
    /// It is asked again after this time: by itself, or, where nothing can have come of it (`untouched`), by whoever still wants to.
    Away { why: String, untouched: bool, again: Duration },
}

/// What is claimed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    pub migration: MigrationId,
    pub standing: Standing,
    /// Under which the guest was lent.
    pub lent: OwnerEpoch,
    /// A claim may be on its way that another process has sent.
    pub asked_before: bool,
}

/// A claim under way. Dropped, it is made no more; a try that is under way then ends by its deadline and is told to nobody.
#[derive(Debug)]
pub(super) struct Claims {
    answers: Receiver<Answer>,
    again: Sender<()>,
}

impl Claims {
    pub(super) fn start(arbitration: &Arbitration, wanted: Wanted) -> std::io::Result<Self> {
        let (say, answers) = bounded(1);
        let (again, told) = bounded(1);
        let (seat, etcd) = (arbitration.seat(wanted.migration), Etcd::new(arbitration.endpoint.clone()));
        let claim = move || claim_until_ruled(&seat, etcd, wanted, &say, &told);
        std::thread::Builder::new().name("arbiter".into()).spawn(claim)?;
        Ok(Self { answers, again })
    }

    pub(super) fn answers(&self) -> &Receiver<Answer> {
        &self.answers
    }

    /// Asks at once, if it waits for its time.
    pub(super) fn hurry(&self) {
        let _ = self.again.try_send(());
    }
}

fn claim_until_ruled(seat: &Seat, mut etcd: Etcd, wanted: Wanted, say: &Sender<Answer>, again: &Receiver<()>) {
    let (mut asked, mut pause) = (wanted.asked_before, FIRST_PAUSE);
    loop {
        let answer = match seat.claim(&mut etcd, wanted.standing, wanted.lent, Deadline::after(ONE_TRY)) {
            Ok(Ruling::Ours(held)) => Answer::Granted { record: held.claim.to_string() },
            Ok(Ruling::Theirs(held)) => Answer::Refused { record: held.claim.to_string() },
            Err(unruled) => {
                asked |= unruled.asked;
                Answer::Away { why: explain(&unruled.why), untouched: !asked, again: pause }
            }
        };
        let last = !matches!(answer, Answer::Away { .. });
        // Waits while the role is busy; a role that is gone hears nothing, and nobody wants to know any more.
        if say.send(answer).is_err() || last {
            return;
        }
        let told = match asked || wanted.standing == Standing::TakenBack {
            true => again.recv_timeout(pause),
            // While nothing is on its way another answer may make it needless, so that it is asked for anew.
            false => again.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        if told == Err(RecvTimeoutError::Disconnected) {
            return;
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}
