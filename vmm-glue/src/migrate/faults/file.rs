//! A trace of faults as a file: a line of JSON for the guest's memory, and one for each fault.
//!
//! ```text
//! {"belay-faults":1,"shards":1,"regions":[{"id":0,"page_bytes":4096,"frames":8192,"zero":[[100,4000]]}]}
//! {"ns":120034,"waited_ns":31200,"shard":0,"thread":4711,"region":0,"frame":17,"write":true}
//! ```
//! `frame` counts pages of `page_bytes` from the region's start, `zero` are frames that were zero at the switch, as (first, count). A fault's line is
//! written when it was answered; those that never were stand at the end with `"waited_ns":null`. What a reader finds is bounded, and what is wrong is
//! told by its line.

use super::{Fault, FaultTrace, Region};
use belay_checkpoint::json_lines::{LineReader, LineWriter, LinesError};
use belay_transport::{FrameIndex, PageSize, RegionId};
use serde::{Deserialize, Serialize};
use std::io::{self, BufRead, Write};

const VERSION: u32 = 1;
/// Longest first line: a run of zero frames for every other page of 16 GiB.
const LONGEST_HEAD: u64 = 64 << 20;
/// Longest line of a fault.
const LONGEST_LINE: u64 = 4096;
/// Most faults: each page of 64 GiB once.
const MOST_FAULTS: usize = 1 << 24;
const MOST_REGIONS: usize = 256;
/// Most memory that a guest of a trace has.
const MOST_BYTES: u64 = 1 << 40;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Head {
    #[serde(rename = "belay-faults")]
    version: u32,
    shards: u16,
    regions: Vec<HeadRegion>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct HeadRegion {
    id: u16,
    page_bytes: u64,
    frames: u64,
    zero: Vec<(u64, u64)>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    ns: u64,
    // With serde's default an absent one would be as good as null.
    #[serde(deserialize_with = "Option::deserialize")]
    waited_ns: Option<u64>,
    shard: u16,
    thread: u32,
    region: u16,
    frame: u64,
    write: bool,
}

/// Writes a trace as it comes.
#[derive(Debug)]
pub struct Writer<W: Write>(LineWriter<W>);

impl<W: Write> Writer<W> {
    /// Of a guest with such memory, served by so many shards.
    pub fn new(into: W, shards: u16, regions: &[Region]) -> io::Result<Self> {
        let region = |region: &Region| HeadRegion {
            id: region.id.0,
            page_bytes: region.page_size.bytes() as u64,
            frames: region.frames,
            zero: region.zero.clone(),
        };
        let mut lines = LineWriter::new(into);
        lines.line(&Head { version: VERSION, shards, regions: regions.iter().map(region).collect() })?;
        Ok(Self(lines))
    }

    pub fn write(&mut self, fault: &Fault) -> io::Result<()> {
        let Fault { ns, waited_ns, shard, thread, region, frame, write } = *fault;
        self.0.line(&Line { ns, waited_ns, shard, thread, region: region.0, frame: frame.0, write })
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
pub fn read(from: impl BufRead) -> Result<FaultTrace, LinesError> {
    const NOTHING: LinesError = LinesError::Empty { what: "fault" };
    let mut lines = LineReader::new(from);
    let first = lines.next(LONGEST_HEAD)?.ok_or(NOTHING)?;
    let (shards, regions) = head(first).map_err(|what| lines.wrong(what))?;
    let mut faults = Vec::new();
    while let Some(line) = lines.next(LONGEST_LINE)? {
        if faults.len() == MOST_FAULTS {
            return Err(lines.wrong(format!("more than {MOST_FAULTS} faults")));
        }
        faults.push(fault(&line, shards, &regions).map_err(|what| lines.wrong(what))?);
    }
    if faults.is_empty() {
        return Err(NOTHING);
    }
    faults.sort_by_key(|fault| fault.ns);
    Ok(FaultTrace { shards, regions, faults })
}

fn head(Head { version, shards, regions }: Head) -> Result<(u16, Vec<Region>), String> {
    if version != VERSION {
        return Err(format!("version {version}; this belay reads version {VERSION}"));
    }
    if shards == 0 || regions.is_empty() || regions.len() > MOST_REGIONS {
        return Err(format!(
            "{shards} shards over {} regions; at least one of each and {MOST_REGIONS} regions at most",
            regions.len()
        ));
    }
    let mut all: Vec<Region> = Vec::new();
    let mut bytes = 0_u64;
    for HeadRegion { id, page_bytes, frames, zero } in regions {
        let page_size = [PageSize::Small, PageSize::Huge].into_iter().find(|size| size.bytes() as u64 == page_bytes);
        let page_size = page_size.ok_or_else(|| format!("region {id} has pages of {page_bytes} bytes"))?;
        let size = frames.checked_mul(page_bytes).filter(|size| *size > 0 && *size <= MOST_BYTES);
        bytes += size.ok_or_else(|| format!("region {id} has {frames} frames"))?;
        if bytes > MOST_BYTES || all.iter().any(|region| region.id.0 == id) {
            return Err(format!("region {id} is there twice, or all regions have more than {MOST_BYTES} bytes"));
        }
        let mut end = 0;
        for (first, count) in &zero {
            let run_end = first.checked_add(*count).filter(|run_end| *first >= end && *run_end <= frames);
            end = run_end.ok_or_else(|| {
                format!("region {id}: {count} zero frames from {first} on, after {end}; it has {frames}")
            })?;
        }
        all.push(Region { id: RegionId(id), page_size, frames, zero });
    }
    Ok((shards, all))
}

fn fault(line: &Line, shards: u16, regions: &[Region]) -> Result<Fault, String> {
    let Line { ns, waited_ns, shard, thread, region, frame, write } = *line;
    if shard >= shards {
        return Err(format!("shard {shard}; there are {shards}"));
    }
    let known = regions.iter().find(|known| known.id.0 == region);
    let known = known.ok_or_else(|| format!("region {region}, which the first line does not have"))?;
    if frame >= known.frames {
        return Err(format!("frame {frame} of region {region}, which has {}", known.frames));
    }
    if ns.checked_add(waited_ns.unwrap_or(0)).is_none() {
        return Err(format!("it was answered {} ns after {ns}", waited_ns.unwrap_or(0)));
    }
    Ok(Fault { ns, waited_ns, shard, thread, region: known.id, frame: FrameIndex(frame), write })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    const TEXT: &str = r#"{"belay-faults":1,"shards":2,"regions":[{"id":0,"page_bytes":4096,"frames":64,"zero":[[3,4],[9,1]]},{"id":7,"page_bytes":2097152,"frames":2,"zero":[]}]}
{"ns":120034,"waited_ns":31200,"shard":0,"thread":4711,"region":0,"frame":17,"write":true}
{"ns":120000,"waited_ns":null,"shard":1,"thread":0,"region":7,"frame":1,"write":false}
"#;

    /// Both page sizes, answered and not.
    pub(crate) fn trace() -> FaultTrace {
        let small = Region { id: RegionId(0), page_size: PageSize::Small, frames: 64, zero: vec![(3, 4), (9, 1)] };
        let huge = Region { id: RegionId(7), page_size: PageSize::Huge, frames: 2, zero: Vec::new() };
        let (region, frame) = (RegionId(0), FrameIndex(17));
        let first = Fault { ns: 120_034, waited_ns: Some(31_200), shard: 0, thread: 4711, region, frame, write: true };
        let (region, frame) = (RegionId(7), FrameIndex(1));
        let earlier = Fault { ns: 120_000, waited_ns: None, shard: 1, thread: 0, region, frame, write: false };
        FaultTrace { shards: 2, regions: vec![small, huge], faults: vec![earlier, first] }
    }

    fn refused(text: &str) -> String {
        read(text.as_bytes()).expect_err(text).to_string()
    }

    #[test]
    fn a_trace_of_faults_reads_back_as_it_was_written_by_time() {
        let (mut written, trace) = (Vec::new(), trace());
        let mut writer = Writer::new(&mut written, trace.shards, &trace.regions).unwrap();
        trace.faults.iter().rev().for_each(|fault| writer.write(fault).unwrap());
        assert_eq!(writer.bytes(), TEXT.len() as u64);
        assert_eq!(String::from_utf8(written).unwrap(), TEXT);
        assert_eq!(read(TEXT.as_bytes()).unwrap(), trace);
    }

    #[test]
    fn what_is_no_trace_of_faults_is_refused_by_its_line() {
        let head = TEXT.lines().next().unwrap();
        assert_eq!(refused(""), "it has no fault in it");
        assert_eq!(refused(&format!("{head}\n")), "it has no fault in it");
        assert_eq!(
            refused(&TEXT.replace(":1,\"shards", ":2,\"shards")),
            "line 1: version 2; this belay reads version 1"
        );
        assert!(refused(&TEXT.replace("\"shards\":2", "\"shards\":0")).starts_with("line 1: 0 shards"));
        assert_eq!(refused(&TEXT.replace("4096", "8192")), "line 1: region 0 has pages of 8192 bytes");
        assert_eq!(
            refused(&TEXT.replace("[9,1]", "[6,9]")),
            "line 1: region 0: 9 zero frames from 6 on, after 7; it has 64"
        );
        assert!(refused(&TEXT.replace("\"id\":7", "\"id\":0")).starts_with("line 1: region 0 is there twice"));
        assert!(
            refused(&TEXT.replace("\"frames\":2,", "\"frames\":999999999999,")).starts_with("line 1: region 7 has")
        );
        let after = |line: &str| refused(&format!("{TEXT}{line}\n"));
        let line = TEXT.lines().nth(1).unwrap();
        assert_eq!(after(&line.replace(":17", ":64")), "line 4: frame 64 of region 0, which has 64");
        assert_eq!(
            after(&line.replace("\"region\":0", "\"region\":1")),
            "line 4: region 1, which the first line does not have"
        );
        assert_eq!(after(&line.replace("\"shard\":0", "\"shard\":2")), "line 4: shard 2; there are 2");
        assert!(after(&line.replace("120034", "18446744073709551615")).starts_with("line 4: it was answered 31200 ns"));
        assert!(after(&line.replace("\"write\"", "\"wrote\"")).starts_with("line 4: unknown field `wrote`"));
        assert!(after(&line.replace("\"waited_ns\":31200,", "")).starts_with("line 4: missing field `waited_ns`"));
        assert!(after("").starts_with("line 4: "));
        assert!(after(&" ".repeat(5000)).starts_with("line 4: it is longer than 4096 bytes"));
        assert_eq!(refused(&TEXT[..TEXT.len() - 9]), "line 3: it ends in the middle; the recording was cut off");
    }
}
