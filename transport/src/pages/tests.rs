//! What the state file promises.

use super::*;
use proptest::prelude::*;

fn geometry(frames: &[u64]) -> Vec<RegionGeometry> {
    let region = |(id, frames): (usize, &u64)| RegionGeometry {
        id: RegionId(id as u16),
        page_size: PageSize::Small,
        frames: *frames,
    };
    frames.iter().enumerate().map(region).collect()
}

fn never(_: FrameIndex) {
    panic!("no discard was wanted");
}

#[test]
fn a_run_is_claimed_up_to_the_first_frame_that_is_not_absent() {
    let states = PageStates::in_memory(&geometry(&[3, 100])).unwrap();
    assert!(states.claim(1, FrameIndex(20)));
    assert!(!states.claim(1, FrameIndex(20)));
    assert_eq!(states.claim_run(1, FrameIndex(12), 64), 8);
    assert_eq!(states.claim_run(1, FrameIndex(21), 64), 64);
    assert_eq!(states.claim_run(1, FrameIndex(20), 64), 0);
    assert_eq!(states.counts(), Counts { absent: 30, in_flight: 73, ..Counts::default() });
}

#[test]
fn a_discard_in_flight_is_settled_when_the_read_is_over() {
    let states = PageStates::in_memory(&geometry(&[4])).unwrap();
    assert_eq!(states.claim_run(0, FrameIndex(0), 4), 4);
    assert_eq!(states.discard(0, FrameIndex(2)), Discard::Wanted);
    assert!(states.state_at(0, FrameIndex(2)).in_flight());
    let mut zeroed = Vec::new();
    states.land_run(0, FrameIndex(0), 4, &mut |frame| zeroed.push(frame.0));
    assert_eq!(zeroed, [2]);
    assert_eq!(states.state_at(0, FrameIndex(2)), State::Discarded);
    assert_eq!(states.counts(), Counts { landed: 3, discarded: 1, ..Counts::default() });
}

#[test]
fn a_new_page_server_finds_what_landed_and_reads_the_rest_again() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = dir.path().join("pages");
    let states = PageStates::create_in(&path, &geometry(&[10, 5])).unwrap();
    states.claim_run(0, FrameIndex(0), 6);
    states.land_run(0, FrameIndex(0), 2, &mut never);
    states.fail_run(0, FrameIndex(2), 1, &mut never);
    states.discard(0, FrameIndex(3));
    states.discard(1, FrameIndex(4));
    drop(states);

    let states = PageStates::open(RamFile::open(&path).unwrap()).unwrap();
    assert_eq!(states.geometry().collect::<Vec<_>>(), geometry(&[10, 5]));
    let found: Vec<_> = (0..6).map(|frame| states.state_at(0, FrameIndex(frame))).collect();
    use State::*;
    assert_eq!(found, [Landed, Landed, Absent, DiscardWanted, Absent, Absent]);
    assert_eq!(states.state_at(1, FrameIndex(4)), Discarded);
    states.settle_discard(0, FrameIndex(3));
    assert_eq!(states.counts(), Counts { absent: 11, in_flight: 0, landed: 2, discarded: 2, failed: 0 });
}

#[test]
fn p1_a_page_given_up_under_a_read_that_fails_is_never_read_again() {
    let states = PageStates::in_memory(&geometry(&[4])).unwrap();
    states.claim_run(0, FrameIndex(0), 3);
    states.discard(0, FrameIndex(1));
    let mut zeroed = Vec::new();
    states.fail_run(0, FrameIndex(0), 3, &mut |frame| zeroed.push(frame.0));
    assert_eq!(zeroed, [1]);
    let again = PageStates::open(RamFile::from_fd(rustix::io::dup(states.file()).unwrap()).unwrap()).unwrap();
    let found: Vec<_> = (0..4).map(|frame| again.state_at(0, FrameIndex(frame))).collect();
    use State::*;
    assert_eq!(found, [Absent, Discarded, Absent, Absent]);
}

#[test]
fn a_file_that_is_no_state_file_is_refused() {
    let damage = |offset: usize, value: u64| {
        let states = PageStates::in_memory(&geometry(&[10])).unwrap();
        states.mapping.store_u64(offset, value, Ordering::Release);
        let fd = rustix::io::dup(&states.file).unwrap();
        PageStates::open(RamFile::from_fd(fd).unwrap()).unwrap_err()
    };
    assert!(matches!(damage(0, 1), PagesError::Magic { magic: 1 }));
    assert!(matches!(damage(8, 2 | 1 << 32), PagesError::Version { version: 2 }));
    assert!(matches!(damage(8, VERSION), PagesError::RegionCount { count: 0 }));
    assert!(matches!(damage(16, 1 << 20), PagesError::Geometry { .. }));
    assert!(matches!(damage(24, 13), PagesError::Geometry { shift: 13, .. }));
    assert!(matches!(damage(32, 1 << 60), PagesError::Geometry { .. }));
    assert!(matches!(damage(32, 1 << 20), PagesError::Truncated { .. }));
    assert!(matches!(damage(HEADER, 6), PagesError::BadState { byte: 6, .. }));
}

#[test]
#[should_panic(expected = "only the owner of a READ lands it")]
fn landing_what_was_never_claimed_is_a_bug() {
    PageStates::in_memory(&geometry(&[1])).unwrap().land_run(0, FrameIndex(0), 1, &mut never);
}

/// What may be done to a frame by whom it belongs to.
#[derive(Debug, Clone, Copy)]
enum Step {
    Claim,
    Land,
    Fail,
    Release,
    Discard,
}

proptest! {
    #[test]
    fn counts_are_the_states_and_a_discard_is_for_good(
        steps in prop::collection::vec(
            (0..8u64, prop::sample::select(vec![Step::Claim, Step::Land, Step::Fail, Step::Release, Step::Discard])),
            0..200,
        )
    ) {
        let states = PageStates::in_memory(&geometry(&[8])).unwrap();
        for (frame, step) in steps {
            let (frame, before) = (FrameIndex(frame), states.state_at(0, FrameIndex(frame)));
            match step {
                Step::Claim => prop_assert_eq!(states.claim(0, frame), before == State::Absent),
                Step::Land if before.in_flight() => states.land_run(0, frame, 1, &mut |_| ()),
                Step::Fail if before.in_flight() => states.fail_run(0, frame, 1, &mut |_| ()),
                Step::Release if before.in_flight() => states.release_run(0, frame, 1, &mut |_| ()),
                Step::Discard => {
                    let wanted = states.discard(0, frame) == Discard::Wanted;
                    prop_assert_eq!(wanted, before.in_flight());
                }
                _ => {}
            }
            let after = states.state_at(0, frame);
            if before == State::Discarded {
                prop_assert_eq!(after, State::Discarded);
            }
            if before == State::DiscardWanted {
                prop_assert!(matches!(after, State::DiscardWanted | State::Discarded));
            }
            let count = |state: State| (0..8).filter(|f| states.state_at(0, FrameIndex(*f)) == state).count() as u64;
            let expected = Counts {
                absent: count(State::Absent),
                in_flight: count(State::InFlight) + count(State::DiscardWanted),
                landed: count(State::Landed),
                discarded: count(State::Discarded),
                failed: count(State::Failed),
            };
            prop_assert_eq!(states.counts(), expected);
        }
    }
}
