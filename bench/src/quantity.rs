//! Sizes, times and rates as people write them on a command line: `4K`, `64K,1M`, `2us`, `30s`.

use std::time::Duration;

/// Why a quantity could not be read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{text:?} is not {what}; write for example {example}")]
pub struct QuantityError {
    text: String,
    what: &'static str,
    example: &'static str,
}

fn split(text: &str) -> Option<(f64, &str)> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    Some((number.parse().ok()?, unit.trim()))
}

/// Bytes: `4096`, `64K`, `1M`, `1GiB`; powers of 1024.
pub fn bytes(text: &str) -> Result<u64, QuantityError> {
    let wrong = || QuantityError { text: text.to_owned(), what: "a size", example: "4096, 64K or 1M" };
    let (number, unit) = split(text).ok_or_else(wrong)?;
    let shift = match unit.to_ascii_lowercase().trim_end_matches("ib").trim_end_matches('b') {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        _ => return Err(wrong()),
    };
    let bytes = number * f64::from(1 << shift);
    if (1.0..1e15).contains(&bytes) { Ok(bytes as u64) } else { Err(wrong()) }
}

/// A time: `2us`, `10ms`, `30s`, `5m`; seconds without a unit, as perftest's `-D` has it.
pub fn time(text: &str) -> Result<Duration, QuantityError> {
    let wrong = || QuantityError { text: text.to_owned(), what: "a time", example: "2us, 10ms, 30s or 5m" };
    let (number, unit) = split(text).ok_or_else(wrong)?;
    let seconds = match unit {
        "ns" => number * 1e-9,
        "us" | "µs" => number * 1e-6,
        "ms" => number * 1e-3,
        "" | "s" => number,
        "m" | "min" => number * 60.0,
        _ => return Err(wrong()),
    };
    if (0.0..1e9).contains(&seconds) { Ok(Duration::from_secs_f64(seconds)) } else { Err(wrong()) }
}

/// A link's rate as it was written, which is how belay reads it too.
#[derive(Debug, Clone, PartialEq)]
pub struct LinkRate {
    pub text: String,
    pub bits_per_s: f64,
}

/// Bits a second: `100M`, `2.5G`; powers of ten.
pub fn link_rate(text: &str) -> Result<LinkRate, QuantityError> {
    let wrong = || QuantityError { text: text.to_owned(), what: "a link rate", example: "1G or 10G" };
    let (number, unit) = split(text).ok_or_else(wrong)?;
    let scale = match unit {
        "k" | "K" => 1e3,
        "M" => 1e6,
        "G" => 1e9,
        _ => return Err(wrong()),
    };
    if number > 0.0 { Ok(LinkRate { text: text.to_owned(), bits_per_s: number * scale }) } else { Err(wrong()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_read_as_people_write_them() {
        for (text, expected) in [("4096", 4096), ("4k", 4096), ("64K", 65536), ("1MiB", 1 << 20), ("1.5G", 3 << 29)] {
            assert_eq!(bytes(text), Ok(expected), "{text}");
        }
        for (text, us) in [("2us", 2), ("10ms", 10_000), ("3", 3_000_000), ("1m", 60_000_000), ("0.5us", 0)] {
            assert_eq!(time(text).map(|time| time.as_micros()), Ok(us), "{text}");
        }
    }

    #[test]
    fn a_wrong_quantity_says_what_would_be_right() {
        for text in ["", "K", "0", "12 parsecs", "99999999999G"] {
            assert!(bytes(text).unwrap_err().to_string().contains("64K"), "{text}");
        }
        assert!(time("ten").unwrap_err().to_string().contains("10ms"));
    }
}
