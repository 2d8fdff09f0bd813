//! The board says what was noted, and no more.

use super::*;
use crate::migrate::observation::Observer;
use proptest::prelude::*;
use std::time::Duration;

fn watched(role: &'static str) -> (Arc<Board>, Observer) {
    let board = Arc::new(Board::new("vm", role));
    let ears = Arc::clone(&board);
    (board, Observer::new(role, move |seen| ears.heard(seen)))
}

fn failed(what: &str) -> Kind {
    Kind::Failed { what: what.into(), advice: "do this".into() }
}

#[test]
fn p9_an_error_is_told_with_the_causes_that_led_to_it() {
    let (board, observer) = watched("source");
    let first = observer.note(None, Kind::Prepared { took_us: 1 });
    let unrelated = observer.note(None, Kind::Blackout { took_us: 5 });
    let lost = observer.note(Some(&first), Kind::Noticed { by: "a sign".into() });
    assert_eq!(board.status().last_error.expect("a loss is an error").what, "the destination is lost: a sign");
    let end = observer.note(Some(&lost), failed("it broke"));
    let error = board.status().last_error.expect("told");
    let ids: Vec<_> = error.story.iter().map(|seen| seen.id.clone()).collect();
    assert_eq!((&*error.what, &*error.advice, ids), ("it broke", "do this", vec![first, lost, end]));
    assert!(!error.story.iter().any(|seen| seen.id == unrelated));
    assert_eq!(board.status().blackout_us, Some(5));
}

#[test]
fn p7_a_story_and_what_is_remembered_are_bounded() {
    let (board, observer) = watched("source");
    let mut last = observer.note(None, Kind::Prepared { took_us: 1 });
    for _ in 0..10 * REMEMBERED {
        last = observer.note(Some(&last), failed("again"));
    }
    assert_eq!(board.status().last_error.expect("told").story.len(), STORY);
    assert_eq!(lock(&board.facts).remembered.len(), REMEMBERED);
}

#[test]
fn commits_make_age_rate_and_pause() {
    let (board, _) = watched("destination");
    assert_eq!(board.status().checkpoints, None);
    let now = monotonic_us();
    for epoch in 1..=100_u64 {
        let held_back_us = if epoch % 10 == 0 { 2000 } else { 0 };
        let (pages, bytes, pause_us, commit_us, age_us) = (200, 4096, 600, 900, 1500);
        let copied_on_write = None;
        let kind = Kind::Committed { epoch, pages, bytes, pause_us, held_back_us, commit_us, age_us, copied_on_write };
        let id = ObservationId(format!("destination-1-{epoch}"));
        board.heard(&Observation { id, parent: None, at_us: now - 1_000_000 + epoch * 10_000, kind });
    }
    let checkpoints = board.status().checkpoints.expect("there are some");
    assert_eq!((checkpoints.committed_epoch, checkpoints.commits, checkpoints.pages), (100, 100, 20_000));
    assert_eq!(checkpoints.held_back_us, 20_000);
    // 200 pages every 10 ms.
    let rate = checkpoints.dirty_pages_per_second.expect("a hundred of them make a rate");
    assert!((rate - 20_000.0).abs() < 200.0, "{rate}");
    let age = checkpoints.commit_age_us.expect("known");
    assert!((1500..2_000_000).contains(&age), "{age}");
    let pause = checkpoints.pause.expect("known");
    assert_eq!((pause.count, pause.buckets[9]), (100, 100), "600 µs is between 2^9 and 2^10");
    assert!((594_000..=606_000).contains(&pause.p50_ns), "{pause:?}");
}

#[test]
fn a_rate_is_of_the_last_second_and_nothing_when_all_is_quiet() {
    let mut rate = Rate::default();
    assert_eq!(rate.at(5), None);
    for ms in 0..=10_000_u64 {
        // Slow at first, ten times as fast for the last two seconds.
        let counter = if ms < 8000 { ms } else { 8000 + (ms - 8000) * 10 };
        rate.sample(ms * 1000, counter);
    }
    let now = rate.at(10_000_000).expect("sampled");
    assert!((now - 10_000.0).abs() < 500.0, "{now}");
    assert!(rate.0.len() <= 2 + (RATE_WINDOW_US / SAMPLE_US) as usize, "bounded: {}", rate.0.len());
    assert_eq!(rate.at(12_000_000), Some(0.0));
}

#[test]
fn states_carry_their_owner_epoch_and_a_status_reads_back_as_it_was_written() {
    let (board, observer) = watched("destination");
    board.phase("listening", "at unix:/x");
    assert_eq!((board.status().state, board.status().owner_epoch), ("listening".into(), None));
    board.entered("Tethered", Some(3), "GuestResumed");
    board.entered("Owner", None, "ReleaseAcknowledged");
    board.session(0xabc);
    board.turned(Some((super::super::lease::boot_time() + Duration::from_secs(9)).as_nanos() as u64));
    observer.note(None, failed("x"));
    let status = board.status();
    assert_eq!((&*status.state, status.owner_epoch), ("owner", Some(3)));
    assert_eq!(status.migration.as_deref(), Some("0000000000000abc"));
    assert!((8_000_000..=9_000_000).contains(&status.lease_left_us.expect("granted")));
    let text = serde_json::to_string(&status).expect("plain data");
    assert_eq!(serde_json::from_str::<Status>(&text).expect("reads back"), status);
}

proptest! {
    #[test]
    fn every_time_is_in_the_bucket_that_qemu_would_count_it_in(ns in 0..20_000_000_000_u64) {
        let bucket = bucket_of(ns);
        let us = ns / 1000;
        prop_assert!(bucket == 0 || us >= 1 << bucket, "{ns} ns in {bucket}");
        prop_assert!(bucket == BUCKETS - 1 || us < 1 << (bucket + 1), "{ns} ns in {bucket}");
    }

    #[test]
    fn no_duration_is_counted_twice_or_not_at_all(values in proptest::collection::vec(0..LONGEST_NS, 1..200)) {
        let mut histogram = Histogram::<u64>::new_with_max(LONGEST_NS, 2).expect("valid bounds");
        values.iter().for_each(|&ns| histogram.saturating_record(ns));
        let distribution = Distribution::of(&histogram).expect("not empty");
        prop_assert_eq!(distribution.buckets.iter().sum::<u64>(), values.len() as u64);
        let (sum, near) = (values.iter().sum::<u64>() as f64, distribution.sum_ns as f64);
        prop_assert!((sum - near).abs() <= sum * 0.02 + 1000.0, "{} for {}", near, sum);
    }
}
