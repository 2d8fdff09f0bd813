//! A real etcd on loopback.

use super::*;
use crate::testing::etcd::{Server, etcd};

impl Server {
    fn client(&self) -> Etcd {
        Etcd::new(self.address().parse().expect("an endpoint"))
    }
}

fn ours(verdict: Result<Verdict, ArbiterError>) -> Held {
    match verdict.expect("an answer") {
        Verdict::Ours(held) => held,
        Verdict::Not(other) => panic!("it is {other:?}"),
    }
}

#[test]
fn p2_of_all_who_claim_a_guest_over_one_version_exactly_one_has_it() {
    let Some(program) = etcd() else { return };
    let server = Server::start(program);
    let first = ours(server.client().claim(&vm1(), &claim_of("source", 0), None, None, soon()));
    assert_eq!(server.client().who(&vm1(), soon()).expect("an answer"), Some(first.clone()));
    let mut version = Some(first.version);
    for round in 1..=10 {
        let claimants: Vec<_> = (0..4)
            .map(|number| {
                let mut client = server.client();
                std::thread::spawn(move || {
                    client.claim(&vm1(), &claim_of(&format!("host-{number}"), round), version, None, soon())
                })
            })
            .collect();
        let verdicts = claimants.into_iter().map(|claimant| claimant.join().expect("no panic").expect("an answer"));
        let (won, lost): (Vec<_>, Vec<_>) = verdicts.partition(|verdict| matches!(verdict, Verdict::Ours(_)));
        let [Verdict::Ours(held)] = won.as_slice() else { panic!("{won:?}") };
        assert!(lost.iter().all(|other| *other == Verdict::Not(Some(held.clone()))), "{lost:?}");
        assert_eq!(server.client().who(&vm1(), soon()).expect("an answer").as_ref(), Some(held));
        version = Some(held.version);
    }
    // Nobody claims over what they have not read, and nobody over nothing where there is something.
    for over in [Some(first.version), None] {
        let late = server.client().claim(&vm1(), &claim_of("late", 99), over, None, soon()).expect("an answer");
        assert!(matches!(late, Verdict::Not(Some(_))), "{late:?}");
    }
}

#[test]
fn a_claim_outlives_its_arbiter_and_may_be_made_again() {
    let Some(program) = etcd() else { return };
    let mut server = Server::start(program);
    let mut client = server.client();
    let mine = claim_of("host-b", 2);
    let held = ours(client.claim(&vm1(), &mine, None, Some(Duration::from_secs(3600)), soon()));
    assert!(held.lease.is_some());
    server.kill();
    let bound = Duration::from_secs(2);
    assert!(
        client.who(&vm1(), Deadline::after(bound)).is_err()
            && client.renew(&vm1(), &held, Deadline::after(bound)).is_err()
    );
    server.start_again();
    assert_eq!(client.who(&vm1(), soon()).expect("an answer"), Some(held.clone()));
    assert_eq!(ours(client.renew(&vm1(), &held, soon())), held);
    // As if its first answer had been lost.
    assert_eq!(ours(client.claim(&vm1(), &mine, None, None, soon())), held);
    let other = client.claim(&vm1(), &claim_of("host-a", 2), None, None, soon()).expect("an answer");
    assert_eq!(other, Verdict::Not(Some(held)));
}

#[test]
fn a_claim_that_nobody_renews_is_nobodys_in_the_end_and_renewing_it_says_so() {
    let Some(program) = etcd() else { return };
    let server = Server::start(program);
    let mut client = server.client();
    let held = ours(client.claim(&vm1(), &claim_of("host-b", 1), None, Some(Duration::from_secs(1)), soon()));
    let end = Instant::now() + Duration::from_secs(60);
    while let Some(still) = client.who(&vm1(), soon()).expect("an answer") {
        assert_eq!(still, held);
        assert!(Instant::now() < end, "it does not run out");
        std::thread::sleep(Duration::from_millis(50));
    }
    let next = ours(client.claim(&vm1(), &claim_of("host-a", 2), None, None, soon()));
    let late = client.renew(&vm1(), &held, soon()).expect("an answer");
    assert_eq!(late, Verdict::Not(Some(next)));
}
