//! The same promises in CI: over each target's corpus, over its inputs changed at random, and over any bytes.

use super::{apart, control, guard, kept, observer, qemu, traces, will};
use proptest::prelude::*;
use std::path::{Path, PathBuf};

#[path = "../../../transport/src/fuzzing/corpus.rs"]
mod corpus;
use corpus::{changed, check, corpus};

fn at(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target)
}

#[test]
fn the_corpus_of_control_breaks_no_promise() {
    check(&at("control"), &crate::migrate::fuzzing::control_seeds(), control);
}

#[test]
fn the_corpus_of_guard_breaks_no_promise() {
    check(&at("guard"), &crate::guard::fuzzing::seeds(), guard);
}

#[test]
fn the_corpus_of_apart_breaks_no_promise() {
    let mut seeds = crate::kvm::apart::fuzzing::seeds();
    seeds.extend(crate::kvm::state::fuzzing::seeds());
    seeds.extend(crate::kvm::host_threads::fuzzing::seeds());
    check(&at("apart"), &seeds, apart);
}

#[test]
fn the_corpus_of_observer_breaks_no_promise() {
    check(&at("observer"), &crate::witness::fuzzing::seeds(), observer);
}

#[test]
fn the_corpus_of_kept_breaks_no_promise() {
    let mut seeds = crate::migrate::source::keep::fuzzing::seeds();
    seeds.extend(crate::migrate::release::seeds());
    check(&at("kept"), &seeds, kept);
}

#[test]
fn the_corpus_of_will_breaks_no_promise() {
    check(&at("will"), &crate::migrate::destination::will::seeds(), will);
}

#[test]
fn the_corpus_of_qemu_breaks_no_promise() {
    check(&at("qemu"), &crate::qemu::fuzzing::seeds(), qemu);
}

#[test]
fn the_corpus_of_traces_breaks_no_promise() {
    check(&at("traces"), &crate::migrate::fuzzing::trace_seeds(), traces);
}

proptest! {
    #[test]
    fn no_recording_breaks_a_promise(input in changed(corpus(&at("traces")))) {
        traces(&input);
    }

    #[test]
    fn no_bytes_of_a_qemu_or_its_relay_break_a_promise(input in changed(corpus(&at("qemu")))) {
        qemu(&input);
    }

    #[test]
    fn nothing_that_a_source_keeps_breaks_a_promise(input in changed(corpus(&at("kept")))) {
        kept(&input);
    }

    #[test]
    fn no_will_breaks_a_promise(input in changed(corpus(&at("will")))) {
        will(&input);
    }

    #[test]
    fn no_message_breaks_a_promise(input in changed(corpus(&at("control")))) {
        control(&input);
    }

    #[test]
    fn no_bytes_to_or_of_a_guard_break_a_promise(input in changed(corpus(&at("guard")))) {
        guard(&input);
    }

    #[test]
    fn no_frame_of_a_vmm_breaks_a_promise(input in changed(corpus(&at("apart")))) {
        apart(&input);
    }

    #[test]
    fn no_bytes_to_the_observer_break_a_promise(input in changed(corpus(&at("observer")))) {
        observer(&input);
    }
}
