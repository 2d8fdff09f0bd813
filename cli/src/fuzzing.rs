//! What the fuzz target of `cli/fuzz` calls, and CI over its corpus: it takes any bytes, and panics when a parser breaks a promise.
//! See docs/fuzzing.md.

use crate::metrics::http;
use crate::operate::console::ConsoleOptions;
use crate::operate::protocol;
use crate::options::{
    ArbiterTable, ConfigFile, FabricOptions, FenceOptions, GuestOptions, NumaWish, PolicyChoice, ReleaseChoice,
    SecurityOptions, SourceLossOptions, StagingOptions, TetherOptions,
};
use crate::quantity::{BitRate, Bytes, PerSecond, Span};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt::{Debug, Display};
use std::str::FromStr;

/// What comes over the operator's socket, either way.
pub fn operator(data: &[u8]) {
    let Some((mode, bytes)) = data.split_first() else { return };
    match mode % 4 {
        0 => framed::<protocol::Request>(bytes, protocol::LONGEST_REQUEST),
        1 => framed::<protocol::Response>(bytes, protocol::LONGEST_ANSWER),
        2 => said_again::<protocol::Request>(bytes),
        _ => said_again::<protocol::Response>(bytes),
    }
}

/// Takes the frames out of what was received, one after the other.
fn framed<T: Serialize + DeserializeOwned>(received: &[u8], longest: usize) {
    let mut rest = received;
    while let Ok(Some(body)) = protocol::body(rest, longest) {
        assert!(!body.is_empty() && body.len() <= longest && body.len() + 4 <= rest.len());
        said_again::<T>(body);
        // A byte less is not a frame yet.
        assert_eq!(protocol::body(&rest[..body.len() + 3], longest), Ok(None));
        rest = &rest[body.len() + 4..];
    }
}

/// What is understood is written as something that is understood the same.
fn said_again<T: Serialize + DeserializeOwned>(body: &[u8]) {
    if let Ok(message) = protocol::parse::<T>(body) {
        let written = protocol::frame(&message);
        let again = protocol::body(&written, protocol::LONGEST_ANSWER).expect("short enough").expect("whole");
        let again: T = protocol::parse(again).expect("our own words");
        assert_eq!(protocol::frame(&again), written);
    }
}

/// What comes over a connection to the metrics: a request that is taken is one however its bytes come, and asks for a path.
pub fn metrics(data: &[u8]) {
    let whole = http::parse(data);
    if let Ok(Some(request)) = &whole {
        assert!(request.path.starts_with('/') && request.path.bytes().all(|byte| byte.is_ascii_graphic()));
    }
    if let Err(refusal) = &whole {
        assert!(refusal.answer().starts_with(b"HTTP/1.1 "));
    }
    let ends = [data.len() / 4, data.len() / 2, data.len().saturating_sub(1)];
    let before: Vec<_> = ends.iter().map(|&end| http::parse(&data[..end])).collect();
    for verdict in before {
        match verdict {
            // Nothing that follows takes a request or a refusal back.
            Ok(None) => {}
            decided => assert_eq!(decided, whole),
        }
    }
}

/// A configuration file, and every kind of text that an option takes.
pub fn config(data: &[u8]) {
    let Some((mode, bytes)) = data.split_first() else { return };
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    match mode % 9 {
        0 => file(text),
        1 => reads_back::<Bytes>(text),
        2 => reads_back::<Span>(text),
        3 => reads_back::<PerSecond>(text),
        4 => reads_back::<BitRate>(text),
        5 => reads_back::<PolicyChoice>(text),
        6 => reads_back::<ReleaseChoice>(text),
        7 => reads_back::<NumaWish>(text),
        _ => file(&text.replace(';', "\n")),
    }
}

/// What is understood is printed as something that is understood the same.
fn reads_back<T: FromStr + Display + PartialEq + Debug>(text: &str) {
    if let Ok(value) = text.parse::<T>() {
        let printed = value.to_string();
        assert_eq!(printed.parse::<T>().ok(), Some(value), "{text:?} was printed as {printed:?}");
    }
}

/// A file that is read says the same when its tables are written and read again, and holds no key that nobody knows.
fn file(text: &str) {
    let Ok(file) = toml::from_str::<ConfigFile>(text) else { return };
    same::<TetherOptions>(&file.tether);
    same::<StagingOptions>(&file.receive);
    same::<GuestOptions>(&file.guest);
    same::<FabricOptions>(&file.fabric);
    same::<SecurityOptions>(&file.security);
    same::<ConsoleOptions>(&file.operate);
    same::<FenceOptions>(&file.fence);
    same::<ArbiterTable>(&file.arbiter);
    let table: toml::Table = text.parse().expect("it was read");
    assert!(
        table
            .keys()
            .all(|key| ["tether", "receive", "guest", "fabric", "security", "operate", "fence", "arbiter"]
                .contains(&&**key)),
        "{text:?}"
    );
    // What is wrong with an arbiter is said; nobody who named one goes without.
    let (named, on_source_loss) = file.arbiter.clone().parts();
    if let Ok(None) = SourceLossOptions::default().or(on_source_loss).of(&named) {
        assert!(file.arbiter.arbiter.is_none() && file.arbiter.guest_name.is_none(), "{text:?}");
    }
    // Every file goes under any command line.
    let tether = TetherOptions::default().or(file.tether.clone());
    assert_eq!(written(&tether), written(&file.tether));
}

