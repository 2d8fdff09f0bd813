//! The stop points of both roles, by the phase of a migration they lie in (see `belay_transport::stop_point`).

use super::case::Phase;
use belay_transport::stop_point;

/// The role of a migration that comes to a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum At {
    Source,
    Destination,
}

/// One place in the protocol: who comes there, its name, and the largest N for which `NAME:N` is certainly reached.
#[derive(Debug, Clone, Copy)]
pub struct Point {
    pub at: At,
    pub name: &'static str,
    pub times: u32,
}

const fn source(name: &'static str) -> Point {
    Point { at: At::Source, name, times: 1 }
}

const fn destination(name: &'static str) -> Point {
    Point { at: At::Destination, name, times: 1 }
}

const fn often(point: Point, times: u32) -> Point {
    Point { times, ..point }
}

/// The points of a phase; none where a phase is told by events.
pub fn of(phase: Phase) -> &'static [Point] {
    const PREPARE: &[Point] =
        &[source("source-connected"), destination("prepare-heard"), destination("prepared"), source("source-prepared")];
    const SWITCH: &[Point] = &[
        source("switch-paused"),
        source("switch-told"),
        destination("switch-heard"),
        destination("state-loading"),
        destination("state-loaded"),
        destination("loaded-told"),
        source("go-due"),
    ];
    const HANDOVER: &[Point] =
        &[source("go-told"), destination("go-heard"), destination("resumed"), destination("tether-started")];
    const LANDING: &[Point] = &[often(destination("page-landed"), 24), often(destination("demand-posted"), 6)];
    const EPOCH: &[Point] = &[
        often(destination("epoch-prepared"), 6),
        often(destination("epoch-stopped"), 6),
        often(destination("epoch-harvested"), 6),
        often(destination("epoch-staged"), 6),
        often(destination("epoch-resumed"), 6),
        often(destination("between-epochs"), 6),
    ];
    const RECORD: &[Point] = &[often(destination("mid-record"), 12)];
    const COMMIT: &[Point] = &[
        often(destination("commit-due"), 6),
        often(destination("commit-placed"), 6),
        often(destination("committed"), 6),
    ];
    const OUTPUT: &[Point] = &[often(destination("output-cleared"), 6), often(destination("output-shown"), 6)];
    const FOLD: &[Point] =
        &[often(source("fold-begun"), 5), often(source("fold-mid"), 5), often(source("fold-done"), 5)];
    const RELEASE: &[Point] = &[
        destination("release-asked"),
        source("release-due"),
        source("release-unsynced"),
        source("release-renamed"),
        source("release-recorded"),
        source("release-told"),
        destination("release-heard"),
    ];
    const CATCH: &[Point] = &[
        source("catch-begun"),
        source("catch-unrevoked"),
        source("catch-revoked"),
        source("catch-loaded"),
        source("catch-resume"),
        source("catch-resumed"),
        // Behind those at which a source that takes over stops too: where the guest had not run there is nothing to fold.
        source("catch-folding"),
    ];
    match phase {
        Phase::Prepare => PREPARE,
        Phase::Switch => SWITCH,
        Phase::Handover => HANDOVER,
        Phase::Landing => LANDING,
        Phase::Epoch => EPOCH,
        Phase::Record => RECORD,
        Phase::Commit => COMMIT,
        Phase::Output => OUTPUT,
        Phase::Fold => FOLD,
        Phase::Release => RELEASE,
        Phase::Catch => CATCH,
        Phase::Pull | Phase::Tethered => &[],
    }
}

/// `--stop-at NAME[:N]`, with a name that exists.
#[derive(Debug, Clone)]
pub struct StopAt(String);

impl std::str::FromStr for StopAt {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let (name, times) = text.split_once(':').unwrap_or((text, "1"));
        let known = || Phase::ALL.iter().flat_map(|&phase| of(phase)).map(|point| point.name);
        if !known().any(|known| known == name) {
            return Err(format!("no stop point of that name; there are {}", known().collect::<Vec<_>>().join(", ")));
        }
        match times.parse::<u32>() {
            Ok(1..) => Ok(Self(text.to_owned())),
            _ => Err("what follows the colon is a number from 1".to_owned()),
        }
    }
}

impl StopAt {
    /// Has this process stop there.
    pub fn arm(&self) {
        stop_point::arm(&self.0).expect("it was checked as it was read, and is given once");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn sources(directory: &Path, text: &mut String) {
        for entry in std::fs::read_dir(directory).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() {
                sources(&path, text);
            } else if path.extension().is_some_and(|kind| kind == "rs") {
                text.push_str(&std::fs::read_to_string(path).unwrap());
            }
        }
    }

    #[test]
    fn every_point_that_can_be_named_is_in_the_code_and_every_one_in_the_code_can_be_named() {
        let mut text = String::new();
        for part in ["transport", "checkpoint", "vmm-glue"] {
            sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(part).join("src"), &mut text);
        }
        let mut named: Vec<_> = Phase::ALL.iter().flat_map(|&phase| of(phase)).map(|point| point.name).collect();
        let calls = text.split("reached(\"").skip(1).filter_map(|rest| rest.split_once("\")")).map(|(name, _)| name);
        let mut called: Vec<_> = calls.filter(|&name| name != "anything").collect();
        named.sort_unstable();
        called.sort_unstable();
        called.dedup();
        assert_eq!(named, called);
    }
}
