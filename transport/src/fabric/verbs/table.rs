//! The tables that turn keys and offsets into addresses and rights of regions: what the owner has exported, as it was sent, and what
//! is registered here.
//!
//! A region is registered in chunks, and of guest RAM only what is populated, so one operation may touch several chunks or
//! fall into a hole. The owner's table comes from the network: it is checked before anything is looked up in it, so that no
//! length, count or address in it can lead anywhere but to a refusal.

use super::error::VerbsError;
use crate::fabric::exports::{MAX_EXPORTS, Right};
use serde::{Deserialize, Serialize};

/// Most chunks of all exports of a session together.
pub(super) const MAX_CHUNKS: usize = 1 << 17;

/// A registered run of a mapping, as operations need it: `key` is the lkey here, the rkey at the peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Span {
    /// Where in the mapping.
    pub offset: u64,
    pub len: u64,
    /// The device's address of its first byte.
    pub address: u64,
    pub key: u32,
}

/// One export as it travels.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ExportTable {
    pub key: u64,
    pub writable: bool,
    /// Sorted and disjoint.
    pub spans: Vec<Span>,
}

/// The owner's exports, checked.
#[derive(Debug, Default)]
pub(super) struct RemoteTable {
    exports: Vec<ExportTable>,
}

/// Whether spans are sorted, disjoint, not empty, and stay within 64 bits on both sides.
fn check(spans: &[Span]) -> Result<(), String> {
    let mut end = 0_u64;
    for span in spans {
        let Span { offset, len, address, .. } = *span;
        if len == 0 || offset < end {
            return Err(format!(
                "the chunk at {offset}+{len} is empty or overlaps the one before it, which ends at {end}"
            ));
        }
        end = offset.checked_add(len).ok_or_else(|| format!("the chunk at {offset}+{len} is beyond 64 bits"))?;
        address.checked_add(len).ok_or_else(|| format!("the address {address:#x}+{len} is beyond 64 bits"))?;
    }
    Ok(())
}

impl RemoteTable {
    /// Takes a table from the peer, if it is one.
    pub(super) fn checked(exports: Vec<ExportTable>) -> Result<Self, VerbsError> {
        let bad = |what| Err(VerbsError::BadTable { what });
        if exports.len() > MAX_EXPORTS {
            return bad(format!("{} exports, the limit is {MAX_EXPORTS}", exports.len()));
        }
        let chunks: usize = exports.iter().map(|export| export.spans.len()).sum();
        if chunks > MAX_CHUNKS {
            return bad(format!("{chunks} chunks, the limit is {MAX_CHUNKS}"));
        }
        for (at, export) in exports.iter().enumerate() {
            if export.key & 0xff != at as u64 {
                return bad(format!("export {at} has key {:#x}, which belongs elsewhere", export.key));
            }
            if let Err(what) = check(&export.spans) {
                return bad(format!("export {at}: {what}"));
            }
        }
        Ok(Self { exports })
    }

    /// Whether `other` has the same keys and rights: what a new version of a table may not change.
    pub(super) fn has_the_keys_of(&self, other: &Self) -> bool {
        let keys = |table: &Self| table.exports.iter().map(|export| (export.key, export.writable)).collect::<Vec<_>>();
        keys(self) == keys(other)
    }

    /// Where the export of `key` stands, if there is one with that right.
    #[inline]
    pub(super) fn find(&self, key: u64, right: Right) -> Option<usize> {
        let at = (key & 0xff) as usize;
        self.exports
            .get(at)
            .filter(|export| export.key == key && export.writable == (right == Right::Write))
            .map(|_| at)
    }

    /// The spans of the export at a place that [`RemoteTable::find`] gave.
    #[inline]
    pub(super) fn spans(&self, place: usize) -> &[Span] {
        self.exports.get(place).map_or(&[], |export| &export.spans)
    }

    /// The end of the last chunk of an export, for messages.
    pub(super) fn size(&self, place: usize) -> u64 {
        self.spans(place).last().map_or(0, |span| span.offset + span.len)
    }
}

/// The span that holds `offset`.
#[inline]
fn at(spans: &[Span], offset: u64) -> Option<usize> {
    let after = spans.partition_point(|span| span.offset <= offset);
    let index = after.checked_sub(1)?;
    let span = &spans[index];
    (offset - span.offset < span.len).then_some(index)
}

/// Whether every byte of `offset..offset + len` is in some span.
pub(super) fn covers(spans: &[Span], offset: u64, len: u64) -> bool {
    let Some(end) = offset.checked_add(len) else { return false };
    let Some(first) = at(spans, offset) else { return false };
    let mut reached = offset;
    for span in &spans[first..] {
        if span.offset > reached {
            return false;
        }
        reached = span.offset + span.len;
        if reached >= end {
            return true;
        }
    }
    false
}

