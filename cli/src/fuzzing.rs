//! What the fuzz target of `cli/fuzz` calls, and CI over its corpus: it takes any bytes, and panics when a parser breaks a promise.
//! See docs/fuzzing.md.

use crate::options::{
    ConfigFile, FabricOptions, GuestOptions, NumaWish, PolicyChoice, ReleaseChoice, SecurityOptions, TetherOptions,
};
use crate::quantity::{BitRate, Bytes, PerSecond, Span};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt::{Debug, Display};
use std::str::FromStr;

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
    same::<GuestOptions>(&file.guest);
    same::<FabricOptions>(&file.fabric);
    same::<SecurityOptions>(&file.security);
    let table: toml::Table = text.parse().expect("it was read");
    assert!(table.keys().all(|key| ["tether", "guest", "fabric", "security"].contains(&&**key)), "{text:?}");
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
    use proptest::prelude::*;
    use std::path::{Path, PathBuf};

    fn at() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/config")
    }

    #[test]
    fn the_corpus_of_config_breaks_no_promise() {
        let file = "[tether]\npolicy = \"dirty:4096,max=100ms\"\noutput = \"lease\"\ntracker = \"uffd-wp\"\nlease = \"1.5s\"\n\
            ring = \"64M\"\nrelease = \"30s\"\nshards = 2\npace = \"2.5G\"\n[guest]\nmemory = \"1G\"\npage-size = \"2M\"\n\
            vmm = \"apart\"\n[fabric]\nfabric = \"verbs\"\ntrusted-fabric = true\nnuma-node = \"1\"\nib-port = 1\n\
            [security]\ncert = \"a.crt\"\ninsecure = true\n";
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
        check(&at(), &seeds, config);
    }

    proptest! {
        #[test]
        fn no_configuration_breaks_a_promise(input in changed(corpus(&at()))) {
            config(&input);
        }
    }
}
