//! A fuzz target's corpus in tests: the inputs that are committed, and inputs made of them.

use proptest::prelude::*;
use std::fs;
use std::path::Path;

/// Most bytes of a committed corpus: a regression is a small file.
const MOST_BYTES: usize = 64 << 10;

/// The committed inputs of a target.
pub fn corpus(folder: &Path) -> Vec<Vec<u8>> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut files: Vec<_> = entries.map(|entry| entry.expect("an entry").path()).collect();
    files.sort();
    files.iter().map(|file| fs::read(file).expect("read")).collect()
}

/// Runs `target` over the corpus in `folder`, which must hold what our own encoders make today: `seeds`. With `BELAY_SEEDS=write`
/// they are written first.
pub fn check(folder: &Path, seeds: &[(&str, Vec<u8>)], target: fn(&[u8])) {
    if std::env::var("BELAY_SEEDS").as_deref() == Ok("write") {
        fs::create_dir_all(folder).expect("a folder");
        seeds.iter().for_each(|(name, bytes)| fs::write(folder.join(format!("seed-{name}")), bytes).expect("write"));
    }
    for (name, bytes) in seeds {
        let there = fs::read(folder.join(format!("seed-{name}"))).unwrap_or_default();
        assert!(there == *bytes, "seed-{name} is not what the encoders make today; BELAY_SEEDS=write makes it anew");
    }
    let inputs = corpus(folder);
    let bytes: usize = inputs.iter().map(Vec::len).sum();
    assert!(bytes <= MOST_BYTES, "{bytes} bytes in {}", folder.display());
    assert!(inputs.len() >= seeds.len());
    inputs.iter().for_each(|input| target(input));
}

/// An input of the corpus with a few bytes changed, cut or repeated; or any bytes.
pub fn changed(inputs: Vec<Vec<u8>>) -> impl Strategy<Value = Vec<u8>> {
    let hits = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6);
    let of_corpus = (prop::sample::select(inputs), hits, any::<prop::sample::Index>(), 0..4u8).prop_map(
        |(mut input, hits, place, how)| {
            for (at, byte) in hits {
                let at = at.index(input.len());
                input[at] = byte;
            }
            let at = place.index(input.len());
            match how {
                0 => input.truncate(at),
                1 => input.extend_from_within(at..),
                _ => {}
            }
            input
        },
    );
    prop_oneof![4 => of_corpus, 1 => prop::collection::vec(any::<u8>(), 0..512)]
}
