//! What may be different from one replay to the next: how the engine prefetches.

use crate::quantity;
use belay_transport::pull::Tuning;
use std::fmt;
use std::str::FromStr;

/// A way of prefetching, with the words it was asked for by.
#[derive(Debug, Clone)]
pub struct Policy {
    text: String,
    pub tuning: Tuning,
}

impl Policy {
    /// Whether the background pulls at all.
    pub fn pulls(&self) -> bool {
        self.tuning.hold_at_landed.is_none()
    }
}

impl FromStr for Policy {
    type Err = String;

    /// `default`; `demand`: nothing but faults; or what differs from the default: `bubble=BYTES`, `window=CHUNKS`, `chunk=BYTES`, `busy=BYTES`,
    /// `reads=N`, with commas between.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut tuning = Tuning::default();
        match text {
            "default" => {}
            "demand" => tuning.hold_at_landed = Some(0),
            _ => text.split(',').try_for_each(|word| set(&mut tuning, word))?,
        }
        tuning.busy_chunk_bytes = tuning.busy_chunk_bytes.min(tuning.chunk_bytes);
        Ok(Self { text: text.to_owned(), tuning })
    }
}

fn set(tuning: &mut Tuning, word: &str) -> Result<(), String> {
    let known = "default, demand, or bubble=, window=, chunk=, busy= and reads= with commas between";
    let (name, value) = word.split_once('=').ok_or_else(|| format!("{word:?} is none of {known}"))?;
    let bytes = || match value {
        "0" => Ok(0),
        _ => quantity::bytes(value).map_err(|error| error.to_string()),
    };
    let count = || value.parse::<usize>().map_err(|error| format!("{word:?}: {error}"));
    match name {
        "bubble" => tuning.bubble_bytes = bytes()?,
        "chunk" => tuning.chunk_bytes = bytes()?,
        "busy" => tuning.busy_chunk_bytes = bytes()?,
        "window" => tuning.bulk_chunks = count()?,
        "reads" => tuning.demand_reads = count()?,
        _ => return Err(format!("{name:?} is none of {known}")),
    }
    Ok(())
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_is_what_differs_from_the_default_and_says_its_own_words() {
        let tuning = |text: &str| text.parse::<Policy>().expect(text).tuning;
        let default = Tuning::default();
        assert_eq!(tuning("default").bubble_bytes, default.bubble_bytes);
        assert!(!"demand".parse::<Policy>().unwrap().pulls());
        let other = tuning("bubble=0,window=3,chunk=16K,reads=4");
        assert_eq!((other.bubble_bytes, other.bulk_chunks, other.demand_reads), (0, 3, 4));
        assert_eq!((other.chunk_bytes, other.busy_chunk_bytes), (16 << 10, 16 << 10), "busy is never the larger");
        assert_eq!(format!("{:<12}|", "busy=16K".parse::<Policy>().unwrap()), "busy=16K    |");
    }

    #[test]
    fn what_is_no_policy_is_told_what_would_be_one() {
        for (text, why) in [
            ("sweep", "none of default"),
            ("bubbles=1M", "none of default"),
            ("chunk=x", "64K"),
            ("window=-1", "window=-1"),
        ] {
            let told = text.parse::<Policy>().expect_err(text);
            assert!(told.contains(why), "{told}");
        }
    }
}
