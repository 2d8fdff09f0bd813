//! A recorded trace as a file: a line of JSON for the guest, and one for each stretch of its time.
//!
//! ```text
//! {"belay-trace":1,"pages":65536}
//! {"us":1003,"outputs":2,"runs":[[17,4],[4096,1]]}
//! ```
//! `us` is the guest's own time, `runs` the pages it wrote in it as (first, count), `outputs` the packets it sent. What a reader finds is bounded,
//! and what is wrong is told by its line.

use super::{Stretch, Trace};
use crate::json_lines::{LineReader, LineWriter, LinesError};
use serde::{Deserialize, Serialize};
use std::io::{self, BufRead, Write};
use std::time::Duration;

const VERSION: u32 = 1;
/// Longest line: a run for every other page of 64 GiB.
const LONGEST_LINE: u64 = 256 << 20;
/// Most stretches: a day of milliseconds.
const MOST_STRETCHES: usize = 24 * 3600 * 1000;
/// Most pages written in all of them: what whoever goes through them has to do.
const MOST_WRITES: u64 = 1 << 30;
const LONGEST_STRETCH: Duration = Duration::from_secs(3600);
const MOST_OUTPUTS: u32 = 1_000_000;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Head {
    #[serde(rename = "belay-trace")]
    version: u32,
    pages: u32,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    us: u64,
    outputs: u32,
    runs: Vec<(u32, u32)>,
}

/// Writes a trace as it comes.
#[derive(Debug)]
pub struct Writer<W: Write>(LineWriter<W>);

impl<W: Write> Writer<W> {
    /// Of a guest of so many pages.
    pub fn new(into: W, pages: u32) -> io::Result<Self> {
        let mut lines = LineWriter::new(into);
        lines.line(&Head { version: VERSION, pages })?;
        Ok(Self(lines))
    }

    /// What the guest did next.
    pub fn write(&mut self, stretch: Stretch) -> io::Result<()> {
        let Stretch { lasts, outputs, runs } = stretch;
        self.0.line(&Line { us: u64::try_from(lasts.as_micros()).unwrap_or(u64::MAX), outputs, runs })
    }

    /// Bytes written so far.
    pub fn bytes(&self) -> u64 {
        self.0.bytes()
    }

    /// Hands on what is still in buffers.
    pub fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// Reads a whole trace.
pub fn read(from: impl BufRead) -> Result<Trace, LinesError> {
    const NOTHING: LinesError = LinesError::Empty { what: "stretch of time" };
    let mut lines = LineReader::new(from);
    let Head { version, pages } = lines.next(LONGEST_LINE)?.ok_or(NOTHING)?;
    if version != VERSION {
        return Err(lines.wrong(format!("version {version}; this belay reads version {VERSION}")));
    }
    let (mut stretches, mut writes) = (Vec::new(), 0);
    while let Some(line) = lines.next::<Line>(LONGEST_LINE)? {
        if stretches.len() == MOST_STRETCHES {
            return Err(lines.wrong(format!("more than {MOST_STRETCHES} stretches")));
        }
        stretches.push(stretch(line, pages, &mut writes).map_err(|what| lines.wrong(what))?);
    }
    if stretches.is_empty() { Err(NOTHING) } else { Ok(Trace { pages, stretches }) }
}

/// A stretch of a guest with so many pages. `writes`: pages written in all of them so far.
fn stretch(line: Line, pages: u32, writes: &mut u64) -> Result<Stretch, String> {
    let Line { us, outputs, runs } = line;
    let lasts = Duration::from_micros(us);
    if lasts > LONGEST_STRETCH || outputs > MOST_OUTPUTS {
        return Err(format!("{lasts:?} with {outputs} packets; {LONGEST_STRETCH:?} and {MOST_OUTPUTS} are the most"));
    }
    for &(first, count) in &runs {
        if first.checked_add(count).is_none_or(|end| end > pages) {
            return Err(format!("{count} pages from {first} on; the guest has {pages}"));
        }
        *writes += u64::from(count);
        if *writes > MOST_WRITES {
            return Err(format!("more than {MOST_WRITES} pages written so far"));
        }
    }
    Ok(Stretch { lasts, outputs, runs })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "{\"belay-trace\":1,\"pages\":64}\n{\"us\":1003,\"outputs\":2,\"runs\":[[17,4],[0,1]]}\n";

    fn refused(text: &str) -> String {
        read(text.as_bytes()).expect_err(text).to_string()
    }

    #[test]
    fn a_trace_reads_back_as_it_was_written() {
        let mut written = Vec::new();
        let mut writer = Writer::new(&mut written, 64).unwrap();
        let mut stretch = Stretch { lasts: Duration::from_micros(1003), outputs: 2, runs: Vec::new() };
        [17, 18, 19, 20, 0].into_iter().for_each(|page| stretch.wrote(page));
        writer.write(stretch.clone()).unwrap();
        assert_eq!(writer.bytes(), TEXT.len() as u64);
        assert_eq!(String::from_utf8(written).unwrap(), TEXT);
        assert_eq!(stretch.pages().collect::<Vec<_>>(), [17, 18, 19, 20, 0]);
        assert_eq!(read(TEXT.as_bytes()).unwrap(), Trace { pages: 64, stretches: vec![stretch] });
    }

    #[test]
    fn what_is_no_trace_is_refused_by_its_line() {
        assert_eq!(refused(""), "it has no stretch of time in it");
        assert_eq!(refused("{\"belay-trace\":1,\"pages\":64}\n"), "it has no stretch of time in it");
        assert_eq!(refused("{\"belay-trace\":2,\"pages\":64}\n"), "line 1: version 2; this belay reads version 1");
        let after = |line: &str| refused(&format!("{TEXT}{line}\n"));
        assert_eq!(after("{\"us\":1,\"outputs\":0,\"runs\":[[63,2]]}"), "line 3: 2 pages from 63 on; the guest has 64");
        assert!(after("{\"us\":1,\"outputs\":0,\"runs\":[[4294967295,2]]}").starts_with("line 3: 2 pages"));
        assert!(after("{\"us\":9999999999,\"outputs\":0,\"runs\":[]}").starts_with("line 3: 9999.9"));
        assert!(after("{\"us\":1,\"outputs\":0}").starts_with("line 3: missing field `runs`"));
        assert!(after("").starts_with("line 3: "));
        assert_eq!(refused(&TEXT[..TEXT.len() - 1]), "line 2: it ends in the middle; the recording was cut off");
    }
}
