//! The same promises in CI: over each target's corpus, over its inputs changed at random, and over any bytes.

use super::{lanes, session, tables};
use proptest::prelude::*;
use std::path::{Path, PathBuf};

#[path = "corpus.rs"]
mod corpus;
use corpus::{changed, check, corpus};

fn at(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target)
}

#[test]
fn the_corpus_of_session_breaks_no_promise() {
    check(&at("session"), &crate::session::fuzzing::seeds(), session);
}

#[test]
fn the_corpus_of_lanes_breaks_no_promise() {
    check(&at("lanes"), &crate::fabric::tcp::fuzzing::seeds(), lanes);
}

#[test]
fn the_corpus_of_tables_breaks_no_promise() {
    let mut seeds = crate::fabric::verbs::fuzzing::seeds();
    seeds.extend(crate::fabric::local::fuzzing::seeds());
    seeds.extend(crate::pages::fuzzing::seeds());
    check(&at("tables"), &seeds, tables);
}

proptest! {
    #[test]
    fn no_bytes_on_a_session_break_a_promise(input in changed(corpus(&at("session")))) {
        session(&input);
    }

    #[test]
    fn no_bytes_on_a_lane_break_a_promise(input in changed(corpus(&at("lanes")))) {
        lanes(&input);
    }

    #[test]
    fn no_table_breaks_a_promise(input in changed(corpus(&at("tables")))) {
        tables(&input);
    }
}