fn written<T: Serialize>(options: &T) -> String {
    toml::to_string(options).expect("options are written as they are read")
}

fn same<T: Serialize + DeserializeOwned>(options: &T) {
    let text = written(options);
    let again: T = toml::from_str(&text).unwrap_or_else(|error| panic!("{text}: {error}"));
    assert_eq!(written(&again), text);
}

#[cfg(test)]
#[path = "../../transport/src/fuzzing/corpus.rs"]
mod corpus;

#[cfg(test)]
mod tests {
    use super::corpus::{changed, check, corpus};
    use super::*;
    use belay_vmm_glue::migrate::operator::Ask;
    use proptest::prelude::*;
    use std::path::{Path, PathBuf};

    fn at(target: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target)
    }

    #[test]
    fn the_corpus_of_operator_breaks_no_promise() {
        let order =
            protocol::Wanted::Order { order: Ask::Promote { source_is_gone: true, by_force: true }, wait_ms: 30_000 };
        let request = |ask| protocol::frame(&protocol::Request { belay: protocol::VERSION, ask });
        let (status, order) = (request(protocol::Wanted::Status), request(order));
        let refused = protocol::answer(protocol::Said::Bad { why: "nothing runs here".to_owned() });
        let of = |mode: u8, bytes: &[u8]| [&[mode], bytes].concat();
        let seeds = [
            ("requests", of(0, &[&status[..], &order].concat())),
            ("answer", of(1, &refused)),
            ("request", of(2, &order[4..])),
            ("said", of(3, &refused[4..])),
        ];
        check(&at("operator"), &seeds, operator);
    }

    #[test]
    fn the_corpus_of_metrics_breaks_no_promise() {
        let scrape = "GET /metrics HTTP/1.1\r\nHost: host-b:9100\r\nAccept: text/plain;version=0.0.4\r\n\r\n";
        let seeds = [
            ("scrape", scrape.as_bytes().to_vec()),
            ("head", b"HEAD /metrics?x=1 HTTP/1.0\r\n\r\n".to_vec()),
            ("body", b"GET /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello".to_vec()),
        ];
        check(&at("metrics"), &seeds, metrics);
    }

    #[test]
    fn the_corpus_of_config_breaks_no_promise() {
        let file = "[tether]\npolicy = \"dirty:4096,max=100ms\"\noutput = \"lease\"\ntracker = \"uffd-wp\"\nlease = \"1.5s\"\n\
            ring = \"64M\"\nrelease = \"30s\"\nshards = 2\npace = \"2.5G\"\n[guest]\nmemory = \"1G\"\npage-size = \"2M\"\n\
            vmm = \"apart\"\n[fabric]\nfabric = \"verbs\"\ntrusted-fabric = true\nnuma-node = \"1\"\nib-port = 1\n\
            [security]\ncert = \"a.crt\"\ninsecure = true\n\
            [fence]\nfence-hook = \"power-off $BELAY_FENCE_HOST\"\nfence-timeout = \"60s\"\nfence-always = true\n\
            [arbiter]\narbiter = \"http://etcd-0:2379\"\nguest-name = \"vm1\"\non-source-loss = \"continue\"\n";
        let of = |mode: u8, text: &str| [&[mode], text.as_bytes()].concat();
        let seeds = [
            ("file", of(0, file)),
            ("bytes", of(1, "1.5GiB")),
            ("span", of(2, "0.25ms")),
            ("rate", of(3, "20k/s")),
            ("bits", of(4, "2.5Gbit/s")),
            ("policy", of(5, "dirty:4096,max=2.5ms")),
            ("release", of(6, "when-landed")),
            ("numa", of(7, "1")),
        ];
        check(&at("config"), &seeds, config);
    }

    proptest! {
        #[test]
        fn no_configuration_breaks_a_promise(input in changed(corpus(&at("config")))) {
            config(&input);
        }

        #[test]
        fn no_bytes_over_the_operators_socket_break_a_promise(input in changed(corpus(&at("operator")))) {
            operator(&input);
        }

        #[test]
        fn no_request_for_metrics_breaks_a_promise(input in changed(corpus(&at("metrics")))) {
            metrics(&input);
        }
    }
}
