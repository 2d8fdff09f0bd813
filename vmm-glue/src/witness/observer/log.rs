//! What an observer saw, as a file: one packet a line.
//!
//! ```text
//! 1203 destination-4712 17 00000000000000010b…        microseconds, sender, sequence number, bytes in hexadecimal
//! ```

use super::{MAX_ARRIVALS, MAX_LABEL_BYTES, MAX_PACKET_BYTES, Seen, is_label};
use belay_checkpoint::json_lines::{LineReader, LinesError};
use std::io::{self, BufRead, Write};

/// Longest line: two numbers, a label, a packet and what stands between them.
const LONGEST_LINE: u64 = (2 * 20 + MAX_LABEL_BYTES + 2 * MAX_PACKET_BYTES + 4) as u64;

/// Writes down what was seen.
pub fn write(into: &mut impl Write, seen: &[Seen]) -> io::Result<()> {
    for packet in seen {
        write!(into, "{} {} {} ", packet.at_us, packet.sender, packet.sequence)?;
        for byte in &packet.bytes {
            write!(into, "{byte:02x}")?;
        }
        writeln!(into)?;
    }
    into.flush()
}

/// Reads such a file: no more than an observer writes down, in the order in which it saw it.
pub fn read(from: impl BufRead) -> Result<Vec<Seen>, LinesError> {
    let (mut lines, mut seen) = (LineReader::new(from), Vec::new());
    while let Some(line) = lines.line(LONGEST_LINE)? {
        let packet = packet(line);
        match packet {
            Some(_) if seen.len() == MAX_ARRIVALS => {
                return Err(lines.wrong(format!("no observer writes down more than {MAX_ARRIVALS} packets")));
            }
            Some(packet) => seen.push(packet),
            None => {
                let wanted = "it is no packet: microseconds, sender, sequence number, bytes in hexadecimal";
                return Err(lines.wrong(wanted.to_owned()));
            }
        }
    }
    Ok(seen)
}

fn packet(line: &[u8]) -> Option<Seen> {
    let mut fields = str::from_utf8(line).ok()?.split(' ');
    let at_us = number(fields.next()?)?;
    let sender = fields.next().filter(|sender| is_label(sender))?.into();
    let sequence = number(fields.next()?)?;
    let hex = fields.next()?.as_bytes();
    let (pairs, odd) = hex.as_chunks::<2>();
    let nibble = |digit: u8| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    };
    let bytes =
        pairs.iter().map(|&[high, low]| Some(nibble(high)? << 4 | nibble(low)?)).collect::<Option<Vec<u8>>>()?;
    let whole = odd.is_empty() && bytes.len() <= MAX_PACKET_BYTES && fields.next().is_none();
    whole.then_some(Seen { at_us, sender, sequence, bytes })
}

/// Digits as they are written, without a sign or zeros before them.
fn number(text: &str) -> Option<u64> {
    let number: u64 = text.parse().ok()?;
    (number.to_string() == text).then_some(number)
}

/// What a fuzz target asks of such a file: one that is read is written again byte for byte, and what is wrong is told short and printable.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz(bytes: &[u8]) {
    match read(bytes) {
        Ok(seen) => {
            let mut written = Vec::new();
            write(&mut written, &seen).expect("memory");
            assert!(written == bytes);
        }
        Err(error) => crate::fuzzing::told(&error),
    }
}

/// What an observer has seen, for the corpus.
#[cfg(test)]
pub(crate) fn seed() -> Vec<u8> {
    let packet =
        |at_us, sequence, bytes: &[u8]| Seen { at_us, sender: "source-1".into(), sequence, bytes: bytes.to_vec() };
    let mut written = Vec::new();
    write(&mut written, &[packet(7, 0, &[]), packet(1203, 1, &[0, 255, 16])]).expect("memory");
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_reads_back_as_it_was_written_and_a_line_that_is_none_is_told_by_its_number() {
        let written = seed();
        let seen = read(&*written).expect("our own");
        assert_eq!((seen.len(), &*seen[1].bytes, &*seen[1].sender), (2, &[0, 255, 16][..], "source-1"));
        for wrong in [
            "7 source 1 0g",
            "7 source 1 0",
            "7 source 1",
            "7  1 00",
            "07 source 1 00",
            "7 source 1 00 1",
            "7 source 1 0A",
        ] {
            let error = read([&*written, wrong.as_bytes(), b"\n"].concat().as_slice()).expect_err(wrong);
            assert!(error.to_string().starts_with("line 3: it is no packet"), "{wrong}: {error}");
        }
        let error = read(&written[..written.len() - 1]).expect_err("cut off");
        assert!(error.to_string().contains("cut off"), "{error}");
    }
}