/// One contiguous part of a span.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Part {
    pub address: u64,
    pub key: u32,
    pub len: u32,
}

/// As much of `offset..offset + len` as lies in the span that holds `offset`, and at most `most` bytes. `None`: no span does.
#[inline]
pub(super) fn part(spans: &[Span], offset: u64, len: u32, most: u32) -> Option<Part> {
    let span = &spans[at(spans, offset)?];
    let skip = offset - span.offset;
    let len = u64::from(len.min(most)).min(span.len - skip);
    // `len` came from a u32, so it fits one.
    Some(Part { address: span.address + skip, key: span.key, len: len as u32 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn span(offset: u64, len: u64) -> Span {
        Span { offset, len, address: 0x7000_0000 + 3 * offset, key: offset as u32 ^ 0x55 }
    }

    fn export(at: u64, spans: Vec<Span>) -> ExportTable {
        ExportTable { key: 0xabcd_0000 | at, writable: at == 1, spans }
    }

    #[test]
    fn a_table_that_lies_is_refused() {
        let refused = |exports| RemoteTable::checked(exports).unwrap_err().to_string();
        assert!(refused(vec![export(1, vec![])]).contains("belongs elsewhere"));
        assert!(refused(vec![export(0, vec![span(0, 0)])]).contains("empty"));
        assert!(refused(vec![export(0, vec![span(0, 4096), span(4095, 10)])]).contains("overlaps"));
        assert!(refused(vec![export(0, vec![span(8192, 1), span(0, 1)])]).contains("overlaps"));
        assert!(refused(vec![export(0, vec![span(u64::MAX, 2)])]).contains("64 bits"));
        let high = Span { address: u64::MAX - 5, ..span(0, 4096) };
        assert!(refused(vec![export(0, vec![high])]).contains("64 bits"));
        assert!(refused((0..65).map(|at| export(at, vec![])).collect()).contains("the limit is 64"));
        let many = (0..=MAX_CHUNKS as u64).map(|at| span(2 * at, 1)).collect();
        assert!(refused(vec![export(0, many)]).contains("chunks"));
    }

    #[test]
    fn a_key_is_found_with_its_right_only() {
        let table = RemoteTable::checked(vec![export(0, vec![span(0, 8)]), export(1, vec![span(0, 8)])]).unwrap();
        assert_eq!(table.find(0xabcd_0000, Right::Read), Some(0));
        assert_eq!(table.find(0xabcd_0000, Right::Write), None);
        assert_eq!(table.find(0xabcd_0001, Right::Write), Some(1));
        assert_eq!(table.find(0xabcd_0001, Right::Read), None);
        assert_eq!(table.find(0xabce_0000, Right::Read), None);
        assert_eq!(table.find(0xff, Right::Read), None);
        let other = RemoteTable::checked(vec![export(0, vec![]), export(1, vec![])]).unwrap();
        assert!(table.has_the_keys_of(&other));
        assert!(!table.has_the_keys_of(&RemoteTable::default()));
    }

    proptest! {
        /// Against the plainest model: where each byte is, or that it is nowhere.
        #[test]
        fn parts_lead_to_every_byte_of_what_is_covered_and_to_none_else(
            runs in prop::collection::vec((0..20_u64, 1..50_u64), 0..8),
            offset in 0..400_u64,
            len in 1..200_u32,
            most in 1..64_u32,
        ) {
            let (mut spans, mut next) = (Vec::new(), 0);
            for (gap, len) in runs {
                spans.push(span(next + gap, len));
                next += gap + len;
            }
            prop_assert!(check(&spans).is_ok());
            let model = |byte: u64| {
                let of = |s: &&Span| (s.offset..s.offset + s.len).contains(&byte);
                spans.iter().find(of).map(|s| (s.address + byte - s.offset, s.key))
            };
            let wanted: Option<Vec<_>> = (offset..offset + u64::from(len)).map(model).collect();
            prop_assert_eq!(covers(&spans, offset, u64::from(len)), wanted.is_some());
            let mut got = Vec::new();
            let mut done = 0;
            while done < len {
                let Some(part) = part(&spans, offset + u64::from(done), len - done, most) else { break };
                prop_assert!(part.len > 0 && part.len <= most);
                got.extend((0..u64::from(part.len)).map(|at| (part.address + at, part.key)));
                done += part.len;
            }
            prop_assert_eq!(wanted, (done == len).then_some(got));
        }

        #[test]
        fn nothing_overflows_whatever_is_asked(offset in any::<u64>(), len in any::<u32>()) {
            let spans = [span(0, 4096), Span { offset: u64::MAX - 10, len: 10, address: 0, key: 1 }];
            prop_assert!(!covers(&spans, offset, u64::from(len)) || u64::from(len) <= 4096);
            let _ = part(&spans, offset, len.max(1), u32::MAX);
        }
    }
}
