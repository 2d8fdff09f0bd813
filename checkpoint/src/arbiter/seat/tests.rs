//! Seats at an arbiter in memory, whose answers can be lost.

use super::*;
use crate::arbiter::etcd::HttpError;
use std::time::Duration;

/// What becomes of the next writes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// Not heard.
    Unsent,
    /// Done, and the answer lost.
    AnswerLost,
    /// Not done, and the answer lost.
    RequestLost,
}

#[derive(Default)]
struct InMemory {
    held: Option<Held>,
    revision: u64,
    away: bool,
    fault: Option<Fault>,
}

impl InMemory {
    fn error(&self, written: bool) -> ArbiterError {
        let (address, doing, source) = ("http://memory".to_owned(), "be asked", HttpError::TimedOut);
        match written {
            true => ArbiterError::MayHaveHappened { address, doing, source },
            false => ArbiterError::NotAsked { address, doing, source },
        }
    }
}

impl Arbiter for InMemory {
    fn who(&mut self, _: &GuestName, _: Deadline) -> Result<Option<Held>, ArbiterError> {
        if self.away { Err(self.error(false)) } else { Ok(self.held.clone()) }
    }

    fn claim(
        &mut self,
        _: &GuestName,
        claim: &Claim,
        over: Option<Version>,
        _: Option<Duration>,
        _: Deadline,
    ) -> Result<Verdict, ArbiterError> {
        let fault = self.fault.take();
        if self.away || fault == Some(Fault::Unsent) {
            return Err(self.error(false));
        }
        if fault == Some(Fault::RequestLost) {
            return Err(self.error(true));
        }
        let won = self.held.as_ref().map(|held| held.version) == over;
        if won {
            self.revision += 1;
            let version = Version(self.revision);
            self.held = Some(Held { claim: claim.clone(), version, lease: None });
        }
        match (fault, won) {
            (Some(_), _) => Err(self.error(true)),
            (None, true) => Ok(Verdict::Ours(self.held.clone().expect("just written"))),
            (None, false) => Ok(match self.held.clone() {
                Some(held) if held.claim == *claim => Verdict::Ours(held),
                other => Verdict::Not(other),
            }),
        }
    }

    fn renew(&mut self, _: &GuestName, held: &Held, _: Deadline) -> Result<Verdict, ArbiterError> {
        Ok(Verdict::Ours(held.clone()))
    }
}

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(5))
}

fn seat(host: &str) -> Seat {
    let (guest, host) = ("vm1".parse().expect("a name"), host.to_owned());
    Seat { guest, host, migration: "00ff".to_owned() }
}

fn lent() -> InMemory {
    let mut arbiter = InMemory::default();
    seat("host-a").lend(&mut arbiter, OwnerEpoch(0), soon()).expect("nobody has it");
    arbiter
}

fn claim(arbiter: &mut InMemory, host: &str, standing: Standing) -> Result<Ruling, Unruled> {
    seat(host).claim(arbiter, standing, OwnerEpoch(0), soon())
}

#[test]
fn p2_of_source_and_destination_the_first_to_claim_has_the_guest_and_the_other_hears_so_for_good() {
    // On one host too, where both call themselves the same.
    for (source, destination) in [("host-a", "host-b"), ("host-a", "host-a")] {
        for first in [Standing::TakenBack, Standing::Kept] {
            let mut arbiter = lent();
            let second = if first == Standing::Kept { Standing::TakenBack } else { Standing::Kept };
            let host = |standing| if standing == Standing::Kept { destination } else { source };
            for _ in 0..2 {
                assert!(matches!(claim(&mut arbiter, host(first), first), Ok(Ruling::Ours(_))));
                assert!(matches!(claim(&mut arbiter, host(second), second), Ok(Ruling::Theirs(_))));
            }
        }
    }
}

#[test]
fn p2_a_claim_whose_answer_was_lost_is_settled_by_claiming_again_whether_it_was_done_or_not() {
    for (fault, asked) in [(Fault::Unsent, false), (Fault::AnswerLost, true), (Fault::RequestLost, true)] {
        let mut arbiter = lent();
        arbiter.fault = Some(fault);
        let lost = claim(&mut arbiter, "host-b", Standing::Kept).expect_err("no answer");
        assert_eq!(lost.asked, asked, "{lost}");
        let again = claim(&mut arbiter, "host-b", Standing::Kept).expect("an answer");
        assert!(matches!(again, Ruling::Ours(_)), "{again:?}");
    }
    let mut arbiter = lent();
    arbiter.away = true;
    assert!(!claim(&mut arbiter, "host-b", Standing::Kept).expect_err("away").asked);
}

#[test]
fn p2_a_record_that_is_gone_or_anothers_is_nobodys_to_take() {
    let mut gone = InMemory::default();
    let mut other = lent();
    other.held.as_mut().expect("lent").claim.migration = "ee00".to_owned();
    let mut later = lent();
    later.held.as_mut().expect("lent").claim.owner_epoch = OwnerEpoch(4);
    for (standing, host) in [(Standing::Kept, "host-b"), (Standing::TakenBack, "host-a")] {
        for arbiter in [&mut gone, &mut other, &mut later] {
            let before = arbiter.held.clone();
            let unruled = claim(arbiter, host, standing).expect_err("nobody's");
            assert!(!unruled.asked, "{unruled}");
            assert_eq!(arbiter.held, before);
        }
    }
}

#[test]
fn a_guest_is_lent_by_whoever_had_it_last_and_by_nobody_else() {
    let mut arbiter = lent();
    claim(&mut arbiter, "host-b", Standing::Kept).expect("an answer");
    let next = |host: &str| Seat { migration: "0100".to_owned(), ..seat(host) };
    let refused = next("host-a").lend(&mut arbiter, OwnerEpoch(0), soon()).expect_err("it is host-b's");
    assert!(refused.to_string().contains("host-b"), "{refused}");
    let held = next("host-b").lend(&mut arbiter, OwnerEpoch(0), soon()).expect("its own");
    assert_eq!(next("host-b").lend(&mut arbiter, OwnerEpoch(0), soon()).expect("said twice"), held);
    // What the earlier migration left can take nothing any more.
    assert!(claim(&mut arbiter, "host-a", Standing::TakenBack).is_err());
}
