//! Sizes, durations and rates as people write them: `256M`, `10ms`, `20k`.

use serde::{Deserialize, Deserializer, Serialize};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// Why a quantity could not be read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum QuantityError {
    #[error("{text:?} has no number in front; write for example {example}")]
    NoNumber { text: String, example: &'static str },
    #[error("{text:?} has no unit of {of} behind it; use one of {known}")]
    NoUnit { text: String, of: &'static str, known: &'static str },
    #[error("{unit:?} in {text:?} is not a unit of {of}; use one of {known}")]
    UnknownUnit { text: String, unit: String, of: &'static str, known: &'static str },
    #[error("{text:?} is too large")]
    TooLarge { text: String },
}

impl QuantityError {
    /// What is wrong with the `unit` that stands behind the number in `text`.
    fn of_unit(text: &str, unit: &str, of: &'static str, known: &'static str) -> Self {
        let (text, unit) = (text.to_owned(), unit.to_owned());
        match unit.is_empty() {
            true => Self::NoUnit { text, of, known },
            false => Self::UnknownUnit { text, unit, of, known },
        }
    }
}

fn split<'a>(text: &'a str, example: &'static str) -> Result<(f64, &'a str), QuantityError> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let number = number.parse().map_err(|_| QuantityError::NoNumber { text: text.to_owned(), example })?;
    Ok((number, unit.trim()))
}

fn whole(value: f64, text: &str) -> Result<u64, QuantityError> {
    if value >= 2f64.powi(63) {
        return Err(QuantityError::TooLarge { text: text.to_owned() });
    }
    Ok(value.round() as u64)
}

macro_rules! text_serde {
    ($type:ty) => {
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }
        impl Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
    };
}

/// A number of bytes: `4096`, `256M`, `1GiB`; powers of 1024 throughout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bytes(pub u64);

impl FromStr for Bytes {
    type Err = QuantityError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (number, unit) = split(text, "256M")?;
        let shift = match unit.to_ascii_lowercase().trim_end_matches("ib").trim_end_matches('b') {
            "" => 0,
            "k" => 10,
            "m" => 20,
            "g" => 30,
            "t" => 40,
            _ => return Err(QuantityError::of_unit(text, unit, "size", "K, M, G, T")),
        };
        Ok(Self(whole(number * (1u64 << shift) as f64, text)?))
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => f.write_str("0"),
            n if n.is_multiple_of(1 << 30) => write!(f, "{}G", n >> 30),
            n if n.is_multiple_of(1 << 20) => write!(f, "{}M", n >> 20),
            n if n.is_multiple_of(1 << 10) => write!(f, "{}K", n >> 10),
            n => write!(f, "{n}"),
        }
    }
}

/// A span of time: `100us`, `10ms`, `1s`, `2m`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span(pub Duration);

impl FromStr for Span {
    type Err = QuantityError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (number, unit) = split(text, "10ms")?;
        let nanoseconds = match unit {
            "us" | "µs" => 1e3,
            "ms" => 1e6,
            "s" => 1e9,
            "m" | "min" => 60e9,
            _ => return Err(QuantityError::of_unit(text, unit, "time", "us, ms, s, min")),
        };
        Ok(Self(Duration::from_nanos(whole(number * nanoseconds, text)?)))
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (us, ns) = (self.0.as_micros(), self.0.as_nanos() % 1000);
        match us {
            us if ns > 0 => write!(f, "{us}.{}us", format!("{ns:03}").trim_end_matches('0')),
            us if us > 0 && us.is_multiple_of(1_000_000) => write!(f, "{}s", us / 1_000_000),
            us if us.is_multiple_of(1000) => write!(f, "{}ms", us / 1000),
            us => write!(f, "{us}us"),
        }
    }
}

/// Events a second: `20000` or `20k`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PerSecond(pub u64);

impl FromStr for PerSecond {
    type Err = QuantityError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (number, unit) = split(text, "20k")?;
        let factor = match unit.trim_end_matches("/s") {
            "" => 1.0,
            "k" => 1e3,
            "M" => 1e6,
            _ => return Err(QuantityError::of_unit(text, unit, "rate", "k, M (a second)")),
        };
        Ok(Self(whole(number * factor, text)?))
    }
}

impl fmt::Display for PerSecond {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A link rate: `10G` or `1G` bits a second, as network cards are named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BitRate {
    pub bits_per_s: u64,
}

/// A petabit: no link has as much, and up to there numbers are exact.
const MOST_BITS_PER_S: u64 = 1_000_000_000_000_000;

impl FromStr for BitRate {
    type Err = QuantityError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (number, unit) = split(text, "10G")?;
        let factor = match unit.trim_end_matches("bit/s").trim_end_matches("bit").trim_end_matches("b/s") {
            "M" => 1e6,
            "G" => 1e9,
            _ => return Err(QuantityError::of_unit(text, unit, "link rate", "M, G (bits a second)")),
        };
        let bits_per_s = whole(number * factor, text)?;
        if bits_per_s > MOST_BITS_PER_S {
            return Err(QuantityError::TooLarge { text: text.to_owned() });
        }
        Ok(Self { bits_per_s })
    }
}

impl fmt::Display for BitRate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bits = self.bits_per_s;
        match (bits % 1_000_000_000, bits % 1_000_000) {
            (0, _) => write!(f, "{}G", bits / 1_000_000_000),
            (_, 0) => write!(f, "{}M", bits / 1_000_000),
            (_, rest) => write!(f, "{}.{}M", bits / 1_000_000, format!("{rest:06}").trim_end_matches('0')),
        }
    }
}

text_serde!(Bytes);
text_serde!(Span);
text_serde!(PerSecond);
text_serde!(BitRate);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_read_as_people_write_them_and_print_back() {
        for (text, bytes) in [("4096", 4096), ("256M", 256 << 20), ("1GiB", 1 << 30), ("1.5g", 3 << 29)] {
            assert_eq!(text.parse::<Bytes>().unwrap().0, bytes, "{text}");
        }
        for (text, us) in [("100us", 100), ("10ms", 10_000), ("1s", 1_000_000), ("0.5ms", 500)] {
            assert_eq!(text.parse::<Span>().unwrap().0.as_micros(), us, "{text}");
            assert_eq!(text.parse::<Span>().unwrap().to_string().parse::<Span>().unwrap(), text.parse().unwrap());
        }
        assert_eq!("10G".parse::<BitRate>().unwrap().bits_per_s, 10_000_000_000);
        for text in ["10G", "1500M", "1.5M", "0.000001M"] {
            assert_eq!(text.parse::<BitRate>().unwrap().to_string(), text);
        }
        assert_eq!("1.25us".parse::<Span>().unwrap().to_string(), "1.25us");
        assert!("2000000G".parse::<BitRate>().is_err());
        assert_eq!("20k".parse::<PerSecond>().unwrap().0, 20_000);
    }

    #[test]
    fn a_wrong_quantity_says_what_would_be_right() {
        assert!("ten".parse::<Bytes>().unwrap_err().to_string().contains("256M"));
        let expected = r#""10" has no unit of time behind it; use one of us, ms, s, min"#;
        assert_eq!("10".parse::<Span>().unwrap_err().to_string(), expected);
        assert!("3 parsecs".parse::<Bytes>().unwrap_err().to_string().contains("parsecs"));
        assert!("99999999999999999T".parse::<Bytes>().is_err());
    }
}
